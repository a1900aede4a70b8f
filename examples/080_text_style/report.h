#pragma once

// The results as a table on the terminal and as one self-contained HTML page,
// whose style and charts are those of examples/010.

#include "../010_gloss_categories/report.h"
#include "sample.h"
#include "train.h"

#include <fmt/format.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace style {

/// One line of the table: the base, or what a method made of it.
struct Result {
  std::string name;
  std::string color; ///< of its curve
  int64_t trainable = 0;
  TrainResult training;
  Score on_style; ///< held-out characters of the new text
  Score on_text; ///< of the one the base has learned
  std::vector<std::string> samples; ///< one a prompt
  bool has_speed = false;
  Speed speed;
};

struct Report {
  std::string text_name;
  std::string style_name;
  int64_t network_parameters = 0;
  int64_t text_size = 0; ///< characters to train on
  int64_t style_size = 0;
  int64_t windows = 0;
  int64_t length = 0;
  uint64_t seed = 0;
  int threads = 0;
  double total_seconds = 0;
  std::string note; ///< what a reader must know before the numbers
  std::vector<std::string> prompts;
  std::vector<Result> results; ///< the base first
};

// ~~~~ terminal ~~~~

inline void print_table(const Report& report) {
  fmt::print(
      "\nHeld-out bits per character (± standard error over windows)\n"
      "{:<18} {:>10} {:>9} {:>22} {:>22} {:>10} {:>7}\n{:-<104}\n",
      "",
      "trainable",
      "share",
      report.style_name,
      report.text_name,
      "training",
      "steps",
      "");
  for (const auto& result : report.results) {
    fmt::print(
        "{:<18} {:>10} {:>7.2f} % {:>14.3f} ± {:.3f} {:>14.3f} ± {:.3f} "
        "{:>8.1f} "
        "s {:>7}\n",
        result.name,
        gloss::with_commas(result.trainable),
        100.0 * static_cast<double>(result.trainable) /
            static_cast<double>(report.network_parameters),
        result.on_style.bits,
        result.on_style.error,
        result.on_text.bits,
        result.on_text.error,
        result.training.seconds,
        result.training.losses.size());
  }
}

inline void print_samples(const Report& report) {
  for (size_t i = 0; i < report.prompts.size(); ++i) {
    for (const auto& result : report.results) {
      fmt::print("\n[{}]\n{}\n", result.name, result.samples.at(i));
    }
  }
}

inline void print_speed(const Report& report) {
  fmt::print("\n");
  for (const auto& result : report.results) {
    if (result.has_speed) {
      fmt::print(
          "{}: {:.0f} characters/s with the cache, {:.0f} without: {:.1f} "
          "times as fast (logits differ by {})\n",
          result.name,
          result.speed.cached,
          result.speed.uncached,
          result.speed.cached / result.speed.uncached,
          gloss::scientific(result.speed.logit_difference));
    }
  }
}

// ~~~~ page ~~~~

namespace detail {

/// Training loss of results `begin` to `end`, as 010 draws it.
inline std::string loss_card(
    const Report& report,
    const std::string& title,
    size_t begin,
    size_t end) {
  gloss::Report curves;
  curves.methods.emplace_back(); // 010's first method has no curve
  std::string legend;
  for (size_t i = begin; i < end; ++i) {
    const auto& result = report.results[i];
    gloss::MethodResult curve;
    curve.color = result.color;
    curve.training.losses = result.training.losses;
    curves.methods.push_back(curve);
    legend += fmt::format(
        "<span><i style='background:var(--{})'></i>{}</span>",
        result.color,
        gloss::detail::escape(result.name));
  }
  return "<div class='card'><h2>" + title + "</h2>" +
      gloss::detail::loss_chart(curves) + "<div class='legend'>" + legend +
      "</div></div>\n";
}

inline std::string result_table(const Report& report) {
  auto html = fmt::format(
      "<table><thead><tr><th>Bits per held-out character<th>Trainable<th>Share"
      "<th>{}<th>{}<th>Training</tr></thead>\n",
      gloss::detail::escape(report.style_name),
      gloss::detail::escape(report.text_name));
  for (const auto& result : report.results) {
    html += fmt::format(
        "<tr><td><i style='background:var(--{})'></i>{}<td>{}<td>{:.2f} %"
        "<td>{:.3f} ± {:.3f}<td>{:.3f} ± {:.3f}<td>{:.0f} s</tr>\n",
        result.color,
        gloss::detail::escape(result.name),
        gloss::with_commas(result.trainable),
        100.0 * static_cast<double>(result.trainable) /
            static_cast<double>(report.network_parameters),
        result.on_style.bits,
        result.on_style.error,
        result.on_text.bits,
        result.on_text.error,
        result.training.seconds);
  }
  return html + "</table>\n";
}

/// A row of cards for each prompt, one card a network.
inline std::string samples_section(const Report& report) {
  std::string html =
      "<section><h2>The same prompt and seed</h2>\n<div class='texts'>\n";
  for (size_t i = 0; i < report.prompts.size(); ++i) {
    for (const auto& result : report.results) {
      const auto& text = result.samples.at(i);
      html += fmt::format(
          "<div class='card'><small><i style='background:var(--{})'></i>{}"
          "</small><pre><b>{}</b>{}</pre></div>\n",
          result.color,
          gloss::detail::escape(result.name),
          gloss::detail::escape(report.prompts[i]),
          gloss::detail::escape(text.substr(report.prompts[i].size())));
    }
  }
  return html + "</div></section>\n";
}

} // namespace detail

