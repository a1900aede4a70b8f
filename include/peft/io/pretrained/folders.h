#pragma once

// Where an adapter lies among others: as PEFT's save_pretrained has it, the one
// named "default" at the top of a folder, each other one in a folder of its
// name.

#include <peft/io/formats/format.h>

#include <filesystem>
#include <map>
#include <string>

namespace peft {

namespace detail {

inline bool holds_adapter(const std::filesystem::path& folder) {
  return std::filesystem::is_regular_file(folder / kConfigFile);
}

/// The folders in `folder` that hold an adapter, by their names.
inline std::map<std::string, std::string> adapters_in(
    const std::string& folder) {
  namespace fs = std::filesystem;
  std::map<std::string, std::string> result;
  if (!fs::is_directory(folder)) {
    return result;
  }
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.is_directory() && holds_adapter(entry.path())) {
      result[entry.path().filename().string()] = entry.path().string();
    }
  }
  return result;
}

/// Where the adapter `name` lies in `folder`: at the top, or in its own folder.
inline std::string adapter_folder(
    const std::string& folder,
    const std::string& name) {
  const auto below = holds_adapter(folder)
      ? std::map<std::string, std::string>{}
      : adapters_in(folder);
  if (below.empty()) {
    return folder; // where it holds none, reading it says so
  }
  const auto found = below.find(name);
  std::string names;
  for (const auto& item : below) {
    names += (names.empty() ? "'" : ", '") + item.first + "'";
  }
  TORCH_CHECK(
      found != below.end(),
      "peft: '",
      folder,
      "' has no ",
      kConfigFile,
      " at the top and no folder '",
      name,
      "'; its folders with one are ",
      names,
      ": load them by name, or all with load_adapters");
  return found->second;
}

} // namespace detail

} // namespace peft
