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
#include <peft/methods/bottleneck/sites.h>
#include <peft/methods/modules_to_save.h>
#include <peft/methods/virtual_tokens.h>

#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for prefix tuning, by the names of HF's PrefixTuningConfig.
///
///   peft::PrefixOptions(20)                          a table, N(0, 1)
///   peft::PrefixOptions(20).prefix_projection(true)  made by an MLP
struct PrefixOptions {
  PrefixOptions(int64_t num_virtual_tokens)
      : num_virtual_tokens_(num_virtual_tokens) {}

  TORCH_ARG(int64_t, num_virtual_tokens);
  /// Whether an MLP makes the prefix from a small table (Li & Liang).
  TORCH_ARG(bool, prefix_projection) = false;
  /// Width of that MLP. Default: of the keys.
  TORCH_ARG(std::optional<int64_t>, encoder_hidden_size);
  /// On the prefix, in training.
  TORCH_ARG(double, dropout) = 0;
  /// "random", or "zero" for keys and values of zero: HF's init_weights.
  TORCH_ARG(std::string, init) = "random";
  /// Keys and values to start from: a cache into which the network, frozen, has
  /// read one row of num_virtual_tokens tokens or more.
  ///
  ///     peft::KeyValues cache;
  ///     model->forward(token_ids, {}, {}, &cache);
  ///     peft::attach(*model, peft::PrefixOptions(20).init_cache(cache));
  TORCH_ARG(std::optional<KeyValues>, init_cache);
  /// Which attentions: "encoder", "decoder", "cross". Default: the decoder's
  /// own, and the encoder's in a network without a decoder, as HF has it.
  TORCH_ARG(std::vector<std::string>, stacks);
  /// Deals the rows out as HF PEFT 0.21.2 does in an encoder-decoder: layer i
  /// of L takes those of layer 2 i mod L, and half of them go unused where L is
  /// even. false: every layer has its own.
  TORCH_ARG(bool, hf_layer_order) = false;
  /// Whether the input's tokens are numbered after the prefix, as HF PEFT has
  /// it; false: as if it were not there, the default inside MAM and UniPELT, by
  /// their code. (Before T5's relative positions it stands in any case.)
  TORCH_ARG(std::optional<bool>, takes_positions);
  /// Layers without a prefix, counted from 0 through all stacks: an encoder's
  /// first, then its decoder's (a cross-attention is in its decoder's layer).
  TORCH_ARG(std::vector<int64_t>, leave_out);
  /// Modules trained whole, beside the prefix: a task head.
  TORCH_ARG(std::vector<std::string>, modules_to_save);
  /// HF's task_type, by which HF PEFT runs a prefix from a file. Default: as
  /// the stacks and modules_to_save let guess.
  TORCH_ARG(std::string, task_type);
};

/// P-tuning v2 is a prefix without projection, for classification with a head
/// in modules_to_save.
using PTuningV2Options = PrefixOptions;

namespace detail {

/// The keys and values of one stack: a table `[virtual tokens, layers * 2 *
/// heads * head_dim]`, first the key and then the value of each layer that is
/// not left out, or the MLP that makes it.
class PrefixDelta final : public TokensDelta {
 public:
  /// Draws the parameters on the CPU in PyTorch's order. `is_projected` false:
  /// the table alone. leave_out counts from this stack's first layer.
  PrefixDelta(
      PrefixOptions options,
      const ExtraTokensOptions& stack,
      bool is_projected)
      : options_(std::move(options)), stack_(stack) {
    using torch::nn::Linear;
    const int64_t width = stack_.num_heads() * stack_.head_dim();
    const auto left_out = static_cast<int64_t>(options_.leave_out().size());
    const int64_t all = 2 * (stack_.num_layers() - left_out) * width;
    embedding = register_module(
        "embedding",
        torch::nn::Embedding(
            options_.num_virtual_tokens(), is_projected ? width : all));
    if (is_projected) {
      const int64_t h = options_.encoder_hidden_size().value_or(width);
      // One after another: the order of the draws is PyTorch's.
      torch::nn::Sequential layers(Linear(width, h), torch::nn::Tanh());
      layers->push_back(Linear(h, all));
      transform = register_module("transform", layers);
    }
  }

  /// `[virtual tokens, layers * 2 * heads * head_dim]`.
  Tensor table() const {
    return is_projected() ? transform.ptr()->forward(embedding->weight)
                          : embedding->weight;
  }

