#pragma once

#include <peft/core/delta.h>
#include <peft/functional/sparse_linear.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// k numbers that stand in for k entries of a parameter. The base stays as it
/// is, so the other entries cannot move under any optimizer, and an optimizer's
/// state is k numbers too.
///
///   W'_i = v_j         at i = indices[j]: merges and returns to the bit
///   W'_i = W_i + v_j   `additive`: several such deltas add up
///
/// A scale moves between W and W'. Entries count in row-major order.
class SparseCopy : public Delta {
 public:
  /// `start` [k] and `places` int64 [k], ascending, of a parameter of `numel`
  /// entries; `file_name` is its own name ("weight").
  SparseCopy(
      const Tensor& start,
      const Tensor& places,
      int64_t numel,
      std::string file_name,
      bool additive)
      : numel_(numel), file_name_(std::move(file_name)), additive_(additive) {
    c10::InferenceMode off(false);
    values = register_parameter("values", start.detach().clone());
    indices =
        register_buffer("indices", places.detach().to(start.device()).clone());
  }

  /// Starts where `source`, the base, is; half precision is trained in float32.
  static std::shared_ptr<SparseCopy> of(
      const Tensor& source,
      const Tensor& places,
      std::string file_name,
      bool additive = false) {
    torch::NoGradGuard no_grad;
    const auto dtype = detail::adapter_dtype(source);
    const Tensor at_device = places.to(source.device());
    return std::make_shared<SparseCopy>(
        additive ? at::zeros(places.sizes(), source.options().dtype(dtype))
                 : source.detach().take(at_device).to(dtype),
        at_device,
        source.numel(),
        std::move(file_name),
        additive);
  }

  Tensor effective(const Tensor& weight, double scale) const override {
    return functional::replaced(
        weight, indices, target(weight, indices, values, scale));
  }

  /// What training has added to the entries of `weight`, the base: [k].
  Tensor moved(const Tensor& weight) const {
    return additive_ ? values
                     : values - weight.take(indices).to(values.scalar_type());
  }

  std::optional<at::ScalarType> dtype() const override {
    return values.scalar_type();
  }

  bool has_linear() const override {
    return true;
  }
  Tensor linear(
      const LinearCall& call,
      const Below<LinearCall>& below,
      double scale) const override {
    const auto [places, own] = part_of(call);
    if (below.is_base) {
      return functional::sparse_linear(
          call.x,
          call.weight,
          call.bias,
          places,
          target(call.weight, places, own, scale));
    }
    if (additive_) {
      const Tensor none = at::zeros_like(call.weight);
      const Tensor y = below(call);
      const Tensor term = functional::sparse_linear(
          call.x, none, std::nullopt, places, own * scale);
      return (y + term).to(y.scalar_type());
    }
    // What stands below is read off as a matrix, whose entries give way.
    const Tensor every = at::eye(call.weight.size(1), call.weight.options());
    const Tensor matrix =
        below({every, call.weight, std::nullopt, call.rows, call.transposed})
            .t();
    return functional::sparse_linear(
        call.x, matrix, call.bias, places, target(matrix, places, own, scale));
  }
  /// W' is built on each call: evaluation had better keep it.
  int64_t linear_cost() const override {
    return numel_;
  }

  bool has_embedding() const override {
    return true;
  }
  Tensor embedding(
      const EmbeddingCall& call,
      const Below<EmbeddingCall>& below,
      double scale) const override {
    if (call.indices.numel() == 0) {
      return below(call);
    }
    // Of the table only the rows that the batch asks for.
    const auto [touched, inverse, counts] =
        at::_unique2(call.indices, /*sorted=*/true, /*return_inverse=*/true);
    const Tensor rows = below({call.weight, touched});
    const int64_t width = call.weight.size(1);
    const Tensor row = indices.div(width, "floor").to(touched.scalar_type());
    const Tensor place =
        at::searchsorted(touched, row).clamp_max_(touched.numel() - 1);
    const Tensor asked =
        touched.index_select(0, place).eq(row).nonzero().squeeze(1);
    const Tensor places =
        (place * width + indices.remainder(width)).index_select(0, asked);
    const Tensor table = functional::replaced(
        rows,
        places,
        target(rows, places, values.index_select(0, asked), scale));
    const Tensor padding = touched.eq(call.padding_idx).nonzero();
    return at::embedding(
        table,
        inverse,
        padding.numel() == 0 ? -1 : padding.item<int64_t>(),
        call.scale_grad_by_freq);
  }

  bool is_additive() const override {
    return additive_;
  }
  bool replaces_base() const override {
    return !additive_;
  }

  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    return {
        {file_name_ + ".indices", indices}, {file_name_ + ".values", values}};
  }

  std::shared_ptr<Delta> copy() const override {
    auto result = std::make_shared<SparseCopy>(
        values, indices, numel_, file_name_, additive_);
    result->values.set_requires_grad(values.requires_grad());
    result->train(is_training());
    return result;
  }

  std::string describe() const override {
    return "sparse k=" + std::to_string(values.numel());
  }

  // torch's own would cast the indices too.
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking)
      override {
    const Tensor kept = indices.to(device).detach();
    Delta::to(device, dtype, non_blocking);
    indices.set_data(kept);
  }
  void to(torch::Dtype dtype, bool non_blocking) override {
    const Tensor kept = indices.detach();
    Delta::to(dtype, non_blocking);
    indices.set_data(kept);
  }
  using Delta::to;

  Tensor values;
  Tensor indices;

 private:
  /// What `own`, values of this, put at `places` of `weight`, which is the
  /// parameter or a part of it.
  Tensor target(
      const Tensor& weight,
      const Tensor& places,
      const Tensor& own,
      double scale) const {
    if (!additive_ && scale == 1.0) {
      return own;
    }
    const Tensor before = weight.take(places).to(own.scalar_type());
    return before + (additive_ ? own : own - before) * scale;
  }

  /// Places in the matrix of a call, which may be some rows of the parameter,
  /// transposed or not, and the values for them.
  std::pair<Tensor, Tensor> part_of(const LinearCall& call) const {
    const auto& rows = call.rows;
    const int64_t width = call.weight.size(call.transposed ? 0 : 1);
    const bool whole = (rows.end - rows.begin) * width == numel_;
    if (whole && !call.transposed) {
      return {indices, values};
    }
    Tensor row = indices.div(width, "floor"), column = indices.remainder(width);
    Tensor own = values;
    if (!whole) {
      const Tensor inside = row.ge(rows.begin)
                                .logical_and_(row.lt(rows.end))
                                .nonzero()
                                .squeeze(1);
      row = row.index_select(0, inside) - rows.begin;
      column = column.index_select(0, inside);
      own = own.index_select(0, inside);
    }
    return {
        call.transposed ? column * call.weight.size(1) + row
                        : row * width + column,
        own};
  }

  int64_t numel_;
  std::string file_name_;
  bool additive_;
};

} // namespace peft
