#include "proto/source_opener.h"

#include "proto/json_log.h"
#include "runtime/error.h"
#include "streaming/apart/elements.h"
#include "streaming/reconnecting_source.h"
#include "streaming/redact.h"

namespace sluice {

void SourceOpener::Check(const SourceRules& rules, const ApartOptions& decoder) {
  CheckRules(rules);
  apart::CheckElements(decoder.elements);
  if (!rules.urls.empty() || !rules.directories.empty()) DecoderProgram(decoder);
}

SourceOpener::SourceOpener(const SourceRules& rules, const ApartOptions& decoder, Metrics& metrics)
    : rules_(rules), decoder_(decoder), metrics_(metrics) {
  Check(rules_, decoder_);
  if (rules_.urls.empty() && rules_.directories.empty()) return;
  LogEvent(decoder_.filtered ? spdlog::level::info : spdlog::level::warn, "sources",
           {{"decoded", "apart"},
            {"system_calls", decoder_.filtered ? "filtered" : "not filtered"},
            {"memory_mb", decoder_.memory_bytes >> 20},
            {"playlists", decoder_.playlists}});
}

std::shared_ptr<Source> SourceOpener::Open(const std::string& url, const SourceOptions& options) {
  try {
    SourceOptions kept = options;
    kept.reconnect.reconnections =
        &metrics_.counter("sluice_source_reconnections_total",
                          "Sources without an end that broke and were opened again.");
    // The rules are asked again each time: a name may lead elsewhere by then.
    std::shared_ptr<Source> source = KeepOpen(RedactUrl(url), kept, [this, url, kept](const auto&) {
      ApartInput input = CheckSource(url, rules_);
      ApartOptions decoder = decoder_;
      decoder.playlists = decoder.playlists && input.further != nullptr;
      return OpenApart(std::move(input), kept, decoder);
    });
    Sources(decoder_.filtered ? "opened_filtered" : "opened_unfiltered").Add();
    return source;
  } catch (const InputError&) {
    Sources("refused").Add();
    throw;
  } catch (const Error&) {
    Sources("failed").Add();
    throw;
  }
}

Counter& SourceOpener::Sources(const char* result) {
  return metrics_.counter("sluice_sources_total",
                          "Sources that clients had the server open, each decoded in a process of "
                          "its own, with or without a filter of system calls.",
                          {{"result", result}});
}

}  // namespace sluice
