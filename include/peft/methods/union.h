#pragma once

// Several methods as one adapter: one name, one list of parameters, one folder.
// A union is an options struct made of options structs; its plan joins theirs.

#include <peft/core/attach.h>

#include <algorithm>
#include <any>
#include <cctype>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// One method of a union: its sites have `key` as the first word of their
/// `part`, and its file is written and read by its own format.
struct UnionPart {
  std::string key;
  std::string method;
  std::any options;
};

/// Plan::options of a union: what it is made of, in the order of joining.
struct UnionParts {
  std::vector<UnionPart> parts;
  /// What was put on all of them (methods/decorated.h: GateOptions, ...).
  std::any decoration{};
  /// The modules (heads) that it was not put on.
  std::vector<std::string> plain{};
};

/// "PREFIX_TUNING" -> "prefix_tuning", or "prefix_tuning_2" where that is
/// taken.
inline std::string part_key(
    const std::vector<UnionPart>& taken,
    const std::string& method) {
  std::string key = method;
  std::transform(key.begin(), key.end(), key.begin(), [](unsigned char c) {
    return static_cast<char>(std::tolower(c));
  });
  const auto is_taken = [&](const std::string& name) {
    return std::any_of(taken.begin(), taken.end(), [&](const UnionPart& part) {
      return part.key == name;
    });
  };
  std::string result = key;
  for (int i = 2; is_taken(result); ++i) {
    result = key + "_" + std::to_string(i);
  }
  return result;
}

/// The names that a site's tensors have in a file.
inline std::set<std::string> file_names_of(const PlannedSite& site) {
  std::set<std::string> names;
  for (const auto& item : site.delta->all_file_tensors()) {
    names.insert(
        site.file_prefix.empty() ? item.first
                                 : site.file_prefix + "." + item.first);
  }
  return names;
}

/// Adds the sites of `part` to `whole`, whose `options` it makes UnionParts. A
/// parameter that both train whole (a head in both's modules_to_save) is
/// trained once. `key` names the part in files, by default its method; where
/// two parts would name a site's tensors alike, the later one's have it in
/// front.
///
///     Plan whole;
///     whole.method = "MAM";
///     join(whole, plan(prefix, network));
///     join(whole, plan(adapter, network));
inline void join(Plan& whole, Plan&& part, const std::string& key = "") {
  if (!whole.options.has_value()) {
    whole.options = UnionParts{};
  }
  auto& parts = std::any_cast<UnionParts&>(whole.options).parts;
  const std::string name = part_key(parts, key.empty() ? part.method : key);
  std::map<std::string, std::set<const PlannedSite*>> taken;
  const auto before = std::move(whole.sites);
  for (const auto& site : before) {
    for (const auto& file_name : file_names_of(site)) {
      taken[file_name].insert(&site);
    }
  }
  whole.sites = before;
  for (auto& site : part.sites) {
    site.part = site.part.empty() ? name : name + "." + site.part;
    bool is_twice = false, is_named_alike = false;
    for (const auto& file_name : file_names_of(site)) {
      for (const PlannedSite* other : taken[file_name]) {
        is_named_alike = true;
        is_twice = is_twice ||
            (other->parameter == site.parameter &&
             other->delta->replaces_base() && site.delta->replaces_base());
      }
    }
    if (is_twice) {
      continue;
    }
    if (is_named_alike) {
      site.file_prefix =
          site.file_prefix.empty() ? name : name + "." + site.file_prefix;
    }
    whole.sites.push_back(std::move(site));
  }
  parts.push_back({name, part.method, std::move(part.options)});
}

/// Options of a part that trains the union's heads too: the other parts keep
/// off them, and join() takes them once.
template <class Options>
Options with_heads(Options options, const std::vector<std::string>& heads) {
  auto all = options.modules_to_save();
  all.insert(all.end(), heads.begin(), heads.end());
  return options.modules_to_save(all);
}

} // namespace detail

} // namespace peft
