#include "vision/families/siglip.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "runtime/convert.h"
#include "runtime/error.h"
#include "runtime/ops/attention.h"
#include "runtime/ops/norm.h"
#include "runtime/ops/traced_linear.h"
#include "runtime/parallel.h"
#include "vision/pooling.h"

namespace sluice {
namespace {

constexpr int kChannels = 3;
// Frames are encoded together up to so many patches: enough rows to keep the products at full
// speed, few enough to bound the scratch memory (about 60 MB at a width of 1152).
constexpr int64_t kMaxPatchesAtOnce = 3072;

struct NormWeights {
  Tensor weight, bias;  // [E] f32
};

struct SiglipLayer {
  NormWeights norm1, norm2;
  LinearWeight qkv;  // [3E, E]
  LinearWeight out;  // [E, E]
  LinearWeight fc1;  // [I, E]
  LinearWeight fc2;  // [E, I]
};

class SiglipEncoder : public VisionEncoder {
 public:
  SiglipEncoder(WeightStore& weights, const SiglipConfig& config);

  VisualTokens Encode(ExecContext& ctx, ConstTensorView pixels, std::span<const FramePtr> frames,
                      const TensorProbe& probe) const override;
  const PreprocessConfig& preprocess_config() const override { return config_.preprocess; }
  int tokens_per_frame() const override { return pool_.out_rows() * pool_.out_cols(); }
  int patches_per_frame() const override { return grid_ * grid_; }
  int64_t output_size() const override { return config_.output_size; }
  double FlopsPerFrame() const override;

 private:
  void EncodeBatch(ExecContext& ctx, ConstTensorView pixels, TensorView pooled,
                   const TensorProbe& probe) const;
  void EmbedPatches(ExecContext& ctx, ConstTensorView pixels, TensorView hidden) const;
  void RunLayer(ExecContext& ctx, const SiglipLayer& layer, TensorView hidden) const;
  void Normalise(ExecContext& ctx, const NormWeights& norm, ConstTensorView hidden,
                 TensorView y) const;

