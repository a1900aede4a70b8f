/// Multitask prompt tuning: what each task's prompt is, which rows get which,
/// how it starts, and that threads do not see each other's tasks.

#include "gradcheck.h"
#include "model_state.h"
#include "own_decoder.h"
#include "test.h"

#include <peft/io/optimizer_state.h>
#include <peft/io/pretrained.h>
#include <peft/methods/multitask_prompt.h>
#include <peft/models/t5.h>

#include <string>
#include <thread>
#include <vector>

namespace test_multitask_prompt {

namespace {

using peft::BatchTasks;
using peft::KeyValues;
using peft::MultitaskPromptOptions;
using torch::Tensor;

own::Decoder decoder(torch::ScalarType dtype = torch::kDouble) {
  seed(1);
  own::Decoder model;
  model->to(dtype);
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
  model->to(torch::kDouble);
  model->eval();
  return model;
}

/// P ∘ (u_t v_t), [tokens * stacks, hidden].
Tensor prompt_of_task(const peft::Adapter& adapter, int64_t task) {
  const auto p = adapter.named_parameters();
  return (p["prompt_embeddings"] *
          at::mm(p["prefix_task_cols"][task], p["prefix_task_rows"][task]))
      .detach();
}

/// What `run` makes of a plain prompt with these rows.
template <class Run>
Tensor under_prompt(
    torch::nn::Module& model,
    int64_t tokens,
    const Tensor& rows,
    Run&& run) {
  auto plain = peft::attach(model, peft::PromptOptions(tokens), "plain");
  {
    torch::NoGradGuard no_grad;
    plain.parameters()[0].copy_(rows);
  }
  const peft::ActiveAdapters scope({"plain"});
  const Tensor result = run();
  plain.detach();
  return result;
}

} // namespace

TEST_CASE("every row of a batch has the prompt of its task") {
  auto model = decoder();
  const Tensor ids = own::ids(3, 5);
  const Tensor before = model->forward(ids);
  const auto plain = state_of(*model);
  auto adapter =
      peft::attach(*model, MultitaskPromptOptions(4, 3).num_ranks(2));
  randomise(adapter);
  CHECK(adapter.method() == "MULTITASK_PROMPT_TUNING");
  CHECK(
      adapter.num_parameters() ==
      4 * own::kHidden + 3 * (4 * 2 + 2 * own::kHidden));
  CHECK(
      adapter.named_parameters().keys() ==
      std::vector<std::string>{
          "prefix_task_cols", "prefix_task_rows", "prompt_embeddings"});

  const Tensor mask = torch::tensor(
      {{1, 1, 1, 1, 1}, {1, 1, 1, 0, 0}, {1, 1, 1, 1, 0}}, torch::kLong);
  const std::vector<int64_t> tasks{2, 0, 2};
  std::vector<Tensor> alone;
  for (int64_t row = 0; row < 3; ++row) {
    alone.push_back(under_prompt(
        *model, 4, prompt_of_task(adapter, tasks[size_t(row)]), [&] {
          return model->forward(ids.narrow(0, row, 1), mask.narrow(0, row, 1));
        }));
  }
  const Tensor expected = at::cat(alone);
  {
    const BatchTasks scope(tasks);
    CHECK(close(model->forward(ids, mask), expected));
    {
      const BatchTasks inner(1); // all rows
      const Tensor ones = model->forward(ids);
      CHECK_FALSE(close(ones, expected));
      const BatchTasks each({1, 1, 1});
      CHECK(close(model->forward(ids), ones));
    }
    CHECK(close(model->forward(ids, mask), expected));
    CHECK(equal_bits(
        peft::clone(model)->forward(ids, mask), model->forward(ids, mask)));
  }
  {
    const BatchTasks scope(torch::tensor({2, 0, 2}, torch::kInt));
    CHECK(close(model->forward(ids, mask), expected));
    adapter.set_scale(0.5);
    const Tensor halved =
        under_prompt(*model, 4, 0.5 * prompt_of_task(adapter, 0), [&] {
          return model->forward(ids.narrow(0, 1, 1), mask.narrow(0, 1, 1));
        });
    CHECK(close(model->forward(ids, mask).narrow(0, 1, 1), halved));
    adapter.set_scale(1);
    adapter.disable();
    CHECK(equal_bits(model->forward(ids), before));
    adapter.enable();
  }
  CHECK(contains(
      error_of([&] { adapter.merge(); }),
      "cannot be merged at 'extra_tokens'"));
  adapter.detach();
  CHECK(same_state(state_of(*model), plain));
}

TEST_CASE("tasks with their prompts generate from a cache") {
  auto model = decoder();
  randomise(peft::attach(*model, MultitaskPromptOptions(3, 2)));
  torch::NoGradGuard no_grad;
  const BatchTasks scope({1, 0});
  const Tensor ids = own::ids(2, 6);
  const Tensor whole = model->forward(ids);
  KeyValues cache;
  std::vector<Tensor> steps{model->forward(ids.slice(1, 0, 3), {}, {}, &cache)};
  for (int64_t t = 3; t < 6; ++t) {
    steps.push_back(model->forward(ids.slice(1, t, t + 1), {}, {}, &cache));
  }
  CHECK(close(at::cat(steps, 1), whole));
}

TEST_CASE("both stacks of an encoder-decoder get their part of a task's rows") {
  auto model = t5();
  const Tensor ids = torch::randint(1, 20, {2, 5}, torch::kLong);
  const Tensor answer = torch::randint(1, 20, {2, 3}, torch::kLong);
  auto adapter = peft::attach(*model, MultitaskPromptOptions(4, 2));
  randomise(adapter);
  CHECK(adapter.num_parameters() == 8 * 8 + 2 * (8 + 8));
  const BatchTasks scope({1, 0});
  const Tensor with = model->forward(ids, {}, answer);
  CHECK(with.size(1) == 7);
  for (int64_t row = 0; row < 2; ++row) {
    const Tensor alone =
        under_prompt(*model, 4, prompt_of_task(adapter, 1 - row), [&] {
          return model->forward(
              ids.narrow(0, row, 1), {}, answer.narrow(0, row, 1));
        });
    CHECK(close(with.narrow(0, row, 1), alone));
  }
  auto copy = peft::clone(model);
  randomise(adapter, 9); // the clone has tables of its own
  CHECK(equal_bits(copy->forward(ids, {}, answer), with));
  adapter.detach();

  auto first = peft::attach(
      *model, MultitaskPromptOptions(4, 2).num_transformer_submodules(1));
  CHECK(first.num_parameters() == 4 * 8 + 2 * (4 + 8));
  CHECK(model->forward(ids, {}, answer).size(1) == 3);
}

TEST_CASE("how a multitask prompt starts") {
  auto model = decoder();
  const auto started = [&](const MultitaskPromptOptions& options) {
    seed(5);
    auto adapter = peft::attach(*model, options);
    MultitaskPromptOptions::Tensors result;
    for (const auto& item : adapter.named_parameters()) {
      result.emplace(item.key(), item.value().detach().clone());
    }
    adapter.detach();
    return result;
  };
  const auto options = MultitaskPromptOptions(4, 3).num_ranks(2);
  auto many = started(options);
  // PyTorch's draws: the prompt's, then the columns' and the rows'.
  seed(5);
  const auto same = [](const Tensor& a, const Tensor& b) {
    return equal_bits(a, b.to(torch::kDouble));
  };
  CHECK(same(many.at("prompt_embeddings"), torch::randn({4, own::kHidden})));
  CHECK(same(many.at("prefix_task_cols"), at::normal(0.0, 0.02, {3, 4, 2})));
  CHECK(same(
      many.at("prefix_task_rows"),
      at::normal(0.0, 0.02, {3, 2, own::kHidden})));
  const Tensor words = model->embed->weight.detach();
  CHECK(equal_bits(
      started(MultitaskPromptOptions(4, 3).init_token_ids({7, 2}))
          .at("prompt_embeddings"),
      words.index_select(0, torch::tensor({7, 2, 7, 2}))));

  const auto one = MultitaskPromptOptions(4).num_ranks(2).source(many);
  auto average =
      started(MultitaskPromptOptions(one).init("average_source_tasks"));
  CHECK(equal_bits(
      average.at("prompt_embeddings"), many.at("prompt_embeddings")));
  for (const std::string name : {"prefix_task_cols", "prefix_task_rows"}) {
    CHECK(close(average.at(name)[0], many.at(name).mean(0)));
  }
  auto exact = started(
      MultitaskPromptOptions(one).init("exact_source_task").init_task(2));
  for (const std::string name : {"prefix_task_cols", "prefix_task_rows"}) {
    CHECK(equal_bits(exact.at(name)[0], many.at(name)[2]));
  }
  auto shared = started(MultitaskPromptOptions(4, 5)
                            .num_ranks(3)
                            .init("only_source_shared")
                            .source(many));
  CHECK(
      equal_bits(shared.at("prompt_embeddings"), many.at("prompt_embeddings")));
  CHECK(shared.at("prefix_task_cols").size(0) == 5);
  CHECK(shared.at("prefix_task_cols").abs().max().item<double>() < 0.2);
  CHECK(shared.at("prefix_task_cols").ne(0).all().item<bool>());

  // From the file of another network's prompt, as it stands there.
  const TemporaryDirectory directory;
  auto saved = peft::attach(*model, options);
  randomise(saved);
  peft::save(saved, directory / "many");
  const Tensor cols = saved.named_parameters()["prefix_task_cols"].detach();
  saved.detach();
  const auto from_file =
      started(MultitaskPromptOptions(4)
                  .num_ranks(2)
                  .init("exact_source_task")
                  .init_task(1)
                  .source(peft::load_safetensors(
                      directory / "many/adapter_model.safetensors")));
  CHECK(close(from_file.at("prefix_task_cols")[0], cols[1], 1e-6, 1e-7));
}

TEST_CASE("gradients of multitask prompts agree with finite differences") {
  auto model = decoder();
  const Tensor ids = own::ids(3, 3);
  auto adapter =
      peft::attach(*model, MultitaskPromptOptions(2, 3).num_ranks(2));
  randomise(adapter);
  const BatchTasks scope({2, 0, 2});
  seed(6);
  const Tensor direction =
      torch::randn({3, 5, own::kVocabulary}, torch::kDouble);
  CHECK(gradcheck::first_order(
      [&](const gradcheck::Tensors&) { return model->forward(ids); },
      adapter.parameters(),
      direction));
  // What is of no row's task gets none.
  model->forward(ids).sum().backward();
  for (const std::string name : {"prefix_task_cols", "prefix_task_rows"}) {
    const Tensor grad = adapter.named_parameters()[name].grad();
    CHECK(grad[1].eq(0).all().item<bool>());
    CHECK(grad[2].ne(0).all().item<bool>());
  }
}

TEST_CASE("a multitask prompt goes on from its files to the bit") {
  const Tensor ids = own::ids(2, 5);
  const auto step = [&](own::Decoder& model, torch::optim::Optimizer& o) {
    const BatchTasks scope({1, 2});
    o.zero_grad();
    model->forward(ids).square().mean().backward();
    o.step();
  };
  auto model = decoder(torch::kFloat);
  auto adapter =
      peft::attach(*model, MultitaskPromptOptions(4, 3).num_ranks(2));
  randomise(adapter);
  torch::optim::AdamW optimizer(adapter.parameters(), 0.05);
  step(model, optimizer);
  const TemporaryDirectory directory;
  const auto folder = directory / "adapter";
  peft::save(adapter, folder);
  peft::save_optimizer(optimizer, adapter, folder);
  auto again = decoder(torch::kFloat);
  auto loaded = peft::load(*again, folder);
  torch::optim::AdamW other(loaded.parameters(), 0.05);
  peft::load_optimizer(other, loaded, folder);
  step(model, optimizer);
  step(again, other);
  for (const auto& item : adapter.named_parameters()) {
    INFO(item.key());
    CHECK(equal_bits(loaded.named_parameters()[item.key()], item.value()));
  }
}

TEST_CASE("threads run one prompt with tasks of their own") {
  auto model = decoder();
  randomise(peft::attach(*model, MultitaskPromptOptions(3, 4)));
  const Tensor ids = own::ids(2, 4);
  torch::NoGradGuard no_grad;
  std::vector<Tensor> expected;
  for (int64_t task = 0; task < 4; ++task) {
    const BatchTasks scope({task, 3 - task});
    expected.push_back(model->forward(ids));
  }
  const BatchTasks outer(0); // seen by this thread alone
  std::vector<std::string> failures(4);
  std::vector<std::thread> threads;
  for (int64_t task = 0; task < 4; ++task) {
    threads.emplace_back([&, task] {
      const auto n = static_cast<size_t>(task);
      torch::NoGradGuard none;
      const auto lacking = error_of([&] { model->forward(ids); });
      if (!contains(lacking, "holds 4 tasks")) {
        failures[n] = "saw another thread's task: " + lacking;
      }
      for (int repeat = 0; repeat < 10; ++repeat) {
        const BatchTasks scope({task, 3 - task});
        if (!torch::equal(model->forward(ids), expected[n])) {
          failures[n] = "another result";
        }
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  for (const auto& failure : failures) {
    CHECK(failure == "");
  }
}

TEST_CASE("the tasks of a batch do not hide other scopes") {
  auto model = decoder();
  auto adapter = peft::attach(*model, MultitaskPromptOptions(3, 2));
  randomise(adapter);
  const Tensor ids = own::ids(2, 4);
  const BatchTasks scope({0, 1});
  const Tensor with = model->forward(ids);
  {
    const peft::ActiveAdapters none({});
    CHECK(model->forward(ids).size(1) == 4);
    const BatchTasks again({1, 0});
    CHECK(model->forward(ids).size(1) == 4);
  }
  const peft::AdapterDrop drop(1);
  const peft::PaddingScope padding(torch::ones({2, 4}, torch::kLong));
  const peft::ActiveAdapters own_name({"default"});
  CHECK(equal_bits(model->forward(ids), with));
  CHECK(contains(
      error_of([&] {
        const peft::BatchAdapters mixed({"default", "__base__"});
        model->forward(ids);
      }),
      "peft:"));
}

TEST_CASE("multitask prompt tuning says what does not fit") {
  auto model = decoder();
  const auto before = state_of(*model);
  const auto error = [&](const MultitaskPromptOptions& options) {
    return error_of([&] { peft::attach(*model, options); });
  };
  MultitaskPromptOptions::Tensors source{
      {"prompt_embeddings", torch::ones({4, own::kHidden})},
      {"prefix_task_cols", torch::ones({2, 4, 1})},
      {"prefix_task_rows", torch::ones({2, 1, own::kHidden})}};
  const auto from = [&](const std::string& init, int64_t tokens = 4) {
    return MultitaskPromptOptions(tokens).init(init).source(source);
  };
  CHECK(contains(
      error(MultitaskPromptOptions(4, 0)),
      "num_tasks and num_ranks must be positive, got 0 and 1"));
  CHECK(contains(error(MultitaskPromptOptions(4).num_ranks(0)), "got 1 and 0"));
  CHECK(contains(error(MultitaskPromptOptions(0)), "must be positive, got 0"));
  CHECK(contains(
      error(MultitaskPromptOptions(4).init("classes")), "is of PromptOptions"));
  CHECK(
      contains(error(MultitaskPromptOptions(4).init("words")), "init must be"));
  CHECK(contains(
      error(MultitaskPromptOptions(4).init("average_source_tasks")),
      "source of 0 tensors"));
  CHECK(contains(error(from("random")), "source of 3 tensors"));
  CHECK(contains(
      error(from("exact_source_task").num_tasks(2)),
      "starts one task, and num_tasks is 2"));
  CHECK(contains(
      error(from("exact_source_task").init_task(2)),
      "init_task is 2, and source holds the tasks 0 to 1"));
  CHECK(contains(
      error(from("average_source_tasks", 5)),
      "'prompt_embeddings' of source has shape [4, 12] where [5, 12] fits"));
  CHECK(contains(
      error(from("average_source_tasks").num_ranks(2)),
      "'prefix_task_cols' of source has shape [2, 4, 1]"));
  source.erase("prefix_task_rows");
  CHECK(contains(error(from("average_source_tasks")), "no 'prefix_task_rows'"));
  CHECK(same_state(state_of(*model), before));

  CHECK(contains(
      error_of([] { BatchTasks scope(std::vector<int64_t>{}); }),
      "one task number, or one for each row"));
  CHECK(contains(
      error_of([] {
        BatchTasks scope(torch::ones({2, 2}, torch::kLong));
      }),
      "[2, 2]"));
  CHECK(contains(
      error_of([] { BatchTasks scope(torch::ones({2})); }), "Float [2]"));
  CHECK(
      contains(error_of([] { BatchTasks scope((Tensor())); }), "got nothing"));

  peft::attach(*model, MultitaskPromptOptions(3, 2));
  const Tensor ids = own::ids(3, 4);
  const auto called = [&](const std::vector<int64_t>& tasks) {
    const BatchTasks scope(tasks);
    return error_of([&] { model->forward(ids); });
  };
  CHECK(contains(
      error_of([&] { model->forward(ids); }),
      "holds 2 tasks, and nothing says of which the batch is"));
  CHECK(contains(called({0, 1}), "for 2 rows, and the batch has 3"));
  CHECK(contains(called({0, 1, 2}), "names task 2"));
  CHECK(contains(called({0, -1, 1}), "names task -1"));
  CHECK(called({0, 1, 1}) == "");
  CHECK(called({1}) == "");
}

TEST_CASE("a prompt of one task needs no scope") {
  auto model = decoder();
  auto adapter = peft::attach(*model, MultitaskPromptOptions(3));
  randomise(adapter);
  const Tensor ids = own::ids(2, 4);
  const Tensor with = model->forward(ids);
  const BatchTasks scope(0);
  CHECK(equal_bits(model->forward(ids), with));
}

} // namespace test_multitask_prompt
