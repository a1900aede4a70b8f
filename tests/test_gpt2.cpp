// GPT-2 against what transformers computes (golden/make_models.py).

#include "decoders.h"
#include "meta_device.h"

#include <peft/models/gpt2.h>
#include <peft/models/lm_head.h>

#include <fstream>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace test_gpt2 {

namespace {

using decoders::agrees;
using decoders::Gpt2;
using decoders::without_padding;
using peft::models::Conv1D;
using peft::models::Gpt2Block;
using peft::models::Gpt2ForCausalLM;
using peft::models::Gpt2ForCausalLMImpl;
using peft::models::Gpt2Options;
using torch::Tensor;

Tensor some_ids() {
  seed(3);
  return torch::randint(4, 48, {2, 7}, torch::kLong);
}

Conv1D c_attn(Gpt2ForCausalLM& model, int64_t layer) {
  return model->transformer->h[layer]->as<Gpt2Block>()->attn->c_attn;
}

} // namespace

TEST_CASE("GPT-2 computes what transformers computes", "[gpt2]") {
  auto model = decoders::load<Gpt2>();
  auto want = decoders::reference<Gpt2>();
  for (const std::string side : {"left", "right"}) {
    INFO(side);
    const auto ids = want.at(side + ".input_ids");
    const auto mask = want.at(side + ".attention_mask");
    const auto positions = want.at(side + ".position_ids");
    REQUIRE(agrees(
        without_padding(
            model->transformer->forward(ids, mask, positions), mask),
        want.at(side + ".hidden")));
    REQUIRE(agrees(
        without_padding(model->forward(ids, mask, positions), mask),
        want.at(side + ".logits")));
  }
  // Positions that are not given are counted whatever the mask says.
  const auto mask = want.at("left.attention_mask");
  const auto counted =
      without_padding(model->forward(want.at("left.input_ids"), mask), mask);
  REQUIRE(agrees(counted, want.at("left.logits_without_position_ids")));
  REQUIRE_FALSE(agrees(counted, want.at("left.logits")));
}

TEST_CASE("GPT-2's loss and gradients are transformers'", "[gpt2]") {
  auto model = decoders::load<Gpt2>();
  auto want = decoders::reference<Gpt2>();
  model->train();
  const auto loss = decoders::next_token_loss(
      model->forward(
          want.at("right.input_ids"), want.at("right.attention_mask")),
      want.at("labels"));
  REQUIRE(agrees(loss.reshape({1}), want.at("loss")));
  loss.backward();
  REQUIRE(agrees(
      model->transformer->wte->weight.grad(),
      want.at("gradient.transformer.wte.weight")));
  REQUIRE(agrees(
      c_attn(model, 0)->weight.grad(),
      want.at("gradient.transformer.h.0.attn.c_attn.weight")));
}

TEST_CASE("Conv1D is a Linear with its weight the other way", "[gpt2]") {
  seed();
  Conv1D layer(5, 3);
  layer->to(torch::kDouble);
  layer->bias.data().normal_();
  for (const auto& x :
       {torch::randn({5}, torch::kDouble),
        torch::randn({4, 5}, torch::kDouble),
        torch::randn({2, 4, 5}, torch::kDouble).transpose(0, 1)}) {
    REQUIRE(close(
        layer->forward(x),
        torch::nn::functional::linear(x, layer->weight.t(), layer->bias)));
  }
}

TEST_CASE("A tied head is the embedding's weight", "[gpt2]") {
  seed();
  Gpt2ForCausalLM model(Gpt2::options());
  const auto table = model->transformer->wte->weight;
  REQUIRE(model->lm_head->weight.is_same(table));

  // An optimizer over parameters() steps it once.
  const auto before = table.detach().clone();
  torch::optim::SGD optimizer(model->parameters(), /*lr=*/0.1);
  model->forward(some_ids()).square().sum().backward();
  const auto expected = before - 0.1 * table.grad();
  optimizer.step();
  REQUIRE(close(table, expected));
  REQUIRE_FALSE(close(table, before));
  REQUIRE(model->lm_head->weight.is_same(table));
  REQUIRE(
      peft::count_parameters(*model).total ==
      peft::count_parameters(*model->transformer).total);

  model->to(torch::kDouble);
  REQUIRE(model->lm_head->weight.scalar_type() == torch::kDouble);
}

