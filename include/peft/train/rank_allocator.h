#pragma once

// AdaLoRA's budget (Zhang et al. 2023, arXiv:2303.10512, algorithm 1). After
// each backward pass, for every entry p of A, B and E:
//
//   I = |p ∂L/∂p|,  Ī ← β₁ Ī + (1 - β₁) I,  U ← β₂ U + (1 - β₂) |I - Ī|
//   s = Ī U;  a triplet's score: s(E) + mean s(A) + mean s(B)
//
// and the triplets with the lowest scores, of all weights together, lose their
// singular value. The budget falls from init_r to target_r a weight by (1 -
// t)³.

#include <peft/methods/ada_lora.h>

#include <algorithm>
#include <any>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

namespace peft {

/// ‖A Aᵀ - I‖ and ‖Bᵀ B - I‖, their mean over all weights times
/// orth_reg_weight: to be added to the loss.
inline Tensor orthogonal_regularization(const Adapter& adapter) {
  const auto* options =
      std::any_cast<AdaLoraOptions>(&adapter.shared_state()->options);
  TORCH_CHECK(
      options != nullptr,
      "peft: orthogonal_regularization is AdaLoRA's, and adapter '",
      adapter.name(),
      "' is a ",
      adapter.method());
  Tensor sum;
  int64_t count = 0;
  for (const auto& site : adapter.shared_state()->sites) {
    for (const auto& [name, p] : site.delta->file_tensors()) {
      if (dynamic_cast<const AdaLoraDelta*>(site.delta.get()) == nullptr ||
          name == "lora_E") {
        continue;
      }
      const Tensor product =
          name == "lora_A" ? at::mm(p, p.t()) : at::mm(p.t(), p);
      const Tensor norm =
          (product - at::eye(product.size(0), product.options())).norm();
      sum = sum.defined() ? sum + norm : norm;
      ++count;
    }
  }
  return sum * (options->orth_reg_weight() / static_cast<double>(count));
}

/// Takes ranks away while AdaLoRA trains:
///
///   peft::RankAllocator allocator(adapter);
///   ...
///   (loss + peft::orthogonal_regularization(adapter)).backward();
///   optimizer.step();
///   allocator.update_and_allocate(step);      // 0, 1, 2, ...
///   optimizer.zero_grad();
///
/// Its state is the adapter's: saved with it, so that training resumes.
class RankAllocator {
 public:
  explicit RankAllocator(const Adapter& adapter) {
    const auto* options =
        std::any_cast<AdaLoraOptions>(&adapter.shared_state()->options);
    TORCH_CHECK(
        options != nullptr,
        "peft: RankAllocator allocates AdaLoRA's ranks, and adapter '",
        adapter.name(),
        "' is a ",
        adapter.method());
    options_ = *options;
    for (const auto& site : adapter.shared_state()->sites) {
      if (auto delta = std::dynamic_pointer_cast<AdaLoraDelta>(site.delta)) {
        TORCH_CHECK(
            delta->r() == options_.init_r(),
            "peft: at '",
            site.name,
            "' AdaLoRA has rank ",
            delta->r(),
            " and not init_r, ",
            options_.init_r(),
            ": the file holds what was left, and libpeft_training.safetensors, "
            "from which training goes on, is not beside it");
        deltas_.push_back(std::move(delta));
      }
    }
  }

  /// Triplets left after `step`, of all weights together.
  int64_t budget(int64_t step) const {
    const auto& o = options_;
    const auto n = static_cast<int64_t>(deltas_.size());
    const int64_t first = o.init_r() * n, last = o.target_r() * n;
    if (step <= o.tinit()) {
      return first;
    }
    if (step > o.total_step() - o.tfinal()) {
      return last;
    }
    const double left = 1 -
        static_cast<double>(step - o.tinit()) /
            static_cast<double>(o.total_step() - o.tfinal() - o.tinit());
    return static_cast<int64_t>(
        static_cast<double>(first - last) * left * left * left +
        static_cast<double>(last));
  }

  /// After the step of the optimizer, with the gradients still there.
  void update_and_allocate(int64_t step) {
    torch::NoGradGuard no_grad;
    const int64_t end = options_.total_step() - options_.tfinal();
    if (step > end) { // decided; entries of E that moved go back
      for (const auto& delta : deltas_) {
        if (delta->config().kept.defined()) {
          mask(*delta);
        }
      }
      return;
    }
    if (step < end) {
      update();
    }
    if (step == end ||
        (step > options_.tinit() && step % options_.deltaT() == 0)) {
      allocate(budget(step));
    }
  }

 private:
  /// A, B and E, in this order.
  static std::vector<Tensor> factors(const AdaLoraDelta& delta) {
    std::vector<Tensor> result;
    for (const auto& item : delta.file_tensors()) {
      result.push_back(item.second);
    }
    return result;
  }

  void update() {
    for (const auto& delta : deltas_) {
      const auto parameters = factors(*delta);
      auto& averages = delta->config().averages;
      if (averages.empty()) {
        for (int i = 0; i < 2; ++i) {
          for (const auto& p : parameters) {
            averages.push_back(at::zeros_like(p));
          }
        }
      }
      for (size_t i = 0; i < parameters.size(); ++i) {
        const Tensor gradient = parameters[i].grad();
        TORCH_CHECK(
            gradient.defined(),
            "peft: AdaLoRA ranks by gradients, and there are none; call "
            "update_and_allocate after backward and before zero_grad");
        const Tensor importance = (parameters[i] * gradient).abs();
        Tensor& mean = averages[i];
        Tensor& uncertainty = averages[i + parameters.size()];
        const double b1 = options_.beta1(), b2 = options_.beta2();
        mean = mean * b1 + importance * (1 - b1);
        uncertainty = uncertainty * b2 + (importance - mean).abs() * (1 - b2);
      }
    }
  }

  static Tensor scores(const AdaLoraDelta& delta) {
    const auto& averages = delta.config().averages;
    const auto entry = [&](size_t i) { return averages[i] * averages[i + 3]; };
    return entry(2).view({-1}) + (entry(0).mean(1) + entry(1).mean(0));
  }

  /// Scores equal to the threshold go too, so fewer may be left.
  void allocate(int64_t left) {
    std::vector<Tensor> all;
    int64_t total = 0;
    for (const auto& delta : deltas_) {
      TORCH_CHECK(
          !delta->config().averages.empty(),
          "peft: AdaLoRA has no scores yet; call update_and_allocate at every "
          "step from the first on");
      all.push_back(scores(*delta));
      total += all.back().numel();
    }
    if (left >= total) {
      return;
    }
    const Tensor threshold = std::get<0>(at::cat(all).kthvalue(total - left));
    for (size_t i = 0; i < deltas_.size(); ++i) {
      deltas_[i]->config().kept = all[i].gt(threshold).cpu();
      mask(*deltas_[i]);
    }
  }

  static void mask(const AdaLoraDelta& delta) {
    Tensor E = factors(delta)[2];
    E.masked_fill_(
        delta.config().kept.logical_not().to(E.device()).view({-1, 1}), 0);
  }

  AdaLoraOptions options_{1};
  std::vector<std::shared_ptr<AdaLoraDelta>> deltas_;
};

} // namespace peft
