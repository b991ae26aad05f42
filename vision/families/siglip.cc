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
#include "runtime/ops/rows.h"
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
  LinearWeight kqv;  // [3E, E], keys first
  // Parts of it, for frames that reuse an earlier one: keys of all patches, the rest of a few.
  LinearWeight keys, queries_values;
  LinearWeight out;  // [E, E]
  LinearWeight fc1;  // [I, E]
  LinearWeight fc2;  // [E, I]
};

// Which frames of a batch are computed whole, and what the others refer to.
struct ReusePlan {
  struct Other {
    int64_t frame;      // of the batch
    int64_t reference;  // index in `whole`, or -1: the one kept of an earlier batch
  };
  std::vector<int64_t> whole;  // frames of the batch, ascending
  std::vector<Other> others;
};

void CheckFresh(const std::vector<int32_t>& fresh, int64_t frames) {
  if (!fresh.empty() && fresh.size() % frames == 0) return;
  throw Error("[siglip] feature reuse must choose as many patches of each of " +
              std::to_string(frames) + " frames, got " + std::to_string(fresh.size()) + " in all");
}

class SiglipEncoder : public VisionEncoder {
 public:
  SiglipEncoder(WeightStore& weights, const SiglipConfig& config);

  VisualTokens Encode(ExecContext& ctx, ConstTensorView pixels, std::span<const FramePtr> frames,
                      const EncodeHooks& hooks) const override;
  bool can_reuse() const override { return true; }
  const PreprocessConfig& preprocess_config() const override { return config_.preprocess; }
  int tokens_per_frame() const override { return pool_.out_rows() * pool_.out_cols(); }
  int patches_per_frame() const override { return grid_ * grid_; }
  int64_t output_size() const override { return config_.output_size; }
  double FlopsPerFrame() const override;

 private:
  void EncodeBatch(ExecContext& ctx, ConstTensorView pixels, TensorView pooled,
                   const EncodeHooks& hooks, double& flops) const;
  void EmbedPatches(ExecContext& ctx, ConstTensorView pixels, TensorView hidden) const;
  void RunLayer(ExecContext& ctx, const SiglipLayer& layer, TensorView hidden) const;
  void RunMlp(ExecContext& ctx, const SiglipLayer& layer, TensorView hidden) const;
  void Attend(ExecContext& ctx, ConstTensorView q, ConstTensorView k, ConstTensorView v,
              int64_t frames, TensorView out) const;
  ReusePlan PlanReuse(ExecContext& ctx, FeatureReuse& reuse, ConstTensorView hidden) const;
  // Operations of a layer over one frame of which so many patches are computed afresh.
  double LayerFlops(int64_t fresh) const;
  // All layers, with what `reuse` says of earlier frames. Returns their operations.
  double RunLayersReusing(ExecContext& ctx, FeatureReuse& reuse, TensorView hidden) const;
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
    layer.kqv =
        LinearWeight::Stack({weights.TakeMatrix(attention + "k_proj.weight", {width, width}),
                             weights.TakeMatrix(attention + "q_proj.weight", {width, width}),
                             weights.TakeMatrix(attention + "v_proj.weight", {width, width})},
                            {&k_bias, &q_bias, &v_bias}, WeightUse::kManyRows);
    layer.keys = layer.kqv.Outputs(0, width);
    layer.queries_values = layer.kqv.Outputs(width, 3 * width);
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
                                   const EncodeHooks& hooks) const {
  const int64_t count = static_cast<int64_t>(frames.size());
  const Shape expected{count, kChannels, config_.image_size, config_.image_size};
  if (pixels.shape() != expected || pixels.dtype() != DType::kF32) {
    throw Error("[siglip] pixels must be " + expected.ToString() + " f32, got " +
                pixels.shape().ToString() + " " + Name(pixels.dtype()));
  }
  if (hooks.reuse && hooks.probe) throw Error("[siglip] a probe sees frames computed whole only");
  TraceScope trace(&ctx.tracer(), "encode", count);
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
      hooks.probe ? count : std::max<int64_t>(1, kMaxPatchesAtOnce / patches_per_frame());
  const int64_t batches = count == 0 ? 0 : (count + most - 1) / most;
  double flops = 0;
  for (int64_t b = 0; b < batches; ++b) {
    const int64_t begin = count * b / batches, end = count * (b + 1) / batches;
    EncodeBatch(ctx, pixels.Slice(begin, end),
                tokens.features.view().Slice(begin * per_frame, end * per_frame), hooks, flops);
  }
  trace.AddWork(flops, static_cast<double>(pixels.SizeBytes() + tokens.features.SizeBytes()));
  return tokens;
}

