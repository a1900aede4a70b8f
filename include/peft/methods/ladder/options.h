#pragma once

#include <torch/arg.h>
#include <torch/types.h>

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// How much each entry of each parameter matters, by the parameter's name in
/// the network and in its shape.
using Importance = std::map<std::string, torch::Tensor>;

/// Options for ladder side tuning. The defaults are the published ones.
///
///   peft::LadderOptions(8)                               an eighth of each
///   width peft::LadderOptions(8).layers({1, 2, 3, 5, 6, 7})    beside these
///   layers only
///   peft::LadderOptions(8).importance(peft::ladder_importance(*model, ...))
struct LadderOptions {
  LadderOptions(int64_t reduction = 8) : reduction_(reduction) {}

  /// The network's widths are divided by this; the number of heads stays.
  TORCH_ARG(int64_t, reduction);
  /// The layers that get a side block, ascending. Default: all.
  TORCH_ARG(std::vector<int64_t>, layers);
  /// The same for the decoder of an encoder-decoder. Default: as `layers`.
  TORCH_ARG(std::vector<int64_t>, decoder_layers);
  /// "learnable": mu = sigmoid(alpha / T), trained; "fixed": the same, not
  /// trained; "none": the backbone's states are added.
  TORCH_ARG(std::string, gate) = "learnable";
  TORCH_ARG(double, gate_alpha) = 0;
  TORCH_ARG(double, gate_temperature) = 0.1;
  /// "prune": the blocks start as the most important rows and columns of the
  /// layers' own weights; "random": as the blocks initialise themselves.
  TORCH_ARG(std::string, init) = "prune";
  /// What is important to "prune". Default: the weights' magnitudes.
  TORCH_ARG(Importance, importance);
  /// Mixes the backbone's last state into the result by one more gate.
  TORCH_ARG(bool, merge_last) = false;
  /// Modules trained whole, beside the side network: a task head.
  TORCH_ARG(std::vector<std::string>, modules_to_save);
};

namespace detail {

inline void check(const LadderOptions& options) {
  TORCH_CHECK_VALUE(
      options.reduction() > 0,
      "peft: LadderOptions' reduction must be positive, got ",
      options.reduction());
  TORCH_CHECK_VALUE(
      options.gate() == "learnable" || options.gate() == "fixed" ||
          options.gate() == "none",
      "peft: LadderOptions' gate must be \"learnable\", \"fixed\" or \"none\", "
      "got \"",
      options.gate(),
      '"');
  TORCH_CHECK_VALUE(
      options.gate_temperature() > 0,
      "peft: LadderOptions' gate_temperature must be positive, got ",
      options.gate_temperature());
  TORCH_CHECK_VALUE(
      options.init() == "prune" || options.init() == "random",
      "peft: LadderOptions' init must be \"prune\" or \"random\", got \"",
      options.init(),
      '"');
}

/// The layers of a stack of `num_layers` that get a side block.
inline std::vector<int64_t> kept_layers(
    const std::vector<int64_t>& wanted,
    int64_t num_layers,
    const std::string& stack) {
  std::vector<int64_t> result = wanted;
  for (int64_t i = 0; wanted.empty() && i < num_layers; ++i) {
    result.push_back(i);
  }
  for (size_t i = 0; i < result.size(); ++i) {
    TORCH_CHECK_VALUE(
        result[i] >= 0 && result[i] < num_layers &&
            (i == 0 || result[i - 1] < result[i]),
        "peft: LadderOptions' layers must ascend and lie in 0 to ",
        num_layers - 1,
        ", the layers of '",
        stack,
        "'; got ",
        result);
  }
  return result;
}

} // namespace detail

} // namespace peft
