#pragma once

// The comparison as Markdown, and as one self-contained HTML page with
// pictures.

#include "methods.h"
#include "results.h"

#include "../010_gloss_categories/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace compare {

/// A method that has results.
struct Entry {
  std::string key;
  std::string name;
  std::string family;
  double learning_rate = 0;
  Summary summary;
  int rank = 0; ///< by accuracy, from 1: its number in the pictures
};

struct Page {
  std::string introduction;
  std::string command; ///< that makes these results
  std::vector<std::string> notes;
  int64_t budget = 0; ///< trainable parameters, the head's among them
  std::vector<Entry> entries; ///< by accuracy, the best first
};

namespace detail {

using gloss::detail::Axes;
using gloss::detail::escape;

/// The colour of a family, a variable of the page's style.
inline std::string color_of(const std::string& family) {
  return family == "additive"       ? "blue"
      : family == "partial"         ? "amber"
      : family == "reparameterised" ? "green"
      : family == "hybrid"          ? "violet"
      : family == "unified"         ? "red"
                                    : "grey";
}

inline const std::vector<std::string>& families() {
  static const std::vector<std::string> names{
      "additive",
      "partial",
      "reparameterised",
      "hybrid",
      "unified",
      "reference"};
  return names;
}

inline std::string legend() {
  std::string html = "<div class='legend'>";
  for (const auto& family : families()) {
    html += fmt::format(
        "<span><i style='background:var(--{})'></i>{}</span>",
        color_of(family),
        family);
  }
  return html + "</div>\n";
}

/// "88 k", "22.6 M".
inline std::string short_count(double value) {
  return value >= 1e6 ? fmt::format("{:.3g} M", value / 1e6)
      : value >= 1e3  ? fmt::format("{:.3g} k", value / 1e3)
                      : fmt::format("{:.0f}", value);
}

inline std::string with_error(const Summary& summary) {
  return summary.seeds > 1
      ? fmt::format("{:.3f} ± {:.3f}", summary.accuracy, summary.error)
      : fmt::format("{:.3f}", summary.accuracy);
}

/// A step for grid lines that gives about `lines` of them.
inline double grid_step(double range, double lines) {
  const double raw = range / lines;
  const double unit = std::pow(10, std::floor(std::log10(raw)));
  return unit *
      (raw / unit < 1.5       ? 1
           : raw / unit < 3.5 ? 2
           : raw / unit < 7.5 ? 5
                              : 10);
}

inline std::string y_title(const Axes& axes, const std::string& text) {
  const double middle = (axes.y(axes.y_low) + axes.y(axes.y_high)) / 2;
  return fmt::format(
      "<text class='tick' transform='translate(13 {:.1f}) rotate(-90)' "
      "text-anchor='middle'>{}</text>\n",
      middle,
      text);
}

// ~~~~ accuracy against trainable parameters ~~~~

/// Accuracy against trainable parameters, each method a disc with its number.
/// Methods at the budget train nearly the same: discs that would cover each
/// other move aside.
inline std::string accuracy_chart(const Page& page) {
  constexpr double kRadius = 8.5;
  double lowest = 1, highest = 0, fewest = 1e12, most = 1;
  for (const auto& entry : page.entries) {
    const auto& s = entry.summary;
    lowest = std::min(lowest, s.accuracy - s.error);
    highest = std::max(highest, s.accuracy + s.error);
    fewest = std::min(fewest, static_cast<double>(s.trainable()));
    most = std::max(most, static_cast<double>(s.trainable()));
  }
  const double step = grid_step(std::max(0.02, highest - lowest), 6);
  const Axes axes{
      std::log10(fewest) - 0.15,
      std::log10(most) + 0.15,
      std::max(0.0, std::floor(lowest / step - 0.2) * step),
      std::ceil(highest / step + 0.2) * step,
      760,
      std::max(560.0, 40 + 22.5 * static_cast<double>(page.entries.size()))};
  auto svg = axes.open("accuracy against trainable parameters") +
      axes.y_grid(step, step < 0.0095 ? 3 : 2);
  svg += axes.frame("trainable parameters with the head (logarithmic)");
  svg += y_title(axes, "test accuracy");
  for (int power = 0; power <= 12; ++power) {
    for (const int lead : {1, 3}) {
      const double value = std::log10(lead) + power;
      if (value >= axes.x_low && value <= axes.x_high) {
        svg += axes.x_tick(value, short_count(std::pow(10, value)));
      }
    }
  }
  const double budget = axes.x(std::log10(static_cast<double>(page.budget)));
  svg += fmt::format(
      "<line class='budget' x1='{0:.1f}' x2='{0:.1f}' y1='{1:.1f}' "
      "y2='{2:.1f}'/>"
      "<text class='tick' x='{3:.1f}' y='{4:.1f}'>budget</text>\n",
      budget,
      axes.y(axes.y_high),
      axes.y(axes.y_low),
      budget + 5,
      axes.y(axes.y_low) - 6);
  struct Disc {
    double x, y;
  };
  std::vector<Disc> discs;
  std::string bars, marks;
  for (const auto& entry : page.entries) {
    const auto& s = entry.summary;
    const double x0 = axes.x(std::log10(static_cast<double>(s.trainable())));
    Disc disc{x0, axes.y(s.accuracy)};
    const auto covers = [&](const Disc& other) {
      return std::hypot(disc.x - other.x, disc.y - other.y) < 2 * kRadius + 1;
    };
    for (int i = 1; std::any_of(discs.begin(), discs.end(), covers) && i < 2000;
         ++i) { // right, left, further right, ...
      disc.x = x0 + (i % 2 == 1 ? 1 : -1) * ((i + 1) / 2);
    }
    discs.push_back(disc);
    bars += fmt::format(
        "<path class='bar' style='stroke:var(--{})' d='M{:.1f} "
        "{:.1f}V{:.1f}'/>",
        color_of(entry.family),
        disc.x,
        axes.y(s.accuracy + s.error),
        axes.y(s.accuracy - s.error));
    marks += fmt::format(
        "<g><title>{}: {}, {} trainable</title><circle cx='{:.1f}' "
        "cy='{:.1f}' r='{}' style='fill:var(--{})'/><text class='number' "
        "x='{:.1f}' y='{:.1f}'>{}</text></g>\n",
        escape(entry.name),
        with_error(s),
        gloss::with_commas(s.trainable()),
        disc.x,
        disc.y,
        kRadius,
        color_of(entry.family),
        disc.x,
        disc.y + 3.5,
        entry.rank);
  }
  return svg + bars + "\n" + marks + "</svg>\n";
}

// ~~~~ a line for each method ~~~~

/// Lines of a chart that has a method on each, with its number and name on the
/// left.
struct Rows {
  static constexpr double kHeight = 19, kTop = 10, kBottom = 44;
  double left = 178, right = 60, width = 640;
  size_t count;
  double low, high;

