#include "proto/server_config.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>

#include "proto/memory_defaults.h"
#include "proto/source_opener.h"
#include "runtime/error.h"

namespace sluice {
namespace {

using nlohmann::json;

// Levenshtein's.
size_t Distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = std::exchange(row[0], i);
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = std::exchange(row[j], std::min({row[j] + 1, row[j - 1] + 1, replaced}));
    }
  }
  return row[b.size()];
}

[[noreturn]] void RefuseName(const std::string& place, const std::string& name,
                             const std::vector<std::string>& known) {
  const auto nearest = std::min_element(
      known.begin(), known.end(),
      [&](const auto& a, const auto& b) { return Distance(a, name) < Distance(b, name); });
  throw InputError(place + ": there is no setting '" + name + "'; the nearest is '" + *nearest +
                   "'");
}

// "2026-12-31T00:00:00Z".
CalendarTime ParseTime(const std::string& place, const std::string& text) {
  int year = 0, month = 0, day = 0, hour = 0, minute = 0, second = 0, length = 0;
  const int fields = std::sscanf(text.c_str(), "%4d-%2d-%2dT%2d:%2d:%2dZ%n", &year, &month, &day,
                                 &hour, &minute, &second, &length);
  using namespace std::chrono;
  const year_month_day date{std::chrono::year(year), std::chrono::month(month),
                            std::chrono::day(day)};
  const bool clock =
      hour >= 0 && hour < 24 && minute >= 0 && minute < 60 && second >= 0 && second < 60;
  if (fields != 6 || static_cast<size_t>(length) != text.size() || !date.ok() || !clock) {
    throw InputError(place + ": expected expires as 2026-12-31T00:00:00Z, got '" + text + "'");
  }
  return sys_days(date) + hours(hour) + minutes(minute) + seconds(second);
}

constexpr int64_t kMostSavedMb = int64_t{1} << 30;

AccessToken ParseToken(const std::string& place, const json& object) {
  AccessToken token{.name = {}, .sha256 = {}, .expires = {}};
  if (!object.is_object()) throw InputError(place + ": expected each of tokens to be an object");
  for (const auto& [name, value] : object.items()) {
    if (name == "name") {
      token.name = value.get<std::string>();
    } else if (name == "sha256") {
      token.sha256 = value.get<std::string>();
    } else if (name == "expires") {
      token.expires = ParseTime(place, value.get<std::string>());
    } else if (name == "sessions") {
      token.sessions = value.get<int>();
    } else if (name == "frames_per_second") {
      token.frames_per_second = value.get<double>();
    } else if (name == "bytes_per_second") {
      token.bytes_per_second = value.get<double>();
    } else if (name == "sources") {
      token.sources = value.get<int>();
    } else if (name == "saved_streams") {
      token.saved_streams = value.get<int>();
    } else if (name == "saved_mb") {
      token.saved_mb = value.get<int64_t>();
    } else {
      RefuseName(place + ": tokens", name,
                 {"name", "sha256", "expires", "sessions", "frames_per_second", "bytes_per_second",
                  "sources", "saved_streams", "saved_mb"});
    }
  }
  if (token.sessions < 0 || !(token.frames_per_second >= 0) || !(token.bytes_per_second >= 0) ||
      token.sources < 0 || token.saved_streams < 0 || token.saved_mb < 0 ||
      token.saved_mb > kMostSavedMb) {
    throw InputError(place + ": token '" + token.name + "': expected quotas from 0");
  }
  return token;
}

void Set(const Setting& setting, const json& value) {
  std::visit(
      [&](auto* target) {
        using T = std::remove_pointer_t<decltype(target)>;
        // Numbers must be whole where whole ones are meant, and fit.
        if constexpr (std::is_integral_v<T> && !std::is_same_v<T, bool>) {
          const bool fits = value.is_number_integer() &&
                            value.get<int64_t>() >= std::numeric_limits<T>::min() &&
                            value.get<int64_t>() <= std::numeric_limits<T>::max();
          if (!fits) throw json::type_error::create(302, "expected a whole number", &value);
        }
        *target = value.get<T>();
      },
      setting.value);
}

