#pragma once

#include <torch/optim/adamw.h>
#include <torch/types.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

using torch::Tensor;

namespace detail {

/// Named parameters and the AdamW that moves them, both of which can be set
/// back to an earlier state, written and read: a search tries steps.
class RestorableAdamW {
 public:
  using NamedTensors = std::vector<std::pair<std::string, Tensor>>;
  /// AdamW's of one tensor; undefined before its first step.
  struct Moments {
    Tensor mean, square;
    int64_t step = 0;
  };
  struct State {
    std::vector<Tensor> values;
    std::vector<Moments> moments;
  };

  RestorableAdamW() = default;
  RestorableAdamW(NamedTensors named, double rate, double weight_decay)
      : named_(std::move(named)) {
    for (const auto& item : named_) {
      parameters_.push_back(item.second);
    }
    optimizer_ = std::make_unique<torch::optim::AdamW>(
        parameters_,
        torch::optim::AdamWOptions(rate).weight_decay(weight_decay));
  }

  const std::vector<Tensor>& parameters() const {
    return parameters_;
  }

  /// One step by these gradients; a parameter whose gradient is undefined stays
  /// as it is.
  void step(const std::vector<Tensor>& gradients, double rate) {
    static_cast<torch::optim::AdamWOptions&>(
        optimizer_->param_groups().front().options())
        .lr(rate);
    for (size_t i = 0; i < parameters_.size(); ++i) {
      parameters_[i].mutable_grad() = gradients[i];
    }
    optimizer_->step();
    for (auto& p : parameters_) {
      p.mutable_grad() = Tensor();
    }
  }

  /// Copies of all that a step changes.
  State state() const {
    State result;
    for (const auto& p : parameters_) {
      result.values.push_back(p.detach().clone());
      Moments moments;
      const auto found = optimizer_->state().find(p.unsafeGetTensorImpl());
      if (found != optimizer_->state().end()) {
        const auto& own =
            static_cast<const torch::optim::AdamWParamState&>(*found->second);
        moments = {own.exp_avg().clone(), own.exp_avg_sq().clone(), own.step()};
      }
      result.moments.push_back(std::move(moments));
    }
    return result;
  }
  void restore(const State& state) {
    torch::NoGradGuard no_grad;
    for (size_t i = 0; i < parameters_.size(); ++i) {
      parameters_[i].copy_(state.values[i]);
      const Moments& moments = state.moments[i];
      void* const key = parameters_[i].unsafeGetTensorImpl();
      if (!moments.mean.defined()) {
        optimizer_->state().erase(key);
        continue;
      }
      auto own = std::make_unique<torch::optim::AdamWParamState>();
      own->exp_avg(moments.mean.clone());
      own->exp_avg_sq(moments.square.clone());
      own->step(moments.step);
      optimizer_->state()[key] = std::move(own);
    }
  }

  /// Appends the state, as tensors of a file.
  void write(NamedTensors& file) const {
    const State now = state();
    for (size_t i = 0; i < named_.size(); ++i) {
      const std::string& name = named_[i].first;
      const Moments& moments = now.moments[i];
      file.emplace_back(name, now.values[i]);
      if (moments.mean.defined()) {
        file.emplace_back(name + ":mean", moments.mean);
        file.emplace_back(name + ":square", moments.square);
        file.emplace_back(
            name + ":step", at::scalar_tensor(moments.step, at::kLong));
      }
    }
  }
  /// The state in a file; `get(name, sizes)` gives a tensor of it, undefined
  /// where there is none, or throws. Nothing is changed.
  State read(const std::function<Tensor(const std::string&, at::IntArrayRef)>&
                 get) const {
    State result;
    for (const auto& [name, p] : named_) {
      const Tensor value = get(name, p.sizes());
      const Tensor mean = get(name + ":mean", p.sizes());
      const Tensor square = get(name + ":square", p.sizes());
      const Tensor step = get(name + ":step", {});
      TORCH_CHECK(
          value.defined() && mean.defined() == square.defined() &&
              mean.defined() == step.defined(),
          "peft: the state of the search lacks a part of '",
          name,
          "'");
      Moments moments;
      if (mean.defined()) {
        const auto like = p.options().requires_grad(false);
        moments = {mean.to(like), square.to(like), step.item<int64_t>()};
      }
      result.values.push_back(value);
      result.moments.push_back(std::move(moments));
    }
    return result;
  }

 private:
  NamedTensors named_;
  std::vector<Tensor> parameters_;
  std::unique_ptr<torch::optim::AdamW> optimizer_;
};

} // namespace detail

} // namespace peft
