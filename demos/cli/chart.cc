#include "demos/cli/chart.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <optional>

namespace sluice::cli {
namespace {

constexpr double kRadius = 4;                           // of a dot
constexpr double kFont = 11, kGlyph = 6.7, kLine = 14;  // a monospaced font's sizes
constexpr double kWidth = 980, kLeft = 64, kRight = 24, kTop = 64, kBottom = 48;
constexpr const char* kColors[] = {"#767676", "#0b7fc4", "#c2570c", "#2f8f3a", "#8e5bd0"};

std::string Text(const char* format, auto... values) {
  char text[512];
  std::snprintf(text, sizeof text, format, values...);
  return text;
}

std::string Escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '&') {
      out += "&amp;";
    } else if (c == '<') {
      out += "&lt;";
    } else if (c == '>') {
      out += "&gt;";
    } else {
      out += c;
    }
  }
  return out;
}

ChartBox DotBox(const ChartDot& dot) {
  return {dot.x - kRadius - 1, dot.y - kRadius - 1, dot.x + kRadius + 1, dot.y + kRadius + 1};
}

// The point of `box` that is nearest to the dot: where its line ends.
ChartDot NearestOf(const ChartBox& box, const ChartDot& dot) {
  return {std::clamp(dot.x, box.left, box.right), std::clamp(dot.y, box.top, box.bottom), ""};
}

bool NeedsLine(const ChartBox& box, const ChartDot& dot) {
  const ChartDot end = NearestOf(box, dot);
  return std::hypot(end.x - dot.x, end.y - dot.y) > 3 * kRadius;
}

// The line from a dot to its label, as small boxes; none where the label is near.
std::vector<ChartBox> LineBoxes(const ChartBox& box, const ChartDot& dot) {
  std::vector<ChartBox> boxes;
  if (!NeedsLine(box, dot)) return boxes;
  const ChartDot end = NearestOf(box, dot);
  const int steps = static_cast<int>(std::hypot(end.x - dot.x, end.y - dot.y) / 3);
  for (int i = 1; i < steps; ++i) {
    const double x = dot.x + (end.x - dot.x) * i / steps, y = dot.y + (end.y - dot.y) * i / steps;
    boxes.push_back({x - 1, y - 1, x + 1, y + 1});
  }
  return boxes;
}

bool MeetsAny(const ChartBox& box, const std::vector<ChartBox>& others) {
  return std::any_of(others.begin(), others.end(),
                     [&](const ChartBox& other) { return box.Meets(other); });
}

// Tries places around the dot, further and further away. lines: of earlier labels, which this one
// and its own line shall not cross; null: they may.
std::optional<ChartBox> Place(const ChartDot& dot, const ChartBox& area,
                              const std::vector<ChartBox>& labels,
                              const std::vector<ChartBox>& dots,
                              const std::vector<ChartBox>* lines) {
  constexpr int kAngles = 24;
  const double width = kGlyph * static_cast<double>(dot.label.size());
  const double farthest = std::hypot(area.right - area.left, area.bottom - area.top);
  for (double away = kRadius + 4; away < farthest; away += 8) {
    for (int i = 0; i < kAngles; ++i) {
      // To the right first, then alternately above and below.
      const double angle = (i % 2 == 0 ? 1 : -1) * ((i + 1) / 2) * 2 * M_PI / kAngles;
      const double x = dot.x + away * std::cos(angle), y = dot.y + away * std::sin(angle);
      const double left = std::cos(angle) >= 0 ? x : x - width;
      const ChartBox box = {left, y - kLine / 2, left + width, y + kLine / 2};
      if (box.left < area.left || box.right > area.right || box.top < area.top ||
          box.bottom > area.bottom || MeetsAny(box, labels) || MeetsAny(box, dots)) {
        continue;
      }
      if (lines == nullptr) return box;
      const std::vector<ChartBox> line = LineBoxes(box, dot);
      const bool crossed = std::any_of(
          line.begin(), line.end(), [&](const ChartBox& piece) { return MeetsAny(piece, labels); });
      if (!crossed && !MeetsAny(box, *lines)) return box;
    }
  }
  return std::nullopt;
}

// Ticks at whole multiples of 1, 2 or 5 per cent and their tens; at most ten of them.
double TickStep(double range) {
  double step = 0.01;
  for (int i = 0; range / step > 10; ++i) step *= i % 3 == 1 ? 2.5 : 2;
  return step;
}

struct Axis {
  double low, high;
  static Axis Around(const std::vector<ChartPoint>& points, double ChartPoint::*value) {
    Axis axis = {1, 1};
    for (const ChartPoint& point : points) {
      axis.low = std::min(axis.low, point.*value);
      axis.high = std::max(axis.high, point.*value);
    }
    const double step = TickStep(axis.high - axis.low + 0.02);
    axis.low = step * std::floor(axis.low / step - 0.2);
    axis.high = step * std::ceil(axis.high / step + 0.2);
    return axis;
  }
  double Share(double value) const { return (value - low) / (high - low); }
};

}  // namespace

