#pragma once

// SparseAdapter (He et al. 2022, arXiv:2210.04284): prune an adapter before it
// is trained, so that a wider one costs no more. Of the N entries of all its
// weights (not biases), those with the highest scores stay:
//
//   kept = N - ⌈(1 - keep) N⌉        scores: train/pruning_scores.h
//
// "Large-Sparse" is a width of k r with keep = 1 / k, as many trained weights
// as a dense r. Where scores are equal, the entries that come first win; the
// published rule, score > the ⌈(1 - keep) N⌉-th lowest, drops all that tie
// (drop_ties). The published code calls the share that stays `sparsity`.
//
// In several rounds the share shrinks by keep^((e + 1) / iterations), each
// round scoring all entries anew in the network that the round before left.

#include <peft/methods/houlsby.h>
#include <peft/methods/lora.h>
#include <peft/methods/masked.h>
#include <peft/methods/parallel_adapter.h>
#include <peft/methods/pfeiffer.h>
#include <peft/train/pruning_scores.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for prune.
struct PruneOptions {
  PruneOptions(std::string score = "rand", double keep = 0.5)
      : score_(std::move(score)), keep_(keep) {}

  /// "rand", "magnitude", "snip", "grasp" or "synflow".
  TORCH_ARG(std::string, score);
  /// The share of the weights' entries that stays, in (0, 1].
  TORCH_ARG(double, keep);
  TORCH_ARG(int64_t, iterations) = 1;
  /// Of "rand".
  TORCH_ARG(uint64_t, seed) = 0;
  /// Entries that tie with the threshold go too, as published; fewer than the
  /// share may be left.
  TORCH_ARG(bool, drop_ties) = false;
};

namespace detail {

inline bool needs_losses(const PruneOptions& options) {
  return options.score() == "snip" || options.score() == "grasp";
}

inline void check(const PruneOptions& options) {
  TORCH_CHECK_VALUE(
      is_one_of(
          options.score(), {"rand", "magnitude", "snip", "grasp", "synflow"}),
      "peft: pruning knows no score '",
      options.score(),
      "'; choose among rand, magnitude, snip, grasp, synflow");
  TORCH_CHECK_VALUE(
      options.keep() > 0 && options.keep() <= 1,
      "peft: keep, the share of the weights that stays, must lie in (0, 1], "
      "got ",
      options.keep());
  TORCH_CHECK_VALUE(
      options.iterations() >= 1,
      "peft: pruning takes 1 iteration or more, got ",
      options.iterations());
}

/// ⌈(1 - keep) n⌉, which entries go.
inline int64_t num_pruned(int64_t n, double keep) {
  return static_cast<int64_t>(std::ceil((1.0 - keep) * static_cast<double>(n)));
}

/// Which entries stay, one bool tensor a weight.
inline std::vector<Tensor> choose_kept(
    const ScoredWeights& weights,
    const std::vector<Tensor>& values,
    double keep,
    bool drop_ties) {
  Scores scores;
  bool any = false;
  for (size_t i = 0; i < weights.size(); ++i) {
    scores.emplace_back(weights[i].name, values[i].detach());
    any = any || at::count_nonzero(values[i]).item<int64_t>() > 0;
  }
  const int64_t n = numel_of(scores);
  const int64_t pruned = num_pruned(n, keep);
  TORCH_CHECK_VALUE(
      pruned < n,
      "peft: an empty mask: keep = ",
      keep,
      " of ",
      n,
      " entries leaves none; choose a larger keep");
  std::vector<Tensor> result;
  if (pruned == 0) {
    for (const auto& w : weights) {
      result.push_back(at::ones_like(w.kept, at::kBool));
    }
    return result;
  }
  TORCH_CHECK(
      any,
      "peft: every score is zero, so none is higher than another. At a start "
      "with a zero factor (LoRA's B, an up-projection of zeros) this is so for "
      "gradient scores; start from another init, prune after some steps, or "
      "choose 'rand' or 'magnitude'");
  if (drop_ties) {
    check_scores(scores);
    std::vector<Tensor> flat;
    for (const auto& item : scores) {
      flat.push_back(item.second.reshape({-1}).to(at::kCPU));
    }
    const Tensor threshold = std::get<0>(at::cat(flat).kthvalue(pruned));
    int64_t kept = 0;
    for (const auto& item : scores) {
      result.push_back(item.second.gt(threshold.to(item.second.device())));
      kept += result.back().sum().item<int64_t>();
    }
    TORCH_CHECK_VALUE(
        kept > 0,
        "peft: an empty mask: the highest score ties with the threshold, and "
        "drop_ties drops all that do");
    return result;
  }
  const SparseMask mask = top_k(scores, n - pruned);
  for (const auto& w : weights) {
    const Tensor kept =
        at::zeros({w.kept.numel()}, at::TensorOptions(at::kBool));
    kept.index_fill_(0, mask.indices_of(w.name), true);
    result.push_back(kept.view(w.kept.sizes()).to(w.kept.device()));
  }
  return result;
}

/// The masked weights of an adapter's sites; `sizes(site)` is the shape of what
/// the site adapts.
template <class Sites, class Sizes>
ScoredWeights weights_to_score(const Sites& sites, Sizes&& sizes) {
  ScoredWeights result;
  for (const auto& site : sites) {
    for (const auto& mask : masks_of(std::vector{site})) {
      for (const auto& w : mask->weights()) {
        ScoredWeight each;
        each.name = std::to_string(result.size());
        each.parameter = w.parameter;
        each.start = w.parameter.detach().clone();
        each.kept = w.kept.ne(0);
        each.delta = site.delta;
        each.sizes = sizes(site);
        result.push_back(std::move(each));
      }
    }
  }
  return result;
}

/// Prunes `weights`, whose masks are `masks`; all of it, or nothing. How many
/// entries are left.
inline int64_t prune_weights(
    ScoredWeights weights,
    const std::vector<std::shared_ptr<MaskDecoration>>& masks,
    const PruneOptions& options,
    const PruningLosses& losses) {
  check(options);
  TORCH_CHECK_VALUE(
      !needs_losses(options) || !losses.empty(),
      "peft: the score '",
      options.score(),
      "' looks at gradients; hand prune() a loss");
  torch::AutoGradMode with_grad(true);
  std::vector<Tensor> held; // before
  int64_t left = 0;
  for (const auto& w : weights) {
    held.push_back(w.kept.logical_not());
    left += w.kept.sum().item<int64_t>();
  }
  const auto set_masks = [&](const std::vector<Tensor>& kept) {
    size_t next = 0;
    for (const auto& mask : masks) {
      for (size_t i = 0; i < mask->weights().size(); ++i) {
        mask->set(i, kept[next++]);
      }
    }
  };
  // Scores want the gradients of all entries, those a round has pruned too.
  std::vector<Tensor> all, before;
  for (const auto& w : weights) {
    all.push_back(at::ones_like(w.kept));
    before.push_back(w.kept);
  }
  set_masks(all);
  try {
    const auto generator = at::detail::createCPUGenerator(options.seed());
    for (int64_t round = 0; round < options.iterations(); ++round) {
      const double keep = std::pow(
          options.keep(),
          static_cast<double>(round + 1) /
              static_cast<double>(options.iterations()));
      auto scores = pruning_scores(options.score(), weights, losses, generator);
      int64_t n = 0;
      for (size_t i = 0; i < weights.size(); ++i) {
        // What was pruned by an earlier call has lost its value.
        scores[i] =
            scores[i]
                .to(held[i].device())
                .masked_fill(held[i], -std::numeric_limits<double>::infinity());
        n += scores[i].numel();
      }
      TORCH_CHECK_VALUE(
          n - num_pruned(n, keep) <= left,
          "peft: of this adapter's ",
          n,
          " entries ",
          left,
          " are left by earlier pruning, fewer than keep = ",
          keep,
          " asks for");
      const auto kept = choose_kept(weights, scores, keep, options.drop_ties());
      torch::NoGradGuard no_grad;
      for (size_t i = 0; i < weights.size(); ++i) {
        weights[i].kept = kept[i];
        weights[i].parameter.copy_(
            weights[i].start.masked_fill(kept[i].logical_not(), 0));
      }
    }
  } catch (...) {
    torch::NoGradGuard no_grad;
    for (auto& w : weights) {
      w.parameter.copy_(w.start);
    }
    set_masks(before);
    throw;
  }
  int64_t count = 0;
  std::vector<Tensor> kept;
  for (const auto& w : weights) {
    kept.push_back(w.kept);
    count += w.kept.sum().item<int64_t>();
  }
  set_masks(kept);
  return count;
}

} // namespace detail

