#pragma once

// Bottlenecks in linear layers as LLM-Adapters' code has them: peft_type
// "BOTTLENECK" and the fields of its BottleneckConfig, and below each layer's
// name "adapter_down.weight" and "adapter_up.weight". Its adapter_model.bin is
// read too.

#include <peft/io/formats/format.h>
#include <peft/methods/llm_adapters.h>

#include <any>
#include <string>
#include <variant>
#include <vector>

namespace peft {

namespace detail {

class LinearBottleneckFormat final : public AdapterFormat {
 public:
  std::string type() const override {
    return "BOTTLENECK";
  }

  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    LinearBottleneckOptions o(config.get<int64_t>("bottleneck_size", 256));
    o.non_linearity(
        config.get<std::string>("non_linearity", o.non_linearity()));
    o.adapter_dropout(config.get<double>("adapter_dropout", 0));
    const auto scaling =
        config.get<std::variant<double, std::string>>("scaling", 1.0);
    o.learned_scaling(std::holds_alternative<std::string>(scaling));
    if (const auto* number = std::get_if<double>(&scaling)) {
      o.scaling(*number);
    }
    o.use_parallel_adapter(config.get<bool>("use_parallel_adapter", false));
    o.use_adapterp(config.get<bool>("use_adapterp", false));
    o.init_weights(config.get<std::string>("init_weights", o.init_weights()));
    TORCH_CHECK(
        config.get<std::string>("bias", "none") == "none",
        "peft: this BOTTLENECK adapter trained biases too (bias is '",
        config.get<std::string>("bias", "none"),
        "' in ",
        kConfigFile,
        "), which its file does not hold");
    if (config.has("target_modules")) {
      o.targets(targets_field(config, "target_modules"));
    }
    o.modules_to_save(
        config.get<std::vector<std::string>>("modules_to_save", {}));
    return detail::plan(o, network);
  }

  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    const auto& o =
        std::any_cast<const LinearBottleneckOptions&>(adapter.options);
    config.set("bottleneck_size", o.bottleneck_size());
    config.set("non_linearity", o.non_linearity());
    config.set("adapter_dropout", o.adapter_dropout());
    if (o.learned_scaling()) {
      config.set("scaling", std::string("learned"));
    } else {
      config.set("scaling", o.scaling());
    }
    config.set("use_parallel_adapter", o.use_parallel_adapter());
    config.set("use_adapterp", o.use_adapterp());
    config.set("init_weights", o.init_weights());
    config.set("bias", std::string("none"));
    std::vector<std::string> names; // also where they were found by name
    for (const auto& site : adapter.sites) {
      if (dynamic_cast<const LinearBottleneckDelta*>(site.delta.get())) {
        names.push_back(site.name);
      }
    }
    config.set("target_modules", names);
    config.set("modules_to_save", o.modules_to_save());
  }
};

} // namespace detail

} // namespace peft
