#pragma once

// The forward of torch::nn layers with other parameters in the place of their
// own, operator by operator as LibTorch runs it. The explicit layers use it.

#include <peft/functional/convolution.h>

#include <torch/nn/functional/padding.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>

#include <algorithm>
#include <optional>
#include <variant>
#include <vector>

namespace peft {

namespace functional {

using torch::Tensor;

inline std::optional<Tensor> optional(const Tensor& t) {
  return t.defined() ? std::optional<Tensor>(t) : std::nullopt;
}

/// How a torch::nn convolution slides, and its input padded where the padding
/// mode is not zeros. Valid while the layer lives.
template <size_t D>
struct PaddedInput {
  Tensor x;
  ConvolutionArgs args;
  std::vector<int64_t> none = std::vector<int64_t>(D, 0);

  template <class Options>
  PaddedInput(const Options& options, const Tensor& input) : x(input) {
    args.stride = at::IntArrayRef(*options.stride());
    args.dilation = at::IntArrayRef(*options.dilation());
    args.groups = options.groups();
    args.padding = none;
    const auto& padding = options.padding();
    const bool same = std::holds_alternative<torch::enumtype::kSame>(padding);
    const bool given =
        std::holds_alternative<torch::ExpandingArray<D>>(padding);
    if (std::holds_alternative<torch::enumtype::kZeros>(
            options.padding_mode())) {
      if (same) {
        args.padding_mode = "same";
      } else if (given) {
        args.padding =
            at::IntArrayRef(*std::get<torch::ExpandingArray<D>>(padding));
      }
      return;
    }
    // Last dimension first, left and right. LibTorch lists "same" in forward
    // order, and this is LibTorch's forward.
    std::vector<int64_t> pads;
    for (size_t n = 0; n < D; ++n) {
      const size_t i = same ? n : D - 1 - n;
      int64_t left = 0, right = 0;
      if (same) {
        const int64_t total =
            (*options.dilation())[i] * ((*options.kernel_size())[i] - 1);
        left = total / 2;
        right = total - left;
      } else if (given) {
        left = right = (*std::get<torch::ExpandingArray<D>>(padding))[i];
      }
      pads.insert(pads.end(), {left, right});
    }
    namespace F = torch::nn::functional;
    F::PadFuncOptions how(pads);
    if (std::holds_alternative<torch::enumtype::kReflect>(
            options.padding_mode())) {
      how.mode(torch::kReflect);
    } else if (std::holds_alternative<torch::enumtype::kReplicate>(
                   options.padding_mode())) {
      how.mode(torch::kReplicate);
    } else {
      how.mode(torch::kCircular);
    }
    x = F::pad(input, how);
  }
  PaddedInput(const PaddedInput&) = delete;
  PaddedInput& operator=(const PaddedInput&) = delete;
};

/// Linear: x [*, in] → [*, out]. As torch::nn::functional::linear, which adds
/// the bias afterwards unless x is a matrix.
inline Tensor forward_with(
    const torch::nn::LinearImpl& /*layer*/,
    const Tensor& x,
    const Tensor& weight,
    const Tensor& bias) {
  if (x.dim() == 2 && bias.defined()) {
    return torch::addmm(bias, x, weight.t());
  }
  Tensor y = x.matmul(weight.t());
  return bias.defined() ? y.add_(bias) : y;
}

inline Tensor forward_with(
    const torch::nn::LayerNormImpl& layer,
    const Tensor& x,
    const Tensor& weight,
    const Tensor& bias) {
  return torch::layer_norm(
      x, layer.options.normalized_shape(), weight, bias, layer.options.eps());
}

inline Tensor forward_with(
    const torch::nn::GroupNormImpl& layer,
    const Tensor& x,
    const Tensor& weight,
    const Tensor& bias) {
  return torch::group_norm(
      x, layer.options.num_groups(), weight, bias, layer.options.eps());
}

template <size_t D, class Derived>
Tensor forward_with(
    const torch::nn::ConvNdImpl<D, Derived>& layer,
    const Tensor& x,
    const Tensor& weight,
    const Tensor& bias) {
  const PaddedInput<D> input(layer.options, x);
  return convolution(input.x, weight, optional(bias), input.args);
}

} // namespace functional

} // namespace peft
