/// Prompt tuning and P-tuning: what a prompt does to a network, how it starts,
/// and that nothing else moves.

#include "decoders.h"
#include "gradcheck.h"
#include "model_state.h"
#include "own_decoder.h"
#include "test.h"

#include <peft/methods/p_tuning.h>
#include <peft/methods/prefix.h>
#include <peft/methods/prompt.h>
#include <peft/models/bert.h>
#include <peft/models/t5.h>

#include <string>
#include <utility>
#include <vector>

namespace test_prompt {

namespace {

using peft::KeyValues;
using peft::PromptOptions;
using peft::PTuningOptions;
using torch::Tensor;

own::Decoder decoder(torch::ScalarType dtype = torch::kDouble) {
  seed(1);
  own::Decoder model;
  model->to(dtype);
  model->eval();
  return model;
}

peft::models::BertModel bert() {
  seed(2);
  peft::models::BertModel model(peft::models::BertOptions()
                                    .vocab_size(20)
                                    .hidden_size(8)
                                    .num_hidden_layers(2)
                                    .num_attention_heads(2)
                                    .intermediate_size(16)
                                    .max_position_embeddings(16));
  model->eval();
  return model;
}

peft::models::T5Model t5() {
  seed(3);
  peft::models::T5Model model(peft::models::T5Options()
                                  .vocab_size(20)
                                  .d_model(8)
                                  .d_kv(4)
                                  .d_ff(16)
                                  .num_layers(2)
                                  .num_heads(2)
                                  .dropout_rate(0));
  model->eval();
  return model;
}

/// The prompt as it stands in a file.
Tensor prompt_of(const peft::Adapter& adapter) {
  return adapter.shared_state()
      ->sites.front()
      .delta->file_tensors()
      .front()
      .second.detach();
}

/// The own decoder on embeddings that are at hand: no call site takes part.
Tensor
run_plain(own::Decoder& model, const Tensor& embeds, const Tensor& mask) {
  const auto length = embeds.size(1);
  Tensor seen = torch::ones({length, length}, torch::kBool).tril();
  if (mask.defined()) {
    seen = seen.logical_and(mask.to(torch::kBool).unsqueeze(1).unsqueeze(1));
  }
  Tensor x = embeds + model->place(torch::arange(length)).unsqueeze(0);
  for (size_t i = 0; i < model->blocks->size(); ++i) {
    x = model->blocks[i]->as<own::BlockImpl>()->forward(x, seen, i, nullptr);
  }
  return model->head(x);
}

} // namespace

TEST_CASE("a prompt stands in front of the embedded tokens") {
  auto model = decoder();
  const Tensor ids = own::ids(3, 5);
  const Tensor before = model->forward(ids);
  const auto plain = state_of(*model);
  auto adapter = peft::attach(*model, PromptOptions(4));
  CHECK(adapter.method() == "PROMPT_TUNING");
  CHECK(adapter.num_parameters() == 4 * own::kHidden);
  CHECK(
      adapter.named_parameters().keys() ==
      std::vector<std::string>{"prompt_embeddings"});
  const Tensor with = model->forward(ids);
  REQUIRE(with.sizes() == at::IntArrayRef({3, 9, own::kVocabulary}));
  CHECK_FALSE(close(with.slice(1, 4), before)); // no identity at the start

  const auto in_front = [&](double scale) {
    return at::cat(
        {(scale * prompt_of(adapter)).unsqueeze(0).expand({3, -1, -1}),
         model->embed(ids)},
        1);
  };
  CHECK(close(with, run_plain(model, in_front(1), {})));
  const Tensor mask = torch::tensor(
      {{1, 1, 1, 1, 1}, {1, 1, 1, 0, 0}, {0, 0, 1, 1, 1}}, torch::kLong);
  const Tensor longer = at::constant_pad_nd(mask, {4, 0}, 1);
  CHECK(
      close(model->forward(ids, mask), run_plain(model, in_front(1), longer)));

  // A scale multiplies the rows; rows of zero still take attention.
  adapter.set_scale(0.5);
  CHECK(close(model->forward(ids), run_plain(model, in_front(0.5), {})));
  adapter.set_scale(0);
  CHECK(close(model->forward(ids), run_plain(model, in_front(0), {})));
  CHECK_FALSE(close(model->forward(ids).slice(1, 4), before));
  adapter.set_scale(1);

  adapter.disable();
  CHECK(equal_bits(model->forward(ids), before));
  adapter.enable();
  CHECK(equal_bits(model->forward(ids), with));
  const auto error = error_of([&] { adapter.merge(); });
  CHECK(contains(error, "cannot be merged at 'extra_tokens'"));
  CHECK(contains(error, "KeyValues"));
  adapter.detach();
  CHECK(equal_bits(model->forward(ids), before));
  CHECK(same_state(state_of(*model), plain));
}

TEST_CASE("what a token computes under a prompt does not depend on padding") {
  auto model = decoder();
  peft::attach(*model, PromptOptions(3));
  const Tensor ids = own::ids(1, 4);
  const Tensor alone = model->forward(ids);
  const Tensor filler = own::ids(1, 2);
  const Tensor ones = torch::ones({1, 4}, torch::kLong);
  const Tensor zeros = torch::zeros({1, 2}, torch::kLong);
  const Tensor right =
      model->forward(at::cat({ids, filler}, 1), at::cat({ones, zeros}, 1));
  CHECK(close(right.slice(1, 0, 7), alone));
  // On the left the tokens' positions are the caller's, from 0; the prompt's
  // come before them.
  const Tensor left = model->forward(
      at::cat({filler, ids}, 1),
      at::cat({zeros, ones}, 1),
      at::cat({zeros, torch::arange(4).unsqueeze(0)}, 1));
  CHECK(close(left.slice(1, 0, 3), alone.slice(1, 0, 3)));
  CHECK(close(left.slice(1, 5), alone.slice(1, 3)));
}

TEST_CASE("a token under a prompt sees nothing that comes later") {
  auto model = decoder();
  peft::attach(*model, PromptOptions(3));
  const Tensor ids = own::ids(2, 6);
  Tensor other = ids.clone();
  other.slice(1, 4).copy_((other.slice(1, 4) + 1) % own::kVocabulary);
  const Tensor a = model->forward(ids), b = model->forward(other);
  CHECK(equal_bits(a.slice(1, 0, 7), b.slice(1, 0, 7)));
  CHECK_FALSE(close(a.slice(1, 7), b.slice(1, 7)));
}

TEST_CASE("token types and labels grow with a prompt") {
  auto model = bert();
  peft::attach(*model, PromptOptions(3));
  const Tensor ids = torch::randint(20, {2, 5}, torch::kLong);
  const Tensor types = torch::tensor({{0, 0, 1, 1, 1}, {0, 1, 1, 1, 1}});
  const Tensor typed = model->forward(ids, {}, types);
  CHECK(typed.size(1) == 8);
  CHECK_FALSE(close(typed, model->forward(ids)));
  CHECK(equal_bits(model->forward(ids, {}, 0 * types), model->forward(ids)));

  const Tensor labels = torch::randint(4, {2, 5}, torch::kLong);
  const Tensor logits = torch::randn({2, 8, 4});
  const Tensor longer = peft::extend_labels(labels, logits);
  CHECK(longer.slice(1, 0, 3).eq(-100).all().item<bool>());
  CHECK(equal_bits(longer.slice(1, 3).contiguous(), labels));
  namespace F = torch::nn::functional;
  CHECK(close(
      F::cross_entropy(logits.flatten(0, 1), longer.flatten()),
      F::cross_entropy(logits.slice(1, 3).flatten(0, 1), labels.flatten())));
}

TEST_CASE("a prompt is computed once for a cache") {
  auto model = decoder();
  peft::attach(*model, PromptOptions(3));
  torch::NoGradGuard no_grad;
  const Tensor ids = own::ids(2, 6);
  const Tensor mask =
      torch::tensor({{1, 1, 1, 1, 1, 1}, {0, 0, 1, 1, 1, 1}}, torch::kLong);
  const Tensor positions = (mask.cumsum(1) - 1).clamp_min(0);
  const Tensor whole = model->forward(ids, mask, positions);
  KeyValues cache;
  std::vector<Tensor> steps{model->forward(
      ids.slice(1, 0, 3),
      mask.slice(1, 0, 3),
      positions.slice(1, 0, 3),
      &cache)};
  CHECK(cache.length() == 6);
  CHECK(cache.virtual_tokens == 3);
  for (int64_t t = 3; t < 6; ++t) {
    steps.push_back(model->forward(
        ids.slice(1, t, t + 1),
        mask.slice(1, 0, t + 1),
        positions.slice(1, t, t + 1),
        &cache));
  }
  CHECK(cache.length() == 9);
  CHECK(close(at::cat(steps, 1), whole));

  // The prompt alone, kept and used for one input after another.
  KeyValues kept;
  CHECK(model->forward(ids.slice(1, 0, 0), {}, {}, &kept).size(1) == 3);
  for (const auto& input : {ids, (ids + 1) % own::kVocabulary}) {
    KeyValues own_cache = kept;
    CHECK(close(
        model->forward(input, {}, {}, &own_cache),
        model->forward(input).slice(1, 3)));
  }
  CHECK(kept.length() == 3);
}

TEST_CASE("decoders generate the same with and without a cache", "[prompt]") {
  seed(4);
  auto gpt2 = decoders::load<decoders::Gpt2>();
  auto llama = decoders::load<decoders::Llama>();
  peft::attach(*gpt2, PromptOptions(3));
  peft::attach(*llama, PromptOptions(3));
  const Tensor ids = torch::randint(1, 48, {2, 4}, torch::kLong);
  const auto options = peft::models::GenerationOptions().max_new_tokens(5);
  const auto check = [&](auto& model) {
    torch::NoGradGuard no_grad;
    Tensor sequence = ids;
    for (int i = 0; i < 5; ++i) {
      const Tensor next =
          model->forward(sequence).select(1, -1).argmax(-1, true);
      sequence = at::cat({sequence, next}, 1);
    }
    CHECK(
        equal_bits(peft::models::generate(model, ids, {}, options), sequence));
  };
  check(gpt2);
  check(llama);
}

TEST_CASE("how a prompt starts") {
  auto model = decoder();
  const Tensor words = model->embed->weight.detach();
  const auto started = [&](const PromptOptions& options, uint64_t number = 5) {
    seed(number);
    auto adapter = peft::attach(*model, options);
    const Tensor rows = prompt_of(adapter).clone();
    adapter.detach();
    return rows;
  };
  const auto row_numbers = [&](const Tensor& rows) {
    const Tensor same = rows.unsqueeze(1).eq(words.unsqueeze(0)).all(2);
    REQUIRE(same.any(1).all().item<bool>());
    return same.to(torch::kLong).argmax(1);
  };
  seed(5);
  CHECK(equal_bits(
      started(PromptOptions(6)),
      torch::randn({6, own::kHidden}).to(torch::kDouble)));
  const Tensor uniform = started(PromptOptions(6).init("uniform"));
  CHECK(uniform.abs().max().item<double>() <= 0.5);
  CHECK(uniform.min().item<double>() < -0.3);
  CHECK(uniform.max().item<double>() > 0.3);

  seed(5);
  const Tensor drawn = torch::randint(own::kVocabulary, {6}, torch::kLong);
  CHECK(
      equal_bits(row_numbers(started(PromptOptions(6).init("vocab"))), drawn));
  const Tensor common =
      row_numbers(started(PromptOptions(20).init("vocab").population_size(3)));
  CHECK(common.max().item<int64_t>() == 2);
  CHECK(common.min().item<int64_t>() == 0);

  CHECK(equal_bits(
      row_numbers(started(PromptOptions(5).init_token_ids({7, 2, 9}))),
      torch::tensor({7, 2, 9, 7, 2})));
  CHECK(equal_bits(
      row_numbers(
          started(PromptOptions(2).init("text").init_token_ids({7, 2, 9}))),
      torch::tensor({7, 2})));
  const Tensor classes =
      started(PromptOptions(4).class_token_ids({{3, 5}, {8}}));
  CHECK(close(classes[0], (words[3] + words[5]) / 2));
  CHECK(equal_bits(classes[1], words[8]));
  row_numbers(classes.slice(0, 2)); // the rest is of the vocabulary

  // An adapted embedding starts a prompt from what it was before.
  auto lora = peft::attach(
      *model, peft::LoraOptions(2).init("random").targets({"embed"}), "lora");
  CHECK(equal_bits(
      row_numbers(started(PromptOptions(2).init_token_ids({7, 2}))),
      torch::tensor({7, 2})));
  lora.detach();

  // The rows are copies.
  auto adapter = peft::attach(*model, PromptOptions(2).init_token_ids({7, 2}));
  const Tensor table = words.clone();
  randomise(adapter);
  CHECK(equal_bits(model->embed->weight.detach(), table));
}

TEST_CASE("prompts of half networks train in float32") {
  for (const auto dtype : {torch::kBFloat16, torch::kHalf, torch::kFloat}) {
    INFO(dtype);
    auto model = decoder(dtype);
    auto adapter =
        peft::attach(*model, PromptOptions(3).init_token_ids({1, 2, 3}));
    CHECK(prompt_of(adapter).scalar_type() == torch::kFloat);
    const Tensor y = model->forward(own::ids(2, 4));
    CHECK(y.scalar_type() == dtype);
    y.sum().backward();
    CHECK(adapter.parameters()[0].grad().scalar_type() == torch::kFloat);
    model->to(torch::kDouble);
    CHECK(prompt_of(adapter).scalar_type() == torch::kDouble);
    CHECK(model->forward(own::ids(2, 4)).scalar_type() == torch::kDouble);
  }
}

TEST_CASE("P-tuning makes its prompt by an MLP or an LSTM") {
  const bool lstm = GENERATE(false, true);
  INFO((lstm ? "LSTM" : "MLP"));
  auto model = decoder();
  const Tensor ids = own::ids(2, 4);
  const Tensor before = model->forward(ids);
  auto adapter = peft::attach(
      *model,
      PTuningOptions(3).encoder_hidden_size(5).encoder_reparameterization_type(
          lstm ? "LSTM" : "MLP"));
  CHECK(adapter.method() == "P_TUNING");
  const int64_t d = own::kHidden, h = 5;
  // Both directions of two layers, four gates with two biases each.
  const int64_t first = 2 * 4 * (h * d + h * h + 2 * h);
  const int64_t second = 2 * 4 * (h * 2 * h + h * h + 2 * h);
  const int64_t expected = 3 * d +
      (lstm ? first + second + 2 * h * 2 * h + 2 * h + 2 * h * d + d
            : d * h + h + h * h + h + h * d + d);
  CHECK(adapter.num_parameters() == expected);
  const Tensor with = model->forward(ids);
  CHECK_FALSE(close(with.slice(1, 3), before));
  CHECK(close(
      with,
      run_plain(
          model,
          at::cat(
              {prompt_of(adapter).unsqueeze(0).expand({2, -1, -1}),
               model->embed(ids)},
              1),
          {})));

  // Without the encoder: the same prompt, one tensor.
  adapter.parameters()[0].set_requires_grad(true);
  const Tensor made = prompt_of(adapter).clone();
  peft::eject_reparameterization(adapter);
  CHECK(equal_bits(model->forward(ids), with));
  CHECK(adapter.num_parameters() == 3 * d);
  CHECK(equal_bits(adapter.parameters()[0], made));
  CHECK(adapter.parameters()[0].requires_grad());
  CHECK(contains(
      error_of([&] { peft::eject_reparameterization(adapter); }),
      "nothing to eject"));
  auto copy = peft::clone(model);
  CHECK(equal_bits(copy->forward(ids), with));
  adapter.detach();
  CHECK(equal_bits(model->forward(ids), before));
}

TEST_CASE("dropout of P-tuning's LSTM acts in training only") {
  auto model = decoder();
  auto adapter = peft::attach(
      *model,
      PTuningOptions(3).encoder_reparameterization_type("LSTM").encoder_dropout(
          0.5));
  const Tensor ids = own::ids(2, 4);
  const Tensor calm = model->forward(ids);
  CHECK(equal_bits(model->forward(ids), calm));
  model->train();
  CHECK_FALSE(close(model->forward(ids), model->forward(ids)));
  CHECK(equal_bits(prompt_of(adapter), prompt_of(adapter)));
  peft::eject_reparameterization(adapter);
  CHECK(close(model->forward(ids), calm));
}

TEST_CASE("gradients of prompts agree with finite differences") {
  auto model = decoder();
  const Tensor ids = own::ids(2, 3);
  const auto check = [&](const auto& options) {
    auto adapter = peft::attach(*model, options);
    const auto inputs = adapter.parameters();
    seed(6);
    const Tensor direction =
        torch::randn({2, 5, own::kVocabulary}, torch::kDouble);
    CHECK(gradcheck::first_order(
        [&](const gradcheck::Tensors&) { return model->forward(ids); },
        inputs,
        direction));
    adapter.detach();
  };
  check(PromptOptions(2));
  check(PTuningOptions(2).encoder_hidden_size(3));
  check(
      PTuningOptions(2).encoder_hidden_size(3).encoder_reparameterization_type(
          "LSTM"));
}

TEST_CASE("only the prompt moves in training") {
  const bool encoder = GENERATE(false, true);
  auto model = decoder(torch::kFloat);
  model->train();
  const Tensor ids = own::ids(4, 6);
  auto adapter = encoder ? peft::attach(*model, PTuningOptions(3))
                         : peft::attach(*model, PromptOptions(3));
  std::vector<Tensor> base, own_before;
  for (const auto& p : peft::detail::base_parameters(*model)) {
    base.push_back(p.second.detach().clone());
    CHECK_FALSE(p.second.requires_grad());
  }
  for (const auto& p : adapter.parameters()) {
    own_before.push_back(p.detach().clone());
  }
  torch::optim::AdamW optimizer(
      model->parameters(), torch::optim::AdamWOptions(0.05).weight_decay(0.1));
  double first = 0, last = 0;
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    const Tensor logits = model->forward(ids);
    const Tensor loss =
        decoders::next_token_loss(logits, peft::extend_labels(ids, logits));
    (step == 0 ? first : last) = loss.item<double>();
    loss.backward();
    optimizer.step();
  }
  CHECK(last < first);
  size_t i = 0;
  for (const auto& p : peft::detail::base_parameters(*model)) {
    INFO(p.first);
    CHECK(equal_bits(p.second, base[i++]));
    CHECK_FALSE(p.second.grad().defined());
  }
  i = 0;
  for (const auto& p : adapter.parameters()) {
    CHECK_FALSE(equal_bits(p, own_before[i++]));
  }
}

