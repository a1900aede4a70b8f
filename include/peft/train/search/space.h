#pragma once

// What a search chooses from: named dimensions, each of whole numbers, of real
// numbers or of words.
//
//   auto space = peft::SearchSpace()
//       .integer("r", 1, 16)
//       .real("rate", 1e-4, 1e-2, /*log=*/true)
//       .categorical("targets", {"query", "query value"});

#include <peft/io/json.h>

#include <c10/util/Exception.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace peft {

using SearchValue = std::variant<int64_t, double, std::string>;

/// One value for each dimension of a space, in the space's order.
class Configuration {
 public:
  int64_t integer(const std::string& name) const {
    return value<int64_t>(name, "an integer");
  }
  double real(const std::string& name) const {
    return value<double>(name, "a real number");
  }
  const std::string& category(const std::string& name) const {
    return value<std::string>(name, "a category");
  }

  const std::vector<std::pair<std::string, SearchValue>>& values() const {
    return values_;
  }
  /// Sets a value, or adds it at the end. SearchSpace::check says whether the
  /// whole fits.
  Configuration& set(const std::string& name, SearchValue value) {
    for (auto& item : values_) {
      if (item.first == name) {
        item.second = std::move(value);
        return *this;
      }
    }
    values_.emplace_back(name, std::move(value));
    return *this;
  }

  bool operator==(const Configuration& other) const {
    return values_ == other.values_;
  }
  bool operator!=(const Configuration& other) const {
    return !(*this == other);
  }

  /// {"r": 4, "rate": 0.001}
  nlohmann::json to_json() const {
    auto result = nlohmann::json::object();
    for (const auto& [name, value] : values_) {
      std::visit([&, &key = name](const auto& v) { result[key] = v; }, value);
    }
    return result;
  }
  /// "r=4 rate=0.001", in the space's order.
  std::string to_string() const {
    std::string text;
    for (const auto& [name, value] : values_) {
      text += (text.empty() ? "" : " ") + name + "=" +
          std::visit([](const auto& v) { return fmt::format("{}", v); }, value);
    }
    return text;
  }

 private:
  template <class T>
  const T& value(const std::string& name, const char* kind) const {
    const SearchValue* found = nullptr;
    std::string names;
    for (const auto& item : values_) {
      found = item.first == name ? &item.second : found;
      names += (names.empty() ? "'" : ", '") + item.first + "'";
    }
    TORCH_CHECK_VALUE(
        found,
        "peft: this configuration has no dimension '",
        name,
        "'; it has ",
        names.empty() ? "none" : names);
    const T* result = std::get_if<T>(found);
    TORCH_CHECK_VALUE(result, "peft: the dimension '", name, "' is not ", kind);
    return *result;
  }

  std::vector<std::pair<std::string, SearchValue>> values_;
};

/// One dimension of a space.
struct SearchDimension {
  enum class Kind { integer, real, categorical };

  std::string name;
  Kind kind;
  int64_t low = 0, high = 0; // integer: both included
  double from = 0, to = 0; // real: [from, to)
  bool log = false; // real: uniform in the logarithm
  std::vector<std::string> choices; // categorical

  /// Distinct values; nothing for a real dimension.
  std::optional<uint64_t> size() const {
    switch (kind) {
      case Kind::integer: // 0 stands for 2^64
        return static_cast<uint64_t>(high) - static_cast<uint64_t>(low) + 1;
      case Kind::categorical:
        return choices.size();
      default:
        return std::nullopt;
    }
  }
  /// Value number `index` of size().
  SearchValue at(uint64_t index) const {
    if (kind == Kind::integer) {
      return static_cast<int64_t>(static_cast<uint64_t>(low) + index);
    }
    return choices.at(index);
  }

  nlohmann::json to_json() const {
    switch (kind) {
      case Kind::integer:
        return {{"name", name}, {"integer", {low, high}}};
      case Kind::real:
        return {{"name", name}, {"real", {from, to}}, {"log", log}};
      default:
        return {{"name", name}, {"categorical", choices}};
    }
  }

