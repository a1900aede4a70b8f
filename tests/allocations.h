#pragma once

/// What a piece of code allocates, counted exactly.

#include "test.h"

#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

namespace allocations {

/// The size in bytes of every allocation of tensor memory that `f` makes on
/// this thread, in order.
template <class F>
std::vector<int64_t> made_by(F&& f) {
  struct Log : c10::MemoryReportingInfoBase {
    std::vector<int64_t> sizes;

    void reportMemoryUsage(
        void* /*pointer*/,
        int64_t size,
        size_t /*total*/,
        size_t /*reserved*/,
        c10::Device /*device*/) override {
      if (size > 0) { // else memory was given back
        sizes.push_back(size);
      }
    }
    bool memoryProfilingEnabled() const override {
      return true;
    }
  };
  const auto log = std::make_shared<Log>();
  c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, log);
  f();
  return log->sizes;
}

/// How many of them take `bytes` or more.
inline int64_t at_least(const std::vector<int64_t>& sizes, int64_t bytes) {
  return std::count_if(
      sizes.begin(), sizes.end(), [&](int64_t size) { return size >= bytes; });
}

} // namespace allocations
