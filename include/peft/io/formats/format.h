#pragma once

// How a method stands in the two files of an adapter. Each has a header in this
// folder; io/pretrained.h lists them and does what they share.

#include <peft/core/attach.h>
#include <peft/io/adapter_config.h>

#include <algorithm>
#include <map>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace peft {

namespace detail {

using NamedTensorMap = std::map<std::string, Tensor>;
using NamedTensorList = std::vector<std::pair<std::string, Tensor>>;

inline constexpr const char* kConfigFile = "adapter_config.json";
inline constexpr const char* kWeightsFile = "adapter_model.safetensors";
inline constexpr const char* kPickleFile = "adapter_model.bin";
/// What training goes on from and PEFT does not save; PEFT passes over it.
inline constexpr const char* kTrainingFile = "libpeft_training.safetensors";
/// What save_optimizer writes; PEFT passes over it too.
inline constexpr const char* kOptimizerFile = "libpeft_optimizer.safetensors";
inline const std::string kKeyPrefix = "base_model.model.";

inline std::string file_key(
    const std::string& prefix,
    const std::string& name) {
  return prefix.empty() ? name : prefix + "." + name;
}

/// What PEFT puts in front of a module's path, and what is left of it in files
/// that others wrote.
inline const std::vector<std::string>& key_prefixes() {
  static const std::vector<std::string> all{
      kKeyPrefix, "base_model.", "model.", ""};
  return all;
}

/// The tensor of a file under that key, behind any of the prefixes.
template <class Map>
auto find_in_file(Map& file, const std::string& key) {
  for (const auto& prefix : key_prefixes()) {
    const auto found = file.find(prefix + key);
    if (found != file.end()) {
      return found;
    }
  }
  return file.end();
}

/// The expected key that is left when an adapter's name is taken out where PEFT
/// has it in memory: behind the method's own word ("lora_A.default.weight",
/// "hada_w1_a.default"), or with the module's ("head.modules_to_save.default.
/// bias"). The key as it is, where there is none.
inline std::string without_adapter_name(
    const std::string& key,
    const std::set<std::string>& expected) {
  static const std::regex word(
      "(lora|vblora|vera|hada|lokr|hra|oft|boft|fourierft|ia3|beft|shira|"
      "ln_tuning|trainable_tokens)_\\w+");
  std::vector<std::string> parts;
  std::istringstream stream(key);
  for (std::string part; std::getline(stream, part, '.');) {
    parts.push_back(part);
  }
  for (size_t i = 0; i + 1 < parts.size(); ++i) {
    const bool saved = parts[i] == "modules_to_save";
    if (!saved && !std::regex_match(parts[i], word)) {
      continue;
    }
    std::string plain;
    for (size_t k = 0; k < parts.size(); ++k) {
      if (k != i + 1 && !(saved && k == i)) {
        plain += (plain.empty() ? "" : ".") + parts[k];
      }
    }
    if (expected.count(plain) != 0) {
      return plain;
    }
  }
  return key;
}

/// Keys without prefixes, in the form that fits the most expected ones.
inline NamedTensorMap normalise_keys(
    const NamedTensorMap& tensors,
    const std::set<std::string>& expected) {
  NamedTensorMap best;
  size_t best_count = 0;
  for (const auto& prefix : key_prefixes()) {
    NamedTensorMap candidate;
    size_t count = 0;
    for (const auto& [key, value] : tensors) {
      std::string name = key.compare(0, prefix.size(), prefix) == 0
          ? key.substr(prefix.size())
          : key;
      if (expected.count(name) == 0) {
        const auto plain = without_adapter_name(name, expected);
        // Another adapter's, or a copy of what is there: it stays unexpected.
        const bool taken = candidate.count(plain) != 0 ||
            tensors.count(plain) != 0 || tensors.count(prefix + plain) != 0;
        name = taken ? name : plain;
      }
      count += expected.count(name);
      if (!candidate.emplace(name, value).second) {
        candidate.emplace(key + ", once more", value); // to be unexpected
      }
    }
    if (best.empty() || count > best_count) {
      best = std::move(candidate);
      best_count = count;
    }
    if (best_count == tensors.size()) { // nothing fits better
      break;
    }
  }
  return best;
}

inline Targets targets_field(
    const AdapterConfig& config,
    const std::string& field) {
  const auto value = config.get<NamesOrPattern>(field);
  if (const auto* names = std::get_if<std::vector<std::string>>(&value)) {
    return Targets(*names);
  }
  const auto& pattern = std::get<std::string>(value);
  return pattern == "all-linear" ? Targets::all_linear()
                                 : Targets::regex(pattern);
}

/// HF's layers_to_transform: an index, or a list of them.
inline std::vector<int64_t> indices_field(
    const AdapterConfig& config,
    const std::string& field) {
  using IndexOrIndices = std::variant<std::vector<int64_t>, int64_t>;
  if (!config.has(field)) {
    return {};
  }
  const auto value = config.get<IndexOrIndices>(field);
  return std::holds_alternative<int64_t>(value)
      ? std::vector<int64_t>{std::get<int64_t>(value)}
      : std::get<std::vector<int64_t>>(value);
}

/// A name, or a list of them.
inline std::vector<std::string> names_field(
    const AdapterConfig& config,
    const std::string& field) {
  if (!config.has(field)) {
    return {};
  }
  const auto value = config.get<NamesOrPattern>(field);
  return std::holds_alternative<std::string>(value)
      ? std::vector<std::string>{std::get<std::string>(value)}
      : std::get<std::vector<std::string>>(value);
}

/// rank_pattern and its like.
inline std::vector<std::pair<std::string, double>> pattern_field(
    const AdapterConfig& config,
    const std::string& field) {
  const auto values = config.get<std::map<std::string, double>>(field, {});
  return {values.begin(), values.end()};
}

/// Writes `targets` as a field of HF's.
inline void write_targets(
    AdapterConfig& config,
    const std::string& field,
    const Targets& targets) {
  if (targets.kind() == Targets::Kind::regex) {
    config.set(field, targets.names().front());
  } else if (targets.kind() == Targets::Kind::list) {
    config.set(field, targets.names());
  } else {
    config.set(field, nullptr);
  }
}

/// The modules of the network that HF's modules_to_save means: those whose
/// names end in one of `names`, at a dot or not ("classifier" is
/// "pre_classifier" too). HF lists what a classification head may be called,
/// whatever the network calls it; keys of a module that is not there are still
/// unexpected.
inline std::vector<std::string> modules_in(
    const Network& network,
    std::vector<std::string> names) {
  const auto is_absent = [&](const std::string& name) {
    return std::none_of(
        network.begin(), network.end(), [&](const Layer& layer) {
          return is_inside(layer.name, {name});
        });
  };
  std::vector<std::string> longer;
  for (const auto& layer : network) {
    for (const auto& name : names) {
      const bool ends = !name.empty() && layer.name.size() > name.size() &&
          layer.name.compare(
              layer.name.size() - name.size(), name.size(), name) == 0;
      if (ends && !is_inside(layer.name, names)) {
        longer.push_back(layer.name);
      }
    }
  }
  names.erase(
      std::remove_if(names.begin(), names.end(), is_absent), names.end());
  names.insert(names.end(), longer.begin(), longer.end());
  return names;
}

/// Whether the names of a list mean modules only, as HF's do.
inline bool names_modules(const Targets& targets, const AdapterState& adapter) {
  if (targets.kind() != Targets::Kind::list) {
    return false;
  }
  for (const auto& site : adapter.sites) {
    const auto infix = site.file_prefix.find(".base_layer.out_proj");
    const bool is_in_attention = infix != std::string::npos;
    const std::string module =
        is_in_attention ? site.file_prefix.substr(0, infix) : site.name;
    bool is_named = false;
    for (const auto& name : targets.names()) {
      const bool named = Targets::name_matches(module, name);
      if (!named && Targets::name_matches(site.parameters.front(), name)) {
        return false;
      }
      is_named = is_named || named;
    }
    if (is_in_attention && !is_named) {
      return false; // HF wants the attention named
    }
  }
  return true;
}

/// The files of one method.
class AdapterFormat {
 public:
  virtual ~AdapterFormat() = default;

