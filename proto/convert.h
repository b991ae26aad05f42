// From the engine's types to the messages of sluice/v1. Protobuf types never leave this folder:
// what comes out is text. Pure functions, safe on any thread.
#ifndef SLUICE_PROTO_CONVERT_H_
#define SLUICE_PROTO_CONVERT_H_

#include <string>
#include <string_view>

#include "runtime/trace.h"
#include "streaming/engine.h"

namespace sluice {

// `text` with U+FFFD in place of what is not UTF-8, which protobuf would refuse.
std::string Utf8(std::string_view text);
// What went wrong, for a client: one line of at most some 500 bytes, whatever a client's own text
// in it holds. gRPC refuses longer ones.
std::string ErrorLine(std::string_view text);

// One run as sluice.v1.RunReport in protobuf's JSON form, on one line without a newline. Text that
// is not UTF-8 (a damaged codec name, say) is repaired with U+FFFD.
std::string RunReportJson(const RunResult& result, const Tracer& tracer);

}  // namespace sluice

#endif  // SLUICE_PROTO_CONVERT_H_
