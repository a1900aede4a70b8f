#pragma once

// LLM-Adapters (Hu et al. 2023, arXiv:2304.01933): adapters for decoders that
// normalise first, placed inside the linear layers themselves.
//
//   series     before a layer that opens a sub-layer:  y = W (x + A(x))
//              behind one that closes it:              y = W x + A(W x)
//   parallel   beside a layer:                         y = W x + A(x)
//
//   A(x) = s · up g(down drop(x))     down [r, inputs], up [outputs, r]
//
// without biases. By default, in LLaMA: AdapterH in series at gate_proj,
// up_proj and down_proj, AdapterP in series at down_proj, the parallel adapter
// at q_proj, k_proj and v_proj, LoRA at q_proj and v_proj, a prefix of 30.

#include <peft/methods/bottleneck.h>
#include <peft/methods/lora.h>
#include <peft/methods/modules_to_save.h>
#include <peft/methods/prefix.h>
#include <peft/methods/union.h>

#include <torch/arg.h>
#include <torch/nn/init.h>

#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for bottlenecks in linear layers, by the names of the paper's code.
///
///   peft::LinearBottleneckOptions(256)                     AdapterH
///   peft::LinearBottleneckOptions(256).use_adapterp(true)
///   peft::LinearBottleneckOptions(256).use_parallel_adapter(true)
struct LinearBottleneckOptions {
  LinearBottleneckOptions(int64_t bottleneck_size = 256)
      : bottleneck_size_(bottleneck_size) {}

  TORCH_ARG(int64_t, bottleneck_size);
  /// As in BottleneckOptions.
  TORCH_ARG(std::string, non_linearity) = "tanh";
  /// On what goes into A, in training.
  TORCH_ARG(double, adapter_dropout) = 0;
  /// s, or a parameter in its place that starts at 1.
  TORCH_ARG(double, scaling) = 1;
  TORCH_ARG(bool, learned_scaling) = false;
  TORCH_ARG(bool, use_parallel_adapter) = false;
  TORCH_ARG(bool, use_adapterp) = false;
  /// "bert" (both from N(0, 0.02²)), or "mam_adapter" (down as that of a
  /// torch::nn::Linear, up zero).
  TORCH_ARG(std::string, init_weights) = "bert";
  /// The linear layers. Default: by their names, as said above.
  TORCH_ARG(Targets, targets);
  /// Modules trained whole, beside the bottlenecks: a task head.
  TORCH_ARG(std::vector<std::string>, modules_to_save);
};

/// Options for what the paper compares and combines: any of the three.
///
///   peft::LlmAdaptersOptions::adapter_h()
///   peft::LlmAdaptersOptions::adapter_p()
///   peft::LlmAdaptersOptions::parallel()
///   peft::LlmAdaptersOptions().lora(peft::LoraOptions(8).alpha(16)).prefix(30)
struct LlmAdaptersOptions {
  static LlmAdaptersOptions adapter_h() {
    return LlmAdaptersOptions().bottleneck(LinearBottleneckOptions());
  }
  static LlmAdaptersOptions adapter_p() {
    return LlmAdaptersOptions().bottleneck(
        LinearBottleneckOptions().use_adapterp(true));
  }
  static LlmAdaptersOptions parallel() {
    return LlmAdaptersOptions().bottleneck(
        LinearBottleneckOptions().use_parallel_adapter(true));
  }

  TORCH_ARG(std::optional<LoraOptions>, lora);
  TORCH_ARG(std::optional<LinearBottleneckOptions>, bottleneck);
  TORCH_ARG(std::optional<PrefixOptions>, prefix);
  /// Modules trained whole, beside the others: a task head.
  TORCH_ARG(std::vector<std::string>, modules_to_save);
};

namespace detail {

/// Where A stands at its linear layer.
enum class BottleneckPlace { before, behind, beside };

class LinearBottleneckDelta final : public Delta {
 public:
  LinearBottleneckDelta(
      const LinearBottleneckOptions& options,
      BottleneckPlace place,
      int64_t inputs,
      int64_t outputs,
      const at::TensorOptions& where)
      : options_(options), place_(place) {
    c10::InferenceMode off(false);
    torch::NoGradGuard no_grad;
    const int64_t r = options.bottleneck_size();
    Tensor down = torch::empty({r, inputs}), up = torch::empty({outputs, r});
    if (options.init_weights() == "bert") {
      down.normal_(0, 0.02);
      up.normal_(0, 0.02);
    } else {
      torch::nn::init::kaiming_uniform_(down, std::sqrt(5.0));
      up.zero_();
    }
    adapter_down = register_parameter("adapter_down", down.to(where));
    adapter_up = register_parameter("adapter_up", up.to(where));
    if (options.learned_scaling()) {
      scaling =
          register_parameter("adapter_scaling", torch::ones({1}).to(where));
    }
  }

