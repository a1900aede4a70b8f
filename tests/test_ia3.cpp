// (IA)³: layer outputs and feed-forward inputs scaled by learned vectors.

#include "adapted.h"
#include "gradcheck.h"
#include "model_state.h"

namespace test_ia3 {

using adapted::Tensor;

namespace {

/// One layer of a transformer by HF's names, with a convolution in front.
struct LayerImpl : torch::nn::Cloneable<LayerImpl> {
  LayerImpl() {
    reset();
  }
  void reset() override {
    key = register_module("key", torch::nn::Linear(6, 6));
    value = register_module(
        "value", torch::nn::Linear(torch::nn::LinearOptions(6, 6).bias(false)));
    up = register_module("up_proj", torch::nn::Linear(6, 10));
    down = register_module("down_proj", torch::nn::Linear(10, 6));
  }
  Tensor forward(const Tensor& x) {
    const auto mixed = at::softmax(key(x), -1) * value(x);
    return down(at::relu(up(mixed))) + x;
  }
  torch::nn::Linear key{nullptr}, value{nullptr}, up{nullptr}, down{nullptr};
};
TORCH_MODULE(Layer);

} // namespace

TEST_CASE("(IA)3 starts as the base, to the bit", "[ia3]") {
  seed();
  Layer layer;
  const auto x = torch::randn({3, 5, 6});
  const auto before = layer->forward(x);
  const auto adapter = peft::attach(*layer, peft::Ia3Options());
  CHECK(torch::equal(layer->forward(x), before));
  // l_k, l_v and l_ff: d + d + f.
  CHECK(adapter.num_parameters() == 6 + 6 + 10);
  CHECK(
      adapter.named_parameters()["key.ia3_l"].sizes() ==
      at::IntArrayRef({6, 1}));
  CHECK(
      adapter.named_parameters()["down_proj.ia3_l"].sizes() ==
      at::IntArrayRef({1, 10}));
}

TEST_CASE("(IA)3 follows its equations", "[ia3]") {
  seed();
  Layer layer;
  layer->to(torch::kDouble);
  const auto adapter = peft::attach(*layer, peft::Ia3Options());
  randomise(adapter);
  const auto l = adapter.named_parameters();
  for (const auto& shape : {std::vector<int64_t>{4, 6}, {2, 5, 6}}) {
    const auto x = torch::randn(shape, torch::kDouble);
    const auto linear = [](const Tensor& v, const torch::nn::Linear& m) {
      const auto y = at::matmul(v, peft::base(m->weight).t());
      return m->bias.defined() ? y + peft::base(m->bias) : y;
    };
    const auto k = linear(x, layer->key) * l["key.ia3_l"].flatten();
    const auto v = linear(x, layer->value) * l["value.ia3_l"].flatten();
    const auto hidden = at::relu(linear(at::softmax(k, -1) * v, layer->up));
    const auto expected =
        linear(hidden * l["down_proj.ia3_l"].flatten(), layer->down) + x;
    const auto got = layer->forward(x);
    CHECK(torch::allclose(got, expected, 1e-12, 1e-12));
    const auto theirs = adapted::gradients(expected, adapter.parameters());
    const auto ours = adapted::gradients(got, adapter.parameters());
    for (size_t i = 0; i < ours.size(); ++i) {
      CHECK(torch::allclose(ours[i], theirs[i], 1e-10, 1e-12));
    }
  }
}

TEST_CASE("(IA)3 merges exactly and unmerges to the bit", "[ia3]") {
  seed();
  Layer layer;
  auto adapter = peft::attach(*layer, peft::Ia3Options());
  randomise(adapter);
  {
    torch::NoGradGuard no_grad; // division could not bring these back
    adapter.named_parameters()["key.ia3_l"].select(0, 2).zero_();
    adapter.named_parameters()["down_proj.ia3_l"].select(1, 4).zero_();
  }
  const auto x = torch::randn({3, 5, 6});
  const auto before = layer->forward(x).detach();
  adapter.set_trainable(false);
  const auto weights = state_of(*layer);
  for (int i = 0; i < 3; ++i) {
    adapter.merge();
    CHECK(torch::allclose(layer->forward(x), before, 1e-5, 1e-6));
    adapter.unmerge();
  }
  CHECK(torch::equal(layer->forward(x), before));
  CHECK(same_state(weights, state_of(*layer)));
  peft::merge(*layer);
  CHECK_FALSE(peft::is_adapted(layer->key->weight));
  CHECK(torch::allclose(layer->forward(x), before, 1e-5, 1e-6));
}

TEST_CASE("(IA)3 scales between the base and itself; two multiply", "[ia3]") {
  seed();
  torch::nn::Linear linear(4, 5);
  linear->to(torch::kDouble);
  const auto x = torch::randn({2, 4}, torch::kDouble);
  const auto base = linear->forward(x).detach();
  auto first = peft::attach(*linear, peft::Ia3Options().targets({""}), "first");
  auto second =
      peft::attach(*linear, peft::Ia3Options().targets({""}), "second");
  randomise(first, 1);
  randomise(second, 2);
  const auto a = first.parameters()[0].flatten();
  const auto b = second.parameters()[0].flatten();
  CHECK(torch::allclose(linear->forward(x), base * a * b));
  second.set_scale(0.25);
  CHECK(torch::allclose(linear->forward(x), base * a * (1 + 0.25 * (b - 1))));
  second.set_scale(0);
  first.disable();
  CHECK(torch::allclose(linear->forward(x), base, 1e-15, 0));
  second.disable();
  CHECK(torch::equal(linear->forward(x), base));
  second.detach();
  first.detach();
  CHECK(torch::equal(linear->forward(x), base));
  CHECK(linear->weight.requires_grad());
}

TEST_CASE("(IA)3 on an unmodified TransformerEncoder", "[ia3]") {
  seed();
  torch::nn::TransformerEncoder encoder(
      torch::nn::TransformerEncoderLayer(
          torch::nn::TransformerEncoderLayerOptions(8, 2)
              .dim_feedforward(12)
              .dropout(0)),
      2);
  encoder->to(torch::kDouble);
  const auto x = torch::randn({5, 3, 8}, torch::kDouble);
  const auto before = encoder->forward(x).detach();
  const auto adapter = peft::attach(*encoder, peft::Ia3Options());
  CHECK(adapter.num_parameters() == 2 * (8 + 8 + 12));
  CHECK(torch::allclose(encoder->forward(x), before, 1e-14, 1e-14));
  randomise(adapter);
  const auto y = encoder->forward(x);
  CHECK_FALSE(torch::allclose(y, before, 1e-2));
  for (const auto& g : adapted::gradients(y, adapter.parameters())) {
    REQUIRE(g.defined());
    CHECK(g.abs().sum().item<double>() > 0);
  }
  // The effective weights, folded, are the same function.
  auto copy = peft::clone(encoder);
  CHECK(torch::allclose(copy->forward(x), y, 1e-12, 1e-12));
  peft::merge(*copy);
  CHECK(torch::allclose(copy->forward(x), y, 1e-12, 1e-12));
  CHECK(torch::allclose(encoder->forward(x), y, 1e-15, 0));
}

TEST_CASE("(IA)3 on convolutions equals its folded weight", "[ia3]") {
  seed();
  for (const bool feedforward : {false, true}) {
    for (const int64_t groups : {1, 2}) {
      torch::nn::Conv2d conv(
          torch::nn::Conv2dOptions(4, 6, 3).groups(groups).dilation(2));
      conv->to(torch::kDouble);
      auto options = peft::Ia3Options().targets({""});
      options.feedforward(
          feedforward ? peft::Targets({""}) : peft::Targets::regex("(?!)"));
      auto adapter = peft::attach(*conv, options);
      randomise(adapter);
      CHECK(adapter.num_parameters() == (feedforward ? 4 : 6));
      const auto x = torch::randn({2, 4, 8, 8}, torch::kDouble);
      const auto y = conv->forward(x).detach();
      const auto single = conv->forward(x[0]).detach();
      CHECK(torch::allclose(single, y[0], 1e-12, 1e-12));
      peft::merge(*conv);
      CHECK(torch::allclose(conv->forward(x), y, 1e-12, 1e-12));
    }
  }
}

TEST_CASE("(IA)3's gradients are those of finite differences", "[ia3]") {
  seed();
  Layer layer;
  layer->to(torch::kDouble);
  const auto adapter = peft::attach(*layer, peft::Ia3Options());
  randomise(adapter);
  const auto x = torch::randn({2, 3, 6}, torch::kDouble);
  CHECK(gradcheck::first_order(
      [&](const std::vector<Tensor>&) { return layer->forward(x); },
      adapter.parameters(),
      torch::randn({2, 3, 6}, torch::kDouble)));
}

TEST_CASE("A clone's bias follows its own vector", "[ia3]") {
  seed();
  Layer layer;
  const auto adapter = peft::attach(*layer, peft::Ia3Options());
  auto copy = peft::clone(layer);
  randomise(peft::get_adapter(*copy));
  const auto x = torch::randn({2, 6});
  const auto original = layer->key->forward(x);
  CHECK(torch::equal(
      original,
      torch::nn::functional::linear(
          x, peft::base(layer->key->weight), peft::base(layer->key->bias))));
  const auto l = peft::get_adapter(*copy).named_parameters()["key.ia3_l"];
  CHECK(torch::allclose(
      copy->key->forward(x), original * l.flatten(), 1e-5, 1e-6));
}

TEST_CASE("(IA)3 refuses what it cannot scale", "[ia3]") {
  Layer layer;
  torch::nn::Embedding table(4, 3);
  torch::nn::LayerNorm norm(torch::nn::LayerNormOptions({4}));
  CHECK(contains(
      error_of([&] { peft::attach(*table, peft::Ia3Options().targets({""})); }),
      "scales what a linear layer or a convolution"));
  CHECK(contains(
      error_of([&] { peft::attach(*norm, peft::Ia3Options()); }),
      "match nothing that (IA)3 can scale by default"));
  CHECK(contains(
      error_of([&] {
        peft::attach(
            *layer,
            peft::Ia3Options().targets({"key"}).feedforward({"down_proj"}));
      }),
      "name it in both"));
  CHECK_FALSE(peft::is_adapted(layer->key->weight));
}

TEST_CASE("(IA)3's files come back to the bit", "[ia3]") {
  seed();
  TemporaryDirectory folder;
  Layer layer;
  const auto adapter = peft::attach(*layer, peft::Ia3Options());
  randomise(adapter);
  const auto x = torch::randn({2, 6});
  const auto y = layer->forward(x);
  peft::save(adapter, folder.path().string());
  auto other = peft::clone(layer);
  peft::get_adapter(*other).detach();
  const auto again = peft::load(*other, folder.path().string());
  CHECK(again.method() == "IA3");
  CHECK(torch::equal(other->forward(x), y));
}

} // namespace test_ia3
