/// Training that goes on from a folder, optimizer and all, to the bit.

#include "model_state.h"
#include "networks.h"
#include "test.h"

#include <fstream>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace test_optimizer_state {

using torch::Tensor;
namespace optim = torch::optim;

namespace {

using Optimizer = std::unique_ptr<optim::Optimizer>;
using Make = std::function<Optimizer(std::vector<Tensor>)>;

template <class Kind, class Options>
Make maker(Options options) {
  return [options](std::vector<Tensor> parameters) -> Optimizer {
    return std::make_unique<Kind>(std::move(parameters), options);
  };
}

std::vector<std::pair<std::string, Make>> optimizers() {
  return {
      {"SGD", maker<optim::SGD>(optim::SGDOptions(0.1))},
      {"SGD, momentum",
       maker<optim::SGD>(
           optim::SGDOptions(0.1).momentum(0.9).nesterov(true).weight_decay(
               0.01))},
      {"Adam", maker<optim::Adam>(optim::AdamOptions(1e-2))},
      {"Adam, amsgrad",
       maker<optim::Adam>(optim::AdamOptions(1e-2).amsgrad(true))},
      {"AdamW",
       maker<optim::AdamW>(optim::AdamWOptions(1e-2).weight_decay(0.1))},
      {"RMSprop",
       maker<optim::RMSprop>(
           optim::RMSpropOptions(1e-2).momentum(0.5).centered(true))},
      {"Adagrad", maker<optim::Adagrad>(optim::AdagradOptions(1e-1))},
  };
}

networks::Network network() {
  seed(3);
  return networks::build("mlp");
}

void steps(
    const networks::Network& net,
    optim::Optimizer& optimizer,
    int count,
    uint64_t start) {
  net.module->train();
  for (int i = 0; i < count; ++i) {
    seed(start + static_cast<uint64_t>(i));
    optimizer.zero_grad();
    net.run({torch::randn({6, 10})}).square().mean().backward();
    optimizer.step();
  }
}

void check_same(const peft::Adapter& a, const peft::Adapter& b) {
  const auto left = a.named_parameters(), right = b.named_parameters();
  REQUIRE(left.size() == right.size());
  for (const auto& item : left) {
    INFO(item.key());
    CHECK(equal_bits(item.value().detach(), right[item.key()].detach()));
  }
}

} // namespace

TEST_CASE("Training goes on from a folder to the bit", "[optimizer]") {
  const auto options = peft::LoraOptions(3)
                           .dropout(0.2)
                           .targets({"fc1", "fc2"})
                           .modules_to_save({"head"});
  for (const auto& [name, make] : optimizers()) {
    INFO(name);
    const auto first = network();
    auto adapter = peft::attach(*first.module, options, "mine");
    const auto optimizer = make(adapter.parameters());
    steps(first, *optimizer, 3, 10);
    const TemporaryDirectory folder;
    const auto path = folder.path().string();
    peft::save(adapter, path);
    peft::save_optimizer(*optimizer, adapter, path);

    // In a model with another adapter, under another name, in other order.
    const auto second = network();
    auto beside = peft::attach(
        *second.module, peft::LoraOptions(2).targets({"fc1"}), "beside");
    beside.disable();
    auto again = peft::load(*second.module, path, "again");
    auto parameters = beside.parameters();
    const auto own = again.parameters();
    parameters.insert(parameters.end(), own.rbegin(), own.rend());
    const auto resumed = make(parameters);
    peft::load_optimizer(*resumed, again, path);
    // Without it, the next step is another; SGD alone keeps nothing.
    const auto third = network();
    const auto forgetful = peft::load(*third.module, path);
    const auto fresh = make(forgetful.parameters());

    steps(first, *optimizer, 2, 20);
    steps(second, *resumed, 2, 20);
    steps(third, *fresh, 2, 20);
    check_same(adapter, again);
    if (name != "SGD") {
      CHECK_FALSE(
          torch::equal(forgetful.parameters()[1], adapter.parameters()[1]));
    }
  }
}

TEST_CASE(
    "Adapters of one optimizer are kept apart, whatever the method",
    "[optimizer]") {
  const peft::Targets fc({"fc1", "fc2"});
  const auto first = network();
  auto& model = *first.module;
  std::vector<peft::Adapter> all{
      peft::attach(model, peft::LoHaOptions(2).targets(fc), "loha"),
      peft::attach(model, peft::VeraOptions(3).targets(fc), "vera"),
      peft::attach(model, peft::AdaLoraOptions(9).init_r(2).targets(fc), "ada"),
      peft::attach(model, peft::BitFitOptions(), "bitfit"),
      peft::attach(
          model, peft::Masked(peft::LoraOptions(2).targets(fc)), "masked")};
  for (size_t i = 0; i < all.size(); ++i) {
    randomise(all[i], i);
  }
  optim::AdamW optimizer(model.parameters(), optim::AdamWOptions(1e-2));
  steps(first, optimizer, 2, 10);
  const TemporaryDirectory folder;
  const auto path = folder.path().string();
  peft::save_adapters(model, path);
  for (const auto& adapter : all) {
    peft::save_optimizer(optimizer, adapter, folder / adapter.name());
  }
  const auto second = network();
  const auto loaded = peft::load_adapters(*second.module, path);
  std::vector<std::string> names;
  for (const auto& adapter : all) {
    names.push_back(adapter.name());
  }
  // In the order of attaching, which the sums of both networks follow.
  const auto third = network();
  for (const auto& adapter : all) {
    peft::load(*third.module, path, adapter.name());
  }
  optim::AdamW resumed(third.module->parameters(), optim::AdamWOptions(1e-2));
  for (const auto& adapter : peft::adapters(*third.module)) {
    peft::load_optimizer(resumed, adapter, folder / adapter.name());
  }
  steps(first, optimizer, 2, 20);
  steps(third, resumed, 2, 20);
  for (const auto& adapter : all) {
    INFO(adapter.name());
    check_same(adapter, peft::get_adapter(*third.module, adapter.name()));
  }
  CHECK(loaded.size() == all.size());
}

