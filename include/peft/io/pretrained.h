#pragma once

// An adapter as a folder of two files, in HF PEFT's format:
//
//   adapter_config.json        the method and its options
//   adapter_model.safetensors  "base_model.model." + module + ".lora_A.weight"
//
// What HF writes is read here, and what is written here HF reads. A method says
// how its options stand in the config in one struct at the end of this file.

#include <peft/core/attach.h>
#include <peft/io/adapter_config.h>
#include <peft/io/safetensors.h>
#include <peft/methods/bitfit.h>
#include <peft/methods/lora.h>

#include <torch/serialize.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for load.
struct LoadOptions {
  /// Missing or unexpected keys are errors; false leaves missing parameters at
  /// their start (B = 0) and passes over the others.
  TORCH_ARG(bool, strict) = true;
  /// Whether the adapter's parameters may train on.
  TORCH_ARG(bool, is_trainable) = true;
};

namespace detail {

using NamedTensorMap = std::map<std::string, Tensor>;

inline constexpr const char* kConfigFile = "adapter_config.json";
inline constexpr const char* kWeightsFile = "adapter_model.safetensors";
inline constexpr const char* kPickleFile = "adapter_model.bin";
inline const std::string kKeyPrefix = "base_model.model.";
/// In the metadata of a file whose tied weights are adapted as one tensor.
inline const std::string kTiesMark = "libpeft_ties";

/// The tensors of adapter_model.bin, a pickled dict of tensors.
inline NamedTensorMap read_pickle(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  const std::vector<char> bytes(
      (std::istreambuf_iterator<char>(stream)),
      std::istreambuf_iterator<char>());
  c10::IValue value;
  try {
    value = torch::pickle_load(bytes);
  } catch (const std::exception& error) {
    TORCH_CHECK(
        false,
        "peft: '",
        path,
        "' is not a pickled dict of tensors (",
        std::string(error.what()).substr(0, 120),
        "); save it as adapter_model.safetensors");
  }
  TORCH_CHECK(
      value.isGenericDict(),
      "peft: '",
      path,
      "' holds a ",
      value.tagKind(),
      ", not a dict of tensors; save it as adapter_model.safetensors");
  NamedTensorMap result;
  for (const auto& item : value.toGenericDict()) {
    TORCH_CHECK(
        item.key().isString() && item.value().isTensor(),
        "peft: '",
        path,
        "' holds something other than named tensors");
    result[item.key().toStringRef()] = item.value().toTensor();
  }
  return result;
}

/// The tensors of a folder; `adapts_ties` says whether the writer adapted tied
/// weights as the one tensor they are, which PEFT does not.
inline NamedTensorMap read_adapter_weights(
    const std::string& folder,
    bool& adapts_ties) {
  namespace fs = std::filesystem;
  const auto path = fs::path(folder) / kWeightsFile;
  if (fs::exists(path)) {
    const auto file = SafetensorsFile::open(path.string());
    adapts_ties = file.metadata().count(kTiesMark) != 0;
    return load_safetensors(path.string());
  }
  const auto pickle = fs::path(folder) / kPickleFile;
  TORCH_CHECK(
      fs::exists(pickle),
      "peft: '",
      folder,
      "' holds neither ",
      kWeightsFile,
      " nor ",
      kPickleFile);
  return read_pickle(pickle.string());
}

/// Removes an adapter's name that older writers left in the keys:
/// "lora_A.default.weight" → "lora_A.weight".
inline std::string without_adapter_name(const std::string& key) {
  static const std::regex named(
      "(.*\\.lora_(?:A|B|embedding_A|embedding_B)|lora_(?:A|B|embedding_A|"
      "embedding_B))\\.([^.]+)(\\.(?:weight|bias))?");
  std::smatch match;
  if (std::regex_match(key, match, named) && match[2] != "weight" &&
      match[2] != "bias") {
    return match[1].str() + match[3].str();
  }
  return key;
}

/// Keys without prefixes, in the form that fits the most expected ones.
inline NamedTensorMap normalise_keys(
    const NamedTensorMap& tensors,
    const std::set<std::string>& expected) {
  NamedTensorMap best;
  size_t best_count = 0;
  const std::vector<std::string> prefixes{
      kKeyPrefix, "base_model.", "model.", ""};
  for (const auto& prefix : prefixes) {
    NamedTensorMap candidate;
    size_t count = 0;
    for (const auto& [key, value] : tensors) {
      std::string name = key.compare(0, prefix.size(), prefix) == 0
          ? key.substr(prefix.size())
          : key;
      if (expected.count(name) == 0) {
        name = without_adapter_name(name);
      }
      count += expected.count(name);
      candidate[name] = value;
    }
    if (best.empty() || count > best_count) {
      best = std::move(candidate);
      best_count = count;
    }
  }
  return best;
}

inline std::string file_key(
    const std::string& prefix,
    const std::string& name) {
  return prefix.empty() ? name : prefix + "." + name;
}

inline std::string listed(const std::vector<std::string>& lines) {
  std::string text;
  for (size_t i = 0; i < lines.size(); ++i) {
    if (i == 20) {
      return text + "\n    and " + std::to_string(lines.size() - 20) + " more";
    }
    text += "\n    " + lines[i];
  }
  return text;
}

/// PEFT adds the frozen weight of an adapted embedding or head to the file
/// ("embed_tokens.base_layer.weight"): nothing to load where it is the base's.
inline bool
repeats_base(const Plan& plan, const std::string& key, const Tensor& value) {
  for (const auto& site : plan.sites) {
    if (key != file_key(site.file_prefix, "base_layer.weight")) {
      continue;
    }
    const Tensor own = base(site.tensor).detach();
    return own.sizes() == value.sizes() &&
        at::equal(own.to(at::kCPU, at::kFloat), value.to(at::kFloat));
  }
  return false;
}

/// Two tied weights of which the plan adapts one, or both apart: "'a' and 'b'",
/// or "".
inline std::string adapts_ties_apart(const Plan& plan, const Network& network) {
  for (const auto& site : plan.sites) {
    for (const auto& layer : network) {
      for (const auto& p : layer.parameters) {
        const std::string path = layer.path(p.first);
        if (path != site.parameter && is_tied(p.second, site.tensor)) {
          return "'" + site.parameter + "' and '" + path + "'";
        }
      }
    }
  }
  return {};
}

/// Fills the deltas of a plan from a file's tensors, after checking all.
inline void fill_plan(
    Plan& plan,
    const NamedTensorMap& file,
    const std::string& folder,
    bool strict) {
  std::set<std::string> expected;
  for (const auto& site : plan.sites) {
    for (const auto& item : site.delta->file_tensors()) {
      expected.insert(file_key(site.file_prefix, item.first));
    }
  }
  const NamedTensorMap tensors = normalise_keys(file, expected);
  std::vector<std::string> missing, extra, misshaped;
  for (const auto& key : expected) {
    if (tensors.count(key) == 0) {
      missing.push_back(key);
    }
  }
  for (const auto& [key, value] : tensors) {
    // PEFT writes wrapped copies of a trained head beside the plain name.
    const bool repeated = key.find(".modules_to_save.") != std::string::npos ||
        key.find(".original_module.") != std::string::npos;
    if (expected.count(key) == 0 && !repeated &&
        !repeats_base(plan, key, value)) {
      extra.push_back(key);
    }
  }
  auto each = [&](bool dry_run) {
    for (auto& site : plan.sites) {
      for (const auto& item : site.delta->file_tensors()) {
        const auto key = file_key(site.file_prefix, item.first);
        const auto found = tensors.find(key);
        if (found == tensors.end()) {
          continue;
        }
        const auto misfit =
            site.delta->from_file(item.first, found->second, dry_run);
        if (!misfit.empty()) {
          misshaped.push_back(key + ": " + misfit);
        }
      }
    }
  };
  each(/*dry_run=*/true);
  TORCH_CHECK(
      misshaped.empty() && (!strict || (missing.empty() && extra.empty())),
      "peft: the weights in '",
      folder,
      "' do not fit this model and adapter_config.json; nothing was loaded.",
      misshaped.empty() ? "" : "\n  wrong shape:" + listed(misshaped),
      !strict || missing.empty()
          ? ""
          : "\n  missing from the file:" + listed(missing),
      !strict || extra.empty() ? ""
                               : "\n  unexpected in the file:" + listed(extra));
  each(/*dry_run=*/false);
}

// ----------------------------------------------------------------------------
// Methods and their configs
// ----------------------------------------------------------------------------

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

/// Whether the names of a list mean modules only, as HF's do.
inline bool names_modules(const Targets& targets, const AdapterState& adapter) {
  if (targets.kind() != Targets::Kind::list) {
    return false;
  }
  for (const auto& site : adapter.sites) {
    if (site.file_prefix.find(".base_layer.out_proj") != std::string::npos) {
      return false; // HF wants the attention named
    }
    for (const auto& name : targets.names()) {
      const bool parameter =
          Targets::name_matches(site.parameters.front(), name) &&
          !Targets::name_matches(site.name, name);
      if (parameter) {
        return false;
      }
    }
  }
  return true;
}

/// The modules that carry LoRA, by the names that HF would target.
inline std::vector<std::string> lora_modules(const AdapterState& adapter) {
  std::vector<std::string> result;
  for (const auto& site : adapter.sites) {
    if (std::dynamic_pointer_cast<LoraDelta>(site.delta) == nullptr) {
      continue;
    }
    const std::string infix = ".base_layer.out_proj";
    std::string name = site.name;
    const auto at = site.file_prefix.find(infix);
    if (at != std::string::npos) {
      name = site.file_prefix.substr(0, at);
    }
    if (std::find(result.begin(), result.end(), name) == result.end()) {
      result.push_back(name);
    }
  }
  return result;
}

struct LoraFiles {
  static constexpr const char* type = "LORA";

