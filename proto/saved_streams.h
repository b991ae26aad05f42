// The files of saved streams: where they lie, and how many and how large they may be.
#ifndef SLUICE_PROTO_SAVED_STREAMS_H_
#define SLUICE_PROTO_SAVED_STREAMS_H_

#include <cstdint>
#include <filesystem>
#include <string>

namespace sluice {

// 0: no limit.
struct SavedLimits {
  int streams = 0;  // files
  int64_t bytes = 0;
};

// Thread-safe: nothing is remembered, the directory is read again each time.
class SavedStreams {
 public:
  // An empty directory: nothing is saved.
  SavedStreams(std::filesystem::path directory, const SavedLimits& all)
      : directory_(std::move(directory)), all_(all) {}

  // Empty if there is no directory or `id` is none: ids come from clients, and nothing else may
  // become part of a path. An account reaches its own files alone: their names carry its hash.
  std::filesystem::path FileOf(const std::string& id, const std::string& owner) const;
  // Whether this stream may be written now, the file that it replaces aside. Throws
  // ResourceExhausted naming the limit that is reached. The last file may go past the bytes.
  void Admit(const std::string& id, const std::string& owner, const SavedLimits& account) const;
  // Removes files, half-written ones as well, that were last written more than `days` ago.
  void RemoveOld(double days) const;

 private:
  const std::filesystem::path directory_;
  const SavedLimits all_;
};

}  // namespace sluice

#endif  // SLUICE_PROTO_SAVED_STREAMS_H_
