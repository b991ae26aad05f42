// A picture of labelled points as SVG, legible on light and dark pages.
#ifndef SLUICE_DEMOS_CLI_CHART_H_
#define SLUICE_DEMOS_CLI_CHART_H_

#include <span>
#include <string>
#include <vector>

namespace sluice::cli {

struct ChartPoint {
  std::string label;  // ASCII
  double x = 0, y = 0;
  int group = 0;  // decides the colour
};

struct Chart {
  std::string title, x_title, y_title;
  std::vector<std::string> groups;  // their names
  std::vector<ChartPoint> points;
};

// In pixels, y downwards.
struct ChartBox {
  double left, top, right, bottom;
  bool Meets(const ChartBox& other) const {
    return left < other.right && other.left < right && top < other.bottom && other.top < bottom;
  }
};

// Where labels go that stand beside their dots: each box holds its label, lies in `area`, and meets
// no other box and no dot. Labels that find no place near get a line to their dot, which crosses no
// label where that can be. Empty when the area is too small for them all.
struct ChartDot {
  double x, y;  // pixels
  std::string label;
};
std::vector<ChartBox> PlaceLabels(std::span<const ChartDot> dots, const ChartBox& area);

// The whole file. Axes count in per cent: a value of 1 is written as 100 %.
std::string ToSvg(const Chart& chart);

}  // namespace sluice::cli

#endif  // SLUICE_DEMOS_CLI_CHART_H_
