#pragma once

// CoDA, conditional adapters (Lei et al. 2023, arXiv:2304.04947): in each layer
// a router sends k of the n tokens through the frozen layer F; the others pass
// it by, and a small adapter sees all of them.
//
//   Xn = norm(X)                   the frozen layer's own input norm, if any
//   λ  = SoftTopK_ε(Xn w, k)       w in R^d, see functional/soft_topk.h
//   Y  = X + Pᵀ(λ ⊙ (F(P X) − P X)) + s · up(relu(down(Xn)))
//
// P picks the k tokens with the highest scores. In F their queries meet the
// keys of each other ("k_to_k") or of all tokens ("k_to_all"). At k = n this is
// the frozen layer beside a parallel adapter; below, a layer costs about k / n.

#include <peft/core/attach.h>
#include <peft/core/layer_loop.h>
#include <peft/functional/soft_topk.h>
#include <peft/methods/modules_to_save.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for CoDA.
///
///   peft::CodaOptions(32)                      32 tokens of any sequence
///   peft::CodaOptions().ratio(0.25)            every fourth
///   peft::CodaOptions(32).attention("k_to_all")
struct CodaOptions {
  CodaOptions() = default;
  CodaOptions(int64_t k) : k_(k) {}

  /// Tokens that go through a layer; a shorter sequence of a batch sends all it
  /// has. How long a batch is turns out when it is run: one that is shorter
  /// than k, padding and all, is an error then.
  TORCH_ARG(int64_t, k) = 0;
  /// Instead of k: the share of each sequence's tokens, rounded, at least one.
  TORCH_ARG(double, ratio) = 0;
  /// How soft the choice is. The paper takes 0.03 for text and 1 for speech.
  TORCH_ARG(double, epsilon) = 0.03;
  /// "exact", or "iterative" for routers that were trained so, with its three
  /// settings.
  TORCH_ARG(std::string, solver) = "exact";
  TORCH_ARG(int64_t, iterations) = 20;
  TORCH_ARG(double, epsilon_init) = 4.0;
  TORCH_ARG(double, epsilon_decay) = 0.7;
  /// "k_to_k" or "k_to_all".
  TORCH_ARG(std::string, attention) = "k_to_k";
  /// The adapter's width and its factor s.
  TORCH_ARG(int64_t, bottleneck) = 64;
  TORCH_ARG(double, scaling) = 1.0;
  /// Which layers, from 0; empty for all. The others run as they are.
  TORCH_ARG(std::vector<int64_t>, layers);
  /// The router starts as a Gaussian of this width; 0 prefers no token.
  TORCH_ARG(double, router_std) = 0.02;
  /// Modules trained whole, beside the adapter: a task head.
  TORCH_ARG(std::vector<std::string>, modules_to_save);
};

/// One layer's router and adapter.
class CodaLayer : public torch::nn::Module {
 public:
  CodaLayer(Tensor w, Tensor down, Tensor down_b, Tensor up, Tensor up_b) {
    router_weight = register_parameter("router_weight", std::move(w));
    down_weight = register_parameter("down_weight", std::move(down));
    down_bias = register_parameter("down_bias", std::move(down_b));
    up_weight = register_parameter("up_weight", std::move(up));
    up_bias = register_parameter("up_bias", std::move(up_b));
  }

  /// What the router thinks of tokens `[batch, n, d]`: `[batch, n]`, in float32
  /// at least.
  Tensor scores(const Tensor& normed) const {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(
        c10::autocast_dispatch_keyset);
    return at::linear(normed.to(router_weight.scalar_type()), router_weight)
        .squeeze(-1);
  }

  /// up(relu(down(x))).
  Tensor adapter(const Tensor& normed) const {
    const Tensor x = normed.to(down_weight.scalar_type());
    return at::linear(
        at::linear(x, down_weight, down_bias).relu(), up_weight, up_bias);
  }

  /// The parameters as files name them.
  std::vector<std::pair<std::string, Tensor>> tensors() const {
    return {
        {"router.weight", router_weight},
        {"down.weight", down_weight},
        {"down.bias", down_bias},
        {"up.weight", up_weight},
        {"up.bias", up_bias}};
  }

