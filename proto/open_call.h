// A call in progress, as the hub looks after it: it ends when its token does, or when its first
// message does not come.
#ifndef SLUICE_PROTO_OPEN_CALL_H_
#define SLUICE_PROTO_OPEN_CALL_H_

#include <grpcpp/support/status.h>

#include <optional>

#include "proto/access.h"
#include "runtime/clock.h"

namespace sluice {

// Thread-safe.
class OpenCall {
 public:
  virtual ~OpenCall() = default;
  virtual const Account* account() const = 0;  // null: it needs no token
  // Since when its client is waited for; none: the first message has come.
  virtual std::optional<WallTime> waiting_since() const = 0;
  // Ends it now. Later ends are ignored.
  virtual void End(const grpc::Status& status) = 0;
};

}  // namespace sluice

#endif  // SLUICE_PROTO_OPEN_CALL_H_
