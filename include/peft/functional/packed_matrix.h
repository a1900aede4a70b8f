#pragma once

// A frozen matrix in the order in which the CPU kernels read it. W never
// changes while an adapter trains, so it may be packed once: y = x Wᵀ and
// dx = dy W then run faster than on the matrix as it lies, at the price of two
// more copies of W.

#include <peft/functional/cpu/packed_gemm.h>

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace peft {

namespace functional {

/// W [rows, columns], packed for products with Wᵀ (forward) and W (backward).
class PackedMatrix {
 public:
  /// `w` is a float32 matrix on the CPU, with any strides; an error otherwise.
  explicit PackedMatrix(const at::Tensor& w)
      : storage_(checked(w).storage().getWeakStorageImpl()),
        data_(w.const_data_ptr()),
        version_(version_of(w)),
        sizes_(w.sizes().vec()),
        strides_(w.strides().vec()),
        forward_(w.detach()),
        backward_(w.detach().t()) {}

  /// Whether `w`, W or its transpose as a whole, is still what was packed: the
  /// same memory, not written to since. (Inference tensors count no writes, and
  /// no tensor counts those through data().)
  bool is_of(const at::Tensor& w) const {
    if (w.dim() != 2 || !w.has_storage() ||
        w.storage().unsafeGetStorageImpl() != storage_._unsafe_get_target() ||
        w.const_data_ptr() != data_ || version_of(w) != version_ ||
        w.scalar_type() != at::kFloat) {
      return false;
    }
    const auto lies = [&](size_t i, size_t j) {
      return w.size(0) == sizes_[i] && w.size(1) == sizes_[j] &&
          w.stride(0) == strides_[i] && w.stride(1) == strides_[j];
    };
    return lies(0, 1) || lies(1, 0);
  }

  /// Bytes of the two copies: each with its rows filled up to a multiple of 16.
  int64_t nbytes() const {
    return forward_.nbytes() + backward_.nbytes();
  }

  /// Whether n rows are faster this way than by at::linear. One row only reads
  /// the matrix, and a large one is better read where both passes find it;
  /// without wide vectors the library's product wins for many rows.
  bool serves(int64_t n) const {
    return forward_.is_wide() && n > 0 &&
        (n > 1 || sizes_[0] * sizes_[1] <= kOneRow);
  }

  /// y2 = bias + t UT + x2 Wᵀ, or with `backward` x2 W. x2 [n, k] has unit
  /// column stride, y2 [n, out] dense rows, which are overwritten; `bias` [out]
  /// may be undefined, t [n, r] and UT [r, out] null where r = 0.
  void multiply(
      const at::Tensor& x2,
      const at::Tensor& y2,
      bool backward,
      const at::Tensor& bias,
      const float* t,
      const float* UT,
      int64_t r) const {
    const auto& panels = backward ? backward_ : forward_;
    const at::Tensor b = bias.defined() ? bias.contiguous() : bias;
    panels.multiply(
        x2.const_data_ptr<float>(),
        x2.stride(0),
        x2.size(0),
        y2.mutable_data_ptr<float>(),
        y2.stride(0),
        b.defined() ? b.const_data_ptr<float>() : nullptr,
        t,
        UT,
        r);
  }

  /// The features of a row of x, or with `backward` of y.
  int64_t columns(bool backward) const {
    return sizes_[backward ? 0 : 1];
  }

 private:
  /// Numbers in a matrix that serves a single row (measured on a CPU with 1 MB
  /// and 32 MB of cache).
  static constexpr int64_t kOneRow = 1 << 20;

  static const at::Tensor& checked(const at::Tensor& w) {
    TORCH_CHECK(
        w.defined() && w.dim() == 2 && w.numel() > 0,
        "peft: only a matrix can be packed, got ",
        w.defined() ? c10::str("a tensor of shape ", w.sizes())
                    : "an undefined tensor");
    TORCH_CHECK(
        w.is_cpu() && w.layout() == at::kStrided &&
            w.scalar_type() == at::kFloat && !w.is_neg(),
        "peft: only a dense float32 matrix on the CPU can be packed, got ",
        w.toString(),
        " on ",
        w.device());
    return w;
  }

  static int64_t version_of(const at::Tensor& w) {
    return w.is_inference()
        ? 0
        : w.unsafeGetTensorImpl()->version_counter().current_version();
  }

  /// Held weakly: its memory may go, but its place is not given to another.
  c10::weak_intrusive_ptr<c10::StorageImpl> storage_;
  const void* data_;
  int64_t version_;
  std::vector<int64_t> sizes_, strides_;
  cpu::Panels forward_, backward_;
};

namespace detail {

/// y = x Wᵀ + b, or with `backward` x W, where the caller has seen to x and b.
inline at::Tensor packed_product(
    const at::Tensor& x,
    const at::Tensor& bias,
    const PackedMatrix& packed,
    bool backward) {
  const int64_t in = packed.columns(backward);
  auto sizes = x.sizes().vec();
  sizes.back() = packed.columns(!backward);
  const at::Tensor y = at::empty(sizes, x.options());
  at::Tensor x2 = x.reshape({x.numel() / in, in});
  if (x2.stride(1) != 1) {
    x2 = x2.contiguous();
  }
  packed.multiply(
      x2,
      y.view({x2.size(0), sizes.back()}),
      backward,
      bias,
      nullptr,
      nullptr,
      0);
  return y;
}

/// The product with a gradient for x and the bias. It saves nothing: dx is the
/// product with the other packed form, and so on to any order.
struct PackedLinear : torch::autograd::Function<PackedLinear> {
  struct Node : torch::CustomClassHolder {
    std::shared_ptr<const PackedMatrix> packed;
    bool backward = false;
    bool has_bias = false;
  };

  static at::Tensor forward(
      torch::autograd::AutogradContext* ctx,
      const at::Tensor& x,
      const std::optional<at::Tensor>& bias,
      std::shared_ptr<const PackedMatrix> packed,
      bool backward) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto node = c10::make_intrusive<Node>();
    node->has_bias = bias.has_value() && bias->defined();
    const at::Tensor y = packed_product(
        x, node->has_bias ? *bias : at::Tensor(), *packed, backward);
    node->packed = std::move(packed);
    node->backward = backward;
    ctx->saved_data["node"] = at::IValue::make_capsule(std::move(node));
    return y;
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx,
      torch::autograd::variable_list grads) {
    const auto capsule = ctx->saved_data["node"].toCapsule();
    const auto& node = static_cast<const Node&>(*capsule);
    const at::Tensor& dy = grads[0];
    at::Tensor dx, db;
    if (ctx->needs_input_grad(0)) {
      if (at::GradMode::is_enabled()) {
        dx = PackedLinear::apply(
            dy, std::optional<at::Tensor>(), node.packed, !node.backward);
      } else {
        at::AutoDispatchBelowADInplaceOrView guard;
        dx = packed_product(dy, {}, *node.packed, !node.backward);
      }
    }
    if (node.has_bias && ctx->needs_input_grad(1)) {
      db = dy.sum_to_size({dy.size(-1)});
    }
    return {dx, db, {}, {}};
  }
};

/// A tensor on the CPU whose numbers can be read where they lie.
inline bool is_readable(const at::Tensor& t) {
  constexpr c10::DispatchKeySet special(
      {c10::DispatchKey::Negative,
       c10::DispatchKey::ZeroTensor,
       c10::DispatchKey::Python});
  return t.is_cpu() && t.layout() == at::kStrided &&
      !t.key_set().has_any(special);
}
inline bool is_plain_float(const at::Tensor& t) {
  return is_readable(t) && t.scalar_type() == at::kFloat &&
      !t._fw_grad(/*level=*/0).defined();
}

/// Whether operators mean what they say: no autocast, function transform or
/// tracer, which must see torch's own.
inline bool runs_plainly(at::DeviceType device = at::kCPU) {
  using c10::impl::tls_is_dispatch_key_included;
  return !at::autocast::is_autocast_enabled(device) &&
      !tls_is_dispatch_key_included(
          c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
      !tls_is_dispatch_key_included(c10::DispatchKey::Tracer);
}

} // namespace detail

/// y = x Mᵀ + b for a frozen M [out, in]: `weight`, which is the packed W or,
/// when `transposed`, its transpose. By the packed matrix where it is given,
/// is of this weight and serves; elsewhere (another dtype, autocast, a weight
/// that trains) by at::linear.
inline at::Tensor frozen_linear(
    const at::Tensor& x,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    const std::shared_ptr<const PackedMatrix>& packed,
    bool transposed) {
  const bool has_bias = bias.has_value() && bias->defined();
  const bool serves = packed && packed->is_of(weight) && x.dim() >= 2 &&
      x.size(-1) == weight.size(1) && packed->serves(x.numel() / x.size(-1)) &&
      detail::is_plain_float(x) && detail::runs_plainly() &&
      (!has_bias ||
       (bias->dim() == 1 && bias->size(0) == weight.size(0) &&
        detail::is_plain_float(*bias)));
  const bool grad = at::GradMode::is_enabled();
  if (!serves || (grad && weight.requires_grad())) {
    return at::linear(x, weight, bias);
  }
  if (grad && (x.requires_grad() || (has_bias && bias->requires_grad()))) {
    return detail::PackedLinear::apply(x, bias, packed, transposed);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return detail::packed_product(
      x, has_bias ? *bias : at::Tensor(), *packed, transposed);
}

} // namespace functional

} // namespace peft
