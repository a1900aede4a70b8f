#pragma once

#include <peft/core/attach.h>
#include <peft/io/adapter_config.h>
#include <peft/methods/lora.h>

#include <algorithm>
#include <any>
#include <cmath>
#include <memory>
#include <string>
#include <tuple>
#include <utility>

namespace peft {

namespace detail {

/// [A; A0] and [B, -B0] of twice the rank that the options say, filled up with
/// zeros where nothing is taken off, or where the weight's own rank is lower.
inline std::pair<Tensor, Tensor> doubled_factors(
    const Tensor& A,
    const Tensor& B,
    const LoraOffset& offset,
    int64_t r) {
  const at::NoGradGuard no_grad;
  Tensor down = A.detach(), up = B.detach();
  if (offset) {
    std::tie(down, up) = offset.beside(down, up);
  }
  const int64_t missing = 2 * r - down.size(0);
  return {
      at::constant_pad_nd(down, {0, 0, 0, missing}),
      at::constant_pad_nd(up, {0, missing})};
}

/// The same function without an offset: B A - B0 A0 as a LoRA of twice the rank
/// at the same scaling, which needs no more of the base than any LoRA. Null
/// where `adapter` takes nothing off and is plain already.
inline std::shared_ptr<AdapterState> as_plain_lora(
    const AdapterState& adapter) {
  const auto* options = std::any_cast<LoraOptions>(&adapter.options);
  TORCH_CHECK(
      options != nullptr && adapter.method == "LORA",
      "peft: convert_to_plain_lora is for LoRA that started as PiSSA or OLoRA, "
      "and adapter '",
      adapter.name,
      "' is a ",
      adapter.method);
  if (!starts_as_part(options->init())) {
    return nullptr;
  }
  auto plain = std::make_shared<AdapterState>();
  plain->name = adapter.name;
  plain->method = adapter.method;
  plain->sites = adapter.sites;
  for (auto& site : plain->sites) {
    const int64_t r = lora_scale(*options, site.name).r;
    if (const auto* lora = dynamic_cast<const LoraDelta*>(site.delta.get())) {
      const auto [A, B] =
          doubled_factors(lora->lora_A, lora->lora_B, lora->offset(), r);
      site.delta = std::make_shared<LoraDelta>(A, B, lora->config());
    } else if (
        const auto* dora = dynamic_cast<const DoraDelta*>(site.delta.get())) {
      const auto [A, B] =
          doubled_factors(dora->lora_A, dora->lora_B, dora->offset(), r);
      site.delta = std::make_shared<DoraDelta>(
          A, B, dora->magnitude.detach().clone(), dora->config());
    }
  }
  const double factor = options->rslora() ? std::sqrt(2.0) : 2.0;
  const auto times = [](LoraOptions::Pattern pattern, double by) {
    for (auto& item : pattern) {
      item.second *= by;
    }
    return pattern;
  };
  LoraOptions wide = *options;
  wide.r(2 * options->r()).alpha(factor * options->alpha()).init("kaiming");
  wide.rank_pattern(times(options->rank_pattern(), 2));
  wide.alpha_pattern(times(options->alpha_pattern(), factor));
  plain->options = std::move(wide);
  if (!adapter.loaded_config.empty()) {
    auto config = AdapterConfig::parse(adapter.loaded_config);
    config.set("init_lora_weights", true);
    plain->loaded_config = config.dump();
  }
  return plain;
}

} // namespace detail

} // namespace peft
