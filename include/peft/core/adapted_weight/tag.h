#pragma once

// What marks an adapted weight: a dispatch key and, behind it, a
// c10::BackendMeta with the state of the site. The only file that knows the
// key.

#include <peft/core/site.h>
#include <peft/detail/platform.h>

#include <ATen/ATen.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <functional>
#include <memory>
#include <optional>
#include <utility>

#ifndef PEFT_DISPATCH_KEY
/// Reserved by PyTorch for libraries outside its core, above Autocast and
/// Autograd. TESTING_ONLY_GenericWrapper behaves the same and is the spare.
#define PEFT_DISPATCH_KEY DeferredInit
#endif

namespace peft {

namespace detail {

constexpr auto kAdaptedKey = c10::DispatchKey::PEFT_DISPATCH_KEY;

/// Raised whenever Site, Delta or AdaptedMeta change their layout: two
/// libraries of one process must agree on it.
constexpr int64_t kAdaptedAbi =
    5 * 1000 + static_cast<int64_t>(c10::DispatchKey::PEFT_DISPATCH_KEY);

/// Internal linkage on purpose: every library that can make a tag must stay
/// mapped, because tags and kernels outlive dlclose.
[[maybe_unused]] static const bool kPinned = [] {
  static const char here = 0;
  return keep_loaded(&here);
}();

struct AdaptedMeta : c10::BackendMeta {
  explicit AdaptedMeta(std::shared_ptr<Site> s) : site(std::move(s)) {}

  std::shared_ptr<Site> site;
  /// Made by detach(): the value carries no gradient.
  bool cut = false;
  /// The tensor is the weight itself, rows of it, or the transpose of either:
  /// the fast paths apply. Other views only materialise.
  bool matrix = true;
  bool transposed = false;
  Rows rows;
  /// A copy by to() of the base as it was before it held merged adapters, for
  /// others act on it too.
  bool unmerged = false;
  /// A view: value = view(value of root), or of one matrix of a stack. `root`
  /// is the untagged base, so that no tag refers to its own tensor.
  Tensor root;
  std::optional<int64_t> stack_index;
  std::function<Tensor(const Tensor&)> view;

  /// Only the adapted tensor itself holds a token, not its shallow copies
  /// (data(), detach()): Site::tensors finds it by that. Copies wear `shared`.
  std::shared_ptr<void> token;
  c10::intrusive_ptr<AdaptedMeta> shared;

  /// On the source of a set_data: the tag that the target keeps, taken by the
  /// copy that set_data makes, and the tag of the source itself (or null).
  bool lending = false;
  mutable c10::intrusive_ptr<AdaptedMeta> lent;
  c10::intrusive_ptr<AdaptedMeta> own;

  /// What a shallow copy of the tensor gets.
  c10::intrusive_ptr<c10::BackendMeta> clone(
      const c10::intrusive_ptr<c10::BackendMeta>& self) const override {
    if (lending) {
      return lent ? std::move(lent) : own;
    }
    return token ? c10::intrusive_ptr<c10::BackendMeta>(shared) : self;
  }
};

/// Names a protected member of TensorImpl through a derived class, which
/// standard C++ allows.
struct KeySetAccess : c10::TensorImpl {
  static c10::DispatchKeySet& of(c10::TensorImpl& impl) {
    return impl.*(&KeySetAccess::key_set_);
  }
};

inline void remove_tag(const Tensor& t) {
  auto* impl = t.unsafeGetTensorImpl();
  auto& keys = KeySetAccess::of(*impl);
  keys = keys - c10::DispatchKeySet(kAdaptedKey);
  if (impl->get_backend_meta() != nullptr) {
    impl->set_backend_meta(nullptr);
  }
}

inline void set_tag(const Tensor& t, c10::intrusive_ptr<AdaptedMeta> meta) {
  auto* impl = t.unsafeGetTensorImpl();
  impl->set_backend_meta(std::move(meta));
  auto& keys = KeySetAccess::of(*impl);
  keys = keys | c10::DispatchKeySet(kAdaptedKey);
}

/// The tag of `t`, or null for a plain tensor.
inline AdaptedMeta* tag_of(const Tensor& t) {
  if (!t.defined()) {
    return nullptr;
  }
  auto* impl = t.unsafeGetTensorImpl();
  if (!impl->key_set().has(kAdaptedKey)) {
    return nullptr;
  }
  auto* meta = static_cast<AdaptedMeta*>(impl->get_backend_meta());
  if (meta != nullptr && meta->lending) {
    auto own = meta->own;
    if (!meta->lent) { // the set_data is over
      own ? set_tag(t, own) : remove_tag(t);
    }
    return own.get(); // which the tensor holds
  }
  return meta;
}

using NoTagGuard = c10::impl::ExcludeDispatchKeyGuard;

/// An untagged alias of the base: same storage, same version counter. It is
/// part of the graph only where the base itself trains.
inline Tensor base_of(const Tensor& t) {
  NoTagGuard guard(kAdaptedKey);
  Tensor alias = t.requires_grad() && at::GradMode::is_enabled() ? at::alias(t)
                                                                 : t.detach();
  remove_tag(alias);
  return alias;
}

} // namespace detail

} // namespace peft
