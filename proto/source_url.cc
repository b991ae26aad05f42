#include "proto/source_url.h"

#include <arpa/inet.h>
#include <netinet/in.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <utility>

#include "runtime/error.h"

namespace sluice {
namespace {

constexpr std::array<std::pair<std::string_view, int>, 5> kSchemes = {
    {{"http", 80}, {"https", 443}, {"rtsp", 554}, {"rtsps", 322}, {"file", 0}}};

[[noreturn]] void Refuse(const std::string& what) { throw InputError("[source] " + what); }

bool IsDigit(char c) { return c >= '0' && c <= '9'; }
bool IsLower(char c) { return c >= 'a' && c <= 'z'; }
bool IsAlnum(char c) { return IsDigit(c) || IsLower(c) || (c >= 'A' && c <= 'Z'); }
char ToLower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; }
bool IsHex(char c) { return IsDigit(c) || (ToLower(c) >= 'a' && ToLower(c) <= 'f'); }

std::string Lower(std::string_view text) {
  std::string out(text);
  std::transform(out.begin(), out.end(), out.begin(), ToLower);
  return out;
}

// RFC 3986's unreserved and sub-delims, `more`, and %XX but for %00.
bool IsMadeOf(std::string_view text, std::string_view more) {
  constexpr std::string_view kPlain = "-._~!$&'()*+,;=";
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '%') {
      if (i + 2 >= text.size() || !IsHex(text[i + 1]) || !IsHex(text[i + 2])) return false;
      if (text.substr(i + 1, 2) == "00") return false;  // GStreamer falls over it in a query
      i += 2;
    } else if (!IsAlnum(text[i]) && kPlain.find(text[i]) == kPlain.npos &&
               more.find(text[i]) == more.npos) {
      return false;
    }
  }
  return true;
}

int ParsePort(std::string_view text) {
  int port = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), port);
  if (error != std::errc() || end != text.data() + text.size() || !IsDigit(text[0]) ||
      text[0] == '0' || port > 65535) {
    Refuse("expected a port from 1 to 65535 in the URL");
  }
  return port;
}

std::string ParseAddress6(std::string_view text) {
  in6_addr address;
  const std::string copy(text);
  // Dots would be an IPv4 address within, '%' a zone.
  if (text.find_first_not_of("0123456789abcdefABCDEF:") != text.npos ||
      inet_pton(AF_INET6, copy.c_str(), &address) != 1 || IN6_IS_ADDR_V4MAPPED(&address) ||
      (IN6_IS_ADDR_V4COMPAT(&address))) {
    Refuse("expected an IPv6 address in the URL's brackets, without a zone or an IPv4 address");
  }
  char written[INET6_ADDRSTRLEN];
  inet_ntop(AF_INET6, &address, written, sizeof written);
  return written;
}

// A name, or an IPv4 address in four decimal parts: other forms of numbers are read as addresses
// by some and as names by others.
std::string ParseHost(std::string_view text, bool pattern) {
  constexpr const char* kExpected =
      "expected the URL's host to be a name of letters, digits, '-' and '_' or an address such as "
      "192.0.2.1 or [2001:db8::1]";
  std::string host = Lower(text);
  in_addr four;
  if (inet_pton(AF_INET, host.c_str(), &four) == 1) {
    char written[INET_ADDRSTRLEN];
    inet_ntop(AF_INET, &four, written, sizeof written);
    if (host != written) Refuse(kExpected);
    return host;
  }
  if (host.size() > 253) Refuse(kExpected);
  std::string_view label;
  for (size_t begin = 0; begin <= host.size(); begin += label.size() + 1) {
    label = std::string_view(host).substr(begin, host.find('.', begin) - begin);
    const bool well_made =
        !label.empty() && label.size() <= 63 && label.front() != '-' && label.back() != '-' &&
        std::all_of(label.begin(), label.end(), [&](char c) {
          return IsDigit(c) || IsLower(c) || c == '-' || c == '_' || (pattern && c == '*');
        });
    if (!well_made) Refuse(kExpected);
  }
  const bool number =
      std::all_of(label.begin(), label.end(), IsDigit) ||
      (label.starts_with("0x") && std::all_of(label.begin() + 2, label.end(), IsHex));
  if (number && !pattern) Refuse(kExpected);
  return host;
}

