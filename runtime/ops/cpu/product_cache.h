// Prepared oneDNN products of one ExecContext. Private to runtime/.
#ifndef SLUICE_RUNTIME_OPS_CPU_PRODUCT_CACHE_H_
#define SLUICE_RUNTIME_OPS_CPU_PRODUCT_CACHE_H_

#include <cstdint>
#include <list>
#include <oneapi/dnnl/dnnl.hpp>
#include <unordered_map>

#include "runtime/dtype.h"
#include "runtime/ops/linear.h"

namespace sluice {

// Everything a product's generated code depends on.
struct ProductKey {
  int64_t m = 0, n = 0, k = 0;
  DType x = DType::kF32, y = DType::kF32;
  bool bias = false;
  bool accumulate = false;
  Activation activation = Activation::kNone;

  bool operator==(const ProductKey&) const = default;
};

// One prepared product and the memory objects its arguments are put into. The objects are made
// once: creating them costs more than the lookup.
struct Product {
  dnnl::matmul primitive;
  dnnl::memory x, weight, bias, y;
};

// Keyed by ProductKey, bounded; the product used longest ago leaves first. Used by one thread at a
// time, like the context it belongs to.
class ProductCache {
 public:
  ProductCache();

  // The product for `key`, made by `make` if it is not there. Valid until the next call.
  using Make = Product (*)(const dnnl::engine& engine, const ProductKey& key);
  Product& FindOrMake(const ProductKey& key, Make make);

  dnnl::stream& stream() { return stream_; }
  size_t size() const { return entries_.size(); }
  // A decoder has about ten products a sequence length, and prompts come in many lengths.
  static constexpr size_t kMaxProducts = 512;

 private:
  struct Hash {
    size_t operator()(const ProductKey& key) const;
  };
  using Entry = std::pair<ProductKey, Product>;

  dnnl::engine engine_;
  dnnl::stream stream_;
  std::list<Entry> entries_;  // most recently used first
  std::unordered_map<ProductKey, std::list<Entry>::iterator, Hash> index_;
};

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_CPU_PRODUCT_CACHE_H_
