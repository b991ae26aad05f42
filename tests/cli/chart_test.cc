#include "demos/cli/chart.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

namespace sluice::cli {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

TEST(ChartTest, LabelsMeetNeitherEachOtherNorDotsHoweverCrowded) {
  std::mt19937 random(1);
  std::uniform_real_distribution<double> near(0, 60);
  std::vector<ChartDot> dots;
  for (int i = 0; i < 40; ++i) {
    dots.push_back({300 + near(random), 300 + near(random), std::string(3 + i % 20, 'x')});
  }
  const ChartBox area = {0, 0, 900, 900};
  const std::vector<ChartBox> labels = PlaceLabels(dots, area);
  ASSERT_EQ(labels.size(), dots.size());
  for (size_t i = 0; i < labels.size(); ++i) {
    EXPECT_GE(labels[i].left, area.left);
    EXPECT_LE(labels[i].right, area.right);
    EXPECT_GE(labels[i].top, area.top);
    EXPECT_LE(labels[i].bottom, area.bottom);
    for (size_t j = 0; j < i; ++j) EXPECT_FALSE(labels[i].Meets(labels[j])) << i << " " << j;
    for (const ChartDot& dot : dots) {
      EXPECT_FALSE(labels[i].Meets({dot.x - 4, dot.y - 4, dot.x + 4, dot.y + 4})) << i;
    }
  }
}

TEST(ChartTest, AnAreaThatIsTooSmallIsTold) {
  EXPECT_TRUE(PlaceLabels(std::vector<ChartDot>{{5, 5, "a long label"}}, {0, 0, 20, 20}).empty());
}

TEST(ChartTest, DrawsEveryPointAndEscapesText) {
  Chart chart;
  chart.title = "A < B & C";
  chart.groups = {"one"};
  for (int i = 0; i < 60; ++i) chart.points.push_back({"point", 0.5, 1, 0});  // all in one place
  const std::string svg = ToSvg(chart);
  EXPECT_THAT(svg, HasSubstr("A &lt; B &amp; C"));
  EXPECT_THAT(svg, Not(HasSubstr("A < B")));
  EXPECT_THAT(svg, HasSubstr("prefers-color-scheme: dark"));
  size_t count = 0;
  for (size_t at = svg.find(">point<"); at != std::string::npos; at = svg.find(">point<", at + 1)) {
    ++count;
  }
  EXPECT_EQ(count, 60u);
}

}  // namespace
}  // namespace sluice::cli