TEST_CASE("several prompts, a prefix and LoRA on one network") {
  auto model = decoder();
  const Tensor ids = own::ids(2, 4);
  const Tensor before = model->forward(ids);
  const Tensor positions = torch::arange(4).unsqueeze(0);
  // Positions given or counted, prompt or prefix first: the same tokens.
  std::vector<Tensor> results;
  for (const bool prompt_first : {true, false}) {
    const auto put = [&](bool prompt) {
      seed(prompt ? 8 : 9);
      prompt ? peft::attach(*model, PromptOptions(2), "prompt")
             : peft::attach(*model, peft::PrefixOptions(3), "prefix");
    };
    put(prompt_first);
    put(!prompt_first);
    results.push_back(model->forward(ids));
    CHECK(results.back().size(1) == 6);
    CHECK(close(model->forward(ids, {}, positions), results.back()));
    KeyValues cache;
    CHECK(close(model->forward(ids, {}, {}, &cache), results.back()));
    CHECK(cache.length() == 9);
    CHECK(cache.virtual_tokens == 5);
    for (auto& adapter : peft::adapters(*model)) {
      adapter.detach();
    }
  }
  CHECK(close(results[0], results[1]));

  auto one = peft::attach(*model, PromptOptions(2), "one");
  const Tensor with_one = model->forward(ids);
  auto two = peft::attach(*model, PromptOptions(3), "two");
  auto prefix = peft::attach(*model, peft::PrefixOptions(2), "prefix");
  auto lora = peft::attach(
      *model,
      peft::LoraOptions(2).init("random").targets({"query", "value"}),
      "lora");
  const Tensor all = model->forward(ids);
  CHECK(all.size(1) == 9);
  {
    peft::ActiveAdapters scope({"one"});
    CHECK(equal_bits(model->forward(ids), with_one));
  }
  {
    peft::ActiveAdapters scope({"one", "two"});
    // The one that was attached last stands first.
    CHECK(close(
        model->forward(ids),
        run_plain(
            model,
            at::cat(
                {prompt_of(two).unsqueeze(0).expand({2, -1, -1}),
                 prompt_of(one).unsqueeze(0).expand({2, -1, -1}),
                 model->embed(ids)},
                1),
            {})));
  }
  auto copy = peft::clone(model);
  CHECK(equal_bits(copy->forward(ids), all));
  randomise(peft::get_adapter(*copy, "two"));
  CHECK_FALSE(close(copy->forward(ids), all));
  CHECK(equal_bits(model->forward(ids), all));
  lora.merge();
  CHECK(close(model->forward(ids), all));
  lora.unmerge();
  for (auto& adapter : {one, two, prefix, lora}) {
    auto handle = adapter;
    handle.detach();
  }
  CHECK(equal_bits(model->forward(ids), before));
}

