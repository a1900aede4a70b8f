#pragma once

// Operators that a tagged weight takes part in without being built: linear,
// matmul, mm, addmm, embedding, convolutions, layer_norm. Each asks the deltas,
// and takes the value where one of them has no way of its own.

#include <peft/core/adapted_weight/values.h>

#include <functional>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

inline Tensor run_base(const LinearCall& call) {
  return functional::frozen_linear(
      call.x, call.weight, call.bias, call.packed, call.transposed);
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
  const bool packed = site->packed && site->packed->is_of(w);
  if (active.empty() ? !packed : !all_have(active, &Delta::has_linear)) {
    return {};
  }
  // Without gradients nothing is saved, and the tensor itself will do.
  Tensor matrix = at::GradMode::is_enabled() ? base_of(w) : w;
  if (multiplies_by_w) {
    matrix = matrix.t();
  }
  LinearCall call{
      x,
      matrix,
      bias,
      meta->rows,
      multiplies_by_w != meta->transposed,
      packed ? site->packed : nullptr};
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

} // namespace detail

} // namespace peft
