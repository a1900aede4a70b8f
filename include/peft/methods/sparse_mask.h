#pragma once

// Which entries of which parameters may move: what the sparse methods (FISH
// mask, Child-tuning D, lottery tickets, SHiRA, random masks) have in common.
// Scores say how much an entry matters; a mask is the entries that won.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <c10/util/OptionalArrayRef.h>
#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

namespace peft {

using torch::Tensor;

/// A parameter's full path, and a number for each of its entries. Entries
/// count in row-major order, whatever the strides.
using Scores = std::vector<std::pair<std::string, Tensor>>;

/// A parameter's full path and its shape.
using Shapes = std::vector<std::pair<std::string, std::vector<int64_t>>>;

/// The chosen entries of some parameters.
///
///   peft::SparseMask mask;
///   mask.set("encoder.query.weight", weight.abs() > 0.1);
class SparseMask {
 public:
  struct Entry {
    std::string parameter;
    /// Ascending, each once, on the CPU: places in the row-major tensor.
    Tensor indices;
    /// The parameter's shape, where it is known.
    std::optional<std::vector<int64_t>> sizes;
  };

  /// Chooses the entries of one parameter anew: a bool mask of its shape, or
  /// int64 places in any order; an empty choice takes the parameter out.
  /// `sizes` is the parameter's shape, where the caller knows it.
  void set(
      const std::string& parameter,
      const Tensor& chosen,
      at::OptionalIntArrayRef sizes = std::nullopt) {
    TORCH_CHECK_VALUE(
        chosen.defined() &&
            (chosen.scalar_type() == at::kBool ||
             (chosen.scalar_type() == at::kLong && chosen.dim() == 1)),
        "peft: the mask of '",
        parameter,
        "' must be a bool tensor of the parameter's shape or int64 indices [k] "
        "into the flattened parameter, got ",
        chosen.defined() ? c10::str(chosen.toString(), chosen.sizes())
                         : "nothing");
    const bool is_bool = chosen.scalar_type() == at::kBool;
    Entry entry;
    entry.parameter = parameter;
    if (sizes || is_bool) {
      entry.sizes = sizes ? sizes->vec() : chosen.sizes().vec();
    }
    TORCH_CHECK_VALUE(
        !is_bool || chosen.sizes() == at::IntArrayRef(*entry.sizes),
        "peft: the mask of '",
        parameter,
        "' has shape ",
        chosen.sizes(),
        ", and the parameter ",
        *entry.sizes);
    entry.indices = is_bool ? chosen.reshape({-1}).nonzero().squeeze(1).cpu()
                            : std::get<0>(chosen.detach().cpu().sort());
    check_sorted(entry);
    const auto found =
        std::find_if(entries_.begin(), entries_.end(), [&](const Entry& other) {
          return other.parameter == parameter;
        });
    if (entry.indices.numel() == 0) {
      if (found != entries_.end()) {
        entries_.erase(found);
      }
    } else if (found != entries_.end()) {
      *found = std::move(entry);
    } else {
      entries_.push_back(std::move(entry));
    }
  }

  /// In the order in which the parameters were set.
  const std::vector<Entry>& entries() const {
    return entries_;
  }
  /// How many entries are chosen, of all parameters together.
  int64_t numel() const {
    int64_t count = 0;
    for (const auto& entry : entries_) {
      count += entry.indices.numel();
    }
    return count;
  }
  bool empty() const {
    return entries_.empty();
  }
  /// Of one parameter; an empty tensor where nothing of it is chosen.
  Tensor indices_of(const std::string& parameter) const {
    const auto* entry = find(parameter);
    return entry != nullptr ? entry->indices : at::empty({0}, at::kLong);
  }
  /// Null where nothing of the parameter is chosen.
  const Entry* find(const std::string& parameter) const {
    for (const auto& entry : entries_) {
      if (entry.parameter == parameter) {
        return &entry;
      }
    }
    return nullptr;
  }

