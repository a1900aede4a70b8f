#pragma once

// GPT-2 as an ordinary LibTorch module.
//
// Radford et al. 2019, "Language Models are Unsupervised Multitask Learners":
// a decoder whose layers are x + attention(norm(x)), then x + mlp(norm(x)).
// Every module is registered under the name Hugging Face gives it
// ("transformer.h.0.attn.c_attn"), so checkpoints load by name and adapter
// files fit both ways. extra_tokens and layer_loop are the two lines that a
// network of one's own would copy for methods that no weight can carry.

#include <peft/core/extra_tokens.h>
#include <peft/core/layer_loop.h>
#include <peft/core/padding.h>
#include <peft/models/attention.h>
#include <peft/models/lm_head.h>

#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/init.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/dropout.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/normalization.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>

namespace peft::models {

/// Sizes of a network, by the names of Hugging Face's `config.json`.
///
/// Example:
/// ```
/// using namespace peft::models;
/// Gpt2ForCausalLM model(Gpt2Options().n_embd(768).n_layer(12).n_head(12));
/// ```
struct Gpt2Options {
  /// The same network with its widths divided by `reduction`.
  Gpt2Options reduced(int64_t reduction) const {
    const auto inner = n_inner().value_or(4 * n_embd());
    TORCH_CHECK_VALUE(
        reduction > 0 && n_embd() % reduction == 0 && inner % reduction == 0,
        "peft: a reduction must divide n_embd (",
        n_embd(),
        ") and n_inner (",
        inner,
        "), got ",
        reduction);
    return Gpt2Options(*this)
        .n_embd(n_embd() / reduction)
        .n_inner(inner / reduction);
  }

  TORCH_ARG(int64_t, vocab_size) = 50257;
  TORCH_ARG(int64_t, n_positions) = 1024;
  TORCH_ARG(int64_t, n_embd) = 768;
  TORCH_ARG(int64_t, n_layer) = 12;
  TORCH_ARG(int64_t, n_head) = 12;
  /// Width of the feed-forward part; 4 * n_embd where absent.
  TORCH_ARG(std::optional<int64_t>, n_inner);
  TORCH_ARG(double, layer_norm_epsilon) = 1e-5;
  TORCH_ARG(double, resid_pdrop) = 0.1;
  TORCH_ARG(double, embd_pdrop) = 0.1;
  TORCH_ARG(double, attn_pdrop) = 0.1;
  TORCH_ARG(double, initializer_range) = 0.02;
  TORCH_ARG(bool, tie_word_embeddings) = true;
};

namespace detail {

inline torch::nn::LayerNorm gpt2_norm(const Gpt2Options& options) {
  return torch::nn::LayerNorm(torch::nn::LayerNormOptions({options.n_embd()})
                                  .eps(options.layer_norm_epsilon()));
}

} // namespace detail

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ Conv1D ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

/// y = x W + b with W `[in, out]`: a Linear whose weight lies the other way.
/// LoRA on it takes `fan_in_fan_out(true)`.
struct Conv1DImpl : torch::nn::Cloneable<Conv1DImpl> {
  Conv1DImpl(int64_t in_features_, int64_t out_features_)
      : in_features(in_features_), out_features(out_features_) {
    reset();
  }

  void reset() override {
    weight =
        register_parameter("weight", torch::empty({in_features, out_features}));
    bias = register_parameter("bias", torch::zeros({out_features}));
    torch::nn::init::normal_(weight, 0, 0.02);
  }

  Tensor forward(const Tensor& x) {
    auto sizes = x.sizes().vec();
    sizes.back() = out_features;
    return at::addmm(bias, x.reshape({-1, in_features}), weight).view(sizes);
  }

  int64_t in_features;
  int64_t out_features;
  Tensor weight;
  Tensor bias;
};
TORCH_MODULE(Conv1D);

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ Layer ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

/// Causal multi-head attention, `[batch, length, n_embd]` -> the same.
struct Gpt2AttentionImpl : torch::nn::Cloneable<Gpt2AttentionImpl> {
  explicit Gpt2AttentionImpl(Gpt2Options options_)
      : options(std::move(options_)) {
    reset();
  }

