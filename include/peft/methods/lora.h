#pragma once

// LoRA: Low-Rank Adaptation (Hu et al. 2021, arXiv:2106.09685).
//
//   W' = W + s · B A,   A [r, in],  B [out, r],  s = alpha / r
//
// A is Gaussian and B zero at the start, so the network starts as it was.
// rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) takes s = alpha / √r.

#include <peft/core/attach.h>
#include <peft/functional/layers.h>
#include <peft/functional/lora.h>
#include <peft/methods/explicit_layer.h>
#include <peft/methods/modules_to_save.h>

#include <torch/nn/init.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>

#include <cmath>
#include <memory>
#include <optional>
#include <regex>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for LoRA.
///
///   peft::LoraOptions(8).alpha(16).dropout(0.05).targets({"query", "value"})
struct LoraOptions {
  using Pattern = std::vector<std::pair<std::string, double>>;

  LoraOptions(int64_t r = 8) : r_(r) {}

  /// Rank.
  TORCH_ARG(int64_t, r);
  /// HF's lora_alpha: the update is scaled by alpha / r.
  TORCH_ARG(double, alpha) = 8;
  /// HF's lora_dropout: on x, before A, in training mode.
  TORCH_ARG(double, dropout) = 0;
  /// HF's target_modules. Default: the query and value projections.
  TORCH_ARG(Targets, targets);
  /// HF's exclude_modules: taken out of the targets.
  TORCH_ARG(Targets, exclude);
  /// HF's rank_pattern, alpha_pattern: for names that end in the pattern (a
  /// regular expression) this r, this alpha; the first match counts.
  TORCH_ARG(Pattern, rank_pattern);
  TORCH_ARG(Pattern, alpha_pattern);
  /// HF's layers_to_transform: only these indices of a stack of layers, and
  /// layers_pattern: the name of the stack ("layers") where there are several.
  TORCH_ARG(std::vector<int64_t>, layers);
  TORCH_ARG(std::vector<std::string>, layers_pattern);
  /// HF's use_rslora.
  TORCH_ARG(bool, rslora) = false;
  /// How A and B start: "gaussian" (A ~ N(0, 1/r²), B = 0), "kaiming" (HF's
  /// default: A uniform in ±1/√in, B = 0), or "random" (HF's
  /// init_lora_weights=false: B is not zero, so the adapter acts at once).
  TORCH_ARG(std::string, init) = "gaussian";
  /// Which biases train too: "none", "lora_only" (those of the targets), "all".
  TORCH_ARG(std::string, bias) = "none";
  /// Modules trained whole, beside the adapter: a task head.
  TORCH_ARG(std::vector<std::string>, modules_to_save);
  /// For packed attention projections: which of q, k, v are adapted, each with
  /// factors of its own (loralib's enable_lora). Empty: all of them, with one
  /// shared A, as HF does; the default targets take q and v.
  TORCH_ARG(std::vector<bool>, enable_lora);
  /// HF's lora_bias: B has a bias too, so the layer's own bias moves as well.
  TORCH_ARG(bool, lora_bias) = false;
  /// The weights are [in, out] (GPT-2's Conv1D).
  TORCH_ARG(bool, fan_in_fan_out) = false;
};

