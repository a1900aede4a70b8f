#pragma once

// What a Kronecker product on a weight adds to the result of a linear call, for
// KronA and LoKr.

#include <peft/core/delta.h>
#include <peft/functional/kronecker.h>

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>

namespace peft {

namespace detail {

/// Zeros in front of the last dimension and behind it; negative numbers cut.
inline Tensor pad_features(const Tensor& t, int64_t front, int64_t back) {
  return front == 0 && back == 0 ? t : at::constant_pad_nd(t, {front, back});
}

/// s · x ΔMᵀ, where ΔM is left ⊗ right on the rows `own` of the call's matrix
/// and zero elsewhere, in the factors' dtype; undefined where the call uses
/// none of these rows. left [a1, a2], right [b1, b2], own [a1 b1].
inline Tensor kronecker_term(
    const LinearCall& call,
    Tensor left,
    const Tensor& right,
    const Rows& own,
    double s) {
  const int64_t block = right.size(0); // rows of the weight for one of left
  const Rows used{
      std::max(own.begin, call.rows.begin), std::min(own.end, call.rows.end)};
  if (used.begin >= used.end) {
    return {};
  }
  const int64_t count = used.end - used.begin;
  // Whole rows of left around them, and what these have too much.
  const int64_t first = (used.begin - own.begin) / block;
  const int64_t last = (used.end - own.begin + block - 1) / block;
  const int64_t before = used.begin - own.begin - first * block;
  const int64_t after = (last - first) * block - before - count;
  if (last - first != left.size(0)) {
    left = left.slice(0, first, last);
  }
  if (s != 1.0) {
    left = left.mul(s);
  }
  const Rows around{
      used.begin - call.rows.begin, call.rows.end - used.end}; // unchanged
  Tensor x = call.x.to(right.scalar_type());
  if (call.transposed) {
    x = pad_features(
        pad_features(x, -around.begin, -around.end), before, after);
    return functional::kronecker_linear(x, left.t(), right.t());
  }
  const Tensor y = functional::kronecker_linear(x, left, right);
  return pad_features(
      pad_features(y, -before, -after), around.begin, around.end);
}

} // namespace detail

} // namespace peft