// On the disk of a directory that may have to be made yet.
int64_t FreeBytes(std::filesystem::path directory) {
  if (directory.empty()) return 0;
  std::error_code error;
  directory = std::filesystem::absolute(directory, error);
  while (!std::filesystem::exists(directory, error) && directory.has_relative_path()) {
    directory = directory.parent_path();
  }
  const auto space = std::filesystem::space(directory, error);
  return error ? 0 : static_cast<int64_t>(space.available);
}

void Range(const char* name, double value, double low, double high) {
  if (!(value >= low && value <= high)) {
    char line[160];
    std::snprintf(line, sizeof line, "[serve] %s: expected %g to %g, got %g", name, low, high,
                  value);
    throw InputError(line);
  }
}

}  // namespace

std::vector<Setting> SettingsOf(ServerConfig& c) {
  StreamBudget& budget = c.service.budget;
  return {
      {"listen", "HOST:PORT of the gRPC service", &c.service.listen},
      {"metrics", "ADDRESS:PORT of http://.../metrics; empty: none", &c.metrics},
      {"certificate", "The server's certificate chain (PEM); with key turns TLS on",
       &c.certificate},
      {"key", "The certificate's private key (PEM)", &c.key},
      {"client_ca", "Let in only clients whose certificate this authority signed (PEM)",
       &c.client_ca},
      {"source_urls",
       "URLs that clients may have the server open, as rtsp://*.example.com/*; may be repeated",
       &c.service.sources.urls},
      {"source_directories", "Directories whose files clients may have the server open",
       &c.source_directories},
      {"source_private", "Sources may have loopback, private and link-local addresses",
       &c.service.sources.private_addresses},
      {"source_playlists",
       "Sources may be HLS and DASH, what they name read where source_urls has the whole host",
       &c.service.sources.playlists},
      {"source_elements",
       "The only demuxers, parsers and decoders of GStreamer for sources (default: "
       "docs/service.md)",
       &c.service.decoder.elements},
      {"source_isolation",
       "required: sources are decoded under a filter of system calls; off: in a process of their "
       "own without it",
       &c.source_isolation},
      {"source_decoder", "The program that decodes sources; empty: sluice-decode beside this one",
       &c.source_decoder},
      {"source_stall_seconds", "A source that delivers nothing for so long has failed",
       &c.service.source_stall_seconds},
      {"source_reconnect",
       "Tries in a row to open a live source again that broke; 0: none, -1: for ever",
       &c.service.source_reconnect},
      {"source_memory_mb", "MiB of memory of one source's decoder", &c.source_memory_mb},
      {"source_cpu_seconds", "CPU time that a decoder may take for one picture",
       &c.service.decoder.frame_cpu_seconds},
      {"max_sources", "Sources open at a time; -1: as many as the memory bears, 16 at most",
       &c.max_sources},
      {"account_sources", "Of one token; 0: half of max_sources where there are several tokens",
       &c.service.account_sources},
      {"max_streams", "Streams at a time", &c.scheduler.max_streams},
      {"frames_per_round", "Frames encoded together, at most", &c.scheduler.frames_per_round},
      {"kv_mb",
       "MiB of KV cache of all streams together; 0: half of the memory that the weights leave (on "
       "a GPU: no limit)",
       &c.kv_mb},
      {"stream_kv_mb", "MiB of KV cache of one stream; 0: no limit", &c.stream_kv_mb},
      {"stream_host_mb",
       "MiB of host memory for one stream's earlier frames; -1: a quarter of the memory that the "
       "weights leave, divided by max_streams",
       &c.stream_host_mb},
      {"stream_disk_mb", "MiB of disk for those that do not fit there; needs memory_directory",
       &c.stream_disk_mb},
      {"memory_directory", "Where; the files have no name and go away with the program",
       &c.memory_directory},
      {"queued_frames", "Frames of a stream that may wait", &budget.queued_frames},
      {"queued_picture_mb",
       "MiB of pictures of all streams that may wait; 0: a sixteenth of the memory that the "
       "weights "
       "leave",
       &c.queued_picture_mb},
      {"queued_questions", "Questions of a stream that may wait", &budget.queued_questions},
      {"answer_tokens", "Longest answer", &budget.answer_tokens},
      {"answer_seconds", "From asking to the end of the answer, at most", &budget.answer_seconds},
      {"frames_per_second", "Of a stream, at most; 0: no limit", &budget.frames_per_second},
      {"max_message_mb", "MiB of a message, at most", &c.max_message_mb},
      {"frame_pixels", "Width * height of a picture, at most", &c.service.frame_pixels},
      {"outgoing_kb", "KiB that may wait for a client that does not read", &c.outgoing_kb},
      {"linger_seconds", "How long a stream waits for its client to come back",
       &c.service.linger_seconds},
      {"state_directory",
       "Where streams are saved at shutdown, when clients ask for it and when they stay away",
       &c.state_directory},
      {"state_days", "How long a saved stream waits for its client", &c.service.state_days},
      {"connections", "TCP connections at a time; each takes two descriptors",
       &c.service.connections.all},
      {"connections_per_address", "Of one address at a time (of one /64 network of IPv6)",
       &c.service.connections.per_address},
      {"token_seconds", "Until a connection that has not shown a valid token is closed",
       &c.service.connections.token_seconds},
      {"first_message_seconds", "That a call waits for its client's first message",
       &c.service.first_message_seconds},
      {"idle_seconds", "That a connection without calls stays open", &c.service.idle_seconds},
      {"network_mb", "Memory for messages on their way, all connections together", &c.network_mb},
      {"watchdog_seconds", "Between two questions to the own health service; 0: none",
       &c.service.watchdog_seconds},
      {"allow_plain_text",
       "Serve others than this machine without certificate and key: whoever is on the way reads "
       "tokens and pictures",
       &c.service.allow_plain_text},
      {"allow_everybody",
       "Serve others than this machine without tokens or client_ca, or with an empty list of "
       "tokens",
       &c.service.allow_everybody},
      {"saved_streams", "Saved streams of one token; 0: twice max_streams", &c.saved_streams},
      {"saved_mb", "Their MiB; 0: half of all_saved_mb", &c.saved_mb},
      {"all_saved_streams", "Saved streams of all tokens; 0: eight times max_streams",
       &c.all_saved_streams},
      {"all_saved_mb", "Their MiB; 0: half of what is free in state_directory at the start",
       &c.all_saved_mb},
      {"drain_seconds", "For what is under way at shutdown", &c.service.drain_seconds},
      {"keepalive_seconds", "Of silence, until a client is asked whether it is there",
       &c.service.keepalive_seconds},
      {"workers", "Threads that decode pictures and resize them", &c.service.workers},
  };
}

