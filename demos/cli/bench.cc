// sluice bench: what each stage reaches, as a share of what this machine was measured to reach.
//
// Every figure is of the fastest of several repetitions, peaks and stages alike: what else runs on
// the machine only ever adds time. With a memory it is frames a second instead, whose window slides
// or does not.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <functional>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "compression/registry.h"
#include "demos/cli/commands.h"
#include "demos/cli/common.h"
#include "demos/cli/help.h"
#include "demos/cli/methods.h"
#include "demos/world/random.h"
#include "runtime/error.h"
#include "runtime/ops/cuda/copies.h"
#include "runtime/ops/linear.h"
#include "runtime/parallel.h"
#include "runtime/transfer.h"
#include "streaming/pipeline.h"
#include "vision/preprocess.h"

namespace sluice::cli {
namespace {

struct BenchFlags {
  ModelFlags model;
  MethodFlags methods;
  int batch = 8;            // frames
  int context_frames = 16;  // decoded after so many frames
  int sessions = 1;         // that decode together
  double seconds = 2.0;     // at least so long a figure
  bool json = false;
};

// Seconds of the fastest run of `work`, repeated for `budget` seconds and at least three times
// after one to warm up.
double FastestSeconds(double budget, const std::function<void()>& work) {
  using Clock = std::chrono::steady_clock;
  work();
  double fastest = 1e30, total = 0;
  for (int i = 0; i < 3 || total < budget; ++i) {
    const auto begin = Clock::now();
    work();
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    fastest = std::min(fastest, seconds);
    total += seconds;
  }
  return fastest;
}

// Numbers in [-1, 1): zeros would multiply faster than anything real on some machines.
Tensor RandomTensor(DType dtype, Shape shape, uint64_t seed, Device device = Device::kCpu) {
  Tensor values(DType::kF32, shape);
  world::Random random(seed);
  float* out = values.data<float>();
  for (int64_t i = 0; i < shape.NumElements(); ++i) out[i] = random.Range(-1.0f, 1.0f);
  return Placed(dtype == DType::kF32 ? std::move(values) : ConvertTo(values, dtype), device);
}

struct Peak {
  double gflops = 0;  // the most that was reached
  int64_t size = 0;   // by a square product of this side; 0: by a stage
  double read_gbps = 0;
};

// The most that a large square product reaches, over sides of 1024, 2048, 4096 and, on a GPU, 8192,
// up to the first whose product takes longer than `seconds`.
void MeasureProducts(ExecContext& ctx, DType dtype, double seconds, Peak& peak) {
  std::vector<int64_t> sides = {1024, 2048, 4096};
  if (ctx.device() == Device::kCuda) sides.push_back(8192);
  for (const int64_t side : sides) {
    auto keeper = std::make_shared<Tensor>(RandomTensor(dtype, {side, side}, 1));
    SharedMatrix matrix;
    matrix.view = keeper->view();
    matrix.keeper = std::move(keeper);
    const LinearWeight weight(std::move(matrix), Tensor(), ctx.device());
    const Tensor x = RandomTensor(dtype, {side, side}, 2, ctx.device());
    const Tensor y(dtype, {side, side}, ctx.device());
    const double fastest = FastestSeconds(seconds / 3, [&] {
      Linear(ctx, x, weight, y);
      ctx.Synchronize();
    });
    const double gflops = 2e-9 * static_cast<double>(side * side * side) / fastest;
    if (gflops > peak.gflops) {
      peak.gflops = gflops;
      peak.size = side;
    }
    if (fastest > seconds) break;
  }
}

// Sums `count` words in `Streams` places at once: some machines read faster from several.
template <int Streams>
uint64_t Sum(const uint64_t* words, int64_t count) {
  constexpr int kLanes = 8;  // so that loads wait for memory and not for the sum before
  const int64_t each = count / Streams / kLanes * kLanes;
  uint64_t sums[Streams][kLanes] = {};
  for (int64_t i = 0; i < each; i += kLanes) {
    for (int s = 0; s < Streams; ++s) {
      for (int j = 0; j < kLanes; ++j) sums[s][j] += words[s * each + i + j];
    }
  }
  return std::accumulate(&sums[0][0], &sums[0][0] + Streams * kLanes, uint64_t{0});
}

// GB/s of reading a buffer far larger than any cache, in memory of the engine's own kind, on all
// threads; of one and of four places a thread, whichever is faster.
double MeasureRead(ExecContext& ctx, double seconds) {
  constexpr int64_t kWords = int64_t{1} << 26;  // 512 MiB
  if (ctx.device() == Device::kCuda) {
    // Half of what a copy moves is read, half written.
    const Tensor from = RandomTensor(DType::kF32, {2 * kWords}, 8, ctx.device());
    const Tensor to(DType::kF32, from.shape(), ctx.device());
    return 2e-9 * static_cast<double>(from.SizeBytes()) / FastestSeconds(seconds, [&] {
             Transfer(ctx, from, to);
             ctx.Synchronize();
           });
  }
  const Tensor buffer(DType::kU8, {kWords * 8});
  auto* words = static_cast<uint64_t*>(buffer.view().raw());
  std::iota(words, words + kWords, uint64_t{1});
  std::atomic<uint64_t> total = 0;
  const auto measure = [&](auto sum) {
    return FastestSeconds(seconds / 2, [&] {
      ParallelFor(ctx, kWords, 1 << 16,
                  [&](int64_t begin, int64_t end) { total += sum(words + begin, end - begin); });
    });
  };
  const double fastest = std::min(measure(Sum<1>), measure(Sum<4>));
  // What was read must matter to somebody, or the compiler would not read it.
  if (total == 0) throw Error("[bench] the sum of what was read is 0");
  return static_cast<double>(kWords) * 8e-9 / fastest;
}

// One picture of noise, a tenth of which is drawn anew in every frame: what can be reused, is.
std::vector<FramePtr> NoiseFrames(int count) {
  std::vector<FramePtr> frames;
  world::Random random(3);
  std::vector<uint8_t> rgb(size_t{640} * 360 * 3);
  for (uint8_t& value : rgb) value = static_cast<uint8_t>(random.Next());
  for (int i = 0; i < count; ++i) {
    auto frame = std::make_shared<Frame>();
    frame->width = 640;
    frame->height = 360;
    frame->rgb = rgb;
    for (size_t j = 0; j < rgb.size() / 10; ++j) {
      frame->rgb[j] = static_cast<uint8_t>(random.Next());
    }
    frame->index = i;
    frame->time = MediaTime::FromSeconds(0.5 * i);
    frames.push_back(std::move(frame));
  }
  return frames;
}

Json MeasureEncode(ExecContext& ctx, const VisionEncoder& encoder, const EncodeHooks& hooks,
                   const BenchFlags& flags) {
  const auto frames = NoiseFrames(flags.batch);
  const PreprocessConfig& config = encoder.preprocess_config();
  const Tensor pixels(DType::kF32, {flags.batch, 3, config.height, config.width}, ctx.device());
  const double preprocess = FastestSeconds(flags.seconds / 2, [&] {
    Preprocess(ctx, frames, config, pixels);
    ctx.Synchronize();
  });
  const double encode = FastestSeconds(flags.seconds, [&] {
    encoder.Encode(ctx, pixels, frames, hooks);
    ctx.Synchronize();
  });
  const StageCost& cost = ctx.tracer().stages().find("encode")->second;
  const double gflop = 1e-9 * cost.flops / static_cast<double>(cost.items);
  const double gflops = gflop * flags.batch / encode;
  return {{"batch_frames", flags.batch},
          {"preprocess_ms_per_frame", 1e3 * preprocess / flags.batch},
          {"ms_per_frame", 1e3 * encode / flags.batch},
          {"frames_per_s", flags.batch / encode},
          {"gflop_per_frame", gflop},
          {"gflops", gflops}};
}

void Step(ExecContext& ctx, const Decoder& decoder, KvCache& cache, ConstTensorView embeddings,
          TensorView logits, LayerPolicy* policy = nullptr) {
  SequenceStep step{&cache, embeddings, logits, policy};
  decoder.Step(ctx, {&step, 1});
}

// Operations of what stands in the cache from `first` on, without the lm_head.
double FlopsSince(const Decoder& decoder, const KvCache& cache, int64_t first) {
  const int64_t ran = cache.MeanRowsSince(first);  // in the mean over layers
  return static_cast<double>(ran) * decoder.FlopsPerToken(cache.MeanRows() - ran / 2);
}

// Random tokens of `count` frames.
VisualTokens RandomFrames(const Vlm& vlm, int64_t count, uint64_t seed) {
  VisualTokens tokens;
  const int64_t each = vlm.encoder().tokens_per_frame();
  tokens.features = RandomTensor(DType::kF32, {count * each, vlm.decoder().hidden_size()}, seed);
  tokens.grid_rows = 1;
  tokens.grid_cols = static_cast<int>(each);
  tokens.origins.resize(count * each);
  return tokens;
}

// As if its first frame were number `first` of the stream.
void NumberFrames(VisualTokens& tokens, int64_t first) {
  for (int64_t i = 0; i < tokens.size(); ++i) {
    tokens.origins[i].frame = static_cast<int32_t>(first + i / tokens.grid_cols);
    tokens.origins[i].col = static_cast<int16_t>(i % tokens.grid_cols);
  }
}

// What the decoder reads of `context_frames` frames, a batch of frames at a time: what the
// session's compressors leave of random tokens.
struct Arrivals {
  std::vector<VisualTokens> batches;
  int64_t tokens = 0;
  double compress_seconds = 0;  // all batches; 0 without compressors
};

Arrivals MeasureCompress(ExecContext& ctx, const BenchFlags& flags, const Session& session) {
  std::vector<VisualTokens> whole;
  for (int64_t done = 0; done < flags.context_frames; done += flags.batch) {
    const int64_t count = std::min<int64_t>(flags.batch, flags.context_frames - done);
    whole.push_back(RandomFrames(*session.vlm, count, 4 + done));
    NumberFrames(whole.back(), done);
    whole.back().features = Placed(std::move(whole.back().features), ctx.device());
  }
  const auto clones = [&] {
    std::vector<VisualTokens> batches;
    for (const VisualTokens& batch : whole) {
      batches.push_back({TransferTo(ctx, batch.features, ctx.device()),
                         batch.origins,
                         batch.grid_rows,
                         batch.grid_cols,
                         {}});
    }
    ctx.Synchronize();
    return batches;
  };
  Arrivals arrivals;
  arrivals.batches = clones();
  if (!session.options.compressors.empty()) {
    arrivals.compress_seconds = FastestSeconds(flags.seconds / 2, [&] {
      std::vector<std::unique_ptr<TokenCompressor>> compressors;  // new ones: they remember frames
      for (const std::string& spec : session.options.compressors) {
        compressors.push_back(MakeTokenCompressor(spec));
      }
      arrivals.batches = clones();
      for (VisualTokens& tokens : arrivals.batches) {
        for (const auto& compressor : compressors) {
          tokens = compressor->Compress(ctx, std::move(tokens));
        }
      }
      ctx.Synchronize();
    });
    // Copying what they take is not theirs.
    arrivals.compress_seconds -= FastestSeconds(flags.seconds / 4, [&] { clones(); });
  }
  // PyramidDrop remembers rows in host memory.
  if (session.pyramid.mode() != PyramidMode::kOff) {
    for (VisualTokens& tokens : arrivals.batches) {
      tokens.features = TransferTo(ctx, tokens.features, Device::kCpu);
    }
  }
  for (const VisualTokens& tokens : arrivals.batches) arrivals.tokens += tokens.size();
  if (arrivals.tokens == 0) {
    throw InputError("[bench] the compressors leave none of the tokens of " +
                     std::to_string(flags.context_frames) +
                     " frames; use more --context-frames or another --compress");
  }
  return arrivals;
}

// Prefills what arrives as the session's methods let it.
Json MeasurePrefill(ExecContext& ctx, const BenchFlags& flags, const Arrivals& arrivals,
                    Session& session) {
  const Decoder& decoder = session.vlm->decoder();
  KvCache& cache = session.cache;
  if (session.pyramid.wanted_instruction()) {
    QueryRecorder recorder(session.pyramid.plan());
    KvCache apart(cache.pool());
    const Tensor row = RandomTensor(DType::kF32, {1, decoder.hidden_size()}, 7);
    Step(ctx, decoder, apart, row, {}, &recorder);
    session.pyramid.SetQueries(std::move(recorder.queries));
  }
  double flops = 0;
  const double seconds = FastestSeconds(flags.seconds, [&] {
    cache.RewindTo({0});
    flops = 0;
    for (const VisualTokens& tokens : arrivals.batches) {
      if (tokens.size() == 0) continue;
      const int64_t first = cache.length();
      if (!session.pyramid.replays()) {
        Step(ctx, decoder, cache, tokens.features, {}, session.pyramid.ForFrames(tokens, first));
      }
      session.pyramid.Arrived(tokens, first);
      flops += FlopsSince(decoder, cache, first);
    }
    ctx.Synchronize();
  });
  const auto frames = static_cast<double>(flags.context_frames);
  const auto tokens = static_cast<double>(arrivals.tokens);
  const double gflops = 1e-9 * flops / seconds;
  return {{"tokens", arrivals.tokens},
          {"chunk_tokens", arrivals.batches.front().size()},
          {"ms_per_frame", 1e3 * seconds / frames},
          {"tokens_per_s", tokens / seconds},
          {"gflop_per_frame", 1e-9 * flops / frames},
          {"gflop_per_token", 1e-9 * flops / tokens},
          {"gflops", gflops},
          {"kv_rows_per_layer", cache.MeanRows()}};
}

// A question of so many tokens behind the frames, or with them where they are replayed. Leaves it
// in `cache`: the session's, or one of its own.
Json MeasureQuestion(ExecContext& ctx, const BenchFlags& flags, Session& session, KvCache& cache) {
  constexpr int64_t kText = 24;
  const Decoder& decoder = session.vlm->decoder();
  const int64_t width = decoder.hidden_size();
  const auto replayed = static_cast<int64_t>(session.pyramid.ReplayRows().size()) / width;
  const Tensor rows = RandomTensor(DType::kF32, {replayed + kText, width}, 6);
  const std::span<const float> window = session.pyramid.ReplayRows();
  std::copy(window.begin(), window.end(), rows.data<float>());
  const Tensor logits(DType::kF32, {1, decoder.vocab_size()}, ctx.device());
  const KvCache::Mark frames = cache.MarkHere();
  const double seconds = FastestSeconds(flags.seconds / 2, [&] {
    cache.RewindTo(frames);
    Step(ctx, decoder, cache, rows, logits, session.pyramid.ForQuestion(0, kText));
    ctx.Synchronize();
  });
  const double flops = FlopsSince(decoder, cache, frames.length) + decoder.LmHeadFlops();
  const double gflops = 1e-9 * flops / seconds;
  return {{"tokens", rows.dim(0)}, {"ms", 1e3 * seconds}, {"gflops", gflops}};
}

// One token after another behind what the cache holds.
Json MeasureDecode(ExecContext& ctx, const Vlm& vlm, const BenchFlags& flags, KvCache& cache) {
  constexpr int kTokens = 16;
  const Decoder& decoder = vlm.decoder();
  const Tensor row = RandomTensor(DType::kF32, {1, decoder.hidden_size()}, 5, ctx.device());
  const Tensor logits(DType::kF32, {1, decoder.vocab_size()}, ctx.device());
  const KvCache::Mark context = cache.MarkHere();
  const int64_t rows = cache.MeanRows();
  const double seconds = FastestSeconds(flags.seconds,
                                        [&] {
                                          cache.RewindTo(context);
                                          for (int i = 0; i < kTokens; ++i) {
                                            Step(ctx, decoder, cache, row, logits);
                                          }
                                          ctx.Synchronize();
                                        }) /
                         kTokens;
  const KvGeometry kv = decoder.kv_geometry();
  const double cache_bytes = 2.0 * kv.num_layers * kv.kv_heads * kv.head_dim *
                             static_cast<double>(SizeOf(kv.dtype)) *
                             (static_cast<double>(rows) + 0.5 * (kTokens + 1));
  const double bytes = static_cast<double>(decoder.WeightBytesPerToken()) + cache_bytes;
  const double gbps = 1e-9 * bytes / seconds;
  return {{"context_tokens", context.length}, {"context_rows_per_layer", rows},
          {"ms_per_token", 1e3 * seconds},    {"tokens_per_s", 1 / seconds},
          {"mb_per_token", 1e-6 * bytes},     {"gbps", gbps}};
}

// A token of each of several sessions at once, every one behind frames of its own.
Json MeasureTogether(ExecContext& ctx, const Decoder& decoder, const BenchFlags& flags,
                     const Arrivals& arrivals, const std::shared_ptr<KvBlockPool>& pool,
                     double alone_tokens_per_s) {
  constexpr int kTokens = 16;
  const int64_t sessions = flags.sessions;
  std::vector<std::unique_ptr<KvCache>> caches;
  for (int64_t i = 0; i < sessions; ++i) {
    caches.push_back(std::make_unique<KvCache>(pool));
    for (const VisualTokens& tokens : arrivals.batches) {
      if (tokens.size() > 0) Step(ctx, decoder, *caches.back(), tokens.features, {});
    }
  }
  const Tensor rows = RandomTensor(DType::kF32, {sessions, decoder.hidden_size()}, 8, ctx.device());
  const Tensor logits(DType::kF32, {sessions, decoder.vocab_size()}, ctx.device());
  const KvCache::Mark context = caches[0]->MarkHere();
  const double seconds =
      FastestSeconds(flags.seconds,
                     [&] {
                       for (const auto& cache : caches) cache->RewindTo(context);
                       for (int t = 0; t < kTokens; ++t) {
                         std::vector<SequenceStep> steps;
                         for (int64_t i = 0; i < sessions; ++i) {
                           steps.push_back({caches[i].get(), rows.view().Slice(i, i + 1),
                                            logits.view().Slice(i, i + 1)});
                         }
                         decoder.Step(ctx, steps);
                       }
                       ctx.Synchronize();
                     }) /
      kTokens;
  const double rate = static_cast<double>(sessions) / seconds;
  return {{"sessions", sessions},
          {"ms_per_step", 1e3 * seconds},
          {"tokens_per_s", rate},
          {"times_one", rate / alone_tokens_per_s}};
}

// Seconds a frame takes to ingest: everything from its pixels to the cache. `after` each batch.
double IngestSeconds(ExecContext& ctx, Session& session, const BenchFlags& flags,
                     const std::function<void()>& after) {
  constexpr int kBatches = 6;
  const std::vector<FramePtr> frames = NoiseFrames(flags.batch);
  const double seconds = FastestSeconds(flags.seconds, [&] {
    for (int i = 0; i < kBatches; ++i) {
      Ingest(ctx, session, frames);
      after();
    }
    ctx.Synchronize();
  });
  return seconds / (kBatches * flags.batch);
}

// What a memory costs: frames a second of a stream whose window slides with every batch, frames
// leaving to the store, beside one that holds as many tokens and never slides.
Json MeasureMemory(ExecContext& ctx, const Engine& engine, const SessionOptions& options,
                   const BenchFlags& flags) {
  auto session = engine.NewSession(options);
  const std::vector<FramePtr> frames = NoiseFrames(flags.batch);
  while (session->cache.gone() == 0) Ingest(ctx, *session, frames);
  ctx.tracer().Clear();
  const double sliding = IngestSeconds(ctx, *session, flags, [] {});
  const auto host_ms = [&](const char* stage) {  // of a frame; on a GPU it works on meanwhile
    const auto cost = ctx.tracer().stages().find(stage);
    const auto& all = ctx.tracer().stages().find("preprocess")->second;
    if (cost == ctx.tracer().stages().end()) return 0.0;
    return 1e3 * cost->second.seconds / static_cast<double>(all.items);
  };
  Json report = {{"batch_frames", flags.batch},
                 {"window_tokens", options.memory->window_tokens},
                 {"index_host_ms_per_frame", host_ms("index")},
                 {"trim_host_ms_per_frame", host_ms("trim")}};
  if (ctx.device() == Device::kCuda) report["gpu_bytes_in_use"] = cuda::MemoryInUse();
  if (session->memory->Recalls(session->cache)) {
    report["question_ms"] = 1e3 * FastestSeconds(flags.seconds / 4, [&] {
                              Ask(ctx, *session, "What is there?", nullptr);
                            });
  }
  session->memory->Settle();
  const StreamMemory::Counts counts = session->memory->counts();
  const int64_t left = counts.host_blocks + counts.disk_blocks;
  const double bytes = left > 0 ? static_cast<double>(counts.host_bytes + counts.disk_bytes) /
                                      static_cast<double>(left)
                                : 0.0;
  report["staged_bytes"] = session->memory->SizeBytes() - counts.host_bytes - counts.index_bytes;
  const int64_t held = static_cast<int64_t>(session->prefix_ids.size()) +
                       options.memory->window_tokens + kKvBlockTokens / 2;
  session.reset();

  SessionOptions without = options;
  without.memory.reset();
  const auto whole = engine.NewSession(without);
  while (whole->cache.length() < held) Ingest(ctx, *whole, frames);
  const auto rewind = [&] { whole->cache.RewindTo({std::min(held, whole->cache.length())}); };
  rewind();
  const double still = IngestSeconds(ctx, *whole, flags, rewind);
  report["held_tokens"] = held;
  report["sliding_frames_per_s"] = 1 / sliding;
  report["whole_frames_per_s"] = 1 / still;
  report["slower_percent"] = 100 * (sliding / still - 1);
  report["bytes_per_frame"] = bytes;
  report["host_bytes_per_s"] = bytes / sliding;
  return report;
}

void PrintMemory(const Json& memory) {
  Table table({"window of " + std::to_string(memory["window_tokens"].get<int64_t>()), "frames/s",
               "ms/frame", "MB/s to the host"});
  const double sliding = memory["sliding_frames_per_s"], whole = memory["whole_frames_per_s"];
  table.Add({"held whole", Number(whole, 2), Number(1e3 / whole, 3), "-"});
  table.Add({"sliding", Number(sliding, 2), Number(1e3 / sliding, 3),
             Number(1e-6 * memory["host_bytes_per_s"].get<double>(), 1)});
  std::printf("%s\nsliding takes %.1f %% more time", table.ToString().c_str(),
              memory["slower_percent"].get<double>());
  if (memory.contains("question_ms")) {
    std::printf("; a question that recalls, %.1f ms to its first token",
                memory["question_ms"].get<double>());
  }
  if (memory.contains("gpu_bytes_in_use")) {
    std::printf("; %.2f GB of the GPU's memory in use",
                1e-9 * memory["gpu_bytes_in_use"].get<double>());
  }
  std::printf("\n");
}

void PrintMachine(const Json& report) {
  const Json& machine = report["machine"];
  std::printf(
      "%s on %s (%s), %d threads, %s, weights in %s\n", report["model"].get<std::string>().c_str(),
      machine["model"].get<std::string>().c_str(), machine["isa"].get<std::string>().c_str(),
      machine["threads"].get<int>(), report["dtype"].get<std::string>().c_str(),
      report["weights"].get<std::string>().c_str());
}

// Adds the peak, and what each stage reached of it. A stage that was faster than all square
// products, or than reading, is the peak itself.
void JudgeByPeak(Peak peak, Json& report) {
  constexpr const char* kStages[] = {"encode", "prefill", "question"};
  for (const char* stage : kStages) {
    const double gflops = report[stage]["gflops"].get<double>();
    if (gflops > peak.gflops) peak = {.gflops = gflops, .size = 0, .read_gbps = peak.read_gbps};
  }
  Json& decode = report["decode"];
  peak.read_gbps = std::max(peak.read_gbps, decode["gbps"].get<double>());
  report["peak"] = {{"gflops", peak.gflops}, {"size", peak.size}, {"read_gbps", peak.read_gbps}};
  for (const char* stage : kStages) {
    report[stage]["percent_of_peak"] = 100 * report[stage]["gflops"].get<double>() / peak.gflops;
  }
  decode["percent_of_read_bandwidth"] = 100 * decode["gbps"].get<double>() / peak.read_gbps;
}

void PrintReport(const Json& report) {
  PrintMachine(report);
  const Json& peak = report["peak"];
  const int64_t size = peak["size"].get<int64_t>();
  const std::string by =
      size > 0 ? "square product of " + std::to_string(size) : "one of the stages below";
  std::printf("measured limits: %.0f GFLOP/s (%s), %.1f GB/s read\n\n",
              peak["gflops"].get<double>(), by.c_str(), peak["read_gbps"].get<double>());
  const Json &encode = report["encode"], &prefill = report["prefill"], &decode = report["decode"];
  const Json& question = report["question"];
  const Json& compress = report["compress"];
  Table table({"stage", "rate", "", "ms/frame", "GFLOP/s", "GB/s", "% of limit"});
  table.Add({"preprocess", Number(1e3 / encode["preprocess_ms_per_frame"].get<double>(), 1),
             "frames/s", Number(encode["preprocess_ms_per_frame"], 3), "-", "-", "-"});
  table.Add({"encode", Number(encode["frames_per_s"], 2), "frames/s",
             Number(encode["ms_per_frame"], 3), Number(encode["gflops"], 0), "-",
             Number(encode["percent_of_peak"], 1)});
  if (compress["ms_per_frame"] != 0.0) {
    table.Add({"compress", Number(compress["tokens_per_frame"], 1), "tokens left",
               Number(compress["ms_per_frame"], 3), "-", "-", "-"});
  }
  table.Add({"prefill", Number(prefill["tokens_per_s"], 1), "tokens/s",
             Number(prefill["ms_per_frame"], 3), Number(prefill["gflops"], 0), "-",
             Number(prefill["percent_of_peak"], 1)});
  table.Add({"question", Number(question["ms"], 2), "ms", "-", Number(question["gflops"], 0), "-",
             Number(question["percent_of_peak"], 1)});
  table.Add({"decode", Number(decode["tokens_per_s"], 1), "tokens/s", "-", "-",
             Number(decode["gbps"], 1), Number(decode["percent_of_read_bandwidth"], 1)});
  if (report.contains("decode_together")) {
    const Json& together = report["decode_together"];
    table.Add({std::to_string(together["sessions"].get<int64_t>()) + " decode",
               Number(together["tokens_per_s"], 1), "tokens/s", "-", "-", "-", "-"});
  }
  std::printf("%s", table.ToString().c_str());
}

void Bench(const BenchFlags& flags) {
  const Engine engine = OpenEngine(flags.model);
  const Vlm& vlm = *engine.vlm();
  const auto context = engine.NewContext();
  SessionOptions options;
  ApplyMethods(flags.methods, options);
  if (options.duplicate_threshold) {
    throw InputError(
        "[bench] frames here are made up and none repeats another; expected no "
        "--duplicate-threshold, use sluice eval");
  }
  Json report;
  report["model"] = vlm.info().name;
  report["dtype"] = Name(vlm.info().compute_type);
  report["weights"] = WeightsName(vlm.info());
  report["machine"] = ToJson(CpuInfo::Detect());
  report["machine"]["threads"] = engine.num_threads();
  if (vlm.info().device == Device::kCuda) {
    report["machine"]["model"] = cuda::DeviceName();
    report["machine"]["isa"] = "compute capability " + Number(cuda::ComputeCapability() / 10.0, 1);
  }
  if (options.memory) {
    options.frames_per_batch = flags.batch;
    options.keep_dialogue = false;
    options.generate.max_new_tokens = 1;
    report["memory"] = MeasureMemory(*context, engine, options, flags);
    if (flags.json) return PrintJson(report);
    PrintMachine(report);
    return PrintMemory(report["memory"]);
  }
  const int64_t needed =
      int64_t{flags.context_frames} * vlm.encoder().tokens_per_frame() + 64;  // and what is decoded
  if (needed > vlm.decoder().max_positions()) {
    throw InputError("[bench] --context-frames must fit into " +
                     std::to_string(vlm.decoder().max_positions()) + " positions, needs " +
                     std::to_string(needed));
  }
  const auto session = engine.NewSession(options);
  if (flags.sessions > 1 && session->pyramid.mode() != PyramidMode::kOff) {
    throw InputError(
        "[bench] --sessions decodes behind frames that are read whole; expected no --pyramid-drop");
  }
  Peak peak;
  MeasureProducts(*context, vlm.info().compute_type, flags.seconds, peak);
  peak.read_gbps = MeasureRead(*context, flags.seconds);
  report["encode"] =
      MeasureEncode(*context, vlm.encoder(),
                    {.reuse = session->reuse.get(), .merge = session->merge.get()}, flags);
  MethodCounts counts;
  counts.Add(*session);
  report["methods"] = ToJson(options, counts);
  const Arrivals arrivals = MeasureCompress(*context, flags, *session);
  report["compress"] = {
      {"ms_per_frame", 1e3 * arrivals.compress_seconds / flags.context_frames},
      {"tokens_per_frame", static_cast<double>(arrivals.tokens) / flags.context_frames}};
  report["prefill"] = MeasurePrefill(*context, flags, arrivals, *session);
  KvCache window(session->cache.pool(), session->pyramid.positions());  // of frames replayed
  KvCache& cache = session->pyramid.replays() ? window : session->cache;
  report["question"] = MeasureQuestion(*context, flags, *session, cache);
  report["decode"] = MeasureDecode(*context, vlm, flags, cache);
  if (flags.sessions > 1) {
    report["decode_together"] =
        MeasureTogether(*context, vlm.decoder(), flags, arrivals, session->cache.pool(),
                        report["decode"]["tokens_per_s"].get<double>());
  }
  JudgeByPeak(peak, report);
  if (flags.json) {
    PrintJson(report);
  } else {
    PrintReport(report);
  }
}

}  // namespace

void AddBench(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "bench",
      "Time each stage and compare it with what this machine was measured to reach; with --memory, "
      "time frames while its window slides");
  auto flags = std::make_shared<BenchFlags>();
  AddModelFlags(*command, flags->model);
  AddMethodFlags(*command, flags->methods);
  command->add_option("--batch", flags->batch, "Frames encoded and prefilled together")
      ->capture_default_str()
      ->check(CLI::Range(1, 256));
  command->add_option("--context-frames", flags->context_frames, "Frames seen before decoding")
      ->capture_default_str()
      ->check(CLI::Range(1, 100000));
  command
      ->add_option("--sessions", flags->sessions,
                   "Also decode so many sessions together, each behind frames of its own")
      ->capture_default_str()
      ->check(CLI::Range(1, 256));
  command->add_option("--seconds", flags->seconds, "Repeat each measurement for at least so long")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 600.0));
  command->add_flag("--json", flags->json, "Print one JSON object");
  ShowFirst(*command, {"--model", "--device", "--dtype", "--threads", "--preset", "--json"});
  command->callback([flags] { Bench(*flags); });
}

}  // namespace sluice::cli
