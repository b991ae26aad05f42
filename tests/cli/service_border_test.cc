// What `sluice serve` refuses before it reads a model, and `sluice token`.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>

#include "proto/access.h"
#include "proto/metrics_endpoint.h"
#include "tests/support/temporary_directory.h"

namespace sluice {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

class ServiceBorderTest : public ::testing::Test {
 protected:
  struct Outcome {
    int exit_code = -1;
    std::string out, err;
  };
  Outcome Sluice(const std::string& arguments) const {
    const auto out = directory_.path() / "out", err = directory_.path() / "err";
    const int status = std::system((SLUICE_PROGRAM " " + arguments + " >" + out.string() + " 2>" +
                                    err.string() + " </dev/null")
                                       .c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, Text(out), Text(err)};
  }
  static std::string Text(const std::filesystem::path& file) {
    std::stringstream text;
    text << std::ifstream(file).rdbuf();
    return text.str();
  }
  // With a model that does not exist: it is not reached.
  void ExpectRefused(const std::string& arguments, const std::string& part) const {
    const Outcome outcome = Sluice("serve --model /nowhere " + arguments);
    EXPECT_EQ(outcome.exit_code, 2) << arguments;
    EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
    EXPECT_THAT(outcome.err, HasSubstr(part)) << arguments;
  }
  std::string Config(const std::string& text) const {
    std::ofstream(directory_.path() / "serve.json") << text;
    return " --config " + (directory_.path() / "serve.json").string();
  }

  const TemporaryDirectory directory_;
};

TEST_F(ServiceBorderTest, AnAddressThatIsNoneIsRefusedBeforeAModelIsRead) {
  for (const char* listen : {"127.0.0.1:99999", "127.0.0.1", "127.0.0.1:", "::1:50051"}) {
    ExpectRefused(std::string("--listen ") + listen, "listen: expected HOST:PORT");
  }
  ExpectRefused("--metrics 127.0.0.1:99999", "metrics: expected HOST:PORT");
}

TEST_F(ServiceBorderTest, AnAddressOpenToOthersNeedsEncryptionAndTokens) {
  ExpectRefused("--listen 0.0.0.0:0", "allow_plain_text");
  ExpectRefused("--listen 0.0.0.0:0 --allow-plain-text", "allow_everybody");
}

TEST_F(ServiceBorderTest, AnEmptyListOfTokensIsRefused) {
  ExpectRefused("--listen 127.0.0.1:0" + Config(R"({"tokens": []})"), "allow_everybody");
}

TEST_F(ServiceBorderTest, AMetricsPortThatIsTakenNamesTheFlag) {
  Metrics metrics;
  const MetricsEndpoint taken(metrics, "127.0.0.1:0");
  ExpectRefused("--listen 127.0.0.1:0 --metrics 127.0.0.1:" + std::to_string(taken.port()),
                "--metrics");
}

TEST_F(ServiceBorderTest, ATokenIsRandomAndItsEntryIsOneForTheServersFile) {
  const Outcome first = Sluice("token --name lobby --days 3 --json");
  const Outcome second = Sluice("token --name lobby --days 3 --json");
  ASSERT_EQ(first.exit_code, 0) << first.err;
  const json made = json::parse(first.out);
  const std::string token = made["token"];
  EXPECT_EQ(token.size(), 64u);
  EXPECT_NE(token, json::parse(second.out)["token"]);
  EXPECT_EQ(made["entry"]["sha256"], Sha256Hex(token));
  EXPECT_EQ(made["entry"]["name"], "lobby");
  // The server takes the entry and goes on to the next mistake.
  ExpectRefused("--listen 0.0.0.0:0 --allow-plain-text --dtype int4" +
                    Config(json({{"tokens", {made["entry"]}}}).dump()),
                "dtype");
  const Outcome plain = Sluice("token --name lobby");
  EXPECT_THAT(plain.out, HasSubstr("\"sha256\":"));
  EXPECT_EQ(Sluice("token").exit_code, 2);
}

}  // namespace
}  // namespace sluice
