#pragma once

// BD-LoRA (Wang et al. 2025, arXiv:2510.23346): LoRA with one factor
// block-diagonal, so that each of n devices that share a layer has its own
// blocks and nothing of the adapter is exchanged between them.
//
//   W' = W + s · B diag(A_1 ... A_n),   A_i [r/n, in/n]
//   W' = W + s · diag(B_1 ... B_n) A,   B_i [out/n, r/n]
//
// The first is for layers that are split by their inputs, the second for those
// split by their outputs. The blocks lie one below the other: A [r, in/n], or
// B [out, r/n].

#include <peft/methods/low_rank_delta.h>

#include <torch/arg.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// HF's BdLoraConfig, which LoraConfig has as use_bdlora.
struct BdLoraOptions {
  /// Of which layers A, and of which B, is block-diagonal: those whose own name
  /// (the last part, as in HF) contains one of these.
  TORCH_ARG(std::vector<std::string>, target_modules_bd_a);
  TORCH_ARG(std::vector<std::string>, target_modules_bd_b);
  TORCH_ARG(int64_t, nblocks) = 1;
  /// Targets that neither list names are an error; else they get plain LoRA.
  TORCH_ARG(bool, match_strict) = true;
};

/// BD-LoRA at one matrix [out, in].
class BdLoraDelta final : public LowRankDelta<BdLoraDelta> {
 public:
  struct Config {
    double scaling = 1.0;
    double dropout = 0.0;
    int64_t nblocks = 1;
    bool is_in_a = true; // which factor is block-diagonal
  };

  BdLoraDelta(Config config, NamedTensors tensors, bool is_transposed = false)
      : LowRankDelta(std::move(tensors), is_transposed), config_(config) {}

  /// A and B, one of them with its zeros.
  Factors factors(at::ScalarType dtype) const {
    const Tensor A = tensor("lora_A.weight", dtype);
    const Tensor B = tensor("lora_B.weight", dtype);
    return {
        config_.is_in_a ? on_diagonal(A) : A,
        config_.is_in_a ? B : on_diagonal(B)};
  }
  double scaling() const {
    return config_.scaling;
  }

  int64_t r() const {
    return tensor("lora_A.weight").size(0);
  }
  std::string describe() const override {
    return "bd-lora r=" + std::to_string(r()) + " in " +
        std::to_string(config_.nblocks) + " blocks of " +
        (config_.is_in_a ? "A" : "B");
  }
  const Config& config() const {
    return config_;
  }

 private:
  Tensor on_diagonal(const Tensor& blocks) const {
    return at::block_diag(blocks.chunk(config_.nblocks));
  }

  Config config_;
};

namespace detail {

/// Which factor of a layer is block-diagonal.
enum class BdFactor { A, B, none };

inline BdFactor bd_factor(
    const BdLoraOptions& options,
    const std::string& module) {
  const std::string name = module.substr(module.rfind('.') + 1);
  const auto among = [&](const std::vector<std::string>& patterns) {
    return std::any_of(
        patterns.begin(), patterns.end(), [&](const std::string& pattern) {
          return name.find(pattern) != std::string::npos;
        });
  };
  const bool in_a = among(options.target_modules_bd_a());
  const bool in_b = among(options.target_modules_bd_b());
  TORCH_CHECK_VALUE(
      !in_a || !in_b,
      "peft: both target_modules_bd_a and target_modules_bd_b name '",
      module,
      "'; only one of A and B can be block-diagonal");
  TORCH_CHECK_VALUE(
      in_a || in_b || !options.match_strict(),
      "peft: neither target_modules_bd_a nor target_modules_bd_b names the "
      "target '",
      module,
      "'; name it in one of them, or set match_strict(false) for plain LoRA "
      "there");
  return in_a ? BdFactor::A : in_b ? BdFactor::B : BdFactor::none;
}

} // namespace detail

} // namespace peft
