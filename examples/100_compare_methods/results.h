#pragma once

// What came of each method and seed, one JSON line each in a file that grows as
// they come, so that an interrupted run goes on where it was.

#include <c10/util/Exception.h>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace compare {

using Json = nlohmann::ordered_json;

/// What a method costs; times are medians of paired ratios.
struct Cost {
  double step = 0; ///< a training step / one of full fine-tuning
  double memory = 0; ///< held by training beyond the frozen weights, MiB
  double forward = 0; ///< a forward with the adapter on it / the base's
  double merged = 0; ///< the same after merge; 0: it cannot be merged
  bool same_operators = false; ///< a merged forward runs those of the base
};

/// One method trained with one seed.
struct Outcome {
  std::string method;
  uint64_t seed = 0;
  double learning_rate = 0;
  int64_t adapter = 0; ///< trainable parameters, the head's not among them
  int64_t head = 0;
  double accuracy = 0; ///< on the test set
  double seconds = 0; ///< attach, training and test
  bool has_cost = false; ///< measured with the first seed only
  Cost cost;
  std::vector<std::string> failures; ///< what did not hold
};

inline Json to_json(const Outcome& outcome) {
  Json line{
      {"method", outcome.method},
      {"seed", outcome.seed},
      {"learning_rate", outcome.learning_rate},
      {"adapter", outcome.adapter},
      {"head", outcome.head},
      {"accuracy", outcome.accuracy},
      {"seconds", outcome.seconds}};
  if (outcome.has_cost) {
    const auto& cost = outcome.cost;
    line["cost"] = {
        {"step", cost.step},
        {"memory", cost.memory},
        {"forward", cost.forward},
        {"merged", cost.merged},
        {"same_operators", cost.same_operators}};
  }
  if (!outcome.failures.empty()) {
    line["failures"] = outcome.failures;
  }
  return line;
}

inline Outcome outcome_of(const Json& line) {
  Outcome outcome;
  line.at("method").get_to(outcome.method);
  line.at("seed").get_to(outcome.seed);
  line.at("learning_rate").get_to(outcome.learning_rate);
  line.at("adapter").get_to(outcome.adapter);
  line.at("head").get_to(outcome.head);
  line.at("accuracy").get_to(outcome.accuracy);
  line.at("seconds").get_to(outcome.seconds);
  outcome.has_cost = line.contains("cost");
  if (outcome.has_cost) {
    const auto& cost = line.at("cost");
    cost.at("step").get_to(outcome.cost.step);
    cost.at("memory").get_to(outcome.cost.memory);
    cost.at("forward").get_to(outcome.cost.forward);
    cost.at("merged").get_to(outcome.cost.merged);
    cost.at("same_operators").get_to(outcome.cost.same_operators);
  }
  if (line.contains("failures")) {
    line.at("failures").get_to(outcome.failures);
  }
  return outcome;
}

/// The file: a line of settings, then a line an outcome. A last line that was
/// cut off is passed over; anything else that does not fit is an error and
/// leaves the file as it is.
class Log {
 public:
  Log(const std::filesystem::path& path, const Json& settings) : path_(path) {
    const auto end = read(settings);
    if (std::filesystem::exists(path)) {
      std::filesystem::resize_file(path, end); // without what was cut off
    }
    file_.open(path, std::ios::app);
    if (end == 0) {
      write({{"settings", settings}});
    }
  }

  const std::vector<Outcome>& outcomes() const {
    return outcomes_;
  }

  const Outcome* find(const std::string& method, uint64_t seed) const {
    const auto found = std::find_if(
        outcomes_.begin(), outcomes_.end(), [&](const Outcome& outcome) {
          return outcome.method == method && outcome.seed == seed;
        });
    return found == outcomes_.end() ? nullptr : &*found;
  }

  void add(const Outcome& outcome) {
    write(to_json(outcome));
    outcomes_.push_back(outcome);
  }

 private:
  /// How many bytes of the file are whole lines.
  size_t read(const Json& settings) {
    std::ifstream stream(path_, std::ios::binary);
    const std::string text(
        (std::istreambuf_iterator<char>(stream)),
        std::istreambuf_iterator<char>());
    size_t begin = 0;
    for (size_t end; (end = text.find('\n', begin)) != std::string::npos;
         begin = end + 1) {
      Json line;
      try {
        line = Json::parse(text.substr(begin, end - begin));
        if (begin > 0) {
          outcomes_.push_back(outcome_of(line));
        }
      } catch (const Json::exception& error) {
        TORCH_CHECK(
            false,
            "peft: ",
            path_.string(),
            " holds a line that is no result (",
            error.what(),
            "); choose another --output, or remove the file");
      }
      TORCH_CHECK(
          begin > 0 || line.value("settings", Json()) == settings,
          "peft: ",
          path_.string(),
          " holds results of other settings, ",
          line.dump(),
          "; these are ",
          settings.dump(),
          ". Choose another --output, or remove the file");
    }
    return begin;
  }

  void write(const Json& line) {
    file_ << line.dump() << '\n' << std::flush;
    TORCH_CHECK(file_.good(), "peft: cannot write ", path_.string());
  }

  std::filesystem::path path_;
  std::ofstream file_;
  std::vector<Outcome> outcomes_;
};

// ~~~~ all seeds of a method ~~~~

struct Summary {
  double accuracy = 0; ///< mean over the seeds
  double error = 0; ///< its standard error, sd / sqrt(n); 0 for one seed
  int64_t seeds = 0;
  int64_t adapter = 0;
  int64_t head = 0;
  bool has_cost = false;
  Cost cost;

  int64_t trainable() const {
    return adapter + head;
  }
};

inline Summary summary_of(const Log& log, const std::string& method) {
  Summary summary;
  std::vector<double> accuracies;
  for (const auto& outcome : log.outcomes()) {
    if (outcome.method != method) {
      continue;
    }
    accuracies.push_back(outcome.accuracy);
    summary.adapter = outcome.adapter;
    summary.head = outcome.head;
    if (outcome.has_cost) {
      summary.has_cost = true;
      summary.cost = outcome.cost;
    }
  }
  const auto n = static_cast<double>(accuracies.size());
  summary.seeds = static_cast<int64_t>(accuracies.size());
  for (const auto each : accuracies) {
    summary.accuracy += each / n;
  }
  double squares = 0;
  for (const auto each : accuracies) {
    squares += (each - summary.accuracy) * (each - summary.accuracy);
  }
  summary.error = n > 1 ? std::sqrt(squares / (n - 1) / n) : 0;
  return summary;
}

} // namespace compare
