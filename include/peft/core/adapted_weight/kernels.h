#pragma once

// Operators that a tagged weight takes part in without being built: linear,
// matmul, mm, addmm, embedding, convolutions, layer_norm. Each asks the deltas,
// and takes the value where one of them has no way of its own.

#include <peft/core/adapted_weight/calls.h>
#include <peft/core/adapted_weight/values.h>

#include <functional>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// An operator on `x` that takes the value of `w`, which in a mixed batch each
/// group has its own of.
template <class Run>
Tensor run_with_value(
    const Tensor& x,
    const Tensor& w,
    int64_t features,
    const Run& run) {
  const auto* meta = tag_of(w);
  const RowGroups* rows = meta == nullptr ? nullptr : mixed_rows();
  return rows == nullptr || participants(*meta->site, root_of(w, *meta)).empty()
      ? run(x)
      : by_group(*rows, x, features, run);
}

/// Whether a delta of any kind takes part here.
inline bool acts_at(const std::optional<Tensor>& t) {
  const auto* meta = t ? tag_of(*t) : nullptr;
  if (meta == nullptr) {
    return false;
  }
  const Tensor& root = root_of(*t, *meta);
  return !participants(*meta->site, root).empty() ||
      !participants(*meta->site, root, /*outputs=*/true).empty();
}

