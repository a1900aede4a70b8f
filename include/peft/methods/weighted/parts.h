#pragma once

// What combining adapters of any method needs: the options, and the adapters
// that take part.

#include <peft/core/attach.h>
#include <peft/core/trained_copy.h>
#include <peft/functional/merge_utils.h>

#include <torch/arg.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for add_weighted_adapter, by the names of HF PEFT.
///
///   peft::WeightedAdapterOptions("ties").density(0.4)
struct WeightedAdapterOptions {
  WeightedAdapterOptions(std::string combination_type = "")
      : combination_type_(std::move(combination_type)) {}

  /// "linear", "cat", "svd", "ties", "dare_linear", "dare_ties",
  /// "magnitude_prune", or one of the last four with "_svd". Default: "svd" for
  /// LoRA; "linear" for (IA)³, which has no other. A single LoRA is always
  /// combined by "linear".
  TORCH_ARG(std::string, combination_type);
  /// The rank that an svd gives. Default: the largest of the adapters.
  TORCH_ARG(std::optional<int64_t>, svd_rank);
  /// Clamps the factors of an svd to this quantile of their entries, in (0, 1].
  TORCH_ARG(std::optional<double>, svd_clamp);
  /// Computes all singular vectors, as PEFT does by default: of a wide weight a
  /// very large matrix that changes no result.
  TORCH_ARG(bool, svd_full_matrices) = false;
  /// cuSOLVER's method, on CUDA: "gesvd", "gesvdj", "gesvda".
  TORCH_ARG(std::optional<std::string>, svd_driver);
  /// The share of entries that ties, dare and magnitude_prune keep, in (0, 1].
  TORCH_ARG(std::optional<double>, density);
  /// How ties elects a sign: "total" or "frequency".
  TORCH_ARG(std::string, majority_sign_method) = "total";
};

namespace detail {

/// What the name of a combination says: its f, and where f acts.
struct Combination {
  enum class On { factors, ranks, product } on = On::factors;
  std::string f; // "linear", "ties", ...; none for cat
};

inline Combination combination_of(const WeightedAdapterOptions& options) {
  const std::string& type = options.combination_type();
  Combination result;
  if (type == "cat") {
    result.on = Combination::On::ranks;
    return result;
  }
  result.f = type;
  const std::string end = "_svd";
  if (type == "svd") {
    result = {Combination::On::product, "linear"};
  } else if (
      type.size() > end.size() &&
      type.compare(type.size() - end.size(), end.size(), end) == 0) {
    result = {
        Combination::On::product, type.substr(0, type.size() - end.size())};
  }
  const bool prunes = result.f == "ties" || result.f == "dare_linear" ||
      result.f == "dare_ties" || result.f == "magnitude_prune";
  TORCH_CHECK_VALUE(
      prunes || (result.f == "linear" && type != "linear_svd"),
      "peft: combination_type must be linear, cat, svd, ties, ties_svd, "
      "dare_linear, dare_linear_svd, dare_ties, dare_ties_svd, "
      "magnitude_prune or magnitude_prune_svd, got '",
      type,
      "'");
  if (prunes) {
    TORCH_CHECK_VALUE(
        options.density(),
        "peft: '",
        type,
        "' keeps a part of the entries; set density(...), a share in (0, 1]");
    functional::check_density(*options.density());
  }
  return result;
}

inline void check(const WeightedAdapterOptions& options) {
  TORCH_CHECK_VALUE(
      !options.svd_rank() || *options.svd_rank() > 0,
      "peft: svd_rank must be positive, got ",
      options.svd_rank().value_or(0));
  TORCH_CHECK_VALUE(
      !options.svd_clamp() ||
          (*options.svd_clamp() > 0.0 && *options.svd_clamp() <= 1.0),
      "peft: svd_clamp is a quantile in (0, 1], got ",
      options.svd_clamp().value_or(0));
  TORCH_CHECK_VALUE(
      options.majority_sign_method() == "total" ||
          options.majority_sign_method() == "frequency",
      "peft: majority_sign_method must be 'total' or 'frequency', got '",
      options.majority_sign_method(),
      "'");
}

/// An adapter that takes part, and how much.
struct WeightedAdapter {
  Adapter adapter;
  double weight;

  AdapterState& state() const {
    return *adapter.shared_state();
  }
  /// Its record at a planned place whose delta is a `D`; null for none.
  template <class D>
  const D* delta_at(const PlannedSite& place) const {
    const auto* meta = tag_of(place.tensor);
    for (const auto& record : state().sites) {
      const auto* delta = dynamic_cast<const D*>(record.delta.get());
      if (delta != nullptr && meta != nullptr &&
          record.file_prefix == place.file_prefix &&
          record.site.lock() == meta->site) {
        return delta;
      }
    }
    return nullptr;
  }
};
using WeightedAdapters = std::vector<WeightedAdapter>;

/// The head that one of them trained. Two of one module are refused, as in
/// PEFT.
inline std::shared_ptr<Delta> weighted_copy(
    const WeightedAdapters& parts,
    const PlannedSite& place) {
  std::shared_ptr<Delta> result;
  for (const auto& part : parts) {
    if (const auto* copy = part.delta_at<TrainedCopy>(place)) {
      TORCH_CHECK(
          !result,
          "peft: two of the adapters train '",
          place.name,
          "' whole (modules_to_save), and such copies cannot be combined; "
          "leave one of the adapters out");
      result = copy->copy();
    }
  }
  return result;
}

/// Targets that name what any of these name, where they are of one kind.
inline std::optional<Targets> united(const std::vector<Targets>& all) {
  std::vector<std::string> names;
  std::string pattern;
  for (const auto& targets : all) {
    if (targets.kind() != all.front().kind()) {
      return std::nullopt;
    }
    for (const auto& name : targets.names()) {
      if (std::find(names.begin(), names.end(), name) == names.end()) {
        names.push_back(name);
        pattern += (pattern.empty() ? "(" : "|(") + name + ")";
      }
    }
  }
  switch (all.front().kind()) {
    case Targets::Kind::list:
      return Targets(names);
    case Targets::Kind::regex:
      return Targets::regex(pattern);
    case Targets::Kind::predicate:
      return std::nullopt;
    default:
      return all.front();
  }
}

/// Adds the names that `to` lacks.
inline void unite(
    std::vector<std::string>& to,
    const std::vector<std::string>& names) {
  for (const auto& name : names) {
    if (std::find(to.begin(), to.end(), name) == to.end()) {
      to.push_back(name);
    }
  }
}

} // namespace detail

} // namespace peft
