// Sources behind a network and in pipes, against servers on loopback.
#include <fcntl.h>
#include <gio/gio.h>
#include <gmock/gmock.h>
#include <gst/gst.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <future>
#include <string>
#include <thread>
#include <vector>

#include "runtime/error.h"
#include "streaming/connection_check.h"
#include "streaming/gst_source.h"
#include "streaming/source.h"
#include "tests/support/http_server.h"
#include "tests/support/temporary_directory.h"

namespace sluice {
namespace {

using sluice::testing::HttpServer;
using sluice::testing::NoTlsServer;
using sluice::testing::SilentPlace;
using std::chrono::milliseconds;
using std::chrono::seconds;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

bool HasElement(const char* name) {
  GstElementFactory* factory = gst_element_factory_find(name);
  if (factory) gst_object_unref(factory);
  return factory != nullptr;
}

class NetworkSourceTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { gst_init(nullptr, nullptr); }
  void SetUp() override {
#ifdef __SANITIZE_THREAD__
    GTEST_SKIP() << "GStreamer is not instrumented, each of its handovers would look like a race";
#endif
    if (!HasElement("souphttpsrc")) GTEST_SKIP() << "souphttpsrc is not installed";
  }

  // `frames` pictures, 10 a second, through `chain` in gst-launch's notation.
  std::string Media(const std::string& chain, int frames = 20) {
    const std::string path = directory_.path() / "media";
    const std::string text = "videotestsrc num-buffers=" + std::to_string(frames) +
                             " ! video/x-raw,width=64,height=48,framerate=10/1 ! " + chain +
                             " ! filesink location=\"" + path + "\"";
    GstElement* pipeline = gst_parse_launch(text.c_str(), nullptr);
    gst_element_set_state(pipeline, GST_STATE_PLAYING);
    GstBus* bus = gst_element_get_bus(pipeline);
    GstMessage* message = gst_bus_timed_pop_filtered(
        bus, 60 * GST_SECOND, static_cast<GstMessageType>(GST_MESSAGE_EOS | GST_MESSAGE_ERROR));
    EXPECT_TRUE(message && GST_MESSAGE_TYPE(message) == GST_MESSAGE_EOS) << text;
    if (message) gst_message_unref(message);
    gst_object_unref(bus);
    gst_element_set_state(pipeline, GST_STATE_NULL);
    gst_object_unref(pipeline);
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }

  static std::string Url(const HttpServer& server, const std::string& path,
                         const std::string& user = "") {
    return "http://" + user + "127.0.0.1:" + std::to_string(server.port()) + path;
  }
  static std::string Empty(const std::string& status) {
    return "HTTP/1.1 " + status + "\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
  }
  // Ends where the connection does.
  static std::string WithoutLength(const std::string& type, const std::string& body) {
    return "HTTP/1.1 200 OK\r\nContent-Type: " + type + "\r\nConnection: close\r\n\r\n" + body;
  }

  static SourceOptions All() {
    SourceOptions options;
    options.rate.every_nth = 1;
    return options;
  }
  static std::string ErrorOf(const std::string& source, const SourceOptions& options = All()) {
    try {
      Source::Open(source, options);
    } catch (const InputError& error) {
      return error.what();
    }
    return "opened";
  }
  static int Count(Source& source) {
    int frames = 0;
    while (source.Next()) ++frames;
    return frames;
  }

