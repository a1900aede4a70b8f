#pragma once

// Where a method owns the loop over a transformer's layers: it sends some of
// the tokens around a layer, adds to what a layer gives, or watches the layers
// and answers in their place. A network of one's own registers
//
//   layer_loop = register_module("layer_loop", peft::LayerLoop(
//       peft::LayerLoopOptions(hidden_size, num_layers)));
//
// and writes its loop, "for (auto& each : *layers) h = each->forward(h, mask)",
// as
//
//   h = layer_loop->forward(h, attention_mask, *layers,
//       [&](torch::nn::Module& each, const peft::LayerCall& call) {
//         return each.as<BlockImpl>()->forward(
//             call.hidden, call.attention(mask));
//       }).hidden;

#include <peft/core/call_site.h>

#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace peft {

/// The tokens that one layer is to see. Without a method these are all.
struct LayerCall {
  int64_t layer = 0;
  Tensor hidden; // [batch, queries, hidden]
  /// What keys and values are made of, `[batch, keys, hidden]`; `hidden` itself
  /// unless a method keeps more keys than queries.
  Tensor context;
  /// Where `hidden` and `context` stand in the sequence, `[batch, queries]` and
  /// `[batch, keys]`; undefined for all of it in order.
  Tensor tokens;
  Tensor context_tokens;
  /// `[batch, keys]`, false for a slot that holds no token; undefined where all
  /// do.
  Tensor valid;
  /// Whether this is a block of a side network; a decoder's then reads its
  /// encoder's side result.
  bool side = false;

  /// Whether every token is here.
  bool is_whole() const {
    return !tokens.defined() && !context_tokens.defined();
  }

  /// A mask or bias of attention, `[batch or 1, heads or 1, n or 1, past + n]`,
  /// boolean or added, cut to these queries and keys. `past` counts the keys
  /// that stand in front of the sequence (a cache, an adapter's); they stay,
  /// except that a side network has none. An undefined mask stays so unless a
  /// slot is empty.
  Tensor attention(Tensor mask, int64_t past = 0) const {
    if (mask.defined() && side) {
      mask = mask.slice(3, past);
    }
    if (side) {
      past = 0;
    }
    if (mask.defined() && tokens.defined() && mask.size(2) > 1) {
      mask = pick(mask, tokens, 2);
    }
    if (mask.defined() && context_tokens.defined()) {
      const Tensor in_front = at::arange(past, context_tokens.options())
                                  .unsqueeze(0)
                                  .expand({context_tokens.size(0), -1});
      mask = pick(mask, at::cat({in_front, context_tokens + past}, 1), 3);
    }
    if (!valid.defined()) {
      return mask;
    }
    const Tensor open =
        at::constant_pad_nd(valid, {past, 0}, 1).unsqueeze(1).unsqueeze(1);
    if (!mask.defined()) {
      return open;
    }
    return mask.scalar_type() == at::kBool
        ? mask.logical_and(open)
        : mask.masked_fill(
              open.logical_not(), -std::numeric_limits<double>::infinity());
  }

  /// A tensor with one row a token, `[batch or 1, n, ...]` (rotations, say),
  /// cut to the queries, or to the keys.
  Tensor of_queries(const Tensor& per_token) const {
    return rows(per_token, tokens);
  }
  Tensor of_keys(const Tensor& per_token) const {
    return rows(per_token, context_tokens);
  }

 private:
  static Tensor rows(const Tensor& t, const Tensor& index) {
    if (!index.defined() || !t.defined()) {
      return t;
    }
    auto sizes = t.sizes().vec();
    sizes[0] = index.size(0);
    const Tensor all = t.expand(sizes);
    sizes[1] = index.size(1);
    std::vector<int64_t> shape(sizes.size(), 1);
    shape[0] = index.size(0);
    shape[1] = index.size(1);
    return all.gather(1, index.view(shape).expand(sizes));
  }

