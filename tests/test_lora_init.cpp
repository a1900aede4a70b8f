// PiSSA, OLoRA and orthogonal starts of LoRA: the start itself, and the offset
// that keeps the base's bits.

#include "test.h"

#include "networks.h"

#include <nlohmann/json.hpp>

#include <cmath>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

namespace test_lora_init {

using torch::Tensor;

namespace {

peft::LoraOptions started(const std::string& init, int64_t r = 3) {
  return peft::LoraOptions(r).alpha(2.0 * static_cast<double>(r)).init(init);
}

/// A linear map from 7 to 5 features; its root is the layer itself.
torch::nn::Linear linear(torch::ScalarType dtype = torch::kDouble) {
  seed(1);
  torch::nn::Linear layer(7, 5);
  layer->to(dtype);
  return layer;
}

peft::Adapter attach_all(
    torch::nn::Module& model,
    peft::LoraOptions options,
    const std::string& name = "default") {
  return peft::attach(
      model, options.targets(peft::Targets::all_linear()), name);
}

peft::LoraDelta& delta_of(const peft::Adapter& adapter, size_t site = 0) {
  return dynamic_cast<peft::LoraDelta&>(
      *adapter.shared_state()->sites.at(site).delta);
}

/// Moves what trains as training would.
void move(const peft::Adapter& adapter, uint64_t number = 2) {
  seed(number);
  const torch::NoGradGuard no_grad;
  for (auto p : adapter.parameters()) {
    p.add_(0.3 * torch::randn_like(p));
  }
}

/// s (B A - B0 A0), as the sum is written.
Tensor change(const peft::LoraDelta& delta) {
  return delta.config().scaling *
      (torch::mm(delta.lora_B, delta.lora_A) -
       torch::mm(delta.offset().B, delta.offset().A));
}

const std::vector<std::string>& parts() {
  static const std::vector<std::string> names{
      "pissa", "pissa_niter_0", "pissa_niter_3", "olora"};
  return names;
}

} // namespace

TEST_CASE("A part of the weight starts the adapter, and nothing changes") {
  for (const auto& init : parts()) {
    for (const auto dtype :
         {torch::kDouble, torch::kFloat, torch::kBFloat16, torch::kHalf}) {
      INFO(init << " " << dtype);
      auto layer = linear(dtype);
      const Tensor x = torch::randn({4, 7}).to(dtype);
      const Tensor W = layer->weight.detach().clone();
      const Tensor y = layer(x).detach();
      auto adapter = attach_all(*layer, started(init));
      const auto& delta = delta_of(adapter);
      REQUIRE(delta.lora_B.abs().sum().item<double>() > 0.1);
      REQUIRE(delta.lora_A.abs().sum().item<double>() > 0.1);
      REQUIRE(equal_bits(layer(x).detach(), y));
      REQUIRE(equal_bits(peft::base(layer->weight).detach(), W));
      REQUIRE(adapter.num_parameters() == 3 * (7 + 5));
      move(adapter);
      REQUIRE_FALSE(torch::equal(layer(x), y));
      REQUIRE(equal_bits(peft::base(layer->weight).detach(), W));
      adapter.disable();
      REQUIRE(equal_bits(layer(x).detach(), y));
    }
  }
}

TEST_CASE("Output and gradients are those of W + s (B A - B0 A0)") {
  for (const auto& init : parts()) {
    INFO(init);
    auto layer = linear();
    const Tensor W = layer->weight.detach().clone();
    auto adapter = attach_all(*layer, started(init));
    move(adapter);
    const auto& delta = delta_of(adapter);
    const Tensor x =
        torch::randn({2, 3, 7}, torch::kDouble).set_requires_grad(true);
    const Tensor direction = torch::randn({2, 3, 5}, torch::kDouble);
    const Tensor formula =
        torch::matmul(x, (W + change(delta)).t()) + layer->bias.detach();
    const Tensor y = layer(x);
    REQUIRE(close(y, formula));
    REQUIRE(close(peft::effective(layer->weight), W + change(delta)));
    const std::vector<Tensor> inputs{x, delta.lora_A, delta.lora_B};
    const auto expected =
        torch::autograd::grad({(formula * direction).sum()}, inputs);
    const auto ours = torch::autograd::grad({(y * direction).sum()}, inputs);
    for (size_t i = 0; i < inputs.size(); ++i) {
      REQUIRE(close(ours[i], expected[i]));
    }
    // A row of the weight, and its transpose.
    REQUIRE(close(
        torch::matmul(x, layer->weight.slice(0, 1, 4).t()),
        torch::matmul(x, (W + change(delta)).slice(0, 1, 4).t())));
    REQUIRE(close(
        torch::matmul(direction, layer->weight),
        torch::matmul(direction, W + change(delta))));
  }
}

TEST_CASE("A weight that lies as [in, out] is decomposed turned") {
  seed(1);
  networks::Gpt2Mlp model;
  model.to(torch::kDouble);
  const Tensor W = model.c_fc->weight.detach().clone(); // [6, 12]
  const Tensor x = torch::randn({4, 6}, torch::kDouble);
  const Tensor before = model.forward(x);
  auto adapter =
      peft::attach(model, started("pissa", 2).targets(peft::Targets({"c_fc"})));
  const auto& delta = delta_of(adapter);
  REQUIRE(equal_bits(model.forward(x).detach(), before.detach()));
  REQUIRE(delta.lora_A.sizes() == at::IntArrayRef({2, 6}));
  REQUIRE(delta.lora_B.sizes() == at::IntArrayRef({12, 2}));
  move(adapter);
  REQUIRE(close(peft::effective(model.c_fc->weight), W + change(delta).t()));
  REQUIRE(close(
      model.c_fc->forward(x),
      torch::matmul(x, W + change(delta).t()) + model.c_fc->bias));
}

TEST_CASE("PiSSA is the nearest matrix of rank r, shared evenly") {
  auto layer = linear();
  const Tensor W = layer->weight.detach().clone();
  auto adapter = attach_all(*layer, started("pissa").rslora(true));
  const auto& delta = delta_of(adapter);
  const double s = delta.config().scaling;
  REQUIRE(s == 6 / std::sqrt(3.0));
  const Tensor values = std::get<1>(torch::linalg_svd(W));
  const Tensor rest = W - s * torch::mm(delta.lora_B, delta.lora_A);
  REQUIRE(close(
      rest.square().sum(), values.slice(0, 3).square().sum())); // Eckart, Young
  const Tensor shared = torch::diag(values.slice(0, 0, 3) / s);
  REQUIRE(close(torch::mm(delta.lora_A, delta.lora_A.t()), shared));
  REQUIRE(close(torch::mm(delta.lora_B.t(), delta.lora_B), shared));
}

TEST_CASE("A random subspace comes nearer with every iteration") {
  const auto distance = [](const std::string& init) {
    auto layer = linear();
    const Tensor W = layer->weight.detach().clone();
    seed(3);
    auto adapter = attach_all(*layer, started(init, 2));
    const auto& delta = delta_of(adapter);
    const Tensor part =
        delta.config().scaling * torch::mm(delta.lora_B, delta.lora_A);
    return (W - part).norm().item<double>();
  };
  const double best = distance("pissa");
  REQUIRE(distance("pissa_niter_0") > distance("pissa_niter_2"));
  REQUIRE(distance("pissa_niter_2") > best * (1 + 1e-9));
  REQUIRE(distance("pissa_niter_60") <= best * (1 + 1e-6));
}

TEST_CASE("OLoRA is the first columns of Q and rows of R") {
  auto layer = linear();
  const Tensor W = layer->weight.detach().clone();
  auto adapter = attach_all(*layer, started("olora"));
  const auto& delta = delta_of(adapter);
  REQUIRE(close(
      torch::mm(delta.lora_B.t(), delta.lora_B),
      torch::eye(3, torch::kDouble)));
  REQUIRE(equal_bits(delta.lora_A.detach(), delta.lora_A.detach().triu()));
  // The first r columns of W are made of the first r columns of Q alone.
  REQUIRE(close(
      torch::mm(delta.lora_B, delta.lora_A).slice(1, 0, 3), W.slice(1, 0, 3)));
}

TEST_CASE("Orthogonal factors cancel, and nothing is taken off") {
  auto layer = linear();
  const Tensor W = layer->weight.detach().clone();
  auto adapter = attach_all(*layer, started("orthogonal", 4));
  const auto& delta = delta_of(adapter);
  REQUIRE_FALSE(delta.offset());
  REQUIRE(layer->buffers().empty());
  REQUIRE(delta.lora_A.abs().min().item<double>() > 0);
  REQUIRE(delta.lora_B.abs().min().item<double>() > 0);
  // Drawn in float32.
  REQUIRE(close(peft::effective(layer->weight), W, 0, 1e-7));
  REQUIRE_FALSE(torch::equal(peft::effective(layer->weight), W));

  const auto error =
      error_of([] { attach_all(*linear(), started("orthogonal", 3)); });
  REQUIRE(contains(error, "must be even; at 'weight' r is 3"));
  REQUIRE(contains(
      error_of([] {
        networks::Mlp model;
        attach_all(model, started("orthogonal", 4).rank_pattern({{"fc2", 5}}));
      }),
      "must be even; at 'fc2.weight' r is 5"));
}

TEST_CASE("A rank above the weight's is the weight's, as in HF's files") {
  for (const std::string init : {"pissa", "pissa_niter_2", "olora"}) {
    INFO(init);
    auto layer = linear();
    const Tensor W = layer->weight.detach().clone();
    auto adapter = attach_all(*layer, started(init, 9));
    const auto& delta = delta_of(adapter);
    REQUIRE(delta.r() == 5);
    if (init == "pissa") { // the whole weight
      REQUIRE(close(
          delta.config().scaling * torch::mm(delta.lora_B, delta.lora_A), W));
    }
    move(adapter);
    const Tensor expected = W + change(delta);
    REQUIRE(close(peft::effective(layer->weight), expected));
    // The file of the conversion has the rank that the config says.
    const TemporaryDirectory folder;
    peft::save(
        adapter,
        folder / "plain",
        peft::SaveOptions().convert_to_plain_lora(true));
    const auto tensors =
        peft::load_safetensors(folder / "plain/adapter_model.safetensors");
    REQUIRE(
        tensors.at("base_model.model.lora_A.weight").sizes() ==
        at::IntArrayRef({18, 7}));
    auto other = linear();
    peft::load(*other, folder / "plain");
    REQUIRE(close(peft::effective(other->weight), expected));
  }
}

TEST_CASE("Several PiSSA adapters stand beside each other, in any order") {
  auto layer = linear();
  const Tensor W = layer->weight.detach().clone();
  auto first = attach_all(*layer, started("pissa"), "first");
  move(first, 2);
  auto second = attach_all(*layer, started("olora", 2), "second");
  // The second starts from the base, not from what the first made of it.
  REQUIRE(close(
      torch::mm(delta_of(second).lora_B, delta_of(second).lora_A)
          .slice(1, 0, 2),
      W.slice(1, 0, 2)));
  move(second, 3);
  const Tensor one = change(delta_of(first)), two = change(delta_of(second));
  REQUIRE(close(peft::effective(layer->weight), W + one + two));
  first.disable();
  REQUIRE(close(peft::effective(layer->weight), W + two));
  first.enable();
  second.set_scale(0.5);
  REQUIRE(close(peft::effective(layer->weight), W + one + 0.5 * two));
  second.set_scale(0);
  REQUIRE(close(peft::effective(layer->weight), W + one));
  second.set_scale(1);

  const Tensor x = torch::randn({3, 7}, torch::kDouble);
  const auto row = [&](const std::vector<std::string>& names, int64_t i) {
    const peft::ActiveAdapters scope(names);
    return layer(x.slice(0, i, i + 1)).detach();
  };
  const torch::NoGradGuard no_grad;
  const auto mixed = [&] {
    const peft::BatchAdapters scope({"second", "__base__", "first"});
    return layer(x);
  };
  const Tensor y = mixed();
  REQUIRE(close(y.slice(0, 0, 1), row({"second"}, 0)));
  REQUIRE(close(y.slice(0, 1, 2), row({}, 1)));
  REQUIRE(close(y.slice(0, 2, 3), row({"first"}, 2)));

  first.detach();
  REQUIRE(close(peft::effective(layer->weight), W + two));
  second.detach();
  REQUIRE(equal_bits(layer->weight.detach(), W));
}

TEST_CASE("PiSSA merges with one rounding, and unmerges to the bit") {
  for (const auto dtype :
       {torch::kDouble, torch::kFloat, torch::kBFloat16, torch::kHalf}) {
    INFO(dtype);
    auto layer = linear(dtype);
    const Tensor W = layer->weight.detach().clone();
    auto adapter = attach_all(*layer, started("pissa"));
    move(adapter);
    const auto& delta = delta_of(adapter);
    const auto wide = [](const Tensor& t) { return t.to(torch::kDouble); };
    const Tensor exact = wide(W) +
        delta.config().scaling *
            (torch::mm(wide(delta.lora_B), wide(delta.lora_A)) -
             torch::mm(wide(delta.offset().B), wide(delta.offset().A)));
    for (int i = 0; i < 3; ++i) {
      adapter.merge();
      const Tensor merged = peft::base(layer->weight).detach();
      if (dtype == torch::kDouble) {
        REQUIRE(close(merged, exact, 1e-15, 1e-16));
      } else {
        REQUIRE(equal_bits(merged, exact.to(dtype)));
      }
      adapter.unmerge();
      REQUIRE(equal_bits(peft::base(layer->weight).detach(), W));
    }
  }
}

TEST_CASE("DoRA over a part of the weight has the direction of both") {
  auto layer = linear();
  const Tensor W = layer->weight.detach().clone();
  auto adapter = attach_all(*layer, started("pissa").dora(true));
  auto& delta = dynamic_cast<peft::DoraDelta&>(
      *adapter.shared_state()->sites.at(0).delta);
  REQUIRE(close(peft::effective(layer->weight), W));
  REQUIRE(close(delta.magnitude, W.norm(2, 1)));
  move(adapter);
  const auto formula = [&] {
    const Tensor V = W +
        delta.config().scaling *
            (torch::mm(delta.lora_B, delta.lora_A) -
             torch::mm(delta.offset().B, delta.offset().A));
    return V * (delta.magnitude / V.detach().norm(2, 1)).unsqueeze(1);
  };
  REQUIRE(close(peft::effective(layer->weight), formula()));
  const Tensor x = torch::randn({4, 7}, torch::kDouble);
  for (const bool grad : {true, false, false}) { // the norm is kept without
    const torch::AutoGradMode mode(grad);
    REQUIRE(close(layer(x), torch::matmul(x, formula().t()) + layer->bias));
  }
  {
    const torch::NoGradGuard no_grad;
    delta.lora_A.mul_(1.5);
    REQUIRE(close(layer(x), torch::matmul(x, formula().t()) + layer->bias));
  }
  const std::vector<Tensor> inputs{delta.lora_A, delta.lora_B, delta.magnitude};
  const auto expected =
      torch::autograd::grad({torch::matmul(x, formula().t()).sum()}, inputs);
  const auto ours = torch::autograd::grad({layer(x).sum()}, inputs);
  for (size_t i = 0; i < inputs.size(); ++i) {
    REQUIRE(close(ours[i], expected[i]));
  }
}

TEST_CASE("A random start comes back from the file as it was drawn") {
  const TemporaryDirectory folder;
  const auto x = torch::randn({4, 7}, torch::kDouble);
  auto layer = linear();
  seed(10);
  auto adapter = attach_all(*layer, started("pissa_niter_0", 2));
  move(adapter);
  peft::save(adapter, folder / "adapter");

  auto other = linear();
  seed(11); // another subspace
  peft::load(*other, folder / "adapter");
  REQUIRE(equal_bits(other(x), layer(x)));

  // PEFT keeps no such file, and draws again.
  std::filesystem::remove(folder / "adapter/libpeft_training.safetensors");
  other = linear();
  seed(11);
  peft::load(*other, folder / "adapter");
  REQUIRE_FALSE(close(other(x), layer(x), 1e-3, 1e-3));

  // As a plain LoRA it needs none.
  peft::save(
      adapter,
      folder / "plain",
      peft::SaveOptions().convert_to_plain_lora(true));
  REQUIRE_FALSE(
      std::filesystem::exists(folder / "plain/libpeft_training.safetensors"));
  other = linear();
  const auto plain = peft::load(*other, folder / "plain");
  // A file holds float64 as it is.
  REQUIRE(close(other(x), layer(x)));
  REQUIRE(delta_of(plain).r() == 4);
  REQUIRE_FALSE(delta_of(plain).offset());
}

TEST_CASE("The conversion takes embeddings, heads, patterns and DoRA along") {
  const auto ids = torch::tensor({{1, 4}, {7, 2}}, torch::kLong);
  for (const bool dora : {false, true}) {
    for (const bool rslora : {false, true}) {
      INFO("dora " << dora << ", rslora " << rslora);
      const auto make = [] {
        seed(1);
        auto network = networks::build("tokens");
        return network;
      };
      const auto network = make(), other = make();
      auto adapter = peft::attach(
          *network.module,
          started("pissa", 2)
              .dora(dora)
              .rslora(rslora)
              .rank_pattern({{"fc", 3}})
              .alpha_pattern({{"fc", 5}})
              .bias("lora_only")
              .targets({"emb", "fc"}));
      move(adapter);
      const Tensor y = network.run({ids});
      const TemporaryDirectory folder;
      const auto plainly = peft::SaveOptions().convert_to_plain_lora(true);
      peft::save(adapter, folder / "plain", plainly);
      REQUIRE(equal_bits(network.run({ids}), y));
      peft::load(*other.module, folder / "plain");
      REQUIRE(close(other.run({ids}), y, 1e-5, 1e-6));
      std::ifstream file(folder / "plain/adapter_config.json");
      const auto config = nlohmann::json::parse(file);
      REQUIRE(config.at("r") == 4);
      REQUIRE(config.at("rank_pattern").at("fc") == 6);
      REQUIRE(config.at("init_lora_weights") == true);

      // What was loaded from a file is converted all the same.
      peft::save(adapter, folder / "adapter");
      const auto third = make(), fourth = make();
      const auto loaded = peft::load(*third.module, folder / "adapter");
      REQUIRE(equal_bits(third.run({ids}), y));
      peft::save(loaded, folder / "again", plainly);
      peft::load(*fourth.module, folder / "again");
      REQUIRE(equal_bits(fourth.run({ids}), other.run({ids})));
    }
  }
}

TEST_CASE("Only what takes something off is converted") {
  const TemporaryDirectory folder;
  const auto plainly = peft::SaveOptions().convert_to_plain_lora(true);
  auto layer = linear();
  auto adapter = attach_all(*layer, started("gaussian"));
  peft::save(adapter, folder / "lora", plainly);
  auto other = linear();
  REQUIRE(delta_of(peft::load(*other, folder / "lora")).r() == 3);
  adapter.detach();
  adapter = peft::attach(*layer, peft::BitFitOptions());
  const auto error =
      error_of([&] { peft::save(adapter, folder / "bitfit", plainly); });
  REQUIRE(contains(error, "convert_to_plain_lora is for LoRA"));
  REQUIRE(contains(error, "BITFIT"));
  REQUIRE_FALSE(std::filesystem::exists(folder / "bitfit"));
}

TEST_CASE("Decorations multiply the change, not the part") {
  auto layer = linear();
  const Tensor W = layer->weight.detach().clone();
  auto adapter = peft::attach(
      *layer,
      peft::Scaled(started("pissa").targets(peft::Targets::all_linear()), 0.5));
  move(adapter);
  REQUIRE(close(
      peft::effective(layer->weight), W + 0.5 * change(delta_of(adapter))));
  const Tensor x = torch::randn({4, 7}, torch::kDouble);
  REQUIRE(close(
      layer(x),
      torch::matmul(x, (W + 0.5 * change(delta_of(adapter))).t()) +
          layer->bias));
}

TEST_CASE("A start that does not fit is refused, the model untouched") {
  const auto refused = [](torch::nn::Module& model,
                          const peft::LoraOptions& options,
                          const std::string& words) {
    const auto error = error_of([&] { peft::attach(model, options); });
    INFO(error);
    CHECK(contains(error, words));
    CHECK(peft::adapters(model).empty());
    for (const auto& p : model.parameters()) {
      CHECK(p.requires_grad());
    }
  };
  auto layer = linear();
  for (const std::string init :
       {"pissa_", "pissa_niter_", "pissa_niter_x", "pissa_niter_-1", "PiSSA"}) {
    refused(*layer, started(init), "'olora' or 'orthogonal', got '" + init);
  }
  refused(
      *layer,
      started("pissa").alpha(-2).targets(peft::Targets::all_linear()),
      "positive scaling, got s = -0.6");
  refused(
      *layer,
      started("olora").lora_bias(true),
      "lora_bias does not go with init 'olora'");
  networks::Gpt2Mlp gpt2;
  refused(
      gpt2,
      started("olora").targets(peft::Targets({"c_fc"})),
      "'c_fc.weight' lies as [in, out]");
  networks::ConvNet1d convolution;
  networks::Attention attention(false);
  for (const std::string init : {"pissa", "pissa_niter_2", "olora"}) {
    refused(
        convolution,
        started(init).targets(peft::Targets({"conv"})),
        "'conv.weight' is a convolution's");
    refused(
        attention,
        started(init).targets(peft::Targets({"attn"})),
        "does not start the projections of a torch::nn::MultiheadAttention");
    const auto error = error_of([&] {
      peft::Lora<torch::nn::Linear> explicit_layer(
          torch::nn::LinearOptions(4, 4), started(init));
    });
    CHECK(contains(error, "init 'pissa' or 'olora'; attach() does"));
  }
  // Without an offset an explicit layer is LoRA like any other.
  seed(2);
  peft::Lora<torch::nn::Linear> rotated(
      torch::nn::LinearOptions(4, 4), started("orthogonal", 2));
  const Tensor x = torch::randn({3, 4});
  CHECK(close(rotated->forward(x), rotated->base_layer->forward(x)));
}

TEST_CASE("HF's spelling of the start is read, an unknown one refused") {
  const TemporaryDirectory folder;
  auto layer = linear(torch::kFloat);
  const auto adapter = attach_all(*layer, started("olora"));
  peft::save(adapter, folder / "adapter");
  const auto path = folder / "adapter/adapter_config.json";
  const auto respell = [&](const std::string& init) {
    nlohmann::json config;
    {
      std::ifstream file(path);
      config = nlohmann::json::parse(file);
    }
    config["init_lora_weights"] = init;
    std::ofstream(path) << config.dump(2);
    auto other = linear(torch::kFloat);
    return error_of([&] {
      const auto again = peft::load(*other, folder / "adapter");
      CHECK(bool(delta_of(again).offset()) == (init != "eva"));
    });
  };
  CHECK(respell("OLoRA") == "");
  CHECK(respell("eva") == ""); // starts A alone, which the file holds
  CHECK(contains(respell("pissa_fast"), "got 'pissa_fast'"));
  CHECK(contains(respell("corda"), "path_initial_model"));
  CHECK(contains(respell("loftq"), "path_initial_model"));
}

} // namespace test_lora_init
