// sluice calibrate: which layers of a model bear quantised attention, measured on its own inputs.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "demos/cli/commands.h"
#include "demos/cli/common.h"
#include "demos/cli/evaluation.h"
#include "demos/world/questions.h"
#include "llm/attention_calibration.h"
#include "runtime/error.h"
#include "runtime/ops/attention.h"
#include "runtime/transfer.h"
#include "streaming/source.h"
#include "vision/preprocess.h"

namespace sluice::cli {
namespace {

struct CalibrateFlags {
  ModelFlags model;
  ClipSet clips{.clips = AttentionCalibration::kFewestClips};
  std::string source;  // empty: clips of the demo world
  double fps = 2.0;
  std::string out;
  bool json = false;
};

// Quantised against exact outputs of one layer.
class LayerComparison {
 public:
  void Add(ConstTensorView sage, ConstTensorView exact) {
    const Tensor a = ConvertTo(sage, DType::kF32), b = ConvertTo(exact, DType::kF32);
    for (int64_t i = 0; i < a.shape().NumElements(); ++i) {
      const double x = a.data<float>()[i], y = b.data<float>()[i];
      dot_ += x * y;
      sage2_ += x * x;
      exact2_ += y * y;
      error_ += std::abs(x - y);
      size_ += std::abs(y);
    }
  }
  void EndClip() {
    constexpr double kNothing = 1e-30;  // outputs that are all zero are alike
    cosines_ += (dot_ + kNothing) / (std::sqrt(sage2_ * exact2_) + kNothing);
    errors_ += error_ / (size_ + kNothing);
    ++clips_;
    dot_ = sage2_ = exact2_ = error_ = size_ = 0;
  }
  CalibratedLayer Mean() const { return {cosines_ / clips_, errors_ / clips_}; }

 private:
  double dot_ = 0, sage2_ = 0, exact2_ = 0, error_ = 0, size_ = 0;  // of the clip that is played
  double cosines_ = 0, errors_ = 0;
  int clips_ = 0;
};

// Runs a model, exact in all layers, over clips and attends once more, in both ways, over what
// every layer's attention was given.
class Calibrator {
 public:
  explicit Calibrator(const Engine& engine)
      : engine_(engine),
        vlm_(*engine.vlm()),
        ctx_(engine.NewContext()),
        tower_(vlm_.info().attention.tower.size()),
        decoder_(vlm_.info().attention.decoder.size()) {}

  void Play(std::span<const FramePtr> frames, const std::string& question) {
    SessionOptions options;
    const auto session = engine_.NewSession(options);
    const auto batch = static_cast<size_t>(options.frames_per_batch);
    Read(session->cache, Embed(session->prefix_ids));
    for (size_t i = 0; i < frames.size(); i += batch) {
      const VisualTokens tokens = Encode(frames.subspan(i, std::min(batch, frames.size() - i)));
      Read(session->cache, tokens.features);
    }
    Read(session->cache, Embed(vlm_.prompt_format().EncodeQuestion(vlm_.tokenizer(), question,
                                                                   /*follow_up=*/false)));
    for (std::vector<LayerComparison>* part : {&tower_, &decoder_}) {
      for (LayerComparison& layer : *part) layer.EndClip();
    }
    ++clips_;
  }

  AttentionCalibration Result() const {
    const VlmInfo& info = vlm_.info();
    AttentionCalibration result{.model = info.name,
                                .fingerprint = info.fingerprint,
                                .device = info.device,
                                .clips = clips_,
                                .tower = {},
                                .decoder = {}};
    for (const LayerComparison& layer : tower_) result.tower.push_back(layer.Mean());
    for (const LayerComparison& layer : decoder_) result.decoder.push_back(layer.Mean());
    return result;
  }

 private:
  // "layer.3.query" is of layer 3, and ".query" what is shown; of "layer.3" nothing more. Other
  // names are of no layer.
  static std::optional<std::pair<size_t, std::string>> Parse(std::string_view name) {
    constexpr std::string_view kLayer = "layer.";
    if (!name.starts_with(kLayer)) return std::nullopt;
    size_t end = kLayer.size(), layer = 0;
    for (; end < name.size() && name[end] >= '0' && name[end] <= '9'; ++end) {
      layer = 10 * layer + static_cast<size_t>(name[end] - '0');
    }
    return std::pair(layer, std::string(name.substr(end)));
  }

