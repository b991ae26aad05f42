// A model small enough to follow by eye, and a source that plays a script.
//
// The decoder's keys are the rows it was fed, which read as words ("f3.0" is token 0 of a picture
// of brightness 3, "nl" the newline row, "A" the id 65), and its answers depend on every one. So a
// test can read what a session remembers, and two sessions answer alike only if they remember
// alike.
#ifndef SLUICE_TESTS_STREAMING_FAKES_H_
#define SLUICE_TESTS_STREAMING_FAKES_H_

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "llm/vlm.h"
#include "runtime/error.h"
#include "streaming/source.h"

namespace sluice {

constexpr int kFakeVocab = 512;
constexpr int kFakeTokensPerFrame = 2;
constexpr int kFakeAnswerTokens = 3;

// Bytes are their own ids; the control strings of the templates follow.
class FakeTokenizer : public Tokenizer {
 public:
  static constexpr const char* kControl[] = {"<|im_start|>", "<|im_end|>", "<video>"};
  static constexpr int32_t kStop = 257;

  std::vector<int32_t> Encode(std::string_view text, SpecialTokens special, bool) const override {
    std::vector<int32_t> ids;
    while (!text.empty()) {
      size_t length = 1;
      int32_t id = static_cast<uint8_t>(text[0]);
      for (int32_t i = 0; special == SpecialTokens::kMatch && i < 3; ++i) {
        if (!text.starts_with(kControl[i])) continue;
        id = 256 + i;
        length = std::string_view(kControl[i]).size();
      }
      ids.push_back(id);
      text.remove_prefix(length);
    }
    return ids;
  }
  std::string Decode(std::span<const int32_t> ids, bool) const override {
    std::string text;
    for (int32_t id : ids) text += Text(id);
    return text;
  }
  std::optional<int32_t> TokenToId(std::string_view token) const override {
    for (int32_t i = 0; i < 3; ++i) {
      if (token == kControl[i]) return 256 + i;
    }
    return std::nullopt;
  }
  int32_t vocab_size() const override { return 259; }
  std::unique_ptr<Stream> NewStream(bool) const override {
    struct Bytes : Stream {
      std::string Push(int32_t id) override { return Text(id); }
      std::string Finish() override { return ""; }
    };
    return std::make_unique<Bytes>();
  }

 private:
  static std::string Text(int32_t id) {
    return id < 256 ? std::string(1, static_cast<char>(id)) : "";
  }
};

// A picture of one brightness b becomes the rows (b, column, 0, 1).
class FakeEncoder : public VisionEncoder {
 public:
  VisualTokens Encode(ExecContext& ctx, ConstTensorView pixels, std::span<const FramePtr> frames,
                      const EncodeHooks&) const override {
    if (before_encode) before_encode(frames);
    TraceScope trace(&ctx.tracer(), "encode", static_cast<int64_t>(frames.size()));
    trace.AddWork(static_cast<double>(frames.size()) * FlopsPerFrame(), 0);
    batches.push_back(static_cast<int>(frames.size()));
    VisualTokens tokens;
    tokens.grid_rows = 1;
    tokens.grid_cols = kFakeTokensPerFrame;
    tokens.features =
        Tensor(DType::kF32, {static_cast<int64_t>(frames.size()) * kFakeTokensPerFrame, 4});
    float* out = tokens.features.data<float>();
    for (size_t f = 0; f < frames.size(); ++f) {
      const float value = pixels.Slice(f, f + 1).data<float>()[0];
      const float brightness = std::round(value * 127.5f + 127.5f);
      for (int16_t col = 0; col < kFakeTokensPerFrame; ++col) {
        tokens.origins.push_back({static_cast<int32_t>(frames[f]->index), 0, col, frames[f]->time});
        for (float x : {brightness, float{1} * col, 0.0f, 1.0f}) *out++ = x;
      }
    }
    return tokens;
  }
  const PreprocessConfig& preprocess_config() const override { return config_; }
  int tokens_per_frame() const override { return kFakeTokensPerFrame; }
  int patches_per_frame() const override { return kFakeTokensPerFrame; }
  int head_dim() const override { return 1; }
  int64_t output_size() const override { return 4; }
  double FlopsPerFrame() const override { return 1000; }

  mutable std::vector<int> batches;                              // frames of each call
  std::function<void(std::span<const FramePtr>)> before_encode;  // may throw

