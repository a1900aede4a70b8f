#pragma once

// Where prompts and prefixes enter a transformer: in front of its tokens, as
// embeddings, or in front of its keys and values, as if they stood in the cache
// already. A network of one's own takes two lines:
//
//   extra_tokens = register_module("extra_tokens", peft::ExtraTokens(
//       peft::ExtraTokensOptions(hidden_size, layers, heads, head_dim)));
//   ...
//   auto tokens = extra_tokens->forward({embeds, attention_mask});  // forward
//
// and goes on with tokens.embeds and tokens.attention_mask, numbers positions
// by tokens.positions(), and lets each attention take its keys and values from
// tokens.key_values(), where that is not null.

#include <peft/core/call_site.h>

#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/functional/padding.h>
#include <torch/nn/pimpl.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Keys and values of the attentions of one stack, `[batch, heads, length,
/// head_dim]` a layer, after any rotation: a decoder's cache between steps.
struct KeyValues {
  /// A prefix that a gate on the attention's input multiplies (UniPELT).
  struct Gated {
    Tensor key;
    Tensor value;
    /// `[batch, tokens, hidden]` -> `[batch, 1, 1, 1]`.
    std::function<Tensor(const Tensor&)> gate;
  };

  std::vector<Tensor> keys;
  std::vector<Tensor> values;
  /// What update() puts in front of a layer's keys and values once it sees the
  /// layer's input; in a cache that is where the first tokens come by, and what
  /// was put there then stays.
  std::vector<std::vector<Gated>> gated;
  /// How many of the tokens in front are an adapter's.
  int64_t virtual_tokens = 0;
  /// How many of these take no position: the tokens behind are numbered as if
  /// they were not there.
  int64_t unnumbered = 0;
  /// Whether update() stores what it returns.
  bool grows = true;

  /// Tokens held at a layer; 0 when there are none.
  int64_t length(size_t layer) const {
    int64_t count =
        layer < keys.size() && keys[layer].defined() ? keys[layer].size(2) : 0;
    if (layer < gated.size()) {
      for (const auto& prefix : gated[layer]) {
        count += prefix.key.size(2);
      }
    }
    return count;
  }
  /// Tokens held at the layer that holds most: a prefix may leave some out.
  int64_t length() const {
    int64_t longest = 0;
    for (size_t layer = 0; layer < std::max(keys.size(), gated.size());
         ++layer) {
      longest = std::max(longest, length(layer));
    }
    return longest;
  }

  /// All keys and values of a layer once `key` and `value` stand at its end.
  /// `hidden` `[batch, tokens, hidden]` is what the attention makes its queries
  /// of, which gated prefixes need.
  std::pair<Tensor, Tensor> update(
      size_t layer,
      const Tensor& key,
      const Tensor& value,
      const Tensor& hidden = {}) {
    std::vector<Tensor> all_keys, all_values;
    if (layer < gated.size()) {
      for (const auto& prefix : gated[layer]) {
        TORCH_CHECK(
            hidden.defined(),
            "peft: gates on a site without input: the prefix of layer ",
            layer,
            " is gated by what goes into the attention, and the network does "
            "not hand it over. Write there\n"
            "  std::tie(key, value) = past->update(layer, key, value, hidden);"
            "\nwith the tensor [batch, tokens, hidden] that the queries are "
            "made of");
        const Tensor g = prefix.gate(hidden);
        all_keys.push_back(prefix.key * g.to(prefix.key.scalar_type()));
        all_values.push_back(prefix.value * g.to(prefix.value.scalar_type()));
      }
    }
    if (layer < keys.size() && keys[layer].defined()) {
      all_keys.push_back(keys[layer].to(key.scalar_type()));
      all_values.push_back(values[layer].to(value.scalar_type()));
    }
    std::pair<Tensor, Tensor> all{key, value};
    if (!all_keys.empty()) {
      all_keys.push_back(key);
      all_values.push_back(value);
      all = {at::cat(all_keys, 2), at::cat(all_values, 2)};
    }
    if (grows) {
      if (layer >= keys.size()) {
        keys.resize(layer + 1);
        values.resize(layer + 1);
      }
      keys[layer] = all.first;
      values[layer] = all.second;
      if (layer < gated.size()) {
        gated[layer].clear();
      }
    }
    return all;
  }
};

