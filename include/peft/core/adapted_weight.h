#pragma once

// An adapted weight: a plain tensor with a tag.
//
// The tag is an out-of-core dispatch key together with a c10::BackendMeta that
// points to the shared state of the site (core/site.h). Every operator that
// meets a tagged tensor comes here first:
//
//   value of a tagged tensor  =  the base with the active deltas applied
//   kernels                   :  linear, matmul, mm, addmm, t, embedding, conv:
//                                the same value without building the weight
//   fallback                  :  every other operator gets the value, built
//                                differentiably; views stay views of the base;
//                                writes reach the base
//
// Tensors without the tag pay nothing: nothing is registered before the first
// attach, and nothing global is looked up after it. This is the only file that
// knows the key.

#include <peft/core/merged_barrier.h>
#include <peft/core/site.h>
#include <peft/detail/platform.h>

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/csrc/jit/python/update_graph_executor_opt.h>
#include <torch/csrc/jit/runtime/interpreter.h>
#include <torch/library.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <unordered_set>
#include <utility>
#include <vector>

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
    1 * 1000 + static_cast<int64_t>(c10::DispatchKey::PEFT_DISPATCH_KEY);

/// Internal linkage on purpose: every library that can make a tag must stay
/// mapped, because tags and kernels outlive dlclose.
[[maybe_unused]] static const bool kPinned = [] {
  static const char here = 0;
  return keep_loaded(&here);
}();

// ----------------------------------------------------------------------------
// The tag
// ----------------------------------------------------------------------------

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
  /// A view: value = view(value of root). `root` is the untagged base, so that
  /// no tag refers to its own tensor.
  Tensor root;
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

inline void ensure_registered();

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

// ----------------------------------------------------------------------------
// Values
// ----------------------------------------------------------------------------

/// Puts the barrier behind a result made from a weight with a merged adapter.
inline Tensor guard_merged(Tensor fresh, const Site& site) {
  if (site.merge_order.empty() || !at::GradMode::is_enabled()) {
    return fresh;
  }
  const AdapterState* adapter = site.merged_trainable();
  if (adapter == nullptr) {
    return fresh;
  }
  Tensor anchor;
  for (const auto& entry : site.entries) {
    for (const auto& p : entry.delta->parameters()) {
      if (entry.adapter.get() == adapter && p.requires_grad()) {
        anchor = p;
      }
    }
  }
  return MergedBarrier::apply(fresh, anchor, adapter->name);
}

/// TorchScript's profiling executor replays a recorded graph in which the
/// adapter's parameters do not occur, so from the second run on they would get
/// no gradient. Refused on every run.
inline void refuse_optimised_torchscript(const Tensor& y) {
  TORCH_CHECK(
      !(y.requires_grad() && at::GradMode::is_enabled() &&
        torch::jit::getGraphExecutorOptimize() &&
        !torch::jit::currentCallstack().empty()),
      "peft: TorchScript's optimising executor drops the gradients of an "
      "adapter. Train inside `torch::jit::GraphOptimizerEnabledGuard "
      "guard(false);`, or run inference under torch::NoGradGuard");
}

/// The executor's plan for a module that trained before detaches the weights it
/// is handed, even under GraphOptimizerEnabledGuard(false).
inline void refuse_detached_in_torchscript(const Tensor& value) {
  TORCH_CHECK(
      !(value.requires_grad() && at::GradMode::is_enabled() &&
        !torch::jit::currentCallstack().empty()),
      "peft: TorchScript detached an adapted weight, and its adapter would get "
      "no gradients: the executor keeps a plan from earlier training of this "
      "module. Call peft::forget_plans(model) first, or run inference under "
      "torch::NoGradGuard");
}

/// The weight that `site` makes of the plain tensor `weight`, which has the
/// orientation it had at attach.
inline Tensor apply_deltas(const Site& site, const Tensor& weight) {
  TORCH_CHECK(
      weight.sizes() == at::IntArrayRef(site.sizes),
      "peft: an adapted weight changed its shape from ",
      at::IntArrayRef(site.sizes),
      " to ",
      weight.sizes(),
      " under its adapter; detach the adapter before changing the shape");
  const ActiveEntries active = site.active(weight);
  if (active.empty()) {
    return site.merge_order.empty() || !at::GradMode::is_enabled()
        ? weight
        : guard_merged(weight.clone(), site);
  }
  auto dtype = weight.scalar_type();
  for (const auto& entry : active) {
    if (auto d = entry.delta->dtype()) {
      dtype = c10::promoteTypes(dtype, *d);
    }
  }
  Tensor value = weight.to(dtype);
  for (const auto& entry : active) {
    value = entry.delta->effective(value, entry.scale);
  }
  refuse_optimised_torchscript(value);
  return value.to(weight.scalar_type());
}

