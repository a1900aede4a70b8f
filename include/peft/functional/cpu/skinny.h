#pragma once

// The skinny products of LoRA on a CPU, where one side of the product is the
// rank r: t = x Aᵀ, y = b + t Bᵀ, G = tᵀ dy. A general product moves the wide
// matrix at half the speed of memory; these read it once, make dropout and
// bfloat16's conversion on the way, and let y be started instead of added to.
//
// Every kernel is float and sees whole vectors only. What is not (bfloat16,
// dropout, a width with a tail) goes through a block of rows in scratch.

#include <peft/functional/counter_dropout.h>
#include <peft/functional/cpu/masked_rows.h>
#include <peft/functional/cpu/rank_tiles.h>
#include <peft/functional/cpu/vector.h>

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace peft {

namespace functional {

namespace cpu {

/// Whether fast kernels exist in this build on this machine; the functions
/// below are right in any case.
inline bool has_fast_skinny() {
#if defined(__OPTIMIZE__) || (defined(__GNUC__) && !defined(__clang__))
  return detail::isa() != Isa::kPlain; // GCC always optimises a PEFT_KERNEL
#else
  return false;
#endif
}

namespace detail {

inline int64_t whole_vectors(int64_t width) {
  return (width + lanes() - 1) / lanes() * lanes();
}

/// One pass over the rows of x: t = scale · drop(x) Aᵀ where t is given, and
/// G = uᵀ drop(x) where G is. A and G have the leading dimension `padded`.
template <class T>
struct Pass {
  const T* x;
  int64_t ldx, k, r, padded;
  const CounterDropout* dropout;
  const float* A;
  float* t;
  float scale;
  const float* u;
  float* G;

  void rows(int64_t begin, int64_t end) const {
    const bool direct =
        std::is_same<T, float>::value && dropout == nullptr && padded == k;
    const float kept =
        dropout != nullptr ? static_cast<float>(dropout->scale()) : 1.0f;
    float* staged = direct ? nullptr : scratch<0>(kBlockRows * kBlockColumns);
    for (int64_t i = begin; i < end; i += kBlockRows) {
      const int64_t count = smaller(kBlockRows, end - i);
      for (int64_t j = 0; j < k; j += kBlockColumns) {
        const int64_t wide = smaller(kBlockColumns, padded - j);
        const T* block = x + i * ldx + j;
        const float* from = reinterpret_cast<const float*>(block);
        int64_t ld = ldx;
        if (!direct) {
          const int64_t width = smaller(kBlockColumns, k - j);
          detail::run(
              ReadRows<T>{block, ldx, staged, wide, width, i, j, dropout},
              0,
              count);
          from = staged;
          ld = wide;
        }
        if (t != nullptr) {
          detail::run(
              ProjectBlock{
                  from,
                  ld,
                  A + j,
                  padded,
                  wide,
                  t + i * r,
                  r,
                  kept * scale,
                  j > 0},
              0,
              count);
        }
        if (G != nullptr) {
          detail::run(
              OuterBlock{
                  from, ld, u + i * r, r, G + j, padded, wide, kept, i > begin},
              0,
              count);
        }
      }
    }
  }
};

/// y = (y or 0) + bias + drop(t BT); BT has the leading dimension `padded`.
template <class T>
struct Expansion {
  const float* t;
  const float* BT;
  const T* bias;
  T* y;
  int64_t ldy, m, r, padded;
  bool accumulate;
  const CounterDropout* dropout;

  void rows(int64_t begin, int64_t end) const {
    if (std::is_same<T, float>::value && dropout == nullptr && padded == m) {
      return detail::run(
          ExpandBlock{
              t,
              r,
              BT,
              padded,
              reinterpret_cast<const float*>(bias),
              reinterpret_cast<float*>(y),
              ldy,
              m,
              accumulate},
          begin,
          end);
    }
    constexpr int64_t kStagedRows = 8;
    float* staged = scratch<0>(kStagedRows * kBlockColumns);
    for (int64_t i = begin; i < end; i += kStagedRows) {
      const int64_t count = smaller(kStagedRows, end - i);
      for (int64_t j = 0; j < m; j += kBlockColumns) {
        const int64_t wide = smaller(kBlockColumns, padded - j);
        detail::run(
            ExpandBlock{
                t + i * r,
                r,
                BT + j,
                padded,
                nullptr,
                staged,
                wide,
                wide,
                false},
            0,
            count);
        detail::run(
            WriteRows<T>{
                staged,
                wide,
                bias != nullptr ? bias + j : nullptr,
                y + i * ldy + j,
                ldy,
                smaller(kBlockColumns, m - j),
                i,
                j,
                accumulate,
                dropout},
            0,
            count);
      }
    }
  }
};

/// How many threads share `rows` rows of `flops` operations each.
inline int64_t task_count(int64_t rows, int64_t flops) {
  if (at::in_parallel_region()) {
    return 1;
  }
  const int64_t worth = rows * flops / (int64_t(1) << 19);
  return std::max<int64_t>(
      1, std::min({worth, rows, int64_t(at::get_num_threads())}));
}

/// f(task, begin, end) for equal shares of the rows.
template <class F>
void for_tasks(int64_t tasks, int64_t rows, const F& f) {
  if (tasks == 1) {
    return f(0, 0, rows);
  }
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      f(task, rows * task / tasks, rows * (task + 1) / tasks);
    }
  });
}

/// The rows of a factor [r, width] at a distance of `padded`, followed by
/// zeros; the factor itself where that is the same.
inline const float*
pad_factor(const float* factor, int64_t r, int64_t width, int64_t padded) {
  if (width == padded) {
    return factor;
  }
  float* to = scratch<1>(r * padded);
  std::fill_n(to, r * padded, 0.0f);
  for (int64_t z = 0; z < r; ++z) {
    std::copy_n(factor + z * width, width, to + z * padded);
  }
  return to;
}

inline const CounterDropout* if_active(const CounterDropout* dropout) {
  return dropout != nullptr && dropout->active() ? dropout : nullptr;
}

/// Runs a pass over n rows; where it makes G, every task has a sum of its own
/// and they are added in order.
template <class T>
void run_pass(Pass<T> pass, int64_t n, float* G) {
  const int64_t k = pass.k, r = pass.r;
  const int64_t tasks =
      task_count(n, 2 * k * r * ((pass.t != nullptr) + (G != nullptr)));
  pass.padded = whole_vectors(k);
  if (pass.A != nullptr) {
    pass.A = pad_factor(pass.A, r, k, pass.padded);
  }
  const bool own = G != nullptr && (tasks > 1 || pass.padded != k);
  const int64_t size = r * pass.padded;
  float* sums = own ? scratch<2>(tasks * size) : G;
  for_tasks(tasks, n, [&](int64_t task, int64_t begin, int64_t end) {
    Pass<T> share = pass;
    share.G = own ? sums + task * size : G;
    share.rows(begin, end);
  });
  if (own) {
    for (int64_t z = 0; z < r; ++z) {
      for (int64_t j = 0; j < k; ++j) {
        float sum = 0.0f;
        for (int64_t task = 0; task < tasks; ++task) {
          sum += sums[task * size + z * pass.padded + j];
        }
        G[z * k + j] = sum;
      }
    }
  }
}

} // namespace detail

