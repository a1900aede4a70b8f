#pragma once

// FISH mask (Sung, Nair and Raffel 2021, arXiv:2111.09839): train the entries
// of the network that have most Fisher information on the task, chosen once,
// and nothing else.
//
//   M = the k entries with the largest F     F from peft::estimate_fisher
//   k = ⌊keep_ratio · n⌋ - head              n the network's parameters, all
//
// The task head is trained whole and lies inside the budget. Of equal scores
// the earlier entry is taken.

#include <peft/core/attach.h>
#include <peft/core/masked_copy.h>
#include <peft/methods/modules_to_save.h>
#include <peft/methods/sparse_mask.h>
#include <peft/methods/sparse_tuning.h>

#include <torch/arg.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for FISH mask.
///
///   auto estimate = peft::estimate_fisher(*model, loss_of, 1024);
///   peft::FishOptions(0.005).fisher(estimate.scores)
///       .modules_to_save({"classifier"})
///   peft::FishOptions(0.002).fisher(scores)    as t-few: no head
///   peft::FishOptions().mask(mask)             the entries of a mask
struct FishOptions {
  FishOptions() = default;
  FishOptions(double keep_ratio) : keep_ratio_(keep_ratio) {}

  /// Trained parameters, the head's included, to all of the network's.
  TORCH_ARG(double, keep_ratio) = 0.005;
  /// What the entries are chosen by, from estimate_fisher.
  TORCH_ARG(Scores, fisher);
  /// The entries themselves, in the place of scores and keep_ratio.
  TORCH_ARG(SparseMask, mask);
  /// "fisher", or "random": as many entries, drawn with `seed`.
  TORCH_ARG(std::string, selection) = "fisher";
  TORCH_ARG(uint64_t, seed) = 0;
  /// "hard": all other entries keep their bits, and the optimizer's state is of
  /// the entries alone. "reference": the published step. Every parameter has a
  /// trained copy, gradients are masked as they arrive, before any clipping,
  /// and weight decay moves what the mask leaves out.
  TORCH_ARG(std::string, semantics) = "hard";
  /// Only entries of these modules (or these parameters). Default: anywhere,
  /// embeddings, biases and normalisations included.
  TORCH_ARG(Targets, targets);
  /// Modules trained whole, inside the budget: a task head.
  TORCH_ARG(std::vector<std::string>, modules_to_save);
  /// Whether the head lies inside the budget; false leaves it to the mask.
  TORCH_ARG(bool, count_head) = true;
};

namespace detail {

/// One parameter that a sparse method may move, tied ones once.
struct Candidate {
  const Layer* layer;
  std::string key;
  Tensor tensor;

