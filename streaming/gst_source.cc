#include "streaming/gst_source.h"

#include <gst/pbutils/pbutils.h>

#include <algorithm>
#include <utility>

#include "runtime/error.h"
#include "streaming/connection_check.h"
#include "streaming/logging.h"

namespace sluice {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

// After an error GStreamer still delivers what was decoded before it; silence for so long means
// that this is done.
constexpr milliseconds kAfterError{300};

// How often a source that has shown nothing yet is looked after.
constexpr milliseconds kBetweenLooks{100};

// Decoders that are missed are named where a video stream finds none; others nobody misses.
bool IsMissingDecoder(GstMessage* message) {
  const gchar* type = gst_structure_get_string(gst_message_get_structure(message), "type");
  return type && std::string_view(type) == "decoder";
}

// What a segment of a playlist is taken to last until two of them came.
constexpr std::chrono::seconds kUsualSegment{10};

// How long each step of finding out why there is no connection may take.
constexpr milliseconds kLookingForCause{3000};

}  // namespace

milliseconds SilenceAllowed(milliseconds stall_timeout, bool in_segments,
                            std::chrono::nanoseconds longest_segment) {
  if (!in_segments) return stall_timeout;
  const std::chrono::nanoseconds segment =
      longest_segment.count() > 0 ? longest_segment : kUsualSegment;
  return stall_timeout + std::chrono::duration_cast<milliseconds>(2 * segment);
}

GstSource::GstSource(SourceRequest request, const SourceOptions& options)
    : request_(std::move(request)),
      options_(options),
      redact_(request_.location),
      sampler_(options) {
  gst_segment_init(&segment_, GST_FORMAT_TIME);
}

GstSource::~GstSource() {
  if (!pipeline_) return;
  gst_element_set_state(pipeline_, GST_STATE_NULL);  // joins GStreamer's threads
  const BusPtr bus(gst_element_get_bus(pipeline_));
  gst_bus_set_sync_handler(bus.get(), nullptr, nullptr, nullptr);
  if (stashed_) gst_sample_unref(stashed_);
  gst_object_unref(pipeline_);
}

void GstSource::Throw(const std::string& what) const {
  throw InputError(redact_("[source] '" + request_.label + "': " + what));
}

void GstSource::Start() {
  pipeline_ = gst_pipeline_new(nullptr);
  const BusPtr bus(gst_element_get_bus(pipeline_));
  gst_bus_set_sync_handler(bus.get(), &GstSource::OnMessage, this, nullptr);
  g_signal_connect(pipeline_, "deep-element-added", G_CALLBACK(&GstSource::OnElementAdded), this);
  BuildOutput();
  BuildInput();

  // A live source has no picture to show while paused; it has to run.
  info_.live = gst_element_set_state(pipeline_, GST_STATE_PAUSED) == GST_STATE_CHANGE_NO_PREROLL;
  if (info_.live) gst_element_set_state(pipeline_, GST_STATE_PLAYING);
  WaitForFormat();
  if (info_.endless && (options_.begin || options_.end)) {
    Throw("begin and end need a recording, this is a live source; leave them out");
  }
  SeekToBegin();
  gst_element_set_state(pipeline_, GST_STATE_PLAYING);
}

// ---- Waiting --------------------------------------------------------------------------------

uint64_t GstSource::Events() {
  const std::lock_guard lock(state_.mutex);
  return state_.events;
}

void GstSource::Notify(const std::function<void(State&)>& change) {
  {
    const std::lock_guard lock(state_.mutex);
    change(state_);
    ++state_.events;
  }
  state_.changed.notify_all();
}

// Waits for the next event after `seen`. Returns false when nothing more can be expected: after an
// error everything decoded before it came. Throws when the source has stalled since `asked`. What a
// decoder is fed counts as life only for recordings, which end; a broken live stream could go on
// for ever. Also returns, with true, after `at_most`.
bool GstSource::WaitForChange(uint64_t seen, SteadyTime asked, milliseconds at_most) {
  const SteadyTime entered = steady_clock::now();
  std::unique_lock lock(state_.mutex);
  while (state_.events == seen) {
    const bool failed = !state_.error.empty();
    SteadyTime since = std::max(asked, state_.last_picture);
    if (!info_.live) since = std::max(since, state_.last_data);
    const SteadyTime now = steady_clock::now();
    const milliseconds allowed =
        SilenceAllowed(options_.stall_timeout, state_.in_segments, state_.longest_segment);
    const bool may_wait = request_.pipe && !failed;  // its end shows when the writer closes it
    const SteadyTime deadline =
        may_wait ? now + std::chrono::hours(1) : since + (failed ? kAfterError : allowed);
    if (at_most != milliseconds::max() && now >= entered + at_most) return true;
    if (now >= deadline) {
      if (failed) return false;
      char seconds[32];
      std::snprintf(seconds, sizeof seconds, "%.3g", allowed.count() * 1e-3);
      const bool nothing_came = !state_.video_linked && state_.demuxers.empty();
      lock.unlock();
      const bool asked_for_cause = nothing_came && IsRemote();
      if (asked_for_cause) {
        const std::string why = WhyUnreachable(std::min(allowed, kLookingForCause));
        if (!why.empty()) Throw(why);
      }
      Throw("nothing arrived for " + std::string(seconds) + " s" +
            (asked_for_cause ? ", although the server can be reached" : "") +
            "; check that the source is up, or raise the stall timeout");
    }
    state_.changed.wait_until(
        lock, at_most == milliseconds::max() ? deadline : std::min(deadline, entered + at_most));
  }
  return true;
}

