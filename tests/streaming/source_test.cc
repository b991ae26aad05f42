// Sources against media that GStreamer makes here: every frame carries its number as eight bars.
#include "streaming/source.h"

#include <gmock/gmock.h>
#include <gst/app/gstappsrc.h>
#include <gst/gst.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <future>
#include <thread>

#include "runtime/error.h"

namespace sluice {
namespace {

namespace fs = std::filesystem;
using std::chrono::milliseconds;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

// ---- Media -----------------------------------------------------------------------------------

struct Picture {
  double seconds;
  int width = 128, height = 96;
};

// The number of a picture in eight vertical bars, most significant bit on the left.
std::vector<uint8_t> Bars(int number, int width, int height) {
  std::vector<uint8_t> rgb(size_t{3} * width * height);
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < width; ++x) {
      const bool bit = number >> (7 - x * 8 / width) & 1;
      std::fill_n(&rgb[3 * (size_t{1} * y * width + x)], 3, bit ? 235 : 20);
    }
  }
  return rgb;
}

int Number(const Frame& frame) {
  int number = 0;
  for (int bit = 0; bit < 8; ++bit) {
    const int x = frame.width * (2 * bit + 1) / 16, y = frame.height / 2;
    number = 2 * number + (frame.rgb[3 * (size_t{1} * y * frame.width + x) + 1] > 128);
  }
  return number;
}

std::vector<Picture> Constant(double fps, int count) {
  std::vector<Picture> pictures;
  for (int i = 0; i < count; ++i) pictures.push_back({i / fps});
  return pictures;
}

class SourceTest : public testing::Test {
 protected:
  static void SetUpTestSuite() { gst_init(nullptr, nullptr); }
  void SetUp() override {
#ifdef __SANITIZE_THREAD__
    GTEST_SKIP() << "GStreamer is not instrumented, each of its handovers would look like a race";
#endif
    const auto* test = testing::UnitTest::GetInstance()->current_test_info();
    directory_ = fs::temp_directory_path() /
                 ("sluice_source_" + std::to_string(getpid()) + "_" + test->name());
    fs::create_directories(directory_);
  }
  void TearDown() override {
    if (!directory_.empty()) fs::remove_all(directory_);
  }

  static bool Has(std::initializer_list<const char*> elements) {
    return std::all_of(elements.begin(), elements.end(), [](const char* name) {
      GstElementFactory* factory = gst_element_factory_find(name);
      if (factory) gst_object_unref(factory);
      return factory != nullptr;
    });
  }

  std::string Path(const std::string& name) const { return directory_ / name; }

  std::string WriteBytes(const std::string& name, const std::string& bytes) const {
    std::ofstream(Path(name), std::ios::binary) << bytes;
    return Path(name);
  }

  static std::string ReadBytes(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }

  // Runs a pipeline to its end.
  static void Play(GstElement* pipeline) {
    gst_element_set_state(pipeline, GST_STATE_PLAYING);
    GstBus* bus = gst_element_get_bus(pipeline);
    GstMessage* message = gst_bus_timed_pop_filtered(
        bus, 60 * GST_SECOND, static_cast<GstMessageType>(GST_MESSAGE_EOS | GST_MESSAGE_ERROR));
    ASSERT_NE(message, nullptr) << "the fixture's pipeline hangs";
    if (GST_MESSAGE_TYPE(message) == GST_MESSAGE_ERROR) {
      GError* error = nullptr;
      gst_message_parse_error(message, &error, nullptr);
      ADD_FAILURE() << "fixture: " << error->message;
      g_clear_error(&error);
    }
    gst_message_unref(message);
    gst_object_unref(bus);
    gst_element_set_state(pipeline, GST_STATE_NULL);
    gst_object_unref(pipeline);
  }

  // `chain` in gst-launch notation; the file sink is added.
  std::string Make(const std::string& name, const std::string& chain) const {
    const std::string text = chain + " ! filesink location=\"" + Path(name) + "\"";
    GError* error = nullptr;
    GstElement* pipeline = gst_parse_launch(text.c_str(), &error);
    EXPECT_EQ(error, nullptr) << text << ": " << error->message;
    Play(pipeline);
    return Path(name);
  }