  /// An error unless `entry` is one for a parameter of that shape.
  static void check_fits(const Entry& entry, at::IntArrayRef sizes) {
    TORCH_CHECK_VALUE(
        !entry.sizes || sizes == at::IntArrayRef(*entry.sizes),
        "peft: the mask of '",
        entry.parameter,
        "' is one for shape ",
        at::IntArrayRef(*entry.sizes),
        ", and the parameter has ",
        sizes);
    const int64_t size = c10::multiply_integers(sizes);
    const auto last = entry.indices[-1].item<int64_t>();
    TORCH_CHECK_INDEX(
        last < size,
        "peft: the mask of '",
        entry.parameter,
        "' names entry ",
        last,
        ", and the parameter has ",
        size);
  }

 private:
  static void check_sorted(const Entry& entry) {
    const auto& indices = entry.indices;
    const int64_t k = indices.numel();
    if (k == 0) {
      return;
    }
    const auto first = indices[0].item<int64_t>();
    TORCH_CHECK_INDEX(
        first >= 0,
        "peft: the mask of '",
        entry.parameter,
        "' names entry ",
        first);
    if (entry.sizes) {
      check_fits(entry, *entry.sizes);
    }
    TORCH_CHECK_VALUE(
        k == 1 ||
            indices.slice(0, 1)
                .ne(indices.slice(0, 0, k - 1))
                .all()
                .item<bool>(),
        "peft: the mask of '",
        entry.parameter,
        "' names an entry twice");
  }

