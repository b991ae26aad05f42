// A stream on disk: everything a Session holds, so that it goes on in another process as if nothing
// had happened.
#ifndef SLUICE_STREAMING_SESSION_FILE_H_
#define SLUICE_STREAMING_SESSION_FILE_H_

#include <filesystem>
#include <functional>
#include <memory>

#include "compression/block_store.h"
#include "runtime/archive.h"
#include "runtime/exec_context.h"
#include "streaming/engine.h"
#include "streaming/session.h"

namespace sluice {

// What else its owner keeps of it, in front of the session: the same fields written and read.
using PersistOwner = std::function<void(Archive&)>;

// Replaces `file` as a whole, or leaves it as it was: Throws Error when it cannot be written.
void SaveSession(ExecContext& ctx, Session& session, const std::filesystem::path& file,
                 const PersistOwner& owner = {});

// most: what the store of its memory may take here, and where; what it had is kept up to that, the
// oldest frames go. Throws InputError, naming file, field, expected and found, on a file that is
// damaged, of another version, of another checkpoint or compute type, or that holds what no session
// has; ResourceExhausted when the engine's KV pool has no room.
std::unique_ptr<Session> LoadSession(ExecContext& ctx, const Engine& engine,
                                     const std::filesystem::path& file,
                                     const BlockStoreOptions& most, const PersistOwner& owner = {});

void Persist(Archive& archive, GenerateOptions& options);

}  // namespace sluice

#endif  // SLUICE_STREAMING_SESSION_FILE_H_
