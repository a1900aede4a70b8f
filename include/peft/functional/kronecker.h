#pragma once

// Kronecker products on plain tensors. With A [a1, a2] and B [b1, b2],
//
//   (A ⊗ B) x = γ(A X Bᵀ),   X = η(x) [a2, b2]
//
// where η lays x out in rows of b2 and γ lays the rows of [a1, b1] behind each
// other: two small products for each row, and no matrix [a1 b1, a2 b2].

#include <peft/functional/packed_matrix.h>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace peft {

namespace functional {

using torch::Tensor;

/// W + s · (A ⊗ B) without building A ⊗ B. W [a1 b1, a2 b2] has A's dtype.
inline Tensor kronecker_merged(
    const Tensor& weight,
    const Tensor& A,
    const Tensor& B,
    double scale) {
  return at::addcmul(
             weight.reshape({A.size(0), B.size(0), A.size(1), B.size(1)}),
             A.unsqueeze(1).unsqueeze(3),
             B.unsqueeze(0).unsqueeze(2),
             scale)
      .reshape(weight.sizes());
}

namespace detail {

inline Tensor left_product(const Tensor& A, const Tensor& X);

/// Y_i = A X_i for A [p, q] and X [n, q, l]. The derivative in A is one product
/// over all i; matmul's own would build one for each.
struct LeftProduct : torch::autograd::Function<LeftProduct> {
  static Tensor forward(
      torch::autograd::AutogradContext* ctx,
      const Tensor& A,
      const Tensor& X) {
    ctx->save_for_backward({A, X});
    return at::bmm(A.unsqueeze(0).expand({X.size(0), -1, -1}), X);
  }
  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx,
      const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &A = saved[0], &X = saved[1], &dY = grads[0];
    Tensor dA, dX;
    if (ctx->needs_input_grad(0)) {
      dA = at::mm(
          dY.transpose(0, 1).flatten(1), X.transpose(0, 1).flatten(1).t());
    }
    if (ctx->needs_input_grad(1)) {
      dX = left_product(A.t(), dY);
    }
    return {dA, dX};
  }
};

/// The same, or torch's own operators where only they are understood.
inline Tensor left_product(const Tensor& A, const Tensor& X) {
  const bool plain = runs_plainly(X.device().type()) &&
      A.scalar_type() == X.scalar_type() &&
      !A._fw_grad(/*level=*/0).defined() && !X._fw_grad(/*level=*/0).defined();
  return plain ? LeftProduct::apply(A, X) : at::matmul(A, X);
}

} // namespace detail

/// Multiply-adds that kronecker_linear spends on a row, with the cheaper of the
/// two products first.
inline int64_t kronecker_cost(const Tensor& A, const Tensor& B) {
  const int64_t a1 = A.size(0), a2 = A.size(1), b1 = B.size(0), b2 = B.size(1);
  return std::min(a2 * b1 * (b2 + a1), a1 * b2 * (a2 + b1));
}

/// x (A ⊗ B)ᵀ: x [*, a2 b2], A [a1, a2], B [b1, b2] → [*, a1 b1], all of one
/// dtype. Autograd keeps x and the first product: a2 b1 or a1 b2 numbers a row.
inline Tensor
kronecker_linear(const Tensor& x, const Tensor& A, const Tensor& B) {
  const int64_t a1 = A.size(0), a2 = A.size(1), b1 = B.size(0), b2 = B.size(1);
  TORCH_CHECK_VALUE(
      x.dim() > 0 && x.size(-1) == a2 * b2,
      "peft: a Kronecker product of ",
      A.sizes(),
      " and ",
      B.sizes(),
      " takes ",
      a2 * b2,
      " features, and the input is ",
      x.sizes());
  const int64_t rows = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  const Tensor X = x.reshape({rows, a2, b2});
  const Tensor Y = a2 * b1 * (b2 + a1) <= a1 * b2 * (a2 + b1)
      ? detail::left_product(A, at::linear(X, B))
      : at::linear(detail::left_product(A, X), B);
  auto sizes = x.sizes().vec();
  sizes.back() = a1 * b1;
  return Y.reshape(sizes);
}

} // namespace functional

} // namespace peft