TEST_CASE("Clones and archives keep a head tied", "[gpt2]") {
  auto model = decoders::load<Gpt2>();
  const auto ids = some_ids();
  const auto before = model->forward(ids);

  const auto copy =
      std::dynamic_pointer_cast<Gpt2ForCausalLMImpl>(model->clone());
  REQUIRE(equal_bits(copy->forward(ids), before));
  REQUIRE(copy->lm_head->weight.is_same(copy->transformer->wte->weight));
  {
    torch::NoGradGuard no_grad;
    copy->transformer->wte->weight.zero_();
  }
  REQUIRE(equal_bits(model->forward(ids), before));
  REQUIRE(copy->forward(ids).abs().max().item<float>() == 0);

  TemporaryDirectory folder;
  torch::save(model, folder / "model.pt");
  Gpt2ForCausalLM loaded(Gpt2::options());
  torch::load(loaded, folder / "model.pt");
  loaded->eval();
  REQUIRE(equal_bits(loaded->forward(ids), before));
  Gpt2ForCausalLM based(Gpt2::options());
  peft::load_base(*based, folder / "model.pt");
  based->eval();
  REQUIRE(equal_bits(based->forward(ids), before));
}

TEST_CASE("A head of its own is loaded, trained and copied", "[gpt2]") {
  seed();
  Gpt2ForCausalLM model(Gpt2::options().tie_word_embeddings(false));
  model->eval();
  const auto ids = some_ids();
  REQUIRE_FALSE(
      model->lm_head->weight.is_same(model->transformer->wte->weight));
  const auto count = peft::count_parameters(*model).total;
  REQUIRE(count == peft::count_parameters(*model->transformer).total + 48 * 16);
  const auto copy =
      std::dynamic_pointer_cast<Gpt2ForCausalLMImpl>(model->clone());
  REQUIRE(equal_bits(copy->forward(ids), model->forward(ids)));

  const auto error =
      error_of([&] { peft::load_base(*model, golden("models/gpt2")); });
  REQUIRE(contains(error, "missing from the file (1):\n    lm_head.weight"));
}

TEST_CASE("GPT-2 loads from shards and from the bare model's file", "[gpt2]") {
  auto model = decoders::load<Gpt2>();
  const auto ids = some_ids();
  const auto before = model->forward(ids);
  const auto whole =
      peft::load_safetensors(golden("models/gpt2/model.safetensors"));
  REQUIRE(whole.count("lm_head.weight") == 0);

  TemporaryDirectory folder;
  std::vector<std::pair<std::string, Tensor>> shards[2];
  std::ofstream index(folder / "model.safetensors.index.json");
  index << R"({"weight_map": {)";
  size_t i = 0;
  for (const auto& [name, tensor] : whole) {
    index << (i == 0 ? "" : ", ") << '"' << name << R"(": ")" << i % 2
          << R"(.safetensors")";
    shards[i++ % 2].emplace_back(name, tensor);
  }
  index << "}}";
  index.close();
  peft::save_safetensors(shards[0], folder / "0.safetensors");
  peft::save_safetensors(shards[1], folder / "1.safetensors");
  Gpt2ForCausalLM sharded(Gpt2::options());
  const auto report = peft::load_base(*sharded, folder.path().string());
  sharded->eval();
  REQUIRE(report.missing.empty());
  REQUIRE(equal_bits(sharded->forward(ids), before));

  // The published files have no "transformer." and hold the old triangle.
  std::vector<std::pair<std::string, Tensor>> bare{
      {"h.0.attn.bias", torch::ones({1, 1, 32, 32}).tril()}};
  for (const auto& [name, tensor] : whole) {
    bare.emplace_back(name.substr(std::string("transformer.").size()), tensor);
  }
  peft::save_safetensors(bare, folder / "bare.safetensors");
  Gpt2ForCausalLM published(Gpt2::options());
  peft::load_base(
      *published->transformer,
      folder / "bare.safetensors",
      peft::BaseWeightsOptions().ignore_extra({"attn.bias"}));
  published->eval();
  REQUIRE(equal_bits(published->forward(ids), before));
}

