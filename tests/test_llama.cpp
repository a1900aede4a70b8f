// LLaMA against what transformers computes (golden/make_models.py).

#include "decoders.h"
#include "meta_device.h"

#include <peft/models/llama.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

namespace test_llama {

namespace {

using decoders::agrees;
using decoders::Llama;
using decoders::without_padding;
using peft::models::LlamaDecoderLayer;
using peft::models::LlamaForCausalLM;
using peft::models::LlamaForCausalLMImpl;
using peft::models::LlamaOptions;
using peft::models::LlamaRMSNorm;
using peft::models::LlamaRotation;
using torch::Tensor;

Tensor some_ids() {
  seed(3);
  return torch::randint(4, 48, {2, 7}, torch::kLong);
}

std::vector<std::string> names_of(const torch::nn::Module& model) {
  std::vector<std::string> names;
  for (const auto& item : model.named_parameters()) {
    names.push_back(item.key());
  }
  return names;
}

} // namespace

TEST_CASE("LLaMA computes what transformers computes", "[llama]") {
  auto model = decoders::load<Llama>();
  auto want = decoders::reference<Llama>();
  for (const std::string side : {"left", "right"}) {
    INFO(side);
    const auto ids = want.at(side + ".input_ids");
    const auto mask = want.at(side + ".attention_mask");
    const auto positions = want.at(side + ".position_ids");
    REQUIRE(agrees(
        without_padding(model->model->forward(ids, mask, positions), mask),
        want.at(side + ".hidden")));
    REQUIRE(agrees(
        without_padding(model->forward(ids, mask, positions), mask),
        want.at(side + ".logits")));
    // Rotary positions are relative: a row may count from anywhere.
    REQUIRE(agrees(
        without_padding(model->forward(ids, mask), mask),
        want.at(side + ".logits")));
    REQUIRE_FALSE(agrees(
        without_padding(model->forward(ids, mask, positions * 2), mask),
        want.at(side + ".logits")));
  }
}

TEST_CASE("LLaMA's loss and gradients are transformers'", "[llama]") {
  auto model = decoders::load<Llama>();
  auto want = decoders::reference<Llama>();
  model->train();
  const auto loss = decoders::next_token_loss(
      model->forward(
          want.at("right.input_ids"), want.at("right.attention_mask")),
      want.at("labels"));
  REQUIRE(agrees(loss.reshape({1}), want.at("loss")));
  loss.backward();
  REQUIRE(agrees(
      model->model->embed_tokens->weight.grad(),
      want.at("gradient.model.embed_tokens.weight")));
  const auto layer = model->model->layers[0]->as<LlamaDecoderLayer>();
  REQUIRE(agrees(
      layer->self_attn->k_proj->weight.grad(),
      want.at("gradient.model.layers.0.self_attn.k_proj.weight")));
}

TEST_CASE("RMSNorm divides by the root of the mean square", "[llama]") {
  seed();
  LlamaRMSNorm norm(6, 0.5);
  norm->weight.data().normal_();
  norm->to(torch::kDouble);
  const auto x = torch::randn({3, 6}, torch::kDouble);
  for (int64_t i = 0; i < 3; ++i) {
    const double root = std::sqrt(x[i].dot(x[i]).item<double>() / 6 + 0.5);
    REQUIRE(close(norm->forward(x)[i], norm->weight * x[i] / root));
  }
  // bfloat16 is squared in float32.
  norm->to(torch::kBFloat16);
  const auto low = (x * 1e20).to(torch::kBFloat16);
  const auto result = norm->forward(low);
  REQUIRE(result.scalar_type() == torch::kBFloat16);
  REQUIRE(result.isfinite().all().item<bool>());
}

TEST_CASE("A rotation turns pairs by the position's angles", "[llama]") {
  const auto positions = torch::tensor({{0, 3}}, torch::kLong);
  const LlamaRotation rotation(positions, 4, 100, torch::kDouble);
  const auto x = torch::tensor({1., 2., 3., 4.}, torch::kDouble);
  const auto y = peft::models::rotate(
      x.expand({1, 1, 2, 4}), rotation.cos, rotation.sin)[0][0];
  REQUIRE(close(y[0], x));
  // Pairs (0, 2) and (1, 3) turn by 3 and by 3 / 100^(1/2).
  const double a = 3, b = 0.3;
  REQUIRE(agrees(
      y[1],
      torch::tensor(
          {std::cos(a) - 3 * std::sin(a),
           2 * std::cos(b) - 4 * std::sin(b),
           3 * std::cos(a) + std::sin(a),
           4 * std::cos(b) + 2 * std::sin(b)},
          torch::kDouble)));
}

TEST_CASE("LLaMA has Hugging Face's names and shapes", "[llama]") {
  LlamaForCausalLM model(Llama::options()
                             .num_hidden_layers(1)
                             .attention_bias(true)
                             .mlp_bias(true)
                             .head_dim(6));
  std::vector<std::string> expected{"model.embed_tokens.weight"};
  for (const std::string name :
       {"self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj"}) {
    expected.push_back("model.layers.0." + name + ".weight");
    expected.push_back("model.layers.0." + name + ".bias");
  }
  expected.push_back("model.layers.0.input_layernorm.weight");
  expected.push_back("model.layers.0.post_attention_layernorm.weight");
  expected.push_back("model.norm.weight");
  expected.push_back("lm_head.weight");
  REQUIRE(names_of(*model) == expected);
  const auto attention =
      model->model->layers[0]->as<LlamaDecoderLayer>()->self_attn;
  REQUIRE(attention->q_proj->weight.sizes() == torch::IntArrayRef({24, 16}));
  REQUIRE(attention->v_proj->weight.sizes() == torch::IntArrayRef({12, 16}));
  REQUIRE(attention->o_proj->weight.sizes() == torch::IntArrayRef({16, 24}));
  REQUIRE(model->forward(some_ids()).sizes() == torch::IntArrayRef({2, 7, 48}));

  const auto plain = names_of(*LlamaForCausalLM(Llama::options()));
  for (const auto& name : plain) {
    REQUIRE_FALSE(contains(name, "bias"));
  }
}

TEST_CASE("LLaMA's sizes give the published parameter count", "[llama]") {
  const MetaDevice shapes_only;
  LlamaForCausalLM model(LlamaOptions{}); // LLaMA-7B
  REQUIRE(peft::count_parameters(*model).total == 6'738'415'616);
  REQUIRE(
      peft::attach(*model, peft::LoraOptions(8).targets({"q_proj", "v_proj"}))
          .num_parameters() == 4'194'304);
}

TEST_CASE("Every parameter of LLaMA takes part in training", "[llama]") {
  seed();
  LlamaForCausalLM model(Llama::options().attention_bias(true).mlp_bias(true));
  model->forward(some_ids()).square().sum().backward();
  for (const auto& item : model->named_parameters()) {
    INFO(item.key());
    REQUIRE(item.value().grad().defined());
  }
  // Padding's embedding gets nothing.
  const auto ids = torch::zeros({1, 3}, torch::kLong);
  model->zero_grad();
  model->forward(ids).square().sum().backward();
  REQUIRE(
      model->model->embed_tokens->weight.grad().abs().max().item<float>() == 0);
}

TEST_CASE("A tied LLaMA shares its table and clones", "[llama]") {
  seed();
  LlamaForCausalLM model(Llama::options().tie_word_embeddings(true));
  model->eval();
  REQUIRE(model->lm_head->weight.is_same(model->model->embed_tokens->weight));
  const auto ids = some_ids();
  const auto copy =
      std::dynamic_pointer_cast<LlamaForCausalLMImpl>(model->clone());
  REQUIRE(copy->lm_head->weight.is_same(copy->model->embed_tokens->weight));
  REQUIRE(equal_bits(copy->forward(ids), model->forward(ids)));

  // A file without the head fills a tied model, and not an untied one.
  auto tensors =
      peft::load_safetensors(golden("models/llama/model.safetensors"));
  tensors.erase("lm_head.weight");
  TemporaryDirectory folder;
  peft::save_safetensors(
      {tensors.begin(), tensors.end()}, folder / "model.safetensors");
  REQUIRE(peft::load_base(*model, folder.path().string()).missing.empty());
  REQUIRE(equal_bits(
      model->lm_head->weight.detach(),
      tensors.at("model.embed_tokens.weight")));
  LlamaForCausalLM untied(Llama::options());
  REQUIRE(contains(
      error_of([&] { peft::load_base(*untied, folder.path().string()); }),
      "lm_head.weight"));
}

TEST_CASE("LLaMA's attention dropout acts in training only", "[llama]") {
  seed();
  LlamaForCausalLM model(
      Llama::options().attention_dropout(0.5).initializer_range(1));
  const auto ids = some_ids();
  REQUIRE_FALSE(equal_bits(model->forward(ids), model->forward(ids)));
  model->eval();
  REQUIRE(equal_bits(model->forward(ids), model->forward(ids)));
}

TEST_CASE("LoRA on LLaMA's q_proj and v_proj is W + s B A", "[llama]") {
  auto model = decoders::load<Llama>();
  const auto ids = some_ids();
  const auto plain = model->forward(ids);
  seed();
  auto adapter = peft::attach(*model, Llama::lora());
  REQUIRE(adapter.sites().size() == 4);
  REQUIRE(adapter.num_parameters() == 2 * (2 * (16 + 16) + 2 * (16 + 8)));
  const auto adapted = model->forward(ids);
  REQUIRE_FALSE(agrees(adapted, plain));

  auto twin = decoders::load<Llama>();
  for (auto& item : twin->named_parameters()) {
    const auto path = item.key().substr(0, item.key().rfind('.'));
    const auto [A, B] = decoders::factors_at(adapter, path);
    if (A.defined()) {
      torch::NoGradGuard no_grad;
      item.value() += 2 * B.matmul(A);
    }
  }
  REQUIRE(close(adapted, twin->forward(ids)));

  torch::optim::SGD optimizer(adapter.parameters(), /*lr=*/0.1);
  adapted.square().mean().backward();
  optimizer.step();
  const auto trained = model->forward(ids);
  REQUIRE_FALSE(agrees(trained, adapted));

  TemporaryDirectory folder;
  peft::save(adapter, folder.path().string());
  REQUIRE(
      peft::load_safetensors(folder / "adapter_model.safetensors")
          .count("base_model.model.model.layers.1.self_attn.v_proj.lora_B."
                 "weight") == 1);
  auto other = decoders::load<Llama>();
  peft::load(*other, folder.path().string());
  other->eval();
  REQUIRE(equal_bits(other->forward(ids), trained));

  adapter.detach();
  REQUIRE(equal_bits(model->forward(ids), plain));
  peft::merge(*other);
  REQUIRE(close(other->forward(ids), trained));
}

TEST_CASE("LLaMA's sizes that do not fit are named", "[llama]") {
  const auto error = [](const LlamaOptions& options) {
    return error_of([&] { LlamaForCausalLM model(options); });
  };
  CHECK(contains(
      error(Llama::options().num_attention_heads(3)),
      "multiple of num_attention_heads (3), or head_dim be given"));
  CHECK(contains(
      error(Llama::options().num_key_value_heads(3)),
      "multiple of num_key_value_heads (3)"));
  CHECK(contains(
      error(Llama::options().head_dim(5)), "size must be even, got 5"));
  CHECK(contains(
      error_of([] { Llama::options().reduced(5); }),
      "must divide hidden_size (16), intermediate_size (24) and head_dim (4), "
      "got 5"));
}

} // namespace test_llama
