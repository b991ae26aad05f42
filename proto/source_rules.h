// Which sources a client may have the server open. Nothing, unless the operator lists it.
#ifndef SLUICE_PROTO_SOURCE_RULES_H_
#define SLUICE_PROTO_SOURCE_RULES_H_

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace sluice {

struct SourceRules {
  // Patterns such as "rtsp://*.cams.example.com/*": the scheme and port as they stand, * in the
  // host for any part of it without a dot, * in the path for anything. Also "test:*".
  std::vector<std::string> urls;
  std::vector<std::filesystem::path> directories;  // whose files may be read, with all below them
  bool private_addresses = false;  // hosts may be loopback, link-local, private or multicast
};

// The addresses of a host, as text ("192.0.2.1", "2001:db8::1").
using Resolver = std::function<std::vector<std::string>(const std::string& host)>;
std::vector<std::string> ResolveHost(const std::string& host);  // by the system; InputError

// What to open for `url`: a file's path without symbolic links, else the URL itself. Throws
// InputError when the rules do not allow it. The host is resolved here, and again when the source
// is opened: hosts on the list are trusted not to change in between, nor to redirect elsewhere.
std::string CheckSource(const std::string& url, const SourceRules& rules,
                        const Resolver& resolve = ResolveHost);

}  // namespace sluice

#endif  // SLUICE_PROTO_SOURCE_RULES_H_
