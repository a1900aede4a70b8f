#pragma once

// The weight deltas of HF PEFT beside LoRA and (IA)³, as its configs and files
// have them: LoHa, LoKr, HRA, OFT, BOFT, FourierFT, VeRA,
// AdaLoRA, trainable tokens, BEFT.

#include <peft/io/formats/format.h>
#include <peft/methods/ada_lora.h>
#include <peft/methods/beft.h>
#include <peft/methods/boft.h>
#include <peft/methods/fourier_ft.h>
#include <peft/methods/hra.h>
#include <peft/methods/loha.h>
#include <peft/methods/lokr.h>
#include <peft/methods/oft.h>
#include <peft/methods/trainable_tokens.h>
#include <peft/methods/vera.h>

#include <algorithm>
#include <any>
#include <map>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace peft {

namespace detail {

template <class Value>
void write_pattern(
    AdapterConfig& config,
    const std::string& field,
    const std::vector<std::pair<std::string, double>>& pattern) {
  std::map<std::string, Value> values;
  for (const auto& item : pattern) {
    values.emplace(item.first, static_cast<Value>(item.second));
  }
  if constexpr (std::is_same_v<Value, double>) {
    config.set_numbers(field, values);
  } else {
    config.set(field, values);
  }
}

/// What one tuner adds to the fields that all share.
template <class Options, class D>
class TunerFormat : public AdapterFormat {
 public:
  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    Options o = empty_options();
    TORCH_CHECK(
        config.has("target_modules") && !config.is_empty("target_modules"),
        "peft: ",
        kConfigFile,
        " has no target_modules");
    o.targets(targets_field(config, "target_modules"));
    if (config.has("exclude_modules") && !config.is_empty("exclude_modules")) {
      o.exclude(targets_field(config, "exclude_modules"));
    }
    o.layers(indices_field(config, "layers_to_transform"));
    o.layers_pattern(names_field(config, "layers_pattern"));
    o.fan_in_fan_out(config.get<bool>("fan_in_fan_out", false));
    o.modules_to_save(
        config.get<std::vector<std::string>>("modules_to_save", {}));
    read_own(config, o);
    Options here = o;
    here.modules_to_save(modules_in(network, o.modules_to_save()));
    Plan result = make_plan(here, config, network);
    result.options = std::move(o);
    return result;
  }

  AdapterConfig new_config() const override {
    auto config = AdapterFormat::new_config();
    for (const char* field :
         {"auto_mapping",
          "base_model_name_or_path",
          "modules_to_save",
          "revision",
          "task_type"}) {
      config.set(field, nullptr);
    }
    config.set("peft_version", std::string("0.21.2"));
    return config;
  }

  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    const auto& o = std::any_cast<const Options&>(adapter.options);
    std::vector<std::string> modules;
    bool transposed = o.fan_in_fan_out();
    for (const auto& site : adapter.sites) {
      if (const auto* delta = dynamic_cast<const D*>(site.delta.get())) {
        modules.push_back(site.name);
        transposed = transposed || delta->is_transposed();
      }
    }
    const bool in_words = o.targets().kind() == Targets::Kind::regex ||
        names_modules(o.targets(), adapter);
    if (in_words && (o.exclude().empty() || has_exclude_modules())) {
      write_targets(config, "target_modules", o.targets());
    } else { // predicates are no words of HF's: the layers stand by name
      config.set("target_modules", modules);
    }
    if (has_exclude_modules()) {
      config.set("exclude_modules", nullptr);
      if (!o.exclude().empty()) {
        write_targets(config, "exclude_modules", o.exclude());
      }
    }
    if (has_layers()) {
      config.set("layers_to_transform", nullptr).set("layers_pattern", nullptr);
    }
    if (!o.layers().empty()) {
      config.set("layers_to_transform", o.layers());
    }
    if (!o.layers_pattern().empty()) {
      config.set("layers_pattern", o.layers_pattern());
    }
    if (!o.modules_to_save().empty()) {
      config.set("modules_to_save", o.modules_to_save());
    }
    if (has_fan_in_fan_out()) {
      config.set("fan_in_fan_out", transposed);
    }
    write_own(o, config);
    write_state(adapter, config);
  }

 protected:
  virtual Options empty_options() const {
    if constexpr (std::is_default_constructible_v<Options>) {
      return Options();
    } else {
      return Options({});
    }
  }
  virtual Plan make_plan(
      const Options& o,
      const AdapterConfig& /*config*/,
      const Network& network) const {
    return detail::plan(o, network);
  }
  /// What the config tells of the trained tensors.
  virtual void write_state(
      const AdapterState& /*adapter*/,
      AdapterConfig& /*config*/) const {}
  virtual void read_own(const AdapterConfig& config, Options& o) const = 0;
  virtual void write_own(const Options& o, AdapterConfig& config) const = 0;
  virtual bool has_fan_in_fan_out() const {
    return true;
  }
  virtual bool has_exclude_modules() const {
    return true;
  }
  virtual bool has_layers() const {
    return true;
  }
};

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

