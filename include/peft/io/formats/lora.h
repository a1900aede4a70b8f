#pragma once

// LoRA as HF PEFT's LoraConfig and file have it.

#include <peft/io/formats/format.h>
#include <peft/io/formats/lora_parameters.h>
#include <peft/io/formats/lora_variants.h>
#include <peft/methods/lora.h>
#include <peft/methods/lora/factors.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <map>
#include <memory>
#include <optional>
#include <regex>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace peft {

namespace detail {

/// The modules that carry LoRA, by the names that HF would target.
inline std::vector<std::string> lora_modules(const AdapterState& adapter) {
  const auto& o = std::any_cast<const LoraOptions&>(adapter.options);
  std::vector<std::string> result;
  for (const auto& site : adapter.sites) {
    if (!lora_layout(site) ||
        names_parameter(o.target_parameters(), site.parameters.front())) {
      continue;
    }
    const std::string name = target_of(site);
    if (std::find(result.begin(), result.end(), name) == result.end()) {
      result.push_back(name);
    }
  }
  return result;
}

class LoraFormat final : public AdapterFormat {
 public:
  std::string type() const override {
    return "LORA";
  }

  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    LoraOptions wanted = options(config);
    check(wanted);
    LoraOptions empty = wanted;
    empty.modules_to_save(modules_in(network, wanted.modules_to_save()));
    if (!starts_as_part(wanted.init())) { // those are made of the base again
      empty.init("empty");
    }
    Plan result = detail::plan(empty, network, /*is_from_file=*/true);
    result.options = std::move(wanted);
    return result;
  }

  AdapterConfig new_config() const override {
    return AdapterConfig::lora_defaults();
  }

  /// Fields of HF's LoraConfig that change the function and that libpeft does
  /// not have: set, they are refused. An empty section has PEFT's defaults and
  /// counts, an empty list does not.
  static void refuse_unsupported(const AdapterConfig& config) {
    const auto refuse = [](const char* field) {
      TORCH_CHECK(
          false,
          "peft: ",
          field,
          " is set in ",
          kConfigFile,
          "; libpeft does not have it, and without it the adapter is another "
          "function");
    };
    for (const char* field :
         {"alora_invocation_tokens",
          "layer_replication",
          "megatron_config",
          "use_qalora"}) {
      if (!config.is_empty(field)) {
        refuse(field);
      }
    }
    if (config.has("arrow_config")) {
      refuse("arrow_config");
    }
  }

