#include "runtime/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <optional>
#include <random>
#include <string>

#include "runtime/error.h"
#include "runtime/weight_store.h"
#include "tests/support/temporary_directory.h"
#include "tests/support/tensor_testing.h"

namespace sluice {
namespace {

using ::sluice::testing::At;
using ::sluice::testing::RandomTensor;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

class SafetensorsTest : public ::testing::Test {
 protected:
  std::filesystem::path Path(const std::string& name) const { return directory_ / name; }
  void WriteText(const std::string& name, const std::string& text) const {
    std::ofstream(Path(name), std::ios::binary) << text;
  }
  static std::string ReadText(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  // A file with this header and `data_bytes` bytes of data.
  std::filesystem::path WriteRaw(const std::string& header, size_t data_bytes) const {
    std::string bytes(8, '\0');
    const uint64_t length = header.size();
    std::memcpy(bytes.data(), &length, 8);
    bytes += header;
    for (size_t i = 0; i < data_bytes; ++i) bytes += static_cast<char>(i * 37 + 1);
    WriteText("raw.safetensors", bytes);
    return Path("raw.safetensors");
  }
  // What opening says; fails the test when it says nothing.
  std::string ErrorOf(const std::function<void()>& action) const {
    try {
      action();
    } catch (const InputError& error) {
      return error.what();
    }
    ADD_FAILURE() << "nothing was refused";
    return "";
  }
  std::string ErrorOfRaw(const std::string& header, size_t data_bytes) const {
    const auto path = WriteRaw(header, data_bytes);
    const std::string line = ErrorOf([&] { SafetensorsFile::Open(path); });
    EXPECT_THAT(line, HasSubstr("raw.safetensors")) << "the file must be named";
    EXPECT_EQ(line.find('\n'), std::string::npos) << "one line: " << line;
    return line;
  }

  const TemporaryDirectory temporary_;
  const std::filesystem::path directory_ = temporary_.path();
};

TEST_F(SafetensorsTest, ReadsBackWhatItWrote) {
  const Tensor a = RandomTensor(DType::kF32, {3, 5}, 1), b = RandomTensor(DType::kBF16, {7}, 2);
  const Tensor c = RandomTensor(DType::kF16, {2, 1, 3, 2}, 3);
  Tensor bytes(DType::kU8, {3}), scalar(DType::kF32, {}), none(DType::kF32, {0, 4});
  std::memcpy(bytes.data<uint8_t>(), "abc", 3);
  *scalar.data<float>() = 7;
  const TensorView columns = a.view().Columns(1, 3);
  WriteSafetensors(Path("x.safetensors"),
                   {{"a", a},
                    {"b", b},
                    {"c.weight", c},
                    {"bytes", bytes},
                    {"scalar", scalar},
                    {"none", none},
                    {"columns", columns}},
                   {{"format", "pt"}, {"odd \"key\"", "line\nbreak"}});
  const auto file = SafetensorsFile::Open(Path("x.safetensors"));
  EXPECT_EQ(file->tensors().size(), 7u);
  EXPECT_EQ(file->metadata().at("format"), "pt");
  EXPECT_EQ(file->metadata().at("odd \"key\""), "line\nbreak");
  for (const auto& [name, tensor] : {std::pair<std::string, const Tensor*>{"a", &a},
                                     {"b", &b},
                                     {"c.weight", &c},
                                     {"bytes", &bytes},
                                     {"scalar", &scalar}}) {
    const ConstTensorView view = file->tensors().at(name);
    EXPECT_EQ(view.shape(), tensor->shape());
    EXPECT_EQ(view.dtype(), tensor->dtype());
    EXPECT_EQ(std::memcmp(view.raw(), tensor->view().raw(), view.SizeBytes()), 0) << name;
    EXPECT_EQ(reinterpret_cast<uintptr_t>(view.raw()) % SizeOf(view.dtype()), 0u) << name;
  }
  EXPECT_EQ(file->tensors().at("none").SizeBytes(), 0u);
  const ConstTensorView copy = file->tensors().at("columns");
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 2; ++j) EXPECT_EQ(At(copy, i, j), At(a, i, j + 1));
  }
}

TEST_F(SafetensorsTest, ReadsAgainAfterPagesWereReleased) {
  const Tensor a = RandomTensor(DType::kF32, {300, 50}, 1);
  WriteSafetensors(Path("x.safetensors"), {{"a", a}});
  const auto file = SafetensorsFile::Open(Path("x.safetensors"));
  file->ReleasePages(file->tensors().at("a"));
  EXPECT_EQ(std::memcmp(file->tensors().at("a").raw(), a.data<float>(), a.SizeBytes()), 0);
}

TEST_F(SafetensorsTest, SaysWhenTheDiskRefuses) {
  const Tensor a = RandomTensor(DType::kF32, {3}, 1);
  EXPECT_THAT(
      [&] {
        WriteSafetensors(Path("missing/x.safetensors"), {{"a", a}});
      },
      ThrowsMessage<Error>(HasSubstr("missing/x.safetensors: cannot be written")));
}

TEST_F(SafetensorsTest, RefusesWhatIsNoFile) {
  EXPECT_THAT(ErrorOf([&] { SafetensorsFile::Open(Path("absent.safetensors")); }),
              AllOf(HasSubstr("absent.safetensors"), HasSubstr("No such file")));
  EXPECT_THAT(ErrorOf([&] { SafetensorsFile::Open(directory_); }), HasSubstr("regular file"));
  WriteText("short", "abc");
  EXPECT_THAT(ErrorOf([&] { SafetensorsFile::Open(Path("short")); }), HasSubstr("8 bytes"));
}

TEST_F(SafetensorsTest, RefusesHeaderLengthBeyondTheFile) {
  std::string bytes(8, '\xff');
  WriteText("raw.safetensors", bytes + "{}");
  EXPECT_THAT(ErrorOf([&] { SafetensorsFile::Open(Path("raw.safetensors")); }),
              AllOf(HasSubstr("18446744073709551615"), HasSubstr("10 bytes")));
  const uint64_t three = 3;
  std::memcpy(bytes.data(), &three, 8);
  WriteText("raw.safetensors", bytes + "{}");
  EXPECT_THAT(ErrorOf([&] { SafetensorsFile::Open(Path("raw.safetensors")); }),
              HasSubstr("got a length of 3"));
}

TEST_F(SafetensorsTest, RefusesEveryTruncation) {
  const Tensor a = RandomTensor(DType::kF32, {3, 5}, 1), b = RandomTensor(DType::kBF16, {7}, 2);
  WriteSafetensors(Path("whole"), {{"a", a}, {"b", b}}, {{"format", "pt"}});
  const std::string whole = ReadText(Path("whole"));
  for (size_t length = 0; length < whole.size(); ++length) {
    WriteText("part", whole.substr(0, length));
    EXPECT_THROW(SafetensorsFile::Open(Path("part")), InputError) << length << " bytes";
  }
  WriteText("part", whole + "x");
  EXPECT_THAT(ErrorOf([&] { SafetensorsFile::Open(Path("part")); }), HasSubstr("cover all 75"));
}

TEST_F(SafetensorsTest, SurvivesFlippedBytesInItsHeader) {
  const Tensor a = RandomTensor(DType::kF32, {3, 5}, 1), b = RandomTensor(DType::kBF16, {7}, 2);
  WriteSafetensors(Path("whole"), {{"a", a}, {"b", b}}, {{"format", "pt"}});
  const std::string whole = ReadText(Path("whole"));
  std::mt19937 random(7);
  int refused = 0;
  for (int i = 0; i < 3000; ++i) {
    std::string damaged = whole;
    for (int flips = 1 + static_cast<int>(random() % 3); flips > 0; --flips) {
      damaged[random() % (whole.size() - 74)] = static_cast<char>(random());
    }
    WriteText("damaged", damaged);
    try {
      const auto file = SafetensorsFile::Open(Path("damaged"));
      // What was accepted lies inside the file.
      for (const auto& [name, view] : file->tensors()) {
        uint8_t sum = 0;
        for (size_t j = 0; j < view.SizeBytes(); ++j) {
          sum += static_cast<const uint8_t*>(view.raw())[j];
        }
        EXPECT_LE(view.SizeBytes(), 74u) << int{sum};
      }
    } catch (const InputError&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 2000);
}

TEST_F(SafetensorsTest, RefusesHeadersThatAreNotTheFormat) {
  EXPECT_THAT(ErrorOfRaw("{\"a\": ", 0), HasSubstr("header must be JSON"));
  EXPECT_THAT(ErrorOfRaw("[1]", 0), HasSubstr("must be a JSON object"));
  EXPECT_THAT(ErrorOfRaw(R"({"a": 5})", 0), AllOf(HasSubstr("'a'"), HasSubstr("a number")));
  EXPECT_THAT(ErrorOfRaw(R"({"__metadata__": {"k": 5}})", 0), HasSubstr("metadata"));
  EXPECT_THAT(ErrorOfRaw(R"({"__metadata__": {"k": {"l": "m"}}})", 0), HasSubstr("metadata"));
  EXPECT_THAT(ErrorOfRaw(R"({"a": {"dtype": "F32", "shape": [1]}})", 4),
              HasSubstr("no data_offsets"));
  EXPECT_THAT(
      ErrorOfRaw(R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "x": 1}})", 4),
      HasSubstr("'x'"));
  EXPECT_THAT(ErrorOfRaw(R"({"a": {"dtype": "F32", "dtype": "F16", "shape": [1]}})", 4),
              HasSubstr("a second 'dtype'"));
  EXPECT_THAT(ErrorOfRaw(R"({"a": {"dtype": "F32", "shape": [[1]], "data_offsets": [0, 4]}})", 4),
              HasSubstr("a list"));
  EXPECT_THAT(ErrorOfRaw(R"({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}})", 4),
              HasSubstr("negative"));
  EXPECT_THAT(ErrorOfRaw(R"({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}})", 4),
              HasSubstr("1.0"));
  EXPECT_THAT(ErrorOfRaw(R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}})", 4),
              HasSubstr("[0, 4, 4]"));
}

