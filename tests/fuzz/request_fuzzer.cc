#include <google/protobuf/stubs/logging.h>

#include <climits>
#include <filesystem>
#include <string>

#include "proto/messages.h"
#include "runtime/error.h"
#include "streaming/engine.h"
#include "tests/fuzz/targets.h"
#include "tests/support/tiny_stream.h"

namespace sluice {
namespace {

Engine Open() {
  EngineOptions options = TinyOptions();
  options.kv_budget_bytes = 64 << 20;
  return Engine(options);
}

// A stream with these options, and the options told back: they must mean the same.
void Take(const Engine& engine, const v1::ModelOptions& message) {
  const GenerationDefaults& defaults = engine.vlm()->generation_defaults();
  const BlockStoreOptions most;
  const SessionOptions options = FromProto(message, defaults, most);
  engine.NewSession(options);
  engine.NewSession(FromProto(ToProto(options), defaults, most));
}

}  // namespace

void FuzzRequest(std::string_view bytes) {
  static const Engine engine = Open();
  const google::protobuf::LogSilencer silence;  // it tells of every string that is not UTF-8
  v1::SessionRequest request;
  if (bytes.size() > INT_MAX ||
      !request.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) {
    throw InputError("[fuzz] expected a sluice.v1.SessionRequest, got other bytes");
  }
  if (request.has_open()) {
    Granted(request.open().budgets(), StreamBudget());
    Take(engine, request.open().options());
  }
  if (request.has_set_options()) Take(engine, request.set_options().options());
  if (request.has_frame()) {
    Frame frame;
    FromProto(request.frame(), 1 << 20, frame);
  }
  if (request.has_ask() || request.has_standing_question()) {
    const v1::Ask& ask = request.has_ask() ? request.ask() : request.standing_question().ask();
    CheckGenerateOptions(FromProto(ask.generation(), GenerateOptions()));
    engine.vlm()->prompt_format().EncodeQuestion(engine.vlm()->tokenizer(), ask.text(), false);
  }
}

}  // namespace sluice
