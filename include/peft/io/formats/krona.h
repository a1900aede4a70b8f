#pragma once

// KronA in two files of HF PEFT's form; PEFT has no such method. The keys end
// in krona_A and krona_B.

#include <peft/io/formats/format.h>
#include <peft/methods/krona.h>

#include <algorithm>
#include <any>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

class KronaFormat final : public AdapterFormat {
 public:
  std::string type() const override {
    return "KRONA";
  }

  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    KronaOptions o;
    if (config.has("factor_shape")) {
      o.shape(config.get<std::vector<int64_t>>("factor_shape"));
    }
    if (config.has("factor_budget")) {
      o.budget(config.get<int64_t>("factor_budget"));
    }
    o.scaling(config.get<double>("scaling", 1));
    o.targets(targets_field(config, "target_modules"));
    if (config.has("exclude_modules") && !config.is_empty("exclude_modules")) {
      o.exclude(targets_field(config, "exclude_modules"));
    }
    o.projections(
        config.get<std::vector<std::string>>("projections", o.projections()));
    o.fan_in_fan_out(config.get<bool>("fan_in_fan_out", false));
    o.modules_to_save(
        config.get<std::vector<std::string>>("modules_to_save", {}));
    KronaOptions here = o;
    here.modules_to_save(modules_in(network, o.modules_to_save()));
    Plan result = detail::plan(here, network);
    result.options = std::move(o);
    return result;
  }

  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    const auto& o = std::any_cast<const KronaOptions&>(adapter.options);
    if (o.shape().empty()) {
      config.set("factor_shape", nullptr);
    } else {
      config.set("factor_shape", o.shape());
    }
    if (o.budget()) {
      config.set("factor_budget", *o.budget());
    }
    config.set_number("scaling", o.scaling());
    config.set("projections", o.projections());
    std::vector<std::string> names;
    bool transposed = o.fan_in_fan_out();
    for (const auto& site : adapter.sites) {
      const auto* delta = dynamic_cast<const KronaDelta*>(site.delta.get());
      if (delta != nullptr) {
        // q, k and v of an attention go by their parameter.
        const auto& parameter = site.parameters.front();
        const auto& name =
            parameter == file_key(site.name, "weight") ? site.name : parameter;
        if (std::find(names.begin(), names.end(), name) == names.end()) {
          names.push_back(name);
        }
        transposed = transposed || delta->is_transposed();
      }
    }
    if (o.targets().kind() == Targets::Kind::regex ||
        o.targets().kind() == Targets::Kind::list) {
      write_targets(config, "target_modules", o.targets());
    } else { // the layers stand by name
      config.set("target_modules", names);
    }
    if (!o.exclude().empty()) {
      write_targets(config, "exclude_modules", o.exclude());
    }
    config.set("fan_in_fan_out", transposed);
    if (!o.modules_to_save().empty()) {
      config.set("modules_to_save", o.modules_to_save());
    }
  }
};

} // namespace detail

} // namespace peft
