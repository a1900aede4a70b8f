#pragma once

// Whether a tensor is still what something was made of: its memory and the
// version counter, which every operator that writes raises (writes through
// data_ptr do not).

#include <ATen/ATen.h>
#include <ATen/TracerMode.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstdint>
#include <optional>

namespace peft {

namespace functional {

class Stamp {
 public:
  /// None where a change would go unseen: inference tensors count no versions.
  static std::optional<Stamp> of(const at::Tensor& t) {
    const bool unseen = t.is_inference() || !t.has_storage() ||
        at::tracer::impl::is_dispatch_enabled() ||
        c10::impl::tls_is_dispatch_key_included(
                            c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
    return unseen ? std::nullopt : std::optional<Stamp>(Stamp(t));
  }

  bool operator==(const Stamp& other) const {
    return storage_._unsafe_get_target() ==
        other.storage_._unsafe_get_target() &&
        offset_ == other.offset_ && version_ == other.version_;
  }

 private:
  explicit Stamp(const at::Tensor& t)
      : storage_(t.storage().getWeakStorageImpl()),
        offset_(t.storage_offset()),
        version_(t.unsafeGetTensorImpl()->version_counter().current_version()) {
  }

  /// A weak reference keeps the memory's owner from being used again.
  c10::weak_intrusive_ptr<c10::StorageImpl> storage_;
  int64_t offset_;
  uint32_t version_;
};

} // namespace functional

} // namespace peft