/// `mask` `[*, keys]` of a stack for a layer of `keys` keys, the last of the
/// stack's: the layer may lack the prefix that others have.
inline Tensor mask_of_last(const Tensor& mask, int64_t keys) {
  return mask.defined() && mask.size(-1) > keys
      ? mask.narrow(-1, mask.size(-1) - keys, keys)
      : mask;
}

/// What flows into a stack of layers.
struct TokenInputs {
  TokenInputs(
      Tensor embeds_,
      Tensor attention_mask_ = {},
      Tensor position_ids_ = {},
      KeyValues* cache_ = nullptr)
      : embeds(std::move(embeds_)),
        attention_mask(std::move(attention_mask_)),
        position_ids(std::move(position_ids_)),
        cache(cache_) {}

  Tensor embeds; // [batch, length, hidden], before positions are added
  /// `[batch, cached + length]`, 1 for a token, 0 for padding; undefined where
  /// nothing is padded.
  Tensor attention_mask;
  Tensor position_ids; // [batch or 1, length], undefined: see positions()
  KeyValues* cache; // the caller's, or null
  KeyValues prefix; // an adapter's, where the caller has no cache
  int64_t prepended = 0; // embeddings put in front by adapters in this call

  /// What the attentions put in front of their own keys and values; null where
  /// there is nothing.
  KeyValues* key_values() {
    return cache != nullptr         ? cache
        : prefix.virtual_tokens > 0 ? &prefix
                                    : nullptr;
  }

  /// Tokens that stand before `embeds`.
  int64_t past() const {
    return cache != nullptr ? cache->length() : prefix.length();
  }

  /// Positions that are taken before `embeds`.
  int64_t positions_before() const {
    return past() - (cache != nullptr ? cache->unnumbered : prefix.unnumbered);
  }

  /// The position of every embedding, `[batch or 1, length]`: as given, or
  /// counted from the tokens before them, as HF's models do.
  Tensor positions() const {
    if (position_ids.defined()) {
      return position_ids;
    }
    const auto begin = positions_before();
    return at::arange(
               begin,
               begin + embeds.size(1),
               at::TensorOptions(at::kLong).device(embeds.device()))
        .unsqueeze(0);
  }

  /// The part of attention_mask that is of `embeds`, `[batch, length]`.
  Tensor mask_of_embeds() const {
    const auto length = embeds.size(1);
    return attention_mask.defined()
        ? attention_mask.narrow(1, attention_mask.size(1) - length, length)
        : attention_mask;
  }

  /// A `[batch, length]` tensor of the tokens (token types, say) with `value`
  /// for the embeddings that adapters put in front.
  Tensor extend(const Tensor& per_token, double value) const {
    return prepended == 0 || !per_token.defined()
        ? per_token
        : at::constant_pad_nd(per_token, {prepended, 0}, value);
  }
};

/// Labels `[batch, length]` for logits of a longer sequence: the tokens that a
/// prompt put in front get `ignore_index`, so that a loss passes over them.
inline Tensor extend_labels(
    const Tensor& labels,
    const Tensor& logits,
    int64_t ignore_index = -100) {
  TORCH_CHECK_VALUE(
      labels.dim() == 2 && logits.dim() == 3 &&
          labels.size(0) == logits.size(0) && labels.size(1) <= logits.size(1),
      "peft: extend_labels takes labels [batch, length] and logits [batch, "
      "length or more, classes], got ",
      labels.sizes(),
      " and ",
      logits.sizes());
  return at::constant_pad_nd(
      labels, {logits.size(1) - labels.size(1), 0}, ignore_index);
}