 private:
  PreprocessConfig config_{.width = 4, .height = 4};
};

// Answers with kFakeAnswerTokens letters, each a hash of all that is in the cache.
class FakeDecoder : public Decoder {
 public:
  void Step(ExecContext& ctx, std::span<SequenceStep> sequences,
            const DecoderProbe&) const override {
    if (before_step) before_step(sequences);
    if (fail_next_step.exchange(false)) throw Error("[fake] the step failed");
    std::vector<int64_t> begins;
    for (const SequenceStep& step : sequences) begins.push_back(step.cache->length());
    try {
      for (const SequenceStep& step : sequences) {
        if (step.cache->length() + step.embeddings.dim(0) > positions) {
          throw InputError("[fake] too many positions");
        }
        step.cache->Reserve(ctx, step.embeddings.dim(0));
      }
    } catch (...) {
      for (size_t i = 0; i < begins.size(); ++i) sequences[i].cache->RewindTo({begins[i]});
      throw;
    }
    steps.push_back(static_cast<int>(sequences.size()));
    for (size_t i = 0; i < sequences.size(); ++i) {
      const SequenceStep& step = sequences[i];
      StoreKv(ctx, step.embeddings, step.embeddings, begins[i], step.cache->layer(0));
      last_memory_ = Memory(*step.cache);
      last_length_ = step.cache->length();
      if (step.logits.empty()) continue;
      int& told = told_[step.cache];
      told = step.embeddings.dim(0) > 1 ? 0 : told + 1;
      float* logits = step.logits.data<float>();
      std::fill(logits, logits + kFakeVocab, 0.0f);
      const size_t hash = std::hash<std::string>()(last_memory_);
      logits[told < answer_tokens ? 'a' + hash % 26 : FakeTokenizer::kStop] = 1;
    }
  }
  void Embed(ExecContext&, std::span<const int32_t> ids, TensorView out) const override {
    for (size_t i = 0; i < ids.size(); ++i) {
      float* row = out.data<float>() + 4 * i;
      row[0] = static_cast<float>(ids[i]);
      row[1] = row[2] = row[3] = 0;
    }
  }
  KvGeometry kv_geometry() const override {
    return {.num_layers = 1, .kv_heads = 1, .head_dim = 4, .dtype = DType::kF32};
  }
  int num_heads() const override { return 1; }
  int64_t hidden_size() const override { return 4; }
  int64_t vocab_size() const override { return kFakeVocab; }
  int64_t max_positions() const override { return positions; }
  ConstTensorView rotary_frequencies() const override { return {frequencies_, DType::kF32, {2}}; }
  double FlopsPerToken(int64_t) const override { return 100; }
  double LmHeadFlops() const override { return 10; }
  int64_t WeightBytesPerToken() const override { return 1000; }

  // What the cache holds, one word a position. Text runs are joined: "[user f0.0 f0.1 nl ...".
  std::string Memory(const KvCache& cache) const {
    std::string text;
    for (int64_t i = 0; i < cache.length(); ++i) text += Line(Key(cache, i));
    return text;
  }
  // The same of the latest step's cache, whatever became of it.
  const std::string& LastMemory() const { return last_memory_; }
  int64_t LastLength() const { return last_length_; }

  int64_t positions = 1000;
  int answer_tokens = kFakeAnswerTokens;
  mutable std::atomic<bool> fail_next_step = false;
  std::function<void(std::span<const SequenceStep>)> before_step;  // may throw
  mutable std::vector<int> steps;                                  // sequences of each call

 private:
  static const float* Key(const KvCache& cache, int64_t row) {
    const auto* block = static_cast<const float*>(cache.layer(0).blocks[row / kKvBlockTokens]);
    return block + 4 * (row % kKvBlockTokens);
  }
  static std::string Line(const float* row) {
    if (row[3] == 1) return " f" + std::to_string(int(row[0])) + "." + std::to_string(int(row[1]));
    if (row[3] == 2) return " nl ";
    const int id = static_cast<int>(row[0]);
    if (id >= 256) return FakeTokenizer::kControl[id - 256];
    return std::string(1, static_cast<char>(id));
  }
  mutable std::string last_memory_;
  mutable int64_t last_length_ = 0;
  mutable std::map<const KvCache*, int> told_;  // tokens of the answer on each cache
  static constexpr float frequencies_[] = {1, 0.1f};
};

// Used by one thread at a time.
class FakeVlm : public Vlm {
 public:
  FakeVlm() {
    defaults_.stop_ids = {FakeTokenizer::kStop};
    for (float x : {0.0f, 0.0f, 0.0f, 2.0f}) newline_.data<float>()[at_++] = x;
  }
  const VlmInfo& info() const override { return info_; }
  const FakeTokenizer& tokenizer() const override { return tokenizer_; }
  const PromptFormat& prompt_format() const override { return format_; }
  FakeEncoder& encoder() const override { return encoder_; }
  FakeDecoder& decoder() const override { return decoder_; }
  const GenerationDefaults& generation_defaults() const override { return defaults_; }
  ConstTensorView newline_row() const override { return newline_; }

 private:
  VlmInfo info_;
  FakeTokenizer tokenizer_;
  PromptFormat format_{PromptFormat::Revision::kChatMl};
  mutable FakeEncoder encoder_;
  mutable FakeDecoder decoder_;
  GenerationDefaults defaults_;
  Tensor newline_{DType::kF32, {4}};
  int at_ = 0;
};

// A picture of one brightness; its number and time follow from `index`, two a second.
inline FramePtr FakeFrame(int index, int brightness, std::optional<double> seconds = {}) {
  auto frame = std::make_shared<Frame>();
  frame->width = frame->height = 4;
  frame->rgb.assign(4 * 4 * 3, static_cast<uint8_t>(brightness));
  frame->index = index;
  frame->time = MediaTime::FromSeconds(seconds.value_or(0.5 * index));
  return frame;
}

// Plays frames 0..count-1, each of the brightness of its number.
class FakeSource : public Source {
 public:
  explicit FakeSource(int count, bool live = false) : count_(count) { info_.live = live; }

  const SourceInfo& info() const override { return info_; }
  FramePtr Next() override {
    if (cancelled_ || next_ >= count_) {
      finished_ = true;
      return nullptr;
    }
    if (before_frame) before_frame(next_);
    const int index = next_++;
    return FakeFrame(index, index % 256);
  }
  void Cancel() override { cancelled_ = true; }
  std::optional<std::string> warning() const override { return warning_line; }

  std::function<void(int index)> before_frame;  // on the producer's thread; may throw
  std::optional<std::string> warning_line;
  bool cancelled() const { return cancelled_; }
  bool finished() const { return finished_; }  // Next has said so, all before it was taken

 private:
  const int count_;
  int next_ = 0;
  std::atomic<bool> cancelled_ = false, finished_ = false;
  SourceInfo info_;
};

}  // namespace sluice

#endif  // SLUICE_TESTS_STREAMING_FAKES_H_