  /// Fields of HF's LoraConfig that change the function and that libpeft does
  /// not have: set, they are refused.
  static void refuse_unsupported(const AdapterConfig& config) {
    for (const char* field : {"use_dora", "use_qalora"}) {
      TORCH_CHECK(
          !config.get<bool>(field, false),
          "peft: ",
          field,
          " is set in ",
          kConfigFile,
          "; this version of libpeft does not have it");
    }
    for (const char* field :
         {"layer_replication",
          "target_parameters",
          "trainable_token_indices",
          "alora_invocation_tokens",
          "arrow_config",
          "kasa_config",
          "monteclora_config",
          "velora_config",
          "use_bdlora",
          "megatron_config"}) {
      TORCH_CHECK(
          !config.has(field) || config.is_empty(field),
          "peft: ",
          field,
          " is set in ",
          kConfigFile,
          "; this version of libpeft does not have it");
    }
  }

  static LoraOptions options(const AdapterConfig& config) {
    refuse_unsupported(config);
    LoraOptions o(config.get<int64_t>("r", 8));
    o.alpha(config.get<double>("lora_alpha", 8));
    o.dropout(config.get<double>("lora_dropout", 0));
    TORCH_CHECK(
        config.has("target_modules") && !config.is_empty("target_modules"),
        "peft: ",
        kConfigFile,
        " has no target_modules");
    o.targets(targets_field(config, "target_modules"));
    if (config.has("exclude_modules") && !config.is_empty("exclude_modules")) {
      o.exclude(targets_field(config, "exclude_modules"));
    }
    for (auto& [name, value] :
         config.get<std::map<std::string, double>>("rank_pattern", {})) {
      o.rank_pattern().emplace_back(name, value);
    }
    for (auto& [name, value] :
         config.get<std::map<std::string, double>>("alpha_pattern", {})) {
      o.alpha_pattern().emplace_back(name, value);
    }
    if (config.has("layers_to_transform")) {
      using IndexOrIndices = std::variant<std::vector<int64_t>, int64_t>;
      const auto layers = config.get<IndexOrIndices>("layers_to_transform");
      o.layers(
          std::holds_alternative<int64_t>(layers)
              ? std::vector<int64_t>{std::get<int64_t>(layers)}
              : std::get<std::vector<int64_t>>(layers));
    }
    if (config.has("layers_pattern")) {
      const auto pattern = config.get<NamesOrPattern>("layers_pattern");
      o.layers_pattern(
          std::holds_alternative<std::string>(pattern)
              ? std::vector<std::string>{std::get<std::string>(pattern)}
              : std::get<std::vector<std::string>>(pattern));
    }
    o.rslora(config.get<bool>("use_rslora", false));
    o.bias(config.get<std::string>("bias", "none"));
    o.lora_bias(config.get<bool>("lora_bias", false));
    o.fan_in_fan_out(config.get<bool>("fan_in_fan_out", false));
    o.modules_to_save(
        config.get<std::vector<std::string>>("modules_to_save", {}));
    const auto init = config.get<FlagOrName>("init_lora_weights", true);
    if (const auto* flag = std::get_if<bool>(&init)) {
      o.init(*flag ? "kaiming" : "random");
    } else {
      const auto& scheme = std::get<std::string>(init);
      for (const char* rewriting :
           {"pissa", "olora", "loftq", "corda", "lora_ga"}) {
        TORCH_CHECK(
            scheme.compare(0, std::string(rewriting).size(), rewriting) != 0,
            "peft: init_lora_weights is '",
            scheme,
            "', which changed the base before training; convert the adapter "
            "to plain LoRA with PEFT's "
            "path_initial_model_for_weight_conversion");
      }
      o.init("gaussian");
    }
    return o;
  }

