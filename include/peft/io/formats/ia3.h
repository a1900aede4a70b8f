#pragma once

// (IA)³ as HF PEFT's IA3Config and file have it.

#include <peft/io/formats/format.h>
#include <peft/methods/ia3.h>

#include <any>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

class Ia3Format final : public AdapterFormat {
 public:
  std::string type() const override {
    return "IA3";
  }

  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    Ia3Options o;
    o.targets(targets_field(config, "target_modules"));
    // Without the field nothing is scaled by its input.
    o.feedforward(
        config.has("feedforward_modules") &&
                !config.is_empty("feedforward_modules")
            ? targets_field(config, "feedforward_modules")
            : Targets::regex("(?!)"));
    if (config.has("exclude_modules") && !config.is_empty("exclude_modules")) {
      o.exclude(targets_field(config, "exclude_modules"));
    }
    o.fan_in_fan_out(config.get<bool>("fan_in_fan_out", false));
    o.init_ia3_weights(config.get<bool>("init_ia3_weights", true));
    o.modules_to_save(
        config.get<std::vector<std::string>>("modules_to_save", {}));
    Ia3Options here = o;
    here.modules_to_save(modules_in(network, o.modules_to_save()));
    Plan result = detail::plan(here, network);
    result.options = std::move(o);
    return result;
  }

  AdapterConfig new_config() const override {
    return AdapterConfig::parse(R"({
      "auto_mapping": null,
      "base_model_name_or_path": null,
      "exclude_modules": null,
      "fan_in_fan_out": false,
      "feedforward_modules": [],
      "inference_mode": false,
      "init_ia3_weights": true,
      "modules_to_save": null,
      "peft_type": "IA3",
      "peft_version": "0.21.2",
      "revision": null,
      "target_modules": null,
      "task_type": null
    })");
  }

  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    const auto& o = std::any_cast<const Ia3Options&>(adapter.options);
    // Roles and predicates are no words of HF's: the layers stand by name.
    std::vector<std::string> targets, feedforward;
    bool transposed = o.fan_in_fan_out();
    for (const auto& site : adapter.sites) {
      const auto* delta = dynamic_cast<const Ia3Delta*>(site.delta.get());
      if (delta != nullptr) {
        targets.push_back(site.name);
        transposed = transposed || delta->is_transposed();
        if (delta->is_feedforward()) {
          feedforward.push_back(site.name);
        }
      }
    }
    const auto write_field = [&](const char* field,
                                 const Targets& chosen,
                                 const std::vector<std::string>& names) {
      const bool in_words = chosen.kind() == Targets::Kind::list ||
          (chosen.kind() == Targets::Kind::regex && !names.empty());
      if (in_words) {
        write_targets(config, field, chosen);
      } else {
        config.set(field, names);
      }
    };
    write_field("target_modules", o.targets(), targets);
    write_field("feedforward_modules", o.feedforward(), feedforward);
    if (!o.exclude().empty()) {
      write_targets(config, "exclude_modules", o.exclude());
    }
    if (adapter.loaded_config.empty()) {
      config.set("fan_in_fan_out", transposed);
    }
    config.set("init_ia3_weights", o.init_ia3_weights());
    if (!o.modules_to_save().empty()) {
      config.set("modules_to_save", o.modules_to_save());
    }
  }
};

} // namespace detail

} // namespace peft
