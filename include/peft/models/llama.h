#pragma once

// LLaMA-style decoders as ordinary LibTorch modules.
//
// Touvron et al. 2023, arXiv:2302.13971: RMSNorm (arXiv:1910.07467) before each
// half of a layer, rotary positions (arXiv:2104.09864), SwiGLU
// (arXiv:2002.05202), and keys and values shared by groups of heads
// (arXiv:2305.13245). Every module is registered under the name Hugging Face
// gives it ("model.layers.0.self_attn.q_proj"), so checkpoints load by name and
// adapter files fit both ways. extra_tokens and layer_loop are the two lines
// that a network of one's own would copy for methods that no weight can carry.
// Rotations are the original ones: a checkpoint with `rope_scaling` needs more
// than this network does.

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
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

namespace peft::models {

/// Sizes of a network, by the names of Hugging Face's `config.json`.
///
/// Example:
/// ```
/// using namespace peft::models;
/// LlamaForCausalLM model(
///     LlamaOptions().hidden_size(2048).num_attention_heads(32)
///         .num_key_value_heads(4).num_hidden_layers(22)
///         .intermediate_size(5632));
/// ```
struct LlamaOptions {
  /// The same network with its widths divided by `reduction`.
  LlamaOptions reduced(int64_t reduction) const {
    const auto size =
        head_dim().value_or(hidden_size() / num_attention_heads());
    TORCH_CHECK_VALUE(
        reduction > 0 && hidden_size() % reduction == 0 &&
            intermediate_size() % reduction == 0 && size % reduction == 0,
        "peft: a reduction must divide hidden_size (",
        hidden_size(),
        "), intermediate_size (",
        intermediate_size(),
        ") and head_dim (",
        size,
        "), got ",
        reduction);
    return LlamaOptions(*this)
        .hidden_size(hidden_size() / reduction)
        .intermediate_size(intermediate_size() / reduction)
        .head_dim(size / reduction);
  }

  TORCH_ARG(int64_t, vocab_size) = 32000;
  TORCH_ARG(int64_t, hidden_size) = 4096;
  TORCH_ARG(int64_t, intermediate_size) = 11008;
  TORCH_ARG(int64_t, num_hidden_layers) = 32;
  TORCH_ARG(int64_t, num_attention_heads) = 32;
  /// Absent: as many as num_attention_heads.
  TORCH_ARG(std::optional<int64_t>, num_key_value_heads);
  /// Absent: hidden_size / num_attention_heads.
  TORCH_ARG(std::optional<int64_t>, head_dim);
  /// The embedding of this token gets no gradient.
  TORCH_ARG(std::optional<int64_t>, pad_token_id);
  TORCH_ARG(double, rms_norm_eps) = 1e-6;
  TORCH_ARG(double, rope_theta) = 10000;
  TORCH_ARG(double, attention_dropout) = 0;
  TORCH_ARG(bool, attention_bias) = false;
  TORCH_ARG(bool, mlp_bias) = false;
  TORCH_ARG(double, initializer_range) = 0.02;
  TORCH_ARG(bool, tie_word_embeddings) = false;
};

namespace detail {

inline int64_t llama_head_dim(const LlamaOptions& options) {
  return options.head_dim().value_or(
      options.hidden_size() / options.num_attention_heads());
}

inline int64_t llama_key_value_heads(const LlamaOptions& options) {
  return options.num_key_value_heads().value_or(options.num_attention_heads());
}

} // namespace detail

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~ Norm and positions ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

/// weight * x / sqrt(mean(x²) + eps), computed in float32 at least.
struct LlamaRMSNormImpl : torch::nn::Cloneable<LlamaRMSNormImpl> {
  LlamaRMSNormImpl(int64_t hidden_size_, double eps_)
      : hidden_size(hidden_size_), eps(eps_) {
    reset();
  }

  void reset() override {
    weight = register_parameter("weight", torch::ones({hidden_size}));
  }

  Tensor forward(const Tensor& x) {
    const auto wide = x.to(at::promote_types(x.scalar_type(), at::kFloat));
    const auto mean_square = wide.square().mean(-1, /*keepdim=*/true);
    return weight * (wide * (mean_square + eps).rsqrt()).to(x.scalar_type());
  }

  int64_t hidden_size;
  double eps;
  Tensor weight;
};
TORCH_MODULE(LlamaRMSNorm);

/// The angles p θ^(-2i/d) of positions p, as cosine and sine: `[batch, length,
/// head_dim]`, both halves alike.
struct LlamaRotation {
  Tensor cos;
  Tensor sin;

