#pragma once

// An adapted weight: a plain tensor with a tag.
//
// The tag is an out-of-core dispatch key together with a c10::BackendMeta that
// points to the shared state of the site (core/site.h). Every operator that
// meets a tagged tensor comes here first:
//
//   value of a tagged tensor  =  the base with the active deltas applied
//   kernels                   :  linear, matmul, mm, addmm, t, embedding, conv,
//                                the same value without building the weight
//   fallback                  :  every other operator gets the value, built
//                                differentiably; views stay views of the base;
//                                writes reach the base
//
// Tensors without the tag pay nothing: nothing is registered before the first
// attach, and nothing global is looked up after it.

#include <peft/core/adapted_weight/fallback.h> // every other operator
#include <peft/core/adapted_weight/keep.h> // t, to, detach
#include <peft/core/adapted_weight/kernels.h> // linear, embedding, conv, ...
#include <peft/core/adapted_weight/registration.h> // on the first attach
#include <peft/core/adapted_weight/tag.h> // the key and the meta
#include <peft/core/adapted_weight/values.h> // base with the deltas applied

namespace peft {

/// The weight as the network sees it now: the base with the active adapters
/// applied, as a plain tensor. Use it where raw storage is read (data_ptr,
/// accessors, saving one tensor), which shows the base. Differentiable in the
/// adapters' parameters while gradients are enabled; a plain tensor is
/// returned as it is.
inline Tensor effective(const Tensor& weight) {
  if (detail::tag_of(weight) == nullptr) {
    return weight;
  }
  detail::NoTagGuard guard(detail::kAdaptedKey);
  return detail::plain(weight);
}

/// The bare base behind an adapted weight: a plain alias that shares storage.
/// Writes go to the base. A plain tensor is returned as it is.
inline Tensor base(const Tensor& weight) {
  return detail::tag_of(weight) == nullptr ? weight : detail::base_of(weight);
}

/// Whether an adapter hangs on this tensor.
inline bool is_adapted(const Tensor& weight) {
  const auto* meta = detail::tag_of(weight);
  return meta != nullptr && !meta->site->entries.empty(); // not only packed
}

} // namespace peft
