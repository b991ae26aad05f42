#include "proto/source_rules.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <optional>
#include <string_view>
#include <system_error>

#include "runtime/error.h"

namespace sluice {
namespace {

namespace fs = std::filesystem;

struct Url {
  std::string scheme, host, port, path;  // the path with its query
};

std::string Lower(std::string_view text) {
  std::string out(text);
  std::transform(out.begin(), out.end(), out.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return out;
}

// A name and password before the host belong to neither rule nor message.
std::optional<Url> ParseUrl(std::string_view text) {
  const size_t scheme = text.find("://");
  if (scheme == std::string_view::npos || scheme == 0) return std::nullopt;
  for (const char c : text) {  // what other parsers could read otherwise
    if (static_cast<unsigned char>(c) <= ' ' || c == '\x7F' || c == '\\') return std::nullopt;
  }
  Url url{.scheme = Lower(text.substr(0, scheme)), .host = {}, .port = {}, .path = {}};
  text.remove_prefix(scheme + 3);
  const size_t end = std::min(text.find_first_of("/?#"), text.size());
  url.path = text.substr(end);
  std::string_view place = text.substr(0, end);
  if (const size_t at = place.rfind('@'); at != std::string_view::npos) place.remove_prefix(at + 1);
  size_t host_end = place.find(':');
  if (place.starts_with('[')) {
    const size_t bracket = place.find(']');
    if (bracket == std::string_view::npos) return std::nullopt;
    url.host = Lower(place.substr(1, bracket - 1));
    place.remove_prefix(bracket + 1);
    if (!place.empty() && place[0] != ':') return std::nullopt;
    host_end = 0;
  } else {
    url.host = Lower(place.substr(0, host_end));
    place = host_end == std::string_view::npos ? "" : place.substr(host_end);
  }
  if (!place.empty()) url.port = place.substr(1);
  if (url.path.empty()) url.path = "/";
  return url;
}

// '*' stands for any number of characters, `barrier` (if not 0) excepted.
bool Matches(std::string_view pattern, std::string_view text, char barrier) {
  size_t p = 0, t = 0, star = std::string_view::npos, from = 0;
  while (t < text.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      from = t;
    } else if (p < pattern.size() && pattern[p] == text[t]) {
      ++p;
      ++t;
    } else if (star != std::string_view::npos && (barrier == 0 || text[from] != barrier)) {
      p = star + 1;
      t = ++from;
    } else {
      return false;
    }
  }
  while (p < pattern.size() && pattern[p] == '*') ++p;
  return p == pattern.size();
}

bool HasDotSegment(std::string_view path) {
  const std::string lower = Lower(path);
  return lower.find("/..") != std::string::npos || lower.find("%2e") != std::string::npos;
}

bool Allows(const std::string& pattern, const Url& url) {
  const auto rule = ParseUrl(pattern);
  return rule && rule->scheme == url.scheme && rule->port == url.port &&
         Matches(rule->host, url.host, '.') && Matches(rule->path, url.path, 0);
}

bool Within(uint32_t address, std::array<uint8_t, 4> network, int bits) {
  const uint32_t base =
      uint32_t{network[0]} << 24 | network[1] << 16 | network[2] << 8 | network[3];
  return (address ^ base) >> (32 - bits) == 0;
}

bool IsPublic4(uint32_t a) {
  return !Within(a, {0, 0, 0, 0}, 8) && !Within(a, {10, 0, 0, 0}, 8) &&
         !Within(a, {100, 64, 0, 0}, 10) && !Within(a, {127, 0, 0, 0}, 8) &&
         !Within(a, {169, 254, 0, 0}, 16) && !Within(a, {172, 16, 0, 0}, 12) &&
         !Within(a, {192, 0, 0, 0}, 24) && !Within(a, {192, 168, 0, 0}, 16) &&
         !Within(a, {198, 18, 0, 0}, 15) && !Within(a, {224, 0, 0, 0}, 3);
}

bool IsPublic(const std::string& address) {
  in_addr four;
  if (inet_pton(AF_INET, address.c_str(), &four) == 1) return IsPublic4(ntohl(four.s_addr));
  in6_addr six;
  if (inet_pton(AF_INET6, address.c_str(), &six) != 1) return false;
  const uint8_t* b = six.s6_addr;
  const auto embedded = [&](int at) {
    return IsPublic4(uint32_t{b[at]} << 24 | b[at + 1] << 16 | b[at + 2] << 8 | b[at + 3]);
  };
  if (IN6_IS_ADDR_V4MAPPED(&six)) return embedded(12);
  if (b[0] == 0 && b[1] == 0x64 && b[2] == 0xFF && b[3] == 0x9B) return embedded(12);  // NAT64
  if (b[0] == 0x20 && b[1] == 0x02) return embedded(2);                                // 6to4
  return (b[0] & 0xE0) == 0x20;  // global unicast is 2000::/3 and nothing else
}

int HexDigit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  const char lower = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return lower >= 'a' && lower <= 'f' ? lower - 'a' + 10 : -1;
}

std::string PercentDecoded(const std::string& text, const std::string& url) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '%') {
      out += text[i];
      continue;
    }
    const int high = i + 2 < text.size() ? HexDigit(text[i + 1]) : -1;
    const int low = i + 2 < text.size() ? HexDigit(text[i + 2]) : -1;
    const int value = high < 0 || low < 0 ? 0 : high * 16 + low;
    if (value == 0) throw InputError("[source] '" + url + "': the path is badly escaped");
    out += static_cast<char>(value);
    i += 2;
  }
  return out;
}

