#include "streaming/gst_source.h"

#include <gst/pbutils/pbutils.h>
#include <gst/video/video.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "runtime/error.h"
#include "streaming/logging.h"

namespace sluice {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr int kTestWidth = 640, kTestHeight = 480, kTestFps = 30;

// After an error GStreamer still delivers what was decoded before it; silence for so long means
// that this is done.
constexpr milliseconds kAfterError{300};

// How often a source that has shown nothing yet is looked after.
constexpr milliseconds kBetweenLooks{100};

template <auto Free>
struct Deleter {
  template <typename T>
  void operator()(T* p) const {
    Free(p);
  }
};
using GChars = std::unique_ptr<gchar, Deleter<g_free>>;
using CapsPtr = std::unique_ptr<GstCaps, Deleter<gst_caps_unref>>;
using SamplePtr = std::unique_ptr<GstSample, Deleter<gst_sample_unref>>;
using PadPtr = std::unique_ptr<GstPad, Deleter<gst_object_unref>>;
using BusPtr = std::unique_ptr<GstBus, Deleter<gst_object_unref>>;

std::string MediaType(const GstCaps* caps) {
  if (gst_caps_is_empty(caps) || gst_caps_is_any(caps)) return "unknown";
  return gst_structure_get_name(gst_caps_get_structure(caps, 0));
}

// "H.264 (High Profile)"; for codecs GStreamer has never heard of, the container's four letters.
std::string CodecName(const GstCaps* caps) {
  if (!gst_caps_is_fixed(caps)) return MediaType(caps);
  gint fourcc = 0;
  if (gst_structure_get_int(gst_caps_get_structure(caps, 0), "fourcc", &fourcc)) {
    std::string letters;
    for (int i = 0; i < 4; ++i) {
      const char letter = static_cast<char>(static_cast<guint>(fourcc) >> 8 * i & 0xff);
      letters += g_ascii_isprint(letter) ? letter : '?';
    }
    return "'" + letters + "'";
  }
  const GChars name(gst_pb_utils_get_codec_description(caps));
  return name ? name.get() : MediaType(caps);
}

// The name of what the decoder behind a decodebin's pad reads.
std::string CodecBehind(GstPad* pad) {
  PadPtr inner(GST_PAD(gst_object_ref(pad)));
  while (inner && GST_IS_GHOST_PAD(inner.get())) {
    inner.reset(gst_ghost_pad_get_target(GST_GHOST_PAD(inner.get())));
  }
  if (!inner) return "unknown";
  const ElementPtr decoder(gst_pad_get_parent_element(inner.get()));
  const PadPtr input(decoder ? gst_element_get_static_pad(decoder.get(), "sink") : nullptr);
  const CapsPtr caps(gst_pad_get_current_caps(input ? input.get() : inner.get()));
  return caps ? CodecName(caps.get()) : "unknown";
}

std::string FactoryName(GstElement* element) {
  const GstElementFactory* factory = gst_element_get_factory(element);
  return factory ? GST_OBJECT_NAME(factory) : GST_OBJECT_NAME(element);
}

const char* CutOffHint(GstElement* element) {
  if (FactoryName(element) != "qtdemux") return "";
  return " (it may be cut off: its index, 'moov', is often written last)";
}

// One line of what an element said. The debug text's last line often holds the only detail.
std::string Describe(GstMessage* message) {
  GError* error = nullptr;
  gchar* debug = nullptr;
  if (GST_MESSAGE_TYPE(message) == GST_MESSAGE_ERROR) {
    gst_message_parse_error(message, &error, &debug);
  } else {
    gst_message_parse_warning(message, &error, &debug);
  }
  std::string line = error ? error->message : "unknown error";
  std::string detail = debug ? debug : "";
  const bool undetermined = error && error->domain == GST_STREAM_ERROR &&
                            (error->code == GST_STREAM_ERROR_TYPE_NOT_FOUND ||
                             error->code == GST_STREAM_ERROR_WRONG_TYPE);
  g_clear_error(&error);
  g_free(debug);

  if (undetermined) return "not a media file: " + line;
  const size_t last_line = detail.rfind('\n');
  if (last_line != std::string::npos) line += " (" + detail.substr(last_line + 1) + ")";
  std::replace(line.begin(), line.end(), '\n', ' ');
  if (GST_IS_ELEMENT(GST_MESSAGE_SRC(message))) {
    line += CutOffHint(GST_ELEMENT(GST_MESSAGE_SRC(message)));
  }
  return line;
}

const char* PackageOf(std::string_view factory) {
  if (factory == "videoflip" || factory == "v4l2src") return "gstreamer1.0-plugins-good";
  return "gstreamer1.0-plugins-base";
}

}  // namespace