  Tensor router_weight; // [1, d]
  Tensor down_weight, down_bias; // [bottleneck, d], [bottleneck]
  Tensor up_weight, up_bias; // [d, bottleneck], [d]
};

/// CoDA in one stack of layers.
class CodaDelta final : public LoopDelta {
 public:
  using Layers = std::map<int64_t, std::shared_ptr<CodaLayer>>;
  using Norm = LayerLoopOptions::InputNorm;

  CodaDelta(CodaOptions options, Norm norm, const Layers& layers)
      : options_(std::move(options)), norm_(std::move(norm)) {
    for (const auto& [number, layer] : layers) {
      layers_[number] = register_module(std::to_string(number), layer);
    }
  }

  Tensor layer(
      const LayerCall& call,
      const LayerLoopRun& loop,
      const std::function<Tensor(const LayerCall&)>& below,
      double scale) const override {
    const auto found = layers_.find(call.layer);
    if (found == layers_.end()) {
      return below(call);
    }
    TORCH_CHECK(
        call.is_whole(),
        "peft: two active routers choose tokens for the same layer; disable "
        "one of the CoDA adapters");
    const CodaLayer& own = *found->second;
    const int64_t n = call.hidden.size(1);
    const int64_t k = tokens_of(n);
    const Tensor normed = norm_
        ? norm_(*loop.layers.at(static_cast<size_t>(call.layer)), call.hidden)
        : call.hidden;
    const Tensor beside = own.adapter(normed).mul(options_.scaling() * scale);
    const Tensor y = k == n
        ? below(call)
        : routed(own.scores(normed), call, k, loop.attention_mask, below);
    return y + beside.to(y.scalar_type());
  }

