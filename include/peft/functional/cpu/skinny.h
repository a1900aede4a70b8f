#pragma once

// The skinny products of LoRA on a CPU.

#include <peft/functional/counter_dropout.h>

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <vector>

namespace peft {

namespace functional {

namespace cpu {

/// Whether fast kernels exist in this build on this machine.
inline bool has_fast_skinny() {
  return false;
}

namespace detail {

inline float keep_factor(const CounterDropout* drop, int64_t i, int64_t j) {
  using namespace functional::detail;
  if (drop == nullptr || !drop->active()) {
    return 1.0f;
  }
  return element_hash(row_keys(drop->seed, i), j) >= drop_threshold(drop->p)
      ? static_cast<float>(drop->scale())
      : 0.0f;
}

} // namespace detail

/// t = scale · drop(x) Aᵀ. x [n, k], A [r, k], t [n, r].
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
  std::vector<float> row(k);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      row[j] =
          static_cast<float>(x[i * ldx + j]) * detail::keep_factor(drop, i, j);
    }
    for (int64_t z = 0; z < r; ++z) {
      double sum = 0;
      for (int64_t j = 0; j < k; ++j) {
        sum += static_cast<double>(row[j]) * A[z * k + j];
      }
      t[i * r + z] = static_cast<float>(scale * sum);
    }
  }
}

/// y = (y or 0) + bias + drop(t BT). t [n, r], BT [r, m], y [n, m].
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
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      float sum = 0;
      for (int64_t z = 0; z < r; ++z) {
        sum += t[i * r + z] * BT[z * m + j];
      }
      sum *= detail::keep_factor(drop, i, j);
      sum += bias != nullptr ? static_cast<float>(bias[j]) : 0.0f;
      sum += accumulate ? static_cast<float>(y[i * ldy + j]) : 0.0f;
      y[i * ldy + j] = static_cast<T>(sum);
    }
  }
}

/// G = tᵀ drop(x). x [n, k], t [n, r], G [r, k].
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
  for (int64_t z = 0; z < r * k; ++z) {
    G[z] = 0.0f;
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      const float value =
          static_cast<float>(x[i * ldx + j]) * detail::keep_factor(drop, i, j);
      for (int64_t z = 0; z < r; ++z) {
        G[z * k + j] += t[i * r + z] * value;
      }
    }
  }
}

/// dt = scale · dy BTᵀ and G = tᵀ dy. dy [n, m], BT and G [r, m].
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
  project(dy, ldy, BT, dt, n, m, r, scale);
  outer(dy, ldy, t, G, n, m, r);
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
