#include "runtime/weight_store.h"

#include <utility>

#include "runtime/convert.h"
#include "runtime/error.h"
#include "runtime/load_threads.h"
#include "runtime/ops/cuda/device.h"
#include "runtime/transfer.h"

namespace sluice {
namespace {

constexpr int kFp8Capability = 89;  // the first GPUs whose matrix units take e4m3

[[noreturn]] void Fail(const std::filesystem::path& place, const std::string& what) {
  throw InputError("[weights] " + place.string() + ": " + what);
}

bool IsFloat(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kF16 || dtype == DType::kBF16;
}

// [N, C, P, P] as [N, C * P * P]: how a convolution without overlap becomes a product.
Shape Flattened(const Shape& shape) {
  return shape.rank() < 2 || shape[0] == 0 ? shape
                                           : Shape{shape[0], shape.NumElements() / shape[0]};
}

void CheckPlace(DType compute_type, const WeightPlace& place) {
  if (place.format == WeightFormat::kPlain) return;
  const std::string what = std::string("[weights] weights in ") + Name(place.format);
  if (place.device == Device::kCpu) {
    throw InputError(what + " need a GPU, got the cpu; there they stay in the compute type");
  }
  if (compute_type != DType::kBF16) {
    throw InputError(what + " need bf16 as the compute type, got " + Name(compute_type));
  }
  const int capability = cuda::ComputeCapability();
  if (place.format == WeightFormat::kFp8 && capability < kFp8Capability) {
    throw InputError(what + " need a GPU of compute capability 8.9 or more, got " +
                     std::to_string(capability / 10) + "." + std::to_string(capability % 10) +
                     "; it can use int8");
  }
}

// On the machine's cores: a checkpoint holds billions of elements.
void ConvertLarge(ConstTensorView from, Tensor& to) {
  constexpr int64_t kRun = 1 << 16;
  const int64_t count = from.shape().NumElements();
  const char* source = static_cast<const char*>(from.raw());
  char* target = static_cast<char*>(to.view().raw());
  ParallelLoad((count + kRun - 1) / kRun, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kRun, last = std::min(end * kRun, count);
    ConvertElements(source + first * static_cast<int64_t>(SizeOf(from.dtype())), from.dtype(),
                    target + first * static_cast<int64_t>(SizeOf(to.dtype())), to.dtype(),
                    last - first);
  });
}

}  // namespace

WeightStore::WeightStore(
    const Checkpoint& checkpoint,
    const std::function<std::optional<std::string>(const std::string&)>& canonical,
    DType compute_type, WeightPlace place)
    : directory_(checkpoint.directory()), compute_type_(compute_type), place_(place) {
  if (compute_type != DType::kF32 && compute_type != DType::kBF16) {
    throw InputError(std::string("[weights] compute type must be f32 or bf16, got ") +
                     Name(compute_type));
  }
  CheckPlace(compute_type, place);
  for (const auto& [file_name, entry] : checkpoint.tensors()) {
    const std::optional<std::string> name = canonical(file_name);
    if (!name) continue;
    const auto [known, first] = file_names_.emplace(*name, file_name);
    if (!first) {
      Fail(directory_, "tensors '" + known->second + "' and '" + file_name +
                           "' must be different weights, got both as '" + *name + "'");
    }
    entries_.emplace(*name, entry);
  }
  for (const auto& [file_name, shard] : checkpoint.absent_tensors()) {
    if (const std::optional<std::string> name = canonical(file_name)) absent_[*name] = shard;
  }
  for (const auto& [file_name, dtype] : checkpoint.other_tensors()) {
    if (const std::optional<std::string> name = canonical(file_name)) {
      Fail(directory_, "tensor '" + file_name + "' must be f32, f16 or bf16, got " + dtype);
    }
  }
}

bool WeightStore::Has(const std::string& name) const { return entries_.count(name) > 0; }

