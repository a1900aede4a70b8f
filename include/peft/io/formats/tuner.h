#pragma once

// What the configs of HF PEFT's tuners have in common: which weights, which
// biases, which modules whole. LoRA and (IA)³, with their packed attention,
// have formats of their own.

#include <peft/io/formats/format.h>
#include <peft/methods/any_options.h>

#include <algorithm>
#include <any>
#include <map>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

template <class Value>
void write_pattern(
    AdapterConfig& config,
    const std::string& field,
    const std::vector<std::pair<std::string, double>>& pattern) {
  std::map<std::string, Value> values;
  for (const auto& item : pattern) {
    values.emplace(item.first, static_cast<Value>(item.second));
  }
  if constexpr (std::is_same_v<Value, double>) {
    config.set_numbers(field, values);
  } else {
    config.set(field, values);
  }
}

/// Those of layers_to_transform that have a target: PEFT's files may name more.
template <class Options>
std::vector<int64_t> layers_in(const Network& network, Options options) {
  const auto all = options.layers();
  std::vector<int64_t> result;
  for (const auto index : all) {
    options.layers({index});
    if (std::any_of(network.begin(), network.end(), [&](const Layer& layer) {
          return is_wanted(options, layer.name, layer);
        })) {
      result.push_back(index);
    }
  }
  return result.empty() ? all : result;
}

/// What one tuner adds to the fields that all share.
template <class Options, class D>
class TunerFormat : public AdapterFormat {
 public:
  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    Options o = empty_options();
    TORCH_CHECK(
        config.has("target_modules") && !config.is_empty("target_modules"),
        "peft: ",
        kConfigFile,
        " has no target_modules");
    o.targets(targets_field(config, "target_modules"));
    if (config.has("exclude_modules") && !config.is_empty("exclude_modules")) {
      o.exclude(targets_field(config, "exclude_modules"));
    }
    o.layers(indices_field(config, "layers_to_transform"));
    o.layers_pattern(names_field(config, "layers_pattern"));
    o.fan_in_fan_out(config.get<bool>("fan_in_fan_out", false));
    o.modules_to_save(
        config.get<std::vector<std::string>>("modules_to_save", {}));
    read_own(config, o);
    Options here = o;
    here.modules_to_save(modules_in(network, o.modules_to_save()));
    here.layers(layers_in(network, o));
    Plan result = make_plan(here, config, network);
    result.options = std::move(o);
    return result;
  }

  AdapterConfig new_config() const override {
    auto config = AdapterFormat::new_config();
    for (const char* field :
         {"auto_mapping",
          "base_model_name_or_path",
          "modules_to_save",
          "revision",
          "task_type"}) {
      config.set(field, nullptr);
    }
    config.set("peft_version", std::string("0.21.2"));
    return config;
  }

  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    const auto& o = std::any_cast<const Options&>(adapter.options);
    std::vector<std::string> modules;
    bool transposed = o.fan_in_fan_out();
    for (const auto& site : adapter.sites) {
      if (const auto* delta = dynamic_cast<const D*>(site.delta.get())) {
        modules.push_back(site.name);
        transposed = transposed || delta->is_transposed();
      }
    }
    const bool in_words = o.targets().kind() == Targets::Kind::regex ||
        names_modules(o.targets(), adapter);
    if (in_words && (o.exclude().empty() || has_exclude_modules())) {
      write_targets(config, "target_modules", o.targets());
    } else { // predicates are no words of HF's: the layers stand by name
      config.set("target_modules", modules);
    }
    if (has_exclude_modules()) {
      config.set("exclude_modules", nullptr);
      if (!o.exclude().empty()) {
        write_targets(config, "exclude_modules", o.exclude());
      }
    }
    if (adapter.loaded_config.empty()) { // PEFT has one index or name bare
      if (has_layers()) {
        config.set("layers_to_transform", nullptr)
            .set("layers_pattern", nullptr);
      }
      if (!o.layers().empty()) {
        config.set("layers_to_transform", o.layers());
      }
      if (!o.layers_pattern().empty()) {
        config.set("layers_pattern", o.layers_pattern());
      }
    }
    if (!o.modules_to_save().empty()) {
      config.set("modules_to_save", o.modules_to_save());
    }
    if (has_fan_in_fan_out() && adapter.loaded_config.empty()) {
      config.set("fan_in_fan_out", transposed);
    }
    write_own(o, config);
    write_state(adapter, config);
  }

 protected:
  virtual Options empty_options() const {
    if constexpr (std::is_default_constructible_v<Options>) {
      return Options();
    } else {
      return Options({});
    }
  }
  virtual Plan make_plan(
      const Options& o,
      const AdapterConfig& /*config*/,
      const Network& network) const {
    return plan_of(o, network); // of a method that is declared later
  }
  /// What the config tells of the trained tensors.
  virtual void write_state(
      const AdapterState& /*adapter*/,
      AdapterConfig& /*config*/) const {}
  virtual void read_own(const AdapterConfig& config, Options& o) const = 0;
  virtual void write_own(const Options& o, AdapterConfig& config) const = 0;
  virtual bool has_fan_in_fan_out() const {
    return true;
  }
  virtual bool has_exclude_modules() const {
    return true;
  }
  virtual bool has_layers() const {
    return true;
  }
};

} // namespace detail

} // namespace peft
