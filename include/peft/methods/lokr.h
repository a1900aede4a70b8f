#pragma once

// LoKr, the low-rank Kronecker product (Edalati et al. 2022, arXiv:2212.10650;
// Yeh et al. 2023, LyCORIS, arXiv:2309.14859):
//
//   W' = W + alpha / r · w1 ⊗ w2       w1 [l, m], w2 [k, n], l k = out, m n =
//   in
//
// out and in are split near their roots (or by decompose_factor). w2 is w2_a
// w2_b of rank r where that is smaller, w1 too with decompose_both. A
// convolution's kernel belongs to w2. w1 starts at zero.

#include <peft/core/formula_delta.h>
#include <peft/functional/kronecker.h>
#include <peft/methods/kronecker_term.h>
#include <peft/methods/lycoris.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for LoKr, by the names of HF's LoKrConfig.
///
///   peft::LoKrOptions(8).alpha(16).targets({"query", "value"})
struct LoKrOptions {
  using Pattern = std::vector<std::pair<std::string, double>>;

  LoKrOptions(int64_t r = 8) : r_(r) {}

  TORCH_ARG(int64_t, r);
  /// The update is scaled by alpha / r.
  TORCH_ARG(double, alpha) = 8;
  /// w1 as a product of rank r too, where that is smaller.
  TORCH_ARG(bool, decompose_both) = false;
  /// The smaller factor of out and of in, where it divides them; -1: near the
  /// root.
  TORCH_ARG(int64_t, decompose_factor) = -1;
  /// As in LoHaOptions; the rest is scaled only with rank_dropout_scale.
  TORCH_ARG(double, rank_dropout) = 0;
  TORCH_ARG(bool, rank_dropout_scale) = false;
  TORCH_ARG(double, module_dropout) = 0;
  /// For convolutions with a kernel above 1: w2 with a core [r, r, k, k].
  TORCH_ARG(bool, use_effective_conv2d) = false;
  /// HF's init_weights: "zero" (its true: w1 is zero), "random" (its false), or
  /// "lycoris" (w2 is zero).
  TORCH_ARG(std::string, init_weights) = "zero";
  /// As in LoraOptions.
  TORCH_ARG(Targets, targets);
  TORCH_ARG(Targets, exclude);
  TORCH_ARG(std::vector<int64_t>, layers);
  TORCH_ARG(std::vector<std::string>, layers_pattern);
  TORCH_ARG(Pattern, rank_pattern);
  TORCH_ARG(Pattern, alpha_pattern);
  TORCH_ARG(bool, fan_in_fan_out) = false;
  TORCH_ARG(std::vector<std::string>, modules_to_save);
};

/// LoKr at one weight.
class LoKrDelta final : public FormulaDelta<LoKrDelta> {
 public:
  using Config = detail::LycorisConfig;

  LoKrDelta(Config config, NamedTensors tensors, bool is_transposed)
      : FormulaDelta(std::move(tensors), is_transposed), config_(config) {}

  Tensor changed(const Tensor& weight, double scale) const {
    Tensor left = w1().to(weight.scalar_type());
    const Tensor right = w2().to(weight.scalar_type());
    const double s = scale * config_.scaling;
    if (right.dim() == 2 && !draws()) {
      return functional::kronecker_merged(weight, left, right, s);
    }
    // [l, m] beside [k, n, h, w]; beside [k, n, h] PEFT takes it for [1, l, m].
    if (right.dim() == 4) {
      left = left.unsqueeze(-1).unsqueeze(-1);
    }
    return detail::add_lycoris(
        weight,
        at::kron(left, right.contiguous()).reshape(weight.sizes()),
        s,
        config_,
        is_training());
  }

  /// Two small products in place of w1 ⊗ w2: at 768 × 768 a thirteenth of the
  /// base's multiply-adds a row, and no gradient of the weight's size. What a
  /// dropout draws are rows of w1 ⊗ w2.
  bool has_linear() const override {
    return !draws();
  }
  Tensor linear(
      const LinearCall& call,
      const Below<LinearCall>& below,
      double scale) const override {
    if (is_training()) {
      at::rand({1}); // HF draws in any case
    }
    const Tensor y = below(call);
    const Tensor left = is_transposed() ? w1().t() : w1();
    const Tensor right = is_transposed() ? w2().t() : w2();
    const Rows all{0, left.size(0) * right.size(0)};
    const Tensor term =
        detail::kronecker_term(call, left, right, all, scale * config_.scaling);
    return (y + term).to(y.scalar_type());
  }
  int64_t linear_cost() const override {
    return functional::kronecker_cost(w1(), w2());
  }

  bool is_additive() const override {
    return true;
  }
  std::string describe() const override {
    return "lokr r=" + std::to_string(config_.r);
  }
  const Config& config() const {
    return config_;
  }