  void reset() override {
    const auto width = options.n_embd();
    TORCH_CHECK(
        width % options.n_head() == 0,
        "peft: n_embd (",
        width,
        ") must be a multiple of n_head (",
        options.n_head(),
        ")");
    c_attn = register_module("c_attn", Conv1D(width, 3 * width));
    c_proj = register_module("c_proj", Conv1D(width, width));
    resid_dropout = register_module(
        "resid_dropout", torch::nn::Dropout(options.resid_pdrop()));
  }

  /// `mask` is that of `causal_attention`; `past` holds keys and values that
  /// stand in front, or is null.
  Tensor forward(const LayerCall& call, const Tensor& mask, KeyValues* past) {
    const auto split = // [query, key or value, batch, heads, length, head_dim]
        [heads = options.n_head()](const Tensor& packed) {
          return packed.unflatten(-1, {3, heads, -1}).permute({2, 0, 3, 1, 4});
        };
    const auto of_hidden = split(c_attn->forward(call.hidden));
    const auto of_context = call.context.is_same(call.hidden)
        ? of_hidden
        : split(c_attn->forward(call.context));
    auto key = of_context[1];
    auto value = of_context[2];
    if (past != nullptr) {
      std::tie(key, value) = past->update(
          cache_slot(call, options.n_layer()), key, value, call.hidden);
    }
    const auto attended = causal_attention(
        of_hidden[0],
        key,
        value,
        mask,
        is_training() ? options.attn_pdrop() : 0.0);
    return resid_dropout->forward(c_proj->forward(attended));
  }

  Gpt2Options options;
  Conv1D c_attn{nullptr};
  Conv1D c_proj{nullptr};
  torch::nn::Dropout resid_dropout{nullptr};
};
TORCH_MODULE(Gpt2Attention);

/// c_proj(gelu(c_fc(x))) with GELU's tanh form, Hugging Face's "gelu_new".
struct Gpt2MlpImpl : torch::nn::Cloneable<Gpt2MlpImpl> {
  explicit Gpt2MlpImpl(Gpt2Options options_) : options(std::move(options_)) {
    reset();
  }

  void reset() override {
    const auto width = options.n_embd();
    const auto inner = options.n_inner().value_or(4 * width);
    c_fc = register_module("c_fc", Conv1D(width, inner));
    c_proj = register_module("c_proj", Conv1D(inner, width));
    dropout =
        register_module("dropout", torch::nn::Dropout(options.resid_pdrop()));
  }

  Tensor forward(const Tensor& x) {
    return dropout->forward(
        c_proj->forward(at::gelu(c_fc->forward(x), "tanh")));
  }

  Gpt2Options options;
  Conv1D c_fc{nullptr};
  Conv1D c_proj{nullptr};
  torch::nn::Dropout dropout{nullptr};
};
TORCH_MODULE(Gpt2Mlp);

struct Gpt2BlockImpl : torch::nn::Cloneable<Gpt2BlockImpl> {
  explicit Gpt2BlockImpl(Gpt2Options options_) : options(std::move(options_)) {
    reset();
  }

  void reset() override {
    ln_1 = register_module("ln_1", detail::gpt2_norm(options));
    attn = register_module("attn", Gpt2Attention(options));
    ln_2 = register_module("ln_2", detail::gpt2_norm(options));
    mlp = register_module("mlp", Gpt2Mlp(options));
  }

  Tensor forward(const LayerCall& call, const Tensor& mask, KeyValues* past) {
    const auto attended =
        call.hidden + attn->forward(normalised(call, ln_1), mask, past);
    return attended + mlp->forward(ln_2->forward(attended));
  }

