#include "vision/vit_layers.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <span>
#include <utility>

#include "runtime/convert.h"
#include "runtime/error.h"
#include "runtime/ops/attention.h"
#include "runtime/ops/norm.h"
#include "runtime/ops/rows.h"
#include "runtime/ops/traced_linear.h"
#include "runtime/parallel.h"

namespace sluice {
namespace {

// Which frames of a batch are computed whole, and what the others refer to.
struct ReusePlan {
  static constexpr int64_t kEarlier = -1;  // the reference kept of an earlier batch
  struct Other {
    int64_t frame;      // of the batch
    int64_t reference;  // index in `whole`, or kEarlier
  };
  std::vector<int64_t> whole;  // frames of the batch, ascending
  std::vector<Other> others;

  explicit ReusePlan(const std::vector<bool>& is_whole) {
    for (size_t f = 0; f < is_whole.size(); ++f) {
      if (is_whole[f]) {
        whole.push_back(f);
      } else {
        others.push_back({static_cast<int64_t>(f), static_cast<int64_t>(whole.size()) - 1});
      }
    }
  }
  bool UsesEarlier() const { return !others.empty() && others[0].reference == kEarlier; }
};

// y [M, V / heads] f32 = the mean of x's heads. x: [M, V].
void MeanOverHeads(ExecContext& ctx, ConstTensorView x, int heads, TensorView y) {
  const int64_t head_dim = y.dim(1);
  ParallelFor(ctx, x.dim(0), 64, [&](int64_t begin, int64_t end) {
    std::vector<float> row(x.dim(1));
    for (int64_t m = begin; m < end; ++m) {
      ConvertElements(static_cast<const char*>(x.raw()) + m * x.stride0() * SizeOf(x.dtype()),
                      x.dtype(), row.data(), DType::kF32, x.dim(1));
      float* to = y.data<float>() + m * head_dim;
      std::fill_n(to, head_dim, 0.0f);
      for (int h = 0; h < heads; ++h) {
        for (int64_t d = 0; d < head_dim; ++d) to[d] += row[h * head_dim + d];
      }
      for (int64_t d = 0; d < head_dim; ++d) to[d] /= static_cast<float>(heads);
    }
  });
}

}  // namespace

NormWeights::NormWeights(WeightStore& weights, const std::string& name, int64_t size,
                         float norm_eps)
    : weight(weights.TakeF32(name + ".weight", {size})),
      bias(weights.TakeF32(name + ".bias", {size})),
      eps(norm_eps) {}

void NormWeights::Apply(ExecContext& ctx, ConstTensorView hidden, TensorView y,
                        ConstTensorView more) const {
  TraceScope trace(&ctx.tracer(), "encode/norm", hidden.dim(0));
  trace.AddWork(8.0 * hidden.shape().NumElements(),
                static_cast<double>(hidden.SizeBytes()) + more.SizeBytes() + y.SizeBytes());
  LayerNorm(ctx, hidden, weight, bias, eps, y, more);
}

VitLayers::VitLayers(WeightStore& weights, const VitConfig& config)
    : config_(config), dtype_(weights.compute_type()) {
  const int64_t width = config.hidden_size, inner = config.intermediate_size;
  for (int i = 0; i < config.layers_to_run; ++i) {
    const std::string prefix = "vision_tower.encoder.layers." + std::to_string(i) + ".";
    const std::string attention = prefix + "self_attn.";
    Layer layer;
    layer.norm1 = {weights, prefix + "layer_norm1", width, config.layer_norm_eps};
    layer.norm2 = {weights, prefix + "layer_norm2", width, config.layer_norm_eps};
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
}

double VitLayers::Run(ExecContext& ctx, TensorView hidden, const EncodeHooks& hooks) const {
  if (int{hooks.reuse != nullptr} + int{hooks.merge != nullptr} + int{hooks.probe != nullptr} > 1) {
    throw Error("[encode] expected at most one of feature reuse, token merging and a probe");
  }
  if (hooks.reuse && !layers_.empty()) return RunReusing(ctx, *hooks.reuse, hidden);
  if (hooks.merge) return RunMerging(ctx, *hooks.merge, hidden);
  for (size_t i = 0; i < layers_.size(); ++i) {
    RunLayer(ctx, layers_[i], hidden);
    if (hooks.probe) hooks.probe("layer." + std::to_string(i), hidden);
  }
  return static_cast<double>(hidden.dim(0) / rows()) * FlopsPerFrame();
}

void VitLayers::Attend(ExecContext& ctx, ConstTensorView q, ConstTensorView k, ConstTensorView v,
                       int64_t frames, TensorView out, ConstTensorView key_bias) const {
  TraceScope trace(&ctx.tracer(), "encode/attention", q.dim(0));
  trace.AddWork(
      4.0 * q.dim(0) * (k.dim(0) / frames) * q.dim(1),
      static_cast<double>(q.SizeBytes() + k.SizeBytes() + v.SizeBytes()) + out.SizeBytes());
  const int head_dim = config_.hidden_size / config_.num_heads;
  EncoderAttention(ctx, q, k, v, frames, config_.num_heads, head_dim,
                   1.0f / std::sqrt(static_cast<float>(head_dim)), out, key_bias);
}

void VitLayers::RunLayer(ExecContext& ctx, const Layer& layer, TensorView hidden) const {
  Workspace& workspace = ctx.workspace();
  Workspace::Scope scope(workspace);
  const int64_t count = hidden.dim(0), width = config_.hidden_size;
  // The norm's result and, once keys, queries and values are made of it, the attention's.
  const TensorView narrow = workspace.Allocate(dtype_, {count, width});
  layer.norm1.Apply(ctx, hidden, narrow);
  {
    Workspace::Scope attention_scope(workspace);
    const TensorView kqv = workspace.Allocate(dtype_, {count, 3 * width});
    TracedLinear(ctx, "encode/qkv", narrow, layer.kqv, kqv);
    Attend(ctx, kqv.Columns(width, 2 * width), kqv.Columns(0, width),
           kqv.Columns(2 * width, 3 * width), count / rows(), narrow);
  }
  TracedLinear(ctx, "encode/out", narrow, layer.out, hidden, {.accumulate = true});
  RunMlp(ctx, layer, hidden);
}

void VitLayers::RunMlp(ExecContext& ctx, const Layer& layer, TensorView hidden) const {
  Workspace& workspace = ctx.workspace();
  Workspace::Scope scope(workspace);
  const TensorView narrow = workspace.Allocate(dtype_, hidden.shape());
  layer.norm2.Apply(ctx, hidden, narrow);
  const TensorView inner = workspace.Allocate(dtype_, {hidden.dim(0), config_.intermediate_size});
  TracedLinear(ctx, "encode/mlp", narrow, layer.fc1, inner, {.activation = config_.activation});
  TracedLinear(ctx, "encode/mlp", inner, layer.fc2, hidden, {.accumulate = true});
}

// A row that is not computed afresh moves as its reference does, so its distance to it stays what
// it was. That distance is what is kept of frames that are not computed whole: rows that stay
// behind cost no more than their norm and keys.
double VitLayers::RunReusing(ExecContext& ctx, FeatureReuse& reuse, TensorView hidden) const {
  Workspace& workspace = ctx.workspace();
  Workspace::Scope scope(workspace);
  const int64_t per_frame = rows(), width = config_.hidden_size,
                class_tokens = config_.class_tokens;
  const int64_t frames = hidden.dim(0) / per_frame;
  const auto rows_of = [&](auto x, int64_t frame) {
    return x.Slice(frame * per_frame, (frame + 1) * per_frame);
  };
  const auto patches_of = [&](ConstTensorView x, int64_t frame) {
    return rows_of(x, frame).Slice(class_tokens, per_frame);
  };

  // In the order of the batch, what the first layer chooses by.
  const TensorView first_narrow = workspace.Allocate(dtype_, hidden.shape());
  const TensorView first_keys = workspace.Allocate(dtype_, hidden.shape());
  layers_[0].norm1.Apply(ctx, hidden, first_narrow);
  TracedLinear(ctx, "encode/keys", first_narrow, layers_[0].keys, first_keys);
  std::vector<ConstTensorView> patch_keys;
  for (int64_t f = 0; f < frames; ++f) patch_keys.push_back(patches_of(first_keys, f));
  const ReusePlan plan(reuse.ChooseWhole(ctx, static_cast<int>(layers_.size()), patch_keys));
  const auto others = static_cast<int64_t>(plan.others.size());
  const int64_t other_rows = others * per_frame, all_rows = hidden.dim(0);
  const int64_t whole_rows = all_rows - other_rows;

  // Normalised rows: the other frames', those of frames computed whole, and room for the fresh ones
  // of the former. Keys are made of the first two together, everything else of the last two.
  const TensorView narrow = workspace.Allocate(dtype_, {all_rows + other_rows, width});
  const TensorView keys = workspace.Allocate(dtype_, {all_rows, width});
  // Residual stream of the last two.
  const TensorView room = workspace.Allocate(DType::kF32, {all_rows, width});
  const TensorView whole = room.Slice(0, whole_rows);
  const auto in_order = [&](const auto& move) {  // move(frame of the batch, place)
    for (int64_t i = 0; i < others; ++i) move(plan.others[i].frame, i);
    for (size_t i = 0; i < plan.whole.size(); ++i) move(plan.whole[i], others + i);
  };
  in_order([&](int64_t frame, int64_t place) {
    if (place >= others) CopyRows(ctx, rows_of(hidden, frame), rows_of(whole, place - others));
    CopyRows(ctx, rows_of(first_narrow, frame), rows_of(narrow, place));
    CopyRows(ctx, rows_of(first_keys, frame), rows_of(keys, place));
  });

  // What the others are the distance to. Of an earlier reference only the way it went matters.
  const TensorView earlier = workspace.Allocate(DType::kF32, {per_frame, width});
  if (plan.UsesEarlier()) std::memset(earlier.raw(), 0, earlier.SizeBytes());
  const auto reference_of = [&](int64_t i, ConstTensorView kept, ConstTensorView of_batch) {
    const int64_t place = plan.others[i].reference;
    return place == ReusePlan::kEarlier ? kept : rows_of(of_batch, place);
  };
  const TensorView distance = workspace.Allocate(DType::kF32, {other_rows, width});
  for (int64_t i = 0; i < others; ++i) {
    Subtract(ctx, rows_of(hidden, plan.others[i].frame), reference_of(i, earlier, whole),
             rows_of(distance, i));
  }

  double flops = 0;
  for (size_t l = 0; l < layers_.size(); ++l) {
    const Layer& layer = layers_[l];
    LayerReference& reference = reuse.reference(static_cast<int>(l));
    Workspace::Scope layer_scope(workspace);
    if (l > 0) {
      for (int64_t i = 0; i < others; ++i) {
        layer.norm1.Apply(ctx, reference_of(i, earlier, whole), rows_of(narrow, i),
                          rows_of(distance, i));
      }
      if (whole_rows > 0) layer.norm1.Apply(ctx, whole, narrow.Slice(other_rows, all_rows));
      TracedLinear(ctx, "encode/keys", narrow.Slice(0, all_rows), layer.keys, keys);
    }
    const TensorView whole_keys = keys.Slice(other_rows, all_rows);

    std::vector<int32_t> fresh;
    {
      const TraceScope trace(&ctx.tracer(), "encode/choose", other_rows);
      for (int64_t i = 0; i < others; ++i) {
        const auto first = static_cast<int64_t>(fresh.size());
        for (int32_t t = 0; t < class_tokens; ++t) fresh.push_back(t);
        const auto begin = static_cast<int64_t>(fresh.size());
        reuse.ChooseFresh(
            ctx, static_cast<int>(l), plan.others[i].frame, patches_of(keys, i),
            reference_of(i, reference.keys, whole_keys).Slice(class_tokens, per_frame), fresh);
        for (size_t j = begin; j < fresh.size(); ++j) fresh[j] += config_.class_tokens;
        const auto chosen = static_cast<int64_t>(fresh.size()) - first;
        if (static_cast<int64_t>(fresh.size()) == begin || chosen * (i + 1) != first + chosen) {
          throw Error(
              "[encode] feature reuse must choose as many patches of every frame, at least "
              "one; of frame " +
              std::to_string(plan.others[i].frame) + " it chose " +
              std::to_string(fresh.size() - begin));
        }
      }
    }
    const auto fresh_rows = static_cast<int64_t>(fresh.size());
    const int64_t end = all_rows + fresh_rows;
    const TensorView active = room.Slice(0, whole_rows + fresh_rows);
    // Those of one frame.
    const int64_t each = others > 0 ? fresh_rows / others : 0;
    const auto fresh_of = [&](int64_t i) {
      return std::span<const int32_t>(fresh).subspan(i * each, each);
    };
    const auto fresh_room = [&](int64_t i) {
      return room.Slice(whole_rows + i * each, whole_rows + (i + 1) * each);
    };
    {
      const TraceScope trace(&ctx.tracer(), "encode/gather", fresh_rows);
      GatherRows(ctx, narrow.Slice(0, other_rows), fresh, others, narrow.Slice(all_rows, end));
      for (int64_t i = 0; i < others; ++i) {
        AddListed(ctx, reference_of(i, earlier, whole), rows_of(distance, i), fresh_of(i),
                  fresh_room(i));
      }
    }
    const TensorView queries_values = workspace.Allocate(dtype_, {active.dim(0), 2 * width});
    TracedLinear(ctx, "encode/qkv", narrow.Slice(other_rows, end), layer.queries_values,
                 queries_values);
    const ConstTensorView queries = queries_values.Columns(0, width);
    const ConstTensorView new_values = queries_values.Columns(width, 2 * width);
    const ConstTensorView whole_values = new_values.Slice(0, whole_rows);
    const TensorView values = workspace.Allocate(dtype_, {other_rows, width});
    {
      const TraceScope trace(&ctx.tracer(), "encode/gather", other_rows);
      for (int64_t i = 0; i < others; ++i) {
        CopyRows(ctx, reference_of(i, reference.values, whole_values), rows_of(values, i));
      }
      ScatterRows(ctx, new_values.Slice(whole_rows, active.dim(0)), fresh, others, values);
    }
    // The last whole frame becomes the reference of the next batch: its update is what it will have
    // gained.
    const TensorView before = workspace.Allocate(DType::kF32, {per_frame, width});
    const int64_t last = whole_rows - per_frame;
    if (whole_rows > 0) CopyRows(ctx, whole.Slice(last, whole_rows), before);

    const TensorView mixed = narrow.Slice(other_rows, end);
    if (whole_rows > 0) {
      Attend(ctx, queries.Slice(0, whole_rows), whole_keys, whole_values,
             static_cast<int64_t>(plan.whole.size()), mixed.Slice(0, whole_rows));
    }
    if (others > 0) {
      Attend(ctx, queries.Slice(whole_rows, active.dim(0)), keys.Slice(0, other_rows), values,
             others, mixed.Slice(whole_rows, active.dim(0)));
    }
    TracedLinear(ctx, "encode/out", mixed, layer.out, active, {.accumulate = true});
    RunMlp(ctx, layer, active);
    flops += plan.whole.size() * LayerFlops(per_frame) + others * LayerFlops(each);

    const TraceScope trace(&ctx.tracer(), "encode/reuse", other_rows);
    if (plan.UsesEarlier()) Add(ctx, earlier, reference.update, earlier);
    for (int64_t i = 0; i < others; ++i) {
      SubtractListed(ctx, fresh_room(i), reference_of(i, earlier, whole), fresh_of(i),
                     rows_of(distance, i));
    }
    if (whole_rows > 0) {
      if (reference.keys.empty()) {
        const Shape shape = {per_frame, width};
        reference = {Tensor(dtype_, shape), Tensor(dtype_, shape), Tensor(dtype_, shape)};
      }
      CopyRows(ctx, whole_keys.Slice(last, whole_rows), reference.keys);
      CopyRows(ctx, whole_values.Slice(last, whole_rows), reference.values);
      Subtract(ctx, whole.Slice(last, whole_rows), before, reference.update);
    }
  }
  in_order([&](int64_t frame, int64_t place) {
    if (place < others) {
      Add(ctx, reference_of(place, earlier, whole), rows_of(distance, place),
          rows_of(hidden, frame));
    } else {
      CopyRows(ctx, rows_of(whole, place - others), rows_of(hidden, frame));
    }
  });
  return flops;
}

double VitLayers::RunMerging(ExecContext& ctx, const TokenMerge& merge, TensorView hidden) const {
  Workspace& workspace = ctx.workspace();
  Workspace::Scope scope(workspace);
  const int64_t width = config_.hidden_size, inner = config_.intermediate_size;
  const int64_t frames = hidden.dim(0) / rows(), class_tokens = config_.class_tokens;
  const int heads = config_.num_heads, head_dim = config_.hidden_size / heads;
  int64_t count = rows();  // of a frame's tokens
  std::vector<float> sizes(hidden.dim(0), 1);
  // Which token each row of a frame has gone into.
  std::vector<int32_t> place_of(hidden.dim(0));
  for (size_t i = 0; i < place_of.size(); ++i) place_of[i] = static_cast<int32_t>(i % count);
  const TensorView room = workspace.Allocate(DType::kF32, hidden.shape());
  TensorView tokens = hidden, spare = room;  // turn by turn

  double flops = 0;
  for (const Layer& layer : layers_) {
    Workspace::Scope layer_scope(workspace);
    const int64_t all = frames * count, remove = merge.TokensToRemove(count, class_tokens);
    const TensorView kqv = workspace.Allocate(dtype_, {all, 3 * width});
    const ConstTensorView keys = kqv.Columns(0, width), queries = kqv.Columns(width, 2 * width);
    TensorView bias;
    if (merge.weighs_keys() && count < rows()) {
      bias = workspace.Allocate(DType::kF32, {all});
      for (int64_t i = 0; i < all; ++i) bias.data<float>()[i] = std::log(sizes[i]);
    }
    {
      Workspace::Scope attention_scope(workspace);
      const TensorView narrow = workspace.Allocate(dtype_, {all, width});
      layer.norm1.Apply(ctx, tokens, narrow);
      TracedLinear(ctx, "encode/qkv", narrow, layer.kqv, kqv);
      Attend(ctx, queries, keys, kqv.Columns(2 * width, 3 * width), frames, narrow, bias);
      TracedLinear(ctx, "encode/out", narrow, layer.out, tokens, {.accumulate = true});
    }
    flops += 8.0 * all * width * width + 4.0 * all * count * width;

    if (remove > 0) {
      const int64_t left = count - remove;
      const int64_t asked = class_tokens > 0 ? std::min(1, merge.queries_to_average())
                                             : std::min<int64_t>(count, merge.queries_to_average());
      TensorView received;
      if (asked > 0) {
        received = workspace.Allocate(DType::kF32, {frames, count});
        AverageAttention(ctx, queries, keys, frames, asked, bias, received);
      }
      TraceScope trace(&ctx.tracer(), "encode/merge", all);
      // Cosines between tokens at even and at odd places.
      const double work = 2.0 * frames * ((count + 1) / 2) * (count / 2) * head_dim;
      trace.AddWork(work, 8.0 * all * width);
      flops += work + 2.0 * frames * asked * count * width;
      const TensorView metric = workspace.Allocate(DType::kF32, {all, head_dim});
      MeanOverHeads(ctx, keys, heads, metric);
      std::vector<int32_t> places(all);
      std::vector<float> merged_sizes(frames * left);
      const TensorView merged = {spare.raw(), DType::kF32, {frames * left, width}};
      ParallelFor(ctx, frames, 1, [&](int64_t begin, int64_t end) {
        for (int64_t f = begin; f < end; ++f) {
          const std::span<int32_t> chosen = std::span(places).subspan(f * count, count);
          merge.ChoosePlaces(ctx, metric.Slice(f * count, (f + 1) * count),
                             asked > 0
                                 ? std::span<const float>(received.data<float>() + f * count, count)
                                 : std::span<const float>(),
                             class_tokens, remove, chosen);
          MergeRows(tokens.Slice(f * count, (f + 1) * count),
                    std::span(sizes).subspan(f * count, count), chosen,
                    merged.Slice(f * left, (f + 1) * left),
                    std::span(merged_sizes).subspan(f * left, left));
          for (int64_t i = f * rows(); i < (f + 1) * rows(); ++i) place_of[i] = chosen[place_of[i]];
        }
      });
      spare = {tokens.raw(), DType::kF32, hidden.shape()};
      tokens = merged;
      sizes = std::move(merged_sizes);
      count = left;
    }
    RunMlp(ctx, layer, tokens);
    flops += 4.0 * tokens.dim(0) * width * inner;
  }
  if (count == rows()) return flops;

  const TraceScope trace(&ctx.tracer(), "encode/merge", hidden.dim(0));
  if (tokens.raw() == hidden.raw()) {
    const TensorView moved = room.Slice(0, tokens.dim(0));
    CopyRows(ctx, tokens, moved);
    tokens = moved;
  }
  GatherRows(ctx, tokens, place_of, frames, hidden);
  return flops;
}

void VitLayers::AverageAttention(ExecContext& ctx, ConstTensorView q, ConstTensorView k,
                                 int64_t frames, int64_t queries, ConstTensorView key_bias,
                                 TensorView received) const {
  Workspace::Scope scope(ctx.workspace());
  TraceScope trace(&ctx.tracer(), "encode/received", frames * queries);
  trace.AddWork(2.0 * queries * k.dim(0) * k.dim(1), static_cast<double>(k.SizeBytes()));
  const int64_t count = k.dim(0) / frames;
  std::vector<int32_t> chosen;  // the class token, or spread evenly
  for (int64_t i = 0; i < frames * queries; ++i) {
    chosen.push_back(static_cast<int32_t>(i % queries * count / queries));
  }
  const TensorView few = ctx.workspace().Allocate(dtype_, {frames * queries, q.dim(1)});
  GatherRows(ctx, q, chosen, frames, few);
  const int head_dim = config_.hidden_size / config_.num_heads;
  AttentionReceived(ctx, few, k, frames, config_.num_heads, head_dim,
                    1.0f / std::sqrt(static_cast<float>(head_dim)), key_bias, received);
}

double VitLayers::LayerFlops(int64_t fresh) const {
  const double width = config_.hidden_size, inner = config_.intermediate_size;
  const auto all = static_cast<double>(rows());
  return 2 *
         (all * width * width + fresh * (3 * width * width + 2 * width * inner + 2 * all * width));
}

double VitLayers::FlopsPerFrame() const {
  return static_cast<double>(layers_.size()) * LayerFlops(rows());
}

}  // namespace sluice
