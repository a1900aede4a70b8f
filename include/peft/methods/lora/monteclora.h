#pragma once

// MonteCLoRA (Seth et al. 2024, arXiv:2411.04358): LoRA whose A is a random
// matrix while it trains, with a learned spread.
//
//   A' = A + c · Σ_n w_n (Z_n diag(√v))ᵀ
//   v = max(exp(2 σ) ⊙ diag(K), 10⁻³),   w = softmax(μ(α) + √q(α) ⊙ z)
//
// Z_n [in, r] and z [N] are normal, K [r, r] is Wishart with r degrees of
// freedom; σ [r] (std_prior) and log α [N] (expert_weights_prior) train, and w
// is a Dirichlet(α) by its normal approximation (Srivastava and Sutton 2017,
// arXiv:1703.01488): μ = log α - mean(log α), q = (1 - 2/N) / α + Σ 1/α / N².
//
// In evaluation, when it is merged and wherever the weight is read otherwise
// than by linear or matmul, A' = A, as dropout is absent there. The divergence
// from the prior is peft::monteclora_regularization. A seed draws what it draws
// in HF PEFT, which fills a buffer of draws for each layer when it makes the
// layer and whenever it is used up.

#include <peft/core/adapter.h>
#include <peft/methods/low_rank_delta.h>

#include <c10/core/InferenceMode.h>
#include <torch/arg.h>

#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// HF's MontecloraConfig.
struct MonteCloraOptions {
  /// N.
  TORCH_ARG(int64_t, num_samples) = 8;
  /// Adds Σ w² to the regularization, so that no sample takes over.
  TORCH_ARG(bool, use_entropy) = false;
  /// All α of the Dirichlet prior.
  TORCH_ARG(double, dirichlet_prior) = 0.1;
  /// c.
  TORCH_ARG(double, sample_scaler) = 1e-4;
  /// Of the divergence, in the regularization.
  TORCH_ARG(double, kl_loss_weight) = 1e-5;
  /// Draws at a time: buffer_size · N · in · r numbers are kept for each layer
  /// that trains.
  TORCH_ARG(int64_t, buffer_size) = 150;
};

namespace detail {

/// What chance gives one forward pass after another.
class MonteCloraDraws {
 public:
  struct Draw {
    Tensor Z; // [N, in, r]
    Tensor K; // [r], the diagonal
    Tensor z; // [N]
  };

  /// The next one, in float32 on the CPU.
  Draw next(const MonteCloraOptions& options, int64_t in, int64_t r) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (index_ >= size_) {
      fill(options, in, r);
    }
    const int64_t i = index_++;
    return {Z_[i], K_[i], z_[i]};
  }

  void refill(const MonteCloraOptions& options, int64_t in, int64_t r) {
    const std::lock_guard<std::mutex> lock(mutex_);
    fill(options, in, r);
  }

 private:
  /// In the order of HF, which takes the Wishart matrices from Bartlett's
  /// decomposition: chi-squares on a diagonal, normals below it.
  void fill(const MonteCloraOptions& options, int64_t in, int64_t r) {
    const c10::InferenceMode off(false);
    const torch::NoGradGuard no_grad;
    size_ = options.buffer_size();
    const int64_t N = options.num_samples();
    Z_ = torch::randn({size_, N, in, r});
    z_ = torch::randn({size_, N});
    K_ = torch::empty({size_, r});
    const Tensor below =
        at::tril_indices(r, r, /*offset=*/-1, at::TensorOptions(at::kLong));
    const Tensor half_df =
        at::arange(r, 0, -1, at::TensorOptions(at::kFloat)).mul(0.5);
    for (int64_t i = 0; i < size_; ++i) {
      const Tensor chi = (at::_standard_gamma(half_df) / 0.5)
                             .clamp_min(std::numeric_limits<float>::min())
                             .sqrt()
                             .clamp_min(std::numeric_limits<float>::epsilon());
      const Tensor factor = chi.diag();
      factor.index_put_({below[0], below[1]}, torch::randn({r * (r - 1) / 2}));
      K_[i].copy_(factor.square().sum(1));
    }
    index_ = 0;
  }

