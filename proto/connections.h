// Accepts TCP connections for gRPC, within limits.
//
// gRPC 1.51 stops accepting for good once accept() has failed for want of descriptors
// (CVE-2023-4785), bounds neither connections nor those that never say anything, and tells nobody
// when one ends. So they are accepted here and handed over as descriptors. A duplicate of each
// stays here: it tells of the end, and closes a connection that must go. That is two descriptors
// for each.
#ifndef SLUICE_PROTO_CONNECTIONS_H_
#define SLUICE_PROTO_CONNECTIONS_H_

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "proto/connection_table.h"
#include "runtime/clock.h"
#include "streaming/metrics.h"

namespace sluice {

struct ListenAddress {
  std::string host;  // without brackets
  uint16_t port = 0;
};
// "HOST:PORT", "[::1]:PORT". Throws InputError, naming `flag`, on anything else.
ListenAddress ParseListen(const char* flag, const std::string& listen);
// Whether others than this machine can connect to it. Throws InputError on a host without address.
bool IsOpenToOthers(const ListenAddress& listen);

// As many as this many descriptors of the process allow: half of them are for connections.
ConnectionLimits FittingInto(const ConnectionLimits& limits, uint64_t descriptors);

// Thread-safe.
class Connections {
 public:
  // Takes a connected socket that does not block. own: made by Dial.
  using HandOver = std::function<void(int descriptor, bool own)>;

  // Listens when it returns; nothing is accepted before Start. Throws InputError on an address that
  // cannot be had. What it is given outlives it.
  Connections(const ListenAddress& listen, const ConnectionLimits& limits, Metrics& metrics,
              const Clock& clock);
  ~Connections();  // as Stop; closes those that are open
  int port() const;

  void Start(HandOver hand_over);  // once; called on a thread of this object
  // Nothing is accepted any more; those that are open go on.
  void Stop();
  // A call over the connection from `peer`, as gRPC names it, has brought a valid token.
  void ShownToken(std::string_view peer);
  // A connection of this process to the listening socket, beside all limits. -1: none could be
  // made.
  int Dial(std::chrono::milliseconds patience);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace sluice

#endif  // SLUICE_PROTO_CONNECTIONS_H_
