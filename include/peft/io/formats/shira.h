#pragma once

// SHiRA as HF PEFT's config and file have it.

#include <peft/io/formats/tuner.h>
#include <peft/methods/shira.h>

#include <any>
#include <optional>
#include <string>

namespace peft {

namespace detail {

class ShiraFormat final : public TunerFormat<ShiraOptions, ShiraDelta> {
 public:
  std::string type() const override {
    return "SHIRA";
  }

  /// A mask of the user's own making ("struct" too) has its own number of
  /// entries.
  void complete(
      Plan& plan,
      const Network& /*network*/,
      const NamedTensorMap& file) const override {
    const auto& o = std::any_cast<const ShiraOptions&>(plan.options);
    for (auto& site : plan.sites) {
      const auto* delta = dynamic_cast<const ShiraDelta*>(site.delta.get());
      const auto found =
          find_in_file(file, file_key(site.file_prefix, "shira_weight"));
      if (o.mask_type() != "random" && delta != nullptr &&
          found != file.end() && found->second.dim() == 1) {
        site.delta = delta->resized(found->second.numel());
      }
    }
  }

 protected:
  Plan make_plan(
      const ShiraOptions& o,
      const AdapterConfig& /*config*/,
      const Network& network) const override {
    return plan_shira(o, network, /*draw=*/false);
  }
  void read_own(const AdapterConfig& config, ShiraOptions& o) const override {
    o.r(config.get<int64_t>("r", 32));
    o.mask_type(config.get<std::string>("mask_type", "random"));
    if (config.has("random_seed")) {
      o.random_seed(static_cast<uint64_t>(config.get<int64_t>("random_seed")));
    }
    o.init_weights(config.get<bool>("init_weights", true));
  }
  void write_own(const ShiraOptions& o, AdapterConfig& config) const override {
    config.set("r", o.r());
    config.set("mask_type", o.mask_type());
    config.set("random_seed", nullptr);
    if (o.random_seed()) {
      config.set("random_seed", static_cast<int64_t>(*o.random_seed()));
    }
    config.set("init_weights", o.init_weights());
  }
  bool has_exclude_modules() const override {
    return false;
  }
  bool has_layers() const override {
    return false;
  }
};

} // namespace detail

} // namespace peft
