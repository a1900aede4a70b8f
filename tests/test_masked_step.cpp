#include "accounting.h"
#include "model_state.h"
#include "test.h"

#include <peft/methods/child_tuning.h>
#include <peft/methods/fish.h>
#include <peft/train/fisher.h>
#include <peft/train/masked_step.h>

#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace test_masked_step {

using torch::Tensor;

namespace {

/// Two linear layers in float64, the second of which is called "layer".
struct NetImpl : torch::nn::Module {
  NetImpl() {
    torch::manual_seed(4);
    first = register_module("first", torch::nn::Linear(3, 4));
    layer = register_module("layer", torch::nn::Linear(4, 2));
    to(torch::kDouble);
  }
  Tensor forward(const Tensor& x) {
    return layer(first(x).tanh());
  }
  torch::nn::Linear first{nullptr}, layer{nullptr};
};
TORCH_MODULE(Net);

Tensor inputs(int64_t step) {
  torch::manual_seed(100 + static_cast<uint64_t>(step));
  return torch::randn({5, 3}, torch::kDouble);
}

/// Entries 1 and 6 of layer.weight and 0 of layer.bias.
peft::SparseMask some_mask() {
  peft::SparseMask mask;
  mask.set("layer.weight", torch::tensor({1, 6}, torch::kLong));
  mask.set("layer.bias", torch::tensor({0}, torch::kLong));
  return mask;
}

peft::ChildTuningOptions task_driven() {
  return peft::ChildTuningOptions(0.3).mode("D").mask(some_mask());
}

using MakeOptimizer = std::function<std::unique_ptr<torch::optim::Optimizer>(
    std::vector<Tensor>)>;

std::vector<std::pair<std::string, MakeOptimizer>> optimizers() {
  using namespace torch::optim;
  return {
      {"SGD with momentum and decay",
       [](std::vector<Tensor> p) {
         return std::make_unique<SGD>(
             std::move(p), SGDOptions(0.1).momentum(0.9).weight_decay(0.1));
       }},
      {"Adam with decay",
       [](std::vector<Tensor> p) {
         return std::make_unique<Adam>(
             std::move(p), AdamOptions(0.1).weight_decay(0.1));
       }},
      {"AdamW",
       [](std::vector<Tensor> p) {
         return std::make_unique<AdamW>(
             std::move(p), AdamWOptions(0.1).weight_decay(0.1));
       }},
  };
}

peft::MaskedCopy& copy_at(const peft::Adapter& adapter, const char* path) {
  for (const auto& site : adapter.shared_state()->sites) {
    if (site.parameters.front() == path) {
      return dynamic_cast<peft::MaskedCopy&>(*site.delta);
    }
  }
  throw std::runtime_error(path);
}

int64_t numbers_in_state(const torch::optim::Optimizer& optimizer) {
  int64_t count = 0;
  for (const auto& item : optimizer.state()) {
    const auto& state =
        static_cast<const torch::optim::AdamWParamState&>(*item.second);
    count += state.exp_avg().numel() + state.exp_avg_sq().numel();
  }
  return count;
}

} // namespace

TEST_CASE("A hard mask keeps the bits of what it masks, in any optimizer") {
  for (const auto& [name, make] : optimizers()) {
    for (const bool packed : {true, false}) {
      INFO(name << (packed ? ", packed" : ", whole"));
      Net net;
      auto adapter = peft::attach(*net, task_driven());
      auto& weight = copy_at(adapter, "layer.weight");
      const Tensor start = weight.value.detach().clone();
      peft::MaskedStep masked(adapter);
      auto optimizer =
          make(packed ? masked.parameters() : adapter.parameters());
      for (int step = 0; step < 4; ++step) {
        optimizer->zero_grad();
        net->forward(inputs(step)).square().sum().backward();
        masked.step(*optimizer);
      }
      const Tensor moved = weight.value.detach().ne(start).view({-1});
      CHECK(torch::equal(
          moved.nonzero().view({-1}), torch::tensor({1, 6}, torch::kLong)));
      // What is not masked is trained whole.
      CHECK(net->first->weight.ne(peft::base(net->first->weight))
                .all()
                .item<bool>());
      CHECK(equal_bits(peft::base(net->layer->weight).detach(), start));
    }
  }
}

