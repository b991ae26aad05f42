// Recordings as others write them, made here by GStreamer: what each shows is known, so grey
// pictures, missing ones and false warnings are seen.
#include <gmock/gmock.h>
#include <gst/gst.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string>

#include "runtime/error.h"
#include "streaming/source.h"
#include "tests/support/moving_pictures.h"

namespace sluice {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

struct Outcome {
  SourceInfo info;
  std::vector<FramePtr> frames;
  std::string warning, error;
};

// The average of all channels.
double Brightness(const Frame& frame) {
  double sum = 0;
  for (const uint8_t level : frame.rgb) sum += level;
  return sum / static_cast<double>(frame.rgb.size());
}

Outcome Read(const std::string& path, std::optional<double> begin = std::nullopt) {
  Outcome out;
  SourceOptions options;
  options.rate.every_nth = 1;
  if (begin) options.begin = MediaTime::FromSeconds(*begin);
  try {
    const auto source = Source::Open(path, options);
    out.info = source->info();
    while (FramePtr frame = source->Next()) {
      if (!out.frames.empty()) {
        EXPECT_GT(frame->time, out.frames.back()->time);
      }
      out.frames.push_back(frame);
    }
    out.warning = source->warning().value_or("");
  } catch (const InputError& error) {
    out.error = error.what();
  }
  return out;
}

class FormatsTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { gst_init(nullptr, nullptr); }
  void SetUp() override {
#ifdef __SANITIZE_THREAD__
    GTEST_SKIP() << "GStreamer is not instrumented, each of its handovers would look like a race";
#endif
    for (const char* name : {"x264enc", "mp4mux", "matroskamux", "mpegtsmux", "avenc_ffv1"}) {
      GstElementFactory* factory = gst_element_factory_find(name);
      if (!factory) GTEST_SKIP() << "GStreamer's " << name << " is missing";
      gst_object_unref(factory);
    }
    const auto* test = ::testing::UnitTest::GetInstance()->current_test_info();
    directory_ = fs::temp_directory_path() /
                 ("sluice_formats_" + std::to_string(getpid()) + "_" + test->name());
    fs::create_directories(directory_);
  }
  void TearDown() override {
    if (!directory_.empty()) fs::remove_all(directory_);
  }

  static GstPadProbeReturn DropTheFirstTen(GstPad*, GstPadProbeInfo*, gpointer left) {
    int& count = *static_cast<int*>(left);
    return count > 0 && count-- > 0 ? GST_PAD_PROBE_DROP : GST_PAD_PROBE_OK;
  }

  // Runs `pipeline`, in gst-launch notation, with FILE standing for the path that is returned.
  // Of an element named "cut" the first ten buffers are dropped.
  std::string Make(const std::string& name, std::string pipeline) const {
    const std::string path = directory_ / name;
    pipeline.replace(pipeline.find("FILE"), 4, "filesink location=\"" + path + "\"");
    GError* error = nullptr;
    GstElement* made = gst_parse_launch(pipeline.c_str(), &error);
    EXPECT_EQ(error, nullptr) << pipeline << ": " << error->message;
    if (GstElement* cut = gst_bin_get_by_name(GST_BIN(made), "cut")) {
      GstPad* pad = gst_element_get_static_pad(cut, "sink");
      gst_pad_add_probe(pad, GST_PAD_PROBE_TYPE_BUFFER, &DropTheFirstTen, new int{10},
                        [](gpointer left) { delete static_cast<int*>(left); });
      gst_object_unref(pad);
      gst_object_unref(cut);
    }
    gst_element_set_state(made, GST_STATE_PLAYING);
    GstBus* bus = gst_element_get_bus(made);
    GstMessage* message = gst_bus_timed_pop_filtered(
        bus, 60 * GST_SECOND, static_cast<GstMessageType>(GST_MESSAGE_EOS | GST_MESSAGE_ERROR));
    EXPECT_TRUE(message && GST_MESSAGE_TYPE(message) == GST_MESSAGE_EOS) << pipeline;
    if (message) gst_message_unref(message);
    gst_object_unref(bus);
    gst_element_set_state(made, GST_STATE_NULL);
    gst_object_unref(made);
    return path;
  }

  std::string Write(const std::string& name, const std::string& bytes) const {
    std::ofstream(directory_ / name, std::ios::binary) << bytes;
    return directory_ / name;
  }

  static std::string Bytes(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }

  fs::path directory_;
};

