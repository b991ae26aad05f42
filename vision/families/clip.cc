#include "vision/families/clip.h"

#include <string>

#include "runtime/ops/rows.h"
#include "runtime/ops/traced_linear.h"
#include "runtime/transfer.h"
#include "vision/patches.h"
#include "vision/pooling.h"
#include "vision/vit_layers.h"

namespace sluice {
namespace {

constexpr int kClassTokens = 1;

class ClipEncoder : public VisionEncoder {
 public:
  ClipEncoder(WeightStore& weights, const ClipConfig& config);

  VisualTokens Encode(ExecContext& ctx, ConstTensorView pixels, std::span<const FramePtr> frames,
                      const EncodeHooks& hooks) const override;
  const PreprocessConfig& preprocess_config() const override { return config_.preprocess; }
  int tokens_per_frame() const override { return pooled_grid_ * pooled_grid_; }
  int patches_per_frame() const override { return grid_ * grid_; }  // without the class token
  int head_dim() const override { return config_.hidden_size / config_.num_heads; }
  int64_t output_size() const override { return config_.output_size; }
  double FlopsPerFrame() const override { return FlopsAroundLayers() + layers_.FlopsPerFrame(); }

 private:
  void Embed(ExecContext& ctx, ConstTensorView pixels, TensorView hidden) const;
  void Project(ExecContext& ctx, ConstTensorView hidden, TensorView tokens,
               const TensorProbe& probe) const;
  void SelectFeature(ExecContext& ctx, ConstTensorView hidden, TensorView feature,
                     const TensorProbe& probe) const;
  double FlopsAroundLayers() const;  // of a frame

