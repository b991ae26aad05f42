#include "vision/families/siglip.h"

#include <string>

#include "runtime/ops/rows.h"
#include "runtime/ops/traced_linear.h"
#include "runtime/transfer.h"
#include "vision/patches.h"
#include "vision/pooling.h"
#include "vision/vit_layers.h"

namespace sluice {
namespace {

class SiglipEncoder : public VisionEncoder {
 public:
  SiglipEncoder(WeightStore& weights, const TowerConfig& config);

  VisualTokens Encode(ExecContext& ctx, ConstTensorView pixels, std::span<const FramePtr> frames,
                      const EncodeHooks& hooks) const override;
  const PreprocessConfig& preprocess_config() const override { return config_.preprocess; }
  int tokens_per_frame() const override { return pool_.out_rows() * pool_.out_cols(); }
  int patches_per_frame() const override { return grid_ * grid_; }
  int head_dim() const override { return config_.hidden_size / config_.num_heads; }
  int64_t output_size() const override { return config_.output_size; }
  double FlopsPerFrame() const override { return FlopsAroundLayers() + layers_.FlopsPerFrame(); }

 private:
  void Project(ExecContext& ctx, ConstTensorView hidden, TensorView pooled,
               const TensorProbe& probe) const;
  double FlopsAroundLayers() const;  // of a frame

  TowerConfig config_;
  int grid_;                      // patches along one side
  DType dtype_;                   // of weights and product inputs
  LinearWeight patch_embedding_;  // [E, 3 * patch * patch]
  Tensor positions_;              // [N, E] f32
  VitLayers layers_;
  LinearWeight projector1_, projector2_;  // [D, E], [D, D]
  BilinearPool pool_;
};

SiglipEncoder::SiglipEncoder(WeightStore& weights, const TowerConfig& config)
    : config_(config),
      grid_(config.image_size / config.patch_size),
      dtype_(weights.compute_type()),
      layers_(weights, {.hidden_size = config.hidden_size,
                        .intermediate_size = config.intermediate_size,
                        .num_heads = config.num_heads,
                        .layers_to_run = config.layers_to_run,
                        .patches = grid_ * grid_,
                        .layer_norm_eps = config.layer_norm_eps,
                        .activation = Activation::kGeluTanh,
                        .attention = config.attention}),
      pool_(grid_, grid_, (grid_ + 1) / 2, (grid_ + 1) / 2) {
  const int64_t width = config.hidden_size, patch = config.patch_size;
  const std::string embeddings = "vision_tower.embeddings.";
  patch_embedding_ = weights.TakeLinear(embeddings + "patch_embedding", width,
                                        kPixelChannels * patch * patch, true);
  positions_ =
      weights.TakePlaced(embeddings + "position_embedding.weight", {patches_per_frame(), width});
  const std::string projector = "multi_modal_projector.";
  projector1_ = weights.TakeProjection(projector + "linear_1", config.output_size, width,
                                       config.projector_bias);
  projector2_ = weights.TakeProjection(projector + "linear_2", config.output_size,
                                       config.output_size, config.projector_bias);
}

VisualTokens SiglipEncoder::Encode(ExecContext& ctx, ConstTensorView pixels,
                                   std::span<const FramePtr> frames,
                                   const EncodeHooks& hooks) const {
  const auto count = static_cast<int64_t>(frames.size());
  CheckPixels(pixels, count, config_.image_size);
  TraceScope trace(&ctx.tracer(), "encode", count);
  VisualTokens tokens =
      GridTokens(frames, pool_.out_rows(), pool_.out_cols(), config_.output_size, ctx.device());
  const VitLayers::Ends ends = {
      [&](ConstTensorView some, TensorView hidden) {
        EmbedPatches(ctx, some, config_.patch_size, patch_embedding_, positions_, hidden);
      },
      [&](ConstTensorView hidden, TensorView some) { Project(ctx, hidden, some, hooks.probe); }};
  const double flops = layers_.Encode(ctx, pixels, tokens.features, ends, hooks) +
                       static_cast<double>(count) * FlopsAroundLayers();
  trace.AddWork(flops, static_cast<double>(pixels.SizeBytes() + tokens.features.SizeBytes()));
  return tokens;
}

void SiglipEncoder::Project(ExecContext& ctx, ConstTensorView hidden, TensorView pooled,
                            const TensorProbe& probe) const {
  Workspace& workspace = ctx.workspace();
  Workspace::Scope scope(workspace);
  const int64_t rows = hidden.dim(0);
  ShowOnHost(ctx, probe, "tower", hidden);
  ConstTensorView feature = hidden;
  if (dtype_ != DType::kF32) {
    const TensorView narrow = workspace.Allocate(dtype_, hidden.shape());
    Convert(ctx, hidden, narrow);
    feature = narrow;
  }
  const TensorView middle = workspace.Allocate(dtype_, {rows, config_.output_size});
  const TensorView projected = workspace.Allocate(DType::kF32, {rows, config_.output_size});
  TracedLinear(ctx, "encode/projector", feature, projector1_, middle,
               {.activation = Activation::kGeluErf});
  TracedLinear(ctx, "encode/projector", middle, projector2_, projected);
  ShowOnHost(ctx, probe, "projector", projected);

  TraceScope trace(&ctx.tracer(), "encode/pool", rows);
  trace.AddWork(8.0 * pooled.shape().NumElements(),
                static_cast<double>(projected.SizeBytes()) + pooled.SizeBytes());
  pool_.Run(ctx, projected, pooled);
  ShowOnHost(ctx, probe, "pooled", pooled);
}

double SiglipEncoder::FlopsAroundLayers() const {
  const double patches = patches_per_frame(), width = config_.hidden_size;
  const double output = config_.output_size;
  const double embedding = width * kPixelChannels * config_.patch_size * config_.patch_size;
  return 2 * patches * (embedding + width * output + output * output);
}

}  // namespace

std::unique_ptr<VisionEncoder> LoadSiglipEncoder(WeightStore& weights, const TowerConfig& config) {
  return std::make_unique<SiglipEncoder>(weights, config);
}

}  // namespace sluice
