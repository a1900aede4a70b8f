#pragma once

#include <peft/core/delta.h>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// splitmix64 (Steele, Lea and Flood 2014): one seed for each `number`.
inline uint64_t mix_seed(uint64_t seed, uint64_t number) {
  uint64_t z = seed + (number + 1) * 0x9e3779b97f4a7c15ULL;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  return z ^ (z >> 31);
}

/// A generator of its own on `device`.
inline at::Generator make_generator(
    const torch::Device& device,
    uint64_t seed) {
  if (device.is_cpu()) {
    return at::detail::createCPUGenerator(seed);
  }
  at::Generator shared = at::globalContext().defaultGenerator(device);
  const std::lock_guard<std::mutex> lock(shared.mutex());
  at::Generator own = shared.clone();
  own.set_current_seed(seed);
  return own;
}

/// `t` at `indices` of its row-major entries, 0 elsewhere; differentiable.
inline Tensor keep_entries(const Tensor& t, const Tensor& indices) {
  return at::zeros({t.numel()}, t.options())
      .index_copy(0, indices, t.reshape({-1}).index_select(0, indices))
      .view(t.sizes());
}

} // namespace detail

/// A whole trained copy of a parameter of which only the entries of a mask are
/// meant to move: those that Child-tuning lets through, or what FISH mask does
/// in its authors' code. The mask acts on gradients, in MaskedStep
/// (train/masked_step.h) or, `in_backward`, as they arrive; without either this
/// is a TrainedCopy. A mask that stays takes less with SparseCopy.
class MaskedCopy final : public Delta {
 public:
  struct Rule {
    /// The mask, ascending places in the row-major parameter. Undefined: each
    /// step draws Bernoulli(p) of its own, and what passes is divided by p.
    Tensor indices;
    double p = 1.0;
    uint64_t seed = 0;
    /// Masked entries keep their bits in a step, whatever the optimizer. Else
    /// only the gradient is masked: momentum and weight decay still move them.
    bool hard = true;
    /// Gradients are masked in the backward pass, that is before clipping, and
    /// no MaskedStep is needed.
    bool in_backward = false;
  };

  /// Copies `source`, the base; half precision is trained in float32.
  /// `file_name` is the parameter's own name ("weight").
  MaskedCopy(const Tensor& source, std::string file_name, Rule rule)
      : file_name_(std::move(file_name)), rule_(std::move(rule)) {
    c10::InferenceMode off(false);
    value = register_parameter(
        "value",
        source.detach()
            .to(detail::adapter_dtype(source))
            .clone(at::MemoryFormat::Contiguous));
    if (has_fixed_mask()) {
      rule_.indices = register_buffer(
          "indices", rule_.indices.to(value.device(), at::kLong));
    } else {
      TORCH_CHECK_VALUE(
          rule_.p > 0 && rule_.p <= 1,
          "peft: the part p of the entries that a step moves must lie in (0, "
          "1], got ",
          rule_.p);
      TORCH_CHECK_VALUE(
          !rule_.in_backward,
          "peft: a mask that each step draws cannot act in the backward pass, "
          "which does not know the steps");
      drawn_ = register_buffer(
          "drawn",
          torch::tensor(
              std::vector<int64_t>{static_cast<int64_t>(rule_.seed), 0}));
    }
    if (rule_.in_backward) {
      value.register_hook([indices = rule_.indices](const Tensor& gradient) {
        return detail::keep_entries(gradient, indices);
      });
    }
  }

  Tensor effective(const Tensor& weight, double scale) const override {
    const Tensor target = value.to(weight.scalar_type());
    return scale == 1.0 ? target : weight + (target - weight) * scale;
  }

  std::optional<at::ScalarType> dtype() const override {
    return value.scalar_type();
  }

  bool replaces_base() const override {
    return true;
  }

  bool has_fixed_mask() const {
    return rule_.indices.defined();
  }
  bool is_hard() const {
    return rule_.hard;
  }
  bool masks_in_backward() const {
    return rule_.in_backward;
  }
  /// The mask that stays.
  const Tensor& indices() const {
    return rule_.indices;
  }
  /// Whether no step masks anything.
  bool moves_all() const {
    return has_fixed_mask() ? rule_.indices.numel() == value.numel()
                            : rule_.p == 1.0;
  }
  /// How many steps have drawn a mask.
  int64_t steps() const {
    return drawn_[1].item<int64_t>();
  }

  /// Which entries the step at hand moves, a bool tensor of the value's shape;
  /// the same until end_step().
  const Tensor& step_mask() const {
    if (!step_mask_.defined() || step_mask_.device() != value.device()) {
      step_mask_ = make_step_mask();
    }
    return step_mask_;
  }

