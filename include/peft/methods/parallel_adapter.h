#pragma once

// Parallel and scaled parallel adapters (He et al. 2022, arXiv:2110.04366): a
// bottleneck beside the feed-forward, on the same input.
//
//   y = FFN(x) + s · (up g(down x + b) + b')
//
// before y is added to its input and normalised. With d features, a bottleneck
// of r and L layers that are L (2 d r + r + d) parameters. up starts at zero,
// so the start is the identity to the bit.
//
// The feed-forward's first layer sees x, its second makes y. So a delta on the
// first one's weight computes the term and hands it over, within the thread, to
// a delta on the second one's bias (or weight), which adds it. A feed-forward
// of ReLU can take the adapter in for good: methods/widen.h.

#include <peft/methods/bottleneck.h>
#include <peft/methods/modules_to_save.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for parallel adapters; the defaults are adapter-hub's.
///
///   peft::ParallelAdapterOptions(512)                the paper's, for XSum
///   peft::ParallelAdapterOptions(64).inputs({"query"})
///       .targets({"attention.output.dense"})         beside the attention
struct ParallelAdapterOptions {
  ParallelAdapterOptions() = default;
  ParallelAdapterOptions(int64_t bottleneck) : bottleneck_(bottleneck) {}

  /// r, or the width divided by reduction_factor, 2 where neither is given.
  TORCH_ARG(std::optional<int64_t>, bottleneck);
  TORCH_ARG(std::optional<double>, reduction_factor);
  /// As in BottleneckOptions.
  TORCH_ARG(std::string, non_linearity) = "relu";
  /// s, or a parameter in its place that starts at 1.
  TORCH_ARG(double, scaling) = 4;
  TORCH_ARG(bool, learned_scaling) = false;
  TORCH_ARG(std::string, layer_norm) = "none";
  TORCH_ARG(double, dropout) = 0;
  /// b and b'. Without them a network without biases can be widened.
  TORCH_ARG(bool, bias) = true;
  /// Layers without an adapter, counted from 0 through all stacks.
  TORCH_ARG(std::vector<int64_t>, leave_out);
  /// The layers whose input the adapters read, and those to whose output they
  /// add; each of these goes with the input that shares most of its name.
  /// Default: first and second layer of the feed-forward, by their names.
  TORCH_ARG(Targets, inputs);
  TORCH_ARG(Targets, targets);
  /// Modules trained whole, beside the adapters: a task head.
  TORCH_ARG(std::vector<std::string>, modules_to_save);
};

namespace detail {

/// A term on its way from the layer that sees x to the one that makes y.
struct HandedOver {
  std::weak_ptr<const torch::nn::Module> from;
  Tensor term; // undefined: the layer did not run, its weight was read
};

/// This thread's terms under way, one for each pair of layers at most.
inline std::vector<HandedOver>& handed_over() {
  static thread_local std::vector<HandedOver> terms;
  return terms;
}

/// Takes what `from` has put there, if anything, and lets go of what adapters
/// that no longer exist left behind.
inline std::optional<Tensor> take_over(const torch::nn::Module* from) {
  std::optional<Tensor> result;
  auto& terms = handed_over();
  for (auto item = terms.begin(); item != terms.end();) {
    const auto owner = item->from.lock();
    if (owner.get() == from) {
      result = item->term;
    }
    item = !owner || owner.get() == from ? terms.erase(item) : item + 1;
  }
  return result;
}

/// On the weight of the layer that sees x: makes the term, leaves the layer as
/// it is.
class ParallelInputDelta final : public BottleneckDelta {
 public:
  using BottleneckDelta::BottleneckDelta;

  /// The weight is asked for: somebody reads it, or an adapter beside this one
  /// cannot do without.
  Tensor effective(const Tensor& weight, double /*scale*/) const override {
    hand_over({});
    return weight;
  }

  bool has_linear() const override {
    return true;
  }
  Tensor linear(
      const LinearCall& call,
      const Below<LinearCall>& below,
      double scale) const override {
    if (!is_dropped(layer)) {
      Tensor term = bottleneck->forward(call.x);
      const Tensor f = factor(call.x, scale);
      if (f.defined()) {
        term = term * f.to(term.scalar_type());
      } else if (scale != 1.0) {
        term = term * scale;
      }
      hand_over(term);
    }
    return below(call);
  }

