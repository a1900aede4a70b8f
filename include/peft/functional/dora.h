#pragma once

// The mathematics of DoRA on plain tensors (Liu et al. 2024, arXiv:2402.09353,
// eq. 5): W' = g ∘ (W + s · B A) with g = m / ‖W + s · B A‖, one magnitude m_i
// for each row i of the output. The norm counts as a constant (section 4.3).

#include <peft/functional/cpu/vector.h>
#include <peft/functional/lora.h>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace peft {

namespace functional {

namespace detail {

/// √q with q kept positive: a row of zeros has m = 0, and then g = 0, not 0/0.
inline Tensor root_of_squares(const Tensor& squares) {
  const double least = squares.scalar_type() == at::kDouble
      ? std::numeric_limits<double>::min()
      : static_cast<double>(std::numeric_limits<float>::min());
  return squares.clamp_min(least).sqrt();
}

} // namespace detail

/// ‖W_i‖² for the rows of a matrix, in `dtype`, as a constant.
inline Tensor row_squares(const Tensor& matrix, at::ScalarType dtype) {
  return at::linalg_vector_norm(
             matrix.detach(), 2, at::IntArrayRef{1}, false, dtype)
      .square();
}

/// n_i = ‖W_i + s · (B A)_i‖ as a constant, without building B A where that is
/// larger than its factors:
/// n_i² = ‖W_i‖² + Σ_z B_iz (2s · (W Aᵀ)_iz + s² · (B A Aᵀ)_iz).
/// W [out, in], squares = row_squares(W) [out], A [r, in], B [out, r] → [out]
/// in A's dtype.
inline Tensor dora_norm(
    const Tensor& weight,
    const Tensor& squares,
    const Tensor& lora_A,
    const Tensor& lora_B,
    double scale) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      c10::autocast_dispatch_keyset);
  const Tensor W = weight.detach(), A = lora_A.detach(), B = lora_B.detach();
  if (A.numel() + B.numel() >= W.numel()) {
    // The sum itself costs no more, and keeps digits where it nearly cancels.
    return detail::root_of_squares(row_squares(
        at::addmm(W.to(A.scalar_type()), B, A, 1, scale), A.scalar_type()));
  }
  const bool by_kernels =
      W.stride(1) == 1 &&
      !c10::impl::tls_is_dispatch_key_included(
          c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
      detail::by_kernels(W, A, B);
  const Tensor projected = by_kernels // [out, r]
      ? detail::project(W, A, 1.0, {})
      : at::mm(A, W.to(A.scalar_type()).t()).t();
  const Tensor inner =
      at::addmm(projected, B, at::mm(A, A.t()), 2 * scale, scale * scale);
  return detail::root_of_squares(at::mul(inner, B).sum(1) + squares);
}

/// W' from V = W + s · B A, where V is at hand: rows of V times m / ‖V‖.
inline Tensor dora_weight(const Tensor& V, const Tensor& magnitude) {
  const Tensor norm = detail::root_of_squares(row_squares(V, V.scalar_type()));
  return V * (magnitude / norm).unsqueeze(1);
}

/// The formula operator by operator, as HF sums it:
///   y + (g - 1) ∘ (y - b) + g ∘ term(x),  y = base(x, b)
/// and with dropout, which the base term sees too:
///   y + (g - 1) ∘ base(drop(x)) + g ∘ term(drop(x)).
/// `g` and `bias` have shapes that broadcast to y; `term` is s · B A x.
template <class Base, class Term>
Tensor dora_composed(
    const Tensor& x,
    const std::optional<Tensor>& bias,
    const Tensor& g,
    double dropout,
    Base&& base,
    Term&& term) {
  const Tensor y = base(x, /*with_bias=*/true);
  Tensor input = x.to(g.scalar_type()), plain;
  if (dropout > 0.0) {
    input = at::dropout(input, dropout, /*train=*/true);
    plain = base(input, /*with_bias=*/false);
  } else {
    plain = bias.has_value() && bias->defined() ? y - *bias : y;
  }
  return (y + (g - 1) * plain + g * term(input)).to(y.scalar_type());
}

namespace detail {

/// One pass over dy and u [n, m]: du = g ∘ dy and sums_j = Σ_i dy_ij u_ij.
/// Blocks of rows are summed in `block` [m] first, so that long sums lose no
/// digits.
struct ScaleBackward {
  const float *dy, *u, *g;
  float *du, *sums, *block;
  int64_t rows, width;

  template <int kLanes>
  PEFT_ALWAYS_INLINE void row(int64_t i, int64_t begin, int64_t end) const {
    const float *from = dy + i * width, *with = u + i * width;
    float* to = du + i * width;
    for (int64_t j = begin; j < end; j += kLanes) {
      cpu::detail::Floats<kLanes> d, v, sum, factor;
      cpu::detail::load<kLanes>(d, from + j);
      cpu::detail::load<kLanes>(v, with + j);
      cpu::detail::load<kLanes>(sum, block + j);
      cpu::detail::load<kLanes>(factor, g + j);
      sum += d * v;
      d *= factor;
      cpu::detail::store<kLanes>(block + j, sum);
      cpu::detail::store<kLanes>(to + j, d);
    }
  }

