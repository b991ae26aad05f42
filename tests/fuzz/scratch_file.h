// Bytes as a file, for what reads files only.
#ifndef SLUICE_TESTS_FUZZ_SCRATCH_FILE_H_
#define SLUICE_TESTS_FUZZ_SCRATCH_FILE_H_

#include <filesystem>
#include <fstream>
#include <string_view>

#include "tests/support/temporary_directory.h"

namespace sluice {

class ScratchFile {
 public:
  explicit ScratchFile(const char* name) : file_(directory_.path() / name) {}
  const std::filesystem::path& Holding(std::string_view bytes) const {
    std::ofstream(file_, std::ios::binary | std::ios::trunc)
        .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    return file_;
  }

 private:
  const TemporaryDirectory directory_;
  const std::filesystem::path file_;
};

}  // namespace sluice

#endif  // SLUICE_TESTS_FUZZ_SCRATCH_FILE_H_
