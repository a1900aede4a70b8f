#pragma once

// The bottleneck that the adapters of Houlsby, Pfeiffer and He are made of:
//
//   A(x) = s · (up g(down x + b) + b')       down [r, d], up [d, r]
//
// a module of its own, and what the three methods share. Where A reads and what
// it is added to, the methods' own headers say.

#include <peft/core/attach.h>
#include <peft/functional/layers.h>
#include <peft/methods/adapter_drop.h>
#include <peft/methods/bottleneck/sites.h>

#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/init.h>
#include <torch/nn/pimpl.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for Bottleneck.
struct BottleneckOptions {
  BottleneckOptions(int64_t width, int64_t bottleneck)
      : width_(width), bottleneck_(bottleneck) {}

  /// d, and r.
  TORCH_ARG(int64_t, width);
  TORCH_ARG(int64_t, bottleneck);
  /// g: "relu", "gelu", "gelu_new" (its tanh form), "silu" or "swish", "tanh",
  /// "sigmoid", "leaky_relu".
  TORCH_ARG(std::string, non_linearity) = "relu";
  /// Both weights from "normal" (N(0, init_scale²)) or "truncated_normal" (the
  /// same within two standard deviations); or "lora" (down as that of a
  /// torch::nn::Linear, up zero). Biases start at zero.
  TORCH_ARG(std::string, init) = "normal";
  TORCH_ARG(double, init_scale) = 0.02;
  /// up starts at zero: A(x) = 0 to the bit.
  TORCH_ARG(bool, zero_up) = false;
  /// s, or a parameter in its place that starts at 1.
  TORCH_ARG(double, scaling) = 1;
  TORCH_ARG(bool, learned_scaling) = false;
  /// A layer norm of A's own: "none", "in" (of x), "out" (of s · up).
  TORCH_ARG(std::string, layer_norm) = "none";
  /// On s · up, in training mode.
  TORCH_ARG(double, dropout) = 0;
  /// b and b'.
  TORCH_ARG(bool, bias) = true;
};

namespace detail {

using Activation = Tensor (*)(const Tensor&);

/// The non-linearities by adapter-hub's names.
inline const std::map<std::string, Activation>& activations() {
  static const std::map<std::string, Activation> all{
      {"relu", [](const Tensor& x) { return at::relu(x); }},
      {"gelu", [](const Tensor& x) { return at::gelu(x); }},
      {"gelu_new", [](const Tensor& x) { return at::gelu(x, "tanh"); }},
      {"silu", [](const Tensor& x) { return at::silu(x); }},
      {"swish", [](const Tensor& x) { return at::silu(x); }},
      {"tanh", [](const Tensor& x) { return at::tanh(x); }},
      {"sigmoid", [](const Tensor& x) { return at::sigmoid(x); }},
      {"leaky_relu", [](const Tensor& x) { return at::leaky_relu(x); }}};
  return all;
}

inline void check(const BottleneckOptions& options) {
  TORCH_CHECK_VALUE(
      options.bottleneck() >= 1,
      "peft: a bottleneck has 1 feature or more, got ",
      options.bottleneck());
  TORCH_CHECK_VALUE(
      options.bottleneck() <= options.width(),
      "peft: a bottleneck of ",
      options.bottleneck(),
      " features is wider than the ",
      options.width(),
      " of its layer; choose a smaller one");
  std::string known;
  for (const auto& item : activations()) {
    known += (known.empty() ? "" : ", ") + item.first;
  }
  TORCH_CHECK_VALUE(
      activations().count(options.non_linearity()) != 0,
      "peft: the bottleneck knows no non_linearity '",
      options.non_linearity(),
      "'; choose among ",
      known);
  TORCH_CHECK_VALUE(
      is_one_of(
          options.init(), {"normal", "truncated_normal", "lora", "empty"}),
      "peft: init must be 'normal', 'truncated_normal' or 'lora', got '",
      options.init(),
      "'");
  TORCH_CHECK_VALUE(
      options.init_scale() > 0 && std::isfinite(options.init_scale()),
      "peft: init_scale must be positive, got ",
      options.init_scale());
  TORCH_CHECK_VALUE(
      std::isfinite(options.scaling()),
      "peft: scaling must be finite, got ",
      options.scaling());
  TORCH_CHECK_VALUE(
      is_one_of(options.layer_norm(), {"none", "in", "out"}),
      "peft: the bottleneck's layer_norm must be 'none', 'in' or 'out', got '",
      options.layer_norm(),
      "'");
  TORCH_CHECK_VALUE(
      options.dropout() >= 0.0 && options.dropout() < 1.0,
      "peft: dropout must lie in [0, 1), got ",
      options.dropout());
}

/// N(0, std²) within two standard deviations, by the inverse of Φ.
inline void truncated_normal_(Tensor t, double std) {
  const double edge = std::erf(std::sqrt(2.0)); // 2 Φ(2) - 1
  t.uniform_(-edge, edge).erfinv_().mul_(std * std::sqrt(2.0));
  t.clamp_(-2 * std, 2 * std);
}

} // namespace detail

