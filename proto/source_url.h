// URLs of sources, read strictly: what this server, GLib and GStreamer could read differently is no
// URL here, and what is handed on is put together again from the parts that were checked.
#ifndef SLUICE_PROTO_SOURCE_URL_H_
#define SLUICE_PROTO_SOURCE_URL_H_

#include <cstddef>
#include <string>
#include <string_view>

namespace sluice {

struct SourceUrl {
  std::string scheme;    // "http", "https", "rtsp", "rtsps", "file"
  std::string userinfo;  // "user:password", as it stands; often empty
  std::string host;      // lower case; addresses as inet_ntop writes them; empty for files
  int port = 0;          // the scheme's own if none is given; 0 for files
  std::string path;      // with the query, from '/' on

  bool is_file() const { return scheme == "file"; }
  std::string Text() const;   // the URL, port included
  std::string Label() const;  // for messages: without userinfo and query
};

inline constexpr size_t kMaxSourceUrlBytes = 4096;

// RFC 3986 with less freedom: printable ASCII without \ " < > ^ ` { | }, one '@' at most, a name
// and one password before it, a host that is a name of letters, digits, '-' and '_' or an address
// in its usual form, a port from 1 to 65535, a path without dot segments and without encoded '/' or
// '\', nowhere an encoded NUL, no fragment. Throws InputError that tells what is wrong, without the
// URL.
SourceUrl ParseSourceUrl(std::string_view text);

// The same with '*' as a character of host and path, for the rules of an operator. Throws
// InputError.
SourceUrl ParseSourcePattern(std::string_view text);

}  // namespace sluice

#endif  // SLUICE_PROTO_SOURCE_URL_H_