  static LoraOptions options(const AdapterConfig& config) {
    refuse_unsupported(config);
    LoraOptions o(config.get<int64_t>("r", 8));
    o.alpha(config.get<double>("lora_alpha", 8));
    o.dropout(config.get<double>("lora_dropout", 0));
    const bool has_targets = !config.is_empty("target_modules");
    if (has_targets) {
      o.targets(targets_field(config, "target_modules"));
    }
    if (!config.is_empty("target_parameters")) {
      o.target_parameters(
          Targets(config.get<std::vector<std::string>>("target_parameters")));
    }
    TORCH_CHECK(
        has_targets || !o.target_parameters().empty(),
        "peft: ",
        kConfigFile,
        " has neither target_modules nor target_parameters");
    o.parameters_transposed(config.get<bool>(kTransposedField, false));
    o.trainable_token_indices(token_indices_field(config));
    read_variants(config, o);
    if (config.has("exclude_modules") && !config.is_empty("exclude_modules")) {
      o.exclude(targets_field(config, "exclude_modules"));
    }
    o.rank_pattern(pattern_field(config, "rank_pattern"));
    o.alpha_pattern(pattern_field(config, "alpha_pattern"));
    o.layers(indices_field(config, "layers_to_transform"));
    o.layers_pattern(names_field(config, "layers_pattern"));
    o.rslora(config.get<bool>("use_rslora", false));
    o.dora(config.get<bool>("use_dora", false));
    o.bias(config.get<std::string>("bias", "none"));
    o.lora_bias(config.get<bool>("lora_bias", false));
    o.fan_in_fan_out(config.get<bool>("fan_in_fan_out", false));
    o.modules_to_save(
        config.get<std::vector<std::string>>("modules_to_save", {}));
    const auto init = config.get<FlagOrName>("init_lora_weights", true);
    if (const auto* flag = std::get_if<bool>(&init)) {
      o.init(*flag ? "kaiming" : "random");
    } else {
      std::string scheme = std::get<std::string>(init);
      std::transform( // HF takes "OLoRA" too
          scheme.begin(),
          scheme.end(),
          scheme.begin(),
          [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
      for (const char* rewriting : {"loftq", "corda", "lora_ga"}) {
        TORCH_CHECK(
            scheme.rfind(rewriting, 0) != 0,
            "peft: init_lora_weights is '",
            scheme,
            "', which changed the base before training; convert the adapter "
            "to plain LoRA with PEFT's "
            "path_initial_model_for_weight_conversion");
      }
      const bool is_known = scheme.rfind("pissa", 0) == 0 ||
          scheme == "olora" || scheme == "orthogonal";
      o.init(is_known ? scheme : "gaussian");
    }
    return o;
  }

  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    const auto& o = std::any_cast<const LoraOptions&>(adapter.options);
    config.set("r", o.r());
    config.set_number("lora_alpha", o.alpha());
    config.set("lora_dropout", o.dropout());
    if (o.targets().empty() && !o.target_parameters().empty()) {
      if (adapter.loaded_config.empty()) { // null is PEFT's default targets
        config.set("target_modules", std::vector<std::string>{});
      }
    } else if (o.targets().kind() == Targets::Kind::regex) {
      config.set("target_modules", o.targets().names().front());
    } else if (names_modules(o.targets(), adapter)) {
      config.set("target_modules", o.targets().names());
    } else {
      config.set("target_modules", lora_modules(adapter));
    }
    write_parameters(adapter, o, config);
    write_token_indices(o, config);
    write_variants(o, config);
    if (!o.exclude().empty()) {
      write_targets(config, "exclude_modules", o.exclude());
    }
    std::map<std::string, int64_t> ranks;
    for (const auto& [name, value] : o.rank_pattern()) {
      ranks.emplace(name, static_cast<int64_t>(value));
    }
    std::map<std::string, double> alphas;
    for (const auto& [name, value] : o.alpha_pattern()) {
      alphas.emplace(name, value);
    }
    widen_blocks(adapter, o, ranks, alphas);
    config.set("rank_pattern", ranks);
    config.set_numbers("alpha_pattern", alphas);
    if (adapter.loaded_config.empty()) { // PEFT has one index or name bare
      if (!o.layers().empty()) {
        config.set("layers_to_transform", o.layers());
      }
      if (!o.layers_pattern().empty()) {
        config.set("layers_pattern", o.layers_pattern());
      }
    }
    config.set("use_rslora", o.rslora());
    config.set("use_dora", o.dora());
    config.set("bias", o.bias());
    config.set("lora_bias", o.lora_bias());
    if (adapter.loaded_config.empty()) {
      config.set(
          "fan_in_fan_out", o.fan_in_fan_out() || is_transposed(adapter));
    }
    if (!o.modules_to_save().empty()) {
      config.set("modules_to_save", o.modules_to_save());
    }
    if (!adapter.loaded_config.empty()) {
      return; // how it once started stays as it was written
    }
    if (o.init() == "gaussian" && !o.lora_bias()) { // PEFT refuses the two
      config.set("init_lora_weights", std::string("gaussian"));
    } else if (starts_as_part(o.init()) || o.init() == "orthogonal") {
      config.set("init_lora_weights", o.init());
    } else {
      config.set("init_lora_weights", o.init() != "random");
    }
  }

  void complete(
      Plan& plan,
      const Network& /*network*/,
      const NamedTensorMap& file) const override {
    orient_stacks(plan, file);
  }

  bool moves_ties(
      const AdapterConfig& /*config*/,
      const PlannedSite& site,
      const Network& network) const override {
    return moves_tied_rows(site, network);
  }

  static bool is_transposed(const AdapterState& adapter) {
    return std::any_of(
        adapter.sites.begin(), adapter.sites.end(), [](const auto& site) {
          return lora_layout(site) == LoraLayout::transposed;
        });
  }

  /// Blocks of packed attention are written as one factor of r times their
  /// number, at the same scaling.
  static void widen_blocks(
      const AdapterState& adapter,
      const LoraOptions& o,
      std::map<std::string, int64_t>& ranks,
      std::map<std::string, double>& alphas) {
    for (const auto& site : adapter.sites) {
      const auto delta = std::dynamic_pointer_cast<LoraDelta>(site.delta);
      if (!delta || delta->config().layout != LoraLayout::blocks) {
        continue;
      }
      const auto wide = delta->lora_A.size(0);
      const double norm = o.rslora() ? std::sqrt(static_cast<double>(wide))
                                     : static_cast<double>(wide);
      const std::string pattern = "^" + exact_pattern(site.name);
      ranks[pattern] = wide;
      alphas[pattern] = delta->config().scaling * norm;
    }
  }

  NamedTensorList pack(const AdapterState& adapter) const override {
    auto tensors = AdapterFormat::pack(adapter);
    complete_attention(adapter, tensors);
    return tensors;
  }

  /// Older files name DoRA's magnitude as the module has it in memory,
  /// "lora_magnitude_vector.default.weight".
  NamedTensorMap unpack(const NamedTensorMap& file, const Plan& plan)
      const override {
    static const std::regex long_name(
        "(.*lora_magnitude_vector)(\\.[^.]+)?(\\.weight)?");
    NamedTensorMap renamed;
    for (const auto& [key, value] : file) {
      std::smatch match;
      const bool magnitude =
          key.find("lora_magnitude_vector") != std::string::npos &&
          std::regex_match(key, match, long_name);
      renamed[magnitude ? match[1].str() : key] = value;
    }
    return AdapterFormat::unpack(renamed, plan);
  }

 private:
  /// HF always adapts the two halves of an attention: a half that is not
  /// adapted here is written as zeros.
  static void complete_attention(
      const AdapterState& adapter,
      NamedTensorList& tensors) {
    auto find = [&](const std::string& key) -> const Tensor* {
      for (const auto& item : tensors) {
        if (item.first == key) {
          return &item.second;
        }
      }
      return nullptr;
    };
    const std::string infix = ".base_layer.out_proj";
    for (const auto& site : adapter.sites) {
      const auto delta = std::dynamic_pointer_cast<LoraDelta>(site.delta);
      if (!delta) {
        continue;
      }
      const auto sizes = lock_site(site)->sizes;
      std::string other;
      int64_t out = 0, in = 0;
      const auto at = site.file_prefix.find(infix);
      if (at != std::string::npos) {
        other = site.file_prefix.substr(0, at);
        in = sizes[0];
        out = 3 * in;
      } else if (split_last(site.parameters.front()) == "in_proj_weight") {
        other = site.file_prefix + infix;
        in = out = sizes[1];
      } else {
        continue;
      }
      const std::string key = kKeyPrefix + other;
      if (find(key + ".lora_A.weight") == nullptr) {
        const auto like = delta->lora_A.options().requires_grad(false);
        const int64_t r = delta->lora_A.size(0);
        tensors.emplace_back(key + ".lora_A.weight", at::zeros({r, in}, like));
        tensors.emplace_back(key + ".lora_B.weight", at::zeros({out, r}, like));
      }
    }
  }

  static std::string split_last(const std::string& path) {
    return path.substr(path.rfind('.') + 1);
  }
};

} // namespace detail

} // namespace peft