/// The value of a tagged tensor, as a plain one. Call it with the key excluded.
inline Tensor value_of(const Tensor& t, const AdaptedMeta& meta) {
  const std::shared_ptr<Site> site = meta.site;
  Tensor value;
  if (meta.view) {
    value = meta.view(apply_deltas(*site, meta.root));
  } else if (meta.transposed) {
    value = apply_deltas(*site, base_of(t).t()).t();
  } else {
    value = apply_deltas(*site, base_of(t));
  }
  if (!meta.cut) {
    return value;
  }
  refuse_detached_in_torchscript(value);
  return value.detach();
}

inline Tensor plain(const Tensor& t) {
  auto* meta = tag_of(t);
  return meta == nullptr ? t : value_of(t, *meta);
}

inline std::optional<Tensor> plain(const std::optional<Tensor>& t) {
  return t.has_value() ? std::optional<Tensor>(plain(*t)) : std::nullopt;
}

/// A write to a base that holds a merged adapter would be undone by unmerge.
inline void refuse_write_while_merged(const Tensor& t) {
  const auto* meta = tag_of(t);
  TORCH_CHECK(
      meta == nullptr || meta->site->merge_order.empty(),
      "peft: this weight holds a merged adapter, and unmerge() would undo the "
      "write; call unmerge() first, or peft::merge(model) to keep the merge");
}

/// The tensor whose storage decides whether a merge has reached `t`.
inline const Tensor& root_of(const Tensor& t, const AdaptedMeta& meta) {
  return meta.view ? meta.root : t;
}

/// Applies the output transforms that sit on `t`, the bias of a layer or the
/// weight of one without, to the layer's result.
inline Tensor apply_outputs(const Tensor& t, Tensor y) {
  const auto* meta = tag_of(t);
  if (meta == nullptr || !meta->site->has_output()) {
    return y;
  }
  const std::shared_ptr<Site> site = meta->site;
  const ActiveEntries active = site->active_outputs(root_of(t, *meta));
  if (active.empty()) {
    return y;
  }
  TORCH_CHECK(
      t.numel() == c10::multiply_integers(site->sizes),
      "peft: an adapter acts on the output of a layer of which only a part, ",
      t.sizes(),
      " of ",
      at::IntArrayRef(site->sizes),
      ", is used here; attach it to a layer that is used whole");
  // The user's callable may hold adapted layers: the key is active again.
  const auto tls = c10::impl::tls_local_dispatch_key_set();
  c10::impl::ForceDispatchKeyGuard guard(
      tls.included_, tls.excluded_.remove(kAdaptedKey));
  for (const auto& entry : active) {
    y = entry.delta->output(y, entry.scale);
  }
  return y;
}

/// The same for a layer with this weight and, maybe, bias.
inline Tensor apply_outputs(
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    Tensor y) {
  y = apply_outputs(weight, std::move(y));
  return bias ? apply_outputs(*bias, std::move(y)) : y;
}

// ----------------------------------------------------------------------------
// Fast paths
// ----------------------------------------------------------------------------

inline Tensor run_base(const LinearCall& call) {
  return at::linear(call.x, call.weight, call.bias);
}
inline Tensor run_base(const EmbeddingCall& call) {
  return at::embedding(
      call.weight, call.indices, call.padding_idx, call.scale_grad_by_freq);
}
inline Tensor run_base(const ConvolutionCall& call) {
  return functional::convolution(call.x, call.weight, call.bias, call.args);
}

/// How a delta takes part in a call of some kind.
template <class Call>
using FastPath =
    Tensor (Delta::*)(const Call&, const Below<Call>&, double) const;

/// The lowest `level` deltas around the base operator, the last one outermost.
template <class Call>
Tensor run_fast(
    const ActiveEntries& active,
    size_t level,
    FastPath<Call> path,
    const Call& call) {
  if (level == 0) {
    return run_base(call);
  }
  auto next = [&](const Call& c) {
    return run_fast(active, level - 1, path, c);
  };
  const auto& entry = active[level - 1];
  return (entry.delta->*path)(call, {next, level == 1}, entry.scale);
}

template <class Capability>
bool all_have(const ActiveEntries& active, Capability capability) {
  for (const auto& entry : active) {
    if (!(entry.delta->*capability)()) {
      return false;
    }
  }
  return !active.empty();
}

