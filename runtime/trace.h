// Where the time goes: named scopes whose names are shared by logs, metrics and the profiler.
// A Tracer is used by one thread at a time (it belongs to an ExecContext).
#ifndef SLUICE_RUNTIME_TRACE_H_
#define SLUICE_RUNTIME_TRACE_H_

#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>

namespace sluice {

// What one scope cost, summed over its calls.
struct StageCost {
  int64_t calls = 0;
  int64_t items = 0;  // frames or tokens, whatever the scope counts
  double seconds = 0;
  double flops = 0;  // floating-point operations done (2 per multiply-add)
  double bytes = 0;  // bytes that had to be moved at least: inputs read once, outputs written once
};

class Tracer {
 public:
  void Add(std::string_view name, const StageCost& cost);
  // Costs by name, for instance "encode", "prefill", "decode" and, nested, "encode/attention".
  const std::map<std::string, StageCost, std::less<>>& stages() const { return stages_; }
  void Clear() { stages_.clear(); }

 private:
  std::map<std::string, StageCost, std::less<>> stages_;
};

// Times its own lifetime. `tracer` may be null (then it costs nothing).
class TraceScope {
 public:
  TraceScope(Tracer* tracer, std::string_view name, int64_t items = 0);
  ~TraceScope();
  TraceScope(const TraceScope&) = delete;
  TraceScope& operator=(const TraceScope&) = delete;
  void AddWork(double flops, double bytes);
  void AddItems(int64_t items) { cost_.items += items; }

 private:
  Tracer* tracer_;
  std::string_view name_;
  StageCost cost_;
  std::chrono::steady_clock::time_point begin_;
};

}  // namespace sluice

#endif  // SLUICE_RUNTIME_TRACE_H_
