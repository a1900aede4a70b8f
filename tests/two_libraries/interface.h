#pragma once

/// What each library offers. Plain C names, so that the host can ask for them
/// by dlsym; LibTorch itself is one library that everyone shares.

#include <ATen/ATen.h>

#if defined(_WIN32)
#define TWO_LIBRARIES_EXPORT extern "C" __declspec(dllexport)
#else
#define TWO_LIBRARIES_EXPORT extern "C" __attribute__((visibility("default")))
#endif

/// Hangs an adapter on a 4x4 weight: W' = W + 4 everywhere.
TWO_LIBRARIES_EXPORT void attach_to(const at::Tensor* weight, const char* name);
/// Whether this library's copy of libpeft sees the tag.
TWO_LIBRARIES_EXPORT bool sees_tag(const at::Tensor* weight);
/// The base, as this library's copy sees it.
TWO_LIBRARIES_EXPORT void base_of(const at::Tensor* weight, at::Tensor* result);
