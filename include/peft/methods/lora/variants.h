#pragma once

// The variants of LoRA that keep other tensors than A and B as HF PEFT's files
// of LoRA have them: KaSA, BD-LoRA, MonteCLoRA, VeLoRA. All are for matrices of
// linear layers. A and B start as LoRA's.

#include <peft/core/network.h>
#include <peft/methods/lora/bd_lora.h>
#include <peft/methods/lora/init.h>
#include <peft/methods/lora/kasa.h>
#include <peft/methods/lora/monteclora.h>
#include <peft/methods/lora/options.h>
#include <peft/methods/lora/velora.h>

#include <c10/core/InferenceMode.h>

#include <memory>
#include <string>
#include <utility>

namespace peft {

namespace detail {

inline void check_variant_place(
    const LoraOptions& options,
    const Layer& layer,
    const Tensor& weight,
    LoraLayout layout,
    const std::string& path) {
  const bool is_linear = weight.dim() == 2 && layer.parent_attention.empty() &&
      (layer.kind == LayerKind::linear || layer.kind == LayerKind::other);
  const std::string name = variant_of(options);
  TORCH_CHECK_VALUE(
      is_linear,
      "peft: ",
      name,
      " is for linear layers, and '",
      path,
      "' is a ",
      layer.type,
      "'s (HF PEFT refuses it too); leave it out of the targets");
  TORCH_CHECK_VALUE(
      layout == LoraLayout::matrix || options.monteclora() || options.velora(),
      "peft: ",
      name,
      " is for weights [out, in], and '",
      path,
      "' lies as [in, out] (HF PEFT refuses it too); leave it out of the "
      "targets");
}

/// The factor that is block-diagonal: Kaiming's A, B of zeros.
inline Tensor bd_blocks(
    const LoraOptions& options,
    const Tensor& weight,
    bool is_in_a,
    int64_t r,
    const std::string& name) {
  const int64_t n = options.bd_lora()->nblocks();
  const int64_t features = weight.size(is_in_a ? 1 : 0);
  TORCH_CHECK_VALUE(
      features % n == 0 && r % n == 0,
      "peft: nblocks must divide r and the ",
      is_in_a ? "inputs" : "outputs",
      " of '",
      name,
      "': got nblocks = ",
      n,
      ", r = ",
      r,
      " and ",
      features);
  // HF draws it in the base's dtype.
  const auto dtype = torch::TensorOptions(weight.scalar_type());
  Tensor blocks = is_in_a ? torch::zeros({r, features / n}, dtype)
                          : torch::zeros({features, r / n}, dtype);
  if (is_in_a && options.init() != "empty") {
    torch::nn::init::kaiming_uniform_(blocks);
  }
  return blocks;
}

/// The delta of the variant that is chosen, or plain LoRA's where BD-LoRA
/// leaves a layer out. `module` is the layer's name, `path` the parameter's.
inline std::shared_ptr<Delta> make_variant_delta(
    const LoraOptions& options,
    const Tensor& weight,
    LoraLayout layout,
    LoraScale scale,
    const std::string& module,
    const std::string& path) {
  const c10::InferenceMode off(false);
  const torch::NoGradGuard no_grad;
  const bool is_transposed = layout == LoraLayout::transposed;
  const int64_t out = weight.size(is_transposed ? 1 : 0);
  const int64_t in = weight.size(is_transposed ? 0 : 1);
  const int64_t r = scale.r;
  const auto factor = options.bd_lora() ? bd_factor(*options.bd_lora(), module)
                                        : BdFactor::none;
  if (options.bd_lora() && factor == BdFactor::none) {
    return make_lora_delta(options, weight, layout, scale, path);
  }
  const auto [A, B] = lora_init(options, {r, in}, {out, r}, layout, r);
  // As in HF a start has the precision of the weight.
  const auto parameter = [&](const Tensor& start) {
    return start.to(weight.scalar_type())
        .to(torch::TensorOptions(weight.device()).dtype(adapter_dtype(weight)))
        .set_requires_grad(true);
  };
  if (options.kasa()) {
    const auto taken = minor_part(weight_at_start(weight), r, path);
    auto delta = std::make_shared<KasaDelta>(
        KasaDelta::Config{scale.scaling, options.dropout(), *options.kasa()},
        KasaDelta::NamedTensors{
            {"lora_A.weight", parameter(A)},
            {"lora_B.weight", parameter(B)},
            {"lora_diag", parameter(torch::randn({r}))}});
    delta->take_off(taken.first, taken.second);
    return delta;
  }
  if (options.bd_lora()) {
    const bool is_in_a = factor == BdFactor::A;
    const Tensor blocks = bd_blocks(options, weight, is_in_a, r, path);
    return std::make_shared<BdLoraDelta>(
        BdLoraDelta::Config{
            scale.scaling,
            options.dropout(),
            options.bd_lora()->nblocks(),
            is_in_a},
        BdLoraDelta::NamedTensors{
            {"lora_A.weight", parameter(is_in_a ? blocks : A)},
            {"lora_B.weight", parameter(is_in_a ? B : blocks)}});
  }
  if (options.velora()) {
    auto delta = std::make_shared<VeloraDelta>(
        VeloraDelta::Config{
            scale.scaling, options.dropout(), *options.velora()},
        VeloraDelta::NamedTensors{
            {"lora_A.weight", parameter(A)}, {"lora_B.weight", parameter(B)}},
        is_transposed);
    if (options.velora()->init_type() == "random") {
      const int64_t n = options.velora()->num_groups();
      const auto dtype = torch::TensorOptions(weight.scalar_type());
      delta->set_direction(
          velora_direction(torch::randn({(in + n - 1) / n}, dtype)));
    }
    return delta;
  }
  const auto& monteclora = *options.monteclora();
  const auto own = torch::TensorOptions(weight.scalar_type());
  const Tensor std_prior = torch::rand({r}, own);
  const Tensor weights_prior = torch::rand({monteclora.num_samples()}, own);
  auto delta = std::make_shared<MonteCloraDelta>(
      MonteCloraDelta::Config{scale.scaling, options.dropout(), monteclora},
      MonteCloraDelta::NamedTensors{
          {"lora_A.weight", parameter(A)},
          {"lora_B.weight", parameter(B)},
          {"lora_monteclora_sampler.std_prior", parameter(std_prior)},
          {"lora_monteclora_sampler.expert_weights_prior",
           parameter(weights_prior)}},
      is_transposed);
  if (options.init() != "empty") {
    delta->refill();
  }
  return delta;
}

} // namespace detail

} // namespace peft
