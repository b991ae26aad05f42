#include "proto/json_log.h"

#include <google/protobuf/stubs/logging.h>
#include <grpc/support/log.h>
#include <spdlog/formatter.h>

#include <chrono>
#include <cstdio>
#include <ctime>
#include <memory>
#include <string>
#include <utility>

#include "streaming/logging.h"

namespace sluice {
namespace {

constexpr std::string_view kEventBegin = "{\"event\":";

std::string Dump(const nlohmann::ordered_json& json) {
  return json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

class JsonFormatter final : public spdlog::formatter {
 public:
  void format(const spdlog::details::log_msg& message, spdlog::memory_buf_t& out) override {
    using std::chrono::milliseconds;
    const auto since = std::chrono::duration_cast<milliseconds>(message.time.time_since_epoch());
    const std::time_t seconds = since.count() / 1000;
    std::tm utc = {};
    gmtime_r(&seconds, &utc);
    char time[64];
    std::snprintf(time, sizeof time, "%04d-%02d-%02dT%02d:%02d:%02d.%03dZ", utc.tm_year + 1900,
                  utc.tm_mon + 1, utc.tm_mday, utc.tm_hour, utc.tm_min, utc.tm_sec,
                  static_cast<int>(since.count() % 1000));
    nlohmann::ordered_json head = {{"time", time},
                                   {"level", spdlog::level::to_string_view(message.level).data()}};
    const std::string_view payload(message.payload.data(), message.payload.size());
    std::string line;
    if (payload.starts_with(kEventBegin)) {
      line = Dump(head);
      line.pop_back();
      line += ',';
      line += payload.substr(1);
    } else {
      head["message"] = payload;
      line = Dump(head);
    }
    line += '\n';
    out.append(line.data(), line.data() + line.size());
  }
  std::unique_ptr<spdlog::formatter> clone() const override {
    return std::make_unique<JsonFormatter>();
  }
};

// Clients can bring about some of these, a broken handshake for instance.
void LogOfGrpc(gpr_log_func_args* line) {
  static RareEvent event;
  const auto level =
      line->severity == GPR_LOG_SEVERITY_ERROR ? spdlog::level::err : spdlog::level::info;
  LogRarely(event, level, "grpc", {{"message", line->message}});
}

}  // namespace

void UseJsonLog() {
  Logger()->set_formatter(std::make_unique<JsonFormatter>());
  Logger()->set_level(spdlog::level::info);
  // Protobuf writes a line of its own for each text that is not UTF-8: who sends such is told so,
  // and could fill the disk with them.
  google::protobuf::SetLogHandler(nullptr);
  gpr_set_log_function(LogOfGrpc);
}

void LogEvent(spdlog::level::level_enum level, std::string_view name, nlohmann::json fields) {
  nlohmann::ordered_json json = {{"event", name}};
  for (const auto& [key, value] : fields.items()) json[key] = value;
  Logger()->log(level, "{}", Dump(json));
}

std::optional<int64_t> RareEvent::Take(WallTime now) {
  const std::lock_guard lock(mutex_);
  if (last_ && now - *last_ < std::chrono::seconds(1)) {
    ++left_out_;
    return std::nullopt;
  }
  last_ = now;
  return std::exchange(left_out_, 0);
}

void LogRarely(RareEvent& event, spdlog::level::level_enum level, std::string_view name,
               nlohmann::json fields) {
  const auto left_out = event.Take(std::chrono::steady_clock::now());
  if (!left_out) return;
  if (*left_out > 0) fields["left_out"] = *left_out;
  LogEvent(level, name, std::move(fields));
}

}  // namespace sluice
