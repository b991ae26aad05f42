#include "proto/json_log.h"

#include <google/protobuf/stubs/logging.h>
#include <spdlog/formatter.h>

#include <chrono>
#include <cstdio>
#include <ctime>
#include <memory>
#include <string>

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

}  // namespace

void UseJsonLog() {
  Logger()->set_formatter(std::make_unique<JsonFormatter>());
  Logger()->set_level(spdlog::level::info);
  // Protobuf writes a line of its own for each text that is not UTF-8: who sends such is told so,
  // and could fill the disk with them.
  google::protobuf::SetLogHandler(nullptr);
}

void LogEvent(spdlog::level::level_enum level, std::string_view name, nlohmann::json fields) {
  nlohmann::ordered_json json = {{"event", name}};
  for (const auto& [key, value] : fields.items()) json[key] = value;
  Logger()->log(level, "{}", Dump(json));
}

}  // namespace sluice
