#pragma once

// BitFit (Ben Zaken et al. 2021, arXiv:2106.10199): train the biases that the
// network already has, and nothing else. The paper's smaller variant takes only
// the query's bias and that of the intermediate (d → 4d) layer.
//
//   y = W x + b'     b' a trained copy of b; W and b stay as they are

#include <peft/core/attach.h>
#include <peft/core/roles.h>
#include <peft/functional/layers.h>
#include <peft/methods/explicit_layer.h>
#include <peft/methods/modules_to_save.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for BitFit.
///
///   peft::BitFitOptions()                                  every bias
///   peft::BitFitOptions({"query", "intermediate"})         a subset
///   peft::BitFitOptions().modules_to_save({"classifier"})  and the task head
struct BitFitOptions {
  BitFitOptions() = default;
  BitFitOptions(std::vector<std::string> subsets)
      : biases_(std::move(subsets)) {}

  /// Which biases: "all", or any of "query", "key", "value",
  /// "attention_output", "intermediate" (d → 4d), "output" (4d → d),
  /// "layer_norm"; "query_intermediate" is the paper's pair. Packed attention
  /// projections give up the rows of the part that is named.
  TORCH_ARG(std::vector<std::string>, biases) = {"all"};
  /// Only biases of these modules (or these parameters). Default: anywhere.
  TORCH_ARG(Targets, targets);
  /// Modules trained whole, beside the biases: a task head.
  TORCH_ARG(std::vector<std::string>, modules_to_save);
};

namespace detail {

/// Whether q, k and v lie one after another in this bias.
inline bool is_packed_bias(const Layer& layer, const std::string& key) {
  const auto dot = layer.name.rfind('.');
  const std::string last =
      dot == std::string::npos ? layer.name : layer.name.substr(dot + 1);
  return key == "in_proj_bias" ||
      (key == "bias" && is_one_of(last, {"c_attn", "qkv", "qkv_proj"}));
}

inline std::vector<std::string> expand_subsets(const BitFitOptions& options) {
  std::vector<std::string> result;
  for (const auto& subset : options.biases()) {
    TORCH_CHECK_VALUE(
        is_one_of(
            subset,
            {"all",
             "query",
             "key",
             "value",
             "attention_output",
             "intermediate",
             "output",
             "layer_norm",
             "query_intermediate"}),
        "peft: BitFit knows no biases called '",
        subset,
        "'; choose among all, query, key, value, attention_output, "
        "intermediate, output, layer_norm, query_intermediate");
    if (subset == "query_intermediate") {
      result.insert(result.end(), {"query", "intermediate"});
    } else {
      result.push_back(subset);
    }
  }
  TORCH_CHECK_VALUE(
      !result.empty(), "peft: BitFit needs at least one set of biases");
  if (std::find(result.begin(), result.end(), "all") != result.end()) {
    return {"all"};
  }
  return result;
}

inline Plan plan(const BitFitOptions& options, const Network& network) {
  Plan result;
  result.method = "BITFIT";
  result.options = options;
  if (options.targets().kind() == Targets::Kind::list) {
    check_every_name_matches(
        network, options.targets().names(), "targets", true);
  }
  std::string existing;
  for (const auto& subset : expand_subsets(options)) {
    bool found = false;
    for (const auto& layer : network) {
      if (is_inside(layer.name, options.modules_to_save())) {
        continue; // trained whole
      }
      for (const auto& p : layer.parameters) {
        const std::string& key = p.first;
        if (key.find("bias") == std::string::npos ||
            !p.second.is_floating_point()) {
          continue;
        }
        if (existing.size() < 300) {
          existing += (existing.empty() ? "'" : ", '") + layer.path(key) + "'";
        }
        if (!options.targets().empty() &&
            !options.targets().matches(layer.name, layer) &&
            !options.targets().matches(layer.path(key), layer)) {
          continue;
        }
        const bool part = is_packed_bias(layer, key) &&
            is_one_of(subset, {"query", "key", "value"});
        if (subset != "all" && !part && role_of(layer) != subset) {
          continue;
        }
        found = true;
        const std::string name = part ? key + "." + subset : key;
        const bool planned = std::any_of(
            result.sites.begin(), result.sites.end(), [&](const auto& site) {
              const auto file_name = site.delta->file_tensors().front().first;
              return site.parameter == layer.path(key) &&
                  (file_name == key || file_name == name);
            });
        if (planned) {
          continue; // named by two subsets
        }
        PlannedSite site = plan_copy(layer, key);
        if (part) {
          const int64_t third = p.second.size(0) / 3;
          const int64_t begin = third *
              (subset == "query"     ? 0
                   : subset == "key" ? 1
                                     : 2);
          site.delta = std::make_shared<TrainedCopy>(
              base(p.second), name, Rows{begin, begin + third});
        }
        result.sites.push_back(std::move(site));
      }
    }
    TORCH_CHECK(
        found,
        "peft: BitFit finds no bias for '",
        subset,
        "' in this network. Its biases are: ",
        existing.empty() ? "none (a bias-free network has nothing for BitFit)"
                         : existing);
  }
  plan_modules_to_save(network, options.modules_to_save(), result.sites);
  return result;
}

} // namespace detail

/// Trains copies of the chosen biases of `model` and freezes everything else.
/// The biases themselves keep their values until merge: disable and detach give
/// the base back to the bit.
inline Adapter attach(
    torch::nn::Module& model,
    const BitFitOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

/// BitFit as a layer of one's own: a frozen base layer and a bias that trains.
template <class Base>
class BitFitImpl : public ExplicitLayer<Base, BitFitImpl<Base>> {
 public:
  /// From the base's options or from a layer that exists; the layer must have
  /// a bias.
  template <class LayerOrOptions>
  explicit BitFitImpl(const LayerOrOptions& layer)
      : ExplicitLayer<Base, BitFitImpl<Base>>(layer) {
    TORCH_CHECK(
        this->base_layer->bias.defined(),
        "peft: BitFit trains the bias of a layer, and this ",
        this->base_layer->name(),
        " has none");
    bias = this->base_layer->bias;
    register_own();
    this->freeze_base();
  }

  /// y = W x + b'.
  Tensor adapted(const Tensor& x) {
    return functional::forward_with(
        *this->base_layer, x, this->base_layer->weight, bias);
  }

  void fold() {
    this->base_layer->bias.copy_(bias);
  }
  Tensor& folded() {
    return this->base_layer->bias;
  }
  std::vector<Tensor> trained() const {
    return {bias};
  }
  void register_own() {
    bias = this->register_parameter("bias", bias.detach().clone());
  }
  void pretty_print(std::ostream& stream) const override {
    stream << "peft::BitFit(" << bias.numel() << ")";
  }

  Tensor bias;
};

/// A holder, as torch::nn's own, for Linear, LayerNorm, GroupNorm and Conv1d,
/// Conv2d, Conv3d:
///
///   peft::BitFit<torch::nn::LayerNorm> norm(existing_norm);
template <class Layer>
class BitFit : public torch::nn::ModuleHolder<
                   BitFitImpl<typename Layer::ContainedType>> {
 public:
  using torch::nn::ModuleHolder<
      BitFitImpl<typename Layer::ContainedType>>::ModuleHolder;
};

} // namespace peft
