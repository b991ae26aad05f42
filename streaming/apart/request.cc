#include "streaming/apart/request.h"

#include <nlohmann/json.hpp>
#include <optional>

#include "runtime/error.h"

namespace sluice::apart {
namespace {

using nlohmann::json;

json Nanoseconds(const std::optional<MediaTime>& time) {
  return time ? json(time->nanoseconds()) : json();
}

std::optional<MediaTime> TimeFrom(const json& value) {
  if (value.is_null()) return std::nullopt;
  return MediaTime::FromNanoseconds(value.get<int64_t>());
}

}  // namespace

std::string ToText(const Request& r) {
  const SourceOptions& o = r.options;
  return json{{"parent", r.parent},
              {"source", r.source},
              {"label", r.label},
              {"host", r.host},
              {"addresses", r.addresses},
              {"network", r.network},
              {"playlists", r.playlists},
              {"filtered", r.filtered},
              {"memory_bytes", r.memory_bytes},
              {"slot_bytes", r.slot_bytes},
              {"elements", r.elements},
              {"fps", o.rate.fps},
              {"every_nth", o.rate.every_nth},
              {"begin_ns", Nanoseconds(o.begin)},
              {"end_ns", Nanoseconds(o.end)},
              {"max_frames", o.max_frames},
              {"stall_ms", o.stall_timeout.count()},
              {"most_tries", o.reconnect.most_tries},
              {"max_side_pixels", o.max_side_pixels}}
      .dump(-1, ' ', true, json::error_handler_t::replace);
}

Request RequestFrom(std::string_view text) {
  try {
    const json j = json::parse(text);
    Request r;
    r.parent = j.at("parent");
    r.source = j.at("source");
    r.label = j.at("label");
    r.host = j.at("host");
    r.addresses = j.at("addresses").get<std::vector<std::string>>();
    r.network = j.at("network");
    r.playlists = j.at("playlists");
    r.filtered = j.at("filtered");
    r.memory_bytes = j.at("memory_bytes");
    r.slot_bytes = j.at("slot_bytes");
    r.elements = j.at("elements").get<std::vector<std::string>>();
    SourceOptions& o = r.options;
    o.rate.fps = j.at("fps");
    o.rate.every_nth = j.at("every_nth");
    o.begin = TimeFrom(j.at("begin_ns"));
    o.end = TimeFrom(j.at("end_ns"));
    o.max_frames = j.at("max_frames");
    o.stall_timeout = std::chrono::milliseconds(j.at("stall_ms").get<int64_t>());
    o.max_side_pixels = j.at("max_side_pixels");
    // Whoever asked opens it again, in another process; here a hang-up then is no end.
    o.reconnect.most_tries = j.at("most_tries");
    return r;
  } catch (const json::exception& error) {
    throw Error("[decode] the request cannot be read: " + std::string(error.what()));
  }
}

}  // namespace sluice::apart