  // Numbered pictures at exact times through `chain`.
  std::string MakeBars(const std::string& name, const std::string& chain,
                       const std::vector<Picture>& pictures) const {
    const std::string text = "appsrc name=in format=time ! videoconvert ! " + chain +
                             " ! filesink location=\"" + Path(name) + "\"";
    GError* error = nullptr;
    GstElement* pipeline = gst_parse_launch(text.c_str(), &error);
    EXPECT_EQ(error, nullptr) << text << ": " << error->message;
    GstElement* in = gst_bin_get_by_name(GST_BIN(pipeline), "in");
    g_object_set(in, "max-bytes", guint64{0}, nullptr);
    // The rate written into the header is that of the first two pictures, as cameras do.
    const int fps = pictures.size() > 1
                        ? static_cast<int>(1 / (pictures[1].seconds - pictures[0].seconds) + 0.5)
                        : 25;
    for (size_t i = 0; i < pictures.size(); ++i) {
      const Picture& p = pictures[i];
      GstCaps* caps = gst_caps_new_simple("video/x-raw", "format", G_TYPE_STRING, "RGB", "width",
                                          G_TYPE_INT, p.width, "height", G_TYPE_INT, p.height,
                                          "framerate", GST_TYPE_FRACTION, fps, 1, nullptr);
      const std::vector<uint8_t> rgb = Bars(static_cast<int>(i), p.width, p.height);
      // GStreamer's rows begin at multiples of four bytes.
      const size_t row = size_t{3} * p.width, stride = (row + 3) / 4 * 4;
      GstBuffer* buffer = gst_buffer_new_allocate(nullptr, stride * p.height, nullptr);
      for (int y = 0; y < p.height; ++y) {
        gst_buffer_fill(buffer, stride * y, rgb.data() + row * y, row);
      }
      GST_BUFFER_PTS(buffer) = static_cast<GstClockTime>(p.seconds * 1e9 + 0.5);
      const double next = i + 1 < pictures.size() ? pictures[i + 1].seconds : p.seconds + 1.0 / fps;
      GST_BUFFER_DURATION(buffer) = static_cast<GstClockTime>((next - p.seconds) * 1e9 + 0.5);
      GstSample* sample = gst_sample_new(buffer, caps, nullptr, nullptr);
      gst_app_src_push_sample(GST_APP_SRC(in), sample);
      gst_sample_unref(sample);
      gst_buffer_unref(buffer);
      gst_caps_unref(caps);
    }
    gst_app_src_end_of_stream(GST_APP_SRC(in));
    gst_object_unref(in);
    Play(pipeline);
    return Path(name);
  }

  fs::path directory_;
};

#define SKIP_WITHOUT(...) \
  if (!Has({__VA_ARGS__})) GTEST_SKIP() << "a GStreamer plugin of " #__VA_ARGS__ " is missing"

constexpr char kMjpegAvi[] = "jpegenc quality=90 ! avimux";
constexpr char kH264Mp4[] = "x264enc speed-preset=ultrafast key-int-max=15 ! h264parse ! mp4mux";

// ---- Reading ---------------------------------------------------------------------------------

SourceOptions All() {
  SourceOptions options;
  options.rate.every_nth = 1;
  options.reconnect.most_tries = 0;
  return options;
}

struct Outcome {
  SourceInfo info;
  std::vector<FramePtr> frames;
  std::optional<std::string> warning;
  std::string error;  // thrown by Open or Next; empty: none

  std::vector<int> numbers() const {
    std::vector<int> numbers;
    for (const FramePtr& f : frames) numbers.push_back(Number(*f));
    return numbers;
  }
};

Outcome Read(const std::string& path, const SourceOptions& options = All()) {
  Outcome outcome;
  try {
    const auto source = Source::Open(path, options);
    outcome.info = source->info();
    while (FramePtr frame = source->Next()) {
      EXPECT_EQ(frame->rgb.size(), size_t{3} * frame->width * frame->height);
      EXPECT_EQ(frame->index, static_cast<int64_t>(outcome.frames.size()));
      if (!outcome.frames.empty()) {
        EXPECT_GT(frame->time, outcome.frames.back()->time);
      }
      outcome.frames.push_back(frame);
    }
    EXPECT_EQ(source->Next(), nullptr) << "the end must last";
    outcome.warning = source->warning();
  } catch (const InputError& error) {
    outcome.error = error.what();
    EXPECT_THAT(outcome.error, testing::StartsWith("[source] "));
    EXPECT_THAT(outcome.error, Not(HasSubstr("\n")));
  }
  return outcome;
}

std::vector<int> Range(int begin, int end, int step = 1) {
  std::vector<int> numbers;
  for (int i = begin; i < end; i += step) numbers.push_back(i);
  return numbers;
}

// ---- What comes out --------------------------------------------------------------------------

TEST_F(SourceTest, DeliversEveryFrameOfAFileWithItsTime) {
  SKIP_WITHOUT("jpegenc", "avimux");
  const Outcome out = Read(MakeBars("a.avi", kMjpegAvi, Constant(25, 50)));
  EXPECT_EQ(out.error, "");
  EXPECT_EQ(out.warning, std::nullopt);
  ASSERT_EQ(out.numbers(), Range(0, 50));
  for (int i = 0; i < 50; ++i) EXPECT_NEAR(out.frames[i]->time.seconds(), i / 25.0, 1e-6);
  EXPECT_FALSE(out.info.live);
  EXPECT_EQ(out.info.width, 128);
  EXPECT_EQ(out.info.height, 96);
  EXPECT_THAT(out.info.codec, HasSubstr("JPEG"));
  ASSERT_TRUE(out.info.duration);
  EXPECT_NEAR(out.info.duration->seconds(), 2.0, 0.05);
}

