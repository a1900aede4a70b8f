#pragma once

// y = b + t U + x Mᵀ for a matrix M that was packed once: x [n, k], M [out, k],
// t [n, r], U [r, out], in float32. The rank-r product is r more steps of the
// same sum, in the same registers, so y is written once and never read back.
//
// M lies in panels of its rows: k steps of `width` numbers, which a tile of the
// result multiplies by as many numbers of x. A tile stays in registers; a slab
// of panels stays in the second cache while the rows of x go by.

#include <peft/functional/cpu/vector.h>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace peft {

namespace functional {

namespace cpu {

/// Panels that are narrower than the full ones, and the unit of padding.
constexpr int64_t kNarrow = 16;
/// Steps of the sum between two visits of y.
constexpr int64_t kSteps = 384;
/// Row stride of the copy of x that a tile reads: rows fall on different cache
/// sets.
constexpr int64_t kStride = kSteps + 16;

/// One tile of the result: `init` + t u + x panel, all with their row strides.
struct Tile {
  const float* x; // [rows, steps], stride kStride
  const float* panel; // [steps, width]
  int64_t steps;
  const float* t; // [rows, r]
  const float* u; // [r, width], stride ldu
  int64_t r;
  int64_t ldu;
  const float* init;
  int64_t ldi;
  float* y;
  int64_t ldy;
};

/// Rows x (Count * Lanes) numbers of y in registers.
template <int Lanes, int Count, int Rows>
PEFT_ALWAYS_INLINE void run_tile(const Tile& tile) {
  using detail::load;
  using detail::store;
  detail::Floats<Lanes> sum[Rows][Count], w[Count];
  PEFT_UNROLL
  for (int i = 0; i < Rows; ++i) {
    PEFT_UNROLL
    for (int c = 0; c < Count; ++c) {
      load<Lanes>(sum[i][c], tile.init + i * tile.ldi + c * Lanes);
    }
  }
  for (int64_t z = 0; z < tile.r; ++z) {
    PEFT_UNROLL
    for (int c = 0; c < Count; ++c) {
      load<Lanes>(w[c], tile.u + z * tile.ldu + c * Lanes);
    }
    PEFT_UNROLL
    for (int i = 0; i < Rows; ++i) {
      PEFT_UNROLL
      for (int c = 0; c < Count; ++c) {
        sum[i][c] += tile.t[i * tile.r + z] * w[c];
      }
    }
  }
  const float* x = tile.x;
  const float* panel = tile.panel;
  for (int64_t step = 0; step < tile.steps; ++step) {
    PEFT_UNROLL
    for (int c = 0; c < Count; ++c) {
      load<Lanes>(w[c], panel + c * Lanes);
    }
    PEFT_UNROLL
    for (int i = 0; i < Rows; ++i) {
      PEFT_UNROLL
      for (int c = 0; c < Count; ++c) {
        sum[i][c] += x[i * kStride] * w[c];
      }
    }
    panel += Count * Lanes;
    ++x;
  }
  PEFT_UNROLL
  for (int i = 0; i < Rows; ++i) {
    PEFT_UNROLL
    for (int c = 0; c < Count; ++c) {
      store<Lanes>(tile.y + i * tile.ldy + c * Lanes, sum[i][c]);
    }
  }
}

template <int Rows>
PEFT_KERNEL void tile_plain(const Tile& tile) {
  run_tile<detail::kPlainLanes, kNarrow / detail::kPlainLanes, Rows>(tile);
}
#if PEFT_X86_VECTORS
template <int Rows>
__attribute__((target("avx2,fma"))) PEFT_KERNEL void tile_avx2(
    const Tile& tile) {
  run_tile<8, 2, Rows>(tile);
}
template <int Count, int Rows>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
PEFT_KERNEL void
tile_avx512(const Tile& tile) {
  run_tile<16, Count, Rows>(tile);
}
#endif

using TileFunction = void (*)(const Tile&);

/// The tiles of one instruction set, by their rows less one.
struct Tiles {
  int64_t width; // of a full panel
  int64_t rows; // of the highest tile
  TileFunction full[8];
  TileFunction narrow[8];
};

inline const Tiles& tiles_of(Isa isa) {
  static const Tiles plain{
      kNarrow,
      3,
      {tile_plain<1>, tile_plain<2>, tile_plain<3>},
      {tile_plain<1>, tile_plain<2>, tile_plain<3>}};
#if PEFT_X86_VECTORS
  static const Tiles avx2{
      kNarrow,
      6,
      {tile_avx2<1>,
       tile_avx2<2>,
       tile_avx2<3>,
       tile_avx2<4>,
       tile_avx2<5>,
       tile_avx2<6>},
      {tile_avx2<1>,
       tile_avx2<2>,
       tile_avx2<3>,
       tile_avx2<4>,
       tile_avx2<5>,
       tile_avx2<6>}};
  static const Tiles avx512{
      3 * kNarrow,
      8,
      {tile_avx512<3, 1>,
       tile_avx512<3, 2>,
       tile_avx512<3, 3>,
       tile_avx512<3, 4>,
       tile_avx512<3, 5>,
       tile_avx512<3, 6>,
       tile_avx512<3, 7>,
       tile_avx512<3, 8>},
      {tile_avx512<1, 1>,
       tile_avx512<1, 2>,
       tile_avx512<1, 3>,
       tile_avx512<1, 4>,
       tile_avx512<1, 5>,
       tile_avx512<1, 6>,
       tile_avx512<1, 7>,
       tile_avx512<1, 8>}};
  if (isa != Isa::kPlain) {
    return isa == Isa::kAvx512 ? avx512 : avx2;
  }
#endif
  (void)isa;
  return plain;
}

/// M [out, k], packed for the instructions of `isa`.
class Panels {
 public:
  /// `m` is float32 on the CPU, with any strides.
  explicit Panels(const at::Tensor& m, Isa isa = detail::isa())
      : out_(m.size(0)),
        k_(m.size(1)),
        is_wide_(isa != Isa::kPlain),
        tiles_(&tiles_of(isa)) {
    const int64_t padded = (out_ + kNarrow - 1) / kNarrow * kNarrow;
    for (int64_t column = 0; column < padded;) {
      const bool full = out_ - column >= tiles_->width;
      columns_.push_back(column);
      column += full ? tiles_->width : kNarrow;
    }
    columns_.push_back(padded);
    data_ = at::empty({padded * k_}, m.options().requires_grad(false));
    float* data = data_.mutable_data_ptr<float>();
    for (size_t p = 0; p + 1 < columns_.size(); ++p) {
      const int64_t begin = columns_[p], width = columns_[p + 1] - begin;
      at::Tensor panel =
          at::from_blob(data + begin * k_, {k_, width}, m.options());
      const int64_t real = std::min(width, out_ - begin);
      panel.narrow(1, 0, real).copy_(m.narrow(0, begin, real).t());
      panel.narrow(1, real, width - real).zero_();
    }
  }