void ReadServerConfig(const std::filesystem::path& file, ServerConfig& config) {
  const std::string place = "[serve] " + file.string();
  std::ifstream in(file, std::ios::binary);
  if (!in) throw InputError(place + ": cannot be read");
  json root;
  try {
    root = json::parse(in, nullptr, true, true);
  } catch (const json::parse_error& error) {
    throw InputError(place + ": is not JSON at byte " + std::to_string(error.byte));
  } catch (const json::out_of_range&) {  // 1e999
    throw InputError(place + ": expected finite numbers, got one that is too large");
  }
  if (!root.is_object()) throw InputError(place + ": expected one JSON object");
  std::vector<Setting> settings = SettingsOf(config);
  settings.push_back({"model", "", &config.model});
  settings.push_back({"dtype", "", &config.dtype});
  settings.push_back({"threads", "", &config.threads});
  settings.push_back({"device", "", &config.device});
  settings.push_back({"weights", "", &config.weights});
  settings.push_back({"attention", "", &config.attention});
  std::vector<std::string> known = {"tokens"};
  for (const Setting& setting : settings) known.push_back(setting.name);

  for (const auto& [name, value] : root.items()) {
    try {
      if (name == "tokens") {
        if (!value.is_array()) throw InputError(place + ": expected tokens to be a list");
        config.tokens_given = true;
        for (const json& token : value) {
          config.service.tokens.push_back(ParseToken(place, token));
        }
        continue;
      }
      const auto setting =
          std::find_if(settings.begin(), settings.end(),
                       [&name = name](const Setting& s) { return s.name == name; });
      if (setting == settings.end()) RefuseName(place, name, known);
      Set(*setting, value);
    } catch (const json::exception&) {
      throw InputError(place + ": '" + name + "' has a value of the wrong kind");
    }
  }
}

