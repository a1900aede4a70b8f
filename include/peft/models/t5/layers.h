#pragma once

// What a T5 is built of, from its options to one block; the network itself is
// in ../t5.h.

#include <peft/core/extra_tokens.h>
#include <peft/core/layer_loop.h>
#include <peft/core/padding.h>
#include <peft/models/attention.h>

#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/init.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/dropout.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

namespace peft::models {

using torch::Tensor;

/// Sizes of a network, by the names of Hugging Face's `config.json`.
///
/// Example, Flan-T5-small:
/// ```
/// using namespace peft::models;
/// T5ForConditionalGeneration model(
///     T5Options().d_ff(1024).num_layers(8).num_heads(6)
///         .feed_forward_proj("gated-gelu").tie_word_embeddings(false));
/// ```
struct T5Options {
  /// The same network with its widths divided by `reduction`, but as many
  /// heads.
  T5Options reduced(int64_t reduction) const {
    TORCH_CHECK_VALUE(
        reduction > 0 && d_model() % reduction == 0 &&
            d_kv() % reduction == 0 && d_ff() % reduction == 0,
        "peft: a reduction must divide d_model (",
        d_model(),
        "), d_kv (",
        d_kv(),
        ") and d_ff (",
        d_ff(),
        "), got ",
        reduction);
    return T5Options(*this)
        .d_model(d_model() / reduction)
        .d_kv(d_kv() / reduction)
        .d_ff(d_ff() / reduction);
  }

  TORCH_ARG(int64_t, vocab_size) = 32128;
  TORCH_ARG(int64_t, d_model) = 512;
  /// Width of one head, whatever d_model and num_heads are.
  TORCH_ARG(int64_t, d_kv) = 64;
  TORCH_ARG(int64_t, d_ff) = 2048;
  TORCH_ARG(int64_t, num_layers) = 6;
  /// Absent: as many as the encoder has.
  TORCH_ARG(std::optional<int64_t>, num_decoder_layers);
  TORCH_ARG(int64_t, num_heads) = 8;
  TORCH_ARG(int64_t, relative_attention_num_buckets) = 32;
  /// Tokens as far apart as this, or farther, share one bucket.
  TORCH_ARG(int64_t, relative_attention_max_distance) = 128;
  TORCH_ARG(double, dropout_rate) = 0.1;
  TORCH_ARG(double, layer_norm_epsilon) = 1e-6;
  /// "relu" (v1.0) or "gated-gelu" (v1.1).
  TORCH_ARG(std::string, feed_forward_proj) = "relu";
  /// true (v1.0): the output layer is `shared`, scaled by d_model^-0.5.
  TORCH_ARG(bool, tie_word_embeddings) = true;
  TORCH_ARG(int64_t, pad_token_id) = 0;
  TORCH_ARG(int64_t, decoder_start_token_id) = 0;
};

namespace detail {

inline void check(const T5Options& options) {
  const auto positive = [](const char* name, int64_t value) {
    TORCH_CHECK_VALUE(
        value > 0, "peft: T5's ", name, " must be positive, got ", value);
  };
  positive("vocab_size", options.vocab_size());
  positive("d_model", options.d_model());
  positive("d_kv", options.d_kv());
  positive("d_ff", options.d_ff());
  positive("num_layers", options.num_layers());
  positive("num_decoder_layers", options.num_decoder_layers().value_or(1));
  positive("num_heads", options.num_heads());
  const auto buckets = options.relative_attention_num_buckets();
  TORCH_CHECK_VALUE(
      buckets >= 4 && options.relative_attention_max_distance() > buckets / 2,
      "peft: T5 needs relative_attention_num_buckets of 4 or more and a "
      "relative_attention_max_distance above half of them, got ",
      buckets,
      " and ",
      options.relative_attention_max_distance());
  TORCH_CHECK_VALUE(
      options.feed_forward_proj() == "relu" ||
          options.feed_forward_proj() == "gated-gelu",
      "peft: T5's feed_forward_proj must be \"relu\" or \"gated-gelu\", got \"",
      options.feed_forward_proj(),
      '"');
  for (const auto id :
       {options.pad_token_id(), options.decoder_start_token_id()}) {
    TORCH_CHECK_VALUE(
        id >= 0 && id < options.vocab_size(),
        "peft: T5's pad_token_id and decoder_start_token_id must lie in the "
        "vocabulary of ",
        options.vocab_size(),
        ", got ",
        id);
  }
}

/// A linear layer without bias, N(0, std).
inline torch::nn::Linear t5_linear(int64_t in, int64_t out, double std) {
  torch::nn::Linear layer(torch::nn::LinearOptions(in, out).bias(false));
  torch::nn::init::normal_(layer->weight, 0, std);
  return layer;
}

} // namespace detail

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ Embedding ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

/// A stack's token embedding. A tied one looks up the network's `shared` and,
/// as LmHead, is no part of an archive; a clone must be tied again.
struct T5EmbedTokensImpl : torch::nn::EmbeddingImpl {
  explicit T5EmbedTokensImpl(const T5Options& t5)
      : torch::nn::EmbeddingImpl(t5.vocab_size(), t5.d_model()) {}

