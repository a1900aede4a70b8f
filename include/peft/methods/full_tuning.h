#pragma once

// Full fine-tuning in the library's terms: every parameter trains, as a copy of
// its own. What all other methods are compared with, and where lottery tickets
// (methods/lt_sft.h) begin.
//
//   θ' trains, θ stays        one copy of the weights more than training θ

#include <peft/core/attach.h>
#include <peft/methods/modules_to_save.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for full fine-tuning.
///
///   peft::FullTuningOptions()                                 everything
///   peft::FullTuningOptions().targets({"encoder.layer.11"})   only what is
///   named peft::FullTuningOptions().exclude({"LayerNorm"})          all but
///   that
struct FullTuningOptions {
  /// Modules, with everything inside them, or single parameters. Default: all.
  TORCH_ARG(std::vector<std::string>, targets);
  /// Modules and parameters that stay frozen.
  TORCH_ARG(std::vector<std::string>, exclude);
  /// Modules trained whole that are no part of the comparison between start and
  /// end: a task head, which a lottery ticket leaves out.
  TORCH_ARG(std::vector<std::string>, modules_to_save);
};

namespace detail {

/// Each entry must be a module with parameters, or a parameter.
inline void check_every_part(
    const Network& network,
    const std::vector<std::string>& names,
    const std::string& what) {
  for (const auto& name : names) {
    const bool found =
        std::any_of(network.begin(), network.end(), [&](const Layer& layer) {
          return std::any_of(
              layer.parameters.begin(),
              layer.parameters.end(),
              [&](const auto& p) {
                return is_inside(layer.path(p.first), {name});
              });
        });
    TORCH_CHECK(
        found,
        "peft: ",
        what,
        " entry '",
        name,
        "' matches nothing in this network.",
        near_misses(network, name));
  }
}

inline Plan plan(const FullTuningOptions& options, const Network& network) {
  check_every_part(network, options.targets(), "targets");
  check_every_part(network, options.exclude(), "exclude");
  Plan result;
  result.method = "FULL";
  result.options = options;
  for (const auto& layer : network) {
    for (const auto& [key, tensor] : layer.parameters) {
      const std::string path = layer.path(key);
      if (!tensor.defined() || !tensor.is_floating_point() ||
          is_inside(path, options.exclude()) ||
          is_inside(path, options.modules_to_save()) ||
          !(options.targets().empty() || is_inside(path, options.targets()))) {
        continue;
      }
      TORCH_CHECK(
          layer.refusal.empty(),
          "peft: '",
          path,
          "' cannot be trained: ",
          layer.refusal,
          ". Name '",
          layer.name,
          "' in exclude");
      result.sites.push_back(plan_copy(layer, key));
    }
  }
  plan_modules_to_save(network, options.modules_to_save(), result.sites);
  return result;
}

} // namespace detail

/// Trains a copy of every parameter of `model`, or of those that the options
/// name. The parameters keep their values until merge: disable and detach give
/// the base back to the bit.
inline Adapter attach(
    torch::nn::Module& model,
    const FullTuningOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
