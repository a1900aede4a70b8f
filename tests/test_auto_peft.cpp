/// AutoPEFT: what a configuration computes, its encoding, and its number of
/// parameters without weights.

#include "meta_device.h"
#include "model_state.h"
#include "test.h"

#include <peft/methods/auto_peft.h>
#include <peft/models/bert.h>
#include <peft/models/gpt2.h>
#include <peft/models/llama.h>
#include <peft/models/t5.h>
#include <peft/train/search.h>
#include <peft/train/search/auto_peft.h>

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

namespace test_auto_peft {

namespace {

using peft::AutoPeftOptions;
using peft::AutoPeftSpace;
using peft::Configuration;
using peft::ParallelAdapterOptions;
using peft::PfeifferOptions;
using peft::PrefixOptions;
using torch::Tensor;
namespace models = peft::models;

models::BertOptions bert_options(int64_t layers = 3) {
  return models::BertOptions()
      .vocab_size(40)
      .hidden_size(16)
      .num_hidden_layers(layers)
      .num_attention_heads(2)
      .intermediate_size(32)
      .max_position_embeddings(32)
      .hidden_dropout_prob(0)
      .attention_probs_dropout_prob(0);
}

models::BertForSequenceClassification bert() {
  seed(1);
  models::BertForSequenceClassification model(bert_options());
  model->eval();
  return model;
}

Tensor words() {
  seed(2);
  return torch::randint(4, 40, {3, 6}, torch::kLong);
}
Tensor padding() {
  Tensor mask = torch::ones({3, 6}, torch::kLong);
  mask[1].slice(0, 4).zero_();
  return mask;
}

/// A network of each kind, and a call of it.
struct Host {
  std::string name;
  std::shared_ptr<torch::nn::Module> module;
  std::function<Tensor(torch::nn::Module&)> run;
};

std::vector<Host> hosts() {
  seed(3);
  models::Gpt2ForCausalLM gpt2(models::Gpt2Options()
                                   .vocab_size(40)
                                   .n_positions(32)
                                   .n_embd(16)
                                   .n_layer(3)
                                   .n_head(2));
  models::LlamaForCausalLM llama(models::LlamaOptions()
                                     .vocab_size(40)
                                     .hidden_size(24)
                                     .intermediate_size(20)
                                     .num_hidden_layers(2)
                                     .num_attention_heads(4)
                                     .num_key_value_heads(2));
  models::T5ForConditionalGeneration t5(models::T5Options()
                                            .vocab_size(40)
                                            .d_model(16)
                                            .d_kv(6)
                                            .d_ff(24)
                                            .num_layers(2)
                                            .num_decoder_layers(1)
                                            .num_heads(2));
  std::vector<Host> result{
      {"BERT",
       bert().ptr(),
       [](torch::nn::Module& m) {
         return m.as<models::BertForSequenceClassificationImpl>()->forward(
             words(), padding());
       }},
      {"GPT-2",
       gpt2.ptr(),
       [](torch::nn::Module& m) {
         return m.as<models::Gpt2ForCausalLMImpl>()->forward(
             words(), padding());
       }},
      {"LLaMA",
       llama.ptr(),
       [](torch::nn::Module& m) {
         return m.as<models::LlamaForCausalLMImpl>()->forward(
             words(), padding());
       }},
      {"T5", t5.ptr(), [](torch::nn::Module& m) {
         return m.as<models::T5ForConditionalGenerationImpl>()->forward(
             words(), padding(), words().flip(0));
       }}};
  for (auto& host : result) {
    host.module->eval();
  }
  return result;
}

/// Valid configurations, drawn as a search draws them.
std::vector<Configuration> some(const AutoPeftSpace& choices, int count) {
  const auto space = choices.space();
  peft::detail::ConfigurationSampler sampler(space, 7);
  std::vector<Configuration> result;
  while (static_cast<int>(result.size()) < count) {
    auto c = sampler.next();
    if (!c) {
      break;
    }
    if (space.accepts(*c)) {
      result.push_back(*c);
    }
  }
  return result;
}

Tensor bottleneck(
    const Tensor& x,
    const torch::OrderedDict<std::string, Tensor>& all,
    const std::string& prefix) {
  const auto h = torch::relu(torch::linear(
      x,
      all[prefix + ".adapter_down.0.weight"],
      all[prefix + ".adapter_down.0.bias"]));
  return torch::linear(
      h, all[prefix + ".adapter_up.weight"], all[prefix + ".adapter_up.bias"]);
}

} // namespace

TEST_CASE("all three modules compute the published sum") {
  seed(5);
  models::BertModel model(bert_options());
  model->to(torch::kDouble);
  model->eval();
  auto adapter = peft::attach(
      *model,
      AutoPeftOptions()
          .serial(PfeifferOptions(4))
          .parallel(ParallelAdapterOptions(3).scaling(2.5))
          .prefix(PrefixOptions(5))
          .leave_out({1}));
  randomise(adapter);
  CHECK(
      adapter.num_parameters() ==
      2 * ((2 * 16 * 4 + 4 + 16) + (2 * 16 * 3 + 3 + 16) + 2 * 5 * 16));
  const auto own = adapter.named_parameters();
  const auto ids = words();
  // [layer, key or value, virtual tokens, width], without the layer left out
  Tensor table;
  for (const auto& item : own) {
    if (contains(item.key(), "prompt_embeddings")) {
      table = item.value().view({5, 2, 2, 16}).permute({1, 2, 0, 3});
    }
  }
  REQUIRE(table.defined());

  const auto forward = [&](const Tensor& mask) {
    auto& embeddings = *model->embeddings;
    Tensor h = embeddings.forward(
        embeddings.word_embeddings->forward(ids),
        torch::arange(6).unsqueeze(0), // the prefix takes no positions
        torch::zeros_like(ids));
    for (int64_t i = 0; i < 3; ++i) {
      auto& layer = *model->encoder->layer[i]->as<models::BertLayerImpl>();
      auto& self = *layer.attention->self;
      const auto heads = [](const Tensor& t) {
        return t.unflatten(-1, {2, 8}).transpose(1, 2);
      };
      const auto plain = [](const torch::nn::Linear& linear, const Tensor& x) {
        return torch::linear(
            x, peft::base(linear->weight), peft::base(linear->bias));
      };
      Tensor k = plain(self.key, h), v = plain(self.value, h);
      const bool in = i != 1;
      if (in) {
        const auto row = table[i == 0 ? 0 : 1];
        k = torch::cat({row[0].expand({3, 5, 16}), k}, 1);
        v = torch::cat({row[1].expand({3, 5, 16}), v}, 1);
      }
      auto scores =
          heads(plain(self.query, h)).matmul(heads(k).transpose(2, 3)) /
          std::sqrt(8.0);
      if (mask.defined()) {
        const Tensor open = in
            ? torch::cat({torch::ones({3, 5}, torch::kLong), mask}, 1)
            : mask;
        scores = scores.masked_fill(
            open.eq(0).unsqueeze(1).unsqueeze(1),
            -std::numeric_limits<double>::infinity());
      }
      const auto attended =
          scores.softmax(-1).matmul(heads(v)).transpose(1, 2).flatten(2);
      const auto norm = [](const torch::nn::LayerNorm& n, const Tensor& x) {
        return torch::layer_norm(
            x, {16}, peft::base(n->weight), peft::base(n->bias), 1e-12);
      };
      const Tensor x = norm(
          layer.attention->output->norm,
          plain(layer.attention->output->dense, attended) + h);
      const Tensor f = plain(
          layer.output->dense,
          torch::gelu(plain(layer.intermediate->dense, x)));
      Tensor sum = f + x;
      if (in) {
        const std::string name =
            "encoder.layer." + std::to_string(i) + ".output";
        const Tensor z = norm(layer.output->norm, f + x);
        sum = sum + bottleneck(z, own, name + ".LayerNorm") +
            2.5 * bottleneck(x, own, name + ".dense");
      }
      h = norm(layer.output->norm, sum);
    }
    return h;
  };
  CHECK(close(model->forward(ids), forward({})));
  CHECK(close(model->forward(ids, padding()), forward(padding())));
  // The adapter as a whole has one scale; a half adapter is half of each term.
  adapter.set_scale(0);
  CHECK_FALSE(close(model->forward(ids), forward({})));
}

TEST_CASE("without a norm at the end, the terms add up") {
  seed(6);
  models::Gpt2Model model(models::Gpt2Options()
                              .vocab_size(40)
                              .n_positions(32)
                              .n_embd(16)
                              .n_layer(1)
                              .n_head(2));
  model->to(torch::kDouble);
  model->eval();
  const Tensor x = torch::randn({2, 5, 16}, torch::kDouble);
  const auto run = [&] { // what the layer gives, before the last norm
    return model->layer_loop
        ->forward(
            x,
            {},
            *model->h,
            [](torch::nn::Module& block, const peft::LayerCall& call) {
              return block.as<models::Gpt2BlockImpl>()->forward(
                  call, {}, nullptr);
            })
        .hidden;
  };
  const Tensor base = run();
  auto adapter = peft::attach(
      *model,
      AutoPeftOptions()
          .serial(PfeifferOptions(4))
          .parallel(ParallelAdapterOptions(3)));
  randomise(adapter);
  const Tensor both = run();
  std::map<std::string, Tensor> values;
  for (const auto& item : adapter.named_parameters()) {
    values[item.key()] = item.value().detach().clone();
  }
  adapter.detach();
  const auto alone = [&](const AutoPeftOptions& options) {
    auto one = peft::attach(*model, options);
    for (const auto& item : one.named_parameters()) {
      torch::NoGradGuard no_grad;
      item.value().copy_(values.at(item.key()));
    }
    const Tensor y = run();
    one.detach();
    return y;
  };
  const Tensor serial = alone(AutoPeftOptions().serial(PfeifferOptions(4)));
  const Tensor parallel =
      alone(AutoPeftOptions().parallel(ParallelAdapterOptions(3)));
  CHECK_FALSE(close(serial, base));
  CHECK_FALSE(close(parallel, base));
  CHECK(close(both - base, (serial - base) + (parallel - base)));
}

TEST_CASE("a configuration is 3 + L integers, decoded as published") {
  std::shared_ptr<torch::nn::Module> base;
  {
    const MetaDevice meta;
    base = std::make_shared<models::BertModelImpl>(models::BertOptions());
  }
  const AutoPeftSpace choices(peft::describe_network(*base));
  CHECK(choices.num_layers() == 12);
  CHECK(choices.width() == 768);
  CHECK(choices.absent() == 10);
  const auto space = choices.space();
  REQUIRE(space.dimensions().size() == 15);
  CHECK(*space.size() == 11 * 11 * 11 * 4096);
  const std::vector<std::string> names{
      "log2_reduction_factor",
      "log2_reduction_prefix",
      "log2_reduction_serial",
      "leave_out_0"};
  for (size_t i = 0; i < names.size(); ++i) {
    CHECK(space.dimensions()[i].name == names[i]);
  }
  CHECK(space.dimensions().back().name == "leave_out_11");

  const auto configuration = [&](int64_t k, int64_t prefix, int64_t out) {
    Configuration c;
    c.set(names[0], k).set(names[1], prefix).set(names[2], k);
    for (int64_t i = 0; i < 12; ++i) {
      c.set("leave_out_" + std::to_string(i), int64_t{i < out});
    }
    return c;
  };
  const int64_t sizes[] = {768, 384, 192, 96, 48, 24, 12, 6, 3, 1};
  for (int64_t k = 0; k < 10; ++k) {
    INFO(k);
    const auto c = configuration(k, k, 5);
    const auto options = choices.decode(c);
    CHECK(*options.serial()->bottleneck() == sizes[k]);
    CHECK(*options.parallel()->bottleneck() == sizes[k]);
    CHECK(options.prefix()->num_virtual_tokens() == sizes[k]);
    CHECK(options.leave_out() == std::vector<int64_t>{0, 1, 2, 3, 4});
    // The published count, which passes over biases, and the biases.
    const int64_t l = sizes[k], r = sizes[k];
    CHECK(
        choices.num_parameters(c) ==
        7 * (l * 768 * 2 + r * 2 * 768 + r * 2 * 768) + 7 * 2 * (r + 768));
    CHECK(choices.num_parameters(c) == peft::num_parameters(options, *base));
    CHECK(choices.encode(options) == c);
  }
  const auto absent = choices.decode(configuration(10, 9, 0));
  CHECK_FALSE(absent.serial().has_value());
  CHECK_FALSE(absent.parallel().has_value());
  CHECK(absent.prefix()->num_virtual_tokens() == 1);
  CHECK(choices.encode(absent) == configuration(10, 9, 0));

  // Nothing at all, no layer, and a prefix of more than BERT's positions where
  // it takes some.
  const AutoPeftSpace numbered(
      peft::describe_network(*base),
      AutoPeftOptions().prefix(PrefixOptions(1).takes_positions(true)));
  CHECK(space.accepts(configuration(3, 0, 0)));
  for (const auto& c :
       {configuration(10, 10, 0),
        configuration(3, 3, 12),
        configuration(3, 0, 0)}) {
    CHECK_FALSE(numbered.space().accepts(c));
    CHECK(contains(error_of([&] { numbered.decode(c); }), "leaves out every"));
  }
  CHECK(contains(
      error_of([&] { choices.decode(configuration(11, 1, 0)); }),
      "'log2_reduction_factor' must be an integer from 0 to 10, got 11"));
  CHECK(contains(
      error_of([&] {
        choices.decode(configuration(1, 1, 0).set("leave_out_12", int64_t{1}));
      }),
      "no dimension 'leave_out_12'"));
  CHECK(contains(
      error_of([&] {
        choices.encode(AutoPeftOptions().serial(PfeifferOptions(5)));
      }),
      "a size of 5 is none of log2_reduction_serial's"));
  CHECK(contains(
      error_of([&] {
        choices.encode(
            AutoPeftOptions().serial(PfeifferOptions(3)).leave_out({12}));
      }),
      "leave_out names layer 12"));
  CHECK(
      choices
          .encode(AutoPeftOptions().serial(PfeifferOptions()).leave_out({2, 2}))
          .integer("log2_reduction_serial") == 4); // width / 16
}

TEST_CASE("counts without weights are those of the attached adapters") {
  for (auto& host : hosts()) {
    INFO(host.name);
    const auto network = peft::describe_network(*host.module);
    const bool has_head = host.name == "BERT";
    auto base =
        AutoPeftOptions()
            .parallel(
                ParallelAdapterOptions().learned_scaling(true).layer_norm("in"))
            .prefix(PrefixOptions(1)
                        .prefix_projection(has_head)
                        .encoder_hidden_size(7));
    if (has_head) {
      base.modules_to_save({"classifier"});
    }
    for (const auto& each : {AutoPeftOptions(), base}) {
      const AutoPeftSpace choices(network, each);
      std::set<std::string> seen;
      for (const auto& c : some(choices, 40)) {
        INFO(c.to_string());
        seen.insert(c.to_string());
        const auto options = choices.decode(c);
        CHECK(choices.encode(options) == c);
        const auto random = at::detail::getDefaultCPUGenerator().get_state();
        const int64_t count = choices.num_parameters(c);
        CHECK(peft::num_parameters(options, network) == count);
        CHECK(equal_bits(
            at::detail::getDefaultCPUGenerator().get_state(), random));
        auto adapter = peft::attach(*host.module, options);
        CHECK(adapter.num_parameters() == count);
        adapter.detach();
      }
      CHECK(seen.size() == 40);
    }
  }
}

TEST_CASE("counts of other options are those of their adapters") {
  for (auto& host : hosts()) {
    INFO(host.name);
    const auto network = peft::describe_network(*host.module);
    const auto before = state_of(*host.module);
    const auto check = [&](const auto& options) {
      const auto random = at::detail::getDefaultCPUGenerator().get_state();
      const int64_t count = peft::num_parameters(options, network);
      CHECK(peft::num_parameters(options, *host.module) == count);
      CHECK(
          equal_bits(at::detail::getDefaultCPUGenerator().get_state(), random));
      CHECK(same_state(before, state_of(*host.module)));
      auto adapter = peft::attach(*host.module, options);
      CHECK(adapter.num_parameters() == count);
      adapter.detach();
    };
    check(PfeifferOptions());
    check(PfeifferOptions(3).leave_out({1}));
    check(ParallelAdapterOptions().bias(false).layer_norm("out"));
    check(PrefixOptions(4).leave_out({0}));
    check(PrefixOptions(4).prefix_projection(true));
    check(peft::LoraOptions(3));
    check(peft::Ia3Options());
    check(peft::HoulsbyOptions(4));
    check(peft::PromptOptions(4));
    if (host.name == "BERT") {
      check(PfeifferOptions(4)
                .targets({"attention.output.LayerNorm"})
                .modules_to_save({"classifier"}));
      check(ParallelAdapterOptions(4)
                .inputs({"query"})
                .targets({"attention.output.dense"})
                .modules_to_save({"encoder.layer.1", "classifier"}));
    }
    // What cannot be attached cannot be counted.
    CHECK(contains(
        error_of([&] { peft::num_parameters(PfeifferOptions(0), network); }),
        "1 feature or more"));
    CHECK(contains(
        error_of([&] { peft::num_parameters(PfeifferOptions(99), network); }),
        "is wider than"));
  }
}

TEST_CASE("files, copies and training of a configuration") {
  for (auto& host : hosts()) {
    INFO(host.name);
    const AutoPeftSpace choices(
        peft::describe_network(*host.module),
        AutoPeftOptions().prefix(
            PrefixOptions(1).prefix_projection(host.name == "GPT-2")));
    for (const auto& c : some(choices, 6)) {
      INFO(c.to_string());
      const auto before = state_of(*host.module);
      const Tensor base = host.run(*host.module).detach();
      auto adapter = peft::attach(*host.module, choices.decode(c));
      randomise(adapter);
      const Tensor y = host.run(*host.module);
      const TemporaryDirectory folder;
      peft::save(adapter, folder.path().string());
      const auto copy = peft::clone(*host.module);
      CHECK(equal_bits(host.run(*copy), y));
      randomise(adapter, 9); // the copy holds nothing of the original
      CHECK(equal_bits(host.run(*copy), y));
      CHECK_FALSE(close(host.run(*host.module), y));
      adapter.detach();
      CHECK(same_state(before, state_of(*host.module)));
      CHECK(equal_bits(host.run(*host.module).detach(), base));

      auto again = peft::load(*host.module, folder.path().string());
      CHECK(again.method() == "AUTO_PEFT");
      CHECK(equal_bits(host.run(*host.module), y));
      for (auto* m : {host.module.get(), copy.get()}) { // a step further
        torch::optim::AdamW optimizer(peft::get_adapter(*m).parameters(), 0.1);
        host.run(*m).square().mean().backward();
        optimizer.step();
      }
      CHECK_FALSE(close(host.run(*copy), y));
      CHECK(equal_bits(host.run(*copy), host.run(*host.module)));
      const auto error = error_of([&] { again.merge(); });
      CHECK(contains(error, "cannot be merged"));
      if (c.integer("log2_reduction_prefix") == choices.absent()) {
        again.disable();
        const Tensor off = host.run(*host.module);
        again.enable();
        const peft::AdapterDrop all(9);
        CHECK(equal_bits(host.run(*host.module), off));
      }
      again.detach();
    }
  }
}

TEST_CASE("a search over AutoPEFT's space keeps its budget") {
  auto model = bert();
  const AutoPeftSpace choices(peft::describe_network(*model));
  const auto count = [&](const Configuration& c) {
    return choices.num_parameters(c);
  };
  const auto objective = [&](const Configuration& c, int64_t resource) {
    auto adapter = peft::attach(*model, choices.decode(c));
    const int64_t parameters = adapter.num_parameters();
    adapter.detach();
    return peft::Outcome(
        static_cast<double>(parameters % 17 + resource) / 100, parameters);
  };
  const auto result = peft::search(
      choices.space(),
      objective,
      peft::SearchBudget(30)
          .eta(3)
          .rungs(3)
          .count_parameters(count)
          .max_parameters(400));
  CHECK(result.complete);
  CHECK(result.trials.size() == 30 + 10 + 3);
  std::set<std::string> seen;
  for (const auto& trial : result.trials) {
    CHECK_FALSE(trial.failed());
    CHECK(trial.outcome.costs.at("parameters") <= 400);
    CHECK(trial.outcome.costs.at("parameters") == count(trial.configuration));
    seen.insert(trial.configuration.to_string());
  }
  CHECK(seen.size() == 30);
  // The smallest is one virtual token in one layer: 2 d.
  const auto budget = peft::SearchBudget(1000).count_parameters(count);
  CHECK(contains(
      error_of([&] {
        peft::search(
            choices.space(),
            objective,
            peft::SearchBudget(budget).max_parameters(31));
      }),
      "fits into a budget of 31 parameters; the smallest has 32"));
  const auto smallest = peft::search(
      choices.space(),
      objective,
      peft::SearchBudget(budget).max_parameters(32));
  CHECK(smallest.trials.size() == 3); // in any of the three layers
}

TEST_CASE("AutoPEFT says what does not fit") {
  auto model = bert();
  const auto network = peft::describe_network(*model);
  const auto before = state_of(*model);
  const auto refusal = [&](const AutoPeftOptions& options) {
    const auto error = error_of([&] { peft::attach(*model, options); });
    CHECK(same_state(before, state_of(*model)));
    return error;
  };
  CHECK(contains(refusal(AutoPeftOptions()), "has no module"));
  CHECK(contains(
      refusal(AutoPeftOptions().serial(PfeifferOptions(4).leave_out({1}))),
      "AutoPEFT's own options"));
  CHECK(contains(
      refusal(AutoPeftOptions().prefix(
          PrefixOptions(4).modules_to_save({"classifier"}))),
      "AutoPEFT's own options"));
  CHECK(contains(
      refusal(
          AutoPeftOptions().serial(PfeifferOptions(4)).leave_out({0, 1, 2})),
      "leave_out leaves no layer"));
  CHECK(contains(
      refusal(AutoPeftOptions()
                  .serial(PfeifferOptions(4))
                  .parallel(ParallelAdapterOptions(4).targets(
                      {"layer.0.output.dense", "layer.1.output.dense"}))),
      "no parallel one"));
  CHECK(contains(
      refusal(
          AutoPeftOptions()
              .serial(PfeifferOptions(4).targets({"layer.0.output.LayerNorm"}))
              .parallel(ParallelAdapterOptions(4))),
      "layers"));
  CHECK(contains(
      refusal(
          AutoPeftOptions()
              .serial(PfeifferOptions(4))
              .parallel(
                  ParallelAdapterOptions(4)
                      .inputs({"intermediate.dense", "query"})
                      .targets({"attention.output.dense", "output.dense"}))),
      "one parallel adapter a layer"));
  CHECK(contains(
      error_of(
          [&] { AutoPeftSpace(network, AutoPeftOptions().leave_out({1})); }),
      "base must not name any"));
  CHECK(contains(
      error_of([&] {
        AutoPeftSpace(
            network,
            AutoPeftOptions().serial(
                PfeifferOptions().targets({"layer.0.output.LayerNorm"})));
      }),
      "one serial adapter a layer"));
  torch::nn::Sequential bare(torch::nn::Linear(3, 3));
  CHECK(contains(
      error_of([&] { AutoPeftSpace(peft::describe_network(*bare)); }),
      "says nowhere where its tokens begin"));
}

} // namespace test_auto_peft
