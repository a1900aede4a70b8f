#pragma once

// Search over configurations: which method, which sizes, where, for one budget.
//
// Random search, and successive halving (Jamieson & Talwalkar 2016,
// arXiv:1502.07943, with the geometric rungs of Li et al. 2018,
// arXiv:1603.06560). With n configurations and a resource of r (epochs, steps,
// samples), rung k = 0, 1, ... trains the ⌊n / ηᵏ⌋ best of the rung before with
// a resource of r ηᵏ. One rung is random search.
//
//   auto result = peft::search(
//       space,
//       [&](const peft::Configuration& c, int64_t epochs) {
//         return peft::Outcome(accuracy_after(c, epochs), parameters_of(c));
//       },
//       peft::SearchBudget(27).eta(3).rungs(3).journal("search.jsonl"));
//   fmt::print("{}", peft::pareto_table(result));

#include <peft/train/search/journal.h>
#include <peft/train/search/report.h>
#include <peft/train/search/sampler.h>
#include <peft/train/search/space.h>
#include <peft/train/search/trial.h>

#include <torch/arg.h>
#include <torch/utils.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <exception>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// How far a search is.
struct SearchProgress {
  int64_t done = 0; // calls of the objective, those of the journal included
  int64_t total = 0;
  double seconds_left = 0; // by the time that a unit of resource has taken
  const Trial& trial; // the last one
};

/// Thrown by an objective, ends a search as should_stop does, and the trial
/// under way is not kept; a progress callback may throw it too.
struct StopSearch : std::exception {
  const char* what() const noexcept override {
    return "peft: the search was stopped";
  }
};

/// What a search may spend.
struct SearchBudget {
  SearchBudget(int64_t trials) : trials_(trials) {}

  /// Configurations to try: n. A space that holds fewer is tried whole.
  TORCH_ARG(int64_t, trials);
  TORCH_ARG(uint64_t, seed) = 0;
  /// What each configuration gets on the first rung: r.
  TORCH_ARG(int64_t, resource) = 1;
  /// η, and the number of rungs.
  TORCH_ARG(int64_t, eta) = 3;
  TORCH_ARG(int64_t, rungs) = 1;
  /// Who is best on a rung: "accuracy", then the fewer of `cost`; or "front":
  /// the Pareto front in accuracy and `cost`, then the front of what is left,
  /// and so on, the more accurate first within each.
  TORCH_ARG(std::string, promote) = "accuracy";
  TORCH_ARG(std::string, cost) = "parameters";

  /// A configuration's trainable parameters, known before it is trained; the
  /// cost "parameters" of every outcome that does not say so itself.
  TORCH_ARG(std::function<int64_t(const Configuration&)>, count_parameters);
  /// Configurations with more are passed over; they are no trials.
  TORCH_ARG(std::optional<int64_t>, max_parameters);
  /// Draws after which a search without a fitting configuration gives up.
  TORCH_ARG(int64_t, max_draws) = 1000000;

  /// A file that every finished trial is appended to. Called again with the
  /// same arguments, a search goes on after the last of them.
  TORCH_ARG(std::string, journal);
  /// A trial whose objective throws is kept with its message, and the search
  /// goes on; false: the error is thrown on, and nothing is kept of the trial.
  TORCH_ARG(bool, keep_going) = true;
  /// Called after each trial.
  TORCH_ARG(std::function<void(const SearchProgress&)>, progress);
  /// Asked before each trial; true ends the search.
  TORCH_ARG(std::function<bool()>, should_stop);
};

using Objective =
    std::function<Outcome(const Configuration&, int64_t resource)>;

