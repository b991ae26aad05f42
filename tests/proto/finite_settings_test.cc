// Settings without an end are refused wherever they come from: they overflow what is made of them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>
#include <variant>

#include "proto/messages.h"
#include "proto/server_config.h"
#include "runtime/error.h"
#include "streaming/engine.h"
#include "tests/streaming/fakes.h"
#include "tests/support/temporary_directory.h"

namespace sluice {
namespace {

using ::testing::HasSubstr;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

template <typename Work>
std::string RefusalOf(const Work& work) {
  try {
    work();
    return "it was taken";
  } catch (const InputError& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    return error.what();
  }
}

TEST(FiniteSettingsTest, AServersSettingsAre) {
  ServerConfig known;
  int tried = 0;
  for (const Setting& setting : SettingsOf(known)) {
    if (!std::holds_alternative<double*>(setting.value)) continue;
    for (const double value : {kInfinity, -kInfinity, kNaN, 1e300}) {
      ServerConfig config;
      for (const Setting& same : SettingsOf(config)) {
        if (same.name == setting.name) *std::get<double*>(same.value) = value;
      }
      EXPECT_THAT(RefusalOf([&] { Finished(config); }), HasSubstr(setting.name + ": expected"))
          << value;
      ++tried;
    }
  }
  EXPECT_GE(tried, 4 * 10);
}

TEST(FiniteSettingsTest, ANumberThatIsTooLargeForTheFileIsToldInItsName) {
  const TemporaryDirectory directory;
  const auto file = directory.path() / "serve.json";
  std::ofstream(file) << R"({"answer_seconds": 1e999})";
  ServerConfig config;
  const std::string refusal = RefusalOf([&] { ReadServerConfig(file, config); });
  EXPECT_THAT(refusal, HasSubstr("serve.json"));
  EXPECT_THAT(refusal, HasSubstr("finite"));
}

TEST(FiniteSettingsTest, AClientsBudgetsAre) {
  StreamBudget unlimited;
  unlimited.answer_seconds = 0;
  for (const double value : {kInfinity, -kInfinity, kNaN}) {
    v1::Budgets seconds, rate;
    seconds.set_answer_seconds(value);
    rate.set_frames_per_second(value);
    EXPECT_THAT(RefusalOf([&] { Granted(seconds, unlimited); }), HasSubstr("answer_seconds"));
    EXPECT_THAT(RefusalOf([&] { Granted(rate, unlimited); }), HasSubstr("frames_per_second"));
  }
}

TEST(FiniteSettingsTest, AStreamsBudgetIs) {
  const SystemClock clock;
  Metrics metrics;
  const EngineOptions engine{.model = {}, .vlm = {}, .num_threads = 1};
  Scheduler scheduler(std::make_shared<Engine>(std::make_shared<FakeVlm>(), engine), {}, clock,
                      metrics, /*manual=*/true);
  for (const double value : {kInfinity, kNaN}) {
    StreamBudget seconds, rate;
    seconds.answer_seconds = rate.frames_per_second = value;
    EXPECT_THAT(RefusalOf([&] { scheduler.Open({}, seconds, nullptr); }),
                HasSubstr("answer_seconds"));
    EXPECT_THAT(RefusalOf([&] { scheduler.Open({}, rate, nullptr); }),
                HasSubstr("frames_per_second"));
  }
}

}  // namespace
}  // namespace sluice
