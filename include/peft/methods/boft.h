#pragma once

// BOFT, orthogonal butterfly (Liu et al. 2023, arXiv:2311.06243): rotations in
// blocks, m of them one after another with the inputs shuffled in between, and
// a scale on each output.
//
//   W' = s ⊙ W Rᵀ,  R = P_m B_m P_mᵀ ... P_1 B_1 P_1ᵀ,  B_i = diag(rotations)
//   y = s ⊙ W (Rᵀ x) + b
//
// Each rotation is the Cayley map of the skew part of a free [b, b] matrix.

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

/// Options for BOFT, by the names of HF's BOFTConfig.
///
///   peft::BoftOptions().boft_block_size(4).targets({"query", "value"})
struct BoftOptions {
  BoftOptions() = default;

  /// b, or the number of blocks; one of the two is 0, and both divide the
  /// inputs.
  TORCH_ARG(int64_t, boft_block_size) = 4;
  TORCH_ARG(int64_t, boft_block_num) = 0;
  /// m.
  TORCH_ARG(int64_t, boft_n_butterfly_factor) = 1;
  /// HF's boft_dropout, in training: the share of one factor's blocks that do
  /// not rotate.
  TORCH_ARG(double, dropout) = 0;
  /// HF's init_weights: false draws all from N(·, 0.01).
  TORCH_ARG(bool, init_weights) = true;
  /// Which biases train too: "none", "boft_only" (those of the targets), "all".
  TORCH_ARG(std::string, bias) = "none";
  /// As in LoraOptions.
  TORCH_ARG(Targets, targets);
  TORCH_ARG(Targets, exclude);
  TORCH_ARG(std::vector<int64_t>, layers);
  TORCH_ARG(std::vector<std::string>, layers_pattern);
  TORCH_ARG(bool, fan_in_fan_out) = false;
  TORCH_ARG(std::vector<std::string>, modules_to_save);
};

/// BOFT at one weight.
class BoftDelta final : public FormulaDelta<BoftDelta> {
 public:
  struct Config {
    double dropout = 0;
    /// int64 [m, in]: what P_i puts at each place.
    Tensor shuffles;
  };

  BoftDelta(Config config, NamedTensors tensors, bool is_transposed)
      : FormulaDelta(std::move(tensors), is_transposed),
        config_(std::move(config)) {}

  Tensor changed(const Tensor& weight, double scale) const {
    return changed_rows(weight, Rows{0, weight.size(0)}, scale);
  }

  bool has_linear() const override {
    return !is_transposed();
  }
  Tensor linear(
      const LinearCall& call,
      const Below<LinearCall>& below,
      double scale) const override {
    const bool turned = call.transposed;
    const bool whole =
        call.rows.end - call.rows.begin == tensor("boft_s").numel();
    if (scale != 1.0 || turned || !whole) {
      const Tensor part = turned ? call.weight.t() : call.weight;
      const Tensor weight = changed_rows(part, call.rows, scale);
      return below(
          {call.x,
           turned ? weight.t() : weight,
           call.bias,
           call.rows,
           call.transposed});
    }
    const Tensor blocks = rotations();
    Tensor x = call.x.to(blocks.scalar_type());
    for (int64_t i = blocks.size(0) - 1; i >= 0; --i) {
      x = between(x, blocks[i], i);
    }
    const std::optional<Tensor> none;
    const Tensor y = below(
        {x.to(call.x.scalar_type()),
         call.weight,
         none,
         call.rows,
         call.transposed});
    const Tensor scaled = y * scales(call.rows);
    return (call.bias && call.bias->defined() ? scaled + *call.bias : scaled)
        .to(y.scalar_type());
  }

  std::string describe() const override {
    const Tensor R = tensor("boft_R");
    return "boft m=" + std::to_string(R.size(0)) +
        " b=" + std::to_string(R.size(2));
  }
  const Config& config() const {
    return config_;
  }

 private:
  /// Some rows of the matrix, with their part of s.
  Tensor changed_rows(const Tensor& weight, const Rows& part, double scale)
      const {
    // Row by row: W Rᵀ = W P_1 B_1ᵀ P_1ᵀ ... P_m B_mᵀ P_mᵀ.
    const Tensor blocks = rotations().to(weight.scalar_type()).transpose(2, 3);
    Tensor rows = weight.flatten(1);
    for (int64_t i = 0; i < blocks.size(0); ++i) {
      rows = between(rows, blocks[i], i);
    }
    rows = rows * scales(part).to(weight.scalar_type()).unsqueeze(1);
    const Tensor result = rows.view(weight.sizes());
    return scale == 1.0 ? result : weight + (result - weight) * scale;
  }

  /// s for these outputs.
  Tensor scales(const Rows& part) const {
    return tensor("boft_s").view({-1}).slice(0, part.begin, part.end);
  }

