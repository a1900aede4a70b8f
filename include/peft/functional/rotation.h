#pragma once

// Rotations from free numbers, and their products with rows, for OFT and BOFT.

#include <ATen/ATen.h>
#include <torch/types.h>

#include <cstdint>

namespace peft {

namespace functional {

using torch::Tensor;

/// Skew-symmetric matrices [n, b, b] from the entries above their diagonals,
/// [n, b (b - 1) / 2] row by row.
inline Tensor skew_symmetric(const Tensor& upper, int64_t b) {
  const Tensor at = at::triu_indices(b, b, 1, upper.options().dtype(at::kLong));
  const Tensor places = at.select(0, 0) * b + at.select(0, 1);
  const Tensor full = at::zeros({upper.size(0), b * b}, upper.options())
                          .index_copy(1, places, upper)
                          .view({-1, b, b});
  return full - full.transpose(1, 2);
}

/// The Cayley map, (I - Q) (I + Q)⁻¹: a rotation for each skew-symmetric Q [n,
/// b, b].
inline Tensor cayley(const Tensor& Q) {
  const auto dtype = c10::promoteTypes(Q.scalar_type(), at::kFloat);
  const Tensor q = Q.to(dtype);
  const Tensor identity = at::eye(q.size(-1), q.options()).expand_as(q);
  return at::linalg_solve(identity + q, identity - q, /*left=*/false)
      .to(Q.scalar_type());
}

/// Its Neumann series as HF PEFT cuts it off: I + 2 Q + 2 Q² + ... + Qᵏ, k =
/// terms - 1. Near a rotation for small Q only.
inline Tensor cayley_neumann(const Tensor& Q, int64_t terms) {
  Tensor R = at::eye(Q.size(-1), Q.options()).expand_as(Q);
  if (terms <= 1) {
    return R;
  }
  R = R + Q * 2;
  if (terms > 2) {
    Tensor power = at::bmm(Q, Q);
    R = R + power * 2;
    for (int64_t i = 3; i < terms - 1; ++i) {
      power = at::bmm(power, Q);
      R = R + power * 2;
    }
    R = R + at::bmm(power, Q);
  }
  return R;
}

/// rows [*, n b] times a matrix of n blocks [n, b, b] on the diagonal. One
/// block serves for all where n is 1.
inline Tensor times_blocks(const Tensor& rows, const Tensor& blocks) {
  const int64_t b = blocks.size(-1), n = rows.size(-1) / b;
  const Tensor parts = rows.reshape({-1, n, b});
  const Tensor product = blocks.size(0) == 1 && n > 1
      ? at::matmul(parts, blocks[0])
      : at::bmm(parts.transpose(0, 1), blocks).transpose(0, 1);
  return product.reshape(rows.sizes());
}

} // namespace functional

} // namespace peft
