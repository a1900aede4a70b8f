#pragma once

// The mathematics of LoRA on plain tensors (Hu et al. 2021, arXiv:2106.09685,
// eq. 3): h = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ, with A [r, in] and B [out, r].
// The explicit layers and the kernels behind attach() both call these.

#include <peft/functional/convolution.h>
#include <peft/functional/fused_lora.h>

#include <ATen/ATen.h>
#include <torch/types.h>

#include <memory>
#include <optional>
#include <utility>
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

/// Whether x [*, in], W [out, in], b [out], A [r, in] and B [out, r] fit. What
/// does not is left to torch's operators, which say what is wrong, or
/// broadcast.
inline bool shapes_fit(
    const Tensor& x,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    const Tensor& A,
    const Tensor& B) {
  return x.dim() >= 2 && weight.dim() == 2 && A.dim() == 2 && B.dim() == 2 &&
      x.size(-1) == weight.size(1) && A.size(1) == weight.size(1) &&
      B.size(0) == weight.size(0) && B.size(1) == A.size(0) &&
      (!bias.has_value() || !bias->defined() ||
       (bias->dim() == 1 && bias->size(0) == weight.size(0) &&
        bias->scalar_type() == weight.scalar_type()));
}

/// Whether the fused function computes this call: plain tensors of one dtype,
/// or a half-precision base beside float32 factors, outside autocast, function
/// transforms and tracing. On a GPU dropout is torch's own.
inline bool can_fuse(
    const Tensor& x,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    const Tensor& A,
    const Tensor& B,
    double dropout) {
  const auto dtype = weight.scalar_type(), factors = A.scalar_type();
  return shapes_fit(x, weight, bias, A, B) && x.scalar_type() == dtype &&
      B.scalar_type() == factors &&
      (factors == dtype ||
       (factors == at::kFloat && c10::isReducedFloatingType(dtype))) &&
      (dropout <= 0.0 || (x.is_cpu() && !torch_dropout)) &&
      runs_plainly(x.device().type()) && !has_tangent(x) && !has_tangent(A) &&
      !has_tangent(B) && !has_tangent(weight) &&
      !(bias.has_value() && has_tangent(*bias));
}

} // namespace detail

/// LoRA on a linear map. x [*, in], weight [out, in], bias [out] or absent,
/// A [r, in], B [out, r] → [*, out] in the dtype of the base's result.
/// `dropout` is the probability to apply now: 0 outside training. `packed` is
/// the frozen weight (or, when `transposed`, its transpose) prepacked, `BT` the
/// transpose of B where the caller keeps it.
inline Tensor lora_linear(
    const Tensor& x,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    const Tensor& A,
    const Tensor& B,
    double scale,
    double dropout = 0.0,
    const std::shared_ptr<const PackedMatrix>& packed = nullptr,
    bool transposed = false,
    const Tensor& BT = {}) {
  if (!detail::can_fuse(x, weight, bias, A, B, dropout)) {
    return detail::lora_linear_composed(x, weight, bias, A, B, scale, dropout);
  }
  detail::LoraArgs args{
      bias, scale, draw_dropout(dropout), packed, transposed, BT};
  const bool needs_grad = at::GradMode::is_enabled() &&
      (x.requires_grad() || A.requires_grad() || B.requires_grad() ||
       weight.requires_grad() || (args.has_bias() && bias->requires_grad()));
  if (needs_grad) {
    return detail::fused_lora(x, weight, A, B, std::move(args));
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return detail::lora_forward(x, weight, A, B, args).y;
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
