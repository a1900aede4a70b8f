#pragma once

// The three products with a rank r of two to some hundreds, on blocks of float
// whose width is a multiple of the vector: t = x Aᵀ, G = tᵀ x and y = t BT.
// Every sum of a tile stays in a register until the tile is done.

#include <peft/functional/cpu/vector.h>

#include <cstdint>

namespace peft {

namespace functional {

namespace cpu {

namespace detail {

/// A block of rows and columns that stays in the second-level cache.
constexpr int64_t kBlockRows = 36, kBlockColumns = 1024;

PEFT_ALWAYS_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

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

} // namespace detail

} // namespace cpu

} // namespace functional

} // namespace peft
