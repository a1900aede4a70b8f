#pragma once

#include <peft/core/delta.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// HF's lora_bias: b' = b + s · lora_B.bias.
class LoraBiasDelta final : public Delta {
 public:
  LoraBiasDelta(Tensor initial, double scaling) : scaling_(scaling) {
    bias = register_parameter("bias", initial, initial.requires_grad());
  }
  Tensor effective(const Tensor& weight, double scale) const override {
    const Tensor f = number_factor();
    return at::add(
        weight,
        (f.defined() ? bias * f.to(bias.scalar_type()) : bias)
            .to(weight.scalar_type()),
        scale * scaling_);
  }
  bool takes_factor(Decoration::Factor kind) const override {
    return kind != Decoration::Factor::input;
  }
  std::optional<at::ScalarType> dtype() const override {
    return bias.scalar_type();
  }
  bool is_additive() const override {
    return true;
  }
  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    return {{"lora_B.bias", bias}};
  }
  std::string take(const Delta& other, bool /*may_grow*/, bool dry_run)
      override {
    const auto* from = dynamic_cast<const LoraBiasDelta*>(&other);
    if (from == nullptr || from->bias.sizes() != bias.sizes()) {
      return "it is a '" + other.describe() + "'";
    }
    if (!dry_run) {
      torch::NoGradGuard no_grad;
      bias.copy_(from->bias);
      scaling_ = from->scaling_;
    }
    return {};
  }
  bool clear(bool dry_run) override {
    if (!dry_run) {
      torch::NoGradGuard no_grad;
      bias.zero_();
    }
    return true;
  }

  std::shared_ptr<Delta> copy() const override {
    auto result = std::make_shared<LoraBiasDelta>(
        bias.detach().clone().set_requires_grad(bias.requires_grad()),
        scaling_);
    result->train(is_training());
    return result;
  }
  std::string describe() const override {
    return "lora bias";
  }

  Tensor bias;

 private:
  double scaling_;
};

} // namespace detail

} // namespace peft
