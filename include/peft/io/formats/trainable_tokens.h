#pragma once

// Trainable tokens as HF PEFT's config and file have them.

#include <peft/io/formats/tuner.h>
#include <peft/methods/trainable_tokens.h>

#include <string>
#include <vector>

namespace peft {

namespace detail {

class TrainableTokensFormat final
    : public TunerFormat<TrainableTokensOptions, TrainableTokensDelta> {
 public:
  std::string type() const override {
    return "TRAINABLE_TOKENS";
  }
  AdapterConfig new_config() const override {
    return TunerFormat::new_config().erase("modules_to_save");
  }

 protected:
  void read_own(const AdapterConfig& config, TrainableTokensOptions& o)
      const override {
    o.token_indices(config.get<std::vector<int64_t>>("token_indices", {}));
    o.init_weights(config.get<bool>("init_weights", true));
  }
  void write_own(const TrainableTokensOptions& o, AdapterConfig& config)
      const override {
    config.set("token_indices", o.token_indices());
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
