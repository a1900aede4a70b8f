#pragma once

// The empirical Fisher information of a network's parameters, its diagonal:
// how much the loss of a sample notices an entry. FISH mask (Sung et al. 2021,
// arXiv:2111.09839) and Child-tuning D (Xu et al. 2021, arXiv:2109.05687)
// train the entries that have most of it.
//
//   label         F = sum_i (d loss_i)^2                   loss of the true
//   label expectation   F = sum_i sum_c p(c | x_i) (d log p(c | x_i))^2 per
//   batch     F = sum_b (clip(d mean loss of batch b))^2
//
// All are sums: a mean over the samples has the same order of entries, and a
// mask asks for no more. The first two need the gradient of each sample alone;
// the third is another estimator, not a cheaper way to the same numbers.
//
// Memory: two tensors of each measured parameter, its sum and one gradient
// (float32, or float64 where the parameter is). Time: a forward and a backward
// for each sample, or for each sample and class.

#include <peft/core/attach.h>
#include <peft/methods/sparse_mask.h>

#include <torch/arg.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for estimate_fisher. As FISH mask and Child-tuning D want it:
///
///   peft::FisherOptions(1024)
///   peft::FisherOptions(num_train).per_batch(true).batch_size(16).max_norm(1)
///       .train(true)
struct FisherOptions {
  FisherOptions() = default;
  FisherOptions(int64_t num_samples) : num_samples_(num_samples) {}

  TORCH_ARG(int64_t, num_samples) = 1024;
  /// "label": the function gives losses. "expectation": it gives logits, and
  /// every class counts by the probability that the network gives it.
  TORCH_ARG(std::string, variant) = "label";
  /// "square", or "absolute": |g| in the place of g².
  TORCH_ARG(std::string, measure) = "square";
  /// Samples that the function is asked for at once.
  TORCH_ARG(int64_t, batch_size) = 1;
  /// Measures the gradient of a batch's mean loss, not those of its samples.
  TORCH_ARG(bool, per_batch) = false;
  /// Scales each parameter's gradient down to this norm before it is measured;
  /// 0: does not.
  TORCH_ARG(double, max_norm) = 0;
  /// The mode that the network is in meanwhile: dropout is off unless true.
  TORCH_ARG(bool, train) = false;
  /// Modules or parameters to measure. Default: every parameter of the network.
  TORCH_ARG(Targets, targets);
  /// Called as progress(samples done, samples in all) after each step; false
  /// ends the estimate with what it has.
  using Progress = std::function<bool(int64_t, int64_t)>;
  TORCH_ARG(Progress, progress);
};

/// What estimate_fisher found out.
struct FisherEstimate {
  /// A tensor of each measured parameter's shape; a tied one counts once, under
  /// its first name.
  Scores scores;
  /// How many samples it is made of: fewer than asked for if it was ended.
  int64_t num_samples = 0;
};

