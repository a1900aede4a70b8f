#pragma once

// Prompt tuning, P-tuning and prefix tuning as HF PEFT's PromptTuningConfig,
// PromptEncoderConfig, PrefixTuningConfig and files have them.
//
//   prompt_embeddings               the virtual tokens, without a prefix
//   base_model.classifier.weight    a head of modules_to_save
//
// The network that makes the tokens is no part of such a file; libpeft keeps it
// in a file beside them, so that training goes on. What HF PEFT cannot run (a
// prompt for a decoder beside its encoder, a prefix in several attentions of an
// encoder-decoder) is written under keys that it does not take for its own.

#include <peft/core/extra_tokens.h>
#include <peft/io/formats/format.h>
#include <peft/methods/p_tuning.h>
#include <peft/methods/prefix.h>
#include <peft/methods/prompt.h>

#include <any>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// What the three have in common.
class VirtualTokensFormat : public AdapterFormat {
 public:
  NamedTensorList pack(const AdapterState& adapter) const override {
    NamedTensorList tensors;
    for (const auto& site : adapter.sites) {
      const bool is_tokens =
          dynamic_cast<const TokensDelta*>(site.delta.get()) != nullptr;
      for (const auto& item : site.delta->all_file_tensors()) {
        tensors.emplace_back(
            (is_tokens ? "" : "base_model.") +
                file_key(site.file_prefix, item.first),
            site.delta->to_file(item.first, item.second.detach()));
      }
    }
    return tensors;
  }

 protected:
  /// HF's word for a network that is there to be trained on; load() says it
  /// where the folder holds one.
  static bool has_encoder(const AdapterConfig& config) {
    return !config.get<bool>("inference_mode", true);
  }

  static int64_t virtual_tokens(const AdapterConfig& config) {
    return config.get<int64_t>("num_virtual_tokens");
  }

  static int64_t submodules(const AdapterConfig& config) {
    const bool two = config.get<std::string>("task_type", "") == "SEQ_2_SEQ_LM";
    return config.get<int64_t>("num_transformer_submodules", two ? 2 : 1);
  }

  /// The fields that all options have. A head that HF lists and the network has
  /// not is passed over by the plan and stays in the config.
  template <class Options>
  static void
  read_common(const AdapterConfig& config, const Network& network, Options& o) {
    o.task_type(config.get<std::string>("task_type", ""));
    o.modules_to_save(modules_in(
        network, config.get<std::vector<std::string>>("modules_to_save", {})));
  }
  template <class Options>
  static void write_common(const Options& o, AdapterConfig& config) {
    config.set("num_virtual_tokens", o.num_virtual_tokens());
    config.set("task_type", o.task_type());
    if (!o.modules_to_save().empty() && !config.has("modules_to_save")) {
      config.set("modules_to_save", o.modules_to_save());
    }
  }

  /// The same for prompts.
  template <class Options>
  static void read_stacks(const AdapterConfig& config, Options& o) {
    o.num_transformer_submodules(submodules(config));
    o.prompts_decoder(config.get<bool>("prompts_decoder", false));
  }
  template <class Options>
  static void write_prompt(
      const AdapterState& adapter,
      const Options& o,
      AdapterConfig& config) {
    write_common(o, config);
    size_t stacks = 0;
    for (const auto& site : adapter.sites) {
      stacks += dynamic_cast<const TokensDelta*>(site.delta.get()) != nullptr;
      const auto* table = dynamic_cast<const PromptTable*>(site.delta.get());
      if (table == nullptr) {
        continue;
      }
      const auto& stack = table->stack();
      config.set(
          "num_transformer_submodules",
          table->table().size(0) / o.num_virtual_tokens());
      config.set("token_dim", stack.hidden_size());
      config.set("num_layers", stack.num_layers());
      // HF counts the queries' heads, which this stack need not have.
      if (stack.num_heads() * stack.head_dim() == stack.hidden_size()) {
        config.set("num_attention_heads", stack.num_heads());
      }
    }
    if (stacks > 1) {
      config.set("prompts_decoder", true);
    } else {
      config.erase("prompts_decoder");
    }
  }

  static constexpr const char* kCommonFields = R"(
      "auto_mapping": null,
      "base_model_name_or_path": null,
      "inference_mode": true,
      "modules_to_save": null,
      "num_attention_heads": null,
      "num_layers": null,
      "num_transformer_submodules": null,
      "num_virtual_tokens": null,
      "peft_version": "0.21.2",
      "revision": null,
      "task_type": null,
      "token_dim": null,)";
};

class PromptFormat final : public VirtualTokensFormat {
 public:
  std::string type() const override {
    return "PROMPT_TUNING";
  }

  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    PromptOptions o(virtual_tokens(config));
    read_common(config, network, o);
    read_stacks(config, o);
    return detail::plan(o.init("empty"), network);
  }

  AdapterConfig new_config() const override {
    return AdapterConfig::parse(std::string("{") + kCommonFields + R"(
      "peft_type": "PROMPT_TUNING",
      "prompt_tuning_init": "RANDOM",
      "prompt_tuning_init_text": null,
      "tokenizer_kwargs": null,
      "tokenizer_name_or_path": null
    })");
  }

  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    const auto& o = std::any_cast<const PromptOptions&>(adapter.options);
    write_prompt(adapter, o, config);
    if (o.init() == "vocab") { // for "TEXT" HF wants a tokenizer named
      config.set("prompt_tuning_init", "SAMPLE_VOCAB");
    }
  }
};

