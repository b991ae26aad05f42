// A GStreamer pipeline behind the Source interface. Private to streaming/; see source.h.
//
//   uridecodebin | v4l2src ! decodebin | videotestsrc      everything up to decoded pictures
//     -> probe      picks frames by time stamp and drops the others before they cost anything more
//     -> videoconvert ! RGB     the stream's own colour matrix and range; never scales; 16 bits a
//                   colour where light or colours have to be mapped to ordinary ones
//     -> appsink    one picture waits; when it is taken, one copy, which turns it upright, makes
//                   the Frame
//
// GStreamer's threads run the pipeline; they hand over through `State` and never call out.
// gst_pipeline.cc builds it, gst_picture.cc sees the pictures, gst_source.cc waits and ends.
#ifndef SLUICE_STREAMING_GST_SOURCE_H_
#define SLUICE_STREAMING_GST_SOURCE_H_

#include <gst/app/gstappsink.h>
#include <gst/app/gstappsrc.h>
#include <gst/gst.h>
#include <gst/video/video.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "streaming/concealed_pictures.h"
#include "streaming/container_file.h"
#include "streaming/frame_sampler.h"
#include "streaming/gst_types.h"
#include "streaming/moving_picture.h"
#include "streaming/mp4_header.h"
#include "streaming/picture_orientation.h"
#include "streaming/redact.h"
#include "streaming/source.h"
#include "streaming/tone_map.h"
#include "vision/orientation.h"

namespace sluice {

// What to open, already checked as far as that goes without GStreamer.
struct SourceRequest {
  enum class Kind { kUri, kCamera, kTest };
  Kind kind = Kind::kUri;
  std::string label;        // as given, without passwords: for messages
  std::string location;     // URI, device or videotestsrc pattern
  double test_seconds = 0;  // of a test source; 0: live and endless
  ContainerFacts container = {};
  // A pipe: its writer may take as long as it wants. `location` is fd://N, which this keeps open.
  bool pipe = false;
  std::shared_ptr<void> descriptor = {};
  // No redirect is followed, RTSP keeps to its one TCP connection: for URIs that were checked.
  bool one_place = false;
  // Why the connection failed, as far as who makes it knows, or "". Called on any thread.
  std::function<std::string()> why_unreachable = {};
};
// What a source string means (source.h), with what can be checked without GStreamer's elements.
// Messages name a file `label` where there is one. Throws InputError.
SourceRequest ParseSource(const std::string& source, const std::string& label = "");

// How long a stream may be silent before it has failed. Segments of a growing playlist come whole,
// one after the other is written: up to two more of the longest seen, or of what is usual.
std::chrono::milliseconds SilenceAllowed(std::chrono::milliseconds stall_timeout, bool in_segments,
                                         std::chrono::nanoseconds longest_segment);

class GstSource final : public Source {
 public:
  GstSource(SourceRequest request, const SourceOptions& options);
  ~GstSource() override;

  // Builds and starts the pipeline and waits for the first picture's format.
  void Start();

  const SourceInfo& info() const override { return info_; }
  FramePtr Next() override;
  void Cancel() override;
  std::optional<std::string> warning() const override { return warning_; }

 private:
  using SteadyTime = std::chrono::steady_clock::time_point;
  static constexpr int64_t kNoOrigin = INT64_MIN;

  // Shared with GStreamer's threads.
  struct State {
    std::mutex mutex;
    std::condition_variable changed;
    uint64_t events = 0;  // counts whatever a reader may be waiting for
    bool cancelled = false;
    bool past_end = false;      // the sampler wants nothing more
    bool video_linked = false;  // a decoded video stream was found
    std::string refusal;        // what we refuse ourselves: size, no video; final
    std::string error;          // the first thing GStreamer reported
    std::string hung_up;        // what it said when the other side closed the connection
    bool in_segments = false;   // a playlist's, which come whole
    std::chrono::nanoseconds longest_segment{0};
    GstClockTime segment_pts = GST_CLOCK_TIME_NONE;  // of the newest segment
    std::string missing;                             // a decoder or demuxer that is not installed
    std::set<std::string> other_streams;             // media types that are not video
    // Of the video streams that demuxers found, those to show, one after the other. While a demuxer
    // still finds streams, the last of them may give way to one that ranks higher.
    std::vector<std::string> chosen;
    const GstElement* choosing = nullptr;  // compared only
    int chosen_rank = 0;
    std::vector<ElementPtr> demuxers;           // elements that read containers by themselves
    std::optional<MediaTime> first_after_seek;  // the first picture since the last seek
    SteadyTime last_picture;                    // when a decoded picture last came by
    SteadyTime last_data;                       // when a video decoder was last fed

