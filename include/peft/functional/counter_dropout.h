#pragma once

// Dropout whose mask is a function of a counter, so that the backward pass
// makes it again instead of keeping it: drop(x)_ij = x_ij / (1 - p) where
// hash(seed, i, j) >= p 2^32, and 0 elsewhere (Salmon et al. 2011, "Parallel
// random numbers: as easy as 1, 2, 3", on the principle).

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <cstdint>
#include <mutex>

namespace peft {

namespace functional {

using at::Tensor;

/// Which elements of a matrix are dropped: those of (seed, row, column) whose
/// hash is below p 2^32. The kept ones are scaled by 1 / (1 - p).
struct CounterDropout {
  uint64_t seed = 0;
  double p = 0.0;

  bool active() const {
    return p > 0.0;
  }
  /// What a kept element is multiplied by; 0 where nothing is kept (p = 1).
  double scale() const {
    return p < 1.0 ? 1.0 / (1.0 - p) : 0.0;
  }
};

/// A fresh mask of probability p by the default CPU generator of LibTorch, so
/// that torch::manual_seed repeats it. p = 0 draws nothing.
inline CounterDropout draw_dropout(double p) {
  CounterDropout dropout{0, p};
  if (dropout.active()) {
    at::Generator generator = at::detail::getDefaultCPUGenerator();
    const std::lock_guard<std::mutex> lock(generator.mutex());
    dropout.seed =
        at::check_generator<at::CPUGeneratorImpl>(generator)->random64();
  }
  return dropout;
}

namespace detail {

/// The two keys of a row: where its columns start in a Weyl sequence, and what
/// is mixed in between the two multiplications.
struct RowKeys {
  uint32_t start;
  uint32_t mix;
};

/// splitmix64 (Steele, Lea and Flood 2014) of the seed and the row.
inline RowKeys row_keys(uint64_t seed, int64_t row) {
  uint64_t z = seed + (static_cast<uint64_t>(row) + 1) * 0x9e3779b97f4a7c15ULL;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  z ^= z >> 31;
  return {static_cast<uint32_t>(z), static_cast<uint32_t>(z >> 32)};
}

/// The step of the Weyl sequence: 2^32 over the golden ratio.
constexpr uint32_t column_step = 0x9e3779b9u;

/// The hash of an element, from start + column · column_step. `Word` is
/// uint32_t or a vector of it.
template <class Word>
#if defined(__GNUC__)
__attribute__((always_inline))
#endif
inline void
mix_column(Word& h, uint32_t mix) {
  h ^= h >> 16;
  h *= 0x7feb352du;
  h ^= (h >> 15) ^ mix;
  h *= 0x846ca68bu;
}

/// hash(seed, row, column) of the row with these keys.
inline uint32_t element_hash(RowKeys keys, int64_t column) {
  uint32_t h = keys.start + static_cast<uint32_t>(column) * column_step;
  mix_column(h, keys.mix);
  return h;
}

/// p 2^32, below which a hash means dropped.
inline uint32_t drop_threshold(double p) {
  return static_cast<uint32_t>(std::min(p * 4294967296.0, 4294967295.0));
}

} // namespace detail

/// The mask as a matrix [n, k] of 0 and 1 / (1 - p): for devices and dtypes
/// that have no kernel of their own, and for tests.
inline Tensor dropout_mask(
    const CounterDropout& dropout,
    int64_t n,
    int64_t k,
    const at::TensorOptions& options) {
  Tensor mask = at::empty({n, k}, at::TensorOptions(at::kFloat));
  float* element = mask.data_ptr<float>();
  const uint32_t threshold = detail::drop_threshold(dropout.p);
  for (int64_t i = 0; i < n; ++i) {
    const auto keys = detail::row_keys(dropout.seed, i);
    for (int64_t j = 0; j < k; ++j) {
      *element++ = detail::element_hash(keys, j) >= threshold ? 1.0f : 0.0f;
    }
  }
  return mask.to(options.pinned_memory(false)).mul_(dropout.scale());
}

} // namespace functional

} // namespace peft
