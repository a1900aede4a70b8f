#pragma once

// T5 as ordinary LibTorch modules: an encoder and a decoder that know where
// tokens stand only by a learnt bias on their distance.
//
// Raffel et al. 2019, arXiv:1910.10683 (v1.0: relu, the embedding is the output
// layer too); v1.1 and Flan-T5 have a gated gelu and an output layer of their
// own. One head of attention is
//
//   softmax(q kᵀ + bias[bucket(place of k - place of q)]) v
//
// Every module is registered under the name Hugging Face gives it
// ("decoder.block.0.layer.1.EncDecAttention.q"), so checkpoints load by name
// and adapter files fit both ways. Old ones hold a table that nothing reads:
// load_base(*model, path, BaseWeightsOptions().ignore_extra(
// {"EncDecAttention.relative_attention_bias.weight"})). Run in float32 or
// bfloat16: with the published weights float16 overflows.

#include <peft/core/extra_tokens.h>
#include <peft/core/layer_loop.h>
#include <peft/core/padding.h>
#include <peft/models/attention.h>
#include <peft/models/generation.h>
#include <peft/models/lm_head.h>
#include <peft/models/t5/layers.h>

#include <torch/nn/cloneable.h>
#include <torch/nn/init.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/dropout.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <utility>

namespace peft::models {

/// What a stack gives.
struct T5StackOutput {
  Tensor hidden; // [batch, length, d_model]
  /// `[batch, length]`, 1 for a token and 0 for padding, or undefined: as it
  /// was given, with ones for the embeddings that a prompt put in front.
  Tensor attention_mask;
  /// What an encoder's side network gave, for the decoder's; else undefined.
  Tensor side;
};

/// What a decoder keeps between steps.
struct T5Cache {
  KeyValues self_attention;
  KeyValues cross_attention;
  /// Whether `cross_attention` holds the encoder's result yet; an adapter's
  /// keys stand there before.
  bool has_encoder = false;
};

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ Stack ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

/// The encoder or the decoder: token ids `[batch, length]` -> hidden states
/// `[batch, length, d_model]`.
struct T5StackImpl : torch::nn::Cloneable<T5StackImpl> {
  T5StackImpl(T5Options options_, bool is_decoder_)
      : options(std::move(options_)), is_decoder(is_decoder_) {
    detail::check(options);
    reset();
  }

  void reset() override {
    embed_tokens = register_module("embed_tokens", T5EmbedTokens(options));
    extra_tokens = register_module(
        "extra_tokens",
        ExtraTokens(extra_tokens_options(is_decoder ? "decoder" : "encoder")
                        .word_embeddings("embed_tokens")));
    if (is_decoder) {
      cross_extra_tokens = register_module(
          "cross_extra_tokens", ExtraTokens(extra_tokens_options("cross")));
    }
    block = register_module("block", torch::nn::ModuleList());
    for (int64_t i = 0; i < num_layers(); ++i) {
      block->push_back(T5Block(options, is_decoder, i == 0));
    }
    layer_loop = register_module("layer_loop", LayerLoop(layer_loop_options()));
    final_layer_norm = register_module(
        "final_layer_norm",
        T5LayerNorm(options.d_model(), options.layer_norm_epsilon()));
    dropout =
        register_module("dropout", torch::nn::Dropout(options.dropout_rate()));
  }

  /// `attention_mask` `[batch, cached + length]` is 1 for a token and 0 for
  /// padding; leave it out when nothing is padded. A decoder takes what the
  /// encoder gave; with a cache it goes on after the tokens in there.
  T5StackOutput forward(
      const Tensor& input_ids,
      const Tensor& attention_mask = {},
      const T5StackOutput& encoded = {},
      T5Cache* cache = nullptr) {
    check(input_ids, attention_mask, encoded, cache);
    auto tokens = extra_tokens->forward(
        {embed_tokens->forward(input_ids),
         attention_mask,
         {},
         cache ? &cache->self_attention : nullptr});
    const PaddingScope padding(tokens.mask_of_embeds());
    TokenInputs memory(
        encoded.hidden,
        encoded.attention_mask,
        {},
        cache ? &cache->cross_attention : nullptr);
    if (is_decoder) {
      memory = cross_extra_tokens->forward(memory);
    }

    const auto past = tokens.past(); // the cache grows below
    auto bias = position_bias(*block[0]->as<T5BlockImpl>(), tokens, past);
    const T5Source cross{
        memory.embeds,
        key_mask(memory.attention_mask),
        memory.key_values(),
        cache != nullptr && cache->has_encoder,
        encoded.attention_mask};
    const auto run = [&](torch::nn::Module& each, const LayerCall& call) {
      auto& layer = *each.as<T5BlockImpl>();
      if (call.side && layer.has_relative_attention_bias) {
        bias = position_bias(layer, tokens, past); // and for those above it
      }
      T5Source self;
      // A side network's keys are the last that the mask is for.
      self.mask = call.side ? bias : call.attention(bias, past);
      self.cache = tokens.key_values();
      return layer.forward(
          call,
          self,
          call.side ? of_side(cross, encoded) : cross,
          cache_slot(call, num_layers()));
    };
    const auto output = layer_loop->forward(
        dropout->forward(tokens.embeds),
        tokens.mask_of_embeds(),
        *block,
        run,
        torch::nn::AnyModule(final_layer_norm));
    if (cache != nullptr) {
      cache->has_encoder = true;
    }
    return {
        dropout->forward(output.hidden),
        tokens.mask_of_embeds(),
        output.side.defined() ? dropout->forward(output.side) : output.side};
  }

