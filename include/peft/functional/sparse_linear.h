#pragma once

// A linear map some entries of whose matrix are parameters, as one node of the
// autograd graph: n rows x [n, in], W' = W with the k entries at `places`
// replaced by t.
//
//   y = x W'ᵀ + b      dx = dy W'      dt_j = Σ_n dy[n, row_j] x[n, col_j]
//
// W' is built in each pass and let go again (copying W costs a hundredth of the
// product), so a step holds no second copy of the weights; where k is small,
// dt is summed without dW', which has W's size and costs a product of its own.

#include <peft/functional/fused_lora.h>
#include <peft/functional/lora.h>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

#include <algorithm>
#include <optional>

namespace peft {

namespace functional {

using torch::Tensor;

/// W with the entries at `places` replaced by `t` [k], in W's dtype; places
/// count in row-major order. Differentiable in both.
inline Tensor
replaced(const Tensor& weight, const Tensor& places, const Tensor& t) {
  return at::put(weight, places, t.to(weight.scalar_type()));
}

namespace detail {

/// Of so many entries one must move for dW' to be the cheaper way to dt
/// (measured on 768 × 768, 64 to 2048 rows).
constexpr int64_t kGatherBelow = 64;

/// The entries of dyᵀ x at `places`. dy [n, out], x [n, in].
inline Tensor
product_at(const Tensor& dy, const Tensor& x, const Tensor& places) {
  const int64_t k = places.numel(), n = x.size(0), in = x.size(1);
  if (!x.is_cpu() || n == 0 || k * kGatherBelow > dy.size(1) * in) {
    return at::mm(dy.t(), x).take(places);
  }
  const Tensor row = places.div(in, "floor"), column = places.remainder(in);
  const Tensor result = at::empty({k}, x.options());
  const int64_t step = std::max<int64_t>(1, 65536 / n); // stays in the cache
  for (int64_t begin = 0; begin < k; begin += step) {
    const int64_t end = std::min(k, begin + step);
    Tensor part = dy.index_select(1, row.slice(0, begin, end));
    part.mul_(x.index_select(1, column.slice(0, begin, end)));
    Tensor sums = result.slice(0, begin, end);
    at::sum_out(sums, part, 0);
  }
  return result;
}

struct SparseLinear : torch::autograd::Function<SparseLinear> {
  static Tensor forward(
      torch::autograd::AutogradContext* ctx,
      const Tensor& x,
      const Tensor& weight,
      const Tensor& places,
      const Tensor& t,
      const std::optional<Tensor>& bias) { // counts only where it is there
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward(
        {t.requires_grad() ? x : Tensor(), weight, places, t});
    ctx->saved_data["has_bias"] = bias.has_value() && bias->defined();
    return at::linear(x, replaced(weight, places, t), bias);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx,
      torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &places = saved[2],
                 &t = saved[3], &dy = grads[0];
    Tensor dx, db, dt;
    const Tensor dy2 = as_matrix(dy);
    if (ctx->needs_input_grad(0)) {
      dx = at::matmul(dy, replaced(weight, places, t));
    }
    if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(4)) {
      db = dy2.sum(0);
    }
    if (ctx->needs_input_grad(3)) {
      dt = at::GradMode::is_enabled() // of a second order
          ? at::mm(dy2.t(), as_matrix(x)).take(places)
          : product_at(dy2, as_matrix(x), places);
      dt = dt.to(t.scalar_type());
    }
    return {dx, Tensor(), Tensor(), dt, db};
  }
};

} // namespace detail

/// y = x W'ᵀ + b in the dtype of the base's result. x [*, in], weight
/// [out, in], bias [out] or absent, places int64 [k] into weight, t [k].
inline Tensor sparse_linear(
    const Tensor& x,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    const Tensor& places,
    const Tensor& t) {
  const bool has_bias = bias.has_value() && bias->defined();
  const bool fused = at::GradMode::is_enabled() &&
      (x.requires_grad() || t.requires_grad()) && !weight.requires_grad() &&
      x.dim() >= 2 && x.size(-1) == weight.size(1) &&
      x.scalar_type() == weight.scalar_type() &&
      (!has_bias || bias->sizes() == at::IntArrayRef({weight.size(0)})) &&
      detail::runs_plainly(x.device().type()) && !detail::has_tangent(x) &&
      !detail::has_tangent(t) && !(has_bias && detail::has_tangent(*bias));
  return fused ? detail::SparseLinear::apply(x, weight, places, t, bias)
               : at::linear(x, replaced(weight, places, t), bias);
}

} // namespace functional

} // namespace peft
