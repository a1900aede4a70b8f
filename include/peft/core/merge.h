#pragma once

#include <peft/core/attach.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// The base after folding `adapter`'s deltas at this site into `weight`.
inline Tensor
fold(const Site& site, const AdapterState& adapter, const Tensor& weight) {
  torch::NoGradGuard no_grad;
  auto dtype = weight.scalar_type();
  for (const auto& entry : site.entries) {
    if (entry.adapter.get() == &adapter) {
      dtype = c10::promoteTypes(dtype, entry.delta->dtype().value_or(dtype));
    }
  }
  Tensor value = weight.to(dtype);
  for (const auto& entry : site.entries) {
    if (entry.adapter.get() == &adapter) {
      value = entry.delta->effective(value, adapter.scale);
    }
  }
  return value.to(weight.scalar_type()); // one rounding
}

inline void check_mergeable(const AdapterState& adapter) {
  for (const auto& record : adapter.sites) {
    std::string obstacle = record.delta->merge_obstacle();
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

  // Everything is computed and checked at a site before it is written; should
  // a later site fail, the earlier ones get their base back.
  std::vector<std::pair<std::shared_ptr<Site>, Tensor>> done;
  try {
    for (const auto& [name, site] : sites) {
      const Tensor weight = tensor_of(*site);
      const Tensor before = copy_of_base(weight);
      const Tensor value = fold(*site, adapter, before);
      check_finite(value, name);
      done.emplace_back(site, before);
      write_base(weight, value);
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
    Tensor value = site->original.to(weight.device(), weight.scalar_type());
    for (const AdapterState* other : order) {
      value = fold(*site, *other, value);
    }
    write_base(weight, value);
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

  auto folded = [](const Site& site) {
    torch::NoGradGuard no_grad;
    NoTagGuard guard(kAdaptedKey);
    return apply_deltas(site, base_of(tensor_of(site)));
  };
  // A dry run first: folding is cheap, a second copy of the network is not.
  for (const auto& [name, site] : sites) {
    check_finite(folded(*site), name);
  }
  for (const auto& [name, site] : sites) {
    write_base(tensor_of(*site), folded(*site));
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
/// base is let go. Disabled adapters are dropped without being folded. Results
/// that are not finite are refused before anything is written.
inline void merge(torch::nn::Module& model) {
  detail::merge_for_good(detail::states_below(model));
}

} // namespace peft
