// Why a network source cannot be reached. GStreamer's sources often say no more than that it
// failed.
#ifndef SLUICE_STREAMING_CONNECTION_CHECK_H_
#define SLUICE_STREAMING_CONNECTION_CHECK_H_

#include <chrono>
#include <string>

namespace sluice {

// Connects to the host of an http(s) or rtsp(s) URL, with TLS where the scheme says so, and hangs
// up. Returns what fails in words, without the URL's secrets, or "" if nothing does. `timeout`
// bounds each step but the resolving of the name.
std::string WhyUnreachable(const std::string& url, std::chrono::milliseconds timeout);

// What connect(2)'s errno `error` means for `place`, a host and port.
std::string MeaningOfConnectError(int error, const std::string& place);

// What an answer such as "Not Found (404)" within `text` means, or "".
std::string MeaningOfStatus(const std::string& text);

}  // namespace sluice

#endif  // SLUICE_STREAMING_CONNECTION_CHECK_H_