TEST_CASE("a prompt of an encoder-decoder has rows for each stack") {
  auto model = t5();
  const Tensor ids = torch::randint(1, 20, {2, 5}, torch::kLong);
  const Tensor answer = torch::randint(1, 20, {2, 3}, torch::kLong);
  const Tensor before = model->forward(ids, {}, answer);
  const auto run = [&](const PromptOptions& options) {
    seed(11);
    auto adapter = peft::attach(*model, options);
    const Tensor result = model->forward(ids, {}, answer);
    const auto rows = prompt_of(adapter).size(0);
    auto copy = peft::clone(model);
    CHECK(equal_bits(copy->forward(ids, {}, answer), result));
    randomise(adapter); // the clone has a table of its own
    CHECK(equal_bits(copy->forward(ids, {}, answer), result));
    adapter.detach();
    return std::make_pair(rows, result);
  };
  const auto both = run(PromptOptions(4));
  CHECK(both.first == 8);
  CHECK(both.second.size(1) == 7);
  const auto encoder = run(PromptOptions(4).num_transformer_submodules(1));
  CHECK(encoder.first == 4);
  CHECK(encoder.second.size(1) == 3);
  CHECK_FALSE(close(encoder.second, before));
  // As HF PEFT: rows for both, of which the encoder's act. Same seed, and the
  // first rows are drawn first.
  const auto unused = run(PromptOptions(4).prompts_decoder(false));
  CHECK(unused.first == 8);
  CHECK(unused.second.size(1) == 3);

  // Both act: the decoder's rows get a gradient, and only where they act.
  for (const bool prompts : {true, false}) {
    auto adapter =
        peft::attach(*model, PromptOptions(4).prompts_decoder(prompts));
    model->forward(ids, {}, answer).pow(2).sum().backward();
    const Tensor grad = adapter.parameters()[0].grad();
    CHECK(grad.slice(0, 0, 4).ne(0).any().item<bool>());
    CHECK(grad.slice(0, 4).ne(0).any().item<bool>() == prompts);
    adapter.detach();
  }
  // P-tuning's encoder serves both stacks.
  auto adapter = peft::attach(
      *model, PTuningOptions(4).encoder_reparameterization_type("LSTM"));
  CHECK(prompt_of(adapter).size(0) == 8);
  const Tensor made = model->forward(ids, {}, answer);
  CHECK(made.size(1) == 7);
  peft::eject_reparameterization(adapter);
  CHECK(close(model->forward(ids, {}, answer), made));
  CHECK(adapter.num_parameters() == 64);
}