std::string Pictures(const std::string& pattern, int count, const std::string& more = "") {
  return "videotestsrc pattern=" + pattern + " num-buffers=" + std::to_string(count) + " " + more +
         " ! video/x-raw,width=64,height=48,framerate=25/1";
}
constexpr char kX264[] =
    " ! x264enc speed-preset=ultrafast bframes=2 b-adapt=false key-int-max=25 ! h264parse";
constexpr char kSound[] =
    "audiotestsrc samplesperbuffer=4800 ! audio/x-raw,rate=48000 ! avenc_aac ! m. ";

std::string Sound(int tenths) {
  std::string sound = kSound;
  return sound.insert(sound.find(" "), " num-buffers=" + std::to_string(tenths));
}

TEST_F(FormatsTest, ReadsPicturesThatBeginLaterThanTheirFile) {
  for (const std::string mux : {"mp4mux", "matroskamux"}) {
    SCOPED_TRACE(mux);
    const Outcome out = Read(Make(
        "late." + mux, Pictures("ball", 40, "timestamp-offset=1500000000") + kX264 +
                           " ! queue max-size-time=0 ! " + mux + " name=m ! FILE " + Sound(31)));
    EXPECT_EQ(out.error, "");
    EXPECT_EQ(out.warning, "");
    ASSERT_EQ(out.frames.size(), 40u);
    EXPECT_EQ(out.frames[0]->time, MediaTime());
  }
}

TEST_F(FormatsTest, TakesSoundThatOutlastsThePictureForNoDamage) {
  const Outcome out = Read(Make(
      "long.mp4", Pictures("ball", 75) + kX264 + " ! queue ! mp4mux name=m ! FILE " + Sound(60)));
  EXPECT_EQ(out.error, "");
  EXPECT_EQ(out.warning, "");
  EXPECT_EQ(out.frames.size(), 75u);
}

TEST_F(FormatsTest, ConvertsEveryLayoutOfPixels) {
  for (const std::string format : {"Y42B", "Y41B", "Y444", "I422_10LE", "BGRA"}) {
    SCOPED_TRACE(format);
    const Outcome out = Read(Make(format + ".mkv",
                                  "videotestsrc pattern=white num-buffers=3 ! "
                                  "video/x-raw,width=64,height=48,format=" +
                                      format + " ! avenc_ffv1 ! matroskamux ! FILE"));
    EXPECT_EQ(out.error, "");
    ASSERT_EQ(out.frames.size(), 3u);
    EXPECT_GT(Brightness(*out.frames[0]), 250);
  }
}

TEST_F(FormatsTest, ShowsNothingBeforeTheFirstKeyFrameAndSaysSo) {
  const std::string path =
      Make("cut.mkv", Pictures("white", 100) + kX264 + " ! identity name=cut ! matroskamux ! FILE");
  const Outcome out = Read(path);
  EXPECT_EQ(out.error, "");
  EXPECT_THAT(out.warning, HasSubstr("15 pictures before the first key frame could not be shown"));
  ASSERT_EQ(out.frames.size(), 75u);
  for (const FramePtr& frame : out.frames) EXPECT_GT(Brightness(*frame), 250);
}

TEST_F(FormatsTest, NamesAStreamWithoutAKeyFrame) {
  const Outcome out = Read(
      Make("cut.mkv", Pictures("white", 20) + kX264 + " ! identity name=cut ! matroskamux ! FILE"));
  EXPECT_THAT(out.error, HasSubstr("none of its 10 pictures is a key frame"));
}

TEST_F(FormatsTest, ReadsOneAndTheSameOfTwoTracksAlsoAfterASeek) {
  const std::string path =
      Make("two.mkv", Pictures("white", 75) + kX264 + " ! queue ! matroskamux name=m ! FILE " +
                          Pictures("black", 75) + kX264 + " ! queue ! m.");
  for (const double begin : {0.0, 1.5}) {
    const Outcome out = Read(path, begin);
    EXPECT_EQ(out.error, "");
    EXPECT_EQ(out.warning, "");
    ASSERT_EQ(out.frames.size(), begin > 0 ? 37u : 75u);
    const double first = Brightness(*Read(path).frames[0]);
    for (const FramePtr& frame : out.frames) EXPECT_NEAR(Brightness(*frame), first, 3);
  }
}

TEST_F(FormatsTest, GivesNoThreadToTracksThatNobodyReads) {
  std::string pipeline = Pictures("ball", 50) + kX264 + " ! queue ! matroskamux name=m ! FILE ";
  for (int i = 0; i < 40; ++i) pipeline += Sound(5);
  const std::string path = Make("many.mkv", pipeline);
  const auto threads = [] {
    return std::distance(fs::directory_iterator("/proc/self/task"), fs::directory_iterator());
  };
  const auto before = threads();
  SourceOptions options;
  options.rate.every_nth = 1;
  const auto source = Source::Open(path, options);
  ASSERT_NE(source->Next(), nullptr);
  // A decoder may take one for each core.
  EXPECT_LE(threads() - before, 12 + sysconf(_SC_NPROCESSORS_ONLN));
}

