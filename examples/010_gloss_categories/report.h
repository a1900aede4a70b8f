#pragma once

// The results as a table on the terminal and as one self-contained HTML page.

#include "merge_check.h"
#include "train.h"

#include <fmt/format.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace gloss {

/// One line of the table: a method, over one or more seeds.
struct MethodResult {
  std::string name;
  std::string color; ///< of its curve
  int64_t trainable = 0;
  std::vector<double> accuracies; ///< one a seed
  TrainResult training; ///< of the first seed

  double accuracy() const {
    double sum = 0;
    for (const auto each : accuracies) {
      sum += each;
    }
    return sum / static_cast<double>(accuracies.size());
  }
};

/// A test text with the category it has and the one it was given.
struct Sample {
  std::string text;
  std::string truth;
  std::string guess;
};

struct Report {
  std::string network_name;
  std::string data_name;
  int64_t network_parameters = 0;
  size_t train_size = 0;
  size_t test_size = 0;
  size_t num_categories = 0;
  int64_t epochs = 0;
  std::vector<uint64_t> seeds;
  int threads = 0;
  double total_seconds = 0;
  std::string note; ///< what a reader must know before the numbers
  std::vector<MethodResult> methods;
  MergeCheck merge;
  std::vector<Sample> samples;

  double percent(const MethodResult& method) const {
    return 100.0 * static_cast<double>(method.trainable) /
        static_cast<double>(network_parameters);
  }
};

inline std::string with_commas(int64_t value) {
  auto digits = std::to_string(value);
  for (auto at = static_cast<int64_t>(digits.size()) - 3; at > 0; at -= 3) {
    digits.insert(static_cast<size_t>(at), ",");
  }
  return digits;
}

/// "0.203 s" or "0.21 ms".
inline std::string duration(double seconds) {
  return seconds < 0.01 ? fmt::format("{:.2f} ms", 1000 * seconds)
                        : fmt::format("{:.3f} s", seconds);
}

/// "3.1e-06", and "0" for nothing.
inline std::string scientific(double value) {
  return value == 0 ? "0" : fmt::format("{:.1e}", value);
}

// ~~~~ terminal ~~~~

inline void print_table(const Report& report) {
  fmt::print(
      "\n{:<28} {:>12} {:>8}  {:>16} {:>10} {:>10}\n",
      "method",
      "trainable",
      "share",
      "accuracy",
      "step",
      "peak");
  fmt::print("{:-<89}\n", "");
  for (const auto& method : report.methods) {
    fmt::print(
        "{:<28} {:>12} {:>6.2f} %  {:>8.4f} ±{:.4f} {:>10} {:>6.0f} MiB\n",
        method.name,
        with_commas(method.trainable),
        report.percent(method),
        method.accuracy(),
        standard_error(method.accuracy(), report.test_size),
        duration(method.training.seconds_per_step),
        method.training.peak_mib);
  }
}

inline void print_merge(const MergeCheck& check) {
  fmt::print(
      "\n{}: saved, loaded (logits moved by {} at most) and merged (by "
      "{};\n"
      "{} of the predictions changed)\n"
      "merged / base time: median {:.3f} (quartiles {:.3f} to {:.3f}); {} "
      "operators, {}\n",
      check.adapter,
      scientific(check.reload_difference),
      scientific(check.merge_difference),
      check.changed_predictions == 0
          ? "none"
          : std::to_string(check.changed_predictions),
      check.ratio[1],
      check.ratio[0],
      check.ratio[2],
      check.operators,
      check.same_operators ? "the same as the base's"
                           : "NOT the same as the base's");
}

// ~~~~ page ~~~~

namespace detail {

inline std::string escape(const std::string& text) {
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
      default:
        out += c;
    }
  }
  return out;
}

/// A chart's plotting area, with the maps from values to pixels.
struct Axes {
  static constexpr double kLeft = 52, kRight = 16, kTop = 16, kBottom = 44;
  double x_low, x_high, y_low, y_high;
  double width = 520, height = 320;

  double x(double value) const {
    return kLeft +
        (value - x_low) / (x_high - x_low) * (width - kLeft - kRight);
  }
  double y(double value) const {
    return height - kBottom -
        (value - y_low) / (y_high - y_low) * (height - kTop - kBottom);
  }

