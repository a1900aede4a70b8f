#pragma once

// KaSA (Wang et al. 2024, arXiv:2412.06071): LoRA with trained singular values,
// on a weight without its smallest ones.
//
//   W' = W - U₀ S₀ V₀ᵀ + s · B diag(d) A,   A [r, in], d [r], B [out, r]
//
// where U₀ S₀ V₀ᵀ are the r smallest of the min(in, out) singular triplets of
// W. A and d start random, B at zero. The penalty β ‖d‖² + γ (‖Bᵀ B - I‖ + ‖A
// Aᵀ - I‖) that keeps A and B near to singular vectors is
// peft::kasa_regularization.
//
// HF writes W - U₀ S₀ V₀ᵀ over the base. Here that part is the adapter's, as
// PiSSA's is: the base keeps its bits, a disabled or detached adapter leaves
// the network that was there before (HF's leaves the truncated one),
// set_scale() scales the whole change, and other adapters may stand beside it.
// Of two KaSA adapters that act at once at one weight each takes its part off.

#include <peft/core/adapter.h>
#include <peft/methods/lora/offset.h>
#include <peft/methods/low_rank_delta.h>

#include <torch/arg.h>

#include <algorithm>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace peft {

/// HF's KasaConfig: the weights of kasa_regularization.
struct KasaOptions {
  TORCH_ARG(double, beta) = 1e-4;
  TORCH_ARG(double, gamma) = 1e-3;
};

/// KaSA at one matrix [out, in].
class KasaDelta final : public LowRankDelta<KasaDelta> {
 public:
  struct Config {
    double scaling = 1.0;
    double dropout = 0.0;
    KasaOptions options;
  };

  KasaDelta(Config config, NamedTensors tensors, bool is_transposed = false)
      : LowRankDelta(std::move(tensors), is_transposed),
        config_(std::move(config)) {}

  /// Takes up · down off from now on: down [r, in], up [out, r].
  void take_off(const Tensor& down, const Tensor& up) {
    offset_.A = register_buffer("lora_A0", down);
    offset_.B = register_buffer("lora_B0", up);
  }

  /// [diag(d) A; V₀ᵀ] and [s B, -U₀ S₀].
  Factors factors(at::ScalarType dtype) const {
    const auto [down, up] = own_factors(dtype);
    return {
        at::cat({down, offset_.A.to(dtype)}),
        at::cat({up, -offset_.B.to(dtype)}, 1)};
  }
  /// The factors have it.
  double scaling() const {
    return 1.0;
  }

  /// Dropout is for B diag(d) A x, not for what is taken off.
  Tensor linear(
      const LinearCall& call,
      const Below<LinearCall>& below,
      double scale) const override {
    if (dropout_now() == 0.0) {
      return LowRankDelta::linear(call, below, scale);
    }
    const auto own_dtype = *dtype();
    const Tensor y = linear_with(own_factors(own_dtype), call, below, scale);
    const auto [down, up] = as_used({offset_.A, offset_.B}, call);
    return (y - functional::lora_linear_term(call.x, down, up, scale))
        .to(y.scalar_type());
  }
  int64_t linear_cost() const override {
    return 2 * LowRankDelta::linear_cost();
  }

  /// β ‖d‖² + γ (‖Bᵀ B - I‖ + ‖A Aᵀ - I‖).
  Tensor regularization() const {
    const Tensor A = tensor("lora_A.weight"), B = tensor("lora_B.weight");
    const Tensor one = at::eye(r(), A.options());
    return config_.options.beta() * tensor("lora_diag").square().sum() +
        config_.options.gamma() *
        ((at::mm(B.t(), B) - one).norm() + (at::mm(A, A.t()) - one).norm());
  }

  std::vector<std::pair<std::string, Tensor>> training_tensors()
      const override {
    return offset_.file_tensors();
  }
  std::shared_ptr<Delta> copy() const override {
    auto result = LowRankDelta::copy();
    static_cast<KasaDelta&>(*result).take_off(
        offset_.A.clone(), offset_.B.clone());
    return result;
  }
  std::string take(const Delta& other, bool may_grow, bool dry_run) override {
    const auto misfit = LowRankDelta::take(other, may_grow, dry_run);
    if (misfit.empty() && !dry_run) {
      const torch::NoGradGuard no_grad;
      offset_.take(static_cast<const KasaDelta&>(other).offset_);
    }
    return misfit;
  }

  int64_t r() const {
    return tensor("lora_diag").size(0);
  }
  std::string describe() const override {
    return "kasa r=" + std::to_string(r());
  }
  const Config& config() const {
    return config_;
  }
  const detail::LoraOffset& offset() const {
    return offset_;
  }

 private:
  /// diag(d) A and s B.
  Factors own_factors(at::ScalarType dtype) const {
    return {
        tensor("lora_diag", dtype).unsqueeze(1) *
            tensor("lora_A.weight", dtype),
        tensor("lora_B.weight", dtype) * config_.scaling};
  }

  Config config_;
  detail::LoraOffset offset_;
};

namespace detail {

/// V₀ᵀ and U₀ S₀ of W [out, in], for the r smallest singular values. Decomposed
/// in float64: small values are lost in the rounding of the large ones.
inline std::pair<Tensor, Tensor>
minor_part(const Tensor& weight, int64_t r, const std::string& name) {
  const int64_t rank = std::min(weight.size(0), weight.size(1));
  TORCH_CHECK_VALUE(
      r < rank,
      "peft: KaSA takes the r smallest singular values off a weight and must "
      "leave one; at '",
      name,
      "' r is ",
      r,
      ", and the weight has ",
      rank);
  torch::NoGradGuard no_grad;
  const auto [U, S, Vh] =
      at::linalg_svd(weight.to(at::kDouble), /*full_matrices=*/false);
  const auto kept = [&](const Tensor& t) {
    return t.to(adapter_dtype(weight)).contiguous();
  };
  return {
      kept(Vh.slice(0, rank - r)),
      kept(U.slice(1, rank - r) * S.slice(0, rank - r))};
}

} // namespace detail

/// β ‖d‖² + γ (‖Bᵀ B - I‖ + ‖A Aᵀ - I‖), summed over the weights of a KaSA
/// adapter (equations 9 to 12): to be added to the loss.
inline Tensor kasa_regularization(const Adapter& adapter) {
  Tensor sum;
  for (const auto& site : adapter.shared_state()->sites) {
    if (const auto* kasa = dynamic_cast<const KasaDelta*>(site.delta.get())) {
      const Tensor own = kasa->regularization();
      sum = sum.defined() ? sum + own : own;
    }
  }
  TORCH_CHECK(
      sum.defined(),
      "peft: kasa_regularization is KaSA's, and adapter '",
      adapter.name(),
      "' is a ",
      adapter.method(),
      " without it; set LoraOptions().kasa(KasaOptions())");
  return sum;
}

} // namespace peft
