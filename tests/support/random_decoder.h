// A decoder with random weights, kept as they are in its checkpoint for references to read.
#ifndef SLUICE_TESTS_SUPPORT_RANDOM_DECODER_H_
#define SLUICE_TESTS_SUPPORT_RANDOM_DECODER_H_

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>

#include "llm/families/llama_decoder.h"
#include "runtime/safetensors.h"
#include "runtime/weight_store.h"

namespace sluice {

struct RandomDecoder {
  // REQUIRES: config.tie_word_embeddings.
  explicit RandomDecoder(const LlamaConfig& config, DType compute_type = DType::kF32,
                         WeightPlace place = {}) {
    const int64_t width = config.hidden_size, inner = config.intermediate_size;
    const int64_t q = int64_t{config.num_heads} * config.head_dim;
    const int64_t kv = int64_t{config.num_kv_heads} * config.head_dim;
    // Products keep the size of what goes in, whatever the width. Queries and keys large enough
    // that attention is far from uniform and ranks differ by more than rounding.
    const float one = 1 / std::sqrt(static_cast<float>(width));
    Add("embed_tokens.weight", {config.vocab_size, width}, 0.5f, 0);
    Add("norm.weight", {width}, 0.1f, 1);
    for (int i = 0; i < config.num_layers; ++i) {
      const std::string layer = "layers." + std::to_string(i) + ".";
      Add(layer + "input_layernorm.weight", {width}, 0.2f, 1);
      Add(layer + "post_attention_layernorm.weight", {width}, 0.2f, 1);
      for (const auto& [name, rows] : {std::pair("q", q), std::pair("k", kv), std::pair("v", kv)}) {
        Add(layer + "self_attn." + name + "_proj.weight", {rows, width}, 1.7f * one, 0);
        if (config.qkv_bias) Add(layer + "self_attn." + name + "_proj.bias", {rows}, 0.3f, 0);
      }
      Add(layer + "self_attn.o_proj.weight", {width, q}, 1.1f * one, 0);
      Add(layer + "mlp.gate_proj.weight", {inner, width}, 1.1f * one, 0);
      Add(layer + "mlp.up_proj.weight", {inner, width}, 1.1f * one, 0);
      Add(layer + "mlp.down_proj.weight", {width, inner}, 1.1f * one, 0);
    }
    // Tests of several builds may run at once.
    const auto directory = std::filesystem::path(::testing::TempDir()) /
                           ("sluice_random_decoder_" + std::to_string(getpid()));
    std::filesystem::create_directories(directory);
    std::map<std::string, ConstTensorView> views;
    for (const auto& [name, tensor] : tensors) views["language_model." + name] = tensor.view();
    WriteSafetensors(directory / "model.safetensors", views);
    const Checkpoint checkpoint = Checkpoint::Open(directory);
    WeightStore weights(
        checkpoint, [](const std::string& name) { return std::optional<std::string>(name); },
        compute_type, place);
    decoder = LoadLlamaDecoder(weights, config);
    std::filesystem::remove_all(directory);
  }

  std::map<std::string, Tensor> tensors;  // by names behind "language_model."
  std::unique_ptr<Decoder> decoder;

 private:
  void Add(const std::string& name, Shape shape, float deviation, float mean) {
    std::normal_distribution<float> normal(mean, deviation);
    Tensor tensor(DType::kF32, shape);
    for (int64_t i = 0; i < shape.NumElements(); ++i) tensor.data<float>()[i] = normal(random_);
    tensors.emplace(name, std::move(tensor));
  }
  std::mt19937 random_{7};
};

}  // namespace sluice

#endif  // SLUICE_TESTS_SUPPORT_RANDOM_DECODER_H_