/// Whether evaluation had better fold the deltas into a weight that it keeps:
/// where they cost over an eighth of the base's product, in operations and, on
/// few rows, in bytes read alike. A copy of the weight is the price. Where a
/// thread chooses its adapters the choice may change from call to call.
inline bool is_worth_keeping(
    const Site& site,
    const Participants& active,
    const Tensor& w) {
  if (at::GradMode::is_enabled() || active_info() != nullptr ||
      w.is_inference()) {
    return false;
  }
  int64_t cost = 0;
  for (const auto& entry : active.everywhere) {
    cost += entry.delta->linear_cost();
  }
  const int64_t size = c10::multiply_integers(site.sizes);
  return 8 * cost > size && size >= kLeastKept;
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
      x.dim() < 1) {
    return {};
  }
  if (x.dim() == 1) { // one row
    if (mixed_rows() != nullptr) {
      return {};
    }
    Tensor y = fast_linear(x.unsqueeze(0), w, bias, multiplies_by_w);
    return y.defined() ? y.squeeze(0) : y;
  }
  const std::shared_ptr<Site> site = meta->site;
  const Participants active = participants(*site, root_of(w, *meta));
  const bool packed = site->packed && site->packed->is_of(w);
  if (active.empty() ? !packed : !active.all_have(&Delta::has_linear)) {
    return {};
  }
  if (!packed && is_worth_keeping(*site, active, w)) {
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
  Tensor y = run_fast(active, &Delta::linear, call);
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
inline Tensor operand(const Tensor& t, bool may_be_wide = false) {
  auto* meta = tag_of(t);
  if (meta == nullptr) {
    return t;
  }
  if (meta->site->active(root_of(t, *meta)).empty()) {
    return base_of(t);
  }
  return value_of(t, *meta, {/*may_keep=*/true, may_be_wide});
}

/// `run(x, value of w, bias)`. A value in a wider dtype than a base of half
/// precision is multiplied as it is, and the result is rounded: rounding the
/// weight first costs more than all other roundings where ΔW is large.
template <class Run>
Tensor run_exactly(
    const Tensor& x,
    const Tensor& w,
    const std::optional<Tensor>& bias,
    const Run& run) {
  const auto dtype = w.scalar_type();
  const Tensor value = operand(w, /*may_be_wide=*/x.scalar_type() == dtype);
  const auto wide = value.scalar_type();
  Tensor y = wide == dtype
      ? run(x, value, bias)
      : run(x.to(wide), value, bias && bias->defined() ? bias->to(wide) : bias)
            .to(dtype);
  return guard_result(std::move(y), w);
}

/// An operator with a bias, `run(input, bias)`; where rows of a mixed batch
/// differ in the bias, it is added afterwards. `channel` is its dimension in
/// the result, counted from the end where negative.
template <class Run>
Tensor run_with_bias(
    const Tensor& input,
    const Tensor& w,
    const std::optional<Tensor>& bias,
    int64_t channel,
    const Run& run) {
  if (!differs_by_row(bias)) {
    return apply_outputs(w, bias, run(input, plain(bias)));
  }
  Tensor y = run(input, std::nullopt);
  const Tensor values =
      values_by_row(*bias, y, channel < 0 ? y.dim() + channel : channel);
  y = y + values.to(y.scalar_type());
  return apply_outputs(w, bias, std::move(y));
}

inline Tensor linear_kernel(
    const Tensor& x,
    const Tensor& w,
    const std::optional<Tensor>& bias) {
  NoTagGuard guard(kAdaptedKey);
  const auto run = [&](const Tensor& input, const std::optional<Tensor>& b) {
    Tensor y = fast_linear(input, w, b, /*multiplies_by_w=*/false);
    return y.defined()
        ? y
        : run_with_value(input, w, /*features=*/1, [&](const Tensor& rows) {
            return run_exactly(rows, w, b, at::linear);
          });
  };
  return run_with_bias(plain(x), w, bias, -1, run);
}

/// x w: of matrices, mm, or of any dimensions, matmul.
inline Tensor
adapted_product(const Tensor& input, const Tensor& w, bool is_mm) {
  Tensor y = fast_linear(input, w, std::nullopt, /*multiplies_by_w=*/true);
  return y.defined()
      ? y
      : run_with_value(input, w, /*features=*/1, [&](const Tensor& rows) {
          return run_exactly(
              rows,
              w,
              std::nullopt,
              [&](const Tensor& a, const Tensor& value, const auto& /*bias*/) {
                return is_mm ? at::mm(a, value) : at::matmul(a, value);
              });
        });
}

inline Tensor matmul_kernel(const Tensor& x, const Tensor& w) {
  NoTagGuard guard(kAdaptedKey);
  return apply_outputs(w, adapted_product(plain(x), w, /*is_mm=*/false));
}

inline Tensor mm_kernel(const Tensor& x, const Tensor& w) {
  NoTagGuard guard(kAdaptedKey);
  return apply_outputs(w, adapted_product(plain(x), w, /*is_mm=*/true));
}

inline Tensor addmm_kernel(
    const Tensor& bias,
    const Tensor& x,
    const Tensor& w,
    const at::Scalar& beta,
    const at::Scalar& alpha) {
  NoTagGuard guard(kAdaptedKey);
  const Tensor input = plain(x);
  if (bias.dim() != 1 || beta.toComplexDouble() != 1. ||
      alpha.toComplexDouble() != 1.) {
    Tensor y = at::addmm(plain(bias), input, operand(w), beta, alpha);
    return apply_outputs(w, bias, guard_result(std::move(y), w));
  }
  const auto run = [&](const Tensor& rows, const std::optional<Tensor>& b) {
    if (!b) {
      return adapted_product(rows, w, /*is_mm=*/true);
    }
    Tensor y = fast_linear(rows, w, b, /*multiplies_by_w=*/true);
    return y.defined()
        ? y
        : run_with_value(rows, w, /*features=*/1, [&](const Tensor& own) {
            return run_exactly(
                own,
                w,
                b,
                [](const Tensor& a, const Tensor& value, const auto& added) {
                  return at::addmm(*added, a, value);
                });
          });
  };
  return run_with_bias(input, w, bias, -1, run);
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
  const Tensor value = differs_by_row(other)
      ? values_by_row(other, self, self.dim() - 1)
      : plain(other);
  if (!participants(*meta->site, root_of(other, *meta), /*outputs=*/true)
           .empty()) {
    return self.copy_(apply_outputs(other, at::add(self, value, alpha)));
  }
  return self.add_(value, alpha);
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
    const Participants active = participants(*site, root_of(w, *meta));
    // Sliced tables count their rows from elsewhere: they take the value.
    if (!meta->view && active.all_have(&Delta::has_embedding) &&
        !w.requires_grad()) {
      EmbeddingCall call{
          base_of(w), plain(indices), padding_idx, scale_grad_by_freq, sparse};
      Tensor y = run_fast(active, &Delta::embedding, call);
      refuse_optimised_torchscript(y);
      return apply_outputs(w, guard_merged(std::move(y), *site));
    }
  }
  const auto look_up = [&](const Tensor& rows) {
    const Tensor table = operand(w);
    // A dense function of the adapter has no sparse gradient to give.
    const bool can_be_sparse = sparse && (meta == nullptr || table.is_leaf());
    Tensor y = at::embedding(
        table, rows, padding_idx, scale_grad_by_freq, can_be_sparse);
    return guard_result(std::move(y), w);
  };
  return apply_outputs(
      w, run_with_value(plain(indices), w, /*features=*/0, look_up));
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
  const BatchInFront in_front;
  const auto run = [&](const Tensor& input, const std::optional<Tensor>& b) {
    if (meta != nullptr && meta->matrix && !meta->cut && !meta->view) {
      const std::shared_ptr<Site> site = meta->site;
      const Participants active = participants(*site, w);
      if (active.all_have(&Delta::has_convolution)) {
        const Tensor kernel = at::GradMode::is_enabled() ? base_of(w) : w;
        Tensor y = run_fast(
            active,
            &Delta::convolution,
            ConvolutionCall{input, kernel, b, args});
        refuse_optimised_torchscript(y);
        return guard_merged(std::move(y), *site);
      }
    }
    return run_with_value(input, w, w.dim() - 1, [&](const Tensor& rows) {
      return run_exactly(
          rows,
          w,
          b,
          [&](const Tensor& a, const Tensor& value, const auto& added) {
            return functional::convolution(a, value, added, args);
          });
    });
  };
  return run_with_bias(plain(x), w, bias, /*channel=*/1, run);
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
  const RowGroups* rows = mixed_rows();
  if (rows != nullptr && (acts_at(w) || acts_at(bias))) {
    const auto features = static_cast<int64_t>(shape.size());
    return by_group(*rows, plain(x), features, [&](const Tensor& own) {
      return layer_norm_kernel(own, shape, w, bias, eps, cudnn_enable);
    });
  }
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