  double height() const {
    return kTop + kBottom + kHeight * static_cast<double>(count);
  }
  double x(double value) const {
    return left + (value - low) / (high - low) * (width - left - right);
  }
  double y(size_t row) const {
    return kTop + kHeight * (static_cast<double>(row) + 0.5);
  }
  std::string open(const std::string& label) const {
    return fmt::format(
        "<svg viewBox='0 0 {} {}' role='img' aria-label='{}'>\n",
        width,
        height(),
        label);
  }
  std::string
  grid(double step, const std::string& format, const std::string& title) const {
    std::string svg;
    const double bottom = height() - kBottom;
    for (double value = std::ceil(low / step - 1e-9) * step;
         value <= high + 1e-9;
         value += step) {
      svg += fmt::format(
          "<line class='grid' x1='{0:.1f}' x2='{0:.1f}' y1='{1}' y2='{2}'/>"
          "<text class='tick' x='{0:.1f}' y='{3}' "
          "text-anchor='middle'>{4}</text>\n",
          x(value),
          kTop,
          bottom,
          bottom + 16,
          fmt::format(
              fmt::runtime(format), std::abs(value) < 1e-9 ? 0.0 : value));
    }
    return svg +
        fmt::format(
               "<text class='tick' x='{:.1f}' y='{:.1f}' "
               "text-anchor='middle'>{}</text>\n",
               (left + width - right) / 2,
               bottom + 35,
               title);
  }
  std::string name(size_t row, const Entry& entry) const {
    return fmt::format(
        "<text class='label' x='{:.1f}' y='{:.1f}' text-anchor='end'>{}</text>"
        "<circle cx='{:.1f}' cy='{:.1f}' r='8' style='fill:var(--{})'/>"
        "<text class='number' x='{:.1f}' y='{:.1f}'>{}</text>\n",
        left - 28,
        y(row) + 4,
        escape(entry.name),
        left - 15,
        y(row),
        color_of(entry.family),
        left - 15,
        y(row) + 3.5,
        entry.rank);
  }
  std::string value(size_t row, double at, const std::string& text) const {
    return fmt::format(
        "<text class='tick' x='{:.1f}' y='{:.1f}'>{}</text>\n",
        at,
        y(row) + 4,
        text);
  }
};

/// Accuracies with their errors, the best first.
inline std::string ranking_chart(const Page& page) {
  double lowest = 1, highest = 0;
  for (const auto& entry : page.entries) {
    const auto& s = entry.summary;
    lowest = std::min(lowest, s.accuracy - s.error);
    highest = std::max(highest, s.accuracy + s.error);
  }
  const double step = grid_step(std::max(0.02, highest - lowest), 5);
  Rows rows;
  rows.count = page.entries.size();
  rows.low = std::max(0.0, std::floor(lowest / step) * step);
  rows.high = std::ceil(highest / step) * step;
  auto svg = rows.open("accuracy of each method") +
      rows.grid(step, step < 0.0095 ? "{:.3f}" : "{:.2f}", "test accuracy");
  for (size_t i = 0; i < page.entries.size(); ++i) {
    const auto& entry = page.entries[i];
    const auto& s = entry.summary;
    svg += rows.name(i, entry);
    svg += fmt::format(
        "<path class='bar' style='stroke:var(--{0})' d='M{1:.1f} {2:.1f}H"
        "{3:.1f}'/><circle cx='{4:.1f}' cy='{2:.1f}' r='4' "
        "style='fill:var(--{0})'/>",
        color_of(entry.family),
        rows.x(s.accuracy - s.error),
        rows.y(i),
        rows.x(s.accuracy + s.error),
        rows.x(s.accuracy));
    svg += rows.value(
        i,
        rows.width - rows.right + 8,
        short_count(static_cast<double>(s.trainable())));
  }
  return svg + "</svg>\n";
}

inline std::vector<Entry> with_costs(const Page& page) {
  std::vector<Entry> entries;
  for (const auto& entry : page.entries) {
    if (entry.summary.has_cost) {
      entries.push_back(entry);
    }
  }
  return entries;
}

/// The memory that training takes, the least first.
inline std::string memory_chart(const Page& page) {
  auto entries = with_costs(page);
  std::stable_sort(
      entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
        return a.summary.cost.memory < b.summary.cost.memory;
      });
  Rows rows;
  rows.count = entries.size();
  rows.low = 0;
  double highest = 1;
  for (const auto& entry : entries) {
    highest = std::max(highest, entry.summary.cost.memory);
  }
  rows.high = highest;
  auto svg = rows.open("memory of a training step") +
      rows.grid(
          grid_step(highest, 6),
          "{:.0f}",
          "peak memory of a training step beyond the frozen weights, MiB");
  for (size_t i = 0; i < entries.size(); ++i) {
    const double memory = entries[i].summary.cost.memory;
    svg += rows.name(i, entries[i]);
    svg += fmt::format(
        "<rect x='{:.1f}' y='{:.1f}' width='{:.1f}' height='11' rx='2' "
        "style='fill:var(--{})'/>",
        rows.x(0),
        rows.y(i) - 5.5,
        rows.x(memory) - rows.x(0),
        color_of(entries[i].family));
    svg += rows.value(i, rows.x(memory) + 6, fmt::format("{:.0f}", memory));
  }
  return svg + "</svg>\n";
}

