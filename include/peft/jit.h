#pragma once

/// The same for TorchScript: attach to a traced, scripted or loaded
/// torch::jit::Module. Opt-in, because <torch/script.h> is slow to compile.
///
///   auto model = torch::jit::load("encoder.pt");
///   auto adapter = peft::attach(model, peft::LoraOptions(8).alpha(16));
///   {
///     torch::jit::GraphOptimizerEnabledGuard plain_executor(false);
///     ... train adapter.parameters() ...
///   }
///   peft::merge(model);
///   model.save("tuned.pt");
///
/// What differs from torch::nn:
/// - Training runs under GraphOptimizerEnabledGuard(false). The optimising
///   executor replays a graph that does not know the adapter and would drop its
///   gradients from the second run on; it is refused. Inference under
///   torch::NoGradGuard is right under either executor.
/// - The module's class is fixed, so the adapter is no child of it: give
///   `adapter.parameters()` to the optimizer and call `adapter.train()` and
///   `adapter.eval()` beside the module's own.
/// - `save` on the module writes the bare base; peft::save(adapter, dir) the
///   adapter. clone() and deepcopy() of the module give plain modules with the
///   adapters folded in (take them under torch::NoGradGuard); peft::clone gives
///   one with adapters of its own.
/// - Merge before torch::jit::freeze and optimize_for_inference. A graph frozen
///   earlier shares the adapted weights: it follows later changes of the
///   adapter, and its file holds the bare base.

#include <peft/peft.h>
#include <peft/io/hotswap.h>
#include <peft/io/pretrained.h>

#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/script.h>

#include <algorithm>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// The kind that a class name stands for ("Linear" of
/// "__torch__.torch.nn.modules.linear.___torch_mangle_3.Linear").
inline LayerKind kind_of_class(const std::string& name) {
  static const std::map<std::string, LayerKind> kinds{
      {"Linear", LayerKind::linear},
      {"NonDynamicallyQuantizableLinear", LayerKind::linear},
      {"Embedding", LayerKind::embedding},
      {"EmbeddingBag", LayerKind::embedding_bag},
      {"Conv1d", LayerKind::convolution},
      {"Conv2d", LayerKind::convolution},
      {"Conv3d", LayerKind::convolution},
      {"Bilinear", LayerKind::bilinear},
      {"LSTM", LayerKind::recurrent},
      {"GRU", LayerKind::recurrent},
      {"RNN", LayerKind::recurrent},
      {"LSTMCell", LayerKind::recurrent},
      {"GRUCell", LayerKind::recurrent},
      {"RNNCell", LayerKind::recurrent},
      {"MultiheadAttention", LayerKind::attention},
      {"LayerNorm", LayerKind::normalization},
      {"GroupNorm", LayerKind::normalization},
      {"BatchNorm1d", LayerKind::normalization},
      {"BatchNorm2d", LayerKind::normalization},
      {"BatchNorm3d", LayerKind::normalization}};
  const auto found = kinds.find(name);
  return found == kinds.end() ? LayerKind::other : found->second;
}

/// Groups of a convolution: a constant of a scripted module; a traced one tells
/// them only in its graph. 1 where neither does: the adapter then finds out
/// when it is first called.
inline int64_t groups_of(const torch::jit::Module& module) {
  if (module.hasattr("groups") && module.attr("groups").isInt()) {
    return module.attr("groups").toInt();
  }
  const auto forward = module.find_method("forward");
  if (!forward) {
    return 1;
  }
  for (const auto* node : forward->graph()->nodes()) {
    const auto* schema = node->maybeSchema();
    if (schema != nullptr && schema->argumentIndexWithName("groups")) {
      const auto groups = torch::jit::toIValue(node->namedInput("groups"));
      return groups && groups->isInt() ? groups->toInt() : 1;
    }
  }
  return 1;
}