  Tensor effective(const Tensor& weight, double /*scale*/) const override {
    TORCH_CHECK(
        transforms_output(),
        "peft: '",
        describe(),
        "' needs the input of its layer, and the weight was read instead: it "
        "is used otherwise than by linear, matmul or addmm, or an adapter "
        "beside this one on the same weight replaces it; disable that one");
    return weight;
  }

  bool has_linear() const override {
    return !transforms_output();
  }
  Tensor linear(
      const LinearCall& call,
      const Below<LinearCall>& below,
      double scale) const override {
    const Tensor term = term_of(call.x, scale);
    if (place_ == BottleneckPlace::before) {
      const Tensor x = (call.x + term).to(call.x.scalar_type());
      return below(
          {x, call.weight, call.bias, call.rows, call.transposed, call.packed});
    }
    const Tensor y = below(call);
    const bool whole = call.transposed; // then the rows are those of x
    return (y + (whole ? term : term.slice(-1, call.rows.begin, call.rows.end)))
        .to(y.scalar_type());
  }

  bool transforms_output() const override {
    return place_ == BottleneckPlace::behind;
  }
  Tensor output(const Tensor& y, double scale) const override {
    return (y + term_of(y, scale)).to(y.scalar_type());
  }

  bool takes_factor(Decoration::Factor /*kind*/) const override {
    return true;
  }
  int64_t factor_features() const override {
    return adapter_down.size(1);
  }
  std::string merge_obstacle() const override {
    return "the non-linearity in its bottleneck is no change of a weight; "
           "keep the adapter, or detach it";
  }

  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    std::vector<std::pair<std::string, Tensor>> result{
        {"adapter_down.weight", adapter_down},
        {"adapter_up.weight", adapter_up}};
    if (scaling.defined()) {
      result.emplace_back("adapter_scaling", scaling);
    }
    return result;
  }
  std::shared_ptr<Delta> copy() const override {
    auto result = std::make_shared<LinearBottleneckDelta>(
        options_,
        place_,
        adapter_down.size(1),
        adapter_up.size(0),
        adapter_down.options().requires_grad(false));
    const auto values = named_parameters(/*recurse=*/false);
    for (auto& item : result->named_parameters()) {
      item.value().set_data(values[item.key()].detach().clone());
      item.value().set_requires_grad(values[item.key()].requires_grad());
    }
    result->train(is_training());
    return result;
  }
  std::string describe() const override {
    return std::string(
               place_ == BottleneckPlace::before       ? "before"
                   : place_ == BottleneckPlace::behind ? "behind"
                                                       : "beside") +
        " bottleneck r=" + std::to_string(adapter_down.size(0));
  }

  Tensor adapter_down; // [r, inputs]
  Tensor adapter_up; // [outputs, r]
  Tensor scaling; // [1], or undefined

 private:
  /// f · A(x).
  Tensor term_of(const Tensor& x, double scale) const {
    const Tensor own = at::dropout(
        x.to(adapter_down.scalar_type()),
        options_.adapter_dropout(),
        is_training());
    Tensor term = at::linear(
        activations().at(options_.non_linearity())(
            at::linear(own, adapter_down)),
        adapter_up);
    const double s = scale * (scaling.defined() ? 1 : options_.scaling());
    if (scaling.defined()) {
      term = term * scaling;
    }
    return times_factor(s == 1 ? term : term * s, factor(x));
  }

  LinearBottleneckOptions options_;
  BottleneckPlace place_;
};

inline void check(const LinearBottleneckOptions& options) {
  TORCH_CHECK_VALUE(
      options.bottleneck_size() >= 1,
      "peft: bottleneck_size must be 1 or more, got ",
      options.bottleneck_size());
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
      options.adapter_dropout() >= 0 && options.adapter_dropout() < 1,
      "peft: adapter_dropout must lie in [0, 1), got ",
      options.adapter_dropout());
  TORCH_CHECK_VALUE(
      std::isfinite(options.scaling()),
      "peft: scaling must be finite, got ",
      options.scaling());
  TORCH_CHECK_VALUE(
      is_one_of(options.init_weights(), {"bert", "mam_adapter"}),
      "peft: init_weights must be 'bert' or 'mam_adapter', got '",
      options.init_weights(),
      "'");
  TORCH_CHECK_VALUE(
      !options.use_parallel_adapter() || !options.use_adapterp(),
      "peft: use_parallel_adapter and use_adapterp are two placements; choose "
      "one");
}