/// y = x Mᵀ + b with M = w, or M = wᵀ where the operator multiplies by w as it
/// is. Undefined where there is no fast path: the caller takes the value.
inline Tensor fast_linear(
    const Tensor& x,
    const Tensor& w,
    const std::optional<Tensor>& bias,
    bool multiplies_by_w) {
  auto* meta = tag_of(w);
  if (meta == nullptr || !meta->matrix || meta->cut || w.dim() != 2 ||
      x.dim() < 2) {
    return {};
  }
  const std::shared_ptr<Site> site = meta->site;
  const ActiveEntries active = site->active(root_of(w, *meta));
  if (!all_have(active, &Delta::has_linear)) {
    return {};
  }
  // Without gradients nothing is saved, and the tensor itself will do.
  Tensor matrix = at::GradMode::is_enabled() ? base_of(w) : w;
  if (multiplies_by_w) {
    matrix = matrix.t();
  }
  LinearCall call{
      x, matrix, bias, meta->rows, multiplies_by_w != meta->transposed};
  Tensor y = run_fast(active, active.size(), &Delta::linear, call);
  refuse_optimised_torchscript(y);
  return guard_merged(std::move(y), *site);
}

/// Result of an operator whose weight has only merged (or no active) adapters.
inline Tensor guard_result(Tensor y, const Tensor& w) {
  auto* meta = tag_of(w);
  return meta == nullptr ? y : guard_merged(std::move(y), *meta->site);
}

/// The plain tensor to hand to the base operator: the value, except that a
/// weight without an active adapter is the base itself, with no copy behind a
/// barrier (guard_result puts the barrier behind the output instead).
inline Tensor operand(const Tensor& t) {
  auto* meta = tag_of(t);
  if (meta == nullptr) {
    return t;
  }
  if (meta->site->active(root_of(t, *meta)).empty()) {
    return base_of(t);
  }
  return value_of(t, *meta);
}

inline Tensor linear_kernel(
    const Tensor& x,
    const Tensor& w,
    const std::optional<Tensor>& bias) {
  NoTagGuard guard(kAdaptedKey);
  const Tensor input = plain(x);
  const auto b = plain(bias);
  Tensor y = fast_linear(input, w, b, /*multiplies_by_w=*/false);
  if (!y.defined()) {
    y = guard_result(at::linear(input, operand(w), b), w);
  }
  return apply_outputs(w, bias, std::move(y));
}

inline Tensor matmul_kernel(const Tensor& x, const Tensor& w) {
  NoTagGuard guard(kAdaptedKey);
  const Tensor input = plain(x);
  Tensor y = fast_linear(input, w, std::nullopt, /*multiplies_by_w=*/true);
  if (!y.defined()) {
    y = guard_result(at::matmul(input, operand(w)), w);
  }
  return apply_outputs(w, std::move(y));
}

inline Tensor mm_kernel(const Tensor& x, const Tensor& w) {
  NoTagGuard guard(kAdaptedKey);
  const Tensor input = plain(x);
  Tensor y = fast_linear(input, w, std::nullopt, /*multiplies_by_w=*/true);
  if (!y.defined()) {
    y = guard_result(at::mm(input, operand(w)), w);
  }
  return apply_outputs(w, std::move(y));
}

inline Tensor addmm_kernel(
    const Tensor& bias,
    const Tensor& x,
    const Tensor& w,
    const at::Scalar& beta,
    const at::Scalar& alpha) {
  NoTagGuard guard(kAdaptedKey);
  const Tensor input = plain(x);
  const Tensor b = plain(bias);
  Tensor y;
  if (b.dim() == 1 && beta.toComplexDouble() == 1. &&
      alpha.toComplexDouble() == 1.) {
    y = fast_linear(input, w, b, /*multiplies_by_w=*/true);
  }
  if (!y.defined()) {
    y = guard_result(at::addmm(b, input, operand(w), beta, alpha), w);
  }
  return apply_outputs(w, bias, std::move(y));
}

inline Tensor&
add__kernel(Tensor& self, const Tensor& other, const at::Scalar& alpha) {
  auto* meta = tag_of(other);
  const bool writes_weight = tag_of(self) != nullptr;
  NoTagGuard guard(kAdaptedKey);
  if (meta == nullptr && !writes_weight) {
    return self.add_(other, alpha);
  }
  if (writes_weight) { // a read that aliases the write must see the base
    refuse_write_while_merged(self);
    return self.add_(
        meta != nullptr && self.is_alias_of(other) ? base_of(other)
                                                   : plain(other),
        alpha);
  }
  if (!meta->site->active_outputs(root_of(other, *meta)).empty()) {
    return self.copy_(apply_outputs(other, at::add(self, plain(other), alpha)));
  }
  return self.add_(plain(other), alpha);
}

