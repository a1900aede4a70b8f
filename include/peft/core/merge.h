#pragma once

#include <peft/core/attach.h>
#include <peft/core/fold.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// Those of the site's entries that change its weight and whose adapter
/// `is_wanted`, lowest first.
template <class IsWanted>
ActiveEntries entries_of(const Site& site, IsWanted&& is_wanted) {
  ActiveEntries result;
  for (const auto& entry : site.entries) {
    if (!entry.delta->transforms_output() && is_wanted(*entry.adapter)) {
      result.push_back({entry.delta.get(), entry.adapter->scale});
    }
  }
  return result;
}

inline bool is_merged_at(const Site& site, const AdapterState& adapter) {
  const auto& order = site.merge_order;
  return std::find(order.begin(), order.end(), &adapter) != order.end();
}

/// The base as it was before the first merge, with the dtype and on the device
/// that it has now. What is merged on top starts from here too: sums that are
/// rounded at every merge would depend on the order.
inline Tensor unmerged_base(const Site& site, const Tensor& weight) {
  const Tensor now = base_of(weight);
  return site.original.defined()
      ? site.original.to(now.device(), now.scalar_type())
      : now;
}

/// Whether `entries`, to be folded into `base`, are one that can do so in the
/// base's own memory without an overflow.
inline bool folds_in_place(const ActiveEntries& entries, const Tensor& base) {
  return entries.size() == 1 &&
      entries.front().delta->fold_into(
          base, entries.front().scale, /*dry_run=*/true);
}

/// What `entries` make of `base`, or an undefined tensor where they fold in
/// place or there are none. Refuses what is not finite; writes nothing.
inline Tensor checked_value(
    const Site& site,
    const ActiveEntries& entries,
    const Tensor& base,
    const std::string& name) {
  TORCH_CHECK(
      base.sizes() == at::IntArrayRef(site.sizes),
      "peft: the adapted weight '",
      name,
      "' changed its shape from ",
      at::IntArrayRef(site.sizes),
      " to ",
      base.sizes(),
      " under its adapter; detach the adapter before changing the shape");
  if (entries.empty() || folds_in_place(entries, base)) {
    return {};
  }
  const Tensor value = folded(entries, base);
  check_finite(value, name, base);
  return value;
}

/// Writes what `entries` make of `base` into `weight`: `value`, or where that
/// is undefined what they fold in place.
inline void write_folded(
    const Tensor& weight,
    const ActiveEntries& entries,
    const Tensor& base,
    const Tensor& value) {
  if (value.defined()) {
    write_base(weight, value);
    return;
  }
  if (!base.is_alias_of(base_of(weight))) {
    write_base(weight, base);
  }
  with_base(weight, [&](const Tensor& memory) {
    for (const auto& entry : entries) {
      entry.delta->fold_into(memory, entry.scale, /*dry_run=*/false);
    }
  });
}

inline void check_mergeable(const AdapterState& adapter) {
  for (const auto& record : adapter.sites) {
    std::string obstacle = record.delta->decorated_merge_obstacle();
    if (obstacle.empty() && record.delta->transforms_output()) {
      obstacle = "it acts on the layer's output, not on its weight";
    }
    TORCH_CHECK(
        obstacle.empty(),
        "peft: adapter '",
        adapter.name,
        "' cannot be merged at '",
        record.name,
        "': ",
        obstacle);
  }
}

/// Deltas do not commute unless they are sums: folding one past another that
/// stays outside would change the result.
inline void check_merge_order(
    const Site& site,
    const AdapterState& adapter,
    const std::string& name) {
  bool own_additive = true;
  for (const auto& entry : site.entries) {
    if (entry.adapter.get() == &adapter) {
      own_additive = own_additive && entry.delta->is_additive();
    }
  }
  for (const auto& entry : site.entries) {
    const bool before = entry.adapter.get() != &adapter;
    if (!before) {
      break;
    }
    TORCH_CHECK(
        entry.adapter->merged || !entry.adapter->enabled ||
            (own_additive && entry.delta->is_additive()),
        "peft: at '",
        name,
        "' adapter '",
        adapter.name,
        "' acts after '",
        entry.adapter->name,
        "', and the two do not commute; merge '",
        entry.adapter->name,
        "' first, or disable it");
  }
}

/// The sites of an adapter, each with the name it is reported by, once.
inline std::vector<std::pair<std::string, std::shared_ptr<Site>>> unique_sites(
    const AdapterState& adapter) {
  std::vector<std::pair<std::string, std::shared_ptr<Site>>> result;
  for (const auto& record : adapter.sites) {
    auto site = lock_site(record);
    const bool known =
        std::any_of(result.begin(), result.end(), [&](const auto& item) {
          return item.second == site;
        });
    if (!known) {
      result.emplace_back(record.name, std::move(site));
    }
  }
  return result;
}