// decodebin hides what a demuxer reports while it is being plugged in, so a file that fails at once
// may fail in silence. What then can be seen is a demuxer that stopped reading without having found
// a stream; returns what is wrong then, else an empty string.
std::string GstSource::DemuxerGaveUp() {
  const std::lock_guard lock(state_.mutex);
  for (const ElementPtr& demuxer : state_.demuxers) {
    const PadPtr sink(gst_element_get_static_pad(demuxer.get(), "sink"));
    if (sink && demuxer->numsrcpads == 0 && GST_PAD_MODE(sink.get()) == GST_PAD_MODE_PULL &&
        gst_pad_get_task_state(sink.get()) == GST_TASK_PAUSED) {
      return "damaged: " + FactoryName(demuxer.get()) + " finds no stream in it" +
             CutOffHint(demuxer.get());
    }
  }
  return "";
}

bool GstSource::IsRemote() const {
  return request_.kind == SourceRequest::Kind::kUri &&
         (request_.location.starts_with("http") || request_.location.starts_with("rtsp"));
}

// Over HTTP a file and a camera look alike but for this. What keeps a file's format is a file, also
// where its length is not told and nothing of it can be asked for again.
bool GstSource::IsNetworkCamera() const {
  return request_.location.starts_with("http") && multipart_;
}

// Connects once more, to the same place, unless it is known what failed.
std::string GstSource::WhyUnreachable(milliseconds at_most) const {
  const std::string known = request_.why_unreachable ? request_.why_unreachable() : "";
  return known.empty() ? sluice::WhyUnreachable(request_.location, at_most) : known;
}

void GstSource::ThrowNoConnection(const std::string& error) const {
  const std::string meaning = MeaningOfStatus(error);
  if (!meaning.empty()) Throw(meaning);
  const std::string why = WhyUnreachable(kLookingForCause);
  if (!why.empty()) Throw(why);
  Throw("the server can be reached, but gives nothing that can be read: " + error);
}

void GstSource::WaitForFormat() {
  const SteadyTime asked = steady_clock::now();
  std::string gave_up;
  for (;;) {
    const uint64_t seen = Events();
    {
      std::unique_lock lock(state_.mutex);
      if (state_.cancelled) {
        lock.unlock();
        Throw("was cancelled while it was opened");
      }
    }
    const bool ended = gst_app_sink_is_eos(sink_);
    const SamplePtr preroll(gst_app_sink_try_pull_preroll(sink_, 0));
    if (preroll && !info_.live) {  // a live one's would come again as its first sample
      ReadFormat(preroll.get());
      return;
    }
    if ((stashed_ = gst_app_sink_try_pull_sample(sink_, 0))) {
      ReadFormat(stashed_);
      return;
    }
    // It may have stopped a moment before it says why; the next look decides.
    const bool gave_up_before = !std::exchange(gave_up, DemuxerGaveUp()).empty();
    bool hopeless = ended || (gave_up_before && !gave_up.empty());
    {
      std::unique_lock lock(state_.mutex);
      if (!state_.refusal.empty()) {
        const std::string what = state_.refusal;
        lock.unlock();
        Throw(what);
      }
      // Without a video stream there is no picture to wait for.
      hopeless |= !state_.error.empty() && !state_.video_linked;
    }
    if (hopeless || !WaitForChange(seen, asked, kBetweenLooks)) {
      std::unique_lock lock(state_.mutex);
      if (!state_.missing.empty()) Throw(state_.missing);
      if (!state_.video_linked && !state_.other_streams.empty()) Throw(state_.NoVideo());
      if (!state_.error.empty()) {
        const std::string error = state_.error;
        const bool nothing_came = !state_.video_linked && state_.demuxers.empty();
        lock.unlock();
        if (nothing_came && IsRemote()) ThrowNoConnection(error);
        Throw(error);
      }
      if (!gave_up.empty()) Throw(gave_up);
      if (withheld_ > 0) {
        Throw("none of its " + std::to_string(withheld_) +
              " pictures is a key frame, so none can be shown");
      }
      Throw("the stream holds no picture; expected at least one video frame");
    }
  }
}