TEST_CASE("A state that does not fit is refused as a whole", "[optimizer]") {
  const auto net = network();
  auto& model = *net.module;
  auto adapter = peft::attach(model, peft::LoraOptions(2).targets({"fc1"}));
  optim::AdamW optimizer(adapter.parameters(), optim::AdamWOptions(1e-2));
  const TemporaryDirectory folder;
  const auto path = folder.path().string();
  const auto file = folder / "libpeft_optimizer.safetensors";
  CHECK(contains(
      error_of([&] { peft::save_optimizer(optimizer, adapter, path); }),
      "save the adapter there first"));
  CHECK(contains(
      error_of([&] { peft::load_optimizer(optimizer, adapter, path); }),
      "holds no libpeft_optimizer.safetensors"));
  peft::save(adapter, path);
  peft::save_optimizer(optimizer, adapter, path); // before the first step
  peft::load_optimizer(optimizer, adapter, path);
  CHECK(optimizer.state().empty());
  steps(net, optimizer, 1, 10);
  peft::save_optimizer(optimizer, adapter, path);
  CHECK(std::filesystem::exists(file));

  const auto refused = [&](optim::Optimizer& other,
                           const peft::Adapter& own,
                           const std::vector<std::string>& parts) {
    const size_t before = other.state().size();
    const auto error =
        error_of([&] { peft::load_optimizer(other, own, path); });
    INFO(error);
    for (const auto& part : parts) {
      CHECK(contains(error, part));
    }
    CHECK_FALSE(error.empty());
    CHECK(other.state().size() == before);
  };
  optim::Adam adam(adapter.parameters(), optim::AdamOptions(1e-2));
  refused(adam, adapter, {"holds the state of AdamW, and this is Adam"});
  auto unknown = optim::LBFGS(adapter.parameters(), optim::LBFGSOptions(1));
  refused(unknown, adapter, {"SGD, Adam, AdamW, RMSprop and Adagrad can"});
  optim::AdamW base(
      {torch::zeros({2}, torch::requires_grad())}, optim::AdamWOptions(1e-2));
  refused(base, adapter, {"no parameter of adapter 'default'"});

  const auto second = network();
  auto deep = peft::attach(
      *second.module, peft::LoraOptions(3).targets({"fc1"}), "deep");
  optim::AdamW of_deep(deep.parameters(), optim::AdamWOptions(1e-2));
  refused(
      of_deep,
      deep,
      {"does not fit adapter 'deep'",
       "fc1.lora_A.weight.exp_avg: ",
       "[2, 10]",
       "beside a parameter of shape [3, 10]"});
  deep.detach();
  auto elsewhere = peft::attach(
      *second.module, peft::LoraOptions(2).targets({"fc2"}), "elsewhere");
  optim::AdamW of_elsewhere(elsewhere.parameters(), optim::AdamWOptions(1e-2));
  refused(
      of_elsewhere,
      elsewhere,
      {"fc1.lora_A.weight.exp_avg: the optimizer has no such parameter",
       "'fc2.lora_A.weight.exp_avg'"});

  auto tensors = peft::load_safetensors(file);
  tensors.erase("fc1.lora_A.weight.exp_avg");
  peft::save_safetensors(tensors, file, {{"optimizer", "AdamW"}});
  optim::AdamW same(adapter.parameters(), optim::AdamWOptions(1e-2));
  refused(same, adapter, {"fc1.lora_A.weight.exp_avg: missing from the file"});
  peft::save_safetensors(tensors, file);
  refused(same, adapter, {"holds the state of no optimizer"});

  // A file of a step that did without what this optimizer's step reads.
  const auto lacks = [&](auto before, auto now, const std::string& field) {
    before.zero_grad();
    steps(net, before, 1, 10);
    peft::save_optimizer(before, adapter, path);
    refused(
        now,
        adapter,
        {"fc1.lora_B.weight." + field + ": missing from the file"});
  };
  const auto own = adapter.parameters();
  lacks(
      optim::Adam(own, optim::AdamOptions(1e-2)),
      optim::Adam(own, optim::AdamOptions(1e-2).amsgrad(true)),
      "max_exp_avg_sq");
  lacks(
      optim::AdamW(own, optim::AdamWOptions(1e-2)),
      optim::AdamW(own, optim::AdamWOptions(1e-2).amsgrad(true)),
      "max_exp_avg_sq");
  lacks(
      optim::RMSprop(own, optim::RMSpropOptions(1e-2)),
      optim::RMSprop(own, optim::RMSpropOptions(1e-2).momentum(0.9)),
      "momentum_buffer");
  lacks(
      optim::RMSprop(own, optim::RMSpropOptions(1e-2)),
      optim::RMSprop(own, optim::RMSpropOptions(1e-2).centered(true)),
      "grad_avg");

  peft::save(adapter, path); // a later save does not leave an older state
  CHECK_FALSE(std::filesystem::exists(file));
}

} // namespace test_optimizer_state
