#pragma once

// A search's result as a table on the terminal and as one self-contained page.

#include <peft/core/summary.h>
#include <peft/detail/platform.h>
#include <peft/train/search/picture.h>
#include <peft/train/search/trial.h>

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

namespace peft {

namespace detail {

/// "1,605,120", or a number with a fraction as it is.
inline std::string cost_text(double cost) {
  return cost == std::floor(cost) && std::abs(cost) < 1e15
      ? with_commas(static_cast<int64_t>(cost))
      : fmt::format("{:.4g}", cost);
}

/// "27 trials of 27 configurations, 1 failed".
inline std::string trials_text(const SearchResult& result) {
  int64_t configurations = 0, failed = 0;
  for (const auto& trial : result.trials) {
    configurations = std::max(configurations, trial.number + 1);
    failed += trial.failed() ? 1 : 0;
  }
  return fmt::format(
      "{} trials of {} configurations, {} failed{}",
      result.trials.size(),
      configurations,
      failed,
      result.complete ? "" : "; the search is not complete");
}

} // namespace detail

/// The Pareto front as text, cheapest first.
inline std::string pareto_table(
    const SearchResult& result,
    const std::string& cost = "parameters") {
  const auto front = result.pareto(cost);
  size_t width = cost.size();
  for (const auto& trial : front) {
    width = std::max(
        width, detail::cost_text(SearchResult::cost_of(trial, cost)).size());
  }
  std::string text = fmt::format(
      "{:>{}}  accuracy  resource  trial  configuration\n", cost, width);
  for (const auto& trial : front) {
    text += fmt::format(
        "{:>{}}  {:8.4f}  {:8}  {:5}  {}\n",
        detail::cost_text(SearchResult::cost_of(trial, cost)),
        width,
        trial.outcome.accuracy,
        trial.resource,
        trial.number,
        trial.configuration.to_string());
  }
  return text + detail::trials_text(result) + "\n";
}

/// The page: the picture of all configurations with the front's line, and the
/// front as a table. `label` names a point of the front; default: its trial.
inline std::string pareto_html(
    const SearchResult& result,
    const std::string& title,
    const std::string& cost = "parameters",
    const std::function<std::string(const Trial&)>& label = {}) {
  using detail::escape_xml;
  const auto all = result.final_trials();
  const auto front = result.pareto(cost);
  std::vector<PicturePoint> points;
  for (const auto& trial : all) {
    PicturePoint point;
    point.cost = SearchResult::cost_of(trial, cost);
    point.accuracy = trial.outcome.accuracy;
    point.in_front =
        std::any_of(front.begin(), front.end(), [&](const Trial& other) {
          return other.number == trial.number;
        });
    if (point.in_front) {
      point.label = label ? label(trial) : fmt::format("#{}", trial.number);
    }
    point.note = fmt::format(
        "#{}: accuracy {:.4f}, {} {}; {}",
        trial.number,
        point.accuracy,
        cost,
        detail::cost_text(point.cost),
        trial.configuration.to_string());
    points.push_back(std::move(point));
  }
  PictureTitles titles;
  const bool is_log = std::all_of(
      points.begin(), points.end(), [](auto& p) { return p.cost > 0; });
  titles.cost =
      (cost == "parameters" ? std::string("number of trainable parameters")
                            : cost) +
      (is_log ? " (log scale)" : "");
  std::string rows;
  for (const auto& trial : front) {
    rows += fmt::format(
        "<tr><td>#{}</td><td>{}</td><td>{:.4f}</td><td>{}</td><td>{}</td>"
        "</tr>\n",
        trial.number,
        detail::cost_text(SearchResult::cost_of(trial, cost)),
        trial.outcome.accuracy,
        trial.resource,
        escape_xml(trial.configuration.to_string()));
  }
  return fmt::format(
      "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/>"
      "<meta name=\"viewport\" content=\"width=device-width\"/>"
      "<title>{0}</title><style>{1}{2}</style></head><body>\n"
      "<h1>{0}</h1>\n<p>{3}. A filled point is in the Pareto front: nothing "
      "here is as accurate for less, or more accurate for as much.</p>\n"
      "<div class=\"card\">\n{4}</div>\n"
      "<table><thead><tr><th>Trial</th><th>Cost: {5}</th><th>Accuracy</th>"
      "<th>Resource</th><th>Configuration</th></tr></thead><tbody>\n{6}"
      "</tbody></table>\n</body></html>\n",
      escape_xml(title),
      detail::kPictureStyle,
      R"(body{margin:0 auto;padding:32px 24px 48px;max-width:960px;background:var(--paper);color:var(--ink);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:26px;margin:0 0 4px}p{margin:0 0 12px;color:var(--soft);max-width:80ch}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px}
table{border-collapse:collapse;width:100%;margin-top:28px;font-variant-numeric:tabular-nums}
th,td{padding:7px 12px;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
th{font-size:13px;font-weight:600;color:var(--soft)}
th:last-child,td:last-child{text-align:left;overflow-wrap:anywhere}
)",
      detail::trials_text(result),
      points.empty() ? std::string("<p>No trial has a result.</p>")
                     : pareto_svg(points, titles),
      escape_xml(cost),
      rows);
}

/// Writes that page to `path`, which is replaced when it is complete.
inline void write_pareto(
    const SearchResult& result,
    const std::string& path,
    const std::string& title,
    const std::string& cost = "parameters",
    const std::function<std::string(const Trial&)>& label = {}) {
  detail::AtomicFile file(path);
  file.write(pareto_html(result, title, cost, label));
  file.commit();
}

} // namespace peft
