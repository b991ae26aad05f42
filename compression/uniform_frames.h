// Keeps every N-th frame: the baseline that any selection of tokens has to beat at equal cost.
#ifndef SLUICE_COMPRESSION_UNIFORM_FRAMES_H_
#define SLUICE_COMPRESSION_UNIFORM_FRAMES_H_

#include <cstdint>
#include <string>

#include "compression/token_compressor.h"

namespace sluice {

class UniformFrames final : public TokenCompressor {
 public:
  // Throws InputError unless `every` is a whole number of at least 1.
  explicit UniformFrames(double every);

  std::string name() const override { return "uniform-frames"; }
  int64_t TokensLeft(int64_t tokens) const override { return tokens; }
  VisualTokens Compress(ExecContext& ctx, VisualTokens tokens) override;
  void Undo() override { next_ = before_compress_; }
  void Persist(Archive& archive) override {
    archive.Number("next", next_, int64_t{0});
    before_compress_ = next_;
  }

 private:
  int64_t every_;
  int64_t next_ = 0, before_compress_ = 0;  // number of the next frame
};

}  // namespace sluice

#endif  // SLUICE_COMPRESSION_UNIFORM_FRAMES_H_
