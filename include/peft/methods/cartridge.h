#pragma once

// Cartridges (Eyuboglu et al. 2025, arXiv:2506.06266): a prefix of keys and
// values that starts as what the network makes of a long text, and is trained
// to hold what that text says in fewer tokens.
//
//   attention(q, [C_K; K], [C_V; V])     C_K, C_V [virtual tokens, width] a
//   layer, of which the first num_frozen_tokens stay as they are
//
// The first token is what many heads attend to when they look for nothing (a
// sink); frozen, it keeps training stable. The text goes through the network
// once, and its cache is where the cartridge starts:
//
//   peft::KeyValues cache;
//   model->forward(text_ids, {}, {}, &cache);
//   auto adapter = peft::attach(
//       *model, peft::CartridgeOptions(512).init_cache(cache));
//
// What to train it on is the caller's: the paper distils answers about the
// text that the network gives while it reads the text.

#include <peft/core/attach.h>
#include <peft/methods/prefix.h>

#include <any>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for cartridges, by the names of HF's CartridgeConfig.
struct CartridgeOptions {
  CartridgeOptions(int64_t num_virtual_tokens)
      : num_virtual_tokens_(num_virtual_tokens) {}

  TORCH_ARG(int64_t, num_virtual_tokens);
  /// How many of the first tokens are not trained.
  TORCH_ARG(int64_t, num_frozen_tokens) = 1;
  /// Keys and values to start from, as PrefixOptions has them: one row of
  /// num_virtual_tokens tokens or more, the first of which are taken. Default:
  /// N(0, 1).
  TORCH_ARG(std::optional<KeyValues>, init_cache);
  /// As PrefixOptions has them.
  TORCH_ARG(std::vector<std::string>, stacks);
  TORCH_ARG(bool, hf_layer_order) = false;
  TORCH_ARG(std::vector<std::string>, modules_to_save);
  TORCH_ARG(std::string, task_type);
};

namespace detail {

/// The keys and values of one stack, the first tokens of which are frozen.
class CartridgeDelta final : public KeyValueTable {
 public:
  /// Draws on the CPU in PyTorch's order, the frozen rows first.
  CartridgeDelta(
      PrefixOptions prefix,
      const ExtraTokensOptions& place,
      int64_t frozen_tokens)
      : KeyValueTable(std::move(prefix), place) {
    frozen_embedding = register_buffer(
        "frozen_embedding", torch::randn({frozen_tokens, columns()}));
    trainable_embedding = register_parameter(
        "trainable_embedding",
        torch::randn({num_virtual_tokens() - frozen_tokens, columns()}));
  }

  Tensor table() const override {
    return whole(trainable_embedding);
  }

  void set_table(const Tensor& rows) override {
    torch::NoGradGuard no_grad;
    const int64_t frozen = num_frozen_tokens();
    frozen_embedding.copy_(rows.narrow(0, 0, frozen));
    trainable_embedding.copy_(
        rows.narrow(0, frozen, num_virtual_tokens() - frozen));
  }

  int64_t num_frozen_tokens() const {
    return frozen_embedding.size(0);
  }

  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    return {{"prompt_embeddings", trainable_embedding}};
  }
  /// A file has the frozen rows in front.
  Tensor to_file(const std::string& name, const Tensor& parameter)
      const override {
    return name == "prompt_embeddings" ? whole(parameter) : parameter;
  }
  std::string from_file(
      const std::string& name,
      const Tensor& value,
      bool dry_run) override {
    if (name != "prompt_embeddings") {
      return KeyValueTable::from_file(name, value, dry_run);
    }
    const std::vector<int64_t> sizes{num_virtual_tokens(), columns()};
    if (value.sizes() != at::IntArrayRef(sizes)) {
      return c10::str("shape ", value.sizes(), " where ", sizes, " fits");
    }
    if (!dry_run) {
      set_table(value);
    }
    return {};
  }

  std::shared_ptr<Delta> copy() const override {
    auto result = std::make_shared<CartridgeDelta>(
        options(), stack(), num_frozen_tokens());
    copy_parameters(*this, *result);
    result->frozen_embedding.set_data(frozen_embedding.detach().clone());
    result->train(is_training());
    return result;
  }

  std::string describe() const override {
    return "cartridge l=" + std::to_string(num_virtual_tokens());
  }

  Tensor frozen_embedding, trainable_embedding;

