// Which sources a client may have the server open. Nothing, unless the operator lists it.
#ifndef SLUICE_PROTO_SOURCE_RULES_H_
#define SLUICE_PROTO_SOURCE_RULES_H_

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "streaming/apart/apart_source.h"

namespace sluice {

struct SourceRules {
  // Patterns such as "rtsp://*.cams.example.com/*": the scheme and port as they stand (a missing
  // port is the scheme's own), * in the host for any part of it without a dot, * in the path for
  // anything. Also "test:*".
  std::vector<std::string> urls = {};
  std::vector<std::filesystem::path> directories =
      {};                          // whose files may be read, with all below them
  bool private_addresses = false;  // hosts may be loopback, link-local, private or multicast
  // What playlists name may be read where a pattern allows the whole host ("https://host/*").
  bool playlists = false;
};

// Throws InputError in one line naming the setting for a pattern that is none.
void CheckRules(const SourceRules& rules);

// The addresses of a host, as text ("192.0.2.1", "2001:db8::1").
using Resolver = std::function<std::vector<std::string>(const std::string& host)>;
std::vector<std::string> ResolveHost(const std::string& host);  // by the system; InputError

// Neither loopback, private, link-local, shared, multicast, reserved, for documentation or
// benchmarks, nor an IPv6 address that stands for one of those. False for what is no address.
bool IsPublicAddress(const std::string& address);

// What to open for `url`: a file that is open and was checked as such, or a URL put together from
// its checked parts with the addresses that were checked: nothing is resolved again. Throws
// InputError when the rules do not allow it.
ApartInput CheckSource(const std::string& url, const SourceRules& rules,
                       const Resolver& resolve = ResolveHost);

// Where a host that a playlist names may be connected to; nothing: the rules do not allow it.
std::vector<Endpoint> CheckFurtherHost(const std::string& host, const SourceRules& rules,
                                       const Resolver& resolve = ResolveHost);

}  // namespace sluice

#endif  // SLUICE_PROTO_SOURCE_RULES_H_
