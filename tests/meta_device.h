#pragma once

#include <torch/library.h>
#include <torch/torch.h>

#include <optional>

/// Within this scope new tensors have shapes and no data, so that a network of
/// any size is made at once: its numbers of parameters can be counted.
class MetaDevice {
 public:
  MetaDevice() : guard_((register_once(), kKey)) {}

 private:
  static constexpr auto kKey = c10::DispatchKey::TESTING_ONLY_GenericMode;

  static at::Tensor empty(
      at::IntArrayRef size,
      std::optional<at::ScalarType> dtype,
      std::optional<at::Layout> layout,
      std::optional<at::Device> /*device*/,
      std::optional<bool> /*pin_memory*/,
      std::optional<at::MemoryFormat> format) {
    c10::impl::ExcludeDispatchKeyGuard guard(kKey);
    return at::empty(
        size, dtype, layout, at::Device(at::kMeta), std::nullopt, format);
  }

  static void register_once() {
    static const bool once = [] {
      auto* all = new torch::Library(
          torch::Library::IMPL, "_", kKey, __FILE__, __LINE__);
      all->fallback(torch::CppFunction::makeFallthrough());
      auto* aten = new torch::Library(
          torch::Library::IMPL, "aten", kKey, __FILE__, __LINE__);
      aten->impl("empty.memory_format", TORCH_FN(empty));
      return true;
    }();
    (void)once;
  }

  c10::impl::IncludeDispatchKeyGuard guard_;
};
