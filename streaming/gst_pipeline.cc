// The part of a source that puts its pipeline together, also while it runs: elements, what
// decodebin asks and what it finds.
#include <gst/pbutils/pbutils.h>
#include <gst/video/video.h>

#include <algorithm>
#include <cmath>
#include <string_view>
#include <utility>

#include "runtime/error.h"
#include "streaming/gst_source.h"

namespace sluice {
namespace {

constexpr int kTestWidth = 640, kTestHeight = 480, kTestFps = 30;

const char* PackageOf(std::string_view factory) {
  if (factory == "v4l2src") return "gstreamer1.0-plugins-good";
  return "gstreamer1.0-plugins-base";
}

using FactoryListPtr = std::unique_ptr<GList, GDeleter<gst_plugin_feature_list_free>>;

bool IsDemuxer(GstElementFactory* factory) {
  return factory && gst_element_factory_list_is_type(factory, GST_ELEMENT_FACTORY_TYPE_DEMUXER);
}

bool AnyDemuxer(const GList* factories) {
  for (; factories; factories = factories->next) {
    if (IsDemuxer(GST_ELEMENT_FACTORY(factories->data))) return true;
  }
  return false;
}

bool IsDemuxerPad(GstPad* pad) {
  const PadPtr inner = InnermostPad(pad);
  const ElementPtr parent(inner ? gst_pad_get_parent_element(inner.get()) : nullptr);
  return parent && IsDemuxer(gst_element_get_factory(parent.get()));
}

}  // namespace

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
  convert_ = Add("videoconvert");
  GstElement* sink = Add("appsink");
  sink_ = GST_APP_SINK(sink);
  const CapsPtr rgb(gst_caps_new_simple("video/x-raw", "format", G_TYPE_STRING, "RGB", nullptr));
  g_object_set(sink, "caps", rgb.get(), "sync", FALSE, "max-buffers", 1u, "enable-last-sample",
               FALSE, nullptr);
  gst_element_link(convert_, sink);

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

  const PadPtr pad(gst_element_get_static_pad(convert_, "sink"));
  gst_pad_add_probe(
      pad.get(),
      static_cast<GstPadProbeType>(GST_PAD_PROBE_TYPE_BUFFER | GST_PAD_PROBE_TYPE_EVENT_DOWNSTREAM |
                                   GST_PAD_PROBE_TYPE_EVENT_FLUSH),
      &GstSource::OnDecoded, this, nullptr);
}

void GstSource::WatchDecodebin(GstElement* bin) {
  g_signal_connect(bin, "autoplug-continue", G_CALLBACK(&GstSource::OnAutoplugContinue), this);
  g_signal_connect(bin, "autoplug-factories", G_CALLBACK(&GstSource::OnAutoplugFactories), this);
  g_signal_connect(bin, "unknown-type", G_CALLBACK(&GstSource::OnUnknownType), this);
  g_signal_connect(bin, "pad-added", G_CALLBACK(&GstSource::OnPadAdded), this);
  g_signal_connect(bin, "no-more-pads", G_CALLBACK(&GstSource::OnNoMorePads), this);
}

void GstSource::BuildMovingPicture() {
  const GChars path(g_filename_from_uri(request_.location.c_str(), nullptr, nullptr));
  try {
    moving_ = OpenMovingPicture(request_.container.moving, path.get(), options_.max_side_pixels);
  } catch (const Error& error) {
    Throw(error.what());
  }
  GstElement* pictures = Add("appsrc");
  const CapsPtr caps(gst_caps_new_simple(
      "video/x-raw", "format", G_TYPE_STRING, "RGBA", "width", G_TYPE_INT, moving_->width(),
      "height", G_TYPE_INT, moving_->height(), "framerate", GST_TYPE_FRACTION, 0, 1, nullptr));
  g_object_set(pictures, "caps", caps.get(), "format", GST_FORMAT_TIME, nullptr);
  GstAppSrcCallbacks callbacks = {};
  callbacks.need_data = &GstSource::OnPictureWanted;
  gst_app_src_set_callbacks(GST_APP_SRC(pictures), &callbacks, this, nullptr);
  gst_element_link(pictures, convert_);
  info_.codec = request_.container.moving == MovingFormat::kPng ? "APNG" : "WebP";
  state_.video_linked = true;
}

