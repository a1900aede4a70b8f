#pragma once

// Multitask prompt tuning (Wang et al. 2023, arXiv:2303.02861): one prompt that
// all tasks share, and for each task a matrix of low rank that multiplies it.
//
//   P_t = P ∘ (u_t v_t)     P [virtual tokens, hidden], entry by entry,
//                           u_t [virtual tokens, ranks], v_t [ranks, hidden]
//
// What stands in front of the input of task t is P_t, for which prompt.h holds.
// A batch may mix tasks; a scope says of which each row is:
//
//   auto adapter = peft::attach(*model, peft::MultitaskPromptOptions(20, 3));
//   {
//     peft::BatchTasks scope({0, 2, 1, 1});
//     loss = model->forward(...);
//   }
//
// A prompt learned on many tasks is where the prompt of a new one starts:
//
//   peft::MultitaskPromptOptions(20).init("average_source_tasks").source(
//       peft::load_safetensors("many/adapter_model.safetensors"))

#include <peft/core/attach.h>
#include <peft/core/batch_tasks.h>
#include <peft/core/extra_tokens.h>
#include <peft/methods/modules_to_save.h>
#include <peft/methods/prompt.h>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for multitask prompt tuning, by the names of HF's
/// MultitaskPromptTuningConfig.
struct MultitaskPromptOptions {
  using Tensors = std::map<std::string, Tensor>;

  MultitaskPromptOptions(int64_t num_virtual_tokens, int64_t num_tasks = 1)
      : num_virtual_tokens_(num_virtual_tokens), num_tasks_(num_tasks) {}

  TORCH_ARG(int64_t, num_virtual_tokens);
  TORCH_ARG(int64_t, num_tasks);
  /// Of u_t v_t.
  TORCH_ARG(int64_t, num_ranks) = 1;
  /// Where P starts: "random", "uniform", "vocab", "text" as PromptOptions has
  /// them, u and v then from N(0, 0.02²). Or all three from `source`:
  /// "average_source_tasks" takes the mean of its u and that of its v,
  /// "exact_source_task" those of one task, for an adapter of one task;
  /// "only_source_shared" takes P alone.
  TORCH_ARG(std::string, init) = "random";
  TORCH_ARG(std::vector<int64_t>, init_token_ids);
  /// The tensors of a multitask prompt's file: prompt_embeddings,
  /// prefix_task_cols (u), prefix_task_rows (v). HF's
  /// prompt_tuning_init_state_dict_path.
  TORCH_ARG(Tensors, source);
  /// The task of `source` that "exact_source_task" takes: HF's
  /// prompt_tuning_init_task.
  TORCH_ARG(int64_t, init_task) = 0;
  /// In an encoder-decoder, 1 is a prompt for the encoder, 2 one for each.
  /// Default: one for each stack.
  TORCH_ARG(std::optional<int64_t>, num_transformer_submodules);
  /// Modules trained whole, beside the prompt: a task head that all tasks
  /// share.
  TORCH_ARG(std::vector<std::string>, modules_to_save);
  /// As PromptOptions has it.
  TORCH_ARG(std::string, task_type);
};

namespace detail {

/// A shared prompt and the factors of every task.
class MultitaskPromptDelta final : public PromptTable {
 public:
  /// `rows` [tokens * stacks, hidden], `cols` [tasks, tokens * stacks, ranks],
  /// `task_rows` [tasks, ranks, hidden].
  MultitaskPromptDelta(
      int64_t num_virtual_tokens,
      ExtraTokensOptions stack,
      const Tensor& rows,
      const Tensor& task_cols,
      const Tensor& task_rows)
      : PromptTable(num_virtual_tokens, std::move(stack)) {
    prompt_embeddings = register_parameter("prompt_embeddings", rows);
    prefix_task_cols = register_parameter("prefix_task_cols", task_cols);
    prefix_task_rows = register_parameter("prefix_task_rows", task_rows);
  }

  Tensor table() const override {
    return prompt_embeddings;
  }