inline Tensor embedding_kernel(
    const Tensor& w,
    const Tensor& indices,
    int64_t padding_idx,
    bool scale_grad_by_freq,
    bool sparse) {
  auto* meta = tag_of(w);
  NoTagGuard guard(kAdaptedKey);
  if (meta != nullptr && meta->matrix && !meta->cut && !meta->transposed) {
    const std::shared_ptr<Site> site = meta->site;
    const ActiveEntries active = site->active(root_of(w, *meta));
    // Sliced tables count their rows from elsewhere: they take the value.
    if (!meta->view && all_have(active, &Delta::has_embedding) &&
        !w.requires_grad()) {
      EmbeddingCall call{
          base_of(w), plain(indices), padding_idx, scale_grad_by_freq};
      Tensor y = run_fast(active, active.size(), &Delta::embedding, call);
      refuse_optimised_torchscript(y);
      return apply_outputs(w, guard_merged(std::move(y), *site));
    }
  }
  const Tensor table = operand(w);
  // A dense function of the adapter has no sparse gradient to give.
  const bool can_be_sparse = sparse && (meta == nullptr || table.is_leaf());
  Tensor y = at::embedding(
      table, plain(indices), padding_idx, scale_grad_by_freq, can_be_sparse);
  return apply_outputs(w, guard_result(std::move(y), w));
}

[[noreturn]] inline Tensor& embedding_renorm__kernel(
    Tensor& /*w*/,
    const Tensor& /*indices*/,
    double max_norm,
    double /*norm_type*/) {
  TORCH_CHECK(
      false,
      "peft: an embedding with max_norm (here ",
      max_norm,
      ") rewrites its frozen weight on every call and cannot be adapted; "
      "clear max_norm");
}

inline Tensor adapted_convolution(
    const Tensor& x,
    const Tensor& w,
    const std::optional<Tensor>& bias,
    const functional::ConvolutionArgs& args) {
  auto* meta = tag_of(w);
  NoTagGuard guard(kAdaptedKey);
  const Tensor input = plain(x);
  const auto b = plain(bias);
  Tensor y;
  if (meta != nullptr && meta->matrix && !meta->cut && !meta->view) {
    const std::shared_ptr<Site> site = meta->site;
    const ActiveEntries active = site->active(w);
    if (all_have(active, &Delta::has_convolution)) {
      const Tensor kernel = at::GradMode::is_enabled() ? base_of(w) : w;
      y = run_fast(
          active,
          active.size(),
          &Delta::convolution,
          ConvolutionCall{input, kernel, b, args});
      refuse_optimised_torchscript(y);
      y = guard_merged(std::move(y), *site);
    }
  }
  if (!y.defined()) {
    y = guard_result(functional::convolution(input, operand(w), b, args), w);
  }
  return apply_outputs(w, bias, std::move(y));
}

/// conv1d, conv2d and conv3d differ only in the rank of their weight.
inline Tensor convolution_kernel(
    const Tensor& x,
    const Tensor& w,
    const std::optional<Tensor>& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    int64_t groups) {
  return adapted_convolution(
      x, w, bias, {stride, padding, dilation, groups, {}});
}

inline Tensor convolution_padding_kernel(
    const Tensor& x,
    const Tensor& w,
    const std::optional<Tensor>& bias,
    at::IntArrayRef stride,
    std::string_view padding,
    at::IntArrayRef dilation,
    int64_t groups) {
  return adapted_convolution(
      x, w, bias, {stride, {}, dilation, groups, padding});
}

/// What tracing records for every convolution.
inline Tensor traced_convolution_kernel(
    const Tensor& x,
    const Tensor& w,
    const std::optional<Tensor>& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    bool transposed,
    at::IntArrayRef output_padding,
    int64_t groups,
    bool benchmark,
    bool deterministic,
    bool cudnn_enabled,
    bool allow_tf32) {
  if (!transposed && w.dim() >= 3 && w.dim() <= 5) {
    return adapted_convolution(
        x, w, bias, {stride, padding, dilation, groups, {}});
  }
  NoTagGuard guard(kAdaptedKey);
  Tensor y = guard_result(
      at::_convolution(
          plain(x),
          operand(w),
          plain(bias),
          stride,
          padding,
          dilation,
          transposed,
          output_padding,
          groups,
          benchmark,
          deterministic,
          cudnn_enabled,
          allow_tf32),
      w);
  return apply_outputs(w, bias, std::move(y));
}

