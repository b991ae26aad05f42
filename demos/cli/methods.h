// The flags that turn acceleration methods on, the same for every subcommand.
#ifndef SLUICE_DEMOS_CLI_METHODS_H_
#define SLUICE_DEMOS_CLI_METHODS_H_

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

#include "compression/stc_cacher.h"
#include "demos/cli/common.h"
#include "streaming/session.h"

namespace sluice::cli {

struct MethodFlags {
  std::string preset = "exact";
  bool cacher = false;
  StcCacherOptions cacher_options;
  std::vector<std::string> compressors;
};
void AddMethodFlags(CLI::App& command, MethodFlags& flags);

// Sets what the preset says, then what the flags say. Throws InputError as the methods do.
void ApplyMethods(const MethodFlags& flags, SessionOptions& options);

// What the methods of one or more sessions did, added up.
struct MethodCounts {
  StcCacher::Counts cacher;
  int64_t cacher_bytes = 0;  // of one session, at most
  void Add(const Session& session);
};
Json ToJson(const SessionOptions& options, const MethodCounts& counts);

}  // namespace sluice::cli

#endif  // SLUICE_DEMOS_CLI_METHODS_H_
