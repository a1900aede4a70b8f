#pragma once

// DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al. 2024,
// arXiv:2402.09353), as HF PEFT's use_dora computes it.
//
//   W' = m ∘ (W + s · B A) / ‖W + s · B A‖
//
// with one magnitude m for each output: a row of a Linear's weight, a channel
// of a convolution, a dimension of an Embedding. m starts as the norm, so the
// network starts as it was; the norm gets no gradient.

#include <peft/core/delta.h>
#include <peft/functional/dora.h>
#include <peft/functional/sparse_embedding.h>
#include <peft/functional/stamp.h>
#include <peft/methods/lora/init.h>

#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// Keeps ‖W_i‖² while W stays, and outside of training the whole norm while W,
/// A and B stay, or what they are made of. Threads may share it.
class DoraNormCache {
 public:
  Tensor norm(const Tensor& W, const Tensor& A, const Tensor& B, double scale) {
    return norm(W, A, B, scale, A, B);
  }
  Tensor norm(
      const Tensor& W,
      const Tensor& A,
      const Tensor& B,
      double scale,
      const Tensor& source_of_A,
      const Tensor& source_of_B) {
    const bool training = at::GradMode::is_enabled(); // A and B are to move
    const c10::InferenceMode off(false); // what is kept may meet autograd later
    const at::NoGradGuard no_grad;
    using functional::Stamp;
    const auto at_W = Stamp::of(W), at_A = Stamp::of(source_of_A),
               at_B = Stamp::of(source_of_B);
    Tensor squares;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (at_W && at_W == W_) {
        if (!training && at_A && at_A == A_ && at_B && at_B == B_ &&
            scale == scale_) {
          return norm_;
        }
        squares = squares_;
      }
    }
    if (!squares.defined() || squares.scalar_type() != A.scalar_type()) {
      squares = functional::row_squares(W, A.scalar_type());
    }
    const Tensor result = functional::dora_norm(W, squares, A, B, scale);
    const std::lock_guard<std::mutex> lock(mutex_);
    W_ = at_W;
    squares_ = squares;
    A_ = training ? std::nullopt : at_A;
    B_ = at_B;
    norm_ = result;
    scale_ = scale;
    return result;
  }

 private:
  std::mutex mutex_;
  std::optional<functional::Stamp> W_, A_, B_;
  Tensor squares_, norm_;
  double scale_ = 0.0;
};

} // namespace detail

/// DoRA at one weight: A, B, the magnitude and the scaling.
class DoraDelta final : public Delta {
 public:
  using Layout = detail::LoraLayout;

  DoraDelta(Tensor A, Tensor B, Tensor m, LoraDelta::Config config)
      : config_(std::move(config)) {
    const std::string start =
        config_.layout == Layout::embedding ? "lora_embedding_" : "lora_";
    lora_A = register_parameter(start + "A", A, A.requires_grad());
    lora_B = register_parameter(start + "B", B, B.requires_grad());
    magnitude =
        register_parameter("lora_magnitude_vector", m, m.requires_grad());
  }

  int64_t r() const {
    return lora_A.size(0);
  }
  const LoraDelta::Config& config() const {
    return config_;
  }

  /// Takes s · B0 A0 off the direction from now on.
  void take_off(const Tensor& A0, const Tensor& B0) {
    offset_.A = register_buffer("lora_A0", A0);
    offset_.B = register_buffer("lora_B0", B0);
  }
  const detail::LoraOffset& offset() const {
    return offset_;
  }

  /// m = ‖W + s · B A‖, so that W' is W + s · B A.
  void match(const Tensor& weight) {
    const at::NoGradGuard no_grad;
    const auto [down, up] = factors();
    magnitude.copy_(fresh_norm(outputs_first(weight), down, up, config_.scaling)
                        .reshape(magnitude.sizes()));
  }

  Tensor effective(const Tensor& weight, double scale) const override {
    const auto dtype = weight.scalar_type();
    const auto [down, up] = factors();
    const Tensor value = functional::dora_weight(
        functional::lora_merged(
            outputs_first(weight),
            down.to(dtype),
            up.to(dtype),
            scale * config_.scaling),
        flat_magnitude().to(dtype));
    return is_transposed() ? value.t() : value.reshape(weight.sizes());
  }

