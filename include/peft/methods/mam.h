#pragma once

// The MAM adapter (He et al. 2022, arXiv:2110.04366), "mix and match": a short
// prefix in every attention and a scaled parallel adapter beside every
// feed-forward.
//
//   attention(q, [P_K; K], [P_V; V])     FFN(x) + s · up relu(down x)
//
// With L layers of width d, a prefix of l and a bottleneck of r, what is kept
// are 2 L l d + L (2 d r + r + d) parameters; the MLP that makes the prefix
// trains beside them and is dropped by eject_reparameterization().

#include <peft/methods/parallel_adapter.h>
#include <peft/methods/prefix.h>
#include <peft/methods/union.h>

#include <string>
#include <vector>

namespace peft {

/// Options for MAM adapters; the defaults are those of the paper's code for
/// XSum.
///
///   peft::MamOptions()
///   peft::MamOptions::glue().modules_to_save({"classifier"})
///   peft::MamOptions().adapter(peft::ParallelAdapterOptions(64))
struct MamOptions {
  /// The paper's code for GLUE: l 16, r 16, s 2.
  static MamOptions glue() {
    return MamOptions()
        .prefix(
            PrefixOptions(16).prefix_projection(true).encoder_hidden_size(800))
        .adapter(ParallelAdapterOptions(16).scaling(2));
  }

  /// In every attention, unless its stacks are named: an encoder's, a
  /// decoder's, and the one between them.
  TORCH_ARG(PrefixOptions, prefix) =
      PrefixOptions(30).prefix_projection(true).encoder_hidden_size(800);
  TORCH_ARG(ParallelAdapterOptions, adapter) = ParallelAdapterOptions(512);
  /// Modules trained whole, beside the two: a task head.
  TORCH_ARG(std::vector<std::string>, modules_to_save);
};

namespace detail {

inline Plan plan(const MamOptions& options, const Network& network) {
  const auto& heads = options.modules_to_save();
  Plan result;
  result.method = "MAM";
  join(
      result,
      plan(
          with_heads(in_every_stack(options.prefix(), network), heads),
          network));
  join(result, plan(with_heads(options.adapter(), heads), network));
  return result;
}

} // namespace detail

/// Puts a MAM adapter on `model` and freezes everything else. The network gives
/// places for the prefix, as for PrefixOptions.
inline Adapter attach(
    torch::nn::Module& model,
    const MamOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
