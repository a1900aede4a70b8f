#pragma once

#include <peft/detail/platform.h>
#include <peft/io/json.h>

#include <torch/types.h>

#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace peft {

/// `target_modules` and the like: a list of names, or one regular expression.
using NamesOrPattern = std::variant<std::vector<std::string>, std::string>;

/// `init_lora_weights`: on, off, or the name of a scheme.
using FlagOrName = std::variant<bool, std::string>;

namespace detail {

// read_field(json, value) sets `value` and returns true where the types agree;
// field_type(value) says in words what was wanted.

inline bool read_field(const nlohmann::json& json, bool& value) {
  return json.is_boolean() && (value = json.get<bool>(), true);
}
inline std::string field_type(const bool&) {
  return "true or false";
}

inline bool read_field(const nlohmann::json& json, int64_t& value) {
  if (!json.is_number_integer() ||
      (json.is_number_unsigned() &&
       json.get<uint64_t>() >
           static_cast<uint64_t>(std::numeric_limits<int64_t>::max()))) {
    return false;
  }
  value = json.get<int64_t>();
  return true;
}
inline std::string field_type(const int64_t&) {
  return "an integer";
}

inline bool read_field(const nlohmann::json& json, double& value) {
  return json.is_number() && (value = json.get<double>(), true);
}
inline std::string field_type(const double&) {
  return "a number";
}

inline bool read_field(const nlohmann::json& json, std::string& value) {
  return json.is_string() && (value = json.get<std::string>(), true);
}
inline std::string field_type(const std::string&) {
  return "a string";
}

template <typename T>
bool read_field(const nlohmann::json& json, std::vector<T>& values) {
  if (!json.is_array()) {
    return false;
  }
  values.clear();
  for (const auto& item : json) {
    T value{};
    if (!read_field(item, value)) {
      return false;
    }
    values.push_back(std::move(value));
  }
  return true;
}
template <typename T>
std::string field_type(const std::vector<T>&) {
  return "a list, each member " + field_type(T{});
}

template <typename T>
bool read_field(const nlohmann::json& json, std::map<std::string, T>& values) {
  if (!json.is_object()) {
    return false;
  }
  values.clear();
  for (const auto& item : json.items()) {
    if (!read_field(item.value(), values[item.key()])) {
      return false;
    }
  }
  return true;
}
template <typename T>
std::string field_type(const std::map<std::string, T>&) {
  return "an object, each value " + field_type(T{});
}

/// The first alternative that fits.
template <typename... Ts>
bool read_field(const nlohmann::json& json, std::variant<Ts...>& value) {
  const auto fits = [&](auto candidate) {
    return read_field(json, candidate) && (value = std::move(candidate), true);
  };
  return (fits(Ts{}) || ...);
}
template <typename... Ts>
std::string field_type(const std::variant<Ts...>&) {
  std::string text;
  ((text += (text.empty() ? "" : ", or ") + field_type(Ts{})), ...);
  return text;
}

} // namespace detail

/// The fields of an `adapter_config.json`, whatever the method. Fields that
/// libpeft does not know are kept and written again.
///
///     auto config = peft::AdapterConfig::read("adapter/adapter_config.json");
///     int64_t r = config.get<int64_t>("r");
///     auto targets = config.get<peft::NamesOrPattern>("target_modules");
///     config.set("inference_mode", true);
///     config.write("copy/adapter_config.json");
///
/// `get` takes bool, int64_t, double, std::string, and lists
/// (std::vector<T>), objects (std::map<std::string, T>) and alternatives
/// (std::variant<T...>) of these. A field that is null counts as absent.
class AdapterConfig {
 public:
  AdapterConfig() = default;

  /// Reads a file. Throws when it is missing, not JSON, gives a key twice, is
  /// not an object, or has neither a `peft_type` nor adapter-hub's `config`.
  static AdapterConfig read(const std::string& path) {
    return AdapterConfig(detail::read_json(path), '"' + path + '"');
  }

  /// The same for text; `where` names it in errors.
  static AdapterConfig parse(
      const std::string& text,
      const std::string& where = "the adapter config") {
    return AdapterConfig(detail::parse_json(text, where), where);
  }

  /// Every field that HF PEFT 0.21.2 writes for `LoraConfig()`, with its
  /// defaults.
  static AdapterConfig lora_defaults();

  /// The method in HF's spelling, "LORA" say.
  std::string peft_type() const {
    return get<std::string>("peft_type");
  }

  /// Whether the field is there and not null.
  bool has(const std::string& field) const {
    const auto found = fields_.find(field);
    return found != fields_.end() && !found->is_null();
  }

  /// The field's value; an error when it is absent, null or of another type.
  template <typename T>
  T get(const std::string& field) const {
    TORCH_CHECK(
        has(field),
        "peft: ",
        where_,
        " has no \"",
        field,
        "\", which must be ",
        detail::field_type(T{}));
    T value{};
    TORCH_CHECK(
        detail::read_field(fields_.at(field), value),
        "peft: ",
        where_,
        ": \"",
        field,
        "\" must be ",
        detail::field_type(T{}),
        ", found ",
        fields_.at(field).dump());
    return value;
  }