  std::optional<at::ScalarType> dtype() const override {
    return lora_A.scalar_type();
  }

  /// Embeddings take the value where they serve as a linear layer.
  bool has_linear() const override {
    return config_.layout == Layout::matrix ||
        config_.layout == Layout::transposed;
  }
  Tensor linear(
      const LinearCall& call,
      const Below<LinearCall>& below,
      double scale) const override {
    const double s = scale * config_.scaling;
    const auto& rows = call.rows;
    const bool by_rows = config_.layout == Layout::matrix;
    const int64_t height = by_rows ? lora_B.size(0) : lora_A.size(1);
    const bool whole = rows.begin == 0 && rows.end == height;
    TORCH_CHECK(
        whole || by_rows,
        "peft: rows ",
        rows.begin,
        " to ",
        rows.end,
        " of a weight [in, out] are used alone, and DoRA's norm runs over all ",
        height,
        "; take them from peft::effective(weight)");
    const auto used = [&](const Tensor& t) {
      return whole ? t : t.slice(0, rows.begin, rows.end);
    };
    const auto [A, up] = factors();
    const Tensor B = used(up), m = used(magnitude);
    const Tensor W = below.is_base ? call.weight : matrix_below(call, below);
    if (by_rows == call.transposed) { // the magnitudes lie along the inputs
      const auto dtype = c10::promoteTypes(W.scalar_type(), B.scalar_type());
      const Tensor V =
          functional::lora_merged(W.t().to(dtype), A.to(dtype), B.to(dtype), s);
      const Tensor value = functional::dora_weight(V, m.to(dtype));
      return at::linear(call.x, value.t().to(call.x.scalar_type()), call.bias);
    }
    // Dropout is for A, and what is taken off belongs to the base.
    const bool is_apart = offset_ && dropout_now() > 0.0;
    if (below.is_base && !is_apart) {
      const Tensor n = whole ? cache_.norm(W, A, B, s, lora_A, lora_B)
                             : fresh_norm(W, A, B, s);
      return functional::dora_linear(
          call.x,
          W,
          call.bias,
          A,
          B,
          m,
          n,
          s,
          dropout_now(),
          call.packed,
          call.transposed);
    }
    return functional::dora_composed(
        call.x,
        call.bias,
        m / fresh_norm(W, A, B, s),
        dropout_now(),
        [&](const Tensor& x, bool with_bias) {
          const std::optional<Tensor> bias =
              with_bias ? call.bias : std::nullopt;
          const Tensor y =
              below({x, like(call.weight, x), bias, rows, call.transposed});
          return is_apart
              ? (y -
                 functional::lora_linear_term(x, offset_.A, used(offset_.B), s))
                    .to(y.scalar_type())
              : y;
        },
        [&, &A = A](const Tensor& x) {
          return functional::lora_linear_term(
              x, is_apart ? lora_A : A, is_apart ? used(lora_B) : B, s);
        });
  }

  int64_t linear_cost() const override {
    return dropout_now() > 0.0
        ? 0
        : (lora_A.numel() + lora_B.numel()) * (offset_ ? 2 : 1) +
            magnitude.numel();
  }
  void visit_state(
      c10::function_ref<void(const Tensor&)> visit) const override {
    visit(lora_A);
    visit(lora_B);
    visit(magnitude);
    if (offset_) {
      visit(offset_.A);
      visit(offset_.B);
    }
  }

  bool has_embedding() const override {
    return config_.layout == Layout::embedding;
  }
  Tensor embedding(
      const EmbeddingCall& call,
      const Below<EmbeddingCall>& below,
      double scale) const override {
    const double s = scale * config_.scaling;
    const Tensor norm = below.is_base
        ? cache_.norm(call.weight.t(), lora_A, lora_B, s)
        : fresh_norm(matrix_below(call, below).t(), lora_A, lora_B, s);
    const Tensor y = below(call);
    const Tensor term = functional::lora_embedding_term(
        call.indices,
        lora_A,
        lora_B,
        s,
        call.padding_idx,
        call.scale_grad_by_freq,
        call.sparse);
    return ((y + term) * (magnitude / norm)).to(y.scalar_type());
  }

