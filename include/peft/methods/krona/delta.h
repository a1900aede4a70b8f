#pragma once

// KronA's factors at one weight (Edalati et al. 2022, arXiv:2212.10650):
// W' = W + s · A ⊗ B, on the weight or on a layer's result.

#include <peft/core/delta.h>
#include <peft/functional/kronecker.h>
#include <peft/methods/kronecker_term.h>

#include <ATen/ATen.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// A ⊗ B at one weight, or at some rows of a packed one.
class KronaDelta final : public Delta {
 public:
  /// `transposed`: the weight is [in, out].
  KronaDelta(
      Tensor A,
      Tensor B,
      double scaling,
      bool transposed = false,
      std::optional<Rows> part = std::nullopt)
      : scaling_(scaling), transposed_(transposed), part_(part) {
    krona_A = register_parameter("krona_A", A, A.requires_grad());
    krona_B = register_parameter("krona_B", B, B.requires_grad());
  }

  Tensor effective(const Tensor& weight, double scale) const override {
    auto [left, right] = factors();
    const Tensor f = number_factor();
    if (f.defined()) {
      left = left * f.to(left.scalar_type());
    }
    const auto merged = [&, A = left, B = right](const Tensor& own) {
      return functional::kronecker_merged(
          own,
          A.to(weight.scalar_type()),
          B.to(weight.scalar_type()),
          scale * scaling_);
    };
    if (!part_) {
      return merged(weight);
    }
    return at::cat(
        {weight.slice(0, 0, part_->begin),
         merged(weight.slice(0, part_->begin, part_->end)),
         weight.slice(0, part_->end)});
  }

  std::optional<at::ScalarType> dtype() const override {
    return krona_A.scalar_type();
  }
  bool is_additive() const override {
    return true;
  }
  bool takes_factor(Decoration::Factor /*kind*/) const override {
    return true;
  }
  int64_t factor_features() const override {
    return factors().first.size(1) * factors().second.size(1);
  }

  bool has_linear() const override {
    return true;
  }
  Tensor linear(
      const LinearCall& call,
      const Below<LinearCall>& below,
      double scale) const override {
    const Tensor y = below(call);
    Tensor change = term(call, scale);
    if (!change.defined()) {
      return y;
    }
    const Tensor f = factor(call.x);
    if (f.defined()) {
      change = change * f.to(change.scalar_type());
    }
    return (y + change).to(y.scalar_type());
  }
  bool add_rows(const LinearCall& call, const Tensor& y, double scale)
      const override {
    if (factor_kind() != Decoration::Factor::none) {
      return false;
    }
    const Tensor change = term(call, scale);
    if (change.defined()) {
      y.add_(change);
    }
    return true;
  }
  int64_t linear_cost() const override {
    return factor_kind() != Decoration::Factor::none
        ? 0
        : functional::kronecker_cost(krona_A, krona_B);
  }

  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    return {{"krona_A", krona_A}, {"krona_B", krona_B}};
  }

  std::shared_ptr<Delta> copy() const override {
    const auto twin = [](const Tensor& t) {
      return t.detach().clone().set_requires_grad(t.requires_grad());
    };
    auto result = std::make_shared<KronaDelta>(
        twin(krona_A), twin(krona_B), scaling_, transposed_, part_);
    result->train(is_training());
    return result;
  }

  std::string describe() const override {
    const auto sizes = [](const Tensor& t) {
      return std::to_string(t.size(0)) + "x" + std::to_string(t.size(1));
    };
    return "krona " + sizes(krona_A) + " by " + sizes(krona_B);
  }

  bool is_transposed() const {
    return transposed_;
  }

  Tensor krona_A, krona_B;

 private:
  /// What the change of the weight, as it lies, is the Kronecker product of.
  std::pair<Tensor, Tensor> factors() const {
    return transposed_ ? std::make_pair(krona_A.t(), krona_B.t())
                       : std::make_pair(krona_A, krona_B);
  }

  /// s · x ΔMᵀ for the rows that a call uses; undefined where none of them is
  /// changed here.
  Tensor term(const LinearCall& call, double scale) const {
    const auto [left, right] = factors();
    const Rows all{0, left.size(0) * right.size(0)};
    return kronecker_term(
        call, left, right, part_.value_or(all), scale * scaling_);
  }

  double scaling_;
  bool transposed_;
  std::optional<Rows> part_;
};

} // namespace detail

} // namespace peft
