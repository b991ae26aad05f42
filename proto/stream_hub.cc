#include "proto/stream_hub.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <system_error>
#include <vector>

#include "proto/convert.h"
#include "proto/json_log.h"
#include "proto/messages.h"
#include "runtime/error.h"
#include "runtime/thread_name.h"
#include "streaming/defaults.h"

namespace sluice {
namespace {

constexpr double kDefaultFps = 2;
constexpr int kRequestThreads = 4;  // some may wait for the round in progress
// Calls without a token whose message is waited for: each may make gRPC keep a message of the
// longest kind.
constexpr int kMostStrangers = 8;

std::string ReplacedAll(std::string text, const std::string& what, const std::string& with) {
  for (size_t at = 0; (at = text.find(what, at)) != text.npos; at += with.size()) {
    text.replace(at, what.size(), with);
  }
  return text;
}

// Pictures of a source are as large as those that clients send.
ApartOptions DecoderOf(const ServiceOptions& options) {
  ApartOptions decoder = options.decoder;
  decoder.frame_pixels = options.frame_pixels;
  return decoder;
}

// Makes the state directory if it is not there.
const ServiceOptions& WithDirectory(const ServiceOptions& options) {
  const auto& directory = options.state_directory;
  if (directory.empty()) return options;
  std::error_code error;
  if (std::filesystem::create_directories(directory, error)) {
    std::filesystem::permissions(directory, std::filesystem::perms::owner_all, error);
  }
  if (error || !std::filesystem::is_directory(directory) ||
      access(directory.c_str(), W_OK | X_OK) != 0) {
    throw InputError("[serve] state_directory: " + directory.string() +
                     " cannot be made or written to");
  }
  return options;
}

}  // namespace

SourceOptions SourceOptionsOf(double fps, const ServiceOptions& service) {
  if (!(fps >= 0 && fps <= 1000)) {
    throw InputError("[source] expected fps in (0, 1000], got " + std::to_string(fps));
  }
  SourceOptions options;
  options.rate.fps = fps == 0 ? kDefaultFps : fps;
  options.stall_timeout =
      std::chrono::milliseconds(std::llround(service.source_stall_seconds * 1e3));
  options.reconnect.most_tries = service.source_reconnect;
  return options;
}

StreamHub::StreamHub(std::shared_ptr<const Vlm> model, Scheduler& streams, Metrics& metrics,
                     const Clock& wall, const ServiceOptions& service_options)
    : options(WithDirectory(service_options)),
      vlm(std::move(model)),
      scheduler(streams),
      clock(wall),
      calls(metrics.gauge("sluice_calls_open", "Session and Caption calls in progress.")),
      sources(options.sources, DecoderOf(options), metrics),
      metrics_(metrics),
      access_(service_options.tokens),
      saved_(options.state_directory, options.all_saved),
      requests_(std::make_unique<WorkerPool>("requests", kRequestThreads)),
      pictures_(std::make_unique<WorkerPool>("pictures", service_options.workers)),
      watcher_([this] { Watch(); }) {}

StreamHub::~StreamHub() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  changed_.notify_all();
  watcher_.join();
  // What a call asked for last may open a stream; requests hand pictures on, never the other way.
  requests_->WaitUntilIdle();
  pictures_->WaitUntilIdle();
  for (const auto& stream : All()) Close(stream);
  for (Thread& thread : threads_) thread.thread.join();
  pictures_.reset();  // first: what it drops may settle a stream, which the others attend to
  requests_.reset();
}

std::shared_ptr<Account> StreamHub::Authenticate(std::string_view authorization,
                                                 std::string_view peer) {
  const CalendarTime now = std::chrono::system_clock::now();
  auto account = access_.Find(authorization, now);
  if (account) return account;
  const char* const fault = access_.FaultOf(authorization, now);
  metrics_
      .counter("sluice_tokens_refused_total", "Calls that brought no valid token.",
               {{"reason", fault}})
      .Add();
  const auto address = ParsePeer(peer);
  LogRarely(refused_tokens_, spdlog::level::warn, "token_refused",
            {{"reason", fault}, {"address", address ? address->ToString() : "unknown"}});
  return nullptr;
}

void StreamHub::ReplaceTokens(const std::vector<AccessToken>& tokens) {
  access_.Replace(tokens);
  {
    const std::lock_guard lock(mutex_);
    attention_ = true;
  }
  changed_.notify_all();
}

