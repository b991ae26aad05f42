// Playlists, played by a decoder apart: whatever a playlist says, only what the rules allow is
// reached, and the decoder ends.
#include <atomic>
#include <chrono>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "streaming/apart/apart_source.h"
#include "tests/fuzz/targets.h"
#include "tests/support/http_server.h"

namespace sluice {
namespace {

using testing::HttpServer;

std::string Replaced(std::string text, const std::string& what, const std::string& with) {
  for (size_t at = 0; (at = text.find(what, at)) != text.npos; at += with.size()) {
    text.replace(at, what.size(), with);
  }
  return text;
}

}  // namespace

// "{listed}" and "{unlisted}" stand for servers, of which the rules allow the first.
void FuzzPlaylist(std::string_view bytes) {
  static const std::string clip = [] {
    std::ifstream in(SLUICE_SOURCE_DIR "/demos/clips/parade.mp4", std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(in), {});
  }();
  static std::atomic<int> strayed = 0;
  static const HttpServer unlisted([](const std::string&) {
    ++strayed;
    return HttpServer::Ok("video/mp4", clip);
  });
  static std::string playlist;
  static const HttpServer listed([](const std::string& request) {
    return request.starts_with("GET /clip.mp4") || request.starts_with("HEAD ")
               ? HttpServer::Ok("video/mp4", clip)
               : HttpServer::Ok("application/vnd.apple.mpegurl", playlist);
  });
  const std::string place = "media.sluice.invalid:" + std::to_string(listed.port());
  playlist = Replaced(std::string(bytes), "{listed}", "http://" + place);
  playlist =
      Replaced(playlist, "{unlisted}", "http://127.0.0.1:" + std::to_string(unlisted.port()));

  ApartInput input;
  input.uri = input.label = "http://" + place + "/list.m3u8";
  input.host = "media.sluice.invalid";
  input.endpoints = {{"127.0.0.1", listed.port()}};
  input.further = [endpoints = input.endpoints](const std::string& host) {
    return host == "media.sluice.invalid" ? endpoints : std::vector<Endpoint>{};
  };
  ApartOptions options;
  options.playlists = true;
  options.frame_cpu_seconds = 5;
  SourceOptions source;
  source.rate.fps = 0.5;
  source.max_frames = 2;
  source.stall_timeout = std::chrono::milliseconds(500);
  source.reconnect.most_tries = 0;
  const auto opened = OpenApart(std::move(input), source, options);
  while (opened->Next()) {
  }
  if (strayed > 0) throw std::logic_error("a server was reached that the rules do not allow");
}

}  // namespace sluice