namespace detail {

inline void check(const LoraOptions& options) {
  TORCH_CHECK_VALUE(
      options.r() > 0, "peft: r must be positive, got ", options.r());
  TORCH_CHECK_VALUE(
      std::isfinite(options.alpha()),
      "peft: alpha must be finite, got ",
      options.alpha());
  TORCH_CHECK_VALUE(
      options.dropout() >= 0.0 && options.dropout() < 1.0,
      "peft: dropout must lie in [0, 1), got ",
      options.dropout());
  for (const auto& [pattern, rank] : options.rank_pattern()) {
    TORCH_CHECK_VALUE(
        rank >= 1 && rank == std::floor(rank),
        "peft: rank_pattern['",
        pattern,
        "'] must be a positive integer, got ",
        rank);
  }
  const auto& init = options.init();
  TORCH_CHECK_VALUE(
      init == "gaussian" || init == "kaiming" || init == "random" ||
          init == "empty",
      "peft: init must be 'gaussian', 'kaiming' or 'random', got '",
      init,
      "'");
  const auto& bias = options.bias();
  TORCH_CHECK_VALUE(
      bias == "none" || bias == "lora_only" || bias == "all",
      "peft: bias must be 'none', 'lora_only' or 'all', got '",
      bias,
      "'");
  TORCH_CHECK_VALUE(
      options.enable_lora().empty() || options.enable_lora().size() == 3,
      "peft: enable_lora names q, k and v: three values, got ",
      options.enable_lora().size());
}

/// The value of the first pattern that `name` ends with (HF's rule), or the
/// default.
inline double pattern_value(
    const LoraOptions::Pattern& patterns,
    const std::string& name,
    double otherwise) {
  for (const auto& [pattern, value] : patterns) {
    if (std::regex_match(name, std::regex("(.*\\.)?(" + pattern + ")"))) {
      return value;
    }
  }
  return otherwise;
}

/// r and s = alpha / r (or alpha / √r) at a module.
struct LoraScale {
  int64_t r;
  double scaling;
};

inline LoraScale lora_scale(
    const LoraOptions& options,
    const std::string& module) {
  const auto r = static_cast<int64_t>(pattern_value(
      options.rank_pattern(), module, static_cast<double>(options.r())));
  const double alpha =
      pattern_value(options.alpha_pattern(), module, options.alpha());
  return {
      r,
      alpha /
          (options.rslora() ? std::sqrt(static_cast<double>(r))
                            : static_cast<double>(r))};
}

/// How a weight's numbers lie, and with them the shapes of A and B.
enum class LoraLayout {
  matrix, // [out, ...]: A [r, rest], B [out, r]
  transposed, // [in, out]: ΔW = (B A)ᵀ (GPT-2's Conv1D)
  embedding, // [num, dim]: ΔW = (B A)ᵀ, A zero and B Gaussian at the start
  convolution, // A [r, in/g, k...], B [out, r/g, 1...]
  blocks // packed q, k, v: one A [r, in] and B [out/3, r] for each enabled one
};

/// The dtype that adapters are kept in: at least float32.
inline at::ScalarType adapter_dtype(const Tensor& weight) {
  return c10::isReducedFloatingType(weight.scalar_type())
      ? at::kFloat
      : weight.scalar_type();
}

} // namespace detail

/// LoRA at one weight: A, B and the scaling.
class LoraDelta final : public Delta {
 public:
  using Layout = detail::LoraLayout;

  struct Config {
    Layout layout = Layout::matrix;
    double scaling = 1.0;
    double dropout = 0.0;
    int64_t groups = 1; // of a convolution
    std::vector<bool> enabled; // for blocks
  };

  LoraDelta(Tensor A, Tensor B, Config config) : config_(std::move(config)) {
    lora_A = register_parameter(name_of("A"), A, A.requires_grad());
    lora_B = register_parameter(name_of("B"), B, B.requires_grad());
  }

  int64_t r() const {
    return config_.layout == Layout::blocks
        ? lora_A.size(0) / enabled_blocks()
        : lora_A.size(0);
  }
  const Config& config() const {
    return config_;
  }

  Tensor effective(const Tensor& weight, double scale) const override {
    const double s = scale * config_.scaling;
    const auto dtype = weight.scalar_type();
    if (config_.layout == Layout::convolution) {
      TORCH_CHECK(!is_dense_grouped(weight), obstacle_);
      return weight +
          functional::lora_convolution_delta(
                 lora_A.to(dtype),
                 lora_B.to(dtype),
                 s,
                 config_.groups,
                 weight.sizes());
    }
    const auto [down, up] = factors();
    // Weights of more dimensions count as matrices [out, rest].
    const Tensor matrix =
        weight.dim() == 2 ? weight : weight.reshape({weight.size(0), -1});
    return functional::lora_merged(matrix, down.to(dtype), up.to(dtype), s)
        .reshape(weight.sizes());
  }

  std::optional<at::ScalarType> dtype() const override {
    return lora_A.scalar_type();
  }
  bool is_additive() const override {
    return true;
  }
  std::string merge_obstacle() const override {
    return obstacle_;
  }

  bool has_linear() const override {
    return config_.layout != Layout::convolution;
  }
  Tensor linear(
      const LinearCall& call,
      const Below<LinearCall>& below,
      double scale) const override {
    auto [down, up] = factors();
    if (call.rows.begin != 0 || call.rows.end != up.size(0)) {
      up = up.slice(0, call.rows.begin, call.rows.end);
    }
    if (call.transposed) { // (up down)ᵀ = downᵀ upᵀ
      Tensor swapped = up.t();
      up = down.t();
      down = swapped;
    }
    const double s = scale * config_.scaling;
    if (below.is_base) {
      return functional::lora_linear(
          call.x, call.weight, call.bias, down, up, s, dropout_now());
    }
    const Tensor y = below(call);
    return (y +
            functional::lora_linear_term(call.x, down, up, s, dropout_now()))
        .to(y.scalar_type());
  }

