// The weight deltas of HF PEFT beside LoRA: what test_golden_tuners and
// test_every_method do not see.

#include "accounting.h"
#include "gradcheck.h"
#include "test.h"

#include <torch/nn/functional/linear.h>

namespace test_tuners {

using torch::Tensor;

namespace {

double number(const Tensor& t) {
  return t.item<double>();
}

template <class Options>
peft::Adapter put(torch::nn::Module& model, Options options) {
  auto adapter = peft::attach(model, options);
  torch::NoGradGuard no_grad;
  for (auto p : adapter.parameters()) {
    p.add_(torch::randn_like(p) * 0.2);
  }
  return adapter;
}

/// A weight that is read in every way there is gives what its effective value
/// gives.
template <class Options>
void check_reads(Options options) {
  seed(1);
  torch::nn::Linear layer(8, 6);
  layer->to(torch::kDouble);
  auto adapter = put(*layer, options.targets(peft::Targets({"weight"})));
  INFO(adapter.method());
  const Tensor& w = layer->weight;
  const Tensor value = peft::effective(w);
  const Tensor x = torch::randn({3, 5, 8}, torch::kDouble);
  const Tensor z = torch::randn({3, 6}, torch::kDouble);
  const auto same = [](const Tensor& a, const Tensor& b) {
    return close(a, b, 1e-10, 1e-12);
  };
  CHECK(same(layer->forward(x), torch::linear(x, value, layer->bias)));
  CHECK(same(torch::matmul(x, w.t()), torch::matmul(x, value.t())));
  CHECK(same(torch::mm(z, w), torch::mm(z, value)));
  CHECK(same(
      torch::linear(x, w.slice(0, 2, 5)),
      torch::linear(x, value.slice(0, 2, 5))));
  CHECK(same(
      torch::mm(z.slice(1, 2, 5), w.slice(0, 2, 5)),
      torch::mm(z.slice(1, 2, 5), value.slice(0, 2, 5))));
  adapter.set_scale(0.5);
  CHECK(same(
      layer->forward(x), torch::linear(x, peft::effective(w), layer->bias)));
  adapter.set_scale(1);
  // Merged, and back to the bit.
  const Tensor before = peft::base(w).detach().clone();
  for (int i = 0; i < 3; ++i) {
    adapter.merge();
    CHECK(same(peft::base(w), value));
    adapter.unmerge();
    CHECK(equal_bits(peft::base(w).detach(), before));
  }
}

template <class Options>
std::string refusal(torch::nn::Module& model, Options options) {
  const auto error = error_of([&] { peft::attach(model, options); });
  CHECK(peft::adapters(model).empty());
  return error;
}

/// A Conv1D as GPT-2 has it: [in, out].
struct Conv1DImpl : torch::nn::Module {
  Conv1DImpl() : torch::nn::Module("Conv1D") {
    weight = register_parameter("weight", torch::randn({8, 6}));
    bias = register_parameter("bias", torch::randn({6}));
  }
  Tensor forward(const Tensor& x) {
    return torch::addmm(bias, x, weight);
  }
  Tensor weight, bias;
};

} // namespace

TEST_CASE(
    "Every read of a tuner's weight gives its effective value",
    "[tuner]") {
  check_reads(peft::AdaLoraOptions(10).init_r(3));
  check_reads(peft::VeraOptions(3));
  check_reads(peft::LoHaOptions(2));
  check_reads(peft::LoKrOptions(2));
  check_reads(peft::HraOptions(2));
  check_reads(peft::HraOptions(2).apply_GS(true));
  check_reads(peft::OftOptions().oft_block_size(4));
  check_reads(peft::OftOptions().oft_block_size(2).use_cayley_neumann(false));
  check_reads(peft::OftOptions().oft_block_size(2).block_share(true));
  check_reads(peft::BoftOptions());
  check_reads(
      peft::BoftOptions().boft_block_size(2).boft_n_butterfly_factor(3));
  check_reads(peft::FourierFtOptions(7));
}

TEST_CASE("The same on a weight that lies as [in, out]", "[tuner]") {
  const auto check = [](auto options) {
    seed(2);
    Conv1DImpl layer;
    auto adapter =
        put(layer, options.fan_in_fan_out(true).targets(peft::Targets({""})));
    INFO(adapter.method());
    const Tensor x = torch::randn({5, 8});
    const Tensor value = peft::effective(layer.weight);
    CHECK_FALSE(torch::allclose(value, peft::base(layer.weight), 1e-3, 1e-3));
    CHECK(close(
        layer.forward(x), torch::addmm(layer.bias, x, value), 1e-5, 1e-5));
    peft::merge(layer);
    CHECK(close(layer.weight, value, 1e-6, 1e-6));
  };
  check(peft::AdaLoraOptions(10).init_r(3));
  check(peft::VeraOptions(3));
  check(peft::LoHaOptions(2));
  check(peft::LoKrOptions(2));
  check(peft::HraOptions(2));
  check(peft::OftOptions().oft_block_size(4));
  check(peft::BoftOptions());
  check(peft::FourierFtOptions(7));
}

TEST_CASE("Gradients of tuners by finite differences", "[tuner]") {
  const auto check = [](auto options) {
    seed(3);
    torch::nn::Linear layer(8, 6);
    layer->to(torch::kDouble);
    auto adapter = put(*layer, options.targets(peft::Targets({""})));
    INFO(adapter.method());
    const Tensor x = torch::randn({4, 8}, torch::kDouble).requires_grad_();
    auto inputs = adapter.parameters();
    inputs.push_back(x);
    const Tensor dy = torch::randn({4, 6}, torch::kDouble);
    const auto loss = [&] { return (layer->forward(x) * dy).sum(); };
    const auto gradients = torch::autograd::grad({loss()}, inputs);
    torch::NoGradGuard no_grad;
    for (size_t i = 0; i < inputs.size(); ++i) {
      const Tensor direction = torch::randn_like(inputs[i]);
      const double eps = 1e-6;
      inputs[i].add_(direction, eps);
      const double above = number(loss());
      inputs[i].sub_(direction, 2 * eps);
      const double below = number(loss());
      inputs[i].add_(direction, eps);
      const double expected = (above - below) / (2 * eps);
      const double found = number((gradients[i] * direction).sum());
      CHECK(found == Approx(expected).epsilon(1e-6).margin(1e-7));
    }
  };
  check(peft::AdaLoraOptions(10).init_r(3));
  check(peft::VeraOptions(3));
  check(peft::LoHaOptions(2));
  check(peft::LoKrOptions(2));
  check(peft::HraOptions(4));
  check(peft::HraOptions(3).apply_GS(true));
  check(peft::OftOptions().oft_block_size(4));
  check(peft::OftOptions().oft_block_size(4).use_cayley_neumann(false));
  check(peft::BoftOptions().boft_block_size(2).boft_n_butterfly_factor(2));
  check(peft::FourierFtOptions(7));
}

TEST_CASE("Rotations and reflections keep lengths", "[tuner]") {
  const auto check = [](auto options) {
    seed(4);
    torch::nn::Linear layer(torch::nn::LinearOptions(8, 8).bias(false));
    layer->to(torch::kDouble);
    {
      torch::NoGradGuard no_grad;
      layer->weight.copy_(torch::eye(8));
    }
    auto adapter = put(*layer, options.targets(peft::Targets({""})));
    INFO(adapter.method());
    if (adapter.method() == "BOFT") {
      torch::NoGradGuard no_grad;
      adapter.named_parameters()["boft_s"].fill_(1);
    }
    const Tensor R = peft::effective(layer->weight);
    const auto identity = torch::eye(8, torch::kDouble);
    CHECK(close(torch::mm(R, R.t()), identity, 0, 1e-12));
    CHECK_FALSE(torch::allclose(R, identity, 1e-2, 1e-2));
  };
  check(peft::HraOptions(4));
  check(peft::HraOptions(3).apply_GS(true));
  check(peft::OftOptions().oft_block_size(4).use_cayley_neumann(false));
  check(peft::BoftOptions().boft_block_size(2).boft_n_butterfly_factor(3));
  check(peft::BoftOptions().boft_block_size(4).boft_n_butterfly_factor(2));
}

TEST_CASE("Butterfly factors reach inputs outside a block", "[tuner]") {
  const auto reach = [](int64_t factors) {
    seed(5);
    torch::nn::Linear layer(torch::nn::LinearOptions(8, 8).bias(false));
    torch::NoGradGuard no_grad;
    layer->weight.copy_(torch::eye(8));
    put(*layer,
        peft::BoftOptions()
            .boft_block_size(2)
            .boft_n_butterfly_factor(factors)
            .targets(peft::Targets({""})));
    return peft::effective(layer->weight).abs().gt(1e-6).sum().item<int64_t>();
  };
  CHECK(reach(1) == 16); // four blocks of 2 x 2
  CHECK(reach(2) == 32);
  CHECK(reach(3) == 64);
}

TEST_CASE("Counts follow from the shapes", "[tuner]") {
  torch::nn::Linear layer(8, 6);
  const auto count = [&](auto options) {
    auto adapter = peft::attach(*layer, options.targets(peft::Targets({""})));
    const auto n = adapter.num_parameters();
    adapter.detach();
    return n;
  };
  CHECK(count(peft::AdaLoraOptions(9).init_r(3)) == 3 * (8 + 6 + 1));
  CHECK(count(peft::VeraOptions(5)) == 5 + 6);
  CHECK(count(peft::LoHaOptions(3)) == 2 * 3 * (8 + 6));
  CHECK(count(peft::LoKrOptions(8)) == 2 * 2 + 3 * 4); // 6 = 2·3, 8 = 2·4
  CHECK(count(peft::LoKrOptions(1)) == 2 * 2 + 1 * (3 + 4));
  CHECK(count(peft::HraOptions(4)) == 4 * 8);
  CHECK(count(peft::OftOptions().oft_block_size(4)) == 2 * 6);
  CHECK(count(peft::OftOptions().oft_block_size(4).block_share(true)) == 6);
  CHECK(
      count(peft::BoftOptions().boft_n_butterfly_factor(2)) == 2 * 2 * 16 + 6);
  CHECK(count(peft::FourierFtOptions(11)) == 11);
  CHECK(count(peft::BeftOptions()) == 6);
}

TEST_CASE("COFT draws back to its radius, and no further", "[tuner]") {
  torch::nn::Linear layer(8, 6);
  auto adapter = peft::attach(
      *layer,
      peft::OftOptions().oft_block_size(4).coft(true).eps(0.1).targets(
          peft::Targets({""})));
  const Tensor q = adapter.parameters()[0];
  const Tensor x = torch::randn({2, 8});
  Tensor read;
  {
    torch::NoGradGuard no_grad;
    q[0].fill_(1);
    q[1].fill_(1e-3);
    read = layer->forward(x);
    CHECK(torch::equal(q[0], torch::ones({6}))); // reading writes nothing
  }
  CHECK(close(layer->forward(x).detach(), read, 1e-6, 1e-6));
  const torch::NoGradGuard no_grad;
  const double radius = 0.1 / std::sqrt(2.0);
  CHECK(q[0].norm().item<double>() * std::sqrt(2.0) == Approx(radius));
  CHECK(torch::equal(q[1], torch::full({6}, 1e-3)));
}

TEST_CASE("Trainable tokens move their rows only", "[tuner]") {
  seed(6);
  torch::nn::Embedding table(torch::nn::EmbeddingOptions(10, 4).padding_idx(3));
  const Tensor before = table->weight.detach().clone();
  auto adapter = peft::attach(
      *table,
      peft::TrainableTokensOptions({7, 3, 1}).targets(peft::Targets({""})));
  CHECK(adapter.num_parameters() == 12);
  const Tensor ids = torch::tensor({{1, 2, 7}, {7, 3, 9}});
  CHECK(equal_bits(table->forward(ids), torch::embedding(before, ids)));
  const Tensor rows = adapter.parameters()[0];
  table->forward(ids).sum().backward();
  CHECK(torch::equal( // as often as it occurs; padding never
      rows.grad().sum(1),
      torch::tensor({8.0, 0.0, 4.0})));
  {
    torch::NoGradGuard no_grad;
    rows.add_(1);
  }
  const Tensor now = peft::effective(table->weight);
  CHECK(equal_bits(table->forward(ids), torch::embedding(now, ids)));
  for (int64_t i = 0; i < 10; ++i) {
    const bool moves = i == 7 || i == 3 || i == 1;
    CHECK(torch::equal(now[i], before[i]) != moves);
  }
  adapter.merge();
  CHECK(equal_bits(peft::base(table->weight).detach(), now.detach()));
  adapter.unmerge();
  CHECK(equal_bits(peft::base(table->weight).detach(), before));
}

TEST_CASE("BEFT on a layer without a bias runs and does not merge", "[tuner]") {
  seed(7);
  torch::nn::Linear layer(torch::nn::LinearOptions(4, 3).bias(false));
  auto adapter = put(*layer, peft::BeftOptions().targets(peft::Targets({""})));
  const Tensor x = torch::randn({2, 4});
  const Tensor expected =
      torch::linear(x, peft::base(layer->weight)) + adapter.parameters()[0];
  CHECK(close(layer->forward(x), expected, 1e-6, 1e-6));
  CHECK(contains(error_of([&] { adapter.merge(); }), "no bias"));
}

TEST_CASE("VeRA: a merge leaves no wide projections behind") {
  torch::nn::Linear linear(64, 48);
  auto adapter =
      peft::attach(*linear, peft::VeraOptions(16).targets(peft::Targets({""})));
  const accounting::Memory memory;
  adapter.merge();
  adapter.unmerge();
  CHECK(memory.held() == 0);
}

TEST_CASE(
    "VeRA's projections come from the seed, one pair for all",
    "[tuner]") {
  const auto make = [](int64_t key) {
    torch::nn::Sequential net(
        torch::nn::Linear(8, 6), torch::nn::Linear(6, 10));
    auto adapter = peft::attach(
        *net,
        peft::VeraOptions(4).projection_prng_key(key).targets(
            peft::Targets({"0", "1"})));
    const auto& sites = adapter.shared_state()->sites;
    const auto* first =
        dynamic_cast<const peft::VeraDelta*>(sites[0].delta.get());
    const auto* second =
        dynamic_cast<const peft::VeraDelta*>(sites[1].delta.get());
    CHECK(first->config().projections == second->config().projections);
    CHECK(first->config().projections->A().size(1) == 8);
    CHECK(first->config().projections->B().size(0) == 10);
    return first->config().projections->A();
  };
  CHECK(equal_bits(make(0), make(0)));
  CHECK_FALSE(torch::equal(make(0), make(1)));
}

TEST_CASE("Tuners refuse what they cannot do, and leave the model", "[tuner]") {
  torch::nn::Linear layer(8, 6);
  const peft::Targets here({""});
  CHECK(contains(refusal(*layer, peft::VeraOptions(0).targets(here)), "got 0"));
  CHECK(contains(
      refusal(*layer, peft::LoHaOptions(2).rank_dropout(1).targets(here)),
      "[0, 1)"));
  CHECK(contains(
      refusal(*layer, peft::LoKrOptions(2).init_weights("one").targets(here)),
      "'lycoris'"));
  CHECK(contains(
      refusal(*layer, peft::LoKrOptions(2).decompose_factor(0).targets(here)),
      "decompose_factor"));
  CHECK(contains(
      refusal(*layer, peft::OftOptions().r(2).targets(here)),
      "0 for the other"));
  CHECK(contains(
      refusal(*layer, peft::BoftOptions().boft_block_size(3).targets(here)),
      "does not divide the 8 inputs"));
  CHECK(contains(
      refusal(
          *layer, peft::BoftOptions().boft_n_butterfly_factor(5).targets(here)),
      "butterfly"));
  CHECK(contains(
      refusal(*layer, peft::FourierFtOptions(49).targets(here)), "48 entries"));
  CHECK(contains(
      refusal(*layer, peft::AdaLoraOptions(3).tinit(3).targets(here)),
      "leave none"));
  CHECK(contains(
      refusal(*layer, peft::AdaLoraOptions(3).beta1(1).targets(here)),
      "(0, 1)"));
  CHECK(contains(
      refusal(*layer, peft::HraOptions(2).bias("some").targets(here)),
      "'hra_only'"));
  CHECK(contains(
      refusal(*layer, peft::HraOptions(2).targets({"nowhere"})), "nowhere"));
  torch::nn::LayerNorm norm(torch::nn::LayerNormOptions({4}));
  CHECK(contains(
      refusal(*norm, peft::LoHaOptions(2).targets(here)), "adapts linear"));
  torch::nn::Embedding table(10, 4);
  CHECK(contains(
      refusal(*table, peft::TrainableTokensOptions({10}).targets(here)),
      "rows 0 to 9"));
  CHECK(contains(
      refusal(*table, peft::TrainableTokensOptions({1, 1}).targets(here)),
      "twice"));
  CHECK(contains(
      refusal(*table, peft::TrainableTokensOptions({}).targets(here)),
      "empty"));
  CHECK(contains(
      refusal(*table, peft::TrainableTokensOptions({1})), "usual names"));
  torch::nn::Conv2d grouped(torch::nn::Conv2dOptions(4, 4, 1).groups(2));
  CHECK(contains(
      refusal(*grouped, peft::OftOptions().oft_block_size(2).targets(here)),
      "groups"));
}

} // namespace test_tuners
