#pragma once

// Low-rank factors for a given change of a weight, by a singular value
// decomposition:
//
//   ΔW = U S Vᵀ,   B = U_r S_r,   A = V_rᵀ
//
// What combining adapters (methods/lora/weighted.h) and converting other
// methods to LoRA (methods/lora/convert.h) share.

#include <peft/core/attach.h>
#include <peft/methods/lora/delta.h>
#include <peft/methods/lora/options.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// A site that a LoRA file names by the attention around it; "" elsewhere.
template <class Site>
std::string attention_of(const Site& site) {
  const auto at = site.file_prefix.find(".base_layer.out_proj");
  return at == std::string::npos ? "" : site.file_prefix.substr(0, at);
}

/// The module (or parameter) that targets and patterns name for a site.
template <class Site>
std::string target_of(const Site& site) {
  const std::string attention = attention_of(site);
  return attention.empty() ? site.name : attention;
}

/// `name` as a regular expression that matches nothing else.
inline std::string exact_pattern(const std::string& name) {
  static const std::string special = ".\\^$|?*+()[]{}";
  std::string result;
  for (const char c : name) {
    result += special.find(c) == std::string::npos ? "" : "\\";
    result += c;
  }
  return result;
}

/// Targets that meet these modules and no other: a list, or a regular
/// expression where a name is the end of another's.
inline Targets exact_targets(
    const std::vector<std::string>& names,
    const Network& network) {
  const auto is_other = [&](const std::string& name) {
    return std::find(names.begin(), names.end(), name) == names.end() &&
        std::any_of(names.begin(), names.end(), [&](const std::string& t) {
             return Targets::name_matches(name, t);
           });
  };
  bool clear = true;
  for (const auto& layer : network) {
    clear = clear && !is_other(layer.name);
    for (const auto& p : layer.parameters) {
      clear = clear && !is_other(layer.path(p.first));
    }
  }
  if (clear) {
    return Targets(names);
  }
  std::string pattern;
  for (const auto& name : names) {
    pattern += (pattern.empty() ? "" : "|") + exact_pattern(name);
  }
  return Targets::regex(pattern);
}

/// r and the patterns for modules of these ranks, all at scaling 1.
inline void set_ranks(
    LoraOptions& options,
    const std::vector<std::pair<std::string, int64_t>>& ranks,
    int64_t r) {
  LoraOptions::Pattern patterns;
  for (const auto& [name, rank] : ranks) {
    const std::string pattern = "^" + exact_pattern(name);
    const bool known =
        std::any_of(patterns.begin(), patterns.end(), [&](const auto& item) {
          return item.first == pattern;
        });
    if (rank != r && !known) {
      patterns.emplace_back(pattern, static_cast<double>(rank));
    }
  }
  options.r(r)
      .alpha(static_cast<double>(r))
      .rslora(false)
      .rank_pattern(patterns)
      .alpha_pattern(patterns);
}

/// ΔW as what B A has to be: [groups, rows, columns].
inline Tensor
as_matrices(const Tensor& delta, LoraLayout layout, int64_t groups) {
  const bool turned =
      layout == LoraLayout::transposed || layout == LoraLayout::embedding;
  const Tensor matrix = turned ? delta.t() : delta.flatten(1);
  return matrix.reshape({groups, matrix.size(0) / groups, matrix.size(1)});
}

/// U [groups, rows, n], S [groups, n], Vᵀ [groups, n, columns].
struct Decomposition {
  Tensor U, S, Vh;
};

inline Decomposition decompose(
    const Tensor& matrices,
    bool full_matrices = false,
    const std::optional<std::string>& driver = std::nullopt) {
  const std::optional<std::string_view> by =
      driver ? std::optional<std::string_view>(*driver) : std::nullopt;
  auto [U, S, Vh] = at::linalg_svd(matrices, full_matrices, by);
  return {U, S, Vh};
}

/// A [groups, rank, columns] and B [groups, rows, rank]; zeros where the matrix
/// has no more singular values.
inline std::pair<Tensor, Tensor> leading_factors(
    const Decomposition& parts,
    int64_t rank) {
  const int64_t n = std::min(rank, parts.S.size(1));
  const Tensor S = parts.S.slice(1, 0, n);
  const Tensor B = parts.U.slice(2, 0, n) * S.unsqueeze(1);
  const Tensor A = parts.Vh.slice(1, 0, n);
  return {
      at::constant_pad_nd(A, {0, 0, 0, rank - n}),
      at::constant_pad_nd(B, {0, rank - n})};
}

/// A delta at the place of `planned` with scaling 1 and these factors, in the
/// shapes that a file has for the place.
inline std::shared_ptr<LoraDelta>
lora_with_factors(const LoraDelta& planned, const Tensor& A, const Tensor& B) {
  const c10::InferenceMode off(false);
  auto config = planned.config();
  config.scaling = 1.0;
  auto A_sizes = planned.lora_A.sizes().vec();
  auto B_sizes = planned.lora_B.sizes().vec();
  A_sizes[0] = A.size(0);
  B_sizes[1] = B.size(1);
  const auto like = planned.lora_A.options().requires_grad(false);
  auto result = std::make_shared<LoraDelta>(
      at::zeros(A_sizes, like).set_requires_grad(true),
      at::zeros(B_sizes, like).set_requires_grad(true),
      config);
  const auto names = result->file_tensors();
  for (const auto& [name, value] :
       {std::make_pair(names[0].first, A), std::make_pair(names[1].first, B)}) {
    const auto misfit = result->from_file(name, value, /*dry_run=*/false);
    TORCH_CHECK(misfit.empty(), "peft: ", name, ": ", misfit);
  }
  return result;
}

/// The same for factors of leading_factors().
inline std::shared_ptr<LoraDelta> lora_with_factors(
    const LoraDelta& planned,
    const std::pair<Tensor, Tensor>& factors) {
  const auto& [A, B] = factors;
  auto A_sizes = planned.lora_A.sizes().vec();
  auto B_sizes = planned.lora_B.sizes().vec();
  A_sizes[0] = A.size(0) * A.size(1);
  B_sizes[1] = B.size(2);
  return lora_with_factors(planned, A.reshape(A_sizes), B.reshape(B_sizes));
}

} // namespace detail

} // namespace peft