  std::mutex mutex_;
  int64_t index_ = 0, size_ = 0;
  Tensor Z_, K_, z_;
};

} // namespace detail

/// MonteCLoRA at one matrix.
class MonteCloraDelta final : public LowRankDelta<MonteCloraDelta> {
 public:
  struct Config {
    double scaling = 1.0;
    double dropout = 0.0;
    MonteCloraOptions options;
  };

  MonteCloraDelta(Config config, NamedTensors tensors, bool is_transposed)
      : LowRankDelta(std::move(tensors), is_transposed),
        config_(std::move(config)),
        draws_(std::make_shared<detail::MonteCloraDraws>()) {
    const auto like = tensor("lora_A.weight").options().requires_grad(false);
    const int64_t N = config_.options.num_samples();
    covariance_ = register_buffer(
        "lora_monteclora_sampler_gaussian_var_prior", at::eye(r(), like));
    weights_ = register_buffer(
        "lora_monteclora_sampler_expert_weights",
        at::full({N}, 1.0 / static_cast<double>(N), like));
  }

  Factors factors(at::ScalarType dtype) const {
    return {tensor("lora_A.weight", dtype), tensor("lora_B.weight", dtype)};
  }
  double scaling() const {
    return config_.scaling;
  }

  Tensor linear(
      const LinearCall& call,
      const Below<LinearCall>& below,
      double scale) const override {
    auto own = factors(*dtype());
    if (is_training()) {
      own.first = own.first + drawn_change();
    }
    return linear_with(own, call, below, scale);
  }
  int64_t linear_cost() const override {
    return is_training() ? 0 : LowRankDelta::linear_cost();
  }

  /// Fills the buffer now, where HF does.
  void refill() {
    draws_->refill(config_.options, in_features(), r());
  }

  /// The divergence from the prior and Σ w², by what the last forward pass
  /// drew; undefined in evaluation.
  Tensor regularization() const {
    if (!is_training()) {
      return {};
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto& o = config_.options;
    const auto size = static_cast<double>(r());
    const Tensor log_alpha = prior_of_weights(), log_std = prior_of_std();
    const Tensor v = last_v_.defined() ? last_v_ : covariance_.diagonal();
    const Tensor w = last_w_.defined() ? last_w_ : weights_;

    const Tensor alpha = log_alpha.exp();
    const Tensor prior = at::full_like(alpha, o.dirichlet_prior());
    const Tensor dirichlet = at::lgamma(alpha.sum()) - at::lgamma(prior.sum()) +
        (at::lgamma(prior) - at::lgamma(alpha)).sum() +
        ((alpha - prior) * (at::digamma(alpha) - at::digamma(alpha.sum())))
            .sum();
    const Tensor wishart =
        0.5 * size * ((2 * log_std).exp() - 2 * log_std - 1).sum();
    const Tensor kept = v.clamp_min(1e-6);
    const Tensor normal = 0.5 * static_cast<double>(o.num_samples()) *
        ((kept - kept.log()).sum() - size);
    const Tensor divergence =
        o.kl_loss_weight() * (dirichlet + wishart + normal);
    return o.use_entropy() ? divergence + w.square().sum() : divergence;
  }

  /// With what was drawn last, as HF has them.
  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    auto result = LowRankDelta::file_tensors();
    const std::string sampler = "lora_monteclora_sampler.";
    result.emplace_back(sampler + "gaussian_var_prior", covariance_);
    result.emplace_back(sampler + "expert_weights", weights_);
    return result;
  }
  std::shared_ptr<Delta> copy() const override {
    auto result = LowRankDelta::copy();
    auto& other = static_cast<MonteCloraDelta&>(*result);
    other.take_buffers(*this);
    return result;
  }
  std::string take(const Delta& other, bool may_grow, bool dry_run) override {
    const auto misfit = LowRankDelta::take(other, may_grow, dry_run);
    if (misfit.empty() && !dry_run) {
      take_buffers(static_cast<const MonteCloraDelta&>(other));
      draws_ = std::make_shared<detail::MonteCloraDraws>();
    }
    return misfit;
  }

