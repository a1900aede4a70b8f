#pragma once

/// What an adapter could disturb in a model, to compare before and after.

#include "test.h"

#include <string>
#include <vector>

/// A photograph of a model: its modules, its parameters and buffers with their
/// bits, identities, flags and tags.
struct ModelState {
  struct Entry {
    std::string name;
    const void* tensor;
    torch::Tensor value;
    bool requires_grad;
    bool adapted;
  };
  std::vector<std::string> modules; // name and mode
  std::vector<Entry> tensors;
};

inline ModelState state_of(const torch::nn::Module& model) {
  torch::NoGradGuard no_grad;
  ModelState state;
  state.modules.push_back(model.is_training() ? "train" : "eval");
  const auto modules = model.named_modules("", /*include_self=*/false);
  for (const auto& item : modules) {
    state.modules.push_back(
        item.key() + (item.value()->is_training() ? " train" : " eval"));
  }
  for (const auto& items : {model.named_parameters(), model.named_buffers()}) {
    for (const auto& item : items) {
      const auto& t = item.value();
      state.tensors.push_back(
          {item.key(),
           t.unsafeGetTensorImpl(),
           peft::base(t).detach().clone(),
           t.requires_grad(),
           peft::is_adapted(t)});
    }
  }
  return state;
}

/// Whether two photographs show the same: structure, bits, identities, flags.
inline Comparison same_state(const ModelState& a, const ModelState& b) {
  if (a.modules != b.modules) {
    return {false, "the modules differ"};
  }
  if (a.tensors.size() != b.tensors.size()) {
    return {false, "the number of tensors differs"};
  }
  for (size_t i = 0; i < a.tensors.size(); ++i) {
    const auto &x = a.tensors[i], &y = b.tensors[i];
    if (x.name != y.name || x.tensor != y.tensor) {
      return {false, x.name + " is no longer that tensor, but " + y.name};
    }
    if (x.requires_grad != y.requires_grad || x.adapted != y.adapted) {
      return {false, x.name + " differs in requires_grad or in its tag"};
    }
    const auto bits = equal_bits(x.value, y.value);
    if (!bits) {
      return {false, x.name + ": " + bits.message};
    }
  }
  return {true, "the same"};
}

/// Gives an adapter values that act, repeatably.
inline void randomise(const peft::Adapter& adapter, uint64_t number = 7) {
  torch::NoGradGuard no_grad;
  torch::manual_seed(number);
  for (auto& p : adapter.parameters()) {
    p.normal_(0, 0.3);
  }
}
