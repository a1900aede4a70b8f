#pragma once

// The effective weight W', kept between calls of a network that is evaluated
// with unmerged adapters. It is good for as long as everything it was made of
// is what it was: the version counters tell.

#include <c10/util/SmallVector.h>
#include <torch/types.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>

namespace peft {

using torch::Tensor;

namespace detail {

/// What a value was made of: tensors by place and version, and numbers.
class Recipe {
 public:
  void add(const Tensor& t) {
    if (t.is_inference()) { // counts no versions
      is_known_ = false;
      return;
    }
    parts_.emplace_back(t.const_data_ptr(), t._version());
  }
  void add(const void* what, double number) {
    uint64_t bits = 0;
    static_assert(sizeof(bits) == sizeof(number), "peft: unusual double");
    std::memcpy(&bits, &number, sizeof(bits));
    parts_.emplace_back(what, bits);
  }
  /// Whether a change of any part would show.
  bool is_known() const {
    return is_known_;
  }
  bool operator==(const Recipe& other) const {
    return parts_ == other.parts_;
  }

 private:
  c10::SmallVector<std::pair<const void*, uint64_t>, 8> parts_;
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
    return kept && kept->value.defined() && kept->recipe == recipe &&
            kept->value._version() == kept->version
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
