#pragma once

// AdaLoRA as HF PEFT's config and file have it.

#include <peft/io/formats/tuner.h>
#include <peft/methods/ada_lora.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

namespace peft {

namespace detail {

/// The ranks that are left at each weight stand in rank_pattern, as masks.
class AdaLoraFormat final : public TunerFormat<AdaLoraOptions, AdaLoraDelta> {
 public:
  std::string type() const override {
    return "ADALORA";
  }

 protected:
  Plan make_plan(
      const AdaLoraOptions& o,
      const AdapterConfig& config,
      const Network& network) const override {
    using Masks = std::map<std::string, std::vector<bool>>;
    const auto masks = config.get<Masks>("rank_pattern", {});
    const std::string end = ".lora_E";
    Ranks ranks;
    for (const auto& [key, mask] : masks) {
      const bool named = key.size() >= end.size() &&
          key.compare(key.size() - end.size(), end.size(), end) == 0;
      TORCH_CHECK(
          named,
          "peft: rank_pattern names '",
          key,
          "', which is no '<module>.lora_E'");
      ranks.emplace_back(
          key.substr(0, key.size() - end.size()),
          std::count(mask.begin(), mask.end(), true));
    }
    return detail::plan(o, network, ranks);
  }
  void read_own(const AdapterConfig& config, AdaLoraOptions& o) const override {
    o.total_step(config.get<int64_t>("total_step", 1));
    o.tinit(config.get<int64_t>("tinit", 0));
    o.tfinal(config.get<int64_t>("tfinal", 0));
    o.deltaT(config.get<int64_t>("deltaT", 1));
    o.init_r(config.get<int64_t>("init_r", 12));
    o.target_r(config.get<int64_t>("target_r", 8));
    o.alpha(config.get<double>("lora_alpha", 8));
    o.dropout(config.get<double>("lora_dropout", 0));
    o.beta1(config.get<double>("beta1", 0.85));
    o.beta2(config.get<double>("beta2", 0.85));
    o.orth_reg_weight(config.get<double>("orth_reg_weight", 0.5));
    o.init_weights(config.get<bool>("init_lora_weights", true));
    o.bias(config.get<std::string>("bias", "none"));
  }
  void write_own(const AdaLoraOptions& o, AdapterConfig& config)
      const override {
    config.set("total_step", o.total_step());
    config.set("tinit", o.tinit());
    config.set("tfinal", o.tfinal());
    config.set("deltaT", o.deltaT());
    config.set("init_r", o.init_r());
    config.set("target_r", o.target_r());
    config.set_number("lora_alpha", o.alpha());
    config.set("lora_dropout", o.dropout());
    config.set("beta1", o.beta1());
    config.set("beta2", o.beta2());
    config.set("orth_reg_weight", o.orth_reg_weight());
    config.set("init_lora_weights", o.init_weights());
    config.set("bias", o.bias());
  }
  void write_state(const AdapterState& adapter, AdapterConfig& config)
      const override {
    std::map<std::string, std::vector<bool>> masks;
    for (const auto& site : adapter.sites) {
      const auto* delta = dynamic_cast<const AdaLoraDelta*>(site.delta.get());
      if (delta != nullptr && delta->config().kept.defined()) {
        auto& mask = masks[site.file_prefix + ".lora_E"];
        const Tensor kept = delta->config().kept.cpu();
        for (int64_t i = 0; i < kept.numel(); ++i) {
          mask.push_back(kept[i].item<bool>());
        }
      }
    }
    if (!masks.empty()) {
      config.set("rank_pattern", masks);
    }
  }
};

} // namespace detail

} // namespace peft
