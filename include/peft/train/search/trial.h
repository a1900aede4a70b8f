#pragma once

// What comes out of a search: its trials, the best, and the Pareto front.

#include <peft/train/search/space.h>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace peft {

/// What an objective found out about a configuration.
struct Outcome {
  Outcome() = default;
  explicit Outcome(double accuracy_, std::map<std::string, double> costs_ = {})
      : accuracy(accuracy_), costs(std::move(costs_)) {}
  /// With one cost, "parameters". (A template, so that {} means no costs.)
  template <
      class Integer,
      std::enable_if_t<std::is_integral_v<Integer>, int> = 0>
  Outcome(double accuracy_, Integer parameters)
      : Outcome(
            accuracy_,
            std::map<std::string, double>{
                {"parameters", static_cast<double>(parameters)}}) {}

  /// Better where it is higher.
  double accuracy = 0;
  /// Better where they are lower: "parameters", "milliseconds".
  std::map<std::string, double> costs;
};

/// One call of the objective.
struct Trial {
  int64_t number = 0; // of the configuration, from 0
  int64_t rung = 0;
  int64_t resource = 1;
  Configuration configuration;
  Outcome outcome;
  std::string error; // what the objective threw; empty where it returned
  double seconds = 0;

  bool failed() const {
    return !error.empty();
  }
};

/// Those of `points`, (accuracy, cost), that no other dominates, cheapest
/// first. One dominates another if it is no worse in both and better in one; of
/// equal ones the first stands for all.
inline std::vector<size_t> pareto_front(
    const std::vector<std::pair<double, double>>& points) {
  std::vector<size_t> order(points.size());
  for (size_t i = 0; i < order.size(); ++i) {
    order[i] = i;
  }
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    const auto& [accuracy_a, cost_a] = points[a];
    const auto& [accuracy_b, cost_b] = points[b];
    return cost_a != cost_b ? cost_a < cost_b : accuracy_a > accuracy_b;
  });
  std::vector<size_t> front;
  for (const size_t i : order) {
    if (front.empty() || points[i].first > points[front.back()].first) {
      front.push_back(i);
    }
  }
  return front;
}

/// All that a search has done.
struct SearchResult {
  /// Every call of the objective, in order.
  std::vector<Trial> trials;
  /// False where it was stopped before its end.
  bool complete = false;

  /// The last trial of each configuration, the one with most resource, in the
  /// order of their numbers; without those that failed.
  std::vector<Trial> final_trials() const {
    std::map<int64_t, const Trial*> last;
    for (const auto& trial : trials) {
      last[trial.number] = &trial;
    }
    std::vector<Trial> result;
    for (const auto& item : last) {
      if (!item.second->failed()) {
        result.push_back(*item.second);
      }
    }
    return result;
  }

  /// The most accurate of those with most resource, the cheaper one and then
  /// the first of equals.
  Trial best(const std::string& cost = "parameters") const {
    const auto all = final_trials();
    TORCH_CHECK(!all.empty(), "peft: no trial of this search has a result");
    const auto price = [&](const Trial& trial) {
      const auto found = trial.outcome.costs.find(cost);
      return found == trial.outcome.costs.end() ? 0.0 : found->second;
    };
    return *std::min_element(
        all.begin(), all.end(), [&](const Trial& a, const Trial& b) {
          if (a.resource != b.resource) {
            return a.resource > b.resource;
          }
          return a.outcome.accuracy != b.outcome.accuracy
              ? a.outcome.accuracy > b.outcome.accuracy
              : price(a) < price(b);
        });
  }

  /// Those of final_trials() that no other dominates in accuracy and `cost`,
  /// cheapest first; equal ones once. Where rungs were used, each configuration
  /// stands with what it reached on its last one.
  std::vector<Trial> pareto(const std::string& cost = "parameters") const {
    const auto all = final_trials();
    std::vector<std::pair<double, double>> points;
    for (const auto& trial : all) {
      points.emplace_back(trial.outcome.accuracy, cost_of(trial, cost));
    }
    std::vector<Trial> front;
    for (const size_t i : pareto_front(points)) {
      front.push_back(all[i]);
    }
    return front;
  }

  /// A trial's cost by name; an error that lists the names where it has none.
  static double cost_of(const Trial& trial, const std::string& cost) {
    std::string names;
    for (const auto& item : trial.outcome.costs) {
      if (item.first == cost) {
        return item.second;
      }
      names += (names.empty() ? "'" : ", '") + item.first + "'";
    }
    TORCH_CHECK_VALUE(
        false,
        "peft: trial ",
        trial.number,
        " has no cost '",
        cost,
        "'; it has ",
        names.empty() ? "none" : names,
        ". Let the objective return it, or give the search count_parameters");
    return 0;
  }
};

} // namespace peft
