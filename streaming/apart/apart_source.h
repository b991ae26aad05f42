// A source that is decoded in a process of its own, for videos that strangers choose: a crash ends
// that source alone, and what takes the process over finds next to nothing there.
//
//   this process                                 sluice-decode
//   OpenApart: file and addresses, checked  ->   limits, elements, system-call filter
//   Next: copies the picture                <-   GStreamer; frames in shared memory
//   keeper thread: connects where it may    <-   asks for connections and gets sockets
//
// The decoder opens no file and connects nowhere itself: it is handed the file, and sockets to the
// addresses that were checked. It dies with this process.
#ifndef SLUICE_STREAMING_APART_APART_SOURCE_H_
#define SLUICE_STREAMING_APART_APART_SOURCE_H_

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "streaming/apart/wire.h"
#include "streaming/source.h"

namespace sluice {

// A place on the network that may be connected to.
struct Endpoint {
  std::string address;  // "192.0.2.1", "2001:db8::1"
  int port = 0;
};

// What is opened, already checked. Nothing else can be opened or reached from the decoder.
struct ApartInput {
  std::string uri;                  // http(s)://, rtsp(s)://, "test:..."; of a file nothing
  std::string label;                // for messages: without passwords
  apart::UniqueFd file;             // of a file: open for reading
  std::string host;                 // of a URI on the network, as it stands there
  std::vector<Endpoint> endpoints;  // of that host
  // Where the hosts that a playlist names may be connected to: nothing, or a line in an InputError,
  // for those that are not allowed. Called on a thread of the source's own.
  std::function<std::vector<Endpoint>(const std::string& host)> further;
};

struct ApartOptions {
  std::filesystem::path program;         // the decoder; empty: sluice-decode beside this program
  bool filtered = true;                  // false: without the filter of system calls
  int64_t memory_bytes = 1LL << 30;      // of a decoder, at most
  double frame_cpu_seconds = 60;         // that it may spend on one frame, or on opening
  int64_t frame_pixels = 8192LL * 8192;  // width * height, at most
  std::vector<std::string> elements;     // of apart::Formats(); none: all
  bool playlists = false;                // also apart::Playlists()
};

// The program that decodes: options.program, or the one beside this program. Throws InputError if
// it cannot be run.
std::filesystem::path DecoderProgram(const ApartOptions& options);

// As Source::Open. Throws InputError as that does, Error when the decoder cannot be started or
// confined. Next throws Error when the decoder dies or spends too long on a frame.
std::unique_ptr<Source> OpenApart(ApartInput input, const SourceOptions& source,
                                  const ApartOptions& options);

}  // namespace sluice

#endif  // SLUICE_STREAMING_APART_APART_SOURCE_H_