void GstSource::OnPictureWanted(GstAppSrc* pictures, guint, gpointer data) {
  auto* self = static_cast<GstSource*>(data);
  try {
    const MovingPicture::Picture picture = self->moving_->Next();
    if (!picture.rgba) {
      gst_app_src_end_of_stream(pictures);
      return;
    }
    GstBuffer* buffer = gst_buffer_new_memdup(
        picture.rgba, size_t{4} * self->moving_->width() * self->moving_->height());
    GST_BUFFER_PTS(buffer) = static_cast<GstClockTime>(picture.begin.count());
    GST_BUFFER_DURATION(buffer) =
        static_cast<GstClockTime>(std::max<int64_t>((picture.end - picture.begin).count(), 0));
    gst_app_src_push_buffer(pictures, buffer);
  } catch (const Error& error) {
    self->Notify([&](State& s) {
      if (s.error.empty()) s.error = error.what();
    });
    gst_app_src_end_of_stream(pictures);
  }
}

void GstSource::BuildInput() {
  switch (request_.kind) {
    case SourceRequest::Kind::kUri: {
      if (request_.container.moving != MovingFormat::kNone) return BuildMovingPicture();
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
      gst_element_link_filtered(test, convert_, caps.get());
      info_.codec = "test pattern";
      state_.video_linked = true;
      return;
    }
  }
}

// ---- On GStreamer's threads -----------------------------------------------------------------

// Sound and text outside containers, as from RTSP, are left as they are.
gboolean GstSource::OnAutoplugContinue(GstElement*, GstPad* pad, GstCaps* caps, gpointer data) {
  if (gst_caps_is_empty(caps) || gst_caps_is_any(caps)) return TRUE;
  auto* self = static_cast<GstSource*>(data);
  const GstStructure* format = gst_caps_get_structure(caps, 0);
  int width = 0, height = 0;
  if (gst_structure_get_int(format, "width", &width) &&
      gst_structure_get_int(format, "height", &height) && self->RefuseIfTooLarge(width, height)) {
    return FALSE;
  }
  if (gst_structure_has_name(format, "application/x-rtp")) {
    const gchar* media = gst_structure_get_string(format, "media");
    return !media || std::string_view(media) == "video";
  }
  const std::string type = MediaType(caps);
  return IsDemuxerPad(pad) || !(type.starts_with("audio/") || type.starts_with("text/") ||
                                type.starts_with("subpicture/"));
}

// Of a container only the stream that is shown is taken apart further. The others get no queue and
// no thread, however many there are, and nobody waits for them.
GValueArray* GstSource::OnAutoplugFactories(GstElement*, GstPad* pad, GstCaps* caps,
                                            gpointer data) {
  G_GNUC_BEGIN_IGNORE_DEPRECATIONS  // the signal's type is older than what replaced it
      const FactoryListPtr all(gst_element_factory_list_get_elements(
          GST_ELEMENT_FACTORY_TYPE_DECODABLE, GST_RANK_MARGINAL));
  const FactoryListPtr able(
      gst_element_factory_list_filter(all.get(), caps, GST_PAD_SINK, gst_caps_is_fixed(caps)));
  const bool wanted = static_cast<GstSource*>(data)->IsWanted(pad, caps, able.get());
  // A decoder alone would show only the first picture of a moving GIF.
  const bool gif = MediaType(caps) == "image/gif" && !IsDemuxerPad(pad) && AnyDemuxer(able.get());
  if (gif) static_cast<GstSource*>(data)->is_gif_ = true;
  GValueArray* plugged = g_value_array_new(0);
  const FactoryListPtr sorted(
      g_list_sort(gst_plugin_feature_list_copy(wanted ? able.get() : nullptr),
                  gst_plugin_feature_rank_compare_func));
  for (const GList* at = sorted.get(); at; at = at->next) {
    if (gif && !IsDemuxer(GST_ELEMENT_FACTORY(at->data))) continue;
    GValue value = G_VALUE_INIT;
    g_value_init(&value, G_TYPE_OBJECT);
    g_value_set_object(&value, at->data);
    g_value_array_append(plugged, &value);
    g_value_unset(&value);
  }
  G_GNUC_END_IGNORE_DEPRECATIONS
  return plugged;
}

// Whether what comes out of `pad` is taken apart further by one of `able`. Of several video streams
// the one that the container marks as its default, else the first.
bool GstSource::IsWanted(GstPad* pad, GstCaps* caps, const GList* able) {
  const PadPtr inner = InnermostPad(pad);
  if (!IsDemuxerPad(pad)) return true;
  const ElementPtr parent(gst_pad_get_parent_element(inner.get()));
  const std::string type = MediaType(caps);
  if (AnyDemuxer(able)) return true;  // one container inside another
  if (!type.starts_with("video/") && !type.starts_with("image/")) {
    Notify([&](State& s) { s.other_streams.insert(type); });
    return false;
  }
  if (!able) return true;  // named as a codec without a decoder
  const std::string id = StreamId(inner.get());
  GstStreamFlags flags = GST_STREAM_FLAG_NONE;
  const EventPtr start(gst_pad_get_sticky_event(inner.get(), GST_EVENT_STREAM_START, 0));
  if (start) gst_event_parse_stream_flags(start.get(), &flags);
  const int rank = flags & GST_STREAM_FLAG_SELECT ? 2 : flags & GST_STREAM_FLAG_UNSELECT ? 0 : 1;
  const std::lock_guard lock(state_.mutex);
  if (state_.choosing == parent.get()) {
    if (rank <= state_.chosen_rank) return false;
    state_.chosen.back() = id;
  } else {
    state_.choosing = parent.get();
    state_.chosen.push_back(id);
  }
  state_.chosen_rank = rank;
  return true;
}

