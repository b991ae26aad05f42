#include "streaming/moving_picture.h"

#include <algorithm>
#include <fstream>
#include <utility>

#include "runtime/error.h"

namespace sluice {
namespace {

constexpr uint64_t kMaxBytes = uint64_t{256} << 20;

std::string ReadWhole(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary | std::ios::ate);
  const std::streamoff size = in.tellg();
  if (!in || size < 0) throw Error("cannot be read");
  if (static_cast<uint64_t>(size) > kMaxBytes) {
    throw Error("a moving picture's file may have " + std::to_string(kMaxBytes) +
                " bytes, it has " + std::to_string(size) + "; make a video of it");
  }
  std::string bytes(static_cast<size_t>(size), '\0');
  in.seekg(0);
  in.read(bytes.data(), size);
  bytes.resize(static_cast<size_t>(in.gcount()));
  return bytes;
}

}  // namespace

void CheckSides(int64_t width, int64_t height, int max_side_pixels) {
  if (std::max(width, height) <= max_side_pixels) return;
  throw Error("pictures are " + std::to_string(width) + "x" + std::to_string(height) +
              ", the longest side allowed is " + std::to_string(max_side_pixels));
}

std::unique_ptr<MovingPicture> OpenMovingPicture(MovingFormat format,
                                                 const std::filesystem::path& path,
                                                 int max_side_pixels) {
  std::string bytes = ReadWhole(path);
  return format == MovingFormat::kPng ? ReadMovingPng(std::move(bytes), max_side_pixels)
                                      : ReadMovingWebp(std::move(bytes), max_side_pixels);
}

}  // namespace sluice
