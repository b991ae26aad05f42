#include "demos/cli/footage.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "demos/cli/methods.h"
#include "runtime/error.h"
#include "streaming/source.h"
#include "vision/preprocess.h"

namespace sluice::cli {
namespace {

// Of the rows of two [N, E] f32 matrices.
struct Likeness {
  double mean = 0, lowest = 1;  // cosines
  Likeness(ConstTensorView a, ConstTensorView b) {
    const int64_t rows = a.dim(0), width = a.dim(1);
    for (int64_t i = 0; i < rows; ++i) {
      const float *x = a.data<float>() + i * width, *y = b.data<float>() + i * width;
      double xy = 0, xx = 0, yy = 0;
      for (int64_t d = 0; d < width; ++d) {
        xy += double{x[d]} * y[d];
        xx += double{x[d]} * x[d];
        yy += double{y[d]} * y[d];
      }
      const double cosine = xy / std::max(std::sqrt(xx * yy), 1e-30);
      mean += cosine / static_cast<double>(rows);
      lowest = std::min(lowest, cosine);
    }
  }
};

double MeanDifference(const Tensor& a, const Tensor& b) {
  double sum = 0;
  const int64_t count = a.shape().NumElements();
  for (int64_t i = 0; i < count; ++i) sum += std::abs(a.data<float>()[i] - b.data<float>()[i]);
  return sum / static_cast<double>(count);
}

double Median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

// Mean and lowest of what reused frames have in common with themselves computed whole.
Json Summary(const Json& frames, bool after_refresh) {
  double sum = 0, lowest = 1, lowest_token = 1;
  int64_t count = 0;
  bool follows = false;
  for (const Json& frame : frames) {
    const std::string how = frame["how"];
    if (how != "reused") {
      follows = how == "refreshed";
    } else if (follows == after_refresh) {
      ++count;
      sum += frame["cosine"].get<double>();
      lowest = std::min(lowest, frame["cosine"].get<double>());
      lowest_token = std::min(lowest_token, frame["lowest_token_cosine"].get<double>());
    }
  }
  if (count == 0) return {{"frames", 0}};
  return {{"frames", count},
          {"mean_cosine", sum / static_cast<double>(count)},
          {"lowest_cosine", lowest},
          {"lowest_token_cosine", lowest_token}};
}

std::vector<std::string> Row(const Json& frame) {
  return {Number(frame["time"], 2),        frame["how"],
          Percent(frame["fresh_patches"]), Number(frame["pixel_change"], 3),
          Number(frame["cosine"], 4),      Number(frame["lowest_token_cosine"], 4)};
}

Table FrameTable() {
  return Table({"second", "how", "fresh %", "pixel change", "mean cosine", "lowest token"});
}

}  // namespace

Json CompareFootage(const Engine& engine, const SessionOptions& options, const FootageFlags& flags,
                    Json head) {
  if (!options.cacher) {
    throw InputError(
        "[eval] --footage compares reused features with those computed whole; expected --cacher or "
        "a preset that turns it on");
  }
  const VisionEncoder& encoder = engine.vlm()->encoder();
  const auto session = engine.NewSession(options);
  const auto context = engine.NewContext();
  StcCacher& cacher = *session->reuse;
  SourceOptions source_options;
  source_options.rate.fps = flags.fps;
  const auto source = Source::Open(flags.source, source_options);

  const PreprocessConfig& config = encoder.preprocess_config();
  Tensor pixels(DType::kF32, {1, 3, config.height, config.width}), earlier;
  Json frames = Json::array(), refreshes = Json::array();
  std::vector<double> dense_ms, reused_ms;
  double dense_sum = 0, cached_sum = 0;
  Progress progress;
  while (const FramePtr frame = source->Next()) {
    Preprocess(*context, {&frame, 1}, config, pixels);
    const auto encode = [&](FeatureReuse* reuse, double& ms) {
      const auto begin = std::chrono::steady_clock::now();
      VisualTokens tokens = encoder.Encode(*context, pixels, {&frame, 1}, {.reuse = reuse});
      ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin)
               .count();
      return tokens;
    };
    double whole_ms = 0, cached_ms = 0;
    const StcCacher::Counts before = cacher.counts();
    const VisualTokens dense = encode(nullptr, whole_ms), cached = encode(&cacher, cached_ms);
    const StcCacher::Counts& after = cacher.counts();
    dense_ms.push_back(whole_ms);
    dense_sum += whole_ms;
    cached_sum += cached_ms;

    const bool whole = after.whole > before.whole, refreshed = after.refreshes > before.refreshes;
    if (!whole) reused_ms.push_back(cached_ms);
    if (refreshed) refreshes.push_back(frame->time.seconds());
    const Likeness likeness(cached.features, dense.features);
    frames.push_back(
        {{"time", frame->time.seconds()},
         {"how", refreshed ? "refreshed"
                 : whole   ? "whole"
                           : "reused"},
         {"fresh_patches", whole ? 1.0
                                 : static_cast<double>(after.fresh - before.fresh) /
                                       static_cast<double>(after.patches - before.patches)},
         {"pixel_change", earlier.empty() ? 0.0 : MeanDifference(pixels, earlier)},
         {"cosine", likeness.mean},
         {"lowest_token_cosine", likeness.lowest}});
    earlier = pixels.Clone();
    progress.Show(-1, frame->time.ToString());
  }
  progress.Clear();
  if (frames.empty()) throw InputError("[eval] " + flags.source + " has no frame");

