#pragma once

// What prefix tuning (methods/prefix.h) can be told.

#include <peft/core/extra_tokens.h>

#include <torch/arg.h>

#include <optional>
#include <string>
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

} // namespace peft
