#pragma once

// A cloud of points with its Pareto front as one SVG element: accuracy upwards,
// a cost to the right, logarithmic.

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// One point of a picture.
struct PicturePoint {
  double cost = 0;
  double accuracy = 0;
  bool in_front = false;
  std::string label; // beside the point, where there is room
  std::string note; // shown when the pointer rests on it
};

/// What stands at a picture's axes, units included.
struct PictureTitles {
  std::string cost = "number of trainable parameters (log scale)";
  std::string accuracy = "accuracy (0 to 1)";
};

namespace detail {

/// A rectangle in pixels, y downwards.
struct Box {
  double left, top, right, bottom;

  bool overlaps(const Box& other) const {
    return left < other.right && other.left < right && top < other.bottom &&
        other.top < bottom;
  }
  bool contains(const Box& other) const {
    return left <= other.left && other.right <= right && top <= other.top &&
        other.bottom <= bottom;
  }
};

/// Text for XML and HTML, without the control characters that XML forbids.
inline std::string escape_xml(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
    }
  }
  return out;
}

/// About how wide a text of 12 pixels is, on the wide side.
inline double text_width(const std::string& text) {
  const auto columns = std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xC0) != 0x80;
  });
  return 7.2 * static_cast<double>(columns);
}

/// "300", "1k", "30k", "1.5M".
inline std::string short_number(double value) {
  for (const auto& [unit, name] :
       {std::pair{1e9, "G"}, {1e6, "M"}, {1e3, "k"}}) {
    if (std::abs(value) >= unit) {
      return fmt::format("{:.4g}{}", value / unit, name);
    }
  }
  return fmt::format("{:.4g}", value);
}

/// A round step: 1, 2 or 5 times a power of ten, `range / count` or more.
inline double round_step(double range, int count) {
  const double raw = range / count;
  const double power = std::pow(10.0, std::floor(std::log10(raw)));
  for (const double lead : {1.0, 2.0, 5.0}) {
    if (lead * power >= raw * (1 - 1e-9)) {
      return lead * power;
    }
  }
  return 10 * power;
}

/// Where the values of a picture lie, in pixels.
class PictureAxes {
 public:
  static constexpr double kWidth = 720, kHeight = 440;
  static constexpr double kLeft = 78, kRight = 20, kTop = 18, kBottom = 58;

  explicit PictureAxes(const std::vector<PicturePoint>& points) {
    low_ = high_ = points.front().cost;
    bottom_ = top_ = points.front().accuracy;
    for (const auto& p : points) {
      low_ = std::min(low_, p.cost);
      high_ = std::max(high_, p.cost);
      bottom_ = std::min(bottom_, p.accuracy);
      top_ = std::max(top_, p.accuracy);
    }
    is_log_ = low_ > 0;
    low_ = scaled(low_);
    high_ = scaled(high_);
    const auto widen = [](double& a, double& b, double part, double least) {
      const double margin = std::max((b - a) * part, least);
      a -= margin;
      b += margin;
    };
    widen(low_, high_, 0.08, is_log_ ? 0.05 : 0.5);
    widen(bottom_, top_, 0.12, 0.005);
  }

  double x(double cost) const {
    return kLeft +
        (scaled(cost) - low_) / (high_ - low_) * (kWidth - kLeft - kRight);
  }
  double y(double accuracy) const {
    return kHeight - kBottom -
        (accuracy - bottom_) / (top_ - bottom_) * (kHeight - kTop - kBottom);
  }
  static Box plot() {
    return {kLeft, kTop, kWidth - kRight, kHeight - kBottom};
  }

  /// Values along the x axis whose labels do not touch: of the decades and
  /// their parts the finest that fit, else evenly spaced ones.
  std::vector<double> cost_ticks() const {
    if (is_log_) {
      const std::vector<std::vector<double>> leads{{1, 2, 5}, {1, 3}, {1}};
      for (const auto& lead : leads) {
        std::vector<double> ticks;
        for (int power = static_cast<int>(std::floor(low_));
             power <= static_cast<int>(std::ceil(high_));
             ++power) {
          for (const double l : lead) {
            const double value = l * std::pow(10.0, power);
            if (is_inside(scaled(value), low_, high_)) {
              ticks.push_back(value);
            }
          }
        }
        if (ticks.size() >= 2 && have_room(ticks)) {
          return ticks;
        }
      }
    }
    const double from = is_log_ ? std::pow(10.0, low_) : low_;
    const double to = is_log_ ? std::pow(10.0, high_) : high_;
    return even(from, to, 4);
  }
  std::vector<double> accuracy_ticks() const {
    return even(bottom_, top_, 8);
  }
  /// Digits behind the point that tell two ticks apart.
  int accuracy_digits() const {
    const double step = round_step(top_ - bottom_, 8);
    return std::max(0, static_cast<int>(std::ceil(-std::log10(step) - 1e-9)));
  }

