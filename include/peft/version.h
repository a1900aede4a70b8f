#pragma once

// The one place of the version; CMake reads it from here.
#define PEFT_VERSION_MAJOR 0
#define PEFT_VERSION_MINOR 1
#define PEFT_VERSION_PATCH 0
#define PEFT_VERSION "0.1.0"

namespace peft {

/// The version of these headers, "major.minor.patch".
inline constexpr const char* version() noexcept {
  return PEFT_VERSION;
}

} // namespace peft
