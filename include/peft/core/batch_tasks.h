#pragma once

// Which task each row of a batch is of, for methods whose adapters hold several
// tasks (methods/multitask_prompt.h).

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// Travels as ActiveInfo does (core/active.h).
struct TaskInfo : c10::DebugInfoBase {
  explicit TaskInfo(at::Tensor ids) : task_ids(std::move(ids)) {}
  at::Tensor task_ids; // int64 [rows], or [1] for all rows; on the CPU
};

/// The kind under which the ids travel. Those that torch defines are all taken;
/// they are numbers up to 2.14, of which it has seven, and names from 2.15 on.
template <class Kind = c10::DebugInfoKind>
Kind task_info_kind() {
  if constexpr (std::is_enum_v<Kind>) {
    return static_cast<Kind>(200);
  } else {
    static constexpr std::string_view name = "peft::BatchTasks";
    return Kind(&name);
  }
}

/// The task ids of this thread's batch; undefined outside a BatchTasks.
inline at::Tensor batch_tasks() {
  auto* info = dynamic_cast<const TaskInfo*>(
      c10::ThreadLocalDebugInfo::get(task_info_kind()));
  return info == nullptr ? at::Tensor() : info->task_ids;
}

} // namespace detail

/// Says, for this thread and until the end of the scope, of which task the rows
/// of a batch are: HF PEFT's task_ids.
///
///   peft::BatchTasks scope(2);             // all rows are of task 2
///   peft::BatchTasks scope({0, 0, 2, 1});  // a task a row
///   peft::BatchTasks scope(batch.task_ids);
///
/// Nothing is written to the model, of nested scopes the inner one counts, and
/// other threads are not touched. A single task is one for all rows. Every
/// adapter that the thread runs and that holds several tasks sees the same ids.
class BatchTasks {
 public:
  explicit BatchTasks(int64_t task)
      : BatchTasks(at::full({1}, task, at::kLong)) {}
  explicit BatchTasks(const std::vector<int64_t>& tasks)
      : BatchTasks(at::tensor(tasks, at::kLong)) {}
  /// `tasks` int64 [rows], on any device.
  explicit BatchTasks(const at::Tensor& tasks)
      : guard_(detail::task_info_kind(), info_of(tasks)) {}

  BatchTasks(const BatchTasks&) = delete;
  BatchTasks& operator=(const BatchTasks&) = delete;

 private:
  static std::shared_ptr<detail::TaskInfo> info_of(const at::Tensor& tasks) {
    TORCH_CHECK_VALUE(
        tasks.defined() && tasks.dim() == 1 && tasks.numel() > 0 &&
            at::isIntegralType(tasks.scalar_type(), /*includeBool=*/false),
        "peft: BatchTasks takes one task number, or one for each row of the "
        "batch [rows], got ",
        tasks.defined() ? c10::str(tasks.scalar_type(), " ", tasks.sizes())
                        : std::string("nothing"));
    return std::make_shared<detail::TaskInfo>(
        tasks.detach().to(at::kCPU, at::kLong).clone());
  }

  c10::DebugInfoGuard guard_;
};

} // namespace peft