  template <int kLanes>
  PEFT_ALWAYS_INLINE void run(int64_t begin, int64_t end) const {
    constexpr int64_t kRows = 64;
    const int64_t whole = begin + (end - begin) / kLanes * kLanes;
    for (int64_t first = 0; first < rows; first += kRows) {
      for (int64_t j = begin; j < end; ++j) {
        block[j] = 0;
      }
      for (int64_t i = first; i < rows && i < first + kRows; ++i) {
        row<kLanes>(i, begin, whole);
        row<1>(i, whole, end);
      }
      for (int64_t j = begin; j < end; ++j) {
        sums[j] += block[j];
      }
    }
  }
};

/// dm = Σ_n dy ∘ u / norm and du = g ∘ dy for matrices.
inline std::pair<Tensor, Tensor> dora_scale_backward(
    const Tensor& dy,
    const Tensor& u,
    const Tensor& g,
    const Tensor& norm) {
  const bool fast = !at::GradMode::is_enabled() && dy.is_cpu() &&
      dy.scalar_type() == at::kFloat && dy.is_contiguous() &&
      u.is_contiguous() && dy.numel() > 0;
  if (!fast) {
    return {(dy * u).sum(0) / norm, dy * g};
  }
  const Tensor du = at::empty_like(dy);
  const Tensor sums = at::zeros({2, dy.size(1)}, g.options());
  const ScaleBackward pass{
      dy.const_data_ptr<float>(),
      u.const_data_ptr<float>(),
      g.const_data_ptr<float>(),
      du.mutable_data_ptr<float>(),
      sums.mutable_data_ptr<float>(),
      sums.mutable_data_ptr<float>() + dy.size(1),
      dy.size(0),
      dy.size(1)};
  const int64_t grain = std::max<int64_t>(64, 32768 / dy.size(0));
  at::parallel_for(0, dy.size(1), grain, [&](int64_t begin, int64_t end) {
    cpu::detail::run(pass, begin, end);
  });
  return {sums[0].div_(norm), du};
}

/// y = g ∘ u + b in one pass, in u's own memory with `in_place`.
inline Tensor dora_scale(
    const Tensor& u,
    const Tensor& g,
    const std::optional<Tensor>& bias,
    bool in_place) {
  Tensor y = in_place ? u : at::empty_like(u);
  return bias.has_value() && bias->defined() ? at::addcmul_out(y, *bias, u, g)
                                             : at::mul_out(y, u, g);
}

/// y = m / norm ∘ u + b as one node, the norm a constant. Keeps u, and only
/// where m trains.
struct DoraScale : torch::autograd::Function<DoraScale> {
  static Tensor forward(
      torch::autograd::AutogradContext* ctx,
      const Tensor& u,
      const Tensor& magnitude,
      const Tensor& norm,
      const std::optional<Tensor>& bias) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward(
        {magnitude.requires_grad() ? u : Tensor(), magnitude, norm});
    ctx->saved_data["has_bias"] = bias.has_value() && bias->defined();
    return dora_scale(u, magnitude / norm, bias, /*in_place=*/false);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx,
      torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &u = saved[0], &m = saved[1], &norm = saved[2], &dy = grads[0];
    std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
    if (!at::GradMode::is_enabled()) {
      guard.emplace();
    }
    const Tensor g = m / norm;
    Tensor du, dm, db;
    if (!ctx->needs_input_grad(1)) {
      du = dy * g;
    } else if (!ctx->needs_input_grad(0)) {
      dm = as_matrix(dy * u).sum(0) / norm;
    } else {
      std::tie(dm, du) =
          dora_scale_backward(as_matrix(dy), as_matrix(u), g, norm);
      du = du.view(dy.sizes());
    }
    if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(3)) {
      db = as_matrix(dy).sum(0);
    }
    return {du, dm, Tensor(), db};
  }
};

} // namespace detail

/// DoRA on a linear map: y = g ∘ (x Wᵀ + s · x Aᵀ Bᵀ) + b with g = m / norm.
/// x [*, in], weight [out, in], bias [out] or absent, A [r, in], B [out, r],
/// magnitude [out], norm = dora_norm(...) [out] → [*, out] in the dtype of the
/// base's result. `dropout` is the probability to apply now; `packed` and
/// `transposed` as in lora_linear.
inline Tensor dora_linear(
    const Tensor& x,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    const Tensor& A,
    const Tensor& B,
    const Tensor& magnitude,
    const Tensor& norm,
    double scale,
    double dropout = 0.0,
    const std::shared_ptr<const PackedMatrix>& packed = nullptr,
    bool transposed = false) {
  const auto dtype = weight.scalar_type();
  const bool fused = dropout <= 0.0 && A.scalar_type() == dtype &&
      magnitude.scalar_type() == dtype && !detail::has_tangent(magnitude) &&
      detail::can_fuse(x, weight, bias, A, B, 0.0);
  if (!fused) {
    return dora_composed(
        x,
        bias,
        magnitude / norm,
        dropout,
        [&](const Tensor& v, bool with_bias) {
          return at::linear(
              v,
              v.is_same(x) ? weight : weight.to(v.scalar_type()),
              with_bias ? bias : std::nullopt);
        },
        [&](const Tensor& v) {
          return at::linear(at::linear(v, A), B).mul(scale);
        });
  }
  const Tensor u = lora_linear(
      x, weight, std::nullopt, A, B, scale, 0.0, packed, transposed);
  const bool needs_grad = u.requires_grad() || magnitude.requires_grad() ||
      (bias.has_value() && bias->requires_grad());
  if (needs_grad && at::GradMode::is_enabled()) {
    return detail::DoraScale::apply(u, magnitude, norm, bias);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return detail::dora_scale(u, magnitude / norm, bias, /*in_place=*/true);
}

} // namespace functional

} // namespace peft
