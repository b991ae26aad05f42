#include "runtime/trace.h"

namespace sluice {

void Tracer::Add(std::string_view name, const StageCost& cost) {
  auto it = stages_.find(name);
  if (it == stages_.end()) it = stages_.emplace(std::string(name), StageCost{}).first;
  StageCost& sum = it->second;
  sum.calls += cost.calls;
  sum.items += cost.items;
  sum.seconds += cost.seconds;
  sum.flops += cost.flops;
  sum.bytes += cost.bytes;
}

TraceScope::TraceScope(Tracer* tracer, std::string_view name, int64_t items)
    : tracer_(tracer), name_(name) {
  if (!tracer_) return;
  cost_.calls = 1;
  cost_.items = items;
  begin_ = std::chrono::steady_clock::now();
}

TraceScope::~TraceScope() {
  if (!tracer_) return;
  cost_.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
  tracer_->Add(name_, cost_);
}

void TraceScope::AddWork(double flops, double bytes) {
  cost_.flops += flops;
  cost_.bytes += bytes;
}

}  // namespace sluice
