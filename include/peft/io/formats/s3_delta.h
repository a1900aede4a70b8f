#pragma once

#include <peft/io/formats/union.h>
#include <peft/methods/s3_delta.h>

#include <string>
#include <vector>

namespace peft {

namespace detail {

/// The files of a union, and the names of the modules that were chosen from it:
///
///   {"peft_type": "S3DELTA", "parts": [...], ...,
///    "structure": ["lora: encoder.layer.0.query.lora_A.weight", ...]}
class S3DeltaFormat final : public UnionFormat {
 public:
  using UnionFormat::UnionFormat;

  std::string type() const override {
    return kS3DeltaMethod;
  }
  bool reads(const AdapterConfig& config) const override {
    return config.has("peft_type") && config.peft_type() == type();
  }
  bool writes(const AdapterState& adapter) const override {
    return adapter.method == type() && UnionFormat::writes(adapter);
  }

  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    return keep_modules(
        UnionFormat::plan(config, network),
        config.get<std::vector<std::string>>("structure"));
  }
  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    UnionFormat::write(adapter, config);
    std::vector<std::string> names;
    for (const auto& each : modules_of(adapter.sites)) {
      names.push_back(each.module.name);
    }
    config.set("structure", names);
  }
};

} // namespace detail

} // namespace peft
