#pragma once

// Sparse fine-tuning: chosen entries of the network's own parameters train, all
// others keep their bits.
//
//   θ' = θ, but θ_m' trains for m in the mask
//
// What chooses the entries is the method: a Fisher mask (methods/fish.h), a
// lottery ticket (methods/lt_sft.h), or what is here:
//
//   random    k entries or a share of them, drawn without replacement
//   SHiRA     (Bhardwaj et al. 2024, arXiv:2406.13175) r (in + out) entries of
//             each weight, as many as LoRA of rank r trains

#include <peft/core/attach.h>
#include <peft/core/sparse_copy.h>
#include <peft/methods/modules_to_save.h>
#include <peft/methods/sparse_mask.h>

#include <algorithm>
#include <memory>
#include <string>
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

namespace detail {

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
  std::vector<PlannedSite> sites;
  for (const auto& entry : mask.entries()) {
    TORCH_CHECK_VALUE(
        !is_inside(entry.parameter, modules_to_save),
        "peft: the mask names '",
        entry.parameter,
        "', which modules_to_save trains whole; name it in one of the two");
    bool found = false;
    for (const auto& layer : network) {
      for (const auto& [key, tensor] : layer.parameters) {
        if (layer.path(key) != entry.parameter) {
          continue;
        }
        found = true;
        check_adaptable(tensor, entry.parameter);
        SparseMask::check_fits(entry, tensor.sizes());
        for (const auto& other : sites) {
          TORCH_CHECK_VALUE(
              !is_tied(other.tensor, tensor),
              "peft: the mask names '",
              other.parameter,
              "' and '",
              entry.parameter,
              "', which are one tensor in this model; name one of them");
        }
        sites.push_back(
            {layer.path(key),
             layer.path(key),
             layer.name,
             tensor,
             SparseCopy::of(base(tensor), entry.indices, key, additive)});
      }
    }
    TORCH_CHECK_VALUE(
        found,
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

} // namespace detail

/// Trains the entries of the mask and freezes everything else.
inline Adapter attach(
    torch::nn::Module& model,
    const SparseTuningOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
