#pragma once

// LoRA on single parameters (HF PEFT's target_parameters), for networks that
// keep the weights of several matrices in one tensor: a mixture of experts.
//
//   W'_e = W_e + s · B_e A_e      for each of the E matrices of W [E, out, in]
//
// A [E r, in] holds the A_e one below the other, and column j of B [out, r E]
// belongs to expert j mod E, as PEFT has them. A parameter of two dimensions is
// one matrix [out, in] and takes LoRA's own way.
//
// (A parameter of three dimensions that targets(...) names counts as one matrix
// [E, out · in] instead; that is no layout of HF's.)

#include <peft/core/attach.h>
#include <peft/core/formula_delta.h>
#include <peft/functional/lora_merge.h>
#include <peft/methods/lora/init.h>
#include <peft/methods/lora/options.h>
#include <peft/methods/tuner_targets.h>

#include <algorithm>
#include <memory>
#include <regex>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// LoRA at a stack of matrices.
class LoraExpertsDelta final : public FormulaDelta<LoraExpertsDelta> {
 public:
  struct Config {
    int64_t experts = 1;
    double scaling = 1.0;
    bool transposed = false; // each matrix lies as [in, out]
  };

  LoraExpertsDelta(Config config, NamedTensors tensors, bool = false)
      : FormulaDelta(std::move(tensors), false), config_(config) {}

  int64_t r() const {
    return tensor("lora_A.weight").size(0) / config_.experts;
  }
  const Config& config() const {
    return config_;
  }

  Tensor changed(const Tensor& weight, double scale) const {
    const auto [left, right] = factors();
    return at::baddbmm(
        weight,
        times_factor(left.to(weight.scalar_type()), number_factor()),
        right.to(weight.scalar_type()),
        1.0,
        scale * config_.scaling);
  }
  bool has_matrices() const override {
    return true;
  }
  Tensor effective_matrix(const Tensor& weight, int64_t index, double scale)
      const override {
    const auto [left, right] = factors();
    const auto dtype = weight.scalar_type();
    return at::addmm(
        weight,
        times_factor(left.select(0, index).to(dtype), number_factor()),
        right.select(0, index).to(dtype),
        1.0,
        scale * config_.scaling);
  }

  bool fold_into(const Tensor& weight, double scale, bool dry_run)
      const override {
    torch::NoGradGuard no_grad;
    if (factor_kind() != Decoration::Factor::none) {
      return false;
    }
    const auto [left, right] = factors();
    const double s = scale * config_.scaling;
    for (int64_t e = 0; e < config_.experts; ++e) {
      if (!dry_run) {
        functional::lora_merge_(weight[e], right[e], left[e], s);
      } else if (!functional::lora_merge_is_safe(
                     weight[e], right[e], left[e], s)) {
        return false;
      }
    }
    return true;
  }

  bool is_additive() const override {
    return true;
  }
  bool takes_factor(Decoration::Factor kind) const override {
    return kind != Decoration::Factor::input;
  }
  std::string describe() const override {
    return "lora r=" + std::to_string(r()) + " of " +
        std::to_string(config_.experts) + " matrices";
  }

 private:
  /// [E, rows, r] and [E, r, columns], whose products are the ΔW_e / s.
  std::pair<Tensor, Tensor> factors() const {
    const Tensor A = tensor("lora_A.weight"), B = tensor("lora_B.weight");
    const Tensor down = A.view({config_.experts, r(), A.size(1)});
    const Tensor up =
        B.view({B.size(0), r(), config_.experts}).permute({2, 0, 1});
    return config_.transposed
        ? std::make_pair(down.transpose(1, 2), up.transpose(1, 2))
        : std::make_pair(up, down);
  }

  Config config_;
};

