#pragma once

/// The tiny causal decoders of golden/tiny_models.py, each as a type that tests
/// written for both are instantiated with.

#include "test.h"

#include <peft/io/base_weights.h>
#include <peft/io/safetensors.h>
#include <peft/models/gpt2.h>
#include <peft/models/llama.h>

#include <map>
#include <string>
#include <utility>

namespace decoders {

using torch::Tensor;
using Tensors = std::map<std::string, Tensor>;

struct Gpt2 {
  using Model = peft::models::Gpt2ForCausalLM;
  using Block = peft::models::Gpt2BlockImpl;
  static constexpr const char* name = "gpt2";

  static peft::models::Gpt2Options options() {
    return peft::models::Gpt2Options()
        .vocab_size(48)
        .n_positions(32)
        .n_embd(16)
        .n_layer(2)
        .n_head(4)
        .resid_pdrop(0)
        .embd_pdrop(0)
        .attn_pdrop(0);
  }
  static peft::models::Gpt2Model& base(Model& model) {
    return model->transformer;
  }
  static Tensor embed(Model& model, const Tensor& ids) {
    return model->transformer->wte->forward(ids);
  }
  /// LoRA that acts at once.
  static peft::LoraOptions lora() {
    return peft::LoraOptions(2)
        .alpha(4)
        .init("random")
        .targets({"c_attn"})
        .fan_in_fan_out(true);
  }
};

struct Llama {
  using Model = peft::models::LlamaForCausalLM;
  using Block = peft::models::LlamaDecoderLayerImpl;
  static constexpr const char* name = "llama";

  static peft::models::LlamaOptions options() {
    return peft::models::LlamaOptions()
        .vocab_size(48)
        .hidden_size(16)
        .intermediate_size(24)
        .num_hidden_layers(2)
        .num_attention_heads(4)
        .num_key_value_heads(2)
        .pad_token_id(0);
  }
  static peft::models::LlamaModel& base(Model& model) {
    return model->model;
  }
  static Tensor embed(Model& model, const Tensor& ids) {
    return model->model->embed_tokens->forward(ids);
  }
  static peft::LoraOptions lora() {
    return peft::LoraOptions(2).alpha(4).init("random").targets(
        {"q_proj", "v_proj"});
  }
};

/// With transformers' weights, in eval mode.
template <class Decoder>
typename Decoder::Model load() {
  typename Decoder::Model model(Decoder::options());
  peft::load_base(*model, golden(std::string("models/") + Decoder::name));
  model->eval();
  return model;
}

/// What transformers computed with these weights.
template <class Decoder>
Tensors reference() {
  return peft::load_safetensors(golden(
      std::string("models/") + Decoder::name + "/reference.safetensors"));
}

/// The fixtures hold zeros where a query is padding.
inline Tensor without_padding(const Tensor& output, const Tensor& mask) {
  return output * mask.unsqueeze(-1);
}

/// What transformers computed, to the rounding of another order of the sums.
inline Comparison agrees(const Tensor& ours, const Tensor& theirs) {
  return close(ours, theirs, 1e-5, 1e-5);
}

/// LoRA's A and B at the module `path`; undefined where there are none.
inline std::pair<Tensor, Tensor> factors_at(
    const peft::Adapter& adapter,
    const std::string& path) {
  std::pair<Tensor, Tensor> factors;
  for (const auto& item : adapter.named_parameters()) {
    if (contains(item.key(), path + ".")) {
      (contains(item.key(), "lora_A") ? factors.first : factors.second) =
          item.value();
    }
  }
  return factors;
}

/// The mean cross entropy of each token's logits with the next label.
inline Tensor next_token_loss(const Tensor& logits, const Tensor& labels) {
  const auto length = labels.size(1) - 1;
  return torch::nn::functional::cross_entropy(
      logits.narrow(1, 0, length).flatten(0, 1),
      labels.narrow(1, 1, length).flatten());
}

} // namespace decoders
