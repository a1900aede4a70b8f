#pragma once

// Writing text with a causal decoder: greedy, or sampled after temperature,
// top-k (Fan et al. 2018, arXiv:1805.04833) and top-p (Holtzman et al. 2019,
// arXiv:1904.09751), in the order that Hugging Face applies them.

#include <peft/core/extra_tokens.h>

#include <torch/arg.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

namespace peft::models {

using torch::Tensor;

/// How to go on from a prompt, by Hugging Face's names. Sampling draws from
/// torch's generator: `torch::manual_seed` repeats it.
///
///     GenerationOptions().max_new_tokens(50).do_sample(true).top_p(0.9)
struct GenerationOptions {
  TORCH_ARG(int64_t, max_new_tokens) = 20;
  /// A row ends once it has written this token. Absent: no row ends early.
  TORCH_ARG(std::optional<int64_t>, eos_token_id);
  /// What stands behind the end of a row; eos_token_id where absent.
  TORCH_ARG(std::optional<int64_t>, pad_token_id);
  /// false takes the most likely token, and reads none of the fields below.
  TORCH_ARG(bool, do_sample) = false;
  /// Divides the logits.
  TORCH_ARG(double, temperature) = 1;
  /// Draws among the k most likely tokens; 0 for all.
  TORCH_ARG(int64_t, top_k) = 0;
  /// Draws among the most likely tokens that together reach this probability.
  TORCH_ARG(double, top_p) = 1;
};

namespace detail {

inline void check(const GenerationOptions& options) {
  TORCH_CHECK_VALUE(
      options.max_new_tokens() > 0,
      "peft: max_new_tokens must be positive, got ",
      options.max_new_tokens());
  TORCH_CHECK_VALUE(
      std::isfinite(options.temperature()) && options.temperature() > 0,
      "peft: temperature must be positive, got ",
      options.temperature(),
      "; do_sample(false) takes the most likely token");
  TORCH_CHECK_VALUE(
      options.top_k() >= 0,
      "peft: top_k must not be negative, got ",
      options.top_k());
  TORCH_CHECK_VALUE(
      options.top_p() > 0 && options.top_p() <= 1,
      "peft: top_p must lie in (0, 1], got ",
      options.top_p());
}

} // namespace detail

/// The logits `[batch, vocab]` that sampling draws from: over the temperature,
/// with -inf for what top_k and top_p rule out. The most likely token stays.
inline Tensor filter_logits(Tensor logits, const GenerationOptions& options) {
  constexpr auto nothing = -std::numeric_limits<double>::infinity();
  logits = logits.to(at::promote_types(logits.scalar_type(), at::kFloat)) /
      options.temperature();
  if (options.top_k() > 0) {
    const auto k = std::min(options.top_k(), logits.size(-1));
    const auto least = std::get<0>(logits.topk(k)).narrow(-1, k - 1, 1);
    logits = logits.masked_fill(logits.lt(least), nothing);
  }
  if (options.top_p() < 1) {
    const auto [sorted, order] = logits.sort(/*dim=*/-1);
    auto drop = sorted.softmax(-1).cumsum(-1).le(1 - options.top_p());
    drop.select(-1, -1).fill_(false);
    logits = logits.masked_fill(drop.scatter(-1, order, drop), nothing);
  }
  return logits;
}

/// The next token of every row, `[batch]`, from its logits `[batch, vocab]`.
inline Tensor next_tokens(
    const Tensor& logits,
    const GenerationOptions& options) {
  if (!options.do_sample()) {
    return logits.argmax(-1);
  }
  return filter_logits(logits, options)
      .softmax(-1)
      .multinomial(/*num_samples=*/1)
      .squeeze(-1);
}

/// Goes on from `sequences` `[batch, length]`. `step(new_tokens)` gets what was
/// appended since its last call, `[batch, n]` (the whole of `sequences` first),
/// and gives logits `[batch, any, vocab]`, of which the last count. Ends after
/// max_new_tokens, or once every row has ended; -> `[batch, length + new]`.
template <class Step>
Tensor extend_sequences(
    Tensor sequences,
    const GenerationOptions& options,
    Step&& step) {
  detail::check(options);
  torch::NoGradGuard no_grad;
  auto ended =
      at::zeros({sequences.size(0)}, sequences.options().dtype(at::kBool));
  auto input = sequences;
  for (int64_t i = 0; i < options.max_new_tokens(); ++i) {
    auto tokens = next_tokens(step(input).select(1, -1), options);
    if (const auto eos = options.eos_token_id()) {
      tokens = tokens.masked_fill(ended, options.pad_token_id().value_or(*eos));
      ended = ended.logical_or(tokens.eq(*eos));
    }
    input = tokens.unsqueeze(1);
    sequences = at::cat({sequences, input}, 1);
    if (options.eos_token_id() && ended.all().item<bool>()) {
      break;
    }
  }
  return sequences;
}

/// Goes on from the prompts `input_ids` `[batch, length]` with a causal decoder
/// (a holder whose forward takes token ids, mask, positions and cache), one
/// token a step; -> `[batch, length + new]`. Shorter prompts are padded on the
/// left, where `attention_mask` is 0. Call `model->eval()` first.
template <class Model>
Tensor generate(
    Model model,
    const Tensor& input_ids,
    const Tensor& attention_mask = {},
    const GenerationOptions& options = {}) {
  TORCH_CHECK(
      input_ids.dim() == 2 && input_ids.size(1) > 0,
      "peft: generate continues prompts [batch, length] of one token at least, "
      "got ",
      input_ids.sizes());
  Tensor mask;
  if (attention_mask.defined()) {
    mask = attention_mask.to(at::kLong);
    TORCH_CHECK(
        mask.sizes() == input_ids.sizes(),
        "peft: the attention mask must have the token ids' shape ",
        input_ids.sizes(),
        ", got ",
        mask.sizes());
    TORCH_CHECK(
        mask.select(1, -1).ne(0).all().template item<bool>(),
        "peft: generate goes on behind the last column, which is padding in "
        "some rows; pad on the left");
  }
  KeyValues cache;
  return extend_sequences(input_ids, options, [&](const Tensor& tokens) {
    const auto length = tokens.size(1);
    if (!mask.defined()) {
      return model->forward(tokens, Tensor(), Tensor(), &cache);
    }
    if (cache.length() > 0) {
      mask = at::constant_pad_nd(mask, {0, length}, 1);
    }
    const auto positions = (mask.cumsum(1) - 1).clamp_min(0);
    return model->forward(
        tokens,
        mask,
        positions.narrow(1, mask.size(1) - length, length),
        &cache);
  });
}

} // namespace peft::models