TEST_CASE("parameters of prompts, from shapes") {
  const auto stack = [](int64_t d,
                        int64_t layers,
                        int64_t heads,
                        int64_t head_dim,
                        const char* name) {
    return peft::ExtraTokensOptions(d, layers, heads, head_dim).stack(name);
  };
  struct Row {
    std::string name;
    std::vector<peft::ExtraTokensOptions> stacks;
    int64_t prompt; // 20 rows
    int64_t mlp; // 20 rows and the MLP
  };
  const auto mlp = [](int64_t d, int64_t rows) {
    return rows * d + 3 * (d * d + d);
  };
  const std::vector<Row> rows{
      {"BERT-base", {stack(768, 12, 12, 64, "encoder")}, 15360, mlp(768, 20)},
      {"BERT-large",
       {stack(1024, 24, 16, 64, "encoder")},
       20480,
       mlp(1024, 20)},
      {"T5-base",
       {stack(768, 12, 12, 64, "encoder"),
        stack(768, 12, 12, 64, "decoder"),
        stack(768, 12, 12, 64, "cross")},
       30720,
       mlp(768, 40)},
      {"T5-large",
       {stack(1024, 24, 16, 64, "encoder"), stack(1024, 24, 16, 64, "decoder")},
       40960,
       mlp(1024, 40)},
      {"LLaMA-7B",
       {stack(4096, 32, 32, 128, "decoder")},
       81920,
       mlp(4096, 20)}};
  for (const auto& row : rows) {
    INFO(row.name);
    own::Sites network(row.stacks);
    auto prompt = peft::attach(*network, PromptOptions(20), "prompt");
    CHECK(prompt.num_parameters() == row.prompt);
    if (row.name != "LLaMA-7B") { // 200 MB for nothing
      auto made = peft::attach(*network, PTuningOptions(20), "made");
      CHECK(made.num_parameters() == row.mlp);
    }
  }
  CHECK(mlp(768, 20) == 1787136);
}

