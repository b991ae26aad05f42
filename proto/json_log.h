// The program's log as JSON lines on standard error, for services. Events carry ids and numbers,
// never pictures, questions or answers.
#ifndef SLUICE_PROTO_JSON_LOG_H_
#define SLUICE_PROTO_JSON_LOG_H_

#include <spdlog/common.h>

#include <cstdint>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>

#include "runtime/clock.h"

namespace sluice {

// From now on the whole program's log is {"time", "level", ...} lines, from level info on. gRPC's
// own errors come as events "grpc", one a second; protobuf is silent.
void UseJsonLog();

// One event: {"event": name, ...fields}. Thread-safe.
void LogEvent(spdlog::level::level_enum level, std::string_view name,
              nlohmann::json fields = nlohmann::json::object());

// What others can bring about as often as they like: of each kind one line a second, which tells as
// "left_out" how many there were since the one before. Thread-safe.
class RareEvent {
 public:
  // How many were left out, if this one is to be logged.
  std::optional<int64_t> Take(WallTime now);

 private:
  std::mutex mutex_;
  std::optional<WallTime> last_;
  int64_t left_out_ = 0;
};
void LogRarely(RareEvent& event, spdlog::level::level_enum level, std::string_view name,
               nlohmann::json fields = nlohmann::json::object());

}  // namespace sluice

#endif  // SLUICE_PROTO_JSON_LOG_H_
