#pragma once

// VeRA as HF PEFT's config and file have it.

#include <peft/io/formats/tuner.h>
#include <peft/methods/vera.h>

#include <any>
#include <memory>
#include <string>

namespace peft {

namespace detail {

/// VeRA's A or B in a file, where an adapter's name may stand behind it.
template <class Map>
auto find_projection(Map& file, const std::string& name) {
  auto found = find_in_file(file, name);
  for (const auto& prefix : key_prefixes()) {
    const std::string start = prefix + name + ".";
    const auto next = file.lower_bound(start);
    if (found == file.end() && next != file.end() &&
        next->first.rfind(start, 0) == 0) {
      found = next;
    }
  }
  return found;
}

/// A and B stand once in the file, below "base_model." alone.
class VeraFormat final : public TunerFormat<VeraOptions, VeraDelta> {
 public:
  std::string type() const override {
    return "VERA";
  }

  void complete(
      Plan& plan,
      const Network& /*network*/,
      const NamedTensorMap& file) const override {
    const auto& o = std::any_cast<const VeraOptions&>(plan.options);
    const auto A = find_projection(file, "vera_A");
    const auto B = find_projection(file, "vera_B");
    if (A == file.end() && B == file.end() && !o.save_projection()) {
      return; // the seed gave them
    }
    TORCH_CHECK(
        A != file.end() && B != file.end(),
        "peft: the weights lack vera_A or vera_B, and ",
        kConfigFile,
        " says with save_projection that they hold them; set it to false to "
        "draw both from projection_prng_key");
    auto& projections = *projections_of(plan);
    TORCH_CHECK(
        A->second.sizes() == projections.A().sizes() &&
            B->second.sizes() == projections.B().sizes(),
        "peft: vera_A ",
        A->second.sizes(),
        " and vera_B ",
        B->second.sizes(),
        " do not fit the widest targets of this model and r: ",
        projections.A().sizes(),
        " and ",
        projections.B().sizes());
    projections.set(A->second, B->second);
  }

  NamedTensorMap unpack(const NamedTensorMap& file, const Plan& plan)
      const override {
    NamedTensorMap layers = file;
    for (const char* name : {"vera_A", "vera_B"}) {
      const auto found = find_projection(layers, name);
      if (found != layers.end()) {
        layers.erase(found);
      }
    }
    return AdapterFormat::unpack(layers, plan);
  }

  NamedTensorList pack(const AdapterState& adapter) const override {
    auto tensors = AdapterFormat::pack(adapter);
    const auto& o = std::any_cast<const VeraOptions&>(adapter.options);
    if (o.save_projection()) {
      const auto& projections = *projections_of(adapter);
      tensors.emplace_back("base_model.vera_A", projections.A());
      tensors.emplace_back("base_model.vera_B", projections.B());
    }
    return tensors;
  }

 protected:
  void read_own(const AdapterConfig& config, VeraOptions& o) const override {
    o.r(config.get<int64_t>("r", 256));
    o.projection_prng_key(config.get<int64_t>("projection_prng_key", 0));
    o.save_projection(config.get<bool>("save_projection", true));
    o.dropout(config.get<double>("vera_dropout", 0));
    o.d_initial(config.get<double>("d_initial", 0.1));
    o.init_weights(config.get<bool>("init_weights", true));
    o.bias(config.get<std::string>("bias", "none"));
  }
  void write_own(const VeraOptions& o, AdapterConfig& config) const override {
    config.set("r", o.r());
    config.set("projection_prng_key", o.projection_prng_key());
    config.set("save_projection", o.save_projection());
    config.set("vera_dropout", o.dropout());
    config.set("d_initial", o.d_initial());
    config.set("init_weights", o.init_weights());
    config.set("bias", o.bias());
  }
  bool has_exclude_modules() const override {
    return false;
  }

 private:
  template <class PlanOrState>
  static std::shared_ptr<VeraProjections> projections_of(
      const PlanOrState& adapter) {
    for (const auto& site : adapter.sites) {
      const auto* delta = dynamic_cast<const VeraDelta*>(site.delta.get());
      if (delta != nullptr) {
        return delta->config().projections;
      }
    }
    TORCH_CHECK(false, "peft: this adapter has no VeRA");
    return nullptr;
  }
};

} // namespace detail

} // namespace peft