  Tensor Embed(std::span<const int32_t> ids) {
    Tensor rows(DType::kF32, {static_cast<int64_t>(ids.size()), vlm_.decoder().hidden_size()},
                ctx_->device());
    if (!ids.empty()) vlm_.decoder().Embed(*ctx_, ids, rows);
    return rows;
  }

  VisualTokens Encode(std::span<const FramePtr> frames) {
    const VisionEncoder& encoder = vlm_.encoder();
    const PreprocessConfig& config = encoder.preprocess_config();
    const auto count = static_cast<int64_t>(frames.size());
    const Tensor pixels(DType::kF32, {count, 3, config.height, config.width}, ctx_->device());
    Preprocess(*ctx_, frames, config, pixels);
    Tensor q, k;
    const TensorProbe probe = [&](std::string_view name, ConstTensorView value) {
      const auto place = Parse(name);
      if (!place) return;
      if (place->second == ".query") q = TransferTo(*ctx_, value, ctx_->device());
      if (place->second == ".key") k = TransferTo(*ctx_, value, ctx_->device());
      if (place->second != ".value") return;
      const Tensor v = TransferTo(*ctx_, value, ctx_->device());
      const int head_dim = encoder.head_dim(), heads = static_cast<int>(q.dim(1)) / head_dim;
      Compare(q, tower_.at(place->first), [&](TensorView out, AttentionPrecision precision) {
        EncoderAttention(*ctx_, q, k, v, count, heads, head_dim, ScaleOf(head_dim), out, {},
                         precision);
      });
    };
    return encoder.Encode(*ctx_, pixels, frames, {.probe = probe});
  }

  void Read(KvCache& cache, ConstTensorView rows) {
    if (rows.dim(0) == 0) return;
    const KvGeometry kv = vlm_.decoder().kv_geometry();
    Tensor q;
    const DecoderProbe probe = [&](std::string_view name, ConstTensorView value) {
      const auto place = Parse(name);
      if (!place) return;
      if (place->second == ".query") q = TransferTo(*ctx_, value, ctx_->device());
      if (!place->second.empty()) return;
      // Now the layer's cache holds the keys and values of these rows as well.
      const auto layer = static_cast<int>(place->first);
      const int64_t begin = cache.rows(layer) - q.dim(0);
      Compare(q, decoder_.at(place->first), [&](TensorView out, AttentionPrecision precision) {
        CausalAttention(*ctx_, q, begin, vlm_.decoder().num_heads(), ScaleOf(kv.head_dim),
                        cache.layer(layer), out, precision);
      });
    };
    SequenceStep step{&cache, rows, {}};
    vlm_.decoder().Step(*ctx_, {&step, 1}, probe);
  }

  static float ScaleOf(int head_dim) { return 1.0f / std::sqrt(static_cast<float>(head_dim)); }

  // attend(out, precision): out as q.
  template <typename Attend>
  void Compare(const Tensor& q, LayerComparison& layer, const Attend& attend) {
    const Tensor sage(q.dtype(), q.shape(), q.device()), exact(q.dtype(), q.shape(), q.device());
    attend(sage, AttentionPrecision::kSageAlways);
    attend(exact, AttentionPrecision::kExact);
    layer.Add(TransferTo(*ctx_, sage, Device::kCpu), TransferTo(*ctx_, exact, Device::kCpu));
  }

