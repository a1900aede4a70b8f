#pragma once

#include <c10/util/Exception.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// What this thread asked for; absent means "every enabled adapter".
/// Carried by c10::ThreadLocalDebugInfo and not by a thread_local, because
/// at::ThreadLocalState hands it on to pool, fork and autograd threads and all
/// shared libraries of a process see the same one.
struct ActiveInfo : c10::DebugInfoBase {
  ActiveInfo(std::vector<std::string> adapters, bool base_only)
      : names(std::move(adapters)), raw_base(base_only) {}

  bool contains(const std::string& name) const {
    return std::find(names.begin(), names.end(), name) != names.end();
  }

  std::vector<std::string> names;
  /// Read what the base holds, merged adapters included (cloning).
  bool raw_base;
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

} // namespace peft
