#pragma once

// A frozen matrix in the order in which the CPU kernels read it. W never
// changes while an adapter trains, so it may be packed once: y = x Wᵀ and
// dx = dy W then run faster than on the matrix as it lies, at the price of two
// more copies of W.

#include <peft/functional/cpu/packed_gemm.h>

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <memory>
#include <optional>
#include <vector>

namespace peft {

namespace functional {

/// W [rows, columns], packed for products with Wᵀ (forward) and W (backward).
class PackedMatrix {
 public:
  /// `w` is a float32 matrix on the CPU, with any strides.
  explicit PackedMatrix(const at::Tensor& w)
      : storage_(w.storage().getWeakStorageImpl()),
        data_(w.const_data_ptr()),
        version_(version_of(w)),
        sizes_(w.sizes().vec()),
        strides_(w.strides().vec()),
        forward_(w),
        backward_(w.t()) {}

  /// Whether `w`, W or its transpose as a whole, is still what was packed: the
  /// same memory, not written to since. (Inference tensors count no writes, and
  /// no tensor counts those through data().)
  bool is_of(const at::Tensor& w) const {
    if (w.dim() != 2 || !w.has_storage() ||
        w.storage().unsafeGetStorageImpl() != storage_._unsafe_get_target() ||
        w.const_data_ptr() != data_ || version_of(w) != version_) {
      return false;
    }
    const auto lies = [&](int64_t i, int64_t j) {
      return w.size(0) == sizes_[i] && w.size(1) == sizes_[j] &&
          w.stride(0) == strides_[i] && w.stride(1) == strides_[j];
    };
    return lies(0, 1) || lies(1, 0);
  }

  /// Bytes of the two copies.
  int64_t nbytes() const {
    return forward_.nbytes() + backward_.nbytes();
  }

  /// Whether n rows are faster this way than by at::linear.
  bool serves(int64_t n) const {
    return n >= 4;
  }

  /// y2 = bias + t UT + x2 Wᵀ, or with `backward` x2 W. x2 [n, k] has unit
  /// column stride, y2 [n, out] dense rows, which are overwritten; `bias` [out]
  /// may be undefined, t [n, r] and UT [r, out] null where r = 0.
  void multiply(
      const at::Tensor& x2,
      const at::Tensor& y2,
      bool backward,
      const at::Tensor& bias,
      const float* t,
      const float* UT,
      int64_t r) const {
    const auto& panels = backward ? backward_ : forward_;
    const at::Tensor b = bias.defined() ? bias.contiguous() : bias;
    panels.multiply(
        x2.const_data_ptr<float>(),
        x2.stride(0),
        x2.size(0),
        y2.mutable_data_ptr<float>(),
        y2.stride(0),
        b.defined() ? b.const_data_ptr<float>() : nullptr,
        t,
        UT,
        r);
  }

 private:
  static int64_t version_of(const at::Tensor& w) {
    return w.is_inference()
        ? 0
        : w.unsafeGetTensorImpl()->version_counter().current_version();
  }

  /// Held weakly: its memory may go, but its place is not given to another.
  c10::weak_intrusive_ptr<c10::StorageImpl> storage_;
  const void* data_;
  int64_t version_;
  std::vector<int64_t> sizes_, strides_;
  cpu::Panels forward_, backward_;
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
