#pragma once

// W ← W + s · B A in W's own memory (Hu et al. 2021, arXiv:2106.09685, section
// 4.1): one product on top of W, no second matrix of its size.

#include <ATen/ATen.h>
#include <torch/types.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace peft {

namespace functional {

using torch::Tensor;

namespace detail {

/// Half the distance from the largest finite number of a dtype to the one below
/// it: what is added to a finite number must reach it to overflow. 0 for dtypes
/// that weights do not have.
inline double overflow_margin(at::ScalarType dtype) {
  const auto margin = [](auto limits) {
    return std::ldexp(1.0, limits.max_exponent - 1 - limits.digits);
  };
  switch (dtype) {
    case at::kDouble:
      return margin(std::numeric_limits<double>());
    case at::kFloat:
      return margin(std::numeric_limits<float>());
    case at::kBFloat16:
      return margin(std::numeric_limits<at::BFloat16>());
    case at::kHalf:
      return margin(std::numeric_limits<at::Half>());
    default:
      return 0.0;
  }
}

/// The largest magnitude in `t`; NaN where `t` holds one.
inline double largest_magnitude(const Tensor& t) {
  const auto [low, high] = at::aminmax(t);
  return std::max(-low.item<double>(), high.item<double>());
}

/// The dtype that a merge into `dtype` computes in.
inline at::ScalarType merge_dtype(at::ScalarType dtype) {
  return c10::isReducedFloatingType(dtype) ? at::kFloat : dtype;
}

} // namespace detail

/// Whether lora_merge_ can fold B A into this matrix and is sure to leave a
/// finite one finite, by a bound that costs one look at A and B: an entry of
/// s · B A is at most s · r · max|A| · max|B|, and adding less than the margin
/// of overflow to a finite number rounds to a finite one. False says only that
/// there is no such proof.
inline bool lora_merge_is_safe(
    const Tensor& weight,
    const Tensor& A,
    const Tensor& B,
    double scale) {
  const auto dtype = detail::merge_dtype(weight.scalar_type());
  const bool fits = weight.dim() == 2 && A.dim() == 2 && B.dim() == 2 &&
      A.size(0) == B.size(1) && A.size(1) == weight.size(1) &&
      B.size(0) == weight.size(0) && weight.is_non_overlapping_and_dense() &&
      A.device() == weight.device() && B.device() == weight.device() &&
      c10::promoteTypes(A.scalar_type(), dtype) == dtype &&
      c10::promoteTypes(B.scalar_type(), dtype) == dtype;
  if (!fits || A.numel() == 0 || B.numel() == 0) {
    return false;
  }
  const double a = detail::largest_magnitude(A.to(dtype));
  const double b = detail::largest_magnitude(B.to(dtype));
  const double s = std::abs(scale), r = static_cast<double>(A.size(0));
  // Half of each limit is left to the roundings of the sum; the second one
  // keeps every product on the way finite, in whatever order it is taken.
  return s * r * a * b <= detail::overflow_margin(weight.scalar_type()) / 2 &&
      std::max(1.0, s) * r * std::max(1.0, a) * std::max(1.0, b) <=
      detail::overflow_margin(dtype) / 2;
}

/// W ← W + s · B A for weight [out, in], A [r, in], B [out, r], none of which
/// needs a gradient. A weight of half precision passes through float32 in
/// blocks of rows and is rounded once.
inline void lora_merge_(
    const Tensor& weight,
    const Tensor& A,
    const Tensor& B,
    double scale) {
  const auto dtype = detail::merge_dtype(weight.scalar_type());
  const Tensor down = A.to(dtype), up = B.to(dtype);
  if (dtype == weight.scalar_type()) {
    weight.addmm_(up, down, 1.0, scale);
    return;
  }
  constexpr int64_t kBlock = 1 << 16; // numbers: 256 KB, in the second cache
  const int64_t rows = weight.size(0);
  const int64_t height = std::max<int64_t>(1, kBlock / weight.size(1));
  const Tensor block = at::empty(
      {std::min(height, rows), weight.size(1)}, weight.options().dtype(dtype));
  for (int64_t begin = 0; begin < rows; begin += height) {
    const int64_t end = std::min(begin + height, rows);
    const Tensor part = weight.slice(0, begin, end);
    const Tensor wide = block.slice(0, 0, end - begin);
    wide.copy_(part);
    wide.addmm_(up.slice(0, begin, end), down, 1.0, scale);
    part.copy_(wide);
  }
}

} // namespace functional

} // namespace peft
