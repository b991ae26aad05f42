#include <cstring>
#include <string>

#include "runtime/archive.h"
#include "streaming/pipeline.h"
#include "streaming/session_file.h"
#include "tests/fuzz/scratch_file.h"
#include "tests/fuzz/targets.h"
#include "tests/support/tiny_stream.h"

namespace sluice {
namespace {

Engine Open() {
  EngineOptions options = TinyOptions();
  options.kv_budget_bytes = 64 << 20;
  return Engine(options);
}

}  // namespace

void FuzzSessionFile(std::string_view bytes) {
  static const ScratchFile file("stream");
  static const Engine engine = Open();
  static const auto ctx = engine.NewContext();
  std::string sealed(bytes);
  if (sealed.size() >= 4) {
    const uint32_t sum = ArchiveChecksum(bytes.substr(0, bytes.size() - 4));
    std::memcpy(sealed.data() + sealed.size() - 4, &sum, 4);
  }
  const auto session = LoadSession(*ctx, engine, file.Holding(sealed), BlockStoreOptions());
  // What was taken must be fit for use.
  session->options.generate.max_new_tokens = 1;
  if (session->frames_seen > 0) Ask(*ctx, *session, "What?", nullptr);
}

}  // namespace sluice
