#include "proto/server_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "runtime/error.h"

namespace sluice {
namespace {

using ::testing::HasSubstr;

class ServerConfigTest : public ::testing::Test {
 protected:
  ~ServerConfigTest() override { std::filesystem::remove(file_); }
  ServerConfig Read(const std::string& text) const {
    std::ofstream(file_) << text;
    ServerConfig config;
    ReadServerConfig(file_, config);
    return config;
  }
  void ExpectRefused(const std::string& text, const std::string& part) const {
    try {
      Finished(Read(text));
      ADD_FAILURE() << "was taken: " << text;
    } catch (const InputError& error) {
      EXPECT_THAT(error.what(), HasSubstr(part)) << text;
    }
  }
  const std::filesystem::path file_ = std::filesystem::path(::testing::TempDir()) /
                                      ("server_config_" + std::to_string(getpid()) + ".json");
};

TEST_F(ServerConfigTest, EverySettingOfTheFileArrives) {
  const ServerConfig config = Read(R"({
    "listen": "[::1]:7", "max_streams": 9, "answer_seconds": 2.5, "source_private": true,
    "source_urls": ["rtsp://a/*"], "source_directories": ["/srv"], "max_message_mb": 3,
    "stream_kv_mb": 2, "model": "m",
    "tokens": [{"name": "n", "sha256": "00", "expires": "1970-01-02T00:00:01Z", "sessions": 4}]})");
  const ServiceOptions options = Finished(config);
  EXPECT_EQ(options.listen, "[::1]:7");
  EXPECT_EQ(config.scheduler.max_streams, 9);
  EXPECT_EQ(options.budget.answer_seconds, 2.5);
  EXPECT_EQ(options.budget.kv_bytes, 2 << 20);
  EXPECT_EQ(options.message_bytes, 3 << 20);
  EXPECT_TRUE(options.sources.private_addresses);
  EXPECT_EQ(options.sources.urls, std::vector<std::string>{"rtsp://a/*"});
  ASSERT_EQ(options.sources.directories.size(), 1u);
  EXPECT_EQ(config.model, "m");
  ASSERT_EQ(options.tokens.size(), 1u);
  EXPECT_EQ(options.tokens[0].sessions, 4);
  EXPECT_EQ(options.tokens[0].expires->time_since_epoch(), std::chrono::seconds(86401));
}

TEST_F(ServerConfigTest, UnknownNamesAreRefusedWithTheNearest) {
  ExpectRefused(R"({"max_stream": 3})", "nearest is 'max_streams'");
  ExpectRefused(R"({"tokens": [{"sha265": ""}]})", "nearest is 'sha256'");
}

TEST_F(ServerConfigTest, WhatIsOfTheWrongKindOrOutOfRangeIsRefused) {
  ExpectRefused("{", "is not JSON");
  ExpectRefused("[]", "one JSON object");
  ExpectRefused(R"({"max_streams": "3"})", "'max_streams'");
  ExpectRefused(R"({"max_streams": 2.5})", "'max_streams'");
  ExpectRefused(R"({"max_streams": 99999999999})", "'max_streams'");
  ExpectRefused(R"({"max_streams": 0})", "max_streams");
  ExpectRefused(R"({"max_message_mb": 5000})", "max_message_mb");
  ExpectRefused(R"({"dtype": "int8"})", "dtype");
  ExpectRefused(R"({"tokens": {}})", "tokens");
  for (const char* time :
       {"tomorrow", "2030-13-01T00:00:00Z", "2030-02-30T00:00:00Z", "2030-01-01T25:00:00Z",
        "2030-01-01T00:00:00", "2030-01-01T00:00:00Zx"}) {
    ExpectRefused(R"({"tokens": [{"expires": ")" + std::string(time) + "\"}]}", "expires");
  }
}

}  // namespace
}  // namespace sluice
