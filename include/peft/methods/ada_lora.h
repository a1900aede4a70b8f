#pragma once

// AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): LoRA as a product of three,
// whose singular values are taken away where they matter least.
//
//   W' = W + alpha / (ranknum + 1e-5) · B (A ⊙ E)    A [r, in], E [r, 1], B
//   [out, r]
//
// E starts at zero, A and B at N(0, 0.02²). ranknum is init_r, and stays so.
// train/rank_allocator.h takes entries of E away; the penalty ‖A Aᵀ - I‖ + ‖Bᵀ
// B
// - I‖ that keeps A and B near to singular vectors is
// peft::orthogonal_regularization.

#include <peft/functional/convolution.h>
#include <peft/methods/low_rank_delta.h>
#include <peft/methods/tuner_targets.h>

#include <torch/nn/init.h>

#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for AdaLoRA, by the names of HF's AdaLoraConfig.
///
///   peft::AdaLoraOptions(/*total_step=*/1000).init_r(12).target_r(8)
struct AdaLoraOptions {
  AdaLoraOptions(int64_t total_step) : total_step_(total_step) {}

  /// Steps of training, of which tinit at the start take nothing away and
  /// tfinal at the end change nothing more.
  TORCH_ARG(int64_t, total_step);
  TORCH_ARG(int64_t, tinit) = 0;
  TORCH_ARG(int64_t, tfinal) = 0;
  /// Steps between two allocations.
  TORCH_ARG(int64_t, deltaT) = 1;
  /// Rank at each weight to begin with, and on average in the end (where that
  /// is less).
  TORCH_ARG(int64_t, init_r) = 12;
  TORCH_ARG(int64_t, target_r) = 8;
  /// HF's lora_alpha; not divided by r.
  TORCH_ARG(double, alpha) = 8;
  /// HF's lora_dropout: on x, before A, in training mode.
  TORCH_ARG(double, dropout) = 0;
  /// How slowly sensitivity and its uncertainty follow.
  TORCH_ARG(double, beta1) = 0.85;
  TORCH_ARG(double, beta2) = 0.85;
  TORCH_ARG(double, orth_reg_weight) = 0.5;
  /// HF's init_lora_weights: false draws A, B and E from N(0, 1).
  TORCH_ARG(bool, init_weights) = true;
  /// Which biases train too: "none", "lora_only" (those of the targets), "all".
  TORCH_ARG(std::string, bias) = "none";
  /// As in LoraOptions.
  TORCH_ARG(Targets, targets);
  TORCH_ARG(Targets, exclude);
  TORCH_ARG(std::vector<int64_t>, layers);
  TORCH_ARG(std::vector<std::string>, layers_pattern);
  TORCH_ARG(bool, fan_in_fan_out) = false;
  TORCH_ARG(std::vector<std::string>, modules_to_save);
};

/// AdaLoRA at one weight.
class AdaLoraDelta final : public LowRankDelta<AdaLoraDelta> {
 public:
  struct Config {
    double scaling = 1; // alpha
    double ranknum = 0;
    double dropout = 0;
    /// bool [r]: which triplets are left; undefined before the first
    /// allocation.
    Tensor kept;
    /// Sensitivity and uncertainty of A, B and E, averaged (equations 9, 10);
    /// empty before the first.
    std::vector<Tensor> averages;
  };

  AdaLoraDelta(Config config, NamedTensors tensors, bool is_transposed)
      : LowRankDelta(std::move(tensors), is_transposed),
        config_(std::move(config)) {}

  /// A ⊙ E and B.
  Factors factors(at::ScalarType dtype) const {
    return {
        tensor("lora_A", dtype) * tensor("lora_E", dtype),
        tensor("lora_B", dtype)};
  }
  double scaling() const {
    return config_.scaling / (config_.ranknum + 1e-5);
  }

  /// Dropout acts on the input, which no weight expresses.
  bool has_convolution() const override {
    return is_training() && config_.dropout > 0;
  }
  Tensor convolution(
      const ConvolutionCall& call,
      const Below<ConvolutionCall>& below,
      double scale) const override {
    const Tensor y = below(call);
    const Tensor A = tensor("lora_A") * tensor("lora_E");
    const Tensor change = at::mm(tensor("lora_B"), A).view(call.weight.sizes());
    const Tensor x = at::dropout(
        call.x.to(change.scalar_type()), config_.dropout, is_training());
    const Tensor term =
        functional::convolution(x, change, std::nullopt, call.args);
    return at::add(y, term, scale * scaling()).to(y.scalar_type());
  }