  static void write(const AdapterState& adapter, AdapterConfig& config) {
    const auto& o = std::any_cast<const LoraOptions&>(adapter.options);
    config.set("r", o.r());
    config.set_number("lora_alpha", o.alpha());
    config.set("lora_dropout", o.dropout());
    if (o.targets().kind() == Targets::Kind::regex) {
      config.set("target_modules", o.targets().names().front());
    } else if (names_modules(o.targets(), adapter)) {
      config.set("target_modules", o.targets().names());
    } else {
      config.set("target_modules", lora_modules(adapter));
    }
    if (o.exclude().kind() == Targets::Kind::regex) {
      config.set("exclude_modules", o.exclude().names().front());
    } else if (o.exclude().kind() == Targets::Kind::list) {
      config.set("exclude_modules", o.exclude().names());
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
    if (o.layers().empty()) {
      config.set("layers_to_transform", nullptr);
    } else {
      config.set("layers_to_transform", o.layers());
    }
    if (o.layers_pattern().empty()) {
      config.set("layers_pattern", nullptr);
    } else {
      config.set("layers_pattern", o.layers_pattern());
    }
    config.set("use_rslora", o.rslora());
    config.set("bias", o.bias());
    config.set("lora_bias", o.lora_bias());
    config.set("fan_in_fan_out", o.fan_in_fan_out());
    if (!o.modules_to_save().empty()) {
      config.set("modules_to_save", o.modules_to_save());
    }
    if (!adapter.loaded_config.empty()) {
      return; // how it once started stays as it was written
    }
    if (o.init() == "gaussian" && !o.lora_bias()) { // PEFT refuses the two
      config.set("init_lora_weights", std::string("gaussian"));
    } else {
      config.set("init_lora_weights", o.init() != "random");
    }
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
      const std::string pattern = "^" + escape_regex(site.name);
      ranks[pattern] = wide;
      alphas[pattern] = delta->config().scaling * norm;
    }
  }