inline void describe_below(
    const torch::jit::Module& module,
    const std::string& name,
    Network& network) {
  Layer layer;
  layer.name = name;
  const auto class_name = module.type()->name();
  layer.type = class_name ? class_name->name() : "module";
  layer.kind = kind_of_class(layer.type);
  for (const auto& p : module.named_parameters(/*recurse=*/false)) {
    if (p.value.defined()) {
      layer.parameters.emplace_back(p.name, p.value);
    }
  }
  if (layer.kind == LayerKind::convolution) {
    layer.groups = groups_of(module);
  }
  if (module.hasattr("max_norm") && !module.attr("max_norm").isNone()) {
    layer.refusal = kRefuseMaxNorm;
  }
  layer.parent_attention = attention_around(network, name);
  network.push_back(std::move(layer));
  for (const auto& child : module.named_children()) {
    describe_below(
        child.value,
        name.empty() ? child.name : name + "." + child.name,
        network);
  }
}

} // namespace detail

/// Every module of `root` with its own parameters, parents before children.
inline Network describe_network(const torch::jit::Module& root) {
  Network network;
  detail::describe_below(root, "", network);
  return network;
}

/// Makes TorchScript forget how it planned to run the methods of `model`. A
/// plan from training under the optimising executor leaves adapters without
/// gradients, and outlives GraphOptimizerEnabledGuard; attach calls this.
inline void forget_plans(const torch::jit::Module& model) {
  if (!torch::jit::getExecutorMode()) {
    return; // the simple executor plans without recording
  }
  for (auto method : model.get_methods()) {
    method.get_executor().debugFlushCompilationCache();
  }
}

namespace detail {

inline std::vector<std::pair<std::string, Tensor>> base_parameters(
    const torch::jit::Module& model) {
  std::vector<std::pair<std::string, Tensor>> result;
  for (const auto& layer : describe_network(model)) {
    for (const auto& p : layer.parameters) {
      result.emplace_back(layer.path(p.first), p.second);
    }
  }
  return result;
}

/// The adapters that the tags of the model's parameters lead to.
inline States states_below(const torch::jit::Module& model) {
  States result;
  for (const auto& item : base_parameters(model)) {
    const auto* tag = tag_of(item.second);
    if (tag == nullptr) {
      continue;
    }
    for (const auto& entry : tag->site->entries) {
      if (std::find(result.begin(), result.end(), entry.adapter) ==
          result.end()) {
        result.push_back(entry.adapter);
      }
    }
  }
  return result;
}

/// The adapters of `model`, none of which may reach further than it.
inline States states_within(const torch::jit::Module& model) {
  const auto all = base_parameters(model);
  const States states = states_below(model);
  for (const auto& state : states) {
    for (const auto& record : state->sites) {
      const Tensor tensor = tensor_of(*lock_site(record));
      TORCH_CHECK(
          parameter_at(all, record.parameters.front()).is_same(tensor),
          "peft: adapter '",
          state->name,
          "' was attached to another module around or inside this one; call "
          "this for that module");
    }
  }
  return states;
}

inline Adapter
commit(const torch::jit::Module& root, const std::string& name, Plan plan) {
  auto state =
      hang(name, std::move(plan), base_parameters(root), states_below(root));
  forget_plans(root);
  Adapter adapter(std::move(state));
  adapter.train(root.is_training());
  return adapter;
}

} // namespace detail

/// Puts a method on the targets of a TorchScript module and freezes everything
/// else. All or nothing: an error leaves the module as it was. Takes the
/// options of every method that changes weights (LoraOptions, BitFitOptions,
/// ...).
template <class Options>
Adapter attach(
    const torch::jit::Module& model, // a handle: what it refers to is adapted
    const Options& options,
    const std::string& name = "default") {
  const Network network = describe_network(model);
  TORCH_CHECK(
      std::any_of(
          network.begin(),
          network.end(),
          [](const Layer& layer) { return !layer.parameters.empty(); }),
      "peft: this TorchScript module has no parameters; if it was frozen, "
      "attach before torch::jit::freeze");
  return detail::commit(model, name, detail::plan(options, network));
}

