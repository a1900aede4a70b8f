#pragma once

// How A and B of LoRA start, as HF PEFT starts them. With ΔW = s · B A:
//
//   gaussian, kaiming   A random, B = 0
//   pissa               B A = 1/s · the r largest singular triplets of W,
//                       A = √(S/s) Vᵀ, B = U √(S/s)   (Meng et al. 2024,
//                       arXiv:2404.02948)
//   pissa_niter_<k>     the same by a random subspace and k iterations (Halko
//                       et al. 2009, arXiv:0909.4061), faster and near enough
//   olora               A and B are the first r rows of R and columns of Q,
//                       W = Q R   (Büyükakyüz 2024, arXiv:2406.01775)
//   orthogonal          random, and B A = 0: the rows that A takes of a random
//                       rotation are orthogonal to those that B takes
//
// PiSSA and OLoRA start inside the weight, which is to go on without that part
// (methods/lora/offset.h): the network starts as it was, to the bit. All of
// them draw what Python draws after the same seed; HF computes in float32, and
// so does this, save for a base in float64.

#include <peft/core/merge.h>
#include <peft/methods/lora/delta.h>
#include <peft/methods/lora/options.h>

#include <c10/core/InferenceMode.h>
#include <torch/nn/init.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace peft {

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

/// U, S and Vᵀ of the q largest singular values of `matrix`, nearly:
/// torch.svd_lowrank, number by number.
inline std::tuple<Tensor, Tensor, Tensor>
svd_lowrank(const Tensor& matrix, int64_t q, int64_t iterations) {
  const bool is_wide = matrix.size(0) < matrix.size(1);
  const Tensor tall = is_wide ? matrix.t() : matrix;
  const auto basis = [](const Tensor& columns) {
    return std::get<0>(at::linalg_qr(columns));
  };
  Tensor Q =
      basis(at::matmul(tall, torch::randn({tall.size(1), q}, tall.options())));
  for (int64_t i = 0; i < iterations; ++i) {
    Q = basis(at::matmul(tall, basis(at::matmul(tall.t(), Q))));
  }
  auto [U, S, Vh] =
      at::linalg_svd(at::matmul(Q.t(), tall), /*full_matrices=*/false);
  U = at::matmul(Q, U);
  return is_wide ? std::make_tuple(Vh.t(), S, U.t())
                 : std::make_tuple(U, S, Vh);
}

/// A and B of PiSSA for W [out, in].
inline std::pair<Tensor, Tensor>
pissa_init(const std::string& init, const Tensor& W, LoraScale scale) {
  TORCH_CHECK_VALUE(
      scale.scaling > 0.0,
      "peft: init '",
      init,
      "' takes the root of S / s and needs a positive scaling, got s = ",
      scale.scaling);
  const std::string prefix = "pissa_niter_";
  const auto [U, S, Vh] = init.rfind(prefix, 0) == 0
      ? svd_lowrank(W, scale.r, std::stoll(init.substr(prefix.size())))
      : at::linalg_svd(W, /*full_matrices=*/false);
  const Tensor root = (S.slice(0, 0, scale.r) / scale.scaling).sqrt();
  return {
      (root.unsqueeze(1) * Vh.slice(0, 0, scale.r)).contiguous(),
      (U.slice(1, 0, scale.r) * root).contiguous()};
}

/// A and B of OLoRA for W [out, in].
inline std::pair<Tensor, Tensor> olora_init(const Tensor& W, int64_t r) {
  const auto [Q, R] = at::linalg_qr(W);
  return {R.slice(0, 0, r).contiguous(), Q.slice(1, 0, r).contiguous()};
}

/// Random A [r, in] and B [out, r] with B A = 0, in float32.
inline std::pair<Tensor, Tensor>
orthogonal_init(int64_t r, int64_t in, int64_t out, const std::string& name) {
  TORCH_CHECK_VALUE(
      r % 2 == 0,
      "peft: init 'orthogonal' halves the rank, which must be even; at '",
      name,
      "' r is ",
      r);
  const Tensor Q = std::get<0>(at::linalg_qr(torch::randn({r, r})));
  const Tensor for_A = Q.slice(0, 0, r, 2), for_B = Q.slice(0, 1, r, 2);
  const Tensor A = at::mm(torch::randn({in, r / 2}), for_A).t() / 10.0;
  const Tensor B = at::mm(torch::randn({r / 2, out}).t(), for_B) / 10.0;
  return {A.contiguous(), B.contiguous()};
}

/// What a start may be made of: the weight without what is merged into it.
inline Tensor weight_at_start(const Tensor& weight) {
  const auto* tag = tag_of(weight);
  return (tag == nullptr ? weight : unmerged_base(*tag->site, weight)).detach();
}

/// A and B of the starts that are for matrices. Of lower rank than r where the
/// weight is: HF's files have them so.
inline std::pair<Tensor, Tensor> matrix_init(
    const std::string& init,
    const Tensor& weight,
    LoraLayout layout,
    LoraScale scale,
    const std::string& name) {
  const bool is_transposed = layout == LoraLayout::transposed;
  TORCH_CHECK_VALUE(
      weight.dim() == 2 && (layout == LoraLayout::matrix || is_transposed),
      "peft: init '",
      init,
      "' is for matrices, and '",
      name,
      "' is ",
      layout == LoraLayout::convolution ? "a convolution's" : "none",
      " (HF PEFT refuses it too); leave it out of the targets, or take init "
      "'kaiming'");
  TORCH_CHECK_VALUE(
      init != "olora" || !is_transposed,
      "peft: init 'olora' is for weights [out, in], and '",
      name,
      "' lies as [in, out]. HF PEFT decomposes it without turning it, so that "
      "its file would mean another function here; take 'pissa'");
  torch::NoGradGuard no_grad;
  const Tensor own = weight_at_start(weight);
  const Tensor W = is_transposed ? own.t() : own;
  if (init == "orthogonal") {
    return orthogonal_init(scale.r, W.size(1), W.size(0), name);
  }
  const Tensor wide = W.to(adapter_dtype(W));
  return init == "olora" ? olora_init(wide, scale.r)
                         : pissa_init(init, wide, scale);
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
          count > 0,
          "peft: enable_lora switches every block of '",
          name,
          "' off");
      A_sizes = {r * count, weight.size(1)};
      B_sizes = {weight.size(0) / 3 * count, r};
      break;
    }
  }
  auto start = lora_init(options, A_sizes, B_sizes, layout, r);
  const bool is_part = starts_as_part(options.init());
  const bool by_matrix = (is_part || options.init() == "orthogonal") &&
      layout != LoraLayout::embedding; // whose start HF leaves as it is
  if (by_matrix) {
    start = matrix_init(options.init(), weight, layout, scale, name);
  }
  const auto where =
      torch::TensorOptions(weight.device()).dtype(adapter_dtype(weight));
  // HF makes them in the base's dtype first, which rounds. It rounds a part of
  // the weight too, which then is no longer what is taken off; not so here.
  const auto drawn = [&](const Tensor& t) {
    return (is_part && by_matrix ? t : t.to(weight.scalar_type())).to(where);
  };
  const Tensor A = drawn(start.first), B = drawn(start.second);
  auto delta = std::make_shared<LoraDelta>(
      A.set_requires_grad(true), B.set_requires_grad(true), config);
  if (by_matrix && is_part) {
    delta->take_off(A.detach().clone(), B.detach().clone());
  }
  return delta;
}

} // namespace detail

} // namespace peft