  /// What is taken away is not written; PEFT knows from rank_pattern.
  Tensor to_file(const std::string& name, const Tensor& parameter)
      const override {
    if (!config_.kept.defined() || name.rfind("lora_", 0) != 0) {
      return parameter;
    }
    const Tensor places =
        config_.kept.nonzero().squeeze(1).to(parameter.device());
    return parameter.index_select(name == "lora_B" ? 1 : 0, places);
  }

  /// The whole factors and what the allocator goes on from.
  std::vector<std::pair<std::string, Tensor>> training_tensors()
      const override {
    NamedTensors result;
    for (const auto& item : file_tensors()) {
      result.emplace_back("whole." + item.first, item.second.detach());
    }
    result.emplace_back("ranknum", at::full({1}, config_.ranknum, at::kDouble));
    result.emplace_back(
        "kept",
        config_.kept.defined() ? config_.kept.to(at::kByte)
                               : at::empty({0}, at::kByte));
    for (size_t i = 0; i < 6; ++i) {
      result.emplace_back(
          "average." + std::to_string(i),
          i < config_.averages.size() ? config_.averages[i] : at::empty({0}));
    }
    return result;
  }
  /// Of the weights file, the factors of the triplets that are left; of the
  /// training file the whole ones, whose rank is ranknum.
  std::string from_file(
      const std::string& name,
      const Tensor& value,
      bool dry_run) override {
    const auto whole = static_cast<int64_t>(config_.ranknum);
    if (name == "ranknum") {
      return value.numel() == 1 && value.item<double>() == config_.ranknum
          ? ""
          : c10::str("it must be init_r, ", whole);
    }
    if (name == "kept") {
      if (value.numel() == 0) {
        return {};
      }
      const int64_t left = at::count_nonzero(value).item<int64_t>();
      if (value.dim() != 1 || value.size(0) != whole ||
          (dry_run && left != r())) {
        return c10::str(
            "it names ",
            left,
            " of ",
            value.numel(),
            " triplets, and the weights have ",
            r(),
            " of ",
            whole);
      }
      if (!dry_run) {
        config_.kept = value.to(at::kBool);
      }
      return {};
    }
    if (name.rfind("average.", 0) == 0) {
      const auto index = static_cast<size_t>(name.back() - '0');
      if (!dry_run && value.numel() == 0 && !config_.averages.empty()) {
        return "it is empty, and others are not";
      }
      if (value.numel() == 0) {
        return {};
      }
      if (value.sizes() != whole_sizes(index % 3)) {
        return c10::str(
            "shape ",
            value.sizes(),
            " where ",
            at::IntArrayRef(whole_sizes(index % 3)),
            " fits");
      }
      if (!dry_run && index != config_.averages.size()) {
        return "others before it are empty";
      }
      if (!dry_run) {
        config_.averages.push_back(
            value.to(tensor("lora_A").options()).clone());
      }
      return {};
    }
    if (name.rfind("whole.", 0) == 0) {
      const std::string own_name = name.substr(6);
      Tensor own = tensor(own_name.c_str());
      const size_t factor = own_name == "lora_A" ? 0
          : own_name == "lora_B"                 ? 1
                                                 : 2;
      if (value.sizes() != whole_sizes(factor)) {
        return c10::str(
            "shape ",
            value.sizes(),
            " where ",
            at::IntArrayRef(whole_sizes(factor)),
            " fits");
      }
      if (!dry_run) {
        own.set_data(value.to(own.options()).clone());
      }
      return {};
    }
    return LowRankDelta::from_file(name, value, dry_run);
  }

  int64_t r() const {
    return tensor("lora_E").size(0);
  }
  std::string describe() const override {
    return "adalora r=" +
        std::to_string(
               config_.kept.defined() ? config_.kept.sum().item<int64_t>()
                                      : r());
  }
  const Config& config() const {
    return config_;
  }
  /// For the allocator.
  Config& config() {
    return config_;
  }