  /// Uses `table` `[vocab_size, d_model]` as the weight from now on.
  void tie(const Tensor& table) {
    // The register keeps an empty tensor: an optimizer over parameters() must
    // not step the shared one twice.
    auto registered = *named_parameters(/*recurse=*/false).find("weight");
    registered.set_requires_grad(false);
    registered.set_data(
        torch::empty({0}, table.options().requires_grad(false)));
    weight = table;
    is_tied = true;
  }

  bool is_serializable() const override {
    return !is_tied;
  }

  bool is_tied = false;
};
TORCH_MODULE(T5EmbedTokens);

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ T5LayerNorm ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

/// x / sqrt(mean(x²) + eps) · weight, over the last dimension; the mean is
/// taken in float32 at least.
struct T5LayerNormImpl : torch::nn::Cloneable<T5LayerNormImpl> {
  T5LayerNormImpl(int64_t size_, double eps_) : size(size_), eps(eps_) {
    reset();
  }

  void reset() override {
    weight = register_parameter("weight", torch::ones({size}));
  }

  Tensor forward(const Tensor& x) {
    const auto wide = x.to(at::promote_types(x.scalar_type(), torch::kFloat));
    const auto variance = wide.square().mean(-1, /*keepdim=*/true);
    return weight * (wide * at::rsqrt(variance + eps)).to(x.scalar_type());
  }

  int64_t size;
  double eps;
  Tensor weight;
};
TORCH_MODULE(T5LayerNorm);

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ Feed-forward ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

/// wo(dropout(relu(wi x))), or wo(dropout(gelu(wi_0 x) · wi_1 x)) when gated.
struct T5DenseReluDenseImpl : torch::nn::Cloneable<T5DenseReluDenseImpl> {
  explicit T5DenseReluDenseImpl(T5Options options_)
      : options(std::move(options_)) {
    reset();
  }

  void reset() override {
    const auto model = options.d_model();
    const auto inner = options.d_ff();
    const auto in = [&] {
      return detail::t5_linear(model, inner, std::pow(model, -0.5));
    };
    if (options.feed_forward_proj() == "gated-gelu") {
      wi_0 = register_module("wi_0", in());
      wi_1 = register_module("wi_1", in());
    } else {
      wi = register_module("wi", in());
    }
    wo = register_module(
        "wo", detail::t5_linear(inner, model, std::pow(inner, -0.5)));
    dropout =
        register_module("dropout", torch::nn::Dropout(options.dropout_rate()));
  }

  Tensor forward(const Tensor& x) {
    const auto inner = wi.is_empty()
        ? at::gelu(wi_0->forward(x), "tanh") * wi_1->forward(x)
        : at::relu(wi->forward(x));
    return wo->forward(dropout->forward(inner));
  }

  T5Options options;
  torch::nn::Linear wi{nullptr};
  torch::nn::Linear wi_0{nullptr};
  torch::nn::Linear wi_1{nullptr};
  torch::nn::Linear wo{nullptr};
  torch::nn::Dropout dropout{nullptr};
};
TORCH_MODULE(T5DenseReluDense);

struct T5LayerFFImpl : torch::nn::Cloneable<T5LayerFFImpl> {
  explicit T5LayerFFImpl(T5Options options_) : options(std::move(options_)) {
    reset();
  }

  void reset() override {
    dense = register_module("DenseReluDense", T5DenseReluDense(options));
    layer_norm = register_module(
        "layer_norm",
        T5LayerNorm(options.d_model(), options.layer_norm_epsilon()));
    dropout =
        register_module("dropout", torch::nn::Dropout(options.dropout_rate()));
  }

  Tensor forward(const Tensor& hidden) {
    return hidden +
        dropout->forward(dense->forward(layer_norm->forward(hidden)));
  }

