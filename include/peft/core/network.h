#pragma once

#include <peft/core/site.h>

#include <torch/nn/modules.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// What a method needs to know of a module; anything else is `other`, whose
/// two-dimensional weights are taken as [out, in].
enum class LayerKind {
  linear,
  embedding,
  embedding_bag,
  convolution,
  bilinear,
  recurrent,
  attention,
  normalization,
  other
};

/// One module of a network, of torch::nn or of TorchScript, with the
/// parameters that are its own.
struct Layer {
  std::string name; // "encoder.layer.0.attention.self.query"; "" for the root
  std::string type; // for messages
  LayerKind kind = LayerKind::other;
  std::vector<std::pair<std::string, Tensor>> parameters;
  /// What is still registered where forward uses a member that was assigned.
  std::vector<std::pair<std::string, Tensor>> replaced;
  int64_t groups = 1; // of a convolution
  std::string refusal; // why its weight cannot be adapted, if it cannot
  const torch::nn::Module* module = nullptr; // null under TorchScript
  /// For "attention": whether this is the out_proj of the layer before it.
  std::string parent_attention;

  Tensor parameter(const std::string& key) const {
    for (const auto& item : parameters) {
      if (item.first == key) {
        return item.second;
      }
    }
    return {};
  }

  /// HF's Conv1D, a linear layer whose weight lies as [in, out]: known by the
  /// name of its type.
  bool is_conv1d() const {
    return kind == LayerKind::other && parameter("weight").defined() &&
        parameter("weight").dim() == 2 &&
        type.find("Conv1D") != std::string::npos;
  }

  /// Full path of one of its parameters.
  std::string path(const std::string& key) const {
    return name.empty() ? key : name + "." + key;
  }
};

using Network = std::vector<Layer>;

namespace detail {

/// The child module "peft" of an attach root: it holds the adapters'
/// parameters, so that parameters(), train(), to() and archives reach them.
class Registry : public torch::nn::Module {
 public:
  explicit Registry(torch::nn::Module* owner)
      : torch::nn::Module("peft::Registry"), host(owner) {}

  /// An archive of a merged base beside its adapters would apply them twice.
  void save(torch::serialize::OutputArchive& archive) const override {
    refuse_merged("saved");
    torch::nn::Module::save(archive);
  }
  void load(torch::serialize::InputArchive& archive) override {
    refuse_merged("loaded");
    torch::nn::Module::load(archive);
  }

  /// The module whose child this is; it outlives its children.
  torch::nn::Module* host;
  std::vector<std::shared_ptr<AdapterState>> adapters;

