#include "vision/vit_layers.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>
#include <span>
#include <utility>

#include "runtime/convert.h"
#include "runtime/error.h"
#include "runtime/ops/attention.h"
#include "runtime/ops/norm.h"
#include "runtime/ops/rows.h"
#include "runtime/ops/traced_linear.h"
#include "runtime/parallel.h"
#include "runtime/transfer.h"

namespace sluice {

// Frames of a batch that follow each other: which are computed whole, what the others refer to.
struct ReusePlan {
  static constexpr int64_t kEarlier = -1;  // the reference kept of an earlier batch

  int64_t first;                    // frame of the batch
  std::vector<int64_t> order;       // frames of the batch: the others, then those computed whole
  std::vector<int64_t> references;  // of the others: which of those computed whole, or kEarlier

  ReusePlan(const std::vector<bool>& is_whole, int64_t begin, int64_t end) : first(begin) {
    std::vector<int64_t> whole;
    for (int64_t f = begin; f < end; ++f) {
      if (is_whole[f]) {
        whole.push_back(f);
      } else {
        order.push_back(f);
        references.push_back(static_cast<int64_t>(whole.size()) - 1);
      }
    }
    order.insert(order.end(), whole.begin(), whole.end());
  }
  int64_t frames() const { return static_cast<int64_t>(order.size()); }
  int64_t others() const { return static_cast<int64_t>(references.size()); }
  bool UsesEarlier() const { return !references.empty() && references[0] == kEarlier; }
};

namespace {

// The batch in `parts` plans of about equal work, all but the first beginning with a frame computed
// whole, so that none needs another; in one where that cannot be, for threads without a plan would
// stand idle.
std::vector<ReusePlan> CutPlans(const std::vector<bool>& is_whole, int parts) {
  constexpr double kOther = 0.4;  // of the time of a frame computed whole
  const auto frames = static_cast<int64_t>(is_whole.size());
  std::vector<double> work(frames + 1);  // of all frames before
  for (int64_t f = 0; f < frames; ++f) work[f + 1] = work[f] + (is_whole[f] ? 1 : kOther);
  std::vector<ReusePlan> plans;
  int64_t begin = 0;
  for (int part = 1; part < parts; ++part) {
    const double wanted = work[frames] * part / parts;
    int64_t cut = begin;
    for (int64_t f = begin + 1; f < frames; ++f) {
      if (!is_whole[f]) continue;
      if (cut == begin || std::abs(work[f] - wanted) < std::abs(work[cut] - wanted)) cut = f;
    }
    if (cut == begin) return {ReusePlan(is_whole, 0, frames)};
    plans.emplace_back(is_whole, begin, cut);
    begin = cut;
  }
  plans.emplace_back(is_whole, begin, frames);
  return plans;
}

// Calls body(i) for all i < count, shared out among the threads. With one, all threads are inside.
template <typename Body>
void ForEach(ExecContext& ctx, int64_t count, const Body& body) {
  ParallelFor(ctx, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

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

// Normalised rows of a plan's frames: the others', those of frames computed whole, and room for the
// fresh ones of the former. Keys are made of the first two together, everything else of the last
// two.
struct VitLayers::ReuseRoom {
  TensorView narrow;  // [2 * rows, V], the first layer's already there
  TensorView keys;    // [rows, V] likewise
};

NormWeights::NormWeights(WeightStore& weights, const std::string& name, int64_t size,
                         float norm_eps)
    : weight(weights.TakePlaced(name + ".weight", {size})),
      bias(weights.TakePlaced(name + ".bias", {size})),
      eps(norm_eps) {}

void NormWeights::Apply(ExecContext& ctx, ConstTensorView hidden, TensorView y,
                        ConstTensorView more) const {
  TraceScope trace(&ctx.tracer(), "encode/norm", hidden.dim(0));
  trace.AddWork(8.0 * hidden.shape().NumElements(),
                static_cast<double>(hidden.SizeBytes()) + more.SizeBytes() + y.SizeBytes());
  Run(ctx, hidden, y, more);
}

void NormWeights::Run(ExecContext& ctx, ConstTensorView hidden, TensorView y,
                      ConstTensorView more) const {
  LayerNorm(ctx, hidden, weight, bias, eps, y, more);
}

VitLayers::VitLayers(WeightStore& weights, const VitConfig& config)
    : config_(config), dtype_(weights.compute_type()) {
  const int64_t width = config.hidden_size, inner = config.intermediate_size;
  for (int i = 0; i < config.layers_to_run; ++i) {
    const std::string prefix = "vision_tower.encoder.layers." + std::to_string(i) + ".";
    const std::string attention = prefix + "self_attn.";
    Layer layer;
    if (!config.attention.empty()) layer.attention = config.attention.at(i);
    layer.norm1 = {weights, prefix + "layer_norm1", width, config.layer_norm_eps};
    layer.norm2 = {weights, prefix + "layer_norm2", width, config.layer_norm_eps};
    const Tensor q_bias = weights.TakeF32(attention + "q_proj.bias", {width});
    const Tensor k_bias = weights.TakeF32(attention + "k_proj.bias", {width});
    const Tensor v_bias = weights.TakeF32(attention + "v_proj.bias", {width});
    layer.kqv =
        LinearWeight::Stack({weights.TakeMatrix(attention + "k_proj.weight", {width, width}),
                             weights.TakeMatrix(attention + "q_proj.weight", {width, width}),
                             weights.TakeMatrix(attention + "v_proj.weight", {width, width})},
                            {&k_bias, &q_bias, &v_bias}, WeightUse::kManyRows, weights.device());
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
    const std::string name = "layer." + std::to_string(i);
    RunLayer(ctx, layers_[i], hidden, hooks.probe, name);
    ShowOnHost(ctx, hooks.probe, name, hidden);
  }
  return static_cast<double>(hidden.dim(0) / rows()) * FlopsPerFrame();
}

void VitLayers::Attend(ExecContext& ctx, const Layer& layer, ConstTensorView q, ConstTensorView k,
                       ConstTensorView v, int64_t frames, TensorView out,
                       ConstTensorView key_bias) const {
  TraceScope trace(&ctx.tracer(), "encode/attention", q.dim(0));
  trace.AddWork(
      4.0 * q.dim(0) * (k.dim(0) / frames) * q.dim(1),
      static_cast<double>(q.SizeBytes() + k.SizeBytes() + v.SizeBytes()) + out.SizeBytes());
  const int head_dim = config_.hidden_size / config_.num_heads;
  EncoderAttention(ctx, q, k, v, frames, config_.num_heads, head_dim,
                   1.0f / std::sqrt(static_cast<float>(head_dim)), out, key_bias, layer.attention);
}

void VitLayers::RunLayer(ExecContext& ctx, const Layer& layer, TensorView hidden,
                         const TensorProbe& probe, const std::string& name) const {
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
    const ConstTensorView keys = kqv.Columns(0, width), queries = kqv.Columns(width, 2 * width);
    const ConstTensorView values = kqv.Columns(2 * width, 3 * width);
    ShowOnHost(ctx, probe, name + ".query", queries);
    ShowOnHost(ctx, probe, name + ".key", keys);
    ShowOnHost(ctx, probe, name + ".value", values);
    Attend(ctx, layer, queries, keys, values, count / rows(), narrow);
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

double VitLayers::RunReusing(ExecContext& ctx, FeatureReuse& reuse, TensorView hidden) const {
  Workspace::Scope scope(ctx.workspace());
  const int64_t per_frame = rows(), width = config_.hidden_size;
  const int64_t all_rows = hidden.dim(0), frames = all_rows / per_frame;
  const TensorView narrow = ctx.workspace().Allocate(dtype_, {2 * all_rows, width});
  const TensorView keys = ctx.workspace().Allocate(dtype_, {all_rows, width});
  const auto room_of = [&](const ReusePlan& plan) {
    const int64_t begin = plan.first * per_frame, end = begin + plan.frames() * per_frame;
    return ReuseRoom{narrow.Slice(2 * begin, 2 * end), keys.Slice(begin, end)};
  };

  // The schedule nearly always holds, so the first layer's keys, which tell for sure, are made in
  // its order.
  std::vector<bool> whole = reuse.Schedule(frames);
  std::vector<ReusePlan> plans;
  const auto make_first_keys = [&] {
    plans = CutPlans(whole, ctx.num_threads());
    ctx.Split(static_cast<int>(plans.size()), [&](ExecContext& own, int part) {
      const ReusePlan& plan = plans[part];
      const ReuseRoom room = room_of(plan);
      for (int64_t i = 0; i < plan.frames(); ++i) {
        const int64_t frame = plan.order[i];
        layers_[0].norm1.Apply(own, hidden.Slice(frame * per_frame, (frame + 1) * per_frame),
                               room.narrow.Slice(i * per_frame, (i + 1) * per_frame));
      }
      TracedLinear(own, "encode/keys", room.narrow.Slice(0, room.keys.dim(0)), layers_[0].keys,
                   room.keys);
    });
  };
  make_first_keys();
  double flops = 0;
  {
    std::vector<ConstTensorView> patch_keys(frames);
    for (const ReusePlan& plan : plans) {
      for (int64_t i = 0; i < plan.frames(); ++i) {
        const int64_t row = (plan.first + i) * per_frame;
        patch_keys[plan.order[i]] = keys.Slice(row + config_.class_tokens, row + per_frame);
      }
    }
    TraceScope trace(&ctx.tracer(), "encode/choose");
    std::vector<bool> chosen = reuse.ChooseWhole(ctx, static_cast<int>(layers_.size()), patch_keys);
    if (chosen != whole) {
      whole = std::move(chosen);
      make_first_keys();
      flops += 2.0 * all_rows * width * width;
    }
  }

  // The last whole frame becomes the reference of the next batch, if that may need one: in place,
  // unless frames of this batch still read the one before it.
  const bool keep = reuse.KeepsReference() && plans.back().others() < plans.back().frames();
  std::vector<LayerReference> kept(keep && plans[0].UsesEarlier() ? layers_.size() : 0);
  std::vector<double> flops_of(plans.size());
  ctx.Split(static_cast<int>(plans.size()), [&](ExecContext& own, int part) {
    const auto kept_of = [&](int layer) -> LayerReference* {
      if (!keep || part + 1 < static_cast<int>(plans.size())) return nullptr;
      return kept.empty() ? &reuse.reference(layer) : &kept[layer];
    };
    flops_of[part] = RunPlan(own, reuse, plans[part], room_of(plans[part]), kept_of, hidden);
  });
  for (size_t l = 0; l < kept.size(); ++l) {
    reuse.reference(static_cast<int>(l)) = std::move(kept[l]);
  }
  return std::accumulate(flops_of.begin(), flops_of.end(), flops);
}

// References may come from a file.
void VitLayers::CheckReference(const LayerReference& reference, int layer) const {
  const Shape shape{rows(), config_.hidden_size};
  for (const Tensor* part : {&reference.keys, &reference.values, &reference.update}) {
    if (!part->empty() && part->shape() == shape && part->dtype() == dtype_) continue;
    throw Error("[encode] the reference of layer " + std::to_string(layer) + " must be " +
                shape.ToString() + " " + Name(dtype_) + ", got " +
                (part->empty() ? "nothing" : part->shape().ToString() + " " + Name(part->dtype())));
  }
}

// A row that is not computed afresh moves as its reference does, so its distance to it stays what
// it was. That distance is what is kept of frames that are not computed whole: rows that stay
// behind cost no more than their norm and keys.
double VitLayers::RunPlan(ExecContext& ctx, FeatureReuse& reuse, const ReusePlan& plan,
                          const ReuseRoom& space,
                          const std::function<LayerReference*(int)>& kept_of,
                          TensorView hidden) const {
  Workspace& workspace = ctx.workspace();
  Workspace::Scope scope(workspace);
  const int64_t per_frame = rows(), width = config_.hidden_size,
                class_tokens = config_.class_tokens;
  const int64_t frames = plan.frames(), all_rows = frames * per_frame;
  const auto rows_of = [&](auto x, int64_t frame) {
    return x.Slice(frame * per_frame, (frame + 1) * per_frame);
  };
  const auto patches_of = [&](ConstTensorView x, int64_t place) {
    return rows_of(x, place).Slice(class_tokens, per_frame);
  };
  const TensorView narrow = space.narrow, keys = space.keys;
  double flops = 0;
  const int64_t others = plan.others(), other_rows = others * per_frame;
  const int64_t whole_rows = all_rows - other_rows;

  // Residual stream of the last two.
  const TensorView room = workspace.Allocate(DType::kF32, {all_rows, width});
  const TensorView whole = room.Slice(0, whole_rows);
  // What the others are the distance to. Of an earlier reference only the way it went matters.
  const TensorView earlier = workspace.Allocate(DType::kF32, {per_frame, width});
  if (plan.UsesEarlier()) std::memset(earlier.raw(), 0, earlier.SizeBytes());
  const auto reference_of = [&](int64_t i, ConstTensorView kept, ConstTensorView of_batch) {
    const int64_t place = plan.references[i];
    return place == ReusePlan::kEarlier ? kept : rows_of(of_batch, place);
  };
  const TensorView distance = workspace.Allocate(DType::kF32, {other_rows, width});
  {
    const TraceScope trace(&ctx.tracer(), "encode/reuse", all_rows);
    ForEach(ctx, frames, [&](int64_t place) {
      const ConstTensorView from = rows_of(hidden, plan.order[place]);
      if (place >= others) {
        CopyRows(ctx, from, rows_of(whole, place - others));
        return;
      }
      const int64_t reference = plan.references[place];
      Subtract(ctx, from,
               reference == ReusePlan::kEarlier ? ConstTensorView(earlier)
                                                : rows_of(hidden, plan.order[others + reference]),
               rows_of(distance, place));
    });
  }

  for (size_t l = 0; l < layers_.size(); ++l) {
    const Layer& layer = layers_[l];
    const LayerReference& reference = reuse.reference(static_cast<int>(l));
    if (plan.UsesEarlier()) CheckReference(reference, static_cast<int>(l));
    Workspace::Scope layer_scope(workspace);
    if (l > 0) {
      {
        const TraceScope trace(&ctx.tracer(), "encode/norm", all_rows);
        // Rows of the others take longer, so every thread gets some of every frame.
        ParallelFor(ctx, per_frame, 32, [&](int64_t begin, int64_t end) {
          for (int64_t i = 0; i < frames; ++i) {
            const TensorView to = rows_of(narrow, i).Slice(begin, end);
            if (i < others) {
              layer.norm1.Run(ctx, reference_of(i, earlier, whole).Slice(begin, end), to,
                              rows_of(distance, i).Slice(begin, end));
            } else {
              layer.norm1.Run(ctx, rows_of(whole, i - others).Slice(begin, end), to);
            }
          }
        });
      }
      TracedLinear(ctx, "encode/keys", narrow.Slice(0, all_rows), layer.keys, keys);
    }
    const TensorView whole_keys = keys.Slice(other_rows, all_rows);

    std::vector<std::vector<int32_t>> fresh(others);  // rows of each
    {
      const TraceScope trace(&ctx.tracer(), "encode/choose", other_rows);
      ForEach(ctx, others, [&](int64_t i) {
        for (int32_t t = 0; t < class_tokens; ++t) fresh[i].push_back(t);
        reuse.ChooseFresh(
            ctx, static_cast<int>(l), plan.order[i], patches_of(keys, i),
            reference_of(i, reference.keys, whole_keys).Slice(class_tokens, per_frame), fresh[i]);
        for (size_t j = class_tokens; j < fresh[i].size(); ++j) fresh[i][j] += class_tokens;
      });
    }
    const int64_t each = others > 0 ? fresh[0].size() : 0;
    for (int64_t i = 0; i < others; ++i) {
      const auto chosen = static_cast<int64_t>(fresh[i].size());
      if (chosen == each && chosen > class_tokens) continue;
      throw Error(
          "[encode] feature reuse must choose as many patches of every frame, at least one; of "
          "frame " +
          std::to_string(plan.order[i]) + " it chose " + std::to_string(chosen - class_tokens));
    }
    const int64_t end = all_rows + others * each;
    const TensorView active = room.Slice(0, whole_rows + others * each);
    // The fresh rows of one frame.
    const auto fresh_of = [&](auto x, int64_t first, int64_t i) {
      return x.Slice(first + i * each, first + (i + 1) * each);
    };
    {
      const TraceScope trace(&ctx.tracer(), "encode/gather", others * each);
      ForEach(ctx, others, [&](int64_t i) {
        GatherRows(ctx, rows_of(narrow, i), fresh[i], 1, fresh_of(narrow, all_rows, i));
        AddListed(ctx, reference_of(i, earlier, whole), rows_of(distance, i), fresh[i],
                  fresh_of(room, whole_rows, i));
      });
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
      ForEach(ctx, others, [&](int64_t i) {
        CopyRows(ctx, reference_of(i, reference.values, whole_values), rows_of(values, i));
        ScatterRows(ctx, fresh_of(new_values, whole_rows, i), fresh[i], 1, rows_of(values, i));
      });
    }
    // The update of a frame to be kept is what it will have gained.
    LayerReference* const kept = kept_of(static_cast<int>(l));
    const int64_t last = whole_rows - per_frame;
    TensorView before;
    if (kept) {
      before = workspace.Allocate(DType::kF32, {per_frame, width});
      CopyRows(ctx, whole.Slice(last, whole_rows), before);
    }

    const TensorView mixed = narrow.Slice(other_rows, end);
    if (whole_rows > 0) {
      Attend(ctx, layer, queries.Slice(0, whole_rows), whole_keys, whole_values, frames - others,
             mixed.Slice(0, whole_rows));
    }
    if (others > 0) {
      Attend(ctx, layer, queries.Slice(whole_rows, active.dim(0)), keys.Slice(0, other_rows),
             values, others, mixed.Slice(whole_rows, active.dim(0)));
    }
    TracedLinear(ctx, "encode/out", mixed, layer.out, active, {.accumulate = true});
    RunMlp(ctx, layer, active);
    flops += (frames - others) * LayerFlops(per_frame) + others * LayerFlops(each);

    const TraceScope trace(&ctx.tracer(), "encode/reuse", other_rows);
    if (plan.UsesEarlier()) Add(ctx, earlier, reference.update, earlier);
    ForEach(ctx, others, [&](int64_t i) {
      SubtractListed(ctx, fresh_of(room, whole_rows, i), reference_of(i, earlier, whole), fresh[i],
                     rows_of(distance, i));
    });
    if (kept) {
      if (kept->keys.empty()) {
        const Shape shape = {per_frame, width};
        for (Tensor* part : {&kept->keys, &kept->values, &kept->update}) {
          *part = Tensor(dtype_, shape, ctx.device());
        }
      }
      CopyRows(ctx, whole_keys.Slice(last, whole_rows), kept->keys);
      CopyRows(ctx, whole_values.Slice(last, whole_rows), kept->values);
      Subtract(ctx, whole.Slice(last, whole_rows), before, kept->update);
    }
  }
  const TraceScope trace(&ctx.tracer(), "encode/reuse", all_rows);
  ForEach(ctx, frames, [&](int64_t place) {
    const TensorView to = rows_of(hidden, plan.order[place]);
    if (place < others) {
      Add(ctx, reference_of(place, earlier, whole), rows_of(distance, place), to);
    } else {
      CopyRows(ctx, rows_of(whole, place - others), to);
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
      Attend(ctx, layer, queries, keys, kqv.Columns(2 * width, 3 * width), frames, narrow, bias);
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
