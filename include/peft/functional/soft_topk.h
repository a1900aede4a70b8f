#pragma once

// The soft top-k of CoDA's router (Lei et al. 2023, arXiv:2304.04947): of n
// scores s choose k smoothly,
//
//   λ = argmax sᵀλ + ε H(λ)   with 0 ≤ λ ≤ 1 and Σ λ = k
//   λᵢ = min(1, exp((sᵢ + a) / ε))   with the one a that makes the sum k
//
// ε → 0 is the hard top-k. The paper finds a by some steps of coordinate
// descent; one sort gives it exactly.

#include <ATen/ATen.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>
#include <torch/types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace peft {

namespace functional {

using torch::Tensor;

namespace detail {

/// Scores ready for a solver: float32 at least, and who may be chosen.
struct TopKProblem {
  Tensor scores; // [*, n]
  Tensor mask; // [*, n], true where an entry may be chosen
  Tensor count; // [*, 1], int64: how many those are
  Tensor k; // [*, 1], int64: k, or count where that is less
};

inline void check_topk(const Tensor& scores, const Tensor& mask) {
  TORCH_CHECK_VALUE(
      scores.dim() > 0 && scores.is_floating_point(),
      "peft: top-k takes scores [*, n] of a floating point type, got ",
      scores.toString(),
      " of shape ",
      scores.sizes());
  TORCH_CHECK_VALUE(
      !mask.defined() ||
          (mask.scalar_type() == at::kBool && mask.sizes() == scores.sizes()),
      "peft: the mask of top-k is boolean (true: may be chosen) and has the "
      "shape of the scores ",
      scores.sizes(),
      ", got ",
      mask.defined() ? mask.toString() : "",
      " of shape ",
      mask.defined() ? mask.sizes() : at::IntArrayRef());
}

inline void check_k(int64_t k) {
  TORCH_CHECK_VALUE(k > 0, "peft: top-k needs a k of at least 1, got ", k);
}

/// One k for all rows, as a tensor.
inline Tensor same_k(const Tensor& scores, int64_t k) {
  check_k(k);
  return at::full({1}, k, scores.options().dtype(at::kLong));
}

inline TopKProblem topk_problem(
    const Tensor& scores,
    const Tensor& k,
    double epsilon,
    const Tensor& mask) {
  check_topk(scores, mask);
  TORCH_CHECK_VALUE(
      epsilon > 0 && std::isfinite(epsilon),
      "peft: the epsilon of soft top-k must be positive, got ",
      epsilon);
  TopKProblem result;
  result.scores =
      scores.scalar_type() == at::kDouble ? scores : scores.to(at::kFloat);
  result.mask = mask.defined()
      ? mask
      : at::ones_like(scores, scores.options().dtype(at::kBool));
  result.count = result.mask.sum(-1, /*keepdim=*/true);
  result.k = at::minimum(result.count, k.clamp_min(1));
  return result;
}

} // namespace detail

/// The exact λ `[*, n]` for scores `[*, n]`: Σ λ = k, 0 ≤ λ ≤ 1. `mask` (true:
/// may be chosen) leaves entries out: their λ and gradient are 0, and k is at
/// most the number of entries that are left, which then all get 1. A tensor k
/// `[*, 1]` of integers gives each row its own. Infinite scores are taken as
/// limits. float64 stays, all else is computed and returned in float32.
/// Differentiable any number of times: with u the entries below 1,
/// dλᵤ = λᵤ / ε (dsᵤ − Σ λᵤ dsᵤ / Σ λᵤ), and 0 for the others.
inline Tensor soft_topk(
    const Tensor& scores,
    const Tensor& k,
    double epsilon,
    const Tensor& mask = {}) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      c10::autocast_dispatch_keyset);
  const auto problem = detail::topk_problem(scores, k, epsilon, mask);
  const int64_t n = scores.size(-1);
  if (scores.numel() == 0) {
    return problem.scores.clone();
  }
  const double infinity = std::numeric_limits<double>::infinity();
  const Tensor closed = problem.mask.logical_not();
  const Tensor s = problem.scores.masked_fill(closed, -infinity);

  // In units of ε above the k-th score, where rounding is finest. What lies
  // log n above it is at 1 in any case.
  const Tensor sorted = std::get<0>(s.detach().sort(-1, /*descending=*/true));
  const Tensor kth = sorted.gather(-1, (problem.k - 1).clamp_min(0));
  const auto above_kth = [&](const Tensor& x) {
    const Tensor same_infinity = x.isinf().logical_and(x == kth);
    return (x - kth)
        .masked_fill(same_infinity, 0.0)
        .div(epsilon)
        .clamp_max(std::log(static_cast<double>(n)) + 1);
  };
  const Tensor t = above_kth(s);

  // The j highest are at 1 as long as the next would get more than 1 of what
  // is left: (k − j) exp(tⱼ) / Σ_{i ≥ j} exp(tᵢ) > 1.
  Tensor full;
  {
    at::NoGradGuard no_grad;
    const Tensor rank = at::arange(n, problem.k.options());
    const Tensor u = above_kth(sorted);
    const Tensor rest = u.flip(-1).logcumsumexp(-1).flip(-1);
    const Tensor left = (problem.k - rank).clamp_min(1).to(u.scalar_type());
    const Tensor over = u + left.log() > rest;
    const Tensor lowest_over =
        u.masked_fill(over.logical_not(), infinity).amin(-1, true);
    full = (t >= lowest_over)
               .logical_or(problem.k == problem.count)
               .logical_and(problem.mask);
  }
  const Tensor out = full.logical_or(closed);
  const Tensor left = (problem.k - full.sum(-1, /*keepdim=*/true)).clamp_min(0);
  // A large negative number instead of -inf: a row may have nothing left.
  const Tensor share = t.masked_fill(out, -1e30).softmax(-1);
  return (share * left)
      .clamp_max(1.0)
      .masked_fill(closed, 0.0)
      .masked_fill(full, 1.0);
}

