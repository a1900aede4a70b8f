#pragma once

// LoRA's change of a few rows of a result, in place and without gradients:
// y += s · x Aᵀ Bᵀ. The rows of a mixed batch come in pieces of often one token
// each, where a few operators of the dispatcher would cost more than the work.

#include <peft/functional/cpu/skinny.h>
#include <peft/functional/stamp.h>

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/util/SmallVector.h>

#include <cstdint>
#include <mutex>
#include <optional>

namespace peft {

namespace functional {

using torch::Tensor;

/// Bᵀ, kept for as long as B stays what it was (functional/stamp.h). Threads
/// may share it.
class TransposedCache {
 public:
  /// B [out, r], contiguous float32 on the CPU → [r, out].
  Tensor of(const Tensor& B) const {
    const auto now = Stamp::of(B);
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool fits = transposed_.defined() &&
        transposed_.size(0) == B.size(1) && transposed_.size(1) == B.size(0);
    if (!now || !(now == source_) || !fits) {
      const at::NoGradGuard no_grad;
      transposed_ = B.t().contiguous();
      source_ = now;
    }
    return transposed_;
  }

 private:
  mutable std::mutex mutex_;
  mutable std::optional<Stamp> source_;
  mutable Tensor transposed_;
};

/// Whether add_lora_rows serves: plain float32 rows on the CPU.
inline bool can_add_lora_rows(
    const Tensor& x,
    const Tensor& A,
    const Tensor& B,
    const Tensor& y) {
  for (const Tensor* t : {&x, &A, &B, &y}) {
    if (t->scalar_type() != at::kFloat || !t->is_cpu() || !t->is_contiguous() ||
        !t->has_storage() || t->_fw_grad(/*level=*/0).defined()) {
      return false;
    }
  }
  return true;
}

/// y += s · x Aᵀ Bᵀ. x [n, in], A [r, in], B [out, r] and its `transposed`,
/// y [n, out].
inline void add_lora_rows(
    const Tensor& x,
    const Tensor& A,
    const Tensor& B,
    const TransposedCache& transposed,
    const Tensor& y,
    double scale) {
  if (!cpu::has_fast_skinny() || B.is_inference()) {
    at::AutoDispatchBelowADInplaceOrView guard;
    y.addmm_(at::mm(x, A.t()), B.t(), 1.0, scale);
    return;
  }
  const Tensor BT = transposed.of(B);
  const int64_t n = x.size(0), in = x.size(1);
  const int64_t r = BT.size(0), out = BT.size(1);
  c10::SmallVector<float, 256> t(n * r);
  cpu::project(
      x.const_data_ptr<float>(),
      in,
      A.const_data_ptr<float>(),
      t.data(),
      n,
      in,
      r,
      static_cast<float>(scale));
  cpu::expand<float>(
      t.data(),
      BT.const_data_ptr<float>(),
      /*bias=*/nullptr,
      y.mutable_data_ptr<float>(),
      out,
      n,
      out,
      r,
      /*accumulate=*/true);
}

} // namespace functional

} // namespace peft
