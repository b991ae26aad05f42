// The program's log as JSON lines on standard error, for services. Events carry ids and numbers,
// never pictures, questions or answers.
#ifndef SLUICE_PROTO_JSON_LOG_H_
#define SLUICE_PROTO_JSON_LOG_H_

#include <spdlog/common.h>

#include <nlohmann/json.hpp>
#include <string_view>

namespace sluice {

// From now on the whole program's log is {"time", "level", ...} lines, from level info on, and
// protobuf is silent.
void UseJsonLog();

// One event: {"event": name, ...fields}. Thread-safe.
void LogEvent(spdlog::level::level_enum level, std::string_view name,
              nlohmann::json fields = nlohmann::json::object());

}  // namespace sluice

#endif  // SLUICE_PROTO_JSON_LOG_H_