/// The transforms on a normalisation's weight and bias, each around the ones
/// before it.
inline Tensor layer_norm_kernel(
    const Tensor& x,
    at::IntArrayRef shape,
    const std::optional<Tensor>& w,
    const std::optional<Tensor>& bias,
    double eps,
    bool cudnn_enable) {
  ActiveEntries around;
  std::vector<std::shared_ptr<Site>> held;
  for (const auto* t : {&w, &bias}) {
    const auto* meta = *t ? tag_of(**t) : nullptr;
    if (meta != nullptr && meta->site->has_output()) {
      held.push_back(meta->site);
      const auto active = meta->site->active_outputs(root_of(**t, *meta));
      around.append(active.begin(), active.end());
    }
  }
  NoTagGuard guard(kAdaptedKey);
  const auto weight = plain(w);
  const auto b = plain(bias);
  const auto norm = [&](const Tensor& v) {
    return at::layer_norm(v, shape, weight, b, eps, cudnn_enable);
  };
  if (around.empty()) {
    return norm(plain(x));
  }
  std::function<Tensor(const Tensor&, size_t)> level = [&](const Tensor& v,
                                                           size_t i) -> Tensor {
    if (i == 0) {
      return norm(v);
    }
    const auto& entry = around[i - 1];
    return entry.delta->around_norm(
        v, [&](const Tensor& u) { return level(u, i - 1); }, entry.scale);
  };
  const Tensor input = plain(x);
  const auto tls = c10::impl::tls_local_dispatch_key_set();
  c10::impl::ForceDispatchKeyGuard active_again(
      tls.included_, tls.excluded_.remove(kAdaptedKey));
  return level(input, around.size());
}

// ----------------------------------------------------------------------------
// What keeps the tag: t, to, detach, set_data
// ----------------------------------------------------------------------------