TEST_F(SourceTest, SamplesByRateAndByCount) {
  SKIP_WITHOUT("x264enc", "mp4mux", "avdec_h264");
  const std::string path = MakeBars("a.mp4", kH264Mp4, Constant(30, 90));
  SourceOptions options;
  options.rate.fps = 2;
  EXPECT_EQ(Read(path, options).numbers(), Range(0, 90, 15));
  options.rate.every_nth = 7;
  EXPECT_EQ(Read(path, options).numbers(), Range(0, 90, 7));
  options.max_frames = 3;
  const Outcome out = Read(path, options);
  EXPECT_EQ(out.numbers(), (std::vector<int>{0, 7, 14}));
  EXPECT_EQ(out.warning, std::nullopt);
}

TEST_F(SourceTest, StartsAtTimeZeroWhateverTheFirstTimeStampIs) {
  SKIP_WITHOUT("x264enc", "mpegtsmux", "avdec_h264");
  std::vector<Picture> late = Constant(25, 30);
  for (Picture& p : late) p.seconds += 3600;
  const Outcome out =
      Read(MakeBars("a.ts", "x264enc speed-preset=ultrafast ! h264parse ! mpegtsmux", late));
  EXPECT_EQ(out.error, "");
  ASSERT_FALSE(out.frames.empty());
  EXPECT_EQ(out.frames[0]->time, MediaTime());
  EXPECT_NEAR(out.frames.back()->time.seconds(), 29 / 25.0, 1e-3);
}

TEST_F(SourceTest, HonoursVariableFrameRates) {
  SKIP_WITHOUT("jpegenc", "matroskamux");
  std::vector<Picture> pictures;
  for (double t : {0.0, 0.04, 0.08, 0.5, 0.54, 2.0, 2.04, 2.5, 6.0, 6.04}) pictures.push_back({t});
  const std::string path = MakeBars("vfr.mkv", "jpegenc ! matroskamux", pictures);
  const Outcome all = Read(path);
  ASSERT_EQ(all.numbers(), Range(0, 10));
  for (int i = 0; i < 10; ++i) {
    EXPECT_NEAR(all.frames[i]->time.seconds(), pictures[i].seconds, 1e-3) << i;
  }
  SourceOptions options;
  options.rate.fps = 2;
  EXPECT_EQ(Read(path, options).numbers(), (std::vector<int>{0, 3, 5, 7, 8}));
}

TEST_F(SourceTest, TakesOnlyThePartBetweenBeginAndEnd) {
  SKIP_WITHOUT("x264enc", "mp4mux", "avdec_h264", "jpegenc", "avimux", "matroskamux");
  for (const auto& [name, chain] : std::vector<std::pair<std::string, std::string>>{
           {"a.mp4", kH264Mp4}, {"a.avi", kMjpegAvi}, {"a.mkv", "x264enc ! matroskamux"}}) {
    SCOPED_TRACE(name);
    const std::string path = MakeBars(name, chain, Constant(25, 100));
    SourceOptions options = All();
    options.begin = MediaTime::FromSeconds(1.23);
    options.end = MediaTime::FromSeconds(3);
    const Outcome out = Read(path, options);
    EXPECT_EQ(out.error, "");
    EXPECT_EQ(out.numbers(), Range(31, 75));
    ASSERT_FALSE(out.frames.empty());
    EXPECT_NEAR(out.frames[0]->time.seconds(), 31 / 25.0, 1e-3);
    EXPECT_EQ(out.warning, std::nullopt);
    options.begin = MediaTime::FromSeconds(60);
    options.end = std::nullopt;
    EXPECT_THAT(Read(path, options).error, HasSubstr("begin is 00:01:00"));
  }
}

TEST_F(SourceTest, KeepsRowsTogetherAtOddWidths) {
  SKIP_WITHOUT("avimux");
  std::vector<Picture> pictures = {{0, 131, 97}, {0.04, 131, 97}, {0.08, 131, 97}};
  const std::string path = MakeBars("odd.avi", "video/x-raw,format=BGR ! avimux", pictures);
  const Outcome out = Read(path);
  ASSERT_EQ(out.numbers(), Range(0, 3));
  for (int i = 0; i < 3; ++i) EXPECT_EQ(out.frames[i]->rgb, Bars(i, 131, 97));
}

