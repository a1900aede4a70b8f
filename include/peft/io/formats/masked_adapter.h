#pragma once

// A masked adapter is saved as the method that it masks: whoever knows nothing
// of masks reads its weights, zeros and all. What marks it is one field more in
// the config, and the masks in the training file, from which training goes on.

#include <peft/io/formats/format.h>
#include <peft/methods/masked.h>

#include <any>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

class MaskedFormat final : public AdapterFormat {
 public:
  using AdapterFormats = std::vector<std::shared_ptr<const AdapterFormat>>;

  /// `formats` gives those of the masked methods, when it is asked.
  explicit MaskedFormat(std::function<const AdapterFormats&()> formats)
      : formats_(std::move(formats)) {}

  std::string type() const override {
    return kMaskedMethod;
  }
  bool reads(const AdapterConfig& config) const override {
    return config.has(kMark);
  }

  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    return masked(inner(
                      [&](const AdapterFormat& f) { return f.reads(config); },
                      config.get<std::string>("peft_type"))
                      .plan(config, network));
  }

  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    const auto state = unmasked(adapter);
    const auto& format = inner_of(*state);
    if (!config.has(kMark)) {
      config = format.new_config();
    }
    format.write(*state, config);
    config.set(kMark, true);
  }

  NamedTensorList pack(const AdapterState& adapter) const override {
    const auto state = unmasked(adapter);
    return inner_of(*state).pack(*state);
  }

  void complete(Plan& plan, const Network& network, const NamedTensorMap& file)
      const override {
    auto own = std::any_cast<MaskedOptions>(plan.options);
    plan.method = own.method;
    plan.options = std::move(own.options);
    inner_of(plan).complete(plan, network, file);
    plan.options = MaskedOptions{plan.method, std::move(plan.options)};
    plan.method = kMaskedMethod;
  }

  std::string lost_without_training_file(const Plan& /*plan*/) const override {
    return "the masks: entries that were pruned would train like all others";
  }

  NamedTensorMap unpack(const NamedTensorMap& file, const Plan& plan)
      const override {
    Plan own = plan;
    const auto& options = std::any_cast<const MaskedOptions&>(plan.options);
    own.method = options.method;
    own.options = options.options;
    return inner_of(own).unpack(file, own);
  }

 private:
  static constexpr const char* kMark = "libpeft_masked";

  /// The inner method's format, one that has the usual files.
  template <class Fits>
  const AdapterFormat& inner(Fits&& fits, const std::string& method) const {
    for (const auto& format : formats_()) {
      if (format.get() != this && fits(*format) &&
          format->weight_files() == weight_files()) {
        return *format;
      }
    }
    TORCH_CHECK(
        false,
        "peft: a masked adapter of method ",
        method,
        " has no files in this version of libpeft");
  }
  const AdapterFormat& inner_of(const AdapterState& state) const {
    return inner(
        [&](const AdapterFormat& f) { return f.writes(state); }, state.method);
  }
  const AdapterFormat& inner_of(const Plan& plan) const {
    AdapterState state;
    state.method = plan.method;
    state.options = plan.options;
    return inner_of(state);
  }

  /// The adapter as the inner method would have it.
  static std::shared_ptr<AdapterState> unmasked(const AdapterState& adapter) {
    const auto& own = std::any_cast<const MaskedOptions&>(adapter.options);
    auto state = std::make_shared<AdapterState>();
    state->name = adapter.name;
    state->method = own.method;
    state->options = own.options;
    state->loaded_config = adapter.loaded_config;
    state->sites = adapter.sites;
    return state;
  }

  std::function<const AdapterFormats&()> formats_;
};

} // namespace detail

} // namespace peft
