#pragma once

// BERT and RoBERTa encoders as ordinary LibTorch modules.
//
// Devlin et al. 2018, arXiv:1810.04805; Liu et al. 2019, arXiv:1907.11692.
// Every module is registered under the name Hugging Face gives it
// ("encoder.layer.0.attention.self.query"), so checkpoints load by name and
// adapter files fit both ways. No method is known here; extra_tokens and
// layer_loop are the two lines that a network of one's own would copy for
// methods that no weight can carry.

#include <peft/core/extra_tokens.h>
#include <peft/core/layer_loop.h>
#include <peft/core/padding.h>

#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/dropout.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cstdint>
#include <optional>
#include <utility>

namespace peft::models {

using torch::Tensor;

/// Which vector stands for the whole sequence.
enum class Pooling {
  cls, ///< the first token's hidden state
  pooler, ///< tanh(dense(first token)), what BERT was pretrained with
  mean, ///< the mean over the tokens that are not padding
};

/// Sizes of a network, by the names of Hugging Face's `config.json`.
///
/// Example:
/// ```
/// using namespace peft::models;
/// BertModel model(BertOptions().hidden_size(384).num_hidden_layers(6));
/// ```
struct BertOptions {
  /// The same network with its widths divided by `reduction`.
  BertOptions reduced(int64_t reduction) const {
    TORCH_CHECK_VALUE(
        reduction > 0 && hidden_size() % reduction == 0 &&
            intermediate_size() % reduction == 0,
        "peft: a reduction must divide hidden_size (",
        hidden_size(),
        ") and intermediate_size (",
        intermediate_size(),
        "), got ",
        reduction);
    return BertOptions(*this)
        .hidden_size(hidden_size() / reduction)
        .intermediate_size(intermediate_size() / reduction);
  }

  /// The first position of a token.
  int64_t first_position() const {
    return roberta_positions() ? pad_token_id() + 1 : 0;
  }

  TORCH_ARG(int64_t, vocab_size) = 30522;
  TORCH_ARG(int64_t, hidden_size) = 768;
  TORCH_ARG(int64_t, num_hidden_layers) = 12;
  TORCH_ARG(int64_t, num_attention_heads) = 12;
  TORCH_ARG(int64_t, intermediate_size) = 3072;
  TORCH_ARG(int64_t, max_position_embeddings) = 512;
  TORCH_ARG(int64_t, type_vocab_size) = 2;
  TORCH_ARG(int64_t, pad_token_id) = 0;
  TORCH_ARG(double, layer_norm_eps) = 1e-12;
  TORCH_ARG(double, hidden_dropout_prob) = 0.1;
  TORCH_ARG(double, attention_probs_dropout_prob) = 0.1;
  /// RoBERTa numbers positions from `pad_token_id + 1` and gives padding the
  /// position `pad_token_id`.
  TORCH_ARG(bool, roberta_positions) = false;
  TORCH_ARG(bool, add_pooling_layer) = true;
  /// The two fields of the classification head.
  TORCH_ARG(int64_t, num_labels) = 2;
  TORCH_ARG(Pooling, pooling) = Pooling::pooler;
};

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ Embeddings ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

/// LayerNorm(word + token type + position),
/// `[batch, length]` -> `[batch, length, hidden]`.
struct BertEmbeddingsImpl : torch::nn::Cloneable<BertEmbeddingsImpl> {
  explicit BertEmbeddingsImpl(BertOptions options_)
      : options(std::move(options_)) {
    reset();
  }

  void reset() override {
    using torch::nn::Embedding;
    const auto hidden = options.hidden_size();
    const auto padding = options.pad_token_id();
    const auto table = [&](int64_t rows) {
      return torch::nn::EmbeddingOptions(rows, hidden);
    };
    word_embeddings = register_module(
        "word_embeddings",
        Embedding(table(options.vocab_size()).padding_idx(padding)));
    position_embeddings = register_module(
        "position_embeddings",
        Embedding(table(options.max_position_embeddings())));
    token_type_embeddings = register_module(
        "token_type_embeddings", Embedding(table(options.type_vocab_size())));
    norm = register_module(
        "LayerNorm",
        torch::nn::LayerNorm(torch::nn::LayerNormOptions({hidden}).eps(
            options.layer_norm_eps())));
    dropout = register_module(
        "dropout", torch::nn::Dropout(options.hidden_dropout_prob()));
  }

  /// `words` `[batch, length, hidden]` are embedded already; `positions` count
  /// from 0.
  Tensor forward(
      const Tensor& words,
      const Tensor& positions,
      const Tensor& token_type_ids) {
    auto embedded = words + token_type_embeddings->forward(token_type_ids) +
        position_embeddings->forward(positions + options.first_position());
    return dropout->forward(norm->forward(embedded));
  }