/// A delta of extra tokens. It gives embeddings, or keys and values.
class TokensDelta : public CallDelta {
 public:
  using CallDelta::CallDelta;

  virtual int64_t num_virtual_tokens() const = 0;
  /// Whether the tokens behind are numbered after these.
  virtual bool takes_positions() const {
    return true;
  }

  /// `[virtual tokens, hidden]`, or `[batch, virtual tokens, hidden]` where
  /// each row of the batch has its own; undefined for one of keys and values.
  virtual Tensor embeddings(double /*scale*/) const {
    return {};
  }

  /// Keys and values, `[heads, virtual tokens, head_dim]` a layer (undefined
  /// for a layer that is left alone); empty for one of embeddings.
  virtual KeyValues key_values(double /*scale*/) const {
    return {};
  }

  /// Whether `gate` multiplies them.
  virtual bool is_gated() const {
    return false;
  }
  /// `[batch, 1, 1, 1]` from what goes into the attention of a layer, `[batch,
  /// tokens, hidden]`.
  virtual Tensor gate(const Tensor& /*hidden*/, int64_t /*layer*/) const {
    return {};
  }

  /// Keeps what a network makes of its parameters and drops the network; false
  /// where there is none. See peft::eject_reparameterization.
  virtual bool eject() {
    return false;
  }

  std::string merge_obstacle() const override {
    return "its tokens stand in front of the input, and no weight can hold "
           "them. To compute them once, run the network with a peft::KeyValues "
           "cache";
  }
};

/// Options for ExtraTokens: what a method must know of the stack behind it.
struct ExtraTokensOptions {
  ExtraTokensOptions(
      int64_t hidden_size,
      int64_t num_layers,
      int64_t num_heads,
      int64_t head_dim)
      : hidden_size_(hidden_size),
        num_layers_(num_layers),
        num_heads_(num_heads),
        head_dim_(head_dim) {}

  TORCH_ARG(int64_t, hidden_size);
  TORCH_ARG(int64_t, num_layers);
  /// Heads of keys and values, fewer than the queries' where they are shared.
  TORCH_ARG(int64_t, num_heads);
  TORCH_ARG(int64_t, head_dim);
  /// Rows of a table of positions, which virtual tokens take a part of; absent
  /// where positions have no end.
  TORCH_ARG(std::optional<int64_t>, max_positions);
  /// The token embedding's name beside this site, from which prompts can be
  /// initialised.
  TORCH_ARG(std::string, word_embeddings);
  /// Which attentions are fed: "encoder", "decoder", or "cross" for the keys
  /// and values that a decoder makes of its encoder's result (those take no
  /// embeddings).
  TORCH_ARG(std::string, stack) = "encoder";
};

