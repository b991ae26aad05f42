// Backgrounds of the demo world.
#ifndef SLUICE_DEMOS_WORLD_TEXTURE_H_
#define SLUICE_DEMOS_WORLD_TEXTURE_H_

#include <cstdint>
#include <vector>

#include "demos/world/random.h"

namespace sluice::world {

// kDetailed leaves out what looks the same wherever one looks along a line - flat colours, stripes,
// the grain of wood: a camera that pans over it would seem to stand still.
enum class Detail { kAny, kDetailed };

// A background, [144, 256, 3] u8: flat, a gradient, stripes, layered noise like sky, grass, sand,
// wood or water, or a clutter of blurred pieces. Colours stay muted, so that the saturated,
// outlined objects in front are never mistaken for it. Takes about half a millisecond.
std::vector<uint8_t> MakeTexture(Random& random, Detail detail);

}  // namespace sluice::world

#endif  // SLUICE_DEMOS_WORLD_TEXTURE_H_
