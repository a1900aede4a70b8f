#pragma once

// Pfeiffer adapters (Pfeiffer et al. 2020, arXiv:2005.00247): one bottleneck a
// layer, behind the feed-forward.
//
// Where a layer ends in a layer norm (BERT, torch::nn::TransformerEncoder), v
// being what goes into that norm, the feed-forward's result plus its input:
//
//   y = LN(v + A(LN(v)))
//
// The published form is o = A(LN(f + x)) + f, y = LN(o + x), f the feed-
// forward's result and x its input: LN(f + x + A(LN(f + x))), which is this.
//
// Where layers normalise first (GPT-2, LLaMA, T5), there is no such norm, and
// h = f + x being what the layer gives,
//
//   y = h + A(h)
//
// through the network's loop over layers (core/layer_loop.h). With d features,
// a bottleneck of r and L layers that are L (2 d r + r + d) parameters. The
// published initialisation, N(0, 0.02²), is not the identity; zero_up is.

#include <peft/core/layer_loop.h>
#include <peft/methods/bottleneck.h>
#include <peft/methods/modules_to_save.h>

#include <torch/nn/modules/transformerlayer.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for Pfeiffer adapters; the defaults are the published ones.
///
///   peft::PfeifferOptions()          a bottleneck of width / 16
///   peft::PfeifferOptions(48)
struct PfeifferOptions {
  PfeifferOptions() = default;
  PfeifferOptions(int64_t bottleneck) : bottleneck_(bottleneck) {}

  /// r, or the width divided by reduction_factor, 16 where neither is given.
  TORCH_ARG(std::optional<int64_t>, bottleneck);
  TORCH_ARG(std::optional<double>, reduction_factor);
  /// As in BottleneckOptions.
  TORCH_ARG(std::string, non_linearity) = "relu";
  /// Both weights start from N(0, init_scale²).
  TORCH_ARG(double, init_scale) = 0.02;
  /// The up-projection starts at zero: the identity to the bit.
  TORCH_ARG(bool, zero_up) = false;
  /// Layers without an adapter, counted from 0 through all stacks.
  TORCH_ARG(std::vector<int64_t>, leave_out);
  /// The layer norms around which the adapters go. Default: those behind the
  /// feed-forward, by their names; else the loop over layers.
  TORCH_ARG(Targets, targets);
  /// Modules trained whole, beside the adapters: a task head.
  TORCH_ARG(std::vector<std::string>, modules_to_save);
};

namespace detail {

/// y = LN(v + A(LN(v))) around a layer norm.
class PfeifferNormDelta final : public BottleneckDelta {
 public:
  using BottleneckDelta::BottleneckDelta;

  bool transforms_output() const override {
    return true;
  }
  Tensor around_norm(
      const Tensor& v,
      c10::function_ref<Tensor(const Tensor&)> norm,
      double scale) const override {
    const Tensor z = norm(v);
    return is_dropped(layer) ? z : norm(add_term(v, z, scale));
  }

  std::shared_ptr<Delta> copy() const override {
    auto result =
        std::make_shared<PfeifferNormDelta>(copy_of(*bottleneck), layer);
    result->train(is_training());
    return result;
  }
};

/// y = h + A(h) behind the layers of one stack.
class PfeifferLoopDelta : public LoopDelta {
 public:
  /// One bottleneck a layer, null where it is left out; `first` is the number
  /// of the stack's first layer.
  PfeifferLoopDelta(std::vector<Bottleneck> bottlenecks, int64_t first)
      : bottlenecks_(std::move(bottlenecks)), first_(first) {
    for (size_t i = 0; i < bottlenecks_.size(); ++i) {
      if (!bottlenecks_[i].is_empty()) {
        register_module(std::to_string(i), bottlenecks_[i]);
      }
    }
  }

  Tensor layer(
      const LayerCall& call,
      const LayerLoopRun& /*loop*/,
      const std::function<Tensor(const LayerCall&)>& below,
      double scale) const override {
    const Tensor h = below(call);
    return acts_in(call.layer) ? add_term(h, h, call.layer, scale) : h;
  }

