// A tiny random generator whose every draw is the same on every platform and compiler, which the
// distributions of the standard library do not promise.
#ifndef SLUICE_DEMOS_WORLD_RANDOM_H_
#define SLUICE_DEMOS_WORLD_RANDOM_H_

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace sluice::world {

// splitmix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators", 2014).
// Used by one thread at a time.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t Next() {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }

  // In [0, 1), 24 bits: every product with a float is exact enough to repeat anywhere.
  float Unit() { return static_cast<float>(Next() >> 40) * (1.0f / 16777216.0f); }
  // In [low, high).
  float Range(float low, float high) { return low + (high - low) * Unit(); }
  // In [0, bound). REQUIRES: bound > 0.
  int Below(int bound) {
    return static_cast<int>(((Next() >> 32) * static_cast<uint64_t>(bound)) >> 32);
  }
  // In [low, high], both included. REQUIRES: low <= high.
  int Between(int low, int high) { return low + Below(high - low + 1); }
  bool Chance(float probability) { return Unit() < probability; }

  // REQUIRES: items is not empty.
  template <typename T>
  const T& Pick(const std::vector<T>& items) {
    return items[static_cast<size_t>(Below(static_cast<int>(items.size())))];
  }

  template <typename T>
  void Shuffle(std::vector<T>& items) {
    for (size_t i = items.size(); i > 1; --i) {
      std::swap(items[i - 1], items[static_cast<size_t>(Below(static_cast<int>(i)))]);
    }
  }

 private:
  uint64_t state_;
};

}  // namespace sluice::world

#endif  // SLUICE_DEMOS_WORLD_RANDOM_H_
