#pragma once

// Hot-swapping: the values of another folder in the place of an adapter that a
// model has, without attaching or detaching anything.
//
//   auto adapter = peft::load(*model, "german");       // the highest rank
//   first peft::hotswap_adapter(*model, "legal", "default");
//
// Every parameter stays the tensor it is, in the memory it has, so optimizers,
// handles and whoever keeps pointers go on. A lower rank is filled up with
// zeros, which gives the same product, and places that the folder does not have
// become no change. (HF PEFT does this for LoRA, under a check that rslora,
// dropout and alpha_pattern agree; here they are taken over.) The moments of an
// optimizer stay as well, those of the adapter before. A CUDA graph that was
// captured reads the new values, but keeps the scaling that it was captured
// with: swap adapters of one alpha / r under a graph.

#include <peft/io/formats/lora.h>
#include <peft/io/pretrained.h>
#include <peft/methods/lora/factors.h>

#include <algorithm>
#include <any>
#include <cmath>
#include <memory>
#include <string>
#include <typeinfo>
#include <utility>
#include <vector>

namespace peft {

/// Options for hotswap_adapter.
struct HotswapOptions {
  /// As in LoadOptions, for the files.
  TORCH_ARG(bool, strict) = true;
  /// Allows a rank that is higher than the one in memory, as PEFT does: the
  /// tensors stay, their memory does not. The optimizer and captured graphs
  /// must be made again.
  TORCH_ARG(bool, may_grow) = false;
};

namespace detail {

/// The place of `wanted` among the sites of an adapter that are not taken; -1
/// for none.
inline int64_t find_place(
    const AdapterState& state,
    const PlannedSite& wanted,
    const std::vector<const PlannedSite*>& taken) {
  for (size_t i = 0; i < state.sites.size(); ++i) {
    const auto& record = state.sites[i];
    const Delta &own = *record.delta, &other = *wanted.delta;
    const auto& paths = record.parameters;
    if (taken[i] == nullptr && typeid(own) == typeid(other) &&
        record.part == wanted.part &&
        std::find(paths.begin(), paths.end(), wanted.parameter) !=
            paths.end()) {
      return static_cast<int64_t>(i);
    }
  }
  return -1;
}

inline bool have_same_shapes(const Delta& a, const Delta& b) {
  const auto left = a.parameters(), right = b.parameters();
  return std::equal(
      left.begin(),
      left.end(),
      right.begin(),
      right.end(),
      [](const Tensor& x, const Tensor& y) { return x.sizes() == y.sizes(); });
}

/// r, alpha and their patterns as the factors in memory are: after a swap their
/// ranks need not be the file's. Names are those of HF's target modules.
inline void describe_ranks(LoraOptions& options, const AdapterState& state) {
  struct Rank {
    std::string module;
    int64_t r;
    double alpha;
  };
  std::vector<Rank> ranks;
  for (const auto& site : state.sites) {
    const auto shape = lora_shape(*site.delta);
    if (!shape) {
      continue;
    }
    const auto size = static_cast<double>(shape->r);
    ranks.push_back(
        {target_of(site),
         shape->r,
         shape->scaling * (options.rslora() ? std::sqrt(size) : size)});
  }
  options.r(ranks.front().r).alpha(ranks.front().alpha);
  LoraOptions::Pattern r_pattern, alpha_pattern;
  for (const auto& rank : ranks) {
    const std::string name = "^" + exact_pattern(rank.module);
    if (rank.r != options.r()) {
      r_pattern.emplace_back(name, static_cast<double>(rank.r));
    }
    if (rank.alpha != options.alpha()) {
      alpha_pattern.emplace_back(name, rank.alpha);
    }
  }
  options.rank_pattern(r_pattern).alpha_pattern(alpha_pattern);
}

inline void hotswap(
    const Adapter& adapter,
    const Network& network,
    const std::string& folder,
    const HotswapOptions& options) {
  AdapterState& state = *adapter.shared_state();
  TORCH_CHECK(
      !state.merged,
      "peft: adapter '",
      state.name,
      "' is merged into the base and cannot be swapped; unmerge() it first");
  std::string config;
  const Plan plan = plan_from_folder(
      network,
      folder,
      LoadOptions().strict(options.strict()).is_trainable(false),
      config);
  TORCH_CHECK(
      plan.method == state.method,
      "peft: '",
      folder,
      "' holds a ",
      plan.method,
      ", and adapter '",
      state.name,
      "' is a ",
      state.method,
      "; only adapters of one method can be swapped");

  // Everything is checked before anything is written.
  std::vector<const PlannedSite*> source(state.sites.size(), nullptr);
  std::vector<std::string> problems;
  for (const auto& site : plan.sites) {
    const auto place = find_place(state, site, source);
    if (place < 0) {
      problems.push_back(
          site.parameter + ": the folder has '" + site.delta->describe() +
          "' there, the adapter has no such place");
      continue;
    }
    source[static_cast<size_t>(place)] = &site;
  }
  const auto* before = std::any_cast<LoraOptions>(&state.options);
  bool same_places = true, same_ranks = true;
  for (size_t i = 0; i < source.size(); ++i) {
    auto& record = state.sites[i];
    std::string problem;
    if (!record.delta->decorations().empty()) {
      problem = "gates, scales and masks cannot be swapped in place";
    } else if (source[i] != nullptr) {
      problem = record.delta->take(
          *source[i]->delta, options.may_grow(), /*dry_run=*/true);
    } else if (!record.delta->clear(/*dry_run=*/true)) {
      problem = "the folder has nothing there, and '" +
          record.delta->describe() + "' cannot become no change";
    }
    const bool same_rank = source[i] != nullptr &&
        have_same_shapes(*record.delta, *source[i]->delta);
    if (problem.empty() && !same_rank && before == nullptr) {
      problem =
          "only an adapter that is LoRA alone can change ranks or lose a "
          "place";
    }
    same_places = same_places && source[i] != nullptr;
    same_ranks = same_ranks && same_rank;
    if (!problem.empty()) {
      problems.push_back(record.parameters.front() + ": " + problem);
    }
  }
  TORCH_CHECK(
      problems.empty(),
      "peft: '",
      folder,
      "' cannot take the place of adapter '",
      state.name,
      "'; nothing was changed.",
      listed(problems),
      "\n  Load the adapter of the highest rank first, allow "
      "HotswapOptions().may_grow(true), or delete_adapter and load.");

  for (size_t i = 0; i < source.size(); ++i) {
    auto& delta = *state.sites[i].delta;
    if (source[i] != nullptr) {
      delta.take(*source[i]->delta, options.may_grow(), /*dry_run=*/false);
    } else {
      delta.clear(/*dry_run=*/false);
    }
  }
  std::any settings = plan.options;
  if (auto* lora = std::any_cast<LoraOptions>(&settings);
      lora != nullptr && !same_ranks) {
    lora->targets(before->targets()).exclude(before->exclude());
    lora->layers(before->layers()).layers_pattern(before->layers_pattern());
    describe_ranks(*lora, state);
  }
  state.options = std::move(settings);
  if (same_places) {
    state.loaded_config = std::move(config);
  }
}

} // namespace detail

/// Gives adapter `name` the values and settings that `folder` holds, of the
/// same method, in place. All or nothing; refused while the adapter is merged.
/// Takes LoRA, DoRA, (IA)³, HF's tuners, BitFit and LayerNorm tuning,
/// modules_to_save included. Needs the model for itself. requires_grad, scale
/// and enabled stay.
inline void hotswap_adapter(
    torch::nn::Module& model,
    const std::string& folder,
    const std::string& name = "default",
    const HotswapOptions& options = {}) {
  detail::hotswap(
      get_adapter(model, name), describe_network(model), folder, options);
}

} // namespace peft
