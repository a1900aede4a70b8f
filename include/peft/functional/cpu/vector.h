#pragma once

// Vectors of float and double for the CPU kernels: one body of code for every
// instruction set, chosen when the program runs, without compiler flags for the
// user. The types are the vector extensions of GCC and Clang; elsewhere a
// vector has one lane and is a float.

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__GNUC__)
#define PEFT_ALWAYS_INLINE __attribute__((always_inline)) inline
#else
#define PEFT_ALWAYS_INLINE inline
#endif

#if defined(__GNUC__) && defined(__x86_64__)
#define PEFT_X86_VECTORS 1
#else
#define PEFT_X86_VECTORS 0
#endif

// Loops over the registers of a tile must vanish, also in a build without
// optimisation, where GCC optimises the kernels all the same.
#if defined(__clang__)
#define PEFT_KERNEL
#define PEFT_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define PEFT_KERNEL __attribute__((optimize("O3")))
#define PEFT_UNROLL _Pragma("GCC unroll 16")
#else
#define PEFT_KERNEL
#define PEFT_UNROLL
#endif

namespace peft {

namespace functional {

namespace cpu {

/// The instruction sets that have an entry of their own.
enum class Isa { kPlain, kAvx2, kAvx512 };

/// The best one of this machine.
inline Isa best_isa() {
#if PEFT_X86_VECTORS
  static const Isa best = [] {
    if (__builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      return Isa::kAvx512;
    }
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
        ? Isa::kAvx2
        : Isa::kPlain;
  }();
  return best;
#else
  return Isa::kPlain;
#endif
}

namespace detail {

/// The one in use; tests set it to see every path.
inline Isa& isa() {
  static Isa chosen = best_isa();
  return chosen;
}

#if defined(__GNUC__)
constexpr int kPlainLanes = 4;

template <int kLanes>
struct Vector {
  typedef float Float __attribute__((vector_size(4 * kLanes)));
  typedef double Double __attribute__((vector_size(8 * kLanes)));
  typedef uint32_t Word __attribute__((vector_size(4 * kLanes)));
  typedef uint16_t Half __attribute__((vector_size(2 * kLanes)));
};

/// `to` = `from`, lane by lane.
template <class To, class From>
PEFT_ALWAYS_INLINE void convert(To& to, const From& from) {
  to = __builtin_convertvector(from, To);
}
#else
constexpr int kPlainLanes = 1;

template <int kLanes>
struct Vector {
  using Float = float;
  using Double = double;
  using Word = uint32_t;
  using Half = uint16_t;
};

template <class To, class From>
inline void convert(To& to, const From& from) {
  to = static_cast<To>(from);
}
#endif

template <int kLanes>
using Floats = typename Vector<kLanes>::Float;
template <int kLanes>
using Doubles = typename Vector<kLanes>::Double;
template <int kLanes>
using Words = typename Vector<kLanes>::Word;

// Results leave by reference: a wide vector as a result would need the
// instruction set that its caller has and its template does not.

/// `to` = the bits of `from`, a type of the same size.
template <class To, class From>
PEFT_ALWAYS_INLINE void copy_bits(To& to, const From& from) {
  static_assert(sizeof(To) == sizeof(From), "peft: sizes differ");
  std::memcpy(&to, &from, sizeof(to));
}

/// Clears `word` in the lanes where a < b.
template <class Word>
PEFT_ALWAYS_INLINE void keep_not_less(Word& word, const Word& a, uint32_t b) {
  word = a >= b ? word : Word{};
}

/// v = the elements at p, wherever they lie.
template <int kLanes>
PEFT_ALWAYS_INLINE void load(Floats<kLanes>& v, const float* p) {
  std::memcpy(&v, p, sizeof(v));
}

template <int kLanes>
PEFT_ALWAYS_INLINE void load(Doubles<kLanes>& v, const double* p) {
  std::memcpy(&v, p, sizeof(v));
}

template <int kLanes>
PEFT_ALWAYS_INLINE void load(Floats<kLanes>& v, const c10::BFloat16* p) {
  typename Vector<kLanes>::Half half;
  std::memcpy(&half, p, sizeof(half));
  Words<kLanes> word;
  convert(word, half);
  word <<= 16;
  copy_bits(v, word);
}

/// The elements at p = v.
template <int kLanes>
PEFT_ALWAYS_INLINE void store(float* p, const Floats<kLanes>& v) {
  std::memcpy(p, &v, sizeof(v));
}

/// Rounds to nearest even; a NaN becomes the quiet one.
template <int kLanes>
PEFT_ALWAYS_INLINE void store(c10::BFloat16* p, const Floats<kLanes>& v) {
  Words<kLanes> word;
  copy_bits(word, v);
  word = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
  word = v != v ? Words<kLanes>{} + 0x7fc0u : word;
  typename Vector<kLanes>::Half half;
  convert(half, word);
  std::memcpy(p, &half, sizeof(half));
}

/// The sum of all lanes.
template <int kLanes>
PEFT_ALWAYS_INLINE float sum(const Floats<kLanes>& v) {
  if constexpr (kLanes == 1) {
    float all;
    copy_bits(all, v);
    return all;
  } else if constexpr (kLanes == 4) {
    return (v[0] + v[2]) + (v[1] + v[3]);
  } else {
    Floats<kLanes / 2> halves[2];
    copy_bits(halves, v);
    halves[0] += halves[1];
    return sum<kLanes / 2>(halves[0]);
  }
}

template <class Op>
PEFT_KERNEL void run_plain(const Op& op, int64_t begin, int64_t end) {
  op.template run<kPlainLanes>(begin, end);
}

#if PEFT_X86_VECTORS
template <class Op>
__attribute__((target("avx2,fma"))) PEFT_KERNEL void
run_avx2(const Op& op, int64_t begin, int64_t end) {
  op.template run<8>(begin, end);
}

template <class Op>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
PEFT_KERNEL void
run_avx512(const Op& op, int64_t begin, int64_t end) {
  op.template run<16>(begin, end);
}
#endif

/// op.run<lanes>(begin, end) in the instruction set in use. All that `run`
/// calls in its loops must be PEFT_ALWAYS_INLINE.
template <class Op>
void run(const Op& op, int64_t begin, int64_t end) {
#if PEFT_X86_VECTORS
  if (isa() == Isa::kAvx512) {
    return run_avx512(op, begin, end);
  }
  if (isa() == Isa::kAvx2) {
    return run_avx2(op, begin, end);
  }
#endif
  run_plain(op, begin, end);
}

/// The lanes of a vector in the instruction set in use.
inline int64_t lanes() {
  return isa() == Isa::kAvx512 ? 16 : isa() == Isa::kAvx2 ? 8 : kPlainLanes;
}

/// `count` floats on a boundary of 64 bytes that belong to this thread until it
/// asks for the same slot again.
template <int slot>
inline float* scratch(int64_t count) {
  thread_local std::vector<float> buffer;
  if (static_cast<int64_t>(buffer.size()) < count + 16) {
    buffer.resize(count + 16);
  }
  const auto address = reinterpret_cast<uintptr_t>(buffer.data());
  return buffer.data() + ((64 - address % 64) % 64) / sizeof(float);
}

} // namespace detail

} // namespace cpu

} // namespace functional

} // namespace peft