/// A(x) = s · (up g(down x + b) + b'), `[*, width]` -> the same.
class BottleneckImpl : public torch::nn::Cloneable<BottleneckImpl> {
 public:
  BottleneckImpl(int64_t width, int64_t bottleneck)
      : BottleneckImpl(BottleneckOptions(width, bottleneck)) {}
  /// With parameters of this dtype on this device; their values are drawn on
  /// the CPU all the same.
  explicit BottleneckImpl(
      BottleneckOptions options_,
      torch::TensorOptions where = {})
      : options(std::move(options_)), where_(where) {
    reset();
  }

  void reset() override {
    detail::check(options);
    torch::NoGradGuard no_grad;
    const int64_t d = options.width(), r = options.bottleneck();
    Tensor down = torch::zeros({r, d}), up = torch::zeros({d, r});
    initialise(down, up);
    const auto add = [&](const char* name, const Tensor& value) {
      return register_parameter(name, value.to(where_));
    };
    down_weight = add("down_weight", down);
    up_weight = add("up_weight", up);
    if (options.bias()) {
      down_bias = add("down_bias", torch::zeros({r}));
      up_bias = add("up_bias", torch::zeros({d}));
    }
    if (options.layer_norm() != "none") {
      norm_weight = add("norm_weight", torch::ones({d}));
      norm_bias = add("norm_bias", torch::zeros({d}));
    }
    if (options.learned_scaling()) {
      scaling = add("scaling", torch::ones({1}));
    }
  }

  Tensor forward(const Tensor& x) const {
    using functional::optional;
    Tensor h = x.to(down_weight.scalar_type());
    if (options.layer_norm() == "in") {
      h = at::layer_norm(h, {options.width()}, norm_weight, norm_bias);
    }
    h = at::linear(h, down_weight, optional(down_bias));
    h = detail::activations().at(options.non_linearity())(h);
    h = at::linear(h, up_weight, optional(up_bias));
    if (scaling.defined()) {
      h = h * scaling;
    } else if (options.scaling() != 1.0) {
      h = h * options.scaling();
    }
    h = at::dropout(h, options.dropout(), is_training());
    if (options.layer_norm() == "out") {
      h = at::layer_norm(h, {options.width()}, norm_weight, norm_bias);
    }
    return h.to(x.scalar_type());
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "peft::Bottleneck(" << options.width() << ", "
           << options.bottleneck() << ", " << options.non_linearity() << ")";
  }

  BottleneckOptions options;
  Tensor down_weight; // [r, d]
  Tensor down_bias; // [r]
  Tensor up_weight; // [d, r]
  Tensor up_bias; // [d]
  Tensor norm_weight, norm_bias; // [d]
  Tensor scaling; // [1]

 private:
  void initialise(const Tensor& down, const Tensor& up) const {
    if (options.init() == "empty") { // to be filled from a file
      return;
    }
    if (options.init() == "lora") {
      torch::nn::init::kaiming_uniform_(down, std::sqrt(5.0));
      return;
    }
    for (const Tensor& weight : {down, up}) {
      if (options.init() == "normal") {
        torch::nn::init::normal_(weight, 0.0, options.init_scale());
      } else {
        detail::truncated_normal_(weight, options.init_scale());
      }
    }
    if (options.zero_up()) {
      up.zero_();
    }
  }