/// Times of a training step against full fine-tuning's, and of a forward
/// against the base's, the fastest step first.
inline std::string time_chart(const Page& page) {
  auto entries = with_costs(page);
  std::stable_sort(
      entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
        return a.summary.cost.step < b.summary.cost.step;
      });
  Rows rows;
  rows.count = entries.size();
  rows.right = 16;
  rows.low = 0;
  rows.high = 1.1;
  for (const auto& entry : entries) {
    const auto& cost = entry.summary.cost;
    rows.high = std::max({rows.high, cost.step, cost.forward, cost.merged});
  }
  rows.high = std::ceil(rows.high * 4 + 0.2) / 4;
  auto svg = rows.open("times of a training step and of a forward") +
      rows.grid(
          grid_step(rows.high, 7),
          "{:.3g}",
          "time / full fine-tuning's (step), time / the base's "
          "(forward)");
  svg += fmt::format(
      "<line class='budget' x1='{0:.1f}' x2='{0:.1f}' y1='{1}' "
      "y2='{2:.1f}'/>\n",
      rows.x(1),
      Rows::kTop,
      rows.height() - Rows::kBottom);
  for (size_t i = 0; i < entries.size(); ++i) {
    const auto& cost = entries[i].summary.cost;
    const auto color = color_of(entries[i].family);
    const double y = rows.y(i);
    svg += rows.name(i, entries[i]);
    svg += fmt::format(
        "<rect x='{:.1f}' y='{:.1f}' width='{:.1f}' height='5' rx='1' "
        "style='fill:var(--{});opacity:.45'/>",
        rows.x(0),
        y - 2.5,
        rows.x(cost.step) - rows.x(0),
        color);
    svg += fmt::format(
        "<circle cx='{:.1f}' cy='{:.1f}' r='5' style='fill:none;"
        "stroke:var(--{});stroke-width:2'/>",
        rows.x(cost.forward),
        y,
        color);
    if (cost.merged > 0) {
      svg += fmt::format(
          "<path d='M{0:.1f} {1:.1f}l4.5 4.5l4.5 -4.5l-4.5 -4.5z' "
          "style='fill:var(--{2})'/>",
          rows.x(cost.merged) - 4.5,
          y,
          color);
    }
    svg += "\n";
  }
  return svg + "</svg>\n";
}

