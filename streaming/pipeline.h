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

// preprocess -> encode -> compress -> prefill (-> trim). Appends the frames to the session's
// memory. Throws ResourceExhausted or InputError when the context is full; the session is then as
// before.
void Ingest(ExecContext& ctx, Session& session, std::span<const FramePtr> frames);

// Answers about everything ingested so far: newline row, dialogue, question, generate; then the
// cache is rewound to its mark before the newline, and the turn is kept in the transcript if the
// session keeps the dialogue.
Generated Ask(ExecContext& ctx, Session& session, const std::string& question,
              const TextSink& sink);

}  // namespace sluice

#endif  // SLUICE_STREAMING_PIPELINE_H_