  /// Horizontal grid lines with their labels.
  std::string y_grid(double step, int digits) const {
    std::string svg;
    for (double value = std::ceil(y_low / step - 1e-9) * step;
         value <= y_high + 1e-9;
         value += step) {
      svg += fmt::format(
          "<line class='grid' x1='{:.1f}' x2='{:.1f}' y1='{:.1f}' y2='{:.1f}'/>"
          "<text class='tick' x='{:.1f}' y='{:.1f}' "
          "text-anchor='end'>{:.{}f}</text>\n",
          kLeft,
          width - kRight,
          y(value),
          y(value),
          kLeft - 8,
          y(value) + 4,
          std::abs(value) < 1e-9 ? 0.0 : value,
          digits);
    }
    return svg;
  }
  std::string x_tick(double value, const std::string& label) const {
    return fmt::format(
        "<line class='axis' x1='{0:.1f}' x2='{0:.1f}' y1='{1:.1f}' "
        "y2='{2:.1f}'/>"
        "<text class='tick' x='{0:.1f}' y='{3:.1f}' "
        "text-anchor='middle'>{4}</text>\n",
        x(value),
        height - kBottom,
        height - kBottom + 5,
        height - kBottom + 19,
        label);
  }
  std::string frame(const std::string& x_title) const {
    return fmt::format(
        "<line class='axis' x1='{0}' x2='{1}' y1='{2}' y2='{2}'/>"
        "<text class='tick' x='{3}' y='{4}' text-anchor='middle'>{5}</text>\n",
        kLeft,
        width - kRight,
        height - kBottom,
        (kLeft + width - kRight) / 2,
        height - 6,
        x_title);
  }
  std::string open(const std::string& label) const {
    return fmt::format(
        "<svg viewBox='0 0 {} {}' role='img' aria-label='{}'>\n",
        width,
        height,
        label);
  }
};

/// A running mean of the losses, so that curves can be told apart.
inline std::vector<double> smoothed(const std::vector<double>& losses) {
  std::vector<double> result;
  double sum = 0;
  double weight = 0;
  for (const auto loss : losses) {
    sum = 0.93 * sum + 0.07 * loss;
    weight = 0.93 * weight + 0.07;
    result.push_back(sum / weight);
  }
  return result;
}

/// Training loss against steps, one curve a method.
inline std::string loss_chart(const Report& report) {
  double steps = 1;
  double highest = 0.1;
  for (size_t i = 1; i < report.methods.size(); ++i) {
    const auto curve = smoothed(report.methods[i].training.losses);
    steps = std::max(steps, static_cast<double>(curve.size()));
    for (const auto loss : curve) {
      highest = std::max(highest, loss);
    }
  }
  const Axes axes{0, steps, 0, std::ceil(highest * 2) / 2};
  auto svg =
      axes.open("training loss") + axes.y_grid(axes.y_high > 2 ? 1 : 0.5, 1);
  svg += axes.frame("training step");
  const double unit = std::pow(10, std::floor(std::log10(steps)));
  const double step = steps / unit >= 5 ? unit
      : steps / unit >= 2               ? unit / 2
                                        : unit / 5;
  for (double value = 0; value <= steps; value += std::max(1.0, step)) {
    svg += axes.x_tick(value, fmt::format("{:.0f}", value));
  }
  for (size_t i = 1; i < report.methods.size(); ++i) {
    const auto curve = smoothed(report.methods[i].training.losses);
    std::string points;
    for (size_t at = 0; at < curve.size(); ++at) {
      points += fmt::format(
          "{:.1f},{:.1f} ",
          axes.x(static_cast<double>(at + 1)),
          axes.y(curve[at]));
    }
    svg += fmt::format(
        "<polyline class='curve' style='stroke:var(--{})' points='{}'/>\n",
        report.methods[i].color,
        points);
  }
  return svg + "</svg>\n";
}

