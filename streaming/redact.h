// Secrets of URLs stay out of messages: the user and password before a host, and everything after
// a question mark, where services put tokens. All messages about sources come through here.
#ifndef SLUICE_STREAMING_REDACT_H_
#define SLUICE_STREAMING_REDACT_H_

#include <string>
#include <string_view>
#include <vector>

namespace sluice {

// "rtsp://user:secret@host/x?token=1" -> "rtsp://***@host/x?***". Where it cannot be told whether
// an @ belongs to the password or to the path, all before the last one is hidden. What is no URL,
// or a file's, comes back as it is.
std::string RedactUrl(std::string_view url);

// Takes the secrets of one URL, and of any other URL, out of text that somebody else wrote, such
// as a library's error about it. Thread-safe.
class Redactor {
 public:
  explicit Redactor(std::string_view url);
  std::string operator()(std::string_view text) const;

 private:
  std::string url_, label_;
  std::vector<std::string> secrets_;  // as written and percent-decoded, longest first
};

}  // namespace sluice

#endif  // SLUICE_STREAMING_REDACT_H_