  /// Rows of the table of positions. RoBERTa's leave padding out.
  Tensor position_ids(const Tensor& input_ids) const {
    if (!options.roberta_positions()) {
      return torch::arange(input_ids.size(1), input_ids.options()).unsqueeze(0);
    }
    const auto is_token = input_ids.ne(options.pad_token_id()).to(torch::kLong);
    return is_token.cumsum(1) * is_token + options.pad_token_id();
  }

  BertOptions options;
  torch::nn::Embedding word_embeddings{nullptr};
  torch::nn::Embedding position_embeddings{nullptr};
  torch::nn::Embedding token_type_embeddings{nullptr};
  torch::nn::LayerNorm norm{nullptr};
  torch::nn::Dropout dropout{nullptr};
};
TORCH_MODULE(BertEmbeddings);

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ Attention ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

/// Multi-head attention before its output projection, `[batch, length, hidden]`
/// -> the same.
struct BertSelfAttentionImpl : torch::nn::Cloneable<BertSelfAttentionImpl> {
  explicit BertSelfAttentionImpl(BertOptions options_)
      : options(std::move(options_)) {
    reset();
  }

  void reset() override {
    const auto hidden = options.hidden_size();
    TORCH_CHECK(
        hidden % options.num_attention_heads() == 0,
        "peft: hidden_size (",
        hidden,
        ") must be a multiple of num_attention_heads (",
        options.num_attention_heads(),
        ")");
    query = register_module("query", torch::nn::Linear(hidden, hidden));
    key = register_module("key", torch::nn::Linear(hidden, hidden));
    value = register_module("value", torch::nn::Linear(hidden, hidden));
  }

  /// `mask` is boolean, broadcastable to `[batch, heads, queries, keys]`, true
  /// where attention may look; undefined means everywhere. `past` holds keys
  /// and values that stand in front, or is null.
  Tensor forward(const LayerCall& call, const Tensor& mask, KeyValues* past) {
    const auto heads = options.num_attention_heads();
    const auto split =
        [heads](const Tensor& x) { // [batch, heads, length, hidden / heads]
          return x.unflatten(-1, {heads, x.size(-1) / heads}).transpose(1, 2);
        };
    auto k = split(key->forward(call.context));
    auto v = split(value->forward(call.context));
    if (past != nullptr) {
      std::tie(k, v) = past->update(call.layer, k, v, call.hidden);
    }
    const auto context = at::scaled_dot_product_attention(
        split(query->forward(call.hidden)),
        k,
        v,
        mask.defined() ? std::optional<Tensor>(mask_of_last(mask, k.size(2)))
                       : std::nullopt,
        is_training() ? options.attention_probs_dropout_prob() : 0.0);
    return context.transpose(1, 2).flatten(2);
  }

  BertOptions options;
  torch::nn::Linear query{nullptr};
  torch::nn::Linear key{nullptr};
  torch::nn::Linear value{nullptr};
};
TORCH_MODULE(BertSelfAttention);

/// LayerNorm(residual + dropout(dense(x))), the end of both halves of a layer.
struct BertOutputImpl : torch::nn::Cloneable<BertOutputImpl> {
  BertOutputImpl(BertOptions options_, int64_t in_features_)
      : options(std::move(options_)), in_features(in_features_) {
    reset();
  }

  void reset() override {
    const auto hidden = options.hidden_size();
    dense = register_module("dense", torch::nn::Linear(in_features, hidden));
    norm = register_module(
        "LayerNorm",
        torch::nn::LayerNorm(torch::nn::LayerNormOptions({hidden}).eps(
            options.layer_norm_eps())));
    dropout = register_module(
        "dropout", torch::nn::Dropout(options.hidden_dropout_prob()));
  }

  Tensor forward(const Tensor& x, const Tensor& residual) {
    return norm->forward(dropout->forward(dense->forward(x)) + residual);
  }

  BertOptions options;
  int64_t in_features;
  torch::nn::Linear dense{nullptr};
  torch::nn::LayerNorm norm{nullptr};
  torch::nn::Dropout dropout{nullptr};
};
TORCH_MODULE(BertOutput);

struct BertAttentionImpl : torch::nn::Cloneable<BertAttentionImpl> {
  explicit BertAttentionImpl(BertOptions options_)
      : options(std::move(options_)) {
    reset();
  }

  void reset() override {
    self = register_module("self", BertSelfAttention(options));
    output =
        register_module("output", BertOutput(options, options.hidden_size()));
  }

  Tensor forward(const LayerCall& call, const Tensor& mask, KeyValues* past) {
    return output->forward(self->forward(call, mask, past), call.hidden);
  }