/// Prunes a masked adapter: of the entries of all its weights together the
/// share `keep` stays, the others are zero from now on. Returns how many are
/// left. `losses`, for "snip" and "grasp", compute one batch each; run them in
/// eval mode, as published. On an error nothing has changed.
///
///   peft::prune(adapter, peft::PruneOptions("snip", 0.25),
///               {[&] { return cross_entropy(model->forward(x), y); }});
inline int64_t prune(
    Adapter& adapter,
    const PruneOptions& options = {},
    const PruningLosses& losses = {}) {
  adapter.name(); // an empty or detached handle is an error
  const auto& sites = adapter.shared_state()->sites;
  const auto masks = detail::masks_of(sites);
  TORCH_CHECK(
      !masks.empty(),
      "peft: adapter '",
      adapter.name(),
      "' has no masks to prune by; attach it as "
      "peft::Masked(options) or peft::SparseAdapterOptions(options)");
  TORCH_CHECK(
      !adapter.is_merged(),
      "peft: adapter '",
      adapter.name(),
      "' is merged; unmerge() before pruning it");
  return detail::prune_weights(
      detail::weights_to_score(
          sites,
          [](const detail::SiteRecord& site) {
            return detail::lock_site(site)->sizes;
          }),
      masks,
      options,
      losses);
}

/// Options for SparseAdapter: those of any adapter, and how it is pruned.
///
///   peft::SparseAdapterOptions(peft::PfeifferOptions(4 * 48), 0.25)
///
/// Scores that need no data prune when it is attached; with "snip" or "grasp"
/// it is dense until prune(adapter, options.prune(), losses).
struct SparseAdapterOptions {
  explicit SparseAdapterOptions(AnyOptions adapter, double keep = 0.5)
      : adapter_(std::move(adapter)), prune_("rand", keep) {}

  TORCH_ARG(AnyOptions, adapter);
  TORCH_ARG(PruneOptions, prune);
};

namespace detail {

inline Plan plan(const SparseAdapterOptions& options, const Network& network) {
  check(options.prune());
  Plan result = masked(options.adapter().plan(network));
  if (!needs_losses(options.prune())) {
    prune_weights(
        weights_to_score(
            result.sites,
            [](const PlannedSite& site) {
              return site.tensor.defined() ? site.tensor.sizes().vec()
                                           : std::vector<int64_t>{};
            }),
        masks_of(result.sites),
        options.prune(),
        {});
  }
  return result;
}

} // namespace detail

/// Puts a pruned adapter on `model` and freezes everything else.
inline Adapter attach(
    torch::nn::Module& model,
    const SparseAdapterOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
