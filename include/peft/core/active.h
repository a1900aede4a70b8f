#pragma once

#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// The rows of a mixed batch by adapter, in the order in which the adapters are
/// first named.
struct RowGroups {
  struct Group {
    std::optional<std::string> adapter; // none: the frozen network
    c10::SmallVector<int64_t, 4> rows;

    /// What an ActiveAdapters for these rows would be given.
    std::vector<std::string> names() const {
      return adapter ? std::vector<std::string>{*adapter}
                     : std::vector<std::string>{};
    }
  };
  /// Neighbouring rows [begin, end) of one group.
  struct Run {
    int64_t begin, end;
    size_t group;
  };

  RowGroups(const std::vector<std::string>& names, int64_t batch_dim)
      : count(static_cast<int64_t>(names.size())), dim(batch_dim) {
    by_name.reserve(names.size());
    for (int64_t row = 0; row < count; ++row) {
      const auto [found, is_new] =
          by_name.try_emplace(names[row], groups.size());
      const size_t group = found->second;
      if (is_new) {
        groups.emplace_back();
        if (names[row] != "__base__") {
          groups.back().adapter = names[row];
        }
      }
      groups[group].rows.push_back(row);
      if (runs.empty() || runs.back().group != group) {
        runs.push_back({row, row, group});
      }
      runs.back().end = row + 1;
    }
    std::stable_sort(runs.begin(), runs.end(), [](const Run& a, const Run& b) {
      return a.group < b.group;
    });
    by_name.erase("__base__");
  }

  /// Whether the rows of every group stand together.
  bool is_sorted() const {
    return runs.size() == groups.size();
  }

  int64_t count; // rows of the batch
  int64_t dim; // where they stand: 0, or 1 behind the sequence
  std::vector<Group> groups;
  std::vector<Run> runs; // by group: its adapter is in the cache for the next
  std::unordered_map<std::string, size_t> by_name; // without "__base__"
};

/// What this thread asked for; absent means "every enabled adapter".
/// Carried by c10::ThreadLocalDebugInfo and not by a thread_local, because
/// at::ThreadLocalState hands it on to pool, fork and autograd threads and all
/// shared libraries of a process see the same one.
struct ActiveInfo : c10::DebugInfoBase {
  ActiveInfo(std::vector<std::string> adapters, bool base_only)
      : names(std::move(adapters)), raw_base(base_only) {}
  explicit ActiveInfo(std::unique_ptr<const RowGroups> mixed)
      : raw_base(false), rows(std::move(mixed)) {}
  /// For the rows of `group_` alone, which outlives this.
  explicit ActiveInfo(const RowGroups::Group* group_)
      : names(group_->names()), raw_base(false), group(group_) {}

  /// Whether the adapter takes part, in a mixed batch for some rows.
  bool contains(const std::string& name) const {
    return rows ? rows->by_name.count(name) != 0
                : std::find(names.begin(), names.end(), name) != names.end();
  }

  std::vector<std::string> names;
  /// Read what the base holds, merged adapters included (cloning).
  bool raw_base;
  /// The rows of a mixed batch; null where one choice counts for all.
  std::unique_ptr<const RowGroups> rows;
  /// The rows of a mixed batch that this is for, where it is for some of them.
  const RowGroups::Group* group = nullptr;
};

/// The kind under which the choice travels; torch defines it for tests only, so
/// no released profiler or executor claims it.
inline c10::DebugInfoKind active_info_kind() {
  return c10::DebugInfoKind::TEST_INFO_2; // not a constant from 2.15 on
}

inline const ActiveInfo* active_info() {
  auto* info = c10::ThreadLocalDebugInfo::get(active_info_kind());
  return info == nullptr ? nullptr : dynamic_cast<const ActiveInfo*>(info);
}

/// The rows' groups where this thread runs a mixed batch, else null.
inline const RowGroups* mixed_rows() {
  const ActiveInfo* info = active_info();
  return info == nullptr ? nullptr : info->rows.get();
}

/// Within this scope every adapted weight reads as the bare tensor it is.
class RawBaseScope {
 public:
  RawBaseScope()
      : guard_(
            active_info_kind(),
            std::make_shared<ActiveInfo>(std::vector<std::string>{}, true)) {}

 private:
  c10::DebugInfoGuard guard_;
};

} // namespace detail

/// Chooses, for this thread and until the end of the scope, which adapters
/// take part. Other threads are not touched; nothing is written to the model.
///
///   peft::ActiveAdapters scope({"german", "legal"});  // these two, stacked
///   peft::ActiveAdapters base({});                    // the frozen network
///
/// Updates of weights add up; of trained copies (BitFit, modules_to_save) at
/// one parameter the one attached last counts.
///
/// Overrides enable() and disable(); names that a weight does not carry are
/// passed over, so a scope may serve several models.
class ActiveAdapters {
 public:
  explicit ActiveAdapters(std::vector<std::string> names)
      : guard_(
            detail::active_info_kind(),
            std::make_shared<detail::ActiveInfo>(std::move(names), false)) {}

  ActiveAdapters(const ActiveAdapters&) = delete;
  ActiveAdapters& operator=(const ActiveAdapters&) = delete;

 private:
  c10::DebugInfoGuard guard_;
};

/// Chooses an adapter for each row of a batch, for this thread and until the
/// end of the scope: one pass serves rows of different adapters. The frozen
/// network runs once on the whole batch, then each adapter acts on its rows.
///
///   peft::BatchAdapters scope({"german", "german", "legal", "__base__"});
///
/// "__base__" is the frozen network. As with ActiveAdapters, nothing is written
/// to the model, enable() and disable() do not matter, of nested scopes the
/// inner one counts, and names that a weight does not carry are passed over
/// (its rows are the base's there). Rows that stand together are not copied.
///
/// `dim` is where the batch stands: 0, or 1 in networks that put the sequence
/// first (torch::nn::TransformerEncoder). Where adapters act, an input of three
/// dimensions or more, and indices of two or more, must have as many rows there
/// as there are names; a convolution's batch is the first dimension in any
/// case. A matrix (or indices of one dimension) may be a flattened batch, with
/// a multiple of these rows: under dim 0 each name stands for neighbouring
/// rows, under dim 1 the names repeat. Everything else is an error, as are
/// places that all rows share: prompts, prefixes, the loop over layers, an
/// LSTM's weights. Names that are all the same are an ActiveAdapters.
class BatchAdapters {
 public:
  explicit BatchAdapters(const std::vector<std::string>& names, int64_t dim = 0)
      : guard_(detail::active_info_kind(), info_of(names, dim)) {}

  BatchAdapters(const BatchAdapters&) = delete;
  BatchAdapters& operator=(const BatchAdapters&) = delete;

 private:
  static std::shared_ptr<detail::ActiveInfo> info_of(
      const std::vector<std::string>& names,
      int64_t dim) {
    TORCH_CHECK_VALUE(
        !names.empty(),
        "peft: BatchAdapters takes one name for each row of the batch and got "
        "none; \"__base__\" stands for a row without an adapter");
    TORCH_CHECK_VALUE(
        dim == 0 || dim == 1,
        "peft: BatchAdapters takes the batch in dimension 0, or in 1 where the "
        "sequence comes first, got ",
        dim);
    auto rows = std::make_unique<const detail::RowGroups>(names, dim);
    if (rows->groups.size() == 1) {
      return std::make_shared<detail::ActiveInfo>(
          rows->groups.front().names(), false);
    }
    return std::make_shared<detail::ActiveInfo>(std::move(rows));
  }

  c10::DebugInfoGuard guard_;
};

} // namespace peft
