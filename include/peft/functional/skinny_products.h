#pragma once

// LoRA's skinny products on tensors, by the CPU kernels: t = x Aᵀ, y = b + t Bᵀ
// and G = tᵀ x for x [n, in] and a rank r. Who calls them has asked by_kernels.

#include <peft/functional/counter_dropout.h>
#include <peft/functional/cpu/skinny.h>
#include <peft/functional/packed_matrix.h>

#include <ATen/ATen.h>
#include <torch/types.h>

#include <optional>

namespace peft {

namespace functional {

using torch::Tensor;

namespace detail {

/// x as a matrix [n, in].
inline Tensor as_matrix(const Tensor& x) {
  return x.dim() == 2
      ? x
      : x.reshape(
            {c10::multiply_integers(x.sizes().slice(0, x.dim() - 1)),
             x.size(-1)});
}

/// The same with the numbers of a row side by side, as the kernels read them.
inline Tensor as_rows(const Tensor& x) {
  const Tensor x2 = as_matrix(x);
  return x2.stride(1) == 1 || x2.size(1) <= 1 ? x2 : x2.contiguous();
}

/// Set by tests: whether the kernels serve, wherever they run.
inline std::optional<bool> kernels_chosen;

/// Whether the CPU kernels make the skinny products: float32, or bfloat16 with
/// float32 factors.
inline bool by_kernels(const Tensor& x, const Tensor& A, const Tensor& B) {
  const int64_t width = x.size(-1);
  const auto dtype = x.scalar_type();
  const bool possible = width > 0 && is_readable(x) && is_readable(A) &&
      is_readable(B) && (dtype == at::kFloat || dtype == at::kBFloat16) &&
      A.scalar_type() == at::kFloat && A.is_contiguous() && B.is_contiguous();
  if (!possible || kernels_chosen) {
    return possible && *kernels_chosen;
  }
  return cpu::has_fast_skinny() &&
      (dtype == at::kBFloat16 ||
       cpu::prefers_skinny(x.numel() / width, width, A.size(0)));
}

/// Calls `run` with the element type of `x`: float or BFloat16.
template <class Run>
void with_element_of(const Tensor& x, Run run) {
  if (x.scalar_type() == at::kFloat) {
    run(float{});
  } else {
    run(c10::BFloat16{});
  }
}

/// t [n, r] = scale · D(x2) Aᵀ, where D is dropout.
inline Tensor project(
    const Tensor& x2,
    const Tensor& A,
    double scale,
    const CounterDropout& dropout) {
  const int64_t n = x2.size(0), r = A.size(0);
  Tensor t = at::empty({n, r}, A.options());
  with_element_of(x2, [&](auto element) {
    using T = decltype(element);
    cpu::project<T>(
        x2.const_data_ptr<T>(),
        x2.stride(0),
        A.const_data_ptr<float>(),
        t.mutable_data_ptr<float>(),
        n,
        x2.size(1),
        r,
        static_cast<float>(scale),
        dropout.active() ? &dropout : nullptr);
  });
  return t;
}

/// y2 = bias + D(t BT), BT [r, m], or on top of y2 [n, m].
inline void expand(
    const Tensor& y2,
    const Tensor& t,
    const float* BT,
    const Tensor& bias,
    bool accumulate,
    const CounterDropout& dropout) {
  with_element_of(y2, [&](auto element) {
    using T = decltype(element);
    cpu::expand<T>(
        t.const_data_ptr<float>(),
        BT,
        bias.defined() ? bias.const_data_ptr<T>() : nullptr,
        y2.mutable_data_ptr<T>(),
        y2.stride(0),
        y2.size(0),
        y2.size(1),
        t.size(1),
        accumulate,
        dropout.active() ? &dropout : nullptr);
  });
}

/// G [r, k] = tᵀ D(x2).
inline Tensor
outer(const Tensor& x2, const Tensor& t, const CounterDropout& dropout) {
  Tensor G = at::empty({t.size(1), x2.size(1)}, t.options());
  with_element_of(x2, [&](auto element) {
    using T = decltype(element);
    cpu::outer<T>(
        x2.const_data_ptr<T>(),
        x2.stride(0),
        t.const_data_ptr<float>(),
        G.mutable_data_ptr<float>(),
        x2.size(0),
        x2.size(1),
        t.size(1),
        dropout.active() ? &dropout : nullptr);
  });
  return G;
}

/// Bᵀ [r, out] of B [out, r], in memory of this thread's own that is valid
/// until it asks again.
inline const float* transposed_for_now(const Tensor& B) {
  float* BT = cpu::detail::scratch<4>(B.numel());
  cpu::transpose(B.const_data_ptr<float>(), BT, B.size(0), B.size(1));
  return BT;
}

} // namespace detail

} // namespace functional

} // namespace peft