  /// Why `value` is none of this dimension's; empty where it is.
  std::string misfit(const SearchValue& value) const {
    if (kind == Kind::integer) {
      const auto* v = std::get_if<int64_t>(&value);
      return v != nullptr && low <= *v && *v <= high
          ? ""
          : fmt::format("an integer from {} to {}", low, high);
    }
    if (kind == Kind::real) {
      const auto* v = std::get_if<double>(&value);
      return v != nullptr && from <= *v && *v <= to
          ? ""
          : fmt::format("a real number from {} to {}", from, to);
    }
    const auto* v = std::get_if<std::string>(&value);
    std::string words;
    for (const auto& choice : choices) {
      if (v != nullptr && *v == choice) {
        return {};
      }
      words += (words.empty() ? "'" : ", '") + choice + "'";
    }
    return "one of " + words;
  }
};

/// The dimensions of a search, and what is left out of their product.
class SearchSpace {
 public:
  using Accepts = std::function<bool(const Configuration&)>;

  /// Whole numbers from `low` to `high`, both included.
  SearchSpace& integer(const std::string& name, int64_t low, int64_t high) {
    TORCH_CHECK_VALUE(
        low <= high,
        "peft: the dimension '",
        name,
        "' goes from ",
        low,
        " to ",
        high,
        "; the first must not be the larger one");
    auto& dimension = add(name, SearchDimension::Kind::integer);
    dimension.low = low;
    dimension.high = high;
    return *this;
  }

  /// Real numbers in [from, to), uniformly or, with `log`, in their logarithm.
  SearchSpace&
  real(const std::string& name, double from, double to, bool log = false) {
    TORCH_CHECK_VALUE(
        std::isfinite(from) && std::isfinite(to) && from < to &&
            std::isfinite(to - from),
        "peft: the dimension '",
        name,
        "' goes from ",
        from,
        " to ",
        to,
        "; it takes two finite numbers, the smaller one first");
    TORCH_CHECK_VALUE(
        !log || from > 0,
        "peft: the dimension '",
        name,
        "' has a logarithm and must be positive; it begins at ",
        from);
    auto& dimension = add(name, SearchDimension::Kind::real);
    dimension.from = from;
    dimension.to = to;
    dimension.log = log;
    return *this;
  }

  SearchSpace& categorical(
      const std::string& name,
      std::vector<std::string> choices) {
    TORCH_CHECK_VALUE(
        !choices.empty(),
        "peft: the dimension '",
        name,
        "' has nothing to choose from");
    for (auto choice = choices.begin(); choice != choices.end(); ++choice) {
      TORCH_CHECK_VALUE(
          std::find(choices.begin(), choice, *choice) == choice,
          "peft: the dimension '",
          name,
          "' names '",
          *choice,
          "' twice");
    }
    add(name, SearchDimension::Kind::categorical).choices = std::move(choices);
    return *this;
  }

  /// Leaves out the configurations that `accepts` says no to.
  SearchSpace& where(Accepts accepts) {
    rules_.push_back(std::move(accepts));
    return *this;
  }
  bool accepts(const Configuration& configuration) const {
    return std::all_of(rules_.begin(), rules_.end(), [&](const Accepts& rule) {
      return rule(configuration);
    });
  }

  const std::vector<SearchDimension>& dimensions() const {
    return dimensions_;
  }

  /// Configurations before where(); nothing where a dimension is real or the
  /// number exceeds 2^62.
  std::optional<uint64_t> size() const {
    uint64_t product = 1;
    for (const auto& dimension : dimensions_) {
      const auto count = dimension.size();
      if (!count || *count == 0 || *count > (uint64_t{1} << 62) / product) {
        return std::nullopt;
      }
      product *= *count;
    }
    return product;
  }

