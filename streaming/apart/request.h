// What the decoder is asked to do: the first message to it, as a JSON text.
#ifndef SLUICE_STREAMING_APART_REQUEST_H_
#define SLUICE_STREAMING_APART_REQUEST_H_

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "streaming/source.h"

namespace sluice::apart {

struct Request {
  pid_t parent = 0;
  std::string source, label;
  std::string host;                    // the only name that is resolved; empty: ask for each
  std::vector<std::string> addresses;  // of that host
  bool network = false, playlists = false, filtered = true;
  int64_t memory_bytes = 0, slot_bytes = 0;
  std::vector<std::string> elements;  // that may be used; none: all
  SourceOptions options;
};

std::string ToText(const Request& request);
// Throws Error.
Request RequestFrom(std::string_view text);

}  // namespace sluice::apart

#endif  // SLUICE_STREAMING_APART_REQUEST_H_
