#pragma once

#include <peft/io/pretrained.h>
#include <peft/methods/lora/convert.h>

#include <string>

namespace peft {

/// Writes an adapter of any method that can be merged as a LoRA (HF PEFT's
/// save_as_lora): convert_to_lora(), save(), and off the model again. Returns
/// what was kept; its adapter is detached.
inline LoraConversion save_as_lora(
    const Adapter& adapter,
    const std::string& folder,
    const ConvertToLoraOptions& options = {}) {
  LoraConversion result = convert_to_lora(adapter, options);
  try {
    save(result.adapter, folder);
  } catch (...) {
    result.adapter.detach();
    throw;
  }
  result.adapter.detach();
  return result;
}

} // namespace peft
