// The decoder's only way to the network: it asks the process that started it.
#ifndef SLUICE_STREAMING_DECODE_NETWORK_H_
#define SLUICE_STREAMING_DECODE_NETWORK_H_

#include <sys/socket.h>

#include <string>
#include <vector>

namespace sluice::decode {

// Has GLib resolve `host` to `addresses`, and any other name by asking. Loads what GLib needs for
// TLS and for proxies (none are used), so that nothing has to be opened later.
void UseAskedNetwork(const std::string& host, std::vector<std::string> addresses);

// connect(2) by asking: `socket` is replaced with one that is connected. Waits until it is, also
// where `socket` does not. Thread-safe.
int AskedConnect(int socket, const sockaddr* address, socklen_t size);

// Why the last connection that was asked for is not there, in words, or "": it was refused, or it
// is still being made. Thread-safe.
std::string WhyNotConnected();

}  // namespace sluice::decode

#endif  // SLUICE_STREAMING_DECODE_NETWORK_H_
