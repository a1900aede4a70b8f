#pragma once

// One adapter from several of one method, with a weight each: task vectors of
// LoRA (methods/lora/weighted.h), and of (IA)³ l = Σ wᵢ lᵢ, as HF PEFT's
// add_weighted_adapter.

#include <peft/methods/ia3.h>
#include <peft/methods/lora.h>
#include <peft/methods/lora/weighted.h>

#include <any>
#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// (IA)³: the sum of the vectors. One that lacks a site adds nothing there, as
/// in PEFT, so weights that sum to 1 mean what they say only where all act.
inline Plan plan_weighted_ia3(
    const WeightedAdapters& parts,
    const Network& network) {
  const torch::NoGradGuard no_grad;
  auto options =
      std::any_cast<const Ia3Options&>(parts.front().state().options);
  std::vector<Targets> targets, feedforward;
  std::vector<std::string> modules;
  size_t sites = 0, met = 0;
  for (const auto& part : parts) {
    const auto& o = std::any_cast<const Ia3Options&>(part.state().options);
    targets.push_back(o.targets());
    feedforward.push_back(
        o.feedforward().empty() && !o.targets().empty()
            ? Targets(std::vector<std::string>{})
            : o.feedforward());
    unite(modules, o.modules_to_save());
    for (const auto& record : part.state().sites) {
      sites += dynamic_cast<const Ia3Delta*>(record.delta.get()) ? 1 : 0;
    }
  }
  const auto all = united(targets), by_input = united(feedforward);
  TORCH_CHECK(
      all && by_input,
      "peft: the (IA)3 adapters name their targets in different ways (a list, "
      "a regular expression, the default), which cannot be united");
  options.targets(*all)
      .feedforward(*by_input)
      .modules_to_save(modules)
      .init_ia3_weights(true);
  Plan result = plan(options, network);
  for (auto& place : result.sites) {
    auto delta = std::dynamic_pointer_cast<Ia3Delta>(place.delta);
    if (!delta) {
      if (const auto copy = weighted_copy(parts, place)) {
        place.delta = copy;
      }
      continue;
    }
    Tensor sum = at::zeros_like(delta->ia3_l);
    bool any = false;
    for (const auto& part : parts) {
      const auto* from = part.delta_at<Ia3Delta>(place);
      if (from == nullptr) {
        continue;
      }
      TORCH_CHECK(
          from->ia3_l.sizes() == sum.sizes(),
          "peft: at '",
          place.name,
          "' one (IA)3 adapter scales the input and another the output; they "
          "cannot be combined");
      const double scale = part.state().scale;
      const Tensor l =
          scale == 1.0 ? from->ia3_l : 1.0 + scale * (from->ia3_l - 1.0);
      sum += l * part.weight;
      any = true;
      ++met;
    }
    if (any) {
      delta->ia3_l.copy_(sum);
    }
  }
  TORCH_CHECK(
      met == sites,
      "peft: the (IA)3 adapters exclude different modules, which cannot be "
      "united");
  return result;
}

} // namespace detail

/// Adds an adapter made of the named ones: LoRA by any of PEFT's combinations,
/// or (IA)³. Weights may be negative; set_scale() of an adapter counts.
///
///   auto both = peft::add_weighted_adapter(
///       *model, {"law", "german"}, {0.7, 0.3}, "both",
///       peft::WeightedAdapterOptions("ties").density(0.4));
///
/// It comes disabled and frozen, beside those that it is made of, and is an
/// adapter like any other: enable() it and disable() the others, train, merge
/// or save it. Its scaling is 1, whatever theirs. After one seed the DARE
/// combinations draw what they draw in Python.
///
/// Heads (modules_to_save) are taken along where one adapter has them. An
/// unknown or merged adapter, a name that is taken, ranks that a combination
/// cannot add, DoRA and trained biases are errors that change nothing.
inline Adapter add_weighted_adapter(
    torch::nn::Module& model,
    const std::vector<std::string>& names,
    const std::vector<double>& weights,
    const std::string& name,
    WeightedAdapterOptions options = {}) {
  TORCH_CHECK_VALUE(
      !names.empty(),
      "peft: add_weighted_adapter needs at least one adapter to combine");
  TORCH_CHECK_VALUE(
      names.size() == weights.size(),
      "peft: add_weighted_adapter needs one weight for each adapter, got ",
      names.size(),
      " adapters and ",
      weights.size(),
      " weights");
  detail::check(options);
  detail::check_adapter_name(name);
  const auto present = adapters(model);
  for (const auto& other : present) {
    TORCH_CHECK(
        other.name() != name,
        "peft: the model already has an adapter named '",
        name,
        "'; detach it or choose another name");
  }
  detail::WeightedAdapters parts;
  for (size_t i = 0; i < names.size(); ++i) {
    TORCH_CHECK_VALUE(
        std::isfinite(weights[i]),
        "peft: the weight of adapter '",
        names[i],
        "' must be finite, got ",
        weights[i]);
    parts.push_back({detail::find_adapter(present, names[i]), weights[i]});
    TORCH_CHECK(
        !parts.back().adapter.is_merged(),
        "peft: adapter '",
        names[i],
        "' is merged; unmerge() it before combining");
  }
  const auto& first = parts.front().state();
  const auto registry =
      std::dynamic_pointer_cast<detail::Registry>(first.registry.lock());
  for (const auto& part : parts) {
    TORCH_CHECK(
        part.adapter.method() == first.method &&
            (first.method == "LORA" || first.method == "IA3"),
        "peft: add_weighted_adapter combines LoRA adapters, or (IA)3 adapters; "
        "'",
        first.name,
        "' is of method ",
        first.method,
        " and '",
        part.adapter.name(),
        "' of ",
        part.adapter.method(),
        ". convert_to_lora() makes a LoRA of what can be merged");
    TORCH_CHECK(
        registry && part.state().registry.lock() == registry,
        "peft: adapters '",
        first.name,
        "' and '",
        part.adapter.name(),
        "' were attached to different modules; attach both to one");
  }
  const bool is_lora = first.method == "LORA";
  if (options.combination_type().empty()) {
    options.combination_type(is_lora ? "svd" : "linear");
  }
  TORCH_CHECK_VALUE(
      is_lora || options.combination_type() == "linear",
      "peft: (IA)3 adapters are combined by 'linear' only, got '",
      options.combination_type(),
      "'");
  if (is_lora) {
    detail::combination_of(options); // an error for a wrong name
  }
  if (parts.size() == 1) {
    options.combination_type("linear");
  }
  auto& host = *registry->host;
  const Network network = describe_network(host);
  Adapter result = detail::commit(
      host,
      name,
      is_lora ? detail::WeightedLoraPlanner(parts, options, network).run()
              : detail::plan_weighted_ia3(parts, network));
  result.set_trainable(false);
  result.disable();
  return result;
}

} // namespace peft
