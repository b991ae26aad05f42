#include "streaming/logging.h"

#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include <mutex>

namespace sluice {

std::shared_ptr<spdlog::logger> Logger() {
  static std::mutex mutex;  // two threads may ask first at the same time
  const std::lock_guard lock(mutex);
  if (auto logger = spdlog::get("sluice")) return logger;
  auto logger = spdlog::stderr_color_mt("sluice");
  logger->set_level(spdlog::level::warn);
  return logger;
}

}  // namespace sluice