  bool has_embedding() const override {
    return config_.layout == Layout::embedding;
  }
  Tensor embedding(
      const EmbeddingCall& call,
      const Below<EmbeddingCall>& below,
      double scale) const override {
    const Tensor y = below(call);
    return (y + functional::lora_embedding_term(
                    call.indices,
                    lora_A,
                    lora_B,
                    scale * config_.scaling,
                    call.padding_idx,
                    call.scale_grad_by_freq))
        .to(y.scalar_type());
  }

  bool has_convolution() const override {
    return config_.layout == Layout::convolution;
  }
  /// conv(x, W) + s · conv₁(conv(drop(x), A), B): B is a 1×1 convolution.
  Tensor convolution(
      const ConvolutionCall& call,
      const Below<ConvolutionCall>& below,
      double scale) const override {
    const Tensor y = below(call);
    if (call.args.groups != config_.groups) { // were unknown at attach
      auto zeros = at::zeros(call.weight.sizes(), lora_A.options());
      const Tensor change = effective(zeros, scale);
      const Tensor x = call.x.to(change.scalar_type());
      return (y + functional::convolution(x, change, std::nullopt, call.args))
          .to(y.scalar_type());
    }
    return (y +
            functional::lora_convolution_term(
                call.x,
                lora_A,
                lora_B,
                scale * config_.scaling,
                call.args,
                is_dense_grouped(call.weight) ? 1 : call.args.groups,
                dropout_now()))
        .to(y.scalar_type());
  }

  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    if (config_.layout == Layout::embedding) {
      return {{"lora_embedding_A", lora_A}, {"lora_embedding_B", lora_B}};
    }
    return {{"lora_A.weight", lora_A}, {"lora_B.weight", lora_B}};
  }

  /// HF knows no blocks (they become a diagonal of zeros and factors), and its
  /// A sees all inputs of a grouped convolution (zeros outside the group).
  Tensor to_file(const std::string& name, const Tensor& parameter)
      const override {
    torch::NoGradGuard no_grad;
    if (config_.layout == Layout::blocks && name == "lora_B.weight") {
      return scattered_B();
    }
    if (is_grouped() && name == "lora_A.weight" && obstacle_.empty()) {
      const int64_t g = config_.groups, rank = parameter.size(0) / g;
      auto sizes = parameter.sizes().vec();
      const int64_t inputs = sizes[1];
      sizes[1] *= g;
      Tensor full = at::zeros(sizes, parameter.options());
      for (int64_t i = 0; i < g; ++i) {
        full.slice(0, i * rank, (i + 1) * rank)
            .slice(1, i * inputs, (i + 1) * inputs)
            .copy_(parameter.slice(0, i * rank, (i + 1) * rank));
      }
      return full;
    }
    return parameter;
  }

  std::string from_file(
      const std::string& name,
      const Tensor& value,
      bool dry_run) override {
    auto sizes = lora_A.sizes().vec();
    if (is_grouped() && name == "lora_A.weight" && obstacle_.empty()) {
      sizes[1] *= config_.groups;
      if (value.sizes() == at::IntArrayRef(sizes)) {
        if (!dry_run) {
          take_grouped_A(value);
        }
        return {};
      }
    }
    return Delta::from_file(name, value, dry_run);
  }

  std::shared_ptr<Delta> copy() const override {
    torch::NoGradGuard no_grad;
    auto result =
        std::make_shared<LoraDelta>(lora_A.clone(), lora_B.clone(), config_);
    result->lora_A.set_requires_grad(lora_A.requires_grad());
    result->lora_B.set_requires_grad(lora_B.requires_grad());
    result->obstacle_ = obstacle_;
    result->train(is_training());
    return result;
  }

  std::string describe() const override {
    return "lora r=" + std::to_string(r());
  }

  /// ΔW = up · down: down [r, columns of W], up [rows of W, r].
  std::pair<Tensor, Tensor> factors() const {
    switch (config_.layout) {
      case Layout::transposed:
      case Layout::embedding:
        return {lora_B.t(), lora_A.t()};
      case Layout::blocks:
        return {lora_A, scattered_B()};
      default:
        return {lora_A, lora_B};
    }
  }

  Tensor lora_A, lora_B;

 private:
  std::string name_of(const std::string& letter) const {
    return (config_.layout == Layout::embedding ? "lora_embedding_" : "lora_") +
        letter;
  }
  double dropout_now() const {
    return is_training() ? config_.dropout : 0.0;
  }
  int64_t enabled_blocks() const {
    int64_t count = 0;
    for (const bool on : config_.enabled) {
      count += on ? 1 : 0;
    }
    return count;
  }
  bool is_grouped() const {
    return config_.layout == Layout::convolution && config_.groups > 1;
  }
  /// A of HF's form: the groups' own blocks where the rest is zero, else whole.
  void take_grouped_A(const Tensor& full) {
    torch::NoGradGuard no_grad;
    const int64_t g = config_.groups, rank = lora_A.size(0) / g;
    const int64_t inputs = lora_A.size(1);
    Tensor own = at::empty_like(lora_A);
    for (int64_t i = 0; i < g; ++i) {
      own.slice(0, i * rank, (i + 1) * rank)
          .copy_(full.slice(0, i * rank, (i + 1) * rank)
                     .slice(1, i * inputs, (i + 1) * inputs));
    }
    const bool fits = at::count_nonzero(full).item<int64_t>() ==
        at::count_nonzero(own).item<int64_t>();
    if (!fits) {
      obstacle_ =
          "its lora_A sees the inputs of all groups, which no grouped weight "
          "can express";
    }
    lora_A.set_data((fits ? own : full.clone()).to(lora_A.options()));
  }
  /// HF's grouped convolution: A sees all inputs, so ΔW is not grouped.
  bool is_dense_grouped(const Tensor& weight) const {
    return is_grouped() && lora_A.size(1) != weight.size(1);
  }
  /// The blocks of B on the diagonal of [out, r · enabled], zeros elsewhere.
  Tensor scattered_B() const {
    const int64_t blocks = enabled_blocks();
    const int64_t rank = lora_A.size(0) / blocks;
    const int64_t height = lora_B.size(0) / blocks;
    std::vector<Tensor> rows;
    int64_t at_block = 0;
    for (const bool on : config_.enabled) {
      if (!on) {
        rows.push_back(at::zeros({height, lora_A.size(0)}, lora_B.options()));
        continue;
      }
      rows.push_back(at::constant_pad_nd(
          lora_B.slice(0, at_block * height, (at_block + 1) * height),
          {at_block * rank, (blocks - 1 - at_block) * rank}));
      ++at_block;
    }
    return at::cat(rows);
  }

  Config config_;
  std::string obstacle_;
};

