#pragma once

// LoRA's linear map as one node of the autograd graph (Hu et al. 2021,
// arXiv:2106.09685, eq. 3), n rows x [n, in], rank r:
//
//   t  = D(x) Aᵀ                     y  = b + s · t Bᵀ + x Wᵀ
//   dt = s · dy B                    dx = D(dt A) + dy W
//   dA = dtᵀ D(x)                    dB = s · dyᵀ t
//
// D is dropout, whose mask both passes make anew from a counter. The results
// start as the low-rank term and the big product is added on top, so that the
// term costs one write where a bias costs one anyway. Kept for backward: x and
// t. What nobody asks for is neither computed nor kept.

#include <peft/functional/counter_dropout.h>
#include <peft/functional/packed_matrix.h>
#include <peft/functional/skinny_products.h>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/types.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace peft {

namespace functional {

using torch::Tensor;

namespace detail {

/// The linear map that LoRA is added to, and what belongs to the call.
struct LoraArgs {
  std::optional<Tensor> bias;
  double scale = 1.0;
  CounterDropout dropout{};
  std::shared_ptr<const PackedMatrix> packed = nullptr;
  bool transposed = false; // `packed` is of the weight's transpose
  Tensor BT{}; // the transpose of B, where the caller has it

  bool has_bias() const {
    return bias.has_value() && bias->defined();
  }
  /// `x2` times the weight (backward: its transpose) by the packed form.
  bool packs(const Tensor& x2) const {
    return packed && x2.scalar_type() == at::kFloat &&
        packed->serves(x2.size(0));
  }
};

/// What forward makes.
struct LoraResult {
  Tensor y;
  Tensor t; // [n, r]
  double t_scale = 1.0; // what t lacks of s
  bool by_kernels = false;
};

/// Set by tests: torch's own mask in the place of the counter's, so that a seed
/// gives what it gives in Python.
inline bool torch_dropout = false;

/// y2 [n, m] = bias + D(t BT) + x2 M, M [k, m]: forward's result and dx alike.
/// `backward` says which way the packed form is used.
inline void start_and_multiply(
    Tensor y2,
    const Tensor& t,
    const float* BT,
    const Tensor& bias,
    const Tensor& x2,
    const Tensor& M,
    const LoraArgs& args,
    bool backward) {
  const CounterDropout none{};
  const CounterDropout& dropout = backward ? args.dropout : none;
  if (args.packs(x2)) {
    const bool apart = dropout.active(); // else it rides in the product
    args.packed->multiply(
        x2,
        y2,
        backward != args.transposed,
        bias,
        apart ? nullptr : t.const_data_ptr<float>(),
        apart ? nullptr : BT,
        apart ? 0 : t.size(1));
    if (apart) {
      expand(y2, t, BT, {}, /*accumulate=*/true, dropout);
    }
    return;
  }
  if (y2.scalar_type() == at::kFloat) {
    const bool dense = !bias.defined() || bias.is_contiguous();
    expand(y2, t, BT, dense ? bias : bias.contiguous(), false, dropout);
    y2.addmm_(x2, M);
    return;
  }
  // bfloat16: the base's result rounded, then the sum rounded, as in PEFT.
  if (bias.defined()) {
    at::addmm_out(y2, bias, x2, M);
  } else {
    at::mm_out(y2, x2, M);
  }
  expand(y2, t, BT, {}, /*accumulate=*/true, dropout);
}

inline c10::SmallVector<int64_t, 5> output_sizes(
    const Tensor& x,
    int64_t features) {
  c10::SmallVector<int64_t, 5> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = features;
  return sizes;
}

/// The forward pass. Runs below autograd.
inline LoraResult lora_forward(
    const Tensor& x,
    const Tensor& weight,
    const Tensor& A,
    const Tensor& B,
    const LoraArgs& args) {
  LoraResult result;
  if (by_kernels(x, A, B)) {
    const Tensor x2 = as_rows(x);
    const float* BT = args.BT.defined() ? args.BT.const_data_ptr<float>()
                                        : transposed_for_now(B);
    result.by_kernels = true;
    result.t = project(x2, A, args.scale, args.dropout);
    result.y = at::empty(output_sizes(x, B.size(0)), x.options());
    start_and_multiply(
        as_matrix(result.y),
        result.t,
        BT,
        args.bias.value_or(Tensor()),
        x2,
        weight.t(),
        args,
        /*backward=*/false);
    return result;
  }
  const Tensor x2 = as_matrix(x);
  const auto dtype = A.scalar_type(); // float32 beside a half-precision base
  Tensor kept = x2.to(dtype);
  if (args.dropout.active()) {
    kept = kept *
        dropout_mask(args.dropout, x2.size(0), x2.size(1), kept.options());
  }
  result.t = at::mm(kept, A.t());
  result.t_scale = args.scale;
  Tensor y2;
  if (args.packs(x2)) {
    y2 = at::empty({x2.size(0), B.size(0)}, x2.options());
    args.packed->multiply(
        x2.stride(1) == 1 ? x2 : x2.contiguous(),
        y2,
        args.transposed,
        args.bias.value_or(Tensor()),
        nullptr,
        nullptr,
        0);
  } else {
    y2 = args.has_bias() ? at::addmm(*args.bias, x2, weight.t())
                         : at::mm(x2, weight.t());
  }
  if (y2.scalar_type() == dtype) {
    y2.addmm_(result.t, B.t(), 1.0, args.scale);
  } else { // the sum in float32, rounded once
    y2.add_(at::mm(result.t, B.t()), args.scale);
  }
  if (x.dim() != 2) {
    y2 = at::_unsafe_view(y2, output_sizes(x, B.size(0)));
  }
  result.y = y2;
  return result;
}

/// What backward needs beside the saved tensors.
struct LoraCall {
  LoraArgs args; // without the bias
  double t_scale = 1.0;
  bool by_kernels = false;
  std::vector<int64_t> x_sizes;
};

struct LoraGrads {
  Tensor x, weight, bias, A, B;
};
struct LoraWants {
  bool x, weight, bias, A, B;
};

/// The backward pass by the kernels.
inline LoraGrads lora_backward_by_kernels(
    const Tensor& x,
    const Tensor& weight,
    const Tensor& A,
    const Tensor& B,
    const Tensor& t,
    const Tensor& grad,
    const Tensor& grad_of_t,
    const LoraCall& call,
    const LoraWants& wants) {
  const LoraArgs& args = call.args;
  const Tensor dy = as_rows(grad);
  const int64_t n = dy.size(0), out = dy.size(1), r = A.size(0);
  LoraGrads grads;
  Tensor dt;
  // dBᵀ is summed in memory of the thread's own: only dB is handed out.
  float* dBT = wants.B ? cpu::detail::scratch<3>(r * out) : nullptr;
  const float* BT = nullptr;
  if (wants.x || wants.A) {
    dt = at::empty({n, r}, A.options());
    BT = transposed_for_now(B);
  }
  with_element_of(dy, [&](auto element) {
    using T = decltype(element);
    const T* from = dy.const_data_ptr<T>();
    const auto scale = static_cast<float>(args.scale);
    const auto ld = dy.stride(0);
    if (dt.defined() && wants.B) {
      cpu::project_and_outer<T>(
          from,
          ld,
          BT,
          t.const_data_ptr<float>(),
          dt.mutable_data_ptr<float>(),
          dBT,
          n,
          out,
          r,
          scale);
    } else if (wants.B) {
      cpu::outer<T>(from, ld, t.const_data_ptr<float>(), dBT, n, out, r);
    } else {
      cpu::project<T>(
          from, ld, BT, dt.mutable_data_ptr<float>(), n, out, r, scale);
    }
  });
  if (grad_of_t.defined() && dt.defined()) {
    dt.add_(grad_of_t, args.scale / call.t_scale);
  }
  if (wants.B) { // t holds s
    grads.B = at::empty({out, r}, A.options());
    cpu::transpose(dBT, grads.B.mutable_data_ptr<float>(), r, out);
  }
  if (wants.A) {
    grads.A = outer(as_rows(x), dt, args.dropout);
  }
  if (wants.x) {
    grads.x = at::empty(call.x_sizes, dy.options());
    start_and_multiply(
        as_matrix(grads.x),
        dt,
        A.const_data_ptr<float>(),
        {},
        dy,
        weight,
        args,
        /*backward=*/true);
  }
  return grads;
}

/// The backward pass by torch operators; differentiable when autograd is on,
/// and then t is made anew from x, as a saved one is a constant (or, where x is
/// not kept, an output of the node).
inline LoraGrads lora_backward_by_operators(
    const Tensor& x,
    const Tensor& weight,
    const Tensor& A,
    const Tensor& B,
    const Tensor& saved_t,
    const Tensor& grad,
    const Tensor& grad_of_t,
    const LoraCall& call,
    const LoraWants& wants) {
  const LoraArgs& args = call.args;
  const bool again = at::GradMode::is_enabled();
  const auto dtype = A.scalar_type(); // float32 beside a bfloat16 base
  const Tensor dy = as_matrix(grad), dy_ = dy.to(dtype);
  Tensor mask, kept; // D(x)
  if (args.dropout.active() && (wants.x || wants.A || again)) {
    mask = dropout_mask(
        args.dropout, dy.size(0), A.size(1), dy.options().dtype(dtype));
  }
  if (x.defined()) {
    kept = as_matrix(x).to(dtype);
    if (mask.defined()) {
      kept = kept * mask;
    }
  }
  LoraGrads grads;
  Tensor dt;
  if (wants.x || wants.A) {
    dt = at::mm(dy_, B).mul(args.scale);
    if (grad_of_t.defined()) {
      dt = at::add(dt, grad_of_t, args.scale / call.t_scale);
    }
  }
  if (wants.x) {
    if (again || mask.defined() || dy.scalar_type() != dtype) {
      Tensor term = at::mm(dt, A);
      term = mask.defined() ? term * mask : term;
      grads.x = (at::mm(dy, weight) + term).to(dy.scalar_type());
    } else {
      grads.x = at::mm(dy, weight).addmm_(dt, A);
    }
    grads.x = grads.x.reshape(call.x_sizes);
  }
  if (wants.A) {
    grads.A = at::mm(dt.t(), kept);
  }
  if (wants.B) {
    // dBᵀ = tᵀ dy: the fast orientation.
    const bool anew = again && x.defined();
    const Tensor t = anew ? at::mm(kept, A.t()) : saved_t;
    grads.B = at::mm(t.t(), dy_).mul(anew ? args.scale : call.t_scale).t();
  }
  return grads;
}

/// Results: y and, where x is not kept but t depends on it, t, so that second
/// derivatives reach x through it.
struct LoraBackward : torch::autograd::Node {
  using SavedVariable = torch::autograd::SavedVariable;

