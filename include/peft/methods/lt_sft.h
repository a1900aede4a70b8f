#pragma once

// Lottery-ticket sparse fine-tuning, LT-SFT (Ansell et al. 2022,
// arXiv:2110.07560). What moves most when everything trains is what matters:
//
//   1  train all of θ₀, which gives θ₁
//   2  m = the k entries with the largest |θ₁ - θ₀|, of all tensors together
//   3  back to θ₀; train the entries in m alone
//
//   auto full = peft::attach(
//       *model, peft::FullTuningOptions()
//                   .exclude({"LayerNorm"}).modules_to_save({"classifier"}));
//   ... train ...
//   const auto mask = peft::lottery_ticket(full, k);
//   full.detach();
//   auto adapter = peft::attach(
//       *model,
//       peft::SparseTuningOptions(mask).modules_to_save({"classifier"}));
//   ... train again ...
//
// The published runs freeze the LayerNorms, train the head whole in both phases
// and, for languages, pull towards θ₀: loss + λ Σ|θ - θ₀| / N with λ = 0.1 and
// N all parameters of the network. Tasks and languages add up: train both with
// SparseTuningOptions::additive and attach the two.

#include <peft/core/adapter.h>
#include <peft/core/sparse_copy.h>
#include <peft/core/trained_copy.h>
#include <peft/methods/full_tuning.h>
#include <peft/methods/sparse_mask.h>

#include <any>
#include <string>
#include <utility>

namespace peft {

namespace detail {

/// The base of a site in the copy's dtype, and the rows that the copy is of.
inline Tensor start_of(const SiteRecord& record, const TrainedCopy& copy) {
  Tensor start = base_of(tensor_of(*lock_site(record))).detach();
  if (copy.rows()) {
    start = start.slice(0, copy.rows()->begin, copy.rows()->end);
  }
  return start.to(copy.value.scalar_type());
}

} // namespace detail

/// The k entries that full fine-tuning has moved most, over all tensors;
/// `modules_to_save` have none. Of equal ones the first in the network's order
/// win.
inline SparseMask lottery_ticket(const Adapter& full, int64_t k) {
  full.name(); // an empty or detached handle is an error
  const auto& state = *full.shared_state();
  const auto* options = std::any_cast<FullTuningOptions>(&state.options);
  TORCH_CHECK(
      options != nullptr,
      "peft: a lottery ticket is drawn from full fine-tuning, and adapter '",
      state.name,
      "' is a ",
      state.method,
      "; attach peft::FullTuningOptions and train first");
  TORCH_CHECK(
      !state.merged,
      "peft: adapter '",
      state.name,
      "' is merged, and the start is out of sight; unmerge() it first");
  torch::NoGradGuard no_grad;
  Scores scores;
  bool moved = false;
  for (const auto& record : state.sites) {
    const auto& path = record.parameters.front();
    if (detail::is_inside(path, options->modules_to_save())) {
      continue;
    }
    const auto& copy = dynamic_cast<const TrainedCopy&>(*record.delta);
    scores.emplace_back(
        path, (copy.value - detail::start_of(record, copy)).abs());
    moved = moved || scores.back().second.any().item<bool>();
  }
  TORCH_CHECK(
      moved,
      "peft: adapter '",
      state.name,
      "' is where it started, and a lottery ticket takes what has moved; train "
      "it first");
  return top_k(scores, k);
}

/// Σ|θ - θ₀| over what `adapter`, of full or sparse fine-tuning, trains;
/// differentiable. Published as a part of the loss: λ times this over the
/// number of parameters of the network.
inline Tensor distance_from_start(const Adapter& adapter) {
  adapter.name();
  const auto& state = *adapter.shared_state();
  TORCH_CHECK(
      !state.merged,
      "peft: adapter '",
      state.name,
      "' is merged, and the start is out of sight; unmerge() it first");
  Tensor sum;
  for (const auto& record : state.sites) {
    Tensor moved;
    if (const auto* copy =
            dynamic_cast<const TrainedCopy*>(record.delta.get())) {
      moved = copy->value - detail::start_of(record, *copy);
    } else if (
        const auto* sparse =
            dynamic_cast<const SparseCopy*>(record.delta.get())) {
      moved = sparse->moved(
          detail::base_of(detail::tensor_of(*detail::lock_site(record)))
              .detach());
    } else {
      TORCH_CHECK(
          false,
          "peft: '",
          record.name,
          "' carries ",
          record.delta->describe(),
          ", which has no start to be far from; this is for full and sparse "
          "fine-tuning");
    }
    const Tensor distance = moved.abs().sum();
    sum = sum.defined() ? sum + distance.to(sum.device()) : distance;
  }
  return sum;
}

} // namespace peft
