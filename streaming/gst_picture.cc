// The part of a source that sees pictures: which are taken, at which times, and how one becomes a
// Frame.
#include <gst/video/video.h>

#include <algorithm>
#include <utility>

#include "runtime/error.h"
#include "streaming/gst_source.h"

namespace sluice {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

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

// ---- On GStreamer's threads -----------------------------------------------------------------

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
