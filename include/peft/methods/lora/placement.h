#pragma once

#include <peft/core/attach.h>
#include <peft/methods/lora/bias.h>
#include <peft/methods/lora/dora.h>
#include <peft/methods/lora/init.h>
#include <peft/methods/lora/parameters.h>
#include <peft/methods/lora/variants.h>
#include <peft/methods/modules_to_save.h>
#include <peft/methods/trainable_tokens.h>
#include <peft/methods/tuner_targets.h>

#include <algorithm>
#include <iterator>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// Plans LoRA on the modules and parameters that the targets name.
class LoraPlanner {
 public:
  LoraPlanner(
      const LoraOptions& options,
      const Network& network,
      bool is_from_file = false)
      : options_(options), network_(network), is_from_file_(is_from_file) {}

  std::vector<PlannedSite> run() {
    check(options_);
    check_names();
    for (const auto& layer : network_) {
      if (is_inside(layer.name, options_.modules_to_save()) &&
          !layer.name.empty()) {
        continue;
      }
      if (options_.targets().empty()) {
        if (options_.target_parameters().empty()) {
          plan_default(layer);
        }
      } else if (wanted(layer.name, layer)) {
        plan_module(layer);
      } else {
        for (const auto& p : layer.parameters) {
          if (wanted(layer.path(p.first), layer)) {
            plan_parameter(layer, p.first);
          }
        }
      }
    }
    const size_t modules = sites_.size();
    plan_parameters(options_, network_, adapted_, sites_);
    for (size_t i = modules; i < sites_.size(); ++i) {
      parameter_names_.push_back(sites_[i].parameter);
    }
    TORCH_CHECK(
        !sites_.empty(),
        "peft: the targets match nothing that LoRA can adapt",
        options_.targets().empty()
            ? " by default (query and value projections); set targets(...)."
            : ".",
        near_misses(network_, "weight"));
    if (!is_from_file_) { // PEFT's files may name more
      check_choices();
    }
    plan_token_rows(
        options_.trainable_token_indices().entries,
        network_,
        options_.modules_to_save(),
        sites_);
    plan_biases(
        options_.bias(),
        network_,
        adapted_,
        options_.modules_to_save(),
        sites_);
    // What adds to a bias comes after the copy that takes its place.
    std::move(
        bias_sites_.begin(), bias_sites_.end(), std::back_inserter(sites_));
    plan_modules_to_save(network_, options_.modules_to_save(), sites_);
    return std::move(sites_);
  }

 private:
  void check_names() const {
    if (options_.targets().kind() == Targets::Kind::list) {
      check_every_name_matches(
          network_, options_.targets().names(), "targets", true);
    }
    if (options_.exclude().kind() == Targets::Kind::list) {
      check_every_name_matches(
          network_, options_.exclude().names(), "exclude", true);
    }
  }

  bool wanted(const std::string& name, const Layer& layer) const {
    return is_wanted(options_, name, layer);
  }

  void plan_default(const Layer& layer) {
    const bool excluded = options_.exclude().matches(layer.name, layer) ||
        !in_chosen_layers(options_, layer.name);
    if (excluded) {
      return;
    }
    if (layer.kind == LayerKind::attention) {
      const auto& chosen = options_.enable_lora();
      plan_attention(
          layer,
          chosen.empty() ? std::vector<bool>{true, false, true} : chosen);
    } else if (is_query_or_value(layer)) {
      plan_weight(layer, "weight");
    }
  }

  void plan_module(const Layer& layer) {
    TORCH_CHECK(
        layer.refusal.empty(),
        "peft: '",
        layer.name,
        "' (",
        layer.type,
        ") cannot be adapted: ",
        layer.refusal);
    if (layer.kind == LayerKind::attention) {
      plan_attention(layer, options_.enable_lora());
      return;
    }
    if (layer.kind == LayerKind::recurrent) {
      for (const auto& p : layer.parameters) {
        if (p.second.dim() == 2) {
          plan_weight(layer, p.first);
        }
      }
      return;
    }
    const Tensor weight = layer.parameter("weight");
    if (weight.defined() && weight.dim() >= 2) {
      plan_weight(layer, "weight");
      return;
    }
    std::string inside;
    for (const auto& other : network_) {
      const bool child = other.name.size() > layer.name.size() &&
          (layer.name.empty() ||
           other.name.compare(0, layer.name.size() + 1, layer.name + ".") == 0);
      if (child && other.parameter("weight").defined() &&
          other.parameter("weight").dim() >= 2 && inside.size() < 200) {
        inside += (inside.empty() ? " Inside it are: '" : "', '") + other.name;
      }
    }
    TORCH_CHECK(
        false,
        "peft: target '",
        layer.name,
        "' is a ",
        layer.type,
        " without a weight matrix of its own, which LoRA needs; name the "
        "layers in it.",
        inside.empty() ? "" : inside + "'.");
  }

