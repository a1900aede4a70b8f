#include <peft/functional/lora.h>

#include "gradcheck.h"
#include "test.h"

#include <optional>
#include <vector>

namespace test_fused_lora {

using peft::functional::lora_linear;
using torch::Tensor;

namespace {

/// What the formula needs, in one dtype.
struct Problem {
  Tensor x, W, b, A, B;
  double scale = 0.7;

  Problem(at::IntArrayRef lead, int64_t in, int64_t out, int64_t r) {
    auto sizes = lead.vec();
    sizes.push_back(in);
    x = torch::randn(sizes, torch::kDouble);
    W = torch::randn({out, in}, torch::kDouble);
    b = torch::randn({out}, torch::kDouble);
    A = torch::randn({r, in}, torch::kDouble);
    B = torch::randn({out, r}, torch::kDouble);
  }

  /// The same numbers, rounded to other dtypes, as leaves that train.
  Problem to(at::ScalarType base, at::ScalarType factors) const {
    Problem p = *this;
    p.x = x.to(base).detach().requires_grad_();
    p.W = W.to(base);
    p.b = b.to(base);
    p.A = A.to(factors).detach().requires_grad_();
    p.B = B.to(factors).detach().requires_grad_();
    return p;
  }

  Tensor run(double dropout = 0.0) const {
    return lora_linear(x, W, b, A, B, scale, dropout);
  }
  std::vector<Tensor> gradients(const Tensor& y, const Tensor& dy) const {
    return torch::autograd::grad({y}, {x, A, B}, {dy});
  }
};

/// Largest difference in units of the largest number of `right`.
double error(const Tensor& value, const Tensor& right) {
  if (right.numel() == 0) {
    return 0.0;
  }
  const double largest = right.abs().max().item<double>();
  return (value.to(torch::kDouble) - right).abs().max().item<double>() /
      std::max(largest, 1e-30);
}

/// Both ways: by the CPU kernels and by torch operators.
struct WithKernels {
  explicit WithKernels(bool on) {
    peft::functional::detail::kernels_chosen = on;
  }
  ~WithKernels() {
    peft::functional::detail::kernels_chosen.reset();
  }
};

} // namespace

TEST_CASE("float32: result and gradients are those of the formula in float64") {
  const bool kernels = GENERATE(false, true);
  const auto lead = GENERATE(
      std::vector<int64_t>{1},
      std::vector<int64_t>{17},
      std::vector<int64_t>{3, 5},
      std::vector<int64_t>{2, 2, 8},
      std::vector<int64_t>{0},
      std::vector<int64_t>{2, 0});
  const int64_t r = GENERATE(1, 4, 8, 11);
  WithKernels way(kernels);
  seed(1);
  const Problem given(lead, 37, 29, r);
  const Problem single = given.to(torch::kFloat, torch::kFloat);
  const Problem right = single.to(torch::kDouble, torch::kDouble);
  const Tensor y = single.run();
  const Tensor expected =
      at::linear(right.x, right.W + 0.7 * at::mm(right.B, right.A), right.b);
  REQUIRE(y.sizes() == expected.sizes());
  CHECK(error(y, expected) < 1e-6);
  const Tensor dy = torch::randn(y.sizes());
  const auto found = single.gradients(y, dy);
  const auto wanted = right.gradients(expected, dy.to(torch::kDouble));
  for (size_t i = 0; i < found.size(); ++i) {
    CHECK(found[i].sizes() == wanted[i].sizes());
    CHECK(error(found[i], wanted[i]) < 2e-6);
  }
}

TEST_CASE("inputs that are not rows of numbers side by side") {
  const bool kernels = GENERATE(false, true);
  WithKernels way(kernels);
  seed(2);
  const Problem p = Problem({12}, 20, 10, 4).to(torch::kFloat, torch::kFloat);
  const Tensor expected = p.run();
  const Tensor dy = torch::randn({12, 10});
  const auto wanted = p.gradients(expected, dy);
  Problem q = p;
  q.x = p.x.detach().t().contiguous().t().requires_grad_(); // column by column
  CHECK(close(q.run(), expected));
  const auto found = q.gradients(q.run(), dy.t().contiguous().t());
  for (size_t i = 0; i < found.size(); ++i) {
    CHECK(close(found[i], wanted[i]));
  }
  // Rows apart, as of a slice; a gradient with stride 0, as of sum().
  const Tensor wide = torch::cat({p.x.detach(), p.x.detach()}, 1);
  q.x = wide.slice(1, 20, 40).detach().requires_grad_();
  CHECK(close(q.run(), expected));
  const Tensor ones = torch::ones({1}).expand({12, 10});
  const auto of_sum = q.gradients(q.run(), ones);
  const auto same = p.gradients(p.run(), ones.contiguous());
  for (size_t i = 0; i < of_sum.size(); ++i) {
    CHECK(close(of_sum[i], same[i]));
  }
}

TEST_CASE("the result may be changed in place, and x may not") {
  seed(3);
  const Problem p = Problem({2, 6}, 9, 7, 3).to(torch::kFloat, torch::kFloat);
  Tensor y = p.run();
  CHECK_NOTHROW(y.relu_().sum().backward());
  Tensor x = p.x * 1.0;
  y = lora_linear(x, p.W, p.b, p.A, p.B, p.scale);
  x.add_(1.0);
  CHECK_THROWS_WITH(
      y.sum().backward(), Catch::Contains("modified by an inplace operation"));
}

TEST_CASE("only what is asked for is kept and computed") {
  const bool kernels = GENERATE(false, true);
  WithKernels way(kernels);
  seed(4);
  const Problem p = Problem({9}, 8, 6, 2).to(torch::kFloat, torch::kFloat);
  const Tensor dy = torch::randn({9, 6});
  const auto wanted = p.gradients(p.run(), dy);
  for (int subset = 1; subset < 8; ++subset) {
    Problem q = p;
    q.x = p.x.detach().clone().requires_grad_((subset & 1) != 0);
    q.A = p.A.detach().requires_grad_((subset & 2) != 0);
    q.B = p.B.detach().requires_grad_((subset & 4) != 0);
    Tensor y = q.run();
    if ((subset & 2) == 0) { // nobody needs the input: it may change, or go
      torch::NoGradGuard no_grad;
      q.x.zero_();
    }
    y.backward(dy);
    const Tensor leaves[] = {q.x, q.A, q.B};
    for (size_t i = 0; i < 3; ++i) {
      const bool asked = ((subset >> i) & 1) != 0;
      REQUIRE(leaves[i].grad().defined() == asked);
      if (asked) {
        CHECK(close(leaves[i].grad(), wanted[i]));
      }
    }
  }
}

TEST_CASE("dropout is the same in both passes and comes from the seed") {
  const bool kernels = GENERATE(false, true);
  const double rate = GENERATE(0.1, 0.5, 0.9);
  WithKernels way(kernels);
  seed(5);
  const Problem p =
      Problem({4, 30}, 50, 16, 4).to(torch::kFloat, torch::kFloat);
  const Tensor dy = torch::randn({4, 30, 16});
  torch::manual_seed(9);
  const Tensor y = p.run(rate);
  const auto found = p.gradients(y, dy);
  torch::manual_seed(9);
  CHECK(equal_bits(p.run(rate), y));
  CHECK_FALSE(equal_bits(p.run(rate), y));

  torch::manual_seed(9);
  const auto drawn = peft::functional::draw_dropout(rate);
  const Problem right = p.to(torch::kDouble, torch::kDouble);
  const Tensor mask =
      peft::functional::dropout_mask(drawn, 120, 50, right.x.options());
  const Tensor kept = right.x * mask.view({4, 30, 50});
  const Tensor expected = at::linear(right.x, right.W, right.b) +
      0.7 * at::linear(at::linear(kept, right.A), right.B);
  CHECK(error(y, expected) < 1e-6);
  const auto wanted = right.gradients(expected, dy.to(torch::kDouble));
  for (size_t i = 0; i < found.size(); ++i) {
    CHECK(error(found[i], wanted[i]) < 2e-6);
  }
}

TEST_CASE("dropout agrees with finite differences, first and second order") {
  seed(6);
  const Problem p({5}, 3, 4, 2);
  const auto f = [&](const gradcheck::Tensors& in) {
    torch::manual_seed(11); // the same mask every time
    return lora_linear(in[0], p.W, p.b, in[1], in[2], 0.7, 0.4);
  };
  for (int subset = 1; subset < 8; ++subset) {
    gradcheck::Tensors inputs = {p.x.clone(), p.A.clone(), p.B.clone()};
    for (size_t i = 0; i < 3; ++i) {
      inputs[i].set_requires_grad(((subset >> i) & 1) != 0);
    }
    INFO("inputs that require grad: " << subset);
    const Tensor direction = torch::randn({5, 4}, torch::kDouble);
    CHECK(gradcheck::first_order(f, inputs, direction));
    CHECK(gradcheck::second_order(f, inputs, direction));
  }
}

TEST_CASE("a bfloat16 base beside float32 factors") {
  const bool kernels = GENERATE(false, true);
  const double rate = GENERATE(0.0, 0.5);
  WithKernels way(kernels);
  seed(7);
  const Problem half =
      Problem({24}, 64, 48, 8).to(torch::kBFloat16, torch::kFloat);
  const Problem right = half.to(torch::kDouble, torch::kDouble);
  torch::manual_seed(3);
  const Tensor y = half.run(rate);
  torch::manual_seed(3);
  Tensor mask = torch::ones({24, 64}, torch::kDouble);
  if (rate > 0.0) {
    mask = peft::functional::dropout_mask(
        peft::functional::draw_dropout(rate), 24, 64, mask.options());
  }
  const Tensor expected = at::linear(right.x, right.W, right.b) +
      0.7 * at::linear(at::linear(right.x * mask, right.A), right.B);
  CHECK(y.scalar_type() == torch::kBFloat16);
  CHECK(error(y, expected) < 8e-3); // two roundings to 8 bits
  const Tensor dy = torch::randn({24, 48}).to(torch::kBFloat16);
  const auto found = half.gradients(y, dy);
  const auto wanted = right.gradients(expected, dy.to(torch::kDouble));
  CHECK(found[0].scalar_type() == torch::kBFloat16);
  CHECK(found[1].scalar_type() == torch::kFloat);
  CHECK(error(found[0], wanted[0]) < 8e-3);
  CHECK(error(found[1], wanted[1]) < 2e-6);
  CHECK(error(found[2], wanted[2]) < 2e-6);
}

TEST_CASE("inference tensors, inference mode and autocast") {
  const bool kernels = GENERATE(false, true);
  WithKernels way(kernels);
  seed(8);
  const Problem p = Problem({16}, 12, 10, 3).to(torch::kFloat, torch::kFloat);
  const Tensor expected = p.run().detach();
  {
    c10::InferenceMode mode;
    CHECK(close(p.run(), expected));
  }
  Problem frozen = p;
  {
    c10::InferenceMode mode;
    frozen.W = p.W.clone();
  }
  const Tensor y = frozen.run();
  const Tensor dy = torch::randn({16, 10});
  const auto found = frozen.gradients(y, dy);
  const auto wanted = p.gradients(p.run(), dy);
  for (size_t i = 0; i < found.size(); ++i) {
    CHECK(close(found[i], wanted[i]));
  }
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const Tensor low = p.run();
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  CHECK(low.scalar_type() == torch::kBFloat16);
  CHECK(error(low.detach(), expected.to(torch::kDouble)) < 2e-2);
}

TEST_CASE("B = 0 leaves the base as it is, to the bit") {
  const bool kernels = GENERATE(false, true);
  const bool has_bias = GENERATE(false, true);
  const int64_t n = GENERATE(1, 16, 100);
  WithKernels way(kernels);
  seed(10);
  Problem p = Problem({n}, 64, 96, 8).to(torch::kFloat, torch::kFloat);
  const auto bias = has_bias ? std::optional<Tensor>(p.b) : std::nullopt;
  torch::NoGradGuard no_grad;
  p.B.zero_();
  CHECK(equal_bits(
      lora_linear(p.x, p.W, bias, p.A, p.B, 0.7), at::linear(p.x, p.W, bias)));
}

TEST_CASE("what does not fit is torch's error, and a bias may broadcast") {
  const bool kernels = GENERATE(false, true);
  const int64_t width = GENERATE(5, 80); // of an input to a weight of 20
  WithKernels way(kernels);
  seed(12);
  const Problem p = Problem({12}, 20, 10, 4).to(torch::kFloat, torch::kFloat);
  Problem q = p;
  q.x = torch::randn({12, width});
  CHECK_THROWS_AS(q.run(), c10::Error);
  q = p;
  q.A = torch::randn({4, width});
  CHECK_THROWS_AS(q.run(), c10::Error);
  q = p;
  q.B = torch::randn({width, 4});
  CHECK_THROWS_AS(q.run(), c10::Error);
  q = p;
  q.b = torch::randn({1}).requires_grad_();
  Tensor wide = q.b.detach().expand({10}).contiguous();
  const Tensor y = q.run();
  CHECK(close(y, lora_linear(p.x, p.W, wide, p.A, p.B, p.scale)));
  y.sum().backward();
  CHECK(close(q.b.grad(), torch::full({1}, 120.f)));
}

} // namespace test_fused_lora