 private:
  void refuse_merged(const char* what) const {
    for (const auto& adapter : adapters) {
      TORCH_CHECK(
          !adapter->merged,
          "peft: adapter '",
          adapter->name,
          "' is merged, and the model cannot be ",
          what,
          " with it; unmerge() first, or make the merge permanent with "
          "peft::merge(model)");
    }
  }
};

inline const char* const kRegistryName = "peft";

inline const char* const kRefuseMaxNorm =
    "it has max_norm, which rewrites the frozen weight on every call";

inline std::shared_ptr<Registry> registry_of(const torch::nn::Module& module) {
  for (const auto& child : module.children()) {
    if (auto registry = std::dynamic_pointer_cast<Registry>(child)) {
      return registry;
    }
  }
  return nullptr;
}

/// Calls f(name, module) for the module and everything below it, adapters
/// aside, parents first.
template <class F>
void walk(torch::nn::Module& module, const std::string& name, F&& f) {
  std::string registry = "."; // the last one met; no name starts so
  module.apply(
      [&](const std::string& path, torch::nn::Module& m) {
        if (path.compare(0, registry.size(), registry) == 0) {
          return;
        }
        if (dynamic_cast<Registry*>(&m) != nullptr) {
          registry = path + ".";
          return;
        }
        f(path, m);
      },
      name);
}

/// All registries at or below `module`.
inline std::vector<std::shared_ptr<Registry>> registries_below(
    const torch::nn::Module& module) {
  std::vector<std::shared_ptr<Registry>> result;
  walk(
      const_cast<torch::nn::Module&>(module),
      "",
      [&](const std::string&, torch::nn::Module& m) {
        if (auto registry = registry_of(m)) {
          result.push_back(std::move(registry));
        }
      });
  return result;
}

/// A member that was assigned (`head->weight = embedding->weight`) leaves its
/// old tensor in the module's register; forward uses the member.
inline void
prefer_member(Layer& layer, const std::string& key, const Tensor& member) {
  for (auto& item : layer.parameters) {
    if (item.first == key && member.defined() && !item.second.is_same(member)) {
      layer.replaced.push_back(item);
      item.second = member;
    }
  }
}

template <class Impl>
bool describe_convolution(const torch::nn::Module& module, Layer& layer) {
  if (const auto* conv = module.as<Impl>()) {
    layer.kind = LayerKind::convolution;
    layer.groups = conv->options.groups();
    prefer_member(layer, "weight", conv->weight);
    prefer_member(layer, "bias", conv->bias);
    return true;
  }
  return false;
}

template <class Impl>
bool describe_as(
    const torch::nn::Module& module,
    Layer& layer,
    LayerKind kind) {
  if (const auto* typed = module.as<Impl>()) {
    layer.kind = kind;
    prefer_member(layer, "weight", typed->weight);
    if constexpr (
        !std::is_same_v<Impl, torch::nn::EmbeddingImpl> &&
        !std::is_same_v<Impl, torch::nn::EmbeddingBagImpl>) {
      prefer_member(layer, "bias", typed->bias);
    }
    return true;
  }
  return false;
}

inline void describe_layer(const torch::nn::Module& module, Layer& layer) {
  using namespace torch::nn;
  if (describe_as<LinearImpl>(module, layer, LayerKind::linear) ||
      describe_as<BilinearImpl>(module, layer, LayerKind::bilinear) ||
      describe_as<LayerNormImpl>(module, layer, LayerKind::normalization) ||
      describe_as<GroupNormImpl>(module, layer, LayerKind::normalization) ||
      describe_as<BatchNorm1dImpl>(module, layer, LayerKind::normalization) ||
      describe_as<BatchNorm2dImpl>(module, layer, LayerKind::normalization) ||
      describe_as<BatchNorm3dImpl>(module, layer, LayerKind::normalization) ||
      describe_convolution<Conv1dImpl>(module, layer) ||
      describe_convolution<Conv2dImpl>(module, layer) ||
      describe_convolution<Conv3dImpl>(module, layer)) {
    return;
  }
  if (describe_as<EmbeddingImpl>(module, layer, LayerKind::embedding)) {
    if (module.as<EmbeddingImpl>()->options.max_norm()) {
      layer.refusal = kRefuseMaxNorm;
    }
  } else if (describe_as<EmbeddingBagImpl>(
                 module, layer, LayerKind::embedding_bag)) {
    if (module.as<EmbeddingBagImpl>()->options.max_norm()) {
      layer.refusal = kRefuseMaxNorm;
    }
  } else if (const auto* attention = module.as<MultiheadAttentionImpl>()) {
    layer.kind = LayerKind::attention;
    prefer_member(layer, "in_proj_weight", attention->in_proj_weight);
    prefer_member(layer, "in_proj_bias", attention->in_proj_bias);
  } else if (
      module.as<LSTMImpl>() || module.as<GRUImpl>() || module.as<RNNImpl>() ||
      module.as<LSTMCellImpl>() || module.as<GRUCellImpl>() ||
      module.as<RNNCellImpl>()) {
    layer.kind = LayerKind::recurrent;
  }
}

/// The attention layer whose out_proj the module `name` is, or "".
inline std::string attention_around(
    const Network& network,
    const std::string& name) {
  const auto dot = name.rfind('.');
  const std::string last =
      dot == std::string::npos ? name : name.substr(dot + 1);
  if (last != "out_proj") {
    return "";
  }
  const std::string parent =
      dot == std::string::npos ? "" : name.substr(0, dot);
  for (const auto& other : network) {
    if (other.name == parent && other.kind == LayerKind::attention) {
      return parent;
    }
  }
  return "";
}

/// One module as a Layer, without what only its surroundings tell.
inline Layer describe_module(
    const std::string& name,
    const torch::nn::Module& module) {
  Layer layer;
  layer.name = name;
  layer.type = module.name();
  layer.module = &module;
  for (const auto& p : module.named_parameters(/*recurse=*/false)) {
    layer.parameters.emplace_back(p.key(), p.value());
  }
  describe_layer(module, layer);
  return layer;
}

using NamedParameters = std::vector<std::pair<std::string, Tensor>>;

/// The network's own parameters by name, without the adapters': the tensors
/// that forward uses.
inline NamedParameters base_parameters(const torch::nn::Module& module) {
  NamedParameters result;
  walk(
      const_cast<torch::nn::Module&>(module),
      "",
      [&](const std::string& name, torch::nn::Module& m) {
        const Layer layer = describe_module(name, m);
        for (const auto& p : layer.parameters) {
          result.emplace_back(layer.path(p.first), p.second);
        }
      });
  return result;
}

/// The same, and the registered tensors that an assigned member has replaced:
/// optimizers over the module see them.
inline NamedParameters registered_parameters(torch::nn::Module& module) {
  NamedParameters result;
  walk(module, "", [&](const std::string& name, torch::nn::Module& m) {
    const Layer layer = describe_module(name, m);
    for (const auto* list : {&layer.parameters, &layer.replaced}) {
      for (const auto& p : *list) {
        result.emplace_back(layer.path(p.first), p.second);
      }
    }
  });
  return result;
}

} // namespace detail

namespace detail {

/// A parameter of the network, whose device and dtype new tensors take.
inline Tensor any_parameter(const Network& network) {
  for (const auto& layer : network) {
    for (const auto& p : layer.parameters) {
      if (p.second.defined() && p.second.is_floating_point()) {
        return p.second;
      }
    }
  }
  TORCH_CHECK(false, "peft: this network has no parameter to adapt");
}

} // namespace detail

/// Every module of `root` with its own parameters, parents before children.
inline Network describe_network(torch::nn::Module& root) {
  Network network;
  detail::walk(root, "", [&](const std::string& name, torch::nn::Module& m) {
    Layer layer = detail::describe_module(name, m);
    layer.parent_attention = detail::attention_around(network, name);
    network.push_back(std::move(layer));
  });
  return network;
}

} // namespace peft
