#pragma once

// LoRA-FA (Zhang et al. 2023, arXiv:2308.03303): A stays as it was drawn and B
// alone trains, with the gradient whose step comes nearest to W's own:
//
//   ĝ_B = argmin ‖s · ĝ A - ∂L/∂W‖ = 1/s² · ∂L/∂B (A Aᵀ)⁻¹

#include <peft/core/adapter.h>
#include <peft/methods/lora.h>

#include <ATen/ATen.h>
#include <torch/optim/optimizer.h>

#include <any>
#include <memory>
#include <utility>
#include <vector>

namespace peft {

/// LoRA-FA around the user's own optimizer:
///
///   peft::LoraFaStep lora_fa(adapter);             // freezes every A
///   torch::optim::AdamW optimizer(lora_fa.parameters(), 1e-3);
///   ...
///   loss.backward();
///   lora_fa.step(optimizer);
///   optimizer.zero_grad();
///
/// A layer whose A is frozen keeps x Aᵀ for backward and not x. What else the
/// adapter trains (biases, a head) is stepped as it is. HF PEFT's
/// LoraFAOptimizer is this with Adam, save that it rounds ĝ_B to bfloat16 where
/// the machine has it, adds eps before Adam's bias correction, and decays after
/// the step.
class LoraFaStep {
 public:
  /// For LoRA on matrices and on convolutions without groups; an embedding's A
  /// starts as zero, and DoRA's gradient is another: both are refused.
  explicit LoraFaStep(const Adapter& adapter) : adapter_(adapter) {
    adapter.name(); // an empty or detached handle is an error
    const auto* options =
        std::any_cast<LoraOptions>(&adapter.shared_state()->options);
    TORCH_CHECK(
        options == nullptr || detail::variant_of(*options).empty(),
        "peft: LoRA-FA projects the gradient of W + s · B A, and adapter '",
        adapter.name(),
        "' is ",
        options == nullptr ? "" : detail::variant_of(*options),
        ", which has another; take an optimizer of torch's");
    for (const auto& site : adapter.shared_state()->sites) {
      TORCH_CHECK(
          std::dynamic_pointer_cast<DoraDelta>(site.delta) == nullptr,
          "peft: LoRA-FA projects the gradient of W + s · B A, and '",
          site.name,
          "' carries DoRA, which normalises it; switch dora off");
      auto lora = std::dynamic_pointer_cast<LoraDelta>(site.delta);
      if (!lora) {
        continue;
      }
      const auto layout = lora->config().layout;
      TORCH_CHECK(
          layout != detail::LoraLayout::embedding &&
              layout != detail::LoraLayout::blocks &&
              lora->config().groups == 1,
          "peft: LoRA-FA needs one A for all of B, and not the zero that an "
          "embedding starts with; leave '",
          site.name,
          "' (",
          lora->describe(),
          layout == detail::LoraLayout::embedding ? ", an embedding" : "",
          ") out of the targets");
      deltas_.push_back(std::move(lora));
    }
    TORCH_CHECK(
        !deltas_.empty(),
        "peft: LoRA-FA trains B of LoRA, and adapter '",
        adapter.name(),
        "' (",
        adapter.method(),
        ") has none");
    for (const auto& lora : deltas_) {
      lora->lora_A.set_requires_grad(false);
      lora->lora_A.mutable_grad().reset();
    }
  }

  /// What the optimizer is to be built on: all that trains.
  std::vector<Tensor> parameters() const {
    std::vector<Tensor> result;
    for (const auto& p : adapter_.parameters()) {
      if (p.requires_grad()) {
        result.push_back(p);
      }
    }
    return result;
  }

  /// Puts the gradients of B into their place: once a step, for what lies
  /// between backward and the optimizer's own step.
  void project_gradients() const {
    const torch::NoGradGuard no_grad;
    for (const auto& lora : deltas_) {
      Tensor gradient = lora->lora_B.grad();
      if (!gradient.defined()) {
        continue;
      }
      const double s = lora->config().scaling * adapter_.scale();
      TORCH_CHECK(
          s != 0.0,
          "peft: LoRA-FA divides by the scaling of the adapter, which is 0; "
          "call set_scale or choose another alpha");
      const Tensor A = lora->lora_A.flatten(1);
      const Tensor gram = at::mm(A, A.t());
      const Tensor inverse =
          at::linalg_pinv(gram + 1e-8 * at::eye(gram.size(0), gram.options()));
      const Tensor projected =
          at::mm(gradient.flatten(1), inverse).mul_(1.0 / (s * s));
      gradient.copy_(projected.view(gradient.sizes()));
    }
  }

  /// project_gradients() and optimizer.step().
  void step(torch::optim::Optimizer& optimizer) const {
    project_gradients();
    optimizer.step();
  }

 private:
  Adapter adapter_;
  std::vector<std::shared_ptr<LoraDelta>> deltas_;
};

} // namespace peft