/// The whole page; nothing in it points elsewhere.
inline std::string html_of(const Report& report) {
  std::string html =
      "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
      "<meta name='viewport' content='width=device-width'>"
      "<title>libpeft: the style of another text</title><style>";
  html += gloss::detail::kStyle;
  html += fmt::format(
      ".texts{{display:grid;grid-template-columns:repeat({},minmax(0,1fr));"
      "gap:12px}}pre{{white-space:pre-wrap;font:13px/1.45 ui-monospace,"
      "monospace;margin:8px 0 0}}pre b{{color:var(--soft)}}</style></head>"
      "<body>\n",
      report.results.size());
  html += fmt::format(
      "<h1>The style of another text</h1>\n<p>A decoder of {} parameters "
      "learned {} ({} characters) from nothing; each method then turned it to "
      "{} ({} characters).</p>\n",
      gloss::with_commas(report.network_parameters),
      gloss::detail::escape(report.text_name),
      gloss::with_commas(report.text_size),
      gloss::detail::escape(report.style_name),
      gloss::with_commas(report.style_size));
  if (!report.note.empty()) {
    html +=
        "<p><strong>" + gloss::detail::escape(report.note) + "</strong></p>\n";
  }
  html += detail::samples_section(report);
  html += "<section>" + detail::result_table(report) + "</section>\n";
  html += "<section class='charts'>";
  if (!report.results[0].training.losses.empty()) {
    html += detail::loss_card(report, "The base learns, bits/char", 0, 1);
  }
  const bool any = report.results.size() > 1; // not stopped before the first
  if (any) {
    html += detail::loss_card(
        report, "The methods learn, bits/char", 1, report.results.size());
  }
  html +=
      "</section>\n<section><h2>The prefix, kept in the cache</h2>"
      "<div class='facts'>";
  for (const auto& result : report.results) {
    if (result.has_speed) {
      html += fmt::format(
          "<div><b>{:.1f}×</b>{}: characters per second with the cache "
          "({:.0f}) over without ({:.0f}); logits differ by {}</div>",
          result.speed.cached / result.speed.uncached,
          gloss::detail::escape(result.name),
          result.speed.cached,
          result.speed.uncached,
          gloss::scientific(result.speed.logit_difference));
    }
  }
  html += fmt::format(
      "</div></section>\n<footer>One seed ({}), {} threads, {:.0f} s in all. "
      "Scores: {} windows of {} held-out characters, each read with nothing "
      "before it; ± is the standard error over windows, and says nothing of "
      "other seeds. Learning rates were chosen on a validation part, in "
      "shorter runs."
      "{}</footer></body></html>\n",
      report.seed,
      report.threads,
      report.total_seconds,
      report.windows,
      report.length,
      any ? " Saved and loaded, every adapter wrote the same text; switched "
            "off, the base's."
          : "");
  return html;
}

inline void write_report(
    const Report& report,
    const std::filesystem::path& path) {
  std::ofstream file(path);
  file << html_of(report);
  TORCH_CHECK(file.good(), "peft: cannot write ", path.string());
}

} // namespace style
