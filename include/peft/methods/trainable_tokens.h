#pragma once

// Trainable tokens: a few rows of an embedding train, for new tokens or new
// meanings; all others stay (HF PEFT's TrainableTokensConfig).
//
//   W' = W, but rows token_indices are those that train
//
// A head that is tied to the embedding is the same tensor and moves with it.

#include <peft/core/formula_delta.h>
#include <peft/methods/tuner_targets.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for trainable tokens, by the names of HF's TrainableTokensConfig.
///
///   peft::TrainableTokensOptions({30522, 30523})
struct TrainableTokensOptions {
  TrainableTokensOptions(std::vector<int64_t> token_indices)
      : token_indices_(std::move(token_indices)) {}

  TORCH_ARG(std::vector<int64_t>, token_indices);
  /// HF's init_weights: false starts at N(0, 1), not at the rows as they are.
  TORCH_ARG(bool, init_weights) = true;
  /// The embeddings. Default: the one of tokens, by its usual names.
  TORCH_ARG(Targets, targets);
  TORCH_ARG(Targets, exclude);
  TORCH_ARG(std::vector<int64_t>, layers);
  TORCH_ARG(std::vector<std::string>, layers_pattern);
  TORCH_ARG(bool, fan_in_fan_out) = false;
  TORCH_ARG(std::vector<std::string>, modules_to_save);
};

/// Some rows of one embedding.
class TrainableTokensDelta final : public FormulaDelta<TrainableTokensDelta> {
 public:
  struct Config {
    Tensor tokens; // int64 [n]
  };

  TrainableTokensDelta(Config config, NamedTensors tensors, bool is_transposed)
      : FormulaDelta(std::move(tensors), is_transposed),
        config_(std::move(config)) {}

  Tensor changed(const Tensor& weight, double scale) const {
    const Tensor tokens = config_.tokens.to(weight.device());
    Tensor rows = tensor("trainable_tokens_delta", weight);
    if (scale != 1.0) {
      const Tensor before = weight.index_select(0, tokens);
      rows = before + (rows - before) * scale;
    }
    return weight.index_copy(0, tokens, rows);
  }

  bool has_embedding() const override {
    return true;
  }
  /// The rows that are asked for, without a second table.
  Tensor embedding(
      const EmbeddingCall& call,
      const Below<EmbeddingCall>& below,
      double scale) const override {
    const Tensor y = below(call);
    const Tensor tokens = config_.tokens.to(call.indices.device());
    const Tensor ids = call.indices.reshape({-1});
    // [found]: place in the batch, and which of the tokens.
    const Tensor found = ids.unsqueeze(1).eq(tokens).nonzero();
    const Tensor places = found.select(1, 0), which = found.select(1, 1);
    Tensor rows = tensor("trainable_tokens_delta", y).index_select(0, which);
    if (call.padding_idx >= 0) { // no gradient, as the base's row
      const Tensor is_padding =
          tokens.index_select(0, which).eq(call.padding_idx).unsqueeze(1);
      rows = at::where(is_padding, rows.detach(), rows);
    }
    const Tensor flat = y.reshape({-1, y.size(-1)});
    if (scale != 1.0) {
      const Tensor before = flat.index_select(0, places);
      rows = before + (rows - before) * scale;
    }
    return flat.index_copy(0, places, rows).view(y.sizes());
  }

  bool replaces_base() const override {
    return true;
  }
  std::string describe() const override {
    return "tokens n=" + std::to_string(config_.tokens.numel());
  }
  const Config& config() const {
    return config_;
  }

 private:
  Config config_;
};

namespace detail {

/// The embeddings of tokens by the names that they go by.
inline std::vector<std::string> token_embeddings(const Network& network) {
  std::vector<std::string> result;
  for (const auto& layer : network) {
    const auto dot = layer.name.rfind('.');
    const std::string last =
        dot == std::string::npos ? layer.name : layer.name.substr(dot + 1);
    if (layer.kind == LayerKind::embedding &&
        is_one_of(
            last,
            {"embed_tokens",
             "word_embeddings",
             "wte",
             "shared",
             "tok_embeddings",
             "token_embedding"})) {
      result.push_back(layer.name);
    }
  }
  return result;
}

inline Plan plan(
    const TrainableTokensOptions& options,
    const Network& network) {
  auto tokens = options.token_indices();
  TORCH_CHECK_VALUE(
      !tokens.empty(), "peft: token_indices is empty, and nothing would train");
  auto sorted = tokens;
  std::sort(sorted.begin(), sorted.end());
  TORCH_CHECK_VALUE(
      std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end(),
      "peft: token_indices names a token twice");
  TrainableTokensOptions here = options;
  if (options.targets().empty()) {
    const auto names = token_embeddings(network);
    TORCH_CHECK(
        !names.empty(),
        "peft: no embedding of this network has one of the usual names "
        "(embed_tokens, word_embeddings, wte, shared); name it by "
        "targets({...}).",
        near_misses(network, "embed_tokens"));
    here.targets(Targets(names));
  }
  Plan result;
  result.method = "TRAINABLE_TOKENS";
  result.options = here;
  result.sites = plan_tuner(
      here,
      network,
      {"TrainableTokens", false, /*embeddings=*/true},
      [&](const TunerWeight& w) {
        TORCH_CHECK_INDEX(
            sorted.front() >= 0 && sorted.back() < w.weight.size(0),
            "peft: token_indices go from ",
            sorted.front(),
            " to ",
            sorted.back(),
            ", and '",
            w.path,
            "' has the rows 0 to ",
            w.weight.size(0) - 1);
        torch::NoGradGuard no_grad;
        const Tensor at = torch::tensor(tokens, torch::kLong);
        const Tensor start = options.init_weights()
            ? base(w.weight).index_select(0, at.to(w.weight.device()))
            : torch::randn({at.numel(), w.weight.size(1)});
        return std::make_shared<TrainableTokensDelta>(
            TrainableTokensDelta::Config{at},
            TrainableTokensDelta::NamedTensors{
                {"trainable_tokens_delta",
                 parameter_for(w.weight, start.detach().clone())}},
            false);
      });
  return result;
}

} // namespace detail

/// Trains some rows of `model`'s embedding and freezes everything else.
inline Adapter attach(
    torch::nn::Module& model,
    const TrainableTokensOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
