// Generation against what transformers generates (golden/make_models.py).

#include "decoders.h"

#include <peft/models/generation.h>

#include <limits>
#include <string>
#include <vector>

namespace test_generation {

namespace {

using decoders::Gpt2;
using decoders::Llama;
using peft::models::filter_logits;
using peft::models::generate;
using peft::models::GenerationOptions;
using peft::models::next_tokens;
using torch::Tensor;

GenerationOptions eight() {
  return GenerationOptions().max_new_tokens(8);
}

/// Greedy generation that computes everything anew for every token.
template <class Model>
Tensor generate_uncached(Model& model, Tensor ids, Tensor mask, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const auto positions = (mask.cumsum(1) - 1).clamp_min(0);
    const auto logits = model->forward(ids, mask, positions).select(1, -1);
    ids = at::cat({ids, logits.argmax(-1, /*keepdim=*/true)}, 1);
    mask = torch::constant_pad_nd(mask, {0, 1}, 1);
  }
  return ids;
}

/// Logits `[batch, 1, vocab]` that name `tokens`.
Tensor naming(const std::vector<int64_t>& tokens) {
  return torch::one_hot(torch::tensor(tokens, torch::kLong), 10)
      .to(torch::kFloat)
      .unsqueeze(1);
}

} // namespace

TEMPLATE_TEST_CASE(
    "Greedy generation writes what transformers writes",
    "[generation]",
    Gpt2,
    Llama) {
  auto model = decoders::load<TestType>();
  auto want = decoders::reference<TestType>();
  const auto ids = want.at("left.input_ids");
  const auto mask = want.at("left.attention_mask");
  REQUIRE(torch::equal(
      generate(model, ids, mask, eight()), want.at("generate.left")));
  const auto row = ids.slice(0, 0, 1);
  for (const auto& m : {Tensor(), mask.slice(0, 0, 1)}) {
    REQUIRE(torch::equal(
        generate(model, row, m, eight()), want.at("generate.plain")));
  }
  const auto until_end =
      eight()
          .eos_token_id(want.at("generate.end_token").template item<int64_t>())
          .pad_token_id(0);
  REQUIRE(torch::equal(
      generate(model, ids, mask, until_end),
      want.at("generate.left_until_end")));
}

TEMPLATE_TEST_CASE(
    "Generation with the cache equals generation without, adapted or not",
    "[generation]",
    Gpt2,
    Llama) {
  auto model = decoders::load<TestType>();
  auto want = decoders::reference<TestType>();
  const auto ids = want.at("left.input_ids");
  const auto mask = want.at("left.attention_mask");
  REQUIRE(torch::equal(
      generate(model, ids, mask, eight()),
      generate_uncached(model, ids, mask, 8)));
  seed();
  auto adapter = peft::attach(*model, TestType::lora());
  const auto adapted = generate(model, ids, mask, eight());
  REQUIRE(torch::equal(adapted, generate_uncached(model, ids, mask, 8)));
  REQUIRE_FALSE(torch::equal(adapted, want.at("generate.left")));
  adapter.merge();
  REQUIRE(torch::equal(generate(model, ids, mask, eight()), adapted));
  adapter.unmerge();
  adapter.disable();
  REQUIRE(torch::equal(
      generate(model, ids, mask, eight()), want.at("generate.left")));
}

TEST_CASE("A row ends at its own end token", "[generation]") {
  const std::vector<std::vector<int64_t>> script{
      {1, 2, 3}, {9, 4, 5}, {6, 9, 7}, {8, 8, 9}, {1, 1, 1}};
  size_t steps = 0;
  std::vector<int64_t> seen;
  const auto step = [&](const Tensor& tokens) {
    seen.push_back(tokens.size(1));
    return naming(script.at(steps++));
  };
  const auto start = torch::zeros({3, 2}, torch::kLong);
  const auto options = GenerationOptions().max_new_tokens(5).eos_token_id(9);
  const auto written = peft::models::extend_sequences(
      start, GenerationOptions(options).pad_token_id(0), step);
  REQUIRE(torch::equal(
      written.slice(1, 2),
      torch::tensor({{1, 9, 0, 0}, {2, 4, 9, 0}, {3, 5, 7, 9}}, torch::kLong)));
  REQUIRE(seen == std::vector<int64_t>{2, 1, 1, 1}); // all rows have ended

  steps = 0;
  REQUIRE(torch::equal( // padded with the end token
      peft::models::extend_sequences(start, options, step)[0],
      torch::tensor({0, 0, 1, 9, 9, 9}, torch::kLong)));
  steps = 0;
  REQUIRE(torch::equal( // without one, every row goes on
      peft::models::extend_sequences(
          start, GenerationOptions().max_new_tokens(5), step)[0],
      torch::tensor({0, 0, 1, 9, 6, 8, 1}, torch::kLong)));
}

