#pragma once

// OFT, orthogonal fine-tuning (Qiu et al. 2023, arXiv:2306.07280; 2025,
// arXiv:2506.19847): the inputs of a layer are rotated in blocks.
//
//   y = W (Rᵀ x) + b,  W' = W Rᵀ,  R = diag(R_1, ..., R_n)
//   R_i = (I - Q_i) (I + Q_i)⁻¹     Q_i skew-symmetric, b (b - 1) / 2 numbers
//
// With use_cayley_neumann, HF's default, R_i is a sum of powers of Q_i instead,
// near a rotation where Q_i is small. Weights of convolutions count as [out,
// rest], embeddings are rotated row by row: W' = W R.

#include <peft/core/formula_delta.h>
#include <peft/functional/rotation.h>
#include <peft/methods/tuner_targets.h>

#include <torch/nn/init.h>

#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for OFT, by the names of HF's OFTConfig.
///
///   peft::OftOptions().oft_block_size(32).targets({"query", "value"})
struct OftOptions {
  OftOptions() = default;

  /// b, or r for the number of blocks; one of the two is 0. What does not
  /// divide the inputs gives way to the nearest number that does.
  TORCH_ARG(int64_t, oft_block_size) = 32;
  TORCH_ARG(int64_t, r) = 0;
  /// In training: the share of blocks that do not rotate.
  TORCH_ARG(double, module_dropout) = 0;
  /// Constrained: each step Q_i is drawn back to a norm of eps / √n.
  TORCH_ARG(bool, coft) = false;
  TORCH_ARG(double, eps) = 6e-5;
  /// One R_i for all blocks.
  TORCH_ARG(bool, block_share) = false;
  TORCH_ARG(bool, use_cayley_neumann) = true;
  TORCH_ARG(int64_t, num_cayley_neumann_terms) = 5;
  /// HF's init_weights: false draws Q from N(0, 0.01).
  TORCH_ARG(bool, init_weights) = true;
  /// Which biases train too: "none", "oft_only" (those of the targets), "all".
  TORCH_ARG(std::string, bias) = "none";
  /// As in LoraOptions.
  TORCH_ARG(Targets, targets);
  TORCH_ARG(Targets, exclude);
  TORCH_ARG(std::vector<int64_t>, layers);
  TORCH_ARG(std::vector<std::string>, layers_pattern);
  TORCH_ARG(bool, fan_in_fan_out) = false;
  TORCH_ARG(std::vector<std::string>, modules_to_save);
};

/// OFT at one weight.
class OftDelta final : public FormulaDelta<OftDelta> {
 public:
  struct Config {
    int64_t block = 0; // b
    int64_t blocks = 0; // n
    bool is_embedding = false;
    double module_dropout = 0;
    double coft_eps = 0; // 0: not constrained
    int64_t neumann_terms = 0; // 0: exact
  };

  OftDelta(Config config, NamedTensors tensors, bool is_transposed)
      : FormulaDelta(std::move(tensors), is_transposed), config_(config) {}

  Tensor changed(const Tensor& weight, double scale) const {
    const Tensor R = rotations().to(weight.scalar_type());
    const Tensor rotated =
        functional::times_blocks(
            weight.flatten(1), config_.is_embedding ? R : R.transpose(1, 2))
            .view(weight.sizes());
    return scale == 1.0 ? rotated : weight + (rotated - weight) * scale;
  }

  bool has_linear() const override {
    return !is_transposed() && !config_.is_embedding;
  }
  /// x R, on the features that are the columns of W.
  Tensor linear(
      const LinearCall& call,
      const Below<LinearCall>& below,
      double scale) const override {
    if (scale != 1.0 || call.transposed) {
      const Tensor weight = call.transposed
          ? changed(call.weight.t(), scale).t()
          : changed(call.weight, scale);
      return below({call.x, weight, call.bias, call.rows, call.transposed});
    }
    const Tensor R = rotations();
    const Tensor x = functional::times_blocks(call.x.to(R.scalar_type()), R);
    return below(
        {x.to(call.x.scalar_type()),
         call.weight,
         call.bias,
         call.rows,
         call.transposed});
  }

  bool has_embedding() const override {
    return config_.is_embedding;
  }
  /// Rotates the rows that were looked up: as in HF padding_idx and
  /// scale_grad_by_freq, which are about the table, change no gradient of R.
  Tensor embedding(
      const EmbeddingCall& call,
      const Below<EmbeddingCall>& below,
      double scale) const override {
    const Tensor y = below(call);
    const Tensor R = rotations();
    const Tensor rows = y.to(R.scalar_type());
    const Tensor rotated = functional::times_blocks(rows, R);
    return (scale == 1.0 ? rotated : rows + (rotated - rows) * scale)
        .to(y.scalar_type());
  }

  std::string describe() const override {
    return "oft b=" + std::to_string(config_.block);
  }
  const Config& config() const {
    return config_;
  }

 private:
  const char* name() const {
    return config_.is_embedding ? "oft_embedding_R.weight" : "oft_R.weight";
  }