  Gpt2Options options;
  torch::nn::LayerNorm ln_1{nullptr};
  Gpt2Attention attn{nullptr};
  torch::nn::LayerNorm ln_2{nullptr};
  Gpt2Mlp mlp{nullptr};
};
TORCH_MODULE(Gpt2Block);

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ Model ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

/// The decoder: token ids `[batch, length]` -> hidden states `[batch, length,
/// n_embd]`.
///
/// The published `gpt2` files have this module's names, and the triangle of
/// ones that old versions stored; load them by
/// `load_base(*model->transformer, path,
/// BaseWeightsOptions().ignore_extra({"attn.bias"}))`.
struct Gpt2ModelImpl : torch::nn::Cloneable<Gpt2ModelImpl> {
  explicit Gpt2ModelImpl(Gpt2Options options_) : options(std::move(options_)) {
    reset();
  }

  void reset() override {
    const auto width = options.n_embd();
    wte = register_module(
        "wte", torch::nn::Embedding(options.vocab_size(), width));
    wpe = register_module(
        "wpe", torch::nn::Embedding(options.n_positions(), width));
    extra_tokens =
        register_module("extra_tokens", ExtraTokens(extra_tokens_options()));
    drop = register_module("drop", torch::nn::Dropout(options.embd_pdrop()));
    h = register_module("h", torch::nn::ModuleList());
    for (int64_t i = 0; i < options.n_layer(); ++i) {
      h->push_back(Gpt2Block(options));
    }
    layer_loop = register_module("layer_loop", LayerLoop(layer_loop_options()));
    ln_f = register_module("ln_f", detail::gpt2_norm(options));
    initialise();
  }

  /// `attention_mask` `[batch, cached + length]` is 1 for a token and 0 for
  /// padding; leave it out when nothing is padded. `position_ids` `[batch or 1,
  /// length]` are counted from the number of cached tokens where absent, so
  /// padding on the left needs them: `(mask.cumsum(1) - 1).clamp_min(0)`. The
  /// tokens' keys and values are appended to `cache`.
  Tensor forward(
      const Tensor& input_ids,
      const Tensor& attention_mask = {},
      const Tensor& position_ids = {},
      KeyValues* cache = nullptr) {
    check_decoder_inputs(input_ids, attention_mask, position_ids, cache);
    auto tokens = extra_tokens->forward(
        {wte->forward(input_ids), attention_mask, position_ids, cache});
    const PaddingScope padding(tokens.mask_of_embeds());
    check_length(tokens);
    const auto mask = causal_mask(tokens);
    const auto past = tokens.past(); // before the cache grows
    const auto hidden =
        drop->forward(tokens.embeds + wpe->forward(tokens.positions()));
    return layer_loop
        ->forward(
            hidden,
            tokens.mask_of_embeds(),
            *h,
            [&](torch::nn::Module& block, const LayerCall& call) {
              return block.as<Gpt2BlockImpl>()->forward(
                  call,
                  causal_mask(call, mask, hidden.size(1), past),
                  tokens.key_values());
            },
            torch::nn::AnyModule(ln_f))
        .hidden;
  }

  Gpt2Options options;
  torch::nn::Embedding wte{nullptr};
  torch::nn::Embedding wpe{nullptr};
  ExtraTokens extra_tokens{nullptr};
  torch::nn::Dropout drop{nullptr};
  torch::nn::ModuleList h{nullptr};
  LayerLoop layer_loop{nullptr};
  torch::nn::LayerNorm ln_f{nullptr};

 protected:
  FORWARD_HAS_DEFAULT_ARGS(
      {1, torch::nn::AnyValue(Tensor())},
      {2, torch::nn::AnyValue(Tensor())},
      {3, torch::nn::AnyValue(static_cast<KeyValues*>(nullptr))})

 private:
  /// What prompts and prefixes must know of this stack.
  ExtraTokensOptions extra_tokens_options() const {
    return ExtraTokensOptions(
               options.n_embd(),
               options.n_layer(),
               options.n_head(),
               options.n_embd() / options.n_head())
        .max_positions(options.n_positions())
        .word_embeddings("wte")
        .stack("decoder");
  }