  bool has_convolution() const override {
    return config_.layout == Layout::convolution;
  }
  Tensor convolution(
      const ConvolutionCall& call,
      const Below<ConvolutionCall>& below,
      double scale) const override {
    const double s = scale * config_.scaling;
    const Tensor W = below.is_base ? call.weight : matrix_below(call, below);
    if (call.args.groups != 1) { // were unknown at attach
      const Tensor value = effective(W.to(at::result_type(W, lora_A)), scale);
      return functional::convolution(
          call.x, like(value, call.x), call.bias, call.args);
    }
    const auto [down, up] = factors();
    const Tensor norm = below.is_base
        ? cache_.norm(outputs_first(W), down, up, s)
        : fresh_norm(outputs_first(W), down, up, s);
    // [out, 1, ...]: one factor and one bias for each channel.
    std::vector<int64_t> channel(W.dim() - 1, 1);
    channel[0] = W.size(0);
    return functional::dora_composed(
        call.x,
        call.bias && call.bias->defined()
            ? std::optional<Tensor>(call.bias->reshape(channel))
            : std::nullopt,
        (flat_magnitude() / norm).reshape(channel),
        dropout_now(),
        [&](const Tensor& x, bool with_bias) {
          const std::optional<Tensor> bias =
              with_bias ? call.bias : std::nullopt;
          return below({x, like(call.weight, x), bias, call.args});
        },
        [&](const Tensor& x) {
          return functional::lora_convolution_term(
              x, lora_A, lora_B, s, call.args, /*A_groups=*/1);
        });
  }

  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    const bool table = config_.layout == Layout::embedding;
    return {
        {table ? "lora_embedding_A" : "lora_A.weight", lora_A},
        {table ? "lora_embedding_B" : "lora_B.weight", lora_B},
        {"lora_magnitude_vector", magnitude}};
  }
  std::vector<std::pair<std::string, Tensor>> training_tensors()
      const override {
    return offset_.file_tensors();
  }

  std::string take(const Delta& other, bool may_grow, bool dry_run) override {
    const auto* from = dynamic_cast<const DoraDelta*>(&other);
    if (from == nullptr || from->config_.layout != config_.layout ||
        from->magnitude.sizes() != magnitude.sizes()) {
      return "it is a '" + other.describe() + "' of another form";
    }
    const auto apart = offset_.misfit(from->offset_);
    if (!apart.empty()) {
      return apart;
    }
    const auto misfit = detail::take_factors(
        lora_A,
        lora_B,
        from->lora_A,
        from->lora_B,
        /*groups=*/1,
        may_grow,
        dry_run);
    if (misfit.empty() && !dry_run) {
      torch::NoGradGuard no_grad;
      magnitude.copy_(from->magnitude);
      offset_.take(from->offset_);
      config_ = from->config_;
    }
    return misfit;
  }

  std::shared_ptr<Delta> copy() const override {
    const auto twin = [](const Tensor& t) {
      return t.detach().clone().set_requires_grad(t.requires_grad());
    };
    auto result = std::make_shared<DoraDelta>(
        twin(lora_A), twin(lora_B), twin(magnitude), config_);
    if (offset_) {
      result->take_off(offset_.A.clone(), offset_.B.clone());
    }
    result->train(is_training());
    return result;
  }

  std::string mask_obstacle() const override {
    return offset_.mask_obstacle();
  }

  std::string describe() const override {
    return "dora r=" + std::to_string(r());
  }

  Tensor lora_A, lora_B;
  /// [out], and [1, out, 1...] at a convolution, as in a file.
  Tensor magnitude;

 private:
  bool is_transposed() const {
    return config_.layout == Layout::transposed ||
        config_.layout == Layout::embedding;
  }
  /// The weight as a matrix [out, rest], and A and B as those of it.
  Tensor outputs_first(const Tensor& weight) const {
    return is_transposed()  ? weight.t()
        : weight.dim() == 2 ? weight
                            : weight.reshape({weight.size(0), -1});
  }
  /// A and B as matrices, of twice the rank where something is taken off.
  std::pair<Tensor, Tensor> factors() const {
    if (offset_) {
      return offset_.under(lora_A, lora_B);
    }
    const auto matrix = [](const Tensor& t) {
      return t.dim() == 2 ? t : t.reshape({t.size(0), -1});
    };
    return {matrix(lora_A), matrix(lora_B)};
  }
  Tensor flat_magnitude() const {
    return magnitude.reshape({-1});
  }
  double dropout_now() const {
    return is_training() ? config_.dropout : 0.0;
  }
  static Tensor like(const Tensor& weight, const Tensor& x) {
    return weight.to(x.scalar_type());
  }
  static Tensor
  fresh_norm(const Tensor& W, const Tensor& A, const Tensor& B, double scale) {
    return functional::dora_norm(
        W, functional::row_squares(W, A.scalar_type()), A, B, scale);
  }

  // What stands below is read off as a weight: the norm needs all of it. (A
  // dropout that is active down there acts on this reading too.)
  static Tensor matrix_below(
      const LinearCall& call,
      const Below<LinearCall>& below) {
    const at::NoGradGuard no_grad;
    const Tensor every = at::eye(call.weight.size(1), call.weight.options());
    return below({every, call.weight, std::nullopt, call.rows, call.transposed})
        .t();
  }
  static Tensor matrix_below(
      const EmbeddingCall& call,
      const Below<EmbeddingCall>& below) {
    const at::NoGradGuard no_grad;
    return below(
        {call.weight, at::arange(call.weight.size(0), call.indices.options())});
  }
  static Tensor matrix_below(
      const ConvolutionCall& call,
      const Below<ConvolutionCall>& below) {
    const at::NoGradGuard no_grad;
    const auto& W = call.weight;
    auto sizes = W.sizes().vec();
    const int64_t inputs = W.numel() / std::max<int64_t>(1, W.size(0));
    sizes[0] = inputs;
    const std::vector<int64_t> one(W.dim() - 2, 1), zero(W.dim() - 2, 0);
    const Tensor impulses = at::eye(inputs, W.options()).reshape(sizes);
    return below({impulses, W, std::nullopt, {one, zero, one, 1, {}}})
        .reshape({inputs, W.size(0)})
        .t()
        .reshape(W.sizes());
  }

  LoraDelta::Config config_;
  detail::LoraOffset offset_;
  mutable detail::DoraNormCache cache_;
};

