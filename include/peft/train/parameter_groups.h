#pragma once

// LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B learns `ratio` times as fast
// as A, because A's and B's gradients differ by the width of the network. The
// groups are those of HF PEFT's create_loraplus_optimizer.

#include <peft/core/adapter.h>

#include <torch/nn/modules/normalization.h>
#include <torch/optim/adamw.h>
#include <torch/optim/optimizer.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for lora_plus_groups, under the names of HF's.
struct LoraPlusOptions {
  /// HF's loraplus_lr_ratio: the rate of B over that of A, at least 1.
  TORCH_ARG(double, ratio) = 16;
  /// HF's loraplus_weight_decay: of everything but biases and LayerNorms.
  TORCH_ARG(double, weight_decay) = 0;
  /// HF's loraplus_lr_embedding: the rate of an embedding's A and B.
  TORCH_ARG(double, lr_embedding) = 1e-6;
};

namespace detail {

inline void check(const LoraPlusOptions& options, double lr) {
  for (const auto& [name, value] : std::vector<std::pair<const char*, double>>{
           {"lr", lr},
           {"ratio", options.ratio()},
           {"weight_decay", options.weight_decay()},
           {"lr_embedding", options.lr_embedding()}}) {
    const bool is_ratio = std::string(name) == "ratio";
    TORCH_CHECK_VALUE(
        std::isfinite(value) && value >= (is_ratio ? 1.0 : 0.0),
        "peft: LoRA+ needs ",
        is_ratio ? "a ratio of at least 1" : name,
        is_ratio ? "" : " to be finite and not negative",
        ", got ",
        value);
  }
}

/// Paths of the parameters of the LayerNorms of the network under `adapter`.
/// (TorchScript's have no types left.)
inline std::vector<std::string> layer_norm_parameters(
    const AdapterState& adapter) {
  std::vector<std::string> result;
  const auto registry =
      std::dynamic_pointer_cast<Registry>(adapter.registry.lock());
  if (registry) {
    walk(*registry->host, "", [&](const std::string& path, const auto& module) {
      if (dynamic_cast<const torch::nn::LayerNormImpl*>(&module)) {
        for (const auto& item : module.named_parameters(false)) {
          result.push_back(path.empty() ? item.key() : path + "." + item.key());
        }
      }
    });
  }
  return result;
}

} // namespace detail

/// The trained tensors of a LoRA adapter in LoRA+'s groups, for any optimizer
/// of torch::optim:
///
///   torch::optim::AdamW optimizer(peft::lora_plus_groups(
///       adapter, 1e-4, peft::LoraPlusOptions().ratio(16)));
///   torch::optim::SGD optimizer(
///       peft::lora_plus_groups(
///           adapter, 1e-2, {}, torch::optim::SGDOptions(0).momentum(0.9)),
///       torch::optim::SGDOptions(0));
///
/// Each group is a copy of `like` with its own rate and weight decay:
///
///   A, and trained copies of matrices       lr            weight_decay
///   an embedding's A and B                  lr_embedding  weight_decay
///   B, and all vectors (DoRA's magnitude)   lr · ratio    weight_decay
///   biases and LayerNorms                   lr · ratio    0
///
/// Groups without a tensor are left out; so is what does not require gradients.
template <class Options = torch::optim::AdamWOptions>
std::vector<torch::optim::OptimizerParamGroup> lora_plus_groups(
    const Adapter& adapter,
    double lr,
    const LoraPlusOptions& options = {},
    const Options& like = Options(0)) {
  detail::check(options, lr);
  const auto names = adapter.named_parameters();
  const auto has = [](const std::string& name, const char* part) {
    return name.find(part) != std::string::npos;
  };
  TORCH_CHECK(
      std::any_of(
          names.begin(),
          names.end(),
          [&](const auto& item) {
            return has(item.key(), "lora_B") ||
                has(item.key(), "lora_embedding_B");
          }),
      "peft: LoRA+ gives A and B of LoRA rates of their own, and adapter '",
      adapter.name(),
      "' (",
      adapter.method(),
      ") has none; use adapter.parameters()");
  const auto norms = detail::layer_norm_parameters(*adapter.shared_state());
  std::vector<Tensor> A, embedding, B, undecayed;
  for (const auto& item : names) {
    const std::string& name = item.key();
    const Tensor& p = item.value();
    if (!p.requires_grad()) {
      continue;
    }
    if (has(name, "lora_embedding_")) {
      embedding.push_back(p);
    } else if (!has(name, "lora_B") && p.dim() != 1) {
      A.push_back(p);
    } else if (
        has(name, "bias") ||
        std::find(norms.begin(), norms.end(), name) != norms.end()) {
      undecayed.push_back(p);
    } else {
      B.push_back(p);
    }
  }
  std::vector<torch::optim::OptimizerParamGroup> groups;
  const auto add = [&](std::vector<Tensor> tensors, double rate, double decay) {
    if (!tensors.empty()) {
      auto own = std::make_unique<Options>(like);
      own->lr(rate).weight_decay(decay);
      groups.emplace_back(std::move(tensors), std::move(own));
    }
  };
  add(std::move(A), lr, options.weight_decay());
  add(std::move(embedding), options.lr_embedding(), options.weight_decay());
  add(std::move(B), lr * options.ratio(), options.weight_decay());
  add(std::move(undecayed), lr * options.ratio(), 0.0);
  TORCH_CHECK(
      !groups.empty(),
      "peft: nothing of adapter '",
      adapter.name(),
      "' requires gradients; call set_trainable(true)");
  return groups;
}

} // namespace peft
