#pragma once

// BEFT, bias-efficient fine-tuning (HF PEFT's BeftConfig; Huang et al. 2025,
// arXiv:2509.15974): one bias more at the value projections.
//
//   y = W x + b + β       β [out], zero at the start
//
// It is added to the layer's own bias, and merges into it. Where a layer has
// none, β is added to its output and cannot be merged.

#include <peft/core/formula_delta.h>
#include <peft/methods/tuner_targets.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for BEFT, by the names of HF's BeftConfig.
///
///   peft::BeftOptions().targets({"value"})
struct BeftOptions {
  BeftOptions() = default;

  /// HF's init_weights: false starts at N(0, 1).
  TORCH_ARG(bool, init_weights) = true;
  /// Linear layers. Default: the value projections.
  TORCH_ARG(Targets, targets);
  TORCH_ARG(Targets, exclude);
  TORCH_ARG(std::vector<int64_t>, layers);
  TORCH_ARG(std::vector<std::string>, layers_pattern);
  TORCH_ARG(bool, fan_in_fan_out) = false;
  TORCH_ARG(std::vector<std::string>, modules_to_save);
};

/// β on a bias, or on the output of a layer without one.
class BeftDelta final : public FormulaDelta<BeftDelta> {
 public:
  struct Config {
    bool on_output = false;
  };

  BeftDelta(Config config, NamedTensors tensors, bool is_transposed)
      : FormulaDelta(std::move(tensors), is_transposed), config_(config) {}

  Tensor effective(const Tensor& bias, double scale) const override {
    return config_.on_output
        ? bias
        : at::add(bias, tensor("beft_bias", bias).view({-1}), scale);
  }
  Tensor changed(const Tensor& weight, double /*scale*/) const {
    return weight;
  }

  bool transforms_output() const override {
    return config_.on_output;
  }
  Tensor output(const Tensor& y, double scale) const override {
    return at::add(y, tensor("beft_bias").view({-1}), scale)
        .to(y.scalar_type());
  }
  bool is_additive() const override {
    return !config_.on_output;
  }
  std::string merge_obstacle() const override {
    return config_.on_output ? "the layer has no bias that could take it in"
                             : "";
  }

  std::string describe() const override {
    return "beft";
  }
  const Config& config() const {
    return config_;
  }

 private:
  Config config_;
};

namespace detail {

inline Plan plan(const BeftOptions& options, const Network& network) {
  BeftOptions here = options;
  if (options.targets().empty()) {
    std::vector<std::string> names;
    for (const auto& layer : network) {
      if (role_of(layer) == "value" && layer.parameter("weight").defined()) {
        names.push_back(layer.name);
      }
    }
    TORCH_CHECK(
        !names.empty(),
        "peft: BEFT finds no value projection by name; name linear layers by "
        "targets({...}).",
        near_misses(network, "value"));
    here.targets(Targets(names));
  }
  Plan result;
  result.method = "BEFT";
  result.options = here;
  result.sites = plan_tuner(here, network, {"BEFT"}, [&](const TunerWeight& w) {
    Tensor bias = torch::randn({1, w.out_features()}); // HF draws it, too
    if (options.init_weights()) {
      bias.zero_();
    }
    return std::make_shared<BeftDelta>(
        BeftDelta::Config{!w.layer.parameter("bias").defined()},
        BeftDelta::NamedTensors{{"beft_bias", parameter_for(w.weight, bias)}},
        false);
  });
  for (auto& site : result.sites) { // from the weight to the bias beside it
    const auto* delta = dynamic_cast<const BeftDelta*>(site.delta.get());
    if (delta == nullptr || delta->config().on_output) {
      continue;
    }
    for (const auto& layer : network) {
      if (layer.path("weight") == site.parameter) {
        site.parameter = layer.path("bias");
        site.tensor = layer.parameter("bias");
        break;
      }
    }
  }
  return result;
}

} // namespace detail

/// Puts BEFT on `model` and freezes everything else.
inline Adapter attach(
    torch::nn::Module& model,
    const BeftOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
