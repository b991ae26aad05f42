#include "streaming/connection_check.h"

#include <gio/gio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <regex>

#include "streaming/gst_types.h"

namespace sluice {
namespace {

template <typename T>
using ObjectPtr = std::unique_ptr<T, GDeleter<g_object_unref>>;
using ErrorPtr = std::unique_ptr<GError, GDeleter<g_error_free>>;

bool IsSecure(std::string_view scheme) { return scheme == "https" || scheme.starts_with("rtsps"); }

int DefaultPort(std::string_view scheme) {
  if (scheme.starts_with("rtsp")) return IsSecure(scheme) ? 322 : 554;
  return IsSecure(scheme) ? 443 : 80;
}

}  // namespace

std::string WhyUnreachable(const std::string& url, std::chrono::milliseconds timeout) {
  gchar *scheme = nullptr, *host = nullptr;
  gint port = -1;
  GError* raw_error = nullptr;
  g_uri_split(url.c_str(), G_URI_FLAGS_PARSE_RELAXED, &scheme, nullptr, &host, &port, nullptr,
              nullptr, nullptr, &raw_error);
  const GChars own_scheme(scheme), own_host(host);
  ErrorPtr error(raw_error);
  if (error || !scheme || !host || !*host) {
    return "the URL names no host and port that can be read; write / and @ in a user name or "
           "password as %2F and %40";
  }
  if (port <= 0) port = DefaultPort(scheme);
  const std::string place = std::string(host) + ":" + std::to_string(port);

  const ObjectPtr<GSocketClient> client(g_socket_client_new());
  const auto seconds = std::chrono::ceil<std::chrono::seconds>(timeout).count();
  g_socket_client_set_timeout(client.get(), static_cast<guint>(std::max<int64_t>(seconds, 1)));
  g_socket_client_set_tls(client.get(), IsSecure(scheme));
  raw_error = nullptr;
  const ObjectPtr<GSocketConnection> connection(g_socket_client_connect_to_host(
      client.get(), host, static_cast<guint16>(port), nullptr, &raw_error));
  error.reset(raw_error);
  if (connection) {
    g_io_stream_close(G_IO_STREAM(connection.get()), nullptr, nullptr);
    return "";
  }
  if (!error) return "cannot connect to " + place;
  if (error->domain == G_RESOLVER_ERROR) {
    return "the name '" + std::string(host) + "' is not known (cannot be resolved)";
  }
  if (error->domain == G_TLS_ERROR) {
    return "the secure connection (TLS) to " + place + " failed: " + error->message;
  }
  if (g_error_matches(error.get(), G_IO_ERROR, G_IO_ERROR_CONNECTION_REFUSED)) {
    return MeaningOfConnectError(ECONNREFUSED, place);
  }
  if (g_error_matches(error.get(), G_IO_ERROR, G_IO_ERROR_TIMED_OUT)) {
    return MeaningOfConnectError(ETIMEDOUT, place);
  }
  return "cannot connect to " + place + ": " + error->message;
}

std::string MeaningOfConnectError(int error, const std::string& place) {
  if (error == ECONNREFUSED) return "connection refused: nothing listens at " + place;
  if (error == ETIMEDOUT) return "timed out: " + place + " does not answer";
  return "cannot connect to " + place + ": " + std::strerror(error);
}

std::string MeaningOfStatus(const std::string& text) {
  static const std::regex status(R"(([A-Z][A-Za-z' -]*) \((\d{3})\))");
  std::smatch found;
  if (!std::regex_search(text, found, status)) return "";
  const int code = std::stoi(found[2]);
  const std::string answer = " (" + found[2].str() + " " + found[1].str() + ")";
  if (code == 401) return "the server wants a user and a password, or refuses these" + answer;
  if (code == 403) return "the server refuses access" + answer;
  if (code == 404 || code == 410)
    return "not found: the server has nothing under this name" + answer;
  if (code == 407) return "a proxy wants a user and a password" + answer;
  if (code / 100 == 3) return "the server only redirects" + answer;
  if (code / 100 == 4) return "the server refuses the request" + answer;
  if (code / 100 == 5) return "the server failed" + answer;
  return "";
}

}  // namespace sluice
