#pragma once

#include <peft/io/formats/format.h>
#include <peft/methods/bitfit.h>

#include <any>
#include <string>
#include <vector>

namespace peft {

namespace detail {

/// BitFit is no method of HF's; its files have the same form.
class BitFitFormat final : public AdapterFormat {
 public:
  std::string type() const override {
    return "BITFIT";
  }

  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    BitFitOptions o(config.get<std::vector<std::string>>("biases", {"all"}));
    if (config.has("target_modules")) {
      o.targets(targets_field(config, "target_modules"));
    }
    o.modules_to_save(
        config.get<std::vector<std::string>>("modules_to_save", {}));
    return detail::plan(o, network);
  }

  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    const auto& o = std::any_cast<const BitFitOptions&>(adapter.options);
    config.set("biases", o.biases());
    write_targets(config, "target_modules", o.targets());
    config.set("modules_to_save", o.modules_to_save());
  }
};

} // namespace detail

} // namespace peft