  bool is_projected() const {
    return !transform.is_empty();
  }

  const ExtraTokensOptions& stack() const {
    return stack_;
  }

  int64_t num_virtual_tokens() const override {
    return options_.num_virtual_tokens();
  }

  bool takes_positions() const override {
    return options_.takes_positions().value_or(true);
  }

  KeyValues key_values(double scale) const override {
    Tensor all = at::dropout(table(), options_.dropout(), is_training());
    if (scale != 1.0) {
      all = all * scale;
    }
    if (factor_kind() == Decoration::Factor::number) {
      all = times_factor(all, number_factor());
    }
    const int64_t layers = stack_.num_layers();
    const auto blocks =
        all.view({all.size(0), -1, stack_.num_heads(), stack_.head_dim()})
            .permute({1, 2, 0, 3})
            .unbind(0);
    KeyValues result;
    int64_t next = 0;
    for (int64_t i = 0; i < layers; ++i) {
      if (is_left_out(options_.leave_out(), i)) {
        result.keys.emplace_back();
        result.values.emplace_back();
        continue;
      }
      const auto row = static_cast<size_t>(
          options_.hf_layer_order() ? 2 * i % layers : next++);
      result.keys.push_back(blocks[2 * row]);
      result.values.push_back(blocks[2 * row + 1]);
    }
    return result;
  }