  T5Options options;
  T5DenseReluDense dense{nullptr};
  T5LayerNorm layer_norm{nullptr};
  torch::nn::Dropout dropout{nullptr};
};
TORCH_MODULE(T5LayerFF);

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ Attention ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

/// The bucket of a distance `key - query`: one for each short distance, then
/// ever wider ones up to `max_distance`. Both directions share the buckets
/// evenly; a decoder, which only looks back, has them all for that.
inline Tensor t5_bucket(
    const Tensor& distance,
    bool bidirectional,
    int64_t num_buckets,
    int64_t max_distance) {
  Tensor first = torch::zeros_like(distance);
  Tensor far = (-distance).clamp_min(0);
  if (bidirectional) {
    num_buckets /= 2;
    first = distance.gt(0).to(torch::kLong) * num_buckets;
    far = distance.abs();
  }
  const auto exact = num_buckets / 2;
  const auto above = at::log(far.clamp_min(exact).to(torch::kFloat) / exact) /
      std::log(static_cast<double>(max_distance) / exact) *
      (num_buckets - exact);
  const auto wide = (exact + above.to(torch::kLong)).clamp_max(num_buckets - 1);
  return first + at::where(far < exact, far, wide);
}

/// What one attention looks at, and where it keeps that.
struct T5Source {
  Tensor states; // [batch, keys, d_model], what keys and values are made of
  /// Boolean or added to the scores, broadcastable to `[batch, heads, queries,
  /// cached + keys]`; undefined means everywhere.
  Tensor mask;
  KeyValues* cache = nullptr; // stands in front, and grows where it may
  bool is_cached = false; // `cache` holds the keys and values of `states`
  /// Which of `states` are padding, where they are another stack's; undefined
  /// inside: none.
  std::optional<Tensor> padding = std::nullopt;
};

/// Multi-head attention, `[batch, queries, d_model]` -> the same.
struct T5AttentionImpl : torch::nn::Cloneable<T5AttentionImpl> {
  explicit T5AttentionImpl(
      T5Options options_,
      bool bidirectional_ = true,
      bool has_relative_attention_bias_ = false)
      : options(std::move(options_)),
        bidirectional(bidirectional_),
        has_relative_attention_bias(has_relative_attention_bias_) {
    reset();
  }

  void reset() override {
    const auto model = options.d_model();
    const auto inner = options.num_heads() * options.d_kv();
    const auto std = std::pow(model, -0.5);
    // The scale that T5 leaves out of its scores is in q's first values.
    q = register_module(
        "q",
        detail::t5_linear(model, inner, std * std::pow(options.d_kv(), -0.5)));
    k = register_module("k", detail::t5_linear(model, inner, std));
    v = register_module("v", detail::t5_linear(model, inner, std));
    o = register_module(
        "o", detail::t5_linear(inner, model, std::pow(inner, -0.5)));
    if (has_relative_attention_bias) {
      relative_attention_bias = register_module(
          "relative_attention_bias",
          torch::nn::Embedding(
              options.relative_attention_num_buckets(), options.num_heads()));
      torch::nn::init::normal_(relative_attention_bias->weight, 0, std);
    }
  }

  /// The bias of `queries` tokens that stand after `past` others, `[1, heads,
  /// queries, past + queries]`.
  Tensor position_bias(int64_t past, int64_t queries) {
    const auto place = torch::arange(
        past + queries,
        torch::dtype(torch::kLong)
            .device(relative_attention_bias->weight.device()));
    const auto bucket = t5_bucket(
        place.unsqueeze(0) - place.narrow(0, past, queries).unsqueeze(1),
        bidirectional,
        options.relative_attention_num_buckets(),
        options.relative_attention_max_distance());
    return relative_attention_bias->forward(bucket)
        .permute({2, 0, 1})
        .unsqueeze(0);
  }

  Tensor forward(const Tensor& hidden, const T5Source& source, size_t slot) {
    const auto split = [&](const Tensor& x) { // [batch, heads, length, d_kv]
      return x.unflatten(-1, {options.num_heads(), options.d_kv()})
          .transpose(1, 2);
    };
    Tensor keys, values;
    if (source.is_cached) {
      keys = source.cache->keys.at(slot);
      values = source.cache->values.at(slot);
    } else {
      std::optional<PaddingScope> of_states;
      if (source.padding) {
        of_states.emplace(*source.padding);
      }
      keys = split(k->forward(source.states));
      values = split(v->forward(source.states));
      of_states.reset();
      if (source.cache != nullptr) {
        std::tie(keys, values) =
            source.cache->update(slot, keys, values, hidden);
      }
    }
    std::optional<Tensor> mask;
    const auto query = split(q->forward(hidden));
    if (source.mask.defined()) {
      // Virtual tokens stand in front, and not before every layer.
      const auto count = keys.size(2);
      mask = source.mask.narrow(-1, source.mask.size(-1) - count, count);
      if (mask->scalar_type() != torch::kBool) {
        mask = mask->to(query.scalar_type());
      }
    }
    const auto context = at::scaled_dot_product_attention(
        query,
        keys,
        values,
        mask,
        is_training() ? options.dropout_rate() : 0.0,
        /*is_causal=*/false,
        /*scale=*/1.0);
    return o->forward(context.transpose(1, 2).flatten(2));
  }

