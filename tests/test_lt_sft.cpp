/// Full fine-tuning and the lottery tickets that are drawn from it, against
/// reference/make_sparse.py.

#include "model_state.h"
#include "networks.h"
#include "test.h"

#include <peft/methods/lt_sft.h>
#include <peft/methods/sparse_tuning.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

namespace test_lt_sft {

namespace {

using peft::FullTuningOptions;
using peft::SparseTuningOptions;
using torch::Tensor;

using Tensors = std::map<std::string, Tensor>;

Tensors reference() {
  return peft::load_safetensors(
      golden("../../reference/data/sparse/lt_sft.safetensors"));
}

void start(networks::Mlp& model, const Tensors& file) {
  model.to(torch::kDouble);
  torch::NoGradGuard no_grad;
  for (auto& p : model.named_parameters()) {
    p.value().copy_(file.at("before." + p.key()));
  }
}

} // namespace

TEST_CASE("a lottery ticket is drawn and trained as published") {
  const auto file = reference();
  networks::Mlp model;
  start(model, file);
  const auto plain = state_of(model);
  const auto train = [&](const peft::Adapter& adapter, double pull) {
    torch::optim::SGD optimizer(adapter.parameters(), 0.5);
    for (int step = 0; step < 4; ++step) {
      optimizer.zero_grad();
      auto loss =
          (model.forward(file.at("x")) - file.at("target")).square().mean();
      if (pull != 0) {
        loss = loss + pull * peft::distance_from_start(adapter) / 419;
      }
      loss.backward();
      optimizer.step();
    }
  };

  auto full =
      peft::attach(model, FullTuningOptions().modules_to_save({"head"}));
  CHECK(full.num_parameters() == 419);
  CHECK(peft::distance_from_start(full).item<double>() == 0);
  CHECK(contains(
      error_of([&] { peft::lottery_ticket(full, 40); }),
      "is where it started"));
  train(full, 0.1);
  for (const auto& item : full.named_parameters()) {
    INFO(item.key());
    CHECK(close(item.value(), file.at("full." + item.key())));
  }
  const auto mask = peft::lottery_ticket(full, 40);
  CHECK(mask.numel() == 40);
  for (const auto& p : model.named_parameters()) {
    const auto found = file.find("mask." + p.key());
    if (found != file.end()) {
      INFO(p.key());
      CHECK(equal_bits(
          mask.indices_of(p.key()), found->second.view(-1).nonzero().view(-1)));
    }
  }
  CHECK(contains(
      error_of([&] { peft::lottery_ticket(full, 381); }),
      "k = 381 entries of only 380")); // the head is no part of it
  CHECK(contains(
      error_of([&] { peft::lottery_ticket(full, 0); }), "at least one entry"));
  full.merge();
  CHECK(contains(
      error_of([&] { peft::lottery_ticket(full, 4); }), "unmerge() it first"));
  CHECK(contains(
      error_of([&] { peft::distance_from_start(full); }),
      "unmerge() it first"));
  full.unmerge();
  full.detach();
  CHECK(same_state(state_of(model), plain)); // θ₀ again

  for (const bool additive : {false, true}) {
    INFO("additive " << additive);
    auto adapter = peft::attach(
        model,
        SparseTuningOptions(mask).additive(additive).modules_to_save({"head"}));
    CHECK(adapter.num_parameters() == 40 + 39);
    train(adapter, 0);
    Tensor distance = torch::zeros({}, torch::kDouble);
    for (const auto& p : peft::detail::base_parameters(model)) {
      INFO(p.first);
      const auto value = peft::effective(p.second).detach();
      CHECK(close(value, file.at("after." + p.first)));
      distance += (value - file.at("before." + p.first)).abs().sum();
    }
    CHECK(close(peft::distance_from_start(adapter), distance));
    CHECK(close(model.forward(file.at("x")), file.at("output")));
    adapter.detach();
  }
}

TEST_CASE("the distance from the start has a gradient") {
  const auto file = reference();
  networks::Mlp model;
  start(model, file);
  for (const bool additive : {false, true}) {
    peft::SparseMask mask;
    mask.set("fc1.weight", torch::tensor({3, 50, 80}));
    auto adapter =
        peft::attach(model, SparseTuningOptions(mask).additive(additive));
    const auto before = adapter.parameters()[0].detach().clone();
    {
      torch::NoGradGuard no_grad;
      adapter.parameters()[0] += torch::tensor({-0.5, 0., 2.});
    }
    const auto distance = peft::distance_from_start(adapter);
    CHECK(close(distance, torch::tensor(2.5, torch::kDouble)));
    distance.backward();
    CHECK(close(
        adapter.parameters()[0].grad(),
        torch::tensor({-1., 0., 1.}, torch::kDouble)));
    adapter.detach();
  }
  auto lora = peft::attach(model, peft::LoraOptions(1).targets({"fc1"}));
  CHECK(contains(
      error_of([&] { peft::distance_from_start(lora); }),
      "has no start to be far from"));
  CHECK(contains(
      error_of([&] { peft::lottery_ticket(lora, 1); }),
      "attach peft::FullTuningOptions and train first"));
}

TEST_CASE("full fine-tuning takes the steps of the plain optimizer") {
  const auto file = reference();
  networks::Mlp plain, model;
  start(plain, file);
  start(model, file);
  const auto before = state_of(model);
  auto adapter = peft::attach(model, FullTuningOptions());
  const auto options = torch::optim::AdamWOptions(0.01).weight_decay(0.1);
  torch::optim::AdamW a(plain.parameters(), options);
  torch::optim::AdamW b(model.parameters(), options);
  for (int step = 0; step < 5; ++step) {
    a.zero_grad();
    b.zero_grad();
    plain.forward(file.at("x")).square().mean().backward();
    model.forward(file.at("x")).square().mean().backward();
    a.step();
    b.step();
  }
  for (const auto& p : plain.named_parameters()) {
    INFO(p.key());
    CHECK(equal_bits(
        adapter.named_parameters()[p.key()].detach(), p.value().detach()));
  }
  CHECK(peft::count_parameters(model).trainable == 419);
  CHECK(peft::count_parameters(model).total == 419);

  TemporaryDirectory folder;
  peft::save(adapter, folder / "full");
  const auto y = model.forward(file.at("x")).detach();
  networks::Mlp fresh;
  start(fresh, file);
  auto loaded = peft::load(fresh, folder / "full");
  CHECK(loaded.method() == "FULL");
  CHECK(equal_bits(fresh.forward(file.at("x")), y));
  peft::merge(fresh);
  for (const auto& p : plain.named_parameters()) {
    CHECK(equal_bits(
        fresh.named_parameters()[p.key()].detach(), p.value().detach()));
  }
  adapter.detach();
  CHECK(same_state(state_of(model), before));
}

TEST_CASE("full fine-tuning of parts") {
  struct Row {
    FullTuningOptions options;
    int64_t count;
  };
  const std::vector<Row> rows{
      {FullTuningOptions(), 419},
      {FullTuningOptions().targets({"fc1"}), 176},
      {FullTuningOptions().targets({"fc1", "head.bias"}), 179},
      {FullTuningOptions().targets({"fc1"}).exclude({"bias"}), 160},
      {FullTuningOptions().exclude({"fc1"}).modules_to_save({"head"}), 243},
      {FullTuningOptions().targets({"fc1"}).modules_to_save({"head"}), 215}};
  for (const auto& row : rows) {
    seed(1);
    networks::Mlp model, fresh;
    auto adapter = peft::attach(model, row.options);
    CHECK(adapter.num_parameters() == row.count);
    randomise(adapter);
    TemporaryDirectory folder; // the choice is in the file
    peft::save(adapter, folder / "full");
    CHECK(peft::load(fresh, folder / "full").num_parameters() == row.count);
  }
  networks::Words tied("emb", "out", true);
  CHECK(peft::attach(tied, FullTuningOptions()).num_parameters() == 66);

  networks::Mlp model;
  torch::nn::Sequential renormed(
      torch::nn::Embedding(torch::nn::EmbeddingOptions(4, 3).max_norm(1)));
  struct Refusal {
    torch::nn::Module& model;
    FullTuningOptions options;
    std::string part;
  };
  const std::vector<Refusal> refusals{
      {model, FullTuningOptions().targets({"fc9"}), "targets entry 'fc9'"},
      {model, FullTuningOptions().exclude({"fc9"}), "exclude entry 'fc9'"},
      {model,
       FullTuningOptions().modules_to_save({"fc9"}),
       "modules_to_save entry 'fc9'"},
      {model,
       FullTuningOptions().exclude({"fc1", "fc2", "head"}),
       "nothing to adapt"},
      {*renormed, FullTuningOptions(), "Name '0' in exclude"}};
  for (const auto& row : refusals) {
    const auto before = state_of(row.model);
    const auto error = error_of([&] { peft::attach(row.model, row.options); });
    INFO(error);
    CHECK(contains(error, row.part));
    CHECK(same_state(state_of(row.model), before));
  }
}

} // namespace test_lt_sft
