#pragma once

// Multitask prompts as HF PEFT's MultitaskPromptTuningConfig and files have
// them.
//
//   prompt_embeddings  what the tasks share [tokens * stacks, hidden]
//   prefix_task_cols   [tasks, tokens * stacks, ranks]
//   prefix_task_rows   [tasks, ranks, hidden]
//
// Nothing that training needs is missing from such a file.

#include <peft/io/formats/prompt.h>
#include <peft/methods/multitask_prompt.h>

#include <any>
#include <string>

namespace peft {

namespace detail {

class MultitaskPromptFormat final : public VirtualTokensFormat {
 public:
  std::string type() const override {
    return "MULTITASK_PROMPT_TUNING";
  }

  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    MultitaskPromptOptions o(
        virtual_tokens(config), config.get<int64_t>("num_tasks", 1));
    read_common(config, network, o);
    o.num_transformer_submodules(submodules(config));
    o.num_ranks(config.get<int64_t>("num_ranks", 1));
    return detail::plan(o, network, /*is_empty=*/true);
  }

  AdapterConfig new_config() const override {
    return AdapterConfig::parse(std::string("{") + kCommonFields + R"(
      "num_ranks": 1,
      "num_tasks": 1,
      "peft_type": "MULTITASK_PROMPT_TUNING",
      "prompt_tuning_init": "RANDOM",
      "prompt_tuning_init_state_dict_path": null,
      "prompt_tuning_init_task": 0,
      "prompt_tuning_init_text": null,
      "tokenizer_kwargs": null,
      "tokenizer_name_or_path": null
    })");
  }

  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    const auto& o =
        std::any_cast<const MultitaskPromptOptions&>(adapter.options);
    write_prompt(adapter, o, config);
    config.erase("prompts_decoder"); // HF PEFT prompts it too
    config.set("num_ranks", o.num_ranks());
    config.set("num_tasks", o.num_tasks());
  }
};

} // namespace detail

} // namespace peft
