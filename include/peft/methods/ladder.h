#pragma once

// Ladder side tuning (Sung, Cho and Bansal 2022, arXiv:2206.06522): a narrow
// network beside the frozen one reads what its layers make, and answers. No
// gradient passes through the backbone, so nothing of it is stored.
//
//   h   = down(x)                            x what goes into the first layer
//   h   = mu_i h + (1 - mu_i) down_i(x_i)    x_i what comes out of layer i,
//   h   = block_i(h)                         mu_i = sigmoid(alpha_i / T)
//   out = up(norm(h))
//
// block_i is a block of the network's own kind with all widths divided by the
// reduction; it starts from the most important rows and columns of layer i. In
// an encoder-decoder the decoder's blocks attend to the encoder's norm(h), and
// only the decoder has an up.

#include <peft/core/attach.h>
#include <peft/core/layer_loop.h>
#include <peft/methods/ladder/activation_cache.h>
#include <peft/methods/ladder/options.h>
#include <peft/methods/ladder/pruning.h>
#include <peft/methods/ladder/side_network.h>
#include <peft/methods/modules_to_save.h>

#include <torch/csrc/autograd/autograd.h>
#include <torch/nn/modules/container/modulelist.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// The module whose child `name` is: "encoder" for "encoder.layer_loop".
inline std::string parent_of(const std::string& name) {
  const auto dot = name.rfind('.');
  return dot == std::string::npos ? "" : name.substr(0, dot);
}

/// The layers and the last norm that stand beside the call site of `side`.
inline LadderStack find_stack(
    const Network& network,
    const std::shared_ptr<SideNetwork>& side) {
  LadderStack stack{side, {}, {}, {}};
  const auto& spec = side->spec;
  int64_t lists = 0;
  for (const auto& layer : network) {
    if (layer.name.empty() || parent_of(layer.name) != parent_of(spec.stack)) {
      continue;
    }
    const auto* list = layer.module->as<torch::nn::ModuleListImpl>();
    if (list != nullptr &&
        static_cast<int64_t>(list->size()) == spec.loop.num_layers()) {
      ++lists;
      stack.layers_name = layer.name;
      stack.layers.assign(list->begin(), list->end());
    }
    const bool fits = !side->norm.is_empty() && !layer.parameters.empty() &&
        std::all_of(
            layer.parameters.begin(),
            layer.parameters.end(),
            [&](const auto& p) {
              return p.second.dim() == 1 &&
                  p.second.size(0) == spec.loop.hidden_size() &&
                  side->norm.ptr()->named_parameters().contains(p.first);
            });
    if (fits) {
      stack.norm = layer;
    }
  }
  TORCH_CHECK(
      lists == 1,
      "peft: pruning looks for the ",
      spec.loop.num_layers(),
      " layers of '",
      spec.stack,
      "' in one torch::nn::ModuleList beside it and finds ",
      lists,
      "; use LadderOptions().init(\"random\")");
  return stack;
}

/// One side network for each stack of the network.
inline std::vector<std::shared_ptr<SideNetwork>> side_networks(
    const LadderOptions& options,
    const std::vector<std::pair<std::string, const LayerLoopImpl*>>& loops) {
  TORCH_CHECK(
      !loops.empty(),
      "peft: ladder side tuning reads what each layer makes, and this network "
      "has no place for that. Register a peft::LayerLoop beside the layers and "
      "let it run them:\n"
      "  layer_loop = register_module(\"layer_loop\", peft::LayerLoop(\n"
      "      peft::LayerLoopOptions(hidden_size, num_layers)"
      ".side_block(...)));\n"
      "  h = layer_loop->forward(h, attention_mask, *layers, run).hidden;\n"
      "peft/core/layer_loop.h has the whole of it");
  const bool has_decoder =
      std::any_of(loops.begin(), loops.end(), [](const auto& loop) {
        return loop.second->options.causal();
      });
  std::vector<std::shared_ptr<SideNetwork>> result;
  for (const auto& [name, site] : loops) {
    const auto& loop = site->options;
    TORCH_CHECK(
        loop.side_block(),
        "peft: '",
        name,
        "' does not say what a side network is built of; make it with "
        "LayerLoopOptions(...).side_block(a function that makes a block of "
        "widths divided by the reduction it is given)");
    TORCH_CHECK_VALUE(
        loop.hidden_size() % options.reduction() == 0,
        "peft: LadderOptions' reduction ",
        options.reduction(),
        " does not divide the width ",
        loop.hidden_size(),
        " of '",
        name,
        "'");
    const bool is_encoder = has_decoder && !loop.causal();
    const bool is_decoder = loops.size() > 1 && loop.causal();
    const auto& layers = is_decoder && !options.decoder_layers().empty()
        ? options.decoder_layers()
        : options.layers();
    SideNetwork::Spec spec{
        options,
        loop,
        name,
        kept_layers(layers, loop.num_layers(), name),
        is_encoder};
    spec.options.importance({}); // no part of what it is
    result.push_back(std::make_shared<SideNetwork>(std::move(spec)));
  }
  return result;
}