void CheckPath(std::string_view path, bool file) {
  const std::string_view resource = path.substr(0, path.find('?'));
  if (!IsMadeOf(resource, ":@/") || !IsMadeOf(path.substr(resource.size()), ":@/?")) {
    Refuse("expected the URL's path and query to be as RFC 3986 has them, other characters as %XX");
  }
  if (file && resource.size() != path.size()) Refuse("a file's URL has no query; write '?' as %3F");
  std::string decoded;
  for (size_t i = 0; i < resource.size(); ++i) {
    if (resource[i] != '%') {
      decoded += resource[i];
      continue;
    }
    const std::string code = Lower(resource.substr(i + 1, 2));
    if (code == "2f" || code == "5c") {
      Refuse("the URL's path holds an encoded '/' or '\\'");
    }
    decoded += code == "2e" ? '.' : 'x';
    i += 2;
  }
  decoded += '/';
  if (decoded.find("/./") != decoded.npos || decoded.find("/../") != decoded.npos) {
    Refuse("the URL's path has '.' or '..' as a part");
  }
}

SourceUrl Parse(std::string_view text, bool pattern) {
  if (text.size() > kMaxSourceUrlBytes) {
    Refuse("expected a URL of at most " + std::to_string(kMaxSourceUrlBytes) + " bytes, got " +
           std::to_string(text.size()));
  }
  const size_t colon = text.find("://");
  SourceUrl url;
  url.scheme = Lower(text.substr(0, colon));
  const auto scheme = std::find_if(kSchemes.begin(), kSchemes.end(),
                                   [&](const auto& known) { return known.first == url.scheme; });
  if (colon == text.npos || scheme == kSchemes.end()) {
    Refuse("expected http(s)://, rtsp(s):// or file:///PATH, got something else");
  }
  url.port = scheme->second;
  text.remove_prefix(colon + 3);
  std::string_view place = text.substr(0, text.find_first_of("/?#"));
  url.path = text.substr(place.size());
  if (url.path.empty() || url.path[0] != '/') url.path.insert(0, 1, '/');
  CheckPath(url.path, url.is_file());
  if (url.is_file()) {
    if (!place.empty() && Lower(place) != "localhost") Refuse("a file's URL begins with file:///");
    return url;
  }

  if (const size_t at = place.find('@'); at != place.npos) {
    url.userinfo = place.substr(0, at);
    place.remove_prefix(at + 1);
    const auto colons = std::count(url.userinfo.begin(), url.userinfo.end(), ':');
    const bool rtsp = url.scheme.starts_with("rtsp");  // GStreamer wants a password there
    const bool well_made = !pattern && !url.userinfo.empty() && IsMadeOf(url.userinfo, ":") &&
                           colons <= 1 && (colons == 1 || !rtsp) && url.userinfo[0] != ':' &&
                           place.find('@') == place.npos;
    if (!well_made) {
      Refuse(pattern ? "a rule has no name and password"
                     : "expected USER or USER:PASSWORD and one '@' before the URL's host, other "
                       "characters as %XX");
    }
  }
  std::string_view rest;
  if (place.starts_with('[')) {
    const size_t bracket = place.find(']');
    if (bracket == place.npos) Refuse("expected ']' after the URL's IPv6 address");
    url.host = ParseAddress6(place.substr(1, bracket - 1));
    rest = place.substr(bracket + 1);
    if (!rest.empty() && rest[0] != ':') Refuse("expected ':' or '/' after the URL's brackets");
  } else {
    const size_t end = std::min(place.find(':'), place.size());
    url.host = ParseHost(place.substr(0, end), pattern);
    rest = place.substr(end);
  }
  if (!rest.empty()) url.port = ParsePort(rest.substr(1).empty() ? "0" : rest.substr(1));
  return url;
}

std::string Place(const SourceUrl& url) {
  const bool six = url.host.find(':') != std::string::npos;
  return (six ? "[" + url.host + "]" : url.host) + ":" + std::to_string(url.port);
}

}  // namespace

std::string SourceUrl::Text() const {
  if (is_file()) return "file://" + path;
  return scheme + "://" + (userinfo.empty() ? "" : userinfo + "@") + Place(*this) + path;
}

std::string SourceUrl::Label() const {
  return scheme + "://" + (is_file() ? "" : Place(*this)) + path.substr(0, path.find('?'));
}

SourceUrl ParseSourceUrl(std::string_view text) { return Parse(text, false); }
SourceUrl ParseSourcePattern(std::string_view text) { return Parse(text, true); }

}  // namespace sluice