  /// [n, b, b], or [1, b, b] where the blocks share one.
  Tensor rotations() const {
    const Tensor upper = constrained(tensor(name()));
    const Tensor Q = functional::skew_symmetric(upper, config_.block);
    Tensor R = config_.neumann_terms > 0
        ? functional::cayley_neumann(Q, config_.neumann_terms)
        : functional::cayley(Q);
    if (is_training() && config_.module_dropout > 0 && R.size(0) > 1) {
      const int64_t n = R.size(0);
      const auto still = static_cast<int64_t>(config_.module_dropout * n);
      const Tensor mask = at::cat({at::ones(still), at::zeros(n - still)})
                              .index_select(0, at::randperm(n))
                              .to(R.options())
                              .view({n, 1, 1});
      R = R * (1 - mask) + at::eye(config_.block, R.options()) * mask;
    }
    return R;
  }

  /// Within COFT's radius. As HF has it the parameter itself is shortened,
  /// where it trains; reading it without gradients writes nothing, so that
  /// threads may.
  Tensor constrained(const Tensor& upper) const {
    if (config_.coft_eps <= 0) {
      return upper;
    }
    const bool trains = at::GradMode::is_enabled() && upper.requires_grad();
    torch::NoGradGuard no_grad;
    const double eps =
        config_.coft_eps / std::sqrt(static_cast<double>(upper.size(0)));
    // ‖Q‖ counts each entry twice.
    const Tensor norm = upper.norm(2, {1}, true) * std::sqrt(2.0);
    const Tensor shortened =
        at::where(norm.le(eps), upper, upper * (eps / norm));
    if (!trains) {
      return shortened;
    }
    Tensor parameter = upper;
    parameter.copy_(shortened);
    return parameter;
  }

  Config config_;
};

namespace detail {

/// The divisor of n that is nearest to `wish`, the smaller of two as near.
inline int64_t nearest_divisor(int64_t n, int64_t wish) {
  if (wish >= n) {
    return n;
  }
  int64_t above = wish, below = wish;
  while (n % above != 0) {
    ++above;
  }
  while (below > 1 && n % below != 0) {
    --below;
  }
  return wish - below <= above - wish ? below : above;
}

inline std::shared_ptr<OftDelta> make_oft(
    const OftOptions& options,
    const TunerWeight& w) {
  TORCH_CHECK(
      w.layer.groups == 1,
      "peft: OFT rotates all inputs of a layer, and the convolution '",
      w.path,
      "' has ",
      w.layer.groups,
      " groups; leave it out");
  OftDelta::Config config;
  config.is_embedding = w.layer.kind == LayerKind::embedding;
  const int64_t in = w.in_features();
  const bool by_size = options.oft_block_size() != 0;
  const int64_t wish = by_size ? options.oft_block_size() : options.r();
  const int64_t found = nearest_divisor(in, wish);
  if (found != wish) {
    TORCH_WARN(
        "peft: ",
        by_size ? "oft_block_size " : "r ",
        wish,
        " does not divide the ",
        in,
        " inputs of '",
        w.path,
        "'; taken ",
        found);
  }
  config.block = by_size ? found : in / found;
  config.blocks = in / config.block;
  config.module_dropout = options.module_dropout();
  config.coft_eps = options.coft() ? options.eps() : 0;
  config.neumann_terms =
      options.use_cayley_neumann() ? options.num_cayley_neumann_terms() : 0;
  Tensor upper = torch::zeros(
      {options.block_share() ? 1 : config.blocks,
       config.block * (config.block - 1) / 2});
  if (!options.init_weights()) {
    torch::nn::init::normal_(upper, 0, 0.1);
  }
  return std::make_shared<OftDelta>(
      config,
      OftDelta::NamedTensors{
          {config.is_embedding ? "oft_embedding_R.weight" : "oft_R.weight",
           parameter_for(w.weight, upper)}},
      w.is_transposed);
}

inline Plan plan(const OftOptions& options, const Network& network) {
  TORCH_CHECK_VALUE(
      options.r() >= 0 && options.oft_block_size() >= 0 &&
          (options.r() == 0) != (options.oft_block_size() == 0),
      "peft: OFT takes the size of its blocks, oft_block_size, or their "
      "number, "
      "r, and 0 for the other; got ",
      options.oft_block_size(),
      " and ",
      options.r());
  TORCH_CHECK_VALUE(
      options.module_dropout() >= 0 && options.module_dropout() < 1,
      "peft: module_dropout must lie in [0, 1), got ",
      options.module_dropout());
  TORCH_CHECK_VALUE(
      !options.coft() || options.eps() > 0,
      "peft: eps must be positive, got ",
      options.eps());
  TORCH_CHECK_VALUE(
      !options.use_cayley_neumann() || options.num_cayley_neumann_terms() > 0,
      "peft: num_cayley_neumann_terms must be positive, got ",
      options.num_cayley_neumann_terms());
  check_bias(options.bias(), "oft_only");
  Plan result;
  result.method = "OFT";
  result.options = options;
  result.sites = plan_tuner(
      options,
      network,
      {"OFT", /*convolutions=*/true, /*embeddings=*/true},
      [&](const TunerWeight& w) { return make_oft(options, w); },
      options.bias());
  return result;
}

} // namespace detail

/// Puts OFT on `model` and freezes everything else.
inline Adapter attach(
    torch::nn::Module& model,
    const OftOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