TEST_F(SourceTest, UsesTheStreamsOwnColourMatrixAndRange) {
  SKIP_WITHOUT("x264enc", "mp4mux", "avdec_h264", "jpegenc", "avimux");
  const std::string red =
      "videotestsrc num-buffers=3 pattern=solid-color foreground-color=0xffd02010";
  const std::array<std::string, 3> paths = {
      Make("601.mp4", red + " ! video/x-raw,format=I420,width=320,height=240,colorimetry=bt601 ! "
                            "x264enc qp-max=10 ! mp4mux"),
      Make("709.mp4", red + " ! video/x-raw,format=I420,width=320,height=240,colorimetry=bt709 ! "
                            "x264enc qp-max=10 ! mp4mux"),
      Make("full.avi", red + " ! video/x-raw,format=RGB,width=320,height=240 ! jpegenc "
                             "quality=100 ! avimux")};
  for (const std::string& path : paths) {
    const Outcome out = Read(path);
    ASSERT_FALSE(out.frames.empty()) << path << out.error;
    const Frame& frame = *out.frames[0];
    const uint8_t* pixel = &frame.rgb[3 * (120 * 320 + 160)];
    // Rounding to 8-bit YUV and back costs up to 2 levels, the codec one more. The wrong matrix
    // would miss by 15 and more, the wrong range by 10.
    EXPECT_NEAR(pixel[0], 0xd0, 4) << path;
    EXPECT_NEAR(pixel[1], 0x20, 4) << path;
    EXPECT_NEAR(pixel[2], 0x10, 4) << path;
  }
}

TEST_F(SourceTest, TurnsPortraitVideosUpright) {
  SKIP_WITHOUT("x264enc", "mp4mux", "avdec_h264");
  const std::string path = Make("lying.mp4",
                                "videotestsrc num-buffers=5 pattern=gradient ! "
                                "video/x-raw,width=320,height=240 ! x264enc ! mp4mux");
  const Outcome lying = Read(path);
  ASSERT_EQ(lying.frames.size(), 5u);

  // What a phone writes: the sensor's picture, and a matrix that turns it clockwise by 90 degrees.
  // GStreamer's muxer knows only the identity, so the matrix in the track's header is replaced.
  std::string bytes = ReadBytes(path);
  const auto words = [](std::initializer_list<uint32_t> values) {
    std::string out;
    for (uint32_t v : values) {
      for (int shift : {24, 16, 8, 0}) out += static_cast<char>(v >> shift & 0xff);
    }
    return out;
  };
  const std::string identity = words({0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000});
  const size_t at = bytes.find(identity, bytes.find("tkhd"));
  ASSERT_NE(at, std::string::npos);
  bytes.replace(at, identity.size(),
                words({0, 0x10000, 0, 0xffff0000, 0, 0, 240 << 16, 0, 0x40000000}));

  const Outcome upright = Read(WriteBytes("portrait.mp4", bytes));
  EXPECT_EQ(upright.info.width, 240);
  EXPECT_EQ(upright.info.height, 320);
  ASSERT_EQ(upright.frames.size(), 5u);
  const Frame &up = *upright.frames[0], &before = *lying.frames[0];
  ASSERT_EQ(up.width, 240);
  // The sensor's top row becomes the right column.
  for (int y = 10; y < 230; y += 20) {
    EXPECT_NEAR(up.rgb[3 * (160 * 240 + (239 - y))], before.rgb[3 * (y * 320 + 160)], 4) << y;
  }
}

TEST_F(SourceTest, DecodesVeryLargePicturesAndRefusesLargerOnes) {
  SKIP_WITHOUT("jpegenc", "avimux");
  const std::string path = MakeBars("4k.avi", kMjpegAvi, {{0, 3840, 2160}, {0.5, 3840, 2160}});
  const Outcome out = Read(path);
  EXPECT_EQ(out.numbers(), Range(0, 2));
  EXPECT_EQ(out.info.width, 3840);
  SourceOptions options = All();
  options.max_side_pixels = 3839;
  EXPECT_THAT(Read(path, options).error, AllOf(HasSubstr("3840x2160"), HasSubstr("3839")));
}

TEST_F(SourceTest, FollowsAResolutionThatChangesMidStream) {
  SKIP_WITHOUT("jpegenc", "multipartmux", "multipartdemux");
  // Multipart JPEG also carries no time stamps: the pictures follow one another.
  std::vector<Picture> pictures = Constant(25, 12);
  for (int i = 6; i < 12; ++i) pictures[i].width = 320, pictures[i].height = 240;
  const std::string path = MakeBars("change.mjpg", "jpegenc ! multipartmux", pictures);
  const Outcome out = Read(path);
  EXPECT_EQ(out.error, "");
  ASSERT_EQ(out.numbers(), Range(0, 12));
  EXPECT_EQ(out.frames[5]->width, 128);
  EXPECT_EQ(out.frames[6]->width, 320);
  EXPECT_EQ(out.frames[6]->height, 240);
  SourceOptions options = All();
  options.max_side_pixels = 200;
  EXPECT_THAT(Read(path, options).error, HasSubstr("320x240"));
}

