/// Soft top-k: the exact solution and the published iteration against
/// equations in Python, finite differences and each other.

#include "adapted.h"
#include "gradcheck.h"
#include "test.h"

#include <peft/functional/soft_topk.h>

#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <vector>

namespace test_soft_topk {

namespace {

using peft::functional::soft_topk;
using peft::functional::soft_topk_iterative;
using peft::functional::top_k_tokens;
using torch::Tensor;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

Tensor scores_of(at::IntArrayRef sizes, double spread = 1.0) {
  return torch::randn(sizes, torch::kDouble) * spread;
}

Tensor row(const std::vector<double>& values) {
  return torch::tensor(values, torch::kDouble);
}

Tensor lengths_mask(const std::vector<int64_t>& lengths, int64_t n) {
  return torch::arange(n) < torch::tensor(lengths).unsqueeze(1);
}

Tensor gradient(const Tensor& lambda, const Tensor& leaf, const Tensor& v) {
  return torch::autograd::grad({(lambda * v).sum()}, {leaf})[0];
}

std::string reference(const std::string& name) {
  return golden("../../reference/data/coda/soft_topk_" + name + ".safetensors");
}

} // namespace

TEST_CASE("soft top-k equals the equations in Python") {
  const std::string name =
      GENERATE("plain", "text", "speech", "wide", "padded");
  INFO(name);
  const auto file = peft::SafetensorsFile::open(reference(name));
  const int64_t k = file.at("k").item<int64_t>();
  const double epsilon = file.at("epsilon").item<double>();
  const Tensor mask = file.at("mask");
  const Tensor direction = file.at("direction");

  const Tensor s = file.at("scores").clone().set_requires_grad(true);
  const Tensor exact = soft_topk(s, k, epsilon, mask);
  CHECK(close(exact, file.at("lambda"), 1e-10, 1e-12));
  CHECK(close(
      gradient(exact, s, direction), file.at("scores.grad"), 1e-9, 1e-10));

  const Tensor steps = soft_topk_iterative(s, k, epsilon, 20, 4.0, 0.7, mask);
  CHECK(close(steps, file.at("iterative"), 1e-10, 1e-12));
  CHECK(close(
      gradient(steps, s, direction), file.at("iterative.grad"), 1e-9, 1e-10));
}

TEST_CASE("soft top-k sums to k within 0 and 1") {
  seed(1);
  for (const double epsilon : {1e-4, 0.03, 0.5, 4.0, 1e6}) {
    for (const int64_t k : {1, 2, 9, 31, 32}) {
      for (const double spread : {0.0, 1e-3, 1.0, 1e3}) {
        INFO("epsilon " << epsilon << " k " << k << " spread " << spread);
        const Tensor lambda = soft_topk(scores_of({6, 32}, spread), k, epsilon);
        CHECK(close(
            lambda.sum(-1), torch::full({6}, k, torch::kDouble), 0, 1e-9));
        CHECK(lambda.min().item<double>() >= 0);
        CHECK(lambda.max().item<double>() <= 1);
      }
    }
  }
}

TEST_CASE("soft top-k is where the unscaled iteration ends") {
  torch::NoGradGuard no_grad;
  seed(2);
  const double epsilon = GENERATE(0.1, 0.3, 1.0);
  const Tensor s = scores_of({4, 24});
  const Tensor mask = lengths_mask({24, 17, 9, 6}, 24);
  const Tensor end =
      soft_topk_iterative(s, 6, epsilon, 20000, epsilon, 1.0, mask);
  CHECK(close(soft_topk(s, 6, epsilon, mask), end, 0, 1e-12));
}

TEST_CASE("twenty steps of the published iteration") {
  torch::NoGradGuard no_grad;
  seed(3);
  const Tensor s = scores_of({8, 1000});
  const auto total = [](const Tensor& lambda) {
    return lambda.sum(-1).mean().item<double>();
  };
  const auto furthest = [&](const Tensor& lambda, double epsilon) {
    return (lambda - soft_topk(s, 100, epsilon)).abs().max().item<double>();
  };
  const Tensor speech = soft_topk_iterative(s, 100, 1.0);
  CHECK(std::abs(total(speech) - 100) < 0.01);
  CHECK(furthest(speech, 1.0) < 1e-3);
  // At the setting for text they stop well before the solution.
  const Tensor text = soft_topk_iterative(s, 100, 0.03);
  CHECK(total(text) > 60);
  CHECK(total(text) < 90);
  CHECK(furthest(text, 0.03) > 0.5);
  const Tensor middle = soft_topk_iterative(s, 100, 0.1);
  CHECK(total(middle) > total(text));
  CHECK(total(middle) < 99);
  // More of them help; without the shrinking epsilon they stop above k.
  CHECK(std::abs(total(soft_topk_iterative(s, 100, 0.03, 200)) - 100) < 0.01);
  CHECK(total(soft_topk_iterative(s, 100, 0.03, 20, 0.03)) > 150);
}

TEST_CASE("soft top-k: gradients") {
  seed(4);
  const double epsilon = GENERATE(0.2, 1.0);
  const Tensor mask = lengths_mask({8, 6, 3, 2, 0}, 8);
  const Tensor direction = scores_of({5, 8});
  const std::vector<Tensor> s{scores_of({5, 8}).set_requires_grad(true)};
  const gradcheck::Function f = [&](const std::vector<Tensor>& in) {
    return soft_topk(in[0], 3, epsilon, mask);
  };
  CHECK(gradcheck::first_order(f, s, direction));
  CHECK(gradcheck::second_order(f, s, direction));

  const Tensor lambda = f(s).detach();
  const Tensor inside = lambda.masked_fill(lambda == 1, 0);
  const Tensor mean = (inside * direction).sum(-1, true) /
      inside.sum(-1, true).clamp_min(1e-300);
  CHECK(close(
      gradient(f(s), s[0], direction),
      inside / epsilon * (direction - mean),
      1e-12,
      1e-13));
}

TEST_CASE("soft top-k iteration: gradients go through the steps") {
  seed(5);
  const Tensor mask = lengths_mask({7, 5, 2, 0}, 7);
  const std::vector<Tensor> s{scores_of({4, 7}).set_requires_grad(true)};
  const gradcheck::Function f = [&](const std::vector<Tensor>& in) {
    return soft_topk_iterative(in[0], 3, 0.5, 6, 4.0, 0.7, mask);
  };
  CHECK(gradcheck::first_order(f, s, scores_of({4, 7})));
  CHECK(gradcheck::second_order(f, s, scores_of({4, 7})));
}

TEST_CASE("soft top-k: nothing to choose between") {
  seed(6);
  const Tensor s = scores_of({3, 9}).set_requires_grad(true);
  const Tensor direction = scores_of({3, 9});
  for (const int64_t k : {9, 10, 1000}) {
    const Tensor lambda = soft_topk(s, k, 0.03);
    CHECK(equal_bits(lambda.detach(), torch::ones_like(lambda)));
    CHECK(
        equal_bits(gradient(lambda, s, direction), torch::zeros_like(lambda)));
  }
  for (int64_t n = 1; n < 12; ++n) {
    const Tensor equal =
        torch::zeros({2, n}, torch::kDouble).set_requires_grad(true);
    const Tensor ones = soft_topk(equal, n, 0.03);
    CHECK(equal_bits(ones.detach(), torch::ones_like(ones)));
    CHECK(equal_bits(
        gradient(ones, equal, scores_of({2, n})), torch::zeros_like(ones)));
  }
  // One row too short, one just long enough, one without anything.
  const Tensor mask = lengths_mask({2, 4, 0}, 9);
  const Tensor lambda = soft_topk(s, 4, 0.03, mask);
  CHECK(equal_bits(lambda.detach(), mask.to(torch::kDouble)));
  CHECK(equal_bits(gradient(lambda, s, direction), torch::zeros_like(lambda)));
  CHECK(soft_topk(torch::randn({5, 1}), 1, 0.1).eq(1).all().item<bool>());
}

TEST_CASE("soft top-k never chooses what is masked") {
  seed(7);
  const Tensor s = scores_of({4, 10}).set_requires_grad(true);
  const Tensor mask = scores_of({4, 10}) > 0;
  Tensor garbage = s.detach().clone();
  for (const double value : {1e30, kInfinity, -kInfinity, double(NAN)}) {
    garbage.masked_fill_(mask.logical_not(), value);
    const Tensor in = garbage.clone().set_requires_grad(true);
    for (const bool exact : {true, false}) {
      const auto solve = [&](const Tensor& x) {
        return exact ? soft_topk(x, 3, 0.2, mask)
                     : soft_topk_iterative(x, 3, 0.2, 20, 4.0, 0.7, mask);
      };
      const Tensor lambda = solve(in);
      CHECK(equal_bits(lambda.detach(), solve(s).detach()));
      const Tensor hidden = lambda.detach().masked_select(mask.logical_not());
      CHECK(equal_bits(hidden, torch::zeros_like(hidden)));
      const Tensor slope = gradient(lambda, in, s.detach());
      CHECK(slope.isfinite().all().item<bool>());
      CHECK(slope.masked_fill(mask, 0).eq(0).all().item<bool>());
    }
  }
  // The same answer as on the row without the masked entries.
  const Tensor alone = s.detach()[1].masked_select(mask[1]);
  CHECK(close(
      soft_topk(s, 3, 0.2, mask).detach()[1].masked_select(mask[1]),
      soft_topk(alone, 3, 0.2)));
}

TEST_CASE("soft top-k: ties") {
  CHECK(close(
      soft_topk(torch::zeros({8}, torch::kDouble), 2, 0.03),
      torch::full({8}, 0.25, torch::kDouble)));
  // The tie for the last place is shared, whatever lies above and below.
  const Tensor s = row({5, 1, 1, -7, 1, 5});
  CHECK(
      close(soft_topk(s, 4, 1e-3), row({1, 2.0 / 3, 2.0 / 3, 0, 2.0 / 3, 1})));
  CHECK(close(soft_topk(s, 5, 1e-3), row({1, 1, 1, 0, 1, 1})));
  // Far from zero too, in float32, where nothing but the tie is left.
  const Tensor far = torch::full({64}, 1e7f);
  CHECK(close(soft_topk(far, 16, 1e-4), torch::full({64}, 0.25f)));
  CHECK(close(
      soft_topk(torch::cat({far, far - 100}), 16, 1e-4),
      torch::cat({torch::full({64}, 0.25f), torch::zeros({64})})));
  CHECK(close(
      soft_topk(torch::cat({far, far + 100}), 80, 1e-4),
      torch::cat({torch::full({64}, 0.25f), torch::ones({64})})));
}

TEST_CASE("soft top-k takes infinite scores as limits") {
  const double i = kInfinity;
  const auto check = [](const Tensor& s, int64_t k, const Tensor& expected) {
    const Tensor in = s.clone().set_requires_grad(true);
    const Tensor lambda = soft_topk(in, k, 0.5);
    CHECK(close(lambda, expected));
    const Tensor slope = gradient(lambda, in, row({1, 2, 3, 4}));
    CHECK(slope.isfinite().all().item<bool>());
    CHECK(slope.masked_select(s.isinf()).eq(0).all().item<bool>());
  };
  const double half = 1 / (1 + std::exp(-2.0));
  check(row({i, 1, 0, -i}), 2, row({1, half, 1 - half, 0}));
  check(row({i, i, 0, i}), 2, row({2.0 / 3, 2.0 / 3, 0, 2.0 / 3}));
  check(row({0, -i, -i, 5}), 3, row({1, 0.5, 0.5, 1}));
  check(row({-i, -i, -i, -i}), 2, row({0.5, 0.5, 0.5, 0.5}));
  check(row({i, -i, 0, 0}), 4, row({1, 1, 1, 1}));
  // A valid -inf is still chosen before what is masked.
  const Tensor mask = torch::tensor({false, true, true, true});
  CHECK(close(
      soft_topk(row({9, -i, 0, -i}), 2, 0.5, mask), row({0, 0.5, 1, 0.5})));
  // NaN is not hidden.
  CHECK(soft_topk(row({NAN, 1, 2, 3}), 2, 0.5).isnan().any().item<bool>());
}

TEST_CASE("soft top-k: small and large epsilon") {
  seed(8);
  const Tensor s = torch::randperm(40).to(torch::kDouble).reshape({2, 20});
  const Tensor best = torch::zeros({2, 20}, torch::kDouble)
                          .scatter(1, std::get<1>(s.topk(7)), 1.0);
  CHECK(close(soft_topk(s, 7, 1e-3), best, 0, 1e-12));
  CHECK(close(
      soft_topk(s.to(torch::kFloat), 7, 1e-4),
      best.to(torch::kFloat),
      0,
      1e-6));
  CHECK(close(
      soft_topk(s, 7, 1e12),
      torch::full({2, 20}, 7.0 / 20, torch::kDouble),
      1e-9,
      0));
}

TEST_CASE("soft top-k moves with its tokens") {
  seed(9);
  const Tensor s = scores_of({3, 30});
  const Tensor order = torch::randperm(30);
  CHECK(close(
      soft_topk(s.index_select(1, order), 8, 0.1),
      soft_topk(s, 8, 0.1).index_select(1, order),
      1e-12,
      1e-14));
  CHECK(close(soft_topk(s + 3.5, 8, 0.1), soft_topk(s, 8, 0.1)));
}

TEST_CASE("soft top-k: a k for each row") {
  seed(12);
  const Tensor s = scores_of({3, 8});
  const Tensor mask = lengths_mask({8, 5, 4}, 8);
  const Tensor k = torch::tensor({{3}, {1}, {6}});
  for (const bool exact : {true, false}) {
    const auto solve =
        [&](const Tensor& x, const auto& number, const Tensor& m) {
          return exact ? soft_topk(x, number, 0.2, m)
                       : soft_topk_iterative(x, number, 0.2, 20, 4.0, 0.7, m);
        };
    const Tensor all = solve(s, k, mask);
    for (const int64_t i : {0, 1, 2}) {
      CHECK(close(
          all[i], solve(s[i], k[i].item<int64_t>(), mask[i]), 1e-12, 1e-14));
    }
  }
}

TEST_CASE("soft top-k: shapes and types") {
  seed(10);
  const Tensor s = scores_of({2, 3, 12});
  const Tensor all = soft_topk(s, 4, 0.3);
  REQUIRE(all.sizes() == s.sizes());
  CHECK(close(soft_topk(s[1][2], 4, 0.3), all[1][2], 1e-12, 1e-14));
  CHECK(
      soft_topk(torch::empty({0, 5}), 2, 0.3).sizes() ==
      std::vector<int64_t>{0, 5});
  CHECK(
      soft_topk(torch::empty({4, 0}), 2, 0.3).sizes() ==
      std::vector<int64_t>{4, 0});
  CHECK(
      soft_topk_iterative(torch::empty({0, 5}), 2, 0.3).sizes() ==
      std::vector<int64_t>{0, 5});

  for (const auto dtype : {torch::kBFloat16, torch::kHalf, torch::kFloat}) {
    const Tensor low = s.to(dtype);
    for (const bool on : {false, true}) {
      INFO(dtype << (on ? " under autocast" : ""));
      std::optional<adapted::Autocast> autocast;
      if (on) {
        autocast.emplace();
      }
      const Tensor found = soft_topk(low, 4, 0.3);
      const Tensor steps = soft_topk_iterative(low, 4, 0.3);
      autocast.reset();
      CHECK(found.scalar_type() == torch::kFloat);
      CHECK(steps.scalar_type() == torch::kFloat);
      CHECK(close(found, soft_topk(low.to(torch::kDouble), 4, 0.3)));
    }
  }
  const Tensor large = torch::randn({1, 4000});
  CHECK(close(
      soft_topk(large, 500, 0.03),
      soft_topk(large.to(torch::kDouble), 500, 0.03),
      0,
      2e-5));
}

TEST_CASE("the tokens that a router takes") {
  const Tensor s =
      torch::tensor({{0.1, 3.0, 2.0, 3.0, -1.0}, {1.0, 1.0, 1.0, 1.0, 1.0}});
  const auto chosen = top_k_tokens(s, 3);
  CHECK(torch::equal(chosen.indices, torch::tensor({{1, 2, 3}, {0, 1, 2}})));
  CHECK(chosen.valid.all().item<bool>());
  CHECK(torch::equal(top_k_tokens(s, 1).indices, torch::tensor({{1}, {0}})));
  CHECK(torch::equal(
      top_k_tokens(s, 5).indices, torch::arange(5).expand({2, 5})));

  // Masked tokens only fill up, even where valid ones have -inf.
  const Tensor low = s.masked_fill(s == 3.0, -kInfinity);
  const Tensor mask = torch::tensor(
      {{false, true, false, true, false}, {true, false, false, true, true}});
  const auto few = top_k_tokens(low, 3, mask);
  CHECK(torch::equal(few.indices, torch::tensor({{0, 1, 3}, {0, 3, 4}})));
  CHECK(torch::equal(
      few.valid, torch::tensor({{false, true, true}, {true, true, true}})));
  const auto none = top_k_tokens(s, 2, torch::zeros({2, 5}, torch::kBool));
  CHECK_FALSE(none.valid.any().item<bool>());

  // A k for each row.
  const auto own = top_k_tokens(s, 3, {}, torch::tensor({{3}, {1}}));
  CHECK(torch::equal(own.indices, torch::tensor({{1, 2, 3}, {0, 1, 2}})));
  CHECK(torch::equal(
      own.valid, torch::tensor({{true, true, true}, {true, false, false}})));

  // The k largest lambda are at these places.
  seed(11);
  const Tensor many = scores_of({5, 200});
  const auto taken = top_k_tokens(many, 40);
  const Tensor lambda = soft_topk(many, 40, 0.3);
  const Tensor left = lambda.scatter(1, taken.indices, -1.0);
  CHECK((lambda.gather(1, taken.indices).amin(1) >= left.amax(1))
            .all()
            .item<bool>());
}

TEST_CASE("soft top-k: what is refused") {
  const Tensor s = torch::randn({2, 5});
  const Tensor mask = torch::ones({2, 5}, torch::kBool);
  CHECK(contains(error_of([&] { soft_topk(s, 0, 0.1); }), "at least 1, got 0"));
  CHECK(contains(error_of([&] { top_k_tokens(s, -2); }), "at least 1, got -2"));
  CHECK(contains(
      error_of([&] { top_k_tokens(s, 6); }), "cannot choose 6 of 5 tokens"));
  for (const double epsilon : {0.0, -1.0, kInfinity, double(NAN)}) {
    CHECK(contains(
        error_of([&] { soft_topk(s, 2, epsilon); }), "must be positive"));
  }
  CHECK(contains(
      error_of([&] { soft_topk(s, 2, 0.1, mask[0]); }),
      "has the shape of the scores [2, 5]"));
  CHECK(contains(
      error_of([&] { soft_topk(s, 2, 0.1, mask.to(torch::kInt)); }),
      "the mask of top-k is boolean"));
  CHECK(contains(
      error_of([&] { soft_topk(torch::tensor(1.0), 1, 0.1); }),
      "takes scores [*, n]"));
  CHECK(contains(
      error_of([&] { soft_topk(torch::arange(4), 1, 0.1); }),
      "of a floating point type"));
  CHECK(contains(
      error_of([&] { soft_topk_iterative(s, 2, 0.1, 0); }),
      "at least one iteration, got 0"));
  CHECK(contains(
      error_of([&] { soft_topk_iterative(s, 2, 0.1, 20, 4.0, 1.5); }),
      "epsilon_decay <= 1, got 4 and 1.5"));
}

} // namespace test_soft_topk
