#pragma once

#include <peft/core/adapter.h>
#include <peft/core/targets.h>

#include <algorithm>
#include <any>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <typeinfo>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// One delta that a method wants at one parameter, or at one call site.
struct PlannedSite {
  std::string name;
  std::string parameter; // full path below the root, or the call site's
  std::string file_prefix;
  Tensor tensor; // undefined at a call site
  std::shared_ptr<Delta> delta;
  std::shared_ptr<Site> call_site{};
  /// Which part of a union wants it ("gated.lora"); empty for a single method.
  std::string part{};
};

/// What a method wants to do to a network. Making one changes nothing.
struct Plan {
  std::string method;
  std::any options;
  std::vector<PlannedSite> sites;
};

inline void check_adapter_name(const std::string& name) {
  TORCH_CHECK(!name.empty(), "peft: the adapter's name must not be empty");
  TORCH_CHECK(
      name.find('.') == std::string::npos,
      "peft: the adapter's name must not contain a dot, got '",
      name,
      "'");
  TORCH_CHECK(
      name != "__base__",
      "peft: '__base__' stands for the base; choose another");
}

inline void check_adaptable(const Tensor& t, const std::string& name) {
  TORCH_CHECK(t.defined(), "peft: '", name, "' is not defined in this model");
  TORCH_CHECK(
      t.layout() == at::kStrided && !t.is_quantized() && !t.is_nested(),
      "peft: '",
      name,
      "' is sparse, nested or quantised; only dense tensors can be adapted");
  TORCH_CHECK(
      t.is_floating_point(),
      "peft: '",
      name,
      "' has dtype ",
      t.dtype(),
      "; only floating point weights can be adapted");
}

/// Whether two tensors are the same numbers: one tensor, or one storage seen
/// through the same window.
inline bool is_tied(const Tensor& a, const Tensor& b) {
  if (!a.defined() || !b.defined()) {
    return false;
  }
  if (a.is_same(b)) {
    return true;
  }
  return a.has_storage() && b.has_storage() && a.numel() > 0 &&
      a.is_alias_of(b) && a.storage_offset() == b.storage_offset() &&
      a.sizes() == b.sizes() && a.strides() == b.strides();
}

/// What tied tensors have in common, to find them by: where their memory
/// begins.
inline const void* start_of_memory(const Tensor& t) {
  return t.has_storage() ? t.storage().data() : t.unsafeGetTensorImpl();
}
template <class T>
using ByMemory = std::multimap<const void*, T>;

/// Registers `delta` below `root` at its parameter's path, so that its tensors
/// are named "peft.<adapter>.<parameter path>.lora_A". `known` is what has been
/// registered so, by path.
inline void register_at(
    torch::nn::Module& root,
    std::map<std::string, std::shared_ptr<torch::nn::Module>>& known,
    const std::string& path,
    const std::shared_ptr<Delta>& delta) {
  torch::nn::Module* node = &root;
  size_t begin = 0;
  for (size_t dot; (dot = path.find('.', begin)) != std::string::npos;
       begin = dot + 1) {
    auto& next = known[path.substr(0, dot)];
    if (!next) {
      next = node->register_module(
          path.substr(begin, dot - begin),
          std::make_shared<torch::nn::Module>());
    }
    node = next.get();
  }
  // A second delta of one adapter on one tensor stands beside the first.
  std::string key = path.substr(begin);
  const std::string head = key;
  for (int i = 2; !known.emplace(path.substr(0, begin) + key, delta).second;
       ++i) {
    key = head + "_" + std::to_string(i);
  }
  node->register_module(
      key, std::static_pointer_cast<torch::nn::Module>(delta));
}

