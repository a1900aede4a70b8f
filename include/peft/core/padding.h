#pragma once

// Which tokens of a batch are padding, for what averages over tokens (the gates
// of UniPELT). No weight sees the mask, so the network's forward opens a scope:
//
//   const peft::PaddingScope padding(attention_mask);  // [batch, tokens]
//
// The networks in models/ do so themselves, for their layers. What comes behind
// those (a language model's head) is outside; a scope around the whole call
// covers it.

#include <peft/core/active.h>

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/tensor.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <torch/types.h>

#include <memory>
#include <string>
#include <utility>

namespace peft {

using torch::Tensor;

namespace detail {

/// An open scope. Carried as the choice of adapters is (core/active.h).
struct PaddingInfo : c10::DebugInfoBase {
  PaddingInfo(Tensor mask_, const PaddingInfo* outer_)
      : mask(std::move(mask_)), outer(outer_) {}

  Tensor mask;
  const PaddingInfo* outer; // lives as long: torch chains the two
};

inline c10::DebugInfoKind padding_info_kind() {
  // Not a constant from 2.15 on. TEST_INFO is AdapterDrop's, TEST_INFO_2 the
  // choice of adapters'; torch itself does not use this one.
  return c10::DebugInfoKind::INFERENCE_CONTEXT;
}

inline const PaddingInfo* padding_info() {
  auto* info = c10::ThreadLocalDebugInfo::get(padding_info_kind());
  return info == nullptr ? nullptr : dynamic_cast<const PaddingInfo*>(info);
}

} // namespace detail

/// Says which tokens are padding, for this thread and until the end of the
/// scope. `attention_mask` `[batch, tokens]` is 1 for a token and 0 for
/// padding; undefined: nothing is padded.
///
/// Of nested scopes the innermost whose shape fits counts; inside one without a
/// mask nothing is padded.
class PaddingScope {
 public:
  explicit PaddingScope(Tensor attention_mask)
      : guard_(
            detail::padding_info_kind(),
            std::make_shared<detail::PaddingInfo>(
                checked(std::move(attention_mask)),
                detail::padding_info())) {}

  PaddingScope(const PaddingScope&) = delete;
  PaddingScope& operator=(const PaddingScope&) = delete;

 private:
  static Tensor checked(Tensor mask) {
    TORCH_CHECK(
        !mask.defined() || mask.dim() == 2,
        "peft: PaddingScope takes a mask [batch, tokens], got ",
        mask.defined() ? mask.sizes() : at::IntArrayRef());
    return mask;
  }

  c10::DebugInfoGuard guard_;
};

namespace detail {

/// The mask `[batch, tokens]` for an input of these sizes, as it was given; an
/// undefined one where all tokens count. A mask of fewer tokens is for the last
/// of them: extra tokens stand in front and count.
inline Tensor padding_of(int64_t batch, int64_t tokens) {
  const PaddingInfo* innermost = padding_info();
  const ActiveInfo* active = active_info();
  const auto* group = active != nullptr ? active->group : nullptr;
  const auto fitting = [&](const Tensor& mask) {
    if (mask.size(0) == batch || group == nullptr ||
        static_cast<int64_t>(group->rows.size()) != batch ||
        group->rows.back() >= mask.size(0)) {
      return mask;
    }
    const at::ArrayRef<int64_t> rows(group->rows.data(), group->rows.size());
    return mask.index_select(0, at::tensor(rows, at::kLong).to(mask.device()));
  };
  std::string open;
  for (const bool exact : {true, false}) {
    for (const auto* info = innermost; info != nullptr; info = info->outer) {
      if (!info->mask.defined()) {
        if (exact) {
          return {};
        }
        break;
      }
      const Tensor mask = fitting(info->mask);
      if (mask.size(0) == batch &&
          (exact ? mask.size(1) == tokens : mask.size(1) < tokens)) {
        return exact ? mask
                     : at::constant_pad_nd(mask, {tokens - mask.size(1), 0}, 1);
      }
      if (exact) {
        open += (open.empty() ? "" : ", ") + c10::str(info->mask.sizes());
      }
    }
  }
  TORCH_CHECK(
      innermost == nullptr,
      "peft: an average over the real tokens of [",
      batch,
      ", ",
      tokens,
      "] finds no padding mask that fits; open is ",
      open,
      ". Open a peft::PaddingScope with the mask of these tokens where they "
      "are used, or average over all of them by average(\"all\")");
  return {};
}

} // namespace detail

} // namespace peft
