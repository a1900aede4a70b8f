#pragma once

// Houlsby, Pfeiffer and parallel adapters as AdapterHub's library `adapters`
// has them in a folder:
//
//   adapter_config.json      "config" holds the fields of its BnConfig
//   adapter.safetensors      PLACE + ".adapters." + NAME + ".adapter_up.weight"
//   model_head.safetensors   a head that trained along, by its own names
//
// (or pytorch_adapter.bin and pytorch_model_head.bin, which are read; its
// torch.load takes no pickle that LibTorch writes, so ours want
// load_adapter(..., use_safetensors=True)). PLACE is the module that holds the
// adapter there:
//
//   BERT          encoder.layer.0.attention.output, encoder.layer.0.output
//   GPT-2, LLaMA  h.0.attention_adapters, h.0.output_adapters
//   T5            encoder.block.0.layer.0, encoder.block.0.layer.1
//
// Its parallel adapters read what flows past the feed-forward. Where a network
// normalises first, that is not the feed-forward's input, which the paper's
// read, and so libpeft's: there its files are refused, and ours have the form
// of io/formats/bottleneck.h.

#include <peft/io/formats/format.h>
#include <peft/methods/houlsby.h>
#include <peft/methods/parallel_adapter.h>
#include <peft/methods/pfeiffer.h>

#include <algorithm>
#include <any>
#include <cmath>
#include <map>
#include <regex>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// Where adapter-hub keeps the adapter of a module; "" where it has none.
inline std::string hub_place(const std::string& module) {
  static const std::vector<std::pair<std::string, std::string>> ends{
      {".output.dense", ".output"},
      {".output.LayerNorm", ".output"},
      {".attn.c_proj", ".attention_adapters"},
      {".mlp.c_proj", ".output_adapters"},
      {".self_attn.o_proj", ".attention_adapters"},
      {".mlp.down_proj", ".output_adapters"},
      {".SelfAttention.o", ""},
      {".EncDecAttention.o", ""},
      {".DenseReluDense.wo", ""}};
  for (const auto& [end, place] : ends) {
    if (module.size() > end.size() &&
        module.compare(module.size() - end.size(), end.size(), end) == 0) {
      return module.substr(0, module.size() - end.size()) + place;
    }
  }
  return {};
}

/// A key of adapter-hub's: place, the adapter's name, the tensor's name.
struct HubKey {
  std::string place, adapter, tensor;
};

inline std::optional<HubKey> hub_key(const std::string& key) {
  static const std::regex form(
      "(.*)\\.adapters\\.([^.]+)\\.((?:adapter_(?:down|up|norm_before|"
      "norm_after)\\.|scaling$).*)");
  std::smatch match;
  if (!std::regex_match(key, match, form)) {
    return std::nullopt;
  }
  return HubKey{match[1], match[2], match[3]};
}

/// The BnConfig of `adapters` 1.3.0.
inline AdapterConfig hub_defaults() {
  return AdapterConfig::parse(R"({
    "config": {
      "adapter_residual_before_ln": false,
      "cross_adapter": false,
      "dropout": 0.0,
      "factorized_phm_W": true,
      "factorized_phm_rule": false,
      "hypercomplex_nonlinearity": "glorot-uniform",
      "init_weights": "bert",
      "init_weights_seed": null,
      "inv_adapter": null,
      "inv_adapter_reduction_factor": null,
      "is_parallel": false,
      "learn_phm": true,
      "leave_out": [],
      "ln_after": false,
      "ln_before": false,
      "mh_adapter": false,
      "non_linearity": "relu",
      "original_ln_after": true,
      "original_ln_before": false,
      "output_adapter": true,
      "phm_bias": true,
      "phm_c_init": "normal",
      "phm_dim": 4,
      "phm_init_range": 0.0001,
      "phm_layer": false,
      "phm_rank": 1,
      "reduction_factor": 16,
      "residual_before_ln": true,
      "scaling": 1.0,
      "shared_W_phm": false,
      "shared_phm_rule": true,
      "stochastic_depth": 0.0,
      "use_gating": false
    },
    "hidden_size": null,
    "model_class": null,
    "model_name": null,
    "model_type": null,
    "name": null,
    "version": "adapters.1.3.0"
  })");
}

