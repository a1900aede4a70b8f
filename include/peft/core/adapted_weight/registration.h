#pragma once

// The kernels enter PyTorch's dispatcher on the first attach, once a process,
// and are never taken out.

#include <peft/core/adapted_weight/fallback.h>
#include <peft/core/adapted_weight/kernels.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <chrono>
#include <string>
#include <thread>

namespace peft {

namespace detail {

/// True once kernels of this version stand in the dispatcher; an error when
/// another version's do.
inline bool find_registration() {
  auto marker = c10::Dispatcher::singleton().findSchema({"peft::_abi", ""});
  if (!marker) {
    return false;
  }
  torch::jit::Stack stack;
  marker->callBoxed(&stack);
  TORCH_CHECK(
      stack[0].toInt() == kAdaptedAbi,
      "peft: two libraries of this process were built with incompatible "
      "versions of libpeft (",
      stack[0].toInt(),
      " and ",
      kAdaptedAbi,
      "); build them with the same one");
  return true;
}

/// The libraries are leaked: there is no safe order at exit.
inline void register_kernels() {
  auto* any = new torch::Library(
      torch::Library::IMPL, "_", kAdaptedKey, __FILE__, __LINE__);
  any->fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
  auto* aten = new torch::Library(
      torch::Library::IMPL, "aten", kAdaptedKey, __FILE__, __LINE__);
  aten->impl("linear", TORCH_FN(linear_kernel));
  aten->impl("matmul", TORCH_FN(matmul_kernel));
  aten->impl("mm", TORCH_FN(mm_kernel));
  aten->impl("addmm", TORCH_FN(addmm_kernel));
  aten->impl("add_.Tensor", TORCH_FN(add__kernel));
  aten->impl("embedding", TORCH_FN(embedding_kernel));
  aten->impl("embedding_renorm_", TORCH_FN(embedding_renorm__kernel));
  for (const char* name : {"conv1d", "conv2d", "conv3d"}) {
    aten->impl(name, TORCH_FN(convolution_kernel));
    aten->impl(
        (std::string(name) + ".padding").c_str(),
        TORCH_FN(convolution_padding_kernel));
  }
  aten->impl("_convolution", TORCH_FN(traced_convolution_kernel));
  aten->impl("layer_norm", TORCH_FN(layer_norm_kernel));
  aten->impl("t", TORCH_FN(t_kernel));
  aten->impl("to.device", TORCH_FN(to_device_kernel));
  aten->impl("to.dtype", TORCH_FN(to_dtype_kernel));
  aten->impl("to.dtype_layout", TORCH_FN(to_dtype_layout_kernel));
  aten->impl("to.other", TORCH_FN(to_other_kernel));
  aten->impl("type_as", TORCH_FN(type_as_kernel));
  aten->impl("detach", TORCH_FN(detach_kernel));
  aten->impl(
      "_has_compatible_shallow_copy_type",
      TORCH_FN(has_compatible_shallow_copy_type_kernel));
  auto* own = new torch::Library(
      torch::Library::FRAGMENT, "peft", std::nullopt, __FILE__, __LINE__);
  own->def("_abi() -> int", []() -> int64_t { return kAdaptedAbi; });
}

inline void ensure_registered() {
  static const bool once = [] {
    if (find_registration()) {
      return true;
    }
    try {
      TORCH_CHECK(
          !c10::Dispatcher::singleton().hasBackendFallbackForDispatchKey(
              kAdaptedKey));
      register_kernels();
    } catch (const c10::Error&) {
      // Another copy of libpeft may be registering at this very moment; it
      // sets its marker last.
      for (int i = 0; i < 200 && !find_registration(); ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
      }
      TORCH_CHECK(
          find_registration(),
          "peft: another library owns the dispatch key ",
          c10::toString(kAdaptedKey),
          " in this process; compile with "
          "-DPEFT_DISPATCH_KEY=TESTING_ONLY_GenericWrapper");
    }
    return true;
  }();
  (void)once;
}

} // namespace detail

} // namespace peft
