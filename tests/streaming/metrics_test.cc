#include "streaming/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "runtime/error.h"

namespace sluice {
namespace {

using testing::ElementsAre;

TEST(MetricsTest, WritesEveryKindAsTheFormatAsks) {
  Metrics metrics;
  metrics.counter("sluice_frames_total", "Frames.", {{"result", "in"}}).Add(3);
  metrics.counter("sluice_frames_total", "Frames.", {{"result", "dropped"}}).Add();
  metrics.gauge("sluice_streams", "Open streams.").Set(2.5);
  Histogram& histogram = metrics.histogram("sluice_step_seconds", "Steps.", {0.1, 2});
  for (const double seconds : {0.1, 0.25, 1.0, 3.0}) histogram.Observe(seconds);
  EXPECT_EQ(metrics.Text(),
            "# HELP sluice_frames_total Frames.\n"
            "# TYPE sluice_frames_total counter\n"
            "sluice_frames_total{result=\"dropped\"} 1\n"
            "sluice_frames_total{result=\"in\"} 3\n"
            "# HELP sluice_step_seconds Steps.\n"
            "# TYPE sluice_step_seconds histogram\n"
            "sluice_step_seconds_bucket{le=\"0.1\"} 1\n"
            "sluice_step_seconds_bucket{le=\"2\"} 3\n"
            "sluice_step_seconds_bucket{le=\"+Inf\"} 4\n"
            "sluice_step_seconds_sum 4.35\n"
            "sluice_step_seconds_count 4\n"
            "# HELP sluice_streams Open streams.\n"
            "# TYPE sluice_streams gauge\n"
            "sluice_streams 2.5\n");
}

TEST(MetricsTest, EscapesHelpAndLabelValues) {
  Metrics metrics;
  metrics.counter("c_total", "a\\b\n\"c\"", {{"path", "C:\\\"x\"\n"}}).Add();
  EXPECT_EQ(metrics.Text(),
            "# HELP c_total a\\\\b\\n\"c\"\n"
            "# TYPE c_total counter\n"
            "c_total{path=\"C:\\\\\\\"x\\\"\\n\"} 1\n");
}

TEST(MetricsTest, GivesTheSameInstrumentForTheSameNameAndLabels) {
  Metrics metrics;
  Counter& first = metrics.counter("c_total", "", {{"a", "1"}});
  EXPECT_EQ(&first, &metrics.counter("c_total", "", {{"a", "1"}}));
  EXPECT_NE(&first, &metrics.counter("c_total", "", {{"a", "2"}}));
}

TEST(MetricsTest, RefusesNamesTheFormatDoesNotAllowAndAChangeOfKind) {
  Metrics metrics;
  EXPECT_THROW(metrics.counter("", ""), Error);
  EXPECT_THROW(metrics.counter("9lives", ""), Error);
  EXPECT_THROW(metrics.counter("a-b", ""), Error);
  EXPECT_THROW(metrics.counter("a", "", {{"b:c", "d"}}), Error);
  EXPECT_THROW(metrics.histogram("h", "", {1}, {{"le", "1"}}), Error);
  EXPECT_THROW(metrics.histogram("h", "", {2, 1}), Error);
  metrics.counter("a_total", "");
  EXPECT_THROW(metrics.gauge("a_total", ""), Error);
}

TEST(MetricsTest, LosesNothingThatThreadsAddAtOnce) {
  Metrics metrics;
  Histogram& histogram = metrics.histogram("h_seconds", "", LatencyBounds());
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 5000; ++i) {
        metrics.counter("c_total", "").Add();
        metrics.gauge("g", "").Add(0.5);
        histogram.Observe(0.25);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(metrics.counter("c_total", "").value(), 20000);
  EXPECT_EQ(metrics.gauge("g", "").value(), 10000);
  EXPECT_EQ(histogram.count(), 20000);
  EXPECT_EQ(histogram.sum(), 5000);
}

}  // namespace
}  // namespace sluice