void StreamHub::LookAfter(const std::shared_ptr<OpenCall>& call) {
  std::shared_ptr<OpenCall> oldest;
  {
    const std::lock_guard lock(mutex_);
    open_calls_.push_back(call);
    if (call->account() != nullptr) return;
    int strangers = 0;
    for (const auto& each : open_calls_) {
      const auto open = each.lock();
      if (!open || open->account() != nullptr || !open->waiting_since()) continue;
      if (!oldest) oldest = open;
      ++strangers;
    }
    if (strangers <= kMostStrangers) oldest = nullptr;
  }
  if (oldest) {
    oldest->End({grpc::StatusCode::RESOURCE_EXHAUSTED,
                 "[call] too many calls without a token wait; send the request with the call"});
  }
}

v1::Limits StreamHub::LimitsOf(const StreamBudget& budget) const {
  v1::Limits limits;
  *limits.mutable_budgets() = ToProto(budget);
  limits.set_message_bytes(options.message_bytes);
  limits.set_frame_pixels(options.frame_pixels);
  limits.set_linger_seconds(options.linger_seconds);
  limits.set_memory_host_bytes(options.memory.host_bytes);
  limits.set_memory_disk_bytes(options.memory.disk_bytes);
  return limits;
}

std::vector<std::shared_ptr<LiveStream>> StreamHub::All() const {
  const std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<LiveStream>> all;
  for (const auto& [id, stream] : streams_) all.push_back(stream);
  return all;
}

SessionOptions StreamHub::OptionsOf(const v1::ModelOptions& message, const StreamBudget& budget,
                                    std::string& note) const {
  SessionOptions session = FromProto(message, vlm->generation_defaults(), options.memory);
  session.generate.max_new_tokens = std::min(session.generate.max_new_tokens, budget.answer_tokens);
  if (message.has_memory() || message.no_memory()) return session;
  note = AddDefaultMemory(*vlm, options.memory, budget.kv_bytes, session).value_or("");
  return session;
}

std::shared_ptr<LiveStream> StreamHub::Open(const v1::Open& open,
                                            const std::shared_ptr<Account>& account) {
  const StreamBudget granted = Granted(open.budgets(), options.budget);
  std::string note;
  const SessionOptions session = OptionsOf(open.options(), granted, note);
  const auto self = std::make_shared<std::weak_ptr<LiveStream>>();
  LiveStream::Terms terms = TermsFor(account, self);
  terms.budget = granted;
  terms.generate = session.generate;
  const StreamBudget budget = terms.budget;
  const auto stream = std::make_shared<LiveStream>(std::move(terms));
  *self = stream;
  try {
    stream->id = scheduler.Open(session, budget, stream);
  } catch (const InputError& error) {
    throw InputError(ForClient(error.what()));
  }
  {
    const std::lock_guard lock(mutex_);
    streams_[stream->id] = stream;
  }
  LogEvent(spdlog::level::info, "stream_opened",
           {{"stream", stream->id.substr(0, 8)}, {"account", account->name()}});
  if (!note.empty()) stream->OnWarning(note);
  if (!vlm->info().notice.empty()) stream->OnWarning(vlm->info().notice);
  return stream;
}

// The stream is named in its own terms, by `self`; whoever attends to it finds it alive or not at
// all.
LiveStream::Terms StreamHub::TermsFor(const std::shared_ptr<Account>& account,
                                      const std::shared_ptr<std::weak_ptr<LiveStream>>& self) {
  return {.max_bytes = options.outgoing_bytes,
          .budget = {},
          .generate = {},
          .lease = Account::Open(account),
          .attend = [this, self] {
            requests_->Post(nullptr, [this, self] {
              if (const auto stream = self->lock()) Attend(stream);
            });
          }};
}

std::shared_ptr<LiveStream> StreamHub::Find(const StreamId& id,
                                            const std::shared_ptr<Account>& account) {
  const std::lock_guard files(files_mutex_);
  {
    const std::lock_guard lock(mutex_);
    const auto found = streams_.find(id);
    if (found != streams_.end()) {
      return &found->second->account() == account.get() ? found->second : nullptr;
    }
  }
  return Restore(id, account);
}

// ---- Saved streams ---------------------------------------------------------------------------

