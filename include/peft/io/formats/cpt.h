#pragma once

// CPT as HF PEFT's CPTConfig and files have it.
//
//   prompt_embeddings  the tokens as they were moved
//
// Where they started is no part of such a file; libpeft keeps it, and how far
// they moved, in a file beside it, so that training goes on.

#include <peft/io/formats/prompt.h>
#include <peft/methods/cpt.h>

#include <any>
#include <string>
#include <vector>

namespace peft {

namespace detail {

class CptFormat final : public VirtualTokensFormat {
 public:
  std::string type() const override {
    return "CPT";
  }

  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    using Numbers = std::vector<int64_t>;
    CptOptions o(config.get<Numbers>("cpt_token_ids"));
    read_common(config, network, o);
    o.cpt_tokens_type_mask(config.get<Numbers>("cpt_tokens_type_mask", {}));
    o.opt_weighted_loss_type(
        config.get<std::string>("opt_weighted_loss_type", "none"));
    o.opt_loss_decay_factor(config.get<double>("opt_loss_decay_factor", 1));
    o.opt_projection_epsilon(config.get<double>("opt_projection_epsilon", 0.1));
    o.opt_projection_format_epsilon(
        config.get<double>("opt_projection_format_epsilon", 0.1));
    return detail::plan(o, network, /*is_empty=*/true);
  }

  std::string lost_without_training_file(const Plan& /*plan*/) const override {
    return "where its tokens started: they may move from where they are now";
  }

  AdapterConfig new_config() const override {
    return AdapterConfig::parse(std::string("{") + kCommonFields + R"(
      "cpt_mask": null,
      "cpt_token_ids": null,
      "cpt_tokens_type_mask": null,
      "opt_loss_decay_factor": 1.0,
      "opt_projection_epsilon": 0.1,
      "opt_projection_format_epsilon": 0.1,
      "opt_weighted_loss_type": "none",
      "peft_type": "CPT",
      "tokenizer_name_or_path": null
    })");
  }

  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    const auto& o = std::any_cast<const CptOptions&>(adapter.options);
    write_prompt(adapter, o, config);
    config.set("cpt_token_ids", o.cpt_token_ids());
    config.set("cpt_tokens_type_mask", o.types());
    if (!config.has("cpt_mask")) {
      config.set("cpt_mask", std::vector<int64_t>(o.types().size(), 1));
    }
    config.set("opt_weighted_loss_type", o.opt_weighted_loss_type());
    config.set_number("opt_loss_decay_factor", o.opt_loss_decay_factor());
    config.set_number("opt_projection_epsilon", o.opt_projection_epsilon());
    config.set_number(
        "opt_projection_format_epsilon", o.opt_projection_format_epsilon());
  }
};

} // namespace detail

} // namespace peft
