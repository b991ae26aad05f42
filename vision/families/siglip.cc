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
  SiglipEncoder(WeightStore& weights, const SiglipConfig& config);

  VisualTokens Encode(ExecContext& ctx, ConstTensorView pixels, std::span<const FramePtr> frames,
                      const EncodeHooks& hooks) const override;
  const PreprocessConfig& preprocess_config() const override { return config_.preprocess; }
  int tokens_per_frame() const override { return pool_.out_rows() * pool_.out_cols(); }
  int patches_per_frame() const override { return grid_ * grid_; }
  int head_dim() const override { return config_.hidden_size / config_.num_heads; }
  int64_t output_size() const override { return config_.output_size; }
  double FlopsPerFrame() const override { return FlopsAroundLayers() + layers_.FlopsPerFrame(); }

 private:
  // Returns the operations it took.
  double EncodeBatch(ExecContext& ctx, ConstTensorView pixels, TensorView pooled,
                     const EncodeHooks& hooks) const;
  void EmbedPatches(ExecContext& ctx, ConstTensorView pixels, TensorView hidden) const;
  void Project(ExecContext& ctx, ConstTensorView hidden, TensorView pooled,
               const TensorProbe& probe) const;
  double FlopsAroundLayers() const;  // of a frame

  SiglipConfig config_;
  int grid_;                      // patches along one side
  DType dtype_;                   // of weights and product inputs
  LinearWeight patch_embedding_;  // [E, 3 * patch * patch]
  Tensor positions_;              // [N, E] f32
  VitLayers layers_;
  LinearWeight projector1_, projector2_;  // [D, E], [D, D]
  BilinearPool pool_;
};

SiglipEncoder::SiglipEncoder(WeightStore& weights, const SiglipConfig& config)
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
  const int64_t per_frame = tokens_per_frame();
  VisualTokens tokens =
      GridTokens(frames, pool_.out_rows(), pool_.out_cols(), config_.output_size, ctx.device());
  double flops = 0;
  ForBatches(count, layers_.rows(), hooks.probe != nullptr, [&](int64_t begin, int64_t end) {
    const TensorView to = tokens.features.view().Slice(begin * per_frame, end * per_frame);
    const ConstTensorView some = pixels.Slice(begin, end);
    if (ctx.device() == Device::kCpu || hooks.probe) {
      flops += EncodeBatch(ctx, some, to, hooks);
      return;
    }
    // Results go where they lie each time, so that the steps of a batch recur.
    const Workspace::Scope scope(ctx.workspace());
    const TensorView same = ctx.workspace().Allocate(DType::kF32, to.shape());
    flops += EncodeBatch(ctx, some, same, hooks);
    CopyRows(ctx, same, to);
  });
  trace.AddWork(flops, static_cast<double>(pixels.SizeBytes() + tokens.features.SizeBytes()));
  return tokens;
}

double SiglipEncoder::EncodeBatch(ExecContext& ctx, ConstTensorView pixels, TensorView pooled,
                                  const EncodeHooks& hooks) const {
  const TensorProbe& probe = hooks.probe;
  Workspace& workspace = ctx.workspace();
  Workspace::Scope scope(workspace);
  const int64_t rows = pixels.dim(0) * patches_per_frame();
  const TensorView hidden = workspace.Allocate(DType::kF32, {rows, config_.hidden_size});
  const std::string frames = std::to_string(pixels.dim(0));
  ctx.Recurring("encode/embed " + frames, [&] { EmbedPatches(ctx, pixels, hidden); });
  ShowOnHost(ctx, probe, "embeddings", hidden);
  const double flops = layers_.Run(ctx, hidden, hooks);
  ShowOnHost(ctx, probe, "tower", hidden);
  const auto project = [&] { Project(ctx, hidden, pooled, probe); };
  probe ? project() : ctx.Recurring("encode/project " + frames, project);
  return flops + static_cast<double>(pixels.dim(0)) * FlopsAroundLayers();
}

void SiglipEncoder::Project(ExecContext& ctx, ConstTensorView hidden, TensorView pooled,
                            const TensorProbe& probe) const {
  Workspace& workspace = ctx.workspace();
  Workspace::Scope scope(workspace);
  const int64_t rows = hidden.dim(0);
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

void SiglipEncoder::EmbedPatches(ExecContext& ctx, ConstTensorView pixels,
                                 TensorView hidden) const {
  Workspace::Scope scope(ctx.workspace());
  const int64_t patch = config_.patch_size;
  const TensorView gathered =
      ctx.workspace().Allocate(dtype_, {hidden.dim(0), kPixelChannels * patch * patch});
  {
    TraceScope trace(&ctx.tracer(), "encode/patches", hidden.dim(0));
    trace.AddWork(0, static_cast<double>(gathered.SizeBytes()) + pixels.SizeBytes());
    GatherPatches(ctx, pixels, patch, 0, gathered);
    RepeatRows(ctx, positions_, hidden);
  }
  TracedLinear(ctx, "encode/patch_embedding", gathered, patch_embedding_, hidden,
               {.accumulate = true});
}

double SiglipEncoder::FlopsAroundLayers() const {
  const double patches = patches_per_frame(), width = config_.hidden_size;
  const double output = config_.output_size;
  const double embedding = width * kPixelChannels * config_.patch_size * config_.patch_size;
  return 2 * patches * (embedding + width * output + output * output);
}

}  // namespace

std::unique_ptr<VisionEncoder> LoadSiglipEncoder(WeightStore& weights, const SiglipConfig& config) {
  return std::make_unique<SiglipEncoder>(weights, config);
}

}  // namespace sluice