    bool IsChosen(const std::string& id) const;  // also before there was a choice
    // What is wrong with a source without a video stream.
    std::string NoVideo() const;
  };

  // What is known of a stream where it enters its decoder.
  struct DecoderInput {
    GstSource* source;
    bool has_delta_pictures = false;  // pictures that are decoded from others
    bool counted = false;             // each buffer is one picture
    std::string stream_id;
    bool started = false;  // a key frame came since the start or the last seek
    GstSegment segment = {};
    bool jpeg = false;
    std::optional<NalCodec> nal_codec;
    int nal_length_bytes = 0;
  };

  // Of a parser of coded pictures, which drops those before the first whose format is stated.
  struct ParserInput {
    GstSource* source;
    GstClockTime first = GST_CLOCK_TIME_NONE;  // that came in
    bool passes = false;                       // something came out
  };

  // Bytes on their way to an MP4's demuxer, which are pushed or fetched.
  struct Mp4Input {
    GstSource* source;
    Mp4RangeFinder finder = {};
    uint64_t at = 0;  // of the next that are pushed
  };

  // Building.
  GstElement* Add(const char* factory);
  void BuildInput();
  void BuildOutput();
  void BuildMovingPicture();
  void WatchDecodebin(GstElement* bin);

  // Waiting. Each returns with state_.mutex free.
  uint64_t Events();
  void Notify(const std::function<void(State&)>& change);
  bool WaitForChange(uint64_t seen, SteadyTime asked,
                     std::chrono::milliseconds at_most = std::chrono::milliseconds::max());
  void WaitForFormat();
  std::string DemuxerGaveUp();
  bool IsRemote() const;
  std::string WhyUnreachable(std::chrono::milliseconds at_most) const;
  bool IsNetworkCamera() const;
  [[noreturn]] void ThrowNoConnection(const std::string& error) const;
  void SeekToBegin();
  bool Seek(MediaTime target);
  std::optional<MediaTime> FirstAfterSeek();
  std::vector<std::string> LeftOut() const;
  FramePtr Finish();
  void Warn(const std::vector<std::string>& left_out);
  FramePtr ToFrame(GstSample* sample);
  void ReadFormat(GstSample* sample);
  [[noreturn]] void Throw(const std::string& what) const;