void StreamHub::Save(LiveStream& stream) {
  std::string owner = stream.account().owner();
  const auto file = saved_.FileOf(stream.id, owner);
  if (file.empty()) throw InputError("[save] this server has no directory for saved streams");
  const std::lock_guard one_by_one(save_mutex_);  // so that each counts what those before wrote
  try {
    saved_.Admit(stream.id, owner, stream.account().saved(options.saved));
    scheduler.Save(stream.id, file, [&](Archive& archive) {
      archive.Text("owner", owner);
      stream.Persist(archive);
    });
  } catch (const ResourceExhausted&) {  // whose line names the limit and nothing else
    SavedCounter("refused").Add();
    throw;
  } catch (const Error& error) {
    SavedCounter("failed").Add();
    LogEvent(spdlog::level::warn, "stream_not_saved",
             {{"stream", stream.id.substr(0, 8)}, {"error", Redacted(error.what(), stream.id)}});
    throw Error("[save] the stream could not be saved; the server's log tells why");
  }
  SavedCounter("saved").Add();
}

// For the log: ids whole would let its readers resume streams.
std::string StreamHub::Redacted(std::string text, const StreamId& id) const {
  return ReplacedAll(std::move(text), id, id.substr(0, 8) + "...");
}

// Clients learn what is wrong, not where things lie here.
std::string StreamHub::ForClient(std::string text) const {
  const std::string directory = options.memory.disk_directory.string();
  return directory.empty() ? text : ReplacedAll(std::move(text), directory, "memory_directory");
}

Counter& StreamHub::SavedCounter(const char* result) {
  return metrics_.counter("sluice_streams_saved_total", "Streams written to the state directory.",
                          {{"result", result}});
}

// REQUIRES: files_mutex_.
std::shared_ptr<LiveStream> StreamHub::Restore(const StreamId& id,
                                               const std::shared_ptr<Account>& account) {
  const auto file = saved_.FileOf(id, account->owner());
  std::error_code none;  // whatever cannot be looked at is not there
  if (file.empty() || !std::filesystem::exists(std::filesystem::symlink_status(file, none))) {
    return nullptr;
  }
  struct NotYours {};
  const auto self = std::make_shared<std::weak_ptr<LiveStream>>();
  std::shared_ptr<LiveStream> stream;
  StreamReport report;
  try {
    report = scheduler.Restore(file, options.memory,
                               [&](Archive& archive, const StreamId& saved, StreamBudget& budget) {
                                 std::string owner;
                                 archive.Text("owner", owner);
                                 if (owner != account->owner()) throw NotYours();
                                 if (saved != id) {
                                   archive.Refuse("id", "the stream's own", "another one");
                                 }
                                 LiveStream::Terms terms = TermsFor(account, self);
                                 budget = terms.budget = Granted(ToProto(budget), options.budget);
                                 stream = std::make_shared<LiveStream>(std::move(terms));
                                 *self = stream;
                                 stream->id = id;
                                 stream->Persist(archive);
                                 return stream;
                               });
  } catch (const NotYours&) {
    return nullptr;
  } catch (const InputError& error) {
    LogEvent(spdlog::level::warn, "stream_not_restored",
             {{"stream", id.substr(0, 8)}, {"error", Redacted(error.what(), id)}});
    // The client learns what is wrong, not where the file lies.
    throw InputError(ForClient(ReplacedAll(error.what(), file.string(), "the saved stream")));
  }
  stream->Resumed(report, clock.Now());
  {
    const std::lock_guard lock(mutex_);
    streams_[id] = stream;
  }
  LogEvent(spdlog::level::info, "stream_restored",
           {{"stream", id.substr(0, 8)}, {"account", account->name()}});
  return stream;
}

// The client has stayed away: the stream goes on from its file when it is back.
void StreamHub::Park(const std::shared_ptr<LiveStream>& stream) {
  const std::lock_guard files(files_mutex_);
  if (stream->away_since() && !PutAway(stream, "[session] the stream was put away; resume it")) {
    Close(stream);
  }
}

// Saves a stream and ends it here. False, and logged: it could not be saved.
bool StreamHub::PutAway(const std::shared_ptr<LiveStream>& stream, const char* line) {
  try {
    stream->StopSource();
    Save(*stream);
    scheduler.Close(stream->id);
  } catch (const Error&) {  // logged by Save, or closed by somebody else
    return false;
  }
  Forget(stream->id);
  stream->End({grpc::StatusCode::UNAVAILABLE, line});
  LogEvent(spdlog::level::info, "stream_saved", {{"stream", stream->id.substr(0, 8)}});
  return true;
}

void StreamHub::Forget(const StreamId& id) {
  const std::lock_guard lock(mutex_);
  streams_.erase(id);
}

void StreamHub::Attend(const std::shared_ptr<LiveStream>& stream) {
  switch (stream->duty()) {
    case LiveStream::Duty::kNone:
      return;
    case LiveStream::Duty::kLeave:
      stream->End(grpc::Status::OK);
      return;
    case LiveStream::Duty::kClose:
    case LiveStream::Duty::kBury:
      Close(stream);
      return;
  }
}

