#pragma once

#include <peft/core/attach.h>
#include <peft/core/trained_copy.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// A trained copy of the parameter `key` of `layer`, under its own name.
inline PlannedSite plan_copy(const Layer& layer, const std::string& key) {
  const Tensor tensor = layer.parameter(key);
  return {
      layer.path(key),
      layer.path(key),
      layer.name,
      tensor,
      std::make_shared<TrainedCopy>(base(tensor), key)};
}

/// modules_to_save: every parameter of the named modules as a trained copy.
inline void plan_modules_to_save(
    const Network& network,
    const std::vector<std::string>& modules,
    std::vector<PlannedSite>& sites) {
  for (const auto& wanted : modules) {
    bool found = false;
    for (const auto& layer : network) {
      if (!is_inside(layer.name, {wanted})) {
        continue;
      }
      for (const auto& p : layer.parameters) {
        if (p.second.defined() && p.second.is_floating_point()) {
          found = true;
          const std::string path = layer.path(p.first);
          const bool planned =
              std::any_of(sites.begin(), sites.end(), [&](const auto& site) {
                return site.parameter == path && site.delta->replaces_base();
              });
          if (!planned) { // named by two entries
            sites.push_back(plan_copy(layer, p.first));
          }
        }
      }
    }
    TORCH_CHECK(
        found,
        "peft: modules_to_save entry '",
        wanted,
        "' matches no module with parameters.",
        near_misses(network, wanted));
  }
}

} // namespace detail

} // namespace peft