  static std::string escape_regex(const std::string& name) {
    std::string result;
    for (const char c : name) {
      result += c == '.' ? "\\." : std::string(1, c);
    }
    return result;
  }

  /// HF always adapts the two halves of an attention: a half that is not
  /// adapted here is written as zeros.
  static void complete_attention(
      const AdapterState& adapter,
      std::vector<std::pair<std::string, Tensor>>& tensors) {
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

/// BitFit is no method of HF's; its files have the same form.
struct BitFitFiles {
  static constexpr const char* type = "BITFIT";

  static BitFitOptions options(const AdapterConfig& config) {
    BitFitOptions o(config.get<std::vector<std::string>>("biases", {"all"}));
    if (config.has("target_modules")) {
      o.targets(targets_field(config, "target_modules"));
    }
    o.modules_to_save(
        config.get<std::vector<std::string>>("modules_to_save", {}));
    return o;
  }

  static void write(const AdapterState& adapter, AdapterConfig& config) {
    const auto& o = std::any_cast<const BitFitOptions&>(adapter.options);
    config.set("biases", o.biases());
    if (o.targets().kind() == Targets::Kind::regex) {
      config.set("target_modules", o.targets().names().front());
    } else if (o.targets().kind() == Targets::Kind::list) {
      config.set("target_modules", o.targets().names());
    } else {
      config.set("target_modules", nullptr);
    }
    config.set("modules_to_save", o.modules_to_save());
  }
};

/// What a folder says about a network: a plan whose deltas hold its values.
inline Plan plan_from_folder(
    const Network& network,
    const std::string& folder,
    const LoadOptions& options,
    std::string& config_text) {
  namespace fs = std::filesystem;
  TORCH_CHECK(
      fs::is_directory(folder),
      "peft: '",
      folder,
      "' is not a folder with ",
      kConfigFile);
  const auto path = (fs::path(folder) / kConfigFile).string();
  const auto config = AdapterConfig::read(path);
  const auto type = config.peft_type();
  Plan result;
  if (type == LoraFiles::type) {
    LoraOptions wanted = LoraFiles::options(config);
    LoraOptions empty = wanted;
    result = plan(empty.init("empty"), network);
    result.options = std::move(wanted);
  } else if (type == BitFitFiles::type) {
    result = plan(BitFitFiles::options(config), network);
  } else {
    TORCH_CHECK(
        false,
        "peft: peft_type '",
        type,
        "' in '",
        path,
        "' is not one that this version of libpeft reads (LORA, BITFIT)");
  }
  bool adapts_ties = false;
  const auto tensors = read_adapter_weights(folder, adapts_ties);
  const auto ties = adapts_ties_apart(result, network);
  TORCH_CHECK(
      ties.empty() || adapts_ties || !options.strict(),
      "peft: the adapter in '",
      folder,
      "' adapts two tied weights, ",
      ties,
      ", one without the other or each in its own way. They are one tensor in "
      "this model and can only be adapted together; untie them, or load with "
      "strict(false) to adapt both as the first that is named");
  drop_tied(result.sites);
  fill_plan(result, tensors, folder, options.strict());
  for (auto& site : result.sites) {
    for (auto& p : site.delta->parameters()) {
      p.set_requires_grad(options.is_trainable());
    }
  }
  config_text = config.dump();
  return result;
}

} // namespace detail

/// Writes adapter_config.json and adapter_model.safetensors into `folder`,
/// which is made if need be. HF PEFT's from_pretrained reads LoRA from it. Each
/// file is replaced only when it is complete. Fields of a config that was
/// loaded and that libpeft does not know are written again.
inline void save(const Adapter& adapter, const std::string& folder) {
  adapter.name(); // an empty or detached handle is an error
  const detail::AdapterState& state = *adapter.shared_state();
  const bool lora = state.method == detail::LoraFiles::type;
  AdapterConfig config = !state.loaded_config.empty()
      ? AdapterConfig::parse(state.loaded_config)
      : lora
      ? AdapterConfig::lora_defaults()
      : AdapterConfig::parse(R"({"peft_type": ")" + state.method + R"("})");
  if (lora) {
    detail::LoraFiles::write(state, config);
  } else {
    TORCH_CHECK(
        state.method == detail::BitFitFiles::type,
        "peft: there is no file format for method '",
        state.method,
        "' yet");
    detail::BitFitFiles::write(state, config);
  }
  config.set("inference_mode", true);

  std::vector<std::pair<std::string, Tensor>> tensors;
  for (const auto& site : state.sites) {
    for (const auto& item : site.delta->file_tensors()) {
      tensors.emplace_back(
          detail::kKeyPrefix + detail::file_key(site.file_prefix, item.first),
          site.delta->to_file(item.first, item.second.detach()));
    }
  }
  if (lora) {
    detail::LoraFiles::complete_attention(state, tensors);
  }
  namespace fs = std::filesystem;
  std::error_code error;
  fs::create_directories(folder, error);
  TORCH_CHECK(
      fs::is_directory(folder),
      "peft: the folder '",
      folder,
      "' cannot be made: ",
      error.message());
  SafetensorsMetadata metadata{{"format", "pt"}};
  for (const auto& site : state.sites) {
    if (site.parameters.size() > 1) {
      metadata[detail::kTiesMark] = "one tensor";
    }
  }
  save_safetensors(
      tensors, (fs::path(folder) / detail::kWeightsFile).string(), metadata);
  config.write((fs::path(folder) / detail::kConfigFile).string());
}

namespace detail {

/// load() for any kind of model that commit() takes.
template <class Model>
Adapter load_onto(
    Model& model,
    const Network& network,
    const std::string& folder,
    const std::string& name,
    const LoadOptions& options) {
  std::string config;
  auto plan = plan_from_folder(network, folder, options, config);
  Adapter adapter = commit(model, name, std::move(plan));
  adapter.shared_state()->loaded_config = std::move(config);
  return adapter;
}

} // namespace detail

/// Attaches the adapter that `folder` holds, written by libpeft or by HF PEFT,
/// under `name`. All or nothing: missing, unexpected and misshaped keys are one
/// error that lists them. Parameters of half precision become float32.
inline Adapter load(
    torch::nn::Module& model,
    const std::string& folder,
    const std::string& name = "default",
    const LoadOptions& options = {}) {
  return detail::load_onto(
      model, describe_network(model), folder, name, options);
}

} // namespace peft
