// `sluice ask --server`: the source is decoded here, a server answers.
#ifndef SLUICE_DEMOS_CLI_REMOTE_ASK_H_
#define SLUICE_DEMOS_CLI_REMOTE_ASK_H_

#include <string>
#include <vector>

#include "demos/clients/cpp/client.h"
#include "streaming/engine.h"

namespace CLI {
class App;
class Option;
}  // namespace CLI

namespace sluice::cli {

struct RemoteServer {
  std::string server;      // HOST:PORT; empty: ask here
  std::string token_file;  // whose first line is the token, without a line end; empty: none
  std::string ca_file;     // PEM; empty: no TLS
};
// Returns --server; the others need it.
CLI::Option* AddServerFlags(CLI::App& command, RemoteServer& flags);
// With what the files hold. Throws InputError.
client::Target TargetOf(const RemoteServer& server);

// As Run of streaming/engine.h, with the session of a server. What `options` do not set is as the
// server and its checkpoint say. Tokens' ids are not told.
RunResult RunRemote(const RemoteServer& server, const v1::ModelOptions& options, Source& source,
                    std::vector<TimedQuestion> questions, const RunObserver& observer);

}  // namespace sluice::cli

#endif  // SLUICE_DEMOS_CLI_REMOTE_ASK_H_
