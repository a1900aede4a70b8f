#pragma once

#include <peft/core/adapter.h>
#include <peft/core/masked_copy.h>

#include <torch/optim/lbfgs.h>
#include <torch/optim/optimizer.h>

#include <algorithm>
#include <memory>
#include <unordered_set>
#include <utility>
#include <vector>

namespace peft {

/// Masked training around the user's own optimizer:
///
///   peft::MaskedStep masked(adapter);
///   torch::optim::AdamW optimizer(masked.parameters(), 2e-5);
///   ...
///   loss.backward();                              // as often as one likes
///   clip_grad_norm_(adapter.parameters(), 1.0);   // Child-tuning: before
///   masked.step(optimizer);
///   optimizer.zero_grad();
///
/// Entries that the step masks keep their bits under any optimizer that steps
/// once, momentum and weight decay included ("hard"), or take the published
/// step, which masks the gradient and nothing else ("reference"). Parameters of
/// the adapter that have no mask, and those of others, are stepped as they are.
///
/// A hard mask that stays is trained through `parameters()`, its k numbers, so
/// that the optimizer's state has size k; gradients are those of the whole
/// copies, adapter.parameters(), and are used up by step(). An optimizer over
/// adapter.parameters() does the same with the state of whole copies.
class MaskedStep {
 public:
  explicit MaskedStep(const Adapter& adapter) {
    torch::NoGradGuard no_grad;
    adapter.name(); // an empty or detached handle is an error
    for (const auto& site : adapter.shared_state()->sites) {
      Trained trained;
      trained.copy = std::dynamic_pointer_cast<MaskedCopy>(site.delta);
      trained.whole = site.delta->parameters();
      if (trained.copy && trained.copy->has_fixed_mask() &&
          trained.copy->is_hard()) {
        trained.packed = entries_of(trained.copy->value, *trained.copy);
        trained.packed.set_requires_grad(true);
      }
      trained_.push_back(std::move(trained));
    }
  }

  /// What the optimizer is to be built on.
  std::vector<Tensor> parameters() const {
    std::vector<Tensor> result;
    for (const auto& trained : trained_) {
      if (trained.packed.defined()) {
        result.push_back(trained.packed);
      } else {
        result.insert(result.end(), trained.whole.begin(), trained.whole.end());
      }
    }
    return result;
  }

  /// Masks the gradients now, for what lies between backward and step(): a
  /// clipping that is to see the masked ones only. At most once a step where
  /// the step draws its mask.
  void mask_gradients() {
    for (auto& trained : trained_) {
      if (trained.copy) {
        TORCH_CHECK(
            !trained.masked || trained.copy->has_fixed_mask(),
            "peft: mask_gradients() was called twice without a step() in "
            "between, and the mask of a step divides by p; call it once, after "
            "the last backward of the step");
        mask(trained);
      }
    }
  }

  /// optimizer.step() under the masks. Which of this adapter's parameters it
  /// steps is what the optimizer holds; none is an error. LBFGS, which takes
  /// several steps in one, is refused.
  void step(torch::optim::Optimizer& optimizer) {
    TORCH_CHECK(
        dynamic_cast<torch::optim::LBFGS*>(&optimizer) == nullptr,
        "peft: LBFGS evaluates and moves several times in a step, so a mask "
        "cannot hold around it; use an optimizer that steps once");
    const auto held = held_by(optimizer);
    torch::NoGradGuard no_grad;
    std::vector<std::pair<Trained*, Tensor>> stepped; // and what it was before
    bool holds_any = false;
    for (auto& trained : trained_) {
      const bool packed =
          trained.packed.defined() && held.count(impl_of(trained.packed)) != 0;
      const bool whole = std::any_of(
          trained.whole.begin(), trained.whole.end(), [&](const Tensor& p) {
            return held.count(impl_of(p)) != 0;
          });
      TORCH_CHECK(
          !(packed && whole),
          "peft: the optimizer holds a masked parameter twice, whole and by "
          "its entries; build it on MaskedStep::parameters() alone");
      holds_any = holds_any || packed || whole;
      if (!trained.copy || !(packed || whole)) {
        continue;
      }
      Tensor before;
      if (packed) {
        load_packed(trained);
      } else {
        if (!trained.masked) {
          mask(trained);
        }
        if (trained.copy->is_hard() && !trained.copy->moves_all() &&
            trained.copy->value.grad().defined()) {
          before = trained.copy->value.clone();
        }
      }
      stepped.emplace_back(&trained, before);
    }
    TORCH_CHECK(
        holds_any,
        "peft: the optimizer holds no parameter of this adapter; build it on "
        "MaskedStep::parameters()");
    optimizer.step();
    for (auto& [trained, before] : stepped) {
      MaskedCopy& copy = *trained->copy;
      if (before.defined()) {
        at::where_out(copy.value, copy.step_mask(), copy.value, before);
      } else if (
          trained->packed.defined() &&
          held.count(impl_of(trained->packed)) != 0) {
        copy.value.view({-1}).index_copy_(0, copy.indices(), trained->packed);
        copy.value.mutable_grad().reset();
      }
      copy.end_step();
      trained->masked = false;
    }
  }

 private:
  /// One site: what it trains, whole and, for a hard mask that stays, packed.
  struct Trained {
    std::shared_ptr<MaskedCopy> copy; // null: no mask
    std::vector<Tensor> whole;
    Tensor packed;
    bool masked = false; // since the last step
  };

  static const void* impl_of(const Tensor& t) {
    return t.unsafeGetTensorImpl();
  }

  static Tensor entries_of(const Tensor& t, const MaskedCopy& copy) {
    return t.detach().reshape({-1}).index_select(0, copy.indices());
  }

  static std::unordered_set<const void*> held_by(
      torch::optim::Optimizer& optimizer) {
    std::unordered_set<const void*> held;
    for (const auto& group : optimizer.param_groups()) {
      for (const auto& p : group.params()) {
        held.insert(impl_of(p));
      }
    }
    return held;
  }

  static void check_dense(const Tensor& gradient) {
    TORCH_CHECK(
        gradient.layout() == at::kStrided,
        "peft: a masked parameter of shape ",
        gradient.sizes(),
        " got a sparse gradient; build the embedding with sparse(false)");
  }

  static void mask(Trained& trained) {
    Tensor gradient = trained.copy->value.grad();
    if (gradient.defined()) {
      check_dense(gradient);
      trained.copy->mask_gradient(gradient);
    }
    trained.masked = true;
  }

  /// The entries and their gradients as they now are.
  static void load_packed(Trained& trained) {
    const MaskedCopy& copy = *trained.copy;
    const Tensor gradient = copy.value.grad();
    trained.packed.copy_(entries_of(copy.value, copy));
    if (gradient.defined()) {
      check_dense(gradient);
      trained.packed.mutable_grad() = entries_of(gradient, copy);
    } else {
      trained.packed.mutable_grad().reset();
    }
  }

  std::vector<Trained> trained_;
};

} // namespace peft
