#pragma once

// VeRA, vector-based random matrix adaptation (Kopiczko et al. 2023,
// arXiv:2310.11454):
//
//   y = W x + b + λ_b ⊙ B (λ_d ⊙ A x)       λ_d [r], λ_b [out]
//
// A [r, widest in] and B [widest out, r] are random, frozen, and the same for
// all layers, each of which takes the columns and rows that it has. A seed
// gives them, to the bit those of HF PEFT. λ_b starts at zero.

#include <peft/core/formula_delta.h>
#include <peft/methods/tuner_targets.h>

#include <ATen/CPUGeneratorImpl.h>

#include <cmath>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for VeRA, by the names of HF's VeraConfig.
///
///   peft::VeraOptions(256).targets({"query", "value"})
struct VeraOptions {
  VeraOptions(int64_t r = 256) : r_(r) {}

  TORCH_ARG(int64_t, r);
  /// The seed of A and B.
  TORCH_ARG(int64_t, projection_prng_key) = 0;
  /// Whether A and B go into the file, or the seed alone.
  TORCH_ARG(bool, save_projection) = true;
  /// HF's vera_dropout: on x, before A, in training mode.
  TORCH_ARG(double, dropout) = 0;
  /// What λ_d starts as.
  TORCH_ARG(double, d_initial) = 0.1;
  /// HF's init_weights: false starts with λ_b of ones and λ_d of N(0, 1).
  TORCH_ARG(bool, init_weights) = true;
  /// Which biases train too: "none", "vera_only" (those of the targets), "all".
  TORCH_ARG(std::string, bias) = "none";
  /// As in LoraOptions.
  TORCH_ARG(Targets, targets);
  TORCH_ARG(Targets, exclude);
  TORCH_ARG(std::vector<int64_t>, layers);
  TORCH_ARG(std::vector<std::string>, layers_pattern);
  TORCH_ARG(bool, fan_in_fan_out) = false;
  TORCH_ARG(std::vector<std::string>, modules_to_save);
};

namespace detail {

/// A and B of one adapter, which all its deltas and their copies share.
class VeraProjections {
 public:
  VeraProjections(Tensor A, Tensor B) : A_(std::move(A)), B_(std::move(B)) {}

  /// As HF draws them: A first, each uniform with variance 2 / fan_in.
  static std::shared_ptr<VeraProjections>
  draw(int64_t r, int64_t in, int64_t out, int64_t seed) {
    const auto generator =
        at::detail::createCPUGenerator(static_cast<uint64_t>(seed));
    const auto uniform = [&](int64_t rows, int64_t columns) {
      const double bound = std::sqrt(3.0) *
          (std::sqrt(2.0) / std::sqrt(static_cast<double>(columns)));
      return torch::empty({rows, columns}).uniform_(-bound, bound, generator);
    };
    const Tensor A = uniform(r, in);
    return std::make_shared<VeraProjections>(A, uniform(out, r));
  }

  const Tensor& A() const {
    return A_;
  }
  const Tensor& B() const {
    return B_;
  }
  /// As in HF a draw has the precision of the weights that it is for.
  void round(at::ScalarType dtype) {
    set(A_.to(dtype), B_.to(dtype));
  }
  /// Takes those of a file.
  void set(const Tensor& A, const Tensor& B) {
    const std::lock_guard<std::mutex> lock(mutex_);
    A_ = A.to(at::kCPU, at::kFloat);
    B_ = B.to(at::kCPU, at::kFloat);
    copies_.clear();
  }

  /// A and B where, and in the dtype that, `like` is.
  std::pair<Tensor, Tensor> on(const Tensor& like) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& copy : copies_) {
      if (copy.first.device() == like.device() &&
          copy.first.scalar_type() == like.scalar_type()) {
        return copy;
      }
    }
    const c10::InferenceMode off(false);
    const auto options = like.options().requires_grad(false);
    if (like.scalar_type() == at::kDouble) { // a merge's, asked for once
      return {A_.to(options), B_.to(options)};
    }
    copies_.emplace_back(A_.to(options), B_.to(options));
    return copies_.back();
  }

 private:
  Tensor A_, B_;
  mutable std::mutex mutex_;
  mutable std::vector<std::pair<Tensor, Tensor>> copies_;
};

} // namespace detail

