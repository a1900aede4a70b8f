// Methods made of methods: MAM, UniPELT, and their files.

#include "meta_device.h"
#include "model_state.h"
#include "test.h"

#include <peft/models/bert.h>
#include <peft/models/gpt2.h>
#include <peft/models/llama.h>
#include <peft/models/t5.h>

#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

namespace test_unions {

using torch::Tensor;

namespace {

namespace models = peft::models;

peft::detail::NamedTensorMap reference(const std::string& name) {
  return peft::load_safetensors(
      golden("../../reference/data/unions/" + name + ".safetensors"));
}

/// The BERT of the fixtures, in float64.
models::BertModel reference_bert(const peft::detail::NamedTensorMap& base) {
  models::BertModel model(models::BertOptions()
                              .vocab_size(11)
                              .hidden_size(8)
                              .num_hidden_layers(2)
                              .num_attention_heads(2)
                              .intermediate_size(12)
                              .max_position_embeddings(10)
                              .add_pooling_layer(false));
  model->to(torch::kDouble);
  model->eval();
  torch::NoGradGuard no_grad;
  for (auto& item : model->named_parameters()) {
    item.value().copy_(base.at(item.key()));
  }
  return model;
}

/// Gives an adapter the fixture's values; every one of them is there.
void take(
    const peft::Adapter& adapter,
    const peft::detail::NamedTensorMap& file) {
  torch::NoGradGuard no_grad;
  for (auto& item : adapter.named_parameters()) {
    INFO(item.key());
    REQUIRE(file.count(item.key()) == 1);
    item.value().copy_(file.at(item.key()));
  }
}

peft::MamOptions small_mam() {
  return peft::MamOptions()
      .prefix(peft::PrefixOptions(3))
      .adapter(peft::ParallelAdapterOptions(4).scaling(2));
}

peft::UniPeltOptions small_unipelt() {
  return peft::UniPeltOptions()
      .lora(peft::LoraOptions(2).alpha(2))
      .prefix(peft::PrefixOptions(3))
      .adapter(peft::PfeifferOptions(4));
}

models::BertForSequenceClassification classifier() {
  seed(11);
  models::BertForSequenceClassification model(models::BertOptions()
                                                  .vocab_size(40)
                                                  .hidden_size(16)
                                                  .num_hidden_layers(2)
                                                  .num_attention_heads(2)
                                                  .intermediate_size(32)
                                                  .max_position_embeddings(32));
  model->eval();
  return model;
}

models::T5ForConditionalGeneration t5() {
  seed(11);
  models::T5ForConditionalGeneration model(models::T5Options()
                                               .vocab_size(40)
                                               .d_model(16)
                                               .d_kv(8)
                                               .d_ff(24)
                                               .num_layers(2)
                                               .num_heads(2));
  model->eval();
  return model;
}

Tensor ids() {
  torch::manual_seed(5);
  return torch::randint(4, 40, {3, 6}, torch::kLong);
}

Tensor mask() {
  const auto mask = torch::ones({3, 6}, torch::kLong);
  mask[1].slice(0, 4).zero_();
  mask[2].slice(0, 5).zero_();
  return mask;
}

std::string text_of(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

int64_t count_of(const peft::Adapter& adapter, const std::string& word) {
  int64_t count = 0;
  for (const auto& item : adapter.named_parameters()) {
    count += contains(item.key(), word) ? item.value().numel() : 0;
  }
  return count;
}

} // namespace

TEST_CASE("MAM and UniPELT as the papers have them, in float64", "[union]") {
  const auto base = reference("base");
  const auto check = [&](const std::string& name, const auto& options) {
    INFO(name);
    const auto expected = reference(name);
    auto model = reference_bert(base);
    auto adapter = peft::attach(*model, options);
    take(adapter, expected);
    const auto output =
        model->forward(base.at("token_ids"), base.at("attention_mask"));
    CHECK(close(output, expected.at("output"), 1e-12, 1e-12));
    (output * base.at("direction")).sum().backward();
    for (const auto& item : adapter.named_parameters()) {
      INFO(item.key());
      CHECK(close(
          item.value().grad(),
          expected.at("gradient." + item.key()),
          1e-10,
          1e-11));
    }
  };
  check("mam", small_mam());
  check("unipelt", small_unipelt());
  check(
      "unipelt_published",
      small_unipelt().gate(peft::GateOptions().average("all")));
}

TEST_CASE("Numbers of parameters on BERT-base, from shapes", "[union]") {
  const MetaDevice meta;
  const int64_t d = 768, layers = 12;
  {
    models::BertModel bert(models::BertOptions().add_pooling_layer(false));
    auto adapter = peft::attach(*bert, peft::UniPeltOptions());
    CHECK(count_of(adapter, "adapter_") == 894'528);
    CHECK(count_of(adapter, "lora_") == 294'912);
    CHECK(count_of(adapter, "gate") == layers * 4 * (d + 1));
    const int64_t mlp = 10 * d + (d * 512 + 512) + (512 + 1) * 2 * layers * d;
    CHECK(
        adapter.num_parameters() ==
        894'528 + 294'912 + layers * 4 * (d + 1) + mlp);
    peft::eject_reparameterization(adapter);
    CHECK(
        adapter.num_parameters() ==
        894'528 + 184'320 + 294'912 + layers * 4 * (d + 1));
  }
  const auto kept = [&](int64_t l, int64_t r) {
    return 2 * layers * l * d + layers * (2 * d * r + r + d);
  };
  {
    models::BertModel bert(models::BertOptions().add_pooling_layer(false));
    auto adapter = peft::attach(*bert, peft::MamOptions());
    peft::eject_reparameterization(adapter);
    CHECK(adapter.num_parameters() == kept(30, 512));
  }
  {
    models::BertModel bert(models::BertOptions().add_pooling_layer(false));
    auto adapter = peft::attach(*bert, peft::MamOptions::glue());
    CHECK(
        adapter.num_parameters() ==
        layers * (2 * d * 16 + 16 + d) + 16 * d + (d * 800 + 800) +
            (800 + 1) * 2 * layers * d);
    peft::eject_reparameterization(adapter);
    CHECK(adapter.num_parameters() == kept(16, 16));
  }
}

TEST_CASE("MAM is its two parts attached apart, to the bit", "[union]") {
  auto together = t5();
  auto apart = peft::clone(together);
  auto mam = peft::attach(*together, small_mam());
  randomise(mam);
  // A prefix in all three attentions of T5.
  CHECK(count_of(mam, "prompt_embeddings") == 3 * 3 * 2 * 2 * 16);
  auto prefix = peft::attach(
      *apart,
      peft::PrefixOptions(3).stacks({"encoder", "decoder", "cross"}),
      "prefix");
  auto adapter = peft::attach(
      *apart, peft::ParallelAdapterOptions(4).scaling(2), "adapter");
  {
    torch::NoGradGuard no_grad;
    const auto values = mam.named_parameters();
    for (const auto& part : {prefix, adapter}) {
      for (auto& item : part.named_parameters()) {
        item.value().copy_(values[item.key()]);
      }
    }
  }
  CHECK(
      mam.num_parameters() ==
      prefix.num_parameters() + adapter.num_parameters());
  CHECK(equal_bits(
      together->forward(ids(), mask(), ids().flip(0)),
      apart->forward(ids(), mask(), ids().flip(0))));
}

TEST_CASE("Parts of UniPELT can be left out, added, ungated", "[union]") {
  auto model = classifier();
  const auto base = model->forward(ids(), mask());
  const auto count = [&](const peft::UniPeltOptions& options) {
    auto adapter = peft::attach(*model, options);
    const auto result = adapter.num_parameters();
    adapter.detach();
    return result;
  };
  const int64_t gate = 16 + 1, lora = 2 * 2 * (2 * 2 * 16);
  const int64_t prefix = 3 * 2 * 2 * 16, adapter = 2 * (2 * 16 * 4 + 4 + 16);
  const auto options = small_unipelt();
  CHECK(count(options) == lora + prefix + adapter + 2 * 4 * gate);
  CHECK(
      count(peft::UniPeltOptions(options).prefix(std::nullopt)) ==
      lora + adapter + 2 * 3 * gate);
  CHECK(
      count(peft::UniPeltOptions(options).lora(std::nullopt)) ==
      prefix + adapter + 2 * 2 * gate);
  CHECK(
      count(peft::UniPeltOptions(options).adapter(std::nullopt)) ==
      lora + prefix + 2 * 3 * gate);
  CHECK(
      count(peft::UniPeltOptions(options).gate(std::nullopt)) ==
      lora + prefix + adapter);
  int64_t biases = 0;
  for (const auto& item : model->named_parameters()) {
    biases += contains(item.key(), "bias") ? item.value().numel() : 0;
  }
  CHECK(
      count(peft::UniPeltOptions(options).bitfit(peft::BitFitOptions())) ==
      lora + prefix + adapter + 2 * 4 * gate + biases);
  CHECK(equal_bits(model->forward(ids(), mask()), base));
  CHECK(contains(
      error_of([&] {
        peft::attach(
            *model,
            peft::UniPeltOptions()
                .lora(std::nullopt)
                .prefix(std::nullopt)
                .adapter(std::nullopt));
      }),
      "UniPELT has no part left"));
  CHECK(equal_bits(model->forward(ids(), mask()), base));
}

TEST_CASE("The biases of UniPELT with a learned number each", "[union]") {
  const auto options =
      small_unipelt().bitfit(peft::BitFitOptions({"query", "value"}));
  auto model = classifier();
  auto plain = peft::attach(*model, options, "plain");
  auto adapter = peft::attach(
      *model,
      peft::UniPeltOptions(options).bitfit_gate(
          peft::ScaleOptions(0.25).learned(true)),
      "gated");
  CHECK(count_of(adapter, "scale.value") == 2 * 2);
  CHECK(adapter.num_parameters() == plain.num_parameters() + 2 * 2);
  plain.detach();
  randomise(adapter);
  for (const auto& site : adapter.shared_state()->sites) {
    if (site.delta->replaces_base()) {
      const Tensor bias =
          peft::detail::tensor_of(*peft::detail::lock_site(site));
      const Tensor b = peft::base(bias);
      const auto* copy =
          dynamic_cast<const peft::TrainedCopy*>(site.delta.get());
      REQUIRE(copy != nullptr);
      const Tensor g = copy->decorations().at(0)->parameters().at(0);
      CHECK(close(peft::effective(bias), b + g * (copy->value - b)));
    }
  }
  model->forward(ids(), mask()).sum().backward();
  for (const auto& item : adapter.named_parameters()) {
    INFO(item.key());
    CHECK(item.value().grad().defined());
  }
  const auto y = model->forward(ids(), mask());
  const TemporaryDirectory folder;
  peft::save(adapter, folder.path().string());
  auto other = classifier();
  peft::load(*other, folder.path().string());
  CHECK(equal_bits(other->forward(ids(), mask()), y));

  CHECK(contains(
      error_of([&] {
        peft::attach(
            *model,
            small_unipelt().bitfit_gate(peft::ScaleOptions(1)),
            "without");
      }),
      "bitfit_gate is for the biases of bitfit"));
  CHECK(contains(
      error_of([&] {
        peft::attach(*model, peft::Gated(peft::BitFitOptions()), "input");
      }),
      "Scaled puts a number there"));
}

TEST_CASE("A head is trained once, whole and without a gate", "[union]") {
  auto model = classifier();
  const auto plain = small_unipelt();
  auto without = peft::attach(*model, plain, "without");
  auto adapter = peft::attach(
      *model,
      peft::UniPeltOptions(plain).modules_to_save({"classifier"}),
      "with");
  CHECK(adapter.num_parameters() == without.num_parameters() + 2 * 16 + 2);
  int64_t heads = 0;
  for (const auto& site : adapter.sites()) {
    heads += contains(site.name, "classifier") ? 1 : 0;
  }
  CHECK(heads == 2); // weight and bias
  CHECK(count_of(adapter, "classifier.gate") == 0);
}

TEST_CASE("Two parts of one method at the same weights", "[union]") {
  torch::NoGradGuard no_grad;
  auto model = classifier();
  const auto network = peft::describe_network(*model);
  peft::detail::Plan whole;
  whole.method = "TWO";
  peft::detail::join(whole, peft::detail::plan(peft::LoraOptions(2), network));
  peft::detail::join(
      whole,
      peft::detail::plan(peft::Gated(peft::LoraOptions(4)), network),
      "second");
  auto adapter = peft::detail::commit(*model, "default", std::move(whole));
  randomise(adapter);
  CHECK(count_of(adapter, "second.bert") == 2 * 2 * (4 * 2 * 16 + 16 + 1));
  const auto y = model->forward(ids(), mask());

  auto apart = classifier();
  auto one = peft::attach(*apart, peft::LoraOptions(2), "one");
  auto two = peft::attach(*apart, peft::Gated(peft::LoraOptions(4)), "two");
  const auto values = adapter.named_parameters();
  for (auto& item : one.named_parameters()) {
    item.value().copy_(values[item.key()]);
  }
  for (auto& item : two.named_parameters()) {
    item.value().copy_(values["second." + item.key()]);
  }
  CHECK(close(apart->forward(ids(), mask()), y, 1e-5, 1e-6));

  const TemporaryDirectory folder;
  peft::save(adapter, folder.path().string());
  auto other = classifier();
  peft::load(*other, folder.path().string());
  CHECK(equal_bits(other->forward(ids(), mask()), y));
}

TEST_CASE("The folder of a union", "[union]") {
  auto model = classifier();
  const auto options =
      peft::UniPeltOptions()
          .lora(peft::LoraOptions(2).alpha(6).dropout(0.25))
          .prefix(peft::PrefixOptions(3)
                      .prefix_projection(true)
                      .encoder_hidden_size(5))
          .adapter(peft::PfeifferOptions(4).non_linearity("tanh"))
          .bitfit(peft::BitFitOptions({"query"}))
          .gate(peft::GateOptions().average("all"))
          .modules_to_save({"classifier"});
  auto adapter = peft::attach(*model, options);
  randomise(adapter);
  const auto y = model->forward(ids(), mask());
  const TemporaryDirectory folder, second;
  peft::save(adapter, folder.path().string());

  const auto config = peft::AdapterConfig::read(
      (folder.path() / "adapter_config.json").string());
  CHECK(config.peft_type() == "UNIPELT");
  CHECK(
      config.get<std::vector<std::string>>("parts") ==
      std::vector<std::string>{"lora", "prefix", "adapter", "bitfit"});
  const auto lora = config.section("lora");
  CHECK(lora.peft_type() == "GATED");
  CHECK(lora.get<std::string>("average") == "all");
  CHECK(lora.section("lora").peft_type() == "LORA");
  CHECK(lora.section("lora").get<int64_t>("lora_alpha") == 6);
  CHECK(config.section("bitfit").peft_type() == "BITFIT");
  const auto tensors = peft::load_safetensors(
      (folder.path() / "adapter_model.safetensors").string());
  CHECK(
      tensors.count(
          "lora.lora.base_model.model.bert.encoder.layer.0.attention.self."
          "query.gate.weight") == 1);
  CHECK(tensors.count("prefix.prefix_tuning.prompt_embeddings") == 1);
  CHECK(tensors.count("prefix.prefix_tuning.gate.weight") == 1);

  auto other = classifier();
  auto again = peft::load(*other, folder.path().string());
  CHECK(equal_bits(other->forward(ids(), mask()), y));
  CHECK(again.method() == "UNIPELT");
  CHECK(again.num_parameters() == adapter.num_parameters());
  peft::save(again, second.path().string());
  for (const char* file :
       {"adapter_config.json",
        "adapter_model.safetensors",
        "libpeft_training.safetensors"}) {
    INFO(file);
    CHECK(
        text_of((folder.path() / file).string()) ==
        text_of((second.path() / file).string()));
  }

  // Training goes on identically, dropout included.
  for (auto* m : {model.get(), other.get()}) {
    m->train();
    seed(3);
    torch::optim::AdamW optimizer(
        peft::get_adapter(*m).parameters(), torch::optim::AdamWOptions(0.01));
    for (int step = 0; step < 2; ++step) {
      optimizer.zero_grad();
      m->forward(ids(), mask()).square().mean().backward();
      optimizer.step();
    }
    m->eval();
  }
  CHECK(
      equal_bits(model->forward(ids(), mask()), other->forward(ids(), mask())));
}

TEST_CASE("A union's folder that does not fit loads nothing", "[union]") {
  auto model = classifier();
  auto adapter = peft::attach(*model, small_unipelt());
  const TemporaryDirectory folder;
  const auto path = folder.path().string();
  peft::save(adapter, path);
  const auto weights = (folder.path() / "adapter_model.safetensors").string();
  const auto tensors = peft::load_safetensors(weights);

  auto other = classifier();
  const auto before = state_of(*other);
  const auto loads = [&](const peft::detail::NamedTensorMap& changed) {
    peft::save_safetensors(
        {changed.begin(), changed.end()}, weights, {{"format", "pt"}});
    return error_of([&] { peft::load(*other, path); });
  };
  auto missing = tensors;
  missing.erase("prefix.prefix_tuning.gate.bias");
  CHECK(contains(loads(missing), "gate.bias"));
  auto extra = tensors;
  extra["stray.weight"] = torch::ones({1});
  CHECK(contains(loads(extra), "stray.weight"));
  CHECK(same_state(before, state_of(*other)));

  const auto config = (folder.path() / "adapter_config.json").string();
  auto changed = peft::AdapterConfig::read(config);
  auto part = changed.section("adapter");
  auto inner = part.section("pfeiffer");
  inner.set("peft_type", std::string("NOBODY"));
  part.set("pfeiffer", inner);
  changed.set("adapter", part);
  changed.write(config);
  CHECK(contains(loads(tensors), "its part 'pfeiffer' is of no method"));
  CHECK(same_state(before, state_of(*other)));
}

TEST_CASE("LLM-Adapters' placements in LLaMA, by hand", "[llm]") {
  torch::NoGradGuard no_grad;
  seed(11);
  models::LlamaForCausalLM model(models::LlamaOptions()
                                     .vocab_size(40)
                                     .hidden_size(16)
                                     .intermediate_size(24)
                                     .num_hidden_layers(2)
                                     .num_attention_heads(4)
                                     .num_key_value_heads(2));
  model->to(torch::kDouble);
  model->eval();
  const auto modules = model->named_modules();
  const auto call = [&](const std::string& name, const Tensor& x) {
    return modules[name]->as<torch::nn::LinearImpl>()->forward(x);
  };
  const std::string mlp = "model.layers.0.mlp.";
  const auto x = torch::randn({2, 5, 16}, torch::kDouble);
  const auto down_x = torch::randn({2, 5, 24}, torch::kDouble);
  const auto term = [&](const peft::Adapter& adapter,
                        const std::string& name,
                        const Tensor& input) {
    const auto values = adapter.named_parameters();
    const auto& down = values[name + ".adapter_down.weight"];
    const auto& up = values[name + ".adapter_up.weight"];
    return torch::tanh(input.matmul(down.t())).matmul(up.t()) * 1.5;
  };
  const auto base_gate = call(mlp + "gate_proj", x);
  const auto base_down = call(mlp + "down_proj", down_x);
  const auto base_query = call("model.layers.1.self_attn.q_proj", x);
  const auto options = [](bool parallel, bool p) {
    return peft::LlmAdaptersOptions().bottleneck(
        peft::LinearBottleneckOptions(3)
            .scaling(1.5)
            .use_parallel_adapter(parallel)
            .use_adapterp(p));
  };
  {
    auto adapter = peft::attach(*model, options(false, false));
    randomise(adapter);
    CHECK(adapter.sites().size() == 2 * 3);
    CHECK(adapter.num_parameters() == 2 * 3 * (2 * 16 + 2 * 16 + 2 * 16));
    const auto& gate =
        modules[mlp + "gate_proj"]->as<torch::nn::LinearImpl>()->weight;
    CHECK(close(
        call(mlp + "gate_proj", x),
        base_gate +
            term(adapter, mlp + "gate_proj", x).matmul(peft::base(gate).t()),
        1e-12,
        1e-12));
    CHECK(close(
        call(mlp + "down_proj", down_x),
        base_down + term(adapter, mlp + "down_proj", base_down),
        1e-12,
        1e-12));
    CHECK(equal_bits(call("model.layers.1.self_attn.q_proj", x), base_query));
    adapter.detach();
  }
  {
    auto adapter = peft::attach(*model, options(false, true));
    CHECK(adapter.sites().size() == 2);
    CHECK(adapter.num_parameters() == 2 * 3 * 2 * 16);
    CHECK(equal_bits(call(mlp + "gate_proj", x), base_gate));
    adapter.detach();
  }
  {
    auto adapter = peft::attach(*model, options(true, false));
    randomise(adapter);
    CHECK(adapter.sites().size() == 2 * 3);
    // Keys and values have half as many heads.
    CHECK(adapter.num_parameters() == 2 * 3 * (32 + 24 + 24));
    CHECK(close(
        call("model.layers.1.self_attn.q_proj", x),
        base_query + term(adapter, "model.layers.1.self_attn.q_proj", x),
        1e-12,
        1e-12));
    CHECK(equal_bits(call(mlp + "gate_proj", x), base_gate));
    CHECK(contains(
        error_of([&] { adapter.merge(); }), "the non-linearity in its"));
    adapter.detach();
  }
  CHECK(contains(
      error_of([&] { peft::attach(*model, peft::LlmAdaptersOptions()); }),
      "LlmAdaptersOptions names no adapter"));
  CHECK(contains(
      error_of([&] { peft::attach(*model, options(true, true)); }),
      "are two placements"));
  CHECK(contains(
      error_of([&] {
        peft::attach(
            *model, peft::LinearBottleneckOptions(3).init_weights("zero"));
      }),
      "init_weights must be 'bert' or 'mam_adapter', got 'zero'"));
}

TEST_CASE("LLM-Adapters on LLaMA-7B, numbers of parameters", "[llm]") {
  const MetaDevice meta;
  const auto count = [&](const peft::LlmAdaptersOptions& options) {
    models::LlamaModel model(models::LlamaOptions()
                                 .vocab_size(32000)
                                 .hidden_size(4096)
                                 .intermediate_size(11008)
                                 .num_hidden_layers(32)
                                 .num_attention_heads(32)
                                 .num_key_value_heads(32));
    return peft::attach(*model, options).num_parameters();
  };
  // The paper's code reports 200M, 66M and 200M.
  CHECK(
      count(peft::LlmAdaptersOptions::adapter_h()) ==
      int64_t{32} * 3 * 2 * 4096 * 256);
  CHECK(
      count(peft::LlmAdaptersOptions::adapter_p()) ==
      int64_t{32} * 2 * 4096 * 256);
  CHECK(
      count(peft::LlmAdaptersOptions::parallel()) ==
      int64_t{32} * 3 * 2 * 4096 * 256);
  CHECK(
      count(peft::LlmAdaptersOptions().lora(
          peft::LoraOptions(8).alpha(16).targets({"q_proj", "v_proj"}))) ==
      int64_t{32} * 2 * 2 * 4096 * 8);
}

TEST_CASE("LLM-Adapters with packed and transposed weights", "[llm]") {
  torch::NoGradGuard no_grad;
  seed(11);
  models::Gpt2ForCausalLM model(models::Gpt2Options()
                                    .vocab_size(40)
                                    .n_positions(32)
                                    .n_embd(16)
                                    .n_layer(2)
                                    .n_head(2));
  model->eval();
  const auto x = torch::randn({2, 5, 16});
  auto* packed = model->named_modules()["transformer.h.1.attn.c_attn"]
                     ->as<models::Conv1DImpl>();
  REQUIRE(packed != nullptr);
  const auto base = packed->forward(x);
  auto adapter = peft::attach(
      *model,
      peft::LlmAdaptersOptions()
          .bottleneck(peft::LinearBottleneckOptions(3)
                          .use_parallel_adapter(true)
                          .learned_scaling(true)
                          .non_linearity("relu"))
          .prefix(peft::PrefixOptions(2)));
  randomise(adapter);
  const auto values = adapter.named_parameters();
  const std::string name = "transformer.h.1.attn.c_attn.";
  CHECK(close(
      packed->forward(x),
      base +
          torch::relu(x.matmul(values[name + "adapter_down.weight"].t()))
                  .matmul(values[name + "adapter_up.weight"].t()) *
              values[name + "adapter_scaling"],
      1e-5,
      1e-6));
  const auto y = model->forward(ids());
  const TemporaryDirectory folder;
  peft::save(adapter, folder.path().string());
  const auto section = peft::AdapterConfig::read(
                           (folder.path() / "adapter_config.json").string())
                           .section("bottleneck");
  CHECK(section.peft_type() == "BOTTLENECK");
  CHECK(section.get<std::string>("scaling") == "learned");
  adapter.detach();
  peft::load(*model, folder.path().string());
  CHECK(equal_bits(model->forward(ids()), y));
}

} // namespace test_unions