const Checkpoint::Entry& WeightStore::Find(const std::string& name, const Shape& expected) {
  const auto found = entries_.find(name);
  if (found == entries_.end()) {
    const auto absent = absent_.find(name);
    if (absent != absent_.end()) {
      Fail(directory_ / absent->second,
           "tensor '" + name + "' " + expected.ToString() +
               " must be here, as the index says; is the file complete?");
    }
    Fail(directory_, "tensor '" + name + "' " + expected.ToString() +
                         " is missing; is the checkpoint complete and of a supported family?");
  }
  const Checkpoint::Entry& entry = found->second;
  if (!taken_.insert(name).second) {
    throw Error("[weights] tensor '" + name + "' must be taken once, got a second call");
  }
  const Shape& shape = entry.view.shape();
  if (shape != expected && !(expected.rank() == 2 && Flattened(shape) == expected)) {
    Fail(entry.file->path(), "tensor '" + file_names_[name] + "' must be " + expected.ToString() +
                                 ", got " + shape.ToString() +
                                 "; does config.json belong to these weights?");
  }
  if (!IsFloat(entry.view.dtype())) {
    Fail(entry.file->path(), "tensor '" + file_names_[name] + "' must be f32, f16 or bf16, got " +
                                 Name(entry.view.dtype()));
  }
  return entry;
}

Tensor WeightStore::TakeF32(const std::string& name, const Shape& expected) {
  const Checkpoint::Entry& entry = Find(name, expected);
  Tensor result(DType::kF32, expected);
  ConvertLarge(entry.view, result);
  return result;
}

Tensor WeightStore::TakePlaced(const std::string& name, const Shape& expected) {
  return Placed(TakeF32(name, expected), place_.device);
}

SharedMatrix WeightStore::TakeMatrix(const std::string& name, const Shape& expected) {
  const Checkpoint::Entry& entry = Find(name, expected);
  const bool aligned =
      reinterpret_cast<uintptr_t>(entry.view.raw()) % SizeOf(entry.view.dtype()) == 0;
  const auto release = [file = entry.file, view = entry.view] { file->ReleasePages(view); };
  if (entry.view.dtype() == compute_type_ && aligned) {
    return {ConstTensorView(entry.view.raw(), compute_type_, expected), entry.file, release};
  }
  auto copy = std::make_shared<Tensor>(compute_type_, expected);
  ConvertLarge(entry.view, *copy);
  release();
  return {copy->view(), copy, nullptr};
}

LinearWeight WeightStore::TakeLinear(const std::string& name, int64_t n, int64_t k,
                                     bool with_bias) {
  SharedMatrix weight = TakeMatrix(name + ".weight", {n, k});
  Tensor bias;
  if (with_bias) bias = TakeF32(name + ".bias", {n});
  return LinearWeight(std::move(weight), std::move(bias), place_.device);
}

LinearWeight WeightStore::TakeProjection(const std::string& name, int64_t n, int64_t k,
                                         bool with_bias) {
  return TakeProjections("", {{name, n}}, k, with_bias);
}

LinearWeight WeightStore::TakeProjections(const std::string& prefix, const std::vector<Part>& parts,
                                          int64_t k, bool with_bias) {
  std::vector<SharedMatrix> weights;
  std::vector<Tensor> biases;
  for (const Part& part : parts) {
    weights.push_back(TakeMatrix(prefix + part.name + ".weight", {part.n, k}));
    if (with_bias) biases.push_back(TakeF32(prefix + part.name + ".bias", {part.n}));
    if (place_.format != WeightFormat::kPlain) quantised_elements_ += part.n * k;
  }
  std::vector<const Tensor*> listed;
  for (const Tensor& bias : biases) listed.push_back(&bias);
  return LinearWeight::Stack(weights, listed, place_);
}

void WeightStore::CheckAllTaken() const {
  std::string names;
  size_t left = 0;
  for (const auto& [name, entry] : entries_) {
    if (taken_.count(name)) continue;
    if (++left <= 5) names += (left > 1 ? ", '" : "'") + file_names_.at(name) + "'";
  }
  if (left == 0) return;
  Fail(directory_, "every tensor must have a place in the model, got " + std::to_string(left) +
                       " without: " + names + (left > 5 ? ", ..." : ""));
}

}  // namespace sluice
