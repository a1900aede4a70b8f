#pragma once

// AutoPEFT's configuration space (Zhou et al. 2023, arXiv:2301.12132): in every
// layer, or in chosen ones, a serial (Pfeiffer) adapter, a parallel adapter and
// a prefix, each of its own size or absent.
//
//   attention(q, [P_K; K], [P_V; V])
//   LN(v + PA(x) + SA(LN(v)))          v = FFN(x) + x
//
// The serial adapter does not see what the parallel one adds, as in the paper's
// code. In networks that normalise first, with h what a layer gives without the
// two, it is h + PA(x) + SA(h).
//
// What a search chooses among: train/search/auto_peft.h.

#include <peft/methods/count.h>
#include <peft/methods/parallel_adapter.h>
#include <peft/methods/pfeiffer.h>
#include <peft/methods/prefix.h>
#include <peft/methods/union.h>

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for one configuration: a part that is not given is absent.
///
///   peft::AutoPeftOptions()
///       .serial(peft::PfeifferOptions(48)).prefix(peft::PrefixOptions(12))
///       .leave_out({0, 1, 2})
///
/// The published code makes the prefix by an MLP of 800 while it trains:
/// prefix_projection(true).encoder_hidden_size(800).
struct AutoPeftOptions {
  TORCH_ARG(std::optional<PfeifferOptions>, serial);
  TORCH_ARG(std::optional<ParallelAdapterOptions>, parallel);
  /// In every attention, unless its stacks are named.
  TORCH_ARG(std::optional<PrefixOptions>, prefix);
  /// Layers without any of them, counted from 0 through all stacks.
  TORCH_ARG(std::vector<int64_t>, leave_out);
  /// Modules trained whole, beside them: a task head.
  TORCH_ARG(std::vector<std::string>, modules_to_save);
};

namespace detail {

/// LN(v + PA(x) + A(LN(v))) around a layer norm.
class SerialBesideNormDelta final : public BottleneckDelta {
 public:
  SerialBesideNormDelta(
      Bottleneck bottleneck_,
      int64_t layer_,
      std::shared_ptr<const ParallelInputDelta> parallel)
      : BottleneckDelta(std::move(bottleneck_), layer_),
        parallel_(std::move(parallel)) {}

  bool transforms_output() const override {
    return true;
  }
  Tensor around_norm(
      const Tensor& v,
      c10::function_ref<Tensor(const Tensor&)> norm,
      double scale) const override {
    const Tensor z = norm(v);
    if (is_dropped(layer)) {
      return z;
    }
    const Tensor both = (v + term_for(*parallel_, v)).to(v.scalar_type());
    return norm(add_term(both, z, scale));
  }

  void relink(const std::function<std::shared_ptr<Delta>(const Delta*)>&
                  copy_of) override {
    parallel_ = std::dynamic_pointer_cast<const ParallelInputDelta>(
        copy_of(parallel_.get()));
  }
  std::shared_ptr<Delta> copy() const override {
    auto result = std::make_shared<SerialBesideNormDelta>(
        copy_of(*bottleneck), layer, parallel_);
    result->train(is_training());
    return result;
  }

 private:
  std::shared_ptr<const ParallelInputDelta> parallel_;
};

/// h + PA(x) + A(h) behind the layers of one stack.
class SerialBesideLoopDelta final : public PfeifferLoopDelta {
 public:
  using Parallels =
      std::map<int64_t, std::shared_ptr<const ParallelInputDelta>>;

  /// `parallels` by the layers' numbers through all stacks.
  SerialBesideLoopDelta(
      std::vector<Bottleneck> bottlenecks,
      int64_t first,
      Parallels parallels)
      : PfeifferLoopDelta(std::move(bottlenecks), first),
        parallels_(std::move(parallels)) {}

  Tensor layer(
      const LayerCall& call,
      const LayerLoopRun& /*loop*/,
      const std::function<Tensor(const LayerCall&)>& below,
      double scale) const override {
    const Tensor h = below(call);
    if (!acts_in(call.layer)) {
      return h;
    }
    const auto& parallel = parallels_.at(first() + call.layer);
    const Tensor both = (h + term_for(*parallel, h)).to(h.scalar_type());
    return add_term(both, h, call.layer, scale);
  }

  void relink(const std::function<std::shared_ptr<Delta>(const Delta*)>&
                  copy_of) override {
    for (auto& item : parallels_) {
      item.second = std::dynamic_pointer_cast<const ParallelInputDelta>(
          copy_of(item.second.get()));
    }
  }
  std::shared_ptr<Delta> copy() const override {
    auto result =
        std::make_shared<SerialBesideLoopDelta>(copies(), first(), parallels_);
    result->train(is_training());
    return result;
  }