TEST_F(FormatsTest, ReadsOnWhereRecordingsAreJoined) {
  const auto part = [&](const std::string& name, const std::string& rest) {
    return Bytes(Make(name, Pictures("ball", 50) + rest + " ! FILE"));
  };
  const std::string ts = std::string(kX264) + " ! m.sink_200 mpegtsmux name=m ";
  const std::vector<std::pair<std::string, std::string>> joined = {
      {"joined.ts", part("a.ts", std::string(kX264) + " ! mpegtsmux") +
                        part("b.ts", ts + "prog-map=\"program_map,sink_200=(int)2\"")},
      {"joined.ogv",
       part("a.ogv", " ! theoraenc ! oggmux") + part("b.ogv", " ! theoraenc ! oggmux")}};
  for (const auto& [name, bytes] : joined) {
    SCOPED_TRACE(name);
    const Outcome out = Read(Write(name, bytes));
    EXPECT_EQ(out.error, "");
    EXPECT_EQ(out.frames.size(), 100u);
  }
}

TEST_F(FormatsTest, BeginsWhereAWholeReadingWouldBe) {
  for (const std::string mux : {"mp4mux", "mp4mux fragment-duration=500", "mpegtsmux",
                                "matroskamux streamable=true", "matroskamux"}) {
    SCOPED_TRACE(mux);
    std::string x264 = kX264;
    // The writer of fragments loses pictures out of order.
    if (mux.find("fragment") != mux.npos) x264.replace(x264.find("bframes=2"), 9, "bframes=0");
    const std::string path =
        Make("a." + mux.substr(0, 5), Pictures("ball", 100) + x264 + " ! " + mux + " ! FILE");
    const Outcome whole = Read(path), part = Read(path, 2.7);
    EXPECT_EQ(part.error, "");
    EXPECT_EQ(part.warning, "");
    ASSERT_EQ(whole.frames.size(), 100u);
    constexpr size_t kPassed = 68;  // 2.72 s
    ASSERT_EQ(part.frames.size(), whole.frames.size() - kPassed);
    for (size_t i = 0; i < part.frames.size(); ++i) {
      EXPECT_EQ(part.frames[i]->time, whole.frames[kPassed + i]->time);
      EXPECT_EQ(part.frames[i]->rgb, whole.frames[kPassed + i]->rgb);
    }
    EXPECT_THAT(Read(path, 60).error, HasSubstr("but the stream ends at 00:00:03."));
  }
}

TEST_F(FormatsTest, HonoursTheRangeThatAnMp4States) {
  std::string bytes = Bytes(Make("a.mp4", Pictures("white", 3) + ",format=I420,colorimetry=bt709" +
                                              kX264 + " ! mp4mux ! FILE"));
  EXPECT_GT(Brightness(*Read(directory_ / "a.mp4").frames.at(0)), 252);
  const size_t colr = bytes.find("colrnclx");
  ASSERT_NE(colr, std::string::npos);
  bytes[colr + 14] = static_cast<char>(0x80);
  EXPECT_NEAR(Brightness(*Read(Write("full.mp4", bytes)).frames.at(0)), 235, 2);
}

TEST_F(FormatsTest, TurnsAJpegAsItsExifSays) {
  std::string jpeg = Bytes(Make("a.jpg", Pictures("white", 1) + " ! jpegenc ! FILE"));
  // One entry: orientation (0x112), a short, 6: turn clockwise.
  const std::string tiff("MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0", 26);
  const std::string exif = std::string("Exif\0\0", 6) + tiff;
  jpeg.insert(2, std::string("\xff\xe1\0", 3) + static_cast<char>(exif.size() + 2) + exif);
  const Outcome out = Read(Write("turned.jpg", jpeg));
  EXPECT_EQ(out.error, "");
  ASSERT_EQ(out.frames.size(), 1u);
  EXPECT_EQ(out.frames[0]->width, 48);
  EXPECT_EQ(out.frames[0]->height, 64);
  EXPECT_EQ(out.info.width, 48);
}