  std::string path() const {
    return layer->path(key);
  }
};

inline void check_semantics(const std::string& semantics) {
  TORCH_CHECK_VALUE(
      semantics == "hard" || semantics == "reference",
      "peft: there are no semantics '",
      semantics,
      "' of a mask; choose hard or reference");
}

/// Every floating point parameter of the network, a tied one under its first
/// name.
inline std::vector<Candidate> all_candidates(const Network& network) {
  std::vector<Candidate> result;
  for (const auto& layer : network) {
    for (const auto& [key, tensor] : layer.parameters) {
      const Tensor& t = tensor;
      if (t.defined() && t.is_floating_point() &&
          std::none_of(result.begin(), result.end(), [&](const auto& other) {
            return is_tied(other.tensor, t);
          })) {
        result.push_back({&layer, key, t});
      }
    }
  }
  return result;
}

/// Whether `targets` (or their being empty) names a parameter.
inline bool is_meant(const Targets& targets, const Candidate& candidate) {
  return targets.empty() ||
      targets.matches(candidate.layer->name, *candidate.layer) ||
      targets.matches(candidate.path(), *candidate.layer);
}

/// Whether modules_to_save trains it, under whichever of its names.
inline bool is_saved_whole(
    const Candidate& candidate,
    const std::vector<std::string>& modules_to_save,
    const Network& network) {
  for (const auto& layer : network) {
    if (is_inside(layer.name, modules_to_save) &&
        std::any_of(
            layer.parameters.begin(),
            layer.parameters.end(),
            [&](const auto& p) {
              return is_tied(p.second, candidate.tensor);
            })) {
      return true;
    }
  }
  return false;
}

/// The scores of `candidates`, in the network's order; a candidate without one
/// is an error where `each` is to have some. A score of no parameter is an
/// error.
inline Scores scores_of(
    const std::vector<Candidate>& candidates,
    const Scores& scores,
    const Network& network,
    bool each) {
  for (const auto& item : scores) {
    const auto found =
        std::any_of(network.begin(), network.end(), [&](const Layer& layer) {
          return std::any_of(
              layer.parameters.begin(),
              layer.parameters.end(),
              [&](const auto& p) { return layer.path(p.first) == item.first; });
        });
    TORCH_CHECK(
        found,
        "peft: the scores name '",
        item.first,
        "', which is no parameter of this network.",
        near_misses(network, item.first));
  }
  Scores result;
  for (const auto& candidate : candidates) {
    const auto found =
        std::find_if(scores.begin(), scores.end(), [&](const auto& item) {
          return item.first == candidate.path();
        });
    if (found == scores.end()) {
      TORCH_CHECK(
          !each,
          "peft: there are no scores of '",
          candidate.path(),
          "'; were the estimate's targets narrower than the method's?");
      continue;
    }
    TORCH_CHECK_VALUE(
        found->second.sizes() == candidate.tensor.sizes(),
        "peft: the scores of '",
        found->first,
        "' have shape ",
        found->second.sizes(),
        ", and the parameter ",
        candidate.tensor.sizes());
    result.push_back(*found);
  }
  return result;
}

inline PlannedSite plan_at(
    const Candidate& candidate,
    std::shared_ptr<Delta> delta) {
  return {
      candidate.path(),
      candidate.path(),
      candidate.layer->name,
      candidate.tensor,
      std::move(delta)};
}

/// The candidate that a mask's entry is about, after checking that it fits.
inline const Candidate& candidate_of(
    const SparseMask::Entry& entry,
    const std::vector<Candidate>& candidates,
    const Network& network) {
  for (const auto& candidate : candidates) {
    if (candidate.path() == entry.parameter) {
      SparseMask::check_fits(entry, candidate.tensor.sizes());
      return candidate;
    }
  }
  TORCH_CHECK(
      false,
      "peft: the mask names '",
      entry.parameter,
      "', which is no parameter that it may train (one of the head, of no "
      "target, a tied one's second name, or unknown).",
      near_misses(network, entry.parameter));
  return candidates.front();
}

/// The k entries that the options choose among `candidates`.
inline SparseMask choose(
    const FishOptions& options,
    const std::vector<Candidate>& candidates,
    int64_t k,
    const Network& network) {
  if (options.selection() == "random") {
    Shapes shapes;
    for (const auto& candidate : candidates) {
      shapes.emplace_back(candidate.path(), candidate.tensor.sizes().vec());
    }
    return random_mask(shapes, k, options.seed());
  }
  TORCH_CHECK_VALUE(
      !options.fisher().empty(),
      "peft: FISH mask chooses by Fisher information and got none; give it "
      ".fisher(peft::estimate_fisher(*model, loss_of).scores), or .mask(mask)");
  return top_k(
      scores_of(candidates, options.fisher(), network, /*each=*/false), k);
}

inline Plan plan(const FishOptions& options, const Network& network) {
  check_semantics(options.semantics());
  TORCH_CHECK_VALUE(
      options.selection() == "fisher" || options.selection() == "random",
      "peft: FISH mask has no selection '",
      options.selection(),
      "'; choose fisher or random");
  TORCH_CHECK_VALUE(
      options.keep_ratio() > 0 && options.keep_ratio() <= 1,
      "peft: keep_ratio must lie in (0, 1], got ",
      options.keep_ratio());
  TORCH_CHECK_VALUE(
      options.mask().empty() || options.fisher().empty(),
      "peft: FISH mask got a mask and scores; give it one of the two");
  if (options.targets().kind() == Targets::Kind::list) {
    check_every_name_matches(
        network, options.targets().names(), "targets", true);
  }
  Plan result;
  result.method = "FISH";
  // What the entries were chosen by is dense, and is not kept.
  result.options = FishOptions(options).fisher({}).mask({});

  int64_t total = 0, head = 0;
  std::vector<Candidate> candidates;
  for (const auto& candidate : all_candidates(network)) {
    const int64_t size = candidate.tensor.numel();
    total += size;
    if (is_saved_whole(candidate, options.modules_to_save(), network)) {
      head += size;
    } else if (is_meant(options.targets(), candidate)) {
      candidates.push_back(candidate);
    }
  }
  SparseMask mask = options.mask();
  if (mask.empty()) {
    const auto budget =
        static_cast<int64_t>(static_cast<double>(total) * options.keep_ratio());
    const int64_t keep = budget - (options.count_head() ? head : 0);
    TORCH_CHECK_VALUE(
        keep > 0,
        "peft: a keep_ratio of ",
        options.keep_ratio(),
        " of ",
        total,
        " parameters is a budget of ",
        budget,
        head > 0 && options.count_head()
            ? c10::str(
                  ", and modules_to_save alone takes ",
                  head,
                  " of it; raise keep_ratio, or leave the head out of the "
                  "budget with count_head(false)")
            : std::string("; an empty mask trains nothing"));
    mask = choose(options, candidates, keep, network);
  }
  if (options.semantics() == "hard") {
    result.sites = plan_sparse(
        mask, network, /*additive=*/false, options.modules_to_save());
    return result;
  }
  for (const auto& entry : mask.entries()) {
    candidate_of(entry, candidates, network); // all fit, before any is built
  }
  for (const auto& candidate : candidates) {
    MaskedCopy::Rule rule;
    rule.indices = mask.indices_of(candidate.path());
    rule.hard = false;
    rule.in_backward = true;
    result.sites.push_back(plan_at(
        candidate,
        std::make_shared<MaskedCopy>(
            base(candidate.tensor), candidate.key, rule)));
  }
  plan_modules_to_save(network, options.modules_to_save(), result.sites);
  return result;
}

} // namespace detail

/// Trains the chosen entries of `model` and freezes everything else.
inline Adapter attach(
    torch::nn::Module& model,
    const FishOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
