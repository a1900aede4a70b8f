#pragma once

#include <peft/core/targets.h>
#include <peft/methods/lora/bd_lora.h>
#include <peft/methods/lora/kasa.h>
#include <peft/methods/lora/monteclora.h>
#include <peft/methods/lora/velora.h>

#include <torch/arg.h>

#include <cmath>
#include <initializer_list>
#include <optional>
#include <regex>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// HF's trainable_token_indices: rows of an embedding that train beside LoRA.
///
///   {30522, 30523}                       of the network's embedding of tokens
///   {{"wte", {7}}, {"lm_head", {7, 9}}}  of the modules whose names end so
struct TokenIndices {
  using Entry = std::pair<std::string, std::vector<int64_t>>;

  TokenIndices() = default;
  TokenIndices(std::vector<int64_t> tokens)
      : entries{{std::string(), std::move(tokens)}} {}
  TokenIndices(std::initializer_list<int64_t> tokens)
      : TokenIndices(std::vector<int64_t>(tokens)) {}
  TokenIndices(std::vector<Entry> by_module) : entries(std::move(by_module)) {}
  TokenIndices(std::initializer_list<Entry> by_module) : entries(by_module) {}

  /// The name is empty where the embedding of tokens is meant.
  std::vector<Entry> entries;
};

/// Options for LoRA.
///
///   peft::LoraOptions(8).alpha(16).dropout(0.05).targets({"query", "value"})
struct LoraOptions {
  using Pattern = std::vector<std::pair<std::string, double>>;

  LoraOptions(int64_t r = 8) : r_(r) {
    TORCH_CHECK_VALUE(r > 0, "peft: r must be positive, got ", r);
  }

  /// Rank.
  TORCH_ARG(int64_t, r);
  /// HF's lora_alpha: the update is scaled by alpha / r.
  TORCH_ARG(double, alpha) = 8;
  /// HF's lora_dropout: on x, before A, in training mode.
  TORCH_ARG(double, dropout) = 0;
  /// HF's target_modules. Default: the query and value projections.
  TORCH_ARG(Targets, targets);
  /// HF's exclude_modules: taken out of the targets.
  TORCH_ARG(Targets, exclude);
  /// HF's rank_pattern, alpha_pattern: for names that end in the pattern (a
  /// regular expression) this r, this alpha; the first match counts.
  TORCH_ARG(Pattern, rank_pattern);
  TORCH_ARG(Pattern, alpha_pattern);
  /// HF's layers_to_transform: only these indices of a stack of layers, and
  /// layers_pattern: the name of the stack ("layers") where there are several.
  TORCH_ARG(std::vector<int64_t>, layers);
  TORCH_ARG(std::vector<std::string>, layers_pattern);
  /// HF's use_rslora.
  TORCH_ARG(bool, rslora) = false;
  /// HF's use_dora: a trained magnitude for each output beside the direction
  /// W + s · B A (methods/lora/dora.h).
  TORCH_ARG(bool, dora) = false;
  /// How A and B start: "gaussian" (A ~ N(0, 1/r²), B = 0), "kaiming" (HF's
  /// default: A uniform in ±1/√in, B = 0), or "random" (HF's
  /// init_lora_weights=false: B is not zero, so the adapter acts at once).
  /// "pissa", "pissa_niter_16" (any number), "olora" and "orthogonal" are for
  /// matrices (methods/lora/init.h); embeddings start as ever under them.
  TORCH_ARG(std::string, init) = "gaussian";
  /// Which biases train too: "none", "lora_only" (those of the targets), "all".
  TORCH_ARG(std::string, bias) = "none";
  /// Modules trained whole, beside the adapter: a task head.
  TORCH_ARG(std::vector<std::string>, modules_to_save);
  /// For packed attention projections: which of q, k, v are adapted, each with
  /// factors of its own (loralib's enable_lora). Empty: all of them, with one
  /// shared A, as HF does; the default targets take q and v.
  TORCH_ARG(std::vector<bool>, enable_lora);
  /// HF's lora_bias: B has a bias too, so the layer's own bias moves as well.
  TORCH_ARG(bool, lora_bias) = false;
  /// Weights of layers that torch::nn does not know are [in, out]; GPT-2's
  /// Conv1D is taken so in any case.
  TORCH_ARG(bool, fan_in_fan_out) = false;
  /// HF's target_parameters: parameters by their own names ("mlp.experts.w1"),
  /// whatever uses them (methods/lora/parameters.h). Alone, without targets, no
  /// other layer is adapted.
  TORCH_ARG(Targets, target_parameters);
  /// Those of three dimensions lie as [experts, in, out], not [experts, out,
  /// in]: the attribute is_transposed of HF's networks (GPT-OSS, Aria).
  TORCH_ARG(bool, parameters_transposed) = false;
  /// HF's trainable_token_indices.
  TORCH_ARG(TokenIndices, trainable_token_indices);
  /// Variants for linear layers, of which one can be chosen. HF's kasa_config
  /// (methods/lora/kasa.h),
  TORCH_ARG(std::optional<KasaOptions>, kasa);
  /// use_bdlora (methods/lora/bd_lora.h),
  TORCH_ARG(std::optional<BdLoraOptions>, bd_lora);
  /// monteclora_config (methods/lora/monteclora.h),
  TORCH_ARG(std::optional<MonteCloraOptions>, monteclora);
  /// and velora_config (methods/lora/velora.h).
  TORCH_ARG(std::optional<VeloraOptions>, velora);
};

