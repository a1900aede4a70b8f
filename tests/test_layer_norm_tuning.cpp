/// LayerNorm tuning: which parameters it trains, HF PEFT's files and numbers,
/// and that nothing else moves.

#include "model_state.h"
#include "networks.h"
#include "test.h"
#include "tiny_models.h"

#include <nlohmann/json.hpp>

#include <fstream>
#include <map>
#include <string>
#include <vector>

namespace test_layer_norm_tuning {

namespace {

using peft::LayerNormOptions;
using torch::Tensor;
using Names = std::vector<std::string>;

std::set<std::string> as_set(const Names& names) {
  return {names.begin(), names.end()};
}

nlohmann::json json_of(const std::string& path) {
  std::ifstream file(path);
  REQUIRE(file.good());
  return nlohmann::json::parse(file);
}

/// Values by the keys that the adapter's file gives its parameters.
std::map<std::string, Tensor> by_file_key(
    const peft::Adapter& adapter,
    const std::vector<Tensor>& values) {
  torch::NoGradGuard no_grad;
  auto parameters = adapter.parameters();
  std::vector<Tensor> own;
  for (size_t i = 0; i < parameters.size(); ++i) {
    own.push_back(parameters[i].clone());
    parameters[i].copy_(values.at(i));
  }
  const TemporaryDirectory folder;
  peft::save(adapter, folder.path().string());
  for (size_t i = 0; i < parameters.size(); ++i) {
    parameters[i].copy_(own[i]);
  }
  return peft::load_safetensors(
      (folder.path() / "adapter_model.safetensors").string());
}

} // namespace

TEST_CASE("LayerNorm tuning trains gain and shift, 2d a norm") {
  struct Row {
    std::string network;
    LayerNormOptions options;
    int64_t count;
  };
  const int64_t d = 16;
  const std::vector<Row> rows{
      {"bert", LayerNormOptions(), 5 * 2 * d},
      {"gpt2", LayerNormOptions(), 5 * 2 * d},
      {"llama", LayerNormOptions(), 5 * d}, // RMSNorm has no shift
      {"t5_v1_0", LayerNormOptions(), (2 * 2 + 2 * 3 + 2) * d},
      {"bert",
       LayerNormOptions().targets({"attention.output.LayerNorm"}),
       2 * 2 * d},
      {"bert", LayerNormOptions().exclude({"embeddings.LayerNorm"}), 4 * 2 * d},
      {"bert",
       LayerNormOptions().modules_to_save({"classifier"}),
       5 * 2 * d + 3 * d + 3},
      {"bert",
       LayerNormOptions().targets({"pooler.dense"}), // any module may be named
       d * d + d}};
  for (const auto& row : rows) {
    INFO(row.network << ", " << row.count);
    const auto network = tiny_models::build(row.network);
    const auto total = peft::count_parameters(*network.module).total;
    auto adapter = peft::attach(*network.module, row.options);
    CHECK(adapter.method() == "LN_TUNING");
    CHECK(adapter.num_parameters() == row.count);
    CHECK(peft::count_parameters(*network.module).total == total);
  }
  auto network = tiny_models::build("gpt2");
  auto adapter = peft::attach(*network.module, LayerNormOptions());
  CHECK(
      as_set(adapter.named_parameters().keys()) ==
      as_set(
          {"transformer.h.0.ln_1.ln_tuning_layers.weight",
           "transformer.h.0.ln_1.ln_tuning_layers.bias",
           "transformer.h.0.ln_2.ln_tuning_layers.weight",
           "transformer.h.0.ln_2.ln_tuning_layers.bias",
           "transformer.h.1.ln_1.ln_tuning_layers.weight",
           "transformer.h.1.ln_1.ln_tuning_layers.bias",
           "transformer.h.1.ln_2.ln_tuning_layers.weight",
           "transformer.h.1.ln_2.ln_tuning_layers.bias",
           "transformer.ln_f.ln_tuning_layers.weight",
           "transformer.ln_f.ln_tuning_layers.bias"}));
}

TEST_CASE("LayerNorm tuning is y = γ' x̂ + β', merges and comes off exactly") {
  seed(2);
  torch::nn::Sequential model(
      torch::nn::Linear(6, 8),
      torch::nn::LayerNorm(torch::nn::LayerNormOptions({8})),
      torch::nn::Linear(8, 3));
  model->to(torch::kDouble);
  auto& norm = *model->ptr(1)->as<torch::nn::LayerNormImpl>();
  const Tensor x = torch::randn({5, 6}, torch::kDouble);
  const Tensor before = model->forward(x);
  const auto plain = state_of(*model);

  auto adapter = peft::attach(*model, LayerNormOptions());
  CHECK(equal_bits(model->forward(x), before));
  randomise(adapter);
  const auto trained = adapter.named_parameters();
  const Tensor gain = trained["1.ln_tuning_layers.weight"].detach();
  const Tensor shift = trained["1.ln_tuning_layers.bias"].detach();
  const Tensor h = model->ptr(0)->as<torch::nn::LinearImpl>()->forward(x);
  const Tensor centred = h - h.mean(1, true);
  const Tensor unit =
      centred / (centred.square().mean(1, true) + norm.options.eps()).sqrt();
  const Tensor expected =
      model->ptr(2)->as<torch::nn::LinearImpl>()->forward(unit * gain + shift);
  const Tensor y = model->forward(x).detach();
  CHECK(close(y, expected, 1e-12, 1e-12));

  adapter.merge();
  {
    torch::NoGradGuard no_grad;
    CHECK(equal_bits(model->forward(x), y));
  }
  adapter.unmerge();
  adapter.disable();
  CHECK(equal_bits(model->forward(x), before));
  adapter.detach();
  CHECK(same_state(state_of(*model), plain));
}

TEST_CASE("LayerNorm tuning: HF PEFT's files, outputs and training steps") {
  for (const std::string name : {"bert", "llama"}) {
    INFO(name);
    const auto folder = golden("layer_norm/" + name);
    const auto facts = json_of(folder + "/case.json");
    auto reference = peft::load_safetensors(folder + "/reference.safetensors");
    const auto network = tiny_models::load(name);
    auto adapter = peft::load(*network.module, folder + "/adapter");
    REQUIRE(adapter.num_parameters() == facts.at("trainable").get<int64_t>());
    const auto parameters = adapter.parameters();
    torch::optim::SGD optimizer(
        parameters,
        torch::optim::SGDOptions(facts.at("learning_rate").get<double>()));
    for (int step = 0; step < facts.at("steps").get<int>(); ++step) {
      optimizer.zero_grad();
      const auto output = network.run(reference);
      const auto loss = network.loss(output, reference);
      loss.backward();
      if (step == 0) {
        CHECK(close(output, reference.at("output"), 1e-5, 1e-6));
        CHECK(close(loss.reshape({1}), reference.at("loss"), 1e-6, 1e-6));
        std::vector<Tensor> gradients;
        for (const auto& p : parameters) {
          gradients.push_back(p.grad());
        }
        for (const auto& [key, value] : by_file_key(adapter, gradients)) {
          INFO(key);
          CHECK(close(value, reference.at("gradient." + key), 1e-5, 1e-6));
        }
      }
      optimizer.step();
    }
    for (const auto& [key, value] : by_file_key(adapter, parameters)) {
      INFO(key);
      CHECK(close(value, reference.at("step." + key), 1e-5, 1e-6));
    }
  }
}

TEST_CASE("LayerNorm tuning's files go back as they came") {
  for (const std::string name : {"bert", "llama"}) {
    INFO(name);
    const auto theirs = golden("layer_norm/" + name + "/adapter");
    const auto network = tiny_models::load(name);
    auto loaded = peft::load(*network.module, theirs);
    const TemporaryDirectory folder;
    peft::save(loaded, folder / "again");
    const auto a =
        peft::load_safetensors(theirs + "/adapter_model.safetensors");
    const auto b = peft::load_safetensors(
        (folder.path() / "again/adapter_model.safetensors").string());
    REQUIRE(a.size() == b.size());
    for (const auto& [key, value] : a) {
      INFO(key);
      CHECK(equal_bits(b.at(key), value));
    }
    CHECK(
        json_of((folder.path() / "again/adapter_config.json").string()) ==
        json_of(theirs + "/adapter_config.json"));

    // Of an adapter that was made here the file names each norm.
    loaded.detach();
    auto own = peft::attach(*network.module, LayerNormOptions());
    randomise(own);
    peft::save(own, folder / "own");
    const auto config =
        json_of((folder.path() / "own/adapter_config.json").string());
    CHECK(config.at("peft_type") == "LN_TUNING");
    CHECK(config.at("target_modules").size() == 5);
    CHECK(
        config.at("target_modules")[0] ==
        (name == "bert" ? "bert.embeddings.LayerNorm"
                        : "model.layers.0.input_layernorm"));
    const auto other = tiny_models::load(name);
    auto again = peft::load(*other.module, folder / "own");
    const auto mine = own.parameters();
    const auto read = again.parameters();
    REQUIRE(mine.size() == read.size());
    for (size_t i = 0; i < mine.size(); ++i) {
      CHECK(equal_bits(read[i], mine[i]));
    }
  }
}

TEST_CASE("LayerNorm tuning says what it cannot find") {
  networks::Mlp model;
  const auto before = state_of(model);
  CHECK(contains(
      error_of([&] { peft::attach(model, LayerNormOptions()); }),
      "LayerNorm tuning finds no normalisation with parameters"));
  CHECK(contains(
      error_of([&] {
        peft::attach(model, LayerNormOptions().targets({"LayerNorm"}));
      }),
      "targets entry 'LayerNorm' matches nothing"));
  CHECK(contains(
      error_of([&] {
        peft::attach(
            model, LayerNormOptions().targets({"fc1"}).exclude({"norm"}));
      }),
      "exclude entry 'norm' matches nothing"));
  CHECK(same_state(before, state_of(model)));

  torch::nn::Sequential plain(torch::nn::LayerNorm(
      torch::nn::LayerNormOptions({4}).elementwise_affine(false)));
  CHECK(contains(
      error_of([&] { peft::attach(*plain, LayerNormOptions()); }),
      "no normalisation with parameters"));
}

} // namespace test_layer_norm_tuning