namespace detail {

inline void check(const SearchSpace& space, const SearchBudget& budget) {
  TORCH_CHECK_VALUE(
      !space.dimensions().empty(),
      "peft: the space of this search is empty; add dimensions by integer(), "
      "real() and categorical()");
  TORCH_CHECK_VALUE(
      budget.trials() > 0,
      "peft: a search has 1 trial or more, got ",
      budget.trials());
  TORCH_CHECK_VALUE(
      budget.resource() > 0,
      "peft: a search's resource must be positive, got ",
      budget.resource());
  TORCH_CHECK_VALUE(
      budget.rungs() > 0 && (budget.rungs() == 1 || budget.eta() > 1),
      "peft: successive halving has 1 rung or more and an eta of 2 or more, "
      "got ",
      budget.rungs(),
      " rungs and an eta of ",
      budget.eta());
  int64_t left = budget.trials(), resource = budget.resource();
  for (int64_t rung = 1; rung < budget.rungs(); ++rung) {
    left /= budget.eta();
    TORCH_CHECK_VALUE(
        left > 0 && resource <= INT64_MAX / budget.eta(),
        "peft: ",
        budget.trials(),
        " trials with an eta of ",
        budget.eta(),
        " leave nothing for rung ",
        rung,
        "; take fewer rungs or more trials");
    resource *= budget.eta();
  }
  TORCH_CHECK_VALUE(
      budget.promote() == "accuracy" || budget.promote() == "front",
      "peft: promote must be 'accuracy' or 'front', got '",
      budget.promote(),
      "'");
  TORCH_CHECK_VALUE(
      !budget.max_parameters() || budget.count_parameters(),
      "peft: max_parameters needs count_parameters, which tells a "
      "configuration's parameters before it is trained");
  TORCH_CHECK_VALUE(
      budget.max_draws() > 0,
      "peft: max_draws must be positive, got ",
      budget.max_draws());
}

/// What a journal must agree on.
inline nlohmann::json journal_header(
    const SearchSpace& space,
    const SearchBudget& budget) {
  nlohmann::json header{
      {"libpeft_search", 1},
      {"space", space.to_json()},
      {"trials", budget.trials()},
      {"seed", budget.seed()},
      {"resource", budget.resource()},
      {"rungs", budget.rungs()},
      {"promote", budget.promote()},
      {"cost", budget.cost()},
      {"max_parameters", nullptr}};
  if (budget.rungs() > 1) {
    header["eta"] = budget.eta();
  }
  if (budget.max_parameters()) {
    header["max_parameters"] = *budget.max_parameters();
  }
  return header;
}

/// The configurations of a search: those drawn that fit, `trials` of them or
/// all that there are.
inline std::vector<Configuration> draw_configurations(
    const SearchSpace& space,
    const SearchBudget& budget) {
  ConfigurationSampler sampler(space, budget.seed());
  std::vector<Configuration> result;
  std::optional<int64_t> smallest;
  int64_t misses = 0;
  bool exhausted = false;
  while (static_cast<int64_t>(result.size()) < budget.trials() &&
         misses < budget.max_draws()) {
    auto configuration = sampler.next();
    if (!configuration) {
      exhausted = true;
      break;
    }
    ++misses;
    if (!space.accepts(*configuration)) {
      continue;
    }
    if (budget.max_parameters()) {
      const int64_t count = budget.count_parameters()(*configuration);
      smallest = std::min(smallest.value_or(count), count);
      if (count > *budget.max_parameters()) {
        continue;
      }
    }
    result.push_back(std::move(*configuration));
    misses = 0;
  }
  const std::string drawn = exhausted
      ? "of this space"
      : c10::str("among ", budget.max_draws(), " drawn");
  TORCH_CHECK_VALUE(
      !result.empty() || smallest,
      "peft: no configuration ",
      drawn,
      " passes the rules of where()");
  TORCH_CHECK_VALUE(
      !result.empty(),
      "peft: no configuration ",
      drawn,
      " fits into a budget of ",
      budget.max_parameters().value_or(0),
      " parameters; the smallest has ",
      smallest.value_or(0));
  return result;
}

/// `trials` of one rung that did not fail, best first.
inline std::vector<Trial> ranked(
    std::vector<Trial> trials,
    const SearchBudget& budget) {
  const auto price = [&](const Trial& trial) {
    const auto found = trial.outcome.costs.find(budget.cost());
    return found == trial.outcome.costs.end() ? 0.0 : found->second;
  };
  trials.erase(
      std::remove_if(
          trials.begin(),
          trials.end(),
          [](const Trial& trial) { return trial.failed(); }),
      trials.end());
  std::stable_sort(
      trials.begin(), trials.end(), [&](const Trial& a, const Trial& b) {
        return a.outcome.accuracy != b.outcome.accuracy
            ? a.outcome.accuracy > b.outcome.accuracy
            : price(a) < price(b);
      });
  if (budget.promote() == "accuracy") {
    return trials;
  }
  std::vector<Trial> result;
  while (!trials.empty()) {
    std::vector<std::pair<double, double>> points;
    for (const auto& trial : trials) {
      points.emplace_back(
          trial.outcome.accuracy, SearchResult::cost_of(trial, budget.cost()));
    }
    auto front = pareto_front(points);
    std::sort(front.begin(), front.end()); // the more accurate first
    for (const size_t i : front) {
      result.push_back(trials[i]);
    }
    for (auto i = front.rbegin(); i != front.rend(); ++i) {
      trials.erase(trials.begin() + static_cast<int64_t>(*i));
    }
  }
  return result;
}

/// A number that the seed and the place in the search determine (SplitMix64).
inline uint64_t seed_of(uint64_t seed, int64_t trial, int64_t rung) {
  uint64_t x = seed;
  for (const auto part : {trial, rung}) {
    x += 0x9e3779b97f4a7c15 * (static_cast<uint64_t>(part) + 1);
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    x ^= x >> 31;
  }
  return x;
}

/// One search under way.
class SearchRun {
 public:
  SearchRun(
      const SearchSpace& space,
      const Objective& objective,
      const SearchBudget& budget)
      : objective_(objective),
        budget_(budget),
        configurations_(draw_configurations(space, budget)) {
    if (!budget.journal().empty()) {
      journal_ = SearchJournal(budget.journal(), journal_header(space, budget));
    }
    const auto n = static_cast<int64_t>(configurations_.size());
    for (int64_t rung = 0; rung < budget_.rungs(); ++rung) {
      total_ += size_of(n, rung);
      work_left_ += static_cast<double>(size_of(n, rung)) *
          static_cast<double>(resource_of(rung));
    }
  }

