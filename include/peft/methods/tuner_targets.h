#pragma once

// Which weights a tuner changes, by the fields that the configs of HF PEFT
// share: target_modules, exclude_modules, layers_to_transform, layers_pattern.
// An Options struct that has them (targets, exclude, layers, layers_pattern,
// modules_to_save) hands them to plan_tuner().

#include <peft/core/attach.h>
#include <peft/methods/modules_to_save.h>

#include <algorithm>
#include <memory>
#include <regex>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// The names that attention's query and value projections go by in the
/// architectures of HF, for default targets.
inline bool is_query_or_value(const Layer& layer) {
  static const char* const names[] = {
      "query",
      "value",
      "q_proj",
      "v_proj",
      "q",
      "v",
      "q_lin",
      "v_lin",
      "to_q",
      "to_v",
      "wq",
      "wv",
      "Wq",
      "Wv",
      "query_proj",
      "value_proj",
      "query_key_value",
      "c_attn",
      "qkv",
      "qkv_proj"};
  const auto dot = layer.name.rfind('.');
  const std::string last =
      dot == std::string::npos ? layer.name : layer.name.substr(dot + 1);
  for (const char* name : names) {
    if (last == name) {
      return layer.parameter("weight").defined();
    }
  }
  return false;
}

/// HF's layers_to_transform: the first number after a dotted name is the index.
template <class Options>
bool in_chosen_layers(const Options& options, const std::string& name) {
  if (options.layers().empty()) {
    return true;
  }
  // An entry that is the whole name is meant wherever it stands.
  for (const auto& target : options.targets().names()) {
    if (options.targets().kind() == Targets::Kind::list && target == name) {
      return true;
    }
  }
  std::smatch match;
  bool found = false;
  if (options.layers_pattern().empty()) {
    found = std::regex_search(
        name,
        match,
        std::regex("^.*?\\.[^.]*\\.(\\d+)\\."),
        std::regex_constants::match_continuous);
  }
  for (const auto& pattern : options.layers_pattern()) {
    found = found ||
        std::regex_search(
                name,
                match,
                std::regex("^(?:.*?\\.)?" + pattern + "\\.(\\d+)\\."),
                std::regex_constants::match_continuous);
    if (found) {
      break;
    }
  }
  if (!found) {
    return false;
  }
  const int64_t index = std::stoll(match[1].str());
  for (const auto layer : options.layers()) {
    if (layer == index) {
      return true;
    }
  }
  return false;
}

/// Whether a module or parameter is a target.
template <class Options>
bool is_wanted(
    const Options& options,
    const std::string& name,
    const Layer& layer) {
  return options.targets().matches(name, layer) &&
      !options.exclude().matches(name, layer) &&
      in_chosen_layers(options, name);
}

/// HF's `bias`: "none", "all" (every bias of the network), or "<method>_only",
/// those of the adapted layers, as trained copies. A layer stands in `adapted`
/// once for each of its adapted parameters.
inline void plan_biases(
    const std::string& bias,
    const Network& network,
    const std::vector<const Layer*>& adapted,
    const std::vector<std::string>& modules_to_save,
    std::vector<PlannedSite>& sites) {
  if (bias == "none") {
    return;
  }
  for (const auto& layer : network) {
    const auto wrappers = std::count(adapted.begin(), adapted.end(), &layer);
    const bool is_adapted = wrappers > 0;
    if ((bias != "all" && !is_adapted) ||
        is_inside(layer.name, modules_to_save)) {
      continue;
    }
    for (const auto& p : layer.parameters) {
      if (p.first == "bias") { // HF's rule: in_proj_bias stays frozen
        PlannedSite site = plan_copy(layer, p.first);
        if (is_adapted) { // under the name that HF's wrappers give it
          site.file_prefix = layer.parent_attention.empty()
              ? layer.path("base_layer")
              : layer.parent_attention + ".base_layer.out_proj.base_layer";
        }
        for (auto i = wrappers; i > 1; --i) { // one for each parameter
          site.file_prefix += ".base_layer";
        }
        sites.push_back(std::move(site));
      }
    }
  }
}

/// The three words that `bias` may be.
inline void check_bias(const std::string& bias, const std::string& only) {
  TORCH_CHECK_VALUE(
      bias == "none" || bias == "all" || bias == only,
      "peft: bias must be 'none', '",
      only,
      "' or 'all', got '",
      bias,
      "'");
}

/// A weight that a tuner changes, and how it lies.
struct TunerWeight {
  const Layer& layer;
  std::string path; // of the parameter
  Tensor weight;
  /// [in, out], as GPT-2's Conv1D and what fan_in_fan_out says.
  bool is_transposed = false;

  int64_t in_features() const {
    return is_transposed
        ? weight.size(0)
        : weight.numel() / std::max<int64_t>(1, out_features());
  }
  int64_t out_features() const {
    return weight.size(is_transposed ? 1 : 0);
  }
  bool is_convolution() const {
    return layer.kind == LayerKind::convolution;
  }
  /// Where a module has one weight, HF's keys name the module.
  const std::string& name() const {
    return path == layer.path("weight") ? layer.name : path;
  }
};

