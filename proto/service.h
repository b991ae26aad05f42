// The gRPC service of sluice/v1/service.proto over a scheduler, with the standard health service
// beside it.
//
// Connections cost no threads: gRPC's few threads hand every message to a small pool, which talks
// to the scheduler and hands pictures on to a pool of their own, so that pictures that are slow to
// decode hold up no other messages. The next message of a connection is read when the last one is
// dealt with, so a client that sends faster is held up by the network. Only sources that the server
// opens itself have a thread each.
#ifndef SLUICE_PROTO_SERVICE_H_
#define SLUICE_PROTO_SERVICE_H_

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "llm/vlm.h"
#include "proto/access.h"
#include "proto/connections.h"
#include "proto/saved_streams.h"
#include "proto/source_rules.h"
#include "proto/tls.h"
#include "runtime/clock.h"
#include "streaming/metrics.h"
#include "streaming/scheduler.h"

namespace sluice {

struct ServiceOptions {
  std::string listen = "127.0.0.1:50051";  // port 0: any that is free
  // Without certificate and key connections are not encrypted.
  TlsFiles tls;
  std::vector<AccessToken> tokens;  // none: everybody may connect
  // To be said where others than this machine can connect: without them that is refused.
  bool allow_plain_text = false;  // without certificate and key
  bool allow_everybody = false;   // without tokens and without client_ca
  ConnectionLimits connections;
  double first_message_seconds = 10;  // that a call waits for its client's first message
  double idle_seconds = 300;          // that a connection without calls stays open
  double watchdog_seconds = 10;       // between two questions to the own health service; 0: none
  int64_t network_bytes = 512 << 20;  // that gRPC may hold of messages on their way
  SourceRules sources;
  ApartOptions decoder;                // of each source; its frame_pixels are those below
  StreamBudget budget;                 // of each stream, at most
  BlockStoreOptions memory;            // of each stream that has one, at most; when_full is its own
  int64_t message_bytes = 8 << 20;     // larger messages end the call
  int64_t frame_pixels = 4096 * 2304;  // larger pictures are dropped, sources of such end
  int64_t outgoing_bytes = 1 << 20;    // that may wait for a client
  double linger_seconds = 60;          // that a stream waits for its client to come back
  // Where streams are saved; empty: nowhere. Made, for this user alone, if it is not there.
  std::filesystem::path state_directory;
  double state_days = 7;             // that a saved stream waits
  double drain_seconds = 10;         // for what is under way at shutdown
  double keepalive_seconds = 20;     // of silence, until the other end is asked
  SavedLimits saved, all_saved;      // of one token that says nothing else, of all
  int max_sources = 16;              // open at a time
  int account_sources = 0;           // of one token that says nothing else; 0: all of them
  double source_stall_seconds = 10;  // without a frame, until a source has failed
  int source_reconnect = 10;         // as ReconnectOptions::most_tries
  int workers = 2;                   // threads that decode pictures and resize them
};

// Throws InputError, in one line that tells which setting allows it, on an address that others can
// connect to without encryption or without tokens; on one that is none; on half a certificate.
void CheckExposure(const ServiceOptions& options);

// Thread-safe.
class Service {
 public:
  // Listens when it returns. All references outlive it. Throws InputError on options that make no
  // sense, unreadable files, an address that cannot be had.
  Service(std::shared_ptr<const Vlm> vlm, Scheduler& scheduler, Metrics& metrics,
          const Clock& clock, const ServiceOptions& options);
  ~Service();  // as Shutdown
  int port() const;

  // New connections get the certificates that the files hold now; from now on these are the tokens,
  // if any are given, and what runs on one that is not among them ends. Throws InputError, and
  // nothing has changed, on what makes no sense, such as the last token's going.
  void Reload(const std::optional<std::vector<AccessToken>>& tokens);
  // Asks the own health service over a connection of its own; false, and logged: no answer in time.
  bool Answers();

  // Health turns NOT_SERVING, every client is told, what is under way is finished within
  // drain_seconds, then all calls end. Later calls do nothing.
  void Shutdown();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace sluice

#endif  // SLUICE_PROTO_SERVICE_H_