  /// [m, n, b, b].
  Tensor rotations() const {
    const Tensor R = tensor("boft_R");
    const int64_t m = R.size(0), n = R.size(1), b = R.size(2);
    const Tensor flat = R.view({m * n, b, b});
    Tensor Q = functional::cayley((flat - flat.transpose(1, 2)) * 0.5)
                   .view({m, n, b, b});
    if (is_training() && config_.dropout > 0) {
      const auto chosen = at::randint(0, m, {1}).item<int64_t>();
      const auto still = static_cast<int64_t>(config_.dropout * n);
      const Tensor part = at::cat({at::ones(still), at::zeros(n - still)})
                              .index_select(0, at::randperm(n));
      Tensor mask = at::zeros({m, n});
      mask[chosen].copy_(part);
      mask = mask.to(Q.options()).view({m, n, 1, 1});
      Q = Q * (1 - mask) + at::eye(b, Q.options()) * mask;
    }
    return Q;
  }

  /// rows P_i B P_iᵀ.
  Tensor between(const Tensor& rows, const Tensor& blocks, int64_t i) const {
    if (i == 0 && config_.shuffles.size(0) == 1) { // P_1 is I
      return functional::times_blocks(rows, blocks);
    }
    const Tensor order = config_.shuffles[i].to(rows.device());
    // Column j of P_i is the unit vector at the place where `order` is j.
    const Tensor back = order.argsort();
    return functional::times_blocks(rows.index_select(-1, back), blocks)
        .index_select(-1, order);
  }

  Config config_;
};

namespace detail {

/// What the i-th of m shuffles puts at each of n places, for blocks of b:
/// pieces of b / 2, within groups of 2ⁱ b, the even ones before the odd ones.
inline Tensor butterfly(int64_t n, int64_t b, int64_t i, int64_t m) {
  Tensor order = at::arange(n, at::kLong);
  if (m == 1) {
    return order;
  }
  const int64_t group = b << i, piece = b / 2;
  const Tensor pieces = order.view({n / group, group / piece, piece});
  return at::cat(
             {pieces.slice(1, 0, c10::nullopt, 2),
              pieces.slice(1, 1, c10::nullopt, 2)},
             1)
      .reshape({n});
}

inline std::shared_ptr<BoftDelta> make_boft(
    const BoftOptions& options,
    const TunerWeight& w) {
  TORCH_CHECK(
      w.layer.groups == 1,
      "peft: BOFT rotates all inputs of a layer, and the convolution '",
      w.path,
      "' has ",
      w.layer.groups,
      " groups; leave it out");
  const int64_t in = w.in_features(), m = options.boft_n_butterfly_factor();
  const bool by_size = options.boft_block_size() != 0;
  const int64_t given =
      by_size ? options.boft_block_size() : options.boft_block_num();
  TORCH_CHECK_VALUE(
      in % given == 0,
      "peft: ",
      by_size ? "boft_block_size " : "boft_block_num ",
      given,
      " does not divide the ",
      in,
      " inputs of '",
      w.path,
      "'");
  const int64_t b = by_size ? given : in / given, n = in / b;
  TORCH_CHECK_VALUE(
      m == 1 || (b % 2 == 0 && n % (int64_t{1} << (m - 1)) == 0),
      "peft: ",
      m,
      " butterfly factors at '",
      w.path,
      "' want blocks of an even size and a number of them that 2^",
      m - 1,
      " divides, got ",
      n,
      " of ",
      b);
  BoftDelta::Config config;
  config.dropout = options.dropout();
  std::vector<Tensor> shuffles;
  for (int64_t i = 0; i < m; ++i) {
    shuffles.push_back(butterfly(in, b, i, m));
  }
  config.shuffles = at::stack(shuffles);
  Tensor R = torch::zeros({m, n, b, b});
  const int64_t out = w.out_features();
  Tensor s = w.is_convolution() ? torch::ones({1, out}) : torch::ones({out, 1});
  if (!options.init_weights()) {
    torch::nn::init::normal_(R, 0, 0.1);
    torch::nn::init::normal_(s, 1, 0.1);
  }
  return std::make_shared<BoftDelta>(
      std::move(config),
      BoftDelta::NamedTensors{
          {"boft_R", parameter_for(w.weight, R)},
          {"boft_s", parameter_for(w.weight, s)}},
      w.is_transposed);
}

inline Plan plan(const BoftOptions& options, const Network& network) {
  TORCH_CHECK_VALUE(
      options.boft_block_num() >= 0 && options.boft_block_size() >= 0 &&
          (options.boft_block_num() == 0) != (options.boft_block_size() == 0),
      "peft: BOFT takes the size of its blocks, boft_block_size, or their "
      "number, boft_block_num, and 0 for the other; got ",
      options.boft_block_size(),
      " and ",
      options.boft_block_num());
  TORCH_CHECK_VALUE(
      options.boft_n_butterfly_factor() > 0,
      "peft: boft_n_butterfly_factor must be positive, got ",
      options.boft_n_butterfly_factor());
  TORCH_CHECK_VALUE(
      options.dropout() >= 0 && options.dropout() < 1,
      "peft: dropout must lie in [0, 1), got ",
      options.dropout());
  check_bias(options.bias(), "boft_only");
  Plan result;
  result.method = "BOFT";
  result.options = options;
  result.sites = plan_tuner(
      options,
      network,
      {"BOFT", /*convolutions=*/true},
      [&](const TunerWeight& w) { return make_boft(options, w); },
      options.bias());
  return result;
}

} // namespace detail

/// Puts BOFT on `model` and freezes everything else.
inline Adapter attach(
    torch::nn::Module& model,
    const BoftOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
