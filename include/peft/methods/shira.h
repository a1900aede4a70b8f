#pragma once

// SHiRA: Sparse High Rank Adapters (Bhardwaj et al. 2024, arXiv:2406.13175), as
// HF PEFT's ShiraConfig has it: as many entries of each weight train as LoRA of
// rank r has parameters.
//
//   W'_m = W_m + v_m   for the r (in + out) entries m of a mask
//
// v starts at zero. It is stored as a difference, so several such adapters add
// up, and a file is places and differences.

#include <peft/core/sparse_copy.h>
#include <peft/methods/sparse_mask.h>
#include <peft/methods/tuner_targets.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for SHiRA, by the names of HF's ShiraConfig.
///
///   peft::ShiraOptions(8).random_seed(1)
struct ShiraOptions {
  ShiraOptions(int64_t r = 32) : r_(r) {}

  /// Entries per row and column: as many parameters as LoRA of this rank.
  TORCH_ARG(int64_t, r);
  /// "random"; "magnitude" (SHiRA-WM), the largest |W|; "struct", the diagonal
  /// and as many evenly spaced whole rows as the count allows. For gradients or
  /// |W · gradient| (SHiRA-Grad, SHiRA-SNIP) give SparseTuningOptions a top_k
  /// of those scores.
  TORCH_ARG(std::string, mask_type) = "random";
  /// Of each weight's mask. Absent, it is that of a fresh generator, so every
  /// attach draws the same masks, as in HF.
  TORCH_ARG(std::optional<uint64_t>, random_seed);
  /// HF's init_weights: false starts at N(0, 1), not at zero.
  TORCH_ARG(bool, init_weights) = true;
  /// Layers, whose weights are meant, or matrices. Default: query and value.
  TORCH_ARG(Targets, targets);
  TORCH_ARG(Targets, exclude);
  TORCH_ARG(std::vector<int64_t>, layers);
  TORCH_ARG(std::vector<std::string>, layers_pattern);
  /// Has no say: a mask counts rows and columns as they lie.
  TORCH_ARG(bool, fan_in_fan_out) = false;
  TORCH_ARG(std::vector<std::string>, modules_to_save);
};

/// SHiRA at one matrix: a SparseCopy of differences by the names of HF's files.
class ShiraDelta final : public SparseCopy {
 public:
  /// `start` [k] for the entries `places`, int64 [k], ascending, of a matrix of
  /// these sizes.
  ShiraDelta(
      const Tensor& start,
      const Tensor& places,
      int64_t rows,
      int64_t columns)
      : SparseCopy(start, places, rows * columns, "weight", /*additive=*/true),
        rows_(rows),
        columns_(columns) {}

  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    return {{"shira_weight", values}, {"shira_indices", indices}};
  }

  /// Indices are rows and columns in a file, int32 [2, k].
  Tensor to_file(const std::string& name, const Tensor& tensor) const override {
    return name != "shira_indices"
        ? tensor
        : at::stack({tensor.div(columns_, "floor"), tensor.remainder(columns_)})
              .to(at::kInt);
  }

  /// In any order (the values, which come first, follow), and as numbers of any
  /// type: PEFT writes floats on Windows.
  std::string from_file(
      const std::string& name,
      const Tensor& value,
      bool dry_run) override {
    if (name != "shira_indices") {
      return SparseCopy::from_file(name, value, dry_run);
    }
    if (value.dim() != 2 || value.size(0) != 2 ||
        value.size(1) != indices.numel()) {
      return c10::str(
          "shape ", value.sizes(), " where [2, ", indices.numel(), "] fits");
    }
    const Tensor entries = value.to(at::kCPU, at::kLong);
    const Tensor limit = torch::tensor({rows_, columns_}).unsqueeze(1);
    if (entries.lt(0).logical_or_(entries.ge(limit)).any().item<bool>()) {
      return c10::str(
          "an index lies outside of the weight's [",
          rows_,
          ", ",
          columns_,
          "]");
    }
    const auto [sorted, order] = (entries[0] * columns_ + entries[1]).sort();
    if (sorted.slice(0, 1).eq(sorted.slice(0, 0, -1)).any().item<bool>()) {
      return "an entry stands there twice";
    }
    if (!dry_run) {
      torch::NoGradGuard no_grad;
      indices.copy_(sorted);
      values.copy_(values.index_select(0, order.to(values.device())));
    }
    return {};
  }

  std::shared_ptr<Delta> copy() const override {
    auto result =
        std::make_shared<ShiraDelta>(values, indices, rows_, columns_);
    result->values.set_requires_grad(values.requires_grad());
    result->train(is_training());
    return result;
  }

  std::string describe() const override {
    return "shira k=" + std::to_string(values.numel());
  }
  static bool is_transposed() {
    return false;
  }
  /// The same place with room for `k` entries.
  std::shared_ptr<ShiraDelta> resized(int64_t k) const {
    return std::make_shared<ShiraDelta>(
        at::zeros({k}, values.options()),
        at::arange(k, indices.options()),
        rows_,
        columns_);
  }

 private:
  int64_t rows_, columns_;
};

