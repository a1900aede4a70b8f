#pragma once

#include <peft/core/network.h>
#include <peft/core/roles.h>

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace peft {

namespace detail {

/// What one dimension of a parameter counts.
struct PrunedAxis {
  enum class Units { whole, width, heads, inner };
  Units units = Units::whole;
  /// Which attention, or which feed-forward, of the block.
  int64_t part = 0;
  bool is_query = false;
  /// q, k and v one after another.
  bool packed = false;
};

/// The dimensions of every parameter of a block, by the roles of its modules.
inline std::map<std::string, std::vector<PrunedAxis>> pruned_axes(
    torch::nn::Module& block,
    int64_t hidden_size) {
  using Units = PrunedAxis::Units;
  std::map<std::string, std::vector<PrunedAxis>> result;
  int64_t attentions = 0;
  int64_t feed_forwards = 0;
  std::set<std::string> seen; // of the attention at hand
  for (const auto& layer : describe_network(block)) {
    const std::string last = layer.name.substr(layer.name.rfind('.') + 1);
    const bool packed = layer.kind == LayerKind::attention ||
        is_one_of(last, {"c_attn", "qkv", "qkv_proj", "query_key_value"});
    const std::string role = packed ? "query"
        : last == "gate_proj"       ? "intermediate"
                                    : role_of(layer);
    const bool is_attention =
        is_one_of(role, {"query", "key", "value", "attention_output"});
    if (is_attention && !seen.insert(role).second) {
      ++attentions;
      seen = {role};
    }
    const PrunedAxis width{Units::width};
    const PrunedAxis heads{Units::heads, attentions, role == "query", packed};
    const PrunedAxis inner{Units::inner, feed_forwards};
    feed_forwards += role == "output";

    PrunedAxis rows, columns;
    if (is_one_of(role, {"query", "key", "value"})) {
      rows = heads;
      columns = width;
    } else if (role == "attention_output") {
      rows = width;
      columns = heads;
    } else if (role == "intermediate") {
      rows = inner;
      columns = width;
    } else if (role == "output") {
      rows = width;
      columns = inner;
    } else {
      rows = width; // a norm
    }
    for (const auto& [key, tensor] : layer.parameters) {
      std::vector<PrunedAxis> axes(static_cast<size_t>(tensor.dim()));
      const bool is_vector = tensor.dim() == 1 &&
          (rows.units != Units::width || tensor.size(0) == hidden_size);
      if (is_vector) {
        axes = {rows};
      } else if (tensor.dim() == 2 && columns.units != Units::whole) {
        const bool in_out = layer.kind != LayerKind::linear &&
            is_one_of(last, {"c_attn", "c_proj", "c_fc"});
        axes = in_out ? std::vector<PrunedAxis>{columns, rows}
                      : std::vector<PrunedAxis>{rows, columns};
      }
      result[layer.path(key)] = axes;
    }
  }
  return result;
}

} // namespace detail

} // namespace peft