/// Test accuracy against trainable parameters (logarithmic), bars of one
/// standard error.
inline std::string accuracy_chart(const Report& report) {
  double lowest = 1, highest = 0, fewest = 1e12, most = 1;
  for (const auto& method : report.methods) {
    const auto error = standard_error(method.accuracy(), report.test_size);
    lowest = std::min(lowest, method.accuracy() - error);
    highest = std::max(highest, method.accuracy() + error);
    fewest = std::min(fewest, static_cast<double>(method.trainable));
    most = std::max(most, static_cast<double>(method.trainable));
  }
  const double step = highest - lowest > 0.3 ? 0.1
      : highest - lowest > 0.12              ? 0.05
                                             : 0.02;
  const Axes axes{
      std::log10(fewest) - 0.4,
      std::log10(most) + 0.35,
      std::max(0.0, std::floor(lowest / step - 0.4) * step),
      std::min(1.0 + step / 2, std::ceil(highest / step + 0.4) * step)};
  auto svg =
      axes.open("accuracy against trainable parameters") + axes.y_grid(step, 2);
  svg += axes.frame("trainable parameters");
  for (int power = 0; power <= 12; ++power) {
    for (const int lead : {1, 3}) {
      const double value = std::log10(lead) + power;
      if (value >= axes.x_low && value <= axes.x_high) {
        const auto exponent = power % 3;
        const char* unit = power < 3 ? ""
            : power < 6              ? "k"
            : power < 9              ? "M"
                                     : "G";
        svg += axes.x_tick(
            value,
            fmt::format("{:.0f}{}", lead * std::pow(10, exponent), unit));
      }
    }
  }
  for (size_t i = 0; i < report.methods.size(); ++i) {
    const auto& method = report.methods[i];
    const auto error = standard_error(method.accuracy(), report.test_size);
    const auto x = axes.x(std::log10(static_cast<double>(method.trainable)));
    const auto top = axes.y(method.accuracy() + error);
    const auto bottom = axes.y(method.accuracy() - error);
    svg += fmt::format(
        "<g style='stroke:var(--{0});fill:var(--{0})'>"
        "<path class='bar' d='M{1:.1f} {2:.1f}V{3:.1f}M{4:.1f} "
        "{2:.1f}h10M{4:.1f} {3:.1f}h10'/>"
        "<circle cx='{1:.1f}' cy='{5:.1f}' r='5'/></g>\n"
        "<text class='label' x='{1:.1f}' y='{6:.1f}' "
        "text-anchor='middle'>{7}</text>\n",
        method.color,
        x,
        top,
        bottom,
        x - 5,
        axes.y(method.accuracy()),
        i % 2 == 0 ? top - 8 : bottom + 17,
        escape(method.name));
  }
  return svg + "</svg>\n";
}

inline std::string method_table(const Report& report) {
  std::string html =
      "<table><thead><tr><th>Method<th>Trainable<th>Share<th>Accuracy<th>Step<"
      "th>Peak memory"
      "</tr></thead>\n";
  for (const auto& method : report.methods) {
    std::string seeds;
    if (method.accuracies.size() > 1) {
      for (const auto each : method.accuracies) {
        seeds += fmt::format("{}{:.3f}", seeds.empty() ? "" : ", ", each);
      }
      seeds = "<br><small>" + seeds + "</small>";
    }
    html += fmt::format(
        "<tr><td><i style='background:var(--{})'></i>{}<td>{}<td>{:.2f} %"
        "<td>{:.3f} ± {:.3f}{}<td>{}<td>{:.0f} MiB</tr>\n",
        method.color,
        escape(method.name),
        with_commas(method.trainable),
        report.percent(method),
        method.accuracy(),
        standard_error(method.accuracy(), report.test_size),
        seeds,
        duration(method.training.seconds_per_step),
        method.training.peak_mib);
  }
  return html + "</table>\n";
}

inline std::string merge_section(const MergeCheck& check, size_t test_size) {
  return fmt::format(
      "<section><h2>Saved, loaded, merged</h2><p>The best LoRA, <b>{}</b>, "
      "was written as Hugging Face PEFT files, read into a fresh network and "
      "folded into its weights.</p>"
      "<div class='facts'>"
      "<div><b>{}</b>of {} predictions changed by the merge</div>"
      "<div><b>{}</b>largest change of a logit by the merge; by saving and "
      "loading {}</div>"
      "<div><b>{:.3f}×</b>time of the network that never had an adapter "
      "(quartiles {:.3f} – {:.3f})</div>"
      "<div><b>{}</b>operators in a forward, {} the "
      "base's</div></div></section>\n",
      escape(check.adapter),
      check.changed_predictions,
      with_commas(static_cast<int64_t>(test_size)),
      scientific(check.merge_difference),
      scientific(check.reload_difference),
      check.ratio[1],
      check.ratio[0],
      check.ratio[2],
      check.operators,
      check.same_operators ? "identical to"
                           : "<strong>different from</strong>");
}

inline std::string samples_section(const std::vector<Sample>& samples) {
  std::string html =
      "<section><h2>Unseen texts</h2><table "
      "class='samples'><thead><tr><th>Text<th>Category"
      "<th>Predicted</tr></thead>\n";
  for (const auto& sample : samples) {
    html += fmt::format(
        "<tr><td>{}<td>{}<td class='{}'>{}</tr>\n",
        escape(sample.text),
        escape(sample.truth),
        sample.truth == sample.guess ? "right" : "wrong",
        escape(sample.guess));
  }
  return html + "</table></section>\n";
}

