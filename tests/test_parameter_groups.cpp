#include "test.h"

#include "golden_case.h"

#include <cmath>
#include <limits>
#include <set>
#include <string>
#include <vector>

namespace test_parameter_groups {

using namespace golden_case;

namespace {

using Groups = std::vector<torch::optim::OptimizerParamGroup>;

peft::LoraPlusOptions golden_options() {
  return peft::LoraPlusOptions().ratio(8).weight_decay(0.1).lr_embedding(3e-3);
}

/// The names of a group's tensors, as the adapter has them.
std::set<std::string> names_of(
    const torch::optim::OptimizerParamGroup& group,
    const peft::Adapter& adapter) {
  std::set<std::string> result;
  for (const auto& item : adapter.named_parameters()) {
    for (const auto& p : group.params()) {
      if (p.is_same(item.value())) {
        result.insert(item.key());
      }
    }
  }
  REQUIRE(result.size() == group.params().size());
  return result;
}

const torch::optim::AdamWOptions& adamw(
    const torch::optim::OptimizerParamGroup& group) {
  return dynamic_cast<const torch::optim::AdamWOptions&>(group.options());
}

} // namespace

TEST_CASE("LoRA+ has HF PEFT's groups and takes its steps") {
  for (const auto& name : folders("steps_lora_plus", "lora_init")) {
    DYNAMIC_SECTION(name) {
      const Golden golden(name, "lora_init");
      const auto network = golden.network();
      const auto adapter = peft::load(*network.module, golden.adapter());
      torch::optim::AdamW optimizer(peft::lora_plus_groups(
          adapter,
          1e-2,
          golden_options(),
          torch::optim::AdamWOptions().betas({0.8, 0.9})));

      size_t number = 0;
      for (const auto& wanted : golden.facts.at("groups")) {
        std::set<std::string> expected;
        for (const auto& key : wanted.at("names")) {
          expected.insert(key.get<std::string>());
        }
        if (expected.empty()) {
          continue; // PEFT keeps empty groups
        }
        REQUIRE(number < optimizer.param_groups().size());
        const auto& group = optimizer.param_groups()[number++];
        CHECK(names_of(group, adapter) == expected);
        CHECK(
            std::abs(adamw(group).lr() - wanted.at("lr").get<double>()) <
            1e-15);
        CHECK(
            adamw(group).weight_decay() ==
            wanted.at("weight_decay").get<double>());
        CHECK(adamw(group).betas() == std::make_tuple(0.8, 0.9));
      }
      REQUIRE(number == optimizer.param_groups().size());

      for (int i = 0; i < 3; ++i) {
        optimizer.zero_grad();
        golden.loss(network).backward();
        optimizer.step();
      }
      const auto parameters = adapter.named_parameters();
      const auto expected = golden.group("step");
      REQUIRE(expected.size() == parameters.size());
      for (const auto& [key, value] : expected) {
        INFO(key);
        REQUIRE(near(find(parameters, key), value, 1e-5));
      }
    }
  }
}

TEST_CASE("LoRA+ groups serve every optimizer") {
  using namespace torch::optim;
  const auto network = networks::build("mlp");
  const auto adapter = peft::attach(
      *network.module,
      peft::LoraOptions(2).bias("lora_only").targets({"fc1", "fc2"}));
  const Tensor x = torch::randn({4, 10});
  const auto rates = [&](Optimizer& optimizer) {
    std::vector<double> result;
    for (const auto& group : optimizer.param_groups()) {
      result.push_back(group.options().get_lr());
    }
    network.run({x}).square().mean().backward();
    const auto before = adapter.named_parameters()["fc1.lora_B.weight"].clone();
    optimizer.step();
    REQUIRE_FALSE(
        torch::equal(before, adapter.named_parameters()["fc1.lora_B.weight"]));
    return result;
  };
  const std::vector<double> expected{1e-2, 16e-2, 16e-2};

  AdamW plain(peft::lora_plus_groups(adapter, 1e-2));
  CHECK(rates(plain) == expected);
  CHECK(adamw(plain.param_groups()[0]).weight_decay() == 0);

  const SGDOptions like = SGDOptions(0).momentum(0.9);
  SGD sgd(
      peft::lora_plus_groups(
          adapter, 1e-2, peft::LoraPlusOptions().weight_decay(0.1), like),
      like);
  CHECK(rates(sgd) == expected);
  const auto decay = [&](size_t group) {
    const auto& options =
        dynamic_cast<SGDOptions&>(sgd.param_groups()[group].options());
    CHECK(options.momentum() == 0.9);
    return options.weight_decay();
  };
  CHECK(decay(0) == 0.1);
  CHECK(decay(1) == 0.1);
  CHECK(decay(2) == 0); // biases

  Adam adam(peft::lora_plus_groups<AdamOptions>(adapter, 1e-2));
  CHECK(rates(adam) == expected);
}

TEST_CASE("LoRA+ leaves out what is frozen, and refuses what has no rate") {
  const auto network = networks::build("mlp");
  auto adapter = peft::attach(
      *network.module, peft::LoraOptions(2).targets({"fc1", "fc2"}));
  adapter.named_parameters()["fc1.lora_A.weight"].set_requires_grad(false);
  const Groups groups = peft::lora_plus_groups(adapter, 1e-3);
  REQUIRE(groups.size() == 2);
  CHECK(
      names_of(groups[0], adapter) ==
      std::set<std::string>{"fc2.lora_A.weight"});
  CHECK(
      names_of(groups[1], adapter) ==
      std::set<std::string>{"fc1.lora_B.weight", "fc2.lora_B.weight"});

  const auto error = [&](double lr, const peft::LoraPlusOptions& options) {
    return error_of([&] { peft::lora_plus_groups(adapter, lr, options); });
  };
  const peft::LoraPlusOptions usual;
  CHECK(contains(error(-1, usual), "lr to be finite and not negative, got -1"));
  CHECK(contains(
      error(1e-3, peft::LoraPlusOptions().ratio(0.5)),
      "a ratio of at least 1, got 0.5"));
  CHECK(contains(
      error(1e-3, peft::LoraPlusOptions().weight_decay(-0.1)),
      "weight_decay to be finite"));
  CHECK(contains(
      error(
          1e-3,
          peft::LoraPlusOptions().lr_embedding(
              std::numeric_limits<double>::infinity())),
      "lr_embedding to be finite"));
  adapter.set_trainable(false);
  CHECK(contains(error(1e-3, usual), "set_trainable(true)"));
  adapter.detach();
  adapter = peft::attach(*network.module, peft::BitFitOptions());
  CHECK(contains(error(1e-3, usual), "(BITFIT) has none"));
}

} // namespace test_parameter_groups