namespace detail {

inline void check(const FisherOptions& options) {
  TORCH_CHECK_VALUE(
      options.num_samples() > 0,
      "peft: the Fisher information needs at least one sample, got num_samples "
      "= ",
      options.num_samples());
  TORCH_CHECK_VALUE(
      options.variant() == "label" || options.variant() == "expectation",
      "peft: the Fisher information has no variant '",
      options.variant(),
      "'; choose label or expectation");
  TORCH_CHECK_VALUE(
      options.measure() == "square" || options.measure() == "absolute",
      "peft: a gradient has no measure '",
      options.measure(),
      "'; choose square or absolute");
  TORCH_CHECK_VALUE(
      options.batch_size() > 0,
      "peft: batch_size must be positive, got ",
      options.batch_size());
  TORCH_CHECK_VALUE(
      options.max_norm() >= 0,
      "peft: max_norm must not be negative, got ",
      options.max_norm());
  TORCH_CHECK_VALUE(
      !options.per_batch() || options.variant() == "label",
      "peft: per_batch measures the loss of a batch; the expectation is one "
      "over the classes of a sample");
}

/// A parameter, all its tensors where it is tied by storage, and its sum.
struct MeasuredParameter {
  std::string path;
  std::vector<Tensor> tensors;
  Tensor sum;
};

inline std::vector<MeasuredParameter> measured_parameters(
    torch::nn::Module& model,
    const Targets& targets) {
  const Network network = describe_network(model);
  if (targets.kind() == Targets::Kind::list) {
    check_every_name_matches(network, targets.names(), "targets", true);
  }
  std::vector<MeasuredParameter> result;
  for (const auto& layer : network) {
    for (const auto& [key, tensor] : layer.parameters) {
      if (!tensor.defined() || !tensor.is_floating_point()) {
        continue;
      }
      if (!targets.empty() && !targets.matches(layer.name, layer) &&
          !targets.matches(layer.path(key), layer)) {
        continue;
      }
      TORCH_CHECK(
          !tensor.is_inference(),
          "peft: '",
          layer.path(key),
          "' was made under InferenceMode and has no gradient; build or load "
          "the network outside of it");
      const auto known =
          std::find_if(result.begin(), result.end(), [&](const auto& other) {
            return is_tied(other.tensors.front(), tensor);
          });
      if (known == result.end()) {
        result.push_back(
            {layer.path(key),
             {tensor},
             at::zeros(
                 tensor.sizes(),
                 tensor.options().dtype(adapter_dtype(tensor)))});
      } else if (!known->tensors.front().is_same(tensor)) {
        known->tensors.push_back(tensor);
      }
    }
  }
  TORCH_CHECK(
      !result.empty(),
      "peft: the targets leave no parameter whose Fisher information could be "
      "measured");
  return result;
}

/// Lets `measured`, and nothing else of a network, require gradients, in the
/// mode that is asked for; leaving the scope puts all of it back.
class Measuring {
 public:
  Measuring(
      torch::nn::Module& model,
      const std::vector<MeasuredParameter>& measured,
      bool train) {
    modes_.emplace_back(&model, model.is_training());
    for (const auto& module : model.modules(/*include_self=*/false)) {
      modes_.emplace_back(module.get(), module->is_training());
    }
    if (train) { // running statistics move
      for (const auto& buffer : model.buffers()) {
        buffers_.emplace_back(buffer, buffer.detach().clone());
      }
    }
    const auto record = [&](const Tensor& p) {
      if (p.is_leaf() && !p.is_inference()) {
        required_.emplace_back(p, p.requires_grad());
      }
    };
    for (const auto& p : model.parameters()) {
      record(p);
    }
    for (const auto& parameter : measured) { // some are only members
      for (const auto& p : parameter.tensors) {
        record(p);
      }
    }
    for (auto& item : required_) {
      item.first.set_requires_grad(false);
    }
    for (const auto& parameter : measured) {
      for (Tensor p : parameter.tensors) {
        p.set_requires_grad(true);
      }
    }
    model.train(train);
  }
  ~Measuring() {
    for (const auto& [module, training] : modes_) {
      module->train(training);
    }
    for (auto& [p, required] : required_) {
      p.set_requires_grad(required);
    }
    torch::NoGradGuard no_grad;
    for (auto& [buffer, before] : buffers_) {
      buffer.copy_(before);
    }
  }
  Measuring(const Measuring&) = delete;
  Measuring& operator=(const Measuring&) = delete;

 private:
  std::vector<std::pair<torch::nn::Module*, bool>> modes_;
  std::vector<std::pair<Tensor, bool>> required_;
  std::vector<std::pair<Tensor, Tensor>> buffers_;
};

/// Adds `weight` times the measure of d loss to the sums.
inline void measure(
    std::vector<MeasuredParameter>& parameters,
    const Tensor& loss,
    double weight,
    bool keep_graph,
    const FisherOptions& options) {
  std::vector<Tensor> inputs;
  for (const auto& parameter : parameters) {
    inputs.insert(
        inputs.end(), parameter.tensors.begin(), parameter.tensors.end());
  }
  auto gradients = torch::autograd::grad(
      {loss}, inputs, {}, keep_graph, /*create_graph=*/false, true);
  torch::NoGradGuard no_grad;
  size_t next = 0;
  for (auto& parameter : parameters) {
    Tensor g;
    for (size_t i = 0; i < parameter.tensors.size(); ++i) {
      Tensor one = std::move(gradients[next++]);
      if (one.defined()) {
        one = one.is_sparse() ? one.to_dense() : one;
        g = g.defined() ? g + one : one;
      }
    }
    if (!g.defined()) {
      continue; // the loss does not know it
    }
    g = g.to(parameter.sum.scalar_type());
    if (options.max_norm() > 0) {
      const double norm = g.norm().item<double>();
      g = g * std::min(1.0, options.max_norm() / (norm + 1e-6));
    }
    if (options.measure() == "square") {
      parameter.sum.addcmul_(g, g, weight);
    } else {
      parameter.sum.add_(g.abs(), weight);
    }
  }
}

/// "sample 3", or "samples 4 to 7".
inline std::string name_of_samples(int64_t begin, int64_t end) {
  return end == begin + 1 ? c10::str("sample ", begin)
                          : c10::str("samples ", begin, " to ", end - 1);
}

/// What the caller's function gave for samples [begin, end).
inline void check_outputs(
    const Tensor& outputs,
    int64_t begin,
    int64_t end,
    const FisherOptions& options) {
  const bool logits = options.variant() == "expectation";
  const std::string samples = name_of_samples(begin, end);
  TORCH_CHECK(
      outputs.defined() && outputs.is_floating_point() &&
          (logits ? outputs.numel() > 0 : outputs.numel() == 1),
      "peft: for ",
      samples,
      logits ? " the logits of one sample, [classes] or [1, classes], are "
               "wanted, got "
             : " one loss, a scalar, is wanted, got ",
      outputs.defined() ? c10::str(outputs.toString(), outputs.sizes())
                        : "nothing");
  TORCH_CHECK(
      at::isfinite(outputs).all().item<bool>(),
      "peft: ",
      logits ? "a logit" : "the loss",
      " of ",
      samples,
      " is not finite (",
      outputs.max().item<double>(),
      "); no estimate was made");
  TORCH_CHECK(
      outputs.requires_grad(),
      "peft: the ",
      logits ? "logits" : "loss",
      " of ",
      samples,
      " does not depend on a measured parameter; was it made under a "
      "NoGradGuard, detached, or from another network?");
}

} // namespace detail