// A demuxer that finds more streams later has come to another part of a joined recording.
void GstSource::OnDemuxerNoMorePads(GstElement*, gpointer data) {
  State& state = static_cast<GstSource*>(data)->state_;
  const std::lock_guard lock(state.mutex);
  state.choosing = nullptr;
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
  bool shown = false, first = false;
  if (type == "video/x-raw") {
    const PadPtr inner = InnermostPad(pad);
    const std::string id = inner ? StreamId(inner.get()) : "";
    self->Notify([&](State& s) {
      first = !s.video_linked;
      shown = first || s.IsChosen(id);
      s.video_linked = true;
    });
  } else if (!type.starts_with("video/") && !type.starts_with("image/")) {
    self->Notify([&](State& s) { s.other_streams.insert(type); });
  }
  if (shown) {
    if (first) self->info_.codec = CodecBehind(pad);
    const PadPtr sink(gst_element_get_static_pad(self->convert_, "sink"));
    // Where recordings are joined, the next part's stream takes the place of the one that ended.
    const PadPtr before(gst_pad_get_peer(sink.get()));
    if (before && GST_PAD_IS_EOS(before.get())) gst_pad_unlink(before.get(), sink.get());
    if (gst_pad_link(pad, sink.get()) == GST_PAD_LINK_OK) return;
    if (first) {
      self->Notify([](State& s) { s.refusal = "decoded pictures are in no format we can read"; });
      return;
    }
  }
  // Streams nobody reads run into a sink, so that demuxers never trip over them.
  GstElement* drain = gst_element_factory_make("fakesink", nullptr);
  g_object_set(drain, "sync", FALSE, "async", FALSE, "enable-last-sample", FALSE, nullptr);
  gst_bin_add(GST_BIN(self->pipeline_), drain);
  gst_element_sync_state_with_parent(drain);
  const PadPtr drain_pad(gst_element_get_static_pad(drain, "sink"));
  gst_pad_link(pad, drain_pad.get());
}

bool GstSource::State::IsChosen(const std::string& id) const {
  return chosen.empty() || std::find(chosen.begin(), chosen.end(), id) != chosen.end();
}

std::string GstSource::State::NoVideo() const {
  if (!missing.empty()) return missing;
  std::string found;
  for (const std::string& type : other_streams) found += (found.empty() ? "" : ", ") + type;
  return "no video stream; found " + (found.empty() ? "nothing" : found);
}

void GstSource::OnNoMorePads(GstElement*, gpointer data) {
  static_cast<GstSource*>(data)->Notify([](State& s) {
    if (!s.video_linked && s.refusal.empty()) s.refusal = s.NoVideo();
  });
}

void GstSource::OnSourceSetup(GstElement*, GstElement* source, gpointer data) {
  const bool one_place = static_cast<GstSource*>(data)->request_.one_place;
  GObjectClass* type = G_OBJECT_GET_CLASS(source);
  if (one_place && g_object_class_find_property(type, "automatic-redirect")) {
    g_object_set(source, "automatic-redirect", FALSE, nullptr);
  }
  // rtspsrc holds back two seconds by default; that is two seconds late for a live answer.
  if (std::string_view(G_OBJECT_CLASS_NAME(type)) == "GstRTSPSrc") {
    g_object_set(source, "latency", 200u, nullptr);
    if (one_place) gst_util_set_object_arg(G_OBJECT(source), "protocols", "tcp");
  }
}

void GstSource::OnPlaylistPad(GstElement*, GstPad* pad, gpointer self) {
  if (GST_PAD_DIRECTION(pad) != GST_PAD_SRC) return;
  gst_pad_add_probe(pad, GST_PAD_PROBE_TYPE_BUFFER, &GstSource::OnPlaylistData, self, nullptr);
}