/// Whether every layer of the network ends in a layer norm.
inline bool normalises_last(const Network& network) {
  const auto outputs = layers_in_roles(network, {"output"});
  return !outputs.empty() &&
      std::all_of(outputs.begin(), outputs.end(), [&](const Layer* output) {
        return norm_behind(network, *output) != nullptr;
      });
}

/// Where in adapter-hub's file the adapters of the numbered layers of a
/// network's loops go, in the layers' order.
inline std::vector<std::string> hub_places_of_layers(const Network& network) {
  std::vector<std::string> result;
  for (const Layer* output : layers_in_roles(network, {"output"})) {
    result.push_back(hub_place(output->name));
  }
  return result;
}

/// The network below the module that `adapter` was attached to; empty under
/// TorchScript.
inline Network network_of(const AdapterState& adapter) {
  const auto registry =
      std::dynamic_pointer_cast<Registry>(adapter.registry.lock());
  return registry ? describe_network(*registry->host) : Network{};
}

/// One of the three methods in adapter-hub's files.
class AdapterHubFormat final : public AdapterFormat {
 public:
  explicit AdapterHubFormat(std::string type) : type_(std::move(type)) {}

  std::string type() const override {
    return type_;
  }

  bool reads(const AdapterConfig& config) const override {
    if (!config.has("config") || config.has("peft_type")) {
      return false;
    }
    const auto c = config.section("config");
    const bool is_bottleneck = !c.has("architecture") &&
        c.has("reduction_factor") && c.has("output_adapter");
    return is_bottleneck && type_ == method_of(c);
  }

  /// Only what the fields of a BnConfig can say.
  bool writes(const AdapterState& adapter) const override {
    if (adapter.method != type_) {
      return false;
    }
    const bool loaded_otherwise = !adapter.loaded_config.empty() &&
        !reads(AdapterConfig::parse(adapter.loaded_config));
    if (loaded_otherwise) {
      return false;
    }
    if (const auto* o = std::any_cast<HoulsbyOptions>(&adapter.options)) {
      return !o->train_layer_norms() && o->targets().empty() &&
          has_places(adapter);
    }
    if (const auto* o = std::any_cast<PfeifferOptions>(&adapter.options)) {
      return o->targets().empty() && has_places(adapter);
    }
    const auto& o =
        std::any_cast<const ParallelAdapterOptions&>(adapter.options);
    return o.targets().empty() && o.inputs().empty() && o.bias() &&
        has_places(adapter) && normalises_last(network_of(adapter));
  }

