#include "runtime/staged_copies.h"

#include <algorithm>
#include <string>
#include <utility>

#include "runtime/error.h"

namespace sluice {
namespace {

constexpr int64_t kAlignment = 256;
constexpr int64_t kFirstBytes = int64_t{1} << 20;

int64_t Rounded(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

StagedCopies::StagedCopies(Device device, int64_t most_bytes)
    : device_(device), most_bytes_(most_bytes) {}

StagedCopies::~StagedCopies() {
  if (device_ == Device::kCpu) return;
  try {
    for (const Piece& piece : pieces_) cuda::Synchronize(piece.done);
  } catch (const Error&) {
    // The device failed, so nothing is on its way any more.
  }
  for (const cuda::Event event : events_) cuda::EndEvent(event);
  if (stream_) cuda::EndStream(stream_);
  if (pinned_) cuda::FreePinned(pinned_);
}

void StagedCopies::Send(ExecContext& ctx, int64_t bytes,
                        const std::function<void(TensorView)>& write, Receiver receive) {
  if (device_ == Device::kCpu) {
    const Workspace::Scope scope(ctx.workspace());
    const TensorView piece = ctx.workspace().Allocate(DType::kU8, {bytes});
    write(piece);
    return receive({piece.data<uint8_t>(), static_cast<size_t>(bytes)});
  }
  const int64_t begin = FindPlace(bytes);
  const TensorView there = memory_.view().Slice(begin, begin + bytes);
  write(there);
  const cuda::Event event = TakeEvent();
  pieces_.push_back({begin, begin + Rounded(bytes), bytes, event, std::move(receive)});
  cuda::Mark(event, ctx.stream());
  cuda::WaitFor(event, stream_);
  cuda::CopyRows(pinned_ + begin, bytes, there.raw(), bytes, bytes, 1, stream_);
  cuda::Mark(event, stream_);
}

void StagedCopies::Bring(ExecContext& ctx, int64_t bytes,
                         const std::function<void(std::span<uint8_t>)>& fill,
                         const std::function<void(ConstTensorView)>& use) {
  if (device_ == Device::kCpu) {
    const Workspace::Scope scope(ctx.workspace());
    const TensorView piece = ctx.workspace().Allocate(DType::kU8, {bytes});
    fill({piece.data<uint8_t>(), static_cast<size_t>(bytes)});
    return use(piece);
  }
  const int64_t begin = FindPlace(bytes);
  fill({pinned_ + begin, static_cast<size_t>(bytes)});
  const TensorView there = memory_.view().Slice(begin, begin + bytes);
  const cuda::Event event = TakeEvent();
  pieces_.push_back({begin, begin + Rounded(bytes), bytes, event, nullptr});
  cuda::CopyRows(there.raw(), bytes, pinned_ + begin, bytes, bytes, 1, stream_);
  cuda::Mark(event, stream_);
  cuda::WaitFor(event, ctx.stream());
  use(there);
  cuda::Mark(event, ctx.stream());
}

void StagedCopies::Collect() {
  while (!pieces_.empty() && cuda::IsReached(pieces_.front().done)) FinishOldest();
}

void StagedCopies::Settle() {
  while (!pieces_.empty()) FinishOldest();
}

// Where in the ring a piece can lie.
int64_t StagedCopies::FindPlace(int64_t bytes) {
  Collect();
  for (;;) {
    if (const std::optional<int64_t> place = FreePlace(Rounded(bytes))) return *place;
    if (capacity_ < std::max(most_bytes_, Rounded(bytes))) {
      Grow(Rounded(bytes));
    } else {
      FinishOldest();
    }
  }
}

std::optional<int64_t> StagedCopies::FreePlace(int64_t bytes) const {
  if (pieces_.empty()) return bytes <= capacity_ ? std::optional<int64_t>(0) : std::nullopt;
  const int64_t first = pieces_.front().begin, end = pieces_.back().end;
  if (pieces_.back().begin < first) {  // the newest have begun again at the ring's beginning
    return bytes <= first - end ? std::optional<int64_t>(end) : std::nullopt;
  }
  if (bytes <= capacity_ - end) return end;
  return bytes <= first ? std::optional<int64_t>(0) : std::nullopt;
}

void StagedCopies::Grow(int64_t bytes) {
  Settle();
  const int64_t wanted =
      std::max(bytes, std::min(Rounded(most_bytes_), std::max(kFirstBytes, 4 * capacity_)));
  if (!stream_) stream_ = cuda::NewStream();
  capacity_ = 0;
  memory_ = Tensor();
  cuda::FreePinned(std::exchange(pinned_, nullptr));
  Tensor memory(DType::kU8, {wanted}, device_);
  pinned_ = static_cast<uint8_t*>(cuda::AllocatePinned(wanted));
  if (!pinned_) {
    throw ResourceExhausted("[staged_copies] no pinned host memory for " + std::to_string(wanted) +
                            " bytes");
  }
  memory_ = std::move(memory);
  capacity_ = wanted;
}

void StagedCopies::FinishOldest() {
  cuda::Synchronize(pieces_.front().done);
  const Piece piece = std::move(pieces_.front());
  pieces_.pop_front();
  spare_events_.push_back(piece.done);
  if (piece.receive) piece.receive({pinned_ + piece.begin, static_cast<size_t>(piece.bytes)});
}

cuda::Event StagedCopies::TakeEvent() {
  if (spare_events_.empty()) {
    events_.reserve(events_.size() + 1);
    spare_events_.reserve(events_.size() + 1);
    events_.push_back(cuda::NewEvent());
    return events_.back();
  }
  const cuda::Event event = spare_events_.back();
  spare_events_.pop_back();
  return event;
}

}  // namespace sluice
