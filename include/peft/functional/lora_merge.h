#pragma once

// W ← W + s · B A in W's own memory (Hu et al. 2021, arXiv:2106.09685, section
// 4.1): no second matrix of W's size. Each number is summed in float64 and
// rounded once. In float32 the product alone loses digits that a sum near zero
// needs: its error counts in W's units, not in the result's.

#include <peft/functional/cpu/vector.h>
#include <peft/functional/packed_matrix.h>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <torch/types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace peft {

namespace functional {

using torch::Tensor;

/// The dtype that a merge into a weight like this computes in, to be rounded
/// once: float64, where the device has it.
inline at::ScalarType merge_dtype(const Tensor& weight) {
  return weight.is_mps() ? at::kFloat : at::kDouble;
}

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

/// w[q][j] += Σ_z up[q][z] down[z][j] for kRows rows and kVectors vectors of
/// columns.
template <int kLanes, int kRows, int kVectors, class T>
PEFT_ALWAYS_INLINE void add_product_tile(
    T* w,
    int64_t ldw,
    const double* up,
    int64_t r,
    const double* down,
    int64_t ldd) {
  cpu::detail::Doubles<kLanes> sums[kRows][kVectors];
  cpu::detail::Floats<kLanes> narrow;
  PEFT_UNROLL
  for (int q = 0; q < kRows; ++q) {
    PEFT_UNROLL
    for (int c = 0; c < kVectors; ++c) {
      cpu::detail::load<kLanes>(narrow, w + q * ldw + c * kLanes);
      cpu::detail::convert(sums[q][c], narrow);
    }
  }
  for (int64_t z = 0; z < r; ++z) {
    cpu::detail::Doubles<kLanes> v[kVectors];
    PEFT_UNROLL
    for (int c = 0; c < kVectors; ++c) {
      cpu::detail::load<kLanes>(v[c], down + z * ldd + c * kLanes);
    }
    PEFT_UNROLL
    for (int q = 0; q < kRows; ++q) {
      PEFT_UNROLL
      for (int c = 0; c < kVectors; ++c) {
        sums[q][c] += v[c] * up[q * r + z];
      }
    }
  }
  PEFT_UNROLL
  for (int q = 0; q < kRows; ++q) {
    PEFT_UNROLL
    for (int c = 0; c < kVectors; ++c) {
      cpu::detail::convert(narrow, sums[q][c]);
      cpu::detail::store<kLanes>(w + q * ldw + c * kLanes, narrow);
    }
  }
}

/// Rows of a matrix of float or bfloat16 plus up [rows, r] · down [r, width].
template <class T>
struct AddProduct {
  T* weight;
  int64_t ldw, width;
  const double *up, *down;
  int64_t r;

  template <int kLanes>
  PEFT_ALWAYS_INLINE void run(int64_t begin, int64_t end) const {
    // A register holds half as many numbers of float64.
    constexpr int kWide = kLanes > 1 ? kLanes / 2 : 1;
    constexpr int kRows = 4;
    constexpr int64_t kPanel = 1024; // columns of `down` that stay in the cache
    for (int64_t first = 0; first < width; first += kPanel) {
      const int64_t last = first + kPanel < width ? first + kPanel : width;
      int64_t i = begin;
      for (; i + kRows <= end; i += kRows) {
        columns<kWide, kRows>(i, first, last);
      }
      for (; i < end; ++i) {
        columns<kWide, 1>(i, first, last);
      }
    }
  }

  template <int kLanes, int kRows>
  PEFT_ALWAYS_INLINE void columns(int64_t i, int64_t first, int64_t last)
      const {
    constexpr int kVectors = kLanes == 8 ? 4 : 2;
    int64_t j = first;
    for (; j + kVectors * kLanes <= last; j += kVectors * kLanes) {
      tile<kLanes, kRows, kVectors>(i, j);
    }
    for (; j + kLanes <= last; j += kLanes) {
      tile<kLanes, kRows, 1>(i, j);
    }
    for (; j < last; ++j) {
      tile<1, kRows, 1>(i, j);
    }
  }