ServerConfig WithMemory(ServerConfig config, int64_t memory_bytes, int64_t weight_bytes, bool gpu) {
  const MemoryShares shares =
      SharesOf(memory_bytes, weight_bytes, config.scheduler.max_streams, config.source_memory_mb);
  if (config.kv_mb == 0 && !gpu) config.kv_mb = shares.kv_mb;
  if (config.stream_host_mb < 0) config.stream_host_mb = shares.stream_host_mb;
  if (config.queued_picture_mb == 0) config.queued_picture_mb = shares.queued_picture_mb;
  config.service.max_sources = config.max_sources < 0 ? shares.sources : config.max_sources;
  config.scheduler.queued_bytes = config.queued_picture_mb << 20;
  return config;
}

ServiceOptions Finished(const ServerConfig& c) {
  constexpr double kMany = 1e9, kLongest = 1e6;
  const StreamBudget& budget = c.service.budget;
  if (!c.dtype.empty() && c.dtype != "f32" && c.dtype != "bf16") {
    throw InputError("[serve] dtype: expected f32 or bf16, got '" + c.dtype + "'");
  }
  if (!c.device.empty() && c.device != "cpu" && c.device != "cuda") {
    throw InputError("[serve] device: expected cpu or cuda, got '" + c.device + "'");
  }
  if (!c.weights.empty() && c.weights != "bf16" && c.weights != "fp8" && c.weights != "int8") {
    throw InputError("[serve] weights: expected bf16, fp8 or int8, got '" + c.weights + "'");
  }
  Range("threads", c.threads, 0, 1024);
  Range("kv_mb", static_cast<double>(c.kv_mb), 0, kMany);
  Range("stream_kv_mb", static_cast<double>(c.stream_kv_mb), 0, kMany);
  Range("stream_host_mb", static_cast<double>(c.stream_host_mb), -1, kMany);
  Range("stream_disk_mb", static_cast<double>(c.stream_disk_mb), 0, kMany);
  if (c.stream_disk_mb > 0 && !std::filesystem::is_directory(c.memory_directory)) {
    throw InputError("[serve] memory_directory: expected a directory for stream_disk_mb, got '" +
                     c.memory_directory + "'");
  }
  Range("max_streams", c.scheduler.max_streams, 1, 1e6);
  Range("frames_per_round", c.scheduler.frames_per_round, 1, 1024);
  Range("queued_frames", budget.queued_frames, 1, 1e6);
  Range("queued_picture_mb", static_cast<double>(c.queued_picture_mb), 0, 1 << 30);
  Range("queued_questions", budget.queued_questions, 1, 1e6);
  Range("answer_tokens", budget.answer_tokens, 1, kMany);
  Range("answer_seconds", budget.answer_seconds, 0.001, kMany);
  Range("frames_per_second", budget.frames_per_second, 0, kMany);
  Range("account_sources", c.service.account_sources, 0, 1e6);
  Range("saved_streams", c.saved_streams, 0, kMany);
  Range("all_saved_streams", c.all_saved_streams, 0, kMany);
  Range("saved_mb", static_cast<double>(c.saved_mb), 0, kMostSavedMb);
  Range("all_saved_mb", static_cast<double>(c.all_saved_mb), 0, kMostSavedMb);
  Range("linger_seconds", c.service.linger_seconds, 0, kLongest);
  Range("drain_seconds", c.service.drain_seconds, 0, kLongest);
  Range("keepalive_seconds", c.service.keepalive_seconds, 1, 1e6);
  Range("frame_pixels", static_cast<double>(c.service.frame_pixels), 1, 1 << 28);
  Range("max_sources", c.max_sources, -1, 1e6);
  Range("workers", c.service.workers, 1, 1024);
  Range("state_days", c.service.state_days, 0.001, 1e6);
  Range("max_message_mb", static_cast<double>(c.max_message_mb), 1, 1024);
  Range("network_mb", static_cast<double>(c.network_mb), 2 * static_cast<double>(c.max_message_mb),
        1 << 20);
  Range("connections", c.service.connections.all, 1, 1e6);
  Range("connections_per_address", c.service.connections.per_address, 1, 1e6);
  Range("token_seconds", c.service.connections.token_seconds, 0.001, 1e6);
  Range("first_message_seconds", c.service.first_message_seconds, 0.001, 1e6);
  Range("idle_seconds", c.service.idle_seconds, 1, 1e6);
  Range("watchdog_seconds", c.service.watchdog_seconds, 0, 1e6);
  if (c.tokens_given && c.service.tokens.empty() && !c.service.allow_everybody) {
    throw InputError(
        "[serve] tokens: expected at least one, got an empty list, which would let everybody in; "
        "make one with sluice token, or set allow_everybody");
  }
  Range("outgoing_kb", static_cast<double>(c.outgoing_kb), 1, kMany);
  Range("source_stall_seconds", c.service.source_stall_seconds, 0.1, 86400);
  Range("source_reconnect", c.service.source_reconnect, ReconnectOptions::kForever, 1e6);
  Range("source_memory_mb", static_cast<double>(c.source_memory_mb), 64, 1 << 20);
  Range("source_cpu_seconds", c.service.decoder.frame_cpu_seconds, 0.1, kMany);
  if (c.source_isolation != "required" && c.source_isolation != "off") {
    throw InputError("[serve] source_isolation: expected required or off, got '" +
                     c.source_isolation + "'");
  }
  ServiceOptions options = c.service;
  options.decoder.program = c.source_decoder;
  options.decoder.filtered = c.source_isolation == "required";
  options.decoder.memory_bytes = c.source_memory_mb << 20;
  options.decoder.playlists = c.service.sources.playlists;
  options.budget.kv_bytes = c.stream_kv_mb << 20;
  options.memory.host_bytes = std::max<int64_t>(0, c.stream_host_mb) << 20;
  options.memory.disk_bytes = c.stream_disk_mb << 20;
  options.memory.disk_directory = c.memory_directory;
  options.state_directory = c.state_directory;
  const int streams = std::min(c.scheduler.max_streams, 1 << 20);
  options.saved.streams = c.saved_streams > 0 ? c.saved_streams : 2 * streams;
  options.all_saved.streams = c.all_saved_streams > 0 ? c.all_saved_streams : 8 * streams;
  options.all_saved.bytes =
      c.all_saved_mb > 0 ? c.all_saved_mb << 20 : FreeBytes(c.state_directory) / 2;
  options.saved.bytes = c.saved_mb > 0 ? c.saved_mb << 20 : options.all_saved.bytes / 2;
  if (options.account_sources == 0) {
    const bool shared = options.tokens.size() > 1;
    options.account_sources = shared ? std::max(1, options.max_sources / 2) : options.max_sources;
  }
  options.message_bytes = c.max_message_mb << 20;
  options.outgoing_bytes = c.outgoing_kb << 10;
  options.network_bytes = c.network_mb << 20;
  options.tls = {.certificate = c.certificate, .key = c.key, .client_ca = c.client_ca};
  options.sources.directories.assign(c.source_directories.begin(), c.source_directories.end());
  CheckExposure(options);
  if (!c.metrics.empty()) ParseListen("metrics", c.metrics);
  SourceOpener::Check(options.sources, options.decoder);
  return options;
}

}  // namespace sluice
