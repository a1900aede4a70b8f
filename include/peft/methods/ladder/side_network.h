#pragma once

#include <peft/core/layer_loop.h>
#include <peft/methods/ladder/activation_cache.h>
#include <peft/methods/ladder/options.h>

#include <torch/nn/modules/container/any.h>
#include <torch/nn/modules/linear.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// The side network of one stack, as the delta at its LayerLoop. It reads the
/// backbone's states and hands nothing back to the layers.
///
/// Scale: the result is (1 - s) backbone + s side, so 1 is as trained and 0 the
/// base to the bit.
class SideNetwork final : public LoopDelta {
 public:
  /// What tells one side network from another.
  struct Spec {
    LadderOptions options;
    LayerLoopOptions loop;
    std::string stack; // the call site's name
    std::vector<int64_t> layers; // that have a side block
    /// True for an encoder: the decoder's side network reads this one's result,
    /// and the layers of the decoder still read the backbone's.
    bool feeds_decoder = false;
  };

  /// Blocks and maps as they initialise themselves.
  explicit SideNetwork(Spec spec_) : spec(std::move(spec_)) {
    const auto& options = spec.options;
    const int64_t wide = spec.loop.hidden_size();
    const int64_t narrow = wide / options.reduction();
    first_down = register_module("first_down", torch::nn::Linear(wide, narrow));
    const auto downs = add_child("down");
    const auto blocks = add_child("block");
    const auto gates =
        options.gate() == "learnable" ? add_child("gate") : nullptr;
    for (size_t i = 0; i < spec.layers.size(); ++i) {
      const std::string key = std::to_string(spec.layers[i]);
      down.push_back(
          downs->register_module(key, torch::nn::Linear(wide, narrow)));
      block.push_back(blocks->register_module(
          key,
          spec.loop.side_block()(
              static_cast<int64_t>(i), options.reduction())));
      if (gates) {
        gate.push_back(gates->register_parameter(
            key, at::full({1}, options.gate_alpha())));
      }
    }
    if (spec.loop.side_norm()) {
      norm = spec.loop.side_norm()(options.reduction());
      register_module("norm", norm.ptr());
    }
    if (!spec.feeds_decoder) {
      up = register_module("up", torch::nn::Linear(narrow, wide));
      if (options.merge_last()) {
        last_gate = register_parameter(
            "last_gate", at::full({1}, options.gate_alpha()));
      }
    }
  }

  bool answers() const override {
    return true;
  }

  /// h = down(states[0]); for each kept layer i, h = block_i(mix_i(h, down_i(
  /// states[i + 1]))); side = norm(h), hidden = up(side).
  LayerLoopOutput answer(
      const std::vector<Tensor>& states,
      const LayerLoopRun& loop,
      double scale) const override {
    if (scale == 0) {
      return {loop.norm(states.back()), {}};
    }
    Tensor h = map(first_down, states.front());
    for (size_t i = 0; i < block.size(); ++i) {
      const int64_t layer = spec.layers[i];
      h = mix(i, h, map(down[i], states[static_cast<size_t>(layer) + 1]));
      LayerCall call;
      call.layer = layer;
      call.hidden = h;
      call.context = h;
      call.side = true;
      h = loop.run(*block[i], call);
    }
    if (!norm.is_empty()) {
      auto last = norm;
      h = last.forward(h);
    }
    if (spec.feeds_decoder) {
      return {loop.norm(states.back()), h};
    }
    Tensor result = map(up, h);
    if (last_gate.defined() || scale != 1) {
      const Tensor backbone = loop.norm(states.back()).to(result.scalar_type());
      if (last_gate.defined()) {
        const Tensor mu = open(last_gate);
        result = mu * result + (1 - mu) * backbone;
      }
      if (scale != 1) {
        result = (1 - scale) * backbone + scale * result;
      }
    }
    return {result.to(states.front().scalar_type()), h};
  }

  /// The states that have a map, and the last: a scale or a decoder may ask
  /// for it.
  bool reads(size_t i) const override {
    return i == 0 || i == static_cast<size_t>(spec.loop.num_layers()) ||
        std::binary_search(
               spec.layers.begin(),
               spec.layers.end(),
               static_cast<int64_t>(i) - 1);
  }

  std::optional<std::vector<Tensor>> recall(
      const Tensor& hidden,
      const LayerLoopRun& loop) const override {
    return detail::recall_states(
        spec.stack, hidden, loop, [this](size_t i) { return reads(i); });
  }
  void remember(const std::vector<Tensor>& states, const LayerLoopRun& loop)
      const override {
    detail::remember_states(spec.stack, states, loop);
  }

  std::string merge_obstacle() const override {
    return "a side network stands beside the layers; no weight of theirs holds "
           "what it does";
  }

  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    std::vector<std::pair<std::string, Tensor>> result;
    for (const auto& p : named_parameters()) {
      result.emplace_back(p.key(), p.value());
    }
    return result;
  }

  std::shared_ptr<Delta> copy() const override {
    auto result = std::make_shared<SideNetwork>(spec);
    torch::NoGradGuard no_grad;
    auto theirs = result->named_parameters();
    for (const auto& p : named_parameters()) {
      Tensor& twin = theirs[p.key()];
      twin.set_data(p.value().detach().clone());
      twin.set_requires_grad(p.value().requires_grad());
    }
    result->train(is_training());
    return result;
  }

  std::string describe() const override {
    return c10::str(
        "ladder 1/", spec.options.reduction(), ", ", block.size(), " blocks");
  }

  Spec spec;
  torch::nn::Linear first_down{nullptr};
  /// Of the kept layers, in order; in files by the layer's number.
  std::vector<torch::nn::Linear> down;
  std::vector<std::shared_ptr<torch::nn::Module>> block;
  std::vector<Tensor> gate;
  torch::nn::AnyModule norm;
  torch::nn::Linear up{nullptr};
  Tensor last_gate;

 private:
  std::shared_ptr<torch::nn::Module> add_child(const std::string& name) {
    return register_module(name, std::make_shared<torch::nn::Module>(name));
  }

  /// Half precision goes on in float32, as the side network's own.
  static Tensor map(const torch::nn::Linear& linear, const Tensor& x) {
    return at::linear(
        x.to(linear->weight.scalar_type()), linear->weight, linear->bias);
  }

  Tensor open(const Tensor& alpha) const {
    return at::sigmoid(alpha / spec.options.gate_temperature());
  }

  /// mu h + (1 - mu) x, or their sum without a gate.
  Tensor mix(size_t i, const Tensor& h, const Tensor& x) const {
    if (spec.options.gate() == "none") {
      return h + x;
    }
    if (!gate.empty()) {
      const Tensor mu = open(gate[i]);
      return mu * h + (1 - mu) * x;
    }
    const double mu = 1 /
        (1 +
         std::exp(
             -spec.options.gate_alpha() / spec.options.gate_temperature()));
    return mu * h + (1 - mu) * x;
  }
};

} // namespace peft