TEST_F(SafetensorsTest, RefusesDeepNestingWithoutFollowingIt) {
  const std::string deep(1'000'000, '[');
  EXPECT_THAT(ErrorOfRaw(R"({"a": )" + deep, 0), HasSubstr("a list"));
  std::string objects;
  for (int i = 0; i < 100'000; ++i) objects += R"({"a":)";
  EXPECT_THAT(ErrorOfRaw(objects, 0), HasSubstr("raw.safetensors"));
}

TEST_F(SafetensorsTest, RefusesSizesThatDoNotAddUp) {
  EXPECT_THAT(
      ErrorOfRaw(R"({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 20]}})", 20),
      AllOf(HasSubstr("tensor 'a'"), HasSubstr("[2, 3] F32 must take 24 bytes, got 20")));
  EXPECT_THAT(ErrorOfRaw(R"({"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}})", 16),
              AllOf(HasSubstr("16 bytes of data"), HasSubstr("[0, 20]")));
  EXPECT_THAT(ErrorOfRaw(R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}})", 4),
              HasSubstr("[4, 0]"));
  EXPECT_THAT(
      ErrorOfRaw(
          R"({"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}})",
          0),
      HasSubstr("must fit 64 bits"));
  EXPECT_THAT(
      ErrorOfRaw(
          R"({"a": {"dtype": "F32", "shape": [0, 9223372036854775808], "data_offsets": [0, 0]}})",
          0),
      HasSubstr("must fit 64 bits"));
  EXPECT_THAT(
      ErrorOfRaw(
          R"({"a": {"dtype": "F32", "shape": [99999999999999999999], "data_offsets": [0, 0]}})", 0),
      HasSubstr("99999999999999999999"));
}