  LlamaRotation(
      const Tensor& position_ids,
      int64_t head_dim,
      double theta,
      at::ScalarType dtype) {
    const auto options =
        at::TensorOptions(at::kFloat).device(position_ids.device());
    const auto frequencies =
        at::pow(theta, at::arange(0, head_dim, 2, options) / head_dim)
            .reciprocal();
    const auto angles = position_ids.unsqueeze(-1) * frequencies;
    const auto both = at::cat({angles, angles}, -1);
    cos = both.cos().to(dtype);
    sin = both.sin().to(dtype);
  }
};

/// Turns the pairs (x[i], x[i + head_dim / 2]) of `[batch, heads, length,
/// head_dim]` by angles `[batch, length, head_dim]`.
inline Tensor rotate(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  const auto halves = x.chunk(2, -1);
  const auto turned = at::cat({-halves[1], halves[0]}, -1);
  return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1);
}

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ Layer ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

/// Causal attention with rotary positions, `[batch, length, hidden]` -> the
/// same.
struct LlamaAttentionImpl : torch::nn::Cloneable<LlamaAttentionImpl> {
  explicit LlamaAttentionImpl(LlamaOptions options_)
      : options(std::move(options_)) {
    reset();
  }

  void reset() override {
    const auto heads = options.num_attention_heads();
    const auto shared = detail::llama_key_value_heads(options);
    const auto size = detail::llama_head_dim(options);
    TORCH_CHECK(
        options.head_dim() || options.hidden_size() % heads == 0,
        "peft: hidden_size (",
        options.hidden_size(),
        ") must be a multiple of num_attention_heads (",
        heads,
        "), or head_dim be given");
    TORCH_CHECK(
        heads % shared == 0,
        "peft: num_attention_heads (",
        heads,
        ") must be a multiple of num_key_value_heads (",
        shared,
        ")");
    TORCH_CHECK(
        size % 2 == 0,
        "peft: rotary positions turn pairs: the heads' size must be even, got ",
        size);
    const auto linear = [this](int64_t in, int64_t out) {
      return torch::nn::Linear(
          torch::nn::LinearOptions(in, out).bias(options.attention_bias()));
    };
    const auto hidden = options.hidden_size();
    q_proj = register_module("q_proj", linear(hidden, heads * size));
    k_proj = register_module("k_proj", linear(hidden, shared * size));
    v_proj = register_module("v_proj", linear(hidden, shared * size));
    o_proj = register_module("o_proj", linear(heads * size, hidden));
  }

  /// `rotation` is that of all tokens, `mask` that of `causal_attention`;
  /// `past` holds keys and values that stand in front, or is null.
  Tensor forward(
      const LayerCall& call,
      const LlamaRotation& rotation,
      const Tensor& mask,
      KeyValues* past) {
    const auto split = // [batch, heads, length, head_dim]
        [size = detail::llama_head_dim(options)](const Tensor& packed) {
          return packed.unflatten(-1, {-1, size}).transpose(1, 2);
        };
    const auto query = rotate(
        split(q_proj->forward(call.hidden)),
        call.of_queries(rotation.cos),
        call.of_queries(rotation.sin));
    auto key = rotate(
        split(k_proj->forward(call.context)),
        call.of_keys(rotation.cos),
        call.of_keys(rotation.sin));
    auto value = split(v_proj->forward(call.context));
    if (past != nullptr) {
      const auto slot = cache_slot(call, options.num_hidden_layers());
      std::tie(key, value) = past->update(slot, key, value, call.hidden);
    }
    return o_proj->forward(causal_attention(
        query,
        key,
        value,
        mask,
        is_training() ? options.attention_dropout() : 0.0));
  }

  LlamaOptions options;
  torch::nn::Linear q_proj{nullptr};
  torch::nn::Linear k_proj{nullptr};
  torch::nn::Linear v_proj{nullptr};
  torch::nn::Linear o_proj{nullptr};
};
TORCH_MODULE(LlamaAttention);

/// SwiGLU, down(silu(gate(x)) * up(x)).
struct LlamaMLPImpl : torch::nn::Cloneable<LlamaMLPImpl> {
  explicit LlamaMLPImpl(LlamaOptions options_) : options(std::move(options_)) {
    reset();
  }

  void reset() override {
    const auto linear = [this](int64_t in, int64_t out) {
      return torch::nn::Linear(
          torch::nn::LinearOptions(in, out).bias(options.mlp_bias()));
    };
    const auto hidden = options.hidden_size();
    const auto inner = options.intermediate_size();
    gate_proj = register_module("gate_proj", linear(hidden, inner));
    up_proj = register_module("up_proj", linear(hidden, inner));
    down_proj = register_module("down_proj", linear(inner, hidden));
  }

