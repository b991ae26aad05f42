#include "streaming/mp4_header.h"

#include <gtest/gtest.h>

#include <string>

namespace sluice {
namespace {

std::string Bytes(uint64_t value, int count) {
  std::string bytes;
  for (int i = count - 1; i >= 0; --i) bytes += static_cast<char>(value >> 8 * i & 0xff);
  return bytes;
}

std::string Box(const std::string& type, const std::string& content) {
  return Bytes(content.size() + 8, 4) + type + content;
}

// The header's box, with a track of sound before the one of pictures.
std::string Header(uint8_t range) {
  const std::string colr =
      Box("colr", "nclx" + Bytes(1, 2) + Bytes(1, 2) + Bytes(1, 2) + Bytes(range, 1));
  const std::string entry = Box("avc1", std::string(78, '\0') + colr);
  const std::string track =
      Box("trak",
          Box("mdia", Box("minf", Box("stbl", Box("stsd", Bytes(0, 4) + Bytes(1, 4) + entry)))));
  const std::string sound = Box("trak", Box("mdia", Box("minf", Box("stbl", Box("stsd", "")))));
  return Box("moov", sound + track);
}

const std::string kStart = Box("ftyp", "isom") + Box("free", "");
const std::string kData = Box("mdat", std::string(100, 'x'));

// As a stream in pieces of `piece` bytes.
bool Streamed(const std::string& file, size_t piece) {
  Mp4RangeFinder finder;
  for (size_t at = 0; at < file.size(); at += piece) finder.Read(at, file.substr(at, piece));
  return finder.full_range();
}

TEST(Mp4RangeFinderTest, FindsTheRangeInPiecesOfAnySizeBeforeAndAfterThePictures) {
  for (const size_t piece : {1, 3, 7, 8, 16, 100, 10000}) {
    SCOPED_TRACE(piece);
    EXPECT_TRUE(Streamed(kStart + Header(0x80) + kData, piece));
    EXPECT_TRUE(Streamed(kStart + kData + Header(0x80), piece));
    EXPECT_FALSE(Streamed(kStart + Header(0) + kData, piece));
    EXPECT_FALSE(Streamed(kStart + kData + Header(0), piece));
  }
}

TEST(Mp4RangeFinderTest, FindsTheRangeInWhatAReaderFetches) {
  const std::string file = kStart + kData + Header(0x80);
  Mp4RangeFinder finder;
  for (const size_t at : {size_t{0}, size_t{12}, kStart.size()}) {
    finder.Read(at, file.substr(at, 16));
  }
  const size_t header = kStart.size() + kData.size();
  finder.Read(header, file.substr(header, 16));
  finder.Read(header, file.substr(header));
  EXPECT_TRUE(finder.full_range());
}

TEST(Mp4RangeFinderTest, IsNotLedAstrayByNonsense) {
  for (const std::string& bytes :
       {std::string(), std::string("RIFF"), Bytes(3, 4) + "moov" + std::string(9, '\xff'),
        Box("moov", Bytes(0xffffffff, 4) + "trak" + std::string(40, '\xff')),
        Box("moov", Box("trak", Box("mdia", Bytes(1, 4) + "minf"))),
        Bytes(1, 4) + "mdat" + std::string(8, '\xff') + Header(0x80),
        Bytes(1, 4) + "moov" + Bytes(uint64_t{1} << 40, 8) + std::string(100, 'x')}) {
    for (const size_t piece : {1, 5, 1000}) EXPECT_FALSE(Streamed(bytes, piece));
  }
}

}  // namespace
}  // namespace sluice
