#pragma once

// LayerNorm tuning (Zhao et al. 2023, arXiv:2312.11420): train gain and shift
// of the normalisations that the network already has, and nothing else.
//
//   y = γ' (x - mean) / std + β'     γ', β' trained copies of γ, β; an RMSNorm
//                                    has γ' alone

#include <peft/core/attach.h>
#include <peft/core/roles.h>
#include <peft/methods/modules_to_save.h>

#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for LayerNorm tuning, by the names of HF's LNTuningConfig.
///
///   peft::LayerNormOptions()                            every normalisation
///   peft::LayerNormOptions().targets({"ln_1", "ln_f"})  these
struct LayerNormOptions {
  /// HF's target_modules. Default: the normalisations, by type or by name.
  /// Modules that are named train all parameters of their own, norm or not.
  TORCH_ARG(Targets, targets);
  /// HF's exclude_modules.
  TORCH_ARG(Targets, exclude);
  /// Modules trained whole, beside the norms: a task head.
  TORCH_ARG(std::vector<std::string>, modules_to_save);
};

namespace detail {

/// What HF calls the copies in a file: "LayerNorm.ln_tuning_layers.weight".
inline const char* const kLayerNormFileName = "ln_tuning_layers";

inline Plan plan(const LayerNormOptions& options, const Network& network) {
  const auto& targets = options.targets();
  if (targets.kind() == Targets::Kind::list) {
    check_every_name_matches(network, targets.names(), "targets", false);
  }
  if (options.exclude().kind() == Targets::Kind::list) {
    check_every_name_matches(
        network, options.exclude().names(), "exclude", false);
  }
  Plan result;
  result.method = "LN_TUNING";
  result.options = options;
  for (const auto& layer : network) {
    const bool wanted = targets.empty() ? role_of(layer) == "layer_norm"
                                        : targets.matches(layer.name, layer);
    const bool excluded = !options.exclude().empty() &&
        options.exclude().matches(layer.name, layer);
    if (!wanted || excluded ||
        is_inside(layer.name, options.modules_to_save())) {
      continue; // what is inside modules_to_save is trained whole
    }
    for (const auto& p : layer.parameters) {
      if (p.second.defined() && p.second.is_floating_point()) {
        PlannedSite site = plan_copy(layer, p.first);
        site.file_prefix = layer.path(kLayerNormFileName);
        result.sites.push_back(std::move(site));
      }
    }
  }
  TORCH_CHECK(
      !result.sites.empty(),
      "peft: LayerNorm tuning finds ",
      targets.empty() ? "no normalisation with parameters in this network; "
                        "name modules with .targets({...})."
                      : "no parameters in the modules that targets name.",
      near_misses(network, "LayerNorm"));
  plan_modules_to_save(network, options.modules_to_save(), result.sites);
  return result;
}

} // namespace detail

/// Trains copies of the normalisations' parameters in `model` and freezes
/// everything else. The base keeps its values until merge, which is exact.
inline Adapter attach(
    torch::nn::Module& model,
    const LayerNormOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
