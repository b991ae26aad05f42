// The small random vision towers beside the golden values, and the same in double precision,
// written down as the papers do: one row after another, no batches, no fused products.
#ifndef SLUICE_TESTS_SUPPORT_TINY_TOWERS_H_
#define SLUICE_TESTS_SUPPORT_TINY_TOWERS_H_

#include <cmath>
#include <filesystem>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "tests/support/tensor_testing.h"
#include "vision/families/clip.h"
#include "vision/families/siglip.h"
#include "vision/pooling.h"

namespace sluice::testing {

using Rows = std::vector<std::vector<double>>;

inline constexpr int kTinySide = 74, kTinyTokens = 9;  // pixels; tokens of a frame

// SigLIP: 5 x 5 patches, no class token. CLIP: 6 x 6 patches behind a class token.
struct TinyTower {
  std::string name;
  int class_tokens, patch, grid, width, heads, inner, layers, out;
  double eps;

  int patches() const { return grid * grid; }
  int rows() const { return class_tokens + patches(); }
  const Checkpoint& files() const {
    static const Checkpoint siglip = Checkpoint::Open(GoldenDirectory("tiny_tied"));
    static const Checkpoint clip = Checkpoint::Open(GoldenDirectory("tiny_next_video"));
    return class_tokens ? clip : siglip;
  }
  std::unique_ptr<VisionEncoder> Load(DType dtype, Device device = Device::kCpu) const {
    WeightStore weights(
        files(), [](const std::string& tensor) { return std::optional(tensor); }, dtype, device);
    const auto fill = [&](auto config) {
      config.hidden_size = width;
      config.intermediate_size = inner;
      config.num_heads = heads;
      config.layers_to_run = layers;
      config.image_size = kTinySide;
      config.patch_size = patch;
      config.layer_norm_eps = static_cast<float>(eps);
      config.output_size = out;
      config.preprocess.width = config.preprocess.height = kTinySide;
      return config;
    };
    if (!class_tokens) return LoadSiglipEncoder(weights, fill(TowerConfig()));
    ClipConfig config = fill(ClipConfig());
    config.pool_stride = 2;
    return LoadClipEncoder(weights, config);
  }