/// The call site of extra tokens, one for each stack.
class ExtraTokensImpl : public torch::nn::Cloneable<ExtraTokensImpl>,
                        public CallSite {
 public:
  explicit ExtraTokensImpl(ExtraTokensOptions options_)
      : options(std::move(options_)) {}

  void reset() override {
    reset_site();
  }

  /// An archive without the site loads, and one with it adds nothing.
  bool is_serializable() const override {
    return false;
  }

  /// Puts the active adapters' tokens in front; what was attached last comes
  /// first. Into a cache that holds tokens already nothing is put again.
  TokenInputs forward(TokenInputs tokens) const {
    const bool continues =
        tokens.cache != nullptr && tokens.cache->length() > 0;
    if (continues) {
      const auto& cache = *tokens.cache;
      make_room(
          tokens,
          cache.virtual_tokens,
          cache.virtual_tokens - cache.unnumbered,
          0);
      return tokens;
    }
    for (const auto& [delta, scale] : active<TokensDelta>()) {
      const int64_t count = delta->num_virtual_tokens();
      const Tensor rows = delta->embeddings(scale);
      if (rows.defined()) {
        make_room(tokens, count, count, count);
        tokens.prepended += count;
        tokens.embeds = at::cat(
            {for_each_row(
                 rows.to(tokens.embeds.options()), tokens.embeds.size(0)),
             tokens.embeds},
            1);
        if (tokens.cache != nullptr) {
          tokens.cache->virtual_tokens += count;
        }
      } else {
        make_room(tokens, count, delta->takes_positions() ? count : 0, 0);
        put(tokens, *delta, scale);
      }
    }
    if (options.max_positions()) {
      TORCH_CHECK(
          tokens.positions_before() + tokens.embeds.size(1) <=
              *options.max_positions(),
          "peft: ",
          tokens.positions_before() + tokens.embeds.size(1),
          " tokens, the adapter's included, are more than the ",
          *options.max_positions(),
          " positions of this model; truncate the input");
    }
    return tokens;
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "peft::ExtraTokens(" << options.stack() << ")";
  }

  ExtraTokensOptions options;

 private:
  /// Embeddings for every row of a batch of that size.
  static Tensor for_each_row(const Tensor& rows, int64_t batch) {
    if (rows.dim() == 2) {
      return rows.unsqueeze(0).expand({batch, -1, -1});
    }
    TORCH_CHECK(
        rows.size(0) == batch,
        "peft: the tokens in front are given for ",
        rows.size(0),
        " rows, and the batch has ",
        batch,
        "; name the task of every row (peft::BatchTasks), or one for all");
    return rows;
  }

  /// Lets the mask and the positions know of `count` tokens in front, of which
  /// `numbered` take a position and `embedded` are numbered here.
  static void make_room(
      TokenInputs& tokens,
      int64_t count,
      int64_t numbered,
      int64_t embedded) {
    if (count == 0) {
      return;
    }
    if (tokens.attention_mask.defined()) {
      tokens.attention_mask =
          at::constant_pad_nd(tokens.attention_mask, {count, 0}, 1);
    }
    if (tokens.position_ids.defined()) {
      Tensor shifted = tokens.position_ids + numbered;
      if (embedded > 0) {
        const auto begin = tokens.positions_before();
        shifted = at::cat(
            {at::arange(begin, begin + embedded, shifted.options())
                 .unsqueeze(0)
                 .expand({shifted.size(0), -1}),
             shifted},
            1);
      }
      tokens.position_ids = shifted;
    }
  }

  /// Puts keys and values in front of what the layers will see.
  static void put(TokenInputs& tokens, const TokensDelta& delta, double scale) {
    const KeyValues added = delta.key_values(scale);
    KeyValues& target = tokens.cache != nullptr ? *tokens.cache : tokens.prefix;
    target.grows = tokens.cache != nullptr;
    target.virtual_tokens += delta.num_virtual_tokens();
    target.unnumbered +=
        delta.takes_positions() ? 0 : delta.num_virtual_tokens();
    target.keys.resize(added.keys.size());
    target.values.resize(added.values.size());
    target.gated.resize(
        delta.is_gated() ? added.keys.size() : target.gated.size());
    const auto batch = tokens.embeds.size(0);
    const auto spread = [&](const Tensor& t) {
      return t.to(tokens.embeds.options())
          .unsqueeze(0)
          .expand({batch, -1, -1, -1});
    };
    for (size_t i = 0; i < added.keys.size(); ++i) {
      if (!added.keys[i].defined()) {
        continue;
      }
      const bool more = target.keys[i].defined();
      const Tensor key = spread(added.keys[i]);
      const Tensor value = spread(added.values[i]);
      if (delta.is_gated()) {
        const auto owner = std::static_pointer_cast<const TokensDelta>(
            delta.shared_from_this());
        const auto layer = static_cast<int64_t>(i);
        target.gated[i].push_back(
            {key, value, [owner, layer](const Tensor& hidden) {
               return owner->gate(hidden, layer);
             }});
        continue;
      }
      target.keys[i] = more ? at::cat({key, target.keys[i]}, 2) : key;
      target.values[i] = more ? at::cat({value, target.values[i]}, 2) : value;
    }
  }
};
TORCH_MODULE(ExtraTokens);

} // namespace peft
