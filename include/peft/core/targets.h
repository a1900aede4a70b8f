#pragma once

#include <peft/core/network.h>

#include <algorithm>
#include <functional>
#include <initializer_list>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// `what` names the option in the error.
inline void check_regex(const std::string& pattern, const std::string& what) {
  try {
    std::regex compiled(pattern);
  } catch (const std::regex_error& error) {
    TORCH_CHECK_VALUE(
        false,
        "peft: '",
        pattern,
        "' in ",
        what,
        " is not a regular expression: ",
        error.what());
  }
}

} // namespace detail

/// Which modules, or single parameters, an adapter is put on. Names are those
/// of named_modules ("encoder.layer.0.attention.self.query") or of parameters
/// ("self_attn.in_proj_weight"); the root module itself has the name "".
///
///   Targets({"query", "value"})   the name is t, or ends with ".t" (HF's rule)
///   Targets::regex(".*\\.(q|v)")  the whole name matches
///   Targets::all_linear()         every Linear, Conv1D and packed projection
///   Targets::where(predicate)     bool(const std::string&, const Module&)
///   Targets()                     the method's default: query and value
class Targets {
 public:
  enum class Kind { automatic, list, regex, all_linear, predicate };
  using Predicate =
      std::function<bool(const std::string&, const torch::nn::Module&)>;

  Targets() = default;
  Targets(std::vector<std::string> names)
      : kind_(Kind::list), names_(std::move(names)) {
    for (const auto& name : names_) {
      if (name == "all-linear" && names_.size() == 1) {
        kind_ = Kind::all_linear; // HF's word for it
      }
    }
  }
  Targets(std::initializer_list<const char*> names)
      : Targets(std::vector<std::string>(names.begin(), names.end())) {}
  Targets(std::initializer_list<std::string> names)
      : Targets(std::vector<std::string>(names)) {}
  Targets(const std::string& name) : Targets(std::vector<std::string>{name}) {}
  Targets(const char* name) : Targets(std::string(name)) {}

  static Targets regex(const std::string& pattern) {
    Targets result;
    result.kind_ = Kind::regex;
    result.names_ = {pattern};
    detail::check_regex(pattern, "the targets");
    return result;
  }

  static Targets all_linear() {
    Targets result;
    result.kind_ = Kind::all_linear;
    return result;
  }

  static Targets where(Predicate predicate) {
    TORCH_CHECK(predicate, "peft: Targets::where got an empty function");
    Targets result;
    result.kind_ = Kind::predicate;
    result.predicate_ = std::move(predicate);
    return result;
  }

  Kind kind() const {
    return kind_;
  }
  /// The entries of a list, or the one pattern of a regex.
  const std::vector<std::string>& names() const {
    return names_;
  }
  bool empty() const {
    return kind_ == Kind::automatic || (kind_ == Kind::list && names_.empty());
  }

  /// Whether `name` (of `layer`, or of one of its parameters) is meant.
  bool matches(const std::string& name, const Layer& layer) const {
    const bool is_module = name == layer.name;
    switch (kind_) {
      case Kind::automatic:
        return false;
      case Kind::list:
        return std::any_of(names_.begin(), names_.end(), [&](const auto& t) {
          return name_matches(name, t);
        });
      case Kind::regex:
        return std::regex_match(name, std::regex(names_.front()));
      case Kind::all_linear:
        return is_module &&
            (layer.kind == LayerKind::linear ||
             layer.kind == LayerKind::attention || layer.is_conv1d());
      case Kind::predicate:
        TORCH_CHECK(
            layer.module != nullptr,
            "peft: Targets::where needs torch::nn modules; name the layers of "
            "a TorchScript module by a list or a regex");
        return is_module && predicate_(name, *layer.module);
    }
    return false;
  }

  /// HF's rule: equal, or a suffix that starts at a dot.
  static bool name_matches(const std::string& name, const std::string& target) {
    if (name == target) {
      return true;
    }
    return !target.empty() && name.size() > target.size() &&
        name.compare(name.size() - target.size(), target.size(), target) == 0 &&
        name[name.size() - target.size() - 1] == '.';
  }

 private:
  Kind kind_ = Kind::automatic;
  std::vector<std::string> names_;
  Predicate predicate_;
};

namespace detail {

/// Levenshtein distance, for "did you mean".
inline size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) {
    row[j] = j;
  }
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t above = row[j];
      row[j] = std::min(
          {above + 1,
           row[j - 1] + 1,
           diagonal + (a[i - 1] == b[j - 1] ? 0u : 1u)});
      diagonal = above;
    }
  }
  return row[b.size()];
}

/// The end of `name` that has as many dotted parts as `like`.
inline std::string tail_like(const std::string& name, const std::string& like) {
  auto parts = std::count(like.begin(), like.end(), '.') + 1;
  size_t position = name.size();
  while (parts-- > 0 && position != std::string::npos && position > 0) {
    position = name.rfind('.', position - 1);
  }
  return position == std::string::npos || position == 0
      ? name
      : name.substr(position + 1);
}

/// Names a user could have meant by `wrong`, nearest first, else what exists.
inline std::string near_misses(
    const Network& network,
    const std::string& wrong) {
  std::set<std::pair<size_t, std::string>> ranked;
  std::set<std::string> existing;
  for (const auto& layer : network) {
    auto consider = [&](const std::string& name) {
      const std::string tail = tail_like(name, wrong);
      ranked.insert({edit_distance(tail, wrong), tail});
    };
    if (!layer.name.empty()) {
      consider(layer.name);
    }
    for (const auto& p : layer.parameters) {
      if (p.second.dim() >= 2) {
        existing.insert(
            layer.name.empty() ? p.first : tail_like(layer.name, "x"));
        consider(layer.path(p.first));
      }
    }
  }
  std::ostringstream text;
  int shown = 0;
  for (const auto& [distance, name] : ranked) {
    if (distance <= std::max<size_t>(2, wrong.size() / 3) && shown < 5) {
      text << (shown++ == 0 ? " Did you mean " : ", ") << "'" << name << "'";
    }
  }
  if (shown > 0) {
    text << "?";
  }
  shown = 0;
  for (const auto& name : existing) {
    if (shown == 20) {
      text << ", ...";
      break;
    }
    text << (shown++ == 0 ? " Modules with weights: " : ", ") << "'" << name
         << "'";
  }
  return text.str() + ".";
}

/// Every entry of a list must name something; `what` is the option's name.
inline void check_every_name_matches(
    const Network& network,
    const std::vector<std::string>& names,
    const std::string& what,
    bool parameters_too) {
  for (const auto& entry : names) {
    const bool found =
        std::any_of(network.begin(), network.end(), [&](const Layer& layer) {
          if (Targets::name_matches(layer.name, entry)) {
            return true;
          }
          return parameters_too &&
              std::any_of(
                     layer.parameters.begin(),
                     layer.parameters.end(),
                     [&](const auto& p) {
                       return Targets::name_matches(layer.path(p.first), entry);
                     });
        });
    TORCH_CHECK(
        found,
        "peft: ",
        what,
        " entry '",
        entry,
        "' matches nothing in this network.",
        near_misses(network, entry));
  }
}

/// HF's modules_to_save rule: the module itself or anything inside it.
inline bool is_inside(
    const std::string& name,
    const std::vector<std::string>& modules) {
  const std::string dotted = "." + name + ".";
  return std::any_of(modules.begin(), modules.end(), [&](const auto& m) {
    return dotted.find("." + m + ".") != std::string::npos;
  });
}

} // namespace detail

} // namespace peft
