#pragma once

// The fields target_parameters and trainable_token_indices of HF PEFT's
// LoraConfig.

#include <peft/io/formats/format.h>
#include <peft/methods/lora.h>

#include <any>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

namespace peft {

namespace detail {

/// A field of libpeft's own: which way matrices lie, where no shape tells.
inline constexpr const char* kTransposedField = "parameters_transposed";

/// How a LoRA of any kind lies at a place.
struct LoraShape {
  LoraLayout layout;
  int64_t r;
  double scaling;
};

/// None for other deltas (biases, heads).
inline std::optional<LoraShape> lora_shape(const Delta& delta) {
  const auto shape = [](const auto& d, LoraLayout layout) {
    return LoraShape{layout, d.r(), d.config().scaling};
  };
  if (const auto* lora = dynamic_cast<const LoraDelta*>(&delta)) {
    return shape(*lora, lora->config().layout);
  }
  if (const auto* dora = dynamic_cast<const DoraDelta*>(&delta)) {
    return shape(*dora, dora->config().layout);
  }
  if (const auto* kasa = dynamic_cast<const KasaDelta*>(&delta)) {
    return shape(*kasa, LoraLayout::matrix);
  }
  if (const auto* bd_lora = dynamic_cast<const BdLoraDelta*>(&delta)) {
    return shape(*bd_lora, LoraLayout::matrix);
  }
  if (const auto* drawn = dynamic_cast<const MonteCloraDelta*>(&delta)) {
    return shape(
        *drawn,
        drawn->is_transposed() ? LoraLayout::transposed : LoraLayout::matrix);
  }
  if (const auto* velora = dynamic_cast<const VeloraDelta*>(&delta)) {
    return shape(
        *velora,
        velora->is_transposed() ? LoraLayout::transposed : LoraLayout::matrix);
  }
  return std::nullopt;
}
inline std::optional<LoraLayout> lora_layout(const SiteRecord& site) {
  const auto shape = lora_shape(*site.delta);
  return shape ? std::optional<LoraLayout>(shape->layout) : std::nullopt;
}

inline bool is_stack(const Delta& delta) {
  return dynamic_cast<const LoraExpertsDelta*>(&delta) != nullptr;
}

/// A list of rows, or lists by module.
inline TokenIndices token_indices_field(const AdapterConfig& config) {
  using ByModule = std::map<std::string, std::vector<int64_t>>;
  const char* field = "trainable_token_indices";
  if (config.is_empty(field)) {
    return {};
  }
  const auto value =
      config.get<std::variant<std::vector<int64_t>, ByModule>>(field);
  if (const auto* tokens = std::get_if<std::vector<int64_t>>(&value)) {
    return TokenIndices(*tokens);
  }
  const auto& modules = std::get<ByModule>(value);
  return TokenIndices(
      std::vector<TokenIndices::Entry>(modules.begin(), modules.end()));
}

inline void write_token_indices(const LoraOptions& o, AdapterConfig& config) {
  const auto& entries = o.trainable_token_indices().entries;
  if (entries.size() == 1 && entries.front().first.empty()) {
    config.set("trainable_token_indices", entries.front().second);
  } else if (!entries.empty()) {
    config.set(
        "trainable_token_indices",
        std::map<std::string, std::vector<int64_t>>(
            entries.begin(), entries.end()));
  }
}

/// PEFT takes names only. Which way the matrices of a stack lie it knows from
/// the network, and we from the shapes, except where all are square.
inline void write_parameters(
    const AdapterState& adapter,
    const LoraOptions& o,
    AdapterConfig& config) {
  if (o.target_parameters().empty()) {
    return;
  }
  std::vector<std::string> names;
  bool has_stacks = false, is_told = !o.parameters_transposed();
  for (const auto& site : adapter.sites) {
    const auto& path = site.parameters.front();
    if ((lora_layout(site) || is_stack(*site.delta)) &&
        names_parameter(o.target_parameters(), path)) {
      names.push_back(path);
    }
    if (is_stack(*site.delta)) {
      const auto& sizes = lock_site(site)->sizes;
      has_stacks = true;
      is_told = is_told || sizes[1] != sizes[2];
    }
  }
  config.set(
      "target_parameters",
      o.target_parameters().kind() == Targets::Kind::list
          ? o.target_parameters().names()
          : names);
  if (has_stacks && !is_told) {
    config.set(kTransposedField, true);
  }
}

/// Where the shapes of a file say that the matrices of a stack lie as [in,
/// out], they do; square ones lie as the others.
inline void orient_stacks(Plan& plan, const NamedTensorMap& file) {
  auto& o = std::any_cast<LoraOptions&>(plan.options);
  std::vector<PlannedSite*> turned, square;
  for (auto& site : plan.sites) {
    if (!is_stack(*site.delta)) {
      continue;
    }
    const auto found =
        find_in_file(file, file_key(site.file_prefix, "lora_A.weight"));
    const int64_t rows = site.tensor.size(1), columns = site.tensor.size(2);
    if (rows == columns) {
      square.push_back(&site);
    } else if (
        found != file.end() && found->second.dim() == 2 &&
        found->second.size(1) == rows) {
      turned.push_back(&site);
    }
  }
  if (turned.empty() || o.parameters_transposed()) {
    return;
  }
  o.parameters_transposed(true);
  turned.insert(turned.end(), square.begin(), square.end());
  for (auto* site : turned) {
    site->delta = make_parameter_delta(
        LoraOptions(o).init("empty"), site->tensor, site->parameter);
  }
}

} // namespace detail

} // namespace peft
