#pragma once

// The backbone of a side network is frozen, so a sample's states are the same
// in every epoch:
//
//   peft::ActivationCache cache;            // in memory; cache("folder") on
//   disk model->eval();                          // the backbone without
//   dropout adapter.train(); for (each batch) {
//     auto scope = cache.use(sample_ids);   // one id for each row
//     auto logits = model->forward(ids, mask);
//     ...
//   }
//
// Where all rows are known the layers do not run. Otherwise the whole batch
// runs, and the new rows are remembered, each without its padding.

#include <peft/core/layer_loop.h>
#include <peft/methods/ladder/activation_store.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// What a frozen backbone has made of samples, for ladder side tuning. Cheap to
/// copy; threads may share one.
///
/// It knows the weights of the network, adapters on them included, and refuses
/// states of others; it also compares what goes into the first layer. It does
/// not know of prefixes or of what other methods do between layers, and has no
/// place around a decoder that writes token by token.
class ActivationCache {
 public:
  explicit ActivationCache(ActivationCacheOptions options = {})
      : store_(std::make_shared<detail::ActivationStore>(std::move(options))) {}
  explicit ActivationCache(const char* folder)
      : ActivationCache(ActivationCacheOptions(folder)) {}

  /// For as long as it lives, this thread's forwards are of the batch `ids`.
  class Scope {
   public:
    Scope(
        std::shared_ptr<detail::ActivationStore> store,
        std::vector<int64_t> ids)
        : store_(std::move(store)), ids_(std::move(ids)), outer_(current()) {
      current() = this;
    }
    ~Scope() {
      current() = outer_;
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

    /// The innermost of this thread, or null.
    static Scope*& current() {
      thread_local Scope* scope = nullptr;
      return scope;
    }
    detail::ActivationStore& store() const {
      return *store_;
    }
    const std::vector<int64_t>& ids() const {
      return ids_;
    }

   private:
    std::shared_ptr<detail::ActivationStore> store_;
    std::vector<int64_t> ids_;
    Scope* outer_;
  };

  /// `sample_ids` names the rows of the batches to come, the same in every
  /// epoch.
  [[nodiscard]] Scope use(std::vector<int64_t> sample_ids) const {
    return Scope(store_, std::move(sample_ids));
  }

  /// States held, one for each sample and stack.
  int64_t size() const {
    return store_->size();
  }
  /// Their bytes, in memory or on disk.
  int64_t bytes() const {
    return store_->bytes();
  }
  /// Forgets all of them, files included.
  void clear() {
    store_->clear();
  }

 private:
  std::shared_ptr<detail::ActivationStore> store_;
};

namespace detail {

/// Names and shapes of the layers' weights and a few entries of each.
inline std::string fingerprint(const LayerLoopRun& loop) {
  torch::NoGradGuard no_grad;
  std::string shapes;
  std::vector<Tensor> entries;
  for (const auto& layer : loop.layers) {
    for (const auto& [name, tensor] : base_parameters(*layer)) {
      shapes += name + c10::str(tensor.sizes(), tensor.scalar_type());
      if (tensor.numel() > 0) {
        const Tensor flat = tensor.flatten();
        entries.push_back(
            flat.slice(
                    0, 0, flat.numel(), std::max<int64_t>(flat.numel() / 8, 1))
                .to(at::kDouble));
      }
    }
  }
  uint64_t hash = hash_bytes(shapes.data(), shapes.size());
  if (!entries.empty()) {
    const Tensor values = at::cat(entries).cpu();
    hash = hash_bytes(values.const_data_ptr(), values.nbytes(), hash);
  }
  return std::to_string(hash);
}

/// One forward's batch under a scope: its rows, without their padding.
class CachedBatch {
 public:
  CachedBatch(
      const ActivationCache::Scope& scope,
      const std::string& stack,
      const Tensor& hidden,
      const LayerLoopRun& loop)
      : store_(scope.store()),
        ids_(scope.ids()),
        stack_(stack),
        hidden_(hidden.detach()),
        mask_(loop.attention_mask),
        network_(fingerprint(loop)) {
    TORCH_CHECK(
        static_cast<int64_t>(ids_.size()) == hidden.size(0),
        "peft: ActivationCache::use() got ",
        ids_.size(),
        " sample ids for a batch of ",
        hidden.size(0));
    for (const auto& layer : loop.layers) {
      TORCH_CHECK(
          !layer->is_training(),
          "peft: an ActivationCache needs the backbone in evaluation mode, for "
          "dropout would make other states each time; call model->eval() and "
          "then train() of the adapter");
    }
  }