void StreamHub::Close(const std::shared_ptr<LiveStream>& stream) {
  stream->StopSource();
  StreamReport report;
  try {
    report = scheduler.Close(stream->id);
  } catch (const InputError&) {  // closed by somebody else, who tells it
    Forget(stream->id);
    return;
  }
  if (const auto file = saved_.FileOf(stream->id, stream->account().owner()); !file.empty()) {
    std::error_code ignored;  // it may never have been saved
    std::filesystem::remove(file, ignored);
  }
  Forget(stream->id);  // last, so that nobody finds the file of a stream that is closed
  v1::SessionResponse message;
  v1::Closed& closed = *message.mutable_closed();
  closed.set_frames_received(stream->received());
  closed.set_frames_encoded(report.frames.encoded);
  closed.set_frames_dropped(report.frames.dropped + stream->refused());
  closed.set_questions(report.questions);
  closed.set_answer_tokens(report.answer_tokens);
  closed.set_visual_tokens(report.visual_tokens);
  closed.set_last_media_seconds(report.last_time.seconds());
  stream->Send(std::move(message));
  stream->End(grpc::Status::OK);
  LogEvent(spdlog::level::info, "stream_closed",
           {{"stream", stream->id.substr(0, 8)},
            {"frames_received", stream->received()},
            {"frames_encoded", report.frames.encoded},
            {"questions", report.questions}});
}

void StreamHub::Watch() {
  NameThread("watch");
  using Seconds = std::chrono::duration<double>;
  const double patience = std::min(options.linger_seconds, options.first_message_seconds);
  const Seconds period(std::min(1.0, patience / 4 + 0.01));
  std::optional<WallTime> cleaned;
  std::unique_lock lock(mutex_);
  while (!ending_) {
    changed_.wait_for(lock, period, [this] { return ending_ || attention_; });
    attention_ = false;
    lock.unlock();
    try {
      EndCalls();
      EndStreams();
      const WallTime now = clock.Now();
      if (!options.state_directory.empty() &&
          (!cleaned || now - *cleaned >= std::chrono::hours(1))) {
        cleaned = now;
        saved_.RemoveOld(options.state_days);
      }
    } catch (const std::exception& error) {  // no memory, say; the next time may do better
      LogEvent(spdlog::level::err, "watch_failed", {{"error", error.what()}});
    }
    lock.lock();
  }
}

void StreamHub::EndCalls() {
  std::vector<std::shared_ptr<OpenCall>> open;
  {
    const std::lock_guard lock(mutex_);
    for (auto it = open_calls_.begin(); it != open_calls_.end();) {
      auto call = it->lock();
      it = call ? std::next(it) : open_calls_.erase(it);
      if (call) open.push_back(std::move(call));
    }
  }
  const CalendarTime today = std::chrono::system_clock::now();
  const WallTime now = clock.Now();
  const std::chrono::duration<double> patience(options.first_message_seconds);
  for (const auto& call : open) {
    const auto since = call->waiting_since();
    if (call->account() != nullptr && call->account()->ExpiredAt(today)) {
      call->End(
          {grpc::StatusCode::UNAUTHENTICATED, "[call] the token has expired or was withdrawn"});
    } else if (since && now - *since >= patience) {
      call->End({grpc::StatusCode::DEADLINE_EXCEEDED,
                 "[call] expected the first message within " +
                     std::to_string(options.first_message_seconds) + " seconds of the call"});
    }
  }
}

void StreamHub::EndStreams() {
  const CalendarTime today = std::chrono::system_clock::now();
  const std::chrono::duration<double> linger(options.linger_seconds);
  for (const auto& stream : All()) {
    if (stream->account().ExpiredAt(today)) {
      // Nobody can resume it now; with a state directory it waits there for a token that is valid
      // again.
      LogEvent(spdlog::level::info, "stream_lost_its_token", {{"stream", stream->id.substr(0, 8)}});
      const std::lock_guard files(files_mutex_);
      if (options.state_directory.empty() ||
          !PutAway(stream, "[session] the token has expired or was withdrawn")) {
        Close(stream);
      }
      continue;
    }
    const auto since = stream->away_since();
    if (!since || clock.Now() - *since < linger) continue;
    options.state_directory.empty() ? Close(stream) : Park(stream);
  }
}

