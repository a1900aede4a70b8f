#pragma once

#include <peft/core/delta.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// A trained copy that stands in for a parameter, or for some of its rows: what
/// BitFit does to a bias and `modules_to_save` to a task head. The base keeps
/// its value, so disabling and detaching restore it to the bit, and several
/// such copies can live beside each other.
class TrainedCopy final : public Delta {
 public:
  /// Copies `source` (the base, or its rows [begin, end) when `rows` is given);
  /// half precision is trained in float32. `file_name` is the parameter's own
  /// name ("bias").
  TrainedCopy(
      const Tensor& source,
      std::string file_name,
      std::optional<Rows> rows = std::nullopt)
      : file_name_(std::move(file_name)), rows_(rows) {
    c10::InferenceMode off(false);
    const auto dtype = detail::adapter_dtype(source);
    Tensor copy = source.detach();
    if (rows_) {
      copy = copy.slice(0, rows_->begin, rows_->end);
    }
    value = register_parameter(
        "value", copy.to(dtype).clone(at::MemoryFormat::Contiguous));
  }

  Tensor effective(const Tensor& weight, double scale) const override {
    Tensor target = value;
    if (rows_) {
      target = at::cat(
          {weight.slice(0, 0, rows_->begin),
           value.to(weight.scalar_type()),
           weight.slice(0, rows_->end)});
    }
    target = target.to(weight.scalar_type());
    const Tensor f = number_factor();
    if (f.defined()) {
      return weight + (target - weight) * (f.to(target.scalar_type()) * scale);
    }
    return scale == 1.0 ? target : weight + (target - weight) * scale;
  }
  bool takes_factor(Decoration::Factor kind) const override {
    return kind != Decoration::Factor::input;
  }

  std::optional<at::ScalarType> dtype() const override {
    return value.scalar_type();
  }

  bool replaces_base() const override {
    return true;
  }

  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    return {{file_name_, value}};
  }

  std::string take(const Delta& other, bool /*may_grow*/, bool dry_run)
      override {
    const auto* from = dynamic_cast<const TrainedCopy*>(&other);
    const bool same_rows = from != nullptr &&
        rows_.has_value() == from->rows_.has_value() &&
        (!rows_ ||
         (rows_->begin == from->rows_->begin &&
          rows_->end == from->rows_->end));
    if (!same_rows || from->value.sizes() != value.sizes()) {
      return "it is a '" + other.describe() + "' of another part";
    }
    if (!dry_run) {
      torch::NoGradGuard no_grad;
      value.copy_(from->value);
    }
    return {};
  }

  std::shared_ptr<Delta> copy() const override {
    auto result = std::make_shared<TrainedCopy>(value, file_name_);
    result->rows_ = rows_;
    result->value.set_requires_grad(value.requires_grad());
    result->train(is_training());
    return result;
  }

  std::string describe() const override {
    return "trained " + file_name_;
  }

  /// The rows of the base that the copy replaces; absent for all of it.
  const std::optional<Rows>& rows() const {
    return rows_;
  }

  Tensor value;

 private:
  std::string file_name_;
  std::optional<Rows> rows_;
};

} // namespace peft
