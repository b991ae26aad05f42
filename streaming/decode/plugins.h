// The decoder's GStreamer: named elements and nothing else.
#ifndef SLUICE_STREAMING_DECODE_PLUGINS_H_
#define SLUICE_STREAMING_DECODE_PLUGINS_H_

#include <string>
#include <vector>

namespace sluice::decode {

// Starts GStreamer without any plugin of the system, loads those of apart/elements.h and takes out
// every element of theirs that is not listed, of the formats' also those that `elements` does not
// name (none: all stay). For a process of its own, before other threads. Throws Error.
void LoadElements(const std::vector<std::string>& elements, bool playlists);

}  // namespace sluice::decode

#endif  // SLUICE_STREAMING_DECODE_PLUGINS_H_