  Tensor forward(const Tensor& x) {
    return down_proj->forward(
        at::silu(gate_proj->forward(x)) * up_proj->forward(x));
  }

  LlamaOptions options;
  torch::nn::Linear gate_proj{nullptr};
  torch::nn::Linear up_proj{nullptr};
  torch::nn::Linear down_proj{nullptr};
};
TORCH_MODULE(LlamaMLP);

struct LlamaDecoderLayerImpl : torch::nn::Cloneable<LlamaDecoderLayerImpl> {
  explicit LlamaDecoderLayerImpl(LlamaOptions options_)
      : options(std::move(options_)) {
    reset();
  }

  void reset() override {
    self_attn = register_module("self_attn", LlamaAttention(options));
    mlp = register_module("mlp", LlamaMLP(options));
    input_layernorm = register_module(
        "input_layernorm",
        LlamaRMSNorm(options.hidden_size(), options.rms_norm_eps()));
    post_attention_layernorm = register_module(
        "post_attention_layernorm",
        LlamaRMSNorm(options.hidden_size(), options.rms_norm_eps()));
  }

  Tensor forward(
      const LayerCall& call,
      const LlamaRotation& rotation,
      const Tensor& mask,
      KeyValues* past) {
    const auto attended = call.hidden +
        self_attn->forward(
            normalised(call, input_layernorm), rotation, mask, past);
    return attended + mlp->forward(post_attention_layernorm->forward(attended));
  }

  LlamaOptions options;
  LlamaAttention self_attn{nullptr};
  LlamaMLP mlp{nullptr};
  LlamaRMSNorm input_layernorm{nullptr};
  LlamaRMSNorm post_attention_layernorm{nullptr};
};
TORCH_MODULE(LlamaDecoderLayer);

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ Model ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

/// The decoder: token ids `[batch, length]` -> hidden states `[batch, length,
/// hidden]`.
struct LlamaModelImpl : torch::nn::Cloneable<LlamaModelImpl> {
  explicit LlamaModelImpl(LlamaOptions options_)
      : options(std::move(options_)) {
    reset();
  }

  void reset() override {
    embed_tokens = register_module(
        "embed_tokens",
        torch::nn::Embedding(torch::nn::EmbeddingOptions(
                                 options.vocab_size(), options.hidden_size())
                                 .padding_idx(options.pad_token_id())));
    extra_tokens =
        register_module("extra_tokens", ExtraTokens(extra_tokens_options()));
    layers = register_module("layers", torch::nn::ModuleList());
    for (int64_t i = 0; i < options.num_hidden_layers(); ++i) {
      layers->push_back(LlamaDecoderLayer(options));
    }
    layer_loop = register_module("layer_loop", LayerLoop(layer_loop_options()));
    norm = register_module(
        "norm", LlamaRMSNorm(options.hidden_size(), options.rms_norm_eps()));
    initialise();
  }

  /// `attention_mask` `[batch, cached + length]` is 1 for a token and 0 for
  /// padding; leave it out when nothing is padded. `position_ids` `[batch or 1,
  /// length]` are counted from the number of cached tokens where absent; with
  /// padding on the left, `(mask.cumsum(1) - 1).clamp_min(0)` counts from each
  /// row's first token. The tokens' keys and values are appended to `cache`.
  Tensor forward(
      const Tensor& input_ids,
      const Tensor& attention_mask = {},
      const Tensor& position_ids = {},
      KeyValues* cache = nullptr) {
    check_decoder_inputs(input_ids, attention_mask, position_ids, cache);
    auto tokens = extra_tokens->forward(
        {embed_tokens->forward(input_ids),
         attention_mask,
         position_ids,
         cache});
    const PaddingScope padding(tokens.mask_of_embeds());
    const auto mask = causal_mask(tokens);
    const auto past = tokens.past(); // before the cache grows
    const auto positions = tokens.positions();
    const auto rotations = [&](const LlamaOptions& sizes) {
      return LlamaRotation(
          positions,
          detail::llama_head_dim(sizes),
          sizes.rope_theta(),
          tokens.embeds.scalar_type());
    };
    const auto rotation = rotations(options);
    return layer_loop
        ->forward(
            tokens.embeds,
            tokens.mask_of_embeds(),
            *layers,
            [&](torch::nn::Module& block, const LayerCall& call) {
              auto& layer = *block.as<LlamaDecoderLayerImpl>();
              // A side network's heads are smaller.
              return layer.forward(
                  call,
                  call.side ? rotations(layer.options) : rotation,
                  causal_mask(call, mask, tokens.embeds.size(1), past),
                  tokens.key_values());
            },
            torch::nn::AnyModule(norm))
        .hidden;
  }

