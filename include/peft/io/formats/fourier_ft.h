#pragma once

// FourierFT as HF PEFT's config and file have it.

#include <peft/io/formats/tuner.h>
#include <peft/methods/fourier_ft.h>

#include <string>

namespace peft {

namespace detail {

class FourierFtFormat final
    : public TunerFormat<FourierFtOptions, FourierFtDelta> {
 public:
  std::string type() const override {
    return "FOURIERFT";
  }

 protected:
  void read_own(const AdapterConfig& config, FourierFtOptions& o)
      const override {
    o.n_frequency(config.get<int64_t>("n_frequency", 1000));
    o.scaling(config.get<double>("scaling", 150));
    o.random_loc_seed(config.get<int64_t>("random_loc_seed", 777));
    o.init_weights(config.get<bool>("init_weights", false));
    o.n_frequency_pattern(pattern_field(config, "n_frequency_pattern"));
    o.bias(config.get<std::string>("bias", "none"));
  }
  void write_own(const FourierFtOptions& o, AdapterConfig& config)
      const override {
    config.set("n_frequency", o.n_frequency());
    config.set("scaling", o.scaling());
    config.set("random_loc_seed", o.random_loc_seed());
    config.set("init_weights", o.init_weights());
    write_pattern<int64_t>(
        config, "n_frequency_pattern", o.n_frequency_pattern());
    config.set("bias", o.bias());
  }
};

} // namespace detail

} // namespace peft