TEST_CASE("Packed, the steps are the same and the state has size k") {
  std::map<bool, std::vector<Tensor>> values;
  for (const bool packed : {true, false}) {
    Net net;
    auto adapter = peft::attach(*net, task_driven().targets({"layer"}));
    peft::MaskedStep masked(adapter);
    torch::optim::AdamW optimizer(
        packed ? masked.parameters() : adapter.parameters(),
        torch::optim::AdamWOptions(0.1).weight_decay(0.1));
    for (int step = 0; step < 4; ++step) {
      // zero_grad() does not reach the whole copies in the packed case
      optimizer.zero_grad();
      for (int part = 0; part < 2; ++part) { // accumulation
        net->forward(inputs(2 * step + part)).square().sum().backward();
      }
      torch::nn::utils::clip_grad_norm_(adapter.parameters(), 1.0);
      masked.step(optimizer);
    }
    for (const auto& p : adapter.parameters()) {
      values[packed].push_back(p.detach().clone());
    }
    CHECK(numbers_in_state(optimizer) == (packed ? 2 * 3 : 2 * (8 + 2)));
  }
  REQUIRE(values[true].size() == 2);
  for (size_t i = 0; i < 2; ++i) {
    CHECK(close(values[true][i], values[false][i]));
  }
}

TEST_CASE("FISH mask's optimizer holds two numbers an entry, in bytes") {
  for (const bool hard : {true, false}) {
    Net net;
    auto adapter = peft::attach(
        *net,
        peft::FishOptions()
            .mask(some_mask())
            .semantics(hard ? "hard" : "reference"));
    torch::optim::AdamW optimizer(adapter.parameters(), 0.1);
    net->forward(inputs(0)).square().sum().backward();
    const accounting::Memory memory;
    optimizer.step();
    CHECK(memory.held() == 2 * 8 * (hard ? 3 : 12 + 4 + 8 + 2));
  }
}

TEST_CASE("Clipping before the mask gives .6, after it 1") {
  struct OneImpl : torch::nn::Module {
    OneImpl() {
      layer = register_parameter("layer", torch::zeros({2}, torch::kDouble));
    }
    Tensor layer;
  };
  const auto one = std::make_shared<OneImpl>();
  peft::SparseMask mask;
  mask.set("layer", torch::tensor({0}, torch::kLong));
  const auto loss = [&] {
    return (one->layer * torch::tensor({3.0, 4.0}, torch::kDouble)).sum();
  };
  const auto step_of = [&](const peft::Adapter& adapter, bool mask_first) {
    peft::MaskedStep masked(adapter);
    torch::optim::SGD optimizer(masked.parameters(), 1.0);
    loss().backward();
    if (mask_first) {
      masked.mask_gradients();
    }
    torch::nn::utils::clip_grad_norm_(adapter.parameters(), 1.0);
    masked.step(optimizer);
    return peft::effective(one->layer).detach().clone();
  };
  const auto semantics = GENERATE(as<std::string>(), "hard", "reference");
  {
    auto adapter = peft::attach(
        *one,
        peft::ChildTuningOptions(0.5).mode("D").mask(mask).semantics(
            semantics));
    const bool mask_first = GENERATE(false, true);
    CHECK(close(
        step_of(adapter, mask_first),
        torch::tensor({mask_first ? -1.0 : -0.6, 0.0}, torch::kDouble),
        1e-6,
        0));
    adapter.detach();
  }
  // FISH mask needs no call: gradients are masked as they arrive.
  auto adapter =
      peft::attach(*one, peft::FishOptions().mask(mask).semantics(semantics));
  CHECK(close(
      step_of(adapter, false),
      torch::tensor({-1.0, 0.0}, torch::kDouble),
      1e-6,
      0));
}

TEST_CASE("In the published step, decay moves what the mask leaves out") {
  Net net;
  const Tensor start = net->layer->weight.detach().clone();
  auto adapter = peft::attach(*net, task_driven().semantics("reference"));
  peft::MaskedStep masked(adapter);
  torch::optim::AdamW optimizer(
      masked.parameters(), torch::optim::AdamWOptions(0.1).weight_decay(0.1));
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    net->forward(inputs(step)).square().sum().backward();
    masked.step(optimizer);
  }
  const Tensor value =
      copy_at(adapter, "layer.weight").value.detach().view({-1});
  const Tensor decayed = (start * std::pow(1 - 0.1 * 0.1, 3)).view({-1});
  for (const int64_t i : {0, 2, 3, 4, 5, 7}) {
    CHECK(close(value[i], decayed[i]));
  }
  for (const int64_t i : {1, 6}) {
    CHECK_FALSE(close(value[i], decayed[i]));
  }
}

