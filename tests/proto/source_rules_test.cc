#include "proto/source_rules.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>

#include "runtime/error.h"

namespace sluice {
namespace {

namespace fs = std::filesystem;

Resolver To(std::vector<std::string> addresses) {
  return [addresses](const std::string&) { return addresses; };
}
const Resolver kPublic = To({"93.184.216.34"});

void ExpectRefused(const std::string& url, const SourceRules& rules,
                   const Resolver& resolve = kPublic) {
  EXPECT_THROW(CheckSource(url, rules, resolve), InputError) << url;
}

TEST(SourceRulesTest, NothingIsAllowedUnlessItIsListed) {
  for (const char* url :
       {"http://example.com/a.mp4", "rtsp://example.com/", "file:///etc/passwd", "/etc/passwd",
        "camera", "camera:/dev/video0", "test", "test:smpte:1", "", "ftp://example.com/"}) {
    ExpectRefused(url, {});
  }
}

TEST(SourceRulesTest, PatternsMatchSchemeHostPortAndPathEachOnItsOwn) {
  const SourceRules rules{.urls = {"https://*.example.com/live/*", "rtsp://cam.lan:8554/*"},
                          .directories = {},
                          .private_addresses = false};
  for (const char* url : {"https://a.example.com/live/1.m3u8", "HTTPS://A.Example.COM/live/x",
                          "https://user:secret@a.example.com/live/x", "rtsp://cam.lan:8554/main"}) {
    EXPECT_EQ(CheckSource(url, rules, kPublic), url);
  }
  for (const char* url :
       {"http://a.example.com/live/1", "https://a.b.example.com/live/1",
        "https://example.com/live/1", "https://a.example.com/other",
        "https://a.example.com:444/live/1", "https://a.example.com.evil.org/live/1",
        "https://a.example.com@evil.org/live/1", "https://evil.org/https://a.example.com/live/1",
        "https://evil.org#.example.com/live/1", "https://evil.org\\.example.com/live/1",
        "https://a.example.com/live/../secret", "https://a.example.com/live/%2e%2e/secret",
        "rtsp://cam.lan/main", "https://a.example.com/live/ x"}) {
    ExpectRefused(url, rules);
  }
}

TEST(SourceRulesTest, HostsWithAnyAddressThatIsNotPublicAreRefusedUnlessAllowed) {
  SourceRules rules{.urls = {"http://*/*", "http://*.*/*", "http://*.*.*.*/*"},
                    .directories = {},
                    .private_addresses = false};
  for (const char* address :
       {"127.0.0.1", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254",
        "100.64.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1",
        "fe80::1%eth0", "fd00::1", "ff02::1", "::ffff:127.0.0.1", "64:ff9b::a00:1",
        "2002:7f00:1::"}) {
    ExpectRefused("http://host/x", rules, To({address}));
    ExpectRefused("http://host/x", rules, To({"93.184.216.34", address}));
  }
  ExpectRefused("http://host/x", rules, To({}));
  for (const char* address : {"93.184.216.34", "172.32.0.1", "2606:2800:220:1::1"}) {
    EXPECT_EQ(CheckSource("http://host/x", rules, To({address})), "http://host/x");
  }
  rules.private_addresses = true;
  EXPECT_EQ(CheckSource("http://host/x", rules, To({"127.0.0.1"})), "http://host/x");
}

TEST(SourceRulesTest, NumbersInOddFormsAreStillTheAddressTheyMean) {
  const SourceRules rules{
      .urls = {"http://*/*", "http://*.*/*"}, .directories = {}, .private_addresses = false};
  for (const char* url :
       {"http://2130706433/x", "http://0x7f000001/x", "http://127.1/x", "http://[::1]/x"}) {
    ExpectRefused(url, rules, ResolveHost);
  }
}

class SourceFilesTest : public ::testing::Test {
 protected:
  SourceFilesTest()
      : root_(fs::path(::testing::TempDir()) / ("source_rules_" + std::to_string(getpid()))) {
    fs::create_directories(root_ / "videos/deep");
    fs::create_directories(root_ / "videos_private");
    for (const char* file : {"videos/a b.mp4", "videos/deep/c.mp4", "secret", "videos_private/d"}) {
      std::ofstream(root_ / file) << "x";
    }
    fs::create_symlink(root_ / "secret", root_ / "videos/link");
    fs::create_directory_symlink(root_, root_ / "videos/up");
    fs::create_symlink(root_ / "videos/deep/c.mp4", root_ / "videos/inside");
    rules_.directories = {root_ / "videos"};
  }
  ~SourceFilesTest() override { fs::remove_all(root_); }
  std::string Url(const std::string& path) const { return "file://" + root_.string() + "/" + path; }

  const fs::path root_;
  SourceRules rules_;
};

TEST_F(SourceFilesTest, FilesBelowADirectoryOfTheListAreAllowedByTheirRealPath) {
  const fs::path real = fs::canonical(root_);
  EXPECT_EQ(CheckSource(Url("videos/a%20b.mp4"), rules_), (real / "videos/a b.mp4").string());
  EXPECT_EQ(CheckSource(Url("videos/deep/c.mp4"), rules_), (real / "videos/deep/c.mp4").string());
  EXPECT_EQ(CheckSource(Url("videos/inside"), rules_), (real / "videos/deep/c.mp4").string());
}

TEST_F(SourceFilesTest, NoWayLeadsOutOfTheDirectory) {
  for (const char* path : {"secret", "videos/../secret", "videos/%2e%2e/secret", "videos/link",
                           "videos/up/secret", "videos_private/d", "videos", "videos/deep",
                           "videos/missing", "videos/a%00b", "videos/a%2", "videos/deep/%zz"}) {
    ExpectRefused(Url(path), rules_);
  }
  ExpectRefused("file:///etc/passwd", rules_);
  ExpectRefused("file://otherhost" + root_.string() + "/videos/deep/c.mp4", rules_);
  ExpectRefused((root_ / "videos/deep/c.mp4").string(), rules_);  // a path is no URL
}

}  // namespace
}  // namespace sluice