  /// The same, with a value for a field that is absent or null.
  template <typename T>
  T get(const std::string& field, T fallback) const {
    return has(field) ? get<T>(field) : std::move(fallback);
  }

  /// An object of fields inside a field, as adapter-hub has its "config".
  AdapterConfig section(const std::string& field) const {
    AdapterConfig result;
    result.fields_ =
        is_section(field) ? fields_.at(field) : nlohmann::json::object();
    result.where_ = where_ + ", \"" + field + "\"";
    return result;
  }
  bool is_section(const std::string& field) const {
    return has(field) && fields_.at(field).is_object();
  }
  AdapterConfig& set(const std::string& field, const AdapterConfig& section) {
    fields_[field] = section.fields_;
    return *this;
  }

  /// Whether the field is absent, null, false, or an empty list, object or
  /// string.
  bool is_empty(const std::string& field) const {
    const auto found = fields_.find(field);
    return found == fields_.end() || found->is_null() ||
        *found == nlohmann::json(false) || *found == nlohmann::json("") ||
        (found->is_structured() && found->empty());
  }

  /// Sets a number that is written as an integer where it is one (lora_alpha).
  AdapterConfig& set_number(const std::string& field, double value) {
    fields_[field] = number(value);
    return *this;
  }
  AdapterConfig& set_numbers(
      const std::string& field,
      const std::map<std::string, double>& values) {
    fields_[field] = nlohmann::json::object();
    for (const auto& [name, value] : values) {
      fields_[field][name] = number(value);
    }
    return *this;
  }

  /// Sets a field to a value of one of the types that `get` takes, or to null
  /// (`nullptr`).
  template <typename T>
  AdapterConfig& set(const std::string& field, const T& value) {
    fields_[field] = value;
    return *this;
  }
  template <typename... Ts>
  AdapterConfig& set(
      const std::string& field,
      const std::variant<Ts...>& value) {
    std::visit([&](const auto& held) { set(field, held); }, value);
    return *this;
  }

  /// Removes a field; absent ones are no error.
  AdapterConfig& erase(const std::string& field) {
    fields_.erase(field);
    return *this;
  }

  /// The names of all fields, sorted.
  std::vector<std::string> fields() const {
    std::vector<std::string> names;
    for (const auto& item : fields_.items()) {
      names.push_back(item.key());
    }
    return names;
  }

  /// The text that HF PEFT would write.
  std::string dump() const {
    try {
      return detail::dump_like_python(fields_);
    } catch (const nlohmann::json::exception& error) {
      TORCH_CHECK(
          false, "peft: ", where_, " cannot be written: ", error.what());
    }
  }

  /// Writes the file as HF PEFT does; an older file is replaced only when the
  /// new one is complete.
  void write(const std::string& path) const {
    const auto text = dump();
    detail::AtomicFile file(path);
    file.write(text);
    file.commit();
  }

 private:
  static nlohmann::json number(double value) {
    const auto whole = static_cast<int64_t>(value);
    return static_cast<double>(whole) == value ? nlohmann::json(whole)
                                               : nlohmann::json(value);
  }

  AdapterConfig(nlohmann::json fields, std::string where)
      : fields_(std::move(fields)), where_(std::move(where)) {
    TORCH_CHECK(
        fields_.is_object(),
        "peft: ",
        where_,
        " must be a JSON object, found ",
        fields_.type_name());
    if (!has("config")) { // adapter-hub's have that instead
      peft_type();
    }
  }

  nlohmann::json fields_ = nlohmann::json::object();
  std::string where_ = "the adapter config";
};

inline AdapterConfig AdapterConfig::lora_defaults() {
  return parse(R"({
    "alora_invocation_tokens": null,
    "alpha_pattern": {},
    "arrow_config": null,
    "auto_mapping": null,
    "base_model_name_or_path": null,
    "bias": "none",
    "corda_config": null,
    "ensure_weight_tying": false,
    "eva_config": null,
    "exclude_modules": null,
    "fan_in_fan_out": false,
    "inference_mode": false,
    "init_lora_weights": true,
    "kasa_config": null,
    "layer_replication": null,
    "layers_pattern": null,
    "layers_to_transform": null,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": false,
    "lora_dropout": 0.0,
    "lora_ga_config": null,
    "megatron_config": null,
    "megatron_core": "megatron.core",
    "modules_to_save": null,
    "monteclora_config": null,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": null,
    "target_modules": null,
    "target_parameters": null,
    "task_type": null,
    "trainable_token_indices": null,
    "use_bdlora": null,
    "use_dora": false,
    "use_qalora": false,
    "use_rslora": false,
    "velora_config": null
  })");
}

} // namespace peft
