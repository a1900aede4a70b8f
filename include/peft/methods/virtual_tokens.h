#pragma once

// What prompt tuning, P-tuning and prefix tuning share: finding the places for
// virtual tokens in a network, and dropping a network that made them.

#include <peft/core/adapter.h>
#include <peft/core/extra_tokens.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// A place for extra tokens, by its name in the network.
using TokenSite = std::pair<std::string, const ExtraTokensImpl*>;

/// Every place for extra tokens, encoders' first; an error that shows the lines
/// to add where there is none. `method` is for messages.
inline std::vector<TokenSite> token_sites(
    const Network& network,
    const std::string& method) {
  auto sites = call_sites<ExtraTokensImpl>(network);
  TORCH_CHECK(
      !sites.empty(),
      "peft: ",
      method,
      " puts tokens in front of a transformer's, and this network says nowhere "
      "where its tokens begin. Add to the module that embeds them\n"
      "  extra_tokens = register_module(\"extra_tokens\", peft::ExtraTokens(\n"
      "      peft::ExtraTokensOptions(hidden_size, layers, heads, "
      "head_dim)));\n"
      "and to its forward, behind the token embedding,\n"
      "  auto tokens = extra_tokens->forward({embeds, attention_mask});\n"
      "then go on with tokens.embeds, tokens.attention_mask, "
      "tokens.positions() and tokens.key_values(); "
      "peft/core/extra_tokens.h says more");
  std::stable_partition(sites.begin(), sites.end(), [](const TokenSite& site) {
    return site.second->options.stack() == "encoder";
  });
  return sites;
}

/// The stacks that `sites` stand at, for messages: "'encoder', 'decoder'".
inline std::string stacks_of(const std::vector<TokenSite>& sites) {
  std::string text;
  for (const auto& [name, site] : sites) {
    text += (text.empty() ? "'" : ", '") + site->options.stack() + "' at '" +
        name + "'";
  }
  return text;
}

/// Checks a number of virtual tokens, and that it leaves room for one token of
/// the input's where they take positions.
inline void check_virtual_tokens(
    int64_t count,
    const std::vector<TokenSite>& sites,
    bool take_positions = true) {
  TORCH_CHECK_VALUE(
      count > 0,
      "peft: num_virtual_tokens must be positive, got ",
      count,
      "; without virtual tokens there is nothing to train");
  for (const auto& [name, site] : sites) {
    const auto positions = site->options.max_positions();
    TORCH_CHECK_VALUE(
        !take_positions || !positions || count < *positions,
        "peft: ",
        count,
        " virtual tokens leave no room at '",
        name,
        "', whose table has ",
        positions.value_or(0),
        " positions; choose fewer");
  }
}

/// The options' task_type, or what a network with these sites is for.
template <class Options>
std::string task_type_of(
    const Options& options,
    const std::vector<TokenSite>& sites) {
  if (!options.task_type().empty()) {
    return options.task_type();
  }
  const auto has = [&](const char* stack) {
    return std::any_of(sites.begin(), sites.end(), [&](const TokenSite& site) {
      return site.second->options.stack() == stack;
    });
  };
  if (has("decoder")) {
    return has("encoder") ? "SEQ_2_SEQ_LM" : "CAUSAL_LM";
  }
  return options.modules_to_save().empty() ? "FEATURE_EXTRACTION" : "SEQ_CLS";
}

/// A trained tensor's dtype and device: the network's, half precision as
/// float32.
inline at::TensorOptions trained_options(const Network& network) {
  const Tensor like = any_parameter(network);
  return like.options().dtype(adapter_dtype(like));
}

/// Gives `to` the values and requires_grad of `from`, which has the same
/// parameters and perhaps a decoration's.
inline void copy_parameters(
    const torch::nn::Module& from,
    torch::nn::Module& to) {
  torch::NoGradGuard no_grad;
  const auto theirs = from.named_parameters();
  for (auto& item : to.named_parameters()) {
    const Tensor& value = theirs[item.key()];
    item.value().set_data(value.detach().clone());
    item.value().set_requires_grad(value.requires_grad());
  }
}

} // namespace detail

/// Drops the network that makes an adapter's virtual tokens (P-tuning's
/// encoder, the MLP of a projected prefix) and keeps what it makes: the same
/// outputs as in evaluation, one tensor, less to compute. What trains
/// afterwards is that tensor, so an optimizer must be made anew. An error where
/// there is no such network.
inline void eject_reparameterization(const Adapter& adapter) {
  adapter.name(); // an empty or detached handle is an error
  bool found = false;
  for (const auto& site : adapter.shared_state()->sites) {
    if (auto* tokens = dynamic_cast<TokensDelta*>(site.delta.get())) {
      found = tokens->eject() || found;
    }
  }
  TORCH_CHECK(
      found,
      "peft: adapter '",
      adapter.name(),
      "', a ",
      adapter.method(),
      ", has no network that makes its tokens; there is nothing to eject");
}

} // namespace peft
