#pragma once

// The skinny products of LoRA on a CPU, where one side of the product is the
// rank r: t = x Aᵀ, y = b + t Bᵀ, G = tᵀ dy. A general product moves the wide
// matrix at half the speed of memory; these read it once, make dropout and
// bfloat16's conversion on the way, and let y be started instead of added to.
//
// Every kernel is float and sees whole vectors only. What is not (bfloat16,
// dropout, a width with a tail) goes through a block of rows in scratch.

#include <peft/functional/counter_dropout.h>
#include <peft/functional/cpu/vector.h>

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace peft {

namespace functional {

namespace cpu {

/// Whether fast kernels exist in this build on this machine; the functions
/// below are right in any case.
inline bool has_fast_skinny() {
#if defined(__OPTIMIZE__)
  return detail::isa() != Isa::kPlain;
#else
  return false;
#endif
}

namespace detail {

using functional::detail::column_step;
using functional::detail::drop_threshold;
using functional::detail::mix_column;
using functional::detail::row_keys;

/// A block of rows and columns that stays in the second-level cache.
constexpr int64_t kBlockRows = 36, kBlockColumns = 1024;

PEFT_ALWAYS_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

inline int64_t whole_vectors(int64_t width) {
  return (width + lanes() - 1) / lanes() * lanes();
}

/// The mask of one row after the other, vector after vector from a column on.
template <int kLanes>
class RowMask {
 public:
  PEFT_ALWAYS_INLINE
  RowMask(const CounterDropout* dropout, int64_t first_column)
      : seed_(dropout != nullptr ? dropout->seed : 0),
        threshold_(dropout != nullptr ? drop_threshold(dropout->p) : 0) {
    uint32_t each[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      each[lane] = static_cast<uint32_t>(first_column + lane) * column_step;
    }
    copy_bits(first_, each);
  }
  PEFT_ALWAYS_INLINE void start(int64_t row) {
    const auto keys = row_keys(seed_, row);
    counter_ = first_ + keys.start;
    mix_ = keys.mix;
  }
  /// Zeroes the dropped lanes of v and goes on to the next vector.
  PEFT_ALWAYS_INLINE void apply(Floats<kLanes>& v) {
    Words<kLanes> word, hash = counter_;
    mix_column(hash, mix_);
    copy_bits(word, v);
    keep_not_less(word, hash, threshold_);
    copy_bits(v, word);
    counter_ += column_step * kLanes;
  }

 private:
  Words<kLanes> first_, counter_;
  uint64_t seed_;
  uint32_t threshold_, mix_ = 0;
};

/// Reads rows as float, dropped but not scaled, each followed by zeros up to a
/// whole vector. The first row and column say where x is in the mask.
template <class T>
struct ReadRows {
  const T* x;
  int64_t ldx;
  float* to;
  int64_t ldt, width, first_row, first_column;
  const CounterDropout* dropout;

  template <int kLanes>
  PEFT_ALWAYS_INLINE void run(int64_t begin, int64_t end) const {
    if (dropout != nullptr) {
      rows<kLanes, true>(begin, end);
    } else {
      rows<kLanes, false>(begin, end);
    }
  }

  template <int kLanes, bool kDrops>
  PEFT_ALWAYS_INLINE void rows(int64_t begin, int64_t end) const {
    RowMask<kLanes> mask(dropout, first_column);
    const int64_t whole = width / kLanes * kLanes, rest = width - whole;
    for (int64_t i = begin; i < end; ++i) {
      const T* from = x + i * ldx;
      float* out = to + i * ldt;
      mask.start(first_row + i);
      for (int64_t j = 0; j < whole; j += kLanes) {
        vector<kLanes, kDrops>(from + j, out + j, mask);
      }
      if (rest > 0) {
        T tail[kLanes] = {};
        std::memcpy(tail, from + whole, rest * sizeof(T));
        vector<kLanes, kDrops>(tail, out + whole, mask);
      }
    }
  }

  template <int kLanes, bool kDrops>
  PEFT_ALWAYS_INLINE static void
  vector(const T* from, float* out, RowMask<kLanes>& mask) {
    Floats<kLanes> v;
    load<kLanes>(v, from);
    if (kDrops) {
      mask.apply(v);
    }
    store<kLanes>(out, v);
  }
};

/// y = (y or 0) + bias + drop(from), rounded once.
template <class T>
struct WriteRows {
  const float* from;
  int64_t ldf;
  const T* bias;
  T* y;
  int64_t ldy, width, first_row, first_column;
  bool accumulate;
  const CounterDropout* dropout;

  template <int kLanes>
  PEFT_ALWAYS_INLINE void run(int64_t begin, int64_t end) const {
    if (dropout != nullptr) {
      rows<kLanes, true>(begin, end);
    } else {
      rows<kLanes, false>(begin, end);
    }
  }

  template <int kLanes, bool kDrops>
  PEFT_ALWAYS_INLINE void rows(int64_t begin, int64_t end) const {
    RowMask<kLanes> mask(dropout, first_column);
    const float scale = kDrops ? static_cast<float>(dropout->scale()) : 1.0f;
    const int64_t whole = width / kLanes * kLanes, rest = width - whole;
    T bias_tail[kLanes] = {};
    if (bias != nullptr) {
      std::memcpy(bias_tail, bias + whole, rest * sizeof(T));
    }
    for (int64_t i = begin; i < end; ++i) {
      const float* term = from + i * ldf;
      T* out = y + i * ldy;
      mask.start(first_row + i);
      for (int64_t j = 0; j < whole; j += kLanes) {
        vector<kLanes, kDrops>(
            term + j,
            bias != nullptr ? bias + j : nullptr,
            out + j,
            accumulate,
            scale,
            mask);
      }
      if (rest > 0) {
        T tail[kLanes] = {};
        std::memcpy(tail, out + whole, rest * sizeof(T));
        vector<kLanes, kDrops>(
            term + whole, bias_tail, tail, accumulate, scale, mask);
        std::memcpy(out + whole, tail, rest * sizeof(T));
      }
    }
  }

  template <int kLanes, bool kDrops>
  PEFT_ALWAYS_INLINE static void vector(
      const float* term,
      const T* b,
      T* out,
      bool adds,
      float scale,
      RowMask<kLanes>& mask) {
    Floats<kLanes> v, more;
    load<kLanes>(v, term);
    if (kDrops) {
      v *= scale;
      mask.apply(v);
    }
    if (b != nullptr) {
      load<kLanes>(more, b);
      v += more;
    }
    if (adds) {
      load<kLanes>(more, out);
      v += more;
    }
    store<kLanes>(out, v);
  }
};

/// t[q][z] = scale · Σ_j x[q][j] A[z][j], or added to t, for kRows rows and
/// `live` of kRanks ranks.
template <int kLanes, int kRows, int kRanks>
PEFT_ALWAYS_INLINE void project_tile(
    const float* x,
    int64_t ldx,
    const float* A,
    int64_t lda,
    int64_t width,
    float* t,
    int64_t ldt,
    int64_t live,
    float scale,
    bool add) {
  Floats<kLanes> sums[kRows][kRanks] = {};
  const float* a[kRanks];
  PEFT_UNROLL
  for (int z = 0; z < kRanks; ++z) {
    a[z] = A + smaller(z, live - 1) * lda;
  }
  for (int64_t j = 0; j < width; j += kLanes) {
    Floats<kLanes> v[kRows];
    PEFT_UNROLL
    for (int q = 0; q < kRows; ++q) {
      load<kLanes>(v[q], x + q * ldx + j);
    }
    PEFT_UNROLL
    for (int z = 0; z < kRanks; ++z) {
      Floats<kLanes> w;
      load<kLanes>(w, a[z] + j);
      PEFT_UNROLL
      for (int q = 0; q < kRows; ++q) {
        sums[q][z] += v[q] * w;
      }
    }
  }
  PEFT_UNROLL
  for (int q = 0; q < kRows; ++q) {
    PEFT_UNROLL
    for (int z = 0; z < kRanks; ++z) {
      const float value = scale * sum<kLanes>(sums[q][z]);
      if (z < live) {
        t[q * ldt + z] = add ? t[q * ldt + z] + value : value;
      }
    }
  }
}

/// G[z][j] = Σ_i t[i][z] x[i][j], or added to G, for kVectors vectors of
/// columns and `live` of kRanks ranks; t is dense, [rows, kRanks].
template <int kLanes, int kRanks, int kVectors>
PEFT_ALWAYS_INLINE void outer_tile(
    const float* x,
    int64_t ldx,
    const float* t,
    int64_t rows,
    float* G,
    int64_t ldg,
    int64_t live,
    bool add) {
  Floats<kLanes> sums[kRanks][kVectors] = {};
  PEFT_UNROLL
  for (int z = 0; z < kRanks; ++z) {
    PEFT_UNROLL
    for (int c = 0; c < kVectors; ++c) {
      if (add && z < live) {
        load<kLanes>(sums[z][c], G + z * ldg + c * kLanes);
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    Floats<kLanes> v[kVectors];
    PEFT_UNROLL
    for (int c = 0; c < kVectors; ++c) {
      load<kLanes>(v[c], x + i * ldx + c * kLanes);
    }
    PEFT_UNROLL
    for (int z = 0; z < kRanks; ++z) {
      PEFT_UNROLL
      for (int c = 0; c < kVectors; ++c) {
        sums[z][c] += v[c] * t[i * kRanks + z];
      }
    }
  }
  PEFT_UNROLL
  for (int z = 0; z < kRanks; ++z) {
    PEFT_UNROLL
    for (int c = 0; c < kVectors; ++c) {
      if (z < live) {
        store<kLanes>(G + z * ldg + c * kLanes, sums[z][c]);
      }
    }
  }
}

/// y[q][j] = (y or 0) + bias[j] + Σ_z t[q][z] BT[z][j] for kRows rows and
/// kVectors vectors of columns.
template <int kLanes, int kRows, int kVectors>
PEFT_ALWAYS_INLINE void expand_tile(
    const float* t,
    int64_t r,
    const float* BT,
    int64_t ldb,
    const float* bias,
    float* y,
    int64_t ldy,
    bool accumulate) {
  Floats<kLanes> sums[kRows][kVectors] = {};
  PEFT_UNROLL
  for (int c = 0; c < kVectors; ++c) {
    PEFT_UNROLL
    for (int q = 0; q < kRows; ++q) {
      if (bias != nullptr) {
        load<kLanes>(sums[q][c], bias + c * kLanes);
      }
      if (accumulate) {
        Floats<kLanes> old;
        load<kLanes>(old, y + q * ldy + c * kLanes);
        sums[q][c] += old;
      }
    }
  }
  for (int64_t z = 0; z < r; ++z) {
    Floats<kLanes> b[kVectors];
    PEFT_UNROLL
    for (int c = 0; c < kVectors; ++c) {
      load<kLanes>(b[c], BT + z * ldb + c * kLanes);
    }
    PEFT_UNROLL
    for (int q = 0; q < kRows; ++q) {
      PEFT_UNROLL
      for (int c = 0; c < kVectors; ++c) {
        sums[q][c] += b[c] * t[q * r + z];
      }
    }
  }
  PEFT_UNROLL
  for (int q = 0; q < kRows; ++q) {
    PEFT_UNROLL
    for (int c = 0; c < kVectors; ++c) {
      store<kLanes>(y + q * ldy + c * kLanes, sums[q][c]);
    }
  }
}

/// t (+)= scale · x Aᵀ for a block of whole vectors.
struct ProjectBlock {
  const float* x;
  int64_t ldx;
  const float* A;
  int64_t lda, width;
  float* t;
  int64_t r;
  float scale;
  bool add;

  template <int kLanes>
  PEFT_ALWAYS_INLINE void run(int64_t begin, int64_t end) const {
    constexpr int kRanks = 4, kRows = kLanes == 16 ? 6 : 3;
    for (int64_t z = 0; z < r; z += kRanks) {
      const int64_t live = smaller(kRanks, r - z);
      const float* a = A + z * lda;
      int64_t i = begin;
      for (; i + kRows <= end; i += kRows) {
        project_tile<kLanes, kRows, kRanks>(
            x + i * ldx,
            ldx,
            a,
            lda,
            width,
            t + i * r + z,
            r,
            live,
            scale,
            add);
      }
      for (; i < end; ++i) {
        project_tile<kLanes, 1, kRanks>(
            x + i * ldx,
            ldx,
            a,
            lda,
            width,
            t + i * r + z,
            r,
            live,
            scale,
            add);
      }
    }
  }
};

/// G (+)= scale · tᵀ x for a block of whole vectors and at most kBlockRows
/// rows.
struct OuterBlock {
  const float* x;
  int64_t ldx;
  const float* t;
  int64_t r;
  float* G;
  int64_t ldg, width;
  float scale;
  bool add;

  template <int kLanes>
  PEFT_ALWAYS_INLINE void run(int64_t begin, int64_t end) const {
    constexpr int kRanks = 4, kVectors = kLanes == 16 ? 4 : 2;
    const float* from = x + begin * ldx;
    for (int64_t z = 0; z < r; z += kRanks) {
      const int64_t live = smaller(kRanks, r - z);
      float factors[kBlockRows * kRanks] = {};
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t s = 0; s < live; ++s) {
          factors[(i - begin) * kRanks + s] = scale * t[i * r + z + s];
        }
      }
      float* to = G + z * ldg;
      int64_t j = 0;
      for (; j + kVectors * kLanes <= width; j += kVectors * kLanes) {
        outer_tile<kLanes, kRanks, kVectors>(
            from + j, ldx, factors, end - begin, to + j, ldg, live, add);
      }
      for (; j < width; j += kLanes) {
        outer_tile<kLanes, kRanks, 1>(
            from + j, ldx, factors, end - begin, to + j, ldg, live, add);
      }
    }
  }
};

/// y = (y or 0) + bias + t BT for a block of whole vectors.
struct ExpandBlock {
  const float* t;
  int64_t r;
  const float* BT;
  int64_t ldb;
  const float* bias;
  float* y;
  int64_t ldy, width;
  bool accumulate;

  template <int kLanes>
  PEFT_ALWAYS_INLINE void run(int64_t begin, int64_t end) const {
    constexpr int kRows = 4;
    int64_t i = begin;
    for (; i + kRows <= end; i += kRows) {
      columns<kLanes, kRows>(i);
    }
    for (; i < end; ++i) {
      columns<kLanes, 1>(i);
    }
  }

  template <int kLanes, int kRows>
  PEFT_ALWAYS_INLINE void columns(int64_t i) const {
    constexpr int kVectors = kLanes == 16 ? 4 : 2;
    int64_t j = 0;
    for (; j + kVectors * kLanes <= width; j += kVectors * kLanes) {
      tile<kLanes, kRows, kVectors>(i, j);
    }
    for (; j < width; j += kLanes) {
      tile<kLanes, kRows, 1>(i, j);
    }
  }

  template <int kLanes, int kRows, int kVectors>
  PEFT_ALWAYS_INLINE void tile(int64_t i, int64_t j) const {
    expand_tile<kLanes, kRows, kVectors>(
        t + i * r,
        r,
        BT + j,
        ldb,
        bias != nullptr ? bias + j : nullptr,
        y + i * ldy + j,
        ldy,
        accumulate);
  }
};

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

/// BT [r, m] = Bᵀ of B [m, r].
inline void transpose(const float* B, float* BT, int64_t m, int64_t r) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t z = 0; z < r; ++z) {
      BT[z * m + i] = B[i * r + z];
    }
  }
}

/// Whether the products above beat those of LibTorch for this shape.
inline bool prefers_skinny(int64_t n, int64_t k, int64_t r) {
  (void)n;
  (void)k;
  (void)r;
  return has_fast_skinny();
}

} // namespace cpu

} // namespace functional

} // namespace peft

#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