  bool takes_factor(Decoration::Factor /*kind*/) const override {
    return true;
  }
  int64_t factor_features() const override {
    for (const auto& bottleneck : bottlenecks_) {
      if (!bottleneck.is_empty()) {
        return bottleneck->options.width();
      }
    }
    return 0;
  }
  int64_t factor_parts() const override {
    return part_of(static_cast<int64_t>(bottlenecks_.size()));
  }

  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    NamedParameters result;
    for (size_t i = 0; i < bottlenecks_.size(); ++i) {
      if (!bottlenecks_[i].is_empty()) {
        for (auto& item : file_tensors_of(*bottlenecks_[i])) {
          result.emplace_back(
              std::to_string(i) + "." + item.first, std::move(item.second));
        }
      }
    }
    return result;
  }

  std::shared_ptr<Delta> copy() const override {
    auto result = std::make_shared<PfeifferLoopDelta>(copies(), first_);
    result->train(is_training());
    return result;
  }

  /// One a layer, null where it is left out.
  const std::vector<Bottleneck>& bottlenecks() const {
    return bottlenecks_;
  }
  /// The number of the stack's first layer.
  int64_t first() const {
    return first_;
  }

  std::string describe() const override {
    for (const auto& bottleneck : bottlenecks_) {
      if (!bottleneck.is_empty()) {
        return "bottleneck r=" +
            std::to_string(bottleneck->options.bottleneck());
      }
    }
    return "bottleneck";
  }

 protected:
  /// Whether there is an adapter behind this layer of the stack.
  bool acts_in(int64_t layer) const {
    TORCH_CHECK(
        layer < static_cast<int64_t>(bottlenecks_.size()),
        "peft: the loop runs layer ",
        layer,
        ", and its LayerLoopOptions promised ",
        bottlenecks_.size(),
        " layers when the adapter was attached");
    return !bottlenecks_[layer].is_empty() && !is_dropped(first_ + layer);
  }
  /// y + f · A(h).
  Tensor add_term(const Tensor& y, const Tensor& h, int64_t layer, double scale)
      const {
    const Tensor f = factor(h, scale, part_of(layer));
    const Tensor term = bottlenecks_[layer]->forward(h);
    return f.defined() ? y + term * f.to(term.scalar_type())
                       : at::add(y, term, scale);
  }
  std::vector<Bottleneck> copies() const {
    std::vector<Bottleneck> result;
    for (const auto& bottleneck : bottlenecks_) {
      result.push_back(
          bottleneck.is_empty() ? Bottleneck(nullptr) : copy_of(*bottleneck));
    }
    return result;
  }

 private:
  /// How many layers below this one have a bottleneck.
  int64_t part_of(int64_t layer) const {
    return std::count_if(
        bottlenecks_.begin(),
        bottlenecks_.begin() + layer,
        [](const Bottleneck& bottleneck) { return !bottleneck.is_empty(); });
  }

  std::vector<Bottleneck> bottlenecks_;
  int64_t first_;
};

/// The layer norm that ends the layer whose feed-forward ends in `output`; null
/// where there is none or the names do not tell.
inline const Layer* norm_behind(const Network& network, const Layer& output) {
  const auto find = [&](const std::string& name) -> const Layer* {
    for (const auto& layer : network) {
      if (layer.name == name) {
        return &layer;
      }
    }
    return nullptr;
  };
  const auto up = [](const std::string& name) {
    const auto dot = name.rfind('.');
    return dot == std::string::npos ? "" : name.substr(0, dot);
  };
  const auto below = [](const std::string& name, const char* child) {
    return name.empty() ? child : name + "." + child;
  };
  const std::string parent = up(output.name);
  const Layer* module = find(parent);
  std::string name;
  if (ends_with(output.name, "output.dense")) {
    name = below(parent, "LayerNorm"); // BERT
  } else if (ends_with(output.name, "ffn.lin2")) {
    name = below(up(parent), "output_layer_norm"); // DistilBERT
  } else if (module != nullptr && module->module != nullptr) {
    if (module->module->as<torch::nn::TransformerEncoderLayerImpl>()) {
      name = below(parent, "norm2");
    } else if (module->module->as<torch::nn::TransformerDecoderLayerImpl>()) {
      name = below(parent, "norm3");
    }
  }
  const Layer* norm = name.empty() ? nullptr : find(name);
  return norm != nullptr && norm->kind == LayerKind::normalization ? norm
                                                                   : nullptr;
}

inline int64_t bottleneck_width(const PfeifferOptions& options, int64_t width) {
  const bool neither = !options.bottleneck() && !options.reduction_factor();
  return bottleneck_width(
      width,
      options.bottleneck(),
      neither ? std::optional<double>(16) : options.reduction_factor());
}