  std::string merge_obstacle() const override {
    return "its router decides for each input which tokens a layer sees";
  }

  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    std::vector<std::pair<std::string, Tensor>> result;
    for (const auto& [number, layer] : layers_) {
      for (auto& [name, tensor] : layer->tensors()) {
        result.emplace_back(std::to_string(number) + "." + name, tensor);
      }
    }
    return result;
  }

  std::shared_ptr<Delta> copy() const override {
    torch::NoGradGuard no_grad;
    Layers layers;
    for (const auto& [number, layer] : layers_) {
      const auto twin = [](const Tensor& t) {
        return t.clone().set_requires_grad(t.requires_grad());
      };
      layers[number] = std::make_shared<CodaLayer>(
          twin(layer->router_weight),
          twin(layer->down_weight),
          twin(layer->down_bias),
          twin(layer->up_weight),
          twin(layer->up_bias));
    }
    auto result = std::make_shared<CodaDelta>(options_, norm_, layers);
    result->train(is_training());
    return result;
  }

  std::string describe() const override {
    return options_.k() > 0 ? "coda k=" + std::to_string(options_.k())
                            : c10::str("coda ratio=", options_.ratio());
  }

  const CodaOptions& options() const {
    return options_;
  }
  const Layers& layers() const {
    return layers_;
  }

 private:
  /// How many slots a batch of n tokens a row takes.
  int64_t tokens_of(int64_t n) const {
    if (options_.k() == 0) {
      return share_of(n);
    }
    TORCH_CHECK(
        options_.k() <= n,
        "peft: CoDA sends k = ",
        options_.k(),
        " tokens of a sequence through a layer, and this batch has ",
        n,
        "; take a smaller k, a ratio, or pad the batch");
    return options_.k();
  }

  int64_t share_of(int64_t n) const {
    return std::max<int64_t>(
        1,
        static_cast<int64_t>(
            std::floor(static_cast<double>(n) * options_.ratio() + 0.5)));
  }

  /// The number of each sequence, `[batch or 1, 1]`: its share does not depend
  /// on how it is padded.
  Tensor tokens_of_rows(int64_t k, const Tensor& mask, const Tensor& like)
      const {
    if (options_.k() > 0 || !mask.defined()) {
      return at::full({1, 1}, k, like.options().dtype(at::kLong));
    }
    return (mask.sum(-1, /*keepdim=*/true).to(at::kDouble) * options_.ratio() +
            0.5)
        .floor()
        .clamp(1, k)
        .to(at::kLong);
  }

  Tensor solve(const Tensor& scores, const Tensor& k, const Tensor& mask)
      const {
    const auto& o = options_;
    if (o.solver() == "exact") {
      return functional::soft_topk(scores, k, o.epsilon(), mask);
    }
    const Tensor lambda = functional::soft_topk_iterative(
        scores,
        k,
        o.epsilon(),
        o.iterations(),
        o.epsilon_init(),
        o.epsilon_decay(),
        mask);
    // A sequence that sends all its tokens sends them whole, as at k = n.
    return mask.defined()
        ? lambda.masked_fill(k >= mask.sum(-1, /*keepdim=*/true), 1.0)
        : lambda;
  }

  /// X + Pᵀ(λ ⊙ (F(P X) − P X)).
  Tensor routed(
      const Tensor& scores,
      const LayerCall& call,
      int64_t k,
      const Tensor& attention_mask,
      const std::function<Tensor(const LayerCall&)>& below) const {
    const auto batch = call.hidden.size(0), n = call.hidden.size(1);
    const auto width = call.hidden.size(2);
    const Tensor mask =
        attention_mask.defined() ? attention_mask.to(at::kBool) : Tensor();
    const Tensor k_of_row = tokens_of_rows(k, mask, scores);
    const auto chosen = functional::top_k_tokens(scores, k, mask, k_of_row);
    const Tensor weight =
        solve(scores, k_of_row, mask).gather(1, chosen.indices).unsqueeze(-1);

    const Tensor first =
        at::arange(batch, chosen.indices.options()).unsqueeze(1) * n;
    const Tensor rows = (chosen.indices + first).flatten();
    const Tensor x = call.hidden.reshape({batch * n, width});
    LayerCall few = call;
    few.hidden = x.index_select(0, rows).view({batch, k, width});
    few.tokens = chosen.indices;
    if (options_.attention() == "k_to_all") {
      // Always there, so that a network that takes its keys from call.hidden
      // fails here.
      few.valid = mask.defined()
          ? mask
          : at::ones({batch, n}, scores.options().dtype(at::kBool));
    } else {
      few.context = few.hidden;
      few.context_tokens = chosen.indices;
      few.valid = mask.defined() ? chosen.valid : Tensor();
    }
    Tensor change = below(few) - few.hidden;
    change = change * weight.to(change.scalar_type());
    if (mask.defined()) {
      change =
          change.masked_fill(chosen.valid.logical_not().unsqueeze(-1), 0.0);
    }
    change = change.reshape({batch * k, width}).to(x.scalar_type());
    return x.index_add(0, rows, change).view(call.hidden.sizes());
  }

  CodaOptions options_;
  Norm norm_;
  Layers layers_;
};

