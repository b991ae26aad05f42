// The layers that every vision tower of ours is made of: a pre-norm ViT (Dosovitskiy et al. 2021),
//
//   h += out(attention(LN1 h));  h += fc2(act(fc1(LN2 h)))
//
// over the rows of each frame by itself: a class token first, if the family has one, then the
// patches. Const; calls on different contexts may overlap.
#ifndef SLUICE_VISION_VIT_LAYERS_H_
#define SLUICE_VISION_VIT_LAYERS_H_

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "runtime/ops/attention.h"
#include "runtime/ops/linear.h"
#include "runtime/weight_store.h"
#include "vision/vision_encoder.h"

namespace sluice {

// Scale and shift of a LayerNorm over rows of `hidden_size` values.
struct NormWeights {
  Tensor weight, bias;  // [V] f32
  float eps = 0;

  NormWeights() = default;
  // Takes `name`.weight and `name`.bias.
  NormWeights(WeightStore& weights, const std::string& name, int64_t size, float norm_eps);
  // y = LN(hidden + more), traced as "encode/norm"; see LayerNorm for matrices that lie apart.
  void Apply(ExecContext& ctx, std::span<const ConstTensorView> hidden, TensorView y,
             ConstTensorView more = {}) const;
  void Apply(ExecContext& ctx, ConstTensorView hidden, TensorView y) const;
};

struct VitConfig {
  int hidden_size = 0;  // V
  int intermediate_size = 0;
  int num_heads = 0;      // divides hidden_size
  int layers_to_run = 0;  // 0 and more
  int class_tokens = 0;   // 0 or 1
  int patches = 0;        // N
  float layer_norm_eps = 0;
  Activation activation = Activation::kNone;  // between fc1 and fc2
  std::vector<AttentionPrecision> attention;  // of each layer that runs; empty: exact in all
};

struct ReusePlan;

class VitLayers {
 public:
  // Takes `vision_tower.encoder.layers.*`, only those that run. Throws InputError as WeightStore.
  VitLayers(WeightStore& weights, const VitConfig& config);

  // What a family puts around the layers, for a batch of frames.
  struct Ends {
    std::function<void(ConstTensorView pixels, TensorView hidden)> embed;
    std::function<void(ConstTensorView hidden, TensorView tokens)> project;
  };
  // Takes pixels [F, 3, H, W] f32 through embed, all layers and project to tokens [F * M, E] f32,
  // batch by batch, and returns how many operations the layers took. Between them lie hidden
  // [rows() a frame, V] f32. A probe sees "embeddings", "layer.0" and so on, before it
  // "layer.0.query", "layer.0.key" and "layer.0.value", and what project shows it. Throws Error on
  // hooks that do not go together.
  double Encode(ExecContext& ctx, ConstTensorView pixels, TensorView tokens, const Ends& ends,
                const EncodeHooks& hooks) const;

  int64_t rows() const { return config_.class_tokens + config_.patches; }  // of a frame
  double FlopsPerFrame() const;                                            // computed whole

 private:
  struct Layer {
    NormWeights norm1, norm2;
    LinearWeight kqv;  // [3V, V], keys first
    // Parts of it, for frames that reuse an earlier one: keys of all rows, the rest of a few.
    LinearWeight keys, queries_values;
    LinearWeight out;  // [V, V]
    LinearWeight fc1;  // [I, V]
    LinearWeight fc2;  // [V, I]
    AttentionPrecision attention = AttentionPrecision::kExact;
  };

  double EncodeBatch(ExecContext& ctx, ConstTensorView pixels, TensorView tokens, const Ends& ends,
                     const EncodeHooks& hooks) const;
  // Runs all layers in place and returns how many operations that took. hidden: [F * rows(), V]
  // f32, contiguous.
  double Run(ExecContext& ctx, TensorView hidden, const EncodeHooks& hooks) const;
  // name: what a probe is told.
  void RunLayer(ExecContext& ctx, const Layer& layer, TensorView hidden,
                const TensorProbe& probe = nullptr, const std::string& name = {}) const;
  void RunMlp(ExecContext& ctx, const Layer& layer, TensorView hidden) const;
  void Attend(ExecContext& ctx, const Layer& layer, ConstTensorView q, ConstTensorView k,
              ConstTensorView v, int64_t frames, TensorView out,
              ConstTensorView key_bias = {}) const;
  struct ReuseRoom;
  double RunReusing(ExecContext& ctx, FeatureReuse& reuse, TensorView hidden) const;
  // key: of the steps it consists of. kept_of(layer): where what is kept of the last frame computed
  // whole goes, or null.
  double RunPlan(ExecContext& ctx, FeatureReuse& reuse, const ReusePlan& plan,
                 const std::string& key, const ReuseRoom& space,
                 const std::function<LayerReference*(int)>& kept_of, TensorView hidden) const;
  // Makes room for what is kept of a frame.
  void MakeReference(ExecContext& ctx, LayerReference& reference) const;
  void CheckReference(const LayerReference& reference, int layer) const;
  double RunMerging(ExecContext& ctx, const TokenMerge& merge, TensorView hidden) const;
  // The attention that each of a frame's tokens receives from as many of its queries, [F, n] f32.
  void AverageAttention(ExecContext& ctx, ConstTensorView q, ConstTensorView k, int64_t frames,
                        int64_t queries, ConstTensorView key_bias, TensorView received) const;
  // Operations of a layer that computes so many rows of a frame afresh, and the keys of all.
  double LayerFlops(int64_t fresh) const;

  VitConfig config_;
  DType dtype_;  // of weights and product inputs
  std::vector<Layer> layers_;
};

}  // namespace sluice

#endif  // SLUICE_VISION_VIT_LAYERS_H_