TEST_F(SafetensorsTest, RefusesOverlapsAndHoles) {
  const std::string a = R"("a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, )";
  EXPECT_THAT(
      ErrorOfRaw("{" + a + R"("b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}})", 12),
      AllOf(HasSubstr("'b'"), HasSubstr("byte 8"), HasSubstr("overlap")));
  EXPECT_THAT(
      ErrorOfRaw("{" + a + R"("b": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}})", 16),
      AllOf(HasSubstr("'b'"), HasSubstr("got 12"), HasSubstr("hole")));
  EXPECT_THAT(ErrorOfRaw(R"({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}})", 2),
              HasSubstr("cover all 2"));
}

TEST_F(SafetensorsTest, RefusesNamesThatComeTwice) {
  const std::string a = R"("a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]})";
  EXPECT_THAT(ErrorOfRaw("{" + a + ", " + a + "}", 1), HasSubstr("got it twice"));
  EXPECT_THAT(ErrorOfRaw(R"({"__metadata__": {}, "__metadata__": {}})", 0), HasSubstr("twice"));
}

TEST_F(SafetensorsTest, RefusesUnknownDtypesAndListsThoseItCannotUse) {
  EXPECT_THAT(ErrorOfRaw(R"({"a": {"dtype": "F12", "shape": [1], "data_offsets": [0, 1]}})", 1),
              AllOf(HasSubstr("'a'"), HasSubstr("'F12'")));
  const auto file = SafetensorsFile::Open(
      WriteRaw(R"({"ids": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]}})", 16));
  EXPECT_TRUE(file->tensors().empty());
  EXPECT_EQ(file->other_tensors().at("ids"), "I64");
  EXPECT_THAT(ErrorOfRaw(R"({"a": {"dtype": "I64", "shape": [2], "data_offsets": [0, 8]}})", 8),
              HasSubstr("16 bytes, got 8"));
}

