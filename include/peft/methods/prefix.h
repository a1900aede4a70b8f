#pragma once

// Prefix tuning (Li & Liang 2021, arXiv:2101.00190) and P-tuning v2 (Liu et al.
// 2021, arXiv:2110.07602): train keys and values that stand in front of every
// layer's own.
//
//   attention(q, [P_K; K], [P_V; V])     P_K, P_V [virtual tokens, width] a
//   layer
//     = (1 - g) attention(q, K, V) + g softmax(q P_Kᵀ / √d) P_V
//   with g the softmax mass of the prefix (He et al. 2022, arXiv:2110.04366)
//
// P is a table, or an MLP makes it while it trains: P = W₂ tanh(W₁ E). The keys
// are taken as they stand in a cache, after any rotation. A prefix of zeros
// takes attention too: neither init("zero") nor scale 0 is the base, disable()
// is.

#include <peft/core/attach.h>
#include <peft/core/extra_tokens.h>
#include <peft/methods/modules_to_save.h>
#include <peft/methods/prefix/key_value_table.h>
#include <peft/methods/prefix/options.h>
#include <peft/methods/prefix/places.h>
#include <peft/methods/virtual_tokens.h>

#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// A prefix of one stack: its table, or the MLP that makes it.
class PrefixDelta final : public KeyValueTable {
 public:
  /// Draws the parameters on the CPU in PyTorch's order. `is_projected` false:
  /// the table alone.
  PrefixDelta(
      PrefixOptions prefix,
      const ExtraTokensOptions& place,
      bool is_projected)
      : KeyValueTable(std::move(prefix), place) {
    using torch::nn::Linear;
    embedding = register_module(
        "embedding",
        torch::nn::Embedding(
            num_virtual_tokens(), is_projected ? width() : columns()));
    if (is_projected) {
      const int64_t h = options().encoder_hidden_size().value_or(width());
      // One after another: the order of the draws is PyTorch's.
      torch::nn::Sequential layers(Linear(width(), h), torch::nn::Tanh());
      layers->push_back(Linear(h, columns()));
      transform = register_module("transform", layers);
    }
  }

  Tensor table() const override {
    return is_projected() ? transform.ptr()->forward(embedding->weight)
                          : embedding->weight;
  }

  void set_table(const Tensor& rows) override {
    TORCH_INTERNAL_ASSERT(!is_projected());
    torch::NoGradGuard no_grad;
    embedding->weight.copy_(rows);
  }

  bool is_projected() const {
    return !transform.is_empty();
  }

  /// Starts from keys and values of zero.
  void set_zero() {
    torch::NoGradGuard no_grad;
    if (is_projected()) {
      for (auto& p : transform->ptr(2)->parameters()) {
        p.zero_();
      }
    } else {
      embedding->weight.zero_();
    }
  }

  bool eject() override {
    if (!is_projected()) {
      return false;
    }
    torch::NoGradGuard no_grad;
    const bool trains = embedding->weight.requires_grad();
    torch::nn::Embedding rows = torch::nn::Embedding::from_pretrained(
        table().detach().clone(),
        torch::nn::EmbeddingFromPretrainedOptions().freeze(!trains));
    embedding = replace_module("embedding", rows);
    unregister_module("transform");
    transform = nullptr;
    return true;
  }

  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    return {{"prompt_embeddings", table()}};
  }

  std::vector<std::pair<std::string, Tensor>> training_tensors()
      const override {
    std::vector<std::pair<std::string, Tensor>> result;
    if (is_projected()) {
      for (const auto& item : embedding->named_parameters()) {
        result.emplace_back("embedding." + item.key(), item.value());
      }
      for (const auto& item : transform->named_parameters()) {
        result.emplace_back("transform." + item.key(), item.value());
      }
    }
    return result;
  }

  std::shared_ptr<Delta> copy() const override {
    auto result =
        std::make_shared<PrefixDelta>(options(), stack(), is_projected());
    copy_parameters(*this, *result);
    result->train(is_training());
    return result;
  }

  std::string describe() const override {
    return "prefix l=" + std::to_string(num_virtual_tokens()) +
        (is_projected() ? " by MLP" : "");
  }

  torch::nn::Embedding embedding{nullptr};
  torch::nn::Sequential transform{nullptr};
};

