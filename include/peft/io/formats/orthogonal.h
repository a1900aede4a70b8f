#pragma once

// HRA, OFT and BOFT as HF PEFT's configs and files have them.

#include <peft/io/formats/tuner.h>
#include <peft/methods/boft.h>
#include <peft/methods/hra.h>
#include <peft/methods/oft.h>

#include <string>

namespace peft {

namespace detail {

class HraFormat final : public TunerFormat<HraOptions, HraDelta> {
 public:
  std::string type() const override {
    return "HRA";
  }

 protected:
  void read_own(const AdapterConfig& config, HraOptions& o) const override {
    o.r(config.get<int64_t>("r", 8));
    o.apply_GS(config.get<bool>("apply_GS", false));
    o.init_weights(config.get<bool>("init_weights", true));
    o.bias(config.get<std::string>("bias", "none"));
  }
  void write_own(const HraOptions& o, AdapterConfig& config) const override {
    config.set("r", o.r());
    config.set("apply_GS", o.apply_GS());
    config.set("init_weights", o.init_weights());
    config.set("bias", o.bias());
  }
  bool has_fan_in_fan_out() const override {
    return false;
  }
};

class OftFormat final : public TunerFormat<OftOptions, OftDelta> {
 public:
  std::string type() const override {
    return "OFT";
  }

 protected:
  void read_own(const AdapterConfig& config, OftOptions& o) const override {
    o.r(config.get<int64_t>("r", 0));
    o.oft_block_size(config.get<int64_t>("oft_block_size", 32));
    o.module_dropout(config.get<double>("module_dropout", 0));
    o.coft(config.get<bool>("coft", false));
    o.eps(config.get<double>("eps", 6e-5));
    o.block_share(config.get<bool>("block_share", false));
    o.use_cayley_neumann(config.get<bool>("use_cayley_neumann", true));
    o.num_cayley_neumann_terms(
        config.get<int64_t>("num_cayley_neumann_terms", 5));
    o.init_weights(config.get<bool>("init_weights", true));
    o.bias(config.get<std::string>("bias", "none"));
  }
  void write_own(const OftOptions& o, AdapterConfig& config) const override {
    config.set("r", o.r());
    config.set("oft_block_size", o.oft_block_size());
    config.set("module_dropout", o.module_dropout());
    config.set("coft", o.coft());
    config.set("eps", o.eps());
    config.set("block_share", o.block_share());
    config.set("use_cayley_neumann", o.use_cayley_neumann());
    config.set("num_cayley_neumann_terms", o.num_cayley_neumann_terms());
    config.set("init_weights", o.init_weights());
    config.set("bias", o.bias());
  }
};

class BoftFormat final : public TunerFormat<BoftOptions, BoftDelta> {
 public:
  std::string type() const override {
    return "BOFT";
  }

 protected:
  void read_own(const AdapterConfig& config, BoftOptions& o) const override {
    o.boft_block_size(config.get<int64_t>("boft_block_size", 4));
    o.boft_block_num(config.get<int64_t>("boft_block_num", 0));
    o.boft_n_butterfly_factor(
        config.get<int64_t>("boft_n_butterfly_factor", 1));
    o.dropout(config.get<double>("boft_dropout", 0));
    o.init_weights(config.get<bool>("init_weights", true));
    o.bias(config.get<std::string>("bias", "none"));
  }
  void write_own(const BoftOptions& o, AdapterConfig& config) const override {
    config.set("boft_block_size", o.boft_block_size());
    config.set("boft_block_num", o.boft_block_num());
    config.set("boft_n_butterfly_factor", o.boft_n_butterfly_factor());
    config.set("boft_dropout", o.dropout());
    config.set("init_weights", o.init_weights());
    config.set("bias", o.bias());
  }
};

} // namespace detail

} // namespace peft
