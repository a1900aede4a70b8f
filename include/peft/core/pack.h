#pragma once

// Frozen weights prepacked for the CPU. A weight that never changes need not be
// rearranged by every product; packed once, batches of few rows run faster,
// forward and backward (benchmarks/results). Nothing in the network's source
// changes: the packed form hangs on the weight as an adapter does.

#include <peft/core/attach.h>
#include <peft/functional/packed_matrix.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// What pack_frozen left behind.
struct PackReport {
  int64_t weights = 0; // packed ones in the model, tied ones once
  int64_t bytes = 0; // what their packed forms take
};

namespace detail {

/// The matrices that linear layers multiply by, each tensor once.
inline std::vector<Tensor> linear_weights(const Network& network) {
  std::vector<Tensor> result;
  for (const auto& layer : network) {
    Tensor weight;
    if (layer.kind == LayerKind::linear || layer.is_conv1d()) {
      weight = layer.parameter("weight");
    } else if (layer.kind == LayerKind::attention) {
      weight = layer.parameter("in_proj_weight");
    }
    const bool known =
        std::any_of(result.begin(), result.end(), [&](const Tensor& other) {
          return other.is_same(weight);
        });
    if (weight.defined() && !known) {
      result.push_back(std::move(weight));
    }
  }
  return result;
}

/// Why `weight` cannot be packed; empty when it can.
inline std::string pack_obstacle(
    const Tensor& weight,
    const NamedParameters& all) {
  const auto* meta = tag_of(weight);
  if (weight.requires_grad()) {
    return "trainable (attach an adapter or call peft::freeze first)";
  }
  if (!weight.is_cpu()) {
    return "on " + weight.device().str();
  }
  if (weight.scalar_type() != at::kFloat) {
    return std::string("of dtype ") + c10::toString(weight.scalar_type());
  }
  if (weight.dim() != 2 || weight.numel() == 0 ||
      weight.layout() != at::kStrided ||
      (meta != nullptr && (meta->view || meta->transposed))) {
    return "no dense matrix of its own";
  }
  for (const auto& item : all) { // such a tensor counts its own writes
    if (!item.second.is_same(weight) && is_tied(item.second, weight)) {
      return "tied by memory, not by tensor";
    }
  }
  return {};
}

/// Hangs `packed` on `weight`, beside its adapters if it has any.
inline void hang_packed(
    const Tensor& weight,
    std::shared_ptr<const functional::PackedMatrix> packed,
    bool required_grad) {
  if (auto* meta = tag_of(weight)) {
    meta->site->packed = std::move(packed);
    return;
  }
  auto site = std::make_shared<Site>();
  site->sizes = weight.sizes().vec();
  site->packed = std::move(packed);
  auto tag = first_tag(site, {0, weight.size(0)});
  site->tensors.push_back(
      {weight.unsafeGetTensorImpl(), tag->token, required_grad});
  set_tag(weight, std::move(tag));
}

} // namespace detail

/// Packs every frozen float32 matrix on the CPU that a Linear, GPT-2's Conv1D
/// or the joint projection of an attention multiplies by, with or without
/// adapters. It costs the memory of two more copies of each (one for y = x Wᵀ,
/// one for dx = dy W), which the report counts.
///
/// A weight that is written to later (a merge, load_base, an optimizer) is used
/// as it then is, without its packed form; call pack_frozen again for it. Only
/// writes through data() go unseen. Weights that train are left alone, and a
/// copy of the model is not packed. Needs the model for itself, as attach does.
/// It is an error, which says why, if nothing can be packed.
inline PackReport pack_frozen(torch::nn::Module& model) {
  torch::NoGradGuard no_grad;
  const auto all = detail::base_parameters(model);
  const auto states = detail::states_below(model);
  std::vector<
      std::pair<Tensor, std::shared_ptr<const functional::PackedMatrix>>>
      made;
  PackReport report;
  std::string obstacles;
  for (const auto& weight : detail::linear_weights(describe_network(model))) {
    const std::string obstacle = detail::pack_obstacle(weight, all);
    if (!obstacle.empty()) {
      obstacles += c10::str("\n  ", weight.sizes(), " is ", obstacle);
      continue;
    }
    const auto* meta = detail::tag_of(weight);
    auto packed = meta != nullptr ? meta->site->packed : nullptr;
    if (!packed || !packed->is_of(weight)) {
      packed = std::make_shared<const functional::PackedMatrix>(
          detail::base_of(weight));
      made.emplace_back(weight, packed);
    }
    ++report.weights;
    report.bytes += packed->nbytes();
  }
  TORCH_CHECK(
      report.weights > 0,
      "peft: pack_frozen found no frozen float32 matrix of a linear layer on "
      "the CPU in this model",
      obstacles.empty() ? "; it has no linear layer" : ":" + obstacles);
  detail::ensure_registered();
  for (auto& [weight, packed] : made) {
    detail::hang_packed(
        weight,
        std::move(packed),
        detail::required_before(states, weight)
            .value_or(weight.requires_grad()));
  }
  return report;
}

/// Lets go of all packed forms; a weight without an adapter is plain again.
inline void unpack(torch::nn::Module& model) {
  for (const auto& item : detail::base_parameters(model)) {
    const auto* meta = detail::tag_of(item.second);
    if (meta == nullptr || !meta->site->packed) {
      continue;
    }
    const auto site = meta->site; // the tag goes
    site->packed.reset();
    if (site->entries.empty()) {
      for (const auto& ref : site->tensors) {
        const Tensor t = ref.lock();
        if (t.defined()) {
          detail::remove_tag(t);
        }
      }
    }
  }
}

} // namespace peft
