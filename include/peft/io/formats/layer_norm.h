#pragma once

// LayerNorm tuning as HF PEFT's LNTuningConfig and file have it.

#include <peft/io/formats/format.h>
#include <peft/methods/layer_norm_tuning.h>

#include <any>
#include <string>
#include <vector>

namespace peft {

namespace detail {

class LayerNormFormat final : public AdapterFormat {
 public:
  std::string type() const override {
    return "LN_TUNING";
  }

  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    LayerNormOptions o;
    if (config.has("target_modules") && !config.is_empty("target_modules")) {
      o.targets(targets_field(config, "target_modules"));
    }
    if (config.has("exclude_modules") && !config.is_empty("exclude_modules")) {
      o.exclude(targets_field(config, "exclude_modules"));
    }
    o.modules_to_save(
        config.get<std::vector<std::string>>("modules_to_save", {}));
    LayerNormOptions here = o;
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
      "inference_mode": false,
      "modules_to_save": null,
      "peft_type": "LN_TUNING",
      "peft_version": "0.21.2",
      "revision": null,
      "target_modules": null,
      "task_type": null
    })");
  }

  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    const auto& o = std::any_cast<const LayerNormOptions&>(adapter.options);
    // Types and predicates are no words of HF's: the norms stand by name.
    const bool in_words = o.targets().kind() == Targets::Kind::regex ||
        o.targets().kind() == Targets::Kind::list;
    if (in_words) {
      write_targets(config, "target_modules", o.targets());
    } else {
      std::vector<std::string> names;
      for (const auto& site : adapter.sites) {
        const auto& prefix = site.file_prefix;
        const bool is_norm = ends_with(prefix, kLayerNormFileName);
        const auto name = is_norm && prefix != kLayerNormFileName
            ? prefix.substr(0, prefix.rfind('.'))
            : std::string();
        if (is_norm && (names.empty() || names.back() != name)) {
          names.push_back(name);
        }
      }
      config.set("target_modules", names);
    }
    if (!o.exclude().empty() && in_words) {
      write_targets(config, "exclude_modules", o.exclude());
    }
    if (!o.modules_to_save().empty()) {
      config.set("modules_to_save", o.modules_to_save());
    }
  }
};

} // namespace detail

} // namespace peft