/// The Fisher information of `model`'s parameters over `num_samples` samples.
/// `outputs_of(begin, end)` runs the model on samples [begin, end) and returns
/// their loss, a scalar; with variant("expectation") their logits,
/// [1, classes]. Without per_batch it is asked for one sample at a time.
///
/// Parameters may be frozen. requires_grad, gradients, modes and buffers are
/// as before when it returns or throws. A loss that is not finite is an error
/// that names the sample.
inline FisherEstimate estimate_fisher(
    torch::nn::Module& model,
    const std::function<Tensor(int64_t begin, int64_t end)>& outputs_of,
    const FisherOptions& options = {}) {
  detail::check(options);
  TORCH_CHECK_VALUE(outputs_of, "peft: estimate_fisher got an empty function");
  c10::InferenceMode not_inference(false);
  at::AutoGradMode with_gradients(true);
  auto parameters = detail::measured_parameters(model, options.targets());
  FisherEstimate result;
  {
    const detail::Measuring measuring(model, parameters, options.train());
    const int64_t total = options.num_samples();
    const int64_t step = options.per_batch() ? options.batch_size() : 1;
    while (result.num_samples < total) {
      const int64_t begin = result.num_samples;
      const int64_t end = std::min(begin + step, total);
      const Tensor outputs = outputs_of(begin, end);
      detail::check_outputs(outputs, begin, end, options);
      if (options.variant() == "label") {
        detail::measure(
            parameters,
            outputs.reshape({}),
            1.0,
            /*keep_graph=*/false,
            options);
      } else {
        const Tensor log_p = outputs.reshape({-1}).log_softmax(0);
        const Tensor p = log_p.detach().exp().to(at::kCPU, at::kDouble);
        const int64_t classes = p.numel();
        for (int64_t c = 0; c < classes; ++c) {
          detail::measure(
              parameters,
              -log_p[c],
              p[c].item<double>(),
              /*keep_graph=*/c + 1 < classes,
              options);
        }
      }
      result.num_samples = end;
      if (options.progress() && !options.progress()(end, total)) {
        break;
      }
    }
  }
  for (auto& parameter : parameters) {
    result.scores.emplace_back(parameter.path, std::move(parameter.sum));
  }
  detail::check_scores(result.scores);
  return result;
}

/// The same with a function of one sample's number.
inline FisherEstimate estimate_fisher(
    torch::nn::Module& model,
    const std::function<Tensor(int64_t sample)>& outputs_of,
    const FisherOptions& options = {}) {
  TORCH_CHECK_VALUE(outputs_of, "peft: estimate_fisher got an empty function");
  TORCH_CHECK_VALUE(
      options.batch_size() <= 1,
      "peft: batch_size ",
      options.batch_size(),
      " needs a function of (begin, end), the samples of a batch");
  return estimate_fisher(
      model,
      std::function<Tensor(int64_t, int64_t)>(
          [&](int64_t begin, int64_t) { return outputs_of(begin); }),
      options);
}

} // namespace peft
