// All streams of the service, with what calls need to work on them. Thread-safe.
#ifndef SLUICE_PROTO_STREAM_HUB_H_
#define SLUICE_PROTO_STREAM_HUB_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "proto/json_log.h"
#include "proto/live_stream.h"
#include "proto/open_call.h"
#include "proto/saved_streams.h"
#include "proto/service.h"
#include "proto/source_opener.h"
#include "proto/worker_pool.h"

namespace sluice {

// Between two looks at whether an account may have another frame of a recording.
inline constexpr std::chrono::milliseconds kPace{20};

class StreamHub {
 public:
  StreamHub(std::shared_ptr<const Vlm> vlm, Scheduler& scheduler, Metrics& metrics,
            const Clock& clock, const ServiceOptions& options);
  ~StreamHub();

  const ServiceOptions options;
  const std::shared_ptr<const Vlm> vlm;
  Scheduler& scheduler;
  const Clock& clock;
  Gauge& calls;
  SourceOpener sources;
  // Carries out what clients ask for, pictures aside.
  WorkerPool& requests() { return *requests_; }
  // Decodes pictures and pushes them. Slow ones hold up others of their kind alone.
  WorkerPool& pictures() { return *pictures_; }

  // The account behind a call's "authorization" metadata; null, counted and logged, if there is
  // none. peer: as gRPC names it.
  std::shared_ptr<Account> Authenticate(std::string_view authorization, std::string_view peer);
  bool needs_token() const { return access_.needs_token(); }
  // What runs on a token that is not among these ends; the others keep what they have in use.
  // Throws InputError, and nothing has changed, on tokens that make no sense.
  void ReplaceTokens(const std::vector<AccessToken>& tokens);
  // Ends the call when its token does, or when its first message does not come. Of calls that need
  // no token few may wait at a time: the oldest makes room.
  void LookAfter(const std::shared_ptr<OpenCall>& call);
  v1::Limits LimitsOf(const StreamBudget& budget) const;

  // What a stream of this budget is told, with the memory it has if the client tells nothing about
  // one. note: in one line why it has none; empty otherwise. Throws InputError as FromProto.
  SessionOptions OptionsOf(const v1::ModelOptions& message, const StreamBudget& budget,
                           std::string& note) const;
  // Throw InputError and ResourceExhausted as the scheduler does.
  std::shared_ptr<LiveStream> Open(const v1::Open& open, const std::shared_ptr<Account>& account);
  // Also one that was saved. Null: there is no such stream, or it is another account's. Throws as
  // Scheduler::Restore does.
  std::shared_ptr<LiveStream> Find(const StreamId& id, const std::shared_ptr<Account>& account);
  // Reports, and ends the stream; a saved one is gone as well.
  void Close(const std::shared_ptr<LiveStream>& stream);
  // Writes it to the state directory. Throws InputError if there is none, Error if it fails.
  void Save(LiveStream& stream);
  // Plays a source into a stream on a thread of its own. Throws ResourceExhausted.
  void Play(const std::shared_ptr<LiveStream>& stream, const v1::OpenSource& request);
  // Runs `job` on a thread of its own, of which there are max_sources, and fewer for one account.
  void Spawn(std::shared_ptr<Account> account, std::function<void()> job);
  void CountRefusedFrame(const char* reason);

  bool draining() const { return draining_; }
  // Tells every client, finishes what is under way, ends all streams.
  void Drain();

 private:
  struct Thread {
    std::thread thread;
    std::shared_ptr<const Account> account;
    std::atomic<bool> done = false;
  };
  void Attend(const std::shared_ptr<LiveStream>& stream);
  void Watch();
  void EndCalls();
  void EndStreams();
  void Park(const std::shared_ptr<LiveStream>& stream);
  std::shared_ptr<LiveStream> Restore(const StreamId& id, const std::shared_ptr<Account>& account);
  bool PutAway(const std::shared_ptr<LiveStream>& stream, const char* line);
  Counter& SavedCounter(const char* result);
  std::string ForClient(std::string text) const;
  std::string Redacted(std::string text, const StreamId& id) const;
  LiveStream::Terms TermsFor(const std::shared_ptr<Account>& account,
                             const std::shared_ptr<std::weak_ptr<LiveStream>>& self);
  void Forget(const StreamId& id);
  std::vector<std::shared_ptr<LiveStream>> All() const;
  void PlaySource(LiveStream& stream, const v1::OpenSource& request);

  Metrics& metrics_;
  Access access_;
  RareEvent refused_tokens_;
  const SavedStreams saved_;
  std::mutex files_mutex_;  // of saved streams; taken before any other
  std::mutex save_mutex_;   // of Save; after files_mutex_, before any other
  std::atomic<bool> draining_ = false;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::map<StreamId, std::shared_ptr<LiveStream>> streams_;
  std::list<Thread> threads_;
  std::list<std::weak_ptr<OpenCall>> open_calls_;
  bool ending_ = false, attention_ = false;
  std::unique_ptr<WorkerPool> requests_, pictures_;
  std::thread watcher_;  // ends what nobody comes back for, and what has lost its token
};

// Options of OpenSource and CaptionRequest, checked.
SourceOptions SourceOptionsOf(double fps, const ServiceOptions& service);

}  // namespace sluice

#endif  // SLUICE_PROTO_STREAM_HUB_H_