 private:
  /// Of A, B or E before any triplet was taken away.
  std::vector<int64_t> whole_sizes(size_t factor) const {
    auto sizes = file_tensors().at(factor).second.sizes().vec();
    sizes[factor == 1 ? 1 : 0] = static_cast<int64_t>(config_.ranknum);
    return sizes;
  }

  Config config_;
};

namespace detail {

inline void check(const AdaLoraOptions& o) {
  TORCH_CHECK_VALUE(
      o.init_r() > 0 && o.target_r() > 0,
      "peft: init_r and target_r must be positive, got ",
      o.init_r(),
      " and ",
      o.target_r());
  TORCH_CHECK_VALUE(
      o.total_step() > 0 && o.tinit() >= 0 && o.tfinal() >= 0 &&
          o.tinit() < o.total_step() - o.tfinal(),
      "peft: of total_step = ",
      o.total_step(),
      " steps, tinit = ",
      o.tinit(),
      " and tfinal = ",
      o.tfinal(),
      " leave none in which ranks are taken away");
  TORCH_CHECK_VALUE(
      o.deltaT() > 0, "peft: deltaT must be positive, got ", o.deltaT());
  for (const double beta : {o.beta1(), o.beta2()}) {
    TORCH_CHECK_VALUE(
        beta > 0 && beta < 1,
        "peft: beta1 and beta2 must lie in (0, 1), got ",
        beta);
  }
  TORCH_CHECK_VALUE(
      o.orth_reg_weight() >= 0,
      "peft: orth_reg_weight must not be negative, got ",
      o.orth_reg_weight());
  TORCH_CHECK_VALUE(
      std::isfinite(o.alpha()), "peft: alpha must be finite, got ", o.alpha());
  TORCH_CHECK_VALUE(
      o.dropout() >= 0 && o.dropout() < 1,
      "peft: dropout must lie in [0, 1), got ",
      o.dropout());
  check_bias(o.bias(), "lora_only");
}

/// `kept`, from a file's rank_pattern, is the mask of a weight that has been
/// cut; undefined for none.
inline std::shared_ptr<AdaLoraDelta>
make_ada_lora(const AdaLoraOptions& options, const TunerWeight& w, int64_t r) {
  TORCH_CHECK(
      !w.is_convolution() || w.layer.groups == 1,
      "peft: AdaLoRA sees all inputs of a layer, and the convolution '",
      w.path,
      "' has ",
      w.layer.groups,
      " groups; leave it out");
  Tensor A = torch::randn({r, w.in_features()});
  Tensor E = torch::randn({r, 1});
  Tensor B = torch::randn({w.out_features(), r});
  torch::randn({1}); // HF draws ranknum, too, before it is set
  if (options.init_weights()) {
    E.zero_();
    torch::nn::init::normal_(A, 0, 0.02);
    torch::nn::init::normal_(B, 0, 0.02);
  }
  AdaLoraDelta::Config config;
  config.scaling = options.alpha() > 0 ? options.alpha()
                                       : static_cast<double>(options.init_r());
  config.ranknum = static_cast<double>(options.init_r());
  config.dropout = options.dropout();
  return std::make_shared<AdaLoraDelta>(
      std::move(config),
      AdaLoraDelta::NamedTensors{
          {"lora_A", parameter_for(w.weight, A)},
          {"lora_B", parameter_for(w.weight, B)},
          {"lora_E", parameter_for(w.weight, E)}},
      w.is_transposed);
}

/// Ranks that differ from init_r, by module.
using Ranks = std::vector<std::pair<std::string, int64_t>>;

inline Plan plan(
    const AdaLoraOptions& options,
    const Network& network,
    const Ranks& ranks = {}) {
  check(options);
  Plan result;
  result.method = "ADALORA";
  result.options = options;
  result.sites = plan_tuner(
      options,
      network,
      {"AdaLoRA", /*convolutions=*/true},
      [&](const TunerWeight& w) {
        int64_t r = options.init_r();
        for (const auto& item : ranks) {
          r = item.first == w.layer.name ? item.second : r;
        }
        return make_ada_lora(options, w, r);
      },
      options.bias());
  return result;
}

} // namespace detail

/// Puts AdaLoRA on `model` and freezes everything else.
inline Adapter attach(
    torch::nn::Module& model,
    const AdaLoraOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
