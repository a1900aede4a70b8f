#pragma once

#include <peft/core/network.h>
#include <peft/core/targets.h>

#include <algorithm>
#include <initializer_list>
#include <string>

namespace peft {

namespace detail {

inline bool is_one_of(
    const std::string& word,
    std::initializer_list<const char*> words) {
  return std::any_of(words.begin(), words.end(), [&](const char* other) {
    return word == other;
  });
}

inline bool ends_with(const std::string& name, const std::string& end) {
  return Targets::name_matches(name, end);
}

/// The part that a module plays in a transformer, by the names that HF's and
/// LibTorch's networks use; empty when the name does not tell.
inline std::string role_of(const Layer& layer) {
  const auto dot = layer.name.rfind('.');
  const std::string last =
      dot == std::string::npos ? layer.name : layer.name.substr(dot + 1);
  if (layer.kind == LayerKind::normalization ||
      is_one_of(
          last,
          {"LayerNorm",
           "layer_norm",
           "layernorm",
           "norm",
           "norm1",
           "norm2",
           "norm3",
           "ln_1",
           "ln_2",
           "ln_f",
           "input_layernorm",
           "post_attention_layernorm",
           "final_layer_norm"})) {
    return "layer_norm";
  }
  if (is_one_of(
          last,
          {"query", "q_proj", "q", "q_lin", "to_q", "wq", "query_proj"})) {
    return "query";
  }
  if (is_one_of(
          last, {"key", "k_proj", "k", "k_lin", "to_k", "wk", "key_proj"})) {
    return "key";
  }
  if (is_one_of(
          last,
          {"value", "v_proj", "v", "v_lin", "to_v", "wv", "value_proj"})) {
    return "value";
  }
  if (ends_with(layer.name, "attention.output.dense") ||
      ends_with(layer.name, "attn.c_proj") ||
      is_one_of(last, {"out_proj", "o_proj", "o", "out_lin"})) {
    return "attention_output";
  }
  if (ends_with(layer.name, "intermediate.dense") ||
      is_one_of(
          last,
          {"linear1",
           "fc1",
           "c_fc",
           "up_proj",
           "wi",
           "wi_0",
           "wi_1",
           "lin1",
           "dense_h_to_4h"})) {
    return "intermediate";
  }
  if (ends_with(layer.name, "output.dense") ||
      ends_with(layer.name, "mlp.c_proj") ||
      is_one_of(
          last,
          {"linear2", "fc2", "down_proj", "wo", "lin2", "dense_4h_to_h"})) {
    return "output";
  }
  return {};
}

/// The layer of a stack that a module is in, "encoder.layer.3" for
/// "encoder.layer.3.output.dense"; empty where its name has no number.
inline std::string layer_prefix(const std::string& name) {
  size_t begin = 0;
  while (begin < name.size()) {
    const size_t end = std::min(name.find('.', begin), name.size());
    const bool numeric = end > begin &&
        std::all_of(name.begin() + static_cast<int64_t>(begin),
                    name.begin() + static_cast<int64_t>(end),
                    [](char c) { return c >= '0' && c <= '9'; });
    if (numeric) {
      return name.substr(0, end);
    }
    begin = end + 1;
  }
  return {};
}

} // namespace detail

} // namespace peft
