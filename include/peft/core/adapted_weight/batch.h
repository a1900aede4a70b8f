#pragma once

// Mixed batches (core/active.h: BatchAdapters): who takes part in one call of
// an operator, for all rows or for each group of rows, and how a batch is taken
// apart and put together again.

#include <peft/core/site.h>

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// The deltas that take part in one call: the same ones for all rows, or in a
/// mixed batch those of each group.
struct Participants {
  ActiveEntries everywhere;
  /// Empty, or as many as rows->groups.
  std::vector<ActiveEntries> groups;
  const RowGroups* rows = nullptr;

  bool empty() const {
    return everywhere.empty() && groups.empty();
  }

  template <class Capability>
  bool all_have(Capability capability) const {
    const auto have = [&](const ActiveEntries& entries) {
      for (const auto& entry : entries) {
        if (!(entry.delta->*capability)()) {
          return false;
        }
      }
      return true;
    };
    for (const auto& group : groups) {
      if (!have(group)) {
        return false;
      }
    }
    return have(everywhere) && !empty();
  }
};

/// Who takes part where `tensor` is used: weight deltas, or output transforms.
inline Participants
participants(const Site& site, const Tensor& tensor, bool outputs = false) {
  Participants result;
  const RowGroups* rows = mixed_rows();
  if (rows == nullptr) {
    result.everywhere =
        outputs ? site.active_outputs(tensor) : site.active(tensor);
    return result;
  }
  for (const auto& entry : site.entries) {
    const AdapterState& adapter = *entry.adapter;
    if (site.is_merged_into(adapter, tensor)) {
      Site::refuse_left_out(adapter);
    }
    const auto group = rows->by_name.find(adapter.name);
    if (group == rows->by_name.end() ||
        entry.delta->transforms_output() != outputs) {
      continue;
    }
    result.groups.resize(rows->groups.size());
    result.rows = rows;
    result.groups[group->second].push_back(
        {entry.delta.get(), adapter.scale.load(std::memory_order_relaxed)});
  }
  return result;
}

/// Within this scope only the adapter of one group acts, as on a batch of these
/// rows alone.
class GroupScope {
 public:
  explicit GroupScope(const RowGroups::Group& group)
      : guard_(active_info_kind(), std::make_shared<ActiveInfo>(&group)) {}

 private:
  c10::DebugInfoGuard guard_;
};

/// A convolution's batch stands in front, wherever the network's does.
class BatchInFront {
 public:
  BatchInFront() {
    const RowGroups* rows = mixed_rows();
    if (rows != nullptr && rows->dim != 0) {
      auto moved = std::make_unique<RowGroups>(*rows);
      moved->dim = 0;
      guard_.emplace(
          active_info_kind(), std::make_shared<ActiveInfo>(std::move(moved)));
    }
  }

 private:
  std::optional<c10::DebugInfoGuard> guard_;
};

/// Where the rows of a batch lie in the tensors of one call.
class RowSplit {
 public:
  /// `t` has `features` dimensions at its end that are no batch.
  RowSplit(const RowGroups& rows, const Tensor& t, int64_t features)
      : rows_(rows), dim_(rows.dim) {
    const int64_t leading = t.dim() - features;
    if (leading == 1 && t.size(0) == rows.count) {
      dim_ = 0;
      return;
    }
    if (leading >= 2 && t.size(dim_) == rows.count) {
      return;
    }
    is_flat_ = leading == 1 && t.dim() <= 2 && t.size(0) % rows.count == 0;
    TORCH_CHECK(
        is_flat_,
        "peft: BatchAdapters names ",
        rows.count,
        " rows with the batch in dimension ",
        dim_,
        ", and an adapter acts where the input is ",
        t.sizes(),
        leading <= 1 && t.dim() <= 2
            ? ", no multiple of that many rows"
            : ", which has another number of rows there",
        "; give one name for each row of the batch, and say "
        "BatchAdapters(names, /*dim=*/1) where the sequence comes first");
    repeats_ = t.size(0) / rows.count;
  }

  /// The parts of `t`, one a group.
  std::vector<Tensor> split(const Tensor& t) const {
    Tensor batch = is_flat_ ? t.unflatten(0, flat_sizes(rows_.count)) : t;
    if (!rows_.is_sorted()) {
      batch = batch.index_select(dim_, index(order(), t.device()));
    }
    std::vector<int64_t> sizes;
    for (const auto& group : rows_.groups) {
      sizes.push_back(static_cast<int64_t>(group.rows.size()));
    }
    auto parts = batch.split_with_sizes(sizes, dim_);
    if (is_flat_) {
      for (auto& part : parts) {
        part = part.flatten(0, 1);
      }
    }
    return parts;
  }

