#pragma once

// How much an entry of an adapter's weights matters before it is trained, by
// the five scores of SparseAdapter (He et al. 2022, arXiv:2210.04284). A high
// score is kept.
//
//   rand        N(0, 1)
//   magnitude   |w|
//   snip        |w ∂L/∂m|_{m ⊙ w}, = |w g| (Lee et al. 2019)
//   grasp       w (H g), signed (Wang et al. 2020; the sign of the code)
//   synflow     |w ∂R/∂w|, R the output of the adapters alone, with the
//   absolute
//               values of their parameters, for an input of ones (Tanaka et al.
//               2020)

#include <peft/methods/bottleneck.h>
#include <peft/methods/sparse_mask.h>

#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// The losses that snip and grasp look at, one a batch: each computes its batch
/// anew and gives a scalar. The sum over the batches counts.
using PruningLosses = std::vector<std::function<Tensor()>>;

namespace detail {

/// A weight while it is scored: `parameter`, the leaf that the network reads,
/// holds m ⊙ start.
struct ScoredWeight {
  std::string name;
  Tensor parameter;
  Tensor start;
  Tensor kept; // m, bool
  std::shared_ptr<Delta> delta;
  std::vector<int64_t> sizes; // of the tensor that the delta adapts
};
using ScoredWeights = std::vector<ScoredWeight>;

inline std::vector<Tensor> parameters_of(const ScoredWeights& weights) {
  std::vector<Tensor> result;
  for (const auto& w : weights) {
    result.push_back(w.parameter);
  }
  return result;
}

/// The gradients of one batch, zeros where it does not depend on a weight.
inline std::vector<Tensor> gradients(
    const Tensor& loss,
    const std::vector<Tensor>& leaves,
    bool create_graph) {
  TORCH_CHECK_VALUE(
      loss.defined() && loss.numel() == 1,
      "peft: a loss must be one number, got ",
      loss.defined() ? c10::str(loss.sizes()) : "nothing");
  TORCH_CHECK(
      loss.requires_grad(),
      "peft: the loss does not depend on the adapter: it is disabled or "
      "frozen, or the loss was computed without gradients");
  auto result = torch::autograd::grad(
      {loss.sum()}, leaves, {}, create_graph, create_graph, true);
  for (size_t i = 0; i < leaves.size(); ++i) {
    if (!result[i].defined()) {
      result[i] = at::zeros_like(leaves[i]);
    }
  }
  return result;
}

inline std::vector<Tensor> summed_gradients(
    const PruningLosses& losses,
    const std::vector<Tensor>& leaves) {
  std::vector<Tensor> total;
  for (const auto& loss : losses) {
    const auto batch = gradients(loss(), leaves, /*create_graph=*/false);
    if (total.empty()) {
      total = batch;
      continue;
    }
    for (size_t i = 0; i < leaves.size(); ++i) {
      total[i] = total[i] + batch[i];
    }
  }
  return total;
}

inline std::vector<Tensor> snip_scores(
    const ScoredWeights& weights,
    const PruningLosses& losses) {
  const auto g = summed_gradients(losses, parameters_of(weights));
  std::vector<Tensor> result;
  for (size_t i = 0; i < weights.size(); ++i) {
    result.push_back((g[i] * weights[i].start).abs());
  }
  return result;
}

inline std::vector<Tensor> grasp_scores(
    const ScoredWeights& weights,
    const PruningLosses& losses) {
  const auto leaves = parameters_of(weights);
  const auto mask = [&](const Tensor& g, size_t i) {
    return g * weights[i].kept.to(g.scalar_type());
  };
  const auto stopped = summed_gradients(losses, leaves);
  std::vector<Tensor> result;
  for (const auto& leaf : leaves) {
    result.push_back(at::zeros_like(leaf));
  }
  for (const auto& loss : losses) {
    const auto g = gradients(loss(), leaves, /*create_graph=*/true);
    Tensor product = at::zeros({}, leaves.front().options());
    for (size_t i = 0; i < leaves.size(); ++i) {
      product = product + (mask(stopped[i], i) * g[i]).sum();
    }
    const auto h = gradients(product, leaves, /*create_graph=*/false);
    for (size_t i = 0; i < leaves.size(); ++i) {
      result[i].add_(mask(h[i], i) * weights[i].start);
    }
  }
  return result;
}

/// R of one delta: the mean output of each of its bottlenecks, or ΔW 1 averaged
/// over the rows.
inline Tensor synflow_output(
    const Delta& delta,
    const std::vector<int64_t>& sizes) {
  Tensor total;
  for (const auto& module : delta.modules()) {
    if (const auto* bottleneck = module->as<BottleneckImpl>()) {
      const Tensor y = bottleneck
                           ->forward(at::ones(
                               {1, bottleneck->options.width()},
                               bottleneck->down_weight.options()))
                           .mean();
      total = total.defined() ? total + y : y;
    }
  }
  if (!total.defined()) {
    const Tensor zero = at::zeros(
        sizes, delta.parameters().front().options().requires_grad(false));
    total = delta.effective(zero, 1.0).sum() / sizes.front();
  }
  TORCH_CHECK(
      std::isfinite(total.item<double>()),
      "peft: the SynFlow output of '",
      delta.describe(),
      "' is ",
      total.item<double>(),
      "; look for what is not finite in its parameters");
  return total;
}

inline std::vector<Tensor> synflow_scores(const ScoredWeights& weights) {
  std::vector<Tensor> result;
  for (const auto& w : weights) {
    // Delta by delta: the output of one does not depend on another's weights.
    std::vector<std::pair<Tensor, Tensor>> before;
    const bool training = w.delta->is_training();
    const auto restore = [&] {
      torch::NoGradGuard no_grad;
      for (auto& [parameter, value] : before) {
        parameter.copy_(value);
      }
      w.delta->train(training);
    };
    {
      torch::NoGradGuard no_grad;
      for (auto& p : w.delta->parameters()) {
        before.emplace_back(p, p.detach().clone());
        p.abs_();
      }
      w.delta->eval();
    }
    try {
      const auto g =
          gradients(synflow_output(*w.delta, w.sizes), {w.parameter}, false);
      result.push_back((g[0] * w.parameter.detach()).abs());
    } catch (...) {
      restore();
      throw;
    }
    restore();
  }
  return result;
}

inline std::vector<Tensor> pruning_scores(
    const std::string& kind,
    const ScoredWeights& weights,
    const PruningLosses& losses,
    at::Generator generator) {
  if (kind == "snip") {
    return snip_scores(weights, losses);
  }
  if (kind == "grasp") {
    return grasp_scores(weights, losses);
  }
  if (kind == "synflow") {
    return synflow_scores(weights);
  }
  std::vector<Tensor> result;
  for (const auto& w : weights) {
    if (kind == "rand") {
      result.push_back(at::randn(w.start.sizes(), generator));
    } else {
      result.push_back(w.start.abs());
    }
  }
  return result;
}

} // namespace detail

} // namespace peft