// ~~~~ tables ~~~~

inline std::string ratio(double value) {
  return value > 0 ? fmt::format("{:.2f}", value) : "-";
}

inline std::string merged_forward(const Cost& cost) {
  return cost.merged == 0 ? "no merge"
      : cost.same_operators
      ? fmt::format("{:.2f}", cost.merged)
      : fmt::format("{:.2f}, OTHER OPERATORS", cost.merged);
}

inline std::string html_table(const Page& page) {
  std::string html =
      "<table><thead><tr><th>Method<th>Family<th>Trainable<th>Accuracy"
      "<th>Step<th>Memory<th>Forward<th>Merged<th>Rate</tr></thead>\n";
  for (const auto& entry : page.entries) {
    const auto& s = entry.summary;
    html += fmt::format(
        "<tr><td><i style='background:var(--{})'></i>{}. {}<td>{}<td>{}"
        "<td>{}<td>{}<td>{:.0f} MiB<td>{}<td>{}<td>{}</tr>\n",
        color_of(entry.family),
        entry.rank,
        escape(entry.name),
        entry.family,
        gloss::with_commas(s.trainable()),
        with_error(s),
        ratio(s.cost.step),
        s.cost.memory,
        ratio(s.cost.forward),
        merged_forward(s.cost),
        entry.learning_rate > 0 ? fmt::format("{:g}", entry.learning_rate)
                                : "-");
  }
  return html + "</table>\n";
}

} // namespace detail

