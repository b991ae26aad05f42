#include "runtime/exec_context.h"

#include <omp.h>

#include <string>

#include "runtime/error.h"
#include "runtime/ops/cpu/product_cache.h"

namespace sluice {

ExecContext::ExecContext(const ExecOptions& options) : options_(options) {
  if (options.num_threads < 1) {
    throw InputError("[exec_context] num_threads must be at least 1, got " +
                     std::to_string(options.num_threads));
  }
  UseThreads();
  product_cache_ = std::make_unique<ProductCache>();
}

ExecContext::~ExecContext() = default;

void ExecContext::UseThreads() const {
  if (omp_get_max_threads() != options_.num_threads) omp_set_num_threads(options_.num_threads);
}

}  // namespace sluice
