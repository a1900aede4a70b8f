#pragma once

// LoRA: Low-Rank Adaptation (Hu et al. 2021, arXiv:2106.09685).
//
//   W' = W + s · B A,   A [r, in],  B [out, r],  s = alpha / r
//
// A is Gaussian and B zero at the start, so the network starts as it was.
// rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) takes s = alpha / √r. DoRA, with
// a magnitude for each output, is an option: dora(true).

#include <peft/methods/lora/options.h> // LoraOptions
#include <peft/functional/lora.h> // the formula on tensors
#include <peft/methods/lora/delta.h> // A and B at one weight
#include <peft/methods/lora/init.h> // what they start as: PiSSA, OLoRA
#include <peft/methods/lora/dora.h> // and a magnitude for each output
#include <peft/methods/lora/variants.h> // KaSA, BD-LoRA, MonteCLoRA ...
#include <peft/methods/lora/placement.h> // which weights
#include <peft/methods/lora/layer.h> // Lora<torch::nn::Linear>

#include <string>

namespace peft {

/// Puts LoRA on the targets of `model`, whose source nobody changes, freezes
/// everything else, and returns the handle. All or nothing: an error leaves the
/// model as it was.
inline Adapter attach(
    torch::nn::Module& model,
    const LoraOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
