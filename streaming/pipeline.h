// THE page: how a frame becomes memory and a question becomes an answer. Start reading at
// pipeline.cc. Stateless: everything it remembers is in the Session it is given.
#ifndef SLUICE_STREAMING_PIPELINE_H_
#define SLUICE_STREAMING_PIPELINE_H_

#include <span>
#include <string>

#include "llm/generator.h"
#include "runtime/exec_context.h"
#include "streaming/session.h"
#include "vision/frame.h"

namespace sluice {

// (duplicates) -> preprocess -> encode -> compress -> prefill. Appends the frames, in order, to the
// session's memory; the prompt's prefix is prefilled before the first. What token compressors leave
// waits until it is as much as a batch of frames is without them, or until the next question. With
// a memory, what exceeds its window then leaves the cache. Throws InputError when the context has
// no room for them and a question after them, ResourceExhausted when the KV pool has none; after
// these and any other exception the session is as before. With mode replay of PyramidDrop frames
// are only remembered, and prefilled with each question. Frames that the duplicate filter holds
// back are seen, and leave nothing. Traces "duplicates" (items: frames), "preprocess", "encode"
// (items: frames), "compress" (tokens in), "prefill" (tokens kept).
void Ingest(ExecContext& ctx, Session& session, std::span<const FramePtr> frames);

// Prefills what waits, for a moment with nothing else to do. Throws as Ingest does.
void ReadWaiting(ExecContext& ctx, Session& session);

// Answers about everything ingested so far: newline row, dialogue, question, generate; then the
// cache is rewound to where it was, whatever happens. The turn is kept in the transcript if the
// session keeps its dialogue and the answer was not cancelled. An answer ends with
// FinishReason::kLength where the context ends. Once a memory's window has slid, the question sees
// what it recalls, and the answer comes with its evidence. Throws InputError when no frame has been
// seen, on a blank question, and when the context has no room for the question. Traces "question"
// (prompt tokens), and what Generate traces.
Generated Ask(ExecContext& ctx, Session& session, const std::string& question,
              const TextSink& sink);

}  // namespace sluice

#endif  // SLUICE_STREAMING_PIPELINE_H_