std::vector<ChartBox> PlaceLabels(std::span<const ChartDot> dots, const ChartBox& area) {
  std::vector<ChartBox> dot_boxes, lines, labels;
  for (const ChartDot& dot : dots) dot_boxes.push_back(DotBox(dot));
  for (const ChartDot& dot : dots) {
    std::optional<ChartBox> box = Place(dot, area, labels, dot_boxes, &lines);
    if (!box) box = Place(dot, area, labels, dot_boxes, nullptr);
    if (!box) return {};
    labels.push_back(*box);
    for (const ChartBox& piece : LineBoxes(*box, dot)) lines.push_back(piece);
  }
  return labels;
}

std::string ToSvg(const Chart& chart) {
  const Axis x = Axis::Around(chart.points, &ChartPoint::x);
  const Axis y = Axis::Around(chart.points, &ChartPoint::y);
  // As tall as the labels need.
  double height = 600;
  std::vector<ChartDot> dots;
  std::vector<ChartBox> labels;
  ChartBox area;
  for (;; height += 150) {
    area = {kLeft, kTop, kWidth - kRight, height - kBottom};
    dots.clear();
    for (const ChartPoint& point : chart.points) {
      dots.push_back({area.left + x.Share(point.x) * (area.right - area.left),
                      area.bottom - y.Share(point.y) * (area.bottom - area.top), point.label});
    }
    labels = PlaceLabels(dots, area);
    if (labels.size() == dots.size()) break;
  }

  std::string svg = Text(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" width=\"%.0f\" "
      "height=\"%.0f\" role=\"img\">\n",
      kWidth, height, kWidth, height);
  svg += Text(
      "<style>\n"
      "text { font: %.0fpx ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace; "
      "fill: #222 }\n"
      ".page { fill: #fff } .grid { stroke: #ddd } .line { stroke: #999 } .title { font-size: 14px "
      "}\n"
      "@media (prefers-color-scheme: dark) {\n"
      "text { fill: #ddd } .page { fill: #14171a } .grid { stroke: #33383d } .line { stroke: #777 "
      "}\n}\n</style>\n",
      kFont);
  svg += "<title>" + Escaped(chart.title) + "</title>\n";
  svg += "<rect class=\"page\" width=\"100%\" height=\"100%\"/>\n";
  svg += Text("<text class=\"title\" x=\"%.0f\" y=\"24\">", kLeft) + Escaped(chart.title) +
         "</text>\n";

  const auto tick_text = [](double value) { return Text("%.0f %%", 100 * value); };
  const double x_step = TickStep(x.high - x.low), y_step = TickStep(y.high - y.low);
  for (double at = x.low; at < x.high + x_step / 2; at += x_step) {
    const double px = area.left + x.Share(at) * (area.right - area.left);
    svg += Text("<path class=\"grid\" d=\"M%.1f %.1fV%.1f\"/>\n", px, area.top, area.bottom);
    svg += Text("<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">%s</text>\n", px,
                area.bottom + 16, tick_text(at).c_str());
  }
  for (double at = y.low; at < y.high + y_step / 2; at += y_step) {
    const double py = area.bottom - y.Share(at) * (area.bottom - area.top);
    svg += Text("<path class=\"grid\" d=\"M%.1f %.1fH%.1f\"/>\n", area.left, py, area.right);
    svg += Text("<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"end\">%s</text>\n", area.left - 6,
                py + 4, tick_text(at).c_str());
  }
  svg += Text("<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">", (area.left + area.right) / 2,
              height - 12) +
         Escaped(chart.x_title) + "</text>\n";
  svg += Text("<text x=\"16\" y=\"%.1f\" transform=\"rotate(-90 16 %.1f)\" text-anchor=\"middle\">",
              (area.top + area.bottom) / 2, (area.top + area.bottom) / 2) +
         Escaped(chart.y_title) + "</text>\n";

  double legend = kLeft;
  for (size_t i = 0; i < chart.groups.size(); ++i) {
    svg += Text("<circle cx=\"%.1f\" cy=\"44\" r=\"%.0f\" fill=\"%s\"/>\n", legend + kRadius,
                kRadius, kColors[i % std::size(kColors)]);
    svg += Text("<text x=\"%.1f\" y=\"48\">", legend + 14) + Escaped(chart.groups[i]) + "</text>\n";
    legend += 32 + kGlyph * static_cast<double>(chart.groups[i].size());
  }
  for (size_t i = 0; i < dots.size(); ++i) {
    if (!NeedsLine(labels[i], dots[i])) continue;
    const ChartDot end = NearestOf(labels[i], dots[i]);
    svg += Text("<path class=\"line\" d=\"M%.1f %.1fL%.1f %.1f\"/>\n", dots[i].x, dots[i].y, end.x,
                end.y);
  }
  for (size_t i = 0; i < dots.size(); ++i) {
    const char* color = kColors[static_cast<size_t>(chart.points[i].group) % std::size(kColors)];
    svg += Text("<circle cx=\"%.1f\" cy=\"%.1f\" r=\"%.0f\" fill=\"%s\"/>\n", dots[i].x, dots[i].y,
                kRadius, color);
    svg += Text("<text x=\"%.1f\" y=\"%.1f\">", labels[i].left, labels[i].bottom - 3) +
           Escaped(dots[i].label) + "</text>\n";
  }
  return svg + "</svg>\n";
}

}  // namespace sluice::cli
