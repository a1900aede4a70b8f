#pragma once

// Trainable tokens: a few rows of an embedding train, for new tokens or new
// meanings; all others stay (HF PEFT's TrainableTokensConfig).
//
//   W' = W, but rows token_indices are those that train
//
// A head that is tied to the embedding is the same tensor and moves with it.

#include <peft/core/formula_delta.h>
#include <peft/core/roles.h>
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
  /// The embeddings. Default: the first that has a usual name.
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
    // As the base's rows: a token that stands there n times counts once.
    Tensor rows = at::embedding(
        tensor("trainable_tokens_delta", y),
        which,
        /*padding_idx=*/-1,
        call.scale_grad_by_freq);
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

/// Whether these can be rows of a table.
inline void check_tokens(
    const std::vector<int64_t>& tokens,
    const std::string& option) {
  TORCH_CHECK_VALUE(
      !tokens.empty(), "peft: ", option, " is empty, and nothing would train");
  auto sorted = tokens;
  std::sort(sorted.begin(), sorted.end());
  TORCH_CHECK_VALUE(
      std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end(),
      "peft: ",
      option,
      " names a token twice");
}

/// These rows of `weight`, the parameter `path`.
inline std::shared_ptr<TrainableTokensDelta> make_tokens_delta(
    const Tensor& weight,
    const std::string& path,
    const std::vector<int64_t>& tokens,
    const std::string& option,
    bool init_weights = true) {
  const c10::InferenceMode off(false);
  torch::NoGradGuard no_grad;
  const auto [low, high] = std::minmax_element(tokens.begin(), tokens.end());
  TORCH_CHECK_INDEX(
      *low >= 0 && *high < weight.size(0),
      "peft: ",
      option,
      " go from ",
      *low,
      " to ",
      *high,
      ", and '",
      path,
      "' has the rows 0 to ",
      weight.size(0) - 1);
  const Tensor rows = torch::tensor(tokens, torch::kLong);
  const Tensor start = init_weights
      ? base(weight).index_select(0, rows.to(weight.device()))
      : torch::randn({rows.numel(), weight.size(1)}, weight.scalar_type());
  return std::make_shared<TrainableTokensDelta>(
      TrainableTokensDelta::Config{rows},
      TrainableTokensDelta::NamedTensors{
          {"trainable_tokens_delta",
           parameter_for(weight, start.detach().clone())}},
      false);
}

/// token_embeddings(), of which there must be one for `option`.
inline std::vector<std::string> some_token_embeddings(
    const Network& network,
    const std::string& option) {
  auto names = token_embeddings(network);
  TORCH_CHECK(
      !names.empty(),
      "peft: ",
      option,
      ": no embedding of this network has one of the usual names "
      "(embed_tokens, word_embeddings, wte, shared); name the one that is "
      "meant.",
      near_misses(network, "embed_tokens"));
  return names;
}

/// LoRA's trainable_token_indices: modules ("": the embedding of tokens) and
/// their rows. Where an embedding and a head are tied, the embedding's name is
/// the one in a file.
inline void plan_token_rows(
    const std::vector<std::pair<std::string, std::vector<int64_t>>>& wanted,
    const Network& network,
    const std::vector<std::string>& modules_to_save,
    std::vector<PlannedSite>& sites) {
  const std::string option = "trainable_token_indices";
  std::vector<std::pair<const Layer*, const std::vector<int64_t>*>> tables;
  for (const auto& [wanted_name, tokens] : wanted) {
    check_tokens(tokens, option);
    const std::string name = wanted_name.empty()
        ? some_token_embeddings(network, option).front()
        : wanted_name;
    const size_t before = tables.size();
    for (const auto& layer : network) {
      if (Targets::name_matches(layer.name, name)) {
        tables.emplace_back(&layer, &tokens);
      }
    }
    TORCH_CHECK(
        tables.size() > before,
        "peft: ",
        option,
        " entry '",
        name,
        "' matches no module of this network.",
        near_misses(network, name));
  }
  std::stable_partition(tables.begin(), tables.end(), [](const auto& table) {
    return table.first->kind == LayerKind::embedding;
  });
  for (const auto& [layer, tokens] : tables) {
    const Tensor weight = layer->parameter("weight");
    const std::string path = layer->path("weight");
    TORCH_CHECK(
        layer->refusal.empty() && weight.defined() &&
            (layer->kind == LayerKind::embedding ||
             layer->kind == LayerKind::linear),
        "peft: ",
        option,
        " takes embeddings and heads; '",
        layer->name,
        "' is a ",
        layer->type,
        layer->refusal.empty() ? "" : ": " + layer->refusal);
    TORCH_CHECK(
        !is_inside(layer->name, modules_to_save),
        "peft: ",
        option,
        " names '",
        layer->name,
        "', which modules_to_save trains whole; name it in one of the two");
    bool is_planned = false; // as the table that it is tied to
    for (const auto& site : sites) {
      if (!is_tied(site.tensor, weight)) {
        continue;
      }
      const auto* rows =
          dynamic_cast<const TrainableTokensDelta*>(site.delta.get());
      TORCH_CHECK(
          rows != nullptr &&
              at::equal(
                  rows->config().tokens, torch::tensor(*tokens, at::kLong)),
          "peft: ",
          option,
          " names '",
          layer->name,
          "', whose weight is adapted as '",
          site.parameter,
          "' in another way; leave it out there, or name the same rows");
      is_planned = true;
    }
    if (is_planned) {
      continue;
    }
    check_adaptable(weight, path);
    sites.push_back(
        {layer->name,
         path,
         layer->path("token_adapter"),
         weight,
         make_tokens_delta(weight, path, *tokens, option)});
  }
}

/// Whether the rows of a table tied to others move those too, as in HF PEFT:
/// where the table is an embedding.
inline bool moves_tied_rows(const PlannedSite& site, const Network& network) {
  return dynamic_cast<const TrainableTokensDelta*>(site.delta.get()) !=
      nullptr &&
      std::any_of(network.begin(), network.end(), [&](const Layer& layer) {
           return layer.name == site.name && layer.kind == LayerKind::embedding;
         });
}

inline Plan plan(
    const TrainableTokensOptions& options,
    const Network& network) {
  const std::string option = "token_indices";
  check_tokens(options.token_indices(), option);
  TrainableTokensOptions here = options;
  if (options.targets().empty()) {
    here.targets(Targets(some_token_embeddings(network, option).front()));
  }
  Plan result;
  result.method = "TRAINABLE_TOKENS";
  result.options = here;
  result.sites = plan_tuner(
      here,
      network,
      {"TrainableTokens", false, /*embeddings=*/true},
      [&](const TunerWeight& w) {
        return make_tokens_delta(
            w.weight,
            w.path,
            options.token_indices(),
            option,
            options.init_weights());
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
