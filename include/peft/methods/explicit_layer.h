#pragma once

#include <peft/core/attach.h>
#include <peft/core/merged_barrier.h>

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <memory>
#include <string>
#include <type_traits>

namespace peft {

/// What the explicit layers share: a frozen base layer, which may be one that
/// exists already, and the switches. `Derived` says what training adds:
///
///   Tensor adapted(const Tensor& x)        the forward with the adapter
///   std::vector<Tensor> trained()          its parameters
///   void fold()                            writes the adapter into the base
///   Tensor& folded()                       the base tensor that fold writes
///   void register_own()                    registers its parameters
///
/// They read like a textbook and know nothing of dispatch keys; a test holds
/// them bit for bit against attach.
template <class Base, class Derived>
class ExplicitLayer : public torch::nn::Cloneable<Derived> {
 public:
  /// `layer` is a holder (torch::nn::Linear), which is wrapped and frozen as it
  /// is, or the options to make one from.
  template <class LayerOrOptions>
  explicit ExplicitLayer(const LayerOrOptions& layer) {
    if constexpr (std::is_base_of_v<
                      torch::nn::ModuleHolder<Base>,
                      LayerOrOptions>) {
      TORCH_CHECK(
          !layer.is_empty(), "peft: the layer to wrap is an empty holder");
      base_layer = layer.ptr();
    } else {
      base_layer = std::make_shared<Base>(layer);
    }
    this->register_module("base_layer", base_layer);
  }

  /// The base layer alone while merged or disabled.
  Tensor forward(const Tensor& x) {
    if (merged_) {
      return guarded(base_layer->forward(x));
    }
    return enabled_ ? self().adapted(x) : base_layer->forward(x);
  }

  /// Folds the adapter into the base layer and keeps the old tensor.
  void merge() {
    TORCH_CHECK(!merged_, "peft: this layer is already merged");
    TORCH_CHECK(
        enabled_, "peft: this layer is disabled; enable() it before merging");
    torch::NoGradGuard no_grad;
    const Tensor before = self().folded().clone();
    self().fold();
    if (!at::isfinite(self().folded()).all().template item<bool>()) {
      self().folded().copy_(before);
      TORCH_CHECK(
          false,
          "peft: merging would write values that are not finite; nothing was "
          "changed");
    }
    original_ = before;
    merged_ = true;
  }
  /// Restores the base layer bit for bit.
  void unmerge() {
    TORCH_CHECK(merged_, "peft: this layer is not merged");
    torch::NoGradGuard no_grad;
    self().folded().copy_(original_);
    original_ = Tensor();
    merged_ = false;
  }
  bool is_merged() const {
    return merged_;
  }
  void enable() {
    enabled_ = true;
  }
  void disable() {
    TORCH_CHECK(!merged_, "peft: this layer is merged; unmerge() first");
    enabled_ = false;
  }
  bool is_enabled() const {
    return enabled_;
  }

  /// Called by clone() only: makes members of its own for the copy to fill.
  void reset() override {
    base_layer = std::dynamic_pointer_cast<Base>(base_layer->clone());
    this->register_module("base_layer", base_layer);
    self().register_own();
    freeze_base();
  }

  /// LibTorch's clone forgets requires_grad.
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device =
          std::nullopt) const override {
    auto copy = torch::nn::Cloneable<Derived>::clone(device);
    auto theirs = copy->parameters();
    const auto ours = this->parameters();
    for (size_t i = 0; i < ours.size(); ++i) {
      theirs[i].set_requires_grad(ours[i].requires_grad());
    }
    return copy;
  }

  /// The frozen layer.
  std::shared_ptr<Base> base_layer;

 protected:
  /// Called last by the constructors: a layer is frozen only once it is sure to
  /// be wrapped.
  void freeze_base() {
    for (auto& p : base_layer->parameters()) {
      p.set_requires_grad(false);
    }
  }

 private:
  Derived& self() {
    return static_cast<Derived&>(*this);
  }
  Tensor guarded(Tensor y) {
    if (at::GradMode::is_enabled()) {
      for (const Tensor& p : self().trained()) {
        if (p.requires_grad()) {
          return detail::MergedBarrier::apply(y, p, this->name());
        }
      }
    }
    return y;
  }

  Tensor original_;
  bool merged_ = false;
  bool enabled_ = true;
};

} // namespace peft