TEST_F(SafetensorsTest, MergesAxesBeyondTheFourthAndRefusesRankNine) {
  const auto file = SafetensorsFile::Open(WriteRaw(
      R"({"a": {"dtype": "U8", "shape": [2, 3, 2, 4, 5], "data_offsets": [0, 240]}})", 240));
  EXPECT_EQ(file->tensors().at("a").shape(), Shape({2, 3, 2, 20}));
  EXPECT_THAT(
      ErrorOfRaw(R"({"a": {"dtype": "U8", "shape": [1,1,1,1,1,1,1,1,1], "data_offsets": [0, 1]}})",
                 1),
      HasSubstr("rank must be at most 8, got [1, 1, 1, 1, 1, 1, 1, 1, 1]"));
}

TEST_F(SafetensorsTest, KeepsNamesFromBreakingTheErrorLine) {
  const std::string line = ErrorOfRaw(
      R"({"evil\n\u001b[31m": {"dtype": "F12", "shape": [1], "data_offsets": [0, 1]}})", 1);
  EXPECT_THAT(line, HasSubstr("'evil??[31m'"));
}

class CheckpointTest : public SafetensorsTest {
 protected:
  void WriteIndex(const std::string& weight_map) const {
    WriteText("model.safetensors.index.json",
              R"({"metadata": {}, "weight_map": )" + weight_map + "}");
  }
  std::string ErrorOfOpening() const {
    return ErrorOf([&] { Checkpoint::Open(directory_); });
  }
  const Tensor a_ = RandomTensor(DType::kBF16, {4, 6}, 1), b_ = RandomTensor(DType::kF32, {3}, 2);
};

TEST_F(CheckpointTest, OpensOneFileOrShards) {
  WriteSafetensors(Path("one.safetensors"), {{"a", a_}});
  WriteSafetensors(Path("two.safetensors"), {{"b", b_}});
  WriteIndex(R"({"a": "one.safetensors", "b": "two.safetensors"})");
  const Checkpoint shards = Checkpoint::Open(directory_);
  EXPECT_EQ(shards.tensors().size(), 2u);
  EXPECT_EQ(shards.TotalBytes(), 48 + 12);
  EXPECT_EQ(shards.tensors().at("b").file->path(), Path("two.safetensors"));

  WriteSafetensors(Path("model.safetensors"), {{"a", a_}});
  EXPECT_EQ(Checkpoint::Open(directory_).tensors().size(), 1u);  // one file wins
}

TEST_F(CheckpointTest, SaysWhatADirectoryLacks) {
  EXPECT_THAT(ErrorOfOpening(), AllOf(HasSubstr(directory_.string()), HasSubstr("neither")));
  WriteSafetensors(Path("one.safetensors"), {{"a", a_}});
  WriteIndex(R"({"a": "one.safetensors", "b": "two.safetensors"})");
  EXPECT_THAT(ErrorOfOpening(), AllOf(HasSubstr("two.safetensors"), HasSubstr("No such file")));
}

TEST_F(CheckpointTest, NamesTheTruncatedShard) {
  WriteSafetensors(Path("one.safetensors"), {{"a", a_}});
  WriteSafetensors(Path("two.safetensors"), {{"b", b_}});
  WriteIndex(R"({"a": "one.safetensors", "b": "two.safetensors"})");
  std::filesystem::resize_file(Path("two.safetensors"),
                               std::filesystem::file_size(Path("two.safetensors")) - 1);
  EXPECT_THAT(ErrorOfOpening(),
              AllOf(HasSubstr("two.safetensors"), HasSubstr("'b'"), HasSubstr("11 bytes of data")));
}

TEST_F(CheckpointTest, RefusesAnIndexThatLies) {
  WriteSafetensors(Path("one.safetensors"), {{"a", a_}});
  WriteSafetensors(Path("two.safetensors"), {{"b", b_}});
  WriteIndex(R"({"a": "two.safetensors", "b": "one.safetensors"})");
  EXPECT_THAT(ErrorOfOpening(), AllOf(HasSubstr("'a' must be in two.safetensors"),
                                      HasSubstr("it in one.safetensors")));
  WriteSafetensors(Path("two.safetensors"), {{"a", a_}, {"b", b_}});
  WriteIndex(R"({"a": "one.safetensors", "b": "two.safetensors"})");
  EXPECT_THAT(ErrorOfOpening(), AllOf(HasSubstr("'a' must be in one file"),
                                      HasSubstr("one.safetensors"), HasSubstr("two.safetensors")));
}

// Published indices name tied weights that no shard holds.
TEST_F(CheckpointTest, KeepsWhatTheIndexNamesAndNoShardHoldsForThoseWhoNeedIt) {
  WriteSafetensors(Path("one.safetensors"), {{"a", a_}});
  WriteIndex(R"({"a": "one.safetensors", "c": "one.safetensors"})");
  const Checkpoint checkpoint = Checkpoint::Open(Path(""));
  EXPECT_EQ(checkpoint.tensors().size(), 1u);
  EXPECT_EQ(checkpoint.absent_tensors(),
            (std::map<std::string, std::string>{{"c", "one.safetensors"}}));
}

TEST_F(CheckpointTest, RefusesAnIndexThatIsNoneOrLeavesItsDirectory) {
  WriteText("model.safetensors.index.json", "{");
  EXPECT_THAT(ErrorOfOpening(), HasSubstr("no JSON"));
  WriteText("model.safetensors.index.json", "[1]");
  EXPECT_THAT(ErrorOfOpening(), HasSubstr("array"));
  WriteText("model.safetensors.index.json", R"({"weight_map": [1]})");
  EXPECT_THAT(ErrorOfOpening(), HasSubstr("weight_map"));
  for (const char* name : {"\"../x\"", "\"/etc/passwd\"", "\"..\"", "\"\"", "5", "\"a/b\""}) {
    WriteIndex(std::string(R"({"a": )") + name + "}");
    EXPECT_THAT(ErrorOfOpening(), HasSubstr("'a': must name a file beside the index")) << name;
  }
  WriteText("model.safetensors.index.json", std::string(100'000, '['));
  EXPECT_THAT(ErrorOfOpening(), HasSubstr("weight_map"));
}

std::optional<std::string> Same(const std::string& name) { return name; }

class WeightStoreTest : public CheckpointTest {
 protected:
  Checkpoint Written(const std::map<std::string, ConstTensorView>& tensors) const {
    WriteSafetensors(Path("model.safetensors"), tensors);
    return Checkpoint::Open(directory_);
  }
};

TEST_F(WeightStoreTest, HandsOutMatricesInTheComputeType) {
  const Tensor f16 = RandomTensor(DType::kF16, {300, 700}, 3),
               f32 = RandomTensor(DType::kF32, {5, 3}, 4);
  const Checkpoint checkpoint = Written({{"bf16", a_}, {"f16", f16}, {"f32", f32}});
  for (DType compute : {DType::kF32, DType::kBF16}) {
    WeightStore store(checkpoint, Same, compute);
    for (const auto& [name, want] :
         {std::pair<std::string, const Tensor*>{"bf16", &a_}, {"f16", &f16}, {"f32", &f32}}) {
      const SharedMatrix got = store.TakeMatrix(name, want->shape());
      const Tensor converted = ConvertTo(*want, compute);
      ASSERT_EQ(got.view.dtype(), compute);
      EXPECT_EQ(std::memcmp(got.view.raw(), converted.view().raw(), converted.SizeBytes()), 0);
      // Mapped where nothing had to be done, and only there.
      const bool mapped = got.view.raw() == checkpoint.tensors().at(name).view.raw();
      EXPECT_EQ(mapped, want->dtype() == compute) << name;
      EXPECT_EQ(static_cast<bool>(got.release), mapped);
    }
    store.CheckAllTaken();
  }
}

TEST_F(WeightStoreTest, KeepsTheFileMappedForItsMatrices) {
  SharedMatrix matrix;
  {
    const Checkpoint checkpoint = Written({{"a", b_}});
    WeightStore store(checkpoint, Same, DType::kF32);
    matrix = store.TakeMatrix("a", {3});
  }
  std::filesystem::remove(Path("model.safetensors"));
  EXPECT_EQ(std::memcmp(matrix.view.raw(), b_.data<float>(), 12), 0);
}

TEST_F(WeightStoreTest, CopiesWhatIsNotAligned) {
  // One byte before: the f32 lies at an odd address.
  const auto path = WriteRaw(
      R"({"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "w.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [1, 17]}})",
      17);
  std::filesystem::rename(path, Path("model.safetensors"));
  const Checkpoint checkpoint = Checkpoint::Open(directory_);
  WeightStore store(checkpoint, Same, DType::kF32);
  const SharedMatrix got = store.TakeMatrix("w.weight", {2, 2});
  EXPECT_EQ(reinterpret_cast<uintptr_t>(got.view.raw()) % 4, 0u);
  EXPECT_EQ(std::memcmp(got.view.raw(), checkpoint.tensors().at("w.weight").view.raw(), 16), 0);
}

TEST_F(WeightStoreTest, MakesProjectionsWithBiasAndFlattensConvolutions) {
  const Tensor kernel = RandomTensor(DType::kBF16, {8, 3, 2, 2}, 5);
  const Tensor bias = RandomTensor(DType::kBF16, {8}, 6);
  const Checkpoint checkpoint = Written({{"patch.weight", kernel}, {"patch.bias", bias}});
  WeightStore store(checkpoint, Same, DType::kF32);
  EXPECT_TRUE(store.Has("patch.bias"));
  const LinearWeight weight = store.TakeLinear("patch", 8, 12, true);
  EXPECT_TRUE(weight.has_bias());
  std::vector<float> row(12);
  weight.CopyRow(7, row.data());
  for (int i = 0; i < 12; ++i) EXPECT_EQ(row[i], kernel.data<BFloat16>()[7 * 12 + i].ToFloat());
}

TEST_F(WeightStoreTest, StacksProjectionsInTheOrderGiven) {
  const Tensor q = RandomTensor(DType::kF32, {3, 6}, 5), k = RandomTensor(DType::kF32, {2, 6}, 6);
  const Checkpoint checkpoint = Written({{"a.k.weight", k}, {"a.q.weight", q}});
  WeightStore store(checkpoint, Same, DType::kF32);
  const LinearWeight both = store.TakeProjections("a.", {{"q", 3}, {"k", 2}}, 6, false);
  EXPECT_EQ(both.n(), 5);
  EXPECT_FALSE(both.has_bias());
  std::vector<float> row(6);
  both.CopyRow(4, row.data());
  for (int i = 0; i < 6; ++i) EXPECT_EQ(row[i], At(k, 1, i));
  EXPECT_EQ(store.quantised_elements(), 0);
  store.CheckAllTaken();
}

TEST_F(WeightStoreTest, RefusesEightBitsOnTheCpuAndBesideF32) {
  const Checkpoint checkpoint = Written({{"a", a_}});
  const auto open = [&](DType compute_type, Device device) {
    return [&checkpoint, compute_type, device] {
      WeightStore(checkpoint, Same, compute_type, {device, WeightFormat::kFp8});
    };
  };
  EXPECT_THAT(open(DType::kBF16, Device::kCpu),
              ThrowsMessage<InputError>(HasSubstr("weights in fp8 need a GPU, got the cpu")));
  EXPECT_THAT(open(DType::kF32, Device::kCuda),
              ThrowsMessage<InputError>(HasSubstr("need bf16 as the compute type, got f32")));
}

TEST_F(WeightStoreTest, RenamesAndIgnores) {
  const Checkpoint checkpoint = Written({{"model.a", a_}, {"unused.b", b_}});
  WeightStore store(
      checkpoint,
      [](const std::string& name) -> std::optional<std::string> {
        if (name == "unused.b") return std::nullopt;
        return name.substr(6);
      },
      DType::kBF16);
  EXPECT_TRUE(store.Has("a"));
  EXPECT_FALSE(store.Has("model.a"));
  const Tensor a = store.TakeF32("a", {4, 6});
  EXPECT_EQ(At(a, 1, 2), At(a_, 1, 2));
  store.CheckAllTaken();
}

TEST_F(WeightStoreTest, NamesWhatIsWrong) {
  Tensor ids(DType::kI32, {2});
  std::memset(ids.data<int32_t>(), 0, 8);
  const Checkpoint checkpoint = Written({{"a", a_}, {"b", b_}, {"ids", ids}});
  WeightStore store(checkpoint, Same, DType::kBF16);
  EXPECT_THAT(ErrorOf([&] { store.TakeF32("c", {7}); }),
              AllOf(HasSubstr("'c' [7] is missing"), HasSubstr(directory_.string())));
  EXPECT_THAT(ErrorOf([&] { store.TakeF32("b", {4}); }),
              AllOf(HasSubstr("model.safetensors"), HasSubstr("'b' must be [4], got [3]")));
  EXPECT_THAT(ErrorOf([&] { store.TakeMatrix("ids", {2}); }),
              HasSubstr("'ids' must be f32, f16 or bf16, got i32"));
  EXPECT_THAT(ErrorOf([&] { store.CheckAllTaken(); }), HasSubstr("1 without: 'a'"));
  store.TakeMatrix("a", {4, 6});
  EXPECT_THAT(
      [&] {
        store.TakeMatrix("a", {4, 6});
      },
      ThrowsMessage<Error>(HasSubstr("taken once")));
  store.CheckAllTaken();
  EXPECT_THAT(ErrorOf([&] {
                WeightStore(
                    checkpoint, [](const std::string&) { return "same"; }, DType::kF32);
              }),
              AllOf(HasSubstr("'a' and 'b'"), HasSubstr("'same'")));
  EXPECT_THROW(WeightStore(checkpoint, Same, DType::kF16), InputError);
}

TEST_F(WeightStoreTest, RefusesDtypesItCannotUseUnlessTheyAreIgnored) {
  std::filesystem::rename(
      WriteRaw(R"({"position_ids": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}})", 8),
      Path("model.safetensors"));
  const Checkpoint checkpoint = Checkpoint::Open(directory_);
  EXPECT_THAT(ErrorOf([&] { WeightStore(checkpoint, Same, DType::kF32); }),
              HasSubstr("'position_ids' must be f32, f16 or bf16, got I64"));
  WeightStore(
      checkpoint, [](const std::string&) { return std::nullopt; }, DType::kF32)
      .CheckAllTaken();
}

}  // namespace
}  // namespace sluice
