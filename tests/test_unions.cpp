// Methods made of methods: MAM, UniPELT, and their files.

#include "meta_device.h"
#include "model_state.h"
#include "test.h"

#include <peft/models/bert.h>
#include <peft/models/t5.h>

#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

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

TEST_CASE("Two parts cannot name their tensors alike", "[union]") {
  auto model = classifier();
  const auto before = state_of(*model);
  const auto network = peft::describe_network(*model);
  peft::detail::Plan whole;
  whole.method = "TWO";
  peft::detail::join(whole, peft::detail::plan(peft::LoraOptions(2), network));
  const auto message = error_of([&] {
    peft::detail::join(
        whole, peft::detail::plan(peft::LoraOptions(4), network));
  });
  CHECK(contains(message, "two parts of one adapter, 'lora' and 'lora_2'"));
  CHECK(contains(message, "attention.self.query"));
  CHECK(same_state(before, state_of(*model)));
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
