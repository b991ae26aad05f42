// What an answer is generated behind: ids that are still to be embedded and rows that are
// embeddings already, in order. Rows are made when they are read, so a long prompt takes memory as
// it is read.
#ifndef SLUICE_LLM_PROMPT_ROWS_H_
#define SLUICE_LLM_PROMPT_ROWS_H_

#include <cstdint>
#include <vector>

#include "llm/decoder.h"
#include "runtime/exec_context.h"
#include "runtime/tensor.h"

namespace sluice {

// Used by one thread at a time.
class PromptRows {
 public:
  PromptRows() = default;
  // rows: [S, E] f32, on the host or where the model runs.
  PromptRows(Tensor rows);  // NOLINT(google-explicit-constructor): a prompt of embeddings alone

  void AddIds(std::vector<int32_t> ids);
  // The same, not owned: they outlive the prompt.
  void AddRows(ConstTensorView rows);

  int64_t size() const { return size_; }  // rows
  // Rows [begin, begin + count): a part's own, or written to `made`, which owns them.
  ConstTensorView Read(ExecContext& ctx, const Decoder& decoder, int64_t begin, int64_t count,
                       Tensor& made) const;

 private:
  struct Part {
    int64_t begin = 0, size = 0;
    std::vector<int32_t> ids;  // or
    Tensor owned;              // or
    ConstTensorView rows;      // which are those of `owned` as well
  };
  void Add(Part part);

  std::vector<Part> parts_;
  int64_t size_ = 0;
};

}  // namespace sluice

#endif  // SLUICE_LLM_PROMPT_ROWS_H_
