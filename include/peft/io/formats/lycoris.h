#pragma once

// LoHa and LoKr as HF PEFT's configs and files have them.

#include <peft/io/formats/tuner.h>
#include <peft/methods/loha.h>
#include <peft/methods/lokr.h>

#include <string>
#include <variant>

namespace peft {

namespace detail {

/// The fields of LoHa and LoKr.
template <class Options, class D>
class LycorisFormat : public TunerFormat<Options, D> {
 protected:
  void read_own(const AdapterConfig& config, Options& o) const override {
    o.r(config.get<int64_t>("r", 8));
    o.alpha(config.get<double>("alpha", 8));
    o.rank_dropout(config.get<double>("rank_dropout", 0));
    o.module_dropout(config.get<double>("module_dropout", 0));
    o.use_effective_conv2d(config.get<bool>("use_effective_conv2d", false));
    o.rank_pattern(pattern_field(config, "rank_pattern"));
    o.alpha_pattern(pattern_field(config, "alpha_pattern"));
  }
  void write_own(const Options& o, AdapterConfig& config) const override {
    config.set("r", o.r());
    config.set_number("alpha", o.alpha());
    config.set("rank_dropout", o.rank_dropout());
    config.set("module_dropout", o.module_dropout());
    config.set("use_effective_conv2d", o.use_effective_conv2d());
    write_pattern<int64_t>(config, "rank_pattern", o.rank_pattern());
    write_pattern<double>(config, "alpha_pattern", o.alpha_pattern());
  }
  bool has_fan_in_fan_out() const override {
    return false; // HF's two know no Conv1D
  }
};

class LoHaFormat final : public LycorisFormat<LoHaOptions, LoHaDelta> {
 public:
  std::string type() const override {
    return "LOHA";
  }

 protected:
  void read_own(const AdapterConfig& config, LoHaOptions& o) const override {
    LycorisFormat::read_own(config, o);
    o.init_weights(config.get<bool>("init_weights", true));
  }
  void write_own(const LoHaOptions& o, AdapterConfig& config) const override {
    LycorisFormat::write_own(o, config);
    config.set("init_weights", o.init_weights());
  }
};

class LoKrFormat final : public LycorisFormat<LoKrOptions, LoKrDelta> {
 public:
  std::string type() const override {
    return "LOKR";
  }

 protected:
  void read_own(const AdapterConfig& config, LoKrOptions& o) const override {
    LycorisFormat::read_own(config, o);
    o.decompose_both(config.get<bool>("decompose_both", false));
    o.decompose_factor(config.get<int64_t>("decompose_factor", -1));
    o.rank_dropout_scale(config.get<bool>("rank_dropout_scale", false));
    const auto init = config.get<FlagOrName>("init_weights", true);
    const auto* flag = std::get_if<bool>(&init);
    o.init_weights(
        flag == nullptr ? std::get<std::string>(init)
            : *flag     ? "zero"
                        : "random");
  }
  void write_own(const LoKrOptions& o, AdapterConfig& config) const override {
    LycorisFormat::write_own(o, config);
    config.set("decompose_both", o.decompose_both());
    config.set("decompose_factor", o.decompose_factor());
    config.set("rank_dropout_scale", o.rank_dropout_scale());
    if (o.init_weights() == "lycoris") {
      config.set("init_weights", o.init_weights());
    } else {
      config.set("init_weights", o.init_weights() == "zero");
    }
  }
};

} // namespace detail

} // namespace peft
