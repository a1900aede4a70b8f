#pragma once

// Fills a plan's deltas with a file's tensors: all of them, or none, with one
// error that lists what is missing, unexpected or of another shape.

#include <peft/core/attach.h>
#include <peft/core/targets.h>
#include <peft/io/formats/format.h>

#include <algorithm>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

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

/// Those of `candidates` that `key` could have been meant as: one ends like the
/// other, or they are spelled alike. As " (what: 'x', 'y'?)", nearest first, or
/// "".
inline std::string meant_by(
    const std::string& key,
    const std::vector<std::string>& candidates,
    const std::string& what) {
  std::set<std::pair<size_t, std::string>> ranked;
  for (const auto& other : candidates) {
    const bool ends_alike =
        Targets::name_matches(other, key) || Targets::name_matches(key, other);
    const auto [shorter, longer] = std::minmax(key.size(), other.size());
    const size_t most = std::max<size_t>(2, shorter / 4);
    if (ends_alike) {
      ranked.emplace(0, other);
    } else if (longer - shorter <= most) {
      const size_t far = edit_distance(key, other);
      if (far <= most) {
        ranked.emplace(far, other);
      }
    }
  }
  std::string text;
  size_t shown = 0;
  for (auto item = ranked.begin(); item != ranked.end() && shown < 2; ++item) {
    text += (shown++ == 0 ? "'" : ", '") + item->second + "'";
  }
  return text.empty() ? text : " (" + what + ": " + text + "?)";
}

/// The first twenty of `keys`, the others by their number, each with what it
/// could have been meant as.
inline std::string listed_with_near(
    std::vector<std::string> keys,
    const std::vector<std::string>& candidates,
    const std::string& what) {
  for (size_t i = 0; i < keys.size() && i < 20; ++i) {
    keys[i] += meant_by(keys[i], candidates, what);
  }
  return listed(keys);
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
/// or "". `together` says of which sites that is not so.
template <class Together>
std::string adapts_ties_apart(
    const Plan& plan,
    const Network& network,
    Together&& together) {
  using Parameter = NamedParameters::value_type;
  ByMemory<std::pair<const Layer*, const Parameter*>> by_memory;
  for (const auto& layer : network) {
    for (const auto& p : layer.parameters) {
      by_memory.emplace(start_of_memory(p.second), std::make_pair(&layer, &p));
    }
  }
  for (const auto& site : plan.sites) {
    const auto [begin, end] =
        by_memory.equal_range(start_of_memory(site.tensor));
    for (auto item = begin; item != end; ++item) {
      const auto [layer, p] = item->second;
      const std::string path = layer->path(p->first);
      if (path != site.parameter && is_tied(p->second, site.tensor) &&
          !together(site)) {
        return "'" + site.parameter + "' and '" + path + "'";
      }
    }
  }
  return {};
}

/// Fills the deltas of a plan from a file's tensors, after checking all.
inline void fill_plan(
    Plan& plan,
    const NamedTensorMap& tensors,
    const std::string& folder,
    bool strict) {
  struct Wanted {
    std::string key, name;
    Delta* delta;
  };
  std::vector<Wanted> wanted;
  std::set<std::string> expected;
  for (const auto& site : plan.sites) {
    for (const auto& item : site.delta->all_file_tensors()) {
      auto key = file_key(site.file_prefix, item.first);
      expected.insert(key);
      wanted.push_back({std::move(key), item.first, site.delta.get()});
    }
  }
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
    for (const auto& item : wanted) {
      const auto found = tensors.find(item.key);
      if (found == tensors.end()) {
        continue;
      }
      const auto misfit = found->second.is_complex()
          ? "complex numbers where real ones fit"
          : item.delta->from_file(item.name, found->second, dry_run);
      if (!misfit.empty()) {
        misshaped.push_back(item.key + ": " + misfit);
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
      !strict || missing.empty() ? ""
                                 : "\n  missing from the file:" +
              listed_with_near(missing, extra, "the file has"),
      !strict || extra.empty() ? ""
                               : "\n  unexpected in the file:" +
              listed_with_near(extra,
                               missing.empty()
                                   ? std::vector<std::string>(
                                         expected.begin(), expected.end())
                                   : missing,
                               "the adapter has"));
  each(/*dry_run=*/false);
}

} // namespace detail

} // namespace peft
