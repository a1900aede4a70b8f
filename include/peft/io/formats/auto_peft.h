#pragma once

// An AutoPEFT configuration: a union's file (io/formats/union.h) of up to three
// parts, "serial", "parallel" and "prefix".

#include <peft/io/formats/union.h>
#include <peft/methods/auto_peft.h>

#include <string>

namespace peft {

namespace detail {

class AutoPeftFormat final : public UnionFormat {
 public:
  using UnionFormat::UnionFormat;

  std::string type() const override {
    return "AUTO_PEFT";
  }
  bool reads(const AdapterConfig& config) const override {
    return config.has("peft_type") && config.peft_type() == type();
  }
  bool writes(const AdapterState& adapter) const override {
    return adapter.method == type();
  }

  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    Plan result = UnionFormat::plan(config, network);
    set_side_by_side(result);
    return result;
  }
};

} // namespace detail

} // namespace peft