 private:
  Parallels parallels_;
};

/// Where a plan has both, hands what the parallel adapters compute to the
/// serial ones, which add it behind their own input.
inline void set_side_by_side(Plan& plan) {
  SerialBesideLoopDelta::Parallels parallels;
  const auto is_serial = [](const PlannedSite& site) {
    return dynamic_cast<const PfeifferNormDelta*>(site.delta.get()) !=
        nullptr ||
        dynamic_cast<const PfeifferLoopDelta*>(site.delta.get()) != nullptr;
  };
  auto& sites = plan.sites;
  for (const auto& site : sites) {
    if (auto input =
            std::dynamic_pointer_cast<const ParallelInputDelta>(site.delta)) {
      const bool is_first = parallels.emplace(input->layer, input).second;
      TORCH_CHECK_VALUE(
          is_first,
          "peft: AutoPEFT has one parallel adapter a layer, and layer ",
          input->layer,
          " has two, at '",
          site.name,
          "' too; name others in inputs and targets");
    }
  }
  if (parallels.empty() ||
      std::none_of(sites.begin(), sites.end(), is_serial)) {
    return;
  }
  const auto parallel_of = [&](int64_t layer) {
    const auto found = parallels.find(layer);
    TORCH_CHECK_VALUE(
        found != parallels.end(),
        "peft: AutoPEFT has a serial adapter in layer ",
        layer,
        " and no parallel one; name the same layers in the targets of both");
    return found->second;
  };
  size_t serial_layers = 0;
  for (auto& site : sites) {
    if (const auto* norm =
            dynamic_cast<const PfeifferNormDelta*>(site.delta.get())) {
      ++serial_layers;
      site.delta = std::make_shared<SerialBesideNormDelta>(
          norm->bottleneck, norm->layer, parallel_of(norm->layer));
    } else if (
        const auto* loop =
            dynamic_cast<const PfeifferLoopDelta*>(site.delta.get())) {
      SerialBesideLoopDelta::Parallels own;
      for (size_t i = 0; i < loop->bottlenecks().size(); ++i) {
        if (!loop->bottlenecks()[i].is_empty()) {
          const auto number = loop->first() + static_cast<int64_t>(i);
          own.emplace(number, parallel_of(number));
        }
      }
      serial_layers += own.size();
      site.delta = std::make_shared<SerialBesideLoopDelta>(
          loop->bottlenecks(), loop->first(), std::move(own));
    }
  }
  TORCH_CHECK_VALUE(
      serial_layers == parallels.size(),
      "peft: AutoPEFT has serial adapters in ",
      serial_layers,
      " layers and parallel ones in ",
      parallels.size(),
      "; name the same layers in the targets of both");
  sites.erase(
      std::remove_if(
          sites.begin(),
          sites.end(),
          [](const PlannedSite& site) {
            return dynamic_cast<const ParallelOutputDelta*>(site.delta.get()) !=
                nullptr;
          }),
      sites.end());
}

/// A part as the union has it: with its heads, without the layers left out.
template <class Part>
Part part_of(const AutoPeftOptions& options, const Part& part) {
  TORCH_CHECK_VALUE(
      part.leave_out().empty() && part.modules_to_save().empty(),
      "peft: leave_out and modules_to_save are AutoPEFT's own options and not "
      "those of its parts; set them there");
  return with_heads(
      Part(part).leave_out(options.leave_out()), options.modules_to_save());
}

inline void check(const AutoPeftOptions& options) {
  TORCH_CHECK_VALUE(
      options.serial() || options.parallel() || options.prefix(),
      "peft: this AutoPEFT configuration has no module; give one of serial, "
      "parallel and prefix");
}

inline Plan plan(const AutoPeftOptions& options, const Network& network) {
  check(options);
  Plan result;
  result.method = "AUTO_PEFT";
  if (options.serial()) {
    join(result, plan(part_of(options, *options.serial()), network), "serial");
  }
  if (options.parallel()) {
    join(
        result,
        plan(part_of(options, *options.parallel()), network),
        "parallel");
  }
  if (options.prefix()) {
    const auto prefix = part_of(options, *options.prefix());
    join(result, plan(in_every_stack(prefix, network), network), "prefix");
  }
  set_side_by_side(result);
  return result;
}

} // namespace detail

/// Puts one AutoPEFT configuration on `model` and freezes everything else. For
/// a prefix the network gives places, as for PrefixOptions.
inline Adapter attach(
    torch::nn::Module& model,
    const AutoPeftOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

/// What `attach(model, options).num_parameters()` would be, from shapes alone.
inline int64_t num_parameters(
    const AutoPeftOptions& options,
    const Network& network) {
  detail::check(options);
  // Each part is counted without the heads, which they share.
  const auto own = AutoPeftOptions(options).modules_to_save({});
  int64_t count =
      detail::num_parameters_of_modules(options.modules_to_save(), network);
  if (options.serial()) {
    count += num_parameters(detail::part_of(own, *options.serial()), network);
  }
  if (options.parallel()) {
    count += num_parameters(detail::part_of(own, *options.parallel()), network);
  }
  if (options.prefix()) {
    const auto prefix = detail::part_of(own, *options.prefix());
    count += num_parameters(detail::in_every_stack(prefix, network), network);
  }
  return count;
}

} // namespace peft