  Rows Project(const Rows& x, const std::string& tensor) const {
    const ConstTensorView w = Weight(tensor + ".weight");
    const bool biased = files().tensors().contains(tensor + ".bias");
    Rows y(x.size(), std::vector<double>(w.dim(0)));
    for (size_t i = 0; i < x.size(); ++i) {
      for (int64_t n = 0; n < w.dim(0); ++n) {
        if (biased) y[i][n] = At(Weight(tensor + ".bias"), 0, n);
        for (size_t d = 0; d < x[i].size(); ++d) y[i][n] += x[i][d] * At(w, n, d);
      }
    }
    return y;
  }
  Rows Norm(const Rows& x, const std::string& tensor) const {
    const ConstTensorView w = Weight(tensor + ".weight"), b = Weight(tensor + ".bias");
    Rows y = x;
    for (auto& row : y) {
      double mean = 0, variance = 0;
      for (double v : row) mean += v / width;
      for (double v : row) variance += (v - mean) * (v - mean) / width;
      for (int d = 0; d < width; ++d) {
        row[d] = (row[d] - mean) / std::sqrt(variance + eps) * At(w, 0, d) + At(b, 0, d);
      }
    }
    return y;
  }
  // What the first layer gets.
  Rows Embed(const Tensor& pixels, int frame) const {
    const std::string prefix = "vision_tower.embeddings.";
    const ConstTensorView w = Weight(prefix + "patch_embedding.weight");
    const ConstTensorView p = Weight(prefix + "position_embedding.weight");
    const int values = 3 * patch * patch;
    const ConstTensorView flat(w.raw(), w.dtype(), {width, values}, values);
    Rows h(rows(), std::vector<double>(width));
    for (int row = 0; row < rows(); ++row) {
      const int t = row - class_tokens;
      for (int e = 0; e < width; ++e) {
        double sum = At(p, row, e);
        if (!class_tokens) sum += At(Weight(prefix + "patch_embedding.bias"), 0, e);
        if (t < 0) sum += At(Weight(prefix + "class_embedding"), 0, e);
        for (int i = 0; t >= 0 && i < values; ++i) {
          const int c = i / (patch * patch), y = i / patch % patch, x = i % patch;
          const int64_t line = (int64_t{frame} * 3 + c) * kTinySide + t / grid * patch + y;
          sum += At(flat, e, i) * pixels.data<float>()[line * kTinySide + t % grid * patch + x];
        }
        h[row][e] = sum;
      }
    }
    return class_tokens ? Norm(h, "vision_tower.pre_layrnorm") : h;
  }
  // Probabilities of every head, [heads][keys], of one query; bias: of each key.
  Rows Attention(const std::vector<double>& q, const Rows& k,
                 const std::vector<double>& bias) const {
    const int head = width / heads;
    Rows p(heads, std::vector<double>(k.size()));
    for (int h = 0; h < heads; ++h) {
      double sum = 0;
      for (size_t t = 0; t < k.size(); ++t) {
        double dot = 0;
        for (int d = h * head; d < (h + 1) * head; ++d) dot += q[d] * k[t][d];
        sum += p[h][t] = std::exp(dot / std::sqrt(double(head)) + bias[t]);
      }
      for (double& x : p[h]) x /= sum;
    }
    return p;
  }
  std::vector<double> Mix(const Rows& p, const Rows& v) const {
    const int head = width / heads;
    std::vector<double> out_row(width);
    for (int d = 0; d < width; ++d) {
      for (size_t t = 0; t < v.size(); ++t) out_row[d] += p[d / head][t] * v[t][d];
    }
    return out_row;
  }
  Rows Mlp(const Rows& h, int layer) const {
    const std::string prefix = LayerName(layer);
    Rows x = Project(Norm(h, prefix + "layer_norm2"), prefix + "mlp.fc1");
    for (auto& row : x) {
      for (double& v : row) {
        v = class_tokens
                ? v / (1 + std::exp(-1.702 * v))
                : 0.5 * v * (1 + std::tanh(std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
      }
    }
    return Project(x, prefix + "mlp.fc2");
  }
  // Projector and pooling, [kTinyTokens, out].
  Tensor Tokens(const Rows& h) const {
    const Rows grid_rows(h.begin() + class_tokens, h.end());
    if (class_tokens) return ToTensor(Connect(ToRows(Pool(ToTensor(grid_rows)))));
    return Pool(ToTensor(Connect(grid_rows)));
  }
  static std::string LayerName(int layer) {
    return "vision_tower.encoder.layers." + std::to_string(layer) + ".";
  }

 private:
  static std::filesystem::path GoldenDirectory(const std::string& name) {
    return std::filesystem::path(SLUICE_SOURCE_DIR) / "tests/golden" / name;
  }
  ConstTensorView Weight(const std::string& tensor) const {
    return files().tensors().at(tensor).view;
  }
  Rows Connect(const Rows& x) const {
    Rows middle = Project(x, "multi_modal_projector.linear_1");
    for (auto& row : middle) {
      for (double& v : row) v = 0.5 * v * std::erfc(-v / std::sqrt(2.0));
    }
    return Project(middle, "multi_modal_projector.linear_2");
  }
  static Tensor ToTensor(const Rows& x) {
    const auto columns = static_cast<int64_t>(x[0].size());
    Tensor y(DType::kF32, {static_cast<int64_t>(x.size()), columns});
    for (size_t i = 0; i < x.size(); ++i) {
      for (int64_t d = 0; d < columns; ++d) {
        y.data<float>()[i * columns + d] = static_cast<float>(x[i][d]);
      }
    }
    return y;
  }
  static Rows ToRows(const Tensor& x) {
    Rows y(x.dim(0), std::vector<double>(x.dim(1)));
    for (int64_t i = 0; i < x.dim(0); ++i) {
      for (int64_t d = 0; d < x.dim(1); ++d) y[i][d] = At(x, i, d);
    }
    return y;
  }
  Tensor Pool(const Tensor& x) const {
    ExecContext ctx({});
    Tensor pooled(DType::kF32, {kTinyTokens, x.dim(1)});
    if (class_tokens) {
      AveragePool(ctx, x, grid, grid, 2, pooled);
    } else {
      BilinearPool(grid, grid, 3, 3).Run(ctx, x, pooled);
    }
    return pooled;
  }
};

inline const TinyTower kTinySiglip = {"siglip", 0, 14, 5, 72, 3, 112, 3, 64, 1e-6};
inline const TinyTower kTinyClip = {"clip", 1, 12, 6, 48, 3, 80, 2, 48, 1e-5};

// Noise in [-1, 1).
inline Tensor RandomPixels(int64_t frames, uint32_t seed, int side = kTinySide) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  Tensor pixels(DType::kF32, {frames, 3, side, side});
  for (int64_t i = 0; i < pixels.shape().NumElements(); ++i) {
    pixels.data<float>()[i] = uniform(random);
  }
  return pixels;
}

// Half a second apart, from number 10 on; without pixels.
inline std::vector<FramePtr> NumberedFrames(int count) {
  std::vector<FramePtr> frames;
  for (int i = 0; i < count; ++i) {
    auto frame = std::make_shared<Frame>();
    frame->index = 10 + i;
    frame->time = MediaTime::FromSeconds(0.5 * i);
    frames.push_back(frame);
  }
  return frames;
}

// |got - want| / |want| of two contiguous f32 views.
inline double RelativeDifference(ConstTensorView got, ConstTensorView want) {
  double error = 0, norm = 0;
  for (int64_t i = 0; i < want.shape().NumElements(); ++i) {
    error += std::pow(double{got.data<float>()[i]} - want.data<float>()[i], 2);
    norm += std::pow(double{want.data<float>()[i]}, 2);
  }
  return std::sqrt(error / norm);
}

}  // namespace sluice::testing

#endif  // SLUICE_TESTS_SUPPORT_TINY_TOWERS_H_
