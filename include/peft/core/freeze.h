#pragma once

#include <peft/core/network.h>

#include <torch/nn/module.h>

#include <vector>

namespace peft {

/// Freezes the network itself; adapters keep training. attach does this.
inline void freeze(torch::nn::Module& model) {
  for (auto& item : detail::base_parameters(model)) {
    if (item.second.is_leaf() && item.second.requires_grad()) {
      item.second.set_requires_grad(false);
    }
  }
}

/// Every tensor below `model` that trains, each once.
inline std::vector<Tensor> trainable_parameters(
    const torch::nn::Module& model) {
  std::vector<Tensor> result;
  for (const auto& p : model.parameters()) {
    bool seen = !p.requires_grad();
    for (const auto& other : result) {
      seen = seen || other.is_same(p);
    }
    if (!seen) {
      result.push_back(p);
    }
  }
  return result;
}

} // namespace peft
