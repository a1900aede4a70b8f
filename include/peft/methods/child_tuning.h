#pragma once

// Child-tuning (Xu et al. 2021, arXiv:2109.05687): of all parameters only a
// child network of them takes a gradient step.
//
//   F, task-free     M ~ Bernoulli(p), anew each step    g <- g · M / p
//   D, task-driven   M = 1[F >= its (1 - p) percentile]  g <- g · M
//
// D's Fisher information F comes from peft::estimate_fisher. As published the
// gradient is masked inside the optimizer's step, after clipping and before
// the moments, which is what peft::MaskedStep does.

#include <peft/methods/fish.h>
#include <peft/train/masked_step.h>

#include <torch/arg.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for Child-tuning. Train with peft::MaskedStep: without it every
/// gradient passes.
///
///   peft::ChildTuningOptions(0.3)                              task-free
///   peft::ChildTuningOptions(0.3).mode("D").fisher(scores)     task-driven
///
/// where the published scores are those of
///
///   peft::estimate_fisher(
///       *model, mean_loss_of_batch,
///       peft::FisherOptions(num_train).per_batch(true).batch_size(16)
///           .max_norm(1).train(true))
struct ChildTuningOptions {
  ChildTuningOptions() = default;
  ChildTuningOptions(double p) : p_(p) {}

  /// The part of the entries that a step moves, in (0, 1]; 1 is the plain
  /// optimizer to the bit.
  TORCH_ARG(double, p) = 0.3;
  /// "F" or "D".
  TORCH_ARG(std::string, mode) = "F";
  /// D: what the entries are chosen by, and only for that; or the mask itself.
  TORCH_ARG(Scores, fisher);
  TORCH_ARG(SparseMask, mask);
  /// "hard": what a step masks keeps its bits; D keeps exactly n - ⌈(1 - p)(n -
  /// 1)⌉ of n entries, of equal scores the earlier ones. "reference": the
  /// published step, where momentum and weight decay move masked entries, and
  /// equal scores at the percentile are all kept.
  TORCH_ARG(std::string, semantics) = "hard";
  /// What is trained: modules or parameters. Default: all of the network.
  TORCH_ARG(Targets, targets);
  /// What the mask is about; the rest of the targets is trained whole. Default:
  /// everything (F), parameters with "layer" in their path (D), that is all but
  /// embeddings, pooler and head in a BERT.
  TORCH_ARG(Targets, masked);
  /// Modules trained whole, whatever the targets: a task head.
  TORCH_ARG(std::vector<std::string>, modules_to_save);
  /// F: the seed of the masks, which have a generator of their own, saved with
  /// the adapter. Default: drawn from LibTorch's generator.
  TORCH_ARG(std::optional<uint64_t>, seed);
};

