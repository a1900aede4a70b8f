#pragma once

// The search of S3Delta (Hu et al. 2022, arXiv:2206.07382): DARTS (Liu et al.
// 2019, arXiv:1806.09055) on the modules of methods/s3_delta.h. One step is
//
//   u ~ U(0, 1), z = z(α, u)
//   w' = AdamW(w, ∇w L_train(w, z))                        the virtual step
//   ∇α = ∇α L_val(w', z) - η (∇α L_train(w + ε d, z)
//                             - ∇α L_train(w - ε d, z)) / 2ε
//        d = ∇w' L_val(w', z), ε = 0.01 / (‖d‖ + 1e-6), η the rate of w
//   α ← AdamW(α, ∇α), then w ← AdamW(w, ∇w L_train(w, z)) with a new u
//
// First order leaves w' = w and the second term out. Both gradients of the last
// line are clipped by their norm; the virtual step's is not, as published.

#include <peft/io/safetensors.h>
#include <peft/methods/s3_delta.h>

#include <torch/csrc/autograd/autograd.h>
#include <torch/optim/adamw.h>

#include <algorithm>
#include <any>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for StructureSearch; the defaults are the published ones.
struct StructureSearchOptions {
  /// 2, or 1 for the first order.
  TORCH_ARG(int64_t, order) = 2;
  TORCH_ARG(double, lr) = 3e-4;
  TORCH_ARG(double, weight_decay) = 0;
  TORCH_ARG(double, alpha_lr) = 0.1;
  /// The largest norm of a gradient.
  TORCH_ARG(double, clip_grad_norm) = 2;
  /// Both rates fall to zero, in a line, over so many steps; 0: they stay.
  TORCH_ARG(int64_t, decay_steps) = 0;
  /// Of the samples.
  TORCH_ARG(uint64_t, seed) = 0;
};

/// A search over the modules of an adapter that S3DeltaOptions attached. It
/// owns the optimizers of the weights and of α, both AdamW.
class StructureSearch {
 public:
  /// What one step says.
  struct Progress {
    int64_t step = 0; // steps done
    double train_loss = 0; // of the step of w
    double validation_loss = 0; // at w'
    double expected_parameters = 0; // Σ p n
  };
  using Loss = std::function<Tensor()>;

  explicit StructureSearch(Adapter adapter, StructureSearchOptions options = {})
      : adapter_(std::move(adapter)), options_(std::move(options)) {
    adapter_.name(); // an empty or detached handle is an error
    const auto& state = *adapter_.shared_state();
    const auto* searched =
        std::any_cast<detail::S3DeltaSearched>(&state.options);
    TORCH_CHECK_VALUE(
        searched != nullptr,
        "peft: adapter '",
        state.name,
        "', a ",
        state.method,
        ", has nothing to search; attach S3DeltaOptions");
    check();
    space_ = searched->options;
    for (const auto& each : detail::modules_of(state.sites)) {
      modules_.push_back(each.module);
      numel_.push_back(each.module.num_parameters);
      std::vector<std::shared_ptr<StructureDecoration>> decorations;
      for (const size_t i : each.sites) {
        for (const auto& d : state.sites[i].delta->decorations()) {
          auto mine = std::dynamic_pointer_cast<StructureDecoration>(d);
          if (mine) {
            decorations.push_back(std::move(mine));
          }
        }
      }
      decorations_.push_back(std::move(decorations));
    }
    for (auto& item : adapter_.named_parameters()) {
      if (item.value().requires_grad()) {
        weights_.emplace_back(item.key(), item.value());
      }
    }
    alpha_ = at::zeros({static_cast<int64_t>(modules_.size())}, at::kDouble)
                 .set_requires_grad(true);
    std::vector<Tensor> weights;
    for (const auto& item : weights_) {
      weights.push_back(item.second);
    }
    TORCH_CHECK_VALUE(
        !weights.empty(),
        "peft: adapter '",
        state.name,
        "' is frozen; set_trainable(true) before searching");
    weight_optimizer_ = std::make_unique<torch::optim::AdamW>(
        weights,
        torch::optim::AdamWOptions(options_.lr())
            .weight_decay(options_.weight_decay()));
    alpha_optimizer_ = std::make_unique<torch::optim::AdamW>(
        std::vector<Tensor>{alpha_},
        torch::optim::AdamWOptions(options_.alpha_lr()).weight_decay(0));
    generator_ = at::detail::createCPUGenerator(options_.seed());
    settle();
  }

