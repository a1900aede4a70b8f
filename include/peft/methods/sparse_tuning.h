#pragma once

// Sparse fine-tuning: chosen entries of the network's own parameters train, all
// others keep their bits.
//
//   θ' = θ, but θ_m' trains for m in the mask
//
// What chooses the entries is the method: a Fisher mask (methods/fish.h), a
// lottery ticket (methods/lt_sft.h), SHiRA's shapes (methods/shira.h), or what
// is here: k entries, or a share of them, drawn without replacement.

#include <peft/core/attach.h>
#include <peft/core/sparse_copy.h>
#include <peft/methods/lora/placement.h>
#include <peft/methods/modules_to_save.h>
#include <peft/methods/sparse_mask.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

namespace peft {

/// Options for sparse fine-tuning with a mask of one's own.
///
///   peft::SparseTuningOptions(peft::top_k(scores, 10000))
struct SparseTuningOptions {
  SparseTuningOptions() = default;
  SparseTuningOptions(SparseMask mask) : mask_(std::move(mask)) {}

  /// The entries that train, by the parameters' full paths.
  TORCH_ARG(SparseMask, mask);
  /// Store differences, so that several such adapters add up (task + language);
  /// absolute values otherwise, which merge to the bit.
  TORCH_ARG(bool, additive) = false;
  /// Modules trained whole, beside the entries: a task head.
  TORCH_ARG(std::vector<std::string>, modules_to_save);
};

/// Options for sparse fine-tuning of random entries, drawn without replacement.
///
///   peft::RandomMaskOptions(0.005).seed(1)
struct RandomMaskOptions {
  RandomMaskOptions(double density = 0.005) : density_(density) {}

  /// The share of the targets' entries that trains, in (0, 1].
  TORCH_ARG(double, density);
  /// How many entries train, instead of a share.
  TORCH_ARG(std::optional<int64_t>, k);
  /// The same share of each tensor; otherwise of all tensors together.
  TORCH_ARG(bool, per_tensor) = false;
  TORCH_ARG(uint64_t, seed) = 0;
  /// Layers, whose weights are meant, or parameters. Default: the weights of
  /// all linear layers.
  TORCH_ARG(Targets, targets);
  TORCH_ARG(std::vector<std::string>, modules_to_save);
};

namespace detail {

/// The weights that `targets` mean, each once; by default those of the layers
/// that `is_default` says yes to.
template <class IsDefault>
NamedParameters weights_of(
    const Network& network,
    const Targets& targets,
    const std::vector<std::string>& modules_to_save,
    IsDefault&& is_default) {
  if (targets.kind() == Targets::Kind::list) {
    check_every_name_matches(network, targets.names(), "targets", true);
  }
  NamedParameters result;
  for (const auto& layer : network) {
    for (const auto& parameter : layer.parameters) {
      const std::string path = layer.path(parameter.first);
      const Tensor& tensor = parameter.second;
      const bool wanted = tensor.defined() && tensor.is_floating_point() &&
          (targets.empty()
               ? tensor.dim() == 2 && is_default(layer)
               : (tensor.dim() >= 2 && targets.matches(layer.name, layer)) ||
                   targets.matches(path, layer));
      if (wanted && !is_inside(path, modules_to_save) &&
          std::none_of(result.begin(), result.end(), [&](const auto& other) {
            return is_tied(other.second, tensor);
          })) {
        result.emplace_back(path, tensor);
      }
    }
  }
  TORCH_CHECK(
      !result.empty(),
      "peft: the targets match no weight.",
      near_misses(network, "weight"));
  return result;
}

/// Sites for the entries of `mask`, all of which must be there.
inline std::vector<PlannedSite> plan_sparse(
    const SparseMask& mask,
    const Network& network,
    bool additive,
    const std::vector<std::string>& modules_to_save) {
  TORCH_CHECK_VALUE(
      !mask.empty(),
      "peft: the mask is empty, and nothing would train; choose at least one "
      "entry (peft::top_k, peft::random_mask, SparseMask::set)");
  std::vector<PlannedSite> sites; // in the network's order
  std::unordered_set<std::string> found;
  for (const auto& layer : network) {
    for (const auto& [key, tensor] : layer.parameters) {
      const std::string path = layer.path(key);
      const auto* entry = mask.find(path);
      if (entry == nullptr) {
        continue;
      }
      found.insert(path);
      TORCH_CHECK_VALUE(
          !is_inside(path, modules_to_save),
          "peft: the mask names '",
          path,
          "', which modules_to_save trains whole; name it in one of the two");
      TORCH_CHECK(
          layer.refusal.empty(),
          "peft: '",
          path,
          "' cannot be adapted: ",
          layer.refusal);
      check_adaptable(tensor, path);
      SparseMask::check_fits(*entry, tensor.sizes());
      for (const auto& other : sites) {
        TORCH_CHECK_VALUE(
            !is_tied(other.tensor, tensor),
            "peft: the mask names '",
            other.parameter,
            "' and '",
            path,
            "', which are one tensor in this model; name one of them");
      }
      sites.push_back(
          {path,
           path,
           layer.name,
           tensor,
           SparseCopy::of(base(tensor), entry->indices, key, additive)});
    }
  }
  for (const auto& entry : mask.entries()) {
    TORCH_CHECK_VALUE(
        found.count(entry.parameter) != 0,
        "peft: the mask names '",
        entry.parameter,
        "', and this network has no such parameter; masks take full paths.",
        near_misses(network, entry.parameter));
  }
  plan_modules_to_save(network, modules_to_save, sites);
  return sites;
}

inline Plan plan(const SparseTuningOptions& options, const Network& network) {
  Plan result;
  result.method = "SPARSE";
  result.sites = plan_sparse(
      options.mask(), network, options.additive(), options.modules_to_save());
  SparseTuningOptions kept = options;
  kept.mask({}); // the deltas hold it
  result.options = kept;
  return result;
}

inline Plan plan(const RandomMaskOptions& options, const Network& network) {
  Shapes shapes;
  int64_t total = 0;
  for (const auto& item : weights_of(
           network,
           options.targets(),
           options.modules_to_save(),
           [](const Layer& layer) {
             return Targets::all_linear().matches(layer.name, layer);
           })) {
    shapes.emplace_back(item.first, item.second.sizes().vec());
    total += item.second.numel();
  }
  check_density(options.density());
  TORCH_CHECK_VALUE(
      !options.k() || !options.per_tensor(),
      "peft: k counts entries of all tensors together; with per_tensor give a "
      "density");
  const int64_t k =
      options.k().value_or(static_cast<int64_t>(options.density() * total));
  return plan(
      SparseTuningOptions(
          options.per_tensor() ? random_mask_per_tensor(
                                     shapes, options.density(), options.seed())
                               : random_mask(shapes, k, options.seed()))
          .modules_to_save(options.modules_to_save()),
      network);
}

} // namespace detail

/// Trains the entries of the mask and freezes everything else.
inline Adapter attach(
    torch::nn::Module& model,
    const SparseTuningOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

/// Trains random entries and freezes everything else.
inline Adapter attach(
    torch::nn::Module& model,
    const RandomMaskOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
