// A changed copy of a checkpoint in a directory that disappears with it.
#ifndef SLUICE_TESTS_SUPPORT_CHECKPOINT_COPY_H_
#define SLUICE_TESTS_SUPPORT_CHECKPOINT_COPY_H_

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

#include "runtime/safetensors.h"
#include "tests/support/temporary_directory.h"

namespace sluice {

class CheckpointCopy {
 public:
  // Copies everything but the weights, which `Write` writes when they are changed.
  explicit CheckpointCopy(const std::filesystem::path& from) : checkpoint_(Checkpoint::Open(from)) {
    for (const auto& file : std::filesystem::directory_iterator(from)) {
      std::filesystem::copy_file(file.path(), directory_ / file.path().filename());
    }
    for (const auto& [tensor, entry] : checkpoint_.tensors()) tensors_[tensor] = entry.view;
  }
  CheckpointCopy(const CheckpointCopy&) = delete;
  CheckpointCopy& operator=(const CheckpointCopy&) = delete;

  const std::filesystem::path& directory() const { return directory_; }
  std::map<std::string, ConstTensorView>& tensors() { return tensors_; }
  // Keeps a tensor that a test adds alive.
  ConstTensorView Keep(Tensor tensor) { return kept_.emplace_back(std::move(tensor)).view(); }

  // Gives every tensor another name; nothing drops it.
  void Rename(const std::function<std::string(const std::string&)>& renamed) {
    std::map<std::string, ConstTensorView> tensors;
    for (const auto& [name, view] : tensors_) tensors[renamed(name)] = view;
    tensors_ = std::move(tensors);
  }
  void Write() const { WriteSafetensors(directory_ / "model.safetensors", tensors_); }
  // The same in `count` files with an index; tensors are dealt like cards.
  void WriteShards(int count) const {
    std::filesystem::remove(directory_ / "model.safetensors");
    std::vector<std::map<std::string, ConstTensorView>> shards(count);
    nlohmann::json index = {{"metadata", nlohmann::json::object()}};
    int next = 0;
    for (const auto& [name, view] : tensors_) {
      const int shard = next++ % count;
      shards[shard][name] = view;
      index["weight_map"][name] = ShardName(shard, count);
    }
    for (int i = 0; i < count; ++i) {
      WriteSafetensors(directory_ / ShardName(i, count), shards[i]);
    }
    WriteText("model.safetensors.index.json", index.dump());
  }

  nlohmann::json ReadJson(const std::string& file) const {
    std::ifstream in(directory_ / file);
    return nlohmann::json::parse(in);
  }
  void WriteText(const std::string& file, const std::string& text) const {
    std::ofstream(directory_ / file, std::ios::binary) << text;
  }
  void EditJson(const std::string& file, const std::function<void(nlohmann::json&)>& edit) const {
    nlohmann::json json = ReadJson(file);
    edit(json);
    WriteText(file, json.dump());
  }
  void Remove(const std::string& file) const { std::filesystem::remove(directory_ / file); }

 private:
  static std::string ShardName(int shard, int count) {
    return "model-" + std::to_string(shard + 1) + "-of-" + std::to_string(count) + ".safetensors";
  }

  Checkpoint checkpoint_;
  const TemporaryDirectory temporary_;
  const std::filesystem::path directory_ = temporary_.path();
  std::map<std::string, ConstTensorView> tensors_;
  std::vector<Tensor> kept_;
};

}  // namespace sluice

#endif  // SLUICE_TESTS_SUPPORT_CHECKPOINT_COPY_H_