  Tensor tokens() const override {
    const Tensor tasks = task_ids();
    const Tensor factors = at::matmul(
        prefix_task_cols.index_select(0, tasks),
        prefix_task_rows.index_select(0, tasks));
    return prompt_embeddings *
        (tasks.size(0) == 1 ? factors.squeeze(0) : factors);
  }

  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    return {
        {"prefix_task_cols", prefix_task_cols},
        {"prefix_task_rows", prefix_task_rows},
        {"prompt_embeddings", prompt_embeddings}};
  }

  std::shared_ptr<Delta> copy() const override {
    const auto like = [](const Tensor& t) {
      return at::empty_like(t.detach());
    };
    auto result = std::make_shared<MultitaskPromptDelta>(
        num_virtual_tokens(),
        stack(),
        like(prompt_embeddings),
        like(prefix_task_cols),
        like(prefix_task_rows));
    copy_parameters(*this, *result);
    result->train(is_training());
    return result;
  }

  std::string describe() const override {
    return "multitask prompt l=" + std::to_string(num_virtual_tokens()) +
        " tasks=" + std::to_string(num_tasks());
  }

  int64_t num_tasks() const {
    return prefix_task_cols.size(0);
  }

  Tensor prompt_embeddings, prefix_task_cols, prefix_task_rows;

 private:
  /// Those of the batch, or the only one there is.
  Tensor task_ids() const {
    const Tensor tasks = batch_tasks();
    const auto device = prompt_embeddings.device();
    if (!tasks.defined()) {
      TORCH_CHECK(
          num_tasks() == 1,
          "peft: this prompt holds ",
          num_tasks(),
          " tasks, and nothing says of which the batch is. Write before the "
          "call\n  peft::BatchTasks scope({0, 2, 1});  // the task of each "
          "row\nor peft::BatchTasks scope(2) for a batch of one task");
      return at::zeros({1}, at::TensorOptions(at::kLong).device(device));
    }
    const auto smallest = tasks.min().item<int64_t>();
    const auto largest = tasks.max().item<int64_t>();
    TORCH_CHECK_INDEX(
        smallest >= 0 && largest < num_tasks(),
        "peft: BatchTasks names task ",
        smallest < 0 ? smallest : largest,
        ", and this prompt holds the tasks 0 to ",
        num_tasks() - 1);
    return tasks.to(device);
  }
};

/// Whether all three parts start from another prompt's file.
inline bool starts_from_source(const MultitaskPromptOptions& options) {
  return options.init() == "average_source_tasks" ||
      options.init() == "exact_source_task" ||
      options.init() == "only_source_shared";
}

/// What the two have in common.
inline PromptOptions as_prompt(const MultitaskPromptOptions& options) {
  return PromptOptions(options.num_virtual_tokens())
      .init(starts_from_source(options) ? "random" : options.init())
      .init_token_ids(options.init_token_ids())
      .num_transformer_submodules(options.num_transformer_submodules())
      .modules_to_save(options.modules_to_save())
      .task_type(options.task_type());
}

inline void check(const MultitaskPromptOptions& options) {
  TORCH_CHECK_VALUE(
      options.num_tasks() > 0 && options.num_ranks() > 0,
      "peft: num_tasks and num_ranks must be positive, got ",
      options.num_tasks(),
      " and ",
      options.num_ranks());
  TORCH_CHECK_VALUE(
      options.init() != "classes",
      "peft: init('classes') is of PromptOptions; a multitask prompt starts "
      "from 'random', 'uniform', 'vocab', 'text', 'average_source_tasks', "
      "'exact_source_task' or 'only_source_shared'");
  TORCH_CHECK_VALUE(
      options.source().empty() != starts_from_source(options),
      "peft: source goes with init('average_source_tasks'), "
      "init('exact_source_task') and init('only_source_shared'), got init('",
      options.init(),
      "') with a source of ",
      options.source().size(),
      " tensors");
  TORCH_CHECK_VALUE(
      options.num_tasks() == 1 || options.init() == "only_source_shared" ||
          !starts_from_source(options),
      "peft: init('",
      options.init(),
      "') starts one task, and num_tasks is ",
      options.num_tasks(),
      "; init('only_source_shared') starts several");
}

