// Writes the seeds of all fuzzers: `make_seeds tests/fuzz/corpus`. To be run again when a format or
// the tiny checkpoints change.
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "proto/image_decoder.h"
#include "proto/messages.h"
#include "runtime/safetensors.h"
#include "streaming/engine.h"
#include "streaming/pipeline.h"
#include "streaming/session_file.h"
#include "tests/fuzz/targets.h"
#include "tests/support/picture_files.h"

namespace sluice {
namespace {

const std::filesystem::path kGolden = std::filesystem::path(SLUICE_SOURCE_DIR) / "tests/golden";

std::string Read(const std::filesystem::path& file) {
  std::ifstream in(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

FramePtr Noise(int side, int index) {
  auto frame = std::make_shared<Frame>();
  frame->width = frame->height = side;
  frame->index = index;
  frame->time = MediaTime::FromSeconds(index);
  std::mt19937 random(index);
  for (int i = 0; i < side * side * 3; ++i) frame->rgb.push_back(static_cast<uint8_t>(random()));
  return frame;
}

class Seeds {
 public:
  explicit Seeds(std::filesystem::path root) : root_(std::move(root)) {}
  std::filesystem::path File(const std::string& target, const std::string& name) const {
    std::filesystem::create_directories(root_ / target);
    return root_ / target / ("seed_" + name);
  }
  void Write(const std::string& target, const std::string& name, const std::string& bytes) const {
    std::ofstream(File(target, name), std::ios::binary) << bytes;
  }

  void Safetensors() const {
    Tensor matrix(DType::kF32, {3, 5}), vector(DType::kBF16, {7});
    std::memset(matrix.view().raw(), 1, matrix.SizeBytes());
    std::memset(vector.view().raw(), 2, vector.SizeBytes());
    WriteSafetensors(File("safetensors", "two_tensors"),
                     {{"layer.weight", matrix.view()}, {"layer.bias", vector.view()}},
                     {{"format", "pt"}});
    WriteSafetensors(File("safetensors", "one_tensor"), {{"a", vector.view()}}, {});
  }

  void Configs() const {
    for (size_t c = 0; c < std::size(kConfigCheckpoints); ++c) {
      const std::string checkpoint = kConfigCheckpoints[c];
      for (size_t f = 0; f < std::size(kConfigFiles); ++f) {
        const std::string file = kConfigFiles[f];
        std::string bytes = Read(kGolden / checkpoint / file);
        if (f == std::size(kConfigFiles) - 1 && c == 2) bytes = Index(kGolden / checkpoint);
        if (bytes.empty()) continue;
        Write("config", checkpoint + "_" + file,
              static_cast<char>(c * std::size(kConfigFiles) + f) + bytes);
      }
    }
  }

  void SessionFiles() const {
    EngineOptions engine_options;
    engine_options.model = kGolden / "tiny_tied";
    engine_options.vlm.compute_type = DType::kF32;
    engine_options.num_threads = 1;
    const Engine engine(engine_options);
    const auto ctx = engine.NewContext();
    SessionOptions plain;
    plain.generate.max_new_tokens = 2;
    SessionOptions methods = plain;
    methods.duplicate_threshold = 1;
    methods.cacher = StcCacherOptions{};
    methods.pyramid.mode = PyramidMode::kReplay;
    methods.pyramid.stages = 2;
    SessionOptions memory = plain;
    memory.memory = MemoryOptions{.window_tokens = 70, .recall_blocks = 2, .int8 = true};
    Session(*ctx, engine, plain, "empty", 0);
    Session(*ctx, engine, plain, "one_turn", 1);
    Session(*ctx, engine, methods, "methods", 1);
    Session(*ctx, engine, memory, "memory", 12);
  }

  void Images() const {
    const Frame noise = *Noise(9, 1), smooth = SmoothPicture(24, 17);
    const std::string tiff = OrientationTiff(6);
    Write("jpeg", "baseline", JpegFile(noise));
    Write("jpeg", "progressive", ProgressiveJpegFile(smooth));
    Write("jpeg", "turned",
          WithJpegSegment(JpegFile(smooth), 0xE1, std::string("Exif\0\0", 6) + tiff));
    Write("jpeg", "ycck",
          JpegFile(4, 4, JCS_CMYK, noise.rgb.data(),
                   [](jpeg_compress_struct& info) { jpeg_set_colorspace(&info, JCS_YCCK); }));
    Write("png", "rgb", PngFile(noise));
    Write("png", "interlaced", PngFile(smooth, /*interlaced=*/true));
    Write("png", "turned", WithPngChunks(PngFile(smooth), PngChunk("eXIf", tiff)));
    Write("png", "palette", PngFile(9, 9, PNG_COLOR_TYPE_PALETTE, 4, noise.rgb, 5));
    Write("png", "deep", PngFile(4, 4, PNG_COLOR_TYPE_RGB_ALPHA, 16, noise.rgb, 32));
    Write("webp", "lossy", WebpFile(smooth, false));
    Write("webp", "lossless", WebpFile(noise, true));
    Write("webp", "turned", WithWebpExif(smooth, WebpFile(smooth, true), tiff));
  }

  void Requests() const {
    v1::SessionRequest request;
    v1::ModelOptions& options = *request.mutable_open()->mutable_options();
    Write("request", "open_defaults", request.SerializeAsString());
    request.mutable_open()->mutable_budgets()->set_answer_seconds(3);
    request.mutable_open()->mutable_budgets()->set_kv_bytes(1 << 20);
    options.set_preset(v1::PRESET_FAST);
    options.set_cacher(true);
    options.set_cacher_ratio(0.5);
    options.add_compress("stc-pruner=0.5");
    options.set_system("Be brief.");
    options.mutable_generation()->set_top_k(5);
    Write("request", "open_methods", request.SerializeAsString());
    options.mutable_memory()->set_host_bytes(1 << 20);
    options.mutable_memory()->set_window_tokens(500);
    Write("request", "open_memory", request.SerializeAsString());
    v1::ModelOptions& changed = *request.mutable_set_options()->mutable_options();
    changed.set_turbo(0.25);
    changed.set_turbo_lambda(1);
    changed.set_pyramid_drop("replay=0.5");
    changed.set_pyramid_stages(2);
    Write("request", "set_options", request.SerializeAsString());
    v1::Frame& frame = *request.mutable_frame();
    frame.set_number(7);
    frame.set_media_seconds(1.5);
    frame.set_jpeg(EncodeJpeg(*Noise(9, 2)));
    Write("request", "frame_jpeg", request.SerializeAsString());
    frame.mutable_rgb()->set_width(2);
    frame.mutable_rgb()->set_height(1);
    frame.mutable_rgb()->set_data("abcdef");
    Write("request", "frame_rgb", request.SerializeAsString());
    v1::Ask& ask = *request.mutable_standing_question()->mutable_ask();
    ask.set_question_id(3);
    ask.set_text("What is there?");
    ask.mutable_generation()->add_stop_strings("end");
    ask.mutable_generation()->set_temperature(0.5);
    Write("request", "standing_question", request.SerializeAsString());
    request.mutable_ask()->set_text("Is it on?");
    Write("request", "ask", request.SerializeAsString());
  }

  void Calls() const {
    v1::SessionRequest open, frame, ask, standing, cancel, close, now;
    open.mutable_open();
    frame.mutable_frame()->mutable_rgb()->set_width(2);
    frame.mutable_frame()->mutable_rgb()->set_height(1);
    frame.mutable_frame()->mutable_rgb()->set_data("abcdef");
    ask.mutable_ask()->set_question_id(1);
    ask.mutable_ask()->set_text("What is there?");
    standing.mutable_standing_question()->mutable_ask()->set_question_id(2);
    standing.mutable_standing_question()->mutable_ask()->set_text("Is it on?");
    cancel.mutable_cancel()->set_question_id(1);
    close.mutable_close();
    now.mutable_close()->set_at_once(true);
    const std::string begin = Step(open) + Step(frame) + Step(ask);
    Write("call", "close", begin + Step(close));
    Write("call", "close_at_once", begin + Step(standing) + Step(now));
    Write("call", "half_close", begin + static_cast<char>(kCallHalfClose));
    Write("call", "cancel", begin + Step(cancel) + static_cast<char>(kCallCancel));
    Write("call", "break_write", begin + static_cast<char>(kCallBreakWrite) + Step(ask));
    Write("call", "lose_token", begin + static_cast<char>(kCallLoseToken));
    Write("call", "message_before_open", Step(ask));
  }

  void Playlists() const {
    const std::string media =
        "#EXTM3U\n#EXT-X-VERSION:7\n#EXT-X-TARGETDURATION:12\n#EXT-X-PLAYLIST-TYPE:VOD\n"
        "#EXT-X-PROGRAM-DATE-TIME:2026-01-01T00:00:00Z\n#EXTINF:12,one\n{listed}/clip.mp4\n"
        "#EXT-X-DISCONTINUITY\n#EXT-X-BYTERANGE:100@0\n#EXTINF:12,\nclip.mp4\n#EXT-X-ENDLIST\n";
    Write("playlist", "media", media);
    Write("playlist", "media_elsewhere", media + "#EXTINF:12,\n{unlisted}/clip.mp4\n");
  }

 private:
  static std::string Step(const v1::SessionRequest& request) {
    const std::string bytes = request.SerializeAsString();
    return std::string(1, '\0') + static_cast<char>(bytes.size() & 0xFF) +
           static_cast<char>(bytes.size() >> 8) + bytes;
  }
  void Session(ExecContext& ctx, const Engine& engine, const SessionOptions& options,
               const std::string& name, int frames) const {
    const auto session = engine.NewSession(options);
    for (int i = 0; i < frames; ++i) Ingest(ctx, *session, std::vector<FramePtr>{Noise(74, i)});
    if (frames > 0) Ask(ctx, *session, "What?", nullptr);
    SaveSession(ctx, *session, File("session_file", name));
  }
  static std::string Index(const std::filesystem::path& checkpoint) {
    std::string text = "{\"weight_map\":{";
    const Checkpoint weights = Checkpoint::Open(checkpoint);
    for (const auto& [name, entry] : weights.tensors()) {
      text += (text.back() == '{' ? "\"" : ",\"") + name + "\":\"shard.safetensors\"";
    }
    return text + "}}";
  }
  std::filesystem::path root_;
};

}  // namespace
}  // namespace sluice

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "[make_seeds] expected the directory of the corpora\n");
    return 2;
  }
  const sluice::Seeds seeds(argv[1]);
  seeds.Safetensors();
  seeds.Write("tokenizer", "byte_level",
              sluice::Read(sluice::kGolden / "tokenizer/byte_level.json"));
  seeds.Write("tokenizer", "metaspace", sluice::Read(sluice::kGolden / "tokenizer/metaspace.json"));
  seeds.Configs();
  seeds.SessionFiles();
  seeds.Images();
  seeds.Requests();
  seeds.SourceUrls();
  seeds.Calls();
  seeds.Playlists();
}
