#include "runtime/ops/cpu/weight_memory.h"

#include <cstdint>
#include <mutex>

namespace sluice {
namespace {

// Pages of a block are only backed once they are written, so what a block has left costs addresses
// and no memory.
constexpr int64_t kBlockBytes = int64_t{64} << 20;

struct Block {
  Tensor memory = Tensor(DType::kU8, {kBlockBytes});
  int64_t used = 0;
};

}  // namespace

WeightMemory AllocateWeight(DType dtype, Shape shape) {
  const int64_t bytes = shape.NumElements() * static_cast<int64_t>(SizeOf(dtype));
  if (bytes > kBlockBytes / 2) {
    auto own = std::make_shared<Tensor>(dtype, shape);
    return {own->view(), own};
  }
  // The block being filled. It holds no block alive, so nothing outlives the last weight.
  static std::mutex mutex;
  static std::weak_ptr<Block> current;
  const std::lock_guard lock(mutex);
  std::shared_ptr<Block> block = current.lock();
  if (!block || block->used + bytes > kBlockBytes) {
    block = std::make_shared<Block>();
    current = block;
  }
  const TensorView view(block->memory.data<uint8_t>() + block->used, dtype, shape);
  block->used += (bytes + 63) / 64 * 64;
  return {view, block};
}

}  // namespace sluice