TEST_F(SourceTest, LeavesSoundAside) {
  SKIP_WITHOUT("theoraenc", "vorbisenc", "oggmux");
  const std::string path =
      Make("both.ogv",
           "oggmux name=mux videotestsrc num-buffers=25 ! video/x-raw,framerate=25/1 ! theoraenc ! "
           "mux. audiotestsrc num-buffers=40 ! audioconvert ! vorbisenc ! mux. mux.");
  const Outcome out = Read(path);
  EXPECT_EQ(out.error, "");
  EXPECT_EQ(out.frames.size(), 25u);
  EXPECT_EQ(out.info.codec, "Theora");
}

TEST_F(SourceTest, ReadsAStillPictureAsOneFrame) {
  SKIP_WITHOUT("jpegenc");
  const Outcome out = Read(MakeBars("still.jpg", "jpegenc", {{0}}));
  EXPECT_EQ(out.error, "");
  EXPECT_EQ(out.numbers(), Range(0, 1));
}

TEST_F(SourceTest, OpensFileUrisAndPathsWithSpacesAndPercents) {
  SKIP_WITHOUT("jpegenc", "avimux");
  const std::string path = MakeBars("a b%20ü#.avi", kMjpegAvi, Constant(25, 3));
  EXPECT_EQ(Read(path).numbers(), Range(0, 3));
  gchar* uri = gst_filename_to_uri(path.c_str(), nullptr);
  EXPECT_EQ(Read(uri).numbers(), Range(0, 3));
  g_free(uri);
}

// ---- What goes wrong -------------------------------------------------------------------------

TEST_F(SourceTest, SaysWhatIsWrongWithAPath) {
  EXPECT_THAT(Read(Path("none.mp4")).error,
              AllOf(HasSubstr("none.mp4"), HasSubstr("no such file")));
  EXPECT_THAT(Read(directory_).error, HasSubstr("is a directory"));
  EXPECT_THAT(Read(WriteBytes("empty.mp4", "")).error, HasSubstr("is empty (0 bytes)"));
  EXPECT_THAT(Read(WriteBytes("notes.mp4", std::string(5000, 'x') + "\nhello")).error,
              HasSubstr("not a media file"));
  std::string noise(20000, '\0');
  for (size_t i = 0; i < noise.size(); ++i) noise[i] = static_cast<char>((i * i * 31 + i) >> 3);
  EXPECT_THAT(Read(WriteBytes("noise.mp4", noise)).error, HasSubstr("not a media file"));
  EXPECT_THAT(Read("/dev/null").error, HasSubstr("not a regular file"));
  EXPECT_THAT(Read("").error, HasSubstr("empty string"));
  EXPECT_THAT(Read("gopher://host/x").error, HasSubstr("unknown scheme 'gopher'"));
  EXPECT_THAT(Read("file:relative").error, HasSubstr("no such file"));
  EXPECT_THAT(Read("camera:/dev/video77").error, HasSubstr("no camera at '/dev/video77'"));
}

TEST_F(SourceTest, SaysThatAFileMayNotBeRead) {
  const std::string path = WriteBytes("secret.mp4", "x");
  fs::permissions(path, fs::perms::none);
  if (access(path.c_str(), R_OK) == 0) GTEST_SKIP() << "this user may read everything";
  EXPECT_THAT(Read(path).error, HasSubstr("Permission denied"));
}

TEST_F(SourceTest, SaysWhatAFileWithoutVideoHolds) {
  SKIP_WITHOUT("wavenc", "vorbisenc", "oggmux");
  EXPECT_THAT(Read(Make("a.wav", "audiotestsrc num-buffers=20 ! wavenc")).error,
              HasSubstr("no video stream; found audio/x-"));
  EXPECT_THAT(
      Read(Make("a.ogg", "audiotestsrc num-buffers=20 ! audioconvert ! vorbisenc ! oggmux")).error,
      HasSubstr("no video stream; found audio/"));
  if (Has({"lamemp3enc"})) {
    EXPECT_THAT(Read(Make("a.mp3", "audiotestsrc num-buffers=20 ! lamemp3enc")).error,
                HasSubstr("no video stream; found audio/mpeg"));
  }
}

TEST_F(SourceTest, NamesACodecWithoutADecoder) {
  SKIP_WITHOUT("jpegenc", "avimux");
  std::string bytes = ReadBytes(MakeBars("a.avi", kMjpegAvi, Constant(25, 5)));
  for (size_t at = 0; (at = bytes.find("MJPG", at)) != std::string::npos;) {
    bytes.replace(at, 4, "ZQX7");
  }
  EXPECT_THAT(Read(WriteBytes("bogus.avi", bytes)).error,
              AllOf(HasSubstr("unsupported codec"), HasSubstr("ZQX7")));
}

