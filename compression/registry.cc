#include "compression/registry.h"

#include <charconv>
#include <cmath>

#include "compression/stc_pruner.h"
#include "compression/turbo_merge.h"
#include "compression/uniform_frames.h"
#include "runtime/error.h"

namespace sluice {
namespace {

constexpr CompressorEntry kTokenCompressors[] = {
    {"stc-pruner", "keeps the most novel tokens of each frame",
     "share or number of a frame's tokens", StcPruner::Options().keep,
     [](double keep) -> std::unique_ptr<TokenCompressor> {
       return std::make_unique<StcPruner>(StcPruner::Options{.keep = keep});
     }},
    {"stc-pruner-paper", "stc-pruner with the paper's score instead of the released one",
     "share or number of a frame's tokens", StcPruner::Options().keep,
     [](double keep) -> std::unique_ptr<TokenCompressor> {
       return std::make_unique<StcPruner>(
           StcPruner::Options{.keep = keep, .score = StcPruner::Score::kDualAnchor});
     }},
    {"stc-pruner-compat", "stc-pruner with the history exactly as released",
     "share or number of a frame's tokens", StcPruner::Options().keep,
     [](double keep) -> std::unique_ptr<TokenCompressor> {
       return std::make_unique<StcPruner>(
           StcPruner::Options{.keep = keep, .history = StcPruner::History::kCompat});
     }},
    {"stc-pruner-join", "stc-pruner that averages what goes into what stays",
     "share or number of a frame's tokens", StcPruner::Options().keep,
     [](double keep) -> std::unique_ptr<TokenCompressor> {
       return std::make_unique<StcPruner>(StcPruner::Options{.keep = keep, .join_from = -1});
     }},
    {"turbo-merge", "merges similar tokens of a frame, sparing novel ones",
     "share or number of a frame's tokens", TurboMerge::Options().keep,
     [](double keep) -> std::unique_ptr<TokenCompressor> {
       return std::make_unique<TurboMerge>(TurboMerge::Options{.keep = keep});
     }},
    {"tome-merge", "merges similar tokens of a frame", "share or number of a frame's tokens",
     TurboMerge::Options().keep,
     [](double keep) -> std::unique_ptr<TokenCompressor> {
       return std::make_unique<TurboMerge>(TurboMerge::Options{.keep = keep, .lambda = 0});
     }},
    {"uniform-frames", "keeps the tokens of one frame of so many", "frames", 2.0,
     [](double every) -> std::unique_ptr<TokenCompressor> {
       return std::make_unique<UniformFrames>(every);
     }},
};

}  // namespace

std::span<const CompressorEntry> TokenCompressors() { return kTokenCompressors; }

std::unique_ptr<TokenCompressor> MakeTokenCompressor(std::string_view spec) {
  const size_t equals = spec.find('=');
  const std::string_view name = spec.substr(0, equals);
  std::string known;
  for (const CompressorEntry& entry : TokenCompressors()) {
    known += (known.empty() ? "" : ", ") + std::string(entry.name);
    if (entry.name != name) continue;
    double parameter = entry.default_value;
    if (equals != std::string_view::npos) {
      const std::string_view number = spec.substr(equals + 1);
      const auto [end, error] =
          std::from_chars(number.data(), number.data() + number.size(), parameter);
      if (error != std::errc() || end != number.data() + number.size() ||
          !std::isfinite(parameter)) {
        throw InputError("[compression] " + std::string(name) + "=NUMBER expected (" +
                         std::string(entry.parameter) + "), got '" + std::string(spec) + "'");
      }
    }
    return entry.make(parameter);
  }
  throw InputError("[compression] no token compressor '" + std::string(name) + "'; there are " +
                   known);
}

}  // namespace sluice