inline void merge_adapter(AdapterState& adapter) {
  TORCH_CHECK(
      !adapter.merged,
      "peft: adapter '",
      adapter.name,
      "' is already merged; unmerge() first");
  TORCH_CHECK(
      adapter.enabled,
      "peft: adapter '",
      adapter.name,
      "' is disabled; enable() it before merging");
  check_mergeable(adapter);
  const auto sites = unique_sites(adapter);
  for (const auto& [name, site] : sites) {
    check_merge_order(*site, adapter, name);
  }

  // Everything is checked at a site before it is written; should a later site
  // fail, the earlier ones get their base back.
  std::vector<std::pair<std::shared_ptr<Site>, Tensor>> done;
  try {
    for (const auto& [name, site] : sites) {
      const Tensor weight = tensor_of(*site);
      const Tensor base = unmerged_base(*site, weight);
      const auto entries =
          entries_of(*site, [&, at = site.get()](const AdapterState& other) {
            return &other == &adapter || is_merged_at(*at, other);
          });
      const Tensor value = checked_value(*site, entries, base, name);
      done.emplace_back(site, copy_of_base(weight));
      write_folded(weight, entries, base, value);
    }
  } catch (...) {
    for (const auto& [site, before] : done) {
      write_base(tensor_of(*site), before);
    }
    throw;
  }
  for (auto& [site, before] : done) {
    if (site->merge_order.empty()) {
      site->original = before;
    }
    site->merge_order.push_back(&adapter);
  }
  adapter.merged = true;
}

inline void unmerge_adapter(AdapterState& adapter) {
  TORCH_CHECK(
      adapter.merged,
      "peft: adapter '",
      adapter.name,
      "' is not merged; there is nothing to unmerge");
  for (const auto& [name, site] : unique_sites(adapter)) {
    const Tensor weight = tensor_of(*site);
    auto& order = site->merge_order;
    order.erase(std::remove(order.begin(), order.end(), &adapter), order.end());
    // Start over from the first base: subtracting would round.
    const auto entries =
        entries_of(*site, [&, at = site.get()](const AdapterState& other) {
          return is_merged_at(*at, other);
        });
    const Tensor base = unmerged_base(*site, weight);
    const bool in_place = entries.empty() || folds_in_place(entries, base);
    write_folded(
        weight, entries, base, in_place ? Tensor() : folded(entries, base));
    if (order.empty()) {
      site->original = Tensor();
    }
  }
  adapter.merged = false;
}

/// Folds the enabled ones of all adapters of a model for good.
inline void merge_for_good(const States& states) {
  TORCH_CHECK(
      !states.empty(), "peft: there is no adapter on this model to merge");
  TORCH_CHECK(
      active_info() == nullptr,
      "peft: merging folds the enabled adapters; leave the ActiveAdapters "
      "scope first");
  std::vector<std::pair<std::string, std::shared_ptr<Site>>> sites;
  for (const auto& state : states) {
    if (state->enabled && !state->merged) {
      check_mergeable(*state);
    }
    for (auto& item : unique_sites(*state)) {
      if (item.second->tensors.empty()) {
        continue; // a call site of a disabled adapter
      }
      for (const auto& entry : item.second->entries) {
        TORCH_CHECK(
            std::find(states.begin(), states.end(), entry.adapter) !=
                states.end(),
            "peft: adapter '",
            entry.adapter->name,
            "' was attached to a module around this one; merge that module");
      }
      const bool known =
          std::any_of(sites.begin(), sites.end(), [&](const auto& other) {
            return other.second == item.second;
          });
      if (!known) {
        sites.push_back(std::move(item));
      }
    }
  }

  // Everything is checked first, in a dry run where it takes one: folding is
  // cheap, a second copy of the network is not.
  const auto entries_at = [](const Site& site) {
    return entries_of(site, [&](const AdapterState& adapter) {
      return adapter.enabled || is_merged_at(site, adapter);
    });
  };
  std::vector<bool> in_place;
  for (const auto& [name, site] : sites) {
    const Tensor base = unmerged_base(*site, tensor_of(*site));
    in_place.push_back(
        !checked_value(*site, entries_at(*site), base, name).defined());
  }
  for (size_t i = 0; i < sites.size(); ++i) {
    const Site& site = *sites[i].second;
    const Tensor weight = tensor_of(site), base = unmerged_base(site, weight);
    const auto entries = entries_at(site);
    write_folded(
        weight, entries, base, in_place[i] ? Tensor() : folded(entries, base));
  }
  for (const auto& state : states) {
    state->merged = false; // folded for good: nothing to restore
    detach_adapter(state);
  }
}

} // namespace detail

inline void Adapter::merge() {
  detail::merge_adapter(state());
}

inline void Adapter::unmerge() {
  detail::unmerge_adapter(state());
}

/// Folds every enabled adapter of `model` into its weights and leaves a plain
/// torch::nn module: no tag, no extra child, the operators of the base. The old
/// base is let go. Disabled adapters are dropped without being folded. An
/// adapter that would make a finite number infinite or NaN is refused before
/// anything is written; what the base itself has of them stays.
inline void merge(torch::nn::Module& model) {
  detail::merge_for_good(detail::states_below(model));
}

} // namespace peft
