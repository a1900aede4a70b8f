#pragma once

/// A user's own causal decoder that takes prompts and prefixes: attention with
/// fewer heads for keys and values than for queries, learned positions, a
/// cache. What extra tokens need is marked.

#include "test.h"

#include <peft/core/extra_tokens.h>

#include <tuple>

namespace own {

using torch::Tensor;

constexpr int64_t kVocabulary = 20, kHidden = 12, kLayers = 2, kHeads = 4,
                  kKeyHeads = 2, kHeadDim = 3, kPositions = 24;

struct BlockImpl : torch::nn::Cloneable<BlockImpl> {
  BlockImpl() {
    reset();
  }
  void reset() override {
    using torch::nn::Linear;
    query = register_module("query", Linear(kHidden, kHeads * kHeadDim));
    key = register_module("key", Linear(kHidden, kKeyHeads * kHeadDim));
    value = register_module("value", Linear(kHidden, kKeyHeads * kHeadDim));
    output = register_module("output", Linear(kHeads * kHeadDim, kHidden));
    feed = register_module("feed", Linear(kHidden, kHidden));
  }

  Tensor forward(
      const Tensor& x,
      const Tensor& mask,
      size_t layer,
      peft::KeyValues* past) {
    const auto heads = [](const Tensor& t) {
      return t.unflatten(-1, {-1, kHeadDim}).transpose(1, 2);
    };
    Tensor k = heads(key(x)), v = heads(value(x));
    if (past != nullptr) { // for prefixes and the cache
      std::tie(k, v) = past->update(layer, k, v);
    }
    const Tensor attended = at::scaled_dot_product_attention(
        heads(query(x)), k, v, mask, 0, false, std::nullopt, true);
    const Tensor h = x + output(attended.transpose(1, 2).flatten(2));
    return h + torch::tanh(feed(h));
  }

  torch::nn::Linear query{nullptr}, key{nullptr}, value{nullptr},
      output{nullptr}, feed{nullptr};
};
TORCH_MODULE(Block);

struct DecoderImpl : torch::nn::Cloneable<DecoderImpl> {
  DecoderImpl() {
    reset();
  }
  void reset() override {
    embed =
        register_module("embed", torch::nn::Embedding(kVocabulary, kHidden));
    place = register_module("place", torch::nn::Embedding(kPositions, kHidden));
    extra_tokens = register_module( // the first line
        "extra_tokens",
        peft::ExtraTokens(
            peft::ExtraTokensOptions(kHidden, kLayers, kKeyHeads, kHeadDim)
                .max_positions(kPositions)
                .word_embeddings("embed")
                .stack("decoder")));
    blocks = register_module("blocks", torch::nn::ModuleList());
    for (int64_t i = 0; i < kLayers; ++i) {
      blocks->push_back(Block());
    }
    head = register_module("head", torch::nn::Linear(kHidden, kVocabulary));
  }

  /// Token ids `[batch, length]` -> logits; `attention_mask` covers what is
  /// cached as well.
  Tensor forward(
      const Tensor& ids,
      const Tensor& attention_mask = {},
      const Tensor& position_ids = {},
      peft::KeyValues* cache = nullptr) {
    auto tokens = extra_tokens->forward( // the second line
        {embed(ids), attention_mask, position_ids, cache});
    const auto length = tokens.embeds.size(1);
    Tensor mask = torch::ones({length, tokens.past() + length}, torch::kBool)
                      .tril(tokens.past());
    if (tokens.attention_mask.defined()) {
      mask = mask.logical_and(
          tokens.attention_mask.to(torch::kBool).unsqueeze(1).unsqueeze(1));
    }
    Tensor x = tokens.embeds + place(tokens.positions());
    for (size_t i = 0; i < blocks->size(); ++i) {
      x = blocks[i]->as<BlockImpl>()->forward(x, mask, i, tokens.key_values());
    }
    return head(x);
  }

  torch::nn::Embedding embed{nullptr}, place{nullptr};
  peft::ExtraTokens extra_tokens{nullptr};
  torch::nn::ModuleList blocks{nullptr};
  torch::nn::Linear head{nullptr};
};
TORCH_MODULE(Decoder);

inline Tensor ids(int64_t batch, int64_t length) {
  return torch::randint(kVocabulary, {batch, length}, torch::kLong);
}

using Stacks = std::vector<peft::ExtraTokensOptions>;

/// A network of call sites and nothing else, for counts and errors; each has
/// its stack's name.
struct SitesImpl : torch::nn::Module {
  explicit SitesImpl(Stacks stacks) {
    for (auto& stack : stacks) {
      const std::string name = stack.stack();
      register_module(name, peft::ExtraTokens(std::move(stack)));
    }
    register_module("head", torch::nn::Linear(2, 2));
  }
};
TORCH_MODULE(Sites);

} // namespace own