/// A tied weight that was named twice is adapted once, under its first name.
inline void drop_tied(std::vector<PlannedSite>& sites) {
  std::vector<PlannedSite> kept;
  ByMemory<size_t> indices; // of those kept
  for (auto& site : sites) {
    const auto [begin, end] = indices.equal_range(start_of_memory(site.tensor));
    const bool repeats = std::any_of(begin, end, [&](const auto& item) {
      const PlannedSite& other = kept[item.second];
      const Delta& a = *other.delta;
      const Delta& b = *site.delta;
      return other.parameter != site.parameter && typeid(a) == typeid(b) &&
          is_tied(other.tensor, site.tensor);
    });
    if (!repeats) {
      indices.emplace(start_of_memory(site.tensor), kept.size());
      kept.push_back(std::move(site));
    }
  }
  sites = std::move(kept);
}

/// Takes the record of requires_grad of a tensor that gets a tag out of the
/// list.
inline bool take_record(AdapterState& state, const Tensor& t) {
  auto& list = *state.required_grad;
  for (auto item = list.begin(); item != list.end(); ++item) {
    if (item->first._unsafe_get_target() == t.unsafeGetTensorImpl()) {
      const bool required = item->second;
      list.erase(item);
      return required;
    }
  }
  return t.requires_grad();
}

/// Hangs `state` on the tensors of its plan. `all` are the model's parameters,
/// among which ties are found. Strong exception safety: checks come first.
inline void tag_sites(
    const std::shared_ptr<AdapterState>& state,
    const std::vector<PlannedSite>& planned,
    const NamedParameters& all) {
  for (const auto& plan : planned) {
    const Site* site = plan.call_site.get();
    if (site == nullptr) {
      check_adaptable(plan.tensor, plan.parameter);
      if (auto* meta = tag_of(plan.tensor)) {
        TORCH_CHECK(
            !meta->view && !meta->transposed,
            "peft: '",
            plan.parameter,
            "' is a view of an adapted weight; attach to the weight itself");
        site = meta->site.get();
      }
    }
    if (site == nullptr) {
      continue;
    }
    for (const auto& entry : site->entries) {
      TORCH_CHECK(
          entry.adapter->name != state->name,
          "peft: '",
          plan.parameter,
          "' already carries an adapter named '",
          state->name,
          "'; detach it or choose another name");
      TORCH_CHECK(
          !entry.adapter->merged,
          "peft: adapter '",
          entry.adapter->name,
          "' is merged at '",
          plan.parameter,
          "'; unmerge() it before attaching another");
    }
  }
  ensure_registered();
  ByMemory<const NamedParameters::value_type*> by_memory;
  for (const auto& item : all) {
    by_memory.emplace(start_of_memory(item.second), &item);
  }
  for (const auto& plan : planned) {
    SiteRecord record;
    record.name = plan.name;
    record.file_prefix = plan.file_prefix;
    record.delta = plan.delta;
    record.part = plan.part;
    if (plan.call_site) {
      record.parameters.push_back(plan.parameter);
      record.is_call_site = true;
      plan.call_site->entries.push_back({state, plan.delta});
      record.site = plan.call_site;
      state->sites.push_back(std::move(record));
      continue;
    }
    std::vector<Tensor> tied{plan.tensor};
    record.parameters.push_back(plan.parameter);
    const auto [begin, end] =
        by_memory.equal_range(start_of_memory(plan.tensor));
    for (auto item = begin; item != end; ++item) {
      const auto& [name, tensor] = *item->second;
      if (name != plan.parameter && is_tied(tensor, plan.tensor)) {
        record.parameters.push_back(name);
        tied.push_back(tensor);
      }
    }
    auto* meta = tag_of(plan.tensor);
    auto site = meta != nullptr ? meta->site : std::make_shared<Site>();
    if (meta == nullptr) {
      site->sizes = plan.tensor.sizes().vec();
    }
    site->entries.push_back({state, plan.delta});
    record.site = site;
    for (const Tensor& t : tied) {
      if (tag_of(t) == nullptr) {
        auto tag = first_tag(site, {0, t.dim() > 0 ? t.size(0) : 0});
        site->tensors.push_back(
            {t.unsafeGetTensorImpl(), tag->token, take_record(*state, t)});
        set_tag(t, std::move(tag));
      }
    }
    state->sites.push_back(std::move(record));
  }
}