  LlamaOptions options;
  torch::nn::Embedding embed_tokens{nullptr};
  ExtraTokens extra_tokens{nullptr};
  torch::nn::ModuleList layers{nullptr};
  LayerLoop layer_loop{nullptr};
  LlamaRMSNorm norm{nullptr};

 protected:
  FORWARD_HAS_DEFAULT_ARGS(
      {1, torch::nn::AnyValue(Tensor())},
      {2, torch::nn::AnyValue(Tensor())},
      {3, torch::nn::AnyValue(static_cast<KeyValues*>(nullptr))})

 private:
  /// What prompts and prefixes must know of this stack.
  ExtraTokensOptions extra_tokens_options() const {
    return ExtraTokensOptions(
               options.hidden_size(),
               options.num_hidden_layers(),
               detail::llama_key_value_heads(options),
               detail::llama_head_dim(options))
        .word_embeddings("embed_tokens")
        .stack("decoder");
  }

  /// What routers and side networks must know of the layers.
  LayerLoopOptions layer_loop_options() const {
    return LayerLoopOptions(options.hidden_size(), options.num_hidden_layers())
        .causal(true)
        .num_heads(options.num_attention_heads())
        .side_block([options = options](int64_t /*layer*/, int64_t reduction) {
          return std::make_shared<LlamaDecoderLayerImpl>(
              options.reduced(reduction));
        })
        .side_norm([options = options](int64_t reduction) {
          const auto side = options.reduced(reduction);
          return torch::nn::AnyModule(
              LlamaRMSNorm(side.hidden_size(), side.rms_norm_eps()));
        })
        .input_norm([](torch::nn::Module& block, const Tensor& x) {
          return block.as<LlamaDecoderLayerImpl>()->input_layernorm->forward(x);
        });
  }

  /// Matrices start as N(0, range²), biases at zero.
  void initialise() {
    torch::NoGradGuard no_grad;
    for (auto& item : layers->named_parameters()) {
      auto& parameter = item.value();
      if (parameter.dim() == 2) {
        parameter.normal_(0, options.initializer_range());
      } else if (item.key().find("_proj.bias") != std::string::npos) {
        parameter.zero_();
      }
    }
    embed_tokens->weight.normal_(0, options.initializer_range());
    if (options.pad_token_id()) {
      embed_tokens->weight[*options.pad_token_id()].zero_();
    }
  }
};
TORCH_MODULE(LlamaModel);

/// The decoder with its output layer: token ids `[batch, length]` -> logits
/// `[batch, length, vocab_size]`.
struct LlamaForCausalLMImpl : torch::nn::Cloneable<LlamaForCausalLMImpl> {
  explicit LlamaForCausalLMImpl(LlamaOptions options_)
      : options(std::move(options_)) {
    reset();
  }

  void reset() override {
    model = register_module("model", LlamaModel(options));
    lm_head = register_module(
        "lm_head", LmHead(options.hidden_size(), options.vocab_size()));
    if (options.tie_word_embeddings()) {
      lm_head->tie(model->embed_tokens->weight);
    } else {
      torch::nn::init::normal_(lm_head->weight, 0, options.initializer_range());
    }
  }

  /// The arguments are those of LlamaModel.
  Tensor forward(
      const Tensor& input_ids,
      const Tensor& attention_mask = {},
      const Tensor& position_ids = {},
      KeyValues* cache = nullptr) {
    return lm_head->forward(
        model->forward(input_ids, attention_mask, position_ids, cache));
  }

  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device =
          std::nullopt) const override {
    auto copy = Cloneable::clone(device);
    auto* twin = copy->as<LlamaForCausalLMImpl>();
    if (options.tie_word_embeddings()) {
      twin->lm_head->tie(twin->model->embed_tokens->weight);
    }
    return copy;
  }

  LlamaOptions options;
  LlamaModel model{nullptr};
  LmHead lm_head{nullptr};

 protected:
  FORWARD_HAS_DEFAULT_ARGS(
      {1, torch::nn::AnyValue(Tensor())},
      {2, torch::nn::AnyValue(Tensor())},
      {3, torch::nn::AnyValue(static_cast<KeyValues*>(nullptr))})
};
TORCH_MODULE(LlamaForCausalLM);

} // namespace peft::models
