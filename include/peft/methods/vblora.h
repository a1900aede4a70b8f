#pragma once

// VB-LoRA, low-rank factors from a vector bank (Li et al. 2024,
// arXiv:2405.15179):
//
//   y = W x + b + B A x            A [r, in], B [out, r]
//
// A's rows and B's columns are cut into pieces of vector_length numbers, and
// each piece of each layer is a mix of k vectors of one bank
// [num_vectors, vector_length] that all layers share: those whose logits are
// the largest,
//
//   piece = Σᵢ wᵢ bankᵢ,   w = softmax(the k largest of its num_vectors logits)
//
// The bank and the logits train. What is trained is told by k indices and
// k - 1 weights a piece (save_only_topk_weights), which cannot train on.

#include <peft/methods/low_rank_delta.h>
#include <peft/methods/tuner_targets.h>

#include <c10/core/InferenceMode.h>

#include <any>
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace peft {

/// Options for VB-LoRA, by the names of HF's VBLoRAConfig.
///
///   peft::VbLoraOptions(4).num_vectors(90).vector_length(256).topk(2)
struct VbLoraOptions {
  VbLoraOptions(int64_t r = 4) : r_(r) {}

  TORCH_ARG(int64_t, r);
  /// The vectors of the bank.
  TORCH_ARG(int64_t, num_vectors) = 256;
  /// Their length, which divides the inputs and outputs of every target.
  TORCH_ARG(int64_t, vector_length) = 256;
  /// How many of them a piece mixes.
  TORCH_ARG(int64_t, topk) = 2;
  /// HF's vblora_dropout: on x, before A, in training mode.
  TORCH_ARG(double, dropout) = 0;
  /// The bank starts uniform in ± this; a bank of zeros never gets a gradient.
  TORCH_ARG(double, init_vector_bank_bound) = 0.02;
  /// The logits start with this standard deviation.
  TORCH_ARG(double, init_logits_std) = 0.1;
  /// Saves the weights of the k largest logits in place of the logits: a small
  /// file for inference and merging, from which training cannot go on.
  TORCH_ARG(bool, save_only_topk_weights) = false;
  /// Which biases train too: "none", "vblora_only" (those of the targets),
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

namespace detail {

inline constexpr const char* kVectorBank = "vblora_vector_bank";

/// The weights [..., k] of the k largest of logits [..., n], which sum to 1,
/// and their places.
inline std::pair<Tensor, Tensor> topk_weights(const Tensor& logits, int64_t k) {
  const auto [largest, places] = logits.topk(k);
  return {at::softmax(largest, -1), places};
}

/// The smallest type that HF keeps places in a bank of this size in.
inline at::ScalarType index_dtype(int64_t num_vectors) {
  return num_vectors < (int64_t{1} << 8) ? at::kByte
      : num_vectors < (int64_t{1} << 15) ? at::kShort
      : num_vectors < (int64_t{1} << 31) ? at::kInt
                                         : at::kLong;
}

} // namespace detail

/// VB-LoRA at one weight. The first delta of an adapter has the bank of all.
class VbLoraDelta final : public LowRankDelta<VbLoraDelta> {
 public:
  struct Config {
    int64_t topk = 2;
    double dropout = 0;
    /// The delta that has the bank; null in that one.
    std::shared_ptr<const VbLoraDelta> first{};
    /// In the first, its layer's name in a file: the bank belongs to no layer.
    std::string layer{};
    /// int64 [..., k], where the largest logits' weights are all there is.
    Tensor indices_A{}, indices_B{};
    /// Training chooses among all logits.
    bool has_all_logits = true;
  };

  VbLoraDelta(Config config, NamedTensors tensors, bool is_transposed)
      : LowRankDelta(std::move(tensors), is_transposed),
        config_(std::move(config)) {}

  /// A [r, in] and B [out, r].
  Factors factors(at::ScalarType dtype) const {
    check_may_train();
    const Tensor A = pieces("vblora_logits_A", config_.indices_A);
    const Tensor B = pieces("vblora_logits_B", config_.indices_B);
    return {A.flatten(1).to(dtype), B.transpose(1, 2).flatten(0, 1).to(dtype)};
  }
  double scaling() const {
    return 1;
  }
  int64_t linear_cost() const override {
    return dropout_now() > 0 ? 0 : num_pieces() * bank().size(1);
  }

  void visit_state(
      c10::function_ref<void(const Tensor&)> visit) const override {
    LowRankDelta::visit_state(visit);
    if (config_.first) {
      visit(bank());
    }
  }

  NamedTensors file_tensors() const override {
    NamedTensors result = LowRankDelta::file_tensors();
    if (config_.indices_A.defined()) {
      result.emplace_back("vblora_logits_A_topk_indices", config_.indices_A);
      result.emplace_back("vblora_logits_B_topk_indices", config_.indices_B);
    }
    for (auto& item : result) {
      if (item.first != detail::kVectorBank && !config_.layer.empty()) {
        item.first = config_.layer + "." + item.first;
      }
    }
    return result;
  }
  Tensor to_file(const std::string& name, const Tensor& tensor) const override {
    return is_index(name) ? tensor.to(detail::index_dtype(bank().size(0)))
                          : tensor;
  }
  std::string from_file(
      const std::string& name,
      const Tensor& value,
      bool dry_run) override {
    const int64_t n = bank().size(0);
    if (is_index(name) &&
        value.lt(0).logical_or_(value.ge(n)).any().item<bool>()) {
      return c10::str("an index lies outside of the bank's ", n, " vectors");
    }
    const bool is_cut = name.find("vblora_logits_") != std::string::npos &&
        value.isinf().any().item<bool>(); // by PEFT, when it loaded such a file
    config_.has_all_logits = config_.has_all_logits && (dry_run || !is_cut);
    return LowRankDelta::from_file(name, value, dry_run);
  }

  /// The values and settings of `other`; who has the bank stays.
  std::string take(const Delta& other, bool may_grow, bool dry_run) override {
    const Config own = config_;
    auto misfit = LowRankDelta::take(other, may_grow, dry_run);
    config_.first = own.first;
    config_.layer = own.layer;
    return misfit;
  }
  void relink(const std::function<std::shared_ptr<Delta>(const Delta*)>&
                  copy_of) override {
    if (config_.first) {
      config_.first = std::dynamic_pointer_cast<const VbLoraDelta>(
          copy_of(config_.first.get()));
    }
  }

  /// The same, but for what its logits do not choose. `first` has the bank;
  /// null: this one has it.
  std::shared_ptr<VbLoraDelta> topk_only(
      std::shared_ptr<const VbLoraDelta> first) const {
    const c10::InferenceMode off(false);
    const torch::NoGradGuard no_grad;
    Config config = config_;
    config.first = std::move(first);
    config.has_all_logits = false;
    const auto [A, at_A] =
        detail::topk_weights(tensor("vblora_logits_A"), config.topk);
    const auto [B, at_B] =
        detail::topk_weights(tensor("vblora_logits_B"), config.topk);
    config.indices_A = at_A;
    config.indices_B = at_B;
    const auto all_but_last = [](const Tensor& weights) {
      return weights.slice(-1, 0, -1).contiguous().set_requires_grad(true);
    };
    NamedTensors tensors{
        {"vblora_logits_A_topk_weights", all_but_last(A)},
        {"vblora_logits_B_topk_weights", all_but_last(B)}};
    if (!config.first) {
      tensors.emplace_back(detail::kVectorBank, bank());
    }
    return std::make_shared<VbLoraDelta>(
        std::move(config), std::move(tensors), is_transposed());
  }

  /// [num_vectors, vector_length], the one of all layers.
  Tensor bank() const {
    return config_.first ? config_.first->bank() : tensor(detail::kVectorBank);
  }
  /// The pieces of A and of B.
  int64_t num_pieces() const {
    int64_t count = 0;
    for (const auto& item : LowRankDelta::file_tensors()) {
      count += item.second.dim() == 3
          ? item.second.size(0) * item.second.size(1)
          : 0;
    }
    return count;
  }
  std::string describe() const override {
    const auto logits = LowRankDelta::file_tensors().front().second;
    return "vblora r=" + std::to_string(logits.size(0));
  }
  const Config& config() const {
    return config_;
  }

 private:
  static bool is_index(const std::string& name) {
    return name.find("_topk_indices") != std::string::npos;
  }

  void check_may_train() const {
    TORCH_CHECK(
        config_.has_all_logits || !is_training() ||
            !at::GradMode::is_enabled() ||
            !parameters().front().requires_grad(),
        "peft: this VB-LoRA was saved with save_only_topk_weights and cannot "
        "be trained: all but the largest logits are gone. Call eval(), or load "
        "it with LoadOptions().is_trainable(false), to use or merge it; to "
        "train on, save with save_only_topk_weights(false)");
  }

  /// What is mixed by these logits [n, m, num_vectors]: [n, m, vector_length].
  Tensor pieces(const std::string& logits, Tensor places) const {
    Tensor weights;
    if (places.defined()) {
      weights = tensor((logits + "_topk_weights").c_str());
      weights = at::cat({weights, 1 - weights.sum(-1, /*keepdim=*/true)}, -1);
    } else {
      std::tie(weights, places) =
          detail::topk_weights(tensor(logits.c_str()), config_.topk);
    }
    const Tensor vectors =
        bank().to(weights.device()).index({places.to(weights.device())});
    return (weights.unsqueeze(-1) * vectors).sum(-2);
  }

  Config config_;
};

namespace detail {

inline void check(const VbLoraOptions& options) {
  const auto check_positive = [](const char* name, int64_t value) {
    TORCH_CHECK_VALUE(
        value > 0, "peft: ", name, " must be positive, got ", value);
  };
  const auto check_spread = [](const char* name, double value) {
    TORCH_CHECK_VALUE(
        std::isfinite(value) && value >= 0,
        "peft: ",
        name,
        " must be finite and not negative, got ",
        value);
  };
  check_positive("r", options.r());
  check_positive("num_vectors", options.num_vectors());
  check_positive("vector_length", options.vector_length());
  TORCH_CHECK_VALUE(
      options.topk() > 0 && options.topk() <= options.num_vectors(),
      "peft: topk must lie between 1 and the ",
      options.num_vectors(),
      " vectors of the bank (num_vectors), got ",
      options.topk());
  TORCH_CHECK_VALUE(
      options.dropout() >= 0 && options.dropout() < 1,
      "peft: dropout must lie in [0, 1), got ",
      options.dropout());
  check_spread("init_vector_bank_bound", options.init_vector_bank_bound());
  check_spread("init_logits_std", options.init_logits_std());
  check_bias(options.bias(), "vblora_only");
}

inline void check_divides(
    int64_t vector_length,
    int64_t features,
    const char* what,
    const std::string& path) {
  TORCH_CHECK_VALUE(
      features > 0 && features % vector_length == 0,
      "peft: the vectors of VB-LoRA's bank have length ",
      vector_length,
      ", which does not divide the ",
      features,
      what,
      path,
      "'; take a vector_length that divides the inputs and outputs of every "
      "target");
}

inline Plan plan(const VbLoraOptions& options, const Network& network) {
  check(options);
  const int64_t n = options.num_vectors(), length = options.vector_length();
  std::shared_ptr<VbLoraDelta> first;
  Plan result;
  result.method = "VBLORA";
  result.options = options;
  result.sites = plan_tuner(
      options,
      network,
      {"VB-LoRA"},
      [&](const TunerWeight& w) {
        const int64_t in = w.in_features(), out = w.out_features();
        check_divides(length, in, " inputs of '", w.path);
        check_divides(length, out, " outputs of '", w.path);
        // HF draws a bank for each layer, and the last one stays.
        const double bound = options.init_vector_bank_bound();
        const Tensor bank = parameter_for(
            w.weight, torch::empty({n, length}).uniform_(-bound, bound));
        const auto logits = [&](int64_t rows, int64_t columns) {
          return parameter_for(
              w.weight,
              torch::empty({rows, columns, n})
                  .normal_(0, options.init_logits_std()));
        };
        const Tensor A = logits(options.r(), in / length);
        const Tensor B = logits(out / length, options.r());
        VbLoraDelta::NamedTensors tensors{
            {"vblora_logits_A", A}, {"vblora_logits_B", B}};
        VbLoraDelta::Config config{options.topk(), options.dropout(), first};
        if (first) {
          const torch::NoGradGuard no_grad;
          first->bank().copy_(bank);
        } else {
          tensors.emplace_back(kVectorBank, bank);
          config.layer = w.name();
        }
        auto delta = std::make_shared<VbLoraDelta>(
            std::move(config), std::move(tensors), w.is_transposed);
        first = first ? first : delta;
        return delta;
      },
      options.bias());
  result.sites.front().file_prefix.clear(); // its names have it
  return result;
}

} // namespace detail

/// Puts VB-LoRA on `model` and freezes everything else.
inline Adapter attach(
    torch::nn::Module& model,
    const VbLoraOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

/// What of VB-LoRA a file of this adapter holds, counted in float32 numbers:
/// HF's get_nb_savable_parameters.
inline int64_t vblora_savable_parameters(const Adapter& adapter) {
  adapter.name(); // an empty or detached handle is an error
  const auto& state = *adapter.shared_state();
  const auto* options = std::any_cast<VbLoraOptions>(&state.options);
  TORCH_CHECK(
      options != nullptr,
      "peft: adapter '",
      state.name,
      "' is a ",
      state.method,
      ", and only VB-LoRA is counted so");
  int64_t pieces = 0;
  Tensor bank;
  for (const auto& site : state.sites) {
    if (const auto* d = dynamic_cast<const VbLoraDelta*>(site.delta.get())) {
      pieces += d->num_pieces();
      bank = d->bank();
    }
  }
  const int64_t n = bank.size(0), k = options->topk();
  const auto index =
      static_cast<int64_t>(c10::elementSize(detail::index_dtype(n)));
  return bank.numel() +
      (options->save_only_topk_weights()
           ? pieces * (k - 1) + pieces * k * index / 4
           : pieces * n);
}

} // namespace peft
