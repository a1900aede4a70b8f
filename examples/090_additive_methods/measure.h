#pragma once

// What a training step and a forward cost, beside those of another network.

#include "../010_gloss_categories/merge_check.h"
#include "../010_gloss_categories/train.h"

#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

namespace additive {

/// The bytes of tensors that this thread holds, and the most at one time.
struct Held : c10::MemoryReportingInfoBase {
  void reportMemoryUsage(void*, int64_t size, size_t, size_t, c10::Device)
      override {
    now += size;
    peak = std::max(peak, now);
  }
  bool memoryProfilingEnabled() const override {
    return true;
  }
  int64_t now = 0;
  int64_t peak = 0;
};

/// A training step on one batch, to be measured: it moves the parameters by
/// next to nothing. `step` takes the optimizer's place after backward.
class Step {
 public:
  Step(
      gloss::Network network,
      const std::vector<torch::Tensor>& parameters,
      gloss::Batch batch,
      std::function<void(torch::optim::Optimizer&)> step = {})
      : network_(std::move(network)),
        batch_(std::move(batch)),
        step_(std::move(step)),
        optimizer_(parameters, torch::optim::AdamWOptions(1e-9)) {}

  void run() {
    optimizer_.zero_grad();
    backward();
    if (step_) {
      step_(optimizer_);
    } else {
      optimizer_.step();
    }
  }

  /// What forward and backward hold at one time beyond the parameters:
  /// activations and gradients, in MiB.
  double peak_mib() {
    optimizer_.zero_grad();
    const auto held = std::make_shared<Held>();
    const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, held);
    backward();
    return static_cast<double>(held->peak) / (1024 * 1024);
  }

 private:
  void backward() {
    torch::nn::functional::cross_entropy(
        network_->forward(batch_.ids, batch_.mask), batch_.labels)
        .backward();
  }

  gloss::Network network_;
  gloss::Batch batch_;
  std::function<void(torch::optim::Optimizer&)> step_;
  torch::optim::AdamW optimizer_;
};

/// The median of time(step) / time(other).
inline double step_ratio(Step& step, Step& other, int pairs) {
  return gloss::paired_ratio(
      [&] { step.run(); }, [&] { other.run(); }, pairs)[1];
}

} // namespace additive