GstSource::GstSource(SourceRequest request, const SourceOptions& options)
    : request_(std::move(request)), options_(options), sampler_(options) {
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
  throw InputError("[source] '" + request_.label + "': " + what);
}

// ---- Building -------------------------------------------------------------------------------

GstElement* GstSource::Add(const char* factory) {
  GstElement* element = gst_element_factory_make(factory, nullptr);
  if (!element) {
    throw Error("[source] GStreamer has no element '" + std::string(factory) + "'; install " +
                PackageOf(factory));
  }
  gst_bin_add(GST_BIN(pipeline_), element);
  return element;
}

void GstSource::BuildOutput() {
  flip_ = Add("videoflip");
  gst_util_set_object_arg(G_OBJECT(flip_), "video-direction", "auto");
  GstElement* convert = Add("videoconvert");
  GstElement* sink = Add("appsink");
  sink_ = GST_APP_SINK(sink);
  const CapsPtr rgb(gst_caps_new_simple("video/x-raw", "format", G_TYPE_STRING, "RGB", nullptr));
  g_object_set(sink, "caps", rgb.get(), "sync", FALSE, "max-buffers", 1u, "enable-last-sample",
               FALSE, nullptr);
  gst_element_link_many(flip_, convert, sink, nullptr);

  GstAppSinkCallbacks callbacks = {};
  callbacks.new_preroll = [](GstAppSink*, gpointer self) {
    static_cast<GstSource*>(self)->Notify([](State&) {});
    return GST_FLOW_OK;
  };
  callbacks.new_sample = [](GstAppSink*, gpointer self) {
    static_cast<GstSource*>(self)->Notify([](State&) {});
    return GST_FLOW_OK;
  };
  callbacks.eos = [](GstAppSink*, gpointer self) {
    static_cast<GstSource*>(self)->Notify([](State&) {});
  };
  gst_app_sink_set_callbacks(sink_, &callbacks, this, nullptr);

  const PadPtr pad(gst_element_get_static_pad(flip_, "sink"));
  gst_pad_add_probe(
      pad.get(),
      static_cast<GstPadProbeType>(GST_PAD_PROBE_TYPE_BUFFER | GST_PAD_PROBE_TYPE_EVENT_DOWNSTREAM |
                                   GST_PAD_PROBE_TYPE_EVENT_FLUSH),
      &GstSource::OnDecoded, this, nullptr);
}

void GstSource::WatchDecodebin(GstElement* bin) {
  g_signal_connect(bin, "autoplug-continue", G_CALLBACK(&GstSource::OnAutoplugContinue), this);
  g_signal_connect(bin, "unknown-type", G_CALLBACK(&GstSource::OnUnknownType), this);
  g_signal_connect(bin, "pad-added", G_CALLBACK(&GstSource::OnPadAdded), this);
  g_signal_connect(bin, "no-more-pads", G_CALLBACK(&GstSource::OnNoMorePads), this);
}

