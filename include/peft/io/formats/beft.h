#pragma once

// BEFT as HF PEFT's config and file have it.

#include <peft/io/formats/tuner.h>
#include <peft/methods/beft.h>

#include <string>

namespace peft {

namespace detail {

class BeftFormat final : public TunerFormat<BeftOptions, BeftDelta> {
 public:
  std::string type() const override {
    return "BEFT";
  }

 protected:
  void read_own(const AdapterConfig& config, BeftOptions& o) const override {
    o.init_weights(config.get<bool>("init_weights", true));
  }
  void write_own(const BeftOptions& o, AdapterConfig& config) const override {
    config.set("init_weights", o.init_weights());
  }
  bool has_fan_in_fan_out() const override {
    return false;
  }
  bool has_exclude_modules() const override {
    return false;
  }
  bool has_layers() const override {
    return false;
  }
};

} // namespace detail

} // namespace peft
