// Call sites: adapters that act in a network's forward and not on a weight.

#include "model_state.h"
#include "test.h"

#include <peft/core/extra_tokens.h>
#include <peft/core/layer_loop.h>

namespace test_call_sites {

using torch::Tensor;

namespace {

/// A stack of one's own with the two lines.
struct StackImpl : torch::nn::Cloneable<StackImpl> {
  StackImpl() {
    reset();
  }
  void reset() override {
    extra_tokens = register_module(
        "extra_tokens",
        peft::ExtraTokens(peft::ExtraTokensOptions(4, 2, 2, 2)));
    layers = register_module("layers", torch::nn::ModuleList());
    for (int i = 0; i < 2; ++i) {
      layers->push_back(torch::nn::Linear(4, 4));
    }
    layer_loop = register_module(
        "layer_loop", peft::LayerLoop(peft::LayerLoopOptions(4, 2)));
    norm = register_module(
        "norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({4})));
  }
  Tensor forward(const Tensor& x, const Tensor& mask = {}) {
    auto tokens = extra_tokens->forward({x, mask});
    return layer_loop
        ->forward(
            tokens.embeds,
            tokens.attention_mask,
            *layers,
            [](torch::nn::Module& layer, const peft::LayerCall& call) {
              return at::tanh(
                  layer.as<torch::nn::LinearImpl>()->forward(call.hidden));
            },
            torch::nn::AnyModule(norm))
        .hidden;
  }

  peft::ExtraTokens extra_tokens{nullptr};
  torch::nn::ModuleList layers{nullptr};
  peft::LayerLoop layer_loop{nullptr};
  torch::nn::LayerNorm norm{nullptr};
};
TORCH_MODULE(Stack);

/// One embedding in front.
struct OneToken final : peft::TokensDelta {
  OneToken() {
    token = register_parameter("token", torch::ones({1, 4}));
  }
  int64_t num_virtual_tokens() const override {
    return 1;
  }
  Tensor embeddings(double scale) const override {
    return token * scale;
  }
  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    return {{"token", token}};
  }
  std::shared_ptr<peft::Delta> copy() const override {
    auto result = std::make_shared<OneToken>();
    torch::NoGradGuard no_grad;
    result->token.copy_(token);
    return result;
  }
  std::string describe() const override {
    return "one token";
  }
  Tensor token;
};

/// Adds a vector to what each layer gives.
struct AfterLayer final : peft::LoopDelta {
  AfterLayer() {
    shift = register_parameter("shift", torch::ones({4}));
  }
  Tensor layer(
      const peft::LayerCall& call,
      const peft::LayerLoopRun&,
      const std::function<Tensor(const peft::LayerCall&)>& below,
      double scale) const override {
    return below(call) + shift * scale;
  }
  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    return {{"shift", shift}};
  }
  std::shared_ptr<peft::Delta> copy() const override {
    auto result = std::make_shared<AfterLayer>();
    torch::NoGradGuard no_grad;
    result->shift.copy_(shift);
    return result;
  }
  std::string describe() const override {
    return "shift";
  }
  Tensor shift;
};

/// Both of them, as one adapter.
peft::Adapter attach_both(
    torch::nn::Module& model,
    const std::string& name = "default") {
  const auto network = peft::describe_network(model);
  peft::detail::Plan plan;
  plan.method = "TEST";
  for (const auto& [path, site] :
       peft::detail::call_sites<peft::ExtraTokensImpl>(network)) {
    plan.sites.push_back(
        {path, path, path, {}, std::make_shared<OneToken>(), site->site()});
  }
  for (const auto& [path, site] :
       peft::detail::call_sites<peft::LayerLoopImpl>(network)) {
    plan.sites.push_back(
        {path, path, path, {}, std::make_shared<AfterLayer>(), site->site()});
  }
  return peft::detail::commit(model, name, std::move(plan));
}

} // namespace

TEST_CASE("A call site hands through without an adapter", "[call_sites]") {
  seed();
  Stack stack;
  const auto x = torch::randn({2, 3, 4});
  Tensor by_hand = x;
  for (const auto& layer : *stack->layers) {
    by_hand = at::tanh(layer->as<torch::nn::LinearImpl>()->forward(by_hand));
  }
  CHECK(torch::equal(stack->forward(x), stack->norm->forward(by_hand)));
  CHECK(stack->parameters().size() == 6); // it has none of its own
}

TEST_CASE("Adapters come and go at call sites", "[call_sites]") {
  seed();
  Stack stack;
  const auto x = torch::randn({2, 3, 4});
  const auto base = stack->forward(x);
  const auto before = state_of(*stack);
  auto adapter = attach_both(*stack);
  CHECK(stack->forward(x).sizes() == at::IntArrayRef({2, 4, 4}));
  CHECK(adapter.num_parameters() == 8);
  CHECK(adapter.sites().size() == 2);
  CHECK(contains(peft::summary(*stack), "one token"));
  for (const auto& p : stack->layers->parameters()) {
    CHECK_FALSE(p.requires_grad());
  }
  stack->forward(x).sum().backward();
  for (const auto& p : adapter.parameters()) {
    CHECK(p.grad().defined());
  }
  const auto count = [&] { return stack->forward(x).size(1); };
  adapter.disable();
  CHECK(torch::equal(stack->forward(x), base));
  adapter.enable();
  {
    peft::ActiveAdapters none({});
    CHECK(torch::equal(stack->forward(x), base));
  }
  auto second = attach_both(*stack, "second");
  CHECK(count() == 5);
  second.detach();
  CHECK(count() == 4);
  adapter.detach();
  CHECK(torch::equal(stack->forward(x), base));
  CHECK(same_state(before, state_of(*stack)));
}