  int64_t num_layers() const {
    return is_decoder
        ? options.num_decoder_layers().value_or(options.num_layers())
        : options.num_layers();
  }

  T5Options options;
  bool is_decoder;
  T5EmbedTokens embed_tokens{nullptr};
  ExtraTokens extra_tokens{nullptr};
  ExtraTokens cross_extra_tokens{nullptr};
  torch::nn::ModuleList block{nullptr};
  LayerLoop layer_loop{nullptr};
  T5LayerNorm final_layer_norm{nullptr};
  torch::nn::Dropout dropout{nullptr};

 private:
  /// What prompts and prefixes must know of this stack.
  ExtraTokensOptions extra_tokens_options(const char* stack) const {
    return ExtraTokensOptions(
               options.d_model(),
               num_layers(),
               options.num_heads(),
               options.d_kv())
        .stack(stack);
  }

  /// What routers and side networks must know of the layers. The first block of
  /// a side network, whichever layer it stands for, is made as layer 0: it has
  /// the table of distances.
  LayerLoopOptions layer_loop_options() const {
    return LayerLoopOptions(options.d_model(), num_layers())
        .causal(is_decoder)
        .num_heads(options.num_heads())
        .side_block([options = options, is_decoder = is_decoder](
                        int64_t layer, int64_t reduction) {
          return std::make_shared<T5BlockImpl>(
              options.reduced(reduction), is_decoder, layer == 0);
        })
        .side_norm([options = options](int64_t reduction) {
          const auto side = options.reduced(reduction);
          return torch::nn::AnyModule(
              T5LayerNorm(side.d_model(), side.layer_norm_epsilon()));
        })
        .input_norm([](torch::nn::Module& each, const Tensor& x) {
          return each.as<T5BlockImpl>()->self_attention().layer_norm->forward(
              x);
        });
  }

  /// A block's bias on distances, with -inf where a token may not look, `[batch
  /// or 1, heads, length, past + length]`.
  Tensor position_bias(
      T5BlockImpl& layer,
      const TokenInputs& tokens,
      int64_t past) const {
    const auto length = tokens.embeds.size(1);
    const auto bias =
        layer.self_attention().SelfAttention->position_bias(past, length);
    const auto mask = is_decoder
        ? causal_mask(
              tokens.attention_mask, length, past + length, bias.device())
        : key_mask(tokens.attention_mask);
    return mask.defined()
        ? bias.masked_fill(
              mask.logical_not(), -std::numeric_limits<double>::infinity())
        : bias;
  }

  /// `[batch, keys]` -> boolean `[batch, 1, 1, keys]`.
  static Tensor key_mask(const Tensor& attention_mask) {
    return attention_mask.defined()
        ? attention_mask.to(torch::kBool).unsqueeze(1).unsqueeze(1)
        : attention_mask;
  }

  /// The same keys of the encoder, as its side network gives them.
  static T5Source of_side(T5Source cross, const T5StackOutput& encoded) {
    TORCH_CHECK(
        !encoded.hidden.defined() || encoded.side.defined(),
        "peft: the side network of T5's decoder reads that of the encoder, "
        "which has none; attach one to the whole model");
    cross.states = encoded.side;
    return cross;
  }

  void check(
      const Tensor& input_ids,
      const Tensor& attention_mask,
      const T5StackOutput& encoded,
      const T5Cache* cache) const {
    TORCH_CHECK(
        encoded.hidden.defined() == is_decoder && (is_decoder || !cache),
        "peft: T5's decoder takes what its encoder gave; the encoder takes "
        "neither that nor a cache");
    check_decoder_inputs(
        input_ids,
        attention_mask,
        Tensor(),
        cache ? &cache->self_attention : nullptr);
    TORCH_CHECK(
        !is_decoder || encoded.hidden.size(0) == input_ids.size(0),
        "peft: the decoder has ",
        input_ids.size(0),
        " rows and the encoder ",
        is_decoder ? encoded.hidden.size(0) : 0);
  }
};
TORCH_MODULE(T5Stack);

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ Models ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

/// The two stacks and the embedding they share: what both models below are.
template <class Derived>
struct T5NetworkImpl : torch::nn::Cloneable<Derived> {
  explicit T5NetworkImpl(T5Options options_) : options(std::move(options_)) {
    detail::check(options);
  }

  void reset() override {
    shared = this->register_module(
        "shared",
        torch::nn::Embedding(options.vocab_size(), options.d_model()));
    encoder = this->register_module("encoder", T5Stack(options, false));
    decoder = this->register_module("decoder", T5Stack(options, true));
    tie();
  }