  /// One step. The losses compute one batch each, the same batch whenever they
  /// are called within a step: the training loss four times (first order:
  /// once), the validation loss once. What an error interrupts is as before.
  Progress step(const Loss& train_loss, const Loss& validation_loss) {
    torch::AutoGradMode with_grad(true);
    const double rate = decay();
    set_rate(*weight_optimizer_, options_.lr() * rate);
    set_rate(*alpha_optimizer_, options_.alpha_lr() * rate);
    const Snapshot before = snapshot();
    const Tensor generator = generator_.get_state();
    const Tensor alpha = alpha_.detach().clone();
    Progress progress;
    try {
      alpha_step(train_loss, validation_loss, before, progress);
      weight_step(train_loss, progress);
    } catch (...) {
      restore(before);
      restore_alpha(alpha, before);
      generator_.set_state(generator);
      settle();
      throw;
    }
    progress.step = ++steps_;
    settle();
    const auto p = probabilities();
    for (size_t i = 0; i < p.size(); ++i) {
      progress.expected_parameters += p[i] * static_cast<double>(numel_[i]);
    }
    return progress;
  }

  /// The modules, and for each of them α `[m]` and p.
  const std::vector<CandidateModule>& modules() const {
    return modules_;
  }
  const Tensor& alpha() const {
    return alpha_;
  }
  std::vector<double> probabilities() const {
    return shift().p;
  }
  int64_t steps() const {
    return steps_;
  }

  /// The modules of the highest p that fit the budget.
  S3DeltaStructure structure() const {
    std::vector<std::string> names;
    for (const size_t i : functional::greedy_structure(
             probabilities(), numel_, space_.budget())) {
      names.push_back(modules_[i].name);
    }
    return S3DeltaStructure()
        .candidates(space_.candidates())
        .modules(std::move(names));
  }

  /// Writes all that the search goes on from into one file, which replaces an
  /// older one only when it is complete: weights, α, the optimizers' moments,
  /// the generator of the samples, the step. (Dropout and the order of batches
  /// are the caller's.)
  void save(const std::string& path) const {
    std::vector<std::pair<std::string, Tensor>> tensors{
        {"alpha", alpha_.detach()},
        {"generator", generator_.get_state()},
        {"steps", at::scalar_tensor(steps_, at::kLong)}};
    const auto add = [&](const std::string& name, const Moments& moments) {
      if (moments.mean.defined()) {
        tensors.emplace_back(name + ".mean", moments.mean);
        tensors.emplace_back(name + ".square", moments.square);
        tensors.emplace_back(
            name + ".step", at::scalar_tensor(moments.step, at::kLong));
      }
    };
    add("alpha", moments_of(*alpha_optimizer_, alpha_));
    for (const auto& [name, w] : weights_) {
      tensors.emplace_back("weight:" + name, w.detach());
      add("weight:" + name, moments_of(*weight_optimizer_, w));
    }
    save_safetensors(tensors, path, {{"modules", module_list()}});
  }

  /// Goes on from a file of save(), of a search over the same modules. On an
  /// error nothing has changed.
  void load(const std::string& path) {
    const auto file = SafetensorsFile::open(path);
    const auto modules = file.metadata().find("modules");
    TORCH_CHECK(
        modules != file.metadata().end() && modules->second == module_list(),
        "peft: '",
        path,
        "' is no state of a search over these modules");
    const auto tensors = load_safetensors(file);
    const auto get = [&](const std::string& name, at::IntArrayRef sizes) {
      const auto found = tensors.find(name);
      TORCH_CHECK(
          found != tensors.end() && found->second.sizes() == sizes,
          "peft: '",
          path,
          "' lacks '",
          name,
          "' of shape ",
          sizes);
      return found->second;
    };
    const auto moments = [&](const std::string& name, const Tensor& like) {
      Moments result;
      if (tensors.count(name + ".mean") != 0) {
        result.mean = get(name + ".mean", like.sizes()).to(like.options());
        result.square = get(name + ".square", like.sizes()).to(like.options());
        result.step = get(name + ".step", {}).item<int64_t>();
      }
      return result;
    };
    Snapshot state;
    for (const auto& [name, w] : weights_) {
      state.values.push_back(get("weight:" + name, w.sizes()));
      state.moments.push_back(moments("weight:" + name, w.detach()));
    }
    state.alpha = moments("alpha", alpha_.detach());
    const Tensor alpha = get("alpha", alpha_.sizes());
    const auto steps = get("steps", {}).item<int64_t>();
    const Tensor current = generator_.get_state();
    generator_.set_state(get("generator", current.sizes()));
    restore(state);
    restore_alpha(alpha, state);
    steps_ = steps;
    settle();
  }

 private:
  /// AdamW's state of one tensor; undefined before its first step.
  struct Moments {
    Tensor mean, square;
    int64_t step = 0;
  };
  struct Snapshot {
    std::vector<Tensor> values; // of the weights
    std::vector<Moments> moments;
    Moments alpha;
  };