  SiglipConfig config_;
  int grid_;                      // patches along one side
  DType dtype_;                   // of weights and product inputs
  LinearWeight patch_embedding_;  // [E, 3 * patch * patch]
  Tensor positions_;              // [N, E] f32
  std::vector<SiglipLayer> layers_;
  LinearWeight projector1_, projector2_;  // [D, E], [D, D]
  BilinearPool pool_;
};

SiglipEncoder::SiglipEncoder(WeightStore& weights, const SiglipConfig& config)
    : config_(config),
      grid_(config.image_size / config.patch_size),
      dtype_(weights.compute_type()),
      pool_(grid_, grid_, (grid_ + 1) / 2, (grid_ + 1) / 2) {
  const int64_t width = config.hidden_size, inner = config.intermediate_size;
  const int64_t patch = config.patch_size;
  const std::string embeddings = "vision_tower.embeddings.";
  patch_embedding_ = weights.TakeLinear(embeddings + "patch_embedding", width,
                                        kChannels * patch * patch, true, WeightUse::kManyRows);
  positions_ =
      weights.TakeF32(embeddings + "position_embedding.weight", {int64_t{grid_} * grid_, width});
  const auto take_norm = [&](const std::string& name) {
    return NormWeights{weights.TakeF32(name + ".weight", {width}),
                       weights.TakeF32(name + ".bias", {width})};
  };
  for (int i = 0; i < config.layers_to_run; ++i) {
    const std::string prefix = "vision_tower.encoder.layers." + std::to_string(i) + ".";
    const std::string attention = prefix + "self_attn.";
    SiglipLayer layer;
    layer.norm1 = take_norm(prefix + "layer_norm1");
    layer.norm2 = take_norm(prefix + "layer_norm2");
    const Tensor q_bias = weights.TakeF32(attention + "q_proj.bias", {width});
    const Tensor k_bias = weights.TakeF32(attention + "k_proj.bias", {width});
    const Tensor v_bias = weights.TakeF32(attention + "v_proj.bias", {width});
    layer.qkv =
        LinearWeight::Stack({weights.TakeMatrix(attention + "q_proj.weight", {width, width}),
                             weights.TakeMatrix(attention + "k_proj.weight", {width, width}),
                             weights.TakeMatrix(attention + "v_proj.weight", {width, width})},
                            {&q_bias, &k_bias, &v_bias}, WeightUse::kManyRows);
    layer.out =
        weights.TakeLinear(attention + "out_proj", width, width, true, WeightUse::kManyRows);
    layer.fc1 = weights.TakeLinear(prefix + "mlp.fc1", inner, width, true, WeightUse::kManyRows);
    layer.fc2 = weights.TakeLinear(prefix + "mlp.fc2", width, inner, true, WeightUse::kManyRows);
    layers_.push_back(std::move(layer));
  }
  const std::string projector = "multi_modal_projector.";
  projector1_ = weights.TakeLinear(projector + "linear_1", config.output_size, width,
                                   config.projector_bias, WeightUse::kManyRows);
  projector2_ = weights.TakeLinear(projector + "linear_2", config.output_size, config.output_size,
                                   config.projector_bias, WeightUse::kManyRows);
}

VisualTokens SiglipEncoder::Encode(ExecContext& ctx, ConstTensorView pixels,
                                   std::span<const FramePtr> frames,
                                   const TensorProbe& probe) const {
  const int64_t count = static_cast<int64_t>(frames.size());
  const Shape expected{count, kChannels, config_.image_size, config_.image_size};
  if (pixels.shape() != expected || pixels.dtype() != DType::kF32) {
    throw Error("[siglip] pixels must be " + expected.ToString() + " f32, got " +
                pixels.shape().ToString() + " " + Name(pixels.dtype()));
  }
  const int64_t per_frame = tokens_per_frame();
  VisualTokens tokens;
  tokens.grid_rows = pool_.out_rows();
  tokens.grid_cols = pool_.out_cols();
  tokens.features = Tensor(DType::kF32, {count * per_frame, config_.output_size});
  tokens.origins.reserve(count * per_frame);
  for (const FramePtr& frame : frames) {
    for (int row = 0; row < tokens.grid_rows; ++row) {
      for (int col = 0; col < tokens.grid_cols; ++col) {
        tokens.origins.push_back({.frame = static_cast<int32_t>(frame->index),
                                  .row = static_cast<int16_t>(row),
                                  .col = static_cast<int16_t>(col),
                                  .time = frame->time});
      }
    }
  }
  // Batches of nearly equal size. A probe is promised whole results.
  const int64_t most =
      probe ? count : std::max<int64_t>(1, kMaxPatchesAtOnce / patches_per_frame());
  const int64_t batches = count == 0 ? 0 : (count + most - 1) / most;
  for (int64_t b = 0; b < batches; ++b) {
    const int64_t begin = count * b / batches, end = count * (b + 1) / batches;
    EncodeBatch(ctx, pixels.Slice(begin, end),
                tokens.features.view().Slice(begin * per_frame, end * per_frame), probe);
  }
  return tokens;
}

void SiglipEncoder::EncodeBatch(ExecContext& ctx, ConstTensorView pixels, TensorView pooled,
                                const TensorProbe& probe) const {
  Workspace& workspace = ctx.workspace();
  Workspace::Scope scope(workspace);
  const int64_t rows = pixels.dim(0) * patches_per_frame();
  const TensorView hidden = workspace.Allocate(DType::kF32, {rows, config_.hidden_size});
  EmbedPatches(ctx, pixels, hidden);
  if (probe) probe("embeddings", hidden);
  for (size_t i = 0; i < layers_.size(); ++i) {
    RunLayer(ctx, layers_[i], hidden);
    if (probe) probe("layer." + std::to_string(i), hidden);
  }
  if (probe) probe("tower", hidden);

  ConstTensorView feature = hidden;
  if (dtype_ != DType::kF32) {
    const TensorView narrow = workspace.Allocate(dtype_, hidden.shape());
    ParallelFor(ctx, rows, 16, [&](int64_t begin, int64_t end) {
      ConvertInto(hidden.Slice(begin, end), narrow.Slice(begin, end));
    });
    feature = narrow;
  }
  const TensorView middle = workspace.Allocate(dtype_, {rows, config_.output_size});
  const TensorView projected = workspace.Allocate(DType::kF32, {rows, config_.output_size});
  TracedLinear(ctx, "encode/projector", feature, projector1_, middle,
               {.activation = Activation::kGeluErf});
  TracedLinear(ctx, "encode/projector", middle, projector2_, projected);
  if (probe) probe("projector", projected);

  TraceScope trace(&ctx.tracer(), "encode/pool", rows);
  trace.AddWork(8.0 * pooled.shape().NumElements(),
                static_cast<double>(projected.SizeBytes()) + pooled.SizeBytes());
  pool_.Run(ctx, projected, pooled);
  if (probe) probe("pooled", pooled);
}

void SiglipEncoder::EmbedPatches(ExecContext& ctx, ConstTensorView pixels,
                                 TensorView hidden) const {
  Workspace::Scope scope(ctx.workspace());
  const int64_t frames = pixels.dim(0), side = config_.image_size, patch = config_.patch_size;
  const int64_t patches = patches_per_frame(), values = kChannels * patch * patch;
  const TensorView gathered = ctx.workspace().Allocate(dtype_, {frames * patches, values});
  {
    TraceScope trace(&ctx.tracer(), "encode/patches", frames * patches);
    trace.AddWork(0, static_cast<double>(gathered.SizeBytes()) + pixels.SizeBytes());
    // A row of `gathered` is one patch in the order (channel, y, x), as the convolution's kernel.
    const size_t item = SizeOf(dtype_), piece = patch * item;
    ParallelFor(ctx, frames * grid_, 1, [&](int64_t begin, int64_t end) {
      std::vector<char> line(side * item);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t frame = row / grid_, patch_row = row % grid_;
        char* const patches_at = static_cast<char*>(gathered.raw()) + row * grid_ * values * item;
        for (int64_t c = 0; c < kChannels; ++c) {
          for (int64_t y = 0; y < patch; ++y) {
            const float* from = pixels.data<float>() + frame * pixels.stride0() +
                                (c * side + patch_row * patch + y) * side;
            ConvertElements(from, DType::kF32, line.data(), dtype_, side);
            char* to = patches_at + (c * patch + y) * piece;
            for (int64_t p = 0; p < grid_; ++p, to += values * item) {
              std::memcpy(to, line.data() + p * piece, piece);
            }
          }
        }
      }
    });
    const size_t frame_bytes = positions_.SizeBytes();
    ParallelFor(ctx, frames, 1, [&](int64_t begin, int64_t end) {
      for (int64_t f = begin; f < end; ++f) {
        std::memcpy(hidden.data<float>() + f * positions_.shape().NumElements(),
                    positions_.data<float>(), frame_bytes);
      }
    });
  }
  TracedLinear(ctx, "encode/patch_embedding", gathered, patch_embedding_, hidden,
               {.accumulate = true});
}

void SiglipEncoder::Normalise(ExecContext& ctx, const NormWeights& norm, ConstTensorView hidden,
                              TensorView y) const {
  TraceScope trace(&ctx.tracer(), "encode/norm", hidden.dim(0));
  trace.AddWork(8.0 * hidden.shape().NumElements(),
                static_cast<double>(hidden.SizeBytes()) + y.SizeBytes());
  LayerNorm(ctx, hidden, norm.weight, norm.bias, config_.layer_norm_eps, y);
}

void SiglipEncoder::RunLayer(ExecContext& ctx, const SiglipLayer& layer, TensorView hidden) const {
  Workspace& workspace = ctx.workspace();
  Workspace::Scope scope(workspace);
  const int64_t rows = hidden.dim(0), width = config_.hidden_size;
  const int head_dim = config_.hidden_size / config_.num_heads;
  // The norm's result and, once qkv is made of it, the attention's.
  const TensorView narrow = workspace.Allocate(dtype_, {rows, width});
  Normalise(ctx, layer.norm1, hidden, narrow);
  {
    Workspace::Scope attention_scope(workspace);
    const TensorView qkv = workspace.Allocate(dtype_, {rows, 3 * width});
    TracedLinear(ctx, "encode/qkv", narrow, layer.qkv, qkv);
    TraceScope trace(&ctx.tracer(), "encode/attention", rows);
    trace.AddWork(4.0 * rows * patches_per_frame() * width,
                  static_cast<double>(qkv.SizeBytes()) + narrow.SizeBytes());
    EncoderAttention(ctx, qkv, rows / patches_per_frame(), config_.num_heads, head_dim,
                     1.0f / std::sqrt(static_cast<float>(head_dim)), narrow);
  }
  TracedLinear(ctx, "encode/out", narrow, layer.out, hidden, {.accumulate = true});
  Normalise(ctx, layer.norm2, hidden, narrow);
  const TensorView inner = workspace.Allocate(dtype_, {rows, config_.intermediate_size});
  TracedLinear(ctx, "encode/mlp", narrow, layer.fc1, inner, {.activation = Activation::kGeluTanh});
  TracedLinear(ctx, "encode/mlp", inner, layer.fc2, hidden, {.accumulate = true});
}

double SiglipEncoder::FlopsPerFrame() const {
  const double patches = patches_per_frame(), width = config_.hidden_size;
  const double inner = config_.intermediate_size, output = config_.output_size;
  const double embedding = width * kChannels * config_.patch_size * config_.patch_size;
  const double layer = 4 * width * width + 2 * width * inner + 2 * patches * width;
  const double projector = width * output + output * output;
  return 2 * patches * (embedding + config_.layers_to_run * layer + projector);
}

}  // namespace

std::unique_ptr<VisionEncoder> LoadSiglipEncoder(WeightStore& weights, const SiglipConfig& config) {
  return std::make_unique<SiglipEncoder>(weights, config);
}

}  // namespace sluice
