#pragma once

// Several adapters on one model, by name:
//
//   peft::set_adapter(*model, {"german", "legal"});  // these two, added up
//   peft::active_adapters(*model);                   // {"german", "legal"}
//   peft::rename_adapter(*model, "legal", "law");
//   peft::delete_adapter(*model, "german");
//
// The rules are those of HF PEFT's set_adapter: the adapters that are named act
// and train, all others neither act nor train. Three things differ.
// - attach and load make an adapter active at once; in PEFT a second one waits
//   for set_adapter. Networks here have no "active adapter" to protect: who
//   attaches, wants it.
// - A merged adapter that would have to stop is an error; PEFT unmerges it.
// - Deleting an active adapter activates no other one in its place.
//
// All of it needs the model for itself. While threads run the model, each
// chooses with ActiveAdapters and BatchAdapters (core/active.h).

#include <peft/core/attach.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// One name, or several: "a", {"a", "b"}, a vector.
class AdapterNames {
 public:
  AdapterNames(const char* name) : names_{name} {}
  AdapterNames(std::string name) : names_{std::move(name)} {}
  AdapterNames(std::initializer_list<std::string> names) : names_(names) {}
  AdapterNames(std::vector<std::string> names) : names_(std::move(names)) {}

  bool contains(const std::string& name) const {
    return std::find(names_.begin(), names_.end(), name) != names_.end();
  }
  const std::vector<std::string>& names() const {
    return names_;
  }

 private:
  std::vector<std::string> names_;
};

namespace detail {

using Adapters = std::vector<Adapter>;

inline void set_adapter(
    const Adapters& all,
    const AdapterNames& names,
    bool inference_mode) {
  for (const auto& name : names.names()) {
    find_adapter(all, name);
  }
  for (const auto& adapter : all) {
    TORCH_CHECK(
        names.contains(adapter.name()) || !adapter.is_merged(),
        "peft: adapter '",
        adapter.name(),
        "' is merged into the base and would have to stop acting; unmerge() it "
        "first, or name it too");
  }
  for (Adapter adapter : all) {
    const bool active = names.contains(adapter.name());
    adapter.set_trainable(active && !inference_mode);
    active ? adapter.enable() : adapter.disable();
  }
}

inline std::vector<std::string> active_adapters(const Adapters& all) {
  std::vector<std::string> names;
  for (const auto& adapter : all) {
    if (adapter.is_enabled()) {
      names.push_back(adapter.name());
    }
  }
  return names;
}

inline void delete_adapter(const Adapters& all, const std::string& name) {
  const Adapter adapter = find_adapter(all, name);
  TORCH_CHECK(
      !adapter.is_merged(),
      "peft: adapter '",
      name,
      "' is merged into the base and cannot be deleted; unmerge() it first, or "
      "keep it for good with peft::merge(model)");
  detach_adapter(adapter.shared_state());
  adapter.shared_state()->sites.clear(); // handles that are left keep nothing
}

inline void rename_adapter(
    const Adapters& all,
    const std::string& old_name,
    const std::string& new_name) {
  const auto state = find_adapter(all, old_name).shared_state();
  if (old_name == new_name) {
    return;
  }
  check_adapter_name(new_name);
  States others;
  for (const auto& adapter : all) {
    others.push_back(adapter.shared_state());
  }
  for (const auto& record : state->sites) { // adapters of modules around
    for (const auto& entry : lock_site(record)->entries) {
      others.push_back(entry.adapter);
    }
  }
  for (const auto& other : others) {
    TORCH_CHECK(
        other->name != new_name,
        "peft: the model already has an adapter named '",
        new_name,
        "'; delete it or choose another name");
  }
  if (auto registry = state->registry.lock()) { // none under TorchScript
    const auto children = registry->named_children();
    for (const auto& child : children) { // all, so that their order stays
      registry->unregister_module(child.key());
    }
    for (const auto& child : children) {
      registry->register_module(
          child.key() == old_name ? new_name : child.key(), child.value());
    }
  }
  state->name = new_name;
}

} // namespace detail

/// These adapters act, added up, and train; all others neither act nor train.
/// With `inference_mode` none trains. No names: the base. An unknown name is an
/// error and changes nothing. Every parameter of an adapter that trains gets
/// requires_grad, also one that was frozen by hand.
inline void set_adapter(
    torch::nn::Module& model,
    const AdapterNames& names,
    bool inference_mode = false) {
  detail::set_adapter(adapters(model), names, inference_mode);
}

/// The adapters that act where no scope chooses others, in the order they were
/// attached.
inline std::vector<std::string> active_adapters(
    const torch::nn::Module& model) {
  return detail::active_adapters(adapters(model));
}

/// Takes the adapter off the model and frees its tensors, even where handles
/// to it are left; they become errors. The others stay as they are. A merged
/// adapter is refused.
inline void delete_adapter(torch::nn::Module& model, const std::string& name) {
  detail::delete_adapter(adapters(model), name);
}

/// Gives an adapter another name: in the model's parameters, in scopes and in
/// the folders that save_adapters writes. Its tensors, their order, and handles
/// stay.
inline void rename_adapter(
    torch::nn::Module& model,
    const std::string& old_name,
    const std::string& new_name) {
  detail::rename_adapter(adapters(model), old_name, new_name);
}

} // namespace peft
