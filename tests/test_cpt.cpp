/// CPT: where its tokens may move, what its loss counts, and that training goes
/// as PEFT's does without a forward that writes.

#include "gradcheck.h"
#include "model_state.h"
#include "own_decoder.h"
#include "test.h"

#include <peft/io/optimizer_state.h>
#include <peft/io/pretrained.h>
#include <peft/methods/cpt.h>
#include <peft/models/bert.h>

#include <cmath>
#include <string>
#include <thread>
#include <vector>

namespace test_cpt {

namespace {

using peft::CptOptions;
using torch::Tensor;

own::Decoder decoder(torch::ScalarType dtype = torch::kDouble) {
  seed(1);
  own::Decoder model;
  model->to(dtype);
  model->eval();
  return model;
}

/// One example of a template, two words, the answer's template, the answer.
CptOptions example() {
  return CptOptions({5, 9, 7, 11, 6})
      .cpt_tokens_type_mask({1, 2, 2, 3, 4})
      .opt_projection_epsilon(3)
      .opt_projection_format_epsilon(2);
}

peft::detail::CptDelta& delta_of(const peft::Adapter& adapter) {
  return dynamic_cast<peft::detail::CptDelta&>(
      *adapter.shared_state()->sites.front().delta);
}

Tensor prompt_of(const peft::Adapter& adapter) {
  return delta_of(adapter).table().detach().clone();
}

/// ε of each token of example().
Tensor bounds() {
  const double width = std::sqrt(own::kHidden / 2048.0);
  return torch::tensor(
             {2 * width, 3 * width, 3 * width, 2 * width, 0.0}, torch::kDouble)
      .unsqueeze(1);
}

/// Collects what is warned of while it lives.
struct Warnings : c10::WarningHandler {
  void process(const c10::Warning& warning) override {
    text += warning.msg();
  }
  std::string text;
  c10::WarningUtils::WarningHandlerGuard guard{this};
};

} // namespace

TEST_CASE("a CPT prompt starts as its examples and moves within its bounds") {
  auto model = decoder();
  const Tensor ids = own::ids(2, 4);
  const Tensor before = model->forward(ids);
  const auto plain = state_of(*model);
  auto adapter = peft::attach(*model, example());
  CHECK(adapter.method() == "CPT");
  CHECK(adapter.num_parameters() == 5 * own::kHidden);
  CHECK(
      adapter.named_parameters().keys() ==
      std::vector<std::string>{"delta_embedding.weight"});
  const Tensor words = model->embed->weight.detach().index_select(
      0, torch::tensor({5, 9, 7, 11, 6}));
  CHECK(equal_bits(prompt_of(adapter), words));
  // The network read the examples, and then the input.
  const Tensor text =
      torch::tensor({{5, 9, 7, 11, 6}, {5, 9, 7, 11, 6}}, torch::kLong);
  const Tensor with = model->forward(ids);
  CHECK(contains(
      error_of([&] { adapter.merge(); }),
      "cannot be merged at 'extra_tokens'"));
  adapter.disable();
  CHECK(close(with, model->forward(at::cat({text, ids}, 1))));
  adapter.enable();

  // Near the start nothing is scaled; far from it the norm is ε.
  auto& delta = delta_of(adapter);
  seed(4);
  const Tensor direction = torch::randn_like(words);
  for (const double size : {1e-3, 10.0}) {
    torch::NoGradGuard no_grad;
    delta.delta_embedding.copy_(size * direction);
    const Tensor norm = direction.norm(2, 1, true) * size;
    const Tensor expected =
        size * direction * at::minimum(torch::ones_like(norm), bounds() / norm);
    CHECK(close(prompt_of(adapter), words + expected, 1e-7, 1e-9));
    const Tensor whole = model->forward(ids);
    // Writing it over δ changes nothing more, once or twice.
    CHECK(equal_bits(delta.delta_embedding, size * direction)); // untouched
    peft::project_cpt(adapter);
    CHECK(close(delta.delta_embedding, expected, 1e-7, 1e-9));
    CHECK(close(model->forward(ids), whole));
    const Tensor once = delta.delta_embedding.clone();
    peft::project_cpt(adapter);
    CHECK(close(delta.delta_embedding, once));
  }
  adapter.set_scale(0.5);
  CHECK(close(delta.embeddings(0.5), 0.5 * prompt_of(adapter)));
  adapter.detach();
  CHECK(equal_bits(model->forward(ids), before));
  CHECK(same_state(state_of(*model), plain));
}

TEST_CASE("a token of CPT has the prompt's gradient; answers have none") {
  auto model = decoder();
  auto adapter = peft::attach(*model, example());
  auto& delta = delta_of(adapter);
  const Tensor ids = own::ids(2, 4);
  for (const double size : {0.01, 10.0}) { // within the bounds, and beyond
    {
      torch::NoGradGuard no_grad;
      seed(5);
      delta.delta_embedding.copy_(size * torch::randn({5, own::kHidden}));
    }
    delta.delta_embedding.mutable_grad() = Tensor();
    model->forward(ids).square().sum().backward();
    const Tensor grad = delta.delta_embedding.grad().clone();
    CHECK(grad[4].eq(0).all().item<bool>());

    // As a prompt of the same rows has it.
    const Tensor rows = prompt_of(adapter);
    auto prompt = peft::attach(*model, peft::PromptOptions(5), "prompt");
    {
      torch::NoGradGuard no_grad;
      prompt.parameters()[0].copy_(rows);
    }
    const peft::ActiveAdapters scope({"prompt"});
    model->forward(ids).square().sum().backward();
    const Tensor expected = prompt.parameters()[0].grad();
    CHECK(close(grad.slice(0, 0, 4), expected.slice(0, 0, 4)));
    prompt.detach();
  }
}

TEST_CASE("CPT's loss is the mean over the answers, weighed by their age") {
  seed(7);
  const auto options = CptOptions({5, 9, 6, 8, 7, 3})
                           .cpt_tokens_type_mask({2, 4, 4, 6, 8, 0})
                           .opt_weighted_loss_type("decay")
                           .opt_loss_decay_factor(0.5);
  const Tensor logits =
      torch::randn({2, 9, 10}, torch::kDouble).set_requires_grad(true);
  const Tensor labels = torch::tensor({{1, 2, 3}, {4, -100, 5}}, torch::kLong);
  const Tensor types = torch::tensor({{2, 4, 4}, {4, 4, 0}}, torch::kLong);
  const Tensor log_p = logits.log_softmax(2);
  const auto cost = [&](int64_t row, int64_t place, int64_t word) {
    return -log_p[row][place - 1][word];
  };
  // The first row's answers: places 1 and 2 (type 4), 4 (8), 7 and 8 (12).
  // The second's: the same of the prompt, then 6 (12); 7 has no label.
  const Tensor sum =
      0.25 * (cost(0, 1, 9) + cost(0, 2, 6) + cost(1, 1, 9) + cost(1, 2, 6)) +
      0.5 * (cost(0, 4, 7) + cost(1, 4, 7)) + cost(0, 7, 2) + cost(0, 8, 3) +
      cost(1, 6, 4);
  const Tensor loss = peft::cpt_loss(options, logits, labels, types);
  CHECK(close(loss, sum / 9));
  const auto gradient = [&](const Tensor& of) {
    return torch::autograd::grad({of}, {logits}, {}, true)[0];
  };
  CHECK(close(gradient(loss), gradient(sum / 9)));

  // Without weights, and where every token of the input is an answer.
  const auto none = CptOptions(options).opt_weighted_loss_type("none");
  Tensor all;
  for (int64_t row = 0; row < 2; ++row) {
    for (const auto& [place, word] :
         std::vector<std::pair<int64_t, int64_t>>{{1, 9}, {2, 6}, {4, 7}}) {
      const Tensor c = cost(row, place, word);
      all = all.defined() ? all + c : c;
    }
  }
  all = all + cost(0, 6, 1) + cost(0, 7, 2) + cost(0, 8, 3) + cost(1, 6, 4) +
      cost(1, 8, 5);
  CHECK(close(peft::cpt_loss(none, logits, labels), all / 11));
  // The mask is not written to (PEFT counts it on in place).
  CHECK(equal_bits(types, torch::tensor({{2, 4, 4}, {4, 4, 0}})));
}

TEST_CASE("CPT trains with any optimizer and stays within its bounds") {
  auto model = decoder(torch::kFloat);
  auto adapter = peft::attach(*model, example());
  const Tensor start = prompt_of(adapter);
  const Tensor ids = own::ids(3, 5);
  torch::optim::AdamW optimizer(
      model->parameters(), torch::optim::AdamWOptions(0.1).weight_decay(0.1));
  double first = 0, last = 0;
  for (int step = 0; step < 4; ++step) {
    optimizer.zero_grad();
    const Tensor loss = peft::cpt_loss(adapter, model->forward(ids), ids);
    (step == 0 ? first : last) = loss.item<double>();
    loss.backward();
    optimizer.step();
    peft::project_cpt(adapter);
  }
  CHECK(last < first);
  const Tensor moved = (prompt_of(adapter) - start).norm(2, 1, true);
  CHECK(moved.le(bounds().to(torch::kFloat) * (1 + 1e-5)).all().item<bool>());
  CHECK(moved.slice(0, 0, 4).gt(0).all().item<bool>());
  CHECK(moved[4].item<float>() == 0);
}

TEST_CASE("CPT goes on from its files to the bit") {
  const Tensor ids = own::ids(2, 5);
  const auto step = [&](own::Decoder& model, torch::optim::Optimizer& o) {
    o.zero_grad();
    const auto adapter = peft::get_adapter(*model);
    peft::cpt_loss(adapter, model->forward(ids), ids).backward();
    o.step();
    peft::project_cpt(adapter);
  };
  const bool unprojected = GENERATE(false, true);
  auto model = decoder(torch::kFloat);
  auto adapter = peft::attach(*model, example());
  torch::optim::AdamW optimizer(adapter.parameters(), 0.1);
  step(model, optimizer);
  if (unprojected) { // a file has both
    randomise(adapter);
  }
  const TemporaryDirectory directory;
  const auto folder = directory / "adapter";
  peft::save(adapter, folder);
  peft::save_optimizer(optimizer, adapter, folder);
  const auto file =
      peft::load_safetensors(folder + "/adapter_model.safetensors");
  REQUIRE(file.size() == 1);
  CHECK(equal_bits(file.at("prompt_embeddings"), prompt_of(adapter)));

  auto again = decoder(torch::kFloat);
  auto loaded = peft::load(*again, folder);
  CHECK(equal_bits(again->forward(ids), model->forward(ids)));
  torch::optim::AdamW other(loaded.parameters(), 0.1);
  peft::load_optimizer(other, loaded, folder);
  step(model, optimizer);
  step(again, other);
  CHECK(equal_bits(
      delta_of(loaded).delta_embedding, delta_of(adapter).delta_embedding));
  CHECK(equal_bits(again->forward(ids), model->forward(ids)));

  // As PEFT leaves it: the same prompt, which may move from where it is, and a
  // word about that where it is to train.
  std::filesystem::remove(folder + "/libpeft_training.safetensors");
  for (const bool trains : {true, false}) {
    auto third = decoder(torch::kFloat);
    const Warnings warned;
    auto bare = peft::load(
        *third, folder, "default", peft::LoadOptions().is_trainable(trains));
    CHECK(contains(warned.text, "where its tokens started") == trains);
    CHECK(equal_bits(prompt_of(bare), file.at("prompt_embeddings")));
    CHECK(delta_of(bare).delta_embedding.eq(0).all().item<bool>());
  }
}

TEST_CASE("threads run one CPT prompt at once, far beyond its bounds") {
  auto model = decoder();
  auto adapter = peft::attach(*model, example());
  randomise(adapter);
  const Tensor raw = delta_of(adapter).delta_embedding.detach().clone();
  const Tensor ids = own::ids(2, 4);
  const Tensor expected = model->forward(ids).detach();
  std::vector<Tensor> results(4);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < results.size(); ++i) {
    threads.emplace_back([&, i] {
      for (int repeat = 0; repeat < 10; ++repeat) {
        results[i] = model->forward(ids).detach();
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  for (const auto& result : results) {
    CHECK(equal_bits(result, expected));
  }
  CHECK(equal_bits(delta_of(adapter).delta_embedding, raw));
}

TEST_CASE("CPT says what does not fit") {
  auto model = decoder();
  const auto before = state_of(*model);
  const auto error = [&](const CptOptions& options) {
    return error_of([&] { peft::attach(*model, options); });
  };
  CHECK(contains(error(CptOptions({})), "cpt_token_ids is empty"));
  CHECK(contains(
      error(CptOptions({1, 2}).cpt_tokens_type_mask({1})),
      "1 types for 2 cpt_token_ids"));
  CHECK(contains(
      error(CptOptions({1}).cpt_tokens_type_mask({-1})), "not be negative"));
  CHECK(contains(
      error(CptOptions({own::kVocabulary})), "not in the vocabulary of 20"));
  CHECK(contains(
      error(CptOptions({1}).opt_weighted_loss_type("linear")),
      "'none' or 'decay', got 'linear'"));
  CHECK(contains(
      error(CptOptions({1}).opt_projection_epsilon(-0.1)), "got -0.1"));
  CHECK(contains(
      error(CptOptions({1}).opt_loss_decay_factor(INFINITY)), "got inf"));
  CHECK(contains(
      error(CptOptions({1}).task_type("SEQ_CLS")), "is for 'SEQ_CLS'"));
  CHECK(same_state(state_of(*model), before));
  peft::models::BertModel bert(peft::models::BertOptions()
                                   .vocab_size(20)
                                   .hidden_size(8)
                                   .num_hidden_layers(1)
                                   .num_attention_heads(2)
                                   .intermediate_size(8)
                                   .max_position_embeddings(16));
  CHECK(contains(
      error_of([&] { peft::attach(*bert, CptOptions({1})); }),
      "causal language model"));

  const Tensor labels = torch::ones({2, 3}, torch::kLong);
  const auto loss = [&](const CptOptions& options,
                        const Tensor& logits,
                        const Tensor& types = {}) {
    return error_of([&] { peft::cpt_loss(options, logits, labels, types); });
  };
  CHECK(contains(
      loss(CptOptions({1}), torch::randn({2, 3, 5})),
      "logits [batch, 1 + length, vocabulary], got [2, 3] and [2, 3, 5]"));
  CHECK(contains(
      loss(
          CptOptions({1}),
          torch::randn({2, 4, 5}),
          torch::ones({2, 4}, torch::kLong)),
      "one type for each label"));
  CHECK(contains(
      loss(CptOptions({1}), torch::randn({2, 4, 5})), "no multiple of 4"));
  auto prompt = peft::attach(*model, peft::PromptOptions(2));
  CHECK(
      contains(error_of([&] { peft::project_cpt(prompt); }), "PROMPT_TUNING"));
  CHECK(contains(
      error_of([&] { peft::cpt_loss(prompt, labels, labels); }),
      "PROMPT_TUNING"));
}

} // namespace test_cpt
