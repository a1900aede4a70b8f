#pragma once

#include <peft/core/adapter.h>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <string>
#include <unordered_set>
#include <vector>

namespace peft {

/// Parameters of a network under adapters. A tied weight counts once, and a
/// trained copy counts as the parameter it stands in for.
struct ParameterCount {
  int64_t trainable = 0;
  int64_t total = 0;
};

namespace detail {

inline std::string with_commas(int64_t n) {
  std::string digits = std::to_string(n);
  for (auto i = static_cast<int64_t>(digits.size()) - 3; i > 0; i -= 3) {
    digits.insert(static_cast<size_t>(i), ",");
  }
  return digits;
}

inline ParameterCount count_parameters(
    const std::vector<std::pair<std::string, Tensor>>& base,
    const std::vector<Adapter>& adapters) {
  ParameterCount count;
  std::vector<Tensor> seen;
  for (const auto& item : base) {
    const Tensor& p = item.second;
    const bool tied = std::any_of(seen.begin(), seen.end(), [&](const auto& o) {
      return o.is_same(p) ||
          (p.has_storage() && p.numel() > 0 && o.is_alias_of(p) &&
           o.storage_offset() == p.storage_offset() && o.numel() == p.numel());
    });
    if (!tied) {
      seen.push_back(p);
      count.total += p.numel();
      count.trainable += p.requires_grad() ? p.numel() : 0;
    }
  }
  for (const auto& adapter : adapters) {
    for (const auto& record : adapter.shared_state()->sites) {
      bool trains = false;
      int64_t frozen = 0;
      for (const auto& p : record.delta->parameters()) {
        trains = trains || p.requires_grad();
        frozen += p.requires_grad() ? 0 : p.numel();
        count.total += record.delta->replaces_base() ? 0 : p.numel();
      }
      count.trainable += trains ? record.delta->num_trained() - frozen : 0;
    }
  }
  return count;
}

inline std::string summary(
    const ParameterCount& count,
    const std::vector<Adapter>& adapters) {
  std::string text = fmt::format(
      "trainable {} of {} ({:.2f} %)\n",
      with_commas(count.trainable),
      with_commas(count.total),
      count.total == 0 ? 0.0 : 100.0 * count.trainable / count.total);
  for (const auto& adapter : adapters) {
    const auto sites = adapter.sites();
    std::string notes;
    notes += adapter.is_enabled() ? "" : ", disabled";
    notes += adapter.is_merged() ? ", merged" : "";
    notes += adapter.scale() == 1.0
        ? ""
        : fmt::format(", scale {}", adapter.scale());
    text += fmt::format(
        "adapter '{}' ({}): {} parameters at {} {}{}\n",
        adapter.name(),
        adapter.method(),
        with_commas(adapter.num_parameters()),
        sites.size(),
        sites.size() == 1 ? "site" : "sites",
        notes);
    size_t width = 0;
    for (const auto& site : sites) {
      width = std::max(width, site.name.size());
    }
    for (const auto& site : sites) {
      text += fmt::format(
          "  {:<{}}  {:<16}  {:<12} {:>12}{}\n",
          site.name.empty() ? "(root)" : site.name,
          width,
          fmt::format("[{}]", fmt::join(site.shape, ", ")),
          site.what,
          with_commas(site.num_parameters),
          site.parameters.size() > 1
              ? fmt::format("  tied: {}", fmt::join(site.parameters, ", "))
              : "");
    }
  }
  return text;
}

} // namespace detail

inline ParameterCount count_parameters(const torch::nn::Module& model) {
  return detail::count_parameters(
      detail::base_parameters(model), adapters(model));
}

/// What trains, in all and by site:
///
///   trainable 73,728 of 22,786,944 (0.32 %)
///   adapter 'default' (LORA): 73,728 parameters at 12 sites
///     encoder.layer.0.attention.self.query  [384, 384]  lora r=8    6,144
inline std::string summary(const torch::nn::Module& model) {
  return detail::summary(count_parameters(model), adapters(model));
}

} // namespace peft