  /// Configuration number `index` of size(), the last dimension running first.
  Configuration at(uint64_t index) const {
    std::vector<SearchValue> values(dimensions_.size());
    for (size_t i = dimensions_.size(); i-- > 0;) {
      const uint64_t count = *dimensions_[i].size();
      values[i] = dimensions_[i].at(index % count);
      index /= count;
    }
    Configuration result;
    for (size_t i = 0; i < values.size(); ++i) {
      result.set(dimensions_[i].name, std::move(values[i]));
    }
    return result;
  }

  /// An error unless `configuration` has one fitting value for each dimension.
  void check(const Configuration& configuration) const {
    for (const auto& item : configuration.values()) {
      check_name(item.first);
    }
    for (const auto& dimension : dimensions_) {
      const auto& values = configuration.values();
      const auto found =
          std::find_if(values.begin(), values.end(), [&](const auto& item) {
            return item.first == dimension.name;
          });
      TORCH_CHECK_VALUE(
          found != values.end(),
          "peft: the configuration lacks the dimension '",
          dimension.name,
          "'");
      const std::string wanted = dimension.misfit(found->second);
      TORCH_CHECK_VALUE(
          wanted.empty(),
          "peft: '",
          dimension.name,
          "' must be ",
          wanted,
          ", got ",
          std::visit([](const auto& v) { return c10::str(v); }, found->second));
    }
  }

  /// A configuration as a JSON object, and back; both check it.
  nlohmann::json encode(const Configuration& configuration) const {
    check(configuration);
    return configuration.to_json();
  }
  Configuration decode(const nlohmann::json& object) const {
    TORCH_CHECK_VALUE(
        object.is_object(),
        "peft: a configuration is a JSON object, got ",
        object.dump());
    for (const auto& item : object.items()) {
      check_name(item.key());
    }
    Configuration result;
    for (const auto& dimension : dimensions_) {
      const auto found = object.find(dimension.name);
      if (found != object.end()) {
        result.set(dimension.name, value_of(dimension, *found));
      }
    }
    check(result);
    return result;
  }
  /// The same from JSON text.
  Configuration parse(const std::string& text) const {
    return decode(detail::parse_json(text, "a configuration"));
  }

  nlohmann::json to_json() const {
    auto result = nlohmann::json::array();
    for (const auto& dimension : dimensions_) {
      result.push_back(dimension.to_json());
    }
    return result;
  }

 private:
  SearchDimension& add(const std::string& name, SearchDimension::Kind kind) {
    TORCH_CHECK_VALUE(!name.empty(), "peft: a dimension needs a name");
    for (const auto& other : dimensions_) {
      TORCH_CHECK_VALUE(
          other.name != name,
          "peft: the space has two dimensions '",
          name,
          "'");
    }
    SearchDimension dimension;
    dimension.name = name;
    dimension.kind = kind;
    dimensions_.push_back(std::move(dimension));
    return dimensions_.back();
  }

  void check_name(const std::string& name) const {
    bool found = false;
    std::string names;
    for (const auto& dimension : dimensions_) {
      found = found || dimension.name == name;
      names += (names.empty() ? "'" : ", '") + dimension.name + "'";
    }
    TORCH_CHECK_VALUE(
        found,
        "peft: the space has no dimension '",
        name,
        "'; it has ",
        names.empty() ? "none" : names);
  }

  static SearchValue value_of(
      const SearchDimension& dimension,
      const nlohmann::json& value) {
    const bool is_real = dimension.kind == SearchDimension::Kind::real;
    if (value.is_number_integer() && !is_real) {
      const bool fits = !value.is_number_unsigned() ||
          value.get<uint64_t>() <= static_cast<uint64_t>(INT64_MAX);
      TORCH_CHECK_VALUE(
          fits, "peft: '", dimension.name, "' is too large: ", value.dump());
      return value.get<int64_t>();
    }
    if (value.is_number()) {
      return value.get<double>();
    }
    TORCH_CHECK_VALUE(
        value.is_string(),
        "peft: '",
        dimension.name,
        "' is neither a number nor a word: ",
        value.dump());
    return value.get<std::string>();
  }

  std::vector<SearchDimension> dimensions_;
  std::vector<Accepts> rules_;
};

} // namespace peft
