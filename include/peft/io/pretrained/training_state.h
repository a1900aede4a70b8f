#pragma once

// What training goes on from and a file of PEFT's has no place for: it stands
// in libpeft_training.safetensors, which PEFT passes over.

#include <peft/core/attach.h>
#include <peft/io/formats/format.h>
#include <peft/io/safetensors.h>

#include <filesystem>
#include <string>

namespace peft {

namespace detail {

/// What the adapter trains and the weights file drops (the network that makes
/// the virtual tokens, say).
inline NamedTensorList training_state(const AdapterState& adapter) {
  NamedTensorList result;
  for (const auto& site : adapter.sites) {
    for (const auto& item : site.delta->all_training_tensors()) {
      result.emplace_back(
          file_key(site.file_prefix, item.first), item.second.detach());
    }
  }
  return result;
}

/// Whether what a delta makes of its state is what the weights file holds.
inline bool makes_the_same(const Tensor& made, const Tensor& stored) {
  const Tensor x = made.detach().to(at::kCPU, at::kDouble);
  const Tensor y = stored.to(at::kCPU, at::kDouble);
  return x.sizes() == y.sizes() &&
      (x.numel() == 0 ||
       (x - y).abs().max().item<double>() <=
           1e-3 * y.abs().max().item<double>());
}

/// Takes that up again where the folder has it; all of it, or nothing.
/// `weights` are those of the weights file. Whether the folder has it.
inline bool fill_training_state(
    Plan& plan,
    const NamedTensorMap& weights,
    const std::string& folder) {
  const auto path = std::filesystem::path(folder) / kTrainingFile;
  if (!std::filesystem::exists(path)) {
    return false;
  }
  const auto tensors = load_safetensors(path.string());
  for (const bool dry_run : {true, false}) {
    for (auto& site : plan.sites) {
      for (const auto& item : site.delta->all_training_tensors()) {
        const auto found = tensors.find(file_key(site.file_prefix, item.first));
        TORCH_CHECK(
            found != tensors.end(),
            "peft: '",
            path.string(),
            "' lacks '",
            file_key(site.file_prefix, item.first),
            "'; remove the file to go on without the state of training");
        const auto misfit =
            site.delta->from_file(item.first, found->second, dry_run);
        TORCH_CHECK(
            misfit.empty(),
            "peft: '",
            found->first,
            "' in '",
            path.string(),
            "': ",
            misfit);
      }
    }
  }
  for (auto& site : plan.sites) {
    for (const auto& item : site.delta->all_file_tensors()) {
      const auto key = file_key(site.file_prefix, item.first);
      const auto found = weights.find(key);
      TORCH_CHECK(
          found == weights.end() ||
              makes_the_same(
                  site.delta->to_file(item.first, item.second), found->second),
          "peft: '",
          path.string(),
          "' does not belong to the weights beside it, it makes another '",
          key,
          "'; one of the two was replaced. Remove the file to go on from the "
          "weights alone");
    }
  }
  return true;
}

} // namespace detail

} // namespace peft