  int64_t r() const {
    return tensor("lora_A.weight").size(0);
  }
  std::string describe() const override {
    return "monteclora r=" + std::to_string(r());
  }
  const Config& config() const {
    return config_;
  }

 private:
  int64_t in_features() const {
    return tensor("lora_A.weight").size(1);
  }
  Tensor prior_of_std() const {
    return tensor("lora_monteclora_sampler.std_prior");
  }
  Tensor prior_of_weights() const {
    return tensor("lora_monteclora_sampler.expert_weights_prior");
  }

  /// A' - A.
  Tensor drawn_change() const {
    const auto draw = draws_->next(config_.options, in_features(), r());
    const Tensor like = tensor("lora_A.weight");
    const auto here = [&](const Tensor& t) { return t.to(like.options()); };
    const auto N = static_cast<double>(config_.options.num_samples());

    const Tensor v =
        ((2 * prior_of_std()).exp() * here(draw.K)).clamp_min(1e-3);
    const Tensor alpha = prior_of_weights().exp().clamp_min(1e-6);
    const Tensor mean = alpha.log() - alpha.log().mean();
    const Tensor spread =
        ((1 - 2 / N) / alpha + alpha.reciprocal().sum() / (N * N))
            .clamp_min(1e-6) +
        1e-6;
    const Tensor w = at::softmax(mean + spread.sqrt() * here(draw.z), -1);

    remember(v, w);
    const Tensor mixed = at::tensordot(w, here(draw.Z), {0}, {0}); // [in, r]
    return (mixed * v.sqrt()).t() * config_.options.sample_scaler();
  }

  void remember(const Tensor& v, const Tensor& w) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const torch::NoGradGuard no_grad;
    last_v_ = v;
    last_w_ = w;
    covariance_.copy_(v.detach().diag());
    weights_.copy_(w.detach());
  }
  void take_buffers(const MonteCloraDelta& from) {
    const torch::NoGradGuard no_grad;
    covariance_.copy_(from.covariance_);
    weights_.copy_(from.weights_);
    last_v_.reset();
    last_w_.reset();
  }

  Config config_;
  std::shared_ptr<detail::MonteCloraDraws> draws_;
  Tensor covariance_, weights_; // of the last draw
  mutable std::mutex mutex_;
  mutable Tensor last_v_, last_w_; // the same, with gradients
};

/// The mean over the weights of a MonteCLoRA adapter of kl_loss_weight ·
/// KL(learned ‖ prior), and Σ w² with use_entropy: to be added to the loss,
/// after forward. Undefined where nothing trains (HF's is zero there).
///
/// KL is the divergence of the Dirichlet, the Wishart and the normal
/// distributions. HF, as the published code, has ln Γ(α) and ln Γ of the prior
/// the wrong way round in the first.
inline Tensor monteclora_regularization(const Adapter& adapter) {
  Tensor sum;
  int64_t count = 0;
  bool met = false;
  for (const auto& site : adapter.shared_state()->sites) {
    const auto* delta = dynamic_cast<const MonteCloraDelta*>(site.delta.get());
    const Tensor own = delta != nullptr ? delta->regularization() : Tensor();
    met = met || delta != nullptr;
    if (own.defined()) {
      sum = sum.defined() ? sum + own : own;
      ++count;
    }
  }
  TORCH_CHECK(
      met,
      "peft: monteclora_regularization is MonteCLoRA's, and adapter '",
      adapter.name(),
      "' is a ",
      adapter.method(),
      " without it; set LoraOptions().monteclora(MonteCloraOptions())");
  return sum.defined() ? sum / static_cast<double>(count) : sum;
}

} // namespace peft
