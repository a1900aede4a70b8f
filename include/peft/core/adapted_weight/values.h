#pragma once

// What a tagged tensor is worth: the base with the active deltas applied, as a
// plain tensor.

#include <peft/core/adapted_weight/batch.h>
#include <peft/core/adapted_weight/tag.h>
#include <peft/core/merged_barrier.h>

#include <torch/csrc/jit/python/update_graph_executor_opt.h>
#include <torch/csrc/jit/runtime/interpreter.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>

namespace peft {

namespace detail {

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

/// The same behind the value that other adapters make of the site's own base.
inline Tensor
guard_beside(Tensor value, const Tensor& weight, const Site& site) {
  return !site.merge_order.empty() && at::GradMode::is_enabled() &&
          site.merged_trainable() != nullptr && site.holds_storage_of(weight)
      ? guard_merged(value.clone(), site)
      : value;
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

/// What W' is made of.
inline Recipe recipe_of(const Tensor& weight, const ActiveEntries& active) {
  Recipe recipe;
  recipe.add(weight);
  for (const auto& entry : active) {
    recipe.add(entry.delta, entry.scale);
    entry.delta->visit_decorated_state([&](const Tensor& t) { recipe.add(t); });
  }
  return recipe;
}

/// `weight` after all of `active`, each by `step`, in the widest of the dtypes
/// on the way.
template <class Step>
Tensor
changed_by(const ActiveEntries& active, const Tensor& weight, Step&& step) {
  auto dtype = weight.scalar_type();
  for (const auto& entry : active) {
    if (auto d = entry.delta->dtype()) {
      dtype = c10::promoteTypes(dtype, *d);
    }
  }
  Tensor value = weight.to(dtype);
  for (const auto& entry : active) {
    value = step(*entry.delta, value, entry.scale);
  }
  refuse_optimised_torchscript(value);
  return value;
}

/// Numbers in a weight that is worth the look-up.
constexpr int64_t kLeastKept = 4096;

/// How the caller takes a value. Without gradients it may be kept for the next
/// call, if nothing is handed out that shares its memory.
struct Reading {
  bool may_keep = false;
  /// Whether a value in a wider dtype than the base's half precision will do.
  bool may_be_wide = false;
};

/// The weight that `site` makes of the plain tensor `weight`, which has the
/// orientation it had at attach.
inline Tensor
apply_deltas(const Site& site, const Tensor& weight, Reading reading = {}) {
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
  const bool training = at::GradMode::is_enabled();
  // A large weight that evaluation keeps is rounded, as a merged one is; so are
  // copies that train in the base's place.
  const bool is_wide = c10::isReducedFloatingType(weight.scalar_type()) &&
      (training || weight.numel() < kLeastKept) &&
      std::any_of(active.begin(), active.end(), [](const ActiveEntry& entry) {
                         return !entry.delta->replaces_base();
                       });
  const auto as_read = [&](const Tensor& value) {
    return reading.may_be_wide ? value : value.to(weight.scalar_type());
  };
  Recipe recipe;
  if (training) {
    site.kept.drop();
  } else if (reading.may_keep) {
    recipe = recipe_of(weight, active);
    const Tensor kept = site.kept.find(recipe);
    if (kept.defined()) {
      return as_read(kept);
    }
  }
  Tensor value = changed_by(
      active, weight, [](const Delta& delta, const Tensor& w, double scale) {
        return delta.effective(w, scale);
      });
  value = is_wide ? value : value.to(weight.scalar_type());
  if (reading.may_keep && !training) {
    site.kept.offer(std::move(recipe), value);
  }
  return guard_beside(as_read(value), weight, site);
}

/// One matrix of the stack that `site` makes of `stack`. In training it is made
/// alone where it can be: a loop over experts reads each of them once.
inline Tensor matrix_of(
    const Site& site,
    const Tensor& stack,
    int64_t index,
    Reading reading) {
  const ActiveEntries active = site.active(stack);
  const bool alone = at::GradMode::is_enabled() && !active.empty() &&
      stack.sizes() == at::IntArrayRef(site.sizes) &&
      std::all_of(active.begin(), active.end(), [](const ActiveEntry& entry) {
                       return entry.delta->has_matrices();
                     });
  if (!alone) {
    return apply_deltas(site, stack, reading).select(0, index);
  }
  site.kept.drop();
  Tensor value = changed_by(
      active,
      stack.select(0, index),
      [index](const Delta& delta, const Tensor& w, double scale) {
        return delta.effective_matrix(w, index, scale);
      });
  return guard_beside(
      reading.may_be_wide ? value : value.to(stack.scalar_type()), stack, site);
}

/// The value of a tagged tensor, as a plain one. Call it with the key excluded.
inline Tensor
value_of(const Tensor& t, const AdaptedMeta& meta, Reading reading = {}) {
  const std::shared_ptr<Site> site = meta.site;
  Tensor value;
  if (meta.view) {
    value = meta.view(
        meta.stack_index
            ? matrix_of(*site, meta.root, *meta.stack_index, reading)
            : apply_deltas(*site, meta.root, reading));
  } else if (meta.transposed) {
    value = apply_deltas(*site, base_of(t).t(), reading).t();
  } else {
    value = apply_deltas(*site, base_of(t), reading);
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

/// Whether rows of a mixed batch differ in the value of this vector.
inline bool differs_by_row(const Tensor& t) {
  const auto* meta = tag_of(t);
  return meta != nullptr && mixed_rows() != nullptr && t.dim() == 1 &&
      !participants(*meta->site, root_of(t, *meta)).empty();
}
inline bool differs_by_row(const std::optional<Tensor>& t) {
  return t && differs_by_row(*t);
}

/// The values of such a vector, to be added to `y`, or multiplied, whose
/// channels are in dimension `channel`.
inline Tensor values_by_row(const Tensor& t, const Tensor& y, int64_t channel) {
  const RowGroups& rows = *mixed_rows();
  std::vector<Tensor> values;
  for (const auto& group : rows.groups) {
    const GroupScope scope(group);
    values.push_back(plain(t));
  }
  return RowSplit(rows, y, y.dim() - channel)
      .spread(at::stack(values), y.dim(), channel);
}

/// Applies the output transforms that sit on `t`, the bias of a layer or the
/// weight of one without, to the layer's result.
inline Tensor apply_outputs(const Tensor& t, Tensor y) {
  const auto* meta = tag_of(t);
  if (meta == nullptr || !meta->site->has_output()) {
    return y;
  }
  const std::shared_ptr<Site> site = meta->site;
  const Participants active =
      participants(*site, root_of(t, *meta), /*outputs=*/true);
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
  return for_each_group(
      active, y, [](const ActiveEntries& entries, Tensor result) {
        for (const auto& entry : entries) {
          result = entry.delta->output(result, entry.scale);
        }
        return result;
      });
}

/// The same for a layer with this weight and, maybe, bias.
inline Tensor apply_outputs(
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    Tensor y) {
  y = apply_outputs(weight, std::move(y));
  return bias ? apply_outputs(*bias, std::move(y)) : y;
}

} // namespace detail

} // namespace peft