namespace detail {

/// A DoraDelta for `weight`, whose norm is that of what it now is with the
/// adapters that it carries. `name` is for messages.
inline std::shared_ptr<DoraDelta> make_dora_delta(
    const LoraOptions& options,
    const Tensor& weight,
    LoraLayout layout,
    LoraScale scale,
    const std::string& name,
    int64_t groups = 1) {
  const bool fits = layout == LoraLayout::transposed ||
      layout == LoraLayout::embedding ||
      (layout == LoraLayout::convolution && groups == 1) ||
      (layout == LoraLayout::matrix && weight.dim() == 2);
  TORCH_CHECK_VALUE(
      fits,
      "peft: DoRA is defined for matrices, embeddings and convolutions without "
      "groups, and '",
      name,
      "' is ",
      groups > 1 ? "a convolution with groups" : "none of them",
      "; leave it out of the targets or switch dora off");
  const auto lora = make_lora_delta(options, weight, layout, scale, name);
  c10::InferenceMode off(false);
  std::vector<int64_t> sizes{lora->lora_B.size(0)};
  if (layout == LoraLayout::convolution) { // as in HF's files
    sizes.assign(weight.dim(), 1);
    sizes[1] = weight.size(0);
  }
  const Tensor ones = at::ones(sizes, lora->lora_A.options());
  auto delta = std::make_shared<DoraDelta>(
      lora->lora_A, lora->lora_B, ones.set_requires_grad(true), lora->config());
  if (lora->offset()) {
    delta->take_off(lora->offset().A, lora->offset().B);
  }
  if (options.init() != "empty") {
    const at::NoGradGuard no_grad;
    delta->match(effective(weight));
  }
  return delta;
}

} // namespace detail

} // namespace peft
