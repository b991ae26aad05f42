#include "streaming/metrics.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>

#include "runtime/error.h"

namespace sluice {
namespace {

bool IsName(std::string_view name, bool colons) {
  const auto letter = [&](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || (colons && c == ':');
  };
  const auto later = [&](char c) { return letter(c) || (c >= '0' && c <= '9'); };
  return !name.empty() && letter(name[0]) && std::all_of(name.begin(), name.end(), later);
}

// Backslashes and line ends, and in label values quotes, would end the line or the value.
std::string Escaped(std::string_view text, bool quotes) {
  std::string out;
  for (const char c : text) {
    if (c == '\\' || (quotes && c == '"')) out += '\\';
    if (c == '\n') {
      out += "\\n";
    } else {
      out += c;
    }
  }
  return out;
}

// name="value",name="value"
std::string Written(const Metrics::Labels& labels) {
  std::string text;
  for (const auto& [name, value] : labels) {
    if (!IsName(name, /*colons=*/false) || name.starts_with("__") || name == "le") {
      throw Error("[metrics] a label's name must be letters, digits and _ and not le, got " + name);
    }
    text += (text.empty() ? "" : ",") + name + "=\"" + Escaped(value, true) + "\"";
  }
  return text;
}

std::string Number(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "+Inf" : "-Inf";
  char text[32];
  std::snprintf(text, sizeof(text), "%.17g", value);
  // The shortest form that reads back as the same number: 0.1 rather than 0.10000000000000001.
  for (int digits = 6; digits < 17; ++digits) {
    char shorter[32];
    std::snprintf(shorter, sizeof(shorter), "%.*g", digits, value);
    if (std::stod(shorter) == value) return shorter;
  }
  return text;
}

void AddLine(std::string& text, std::string_view name, const std::string& labels,
             const std::string& value) {
  text += name;
  if (!labels.empty()) text += "{" + labels + "}";
  text += " " + value + "\n";
}

void AddHistogram(std::string& text, const std::string& name, const std::string& labels,
                  const Histogram& histogram) {
  const std::string before = labels.empty() ? "" : labels + ",";
  const std::vector<int64_t> counts = histogram.counts();
  int64_t below = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    below += counts[i];
    const bool last = i == histogram.bounds().size();
    const std::string bound = last ? "+Inf" : Number(histogram.bounds()[i]);
    AddLine(text, name + "_bucket", before + "le=\"" + bound + "\"", std::to_string(below));
  }
  AddLine(text, name + "_sum", labels, Number(histogram.sum()));
  AddLine(text, name + "_count", labels, std::to_string(below));
}

}  // namespace

Histogram::Histogram(std::vector<double> bounds)
    : bounds_(std::move(bounds)), counts_(new std::atomic<int64_t>[bounds_.size() + 1] {}) {
  if (!std::is_sorted(bounds_.begin(), bounds_.end(), std::less_equal<double>())) {
    throw Error("[metrics] bounds of a histogram must ascend");
  }
}

void Histogram::Observe(double value) {
  const auto range = std::lower_bound(bounds_.begin(), bounds_.end(), value) - bounds_.begin();
  counts_[range].fetch_add(1, std::memory_order_relaxed);
  sum_.fetch_add(value, std::memory_order_relaxed);
}

int64_t Histogram::count() const {
  int64_t sum = 0;
  for (const int64_t n : counts()) sum += n;
  return sum;
}

std::vector<int64_t> Histogram::counts() const {
  std::vector<int64_t> values;
  for (size_t i = 0; i <= bounds_.size(); ++i) {
    values.push_back(counts_[i].load(std::memory_order_relaxed));
  }
  return values;
}

std::vector<double> LatencyBounds() {
  std::vector<double> bounds;
  for (const double decade : {1e-4, 1e-3, 1e-2, 1e-1, 1.0}) {
    for (const double step : {1.0, 2.5, 5.0}) bounds.push_back(decade * step);
  }
  for (const double seconds : {10.0, 30.0, 60.0}) bounds.push_back(seconds);
  return bounds;
}

Metrics::Instrument& Metrics::Find(std::string_view name, std::string_view help, Kind kind,
                                   const std::vector<double>& bounds, const Labels& labels) {
  if (!IsName(name, /*colons=*/true)) {
    throw Error("[metrics] a name must be letters, digits, _ and :, got " + std::string(name));
  }
  const std::string key = Written(labels);
  const std::lock_guard lock(mutex_);
  auto family = families_.find(name);
  if (family == families_.end()) {
    family = families_.emplace(name, Family{kind, std::string(help), bounds, {}}).first;
  }
  if (family->second.kind != kind) {
    throw Error("[metrics] " + std::string(name) + " is of another kind already");
  }
  Instrument& instrument = family->second.instruments[key];
  if (kind == Kind::kCounter && !instrument.counter) {
    instrument.counter = std::make_unique<Counter>();
  } else if (kind == Kind::kGauge && !instrument.gauge) {
    instrument.gauge = std::make_unique<Gauge>();
  } else if (kind == Kind::kHistogram && !instrument.histogram) {
    instrument.histogram = std::make_unique<Histogram>(family->second.bounds);
  }
  return instrument;
}

Counter& Metrics::counter(std::string_view name, std::string_view help, const Labels& labels) {
  return *Find(name, help, Kind::kCounter, {}, labels).counter;
}

Gauge& Metrics::gauge(std::string_view name, std::string_view help, const Labels& labels) {
  return *Find(name, help, Kind::kGauge, {}, labels).gauge;
}

Histogram& Metrics::histogram(std::string_view name, std::string_view help,
                              const std::vector<double>& bounds, const Labels& labels) {
  return *Find(name, help, Kind::kHistogram, bounds, labels).histogram;
}

std::string Metrics::Text() const {
  const std::lock_guard lock(mutex_);
  std::string text;
  for (const auto& [name, family] : families_) {
    const char* kind = family.kind == Kind::kCounter ? "counter"
                       : family.kind == Kind::kGauge ? "gauge"
                                                     : "histogram";
    text += "# HELP " + name + " " + Escaped(family.help, false) + "\n";
    text += "# TYPE " + name + " " + kind + "\n";
    for (const auto& [labels, instrument] : family.instruments) {
      if (instrument.counter) {
        AddLine(text, name, labels, std::to_string(instrument.counter->value()));
      } else if (instrument.gauge) {
        AddLine(text, name, labels, Number(instrument.gauge->value()));
      } else {
        AddHistogram(text, name, labels, *instrument.histogram);
      }
    }
  }
  return text;
}

}  // namespace sluice
