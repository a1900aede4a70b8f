#pragma once

// Causal attention with a cache, a prefix and padding, for the decoders here.
//
// Vaswani et al. 2017, arXiv:1706.03762: softmax(q kᵀ / √d + mask) v. The
// queries are the last of the keys, so the mask is aligned at the bottom right;
// `is_causal` of torch is aligned at the top left and serves only where there
// are as many keys as queries.

#include <peft/core/extra_tokens.h>
#include <peft/core/layer_loop.h>

#include <ATen/ops/ones.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/types.h>

#include <cstdint>
#include <optional>

namespace peft::models {

using torch::Tensor;

/// Where the last `queries` of `keys` tokens may look: at themselves and what
/// stands before them, except at padding. `attention_mask` `[batch, keys]` is 1
/// for a token and 0 for padding, or undefined. The result is boolean, `[batch
/// or 1, 1, queries, keys]`; a query that may look nowhere gets zeros from
/// scaled_dot_product_attention.
inline Tensor causal_mask(
    const Tensor& attention_mask,
    int64_t queries,
    int64_t keys,
    torch::Device device) {
  const auto triangle =
      at::ones(
          {1, 1, queries, keys}, at::TensorOptions(at::kBool).device(device))
          .tril(keys - queries);
  return attention_mask.defined()
      ? triangle.logical_and(
            attention_mask.to(at::kBool).unsqueeze(1).unsqueeze(1))
      : triangle;
}

/// The mask for what flows into a causal stack; undefined where
/// `causal_attention` needs none.
inline Tensor causal_mask(const TokenInputs& tokens) {
  const auto queries = tokens.embeds.size(1);
  const auto& padding = tokens.attention_mask;
  if (!padding.defined() && (queries == 1 || tokens.past() == 0)) {
    return {};
  }
  return causal_mask(
      padding,
      queries,
      padding.defined() ? padding.size(1) : tokens.past() + queries,
      tokens.embeds.device());
}

/// `mask` of a stack of `length` tokens with `past` in front of them, cut to
/// those that one layer sees.
inline Tensor
causal_mask(const LayerCall& call, Tensor mask, int64_t length, int64_t past) {
  if (call.is_whole() && !call.valid.defined()) {
    return mask;
  }
  // Tokens that were picked out do not stand in a triangle any more.
  if (!mask.defined()) {
    mask = causal_mask(Tensor(), length, past + length, call.hidden.device());
  }
  return call.attention(mask, past);
}

/// Attention of the last tokens over all: `query` `[batch, heads, queries,
/// head_dim]`, `key` and `value` `[batch, heads or fewer, keys, head_dim]` ->
/// `[batch, queries, heads * head_dim]`. An undefined mask hides only what
/// comes later.
inline Tensor causal_attention(
    const Tensor& query,
    const Tensor& key,
    const Tensor& value,
    Tensor mask,
    double dropout) {
  const auto queries = query.size(2);
  const auto keys = key.size(2);
  const bool is_causal = !mask.defined() && queries == keys;
  if (!mask.defined() && !is_causal && queries > 1) {
    mask = causal_mask(Tensor(), queries, keys, query.device());
  }
  mask = mask_of_last(mask, keys);
  return at::scaled_dot_product_attention(
             query,
             key,
             value,
             mask.defined() ? std::optional<Tensor>(mask) : std::nullopt,
             dropout,
             is_causal,
             /*scale=*/std::nullopt,
             /*enable_gqa=*/query.size(1) != key.size(1))
      .transpose(1, 2)
      .flatten(2);
}

/// Where a block keeps its keys and values: a side network's stand behind those
/// of the layers.
inline size_t cache_slot(const LayerCall& call, int64_t num_layers) {
  return static_cast<size_t>(call.layer + (call.side ? num_layers : 0));
}

/// `call` with its tokens normalised by `norm`, as pre-norm layers begin.
template <class Norm>
LayerCall normalised(LayerCall call, Norm& norm) {
  const bool is_one = call.context.is_same(call.hidden);
  call.hidden = norm->forward(call.hidden);
  call.context = is_one ? call.hidden : norm->forward(call.context);
  return call;
}

/// Errors for inputs that do not fit each other.
inline void check_decoder_inputs(
    const Tensor& input_ids,
    const Tensor& attention_mask,
    const Tensor& position_ids,
    const KeyValues* cache) {
  TORCH_CHECK(
      input_ids.dim() == 2,
      "peft: token ids must have the shape [batch, length], got ",
      input_ids.sizes());
  const auto batch = input_ids.size(0);
  const auto length = input_ids.size(1);
  const auto cached =
      cache == nullptr ? 0 : cache->length() - cache->virtual_tokens;
  TORCH_CHECK(
      !attention_mask.defined() ||
          (attention_mask.dim() == 2 && attention_mask.size(0) == batch &&
           attention_mask.size(1) == cached + length),
      "peft: the attention mask must cover ",
      cached,
      " cached and ",
      length,
      " new tokens, [",
      batch,
      ", ",
      cached + length,
      "], got ",
      attention_mask.defined() ? attention_mask.sizes() : at::IntArrayRef());
  TORCH_CHECK(
      !position_ids.defined() ||
          (position_ids.dim() == 2 && position_ids.size(1) == length &&
           (position_ids.size(0) == batch || position_ids.size(0) == 1)),
      "peft: the position ids must have the token ids' shape ",
      input_ids.sizes(),
      ", got ",
      position_ids.defined() ? position_ids.sizes() : at::IntArrayRef());
}

} // namespace peft::models
