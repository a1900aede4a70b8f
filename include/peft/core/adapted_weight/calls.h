#pragma once

// One call of an operator through the deltas at its weight: all rows through
// the same ones, or in a mixed batch each group of rows through its own.

#include <peft/core/adapted_weight/batch.h>
#include <peft/core/delta.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

inline Tensor run_base(const LinearCall& call) {
  return functional::frozen_linear(
      call.x, call.weight, call.bias, call.packed, call.transposed);
}
inline Tensor run_base(const EmbeddingCall& call) {
  return at::embedding(
      call.weight, call.indices, call.padding_idx, call.scale_grad_by_freq);
}
inline Tensor run_base(const ConvolutionCall& call) {
  return functional::convolution(call.x, call.weight, call.bias, call.args);
}

inline const Tensor& input_of(const LinearCall& call) {
  return call.x;
}
inline const Tensor& input_of(const EmbeddingCall& call) {
  return call.indices;
}
inline const Tensor& input_of(const ConvolutionCall& call) {
  return call.x;
}

/// How many dimensions of the input, at its end, are no batch.
inline int64_t features_of(const LinearCall& /*call*/) {
  return 1;
}
inline int64_t features_of(const EmbeddingCall& /*call*/) {
  return 0;
}
inline int64_t features_of(const ConvolutionCall& call) {
  return call.weight.dim() - 1;
}

inline LinearCall with_input(const LinearCall& c, const Tensor& x) {
  return {x, c.weight, c.bias, c.rows, c.transposed, c.packed};
}
inline EmbeddingCall with_input(const EmbeddingCall& c, const Tensor& indices) {
  return {c.weight, indices, c.padding_idx, c.scale_grad_by_freq, c.sparse};
}
inline ConvolutionCall with_input(const ConvolutionCall& c, const Tensor& x) {
  return {x, c.weight, c.bias, c.args};
}

inline bool is_same(
    const std::optional<Tensor>& a,
    const std::optional<Tensor>& b) {
  return a.has_value() == b.has_value() && (!a || a->is_same(*b));
}
/// Whether a delta hands on the call that it was given.
template <class Call>
bool is_same_call(const Call& a, const Call& b) {
  return input_of(a).is_same(input_of(b)) && a.weight.is_same(b.weight) &&
      is_same(a.bias, b.bias);
}
inline bool is_same_call(const EmbeddingCall& a, const EmbeddingCall& b) {
  return a.indices.is_same(b.indices) && a.weight.is_same(b.weight);
}

/// Whether the rows of `t` can be handed on as addresses.
inline bool has_plain_rows(const Tensor& t) {
  return t.has_storage() && t.is_contiguous() &&
      !t._fw_grad(/*level=*/0).defined();
}

/// Without gradients: lets single deltas that can add to their rows of y in
/// place, and marks their groups as done. Rows that stand together are one
/// call, and nothing is copied.
inline void add_in_place(
    const Participants& active,
    const RowSplit& split,
    const LinearCall& call,
    const Tensor& y,
    std::vector<char>& done) {
  const int64_t each = split.rows_a_name(call.x);
  if (at::GradMode::is_enabled() || each == 0 || !has_plain_rows(call.x) ||
      !has_plain_rows(y)) {
    return;
  }
  RowWindow from(call.x), to(y);
  std::vector<char> refused(active.groups.size(), 0);
  for (const auto& run : active.rows->runs) {
    const auto& group = active.groups[run.group];
    if (group.size() != 1 || refused[run.group]) {
      continue;
    }
    const auto begin = run.begin * each, end = run.end * each;
    const bool added = group[0].delta->add_rows(
        with_input(call, from.at_rows(begin, end)),
        to.at_rows(begin, end),
        group[0].scale);
    TORCH_INTERNAL_ASSERT(added || !done[run.group]);
    done[run.group] = added;
    refused[run.group] = !added;
  }
}
template <class Call>
void add_in_place(
    const Participants& /*active*/,
    const RowSplit& /*split*/,
    const Call& /*call*/,
    const Tensor& /*y*/,
    std::vector<char>& /*done*/) {}

/// How a delta takes part in a call of some kind.
template <class Call>
using FastPath =
    Tensor (Delta::*)(const Call&, const Below<Call>&, double) const;

/// The lowest `level` deltas around `base`, the last one outermost; `is_base`
/// where that is the bare operator.
template <class Call, class Base>
Tensor run_fast(
    const ActiveEntries& active,
    size_t level,
    FastPath<Call> path,
    const Call& call,
    const Base& base,
    bool is_base) {
  if (level == 0) {
    return base(call);
  }
  auto next = [&](const Call& c) {
    return run_fast(active, level - 1, path, c, base, is_base);
  };
  const auto& entry = active[level - 1];
  return (entry.delta->*path)(call, {next, is_base && level == 1}, entry.scale);
}

/// The base operator once on the whole batch, then each group's deltas on its
/// rows; a delta that changes the input has the base run again on these.
template <class Call>
Tensor
run_groups(const Participants& active, FastPath<Call> path, const Call& call) {
  const RowSplit split(*active.rows, input_of(call), features_of(call));
  Tensor y = run_base(call);
  std::vector<char> done;
  for (const auto& group : active.groups) {
    done.push_back(group.empty());
  }
  add_in_place(active, split, call, y, done);
  if (std::find(done.begin(), done.end(), false) == done.end()) {
    return y;
  }
  const auto inputs = split.split(input_of(call));
  auto results = split.split(y);
  for (size_t g = 0; g < results.size(); ++g) {
    if (done[g]) {
      continue;
    }
    const GroupScope scope(active.rows->groups[g]);
    const Call own = with_input(call, inputs[g]);
    const auto computed = [&](const Call& c) {
      return is_same_call(c, own) ? results[g] : run_base(c);
    };
    const auto& group = active.groups[g];
    // What is no sum may want the bare operator and its weight (DoRA's norm).
    const bool is_base = !group.front().delta->is_additive();
    results[g] = run_fast(group, group.size(), path, own, computed, is_base);
  }
  return split.join(std::move(results));
}

template <class Call>
Tensor
run_fast(const Participants& active, FastPath<Call> path, const Call& call) {
  return active.rows != nullptr ? run_groups(active, path, call)
                                : run_fast(
                                      active.everywhere,
                                      active.everywhere.size(),
                                      path,
                                      call,
                                      [](const Call& c) { return run_base(c); },
                                      /*is_base=*/true);
}

} // namespace detail

} // namespace peft
