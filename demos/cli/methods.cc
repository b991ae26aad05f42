#include "demos/cli/methods.h"

#include <CLI/CLI.hpp>
#include <algorithm>

#include "compression/registry.h"
#include "runtime/error.h"
#include "streaming/defaults.h"

namespace sluice::cli {

void AddMethodFlags(CLI::App& command, MethodFlags& flags) {
  command
      .add_option("--preset", flags.preset,
                  "exact: none; stc: cacher and pruner at the published settings; fast: fewer "
                  "frames computed whole, a third of the tokens by merging")
      ->capture_default_str()
      ->check(CLI::IsMember({"exact", "stc", "fast"}))
      ->group(kMethodGroup);
  auto* reuse =
      command
          .add_flag("--cacher", flags.cacher, "Reuse patch features of earlier frames (STC-Cacher)")
          ->group(kMethodGroup);
  StcCacherOptions& cacher = flags.cacher_options;
  const auto cacher_option = [&](const char* name, auto& value, const char* help) {
    command.add_option(name, value, help)->capture_default_str()->needs(reuse)->group(kMethodGroup);
  };
  cacher_option("--cacher-interval", cacher.interval, "One frame of so many is computed whole");
  cacher_option("--cacher-ratio", cacher.ratio, "Share of patches of the others computed afresh");
  cacher_option("--cacher-refresh", cacher.refresh_below,
                "Cosine of keys, less their mean, below which a patch counts as changed; if more "
                "than the ratio changed, the frame is computed whole; -1: never");
  command
      .add_flag("--cacher-shared", cacher.shared_selection,
                "The first layer chooses the patches for all layers")
      ->needs(reuse)
      ->group(kMethodGroup);
  auto* turbo =
      command
          .add_option("--turbo", flags.turbo,
                      "Merge so many similar tokens in each block of the vision tower (Turbo), or "
                      "that share of them if below 1; not with --cacher")
          ->group(kMethodGroup);
  command
      .add_option(
          "--turbo-lambda", flags.turbo_lambda,
          "What sparing tokens that much is attended to is worth beside similarity (default: 0, "
          "nothing)")
      ->needs(turbo)
      ->group(kMethodGroup);
  command
      .add_option(
          "--duplicate-threshold", flags.duplicate_threshold,
          "Pass over frames no part of whose thumbnail differs from the last frame taken by "
          "more than this, in levels of 255; 4 stands above a camera's noise (default: off)")
      ->group(kMethodGroup);
  std::string known;
  for (const CompressorEntry& entry : TokenCompressors()) {
    known += (known.empty() ? "" : "; ") + std::string(entry.name) + ": " +
             std::string(entry.summary) + " (" + std::string(entry.parameter) + ", default " +
             Number(entry.default_value, 2) + ")";
  }
  command
      .add_option("--compress", flags.compressors,
                  "Select visual tokens with NAME or NAME=NUMBER, in the order given; " + known)
      ->group(kMethodGroup);

  auto* drop =
      command
          .add_option("--pyramid-drop", flags.pyramid_drop,
                      "Let visual tokens leave between decoder layers: question (a question sees "
                      "only what it ranks high), replay (the paper's way, on the last frames), "
                      "query-free or probe (on arrival); MODE=LAMBDA keeps that share at each "
                      "boundary (default: off, lambda 0.5)")
          ->group(kMethodGroup);
  const auto add = [&](const char* name, auto& value, const char* help) {
    return command.add_option(name, value, help)->needs(drop)->group(kMethodGroup);
  };
  add("--pyramid-stages", flags.pyramid_stages, "Groups of decoder layers (default: 4)");
  add("--pyramid-boundaries", flags.pyramid_boundaries,
      "First layers of the later stages, as 2,4,6 (default: an even split; below 16 layers the "
      "second layer and the last two)")
      ->delimiter(',');
  add("--pyramid-quota", flags.pyramid_quota,
      "Choose the best of all frames (global), of each frame, or some of each (hybrid)")
      ->check(CLI::IsMember({"global", "frame", "hybrid"}));
  add("--pyramid-frame-share", flags.pyramid_frame_share,
      "Part of a hybrid quota that each frame is sure of (default: 0.5)");
  add("--pyramid-rank", flags.pyramid_rank,
      "A question ranks by its prompt's last token (last) or by all of its own (mean; default "
      "for replay)")
      ->check(CLI::IsMember({"last", "mean"}));
  add("--pyramid-positions", flags.pyramid_positions,
      "Count positions anew in each stage (compact) or keep them (preserve)")
      ->check(CLI::IsMember({"compact", "preserve"}));
  add("--pyramid-replay-frames", flags.pyramid_replay_frames,
      "Frames that mode replay remembers (default: 64)");
  add("--pyramid-instruction", flags.pyramid_instruction, "What mode probe looks for");

  auto* memory = command
                     .add_flag("--memory", flags.memory,
                               "Streams of any length: the newest tokens stay in a window, earlier "
                               "frames are recalled for each question; not with --pyramid-drop")
                     ->group(kMethodGroup);
  const auto memory_option = [&](const char* name, auto& value, const char* help) {
    return command.add_option(name, value, help)
        ->capture_default_str()
        ->needs(memory)
        ->group(kMethodGroup);
  };
  MemoryOptions& options = flags.memory_options;
  memory_option("--memory-window", options.window_tokens, "Tokens that stay visible, at least");
  memory_option("--memory-recall", options.recall_blocks,
                "Frames that a question calls back in each layer; 0: the window is all it sees");
  memory_option("--memory-chunk", options.recall_chunk, "Neighbouring frames ranked together");
  memory_option("--memory-dialogue", options.dialogue_tokens,
                "Tokens of earlier questions and answers that a question is told");
  const CLI::Range megabytes(int64_t{0}, int64_t{1} << 40);
  memory_option("--memory-host-mb", flags.memory_host_mb, "Host memory for earlier frames, in MiB")
      ->check(megabytes);
  auto* disk = memory_option("--memory-disk-mb", flags.memory_disk_mb,
                             "Disk for those that do not fit there, in MiB")
                   ->check(megabytes);
  auto* directory = memory_option("--memory-disk-dir", flags.memory_disk_directory,
                                  "Where; the file goes away with the program")
                        ->needs(disk);
  disk->needs(directory);
  memory_option("--memory-when-full", flags.memory_when_full,
                "What is forgotten then: the oldest frames, or every second one of the older half "
                "(thin)")
      ->check(CLI::IsMember({"oldest", "thin"}));
  command.add_flag("--memory-int8", options.int8, "Keep earlier frames in 8 bits a number")
      ->needs(memory)
      ->group(kMethodGroup);
}

MethodFlags ParseMethodFlags(const std::string& arguments) {
  CLI::App app;
  app.set_help_flag();
  MethodFlags flags;
  AddMethodFlags(app, flags);
  try {
    app.parse(arguments);
  } catch (const CLI::ParseError& error) {
    throw InputError("[methods] '" + arguments + "': " + error.what());
  }
  return flags;
}

void ApplyMethods(const MethodFlags& flags, SessionOptions& options) {
  ApplyPreset(flags.preset, options);
  options.duplicate_threshold = flags.duplicate_threshold;
  if (flags.cacher) options.cacher = flags.cacher_options;
  if (flags.turbo) options.turbo = TurboOptions{.remove = *flags.turbo};
  if (flags.turbo_lambda) options.turbo->lambda = *flags.turbo_lambda;
  if (!flags.compressors.empty()) options.compressors = flags.compressors;

  if (flags.memory) {
    options.memory = flags.memory_options;
    BlockStoreOptions& store = options.memory->store;
    store.host_bytes = flags.memory_host_mb << 20;
    store.disk_bytes = flags.memory_disk_mb << 20;
    store.disk_directory = flags.memory_disk_directory;
    if (flags.memory_when_full == "thin") store.when_full = WhenFull::kThin;
  }

  if (flags.pyramid_drop.empty()) return;
  PyramidOptions& pyramid = options.pyramid;
  pyramid = ParsePyramid(flags.pyramid_drop);
  if (flags.pyramid_stages) pyramid.stages = *flags.pyramid_stages;
  pyramid.boundaries = flags.pyramid_boundaries;
  if (!pyramid.boundaries.empty() && !flags.pyramid_stages) {
    pyramid.stages = static_cast<int>(pyramid.boundaries.size()) + 1;
  }
  for (const PyramidQuota quota :
       {PyramidQuota::kGlobal, PyramidQuota::kFrame, PyramidQuota::kHybrid}) {
    if (flags.pyramid_quota == Name(quota)) pyramid.quota = quota;
  }
  if (flags.pyramid_frame_share) pyramid.frame_share = *flags.pyramid_frame_share;
  for (const PyramidRank rank : {PyramidRank::kLast, PyramidRank::kMean}) {
    if (flags.pyramid_rank == Name(rank)) pyramid.rank = rank;
  }
  if (!flags.pyramid_positions.empty()) {
    pyramid.positions =
        flags.pyramid_positions == "compact" ? KvPositions::kRows : KvPositions::kTokens;
  }
  if (flags.pyramid_replay_frames) pyramid.replay_frames = *flags.pyramid_replay_frames;
  pyramid.instruction = flags.pyramid_instruction;
}

Json ToJson(const PyramidOptions& options, const PyramidStream& stream) {
  if (stream.mode() == PyramidMode::kOff) return nullptr;
  const PyramidPlan& plan = stream.plan();
  Json json = {{"mode", Name(stream.mode())},
               {"boundaries", plan.boundaries},
               {"shares", plan.shares},
               {"quota", Name(plan.quota)},
               {"positions", stream.positions() == KvPositions::kRows ? "compact" : "preserve"}};
  if (plan.quota == PyramidQuota::kHybrid) json["frame_share"] = plan.frame_share;
  if (stream.ranks_by_question()) json["rank"] = Name(stream.rank());
  if (stream.replays()) json["replay_frames"] = options.replay_frames;
  if (stream.mode() == PyramidMode::kProbe) json["instruction"] = options.instruction;
  return json;
}

void MethodCounts::Add(const Session& session) {
  if (session.memory) memory = session.memory->counts();
  pyramid_drop = ToJson(session.options.pyramid, session.pyramid);
  if (session.duplicates) duplicates += session.duplicates->duplicates();
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
  Json json = Json::object();
  if (!counts.pyramid_drop.is_null()) json["pyramid_drop"] = counts.pyramid_drop;
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
  if (options.turbo) {
    json["turbo"] = {{"remove", options.turbo->remove}, {"lambda", options.turbo->lambda}};
  }
  if (options.memory) {
    const MemoryOptions& m = *options.memory;
    json["memory"] = {
        {"window_tokens", m.window_tokens},         {"recall_frames", m.recall_blocks},
        {"recall_chunk", m.recall_chunk},           {"int8", m.int8},
        {"frames", counts.memory.blocks},           {"host_frames", counts.memory.host_blocks},
        {"disk_frames", counts.memory.disk_blocks}, {"forgotten_frames", counts.memory.dropped},
        {"host_bytes", counts.memory.host_bytes},   {"disk_bytes", counts.memory.disk_bytes},
        {"index_bytes", counts.memory.index_bytes}};
  }
  if (options.duplicate_threshold) {
    json["duplicate_frames"] = {{"threshold", *options.duplicate_threshold},
                                {"passed_over", counts.duplicates}};
  }
  if (!options.compressors.empty()) json["compressors"] = options.compressors;
  return json;
}

}  // namespace sluice::cli
