// The program's own log: one spdlog logger named "sluice" that writes to standard error, so that
// standard output stays the caller's. Warnings and worse by default; whoever owns the process may
// change its level. Thread-safe.
#ifndef SLUICE_STREAMING_LOGGING_H_
#define SLUICE_STREAMING_LOGGING_H_

#include <spdlog/logger.h>

#include <memory>

namespace sluice {

std::shared_ptr<spdlog::logger> Logger();

}  // namespace sluice

#endif  // SLUICE_STREAMING_LOGGING_H_
