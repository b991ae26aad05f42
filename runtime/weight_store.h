// The tensors of a checkpoint under canonical names, handed out once each with their shape checked.
// At the end `CheckAllTaken` tells what nobody asked for. Used by one thread while loading.
#ifndef SLUICE_RUNTIME_WEIGHT_STORE_H_
#define SLUICE_RUNTIME_WEIGHT_STORE_H_

#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "runtime/ops/linear.h"
#include "runtime/safetensors.h"

namespace sluice {

class WeightStore {
 public:
  // `canonical` maps a file's name to the canonical one, or to nothing for tensors to ignore.
  // Throws InputError when two file names become one canonical name, or when a tensor that is not
  // to be ignored has a dtype that we do not compute with (see SafetensorsFile::other_tensors), or
  // when what computes cannot multiply with projections as `place` wants them.
  WeightStore(const Checkpoint& checkpoint,
              const std::function<std::optional<std::string>(const std::string&)>& canonical,
              DType compute_type, WeightPlace place = {});

  bool Has(const std::string& name) const;
  // A copy in f32 in host memory (norm weights, biases, position tables: small things). Throws
  // InputError naming file, tensor, expected and found shape or dtype; likewise below.
  Tensor TakeF32(const std::string& name, const Shape& expected);
  // The same where the model runs.
  Tensor TakePlaced(const std::string& name, const Shape& expected);
  // In host memory and the compute dtype; the mapped pages themselves where the dtype already
  // matches (and the data is aligned to it). A rank-2 `expected` also fits a tensor of higher rank
  // whose later axes multiply to expected[1]: a convolution [N, C, P, P] is [N, C * P * P]. The
  // store's Checkpoint files stay open for as long as the returned Matrix lives.
  SharedMatrix TakeMatrix(const std::string& name, const Shape& expected);
  // Where the model runs, in the compute dtype: `name.weight` [N, K] and, if `with_bias`,
  // `name.bias` [N].
  LinearWeight TakeLinear(const std::string& name, int64_t n, int64_t k, bool with_bias);
  // The same in the format that the place says: what most of a model's weights and time go into.
  LinearWeight TakeProjection(const std::string& name, int64_t n, int64_t k, bool with_bias);
  // Several of them as one, see LinearWeight::Stack: their names behind `prefix`, and outputs.
  struct Part {
    std::string name;
    int64_t n;
  };
  LinearWeight TakeProjections(const std::string& prefix, const std::vector<Part>& parts, int64_t k,
                               bool with_bias);
  // Throws InputError naming the first tensors nobody took.
  void CheckAllTaken() const;
  DType compute_type() const { return compute_type_; }
  Device device() const { return place_.device; }
  // Elements of matrices handed out in 8 bits.
  int64_t quantised_elements() const { return quantised_elements_; }

 private:
  const Checkpoint::Entry& Find(const std::string& name, const Shape& expected);
  std::filesystem::path directory_;
  std::map<std::string, Checkpoint::Entry> entries_;
  std::map<std::string, std::string> file_names_;  // canonical name -> name in the file
  std::map<std::string, std::string> absent_;      // canonical name -> file, of Checkpoint's
  std::set<std::string> taken_;
  DType compute_type_;
  WeightPlace place_;
  int64_t quantised_elements_ = 0;
};

}  // namespace sluice

#endif  // SLUICE_RUNTIME_WEIGHT_STORE_H_
