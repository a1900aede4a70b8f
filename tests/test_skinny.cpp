#include "test.h"

#include <peft/functional/counter_dropout.h>
#include <peft/functional/cpu/skinny.h>

#include <cmath>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

namespace test_skinny {

namespace cpu = peft::functional::cpu;
using peft::functional::CounterDropout;
using peft::functional::draw_dropout;
using peft::functional::dropout_mask;
using torch::Tensor;

namespace {

/// The instruction sets that this machine has.
std::vector<cpu::Isa> paths() {
  std::vector<cpu::Isa> all{cpu::Isa::kPlain};
  for (auto isa : {cpu::Isa::kAvx2, cpu::Isa::kAvx512}) {
    if (isa <= cpu::best_isa()) {
      all.push_back(isa);
    }
  }
  return all;
}

/// Chooses an instruction set until the end of the scope.
struct Path {
  explicit Path(cpu::Isa isa) {
    cpu::detail::isa() = isa;
  }
  ~Path() {
    cpu::detail::isa() = cpu::best_isa();
  }
};

/// A matrix [n, k] whose rows are `gap` elements further apart than k, in the
/// middle of memory full of NaN.
Tensor strided(const Tensor& dense, int64_t gap) {
  auto memory = torch::full(
      {dense.size(0) + 1, dense.size(1) + gap},
      std::numeric_limits<float>::quiet_NaN(),
      dense.options());
  auto view = memory.narrow(0, 0, dense.size(0)).narrow(1, 0, dense.size(1));
  view.copy_(dense);
  return view;
}

/// |a - b| against the float64 sum of the magnitudes of what was added up.
Comparison near(
    const Tensor& a,
    const Tensor& b,
    const Tensor& magnitude,
    double tolerance) {
  const auto bound = (tolerance * magnitude + 1e-30);
  const auto ratio = (a.to(torch::kDouble) - b).abs() / bound;
  const bool fine = ratio.numel() == 0 || ratio.le(1.0).all().item<bool>();
  return {
      fine,
      "largest error is " +
          std::to_string(ratio.numel() ? ratio.max().item<double>() : 0.0) +
          " of the tolerance"};
}

/// Every product for one shape in one type, with and without dropout.
template <class T>
void check(int64_t n, int64_t width, int64_t r, int64_t gap) {
  CAPTURE(n, width, r, gap);
  seed(n + 1000 * width + r);
  const torch::ScalarType dtype = c10::CppTypeToScalarType<T>::value;
  const double once = dtype == torch::kFloat ? 1e-6 : 4e-3;
  const float scale = 1.7f;
  const Tensor X = strided(torch::randn({n, width}).to(dtype), gap);
  const auto A = torch::randn({r, width}), U = torch::randn({n, r});
  const Tensor bias = torch::randn({width}).to(dtype);
  const Tensor x = X.to(torch::kDouble), a = A.to(torch::kDouble);
  const Tensor u = U.to(torch::kDouble), b = bias.to(torch::kDouble);
  const int64_t ld = width + gap;
  auto floats = [](const Tensor& t) { return t.data_ptr<float>(); };

  for (double p : {0.0, 0.3}) {
    CAPTURE(p);
    const CounterDropout dropout{99, p};
    const auto* drop = p > 0 ? &dropout : nullptr;
    const Tensor mask = dropout_mask(dropout, n, width, torch::kDouble);
    const Tensor kept = x * mask;

    auto t = torch::full({n, r}, NAN);
    cpu::project<T>(
        X.data_ptr<T>(), ld, floats(A), floats(t), n, width, r, scale, drop);
    REQUIRE(near(
        t, scale * kept.mm(a.t()), scale * kept.abs().mm(a.abs().t()), 1e-6));

    auto G = torch::full({r, width}, NAN);
    cpu::outer<T>(X.data_ptr<T>(), ld, floats(U), floats(G), n, width, r, drop);
    REQUIRE(near(G, u.t().mm(kept), u.abs().t().mm(kept.abs()), 1e-6));

    for (bool accumulate : {false, true}) {
      for (bool biased : {false, true}) {
        CAPTURE(accumulate, biased);
        Tensor memory = strided(X, gap);
        if (!accumulate) {
          memory.fill_(NAN);
        }
        cpu::expand<T>(
            floats(U),
            floats(A),
            biased ? bias.data_ptr<T>() : nullptr,
            memory.data_ptr<T>(),
            ld,
            n,
            width,
            r,
            accumulate,
            drop);
        auto exact = u.mm(a) * mask, size = u.abs().mm(a.abs()) * mask;
        if (accumulate) {
          exact = exact + x;
          size = size + x.abs();
        }
        if (biased) {
          exact = exact + b;
          size = size + b.abs();
        }
        REQUIRE(near(memory, exact, size, once));
        if (gap > 0 && n > 0) { // what lies between the rows is not touched
          const Tensor between = memory.as_strided(
              {n, gap}, {ld, 1}, memory.storage_offset() + width);
          REQUIRE(between.isnan().all().item<bool>());
        }
      }
    }
  }

  auto dt = torch::full({n, r}, NAN), G = torch::full({r, width}, NAN);
  cpu::project_and_outer<T>(
      X.data_ptr<T>(),
      ld,
      floats(A),
      floats(U),
      floats(dt),
      floats(G),
      n,
      width,
      r,
      scale);
  REQUIRE(near(dt, scale * x.mm(a.t()), scale * x.abs().mm(a.abs().t()), 1e-6));
  REQUIRE(near(G, u.t().mm(x), u.abs().t().mm(x.abs()), 1e-6));
}

} // namespace

TEST_CASE("Skinny products agree with float64 on every path", "[skinny]") {
  const std::vector<int64_t> ranks{1, 3, 8, 20};
  for (auto isa : paths()) {
    const Path path(isa);
    CAPTURE(static_cast<int>(isa));
    size_t turn = 0; // every rank meets every width
    for (int64_t n : {0, 1, 3, 17, 100}) {
      for (int64_t width : {1, 3, 7, 17, 100, 769, 1100}) {
        const auto r = ranks[turn % 4], other = ranks[(turn + 2) % 4];
        const int64_t gap = static_cast<int64_t>(turn % 3) * 5;
        check<float>(n, width, r, gap);
        check<c10::BFloat16>(n, width, other, gap);
        ++turn;
      }
    }
  }
}

TEST_CASE("Skinny products do not depend on the threads", "[skinny]") {
  const int before = torch::get_num_threads();
  const int64_t n = 611, r = 8;
  for (auto isa : paths()) {
    const Path path(isa);
    for (int64_t width : {512, 513}) {
      seed();
      const auto x = torch::randn({n, width}), A = torch::randn({r, width});
      const auto u = torch::randn({n, r});
      auto floats = [](const Tensor& tensor) {
        return tensor.data_ptr<float>();
      };
      // t, y, dt and twice G.
      auto results = [&](int threads) {
        std::vector<Tensor> out;
        for (auto sizes : std::vector<std::vector<int64_t>>{
                 {n, r}, {n, width}, {n, r}, {r, width}, {r, width}}) {
          out.push_back(torch::empty(sizes));
        }
        const float *px = floats(x), *pA = floats(A), *pu = floats(u);
        std::vector<float*> p;
        for (const auto& tensor : out) {
          p.push_back(floats(tensor));
        }
        torch::set_num_threads(threads);
        cpu::project(px, width, pA, p[0], n, width, r, 1.0f);
        cpu::expand<float>(pu, pA, nullptr, p[1], width, n, width, r, false);
        cpu::project_and_outer(
            px, width, pA, pu, p[2], p[3], n, width, r, 1.0f);
        cpu::outer(px, width, pu, p[4], n, width, r);
        torch::set_num_threads(1);
        return out;
      };
      const auto alone = results(1);
      const auto size = u.abs().t().mm(x.abs()).to(torch::kDouble);
      for (int threads : {2, 3}) {
        const auto some = results(threads), again = results(threads);
        for (size_t i = 0; i < some.size(); ++i) {
          CAPTURE(threads, i);
          REQUIRE(equal_bits(some[i], again[i]));
          if (i < 3) {
            REQUIRE(equal_bits(some[i], alone[i]));
          } else {
            REQUIRE(near(some[i], alone[i].to(torch::kDouble), size, 1e-6));
          }
        }
      }
    }
  }
  torch::set_num_threads(before);
}

TEST_CASE("Skinny products pass on what is not finite", "[skinny]") {
  const float inf = std::numeric_limits<float>::infinity();
  for (auto isa : paths()) {
    const Path path(isa);
    const auto t = torch::tensor({{1.0f}, {inf}, {NAN}, {-inf}});
    const auto BT = torch::ones({1, 19});
    auto y = torch::empty({4, 19}, torch::kBFloat16);
    cpu::expand<c10::BFloat16>(
        t.data_ptr<float>(),
        BT.data_ptr<float>(),
        nullptr,
        y.data_ptr<c10::BFloat16>(),
        19,
        4,
        19,
        1,
        false);
    REQUIRE(equal_bits(y, t.expand({4, 19}).to(torch::kBFloat16).contiguous()));
  }
}

TEST_CASE("bfloat16 is rounded as LibTorch rounds it", "[skinny]") {
  // Every exponent, and mantissas around the ties.
  std::vector<float> values;
  for (uint32_t high = 0; high < 0x10000u; high += 7) {
    for (uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      const uint32_t word = high << 16 | low;
      float value;
      std::memcpy(&value, &word, sizeof(value));
      values.push_back(value);
    }
  }
  const auto one = torch::ones({1, 1});
  const auto row = torch::tensor(values).unsqueeze(0);
  for (auto isa : paths()) {
    const Path path(isa);
    auto y = torch::empty({1, row.size(1)}, torch::kBFloat16);
    cpu::expand<c10::BFloat16>(
        one.data_ptr<float>(),
        row.data_ptr<float>(),
        nullptr,
        y.data_ptr<c10::BFloat16>(),
        row.size(1),
        1,
        row.size(1),
        1,
        false);
    REQUIRE(torch::equal(y.isnan(), row.isnan()));
    // 0 + (-0) is 0, hence values and not bits.
    REQUIRE(torch::equal(
        y.nan_to_num(0.0), row.to(torch::kBFloat16).nan_to_num(0.0)));
  }
}

TEST_CASE("Where there are fast kernels they are preferred", "[skinny]") {
  REQUIRE(cpu::prefers_skinny(1024, 768, 8) == cpu::has_fast_skinny());
  REQUIRE_FALSE(cpu::prefers_skinny(4096, 4096, 256));
  const Path path(cpu::Isa::kPlain);
  REQUIRE_FALSE(cpu::has_fast_skinny());
}

TEST_CASE("Transposing there and back", "[skinny]") {
  for (int64_t m : {1, 7, 100, 769}) {
    for (int64_t r : {1, 3, 8, 20}) {
      const auto B = torch::randn({m, r});
      auto BT = torch::empty({r, m}), back = torch::empty({m, r});
      cpu::transpose(B.data_ptr<float>(), BT.data_ptr<float>(), m, r);
      cpu::transpose(BT.data_ptr<float>(), back.data_ptr<float>(), r, m);
      REQUIRE(equal_bits(BT, B.t().contiguous()));
      REQUIRE(equal_bits(back, B));
    }
  }
}

TEST_CASE("A mask is drawn by LibTorch's generator", "[dropout]") {
  torch::manual_seed(5);
  const auto a = draw_dropout(0.1), b = draw_dropout(0.1);
  torch::manual_seed(5);
  const auto again = draw_dropout(0.1);
  REQUIRE(a.seed == again.seed);
  REQUIRE(a.seed != b.seed);
  torch::manual_seed(5);
  const auto before = torch::rand({4});
  torch::manual_seed(5);
  REQUIRE_FALSE(draw_dropout(0.0).active());
  REQUIRE(equal_bits(torch::rand({4}), before));
}

TEST_CASE("A mask has the dtype and the values that were asked", "[dropout]") {
  const CounterDropout dropout{7, 0.75};
  for (auto dtype : {torch::kFloat, torch::kDouble, torch::kBFloat16}) {
    const auto mask = dropout_mask(dropout, 5, 33, dtype);
    REQUIRE(mask.scalar_type() == dtype);
    REQUIRE(mask.eq(0).logical_or(mask.eq(4)).all().item<bool>());
  }
  REQUIRE(dropout_mask(dropout, 0, 33, torch::kFloat).numel() == 0);
  REQUIRE(
      dropout_mask({7, 0.0}, 5, 33, torch::kFloat).eq(1).all().item<bool>());
  REQUIRE(
      dropout_mask({7, 1.0}, 5, 33, torch::kFloat).eq(0).all().item<bool>());
}

TEST_CASE("A mask looks like independent draws", "[dropout]") {
  const int64_t n = 1024, k = 768;
  for (double p : {0.05, 0.1, 0.5, 0.9}) {
    CAPTURE(p);
    const double variance = p * (1 - p);
    // Standardised indicators: mean 0 and variance 1 if the draws are fair.
    auto indicators = [&](uint64_t seed) {
      const auto mask = dropout_mask({seed, p}, n, k, torch::kDouble);
      return (mask.ne(0).to(torch::kDouble) - (1 - p)) / std::sqrt(variance);
    };
    // Six standard deviations of a mean of `count` independent draws.
    auto fair = [](const Tensor& product) {
      const double mean = product.mean().item<double>();
      return std::abs(mean) * std::sqrt(double(product.numel())) < 6.0;
    };
    // Sums of a line: their variance is that of independent draws.
    auto spread = [](const Tensor& z, int64_t dim) {
      const auto sums = z.sum(dim) / std::sqrt(double(z.size(dim)));
      const double squares = sums.square().mean().item<double>();
      const double deviation = std::sqrt(2.0 / double(sums.numel()));
      return std::abs(squares - 1.0) < 6.0 * deviation &&
          sums.abs().max().item<double>() < 6.0;
    };
    const auto z = indicators(1);
    REQUIRE(fair(z));
    REQUIRE(spread(z, 0));
    REQUIRE(spread(z, 1));
    for (int64_t step : {1, 2, 3, 4, 8, 16, 64, 256}) {
      CAPTURE(step);
      REQUIRE(fair(z.narrow(1, 0, k - step) * z.narrow(1, step, k - step)));
      REQUIRE(fair(z.narrow(0, 0, n - step) * z.narrow(0, step, n - step)));
      REQUIRE(fair(
          z.narrow(0, 0, n - step).narrow(1, 0, k - step) *
          z.narrow(0, step, n - step).narrow(1, step, k - step)));
    }
    for (uint64_t other :
         {uint64_t(0),
          uint64_t(2),
          uint64_t(3),
          uint64_t(1) << 32,
          uint64_t(1) << 63,
          uint64_t(0x9e3779b97f4a7c15)}) {
      CAPTURE(other);
      REQUIRE(fair(z * indicators(other)));
    }
  }
}

} // namespace test_skinny
