#pragma once

// CoDA is no method of HF's; its files have the same form: the options by their
// names, and for each stack and layer "layer_loop.0.router.weight" and the
// adapter's tensors.

#include <peft/io/formats/format.h>
#include <peft/methods/coda.h>

#include <any>
#include <string>
#include <vector>

namespace peft {

namespace detail {

class CodaFormat final : public AdapterFormat {
 public:
  std::string type() const override {
    return "CODA";
  }

  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    CodaOptions o;
    o.k(config.get<int64_t>("k", o.k()));
    o.ratio(config.get<double>("ratio", o.ratio()));
    o.epsilon(config.get<double>("epsilon", o.epsilon()));
    o.solver(config.get<std::string>("solver", o.solver()));
    o.iterations(config.get<int64_t>("iterations", o.iterations()));
    o.epsilon_init(config.get<double>("epsilon_init", o.epsilon_init()));
    o.epsilon_decay(config.get<double>("epsilon_decay", o.epsilon_decay()));
    o.attention(config.get<std::string>("attention", o.attention()));
    o.bottleneck(config.get<int64_t>("bottleneck", o.bottleneck()));
    o.scaling(config.get<double>("scaling", o.scaling()));
    o.layers(config.get<std::vector<int64_t>>("layers", {}));
    o.router_std(config.get<double>("router_std", o.router_std()));
    o.modules_to_save(
        config.get<std::vector<std::string>>("modules_to_save", {}));
    return detail::plan(o, network);
  }

  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    const auto& o = std::any_cast<const CodaOptions&>(adapter.options);
    config.set("k", o.k());
    config.set("ratio", o.ratio());
    config.set("epsilon", o.epsilon());
    config.set("solver", o.solver());
    config.set("iterations", o.iterations());
    config.set("epsilon_init", o.epsilon_init());
    config.set("epsilon_decay", o.epsilon_decay());
    config.set("attention", o.attention());
    config.set("bottleneck", o.bottleneck());
    config.set("scaling", o.scaling());
    config.set("layers", o.layers());
    config.set("router_std", o.router_std());
    config.set("modules_to_save", o.modules_to_save());
  }
};

} // namespace detail

} // namespace peft