  BertOptions options;
  BertSelfAttention self{nullptr};
  BertOutput output{nullptr};
};
TORCH_MODULE(BertAttention);

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ Layer ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

/// gelu(dense(x)), `hidden_size` -> `intermediate_size`.
struct BertIntermediateImpl : torch::nn::Cloneable<BertIntermediateImpl> {
  explicit BertIntermediateImpl(BertOptions options_)
      : options(std::move(options_)) {
    reset();
  }

  void reset() override {
    dense = register_module(
        "dense",
        torch::nn::Linear(options.hidden_size(), options.intermediate_size()));
  }

  Tensor forward(const Tensor& hidden_states) {
    return at::gelu(dense->forward(hidden_states));
  }

  BertOptions options;
  torch::nn::Linear dense{nullptr};
};
TORCH_MODULE(BertIntermediate);

struct BertLayerImpl : torch::nn::Cloneable<BertLayerImpl> {
  explicit BertLayerImpl(BertOptions options_) : options(std::move(options_)) {
    reset();
  }

  void reset() override {
    attention = register_module("attention", BertAttention(options));
    intermediate = register_module("intermediate", BertIntermediate(options));
    output = register_module(
        "output", BertOutput(options, options.intermediate_size()));
  }

  Tensor forward(const LayerCall& call, const Tensor& mask, KeyValues* past) {
    const auto attended = attention->forward(call, mask, past);
    return output->forward(intermediate->forward(attended), attended);
  }

  BertOptions options;
  BertAttention attention{nullptr};
  BertIntermediate intermediate{nullptr};
  BertOutput output{nullptr};
};
TORCH_MODULE(BertLayer);

struct BertEncoderImpl : torch::nn::Cloneable<BertEncoderImpl> {
  explicit BertEncoderImpl(BertOptions options_)
      : options(std::move(options_)) {
    reset();
  }

  void reset() override {
    layer = register_module("layer", torch::nn::ModuleList());
    for (int64_t i = 0; i < options.num_hidden_layers(); ++i) {
      layer->push_back(BertLayer(options));
    }
    layer_loop = register_module(
        "layer_loop",
        LayerLoop(
            LayerLoopOptions(options.hidden_size(), options.num_hidden_layers())
                .num_heads(options.num_attention_heads())
                .side_block(
                    [options = options](int64_t /*layer*/, int64_t reduction) {
                      return std::make_shared<BertLayerImpl>(
                          options.reduced(reduction));
                    })));
  }

  /// `attention_mask` `[batch, past + length]`, 1 for a token, or undefined.
  LayerLoopOutput forward(
      const Tensor& hidden_states,
      const Tensor& attention_mask,
      KeyValues* past = nullptr) {
    const int64_t in_front = past == nullptr ? 0 : past->length();
    Tensor mask, own_mask;
    if (attention_mask.defined()) {
      mask = attention_mask.to(torch::kBool).unsqueeze(1).unsqueeze(1);
      own_mask = attention_mask.slice(1, in_front);
    }
    return layer_loop->forward(
        hidden_states,
        own_mask,
        *layer,
        [&](torch::nn::Module& each, const LayerCall& call) {
          return each.as<BertLayerImpl>()->forward(
              call, call.attention(mask, in_front), call.side ? nullptr : past);
        });
  }

  BertOptions options;
  torch::nn::ModuleList layer{nullptr};
  LayerLoop layer_loop{nullptr};
};
TORCH_MODULE(BertEncoder);

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ Model ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

/// tanh(dense(first token)), `[batch, length, hidden]` -> `[batch, hidden]`.
struct BertPoolerImpl : torch::nn::Cloneable<BertPoolerImpl> {
  explicit BertPoolerImpl(BertOptions options_) : options(std::move(options_)) {
    reset();
  }

  void reset() override {
    dense = register_module(
        "dense",
        torch::nn::Linear(options.hidden_size(), options.hidden_size()));
  }

  Tensor forward(const Tensor& hidden_states) {
    return torch::tanh(dense->forward(hidden_states.select(1, 0)));
  }

  BertOptions options;
  torch::nn::Linear dense{nullptr};
};
TORCH_MODULE(BertPooler);

/// The encoder: token ids `[batch, length]` -> hidden states `[batch, length,
/// hidden]`.
struct BertModelImpl : torch::nn::Cloneable<BertModelImpl> {
  explicit BertModelImpl(BertOptions options_) : options(std::move(options_)) {
    reset();
  }

  void reset() override {
    embeddings = register_module("embeddings", BertEmbeddings(options));
    const auto heads = options.num_attention_heads();
    extra_tokens = register_module(
        "extra_tokens",
        ExtraTokens(ExtraTokensOptions(
                        options.hidden_size(),
                        options.num_hidden_layers(),
                        heads,
                        options.hidden_size() / heads)
                        .max_positions(
                            options.max_position_embeddings() -
                            options.first_position())
                        .word_embeddings("embeddings.word_embeddings")));
    encoder = register_module("encoder", BertEncoder(options));
    if (options.add_pooling_layer()) {
      pooler = register_module("pooler", BertPooler(options));
    }
  }