/// Removes `state` from its sites; tensors without another adapter are plain,
/// unless they are packed as they now are (pack_frozen).
inline void untag_sites(const std::shared_ptr<AdapterState>& state) {
  for (const auto& record : state->sites) {
    auto site = record.site.lock();
    if (!site) {
      continue;
    }
    auto& entries = site->entries;
    entries.erase(
        std::remove_if(
            entries.begin(),
            entries.end(),
            [&](const Entry& entry) { return entry.adapter == state; }),
        entries.end());
    site->kept.drop(); // made with what goes, and may be it
    if (entries.empty()) {
      for (const auto& ref : site->tensors) {
        const Tensor t = ref.lock();
        if (t.defined()) {
          if (!site->packed || !site->packed->is_of(t)) {
            remove_tag(t);
          }
          state->required_grad->emplace_back(
              t.getIntrusivePtr(), ref.required_grad);
        }
      }
    }
  }
}

inline void detach_adapter(const std::shared_ptr<AdapterState>& state) {
  TORCH_CHECK(
      !state->merged,
      "peft: adapter '",
      state->name,
      "' is merged; unmerge() before detach(), or keep it for good with "
      "peft::merge(model)");
  untag_sites(state);
  state->gone = true;
  if (state->required_grad.use_count() == 1) { // the model's last adapter
    for (const auto& [weak, required] : *state->required_grad) {
      Tensor t = lock_tensor(weak);
      if (t.defined() && t.is_leaf() && !t.is_inference()) {
        t.set_requires_grad(required);
      }
    }
  }
  state->required_grad.reset();
  auto registry = std::dynamic_pointer_cast<Registry>(state->registry.lock());
  if (!registry) {
    return;
  }
  registry->unregister_module(state->name);
  auto& list = registry->adapters;
  list.erase(std::remove(list.begin(), list.end(), state), list.end());
  if (list.empty()) {
    registry->host->unregister_module(kRegistryName);
  }
}

/// Runs `f` while the adapters' children are hidden, so that LibTorch's clone
/// and load see the plain module; the tags stay.
template <class F>
auto without_adapters(torch::nn::Module& model, F&& f) {
  struct Hidden {
    std::vector<std::shared_ptr<Registry>> registries;
    ~Hidden() {
      for (auto& registry : registries) {
        registry->host->register_module(kRegistryName, registry);
      }
    }
  } hidden{registries_below(model)};
  for (auto& registry : hidden.registries) {
    registry->host->unregister_module(kRegistryName);
  }
  return f();
}

using States = std::vector<std::shared_ptr<AdapterState>>;

/// The adapters at or below `model`.
inline States states_below(torch::nn::Module& model) {
  States result;
  for (const auto& registry : registries_below(model)) {
    result.insert(
        result.end(), registry->adapters.begin(), registry->adapters.end());
  }
  return result;
}

/// requires_grad of `parameter` before the attaches of `states`, if they
/// recorded it.
inline std::optional<bool> required_before(
    const States& states,
    const Tensor& parameter) {
  if (const auto* meta = tag_of(parameter)) {
    for (const auto& ref : meta->site->tensors) {
      if (ref.impl == parameter.unsafeGetTensorImpl()) {
        return ref.required_grad;
      }
    }
  }
  for (const auto& state : states) {
    for (const auto& [weak, required] : *state->required_grad) {
      if (lock_tensor(weak).is_same(parameter)) {
        return required;
      }
    }
  }
  return std::nullopt;
}

