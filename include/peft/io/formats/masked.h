#pragma once

// FISH mask and Child-tuning in the two files. A mask that stays is written as
// places, ascending, in the row-major tensor ("encoder.query.weight.indices",
// int64 [k]); what trained is
//
//   hard        the values at these places ("encoder.query.weight.values", [k])
//   reference   the whole tensor by its own name, which weight decay may have
//               moved anywhere
//
// Child-tuning F writes whole tensors, and into libpeft_training.safetensors
// the seed of its masks and how many steps have drawn one.

#include <peft/io/formats/format.h>
#include <peft/methods/child_tuning.h>
#include <peft/methods/fish.h>

#include <any>
#include <memory>
#include <string>
#include <vector>

namespace peft {

namespace detail {

/// The mask that a file's indices are.
inline SparseMask mask_in(const NamedTensorMap& file, const Network& network) {
  SparseMask mask;
  for (const auto& layer : network) {
    for (const auto& [key, tensor] : layer.parameters) {
      const auto path = layer.path(key);
      const auto found = find_in_file(file, path + ".indices");
      if (found == file.end()) {
        continue;
      }
      const Tensor& places = found->second;
      TORCH_CHECK(
          places.scalar_type() == at::kLong && places.dim() == 1 &&
              (places.numel() == 0 || places.diff().gt(0).all().item<bool>()),
          "peft: '",
          found->first,
          "' must hold ascending int64 indices [k], got ",
          places.toString(),
          places.sizes(),
          "; the file is damaged or not libpeft's");
      mask.set(path, places, tensor.sizes());
    }
  }
  TORCH_CHECK(
      !mask.empty(),
      "peft: the weights name no entry of this network's parameters "
      "('...weight.indices'); the adapter was made for another network");
  return mask;
}

/// As write_targets, but a predicate is written as what it chose: the
/// parameters of the sites that `is_one`.
template <class IsOne>
void write_chosen(
    AdapterConfig& config,
    const std::string& field,
    const Targets& targets,
    const AdapterState& adapter,
    IsOne&& is_one) {
  if (targets.kind() != Targets::Kind::predicate &&
      targets.kind() != Targets::Kind::all_linear) {
    write_targets(config, field, targets);
    return;
  }
  std::vector<std::string> paths;
  for (const auto& site : adapter.sites) {
    if (is_one(site)) {
      paths.push_back(site.parameters.front());
    }
  }
  config.set(field, paths);
}

class FishFormat final : public AdapterFormat {
 public:
  std::string type() const override {
    return "FISH";
  }

  Plan plan(const AdapterConfig& config, const Network& /*network*/)
      const override {
    FishOptions o(config.get<double>("keep_ratio", 0.005));
    o.semantics(config.get<std::string>("semantics", "hard"));
    o.selection(config.get<std::string>("selection", "fisher"));
    o.count_head(config.get<bool>("count_head", true));
    if (config.has("target_modules")) {
      o.targets(targets_field(config, "target_modules"));
    }
    o.modules_to_save(
        config.get<std::vector<std::string>>("modules_to_save", {}));
    Plan result;
    result.method = type();
    result.options = o;
    return result;
  }

  /// The entries are known from the tensors alone.
  void complete(Plan& plan, const Network& network, const NamedTensorMap& file)
      const override {
    auto o = std::any_cast<FishOptions>(plan.options);
    plan = detail::plan(o.mask(mask_in(file, network)), network);
  }

  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    const auto& o = std::any_cast<const FishOptions&>(adapter.options);
    config.set("keep_ratio", o.keep_ratio());
    config.set("semantics", o.semantics());
    config.set("selection", o.selection());
    config.set("count_head", o.count_head());
    write_chosen(
        config,
        "target_modules",
        o.targets(),
        adapter,
        [&](const SiteRecord& site) {
          return !is_inside(site.file_prefix, o.modules_to_save());
        });
    config.set("modules_to_save", o.modules_to_save());
  }
};

class ChildTuningFormat final : public AdapterFormat {
 public:
  std::string type() const override {
    return "CHILD_TUNING";
  }

  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    ChildTuningOptions o(config.get<double>("p", 0.3));
    o.mode(config.get<std::string>("mode", "F"));
    o.semantics(config.get<std::string>("semantics", "hard"));
    if (config.has("target_modules")) {
      o.targets(targets_field(config, "target_modules"));
    }
    if (config.has("masked_modules")) {
      o.masked(targets_field(config, "masked_modules"));
    }
    o.modules_to_save(
        config.get<std::vector<std::string>>("modules_to_save", {}));
    if (o.mode() == "F") {
      o.seed(0); // the state of training has it
      return detail::plan(o, network);
    }
    Plan result;
    result.method = type();
    result.options = o;
    return result;
  }

  void complete(Plan& plan, const Network& network, const NamedTensorMap& file)
      const override {
    auto o = std::any_cast<ChildTuningOptions>(plan.options);
    if (o.mode() == "D") {
      plan = detail::plan(o.mask(mask_in(file, network)), network);
    }
  }

  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    const auto& o = std::any_cast<const ChildTuningOptions&>(adapter.options);
    config.set("p", o.p());
    config.set("mode", o.mode());
    config.set("semantics", o.semantics());
    const auto in_targets = [&](const SiteRecord& site) {
      return !is_inside(site.file_prefix, o.modules_to_save());
    };
    const auto is_masked = [&](const SiteRecord& site) {
      return std::dynamic_pointer_cast<MaskedCopy>(site.delta) != nullptr;
    };
    write_chosen(config, "target_modules", o.targets(), adapter, in_targets);
    write_chosen(config, "masked_modules", o.masked(), adapter, is_masked);
    config.set("modules_to_save", o.modules_to_save());
  }
};

} // namespace detail

} // namespace peft
