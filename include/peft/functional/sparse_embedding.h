#pragma once

// LoRA on an embedding whose gradients are sparse (torch's sparse = true): a
// batch touches few of the num columns of A [r, num], and dA holds those only.

#include <peft/functional/lora.h>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

namespace peft {

namespace functional {

namespace detail {

/// Columns of A by index, as rows: A [r, num], indices [*] → [*, r]. The
/// gradient is a coalesced COO tensor with two sparse dimensions, made without
/// a temporary of num entries. A second differentiation goes through the dense
/// one.
struct SparseColumns : torch::autograd::Function<SparseColumns> {
  static Tensor forward(
      torch::autograd::AutogradContext* ctx,
      const Tensor& A,
      const Tensor& indices,
      int64_t padding_idx,
      bool scale_grad_by_freq) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->saved_data["sizes"] = A.sizes();
    ctx->saved_data["padding_idx"] = padding_idx;
    ctx->saved_data["scale_grad_by_freq"] = scale_grad_by_freq;
    ctx->save_for_backward({indices});
    return at::embedding(A.t(), indices);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx,
      torch::autograd::variable_list grads) {
    const Tensor indices = ctx->get_saved_variables()[0];
    const auto sizes = ctx->saved_data["sizes"].toIntVector();
    const auto padding_idx = ctx->saved_data["padding_idx"].toInt();
    const bool by_freq = ctx->saved_data["scale_grad_by_freq"].toBool();
    if (at::GradMode::is_enabled()) {
      const Tensor dense = at::embedding_dense_backward(
          grads[0], indices, sizes[1], padding_idx, by_freq);
      return {dense.t(), Tensor(), Tensor(), Tensor()};
    }
    auto [touched, place, count] = at::_unique2(
        indices.flatten(),
        /*sorted=*/true,
        /*return_inverse=*/true,
        /*return_counts=*/by_freq);
    const Tensor dy = grads[0].reshape({-1, sizes[0]});
    Tensor sums = at::zeros({touched.numel(), sizes[0]}, dy.options())
                      .index_add_(0, place, dy);
    if (by_freq) {
      sums.div_(count.unsqueeze(1));
    }
    if (padding_idx >= 0) {
      const Tensor kept = touched.ne(padding_idx).nonzero().squeeze(1);
      touched = touched.index_select(0, kept);
      sums = sums.index_select(0, kept);
    }
    const int64_t r = sizes[0], n = touched.numel();
    const Tensor row = at::arange(r, touched.options()).unsqueeze(1);
    const Tensor where = at::stack(
        {row.expand({r, n}).flatten(),
         touched.to(at::kLong).unsqueeze(0).expand({r, n}).flatten()});
    return {
        at::_sparse_coo_tensor_unsafe(
            where,
            sums.t().flatten(),
            sizes,
            dy.options().layout(at::kSparse),
            /*is_coalesced=*/true),
        Tensor(),
        Tensor(),
        Tensor()};
  }
};

} // namespace detail

/// lora_embedding_term whose gradient for A is sparse when `sparse`: what
/// optimizers that take sparse gradients (SGD, Adagrad) update in time
/// proportional to the batch. Dense where custom functions are refused.
inline Tensor lora_embedding_term(
    const Tensor& indices,
    const Tensor& A,
    const Tensor& B,
    double scale,
    int64_t padding_idx,
    bool scale_grad_by_freq,
    bool sparse) {
  const bool refused = c10::impl::tls_is_dispatch_key_included(
                           c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
      detail::has_tangent(A);
  if (!sparse || refused || !A.requires_grad() || !at::GradMode::is_enabled()) {
    return lora_embedding_term(
        indices, A, B, scale, padding_idx, scale_grad_by_freq);
  }
  const Tensor rows =
      detail::SparseColumns::apply(A, indices, padding_idx, scale_grad_by_freq);
  return at::matmul(rows, B.t()).mul(scale);
}

} // namespace functional

} // namespace peft