  double fresh = 0;
  for (const Json& frame : frames) fresh += frame["fresh_patches"].get<double>();
  const auto count = static_cast<double>(frames.size());
  MethodCounts counts;
  counts.Add(*session);
  Json report = std::move(head);
  report["footage"] = {{"source", flags.source}, {"fps", flags.fps}, {"frames", frames.size()}};
  report["methods"] = {{"stc_cacher", ToJson(options, counts)["stc_cacher"]}};
  report["fresh_patches"] = fresh / count;
  report["ms_per_frame"] = {{"dense", dense_sum / count},
                            {"cached", cached_sum / count},
                            {"median_dense", Median(dense_ms)},
                            {"median_reused", Median(reused_ms)}};
  report["refreshes_at"] = refreshes;
  report["after_refreshes"] = Summary(frames, true);
  report["other_reused"] = Summary(frames, false);
  report["frames"] = std::move(frames);
  return report;
}

void PrintFootage(const Json& report) {
  const Json &cacher = report["methods"]["stc_cacher"], &ms = report["ms_per_frame"];
  std::printf(
      "%s: %d frames, %d computed whole, %d of them out of turn; %s %% of patches afresh\n"
      "a frame: dense %.2f ms, cached %.2f ms; median dense %.2f ms, reused %.2f ms\n\n",
      report["footage"]["source"].get<std::string>().c_str(), cacher["frames"].get<int>(),
      cacher["whole_frames"].get<int>(), cacher["refreshes"].get<int>(),
      Percent(report["fresh_patches"]).c_str(), ms["dense"].get<double>(),
      ms["cached"].get<double>(), ms["median_dense"].get<double>(),
      ms["median_reused"].get<double>());
  Table means({"reused frames", "how many", "mean cosine", "lowest frame", "lowest token"});
  for (const char* which : {"other_reused", "after_refreshes"}) {
    const Json& one = report[which];
    if (one["frames"] == 0) continue;
    means.Add({which == std::string("other_reused") ? "as scheduled" : "after one out of turn",
               std::to_string(one["frames"].get<int>()), Number(one["mean_cosine"], 4),
               Number(one["lowest_cosine"], 4), Number(one["lowest_token_cosine"], 4)});
  }
  std::printf("%s\n", means.ToString().c_str());

  Table turns = FrameTable();
  bool follows = false;
  for (const Json& frame : report["frames"]) {
    if (frame["how"] != "reused") follows = frame["how"] == "refreshed";
    if (follows) turns.Add(Row(frame));
  }
  if (cacher["refreshes"] != 0) {
    std::printf("frames out of turn and those that refer to them\n%s\n", turns.ToString().c_str());
  }
  std::vector<Json> least(report["frames"].begin(), report["frames"].end());
  std::stable_sort(least.begin(), least.end(),
                   [](const Json& a, const Json& b) { return a["cosine"] < b["cosine"]; });
  least.resize(std::min<size_t>(least.size(), 8));
  Table lowest = FrameTable();
  for (const Json& frame : least) lowest.Add(Row(frame));
  std::printf("least alike\n%s", lowest.ToString().c_str());
}

}  // namespace sluice::cli
