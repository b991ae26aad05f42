#include "proto/saved_streams.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <string>

#include "runtime/error.h"
#include "tests/support/temporary_directory.h"

namespace sluice {
namespace {

std::string Id(int number) {
  std::string id = std::to_string(number);
  return std::string(32 - id.size(), '0') + id;
}

class SavedStreamsTest : public testing::Test {
 protected:
  void Write(const SavedStreams& saved, int number, const std::string& owner, int bytes = 10) {
    std::ofstream(saved.FileOf(Id(number), owner)) << std::string(bytes, 'x');
  }
  const TemporaryDirectory directory_;
};

TEST_F(SavedStreamsTest, OnlyAnIdBecomesPartOfAPath) {
  const SavedStreams saved(directory_.path(), {});
  EXPECT_EQ(saved.FileOf("../" + Id(1).substr(3), "a"), "");
  EXPECT_EQ(saved.FileOf("", "a"), "");
  EXPECT_EQ(saved.FileOf(Id(1), "a").parent_path(), directory_.path());
  EXPECT_EQ(SavedStreams("", {}).FileOf(Id(1), "a"), "");
}

TEST_F(SavedStreamsTest, AnAccountReachesItsOwnFilesAloneAndTheirNamesDoNotTellWhose) {
  const SavedStreams saved(directory_.path(), {});
  EXPECT_NE(saved.FileOf(Id(1), "a"), saved.FileOf(Id(1), "b"));
  EXPECT_THAT(saved.FileOf(Id(1), "secret").string(), testing::Not(testing::HasSubstr("secret")));
}

TEST_F(SavedStreamsTest, AnAccountSavesNoMoreStreamsThanItMayAndMayReplaceThose) {
  const SavedStreams saved(directory_.path(), {});
  const SavedLimits two{.streams = 2};
  for (int i = 0; i < 2; ++i) {
    EXPECT_NO_THROW(saved.Admit(Id(i), "a", two));
    Write(saved, i, "a");
  }
  EXPECT_THROW(saved.Admit(Id(2), "a", two), ResourceExhausted);
  EXPECT_NO_THROW(saved.Admit(Id(1), "a", two));
  EXPECT_NO_THROW(saved.Admit(Id(2), "b", two));
}

TEST_F(SavedStreamsTest, BytesAreCountedAsWell) {
  const SavedStreams saved(directory_.path(), {});
  Write(saved, 1, "a", 100);
  EXPECT_NO_THROW(saved.Admit(Id(2), "a", {.bytes = 101}));
  EXPECT_THROW(saved.Admit(Id(2), "a", {.bytes = 100}), ResourceExhausted);
}

TEST_F(SavedStreamsTest, AllAccountsTogetherHaveLimitsThatOutliveTheProcess) {
  for (int i = 0; i < 3; ++i) {
    Write(SavedStreams(directory_.path(), {}), i, "account " + std::to_string(i));
  }
  EXPECT_NO_THROW(SavedStreams(directory_.path(), {.streams = 4}).Admit(Id(9), "z", {}));
  EXPECT_THROW(SavedStreams(directory_.path(), {.streams = 3}).Admit(Id(9), "z", {}),
               ResourceExhausted);
  EXPECT_THROW(SavedStreams(directory_.path(), {.bytes = 30}).Admit(Id(9), "z", {}),
               ResourceExhausted);
}

}  // namespace
}  // namespace sluice