  /// `peft_type` in the config, AdapterState::method in memory.
  virtual std::string type() const = 0;

  /// Whether a config is one of this method.
  virtual bool reads(const AdapterConfig& config) const {
    return config.has("peft_type") && config.peft_type() == type();
  }

  /// Whether an adapter in memory can be written so.
  virtual bool writes(const AdapterState& adapter) const {
    return adapter.method == type();
  }

  /// The names that the weights may have; the first is written.
  virtual std::vector<std::string> weight_files() const {
    return {kWeightsFile, kPickleFile};
  }

  /// What the config wants of this network. The deltas' values come later.
  virtual Plan plan(const AdapterConfig& config, const Network& network)
      const = 0;

  /// Further weights, each file by the names that it may have; read where they
  /// are there. The first name is written, where pack_further has tensors.
  virtual std::vector<std::vector<std::string>> further_files() const {
    return {};
  }
  virtual NamedTensorList pack_further(
      const AdapterState& /*adapter*/,
      size_t /*file*/) const {
    return {};
  }
  /// Adds to a plan what only the tensors of the files tell.
  virtual void complete(
      Plan& /*plan*/,
      const Network& /*network*/,
      const NamedTensorMap& /*file*/) const {}

  /// What a training that goes on from the folder loses where kTrainingFile is
  /// not beside the weights, for a warning; "" where that is nothing much.
  virtual std::string lost_without_training_file(const Plan& /*plan*/) const {
    return {};
  }

  /// Whether PEFT adapts what is tied to this weight along with it, as is done
  /// here; elsewhere it tells tied weights apart.
  virtual bool moves_ties(
      const AdapterConfig& /*config*/,
      const PlannedSite& /*site*/,
      const Network& /*network*/) const {
    return false;
  }

  /// A config for an adapter that was not loaded from one.
  virtual AdapterConfig new_config() const {
    return AdapterConfig::parse(R"({"peft_type": ")" + type() + R"("})");
  }
  /// Sets the method's fields; others stay as they were loaded.
  virtual void write(const AdapterState& adapter, AdapterConfig& config)
      const = 0;

  /// The tensors of the weights file. By default one for each file tensor of
  /// each site.
  virtual NamedTensorList pack(const AdapterState& adapter) const {
    NamedTensorList tensors;
    for (const auto& site : adapter.sites) {
      for (const auto& item : site.delta->all_file_tensors()) {
        tensors.emplace_back(
            kKeyPrefix + file_key(site.file_prefix, item.first),
            site.delta->to_file(item.first, item.second.detach()));
      }
    }
    return tensors;
  }

  /// A file's tensors by the keys of the plan's sites, file_key(prefix, name).
  virtual NamedTensorMap unpack(const NamedTensorMap& file, const Plan& plan)
      const {
    std::set<std::string> expected;
    for (const auto& site : plan.sites) {
      for (const auto& item : site.delta->all_file_tensors()) {
        expected.insert(file_key(site.file_prefix, item.first));
      }
    }
    return normalise_keys(file, expected);
  }
};

} // namespace detail

} // namespace peft