inline Tensor soft_topk(
    const Tensor& scores,
    int64_t k,
    double epsilon,
    const Tensor& mask = {}) {
  return soft_topk(scores, detail::same_k(scores, k), epsilon, mask);
}

/// The published solver: `iterations` steps of coordinate descent with an ε
/// that starts at `epsilon_init` and shrinks by `epsilon_decay` a step until it
/// is `epsilon`. For routers that were trained with it: at a small ε twenty
/// steps are not enough for Σ λ = k. Scores must be finite. Autograd goes
/// through the steps. Shapes, mask and k as in soft_topk.
inline Tensor soft_topk_iterative(
    const Tensor& scores,
    const Tensor& k,
    double epsilon,
    int64_t iterations = 20,
    double epsilon_init = 4.0,
    double epsilon_decay = 0.7,
    const Tensor& mask = {}) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      c10::autocast_dispatch_keyset);
  const auto problem = detail::topk_problem(scores, k, epsilon, mask);
  TORCH_CHECK_VALUE(
      iterations > 0,
      "peft: soft top-k needs at least one iteration, got ",
      iterations);
  TORCH_CHECK_VALUE(
      epsilon_init > 0 && epsilon_decay > 0 && epsilon_decay <= 1,
      "peft: soft top-k wants epsilon_init > 0 and 0 < epsilon_decay <= 1, "
      "got ",
      epsilon_init,
      " and ",
      epsilon_decay);
  if (scores.numel() == 0) {
    return problem.scores.clone();
  }
  const Tensor closed = problem.mask.logical_not();
  const Tensor s = problem.scores.masked_fill(closed, 0.0);
  const Tensor log_k = problem.k.clamp_min(1).to(s.scalar_type()).log();
  double eps = std::max(epsilon_init, epsilon);
  Tensor a, b = -s;
  for (int64_t i = 0; i < iterations; ++i) {
    const Tensor open = ((s + b) / eps).masked_fill(closed, -1e30);
    a = eps * (log_k - open.logsumexp(-1, /*keepdim=*/true));
    b = -at::relu(s + a);
    eps = std::max(eps * epsilon_decay, epsilon);
  }
  return ((s + a + b) / eps).masked_fill(closed, -1e30).exp();
}

inline Tensor soft_topk_iterative(
    const Tensor& scores,
    int64_t k,
    double epsilon,
    int64_t iterations = 20,
    double epsilon_init = 4.0,
    double epsilon_decay = 0.7,
    const Tensor& mask = {}) {
  return soft_topk_iterative(
      scores,
      detail::same_k(scores, k),
      epsilon,
      iterations,
      epsilon_init,
      epsilon_decay,
      mask);
}

/// Which tokens a router takes.
struct TopKTokens {
  Tensor indices; // [*, k], int64, ascending: the tokens keep their order
  Tensor valid; // [*, k], false where a row had fewer than k tokens to choose
};

/// The k highest scores of each row; of equal ones the first. Rows with fewer
/// than k tokens that may be chosen, or than their own number `k_of_row`
/// `[*, 1]`, are filled up with others, which are not `valid`.
inline TopKTokens top_k_tokens(
    const Tensor& scores,
    int64_t k,
    const Tensor& mask = {},
    const Tensor& k_of_row = {}) {
  detail::check_topk(scores, mask);
  detail::check_k(k);
  TORCH_CHECK_VALUE(
      k <= scores.size(-1),
      "peft: cannot choose ",
      k,
      " of ",
      scores.size(-1),
      " tokens");
  at::NoGradGuard no_grad;
  // Upwards, so that NaN, which stands for what is masked, comes last.
  Tensor keys = scores.neg();
  if (mask.defined()) {
    keys = keys.masked_fill(mask.logical_not(), NAN);
  }
  const Tensor best =
      std::get<1>(keys.sort(/*stable=*/true, -1, /*descending=*/false))
          .narrow(-1, 0, k);
  Tensor valid = mask.defined()
      ? mask.gather(-1, best)
      : at::ones_like(best, best.options().dtype(at::kBool));
  if (k_of_row.defined()) {
    valid = valid.logical_and(at::arange(k, best.options()) < k_of_row);
  }
  const auto [indices, order] = best.sort(-1);
  return {indices, valid.gather(-1, order)};
}

} // namespace functional

} // namespace peft