TEST_CASE("prompt tuning says what does not fit") {
  auto model = decoder();
  torch::nn::Sequential bare(torch::nn::Linear(3, 3));
  own::Sites cross(
      own::Stacks{peft::ExtraTokensOptions(8, 2, 2, 4).stack("cross")});
  own::Sites nameless(own::Stacks{peft::ExtraTokensOptions(8, 2, 2, 4)});
  own::Sites wrong(
      own::Stacks{peft::ExtraTokensOptions(8, 2, 2, 4).word_embeddings("w")});
  own::Sites uneven(own::Stacks{
      peft::ExtraTokensOptions(8, 2, 2, 4),
      peft::ExtraTokensOptions(6, 2, 2, 3).stack("decoder")});
  struct Row {
    std::string name;
    std::shared_ptr<torch::nn::Module> model;
    PromptOptions options;
    std::vector<std::string> parts;
  };
  const PromptOptions good(3);
  const std::vector<Row> rows{
      {"no place",
       bare.ptr(),
       good,
       {"register_module(\"extra_tokens\"",
        "extra_tokens->forward({embeds, attention_mask})"}},
      {"keys and values only",
       cross.ptr(),
       good,
       {"trains embeddings", "'cross' at 'cross'", "PrefixOptions"}},
      {"a vocabulary that is not named",
       nameless.ptr(),
       PromptOptions(3).init("vocab"),
       {"does not say where that is", "word_embeddings"}},
      {"a vocabulary that there is not",
       wrong.ptr(),
       PromptOptions(3).init("vocab"),
       {"says that the token embedding is 'w'"}},
      {"two widths", uneven.ptr(), good, {"different widths", "8", "6"}},
      {"no tokens",
       model.ptr(),
       PromptOptions(0),
       {"num_virtual_tokens must be positive, got 0"}},
      {"too many tokens",
       model.ptr(),
       PromptOptions(own::kPositions),
       {"24 virtual tokens leave no room", "24 positions"}},
      {"too many stacks",
       model.ptr(),
       PromptOptions(3).num_transformer_submodules(2),
       {"num_transformer_submodules is 2", "1 stack", "'decoder'"}},
      {"an unknown start",
       model.ptr(),
       PromptOptions(3).init("words"),
       {"init must be", "'words'"}},
      {"a text without tokens",
       model.ptr(),
       PromptOptions(3).init("text"),
       {"go together", "0 token ids"}},
      {"tokens without a text",
       model.ptr(),
       PromptOptions(3).init("vocab").init_token_ids({1}),
       {"go together", "'vocab'"}},
      {"a token that there is not",
       model.ptr(),
       PromptOptions(3).init_token_ids({1, own::kVocabulary}),
       {"token id 20", "vocabulary of 20"}},
      {"a class without a token",
       model.ptr(),
       PromptOptions(3).class_token_ids({{1}, {}}),
       {"class 1"}},
      {"too many classes",
       model.ptr(),
       PromptOptions(1).class_token_ids({{1}, {2}}),
       {"2 classes are more than the prompt's 1 rows"}},
      {"a population for nothing",
       model.ptr(),
       PromptOptions(3).population_size(5),
       {"population_size is for init('vocab')"}},
      {"too large a population",
       model.ptr(),
       PromptOptions(3).init("vocab").population_size(21),
       {"population_size 21"}},
      {"a head that there is not",
       model.ptr(),
       PromptOptions(3).modules_to_save({"classifier"}),
       {"modules_to_save entry 'classifier'"}}};
  for (const auto& row : rows) {
    INFO(row.name);
    const auto before = state_of(*row.model);
    const auto error = error_of([&] { peft::attach(*row.model, row.options); });
    INFO(error);
    for (const auto& part : row.parts) {
      CHECK(contains(error, part));
    }
    CHECK_FALSE(error.empty());
    CHECK(same_state(state_of(*row.model), before));
  }
  const auto p_tuning = [&](const PTuningOptions& options) {
    return error_of([&] { peft::attach(*model, options); });
  };
  CHECK(contains(
      p_tuning(PTuningOptions(3).encoder_reparameterization_type("GRU")),
      "'MLP' or 'LSTM', got 'GRU'"));
  CHECK(contains(
      p_tuning(PTuningOptions(3).encoder_hidden_size(0)), "must be positive"));
  CHECK(contains(
      p_tuning(PTuningOptions(3).encoder_dropout(1)), "encoder_dropout"));
  CHECK(contains(p_tuning(PTuningOptions(-1)), "must be positive, got -1"));
  CHECK(contains(
      error_of([&] { peft::attach(*bare, PTuningOptions(3)); }),
      "P-tuning puts tokens in front"));

  // What fits at attach can be too long in a call.
  peft::attach(*model, PromptOptions(20));
  model->forward(own::ids(1, 4));
  CHECK(contains(
      error_of([&] { model->forward(own::ids(1, 5)); }),
      "25 tokens, the adapter's included, are more than the 24 positions"));
}

TEST_CASE("a prompt with a trained head") {
  auto model = decoder();
  auto adapter =
      peft::attach(*model, PromptOptions(2).modules_to_save({"head"}));
  CHECK(
      adapter.num_parameters() ==
      2 * own::kHidden + own::kHidden * own::kVocabulary + own::kVocabulary);
  const auto names = adapter.named_parameters().keys();
  CHECK(
      names ==
      std::vector<std::string>{
          "prompt_embeddings", "head.weight", "head.bias"});
}

} // namespace test_prompt
