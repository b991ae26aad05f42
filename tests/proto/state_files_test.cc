// Files that hold streams: nobody else reads them, and no link leads elsewhere.
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "runtime/archive.h"
#include "runtime/error.h"
#include "tests/support/temporary_directory.h"

namespace sluice {
namespace {

void Write(const std::filesystem::path& file) {
  Archive archive = Archive::ToFile(file);
  int32_t value = 7;
  archive.Number("value", value);
  archive.Finish();
}

TEST(StateFilesTest, OnlyTheOwnerCanReadThem) {
  const TemporaryDirectory directory;
  const auto file = directory.path() / "state";
  const mode_t before = umask(0);
  Write(file);
  umask(before);
  struct stat info = {};
  ASSERT_EQ(stat(file.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
}

TEST(StateFilesTest, ALinkThatIsThereIsNeitherFollowedNorWrittenThrough) {
  const TemporaryDirectory directory;
  const auto file = directory.path() / "state", precious = directory.path() / "precious";
  std::ofstream(precious) << "untouched";
  std::filesystem::create_symlink(precious, directory.path() / "state.partial");
  std::filesystem::create_symlink(precious, file);
  EXPECT_THROW(Archive::FromFile(file), InputError);
  Write(file);
  std::string text;
  std::ifstream(precious) >> text;
  EXPECT_EQ(text, "untouched");
  EXPECT_TRUE(std::filesystem::is_regular_file(std::filesystem::symlink_status(file)));
}

TEST(StateFilesTest, WhatAKilledProcessLeftIsReplaced) {
  const TemporaryDirectory directory;
  const auto file = directory.path() / "state";
  std::ofstream(directory.path() / "state.partial") << "half";
  Write(file);
  int32_t value = 0;
  Archive archive = Archive::FromFile(file);
  archive.Number("value", value);
  archive.Finish();
  EXPECT_EQ(value, 7);
}

TEST(StateFilesTest, APipeInsteadOfAFileIsRefusedAndNotWaitedFor) {
  const TemporaryDirectory directory;
  const auto pipe = directory.path() / "state";
  ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
  EXPECT_THROW(Archive::FromFile(pipe), InputError);
}

}  // namespace
}  // namespace sluice
