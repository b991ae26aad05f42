#include "demos/cli/methods.h"

#include <algorithm>

#include "compression/registry.h"

namespace sluice::cli {

void AddMethodFlags(CLI::App& command, MethodFlags& flags) {
  constexpr char kGroup[] = "Methods";
  command
      .add_option(
          "--preset", flags.preset,
          "exact: none; stc: cacher and pruner at the published settings, what is pruned joining "
          "what stays; fast: fewer frames computed whole, a third of the tokens by merging")
      ->capture_default_str()
      ->check(CLI::IsMember({"exact", "stc", "fast"}))
      ->group(kGroup);
  command.add_flag("--cacher", flags.cacher, "Reuse patch features of earlier frames (STC-Cacher)")
      ->group(kGroup);
  StcCacherOptions& cacher = flags.cacher_options;
  const auto cacher_option = [&](const char* name, auto& value, const char* help) {
    command.add_option(name, value, help)->capture_default_str()->group(kGroup);
  };
  cacher_option("--cacher-interval", cacher.interval, "One frame of so many is computed whole");
  cacher_option("--cacher-ratio", cacher.ratio, "Share of patches of the others computed afresh");
  cacher_option("--cacher-refresh", cacher.refresh_below,
                "Cosine of keys below which a patch counts as changed; if more than the ratio "
                "changed, the frame is computed whole; -1: never");
  command
      .add_flag("--cacher-shared", cacher.shared_selection,
                "The first layer chooses the patches for all layers")
      ->group(kGroup);
  std::string known;
  for (const CompressorEntry& entry : TokenCompressors()) {
    known += (known.empty() ? "" : "; ") + std::string(entry.name) + ": " +
             std::string(entry.summary) + " (" + std::string(entry.parameter) + ", default " +
             Number(entry.default_value, 2) + ")";
  }
  command
      .add_option("--compress", flags.compressors,
                  "Select visual tokens with NAME or NAME=NUMBER, in the order given; " + known)
      ->group(kGroup);
}

void ApplyMethods(const MethodFlags& flags, SessionOptions& options) {
  if (flags.preset != "exact") {
    options.cacher = StcCacherOptions{.shared_selection = true};
    options.compressors = {flags.preset == "stc" ? "stc-pruner-join" : "turbo-merge=0.34"};
    if (flags.preset == "fast") options.cacher->interval = 4;
  }
  if (flags.cacher) options.cacher = flags.cacher_options;
  if (!flags.compressors.empty()) options.compressors = flags.compressors;
}

void MethodCounts::Add(const Session& session) {
  if (!session.reuse) return;
  const StcCacher::Counts& counts = session.reuse->counts();
  cacher.frames += counts.frames;
  cacher.whole += counts.whole;
  cacher.refreshes += counts.refreshes;
  cacher.patches += counts.patches;
  cacher.fresh += counts.fresh;
  cacher_bytes = std::max(cacher_bytes, session.reuse->SizeBytes());
}

Json ToJson(const SessionOptions& options, const MethodCounts& counts) {
  Json json;
  if (options.cacher) {
    const StcCacher::Counts& c = counts.cacher;
    json["stc_cacher"] = {{"interval", options.cacher->interval},
                          {"ratio", options.cacher->ratio},
                          {"shared_selection", options.cacher->shared_selection},
                          {"refresh_below", options.cacher->refresh_below},
                          {"frames", c.frames},
                          {"whole_frames", c.whole},
                          {"refreshes", c.refreshes},
                          {"bytes_per_session", counts.cacher_bytes}};
  }
  if (!options.compressors.empty()) json["compressors"] = options.compressors;
  return json;
}

}  // namespace sluice::cli