  size_t rows() const {
    return ids_.size();
  }

  /// The states of row `b`, or nothing; an error where the sample is another.
  std::optional<SampleStates> read(size_t b) const {
    auto states = store_.read(stack_, ids_[b], network_);
    if (!states) {
      return std::nullopt;
    }
    const auto first = states->find(0);
    const Tensor now = tokens(hidden_, b).to(at::kCPU);
    TORCH_CHECK(
        first != states->end() && first->second.sizes() == now.sizes() &&
            agrees(first->second, now),
        "peft: sample ",
        ids_[b],
        " of the ActivationCache has another input than when it was "
        "remembered; give every sample an id of its own, and an attention mask "
        "where batches are padded");
    return states;
  }

  void write(size_t b, const SampleStates& states) const {
    store_.write(stack_, ids_[b], network_, states);
  }

  /// Row `b` of `state` as it is kept.
  Tensor pack(const Tensor& state, size_t b) const {
    const auto dtype = store_.options.dtype().value_or(state.scalar_type());
    return tokens(state, b).to(at::kCPU, dtype).clone();
  }

  /// Writes what was kept into row `b` of `state`.
  void unpack(const Tensor& kept, Tensor state, size_t b) const {
    Tensor row = state[static_cast<int64_t>(b)];
    const Tensor value = kept.to(row.options());
    if (mask_.defined()) {
      row.index_copy_(0, places(b), value);
    } else {
      row.copy_(value);
    }
  }

 private:
  Tensor places(size_t b) const {
    return mask_[static_cast<int64_t>(b)].nonzero().flatten();
  }
  Tensor tokens(const Tensor& state, size_t b) const {
    const Tensor row = state[static_cast<int64_t>(b)];
    return mask_.defined() ? row.index_select(0, places(b)) : row;
  }

  /// To the rounding of what is kept.
  static bool agrees(const Tensor& kept, const Tensor& now) {
    if (now.numel() == 0) {
      return true;
    }
    const double precision = kept.scalar_type() == at::kBFloat16 ? 2e-2
        : kept.scalar_type() == at::kHalf                        ? 2e-3
                                                                 : 1e-5;
    const Tensor a = kept.to(at::kDouble);
    const Tensor b = now.to(at::kDouble);
    return (a - b).abs().max().item<double>() <=
        precision * b.abs().max().item<double>();
  }

  ActivationStore& store_;
  const std::vector<int64_t>& ids_;
  const std::string& stack_;
  Tensor hidden_;
  const Tensor& mask_;
  std::string network_;
};

/// What the layers of `stack` would make of `hidden`, where this thread's scope
/// knows all that `reads` asks for; the slots of padding are zero.
inline std::optional<std::vector<Tensor>> recall_states(
    const std::string& stack,
    const Tensor& hidden,
    const LayerLoopRun& loop,
    const std::function<bool(size_t)>& reads) {
  const auto* scope = ActivationCache::Scope::current();
  if (scope == nullptr) {
    return std::nullopt;
  }
  torch::NoGradGuard no_grad;
  const CachedBatch batch(*scope, stack, hidden, loop);
  std::vector<Tensor> states(loop.layers.size() + 1);
  states[0] = hidden.detach();
  for (size_t b = 0; b < batch.rows(); ++b) {
    const auto known = batch.read(b);
    for (size_t i = 1; i < states.size(); ++i) {
      if (!reads(i)) {
        continue;
      }
      if (!known || known->count(i) == 0) {
        return std::nullopt;
      }
      if (!states[i].defined()) {
        states[i] = at::zeros_like(states[0]);
      }
      batch.unpack(known->at(i), states[i], b);
    }
  }
  return states;
}

/// Keeps what this thread's scope does not know yet.
inline void remember_states(
    const std::string& stack,
    const std::vector<Tensor>& states,
    const LayerLoopRun& loop) {
  const auto* scope = ActivationCache::Scope::current();
  if (scope == nullptr) {
    return;
  }
  torch::NoGradGuard no_grad;
  const CachedBatch batch(*scope, stack, states.front(), loop);
  for (size_t b = 0; b < batch.rows(); ++b) {
    auto known = batch.read(b).value_or(SampleStates());
    const size_t before = known.size();
    for (size_t i = 0; i < states.size(); ++i) {
      if (states[i].defined() && known.count(i) == 0) {
        known.emplace(i, batch.pack(states[i], b));
      }
    }
    if (known.size() > before) {
      batch.write(b, known);
    }
  }
}

} // namespace detail

} // namespace peft