  std::string merge_obstacle() const override {
    return bottleneck->options.non_linearity() == "relu"
        ? "its bottleneck is no change of a weight; beside a feed-forward of "
          "ReLU, peft::merge_by_widening(model, name) takes it in"
        : BottleneckDelta::merge_obstacle();
  }

  std::shared_ptr<Delta> copy() const override {
    auto result =
        std::make_shared<ParallelInputDelta>(copy_of(*bottleneck), layer);
    result->train(is_training());
    return result;
  }

 private:
  /// An older term of this pair is one that an exception kept from arriving.
  void hand_over(Tensor term) const {
    take_over(this);
    handed_over().push_back({weak_from_this(), std::move(term)});
  }
};

/// The term that `input` has computed for y.
inline Tensor term_for(const ParallelInputDelta& input, const Tensor& y) {
  const auto term = take_over(&input);
  TORCH_CHECK(
      term.has_value(),
      "peft: a parallel adapter misses what it computes at its first layer: "
      "that layer has not run in this thread since the second one last did, "
      "or the adapter was switched on between the two. Both must run in one "
      "thread, one after the other; pair other layers by inputs({...}) and "
      "targets({...})");
  TORCH_CHECK(
      term->defined(),
      "peft: a parallel adapter needs the input of its first layer, and that "
      "layer's weight was read instead: it is used otherwise than by linear, "
      "matmul or addmm on inputs of two dimensions or more, or an adapter "
      "beside this one on the same weight replaces it; disable that one");
  // Where a layer takes its tokens in a row (HF's Conv1D), the term has them
  // so.
  const bool in_a_row = term->dim() == 2 && y.dim() > 2 &&
      term->size(1) == y.size(-1) && term->numel() == y.numel();
  TORCH_CHECK(
      in_a_row || term->sizes() == y.sizes(),
      "peft: a parallel adapter computes ",
      term->sizes(),
      " from the input of its first layer, and the second one makes ",
      y.sizes(),
      "; the two must see the same tokens");
  return in_a_row ? term->view(y.sizes()) : *term;
}

/// On the bias, or the weight, of the layer that makes y: adds the term.
class ParallelOutputDelta final : public Delta {
 public:
  explicit ParallelOutputDelta(std::shared_ptr<const ParallelInputDelta> input)
      : input_(std::move(input)) {}

  Tensor effective(const Tensor& weight, double /*scale*/) const override {
    return weight;
  }
  bool transforms_output() const override {
    return true;
  }
  Tensor output(const Tensor& y, double /*scale*/) const override {
    if (is_dropped(input_->layer)) {
      return y;
    }
    return (y + term_for(*input_, y)).to(y.scalar_type());
  }

  void relink(const std::function<std::shared_ptr<Delta>(const Delta*)>&
                  copy_of) override {
    input_ = std::dynamic_pointer_cast<const ParallelInputDelta>(
        copy_of(input_.get()));
  }

  std::string merge_obstacle() const override {
    return input_->merge_obstacle();
  }
  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    return {};
  }
  std::shared_ptr<Delta> copy() const override {
    auto result = std::make_shared<ParallelOutputDelta>(input_);
    result->train(is_training());
    return result;
  }
  std::string describe() const override {
    return "adds bottleneck";
  }

  const ParallelInputDelta& input() const {
    return *input_;
  }

 private:
  std::shared_ptr<const ParallelInputDelta> input_;
};

/// The parameter whose use shows what goes into a layer; "" for other modules.
inline std::string input_parameter(const Layer& layer) {
  for (const char* key : {"weight", "in_proj_weight"}) {
    const Tensor weight = layer.parameter(key);
    if (weight.defined() && weight.dim() == 2 &&
        (layer.kind == LayerKind::linear || layer.kind == LayerKind::other ||
         layer.kind == LayerKind::attention)) {
      return key;
    }
  }
  return {};
}

