#pragma once

// The mathematics of LoRA on plain tensors (Hu et al. 2021, arXiv:2106.09685,
// eq. 3): h = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ, with A [r, in] and B [out, r].
// The explicit layers and the kernels behind attach() both call these.

#include <peft/functional/convolution.h>

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

#include <optional>
#include <vector>

namespace peft {

namespace functional {

using torch::Tensor;

/// ΔW = s · B A as a matrix: [out, r] × [r, in] → [out, in].
inline Tensor lora_delta(const Tensor& A, const Tensor& B, double scale) {
  return at::mm(B, A).mul(scale);
}

/// W + s · B A in one product, without building B A. W must have A's dtype.
inline Tensor lora_merged(
    const Tensor& weight,
    const Tensor& A,
    const Tensor& B,
    double scale) {
  return at::addmm(weight, B, A, 1.0, scale);
}

/// s · drop(x) Aᵀ Bᵀ in A's dtype.
inline Tensor lora_linear_term(
    const Tensor& x,
    const Tensor& A,
    const Tensor& B,
    double scale,
    double dropout = 0.0) {
  Tensor input = x.to(A.scalar_type());
  if (dropout > 0.0) {
    input = at::dropout(input, dropout, /*train=*/true);
  }
  return at::linear(at::linear(input, A), B).mul(scale);
}

namespace detail {

/// The formula operator by operator: right under autocast, mixed dtypes,
/// forward-mode differentiation and function transforms.
inline Tensor lora_linear_composed(
    const Tensor& x,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    const Tensor& A,
    const Tensor& B,
    double scale,
    double dropout) {
  const Tensor y = at::linear(x, weight, bias);
  return (y + lora_linear_term(x, A, B, scale, dropout)).to(y.scalar_type());
}

inline bool has_tangent(const Tensor& t) {
  return t.defined() && t._fw_grad(/*level=*/0).defined();
}

/// x as a matrix [n, in].
inline Tensor as_matrix(const Tensor& x) {
  return x.dim() == 2 ? x : x.reshape({-1, x.size(-1)});
}

inline Tensor lora_product(
    const Tensor& x2,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    const Tensor& t,
    const Tensor& B,
    double scale) {
  Tensor y = bias.has_value() && bias->defined()
      ? at::addmm(*bias, x2, weight.t())
      : at::mm(x2, weight.t());
  return y.addmm_(t, B.t(), 1.0, scale);
}

inline std::vector<int64_t> output_sizes(const Tensor& x, int64_t features) {
  auto sizes = x.sizes().vec();
  sizes.back() = features;
  return sizes;
}

/// Saves x once and t = x Aᵀ, nothing else; the low-rank product is added on
/// top of the big one in place. Backward differentiates again when asked to.
struct LoraLinear : torch::autograd::Function<LoraLinear> {
  static Tensor forward(
      torch::autograd::AutogradContext* ctx,
      const Tensor& x,
      const Tensor& weight,
      const std::optional<Tensor>& bias,
      const Tensor& A,
      const Tensor& B,
      double scale) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor x2 = as_matrix(x);
    const Tensor t = at::mm(x2, A.t());
    const Tensor y = lora_product(x2, weight, bias, t, B, scale);
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["has_bias"] = bias.has_value() && bias->defined();
    if (weight.is_inference()) { // cannot be saved as a variable
      ctx->saved_data["weight"] = weight;
      ctx->save_for_backward({x, A, B, t});
    } else {
      ctx->save_for_backward({x, A, B, t, weight});
    }
    return x.dim() == 2 ? y
                        : at::_unsafe_view(y, output_sizes(x, weight.size(0)));
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx,
      torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &A = saved[1], &B = saved[2];
    const Tensor weight =
        saved.size() > 4 ? saved[4] : ctx->saved_data["weight"].toTensor();
    const double scale = ctx->saved_data["scale"].toDouble();
    // The positions count defined tensors only: without a bias A moves up.
    const size_t shift = ctx->saved_data["has_bias"].toBool() ? 1 : 0;
    const bool again = at::GradMode::is_enabled();
    std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
    if (!again) {
      guard.emplace();
    }