namespace detail {

/// A and B for a weight, as HF draws them: on the CPU, from the default
/// generator, in the order of nn.Linear's own initialisation, so that a seed
/// gives the same numbers in Python.
inline std::pair<Tensor, Tensor> lora_init(
    const LoraOptions& options,
    const std::vector<int64_t>& A_sizes,
    const std::vector<int64_t>& B_sizes,
    LoraLayout layout,
    int64_t r) {
  torch::NoGradGuard no_grad;
  if (options.init() == "empty") { // to be filled from a file
    return {torch::zeros(A_sizes), torch::zeros(B_sizes)};
  }
  Tensor A = torch::empty(A_sizes), B = torch::empty(B_sizes);
  const double root_5 = std::sqrt(5.0);
  if (layout == LoraLayout::embedding) {
    A.normal_();
    B.normal_();
    if (options.init() != "random") { // a table's A is the zero one
      A.zero_();
      B.normal_();
    }
    return {A, B};
  }
  torch::nn::init::kaiming_uniform_(A, root_5);
  torch::nn::init::kaiming_uniform_(B, root_5);
  if (options.init() == "gaussian") {
    torch::nn::init::normal_(A, 0.0, 1.0 / static_cast<double>(r));
    B.zero_();
  } else if (options.init() == "kaiming") {
    torch::nn::init::kaiming_uniform_(A, root_5);
    B.zero_();
  }
  return {A, B};
}

/// A LoraDelta for `weight`. `name` is for messages.
inline std::shared_ptr<LoraDelta> make_lora_delta(
    const LoraOptions& options,
    const Tensor& weight,
    LoraLayout layout,
    LoraScale scale,
    const std::string& name,
    int64_t groups = 1,
    const std::vector<bool>& enabled = {}) {
  c10::InferenceMode off(false);
  const int64_t r = scale.r;
  LoraDelta::Config config{
      layout, scale.scaling, options.dropout(), groups, enabled};
  std::vector<int64_t> A_sizes, B_sizes;
  switch (layout) {
    case LoraLayout::matrix:
      A_sizes = {r, weight.numel() / std::max<int64_t>(1, weight.size(0))};
      B_sizes = {weight.size(0), r};
      break;
    case LoraLayout::transposed:
    case LoraLayout::embedding:
      A_sizes = {r, weight.size(0)};
      B_sizes = {weight.size(1), r};
      break;
    case LoraLayout::convolution:
      TORCH_CHECK_VALUE(
          r % groups == 0,
          "peft: r must be divisible by the groups of the convolution '",
          name,
          "': got r = ",
          r,
          " and groups = ",
          groups);
      A_sizes = weight.sizes().vec();
      A_sizes[0] = r;
      B_sizes.assign(weight.dim(), 1);
      B_sizes[0] = weight.size(0);
      B_sizes[1] = r / groups;
      break;
    case LoraLayout::blocks: {
      int64_t count = 0;
      for (const bool on : enabled) {
        count += on ? 1 : 0;
      }
      TORCH_CHECK_VALUE(
          count > 0, "peft: enable_lora switches every block of '", name, "' off");
      A_sizes = {r * count, weight.size(1)};
      B_sizes = {weight.size(0) / 3 * count, r};
      break;
    }
  }
  auto [A, B] = lora_init(options, A_sizes, B_sizes, layout, r);
  const auto where =
      torch::TensorOptions(weight.device()).dtype(adapter_dtype(weight));
  return std::make_shared<LoraDelta>(
      A.to(where).set_requires_grad(true),
      B.to(where).set_requires_grad(true),
      config);
}

/// HF's lora_bias: b' = b + s · lora_B.bias.
class LoraBiasDelta final : public Delta {
 public:
  LoraBiasDelta(Tensor initial, double scaling) : scaling_(scaling) {
    bias = register_parameter("bias", initial, initial.requires_grad());
  }
  Tensor effective(const Tensor& weight, double scale) const override {
    return at::add(weight, bias.to(weight.scalar_type()), scale * scaling_);
  }
  std::optional<at::ScalarType> dtype() const override {
    return bias.scalar_type();
  }
  bool is_additive() const override {
    return true;
  }
  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    return {{"lora_B.bias", bias}};
  }
  std::shared_ptr<Delta> copy() const override {
    auto result = std::make_shared<LoraBiasDelta>(
        bias.detach().clone().set_requires_grad(bias.requires_grad()),
        scaling_);
    result->train(is_training());
    return result;
  }
  std::string describe() const override {
    return "lora bias";
  }

