#include "proto/metrics_endpoint.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "runtime/error.h"

namespace sluice {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

int Connect(int port) {
  const int handle = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  EXPECT_EQ(connect(handle, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  return handle;
}

// What comes back until the other side closes.
std::string Exchange(int port, const std::string& request) {
  const int handle = Connect(port);
  // The other side may close before it has read everything.
  EXPECT_GT(send(handle, request.data(), request.size(), MSG_NOSIGNAL), 0);
  std::string answer;
  char part[4096];
  for (ssize_t n; (n = read(handle, part, sizeof part)) > 0;) answer.append(part, n);
  close(handle);
  return answer;
}

TEST(MetricsEndpointTest, ShowsTheMetricsAndNothingElse) {
  Metrics metrics;
  metrics.counter("sluice_tests_total", "Tests.").Add(3);
  const MetricsEndpoint endpoint(metrics, "127.0.0.1:0");
  const std::string answer = Exchange(endpoint.port(), "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_THAT(answer, StartsWith("HTTP/1.1 200"));
  EXPECT_THAT(answer, HasSubstr("text/plain; version=0.0.4"));
  EXPECT_THAT(answer, HasSubstr("sluice_tests_total 3"));
  EXPECT_THAT(Exchange(endpoint.port(), "GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
              StartsWith("HTTP/1.1 404"));
  EXPECT_THAT(
      Exchange(endpoint.port(), "POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"),
      StartsWith("HTTP/1.1 405"));
}

TEST(MetricsEndpointTest, LongMalformedAndIdleRequestsHoldUpNobody) {
  Metrics metrics;
  const MetricsEndpoint endpoint(metrics, "127.0.0.1:0");
  EXPECT_EQ(Exchange(endpoint.port(), "GET /" + std::string(1 << 16, 'a') + " HTTP/1.1\r\n\r\n"),
            "");
  EXPECT_EQ(Exchange(endpoint.port(), "\x16\x03\x01 no HTTP\r\n\r\n"), "");
  std::vector<int> idle;
  for (int i = 0; i < 10; ++i) idle.push_back(Connect(endpoint.port()));
  EXPECT_THAT(Exchange(endpoint.port(), "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"),
              StartsWith("HTTP/1.1 200"));
  for (const int handle : idle) close(handle);
}

TEST(MetricsEndpointTest, AddressesThatCannotBeHadAreRefused) {
  Metrics metrics;
  for (const char* listen :
       {"", "127.0.0.1", "localhost:1", "127.0.0.1:", "127.0.0.1:99999", "127.0.0.1:1x"}) {
    EXPECT_THROW(MetricsEndpoint(metrics, listen), InputError) << listen;
  }
  const MetricsEndpoint first(metrics, "127.0.0.1:0");
  EXPECT_THROW(MetricsEndpoint(metrics, "127.0.0.1:" + std::to_string(first.port())), InputError);
}

}  // namespace
}  // namespace sluice