TEST_F(SourceTest, ReportsAnMp4WithoutItsIndex) {
  SKIP_WITHOUT("x264enc", "mp4mux", "avdec_h264");
  const std::string bytes = ReadBytes(MakeBars("a.mp4", kH264Mp4, Constant(25, 50)));
  EXPECT_THAT(Read(WriteBytes("cut.mp4", bytes.substr(0, bytes.size() / 2))).error,
              AllOf(HasSubstr("cut.mp4"), HasSubstr("moov")));
}

TEST_F(SourceTest, DeliversWhatIsThereOfATruncatedFileAndWarns) {
  SKIP_WITHOUT("x264enc", "mp4mux", "avdec_h264", "jpegenc", "avimux", "matroskamux");
  for (const auto& [name, chain] : std::vector<std::pair<std::string, std::string>>{
           {"a.mp4",
            "x264enc speed-preset=ultrafast key-int-max=15 ! h264parse ! mp4mux faststart=true"},
           {"a.avi", kMjpegAvi},
           {"a.mkv", "jpegenc ! matroskamux"}}) {
    SCOPED_TRACE(name);
    const std::string bytes = ReadBytes(MakeBars(name, chain, Constant(25, 150)));
    const Outcome out = Read(WriteBytes("cut_" + name, bytes.substr(0, bytes.size() * 6 / 10)));
    EXPECT_EQ(out.error, "");
    EXPECT_GT(out.frames.size(), 50u);
    EXPECT_LT(out.frames.size(), 120u);
    ASSERT_TRUE(out.warning);
    EXPECT_THAT(*out.warning,
                AllOf(HasSubstr("cut_"), HasSubstr("ended at"), Not(HasSubstr("\n"))));
  }
}

TEST_F(SourceTest, GetsOverDamagedBytesInTheMiddle) {
  SKIP_WITHOUT("x264enc", "mp4mux", "avdec_h264", "jpegenc", "avimux");
  for (const auto& [name, chain] : std::vector<std::pair<std::string, std::string>>{
           {"a.mp4", kH264Mp4}, {"a.avi", kMjpegAvi}}) {
    SCOPED_TRACE(name);
    std::string bytes = ReadBytes(MakeBars(name, chain, Constant(25, 100)));
    for (size_t i = bytes.size() * 4 / 10; i < bytes.size() * 5 / 10; ++i) {
      bytes[i] = static_cast<char>(bytes[i] ^ (i * 37 >> 2));
    }
    const Outcome out = Read(WriteBytes("hurt_" + name, bytes));
    EXPECT_EQ(out.error, "");
    EXPECT_GT(out.frames.size(), 20u);
    EXPECT_LE(out.frames.size(), 100u);
  }
}

// ---- Test pictures, live streams, cancelling ---------------------------------------------------

TEST_F(SourceTest, PlaysATestPatternForTheSecondsAsked) {
  SourceOptions options;
  options.rate.fps = 2;
  const Outcome out = Read("test:smpte:3", options);
  EXPECT_EQ(out.error, "");
  EXPECT_FALSE(out.info.live);
  ASSERT_EQ(out.frames.size(), 6u);
  for (int i = 0; i < 6; ++i) EXPECT_NEAR(out.frames[i]->time.seconds(), 0.5 * i, 1e-9);
  EXPECT_EQ(out.info.width, 640);
  EXPECT_EQ(Read("test:ball:0.1").frames.size(), 3u);
}

TEST_F(SourceTest, KnowsItsTestPatterns) {
  EXPECT_THAT(Read("test:tartan:1").error, AllOf(HasSubstr("'tartan'"), HasSubstr("smpte, ")));
  for (const char* seconds : {"0", "-1", "soon", "", "1e9", "nan", "3s"}) {
    EXPECT_THAT(Read(std::string("test:ball:") + seconds).error, HasSubstr("SECONDS")) << seconds;
  }
}

TEST_F(SourceTest, LiveSourcesSayThatTheyAre) {
  SourceOptions options = All();
  options.max_frames = 3;
  for (const char* name : {"test", "test:snow", "test:camera"}) {
    const Outcome out = Read(name, options);
    EXPECT_EQ(out.error, "") << name;
    EXPECT_TRUE(out.info.live) << name;
    EXPECT_EQ(out.info.duration, std::nullopt);
    EXPECT_EQ(out.frames.size(), 3u) << name;
  }
  options.begin = MediaTime::FromSeconds(1);
  EXPECT_THAT(Read("test", options).error, HasSubstr("live"));
}