class PTuningFormat final : public VirtualTokensFormat {
 public:
  std::string type() const override {
    return "P_TUNING";
  }

  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    PTuningOptions o(virtual_tokens(config));
    read_common(config, network, o);
    read_stacks(config, o);
    o.encoder_reparameterization_type(
        config.get<std::string>("encoder_reparameterization_type", "MLP"));
    if (config.has("encoder_hidden_size")) {
      o.encoder_hidden_size(config.get<int64_t>("encoder_hidden_size"));
    }
    o.encoder_num_layers(config.get<int64_t>("encoder_num_layers", 2));
    o.encoder_dropout(config.get<double>("encoder_dropout", 0));
    return detail::plan(o, network, has_encoder(config));
  }

  AdapterConfig new_config() const override {
    return AdapterConfig::parse(std::string("{") + kCommonFields + R"(
      "encoder_dropout": 0.0,
      "encoder_hidden_size": null,
      "encoder_num_layers": 2,
      "encoder_reparameterization_type": "MLP",
      "peft_type": "P_TUNING"
    })");
  }

  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    const auto& o = std::any_cast<const PTuningOptions&>(adapter.options);
    write_prompt(adapter, o, config);
    config.set(
        "encoder_reparameterization_type", o.encoder_reparameterization_type());
    config.set(
        "encoder_hidden_size",
        o.encoder_hidden_size().value_or(config.get<int64_t>("token_dim")));
    config.set("encoder_num_layers", o.encoder_num_layers());
    config.set("encoder_dropout", o.encoder_dropout());
  }
};

/// What prefixes and cartridges have in common.
class KeyValueFormat : public VirtualTokensFormat {
 protected:
  /// Which stacks, or HF's way of dealing the rows out.
  template <class Options>
  static void read_layout(const AdapterConfig& config, Options& o) {
    if (config.has("stacks")) {
      o.stacks(config.get<std::vector<std::string>>("stacks"));
    } else {
      o.hf_layer_order(submodules(config) == 2);
    }
  }

  /// Whether the config's numbers are the stacks'.
  static void check_layout(const AdapterConfig& config, const Plan& plan) {
    for (const auto& site : plan.sites) {
      const auto* table = dynamic_cast<const KeyValueTable*>(site.delta.get());
      if (table == nullptr) {
        continue;
      }
      const auto check = [&](const char* field, int64_t own) {
        const auto wanted = config.get<int64_t>(field, own);
        TORCH_CHECK(
            wanted == own,
            "peft: ",
            field,
            " is ",
            wanted,
            " in ",
            kConfigFile,
            ", and '",
            site.name,
            "' has ",
            own,
            " (heads are those of keys and values)");
      };
      if (!config.has("stacks")) { // several may differ
        check("num_layers", table->stack().num_layers());
      }
      check("num_attention_heads", table->stack().num_heads());
    }
  }

  /// The numbers of the stack; its keys' width.
  template <class Options>
  static int64_t write_layout(
      const AdapterState& adapter,
      const Options& o,
      AdapterConfig& config) {
    write_common(o, config);
    std::vector<std::string> stacks; // those that HF PEFT would not run
    int64_t width = 0;
    for (const auto& site : adapter.sites) {
      const auto* table = dynamic_cast<const KeyValueTable*>(site.delta.get());
      if (table == nullptr) {
        continue;
      }
      width = table->width();
      config.set("num_layers", table->stack().num_layers());
      config.set("num_attention_heads", table->stack().num_heads());
      config.set("token_dim", width);
      if (!site.file_prefix.empty()) {
        stacks.push_back(table->stack().stack());
      }
    }
    config.set(
        "num_transformer_submodules",
        int64_t{o.hf_layer_order() || !stacks.empty() ? 2 : 1});
    if (!stacks.empty()) {
      config.set("stacks", stacks);
    }
    return width;
  }
};

class PrefixFormat final : public KeyValueFormat {
 public:
  std::string type() const override {
    return "PREFIX_TUNING";
  }

  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    PrefixOptions o(virtual_tokens(config));
    read_common(config, network, o);
    read_layout(config, o);
    o.prefix_projection(config.get<bool>("prefix_projection", false));
    if (config.has("encoder_hidden_size")) {
      o.encoder_hidden_size(config.get<int64_t>("encoder_hidden_size"));
    }
    o.init(config.get<std::string>("init_weights", "random"));
    o.dropout(config.get<double>("dropout", 0));
    o.leave_out(config.get<std::vector<int64_t>>("leave_out", {}));
    o.takes_positions(config.get<bool>("takes_positions", true));
    Plan result = detail::plan(o, network, has_encoder(config));
    check_layout(config, result);
    return result;
  }

  AdapterConfig new_config() const override {
    return AdapterConfig::parse(std::string("{") + kCommonFields + R"(
      "encoder_hidden_size": null,
      "init_weights": null,
      "peft_type": "PREFIX_TUNING",
      "prefix_projection": false
    })");
  }

  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    const auto& o = std::any_cast<const PrefixOptions&>(adapter.options);
    const int64_t width = write_layout(adapter, o, config);
    config.set("encoder_hidden_size", o.encoder_hidden_size().value_or(width));
    config.set("prefix_projection", o.prefix_projection());
    if (o.init() == "zero") {
      config.set("init_weights", o.init());
    }
    if (o.dropout() > 0) {
      config.set_number("dropout", o.dropout());
    }
    if (!o.leave_out().empty()) {
      config.set("leave_out", o.leave_out());
    }
    if (!o.takes_positions().value_or(true)) {
      config.set("takes_positions", false);
    }
  }
};

} // namespace detail

} // namespace peft
