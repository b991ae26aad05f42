// Numbers about a process that somebody else collects: counters, gauges and histograms, written as
// text in the Prometheus exposition format 0.0.4.
//
// Thread-safe. Finding an instrument takes a lock, so its users find it once and keep the
// reference; adding to one costs an atomic operation.
#ifndef SLUICE_STREAMING_METRICS_H_
#define SLUICE_STREAMING_METRICS_H_

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace sluice {

// Only goes up. Its name ends in _total.
class Counter {
 public:
  void Add(int64_t amount = 1) { value_.fetch_add(amount, std::memory_order_relaxed); }
  int64_t value() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<int64_t> value_ = 0;
};

// Goes up and down.
class Gauge {
 public:
  void Set(double value) { value_.store(value, std::memory_order_relaxed); }
  void Add(double amount) { value_.fetch_add(amount, std::memory_order_relaxed); }
  double value() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<double> value_ = 0;
};

// How often a value lay in which range.
class Histogram {
 public:
  // bounds: inclusive upper ends of the ranges, ascending; one more range has no end.
  explicit Histogram(std::vector<double> bounds);
  void Observe(double value);
  int64_t count() const;
  double sum() const { return sum_.load(std::memory_order_relaxed); }
  const std::vector<double>& bounds() const { return bounds_; }
  // Of each range, the endless one last.
  std::vector<int64_t> counts() const;

 private:
  const std::vector<double> bounds_;
  const std::unique_ptr<std::atomic<int64_t>[]> counts_;
  std::atomic<double> sum_ = 0;
};

// Durations from 100 microseconds to a minute, in seconds: steps of 1, 2.5 and 5.
std::vector<double> LatencyBounds();

class Metrics {
 public:
  using Labels = std::vector<std::pair<std::string, std::string>>;  // name, value

  Metrics() = default;
  Metrics(const Metrics&) = delete;
  Metrics& operator=(const Metrics&) = delete;

  // The instrument of that name and those labels, made when first asked for; valid as long as this
  // object. `help` and `bounds` are read when the name is new. Throws Error on names that the
  // format does not allow and where the name is of another kind.
  Counter& counter(std::string_view name, std::string_view help, const Labels& labels = {});
  Gauge& gauge(std::string_view name, std::string_view help, const Labels& labels = {});
  Histogram& histogram(std::string_view name, std::string_view help,
                       const std::vector<double>& bounds, const Labels& labels = {});

  // Everything there is, by name and labels. Content-Type: text/plain; version=0.0.4
  std::string Text() const;

 private:
  enum class Kind { kCounter, kGauge, kHistogram };
  // One of the three.
  struct Instrument {
    std::unique_ptr<Counter> counter;
    std::unique_ptr<Gauge> gauge;
    std::unique_ptr<Histogram> histogram;
  };
  // All instruments of one name.
  struct Family {
    Kind kind;
    std::string help;
    std::vector<double> bounds;
    std::map<std::string, Instrument> instruments;  // by their labels as written
  };
  Instrument& Find(std::string_view name, std::string_view help, Kind kind,
                   const std::vector<double>& bounds, const Labels& labels);

  mutable std::mutex mutex_;
  std::map<std::string, Family, std::less<>> families_;
};

}  // namespace sluice

#endif  // SLUICE_STREAMING_METRICS_H_