  void plan_parameter(const Layer& layer, const std::string& key) {
    TORCH_CHECK(
        layer.refusal.empty(),
        "peft: '",
        layer.path(key),
        "' cannot be adapted: ",
        layer.refusal);
    if (layer.kind == LayerKind::attention && key == "in_proj_weight" &&
        !options_.enable_lora().empty()) {
      plan_attention(layer, options_.enable_lora());
      return;
    }
    TORCH_CHECK(
        layer.parameter(key).dim() >= 2,
        "peft: '",
        layer.path(key),
        "' has ",
        layer.parameter(key).dim(),
        " dimension(s); LoRA needs a matrix (BitFit trains biases)");
    plan_weight(layer, key);
  }

  /// Packed attention: all of in_proj and out_proj, as HF, or the chosen ones
  /// of q, k and v.
  void plan_attention(const Layer& layer, const std::vector<bool>& enabled) {
    const Tensor packed = layer.parameter("in_proj_weight");
    if (packed.defined()) {
      plan_weight(layer, "in_proj_weight", enabled);
    } else {
      const char* const keys[] = {
          "q_proj_weight", "k_proj_weight", "v_proj_weight"};
      for (size_t i = 0; i < 3; ++i) {
        if ((enabled.empty() || enabled[i]) &&
            layer.parameter(keys[i]).defined()) {
          plan_weight(layer, keys[i]);
        }
      }
    }
    if (enabled.empty()) {
      for (const auto& other : network_) {
        if (other.parent_attention == layer.name &&
            other.name == layer.path("out_proj") &&
            !options_.exclude().matches(other.name, other) &&
            !is_planned(other.path("weight"))) {
          plan_weight(other, "weight");
        }
      }
    }
  }

  bool is_planned(const std::string& parameter) const {
    for (const auto& site : sites_) {
      if (site.parameter == parameter) {
        return true;
      }
    }
    return false;
  }

  void plan_weight(
      const Layer& layer,
      const std::string& key,
      const std::vector<bool>& enabled = {}) {
    const std::string path = layer.path(key);
    if (is_planned(path)) {
      return;
    }
    const Tensor weight = layer.parameter(key);
    check_adaptable(weight, path);
    // Where a module has one weight, HF's patterns and keys name the module.
    const bool main = key == "weight" || key == "in_proj_weight";
    const std::string& module = main ? layer.name : path;
    // HF adapts out_proj as a part of its attention, with its patterns.
    const std::string& pattern_name =
        layer.parent_attention.empty() ? module : layer.parent_attention;
    LoraLayout layout = LoraLayout::matrix;
    int64_t groups = 1;
    if (!enabled.empty() && key == "in_proj_weight") {
      layout = LoraLayout::blocks;
    } else if (
        key == "weight" && weight.dim() == 2 &&
        (layer.kind == LayerKind::embedding ||
         layer.kind == LayerKind::embedding_bag)) {
      layout = LoraLayout::embedding;
    } else if (key == "weight" && layer.kind == LayerKind::convolution) {
      layout = LoraLayout::convolution;
      groups = layer.groups;
    } else if (
        weight.dim() == 2 && layer.kind == LayerKind::other &&
        (options_.fan_in_fan_out() || layer.is_conv1d())) {
      layout = LoraLayout::transposed;
    }
    std::string prefix = module;
    if (!layer.parent_attention.empty()) {
      prefix = layer.parent_attention + ".base_layer.out_proj"; // HF's infix
    }
    const LoraScale scale = lora_scale(options_, pattern_name);
    const bool is_in_attention =
        layer.kind == LayerKind::attention || !layer.parent_attention.empty();
    TORCH_CHECK(
        !is_in_attention ||
            !(starts_as_part(options_.init()) ||
              options_.init() == "orthogonal"),
        "peft: init '",
        options_.init(),
        "' does not start the projections of a torch::nn::MultiheadAttention, "
        "here '",
        path,
        "' (neither does HF PEFT); name linear layers, or take init 'kaiming'");
    std::shared_ptr<Delta> delta;
    if (!variant_of(options_).empty()) {
      check_variant_place(options_, layer, weight, layout, path);
      delta = make_variant_delta(options_, weight, layout, scale, module, path);
    } else if (options_.dora()) {
      TORCH_CHECK(
          !is_in_attention,
          "peft: DoRA does not adapt the projections of a "
          "torch::nn::MultiheadAttention, here '",
          path,
          "' (neither does HF PEFT); name linear layers, or switch dora off");
      delta = make_dora_delta(options_, weight, layout, scale, path, groups);
    } else {
      delta = make_lora_delta(
          options_, weight, layout, scale, path, groups, enabled);
    }
    sites_.push_back({module, path, prefix, weight, std::move(delta)});
    if (options_.lora_bias()) {
      plan_lora_bias(layer, key, prefix, scale);
    }
    adapted_.push_back(&layer);
    pattern_names_.push_back(pattern_name);
  }