 private:
  Tensor whole(const Tensor& trained) const {
    return num_frozen_tokens() == 0 ? trained
                                    : at::cat({frozen_embedding, trained}, 0);
  }
};

inline void check(const CartridgeOptions& options) {
  TORCH_CHECK_VALUE(
      options.num_frozen_tokens() >= 0 &&
          options.num_frozen_tokens() <= options.num_virtual_tokens(),
      "peft: num_frozen_tokens must lie between 0 and num_virtual_tokens, ",
      options.num_virtual_tokens(),
      ", got ",
      options.num_frozen_tokens());
}

inline Plan plan(const CartridgeOptions& options, const Network& network) {
  check(options);
  Plan result = plan_key_values(
      PrefixOptions(options.num_virtual_tokens())
          .init_cache(options.init_cache())
          .stacks(options.stacks())
          .hf_layer_order(options.hf_layer_order())
          .modules_to_save(options.modules_to_save())
          .task_type(options.task_type()),
      network,
      "a cartridge",
      [&](const PrefixOptions& own, const ExtraTokensOptions& stack) {
        return std::make_shared<CartridgeDelta>(
            own, stack, options.num_frozen_tokens());
      });
  result.method = "CARTRIDGE";
  CartridgeOptions kept = options;
  kept.init_cache(std::nullopt);
  kept.task_type(
      std::any_cast<const PrefixOptions&>(result.options).task_type());
  result.options = kept;
  return result;
}

} // namespace detail

/// Trains a cartridge of keys and values in front of every layer of `model` and
/// freezes everything else. The network is one that takes a prefix
/// (methods/prefix.h).
inline Adapter attach(
    torch::nn::Module& model,
    const CartridgeOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

/// Adds a cartridge of the named ones' tokens, one after another, as HF PEFT's
/// compose_cartridge_adapters does: a network that was given cartridges of two
/// texts answers about both.
///
///   auto both = peft::compose_cartridges(*model, {"law", "case"}, "both");
///
/// It comes disabled, beside those that it is made of; it freezes as many
/// tokens as the first does. Adapters that are no cartridges, stand in other
/// stacks or train a head are errors that change nothing.
inline Adapter compose_cartridges(
    torch::nn::Module& model,
    const std::vector<std::string>& names,
    const std::string& name) {
  TORCH_CHECK_VALUE(
      names.size() >= 2,
      "peft: compose_cartridges needs two cartridges or more, got ",
      names.size());
  const auto present = adapters(model);
  std::vector<Adapter> parts;
  int64_t tokens = 0;
  for (const auto& part : names) {
    parts.push_back(detail::find_adapter(present, part));
    const auto& state = *parts.back().shared_state();
    TORCH_CHECK(
        state.method == "CARTRIDGE",
        "peft: adapter '",
        part,
        "' is of method ",
        state.method,
        ", and compose_cartridges puts cartridges one after another");
    const auto& options = std::any_cast<const CartridgeOptions&>(state.options);
    TORCH_CHECK(
        options.modules_to_save().empty(),
        "peft: adapter '",
        part,
        "' trains a head beside its cartridge, and two heads cannot stand one "
        "after the other");
    tokens += options.num_virtual_tokens();
  }
  const auto& first = *parts.front().shared_state();
  auto options = std::any_cast<const CartridgeOptions&>(first.options);
  detail::Plan plan =
      detail::plan(options.num_virtual_tokens(tokens), describe_network(model));
  for (size_t i = 0; i < plan.sites.size(); ++i) {
    std::vector<Tensor> tables;
    for (const auto& part : parts) {
      const auto& state = *part.shared_state();
      TORCH_CHECK(
          state.sites.size() == plan.sites.size() &&
              state.sites[i].name == plan.sites[i].name &&
              std::any_cast<const CartridgeOptions&>(state.options)
                      .hf_layer_order() == options.hf_layer_order(),
          "peft: the cartridges '",
          first.name,
          "' and '",
          state.name,
          "' stand in different stacks, or deal their rows out in different "
          "orders");
      const auto* delta = dynamic_cast<const detail::CartridgeDelta*>(
          state.sites[i].delta.get());
      TORCH_INTERNAL_ASSERT(delta != nullptr);
      tables.push_back(delta->table().detach());
    }
    auto* whole =
        dynamic_cast<detail::CartridgeDelta*>(plan.sites[i].delta.get());
    whole->set_table(at::cat(tables, 0));
  }
  Adapter result = detail::commit(model, name, std::move(plan));
  result.disable();
  return result;
}

} // namespace peft
