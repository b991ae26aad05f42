// What lives as long as one stream does: the KV cache, the transcript, counters.
#ifndef SLUICE_STREAMING_SESSION_H_
#define SLUICE_STREAMING_SESSION_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "compression/duplicate_frame_filter.h"
#include "compression/pyramid_drop.h"
#include "compression/stc_cacher.h"
#include "compression/stream_memory.h"
#include "compression/token_compressor.h"
#include "compression/turbo_tower.h"
#include "llm/kv_cache.h"
#include "llm/vlm.h"
#include "streaming/options.h"
#include "vision/visual_tokens.h"

namespace sluice {

// Room that frames leave for a question's text; its answer's comes on top.
inline constexpr int64_t kQuestionTokens = 64;

struct Turn {
  std::string question;
  std::string answer;
  MediaTime time;                     // of the last frame seen when it was asked
  std::vector<int32_t> question_ids;  // prompt text between video and answer, as encoded
  std::vector<int32_t> answer_ids;
};

// The memory of a stream with these options (which ask for one), with what depends on the model
// settled; its window_tokens are still 0 where it takes what the context holds. Throws InputError
// where the window, and what a question recalls, leave no room for a question, on options that it
// does not go together with, and on those out of range.
MemoryOptions MemoryFor(const Vlm& vlm, const SessionOptions& options, int64_t prefix_tokens);

// Used by one thread at a time (the worker that holds it).
struct Session {
  // Throws InputError on options out of range, for the model as well, and on unknown compressors.
  Session(std::shared_ptr<const Vlm> model, std::shared_ptr<KvBlockPool> pool,
          SessionOptions session_options);

  std::shared_ptr<const Vlm> vlm;
  SessionOptions options;
  std::vector<int32_t> prefix_ids;  // the prompt before the first visual token
  PyramidStream pyramid;
  // Prefix and visual tokens; during a question also newline, dialogue, question. Stays empty where
  // frames are replayed.
  KvCache cache;
  std::unique_ptr<StreamMemory> memory;                       // may be null
  std::optional<DuplicateFrameFilter> duplicates;             // before the encoder
  std::unique_ptr<StcCacher> reuse;                           // may be null
  std::unique_ptr<const TurboTower> merge;                    // may be null
  std::vector<std::unique_ptr<TokenCompressor>> compressors;  // applied in order
  std::vector<VisualTokens> waiting;                          // of batches still to be prefilled
  // With a memory only the last turns, as many as its budget for the dialogue holds; all of them
  // while a window that takes what the context holds has lost nothing.
  std::vector<Turn> transcript;
  int64_t frames_seen = 0;  // ingested, also duplicates and those of which compressors left nothing
  int64_t visual_tokens = 0;  // that compressors left of them
  MediaTime last_time;        // of the newest frame
  // Is told in one line what went wrong without ending anything. None: the log is.
  std::function<void(std::string_view line)> on_warning;

  // Positions the cache may hold: the model's, or fewer by option.
  int64_t context_limit() const;
  // What the stream holds: KV cache, visual tokens that wait for it, references of the cacher,
  // frames to replay, what the duplicate filter and the compressors remember, and of the memory
  // what is not on the disk. All but the KV cache stay the same however long it lasts; with a
  // memory, that as well.
  int64_t SizeBytes() const;
};

}  // namespace sluice

#endif  // SLUICE_STREAMING_SESSION_H_