  std::vector<Entry> entries_;
};

namespace detail {

/// Scores must be numbers, of one tensor each.
inline void check_scores(const Scores& scores) {
  std::unordered_set<std::string> paths;
  for (const auto& [path, score] : scores) {
    TORCH_CHECK_VALUE(
        paths.insert(path).second, "peft: the scores name '", path, "' twice");
    TORCH_CHECK_VALUE(
        score.defined() && score.is_floating_point(),
        "peft: the scores of '",
        path,
        "' must be a floating point tensor, got ",
        score.defined() ? score.toString() : "nothing");
    TORCH_CHECK_VALUE(
        !score.isnan().any().item<bool>(),
        "peft: the scores of '",
        path,
        "' hold NaN, which has no rank; look for where the loss or a gradient "
        "is not finite");
  }
}

inline int64_t numel_of(const Scores& scores) {
  int64_t total = 0;
  for (const auto& item : scores) {
    total += item.second.numel();
  }
  return total;
}

/// 0 < k <= total.
inline void check_budget(int64_t k, int64_t total) {
  TORCH_CHECK_VALUE(
      k > 0,
      "peft: a mask needs at least one entry, got k = ",
      k,
      "; an empty mask trains nothing");
  TORCH_CHECK_VALUE(
      k <= total, "peft: k = ", k, " entries of only ", total, " in all");
}

inline void check_density(double density) {
  TORCH_CHECK_VALUE(
      density > 0 && density <= 1,
      "peft: the density must lie in (0, 1], got ",
      density);
}

/// k of n places, all subsets alike, ascending (Floyd's algorithm: k draws, and
/// memory for k).
inline Tensor sample(int64_t n, int64_t k, at::Generator generator) {
  auto* random = at::check_generator<at::CPUGeneratorImpl>(generator);
  std::unordered_set<int64_t> chosen;
  chosen.reserve(static_cast<size_t>(k));
  for (int64_t j = n - k; j < n; ++j) {
    const auto draw =
        static_cast<int64_t>(random->random64() % static_cast<uint64_t>(j + 1));
    chosen.insert(chosen.count(draw) != 0 ? j : draw);
  }
  Tensor result = at::empty({k}, at::kLong);
  std::copy(chosen.begin(), chosen.end(), result.data_ptr<int64_t>());
  return std::get<0>(result.sort());
}

} // namespace detail

/// The k entries with the highest scores, of all tensors together. Of equal
/// scores those of the earlier tensor win, and in it those that come first.
inline SparseMask top_k(const Scores& scores, int64_t k) {
  detail::check_scores(scores);
  detail::check_budget(k, detail::numel_of(scores));
  torch::NoGradGuard no_grad;
  // No more than k of a tensor can win: the k-th of these is the k-th of all.
  auto dtype = at::kFloat;
  for (const auto& item : scores) {
    dtype = c10::promoteTypes(dtype, item.second.scalar_type());
  }
  std::vector<Tensor> best;
  for (const auto& item : scores) {
    const Tensor flat = item.second.reshape({-1});
    const auto n = std::min(k, flat.numel());
    best.push_back(std::get<0>(flat.topk(n, 0, true, /*sorted=*/false))
                       .to(at::kCPU, dtype));
  }
  const Tensor all = at::cat(best);
  const Tensor threshold =
      std::get<0>(all.kthvalue(all.numel() - k + 1)); // of the k-th largest
  int64_t equal = k - all.gt(threshold).sum().item<int64_t>();

  SparseMask mask;
  for (const auto& [path, score] : scores) {
    const Tensor flat = score.reshape({-1}).to(at::kCPU, dtype);
    Tensor chosen = flat.gt(threshold);
    if (equal > 0) {
      const Tensor ties = flat.eq(threshold).nonzero().squeeze(1);
      const Tensor taken = ties.slice(0, 0, equal);
      chosen.index_fill_(0, taken, true);
      equal -= taken.numel();
    }
    mask.set(path, chosen.view(score.sizes()));
  }
  return mask;
}

/// The best ⌊density · n⌋ of each tensor's n entries, ties as in top_k. Tensors
/// that are too small for one entry are left out; an error where all are.
inline SparseMask top_k_per_tensor(const Scores& scores, double density) {
  detail::check_density(density);
  detail::check_scores(scores);
  SparseMask mask;
  for (const auto& item : scores) {
    const auto k = static_cast<int64_t>(density * item.second.numel());
    if (k > 0) {
      const auto one = top_k({item}, k);
      mask.set(item.first, one.entries()[0].indices, item.second.sizes());
    }
  }
  TORCH_CHECK_VALUE(
      !mask.empty(),
      "peft: a density of ",
      density,
      " is less than one entry of the largest tensor; an empty mask trains "
      "nothing");
  return mask;
}

/// k entries of all tensors together, drawn without replacement: each set of k
/// is as likely as any other.
inline SparseMask random_mask(const Shapes& shapes, int64_t k, uint64_t seed) {
  std::vector<int64_t> ends;
  int64_t total = 0;
  for (const auto& item : shapes) {
    ends.push_back(total += c10::multiply_integers(item.second));
  }
  detail::check_budget(k, total);
  const Tensor all =
      detail::sample(total, k, at::detail::createCPUGenerator(seed));
  SparseMask mask;
  int64_t begin = 0, first = 0;
  for (size_t i = 0; i < shapes.size(); ++i) {
    const auto last = at::searchsorted(all, ends[i]).item<int64_t>();
    mask.set(
        shapes[i].first, all.slice(0, first, last) - begin, shapes[i].second);
    begin = ends[i];
    first = last;
  }
  return mask;
}

/// ⌊density · n⌋ random entries of each tensor's n, as top_k_per_tensor.
inline SparseMask
random_mask_per_tensor(const Shapes& shapes, double density, uint64_t seed) {
  detail::check_density(density);
  const auto generator = at::detail::createCPUGenerator(seed);
  SparseMask mask;
  for (const auto& [path, sizes] : shapes) {
    const int64_t n = c10::multiply_integers(sizes);
    const auto k = static_cast<int64_t>(density * n);
    mask.set(path, detail::sample(n, k, generator), sizes);
  }
  TORCH_CHECK_VALUE(
      !mask.empty(),
      "peft: a density of ",
      density,
      " is less than one entry of the largest tensor; an empty mask trains "
      "nothing");
  return mask;
}

} // namespace peft