  template <int kLanes, int kRows, int kVectors>
  PEFT_ALWAYS_INLINE void tile(int64_t i, int64_t j) const {
    add_product_tile<kLanes, kRows, kVectors>(
        weight + i * ldw + j, ldw, up + i * r, r, down + j, width);
  }
};

template <class T>
void add_product_cpu(
    const Tensor& weight,
    const Tensor& up,
    const Tensor& down) {
  const AddProduct<T> product{
      weight.mutable_data_ptr<T>(),
      weight.stride(0),
      weight.size(1),
      up.const_data_ptr<double>(),
      down.const_data_ptr<double>(),
      down.size(0)};
  const int64_t work = std::max<int64_t>(1, down.numel());
  at::parallel_for(
      0,
      weight.size(0),
      std::max<int64_t>(4, 262144 / work),
      [&](int64_t begin, int64_t end) {
        cpu::detail::run(product, begin, end);
      });
  weight.unsafeGetTensorImpl()->bump_version();
}

/// W ← W + up · down, whose dtype is wider than W's.
inline void
add_product_(const Tensor& weight, const Tensor& up, const Tensor& down) {
  const auto dtype = weight.scalar_type();
  if (weight.stride(1) != 1 && weight.stride(0) == 1) { // column by column
    add_product_(weight.t(), down.t(), up.t());
    return;
  }
  const bool by_kernel = is_readable(weight) && weight.stride(1) == 1 &&
      up.scalar_type() == at::kDouble && runs_plainly();
  if (by_kernel && dtype == at::kFloat) {
    add_product_cpu<float>(weight, up.contiguous(), down.contiguous());
    return;
  }
  if (by_kernel && dtype == at::kBFloat16) {
    add_product_cpu<c10::BFloat16>(weight, up.contiguous(), down.contiguous());
    return;
  }
  constexpr int64_t kBlock = 1 << 15; // numbers: 256 KB, in the second cache
  const int64_t rows = weight.size(0);
  const int64_t height = std::max<int64_t>(1, kBlock / weight.size(1));
  const Tensor block =
      at::empty({std::min(height, rows), weight.size(1)}, up.options());
  for (int64_t begin = 0; begin < rows; begin += height) {
    const int64_t end = std::min(begin + height, rows);
    const Tensor part = weight.slice(0, begin, end);
    const Tensor wide = block.slice(0, 0, end - begin);
    wide.copy_(part);
    wide.addmm_(up.slice(0, begin, end), down);
    part.copy_(wide);
  }
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
  const auto dtype = merge_dtype(weight);
  const auto widens = [&](const Tensor& t) {
    return c10::promoteTypes(t.scalar_type(), dtype) == dtype;
  };
  const bool fits = weight.dim() == 2 && A.dim() == 2 && B.dim() == 2 &&
      A.size(0) == B.size(1) && A.size(1) == weight.size(1) &&
      B.size(0) == weight.size(0) && weight.is_non_overlapping_and_dense() &&
      A.device() == weight.device() && B.device() == weight.device() &&
      widens(weight) && widens(A) && widens(B);
  if (!fits || A.numel() == 0 || B.numel() == 0) {
    return false;
  }
  const double a = detail::largest_magnitude(A);
  const double b = detail::largest_magnitude(B);
  const double s = std::abs(scale), r = static_cast<double>(A.size(0));
  // Half of each limit is left to the roundings of the sum; the second one
  // keeps every product on the way finite, in whatever order it is taken.
  return s * r * a * b <= detail::overflow_margin(weight.scalar_type()) / 2 &&
      std::max(1.0, s) * r * std::max(1.0, a) * std::max(1.0, b) <=
      detail::overflow_margin(dtype) / 2;
}

/// W ← W + s · B A for weight [out, in], A [r, in], B [out, r], none of which
/// needs a gradient: each number is summed in merge_dtype() and rounded once.
inline void lora_merge_(
    const Tensor& weight,
    const Tensor& A,
    const Tensor& B,
    double scale) {
  const auto dtype = merge_dtype(weight);
  const Tensor down = A.to(dtype), up = B.to(dtype);
  if (weight.scalar_type() == dtype) {
    weight.addmm_(up, down, 1.0, scale);
  } else {
    detail::add_product_(weight, up.mul(scale), down);
  }
}

} // namespace functional

} // namespace peft
