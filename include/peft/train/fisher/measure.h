#pragma once

// What estimate_fisher adds up: a gradient's measure, into the sum of its
// parameter.

#include <peft/core/attach.h>

#include <ATen/ATen.h>

#include <algorithm>
#include <string>
#include <vector>

namespace peft {

namespace detail {

/// A parameter by all its names and tensors, where it is tied, and its sum.
struct MeasuredParameter {
  std::vector<PlannedSite> places; // without a delta
  Tensor sum;

  const Tensor& tensor() const {
    return places.front().tensor;
  }
};

/// What is done with a gradient: g², or |g|, of a g that is scaled down to
/// `max_norm` first where that is not 0.
struct GradientMeasure {
  bool absolute = false;
  double max_norm = 0;

  /// sum += weight · measure(g); a sparse g (an embedding's) costs its entries.
  void add(Tensor& sum, Tensor g, double weight) const {
    torch::NoGradGuard no_grad;
    if (g.is_sparse()) {
      g = g.coalesce();
      Tensor part = at::zeros_like(g._values(), sum.options());
      add_dense(part, g._values(), weight);
      sum.index_add_(0, g._indices()[0], part);
    } else {
      add_dense(sum, std::move(g), weight);
    }
  }

 private:
  void add_dense(Tensor& sum, Tensor g, double weight) const {
    g = g.to(sum.scalar_type());
    if (max_norm > 0) {
      const double norm = g.norm().item<double>();
      g = g * std::min(1.0, max_norm / (norm + 1e-6));
    }
    if (absolute) {
      sum.add_(g.abs(), weight);
    } else {
      sum.addcmul_(g, g, weight);
    }
  }
};

} // namespace detail

} // namespace peft