/// A tensor of the source, which must end in these sizes.
inline Tensor source_tensor(
    const MultitaskPromptOptions& options,
    const std::string& name,
    at::IntArrayRef sizes) {
  const auto found = options.source().find(name);
  TORCH_CHECK_VALUE(
      found != options.source().end(),
      "peft: source has no '",
      name,
      "'; it wants the tensors of a multitask prompt's adapter_model."
      "safetensors");
  const Tensor& value = found->second;
  const auto n = static_cast<int64_t>(sizes.size());
  TORCH_CHECK_VALUE(
      value.dim() >= n && value.sizes().slice(value.dim() - n) == sizes &&
          value.numel() > 0,
      "peft: '",
      name,
      "' of source has shape ",
      value.sizes(),
      " where ",
      sizes,
      n == 2 ? " fits" : " for each task fits");
  return value;
}

/// Copies what the options take of the source.
inline void start_from_source(
    const MultitaskPromptOptions& options,
    MultitaskPromptDelta& delta) {
  torch::NoGradGuard no_grad;
  const Tensor prompt = source_tensor(
      options, "prompt_embeddings", delta.prompt_embeddings.sizes());
  delta.prompt_embeddings.copy_(prompt);
  if (options.init() == "only_source_shared") {
    return;
  }
  for (auto& [name, own] :
       {std::make_pair("prefix_task_cols", delta.prefix_task_cols),
        std::make_pair("prefix_task_rows", delta.prefix_task_rows)}) {
    const Tensor all = source_tensor(options, name, own.sizes().slice(1));
    TORCH_CHECK_INDEX(
        options.init_task() >= 0 && options.init_task() < all.size(0),
        "peft: init_task is ",
        options.init_task(),
        ", and source holds the tasks 0 to ",
        all.size(0) - 1);
    own.copy_(
        options.init() == "average_source_tasks"
            ? all.mean(0, /*keepdim=*/true)
            : all.narrow(0, options.init_task(), 1));
  }
}

/// `is_empty`: to be filled from a file.
inline Plan plan(
    const MultitaskPromptOptions& options,
    const Network& network,
    bool is_empty = false) {
  check(options);
  const auto prompt = as_prompt(options);
  const auto places = prompt_places(prompt, network, "multitask prompt tuning");
  const auto dtype = trained_options(network);
  const auto factor = [&](int64_t rows, int64_t columns) {
    return at::normal(0.0, 0.02, {options.num_tasks(), rows, columns})
        .to(dtype);
  };
  // One after another: the order of the draws is PyTorch's.
  const Tensor rows = initial_prompt(
      is_empty ? PromptOptions(prompt).init("empty") : prompt, network, places);
  const Tensor cols = factor(places.rows, options.num_ranks());
  auto delta = std::make_shared<MultitaskPromptDelta>(
      options.num_virtual_tokens(),
      places.first(),
      rows,
      cols,
      factor(options.num_ranks(), places.hidden_size));
  if (starts_from_source(options) && !is_empty) {
    start_from_source(options, *delta);
  }
  Plan result;
  result.method = "MULTITASK_PROMPT_TUNING";
  result.options = MultitaskPromptOptions(options)
                       .source(MultitaskPromptOptions::Tensors())
                       .task_type(places.task_type);
  plan_table(delta, places, result.sites);
  for (auto& site : result.sites) { // HF PEFT knows both stacks of this one
    site.file_prefix = "";
  }
  plan_modules_to_save(network, options.modules_to_save(), result.sites);
  return result;
}

} // namespace detail

/// Trains a prompt that the tasks share, and each task's factors of it, in
/// front of `model`'s tokens, and freezes everything else. The network calls
/// peft::ExtraTokens behind its token embedding.
inline Adapter attach(
    torch::nn::Module& model,
    const MultitaskPromptOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