  /// A gate takes the place of a factor on what a prefix adds: it multiplies
  /// the keys and values, as UniPELT's published code has it.
  bool takes_factor(Decoration::Factor /*kind*/) const override {
    return true;
  }
  int64_t factor_features() const override {
    return stack_.hidden_size();
  }
  int64_t factor_parts() const override {
    return part_of(stack_.num_layers());
  }
  bool is_gated() const override {
    return factor_kind() == Decoration::Factor::input;
  }
  Tensor gate(const Tensor& hidden, int64_t layer) const override {
    return factor(hidden, 1.0, part_of(layer)).view({-1, 1, 1, 1});
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

  /// Starts from the first tokens of a cache.
  void set(const KeyValues& cache) {
    torch::NoGradGuard no_grad;
    std::vector<Tensor> blocks;
    for (size_t i = 0; i < cache.keys.size(); ++i) {
      if (is_left_out(options_.leave_out(), static_cast<int64_t>(i))) {
        continue;
      }
      for (const auto* t : {&cache.keys[i], &cache.values[i]}) {
        blocks.push_back((*t)[0]
                             .narrow(1, 0, num_virtual_tokens())
                             .transpose(0, 1)
                             .flatten(1));
      }
    }
    embedding->weight.copy_(at::cat(blocks, 1));
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
        std::make_shared<PrefixDelta>(options_, stack_, is_projected());
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

 private:
  /// How many layers below this one have a prefix.
  int64_t part_of(int64_t layer) const {
    int64_t count = 0;
    for (int64_t i = 0; i < layer; ++i) {
      count += is_left_out(options_.leave_out(), i) ? 0 : 1;
    }
    return count;
  }

  PrefixOptions options_;
  ExtraTokensOptions stack_;
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

/// The number of the first layer at `place`, counted through all stacks.
inline int64_t first_layer(
    const std::vector<TokenSite>& all,
    const TokenSite& place) {
  int64_t first = 0;
  for (const auto& other : all) { // encoders come first
    const auto& stack = other.second->options;
    const bool is_before = place.second->options.stack() == "cross"
        ? stack.stack() == "encoder"
        : stack.stack() != "cross";
    if (other == place) {
      break;
    }
    first += is_before ? stack.num_layers() : 0;
  }
  return first;
}

/// Those of `leave_out` that are in the stack at `place`, counted from its
/// first layer, each once.
inline std::vector<int64_t> left_out_at(
    const std::vector<int64_t>& leave_out,
    const std::vector<TokenSite>& all,
    const TokenSite& place) {
  const int64_t first = first_layer(all, place);
  std::vector<int64_t> result;
  for (int64_t i = 0; i < place.second->options.num_layers(); ++i) {
    if (is_left_out(leave_out, first + i)) {
      result.push_back(i);
    }
  }
  return result;
}

/// The layers of all stacks.
inline int64_t layers_of(const std::vector<TokenSite>& all) {
  int64_t count = 0;
  for (const auto& place : all) {
    const auto& stack = place.second->options;
    count += stack.stack() == "cross" ? 0 : stack.num_layers();
  }
  return count;
}

/// The stacks that get a prefix, by the options' words.
inline std::vector<TokenSite> prefix_places(
    const PrefixOptions& options,
    const std::vector<TokenSite>& all) {
  const auto at = [&](const std::string& stack) {
    std::vector<TokenSite> found;
    for (const auto& place : all) {
      if (place.second->options.stack() == stack) {
        found.push_back(place);
      }
    }
    return found;
  };
  if (options.stacks().empty()) {
    const auto decoder = at("decoder");
    const auto chosen = !decoder.empty() ? decoder : at("encoder");
    TORCH_CHECK_VALUE(
        !chosen.empty(),
        "peft: this network has places for a prefix only at ",
        stacks_of(all),
        "; name them in stacks");
    return chosen;
  }
  std::vector<TokenSite> places;
  for (const auto& stack : options.stacks()) {
    const auto found = at(stack);
    TORCH_CHECK_VALUE(
        !found.empty(),
        "peft: there is no stack '",
        stack,
        "' for a prefix in this network; it has ",
        stacks_of(all));
    for (const auto& place : found) {
      TORCH_CHECK_VALUE(
          std::find(places.begin(), places.end(), place) == places.end(),
          "peft: stacks names '",
          stack,
          "' twice");
      places.push_back(place);
    }
  }
  return places;
}

/// A prefix as the published unions have it: in every attention of the network
/// and without positions, unless its options say otherwise.
inline PrefixOptions in_every_stack(
    PrefixOptions options,
    const Network& network) {
  if (!options.takes_positions()) { // not said
    options.takes_positions(false);
  }
  if (options.stacks().empty()) {
    auto& named = options.stacks();
    for (const auto& place : token_sites(network, "prefix tuning")) {
      const auto& stack = place.second->options.stack();
      if (std::find(named.begin(), named.end(), stack) == named.end()) {
        named.push_back(stack);
      }
    }
  }
  return options;
}

/// Whether a cache fits a stack: one row, enough tokens, all layers and heads.
inline void check_init_cache(
    const KeyValues& cache,
    int64_t num_virtual_tokens,
    const TokenSite& place) {
  const auto& stack = place.second->options;
  bool fits = static_cast<int64_t>(cache.keys.size()) == stack.num_layers() &&
      cache.values.size() == cache.keys.size();
  for (const auto* side : {&cache.keys, &cache.values}) {
    for (const auto& t : *side) {
      fits = fits && t.defined() && t.dim() == 4 && t.size(0) == 1 &&
          t.size(1) == stack.num_heads() && t.size(2) >= num_virtual_tokens &&
          t.size(3) == stack.head_dim();
    }
  }
  TORCH_CHECK_VALUE(
      fits,
      "peft: init_cache must hold keys and values [1, ",
      stack.num_heads(),
      ", ",
      num_virtual_tokens,
      " or more, ",
      stack.head_dim(),
      "] for each of the ",
      stack.num_layers(),
      " layers at '",
      place.first,
      "'; it has ",
      cache.keys.size(),
      " layers, the first ",
      cache.keys.empty() || !cache.keys[0].defined() ? at::IntArrayRef()
                                                     : cache.keys[0].sizes());
}

/// `has_encoder` false: the table alone, as it comes from a file.
inline Plan plan(
    const PrefixOptions& options,
    const Network& network,
    bool has_encoder = true) {
  check(options);
  const auto all = token_sites(network, "prefix tuning");
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
  kept.init_cache(std::nullopt); // not to be held as long as the adapter
  kept.task_type(task_type_of(options, all));
  const bool two_stacks =
      all.front().second->options.stack() != all.back().second->options.stack();
  const auto wanted = trained_options(network);
  check_leave_out(options.leave_out(), layers_of(all));
  Plan result;
  result.method = "PREFIX_TUNING";
  result.options = kept;
  for (const auto& place : places) {
    const auto left_out = left_out_at(options.leave_out(), all, place);
    if (static_cast<int64_t>(left_out.size()) ==
        place.second->options.num_layers()) {
      continue;
    }
    auto delta = std::make_shared<PrefixDelta>(
        PrefixOptions(kept).leave_out(left_out),
        place.second->options,
        options.prefix_projection() && has_encoder);
    delta->to(wanted.device(), c10::typeMetaToScalarType(wanted.dtype()));
    if (options.init() == "zero") {
      delta->set_zero();
    }
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
