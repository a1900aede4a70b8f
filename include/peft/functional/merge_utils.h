#pragma once

// One tensor from several that were trained apart (task tensors tᵢ), as HF
// PEFT's utils/merge_utils.py computes it:
//
//   task arithmetic   Σ wᵢ tᵢ                                (arXiv:2212.04089)
//   magnitude prune   Σ wᵢ p(tᵢ), p keeps the largest entries
//   TIES              p(tᵢ), a sign elected for each entry, and the mean of the
//                     wᵢ p(tᵢ) that have it                  (arXiv:2306.01708)
//   DARE              tᵢ with entries dropped at random and the others divided
//                     by the density, then a sum or TIES     (arXiv:2311.03099)

#include <torch/types.h>

#include <tuple>
#include <vector>

namespace peft {

namespace functional {

using torch::Tensor;

/// How TIES elects the sign of an entry: by the sum of the tensors, or by the
/// number of tensors with either sign. Zero counts as positive.
enum class MajoritySign { total, frequency };

/// The density is the share of entries that pruning keeps.
inline void check_density(double density) {
  TORCH_CHECK_VALUE(
      density > 0.0 && density <= 1.0,
      "peft: the density must lie in (0, 1], got ",
      density);
}

/// Keeps the ⌊density · n⌋ entries of largest magnitude; the others are zero.
inline Tensor prune_by_magnitude(const Tensor& t, double density) {
  check_density(density);
  if (density == 1.0) {
    return t;
  }
  const auto kept =
      static_cast<int64_t>(density * static_cast<double>(t.numel()));
  const Tensor largest = std::get<1>(t.abs().reshape(-1).topk(kept));
  const Tensor mask =
      at::zeros({t.numel()}, t.options()).index_fill_(0, largest, 1);
  return t * mask.reshape(t.sizes());
}

/// Keeps each entry with probability `density`; `rescale` divides what stays by
/// it. Draws from the default generator what PEFT draws.
inline Tensor prune_at_random(const Tensor& t, double density, bool rescale) {
  check_density(density);
  if (density == 1.0) {
    return t;
  }
  const Tensor kept = t * at::bernoulli(at::full_like(t, density));
  return rescale ? kept / density : kept;
}

/// Where tᵢ has the elected sign; `stacked` is [n, ...], and so is the result.
inline Tensor majority_sign_mask(const Tensor& stacked, MajoritySign method) {
  const Tensor sign = stacked.sign();
  const Tensor votes =
      method == MajoritySign::total ? stacked.sum(0) : sign.sum(0);
  return sign == at::where(votes >= 0, 1, -1);
}

/// The mean of the entries that the mask admits; zero where it admits none.
inline Tensor disjoint_merge(const Tensor& stacked, const Tensor& mask) {
  return (stacked * mask).sum(0) / mask.sum(0).clamp_min(1);
}

namespace detail {

/// wᵢ tᵢ, stacked.
inline Tensor weighted(
    const std::vector<Tensor>& tensors,
    const std::vector<double>& weights) {
  TORCH_CHECK(
      !tensors.empty() && tensors.size() == weights.size(),
      "peft: there must be one weight for each tensor, got ",
      tensors.size(),
      " tensors and ",
      weights.size(),
      " weights");
  const Tensor stacked = at::stack(tensors);
  std::vector<int64_t> shape(stacked.dim(), 1);
  shape[0] = -1;
  return stacked *
      torch::tensor(weights, torch::kDouble).to(stacked.options()).view(shape);
}

} // namespace detail

/// Σ wᵢ tᵢ.
inline Tensor task_arithmetic(
    const std::vector<Tensor>& tensors,
    const std::vector<double>& weights) {
  return detail::weighted(tensors, weights).sum(0);
}

/// Σ wᵢ tᵢ over the largest entries of each.
inline Tensor magnitude_prune(
    std::vector<Tensor> tensors,
    const std::vector<double>& weights,
    double density) {
  for (auto& t : tensors) {
    t = prune_by_magnitude(t, density);
  }
  return task_arithmetic(tensors, weights);
}

/// TIES: the signs are elected before the weights are applied.
inline Tensor ties(
    std::vector<Tensor> tensors,
    const std::vector<double>& weights,
    double density,
    MajoritySign method = MajoritySign::total) {
  for (auto& t : tensors) {
    t = prune_by_magnitude(t, density);
  }
  return disjoint_merge(
      detail::weighted(tensors, weights),
      majority_sign_mask(at::stack(tensors), method));
}

/// Σ wᵢ tᵢ over entries chosen at random, rescaled.
inline Tensor dare_linear(
    std::vector<Tensor> tensors,
    const std::vector<double>& weights,
    double density) {
  for (auto& t : tensors) {
    t = prune_at_random(t, density, /*rescale=*/true);
  }
  return task_arithmetic(tensors, weights);
}

/// TIES over entries chosen at random, rescaled.
inline Tensor dare_ties(
    std::vector<Tensor> tensors,
    const std::vector<double>& weights,
    double density,
    MajoritySign method = MajoritySign::total) {
  for (auto& t : tensors) {
    t = prune_at_random(t, density, /*rescale=*/true);
  }
  return disjoint_merge(
      detail::weighted(tensors, weights),
      majority_sign_mask(at::stack(tensors), method));
}

} // namespace functional

} // namespace peft
