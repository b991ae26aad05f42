#include "vision/vit_layers.h"

#include <algorithm>
#include <cmath>
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
#include "vision/patches.h"

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

// What a view holds, in host memory: itself, or a copy.
class HostCopy {
 public:
  HostCopy(ExecContext& ctx, ConstTensorView x) : view_(x) {
    if (x.empty() || x.device() == Device::kCpu) return;
    copy_ = TransferTo(ctx, x, Device::kCpu);
    view_ = copy_;
  }
  operator ConstTensorView() const { return view_; }
  const ConstTensorView* operator->() const { return &view_; }

 private:
  Tensor copy_;
  ConstTensorView view_;
};

// 'W' for a frame computed whole, 'o' for another.
std::string PatternOf(const std::vector<bool>& whole) {
  std::string pattern;
  for (const bool is_whole : whole) pattern += is_whole ? 'W' : 'o';
  return pattern;
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

void NormWeights::Apply(ExecContext& ctx, std::span<const ConstTensorView> hidden, TensorView y,
                        ConstTensorView more) const {
  TraceScope trace(&ctx.tracer(), "encode/norm", y.dim(0));
  trace.AddWork(
      8.0 * y.shape().NumElements(),
      4.0 * y.shape().NumElements() + static_cast<double>(more.SizeBytes()) + y.SizeBytes());
  LayerNorm(ctx, hidden, weight, bias, eps, y, more);
}

void NormWeights::Apply(ExecContext& ctx, ConstTensorView hidden, TensorView y) const {
  Apply(ctx, {&hidden, 1}, y);
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
    layer.kqv = weights.TakeProjections(
        attention, {{"k_proj", width}, {"q_proj", width}, {"v_proj", width}}, width,
        /*with_bias=*/true);
    layer.keys = layer.kqv.Outputs(0, width);
    layer.queries_values = layer.kqv.Outputs(width, 3 * width);
    layer.out = weights.TakeProjection(attention + "out_proj", width, width, true);
    layer.fc1 = weights.TakeProjection(prefix + "mlp.fc1", inner, width, true);
    layer.fc2 = weights.TakeProjection(prefix + "mlp.fc2", width, inner, true);
    layers_.push_back(std::move(layer));
  }
}

double VitLayers::Encode(ExecContext& ctx, ConstTensorView pixels, TensorView tokens,
                         const Ends& ends, const EncodeHooks& hooks) const {
  const int64_t frames = pixels.dim(0);
  double flops = 0;
  ForBatches(frames, rows(), hooks.probe != nullptr, [&](int64_t begin, int64_t end) {
    const int64_t per_frame = tokens.dim(0) / frames;
    const TensorView to = tokens.Slice(begin * per_frame, end * per_frame);
    const ConstTensorView some = pixels.Slice(begin, end);
    if (ctx.device() == Device::kCpu || hooks.probe) {
      flops += EncodeBatch(ctx, some, to, ends, hooks);
      return;
    }
    // Results go where they lie each time, so that the steps of a batch recur.
    const Workspace::Scope scope(ctx.workspace());
    const TensorView same = ctx.workspace().Allocate(DType::kF32, to.shape());
    flops += EncodeBatch(ctx, some, same, ends, hooks);
    CopyRows(ctx, same, to);
  });
  return flops;
}

double VitLayers::EncodeBatch(ExecContext& ctx, ConstTensorView pixels, TensorView tokens,
                              const Ends& ends, const EncodeHooks& hooks) const {
  const Workspace::Scope scope(ctx.workspace());
  const int64_t frames = pixels.dim(0);
  const TensorView hidden =
      ctx.workspace().Allocate(DType::kF32, {frames * rows(), config_.hidden_size});
  const std::string count = std::to_string(frames);
  ctx.Recurring("encode/embed " + count, [&] { ends.embed(pixels, hidden); });
  ShowOnHost(ctx, hooks.probe, "embeddings", hidden);
  const double flops = Run(ctx, hidden, hooks);
  const auto project = [&] { ends.project(hidden, tokens); };
  hooks.probe ? project() : ctx.Recurring("encode/project " + count, project);
  return flops;
}

