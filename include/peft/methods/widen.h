#pragma once

// A parallel adapter beside a feed-forward of ReLU, taken into it for good:
//
//   W2 relu(W1 x + b1) + b2 + s (U relu(D x + d) + u)
//     = [W2, s U] relu([W1; D] x + [b1; d]) + (b2 + s u)
//
// so the network is plain again, r features wider in the middle, and runs no
// operator more than before the adapter. Exact where nothing but the ReLU
// stands between the two layers; so in evaluation: a dropout there would then
// fall on the adapter's features too.

#include <peft/core/clone.h>
#include <peft/core/fold.h>
#include <peft/methods/parallel_adapter.h>

#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/transformerlayer.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace peft {

/// Options for merge_by_widening.
struct WideningOptions {
  /// The caller knows that relu, and nothing else, stands between the two
  /// layers of every feed-forward. torch::nn's transformer layers tell it
  /// themselves.
  TORCH_ARG(bool, is_relu) = false;
};

namespace detail {

/// One feed-forward, and what its tensors become.
struct Widening {
  torch::nn::LinearImpl* first;
  torch::nn::LinearImpl* second;
  torch::nn::Module* owner; // the module whose children they are
  Tensor weight1, bias1, weight2, bias2; // biases undefined where absent
};

/// `value` as the contents of the parameter `original`.
inline Tensor like(const Tensor& original, const Tensor& value) {
  return value.to(original.scalar_type()).contiguous();
}

/// Whether the module says that ReLU follows its linear1.
inline bool says_relu(const torch::nn::Module& owner) {
  using torch::enumtype::kReLU;
  if (const auto* layer = owner.as<torch::nn::TransformerEncoderLayerImpl>()) {
    return std::holds_alternative<kReLU>(layer->options.activation());
  }
  if (const auto* layer = owner.as<torch::nn::TransformerDecoderLayerImpl>()) {
    return std::holds_alternative<kReLU>(layer->options.activation());
  }
  return false;
}

/// The module at a site of `adapter`, a torch::nn::Linear that can be widened.
inline torch::nn::LinearImpl& widened_linear(
    torch::nn::Module& root,
    const AdapterState& adapter,
    const SiteRecord& record) {
  const auto check = [&](bool good, const char* why) {
    TORCH_CHECK(good, "peft: '", record.name, "' cannot be widened: ", why);
  };
  auto* linear = module_at(root, record.name)->as<torch::nn::LinearImpl>();
  check(linear != nullptr, "it is no torch::nn::Linear");
  check(record.parameters.size() == 1, "its tensors are tied to others");
  for (const Tensor& t : {linear->weight, linear->bias}) {
    const auto* tag = tag_of(t);
    const bool alone = tag == nullptr ||
        std::all_of(tag->site->entries.begin(),
                    tag->site->entries.end(),
                    [&](const Entry& e) {
                      return e.adapter.get() == &adapter;
                    });
    check(alone, "another adapter hangs on it; merge or detach that one first");
  }
  return *linear;
}

/// The plan for one pair of layers, checked; nothing is changed.
inline Widening widen(
    torch::nn::Module& root,
    const AdapterState& adapter,
    const SiteRecord& first_record,
    const SiteRecord& second_record,
    const WideningOptions& options) {
  torch::NoGradGuard no_grad;
  const auto& delta =
      dynamic_cast<const ParallelInputDelta&>(*first_record.delta);
  const BottleneckImpl& a = *delta.bottleneck;
  const double scale = adapter.scale;
  Widening result;
  result.first = &widened_linear(root, adapter, first_record);
  result.second = &widened_linear(root, adapter, second_record);
  const auto dot = first_record.name.rfind('.');
  const std::string parent =
      dot == std::string::npos ? "" : first_record.name.substr(0, dot);
  result.owner = module_at(root, parent);

  const auto check = [&](bool good, const std::string& why) {
    TORCH_CHECK(
        good,
        "peft: the feed-forward of '",
        first_record.name,
        "' and '",
        second_record.name,
        "' cannot take the adapter in: ",
        why);
  };
  check(
      options.is_relu() || says_relu(*result.owner),
      "that is exact only where ReLU stands between the two, and the network "
      "does not say so; where it does, say it by "
      "WideningOptions().is_relu(true)");
  check(
      a.options.non_linearity() == "relu",
      "its bottleneck has the non_linearity " + a.options.non_linearity() +
          ", not relu");
  check(
      a.options.layer_norm() == "none",
      "its bottleneck has a layer norm of its own");
  check(
      result.first->weight.size(0) == result.second->weight.size(1),
      "the second layer does not read what the first one makes");

  // In the wider of the two types, rounded once.
  const auto dtype = c10::promoteTypes(
      result.first->weight.scalar_type(), a.down_weight.scalar_type());
  const auto wide = [&](const Tensor& t) { return t.to(dtype); };
  Tensor s = a.scaling.defined()
      ? wide(a.scaling) * scale
      : at::full({1}, a.options.scaling() * scale, wide(a.up_weight).options());
  const Tensor W1 = base(result.first->weight);
  const Tensor W2 = base(result.second->weight);
  result.weight1 = like(W1, at::cat({wide(W1), wide(a.down_weight)}, 0));
  result.weight2 = like(W2, at::cat({wide(W2), wide(a.up_weight) * s}, 1));
  if (result.first->bias.defined()) {
    const Tensor b = base(result.first->bias);
    const Tensor more = a.down_bias.defined()
        ? wide(a.down_bias)
        : at::zeros({a.options.bottleneck()}, wide(b).options());
    result.bias1 = like(b, at::cat({wide(b), more}));
  }
  if (result.second->bias.defined()) {
    const Tensor b = base(result.second->bias);
    result.bias2 =
        like(b, a.up_bias.defined() ? wide(b) + wide(a.up_bias) * s : wide(b));
  }
  const auto nothing = [](const Tensor& t) {
    return !t.defined() || at::count_nonzero(t).item<int64_t>() == 0;
  };
  check(
      (result.bias1.defined() || nothing(a.down_bias)) &&
          (result.bias2.defined() || nothing(a.up_bias)),
      "its bottleneck has biases and the network's layers have none; train it "
      "with ParallelAdapterOptions().bias(false)");
  for (const Tensor& t :
       {result.weight1, result.weight2, result.bias1, result.bias2}) {
    if (t.defined()) {
      check_finite(t, first_record.name);
    }
  }
  return result;
}

inline void replace(const Tensor& parameter, const Tensor& value) {
  if (value.defined()) {
    Tensor target = parameter;
    target.mutable_grad() = Tensor(); // of the old shape
    target.set_data(value);
  }
}

/// Makes the modules say what they have become, so that they print, clone and
/// load as such.
inline void update_options(const Widening& widening) {
  const int64_t features = widening.weight1.size(0);
  widening.first->options.out_features(features);
  widening.second->options.in_features(features);
  if (auto* layer =
          widening.owner->as<torch::nn::TransformerEncoderLayerImpl>()) {
    layer->options.dim_feedforward(features);
  }
  if (auto* layer =
          widening.owner->as<torch::nn::TransformerDecoderLayerImpl>()) {
    layer->options.dim_feedforward(features);
  }
}

} // namespace detail

