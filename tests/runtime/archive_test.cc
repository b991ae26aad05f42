#include "runtime/archive.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <random>

#include "runtime/error.h"
#include "tests/support/temporary_directory.h"

namespace sluice {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

// One of everything.
struct Things {
  int64_t big = 0;
  int32_t small = 0;
  double real = 0;
  float narrow = 0;
  bool flag = false;
  DType choice = DType::kF32;
  std::string text;
  std::vector<float> floats;
  std::vector<int32_t> none;
  std::vector<std::string> list;
  char raw[5] = {};
  Tensor matrix, empty;

  void Persist(Archive& archive) {
    archive.Number("big", big);
    archive.Number("small", small, -10, 10);
    archive.Number("real", real);
    archive.Number("narrow", narrow);
    archive.Flag("flag", flag);
    archive.Enum("choice", choice, kLastDType);
    archive.Text("text", text);
    archive.Array("floats", floats, 1000);
    archive.Array("none", none);
    archive.Resize("list", list, 10);
    for (std::string& item : list) archive.Text("item", item);
    archive.Bytes("raw", raw, sizeof(raw));
    archive.Value("matrix", matrix);
    archive.Value("empty", empty);
  }
};

Things RandomThings(uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Things things;
  things.big = static_cast<int64_t>(random()) << 31;
  things.small = -7;
  things.real = normal(random);
  things.narrow = normal(random);
  things.flag = true;
  things.choice = DType::kBF16;
  things.text = std::string("a\0b", 3);
  for (int i = 0; i < 1000; ++i) things.floats.push_back(normal(random));
  things.list = {"one", "", "three"};
  std::memcpy(things.raw, "12345", 5);
  things.matrix = Tensor(DType::kBF16, {7, 33});
  for (int i = 0; i < 7 * 33; ++i) {
    things.matrix.data<BFloat16>()[i] = BFloat16::From(normal(random));
  }
  return things;
}

class ArchiveTest : public testing::Test {
 protected:
  void Save(Things& things) {
    Archive archive = Archive::ToFile(file_);
    things.Persist(archive);
    archive.Finish();
  }
  Things Load() {
    Things things;
    Archive archive = Archive::FromFile(file_);
    things.Persist(archive);
    archive.Finish();
    return things;
  }
  std::string Contents() {
    std::ifstream in(file_, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  void Replace(const std::string& contents) { std::ofstream(file_, std::ios::binary) << contents; }
  TemporaryDirectory directory_;
  const std::filesystem::path file_ = directory_.path() / "things";
};

TEST_F(ArchiveTest, WhatIsWrittenIsReadAgain) {
  Things things = RandomThings(1);
  Save(things);
  const Things read = Load();
  EXPECT_EQ(read.big, things.big);
  EXPECT_EQ(read.small, things.small);
  EXPECT_EQ(read.real, things.real);
  EXPECT_EQ(read.narrow, things.narrow);
  EXPECT_EQ(read.flag, things.flag);
  EXPECT_EQ(read.choice, things.choice);
  EXPECT_EQ(read.text, things.text);
  EXPECT_EQ(read.floats, things.floats);
  EXPECT_TRUE(read.none.empty());
  EXPECT_EQ(read.list, things.list);
  EXPECT_EQ(std::memcmp(read.raw, things.raw, 5), 0);
  ASSERT_EQ(read.matrix.shape(), things.matrix.shape());
  ASSERT_EQ(read.matrix.dtype(), DType::kBF16);
  EXPECT_EQ(std::memcmp(read.matrix.view().raw(), things.matrix.view().raw(), 7 * 33 * 2), 0);
  EXPECT_TRUE(read.empty.empty());
}

TEST_F(ArchiveTest, AnUnfinishedFileLeavesTheOldOneAlone) {
  Things things = RandomThings(2);
  Save(things);
  const std::string before = Contents();
  {
    Things others = RandomThings(3);
    Archive archive = Archive::ToFile(file_);
    others.Persist(archive);
  }
  EXPECT_EQ(Contents(), before);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(directory_.path()), {}), 1);
}

TEST_F(ArchiveTest, EveryFlippedBitAndEveryMissingByteIsNoticed) {
  Things things = RandomThings(4);
  things.floats.resize(3);
  Save(things);
  const std::string whole = Contents();
  for (size_t i = 0; i < whole.size(); ++i) {
    std::string bad = whole;
    bad[i] = static_cast<char>(bad[i] ^ (1 << i % 8));
    Replace(bad);
    EXPECT_THROW(Load(), InputError) << "byte " << i;
    Replace(whole.substr(0, i));
    EXPECT_THROW(Load(), InputError) << "cut at " << i;
  }
}

TEST_F(ArchiveTest, ErrorsNameTheFileTheFieldAndBothSides) {
  Things things = RandomThings(5);
  Save(things);
  const auto read = [&](const auto& body) {
    return [&, body] {
      Archive archive = Archive::FromFile(file_);
      body(archive);
    };
  };
  int64_t big = 0;
  float real = 0;
  EXPECT_THAT(read([&](Archive& a) { a.Number("large", big); }),
              ThrowsMessage<InputError>(
                  HasSubstr("things: field 'large': expected it to follow, found field 'big'")));
  EXPECT_THAT(read([&](Archive& a) { a.Number("big", real); }),
              ThrowsMessage<InputError>(HasSubstr("'big': expected type f, found type q")));
  EXPECT_THAT(read([&](Archive& a) { a.Number("big", big, int64_t{0}, int64_t{1}); }),
              ThrowsMessage<InputError>(HasSubstr("'big': expected 0 to 1, found ")));
  EXPECT_THAT(read([&](Archive& a) {
                a.Number("big", big);
                a.Finish();
              }),
              ThrowsMessage<InputError>(HasSubstr("expected its end, found")));
  things.floats.resize(1001);
  Save(things);
  EXPECT_THAT(
      [&] { Load(); },
      ThrowsMessage<InputError>(HasSubstr("'floats': expected at most 1000 values, found 1001")));
  things = RandomThings(6);
  Replace("PNG and so on, something else that is long enough to be looked at");
  EXPECT_THAT([&] { Load(); }, ThrowsMessage<InputError>(HasSubstr("of another kind or version")));
  EXPECT_THAT([&] { Archive::FromFile(directory_.path() / "none"); },
              ThrowsMessage<InputError>(HasSubstr("cannot open")));
  EXPECT_THAT([&] { Archive::ToFile(directory_.path() / "no" / "such"); },
              ThrowsMessage<Error>(HasSubstr("cannot write")));
}

// A count is believed only as far as the file goes: nothing is allocated for the rest.
TEST_F(ArchiveTest, CountsBeyondTheFileAreRefused) {
  for (const char* what : {"array", "text", "matrix"}) {
    {
      Archive archive = Archive::ToFile(file_);
      std::vector<int64_t> shape = {int64_t{1} << 40, int64_t{1} << 20};
      std::vector<uint8_t> one = {1};
      int32_t type = 0;
      if (what[0] == 'm') {
        archive.Array("x.shape", shape);
        archive.Number("x.dtype", type);
      }
      archive.Array("x", one);
      archive.Finish();
    }
    if (what[0] != 'm') {
      // The count stands behind the name's length, the name and the type; the sum is made to fit.
      std::string bytes = Contents();
      const uint64_t count = uint64_t{1} << 60;
      std::memcpy(bytes.data() + 8 + 1 + 1 + 1, &count, 8);
      if (what[0] == 't') bytes[8 + 1 + 1] = 't';
      const uint32_t sum = ArchiveChecksum(std::string_view(bytes).substr(0, bytes.size() - 4));
      std::memcpy(bytes.data() + bytes.size() - 4, &sum, 4);
      Replace(bytes);
    }
    Archive archive = Archive::FromFile(file_);
    std::vector<uint8_t> array;
    std::string text;
    Tensor matrix;
    EXPECT_THAT(
        [&] {
          if (what[0] == 'a') archive.Array("x", array);
          if (what[0] == 't') archive.Text("x", text);
          if (what[0] == 'm') archive.Value("x", matrix);
        },
        ThrowsMessage<InputError>(HasSubstr("expected what the file has room for")))
        << what;
  }
}

TEST_F(ArchiveTest, ListsLongerThanTheFileAreRefusedBeforeMemoryIsTaken) {
  uint64_t size = uint64_t{1} << 40;
  {
    Archive archive = Archive::ToFile(file_);
    archive.Number("list", size);
    archive.Finish();
  }
  Archive archive = Archive::FromFile(file_);
  std::vector<std::string> list;
  EXPECT_THAT([&] { archive.Resize("list", list, uint64_t{1} << 50); },
              ThrowsMessage<InputError>(HasSubstr("expected what the file has room for")));
}

}  // namespace
}  // namespace sluice
