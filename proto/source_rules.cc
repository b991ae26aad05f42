#include "proto/source_rules.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <string_view>
#include <system_error>
#include <utility>

#include "proto/source_url.h"
#include "runtime/error.h"

namespace sluice {
namespace {

namespace fs = std::filesystem;

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

bool IsTest(std::string_view url) { return url == "test" || url.starts_with("test:"); }

bool Allows(const std::string& pattern, const SourceUrl& url) {
  if (IsTest(pattern)) return false;
  const SourceUrl rule = ParseSourcePattern(pattern);
  return rule.scheme == url.scheme && rule.port == url.port && Matches(rule.host, url.host, '.') &&
         Matches(rule.path, url.path, 0);
}

struct Network4 {
  std::array<uint8_t, 4> base;
  int bits;
};
// The special-purpose addresses of RFC 6890 and its registry.
constexpr Network4 kSpecial4[] = {
    {{0, 0, 0, 0}, 8},       {{10, 0, 0, 0}, 8},     {{100, 64, 0, 0}, 10},
    {{127, 0, 0, 0}, 8},     {{169, 254, 0, 0}, 16}, {{172, 16, 0, 0}, 12},
    {{192, 0, 0, 0}, 24},    {{192, 0, 2, 0}, 24},   {{192, 31, 196, 0}, 24},
    {{192, 52, 193, 0}, 24}, {{192, 88, 99, 0}, 24}, {{192, 168, 0, 0}, 16},
    {{192, 175, 48, 0}, 24}, {{198, 18, 0, 0}, 15},  {{198, 51, 100, 0}, 24},
    {{203, 0, 113, 0}, 24},  {{224, 0, 0, 0}, 3},
};

bool IsPublic4(const uint8_t* a) {
  const auto number = [](const uint8_t* b) {
    return uint32_t{b[0]} << 24 | uint32_t{b[1]} << 16 | uint32_t{b[2]} << 8 | b[3];
  };
  return std::none_of(std::begin(kSpecial4), std::end(kSpecial4), [&](const Network4& network) {
    return (number(a) ^ number(network.base.data())) >> (32 - network.bits) == 0;
  });
}

bool IsPublic6(const uint8_t* a) {
  // NAT64 (64:ff9b::/96) is the IPv4 address in its last part; its local kind (64:ff9b:1::/48) and
  // the old ways of IPv4 within IPv6 (mapped, compatible, 6to4, Teredo) lead nowhere public.
  constexpr uint8_t kNat64[12] = {0, 0x64, 0xFF, 0x9B};
  if (std::equal(kNat64, kNat64 + 12, a)) return IsPublic4(a + 12);
  const unsigned first = a[0] << 8 | a[1], second = a[2] << 8 | a[3];
  if ((first & 0xE000) != 0x2000) return false;           // global unicast is 2000::/3
  if (first == 0x2001 && second < 0x0200) return false;   // protocols: Teredo, ORCHID, benchmarks
  if (first == 0x2001 && second == 0x0DB8) return false;  // documentation
  if (first == 0x3FFF && second < 0x1000) return false;   // documentation
  return first != 0x2002;                                 // 6to4
}

int HexDigit(char c) { return c <= '9' ? c - '0' : (c | 0x20) - 'a' + 10; }

std::string PercentDecoded(const std::string& text) {  // well made, as ParseSourceUrl sees to
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '%') {
      out += text[i];
      continue;
    }
    out += static_cast<char>(HexDigit(text[i + 1]) * 16 + HexDigit(text[i + 2]));
    i += 2;
  }
  return out;
}

bool IsBelow(const fs::path& file, const std::vector<fs::path>& directories) {
  return std::any_of(directories.begin(), directories.end(), [&](const fs::path& directory) {
    std::error_code error;
    const fs::path root = fs::canonical(directory, error);
    return !error &&
           std::mismatch(root.begin(), root.end(), file.begin(), file.end()).first == root.end();
  });
}