  ClipConfig config_;
  int grid_;                      // patches along one side
  int pooled_grid_;               // tokens along one side
  DType dtype_;                   // of weights and product inputs
  LinearWeight patch_embedding_;  // [E, 3 * patch * patch]
  VitLayers layers_;
  Tensor start_;  // [1 + N, E] f32: positions, the class embedding in row 0
  NormWeights pre_norm_;
  LinearWeight projector1_, projector2_;  // [D, E], [D, D]
};

ClipEncoder::ClipEncoder(WeightStore& weights, const ClipConfig& config)
    : config_(config),
      grid_(config.image_size / config.patch_size),
      pooled_grid_(grid_ / config.pool_stride),
      dtype_(weights.compute_type()),
      layers_(weights, {.hidden_size = config.hidden_size,
                        .intermediate_size = config.intermediate_size,
                        .num_heads = config.num_heads,
                        .layers_to_run = config.layers_to_run,
                        .class_tokens = kClassTokens,
                        .patches = grid_ * grid_,
                        .layer_norm_eps = config.layer_norm_eps,
                        .activation = Activation::kQuickGelu,
                        .attention = config.attention}),
      // So spelt in every published file.
      pre_norm_(weights, "vision_tower.pre_layrnorm", config.hidden_size, config.layer_norm_eps) {
  const int64_t width = config.hidden_size, patch = config.patch_size;
  const std::string embeddings = "vision_tower.embeddings.";
  patch_embedding_ = weights.TakeLinear(embeddings + "patch_embedding", width,
                                        kPixelChannels * patch * patch, false);
  start_ = weights.TakeF32(embeddings + "position_embedding.weight", {layers_.rows(), width});
  const Tensor class_embedding = weights.TakeF32(embeddings + "class_embedding", {width});
  for (int64_t d = 0; d < width; ++d) {
    start_.data<float>()[d] += class_embedding.data<float>()[d];
  }
  start_ = Placed(std::move(start_), weights.device());
  const std::string projector = "multi_modal_projector.";
  projector1_ = weights.TakeProjection(projector + "linear_1", config.output_size, width,
                                       config.projector_bias);
  projector2_ = weights.TakeProjection(projector + "linear_2", config.output_size,
                                       config.output_size, config.projector_bias);
}

VisualTokens ClipEncoder::Encode(ExecContext& ctx, ConstTensorView pixels,
                                 std::span<const FramePtr> frames, const EncodeHooks& hooks) const {
  const auto count = static_cast<int64_t>(frames.size());
  CheckPixels(pixels, count, config_.image_size);
  TraceScope trace(&ctx.tracer(), "encode", count);
  VisualTokens tokens =
      GridTokens(frames, pooled_grid_, pooled_grid_, config_.output_size, ctx.device());
  const VitLayers::Ends ends = {
      [&](ConstTensorView some, TensorView hidden) { Embed(ctx, some, hidden); },
      [&](ConstTensorView hidden, TensorView some) { Project(ctx, hidden, some, hooks.probe); }};
  const double flops = layers_.Encode(ctx, pixels, tokens.features, ends, hooks) +
                       static_cast<double>(count) * FlopsAroundLayers();
  trace.AddWork(flops, static_cast<double>(pixels.SizeBytes() + tokens.features.SizeBytes()));
  return tokens;
}

void ClipEncoder::Project(ExecContext& ctx, ConstTensorView hidden, TensorView tokens,
                          const TensorProbe& probe) const {
  Workspace& workspace = ctx.workspace();
  Workspace::Scope scope(workspace);
  const TensorView feature = workspace.Allocate(dtype_, {tokens.dim(0), config_.hidden_size});
  SelectFeature(ctx, hidden, feature, probe);
  const TensorView middle = workspace.Allocate(dtype_, tokens.shape());
  TracedLinear(ctx, "encode/projector", feature, projector1_, middle,
               {.activation = Activation::kGeluErf});
  TracedLinear(ctx, "encode/projector", middle, projector2_, tokens);
  ShowOnHost(ctx, probe, "projector", tokens);
}

void ClipEncoder::Embed(ExecContext& ctx, ConstTensorView pixels, TensorView hidden) const {
  const Workspace::Scope scope(ctx.workspace());
  const TensorView sums = ctx.workspace().Allocate(DType::kF32, hidden.shape());
  EmbedPatches(ctx, pixels, config_.patch_size, patch_embedding_, start_, sums);
  pre_norm_.Apply(ctx, sums, hidden);
}

// Drops the class token, pools in f32 and rounds once to the compute dtype.
void ClipEncoder::SelectFeature(ExecContext& ctx, ConstTensorView hidden, TensorView feature,
                                const TensorProbe& probe) const {
  Workspace& workspace = ctx.workspace();
  Workspace::Scope scope(workspace);
  const int64_t frames = hidden.dim(0) / layers_.rows(), patches = patches_per_frame();
  const TraceScope trace(&ctx.tracer(), "encode/pool", hidden.dim(0));
  const TensorView tower = workspace.Allocate(DType::kF32, {frames * patches, config_.hidden_size});
  for (int64_t f = 0; f < frames; ++f) {
    CopyRows(ctx, hidden.Slice(f * layers_.rows() + 1, (f + 1) * layers_.rows()),
             tower.Slice(f * patches, (f + 1) * patches));
  }
  ShowOnHost(ctx, probe, "tower", tower);
  TensorView pooled = tower;
  if (config_.pool_stride > 1) {
    pooled = workspace.Allocate(DType::kF32, feature.shape());
    AveragePool(ctx, tower, grid_, grid_, config_.pool_stride, pooled);
    ShowOnHost(ctx, probe, "pooled", pooled);
  }
  Convert(ctx, pooled, feature);
}

double ClipEncoder::FlopsAroundLayers() const {
  const double width = config_.hidden_size, output = config_.output_size;
  const double embedding = width * kPixelChannels * config_.patch_size * config_.patch_size;
  const double projector = width * output + output * output;
  return 2.0 * layers_.rows() * embedding + 2.0 * tokens_per_frame() * projector;
}

}  // namespace

std::unique_ptr<VisionEncoder> LoadClipEncoder(WeightStore& weights, const ClipConfig& config) {
  return std::make_unique<ClipEncoder>(weights, config);
}

}  // namespace sluice
