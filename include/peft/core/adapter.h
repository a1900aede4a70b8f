#pragma once

#include <peft/core/adapted_weight.h>
#include <peft/core/network.h>

#include <torch/nn/module.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// One place where an adapter acts.
struct AdapterSite {
  std::string name; // module name, or parameter name
  std::vector<std::string> parameters; // every path of the adapted tensor
  std::string what; // "lora r=8"
  std::vector<int64_t> shape; // of the adapted tensor
  int64_t num_parameters = 0; // trained here
};

namespace detail {

inline Tensor lock_tensor(
    const c10::weak_intrusive_ptr<c10::TensorImpl>& weak) {
  auto impl = weak.lock();
  return impl ? Tensor(std::move(impl)) : Tensor();
}

/// The site's tensor; an error once the model is gone.
inline Tensor tensor_of(const Site& site) {
  for (const auto& ref : site.tensors) {
    Tensor t = ref.lock();
    if (t.defined()) {
      return t;
    }
  }
  TORCH_CHECK(false, "peft: the model behind this adapter no longer exists");
  return {};
}

inline std::shared_ptr<Site> lock_site(const SiteRecord& record) {
  auto site = record.site.lock();
  TORCH_CHECK(site, "peft: the model behind this adapter no longer exists");
  return site;
}

/// Calls f with the bare base to write into, whatever mode the caller or the
/// model is in.
template <class F>
void with_base(const Tensor& weight, F&& f) {
  c10::InferenceMode mode(weight.is_inference());
  torch::NoGradGuard no_grad; // after the mode, which switches it
  NoTagGuard guard(kAdaptedKey);
  f(base_of(weight));
}

inline void write_base(const Tensor& weight, const Tensor& value) {
  with_base(weight, [&](const Tensor& own) { own.copy_(value.detach()); });
}

/// A copy of the bare base that shares nothing with it.
inline Tensor copy_of_base(const Tensor& weight) {
  torch::NoGradGuard no_grad;
  return base_of(weight).clone();
}

/// `value` is what is to be written; where `before` was not finite it may be
/// neither.
inline void check_finite(
    const Tensor& value,
    const std::string& name,
    const Tensor& before = {}) {
  const Tensor finite = at::isfinite(value);
  TORCH_CHECK(
      finite.all().item<bool>() ||
          (before.defined() &&
           at::logical_or(finite, at::isfinite(before).logical_not())
               .all()
               .item<bool>()),
      "peft: merging into '",
      name,
      "' would write values that are not finite; nothing was changed. Check "
      "the adapter for NaN and the base's dtype for overflow");
}

} // namespace detail

/// A handle on one named adapter of one model; cheap to copy. The adapter lives
/// with the model, not with the handle.
///
/// enable, disable, set_scale and reading are safe while other threads run the
/// model; merge, unmerge and detach need the model for themselves.
class Adapter {
 public:
  Adapter() = default;
  explicit Adapter(std::shared_ptr<detail::AdapterState> state)
      : state_(std::move(state)) {}

  const std::string& name() const {
    return state().name;
  }
  /// HF's peft_type: "LORA", "BITFIT".
  const std::string& method() const {
    return state().method;
  }

  /// The tensors that this adapter trains, each once.
  std::vector<Tensor> parameters() const {
    std::vector<Tensor> result;
    for (const auto& site : state().sites) {
      for (const auto& p : site.delta->parameters()) {
        result.push_back(p);
      }
    }
    return result;
  }

  /// The same by the names they have in a file, without its prefix
  /// ("encoder.query.lora_A.weight").
  torch::OrderedDict<std::string, Tensor> named_parameters() const {
    torch::OrderedDict<std::string, Tensor> result;
    for (const auto& site : state().sites) {
      const auto own = site.delta->parameters();
      const auto is_own = [&](const Tensor& t) {
        return std::any_of(own.begin(), own.end(), [&](const Tensor& p) {
          return p.is_same(t);
        });
      };
      for (const auto& items :
           {site.delta->all_file_tensors(),
            site.delta->all_training_tensors()}) {
        for (const auto& item : items) {
          if (is_own(item.second)) { // not what is made of them
            result.insert(
                site.file_prefix.empty() ? item.first
                                         : site.file_prefix + "." + item.first,
                item.second);
          }
        }
      }
    }
    return result;
  }