 private:
  Tensor w1() const {
    return tensor("lokr_w1").defined()
        ? tensor("lokr_w1")
        : at::mm(tensor("lokr_w1_a"), tensor("lokr_w1_b"));
  }
  /// A matrix, or [k, n, kernel...] at a convolution.
  Tensor w2() const {
    if (tensor("lokr_w2").defined()) {
      return tensor("lokr_w2");
    }
    return tensor("lokr_t2").defined()
        ? detail::core_product(
              tensor("lokr_t2"), tensor("lokr_w2_a"), tensor("lokr_w2_b"))
        : at::mm(tensor("lokr_w2_a"), tensor("lokr_w2_b"));
  }
  bool draws() const {
    return is_training() &&
        (config_.rank_dropout > 0 || config_.module_dropout > 0);
  }

  Config config_;
};

namespace detail {

/// n = a b with a <= b: a is `factor` where that divides n, else the divisor up
/// to `factor` (-1: any) that makes a + b least, found upwards as LyCORIS does.
inline std::pair<int64_t, int64_t> factorization(int64_t n, int64_t factor) {
  if (factor > 0 && n % factor == 0) {
    return {factor, n / factor};
  }
  const int64_t most = factor == -1 ? n : factor;
  int64_t a = 1, b = n;
  while (a < b) {
    int64_t next = a + 1;
    while (n % next != 0) {
      ++next;
    }
    if (next + n / next > 1 + n || next > most) {
      break;
    }
    a = next;
    b = n / next;
  }
  return std::minmax(a, b);
}

inline std::shared_ptr<LoKrDelta> make_lokr(
    const LoKrOptions& options,
    const TunerWeight& w) {
  auto config = lycoris_config(options, w);
  config.rank_dropout_scale = options.rank_dropout_scale();
  const int64_t r = config.r;
  const auto cores = lycoris_core(options, w, r);
  const auto kernel = w.is_convolution() ? w.weight.sizes().slice(2).vec()
                                         : std::vector<int64_t>{};
  const int64_t in = w.is_convolution() ? w.weight.size(1) : w.in_features();
  const auto [l, k] =
      factorization(w.out_features(), options.decompose_factor());
  const auto [m, n] = factorization(in, options.decompose_factor());
  const auto is_small = [&](int64_t a, int64_t b) {
    return 2 * r < std::max(a, b);
  };

  FormulaDelta<LoKrDelta>::NamedTensors tensors;
  const auto add =
      [&](const char* name, std::vector<int64_t> sizes, bool zero) {
        const Tensor t = torch::empty(sizes);
        tensors.emplace_back(
            name, parameter_for(w.weight, zero ? t.zero_() : draw_kaiming_(t)));
      };
  const bool zero_w1 = options.init_weights() == "zero";
  const bool zero_w2 = options.init_weights() == "lycoris";
  if (options.decompose_both() && is_small(l, m)) {
    add("lokr_w1_a", {l, r}, zero_w1);
    add("lokr_w1_b", {r, m}, false);
  } else {
    add("lokr_w1", {l, m}, zero_w1);
  }
  if (!is_small(k, n)) {
    std::vector<int64_t> sizes{k, n};
    sizes.insert(sizes.end(), kernel.begin(), kernel.end());
    add("lokr_w2", sizes, zero_w2);
  } else if (!cores.empty()) {
    add("lokr_w2_a", {r, k}, false);
    add("lokr_w2_b", {r, n}, zero_w2);
    add("lokr_t2", cores, false);
  } else {
    add("lokr_w2_a", {k, r}, false);
    add("lokr_w2_b", {r, n * c10::multiply_integers(kernel)}, zero_w2);
  }
  return std::make_shared<LoKrDelta>(
      config, std::move(tensors), w.is_transposed);
}

inline Plan plan(const LoKrOptions& options, const Network& network) {
  check_lycoris(options, "LoKr");
  TORCH_CHECK_VALUE(
      options.decompose_factor() == -1 || options.decompose_factor() > 0,
      "peft: decompose_factor must be positive, or -1 for a split near the "
      "root, got ",
      options.decompose_factor());
  const auto& init = options.init_weights();
  TORCH_CHECK_VALUE(
      init == "zero" || init == "random" || init == "lycoris",
      "peft: init_weights must be 'zero', 'random' or 'lycoris', got '",
      init,
      "'");
  Plan result;
  result.method = "LOKR";
  result.options = options;
  result.sites = plan_tuner(
      options,
      network,
      {"LoKr", /*convolutions=*/true},
      [&](const TunerWeight& w) { return make_lokr(options, w); });
  return result;
}

} // namespace detail

/// Puts LoKr on `model` and freezes everything else.
inline Adapter attach(
    torch::nn::Module& model,
    const LoKrOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