TEST_CASE("Every parameter of GPT-2 takes part in training", "[gpt2]") {
  seed();
  Gpt2ForCausalLM model(Gpt2::options().n_inner(20));
  model->forward(some_ids()).square().sum().backward();
  for (const auto& item : model->transformer->named_parameters()) {
    INFO(item.key());
    REQUIRE(item.value().grad().defined());
    REQUIRE(item.value().grad().abs().max().item<float>() > 0);
  }
  REQUIRE(
      model->transformer->h[0]->as<Gpt2Block>()->mlp->c_fc->weight.sizes() ==
      torch::IntArrayRef({16, 20}));
}

TEST_CASE("GPT-2's sizes give the published parameter count", "[gpt2]") {
  const MetaDevice shapes_only;
  Gpt2ForCausalLM model(Gpt2Options{});
  REQUIRE(peft::count_parameters(*model).total == 124'439'808);
}

TEST_CASE("GPT-2 starts as published", "[gpt2]") {
  seed();
  Gpt2ForCausalLM model(Gpt2::options().n_embd(128).n_layer(8).n_head(2));
  const auto deviation = [](const Tensor& t) { return t.std().item<double>(); };
  const auto block = model->transformer->h[3]->as<Gpt2Block>();
  CHECK(std::abs(deviation(model->transformer->wte->weight) / 0.02 - 1) < 0.05);
  CHECK(std::abs(deviation(block->attn->c_attn->weight) / 0.02 - 1) < 0.05);
  CHECK(std::abs(deviation(block->mlp->c_proj->weight) / 0.005 - 1) < 0.05);
  CHECK(block->attn->c_attn->bias.abs().max().item<double>() == 0);
}

TEST_CASE("GPT-2's dropouts act in training only", "[gpt2]") {
  const auto ids = some_ids();
  for (const auto& options :
       {Gpt2::options().embd_pdrop(0.5),
        Gpt2::options().resid_pdrop(0.5),
        Gpt2::options().attn_pdrop(0.5)}) {
    seed();
    Gpt2ForCausalLM model(options);
    REQUIRE_FALSE(equal_bits(model->forward(ids), model->forward(ids)));
    model->eval();
    REQUIRE(equal_bits(model->forward(ids), model->forward(ids)));
  }
}

