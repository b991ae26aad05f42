// What a launch holds beside tensors, told to a step that recurs.
#ifndef SLUICE_RUNTIME_OPS_NOTE_H_
#define SLUICE_RUNTIME_OPS_NOTE_H_

#include <bit>
#include <cstdint>
#include <type_traits>

#include "runtime/exec_context.h"

namespace sluice {

// Scalars that an op bakes into its launch and that the shapes of the tensors it names in OnGpu do
// not tell, and where its scratch memory lies: a replay must find them the same. What may differ
// comes through Within instead. REQUIRES: the context is on a GPU.
template <typename... Scalars>
void NoteScalars(const ExecContext& ctx, Scalars... scalars) {
  cuda::Recorder& recorder = *ctx.recorder();
  if (!recorder.active()) return;
  const auto note = [&](auto scalar) {
    if constexpr (std::is_floating_point_v<decltype(scalar)>) {
      recorder.Note(std::bit_cast<uint64_t>(double{scalar}));
    } else if constexpr (std::is_pointer_v<decltype(scalar)>) {
      recorder.Note(reinterpret_cast<uintptr_t>(scalar));
    } else {
      recorder.Note(static_cast<uint64_t>(scalar));
    }
  };
  (note(scalars), ...);
}

}  // namespace sluice

#endif  // SLUICE_RUNTIME_OPS_NOTE_H_
