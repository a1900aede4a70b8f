#pragma once

// The sections of HF PEFT's LoraConfig that choose a variant of LoRA:
// kasa_config, use_bdlora, monteclora_config, velora_config.

#include <peft/io/formats/format.h>
#include <peft/methods/lora/options.h>

#include <string>
#include <vector>

namespace peft {

namespace detail {

/// Whether a section is there; an empty one has PEFT's defaults.
inline bool has_section(const AdapterConfig& config, const std::string& field) {
  TORCH_CHECK(
      !config.has(field) || config.is_section(field),
      "peft: \"",
      field,
      "\" in ",
      kConfigFile,
      " must be null or an object");
  return config.has(field);
}

inline void read_variants(const AdapterConfig& config, LoraOptions& o) {
  if (has_section(config, "kasa_config")) {
    const auto c = config.section("kasa_config");
    const KasaOptions otherwise;
    o.kasa(KasaOptions()
               .beta(c.get<double>("beta", otherwise.beta()))
               .gamma(c.get<double>("gamma", otherwise.gamma())));
  }
  if (has_section(config, "use_bdlora")) {
    using Names = std::vector<std::string>;
    const auto c = config.section("use_bdlora");
    o.bd_lora(BdLoraOptions()
                  .target_modules_bd_a(c.get<Names>("target_modules_bd_a", {}))
                  .target_modules_bd_b(c.get<Names>("target_modules_bd_b", {}))
                  .nblocks(c.get<int64_t>("nblocks", 1))
                  .match_strict(c.get<bool>("match_strict", true)));
  }
  if (has_section(config, "monteclora_config")) {
    const auto c = config.section("monteclora_config");
    const MonteCloraOptions d;
    o.monteclora(
        MonteCloraOptions()
            .num_samples(c.get<int64_t>("num_samples", d.num_samples()))
            .use_entropy(c.get<bool>("use_entropy", d.use_entropy()))
            .dirichlet_prior(
                c.get<double>("dirichlet_prior", d.dirichlet_prior()))
            .sample_scaler(c.get<double>("sample_scaler", d.sample_scaler()))
            .kl_loss_weight(c.get<double>("kl_loss_weight", d.kl_loss_weight()))
            .buffer_size(c.get<int64_t>("buffer_size", d.buffer_size())));
  }
  if (has_section(config, "velora_config")) {
    const auto c = config.section("velora_config");
    const VeloraOptions d;
    o.velora(VeloraOptions()
                 .num_groups(c.get<int64_t>("num_groups", d.num_groups()))
                 .scale(c.get<double>("scale", d.scale()))
                 .init_type(c.get<std::string>("init_type", d.init_type())));
  }
}

/// Into sections that keep what they have besides.
inline void write_variants(const LoraOptions& o, AdapterConfig& config) {
  const auto set_names = [](AdapterConfig& section,
                            const char* field,
                            const std::vector<std::string>& names) {
    if (names.empty()) {
      section.set(field, nullptr);
    } else {
      section.set(field, names);
    }
  };
  if (const auto& kasa = o.kasa()) {
    auto c = config.section("kasa_config");
    c.set("beta", kasa->beta()).set("gamma", kasa->gamma());
    config.set("kasa_config", c);
  }
  if (const auto& bd = o.bd_lora()) {
    auto c = config.section("use_bdlora");
    set_names(c, "target_modules_bd_a", bd->target_modules_bd_a());
    set_names(c, "target_modules_bd_b", bd->target_modules_bd_b());
    c.set("nblocks", bd->nblocks()).set("match_strict", bd->match_strict());
    config.set("use_bdlora", c);
  }
  if (const auto& drawn = o.monteclora()) {
    auto c = config.section("monteclora_config");
    c.set("num_samples", drawn->num_samples())
        .set("use_entropy", drawn->use_entropy())
        .set("dirichlet_prior", drawn->dirichlet_prior())
        .set("sample_scaler", drawn->sample_scaler())
        .set("kl_loss_weight", drawn->kl_loss_weight())
        .set("buffer_size", drawn->buffer_size());
    config.set("monteclora_config", c);
  }
  if (const auto& velora = o.velora()) {
    auto c = config.section("velora_config");
    c.set("num_groups", velora->num_groups())
        .set("scale", velora->scale())
        .set("init_type", velora->init_type());
    config.set("velora_config", c);
  }
}

} // namespace detail

} // namespace peft
