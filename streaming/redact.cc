#include "streaming/redact.h"

#include <algorithm>
#include <cctype>

namespace sluice {
namespace {

constexpr std::string_view kHidden = "***";
// A shorter word is part of too many others to be replaced wherever it stands.
constexpr size_t kShortestSecret = 3;

bool IsSchemeLetter(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '+' || c == '-' || c == '.';
}

// Where a URL's host begins, past "scheme://"; 0 if it has none or is a file's.
size_t AuthorityBegin(std::string_view url) {
  const size_t colon = url.find("://");
  if (colon == std::string_view::npos || colon == 0) return 0;
  const std::string_view scheme = url.substr(0, colon);
  if (!std::all_of(scheme.begin(), scheme.end(), IsSchemeLetter)) return 0;
  return scheme == "file" ? 0 : colon + 3;
}

// Where what is left of `url` after its user and password begins; `begin` if there are none.
size_t HostBegin(std::string_view url, size_t begin) {
  const size_t at = url.rfind('@');
  if (at == std::string_view::npos || at < begin) return begin;
  const size_t end = std::min(url.find_first_of("/?#", begin), url.size());
  const std::string_view authority = url.substr(begin, end - begin);
  // A password may hold a slash, an @ and a question mark, and "user:1/2" looks like a port. Only a
  // host without any colon is surely not the beginning of one.
  if (at > end && authority.find_first_of(":@") == std::string_view::npos) return begin;
  return at + 1;
}

std::string PercentDecoded(std::string_view text) {
  const auto digit = [](char c) {
    if (c >= '0' && c <= '9') return c - '0';
    c = static_cast<char>(c | 0x20);
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
  };
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '%' && i + 2 < text.size() && digit(text[i + 1]) >= 0 &&
        digit(text[i + 2]) >= 0) {
      out += static_cast<char>(16 * digit(text[i + 1]) + digit(text[i + 2]));
      i += 2;
    } else {
      out += text[i];
    }
  }
  return out;
}

void ReplaceAll(std::string& text, std::string_view what, std::string_view with) {
  if (what.empty()) return;
  for (size_t at = 0; (at = text.find(what, at)) != std::string::npos; at += with.size()) {
    text.replace(at, what.size(), with);
  }
}

}  // namespace

std::string RedactUrl(std::string_view url) {
  const size_t begin = AuthorityBegin(url);
  if (begin == 0) return std::string(url);
  const size_t host = HostBegin(url, begin);
  std::string out(url.substr(0, begin));
  if (host > begin) out.append(kHidden).append("@");
  const std::string_view rest = url.substr(host);
  const size_t query = rest.find_first_of("?#");
  out += rest.substr(0, query);
  if (query != std::string_view::npos && query + 1 < rest.size()) {
    out.append(rest.substr(query, 1)).append(kHidden);
  }
  return out;
}

Redactor::Redactor(std::string_view url) : url_(url), label_(RedactUrl(url)) {
  const size_t begin = AuthorityBegin(url);
  if (begin == 0 || label_ == url_) return;
  const auto add = [&](std::string_view secret) {
    for (const std::string& form : {std::string(secret), PercentDecoded(secret)}) {
      if (form.size() >= kShortestSecret) secrets_.push_back(form);
    }
  };
  if (const size_t host = HostBegin(url, begin); host > begin) {
    const std::string_view user_info = url.substr(begin, host - 1 - begin);
    add(user_info);
    const size_t colon = user_info.find(':');
    if (colon != std::string_view::npos) add(user_info.substr(colon + 1));
  }
  const size_t query = url.find_first_of("?#", HostBegin(url, begin));
  if (query != std::string_view::npos) {
    std::string_view rest = url.substr(query + 1);
    add(rest);
    while (!rest.empty()) {
      const size_t end = std::min(rest.find_first_of("&;#"), rest.size());
      const size_t equals = rest.substr(0, end).find('=');
      if (equals != std::string_view::npos) add(rest.substr(equals + 1, end - equals - 1));
      rest.remove_prefix(std::min(end + 1, rest.size()));
    }
  }
  std::sort(secrets_.begin(), secrets_.end(),
            [](const std::string& a, const std::string& b) { return a.size() > b.size(); });
}

std::string Redactor::operator()(std::string_view text) const {
  std::string line(text);
  if (label_ != url_) ReplaceAll(line, url_, label_);
  // Other URLs: of a redirect, or of a piece of a playlist.
  std::string out;
  size_t done = 0;
  for (size_t at = 0; (at = line.find("://", at)) != std::string::npos;) {
    size_t begin = at;
    while (begin > done && IsSchemeLetter(line[begin - 1])) --begin;
    const size_t end = std::min(line.find_first_of(" \t\n\"'<>()", at), line.size());
    out += line.substr(done, begin - done);
    out += RedactUrl(std::string_view(line).substr(begin, end - begin));
    done = at = end;
  }
  out += line.substr(done);
  for (const std::string& secret : secrets_) ReplaceAll(out, secret, kHidden);
  return out;
}

}  // namespace sluice