  Tensor bias;

 private:
  double scaling_;
};

/// The names that attention's query and value projections go by in the
/// architectures of HF, for default targets.
inline bool is_query_or_value(const Layer& layer) {
  static const char* const names[] = {
      "query", "value",  "q_proj", "v_proj", "q",   "v",
      "q_lin", "v_lin",  "to_q",   "to_v",   "wq",  "wv",
      "Wq",    "Wv",     "query_proj",       "value_proj",
      "query_key_value", "c_attn",           "qkv", "qkv_proj"};
  const auto dot = layer.name.rfind('.');
  const std::string last =
      dot == std::string::npos ? layer.name : layer.name.substr(dot + 1);
  for (const char* name : names) {
    if (last == name) {
      return layer.parameter("weight").defined();
    }
  }
  return false;
}

/// HF's layers_to_transform: the first number after a dotted name is the index.
inline bool in_chosen_layers(
    const LoraOptions& options,
    const std::string& name) {
  if (options.layers().empty()) {
    return true;
  }
  // An entry that is the whole name is meant wherever it stands.
  for (const auto& target : options.targets().names()) {
    if (options.targets().kind() == Targets::Kind::list && target == name) {
      return true;
    }
  }
  std::smatch match;
  bool found = false;
  if (options.layers_pattern().empty()) {
    found = std::regex_search(
        name,
        match,
        std::regex("^.*?\\.[^.]*\\.(\\d+)\\."),
        std::regex_constants::match_continuous);
  }
  for (const auto& pattern : options.layers_pattern()) {
    found = found ||
        std::regex_search(
                name,
                match,
                std::regex("^(?:.*?\\.)?" + pattern + "\\.(\\d+)\\."),
                std::regex_constants::match_continuous);
    if (found) {
      break;
    }
  }
  if (!found) {
    return false;
  }
  const int64_t index = std::stoll(match[1].str());
  for (const auto layer : options.layers()) {
    if (layer == index) {
      return true;
    }
  }
  return false;
}

/// Plans LoRA on one module that a target named. Returns the biases of the
/// adapted layers for bias = "lora_only".
class LoraPlanner {
 public:
  LoraPlanner(const LoraOptions& options, const Network& network)
      : options_(options), network_(network) {}

  std::vector<PlannedSite> run() {
    check(options_);
    check_names();
    for (const auto& layer : network_) {
      if (is_inside(layer.name, options_.modules_to_save()) &&
          !layer.name.empty()) {
        continue;
      }
      if (options_.targets().empty()) {
        plan_default(layer);
      } else if (wanted(layer.name, layer)) {
        plan_module(layer);
      } else {
        for (const auto& p : layer.parameters) {
          if (wanted(layer.path(p.first), layer)) {
            plan_parameter(layer, p.first);
          }
        }
      }
    }
    TORCH_CHECK(
        !sites_.empty(),
        "peft: the targets match nothing that LoRA can adapt",
        options_.targets().empty()
            ? " by default (query and value projections); set targets(...)."
            : ".",
        near_misses(network_, "weight"));
    plan_biases();
    plan_modules_to_save(network_, options_.modules_to_save(), sites_);
    return std::move(sites_);
  }

