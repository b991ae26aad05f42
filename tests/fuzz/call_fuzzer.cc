#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <string>

#include "proto/session_call.h"
#include "proto/stream_hub.h"
#include "runtime/error.h"
#include "tests/fuzz/targets.h"
#include "tests/support/tiny_stream.h"

namespace sluice {
namespace {

constexpr int kMostSteps = 48;

// Small, so that no input takes long.
ServiceOptions Options() {
  ServiceOptions options;
  options.budget = {.kv_bytes = 1 << 20,
                    .queued_frames = 4,
                    .queued_questions = 2,
                    .answer_tokens = 4,
                    .answer_seconds = 0.1,
                    .frames_per_second = 0};
  options.memory.host_bytes = 1 << 20;
  options.message_bytes = 1 << 16;
  options.frame_pixels = 1 << 14;
  options.outgoing_bytes = 1 << 12;
  options.linger_seconds = 60;
  options.max_sources = 1;
  options.workers = 1;
  return options;
}

void Require(bool held, const char* what) {
  if (held) return;
  std::fprintf(stderr, "does not hold: %s\n", what);
  std::abort();
}

// The client's side of the wire. What is asked of it is answered on the fuzzer's own thread.
class FakeWire final : public SessionWire {
 public:
  void Read(grpc::ByteBuffer* message) override {
    Set([&] {
      Require(!ended_ && reading_ == nullptr, "one read at a time, none after the end");
      reading_ = message;
    });
  }
  void Write(const grpc::ByteBuffer* message) override {
    Set([&] {
      Require(!ended_ && !writing_, "one write at a time, none after the end");
      writing_ = true;
      grpc::ByteBuffer copy(*message);
      v1::SessionResponse response;
      Require(grpc::SerializationTraits<v1::SessionResponse>::Deserialize(&copy, &response).ok(),
              "a response can be read");
      Require(response.message_case() != v1::SessionResponse::MESSAGE_NOT_SET,
              "a response says something");
      Require(response.has_opened() == (messages_ == 0), "Opened comes first, and once");
      ++messages_;
    });
  }
  void EndWith(const grpc::Status&) override {
    Set([&] {
      Require(!ended_, "a call ends once");
      ended_ = true;
    });
  }

  // Takes what is written until the next message is asked for. False: the call has ended.
  bool WaitForRead(SessionCall& call) {
    while (true) {
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return ended_ || reading_ != nullptr || writing_; });
        if (ended_) return false;
        if (!writing_) return true;
        writing_ = false;
      }
      call.OnWriteDone(true);
    }
  }
  // REQUIRES: WaitForRead was true. None: the client sends nothing more.
  void Answer(SessionCall& call, const std::optional<std::string_view>& message) {
    {
      const std::lock_guard lock(mutex_);
      if (message) {
        const grpc::Slice slice(message->data(), message->size());
        *reading_ = grpc::ByteBuffer(&slice, 1);
      }
      reading_ = nullptr;
    }
    call.OnReadDone(message.has_value());
  }
  // A write that is under way fails.
  void BreakWrite(SessionCall& call) {
    {
      const std::lock_guard lock(mutex_);
      if (!std::exchange(writing_, false)) return;
    }
    call.OnWriteDone(false);
  }
  // As gRPC ends a call: what is under way fails, then it is done.
  void WaitForEnd(SessionCall& call) {
    bool reading = false, writing = false;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return ended_; });
      reading = std::exchange(reading_, nullptr) != nullptr;
      writing = std::exchange(writing_, false);
    }
    if (reading) call.OnReadDone(false);
    if (writing) call.OnWriteDone(false);
    call.OnDone();
  }

 private:
  template <typename Change>
  void Set(const Change& change) {
    {
      const std::lock_guard lock(mutex_);
      change();
    }
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  grpc::ByteBuffer* reading_ = nullptr;
  bool writing_ = false, ended_ = false;
  int messages_ = 0;
};

// What a client does: the first byte of a step tells what.
class Steps {
 public:
  explicit Steps(std::string_view bytes) : rest_(bytes) {}
  bool done() const { return rest_.empty(); }
  uint8_t Kind() { return static_cast<uint8_t>(Take(1)[0]); }
  std::string_view Message() {
    const std::string_view size = Take(2);
    return Take(static_cast<uint8_t>(size[0]) | static_cast<uint8_t>(size[1]) << 8);
  }

 private:
  std::string_view Take(size_t bytes) {
    if (rest_.size() < bytes) throw InputError("[fuzz] expected a whole step, got part of one");
    const std::string_view taken = rest_.substr(0, bytes);
    rest_.remove_prefix(bytes);
    return taken;
  }
  std::string_view rest_;
};

void Play(SessionCall& call, FakeWire& wire, Steps steps) {
  for (int i = 0; i < kMostSteps && !steps.done(); ++i) {
    switch (steps.Kind() % 8) {
      case kCallHalfClose:
        if (!wire.WaitForRead(call)) return;
        wire.Answer(call, std::nullopt);
        return;  // nothing can follow
      case kCallCancel:
        return call.OnCancel();
      case kCallBreakWrite:
        wire.BreakWrite(call);
        break;
      case kCallLoseToken:
        return call.End({grpc::StatusCode::UNAUTHENTICATED, "[fuzz] the token is gone"});
      default: {
        const std::string_view message = steps.Message();
        if (!wire.WaitForRead(call)) return;
        wire.Answer(call, message);
      }
    }
  }
}

}  // namespace

void FuzzCall(std::string_view bytes) {
  static const auto engine = [] {
    EngineOptions options = TinyOptions();
    options.kv_budget_bytes = 8 << 20;
    return std::make_shared<const Engine>(options);
  }();
  static const auto account = std::make_shared<Account>(AccessToken{.name = "fuzz", .sha256 = {}});
  const SystemClock clock;
  Metrics metrics;
  Scheduler scheduler(engine, SchedulerOptions{}, clock, metrics);
  std::optional<Error> refused;
  {
    StreamHub hub(engine->vlm(), scheduler, metrics, clock, Options());
    FakeWire wire;
    {
      const auto call = SessionCall::Begin(hub, account, wire);
      try {
        Play(*call, wire, Steps(bytes));
      } catch (const Error& error) {
        refused = error;
      }
      call->OnCancel();  // the client goes, if it has not
      wire.WaitForEnd(*call);
    }
  }
  Require(scheduler.streams().empty(), "no stream is left");
  Require(metrics.gauge("sluice_calls_open", "").value() == 0, "no call is left");
  if (refused) throw Error(*refused);
}

}  // namespace sluice