namespace detail {

/// PiSSA and OLoRA: A and B start as a part of the weight, which is taken off.
inline bool starts_as_part(const std::string& init) {
  static const std::regex names("pissa(_niter_[0-9]{1,9})?|olora");
  return std::regex_match(init, names);
}

/// What HF PEFT refuses beside target_parameters: a parameter is read by who
/// knows what, so there is no input to drop and no output to add to.
inline void check_target_parameters(const LoraOptions& options) {
  const auto& targets = options.target_parameters();
  if (targets.empty()) {
    return;
  }
  TORCH_CHECK_VALUE(
      targets.kind() == Targets::Kind::list ||
          targets.kind() == Targets::Kind::regex,
      "peft: target_parameters takes names or a regular expression");
  const char* other = options.dropout() > 0.0 ? "dropout"
      : options.lora_bias()                   ? "lora_bias"
      : options.dora()                        ? "dora"
      : options.fan_in_fan_out()              ? "fan_in_fan_out"
                                              : nullptr;
  TORCH_CHECK_VALUE(
      other == nullptr,
      "peft: target_parameters does not go with ",
      other == nullptr ? "" : other,
      ", as in HF PEFT; leave one of the two out, or put the parameters into "
      "an adapter of their own");
  const auto& init = options.init();
  TORCH_CHECK_VALUE(
      init == "gaussian" || init == "kaiming" || init == "random" ||
          init == "empty",
      "peft: parameters start by init 'gaussian', 'kaiming' or 'random', got '",
      init,
      "'");
}

/// The name of the variant that is chosen, for messages; "" for none.
inline std::string variant_of(const LoraOptions& options) {
  return options.kasa()      ? "KaSA"
      : options.bd_lora()    ? "BD-LoRA"
      : options.monteclora() ? "MonteCLoRA"
      : options.velora()     ? "VeLoRA"
                             : "";
}

/// What goes with KaSA, BD-LoRA, MonteCLoRA and VeLoRA, and their own numbers.
inline void check_variant(const LoraOptions& options) {
  const std::string name = variant_of(options);
  if (name.empty()) {
    return;
  }
  const int chosen = (options.kasa() ? 1 : 0) + (options.bd_lora() ? 1 : 0) +
      (options.monteclora() ? 1 : 0) + (options.velora() ? 1 : 0);
  const char* other = chosen > 1                 ? "another variant"
      : options.dora()                           ? "dora"
      : !options.enable_lora().empty()           ? "enable_lora"
      : !options.target_parameters().empty()     ? "target_parameters"
      : options.bd_lora() && options.lora_bias() ? "lora_bias"
                                                 : nullptr;
  TORCH_CHECK_VALUE(
      other == nullptr,
      "peft: ",
      name,
      " does not go with ",
      other == nullptr ? "" : other,
      "; switch one of the two off");
  const auto& init = options.init();
  TORCH_CHECK_VALUE(
      init == "gaussian" || init == "kaiming" || init == "random" ||
          init == "empty",
      "peft: ",
      name,
      " starts by init 'gaussian', 'kaiming' or 'random', got '",
      init,
      "'");
  if (const auto& o = options.kasa()) {
    TORCH_CHECK_VALUE(
        o->beta() >= 0 && o->gamma() >= 0,
        "peft: beta and gamma of KaSA must not be negative, got ",
        o->beta(),
        " and ",
        o->gamma());
  }
  if (const auto& o = options.bd_lora()) {
    TORCH_CHECK_VALUE(
        o->nblocks() > 0, "peft: nblocks must be positive, got ", o->nblocks());
  }
  if (const auto& o = options.monteclora()) {
    TORCH_CHECK_VALUE(
        o->num_samples() > 0 && o->buffer_size() > 0 &&
            o->dirichlet_prior() > 0,
        "peft: num_samples, buffer_size and dirichlet_prior of MonteCLoRA must "
        "be positive, got ",
        o->num_samples(),
        ", ",
        o->buffer_size(),
        " and ",
        o->dirichlet_prior());
  }
  if (const auto& o = options.velora()) {
    TORCH_CHECK_VALUE(
        o->num_groups() > 0 && o->scale() > 0,
        "peft: num_groups and scale of VeLoRA must be positive, got ",
        o->num_groups(),
        " and ",
        o->scale());
    TORCH_CHECK_VALUE(
        o->init_type() == "batch_average" ||
            o->init_type() == "batch_average_once" ||
            o->init_type() == "random",
        "peft: init_type of VeLoRA must be 'batch_average', "
        "'batch_average_once' or 'random', got '",
        o->init_type(),
        "'");
  }
}

inline void check(const LoraOptions& options) {
  TORCH_CHECK_VALUE(
      options.r() > 0, "peft: r must be positive, got ", options.r());
  TORCH_CHECK_VALUE(
      std::isfinite(options.alpha()),
      "peft: alpha must be finite, got ",
      options.alpha());
  TORCH_CHECK_VALUE(
      options.dropout() >= 0.0 && options.dropout() < 1.0,
      "peft: dropout must lie in [0, 1), got ",
      options.dropout());
  for (const auto& [pattern, rank] : options.rank_pattern()) {
    TORCH_CHECK_VALUE(
        rank >= 1 && rank == std::floor(rank),
        "peft: rank_pattern['",
        pattern,
        "'] must be a positive integer, got ",
        rank);
  }
  for (const auto& [pattern, alpha] : options.alpha_pattern()) {
    TORCH_CHECK_VALUE(
        std::isfinite(alpha),
        "peft: alpha_pattern['",
        pattern,
        "'] must be finite, got ",
        alpha);
  }
  for (const auto* patterns :
       {&options.rank_pattern(), &options.alpha_pattern()}) {
    for (const auto& item : *patterns) {
      check_regex(item.first, "rank_pattern or alpha_pattern");
    }
  }
  for (const auto& pattern : options.layers_pattern()) {
    check_regex(pattern, "layers_pattern");
  }
  const auto& init = options.init();
  const bool is_for_matrices = starts_as_part(init) || init == "orthogonal";
  TORCH_CHECK_VALUE(
      init == "gaussian" || init == "kaiming" || init == "random" ||
          init == "empty" || is_for_matrices,
      "peft: init must be 'gaussian', 'kaiming', 'random', 'pissa', "
      "'pissa_niter_<number>', 'olora' or 'orthogonal', got '",
      init,
      "'");
  TORCH_CHECK_VALUE(
      !is_for_matrices || !options.lora_bias(),
      "peft: lora_bias does not go with init '",
      init,
      "' (HF PEFT refuses it too); switch it off or take init 'kaiming'");
  const auto& bias = options.bias();
  TORCH_CHECK_VALUE(
      bias == "none" || bias == "lora_only" || bias == "all",
      "peft: bias must be 'none', 'lora_only' or 'all', got '",
      bias,
      "'");
  TORCH_CHECK_VALUE(
      options.enable_lora().empty() || options.enable_lora().size() == 3,
      "peft: enable_lora names q, k and v: three values, got ",
      options.enable_lora().size());
  TORCH_CHECK_VALUE(
      !options.dora() ||
          (!options.lora_bias() && options.enable_lora().empty()),
      "peft: dora goes with neither lora_bias nor enable_lora (HF PEFT refuses "
      "them too); switch one of the two off");
  TORCH_CHECK_VALUE(
      options.layers_pattern().empty() || !options.layers().empty(),
      "peft: layers_pattern says where layers are counted, and no layers are "
      "given; set layers({...})");
  check_target_parameters(options);
  check_variant(options);
}

/// HF's rule: `name` is, or ends with ".", and the pattern.
inline bool matches_pattern(
    const std::string& pattern,
    const std::string& name) {
  return std::regex_match(name, std::regex("(.*\\.)?(" + pattern + ")"));
}

/// The value of the first pattern that fits `name`, or the default.
inline double pattern_value(
    const LoraOptions::Pattern& patterns,
    const std::string& name,
    double otherwise) {
  for (const auto& [pattern, value] : patterns) {
    if (matches_pattern(pattern, name)) {
      return value;
    }
  }
  return otherwise;
}

/// r and s = alpha / r (or alpha / √r) at a module.
struct LoraScale {
  int64_t r;
  double scaling;
};

inline LoraScale lora_scale(
    const LoraOptions& options,
    const std::string& module) {
  const auto r = static_cast<int64_t>(pattern_value(
      options.rank_pattern(), module, static_cast<double>(options.r())));
  const double alpha =
      pattern_value(options.alpha_pattern(), module, options.alpha());
  return {
      r,
      alpha /
          (options.rslora() ? std::sqrt(static_cast<double>(r))
                            : static_cast<double>(r))};
}

} // namespace detail

} // namespace peft
