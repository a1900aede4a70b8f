#pragma once

// Structure under an exact budget, as S3Delta (Hu et al. 2022,
// arXiv:2206.07382) has it. Each of m modules, of n_i parameters, is there with
//
//   p_i = σ((α_i - b) / β)        b such that Σ p_i n_i = budget
//
// A sample is z = clip(s (r - l) + l, 0, 1) with the binary concrete
// s = σ(logit u + logit p), u uniform in (0, 1).

#include <ATen/ATen.h>
#include <torch/types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

namespace peft {

using torch::Tensor;

namespace functional {

/// What solve_shift finds. The logits are accurate where b itself could not be
/// (large α over a small β).
struct Shift {
  double shift = 0; // b
  std::vector<double> logits; // (α_i - b) / β
  std::vector<double> p;
};

namespace detail {

inline double sigmoid(double x) {
  return x >= 0 ? 1 / (1 + std::exp(-x)) : std::exp(x) / (1 + std::exp(x));
}

/// t with Σ n_i σ(x_i - t) = budget, for 0 < budget < Σ n_i: Newton's method
/// within a bracket that each step narrows.
inline double solve_offset(
    const std::vector<double>& x,
    const std::vector<int64_t>& n,
    double budget,
    double total) {
  const double middle = std::log(budget) - std::log(total - budget); // of x = t
  double low = *std::min_element(x.begin(), x.end()) - middle;
  double high = *std::max_element(x.begin(), x.end()) - middle;
  double t = low + (high - low) / 2;
  for (int i = 0; i < 2000; ++i) {
    double excess = -budget, slope = 0;
    for (size_t k = 0; k < x.size(); ++k) {
      const double p = sigmoid(x[k] - t);
      excess += static_cast<double>(n[k]) * p;
      slope += static_cast<double>(n[k]) * p * (1 - p);
    }
    (excess > 0 ? low : high) = t;
    double next = t + excess / slope;
    if (!(next > low && next < high)) {
      next = low + (high - low) / 2;
    }
    if (excess == 0 || next == t || next == low || next == high) {
      break;
    }
    t = next;
  }
  return t;
}

} // namespace detail

/// Solves Σ n_i σ((α_i - b) / β) = budget for b. A budget of Σ n_i or more
/// gives p = 1 and b = -∞. n_i and β are positive, α_i finite.
inline Shift solve_shift(
    const std::vector<double>& alpha,
    const std::vector<int64_t>& numel,
    double budget,
    double beta) {
  TORCH_CHECK_VALUE(
      !alpha.empty() && alpha.size() == numel.size(),
      "peft: ",
      alpha.size(),
      " α for ",
      numel.size(),
      " modules");
  TORCH_CHECK_VALUE(
      budget > 0 && beta > 0 && std::isfinite(beta),
      "peft: the budget and beta must be positive, got ",
      budget,
      " and ",
      beta);
  double total = 0;
  for (size_t i = 0; i < alpha.size(); ++i) {
    TORCH_CHECK_VALUE(
        std::isfinite(alpha[i]) && numel[i] > 0,
        "peft: module ",
        i,
        " has α = ",
        alpha[i],
        " and ",
        numel[i],
        " parameters; α must be finite, and there must be parameters");
    total += static_cast<double>(numel[i]);
  }
  Shift result;
  if (budget >= total) {
    result.shift = -std::numeric_limits<double>::infinity();
    result.logits.assign(alpha.size(), std::numeric_limits<double>::infinity());
    result.p.assign(alpha.size(), 1.0);
    return result;
  }
  // Once to find who is nearest to b, once more counted from there.
  const auto from = [&](double origin) {
    std::vector<double> x;
    for (const double a : alpha) {
      x.push_back((a - origin) / beta);
    }
    return x;
  };
  double origin = alpha.front(), offset = 0;
  for (int pass = 0; pass < 2; ++pass) {
    offset = detail::solve_offset(from(origin), numel, budget, total);
    const double b = origin + beta * offset;
    if (pass == 0) {
      origin = *std::min_element(
          alpha.begin(), alpha.end(), [&](double x, double y) {
            return std::abs(x - b) < std::abs(y - b);
          });
    }
  }
  result.shift = origin + beta * offset;
  for (const double x : from(origin)) {
    result.logits.push_back(x - offset);
    result.p.push_back(detail::sigmoid(x - offset));
  }
  return result;
}

/// How the gradient of p sees that b depends on α.
enum class ShiftGradient {
  /// As published: b counts as a constant, and p is divided by its own sum.
  detached,
  /// dp keeps Σ p_i n_i where it is (implicit function theorem).
  implicit
};

/// logit p for α `[m]`, float64, differentiable in α. Where everything fits
/// the budget the logits are infinite and carry no gradient.
inline Tensor budget_logits(
    const Tensor& alpha,
    const std::vector<int64_t>& numel,
    double budget,
    double beta,
    ShiftGradient gradient = ShiftGradient::detached) {
  const Tensor values = alpha.detach().to(at::kCPU, at::kDouble).contiguous();
  TORCH_CHECK_VALUE(
      values.dim() == 1, "peft: α must be a vector, got ", values.sizes());
  const double* data = values.data_ptr<double>();
  const Shift solved =
      solve_shift({data, data + values.numel()}, numel, budget, beta);
  const Tensor logits = at::tensor(solved.logits, at::kDouble);
  if (std::isinf(solved.shift)) {
    return logits;
  }
  // Zero, with the gradient of α / β.
  const Tensor change = (alpha.to(at::kDouble) - values) / beta;
  const Tensor p = at::tensor(solved.p, at::kDouble);
  const Tensor slope = p * (1 - p);
  if (gradient == ShiftGradient::implicit) {
    const Tensor weight = slope * at::tensor(numel).to(at::kDouble);
    const Tensor sum = weight.sum();
    return logits + change -
        (sum.item<double>() > 0 ? (weight / sum * change).sum()
                                : at::zeros({}, at::kDouble));
  }
  const Tensor moved = p + slope * change;
  const Tensor scaled = moved / moved.sum() * p.sum();
  return logits + (scaled - scaled.detach()) / slope.clamp_min(1e-30);
}

/// z for uniform numbers u `[m]`, stretched to [low, high] and clipped to [0,
/// 1]. Where all would be zero, the likeliest module keeps its p.
inline Tensor sample_concrete(
    const Tensor& logits,
    const Tensor& u,
    double low = 0,
    double high = 1) {
  constexpr double kEdge = 1e-7;
  const Tensor inside =
      at::where(u <= 0, at::full_like(u, kEdge), u).clamp_max(1 - kEdge);
  const Tensor s = at::sigmoid(inside.logit() + logits);
  const Tensor z = (s * (high - low) + low).clamp(0, 1);
  if (at::count_nonzero(z).item<int64_t>() > 0) {
    return z;
  }
  const Tensor best =
      at::one_hot(logits.argmax(), logits.numel()).to(logits.scalar_type());
  return best * at::sigmoid(logits);
}

/// z without noise: p, stretched and clipped.
inline Tensor
expected_concrete(const Tensor& logits, double low = 0, double high = 1) {
  return (at::sigmoid(logits) * (high - low) + low).clamp(0, 1);
}

/// The final structure: modules by falling p, each taken if it still fits; of
/// equal ones the first comes first.
inline std::vector<size_t> greedy_structure(
    const std::vector<double>& p,
    const std::vector<int64_t>& numel,
    int64_t budget) {
  std::vector<size_t> order(p.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return p[a] > p[b];
  });
  std::vector<size_t> chosen;
  for (const size_t i : order) {
    if (numel[i] <= budget) {
      budget -= numel[i];
      chosen.push_back(i);
    }
  }
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

} // namespace functional

} // namespace peft
