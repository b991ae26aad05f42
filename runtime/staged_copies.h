// Copies between the GPU and host memory that go on beside what the GPU computes.
//
// Each piece has a place in pinned host memory and one on the device, in a ring. On its way to the
// host, kernels of the context's stream write it to the device, a stream for copies takes it to
// the host, and a receiver gets it there later; on its way back the same happens in reverse. Events
// order the two streams, so that the host waits only when the ring is full. On the CPU there is
// nothing to wait for: a piece lives in the context's workspace and is received at once.
#ifndef SLUICE_RUNTIME_STAGED_COPIES_H_
#define SLUICE_RUNTIME_STAGED_COPIES_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "runtime/exec_context.h"
#include "runtime/ops/cuda/copies.h"
#include "runtime/tensor.h"

namespace sluice {

// Used by one thread at a time, with contexts of its device. Contexts may change: each piece is
// ordered against the stream of its own.
class StagedCopies {
 public:
  // Gets the bytes of a piece, for as long as it runs. Must not use the StagedCopies it is called
  // by.
  using Receiver = std::function<void(std::span<const uint8_t> bytes)>;

  // most_bytes: of pinned host memory, and as many of device memory, unless a single piece needs
  // more. Taken as they are needed, in steps of four times as much, and kept.
  StagedCopies(Device device, int64_t most_bytes);
  ~StagedCopies();  // waits for what is on its way; nobody receives it
  StagedCopies(const StagedCopies&) = delete;
  StagedCopies& operator=(const StagedCopies&) = delete;

  // Calls write(there), which queues in ctx's stream what writes all of `there`, [bytes] u8 where
  // the context works; from a later call of this class on (at once on the CPU), `receive` gets it.
  // Pieces are received in the order they were sent, each once, also after an exception of an
  // earlier receiver, which passes through. Waits for the oldest ones where there is no room.
  // Throws ResourceExhausted when there is no memory; nothing is then sent.
  void Send(ExecContext& ctx, int64_t bytes, const std::function<void(TensorView there)>& write,
            Receiver receive);
  // Calls fill(here) with host memory of that size, then use(there) with a copy of it where the
  // context works; what `use` queues in ctx's stream may read it. Waits and throws as Send.
  void Bring(ExecContext& ctx, int64_t bytes,
             const std::function<void(std::span<uint8_t> here)>& fill,
             const std::function<void(ConstTensorView there)>& use);

  // Lets receivers have what has arrived; waits for nothing.
  void Collect();
  // Waits for everything on its way, and lets receivers have it.
  void Settle();
  int64_t SizeBytes() const { return capacity_; }  // of pinned memory held, and of the device's

 private:
  struct Piece {
    int64_t begin, end;  // in the ring
    int64_t bytes;
    cuda::Event done;
    Receiver receive;  // none on the way to the device
  };
  int64_t FindPlace(int64_t bytes);
  std::optional<int64_t> FreePlace(int64_t bytes) const;
  void Grow(int64_t bytes);
  void FinishOldest();
  cuda::Event TakeEvent();

  const Device device_;
  const int64_t most_bytes_;
  int64_t capacity_ = 0;
  uint8_t* pinned_ = nullptr;
  Tensor memory_;  // [capacity] u8 on the device
  cuda::Stream stream_ = nullptr;
  std::deque<Piece> pieces_;  // on their way, the oldest first
  std::vector<cuda::Event> events_, spare_events_;
};

}  // namespace sluice

#endif  // SLUICE_RUNTIME_STAGED_COPIES_H_