namespace detail {

/// Where the percentile of p lies among n numbers in ascending order, counted
/// as numpy.percentile(x, (1 - p) * 100) does.
inline double percentile_position(int64_t n, double p) {
  return static_cast<double>(n - 1) * (((1 - p) * 100) / 100);
}

/// The entries of all tensors together at or above the (1 - p) percentile,
/// linear between neighbours: as published, where equal scores at the
/// percentile are all kept.
inline SparseMask above_percentile(const Scores& scores, double p) {
  torch::NoGradGuard no_grad;
  std::vector<Tensor> flat;
  for (const auto& item : scores) {
    flat.push_back(item.second.reshape({-1}).to(at::kCPU, at::kDouble));
  }
  const Tensor all = at::cat(flat);
  const double position = percentile_position(all.numel(), p);
  const auto below = static_cast<int64_t>(std::floor(position));
  const auto value = [&](int64_t i) {
    return std::get<0>(all.kthvalue(std::min(i, all.numel() - 1) + 1))
        .item<double>();
  };
  const double low = value(below), high = value(below + 1);
  const double threshold =
      low + (high - low) * (position - static_cast<double>(below));
  SparseMask mask;
  for (size_t i = 0; i < scores.size(); ++i) {
    mask.set(
        scores[i].first, flat[i].ge(threshold).view(scores[i].second.sizes()));
  }
  return mask;
}

inline SparseMask choose(
    const ChildTuningOptions& options,
    const std::vector<Candidate>& masked,
    const Network& network) {
  if (!options.mask().empty()) {
    for (const auto& entry : options.mask().entries()) {
      candidate_of(entry, masked, network);
    }
    return options.mask();
  }
  TORCH_CHECK_VALUE(
      !options.fisher().empty(),
      "peft: Child-tuning D chooses by Fisher information and got none; give "
      "it .fisher(peft::estimate_fisher(*model, loss_of).scores), or "
      ".mask(mask)");
  const Scores scores =
      scores_of(masked, options.fisher(), network, /*each=*/true);
  check_scores(scores);
  if (options.semantics() == "reference") {
    return above_percentile(scores, options.p());
  }
  const int64_t n = numel_of(scores);
  return top_k(
      scores,
      n - static_cast<int64_t>(std::ceil(percentile_position(n, options.p()))));
}

inline void check(const ChildTuningOptions& options) {
  check_semantics(options.semantics());
  TORCH_CHECK_VALUE(
      options.mode() == "F" || options.mode() == "D",
      "peft: Child-tuning has no mode '",
      options.mode(),
      "'; choose F (task-free) or D (task-driven)");
  TORCH_CHECK_VALUE(
      options.p() > 0 && options.p() <= 1,
      "peft: Child-tuning's p, the part of the entries that a step moves, must "
      "lie in (0, 1], got ",
      options.p(),
      " (the published script takes 0.3)");
  TORCH_CHECK_VALUE(
      options.mode() == "D" ||
          (options.fisher().empty() && options.mask().empty()),
      "peft: Child-tuning F draws its masks; scores and masks are for "
      ".mode(\"D\")");
  TORCH_CHECK_VALUE(
      options.mask().empty() || options.fisher().empty(),
      "peft: Child-tuning got a mask and scores; give it one of the two");
}

inline Plan plan(const ChildTuningOptions& options, const Network& network) {
  check(options);
  for (const auto* targets : {&options.targets(), &options.masked()}) {
    if (targets->kind() == Targets::Kind::list) {
      check_every_name_matches(
          network,
          targets->names(),
          targets == &options.masked() ? "masked" : "targets",
          true);
    }
  }
  const bool fixed = options.mode() == "D";
  std::vector<Candidate> masked, whole;
  for (const auto& candidate : all_candidates(network)) {
    if (is_saved_whole(candidate, options.modules_to_save(), network) ||
        !is_meant(options.targets(), candidate)) {
      continue;
    }
    const bool in_mask = fixed && options.masked().empty()
        ? candidate.path().find("layer") != std::string::npos
        : is_meant(options.masked(), candidate);
    (in_mask ? masked : whole).push_back(candidate);
  }
  TORCH_CHECK(
      !masked.empty(),
      "peft: Child-tuning finds no parameter to mask: ",
      fixed && options.masked().empty()
          ? "none that it trains has 'layer' in its path; say which are meant "
            "with .masked(...)"
          : "none that it trains is in .masked(...)");

  Plan result;
  result.method = "CHILD_TUNING";
  result.options = ChildTuningOptions(options).fisher({}).mask({});
  const SparseMask mask =
      fixed ? choose(options, masked, network) : SparseMask();
  const uint64_t seed = fixed ? 0
      : options.seed()
      ? *options.seed()
      : static_cast<uint64_t>(
            at::randint(std::numeric_limits<int64_t>::max(), {}, at::kLong)
                .item<int64_t>());
  for (const auto& candidate : masked) {
    MaskedCopy::Rule rule;
    rule.hard = options.semantics() == "hard";
    if (fixed) {
      rule.indices = mask.indices_of(candidate.path());
    } else {
      rule.p = options.p();
      rule.seed = mix_seed(seed, result.sites.size());
    }
    result.sites.push_back(plan_at(
        candidate,
        std::make_shared<MaskedCopy>(
            base(candidate.tensor), candidate.key, rule)));
  }
  for (const auto& candidate : whole) {
    result.sites.push_back(plan_copy(*candidate.layer, candidate.key));
  }
  plan_modules_to_save(network, options.modules_to_save(), result.sites);
  return result;
}

} // namespace detail

/// Trains copies of the parameters of `model`, masked; the parameters
/// themselves keep their values until merge. Step with peft::MaskedStep.
inline Adapter attach(
    torch::nn::Module& model,
    const ChildTuningOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