void SiglipEncoder::EncodeBatch(ExecContext& ctx, ConstTensorView pixels, TensorView pooled,
                                const EncodeHooks& hooks, double& flops) const {
  const TensorProbe& probe = hooks.probe;
  Workspace& workspace = ctx.workspace();
  Workspace::Scope scope(workspace);
  const int64_t rows = pixels.dim(0) * patches_per_frame();
  const TensorView hidden = workspace.Allocate(DType::kF32, {rows, config_.hidden_size});
  EmbedPatches(ctx, pixels, hidden);
  if (probe) probe("embeddings", hidden);
  flops += pixels.dim(0) * FlopsPerFrame();
  if (hooks.reuse) {
    flops -= pixels.dim(0) * layers_.size() * LayerFlops(patches_per_frame());
    flops += RunLayersReusing(ctx, *hooks.reuse, hidden);
  } else {
    for (size_t i = 0; i < layers_.size(); ++i) {
      RunLayer(ctx, layers_[i], hidden);
      if (probe) probe("layer." + std::to_string(i), hidden);
    }
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

void SiglipEncoder::Attend(ExecContext& ctx, ConstTensorView q, ConstTensorView k,
                           ConstTensorView v, int64_t frames, TensorView out) const {
  TraceScope trace(&ctx.tracer(), "encode/attention", q.dim(0));
  trace.AddWork(
      4.0 * q.dim(0) * patches_per_frame() * q.dim(1),
      static_cast<double>(q.SizeBytes() + k.SizeBytes() + v.SizeBytes()) + out.SizeBytes());
  const int head_dim = config_.hidden_size / config_.num_heads;
  EncoderAttention(ctx, q, k, v, frames, config_.num_heads, head_dim,
                   1.0f / std::sqrt(static_cast<float>(head_dim)), out);
}

void SiglipEncoder::RunLayer(ExecContext& ctx, const SiglipLayer& layer, TensorView hidden) const {
  Workspace& workspace = ctx.workspace();
  Workspace::Scope scope(workspace);
  const int64_t rows = hidden.dim(0), width = config_.hidden_size;
  // The norm's result and, once keys, queries and values are made of it, the attention's.
  const TensorView narrow = workspace.Allocate(dtype_, {rows, width});
  Normalise(ctx, layer.norm1, hidden, narrow);
  {
    Workspace::Scope attention_scope(workspace);
    const TensorView kqv = workspace.Allocate(dtype_, {rows, 3 * width});
    TracedLinear(ctx, "encode/qkv", narrow, layer.kqv, kqv);
    Attend(ctx, kqv.Columns(width, 2 * width), kqv.Columns(0, width),
           kqv.Columns(2 * width, 3 * width), rows / patches_per_frame(), narrow);
  }
  TracedLinear(ctx, "encode/out", narrow, layer.out, hidden, {.accumulate = true});
  RunMlp(ctx, layer, hidden);
}

void SiglipEncoder::RunMlp(ExecContext& ctx, const SiglipLayer& layer, TensorView hidden) const {
  Workspace& workspace = ctx.workspace();
  Workspace::Scope scope(workspace);
  const TensorView narrow = workspace.Allocate(dtype_, hidden.shape());
  Normalise(ctx, layer.norm2, hidden, narrow);
  const TensorView inner = workspace.Allocate(dtype_, {hidden.dim(0), config_.intermediate_size});
  TracedLinear(ctx, "encode/mlp", narrow, layer.fc1, inner, {.activation = Activation::kGeluTanh});
  TracedLinear(ctx, "encode/mlp", inner, layer.fc2, hidden, {.accumulate = true});
}

double SiglipEncoder::RunLayersReusing(ExecContext& ctx, FeatureReuse& reuse,
                                       TensorView hidden) const {
  Workspace& workspace = ctx.workspace();
  Workspace::Scope scope(workspace);
  const int64_t patches = patches_per_frame(), width = config_.hidden_size;
  const ReusePlan plan(PlanReuse(ctx, reuse, hidden));
  const int64_t whole_rows = plan.whole.size() * patches;
  const int64_t other_rows = hidden.dim(0) - whole_rows;
  const auto others = static_cast<int64_t>(plan.others.size());

  // Frames computed whole and, behind them, the patches of the others that are computed afresh:
  // what one product takes. The others stand beside.
  const TensorView room = workspace.Allocate(DType::kF32, {hidden.dim(0), width});
  const TensorView kept = workspace.Allocate(DType::kF32, {other_rows, width});
  const auto rows_of = [&](TensorView x, int64_t frame) {
    return x.Slice(frame * patches, (frame + 1) * patches);
  };
  for (size_t i = 0; i < plan.whole.size(); ++i) {
    CopyRows(ctx, rows_of(hidden, plan.whole[i]), rows_of(room, i));
  }
  for (int64_t i = 0; i < others; ++i) {
    CopyRows(ctx, rows_of(hidden, plan.others[i].frame), rows_of(kept, i));
  }

  double flops = 0;
  for (size_t l = 0; l < layers_.size(); ++l) {
    const SiglipLayer& layer = layers_[l];
    Workspace::Scope layer_scope(workspace);
    const TensorView whole = room.Slice(0, whole_rows);
    const TensorView kqv = workspace.Allocate(dtype_, {whole_rows, 3 * width});
    const TensorView before = workspace.Allocate(DType::kF32, {whole_rows, width});
    const TensorView update = workspace.Allocate(dtype_, {whole_rows, width});
    const ConstTensorView whole_keys = kqv.Columns(0, width);
    const ConstTensorView whole_values = kqv.Columns(2 * width, 3 * width);
    if (whole_rows > 0) {
      Workspace::Scope norm_scope(workspace);
      const TensorView narrow = workspace.Allocate(dtype_, {whole_rows, width});
      Normalise(ctx, layer.norm1, whole, narrow);
      TracedLinear(ctx, "encode/qkv", narrow, layer.kqv, kqv);
      CopyRows(ctx, whole, before);
    }
    // Of the other frames: keys of all patches, then queries and values of those that are fresh.
    std::vector<int32_t> fresh;
    const TensorView keys = workspace.Allocate(dtype_, {other_rows, width});
    const TensorView values = workspace.Allocate(dtype_, {other_rows, width});
    TensorView queries_values;
    if (others > 0) {
      const TensorView narrow = workspace.Allocate(dtype_, {other_rows, width});
      Normalise(ctx, layer.norm1, kept, narrow);
      TracedLinear(ctx, "encode/keys", narrow, layer.keys, keys);
      {
        const TraceScope trace(&ctx.tracer(), "encode/choose", other_rows);
        for (int64_t i = 0; i < others; ++i) {
          const int64_t place = plan.others[i].reference;
          const ConstTensorView reference_keys =
              place < 0 ? reuse.reference(l).keys.view()
                        : whole_keys.Slice(place * patches, (place + 1) * patches);
          reuse.ChooseFresh(ctx, static_cast<int>(l), plan.others[i].frame, rows_of(keys, i),
                            reference_keys, fresh);
        }
        CheckFresh(fresh, others);
      }
      const auto count = static_cast<int64_t>(fresh.size());
      const TensorView gathered = workspace.Allocate(dtype_, {count, width});
      queries_values = workspace.Allocate(dtype_, {count, 2 * width});
      {
        const TraceScope trace(&ctx.tracer(), "encode/gather", count);
        GatherRows(ctx, narrow, fresh, others, gathered);
        GatherRows(ctx, kept, fresh, others, room.Slice(whole_rows, whole_rows + count));
      }
      TracedLinear(ctx, "encode/qkv", gathered, layer.queries_values, queries_values);
      const TraceScope trace(&ctx.tracer(), "encode/gather", other_rows);
      for (int64_t i = 0; i < others; ++i) {
        const int64_t place = plan.others[i].reference;
        CopyRows(ctx,
                 place < 0 ? reuse.reference(l).values.view()
                           : whole_values.Slice(place * patches, (place + 1) * patches),
                 rows_of(values, i));
      }
      ScatterRows(ctx, queries_values.Columns(width, 2 * width), fresh, others, values);
    }

    const int64_t fresh_rows = static_cast<int64_t>(fresh.size());
    const TensorView active = room.Slice(0, whole_rows + fresh_rows);
    {
      Workspace::Scope attention_scope(workspace);
      const TensorView mixed = workspace.Allocate(dtype_, {active.dim(0), width});
      if (whole_rows > 0) {
        Attend(ctx, kqv.Columns(width, 2 * width), whole_keys, whole_values, plan.whole.size(),
               mixed.Slice(0, whole_rows));
      }
      if (others > 0) {
        Attend(ctx, queries_values.Columns(0, width), keys, values, others,
               mixed.Slice(whole_rows, active.dim(0)));
      }
      TracedLinear(ctx, "encode/out", mixed, layer.out, active, {.accumulate = true});
    }
    RunMlp(ctx, layer, active);
    flops += plan.whole.size() * LayerFlops(patches) +
             others * LayerFlops(others > 0 ? fresh_rows / others : 0);

    const TraceScope trace(&ctx.tracer(), "encode/reuse", other_rows);
    if (whole_rows > 0) Subtract(ctx, whole, before, update);
    for (int64_t i = 0; i < others; ++i) {
      const int64_t place = plan.others[i].reference;
      Add(ctx, place < 0 ? reuse.reference(l).update.view() : rows_of(update, place),
          rows_of(kept, i));
    }
    ScatterRows(ctx, room.Slice(whole_rows, active.dim(0)), fresh, others, kept);
    if (whole_rows > 0) {
      const int64_t last = whole_rows - patches;
      LayerReference& reference = reuse.reference(l);
      if (reference.keys.empty()) {
        const Shape shape = {patches, width};
        reference = {Tensor(dtype_, shape), Tensor(dtype_, shape), Tensor(dtype_, shape)};
      }
      CopyRows(ctx, whole_keys.Slice(last, whole_rows), reference.keys);
      CopyRows(ctx, whole_values.Slice(last, whole_rows), reference.values);
      CopyRows(ctx, update.Slice(last, whole_rows), reference.update);
    }
  }

  for (size_t i = 0; i < plan.whole.size(); ++i) {
    CopyRows(ctx, rows_of(room, i), rows_of(hidden, plan.whole[i]));
  }
  for (int64_t i = 0; i < others; ++i) {
    CopyRows(ctx, rows_of(kept, i), rows_of(hidden, plan.others[i].frame));
  }
  return flops;
}

ReusePlan SiglipEncoder::PlanReuse(ExecContext& ctx, FeatureReuse& reuse,
                                   ConstTensorView hidden) const {
  Workspace::Scope scope(ctx.workspace());
  const int64_t frames = hidden.dim(0) / patches_per_frame();
  TensorView keys;
  const std::vector<bool> is_whole =
      reuse.ChooseWhole(ctx, frames, static_cast<int>(layers_.size()), [&]() -> ConstTensorView {
        if (keys.empty()) {
          const TensorView narrow = ctx.workspace().Allocate(dtype_, hidden.shape());
          keys = ctx.workspace().Allocate(dtype_, hidden.shape());
          Normalise(ctx, layers_[0].norm1, hidden, narrow);
          TracedLinear(ctx, "encode/keys", narrow, layers_[0].keys, keys);
        }
        return keys;
      });
  ReusePlan plan;
  for (int64_t f = 0; f < frames; ++f) {
    if (is_whole[f]) {
      plan.whole.push_back(f);
    } else {
      plan.others.push_back({f, static_cast<int64_t>(plan.whole.size()) - 1});
    }
  }
  return plan;
}

double SiglipEncoder::LayerFlops(int64_t fresh) const {
  const double width = config_.hidden_size, inner = config_.intermediate_size;
  const double patches = patches_per_frame();
  return 2 * (patches * width * width +
              fresh * (3 * width * width + 2 * width * inner + 2 * patches * width));
}

double SiglipEncoder::FlopsPerFrame() const {
  const double patches = patches_per_frame(), width = config_.hidden_size;
  const double output = config_.output_size;
  const double embedding = width * kChannels * config_.patch_size * config_.patch_size;
  const double projector = width * output + output * output;
  return 2 * patches * (embedding + projector) +
         config_.layers_to_run * LayerFlops(patches_per_frame());
}

}  // namespace

std::unique_ptr<VisionEncoder> LoadSiglipEncoder(WeightStore& weights, const SiglipConfig& config) {
  return std::make_unique<SiglipEncoder>(weights, config);
}

}  // namespace sluice