  void check() const {
    TORCH_CHECK_VALUE(
        options_.order() == 1 || options_.order() == 2,
        "peft: the search is of order 1 or 2, got ",
        options_.order());
    TORCH_CHECK_VALUE(
        options_.lr() > 0 && options_.alpha_lr() > 0 &&
            options_.clip_grad_norm() > 0 && options_.weight_decay() >= 0 &&
            options_.decay_steps() >= 0,
        "peft: the search's rates and clip_grad_norm must be positive, its "
        "weight_decay and decay_steps not negative");
  }

  double decay() const {
    return options_.decay_steps() == 0
        ? 1.0
        : std::max(
              0.0,
              1.0 -
                  static_cast<double>(steps_) /
                      static_cast<double>(options_.decay_steps()));
  }
  static void set_rate(torch::optim::AdamW& optimizer, double rate) {
    static_cast<torch::optim::AdamWOptions&>(
        optimizer.param_groups().front().options())
        .lr(rate);
  }

  functional::Shift shift() const {
    const Tensor a = alpha_.detach().contiguous();
    const double* data = a.data_ptr<double>();
    return functional::solve_shift(
        {data, data + a.numel()},
        numel_,
        static_cast<double>(space_.budget()),
        space_.beta());
  }

  /// Outside of a step every module has its p.
  void settle() {
    const auto z = functional::expected_concrete(
        at::tensor(shift().logits, at::kDouble),
        space_.stretch_low(),
        space_.stretch_high());
    for (size_t i = 0; i < decorations_.size(); ++i) {
      for (const auto& decoration : decorations_[i]) {
        decoration->set_value(z[static_cast<int64_t>(i)].item<double>());
      }
    }
  }

  Tensor draw() {
    return at::rand(
        alpha_.sizes(), generator_, alpha_.options().requires_grad(false));
  }
  /// Hangs z(α, u) on the modules, on a graph of its own for each backward.
  void sample(const Tensor& u) {
    const Tensor z = functional::sample_concrete(
        functional::budget_logits(
            alpha_,
            numel_,
            static_cast<double>(space_.budget()),
            space_.beta(),
            space_.shift_gradient()),
        u,
        space_.stretch_low(),
        space_.stretch_high());
    for (size_t i = 0; i < decorations_.size(); ++i) {
      for (const auto& decoration : decorations_[i]) {
        decoration->set_sample(
            z[static_cast<int64_t>(i)].to(weights_.front().second.device()));
      }
    }
  }

  static Tensor checked(const Loss& loss) {
    Tensor value = loss();
    TORCH_CHECK_VALUE(
        value.defined() && value.numel() == 1 && value.requires_grad(),
        "peft: a loss of the search must be one number that depends on the "
        "adapter; it is disabled or frozen, or the loss was computed without "
        "gradients");
    return value.sum();
  }

  /// Of α first, where it is wanted, then of the weights; what the loss does
  /// not depend on is undefined.
  std::vector<Tensor> gradients(const Tensor& loss, bool of_alpha, bool of_w)
      const {
    std::vector<Tensor> leaves;
    if (of_alpha) {
      leaves.push_back(alpha_);
    }
    for (const auto& item : weights_) {
      if (of_w) {
        leaves.push_back(item.second);
      }
    }
    return torch::autograd::grad({loss}, leaves, {}, std::nullopt, false, true);
  }
  Tensor alpha_gradient(const Loss& loss, const Tensor& u) {
    sample(u);
    const Tensor g = gradients(checked(loss), true, false).front();
    return g.defined() ? g : at::zeros_like(alpha_);
  }

  /// Rescales gradients in place so that they have at most the norm.
  void clip(std::vector<Tensor>& grads) const {
    std::vector<Tensor> norms;
    for (const auto& g : grads) {
      if (g.defined()) {
        norms.push_back(g.norm());
      }
    }
    if (norms.empty()) {
      return;
    }
    const Tensor factor =
        (options_.clip_grad_norm() / (at::stack(norms).norm() + 1e-6))
            .clamp_max(1.0);
    for (auto& g : grads) {
      if (g.defined()) {
        g = g * factor;
      }
    }
  }

  void step_weights(const std::vector<Tensor>& grads) {
    for (size_t i = 0; i < weights_.size(); ++i) {
      weights_[i].second.mutable_grad() = grads[i];
    }
    weight_optimizer_->step();
    for (auto& item : weights_) {
      item.second.mutable_grad() = Tensor();
    }
  }

