// VisualTokens in, fewer VisualTokens out. The seam between encoder and decoder.
#ifndef SLUICE_COMPRESSION_TOKEN_COMPRESSOR_H_
#define SLUICE_COMPRESSION_TOKEN_COMPRESSOR_H_

#include <cstdint>
#include <string>

#include "runtime/archive.h"
#include "runtime/exec_context.h"
#include "vision/visual_tokens.h"

namespace sluice {

// One per stream (it may remember earlier frames); used by one thread at a time.
class TokenCompressor {
 public:
  virtual ~TokenCompressor() = default;
  virtual std::string name() const = 0;
  // How many of a frame's `tokens` it leaves at most. Throws InputError where it was told to keep
  // more than there are.
  virtual int64_t TokensLeft(int64_t tokens) const = 0;
  // Keeps order; never invents positions; may return nothing for a frame. Features lie where `ctx`
  // works, and those that are returned do, too.
  virtual VisualTokens Compress(ExecContext& ctx, VisualTokens tokens) = 0;
  // Forgets the latest Compress, as if it had not been called: what it returned did not find room.
  virtual void Undo() = 0;
  // What it remembers of the stream.
  virtual int64_t SizeBytes() const { return 0; }
  // Saves or loads that; Undo then goes no further back.
  virtual void Persist(Archive& archive) = 0;
};

}  // namespace sluice

#endif  // SLUICE_COMPRESSION_TOKEN_COMPRESSOR_H_