  /// The batch of these parts.
  Tensor join(std::vector<Tensor> parts) const {
    if (is_flat_) {
      for (size_t g = 0; g < parts.size(); ++g) {
        const auto size = static_cast<int64_t>(rows_.groups[g].rows.size());
        parts[g] = parts[g].unflatten(0, flat_sizes(size));
      }
    }
    Tensor batch = at::cat(parts, dim_);
    if (!rows_.is_sorted()) {
      const auto sorted = order();
      std::vector<int64_t> back(sorted.size());
      for (size_t i = 0; i < sorted.size(); ++i) {
        back[sorted[i]] = static_cast<int64_t>(i);
      }
      batch = batch.index_select(dim_, index(back, batch.device()));
    }
    return is_flat_ ? batch.flatten(0, 1) : batch;
  }

  /// `[groups, c]`, a vector a group, as `[..., c, ...]` that can be added to a
  /// tensor of `dims` dimensions with the channels in dimension `channel`.
  Tensor spread(const Tensor& by_group, int64_t dims, int64_t channel) const {
    std::vector<int64_t> group_of(rows_.count);
    for (const auto& run : rows_.runs) {
      for (int64_t row = run.begin; row < run.end; ++row) {
        group_of[row] = static_cast<int64_t>(run.group);
      }
    }
    const Tensor rows =
        by_group.index_select(0, index(group_of, by_group.device()));
    if (is_flat_) {
      auto sizes = flat_sizes(rows_.count);
      sizes.push_back(rows.size(1));
      return rows.unsqueeze(1 - dim_).expand(sizes).flatten(0, 1);
    }
    std::vector<int64_t> shape(dims, 1);
    shape[dim_] = rows_.count;
    shape[channel] = rows.size(1);
    return rows.view(shape);
  }

  /// How many neighbouring rows of a matrix each name stands for, where the
  /// rows of `t` are such; else 0.
  int64_t rows_a_name(const Tensor& t) const {
    const bool together =
        is_flat_ ? dim_ == 0 || repeats_ == 1 : dim_ == 0 || t.size(0) == 1;
    return together && t.size(-1) > 0 ? t.numel() / t.size(-1) / rows_.count
                                      : 0;
  }

 private:
  /// A flattened batch of `size` rows, unflattened.
  std::vector<int64_t> flat_sizes(int64_t size) const {
    return dim_ == 0 ? std::vector<int64_t>{size, repeats_}
                     : std::vector<int64_t>{repeats_, size};
  }

  std::vector<int64_t> order() const {
    std::vector<int64_t> result;
    for (const auto& group : rows_.groups) {
      result.insert(result.end(), group.rows.begin(), group.rows.end());
    }
    return result;
  }

  static Tensor index(const std::vector<int64_t>& values, at::Device device) {
    return at::tensor(values, at::kLong).to(device);
  }

  const RowGroups& rows_;
  int64_t dim_;
  bool is_flat_ = false; // sequence and batch in one dimension
  int64_t repeats_ = 1; // then: tokens a row
};

/// `run` on each group's rows of `x`, as on a batch of these rows alone.
template <class Run>
Tensor by_group(
    const RowGroups& rows,
    const Tensor& x,
    int64_t features,
    const Run& run) {
  const RowSplit split(rows, x, features);
  auto parts = split.split(x);
  for (size_t g = 0; g < parts.size(); ++g) {
    const GroupScope scope(rows.groups[g]);
    parts[g] = run(parts[g]);
  }
  return split.join(std::move(parts));
}

/// `transform(deltas, y)` on the result of an operator, in a mixed batch on the
/// rows of each group that has deltas here.
template <class Transform>
Tensor for_each_group(
    const Participants& active,
    const Tensor& y,
    const Transform& transform) {
  if (active.rows == nullptr) {
    return transform(active.everywhere, y);
  }
  const RowSplit split(*active.rows, y, /*features=*/1);
  auto parts = split.split(y);
  for (size_t g = 0; g < parts.size(); ++g) {
    if (!active.groups[g].empty()) {
      const GroupScope scope(active.rows->groups[g]);
      parts[g] = transform(active.groups[g], parts[g]);
    }
  }
  return split.join(std::move(parts));
}

/// A movable view of neighbouring rows of a contiguous tensor [*, columns],
/// which costs no operator a move. For reading and writing without gradients.
class RowWindow {
 public:
  explicit RowWindow(const Tensor& t)
      : columns_(t.size(-1)), begin_(t.storage_offset()) {
    at::AutoDispatchBelowADInplaceOrView guard;
    view_ = t.as_strided({1, columns_}, {columns_, 1});
  }

  const Tensor& at_rows(int64_t begin, int64_t end) {
    auto* impl = view_.unsafeGetTensorImpl();
    impl->set_sizes_contiguous({end - begin, columns_});
    impl->set_storage_offset(begin_ + begin * columns_);
    return view_;
  }

 private:
  int64_t columns_;
  int64_t begin_;
  Tensor view_;
};

} // namespace detail

} // namespace peft