inline Plan plan(const LadderOptions& options, const Network& network) {
  check(options);
  Plan result;
  result.method = "LADDER";
  const auto loops = call_sites<LayerLoopImpl>(network);
  const auto sides = side_networks(options, loops);
  result.options = LadderOptions(options).importance({});
  const Tensor like = any_parameter(network);
  if (!like.is_meta()) { // which has shapes only
    for (const auto& side : sides) { // half precision is trained in float32
      side->to(like.device(), adapter_dtype(like));
    }
    if (options.init() == "prune") {
      std::vector<LadderStack> stacks;
      for (const auto& side : sides) {
        stacks.push_back(find_stack(network, side));
      }
      LadderPruning(std::move(stacks), options.importance()).run();
    }
  }
  for (size_t i = 0; i < sides.size(); ++i) {
    const std::string& name = loops[i].first;
    result.sites.push_back(
        {name, name, name, Tensor(), sides[i], loops[i].second->site()});
  }
  plan_modules_to_save(network, options.modules_to_save(), result.sites);
  return result;
}

} // namespace detail

/// Puts a side network beside every stack of `model` and freezes everything
/// else. `model` must have the call site LayerLoop.
inline Adapter attach(
    torch::nn::Module& model,
    const LadderOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

/// The empirical Fisher information of every parameter, for pruning: the sum
/// over the batches of the squared gradient. `loss(i)` runs `model` on batch i,
/// one sample for the published estimate (of 1,024), and returns a scalar.
/// Neither requires_grad nor grad of any tensor is changed.
inline Importance ladder_importance(
    torch::nn::Module& model,
    const std::function<Tensor(int64_t)>& loss,
    int64_t num_batches) {
  struct Restore {
    std::vector<std::pair<Tensor, bool>> flags;
    ~Restore() {
      for (auto& item : flags) {
        item.first.set_requires_grad(item.second);
      }
    }
  } restore;
  std::vector<std::string> names;
  std::vector<Tensor> parameters;
  Importance result;
  for (const auto& [name, tensor] : detail::base_parameters(model)) {
    if (!tensor.is_floating_point() || tensor.numel() == 0) {
      continue;
    }
    TORCH_CHECK(
        !is_adapted(tensor),
        "peft: '",
        name,
        "' carries an adapter; measure the importance before attaching");
    names.push_back(name);
    parameters.push_back(tensor);
    restore.flags.emplace_back(tensor, tensor.requires_grad());
    result[name] = at::zeros_like(tensor.detach());
  }
  for (auto& parameter : parameters) {
    parameter.set_requires_grad(true);
  }
  torch::AutoGradMode graph(true);
  for (int64_t i = 0; i < num_batches; ++i) {
    const auto grads = torch::autograd::grad(
        {loss(i)}, parameters, {}, {}, false, /*allow_unused=*/true);
    for (size_t p = 0; p < grads.size(); ++p) {
      if (grads[p].defined()) {
        result[names[p]] += grads[p].detach().square();
      }
    }
  }
  return result;
}

} // namespace peft
