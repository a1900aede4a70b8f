#pragma once

// Houlsby, Pfeiffer and parallel adapters where adapter-hub's files cannot say
// what they are: with layer norms that train, at layers of the user's choice,
// in networks whose names adapter-hub does not have. The same two files as HF
// PEFT's, with a "peft_type" of libpeft's own; a bottleneck's tensors are named
// as adapter-hub names them, below the layer's name:
//
//   base_model.model.layers.0.linear2.adapter_down.0.weight

#include <peft/io/formats/format.h>
#include <peft/methods/houlsby.h>
#include <peft/methods/parallel_adapter.h>
#include <peft/methods/pfeiffer.h>

#include <any>
#include <string>
#include <vector>

namespace peft {

namespace detail {

/// The fields that the three methods share.
template <class Options>
void read_bottleneck_fields(const AdapterConfig& config, Options& o) {
  if (config.has("bottleneck")) {
    o.bottleneck(config.get<int64_t>("bottleneck"));
  }
  if (config.has("reduction_factor")) {
    o.reduction_factor(config.get<double>("reduction_factor"));
  }
  o.non_linearity(config.get<std::string>("non_linearity", o.non_linearity()));
  o.leave_out(config.get<std::vector<int64_t>>("leave_out", {}));
  if (config.has("target_modules")) {
    o.targets(targets_field(config, "target_modules"));
  }
  o.modules_to_save(
      config.get<std::vector<std::string>>("modules_to_save", {}));
}

template <class Options>
void write_bottleneck_fields(const Options& o, AdapterConfig& config) {
  config.set("bottleneck", nullptr).set("reduction_factor", nullptr);
  if (o.bottleneck()) {
    config.set("bottleneck", *o.bottleneck());
  }
  if (o.reduction_factor()) {
    config.set_number("reduction_factor", *o.reduction_factor());
  }
  config.set("non_linearity", o.non_linearity());
  config.set("leave_out", o.leave_out());
  config.set("modules_to_save", o.modules_to_save());
}

/// The modules that carry a bottleneck's deltas, by name, where the options
/// have a predicate, which no file can hold.
template <class D>
void write_chosen(
    const AdapterState& adapter,
    AdapterConfig& config,
    const std::string& field,
    const Targets& targets) {
  if (targets.kind() != Targets::Kind::predicate &&
      targets.kind() != Targets::Kind::all_linear) {
    write_targets(config, field, targets);
    return;
  }
  std::vector<std::string> names;
  for (const auto& site : adapter.sites) {
    if (dynamic_cast<const D*>(site.delta.get()) != nullptr) {
      names.push_back(site.name);
    }
  }
  config.set(field, names);
}

class HoulsbyFormat final : public AdapterFormat {
 public:
  std::string type() const override {
    return "HOULSBY";
  }

  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    HoulsbyOptions o;
    read_bottleneck_fields(config, o);
    o.train_layer_norms(config.get<bool>("train_layer_norms", true));
    o.cross_attention(config.get<bool>("cross_attention", false));
    return detail::plan(o, network);
  }

  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    const auto& o = std::any_cast<const HoulsbyOptions&>(adapter.options);
    write_bottleneck_fields(o, config);
    write_chosen<HoulsbyDelta>(adapter, config, "target_modules", o.targets());
    config.set("train_layer_norms", o.train_layer_norms());
    config.set("cross_attention", o.cross_attention());
  }
};

class PfeifferFormat final : public AdapterFormat {
 public:
  std::string type() const override {
    return "PFEIFFER";
  }

  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    PfeifferOptions o;
    read_bottleneck_fields(config, o);
    return detail::plan(o, network);
  }

  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    const auto& o = std::any_cast<const PfeifferOptions&>(adapter.options);
    write_bottleneck_fields(o, config);
    write_chosen<PfeifferNormDelta>(
        adapter, config, "target_modules", o.targets());
  }
};

class ParallelAdapterFormat final : public AdapterFormat {
 public:
  std::string type() const override {
    return "PARALLEL_ADAPTER";
  }

  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    ParallelAdapterOptions o;
    read_bottleneck_fields(config, o);
    o.scaling(config.get<double>("scaling", o.scaling()));
    o.learned_scaling(config.get<bool>("learned_scaling", false));
    o.layer_norm(config.get<std::string>("layer_norm", "none"));
    o.dropout(config.get<double>("dropout", 0));
    o.bias(config.get<bool>("bias", true));
    if (config.has("input_modules")) {
      o.inputs(targets_field(config, "input_modules"));
    }
    return detail::plan(o, network);
  }

  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    const auto& o =
        std::any_cast<const ParallelAdapterOptions&>(adapter.options);
    write_bottleneck_fields(o, config);
    write_chosen<ParallelOutputDelta>(
        adapter, config, "target_modules", o.targets());
    write_chosen<ParallelInputDelta>(
        adapter, config, "input_modules", o.inputs());
    config.set_number("scaling", o.scaling());
    config.set("learned_scaling", o.learned_scaling());
    config.set("layer_norm", o.layer_norm());
    config.set_number("dropout", o.dropout());
    config.set("bias", o.bias());
  }
};

} // namespace detail

} // namespace peft
