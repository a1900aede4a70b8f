#pragma once

/// Exact accounting of tensor memory on the CPU: no clocks, no noise.

#include <ATen/Parallel.h>
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace accounting {

/// Counts, while it lives, what this thread allocates and frees for tensors,
/// backward passes included. One thread computes meanwhile: the memory of
/// others is not seen.
class Memory {
 public:
  Memory() : threads_(at::get_num_threads()) {
    at::set_num_threads(1);
  }
  ~Memory() {
    at::set_num_threads(threads_);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  /// Bytes of all allocations together.
  int64_t allocated() const {
    int64_t sum = 0;
    for (const int64_t size : log_->sizes) {
      sum += size;
    }
    return sum;
  }
  /// Bytes that were allocated here and not freed yet.
  int64_t held() const {
    return log_->held;
  }
  /// The most that was held at a time.
  int64_t peak() const {
    return log_->peak;
  }
  /// The sizes of the allocations in bytes, in order.
  const std::vector<int64_t>& sizes() const {
    return log_->sizes;
  }
  /// The sizes of at least `bytes`.
  std::vector<int64_t> of_at_least(int64_t bytes) const {
    std::vector<int64_t> result;
    for (const int64_t size : log_->sizes) {
      if (size >= bytes) {
        result.push_back(size);
      }
    }
    return result;
  }

 private:
  /// LibTorch's allocators report to what stands where a profiler would.
  struct Log : c10::MemoryReportingInfoBase {
    void reportMemoryUsage(
        void* /*data*/,
        int64_t change,
        size_t /*allocated*/,
        size_t /*reserved*/,
        c10::Device /*device*/) override {
      held += change;
      peak = std::max(peak, held);
      if (change > 0) {
        sizes.push_back(change);
      }
    }
    bool memoryProfilingEnabled() const override {
      return true;
    }

    int64_t held = 0, peak = 0;
    std::vector<int64_t> sizes;
  };

  int threads_;
  std::shared_ptr<Log> log_ = std::make_shared<Log>();
  c10::DebugInfoGuard guard_{c10::DebugInfoKind::PROFILER_STATE, log_};
};

/// The size in bytes of every allocation that `f` makes on this thread.
template <class F>
std::vector<int64_t> sizes_of(F&& f) {
  const Memory memory;
  f();
  return memory.sizes();
}

/// How many of them take `bytes` or more.
inline int64_t at_least(const std::vector<int64_t>& sizes, int64_t bytes) {
  return std::count_if(
      sizes.begin(), sizes.end(), [&](int64_t size) { return size >= bytes; });
}

} // namespace accounting
