#pragma once

#include <ATen/ATen.h>
#include <torch/types.h>

#include <string>
#include <utility>
#include <vector>

namespace peft {

using torch::Tensor;

namespace detail {

/// What A and B started as, where they are a part of the weight that the base
/// is to do without (PiSSA, OLoRA):
///
///   W' = (W - s · B0 A0) + s · B A = W + s · (B A - B0 A0)
///
/// HF writes W - s · B0 A0 over the base. Here the base keeps its bits and the
/// adapter carries A0 and B0, so that it can be switched off, stand beside
/// others and go again like any LoRA.
struct LoraOffset {
  Tensor A, B; // as the delta's own; undefined: nothing is taken off

  explicit operator bool() const {
    return A.defined();
  }

  /// B A - B0 A0 = (B - B0) A + B0 (A - A0) as one product of twice the rank,
  /// `second` times `first`: zero to the bit while A and B are as they started,
  /// and the large parts need not cancel later. With the gradients of B A.
  std::pair<Tensor, Tensor> under(const Tensor& A1, const Tensor& B1) const {
    return {at::cat({A1, A1 - A}), at::cat({B1 - B, B}, 1)};
  }

  /// The same of [A; A0] and [B, -B0], where no gradient is wanted: nothing is
  /// rounded before the product.
  std::pair<Tensor, Tensor> beside(const Tensor& A1, const Tensor& B1) const {
    return {at::cat({A1, A}), at::cat({B1, -B}, 1)};
  }

  /// Why no entry of A and B may be held at zero, or "".
  std::string mask_obstacle() const {
    return A.defined() ? "it starts as a part of the weight (PiSSA, OLoRA), "
                         "which zeros would take off; start it another way"
                       : "";
  }

  /// Why this cannot take `other`'s values in its own memory, or "".
  std::string misfit(const LoraOffset& other) const {
    const bool fits = static_cast<bool>(other) == static_cast<bool>(*this) &&
        (!A.defined() || other.A.sizes() == A.sizes());
    return fits ? ""
                : "what the two take off at their start is not of one rank";
  }
  void take(const LoraOffset& other) {
    if (A.defined()) {
      A.copy_(other.A);
      B.copy_(other.B);
    }
  }

  /// For training_tensors(): HF makes them from the base again, which rounds,
  /// and may draw.
  std::vector<std::pair<std::string, Tensor>> file_tensors() const {
    std::vector<std::pair<std::string, Tensor>> result;
    if (A.defined()) {
      result = {{"lora_A0", A}, {"lora_B0", B}};
    }
    return result;
  }
};

} // namespace detail

} // namespace peft
