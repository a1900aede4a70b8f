#pragma once

// Ladder side tuning in the two files; a format of libpeft's own, for no other
// project has one. adapter_config.json holds LadderOptions by their names, and
// peft_type "LADDER". The weights of a side network are named from its call
// site ("base_model.model." + "encoder.layer_loop" + "."):
//
//   first_down.weight, .bias     what goes into the first layer, made narrow
//   down.3.weight, .bias         the same for what comes out of layer 3
//   gate.3                       alpha of layer 3; no entry for other gates
//   block.3....                  the block beside layer 3, as the network names
//                                the layer's own parameters
//   norm....                     after the last block, where the network has
//   one up.weight, .bias             back to the network's width last_gate with
//   merge_last
//
// An encoder whose decoder has a side network has neither of the last two.

#include <peft/io/formats/format.h>
#include <peft/methods/ladder.h>

#include <any>
#include <cstdint>
#include <string>
#include <vector>

namespace peft {

namespace detail {

class LadderFormat final : public AdapterFormat {
 public:
  std::string type() const override {
    return "LADDER";
  }

  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    const auto o =
        LadderOptions(config.get<int64_t>("reduction"))
            .layers(config.get<std::vector<int64_t>>("layers", {}))
            .decoder_layers(
                config.get<std::vector<int64_t>>("decoder_layers", {}))
            .gate(config.get<std::string>("gate", "learnable"))
            .gate_alpha(config.get<double>("gate_alpha", 0))
            .gate_temperature(config.get<double>("gate_temperature", 0.1))
            .init(config.get<std::string>("init", "prune"))
            .merge_last(config.get<bool>("merge_last", false))
            .modules_to_save(
                config.get<std::vector<std::string>>("modules_to_save", {}));
    check(o);
    // The file has every value, so none is pruned from the layers.
    Plan result = detail::plan(LadderOptions(o).init("random"), network);
    result.options = o;
    return result;
  }

  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    const auto& o = std::any_cast<const LadderOptions&>(adapter.options);
    config.set("reduction", o.reduction());
    config.set("layers", o.layers());
    config.set("decoder_layers", o.decoder_layers());
    config.set("gate", o.gate());
    config.set_number("gate_alpha", o.gate_alpha());
    config.set_number("gate_temperature", o.gate_temperature());
    config.set("init", o.init());
    config.set("merge_last", o.merge_last());
    config.set("modules_to_save", o.modules_to_save());
  }
};

} // namespace detail

} // namespace peft
