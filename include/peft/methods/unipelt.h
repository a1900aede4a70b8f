#pragma once

// UniPELT (Mao et al. 2022, arXiv:2110.07577): LoRA, a prefix and a bottleneck
// adapter at once, each with a gate that learns for which examples it helps.
//
//   W x + G · B A x             on query and value
//   [G · P_K; K], [G · P_V; V]  in every attention
//   LN(v + G · A(LN(v)))        behind every feed-forward
//
//   G = mean over tokens of σ(w·x + c)   one number an example, w and c at each
//                                        place (methods/decorated.h)
//
// For L layers of width d the gates are 4 L (d + 1) parameters. No part of it
// merges: the gates depend on the input.

#include <peft/methods/bitfit.h>
#include <peft/methods/decorated.h>
#include <peft/methods/lora.h>
#include <peft/methods/pfeiffer.h>
#include <peft/methods/prefix.h>
#include <peft/methods/union.h>

#include <optional>
#include <string>
#include <vector>

namespace peft {

/// Options for UniPELT; the defaults are those of the paper's code, except that
/// gates pass over padding. A part set to std::nullopt is left out.
///
///   peft::UniPeltOptions().modules_to_save({"classifier"})
///   peft::UniPeltOptions().prefix(std::nullopt)       two of the three
///   peft::UniPeltOptions().bitfit(peft::BitFitOptions())
///       .bitfit_gate(peft::ScaleOptions(1).learned(true))
struct UniPeltOptions {
  /// The gate stands in place of α / r, so these are equal; adapter-hub has
  /// both, with LoraOptions(8).alpha(2).
  TORCH_ARG(std::optional<LoraOptions>, lora) = LoraOptions(8).alpha(8);
  /// In every attention, unless its stacks are named.
  TORCH_ARG(std::optional<PrefixOptions>, prefix) =
      PrefixOptions(10).prefix_projection(true).encoder_hidden_size(512);
  TORCH_ARG(std::optional<PfeifferOptions>, adapter) = PfeifferOptions();
  /// Biases that train beside the others, without a gate, as published.
  TORCH_ARG(std::optional<BitFitOptions>, bitfit);
  /// A number g for each of them, b + g (b' - b), learned with
  /// ScaleOptions(1).learned(true). A gate G(x) has no place there: a bias
  /// meets no input.
  TORCH_ARG(std::optional<ScaleOptions>, bitfit_gate);
  /// std::nullopt: the parts without gates.
  TORCH_ARG(std::optional<GateOptions>, gate) = GateOptions();
  /// Modules trained whole, beside the parts: a task head.
  TORCH_ARG(std::vector<std::string>, modules_to_save);
};

namespace detail {

inline Plan plan(const UniPeltOptions& options, const Network& network) {
  const auto& heads = options.modules_to_save();
  Plan result;
  result.method = "UNIPELT";
  const auto add = [&](const std::string& key, const auto& part) {
    const auto own = with_heads(part, heads);
    join(
        result,
        options.gate() ? plan(Gated(own, *options.gate()), network)
                       : plan(own, network),
        key);
  };
  if (options.lora()) {
    add("lora", *options.lora());
  }
  if (options.prefix()) {
    add("prefix", in_every_stack(*options.prefix(), network));
  }
  if (options.adapter()) {
    add("adapter", *options.adapter());
  }
  if (options.bitfit()) {
    const auto own = with_heads(*options.bitfit(), heads);
    join(
        result,
        options.bitfit_gate()
            ? plan(Scaled(own, *options.bitfit_gate()), network)
            : plan(own, network),
        "bitfit");
  }
  TORCH_CHECK_VALUE(
      options.bitfit() || !options.bitfit_gate(),
      "peft: UniPELT's bitfit_gate is for the biases of bitfit, which is left "
      "out; give bitfit(BitFitOptions()) too");
  TORCH_CHECK_VALUE(
      !result.sites.empty(),
      "peft: UniPELT has no part left; give one of lora, prefix, adapter and "
      "bitfit");
  return result;
}

} // namespace detail

/// Puts UniPELT on `model` and freezes everything else. The network gives
/// places for the prefix, as for PrefixOptions, and hands the input of each
/// attention over (KeyValues::update).
inline Adapter attach(
    torch::nn::Module& model,
    const UniPeltOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
