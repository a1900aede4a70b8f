#pragma once

// The empirical Fisher information of a network's parameters, its diagonal:
// how much the loss of a sample notices an entry. FISH mask (Sung et al. 2021,
// arXiv:2111.09839) and Child-tuning D (Xu et al. 2021, arXiv:2109.05687)
// train the entries that have most of it.
//
//   label        F = sum_i (d loss_i)^2
//   expectation  F = sum_i sum_c p(c | x_i) (d log p(c | x_i))^2
//   per batch    F = sum_b (clip(d mean loss of batch b))^2
//
// All are sums: a mean over the samples has the same order of entries, and a
// mask asks for no more. The first two need the gradient of each sample alone;
// the third is another estimator, not a cheaper way to the same numbers.
//
// Memory: one tensor of each measured parameter, its sum (float32, or float64
// where the parameter is), and the gradient that is just being measured. Time:
// a forward and a backward for each sample, or for each sample and class, and a
// pass over the sums. Batches of samples share the first two, but not the
// products x_i^T dy_i, which is worth it for short samples.

#include <peft/core/attach.h>
#include <peft/methods/sparse_mask.h>
#include <peft/train/fisher/measure.h>
#include <peft/train/fisher/per_sample.h>

#include <torch/arg.h>

#include <algorithm>
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
  /// Samples that the function is asked for at once. Without per_batch each
  /// still counts by its own gradient; it is taken alone where a batch does not
  /// tell its samples apart (in training mode, under other adapters, or where
  /// the first batch shows that a weight is shared by all rows).
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
  /// Whether samples shared passes.
  bool batched = false;
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
      const PlannedSite place{
          layer.path(key), layer.path(key), layer.name, tensor, nullptr};
      const auto known =
          std::find_if(result.begin(), result.end(), [&](const auto& other) {
            return is_tied(other.tensor(), place.tensor);
          });
      if (known == result.end()) {
        result.push_back(
            {{place},
             at::zeros(
                 tensor.sizes(),
                 tensor.options().dtype(adapter_dtype(tensor)))});
      } else {
        known->places.push_back(place);
      }
    }
  }
  TORCH_CHECK(
      !result.empty(),
      "peft: the targets leave no parameter whose Fisher information could be "
      "measured");
  return result;
}

