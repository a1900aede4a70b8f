#pragma once

// Houlsby adapters (Houlsby et al. 2019, arXiv:1902.00751): two bottlenecks a
// layer, one on what the attention puts out, one on what the feed-forward does,
// before each is added to its input and normalised.
//
//   y' = y + up g(down y + b) + b'        y = W x + b of the sub-layer's last
//                                         linear layer
//
// and every layer norm trains too. With d features, a bottleneck of r and L
// layers that are 2 L (2 d r + r + d) parameters, and 2 d for each layer norm.
//
// It sits on the linear layer's bias (or its weight), so any network will do.
// Where dropout follows that layer, it comes after the adapter; in the paper's
// code it comes before. In evaluation there is no difference.

#include <peft/methods/bottleneck.h>
#include <peft/methods/modules_to_save.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for Houlsby adapters; the defaults are those of the paper's code.
///
///   peft::HoulsbyOptions(64).modules_to_save({"classifier"})
struct HoulsbyOptions {
  HoulsbyOptions() = default;
  HoulsbyOptions(int64_t bottleneck) : bottleneck_(bottleneck) {}

  /// r: 64 unless given here, or as the width divided by reduction_factor.
  TORCH_ARG(std::optional<int64_t>, bottleneck);
  TORCH_ARG(std::optional<double>, reduction_factor);
  /// As in BottleneckOptions. The paper's GELU is the tanh form.
  TORCH_ARG(std::string, non_linearity) = "gelu_new";
  /// Both weights start from N(0, init_scale²), cut at two standard deviations:
  /// nearly the identity.
  TORCH_ARG(double, init_scale) = 1e-3;
  /// The up-projection starts at zero: the identity to the bit.
  TORCH_ARG(bool, zero_up) = false;
  /// Train every layer norm as well, as published.
  TORCH_ARG(bool, train_layer_norms) = true;
  /// In decoders, behind the attention to the encoder as well.
  TORCH_ARG(bool, cross_attention) = false;
  /// Layers without adapters (and whose layer norms stay frozen), counted from
  /// 0 through all stacks.
  TORCH_ARG(std::vector<int64_t>, leave_out);
  /// The linear layers whose output is transformed. Default: the attention's
  /// last and the feed-forward's last, by their names.
  TORCH_ARG(Targets, targets);
  /// Modules trained whole, beside the adapters: a task head.
  TORCH_ARG(std::vector<std::string>, modules_to_save);
};

namespace detail {

/// y → y + A(y) on a linear layer's output.
class HoulsbyDelta final : public BottleneckDelta {
 public:
  using BottleneckDelta::BottleneckDelta;

  bool transforms_output() const override {
    return true;
  }
  Tensor output(const Tensor& y, double scale) const override {
    return is_dropped(layer) ? y : add_term(y, y, scale);
  }

  std::shared_ptr<Delta> copy() const override {
    auto result = std::make_shared<HoulsbyDelta>(copy_of(*bottleneck), layer);
    result->train(is_training());
    return result;
  }
};

inline Plan plan(const HoulsbyOptions& options, const Network& network) {
  Plan result;
  result.method = "HOULSBY";
  result.options = options;
  const auto standard = layers_in_roles(
      network, {"attention_output", "output"}, options.cross_attention());
  const auto chosen = options.targets().empty()
      ? standard
      : layers_in_targets(
            network,
            options.targets(),
            "targets",
            "a linear layer",
            [](const Layer& layer) { return output_width(layer) > 0; });
  TORCH_CHECK(
      !chosen.empty(),
      "peft: Houlsby adapters find neither the last layer of an attention nor "
      "of a feed-forward by name; name the linear layers whose output they are "
      "to transform by targets({...}).",
      linear_layers_of(network));
  const LayerNumbers numbers(standard, chosen);
  check_leave_out(options.leave_out(), numbers.count());

  const std::optional<int64_t> r = options.reduction_factor()
      ? options.bottleneck()
      : options.bottleneck().value_or(64);
  for (const Layer* layer : chosen) {
    const int64_t number = numbers.of(layer->name);
    if (is_left_out(options.leave_out(), number) ||
        is_inside(layer->name, options.modules_to_save())) {
      continue;
    }
    const int64_t d = output_width(*layer);
    const std::string key = output_parameter(*layer);
    const Tensor tensor = layer->parameter(key);
    const auto made =
        BottleneckOptions(d, bottleneck_width(d, r, options.reduction_factor()))
            .non_linearity(options.non_linearity())
            .init("truncated_normal")
            .init_scale(options.init_scale())
            .zero_up(options.zero_up());
    result.sites.push_back(
        {layer->name,
         layer->path(key),
         layer->name,
         tensor,
         std::make_shared<HoulsbyDelta>(
             make_bottleneck(made, tensor), number)});
  }
  for (const auto& layer : network) {
    if (!options.train_layer_norms() || role_of(layer) != "layer_norm" ||
        is_left_out(options.leave_out(), numbers.of(layer.name)) ||
        is_inside(layer.name, options.modules_to_save())) {
      continue;
    }
    for (const auto& p : layer.parameters) {
      result.sites.push_back(plan_copy(layer, p.first));
    }
  }
  plan_modules_to_save(network, options.modules_to_save(), result.sites);
  return result;
}

} // namespace detail

/// Puts Houlsby adapters on `model` and freezes everything else.
inline Adapter attach(
    torch::nn::Module& model,
    const HoulsbyOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
