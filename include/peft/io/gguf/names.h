#pragma once

// What llama.cpp calls the weights of some architectures, after gguf-py's
// tensor_mapping.py. "#" stands for the number of the layer.

#include <algorithm>
#include <cctype>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

using GgufNames = std::vector<std::pair<std::string, std::string>>;

/// The weights that llama.cpp applies a LoRA to: module of HF → tensor, both
/// without ".weight". Empty for an architecture that is not known.
inline GgufNames gguf_names(const std::string& architecture) {
  if (architecture == "llama" || architecture == "qwen2") {
    return {
        {"model.embed_tokens", "token_embd"},
        {"model.layers.#.self_attn.q_proj", "blk.#.attn_q"},
        {"model.layers.#.self_attn.k_proj", "blk.#.attn_k"},
        {"model.layers.#.self_attn.v_proj", "blk.#.attn_v"},
        {"model.layers.#.self_attn.o_proj", "blk.#.attn_output"},
        {"model.layers.#.mlp.gate_proj", "blk.#.ffn_gate"},
        {"model.layers.#.mlp.up_proj", "blk.#.ffn_up"},
        {"model.layers.#.mlp.down_proj", "blk.#.ffn_down"},
        {"lm_head", "output"}};
  }
  if (architecture == "gpt2") {
    return {
        {"transformer.wte", "token_embd"},
        {"transformer.h.#.attn.c_attn", "blk.#.attn_qkv"},
        {"transformer.h.#.attn.c_proj", "blk.#.attn_output"},
        {"transformer.h.#.mlp.c_fc", "blk.#.ffn_up"},
        {"transformer.h.#.mlp.c_proj", "blk.#.ffn_down"},
        {"lm_head", "output"}};
  }
  if (architecture == "bert") {
    return {
        {"embeddings.word_embeddings", "token_embd"},
        {"encoder.layer.#.attention.self.query", "blk.#.attn_q"},
        {"encoder.layer.#.attention.self.key", "blk.#.attn_k"},
        {"encoder.layer.#.attention.self.value", "blk.#.attn_v"},
        {"encoder.layer.#.attention.output.dense", "blk.#.attn_output"},
        {"encoder.layer.#.intermediate.dense", "blk.#.ffn_up"},
        {"encoder.layer.#.output.dense", "blk.#.ffn_down"}};
  }
  if (architecture == "t5") {
    GgufNames result{
        {"shared", "token_embd"},
        {"encoder.embed_tokens", "token_embd"},
        {"decoder.embed_tokens", "token_embd"},
        {"lm_head", "output"}};
    for (const bool decoder : {false, true}) {
      const std::string from =
          decoder ? "decoder.block.#.layer." : "encoder.block.#.layer.";
      const std::string to = decoder ? "dec.blk.#." : "enc.blk.#.";
      for (const std::string part : {"q", "k", "v", "o"}) {
        result.emplace_back(
            from + "0.SelfAttention." + part, to + "attn_" + part);
        if (decoder) {
          result.emplace_back(
              from + "1.EncDecAttention." + part, to + "cross_attn_" + part);
        }
      }
      const std::string inner =
          from + (decoder ? "2" : "1") + ".DenseReluDense.";
      result.emplace_back(inner + "wi", to + "ffn_up");
      result.emplace_back(inner + "wi_0", to + "ffn_gate");
      result.emplace_back(inner + "wi_1", to + "ffn_up");
      result.emplace_back(inner + "wo", to + "ffn_down");
    }
    return result;
  }
  return {};
}

/// `to` with the number that `module` has at the "#" of `from`; "" where they
/// do not fit.
inline std::string renumbered(
    const std::string& module,
    const std::string& from,
    const std::string& to) {
  const auto hash = from.find('#');
  if (hash == std::string::npos) {
    return module == from ? to : "";
  }
  const std::string tail = from.substr(hash + 1);
  if (module.size() < from.size() ||
      module.compare(0, hash, from, 0, hash) != 0 ||
      module.compare(module.size() - tail.size(), tail.size(), tail) != 0) {
    return "";
  }
  const std::string number =
      module.substr(hash, module.size() - tail.size() - hash);
  const bool digits =
      std::all_of(number.begin(), number.end(), [](unsigned char c) {
        return std::isdigit(c) != 0;
      });
  std::string result = to;
  return digits ? result.replace(result.find('#'), 1, number) : "";
}

/// The tensor of a module, by the first name that fits it as it is or with
/// "model." or its like in front or left out; "" for none.
inline std::string gguf_name(
    const GgufNames& names,
    const std::string& module) {
  std::vector<std::string> spellings{
      module, "model." + module, "transformer." + module};
  for (const std::string prefix : {"bert.", "roberta."}) {
    if (module.compare(0, prefix.size(), prefix) == 0) {
      spellings.push_back(module.substr(prefix.size()));
    }
  }
  for (const auto& spelling : spellings) {
    for (const auto& [from, to] : names) {
      const std::string result = renumbered(spelling, from, to);
      if (!result.empty()) {
        return result;
      }
    }
  }
  return "";
}

} // namespace detail

} // namespace peft
