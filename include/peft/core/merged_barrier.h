#pragma once

#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

#include <string>

namespace peft {

namespace detail {

using torch::Tensor;

/// Backward through a merged adapter would leave its parameters without
/// gradients in silence; this node says so instead. `y` is a fresh result and
/// is handed on as it is; `anchor` is a parameter of the adapter that trains.
struct MergedBarrier : torch::autograd::Function<MergedBarrier> {
  static Tensor forward(
      torch::autograd::AutogradContext* ctx,
      Tensor y,
      const Tensor& /*anchor*/,
      const std::string& name) {
    ctx->saved_data["name"] = name;
    ctx->mark_dirty({y});
    return y;
  }
  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx,
      const torch::autograd::variable_list& /*grads*/) {
    TORCH_CHECK(
        false,
        "peft: adapter '",
        ctx->saved_data["name"].toStringRef(),
        "' is merged and cannot train: call unmerge() before the training "
        "step, or freeze the adapter's parameters");
  }
};

} // namespace detail

} // namespace peft
