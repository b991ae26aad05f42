#include "proto/messages.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <string>

#include "proto/convert.h"
#include "proto/image_decoder.h"
#include "runtime/error.h"
#include "streaming/defaults.h"

namespace sluice {
namespace {

constexpr int kMaxStopStrings = 16;
constexpr size_t kMaxStopBytes = 256;
constexpr double kMaxMediaSeconds = 1e9;

[[noreturn]] void Unknown(const std::string& field, int value) {
  throw InputError("[options] " + field + ": " + std::to_string(value) +
                   " is no value of this version; see service.proto");
}

std::string PresetName(v1::Preset preset) {
  switch (preset) {
    case v1::PRESET_UNSPECIFIED:
    case v1::PRESET_EXACT:
      return "exact";
    case v1::PRESET_STC:
      return "stc";
    case v1::PRESET_FAST:
      return "fast";
    default:
      Unknown("preset", preset);
  }
}

void SetPyramid(const v1::ModelOptions& message, PyramidOptions& pyramid) {
  if (message.pyramid_drop().empty()) return;
  pyramid = ParsePyramid(message.pyramid_drop());
  pyramid.boundaries.assign(message.pyramid_boundaries().begin(),
                            message.pyramid_boundaries().end());
  if (message.has_pyramid_stages()) {
    pyramid.stages = message.pyramid_stages();
  } else if (!pyramid.boundaries.empty()) {
    pyramid.stages = static_cast<int>(pyramid.boundaries.size()) + 1;
  }
  switch (message.pyramid_quota()) {
    case v1::PYRAMID_QUOTA_UNSPECIFIED:
      break;
    case v1::PYRAMID_QUOTA_GLOBAL:
      pyramid.quota = PyramidQuota::kGlobal;
      break;
    case v1::PYRAMID_QUOTA_FRAME:
      pyramid.quota = PyramidQuota::kFrame;
      break;
    case v1::PYRAMID_QUOTA_HYBRID:
      pyramid.quota = PyramidQuota::kHybrid;
      break;
    default:
      Unknown("pyramid_quota", message.pyramid_quota());
  }
  if (message.has_pyramid_frame_share()) pyramid.frame_share = message.pyramid_frame_share();
  switch (message.pyramid_rank()) {
    case v1::PYRAMID_RANK_UNSPECIFIED:
      break;
    case v1::PYRAMID_RANK_LAST:
      pyramid.rank = PyramidRank::kLast;
      break;
    case v1::PYRAMID_RANK_MEAN:
      pyramid.rank = PyramidRank::kMean;
      break;
    default:
      Unknown("pyramid_rank", message.pyramid_rank());
  }
  switch (message.pyramid_positions()) {
    case v1::PYRAMID_POSITIONS_UNSPECIFIED:
      break;
    case v1::PYRAMID_POSITIONS_COMPACT:
      pyramid.positions = KvPositions::kRows;
      break;
    case v1::PYRAMID_POSITIONS_PRESERVE:
      pyramid.positions = KvPositions::kTokens;
      break;
    default:
      Unknown("pyramid_positions", message.pyramid_positions());
  }
  if (message.has_pyramid_replay_frames()) pyramid.replay_frames = message.pyramid_replay_frames();
  pyramid.instruction = message.pyramid_instruction();
}

MemoryOptions MemoryFromProto(const v1::Memory& message, const BlockStoreOptions& most) {
  MemoryOptions memory;
  if (message.has_window_tokens()) memory.window_tokens = message.window_tokens();
  if (message.has_recall_frames()) memory.recall_blocks = message.recall_frames();
  if (message.has_recall_chunk()) memory.recall_chunk = message.recall_chunk();
  if (message.has_dialogue_tokens()) memory.dialogue_tokens = message.dialogue_tokens();
  memory.int8 = message.int8();
  memory.store = most;
  if (message.has_host_bytes()) {
    memory.store.host_bytes = std::min(message.host_bytes(), most.host_bytes);
  }
  if (message.has_disk_bytes()) {
    memory.store.disk_bytes = std::min(message.disk_bytes(), most.disk_bytes);
  }
  switch (message.when_full()) {
    case v1::MEMORY_WHEN_FULL_UNSPECIFIED:
    case v1::MEMORY_WHEN_FULL_OLDEST:
      memory.store.when_full = WhenFull::kOldest;
      break;
    case v1::MEMORY_WHEN_FULL_THIN:
      memory.store.when_full = WhenFull::kThin;
      break;
    default:
      Unknown("when_full", message.when_full());
  }
  return memory;
}

v1::Memory ToProto(const MemoryOptions& memory) {
  v1::Memory message;
  message.set_window_tokens(memory.window_tokens);
  message.set_recall_frames(memory.recall_blocks);
  message.set_recall_chunk(memory.recall_chunk);
  message.set_host_bytes(memory.store.host_bytes);
  message.set_disk_bytes(memory.store.disk_bytes);
  message.set_when_full(memory.store.when_full == WhenFull::kThin ? v1::MEMORY_WHEN_FULL_THIN
                                                                  : v1::MEMORY_WHEN_FULL_OLDEST);
  message.set_int8(memory.int8);
  message.set_dialogue_tokens(memory.dialogue_tokens);
  return message;
}

// The smaller of two limits of which 0 is none.
template <typename T>
T Lower(T a, T b) {
  if (a == 0) return b;
  return b == 0 ? a : std::min(a, b);
}

void Check(bool ok, const char* expected) {
  if (!ok) throw InputError(std::string("[budgets] expected ") + expected);
}

}  // namespace

SessionOptions FromProto(const v1::ModelOptions& message, const GenerationDefaults& defaults,
                         const BlockStoreOptions& most) {
  SessionOptions options;
  ApplyPreset(PresetName(message.preset()), options);
  options.system_prompt = message.system();
  options.keep_dialogue = !message.no_dialogue();
  options.max_context_tokens = message.max_context_tokens();
  if (message.has_duplicate_threshold()) {
    options.duplicate_threshold = message.duplicate_threshold();
  }

  const bool tunes = message.has_cacher_interval() || message.has_cacher_ratio() ||
                     message.has_cacher_refresh() || message.has_cacher_shared();
  if (message.has_cacher()) {
    options.cacher.reset();
    if (message.cacher()) options.cacher.emplace();
  }
  if (tunes && !message.cacher()) {
    throw InputError("[options] cacher_... are set without cacher; set it too");
  }
  if (message.has_cacher_interval()) options.cacher->interval = message.cacher_interval();
  if (message.has_cacher_ratio()) options.cacher->ratio = message.cacher_ratio();
  if (message.has_cacher_refresh()) options.cacher->refresh_below = message.cacher_refresh();
  if (message.has_cacher_shared()) options.cacher->shared_selection = message.cacher_shared();

  if (message.has_turbo()) options.turbo = TurboOptions{.remove = message.turbo()};
  if (message.has_turbo_lambda()) {
    if (!options.turbo) {
      throw InputError("[options] turbo_lambda is set without turbo; set it too");
    }
    options.turbo->lambda = message.turbo_lambda();
  }
  if (message.compress_size() > 0) {
    options.compressors.assign(message.compress().begin(), message.compress().end());
  }
  SetPyramid(message, options.pyramid);
  if (message.has_memory()) options.memory = MemoryFromProto(message.memory(), most);
  if (message.has_memory() && message.no_memory()) {
    throw InputError("[options] memory and no_memory are both set; choose one");
  }
  options.generate = RecommendedGeneration(defaults);
  options.generate = FromProto(message.generation(), options.generate);
  return options;
}

v1::ModelOptions ToProto(const SessionOptions& options) {
  v1::ModelOptions message;
  message.set_system(options.system_prompt);
  message.set_no_dialogue(!options.keep_dialogue);
  message.set_max_context_tokens(options.max_context_tokens);
  if (options.duplicate_threshold) message.set_duplicate_threshold(*options.duplicate_threshold);
  if (options.cacher) {
    message.set_cacher(true);
    message.set_cacher_interval(options.cacher->interval);
    message.set_cacher_ratio(options.cacher->ratio);
    message.set_cacher_refresh(options.cacher->refresh_below);
    message.set_cacher_shared(options.cacher->shared_selection);
  }
  if (options.turbo) {
    message.set_turbo(options.turbo->remove);
    message.set_turbo_lambda(options.turbo->lambda);
  }
  for (const std::string& compressor : options.compressors) message.add_compress(compressor);

  const PyramidOptions& pyramid = options.pyramid;
  if (pyramid.mode != PyramidMode::kOff) {
    char lambda[32];
    const auto end = std::to_chars(lambda, lambda + sizeof lambda, pyramid.lambda).ptr;
    message.set_pyramid_drop(std::string(Name(pyramid.mode)) + "=" + std::string(lambda, end));
    message.set_pyramid_stages(pyramid.stages);
    message.mutable_pyramid_boundaries()->Assign(pyramid.boundaries.begin(),
                                                 pyramid.boundaries.end());
    if (pyramid.quota) {
      message.set_pyramid_quota(*pyramid.quota == PyramidQuota::kGlobal ? v1::PYRAMID_QUOTA_GLOBAL
                                : *pyramid.quota == PyramidQuota::kFrame
                                    ? v1::PYRAMID_QUOTA_FRAME
                                    : v1::PYRAMID_QUOTA_HYBRID);
    }
    message.set_pyramid_frame_share(pyramid.frame_share);
    if (pyramid.rank) {
      message.set_pyramid_rank(*pyramid.rank == PyramidRank::kLast ? v1::PYRAMID_RANK_LAST
                                                                   : v1::PYRAMID_RANK_MEAN);
    }
    if (pyramid.positions) {
      message.set_pyramid_positions(*pyramid.positions == KvPositions::kRows
                                        ? v1::PYRAMID_POSITIONS_COMPACT
                                        : v1::PYRAMID_POSITIONS_PRESERVE);
    }
    message.set_pyramid_replay_frames(pyramid.replay_frames);
    message.set_pyramid_instruction(pyramid.instruction);
  }

  if (options.memory) {
    *message.mutable_memory() = ToProto(*options.memory);
  } else {
    message.set_no_memory(true);
  }

  v1::Generation& generation = *message.mutable_generation();
  generation.set_max_new_tokens(options.generate.max_new_tokens);
  generation.set_temperature(options.generate.sampling.temperature);
  generation.set_top_k(options.generate.sampling.top_k);
  generation.set_top_p(options.generate.sampling.top_p);
  generation.set_seed(options.generate.sampling.seed);
  for (const std::string& stop : options.generate.stop_strings) generation.add_stop_strings(stop);
  return message;
}

GenerateOptions FromProto(const v1::Generation& message, const GenerateOptions& otherwise) {
  GenerateOptions options = otherwise;
  if (message.has_max_new_tokens()) options.max_new_tokens = message.max_new_tokens();
  if (message.has_temperature()) options.sampling.temperature = message.temperature();
  if (message.has_top_k()) options.sampling.top_k = message.top_k();
  if (message.has_top_p()) options.sampling.top_p = message.top_p();
  if (message.has_seed()) options.sampling.seed = message.seed();
  if (message.stop_strings_size() > kMaxStopStrings) {
    throw InputError("[options] expected at most 16 stop_strings, got " +
                     std::to_string(message.stop_strings_size()));
  }
  for (const std::string& stop : message.stop_strings()) {
    if (stop.size() > kMaxStopBytes) {
      throw InputError("[options] expected stop_strings of at most " +
                       std::to_string(kMaxStopBytes) + " bytes, got one of " +
                       std::to_string(stop.size()));
    }
  }
  if (message.stop_strings_size() > 0) {
    options.stop_strings.assign(message.stop_strings().begin(), message.stop_strings().end());
  }
  return options;
}

StreamBudget Granted(const v1::Budgets& asked, const StreamBudget& most) {
  StreamBudget budget = most;
  if (asked.has_kv_bytes()) {
    Check(asked.kv_bytes() >= 0, "kv_bytes from 0");
    budget.kv_bytes = Lower(asked.kv_bytes(), most.kv_bytes);
  }
  if (asked.has_queued_frames()) {
    Check(asked.queued_frames() >= 1, "queued_frames from 1");
    budget.queued_frames = std::min(asked.queued_frames(), most.queued_frames);
  }
  if (asked.has_queued_questions()) {
    Check(asked.queued_questions() >= 1, "queued_questions from 1");
    budget.queued_questions = std::min(asked.queued_questions(), most.queued_questions);
  }
  if (asked.has_answer_tokens()) {
    Check(asked.answer_tokens() >= 1, "answer_tokens from 1");
    budget.answer_tokens = std::min(asked.answer_tokens(), most.answer_tokens);
  }
  if (asked.has_answer_seconds()) {
    Check(asked.answer_seconds() > 0 && std::isfinite(asked.answer_seconds()),
          "answer_seconds above 0 and finite");
    budget.answer_seconds = Lower(asked.answer_seconds(), most.answer_seconds);
  }
  if (asked.has_frames_per_second()) {
    Check(asked.frames_per_second() >= 0 && std::isfinite(asked.frames_per_second()),
          "frames_per_second from 0 and finite");
    budget.frames_per_second = Lower(asked.frames_per_second(), most.frames_per_second);
  }
  return budget;
}

v1::Budgets ToProto(const StreamBudget& budget) {
  v1::Budgets message;
  message.set_kv_bytes(budget.kv_bytes);
  message.set_queued_frames(budget.queued_frames);
  message.set_queued_questions(budget.queued_questions);
  message.set_answer_tokens(budget.answer_tokens);
  message.set_answer_seconds(budget.answer_seconds);
  message.set_frames_per_second(budget.frames_per_second);
  return message;
}

v1::DropReason ToProto(DropReason reason) {
  switch (reason) {
    case DropReason::kQueueFull:
      return v1::DROP_REASON_QUEUE_FULL;
    case DropReason::kRate:
      return v1::DROP_REASON_RATE;
    case DropReason::kMemory:
      return v1::DROP_REASON_MEMORY;
    case DropReason::kOutOfOrder:
      return v1::DROP_REASON_OUT_OF_ORDER;
    case DropReason::kBadFrame:
      return v1::DROP_REASON_BAD_FRAME;
    case DropReason::kDuplicate:
      return v1::DROP_REASON_DUPLICATE;
    case DropReason::kClosing:
      return v1::DROP_REASON_CLOSING;
  }
  return v1::DROP_REASON_UNSPECIFIED;
}

v1::Evidence ToProto(const Evidence& moment) {
  v1::Evidence evidence;
  evidence.set_begin_media_seconds(moment.begin.seconds());
  evidence.set_end_media_seconds(moment.end.seconds());
  evidence.set_weight(moment.weight);
  evidence.set_layers(moment.layers);
  return evidence;
}

Evidence FromProto(const v1::Evidence& message) {
  return {.begin = MediaTimeOf(message.begin_media_seconds()),
          .end = MediaTimeOf(message.end_media_seconds()),
          .weight = message.weight(),
          .layers = message.layers()};
}

v1::StreamAnswer ToProto(const StreamAnswer& answer) {
  v1::StreamAnswer message;
  message.set_question_id(answer.id);
  message.set_text(Utf8(answer.text));
  const auto end = [&] {
    switch (answer.end) {
      case AnswerEnd::kStop:
        return v1::ANSWER_END_STOP;
      case AnswerEnd::kLength:
        return v1::ANSWER_END_LENGTH;
      case AnswerEnd::kCancelled:
        return v1::ANSWER_END_CANCELLED;
      case AnswerEnd::kTime:
        return v1::ANSWER_END_TIME;
      case AnswerEnd::kMemory:
        return v1::ANSWER_END_MEMORY;
      case AnswerEnd::kFailed:
        return v1::ANSWER_END_FAILED;
    }
    return v1::ANSWER_END_UNSPECIFIED;
  };
  message.set_end(end());
  message.set_error(Utf8(answer.error));
  message.set_asked_at_media_seconds(answer.asked_at.seconds());
  message.set_frames_seen(answer.frames_seen);
  v1::Usage& usage = *message.mutable_usage();
  usage.set_prompt_tokens(answer.usage.prompt_tokens);
  usage.set_answer_tokens(answer.usage.answer_tokens);
  usage.set_visual_tokens(answer.usage.visual_tokens);
  usage.set_queued_seconds(answer.usage.queued_seconds);
  usage.set_first_token_seconds(answer.usage.first_token_seconds);
  usage.set_total_seconds(answer.usage.total_seconds);
  for (const Evidence& moment : answer.evidence) *message.add_evidence() = ToProto(moment);
  message.set_no_evidence(Utf8(answer.no_evidence));
  return message;
}

v1::Model ToProto(const Vlm& vlm) {
  v1::Model model;
  model.set_name(Utf8(vlm.info().name));
  model.set_architecture(Utf8(vlm.info().architecture));
  model.set_tokens_per_frame(vlm.encoder().tokens_per_frame());
  model.set_context_tokens(vlm.decoder().max_positions());
  return model;
}

v1::SessionResponse Refused(const char* request, QuestionId question, const std::string& error) {
  v1::SessionResponse message;
  message.mutable_refused()->set_request(request);
  message.mutable_refused()->set_question_id(question);
  message.mutable_refused()->set_error(Utf8(error));
  return message;
}

MediaTime MediaTimeOf(double seconds) {
  if (!(seconds >= 0 && seconds <= kMaxMediaSeconds)) {
    throw InputError("[frame] expected media_seconds in [0, 1e9]");
  }
  return MediaTime::FromSeconds(seconds);
}

void FromProto(const v1::Frame& message, int64_t max_pixels, Frame& frame) {
  // Coefficients of a progressive JPEG, the picture and the picture upright take 14 bytes a pixel.
  ImageLimits limits{.pixels = max_pixels};
  limits.bytes = std::max(limits.bytes, 16 * max_pixels);
  frame.time = MediaTimeOf(message.media_seconds());
  switch (message.picture_case()) {
    case v1::Frame::kJpeg:
      return DecodeImage(ImageFormat::kJpeg, message.jpeg(), limits, frame);
    case v1::Frame::kPng:
      return DecodeImage(ImageFormat::kPng, message.png(), limits, frame);
    case v1::Frame::kWebp:
      return DecodeImage(ImageFormat::kWebp, message.webp(), limits, frame);
    case v1::Frame::kRgb:
      return TakeRawImage(message.rgb().width(), message.rgb().height(), message.rgb().data(),
                          limits, frame);
    case v1::Frame::PICTURE_NOT_SET:
      break;
  }
  throw InputError("[frame] expected a picture as jpeg, png, webp or rgb, found none");
}

}  // namespace sluice
