#include "proto/stream_hub.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <vector>

#include "proto/convert.h"
#include "proto/json_log.h"
#include "proto/messages.h"
#include "runtime/error.h"
#include "streaming/defaults.h"

namespace sluice {
namespace {

constexpr double kDefaultFps = 2;
constexpr char kSuffix[] = ".stream";

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

SourceOptions SourceOptionsOf(double fps) {
  if (!(fps >= 0 && fps <= 1000)) {
    throw InputError("[source] expected fps in (0, 1000], got " + std::to_string(fps));
  }
  SourceOptions options;
  options.rate.fps = fps == 0 ? kDefaultFps : fps;
  return options;
}

StreamHub::StreamHub(std::shared_ptr<const Vlm> model, Scheduler& streams, Metrics& metrics,
                     const Clock& wall, const ServiceOptions& service_options)
    : options(WithDirectory(service_options)),
      vlm(std::move(model)),
      scheduler(streams),
      clock(wall),
      calls(metrics.gauge("sluice_calls_open", "Session and Caption calls in progress.")),
      sources(options.sources, options.decoder, metrics),
      metrics_(metrics),
      access_(service_options.tokens),
      pool_(std::make_unique<WorkerPool>(service_options.workers)),
      watcher_([this] { WatchAbsent(); }) {}

StreamHub::~StreamHub() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  changed_.notify_all();
  watcher_.join();
  for (const auto& stream : All()) Close(stream);
  for (Thread& thread : threads_) thread.thread.join();
  pool_.reset();
}

std::shared_ptr<Account> StreamHub::Authenticate(std::string_view authorization) const {
  return access_.Find(authorization, std::chrono::system_clock::now());
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
  stream->id = scheduler.Open(session, budget, stream);
  {
    const std::lock_guard lock(mutex_);
    streams_[stream->id] = stream;
  }
  LogEvent(spdlog::level::info, "stream_opened",
           {{"stream", stream->id.substr(0, 8)}, {"account", account->name()}});
  if (!note.empty()) stream->OnWarning(note);
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
            pool_->Post([this, self] {
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

// Ids come from clients: nothing but an id may become part of a path.
std::filesystem::path StreamHub::FileOf(const StreamId& id) const {
  const bool is_id = id.size() == 32 && id.find_first_not_of("0123456789abcdef") == id.npos;
  return is_id && !options.state_directory.empty() ? options.state_directory / (id + kSuffix)
                                                   : std::filesystem::path();
}

void StreamHub::Save(LiveStream& stream) {
  const auto file = FileOf(stream.id);
  if (file.empty()) throw InputError("[save] this server has no directory for saved streams");
  try {
    scheduler.Save(stream.id, file, [&](Archive& archive) {
      std::string account = stream.account().name();
      archive.Text("account", account);
      stream.Persist(archive);
    });
  } catch (const Error&) {
    SavedStreams("failed").Add();
    throw;
  }
  SavedStreams("saved").Add();
}

Counter& StreamHub::SavedStreams(const char* result) {
  return metrics_.counter("sluice_streams_saved_total", "Streams written to the state directory.",
                          {{"result", result}});
}

// REQUIRES: files_mutex_.
std::shared_ptr<LiveStream> StreamHub::Restore(const StreamId& id,
                                               const std::shared_ptr<Account>& account) {
  const auto file = FileOf(id);
  if (file.empty() || !std::filesystem::exists(file)) return nullptr;
  struct NotYours {};
  const auto self = std::make_shared<std::weak_ptr<LiveStream>>();
  std::shared_ptr<LiveStream> stream;
  StreamReport report;
  try {
    report = scheduler.Restore(file, options.memory,
                               [&](Archive& archive, const StreamId& saved, StreamBudget& budget) {
                                 std::string owner;
                                 archive.Text("account", owner);
                                 if (owner != account->name()) throw NotYours();
                                 if (saved != id) archive.Refuse("id", id, saved);
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
  } catch (const Error& error) {
    LogEvent(spdlog::level::warn, "stream_not_saved",
             {{"stream", stream->id.substr(0, 8)}, {"error", error.what()}});
    return false;
  }
  Forget(stream->id);
  stream->End({grpc::StatusCode::UNAVAILABLE, line});
  LogEvent(spdlog::level::info, "stream_saved", {{"stream", stream->id.substr(0, 8)}});
  return true;
}

void StreamHub::RemoveOldFiles() const {
  using Time = std::filesystem::file_time_type;
  const auto oldest = Time::clock::now() -
                      std::chrono::duration_cast<Time::duration>(
                          std::chrono::duration<double, std::ratio<86400>>(options.state_days));
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(options.state_directory, error)) {
    // Half-written ones of a process that was killed go with them.
    if (entry.path().filename().string().find(kSuffix) == std::string::npos) continue;
    const Time time = entry.last_write_time(error);
    if (!error && time < oldest) std::filesystem::remove(entry.path(), error);
  }
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
  if (const auto file = FileOf(stream->id); !file.empty()) {
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

void StreamHub::WatchAbsent() {
  const std::chrono::duration<double> linger(options.linger_seconds);
  std::optional<WallTime> cleaned;
  std::unique_lock lock(mutex_);
  while (!ending_) {
    changed_.wait_for(lock, std::min(std::chrono::duration<double>(1),
                                     linger / 4 + std::chrono::duration<double>(0.01)));
    lock.unlock();
    for (const auto& stream : All()) {
      const auto since = stream->away_since();
      if (!since || clock.Now() - *since < linger) continue;
      options.state_directory.empty() ? Close(stream) : Park(stream);
    }
    const WallTime now = clock.Now();
    if (!options.state_directory.empty() && (!cleaned || now - *cleaned >= std::chrono::hours(1))) {
      RemoveOldFiles();
      cleaned = now;
    }
    lock.lock();
  }
}

void StreamHub::Spawn(std::function<void()> job) {
  const std::lock_guard lock(mutex_);
  for (auto it = threads_.begin(); it != threads_.end();) {
    const auto thread = it++;
    if (!thread->done) continue;
    thread->thread.join();
    threads_.erase(thread);
  }
  if (ending_ || static_cast<int>(threads_.size()) >= options.max_sources) {
    throw ResourceExhausted("[source] expected at most " + std::to_string(options.max_sources) +
                            " sources of this server at a time; try again later");
  }
  Thread& thread = threads_.emplace_back();
  thread.thread = std::thread([&thread, job = std::move(job)]() mutable {
    job();
    job = nullptr;
    thread.done = true;
  });
}

void StreamHub::CountRefusedFrame(const char* reason) {
  metrics_
      .counter("sluice_frames_refused_total", "Frames that did not reach the scheduler.",
               {{"reason", reason}})
      .Add();
}

void StreamHub::Play(const std::shared_ptr<LiveStream>& stream, const v1::OpenSource& request) {
  Spawn([this, stream, request] { PlaySource(*stream, request); });
}

void StreamHub::PlaySource(LiveStream& stream, const v1::OpenSource& request) {
  v1::SessionResponse end;
  v1::SourceEnded& ended = *end.mutable_source_ended();
  try {
    const SourceOptions source_options = SourceOptionsOf(request.fps());
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
        stream.FrameReceived();
        scheduler.Push(stream.id, static_cast<FrameNumber>(number++), std::move(frame));
      }
      ended.set_frames(number);
      if (source->warning()) ended.set_error(Utf8(*source->warning()));
    }
  } catch (const std::exception& error) {
    ended.set_error(Utf8(error.what()));
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