namespace detail {

/// Whether target_parameters means the parameter of this path.
inline bool names_parameter(const Targets& targets, const std::string& path) {
  if (targets.empty()) {
    return false;
  }
  if (targets.kind() == Targets::Kind::regex) {
    return std::regex_match(path, std::regex(targets.names().front()));
  }
  return std::any_of(
      targets.names().begin(), targets.names().end(), [&](const auto& name) {
        return Targets::name_matches(path, name);
      });
}

/// The delta for one of them.
inline std::shared_ptr<Delta> make_parameter_delta(
    const LoraOptions& options,
    const Tensor& weight,
    const std::string& path) {
  const LoraScale scale = lora_scale(options, path);
  if (weight.dim() == 2) {
    return make_lora_delta(options, weight, LoraLayout::matrix, scale, path);
  }
  TORCH_CHECK_VALUE(
      weight.dim() == 3 && weight.size(0) > 0,
      "peft: target_parameters takes matrices and stacks of them, and '",
      path,
      "' has shape ",
      weight.sizes());
  const c10::InferenceMode off(false);
  const bool transposed = options.parameters_transposed();
  const int64_t experts = weight.size(0);
  const int64_t in = weight.size(transposed ? 1 : 2);
  const int64_t out = weight.size(transposed ? 2 : 1);
  const auto [A, B] = lora_init(
      options,
      {experts * scale.r, in},
      {out, scale.r * experts},
      LoraLayout::matrix,
      scale.r);
  return std::make_shared<LoraExpertsDelta>(
      LoraExpertsDelta::Config{experts, scale.scaling, transposed},
      LoraExpertsDelta::NamedTensors{
          {"lora_A.weight", parameter_for(weight, A)},
          {"lora_B.weight", parameter_for(weight, B)}});
}

/// Adds a site for every parameter that target_parameters names. `adapted`
/// gets its layer, once for each of them.
inline void plan_parameters(
    const LoraOptions& options,
    const Network& network,
    std::vector<const Layer*>& adapted,
    std::vector<PlannedSite>& sites) {
  const Targets& targets = options.target_parameters();
  std::vector<bool> met(targets.names().size(), false);
  for (const auto& layer : network) {
    std::vector<std::string> keys; // in the module's order
    for (const auto& p : layer.parameters) {
      if (names_parameter(targets, layer.path(p.first))) {
        keys.push_back(p.first);
      }
    }
    if (keys.empty()) {
      continue;
    }
    for (size_t i = 0; i < met.size(); ++i) {
      met[i] =
          met[i] || targets.kind() == Targets::Kind::regex ||
          std::any_of(keys.begin(), keys.end(), [&](const auto& key) {
            return Targets::name_matches(layer.path(key), targets.names()[i]);
          });
    }
    TORCH_CHECK(
        std::find(adapted.begin(), adapted.end(), &layer) == adapted.end(),
        "peft: '",
        layer.path(keys.front()),
        "' is named by target_parameters, and its layer by targets too; name "
        "it in one of the two");
    TORCH_CHECK(
        layer.refusal.empty(),
        "peft: '",
        layer.path(keys.front()),
        "' cannot be adapted: ",
        layer.refusal);
    TORCH_CHECK(
        layer.name.empty() || !is_inside(layer.name, options.modules_to_save()),
        "peft: '",
        layer.path(keys.front()),
        "' is named by target_parameters, and modules_to_save trains '",
        layer.name,
        "' whole; name it in one of the two");
    for (size_t i = 0; i < keys.size(); ++i) {
      const Tensor weight = layer.parameter(keys[i]);
      const std::string path = layer.path(keys[i]);
      check_adaptable(weight, path);
      // PEFT wraps the module once for each, the last one outermost.
      std::string prefix = layer.name;
      for (size_t j = i + 1; j < keys.size(); ++j) {
        prefix += prefix.empty() ? "base_layer" : ".base_layer";
      }
      sites.push_back(
          {path,
           path,
           prefix,
           weight,
           make_parameter_delta(options, weight, path)});
      adapted.push_back(&layer);
    }
  }
  for (size_t i = 0; i < met.size(); ++i) {
    TORCH_CHECK(
        met[i],
        "peft: target_parameters entry '",
        targets.names()[i],
        "' matches no parameter of this network.",
        near_misses(network, targets.names()[i]));
  }
}

} // namespace detail

} // namespace peft