  /// `attention_mask` `[batch, length]` is 1 for a token and 0 for padding;
  /// leave it out when nothing is padded.
  T5StackOutput encode(
      const Tensor& input_ids,
      const Tensor& attention_mask = {}) {
    return encoder->forward(input_ids, attention_mask);
  }

  /// The hidden states of the decoder's tokens `[batch, length]`. With a cache
  /// they come after those in there, and the mask covers both.
  Tensor decode(
      const Tensor& decoder_input_ids,
      const T5StackOutput& encoded,
      const Tensor& decoder_attention_mask = {},
      T5Cache* cache = nullptr) {
    return decoder
        ->forward(decoder_input_ids, decoder_attention_mask, encoded, cache)
        .hidden;
  }

  /// Lets both stacks look up `shared`.
  void tie() {
    encoder->embed_tokens->tie(shared->weight);
    decoder->embed_tokens->tie(shared->weight);
  }

  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device =
          std::nullopt) const override {
    auto copy = torch::nn::Cloneable<Derived>::clone(device);
    copy->template as<Derived>()->tie();
    return copy;
  }

  T5Options options;
  torch::nn::Embedding shared{nullptr};
  T5Stack encoder{nullptr};
  T5Stack decoder{nullptr};
};

/// The bare network: token ids of both sides -> the decoder's hidden states
/// `[batch, length, d_model]`.
struct T5ModelImpl : T5NetworkImpl<T5ModelImpl> {
  explicit T5ModelImpl(T5Options options_)
      : T5NetworkImpl(std::move(options_)) {
    reset();
  }

  Tensor forward(
      const Tensor& input_ids,
      const Tensor& attention_mask,
      const Tensor& decoder_input_ids,
      const Tensor& decoder_attention_mask = {}) {
    return decode(
        decoder_input_ids,
        encode(input_ids, attention_mask),
        decoder_attention_mask);
  }

 protected:
  FORWARD_HAS_DEFAULT_ARGS({3, torch::nn::AnyValue(Tensor())})
};
TORCH_MODULE(T5Model);

/// The network with its output layer: token ids of both sides -> logits
/// `[batch, length, vocab_size]`. Training takes
///
///     logits = model->forward(ids, mask, model->shift_right(labels));
///     loss = cross_entropy(logits.flatten(0, 1), labels.flatten());
struct T5ForConditionalGenerationImpl
    : T5NetworkImpl<T5ForConditionalGenerationImpl> {
  explicit T5ForConditionalGenerationImpl(T5Options options_)
      : T5NetworkImpl(std::move(options_)) {
    reset();
  }

  void reset() override {
    T5NetworkImpl::reset();
    lm_head = register_module(
        "lm_head", LmHead(options.d_model(), options.vocab_size()));
    torch::nn::init::normal_(lm_head->weight);
    tie();
  }

  Tensor forward(
      const Tensor& input_ids,
      const Tensor& attention_mask,
      const Tensor& decoder_input_ids,
      const Tensor& decoder_attention_mask = {}) {
    return logits(decode(
        decoder_input_ids,
        encode(input_ids, attention_mask),
        decoder_attention_mask));
  }

  /// The output layer, on what `decode` gives.
  Tensor logits(const Tensor& hidden) {
    return lm_head->forward(
        options.tie_word_embeddings()
            ? hidden * std::pow(options.d_model(), -0.5)
            : hidden);
  }

  /// The decoder's token ids for `labels` `[batch, length]`: each stands one
  /// place later, the start token first, and -100 becomes padding.
  Tensor shift_right(const Tensor& labels) const {
    TORCH_CHECK(
        labels.dim() == 2,
        "peft: labels must have the shape [batch, length], got ",
        labels.sizes());
    const auto shifted =
        at::constant_pad_nd(labels, {1, -1}, options.decoder_start_token_id());
    return shifted.masked_fill(shifted.eq(-100), options.pad_token_id());
  }

  void tie() {
    T5NetworkImpl::tie();
    if (options.tie_word_embeddings()) {
      lm_head->tie(shared->weight);
    }
  }

  LmHead lm_head{nullptr};

 protected:
  FORWARD_HAS_DEFAULT_ARGS({3, torch::nn::AnyValue(Tensor())})
};
TORCH_MODULE(T5ForConditionalGeneration);

/// Writes an answer to `input_ids` `[batch, length]`, one token a step, padding
/// on either side; -> `[batch, 1 + new]`, the start token first. Call
/// `model->eval()` first.
inline Tensor generate(
    T5ForConditionalGeneration model,
    const Tensor& input_ids,
    const Tensor& attention_mask = {},
    GenerationOptions options = {}) {
  torch::NoGradGuard no_grad;
  if (!options.pad_token_id()) {
    options.pad_token_id(model->options.pad_token_id());
  }
  const auto encoded = model->encode(input_ids, attention_mask);
  const auto start = at::full(
      {input_ids.size(0), 1},
      model->options.decoder_start_token_id(),
      input_ids.options());
  T5Cache cache;
  return extend_sequences(start, options, [&](const Tensor& tokens) {
    return model->logits(model->decode(tokens, encoded, Tensor(), &cache));
  });
}

} // namespace peft::models