class FourierFtFormat final
    : public TunerFormat<FourierFtOptions, FourierFtDelta> {
 public:
  std::string type() const override {
    return "FOURIERFT";
  }

 protected:
  void read_own(const AdapterConfig& config, FourierFtOptions& o)
      const override {
    o.n_frequency(config.get<int64_t>("n_frequency", 1000));
    o.scaling(config.get<double>("scaling", 150));
    o.random_loc_seed(config.get<int64_t>("random_loc_seed", 777));
    o.init_weights(config.get<bool>("init_weights", false));
    o.n_frequency_pattern(pattern_field(config, "n_frequency_pattern"));
    o.bias(config.get<std::string>("bias", "none"));
  }
  void write_own(const FourierFtOptions& o, AdapterConfig& config)
      const override {
    config.set("n_frequency", o.n_frequency());
    config.set("scaling", o.scaling());
    config.set("random_loc_seed", o.random_loc_seed());
    config.set("init_weights", o.init_weights());
    write_pattern<int64_t>(
        config, "n_frequency_pattern", o.n_frequency_pattern());
    config.set("bias", o.bias());
  }
};

/// The ranks that are left at each weight stand in rank_pattern, as masks.
class AdaLoraFormat final : public TunerFormat<AdaLoraOptions, AdaLoraDelta> {
 public:
  std::string type() const override {
    return "ADALORA";
  }

 protected:
  Plan make_plan(
      const AdaLoraOptions& o,
      const AdapterConfig& config,
      const Network& network) const override {
    using Masks = std::map<std::string, std::vector<bool>>;
    const auto masks = config.get<Masks>("rank_pattern", {});
    const std::string end = ".lora_E";
    Ranks ranks;
    for (const auto& [key, mask] : masks) {
      const bool named = key.size() >= end.size() &&
          key.compare(key.size() - end.size(), end.size(), end) == 0;
      TORCH_CHECK(
          named,
          "peft: rank_pattern names '",
          key,
          "', which is no '<module>.lora_E'");
      ranks.emplace_back(
          key.substr(0, key.size() - end.size()),
          std::count(mask.begin(), mask.end(), true));
    }
    return detail::plan(o, network, ranks);
  }
  void read_own(const AdapterConfig& config, AdaLoraOptions& o) const override {
    o.total_step(config.get<int64_t>("total_step", 1));
    o.tinit(config.get<int64_t>("tinit", 0));
    o.tfinal(config.get<int64_t>("tfinal", 0));
    o.deltaT(config.get<int64_t>("deltaT", 1));
    o.init_r(config.get<int64_t>("init_r", 12));
    o.target_r(config.get<int64_t>("target_r", 8));
    o.alpha(config.get<double>("lora_alpha", 8));
    o.dropout(config.get<double>("lora_dropout", 0));
    o.beta1(config.get<double>("beta1", 0.85));
    o.beta2(config.get<double>("beta2", 0.85));
    o.orth_reg_weight(config.get<double>("orth_reg_weight", 0.5));
    o.init_weights(config.get<bool>("init_lora_weights", true));
    o.bias(config.get<std::string>("bias", "none"));
  }
  void write_own(const AdaLoraOptions& o, AdapterConfig& config)
      const override {
    config.set("total_step", o.total_step());
    config.set("tinit", o.tinit());
    config.set("tfinal", o.tfinal());
    config.set("deltaT", o.deltaT());
    config.set("init_r", o.init_r());
    config.set("target_r", o.target_r());
    config.set_number("lora_alpha", o.alpha());
    config.set("lora_dropout", o.dropout());
    config.set("beta1", o.beta1());
    config.set("beta2", o.beta2());
    config.set("orth_reg_weight", o.orth_reg_weight());
    config.set("init_lora_weights", o.init_weights());
    config.set("bias", o.bias());
  }
  void write_state(const AdapterState& adapter, AdapterConfig& config)
      const override {
    std::map<std::string, std::vector<bool>> masks;
    for (const auto& site : adapter.sites) {
      const auto* delta = dynamic_cast<const AdaLoraDelta*>(site.delta.get());
      if (delta != nullptr && delta->config().kept.defined()) {
        auto& mask = masks[site.file_prefix + ".lora_E"];
        const Tensor kept = delta->config().kept.cpu();
        for (int64_t i = 0; i < kept.numel(); ++i) {
          mask.push_back(kept[i].item<bool>());
        }
      }
    }
    if (!masks.empty()) {
      config.set("rank_pattern", masks);
    }
  }
};

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