/// The adapters on `model`, in the order of the weights they act on.
inline std::vector<Adapter> adapters(const torch::jit::Module& model) {
  std::vector<Adapter> result;
  for (auto& state : detail::states_below(model)) {
    result.emplace_back(std::move(state));
  }
  return result;
}

/// The adapter of that name; an error that lists the names there are.
inline Adapter get_adapter(
    const torch::jit::Module& model,
    const std::string& name = "default") {
  return detail::find_adapter(adapters(model), name);
}

/// set_adapter, active_adapters, delete_adapter and rename_adapter of
/// core/adapters.h.
inline void set_adapter(
    const torch::jit::Module& model,
    const AdapterNames& names,
    bool inference_mode = false) {
  detail::set_adapter(adapters(model), names, inference_mode);
}
inline std::vector<std::string> active_adapters(
    const torch::jit::Module& model) {
  return detail::active_adapters(adapters(model));
}
inline void delete_adapter(
    const torch::jit::Module& model,
    const std::string& name) {
  detail::delete_adapter(adapters(model), name);
}
inline void rename_adapter(
    const torch::jit::Module& model,
    const std::string& old_name,
    const std::string& new_name) {
  detail::rename_adapter(adapters(model), old_name, new_name);
}

inline ParameterCount count_parameters(const torch::jit::Module& model) {
  return detail::count_parameters(
      detail::base_parameters(model), adapters(model));
}

/// What trains, in all and by site.
inline std::string summary(const torch::jit::Module& model) {
  return detail::summary(count_parameters(model), adapters(model));
}

/// Folds every enabled adapter into the weights and leaves a plain module that
/// saves, freezes and optimises like any other.
inline void merge(const torch::jit::Module& model) {
  detail::merge_for_good(detail::states_within(model));
}

/// Attaches the adapter that `folder` holds, written by libpeft or by HF PEFT,
/// under `name`, as peft::load does on torch::nn.
inline Adapter load(
    const torch::jit::Module& model,
    const std::string& folder,
    const std::string& name = "default",
    const LoadOptions& options = {}) {
  return detail::load_onto(
      model,
      describe_network(model),
      detail::adapter_folder(folder, name),
      name,
      options);
}

/// save_adapters and load_adapters of io/pretrained.h.
inline void save_adapters(
    const torch::jit::Module& model,
    const std::string& folder) {
  save_adapters(adapters(model), folder);
}
inline std::vector<Adapter> load_adapters(
    const torch::jit::Module& model,
    const std::string& folder,
    const LoadOptions& options = {}) {
  return detail::load_all_onto(
      model, describe_network(model), folder, adapters(model).empty(), options);
}

/// hotswap_adapter of io/hotswap.h.
inline void hotswap_adapter(
    const torch::jit::Module& model,
    const std::string& folder,
    const std::string& name = "default",
    const HotswapOptions& options = {}) {
  detail::hotswap(
      get_adapter(model, name), describe_network(model), folder, options);
}

/// A deep copy with adapters of its own; the class and its code are shared.
inline torch::jit::Module clone(
    const torch::jit::Module& model,
    const std::optional<torch::Device>& device = std::nullopt) {
  const auto states = detail::states_within(model);
  torch::jit::Module copy = [&] {
    torch::NoGradGuard no_grad;
    detail::RawBaseScope raw;
    return model.deepcopy(device);
  }();
  const auto ours = detail::base_parameters(model);
  const auto theirs = detail::base_parameters(copy);
  for (size_t i = 0; i < theirs.size(); ++i) { // attach freezes them again
    Tensor twin = theirs[i].second;
    const Tensor& original = ours[i].second;
    if (twin.is_floating_point() && !twin.is_inference()) {
      twin.set_requires_grad(detail::required_before(states, original)
                                 .value_or(original.requires_grad()));
    }
  }
  for (const auto& state : states) {
    auto plan = detail::plan_copy_of(*state, describe_network(copy));
    Adapter adapter = detail::commit(copy, state->name, std::move(plan));
    detail::copy_switches(*state, *adapter.shared_state());
  }
  return copy;
}

} // namespace peft
