#pragma once

#include <peft/core/fold.h>
#include <peft/functional/layers.h>
#include <peft/functional/lora.h>
#include <peft/methods/explicit_layer.h>
#include <peft/methods/lora/init.h>

#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>

#include <memory>
#include <vector>

namespace peft {

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
    TORCH_CHECK_VALUE(
        !options.dora() && !options.lora_bias() && !options.fan_in_fan_out() &&
            options.bias() == "none" && options.modules_to_save().empty() &&
            options.enable_lora().empty() &&
            detail::variant_of(options).empty() &&
            !detail::starts_as_part(options.init()),
        "peft: an explicit layer takes no dora, lora_bias, fan_in_fan_out, "
        "bias, modules_to_save, enable_lora, variant or init 'pissa' or "
        "'olora'; "
        "attach() does");
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
    this->freeze_base();
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
    const LoraDelta own = own_delta();
    if (own.fold_into(weight, 1.0, /*dry_run=*/true)) {
      own.fold_into(weight, 1.0, /*dry_run=*/false);
      return;
    }
    detail::ActiveEntries entries;
    entries.push_back({&own, 1.0});
    weight.copy_(detail::folded(entries, weight));
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