// The first buffer of each segment carries the segment's time, the others carry none.
GstPadProbeReturn GstSource::OnPlaylistData(GstPad*, GstPadProbeInfo* info, gpointer data) {
  // A playlist that lies must not keep a dead stream for ever.
  constexpr GstClockTime kLongest = 60 * GST_SECOND;
  const GstClockTime pts = GST_BUFFER_PTS(GST_PAD_PROBE_INFO_BUFFER(info));
  State& state = static_cast<GstSource*>(data)->state_;
  const std::lock_guard lock(state.mutex);
  state.last_data = std::chrono::steady_clock::now();
  if (!GST_CLOCK_TIME_IS_VALID(pts)) return GST_PAD_PROBE_OK;
  if (GST_CLOCK_TIME_IS_VALID(state.segment_pts) && pts > state.segment_pts) {
    const auto length = static_cast<int64_t>(std::min(pts - state.segment_pts, kLongest));
    state.longest_segment = std::max(state.longest_segment, std::chrono::nanoseconds(length));
  }
  state.segment_pts = pts;
  return GST_PAD_PROBE_OK;
}

void GstSource::WatchParser(GstElement* parser) {
  const PadPtr sink(gst_element_get_static_pad(parser, "sink"));
  const PadPtr src(gst_element_get_static_pad(parser, "src"));
  if (!sink || !src) return;
  auto* input = new ParserInput{.source = this};
  gst_pad_add_probe(sink.get(), GST_PAD_PROBE_TYPE_BUFFER, &GstSource::OnParserInput, input,
                    nullptr);
  gst_pad_add_probe(src.get(), GST_PAD_PROBE_TYPE_BUFFER, &GstSource::OnParserOutput, input,
                    nullptr);
  // Kept with the parser, which outlives its pads.
  g_object_set_data_full(G_OBJECT(parser), "sluice-input", input,
                         [](gpointer input) { delete static_cast<ParserInput*>(input); });
}

void GstSource::CountConcealed(GstElement* decoder) {
  auto* factory = GST_PLUGIN_FEATURE(gst_element_get_factory(decoder));
  const gchar* plugin = factory ? gst_plugin_feature_get_plugin_name(factory) : nullptr;
  if (!plugin || std::string_view(plugin) != "libav") return;
  const std::lock_guard lock(state_.mutex);
  if (!concealed_) concealed_.emplace();
}

void GstSource::OnElementAdded(GstBin*, GstBin*, GstElement* element, gpointer data) {
  auto* self = static_cast<GstSource*>(data);
  // A camera's picture stream would otherwise be held back until two megabytes of it arrived, in
  // case another stream follows.
  if (FactoryName(element) == "multipartdemux") {
    self->multipart_ = true;
    g_object_set(element, "single-stream", TRUE, nullptr);
  }
  if (FactoryName(element) == "qtdemux") {
    const PadPtr pad(gst_element_get_static_pad(element, "sink"));
    gst_pad_add_probe(pad.get(),
                      static_cast<GstPadProbeType>(GST_PAD_PROBE_TYPE_BUFFER |
                                                   GST_PAD_PROBE_TYPE_EVENT_DOWNSTREAM),
                      &GstSource::OnMp4Bytes, new Mp4Input{.source = self},
                      [](gpointer input) { delete static_cast<Mp4Input*>(input); });
  }
  const gchar* klass = gst_element_get_metadata(element, GST_ELEMENT_METADATA_KLASS);
  const std::string_view role = klass ? klass : "";
  if (IsDemuxer(gst_element_get_factory(element))) {
    g_signal_connect(element, "no-more-pads", G_CALLBACK(&GstSource::OnDemuxerNoMorePads), self);
  }
  if (role.find("Adaptive") != role.npos) {
    g_signal_connect(element, "pad-added", G_CALLBACK(&GstSource::OnPlaylistPad), self);
    self->Notify([](State& s) { s.in_segments = true; });
  }
  if (role.find("Demuxer") != role.npos || role.find("Parser") != role.npos) {
    const std::lock_guard lock(self->state_.mutex);
    self->state_.demuxers.emplace_back(GST_ELEMENT(gst_object_ref(element)));
    if (IsPictureParser(element)) self->WatchParser(element);
  } else if (role.find("Decoder/Video") != role.npos || role.find("Decoder/Image") != role.npos) {
    self->CountConcealed(element);
    const PadPtr pad(gst_element_get_static_pad(element, "sink"));
    if (!pad) return;
    auto* input = new DecoderInput;
    input->source = self;
    gst_pad_add_probe(pad.get(),
                      static_cast<GstPadProbeType>(GST_PAD_PROBE_TYPE_BUFFER |
                                                   GST_PAD_PROBE_TYPE_EVENT_DOWNSTREAM |
                                                   GST_PAD_PROBE_TYPE_EVENT_FLUSH),
                      &GstSource::OnDecoderInput, input,
                      [](gpointer input) { delete static_cast<DecoderInput*>(input); });
  }
}

}  // namespace sluice
