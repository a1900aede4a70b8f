#pragma once

// FourierFT (Gao et al. 2024, arXiv:2405.03003): a few entries of ΔW's
// spectrum.
//
//   W' = W + scaling · Re(ifft2(F)),   F zero but for n entries that train
//
// Their places are the first n of a random permutation that a seed gives, for
// each weight's size anew.

#include <peft/core/formula_delta.h>
#include <peft/methods/tuner_targets.h>

#include <ATen/CPUGeneratorImpl.h>

#include <cmath>
#include <memory>
#include <regex>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for FourierFT, by the names of HF's FourierFTConfig.
///
///   peft::FourierFtOptions(1000).targets({"query", "value"})
struct FourierFtOptions {
  using Pattern = std::vector<std::pair<std::string, double>>;

  FourierFtOptions(int64_t n_frequency = 1000) : n_frequency_(n_frequency) {}

  /// Trained entries of each weight's spectrum.
  TORCH_ARG(int64_t, n_frequency);
  TORCH_ARG(double, scaling) = 150;
  TORCH_ARG(int64_t, random_loc_seed) = 777;
  /// HF's init_weights: true starts at zero, false (its default) at N(0, 1).
  TORCH_ARG(bool, init_weights) = false;
  /// For names that end in the pattern, this n_frequency.
  TORCH_ARG(Pattern, n_frequency_pattern);
  /// Which biases train too: "none", "fourier_only" (those of the targets),
  /// "all".
  TORCH_ARG(std::string, bias) = "none";
  /// As in LoraOptions.
  TORCH_ARG(Targets, targets);
  TORCH_ARG(Targets, exclude);
  TORCH_ARG(std::vector<int64_t>, layers);
  TORCH_ARG(std::vector<std::string>, layers_pattern);
  TORCH_ARG(bool, fan_in_fan_out) = false;
  TORCH_ARG(std::vector<std::string>, modules_to_save);
};

/// FourierFT at one weight.
class FourierFtDelta final : public FormulaDelta<FourierFtDelta> {
 public:
  struct Config {
    double scaling = 150;
    Tensor places; // int64 [n], of the flattened [out, in]
  };

  FourierFtDelta(Config config, NamedTensors tensors, bool is_transposed)
      : FormulaDelta(std::move(tensors), is_transposed),
        config_(std::move(config)) {}

  Tensor changed(const Tensor& weight, double scale) const {
    // Transforms of half precision are not everywhere to be had.
    const Tensor spectrum = tensor("fourierft_spectrum");
    const Tensor values =
        spectrum.to(c10::promoteTypes(spectrum.scalar_type(), at::kFloat));
    const Tensor dense =
        at::zeros(weight.numel(), values.options())
            .index_put({config_.places.to(values.device())}, values)
            .view(weight.sizes());
    const Tensor change =
        at::real(at::fft_ifft2(dense)).to(weight.scalar_type());
    return at::add(weight, change, scale * config_.scaling);
  }

  bool is_additive() const override {
    return true;
  }
  std::string describe() const override {
    return "fourierft n=" + std::to_string(config_.places.numel());
  }
  const Config& config() const {
    return config_;
  }

 private:
  Config config_;
};

namespace detail {

/// HF's rule for n_frequency_pattern, another than that of rank_pattern: the
/// first pattern that fits what follows a dot of the name, else the whole name.
inline int64_t n_frequency_at(
    const FourierFtOptions& options,
    const std::string& name) {
  auto result = static_cast<double>(options.n_frequency());
  for (const auto& [pattern, n] : options.n_frequency_pattern()) {
    if (std::regex_search(
            name,
            std::regex(".*\\." + pattern + "$"),
            std::regex_constants::match_continuous)) {
      return static_cast<int64_t>(n);
    }
    result = pattern == name ? n : result;
  }
  return static_cast<int64_t>(result);
}

inline std::shared_ptr<FourierFtDelta> make_fourier_ft(
    const FourierFtOptions& options,
    const TunerWeight& w) {
  const int64_t n = n_frequency_at(options, w.layer.name);
  TORCH_CHECK_VALUE(
      n > 0 && n <= w.weight.numel(),
      "peft: n_frequency must lie between 1 and the ",
      w.weight.numel(),
      " entries of '",
      w.path,
      "', got ",
      n);
  const auto generator = at::detail::createCPUGenerator(
      static_cast<uint64_t>(options.random_loc_seed()));
  const Tensor places = at::randperm(w.weight.numel(), generator, torch::kLong)
                            .slice(0, 0, n)
                            .clone();
  Tensor values = torch::randn({n}); // HF draws them in any case
  if (options.init_weights()) {
    values.zero_();
  }
  return std::make_shared<FourierFtDelta>(
      FourierFtDelta::Config{options.scaling(), places},
      FourierFtDelta::NamedTensors{
          {"fourierft_spectrum", parameter_for(w.weight, values)}},
      w.is_transposed);
}

inline Plan plan(const FourierFtOptions& options, const Network& network) {
  TORCH_CHECK_VALUE(
      std::isfinite(options.scaling()),
      "peft: scaling must be finite, got ",
      options.scaling());
  for (const auto& item : options.n_frequency_pattern()) {
    check_regex(item.first, "n_frequency_pattern");
  }
  check_bias(options.bias(), "fourier_only");
  Plan result;
  result.method = "FOURIERFT";
  result.options = options;
  result.sites = plan_tuner(
      options,
      network,
      {"FourierFT"},
      [&](const TunerWeight& w) { return make_fourier_ft(options, w); },
      options.bias());
  return result;
}

} // namespace detail

/// Puts FourierFT on `model` and freezes everything else.
inline Adapter attach(
    torch::nn::Module& model,
    const FourierFtOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