TEST_CASE("Logits are filtered as transformers filters them", "[generation]") {
  const float no = -std::numeric_limits<float>::infinity();
  const auto logits = torch::tensor(
      {{1.5, -0.5, 0.25, 2.0, 0.0, -1.25, 1.0, 0.75},
       {0.625, 0.5, 3.0, -2.0, 0.1, 0.2, -0.3, 0.4}},
      torch::kFloat);
  const auto filtered = [&](double temperature, int64_t k, double p) {
    return filter_logits(
        logits, GenerationOptions().temperature(temperature).top_k(k).top_p(p));
  };
  // TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper.
  REQUIRE(equal_bits(
      filtered(1, 3, 1),
      torch::tensor(
          {{1.5f, no, no, 2.0f, no, no, 1.0f, no},
           {0.625f, 0.5f, 3.0f, no, no, no, no, no}})));
  REQUIRE(equal_bits(
      filtered(0.5, 0, 0.8),
      torch::tensor(
          {{3.0f, no, no, 4.0f, no, no, no, no},
           {no, no, 6.0f, no, no, no, no, no}})));
  REQUIRE(equal_bits(
      filtered(2, 4, 0.6),
      torch::tensor(
          {{0.75f, no, no, 1.0f, no, no, no, no},
           {0.3125f, no, 1.5f, no, no, no, no, no}})));
  const auto best = torch::tensor(
      {{no, no, no, 2.0f, no, no, no, no}, {no, no, 3.0f, no, no, no, no, no}});
  REQUIRE(equal_bits(filtered(1, 0, 0.05), best));
  REQUIRE(equal_bits(filtered(1, 0, 1e-12), best)); // 1 - p rounds to 1
  REQUIRE(equal_bits(filtered(1, 100, 1), logits));
}

TEST_CASE("Sampling draws by probability and repeats by seed", "[generation]") {
  const auto probabilities =
      torch::tensor({0.5, 0.0, 0.3, 0.2}, torch::kDouble);
  const auto logits = probabilities.log().expand({20000, 4});
  const auto options = GenerationOptions().do_sample(true);
  seed();
  const auto drawn = next_tokens(logits, options);
  const auto frequencies = torch::bincount(drawn, {}, 4) / 20000.0;
  // Four standard deviations of a frequency are 0.0142 at most.
  REQUIRE(close(frequencies, probabilities, 0, 0.0142));
  REQUIRE(torch::bincount(drawn, {}, 4)[1].item<int64_t>() == 0);
  seed();
  REQUIRE(torch::equal(next_tokens(logits, options), drawn));
  REQUIRE_FALSE(torch::equal(next_tokens(logits, options), drawn));

  REQUIRE(torch::equal( // greedy reads none of it
      next_tokens(logits, GenerationOptions().temperature(5).top_k(3)),
      torch::zeros({20000}, torch::kLong)));
}

TEMPLATE_TEST_CASE(
    "Sampled generation repeats by seed and narrows to the greedy one",
    "[generation]",
    Gpt2,
    Llama) {
  auto model = decoders::load<TestType>();
  auto want = decoders::reference<TestType>();
  const auto ids = want.at("left.input_ids");
  const auto mask = want.at("left.attention_mask");
  const auto sampled = [&](GenerationOptions options, uint64_t number) {
    seed(number);
    return generate(model, ids, mask, options.do_sample(true));
  };
  REQUIRE(torch::equal(sampled(eight(), 1), sampled(eight(), 1)));
  REQUIRE_FALSE(torch::equal(sampled(eight(), 1), sampled(eight(), 2)));
  REQUIRE(torch::equal(sampled(eight().top_k(1), 1), want.at("generate.left")));
  REQUIRE(
      torch::equal(sampled(eight().top_p(1e-6), 1), want.at("generate.left")));
}

TEST_CASE("Generation makes no graph", "[generation]") {
  auto model = decoders::load<Gpt2>();
  bool had_graph = true;
  peft::models::extend_sequences(
      torch::ones({1, 2}, torch::kLong),
      GenerationOptions().max_new_tokens(1),
      [&](const Tensor& tokens) {
        const auto logits = model->forward(tokens);
        had_graph = logits.requires_grad();
        return logits;
      });
  REQUIRE_FALSE(had_graph);
  REQUIRE(model->forward(torch::ones({1, 2}, torch::kLong)).requires_grad());
}

TEST_CASE("What cannot be generated is named", "[generation]") {
  auto model = decoders::load<Gpt2>();
  const auto ids = torch::ones({2, 3}, torch::kLong);
  const auto error = [&](const GenerationOptions& options) {
    return error_of([&] { generate(model, ids, {}, options); });
  };
  CHECK(contains(
      error(eight().max_new_tokens(0)), "max_new_tokens must be positive"));
  CHECK(contains(
      error(eight().temperature(0)), "temperature must be positive, got 0"));
  CHECK(contains(error(eight().top_k(-1)), "top_k must not be negative"));
  CHECK(contains(error(eight().top_p(0)), "top_p must lie in (0, 1]"));
  CHECK(contains(error(eight().top_p(1.5)), "top_p must lie in (0, 1]"));
  CHECK(contains(
      error(eight().max_new_tokens(31)), "more than the 32 positions"));
  CHECK(
      contains(error_of([&] { generate(model, ids[0]); }), "[batch, length]"));
  CHECK(contains(
      error_of([&] {
        generate(model, ids, torch::ones({2, 4}));
      }),
      "[2, 4]"));
  CHECK(contains(
      error_of([&] {
        generate(model, ids, torch::tensor({{1, 1, 1}, {1, 1, 0}}));
      }),
      "pad on the left"));
}

} // namespace test_generation