  /// What routers and side networks must know of the layers.
  LayerLoopOptions layer_loop_options() const {
    return LayerLoopOptions(options.n_embd(), options.n_layer())
        .causal(true)
        .num_heads(options.n_head())
        .side_block([options = options](int64_t /*layer*/, int64_t reduction) {
          return std::make_shared<Gpt2BlockImpl>(options.reduced(reduction));
        })
        .side_norm([options = options](int64_t reduction) {
          return torch::nn::AnyModule(
              detail::gpt2_norm(options.reduced(reduction)));
        })
        .input_norm([](torch::nn::Module& block, const Tensor& x) {
          return block.as<Gpt2BlockImpl>()->ln_1->forward(x);
        });
  }

  /// The published start: N(0, range²), and less for what is added to the
  /// residual stream, 2 n_layer times.
  void initialise() {
    const double range = options.initializer_range();
    const double added = range / std::sqrt(2.0 * options.n_layer());
    torch::nn::init::normal_(wte->weight, 0, range);
    torch::nn::init::normal_(wpe->weight, 0, range);
    for (const auto& each : *h) {
      auto& block = *each->as<Gpt2BlockImpl>();
      torch::nn::init::normal_(block.attn->c_attn->weight, 0, range);
      torch::nn::init::normal_(block.attn->c_proj->weight, 0, added);
      torch::nn::init::normal_(block.mlp->c_fc->weight, 0, range);
      torch::nn::init::normal_(block.mlp->c_proj->weight, 0, added);
    }
  }

  void check_length(const TokenInputs& tokens) const {
    const auto length = tokens.positions_before() + tokens.embeds.size(1);
    TORCH_CHECK(
        length <= options.n_positions(),
        "peft: ",
        length,
        " tokens, the cached ones included, are more than the ",
        options.n_positions(),
        " positions of this model; truncate the input, or generate less");
  }
};
TORCH_MODULE(Gpt2Model);

/// The decoder with its output layer: token ids `[batch, length]` -> logits
/// `[batch, length, vocab_size]`.
struct Gpt2ForCausalLMImpl : torch::nn::Cloneable<Gpt2ForCausalLMImpl> {
  explicit Gpt2ForCausalLMImpl(Gpt2Options options_)
      : options(std::move(options_)) {
    reset();
  }

  void reset() override {
    transformer = register_module("transformer", Gpt2Model(options));
    lm_head = register_module(
        "lm_head", LmHead(options.n_embd(), options.vocab_size()));
    if (options.tie_word_embeddings()) {
      lm_head->tie(transformer->wte->weight);
    } else {
      torch::nn::init::normal_(lm_head->weight, 0, options.initializer_range());
    }
  }

  /// The arguments are those of Gpt2Model.
  Tensor forward(
      const Tensor& input_ids,
      const Tensor& attention_mask = {},
      const Tensor& position_ids = {},
      KeyValues* cache = nullptr) {
    return lm_head->forward(
        transformer->forward(input_ids, attention_mask, position_ids, cache));
  }

  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device =
          std::nullopt) const override {
    auto copy = Cloneable::clone(device);
    auto* model = copy->as<Gpt2ForCausalLMImpl>();
    if (options.tie_word_embeddings()) {
      model->lm_head->tie(model->transformer->wte->weight);
    }
    return copy;
  }

  Gpt2Options options;
  Gpt2Model transformer{nullptr};
  LmHead lm_head{nullptr};

 protected:
  FORWARD_HAS_DEFAULT_ARGS(
      {1, torch::nn::AnyValue(Tensor())},
      {2, torch::nn::AnyValue(Tensor())},
      {3, torch::nn::AnyValue(static_cast<KeyValues*>(nullptr))})
};
TORCH_MODULE(Gpt2ForCausalLM);

} // namespace peft::models