TEST_F(SourceTest, CancelWakesAReaderThatWaits) {
  SourceOptions options;
  options.rate.fps = 0.001;  // after the first frame the next would come in a quarter of an hour
  const auto source = Source::Open("test", options);
  ASSERT_NE(source->Next(), nullptr);
  std::promise<void> waiting;
  std::thread canceller([&] {
    waiting.get_future().wait();
    source->Cancel();
  });
  waiting.set_value();
  EXPECT_EQ(source->Next(), nullptr);
  EXPECT_EQ(source->Next(), nullptr);
  canceller.join();
  EXPECT_EQ(source->warning(), std::nullopt);
}

TEST_F(SourceTest, SourcesLiveSideBySideAndMayBeLeftUnread) {
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([] {
      for (int round = 0; round < 3; ++round) {
        const auto source = Source::Open("test:ball:60", All());
        for (int n = 0; n < 2 * round; ++n) EXPECT_NE(source->Next(), nullptr);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// ---- Networks ----------------------------------------------------------------------------------

// Answers HTTP requests on 127.0.0.1 one after the other, each by `serve`.
class HttpServer {
 public:
  using Serve = std::function<void(int connection, const std::string& request)>;

  explicit HttpServer(Serve serve) : listener_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    if (bind(listener_, reinterpret_cast<sockaddr*>(&address), size) != 0 ||
        listen(listener_, 8) != 0) {
      throw std::runtime_error("no port for the test's server");
    }
    getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size);
    port_ = ntohs(address.sin_port);
    thread_ = std::thread([this, serve = std::move(serve)] {
      for (;;) {
        const int connection = accept(listener_, nullptr, nullptr);
        if (connection < 0) return;
        std::string request;
        char byte;
        while (!request.ends_with("\r\n\r\n") && recv(connection, &byte, 1, 0) == 1) {
          request += byte;
        }
        if (!request.empty()) serve(connection, request);
        close(connection);
      }
    });
  }
  ~HttpServer() {
    shutdown(listener_, SHUT_RDWR);
    thread_.join();
    close(listener_);
  }
  std::string url(const std::string& path) const {
    return "http://127.0.0.1:" + std::to_string(port_) + path;
  }
  static void Send(int connection, const std::string& bytes) {
    for (size_t sent = 0; sent < bytes.size();) {
      const ssize_t n = send(connection, bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
      if (n <= 0) return;
      sent += static_cast<size_t>(n);
    }
  }
  // Until the other side hangs up.
  static void Hold(int connection) {
    char byte;
    while (recv(connection, &byte, 1, 0) > 0) {
    }
  }

 private:
  const int listener_;
  int port_ = 0;
  std::thread thread_;
};

TEST_F(SourceTest, ReadsAVideoOverHttp) {
  SKIP_WITHOUT("souphttpsrc", "jpegenc", "avimux");
  const std::string bytes = ReadBytes(MakeBars("a.avi", kMjpegAvi, Constant(25, 50)));
  HttpServer server([&](int connection, const std::string& request) {
    if (request.find("GET /a.avi") != 0) {
      HttpServer::Send(connection, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
      return;
    }
    HttpServer::Send(connection,
                     "HTTP/1.1 200 OK\r\nContent-Type: video/x-msvideo\r\n"
                     "Connection: close\r\nContent-Length: " +
                         std::to_string(bytes.size()) + "\r\n\r\n" + bytes);
  });
  const Outcome out = Read(server.url("/a.avi"));
  EXPECT_EQ(out.error, "");
  EXPECT_EQ(out.numbers(), Range(0, 50));
  EXPECT_FALSE(out.info.live);
  EXPECT_THAT(Read(server.url("/b.avi")).error, HasSubstr("Not Found"));
}

TEST_F(SourceTest, GivesUpOnAServerThatNeverAnswers) {
  SKIP_WITHOUT("souphttpsrc");
  HttpServer server([&](int connection, const std::string&) { HttpServer::Hold(connection); });
  SourceOptions options = All();
  options.stall_timeout = milliseconds(300);
  EXPECT_THAT(Read(server.url("/a.avi"), options).error, HasSubstr("nothing arrived for 0.3 s"));
}

TEST_F(SourceTest, GivesUpOnAStreamThatStallsHalfWay) {
  SKIP_WITHOUT("souphttpsrc", "jpegenc", "multipartmux");
  const std::string bytes =
      ReadBytes(MakeBars("a.mjpg", "jpegenc ! multipartmux boundary=sluice", Constant(25, 20)));
  HttpServer server([&](int connection, const std::string&) {
    HttpServer::Send(connection,
                     "HTTP/1.0 200 OK\r\n"
                     "Content-Type: multipart/x-mixed-replace; boundary=sluice\r\n\r\n" +
                         bytes);
    HttpServer::Hold(connection);
  });
  SourceOptions options = All();
  options.stall_timeout = milliseconds(700);
  const auto source = Source::Open(server.url("/camera"), options);
  EXPECT_TRUE(source->info().live) << "no length and no way back: a network camera";
  int frames = 0;
  try {
    while (source->Next()) ++frames;
    ADD_FAILURE() << "a stall must not look like an end";
  } catch (const InputError& error) {
    EXPECT_THAT(error.what(), HasSubstr("nothing arrived for 0.7 s"));
  }
  EXPECT_GE(frames, 15);
}

TEST_F(SourceTest, PicturesOfANetworkCameraAreTimedByTheirArrival) {
  SKIP_WITHOUT("souphttpsrc", "jpegenc", "multipartmux");
  const std::string bytes =
      ReadBytes(MakeBars("a.mjpg", "jpegenc ! multipartmux boundary=sluice", Constant(25, 12)));
  const size_t half = bytes.find("--sluice", bytes.size() / 2);
  std::promise<void> first_half_read;
  HttpServer server([&](int connection, const std::string&) {
    HttpServer::Send(connection,
                     "HTTP/1.0 200 OK\r\n"
                     "Content-Type: multipart/x-mixed-replace; boundary=sluice\r\n\r\n" +
                         bytes.substr(0, half));
    first_half_read.get_future().wait();
    HttpServer::Send(connection, bytes.substr(half));
  });
  const auto source = Source::Open(server.url("/camera"), All());
  FramePtr frame;
  for (int i = 0; i < 5; ++i) frame = source->Next();
  ASSERT_NE(frame, nullptr);
  // Arrival is wall time, so some of it has to pass.
  std::this_thread::sleep_for(milliseconds(600));
  first_half_read.set_value();
  const MediaTime before = frame->time;
  while (const FramePtr next = source->Next()) frame = next;
  EXPECT_EQ(frame->index, 11);
  EXPECT_GT((frame->time - before).seconds(), 0.5) << "7 frames at 25 a second would be 0.28 s";
}

TEST_F(SourceTest, CancelWakesAReaderOfAStalledStream) {
  SKIP_WITHOUT("souphttpsrc", "jpegenc", "multipartmux");
  const std::string bytes =
      ReadBytes(MakeBars("a.mjpg", "jpegenc ! multipartmux boundary=sluice", Constant(25, 20)));
  std::unique_ptr<Source> source;
  std::promise<void> opened;
  HttpServer server([&](int connection, const std::string&) {
    HttpServer::Send(connection,
                     "HTTP/1.0 200 OK\r\n"
                     "Content-Type: multipart/x-mixed-replace; boundary=sluice\r\n\r\n" +
                         bytes);
    opened.get_future().wait();
    source->Cancel();
    HttpServer::Hold(connection);
  });
  source = Source::Open(server.url("/camera"), All());
  opened.set_value();
  while (source->Next()) {
  }
  EXPECT_EQ(source->Next(), nullptr);
  source.reset();
}

TEST_F(SourceTest, KeepsPasswordsOutOfMessages) {
  SKIP_WITHOUT("rtspsrc");
  SourceOptions options = All();
  options.stall_timeout = milliseconds(3000);
  const std::string error = Read("rtsp://user:hunter2@127.0.0.1:1/stream", options).error;
  EXPECT_THAT(error, AllOf(HasSubstr("rtsp://***@127.0.0.1:1"), Not(HasSubstr("hunter2"))));
}

// ---- Real footage ------------------------------------------------------------------------------

TEST_F(SourceTest, ReadsRealFootageAsItsIndexSays) {
  const char* const footage = std::getenv("SLUICE_FOOTAGE");
  if (!footage) GTEST_SKIP() << "SLUICE_FOOTAGE names no directory with OpenCV's sample videos";
  const fs::path clips = footage;
  SourceOptions options;
  options.rate.fps = 2;
  const Outcome out = Read(clips / "vtest.avi", options);
  EXPECT_EQ(out.error, "");
  EXPECT_EQ(out.warning, std::nullopt);
  EXPECT_EQ(out.frames.size(), 159u);  // 795 frames at 10 a second
  EXPECT_EQ(out.info.width, 768);
  EXPECT_EQ(out.info.height, 576);
  EXPECT_NEAR(out.frames.back()->time.seconds(), 79.0, 1e-3);
  for (const char* name : {"Megamind.avi", "tree.avi"}) {
    const Outcome clip = Read(clips / name, options);
    EXPECT_EQ(clip.error, "") << name;
    EXPECT_EQ(clip.warning, std::nullopt) << name;
    ASSERT_TRUE(clip.info.duration);
    EXPECT_NEAR(static_cast<double>(clip.frames.size()), 2 * clip.info.duration->seconds(), 1)
        << name;
  }
}

}  // namespace
}  // namespace sluice