/// t = scale · drop(x) Aᵀ. x [n, k] with rows at a distance of ldx, A [r, k],
/// t [n, r].
template <class T>
void project(
    const T* x,
    int64_t ldx,
    const float* A,
    float* t,
    int64_t n,
    int64_t k,
    int64_t r,
    float scale,
    const CounterDropout* drop = nullptr) {
  detail::run_pass<T>(
      {x, ldx, k, r, k, detail::if_active(drop), A, t, scale, nullptr, nullptr},
      n,
      nullptr);
}

/// y = (y or 0) + bias + drop(t BT), rounded once. t [n, r], BT [r, m], bias
/// [m] or null, y [n, m] with rows at a distance of ldy.
template <class T>
void expand(
    const float* t,
    const float* BT,
    const T* bias,
    T* y,
    int64_t ldy,
    int64_t n,
    int64_t m,
    int64_t r,
    bool accumulate,
    const CounterDropout* drop = nullptr) {
  const int64_t padded = detail::whole_vectors(m);
  const detail::Expansion<T> expansion{
      t,
      detail::pad_factor(BT, r, m, padded),
      bias,
      y,
      ldy,
      m,
      r,
      padded,
      accumulate,
      detail::if_active(drop)};
  detail::for_tasks(
      detail::task_count(n, 2 * m * r),
      n,
      [&](int64_t, int64_t begin, int64_t end) { expansion.rows(begin, end); });
}

