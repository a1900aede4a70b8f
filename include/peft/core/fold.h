#pragma once

// What a weight becomes when deltas are folded into it: everything is computed
// in float64, whatever the dtypes of the base and the adapter are, and rounded
// once. So a merged weight is the float64 result's nearest neighbour also where
// the sum is much smaller than its terms.

#include <peft/core/delta.h>
#include <peft/core/site.h>
#include <peft/functional/lora_merge.h>

#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <memory>

namespace peft {

namespace detail {

/// A copy of `delta` in `dtype`, its decorations and what it shares with others
/// included, and in evaluation mode: what a merge writes is not drawn.
inline std::shared_ptr<Delta> exact_copy(
    const Delta& delta,
    at::ScalarType dtype) {
  const c10::InferenceMode off(false);
  const torch::NoGradGuard no_grad;
  auto copy = delta.decorated_copy();
  copy->relink([&](const Delta* other) { return exact_copy(*other, dtype); });
  copy->to(dtype);
  copy->eval();
  return copy;
}

/// Whether this puts numbers of its own in place of the base's and computes
/// nothing.
inline bool only_replaces(const ActiveEntry& entry) {
  return entry.delta->replaces_base() && entry.scale == 1.0 &&
      entry.delta->decorations().empty();
}

/// The base after `entries`, in their order, rounded once.
inline Tensor folded(const ActiveEntries& entries, const Tensor& weight) {
  const torch::NoGradGuard no_grad;
  const bool picks =
      std::all_of(entries.begin(), entries.end(), [](const ActiveEntry& entry) {
        return only_replaces(entry);
      });
  auto dtype = picks ? weight.scalar_type() : functional::merge_dtype(weight);
  for (const auto& entry : entries) {
    dtype = c10::promoteTypes(dtype, entry.delta->dtype().value_or(dtype));
  }
  Tensor value = weight.to(dtype);
  for (const auto& entry : entries) {
    value = picks
        ? entry.delta->effective(value, entry.scale)
        : exact_copy(*entry.delta, dtype)->effective(value, entry.scale);
  }
  return value.to(weight.scalar_type());
}

} // namespace detail

} // namespace peft
