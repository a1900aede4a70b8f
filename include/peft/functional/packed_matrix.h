#pragma once

#include <ATen/ATen.h>

#include <memory>
#include <optional>

namespace peft {

namespace functional {

/// A frozen matrix W in the order in which the CPU kernels read it.
class PackedMatrix {
 public:
  /// Whether `w`, W or its transpose as a whole, is still what was packed.
  bool is_of(const at::Tensor& /*w*/) const {
    return false;
  }
};

/// y = x Mᵀ + b for a frozen M: W, or its transpose when `transposed`; by the
/// packed matrix where it is given and serves.
inline at::Tensor frozen_linear(
    const at::Tensor& x,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    const std::shared_ptr<const PackedMatrix>& /*packed*/,
    bool /*transposed*/) {
  return at::linear(x, weight, bias);
}

} // namespace functional

} // namespace peft
