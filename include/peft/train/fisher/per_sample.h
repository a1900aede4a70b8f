#pragma once

// The gradient of each weight, measured as it arrives: an adapter adds Z = 0 to
// the weight, and what arrives at Z is the weight's gradient. The samples of a
// batch have an adapter each, and a mixed batch (peft::BatchAdapters) gives it
// the sample's rows: what arrives is the gradient from that sample alone.
//
//   y_i = x_i (W + Z_i)^T + b      dZ_i = dy_i^T x_i     summed over the tokens

#include <peft/core/active.h>
#include <peft/core/attach.h>
#include <peft/train/fisher/measure.h>

#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// y, and what a linear layer's rows have of dZ in the backward pass.
struct ProbedLinear : torch::autograd::Function<ProbedLinear> {
  static Tensor forward(
      torch::autograd::AutogradContext* context,
      const Tensor& y,
      const Tensor& x,
      const Tensor& zero,
      int64_t begin,
      bool transposed) {
    context->save_for_backward({x});
    context->saved_data["sizes"] = zero.sizes().vec();
    context->saved_data["begin"] = begin;
    context->saved_data["transposed"] = transposed;
    return y.clone(); // a bias may be added to it in place
  }
  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context,
      const torch::autograd::variable_list& gradients) {
    const Tensor x = context->get_saved_variables()[0];
    const Tensor& dy = gradients[0];
    const Tensor rows = dy.reshape({-1, dy.size(-1)});
    const Tensor inputs = x.reshape({-1, x.size(-1)});
    Tensor dz = context->saved_data["transposed"].toBool()
        ? inputs.t().mm(rows)
        : rows.t().mm(inputs);
    const auto sizes = context->saved_data["sizes"].toIntVector();
    if (dz.size(0) != sizes[0]) { // a slice of a packed projection
      const auto begin = context->saved_data["begin"].toInt();
      const Tensor whole = dz.new_zeros(sizes);
      whole.slice(0, begin, begin + dz.size(0)).copy_(dz);
      dz = whole;
    }
    return {dy, {}, dz, {}, {}};
  }
};

/// y, and what the looked-up rows have of dZ, as a sparse gradient.
struct ProbedEmbedding : torch::autograd::Function<ProbedEmbedding> {
  static Tensor forward(
      torch::autograd::AutogradContext* context,
      const Tensor& y,
      const Tensor& indices,
      const Tensor& zero,
      int64_t padding_idx) {
    context->save_for_backward({indices});
    context->saved_data["rows"] = zero.size(0);
    context->saved_data["padding"] = padding_idx;
    return y.clone(); // a bias may be added to it in place
  }
  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context,
      const torch::autograd::variable_list& gradients) {
    const Tensor indices = context->get_saved_variables()[0];
    const Tensor dz = at::embedding_sparse_backward(
        gradients[0].contiguous(),
        indices,
        context->saved_data["rows"].toInt(),
        context->saved_data["padding"].toInt(),
        /*scale_grad_by_freq=*/false);
    return {gradients[0], {}, dz, {}};
  }
};

/// Z at one weight, for one sample.
class GradientProbe final : public Delta {
 public:
  explicit GradientProbe(const Tensor& source)
      : zero(at::zeros({}, source.options()).expand(source.sizes())) {
    zero.set_requires_grad(true); // one number in memory
  }

  Tensor effective(const Tensor& weight, double /*scale*/) const override {
    return weight + zero;
  }
  bool has_linear() const override {
    return true;
  }
  Tensor linear(
      const LinearCall& call,
      const Below<LinearCall>& below,
      double /*scale*/) const override {
    return ProbedLinear::apply(
        below(call), call.x.detach(), zero, call.rows.begin, call.transposed);
  }
  bool has_embedding() const override {
    return true;
  }
  Tensor embedding(
      const EmbeddingCall& call,
      const Below<EmbeddingCall>& below,
      double scale) const override {
    if (call.scale_grad_by_freq) {
      return at::embedding(
          effective(call.weight, scale), call.indices, call.padding_idx, true);
    }
    return ProbedEmbedding::apply(
        below(call), call.indices, zero, call.padding_idx);
  }
  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    return {};
  }
  std::shared_ptr<Delta> copy() const override {
    return std::make_shared<GradientProbe>(zero.detach());
  }
  std::string describe() const override {
    return "gradient probe";
  }

  Tensor zero;
};

