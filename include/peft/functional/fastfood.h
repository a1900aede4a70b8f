#pragma once

// The Fastfood transform (Le, Sarlos and Smola 2013), a random matrix
// P [N, d] in O(N) memory and O(N log N) time. With n, the power of two at or
// above N:
//
//   P theta = first N of  c · H G Pi H B theta,    c = 1 / sqrt(N Σ g²)
//
// B: signs, H: the Hadamard matrix of n (Sylvester's, entries ±1), Pi: a
// permutation, G: Gaussians. c takes the place of S: the columns of P have
// length 1 in the mean, and exactly where N = n. That is the normalisation of
// the code behind Aghajanyan et al. 2020 (arXiv:2012.13255).
//
// H is never built, and theta, padded with zeros, makes H B theta repeat: with
// m, the power of two at or above d, entry i is (H_m B theta)[i mod m].

#include <peft/functional/cpu/vector.h>
#include <peft/functional/packed_matrix.h>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace peft {

namespace functional {

using torch::Tensor;

/// The least power of two that is not below n.
inline int64_t next_power_of_two(int64_t n) {
  int64_t power = 1;
  while (power < n) {
    power *= 2;
  }
  return power;
}

namespace detail {

/// The stages of the transform from neighbours `first` apart on, in place.
template <class T>
PEFT_ALWAYS_INLINE void butterflies(T* data, int64_t n, int64_t first) {
  for (int64_t h = first; h < n; h *= 2) {
    for (int64_t i = 0; i < n; i += 2 * h) {
      T* low = data + i;
      T* high = low + h;
      for (int64_t j = 0; j < h; ++j) {
        const T a = low[j], b = high[j];
        low[j] = a + b;
        high[j] = a - b;
      }
    }
  }
}

/// Blocks [begin, end) of `size` numbers, each transformed on its way from
/// `in` to `out`.
template <class T>
struct HadamardBlocks {
  const T* in;
  T* out;
  int64_t size;

  template <int kLanes>
  PEFT_ALWAYS_INLINE void run(int64_t begin, int64_t end) const {
    for (int64_t block = begin; block < end; ++block) {
      T* to = out + block * size;
      std::copy(in + block * size, in + (block + 1) * size, to);
      butterflies(to, size, 1);
    }
  }
};

/// The later stages: down the columns of `data` [rows, width], strip by strip.
template <class T>
struct HadamardColumns {
  static constexpr int64_t kStrip = 16;

  T* data;
  int64_t rows, width;

  template <int kLanes>
  PEFT_ALWAYS_INLINE void run(int64_t begin, int64_t end) const {
    // In the matrix a column's numbers would fight for the same cache lines.
    std::vector<T> strip(rows * kStrip);
    for (int64_t s = begin; s < end; ++s) {
      T* first = data + s * kStrip;
      for (int64_t i = 0; i < rows; ++i) {
        std::copy(
            first + i * width,
            first + i * width + kStrip,
            strip.data() + i * kStrip);
      }
      butterflies(strip.data(), rows * kStrip, kStrip);
      for (int64_t i = 0; i < rows; ++i) {
        std::copy(
            strip.data() + i * kStrip,
            strip.data() + (i + 1) * kStrip,
            first + i * width);
      }
    }
  }
};

template <class T>
void walsh_hadamard_cpu(const T* in, T* out, int64_t n) {
  constexpr int64_t kBlock = 4096;
  const int64_t size = std::min(n, kBlock);
  at::parallel_for(0, n / size, 8, [&](int64_t begin, int64_t end) {
    cpu::detail::run(HadamardBlocks<T>{in, out, size}, begin, end);
  });
  if (n > size) {
    const HadamardColumns<T> columns{out, n / size, size};
    at::parallel_for(
        0, size / columns.kStrip, 1, [&](int64_t begin, int64_t end) {
          cpu::detail::run(columns, begin, end);
        });
  }
}

/// The same sums stage by stage, for every device and under transforms.
inline Tensor walsh_hadamard_composed(const Tensor& x) {
  const int64_t n = x.numel();
  Tensor y = x;
  for (int64_t h = 1; h < n; h *= 2) {
    const auto halves = y.reshape({-1, 2, h}).unbind(1);
    y = at::stack({halves[0] + halves[1], halves[0] - halves[1]}, 1);
  }
  return y.reshape({n});
}

/// H is symmetric: its own derivative, to any order.
struct WalshHadamard : torch::autograd::Function<WalshHadamard> {
  static Tensor forward(
      torch::autograd::AutogradContext* /*ctx*/,
      const Tensor& x);
  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* /*ctx*/,
      const torch::autograd::variable_list& grads);
};

} // namespace detail

/// H x for x [n], n a power of two: sums and differences of all entries, not
/// divided by √n. Threads do not change a bit of it.
inline Tensor walsh_hadamard(const Tensor& x) {
  TORCH_CHECK_VALUE(
      x.dim() == 1 && x.numel() > 0 &&
          next_power_of_two(x.numel()) == x.numel(),
      "peft: the Walsh-Hadamard transform takes a vector whose length is a "
      "power of two, got ",
      x.sizes());
  const bool by_kernel = detail::is_readable(x) &&
      (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble) &&
      detail::runs_plainly() && !x._fw_grad(/*level=*/0).defined();
  return by_kernel ? detail::WalshHadamard::apply(x)
                   : detail::walsh_hadamard_composed(x);
}

inline Tensor detail::WalshHadamard::forward(
    torch::autograd::AutogradContext* /*ctx*/,
    const Tensor& x) {
  const Tensor in = x.contiguous();
  Tensor out = at::empty_like(in);
  if (in.scalar_type() == at::kFloat) {
    walsh_hadamard_cpu(
        in.const_data_ptr<float>(), out.mutable_data_ptr<float>(), in.numel());
  } else {
    walsh_hadamard_cpu(
        in.const_data_ptr<double>(),
        out.mutable_data_ptr<double>(),
        in.numel());
  }
  return out;
}

inline torch::autograd::variable_list detail::WalshHadamard::backward(
    torch::autograd::AutogradContext* /*ctx*/,
    const torch::autograd::variable_list& grads) {
  return {walsh_hadamard(grads[0])};
}

/// c · H G Pi H B theta, all n entries of it. theta [d], signs [d], d <= n;
/// index [n], the permutation modulo m; gaussian [n].
inline Tensor fastfood(
    const Tensor& theta,
    const Tensor& signs,
    const Tensor& index,
    const Tensor& gaussian,
    double c) {
  const int64_t d = theta.numel();
  const int64_t m = next_power_of_two(d);
  const Tensor padded = at::constant_pad_nd((theta * signs).mul(c), {0, m - d});
  const Tensor mixed = walsh_hadamard(padded).index_select(0, index);
  return walsh_hadamard(mixed.mul(gaussian.to(mixed.scalar_type())));
}

} // namespace functional

} // namespace peft