 private:
  void check_names() const {
    if (options_.targets().kind() == Targets::Kind::list) {
      check_every_name_matches(
          network_, options_.targets().names(), "targets", true);
    }
    if (options_.exclude().kind() == Targets::Kind::list) {
      check_every_name_matches(
          network_, options_.exclude().names(), "exclude", true);
    }
  }

  bool wanted(const std::string& name, const Layer& layer) const {
    return options_.targets().matches(name, layer) &&
        !options_.exclude().matches(name, layer) &&
        in_chosen_layers(options_, name);
  }

  void plan_default(const Layer& layer) {
    const bool excluded = options_.exclude().matches(layer.name, layer) ||
        !in_chosen_layers(options_, layer.name);
    if (excluded) {
      return;
    }
    if (layer.kind == LayerKind::attention) {
      plan_attention(layer, {true, false, true});
    } else if (is_query_or_value(layer)) {
      plan_weight(layer, "weight");
    }
  }

  void plan_module(const Layer& layer) {
    TORCH_CHECK(
        layer.refusal.empty(),
        "peft: '",
        layer.name,
        "' (",
        layer.type,
        ") cannot be adapted: ",
        layer.refusal);
    if (layer.kind == LayerKind::attention) {
      plan_attention(layer, options_.enable_lora());
      return;
    }
    if (layer.kind == LayerKind::recurrent) {
      for (const auto& p : layer.parameters) {
        if (p.second.dim() == 2) {
          plan_weight(layer, p.first);
        }
      }
      return;
    }
    const Tensor weight = layer.parameter("weight");
    if (weight.defined() && weight.dim() >= 2) {
      plan_weight(layer, "weight");
      return;
    }
    std::string inside;
    for (const auto& other : network_) {
      const bool child = other.name.size() > layer.name.size() &&
          (layer.name.empty() ||
           other.name.compare(0, layer.name.size() + 1, layer.name + ".") == 0);
      if (child && other.parameter("weight").defined() &&
          other.parameter("weight").dim() >= 2 && inside.size() < 200) {
        inside += (inside.empty() ? " Inside it are: '" : "', '") + other.name;
      }
    }
    TORCH_CHECK(
        false,
        "peft: target '",
        layer.name,
        "' is a ",
        layer.type,
        " without a weight matrix of its own, which LoRA needs; name the "
        "layers in it.",
        inside.empty() ? "" : inside + "'.");
  }

  void plan_parameter(const Layer& layer, const std::string& key) {
    TORCH_CHECK(
        layer.refusal.empty(),
        "peft: '",
        layer.path(key),
        "' cannot be adapted: ",
        layer.refusal);
    if (layer.kind == LayerKind::attention && key == "in_proj_weight" &&
        !options_.enable_lora().empty()) {
      plan_attention(layer, options_.enable_lora());
      return;
    }
    TORCH_CHECK(
        layer.parameter(key).dim() >= 2,
        "peft: '",
        layer.path(key),
        "' has ",
        layer.parameter(key).dim(),
        " dimension(s); LoRA needs a matrix (BitFit trains biases)");
    plan_weight(layer, key);
  }

  /// Packed attention: all of in_proj and out_proj, as HF, or the chosen ones
  /// of q, k and v.
  void plan_attention(const Layer& layer, const std::vector<bool>& enabled) {
    const Tensor packed = layer.parameter("in_proj_weight");
    if (packed.defined()) {
      plan_weight(layer, "in_proj_weight", enabled);
    } else {
      const char* const keys[] = {
          "q_proj_weight", "k_proj_weight", "v_proj_weight"};
      for (size_t i = 0; i < 3; ++i) {
        if ((enabled.empty() || enabled[i]) &&
            layer.parameter(keys[i]).defined()) {
          plan_weight(layer, keys[i]);
        }
      }
    }
    if (enabled.empty()) {
      for (const auto& other : network_) {
        if (other.parent_attention == layer.name &&
            other.name == layer.path("out_proj") &&
            !options_.exclude().matches(other.name, other) &&
            !is_planned(other.path("weight"))) {
          plan_weight(other, "weight");
        }
      }
    }
  }

  bool is_planned(const std::string& parameter) const {
    for (const auto& site : sites_) {
      if (site.parameter == parameter) {
        return true;
      }
    }
    return false;
  }

