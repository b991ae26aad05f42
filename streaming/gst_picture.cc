// The part of a source that sees pictures: which are taken, at which times, and how one becomes a
// Frame.
#include <gst/tag/tag.h>
#include <gst/video/video.h>

#include <algorithm>
#include <array>
#include <string_view>
#include <utility>
#include <vector>

#include "runtime/error.h"
#include "streaming/gst_source.h"
#include "streaming/logging.h"

namespace sluice {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

namespace {

// Codecs whose pictures may need earlier ones. Of others a container's marks are not looked at.
constexpr std::array<std::string_view, 7> kDeltaCodecs = {
    "video/x-h264", "video/x-h265", "video/mpeg",  "video/x-vp8",
    "video/x-vp9",  "video/x-av1",  "video/x-h263"};

Orientation ToOrientation(GstVideoOrientationMethod method) {
  switch (method) {
    case GST_VIDEO_ORIENTATION_90R:
      return Orientation::kTurnClockwise;
    case GST_VIDEO_ORIENTATION_180:
      return Orientation::kUpsideDown;
    case GST_VIDEO_ORIENTATION_90L:
      return Orientation::kTurnAnticlockwise;
    case GST_VIDEO_ORIENTATION_HORIZ:
      return Orientation::kMirrored;
    case GST_VIDEO_ORIENTATION_VERT:
      return Orientation::kFlipped;
    case GST_VIDEO_ORIENTATION_UL_LR:
      return Orientation::kTransposed;
    case GST_VIDEO_ORIENTATION_UR_LL:
      return Orientation::kTransversed;
    default:
      return Orientation::kUpright;
  }
}

Orientation ExifOrientation(std::span<const uint8_t> exif) {
  GstVideoOrientationMethod method = GST_VIDEO_ORIENTATION_IDENTITY;
  if (exif.empty()) return Orientation::kUpright;
  GstBuffer* tiff = gst_buffer_new_memdup(exif.data(), exif.size());
  GstTagList* tags = gst_tag_list_from_exif_buffer_with_tiff_header(tiff);
  if (tags) {
    gst_video_orientation_from_tag(tags, &method);
    gst_tag_list_unref(tags);
  }
  gst_buffer_unref(tiff);
  return ToOrientation(method);
}

// The size of the length before each NAL unit, from the stream's configuration; 0: start codes.
int NalLengthBytes(const GstCaps* caps) {
  const GstStructure* format = gst_caps_get_structure(caps, 0);
  const GValue* value = gst_structure_get_value(format, "codec_data");
  const gchar* layout = gst_structure_get_string(format, "stream-format");
  if (!value || !layout || std::string_view(layout) == "byte-stream") return 0;
  const gsize at = gst_structure_has_name(format, "video/x-h264") ? 4 : 21;
  guint8 byte = 3;
  gst_buffer_extract(gst_value_get_buffer(value), at, &byte, 1);
  return (byte & 3) + 1;
}

// As OnPicture wrote it.
Orientation OrientationOf(GstBuffer* buffer) {
  return static_cast<Orientation>(GST_BUFFER_OFFSET_END(buffer) & 0xff);
}

// How a picture's light and colours are mapped, in a byte: 0 where they stay, else the transfer
// function and, in kWideColours, whether the primaries are BT.2020's.
constexpr guint8 kMapped = 0x80, kWideColours = 0x40;

guint8 MappingOf(const GstVideoInfo& video) {
  const GstVideoColorimetry& colours = video.colorimetry;
  const Transfer transfer = colours.transfer == GST_VIDEO_TRANSFER_SMPTE2084 ? Transfer::kPq
                            : colours.transfer == GST_VIDEO_TRANSFER_ARIB_STD_B67
                                ? Transfer::kHlg
                                : Transfer::kOrdinary;
  const bool wide = colours.primaries == GST_VIDEO_COLOR_PRIMARIES_BT2020;
  if (transfer == Transfer::kOrdinary && !wide) return 0;
  return static_cast<guint8>(kMapped | (wide ? kWideColours : 0) | static_cast<guint8>(transfer));
}

bool IsLying(Orientation how) { return how >= Orientation::kTransposed; }

}  // namespace

void GstSource::ReadFormat(GstSample* sample) {
  GstVideoInfo video;
  gst_video_info_from_caps(&video, gst_sample_get_caps(sample));
  info_.width = GST_VIDEO_INFO_WIDTH(&video);
  info_.height = GST_VIDEO_INFO_HEIGHT(&video);
  if (IsLying(OrientationOf(gst_sample_get_buffer(sample)))) std::swap(info_.width, info_.height);
  info_.endless = info_.live;
  if (info_.live || info_.duration) return;

  gint64 duration = 0;
  if (gst_element_query_duration(pipeline_, GST_FORMAT_TIME, &duration) && duration > 0) {
    info_.duration = MediaTime::FromNanoseconds(duration);
  }
  info_.live = !info_.duration && IsNetworkCamera();
  const std::lock_guard lock(state_.mutex);
  info_.endless = info_.live || (state_.in_segments && !info_.duration);
}

bool GstSource::Seek(MediaTime target) {
  Notify([](State& s) { s.first_after_seek.reset(); });
  sought_ = true;
  return gst_element_seek(pipeline_, 1.0, GST_FORMAT_TIME,
                          static_cast<GstSeekFlags>(GST_SEEK_FLAG_FLUSH | GST_SEEK_FLAG_KEY_UNIT |
                                                    GST_SEEK_FLAG_SNAP_BEFORE),
                          GST_SEEK_TYPE_SET, origin_ns_ + target.nanoseconds(), GST_SEEK_TYPE_NONE,
                          -1);
}

// The time of the first picture after a seek; none when the stream ends or breaks before one.
std::optional<MediaTime> GstSource::FirstAfterSeek() {
  const SteadyTime asked = steady_clock::now();
  for (;;) {
    const uint64_t seen = Events();
    const bool ended = gst_app_sink_is_eos(sink_);
    {
      const std::lock_guard lock(state_.mutex);
      if (state_.first_after_seek) return state_.first_after_seek;
      if (ended || state_.past_end || state_.cancelled) return std::nullopt;
    }
    if (!WaitForChange(seen, asked, milliseconds(100))) return std::nullopt;
  }
}

// Only an acceleration: what comes before `begin` is passed over wherever it cannot be sought. A
// container's duration and its way from times to bytes may be guesses, so the first picture that
// comes decides whether a seek went far enough back; the last resort is the stream's beginning.
void GstSource::SeekToBegin() {
  if (!options_.begin || *options_.begin <= MediaTime()) return;
  const MediaTime begin = *options_.begin;
  // Where a seek does not land on a key frame, decoders cut the frame under the target short and
  // move its time there; a little earlier, so that it is not taken for one that begins in range.
  const MediaTime near = (info_.duration ? std::min(begin, *info_.duration) : begin) -
                         MediaTime::FromNanoseconds(GST_MSECOND);
  for (const double back_seconds : {0.0, 2.0, 10.0, 60.0}) {
    const MediaTime target = std::max(near - MediaTime::FromSeconds(back_seconds), MediaTime());
    if (target == MediaTime()) break;
    if (!Seek(target)) {
      if (back_seconds == 0) sought_ = false;  // nothing happened
      if (back_seconds == 0) return;
      break;
    }
    const std::optional<MediaTime> first = FirstAfterSeek();
    if (first && *first <= begin) {
      withheld_ = 0;  // between two key frames, where no seek can begin
      return;
    }
  }
  if (sought_) Seek(MediaTime());
}

FramePtr GstSource::ToFrame(GstSample* sample) {
  GstBuffer* buffer = gst_sample_get_buffer(sample);
  const auto time = MediaTime::FromNanoseconds(static_cast<int64_t>(GST_BUFFER_OFFSET(buffer)));
  // The picture that a paused pipeline waits with is let through whatever the sampler says.
  if (options_.begin && time < *options_.begin) return nullptr;

  GstVideoInfo video;
  GstVideoFrame mapped;
  if (!gst_video_info_from_caps(&video, gst_sample_get_caps(sample)) ||
      !gst_video_frame_map(&mapped, &video, buffer, GST_MAP_READ)) {
    throw Error("[source] '" + request_.label + "': a picture cannot be read from memory");
  }
  auto frame = std::make_shared<Frame>();
  const int width = GST_VIDEO_FRAME_WIDTH(&mapped), height = GST_VIDEO_FRAME_HEIGHT(&mapped);
  const auto* pixels = static_cast<const uint8_t*>(GST_VIDEO_FRAME_PLANE_DATA(&mapped, 0));
  auto row_bytes = static_cast<size_t>(GST_VIDEO_FRAME_PLANE_STRIDE(&mapped, 0));
  std::vector<uint8_t> ordinary;
  if (GST_VIDEO_FRAME_FORMAT(&mapped) == GST_VIDEO_FORMAT_ARGB64) {
    const auto mapping = static_cast<guint8>(GST_BUFFER_OFFSET_END(buffer) >> 8);
    const auto transfer = static_cast<Transfer>(mapping & ~(kMapped | kWideColours));
    const bool wide = mapping & kWideColours;
    if (!tone_map_ || tone_map_->transfer() != transfer || tone_map_->bt2020_primaries() != wide) {
      tone_map_.emplace(transfer, wide);
    }
    ordinary.resize(size_t{3} * width * height);
    for (int y = 0; y < height; ++y) {
      tone_map_->Convert(reinterpret_cast<const uint16_t*>(pixels + row_bytes * y),
                         static_cast<size_t>(width), &ordinary[size_t{3} * width * y]);
    }
    pixels = ordinary.data();
    row_bytes = size_t{3} * width;
  }
  CopyUpright(pixels, row_bytes, width, height, OrientationOf(buffer), *frame);
  gst_video_frame_unmap(&mapped);
  frame->time = time;
  frame->index = delivered_++;
  return frame;
}

// ---- On GStreamer's threads -----------------------------------------------------------------

// What a parser drops is a sign of life.
GstPadProbeReturn GstSource::OnParserInput(GstPad*, GstPadProbeInfo* info, gpointer data) {
  auto* input = static_cast<ParserInput*>(data);
  if (input->passes) return GST_PAD_PROBE_REMOVE;
  const GstClockTime pts = GST_BUFFER_PTS(GST_PAD_PROBE_INFO_BUFFER(info));
  if (!GST_CLOCK_TIME_IS_VALID(input->first)) input->first = pts;
  const std::lock_guard lock(input->source->state_.mutex);
  input->source->state_.last_picture = steady_clock::now();
  return GST_PAD_PROBE_OK;
}

GstPadProbeReturn GstSource::OnParserOutput(GstPad*, GstPadProbeInfo* info, gpointer data) {
  auto* input = static_cast<ParserInput*>(data);
  input->passes = true;
  const GstClockTime pts = GST_BUFFER_PTS(GST_PAD_PROBE_INFO_BUFFER(info));
  if (GST_CLOCK_TIME_IS_VALID(pts) && GST_CLOCK_TIME_IS_VALID(input->first) && pts > input->first) {
    input->source->unseen_ns_ = static_cast<int64_t>(pts - input->first);
  }
  return GST_PAD_PROBE_REMOVE;
}

GstPadProbeReturn GstSource::OnMp4Bytes(GstPad*, GstPadProbeInfo* info, gpointer data) {
  auto* input = static_cast<Mp4Input*>(data);
  if (!(GST_PAD_PROBE_INFO_TYPE(info) & GST_PAD_PROBE_TYPE_BUFFER)) {
    GstEvent* event = GST_PAD_PROBE_INFO_EVENT(info);
    if (GST_EVENT_TYPE(event) != GST_EVENT_SEGMENT) return GST_PAD_PROBE_OK;
    const GstSegment* segment = nullptr;
    gst_event_parse_segment(event, &segment);
    input->at = segment->format == GST_FORMAT_BYTES ? segment->start : 0;
    return GST_PAD_PROBE_OK;
  }
  GstBuffer* buffer = GST_PAD_PROBE_INFO_BUFFER(info);
  if (GST_PAD_PROBE_INFO_TYPE(info) & GST_PAD_PROBE_TYPE_PULL) {
    input->at = GST_PAD_PROBE_INFO_OFFSET(info);
  }
  GstMapInfo map;
  if (!gst_buffer_map(buffer, &map, GST_MAP_READ)) return GST_PAD_PROBE_OK;
  input->finder.Read(input->at, {reinterpret_cast<const char*>(map.data), map.size});
  input->at += map.size;
  gst_buffer_unmap(buffer, &map);
  if (input->finder.full_range()) input->source->full_range_ = true;
  return GST_PAD_PROBE_OK;
}

GstPadProbeReturn GstSource::OnDecoderInput(GstPad* pad, GstPadProbeInfo* info, gpointer data) {
  auto* input = static_cast<DecoderInput*>(data);
  GstSource* self = input->source;
  if (!(GST_PAD_PROBE_INFO_TYPE(info) & GST_PAD_PROBE_TYPE_BUFFER)) {
    GstEvent* event = GST_PAD_PROBE_INFO_EVENT(info);
    if (GST_EVENT_TYPE(event) == GST_EVENT_CAPS) {
      GstCaps* caps = nullptr;
      gst_event_parse_caps(event, &caps);
      const std::string type = MediaType(caps);
      input->has_delta_pictures =
          std::find(kDeltaCodecs.begin(), kDeltaCodecs.end(), type) != kDeltaCodecs.end();
      input->stream_id = StreamId(pad);
      input->counted = type == "video/x-h264" || type == "video/x-h265";
      input->jpeg = type == "image/jpeg";
      input->nal_codec.reset();
      if (type == "video/x-h264") input->nal_codec = NalCodec::kH264;
      if (type == "video/x-h265") input->nal_codec = NalCodec::kH265;
      input->nal_length_bytes = NalLengthBytes(caps);
      self->coded_orientation_ = Orientation::kUpright;
    } else if (GST_EVENT_TYPE(event) == GST_EVENT_SEGMENT) {
      gst_event_copy_segment(event, &input->segment);
    } else if (GST_EVENT_TYPE(event) == GST_EVENT_FLUSH_STOP) {
      input->started = false;
    }
    return GST_PAD_PROBE_OK;
  }
  {
    const std::lock_guard lock(self->state_.mutex);
    self->state_.last_data = steady_clock::now();
    if (!self->state_.IsChosen(input->stream_id)) return GST_PAD_PROBE_OK;
  }
  GstBuffer* buffer = GST_PAD_PROBE_INFO_BUFFER(info);
  const bool delta =
      input->has_delta_pictures && GST_BUFFER_FLAG_IS_SET(buffer, GST_BUFFER_FLAG_DELTA_UNIT);
  if (delta && !input->started) {
    // A decoder would show what it lacks in grey.
    self->NoteWithheld();
    return GST_PAD_PROBE_DROP;
  }
  input->started = true;
  self->ReadOrientation(*input, buffer);
  const GstClockTime pts = GST_BUFFER_PTS(buffer);
  const bool shown = !GST_CLOCK_TIME_IS_VALID(pts) || input->segment.format != GST_FORMAT_TIME ||
                     gst_segment_clip(&input->segment, GST_FORMAT_TIME, pts, pts, nullptr, nullptr);
  if (input->counted && shown) ++self->fed_;
  return GST_PAD_PROBE_OK;
}

// Where it changes within a stream, the few pictures that the decoder still holds turn with it.
void GstSource::ReadOrientation(const DecoderInput& input, GstBuffer* buffer) {
  if (!input.jpeg && !input.nal_codec) return;
  GstMapInfo map;
  if (!gst_buffer_map(buffer, &map, GST_MAP_READ)) return;
  const std::span<const uint8_t> picture(map.data, map.size);
  if (input.jpeg) {
    coded_orientation_ = ExifOrientation(JpegExif(picture));
  } else if (const auto said = SeiOrientation(picture, *input.nal_codec, input.nal_length_bytes)) {
    coded_orientation_ = *said;
  }
  gst_buffer_unmap(buffer, &map);
}

// A picture that cannot be shown, since those it needs came before the start. It is a sign of life.
void GstSource::NoteWithheld() {
  const bool first = withheld_++ == 0;
  {
    const std::lock_guard lock(state_.mutex);
    state_.last_picture = steady_clock::now();
  }
  if (first && !sought_) {
    Logger()->warn(
        "[source] '{}' does not begin with a key frame; nothing is shown until one comes",
        request_.label);
  }
}

std::vector<std::string> GstSource::LeftOut() const {
  std::vector<std::string> parts;
  if (unseen_ns_ > 0) {
    char seconds[32];
    std::snprintf(seconds, sizeof seconds, "%.3g", static_cast<double>(unseen_ns_) * 1e-9);
    parts.push_back("its first " + std::string(seconds) +
                    " s, before the first key frame, could not be shown");
  }
  if (withheld_ > 0) {
    parts.push_back(std::to_string(withheld_) +
                    " pictures before the first key frame could not be shown");
  }
  if (corrupted_ > 0) parts.push_back(std::to_string(corrupted_) + " pictures are damaged");
  if (concealed_ && concealed_->count() > 0) {
    parts.push_back(std::to_string(concealed_->count()) +
                    " pictures are damaged, the decoder made up what it could not read" +
                    (concealed_->shared() ? " (some may be another source's)" : ""));
  }
  return parts;
}

// Pictures whose light or colours are to be mapped leave the pipeline with 16 bits a colour.
void GstSource::ChooseOutput(const GstVideoInfo& video) {
  const guint8 mapping = MappingOf(video);
  if ((mapping != 0) != (mapping_ != 0)) {
    const CapsPtr caps(gst_caps_new_simple("video/x-raw", "format", G_TYPE_STRING,
                                           mapping != 0 ? "ARGB64" : "RGB", nullptr));
    gst_app_sink_set_caps(sink_, caps.get());
  }
  mapping_ = mapping;
}

// GStreamer's reader of MP4 passes over the range that a file's header states.
void GstSource::ReplaceRange(GstPadProbeInfo* info, GstVideoInfo video) const {
  if (!full_range_ || !GST_VIDEO_INFO_IS_YUV(&video)) return;
  if (video.colorimetry.range == GST_VIDEO_COLOR_RANGE_0_255) return;
  video.colorimetry.range = GST_VIDEO_COLOR_RANGE_0_255;
  const GChars colorimetry(gst_video_colorimetry_to_string(&video.colorimetry));
  GstCaps* before = nullptr;
  gst_event_parse_caps(GST_PAD_PROBE_INFO_EVENT(info), &before);
  const CapsPtr caps(gst_caps_copy(before));
  gst_caps_set_simple(caps.get(), "colorimetry", G_TYPE_STRING, colorimetry.get(), nullptr);
  GstEvent* event = gst_event_new_caps(caps.get());
  gst_event_set_seqnum(event, gst_event_get_seqnum(GST_PAD_PROBE_INFO_EVENT(info)));
  gst_event_unref(GST_PAD_PROBE_INFO_EVENT(info));
  GST_PAD_PROBE_INFO_DATA(info) = event;
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
  const int64_t origin = origin_ns_ == kNoOrigin ? joined_at_ns_ : origin_ns_ - joined_at_ns_;
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
    case GST_EVENT_GAP:
      // A paused sink would take it for its first picture and wait with nothing to show.
      return GST_PAD_PROBE_DROP;
    case GST_EVENT_STREAM_START:
      self->orientation_ = Orientation::kUpright;
      self->new_part_ = self->origin_ns_ != kNoOrigin;
      break;
    case GST_EVENT_TAG: {
      GstTagList* tags = nullptr;
      gst_event_parse_tag(event, &tags);
      GstVideoOrientationMethod method = GST_VIDEO_ORIENTATION_IDENTITY;
      if (gst_video_orientation_from_tag(tags, &method)) self->orientation_ = ToOrientation(method);
      break;
    }
    case GST_EVENT_FLUSH_STOP:
      self->sampler_.Reset();
      self->clean_ = self->new_part_ = false;
      self->withheld_ = self->corrupted_ = self->joined_at_ns_ = self->unseen_ns_ = 0;
      if (self->concealed_) self->concealed_->Reset();
      self->Notify([](State& s) {
        s.past_end = false;
        s.first_after_seek.reset();
      });
      break;
    case GST_EVENT_CAPS: {
      GstCaps* caps = nullptr;
      gst_event_parse_caps(event, &caps);
      GstVideoInfo video;
      if (!gst_video_info_from_caps(&video, caps)) break;
      self->RefuseIfTooLarge(video.width, video.height);
      self->ReplaceRange(info, video);
      self->ChooseOutput(video);
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
  const bool recording = request_.kind == SourceRequest::Kind::kUri && !IsNetworkCamera() &&
                         !request_.location.starts_with("rtsp");
  const std::chrono::nanoseconds spacing = recording ? milliseconds(40) : now - previous_arrival_;
  return previous_pts_ + static_cast<GstClockTime>(spacing.count());
}

GstPadProbeReturn GstSource::OnPicture(GstPadProbeInfo* info) {
  GstBuffer* buffer = GST_PAD_PROBE_INFO_BUFFER(info);
  const SteadyTime now = steady_clock::now();
  ++decoded_;
  if (GST_BUFFER_FLAG_IS_SET(buffer, GST_BUFFER_FLAG_CORRUPTED)) {
    if (!clean_) {  // it needs pictures that came before the start
      NoteWithheld();
      return GST_PAD_PROBE_DROP;
    }
    ++corrupted_;
  }
  clean_ = true;
  if (!GST_BUFFER_PTS_IS_VALID(buffer)) {
    buffer = gst_buffer_make_writable(buffer);
    GST_BUFFER_PTS(buffer) = MissingPts(now);
    GST_PAD_PROBE_INFO_DATA(info) = buffer;
  }
  // libav's reader of moving GIFs knows only how long a picture stays.
  if (is_gif_ && GST_CLOCK_TIME_IS_VALID(previous_pts_)) {
    buffer = gst_buffer_make_writable(buffer);
    GST_BUFFER_PTS(buffer) = previous_pts_ + previous_duration_;
    GST_PAD_PROBE_INFO_DATA(info) = buffer;
  }
  previous_duration_ =
      GST_BUFFER_DURATION_IS_VALID(buffer) ? GST_BUFFER_DURATION(buffer) : 100 * GST_MSECOND;
  const GstClockTime pts = GST_BUFFER_PTS(buffer);
  previous_pts_ = pts;
  previous_arrival_ = now;

  const bool first = origin_ns_ == kNoOrigin;
  if (first) origin_ns_ = StreamTime(segment_, pts).nanoseconds();
  MediaTime time = StreamTime(segment_, pts);
  if (std::exchange(new_part_, false) && time.nanoseconds() <= newest_ns_) {
    // Its clock begins again; it goes on where the part before ended.
    const int64_t step = GST_CLOCK_TIME_IS_VALID(frame_duration_)
                             ? static_cast<int64_t>(frame_duration_)
                             : 40 * GST_MSECOND;
    joined_at_ns_ += newest_ns_ + step - time.nanoseconds();
    time = StreamTime(segment_, pts);
  }
  newest_ns_ = time.nanoseconds();
  FrameSampler::Verdict verdict = sampler_.Decide(time);
  bool refused = false;
  {
    const std::lock_guard lock(state_.mutex);
    state_.last_picture = now;
    if (!state_.first_after_seek) {
      state_.first_after_seek = time;
      ++state_.events;
    }
    refused = !state_.refusal.empty();
  }
  if (refused) verdict = FrameSampler::Verdict::kEnd;
  switch (verdict) {
    case FrameSampler::Verdict::kSkip:
      // A paused pipeline needs a picture to show its format.
      if (!first) return GST_PAD_PROBE_DROP;
      [[fallthrough]];
    case FrameSampler::Verdict::kTake:
      // These two travel with the picture in fields that no element after this one reads.
      buffer = gst_buffer_make_writable(buffer);
      GST_BUFFER_OFFSET(buffer) = static_cast<guint64>(time.nanoseconds());
      GST_BUFFER_OFFSET_END(buffer) =
          static_cast<guint64>(orientation_ != Orientation::kUpright ? orientation_
                                                                     : coded_orientation_.load()) |
          guint64{mapping_} << 8;
      GST_PAD_PROBE_INFO_DATA(info) = buffer;
      return GST_PAD_PROBE_OK;
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