class BeftFormat final : public TunerFormat<BeftOptions, BeftDelta> {
 public:
  std::string type() const override {
    return "BEFT";
  }

 protected:
  void read_own(const AdapterConfig& config, BeftOptions& o) const override {
    o.init_weights(config.get<bool>("init_weights", true));
  }
  void write_own(const BeftOptions& o, AdapterConfig& config) const override {
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

/// VeRA's A or B, under the name that PEFT gives it or without its prefix.
template <class Map>
auto find_projection(Map& file, const std::string& name) {
  const auto whole = file.find("base_model." + name);
  return whole != file.end() ? whole : file.find(name);
}

/// A and B stand once in the file, below "base_model." alone.
class VeraFormat final : public TunerFormat<VeraOptions, VeraDelta> {
 public:
  std::string type() const override {
    return "VERA";
  }

  void complete(
      Plan& plan,
      const Network& /*network*/,
      const NamedTensorMap& file) const override {
    const auto& o = std::any_cast<const VeraOptions&>(plan.options);
    const auto A = find_projection(file, "vera_A");
    const auto B = find_projection(file, "vera_B");
    if (A == file.end() && B == file.end() && !o.save_projection()) {
      return; // the seed gave them
    }
    TORCH_CHECK(
        A != file.end() && B != file.end(),
        "peft: the weights lack vera_A or vera_B, and ",
        kConfigFile,
        " says with save_projection that they hold them; set it to false to "
        "draw both from projection_prng_key");
    auto& projections = *projections_of(plan);
    TORCH_CHECK(
        A->second.sizes() == projections.A().sizes() &&
            B->second.sizes() == projections.B().sizes(),
        "peft: vera_A ",
        A->second.sizes(),
        " and vera_B ",
        B->second.sizes(),
        " do not fit the widest targets of this model and r: ",
        projections.A().sizes(),
        " and ",
        projections.B().sizes());
    projections.set(A->second, B->second);
  }

  NamedTensorMap unpack(const NamedTensorMap& file, const Plan& plan)
      const override {
    NamedTensorMap layers = file;
    for (const char* name : {"vera_A", "vera_B"}) {
      const auto found = find_projection(layers, name);
      if (found != layers.end()) {
        layers.erase(found);
      }
    }
    return AdapterFormat::unpack(layers, plan);
  }

  NamedTensorList pack(const AdapterState& adapter) const override {
    auto tensors = AdapterFormat::pack(adapter);
    const auto& o = std::any_cast<const VeraOptions&>(adapter.options);
    if (o.save_projection()) {
      const auto& projections = *projections_of(adapter);
      tensors.emplace_back("base_model.vera_A", projections.A());
      tensors.emplace_back("base_model.vera_B", projections.B());
    }
    return tensors;
  }

 protected:
  void read_own(const AdapterConfig& config, VeraOptions& o) const override {
    o.r(config.get<int64_t>("r", 256));
    o.projection_prng_key(config.get<int64_t>("projection_prng_key", 0));
    o.save_projection(config.get<bool>("save_projection", true));
    o.dropout(config.get<double>("vera_dropout", 0));
    o.d_initial(config.get<double>("d_initial", 0.1));
    o.init_weights(config.get<bool>("init_weights", true));
    o.bias(config.get<std::string>("bias", "none"));
  }
  void write_own(const VeraOptions& o, AdapterConfig& config) const override {
    config.set("r", o.r());
    config.set("projection_prng_key", o.projection_prng_key());
    config.set("save_projection", o.save_projection());
    config.set("vera_dropout", o.dropout());
    config.set("d_initial", o.d_initial());
    config.set("init_weights", o.init_weights());
    config.set("bias", o.bias());
  }
  bool has_exclude_modules() const override {
    return false;
  }

 private:
  template <class PlanOrState>
  static std::shared_ptr<VeraProjections> projections_of(
      const PlanOrState& adapter) {
    for (const auto& site : adapter.sites) {
      const auto* delta = dynamic_cast<const VeraDelta*>(site.delta.get());
      if (delta != nullptr) {
        return delta->config().projections;
      }
    }
    TORCH_CHECK(false, "peft: this adapter has no VeRA");
    return nullptr;
  }
};

} // namespace detail

} // namespace peft
