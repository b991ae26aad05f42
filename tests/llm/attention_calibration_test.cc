#include "llm/attention_calibration.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>

#include "runtime/error.h"
#include "tests/support/temporary_directory.h"

namespace sluice {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr auto kExact = AttentionPrecision::kExact, kSage = AttentionPrecision::kSage;

AttentionCalibration Some() {
  return {.model = "some",
          .fingerprint = "abc",
          .device = Device::kCpu,
          .clips = 16,
          .tower = {{0.9999, 0.01}, {0.9979, 0.01}},
          .decoder = {{0.9999, 0.061}, {0.998, 0.06}, {1, 0}}};
}

TEST(AttentionCalibrationTest, LayersWithinBothGatesAreQuantised) {
  const TemporaryDirectory directory;
  const auto file = directory.path() / "calibration.json";
  WriteCalibration(Some(), file);
  const LayerPrecisions read = ChoosePrecisions({.file = file}, "abc", Device::kCpu, 2, 3);
  EXPECT_THAT(read.tower, ElementsAre(kSage, kExact));
  EXPECT_THAT(read.decoder, ElementsAre(kExact, kSage, kSage));
}

TEST(AttentionCalibrationTest, WithoutAFileAllLayersAreAsAsked) {
  EXPECT_THAT(ChoosePrecisions({}, "", Device::kCpu, 0, 2).decoder, ElementsAre(kExact, kExact));
  const LayerPrecisions sage =
      ChoosePrecisions({.precision = kSage, .file = {}}, "", Device::kCuda, 1, 2);
  EXPECT_THAT(sage.tower, ElementsAre(kSage));
  EXPECT_THAT(sage.decoder, ElementsAre(kSage, kSage));
}

TEST(AttentionCalibrationTest, FilesThatDoNotFitAreRefusedByFieldAndFinding) {
  const TemporaryDirectory directory;
  const auto file = directory.path() / "calibration.json";
  const auto refused = [&](const std::string& expected, const std::string& found,
                           const std::function<void(nlohmann::json&)>& change) {
    nlohmann::json json = nlohmann::json::parse(ToJson(Some()));
    change(json);
    std::ofstream(file) << json;
    try {
      ChoosePrecisions({.file = file}, "abc", Device::kCpu, 2, 3);
      ADD_FAILURE() << "taken: " << json;
    } catch (const InputError& error) {
      EXPECT_THAT(error.what(), HasSubstr(file.string()));
      EXPECT_THAT(error.what(), HasSubstr(expected));
      EXPECT_THAT(error.what(), HasSubstr("got " + found));
      EXPECT_THAT(error.what(), ::testing::Not(HasSubstr("\n")));
    }
  };
  refused("fingerprint must be this model's \"abc\"", "\"xyz\"",
          [](auto& json) { json["fingerprint"] = "xyz"; });
  refused("format must be", "nothing", [](auto& json) { json.erase("format"); });
  refused("device must be \"cpu\"", "\"cuda\"", [](auto& json) { json["device"] = "cuda"; });
  refused("clips must be an integer in 16", "3", [](auto& json) { json["clips"] = 3; });
  refused("tower.layers must be an integer in 2..2", "7",
          [](auto& json) { json["tower"]["layers"] = 7; });
  refused("decoder must be an object", "[]",
          [](auto& json) { json["decoder"] = nlohmann::json::array(); });
  refused("decoder.layer.1.attention must be \"exact\" or \"sage\"", "\"fast\"",
          [](auto& json) { json["decoder"]["layer.1"]["attention"] = "fast"; });
  refused("decoder.layer.2.attention must be", "nothing",
          [](auto& json) { json["decoder"].erase("layer.2"); });
  std::ofstream(file) << "{";
  EXPECT_THROW(ChoosePrecisions({.file = file}, "abc", Device::kCpu, 2, 3), InputError);
  EXPECT_THROW(
      ChoosePrecisions({.file = directory.path() / "none.json"}, "abc", Device::kCpu, 2, 3),
      InputError);
  EXPECT_THROW(WriteCalibration(Some(), directory.path() / "no" / "where.json"), InputError);
}

}  // namespace
}  // namespace sluice
