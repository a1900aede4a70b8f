#pragma once

#include <peft/core/adapted_weight.h>

#include <torch/optim/adagrad.h>
#include <torch/optim/adam.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>

namespace peft {

namespace detail {

template <class Options>
bool decays_by_gradient(const torch::optim::OptimizerOptions& options) {
  const auto* typed = dynamic_cast<const Options*>(&options);
  return typed != nullptr && typed->weight_decay() != 0.0;
}

} // namespace detail

/// Refuses an optimizer that would decay a base under an adapter by the
/// effective weight. attach freezes the base, so this concerns only bases whose
/// requires_grad was switched on again: SGD, Adam, RMSprop and Adagrad add
/// weight_decay · w to the gradient, and w reads as W + ΔW. AdamW multiplies
/// the base itself and is right.
inline void check_optimizer(torch::optim::Optimizer& optimizer) {
  using namespace torch::optim;
  for (auto& group : optimizer.param_groups()) {
    const auto& options = group.options();
    const bool decays = detail::decays_by_gradient<SGDOptions>(options) ||
        detail::decays_by_gradient<AdamOptions>(options) ||
        detail::decays_by_gradient<RMSpropOptions>(options) ||
        detail::decays_by_gradient<AdagradOptions>(options);
    for (const auto& p : group.params()) {
      TORCH_CHECK(
          !(decays && p.requires_grad() && is_adapted(p)),
          "peft: this optimizer has weight_decay on a base of shape ",
          p.sizes(),
          " that trains under an adapter, and would decay it by the effective "
          "weight; give it a group without weight_decay, or use AdamW");
    }
  }
}

} // namespace peft