/// What a tuner of HF's adapts.
struct TunerRules {
  const char* method; // for messages
  bool convolutions = false;
  bool embeddings = false;
};

/// The weights that the options name (queries and values by default), in the
/// network's order, tied ones once; an error for a target that the tuner does
/// not know.
template <class Options>
std::vector<TunerWeight> tuner_weights(
    const Options& options,
    const Network& network,
    const TunerRules& rules) {
  for (const auto* targets : {&options.targets(), &options.exclude()}) {
    if (targets->kind() == Targets::Kind::list) {
      check_every_name_matches(
          network,
          targets->names(),
          targets == &options.targets() ? "targets" : "exclude",
          true);
    }
  }
  for (const auto& pattern : options.layers_pattern()) {
    check_regex(pattern, "layers_pattern");
  }
  const bool by_default = options.targets().empty();
  std::vector<TunerWeight> result;
  const auto add = [&](const Layer& layer, const std::string& key) {
    const Tensor weight = layer.parameter(key);
    const std::string path = layer.path(key);
    check_adaptable(weight, path);
    for (const auto& other : result) {
      if (is_tied(other.weight, weight)) {
        return;
      }
    }
    const bool transposed = weight.dim() == 2 &&
        layer.kind == LayerKind::other &&
        (options.fan_in_fan_out() || layer.is_conv1d());
    result.push_back({layer, path, weight, transposed});
  };
  for (const auto& layer : network) {
    if (!layer.name.empty() &&
        is_inside(layer.name, options.modules_to_save())) {
      continue;
    }
    const bool whole = by_default ? is_query_or_value(layer) &&
            !options.exclude().matches(layer.name, layer) &&
            in_chosen_layers(options, layer.name)
                                  : is_wanted(options, layer.name, layer);
    if (!whole) {
      for (const auto& p : layer.parameters) {
        if (!by_default && p.second.dim() == 2 &&
            is_wanted(options, layer.path(p.first), layer)) {
          add(layer, p.first);
        }
      }
      continue;
    }
    const Tensor weight = layer.parameter("weight");
    const bool is_table = layer.kind == LayerKind::embedding;
    const bool fits = layer.refusal.empty() && weight.defined() &&
        (layer.kind == LayerKind::convolution ? rules.convolutions
             : is_table                       ? rules.embeddings
                                              : weight.dim() == 2 &&
                 (layer.kind == LayerKind::linear ||
                  layer.kind == LayerKind::other));
    TORCH_CHECK(
        fits,
        "peft: ",
        rules.method,
        " adapts linear layers",
        rules.convolutions ? ", convolutions" : "",
        rules.embeddings ? ", embeddings" : "",
        ", and single matrices by name; the target '",
        layer.name,
        "' is a ",
        layer.type,
        layer.refusal.empty() ? "" : ": " + layer.refusal);
    add(layer, "weight");
  }
  TORCH_CHECK(
      !result.empty(),
      "peft: the targets match nothing that ",
      rules.method,
      " can adapt",
      by_default
          ? " by default (query and value projections); set targets(...)."
          : ".",
      near_misses(network, "weight"));
  for (const auto index : options.layers()) {
    Options one = options;
    one.layers({index});
    const bool used =
        std::any_of(result.begin(), result.end(), [&](const TunerWeight& w) {
          return in_chosen_layers(one, w.layer.name);
        });
    TORCH_CHECK(
        used, "peft: layers names index ", index, ", where nothing matches");
  }
  return result;
}

/// One delta, `make(weight)`, at each of them, the biases that train and the
/// modules that train whole.
template <class Options, class Make>
std::vector<PlannedSite> plan_tuner(
    const Options& options,
    const Network& network,
    const TunerRules& rules,
    Make&& make,
    const std::string& bias = "none") {
  const c10::InferenceMode off(false);
  std::vector<PlannedSite> sites;
  std::vector<const Layer*> adapted;
  for (const auto& w : tuner_weights(options, network, rules)) {
    adapted.push_back(&w.layer);
    sites.push_back({w.name(), w.path, w.name(), w.weight, make(w)});
  }
  plan_biases(bias, network, adapted, options.modules_to_save(), sites);
  plan_modules_to_save(network, options.modules_to_save(), sites);
  return sites;
}

/// A parameter for `weight`: its device, at least float32; drawn on the CPU, so
/// that a seed gives the same numbers everywhere. As in HF a start has the
/// precision of the weight.
inline Tensor parameter_for(const Tensor& weight, const Tensor& value) {
  return value.to(weight.scalar_type())
      .to(torch::TensorOptions(weight.device()).dtype(adapter_dtype(weight)))
      .set_requires_grad(true);
}

} // namespace detail

} // namespace peft
