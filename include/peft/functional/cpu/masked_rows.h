#pragma once

// Rows on their way into and out of the float kernels: the conversion of
// bfloat16, dropout by counter, and the tails that fill no vector.

#include <peft/functional/counter_dropout.h>
#include <peft/functional/cpu/vector.h>

#include <cstdint>
#include <cstring>

namespace peft {

namespace functional {

namespace cpu {

namespace detail {

using functional::detail::column_step;
using functional::detail::drop_threshold;
using functional::detail::mix_column;
using functional::detail::row_keys;

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

} // namespace detail

} // namespace cpu

} // namespace functional

} // namespace peft