TEST_CASE("Each step draws a mask, which hard keeps and momentum passes") {
  const auto semantics = GENERATE(as<std::string>(), "hard", "reference");
  Net net;
  auto adapter = peft::attach(
      *net, peft::ChildTuningOptions(0.5).seed(9).semantics(semantics));
  auto& weight = copy_at(adapter, "first.weight");
  peft::MaskedStep masked(adapter);
  torch::optim::SGD optimizer(
      masked.parameters(),
      torch::optim::SGDOptions(0.1).momentum(0.9).weight_decay(0.1));
  Tensor momentum = torch::zeros_like(weight.value);
  bool differs = false;
  Tensor last;
  for (int step = 0; step < 5; ++step) {
    optimizer.zero_grad();
    net->forward(inputs(step)).square().sum().backward();
    const Tensor mask = weight.step_mask();
    CHECK(torch::equal(mask, weight.step_mask()));
    differs = differs || (last.defined() && !torch::equal(mask, last));
    last = mask;
    // The published step on the gradient that arrived, in plain arithmetic.
    const Tensor before = weight.value.detach().clone();
    const Tensor g = weight.value.grad() * mask / 0.5 + 0.1 * before;
    momentum = step == 0 ? g : 0.9 * momentum + g;
    const Tensor published = before - 0.1 * momentum;
    masked.step(optimizer);
    CHECK(weight.steps() == step + 1);
    const Tensor expected =
        semantics == "hard" ? torch::where(mask, published, before) : published;
    CHECK(close(weight.value.detach(), expected));
    if (semantics == "hard") {
      CHECK(equal_bits(
          weight.value.detach().index({~mask}), before.index({~mask})));
    }
  }
  CHECK(differs);
}

TEST_CASE("Groups, dtypes and strangers in one optimizer") {
  Net net;
  net->layer->to(torch::kFloat);
  auto child = peft::attach(*net, task_driven().targets({"layer"}), "child");
  auto other =
      peft::attach(*net, peft::BitFitOptions().targets({"first"}), "other");
  peft::MaskedStep masked(child);
  std::vector<torch::optim::OptimizerParamGroup> groups;
  groups.emplace_back(masked.parameters());
  groups.emplace_back(other.parameters());
  groups[1].set_options(std::make_unique<torch::optim::SGDOptions>(0.5));
  torch::optim::SGD optimizer(groups, torch::optim::SGDOptions(0.1));
  const auto y = net->layer(net->first(inputs(0)).tanh().to(torch::kFloat));
  y.square().sum().backward();
  const Tensor start = other.parameters()[0].detach().clone();
  const Tensor gradient = other.parameters()[0].grad().clone();
  const Tensor weight = copy_at(child, "layer.weight").value;
  const Tensor before = weight.detach().clone();
  const Tensor weight_gradient = weight.grad().clone();
  masked.step(optimizer);
  CHECK(close(other.parameters()[0].detach(), start - 0.5 * gradient));
  CHECK(weight.scalar_type() == torch::kFloat);
  Tensor expected = before.clone();
  for (const int64_t i : {1, 6}) {
    expected.view({-1})[i] -= 0.1 * weight_gradient.view({-1})[i];
  }
  CHECK(close(weight.detach(), expected));
}

TEST_CASE("A step that masks cannot be taken wrongly") {
  Net net;
  auto adapter = peft::attach(*net, peft::ChildTuningOptions(0.5));
  peft::MaskedStep masked(adapter);
  net->forward(inputs(0)).sum().backward();
  torch::optim::LBFGS lbfgs(masked.parameters());
  CHECK(contains(error_of([&] { masked.step(lbfgs); }), "LBFGS evaluates"));
  torch::optim::SGD stranger({torch::zeros({1}, torch::requires_grad())}, 0.1);
  CHECK(contains(
      error_of([&] { masked.step(stranger); }),
      "holds no parameter of this adapter"));
  masked.mask_gradients();
  CHECK(contains(
      error_of([&] { masked.mask_gradients(); }), "called twice without"));

  CHECK(contains(
      error_of([] { peft::MaskedStep empty{peft::Adapter()}; }),
      "handle is empty"));

  Net another;
  auto driven = peft::attach(*another, task_driven());
  peft::MaskedStep both(driven);
  const auto& value = copy_at(driven, "layer.weight").value;
  auto twice_held = both.parameters();
  twice_held.push_back(value);
  torch::optim::SGD twice(twice_held, 0.1);
  CHECK(
      contains(error_of([&] { both.step(twice); }), "masked parameter twice"));
}

TEST_CASE("A masked copy moves between dtypes with its integers") {
  Net net;
  auto adapter = peft::attach(*net, task_driven());
  auto& copy = copy_at(adapter, "layer.weight");
  net->to(torch::kFloat);
  CHECK(copy.value.scalar_type() == torch::kFloat);
  CHECK(torch::equal(copy.indices(), torch::tensor({1, 6}, torch::kLong)));
  adapter.detach();
  auto free = peft::attach(*net, peft::ChildTuningOptions(0.5).seed(1));
  const auto mask = copy_at(free, "layer.weight").step_mask();
  net->to(torch::kDouble);
  CHECK(torch::equal(copy_at(free, "layer.weight").step_mask(), mask));
}

} // namespace test_masked_step
