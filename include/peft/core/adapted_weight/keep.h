#pragma once

// Operators after which the tag is still there: t, to, detach, set_data.

#include <peft/core/adapted_weight/values.h>

#include <memory>
#include <optional>
#include <utility>

namespace peft {

namespace detail {

/// A tag like `meta` for another tensor of the same kind of view.
inline c10::intrusive_ptr<AdaptedMeta> same_tag(const AdaptedMeta& meta) {
  auto copy = c10::make_intrusive<AdaptedMeta>(meta.site);
  copy->cut = meta.cut;
  copy->matrix = meta.matrix;
  copy->transposed = meta.transposed;
  copy->rows = meta.rows;
  copy->unmerged = meta.unmerged;
  copy->root = meta.root;
  copy->stack_index = meta.stack_index;
  copy->view = meta.view;
  return copy;
}

/// weight.t() stands in every F::linear, so it is spared the fallback.
inline Tensor t_kernel(const Tensor& w) {
  auto* meta = tag_of(w);
  NoTagGuard guard(kAdaptedKey);
  Tensor result = at::t(w);
  if (meta == nullptr) {
    return result;
  }
  auto tag = same_tag(*meta);
  if (w.dim() == 2) {
    if (meta->view) {
      tag->view = [chain = meta->view](const Tensor& e) {
        return chain(e).t();
      };
    }
    tag->transposed = !meta->transposed;
  }
  set_tag(result, std::move(tag));
  return result;
}

/// The base moved to another device or dtype keeps its adapter; a call that
/// changes nothing returns the same tensor.
template <class Move>
Tensor moved(const Tensor& self, Move&& move) {
  auto* meta = tag_of(self);
  NoTagGuard guard(kAdaptedKey);
  if (meta == nullptr) {
    return move(self);
  }
  if (meta->view) {
    return move(value_of(self, *meta));
  }
  const Site& site = *meta->site;
  Tensor source = base_of(self);
  Tensor result = move(source);
  if (result.is_same(source)) {
    return self;
  }
  auto tag = same_tag(*meta);
  // On a copy every adapter acts, those too that the base holds already.
  if (!site.merge_order.empty() && site.holds_storage_of(source)) {
    if (site.active(source).empty()) { // the copy has the value
      return meta->cut ? result : guard_merged(std::move(result), site);
    }
    result = site.original.to(
        result.device(), result.scalar_type(), false, /*copy=*/true);
    result = meta->transposed ? result.t() : result;
    tag->unmerged = true;
  }
  set_tag(result, std::move(tag));
  return result;
}

inline Tensor to_device_kernel(
    const Tensor& self,
    at::Device device,
    at::ScalarType dtype,
    bool non_blocking,
    bool copy,
    std::optional<at::MemoryFormat> format) {
  return moved(self, [&](const Tensor& b) {
    return b.to(device, dtype, non_blocking, copy, format);
  });
}

inline Tensor to_dtype_kernel(
    const Tensor& self,
    at::ScalarType dtype,
    bool non_blocking,
    bool copy,
    std::optional<at::MemoryFormat> format) {
  return moved(self, [&](const Tensor& b) {
    return b.to(dtype, non_blocking, copy, format);
  });
}

inline Tensor to_dtype_layout_kernel(
    const Tensor& self,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout> layout,
    std::optional<at::Device> device,
    std::optional<bool> pin_memory,
    bool non_blocking,
    bool copy,
    std::optional<at::MemoryFormat> format) {
  return moved(self, [&](const Tensor& b) {
    return b.to(dtype, layout, device, pin_memory, non_blocking, copy, format);
  });
}

inline Tensor type_as_kernel(const Tensor& self, const Tensor& other) {
  return moved(self, [&](const Tensor& b) {
    return b.to(other.device(), other.scalar_type());
  });
}

inline Tensor to_other_kernel(
    const Tensor& self,
    const Tensor& other,
    bool non_blocking,
    bool copy,
    std::optional<at::MemoryFormat> format) {
  return moved(self, [&](const Tensor& b) {
    return b.to(
        other.device(), other.scalar_type(), non_blocking, copy, format);
  });
}

inline Tensor detach_kernel(const Tensor& self) {
  auto* meta = tag_of(self);
  NoTagGuard guard(kAdaptedKey);
  Tensor result = self.detach();
  if (meta != nullptr) {
    auto tag = same_tag(*meta);
    tag->cut = true;
    set_tag(result, std::move(tag));
  }
  return result;
}

/// A tag for the adapted tensor itself.
inline c10::intrusive_ptr<AdaptedMeta> first_tag(
    std::shared_ptr<Site> site,
    Rows rows) {
  auto tag = c10::make_intrusive<AdaptedMeta>(std::move(site));
  tag->rows = rows;
  tag->shared = same_tag(*tag);
  tag->token = std::make_shared<char>();
  return tag;
}

/// set_data asks this before it copies the contents of `from` into `self`, tag
/// and all; so for the moment of the copy `from` offers the tag of `self`.
inline bool has_compatible_shallow_copy_type_kernel(
    const Tensor& self,
    const Tensor& from) {
  auto* meta = tag_of(self);
  auto* theirs = tag_of(from);
  NoTagGuard guard(kAdaptedKey);
  const bool compatible = at::_has_compatible_shallow_copy_type(self, from);
  if (compatible &&
      meta != nullptr) { // `from` may be `self`: to() of no change
    if (theirs != nullptr && theirs->unmerged && theirs->site == meta->site) {
      // Module::to: the base goes on holding them.
      const at::NoGradGuard no_grad;
      base_of(from).copy_(base_of(self));
    }
    auto kept = same_tag(*meta);
    kept->token = meta->token;
    kept->shared = meta->shared;
    auto offer = c10::make_intrusive<AdaptedMeta>(meta->site);
    offer->lending = true;
    offer->lent = std::move(kept);
    if (theirs != nullptr) {
      offer->own = c10::intrusive_ptr<AdaptedMeta>::reclaim_copy(theirs);
    }
    set_tag(from, std::move(offer));
  }
  return compatible;
}

} // namespace detail

} // namespace peft