/// A tag like `meta` for another tensor of the same kind of view.
inline c10::intrusive_ptr<AdaptedMeta> same_tag(const AdaptedMeta& meta) {
  auto copy = c10::make_intrusive<AdaptedMeta>(meta.site);
  copy->cut = meta.cut;
  copy->matrix = meta.matrix;
  copy->transposed = meta.transposed;
  copy->rows = meta.rows;
  copy->root = meta.root;
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
  Tensor source = base_of(self);
  Tensor result = move(source);
  if (result.is_same(source)) {
    return self;
  }
  set_tag(result, same_tag(*meta));
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
  if (compatible && meta != nullptr && !self.is_same(from)) {
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

// ----------------------------------------------------------------------------
// Fallback
// ----------------------------------------------------------------------------

template <class F>
void for_each_tensor(const c10::IValue& value, F&& f) {
  if (value.isTensor()) {
    f(value.toTensor());
  } else if (value.isList()) {
    for (const c10::IValue& element : value.toListRef()) {
      if (element.isTensor()) {
        f(element.toTensor());
      }
    }
  }
}

template <class F>
c10::IValue map_tensors(const c10::IValue& value, F&& f) {
  if (value.isTensor()) {
    return f(value.toTensor());
  }
  if (value.isList()) {
    c10::impl::GenericList list(value.toList().elementType());
    for (const c10::IValue& element : value.toListRef()) {
      list.push_back(
          element.isTensor() ? c10::IValue(f(element.toTensor())) : element);
    }
    return list;
  }
  return value;
}

inline bool holds_tag(const c10::IValue& value) {
  bool found = false;
  for_each_tensor(
      value, [&](const Tensor& t) { found = found || tag_of(t) != nullptr; });
  return found;
}

inline bool is_written(const c10::Argument& argument) {
  return argument.alias_info() != nullptr && argument.alias_info()->isWrite();
}

/// Decides from the strides whether `view` of `parent` (both plain) is again
/// rows of the matrix or its transpose, and notes it in `tag`.
inline void
classify_view(const Tensor& parent, const Tensor& view, AdaptedMeta& tag) {
  const bool typed = view.scalar_type() == parent.scalar_type() &&
      view.layout() == parent.layout();
  if (!tag.matrix || !typed) {
    tag.matrix = false;
    return;
  }
  const auto offset = view.storage_offset() - parent.storage_offset();
  if (view.sizes() == parent.sizes() && view.strides() == parent.strides() &&
      offset == 0) {
    return; // an alias
  }
  tag.matrix = false;
  if (parent.dim() != 2 || view.dim() != 2) {
    return;
  }
  if (offset == 0 && view.size(0) == parent.size(1) &&
      view.size(1) == parent.size(0) && view.stride(0) == parent.stride(1) &&
      view.stride(1) == parent.stride(0)) {
    tag.matrix = true;
    tag.transposed = !tag.transposed;
    return;
  }
  // Rows of the matrix are columns of its transpose.
  const int64_t along = tag.transposed ? 1 : 0;
  const auto step = parent.stride(along);
  if (view.size(1 - along) != parent.size(1 - along) ||
      view.stride(1 - along) != parent.stride(1 - along) ||
      view.stride(along) != step || step <= 0 || offset < 0 ||
      offset % step != 0) {
    return;
  }
  const auto begin = offset / step;
  if (begin + view.size(along) <= parent.size(along)) {
    tag.matrix = true;
    tag.rows = {
        tag.rows.begin + begin, tag.rows.begin + begin + view.size(along)};
  }
}

/// The elements that as_strided(sizes, strides, offset) of `parent` picks, as
/// positions in parent.flatten(): strides are those of the base's memory, which
/// the value does not share.
inline Tensor strided_elements(
    const Tensor& parent,
    at::IntArrayRef sizes,
    at::IntArrayRef strides,
    int64_t offset) {
  int64_t reach = 1;
  for (int64_t i = 0; i < parent.dim(); ++i) {
    reach += std::max<int64_t>(parent.size(i) - 1, 0) * parent.stride(i);
  }
  Tensor places = at::full({reach}, -1, at::kLong);
  places.as_strided(parent.sizes(), parent.strides(), 0)
      .copy_(at::arange(parent.numel()).view(parent.sizes()));
  int64_t last = offset - parent.storage_offset();
  const int64_t first = last;
  for (size_t i = 0; i < sizes.size(); ++i) {
    last += std::max<int64_t>(sizes[i] - 1, 0) * strides[i];
  }
  TORCH_CHECK(
      first >= 0 && last < reach,
      "peft: as_strided reaches beyond an adapted weight");
  Tensor picked = places.as_strided(sizes, strides, first).contiguous();
  TORCH_CHECK(
      picked.numel() == 0 || picked.min().item<int64_t>() >= 0,
      "peft: as_strided reaches beyond an adapted weight");
  return picked.to(parent.device());
}

/// A view operator on one tagged tensor: the result is a real view of the base
/// that carries the tag, so writes reach the base and nothing is built until
/// the value is needed. Returns false where the operator copied.
inline bool lazy_view(
    const c10::OperatorHandle& op,
    torch::jit::Stack* stack,
    size_t argument) {
  const size_t count = op.schema().arguments().size();
  std::vector<c10::IValue> inputs(stack->end() - count, stack->end());
  const Tensor self = inputs[argument].toTensor();
  const AdaptedMeta& meta = *tag_of(self);
  const Tensor parent = base_of(self);

  torch::jit::Stack outputs(inputs.begin(), inputs.end());
  outputs[argument] = parent;
  op.callBoxed(&outputs);
  bool aliases = true;
  for (const auto& output : outputs) {
    bool any = false;
    for_each_tensor(output, [&](const Tensor& o) {
      any = true;
      aliases = aliases && o.is_alias_of(parent);
    });
    aliases = aliases && any;
  }
  if (!aliases) {
    return false;
  }

  inputs[argument] = c10::IValue(); // the replay must not keep the tensor
  auto replay = [op, inputs, argument](const Tensor& e) {
    torch::jit::Stack s(inputs.begin(), inputs.end());
    s[argument] = e;
    op.callBoxed(&s);
    return s;
  };
  Tensor picked; // for as_strided: which elements, instead of a replay
  if (op.schema().name() == "aten::as_strided") {
    const Tensor& view = outputs[0].toTensor();
    picked = strided_elements(
        parent, view.sizes(), view.strides(), view.storage_offset());
  }
  const bool stored_transposed = !meta.view && meta.transposed;
  const Tensor root = meta.view ? meta.root
      : stored_transposed       ? parent.t()
                                : parent;
  const auto chain = meta.view;
  auto wrap = [&](const Tensor& output, size_t index, int64_t element) {
    if (output.is_same(parent)) {
      return self;
    }
    auto tag = same_tag(meta);
    classify_view(parent, output, *tag);
    tag->root = root;
    tag->view = [replay, chain, stored_transposed, picked, index, element](
                    const Tensor& e) {
      const Tensor before = chain ? chain(e) : stored_transposed ? e.t() : e;
      if (picked.defined()) {
        return before.reshape(-1)
            .index_select(0, picked.reshape(-1))
            .view(picked.sizes());
      }
      const c10::IValue result = replay(before)[index];
      return element < 0 ? result.toTensor()
                         : result.toListRef()[element].toTensor();
    };
    remove_tag(output);
    set_tag(output, std::move(tag));
    return output;
  };
  for (size_t i = 0; i < outputs.size(); ++i) {
    int64_t element = outputs[i].isTensor() ? -1 : 0;
    outputs[i] = map_tensors(outputs[i], [&](const Tensor& o) {
      return wrap(o, i, element < 0 ? element : element++);
    });
  }
  torch::jit::drop(*stack, count);
  for (auto& output : outputs) {
    stack->push_back(std::move(output));
  }
  return true;
}

/// Operators that only ask for the shape or the type.
inline bool reads_metadata(const std::string& name) {
  static const std::unordered_set<std::string> names{
      "aten::size",         "aten::sym_size",      "aten::stride",
      "aten::sym_stride",   "aten::numel",         "aten::sym_numel",
      "aten::dim",          "aten::is_complex",    "aten::is_floating_point",
      "aten::is_signed",    "aten::is_same_size",  "aten::is_contiguous",
      "aten::empty_like",   "aten::zeros_like",    "aten::ones_like",
      "aten::full_like",    "aten::rand_like",     "aten::randn_like",
      "aten::new_empty",    "aten::new_zeros",     "aten::new_ones",
      "aten::new_full",     "aten::result_type",   "aten::can_cast",
      "aten::_version",     "aten::is_leaf",       "aten::output_nr",
      "aten::is_inference", "aten::requires_grad_"};
  return names.count(name) != 0;
}

/// In-place changes of shape, under which an adapter would no longer fit. set_,
/// by which archives are loaded, is one when the sizes differ.
inline bool changes_shape(
    const c10::FunctionSchema& schema,
    c10::ArrayRef<c10::IValue> values) {
  const std::string& name = schema.name();
  if (name == "aten::set_") {
    std::vector<int64_t> sizes;
    for (size_t i = 1; i < values.size(); ++i) {
      const auto& argument = schema.arguments()[i].name();
      if (argument == "source" && values[i].isTensor()) {
        sizes = values[i].toTensor().sizes().vec();
      } else if (argument == "size") {
        sizes = values[i].toIntVector();
      }
    }
    return values[0].toTensor().sizes() != at::IntArrayRef(sizes);
  }
  static const std::unordered_set<std::string> names{
      "aten::t_",
      "aten::transpose_",
      "aten::swapaxes_",
      "aten::swapdims_",
      "aten::squeeze_",
      "aten::unsqueeze_",
      "aten::as_strided_",
      "aten::resize_",
      "aten::resize_as_",
      "aten::swap_"};
  return names.count(name) != 0;
}

/// Where a tensor carries an output transform: operators whose result is the
/// layer's output (a sum, where the tensor is a bias), and operators that
/// merely read it.
inline bool gives_output(const std::string& name, const Tensor& t) {
  static const std::unordered_set<std::string> names{
      "aten::convolution",
      "aten::conv_transpose1d",
      "aten::conv_transpose2d",
      "aten::conv_transpose3d",
      "aten::layer_norm"};
  return names.count(name) != 0 || (name == "aten::add" && t.dim() == 1);
}
inline bool only_reads(const std::string& name) {
  static const std::unordered_set<std::string> names{
      "aten::clone",
      "aten::copy_",
      "aten::equal",
      "aten::allclose",
      "aten::norm",
      "aten::isfinite",
      "aten::_to_copy"};
  return names.count(name) != 0 || reads_metadata(name);
}

inline void fallback(
    const c10::OperatorHandle& op,
    c10::DispatchKeySet,
    torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.name();
  const auto& arguments = schema.arguments();
  const size_t count = arguments.size();
  const size_t first = stack->size() - count;

  size_t tagged = 0;
  bool writes_tagged = false;
  std::optional<size_t> viewed;
  std::vector<Tensor> written;
  Tensor output_at;
  for (size_t i = 0; i < count; ++i) {
    const c10::IValue& value = (*stack)[first + i];
    const bool writes = is_written(arguments[i]);
    if (writes) {
      for_each_tensor(value, [&](const Tensor& t) { written.push_back(t); });
    }
    if (!holds_tag(value)) {
      continue;
    }
    ++tagged;
    writes_tagged = writes_tagged || writes;
    if (!writes && arguments[i].alias_info() != nullptr && value.isTensor()) {
      viewed = i;
    }
    for_each_tensor(value, [&](const Tensor& t) {
      auto* meta = tag_of(t);
      if (meta != nullptr && meta->site->has_output() &&
          !meta->site->active_outputs(root_of(t, *meta)).empty()) {
        output_at = t;
      }
    });
  }
  TORCH_CHECK(
      !(writes_tagged &&
        changes_shape(schema, c10::ArrayRef<c10::IValue>(*stack).slice(first))),
      "peft: ",
      name,
      " would change the shape of an adapted weight in place; merge or detach "
      "the adapter first");

  if (writes_tagged && !reads_metadata(name)) {
    for (const Tensor& t : written) {
      refuse_write_while_merged(t);
    }
  }

  NoTagGuard guard(kAdaptedKey);

  bool returns_view = false;
  for (const auto& result : schema.returns()) {
    returns_view = returns_view ||
        (result.alias_info() != nullptr && !result.alias_info()->isWrite());
  }
  if (tagged == 1 && !writes_tagged && viewed && returns_view &&
      lazy_view(op, stack, *viewed)) {
    return;
  }

  const bool is_output =
      output_at.defined() && !writes_tagged && gives_output(name, output_at);
  TORCH_CHECK(
      !output_at.defined() || writes_tagged || is_output || only_reads(name),
      "peft: an adapter acts on this layer's output, and ",
      name,
      " does not say where that is; attach it to a layer that uses its weight "
      "and bias by linear, conv, layer_norm or +");

  for (size_t i = 0; i < count; ++i) {
    c10::IValue& value = (*stack)[first + i];
    if (!holds_tag(value)) {
      continue;
    }
    if (is_written(arguments[i])) {
      if (!value.isTensor()) { // a list: its elements are written in place
        value = map_tensors(value, [](const Tensor& t) {
          return tag_of(t) == nullptr ? t : base_of(t);
        });
      }
      continue; // a tensor: writes land on the base, and it is returned as is
    }
    value = map_tensors(value, [&](const Tensor& t) -> Tensor {
      if (tag_of(t) == nullptr) {
        return t;
      }
      for (const Tensor& w : written) {
        if (w.defined() && w.is_alias_of(t)) {
          return base_of(t); // w.mul_(w) must not write the delta into w
        }
      }
      return reads_metadata(name) ? base_of(t) : plain(t);
    });
  }
  op.callBoxed(stack);
  if (is_output) {
    Tensor y = stack->back().toTensor();
    stack->back() = apply_outputs(output_at, std::move(y));
  }
}

// ----------------------------------------------------------------------------
// Registration: on the first attach, once a process, never undone
// ----------------------------------------------------------------------------

/// True once kernels of this version stand in the dispatcher; an error when
/// another version's do.
inline bool find_registration() {
  auto marker = c10::Dispatcher::singleton().findSchema({"peft::_abi", ""});
  if (!marker) {
    return false;
  }
  torch::jit::Stack stack;
  marker->callBoxed(&stack);
  TORCH_CHECK(
      stack[0].toInt() == kAdaptedAbi,
      "peft: two libraries of this process were built with incompatible "
      "versions of libpeft (",
      stack[0].toInt(),
      " and ",
      kAdaptedAbi,
      "); build them with the same one");
  return true;
}

/// The libraries are leaked: there is no safe order at exit.
inline void register_kernels() {
  auto* any = new torch::Library(
      torch::Library::IMPL, "_", kAdaptedKey, __FILE__, __LINE__);
  any->fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
  auto* aten = new torch::Library(
      torch::Library::IMPL, "aten", kAdaptedKey, __FILE__, __LINE__);
  aten->impl("linear", TORCH_FN(linear_kernel));
  aten->impl("matmul", TORCH_FN(matmul_kernel));
  aten->impl("mm", TORCH_FN(mm_kernel));
  aten->impl("addmm", TORCH_FN(addmm_kernel));
  aten->impl("add_.Tensor", TORCH_FN(add__kernel));
  aten->impl("embedding", TORCH_FN(embedding_kernel));
  aten->impl("embedding_renorm_", TORCH_FN(embedding_renorm__kernel));
  for (const char* name : {"conv1d", "conv2d", "conv3d"}) {
    aten->impl(name, TORCH_FN(convolution_kernel));
    aten->impl(
        (std::string(name) + ".padding").c_str(),
        TORCH_FN(convolution_padding_kernel));
  }
  aten->impl("_convolution", TORCH_FN(traced_convolution_kernel));
  aten->impl("layer_norm", TORCH_FN(layer_norm_kernel));
  aten->impl("t", TORCH_FN(t_kernel));
  aten->impl("to.device", TORCH_FN(to_device_kernel));
  aten->impl("to.dtype", TORCH_FN(to_dtype_kernel));
  aten->impl("to.dtype_layout", TORCH_FN(to_dtype_layout_kernel));
  aten->impl("to.other", TORCH_FN(to_other_kernel));
  aten->impl("type_as", TORCH_FN(type_as_kernel));
  aten->impl("detach", TORCH_FN(detach_kernel));
  aten->impl(
      "_has_compatible_shallow_copy_type",
      TORCH_FN(has_compatible_shallow_copy_type_kernel));
  auto* own = new torch::Library(
      torch::Library::FRAGMENT, "peft", std::nullopt, __FILE__, __LINE__);
  own->def("_abi() -> int", []() -> int64_t { return kAdaptedAbi; });
}

inline void ensure_registered() {
  static const bool once = [] {
    if (find_registration()) {
      return true;
    }
    try {
      TORCH_CHECK(
          !c10::Dispatcher::singleton().hasBackendFallbackForDispatchKey(
              kAdaptedKey));
      register_kernels();
    } catch (const c10::Error&) {
      // Another copy of libpeft may be registering at this very moment; it
      // sets its marker last.
      for (int i = 0; i < 200 && !find_registration(); ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
      }
      TORCH_CHECK(
          find_registration(),
          "peft: another library owns the dispatch key ",
          c10::toString(kAdaptedKey),
          " in this process; compile with "
          "-DPEFT_DISPATCH_KEY=TESTING_ONLY_GenericWrapper");
    }
    return true;
  }();
  (void)once;
}

} // namespace detail

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
  return detail::tag_of(weight) != nullptr;
}

} // namespace peft
