#pragma once

// The stacks and layers that get a prefix of keys and values.

#include <peft/core/network.h>
#include <peft/methods/bottleneck/sites.h>
#include <peft/methods/prefix/options.h>
#include <peft/methods/virtual_tokens.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace peft {

namespace detail {

/// The number of the first layer at `place`, counted through all stacks.
inline int64_t first_layer(
    const std::vector<TokenSite>& all,
    const TokenSite& place) {
  int64_t first = 0;
  for (const auto& other : all) { // encoders come first
    const auto& stack = other.second->options;
    const bool is_before = place.second->options.stack() == "cross"
        ? stack.stack() == "encoder"
        : stack.stack() != "cross";
    if (other == place) {
      break;
    }
    first += is_before ? stack.num_layers() : 0;
  }
  return first;
}

/// Those of `leave_out` that are in the stack at `place`, counted from its
/// first layer, each once.
inline std::vector<int64_t> left_out_at(
    const std::vector<int64_t>& leave_out,
    const std::vector<TokenSite>& all,
    const TokenSite& place) {
  const int64_t first = first_layer(all, place);
  std::vector<int64_t> result;
  for (int64_t i = 0; i < place.second->options.num_layers(); ++i) {
    if (is_left_out(leave_out, first + i)) {
      result.push_back(i);
    }
  }
  return result;
}

/// The layers of all stacks.
inline int64_t layers_of(const std::vector<TokenSite>& all) {
  int64_t count = 0;
  for (const auto& place : all) {
    const auto& stack = place.second->options;
    count += stack.stack() == "cross" ? 0 : stack.num_layers();
  }
  return count;
}

/// The stacks that get a prefix, by the options' words.
inline std::vector<TokenSite> prefix_places(
    const PrefixOptions& options,
    const std::vector<TokenSite>& all) {
  const auto at = [&](const std::string& stack) {
    std::vector<TokenSite> found;
    for (const auto& place : all) {
      if (place.second->options.stack() == stack) {
        found.push_back(place);
      }
    }
    return found;
  };
  if (options.stacks().empty()) {
    const auto decoder = at("decoder");
    const auto chosen = !decoder.empty() ? decoder : at("encoder");
    TORCH_CHECK_VALUE(
        !chosen.empty(),
        "peft: this network has places for a prefix only at ",
        stacks_of(all),
        "; name them in stacks");
    return chosen;
  }
  std::vector<TokenSite> places;
  for (const auto& stack : options.stacks()) {
    const auto found = at(stack);
    TORCH_CHECK_VALUE(
        !found.empty(),
        "peft: there is no stack '",
        stack,
        "' for a prefix in this network; it has ",
        stacks_of(all));
    for (const auto& place : found) {
      TORCH_CHECK_VALUE(
          std::find(places.begin(), places.end(), place) == places.end(),
          "peft: stacks names '",
          stack,
          "' twice");
      places.push_back(place);
    }
  }
  return places;
}

/// A prefix as the published unions have it: in every attention of the network
/// and without positions, unless its options say otherwise.
inline PrefixOptions in_every_stack(
    PrefixOptions options,
    const Network& network) {
  if (!options.takes_positions()) { // not said
    options.takes_positions(false);
  }
  if (options.stacks().empty()) {
    auto& named = options.stacks();
    for (const auto& place : token_sites(network, "prefix tuning")) {
      const auto& stack = place.second->options.stack();
      if (std::find(named.begin(), named.end(), stack) == named.end()) {
        named.push_back(stack);
      }
    }
  }
  return options;
}

/// Whether a cache fits a stack: one row, enough tokens, all layers and heads.
inline void check_init_cache(
    const KeyValues& cache,
    int64_t num_virtual_tokens,
    const TokenSite& place) {
  const auto& stack = place.second->options;
  bool fits = static_cast<int64_t>(cache.keys.size()) == stack.num_layers() &&
      cache.values.size() == cache.keys.size();
  for (const auto* side : {&cache.keys, &cache.values}) {
    for (const auto& t : *side) {
      fits = fits && t.defined() && t.dim() == 4 && t.size(0) == 1 &&
          t.size(1) == stack.num_heads() && t.size(2) >= num_virtual_tokens &&
          t.size(3) == stack.head_dim();
    }
  }
  TORCH_CHECK_VALUE(
      fits,
      "peft: init_cache must hold keys and values [1, ",
      stack.num_heads(),
      ", ",
      num_virtual_tokens,
      " or more, ",
      stack.head_dim(),
      "] for each of the ",
      stack.num_layers(),
      " layers at '",
      place.first,
      "'; it has ",
      cache.keys.size(),
      " layers, the first ",
      cache.keys.empty() || !cache.keys[0].defined() ? at::IntArrayRef()
                                                     : cache.keys[0].sizes());
}

} // namespace detail

} // namespace peft
