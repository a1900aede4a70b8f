#pragma once

// AdapterDrop (Rücklé et al. 2020, arXiv:2010.11918): leave the adapters of the
// first layers out. For good, by a method's leave_out; or for some calls, by
// this scope:
//
//   for (auto& batch : *loader) {            // robust to any number later
//     peft::AdapterDrop drop(torch::randint(12, {1}).item<int64_t>());
//     loss(model->forward(batch.data), batch.target).backward();
//     ...
//   }

#include <c10/util/Exception.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <cstdint>
#include <memory>

namespace peft {

namespace detail {

/// How many layers this thread leaves out. It travels as ActiveInfo does, so
/// that autograd's threads and those of a pool know it too.
struct DropInfo : c10::DebugInfoBase {
  explicit DropInfo(int64_t count_) : count(count_) {}
  int64_t count;
};

inline c10::DebugInfoKind drop_info_kind() {
  return c10::DebugInfoKind::TEST_INFO; // torch defines it for tests only
}

/// Whether an AdapterDrop leaves this layer's adapters out of the call at hand.
inline bool is_dropped(int64_t layer) {
  const auto* info = dynamic_cast<const DropInfo*>(
      c10::ThreadLocalDebugInfo::get(drop_info_kind()));
  return info != nullptr && layer >= 0 && layer < info->count;
}

} // namespace detail

/// Until the end of the scope, and for this thread, the bottleneck adapters of
/// the first `layers` layers (counted through all stacks) do nothing: nothing
/// is computed there, and backward stops above. Layer norms that were trained
/// with them stay. Hold it over backward too where layers are computed again
/// there.
class AdapterDrop {
 public:
  explicit AdapterDrop(int64_t layers)
      : guard_(
            detail::drop_info_kind(),
            std::make_shared<detail::DropInfo>(checked(layers))) {}

  AdapterDrop(const AdapterDrop&) = delete;
  AdapterDrop& operator=(const AdapterDrop&) = delete;

 private:
  static int64_t checked(int64_t layers) {
    TORCH_CHECK_VALUE(
        layers >= 0,
        "peft: AdapterDrop leaves out 0 layers or more, got ",
        layers);
    return layers;
  }

  c10::DebugInfoGuard guard_;
};

} // namespace peft