/// Whether the layer is one that the paper's code has by default.
inline bool is_default_place(
    const LinearBottleneckOptions& options,
    const Layer& layer) {
  const std::string role = role_of(layer);
  if (options.use_parallel_adapter()) {
    return is_one_of(role, {"query", "key", "value"}) ||
        (is_packed(layer) && layer.kind != LayerKind::attention);
  }
  return role == "output" ||
      (!options.use_adapterp() &&
       (role == "intermediate" || ends_with(layer.name, "gate_proj")));
}

inline Plan plan(
    const LinearBottleneckOptions& options,
    const Network& network) {
  check(options);
  Plan result;
  result.method = "BOTTLENECK";
  result.options = options;
  const auto is_matrix = [](const Layer& layer) {
    const Tensor weight = layer.parameter("weight");
    return (layer.kind == LayerKind::linear ||
            layer.kind == LayerKind::other) &&
        weight.defined() && weight.dim() == 2;
  };
  std::vector<const Layer*> layers;
  if (options.targets().empty()) {
    for (const auto& layer : network) {
      if (is_matrix(layer) && is_default_place(options, layer) &&
          !is_cross_attention(layer.name)) {
        layers.push_back(&layer);
      }
    }
    TORCH_CHECK(
        !layers.empty(),
        "peft: LLM-Adapters find ",
        options.use_parallel_adapter() ? "no query, key or value"
                                       : "no feed-forward",
        " by name in this network; name its linear layers by targets({...}).",
        linear_layers_of(network));
  } else {
    layers = layers_in_targets(
        network, options.targets(), "targets", "a linear layer", is_matrix);
  }
  for (const Layer* layer : layers) {
    if (is_inside(layer->name, options.modules_to_save())) {
      continue;
    }
    const Tensor weight = layer->parameter("weight");
    const int64_t outputs = weight.size(layer->is_conv1d() ? 1 : 0);
    const int64_t inputs = weight.size(layer->is_conv1d() ? 0 : 1);
    const std::string role = role_of(*layer);
    const auto place = options.use_parallel_adapter() ? BottleneckPlace::beside
        : is_one_of(role, {"output", "attention_output"})
        ? BottleneckPlace::behind
        : BottleneckPlace::before;
    const bool is_behind = place == BottleneckPlace::behind;
    const std::string key = is_behind ? output_parameter(*layer) : "weight";
    result.sites.push_back(
        {layer->name,
         layer->path(key),
         layer->name,
         layer->parameter(key),
         std::make_shared<LinearBottleneckDelta>(
             options,
             place,
             is_behind ? outputs : inputs,
             place == BottleneckPlace::before ? inputs : outputs,
             at::TensorOptions(weight.device()).dtype(adapter_dtype(weight)))});
  }
  plan_modules_to_save(network, options.modules_to_save(), result.sites);
  return result;
}

inline Plan plan(const LlmAdaptersOptions& options, const Network& network) {
  const auto& heads = options.modules_to_save();
  Plan result;
  result.method = "LLM_ADAPTERS";
  if (options.lora()) {
    join(result, plan(with_heads(*options.lora(), heads), network));
  }
  if (options.bottleneck()) {
    join(result, plan(with_heads(*options.bottleneck(), heads), network));
  }
  if (options.prefix()) {
    join(result, plan(with_heads(*options.prefix(), heads), network));
  }
  TORCH_CHECK_VALUE(
      !result.sites.empty(),
      "peft: LlmAdaptersOptions names no adapter; give one of lora, bottleneck "
      "and prefix, or start from adapter_h(), adapter_p() or parallel()");
  return result;
}

} // namespace detail

/// Puts bottlenecks into linear layers of `model` and freezes everything else.
inline Adapter attach(
    torch::nn::Module& model,
    const LinearBottleneckOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

/// Puts the adapters that `options` names on `model` as one, and freezes
/// everything else.
inline Adapter attach(
    torch::nn::Module& model,
    const LlmAdaptersOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