FramePtr GstSource::Next() {
  const SteadyTime asked = steady_clock::now();
  if (options_.max_frames > 0 && delivered_ >= options_.max_frames) {
    // The next picture would say so too, but it may be long in coming.
    Notify([](State& s) { s.past_end = true; });
  }
  while (!ended_) {
    const uint64_t seen = Events();
    bool ended = gst_app_sink_is_eos(sink_);
    {
      const std::lock_guard lock(state_.mutex);
      if (state_.cancelled) return nullptr;
      ended |= state_.past_end;
    }
    // Looked for only now: every picture was in the sink before the end was announced.
    const SamplePtr sample(stashed_ ? std::exchange(stashed_, nullptr)
                                    : gst_app_sink_try_pull_sample(sink_, 0));
    if (sample) {
      if (FramePtr frame = ToFrame(sample.get())) return frame;
    } else if (ended || !WaitForChange(seen, asked)) {
      return Finish();
    }
  }
  return nullptr;
}

// Adds what a reader did not get to the warning.
void GstSource::Warn(const std::vector<std::string>& left_out) {
  for (const std::string& part : left_out) {
    warning_ = warning_ ? *warning_ + "; " + part : "[source] '" + request_.label + "': " + part;
  }
}

FramePtr GstSource::Finish() {
  ended_ = true;
  std::string refusal, error, hung_up;
  bool past_end = false;
  {
    const std::lock_guard lock(state_.mutex);
    refusal = state_.refusal;
    error = state_.error;
    hung_up = state_.hung_up;
    past_end = state_.past_end;
  }
  gst_element_set_state(pipeline_, GST_STATE_NULL);  // stops decoding what nobody will look at
  if (!refusal.empty()) Throw(refusal);
  if (past_end) {
    Warn(LeftOut());
    return nullptr;
  }

  const MediaTime newest = MediaTime::FromNanoseconds(newest_ns_);
  const std::string so_far = std::to_string(delivered_) + " frames";
  // A camera that hangs up has not come to an end; whether it has shows when it is opened again.
  if (info_.live && IsNetworkCamera() && options_.reconnect.most_tries != 0) {
    hung_up = "the server closed the connection";
  }
  if (error.empty() && info_.endless) error = hung_up;
  if (!error.empty()) {
    if (delivered_ == 0) Throw(error);
    if (info_.endless) Throw("the stream broke after " + so_far + ": " + error);
    warning_ = "[source] '" + request_.label + "' is damaged and ended at " + newest.ToString() +
               " after " + so_far + ": " + error;
  } else if (!request_.container.cut_off.empty()) {
    warning_ = "[source] '" + request_.label + "' ended at " + newest.ToString() + " after " +
               so_far + ": " + request_.container.cut_off;
  }
  if (error.empty() && delivered_ == 0 && options_.begin && newest < *options_.begin) {
    Throw("begin is " + options_.begin->ToString() + ", but the stream ends at " +
          newest.ToString());
  }
  std::vector<std::string> left_out = LeftOut();
  if (!request_.container.unread.empty()) left_out.push_back(request_.container.unread);
  if (!sought_ && fed_ > decoded_) {
    left_out.push_back(std::to_string(fed_ - decoded_) + " of " + std::to_string(fed_) +
                       " pictures could not be decoded");
  }
  Warn(left_out);
  return nullptr;
}

void GstSource::Cancel() {
  Notify([](State& s) { s.cancelled = true; });
}

// ---- On GStreamer's threads -----------------------------------------------------------------

GstBusSyncReply GstSource::OnMessage(GstBus*, GstMessage* message, gpointer data) {
  auto* self = static_cast<GstSource*>(data);
  if (GST_MESSAGE_TYPE(message) == GST_MESSAGE_ERROR) {
    const std::string line = self->redact_(Describe(message));
    // The first error is the cause; what follows are its echoes.
    self->Notify([&](State& s) {
      if (s.error.empty()) s.error = line;
    });
    Logger()->debug("'{}': {}", self->request_.label, line);
  } else if (GST_MESSAGE_TYPE(message) == GST_MESSAGE_WARNING) {
    const std::string line = self->redact_(Describe(message));
    // rtspsrc then ends the stream as if that were its end.
    if (line.find("closed connection") != std::string::npos) {
      self->Notify([&](State& s) { s.hung_up = "the server closed the connection"; });
    }
    Logger()->debug("'{}': {}", self->request_.label, line);
  } else if (gst_is_missing_plugin_message(message) && !IsMissingDecoder(message)) {
    const GChars what(gst_missing_plugin_message_get_description(message));
    self->Notify([&](State& s) {
      if (s.missing.empty()) s.missing = std::string("no plugin for ") + what.get();
    });
  }
  gst_message_unref(message);
  return GST_BUS_DROP;
}

}  // namespace sluice
