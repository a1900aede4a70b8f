#pragma once

// Methods made of methods (MAM, UniPELT, gated and scaled ones): no method of
// HF's. The config holds one of each part's own, which the part's own format
// writes and reads, and the tensors have the part's name in front:
//
//   {"peft_type": "MAM", "parts": ["prefix_tuning", "parallel_adapter"],
//    "prefix_tuning": {"peft_type": "PREFIX_TUNING", ...}, ...}
//   parallel_adapter.base_model.model.layers.0.linear1.adapter_down.0.weight
//
// A gate's and a scale's tensors stand beside those of what they are put on.

#include <peft/io/formats/format.h>
#include <peft/methods/decorated.h>
#include <peft/methods/union.h>

#include <any>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

using AdapterFormats = std::vector<std::shared_ptr<const AdapterFormat>>;

/// The first word of a site's part, and the rest.
inline std::pair<std::string, std::string> split_part(const std::string& part) {
  const auto dot = part.find('.');
  return dot == std::string::npos
      ? std::pair<std::string, std::string>{part, ""}
      : std::pair<std::string, std::string>{
            part.substr(0, dot), part.substr(dot + 1)};
}

/// The files of every union; its own name is the adapter's method.
class UnionFormat : public AdapterFormat {
 public:
  /// `formats` gives those of the parts, when it is asked.
  explicit UnionFormat(std::function<const AdapterFormats&()> formats)
      : formats_(std::move(formats)) {}

  std::string type() const override {
    return "UNION";
  }
  bool reads(const AdapterConfig& config) const override {
    return config.has("peft_type") && config.has("parts");
  }
  bool writes(const AdapterState& adapter) const override {
    return std::any_cast<UnionParts>(&adapter.options) != nullptr;
  }

  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    Plan result;
    result.method = config.peft_type();
    for (const auto& key : config.get<std::vector<std::string>>("parts")) {
      AdapterConfig section = config.section(key);
      if (config.has("inference_mode")) {
        section.set("inference_mode", config.get<bool>("inference_mode"));
      }
      const auto& format = find(
          [&](const AdapterFormat& f) { return f.reads(section); },
          "its part '" + key + "'");
      join(result, format.plan(section, network), key);
    }
    return result;
  }

  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    config.set("peft_type", adapter.method);
    const auto loaded = adapter.loaded_config.empty()
        ? AdapterConfig()
        : AdapterConfig::parse(adapter.loaded_config);
    std::vector<std::string> keys;
    for (const auto& part : parts_of(adapter)) {
      auto own = state_of(adapter, part);
      const auto& format = format_of(*own);
      AdapterConfig section = format.new_config();
      if (loaded.has(part.key)) {
        section = loaded.section(part.key);
        own->loaded_config = section.dump();
      }
      format.write(*own, section);
      config.set(part.key, section);
      keys.push_back(part.key);
    }
    config.set("parts", keys);
  }

  NamedTensorList pack(const AdapterState& adapter) const override {
    NamedTensorList tensors;
    for (const auto& part : parts_of(adapter)) {
      const auto own = state_of(adapter, part);
      for (auto& item : format_of(*own).pack(*own)) {
        tensors.emplace_back(part.key + "." + item.first, item.second);
      }
    }
    return tensors;
  }

  NamedTensorMap unpack(const NamedTensorMap& file, const Plan& plan)
      const override {
    NamedTensorMap result;
    for (const auto& part :
         std::any_cast<const UnionParts&>(plan.options).parts) {
      const Plan own = plan_of(plan, part);
      for (auto& item : format_of(own).unpack(tensors_of(file, part), own)) {
        result.insert(std::move(item));
      }
    }
    // What is no part's is reported as unexpected.
    for (const auto& [key, value] : file) {
      if (key.find('.') == std::string::npos ||
          !has_part(plan, split_part(key).first)) {
        result.emplace(key, value);
      }
    }
    return result;
  }

  std::string lost_without_training_file(const Plan& plan) const override {
    for (const auto& part :
         std::any_cast<const UnionParts&>(plan.options).parts) {
      const Plan own = plan_of(plan, part);
      auto lost = format_of(own).lost_without_training_file(own);
      if (!lost.empty()) {
        return lost;
      }
    }
    return {};
  }

  void complete(Plan& plan, const Network& network, const NamedTensorMap& file)
      const override {
    for (const auto& part :
         std::any_cast<const UnionParts&>(plan.options).parts) {
      Plan own = plan_of(plan, part);
      format_of(own).complete(own, network, tensors_of(file, part));
      size_t next = 0; // the sites stay, what they hold may change
      for (auto& site : plan.sites) {
        if (split_part(site.part).first == part.key) {
          site.delta = own.sites.at(next++).delta;
        }
      }
    }
  }

 private:
  static const std::vector<UnionPart>& parts_of(const AdapterState& adapter) {
    return std::any_cast<const UnionParts&>(adapter.options).parts;
  }

  static bool has_part(const Plan& plan, const std::string& key) {
    const auto& parts = std::any_cast<const UnionParts&>(plan.options).parts;
    return std::any_of(parts.begin(), parts.end(), [&](const UnionPart& part) {
      return part.key == key;
    });
  }

  /// One part of an adapter, as if it were an adapter of its own.
  static std::unique_ptr<AdapterState> state_of(
      const AdapterState& adapter,
      const UnionPart& part) {
    auto result = std::make_unique<AdapterState>();
    result->name = adapter.name;
    result->method = part.method;
    result->options = part.options;
    for (auto site : adapter.sites) {
      const auto [key, rest] = split_part(site.part);
      if (key == part.key) {
        site.part = rest;
        result->sites.push_back(std::move(site));
      }
    }
    return result;
  }

  static Plan plan_of(const Plan& plan, const UnionPart& part) {
    Plan result;
    result.method = part.method;
    result.options = part.options;
    for (auto site : plan.sites) {
      const auto [key, rest] = split_part(site.part);
      if (key == part.key) {
        site.part = rest;
        result.sites.push_back(std::move(site));
      }
    }
    return result;
  }

  static NamedTensorMap tensors_of(
      const NamedTensorMap& file,
      const UnionPart& part) {
    NamedTensorMap result;
    for (const auto& [key, value] : file) {
      const auto [first, rest] = split_part(key);
      if (first == part.key && !rest.empty()) {
        result.emplace(rest, value);
      }
    }
    return result;
  }

  /// Formats with files of another form than HF's cannot be a part.
  template <class Fits>
  const AdapterFormat& find(Fits&& fits, const std::string& what) const {
    for (const auto& format : formats_()) {
      if (format->weight_files().front() == kWeightsFile &&
          format->further_files().empty() && fits(*format)) {
        return *format;
      }
    }
    TORCH_CHECK(
        false,
        "peft: ",
        what,
        " is of no method that this version of libpeft reads or writes as a "
        "part of another");
    return *this;
  }

  const AdapterFormat& format_of(const AdapterState& part) const {
    return find(
        [&](const AdapterFormat& f) { return f.writes(part); },
        "a part of the method " + part.method);
  }
  const AdapterFormat& format_of(const Plan& part) const {
    AdapterState state;
    state.method = part.method;
    state.options = part.options;
    return format_of(state);
  }

  std::function<const AdapterFormats&()> formats_;
};