  torch::autograd::variable_list apply(
      torch::autograd::variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const Tensor x = x_.unpack(), A = A_.unpack(), B = B_.unpack();
    const Tensor t = t_.unpack(getptr());
    const Tensor weight =
        plain_weight.defined() ? plain_weight : weight_.unpack();
    const LoraWants wants{
        should_compute_output(0),
        should_compute_output(1),
        should_compute_output(2),
        should_compute_output(3),
        should_compute_output(4)};
    const bool again = at::GradMode::is_enabled();
    std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
    if (!again) {
      guard.emplace();
    }
    Tensor dy = grads[0];
    const Tensor grad_of_t = grads.size() > 1 ? grads[1] : Tensor();
    if (!dy.defined()) {
      if (!grad_of_t.defined()) {
        return torch::autograd::variable_list(5);
      }
      auto sizes = call.x_sizes; // only t was used
      sizes.back() = B.size(0);
      dy = at::zeros({1}, weight.options()).expand(sizes);
    }
    LoraGrads result;
    if (wants.x || wants.A || wants.B) {
      result = call.by_kernels && !again && is_readable(dy)
          ? lora_backward_by_kernels(
                x, weight, A, B, t, dy, grad_of_t, call, wants)
          : lora_backward_by_operators(
                x, weight, A, B, t, dy, grad_of_t, call, wants);
    }
    if (wants.weight) {
      result.weight = at::mm(as_matrix(dy).t(), as_matrix(x));
    }
    if (wants.bias) {
      result.bias = as_matrix(dy).sum(0);
    }
    return {result.x, result.weight, result.bias, result.A, result.B};
  }

