#pragma once

#include <peft/detail/platform.h>

#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <torch/types.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace peft::detail {

/// Builds a JSON value from parser events. Refuses what a plain parse hides:
/// a key given twice, and nesting deep enough to exhaust the stack later.
class StrictJsonBuilder final : public nlohmann::json_sax<nlohmann::json> {
 public:
  using json = nlohmann::json;

  /// Levels of arrays and objects; serde_json, which the safetensors package
  /// uses, has the same limit.
  static constexpr size_t max_depth = 127;

  /// `where` opens every error; `exact_integers` refuses integers that only a
  /// double could hold.
  StrictJsonBuilder(const std::string& where, bool exact_integers)
      : where_(where), exact_integers_(exact_integers) {}

  json take() {
    return std::move(root_);
  }

  bool null() override {
    return put(nullptr) != nullptr;
  }
  bool boolean(bool value) override {
    return put(value) != nullptr;
  }
  bool number_integer(number_integer_t value) override {
    return put(value) != nullptr;
  }
  bool number_unsigned(number_unsigned_t value) override {
    return put(value) != nullptr;
  }
  bool number_float(number_float_t value, const string_t& text) override {
    TORCH_CHECK(
        !exact_integers_ || text.find_first_of(".eE") != string_t::npos,
        "peft: cannot read ",
        where_,
        ": the integer ",
        text,
        " does not fit into 64 bits");
    return put(value) != nullptr;
  }
  bool string(string_t& value) override {
    return put(std::move(value)) != nullptr;
  }
  bool binary(binary_t& value) override {
    return put(json::binary(std::move(value))) != nullptr;
  }
  bool start_object(size_t /*size*/) override {
    return open(json::object());
  }
  bool start_array(size_t /*size*/) override {
    return open(json::array());
  }
  bool end_object() override {
    return close();
  }
  bool end_array() override {
    return close();
  }
  bool key(string_t& name) override {
    auto [position, is_new] = open_.back()->emplace(name, nullptr);
    TORCH_CHECK(
        is_new,
        "peft: cannot read ",
        where_,
        ": the key ",
        quoted(name),
        " is given twice");
    slot_ = &*position;
    return true;
  }
  bool parse_error(
      size_t /*position*/,
      const std::string& /*token*/,
      const json::exception& error) override {
    TORCH_CHECK(
        false,
        "peft: cannot read ",
        where_,
        ": not valid JSON (",
        error.what(),
        ")");
  }

  /// A name as JSON spells it, so that errors show odd characters.
  static std::string quoted(const std::string& name) {
    return json(name).dump(-1, ' ', true, json::error_handler_t::replace);
  }

 private:
  json* put(json value) {
    if (open_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    if (open_.back()->is_array()) {
      open_.back()->push_back(std::move(value));
      return &open_.back()->back();
    }
    *slot_ = std::move(value);
    return slot_;
  }

  bool open(json container) {
    TORCH_CHECK(
        open_.size() < max_depth,
        "peft: cannot read ",
        where_,
        ": nested deeper than ",
        max_depth,
        " levels");
    open_.push_back(put(std::move(container)));
    return true;
  }

  bool close() {
    open_.pop_back();
    return true;
  }

  const std::string& where_;
  bool exact_integers_;
  json root_;
  // The containers that are still open, and where the next member's value
  // goes. A container never moves while it is open: only the innermost grows.
  std::vector<json*> open_;
  json* slot_ = nullptr;
};

/// Parses JSON text; errors begin with `where`. Time is n log n in the size of
/// the text.
inline nlohmann::json parse_json(
    std::string_view text,
    const std::string& where,
    bool exact_integers = true) {
  // The parser takes a zero byte for the end and skips a byte order mark; JSON
  // knows neither.
  TORCH_CHECK(
      text.find('\0') == std::string_view::npos,
      "peft: cannot read ",
      where,
      ": not valid JSON (it holds a zero byte)");
  TORCH_CHECK(
      text.substr(0, 3) != "\xEF\xBB\xBF",
      "peft: cannot read ",
      where,
      ": not valid JSON (it begins with a byte order mark)");
  StrictJsonBuilder builder(where, exact_integers);
  nlohmann::json::sax_parse(text.begin(), text.end(), &builder);
  return builder.take();
}

/// Reads and parses a JSON file.
inline nlohmann::json read_json(const std::string& path) {
  const MappedFile file(path);
  const std::string_view text(
      reinterpret_cast<const char*>(file.data()), file.size());
  return parse_json(text, '"' + path + '"');
}

/// Text as Python's `json.dumps(value, indent=2, sort_keys=True)` writes it.
inline std::string dump_like_python(
    const nlohmann::json& value,
    const std::string& indent = "\n") {
  if (value.is_number_float()) {
    const double number = value.get<double>();
    TORCH_CHECK(
        std::isfinite(number), "peft: JSON cannot hold the number ", number);
    std::string text = fmt::format("{}", number);
    return text.find_first_of(".e") == std::string::npos ? text + ".0" : text;
  }
  if (!value.is_structured() || value.empty()) {
    return value.dump(-1, ' ', /*ensure_ascii=*/true);
  }
  const std::string inner = indent + "  ";
  std::string text;
  for (const auto& item : value.items()) {
    text += text.empty() ? inner : "," + inner;
    if (value.is_object()) {
      text += nlohmann::json(item.key()).dump(-1, ' ', true) + ": ";
    }
    text += dump_like_python(item.value(), inner);
  }
  return (value.is_object() ? "{" : "[") + text + indent +
      (value.is_object() ? "}" : "]");
}

} // namespace peft::detail
