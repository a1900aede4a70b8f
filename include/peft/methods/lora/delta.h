#pragma once

#include <peft/core/delta.h>
#include <peft/functional/lora.h>
#include <peft/functional/lora_merge.h>
#include <peft/functional/sparse_embedding.h>
#include <peft/functional/lora_rows.h>
#include <peft/methods/lora/offset.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// How a weight's numbers lie, and with them the shapes of A and B.
enum class LoraLayout {
  matrix, // [out, ...]: A [r, rest], B [out, r]
  transposed, // [in, out]: ΔW = (B A)ᵀ (GPT-2's Conv1D)
  embedding, // [num, dim]: ΔW = (B A)ᵀ, A zero and B Gaussian at the start
  convolution, // A [r, in/g, k...], B [out, r/g, 1...]
  blocks // packed q, k, v: one A [r, in] and B [out/3, r] for each enabled one
};

/// Copies factors of the same or a lower rank into A and B; what is left of
/// their rank is zero, so the product is the same. The rank runs over A's first
/// dimension, in `groups` that B knows apart, and over B's second. A higher
/// rank needs other memory, which `may_grow` allows. Returns why it does not
/// fit, or "".
inline std::string take_factors(
    Tensor& A,
    Tensor& B,
    const Tensor& from_A,
    const Tensor& from_B,
    int64_t groups,
    bool may_grow,
    bool dry_run) {
  const auto without = [](const Tensor& t, int64_t dim) {
    auto sizes = t.sizes().vec();
    sizes.erase(sizes.begin() + dim);
    return sizes;
  };
  if (A.dim() != from_A.dim() || B.dim() != from_B.dim() ||
      without(A, 0) != without(from_A, 0) ||
      without(B, 1) != without(from_B, 1)) {
    return c10::str(
        "A and B of shape ",
        from_A.sizes(),
        " and ",
        from_B.sizes(),
        " where ",
        A.sizes(),
        " and ",
        B.sizes(),
        " fit, up to the rank");
  }
  const int64_t r = from_A.size(0) / groups;
  const bool grows = r > A.size(0) / groups;
  if (grows && !may_grow) {
    return c10::str(
        "rank ",
        r,
        " does not fit into the memory of rank ",
        A.size(0) / groups);
  }
  if (dry_run) {
    return {};
  }
  torch::NoGradGuard no_grad;
  if (grows) {
    A.set_data(at::empty(from_A.sizes(), A.options().requires_grad(false)));
    B.set_data(at::empty(from_B.sizes(), B.options().requires_grad(false)));
  }
  A.zero_()
      .unflatten(0, {groups, -1})
      .narrow(1, 0, r)
      .copy_(from_A.unflatten(0, {groups, -1}));
  B.zero_().narrow(1, 0, from_B.size(1)).copy_(from_B);
  return {};
}

} // namespace detail

