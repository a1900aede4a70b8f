#include "test.h"

#include "golden_case.h"

#include <memory>
#include <string>
#include <vector>

namespace test_lora_fa {

using namespace golden_case;

namespace {

peft::LoraDelta& delta_of(const peft::Adapter& adapter, size_t site = 0) {
  return dynamic_cast<peft::LoraDelta&>(
      *adapter.shared_state()->sites.at(site).delta);
}

} // namespace

TEST_CASE("LoRA-FA takes HF PEFT's steps") {
  for (const auto& name : folders("steps_lora_fa", "lora_init")) {
    DYNAMIC_SECTION(name) {
      const Golden golden(name, "lora_init");
      const auto network = golden.network();
      const auto adapter = peft::load(*network.module, golden.adapter());
      const peft::LoraFaStep lora_fa(adapter);
      torch::optim::AdamW optimizer(
          lora_fa.parameters(),
          torch::optim::AdamWOptions(1e-2).eps(1e-20).weight_decay(0));
      for (int i = 0; i < 3; ++i) {
        optimizer.zero_grad();
        golden.loss(network).backward();
        lora_fa.step(optimizer);
      }
      const auto parameters = adapter.named_parameters();
      const auto start = peft::load_safetensors(
          golden.adapter() + "/adapter_model.safetensors");
      const auto expected = golden.group("step");
      REQUIRE(expected.size() == parameters.size());
      for (const auto& [key, value] : expected) {
        INFO(key);
        const Tensor own = find(parameters, key);
        REQUIRE(near(own, value, 1e-5));
        const bool frozen = contains(key, "lora_A");
        REQUIRE(torch::equal(own, start.at(key)) == frozen);
        REQUIRE(own.grad().defined() == !frozen);
      }
    }
  }
}

TEST_CASE("LoRA-FA's gradient of B comes nearest to the weight's own") {
  seed(1);
  torch::nn::Linear layer(7, 5);
  layer->to(torch::kDouble);
  auto adapter = peft::attach(
      *layer,
      peft::LoraOptions(3).alpha(5).init("random").targets(
          peft::Targets::all_linear()));
  adapter.set_scale(0.7);
  const auto& delta = delta_of(adapter);
  const double s = 0.7 * 5 / 3;
  const peft::LoraFaStep lora_fa(adapter);
  const Tensor x = torch::randn({9, 7}, torch::kDouble);
  const Tensor direction = torch::randn({9, 5}, torch::kDouble);
  (layer(x) * direction).sum().backward();
  (layer(x) * direction).sum().backward(); // gradients may be summed up
  const Tensor of_W = 2 * torch::mm(direction.t(), x);
  lora_fa.project_gradients();

  // The least squares of s · ĝ A = ∂L/∂W, by a solver.
  const Tensor solved =
      std::get<0>(torch::linalg_lstsq((s * delta.lora_A).t(), of_W.t())).t();
  REQUIRE(close(delta.lora_B.grad(), solved, 1e-6, 1e-9)); // 1e-8 I is added
  REQUIRE_FALSE(delta.lora_A.grad().defined());

  const Tensor before = delta.lora_B.detach().clone();
  const Tensor gradient = delta.lora_B.grad().clone();
  torch::optim::SGD optimizer(
      lora_fa.parameters(), torch::optim::SGDOptions(0.1));
  optimizer.step();
  REQUIRE(close(delta.lora_B, before - 0.1 * gradient));
}

TEST_CASE("LoRA-FA freezes A for good and trains everything else") {
  const auto network = networks::build("conv1d");
  auto adapter = peft::attach(
      *network.module,
      peft::LoraOptions(2)
          .bias("lora_only")
          .modules_to_save({"head"})
          .targets({"conv"}));
  const Tensor x = torch::randn({2, 3, 8});
  network.run({x}).square().mean().backward(); // A has a gradient already
  const peft::LoraFaStep lora_fa(adapter);
  REQUIRE_FALSE(delta_of(adapter).lora_A.grad().defined());
  REQUIRE(lora_fa.parameters().size() == adapter.parameters().size() - 1);
  const Tensor A = delta_of(adapter).lora_A.detach().clone();
  // An optimizer that knows of A does not move it either.
  torch::optim::AdamW optimizer(
      network.module->parameters(),
      torch::optim::AdamWOptions(1e-2).weight_decay(0.1));
  std::vector<Tensor> before;
  for (const auto& p : lora_fa.parameters()) {
    before.push_back(p.detach().clone());
  }
  for (int i = 0; i < 2; ++i) {
    optimizer.zero_grad();
    network.run({x}).square().mean().backward();
    lora_fa.step(optimizer);
  }
  REQUIRE(equal_bits(delta_of(adapter).lora_A.detach(), A));
  size_t i = 0;
  for (const auto& p : lora_fa.parameters()) {
    REQUIRE_FALSE(torch::equal(p, before[i++]));
  }
}

TEST_CASE("LoRA-FA goes on from PiSSA, whose A is no zero") {
  const auto network = networks::build("mlp");
  auto adapter = peft::attach(
      *network.module,
      peft::LoraOptions(2).init("pissa").targets({"fc1", "fc2"}));
  const peft::LoraFaStep lora_fa(adapter);
  torch::optim::SGD optimizer(
      lora_fa.parameters(), torch::optim::SGDOptions(0.05));
  seed(2);
  const Tensor x = torch::randn({8, 10}), target = torch::randn({8, 3});
  const auto loss = [&] { return torch::mse_loss(network.run({x}), target); };
  const double start = loss().item<double>();
  for (int i = 0; i < 20; ++i) {
    optimizer.zero_grad();
    loss().backward();
    lora_fa.step(optimizer);
  }
  REQUIRE(loss().item<double>() < start);
}

TEST_CASE("LoRA-FA says what it cannot train") {
  const auto refused = [](const std::string& network_name,
                          const auto& options,
                          const std::string& words) {
    const auto network = networks::build(network_name);
    auto adapter = peft::attach(*network.module, options);
    const auto error = error_of([&] { peft::LoraFaStep step(adapter); });
    INFO(error);
    CHECK(contains(error, words));
    for (const auto& p : adapter.parameters()) {
      CHECK(p.requires_grad());
    }
  };
  refused(
      "tokens",
      peft::LoraOptions(2).targets({"emb", "fc"}),
      "leave 'emb' (lora r=2, an embedding) out");
  refused(
      "mlp",
      peft::LoraOptions(2).dora(true).targets({"fc1"}),
      "'fc1' carries DoRA");
  refused(
      "conv2d_groups",
      peft::LoraOptions(2).targets({"conv"}),
      "one A for all of B");
  refused("mlp", peft::BitFitOptions(), "(BITFIT) has none");

  const auto network = networks::build("mlp");
  auto adapter = peft::attach(
      *network.module, peft::LoraOptions(2).targets({"fc1", "fc2"}));
  const peft::LoraFaStep lora_fa(adapter);
  network.run({torch::randn({2, 10})}).sum().backward();
  adapter.set_scale(0);
  CHECK(contains(
      error_of([&] { lora_fa.project_gradients(); }),
      "scaling of the adapter"));
}

} // namespace test_lora_fa
