#pragma once

// HRA, Householder reflection adaptation (Yuan et al. 2024, arXiv:2405.17484):
//
//   W' = W H_1 ... H_r,   H_i = I - 2 u_i u_iᵀ / ‖u_i‖²       u [in, r]
//
// or with apply_GS, u made orthonormal first (Gram-Schmidt): W' = W (I - 2 U
// Uᵀ). u starts in equal pairs, whose reflections cancel. x is reflected, not
// W: a linear layer costs 4 r in a row more.

#include <peft/core/formula_delta.h>
#include <peft/methods/lycoris.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for HRA, by the names of HF's HRAConfig.
///
///   peft::HraOptions(8).targets({"query", "value"})
struct HraOptions {
  HraOptions(int64_t r = 8) : r_(r) {}

  /// Reflections; an even number starts as the base.
  TORCH_ARG(int64_t, r);
  TORCH_ARG(bool, apply_GS) = false;
  /// HF's init_weights: false draws every reflection on its own.
  TORCH_ARG(bool, init_weights) = true;
  /// Which biases train too: "none", "hra_only" (those of the targets), "all".
  TORCH_ARG(std::string, bias) = "none";
  /// As in LoraOptions.
  TORCH_ARG(Targets, targets);
  TORCH_ARG(Targets, exclude);
  TORCH_ARG(std::vector<int64_t>, layers);
  TORCH_ARG(std::vector<std::string>, layers_pattern);
  TORCH_ARG(bool, fan_in_fan_out) = false;
  TORCH_ARG(std::vector<std::string>, modules_to_save);
};

/// HRA at one weight.
class HraDelta final : public FormulaDelta<HraDelta> {
 public:
  struct Config {
    bool apply_GS = false;
  };

  HraDelta(Config config, NamedTensors tensors, bool is_transposed)
      : FormulaDelta(std::move(tensors), is_transposed), config_(config) {}

  Tensor changed(const Tensor& weight, double scale) const {
    const Tensor matrix = weight.flatten(1);
    const Tensor reflected = reflect(matrix).view(weight.sizes());
    return scale == 1.0 ? reflected : weight + (reflected - weight) * scale;
  }

  bool has_linear() const override {
    return !is_transposed();
  }
  Tensor linear(
      const LinearCall& call,
      const Below<LinearCall>& below,
      double scale) const override {
    // The columns of W are x's features, unless the call turns the matrix.
    if (scale != 1.0 || call.transposed) {
      const Tensor weight = call.transposed
          ? changed(call.weight.t(), scale).t()
          : changed(call.weight, scale);
      return below({call.x, weight, call.bias, call.rows, call.transposed});
    }
    const Tensor u = tensor("hra_u");
    // x (H_1 ... H_r)ᵀ: the last reflection meets x first.
    const Tensor x = reflect(call.x.to(u.scalar_type()), /*reverse=*/true);
    return below(
        {x.to(call.x.scalar_type()),
         call.weight,
         call.bias,
         call.rows,
         call.transposed});
  }

  std::string describe() const override {
    return "hra r=" + std::to_string(tensor("hra_u").size(1));
  }
  const Config& config() const {
    return config_;
  }

 private:
  /// rows [*, in] times the reflections, one after another.
  Tensor reflect(const Tensor& rows, bool reverse = false) const {
    const Tensor u = tensor("hra_u", rows);
    const int64_t r = u.size(1);
    Tensor result = rows;
    if (config_.apply_GS) {
      std::vector<Tensor> basis;
      for (int64_t i = 0; i < r; ++i) {
        Tensor v = u.select(1, i);
        for (const auto& b : basis) {
          v = v - b.dot(v) * b;
        }
        basis.push_back(v / v.norm());
      }
      const Tensor U = at::stack(basis, 1);
      return rows - at::matmul(at::matmul(rows, U), U.t()) * 2;
    }
    const Tensor unit = u / u.norm(2, {0});
    for (int64_t i = 0; i < r; ++i) {
      const Tensor v = unit.select(1, reverse ? r - 1 - i : i);
      result = result - at::matmul(result, v).unsqueeze(-1) * v * 2;
    }
    return result;
  }

  Config config_;
};

namespace detail {

inline std::shared_ptr<HraDelta> make_hra(
    const HraOptions& options,
    const TunerWeight& w) {
  TORCH_CHECK(
      w.layer.groups == 1,
      "peft: HRA reflects all inputs of a layer, and the convolution '",
      w.path,
      "' has ",
      w.layer.groups,
      " groups; leave it out");
  const int64_t in = w.in_features(), r = options.r();
  const bool pairs = options.init_weights() && r % 2 == 0;
  Tensor u = draw_kaiming_(torch::empty({in, pairs ? r / 2 : r}));
  if (pairs) {
    u = at::repeat_interleave(u, 2, 1);
  }
  return std::make_shared<HraDelta>(
      HraDelta::Config{options.apply_GS()},
      HraDelta::NamedTensors{{"hra_u", parameter_for(w.weight, u)}},
      w.is_transposed);
}

inline Plan plan(const HraOptions& options, const Network& network) {
  TORCH_CHECK_VALUE(
      options.r() > 0, "peft: r must be positive, got ", options.r());
  if (options.init_weights() && options.r() % 2 != 0) {
    TORCH_WARN(
        "peft: HRA starts as the base only where r is even, got ", options.r());
  }
  check_bias(options.bias(), "hra_only");
  Plan result;
  result.method = "HRA";
  result.options = options;
  result.sites = plan_tuner(
      options,
      network,
      {"HRA", /*convolutions=*/true},
      [&](const TunerWeight& w) { return make_hra(options, w); },
      options.bias());
  return result;
}

} // namespace detail

/// Puts HRA on `model` and freezes everything else.
inline Adapter attach(
    torch::nn::Module& model,
    const HraOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
