#pragma once

// What LoHa and LoKr share: LyCORIS's options, its two dropouts and its way
// with the kernels of convolutions (Yeh et al. 2023, arXiv:2309.14859).

#include <peft/methods/lora/options.h>
#include <peft/methods/tuner_targets.h>

#include <torch/nn/init.h>

#include <cmath>
#include <string>
#include <vector>

namespace peft {

namespace detail {

/// What a delta keeps of its options.
struct LycorisConfig {
  int64_t r = 8;
  double scaling = 1; // alpha / r
  double rank_dropout = 0;
  double module_dropout = 0;
  /// Whether what rank_dropout leaves is scaled to the same mean.
  bool rank_dropout_scale = true;
};

template <class Options>
void check_lycoris(const Options& options, const char* method) {
  TORCH_CHECK_VALUE(
      options.r() > 0, "peft: r must be positive, got ", options.r());
  TORCH_CHECK_VALUE(
      std::isfinite(options.alpha()),
      "peft: alpha must be finite, got ",
      options.alpha());
  for (const double p : {options.rank_dropout(), options.module_dropout()}) {
    TORCH_CHECK_VALUE(
        p >= 0 && p < 1,
        "peft: the dropouts of ",
        method,
        " must lie in [0, 1), got ",
        p);
  }
  for (const auto* patterns :
       {&options.rank_pattern(), &options.alpha_pattern()}) {
    for (const auto& item : *patterns) {
      check_regex(item.first, "rank_pattern or alpha_pattern");
    }
  }
  for (const auto& [pattern, rank] : options.rank_pattern()) {
    TORCH_CHECK_VALUE(
        rank >= 1 && rank == std::floor(rank),
        "peft: rank_pattern['",
        pattern,
        "'] must be a positive integer, got ",
        rank);
  }
}

template <class Options>
LycorisConfig lycoris_config(const Options& options, const TunerWeight& w) {
  LycorisConfig config;
  config.r = static_cast<int64_t>(pattern_value(
      options.rank_pattern(), w.layer.name, static_cast<double>(options.r())));
  config.scaling =
      pattern_value(options.alpha_pattern(), w.layer.name, options.alpha()) /
      static_cast<double>(config.r);
  config.rank_dropout = options.rank_dropout();
  config.module_dropout = options.module_dropout();
  return config;
}

/// The core's shape [r, r, k, k] (a Conv1d's kernel counts as [k, 1]) where the
/// options ask for one and the kernel is above 1; else empty.
template <class Options>
std::vector<int64_t>
lycoris_core(const Options& options, const TunerWeight& w, int64_t r) {
  const auto sizes = w.weight.sizes();
  if (!options.use_effective_conv2d() || !w.is_convolution() ||
      c10::multiply_integers(sizes.slice(2)) == 1) {
    return {};
  }
  TORCH_CHECK_VALUE(
      sizes.size() <= 4,
      "peft: use_effective_conv2d is for convolutions of one or two "
      "dimensions, and '",
      w.path,
      "' has ",
      sizes.size() - 2);
  return {r, r, sizes[2], sizes.size() == 4 ? sizes[3] : 1};
}

/// Σ_ij t[i, j, k, l] a[i, p] b[j, q] -> [p, q, k, l].
inline Tensor core_product(const Tensor& t, const Tensor& a, const Tensor& b) {
  return at::einsum("ijkl,ip,jq->pqkl", {t, a, b});
}

/// HF's draw for a factor: uniform within ±1/√fan_in.
inline Tensor draw_kaiming_(Tensor t) {
  torch::nn::init::kaiming_uniform_(t, std::sqrt(5.0));
  return t;
}

/// weight + s · change, with the dropouts of a call in training.
inline Tensor add_lycoris(
    const Tensor& weight,
    Tensor change,
    double s,
    const LycorisConfig& config,
    bool is_training) {
  if (is_training) { // HF draws in any case
    const double drawn = at::rand({1}).item<double>();
    if (config.module_dropout > 0.0 && drawn <= config.module_dropout) {
      return weight;
    }
  }
  if (is_training && config.rank_dropout > 0.0) {
    Tensor kept =
        at::rand({change.size(0)}).gt(config.rank_dropout).to(change.options());
    if (config.rank_dropout_scale) {
      kept = kept / kept.mean().clamp_min(1e-30); // none kept: zero
    }
    std::vector<int64_t> shape(change.dim(), 1);
    shape[0] = -1;
    change = change * kept.view(shape);
  }
  return at::add(weight, change, s);
}

} // namespace detail

} // namespace peft