void StreamHub::Spawn(std::shared_ptr<Account> account, std::function<void()> job) {
  const std::lock_guard lock(mutex_);
  int of_account = 0;
  for (auto it = threads_.begin(); it != threads_.end();) {
    const auto thread = it++;
    if (!thread->done) {
      of_account += thread->account->owner() == account->owner() ? 1 : 0;
      continue;
    }
    thread->thread.join();
    threads_.erase(thread);
  }
  if (ending_ || static_cast<int>(threads_.size()) >= options.max_sources) {
    throw ResourceExhausted("[source] expected at most " + std::to_string(options.max_sources) +
                            " sources of this server at a time; try again later");
  }
  const int most = account->sources(options.account_sources);
  if (most > 0 && of_account >= most) {
    throw ResourceExhausted("[source] expected at most " + std::to_string(most) +
                            " sources of this token at a time; end one first");
  }
  Thread& thread = threads_.emplace_back();
  thread.account = std::move(account);
  try {
    thread.thread = std::thread([&thread, job = std::move(job)]() mutable {
      NameThread("source");
      job();
      job = nullptr;
      thread.done = true;
    });
  } catch (const std::system_error&) {
    threads_.pop_back();
    throw ResourceExhausted("[source] this server can start no more threads now; try again later");
  }
}

void StreamHub::CountRefusedFrame(const char* reason) {
  metrics_
      .counter("sluice_frames_refused_total", "Frames that did not reach the scheduler.",
               {{"reason", reason}})
      .Add();
}

void StreamHub::Play(const std::shared_ptr<LiveStream>& stream, const v1::OpenSource& request) {
  Spawn(stream->shared_account(), [this, stream, request] { PlaySource(*stream, request); });
}

void StreamHub::PlaySource(LiveStream& stream, const v1::OpenSource& request) {
  v1::SessionResponse end;
  v1::SourceEnded& ended = *end.mutable_source_ended();
  try {
    SourceOptions source_options = SourceOptionsOf(request.fps(), options);
    source_options.on_warning = [&stream](const std::string& line) { stream.OnWarning(line); };
    const std::shared_ptr<Source> source = sources.Open(request.url(), source_options);
    const SourceInfo& info = source->info();
    if (stream.SourceIsOpen(source)) {
      v1::SessionResponse message;
      v1::SourceOpened& opened = *message.mutable_source_opened();
      opened.set_live(info.live);
      if (info.duration) opened.set_media_seconds(info.duration->seconds());
      opened.set_width(info.width);
      opened.set_height(info.height);
      opened.set_codec(Utf8(info.codec));
      stream.Send(std::move(message));
      int64_t number = 0;
      while (info.live || stream.WaitForRoom()) {
        FramePtr frame = source->Next();
        if (!frame) break;
        // A recording waits for room and for its account's rate; of what is live nothing can wait.
        while (!info.live && !scheduler.HasRoomForPictures() && stream.Pause(kPace)) continue;
        bool within = stream.account().TakeFrame(0, clock.Now());
        while (!within && !info.live && stream.Pause(kPace)) {
          within = stream.account().TakeFrame(0, clock.Now());
        }
        if (!within && !info.live) break;
        if (!within) {
          CountRefusedFrame("quota");
          stream.FrameReceived();
          stream.FrameRefused(static_cast<FrameNumber>(number++), frame->time.seconds(),
                              v1::DROP_REASON_QUOTA, "");
          continue;
        }
        stream.FrameReceived();
        scheduler.Push(stream.id, static_cast<FrameNumber>(number++), std::move(frame));
      }
      ended.set_frames(number);
      if (source->warning()) ended.set_error(Utf8(*source->warning()));
    }
  } catch (const std::exception& error) {
    ended.set_error(ErrorLine(error.what()));
  }
  stream.Send(std::move(end));
  stream.SourceEnds();
}

void StreamHub::Drain() {
  if (draining_.exchange(true)) return;
  LogEvent(spdlog::level::info, "draining", {{"seconds", options.drain_seconds}});
  for (const auto& stream : All()) {
    v1::SessionResponse message;
    message.mutable_going_away()->set_seconds(options.drain_seconds);
    stream->Send(std::move(message));
    stream->StopSource();
  }
  scheduler.Drain(options.drain_seconds);
  for (const auto& stream : All()) {
    if (!options.state_directory.empty() &&
        PutAway(stream, "[serve] the server has shut down; resume the stream at the next one")) {
      continue;
    }
    stream->End({grpc::StatusCode::UNAVAILABLE, "[serve] the server has shut down; try again"});
  }
}

}  // namespace sluice
