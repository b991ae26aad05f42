#include "streaming/redact.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace sluice {
namespace {

using testing::HasSubstr;
using testing::Not;

TEST(RedactTest, HidesUserPasswordAndQuery) {
  EXPECT_EQ(RedactUrl("rtsp://user:hunter2@host:554/x"), "rtsp://***@host:554/x");
  EXPECT_EQ(RedactUrl("http://token@host/x.m3u8?sig=abc&exp=1#t"), "http://***@host/x.m3u8?***");
  EXPECT_EQ(RedactUrl("http://host/x#secret"), "http://host/x#***");
  EXPECT_EQ(RedactUrl("http://[::1]:80/x"), "http://[::1]:80/x");
}

TEST(RedactTest, HidesPasswordsThatHoldWhatEndsAHost) {
  for (const char* password :
       {"p@ss", "pa/ss", "pa/s@s", "pa?ss", "pa#ss", "12/34", "12@34/56", "12?34", "a/b/c@d/e"}) {
    const std::string url = std::string("rtsp://user:") + password + "@host/x";
    EXPECT_EQ(RedactUrl(url), "rtsp://***@host/x") << url;
    EXPECT_THAT(Redactor(url)("Cannot reach " + url + ", password " + password),
                Not(HasSubstr(password)));
  }
}

TEST(RedactTest, LeavesAnAtSignInAPathAndWhatIsNoUrl) {
  EXPECT_EQ(RedactUrl("https://host/@someone/film.mp4"), "https://host/@someone/film.mp4");
  EXPECT_EQ(RedactUrl("/home/a@b/what?.mp4"), "/home/a@b/what?.mp4");
  EXPECT_EQ(RedactUrl("file:///home/a@b/what%3F.mp4"), "file:///home/a@b/what%3F.mp4");
  EXPECT_EQ(RedactUrl("camera:/dev/video0"), "camera:/dev/video0");
  EXPECT_EQ(RedactUrl(""), "");
}

TEST(RedactTest, TakesSecretsOutOfALibrarysText) {
  const Redactor redact("http://u:s%40cret@host/x.m3u8?token=hunter2&exp=1700000000");
  const std::string line = redact(
      "Not Found (404), URL: http://u:s%40cret@host/x.m3u8?token=hunter2&exp=1700000000, Redirect "
      "to: 'http://v:other@cdn/y.ts?token=hunter2' (s@cret, u:s@cret, hunter2, 1700000000)");
  for (const char* secret : {"s%40cret", "s@cret", "hunter2", "other", "1700000000"}) {
    EXPECT_THAT(line, Not(HasSubstr(secret))) << line;
  }
  EXPECT_THAT(line, HasSubstr("Not Found (404), URL: http://***@host/x.m3u8?***"));
  EXPECT_THAT(line, HasSubstr("'http://***@cdn/y.ts?***'"));
}

TEST(RedactTest, LeavesOtherWordsAlone) {
  EXPECT_EQ(Redactor("rtsp://host/x")("Could not open resource: host"),
            "Could not open resource: host");
  EXPECT_EQ(Redactor("/a/b.mp4")("see a://b"), "see a://b");
  // Too short to be looked for apart from its URL: every e of a message would go.
  EXPECT_EQ(Redactor("rtsp://u:e@host/x")("The end of rtsp://u:e@host/x"),
            "The end of rtsp://***@host/x");
}

}  // namespace
}  // namespace sluice