    const Tensor x2 = as_matrix(x);
    // A saved t is a constant to a second differentiation.
    const Tensor t = again ? at::mm(x2, A.t()) : saved[3];
    const Tensor dy = as_matrix(grads[0]);
    const bool wants_x = ctx->needs_input_grad(0);
    const bool wants_A = ctx->needs_input_grad(2 + shift);
    Tensor dt, dx, dW, db, dA, dB;
    if (wants_x || wants_A) {
      dt = at::mm(dy, B).mul(scale);
    }
    if (wants_x) {
      dx = at::addmm(at::mm(dy, weight), dt, A).reshape(x.sizes());
    }
    if (ctx->needs_input_grad(1)) {
      dW = at::mm(dy.t(), x2);
    }
    if (shift == 1 && ctx->needs_input_grad(2)) {
      db = dy.sum(0);
    }
    if (wants_A) {
      dA = at::mm(dt.t(), x2);
    }
    if (ctx->needs_input_grad(3 + shift)) {
      dB = at::mm(t.t(), dy).mul(scale).t();
    }
    return {dx, dW, db, dA, dB, Tensor()};
  }
};

} // namespace detail

/// LoRA on a linear map. x [*, in], weight [out, in], bias [out] or absent,
/// A [r, in], B [out, r] → [*, out] in the dtype of the base's result.
/// `dropout` is the probability to apply now: 0 outside training.
inline Tensor lora_linear(
    const Tensor& x,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    const Tensor& A,
    const Tensor& B,
    double scale,
    double dropout = 0.0) {
  const auto dtype = weight.scalar_type();
  const bool has_bias = bias.has_value() && bias->defined();
  const bool composed = dropout > 0.0 || x.dim() < 2 ||
      A.scalar_type() != dtype || B.scalar_type() != dtype ||
      x.scalar_type() != dtype ||
      at::autocast::is_autocast_enabled(x.device().type()) ||
      c10::impl::tls_is_dispatch_key_included(
                            c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
      detail::has_tangent(x) || detail::has_tangent(A) ||
      detail::has_tangent(B) || detail::has_tangent(weight);
  if (composed) {
    return detail::lora_linear_composed(x, weight, bias, A, B, scale, dropout);
  }
  const bool needs_grad = at::GradMode::is_enabled() &&
      (x.requires_grad() || A.requires_grad() || B.requires_grad() ||
       weight.requires_grad() || (has_bias && bias->requires_grad()));
  if (needs_grad) {
    return detail::LoraLinear::apply(x, weight, bias, A, B, scale);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  const Tensor x2 = detail::as_matrix(x);
  const Tensor y =
      detail::lora_product(x2, weight, bias, at::mm(x2, A.t()), B, scale);
  return x.dim() == 2
      ? y
      : at::_unsafe_view(y, detail::output_sizes(x, weight.size(0)));
}

/// LoRA on a table of embeddings. weight [num, dim], A [r, num], B [dim, r]:
/// weight[i] + s · (Aᵀ)[i] Bᵀ. There is no dropout.
inline Tensor lora_embedding_term(
    const Tensor& indices,
    const Tensor& A,
    const Tensor& B,
    double scale,
    int64_t padding_idx = -1,
    bool scale_grad_by_freq = false) {
  const Tensor rows =
      at::embedding(A.t(), indices, padding_idx, scale_grad_by_freq);
  return at::matmul(rows, B.t()).mul(scale);
}

inline Tensor lora_embedding(
    const Tensor& indices,
    const Tensor& weight,
    const Tensor& A,
    const Tensor& B,
    double scale,
    int64_t padding_idx = -1,
    bool scale_grad_by_freq = false) {
  const Tensor y =
      at::embedding(weight, indices, padding_idx, scale_grad_by_freq);
  return (y +
          lora_embedding_term(
              indices, A, B, scale, padding_idx, scale_grad_by_freq))
      .to(y.scalar_type());
}

/// ΔW of a convolution, in the shape of its weight [out, in / g, k...].
/// A [r, in / g, k...] and B [out, r / g, 1...]: group j of the outputs is
/// made from the j-th block of the rank, which sees only its own inputs.
inline Tensor lora_convolution_delta(
    const Tensor& A,
    const Tensor& B,
    double scale,
    int64_t groups,
    at::IntArrayRef weight_sizes) {
  const auto r = A.size(0), out = B.size(0);
  if (groups == 1) {
    return at::mm(B.reshape({out, r}), A.reshape({r, -1}))
        .mul(scale)
        .reshape(weight_sizes);
  }
  return at::bmm(
             B.reshape({groups, out / groups, r / groups}),
             A.reshape({groups, r / groups, -1}))
      .mul(scale)
      .reshape(weight_sizes);
}

/// s · conv₁(conv(drop(x), A), B) in A's dtype: A slides like the base, B is a
/// 1×1 convolution of its result. `A_groups` is the base's groups, or 1 where
/// A sees all inputs (HF's form under groups).
inline Tensor lora_convolution_term(
    const Tensor& x,
    const Tensor& A,
    const Tensor& B,
    double scale,
    ConvolutionArgs args,
    int64_t A_groups,
    double dropout = 0.0) {
  Tensor input = x.to(A.scalar_type());
  if (dropout > 0.0) {
    input = at::dropout(input, dropout, /*train=*/true);
  }
  const std::vector<int64_t> one(A.dim() - 2, 1), zero(A.dim() - 2, 0);
  const ConvolutionArgs pointwise{one, zero, one, args.groups, {}};
  args.groups = A_groups;
  return convolution(
             convolution(input, A, std::nullopt, args),
             B,
             std::nullopt,
             pointwise)
      .mul(scale);
}

/// LoRA on a convolution: conv(x, W, b) + s · conv₁(conv(drop(x), A), B).
inline Tensor lora_convolution(
    const Tensor& x,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    const Tensor& A,
    const Tensor& B,
    double scale,
    const ConvolutionArgs& args,
    double dropout = 0.0) {
  const Tensor y = convolution(x, weight, bias, args);
  const int64_t A_groups = A.size(1) == weight.size(1) ? args.groups : 1;
  return (y + lora_convolution_term(x, A, B, scale, args, A_groups, dropout))
      .to(y.scalar_type());
}

} // namespace functional

} // namespace peft