/// The input in the same numbered layer whose name has most in common with
/// `output`, the first of several.
inline const Layer* partner_of(
    const Layer& output,
    const std::vector<const Layer*>& inputs) {
  const Layer* best = nullptr;
  int64_t longest = -1;
  for (const Layer* input : inputs) {
    const auto& a = input->name;
    const auto& b = output.name;
    if (layer_prefix(a) != layer_prefix(b)) {
      continue;
    }
    int64_t common = 0;
    const auto shorter = static_cast<int64_t>(std::min(a.size(), b.size()));
    while (common < shorter && a[common] == b[common]) {
      ++common;
    }
    if (common > longest) {
      best = input;
      longest = common;
    }
  }
  return best;
}

inline int64_t bottleneck_width(
    const ParallelAdapterOptions& options,
    int64_t width) {
  const bool neither = !options.bottleneck() && !options.reduction_factor();
  return bottleneck_width(
      width,
      options.bottleneck(),
      neither ? std::optional<double>(2) : options.reduction_factor());
}

inline BottleneckOptions bottleneck_options(
    const ParallelAdapterOptions& options,
    int64_t width) {
  return BottleneckOptions(width, bottleneck_width(options, width))
      .non_linearity(options.non_linearity())
      .init("lora")
      .scaling(options.scaling())
      .learned_scaling(options.learned_scaling())
      .layer_norm(options.layer_norm())
      .dropout(options.dropout())
      .bias(options.bias());
}

/// The layers to whose output the adapters add.
inline std::vector<const Layer*> parallel_outputs(
    const ParallelAdapterOptions& options,
    const Network& network) {
  return options.targets().empty()
      ? layers_in_roles(network, {"output"})
      : layers_in_targets(
            network,
            options.targets(),
            "targets",
            "a linear layer",
            [](const Layer& layer) { return output_width(layer) > 0; });
}

inline Plan plan(
    const ParallelAdapterOptions& options,
    const Network& network) {
  Plan result;
  result.method = "PARALLEL_ADAPTER";
  result.options = options;
  const auto outputs = parallel_outputs(options, network);
  const auto inputs = options.inputs().empty()
      ? layers_in_roles(network, {"intermediate"})
      : layers_in_targets(
            network,
            options.inputs(),
            "inputs",
            "a linear layer",
            [](const Layer& layer) { return !input_parameter(layer).empty(); });
  TORCH_CHECK(
      !outputs.empty() && !inputs.empty(),
      "peft: parallel adapters find no ",
      inputs.empty() ? "first" : "second",
      " layer of a feed-forward by name; name the layers whose input they are "
      "to read by inputs({...}) and those to whose output they add by "
      "targets({...}).",
      linear_layers_of(network));
  const LayerNumbers numbers(layers_in_roles(network, {"output"}), outputs);
  check_leave_out(options.leave_out(), numbers.count());

  for (const Layer* output : outputs) {
    const int64_t number = numbers.of(output->name);
    if (is_left_out(options.leave_out(), number) ||
        is_inside(output->name, options.modules_to_save())) {
      continue;
    }
    const Layer* input = partner_of(*output, inputs);
    TORCH_CHECK(
        input != nullptr,
        "peft: a parallel adapter finds no layer in front of '",
        output->name,
        "' whose input it could read; name it by inputs({...}).",
        linear_layers_of(network));
    const std::string key = input_parameter(*input);
    const Tensor weight = input->parameter(key);
    const int64_t d = output_width(*output);
    const bool fits = input->kind == LayerKind::other
        ? weight.size(0) == d || weight.size(1) == d
        : weight.size(1) == d;
    TORCH_CHECK(
        fits,
        "peft: a parallel adapter adds to '",
        output->name,
        "', which has ",
        d,
        " features, what it makes of the input of '",
        input->name,
        "', whose weight is ",
        weight.sizes(),
        "; the two must have the same width");
    auto made = make_bottleneck(bottleneck_options(options, d), weight);
    auto first = std::make_shared<ParallelInputDelta>(std::move(made), number);
    const std::string last = output_parameter(*output);
    result.sites.push_back(
        {input->name, input->path(key), output->name, weight, first});
    result.sites.push_back(
        {output->name,
         output->path(last),
         output->name,
         output->parameter(last),
         std::make_shared<ParallelOutputDelta>(first)});
  }
  plan_modules_to_save(network, options.modules_to_save(), result.sites);
  return result;
}

} // namespace detail

/// Puts parallel adapters on `model` and freezes everything else.
inline Adapter attach(
    torch::nn::Module& model,
    const ParallelAdapterOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