  /// Whether the instructions are AVX2 or AVX-512.
  bool is_wide() const {
    return is_wide_;
  }

  int64_t nbytes() const {
    return data_.numel() * static_cast<int64_t>(sizeof(float));
  }

  /// y [n, out] = bias + t UT + x Mᵀ; `bias` [out] or null, `t` [n, r] and `UT`
  /// [r, out] or null with r = 0. Rows of x and y lie ldx and ldy apart.
  void multiply(
      const float* x,
      int64_t ldx,
      int64_t n,
      float* y,
      int64_t ldy,
      const float* bias,
      const float* t,
      const float* UT,
      int64_t r) const {
    const Call call{x, ldx, n, y, ldy, bias, t, UT, r};
    const auto count = static_cast<int64_t>(columns_.size()) - 1;
    const int64_t blocks = (n + kRowBlock - 1) / kRowBlock;
    // A thread's share is worth its start, and is cut where there is more.
    const int64_t work = std::max<int64_t>(1, k_ * tiles_->width);
    if (count >= blocks) {
      const int64_t grain =
          std::max<int64_t>(1, kGrain / (work * std::max<int64_t>(1, n)));
      at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
        run(call, begin, end, 0, n);
      });
    } else {
      at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
        run(call, 0, count, begin * kRowBlock, std::min(n, end * kRowBlock));
      });
    }
  }

 private:
  /// Rows that one thread takes at least.
  static constexpr int64_t kRowBlock = 64;
  /// Multiplications for which another thread is worth while.
  static constexpr int64_t kGrain = 1 << 20;
  /// Floats of a slab of panels: half of a 1 MB cache.
  static constexpr int64_t kSlab = 128 * 1024;

  struct Call {
    const float* x;
    int64_t ldx;
    int64_t n;
    float* y;
    int64_t ldy;
    const float* bias;
    const float* t;
    const float* UT;
    int64_t r;
  };

  void run(
      const Call& call,
      int64_t panel_begin,
      int64_t panel_end,
      int64_t row_begin,
      int64_t row_end) const {
    const int64_t n = row_end - row_begin;
    const int64_t count = (n + tiles_->rows - 1) / tiles_->rows;
    const int64_t slab = std::max<int64_t>(1, kSlab / (kSteps * tiles_->width));
    std::vector<float> edge; // bias and U of the last panel, padded
    for (int64_t first = panel_begin; first < panel_end; first += slab) {
      const int64_t last = std::min(panel_end, first + slab);
      int64_t k = 0;
      do {
        const int64_t steps = std::min(kSteps, k_ - k);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t row = row_begin + i * n / count;
          const int64_t rows = row_begin + (i + 1) * n / count - row;
          alignas(64) float x[8 * kStride];
          for (int64_t j = 0; j < rows; ++j) {
            std::memcpy(
                x + j * kStride,
                call.x + (row + j) * call.ldx + k,
                sizeof(float) * static_cast<size_t>(steps));
          }
          for (int64_t p = first; p < last; ++p) {
            run_panel(call, p, x, k, steps, row, rows, edge);
          }
        }
        k += steps;
      } while (k < k_);
    }
  }

  void run_panel(
      const Call& call,
      int64_t p,
      const float* x,
      int64_t k,
      int64_t steps,
      int64_t row,
      int64_t rows,
      std::vector<float>& edge) const {
    static const float kZeros[64] = {};
    const int64_t column = columns_[p], width = columns_[p + 1] - column;
    const int64_t real = std::min(width, out_ - column);
    const TileFunction function =
        (width == tiles_->width ? tiles_->full : tiles_->narrow)[rows - 1];
    const bool starts = k == 0;
    float* y = call.y + row * call.ldy + column;
    Tile tile{
        x,
        data_.const_data_ptr<float>() + column * k_ + k * width,
        steps,
        call.t + row * call.r,
        call.UT + column,
        starts ? call.r : 0,
        out_,
        y,
        call.ldy,
        y,
        call.ldy};
    if (starts) {
      tile.init = call.bias != nullptr ? call.bias + column : kZeros;
      tile.ldi = 0;
    }
    if (real == width) {
      function(tile);
      return;
    }
    // The last panel: through a buffer of its width.
    float buffer[8 * kNarrow] = {};
    edge.assign(static_cast<size_t>((1 + call.r) * width), 0.f);
    if (!starts) {
      for (int64_t i = 0; i < rows; ++i) {
        std::copy_n(y + i * call.ldy, real, buffer + i * width);
      }
      tile.init = buffer;
      tile.ldi = width;
    } else {
      if (call.bias != nullptr) {
        std::copy_n(call.bias + column, real, edge.begin());
      }
      for (int64_t z = 0; z < call.r; ++z) {
        std::copy_n(
            call.UT + z * out_ + column, real, edge.begin() + (1 + z) * width);
      }
      tile.init = edge.data();
      tile.ldi = 0;
      tile.u = edge.data() + width;
      tile.ldu = width;
    }
    tile.y = buffer;
    tile.ldy = width;
    function(tile);
    for (int64_t i = 0; i < rows; ++i) {
      std::copy_n(buffer + i * width, real, y + i * call.ldy);
    }
  }

  int64_t out_, k_;
  bool is_wide_;
  const Tiles* tiles_;
  std::vector<int64_t> columns_; // where the panels begin, and the end
  at::Tensor data_;
};

} // namespace cpu

} // namespace functional

} // namespace peft
