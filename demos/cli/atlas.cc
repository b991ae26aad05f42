#include "demos/cli/atlas.h"

#include <png.h>

#include <cstdint>
#include <string>
#include <vector>

#include "demos/cli/common.h"
#include "runtime/error.h"

namespace sluice::cli {

world::Atlas LoadAtlas() {
  const std::string path = BundledPath("demos/world/assets/atlas.png").string();
  png_image image = {};
  image.version = PNG_IMAGE_VERSION;
  std::vector<uint8_t> rgba;
  if (png_image_begin_read_from_file(&image, path.c_str())) {
    image.format = PNG_FORMAT_RGBA;
    rgba.resize(PNG_IMAGE_SIZE(image));
    png_image_finish_read(&image, nullptr, rgba.data(), 0, nullptr);
  }
  const std::string problem = PNG_IMAGE_FAILED(image) ? image.message : "";
  png_image_free(&image);
  if (!problem.empty()) throw InputError("[atlas] cannot decode " + path + ": " + problem);
  return world::Atlas(rgba.data(), static_cast<int>(image.width), static_cast<int>(image.height));
}

}  // namespace sluice::cli