  static Tensor pick(const Tensor& mask, const Tensor& index, int64_t dim) {
    auto sizes = mask.sizes().vec();
    sizes[0] = index.size(0);
    const Tensor all = mask.expand(sizes);
    sizes[dim] = index.size(1);
    std::vector<int64_t> shape{index.size(0), 1, 1, 1};
    shape[dim] = index.size(1);
    return all.gather(dim, index.view(shape).expand(sizes));
  }
};

/// Runs one block of the network's kind on some tokens.
using RunLayer = std::function<Tensor(torch::nn::Module&, const LayerCall&)>;

/// What comes out of a loop.
struct LayerLoopOutput {
  Tensor hidden; // [batch, n, hidden]
  /// A side network's own result, at its width; undefined without one. A
  /// decoder's side network attends to it.
  Tensor side;
};

/// One forward's loop, as a delta sees it.
struct LayerLoopRun {
  const Tensor& attention_mask; // [batch, n], 1 for a token; or undefined
  const std::vector<std::shared_ptr<torch::nn::Module>>& layers;
  const RunLayer& run;
  /// What the stack does after its last layer.
  const std::function<Tensor(const Tensor&)>& norm;
};

/// A delta that acts in the loop over layers.
class LoopDelta : public CallDelta {
 public:
  using CallDelta::CallDelta;

  /// Around one layer, or the next delta: `below` runs it on the tokens it is
  /// given. `call` holds all tokens.
  virtual Tensor layer(
      const LayerCall& call,
      const LayerLoopRun& /*loop*/,
      const std::function<Tensor(const LayerCall&)>& below,
      double /*scale*/) const {
    return below(call);
  }

  /// True for a side network, which answers in place of the layers: they then
  /// run without a graph, and `answer` gets what each has made.
  virtual bool answers() const {
    return false;
  }
  /// `states`: what goes into the first layer, then what comes out of each;
  /// undefined where `reads` says no.
  virtual LayerLoopOutput answer(
      const std::vector<Tensor>& states,
      const LayerLoopRun& loop,
      double /*scale*/) const {
    return {loop.norm(states.back()), {}};
  }
  /// Whether `answer` wants state `i`; others are not kept.
  virtual bool reads(size_t /*i*/) const {
    return true;
  }
  /// The states of this batch where they are at hand, so that the layers need
  /// not run; else nothing.
  virtual std::optional<std::vector<Tensor>> recall(
      const Tensor& /*hidden*/,
      const LayerLoopRun& /*loop*/) const {
    return std::nullopt;
  }
  /// Told the states after the layers have run.
  virtual void remember(
      const std::vector<Tensor>& /*states*/,
      const LayerLoopRun& /*loop*/) const {}
};

/// Options for LayerLoop: what a method must know of the layers.
struct LayerLoopOptions {
  using MakeBlock =
      std::function<std::shared_ptr<torch::nn::Module>(int64_t, int64_t)>;
  using MakeNorm = std::function<torch::nn::AnyModule(int64_t)>;
  using InputNorm = std::function<Tensor(torch::nn::Module&, const Tensor&)>;

  LayerLoopOptions(int64_t hidden_size, int64_t num_layers)
      : hidden_size_(hidden_size), num_layers_(num_layers) {}

  TORCH_ARG(int64_t, hidden_size);
  TORCH_ARG(int64_t, num_layers);
  /// Whether a token sees only those before it.
  TORCH_ARG(bool, causal) = false;
  /// Heads of the queries, so that a side network made of the layers' weights
  /// keeps them apart; 0: not said.
  TORCH_ARG(int64_t, num_heads) = 0;
  /// Makes block `i` of a side network (0 is its first, whichever layer it
  /// stands beside): one of the network's kind, with the same number of heads
  /// and all widths divided by `reduction`. Absent: this network has none.
  TORCH_ARG(MakeBlock, side_block);
  /// The same for the norm after the last layer, where there is one.
  TORCH_ARG(MakeNorm, side_norm);
  /// Normalises a block's input as the block itself does first (pre-norm
  /// networks); absent where what flows between blocks is normalised already.
  TORCH_ARG(InputNorm, input_norm);
};