inline void warn_of_ties(
    const AdapterState& state,
    const std::vector<PlannedSite>& wanted) {
  for (const auto& record : state.sites) {
    const bool all_named = std::all_of(
        record.parameters.begin(),
        record.parameters.end(),
        [&](const std::string& path) {
          return std::any_of(wanted.begin(), wanted.end(), [&](const auto& s) {
            return s.parameter == path;
          });
        });
    if (!all_named) {
      TORCH_WARN(
          "peft: '",
          record.parameters[0],
          "' is tied to '",
          record.parameters[1],
          "': both are adapted, as they are one tensor");
    }
  }
}

/// What attaching does to any kind of model: hangs a finished plan on the
/// tensors and freezes the network. `all` are the model's own parameters,
/// `present` its adapters. All of it, or nothing.
inline std::shared_ptr<AdapterState> hang(
    const std::string& name,
    Plan plan,
    const NamedParameters& all,
    States present) {
  check_adapter_name(name);
  TORCH_CHECK(
      !plan.sites.empty(), "peft: there is nothing to adapt in this model");
  for (const auto& item : all) { // adapters of a module around this one
    if (auto* meta = tag_of(item.second)) {
      for (const auto& entry : meta->site->entries) {
        present.push_back(entry.adapter);
      }
    }
  }
  for (const auto& other : present) {
    TORCH_CHECK(
        other->name != name,
        "peft: the model already has an adapter named '",
        name,
        "'; detach it or choose another name");
  }
  const std::vector<PlannedSite> wanted = plan.sites;
  drop_tied(plan.sites);

  auto state = std::make_shared<AdapterState>();
  state->name = name;
  state->method = plan.method;
  state->options = std::move(plan.options);
  state->required_grad = present.empty() ? std::make_shared<RequiredGrad>()
                                         : present.front()->required_grad;
  const size_t recorded = state->required_grad->size();
  for (const auto& item : all) {
    if (!required_before(present, item.second)) {
      state->required_grad->emplace_back(
          item.second.getIntrusivePtr(), item.second.requires_grad());
    }
  }
  try {
    tag_sites(state, plan.sites, all);
  } catch (...) {
    auto& list = *state->required_grad;
    list.erase(list.begin() + static_cast<int64_t>(recorded), list.end());
    throw;
  }
  for (const auto& item : all) {
    Tensor parameter = item.second;
    if (parameter.is_leaf() && parameter.requires_grad()) {
      parameter.set_requires_grad(false);
    }
  }
  for (const auto& record : state->sites) {
    if (record.is_call_site) {
      continue;
    }
    Tensor tensor = tensor_of(*lock_site(record));
    if (tensor.is_leaf() && tensor.requires_grad()) {
      tensor.set_requires_grad(false); // a member the register does not know
    }
  }
  warn_of_ties(*state, wanted);
  return state;
}

/// Puts a finished plan on `root` and registers the adapter's parameters below
/// it.
inline Adapter
commit(torch::nn::Module& root, const std::string& name, Plan plan) {
  auto registry = registry_of(root);
  TORCH_CHECK(
      registry || !root.named_children().contains(kRegistryName),
      "peft: the model has a child module named 'peft', where the adapters "
      "would go; rename it");
  auto node = std::make_shared<torch::nn::Module>("peft::" + plan.method);
  auto state = hang(
      name, std::move(plan), registered_parameters(root), states_below(root));
  std::map<std::string, std::shared_ptr<torch::nn::Module>> known;
  for (const auto& record : state->sites) {
    register_at(*node, known, record.parameters.front(), record.delta);
  }
  node->train(root.is_training());
  if (!registry) {
    registry = std::make_shared<Registry>(&root);
    root.register_module(kRegistryName, registry);
  }
  registry->register_module(name, node);
  registry->adapters.push_back(state);
  state->registry = registry;
  return Adapter(state);
}

} // namespace detail

inline void Adapter::detach() {
  state();
  detail::detach_adapter(state_);
}

} // namespace peft

#include <peft/core/merge.h> // an Adapter can merge wherever it can be attached