  void plan_weight(
      const Layer& layer,
      const std::string& key,
      const std::vector<bool>& enabled = {}) {
    const std::string path = layer.path(key);
    if (is_planned(path)) {
      return;
    }
    const Tensor weight = layer.parameter(key);
    // Where a module has one weight, HF's patterns and keys name the module.
    const bool main = key == "weight" || key == "in_proj_weight";
    const std::string& module = main ? layer.name : path;
    // HF adapts out_proj as a part of its attention, with its patterns.
    const std::string& pattern_name =
        layer.parent_attention.empty() ? module : layer.parent_attention;
    LoraLayout layout = LoraLayout::matrix;
    int64_t groups = 1;
    if (!enabled.empty() && key == "in_proj_weight") {
      layout = LoraLayout::blocks;
    } else if (key == "weight" && weight.dim() == 2 &&
               (layer.kind == LayerKind::embedding ||
                layer.kind == LayerKind::embedding_bag)) {
      layout = LoraLayout::embedding;
    } else if (key == "weight" && layer.kind == LayerKind::convolution) {
      layout = LoraLayout::convolution;
      groups = layer.groups;
    } else if (weight.dim() == 2 && options_.fan_in_fan_out()) {
      layout = LoraLayout::transposed;
    }
    std::string prefix = module;
    if (!layer.parent_attention.empty()) {
      prefix = layer.parent_attention + ".base_layer.out_proj"; // HF's infix
    }
    auto delta = make_lora_delta(
        options_,
        weight,
        layout,
        lora_scale(options_, pattern_name),
        path,
        groups,
        enabled);
    sites_.push_back({module, path, prefix, weight, std::move(delta)});
    if (options_.lora_bias()) {
      plan_lora_bias(layer, key, prefix, lora_scale(options_, pattern_name));
    }
    adapted_.push_back(&layer);
  }

  void plan_lora_bias(
      const Layer& layer,
      const std::string& key,
      const std::string& prefix,
      LoraScale scale) {
    const Tensor bias = layer.parameter("bias");
    TORCH_CHECK(
        key == "weight" && bias.defined() &&
            layer.kind != LayerKind::normalization,
        "peft: lora_bias needs a layer with a bias, and '",
        layer.path(key),
        "' stands beside none");
    c10::InferenceMode off(false);
    const auto where =
        torch::TensorOptions(bias.device()).dtype(adapter_dtype(bias));
    Tensor initial = torch::zeros(bias.sizes(), where);
    sites_.push_back(
        {layer.path("bias"),
         layer.path("bias"),
         prefix,
         bias,
         std::make_shared<LoraBiasDelta>(
             initial.set_requires_grad(true), scale.scaling)});
  }

  /// bias = "all": every bias of the network; "lora_only": of adapted layers.
  void plan_biases() {
    if (options_.bias() == "none") {
      return;
    }
    for (const auto& layer : network_) {
      const bool adapted =
          std::find(adapted_.begin(), adapted_.end(), &layer) != adapted_.end();
      if (options_.bias() == "lora_only" && !adapted) {
        continue;
      }
      if (is_inside(layer.name, options_.modules_to_save())) {
        continue;
      }
      for (const auto& p : layer.parameters) {
        if (p.first == "bias") { // HF's rule: in_proj_bias stays frozen
          PlannedSite site = plan_copy(layer, p.first);
          if (adapted) { // under the name that HF's wrapper gives it
            site.file_prefix = layer.parent_attention.empty()
                ? layer.path("base_layer")
                : layer.parent_attention + ".base_layer.out_proj.base_layer";
          }
          sites_.push_back(std::move(site));
        }
      }
    }
  }

  const LoraOptions& options_;
  const Network& network_;
  std::vector<PlannedSite> sites_;
  std::vector<const Layer*> adapted_;
};

inline Plan plan(const LoraOptions& options, const Network& network) {
  Plan result;
  result.method = "LORA";
  result.options = options;
  result.sites = LoraPlanner(options, network).run();
  return result;
}

} // namespace detail

