#pragma once

#include <peft/core/attach.h>
#include <peft/core/call_site.h>

#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

inline Tensor parameter_at(
    const std::vector<std::pair<std::string, Tensor>>& parameters,
    const std::string& name) {
  for (const auto& item : parameters) {
    if (item.first == name) {
      return item.second;
    }
  }
  return {};
}

/// The module at `path` below `root`.
inline torch::nn::Module* module_at(
    torch::nn::Module& root,
    const std::string& path) {
  torch::nn::Module* found = nullptr;
  walk(root, "", [&](const std::string& name, torch::nn::Module& m) {
    if (name == path) {
      found = &m;
    }
  });
  TORCH_CHECK(
      found != nullptr,
      "peft: the clone has no module '",
      path,
      "', which carries an adapter in the original");
  return found;
}

/// A plan that puts an independent copy of `state` on `network`, a copy of its
/// own.
inline Plan plan_copy_of(const AdapterState& state, const Network& network) {
  TORCH_CHECK(
      !state.merged,
      "peft: adapter '",
      state.name,
      "' is merged; unmerge() it before cloning, or make it permanent with "
      "peft::merge(model)");
  Plan plan;
  plan.method = state.method;
  plan.options = state.options;
  for (const auto& record : state.sites) {
    PlannedSite site;
    site.name = record.name;
    site.parameter = record.parameters.front();
    site.file_prefix = record.file_prefix;
    site.part = record.part;
    site.delta = record.delta->decorated_copy();
    for (const auto& layer : network) {
      if (record.is_call_site && layer.name == site.parameter) {
        const auto* call = dynamic_cast<const CallSite*>(layer.module);
        site.call_site = call != nullptr ? call->site() : nullptr;
      }
      for (const auto& p : layer.parameters) {
        if (layer.path(p.first) == site.parameter) {
          site.tensor = p.second;
        }
      }
    }
    TORCH_CHECK(
        site.tensor.defined() || site.call_site,
        "peft: the clone has no '",
        site.parameter,
        "', which carries an adapter in the original");
    const Tensor like =
        site.tensor.defined() ? site.tensor : any_parameter(network);
    site.delta->to(like.device());
    plan.sites.push_back(std::move(site));
  }
  const auto copy_of = [&](const Delta* original) -> std::shared_ptr<Delta> {
    for (size_t i = 0; i < state.sites.size(); ++i) {
      if (state.sites[i].delta.get() == original) {
        return plan.sites[i].delta;
      }
    }
    return nullptr;
  };
  for (auto& site : plan.sites) {
    site.delta->relink(copy_of);
  }
  return plan;
}

/// The switches that are no part of a plan.
inline void copy_switches(const AdapterState& from, AdapterState& to) {
  to.enabled = from.enabled.load();
  to.scale = from.scale.load();
  to.loaded_config = from.loaded_config;
}

/// Puts independent copies of the adapters in `from` on `to`.
inline void copy_adapters(const Registry& from, torch::nn::Module& to) {
  for (const auto& state : from.adapters) {
    Plan plan = plan_copy_of(*state, describe_network(to));
    Adapter copy = commit(to, state->name, std::move(plan));
    copy_switches(*state, *copy.shared_state());
  }
}

} // namespace detail

/// A deep copy with independent adapters. Unlike Module::clone it works on a
/// model that carries adapters, and it keeps every requires_grad and the mode.
/// The model must be Cloneable, as for Module::clone. (Module::clone itself
/// throws on a model with adapters, save for the containers, Sequential and its
/// like, which copy only their list: their clone is plain, holds the effective
/// weights and trains whole.)
template <class M>
auto clone(
    const M& model,
    const std::optional<torch::Device>& device = std::nullopt) {
  if constexpr (!std::is_base_of_v<torch::nn::Module, M>) {
    return M(clone(*model, device)); // a holder
  } else {
    auto& original = const_cast<M&>(model); // put back as it was
    std::vector<std::pair<std::string, std::shared_ptr<detail::Registry>>>
        registries;
    detail::walk(
        original, "", [&](const std::string& name, torch::nn::Module& m) {
          if (auto registry = detail::registry_of(m)) {
            registries.emplace_back(name, std::move(registry));
          }
        });
    auto copy = detail::without_adapters(original, [&] {
      detail::RawBaseScope raw;
      return std::dynamic_pointer_cast<M>(original.clone(device));
    });
    TORCH_CHECK(copy, "peft: clone() of this module returned another type");

    const auto theirs = detail::base_parameters(*copy);
    const auto states = detail::states_below(original);
    for (const auto& [name, tensor] : detail::base_parameters(original)) {
      Tensor twin = detail::parameter_at(theirs, name);
      if (twin.defined() && twin.is_floating_point()) {
        twin.set_requires_grad( // attach freezes it again
            detail::required_before(states, tensor)
                .value_or(tensor.requires_grad()));
      }
    }
    // Containers come out of LibTorch's clone in training mode.
    detail::walk(
        original, "", [&](const std::string& name, torch::nn::Module& m) {
          detail::walk(
              *copy, "", [&](const std::string& path, torch::nn::Module& twin) {
                if (path == name) {
                  twin.train(m.is_training());
                }
              });
        });
    for (const auto& [path, registry] : registries) {
      detail::copy_adapters(*registry, *detail::module_at(*copy, path));
    }
    for (const auto& [name, tensor] : detail::base_parameters(original)) {
      Tensor twin = detail::parameter_at(theirs, name);
      if (twin.defined() && twin.is_floating_point() && twin.is_leaf()) {
        twin.set_requires_grad(tensor.requires_grad());
      }
    }
    return copy;
  }
}

} // namespace peft
