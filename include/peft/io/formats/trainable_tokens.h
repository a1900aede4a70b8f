#pragma once

// Trainable tokens as HF PEFT's config and file have them.

#include <peft/io/formats/tuner.h>
#include <peft/methods/trainable_tokens.h>

#include <iterator>
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
  bool moves_ties(
      const AdapterConfig& /*config*/,
      const PlannedSite& site,
      const Network& network) const override {
    return moves_tied_rows(site, network);
  }

  /// PEFT repeats the rows under every name that is tied to the embedding.
  NamedTensorList pack(const AdapterState& adapter) const override {
    auto tensors = TunerFormat::pack(adapter);
    for (const auto& site : adapter.sites) {
      for (size_t i = 1; i < site.parameters.size(); ++i) {
        const auto& path = site.parameters[i];
        for (const auto& item : site.delta->file_tensors()) {
          tensors.emplace_back(
              kKeyPrefix +
                  file_key(path.substr(0, path.rfind('.')), item.first),
              item.second.detach());
        }
      }
    }
    return tensors;
  }
  NamedTensorMap unpack(const NamedTensorMap& file, const Plan& plan)
      const override {
    auto tensors = TunerFormat::unpack(file, plan);
    for (auto item = tensors.begin(); item != tensors.end();) {
      item =
          repeats(*item, tensors, plan) ? tensors.erase(item) : std::next(item);
    }
    return tensors;
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

 private:
  static bool repeats(
      const NamedTensorMap::value_type& item,
      const NamedTensorMap& tensors,
      const Plan& plan) {
    const std::string end = ".trainable_tokens_delta";
    if (item.first.size() < end.size() ||
        item.first.compare(item.first.size() - end.size(), end.size(), end)) {
      return false;
    }
    bool is_own = false, is_repeated = false;
    for (const auto& site : plan.sites) {
      const auto key = site.file_prefix + end;
      const auto found = tensors.find(key);
      is_own = is_own || key == item.first;
      is_repeated = is_repeated ||
          (found != tensors.end() && at::equal(found->second, item.second));
    }
    return is_repeated && !is_own;
  }
};

} // namespace detail

} // namespace peft