  TemporaryDirectory directory_;
};

TEST_F(NetworkSourceTest, AFileWithoutALengthIsAFile) {
  for (const char* chain : {"jpegenc ! matroskamux", "theoraenc ! oggmux", "jpegenc ! qtmux"}) {
    SCOPED_TRACE(chain);
    const std::string bytes = Media(chain);
    const HttpServer server(
        [&](const std::string&) { return WithoutLength("application/octet-stream", bytes); });
    const auto source = Source::Open(Url(server, "/a"), All());
    EXPECT_FALSE(source->info().live) << "it can be asked to wait";
    EXPECT_FALSE(source->info().endless);
    EXPECT_EQ(Count(*source), 20);
    EXPECT_EQ(source->warning(), std::nullopt);
  }
}

TEST_F(NetworkSourceTest, TheRangeThatAnMp4StatesIsHonoured) {
  if (!HasElement("x264enc")) GTEST_SKIP() << "x264enc is not installed";
  std::string bytes = Media(
      "videoconvert ! video/x-raw,format=I420,colorimetry=bt709 ! x264enc ! h264parse ! mp4mux",
      10);
  const auto first_level = [&] {
    const HttpServer server([&](const std::string&) { return HttpServer::Ok("video/mp4", bytes); });
    return static_cast<int>(Source::Open(Url(server, "/a.mp4"), All())->Next()->rgb.at(0));
  };
  const int narrow = first_level();  // of a white of 191
  const size_t colr = bytes.find("colrnclx");
  ASSERT_NE(colr, std::string::npos);
  bytes[colr + 14] = static_cast<char>(0x80);
  EXPECT_NEAR(first_level(), 16 + narrow * 219 / 255, 3);
}

TEST_F(NetworkSourceTest, BeginOfAFileThatCannotBeSoughtIsReachedByPassingOver) {
  const std::string bytes = Media("jpegenc ! matroskamux");
  const HttpServer server(
      [&](const std::string&) { return WithoutLength("video/x-matroska", bytes); });
  SourceOptions options = All();
  options.begin = MediaTime::FromSeconds(1);
  const auto source = Source::Open(Url(server, "/a.mkv"), options);
  const FramePtr first = source->Next();
  ASSERT_NE(first, nullptr);
  EXPECT_NEAR(first->time.seconds(), 1.0, 1e-3);
  EXPECT_EQ(Count(*source), 9);
}

TEST_F(NetworkSourceTest, ACameraThatHangsUpIsOpenedAgain) {
  const std::string bytes = Media("jpegenc ! multipartmux boundary=sluice", 5);
  const HttpServer server([&](const std::string&) {
    return WithoutLength("multipart/x-mixed-replace; boundary=sluice", bytes);
  });
  SourceOptions options = All();
  options.max_frames = 8;
  options.reconnect.first_pause = milliseconds(1);
  std::vector<std::string> warnings;
  options.on_warning = [&](const std::string& line) { warnings.push_back(line); };
  const auto source = Source::Open(Url(server, "/cam?token=hunter2"), options);
  EXPECT_TRUE(source->info().live);
  EXPECT_TRUE(source->info().endless);
  std::vector<int64_t> times;
  while (const FramePtr frame = source->Next()) times.push_back(frame->time.nanoseconds());
  EXPECT_EQ(times.size(), 8u);
  EXPECT_TRUE(std::is_sorted(times.begin(), times.end()));
  EXPECT_GE(server.requests().size(), 2u);
  ASSERT_GE(warnings.size(), 2u);
  EXPECT_THAT(warnings[0], AllOf(HasSubstr("closed the connection"), HasSubstr("/cam?***")));
  EXPECT_THAT(warnings[1], HasSubstr("was away for"));
  for (const std::string& line : warnings) EXPECT_THAT(line, Not(HasSubstr("hunter2")));
}

TEST_F(NetworkSourceTest, ACameraThatHangsUpHasEndedIfItIsNotToBeOpenedAgain) {
  const std::string bytes = Media("jpegenc ! multipartmux boundary=sluice", 5);
  const HttpServer server([&](const std::string&) {
    return WithoutLength("multipart/x-mixed-replace; boundary=sluice", bytes);
  });
  SourceOptions options = All();
  options.reconnect.most_tries = 0;
  const auto source = Source::Open(Url(server, "/cam"), options);
  EXPECT_EQ(Count(*source), 5);
  EXPECT_EQ(server.requests().size(), 1u);
}

TEST_F(NetworkSourceTest, SaysWhyThereIsNoConnection) {
  const std::string nobody = [] {  // a port that was free a moment ago
    const HttpServer server([](const std::string&) { return std::string(); });
    return "127.0.0.1:" + std::to_string(server.port());
  }();
  EXPECT_THAT(ErrorOf("http://" + nobody + "/x.mp4"), HasSubstr("connection refused"));
  EXPECT_THAT(ErrorOf("http://no-such-host.invalid/x.mp4"),
              HasSubstr("the name 'no-such-host.invalid' is not known"));
  if (HasElement("rtspsrc")) {
    EXPECT_THAT(ErrorOf("rtsp://" + nobody + "/x"), HasSubstr("connection refused"));
    EXPECT_THAT(ErrorOf("rtsp://no-such-host.invalid/x"), HasSubstr("is not known"));
  }
}

TEST_F(NetworkSourceTest, SaysThatNobodyAnswers) {
  const SilentPlace silent;
  const std::string place = "127.0.0.1:" + std::to_string(silent.port());
  SourceOptions options = All();
  options.stall_timeout = milliseconds(100);
  EXPECT_THAT(ErrorOf("http://" + place + "/x.mp4", options),
              HasSubstr("timed out: " + place + " does not answer"));
}

TEST_F(NetworkSourceTest, SaysThatAServerWhichCanBeReachedSendsNothing) {
  std::promise<void> asked;
  const HttpServer server([&, over = asked.get_future().share()](const std::string&) {
    over.wait();
    return std::string();
  });
  SourceOptions options = All();
  options.stall_timeout = milliseconds(100);
  EXPECT_THAT(ErrorOf(Url(server, "/x.mp4"), options),
              HasSubstr("nothing arrived for 0.1 s, although the server can be reached"));
  asked.set_value();
}

TEST_F(NetworkSourceTest, SaysWhatTheServerAnswered) {
  const HttpServer server([](const std::string& request) {
    if (request.starts_with("GET /401")) return Empty("401 Unauthorized");
    if (request.starts_with("GET /403")) return Empty("403 Forbidden");
    if (request.starts_with("GET /503")) return Empty("503 Service Unavailable");
    return Empty("404 Not Found");
  });
  EXPECT_THAT(ErrorOf(Url(server, "/401")),
              AllOf(HasSubstr("a user and a password"), HasSubstr("401")));
  EXPECT_THAT(ErrorOf(Url(server, "/403")), AllOf(HasSubstr("refuses access"), HasSubstr("403")));
  EXPECT_THAT(ErrorOf(Url(server, "/404")), AllOf(HasSubstr("not found"), HasSubstr("404")));
  EXPECT_THAT(ErrorOf(Url(server, "/503")), AllOf(HasSubstr("server failed"), HasSubstr("503")));
}

TEST_F(NetworkSourceTest, SaysThatTlsFailed) {
  if (!g_tls_backend_supports_tls(g_tls_backend_get_default())) GTEST_SKIP() << "GLib has no TLS";
  const NoTlsServer server;
  const std::string place = "127.0.0.1:" + std::to_string(server.port());
  EXPECT_THAT(ErrorOf("https://" + place + "/x.mp4"),
              HasSubstr("the secure connection (TLS) to " + place + " failed"));
}

TEST_F(NetworkSourceTest, KeepsSecretsOutOfWhatLibrariesSay) {
  const HttpServer server([](const std::string&) { return Empty("404 Not Found"); });
  for (const char* user : {"u:hunter2@", "u:hun%2Fter2@", "u:hun/ter2@", "u:hun@ter2@"}) {
    for (const char* path : {"/x.mp4", "/x.m3u8?token=hunter3"}) {
      const std::string error = ErrorOf(Url(server, path, user));
      EXPECT_THAT(error,
                  AllOf(HasSubstr("[source] 'http://***@127.0.0.1"), Not(HasSubstr("hunter")),
                        Not(HasSubstr("ter2")), Not(HasSubstr("\n"))));
    }
  }
}

TEST_F(NetworkSourceTest, SilenceBetweenSegmentsIsNoStall) {
  EXPECT_EQ(SilenceAllowed(seconds(10), false, seconds(0)), seconds(10));
  EXPECT_EQ(SilenceAllowed(seconds(10), true, seconds(0)), seconds(30)) << "before any is known";
  EXPECT_EQ(SilenceAllowed(seconds(10), true, seconds(2)), seconds(14));
  EXPECT_EQ(SilenceAllowed(seconds(1), true, seconds(10)), seconds(21));
}

TEST_F(NetworkSourceTest, APlaylistThatGrowsHasNoEndAndIsNotHurried) {
  if (!HasElement("hlsdemux")) GTEST_SKIP() << "hlsdemux is not installed";
  const std::string bytes = Media("x264enc key-int-max=10 ! h264parse ! mpegtsmux", 40);
  for (const bool ended : {false, true}) {
    const HttpServer server([&](const std::string& request) {
      if (request.find(".m3u8") == std::string::npos) return HttpServer::Ok("video/mp2t", bytes);
      return HttpServer::Ok("application/vnd.apple.mpegurl",
                            std::string("#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:4\n"
                                        "#EXTINF:4,\n0.ts\n#EXTINF:4,\n1.ts\n#EXTINF:4,\n2.ts\n") +
                                (ended ? "#EXT-X-ENDLIST\n" : ""));
    });
    SourceOptions options = All();
    options.max_frames = 10;
    const auto source = Source::Open(Url(server, "/a.m3u8"), options);
    EXPECT_EQ(source->info().endless, !ended);
    EXPECT_FALSE(source->info().live) << "its segments wait at the server";
    EXPECT_EQ(Count(*source), 10);
    if (!ended) {
      options.begin = MediaTime::FromSeconds(1);
      EXPECT_THAT(ErrorOf(Url(server, "/a.m3u8"), options), HasSubstr("need a recording"));
    }
  }
}

// ---- Pipes -----------------------------------------------------------------------------------

TEST_F(NetworkSourceTest, ReadsANamedPipeAndWaitsForItsWriter) {
  const std::string bytes = Media("jpegenc ! matroskamux streamable=true");
  const std::string pipe = directory_.path() / "pipe";
  ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
  std::thread writer([&] {
    const int descriptor = open(pipe.c_str(), O_WRONLY);  // waits for the reader
    ASSERT_GE(descriptor, 0);
    for (size_t sent = 0; sent < bytes.size();) {
      const ssize_t n = write(descriptor, bytes.data() + sent, bytes.size() - sent);
      if (n <= 0) break;
      sent += static_cast<size_t>(n);
    }
    close(descriptor);
  });
  SourceOptions options = All();
  options.begin = MediaTime::FromSeconds(0.5);
  options.stall_timeout = milliseconds(1);  // a pipe's writer takes the time it needs
  const auto source = Source::Open(pipe, options);
  EXPECT_FALSE(source->info().live);
  EXPECT_EQ(Count(*source), 15);
  writer.join();
}

}  // namespace
}  // namespace sluice