/// G = tᵀ drop(x). x [n, k] with rows at a distance of ldx, t [n, r], G [r, k].
template <class T>
void outer(
    const T* x,
    int64_t ldx,
    const float* t,
    float* G,
    int64_t n,
    int64_t k,
    int64_t r,
    const CounterDropout* drop = nullptr) {
  if (n == 0) {
    std::fill_n(G, r * k, 0.0f);
    return;
  }
  detail::run_pass<T>(
      {x,
       ldx,
       k,
       r,
       k,
       detail::if_active(drop),
       nullptr,
       nullptr,
       0.0f,
       t,
       nullptr},
      n,
      G);
}

/// dt = scale · dy BTᵀ and G = tᵀ dy in one pass over dy. dy [n, m] with rows
/// at a distance of ldy, BT and G [r, m], t and dt [n, r].
template <class T>
void project_and_outer(
    const T* dy,
    int64_t ldy,
    const float* BT,
    const float* t,
    float* dt,
    float* G,
    int64_t n,
    int64_t m,
    int64_t r,
    float scale) {
  if (n == 0) {
    std::fill_n(G, r * m, 0.0f);
    return;
  }
  detail::run_pass<T>(
      {dy, ldy, m, r, m, nullptr, BT, dt, scale, t, nullptr}, n, G);
}

namespace detail {

/// The transpose where one side is Narrow: a row of it is one stretch of code.
template <int Narrow>
PEFT_KERNEL void
transpose_narrow(const float* from, float* to, int64_t m, int64_t r) {
  if (r == Narrow) {
    for (int64_t i = 0; i < m; ++i) {
      PEFT_UNROLL
      for (int z = 0; z < Narrow; ++z) {
        to[z * m + i] = from[i * Narrow + z];
      }
    }
    return;
  }
  for (int64_t z = 0; z < r; ++z) {
    PEFT_UNROLL
    for (int i = 0; i < Narrow; ++i) {
      to[z * Narrow + i] = from[i * r + z];
    }
  }
}

} // namespace detail

/// BT [r, m] = Bᵀ of B [m, r].
inline void transpose(const float* B, float* BT, int64_t m, int64_t r) {
  switch (std::min(m, r)) {
    case 4:
      return detail::transpose_narrow<4>(B, BT, m, r);
    case 8:
      return detail::transpose_narrow<8>(B, BT, m, r);
    case 16:
      return detail::transpose_narrow<16>(B, BT, m, r);
    default:
      break;
  }
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t z = 0; z < r; ++z) {
      BT[z * m + i] = B[i * r + z];
    }
  }
}

/// Whether the products above beat those of LibTorch for float32. Measured for
/// n 1 to 1024, k 384 to 4096, r 4 to 256 (benchmarks/skinny.cpp): 0.05 to 1 of
/// its time but for r 256 at n 1024, k 4096, where it is the same.
inline bool prefers_skinny(int64_t n, int64_t k, int64_t r) {
  return has_fast_skinny() && (r <= 128 || n * k < (int64_t(1) << 20));
}

} // namespace cpu

} // namespace functional

} // namespace peft
