#include "vision/families/clip.h"

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
// Frames are encoded together up to so many tokens: enough rows to keep the products at full speed,
// few enough to bound the scratch memory (about 60 MB at a width of 1024).
constexpr int64_t kMaxTokensAtOnce = 3072;

struct NormWeights {
  Tensor weight, bias;  // [E] f32
};

struct ClipLayer {
  NormWeights norm1, norm2;
  LinearWeight qkv;  // [3E, E]
  LinearWeight out;  // [E, E]
  LinearWeight fc1;  // [I, E]
  LinearWeight fc2;  // [E, I]
};

class ClipEncoder : public VisionEncoder {
 public:
  ClipEncoder(WeightStore& weights, const ClipConfig& config);

  VisualTokens Encode(ExecContext& ctx, ConstTensorView pixels, std::span<const FramePtr> frames,
                      const EncodeHooks& hooks) const override;
  const PreprocessConfig& preprocess_config() const override { return config_.preprocess; }
  int tokens_per_frame() const override { return pooled_grid_ * pooled_grid_; }
  int patches_per_frame() const override { return grid_ * grid_; }  // without the class token
  int64_t output_size() const override { return config_.output_size; }
  double FlopsPerFrame() const override;

 private:
  // Rows of one frame inside the tower: the class token, then the patches.
  int64_t rows_per_frame() const { return 1 + patches_per_frame(); }

  void EncodeBatch(ExecContext& ctx, ConstTensorView pixels, TensorView tokens,
                   const TensorProbe& probe) const;
  void Embed(ExecContext& ctx, ConstTensorView pixels, TensorView hidden) const;
  void GatherPatches(ExecContext& ctx, ConstTensorView pixels, TensorView gathered) const;
  void RunLayer(ExecContext& ctx, const ClipLayer& layer, TensorView hidden) const;
  void Attend(ExecContext& ctx, ConstTensorView qkv, TensorView mixed) const;
  void SelectFeature(ExecContext& ctx, ConstTensorView hidden, TensorView feature,
                     const TensorProbe& probe) const;
  void Normalise(ExecContext& ctx, const NormWeights& norm, ConstTensorView hidden,
                 TensorView y) const;

  ClipConfig config_;
  int grid_;                      // patches along one side
  int pooled_grid_;               // tokens along one side
  DType dtype_;                   // of weights and product inputs
  LinearWeight patch_embedding_;  // [E, 3 * patch * patch]
  Tensor start_;                  // [1 + N, E] f32: positions, the class embedding in row 0
  NormWeights pre_norm_;
  std::vector<ClipLayer> layers_;
  LinearWeight projector1_, projector2_;  // [D, E], [D, D]
};

