// Reads checkpoints in the safetensors format by memory map: one file, or a directory with
// `model.safetensors` or `model.safetensors.index.json` and its shards.
// Every size and offset is checked before use. Immutable after opening; safe for many readers.
#ifndef SLUICE_RUNTIME_SAFETENSORS_H_
#define SLUICE_RUNTIME_SAFETENSORS_H_

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "runtime/tensor.h"

namespace sluice {

// One memory-mapped file.
class SafetensorsFile {
 public:
  // Throws InputError, naming file, tensor, expected and found: not there, shorter than its header
  // says, header length beyond the file, header not JSON, unknown dtype, size != shape x dtype,
  // offsets out of bounds, overlapping or leaving holes, rank > 8, duplicate names.
  static std::shared_ptr<const SafetensorsFile> Open(const std::filesystem::path& path);
  ~SafetensorsFile();

  const std::filesystem::path& path() const { return path_; }
  // Ranks 5 to 8 appear with their axes from the fourth on merged: [E, 3, 2, 14, 14] is
  // [E, 3, 2, 196]. Nothing promises that data is aligned, not even to its elements.
  const std::map<std::string, ConstTensorView>& tensors() const { return tensors_; }
  // Tensors of dtypes that the format knows and we do not compute with (I64, F64, BOOL, ...), with
  // the name of that dtype. Their sizes are checked like all others.
  const std::map<std::string, std::string>& other_tensors() const { return other_tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  // Tells the system that these mapped pages will not be read again soon (after a copy was made of
  // them).
  void ReleasePages(ConstTensorView tensor) const;

 private:
  SafetensorsFile() = default;
  std::filesystem::path path_;
  void* map_ = nullptr;
  size_t map_bytes_ = 0;
  std::map<std::string, ConstTensorView> tensors_;
  std::map<std::string, std::string> other_tensors_;
  std::map<std::string, std::string> metadata_;
};

// All tensors of a checkpoint directory, under the names their files give them.
class Checkpoint {
 public:
  // Throws InputError: no safetensors in `directory`, index not JSON, a shard missing, a tensor in
  // another shard than the index says, a tensor in two shards.
  static Checkpoint Open(const std::filesystem::path& directory);

  struct Entry {
    ConstTensorView view;
    std::shared_ptr<const SafetensorsFile> file;
  };
  const std::map<std::string, Entry>& tensors() const { return tensors_; }
  // See SafetensorsFile::other_tensors.
  const std::map<std::string, std::string>& other_tensors() const { return other_tensors_; }
  // Tensors that the index names and no shard holds, with the file that should: published indices
  // name tied weights so. Whoever needs one says that it is missing.
  const std::map<std::string, std::string>& absent_tensors() const { return absent_tensors_; }
  const std::filesystem::path& directory() const { return directory_; }
  int64_t TotalBytes() const;
  // Of all names, dtypes and shapes and of a sample of every tensor's bytes: 16 hexadecimal digits
  // that tell one checkpoint from another, not a proof against forgery.
  std::string Fingerprint() const;

 private:
  std::filesystem::path directory_;
  std::map<std::string, Entry> tensors_;
  std::map<std::string, std::string> other_tensors_, absent_tensors_;
};

// Writes one file (for tests, tools and random checkpoints). Throws Error when the disk refuses.
void WriteSafetensors(const std::filesystem::path& path,
                      const std::map<std::string, ConstTensorView>& tensors,
                      const std::map<std::string, std::string>& metadata = {});

}  // namespace sluice

#endif  // SLUICE_RUNTIME_SAFETENSORS_H_
