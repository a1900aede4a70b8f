#pragma once

// How many parameters options would train on a network: closed formulas, so
// that a search can pass over what does not fit before any weight is made.
//
//   bottleneck  2 d r + r + d          d features, a bottleneck of r
//   prefix      2 L l w                L layers of heads of width w together, l
//                                      virtual tokens; by an MLP of width h:
//                                      l w + w h + h + h 2 L w + 2 L w

#include <peft/methods/any_options.h>
#include <peft/methods/parallel_adapter.h>
#include <peft/methods/pfeiffer.h>
#include <peft/methods/prefix.h>

#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// The parameters of one bottleneck; an error where it cannot be made.
inline int64_t num_parameters(const BottleneckOptions& o) {
  check(o);
  const int64_t d = o.width(), r = o.bottleneck();
  return 2 * d * r + (o.bias() ? r + d : 0) +
      (o.layer_norm() != "none" ? 2 * d : 0) + (o.learned_scaling() ? 1 : 0);
}

/// Those of modules trained whole, a tied one once.
inline int64_t num_parameters_of_modules(
    const std::vector<std::string>& modules,
    const Network& network) {
  int64_t count = 0;
  std::vector<Tensor> seen;
  for (const auto& layer : network) {
    if (!is_inside(layer.name, modules)) {
      continue;
    }
    for (const auto& p : layer.parameters) {
      const Tensor& tensor = p.second;
      const bool counts = tensor.defined() && tensor.is_floating_point() &&
          std::none_of(seen.begin(), seen.end(), [&](const Tensor& other) {
                            return is_tied(other, tensor);
                          });
      if (counts) {
        seen.push_back(tensor);
        count += tensor.numel();
      }
    }
  }
  return count;
}

/// A layer that a method acts on: its number through all stacks, its width.
struct CountedLayer {
  int64_t number;
  int64_t width;
};

/// The layers that get a Pfeiffer adapter unless they are left out.
inline std::vector<CountedLayer> counted_layers(
    const PfeifferOptions& options,
    const Network& network) {
  std::vector<CountedLayer> result;
  const auto norms = pfeiffer_norms(options, network);
  const LayerNumbers numbers(norms, {});
  for (const Layer* norm : norms) {
    if (!is_inside(norm->name, options.modules_to_save())) {
      result.push_back(
          {numbers.of(norm->name), norm->parameter("weight").numel()});
    }
  }
  if (norms.empty()) {
    for (const auto& [name, loop] : call_sites<LayerLoopImpl>(network)) {
      for (int64_t i = 0; i < loop->options.num_layers(); ++i) {
        result.push_back(
            {static_cast<int64_t>(result.size()), loop->options.hidden_size()});
      }
    }
  }
  return result;
}

/// The same for parallel adapters.
inline std::vector<CountedLayer> counted_layers(
    const ParallelAdapterOptions& options,
    const Network& network) {
  std::vector<CountedLayer> result;
  const auto outputs = parallel_outputs(options, network);
  const LayerNumbers numbers(layers_in_roles(network, {"output"}), outputs);
  for (const Layer* output : outputs) {
    if (!is_inside(output->name, options.modules_to_save())) {
      result.push_back({numbers.of(output->name), output_width(*output)});
    }
  }
  return result;
}

/// The attentions of a prefix, stack after stack.
inline std::vector<std::vector<CountedLayer>> counted_stacks(
    const PrefixOptions& options,
    const Network& network) {
  const auto all = token_sites(network, "prefix tuning");
  std::vector<std::vector<CountedLayer>> result;
  for (const auto& place : prefix_places(options, all)) {
    const auto& stack = place.second->options;
    const int64_t first = first_layer(all, place);
    auto& layers = result.emplace_back();
    for (int64_t i = 0; i < stack.num_layers(); ++i) {
      layers.push_back({first + i, stack.num_heads() * stack.head_dim()});
    }
  }
  return result;
}

/// What a bottleneck method trains in `layers`.
template <class Options>
int64_t num_parameters_in(
    const Options& options,
    const std::vector<int64_t>& leave_out,
    const std::vector<CountedLayer>& layers) {
  int64_t count = 0, width = -1, each = 0;
  for (const auto& layer : layers) {
    if (!is_left_out(leave_out, layer.number)) {
      if (layer.width != width) {
        width = layer.width;
        each = num_parameters(bottleneck_options(options, width));
      }
      count += each;
    }
  }
  return count;
}

/// What a prefix trains in `stacks`.
inline int64_t num_parameters_in(
    const PrefixOptions& options,
    const std::vector<int64_t>& leave_out,
    const std::vector<std::vector<CountedLayer>>& stacks) {
  const int64_t l = options.num_virtual_tokens();
  int64_t count = 0;
  for (const auto& layers : stacks) {
    int64_t all = 0, width = 0; // of the table, of one layer
    for (const auto& layer : layers) {
      all += is_left_out(leave_out, layer.number) ? 0 : 2 * layer.width;
      width = layer.width;
    }
    if (all > 0 && options.prefix_projection()) {
      const int64_t h = options.encoder_hidden_size().value_or(width);
      count += l * width + width * h + h + h * all + all;
    } else {
      count += l * all;
    }
  }
  return count;
}

/// Puts LibTorch's generator for the CPU back where it was.
class KeptGenerator {
 public:
  KeptGenerator() : generator_(at::detail::getDefaultCPUGenerator()) {
    const std::lock_guard<std::mutex> lock(generator_.mutex());
    state_ = generator_.get_state();
  }
  ~KeptGenerator() {
    const std::lock_guard<std::mutex> lock(generator_.mutex());
    generator_.set_state(state_);
  }
  KeptGenerator(const KeptGenerator&) = delete;
  KeptGenerator& operator=(const KeptGenerator&) = delete;

 private:
  at::Generator generator_;
  Tensor state_;
};

} // namespace detail

/// What `attach(model, options).num_parameters()` would be, from shapes alone.
/// `network` is describe_network(model).
inline int64_t num_parameters(
    const PfeifferOptions& options,
    const Network& network) {
  const auto layers = detail::counted_layers(options, network);
  return detail::num_parameters_in(options, options.leave_out(), layers) +
      detail::num_parameters_of_modules(options.modules_to_save(), network);
}
inline int64_t num_parameters(
    const ParallelAdapterOptions& options,
    const Network& network) {
  const auto layers = detail::counted_layers(options, network);
  return detail::num_parameters_in(options, options.leave_out(), layers) +
      detail::num_parameters_of_modules(options.modules_to_save(), network);
}
inline int64_t num_parameters(
    const PrefixOptions& options,
    const Network& network) {
  detail::check(options);
  const auto stacks = detail::counted_stacks(options, network);
  return detail::num_parameters_in(options, options.leave_out(), stacks) +
      detail::num_parameters_of_modules(options.modules_to_save(), network);
}

/// The same for any other method: plans it and counts what it would train. The
/// adapter's own weights exist meanwhile, the network's are left alone, and so
/// are LibTorch's random numbers.
template <class Options>
int64_t num_parameters(const Options& options, const Network& network) {
  const detail::KeptGenerator kept;
  auto plan = detail::plan_of(options, network);
  detail::drop_tied(plan.sites);
  int64_t count = 0;
  for (const auto& site : plan.sites) {
    for (const auto& p : site.delta->parameters()) {
      count += p.numel();
    }
  }
  return count;
}

/// The same for a model.
template <class Options>
int64_t num_parameters(const Options& options, torch::nn::Module& model) {
  return num_parameters(options, describe_network(model));
}

} // namespace peft