/// Puts LoRA on the targets of `model`, whose source nobody changes, freezes
/// everything else, and returns the handle. All or nothing: an error leaves the
/// model as it was.
inline Adapter attach(
    torch::nn::Module& model,
    const LoraOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

namespace detail {

/// W, A, B and s of an explicit layer put together: the one line of the paper,
/// for each kind of layer.
inline Tensor lora_forward(
    const torch::nn::LinearImpl& layer,
    const Tensor& x,
    const Tensor& A,
    const Tensor& B,
    double scale,
    double dropout) {
  if (x.dim() == 2 || !layer.bias.defined()) {
    return functional::lora_linear(
        x,
        layer.weight,
        functional::optional(layer.bias),
        A,
        B,
        scale,
        dropout);
  }
  // torch::nn::functional::linear adds the bias afterwards.
  return functional::lora_linear(
             x, layer.weight, std::nullopt, A, B, scale, dropout)
      .add_(layer.bias);
}

inline Tensor lora_forward(
    const torch::nn::EmbeddingImpl& layer,
    const Tensor& indices,
    const Tensor& A,
    const Tensor& B,
    double scale,
    double /*dropout*/) {
  const auto padding_idx = layer.options.padding_idx().value_or(-1);
  return functional::lora_embedding(
      indices,
      layer.weight,
      A,
      B,
      scale,
      padding_idx < 0 ? -1 : padding_idx,
      layer.options.scale_grad_by_freq());
}

template <size_t D, class Conv>
Tensor lora_forward(
    const torch::nn::ConvNdImpl<D, Conv>& layer,
    const Tensor& x,
    const Tensor& A,
    const Tensor& B,
    double scale,
    double dropout) {
  const functional::PaddedInput<D> input(layer.options, x);
  return functional::lora_convolution(
      input.x,
      layer.weight,
      functional::optional(layer.bias),
      A,
      B,
      scale,
      input.args,
      dropout);
}

} // namespace detail

/// LoRA as a layer of one's own: a frozen base layer beside A and B.
template <class Base>
class LoraImpl : public ExplicitLayer<Base, LoraImpl<Base>> {
 public:
  /// From the base's options or from a layer that exists.
  template <class LayerOrOptions>
  explicit LoraImpl(
      const LayerOrOptions& layer,
      const LoraOptions& options_ = LoraOptions())
      : ExplicitLayer<Base, LoraImpl<Base>>(layer), options(options_) {
    detail::check(options);
    Layer description;
    description.parameters = {{"weight", this->base_layer->weight}};
    detail::describe_layer(*this->base_layer, description);
    TORCH_CHECK(
        description.refusal.empty(),
        "peft: this ",
        this->base_layer->name(),
        " cannot be adapted: ",
        description.refusal);
    const auto layout = description.kind == LayerKind::embedding
        ? detail::LoraLayout::embedding
        : description.kind == LayerKind::convolution
        ? detail::LoraLayout::convolution
        : detail::LoraLayout::matrix;
    const auto scale = detail::lora_scale(options, "");
    scaling = scale.scaling;
    delta_ = detail::make_lora_delta(
        options,
        this->base_layer->weight,
        layout,
        scale,
        this->base_layer->name(),
        description.groups);
    lora_A = delta_->lora_A;
    lora_B = delta_->lora_B;
    register_own();
  }

  /// h = W x + b + s · B A drop(x).
  Tensor adapted(const Tensor& x) {
    return detail::lora_forward(
        *this->base_layer,
        x,
        lora_A,
        lora_B,
        scaling,
        this->is_training() ? options.dropout() : 0.0);
  }

  /// ΔW = s · B A in the shape of the weight.
  Tensor delta_weight() const {
    const Tensor& weight = this->base_layer->weight;
    return own_delta().effective(at::zeros_like(weight, lora_A.dtype()), 1.0);
  }

  void fold() {
    const Tensor& weight = this->base_layer->weight;
    weight.copy_(own_delta().effective(
        weight.to(c10::promoteTypes(weight.scalar_type(), lora_A.scalar_type())),
        1.0));
  }
  Tensor& folded() {
    return this->base_layer->weight;
  }
  std::vector<Tensor> trained() const {
    return {lora_A, lora_B};
  }
  void register_own() {
    lora_A = this->register_parameter("lora_A", lora_A.detach().clone());
    lora_B = this->register_parameter("lora_B", lora_B.detach().clone());
  }
  void pretty_print(std::ostream& stream) const override {
    stream << "peft::Lora(r=" << delta_->r() << ", alpha=" << options.alpha()
           << ")";
  }

  LoraOptions options;
  /// s = alpha / r, or alpha / √r for rsLoRA.
  double scaling = 1.0;
  Tensor lora_A, lora_B;

 private:
  /// The same mathematics as behind attach, over this layer's tensors.
  LoraDelta own_delta() const {
    return LoraDelta(lora_A, lora_B, delta_->config());
  }
  std::shared_ptr<LoraDelta> delta_; // for its configuration
};

/// A holder, as torch::nn's own:
///
///   peft::Lora<torch::nn::Linear> query(
///       torch::nn::LinearOptions(384, 384), peft::LoraOptions(8));
///   peft::Lora<torch::nn::Linear> wrapped(linear, peft::LoraOptions(8));
///
/// For Linear, Embedding and Conv1d, Conv2d, Conv3d.
template <class Layer>
class Lora
    : public torch::nn::ModuleHolder<LoraImpl<typename Layer::ContainedType>> {
 public:
  using torch::nn::ModuleHolder<
      LoraImpl<typename Layer::ContainedType>>::ModuleHolder;
};

} // namespace peft