inline BottleneckOptions bottleneck_options(
    const PfeifferOptions& options,
    int64_t width) {
  return BottleneckOptions(width, bottleneck_width(options, width))
      .non_linearity(options.non_linearity())
      .init_scale(options.init_scale())
      .zero_up(options.zero_up());
}

/// Adapters around layer norms.
inline void plan_norms(
    const PfeifferOptions& options,
    const std::vector<const Layer*>& norms,
    std::vector<PlannedSite>& sites) {
  const LayerNumbers numbers(norms, {});
  check_leave_out(options.leave_out(), numbers.count());
  for (const Layer* norm : norms) {
    const int64_t number = numbers.of(norm->name);
    if (is_left_out(options.leave_out(), number) ||
        is_inside(norm->name, options.modules_to_save())) {
      continue;
    }
    const Tensor weight = norm->parameter("weight");
    sites.push_back(
        {norm->name,
         norm->path("weight"),
         norm->name,
         weight,
         std::make_shared<PfeifferNormDelta>(
             make_bottleneck(
                 bottleneck_options(options, weight.numel()), weight),
             number)});
  }
}

/// Adapters in the loops over layers.
inline void plan_loops(
    const PfeifferOptions& options,
    const Network& network,
    std::vector<PlannedSite>& sites) {
  const auto loops = call_sites<LayerLoopImpl>(network);
  TORCH_CHECK(
      !loops.empty(),
      "peft: Pfeiffer adapters act on what a layer gives. Where layers end in "
      "a "
      "layer norm, name those norms by targets({...}). Where layers normalise "
      "first, let a LayerLoop run them (peft/core/layer_loop.h):\n",
      kLayerLoopLines);
  int64_t count = 0;
  for (const auto& item : loops) {
    count += item.second->options.num_layers();
  }
  check_leave_out(options.leave_out(), count);
  const Tensor like = any_parameter(network);
  int64_t first = 0;
  for (const auto& [name, loop] : loops) {
    std::vector<Bottleneck> bottlenecks;
    bool any = false;
    for (int64_t i = 0; i < loop->options.num_layers(); ++i) {
      const bool out = is_left_out(options.leave_out(), first + i);
      any = any || !out;
      bottlenecks.push_back(
          out ? Bottleneck(nullptr)
              : make_bottleneck(
                    bottleneck_options(options, loop->options.hidden_size()),
                    like));
    }
    if (any) {
      PlannedSite site;
      site.name = name;
      site.parameter = name;
      site.file_prefix = name;
      site.delta =
          std::make_shared<PfeifferLoopDelta>(std::move(bottlenecks), first);
      site.call_site = loop->site();
      sites.push_back(std::move(site));
    }
    first += loop->options.num_layers();
  }
}

/// The layer norms around which the adapters go; none: they go into the loops.
inline std::vector<const Layer*> pfeiffer_norms(
    const PfeifferOptions& options,
    const Network& network) {
  if (!options.targets().empty()) {
    const auto is_layer_norm = [](const Layer& layer) {
      return layer.kind == LayerKind::normalization &&
          layer.parameter("weight").defined() &&
          (layer.module == nullptr ||
           layer.module->as<torch::nn::LayerNormImpl>() != nullptr) &&
          layer.parameter("weight").dim() == 1;
    };
    return layers_in_targets(
        network,
        options.targets(),
        "targets",
        "a layer norm with a weight",
        is_layer_norm);
  }
  std::vector<const Layer*> norms;
  for (const Layer* output : layers_in_roles(network, {"output"})) {
    norms.push_back(norm_behind(network, *output));
    if (norms.back() == nullptr) {
      return {};
    }
  }
  return norms;
}

inline Plan plan(const PfeifferOptions& options, const Network& network) {
  Plan result;
  result.method = "PFEIFFER";
  result.options = options;
  const auto norms = pfeiffer_norms(options, network);
  if (!norms.empty()) {
    plan_norms(options, norms, result.sites);
  } else {
    plan_loops(options, network, result.sites);
  }
  plan_modules_to_save(network, options.modules_to_save(), result.sites);
  return result;
}

} // namespace detail

/// Puts Pfeiffer adapters on `model` and freezes everything else.
inline Adapter attach(
    torch::nn::Module& model,
    const PfeifferOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