  /// Masks a gradient of this copy in place, as the step at hand wants it:
  /// g · M, or g · M / p for a mask of the step's own.
  void mask_gradient(Tensor& gradient) const {
    torch::NoGradGuard no_grad;
    if (has_fixed_mask()) {
      gradient.copy_(detail::keep_entries(gradient, rule_.indices));
    } else {
      const Tensor factor = at::ones({}, gradient.options()).div_(rule_.p);
      gradient.mul_(step_mask()).mul_(factor);
    }
  }

  /// The next step draws another mask.
  void end_step() {
    step_mask_.reset();
    if (!has_fixed_mask()) {
      torch::NoGradGuard no_grad;
      drawn_[1].add_(1);
    }
  }

  /// Index and value where all else is the base's, the whole copy otherwise.
  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    if (!has_fixed_mask()) {
      return {{file_name_, value}};
    }
    return {{indices_name(), rule_.indices}, {value_name(), value}};
  }
  std::vector<std::pair<std::string, Tensor>> training_tensors()
      const override {
    if (has_fixed_mask()) {
      return {};
    }
    return {{file_name_ + ".drawn", drawn_}};
  }

  Tensor to_file(const std::string& name, const Tensor& parameter)
      const override {
    return name == value_name() && is_sparse_in_file()
        ? parameter.reshape({-1}).index_select(0, rule_.indices)
        : parameter;
  }

  /// Indices come before the values that they place.
  std::string from_file(
      const std::string& name,
      const Tensor& loaded,
      bool dry_run) override {
    torch::NoGradGuard no_grad;
    step_mask_.reset();
    if (has_fixed_mask() && name == indices_name()) {
      const Tensor places = loaded.to(value.device());
      if (places.dim() != 1 || places.scalar_type() != at::kLong) {
        return "indices must be int64 [k]";
      }
      if (places.numel() > 0 &&
          (places[0].item<int64_t>() < 0 ||
           places[-1].item<int64_t>() >= value.numel() ||
           !places.diff().gt(0).all().item<bool>())) {
        return c10::str(
            "indices must ascend from 0 to less than ", value.numel());
      }
      if (!dry_run) {
        rule_.indices.set_data(places.clone());
      }
      return {};
    }
    if (name == value_name() && is_sparse_in_file()) {
      if (!dry_run) {
        TORCH_CHECK(
            loaded.sizes() == rule_.indices.sizes(),
            "peft: ",
            loaded.numel(),
            " values of '",
            name,
            "' stand beside ",
            rule_.indices.numel(),
            " indices; the file is damaged");
        value.view({-1}).index_copy_(
            0, rule_.indices, loaded.to(value.options()));
      }
      return {};
    }
    return Delta::from_file(name, loaded, dry_run);
  }

  std::shared_ptr<Delta> copy() const override {
    Rule rule = rule_;
    if (has_fixed_mask()) {
      rule.indices = rule.indices.clone();
    }
    auto result =
        std::make_shared<MaskedCopy>(value, file_name_, std::move(rule));
    if (!has_fixed_mask()) {
      result->drawn_.copy_(drawn_);
    }
    result->value.set_requires_grad(value.requires_grad());
    result->train(is_training());
    return result;
  }

  std::string describe() const override {
    return has_fixed_mask()
        ? c10::str("masked ", file_name_, " k=", rule_.indices.numel())
        : c10::str("masked ", file_name_, " p=", rule_.p);
  }

  // LibTorch would cast the integers too.
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking)
      override {
    Delta::to(device, non_blocking);
    to(dtype, non_blocking);
  }
  void to(torch::Dtype dtype, bool non_blocking) override {
    Tensor integers = has_fixed_mask() ? rule_.indices : drawn_;
    const Tensor kept = integers.variable_data();
    Delta::to(dtype, non_blocking);
    integers.set_data(kept);
  }
  using Delta::to;

  Tensor value;

 private:
  Tensor make_step_mask() const {
    torch::NoGradGuard no_grad;
    Tensor mask = at::zeros(value.sizes(), value.options().dtype(at::kBool));
    if (has_fixed_mask()) {
      return mask.view({-1})
          .index_fill_(0, rule_.indices, true)
          .view(value.sizes());
    }
    if (moves_all()) {
      return mask.fill_(true);
    }
    const auto seed = static_cast<uint64_t>(drawn_[0].item<int64_t>());
    return mask.bernoulli_(
        rule_.p,
        detail::make_generator(
            value.device(),
            detail::mix_seed(seed, static_cast<uint64_t>(steps()))));
  }

  bool is_sparse_in_file() const {
    return has_fixed_mask() && rule_.hard;
  }
  std::string indices_name() const {
    return file_name_ + ".indices";
  }
  std::string value_name() const {
    return is_sparse_in_file() ? file_name_ + ".values" : file_name_;
  }

  std::string file_name_;
  Rule rule_;
  Tensor drawn_; // the seed, and how many steps have drawn; on the CPU or not
  mutable Tensor step_mask_; // drawn when a step first asks
};

} // namespace peft
