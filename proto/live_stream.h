// One stream of the service, with or without a connection: what it has to tell its client, and
// what it still has to do. Thread-safe.
//
// What the client does not read waits here: the pieces of one answer as one message. A connection
// whose client lets more than `max_bytes` wait is ended. While there is no connection, what is
// beyond half of that is given up from the oldest on, frame acknowledgements and pieces of text
// before answers, and counted; the other half is for what comes when the client is back.
#ifndef SLUICE_PROTO_LIVE_STREAM_H_
#define SLUICE_PROTO_LIVE_STREAM_H_

#include <grpcpp/support/status.h>

#include <condition_variable>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <string>

#include "proto/access.h"
#include "runtime/archive.h"
#include "sluice/v1/service.pb.h"
#include "streaming/scheduler.h"
#include "streaming/source.h"

namespace sluice {

class LiveStream final : public StreamEvents {
 public:
  // A connection that sends what the stream tells. Wake: there may be something new, from Take, End
  // or overloaded. Called without locks of the stream, on any thread.
  class Listener {
   public:
    virtual ~Listener() = default;
    virtual void Wake() = 0;
    // Another connection takes over.
    virtual void Replaced() = 0;
  };
  struct Terms {
    int64_t max_bytes = 0;
    StreamBudget budget;
    GenerateOptions generate;
    std::shared_ptr<Account::Lease> lease;
    std::function<void()> attend;  // called when Duty has changed, without locks; must not wait
  };
  explicit LiveStream(Terms terms) : terms_(std::move(terms)) {}

  StreamId id;  // set once, before anybody else sees the stream
  const StreamBudget& budget() const { return terms_.budget; }
  Account& account() const { return terms_.lease->account(); }
  const std::shared_ptr<Account>& shared_account() const { return terms_.lease->shared(); }
  GenerateOptions generate() const;
  void SetGenerate(const GenerateOptions& generate);

  // From the scheduler.
  void OnFrame(FrameNumber frame, MediaTime time) override;
  void OnDropped(FrameNumber frame, MediaTime time, DropReason reason) override;
  void OnText(QuestionId question, std::string_view piece) override;
  void OnAnswer(const StreamAnswer& answer) override;
  void OnWarning(std::string_view line) override;
  void OnFailed(std::string_view error) override;

  // Towards the client. After `end` nothing follows.
  void Send(v1::SessionResponse message);
  void End(const grpc::Status& status);
  // The next message, for the present listener only: one that has been replaced and does not know
  // it yet gets nothing.
  std::optional<v1::SessionResponse> Take(const Listener* listener);
  std::optional<grpc::Status> ended() const;  // once everything was taken
  bool overloaded() const;

  // Connections. Attach tells what was lost meanwhile, and the answers to the questions in
  // `awaited` that may have been lost on the way to the connection before.
  void Attach(std::shared_ptr<Listener> listener, v1::SessionResponse opened,
              std::span<const QuestionId> awaited = {});
  // `unsent`: a message that was taken and not delivered.
  void Detach(const Listener* listener, std::optional<v1::SessionResponse> unsent, WallTime now);
  std::optional<WallTime> away_since() const;

  // What is under way.
  int64_t FrameReceived();  // its index: how many came before
  void FrameRefused(FrameNumber frame, double media_seconds, v1::DropReason reason,
                    const std::string& detail);
  // False if the number is in use.
  bool QuestionBegins(QuestionId question, bool standing);
  void QuestionRefused(QuestionId question);
  void StandingEnds(QuestionId question);
  // False if a source is open already.
  bool SourceBegins();
  // False: the stream ends, cancel the source at once.
  bool SourceIsOpen(std::shared_ptr<Source> source);
  void SourceEnds();
  void StopSource();
  // Waits until less than the budget's queue is under way. False: the stream ends.
  bool WaitForRoom();
  // Waits for so long. False: the stream ends.
  bool Pause(std::chrono::milliseconds time);

  // What the client wants when all that was pushed and asked is done.
  void CloseWhenSettled();
  // The connection sends nothing more; ignored unless it is the stream's present one.
  void LeaveWhenSettled(const Listener* listener);
  enum class Duty { kNone, kLeave, kClose, kBury };  // kBury: it has failed
  Duty duty() const;

  void AddCounts(v1::SessionResponse& opened) const;  // what a resumed client must know
  int64_t received() const;
  int64_t refused() const;

  // What a saved stream must know when it goes on: what was acknowledged, which numbers are in use,
  // how answers are generated. Frames and questions that wait are forgotten.
  void Persist(Archive& archive);
  void Resumed(const StreamReport& report, WallTime now);  // it waits for its client

 private:
  enum class Afterwards { kGoOn, kLeave, kClose };
  using Messages = std::list<v1::SessionResponse>;
  void Queue(v1::SessionResponse message);  // REQUIRES: mutex_
  void Erase(Messages::iterator message);
  void Trim();
  bool Settled() const;
  void Tell(std::unique_lock<std::mutex>& lock, bool attend);
  void TellAgain(QuestionId question);  // REQUIRES: mutex_

  const Terms terms_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  GenerateOptions generate_ = terms_.generate;
  std::shared_ptr<Listener> listener_;
  std::optional<WallTime> away_since_;
  Messages messages_;
  int64_t bytes_ = 0, lost_ = 0;
  std::map<QuestionId, Messages::iterator> texts_;  // pieces that wait
  std::deque<v1::SessionResponse> answered_;        // the last of them, which may not have arrived
  std::optional<grpc::Status> end_;
  bool failed_ = false;
  Afterwards afterwards_ = Afterwards::kGoOn;

  int64_t received_ = 0, refused_ = 0, under_way_ = 0;  // frames
  std::optional<FrameNumber> last_frame_;
  MediaTime last_time_;
  std::set<QuestionId> questions_, standing_;
  bool source_busy_ = false, stopping_ = false;
  std::shared_ptr<Source> source_;
};

}  // namespace sluice

#endif  // SLUICE_PROTO_LIVE_STREAM_H_
