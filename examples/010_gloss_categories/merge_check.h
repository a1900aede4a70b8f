#pragma once

// Is a merged network as fast as one that never had an adapter, and does it run
// the same operators?

#include "train.h"

#include <ATen/record_function.h>

#include <algorithm>
#include <array>
#include <functional>
#include <string>
#include <vector>

namespace gloss {

/// What happened to the best LoRA on its way into a file, back, and into the
/// weights.
struct MergeCheck {
  std::string adapter;
  double reload_difference = 0; ///< largest difference of a logit, trained
                                ///< network against reloaded file
  double merge_difference = 0; ///< the same, before against after the merge
  int64_t changed_predictions =
      0; ///< of the test set, before against after the merge
  size_t operators = 0; ///< in one forward
  bool same_operators = false;
  std::array<double, 3> ratio{}; ///< quartiles of merged time / base time
};

/// The operators that one forward of `network` runs, in order.
inline std::vector<std::string> operators_of(
    Network& network,
    const Batch& batch) {
  thread_local std::vector<std::string>* names = nullptr;
  std::vector<std::string> result;
  names = &result;
  const auto handle = at::addThreadLocalCallback(
      at::RecordFunctionCallback(
          [](const at::RecordFunction& call)
              -> std::unique_ptr<at::ObserverContext> {
            names->emplace_back(call.name());
            return nullptr;
          })
          .scopes({at::RecordScope::FUNCTION}));
  network->forward(batch.ids, batch.mask);
  at::removeCallback(handle);
  return result;
}

/// Quartiles of time(run) / time(base) over pairs that run one after the other,
/// in alternating order.
inline std::array<double, 3> paired_ratio(
    const std::function<void()>& run,
    const std::function<void()>& base,
    int pairs) {
  const auto time = [](const std::function<void()>& what) {
    const auto start = Clock::now();
    what();
    return seconds_since(start);
  };
  for (int i = 0; i < std::min(3, pairs); ++i) { // the first are slower
    base();
    run();
  }
  std::vector<double> ratios;
  for (int i = 0; i < pairs; ++i) {
    const bool base_first = i % 2 == 0;
    const auto first = time(base_first ? base : run);
    const auto second = time(base_first ? run : base);
    ratios.push_back(base_first ? second / first : first / second);
  }
  std::sort(ratios.begin(), ratios.end());
  const auto at = [&](size_t quarter) {
    return ratios[quarter * (ratios.size() - 1) / 4];
  };
  return {at(1), at(2), at(3)};
}

/// The same for a forward of two networks.
inline std::array<double, 3>
paired_ratio(Network& network, Network& base, const Batch& batch, int pairs) {
  return paired_ratio(
      [&] { network->forward(batch.ids, batch.mask); },
      [&] { base->forward(batch.ids, batch.mask); },
      pairs);
}

} // namespace gloss
