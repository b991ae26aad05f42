#include "proto/source_rules.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <map>

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

// What is opened for `url`.
std::string Opened(const std::string& url, const SourceRules& rules,
                   const Resolver& resolve = kPublic) {
  return CheckSource(url, rules, resolve).uri;
}

TEST(SourceRulesTest, NothingIsAllowedUnlessItIsListed) {
  for (const char* url :
       {"http://example.com/a.mp4", "rtsp://example.com/", "file:///etc/passwd", "/etc/passwd",
        "camera", "camera:/dev/video0", "test", "test:smpte:1", "", "ftp://example.com/"}) {
    ExpectRefused(url, {});
  }
}

TEST(SourceRulesTest, PatternsMatchSchemeHostPortAndPathEachOnItsOwn) {
  const SourceRules rules{.urls = {"https://*.example.com/live/*", "rtsp://cam.lan:8554/*"}};
  for (const auto& [url, opened] : std::map<std::string, std::string>{
           {"https://a.example.com/live/1.m3u8", "https://a.example.com:443/live/1.m3u8"},
           {"HTTPS://A.Example.COM:443/live/x", "https://a.example.com:443/live/x"},
           {"https://user:se%40cret@a.example.com/live/x?y=1",
            "https://user:se%40cret@a.example.com:443/live/x?y=1"},
           {"rtsp://cam.lan:8554/main", "rtsp://cam.lan:8554/main"}}) {
    EXPECT_EQ(Opened(url, rules), opened);
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

TEST(SourceRulesTest, WhatParsersReadDifferentlyIsRefused) {
  const SourceRules rules{.urls = {"http://*/*", "http://*.*/*", "http://*.*.*/*", "rtsp://*/*"},
                          .private_addresses = true};
  for (const char* url : {"rtsp://u:p@127.0.0.1:9@listed-host/x",
                          "rtsp://u:p:q@host/x",
                          "rtsp://@host/x",
                          "rtsp://:p@host/x",
                          "rtsp://u@host/x",
                          "http://host:80:90/x",
                          "http://host:/x",
                          "http://host:0/x",
                          "http://host:080/x",
                          "http://host:65536/x",
                          "http://host:+80/x",
                          "http://ho%73t/x",
                          "http://host./x",
                          "http://.host/x",
                          "http://a..b/x",
                          "http://-host/x",
                          "http://h\xC3\xB6st/x",
                          "http://host\\@evil/x",
                          "http://host\t/x",
                          "http://host/x\r\nHost: evil",
                          "http://0x7f.1/x",
                          "http://127.1/x",
                          "http://2130706433/x",
                          "http://0x7f000001/x",
                          "http://0177.0.0.1/x",
                          "http://127.0.0.01/x",
                          "http://a.1/x",
                          "http://[::1%25lo]/x",
                          "http://[fe80::1%lo]/x",
                          "http://[::ffff:127.0.0.1]/x",
                          "http://[::ffff:7f00:1]/x",
                          "http://[::7f00:1]/x",
                          "http://[::1/x",
                          "http://[::1]x/x",
                          "http://[127.0.0.1]/x",
                          "http:///x",
                          "http://host/x#y",
                          "http://host/a%2fb",
                          "http://host/a%5cb",
                          "http://host/a%00",
                          "http://host/a%zz",
                          "http://host/<x>",
                          "http:host/x",
                          "http:/host/x",
                          "//host/x"}) {
    ExpectRefused(url, rules);
  }
  EXPECT_EQ(Opened("http://192.0.2.1/x", {.urls = {"http://*.*.*.*/*"}, .private_addresses = true}),
            "http://192.0.2.1:80/x");
  EXPECT_EQ(Opened("http://host", rules), "http://host:80/");
  EXPECT_EQ(Opened("http://host?x=/../y", rules), "http://host:80/?x=/../y");
}

TEST(SourceRulesTest, MessagesHoldNoPasswordAndNoQuery) {
  try {
    Opened("rtsp://user:secret@host/x?token=secret", {});
    FAIL() << "allowed";
  } catch (const InputError& error) {
    EXPECT_STREQ(error.what(), "[source] 'rtsp://host:554/x': this server's rules do not allow it");
  }
}

TEST(SourceRulesTest, PatternsThatAreNoneAreToldAtOnce) {
  for (const char* pattern : {"rtsp//cam/*", "ftp://cam/*", "rtsp://u@cam/*", "http://cam:*/*",
                              "file:///srv/*", "http://[::1%lo]/*"}) {
    EXPECT_THROW(CheckRules({.urls = {pattern}}), InputError) << pattern;
  }
  EXPECT_NO_THROW(
      CheckRules({.urls = {"test:*", "rtsp://*.cams.example.com/*", "http://[::1]/*"}}));
}

TEST(SourceRulesTest, HostsWithAnyAddressThatIsNotPublicAreRefusedUnlessAllowed) {
  SourceRules rules{.urls = {"http://*/*"}};
  for (const char* address : {"127.0.0.1",
                              "10.1.2.3",
                              "172.16.0.1",
                              "172.31.255.255",
                              "192.168.1.1",
                              "169.254.169.254",
                              "100.64.0.1",
                              "100.127.255.255",
                              "0.0.0.0",
                              "224.0.0.1",
                              "255.255.255.255",
                              "192.0.0.8",
                              "192.0.2.1",
                              "192.88.99.1",
                              "198.18.0.1",
                              "198.19.255.255",
                              "198.51.100.1",
                              "203.0.113.1",
                              "240.0.0.1",
                              "::1",
                              "::",
                              "fe80::1",
                              "fe80::1%eth0",
                              "fd00::1",
                              "ff02::1",
                              "::ffff:127.0.0.1",
                              "::ffff:8.8.8.8",
                              "::127.0.0.1",
                              "64:ff9b::a00:1",
                              "64:ff9b:1::808:808",
                              "2002:7f00:1::",
                              "2002:808:808::1",
                              "2001:0:1::1",
                              "2001:db8::1",
                              "2001:10::1",
                              "2001:2::1",
                              "100::1",
                              "3fff::1",
                              "nonsense",
                              ""}) {
    EXPECT_FALSE(IsPublicAddress(address)) << address;
    ExpectRefused("http://host/x", rules, To({address}));
    ExpectRefused("http://host/x", rules, To({"93.184.216.34", address}));
  }
  ExpectRefused("http://host/x", rules, To({}));
  for (const char* address : {"93.184.216.34", "172.32.0.1", "100.128.0.1", "198.20.0.1",
                              "2606:2800:220:1::1", "2001:200::1", "64:ff9b::808:808"}) {
    EXPECT_EQ(Opened("http://host/x", rules, To({address})), "http://host:80/x");
  }
  rules.private_addresses = true;
  EXPECT_EQ(Opened("http://host/x", rules, To({"127.0.0.1"})), "http://host:80/x");
}

TEST(SourceRulesTest, TheAddressesThatWereCheckedAreTheOnesThatAreConnectedTo) {
  int asked = 0;
  const ApartInput input =
      CheckSource("rtsp://u:p@cam.lan:8554/x", {.urls = {"rtsp://cam.lan:8554/*"}},
                  [&](const std::string& host) {
                    EXPECT_EQ(host, "cam.lan");
                    // Another one for whoever asks again.
                    return std::vector<std::string>{++asked == 1 ? "93.184.216.34" : "127.0.0.1"};
                  });
  EXPECT_EQ(asked, 1);
  EXPECT_EQ(input.host, "cam.lan");
  ASSERT_EQ(input.endpoints.size(), 1u);
  EXPECT_EQ(input.endpoints[0].address, "93.184.216.34");
  EXPECT_EQ(input.endpoints[0].port, 8554);
  EXPECT_FALSE(input.further);
}

TEST(SourceRulesTest, PlaylistsReachHostsThatAPatternAllowsAsAWhole) {
  const SourceRules rules{.urls = {"https://*.cdn.example/*", "http://cdn.example:8080/*",
                                   "https://other.example/live/*", "rtsp://cam.example/*"},
                          .playlists = true};
  const ApartInput input = CheckSource("https://a.cdn.example/list.m3u8", rules, kPublic);
  ASSERT_TRUE(input.further);
  const auto at = [&](const std::string& host) {
    std::vector<int> ports;
    for (const Endpoint& endpoint : input.further(host)) ports.push_back(endpoint.port);
    return ports;
  };
  using Ports = std::vector<int>;
  EXPECT_EQ(at("b.cdn.example"), Ports{443});
  EXPECT_EQ(at("cdn.example"), Ports{8080});
  EXPECT_EQ(at("other.example"), Ports{});  // only a part of it
  EXPECT_EQ(at("cam.example"), Ports{});
  EXPECT_THROW(at("127.1"), InputError);
  EXPECT_THROW(CheckFurtherHost("b.cdn.example", rules, To({"10.0.0.1"})), InputError);
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
  // Where the file that is opened for `url` lies.
  fs::path Place(const std::string& url) const {
    const ApartInput input = CheckSource(url, rules_);
    EXPECT_EQ(input.uri, "");
    return fs::read_symlink("/proc/self/fd/" + std::to_string(input.file.get()));
  }
  std::string Url(const std::string& path) const { return "file://" + root_.string() + "/" + path; }

  const fs::path root_;
  SourceRules rules_;
};

TEST_F(SourceFilesTest, FilesBelowADirectoryOfTheListAreAllowedByTheirRealPath) {
  const fs::path real = fs::canonical(root_);
  EXPECT_EQ(Place(Url("videos/a%20b.mp4")), real / "videos/a b.mp4");
  EXPECT_EQ(Place(Url("videos/deep/c.mp4")), real / "videos/deep/c.mp4");
  EXPECT_EQ(Place(Url("videos/inside")), real / "videos/deep/c.mp4");
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
  ASSERT_EQ(mkfifo((root_ / "videos/pipe").c_str(), 0600), 0);
  ExpectRefused(Url("videos/pipe"), rules_);
}

}  // namespace
}  // namespace sluice