  T5Options options;
  bool bidirectional;
  bool has_relative_attention_bias;
  torch::nn::Linear q{nullptr};
  torch::nn::Linear k{nullptr};
  torch::nn::Linear v{nullptr};
  torch::nn::Linear o{nullptr};
  torch::nn::Embedding relative_attention_bias{nullptr};
};
TORCH_MODULE(T5Attention);

/// hidden + dropout(attention(norm(hidden))), the source normalised likewise.
struct T5LayerSelfAttentionImpl
    : torch::nn::Cloneable<T5LayerSelfAttentionImpl> {
  T5LayerSelfAttentionImpl(
      T5Options options_,
      bool bidirectional_,
      bool has_relative_attention_bias_)
      : options(std::move(options_)),
        bidirectional(bidirectional_),
        has_relative_attention_bias(has_relative_attention_bias_) {
    reset();
  }

  void reset() override {
    SelfAttention = register_module(
        "SelfAttention",
        T5Attention(options, bidirectional, has_relative_attention_bias));
    layer_norm = register_module(
        "layer_norm",
        T5LayerNorm(options.d_model(), options.layer_norm_epsilon()));
    dropout =
        register_module("dropout", torch::nn::Dropout(options.dropout_rate()));
  }

  Tensor forward(const LayerCall& call, T5Source source, size_t slot) {
    const auto normed = normalised(call, layer_norm);
    source.states = normed.context;
    return call.hidden +
        dropout->forward(SelfAttention->forward(normed.hidden, source, slot));
  }

  T5Options options;
  bool bidirectional;
  bool has_relative_attention_bias;
  T5Attention SelfAttention{nullptr};
  T5LayerNorm layer_norm{nullptr};
  torch::nn::Dropout dropout{nullptr};
};
TORCH_MODULE(T5LayerSelfAttention);

/// hidden + dropout(attention(norm(hidden))) to the encoder's result.
struct T5LayerCrossAttentionImpl
    : torch::nn::Cloneable<T5LayerCrossAttentionImpl> {
  explicit T5LayerCrossAttentionImpl(T5Options options_)
      : options(std::move(options_)) {
    reset();
  }

  void reset() override {
    EncDecAttention = register_module("EncDecAttention", T5Attention(options));
    layer_norm = register_module(
        "layer_norm",
        T5LayerNorm(options.d_model(), options.layer_norm_epsilon()));
    dropout =
        register_module("dropout", torch::nn::Dropout(options.dropout_rate()));
  }

  Tensor forward(const Tensor& hidden, const T5Source& source, size_t slot) {
    return hidden +
        dropout->forward(EncDecAttention->forward(
            layer_norm->forward(hidden), source, slot));
  }

  T5Options options;
  T5Attention EncDecAttention{nullptr};
  T5LayerNorm layer_norm{nullptr};
  torch::nn::Dropout dropout{nullptr};
};
TORCH_MODULE(T5LayerCrossAttention);

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ Block ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

/// Self-attention, in a decoder attention to the encoder's result,
/// feed-forward: `layer.0`, `layer.1`, `layer.2`.
struct T5BlockImpl : torch::nn::Cloneable<T5BlockImpl> {
  T5BlockImpl(
      T5Options options_,
      bool is_decoder_,
      bool has_relative_attention_bias_)
      : options(std::move(options_)),
        is_decoder(is_decoder_),
        has_relative_attention_bias(has_relative_attention_bias_) {
    reset();
  }

  void reset() override {
    layer = register_module("layer", torch::nn::ModuleList());
    layer->push_back(T5LayerSelfAttention(
        options, /*bidirectional=*/!is_decoder, has_relative_attention_bias));
    if (is_decoder) {
      layer->push_back(T5LayerCrossAttention(options));
    }
    layer->push_back(T5LayerFF(options));
  }

  /// `self` lacks `states`, which are the call's; `cross` is for a decoder.
  /// `slot` is the block's place in their caches.
  Tensor forward(
      const LayerCall& call,
      const T5Source& self,
      const T5Source& cross,
      size_t slot) {
    auto hidden = self_attention().forward(call, self, slot);
    if (is_decoder) {
      hidden = layer[1]->as<T5LayerCrossAttentionImpl>()->forward(
          hidden, cross, slot);
    }
    return layer[layer->size() - 1]->as<T5LayerFFImpl>()->forward(hidden);
  }

  T5LayerSelfAttentionImpl& self_attention() {
    return *layer[0]->as<T5LayerSelfAttentionImpl>();
  }

  T5Options options;
  bool is_decoder;
  bool has_relative_attention_bias;
  torch::nn::ModuleList layer{nullptr};
};
TORCH_MODULE(T5Block);

} // namespace peft::models
