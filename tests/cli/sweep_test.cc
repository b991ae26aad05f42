#include "demos/cli/sweep.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>

#include "compression/registry.h"

namespace sluice::cli {
namespace {

TEST(SweepTest, ComparesEveryCompressorUnderNamesOfTheirOwn) {
  std::set<std::string> names;
  for (const SweepConfiguration& one : SweepConfigurations()) {
    EXPECT_TRUE(names.insert(one.name).second) << one.name;
    EXPECT_NO_THROW(ParseMethodFlags(one.flags)) << one.name;
  }
  for (const CompressorEntry& entry : TokenCompressors()) {
    const std::string flag = "--compress " + std::string(entry.name) + "=";
    EXPECT_TRUE(std::any_of(SweepConfigurations().begin(), SweepConfigurations().end(),
                            [&](const auto& one) { return one.flags.starts_with(flag); }))
        << flag;
  }
}

}  // namespace
}  // namespace sluice::cli