ClipEncoder::ClipEncoder(WeightStore& weights, const ClipConfig& config)
    : config_(config),
      grid_(config.image_size / config.patch_size),
      pooled_grid_(grid_ / config.pool_stride),
      dtype_(weights.compute_type()) {
  const int64_t width = config.hidden_size, inner = config.intermediate_size;
  const int64_t patch = config.patch_size;
  const std::string embeddings = "vision_tower.embeddings.";
  patch_embedding_ = weights.TakeLinear(embeddings + "patch_embedding", width,
                                        kChannels * patch * patch, false, WeightUse::kManyRows);
  start_ = weights.TakeF32(embeddings + "position_embedding.weight", {rows_per_frame(), width});
  const Tensor class_embedding = weights.TakeF32(embeddings + "class_embedding", {width});
  for (int64_t d = 0; d < width; ++d) {
    start_.data<float>()[d] += class_embedding.data<float>()[d];
  }
  const auto take_norm = [&](const std::string& name) {
    return NormWeights{weights.TakeF32(name + ".weight", {width}),
                       weights.TakeF32(name + ".bias", {width})};
  };
  pre_norm_ = take_norm("vision_tower.pre_layrnorm");  // so spelt in every published file
  for (int i = 0; i < config.layers_to_run; ++i) {
    const std::string prefix = "vision_tower.encoder.layers." + std::to_string(i) + ".";
    const std::string attention = prefix + "self_attn.";
    ClipLayer layer;
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

VisualTokens ClipEncoder::Encode(ExecContext& ctx, ConstTensorView pixels,
                                 std::span<const FramePtr> frames, const EncodeHooks& hooks) const {
  if (hooks.reuse) throw Error("[clip] this tower cannot reuse features of earlier frames");
  const TensorProbe& probe = hooks.probe;
  const int64_t count = static_cast<int64_t>(frames.size());
  const Shape expected{count, kChannels, config_.image_size, config_.image_size};
  if (pixels.shape() != expected || pixels.dtype() != DType::kF32) {
    throw Error("[clip] pixels must be " + expected.ToString() + " f32, got " +
                pixels.shape().ToString() + " " + Name(pixels.dtype()));
  }
  TraceScope trace(&ctx.tracer(), "encode", count);
  trace.AddWork(count * FlopsPerFrame(), static_cast<double>(pixels.SizeBytes()));
  const int64_t per_frame = tokens_per_frame();
  VisualTokens tokens;
  tokens.grid_rows = pooled_grid_;
  tokens.grid_cols = pooled_grid_;
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
  const int64_t most = probe ? count : std::max<int64_t>(1, kMaxTokensAtOnce / rows_per_frame());
  const int64_t batches = count == 0 ? 0 : (count + most - 1) / most;
  for (int64_t b = 0; b < batches; ++b) {
    const int64_t begin = count * b / batches, end = count * (b + 1) / batches;
    EncodeBatch(ctx, pixels.Slice(begin, end),
                tokens.features.view().Slice(begin * per_frame, end * per_frame), probe);
  }
  return tokens;
}

void ClipEncoder::EncodeBatch(ExecContext& ctx, ConstTensorView pixels, TensorView tokens,
                              const TensorProbe& probe) const {
  Workspace& workspace = ctx.workspace();
  Workspace::Scope scope(workspace);
  const int64_t rows = pixels.dim(0) * rows_per_frame();
  const TensorView hidden = workspace.Allocate(DType::kF32, {rows, config_.hidden_size});
  Embed(ctx, pixels, hidden);
  if (probe) probe("embeddings", hidden);
  for (size_t i = 0; i < layers_.size(); ++i) {
    RunLayer(ctx, layers_[i], hidden);
    if (probe) probe("layer." + std::to_string(i), hidden);
  }
  const TensorView feature = workspace.Allocate(dtype_, {tokens.dim(0), config_.hidden_size});
  SelectFeature(ctx, hidden, feature, probe);
  const TensorView middle = workspace.Allocate(dtype_, tokens.shape());
  TracedLinear(ctx, "encode/projector", feature, projector1_, middle,
               {.activation = Activation::kGeluErf});
  TracedLinear(ctx, "encode/projector", middle, projector2_, tokens);
  if (probe) probe("projector", tokens);
}

void ClipEncoder::Embed(ExecContext& ctx, ConstTensorView pixels, TensorView hidden) const {
  Workspace::Scope scope(ctx.workspace());
  const int64_t frames = pixels.dim(0), patch = config_.patch_size;
  const TensorView gathered =
      ctx.workspace().Allocate(dtype_, {hidden.dim(0), kChannels * patch * patch});
  const TensorView sums = ctx.workspace().Allocate(DType::kF32, hidden.shape());
  {
    TraceScope trace(&ctx.tracer(), "encode/patches", hidden.dim(0));
    trace.AddWork(0, static_cast<double>(gathered.SizeBytes()) + pixels.SizeBytes());
    GatherPatches(ctx, pixels, gathered);
    ParallelFor(ctx, frames, 1, [&](int64_t begin, int64_t end) {
      for (int64_t f = begin; f < end; ++f) {
        std::memcpy(sums.data<float>() + f * start_.shape().NumElements(), start_.data<float>(),
                    start_.SizeBytes());
      }
    });
  }
  TracedLinear(ctx, "encode/patch_embedding", gathered, patch_embedding_, sums,
               {.accumulate = true});
  Normalise(ctx, pre_norm_, sums, hidden);
}

// A row of `gathered` is one patch in the order (channel, y, x), as the convolution's kernel. The
// class token's row is zero: one product for all frames costs less than one for each.
void ClipEncoder::GatherPatches(ExecContext& ctx, ConstTensorView pixels,
                                TensorView gathered) const {
  const int64_t side = config_.image_size, patch = config_.patch_size;
  const int64_t row_bytes = gathered.dim(1) * static_cast<int64_t>(SizeOf(dtype_));
  const int64_t piece = patch * static_cast<int64_t>(SizeOf(dtype_));
  ParallelFor(ctx, pixels.dim(0) * grid_, 1, [&](int64_t begin, int64_t end) {
    std::vector<char> line(side * SizeOf(dtype_));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t frame = row / grid_, patch_row = row % grid_;
      char* const frame_at =
          static_cast<char*>(gathered.raw()) + frame * rows_per_frame() * row_bytes;
      if (patch_row == 0) std::memset(frame_at, 0, row_bytes);
      char* const patches_at = frame_at + (1 + patch_row * grid_) * row_bytes;
      for (int64_t c = 0; c < kChannels; ++c) {
        for (int64_t y = 0; y < patch; ++y) {
          const float* from = pixels.data<float>() + frame * pixels.stride0() +
                              (c * side + patch_row * patch + y) * side;
          ConvertElements(from, DType::kF32, line.data(), dtype_, side);
          char* to = patches_at + (c * patch + y) * piece;
          for (int64_t p = 0; p < grid_; ++p, to += row_bytes) {
            std::memcpy(to, line.data() + p * piece, piece);
          }
        }
      }
    }
  });
}

void ClipEncoder::Normalise(ExecContext& ctx, const NormWeights& norm, ConstTensorView hidden,
                            TensorView y) const {
  TraceScope trace(&ctx.tracer(), "encode/norm", hidden.dim(0));
  trace.AddWork(8.0 * hidden.shape().NumElements(),
                static_cast<double>(hidden.SizeBytes()) + y.SizeBytes());
  LayerNorm(ctx, hidden, norm.weight, norm.bias, config_.layer_norm_eps, y);
}

// Softmax of q k^T over the rows of each frame, times v. Row 0 of a frame in each of `qkv`'s three
// parts is the class token's.
void ClipEncoder::Attend(ExecContext& ctx, ConstTensorView qkv, TensorView mixed) const {
  const int64_t rows = qkv.dim(0);
  const int head_dim = config_.hidden_size / config_.num_heads;
  TraceScope trace(&ctx.tracer(), "encode/attention", rows);
  trace.AddWork(4.0 * rows * rows_per_frame() * config_.hidden_size,
                static_cast<double>(qkv.SizeBytes()) + mixed.SizeBytes());
  const int64_t width = config_.hidden_size;
  EncoderAttention(ctx, qkv.Columns(0, width), qkv.Columns(width, 2 * width),
                   qkv.Columns(2 * width, 3 * width), rows / rows_per_frame(), config_.num_heads,
                   head_dim, 1.0f / std::sqrt(static_cast<float>(head_dim)), mixed);
}

void ClipEncoder::RunLayer(ExecContext& ctx, const ClipLayer& layer, TensorView hidden) const {
  Workspace& workspace = ctx.workspace();
  Workspace::Scope scope(workspace);
  const int64_t rows = hidden.dim(0), width = config_.hidden_size;
  // The norm's result and, once qkv is made of it, the attention's.
  const TensorView narrow = workspace.Allocate(dtype_, {rows, width});
  Normalise(ctx, layer.norm1, hidden, narrow);
  {
    Workspace::Scope attention_scope(workspace);
    const TensorView qkv = workspace.Allocate(dtype_, {rows, 3 * width});
    TracedLinear(ctx, "encode/qkv", narrow, layer.qkv, qkv);
    Attend(ctx, qkv, narrow);
  }
  TracedLinear(ctx, "encode/out", narrow, layer.out, hidden, {.accumulate = true});
  Normalise(ctx, layer.norm2, hidden, narrow);
  const TensorView inner = workspace.Allocate(dtype_, {rows, config_.intermediate_size});
  TracedLinear(ctx, "encode/mlp", narrow, layer.fc1, inner, {.activation = Activation::kQuickGelu});
  TracedLinear(ctx, "encode/mlp", inner, layer.fc2, hidden, {.accumulate = true});
}

// Drops the class token, pools in f32 and rounds once to the compute dtype.
void ClipEncoder::SelectFeature(ExecContext& ctx, ConstTensorView hidden, TensorView feature,
                                const TensorProbe& probe) const {
  Workspace& workspace = ctx.workspace();
  Workspace::Scope scope(workspace);
  const int64_t frames = hidden.dim(0) / rows_per_frame(), patches = patches_per_frame();
  const TraceScope trace(&ctx.tracer(), "encode/pool", hidden.dim(0));
  const TensorView tower = workspace.Allocate(DType::kF32, {frames * patches, config_.hidden_size});
  ParallelFor(ctx, frames, 1, [&](int64_t begin, int64_t end) {
    for (int64_t f = begin; f < end; ++f) {
      ConvertInto(hidden.Slice(f * rows_per_frame() + 1, (f + 1) * rows_per_frame()),
                  tower.Slice(f * patches, (f + 1) * patches));
    }
  });
  if (probe) probe("tower", tower);
  TensorView pooled = tower;
  if (config_.pool_stride > 1) {
    pooled = workspace.Allocate(DType::kF32, feature.shape());
    AveragePool(ctx, tower, grid_, grid_, config_.pool_stride, pooled);
    if (probe) probe("pooled", pooled);
  }
  ConvertInto(pooled, feature);
}

double ClipEncoder::FlopsPerFrame() const {
  const auto rows = static_cast<double>(rows_per_frame());
  const double width = config_.hidden_size, inner = config_.intermediate_size;
  const double output = config_.output_size;
  const double embedding = width * kChannels * config_.patch_size * config_.patch_size;
  const double layer = 4 * width * width + 2 * width * inner + 2 * rows * width;
  const double projector = width * output + output * output;
  return 2 * rows * (embedding + config_.layers_to_run * layer) +
         2.0 * tokens_per_frame() * projector;
}

}  // namespace

std::unique_ptr<VisionEncoder> LoadClipEncoder(WeightStore& weights, const ClipConfig& config) {
  return std::make_unique<ClipEncoder>(weights, config);
}

}  // namespace sluice