  SearchResult run() {
    std::vector<Trial> last;
    const auto n = static_cast<int64_t>(configurations_.size());
    for (int64_t rung = 0; rung < budget_.rungs(); ++rung) {
      auto chosen = first_rung();
      if (rung > 0) {
        chosen = ranked(std::move(last), budget_);
        const auto size = static_cast<size_t>(size_of(n, rung));
        chosen.resize(std::min(chosen.size(), size));
        std::sort(
            chosen.begin(), chosen.end(), [](const Trial& a, const Trial& b) {
              return a.number < b.number;
            });
      }
      last.clear();
      for (const auto& each : chosen) {
        Trial trial;
        trial.number = each.number;
        trial.rung = rung;
        trial.resource = resource_of(rung);
        trial.configuration = each.configuration;
        if (!evaluate(trial)) {
          return std::move(result_);
        }
        last.push_back(result_.trials.back());
      }
    }
    journal_.check_empty();
    result_.complete = true;
    return std::move(result_);
  }

 private:
  /// ⌊n / ηᵏ⌋, at least 1 where the space held fewer than were asked for.
  int64_t size_of(int64_t n, int64_t rung) const {
    for (int64_t i = 0; i < rung; ++i) {
      n /= budget_.eta();
    }
    return std::max<int64_t>(n, 1);
  }
  int64_t resource_of(int64_t rung) const {
    int64_t resource = budget_.resource();
    for (int64_t i = 0; i < rung; ++i) {
      resource *= budget_.eta();
    }
    return resource;
  }

  std::vector<Trial> first_rung() const {
    std::vector<Trial> trials(configurations_.size());
    for (size_t i = 0; i < trials.size(); ++i) {
      trials[i].number = static_cast<int64_t>(i);
      trials[i].configuration = configurations_[i];
    }
    return trials;
  }

  /// Takes the trial from the journal or makes it; false where the search was
  /// stopped.
  bool evaluate(Trial trial) {
    try {
      if (auto kept = journal_.take(trial)) {
        trial = std::move(*kept);
      } else {
        if (budget_.should_stop() && budget_.should_stop()()) {
          return false;
        }
        make(trial);
        journal_.keep(trial);
      }
      work_left_ -= static_cast<double>(trial.resource);
      work_done_ += static_cast<double>(trial.resource);
      seconds_ += trial.seconds;
      result_.trials.push_back(std::move(trial));
      if (budget_.progress()) {
        budget_.progress()(
            {static_cast<int64_t>(result_.trials.size()),
             total_,
             std::max(0.0, work_left_ * seconds_ / work_done_),
             result_.trials.back()});
      }
    } catch (const StopSearch&) {
      return false;
    }
    return true;
  }

  void make(Trial& trial) {
    torch::manual_seed(seed_of(budget_.seed(), trial.number, trial.rung));
    const auto start = std::chrono::steady_clock::now();
    try {
      trial.outcome = objective_(trial.configuration, trial.resource);
      auto& costs = trial.outcome.costs;
      if (budget_.count_parameters() && costs.count("parameters") == 0) {
        costs["parameters"] = static_cast<double>(
            budget_.count_parameters()(trial.configuration));
      }
      check_finite("accuracy", trial.outcome.accuracy);
      for (const auto& item : costs) {
        check_finite(item.first, item.second);
      }
      if (budget_.promote() == "front") {
        SearchResult::cost_of(trial, budget_.cost());
      }
    } catch (const StopSearch&) {
      throw;
    } catch (const c10::Error& error) {
      fail(trial, error.what_without_backtrace());
    } catch (const std::exception& error) {
      fail(trial, error.what());
    }
    trial.seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start)
            .count();
  }
  static void check_finite(const std::string& name, double value) {
    TORCH_CHECK_VALUE(
        std::isfinite(value),
        "peft: the objective gave ",
        value,
        " for '",
        name,
        "'");
  }
  /// Called within the handler of what the objective threw.
  void fail(Trial& trial, const std::string& message) const {
    if (!budget_.keep_going()) {
      throw;
    }
    trial.outcome = Outcome();
    trial.error =
        message.empty() ? "an error without a message" : valid_utf8(message);
  }

  const Objective& objective_;
  const SearchBudget& budget_;
  std::vector<Configuration> configurations_;
  SearchJournal journal_;
  SearchResult result_;
  int64_t total_ = 0;
  double work_left_ = 0, work_done_ = 0; // in units of resource
  double seconds_ = 0;
};

} // namespace detail

/// Tries configurations of `space` and returns what the objective said of each:
/// accuracy, to be high, and costs, to be low. The same seed draws the same
/// configurations, none twice; LibTorch's generators are seeded before each
/// trial from the seed and the trial's place, so that a search that goes on
/// after a kill ends as one that was never stopped. Nothing is trained before
/// the arguments, the budget and the journal have been checked.
inline SearchResult search(
    const SearchSpace& space,
    const Objective& objective,
    const SearchBudget& budget) {
  detail::check(space, budget);
  TORCH_CHECK_VALUE(objective, "peft: a search needs an objective");
  return detail::SearchRun(space, objective, budget).run();
}

} // namespace peft