  /// `attention_mask` `[batch, length]` is 1 for a token and 0 for padding;
  /// leave it out when nothing is padded.
  Tensor forward(
      const Tensor& input_ids,
      const Tensor& attention_mask = {},
      const Tensor& token_type_ids = {}) {
    check(input_ids, attention_mask);
    const auto types = token_type_ids.defined() ? token_type_ids
                                                : torch::zeros_like(input_ids);
    auto tokens = extra_tokens->forward(
        {embeddings->word_embeddings->forward(input_ids),
         attention_mask,
         options.roberta_positions()
             ? embeddings->position_ids(input_ids) - options.first_position()
             : Tensor()});
    const PaddingScope padding(tokens.mask_of_embeds());
    const auto hidden = embeddings->forward(
        tokens.embeds, tokens.positions(), tokens.extend(types, 0));
    return encoder->forward(hidden, tokens.attention_mask, tokens.key_values())
        .hidden;
  }

  BertOptions options;
  BertEmbeddings embeddings{nullptr};
  ExtraTokens extra_tokens{nullptr};
  BertEncoder encoder{nullptr};
  BertPooler pooler{nullptr};

 protected:
  FORWARD_HAS_DEFAULT_ARGS(
      {1, torch::nn::AnyValue(Tensor())},
      {2, torch::nn::AnyValue(Tensor())})

 private:
  void check(const Tensor& input_ids, const Tensor& attention_mask) const {
    TORCH_CHECK(
        input_ids.dim() == 2,
        "peft: token ids must have the shape [batch, length], got ",
        input_ids.sizes());
    const auto reserved = options.first_position();
    TORCH_CHECK(
        input_ids.size(1) + reserved <= options.max_position_embeddings(),
        "peft: a sequence of ",
        input_ids.size(1),
        " tokens is longer than the ",
        options.max_position_embeddings() - reserved,
        " positions of this model; truncate it");
    TORCH_CHECK(
        !attention_mask.defined() ||
            attention_mask.sizes() == input_ids.sizes(),
        "peft: the attention mask must have the token ids' shape ",
        input_ids.sizes(),
        ", got ",
        attention_mask.defined() ? attention_mask.sizes() : at::IntArrayRef());
  }
};
TORCH_MODULE(BertModel);

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ Classification
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

/// The encoder with a linear head: token ids `[batch, length]` -> logits
/// `[batch, num_labels]`.
///
/// Load a bare encoder's checkpoint into `bert`, a fine-tuned classifier's into
/// the whole module.
struct BertForSequenceClassificationImpl
    : torch::nn::Cloneable<BertForSequenceClassificationImpl> {
  explicit BertForSequenceClassificationImpl(BertOptions options_)
      : options(std::move(options_)) {
    reset();
  }

  void reset() override {
    const bool needs_pooler = options.pooling() == Pooling::pooler;
    bert = register_module(
        "bert",
        BertModel(BertOptions(options).add_pooling_layer(needs_pooler)));
    dropout = register_module(
        "dropout", torch::nn::Dropout(options.hidden_dropout_prob()));
    classifier = register_module(
        "classifier",
        torch::nn::Linear(options.hidden_size(), options.num_labels()));
  }

  Tensor forward(const Tensor& input_ids, const Tensor& attention_mask = {}) {
    return classifier->forward(
        dropout->forward(features(input_ids, attention_mask)));
  }

  /// What the head sees, `[batch, hidden]`. Under a prompt the first token is
  /// the prompt's, as in HF PEFT; the mean is over the input's own tokens.
  Tensor features(const Tensor& input_ids, const Tensor& attention_mask = {}) {
    auto hidden = bert->forward(input_ids, attention_mask);
    switch (options.pooling()) {
      case Pooling::cls:
        return hidden.select(1, 0);
      case Pooling::pooler:
        return bert->pooler->forward(hidden);
      case Pooling::mean:
        break;
    }
    hidden = hidden.slice(1, hidden.size(1) - input_ids.size(1));
    if (!attention_mask.defined()) {
      return hidden.mean(1);
    }
    const auto weights = attention_mask.to(hidden.scalar_type()).unsqueeze(-1);
    return (hidden * weights).sum(1) / weights.sum(1).clamp_min(1);
  }

  BertOptions options;
  BertModel bert{nullptr};
  torch::nn::Dropout dropout{nullptr};
  torch::nn::Linear classifier{nullptr};

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(Tensor())})
};
TORCH_MODULE(BertForSequenceClassification);

} // namespace peft::models