  void alpha_step(
      const Loss& train_loss,
      const Loss& validation_loss,
      const Snapshot& before,
      Progress& progress) {
    const Tensor u = draw();
    const bool second = options_.order() == 2;
    if (second) {
      sample(u);
      step_weights(gradients(checked(train_loss), false, true));
    }
    sample(u);
    const Tensor loss = checked(validation_loss);
    progress.validation_loss = loss.item<double>();
    auto grads = gradients(loss, true, second);
    Tensor g = grads[0].defined() ? grads[0] : at::zeros_like(alpha_);
    grads.erase(grads.begin());
    if (second) {
      restore(before);
      g = g - rate_of_weights() * hessian_product(train_loss, u, grads, before);
    }
    std::vector<Tensor> clipped{g};
    clip(clipped);
    alpha_.mutable_grad() = clipped[0];
    alpha_optimizer_->step();
    alpha_.mutable_grad() = Tensor();
  }

  double rate_of_weights() const {
    return options_.lr() * decay();
  }

  /// ∂²L_train / ∂α∂w · d by a central difference along d.
  Tensor hessian_product(
      const Loss& train_loss,
      const Tensor& u,
      const std::vector<Tensor>& d,
      const Snapshot& before) {
    std::vector<Tensor> norms;
    for (const auto& each : d) {
      if (each.defined()) {
        norms.push_back(each.norm().to(at::kDouble));
      }
    }
    if (norms.empty()) {
      return at::zeros_like(alpha_);
    }
    const double epsilon =
        0.01 / (at::stack(norms).norm().item<double>() + 1e-6);
    std::vector<Tensor> sides;
    for (const double sign : {1.0, -1.0}) {
      {
        torch::NoGradGuard no_grad;
        for (size_t i = 0; i < d.size(); ++i) {
          if (d[i].defined()) {
            weights_[i].second.copy_(before.values[i] + sign * epsilon * d[i]);
          }
        }
      }
      sides.push_back(alpha_gradient(train_loss, u));
    }
    restore(before);
    return (sides[0] - sides[1]) / (2 * epsilon);
  }

  void weight_step(const Loss& train_loss, Progress& progress) {
    sample(draw());
    const Tensor loss = checked(train_loss);
    progress.train_loss = loss.item<double>();
    auto grads = gradients(loss, false, true);
    clip(grads);
    step_weights(grads);
  }

  static Moments moments_of(torch::optim::AdamW& optimizer, const Tensor& p) {
    const auto found = optimizer.state().find(p.unsafeGetTensorImpl());
    if (found == optimizer.state().end()) {
      return {};
    }
    const auto& state =
        static_cast<const torch::optim::AdamWParamState&>(*found->second);
    return {state.exp_avg(), state.exp_avg_sq(), state.step()};
  }
  static void set_moments(
      torch::optim::AdamW& optimizer,
      const Tensor& p,
      const Moments& moments) {
    if (!moments.mean.defined()) {
      optimizer.state().erase(p.unsafeGetTensorImpl());
      return;
    }
    auto state = std::make_unique<torch::optim::AdamWParamState>();
    state->exp_avg(moments.mean.clone());
    state->exp_avg_sq(moments.square.clone());
    state->step(moments.step);
    optimizer.state()[p.unsafeGetTensorImpl()] = std::move(state);
  }

  Snapshot snapshot() {
    const auto copy = [](Moments moments) {
      if (moments.mean.defined()) {
        moments.mean = moments.mean.clone();
        moments.square = moments.square.clone();
      }
      return moments;
    };
    Snapshot result;
    for (const auto& item : weights_) {
      result.values.push_back(item.second.detach().clone());
      result.moments.push_back(
          copy(moments_of(*weight_optimizer_, item.second)));
    }
    result.alpha = copy(moments_of(*alpha_optimizer_, alpha_));
    return result;
  }
  void restore(const Snapshot& state) {
    torch::NoGradGuard no_grad;
    for (size_t i = 0; i < weights_.size(); ++i) {
      weights_[i].second.copy_(state.values[i]);
      set_moments(*weight_optimizer_, weights_[i].second, state.moments[i]);
    }
  }
  void restore_alpha(const Tensor& alpha, const Snapshot& state) {
    torch::NoGradGuard no_grad;
    alpha_.copy_(alpha);
    set_moments(*alpha_optimizer_, alpha_, state.alpha);
  }

  /// What a state file must agree in.
  std::string module_list() const {
    std::string text = std::to_string(space_.budget());
    for (const auto& each : modules_) {
      text += "\n" + each.name + " " + std::to_string(each.num_parameters);
    }
    return text;
  }

  Adapter adapter_;
  StructureSearchOptions options_;
  S3DeltaOptions space_{0};
  std::vector<CandidateModule> modules_;
  std::vector<int64_t> numel_;
  /// Of each module, one a site.
  std::vector<std::vector<std::shared_ptr<StructureDecoration>>> decorations_;
  std::vector<std::pair<std::string, Tensor>> weights_; // that train
  Tensor alpha_; // [m], float64
  std::unique_ptr<torch::optim::AdamW> weight_optimizer_, alpha_optimizer_;
  at::Generator generator_;
  int64_t steps_ = 0;
};

} // namespace peft
