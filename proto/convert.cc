#include "proto/convert.h"

#include <google/protobuf/util/json_util.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string_view>

#include "proto/messages.h"
#include "runtime/error.h"
#include "sluice/v1/session.pb.h"

namespace sluice {
namespace {

int32_t Saturated(int64_t value) {
  return static_cast<int32_t>(std::clamp<int64_t>(value, std::numeric_limits<int32_t>::min(),
                                                  std::numeric_limits<int32_t>::max()));
}

// Length of the valid UTF-8 sequence at the beginning of `text`, 0 if there is none.
size_t SequenceLength(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const auto continues = [&](size_t i) { return i < text.size() && (byte(i) & 0xC0) == 0x80; };
  const uint8_t lead = byte(0);
  if (lead < 0x80) return 1;
  if (lead >= 0xC2 && lead < 0xE0) return continues(1) ? 2 : 0;
  if (lead >= 0xE0 && lead < 0xF0) {
    if (!continues(1) || !continues(2)) return 0;
    const bool overlong = lead == 0xE0 && byte(1) < 0xA0;
    const bool surrogate = lead == 0xED && byte(1) >= 0xA0;
    return overlong || surrogate ? 0 : 3;
  }
  if (lead >= 0xF0 && lead < 0xF5) {
    if (!continues(1) || !continues(2) || !continues(3)) return 0;
    const bool overlong = lead == 0xF0 && byte(1) < 0x90;
    const bool beyond = lead == 0xF4 && byte(1) >= 0x90;
    return overlong || beyond ? 0 : 4;
  }
  return 0;
}

v1::Source ToProto(const SourceInfo& info) {
  v1::Source source;
  source.set_live(info.live);
  if (info.duration) source.set_media_seconds(info.duration->seconds());
  source.set_width(info.width);
  source.set_height(info.height);
  source.set_codec(Utf8(info.codec));
  return source;
}

v1::Answer ToProto(const TimedAnswer& timed) {
  v1::Answer answer;
  answer.set_question(Utf8(timed.question.text));
  if (timed.question.at) answer.set_at_media_seconds(timed.question.at->seconds());
  answer.set_asked_at_media_seconds(timed.asked_at.seconds());
  answer.set_frames_seen(Saturated(timed.frames_seen));
  answer.set_text(Utf8(timed.generated.text));
  answer.mutable_token_ids()->Assign(timed.generated.ids.begin(), timed.generated.ids.end());
  answer.set_finish_reason(Name(timed.generated.reason));
  answer.set_first_token_seconds(timed.first_token_seconds);
  answer.set_total_seconds(timed.total_seconds);
  for (const Evidence& moment : timed.generated.evidence) {
    *answer.add_evidence() = ToProto(moment);
  }
  answer.set_no_evidence(Utf8(timed.generated.no_evidence));
  answer.set_note(Utf8(timed.note));
  return answer;
}

v1::StageCost ToProto(const StageCost& cost) {
  v1::StageCost stage;
  stage.set_calls(Saturated(cost.calls));
  stage.set_items(Saturated(cost.items));
  stage.set_seconds(cost.seconds);
  stage.set_flops(cost.flops);
  stage.set_bytes(cost.bytes);
  return stage;
}

}  // namespace

std::string Utf8(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    const size_t length = SequenceLength(text);
    out += length > 0 ? text.substr(0, length) : std::string_view("\xEF\xBF\xBD");
    text.remove_prefix(std::max<size_t>(length, 1));
  }
  return out;
}

std::string ErrorLine(std::string_view text) {
  constexpr size_t kMost = 500;
  std::string line(text.substr(0, kMost));
  for (char& c : line) {
    if (static_cast<unsigned char>(c) < ' ' || c == 0x7F) c = ' ';
  }
  return Utf8(line) + (text.size() > kMost ? "..." : "");
}

std::string RunReportJson(const RunResult& result, const Tracer& tracer) {
  v1::RunReport report;
  *report.mutable_source() = ToProto(result.source);
  report.mutable_frames()->set_sampled(Saturated(result.frames));
  report.mutable_frames()->set_dropped(Saturated(result.queue.dropped));
  report.mutable_frames()->set_duplicates(Saturated(result.duplicates));
  for (const TimedAnswer& answer : result.answers) *report.add_answers() = ToProto(answer);
  for (const auto& [name, cost] : tracer.stages()) {
    (*report.mutable_stages())[Utf8(name)] = ToProto(cost);
  }
  if (result.warning) report.set_warning(Utf8(*result.warning));
  for (const std::string& line : result.warnings) report.add_warnings(Utf8(line));
  if (!result.error.empty()) report.set_error(Utf8(result.error));
  report.set_not_asked(Saturated(result.not_asked));

  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  options.always_print_primitive_fields = true;
  std::string json;
  const auto status = google::protobuf::util::MessageToJsonString(report, &json, options);
  if (!status.ok()) throw Error("[proto] cannot print the report: " + status.ToString());
  return json;
}

}  // namespace sluice
