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

// Several stages in one pass read and write a number once for all of them; the
// sums are the same, in the same order.

/// The stages of neighbours 1, 2 and 4 apart, on the way from `in` to `out`.
template <class T>
PEFT_ALWAYS_INLINE void
three_stages(const T* __restrict in, T* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) {
    T v[8], w[8];
    PEFT_UNROLL
    for (int k = 0; k < 8; k += 2) {
      v[k] = in[i + k] + in[i + k + 1];
      v[k + 1] = in[i + k] - in[i + k + 1];
    }
    PEFT_UNROLL
    for (int k = 0; k < 8; ++k) {
      w[k] = (k & 2) == 0 ? v[k] + v[k + 2] : v[k - 2] - v[k];
    }
    PEFT_UNROLL
    for (int k = 0; k < 4; ++k) {
      out[i + k] = w[k] + w[k + 4];
      out[i + k + 4] = w[k] - w[k + 4];
    }
  }
}

template <class T>
PEFT_ALWAYS_INLINE void one_stage(T* __restrict p, T* __restrict q, int64_t h) {
  for (int64_t j = 0; j < h; ++j) {
    const T a = p[j], b = q[j];
    p[j] = a + b;
    q[j] = a - b;
  }
}

template <class T>
PEFT_ALWAYS_INLINE void two_stages(
    T* __restrict p,
    T* __restrict q,
    T* __restrict r,
    T* __restrict s,
    int64_t h) {
  for (int64_t j = 0; j < h; ++j) {
    const T a = p[j] + q[j], b = p[j] - q[j];
    const T c = r[j] + s[j], d = r[j] - s[j];
    p[j] = a + c;
    q[j] = b + d;
    r[j] = a - c;
    s[j] = b - d;
  }
}

/// The stages of neighbours `h` apart and more, in place.
template <class T>
PEFT_ALWAYS_INLINE void later_stages(T* data, int64_t n, int64_t h) {
  for (; 2 * h < n; h *= 4) {
    for (int64_t i = 0; i < n; i += 4 * h) {
      T* p = data + i;
      two_stages(p, p + h, p + 2 * h, p + 3 * h, h);
    }
  }
  if (h < n) {
    for (int64_t i = 0; i < n; i += 2 * h) {
      one_stage(data + i, data + i + h, h);
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
      const T* from = in + block * size;
      T* to = out + block * size;
      if (size < 8) {
        std::copy(from, from + size, to);
        later_stages(to, size, 1);
      } else {
        three_stages(from, to, size);
        later_stages(to, size, 8);
      }
    }
  }
};

/// The later stages: down the columns of `data` [rows, width], strip by strip.
template <class T>
struct HadamardColumns {
  static constexpr int64_t kStrip = 64;

  T* data;
  int64_t rows, width;

  template <int kLanes>
  PEFT_ALWAYS_INLINE void run(int64_t begin, int64_t end) const {
    // In the matrix a column's numbers would fight for the same cache lines.
    std::vector<T> strip(rows * kStrip);
    T* const all = strip.data();
    for (int64_t s = begin; s < end; ++s) {
      T* first = data + s * kStrip;
      for (int64_t i = 0; i < rows; ++i) {
        std::copy_n(first + i * width, kStrip, all + i * kStrip);
      }
      later_stages(all, rows * kStrip, kStrip);
      for (int64_t i = 0; i < rows; ++i) {
        std::copy_n(all + i * kStrip, kStrip, first + i * width);
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
