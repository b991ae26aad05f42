// What the subcommands share: which model, how to print.
#ifndef SLUICE_DEMOS_CLI_COMMON_H_
#define SLUICE_DEMOS_CLI_COMMON_H_

#include <cstdint>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/cpu_info.h"
#include "runtime/trace.h"
#include "streaming/engine.h"

namespace CLI {
class App;  // <CLI/CLI.hpp>, which is large
}

namespace sluice::cli {

// Keys in the order in which they were set, for readers.
using Json = nlohmann::ordered_json;

// Which checkpoint, and how to compute with it.
struct ModelFlags {
  std::string model;                // empty: the bundled one
  std::string dtype;                // empty: bf16
  int threads = 0;                  // 0: physical cores
  std::string device;               // "cpu", "cuda"; empty: a GPU if there is one
  std::string weights;              // "bf16", "fp8", "int8"; empty: bf16
  std::string attention = "exact";  // or "sage", or a file by sluice calibrate
};
// What --help says of --weights.
inline constexpr const char* kWeightsHelp =
    "Keep the projections of all layers as computed with (bf16) or, on a GPU, in 8 bits (fp8, "
    "int8); norms, embeddings and the lm_head stay in bf16 (default: bf16)";
void AddModelFlags(CLI::App& command, ModelFlags& flags);
void AddAttentionFlag(CLI::App& command, std::string& attention);  // one of them

// Which clips of the demo world, and how many questions about each; what they hold are defaults.
struct ClipOptions {
  int& clips;
  int& frames;
  int& questions;
};
void AddClipOptions(CLI::App& command, const ClipOptions& flags);

// As CLI::Range, which takes "nan" as well.
std::function<std::string(const std::string&)> FiniteRange(double least, double most);

// options: what the flags do not tell.
Engine OpenEngine(const ModelFlags& flags, EngineOptions options = {});

// A file or directory that comes with Sluice, named by its path in the repository: beside the
// program if it is installed (PREFIX/share/sluice/...), else in the source tree it was built from.
// Throws InputError when it is in neither.
std::filesystem::path BundledPath(const std::string& relative);

// Prints `json` as the one object on stdout.
void PrintJson(const Json& json);

// Right-aligned columns under a header; the first column is left-aligned.
class Table {
 public:
  explicit Table(std::vector<std::string> header) { rows_.push_back(std::move(header)); }
  void Add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }
  std::string ToString() const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

// `value` with `decimals` digits after the point; "-" for zero, which here means "not counted".
std::string Number(double value, int decimals);

// A share as per cent with one decimal.
std::string Percent(double share);

// One line a stage: calls, items, time, rates.
std::string StageTable(const Tracer& tracer);

Json ToJson(const CpuInfo& cpu);

// "fp8", "int8", or the dtype that a model computes in.
const char* WeightsName(const VlmInfo& info);

// Operations that the decoder's layers were traced to do, without the lm_head.
double DecoderFlops(const Tracer& tracer);

// A bar on a terminal's last line; nothing at all when stderr is not a terminal.
// Used by one thread at a time.
class Progress {
 public:
  Progress();
  ~Progress() { Clear(); }
  // fraction < 0: unknown, no bar.
  void Show(double fraction, std::string_view text);
  void Clear();

 private:
  bool terminal_;
  bool shown_ = false;
};

}  // namespace sluice::cli

#endif  // SLUICE_DEMOS_CLI_COMMON_H_
