#include "streaming/session.h"

#include <algorithm>
#include <utility>

#include "compression/registry.h"
#include "runtime/error.h"

namespace sluice {
namespace {

int64_t ContextLimit(const Vlm& vlm, const SessionOptions& options) {
  const int64_t most = vlm.decoder().max_positions();
  return options.max_context_tokens > 0 ? std::min(options.max_context_tokens, most) : most;
}

}  // namespace

Session::Session(std::shared_ptr<const Vlm> model, std::shared_ptr<KvBlockPool> pool,
                 SessionOptions session_options)
    : vlm(std::move(model)),
      options(std::move(session_options)),
      pyramid(options.pyramid, vlm->decoder().kv_geometry().num_layers,
              vlm->encoder().tokens_per_frame(), ContextLimit(*vlm, options)),
      cache(std::move(pool), pyramid.positions()) {
  if (options.frames_per_batch < 1) {
    throw InputError("[session] frames_per_batch must be at least 1, got " +
                     std::to_string(options.frames_per_batch));
  }
  if (options.max_context_tokens < 0) {
    throw InputError("[session] max_context_tokens must be 0 (the model's) or positive, got " +
                     std::to_string(options.max_context_tokens));
  }
  prefix_ids = vlm->prompt_format().EncodePrefix(vlm->tokenizer(), options.system_prompt);
  if (options.cacher && options.turbo) {
    throw InputError(
        "[session] turbo merges the patches that the cacher compares between frames; choose one of "
        "--turbo and --cacher (presets stc and fast turn the cacher on)");
  }
  if (options.duplicate_threshold) duplicates.emplace(*options.duplicate_threshold);
  if (options.turbo) {
    merge = std::make_unique<TurboTower>(*options.turbo);
    const int patches = vlm->encoder().patches_per_frame();
    if (options.turbo->remove > patches / 2) {
      throw InputError("[session] a block can merge half of the tower's " +
                       std::to_string(patches) + " patches at most, got turbo " +
                       std::to_string(static_cast<int64_t>(options.turbo->remove)) +
                       "; give so many or fewer");
    }
  }
  if (options.cacher) reuse = std::make_unique<StcCacher>(*options.cacher);
  int64_t tokens = vlm->encoder().tokens_per_frame();
  for (const std::string& spec : options.compressors) {
    compressors.push_back(MakeTokenCompressor(spec));
    tokens = compressors.back()->TokensLeft(tokens);
  }
}

int64_t Session::SizeBytes() const {
  int64_t bytes = cache.SizeBytes() + static_cast<int64_t>(pyramid.ReplayRows().size_bytes());
  if (reuse) bytes += reuse->SizeBytes();
  if (duplicates) bytes += duplicates->SizeBytes();
  for (const VisualTokens& tokens : waiting) bytes += tokens.SizeBytes();
  for (const auto& compressor : compressors) bytes += compressor->SizeBytes();
  return bytes;
}

int64_t Session::context_limit() const { return ContextLimit(*vlm, options); }

}  // namespace sluice
