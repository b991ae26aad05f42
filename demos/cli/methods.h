// The flags that turn acceleration methods on, the same for every subcommand.
#ifndef SLUICE_DEMOS_CLI_METHODS_H_
#define SLUICE_DEMOS_CLI_METHODS_H_

#include <optional>
#include <string>
#include <vector>

#include "compression/stc_cacher.h"
#include "demos/cli/common.h"
#include "streaming/session.h"

namespace CLI {
class App;
}

namespace sluice::cli {

struct MethodFlags {
  std::string preset = "exact";
  bool cacher = false;
  StcCacherOptions cacher_options;
  std::optional<double> turbo;  // tokens or share that leave each block of the tower
  std::optional<double> turbo_lambda;
  std::vector<std::string> compressors;
  std::optional<double> duplicate_threshold;
  // PyramidDrop (compression/pyramid_drop.h)
  std::string pyramid_drop;  // MODE or MODE=LAMBDA; empty: off
  std::optional<int> pyramid_stages, pyramid_replay_frames;
  std::vector<int> pyramid_boundaries;
  std::string pyramid_quota, pyramid_rank, pyramid_positions, pyramid_instruction;
  std::optional<double> pyramid_frame_share;
  // Streaming memory (compression/stream_memory.h)
  bool memory = false;
  MemoryOptions memory_options;
  int64_t memory_host_mb = 1024, memory_disk_mb = 0;
  std::string memory_disk_directory, memory_when_full = "oldest";
};
inline constexpr char kMethodGroup[] = "Methods";  // the group of these flags in the help
void AddMethodFlags(CLI::App& command, MethodFlags& flags);
// The same flags as one text, as "--cacher --compress tome-merge=0.5". Throws InputError.
MethodFlags ParseMethodFlags(const std::string& arguments);

// Sets what the preset says, then what the flags say. Throws InputError as the methods do.
void ApplyMethods(const MethodFlags& flags, SessionOptions& options);

// What PyramidDrop does in a session, for reports; null where it is off.
Json ToJson(const PyramidOptions& options, const PyramidStream& stream);

// What the methods of one or more sessions did, added up.
struct MethodCounts {
  StcCacher::Counts cacher;
  int64_t cacher_bytes = 0;     // of one session, at most
  int64_t duplicates = 0;       // frames
  StreamMemory::Counts memory;  // of the last session
  Json pyramid_drop;            // of the last session; null where it is off
  void Add(const Session& session);
};
Json ToJson(const SessionOptions& options, const MethodCounts& counts);

}  // namespace sluice::cli

#endif  // SLUICE_DEMOS_CLI_METHODS_H_