  std::vector<std::string> weight_files() const override {
    return {"adapter.safetensors", "pytorch_adapter.bin"};
  }
  std::vector<std::vector<std::string>> further_files() const override {
    return {{"model_head.safetensors", "pytorch_model_head.bin"}};
  }

  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    const auto c = config.section("config");
    refuse_unsupported(c);
    if (type_ == "HOULSBY") {
      HoulsbyOptions o;
      read_fields(c, o);
      o.train_layer_norms(false);
      o.cross_attention(c.get<bool>("cross_adapter", false));
      return detail::plan(o, network);
    }
    if (type_ == "PFEIFFER") {
      PfeifferOptions o;
      read_fields(c, o);
      return detail::plan(o, network);
    }
    TORCH_CHECK(
        normalises_last(network),
        "peft: a parallel adapter of adapter-hub's reads what flows past the "
        "feed-forward; in this network, which normalises first, that is not "
        "what the feed-forward gets, and libpeft's would compute something "
        "else");
    ParallelAdapterOptions o;
    read_fields(c, o);
    if (c.get<std::variant<double, std::string>>("scaling", 1.0).index() == 0) {
      o.scaling(c.get<double>("scaling", 1.0));
    } else {
      o.learned_scaling(true);
    }
    o.layer_norm(
        c.get<bool>("ln_before", false)      ? "in"
            : c.get<bool>("ln_after", false) ? "out"
                                             : "none");
    o.dropout(c.get<double>("dropout", 0));
    return detail::plan(o, network);
  }

  /// Parameters of the network in the head's file train along.
  void complete(Plan& plan, const Network& network, const NamedTensorMap& file)
      const override {
    std::vector<std::string> modules;
    for (const auto& layer : network) {
      const auto in_file = [&](const auto& p) {
        return file.count(layer.path(p.first)) != 0;
      };
      const auto& own = layer.parameters;
      if (std::any_of(own.begin(), own.end(), in_file)) { // then all of it
        modules.push_back(layer.name);
      }
    }
    plan_modules_to_save(network, modules, plan.sites);
    if (auto* o = std::any_cast<HoulsbyOptions>(&plan.options)) {
      o->modules_to_save(modules);
    } else if (auto* p = std::any_cast<PfeifferOptions>(&plan.options)) {
      p->modules_to_save(modules);
    } else {
      std::any_cast<ParallelAdapterOptions&>(plan.options)
          .modules_to_save(modules);
    }
  }

  AdapterConfig new_config() const override {
    return hub_defaults();
  }

  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    auto c = config.section("config");
    if (type_ == "HOULSBY") {
      const auto& o = std::any_cast<const HoulsbyOptions&>(adapter.options);
      write_fields(adapter, o, c);
      c.set("mh_adapter", true);
      c.set("cross_adapter", o.cross_attention());
    } else if (type_ == "PFEIFFER") {
      write_fields(
          adapter, std::any_cast<const PfeifferOptions&>(adapter.options), c);
      c.set("original_ln_before", true);
    } else {
      const auto& o =
          std::any_cast<const ParallelAdapterOptions&>(adapter.options);
      write_fields(adapter, o, c);
      c.set("is_parallel", true)
          .set("init_weights", std::string("mam_adapter"));
      if (o.learned_scaling()) {
        c.set("scaling", std::string("learned"));
      } else {
        c.set("scaling", o.scaling());
      }
      c.set("ln_before", o.layer_norm() == "in");
      c.set("ln_after", o.layer_norm() == "out");
      c.set("dropout", o.dropout());
    }
    config.set("config", c);
    config.set("hidden_size", bottleneck_of(adapter).options.width());
    config.set("name", adapter.name);
  }

  NamedTensorList pack(const AdapterState& adapter) const override {
    NamedTensorList tensors;
    for (const auto& [place, name, tensor] : tensors_of(adapter)) {
      const std::string front = place + ".adapters." + adapter.name + ".";
      tensors.emplace_back(front + name, tensor.detach());
      // A norm in front is also the first part of adapter_down there.
      const std::string norm = "adapter_norm_before.";
      if (name.compare(0, norm.size(), norm) == 0) {
        tensors.emplace_back(
            front + "adapter_down.0." + name.substr(norm.size()),
            tensor.detach().clone());
      }
    }
    return tensors;
  }

  NamedTensorList pack_further(const AdapterState& adapter, size_t /*file*/)
      const override {
    NamedTensorList head;
    for (const auto& site : adapter.sites) {
      if (site.delta->replaces_base()) {
        for (const auto& item : site.delta->file_tensors()) {
          head.emplace_back(
              file_key(site.file_prefix, item.first),
              site.delta->to_file(item.first, item.second.detach()));
        }
      }
    }
    return head;
  }

  /// A file may come from the network alone or from one with a head, whose
  /// names have one part more: the form that fits the most keys counts.
  NamedTensorMap unpack(const NamedTensorMap& file, const Plan& plan)
      const override {
    std::set<std::string> expected;
    for (const auto& site : plan.sites) {
      for (const auto& item : site.delta->file_tensors()) {
        expected.insert(file_key(site.file_prefix, item.first));
      }
    }
    NamedTensorMap best;
    size_t best_count = 0;
    for (const std::string part :
         {"", "bert.", "roberta.", "transformer.", "model."}) {
      for (const bool add : {false, true}) {
        NamedTensorMap candidate;
        size_t count = 0;
        for (const auto& [key, value] : file) {
          std::string name = key;
          const bool has = key.compare(0, part.size(), part) == 0;
          if (add || has) {
            name = add ? part + key : key.substr(part.size());
          }
          name = translated(name, value, plan);
          if (name.empty()) {
            continue; // the second name of a norm
          }
          if (expected.count(name) == 0 && expected.count(key) != 0) {
            name = key; // a head's
          }
          count += expected.count(name);
          candidate[name] = value;
        }
        if (best.empty() || count > best_count) {
          best = std::move(candidate);
          best_count = count;
        }
      }
    }
    return best;
  }

 private:
  struct PlacedTensor {
    std::string place, name;
    Tensor tensor;
  };

  static std::string method_of(const AdapterConfig& c) {
    if (c.get<bool>("is_parallel", false)) {
      return "PARALLEL_ADAPTER";
    }
    return c.get<bool>("original_ln_before", false) ? "PFEIFFER" : "HOULSBY";
  }

  /// Fields that change the function in ways that libpeft does not have.
  void refuse_unsupported(const AdapterConfig& c) const {
    const auto refuse = [&](bool good, const std::string& field) {
      TORCH_CHECK(
          good,
          "peft: \"",
          field,
          "\" in ",
          kConfigFile,
          " makes this adapter something that this version of libpeft does not "
          "have");
    };
    for (const char* field : {"phm_layer", "use_gating"}) {
      refuse(!c.get<bool>(field, false), field);
    }
    refuse(c.is_empty("inv_adapter"), "inv_adapter");
    refuse(c.get<double>("stochastic_depth", 0) == 0, "stochastic_depth");
    refuse(c.get<bool>("original_ln_after", true), "original_ln_after");
    refuse(c.get<bool>("output_adapter", true), "output_adapter");
    const bool mh = c.get<bool>("mh_adapter", false);
    refuse(mh == (type_ == "HOULSBY"), "mh_adapter");
    refuse(
        type_ == "HOULSBY" || !c.get<bool>("cross_adapter", false),
        "cross_adapter");
    const bool numeric = std::holds_alternative<double>(
        c.get<std::variant<double, std::map<std::string, double>>>(
            "reduction_factor"));
    refuse(numeric, "reduction_factor");
    const auto scaling =
        c.get<std::variant<double, std::string>>("scaling", 1.0);
    if (type_ == "PARALLEL_ADAPTER") {
      const auto* word = std::get_if<std::string>(&scaling);
      refuse(word == nullptr || *word == "learned", "scaling");
      refuse(
          !c.get<bool>("ln_before", false) || !c.get<bool>("ln_after", false),
          "ln_after");
      return;
    }
    const auto* factor = std::get_if<double>(&scaling);
    refuse(factor != nullptr && *factor == 1.0, "scaling");
    refuse(c.get<double>("dropout", 0) == 0, "dropout");
    refuse(!c.get<bool>("ln_before", false), "ln_before");
    refuse(!c.get<bool>("ln_after", false), "ln_after");
    if (type_ == "PFEIFFER") {
      const auto residual =
          c.get<std::variant<bool, std::string>>("residual_before_ln", true);
      const auto* on = std::get_if<bool>(&residual);
      refuse(on != nullptr && *on, "residual_before_ln");
    }
  }

  template <class Options>
  static void read_fields(const AdapterConfig& c, Options& o) {
    o.reduction_factor(c.get<double>("reduction_factor"));
    std::string g = c.get<std::string>("non_linearity");
    std::transform(g.begin(), g.end(), g.begin(), [](unsigned char letter) {
      return static_cast<char>(std::tolower(letter));
    });
    o.non_linearity(g == "leakyrelu" ? "leaky_relu" : g);
    o.leave_out(c.get<std::vector<int64_t>>("leave_out", {}));
  }

  template <class Options>
  static void write_fields(
      const AdapterState& adapter,
      const Options& o,
      AdapterConfig& c) {
    const auto& a = bottleneck_of(adapter).options;
    const auto d = static_cast<double>(a.width());
    // It takes floor(d / factor): half a feature more rounds to r for sure.
    const bool divides = a.width() % a.bottleneck() == 0;
    const auto r = static_cast<double>(a.bottleneck());
    c.set_number(
        "reduction_factor",
        o.reduction_factor() ? *o.reduction_factor()
            : divides        ? d / r
                             : d / (r + 0.5));
    c.set(
        "non_linearity",
        o.non_linearity() == "leaky_relu" ? std::string("leakyrelu")
                                          : o.non_linearity());
    c.set("leave_out", o.leave_out());
    c.set("output_adapter", true);
  }

  static const BottleneckImpl& bottleneck_of(const AdapterState& adapter) {
    for (const auto& site : adapter.sites) {
      for (const auto& child : site.delta->children()) {
        if (const auto* a = child->as<BottleneckImpl>()) {
          return *a;
        }
      }
    }
    TORCH_INTERNAL_ASSERT(false);
  }

  /// Every tensor of a bottleneck with its place; "" where there is none.
  static std::vector<PlacedTensor> tensors_of(const AdapterState& adapter) {
    std::vector<PlacedTensor> result;
    std::vector<std::string> layers; // of all loops, in order
    for (const auto& site : adapter.sites) {
      if (site.delta->replaces_base()) {
        continue;
      }
      const auto* loop =
          dynamic_cast<const PfeifferLoopDelta*>(site.delta.get());
      if (loop != nullptr && layers.empty()) {
        layers = hub_places_of_layers(network_of(adapter));
      }
      for (const auto& item : site.delta->file_tensors()) {
        if (loop == nullptr) {
          result.push_back(
              {hub_place(site.file_prefix), item.first, item.second});
          continue;
        }
        const auto dot = item.first.find('.');
        const auto layer = static_cast<size_t>(
            loop->first() + std::stoll(item.first.substr(0, dot)));
        result.push_back(
            {layer < layers.size() ? layers[layer] : "",
             item.first.substr(dot + 1),
             item.second});
      }
    }
    return result;
  }

  static bool has_places(const AdapterState& adapter) {
    const auto all = tensors_of(adapter);
    return !all.empty() && std::all_of(all.begin(), all.end(), [](auto& each) {
      return !each.place.empty();
    });
  }

  /// A key of the file as file_key has it; "" for a tensor that stands twice.
  static std::string
  translated(const std::string& key, const Tensor& value, const Plan& plan) {
    const auto hub = hub_key(key);
    if (!hub) {
      return key;
    }
    for (const auto& site : plan.sites) {
      const auto* loop =
          dynamic_cast<const PfeifferLoopDelta*>(site.delta.get());
      if (loop == nullptr && hub_place(site.file_prefix) == hub->place) {
        const bool norm_again =
            hub->tensor.compare(0, 15, "adapter_down.0.") == 0 &&
            value.dim() == 1 && has_tensor(*site.delta, "adapter_norm_before");
        return norm_again ? "" : file_key(site.file_prefix, hub->tensor);
      }
      if (loop != nullptr) { // beside the loop: its list, and the layer in it
        const auto dot = site.name.rfind('.');
        const std::string parent =
            dot == std::string::npos ? "" : site.name.substr(0, dot + 1);
        static const std::regex in_list("[^.]+\\.(\\d+)(\\..*)?");
        const std::string rest =
            hub->place.compare(0, parent.size(), parent) == 0
            ? hub->place.substr(parent.size())
            : "";
        std::smatch match;
        if (std::regex_match(rest, match, in_list)) {
          return file_key(site.file_prefix, match[1].str() + "." + hub->tensor);
        }
      }
    }
    return key;
  }

  static bool has_tensor(const Delta& delta, const std::string& start) {
    for (const auto& item : delta.file_tensors()) {
      if (item.first.compare(0, start.size(), start) == 0) {
        return true;
      }
    }
    return false;
  }

  std::string type_;
};

} // namespace detail

} // namespace peft
