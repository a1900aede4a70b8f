#pragma once

// What a method costs, beside full fine-tuning and beside the bare network.

#include "results.h"

#include "../090_additive_methods/measure.h"

#include <peft/core/adapter.h>
#include <peft/core/clone.h>
#include <peft/core/merge.h>
#include <peft/train/masked_step.h>

#include <torch/nn/utils/clip_grad.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace compare {

using namespace gloss;

/// What a method does at every step beside the optimizer.
struct StepHooks {
  std::function<void()> after_backward;
  std::function<void()> after_step;
};

/// How an adapter trains here: gradients clipped, then the optimizer's step
/// under the adapter's masks, if it has any, with the method's hooks around.
class Training {
 public:
  explicit Training(const peft::Adapter& adapter, StepHooks hooks = {})
      : adapter_(adapter),
        masked_(std::make_shared<peft::MaskedStep>(adapter)),
        hooks_(std::move(hooks)) {
    for (const auto& item : adapter.named_parameters()) {
      if (item.key().rfind("classifier.", 0) == 0) {
        head_.push_back(item.value());
      }
    }
  }

  /// The head's tensors.
  const std::vector<torch::Tensor>& head() const {
    return head_;
  }
  /// All others that the optimizer gets.
  std::vector<torch::Tensor> own() const {
    auto result = masked_->parameters();
    const auto is_head = [&](const torch::Tensor& t) {
      return std::any_of(head_.begin(), head_.end(), [&](const auto& h) {
        return h.is_same(t);
      });
    };
    result.erase(
        std::remove_if(result.begin(), result.end(), is_head), result.end());
    return result;
  }
  std::vector<torch::Tensor> parameters() const {
    return masked_->parameters();
  }

  /// What follows backward.
  std::function<void(torch::optim::Optimizer&)> step() const {
    return [masked = masked_, hooks = hooks_, all = adapter_.parameters()](
               auto& optimizer) {
      if (hooks.after_backward) {
        hooks.after_backward();
      }
      torch::nn::utils::clip_grad_norm_(all, 1.0);
      masked->step(optimizer);
      if (hooks.after_step) {
        hooks.after_step();
      }
    };
  }

 private:
  peft::Adapter adapter_;
  std::shared_ptr<peft::MaskedStep> masked_;
  StepHooks hooks_;
  std::vector<torch::Tensor> head_;
};

inline int64_t count(const std::vector<torch::Tensor>& tensors) {
  int64_t sum = 0;
  for (const auto& t : tensors) {
    sum += t.numel();
  }
  return sum;
}

inline double mib(int64_t bytes) {
  return static_cast<double>(bytes) / (1024 * 1024);
}

/// The bytes of an adapter's own tensors.
inline int64_t bytes_of(const peft::Adapter& adapter) {
  int64_t bytes = 0;
  for (const auto& site : adapter.shared_state()->sites) {
    site.delta->visit_state([&](const torch::Tensor& t) {
      bytes += static_cast<int64_t>(t.nbytes());
    });
  }
  return bytes;
}

/// The most that two training steps hold at one time beyond the network's and
/// the adapter's tensors, in MiB: activations, gradients, the optimizer's
/// state and what it computes with.
inline double training_mib(
    const Network& network,
    const std::vector<torch::Tensor>& parameters,
    const Batch& batch,
    const std::function<void(torch::optim::Optimizer&)>& step = {}) {
  for (auto t : network->parameters()) { // those of the adapter among them
    t.mutable_grad().reset();
  }
  const auto held = std::make_shared<additive::Held>();
  const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, held);
  additive::Step training(network, parameters, batch, step);
  training.run();
  training.run();
  return mib(held->peak);
}

/// One batch of `size` texts of middling length, or of the longest.
inline Batch
batch_of(const Examples& examples, size_t size, bool longest, int64_t padding) {
  std::vector<size_t> rows(examples.size());
  std::iota(rows.begin(), rows.end(), size_t{0});
  std::reverse(rows.begin(), rows.end());
  auto batches = batches_by_length(examples, rows, size);
  if (batches.size() > 1 && batches.back().size() < size) {
    batches.pop_back();
  }
  return make_batch(
      examples,
      longest ? batches.back() : batches[batches.size() / 2],
      padding);
}

inline torch::Tensor logits_of(Network network, const Batch& batch) {
  torch::NoGradGuard no_grad;
  return network->forward(batch.ids, batch.mask);
}

/// What every method is measured beside: the bare network, and the same
/// network when all of it trains.
class Yardstick {
 public:
  Yardstick(Network base, Network full, Batch timed, Batch longest, int pairs)
      : base_(std::move(base)),
        full_(std::move(full)),
        timed_(std::move(timed)),
        longest_(std::move(longest)),
        pairs_(pairs),
        full_step_(full_, full_->parameters(), timed_) {
    for (auto& p : base_->parameters()) {
      p.set_requires_grad(false);
    }
  }

  /// The cost of `adapter` on `network`; a copy is merged where that is
  /// possible.
  Cost cost_of(
      Network& network,
      const peft::Adapter& adapter,
      const Training& training) {
    Cost cost;
    additive::Step step(
        network, training.parameters(), timed_, training.step());
    cost.step = additive::step_ratio(step, full_step_, pairs_);
    cost.memory = mib(bytes_of(adapter)) +
        training_mib(network, training.parameters(), longest_, training.step());
    torch::NoGradGuard no_grad;
    cost.forward = forward_ratio(network);
    auto copy = peft::clone(network);
    try {
      peft::merge(*copy);
    } catch (const c10::Error&) {
      return cost; // it says why, and changes nothing
    }
    cost.merged = forward_ratio(copy);
    cost.same_operators =
        operators_of(copy, timed_) == operators_of(base_, timed_);
    return cost;
  }

  /// The cost of training nothing but a head on the frozen network.
  Cost cost_of_head(Network& network) {
    const auto head = network->classifier->parameters();
    for (auto& p : network->bert->parameters()) {
      p.set_requires_grad(false);
    }
    additive::Step step(network, head, timed_);
    Cost cost;
    cost.step = additive::step_ratio(step, full_step_, pairs_);
    cost.memory = training_mib(network, head, longest_);
    torch::NoGradGuard no_grad;
    cost.forward = cost.merged = forward_ratio(network);
    cost.same_operators =
        operators_of(network, timed_) == operators_of(base_, timed_);
    return cost;
  }

  const Network& base() const {
    return base_;
  }
  /// The batch that times and logits are taken of.
  const Batch& batch() const {
    return timed_;
  }

 private:
  double forward_ratio(Network& network) {
    return paired_ratio(network, base_, timed_, 2 * pairs_)[1];
  }

  Network base_;
  Network full_;
  Batch timed_;
  Batch longest_;
  int pairs_;
  additive::Step full_step_;
};

} // namespace compare
