#pragma once

// The effective weight W', kept between calls of a network that is evaluated
// with unmerged adapters. It is good for as long as everything it was made of
// is what it was: the version counters tell.

#include <peft/functional/stamp.h>

#include <c10/util/SmallVector.h>
#include <torch/types.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

namespace peft {

using torch::Tensor;

namespace detail {

/// What a value was made of: tensors, and deltas with their scales.
class Recipe {
 public:
  void add(const Tensor& t) {
    tensors_.push_back(functional::Stamp::of(t));
    is_known_ = is_known_ && tensors_.back();
  }
  void add(const void* delta, double scale) {
    deltas_.emplace_back(delta, scale);
  }
  /// Whether a change of any part would show.
  bool is_known() const {
    return is_known_;
  }
  bool operator==(const Recipe& other) const {
    return deltas_ == other.deltas_ && tensors_ == other.tensors_;
  }

 private:
  c10::SmallVector<std::optional<functional::Stamp>, 4> tensors_;
  c10::SmallVector<std::pair<const void*, double>, 2> deltas_;
  bool is_known_ = true;
};

/// A place for one value. Any number of threads may use it.
class KeptValue {
 public:
  /// The value made by `recipe`, or an undefined tensor.
  Tensor find(const Recipe& recipe) const {
    if (!present_.load(std::memory_order_relaxed)) {
      return {};
    }
    const auto kept = get();
    return kept && kept->value.defined() && recipe.is_known() &&
            kept->recipe == recipe && kept->value._version() == kept->version
        ? kept->value
        : Tensor();
  }

  /// Keeps `value` when the same was made before: what is read once is not
  /// worth its memory.
  void offer(Recipe recipe, const Tensor& value) const {
    if (!recipe.is_known() || value.is_inference()) {
      return;
    }
    const auto before = get();
    auto kept = std::make_shared<Entry>();
    if (before && before->recipe == recipe) {
      kept->value = value;
      kept->version = value._version();
    }
    kept->recipe = std::move(recipe);
    std::lock_guard<std::mutex> lock(mutex_);
    entry_ = std::move(kept);
    present_.store(true, std::memory_order_relaxed);
  }

  /// Lets go of the value, when training begins or somebody else holds it.
  void drop() const {
    if (present_.load(std::memory_order_relaxed)) {
      std::lock_guard<std::mutex> lock(mutex_);
      entry_.reset();
      present_.store(false, std::memory_order_relaxed);
    }
  }

 private:
  struct Entry {
    Recipe recipe;
    Tensor value; // undefined the first time
    uint32_t version = 0;
  };
  std::shared_ptr<const Entry> get() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return entry_;
  }

  mutable std::mutex mutex_;
  mutable std::shared_ptr<const Entry> entry_;
  mutable std::atomic<bool> present_{false};
};

} // namespace detail

} // namespace peft
