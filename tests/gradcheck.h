#pragma once

/// Finite differences against autograd, first and second order, in float64.

#include "test.h"

#include <functional>
#include <string>
#include <vector>

namespace gradcheck {

using torch::Tensor;
using Tensors = std::vector<Tensor>;
using Function = std::function<Tensor(const Tensors&)>;

/// Central differences of the scalar f at every entry of `input`, in place.
inline Tensor differences(const std::function<double()>& f, Tensor input) {
  constexpr double step = 1e-4;
  torch::NoGradGuard no_grad;
  Tensor result = at::zeros(input.sizes(), torch::kDouble);
  Tensor flat = result.view({-1});
  for (int64_t i = 0; i < input.numel(); ++i) {
    // The entry by its index in every dimension: inputs may have any strides.
    std::vector<at::indexing::TensorIndex> at_i;
    int64_t rest = i;
    for (int64_t d = input.dim() - 1; d >= 0; --d) {
      at_i.insert(at_i.begin(), rest % input.size(d));
      rest /= input.size(d);
    }
    const Tensor entry = input.index(at_i);
    const double before = entry.item<double>();
    input.index_put_(at_i, before + step);
    const double above = f();
    input.index_put_(at_i, before - step);
    const double below = f();
    input.index_put_(at_i, before);
    flat[i] = (above - below) / (2 * step);
  }
  return result;
}

/// Whether autograd's gradients of <f(inputs), direction> agree with central
/// differences for every input that requires grad.
inline Comparison
first_order(const Function& f, const Tensors& inputs, const Tensor& direction) {
  Tensors leaves;
  for (const auto& t : inputs) {
    if (t.defined() && t.requires_grad()) {
      leaves.push_back(t);
    }
  }
  const auto found = torch::autograd::grad(
      {(f(inputs) * direction).sum()}, leaves, {}, {}, false, true);
  for (size_t i = 0; i < leaves.size(); ++i) {
    const Tensor expected = differences(
        [&] { return (f(inputs) * direction).sum().item<double>(); },
        leaves[i].detach());
    const Tensor grad =
        found[i].defined() ? found[i] : at::zeros_like(leaves[i]);
    auto same = close(grad, expected, 1e-7, 1e-7);
    if (!same) {
      return {
          false,
          "input " + std::to_string(i) +
              " of those that require grad: " + same.message};
    }
  }
  return {true, "gradients agree with finite differences"};
}

/// The same one order higher: the gradients themselves are differentiated, in
/// the inputs and in the direction.
inline Comparison second_order(
    const Function& f,
    const Tensors& inputs,
    const Tensor& direction) {
  const size_t count = inputs.size();
  Tensors all = inputs;
  all.push_back(direction.detach().clone().set_requires_grad(true));
  torch::manual_seed(5);
  Tensors weights;
  for (const auto& t : inputs) {
    weights.push_back(
        t.defined() ? torch::randn(t.sizes(), torch::kDouble) : Tensor());
  }
  const Function gradient = [&](const Tensors& now) {
    torch::AutoGradMode on(true); // the differences are taken without
    const Tensors front(now.begin(), now.begin() + static_cast<long>(count));
    Tensors leaves, chosen;
    for (size_t i = 0; i < count; ++i) {
      if (now[i].defined() && now[i].requires_grad()) {
        leaves.push_back(now[i]);
        chosen.push_back(weights[i]);
      }
    }
    const auto grads = torch::autograd::grad(
        {(f(front) * now[count]).sum()}, leaves, {}, true, true, true);
    Tensor total = at::zeros({}, torch::kDouble);
    for (size_t i = 0; i < grads.size(); ++i) {
      if (grads[i].defined()) {
        total = total + (grads[i] * chosen[i]).sum();
      }
    }
    return total;
  };
  return first_order(gradient, all, at::ones({}, torch::kDouble));
}

} // namespace gradcheck