TEST_F(FormatsTest, ReadsEveryPictureOfAMovingWebpWithItsTime) {
  const std::string bytes = testing::MovingWebp({20, 80, 140, 200});
  const Outcome out = Read(Write("a.webp", bytes));
  EXPECT_EQ(out.error, "");
  EXPECT_EQ(out.warning, "");
  ASSERT_EQ(out.frames.size(), 4u);
  for (int i = 0; i < 4; ++i) {
    EXPECT_NEAR(out.frames[i]->time.seconds(), i * i * 0.1, 1e-9);
    EXPECT_NEAR(Brightness(*out.frames[i]), 60 * i + 20, 1);
  }
  EXPECT_EQ(Read(directory_ / "a.webp", 0.3).frames.size(), 2u);
  const Outcome cut = Read(Write("cut.webp", bytes.substr(0, bytes.size() / 2)));
  EXPECT_NE(cut.error + cut.warning, "");
}

TEST_F(FormatsTest, MapsWideLightAndColoursToOrdinaryOnes) {
  // In PQ, HLG and BT.2020, the same white of 78 % of the signal.
  const std::string grey =
      "videotestsrc pattern=solid-color foreground-color=0xffc8c8c8 "
      "num-buffers=2 ! video/x-raw,format=ARGB,width=64,height=48 ! "
      "videoconvert ! video/x-raw,format=I420_10LE,colorimetry=";
  const std::string rest =
      " ! x264enc speed-preset=ultrafast qp-max=10 ! h264parse ! matroskamux ! FILE";
  const auto read = [&](const std::string& name) {
    const Outcome out = Read(Make(name + ".mkv", grey + name + rest));
    EXPECT_EQ(out.error, "");
    return out.frames.empty() ? 0.0 : Brightness(*out.frames[0]);
  };
  EXPECT_NEAR(read("bt709"), 200, 3);
  EXPECT_NEAR(read("bt2020"), 200, 4);
  EXPECT_GT(read("bt2100-pq"), 245);        // about 1500 cd/m2
  EXPECT_NEAR(read("bt2100-hlg"), 242, 4);  // 250 cd/m2: m = 1.23, T(m) = 0.885
}

TEST_F(FormatsTest, SaysWhatATransportStreamThatWasJoinedMidwayDoesNotShow) {
  const std::string whole =
      Bytes(Make("a.ts", Pictures("white", 100) + kX264 + " ! mpegtsmux ! FILE"));
  constexpr size_t kPacket = 188;
  const size_t third = whole.size() / kPacket / 3 * kPacket;
  const Outcome out = Read(Write("midway.ts", whole.substr(third)));
  EXPECT_EQ(out.error, "");
  EXPECT_THAT(out.warning, AllOf(HasSubstr("its first 0."),
                                 HasSubstr("before the first key frame, could not be shown")));
  EXPECT_THAT(out.frames.size(), ::testing::AnyOf(50u, 75u));
  for (const FramePtr& frame : out.frames) EXPECT_GT(Brightness(*frame), 250);

  const std::string end =
      Read(Write("end.ts", whole.substr(whole.size() - whole.size() / kPacket / 8 * kPacket)))
          .error;
  EXPECT_THAT(end, AllOf(HasSubstr("no key frame"), Not(HasSubstr("not a media file"))));
}

TEST_F(FormatsTest, CountsDamagedPicturesThatTheDecoderConceals) {
  std::string bytes = Bytes(Make("a.mp4", Pictures("snow", 50) + kX264 + " ! mp4mux ! FILE"));
  // In the middle of two pictures, whose beginnings say what they are.
  const size_t data = bytes.find("mdat"), size = bytes.size() - data;
  for (const size_t part : {3, 6}) {
    std::fill_n(bytes.begin() + static_cast<ptrdiff_t>(data + size * part / 10), 8, '\x55');
  }
  const Outcome out = Read(Write("hurt.mp4", bytes));
  EXPECT_EQ(out.error, "");
  EXPECT_GT(out.frames.size(), 45u);
  EXPECT_THAT(out.warning, HasSubstr(" pictures are damaged, the decoder made up"));
  EXPECT_EQ(Read(directory_ / "a.mp4").warning, "");
}

TEST_F(FormatsTest, CountsPicturesThatCannotBeDecoded) {
  std::string bytes = Bytes(Make("a.mp4", Pictures("snow", 50) + kX264 + " ! mp4mux ! FILE"));
  const size_t at = bytes.find("mdat") + bytes.size() / 3;
  std::fill_n(bytes.begin() + static_cast<ptrdiff_t>(at), bytes.size() / 5, '\xff');
  const Outcome out = Read(Write("hurt.mp4", bytes));
  EXPECT_EQ(out.error, "");
  EXPECT_LT(out.frames.size(), 50u);
  EXPECT_THAT(out.warning, HasSubstr("of 50 pictures could not be decoded"));
}

}  // namespace
}  // namespace sluice