/// The table in Markdown, with what one must know to read it.
inline std::string markdown_of(const Page& page) {
  std::string text = fmt::format(
      "{}\n\n    {}\n\n"
      "| | method | family | trainable | test accuracy | step | memory | "
      "forward | merged |\n"
      "|--:|---|---|--:|--:|--:|--:|--:|--:|\n",
      page.introduction,
      page.command);
  for (const auto& entry : page.entries) {
    const auto& s = entry.summary;
    text += fmt::format(
        "| {} | {} | {} | {} | {} | {} | {:.0f} MiB | {} | {} |\n",
        entry.rank,
        entry.name,
        entry.family,
        gloss::with_commas(s.trainable()),
        detail::with_error(s),
        detail::ratio(s.cost.step),
        s.cost.memory,
        detail::ratio(s.cost.forward),
        detail::merged_forward(s.cost));
  }
  for (const auto& note : page.notes) {
    text += "\n" + note + "\n";
  }
  return text;
}

/// The whole page; nothing in it points elsewhere.
inline std::string html_of(const Page& page) {
  std::string html =
      "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
      "<meta name='viewport' content='width=device-width'>"
      "<title>libpeft: every method on one task</title><style>";
  html += gloss::detail::kStyle;
  html += R"(
:root{--red:#c8322f}
@media(prefers-color-scheme:dark){:root{--red:#ff7a72}}
body{max-width:1500px}
.charts{grid-template-columns:repeat(auto-fit,minmax(560px,1fr))}
.number{font-size:9.5px;font-weight:600;fill:var(--paper);text-anchor:middle}
.budget{stroke:var(--soft);stroke-dasharray:4 4}
td:nth-child(2),th:nth-child(2){text-align:left}
i.ring{background:none;border:2px solid var(--soft)}
i.diamond{background:var(--soft);border-radius:0;transform:rotate(45deg) scale(.8)}
i.line{background:var(--soft);opacity:.45;border-radius:1px;height:5px;width:22px}
)";
  html += "</style></head><body>\n";
  html += fmt::format(
      "<h1>Every method of libpeft on one task</h1>\n<p>{}</p>\n"
      "<p><code>{}</code></p>\n",
      detail::escape(page.introduction),
      detail::escape(page.command));
  html +=
      "<section class='charts'><div class='card'><h2>Accuracy and trainable "
      "parameters</h2>" +
      detail::accuracy_chart(page) + detail::legend() +
      "<div class='legend'>Numbers are those of the list. Discs that would "
      "cover each other are moved sideways.</div></div>\n<div "
      "class='card'><h2>The same, by name</h2>" +
      detail::ranking_chart(page) +
      "<div class='legend'>On the right: trainable parameters. Bars: one "
      "standard error over seeds.</div></div></section>\n";
  html += "<section class='charts'><div class='card'><h2>Memory</h2>" +
      detail::memory_chart(page) + detail::legend() +
      "</div>\n<div class='card'><h2>Time</h2>" + detail::time_chart(page) +
      "<div class='legend'><span><i class='line'></i>training step</span>"
      "<span><i class='ring'></i>forward</span><span><i "
      "class='diamond'></i>forward after merge</span></div></div></section>\n";
  html += "<section>" + detail::html_table(page) + "</section>\n<footer>";
  for (const auto& note : page.notes) {
    html += "<p>" + detail::escape(note) + "</p>";
  }
  return html + "</footer></body></html>\n";
}

inline void write_file(
    const std::filesystem::path& path,
    const std::string& text) {
  std::ofstream file(path);
  file << text << std::flush;
  TORCH_CHECK(file.good(), "peft: cannot write ", path.string());
}

} // namespace compare