void GstSource::BuildInput() {
  switch (request_.kind) {
    case SourceRequest::Kind::kUri: {
      GstElement* bin = Add("uridecodebin");
      g_object_set(bin, "uri", request_.location.c_str(), nullptr);
      g_signal_connect(bin, "source-setup", G_CALLBACK(&GstSource::OnSourceSetup), this);
      WatchDecodebin(bin);
      return;
    }
    case SourceRequest::Kind::kCamera: {
      GstElement* camera = Add("v4l2src");
      g_object_set(camera, "device", request_.location.c_str(), nullptr);
      GstElement* bin = Add("decodebin");  // many cameras send JPEG or H.264
      gst_element_link(camera, bin);
      WatchDecodebin(bin);
      return;
    }
    case SourceRequest::Kind::kTest: {
      GstElement* test = Add("videotestsrc");
      const auto* pattern =
          G_PARAM_SPEC_ENUM(g_object_class_find_property(G_OBJECT_GET_CLASS(test), "pattern"));
      const GEnumValue* value =
          g_enum_get_value_by_nick(pattern->enum_class, request_.location.c_str());
      if (!value) {
        std::string known;
        for (guint i = 0; i < pattern->enum_class->n_values; ++i) {
          known += std::string(i ? ", " : "") + pattern->enum_class->values[i].value_nick;
        }
        Throw("no test pattern '" + request_.location + "'; there are " + known);
      }
      const bool live = request_.test_seconds == 0;
      g_object_set(test, "pattern", value->value, "is-live", live, nullptr);
      if (!live) {
        const auto frames = static_cast<int>(std::lround(request_.test_seconds * kTestFps));
        g_object_set(test, "num-buffers", std::max(frames, 1), nullptr);
        info_.duration = MediaTime::FromSeconds(request_.test_seconds);
      }
      const CapsPtr caps(gst_caps_new_simple("video/x-raw", "width", G_TYPE_INT, kTestWidth,
                                             "height", G_TYPE_INT, kTestHeight, "framerate",
                                             GST_TYPE_FRACTION, kTestFps, 1, nullptr));
      gst_element_link_filtered(test, flip_, caps.get());
      info_.codec = "test pattern";
      state_.video_linked = true;
      return;
    }
  }
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
  if (info_.live && (options_.begin || options_.end)) {
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
    const SteadyTime deadline = since + (failed ? kAfterError : options_.stall_timeout);
    const SteadyTime now = steady_clock::now();
    if (at_most != milliseconds::max() && now >= entered + at_most) return true;
    if (now >= deadline) {
      if (failed) return false;
      char seconds[32];
      std::snprintf(seconds, sizeof seconds, "%.3g", options_.stall_timeout.count() * 1e-3);
      lock.unlock();
      Throw("nothing arrived for " + std::string(seconds) +
            " s; check that the source is up, or raise the stall timeout");
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

void GstSource::WaitForFormat() {
  const SteadyTime asked = steady_clock::now();
  std::string gave_up;
  for (;;) {
    const uint64_t seen = Events();
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
      const std::lock_guard lock(state_.mutex);
      if (!state_.missing.empty()) Throw(state_.missing);
      if (!state_.error.empty()) Throw(state_.error);
      if (!gave_up.empty()) Throw(gave_up);
      Throw("the stream holds no picture; expected at least one video frame");
    }
  }
}

void GstSource::ReadFormat(GstSample* sample) {
  GstVideoInfo video;
  gst_video_info_from_caps(&video, gst_sample_get_caps(sample));
  info_.width = GST_VIDEO_INFO_WIDTH(&video);
  info_.height = GST_VIDEO_INFO_HEIGHT(&video);
  if (info_.live || info_.duration) return;

  gint64 duration = 0;
  if (gst_element_query_duration(pipeline_, GST_FORMAT_TIME, &duration) && duration > 0) {
    info_.duration = MediaTime::FromNanoseconds(duration);
  }
  // A network camera behind plain HTTP: no length, no way back.
  if (!info_.duration && request_.location.starts_with("http")) {
    GstQuery* query = gst_query_new_seeking(GST_FORMAT_TIME);
    gboolean seekable = FALSE;
    if (gst_element_query(pipeline_, query)) {
      gst_query_parse_seeking(query, nullptr, &seekable, nullptr, nullptr);
    }
    gst_query_unref(query);
    info_.live = !seekable;
  }
}

// Only an acceleration: what comes before `begin` is passed over wherever it cannot be sought.
void GstSource::SeekToBegin() {
  if (!options_.begin || *options_.begin <= MediaTime()) return;
  if (info_.duration && *options_.begin >= *info_.duration) {
    Throw("begin is " + options_.begin->ToString() + ", but the stream ends at " +
          info_.duration->ToString());
  }
  // Decoders cut the frame under the target short and move its time there; a little earlier, so
  // that it is not taken for one that begins in range.
  const gint64 target =
      origin_ns_ + std::max<int64_t>(options_.begin->nanoseconds() - GST_MSECOND, 0);
  gst_element_seek(pipeline_, 1.0, GST_FORMAT_TIME,
                   static_cast<GstSeekFlags>(GST_SEEK_FLAG_FLUSH | GST_SEEK_FLAG_ACCURATE),
                   GST_SEEK_TYPE_SET, target, GST_SEEK_TYPE_NONE, -1);
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

FramePtr GstSource::ToFrame(GstSample* sample) {
  GstBuffer* buffer = gst_sample_get_buffer(sample);
  const MediaTime time = StreamTime(*gst_sample_get_segment(sample), GST_BUFFER_PTS(buffer));
  // The picture that a paused pipeline waits with is let through whatever the sampler says.
  if (options_.begin && time < *options_.begin) return nullptr;

  GstVideoInfo video;
  GstVideoFrame mapped;
  if (!gst_video_info_from_caps(&video, gst_sample_get_caps(sample)) ||
      !gst_video_frame_map(&mapped, &video, buffer, GST_MAP_READ)) {
    throw Error("[source] '" + request_.label + "': a picture cannot be read from memory");
  }
  auto frame = std::make_shared<Frame>();
  frame->width = GST_VIDEO_FRAME_WIDTH(&mapped);
  frame->height = GST_VIDEO_FRAME_HEIGHT(&mapped);
  const size_t row_bytes = size_t{3} * frame->width;
  frame->rgb.reserve(row_bytes * frame->height);
  const auto* row = static_cast<const uint8_t*>(GST_VIDEO_FRAME_PLANE_DATA(&mapped, 0));
  for (int y = 0; y < frame->height; ++y, row += GST_VIDEO_FRAME_PLANE_STRIDE(&mapped, 0)) {
    frame->rgb.insert(frame->rgb.end(), row, row + row_bytes);
  }
  gst_video_frame_unmap(&mapped);
  frame->time = time;
  frame->index = delivered_++;
  return frame;
}

FramePtr GstSource::Finish() {
  ended_ = true;
  std::string refusal, error;
  bool past_end = false;
  {
    const std::lock_guard lock(state_.mutex);
    refusal = state_.refusal;
    error = state_.error;
    past_end = state_.past_end;
  }
  gst_element_set_state(pipeline_, GST_STATE_NULL);  // stops decoding what nobody will look at
  if (!refusal.empty()) Throw(refusal);
  if (past_end) return nullptr;

  const MediaTime newest = MediaTime::FromNanoseconds(newest_ns_);
  const std::string so_far = std::to_string(delivered_) + " frames";
  if (!error.empty()) {
    if (delivered_ == 0) Throw(error);
    if (info_.live) Throw("the stream broke after " + so_far + ": " + error);
    warning_ = "[source] '" + request_.label + "' is damaged and ended at " + newest.ToString() +
               " after " + so_far + ": " + error;
  } else if (!request_.cut_off.empty()) {
    warning_ = "[source] '" + request_.label + "' ended at " + newest.ToString() + " after " +
               so_far + ": " + request_.cut_off;
  } else if (info_.duration && !info_.live) {
    // Many containers end without complaint where their bytes end. Sound that outlasts the picture
    // a little is no damage.
    const double missing = (*info_.duration - newest).seconds();
    if (missing > std::max(1.0, 0.05 * info_.duration->seconds())) {
      warning_ = "[source] '" + request_.label + "' ended at " + newest.ToString() +
                 ", but promised to last until " + info_.duration->ToString() +
                 "; it may be cut off";
    }
  }
  return nullptr;
}

void GstSource::Cancel() {
  Notify([](State& s) { s.cancelled = true; });
}

// ---- On GStreamer's threads -----------------------------------------------------------------

GstBusSyncReply GstSource::OnMessage(GstBus*, GstMessage* message, gpointer data) {
  auto* self = static_cast<GstSource*>(data);
  if (GST_MESSAGE_TYPE(message) == GST_MESSAGE_ERROR) {
    const std::string line = Describe(message);
    // The first error is the cause; what follows are its echoes.
    self->Notify([&](State& s) {
      if (s.error.empty()) s.error = line;
    });
    Logger()->debug("'{}': {}", self->request_.label, line);
  } else if (GST_MESSAGE_TYPE(message) == GST_MESSAGE_WARNING) {
    Logger()->debug("'{}': {}", self->request_.label, Describe(message));
  } else if (gst_is_missing_plugin_message(message)) {
    const GChars what(gst_missing_plugin_message_get_description(message));
    self->Notify([&](State& s) {
      if (s.missing.empty()) s.missing = std::string("no plugin for ") + what.get();
    });
  }
  gst_message_unref(message);
  return GST_BUS_DROP;
}

// Only what may lead to pictures is taken apart further; sound and text are left as they are.
gboolean GstSource::OnAutoplugContinue(GstElement*, GstPad*, GstCaps* caps, gpointer data) {
  if (gst_caps_is_empty(caps) || gst_caps_is_any(caps)) return TRUE;
  auto* self = static_cast<GstSource*>(data);
  const GstStructure* format = gst_caps_get_structure(caps, 0);
  const std::string_view name = gst_structure_get_name(format);
  int width = 0, height = 0;
  if (gst_structure_get_int(format, "width", &width) &&
      gst_structure_get_int(format, "height", &height) && self->RefuseIfTooLarge(width, height)) {
    return FALSE;
  }
  if (name == "application/x-rtp") {
    const gchar* media = gst_structure_get_string(format, "media");
    return !media || std::string_view(media) == "video";
  }
  return !name.starts_with("audio/") && !name.starts_with("text/") &&
         !name.starts_with("subpicture/");
}

void GstSource::OnUnknownType(GstElement*, GstPad*, GstCaps* caps, gpointer data) {
  const std::string type = MediaType(caps), name = CodecName(caps);
  if (!type.starts_with("video/") && !type.starts_with("image/")) return;
  static_cast<GstSource*>(data)->Notify([&](State& s) {
    s.missing = "unsupported codec: no decoder for " + name + " (" + type +
                "); install the GStreamer plugin for it, for example gstreamer1.0-libav";
  });
}

void GstSource::OnPadAdded(GstElement*, GstPad* pad, gpointer data) {
  auto* self = static_cast<GstSource*>(data);
  const CapsPtr caps(gst_pad_query_caps(pad, nullptr));
  const std::string type = MediaType(caps.get());
  bool is_first_video = false;
  if (type == "video/x-raw") {
    self->Notify([&](State& s) { is_first_video = !std::exchange(s.video_linked, true); });
  } else if (!type.starts_with("video/") && !type.starts_with("image/")) {
    self->Notify([&](State& s) { s.other_streams.insert(type); });
  }
  if (is_first_video) {
    self->info_.codec = CodecBehind(pad);
    const PadPtr flip_sink(gst_element_get_static_pad(self->flip_, "sink"));
    if (gst_pad_link(pad, flip_sink.get()) != GST_PAD_LINK_OK) {
      self->Notify([](State& s) { s.refusal = "decoded pictures are in no format we can read"; });
    }
    return;
  }
  // Streams nobody reads run into a sink, so that demuxers never trip over them.
  GstElement* drain = gst_element_factory_make("fakesink", nullptr);
  g_object_set(drain, "sync", FALSE, "async", FALSE, "enable-last-sample", FALSE, nullptr);
  gst_bin_add(GST_BIN(self->pipeline_), drain);
  gst_element_sync_state_with_parent(drain);
  const PadPtr drain_pad(gst_element_get_static_pad(drain, "sink"));
  gst_pad_link(pad, drain_pad.get());
}

void GstSource::OnNoMorePads(GstElement*, gpointer data) {
  static_cast<GstSource*>(data)->Notify([](State& s) {
    if (s.video_linked || !s.refusal.empty()) return;
    if (!s.missing.empty()) {
      s.refusal = s.missing;
      return;
    }
    std::string found;
    for (const std::string& type : s.other_streams) found += (found.empty() ? "" : ", ") + type;
    s.refusal = "no video stream; found " + (found.empty() ? "nothing" : found);
  });
}

void GstSource::OnSourceSetup(GstElement*, GstElement* source, gpointer) {
  GObjectClass* type = G_OBJECT_GET_CLASS(source);
  // rtspsrc holds back two seconds by default; that is two seconds late for a live answer.
  if (std::string_view(G_OBJECT_CLASS_NAME(type)) == "GstRTSPSrc") {
    g_object_set(source, "latency", 200u, nullptr);
  }
}

void GstSource::OnElementAdded(GstBin*, GstBin*, GstElement* element, gpointer data) {
  auto* self = static_cast<GstSource*>(data);
  // A camera's picture stream would otherwise be held back until two megabytes of it arrived, in
  // case another stream follows.
  if (FactoryName(element) == "multipartdemux") {
    g_object_set(element, "single-stream", TRUE, nullptr);
  }
  const gchar* klass = gst_element_get_metadata(element, GST_ELEMENT_METADATA_KLASS);
  const std::string_view role = klass ? klass : "";
  if (role.find("Demuxer") != role.npos || role.find("Parser") != role.npos) {
    const std::lock_guard lock(self->state_.mutex);
    self->state_.demuxers.emplace_back(GST_ELEMENT(gst_object_ref(element)));
  } else if (role.find("Decoder/Video") != role.npos) {
    const PadPtr pad(gst_element_get_static_pad(element, "sink"));
    if (!pad) return;
    gst_pad_add_probe(pad.get(), GST_PAD_PROBE_TYPE_BUFFER, &GstSource::OnDecoderInput, self,
                      nullptr);
  }
}

GstPadProbeReturn GstSource::OnDecoderInput(GstPad*, GstPadProbeInfo*, gpointer data) {
  State& state = static_cast<GstSource*>(data)->state_;
  const std::lock_guard lock(state.mutex);
  state.last_data = steady_clock::now();
  return GST_PAD_PROBE_OK;
}

bool GstSource::RefuseIfTooLarge(int width, int height) {
  if (std::max(width, height) <= options_.max_side_pixels) return false;
  Notify([&](State& s) {
    s.refusal = "pictures are " + std::to_string(width) + "x" + std::to_string(height) +
                ", the longest side allowed is " + std::to_string(options_.max_side_pixels);
  });
  return true;
}

MediaTime GstSource::StreamTime(const GstSegment& segment, GstClockTime pts) const {
  guint64 position = 0;
  const int sign = gst_segment_to_stream_time_full(&segment, GST_FORMAT_TIME, pts, &position);
  const int64_t origin = origin_ns_ == kNoOrigin ? 0 : origin_ns_.load();
  return MediaTime::FromNanoseconds((sign < 0 ? -1 : 1) * static_cast<int64_t>(position) - origin);
}

GstPadProbeReturn GstSource::OnDecoded(GstPad*, GstPadProbeInfo* info, gpointer data) {
  auto* self = static_cast<GstSource*>(data);
  if (GST_PAD_PROBE_INFO_TYPE(info) & GST_PAD_PROBE_TYPE_BUFFER) return self->OnPicture(info);
  GstEvent* event = GST_PAD_PROBE_INFO_EVENT(info);
  switch (GST_EVENT_TYPE(event)) {
    case GST_EVENT_SEGMENT:
      gst_event_copy_segment(event, &self->segment_);
      self->previous_pts_ = GST_CLOCK_TIME_NONE;
      break;
    case GST_EVENT_FLUSH_STOP:
      self->sampler_.Reset();
      self->Notify([](State& s) { s.past_end = false; });
      break;
    case GST_EVENT_CAPS: {
      GstCaps* caps = nullptr;
      gst_event_parse_caps(event, &caps);
      GstVideoInfo video;
      if (!gst_video_info_from_caps(&video, caps)) break;
      self->RefuseIfTooLarge(video.width, video.height);
      self->frame_duration_ = video.fps_n > 0
                                  ? gst_util_uint64_scale(GST_SECOND, video.fps_d, video.fps_n)
                                  : GST_CLOCK_TIME_NONE;
      break;
    }
    default:
      break;
  }
  return GST_PAD_PROBE_OK;
}

// Elementary streams and network cameras may carry no time stamps. One picture then follows the
// other at the stream's frame rate; if that is not known either, a camera's pictures are taken as
// they arrive, and those of a recording as 25 a second.
GstClockTime GstSource::MissingPts(SteadyTime now) const {
  if (!GST_CLOCK_TIME_IS_VALID(previous_pts_)) return segment_.start;
  if (GST_CLOCK_TIME_IS_VALID(frame_duration_)) return previous_pts_ + frame_duration_;
  const bool recording = request_.location.starts_with("file:");
  const std::chrono::nanoseconds spacing = recording ? milliseconds(40) : now - previous_arrival_;
  return previous_pts_ + static_cast<GstClockTime>(spacing.count());
}

GstPadProbeReturn GstSource::OnPicture(GstPadProbeInfo* info) {
  GstBuffer* buffer = GST_PAD_PROBE_INFO_BUFFER(info);
  const SteadyTime now = steady_clock::now();
  if (!GST_BUFFER_PTS_IS_VALID(buffer)) {
    buffer = gst_buffer_make_writable(buffer);
    GST_BUFFER_PTS(buffer) = MissingPts(now);
    GST_PAD_PROBE_INFO_DATA(info) = buffer;
  }
  const GstClockTime pts = GST_BUFFER_PTS(buffer);
  previous_pts_ = pts;
  previous_arrival_ = now;

  const bool first = origin_ns_ == kNoOrigin;
  if (first) origin_ns_ = StreamTime(segment_, pts).nanoseconds();
  const MediaTime time = StreamTime(segment_, pts);
  newest_ns_ = time.nanoseconds();
  FrameSampler::Verdict verdict = sampler_.Decide(time);
  bool refused = false;
  {
    const std::lock_guard lock(state_.mutex);
    state_.last_picture = now;
    refused = !state_.refusal.empty();
  }
  if (refused) verdict = FrameSampler::Verdict::kEnd;
  switch (verdict) {
    case FrameSampler::Verdict::kTake:
      return GST_PAD_PROBE_OK;
    case FrameSampler::Verdict::kSkip:
      // A paused pipeline needs a picture to show its format.
      return first ? GST_PAD_PROBE_OK : GST_PAD_PROBE_DROP;
    case FrameSampler::Verdict::kEnd:
      break;
  }
  // Telling the decoder "end" lets it stop, instead of decoding the rest of the stream.
  Notify([](State& s) { s.past_end = true; });
  gst_buffer_unref(buffer);
  GST_PAD_PROBE_INFO_FLOW_RETURN(info) = GST_FLOW_EOS;
  return GST_PAD_PROBE_HANDLED;
}

}  // namespace sluice
