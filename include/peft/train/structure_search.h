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
#include <peft/train/structure_search/restorable_adamw.h>

#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <any>
#include <functional>
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
    check(options_);
    space_ = searched->options;
    for (const auto& each : detail::modules_of(state.sites)) {
      modules_.push_back(each.module);
      numel_.push_back(each.module.num_parameters);
      decorations_.push_back(decorations_of(state, each.sites));
    }
    std::vector<std::pair<std::string, Tensor>> weights;
    for (const auto& item : adapter_.named_parameters()) {
      if (item.value().requires_grad()) {
        weights.emplace_back("weight:" + item.key(), item.value());
      }
    }
    TORCH_CHECK_VALUE(
        !weights.empty(),
        "peft: adapter '",
        state.name,
        "' is frozen; set_trainable(true) before searching");
    alpha_ = at::zeros({static_cast<int64_t>(modules_.size())}, at::kDouble)
                 .set_requires_grad(true);
    w_ = detail::RestorableAdamW(
        std::move(weights), options_.lr(), options_.weight_decay());
    structure_ = detail::RestorableAdamW(
        {{"alpha", alpha_}}, options_.alpha_lr(), /*weight_decay=*/0);
    generator_ = at::detail::createCPUGenerator(options_.seed());
    settle();
  }

  /// One step. The losses compute one batch each, the same batch whenever they
  /// are called within a step: the training loss four times (first order:
  /// once), the validation loss once. An error leaves the search as it was.
  Progress step(const Loss& train_loss, const Loss& validation_loss) {
    torch::AutoGradMode with_grad(true);
    const auto w = w_.state();
    const auto structure = structure_.state();
    const Tensor random = generator_.get_state();
    Progress progress;
    try {
      step_structure(train_loss, validation_loss, w, progress);
      step_weights(train_loss, progress);
    } catch (...) {
      w_.restore(w);
      structure_.restore(structure);
      generator_.set_state(random);
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
        {"generator", generator_.get_state()},
        {"steps", at::scalar_tensor(steps_, at::kLong)}};
    structure_.write(tensors);
    w_.write(tensors);
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
          found == tensors.end() || found->second.sizes() == sizes,
          "peft: '",
          name,
          "' in '",
          path,
          "' is not of shape ",
          sizes);
      return found == tensors.end() ? Tensor() : found->second;
    };
    const auto structure = structure_.read(get);
    const auto w = w_.read(get);
    const Tensor steps = get("steps", {});
    const Tensor random = get("generator", generator_.get_state().sizes());
    TORCH_CHECK(
        steps.defined() && random.defined(),
        "peft: '",
        path,
        "' lacks the steps done or the generator");
    generator_.set_state(random);
    structure_.restore(structure);
    w_.restore(w);
    steps_ = steps.item<int64_t>();
    settle();
  }

 private:
  using Decorations = std::vector<std::shared_ptr<StructureDecoration>>;

  static void check(const StructureSearchOptions& options) {
    TORCH_CHECK_VALUE(
        options.order() == 1 || options.order() == 2,
        "peft: the search is of order 1 or 2, got ",
        options.order());
    TORCH_CHECK_VALUE(
        options.lr() > 0 && options.alpha_lr() > 0 &&
            options.clip_grad_norm() > 0 && options.weight_decay() >= 0 &&
            options.decay_steps() >= 0,
        "peft: the search's rates and clip_grad_norm must be positive, its "
        "weight_decay and decay_steps not negative");
  }

  static Decorations decorations_of(
      const detail::AdapterState& state,
      const std::vector<size_t>& sites) {
    Decorations result;
    for (const size_t i : sites) {
      for (const auto& decoration : state.sites[i].delta->decorations()) {
        auto mine = std::dynamic_pointer_cast<StructureDecoration>(decoration);
        if (mine) {
          result.push_back(std::move(mine));
        }
      }
    }
    return result;
  }

  /// What the rates are multiplied by in this step.
  double decay() const {
    return options_.decay_steps() == 0
        ? 1.0
        : std::max(
              0.0,
              1.0 -
                  static_cast<double>(steps_) /
                      static_cast<double>(options_.decay_steps()));
  }

  functional::Shift shift() const {
    const Tensor a = alpha_.detach();
    const double* data = a.data_ptr<double>();
    return functional::solve_shift(
        {data, data + a.numel()},
        numel_,
        static_cast<double>(space_.budget()),
        space_.beta());
  }

  /// Outside of a step every module has its p.
  void settle() {
    const Tensor z = functional::expected_concrete(
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
    return at::rand(alpha_.sizes(), generator_, at::TensorOptions(at::kDouble));
  }
  /// Hangs z(α, u) on the modules, on a graph of its own for each backward.
  void sample(const Tensor& u) {
    const Tensor logits = functional::budget_logits(
        alpha_,
        numel_,
        static_cast<double>(space_.budget()),
        space_.beta(),
        space_.shift_gradient());
    const Tensor z = functional::sample_concrete(
        logits, u, space_.stretch_low(), space_.stretch_high());
    for (size_t i = 0; i < decorations_.size(); ++i) {
      for (const auto& decoration : decorations_[i]) {
        decoration->set_sample(
            z[static_cast<int64_t>(i)].to(w_.parameters().front().device()));
      }
    }
  }

  static Tensor checked(const Loss& loss) {
    const Tensor value = loss();
    TORCH_CHECK_VALUE(
        value.defined() && value.numel() == 1 && value.requires_grad(),
        "peft: a loss of the search must be one number that depends on the "
        "adapter; it is disabled or frozen, or the loss was computed without "
        "gradients");
    return value.sum();
  }

  /// Undefined where the loss does not depend on a leaf.
  static std::vector<Tensor> gradients(
      const Tensor& loss,
      const std::vector<Tensor>& leaves) {
    return torch::autograd::grad({loss}, leaves, {}, std::nullopt, false, true);
  }
  Tensor or_zero(const Tensor& gradient) const {
    return gradient.defined() ? gradient : at::zeros_like(alpha_);
  }

  static Tensor norm_of(const std::vector<Tensor>& gradients) {
    std::vector<Tensor> norms{at::zeros({}, at::kDouble)};
    for (const auto& g : gradients) {
      if (g.defined()) {
        norms.push_back(g.norm().to(at::kCPU, at::kDouble));
      }
    }
    return at::stack(norms).norm();
  }
  std::vector<Tensor> clipped(std::vector<Tensor> gradients) const {
    const double factor = std::min(
        1.0,
        options_.clip_grad_norm() / (norm_of(gradients).item<double>() + 1e-6));
    for (auto& g : gradients) {
      g = g.defined() ? g * factor : g;
    }
    return gradients;
  }

  /// α, seen from the weights `w`, where this leaves them.
  void step_structure(
      const Loss& train_loss,
      const Loss& validation_loss,
      const detail::RestorableAdamW::State& w,
      Progress& progress) {
    const bool second = options_.order() == 2;
    const double rate = options_.lr() * decay();
    const Tensor u = draw();
    std::vector<Tensor> leaves{alpha_};
    if (second) {
      sample(u);
      w_.step(gradients(checked(train_loss), w_.parameters()), rate);
      leaves.insert(
          leaves.end(), w_.parameters().begin(), w_.parameters().end());
    }
    sample(u);
    const Tensor loss = checked(validation_loss);
    progress.validation_loss = loss.item<double>();
    auto d = gradients(loss, leaves);
    Tensor g = or_zero(d.front());
    d.erase(d.begin());
    if (second) {
      g = g - rate * mixed_derivative(train_loss, u, d, w);
      w_.restore(w);
    }
    structure_.step(clipped({g}), options_.alpha_lr() * decay());
  }

  /// ∂²L_train / ∂α∂w · d by a central difference along d.
  Tensor mixed_derivative(
      const Loss& train_loss,
      const Tensor& u,
      const std::vector<Tensor>& d,
      const detail::RestorableAdamW::State& w) {
    const double epsilon = 0.01 / (norm_of(d).item<double>() + 1e-6);
    std::vector<Tensor> sides;
    for (const double sign : {1.0, -1.0}) {
      {
        torch::NoGradGuard no_grad;
        for (size_t i = 0; i < d.size(); ++i) {
          Tensor parameter = w_.parameters()[i];
          parameter.copy_(
              d[i].defined() ? w.values[i] + sign * epsilon * d[i]
                             : w.values[i]);
        }
      }
      sample(u);
      sides.push_back(
          or_zero(gradients(checked(train_loss), {alpha_}).front()));
    }
    return (sides[0] - sides[1]) / (2 * epsilon);
  }

  void step_weights(const Loss& train_loss, Progress& progress) {
    sample(draw());
    const Tensor loss = checked(train_loss);
    progress.train_loss = loss.item<double>();
    w_.step(clipped(gradients(loss, w_.parameters())), options_.lr() * decay());
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
  std::vector<Decorations> decorations_; // of each module, one a site
  Tensor alpha_; // [m], float64
  detail::RestorableAdamW w_, structure_;
  at::Generator generator_;
  int64_t steps_ = 0;
};

} // namespace peft
