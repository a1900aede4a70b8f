#pragma once

// Cartridges as HF PEFT's CartridgeConfig and files have them.
//
//   prompt_embeddings  keys and values, the frozen tokens' first
//
// Nothing that training needs is missing from such a file.

#include <peft/io/formats/prompt.h>
#include <peft/methods/cartridge.h>

#include <any>
#include <string>

namespace peft {

namespace detail {

class CartridgeFormat final : public KeyValueFormat {
 public:
  std::string type() const override {
    return "CARTRIDGE";
  }

  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    CartridgeOptions o(virtual_tokens(config));
    read_common(config, network, o);
    read_layout(config, o);
    o.num_frozen_tokens(config.get<int64_t>("num_frozen_tokens", 1));
    Plan result = detail::plan(o, network);
    check_layout(config, result);
    return result;
  }

  AdapterConfig new_config() const override {
    return AdapterConfig::parse(std::string("{") + kCommonFields + R"(
      "num_frozen_tokens": 1,
      "peft_type": "CARTRIDGE"
    })");
  }

  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    const auto& o = std::any_cast<const CartridgeOptions&>(adapter.options);
    write_layout(adapter, o, config);
    config.set("num_frozen_tokens", o.num_frozen_tokens());
  }
};

} // namespace detail

} // namespace peft