  int64_t num_parameters() const {
    int64_t count = 0;
    for (const auto& site : state().sites) {
      count += site.delta->num_trained();
    }
    return count;
  }

  std::vector<AdapterSite> sites() const {
    std::vector<AdapterSite> result;
    for (const auto& record : state().sites) {
      AdapterSite site;
      site.name = record.name;
      site.parameters = record.parameters;
      site.what = record.delta->describe();
      site.shape = detail::lock_site(record)->sizes;
      site.num_parameters = record.delta->num_trained();
      result.push_back(std::move(site));
    }
    return result;
  }

  /// Takes part in every forward again. Other adapters are not touched.
  void enable() {
    state().enabled = true;
  }
  /// Takes no part, for all threads: the network is the base again (with the
  /// other enabled adapters), bit for bit.
  void disable() {
    TORCH_CHECK(
        !state().merged,
        "peft: adapter '",
        name(),
        "' is merged into the base and cannot be disabled; unmerge() first");
    state().enabled = false;
  }
  bool is_enabled() const {
    return state().enabled;
  }

  /// A factor on the whole adapter: 1 is as trained, 0 the base. (Virtual
  /// tokens of zero still take attention: for prompts and prefixes 0 is not the
  /// base.)
  void set_scale(double scale) {
    TORCH_CHECK(
        std::isfinite(scale), "peft: the scale must be finite, got ", scale);
    TORCH_CHECK(
        !state().merged,
        "peft: adapter '",
        name(),
        "' is merged; unmerge() before changing its scale");
    state().scale = scale;
  }
  double scale() const {
    return state().scale;
  }

  /// Trains (true) or freezes (false) the adapter's own parameters.
  void set_trainable(bool trainable) {
    for (auto& p : parameters()) {
      p.set_requires_grad(trainable);
    }
  }
  /// Training or evaluation mode of the adapter alone (its dropout); the
  /// model's train() and eval() reach it too, where the model is a
  /// torch::nn::Module.
  void train(bool on = true) {
    for (const auto& site : state().sites) {
      site.delta->train(on);
    }
  }
  void eval() {
    train(false);
  }

  /// Moves the adapter's own tensors. A torch::nn model's to() does it too; a
  /// TorchScript module's does not.
  void to(const torch::Device& device) {
    for (const auto& site : state().sites) {
      site.delta->to(device);
    }
  }

  /// Folds the adapter into the base and keeps the old base, so that unmerge
  /// restores it bit for bit. An adapter that would make a finite number
  /// infinite or NaN is refused with nothing changed; what the base itself has
  /// of them stays. An adapter that is already merged is an error.
  void merge();
  void unmerge();
  bool is_merged() const {
    return state().merged;
  }

  /// Takes the adapter off the model for good. When the last one goes, the
  /// model is the plain module it was, requires_grad included.
  void detach();

  /// For methods and files: what stands behind the handle.
  const std::shared_ptr<detail::AdapterState>& shared_state() const {
    return state_;
  }

 private:
  detail::AdapterState& state() const {
    TORCH_CHECK(state_, "peft: this Adapter handle is empty");
    TORCH_CHECK(
        !state_->gone,
        "peft: adapter '",
        state_->name,
        "' was detached from its model");
    return *state_;
  }

  std::shared_ptr<detail::AdapterState> state_;
};

/// All adapters on `model` and below it, in the order they were attached.
inline std::vector<Adapter> adapters(const torch::nn::Module& model) {
  std::vector<Adapter> result;
  for (const auto& registry : detail::registries_below(model)) {
    for (const auto& state : registry->adapters) {
      result.emplace_back(state);
    }
  }
  return result;
}

namespace detail {

inline Adapter find_adapter(
    const std::vector<Adapter>& adapters,
    const std::string& name) {
  std::string names;
  for (const auto& adapter : adapters) {
    if (adapter.name() == name) {
      return adapter;
    }
    names += (names.empty() ? "'" : ", '") + adapter.name() + "'";
  }
  TORCH_CHECK(
      false,
      "peft: the model has no adapter '",
      name,
      "'; it has ",
      names.empty() ? "none" : names);
  return Adapter();
}

} // namespace detail

/// The adapter of that name; an error that lists the names there are.
inline Adapter get_adapter(
    const torch::nn::Module& model,
    const std::string& name = "default") {
  return detail::find_adapter(adapters(model), name);
}

} // namespace peft
