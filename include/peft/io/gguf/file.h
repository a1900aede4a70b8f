#pragma once

// The GGUF container that llama.cpp reads, version 3 (docs/gguf.md of ggml):
//
//   "GGUF", version, number of tensors, number of keys
//   key, type, value                                   for each key
//   name, dimensions (the fastest first), type, offset for each tensor
//   the tensors, each at a multiple of 32 bytes
//
// Numbers are little-endian, texts have their length in front.

#include <peft/detail/platform.h>
#include <peft/io/safetensors.h>

#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// A GGUF file in the making: keys and tensors in the order they are added.
class GgufFile {
 public:
  void add(const std::string& key, const std::string& value) {
    put(keys_, key);
    put<uint32_t>(keys_, 8);
    put(keys_, value);
    ++num_keys_;
  }
  void add(const std::string& key, float value) {
    put(keys_, key);
    put<uint32_t>(keys_, 6);
    put(keys_, value);
    ++num_keys_;
  }

  /// float32, float16 or bfloat16, of one dimension at least. llama.cpp has 63
  /// bytes for a name.
  void add(const std::string& name, const Tensor& tensor) {
    constexpr size_t kMaxName = 63;
    TORCH_CHECK(
        name.size() <= kMaxName,
        "peft: the tensor name '",
        name,
        "' is longer than the ",
        kMaxName,
        " bytes that llama.cpp reads");
    for (const auto& other : tensors_) {
      TORCH_CHECK(
          other.first != name,
          "peft: two tensors would be called '",
          name,
          "' in the GGUF file");
    }
    tensors_.emplace_back(name, tensor.detach().to(at::kCPU).contiguous());
    type_of(tensors_.back().second);
  }

  /// The file appears, or replaces an older one, only when it is complete.
  void save(const std::string& path) const {
    check_little_endian();
    std::string head = "GGUF";
    put<uint32_t>(head, 3);
    put<uint64_t>(head, tensors_.size());
    put<uint64_t>(head, num_keys_);
    head += keys_;
    uint64_t offset = 0;
    for (const auto& [name, tensor] : tensors_) {
      put(head, name);
      put<uint32_t>(head, static_cast<uint32_t>(tensor.dim()));
      for (int64_t d = tensor.dim() - 1; d >= 0; --d) {
        put<uint64_t>(head, static_cast<uint64_t>(tensor.size(d)));
      }
      put<uint32_t>(head, type_of(tensor));
      put<uint64_t>(head, offset);
      offset += padded(tensor.nbytes());
    }
    head.resize(padded(head.size()), '\0');
    AtomicFile file(path);
    file.write(head);
    for (const auto& item : tensors_) {
      const Tensor& tensor = item.second;
      file.write(tensor.const_data_ptr(), tensor.nbytes());
      file.write(std::string(padded(tensor.nbytes()) - tensor.nbytes(), '\0'));
    }
    file.commit();
  }

 private:
  static size_t padded(size_t bytes) {
    return (bytes + 31) / 32 * 32;
  }
  template <class T>
  static void put(std::string& to, T value) {
    to.append(reinterpret_cast<const char*>(&value), sizeof(value));
  }
  static void put(std::string& to, const std::string& text) {
    put<uint64_t>(to, text.size());
    to += text;
  }
  /// ggml's number for a dtype.
  static uint32_t type_of(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
      case at::kFloat:
        return 0;
      case at::kHalf:
        return 1;
      case at::kBFloat16:
        return 30;
      default:
        TORCH_CHECK(
            false,
            "peft: a GGUF adapter holds float32, float16 or bfloat16, not ",
            tensor.scalar_type());
    }
    return 0;
  }

  std::string keys_;
  uint64_t num_keys_ = 0;
  std::vector<std::pair<std::string, Tensor>> tensors_;
};

} // namespace detail

} // namespace peft