  // On GStreamer's threads.
  static GstBusSyncReply OnMessage(GstBus*, GstMessage* message, gpointer self);
  static gboolean OnAutoplugContinue(GstElement*, GstPad*, GstCaps* caps, gpointer self);
  static GValueArray* OnAutoplugFactories(GstElement*, GstPad* pad, GstCaps* caps, gpointer self);
  static void OnDemuxerNoMorePads(GstElement*, gpointer self);
  static void OnUnknownType(GstElement*, GstPad*, GstCaps* caps, gpointer self);
  static void OnPadAdded(GstElement*, GstPad* pad, gpointer self);
  static void OnNoMorePads(GstElement*, gpointer self);
  static void OnSourceSetup(GstElement*, GstElement* source, gpointer self);
  static void OnElementAdded(GstBin*, GstBin*, GstElement* element, gpointer self);
  static void OnPictureWanted(GstAppSrc*, guint bytes, gpointer self);
  static void OnPlaylistPad(GstElement*, GstPad* pad, gpointer self);
  static GstPadProbeReturn OnPlaylistData(GstPad*, GstPadProbeInfo* info, gpointer self);
  static GstPadProbeReturn OnParserInput(GstPad*, GstPadProbeInfo* info, gpointer input);
  static GstPadProbeReturn OnParserOutput(GstPad*, GstPadProbeInfo* info, gpointer input);
  static GstPadProbeReturn OnMp4Bytes(GstPad*, GstPadProbeInfo* info, gpointer input);
  static GstPadProbeReturn OnDecoderInput(GstPad*, GstPadProbeInfo* info, gpointer input);
  static GstPadProbeReturn OnDecoded(GstPad*, GstPadProbeInfo* info, gpointer self);
  GstPadProbeReturn OnPicture(GstPadProbeInfo* info);
  void WatchParser(GstElement* parser);
  void CountConcealed(GstElement* decoder);
  bool IsWanted(GstPad* pad, GstCaps* caps, const GList* able);
  void NoteWithheld();
  void ReadOrientation(const DecoderInput& input, GstBuffer* buffer);
  void ReplaceRange(GstPadProbeInfo* info, GstVideoInfo video) const;
  void ChooseOutput(const GstVideoInfo& video);
  bool RefuseIfTooLarge(int width, int height);
  GstClockTime MissingPts(SteadyTime now) const;
  MediaTime StreamTime(const GstSegment& segment, GstClockTime pts) const;

  const SourceRequest request_;
  const SourceOptions options_;
  const Redactor redact_;
  SourceInfo info_;
  std::optional<std::string> warning_;
  int64_t delivered_ = 0;
  bool ended_ = false;

  GstElement* pipeline_ = nullptr;  // owned
  GstElement* convert_ = nullptr;   // owned by the pipeline, as all elements
  GstAppSink* sink_ = nullptr;
  GstSample* stashed_ = nullptr;  // owned: a live source's first picture, read for its format

  std::unique_ptr<MovingPicture>
      moving_;  // used by the thread of the element that asks for pictures

  State state_;

  bool sought_ = false;
  std::optional<ToneMap> tone_map_;  // made when the first picture needs it
  std::atomic<bool> is_gif_ = false;

  // Used by the streaming thread that carries decoded pictures.
  FrameSampler sampler_;
  GstSegment segment_;
  GstClockTime frame_duration_ = GST_CLOCK_TIME_NONE;  // by the caps' frame rate
  GstClockTime previous_pts_ = GST_CLOCK_TIME_NONE;    // of the picture before
  GstClockTime previous_duration_ = 0;
  SteadyTime previous_arrival_;
  Orientation orientation_ = Orientation::kUpright;  // as the stream's tags say
  guint8 mapping_ = 0;        // of light and colours; gst_picture.cc says how
  bool clean_ = false;        // a whole picture came since the start or the last seek
  bool new_part_ = false;     // a stream began, but no picture of it came yet
  int64_t joined_at_ns_ = 0;  // added to stream times that begin again where parts are joined
  // Read by both sides.
  std::atomic<int64_t> withheld_ = 0;   // pictures that need others which came before the start
  std::atomic<int64_t> unseen_ns_ = 0;  // what parsers dropped before that
  std::atomic<Orientation> coded_orientation_ = Orientation::kUpright;  // as coded pictures say
  std::atomic<int64_t> fed_ = 0;  // pictures given to a decoder that can be counted
  std::atomic<int64_t> decoded_ = 0;
  std::atomic<int64_t> corrupted_ = 0;          // pictures that the decoder marked as damaged
  std::optional<ConcealedPictures> concealed_;  // from when a decoder of libav is there
  std::atomic<bool> full_range_ = false;        // an MP4's header says so
  std::atomic<bool> multipart_ = false;         // picture after picture, as cameras send them
  std::atomic<int64_t> origin_ns_ = kNoOrigin;  // stream time of the first picture
  std::atomic<int64_t> newest_ns_ = 0;          // media time of the newest decoded picture
};

}  // namespace sluice

#endif  // SLUICE_STREAMING_GST_SOURCE_H_
