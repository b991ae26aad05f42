// GET /metrics over plain HTTP, for a collector: the text of a Metrics object. Nothing else is
// there. Small and bounded: one thread, few connections, short requests, short waits.
#ifndef SLUICE_PROTO_METRICS_ENDPOINT_H_
#define SLUICE_PROTO_METRICS_ENDPOINT_H_

#include <memory>
#include <string>

#include "streaming/metrics.h"

namespace sluice {

class MetricsEndpoint {
 public:
  // listen: "HOST:PORT" with a numeric address; port 0: any that is free. Listens when it returns.
  // Throws InputError on an address that cannot be had. metrics outlives it.
  MetricsEndpoint(const Metrics& metrics, const std::string& listen);
  ~MetricsEndpoint();
  int port() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace sluice

#endif  // SLUICE_PROTO_METRICS_ENDPOINT_H_
