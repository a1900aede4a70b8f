// What holds for every method, on the reference networks: rows are methods, and
// a new one is a row here.

#include "model_state.h"
#include "test.h"

#include <peft/methods/ladder.h>
#include <peft/models/bert.h>
#include <peft/models/gpt2.h>
#include <peft/models/llama.h>
#include <peft/models/t5.h>

#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

namespace test_every_method {

using torch::Tensor;

namespace {

namespace models = peft::models;

/// A small network in evaluation mode and what it makes of a padded batch.
struct Host {
  std::string name;
  std::shared_ptr<torch::nn::Module> module;
  std::function<Tensor(torch::nn::Module&)> run;
};

const int64_t kWidth = 16;

Tensor token_ids() {
  torch::manual_seed(5);
  return torch::randint(4, 40, {3, 6}, torch::kLong);
}

/// Right padding: two rows are shorter.
Tensor padding() {
  const auto mask = torch::ones({3, 6}, torch::kLong);
  mask[1].slice(0, 4).zero_();
  mask[2].slice(0, 5).zero_();
  return mask;
}

Host bert() {
  models::BertForSequenceClassification model(models::BertOptions()
                                                  .vocab_size(40)
                                                  .hidden_size(kWidth)
                                                  .num_hidden_layers(2)
                                                  .num_attention_heads(2)
                                                  .intermediate_size(32)
                                                  .max_position_embeddings(32));
  return {"BERT", model.ptr(), [](torch::nn::Module& m) {
            return m.as<models::BertForSequenceClassificationImpl>()->forward(
                token_ids(), padding());
          }};
}

Host gpt2() {
  models::Gpt2ForCausalLM model(models::Gpt2Options()
                                    .vocab_size(40)
                                    .n_positions(32)
                                    .n_embd(kWidth)
                                    .n_layer(2)
                                    .n_head(2));
  return {"GPT-2", model.ptr(), [](torch::nn::Module& m) {
            return m.as<models::Gpt2ForCausalLMImpl>()->forward(
                token_ids(), padding());
          }};
}

Host llama() {
  models::LlamaForCausalLM model(models::LlamaOptions()
                                     .vocab_size(40)
                                     .hidden_size(kWidth)
                                     .intermediate_size(24)
                                     .num_hidden_layers(2)
                                     .num_attention_heads(4)
                                     .num_key_value_heads(2));
  return {"LLaMA", model.ptr(), [](torch::nn::Module& m) {
            return m.as<models::LlamaForCausalLMImpl>()->forward(
                token_ids(), padding());
          }};
}

Host t5() {
  models::T5ForConditionalGeneration model(models::T5Options()
                                               .vocab_size(40)
                                               .d_model(kWidth)
                                               .d_kv(8)
                                               .d_ff(24)
                                               .num_layers(2)
                                               .num_heads(2));
  return {"T5", model.ptr(), [](torch::nn::Module& m) {
            return m.as<models::T5ForConditionalGenerationImpl>()->forward(
                token_ids(), padding(), token_ids().flip(0));
          }};
}

/// A method with options that suit every host it names.
struct Method {
  std::string name;
  std::function<peft::Adapter(torch::nn::Module&, const std::string&)> attach;
  std::vector<std::function<Host()>> hosts;
  bool merges = false;
  /// The start is the base, to the bit.
  bool starts_as_base = false;
  /// Stands in for whole weights: what is below has no say.
  bool replaces = false;
};

template <class Options>
Method method(
    const std::string& name,
    Options options,
    std::vector<std::function<Host()>> hosts) {
  return {
      name,
      [options](torch::nn::Module& model, const std::string& adapter) {
        return peft::attach(model, options, adapter);
      },
      std::move(hosts)};
}

/// What a search of S3Delta could end with.
Method structure_of_every_second_module(
    std::vector<std::function<Host()>> hosts) {
  return {
      "S3Delta",
      [](torch::nn::Module& model, const std::string& adapter) {
        const std::vector<peft::AnyOptions> methods{
            peft::LoraOptions(1), peft::HoulsbyOptions(2)};
        std::vector<std::string> names;
        size_t number = 0;
        for (const auto& module : peft::candidates(
                 model, peft::S3DeltaOptions(1).candidates(methods))) {
          if (number++ % 2 == 0) {
            names.push_back(module.name);
          }
        }
        return peft::attach(
            model,
            peft::S3DeltaStructure().candidates(methods).modules(names),
            adapter);
      },
      std::move(hosts)};
}

std::vector<Method> every_method() {
  const std::vector<std::function<Host()>> all{bert, gpt2, llama, t5};
  std::vector<Method> methods;
  const auto add = [&](Method m, bool merges, bool starts_as_base) {
    m.merges = merges;
    m.starts_as_base = starts_as_base;
    methods.push_back(std::move(m));
  };
  add(method("LoRA", peft::LoraOptions(2).alpha(4), all), true, true);
  add(method(
          "LoRA on parameters",
          peft::LoraOptions(2).alpha(4).target_parameters(
              peft::Targets::regex(".*(query|value|c_attn|q_proj|v_proj|"
                                   "SelfAttention\\.[qv])\\.weight")),
          all),
      true,
      true);
  add(method(
          "LoRA and tokens",
          peft::LoraOptions(2).alpha(4).trainable_token_indices(
              {4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17}),
          all),
      true,
      true);
  add(method("DoRA", peft::LoraOptions(2).alpha(4).dora(true), all),
      true,
      false);
  const auto started = [](const char* init) {
    return peft::LoraOptions(2).alpha(4).init(init);
  };
  add(method("PiSSA", started("pissa"), all), true, true);
  add(method("PiSSA, random", started("pissa_niter_2"), all), true, true);
  add(method("OLoRA", started("olora"), {bert, llama, t5}), true, true);
  add(method("orthogonal LoRA", started("orthogonal"), all), true, false);
  add(method("DoRA from PiSSA", started("pissa").dora(true), all), true, false);
  const auto lora = [] { return peft::LoraOptions(2).alpha(4); };
  add(method("KaSA", lora().kasa(peft::KasaOptions()), {bert, llama, t5}),
      true,
      false);
  add(method(
          "BD-LoRA",
          lora().bd_lora(peft::BdLoraOptions()
                             .target_modules_bd_a({"q"})
                             .target_modules_bd_b({"v"})
                             .nblocks(2)),
          {bert, llama, t5}),
      true,
      true);
  add(method("VeLoRA", lora().velora(peft::VeloraOptions()), all), true, true);
  add(method("AdaLoRA", peft::AdaLoraOptions(10).init_r(2), all), true, true);
  add(method("VeRA", peft::VeraOptions(3), all), true, true);
  add(method(
          "VB-LoRA",
          peft::VbLoraOptions(2).num_vectors(9).vector_length(4),
          all),
      true,
      false);
  add(method("LoHa", peft::LoHaOptions(2), all), true, true);
  add(method("LoKr", peft::LoKrOptions(2), all), true, true);
  add(method("HRA", peft::HraOptions(2), all), true, false);
  add(method("OFT", peft::OftOptions().oft_block_size(4), all), true, true);
  add(method("BOFT", peft::BoftOptions(), all), true, true);
  add(method("FourierFT", peft::FourierFtOptions(9), all), true, false);
  std::vector<int64_t> most_tokens(24);
  std::iota(most_tokens.begin(), most_tokens.end(), 4);
  add(method(
          "trainable tokens", peft::TrainableTokensOptions(most_tokens), all),
      true,
      true);
  add(method("BEFT", peft::BeftOptions(), {bert}), true, true);
  add(method("BitFit", peft::BitFitOptions(), {bert, gpt2}), true, true);
  add(method("LayerNorm tuning", peft::LayerNormOptions(), all), true, true);
  add(method("full", peft::FullTuningOptions(), all), true, true);
  methods.back().replaces = true;
  add(method("random mask", peft::RandomMaskOptions(0.3), all), true, true);
  add(method("SHiRA", peft::ShiraOptions(2).random_seed(1), all), true, true);
  add(method("FISH mask", peft::FishOptions(0.1).selection("random"), all),
      true,
      true);
  add(method("Child-tuning F", peft::ChildTuningOptions(0.5), all), true, true);
  methods.back().replaces = true;
  add(method("(IA)3", peft::Ia3Options(), all), true, true);
  add(method("KronA", peft::KronaOptions(), all), true, true);
  add(method("intrinsic", peft::IntrinsicOptions(60), all), true, true);
  add(method("SAID", peft::IntrinsicOptions(80).said(true), all), true, true);
  add(method("Houlsby", peft::HoulsbyOptions(4), all), false, false);
  add(method("Houlsby, zero_up", peft::HoulsbyOptions(4).zero_up(true), all),
      false,
      true);
  add(method("Pfeiffer", peft::PfeifferOptions(4), all), false, false);
  add(method("parallel adapter", peft::ParallelAdapterOptions(4), all),
      false,
      true);
  add(method("prompt", peft::PromptOptions(3), all), false, false);
  add(method("P-tuning", peft::PTuningOptions(3), all), false, false);
  add(method(
          "multitask prompt",
          peft::MultitaskPromptOptions(3).num_ranks(2),
          all),
      false,
      false);
  add(method(
          "CPT",
          peft::CptOptions({4, 9, 7})
              .cpt_tokens_type_mask({1, 2, 3})
              .opt_projection_epsilon(50)
              .opt_projection_format_epsilon(50),
          {gpt2, llama}),
      false,
      false);
  add(method("prefix", peft::PrefixOptions(3), all), false, false);
  add(method("cartridge", peft::CartridgeOptions(4), all), false, false);
  add(method(
          "prefix by MLP",
          peft::PrefixOptions(3).prefix_projection(true).encoder_hidden_size(5),
          all),
      false,
      false);
  add(method("CoDA", peft::CodaOptions().ratio(0.5).bottleneck(4), {bert, t5}),
      false,
      false);
  add(method("ladder", peft::LadderOptions(2), all), false, false);
  add(method(
          "SparseAdapter, LoRA",
          peft::SparseAdapterOptions(peft::LoraOptions(4).alpha(4), 0.5),
          all),
      true,
      true);
  add(method(
          "SparseAdapter, Pfeiffer",
          peft::SparseAdapterOptions(peft::PfeifferOptions(4), 0.5),
          all),
      false,
      false);
  add(structure_of_every_second_module(all), false, false);
  add(method(
          "scaled LoRA", peft::Scaled(peft::LoraOptions(2).alpha(4), 0.5), all),
      true,
      true);
  add(method(
          "LoRA, learned scale",
          peft::Scaled(
              peft::LoraOptions(2).alpha(4),
              peft::ScaleOptions(1).learned(true)),
          all),
      true,
      true);
  add(method("gated Houlsby", peft::Gated(peft::HoulsbyOptions(4)), all),
      false,
      false);
  add(method("gated LoRA", peft::Gated(peft::LoraOptions(2).alpha(2)), all),
      false,
      true);
  add(method(
          "MAM",
          peft::MamOptions()
              .prefix(peft::PrefixOptions(3)
                          .prefix_projection(true)
                          .encoder_hidden_size(5))
              .adapter(peft::ParallelAdapterOptions(4)),
          all),
      false,
      false);
  add(method(
          "LLM-Adapters, series",
          peft::LlmAdaptersOptions().bottleneck(
              peft::LinearBottleneckOptions(4)),
          all),
      false,
      false);
  add(method(
          "LLM-Adapters, parallel",
          peft::LlmAdaptersOptions()
              .bottleneck(
                  peft::LinearBottleneckOptions(4).use_parallel_adapter(true))
              .lora(peft::LoraOptions(2).alpha(4)),
          all),
      false,
      false);
  add(method(
          "AutoPEFT",
          peft::AutoPeftOptions()
              .serial(peft::PfeifferOptions(4))
              .parallel(peft::ParallelAdapterOptions(3))
              .prefix(peft::PrefixOptions(3))
              .leave_out({0}),
          all),
      false,
      false);
  add(method(
          "UniPELT",
          peft::UniPeltOptions()
              .lora(peft::LoraOptions(2).alpha(2))
              .prefix(peft::PrefixOptions(3))
              .adapter(peft::PfeifferOptions(4)),
          all),
      false,
      false);
  return methods;
}

/// Runs `check(host, method)` for every pair.
template <class Check>
void for_each_pair(Check&& check) {
  for (const auto& method : every_method()) {
    for (const auto& make : method.hosts) {
      seed(11);
      Host host = make();
      host.module->eval();
      INFO(method.name << " on " << host.name);
      const std::string error = error_of([&] { check(host, method); });
      CHECK(error == "");
    }
  }
}

} // namespace

TEST_CASE("Off, it is the base to the bit; gone, nothing is left", "[every]") {
  for_each_pair([](Host& host, const Method& method) {
    // With gradients attention takes another kernel, which rounds otherwise.
    const torch::NoGradGuard no_grad;
    const auto base = host.run(*host.module);
    const auto before = state_of(*host.module);
    auto adapter = method.attach(*host.module, "default");
    if (method.starts_as_base) {
      CHECK(equal_bits(host.run(*host.module), base));
    }
    randomise(adapter);
    const auto y = host.run(*host.module);
    CHECK((y.sizes() != base.sizes() || !torch::allclose(y, base, 1e-3, 1e-3)));
    adapter.disable();
    CHECK(equal_bits(host.run(*host.module), base));
    adapter.enable();
    CHECK(equal_bits(host.run(*host.module), y));
    {
      const peft::ActiveAdapters none({});
      CHECK(equal_bits(host.run(*host.module), base));
    }
    adapter.detach();
    CHECK(equal_bits(host.run(*host.module), base));
    CHECK(same_state(before, state_of(*host.module)));
  });
}

TEST_CASE("Training moves all of the adapter and nothing else", "[every]") {
  for_each_pair([](Host& host, const Method& method) {
    auto adapter = method.attach(*host.module, "default");
    randomise(adapter);
    std::vector<Tensor> base, start;
    for (const auto& item : peft::detail::base_parameters(*host.module)) {
      CHECK_FALSE(item.second.requires_grad());
      base.push_back(peft::base(item.second).detach().clone());
    }
    for (const auto& p : adapter.parameters()) {
      start.push_back(p.detach().clone());
    }
    torch::optim::AdamW optimizer(
        host.module->parameters(),
        torch::optim::AdamWOptions(1e-2).weight_decay(0.1));
    for (int step = 0; step < 3; ++step) {
      optimizer.zero_grad();
      host.run(*host.module).square().mean().backward();
      optimizer.step();
    }
    size_t i = 0;
    for (const auto& item : peft::detail::base_parameters(*host.module)) {
      INFO(item.first);
      CHECK_FALSE(item.second.grad().defined());
      CHECK(equal_bits(peft::base(item.second).detach(), base[i++]));
    }
    i = 0;
    for (const auto& item : adapter.named_parameters()) {
      INFO(item.key());
      CHECK(item.value().grad().defined());
    }
    for (const auto& p : adapter.parameters()) {
      CHECK_FALSE(torch::equal(p, start[i++]));
    }
  });
}

TEST_CASE(
    "A copy is independent, a file comes back, training goes on",
    "[every]") {
  for_each_pair([](Host& host, const Method& method) {
    auto adapter = method.attach(*host.module, "default");
    randomise(adapter);
    const auto y = host.run(*host.module);
    const TemporaryDirectory folder;
    peft::save(adapter, folder.path().string());

    const auto copy = peft::clone(*host.module);
    CHECK(equal_bits(host.run(*copy), y));
    auto twin = peft::get_adapter(*copy);
    randomise(twin, 8);
    CHECK_FALSE(torch::allclose(host.run(*copy), y, 1e-3, 1e-3));
    CHECK(equal_bits(host.run(*host.module), y));

    twin.detach();
    auto again = peft::load(*copy, folder.path().string());
    CHECK(again.num_parameters() == adapter.num_parameters());
    CHECK(equal_bits(host.run(*copy), y));
    // One step further the two are still the same.
    for (auto* m : {host.module.get(), copy.get()}) {
      torch::optim::SGD optimizer(
          peft::get_adapter(*m).parameters(), torch::optim::SGDOptions(0.1));
      host.run(*m).square().mean().backward();
      optimizer.step();
    }
    CHECK(equal_bits(host.run(*copy), host.run(*host.module)));
  });
}

TEST_CASE("It merges exactly, or says why it does not", "[every]") {
  for_each_pair([](Host& host, const Method& method) {
    auto adapter = method.attach(*host.module, "default");
    randomise(adapter);
    const auto y = host.run(*host.module).detach();
    if (!method.merges) {
      const auto before = state_of(*host.module);
      CHECK(contains(
          error_of([&] { adapter.merge(); }), "cannot be merged at '"));
      CHECK(contains(
          error_of([&] { peft::merge(*host.module); }),
          "cannot be merged at '"));
      CHECK(same_state(before, state_of(*host.module)));
      return;
    }
    peft::merge(*host.module);
    CHECK(peft::adapters(*host.module).empty());
    CHECK(close(host.run(*host.module), y, 1e-4, 1e-5));
  });
}

TEST_CASE("It lives beside LoRA, and follows the network's dtype", "[every]") {
  for_each_pair([](Host& host, const Method& method) {
    auto lora = peft::attach(
        *host.module,
        peft::LoraOptions(2).targets(
            peft::Targets::regex(".*(query|c_attn|q_proj|SelfAttention\\.q)")),
        "lora");
    randomise(lora, 3);
    const auto with_lora = host.run(*host.module);
    auto adapter = method.attach(*host.module, "other");
    randomise(adapter);
    const auto both = host.run(*host.module);
    adapter.disable();
    CHECK(equal_bits(host.run(*host.module), with_lora));
    adapter.enable();
    lora.disable();
    CHECK(torch::equal(host.run(*host.module), both) == method.replaces);
    lora.enable();
    CHECK(equal_bits(host.run(*host.module), both));

    host.module->to(torch::kDouble);
    for (const auto& p : adapter.parameters()) {
      CHECK(p.scalar_type() == torch::kDouble);
    }
    const auto exact = host.run(*host.module);
    CHECK(exact.scalar_type() == torch::kDouble);
    CHECK(close(both.to(torch::kDouble), exact, 1e-3, 1e-4));
  });
}

} // namespace test_every_method
