// What random cases of golden/fuzz_with_peft.py brought up, each on the
// smallest network that shows it.

#include "test.h"

#include <fstream>
#include <string>
#include <vector>

namespace test_hf_details {

using torch::Tensor;

namespace {

/// One unit in the last place of half precision is allowed once, no more.
bool is_rounded(const Tensor& y, const Tensor& exact) {
  const double unit = y.scalar_type() == torch::kHalf ? 0x1p-11 : 0x1p-8;
  const Tensor error = (y.to(torch::kDouble) - exact).abs();
  const Tensor allowed =
      exact.abs() * unit + 1e-5 * exact.abs().max().clamp_min(1e-3);
  return error.le(allowed).all().item<bool>();
}

template <class Options>
void check_half(torch::ScalarType dtype, Options options) {
  seed(3);
  torch::nn::Linear layer(12, 9);
  layer->to(dtype);
  auto adapter = peft::attach(*layer, options.targets(peft::Targets({""})));
  {
    torch::NoGradGuard no_grad;
    for (auto p : adapter.parameters()) {
      p.copy_(2 * torch::randn_like(p));
    }
  }
  INFO(adapter.method());
  const Tensor x = torch::randn({5, 12}).to(dtype);
  auto wide = peft::clone(layer);
  wide->to(torch::kDouble);
  const Tensor exact = wide->forward(x.to(torch::kDouble)).detach();
  CHECK(is_rounded(layer->forward(x), exact));
  torch::NoGradGuard no_grad;
  for (int i = 0; i < 3; ++i) { // the second time it is kept
    CHECK(is_rounded(layer->forward(x), exact));
  }
}

/// Two adapters at once are the same function in training (with a dropout that
/// drops nothing), in evaluation and merged.
template <class Options>
void check_two(Options options) {
  seed(4);
  torch::nn::Linear layer(6, 5);
  layer->to(torch::kDouble);
  options.targets(peft::Targets({""}));
  auto one = peft::attach(*layer, options, "one");
  auto two = peft::attach(*layer, options, "two");
  INFO(one.method());
  {
    torch::NoGradGuard no_grad;
    for (auto* adapter : {&one, &two}) {
      for (auto p : adapter->parameters()) {
        p.add_(0.3 * torch::randn_like(p));
      }
    }
  }
  const Tensor x = torch::randn({4, 6}, torch::kDouble);
  layer->train();
  const Tensor trained = layer->forward(x).detach();
  layer->eval();
  const Tensor evaluated = layer->forward(x).detach();
  CHECK(torch::allclose(trained, evaluated, 1e-9, 1e-9));
  one.merge();
  two.merge();
  CHECK(torch::allclose(layer->forward(x), evaluated, 1e-12, 1e-12));
}

/// Layers by name; nothing is run.
struct Named : torch::nn::Module {
  explicit Named(const std::vector<std::string>& names) {
    for (const auto& name : names) {
      register_module(name, torch::nn::Linear(4, 4));
    }
  }
};

nlohmann::json config_in(const TemporaryDirectory& folder) {
  std::ifstream file(folder.path() / "adapter_config.json");
  return nlohmann::json::parse(file);
}

} // namespace

TEST_CASE("Beside half precision a large update is rounded once", "[tuner]") {
  for (const auto dtype : {torch::kBFloat16, torch::kHalf}) {
    check_half(dtype, peft::FourierFtOptions(20));
    check_half(dtype, peft::LoHaOptions(3));
  }
}

TEST_CASE("Two adapters are one function, merged or not", "[tuner]") {
  check_two(peft::LoraOptions(2).dora(true).dropout(1e-12));
  check_two(peft::OftOptions().oft_block_size(3));
}

TEST_CASE("module_dropout of OFT leaves blocks unrotated", "[tuner]") {
  seed(5);
  torch::nn::Linear layer(torch::nn::LinearOptions(8, 8).bias(false));
  auto adapter = peft::attach(
      *layer,
      peft::OftOptions().oft_block_size(2).module_dropout(0.5).targets(
          peft::Targets({""})));
  torch::NoGradGuard no_grad;
  layer->weight.copy_(torch::eye(8));
  for (auto p : adapter.parameters()) {
    p.fill_(0.2);
  }
  const Tensor x = torch::randn({3, 8});
  // Of the four blocks, those that come out as they went in.
  const auto still = [&] {
    return (layer->forward(x) == x).view({3, 4, 2}).all(2).all(0);
  };
  layer->train();
  Tensor ever = still();
  for (int i = 0; i < 20; ++i) {
    const Tensor now = still();
    CHECK(now.sum().item<int64_t>() == 2);
    ever = ever | now;
  }
  CHECK(ever.all().item<bool>());
  layer->eval();
  CHECK_FALSE(still().any().item<bool>());
}

TEST_CASE("OFT's gradient is of the rows that are looked up", "[tuner]") {
  const auto gradient = [](torch::nn::EmbeddingOptions options) {
    seed(6);
    torch::nn::Embedding table(options);
    table->to(torch::kDouble);
    {
      torch::NoGradGuard no_grad; // padding_idx has made zeros of its row
      table->weight.normal_();
    }
    auto adapter = peft::attach(
        *table,
        peft::OftOptions().oft_block_size(2).init_weights(false).targets(
            peft::Targets({""})));
    const Tensor ids = torch::tensor({3, 1, 3, 0, 3, 1}, torch::kLong);
    const Tensor y = table->forward(ids);
    CHECK(torch::allclose(
        y.detach(), peft::effective(table->weight).detach().index({ids})));
    y.pow(3).sum().backward();
    return adapter.parameters().front().grad();
  };
  const torch::nn::EmbeddingOptions plain(5, 4);
  const Tensor expected = gradient(plain);
  CHECK(expected.abs().min().item<double>() > 1e-3);
  auto frequent = plain, padded = plain;
  CHECK(torch::equal(gradient(frequent.scale_grad_by_freq(true)), expected));
  CHECK(torch::equal(gradient(padded.padding_idx(3)), expected));
}

TEST_CASE("VeRA's draws have the precision of the weights", "[tuner]") {
  const auto file_of = [](torch::ScalarType dtype) {
    torch::nn::Linear layer(4, 6);
    layer->to(dtype);
    const auto adapter =
        peft::attach(*layer, peft::VeraOptions(2).targets(peft::Targets({""})));
    const TemporaryDirectory folder;
    peft::save(adapter, folder.path().string());
    return peft::load_safetensors(
        (folder.path() / "adapter_model.safetensors").string());
  };
  const auto single = file_of(torch::kFloat), half = file_of(torch::kHalf);
  for (const char* key : {"base_model.vera_A", "base_model.vera_B"}) {
    const Tensor drawn = single.at(key);
    CHECK(torch::equal(half.at(key), drawn.to(torch::kHalf).to(torch::kFloat)));
    CHECK_FALSE(torch::equal(half.at(key), drawn));
  }
}

TEST_CASE("Rows of tokens are drawn in the table's dtype", "[tuner]") {
  for (const auto dtype : {torch::kFloat, torch::kDouble, torch::kBFloat16}) {
    torch::nn::Embedding table(20, 6);
    table->to(dtype);
    seed(5);
    const auto adapter = peft::attach(
        *table,
        peft::TrainableTokensOptions({3, 1, 2}).init_weights(false).targets(
            peft::Targets({""})));
    seed(5);
    const Tensor drawn = torch::randn({3, 6}, dtype);
    const Tensor start = adapter.parameters().front();
    CHECK(torch::equal(start.detach(), drawn.to(start.scalar_type())));
  }
}

TEST_CASE("Rows of tokens share their gradient by frequency", "[tuner]") {
  torch::nn::Embedding table(
      torch::nn::EmbeddingOptions(10, 4).scale_grad_by_freq(true));
  auto adapter = peft::attach(
      *table,
      peft::TrainableTokensOptions({7, 2}).targets(peft::Targets({""})));
  const Tensor ids = torch::tensor({7, 1, 7, 2, 7}, torch::kLong);
  table->forward(ids).sum().backward();
  // Token 7 stands there three times, and counts as once.
  CHECK(torch::equal(adapter.parameters().front().grad(), torch::ones({2, 4})));
}

TEST_CASE("lora_bias adds to a bias that trains too", "[lora]") {
  for (const char* which : {"lora_only", "all"}) {
    seed(7);
    torch::nn::Linear layer(5, 3);
    layer->to(torch::kDouble);
    auto adapter = peft::attach(
        *layer,
        peft::LoraOptions(2).alpha(6).lora_bias(true).bias(which).targets(
            peft::Targets({""})));
    Tensor A, B, b, bias;
    {
      torch::NoGradGuard no_grad;
      for (auto& item : adapter.named_parameters()) {
        item.value().copy_(torch::randn_like(item.value()));
        const auto& key = item.key();
        const auto ends = [&](const std::string& end) {
          return key.size() >= end.size() &&
              key.compare(key.size() - end.size(), end.size(), end) == 0;
        };
        (ends("lora_A.weight")       ? A
             : ends("lora_B.weight") ? B
             : ends("lora_B.bias")   ? b
                                     : bias) = item.value();
      }
    }
    REQUIRE(bias.defined());
    REQUIRE(b.defined());
    const Tensor x = torch::randn({4, 5}, torch::kDouble);
    const Tensor exact =
        torch::linear(x, peft::base(layer->weight) + 3 * B.mm(A), bias + 3 * b);
    const Tensor y = layer->forward(x);
    CHECK(close(y, exact.detach(), 1e-12, 1e-12));
    y.sum().backward();
    CHECK(close(b.grad(), torch::full_like(b, 12), 1e-12, 1e-12));
    CHECK(close(bias.grad(), torch::full_like(bias, 4), 1e-12, 1e-12));
    adapter.merge();
    torch::NoGradGuard no_grad;
    CHECK(close(layer->forward(x), exact, 1e-12, 1e-12));
  }
}

TEST_CASE("A file's modules_to_save are ends of names", "[file]") {
  const TemporaryDirectory folder;
  {
    Named model({"query", "classifier", "pre_classifier"});
    peft::save(
        peft::attach(
            model,
            peft::LoHaOptions(2).targets({"query"}).modules_to_save(
                {"classifier", "pre_classifier"})),
        folder.path().string());
  }
  auto config = config_in(folder);
  config["modules_to_save"] = {"classifier", "score"}; // PEFT trains both
  std::ofstream(folder.path() / "adapter_config.json") << config.dump();
  Named model({"query", "classifier", "pre_classifier"});
  const auto adapter = peft::load(model, folder.path().string());
  CHECK(adapter.num_parameters() == 4 * 2 * 4 + 2 * (16 + 4));
  const TemporaryDirectory again;
  peft::save(adapter, again.path().string());
  CHECK(config_in(again)["modules_to_save"] == config["modules_to_save"]);
  CHECK(
      peft::load_safetensors(
          (again.path() / "adapter_model.safetensors").string())
          .count("base_model.model.pre_classifier.weight") == 1);
}

TEST_CASE("A file may name layers that have no target", "[file]") {
  struct Layers : torch::nn::Module {
    Layers() {
      auto list = register_module(
          "layers", std::make_shared<Named>(std::vector<std::string>{}));
      list->register_module(
          "0", std::make_shared<Named>(std::vector<std::string>{"query"}));
      list->register_module(
          "1", std::make_shared<Named>(std::vector<std::string>{"dense"}));
    }
  };
  const TemporaryDirectory folder;
  Layers model, other;
  peft::save(
      peft::attach(
          model,
          peft::HraOptions(2).targets({"query"}).layers({0}).layers_pattern(
              {"layers"})),
      folder.path().string());
  auto config = config_in(folder);
  config["layers_to_transform"] = {0, 1};
  std::ofstream(folder.path() / "adapter_config.json") << config.dump();
  const auto adapter = peft::load(other, folder.path().string());
  REQUIRE(adapter.sites().size() == 1);
  CHECK(adapter.sites().front().name == "layers.0.query");
  // Written by hand it is a slip.
  Layers third;
  CHECK(contains(
      error_of([&] {
        peft::attach(
            third,
            peft::HraOptions(2)
                .targets({"query"})
                .layers({0, 1})
                .layers_pattern({"layers"}));
      }),
      "layers names index 1"));
}

TEST_CASE("The name that meant an attention stays in the config", "[file]") {
  struct Block : torch::nn::Module {
    Block() {
      register_module(
          "block", std::make_shared<Named>(std::vector<std::string>{"fc"}))
          ->register_module("attn", torch::nn::MultiheadAttention(4, 2));
    }
  };
  Block model;
  const TemporaryDirectory folder;
  peft::save(
      peft::attach(model, peft::LoraOptions(2).targets({"attn"})),
      folder.path().string());
  CHECK(
      config_in(folder)["target_modules"] ==
      nlohmann::json(std::vector<std::string>{"attn"}));
}

TEST_CASE("(IA)3 keeps a feed-forward name that is excluded", "[file]") {
  Named model({"query", "fc"}), other({"query", "fc"});
  const TemporaryDirectory folder, again;
  peft::save(
      peft::attach(
          model,
          peft::Ia3Options()
              .targets({"query", "fc"})
              .feedforward({"fc"})
              .exclude({"fc"})),
      folder.path().string());
  CHECK(
      config_in(folder)["feedforward_modules"] ==
      nlohmann::json(std::vector<std::string>{"fc"}));
  peft::save(peft::load(other, folder.path().string()), again.path().string());
  CHECK(config_in(again) == config_in(folder));
}

} // namespace test_hf_details
