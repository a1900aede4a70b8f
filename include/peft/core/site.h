#pragma once

#include <peft/core/active.h>
#include <peft/core/delta.h>
#include <peft/core/kept_value.h>

#include <c10/util/SmallVector.h>

#include <any>
#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

struct Site;

/// One place of an adapter: the names it goes by and what acts there.
struct SiteRecord {
  /// The module ("encoder.query"), or the parameter where a module has several
  /// adapted ones ("self_attn.in_proj_weight").
  std::string name;
  /// Every parameter path of the tensor below the attach root; more than one
  /// when it is tied. At a call site, the site's path.
  std::vector<std::string> parameters;
  bool is_call_site = false;
  /// Prefix of the keys in a file, ending without a dot.
  std::string file_prefix;
  std::shared_ptr<Delta> delta;
  /// Which part of a union it belongs to; empty for a single method.
  std::string part;
  /// Owned by the tensor or the call site; gone with the model.
  std::weak_ptr<Site> site;
};

/// requires_grad, before the first attach, of the parameters that carry no tag;
/// a tagged one has it in its TensorRef.
using RequiredGrad =
    std::vector<std::pair<c10::weak_intrusive_ptr<c10::TensorImpl>, bool>>;

/// What all sites of one adapter share. The switches are atomic: other threads
/// may run the model while they are thrown.
struct AdapterState {
  std::string name;
  /// The method in HF's spelling: "LORA", "BITFIT".
  std::string method;
  /// The method's Options struct, for saving.
  std::any options;
  /// adapter_config.json as it was loaded: unknown fields survive a re-save.
  std::string loaded_config;
  std::atomic<bool> enabled{true};
  std::atomic<bool> merged{false};
  std::atomic<double> scale{1.0};
  /// Set once detached; every later use of a handle is an error.
  std::atomic<bool> gone{false};
  std::vector<SiteRecord> sites;
  /// The module whose child keeps the parameters (null under TorchScript).
  std::weak_ptr<torch::nn::Module> registry;
  /// requires_grad of the base before the first attach; the adapters of a model
  /// share it, and the last one to go restores it.
  std::shared_ptr<RequiredGrad> required_grad;
};

/// A tensor that carries a tag, not owned. A weak_intrusive_ptr would keep the
/// tensor's memory, with it the tag, and with that this very reference.
struct TensorRef {
  c10::TensorImpl* impl = nullptr;
  std::weak_ptr<void> alive; // the tag's token
  /// requires_grad before the first attach.
  bool required_grad = false;

  /// The tensor, or an undefined one when it is gone.
  Tensor lock() const {
    const auto token = alive.lock();
    if (!token || c10::raw::intrusive_ptr::use_count(impl) == 0) {
      return {};
    }
    return Tensor(
        c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>::
            reclaim_copy(impl));
  }
};

/// One adapter at one weight.
struct Entry {
  std::shared_ptr<AdapterState> adapter;
  std::shared_ptr<Delta> delta;
};

/// An entry that takes part in the call at hand.
struct ActiveEntry {
  const Delta* delta;
  double scale;
};
using ActiveEntries = c10::SmallVector<ActiveEntry, 4>;

/// Everything that hangs on one adapted tensor (all handles and views of the
/// tensor share it) or at one call site. Changing `entries` needs exclusive
/// access to the model.
struct Site {
  std::vector<Entry> entries;
  /// Shape at attach; another shape means the tensor was changed under us.
  std::vector<int64_t> sizes;
  /// The tensors themselves; several when tied by storage.
  std::vector<TensorRef> tensors;
  /// Base before the first reversible merge, and who was merged since.
  Tensor original;
  std::vector<AdapterState*> merge_order;
  /// The base in the CPU kernels' order (pack_frozen). It stays here when the
  /// base is written to, and is passed over from then on.
  std::shared_ptr<const functional::PackedMatrix> packed;
  /// W' from an earlier call without gradients.
  KeptValue kept;

  /// The deltas that take part for this thread when `tensor` (the adapted
  /// tensor, or the root of a view of it) is used, lowest first.
  ActiveEntries active(const Tensor& tensor) const {
    return select(tensor, /*outputs=*/false);
  }

  /// The output transforms that take part, first applied first.
  ActiveEntries active_outputs(const Tensor& tensor) const {
    return select(tensor, /*outputs=*/true);
  }

  /// Whether `tensor` reads the storage that merges are written to; a copy made
  /// by to() before a merge does not.
  bool holds_storage_of(const Tensor& tensor) const {
    for (const auto& ref : tensors) {
      const Tensor own = ref.lock();
      if (own.defined() && own.is_alias_of(tensor)) {
        return true;
      }
    }
    return false;
  }

  /// Whether the base that `tensor` reads holds the adapter already.
  bool is_merged_into(const AdapterState& adapter, const Tensor& tensor) const {
    return adapter.merged.load(std::memory_order_relaxed) &&
        holds_storage_of(tensor);
  }

  [[noreturn]] static void refuse_left_out(const AdapterState& adapter) {
    TORCH_CHECK(
        false,
        "peft: adapter '",
        adapter.name,
        "' is merged into the base and cannot be left out of this call; "
        "call unmerge() first");
  }

  bool has_output() const {
    for (const auto& entry : entries) {
      if (entry.delta->transforms_output()) {
        return true;
      }
    }
    return false;
  }

  /// A merged adapter that would train if it were not merged, or null.
  const AdapterState* merged_trainable() const {
    for (const auto& entry : entries) {
      if (entry.adapter->merged.load(std::memory_order_relaxed)) {
        for (const auto& p : entry.delta->parameters()) {
          if (p.requires_grad()) {
            return entry.adapter.get();
          }
        }
      }
    }
    return nullptr;
  }

 private:
  /// A mixed batch asks, row by row, through participants() (core/
  /// adapted_weight/batch.h); who asks here has one answer for all rows.
  [[noreturn]] void refuse_some_rows(const AdapterState& adapter) const {
    TORCH_CHECK(
        false,
        "peft: BatchAdapters gives adapter '",
        adapter.name,
        "' to some rows of the batch only, and ",
        tensors.empty()
            ? "it acts in the network's forward (a prompt, a prefix, the loop "
              "over layers), which all rows share"
            : "an operator that does not tell the rows apart reads its weight",
        "; run each adapter's rows as a batch of their own, under "
        "ActiveAdapters");
  }

  ActiveEntries select(const Tensor& tensor, bool outputs) const {
    ActiveEntries result;
    const ActiveInfo* chosen = active_info();
    if (chosen != nullptr && chosen->raw_base) {
      return result;
    }
    for (const auto& entry : entries) {
      const AdapterState& adapter = *entry.adapter;
      const bool wanted = chosen == nullptr
          ? adapter.enabled.load(std::memory_order_relaxed)
          : chosen->contains(adapter.name);
      if (is_merged_into(adapter, tensor)) {
        if (!wanted || (chosen != nullptr && chosen->rows)) {
          refuse_left_out(adapter);
        }
        continue;
      }
      if (wanted && entry.delta->transforms_output() == outputs) {
        if (chosen != nullptr && chosen->rows) {
          refuse_some_rows(adapter);
        }
        result.push_back(
            {entry.delta.get(), adapter.scale.load(std::memory_order_relaxed)});
      }
    }
    return result;
  }
};

} // namespace detail

} // namespace peft
