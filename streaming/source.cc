// What a source string means, and what can be said about it before GStreamer is asked.
#include "streaming/source.h"

#include <fcntl.h>
#include <gst/gst.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <string_view>
#include <utility>

#include "runtime/error.h"
#include "streaming/container_file.h"
#include "streaming/gst_source.h"
#include "streaming/reconnecting_source.h"
#include "streaming/redact.h"

namespace sluice {
namespace {

namespace fs = std::filesystem;

constexpr double kMaxTestSeconds = 24 * 3600;
constexpr std::array<std::string_view, 6> kRemoteSchemes = {"http",  "https", "rtsp",
                                                            "rtsps", "rtspt", "rtspu"};

void InitGStreamerOnce() {
  static std::once_flag once;
  std::call_once(once, [] {
    GError* error = nullptr;
    if (gst_init_check(nullptr, nullptr, &error)) return;
    const std::string why = error ? error->message : "unknown reason";
    g_clear_error(&error);
    throw Error("[source] GStreamer does not start: " + why);
  });
}

[[noreturn]] void Refuse(const std::string& label, const std::string& what) {
  throw InputError("[source] '" + label + "': " + what);
}

void CheckFile(const std::string& label, const fs::path& path) {
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (!fs::exists(status)) {
    if (error && error != std::errc::no_such_file_or_directory) Refuse(label, error.message());
    Refuse(label,
           "no such file; expected a video file, a URI (file, http, https, rtsp), \"camera\", "
           "\"test\" or \"-\" for standard input");
  }
  if (fs::is_directory(status)) Refuse(label, "is a directory; expected a video file");
  if (!fs::is_regular_file(status)) {
    Refuse(label, "is not a regular file or a pipe; cameras are named like \"camera:/dev/video0\"");
  }
  if (fs::file_size(path, error) == 0 && !error) {
    Refuse(label, "is empty (0 bytes); expected a video file");
  }
  if (access(path.c_str(), R_OK) != 0) Refuse(label, std::string(std::strerror(errno)));
}

SourceRequest FileRequest(const std::string& label, const fs::path& path) {
  CheckFile(label, path);
  GError* error = nullptr;
  gchar* uri = gst_filename_to_uri(path.c_str(), &error);
  if (!uri) {
    const std::string why = error ? error->message : "unknown reason";
    g_clear_error(&error);
    Refuse(label, "cannot be made a URI: " + why);
  }
  SourceRequest request{.label = label, .location = uri, .container = ReadContainerFacts(path)};
  g_free(uri);
  return request;
}

SourceRequest PipeRequest(const std::string& label, int descriptor) {
  return {.label = label, .location = "fd://" + std::to_string(descriptor), .pipe = true};
}

// Opened without waiting for its writer, whose first bytes are waited for instead.
SourceRequest FifoRequest(const std::string& path) {
  const int descriptor = open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
  if (descriptor < 0) Refuse(path, std::strerror(errno));
  SourceRequest request = PipeRequest(path, descriptor);
  request.descriptor = std::shared_ptr<void>(nullptr, [descriptor](void*) { close(descriptor); });
  return request;
}

SourceRequest UriRequest(const std::string& uri) {
  const std::string label = RedactUrl(uri);
  const std::string_view scheme = std::string_view(uri).substr(0, uri.find("://"));
  if (scheme == "file") {
    gchar* path = g_filename_from_uri(uri.c_str(), nullptr, nullptr);
    if (!path) Refuse(label, "is no valid file URI; expected file:///absolute/path");
    const fs::path file(path);
    g_free(path);
    return FileRequest(label, file);
  }
  for (std::string_view known : kRemoteSchemes) {
    if (scheme == known) return {.label = label, .location = uri};
  }
  Refuse(label,
         "unknown scheme '" + std::string(scheme) + "'; expected file, http, https, rtsp or rtsps");
}

SourceRequest CameraRequest(const std::string& source) {
  const size_t colon = source.find(':');
  const std::string device = colon == std::string::npos ? "/dev/video0" : source.substr(colon + 1);
  std::error_code error;
  if (!fs::is_character_file(device, error)) {
    Refuse(source, "no camera at '" + device +
                       "'; expected a video4linux device such as "
                       "\"camera:/dev/video0\"");
  }
  if (access(device.c_str(), R_OK | W_OK) != 0) {
    Refuse(source, device + ": " + std::strerror(errno) + "; is this user in the group 'video'?");
  }
  return {.kind = SourceRequest::Kind::kCamera, .label = source, .location = device};
}

SourceRequest TestRequest(const std::string& source) {
  SourceRequest request{.kind = SourceRequest::Kind::kTest, .label = source, .location = "smpte"};
  if (source == "test") return request;
  const std::string_view rest = std::string_view(source).substr(5);
  const size_t colon = rest.find(':');
  request.location = rest.substr(0, colon);
  if (request.location == "camera") request.location = "ball";  // something that moves
  if (colon == std::string_view::npos) return request;
  const std::string_view number = rest.substr(colon + 1);
  const auto [end, error] =
      std::from_chars(number.data(), number.data() + number.size(), request.test_seconds);
  if (error != std::errc() || end != number.data() + number.size() ||
      !(request.test_seconds > 0 && request.test_seconds <= kMaxTestSeconds)) {
    Refuse(source,
           "expected \"test:PATTERN:SECONDS\" with seconds above 0 and at most 86400, got '" +
               std::string(number) + "'");
  }
  return request;
}

}  // namespace

SourceRequest ParseSource(const std::string& source, const std::string& label) {
  if (source.empty()) throw InputError("[source] the source is an empty string; name a file");
  if (source.find('\0') != std::string::npos) throw InputError("[source] the source holds a NUL");
  if (source == "-") return PipeRequest("standard input", STDIN_FILENO);
  if (source == "camera" || source.starts_with("camera:")) return CameraRequest(source);
  if (source == "test" || source.starts_with("test:")) return TestRequest(source);
  if (gst_uri_is_valid(source.c_str()) && source.find("://") != std::string::npos) {
    return UriRequest(source);
  }
  std::error_code error;
  if (fs::is_fifo(source, error)) return FifoRequest(source);
  return FileRequest(label.empty() ? source : label, source);
}

std::unique_ptr<Source> Source::Open(const std::string& source, const SourceOptions& options) {
  if (options.stall_timeout.count() <= 0) {
    throw InputError("[source] stall_timeout must be positive, got " +
                     std::to_string(options.stall_timeout.count()) + " ms");
  }
  InitGStreamerOnce();
  return KeepOpen(RedactUrl(source), options, [source, options](const auto& announce) {
    auto opened = std::make_unique<GstSource>(ParseSource(source), options);
    announce(opened.get());
    try {
      opened->Start();
    } catch (...) {
      announce(nullptr);
      throw;
    }
    return opened;
  });
}

}  // namespace sluice