/// A method with something put on each of its sites: a union of one part, and
/// the options of the decoration beside it.
template <class DecorationOptions>
class DecoratedFormat : public UnionFormat {
 public:
  using UnionFormat::UnionFormat;

  bool reads(const AdapterConfig& config) const override {
    return config.has("peft_type") && config.peft_type() == type();
  }
  bool writes(const AdapterState& adapter) const override {
    const auto* parts = std::any_cast<UnionParts>(&adapter.options);
    return parts != nullptr &&
        std::any_cast<DecorationOptions>(&parts->decoration) != nullptr;
  }
  std::string type() const override = 0;

  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    Plan result = UnionFormat::plan(config, network);
    const auto options = read_options(config);
    decorate(
        result,
        factor_kind_of(options),
        config.get<std::vector<std::string>>("plain_modules", {}),
        maker_of(options));
    auto& parts = std::any_cast<UnionParts&>(result.options);
    parts.decoration = options;
    parts.plain = config.get<std::vector<std::string>>("plain_modules", {});
    return result;
  }

  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    UnionFormat::write(adapter, config);
    const auto& parts = std::any_cast<const UnionParts&>(adapter.options);
    config.set("plain_modules", parts.plain);
    write_options(
        std::any_cast<const DecorationOptions&>(parts.decoration), config);
  }

 protected:
  virtual DecorationOptions read_options(const AdapterConfig& config) const = 0;
  virtual void write_options(
      const DecorationOptions& options,
      AdapterConfig& config) const = 0;
};

class GatedFormat final : public DecoratedFormat<GateOptions> {
 public:
  using DecoratedFormat::DecoratedFormat;

  std::string type() const override {
    return "GATED";
  }

 protected:
  GateOptions read_options(const AdapterConfig& config) const override {
    const GateOptions defaults;
    return GateOptions()
        .average(config.get<std::string>("average", defaults.average()))
        .batch_first(config.get<bool>("batch_first", defaults.batch_first()))
        .init_std(config.get<double>("init_std", defaults.init_std()))
        .init_bias(config.get<double>("init_bias", defaults.init_bias()));
  }
  void write_options(const GateOptions& options, AdapterConfig& config)
      const override {
    config.set("average", options.average());
    config.set("batch_first", options.batch_first());
    config.set_number("init_std", options.init_std());
    config.set_number("init_bias", options.init_bias());
  }
};

class ScaledFormat final : public DecoratedFormat<ScaleOptions> {
 public:
  using DecoratedFormat::DecoratedFormat;

  std::string type() const override {
    return "SCALED";
  }

 protected:
  ScaleOptions read_options(const AdapterConfig& config) const override {
    return ScaleOptions(config.get<double>("value"))
        .learned(config.get<bool>("learned", false));
  }
  void write_options(const ScaleOptions& options, AdapterConfig& config)
      const override {
    config.set_number("value", options.value());
    config.set("learned", options.learned());
  }
};

} // namespace detail

} // namespace peft
