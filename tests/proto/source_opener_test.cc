#include "proto/source_opener.h"

#include <gmock/gmock.h>
#include <gst/gst.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "tests/support/http_server.h"
#include "tests/support/temporary_directory.h"

namespace sluice {
namespace {

using sluice::testing::HttpServer;
using ::testing::HasSubstr;

// Five pictures as a camera sends them, one after the other.
std::string FivePictures(const std::string& path) {
  gst_init(nullptr, nullptr);
  const std::string text =
      "videotestsrc num-buffers=5 ! video/x-raw,width=64,height=48,framerate=10/1 ! jpegenc ! "
      "multipartmux boundary=sluice ! filesink location=\"" +
      path + "\"";
  GstElement* pipeline = gst_parse_launch(text.c_str(), nullptr);
  gst_element_set_state(pipeline, GST_STATE_PLAYING);
  GstBus* bus = gst_element_get_bus(pipeline);
  gst_message_unref(gst_bus_timed_pop_filtered(
      bus, 60 * GST_SECOND, static_cast<GstMessageType>(GST_MESSAGE_EOS | GST_MESSAGE_ERROR)));
  gst_object_unref(bus);
  gst_element_set_state(pipeline, GST_STATE_NULL);
  gst_object_unref(pipeline);
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

TEST(SourceOpenerTest, ACameraThatHangsUpIsOpenedAgainInAnotherDecoderAndCounted) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "GStreamer is not instrumented, each of its handovers would look like a race";
#endif
  const TemporaryDirectory directory;
  const std::string pictures = FivePictures((directory.path() / "camera").string());
  const HttpServer camera([&](const std::string&) {
    return "HTTP/1.1 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=sluice\r\n"
           "Connection: close\r\n\r\n" +
           pictures;
  });
  const std::string host = "http://127.0.0.1:" + std::to_string(camera.port());
  Metrics metrics;
  SourceOpener opener({.urls = {host + "/*"}, .private_addresses = true}, {}, metrics);
  SourceOptions options;
  options.rate.every_nth = 1;
  options.max_frames = 8;
  options.reconnect.first_pause = std::chrono::milliseconds(1);
  std::vector<std::string> warnings;
  options.on_warning = [&](const std::string& line) { warnings.push_back(line); };
  const auto source = opener.Open(host + "/cam?token=hunter2", options);
  EXPECT_TRUE(source->info().endless);
  std::vector<int64_t> times;
  while (const FramePtr frame = source->Next()) times.push_back(frame->time.nanoseconds());
  EXPECT_EQ(times.size(), 8u);
  EXPECT_TRUE(std::is_sorted(times.begin(), times.end()));
  EXPECT_EQ(camera.requests().size(), 2u);
  EXPECT_EQ(metrics.counter("sluice_source_reconnections_total", "").value(), 1);
  ASSERT_GE(warnings.size(), 2u);
  EXPECT_THAT(warnings[1], HasSubstr("was away for"));
  for (const std::string& line : warnings) EXPECT_EQ(line.find("hunter2"), std::string::npos);
}

}  // namespace
}  // namespace sluice