/// VeRA at one weight.
class VeraDelta final : public FormulaDelta<VeraDelta> {
 public:
  struct Config {
    std::shared_ptr<detail::VeraProjections> projections;
    double dropout = 0;
  };

  VeraDelta(Config config, NamedTensors tensors, bool is_transposed)
      : FormulaDelta(std::move(tensors), is_transposed),
        config_(std::move(config)) {}

  Tensor changed(const Tensor& weight, double scale) const {
    const auto [A, B] =
        factors(Rows{0, weight.size(1)}, Rows{0, weight.size(0)});
    return at::addmm(
        weight,
        B.to(weight.scalar_type()),
        A.to(weight.scalar_type()),
        1,
        scale);
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
    const Tensor y = below(call);
    Tensor x = call.x.to(tensor("vera_lambda_d").scalar_type());
    x = at::dropout(x, config_.dropout, is_training());
    // The rows of a call are those of the matrix as it lies.
    const bool turned = call.transposed != is_transposed();
    const Rows whole{0, turned ? y.size(-1) : x.size(-1)};
    const auto [A, B] = is_transposed()
        ? factors(call.rows, Rows{0, tensor("vera_lambda_b").numel()})
        : factors(whole, call.rows);
    const Tensor term = turned ? at::matmul(at::matmul(x, B), A)
                               : at::linear(at::linear(x, A), B);
    return at::add(y, term, scale).to(y.scalar_type());
  }
  int64_t linear_cost() const override {
    return is_training() && config_.dropout > 0
        ? 0
        : tensor("vera_lambda_d").numel() *
            (tensor("vera_lambda_b").numel() +
             config_.projections->A().size(1));
  }

  std::string describe() const override {
    return "vera r=" + std::to_string(tensor("vera_lambda_d").numel());
  }
  const Config& config() const {
    return config_;
  }

 private:
  /// λ_d ⊙ A's columns for these inputs, λ_b ⊙ B's rows for these outputs.
  std::pair<Tensor, Tensor> factors(const Rows& in, const Rows& out) const {
    const Tensor d = tensor("vera_lambda_d"), b = tensor("vera_lambda_b");
    const auto [A, B] = config_.projections->on(d);
    return {
        d.unsqueeze(1) * A.slice(1, in.begin, in.end),
        b.slice(0, out.begin, out.end).unsqueeze(1) *
            B.slice(0, out.begin, out.end)};
  }

  Config config_;
};

namespace detail {

inline Plan plan(const VeraOptions& options, const Network& network) {
  TORCH_CHECK_VALUE(
      options.r() > 0, "peft: r must be positive, got ", options.r());
  TORCH_CHECK_VALUE(
      options.dropout() >= 0 && options.dropout() < 1,
      "peft: dropout must lie in [0, 1), got ",
      options.dropout());
  TORCH_CHECK_VALUE(
      options.projection_prng_key() >= 0,
      "peft: projection_prng_key is a seed and must not be negative, got ",
      options.projection_prng_key());
  check_bias(options.bias(), "vera_only");
  const TunerRules rules{"VeRA"};
  int64_t in = 0, out = 0;
  const auto weights = tuner_weights(options, network, rules);
  for (const auto& w : weights) {
    in = std::max(in, w.in_features());
    out = std::max(out, w.out_features());
  }
  const auto shared = VeraProjections::draw(
      options.r(), in, out, options.projection_prng_key());
  for (const auto& w : weights) {
    shared->round(w.weight.scalar_type());
  }
  Plan result;
  result.method = "VERA";
  result.options = options;
  result.sites = plan_tuner(
      options,
      network,
      rules,
      [&](const TunerWeight& w) {
        // HF draws λ_d in any case.
        Tensor b = torch::ones({w.out_features()});
        Tensor d = torch::randn({options.r()});
        if (options.init_weights()) {
          b.zero_();
          d.fill_(options.d_initial());
        }
        return std::make_shared<VeraDelta>(
            VeraDelta::Config{shared, options.dropout()},
            VeraDelta::NamedTensors{
                {"vera_lambda_b", parameter_for(w.weight, b)},
                {"vera_lambda_d", parameter_for(w.weight, d)}},
            w.is_transposed);
      },
      options.bias());
  return result;
}

} // namespace detail

/// Puts VeRA on `model` and freezes everything else.
inline Adapter attach(
    torch::nn::Module& model,
    const VeraOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
