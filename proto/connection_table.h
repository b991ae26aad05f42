// Which connections are open, and which of them must go: what Connections decides, without sockets.
//
// Whoever has shown a token stays. When there is no room left, a newcomer takes the place of the
// connection that has been without a token for longest, so that idle connections, however many,
// keep nobody out who shows his token when he comes.
#ifndef SLUICE_PROTO_CONNECTION_TABLE_H_
#define SLUICE_PROTO_CONNECTION_TABLE_H_

#include <chrono>
#include <list>
#include <map>
#include <optional>
#include <vector>

#include "proto/peer_address.h"
#include "runtime/clock.h"

namespace sluice {

struct ConnectionLimits {
  int all = 1024;
  int per_address = 128;      // of PeerAddress::Network
  double token_seconds = 10;  // until a connection must have shown a token
};

// Used by one thread at a time.
class ConnectionTable {
 public:
  explicit ConnectionTable(const ConnectionLimits& limits) : limits_(limits) {}

  struct Admission {
    bool admitted = false;
    std::optional<int> replaced;  // must be closed; it is no longer in the table
  };
  // id: of the caller's choice, unique among those in the table.
  Admission Admit(int id, const PeerAddress& peer, WallTime now);
  // False: there is no such connection (any more).
  bool ShownToken(const PeerAddress& peer);
  // False: it was not in the table.
  bool Remove(int id);
  // Those that have been without a token for too long; they are no longer in the table.
  std::vector<int> TakeOverdue(WallTime now);
  // When TakeOverdue may have something to tell.
  std::optional<WallTime> next_due() const;
  std::vector<int> Ids() const;
  int size() const { return static_cast<int>(open_.size()); }
  int without_token() const { return static_cast<int>(strangers_.size()); }

 private:
  struct Entry {
    PeerAddress peer;
    WallTime since;
    std::optional<std::list<int>::iterator> stranger;  // none: it has shown a token
  };
  std::chrono::steady_clock::duration Patience() const;

  const ConnectionLimits limits_;
  std::map<int, Entry> open_;
  std::map<PeerAddress, int> by_peer_;     // ids
  std::map<PeerAddress, int> of_network_;  // how many
  std::list<int> strangers_;               // without a token, the oldest first
};

}  // namespace sluice

#endif  // SLUICE_PROTO_CONNECTION_TABLE_H_