TEST_CASE(
    "The same name twice is an error, and changes nothing",
    "[call_sites]") {
  Stack stack;
  auto adapter = attach_both(*stack);
  CHECK(contains(
      error_of([&] { attach_both(*stack); }), "already has an adapter named"));
  CHECK(stack->forward(torch::ones({1, 2, 4})).size(1) == 3);
}

TEST_CASE("What acts at a call site is not merged", "[call_sites]") {
  Stack stack;
  auto adapter = attach_both(*stack);
  CHECK(contains(error_of([&] { adapter.merge(); }), "cannot be merged at"));
  CHECK(
      contains(error_of([&] { peft::merge(*stack); }), "cannot be merged at"));
  adapter.disable(); // dropped without being folded
  peft::merge(*stack);
  CHECK(peft::adapters(*stack).empty());
}

TEST_CASE("A clone's call sites are its own", "[call_sites]") {
  seed();
  Stack stack;
  const auto x = torch::randn({2, 3, 4});
  auto adapter = attach_both(*stack);
  adapter.set_scale(0.5);
  const auto y = stack->forward(x);
  auto copy = peft::clone(stack);
  CHECK(torch::equal(copy->forward(x), y));
  {
    torch::NoGradGuard no_grad;
    for (auto& p : peft::get_adapter(*copy).parameters()) {
      p.add_(1);
    }
  }
  CHECK_FALSE(torch::equal(copy->forward(x), y));
  CHECK(torch::equal(stack->forward(x), y));
  peft::get_adapter(*copy).detach();
  CHECK(stack->forward(x).size(1) == 4);
}

TEST_CASE("Archives know nothing of call sites", "[call_sites]") {
  seed();
  Stack one, two;
  std::stringstream archive;
  torch::save(one, archive);
  torch::load(two, archive);
  const auto x = torch::randn({2, 3, 4});
  CHECK(torch::equal(one->forward(x), two->forward(x)));
}

TEST_CASE("Extra tokens make room in mask and positions", "[call_sites]") {
  Stack stack;
  const auto adapter = attach_both(*stack);
  const auto mask = torch::tensor({{0, 1, 1}, {1, 1, 1}});
  const auto positions = torch::tensor({{0, 0, 1}, {0, 1, 2}});
  const auto tokens =
      stack->extra_tokens->forward({torch::zeros({2, 3, 4}), mask, positions});
  CHECK(torch::equal(
      tokens.attention_mask, torch::tensor({{1, 0, 1, 1}, {1, 1, 1, 1}})));
  CHECK(torch::equal(
      tokens.positions(), torch::tensor({{0, 1, 1, 2}, {0, 1, 2, 3}})));
  CHECK(torch::equal(
      tokens.extend(torch::ones({2, 3}), 0),
      torch::tensor({{0., 1., 1., 1.}, {0., 1., 1., 1.}})));
  CHECK(torch::equal(
      peft::extend_labels(
          torch::tensor({{1, 2, 3}, {4, 5, 6}}), torch::zeros({2, 4, 9})),
      torch::tensor({{-100, 1, 2, 3}, {-100, 4, 5, 6}})));
}

TEST_CASE("A call of some tokens cuts masks and rows to them", "[call_sites]") {
  seed();
  peft::LayerCall call;
  call.tokens = torch::tensor({{0, 2}, {1, 3}});
  call.context_tokens = call.tokens;
  const auto bias = torch::randn({1, 2, 4, 6}); // 2 keys stand in front
  const auto cut = call.attention(bias, 2);
  CHECK(cut.sizes() == at::IntArrayRef({2, 2, 2, 4}));
  for (int64_t b = 0; b < 2; ++b) {
    for (int64_t q = 0; q < 2; ++q) {
      const auto row = bias[0][1][call.tokens[b][q].item<int64_t>()];
      CHECK(torch::equal(
          cut[b][1][q],
          torch::stack(
              {row[0],
               row[1],
               row[2 + call.tokens[b][0].item<int64_t>()],
               row[2 + call.tokens[b][1].item<int64_t>()]})));
    }
  }
  const auto rows = torch::randn({2, 4, 3});
  CHECK(torch::equal(call.of_queries(rows)[1][1], rows[1][3]));
  call.valid = torch::tensor({{true, false}, {true, true}});
  const auto open = call.attention({}, 1);
  CHECK(torch::equal(
      open.squeeze(),
      torch::tensor({{true, true, false}, {true, true, true}})));
  CHECK(call.attention(bias, 2)[0][0][0][3].item<float>() < -1e30);
  call.side = true; // whose blocks have nothing in front
  CHECK(call.attention(bias, 2).size(3) == 2);
}

} // namespace test_call_sites