double VitLayers::Run(ExecContext& ctx, TensorView hidden, const EncodeHooks& hooks) const {
  if (int{hooks.reuse != nullptr} + int{hooks.merge != nullptr} + int{hooks.probe != nullptr} > 1) {
    throw Error("[encode] expected at most one of feature reuse, token merging and a probe");
  }
  if (hooks.reuse && !layers_.empty()) return RunReusing(ctx, *hooks.reuse, hidden);
  if (hooks.merge) return RunMerging(ctx, *hooks.merge, hidden);
  const int64_t frames = hidden.dim(0) / rows();
  if (hooks.probe) {
    for (size_t i = 0; i < layers_.size(); ++i) {
      const std::string name = "layer." + std::to_string(i);
      RunLayer(ctx, layers_[i], hidden, hooks.probe, name);
      ShowOnHost(ctx, hooks.probe, name, hidden);
    }
  } else {
    ctx.Recurring("encode/layers " + std::to_string(frames), [&] {
      for (const Layer& layer : layers_) RunLayer(ctx, layer, hidden, nullptr, {});
    });
  }
  return static_cast<double>(frames) * FlopsPerFrame();
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
    ctx.Recurring("encode/keys " + PatternOf(whole), [&] {
      ctx.Split(static_cast<int>(plans.size()), [&](ExecContext& own, int part) {
        const ReuseRoom room = room_of(plans[part]);
        std::vector<ConstTensorView> in_order;
        for (const int64_t frame : plans[part].order) {
          in_order.push_back(hidden.Slice(frame * per_frame, (frame + 1) * per_frame));
        }
        const TensorView normalised = room.narrow.Slice(0, room.keys.dim(0));
        layers_[0].norm1.Apply(own, in_order, normalised);
        TracedLinear(own, "encode/keys", normalised, layers_[0].keys, room.keys);
      });
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
  // unless other threads still read the one before it.
  const bool keep = reuse.KeepsReference() && plans.back().others() < plans.back().frames();
  const bool apart = keep && plans.size() > 1 && plans[0].UsesEarlier();
  std::vector<LayerReference> kept(apart ? layers_.size() : 0);
  const auto kept_of = [&](int layer) -> LayerReference& {
    return apart ? kept[layer] : reuse.reference(layer);
  };
  std::string key = "encode/layers " + PatternOf(whole);
  for (int l = 0; l < static_cast<int>(layers_.size()); ++l) {
    if (plans[0].UsesEarlier()) CheckReference(reuse.reference(l), l);
    if (keep) MakeReference(ctx, kept_of(l));
  }
  // Graphs work on the references of one stream.
  if (keep || plans[0].UsesEarlier()) {
    key += " " + std::to_string(reinterpret_cast<uintptr_t>(kept_of(0).keys.view().raw()));
  }
  std::vector<double> flops_of(plans.size());
  ctx.Split(static_cast<int>(plans.size()), [&](ExecContext& own, int part) {
    const auto kept_by = [&](int layer) {
      return keep && part + 1 == static_cast<int>(plans.size()) ? &kept_of(layer) : nullptr;
    };
    flops_of[part] = RunPlan(own, reuse, plans[part], key, room_of(plans[part]), kept_by, hidden);
  });
  for (size_t l = 0; l < kept.size(); ++l) {
    reuse.reference(static_cast<int>(l)) = std::move(kept[l]);
  }
  return std::accumulate(flops_of.begin(), flops_of.end(), flops);
}

void VitLayers::MakeReference(ExecContext& ctx, LayerReference& reference) const {
  if (!reference.keys.empty()) return;
  for (Tensor* part : {&reference.keys, &reference.values, &reference.update}) {
    *part = Tensor(dtype_, {rows(), config_.hidden_size}, ctx.device());
  }
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
                          const std::string& key, const ReuseRoom& space,
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
  const int64_t others = plan.others(), other_rows = others * per_frame;
  const int64_t whole_rows = all_rows - other_rows;

  // Residual stream of the last two.
  const TensorView room = workspace.Allocate(DType::kF32, {all_rows, width});
  const TensorView whole = room.Slice(0, whole_rows);
  // What the others are the distance to. Of an earlier reference only the way it went matters.
  const TensorView earlier = workspace.Allocate(DType::kF32, {per_frame, width});
  const auto reference_of = [&](int64_t i, ConstTensorView kept, ConstTensorView of_batch) {
    const int64_t place = plan.references[i];
    return place == ReusePlan::kEarlier ? kept : rows_of(of_batch, place);
  };
  const TensorView distance = workspace.Allocate(DType::kF32, {other_rows, width});
  const auto begin = [&] {
    const TraceScope trace(&ctx.tracer(), "encode/reuse", all_rows);
    if (plan.UsesEarlier()) ZeroRows(ctx, earlier);
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
  };

  // What each frame's rows are the sum of, with `distance` of the others.
  std::vector<ConstTensorView> streams;
  for (int64_t i = 0; i < others; ++i) streams.push_back(reference_of(i, earlier, whole));
  for (int64_t i = others; i < frames; ++i) streams.push_back(rows_of(whole, i - others));
  const std::span<const ConstTensorView> of_others = std::span(streams).first(others);
  // One matrix of each other frame's reference.
  const auto references_of = [&](ConstTensorView kept, ConstTensorView of_batch) {
    std::vector<ConstTensorView> references;
    for (int64_t i = 0; i < others; ++i) references.push_back(reference_of(i, kept, of_batch));
    return references;
  };

  const int64_t fresh_patches = reuse.FreshPatches(config_.patches);
  if (fresh_patches < 1 || fresh_patches > config_.patches) {
    throw Error("[encode] feature reuse must compute 1 to " + std::to_string(config_.patches) +
                " patches afresh, got " + std::to_string(fresh_patches));
  }
  const TensorView chosen = workspace.Allocate(DType::kI32, {others, fresh_patches});
  const RowLists fresh = {.rows = chosen, .ahead = class_tokens};
  const int64_t each = fresh.each(), fresh_rows = others * each, end = all_rows + fresh_rows;
  // Residual stream of rows that are computed.
  const TensorView active = room.Slice(0, whole_rows + fresh_rows);
  const TensorView fresh_stream = active.Slice(whole_rows, active.dim(0));

  const auto run_layer = [&](int l) {
    const Layer& layer = layers_[l];
    const LayerReference& reference = reuse.reference(l);
    Workspace::Scope layer_scope(workspace);
    if (l > 0) {
      layer.norm1.Apply(ctx, streams, narrow.Slice(0, all_rows), distance);
      TracedLinear(ctx, "encode/keys", narrow.Slice(0, all_rows), layer.keys, keys);
    }
    const TensorView whole_keys = keys.Slice(other_rows, all_rows);
    if (others > 0) {
      const TraceScope trace(&ctx.tracer(), "encode/choose", other_rows);
      std::vector<RowPairs> pairs;
      const std::vector<ConstTensorView> their_keys = references_of(reference.keys, whole_keys);
      for (int64_t i = 0; i < others; ++i) {
        pairs.push_back({patches_of(keys, i), their_keys[i].Slice(class_tokens, per_frame), {}});
      }
      reuse.ChooseFresh(ctx, l, pairs, chosen);
      GatherRows(ctx, narrow.Slice(0, other_rows), fresh, narrow.Slice(all_rows, end));
      AddListed(ctx, of_others, distance, fresh, fresh_stream);
    }
    const TensorView queries_values = workspace.Allocate(dtype_, {active.dim(0), 2 * width});
    TracedLinear(ctx, "encode/qkv", narrow.Slice(other_rows, end), layer.queries_values,
                 queries_values);
    const ConstTensorView queries = queries_values.Columns(0, width);
    const ConstTensorView new_values = queries_values.Columns(width, 2 * width);
    const ConstTensorView whole_values = new_values.Slice(0, whole_rows);
    const TensorView values = workspace.Allocate(dtype_, {other_rows, width});
    if (others > 0) {
      const TraceScope trace(&ctx.tracer(), "encode/gather", other_rows);
      OverlayRows(ctx, references_of(reference.values, whole_values),
                  new_values.Slice(whole_rows, active.dim(0)), fresh, values);
    }
    // The update of a frame to be kept is what it will have gained.
    LayerReference* const kept = kept_of(l);
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

    const TraceScope trace(&ctx.tracer(), "encode/reuse", other_rows);
    if (plan.UsesEarlier()) Add(ctx, earlier, reference.update, earlier);
    if (others > 0) SubtractListed(ctx, fresh_stream, of_others, fresh, distance);
    if (kept) {
      CopyRows(ctx, whole_keys.Slice(last, whole_rows), kept->keys);
      CopyRows(ctx, whole_values.Slice(last, whole_rows), kept->values);
      Subtract(ctx, whole.Slice(last, whole_rows), before, kept->update);
    }
  };
  const auto finish = [&] {
    const TraceScope trace(&ctx.tracer(), "encode/reuse", all_rows);
    ForEach(ctx, frames, [&](int64_t place) {
      const TensorView to = rows_of(hidden, plan.order[place]);
      if (place < others) {
        Add(ctx, reference_of(place, earlier, whole), rows_of(distance, place), to);
      } else {
        CopyRows(ctx, rows_of(whole, place - others), to);
      }
    });
  };

  // Two steps: a GPU that has waited for the answer about changed frames goes on with the first
  // layers while the host goes through the others.
  const auto layers = static_cast<int>(layers_.size()), first = std::min(layers, 3);
  ctx.Recurring(key + " first", [&] {
    begin();
    for (int l = 0; l < first; ++l) run_layer(l);
  });
  ctx.Recurring(key + " rest", [&] {
    for (int l = first; l < layers; ++l) run_layer(l);
    finish();
  });
  return layers * ((frames - others) * LayerFlops(per_frame) + others * LayerFlops(each));
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
  ExecContext& host = ctx.host();  // tokens are chosen and merged in host memory
  const auto placed = [&](void* at, Shape shape) {
    return TensorView(at, DType::kF32, shape, -1, ctx.device());
  };
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
      std::vector<float> logs(all);
      for (int64_t i = 0; i < all; ++i) logs[i] = std::log(sizes[i]);
      Transfer(ctx, ConstTensorView(logs.data(), DType::kF32, {all}), bias);
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
      const Workspace::Scope host_scope(host.workspace());
      const HostCopy of_keys(ctx, keys), of_received(ctx, received), of_tokens(ctx, tokens);
      const TensorView metric = host.workspace().Allocate(DType::kF32, {all, head_dim});
      MeanOverHeads(host, of_keys, heads, metric);
      std::vector<int32_t> places(all);
      std::vector<float> merged_sizes(frames * left);
      const TensorView merged = placed(spare.raw(), {frames * left, width});
      const TensorView to = ctx.device() == Device::kCpu
                                ? merged
                                : host.workspace().Allocate(DType::kF32, merged.shape());
      ParallelFor(host, frames, 1, [&](int64_t begin, int64_t end) {
        for (int64_t f = begin; f < end; ++f) {
          const std::span<int32_t> chosen = std::span(places).subspan(f * count, count);
          merge.ChoosePlaces(
              host, metric.Slice(f * count, (f + 1) * count),
              asked > 0 ? std::span<const float>(of_received->data<float>() + f * count, count)
                        : std::span<const float>(),
              class_tokens, remove, chosen);
          MergeRows(of_tokens->Slice(f * count, (f + 1) * count),
                    std::span(sizes).subspan(f * count, count), chosen,
                    to.Slice(f * left, (f + 1) * left),
                    std::span(merged_sizes).subspan(f * left, left));
          for (int64_t i = f * rows(); i < (f + 1) * rows(); ++i) place_of[i] = chosen[place_of[i]];
        }
      });
      if (to.device() != ctx.device()) Transfer(ctx, to, merged);
      spare = placed(tokens.raw(), hidden.shape());
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
  GatherRows(ctx, tokens, ListRows(ctx, place_of, frames), hidden);
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
  GatherRows(ctx, q, ListRows(ctx, chosen, frames), few);
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
