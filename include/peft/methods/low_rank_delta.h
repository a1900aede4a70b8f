#pragma once

#include <peft/core/formula_delta.h>
#include <peft/functional/lora.h>

#include <utility>

namespace peft {

/// A weight delta whose change is a product of two thin matrices that follow
/// from what it trains:
///
///   W' = W + s · up down,   down [n, in], up [out, n]
///
/// `Derived` says which, and its Config has a dropout (on x, in training mode):
///
///   Factors factors(at::ScalarType dtype) const;   {down, up}
///   double scaling() const;
template <class Derived>
class LowRankDelta : public FormulaDelta<Derived> {
 public:
  using Factors = std::pair<Tensor, Tensor>;

  using FormulaDelta<Derived>::FormulaDelta;

  Tensor changed(const Tensor& weight, double scale) const {
    const auto [down, up] = derived().factors(weight.scalar_type());
    return functional::lora_merged(
               weight.flatten(1), down, up, scale * derived().scaling())
        .view(weight.sizes());
  }

  bool is_additive() const override {
    return true;
  }
  bool has_linear() const override {
    return true;
  }
  Tensor linear(
      const LinearCall& call,
      const Below<LinearCall>& below,
      double scale) const override {
    return linear_with(derived().factors(*this->dtype()), call, below, scale);
  }
  int64_t linear_cost() const override {
    return dropout_now() > 0 ? 0 : this->numel();
  }

 protected:
  double dropout_now() const {
    return this->is_training() ? derived().config().dropout : 0.0;
  }

  /// linear() by these factors.
  Tensor linear_with(
      const Factors& factors,
      const LinearCall& call,
      const Below<LinearCall>& below,
      double scale) const {
    const auto [down, up] = as_used(factors, call);
    const double s = scale * derived().scaling();
    if (below.is_base) {
      return functional::lora_linear(
          call.x,
          call.weight,
          call.bias,
          down,
          up,
          s,
          dropout_now(),
          call.packed,
          call.transposed);
    }
    const Tensor y = below(call);
    return (y +
            functional::lora_linear_term(call.x, down, up, s, dropout_now()))
        .to(y.scalar_type());
  }

  /// Those of the matrix that a call reads: of a weight [in, out], of some
  /// rows, of its transpose.
  Factors as_used(Factors factors, const LinearCall& call) const {
    Tensor& down = factors.first;
    Tensor& up = factors.second;
    const auto turn = [&] { // (up down)ᵀ = downᵀ upᵀ
      std::swap(down, up);
      down = down.t();
      up = up.t();
    };
    if (this->is_transposed()) {
      turn();
    }
    if (call.rows.begin != 0 || call.rows.end != up.size(0)) {
      up = up.slice(0, call.rows.begin, call.rows.end);
    }
    if (call.transposed) {
      turn();
    }
    return factors;
  }

 private:
  const Derived& derived() const {
    return static_cast<const Derived&>(*this);
  }
};

} // namespace peft