namespace detail {

inline void check(const CodaOptions& options) {
  const auto is_positive = [](double x) { return x > 0 && std::isfinite(x); };
  TORCH_CHECK_VALUE(
      (options.k() > 0 && options.ratio() == 0) ||
          (options.k() == 0 && options.ratio() > 0 && options.ratio() <= 1),
      "peft: CoDA takes either k, at least 1, or a ratio in (0, 1]; got k = ",
      options.k(),
      " and ratio = ",
      options.ratio());
  TORCH_CHECK_VALUE(
      is_positive(options.epsilon()),
      "peft: CoDA's epsilon must be positive, got ",
      options.epsilon());
  TORCH_CHECK_VALUE(
      options.solver() == "exact" || options.solver() == "iterative",
      "peft: CoDA knows no solver '",
      options.solver(),
      "'; choose exact or iterative");
  TORCH_CHECK_VALUE(
      options.iterations() > 0 && is_positive(options.epsilon_init()) &&
          options.epsilon_decay() > 0 && options.epsilon_decay() <= 1,
      "peft: CoDA's iteration wants iterations > 0, epsilon_init > 0 and "
      "epsilon_decay in (0, 1]; got ",
      options.iterations(),
      ", ",
      options.epsilon_init(),
      " and ",
      options.epsilon_decay());
  TORCH_CHECK_VALUE(
      options.attention() == "k_to_k" || options.attention() == "k_to_all",
      "peft: CoDA knows no attention '",
      options.attention(),
      "'; choose k_to_k or k_to_all");
  TORCH_CHECK_VALUE(
      std::isfinite(options.scaling()) && std::isfinite(options.router_std()) &&
          options.router_std() >= 0,
      "peft: CoDA's scaling must be finite and router_std not negative, got ",
      options.scaling(),
      " and ",
      options.router_std());
}

/// The numbers of the layers that `options` names, of a stack of `count`.
inline std::vector<int64_t> coda_layers(
    const CodaOptions& options,
    int64_t count,
    const std::string& stack) {
  std::vector<int64_t> result = options.layers();
  if (result.empty()) {
    for (int64_t i = 0; i < count; ++i) {
      result.push_back(i);
    }
  }
  for (const int64_t i : result) {
    TORCH_CHECK_VALUE(
        i >= 0 && i < count,
        "peft: CoDA is to act on layer ",
        i,
        ", and '",
        stack,
        "' has layers 0 to ",
        count - 1);
  }
  return result;
}

inline std::shared_ptr<CodaLayer> make_coda_layer(
    const CodaOptions& options,
    int64_t width,
    const at::TensorOptions& like) {
  const int64_t r = options.bottleneck();
  const double bound = 1 / std::sqrt(static_cast<double>(width));
  return std::make_shared<CodaLayer>(
      at::empty({1, width}, like).normal_(0, options.router_std()),
      at::empty({r, width}, like).uniform_(-bound, bound),
      at::zeros({r}, like),
      at::zeros({width, r}, like),
      at::zeros({width}, like));
}

inline Plan plan(const CodaOptions& options, const Network& network) {
  check(options);
  const auto stacks = call_sites<LayerLoopImpl>(network);
  TORCH_CHECK(
      !stacks.empty(),
      "peft: CoDA routes tokens around layers, and this network has no "
      "peft::LayerLoop to do it in. Register one and write the loop over the "
      "layers with it:\n",
      kLayerLoopLines);
  Plan result;
  result.method = "CODA";
  result.options = options;
  const Tensor parameter = any_parameter(network);
  const auto like =
      parameter.options().dtype(adapter_dtype(parameter)).requires_grad(false);
  for (const auto& [name, stack] : stacks) {
    const auto& o = stack->options;
    if (o.causal()) {
      continue;
    }
    TORCH_CHECK_VALUE(
        options.bottleneck() > 0 && options.bottleneck() <= o.hidden_size(),
        "peft: CoDA's bottleneck must lie between 1 and the width ",
        o.hidden_size(),
        " of '",
        name,
        "', got ",
        options.bottleneck());
    CodaDelta::Layers layers;
    for (const int64_t i : coda_layers(options, o.num_layers(), name)) {
      layers[i] = make_coda_layer(options, o.hidden_size(), like);
    }
    result.sites.push_back(
        {name,
         name,
         name,
         Tensor(),
         std::make_shared<CodaDelta>(options, o.input_norm(), layers),
         stack->site()});
  }
  TORCH_CHECK(
      !result.sites.empty(),
      "peft: CoDA ranks all tokens of a sequence to choose k of them: in the "
      "causal '",
      stacks.front().first,
      "' a token's way would depend on those after it. It works in stacks "
      "where every token sees all");
  plan_modules_to_save(network, options.modules_to_save(), result.sites);
  return result;
}

} // namespace detail

/// Puts a router and an adapter on the layers of `model` and freezes everything
/// else. Stacks that are causal (the decoder beside an encoder) stay as they
/// are. A scale other than 1 scales the adapters; the routers stay.
inline Adapter attach(
    torch::nn::Module& model,
    const CodaOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
