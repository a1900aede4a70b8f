#pragma once

// Intrinsic dimension in two files of HF PEFT's form; PEFT has no such method.
// The weights file holds intrinsic_vector and, for SAID, intrinsic_lambda.

#include <peft/io/formats/format.h>
#include <peft/methods/intrinsic.h>

#include <any>
#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// The projections of a list of sites, or null.
template <class Sites>
const IntrinsicProjections* projections_of(const Sites& sites) {
  for (const auto& site : sites) {
    const auto* delta = dynamic_cast<const IntrinsicDelta*>(site.delta.get());
    if (delta != nullptr) {
      return &delta->projections();
    }
  }
  return nullptr;
}

class IntrinsicFormat final : public AdapterFormat {
 public:
  std::string type() const override {
    return "INTRINSIC";
  }

  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    IntrinsicOptions o(config.get<int64_t>("intrinsic_dimension"));
    o.said(config.get<bool>("said", false));
    o.projection(config.get<std::string>("projection", "fastfood"));
    o.seed(config.get<int64_t>("projection_seed"));
    o.all_parameters(config.get<bool>("all_parameters", false));
    if (!o.all_parameters()) {
      o.targets(targets_field(config, "target_modules"));
    }
    if (config.has("exclude_modules") && !config.is_empty("exclude_modules")) {
      o.exclude(targets_field(config, "exclude_modules"));
    }
    o.modules_to_save(
        config.get<std::vector<std::string>>("modules_to_save", {}));
    IntrinsicOptions here = o;
    here.modules_to_save(modules_in(network, o.modules_to_save()));
    Plan result = detail::plan(here, network);
    result.options = std::move(o);
    check_projection(config, *projections_of(result.sites));
    return result;
  }

  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    const auto& o = std::any_cast<const IntrinsicOptions&>(adapter.options);
    config.set("intrinsic_dimension", o.d());
    config.set("said", o.said());
    config.set("projection", o.projection());
    config.set("projection_seed", o.seed());
    config.set(
        "projection_fingerprint", projections_of(adapter.sites)->fingerprint());
    config.set("all_parameters", o.all_parameters());
    const bool in_words = o.targets().kind() == Targets::Kind::regex ||
        o.targets().kind() == Targets::Kind::list;
    if (o.all_parameters() || in_words) {
      write_targets(config, "target_modules", o.targets());
    } else { // the layers stand by name
      std::vector<std::string> names;
      for (const auto& site : adapter.sites) {
        if (dynamic_cast<const IntrinsicDelta*>(site.delta.get()) != nullptr) {
          names.push_back(site.name);
        }
      }
      config.set("target_modules", names);
    }
    if (!o.exclude().empty()) {
      write_targets(config, "exclude_modules", o.exclude());
    }
    if (!o.modules_to_save().empty()) {
      config.set("modules_to_save", o.modules_to_save());
    }
  }

 private:
  /// theta means something for the P that it was trained with, and for no
  /// other.
  static void check_projection(
      const AdapterConfig& config,
      const IntrinsicProjections& projections) {
    const auto wanted = config.get<double>("projection_fingerprint");
    const double found = projections.fingerprint();
    TORCH_CHECK(
        std::abs(wanted - found) <= 1e-6 * (1 + std::abs(wanted)),
        "peft: the random projection that seed ",
        config.get<int64_t>("projection_seed"),
        " makes for this network is not the one that the adapter was trained "
        "with (fingerprint ",
        found,
        " where ",
        kConfigFile,
        " has ",
        wanted,
        "); the adapted tensors must have the same shapes in the same order");
  }
};

} // namespace detail

} // namespace peft
