#pragma once

// The output layer of a language model, hidden states -> logits, whose weight
// can be the token embedding's (Press & Wolf 2016, arXiv:1608.05859).

#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cstdint>

namespace peft::models {

/// A Linear without bias. A tied one is no part of an archive, as Hugging
/// Face's files leave it out; to the library it is the embedding's weight under
/// a second name. A clone must be tied again.
struct LmHeadImpl : torch::nn::LinearImpl {
  LmHeadImpl(int64_t hidden_size, int64_t vocab_size)
      : torch::nn::LinearImpl(
            torch::nn::LinearOptions(hidden_size, vocab_size).bias(false)) {}

  /// Uses `table` `[vocab, hidden]` as the weight from now on.
  void tie(const torch::Tensor& table) {
    // The register keeps an empty tensor: an optimizer over parameters() must
    // not step the shared one twice.
    auto registered = *named_parameters(/*recurse=*/false).find("weight");
    registered.set_requires_grad(false);
    registered.set_data(
        torch::empty({0}, table.options().requires_grad(false)));
    weight = table;
    is_tied = true;
  }

  bool is_serializable() const override {
    return !is_tied;
  }

  bool is_tied = false;
};
TORCH_MODULE(LmHead);

} // namespace peft::models
