#include "streaming/container_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <string>

namespace sluice {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

std::string Bytes(uint64_t value, int count) {
  std::string bytes;
  for (int i = count - 1; i >= 0; --i) bytes += static_cast<char>(value >> 8 * i & 0xff);
  return bytes;
}

std::string Box(const std::string& type, const std::string& content) {
  return Bytes(content.size() + 8, 4) + type + content;
}

ContainerFacts Facts(const std::string& bytes) {
  const auto* test = testing::UnitTest::GetInstance()->current_test_info();
  const fs::path path =
      fs::temp_directory_path() / ("sluice_container_" + std::to_string(getpid()) + test->name());
  std::ofstream(path, std::ios::binary) << bytes;
  ContainerFacts facts = ReadContainerFacts(path);
  fs::remove(path);
  return facts;
}

std::string Mp4() {
  return Box("ftyp", "isom") + Box("moov", Box("trak", "")) + Box("mdat", std::string(100, 'x'));
}

TEST(ContainerFileTest, TellsAnMp4ThatIsCutOff) {
  const std::string whole = Mp4();
  EXPECT_EQ(Facts(whole).cut_off, "");
  EXPECT_EQ(Facts(whole.substr(0, whole.size() - 1)).cut_off,
            "its header promises " + std::to_string(whole.size()) + " bytes, the file has " +
                std::to_string(whole.size() - 1));
  EXPECT_EQ(Facts(Box("ftyp", "isom") + Bytes(0, 4) + "mdat to the end").cut_off, "");
  EXPECT_THAT(
      Facts(Box("ftyp", "isom") + Bytes(1, 4) + "mdat" + Bytes(uint64_t{1} << 40, 8)).cut_off,
      HasSubstr("promises 1099511627788"));
}

TEST(ContainerFileTest, TellsAMatroskaFileThatIsCutOffOrJoined) {
  const std::string ebml =
                        "\x1a\x45\xdf\xa3\x84"
                        "webm",
                    id = "\x18\x53\x80\x67";
  const std::string segment = id + Bytes(0x01, 1) + Bytes(20, 7) + std::string(20, 'x');
  const std::string whole = ebml + segment;
  EXPECT_EQ(Facts(whole).cut_off, "");
  EXPECT_EQ(Facts(whole).unread, "");
  EXPECT_THAT(Facts(whole.substr(0, 30)).cut_off, HasSubstr("promises 41 bytes, the file has 30"));
  EXPECT_THAT(Facts(whole + whole).unread, HasSubstr("joined to it at byte 41 of 82"));
  const std::string unknown = id + Bytes(0x01, 1) + std::string(7, '\xff') + "xxxxxxxx";
  EXPECT_EQ(Facts(ebml + unknown).cut_off, "");
}

TEST(ContainerFileTest, TakesAnAviFromAPipeForWhole) {
  const std::string rest = "AVI LIST" + std::string(20, 'x');
  EXPECT_THAT(Facts("RIFF" + std::string("\x64\0\0\0", 4) + rest).cut_off,
              HasSubstr("promises 108"));
  EXPECT_EQ(Facts("RIFF" + std::string("\xff\xff\xff\xff", 4) + rest).cut_off, "");
  EXPECT_EQ(Facts("RIFF" + std::string("\0\0\0\0", 4) + rest).cut_off, "");
}

TEST(ContainerFileTest, TellsAMovingPngFromAStillOne) {
  const auto chunk = [](const std::string& type, const std::string& content) {
    return Bytes(content.size(), 4) + type + content + "CRC!";
  };
  const std::string start = "\x89PNG\r\n\x1a\n" + chunk("IHDR", std::string(13, 'x'));
  const auto moves = [](uint64_t pictures) { return Bytes(pictures, 4) + Bytes(0, 4); };
  EXPECT_EQ(Facts(start + chunk("acTL", moves(60))).moving, MovingFormat::kPng);
  EXPECT_EQ(Facts(start + chunk("acTL", moves(1))).moving, MovingFormat::kNone);
  EXPECT_EQ(Facts(start + chunk("IDAT", "x") + chunk("acTL", moves(60))).moving,
            MovingFormat::kNone);
}

TEST(ContainerFileTest, IsNotLedAstrayByNonsense) {
  for (const std::string& bytes :
       {std::string(), std::string("RIFF"), Bytes(3, 4) + "moov" + std::string(9, '\xff'),
        Box("moov", Bytes(0xffffffff, 4) + "trak" + std::string(40, '\xff')),
        Box("moov", Box("trak", Box("mdia", Bytes(1, 4) + "minf"))),
        std::string("\x1a\x45\xdf\xa3\x00\x00\x00\x00\x00\x00\x00\x00\x00", 13)}) {
    EXPECT_EQ(Facts(bytes).unread, "");
    EXPECT_EQ(Facts(bytes).moving, MovingFormat::kNone);
  }
}

}  // namespace
}  // namespace sluice