namespace detail {

/// The entries of a weight [out, in] that SHiRA trains, ascending.
inline Tensor
shira_places(const ShiraOptions& options, const Tensor& weight, int64_t k) {
  const int64_t out = weight.size(0), in = weight.size(1);
  if (options.mask_type() == "magnitude") {
    return top_k({{"w", base(weight).detach().abs()}}, k).indices_of("w");
  }
  Tensor mask = at::zeros({out, in}, at::kBool);
  if (options.mask_type() == "random") {
    const auto generator = options.random_seed()
        ? at::detail::createCPUGenerator(*options.random_seed())
        : at::detail::createCPUGenerator();
    mask.view(-1).index_fill_(
        0, at::randperm(out * in, generator, at::kLong).slice(0, 0, k), true);
  } else {
    mask.diagonal().fill_(true);
    const int64_t rows = std::max<int64_t>(0, k - std::min(out, in)) / in;
    for (int64_t i = 0; i < rows; ++i) {
      mask[i * out / rows].fill_(true);
    }
  }
  return mask.view(-1).nonzero().squeeze(1);
}

/// With `draw` false the entries and their values are a file's to tell.
inline Plan
plan_shira(const ShiraOptions& options, const Network& network, bool draw) {
  const auto& type = options.mask_type();
  TORCH_CHECK_VALUE(
      options.r() > 0, "peft: r must be positive, got ", options.r());
  TORCH_CHECK_VALUE(
      !draw || type == "random" || type == "magnitude" || type == "struct",
      "peft: mask_type must be 'random', 'magnitude' or 'struct', got '",
      type,
      "'");
  Plan result;
  result.method = "SHIRA";
  result.options = options;
  result.sites =
      plan_tuner(options, network, {"SHiRA"}, [&](const TunerWeight& w) {
        torch::NoGradGuard no_grad;
        const int64_t rows = w.weight.size(0), columns = w.weight.size(1);
        const int64_t k = options.r() * (rows + columns);
        TORCH_CHECK_VALUE(
            k <= rows * columns,
            "peft: r = ",
            options.r(),
            " makes ",
            k,
            " entries, and '",
            w.path,
            "' has only ",
            rows * columns,
            "; take a smaller r");
        const Tensor places =
            draw ? shira_places(options, w.weight, k) : at::arange(k);
        const Tensor start = options.init_weights() || !draw
            ? torch::zeros({places.numel()})
            : torch::randn({places.numel()});
        return std::make_shared<ShiraDelta>(
            parameter_for(w.weight, start), places, rows, columns);
      });
  return result;
}

inline Plan plan(const ShiraOptions& options, const Network& network) {
  return plan_shira(options, network, /*draw=*/true);
}

} // namespace detail

/// Trains SHiRA's entries, as differences from 0, and freezes everything else.
inline Adapter attach(
    torch::nn::Module& model,
    const ShiraOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
