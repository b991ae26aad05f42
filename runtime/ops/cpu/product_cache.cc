#include "runtime/ops/cpu/product_cache.h"

#include <utility>

namespace sluice {

ProductCache::ProductCache() : engine_(dnnl::engine::kind::cpu, 0), stream_(engine_) {}

size_t ProductCache::Hash::operator()(const ProductKey& key) const {
  // Sizes are small and similar, so they are spread by multiplication before they meet.
  constexpr uint64_t kSpread = 0x9e3779b97f4a7c15;
  uint64_t hash = 0;
  const auto mix = [&](uint64_t value) {
    hash = (hash ^ value) * kSpread;
    hash ^= hash >> 29;
  };
  mix(static_cast<uint64_t>(key.m));
  mix(static_cast<uint64_t>(key.n) << 32 ^ static_cast<uint64_t>(key.k));
  mix(static_cast<uint64_t>(key.x) | static_cast<uint64_t>(key.y) << 8 |
      static_cast<uint64_t>(key.bias) << 17 | static_cast<uint64_t>(key.accumulate) << 18 |
      static_cast<uint64_t>(key.activation) << 24);
  return hash;
}

Product& ProductCache::FindOrMake(const ProductKey& key, Make make) {
  if (const auto found = index_.find(key); found != index_.end()) {
    entries_.splice(entries_.begin(), entries_, found->second);
    return found->second->second;
  }
  entries_.emplace_front(key, make(engine_, key));
  index_.emplace(key, entries_.begin());
  if (entries_.size() > kMaxProducts) {
    index_.erase(entries_.back().first);
    entries_.pop_back();
  }
  return entries_.front().second;
}

}  // namespace sluice