/// The call site of routers, side networks and transforms of a layer's output,
/// one for each stack.
class LayerLoopImpl : public torch::nn::Cloneable<LayerLoopImpl>,
                      public CallSite {
 public:
  explicit LayerLoopImpl(LayerLoopOptions options_)
      : options(std::move(options_)) {}

  void reset() override {
    reset_site();
  }
  bool is_serializable() const override {
    return false;
  }

  /// Runs `layers` on `hidden` `[batch, n, hidden]`, then `norm` where there is
  /// one. `attention_mask` `[batch, n]` says which tokens are padding (0).
  LayerLoopOutput forward(
      Tensor hidden,
      const Tensor& attention_mask,
      const torch::nn::ModuleListImpl& layers,
      const RunLayer& run,
      torch::nn::AnyModule norm = {}) const {
    std::vector<std::shared_ptr<torch::nn::Module>> blocks(
        layers.begin(), layers.end());
    const auto deltas = active<LoopDelta>();
    const std::function<Tensor(const Tensor&)> finish = [&](const Tensor& x) {
      return norm.is_empty() ? x : norm.forward(x);
    };
    const LayerLoopRun loop{attention_mask, blocks, run, finish};

    const LoopDelta* side = nullptr;
    double side_scale = 1;
    for (const auto& [delta, scale] : deltas) {
      if (delta->answers()) {
        TORCH_CHECK(
            side == nullptr,
            "peft: two active side networks answer for the same layers; "
            "disable one");
        side = delta;
        side_scale = scale;
      }
    }
    if (side == nullptr) {
      for (size_t i = 0; i < blocks.size(); ++i) {
        hidden = run_layer(deltas, loop, i, hidden);
      }
      return {finish(hidden), {}};
    }

    auto states = side->recall(hidden, loop);
    if (!states) {
      at::AutoGradMode no_graph(false);
      hidden = hidden.detach();
      states.emplace(blocks.size() + 1);
      for (size_t i = 0; i <= blocks.size(); ++i) {
        if (side->reads(i)) {
          (*states)[i] = hidden;
        }
        if (i < blocks.size()) {
          hidden = run_layer(deltas, loop, i, hidden);
        }
      }
      side->remember(*states, loop);
    }
    return side->answer(*states, loop, side_scale);
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "peft::LayerLoop(" << options.num_layers() << ")";
  }

  LayerLoopOptions options;

 private:
  using Active = std::vector<std::pair<const LoopDelta*, double>>;

  /// Layer `i` inside the deltas; the one attached last is outermost.
  static Tensor run_layer(
      const Active& deltas,
      const LayerLoopRun& loop,
      size_t i,
      const Tensor& hidden) {
    std::function<Tensor(const LayerCall&)> below = [&loop,
                                                     i](const LayerCall& call) {
      return loop.run(*loop.layers[i], call);
    };
    for (const auto& [delta, scale] : deltas) {
      if (delta->answers()) {
        continue;
      }
      below = [inner = std::move(below), &loop, d = delta, s = scale](
                  const LayerCall& call) {
        return d->layer(call, loop, inner, s);
      };
    }
    LayerCall call;
    call.layer = static_cast<int64_t>(i);
    call.hidden = hidden;
    call.context = hidden;
    return below(call);
  }
};
TORCH_MODULE(LayerLoop);

namespace detail {

/// What a network without the call site lacks, for messages.
inline const char* const kLayerLoopLines =
    "  layer_loop = register_module(\"layer_loop\", peft::LayerLoop(\n"
    "      peft::LayerLoopOptions(hidden_size, num_layers)));\n"
    "  h = layer_loop->forward(h, attention_mask, *layers,\n"
    "      [&](torch::nn::Module& each, const peft::LayerCall& call) {\n"
    "        return each.as<BlockImpl>()->forward(\n"
    "            call.hidden, call.attention(mask));\n"
    "      }).hidden;";

} // namespace detail

} // namespace peft
