#pragma once

// T5 as ordinary LibTorch modules: an encoder and a decoder that know where
// tokens stand only by a learnt bias on their distance.
//
// Raffel et al. 2019, arXiv:1910.10683 (v1.0: relu, the embedding is the output
// layer too); v1.1 and Flan-T5 have a gated gelu and an lm_head of their own.
//
//   softmax(q kᵀ + bias[bucket(key - query)]) v     with no 1/sqrt(d_kv)
//
// Every module is registered under the name Hugging Face gives it
// ("decoder.block.0.layer.1.EncDecAttention.q"), so checkpoints load by name.
// The token embedding is registered once, as "shared", and a tied output layer
// not at all: an optimizer that was given model->parameters() steps each tensor
// once. Files that repeat it load with
//
//   peft::BaseWeightsOptions().ignore_extra({"embed_tokens.weight"})
//
// ("lm_head.weight" too where it is tied). Run in float32 or bfloat16: the
// published weights overflow in float16.

#include <peft/core/extra_tokens.h>
#include <peft/core/layer_loop.h>

#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/init.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/dropout.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
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

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ T5LayerNorm ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

/// x / sqrt(mean(x²) + eps) · weight, over the last dimension; the mean is taken
/// in float32 at least.
struct T5LayerNormImpl : torch::nn::Cloneable<T5LayerNormImpl> {
  T5LayerNormImpl(int64_t size_, double eps_) : size(size_), eps(eps_) {
    reset();
  }

  void reset() override {
    weight = register_parameter("weight", torch::ones({size}));
  }

  Tensor forward(const Tensor& x) {
    const auto wide =
        x.to(at::promote_types(x.scalar_type(), torch::kFloat));
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
  const auto wide =
      (exact + above.to(torch::kLong)).clamp_max(num_buckets - 1);
  return first + at::where(far < exact, far, wide);
}

/// What one attention looks at.
struct T5Source {
  Tensor states; // [batch, keys, d_model], what keys and values are made of
  /// Boolean or added to the scores, broadcastable to `[batch, heads, queries,
  /// cached + keys]`; undefined means everywhere.
  Tensor mask;
  KeyValues* cache = nullptr; // stands in front, and grows where it may
  bool is_cached = false; // `cache` holds the keys and values of `states`
};

/// Multi-head attention, `[batch, queries, d_model]` -> the same.
struct T5AttentionImpl : torch::nn::Cloneable<T5AttentionImpl> {
  T5AttentionImpl(
      T5Options options_,
      bool has_relative_attention_bias_ = false,
      bool bidirectional_ = true)
      : options(std::move(options_)),
        has_relative_attention_bias(has_relative_attention_bias_),
        bidirectional(bidirectional_) {
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

  Tensor forward(
      const Tensor& hidden,
      const T5Source& source,
      int64_t layer) {
    const auto split = [&](const Tensor& x) { // [batch, heads, length, d_kv]
      return x.unflatten(-1, {options.num_heads(), options.d_kv()})
          .transpose(1, 2);
    };
    Tensor keys, values;
    if (source.is_cached) {
      keys = source.cache->keys.at(layer);
      values = source.cache->values.at(layer);
    } else {
      keys = split(k->forward(source.states));
      values = split(v->forward(source.states));
      if (source.cache != nullptr) {
        std::tie(keys, values) = source.cache->update(layer, keys, values);
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
  bool has_relative_attention_bias;
  bool bidirectional;
  torch::nn::Linear q{nullptr};
  torch::nn::Linear k{nullptr};
  torch::nn::Linear v{nullptr};
  torch::nn::Linear o{nullptr};
  torch::nn::Embedding relative_attention_bias{nullptr};
};
TORCH_MODULE(T5Attention);

/// hidden + dropout(attention(norm(hidden))), to itself or to an encoder's
/// result.
struct T5LayerAttentionImpl : torch::nn::Cloneable<T5LayerAttentionImpl> {
  /// `name` is the attention's: "SelfAttention" or "EncDecAttention".
  T5LayerAttentionImpl(
      T5Options options_,
      std::string name_,
      bool has_relative_attention_bias_ = false,
      bool bidirectional_ = true)
      : options(std::move(options_)),
        attention_name(std::move(name_)),
        has_relative_attention_bias(has_relative_attention_bias_),
        bidirectional(bidirectional_) {
    reset();
  }

  void reset() override {
    attention = register_module(
        attention_name,
        T5Attention(options, has_relative_attention_bias, bidirectional));
    layer_norm = register_module(
        "layer_norm",
        T5LayerNorm(options.d_model(), options.layer_norm_epsilon()));
    dropout =
        register_module("dropout", torch::nn::Dropout(options.dropout_rate()));
  }

  Tensor forward(const Tensor& hidden, T5Source source, int64_t layer) {
    const auto normed = layer_norm->forward(hidden);
    if (source.states.is_same(hidden)) {
      source.states = normed;
    } else if (attention_name == "SelfAttention") {
      source.states = layer_norm->forward(source.states);
    }
    return hidden +
        dropout->forward(attention->forward(normed, source, layer));
  }

  T5Options options;
  std::string attention_name;
  bool has_relative_attention_bias;
  bool bidirectional;
  T5Attention attention{nullptr};
  T5LayerNorm layer_norm{nullptr};
  torch::nn::Dropout dropout{nullptr};
};
TORCH_MODULE(T5LayerAttention);
