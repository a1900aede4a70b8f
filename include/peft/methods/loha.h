#pragma once

// LoHa, the low-rank Hadamard product (Hyeon-Woo et al. 2021, FedPara,
// arXiv:2108.06098; LyCORIS, arXiv:2309.14859):
//
//   W' = W + alpha / r · (w1_a w1_b) ⊙ (w2_a w2_b)
//
// w_a [out, r], w_b [r, in]: rank up to r² for 2 r (out + in) numbers. Weights
// of convolutions count as [out, rest], or with use_effective_conv2d each
// factor is core [r, r, k...] times out and in matrices (FedPara, proposition
// 3). w2_b starts at zero.

#include <peft/core/formula_delta.h>
#include <peft/methods/lycoris.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for LoHa, by the names of HF's LoHaConfig.
///
///   peft::LoHaOptions(8).alpha(16).targets({"query", "value"})
struct LoHaOptions {
  using Pattern = std::vector<std::pair<std::string, double>>;

  LoHaOptions(int64_t r = 8) : r_(r) {}

  TORCH_ARG(int64_t, r);
  /// The update is scaled by alpha / r.
  TORCH_ARG(double, alpha) = 8;
  /// In training: rows of the update that are left out (the rest is scaled to
  /// the same mean), and the share of calls in which all of it is.
  TORCH_ARG(double, rank_dropout) = 0;
  TORCH_ARG(double, module_dropout) = 0;
  /// For convolutions with a kernel above 1.
  TORCH_ARG(bool, use_effective_conv2d) = false;
  /// HF's init_weights: false draws w2_b too.
  TORCH_ARG(bool, init_weights) = true;
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

/// LoHa at one weight.
class LoHaDelta final : public FormulaDelta<LoHaDelta> {
 public:
  using Config = detail::LycorisConfig;

  LoHaDelta(Config config, NamedTensors tensors, bool is_transposed)
      : FormulaDelta(std::move(tensors), is_transposed), config_(config) {}

  Tensor changed(const Tensor& weight, double scale) const {
    const auto factor = [&](const char* core, const char* a, const char* b) {
      return tensor(core).defined()
          ? detail::core_product(
                tensor(core, weight), tensor(a, weight), tensor(b, weight))
          : at::mm(tensor(a, weight), tensor(b, weight));
    };
    const Tensor product = factor("hada_t1", "hada_w1_a", "hada_w1_b") *
        factor("hada_t2", "hada_w2_a", "hada_w2_b");
    return detail::add_lycoris(
        weight,
        product.reshape(weight.sizes()),
        scale * config_.scaling,
        config_,
        is_training());
  }

  bool is_additive() const override {
    return true;
  }
  std::string describe() const override {
    return "loha r=" + std::to_string(config_.r);
  }
  const Config& config() const {
    return config_;
  }

 private:
  Config config_;
};

namespace detail {

inline std::shared_ptr<LoHaDelta> make_loha(
    const LoHaOptions& options,
    const TunerWeight& w) {
  const auto config = lycoris_config(options, w);
  const int64_t out = w.out_features(), in = w.in_features();
  const auto cores = lycoris_core(options, w, config.r);
  FormulaDelta<LoHaDelta>::NamedTensors tensors;
  // The order of HF's draws: the factors, then the cores.
  for (const char* which : {"1", "2"}) {
    const std::string name = std::string("hada_w") + which;
    const Tensor a = cores.empty() ? torch::empty({out, config.r})
                                   : torch::empty({config.r, out});
    const Tensor b = cores.empty() ? torch::empty({config.r, in})
                                   : torch::empty({config.r, w.weight.size(1)});
    draw_kaiming_(a);
    if (which[0] == '1' || !options.init_weights()) {
      draw_kaiming_(b);
    } else {
      b.zero_();
    }
    tensors.emplace_back(name + "_a", parameter_for(w.weight, a));
    tensors.emplace_back(name + "_b", parameter_for(w.weight, b));
  }
  for (const char* name : {"hada_t1", "hada_t2"}) {
    if (!cores.empty()) {
      tensors.emplace_back(
          name, parameter_for(w.weight, draw_kaiming_(torch::empty(cores))));
    }
  }
  return std::make_shared<LoHaDelta>(
      config, std::move(tensors), w.is_transposed);
}

inline Plan plan(const LoHaOptions& options, const Network& network) {
  check_lycoris(options, "LoHa");
  Plan result;
  result.method = "LOHA";
  result.options = options;
  result.sites = plan_tuner(
      options,
      network,
      {"LoHa", /*convolutions=*/true},
      [&](const TunerWeight& w) { return make_loha(options, w); });
  return result;
}

} // namespace detail

/// Puts LoHa on `model` and freezes everything else.
inline Adapter attach(
    torch::nn::Module& model,
    const LoHaOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