inline void check(const PrefixOptions& options) {
  TORCH_CHECK_VALUE(
      options.init() == "random" || options.init() == "zero",
      "peft: init must be 'random' or 'zero', got '",
      options.init(),
      "'; init_cache starts from real keys and values");
  TORCH_CHECK_VALUE(
      options.dropout() >= 0 && options.dropout() < 1,
      "peft: dropout must lie in [0, 1), got ",
      options.dropout());
  TORCH_CHECK_VALUE(
      options.encoder_hidden_size().value_or(1) > 0,
      "peft: encoder_hidden_size must be positive, got ",
      options.encoder_hidden_size().value_or(1));
  TORCH_CHECK_VALUE(
      !options.init_cache() ||
          (!options.prefix_projection() && !options.hf_layer_order() &&
           options.init() == "random"),
      "peft: init_cache sets every layer's keys and values; it goes neither "
      "with prefix_projection nor with hf_layer_order nor with init('zero')");
  TORCH_CHECK_VALUE(
      options.leave_out().empty() || !options.hf_layer_order(),
      "peft: hf_layer_order deals the rows out to every layer; it does not go "
      "with leave_out");
}

/// Makes the table of one stack.
using MakeTable = std::function<std::shared_ptr<KeyValueTable>(
    const PrefixOptions&,
    const ExtraTokensOptions&)>;

/// A table for each stack that gets one; `method` is for messages. The plan's
/// options are `options` with the task_type that was found and without the
/// cache, which is not to be held as long as the adapter.
inline Plan plan_key_values(
    const PrefixOptions& options,
    const Network& network,
    const std::string& method,
    const MakeTable& make) {
  check(options);
  const auto all = token_sites(network, method);
  const auto places = prefix_places(options, all);
  check_virtual_tokens(
      options.num_virtual_tokens(),
      places,
      options.takes_positions().value_or(true));
  TORCH_CHECK_VALUE(
      places.size() == 1 ||
          (!options.init_cache() && !options.hf_layer_order()),
      "peft: init_cache and hf_layer_order are for one stack, and this prefix "
      "goes to ",
      stacks_of(places),
      "; name one in stacks");
  PrefixOptions kept = options;
  kept.init_cache(std::nullopt);
  kept.task_type(task_type_of(options, all));
  const bool two_stacks =
      all.front().second->options.stack() != all.back().second->options.stack();
  const auto wanted = trained_options(network);
  check_leave_out(options.leave_out(), layers_of(all));
  Plan result;
  result.options = kept;
  for (const auto& place : places) {
    const auto left_out = left_out_at(options.leave_out(), all, place);
    if (static_cast<int64_t>(left_out.size()) ==
        place.second->options.num_layers()) {
      continue;
    }
    auto delta =
        make(PrefixOptions(kept).leave_out(left_out), place.second->options);
    delta->to(wanted.device(), c10::typeMetaToScalarType(wanted.dtype()));
    if (options.init_cache()) {
      check_init_cache(
          *options.init_cache(), options.num_virtual_tokens(), place);
      delta->set(*options.init_cache());
    }
    PlannedSite site;
    site.name = site.parameter = place.first;
    // HF PEFT would deal such a file's rows out in its own order, or miss those
    // of layers left out; it does not take one for its own under this key.
    const bool is_own = two_stacks || !options.leave_out().empty();
    site.file_prefix = is_own && !options.hf_layer_order() ? place.first : "";
    site.call_site = place.second->site();
    site.delta = std::move(delta);
    result.sites.push_back(std::move(site));
  }
  TORCH_CHECK_VALUE(
      !result.sites.empty(),
      "peft: leave_out leaves no layer for the prefix, which goes to ",
      stacks_of(places));
  plan_modules_to_save(network, options.modules_to_save(), result.sites);
  return result;
}

/// `has_encoder` false: the table alone, as it comes from a file.
inline Plan plan(
    const PrefixOptions& options,
    const Network& network,
    bool has_encoder = true) {
  Plan result = plan_key_values(
      options,
      network,
      "prefix tuning",
      [&](const PrefixOptions& own, const ExtraTokensOptions& stack) {
        auto delta = std::make_shared<PrefixDelta>(
            own, stack, own.prefix_projection() && has_encoder);
        if (own.init() == "zero") {
          delta->set_zero();
        }
        return delta;
      });
  result.method = "PREFIX_TUNING";
  return result;
}

} // namespace detail

/// Trains a prefix of keys and values in every layer of `model` and freezes
/// everything else. The network calls peft::ExtraTokens and lets its attentions
/// take tokens.key_values(); an error shows the lines where it does not.
inline Adapter attach(
    torch::nn::Module& model,
    const PrefixOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
