#pragma once

// VeLoRA (Miles et al. 2024, arXiv:2405.17991): LoRA that keeps little of its
// input for the gradient of A.
//
//   W' = W + s · B A,   ∂L/∂A = (∂L/∂h)ᵀ x̂  for h = A x
//   x̂ = c · (x_g · e) e   for each of the num_groups groups x_g [m] of x,
//   m = ⌈in / num_groups⌉, zeros filled up at the end
//
// e [m] is a unit vector: the mean of the groups of every batch, of the first
// one, or random. A tensor of num_groups numbers a row stands in for x [in]. In
// evaluation, merged and without gradients it is plain LoRA.

#include <peft/methods/low_rank_delta.h>

#include <torch/arg.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// HF's VeloraConfig.
struct VeloraOptions {
  /// Numbers that are kept a row.
  TORCH_ARG(int64_t, num_groups) = 64;
  /// c.
  TORCH_ARG(double, scale) = 1.0;
  /// What e is: "batch_average", "batch_average_once" or "random".
  TORCH_ARG(std::string, init_type) = "batch_average";
};

namespace detail {

/// x [*, in] as groups [rows, num_groups, m].
inline Tensor velora_groups(const Tensor& x, int64_t num_groups) {
  const int64_t in = x.size(-1), m = (in + num_groups - 1) / num_groups;
  return at::constant_pad_nd(x, {0, num_groups * m - in})
      .reshape({-1, num_groups, m});
}

/// e of unit length, from a vector that may be zero; in float32 at least.
inline Tensor velora_direction(const Tensor& vector) {
  const Tensor wide =
      vector.to(at::promoteTypes(vector.scalar_type(), at::kFloat));
  const Tensor norm = wide.norm();
  const Tensor even = at::ones_like(wide) / std::sqrt(wide.numel());
  return at::where(norm == 0, even, wide / norm);
}

/// h = x Aᵀ for x [*, in], A [r, in], with the compressed gradient of A; that
/// of x is exact.
struct VeloraDown : torch::autograd::Function<VeloraDown> {
  static Tensor forward(
      torch::autograd::AutogradContext* ctx,
      const Tensor& x,
      const Tensor& A,
      const Tensor& e,
      int64_t num_groups,
      double scale) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor kept = at::matmul(velora_groups(x, num_groups), e);
    ctx->save_for_backward({kept, A, e});
    ctx->saved_data["scale"] = scale;
    return at::linear(x, A);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx,
      torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &kept = saved[0], &A = saved[1], &e = saved[2];
    Tensor for_x, for_A;
    if (ctx->needs_input_grad(0)) {
      for_x = at::matmul(grads[0], A);
    }
    if (ctx->needs_input_grad(1)) {
      const Tensor x =
          (kept.unsqueeze(-1) * e).flatten(1).slice(1, 0, A.size(1));
      const Tensor rows = grads[0].reshape({-1, A.size(0)});
      for_A = at::mm(rows.t(), x) * ctx->saved_data["scale"].toDouble();
    }
    return {for_x, for_A, Tensor(), Tensor(), Tensor()};
  }
};

} // namespace detail

/// VeLoRA at one matrix.
class VeloraDelta final : public LowRankDelta<VeloraDelta> {
 public:
  struct Config {
    double scaling = 1.0;
    double dropout = 0.0;
    VeloraOptions options;
  };

  VeloraDelta(Config config, NamedTensors tensors, bool is_transposed)
      : LowRankDelta(std::move(tensors), is_transposed),
        config_(std::move(config)) {
    const Tensor A = tensor("lora_A.weight");
    const int64_t n = config_.options.num_groups();
    direction_ = register_buffer(
        "lora_velora_embed",
        at::zeros({(A.size(1) + n - 1) / n}, A.options().requires_grad(false)));
  }

  /// e from now on.
  void set_direction(const Tensor& e) {
    const torch::NoGradGuard no_grad;
    direction_.copy_(e);
  }

  Factors factors(at::ScalarType dtype) const {
    return {tensor("lora_A.weight", dtype), tensor("lora_B.weight", dtype)};
  }
  double scaling() const {
    return config_.scaling;
  }

  /// A call that reads the transpose of the layer's matrix has no x of its.
  Tensor linear(
      const LinearCall& call,
      const Below<LinearCall>& below,
      double scale) const override {
    if (!is_training() || !at::GradMode::is_enabled() ||
        call.transposed != is_transposed()) {
      return LowRankDelta::linear(call, below, scale);
    }
    const auto [down, up] = as_used(factors(*dtype()), call);
    const Tensor y = below(call);
    Tensor x = call.x.to(down.scalar_type());
    if (dropout_now() > 0.0) {
      x = at::dropout(x, dropout_now(), /*train=*/true);
    }
    const Tensor h = detail::VeloraDown::apply(
        x,
        down,
        direction_for(x),
        config_.options.num_groups(),
        config_.options.scale());
    return at::add(y, at::linear(h, up), scale * scaling()).to(y.scalar_type());
  }

  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    auto result = LowRankDelta::file_tensors();
    result.emplace_back("lora_velora_embed", direction_);
    return result;
  }
  /// HF makes a direction of the first batch anew whenever it loads one.
  std::vector<std::pair<std::string, Tensor>> training_tensors()
      const override {
    if (config_.options.init_type() != "batch_average_once") {
      return {};
    }
    return {{"velora_is_met", at::full({1}, is_met_ ? 1 : 0, at::kByte)}};
  }
  std::string from_file(
      const std::string& name,
      const Tensor& value,
      bool dry_run) override {
    if (name != "velora_is_met") {
      return LowRankDelta::from_file(name, value, dry_run);
    }
    if (value.numel() != 1) {
      return c10::str("it has ", value.numel(), " numbers, not 1");
    }
    if (!dry_run) {
      is_met_ = value.item<int64_t>() != 0;
    }
    return {};
  }
  std::shared_ptr<Delta> copy() const override {
    auto result = LowRankDelta::copy();
    auto& other = static_cast<VeloraDelta&>(*result);
    other.set_direction(direction_);
    other.is_met_ = is_met_;
    return result;
  }
  std::string take(const Delta& other, bool may_grow, bool dry_run) override {
    const auto* from = dynamic_cast<const VeloraDelta*>(&other);
    if (from != nullptr && from->direction_.sizes() != direction_.sizes()) {
      return "its num_groups is another";
    }
    const auto misfit = LowRankDelta::take(other, may_grow, dry_run);
    if (misfit.empty() && !dry_run) {
      set_direction(from->direction_);
      is_met_ = from->is_met_;
    }
    return misfit;
  }

  int64_t r() const {
    return tensor("lora_A.weight").size(0);
  }
  std::string describe() const override {
    return "velora r=" + std::to_string(r());
  }
  const Config& config() const {
    return config_;
  }

 private:
  /// e for this batch, which may make it.
  Tensor direction_for(const Tensor& x) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto& type = config_.options.init_type();
    if (type == "batch_average" || (type == "batch_average_once" && !is_met_)) {
      const torch::NoGradGuard no_grad;
      const Tensor groups =
          detail::velora_groups(x.detach(), config_.options.num_groups());
      direction_.copy_(detail::velora_direction(groups.flatten(0, 1).mean(0)));
      is_met_ = true;
    }
    // Backward reads what this pass had.
    return direction_.clone();
  }

  Config config_;
  Tensor direction_;
  mutable std::mutex mutex_;
  mutable bool is_met_ = false; // the first batch
};

} // namespace peft