  torch::TensorOptions where_;
};
TORCH_MODULE(Bottleneck);

namespace detail {

/// A bottleneck for a network whose weights are like `like`.
inline Bottleneck make_bottleneck(
    const BottleneckOptions& options,
    const Tensor& like) {
  c10::InferenceMode off(false);
  return Bottleneck(
      options, torch::TensorOptions(like.device()).dtype(adapter_dtype(like)));
}

/// An independent copy with the same values, requires_grad and mode, that draws
/// no random numbers.
inline Bottleneck copy_of(const BottleneckImpl& original) {
  c10::InferenceMode off(false);
  Bottleneck result(
      BottleneckOptions(original.options).init("empty"),
      original.down_weight.options().requires_grad(false));
  result->options = original.options;
  const auto values = original.named_parameters();
  for (auto& item : result->named_parameters()) {
    const Tensor& value = values[item.key()];
    item.value().set_data(value.detach().clone());
    item.value().set_requires_grad(value.requires_grad());
  }
  result->train(original.is_training());
  return result;
}

/// The tensors by adapter-hub's names. (Its layer norm in front counts as the
/// first part of "adapter_down".)
inline NamedParameters file_tensors_of(const BottleneckImpl& a) {
  const bool norm_in = a.options.layer_norm() == "in";
  const std::string down = norm_in ? "adapter_down.1." : "adapter_down.0.";
  const std::string norm =
      norm_in ? "adapter_norm_before." : "adapter_norm_after.";
  NamedParameters result{
      {down + "weight", a.down_weight},
      {down + "bias", a.down_bias},
      {"adapter_up.weight", a.up_weight},
      {"adapter_up.bias", a.up_bias},
      {norm + "weight", a.norm_weight},
      {norm + "bias", a.norm_bias},
      {"scaling", a.scaling}};
  result.erase(
      std::remove_if(
          result.begin(),
          result.end(),
          [](const auto& item) { return !item.second.defined(); }),
      result.end());
  return result;
}

/// What the deltas of the three methods share: a bottleneck in a layer of the
/// network, beside a weight that stays as it is.
class BottleneckDelta : public Delta {
 public:
  BottleneckDelta(Bottleneck bottleneck_, int64_t layer_)
      : bottleneck(register_module("bottleneck", std::move(bottleneck_))),
        layer(layer_) {}

  Tensor effective(const Tensor& weight, double /*scale*/) const override {
    return weight;
  }
  bool takes_factor(Decoration::Factor /*kind*/) const override {
    return true;
  }
  int64_t factor_features() const override {
    return bottleneck->options.width();
  }
  std::string merge_obstacle() const override {
    return "the non-linearity in its bottleneck is no change of a weight; "
           "keep the adapter, or detach it";
  }
  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    return file_tensors_of(*bottleneck);
  }
  std::string describe() const override {
    return "bottleneck r=" + std::to_string(bottleneck->options.bottleneck());
  }

  /// y + f · A(x).
  Tensor add_term(const Tensor& y, const Tensor& x, double scale) const {
    const Tensor f = factor(x, scale);
    const Tensor term = bottleneck->forward(x);
    return f.defined() ? y + term * f.to(term.scalar_type())
                       : at::add(y, term, scale);
  }

  Bottleneck bottleneck;
  /// The number of the layer, which AdapterDrop asks for.
  int64_t layer;
};

/// r by one of the two ways to give it.
inline int64_t bottleneck_width(
    int64_t width,
    std::optional<int64_t> bottleneck,
    std::optional<double> reduction_factor) {
  TORCH_CHECK_VALUE(
      !bottleneck || !reduction_factor,
      "peft: bottleneck and reduction_factor are two ways to say one thing; "
      "give only one of them");
  if (bottleneck) {
    return *bottleneck;
  }
  TORCH_CHECK_VALUE(
      *reduction_factor > 0 && std::isfinite(*reduction_factor),
      "peft: reduction_factor must be positive, got ",
      *reduction_factor);
  return static_cast<int64_t>(
      std::floor(static_cast<double>(width) / *reduction_factor));
}

} // namespace detail

} // namespace peft
