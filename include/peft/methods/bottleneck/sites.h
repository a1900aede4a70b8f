#pragma once

// Where the bottleneck adapters go: a network's layers by their numbers and by
// the parts that they play.

#include <peft/core/roles.h>
#include <peft/core/targets.h>

#include <algorithm>
#include <initializer_list>
#include <string>
#include <vector>

namespace peft {

namespace detail {

/// The layers of a network, counted through its stacks from 0: an encoder's
/// first, then its decoder's. A network whose names have no numbers is layer 0.
class LayerNumbers {
 public:
  /// What makes a numbered module a layer: that one of `sites`, or of those
  /// that the user chose, is inside. All are of one network.
  LayerNumbers(
      std::vector<const Layer*> sites,
      const std::vector<const Layer*>& chosen) {
    sites.insert(sites.end(), chosen.begin(), chosen.end());
    std::sort(sites.begin(), sites.end()); // the network's order
    for (const Layer* site : sites) {
      const std::string prefix = layer_prefix(site->name);
      const bool known =
          std::find(prefixes_.begin(), prefixes_.end(), prefix) !=
          prefixes_.end();
      if (!prefix.empty() && !known) {
        prefixes_.push_back(prefix);
      }
    }
  }

  /// The number of the layer that `name` is in; -1 outside of all.
  int64_t of(const std::string& name) const {
    const auto found =
        std::find(prefixes_.begin(), prefixes_.end(), layer_prefix(name));
    if (found != prefixes_.end()) {
      return found - prefixes_.begin();
    }
    return prefixes_.empty() ? 0 : -1;
  }
  int64_t count() const {
    return std::max<int64_t>(1, static_cast<int64_t>(prefixes_.size()));
  }

 private:
  std::vector<std::string> prefixes_;
};

inline bool is_left_out(const std::vector<int64_t>& leave_out, int64_t layer) {
  return std::find(leave_out.begin(), leave_out.end(), layer) !=
      leave_out.end();
}

inline void check_leave_out(
    const std::vector<int64_t>& leave_out,
    int64_t num_layers) {
  for (const int64_t layer : leave_out) {
    TORCH_CHECK_VALUE(
        layer >= 0 && layer < num_layers,
        "peft: leave_out names layer ",
        layer,
        ", and the adapter's layers in this network are 0 to ",
        num_layers - 1);
  }
  bool all = true;
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    all = all && is_left_out(leave_out, layer);
  }
  TORCH_CHECK_VALUE(!all, "peft: leave_out leaves no layer for the adapter");
}

/// The attention to an encoder's result, which adapters leave alone by default.
inline bool is_cross_attention(const std::string& name) {
  const std::string dotted = "." + name + ".";
  for (const char* part :
       {".multihead_attn.",
        ".EncDecAttention.",
        ".crossattention.",
        ".encoder_attn."}) {
    if (dotted.find(part) != std::string::npos) {
      return true;
    }
  }
  return false;
}

/// The modules of one of these roles, in order. Where some are in numbered
/// layers the others (a head, say) do not count.
inline std::vector<const Layer*> layers_in_roles(
    const Network& network,
    std::initializer_list<const char*> roles,
    bool cross_attention = false) {
  std::vector<const Layer*> all, numbered;
  for (const auto& layer : network) {
    if (is_one_of(role_of(layer), roles) &&
        (cross_attention || !is_cross_attention(layer.name)) &&
        layer.parameter("weight").defined()) {
      all.push_back(&layer);
      if (!layer_prefix(layer.name).empty()) {
        numbered.push_back(&layer);
      }
    }
  }
  return numbered.empty() ? all : numbered;
}

/// Whether q, k and v lie one after another in this module's weight.
inline bool is_packed(const Layer& layer) {
  const auto dot = layer.name.rfind('.');
  const std::string last =
      dot == std::string::npos ? layer.name : layer.name.substr(dot + 1);
  return layer.kind == LayerKind::attention ||
      is_one_of(last, {"c_attn", "qkv", "qkv_proj"});
}

/// How many features a linear layer puts out; 0 where it is none, or not one.
inline int64_t output_width(const Layer& layer) {
  const Tensor weight = layer.parameter("weight");
  const bool is_linear =
      layer.kind == LayerKind::linear || layer.kind == LayerKind::other;
  if (!is_linear || is_packed(layer) || !weight.defined() ||
      weight.dim() != 2) {
    return 0;
  }
  const Tensor bias = layer.parameter("bias");
  return bias.defined() ? bias.numel() : weight.size(0);
}

/// For messages: the linear layers that there are.
inline std::string linear_layers_of(const Network& network) {
  std::string names;
  int count = 0;
  for (const auto& layer : network) {
    if (output_width(layer) > 0 && ++count <= 12) {
      names +=
          (count == 1 ? " Its linear layers: '" : ", '") + layer.name + "'";
    }
  }
  return count == 0 ? " It has no linear layer."
                    : names + (count > 12 ? ", ..." : "") + ".";
}

/// The modules that `targets` names, those that `fits` says no to left out; an
/// error where a list names such a one (`what` they should be).
template <class Fits>
std::vector<const Layer*> layers_in_targets(
    const Network& network,
    const Targets& targets,
    const std::string& field,
    const std::string& what,
    Fits&& fits) {
  const bool listed = targets.kind() == Targets::Kind::list;
  if (listed) {
    check_every_name_matches(network, targets.names(), field, false);
  }
  std::vector<const Layer*> result;
  for (const auto& layer : network) {
    if (!targets.matches(layer.name, layer)) {
      continue;
    }
    if (fits(layer)) {
      result.push_back(&layer);
      continue;
    }
    TORCH_CHECK(
        !listed,
        "peft: ",
        field,
        " names '",
        layer.name,
        "', a ",
        layer.type,
        is_packed(layer)
            ? ", which packs queries, keys and values: an adapter acts on a "
              "layer's whole output; name the attention's output projection"
            : ", which is not " + what);
  }
  TORCH_CHECK(
      !result.empty(),
      "peft: ",
      field,
      " matches nothing that is ",
      what,
      " in this network.",
      linear_layers_of(network));
  return result;
}

/// The tensor that carries an output transform of a linear layer.
inline std::string output_parameter(const Layer& layer) {
  return layer.parameter("bias").defined() ? "bias" : "weight";
}

} // namespace detail

} // namespace peft