 private:
  double scaled(double cost) const {
    return is_log_ ? std::log10(cost) : cost;
  }
  static bool is_inside(double value, double low, double high) {
    const double slack = 1e-9 * (high - low);
    return value >= low - slack && value <= high + slack;
  }
  static std::vector<double> even(double low, double high, int count) {
    const double step = round_step(high - low, count);
    std::vector<double> ticks;
    for (double i = std::ceil(low / step); is_inside(i * step, low, high);
         i += 1) {
      ticks.push_back(i * step);
    }
    return ticks;
  }
  bool have_room(const std::vector<double>& ticks) const {
    for (size_t i = 1; i < ticks.size(); ++i) {
      const double needed = (text_width(short_number(ticks[i - 1])) +
                             text_width(short_number(ticks[i]))) /
              2 +
          8;
      if (x(ticks[i]) - x(ticks[i - 1]) < needed) {
        return false;
      }
    }
    return true;
  }

  double low_, high_, bottom_, top_;
  bool is_log_ = true;
};

/// The steps of the front, as boxes of its line.
inline std::vector<Box> front_line(
    const std::vector<std::pair<double, double>>& corners) {
  std::vector<Box> boxes;
  for (size_t i = 1; i < corners.size(); ++i) {
    const auto& [x0, y0] = corners[i - 1];
    const auto& [x1, y1] = corners[i];
    boxes.push_back(
        {std::min(x0, x1) - 1,
         std::min(y0, y1) - 1,
         std::max(x0, x1) + 1,
         std::max(y0, y1) + 1});
  }
  return boxes;
}

/// A place for each label beside its point where it covers no point, no part of
/// the line and no other label; nothing where there is none.
inline std::vector<std::optional<Box>> place_labels(
    const std::vector<std::pair<double, double>>& centres,
    const std::vector<std::string>& labels,
    const std::vector<Box>& line,
    const Box& plot) {
  constexpr double kRadius = 7, kHeight = 14;
  std::vector<Box> taken = line;
  for (const auto& [x, y] : centres) {
    taken.push_back({x - kRadius, y - kRadius, x + kRadius, y + kRadius});
  }
  std::vector<std::optional<Box>> result(labels.size());
  for (size_t i = 0; i < labels.size(); ++i) {
    if (labels[i].empty()) {
      continue;
    }
    const auto [x, y] = centres[i];
    const double w = text_width(labels[i]);
    for (const double gap : {8.0, 14.0}) {
      const double above = y - gap - kHeight, below = y + gap;
      const double lefts[] = {x - w / 2, x - w - gap, x + gap};
      std::vector<std::pair<double, double>> corners;
      for (const double left : lefts) {
        corners.emplace_back(left, above);
      }
      corners.emplace_back(x - w - gap, y - kHeight / 2);
      corners.emplace_back(x + gap, y - kHeight / 2);
      for (const double left : lefts) {
        corners.emplace_back(left, below);
      }
      for (const auto& [left, top] : corners) {
        const Box box{left, top, left + w, top + kHeight};
        const bool free = plot.contains(box) &&
            std::none_of(taken.begin(), taken.end(), [&](const Box& other) {
                            return box.overlaps(other);
                          });
        if (free) {
          result[i] = box;
          break;
        }
      }
      if (result[i]) {
        taken.push_back(*result[i]);
        break;
      }
    }
  }
  return result;
}

/// Classes of the picture's parts: blue and filled for the front, hollow for
/// the rest, so that colour is not all that tells them apart.
inline constexpr const char* kPictureStyle = R"(
:root{--paper:#fff;--card:#f6f7f9;--ink:#1b1f24;--soft:#5c6670;--line:#dfe3e8;--front:#0b62a8}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--card:#1c2026;--ink:#e6e9ed;--soft:#9aa4af;
 --line:#313842;--front:#6cb4ff}}
svg{width:100%;height:auto;display:block}
svg text{font-size:12px;fill:var(--soft)}svg .label{fill:var(--ink)}svg .title{font-size:13px;fill:var(--ink)}
.grid{stroke:var(--line)}.axis{stroke:var(--soft)}
.front{fill:none;stroke:var(--front);stroke-width:2}
.point{fill:var(--card);stroke:var(--soft);stroke-width:1.4}
.best{fill:var(--front);stroke:var(--card);stroke-width:1.4}
)";

} // namespace detail