  const Engine& engine_;
  const Vlm& vlm_;
  std::unique_ptr<ExecContext> ctx_;
  std::vector<LayerComparison> tower_, decoder_;
  int clips_ = 0;
};

// Throws InputError where attention would run exact whatever is asked for.
void CheckThatThereIsAKernel(const Vlm& vlm) {
  if (vlm.info().device == Device::kCpu) return;
  const KvGeometry kv = vlm.decoder().kv_geometry();
  const auto check = [&](const char* part, int heads, int kv_heads, int head_dim, bool causal) {
    constexpr int64_t kMany = 1024;
    if (ChooseGpuAttention(cuda::ComputeCapability(), kMany, heads, kv_heads, head_dim,
                           vlm.info().compute_type, causal, /*biased=*/false,
                           AttentionPrecision::kSageAlways) == GpuAttention::kSage) {
      return;
    }
    throw InputError(std::string("[calibrate] this GPU has no quantised attention for the ") +
                     part + "'s heads of " + std::to_string(head_dim) + " in " +
                     Name(vlm.info().compute_type) +
                     ": it needs a Hopper GPU, bf16 and heads of 64, 72, 80 or 128; expected those "
                     "or --device cpu");
  };
  check("tower", 1, 1, vlm.encoder().head_dim(), /*causal=*/false);
  check("decoder", vlm.decoder().num_heads(), kv.kv_heads, kv.head_dim, /*causal=*/true);
}

// A source cut into clips.
void PlaySource(const CalibrateFlags& flags, Calibrator& calibrator) {
  SourceOptions options;
  options.rate.fps = flags.fps;
  const auto source = Source::Open(flags.source, options);
  const int length = flags.clips.frames > 0 ? flags.clips.frames : kClipLengths[0];
  Progress progress;
  for (int clip = 0; clip < flags.clips.clips; ++clip) {
    std::vector<FramePtr> frames;
    while (static_cast<int>(frames.size()) < length) {
      FramePtr frame = source->Next();
      if (!frame) {
        throw InputError("[calibrate] " + flags.source + " must have " +
                         std::to_string(flags.clips.clips) + " clips of " + std::to_string(length) +
                         " frames, got " + std::to_string(clip) +
                         "; use a longer one, more --fps or fewer --frames");
      }
      frames.push_back(std::move(frame));
    }
    calibrator.Play(frames, "What happens here?");
    progress.Show((clip + 1.0) / flags.clips.clips, std::to_string(clip + 1) + " clips");
  }
}

void PlayWorld(const CalibrateFlags& flags, Calibrator& calibrator) {
  PlayClips(flags.clips, [&](const PlayedClip& played) {
    const world::Scene& scene = played.clip.scene;
    const auto questions = world::AskAll(scene, scene.frames - 1, played.clip.question_seed, 1);
    calibrator.Play(played.frames, questions.empty() ? "What is visible?" : questions[0].text);
    return std::string("played");
  });
}

void PrintTable(const AttentionCalibration& calibration, const std::string& file) {
  Table table({"layer", "cosine", "relative L1", "attention"});
  const auto add = [&](const std::string& part, const std::vector<CalibratedLayer>& layers) {
    for (size_t i = 0; i < layers.size(); ++i) {
      table.Add({part + " " + std::to_string(i), Number(layers[i].cosine, 5),
                 Number(layers[i].relative_l1, 4), Name(layers[i].precision())});
    }
  };
  add("tower", calibration.tower);
  add("decoder", calibration.decoder);
  std::printf(
      "%d clips on the %s; a layer is quantised (sage) with a cosine of at least %g and a "
      "relative L1 of at most %g\n\n%s\nwritten to %s\n",
      calibration.clips, Name(calibration.device), CalibratedLayer::kLeastCosine,
      CalibratedLayer::kMostL1, table.ToString().c_str(), file.c_str());
}

void Calibrate(const CalibrateFlags& flags) {
  if (flags.model.attention != Name(AttentionPrecision::kExact)) {
    throw InputError("[calibrate] compares with exact attention; expected no --attention, got " +
                     flags.model.attention);
  }
  const Engine engine = OpenEngine(flags.model);
  CheckThatThereIsAKernel(*engine.vlm());
  Calibrator calibrator(engine);
  flags.source.empty() ? PlayWorld(flags, calibrator) : PlaySource(flags, calibrator);
  const AttentionCalibration calibration = calibrator.Result();
  WriteCalibration(calibration, flags.out);
  if (flags.json) {
    Json report = Json::parse(ToJson(calibration));
    report["file"] = flags.out;
    PrintJson(report);
  } else {
    PrintTable(calibration, flags.out);
  }
}

}  // namespace

void AddCalibrate(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "calibrate", "Measure which layers of a model bear quantised attention, for --attention");
  auto flags = std::make_shared<CalibrateFlags>();
  AddModelFlags(*command, flags->model);
  command->add_option("--clips", flags->clips.clips, "How many")
      ->capture_default_str()
      ->check(CLI::Range(AttentionCalibration::kFewestClips, 1000000));
  command
      ->add_option("--frames", flags->clips.frames,
                   "Frames of a clip (default: 8, 12, 16, 24, 32 in turn; of a source 8)")
      ->check(CLI::Range(world::kMinFrames, world::kMaxFrames));
  auto* source = command->add_option(
      "--source", flags->source,
      "Clips of this source (as of sluice ask), one after another, instead of the demo world's");
  command->add_option("--fps", flags->fps, "Frames of it to look at per second")
      ->capture_default_str()
      ->check(CLI::Range(0.001, 1000.0))
      ->needs(source);
  command->add_option("--out", flags->out, "Where the calibration goes")->required();
  command->add_flag("--json", flags->json, "Print one JSON object: what is written, and where to");
  command->callback([flags] { Calibrate(*flags); });
}

}  // namespace sluice::cli