/// Takes the parallel adapter `name` into the feed-forwards of `model`, which
/// must be pairs of torch::nn::Linear with ReLU between them, and detaches it.
/// Modules that trained with it (modules_to_save) are folded in as well. All of
/// it, or an error and nothing.
inline void merge_by_widening(
    torch::nn::Module& model,
    const std::string& name = "default",
    const WideningOptions& options = {}) {
  const auto state = get_adapter(model, name).shared_state();
  TORCH_CHECK(
      state->method == "PARALLEL_ADAPTER",
      "peft: only a parallel adapter can be merged by widening, and '",
      name,
      "' is a ",
      state->method);
  TORCH_CHECK(
      state->enabled,
      "peft: adapter '",
      name,
      "' is disabled; enable() it before merging");
  const auto registry =
      std::dynamic_pointer_cast<detail::Registry>(state->registry.lock());
  torch::nn::Module& root = *registry->host; // which the names start from
  std::vector<detail::Widening> widenings;
  std::vector<std::pair<Tensor, Tensor>> folds;
  for (const auto& record : state->sites) {
    const auto* second =
        dynamic_cast<const detail::ParallelOutputDelta*>(record.delta.get());
    if (second != nullptr) {
      for (const auto& other : state->sites) {
        if (other.delta.get() == &second->input()) {
          widenings.push_back(
              detail::widen(root, *state, other, record, options));
        }
      }
    } else if (record.delta->replaces_base()) {
      const Tensor tensor = detail::tensor_of(*detail::lock_site(record));
      detail::ActiveEntries entries;
      entries.push_back({record.delta.get(), state->scale});
      torch::NoGradGuard no_grad;
      const Tensor value = detail::folded(entries, peft::base(tensor)).clone();
      detail::check_finite(value, record.name);
      folds.emplace_back(tensor, value);
    }
  }
  detail::detach_adapter(state);
  for (const auto& [tensor, value] : folds) {
    detail::write_base(tensor, value);
  }
  for (const auto& widening : widenings) {
    detail::replace(widening.first->weight, widening.weight1);
    detail::replace(widening.first->bias, widening.bias1);
    detail::replace(widening.second->weight, widening.weight2);
    detail::replace(widening.second->bias, widening.bias2);
    detail::update_options(widening);
  }
}

} // namespace peft