  void plan_lora_bias(
      const Layer& layer,
      const std::string& key,
      const std::string& prefix,
      LoraScale scale) {
    const Tensor bias = layer.parameter("bias");
    TORCH_CHECK(
        key == "weight" && bias.defined() &&
            layer.kind != LayerKind::normalization,
        "peft: lora_bias needs a layer with a bias, and '",
        layer.path(key),
        "' stands beside none");
    c10::InferenceMode off(false);
    const auto where =
        torch::TensorOptions(bias.device()).dtype(adapter_dtype(bias));
    Tensor initial = torch::zeros(bias.sizes(), where);
    bias_sites_.push_back(
        {layer.path("bias"),
         layer.path("bias"),
         prefix,
         bias,
         std::make_shared<LoraBiasDelta>(
             initial.set_requires_grad(true), scale.scaling)});
  }

  /// A pattern, a layer index or a block that meets nothing is a slip.
  void check_choices() const {
    auto names = pattern_names_;
    names.insert(names.end(), parameter_names_.begin(), parameter_names_.end());
    for (const auto* patterns :
         {&options_.rank_pattern(), &options_.alpha_pattern()}) {
      for (const auto& item : *patterns) {
        const bool used = std::any_of(
            names.begin(), names.end(), [&](const std::string& name) {
              return matches_pattern(item.first, name);
            });
        TORCH_CHECK(
            used,
            "peft: the pattern '",
            item.first,
            "' in rank_pattern or alpha_pattern matches no adapted module; the "
            "first of them is '",
            names.front(),
            "'");
      }
    }
    for (const auto index : options_.layers()) {
      LoraOptions one = options_;
      one.layers({index});
      const bool used = std::any_of(
          pattern_names_.begin(),
          pattern_names_.end(),
          [&](const std::string& name) { return in_chosen_layers(one, name); });
      TORCH_CHECK(
          used, "peft: layers names index ", index, ", where nothing matches");
    }
    const bool has_blocks =
        std::any_of(sites_.begin(), sites_.end(), [](const auto& site) {
          const auto* lora = dynamic_cast<const LoraDelta*>(site.delta.get());
          return lora != nullptr && lora->config().layout == LoraLayout::blocks;
        });
    const bool has_separate =
        std::any_of(sites_.begin(), sites_.end(), [](const auto& site) {
          return site.parameter.find("_proj_weight") != std::string::npos;
        });
    TORCH_CHECK(
        options_.enable_lora().empty() || has_blocks || has_separate,
        "peft: enable_lora chooses among q, k and v of a "
        "torch::nn::MultiheadAttention, and the targets meet none");
  }

  const LoraOptions& options_;
  const Network& network_;
  bool is_from_file_;
  std::vector<std::string> pattern_names_, parameter_names_;
  std::vector<PlannedSite> sites_, bias_sites_;
  std::vector<const Layer*> adapted_;
};

inline Plan plan(
    const LoraOptions& options,
    const Network& network,
    bool is_from_file = false) {
  Plan result;
  result.method = "LORA";
  result.options = options;
  result.sites = LoraPlanner(options, network, is_from_file).run();
  return result;
}

} // namespace detail

} // namespace peft
