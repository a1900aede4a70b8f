#pragma once

/// The networks of golden/tiny_models.py, built and called by name.

#include "decoders.h"

#include <peft/io/base_weights.h>
#include <peft/models/bert.h>
#include <peft/models/t5.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>

namespace tiny_models {

using torch::Tensor;
using Tensors = std::map<std::string, Tensor>;

/// A module and how to call it with the tensors of a golden file.
struct Network {
  std::shared_ptr<torch::nn::Module> module;
  /// Logits (RoBERTa: hidden states) of input_ids, attention_mask and, where
  /// they are given, position_ids or token_type_ids.
  std::function<Tensor(const Tensors&)> run;
  /// The loss that transformers' model returns for `labels`.
  std::function<Tensor(const Tensor& output, const Tensors&)> loss;
  /// Greedy tokens behind input_ids and attention_mask, `[batch, count]`.
  std::function<Tensor(const Tensors&, int64_t count)> generate;
};

inline Tensor get(const Tensors& call, const std::string& name) {
  const auto found = call.find(name);
  return found == call.end() ? Tensor() : found->second;
}

/// Zero where the query is padding, as the golden files have it; what a prompt
/// put in front is no padding.
inline Tensor forget_padding(const Tensor& output, const Tensor& mask) {
  const auto front = output.size(1) - mask.size(1);
  return output * at::constant_pad_nd(mask, {front, 0}, 1).unsqueeze(-1);
}

inline peft::models::BertOptions encoder_options() {
  return peft::models::BertOptions()
      .vocab_size(48)
      .hidden_size(16)
      .num_hidden_layers(2)
      .num_attention_heads(4)
      .intermediate_size(24)
      .max_position_embeddings(32)
      .hidden_dropout_prob(0)
      .attention_probs_dropout_prob(0);
}

inline Network bert() {
  peft::models::BertForSequenceClassification model(
      encoder_options().num_labels(3));
  Network result{model.ptr(), {}, {}, {}};
  result.run = [model](const Tensors& call) mutable {
    const auto types = get(call, "token_type_ids");
    if (!types.defined()) {
      return model->forward(call.at("input_ids"), call.at("attention_mask"));
    }
    const auto hidden = model->bert->forward(
        call.at("input_ids"), call.at("attention_mask"), types);
    return model->classifier->forward(model->bert->pooler->forward(hidden));
  };
  result.loss = [](const Tensor& output, const Tensors& call) {
    return torch::nn::functional::cross_entropy(output, call.at("labels"));
  };
  return result;
}

inline Network roberta() {
  peft::models::BertModel model(encoder_options()
                                    .type_vocab_size(1)
                                    .pad_token_id(1)
                                    .layer_norm_eps(1e-5)
                                    .roberta_positions(true)
                                    .add_pooling_layer(false));
  Network result{model.ptr(), {}, {}, {}};
  result.run = [model](const Tensors& call) mutable {
    const auto mask = call.at("attention_mask");
    return forget_padding(model->forward(call.at("input_ids"), mask), mask);
  };
  result.loss = [](const Tensor& output, const Tensors& /*call*/) {
    return output.pow(2).mean();
  };
  return result;
}

/// GPT-2 or LLaMA.
template <class Decoder>
Network decoder() {
  typename Decoder::Model model(Decoder::options());
  Network result{model.ptr(), {}, {}, {}};
  result.run = [model](const Tensors& call) mutable {
    const auto mask = call.at("attention_mask");
    return forget_padding(
        model->forward(call.at("input_ids"), mask, get(call, "position_ids")),
        mask);
  };
  result.loss = [](const Tensor& output, const Tensors& call) {
    return decoders::next_token_loss(
        output, peft::extend_labels(call.at("labels"), output));
  };
  result.generate = [model](const Tensors& call, int64_t count) {
    const auto options =
        peft::models::GenerationOptions().max_new_tokens(count);
    return peft::models::generate(
               model,
               call.at("input_ids"),
               get(call, "attention_mask"),
               options)
        .slice(1, -count);
  };
  return result;
}

inline Network t5(const peft::models::T5Options& options) {
  peft::models::T5ForConditionalGeneration model(options);
  Network result{model.ptr(), {}, {}, {}};
  result.run = [model](const Tensors& call) mutable {
    const auto mask = call.at("decoder_attention_mask");
    return forget_padding(
        model->forward(
            call.at("input_ids"),
            call.at("attention_mask"),
            call.at("decoder_input_ids"),
            mask),
        mask);
  };
  result.loss = [](const Tensor& output, const Tensors& call) {
    return torch::nn::functional::cross_entropy(
        output.flatten(0, 1), call.at("labels").flatten());
  };
  result.generate = [model](const Tensors& call, int64_t count) {
    return peft::models::generate(
               model,
               call.at("input_ids"),
               call.at("attention_mask"),
               peft::models::GenerationOptions().max_new_tokens(count))
        .slice(1, 1);
  };
  return result;
}

inline peft::models::T5Options t5_options() {
  return peft::models::T5Options()
      .vocab_size(48)
      .d_model(16)
      .d_kv(6)
      .d_ff(24)
      .num_layers(2)
      .num_heads(4)
      .relative_attention_num_buckets(8)
      .relative_attention_max_distance(12)
      .dropout_rate(0);
}

/// A network without its weights; `name` is a folder of data/models.
inline Network build(const std::string& name) {
  const std::map<std::string, std::function<Network()>> builders{
      {"bert", bert},
      {"roberta", roberta},
      {"gpt2", decoder<decoders::Gpt2>},
      {"llama", decoder<decoders::Llama>},
      {"t5_v1_0", [] { return t5(t5_options()); }},
      {"t5_v1_1",
       [] {
         return t5(t5_options()
                       .feed_forward_proj("gated-gelu")
                       .tie_word_embeddings(false));
       }},
      {"t5_deep",
       [] {
         return t5(
             t5_options().d_model(8).d_kv(4).num_heads(2).d_ff(12).num_layers(
                 3));
       }},
  };
  return builders.at(name)();
}

/// With the weights of data/models, in eval mode.
inline Network load(const std::string& name) {
  auto result = build(name);
  peft::load_base(*result.module, golden("models/" + name));
  result.module->eval();
  return result;
}

} // namespace tiny_models
