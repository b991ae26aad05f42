// The sprite sheet of the demo world, decoded.
#ifndef SLUICE_DEMOS_CLI_ATLAS_H_
#define SLUICE_DEMOS_CLI_ATLAS_H_

#include "demos/world/render.h"

namespace sluice::cli {

// Reads the bundled sheet. Throws InputError when it is missing or not a PNG.
world::Atlas LoadAtlas();

}  // namespace sluice::cli

#endif  // SLUICE_DEMOS_CLI_ATLAS_H_
