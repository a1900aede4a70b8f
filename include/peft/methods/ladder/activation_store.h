#pragma once

#include <peft/io/safetensors.h>

#include <torch/arg.h>
#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for ActivationCache.
struct ActivationCacheOptions {
  /// Where the states lie, a file for each sample and stack; "" for memory.
  ActivationCacheOptions(std::string folder = "")
      : folder_(std::move(folder)) {}

  TORCH_ARG(std::string, folder);
  /// What they are kept in. Default: as they are. Half precision takes half the
  /// room, and what is recalled is rounded to it.
  TORCH_ARG(std::optional<at::ScalarType>, dtype);
};

namespace detail {

using torch::Tensor;

/// A sample's states by their number, `[tokens, hidden]` each.
using SampleStates = std::map<size_t, Tensor>;

/// FNV-1a over eight bytes at a time.
inline uint64_t hash_bytes(
    const void* data,
    size_t size,
    uint64_t hash = 14695981039346656037ull) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  for (size_t i = 0; i < size; i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, bytes + i, std::min<size_t>(8, size - i));
    hash = (hash ^ word) * 1099511628211ull;
  }
  return hash;
}

inline uint64_t hash_states(const SampleStates& states) {
  uint64_t hash = hash_bytes(nullptr, 0);
  for (const auto& [i, state] : states) {
    const Tensor whole = state.contiguous();
    hash = hash_bytes(&i, sizeof(i), hash);
    hash = hash_bytes(whole.const_data_ptr(), whole.nbytes(), hash);
  }
  return hash;
}

/// The states by stack and sample, in memory or in files.
struct ActivationStore {
  explicit ActivationStore(ActivationCacheOptions options_)
      : options(std::move(options_)) {
    if (on_disk()) {
      std::error_code error;
      std::filesystem::create_directories(options.folder(), error);
      TORCH_CHECK(
          std::filesystem::is_directory(options.folder()),
          "peft: '",
          options.folder(),
          "' cannot be made a folder for an ActivationCache: ",
          error.message());
    }
    TORCH_CHECK_VALUE(
        !options.dtype() || at::isFloatingType(*options.dtype()),
        "peft: an ActivationCache keeps floating point, got ",
        *options.dtype());
  }

  bool on_disk() const {
    return !options.folder().empty();
  }

  /// A sample's states, or nothing; an error where those of another network
  /// lie.
  std::optional<SampleStates>
  read(const std::string& stack, int64_t id, const std::string& network) {
    if (on_disk()) {
      return read_file(file_of(stack, id), network);
    }
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = memory.find({stack, id});
    if (found == memory.end()) {
      return std::nullopt;
    }
    check_network(found->second.first, network, "The ActivationCache");
    return found->second.second;
  }

  void write(
      const std::string& stack,
      int64_t id,
      const std::string& network,
      const SampleStates& states) {
    if (!on_disk()) {
      const std::lock_guard<std::mutex> lock(mutex);
      memory[{stack, id}] = {network, states};
      return;
    }
    const auto path = file_of(stack, id);
    std::filesystem::create_directories(path.parent_path());
    std::vector<std::pair<std::string, Tensor>> tensors;
    for (const auto& [i, state] : states) {
      tensors.emplace_back(std::to_string(i), state);
    }
    save_safetensors(
        tensors,
        path.string(),
        {{"format", "pt"},
         {"network", network},
         {"checksum", std::to_string(hash_states(states))}});
  }

  int64_t size() const {
    const std::lock_guard<std::mutex> lock(mutex);
    return static_cast<int64_t>(on_disk() ? files().size() : memory.size());
  }

  int64_t bytes() const {
    const std::lock_guard<std::mutex> lock(mutex);
    int64_t total = 0;
    for (const auto& path : files()) {
      total += static_cast<int64_t>(std::filesystem::file_size(path));
    }
    for (const auto& entry : memory) {
      for (const auto& state : entry.second.second) {
        total += static_cast<int64_t>(state.second.nbytes());
      }
    }
    return total;
  }

  void clear() {
    const std::lock_guard<std::mutex> lock(mutex);
    for (const auto& path : files()) {
      std::filesystem::remove(path);
    }
    memory.clear();
  }

  ActivationCacheOptions options;
  mutable std::mutex mutex;
  /// The network's fingerprint with each.
  std::
      map<std::pair<std::string, int64_t>, std::pair<std::string, SampleStates>>
          memory;

 private:
  inline static const std::string kEnding = ".states.safetensors";

  std::filesystem::path file_of(const std::string& stack, int64_t id) const {
    return std::filesystem::path(options.folder()) / stack /
        (std::to_string(id) + kEnding);
  }

  std::vector<std::filesystem::path> files() const {
    std::vector<std::filesystem::path> result;
    if (!on_disk()) {
      return result;
    }
    for (const auto& entry :
         std::filesystem::recursive_directory_iterator(options.folder())) {
      const std::string name = entry.path().filename().string();
      if (name.size() > kEnding.size() &&
          name.compare(name.size() - kEnding.size(), kEnding.size(), kEnding) ==
              0) {
        result.push_back(entry.path());
      }
    }
    return result;
  }

  static void check_network(
      const std::string& theirs,
      const std::string& ours,
      const std::string& what) {
    TORCH_CHECK(
        theirs == ours,
        "peft: ",
        what,
        " holds states of another network, or of this one before its weights "
        "changed; clear() it, or use another");
  }

  static std::optional<SampleStates> read_file(
      const std::filesystem::path& path,
      const std::string& network) {
    if (!std::filesystem::exists(path)) {
      return std::nullopt;
    }
    const auto file = SafetensorsFile::open(path.string());
    const auto& notes = file.metadata();
    TORCH_CHECK(
        notes.count("network") != 0 && notes.count("checksum") != 0,
        "peft: '",
        path.string(),
        "' is no file of an ActivationCache; use another folder");
    check_network(notes.at("network"), network, "'" + path.string() + "'");
    SampleStates states;
    for (const auto& name : file.names()) {
      states.emplace(std::strtoull(name.c_str(), nullptr, 10), file.at(name));
    }
    TORCH_CHECK(
        std::to_string(hash_states(states)) == notes.at("checksum"),
        "peft: '",
        path.string(),
        "' is damaged; remove it, and its sample will be run again");
    return states;
  }
};

} // namespace detail

} // namespace peft
