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

constexpr size_t kMostCompressors = 8;

// Rows that a mode's instruction and what stands before it may have: they are read as one.
constexpr int64_t kMostInstructionRows = 2048;

// Throws InputError on a system prompt, and an instruction, that the context or a step cannot hold.
void CheckPrompts(const Session& session) {
  const Vlm& vlm = *session.vlm;
  const auto prefix = static_cast<int64_t>(session.prefix_ids.size());
  const int64_t room = session.context_limit() - kQuestionTokens;
  if (!session.options.system_prompt.empty() && prefix > room) {
    throw InputError("[session] the system prompt has " + std::to_string(prefix) +
                     " tokens with what surrounds it, the context has room for " +
                     std::to_string(room) + " beside a question; make it shorter");
  }
  const std::string* const instruction = session.pyramid.wanted_instruction();
  if (!instruction) return;
  const auto rows = prefix + static_cast<int64_t>(vlm.prompt_format()
                                                      .EncodeQuestion(vlm.tokenizer(), *instruction,
                                                                      /*follow_up=*/false)
                                                      .size());
  if (rows > kMostInstructionRows) {
    throw InputError("[session] the instruction has " + std::to_string(rows) +
                     " tokens with the system prompt, expected at most " +
                     std::to_string(kMostInstructionRows) + "; make them shorter");
  }
}

}  // namespace

MemoryOptions MemoryFor(const Vlm& vlm, const SessionOptions& options, int64_t prefix_tokens) {
  MemoryOptions memory = *options.memory;
  CheckMemoryOptions(memory);
  if (options.pyramid.mode != PyramidMode::kOff) {
    throw InputError(
        "[memory] PyramidDrop leaves layers different rows, which a window cannot slide over; "
        "choose one of --memory and --pyramid-drop");
  }
  const int64_t limit = ContextLimit(vlm, options);
  const int64_t frame = vlm.encoder().tokens_per_frame();
  const bool takes_all = memory.window_tokens == 0;
  if (takes_all) memory.dialogue_tokens = std::min(memory.dialogue_tokens, limit / 8);
  const int64_t question = kQuestionTokens + options.generate.max_new_tokens +
                           (options.keep_dialogue ? memory.dialogue_tokens : 0);
  // What compressors leave waits until it is as much as a batch, so two may come at once.
  const int64_t batch = frame * options.frames_per_batch * (options.compressors.empty() ? 1 : 2);
  const int64_t window = prefix_tokens + memory.window_tokens + kKvBlockTokens + batch + question;
  if (window > limit) {
    throw InputError(
        "[memory] a window of " + std::to_string(memory.window_tokens) +
        " tokens with a batch of frames and a question needs a context of " +
        std::to_string(window) + ", the limit is " + std::to_string(limit) +
        (takes_all ? "" : ": make --memory-window smaller by " + std::to_string(window - limit)));
  }
  if (takes_all) {
    const int64_t most = (limit - prefix_tokens - question) / frame;
    if (memory.recall_chunk > most) memory.recall_blocks = 0;
    memory.recall_blocks = static_cast<int>(std::min<int64_t>(memory.recall_blocks, most));
  }
  const int64_t recalled = prefix_tokens +
                           int64_t{std::max(memory.recall_blocks, memory.recall_chunk)} * frame +
                           question;
  if (memory.recall_blocks > 0 && recalled > limit) {
    throw InputError("[memory] " + std::to_string(memory.recall_blocks) + " recalled frames of " +
                     std::to_string(frame) + " tokens with a question need a context of " +
                     std::to_string(recalled) + ", the limit is " + std::to_string(limit) +
                     ": make --memory-recall smaller");
  }
  return memory;
}

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
  CheckPrompts(*this);
  if (options.compressors.size() > kMostCompressors) {
    throw InputError("[session] expected at most " + std::to_string(kMostCompressors) +
                     " token compressors one after another, got " +
                     std::to_string(options.compressors.size()));
  }
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
  if (!options.memory) return;
  const Decoder& decoder = vlm->decoder();
  const auto pinned = static_cast<int64_t>(prefix_ids.size());
  memory = std::make_unique<StreamMemory>(MemoryFor(*vlm, options, pinned), decoder.kv_geometry(),
                                          decoder.rotary_frequencies(), pinned);
}

int64_t Session::SizeBytes() const {
  int64_t bytes = cache.SizeBytes() + static_cast<int64_t>(pyramid.ReplayRows().size_bytes());
  if (memory) bytes += memory->SizeBytes();
  if (reuse) bytes += reuse->SizeBytes();
  if (duplicates) bytes += duplicates->SizeBytes();
  for (const VisualTokens& tokens : waiting) bytes += tokens.SizeBytes();
  for (const auto& compressor : compressors) bytes += compressor->SizeBytes();
  return bytes;
}

int64_t Session::context_limit() const { return ContextLimit(*vlm, options); }

}  // namespace sluice
