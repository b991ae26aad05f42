// Products of several rows: oneDNN's matmul, prepared once for every shape.
#include <oneapi/dnnl/dnnl.hpp>

#include "runtime/ops/cpu/linear.h"
#include "runtime/ops/cpu/product_cache.h"

namespace sluice {
namespace {

using Tag = dnnl::memory::format_tag;

dnnl::memory::data_type Type(DType dtype) {
  return dtype == DType::kBF16 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32;
}

Product MakeProduct(const dnnl::engine& engine, const ProductKey& key) {
  const dnnl::memory::desc x({key.m, key.k}, Type(key.x), Tag::ab);
  // oneDNN's weight is [K, N]: "ba" is our row-major [N, K].
  const dnnl::memory::desc weight({key.k, key.n}, Type(key.x),
                                  key.x == DType::kBF16 ? Tag::BA16a64b2a : Tag::ba);
  const dnnl::memory::desc bias({1, key.n}, dnnl::memory::data_type::f32, Tag::ab);
  const dnnl::memory::desc y({key.m, key.n}, Type(key.y), Tag::ab);

  dnnl::post_ops post;
  if (key.activation == Activation::kGeluTanh) {
    post.append_eltwise(1.f, dnnl::algorithm::eltwise_gelu_tanh, 0.f, 0.f);
  } else if (key.activation == Activation::kGeluErf) {
    post.append_eltwise(1.f, dnnl::algorithm::eltwise_gelu_erf, 0.f, 0.f);
  } else if (key.activation == Activation::kQuickGelu) {
    post.append_eltwise(1.f, dnnl::algorithm::eltwise_swish, 1.702f, 0.f);
  }
  if (key.accumulate) post.append_sum(1.f);
  dnnl::primitive_attr attributes;
  attributes.set_post_ops(post);

  const auto desc =
      key.bias ? dnnl::matmul::desc(x, weight, bias, y) : dnnl::matmul::desc(x, weight, y);
  const dnnl::matmul::primitive_desc prepared(desc, attributes, engine);
  Product product;
  product.primitive = dnnl::matmul(prepared);
  product.x = dnnl::memory(x, engine, nullptr);
  product.weight = dnnl::memory(weight, engine, nullptr);
  if (key.bias) product.bias = dnnl::memory(bias, engine, nullptr);
  product.y = dnnl::memory(y, engine, nullptr);
  return product;
}

}  // namespace

bool OneDnnHasBf16() {
  // The enumeration grows with capability on x86; "all" is what an unlimited library says.
  const dnnl::cpu_isa isa = dnnl::get_effective_cpu_isa();
  return isa == dnnl::cpu_isa::avx512_core_bf16 || isa == dnnl::cpu_isa::avx512_core_amx;
}

void LinearOneDnn(ExecContext& ctx, const LinearArgs& args) {
  ProductKey key;
  key.m = args.m;
  key.n = args.n;
  key.k = args.k;
  key.x = args.dtype;
  key.y = args.y.dtype();
  key.bias = args.bias != nullptr;
  key.accumulate = args.options.accumulate;
  key.activation = args.options.activation;

  ctx.UseThreads();
  ProductCache& cache = ctx.product_cache();
  Product& product = cache.FindOrMake(key, MakeProduct);
  product.x.set_data_handle(const_cast<void*>(args.x.raw()));
  product.weight.set_data_handle(const_cast<void*>(args.weight));
  product.y.set_data_handle(args.y.raw());
  // The C call takes an array; the C++ one builds a hash map and a vector each time.
  dnnl_exec_arg_t arguments[4] = {{DNNL_ARG_SRC, product.x.get()},
                                  {DNNL_ARG_WEIGHTS, product.weight.get()},
                                  {DNNL_ARG_DST, product.y.get()}};
  int count = 3;
  if (args.bias) {
    product.bias.set_data_handle(const_cast<float*>(args.bias));
    arguments[count++] = {DNNL_ARG_BIAS, product.bias.get()};
  }
  dnnl::error::wrap_c_api(
      dnnl_primitive_execute(product.primitive.get(), cache.stream().get(), count, arguments),
      "[linear] oneDNN could not run the product");
}

}  // namespace sluice