std::string CheckFile(const std::string& url, const Url& parts, const SourceRules& rules) {
  // The same words whether the file is missing or forbidden: nobody can look around.
  const std::string refusal =
      "[source] '" + url + "': expected a file in a directory that this server reads from";
  if (!parts.host.empty() && parts.host != "localhost") throw InputError(refusal);
  std::error_code error;
  const fs::path file = fs::canonical(PercentDecoded(parts.path, url), error);
  if (error || !fs::is_regular_file(file, error)) throw InputError(refusal);
  for (const fs::path& directory : rules.directories) {
    const fs::path root = fs::canonical(directory, error);
    if (error) continue;
    if (std::mismatch(root.begin(), root.end(), file.begin(), file.end()).first == root.end()) {
      return file.string();
    }
  }
  throw InputError(refusal);
}

}  // namespace

std::vector<std::string> ResolveHost(const std::string& host) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (const int code = getaddrinfo(host.c_str(), nullptr, &hints, &found); code != 0) {
    throw InputError("[source] host '" + host + "' is not known: " + gai_strerror(code));
  }
  std::vector<std::string> addresses;
  for (const addrinfo* a = found; a != nullptr; a = a->ai_next) {
    char text[NI_MAXHOST];
    if (getnameinfo(a->ai_addr, a->ai_addrlen, text, sizeof text, nullptr, 0, NI_NUMERICHOST) ==
        0) {
      addresses.emplace_back(text);
    }
  }
  freeaddrinfo(found);
  return addresses;
}

std::string CheckSource(const std::string& url, const SourceRules& rules, const Resolver& resolve) {
  if (url.starts_with("test:")) {
    for (const std::string& pattern : rules.urls) {
      if (pattern.starts_with("test:") && Matches(pattern, url, 0)) return url;
    }
  }
  const auto parts = ParseUrl(url);
  if (!parts) {
    throw InputError(
        "[source] expected http(s)://, rtsp(s):// or file:///PATH that this server "
        "allows, got something else");
  }
  if (parts->scheme == "file") return CheckFile(url, *parts, rules);

  const std::string name = parts->scheme + "://" + parts->host;
  const bool network = parts->scheme == "http" || parts->scheme == "https" ||
                       parts->scheme == "rtsp" || parts->scheme == "rtsps";
  const bool listed =
      network && !parts->host.empty() && !HasDotSegment(parts->path) &&
      std::any_of(rules.urls.begin(), rules.urls.end(),
                  [&](const std::string& pattern) { return Allows(pattern, *parts); });
  if (!listed) throw InputError("[source] '" + name + "': this server's rules do not allow it");
  if (rules.private_addresses) return url;
  const std::vector<std::string> addresses = resolve(parts->host);
  if (addresses.empty() || !std::all_of(addresses.begin(), addresses.end(), IsPublic)) {
    throw InputError("[source] '" + name +
                     "': has a private, local or reserved address, which this server's rules do "
                     "not allow");
  }
  return url;
}

}  // namespace sluice