constexpr const char* kStyle = R"(
:root{--paper:#fff;--card:#f6f7f9;--ink:#1b1f24;--soft:#5c6670;--line:#dfe3e8;
 --grey:#6b7280;--amber:#c2740a;--blue:#2563eb;--green:#0a8f63;--violet:#8b3fd1}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--card:#1c2026;--ink:#e6e9ed;--soft:#9aa4af;
 --line:#313842;--grey:#9aa4af;--amber:#f0a43a;--blue:#6c9eff;--green:#3ecf9a;--violet:#c08cff}}
*{box-sizing:border-box}
body{margin:0 auto;padding:32px 24px 48px;max-width:1120px;background:var(--paper);color:var(--ink);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:26px;margin:0 0 4px}h2{font-size:17px;margin:0 0 8px}
p{margin:0 0 12px;color:var(--soft);max-width:80ch}
p b{color:var(--ink)}
section{margin-top:28px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(380px,1fr));gap:20px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px}
svg{width:100%;height:auto;display:block}
.grid{stroke:var(--line)}.axis{stroke:var(--soft)}
.tick,.label{font-size:12px;fill:var(--soft)}.label{fill:var(--ink)}
.curve{fill:none;stroke-width:2;stroke-linejoin:round}.bar{fill:none;stroke-width:1.6}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;color:var(--soft)}
i{display:inline-block;width:10px;height:10px;border-radius:50%;margin-right:8px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:7px 12px;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
th{font-size:13px;font-weight:600;color:var(--soft)}
th:first-child,td:first-child,.samples td,.samples th{text-align:left}
small{color:var(--soft)}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:16px}
.facts div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px;
 font-size:13px;color:var(--soft)}
.facts b{display:block;font-size:24px;color:var(--ink)}
.samples td+td{white-space:nowrap}
.right{color:var(--green)}.wrong{color:var(--amber)}
footer{margin-top:28px;font-size:13px;color:var(--soft)}
)";

} // namespace detail

/// The whole page; nothing in it points elsewhere.
inline std::string html_of(const Report& report) {
  std::string legend;
  for (size_t i = 1; i < report.methods.size(); ++i) {
    legend += fmt::format(
        "<span><i style='background:var(--{})'></i>{}</span>",
        report.methods[i].color,
        detail::escape(report.methods[i].name));
  }
  std::string seeds;
  for (const auto seed : report.seeds) {
    seeds += (seeds.empty() ? "" : ", ") + std::to_string(seed);
  }
  std::string html =
      "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
      "<meta name='viewport' content='width=device-width'>"
      "<title>libpeft: fine-tuning a sentence encoder</title><style>";
  html += detail::kStyle;
  html += "</style></head><body>\n";
  html += fmt::format(
      "<h1>Fine-tuning a sentence encoder with libpeft</h1>\n"
      "<p>{} ({} parameters) learns to tell {} categories of {}: {} texts to "
      "train on, {} to test. Every method had the same texts, seed and {} "
      "epoch{}.</p>\n",
      detail::escape(report.network_name),
      with_commas(report.network_parameters),
      report.num_categories,
      detail::escape(report.data_name),
      with_commas(report.train_size),
      with_commas(report.test_size),
      report.epochs,
      report.epochs == 1 ? "" : "s");
  if (!report.note.empty()) {
    html += "<p><strong>" + detail::escape(report.note) + "</strong></p>\n";
  }
  html +=
      "<section class='charts'><div class='card'><h2>Accuracy and its "
      "price</h2>" +
      detail::accuracy_chart(report) +
      "<div class='legend'>Bars are one standard error of the test "
      "set.</div></div>\n";
  html += "<div class='card'><h2>Training loss</h2>" +
      detail::loss_chart(report) + "<div class='legend'>" + legend +
      "</div></div></section>\n";
  html += "<section>" + detail::method_table(report) + "</section>\n";
  html += detail::merge_section(report.merge, report.test_size);
  if (!report.samples.empty()) {
    html += detail::samples_section(report.samples);
  }
  html += fmt::format(
      "<footer>Seed{} {}; {} threads; {:.0f} s in all. The probe was tuned on "
      "a fifth of the training set and its steps use features computed once; "
      "share is of the network with its head; peak memory is the process's."
      "</footer></body></html>\n",
      report.seeds.size() > 1 ? "s" : "",
      seeds,
      report.threads,
      report.total_seconds);
  return html;
}

inline void write_report(
    const Report& report,
    const std::filesystem::path& path) {
  std::ofstream file(path);
  file << html_of(report);
  TORCH_CHECK(file.good(), "peft: cannot write ", path.string());
}

} // namespace gloss
