#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string_view>

namespace peft {

namespace functional {

/// How a convolution slides; `padding_mode` is "same" or "valid" where the
/// padding was given as a word, and empty otherwise.
struct ConvolutionArgs {
  at::IntArrayRef stride;
  at::IntArrayRef padding;
  at::IntArrayRef dilation;
  int64_t groups = 1;
  std::string_view padding_mode = {};
};

/// conv1d, conv2d or conv3d, by the rank of `weight` [out, in / groups, k...].
inline at::Tensor convolution(
    const at::Tensor& x,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    const ConvolutionArgs& args) {
  auto run = [&](auto padding) {
    switch (weight.dim()) {
      case 3:
        return at::conv1d(
            x, weight, bias, args.stride, padding, args.dilation, args.groups);
      case 4:
        return at::conv2d(
            x, weight, bias, args.stride, padding, args.dilation, args.groups);
      default:
        return at::conv3d(
            x, weight, bias, args.stride, padding, args.dilation, args.groups);
    }
  };
  return args.padding_mode.empty() ? run(args.padding) : run(args.padding_mode);
}

} // namespace functional

} // namespace peft