/// The points, the line of their front and what is at the axes. `points` must
/// not be empty; those in the front are marked so.
inline std::string pareto_svg(
    const std::vector<PicturePoint>& points,
    const PictureTitles& titles = {}) {
  using detail::escape_xml;
  using Axes = detail::PictureAxes;
  const Axes axes(points);
  const auto plot = Axes::plot();
  std::string svg = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" "
      "role=\"img\" aria-label=\"{} against {}\">\n",
      Axes::kWidth,
      Axes::kHeight,
      escape_xml(titles.accuracy),
      escape_xml(titles.cost));
  const auto line =
      [&](const char* kind, double x1, double y1, double x2, double y2) {
        svg += fmt::format(
            "<line class=\"{}\" x1=\"{:.1f}\" y1=\"{:.1f}\" x2=\"{:.1f}\" "
            "y2=\"{:.1f}\"/>\n",
            kind,
            x1,
            y1,
            x2,
            y2);
      };
  const auto text = [&](const char* kind,
                        double x,
                        double y,
                        const char* anchor,
                        const std::string& what,
                        const std::string& more = "") {
    svg += fmt::format(
        "<text class=\"{}\" x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"{}\"{}>{}"
        "</text>\n",
        kind,
        x,
        y,
        anchor,
        more,
        escape_xml(what));
  };
  for (const double value : axes.accuracy_ticks()) {
    const double y = axes.y(value);
    line("grid", plot.left, y, plot.right, y);
    text(
        "tick",
        plot.left - 8,
        y + 4,
        "end",
        fmt::format(
            "{:.{}f}",
            std::abs(value) < 1e-12 ? 0.0 : value,
            axes.accuracy_digits()));
  }
  line("axis", plot.left, plot.bottom, plot.right, plot.bottom);
  for (const double value : axes.cost_ticks()) {
    const double x = axes.x(value);
    line("axis", x, plot.bottom, x, plot.bottom + 5);
    text("tick", x, plot.bottom + 19, "middle", detail::short_number(value));
  }
  text(
      "title",
      (plot.left + plot.right) / 2,
      Axes::kHeight - 10,
      "middle",
      titles.cost);
  const double middle = (plot.top + plot.bottom) / 2;
  text(
      "title",
      18,
      middle,
      "middle",
      titles.accuracy,
      fmt::format(" transform=\"rotate(-90 18 {:.1f})\"", middle));

  std::vector<size_t> front;
  std::vector<std::pair<double, double>> centres;
  std::vector<std::string> labels;
  for (size_t i = 0; i < points.size(); ++i) {
    centres.emplace_back(axes.x(points[i].cost), axes.y(points[i].accuracy));
    labels.push_back(points[i].label);
    if (points[i].in_front) {
      front.push_back(i);
    }
  }
  std::sort(front.begin(), front.end(), [&](size_t a, size_t b) {
    return points[a].cost < points[b].cost;
  });
  // Up and to the right in steps: what is reached for so much or less.
  std::vector<std::pair<double, double>> corners;
  for (const size_t i : front) {
    const auto [x, y] = centres[i];
    if (!corners.empty()) {
      corners.emplace_back(x, corners.back().second);
    }
    corners.emplace_back(x, y);
  }
  if (!corners.empty()) {
    corners.emplace_back(plot.right, corners.back().second);
    std::string path;
    for (const auto& [x, y] : corners) {
      path += fmt::format("{:.1f},{:.1f} ", x, y);
    }
    svg += fmt::format(
        "<polyline class=\"front\" points=\"{}\"/>\n",
        path.substr(0, path.size() - 1));
  }
  for (const bool in_front : {false, true}) { // the front on top
    for (size_t i = 0; i < points.size(); ++i) {
      if (points[i].in_front == in_front) {
        svg += fmt::format(
            "<circle class=\"{}\" cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"{}\">"
            "<title>{}</title></circle>\n",
            in_front ? "best" : "point",
            centres[i].first,
            centres[i].second,
            in_front ? 5.5 : 4.0,
            escape_xml(points[i].note));
      }
    }
  }
  const auto places =
      detail::place_labels(centres, labels, detail::front_line(corners), plot);
  for (size_t i = 0; i < places.size(); ++i) {
    if (places[i]) {
      text(
          "label",
          (places[i]->left + places[i]->right) / 2,
          places[i]->bottom - 3,
          "middle",
          labels[i]);
    }
  }
  return svg + "</svg>\n";
}

} // namespace peft