TEST_CASE("LoRA on GPT-2's c_attn is W + s (B A)ᵀ", "[gpt2]") {
  auto model = decoders::load<Gpt2>();
  const auto ids = some_ids();
  const auto plain = model->forward(ids);
  const auto whole =
      peft::load_safetensors(golden("models/gpt2/model.safetensors"));
  seed();
  auto adapter = peft::attach(*model, Gpt2::lora());
  REQUIRE(adapter.num_parameters() == 2 * (2 * 16 + 2 * 48));
  const auto adapted = model->forward(ids);
  REQUIRE_FALSE(agrees(adapted, plain));

  auto twin = decoders::load<Gpt2>();
  for (int64_t i = 0; i < 2; ++i) {
    const auto path = "transformer.h." + std::to_string(i) + ".attn.c_attn";
    const auto [A, B] = decoders::factors_at(adapter, path);
    REQUIRE(A.sizes() == torch::IntArrayRef({2, 16}));
    torch::NoGradGuard no_grad;
    c_attn(twin, i)->weight += 2 * B.matmul(A).t();
  }
  REQUIRE(close(adapted, twin->forward(ids)));

  // A step moves the adapter and nothing else.
  torch::optim::SGD optimizer(adapter.parameters(), /*lr=*/0.1);
  adapted.square().mean().backward();
  for (const auto& p : adapter.parameters()) {
    REQUIRE(p.grad().abs().max().item<float>() > 0);
  }
  optimizer.step();
  for (const auto& [name, value] : whole) {
    INFO(name);
    for (const auto& item : model->named_parameters()) {
      if (item.key() == name) {
        REQUIRE_FALSE(item.value().requires_grad());
        REQUIRE(equal_bits(peft::base(item.value()).detach(), value));
      }
    }
  }

  TemporaryDirectory folder;
  peft::save(adapter, folder.path().string());
  const auto file =
      peft::load_safetensors(folder / "adapter_model.safetensors");
  REQUIRE(
      file.count(
          "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight") == 1);
  auto other = decoders::load<Gpt2>();
  peft::load(*other, folder.path().string());
  other->eval();
  model->eval();
  const auto trained = model->forward(ids);
  REQUIRE(equal_bits(other->forward(ids), trained));

  peft::merge(*model);
  REQUIRE(close(model->forward(ids), trained));
}

TEST_CASE("GPT-2 with an adapter can be cloned", "[gpt2]") {
  auto model = decoders::load<Gpt2>();
  seed();
  auto adapter = peft::attach(*model, Gpt2::lora());
  const auto ids = some_ids();
  auto copy = peft::clone(model);
  REQUIRE(equal_bits(copy->forward(ids), model->forward(ids)));
  REQUIRE(copy->lm_head->weight.is_same(copy->transformer->wte->weight));
  adapter.detach();
  REQUIRE_FALSE(agrees(copy->forward(ids), model->forward(ids)));
}

TEST_CASE("GPT-2's sizes that do not fit are named", "[gpt2]") {
  CHECK(contains(
      error_of([] { Gpt2ForCausalLM(Gpt2::options().n_head(3)); }),
      "multiple of n_head (3)"));
  CHECK(contains(
      error_of([] { Gpt2::options().reduced(3); }),
      "must divide n_embd (16) and n_inner (64), got 3"));
  auto model = decoders::load<Gpt2>();
  CHECK(contains(
      error_of([&] {
        model->forward(torch::ones({1, 33}, torch::kLong));
      }),
      "33 tokens"));
  peft::KeyValues cache;
  model->forward(torch::ones({1, 30}, torch::kLong), {}, {}, &cache);
  CHECK(contains(
      error_of([&] {
        model->forward(torch::ones({1, 3}, torch::kLong), {}, {}, &cache);
      }),
      "33 tokens, the cached ones included, are more than the 32 positions"));
}

TEST_CASE("LoRA knows which way a Conv1D lies", "[gpt2]") {
  seed();
  peft::models::Gpt2Model model(
      Gpt2Options().vocab_size(20).n_embd(8).n_layer(1).n_head(2));
  auto adapter = peft::attach(
      *model, peft::LoraOptions(2).targets(peft::Targets::all_linear()));
  CHECK(adapter.sites().size() == 4);
  const auto factors = adapter.named_parameters();
  CHECK(
      factors["h.0.mlp.c_fc.lora_A.weight"].sizes() == at::IntArrayRef({2, 8}));
  CHECK(
      factors["h.0.mlp.c_fc.lora_B.weight"].sizes() ==
      at::IntArrayRef({32, 2}));
  const TemporaryDirectory folder;
  peft::save(adapter, folder.path().string());
  CHECK(peft::AdapterConfig::read(folder / "adapter_config.json")
            .get<bool>("fan_in_fan_out"));
}

} // namespace test_gpt2