/// Probes on `model` for batches of up to `size` samples, beside its adapters;
/// they come off with the object. Batches of several want no other adapter.
class SampleProbes {
 public:
  SampleProbes(
      torch::nn::Module& model,
      std::vector<MeasuredParameter>& parameters,
      int64_t size,
      const GradientMeasure& measure)
      : parameters_(parameters), measure_(measure) {
    TORCH_CHECK(
        active_info() == nullptr,
        "peft: gradients are measured with the enabled adapters; leave the "
        "scope of ActiveAdapters or BatchAdapters first");
    for (const auto& item : base_parameters(model)) { // of modules around, too
      if (const auto* meta = tag_of(item.second)) {
        for (const auto& entry : meta->site->entries) {
          note_enabled(*entry.adapter);
        }
      }
    }
    for (const auto& adapter : peft::adapters(model)) {
      note_enabled(*adapter.shared_state());
    }
    try {
      for (int64_t i = 0; i < size; ++i) {
        add_sample(model, i);
      }
    } catch (...) {
      take_off();
      throw;
    }
  }
  ~SampleProbes() {
    take_off();
  }
  SampleProbes(const SampleProbes&) = delete;
  SampleProbes& operator=(const SampleProbes&) = delete;

  /// What `run` returns for a batch of `count` samples, in whose graph each has
  /// its own Z; for a count of 1 all rows have the same.
  template <class Run>
  Tensor forward(int64_t count, const Run& run) const {
    if (count == 1) {
      auto names = enabled_;
      names.push_back(adapters_.front().name());
      const ActiveAdapters scope(std::move(names));
      return run();
    }
    std::vector<std::string> names;
    for (int64_t i = 0; i < count; ++i) {
      names.push_back(adapters_[static_cast<size_t>(i)].name());
    }
    const BatchAdapters scope(names);
    return run();
  }

  /// Adds weights[i] times the measure of each sample's gradient to the sums;
  /// `loss` is the sum of the samples' losses.
  void add(const Tensor& loss, std::vector<double> weights, bool keep_graph) {
    weights_ = std::move(weights);
    std::vector<Tensor> inputs;
    for (size_t i = 0; i < weights_.size(); ++i) {
      inputs.insert(inputs.end(), zeros_[i].begin(), zeros_[i].end());
    }
    torch::autograd::grad({loss}, inputs, {}, keep_graph, false, true);
  }

 private:
  void note_enabled(const AdapterState& adapter) {
    if (adapter.enabled &&
        std::find(enabled_.begin(), enabled_.end(), adapter.name) ==
            enabled_.end()) {
      enabled_.push_back(adapter.name);
    }
  }

  void add_sample(torch::nn::Module& model, int64_t number) {
    Plan plan;
    plan.method = "GRADIENT_PROBE";
    std::vector<Tensor> zeros;
    for (size_t j = 0; j < parameters_.size(); ++j) {
      auto probe = std::make_shared<GradientProbe>(parameters_[j].tensor());
      for (PlannedSite place : parameters_[j].places) {
        place.delta = probe;
        plan.sites.push_back(std::move(place));
      }
      // Measured as it arrives, so that one gradient is in memory at a time.
      const auto i = static_cast<size_t>(number);
      const Tensor nothing =
          at::zeros({}, probe->zero.options()).expand(probe->zero.sizes());
      probe->zero.register_hook([this, i, j, nothing](const Tensor& gradient) {
        measure_.add(parameters_[j].sum, gradient, weights_[i]);
        return gradient.is_sparse() ? gradient : nothing;
      });
      zeros.push_back(probe->zero);
    }
    adapters_.push_back(commit(
        model, "fisher_sample_" + std::to_string(number), std::move(plan)));
    zeros_.push_back(std::move(zeros));
  }

  void take_off() {
    for (auto& adapter : adapters_) {
      adapter.detach();
    }
    adapters_.clear();
  }

  std::vector<MeasuredParameter>& parameters_;
  GradientMeasure measure_;
  std::vector<std::string> enabled_; // the model's own adapters
  std::vector<Adapter> adapters_;
  std::vector<std::vector<Tensor>> zeros_;
  std::vector<double> weights_;
};

} // namespace detail

} // namespace peft
