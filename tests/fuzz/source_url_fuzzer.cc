// URLs of sources: what ours accepts, those of the libraries that connect must read the same way.
#include <gio/gio.h>
#include <gst/gst.h>
#include <gst/rtsp/gstrtspurl.h>

#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

#include "proto/source_url.h"
#include "tests/fuzz/targets.h"

namespace sluice {
namespace {

template <auto Free>
struct Deleter {
  template <typename T>
  void operator()(T* p) const {
    Free(p);
  }
};
template <typename T, auto Free>
using Owned = std::unique_ptr<T, Deleter<Free>>;
using Chars = Owned<gchar, g_free>;

void Same(const char* reader, const char* part, const std::string& ours,
          const std::string& theirs) {
  if (ours == theirs) return;
  throw std::logic_error(std::string(reader) + " reads the " + part + " as '" + theirs +
                         "', we as '" + ours + "'");
}
std::string TextOf(const gchar* text) { return text ? text : ""; }
// Some keep %41, others make it 'A': the same to every server.
std::string Decoded(const std::string& text) {
  const Chars decoded(g_uri_unescape_string(text.c_str(), nullptr));
  return TextOf(decoded.get());
}

void CompareWithGlib(const SourceUrl& url, const std::string& text) {
  const Owned<GUri, g_uri_unref> uri(
      g_uri_parse(text.c_str(),
                  static_cast<GUriFlags>(G_URI_FLAGS_ENCODED | G_URI_FLAGS_HAS_PASSWORD), nullptr));
  if (!uri) throw std::logic_error("GLib refuses what we accept");
  Same("GLib", "scheme", url.scheme, TextOf(g_uri_get_scheme(uri.get())));
  Same("GLib", "host", url.host, TextOf(g_uri_get_host(uri.get())));
  Same("GLib", "userinfo", Decoded(url.userinfo), Decoded(TextOf(g_uri_get_userinfo(uri.get()))));
  const gchar* query = g_uri_get_query(uri.get());
  Same("GLib", "path", Decoded(url.path),
       Decoded(TextOf(g_uri_get_path(uri.get())) + (query ? "?" + std::string(query) : "")));
  if (url.is_file()) return;
  Same("GLib", "port", std::to_string(url.port), std::to_string(g_uri_get_port(uri.get())));

  const Owned<GSocketConnectable, g_object_unref> address(
      g_network_address_parse_uri(text.c_str(), 1, nullptr));
  if (!address) return;  // it decodes all parts, and refuses what then is not UTF-8
  auto* network = G_NETWORK_ADDRESS(address.get());
  Same("GLib", "address", url.host, g_network_address_get_hostname(network));
  Same("GLib", "address's port", std::to_string(url.port),
       std::to_string(g_network_address_get_port(network)));
}

void CompareWithGStreamer(const SourceUrl& url, const std::string& text) {
  const Owned<GstUri, gst_uri_unref> uri(gst_uri_from_string(text.c_str()));
  if (!uri) throw std::logic_error("GStreamer refuses what we accept");
  Same("GStreamer", "scheme", url.scheme, TextOf(gst_uri_get_scheme(uri.get())));
  Same("GStreamer", "host", url.host, TextOf(gst_uri_get_host(uri.get())));
  const std::string path = url.path.substr(0, url.path.find('?'));
  const Chars theirs(gst_uri_get_path(uri.get()));
  Same("GStreamer", "path", Decoded(path), TextOf(theirs.get()));
  if (!url.is_file()) {
    Same("GStreamer", "port", std::to_string(url.port),
         std::to_string(gst_uri_get_port(uri.get())));
  }
  if (!url.scheme.starts_with("rtsp")) return;
  GstRTSPUrl* parsed = nullptr;
  if (gst_rtsp_url_parse(text.c_str(), &parsed) != GST_RTSP_OK) {
    throw std::logic_error("GStreamer's RTSP refuses what we accept");
  }
  const Owned<GstRTSPUrl, gst_rtsp_url_free> rtsp(parsed);
  Same("RTSP", "host", url.host, TextOf(rtsp->host));
  Same("RTSP", "port", std::to_string(url.port), std::to_string(rtsp->port));
  Same("RTSP", "path", url.path,
       TextOf(rtsp->abspath) + (rtsp->query ? "?" + std::string(rtsp->query) : ""));
}

}  // namespace

void FuzzSourceUrl(std::string_view bytes) {
  static const bool started = [] {  // its URIs need no plugin
    setenv("GST_PLUGIN_SYSTEM_PATH_1_0", "", 0);
    gst_registry_fork_set_enabled(FALSE);
    return gst_init_check(nullptr, nullptr, nullptr) != FALSE;
  }();
  if (!started) throw std::logic_error("GStreamer does not start");
  const SourceUrl url = ParseSourceUrl(bytes);
  const std::string text = url.Text();
  Same("our own parser", "rebuilt URL", text, ParseSourceUrl(text).Text());
  CompareWithGlib(url, text);
  CompareWithGStreamer(url, text);
}

}  // namespace sluice