  std::string name() const override {
    return "LoraBackward";
  }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto* saved : {&x_, &weight_, &A_, &B_, &t_}) {
      saved->reset_data();
    }
  }

  SavedVariable x_, weight_, A_, B_, t_;
  Tensor plain_weight; // an inference tensor, which cannot be saved
  LoraCall call;
};

/// A node as LibTorch counts them: with std::shared_ptr, and in later versions
/// within the node.
template <class N>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, N>) {
    return c10::make_intrusive<N>();
  } else {
    return std::shared_ptr<N>(new N(), [](auto* node) { deleteNode(node); });
  }
}

/// The forward pass with its node in the graph.
inline Tensor fused_lora(
    const Tensor& x,
    const Tensor& weight,
    const Tensor& A,
    const Tensor& B,
    LoraArgs args) {
  using torch::autograd::SavedVariable;
  const auto node = make_node<LoraBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(
      x, weight, args.bias.value_or(Tensor()), A, B));
  LoraResult result;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    result = lora_forward(x, weight, A, B, args);
  }
  torch::autograd::set_history(result.y, node);
  const bool keeps_x = A.requires_grad() || weight.requires_grad();
  const bool keeps_t = B.requires_grad();
  const bool gives_t = !keeps_x && keeps_t && x.requires_grad();
  if (gives_t) {
    torch::autograd::set_history(result.t, node);
  }
  if (keeps_x) {
    node->x_ = SavedVariable(x, /*is_output=*/false);
  }
  if (weight.is_inference()) {
    node->plain_weight = weight;
  } else {
    node->weight_ = SavedVariable(weight, false);
  }
  node->A_ = SavedVariable(A, false);
  node->B_ = SavedVariable(B, false);
  if (keeps_t) {
    node->t_ = SavedVariable(result.t, /*is_output=*/gives_t);
  }
  node->call.t_scale = result.t_scale;
  node->call.by_kernels = result.by_kernels;
  node->call.x_sizes = x.sizes().vec();
  node->call.args = std::move(args);
  node->call.args.bias.reset();
  return result.y;
}

} // namespace detail

} // namespace functional

} // namespace peft