/// Puts a network into training or evaluation mode; leaving the scope puts
/// back modes, buffers and what requires gradients.
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
    for (const auto& p : model.parameters()) {
      record(p);
    }
    for (const auto& parameter : measured) { // some are only members
      for (const auto& place : parameter.places) {
        record(place.tensor);
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
  void record(const Tensor& p) {
    if (p.is_leaf() && !p.is_inference()) {
      required_.emplace_back(p, p.requires_grad());
    }
  }

  std::vector<std::pair<torch::nn::Module*, bool>> modes_;
  std::vector<std::pair<Tensor, bool>> required_;
  std::vector<std::pair<Tensor, Tensor>> buffers_;
};

/// "sample 3", or "samples 4 to 7".
inline std::string name_of_samples(int64_t begin, int64_t end) {
  return end == begin + 1 ? c10::str("sample ", begin)
                          : c10::str("samples ", begin, " to ", end - 1);
}

/// What the caller's function gave for samples [begin, end), of which `count`
/// losses or rows of logits are wanted.
inline void check_outputs(
    const Tensor& outputs,
    int64_t begin,
    int64_t end,
    int64_t count,
    bool logits) {
  const std::string samples = name_of_samples(begin, end);
  const bool fits = outputs.defined() && outputs.is_floating_point() &&
      (!logits          ? outputs.numel() == count
           : count == 1 ? outputs.numel() > 0
           : outputs.dim() == 2
           ? outputs.size(0) == count && outputs.size(1) > 0
           : false);
  TORCH_CHECK(
      fits,
      "peft: for ",
      samples,
      logits ? c10::str(" logits [", count, ", classes] are wanted, got ")
          : count == 1 ? std::string(" one loss, a scalar, is wanted, got ")
                       : c10::str(
                             " ",
                             count,
                             " losses, one each, are wanted "
                             "(reduction none), got "),
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

/// One run of estimate_fisher.
class FisherRun {
 public:
  using Outputs = std::function<Tensor(int64_t, int64_t)>;

  FisherRun(
      torch::nn::Module& model,
      const Outputs& outputs_of,
      const FisherOptions& options)
      : outputs_of_(outputs_of),
        options_(options),
        logits_(options.variant() == "expectation"),
        parameters_(measured_parameters(model, options.targets())),
        size_(std::min(options.batch_size(), options.num_samples())),
        may_share_(
            size_ > 1 && !options.per_batch() && !options.train() &&
            adapters(model).empty()),
        measuring_(model, parameters_, options.train()),
        probes_(
            model,
            parameters_,
            may_share_ ? size_ : 1,
            {options.measure() == "absolute", options.max_norm()}) {}

  FisherEstimate operator()() {
    const int64_t total = options_.num_samples();
    int64_t step = options_.per_batch() ? size_ : 1;
    FisherEstimate result;
    for (int64_t begin = 0; begin < total;) {
      if (may_share_ && begin == size_) {
        result.batched = tells_samples_apart();
        step = result.batched ? size_ : 1;
      }
      const int64_t end = std::min(begin + step, total);
      measure(begin, end);
      result.num_samples = begin = end;
      if (options_.progress() && !options_.progress()(end, total)) {
        break;
      }
    }
    for (auto& parameter : parameters_) {
      result.scores.emplace_back(
          parameter.places.front().parameter, parameter.sum);
    }
    check_scores(result.scores);
    return result;
  }

 private:
  /// Adds samples [begin, end): each by its own gradient, or all as one.
  void measure(int64_t begin, int64_t end) {
    const int64_t count = options_.per_batch() ? 1 : end - begin;
    const Tensor outputs =
        probes_.forward(count, [&] { return outputs_of_(begin, end); });
    check_outputs(outputs, begin, end, count, logits_);
    if (!logits_) {
      const std::vector<double> ones(static_cast<size_t>(count), 1.0);
      probes_.add(outputs.sum(), ones, /*keep_graph=*/false);
      return;
    }
    const Tensor log_p = outputs.reshape({count, -1}).log_softmax(1);
    const Tensor p = log_p.detach().exp().to(at::kCPU, at::kDouble);
    for (int64_t c = 0; c < p.size(1); ++c) {
      const Tensor own = p.select(1, c).contiguous();
      probes_.add(
          -log_p.select(1, c).sum(),
          {own.data_ptr<double>(), own.data_ptr<double>() + count},
          /*keep_graph=*/c + 1 < p.size(1));
    }
  }

  /// Whether the first batch, measured in one pass, gives the sums that its
  /// samples gave alone. What does not run in one pass does not.
  bool tells_samples_apart() {
    std::vector<Tensor> alone;
    double largest = 0; // what is zero but for rounding is so in both
    for (auto& parameter : parameters_) {
      alone.push_back(parameter.sum);
      largest = std::max(largest, parameter.sum.max().item<double>());
      parameter.sum = at::zeros_like(parameter.sum);
    }
    bool same = true;
    try {
      measure(0, size_);
    } catch (const c10::Error&) {
      same = false;
    }
    for (size_t i = 0; i < alone.size(); ++i) {
      Tensor& sum = parameters_[i].sum;
      const double rounding =
          c10::isReducedFloatingType(parameters_[i].tensor().scalar_type())
          ? 0.05
          : 1e-3;
      same = same &&
          (sum - alone[i]).abs().max().item<double>() <=
              rounding * alone[i].max().item<double>() + 1e-6 * largest;
      sum = std::move(alone[i]);
    }
    return same;
  }

  const Outputs& outputs_of_;
  const FisherOptions& options_;
  bool logits_;
  std::vector<MeasuredParameter> parameters_;
  int64_t size_;
  bool may_share_; // passes, if the first batch shows that it can
  Measuring measuring_; // outlives the probes
  SampleProbes probes_;
};

} // namespace detail

/// The Fisher information of `model`'s parameters over `num_samples` samples.
/// `outputs_of(begin, end)` runs the model on samples [begin, end) and returns
/// the loss of each, [end - begin]; with variant("expectation") the logits,
/// [end - begin, classes]; with per_batch the mean loss, a scalar.
///
/// Parameters may be frozen; where adapters act, the gradient is that of the
/// effective weight. requires_grad, gradients, modes and buffers are as before
/// when it returns or throws. A loss that is not finite is an error that names
/// the sample.
inline FisherEstimate estimate_fisher(
    torch::nn::Module& model,
    const std::function<Tensor(int64_t begin, int64_t end)>& outputs_of,
    const FisherOptions& options = {}) {
  detail::check(options);
  TORCH_CHECK_VALUE(outputs_of, "peft: estimate_fisher got an empty function");
  c10::InferenceMode not_inference(false);
  at::AutoGradMode with_gradients(true);
  return detail::FisherRun(model, outputs_of, options)();
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