/// LoRA at one weight: A, B, the scaling, and what it takes off if it does.
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
    return config_.layout == Layout::blocks ? lora_A.size(0) / enabled_blocks()
                                            : lora_A.size(0);
  }
  const Config& config() const {
    return config_;
  }

  /// Takes s · B0 A0 off from now on. For matrices [out, in] and [in, out].
  void take_off(const Tensor& A0, const Tensor& B0) {
    offset_.A = register_buffer("lora_A0", A0);
    offset_.B = register_buffer("lora_B0", B0);
  }
  const detail::LoraOffset& offset() const {
    return offset_;
  }

  Tensor effective(const Tensor& weight, double scale) const override {
    const double s = scale * config_.scaling;
    const auto dtype = weight.scalar_type();
    const Tensor f = number_factor();
    if (config_.layout == Layout::convolution) {
      TORCH_CHECK(!is_dense_grouped(weight), obstacle_);
      return weight +
          functional::lora_convolution_delta(
                 lora_A.to(dtype),
                 times_factor(lora_B.to(dtype), f),
                 s,
                 config_.groups,
                 weight.sizes());
    }
    const auto [down, up] = factors();
    // Weights of more dimensions count as matrices [out, rest].
    const Tensor matrix =
        weight.dim() == 2 ? weight : weight.reshape({weight.size(0), -1});
    return functional::lora_merged(
               matrix, down.to(dtype), times_factor(up.to(dtype), f), s)
        .reshape(weight.sizes());
  }

  std::optional<at::ScalarType> dtype() const override {
    return lora_A.scalar_type();
  }
  bool fold_into(const Tensor& weight, double scale, bool dry_run)
      const override {
    torch::NoGradGuard no_grad;
    const auto own = offset_ ? offset_.beside(lora_A, lora_B)
                             : std::make_pair(lora_A, lora_B);
    auto [down, up] = laid_out(own.first, own.second);
    if (factor_kind() != Decoration::Factor::none) {
      return false;
    }
    if (config_.layout == Layout::convolution) {
      if (config_.groups > 1) { // a product a group
        return false;
      }
      down = down.flatten(1);
      up = up.flatten(1);
    }
    if (weight.dim() < 2 || (weight.dim() > 2 && !weight.is_contiguous())) {
      return false;
    }
    const Tensor matrix = weight.flatten(1);
    const double s = scale * config_.scaling;
    if (dry_run) {
      return functional::lora_merge_is_safe(matrix, down, up, s);
    }
    functional::lora_merge_(matrix, down, up, s);
    return true;
  }
  bool is_additive() const override {
    return true;
  }
  std::string merge_obstacle() const override {
    return obstacle_;
  }
  std::string mask_obstacle() const override {
    return offset_.mask_obstacle();
  }

  bool has_linear() const override {
    return config_.layout != Layout::convolution;
  }
  Tensor linear(
      const LinearCall& call,
      const Below<LinearCall>& below,
      double scale) const override {
    const double s = scale * config_.scaling;
    const Tensor f = factor(call.x);
    if (offset_ && dropout_now() > 0.0) { // which is for A, not for the base
      const Tensor y = below(call);
      const auto [down, up] = as_used(laid_out(lora_A, lora_B), call);
      const auto [down0, up0] = as_used(laid_out(offset_.A, offset_.B), call);
      const Tensor term =
          functional::lora_linear_term(call.x, down, up, s, dropout_now()) -
          functional::lora_linear_term(call.x, down0, up0, s);
      return (y + times_factor(term, f)).to(y.scalar_type());
    }
    const auto [down, up] = as_used(factors(), call);
    if (below.is_base && !f.defined()) {
      return functional::lora_linear(
          call.x,
          call.weight,
          call.bias,
          down,
          up,
          s,
          dropout_now(),
          call.packed,
          call.transposed,
          kept_transpose(call.x, down, up));
    }
    const Tensor y = below(call);
    const Tensor term =
        functional::lora_linear_term(call.x, down, up, s, dropout_now());
    return (y + times_factor(term, f)).to(y.scalar_type());
  }

  bool takes_factor(Decoration::Factor kind) const override {
    return kind != Decoration::Factor::input ||
        (has_linear() && config_.layout != Layout::embedding);
  }
  int64_t factor_features() const override {
    return lora_A.size(1);
  }

  int64_t linear_cost() const override {
    return dropout_now() > 0.0 || factor_kind() != Decoration::Factor::none
        ? 0
        : (lora_A.numel() + lora_B.numel()) * (offset_ ? 2 : 1);
  }
  void visit_state(
      c10::function_ref<void(const Tensor&)> visit) const override {
    visit(lora_A);
    visit(lora_B);
    if (offset_) {
      visit(offset_.A);
      visit(offset_.B);
    }
  }

  bool add_rows(const LinearCall& call, const Tensor& y, double scale)
      const override {
    const bool whole = call.rows.begin == 0 &&
        call.rows.end == (call.transposed ? lora_A.size(1) : lora_B.size(0));
    const bool direct = call.transposed ? config_.layout == Layout::transposed
                                        : config_.layout == Layout::matrix;
    if (!whole || !direct || offset_ || dropout_now() > 0.0 ||
        factor_kind() != Decoration::Factor::none ||
        !functional::can_add_lora_rows(call.x, lora_A, lora_B, y)) {
      return false;
    }
    functional::add_lora_rows(
        call.x, lora_A, lora_B, transposed_B_, y, scale * config_.scaling);
    return true;
  }

  bool has_embedding() const override {
    return config_.layout == Layout::embedding;
  }
  Tensor embedding(
      const EmbeddingCall& call,
      const Below<EmbeddingCall>& below,
      double scale) const override {
    const Tensor y = below(call);
    const Tensor term = functional::lora_embedding_term(
        call.indices,
        lora_A,
        lora_B,
        scale * config_.scaling,
        call.padding_idx,
        call.scale_grad_by_freq,
        call.sparse);
    return (y + times_factor(term, factor({}))).to(y.scalar_type());
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
    const Tensor term = functional::lora_convolution_term(
        call.x,
        lora_A,
        lora_B,
        scale * config_.scaling,
        call.args,
        is_dense_grouped(call.weight) ? 1 : call.args.groups,
        dropout_now());
    return (y + times_factor(term, factor({}))).to(y.scalar_type());
  }

  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    if (config_.layout == Layout::embedding) {
      return {{"lora_embedding_A", lora_A}, {"lora_embedding_B", lora_B}};
    }
    return {{"lora_A.weight", lora_A}, {"lora_B.weight", lora_B}};
  }

  std::vector<std::pair<std::string, Tensor>> training_tensors()
      const override {
    return offset_.file_tensors();
  }

  /// HF knows no blocks (they become a diagonal of zeros and factors), and its
  /// A sees all inputs of a grouped convolution (zeros outside the group).
  Tensor to_file(const std::string& name, const Tensor& parameter)
      const override {
    torch::NoGradGuard no_grad;
    if (config_.layout == Layout::blocks && name == "lora_B.weight") {
      return scattered(parameter);
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
    auto misfit = Delta::from_file(name, value, dry_run);
    if (!misfit.empty()) {
      misfit += c10::str(" (r = ", r(), ")");
    }
    return misfit;
  }

  std::string take(const Delta& other, bool may_grow, bool dry_run) override {
    const auto* from = dynamic_cast<const LoraDelta*>(&other);
    if (from == nullptr || from->config_.layout != config_.layout ||
        from->config_.groups != config_.groups ||
        from->config_.enabled != config_.enabled) {
      return "it is a '" + other.describe() + "' of another form";
    }
    const auto apart = offset_.misfit(from->offset_);
    if (!apart.empty()) {
      return apart;
    }
    const int64_t groups = config_.layout == Layout::blocks ? enabled_blocks()
        : config_.layout == Layout::convolution             ? config_.groups
                                                            : 1;
    const auto misfit = detail::take_factors(
        lora_A, lora_B, from->lora_A, from->lora_B, groups, may_grow, dry_run);
    if (misfit.empty() && !dry_run) {
      torch::NoGradGuard no_grad;
      offset_.take(from->offset_);
      config_ = from->config_;
      obstacle_ = from->obstacle_;
    }
    return misfit;
  }
  bool clear(bool dry_run) override {
    if (!dry_run && !offset_) {
      torch::NoGradGuard no_grad;
      (config_.layout == Layout::embedding ? lora_A : lora_B).zero_();
    }
    return !offset_;
  }

  std::shared_ptr<Delta> copy() const override {
    torch::NoGradGuard no_grad;
    auto result =
        std::make_shared<LoraDelta>(lora_A.clone(), lora_B.clone(), config_);
    result->lora_A.set_requires_grad(lora_A.requires_grad());
    result->lora_B.set_requires_grad(lora_B.requires_grad());
    if (offset_) {
      result->take_off(offset_.A.clone(), offset_.B.clone());
    }
    result->obstacle_ = obstacle_;
    result->train(is_training());
    return result;
  }

  std::string describe() const override {
    return "lora r=" + std::to_string(r());
  }

  /// ΔW = s · up down: down [r, columns of W], up [rows of W, r]; of twice the
  /// rank where something is taken off.
  std::pair<Tensor, Tensor> factors() const {
    if (offset_) {
      const auto [A, B] = offset_.under(lora_A, lora_B);
      return laid_out(A, B);
    }
    return laid_out(lora_A, lora_B);
  }

  Tensor lora_A, lora_B;

 private:
  std::string name_of(const std::string& letter) const {
    return (config_.layout == Layout::embedding ? "lora_embedding_" : "lora_") +
        letter;
  }
  /// down and up of a product B A.
  std::pair<Tensor, Tensor> laid_out(const Tensor& A, const Tensor& B) const {
    switch (config_.layout) {
      case Layout::transposed:
      case Layout::embedding:
        return {B.t(), A.t()};
      case Layout::blocks:
        return {A, scattered(B)};
      default:
        return {A, B};
    }
  }
  /// down and up of the matrix that a call reads: some rows, or its transpose.
  static std::pair<Tensor, Tensor> as_used(
      std::pair<Tensor, Tensor> factors,
      const LinearCall& call) {
    auto& [down, up] = factors;
    if (call.rows.begin != 0 || call.rows.end != up.size(0)) {
      up = up.slice(0, call.rows.begin, call.rows.end);
    }
    if (call.transposed) { // (up down)ᵀ = downᵀ upᵀ
      std::swap(down, up);
      down = down.t();
      up = up.t();
    }
    return factors;
  }
  /// Bᵀ from an earlier call, for the CPU kernels without gradients.
  Tensor kept_transpose(const Tensor& x, const Tensor& down, const Tensor& up)
      const {
    return !at::GradMode::is_enabled() && up.is_same(lora_B) &&
            !up.is_inference() && functional::detail::by_kernels(x, down, up)
        ? transposed_B_.of(up)
        : Tensor();
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
  Tensor scattered(const Tensor& B) const {
    const int64_t blocks = enabled_blocks();
    const int64_t rank = lora_A.size(0) / blocks;
    const int64_t height = B.size(0) / blocks;
    std::vector<Tensor> rows;
    int64_t at_block = 0;
    for (const bool on : config_.enabled) {
      if (!on) {
        rows.push_back(at::zeros({height, lora_A.size(0)}, B.options()));
        continue;
      }
      rows.push_back(at::constant_pad_nd(
          B.slice(0, at_block * height, (at_block + 1) * height),
          {at_block * rank, (blocks - 1 - at_block) * rank}));
      ++at_block;
    }
    return at::cat(rows);
  }

  Config config_;
  detail::LoraOffset offset_;
  std::string obstacle_;
  functional::TransposedCache transposed_B_;
};

} // namespace peft