// Opens first and then looks where it came out, so that nothing can be put in between.
ApartInput CheckFile(const SourceUrl& url, const SourceRules& rules) {
  // The same words whether the file is missing or forbidden: nobody can look around.
  const auto refuse = [&] {
    throw InputError("[source] '" + url.Label() +
                     "': expected a file in a directory that this server reads from");
  };
  std::error_code error;
  const fs::path path = fs::canonical(PercentDecoded(url.path), error);
  if (error || !IsBelow(path, rules.directories)) refuse();
  ApartInput input;
  input.label = url.Label();
  input.file = apart::UniqueFd(
      open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY));
  struct stat status = {};
  if (!input.file || fstat(input.file.get(), &status) != 0 || !S_ISREG(status.st_mode)) refuse();
  const fs::path opened =
      fs::read_symlink("/proc/self/fd/" + std::to_string(input.file.get()), error);
  if (error || !IsBelow(opened, rules.directories)) refuse();
  return input;
}

std::vector<std::string> CheckedAddresses(const SourceUrl& url, const SourceRules& rules,
                                          const Resolver& resolve) {
  std::vector<std::string> addresses = resolve(url.host);
  const bool all =
      !addresses.empty() &&
      (rules.private_addresses || std::all_of(addresses.begin(), addresses.end(), IsPublicAddress));
  if (!all) {
    throw InputError("[source] '" + url.Label() +
                     "': has a private, local or reserved address, which this server's rules do "
                     "not allow");
  }
  return addresses;
}

// What a pattern says that allows all of an HTTP host; others: nothing.
std::optional<SourceUrl> WholeHost(const std::string& pattern) {
  if (IsTest(pattern)) return std::nullopt;
  SourceUrl rule = ParseSourcePattern(pattern);
  if (!rule.scheme.starts_with("http") || rule.path != "/*") return std::nullopt;
  return rule;
}

}  // namespace

bool IsPublicAddress(const std::string& address) {
  std::array<uint8_t, 16> bytes;
  if (inet_pton(AF_INET, address.c_str(), bytes.data()) == 1) return IsPublic4(bytes.data());
  if (inet_pton(AF_INET6, address.c_str(), bytes.data()) == 1) return IsPublic6(bytes.data());
  return false;
}

void CheckRules(const SourceRules& rules) {
  for (const std::string& pattern : rules.urls) {
    if (IsTest(pattern)) continue;
    try {
      if (!ParseSourcePattern(pattern).is_file()) continue;
    } catch (const InputError& error) {
      throw InputError("[serve] source_urls: '" + pattern + "': " + error.what());
    }
    throw InputError("[serve] source_urls: '" + pattern +
                     "': files are allowed by source_directories");
  }
}

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

ApartInput CheckSource(const std::string& text, const SourceRules& rules, const Resolver& resolve) {
  ApartInput input;
  if (IsTest(text)) {
    for (const std::string& pattern : rules.urls) {
      if (!IsTest(pattern) || !Matches(pattern, text, 0)) continue;
      input.uri = input.label = text;
      return input;
    }
  }
  const SourceUrl url = ParseSourceUrl(text);
  if (url.is_file()) return CheckFile(url, rules);
  if (std::none_of(rules.urls.begin(), rules.urls.end(),
                   [&](const std::string& pattern) { return Allows(pattern, url); })) {
    throw InputError("[source] '" + url.Label() + "': this server's rules do not allow it");
  }
  input.uri = url.Text();
  input.label = url.Label();
  input.host = url.host;
  for (std::string& address : CheckedAddresses(url, rules, resolve)) {
    input.endpoints.push_back({.address = std::move(address), .port = url.port});
  }
  // Its own host stays in reach of what it plays: all of that must be allowed.
  const auto whole = [&url](const std::string& pattern) {
    const auto rule = WholeHost(pattern);
    return rule && rule->port == url.port && Matches(rule->host, url.host, '.');
  };
  if (rules.playlists && std::any_of(rules.urls.begin(), rules.urls.end(), whole)) {
    input.further = [rules, resolve](const std::string& host) {
      return CheckFurtherHost(host, rules, resolve);
    };
  }
  return input;
}

std::vector<Endpoint> CheckFurtherHost(const std::string& host, const SourceRules& rules,
                                       const Resolver& resolve) {
  std::vector<Endpoint> endpoints;
  for (const std::string& pattern : rules.urls) {
    const auto rule = WholeHost(pattern);
    if (!rule) continue;
    // Read as a URL's host is, whatever the playlist had.
    const SourceUrl url = ParseSourceUrl(rule->scheme + "://" + host + "/");
    if (!Matches(rule->host, url.host, '.')) continue;
    for (std::string& address : CheckedAddresses(url, rules, resolve)) {
      endpoints.push_back({.address = std::move(address), .port = rule->port});
    }
  }
  return endpoints;
}

}  // namespace sluice
