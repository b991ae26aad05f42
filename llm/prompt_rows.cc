#include "llm/prompt_rows.h"

#include <algorithm>
#include <span>
#include <utility>

#include "runtime/transfer.h"

namespace sluice {

PromptRows::PromptRows(Tensor rows) {
  Part part;
  part.owned = std::move(rows);
  part.rows = part.owned;
  part.size = part.rows.dim(0);
  Add(std::move(part));
}

void PromptRows::AddIds(std::vector<int32_t> ids) {
  Part part;
  part.size = static_cast<int64_t>(ids.size());
  part.ids = std::move(ids);
  Add(std::move(part));
}

void PromptRows::AddRows(ConstTensorView rows) {
  Part part;
  part.size = rows.empty() ? 0 : rows.dim(0);
  part.rows = rows;
  Add(std::move(part));
}

void PromptRows::Add(Part part) {
  if (part.size == 0) return;
  part.begin = size_;
  size_ += part.size;
  parts_.push_back(std::move(part));
}

ConstTensorView PromptRows::Read(ExecContext& ctx, const Decoder& decoder, int64_t begin,
                                 int64_t count, Tensor& made) const {
  const int64_t end = begin + count;
  for (const Part& part : parts_) {
    const bool within = begin >= part.begin && end <= part.begin + part.size;
    if (within && part.ids.empty()) return part.rows.Slice(begin - part.begin, end - part.begin);
  }
  made = Tensor(DType::kF32, {count, decoder.hidden_size()}, ctx.device());
  for (const Part& part : parts_) {
    const int64_t from = std::max(begin, part.begin), to = std::min(end, part.begin + part.size);
    if (from >= to) continue;
    const TensorView there = made.view().Slice(from - begin, to - begin);
    if (part.ids.empty()) {
      Transfer(ctx, part.rows.Slice(from - part.begin, to - part.begin), there);
    } else {
      const std::span<const int32_t> ids = part.ids;
      decoder.Embed(ctx, ids.subspan(from - part.begin, to - from), there);
    }
  }
  return made;
}

}  // namespace sluice
