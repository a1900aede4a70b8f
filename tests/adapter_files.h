#pragma once

/// Reading an adapter's two files and what others computed with them; for tests
/// with Catch2 and for tools without.

#include <torch/torch.h>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstddef>
#include <fstream>
#include <map>
#include <string>

namespace adapter_files {

using nlohmann::json;
using torch::Tensor;
using TensorMap = std::map<std::string, Tensor>;

inline const std::string prefix = "base_model.model.";

/// The tensors below "<name>.", by what follows.
inline TensorMap group(const TensorMap& tensors, const std::string& name) {
  TensorMap result;
  for (const auto& [key, value] : tensors) {
    if (key.rfind(name + ".", 0) == 0) {
      result.emplace(key.substr(name.size() + 1), value);
    }
  }
  return result;
}

/// The adapter's tensor with that key in a file; undefined when there is none.
/// A trained bias may go by its module's plain name.
inline Tensor find(
    const torch::OrderedDict<std::string, Tensor>& parameters,
    std::string key) {
  for (const auto& front : {prefix, std::string("base_model.")}) {
    if (key.rfind(front, 0) == 0) {
      key = key.substr(front.size());
      break;
    }
  }
  if (const auto* exact = parameters.find(key)) {
    return *exact;
  }
  for (size_t at; (at = key.find(".base_layer")) != std::string::npos;) {
    key.erase(at, std::string(".base_layer").size());
  }
  const auto* plain = parameters.find(key);
  return plain != nullptr ? *plain : Tensor();
}

/// A config's value as PEFT reads it: lists of names have no order, and one
/// name or index may stand without its list.
inline json as_read(const std::string& field, json value) {
  const bool is_alone = field == "layers_to_transform" && value.is_number();
  if (is_alone || (field == "layers_pattern" && value.is_string())) {
    value = json::array({value});
  }
  if (value.is_array()) {
    std::sort(value.begin(), value.end());
  }
  return value;
}

} // namespace adapter_files
