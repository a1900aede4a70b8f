#pragma once

// An adapter as a folder of two files, in HF PEFT's format:
//
//   adapter_config.json        the method and its options
//   adapter_model.safetensors  "base_model.model." + module + ".lora_A.weight"
//
// What HF writes is read here, and what is written here HF reads. How a method
// stands in the two files is said in a header of its own, io/formats/.

#include <peft/core/attach.h>
#include <peft/io/adapter_config.h>
#include <peft/io/formats/ada_lora.h>
#include <peft/io/formats/adapter_hub.h>
#include <peft/io/formats/auto_peft.h>
#include <peft/io/formats/beft.h>
#include <peft/io/formats/bitfit.h>
#include <peft/io/formats/bottleneck.h>
#include <peft/io/formats/coda.h>
#include <peft/io/formats/format.h>
#include <peft/io/formats/fourier_ft.h>
#include <peft/io/formats/ia3.h>
#include <peft/io/formats/intrinsic.h>
#include <peft/io/formats/krona.h>
#include <peft/io/formats/ladder.h>
#include <peft/io/formats/layer_norm.h>
#include <peft/io/formats/llm_adapters.h>
#include <peft/io/formats/lora.h>
#include <peft/io/formats/lycoris.h>
#include <peft/io/formats/masked.h>
#include <peft/io/formats/masked_adapter.h>
#include <peft/io/formats/orthogonal.h>
#include <peft/io/formats/prompt.h>
#include <peft/io/formats/s3_delta.h>
#include <peft/io/formats/sparse.h>
#include <peft/io/formats/trainable_tokens.h>
#include <peft/io/formats/union.h>
#include <peft/io/formats/vera.h>
#include <peft/io/plain_lora.h>
#include <peft/io/safetensors.h>

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

/// The tensors of a folder, from the first of `files` that it has;
/// `adapts_ties` says whether the writer adapted tied weights as the one tensor
/// they are, which PEFT does not.
inline NamedTensorMap read_adapter_weights(
    const std::string& folder,
    const std::vector<std::string>& files,
    bool& adapts_ties,
    bool required = true) {
  namespace fs = std::filesystem;
  std::string names;
  for (const auto& name : files) {
    names += (names.empty() ? "" : ", ") + name;
    const auto path = fs::path(folder) / name;
    if (!fs::exists(path)) {
      continue;
    }
    if (path.extension() != ".safetensors") {
      return read_pickle(path.string());
    }
    const auto file = SafetensorsFile::open(path.string());
    adapts_ties = file.metadata().count(kTiesMark) != 0;
    return load_safetensors(file);
  }
  TORCH_CHECK(
      !required, "peft: '", folder, "' holds no weights; looked for ", names);
  return {};
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
      if (path != site.parameter && is_tied(p->second, site.tensor)) {
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
      const auto misfit =
          item.delta->from_file(item.name, found->second, dry_run);
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
      !strict || missing.empty()
          ? ""
          : "\n  missing from the file:" + listed(missing),
      !strict || extra.empty() ? ""
                               : "\n  unexpected in the file:" + listed(extra));
  each(/*dry_run=*/false);
}

/// Every method that has files, a header of io/formats/ each.
inline const std::vector<std::shared_ptr<const AdapterFormat>>& formats() {
  static const std::vector<std::shared_ptr<const AdapterFormat>> all{
      std::make_shared<MaskedFormat>(&formats),
      std::make_shared<LoraFormat>(),
      std::make_shared<BitFitFormat>(),
      std::make_shared<LayerNormFormat>(),
      std::make_shared<FishFormat>(),
      std::make_shared<ChildTuningFormat>(),
      std::make_shared<Ia3Format>(),
      std::make_shared<KronaFormat>(),
      std::make_shared<IntrinsicFormat>(),
      std::make_shared<LoHaFormat>(),
      std::make_shared<LoKrFormat>(),
      std::make_shared<HraFormat>(),
      std::make_shared<OftFormat>(),
      std::make_shared<BoftFormat>(),
      std::make_shared<FourierFtFormat>(),
      std::make_shared<VeraFormat>(),
      std::make_shared<AdaLoraFormat>(),
      std::make_shared<TrainableTokensFormat>(),
      std::make_shared<BeftFormat>(),
      std::make_shared<AdapterHubFormat>("HOULSBY"),
      std::make_shared<AdapterHubFormat>("PFEIFFER"),
      std::make_shared<AdapterHubFormat>("PARALLEL_ADAPTER"),
      std::make_shared<HoulsbyFormat>(),
      std::make_shared<PfeifferFormat>(),
      std::make_shared<ParallelAdapterFormat>(),
      std::make_shared<PromptFormat>(),
      std::make_shared<PTuningFormat>(),
      std::make_shared<PrefixFormat>(),
      std::make_shared<CodaFormat>(),
      std::make_shared<LadderFormat>(),
      std::make_shared<SparseFormat>(),
      std::make_shared<FullTuningFormat>(),
      std::make_shared<LinearBottleneckFormat>(),
      std::make_shared<GatedFormat>(&formats),
      std::make_shared<ScaledFormat>(&formats),
      std::make_shared<S3DeltaFormat>(&formats),
      std::make_shared<AutoPeftFormat>(&formats),
      std::make_shared<UnionFormat>(&formats),
  };
  return all;
}

/// The format that `fits` says yes to; `what` is asked about.
template <class Fits>
const AdapterFormat& find_format(const std::string& what, Fits&& fits) {
  std::string known;
  for (const auto& format : formats()) {
    if (fits(*format)) {
      return *format;
    }
    if (known.find(format->type()) == std::string::npos) {
      known += (known.empty() ? "" : ", ") + format->type();
    }
  }
  TORCH_CHECK(
      false,
      "peft: ",
      what,
      " is of no method that this version of libpeft reads or writes (it knows "
      "the peft_types ",
      known,
      ")");
  return *formats().front();
}

/// What the adapter trains and the weights file drops (the network that makes
/// the virtual tokens, say).
inline NamedTensorList training_state(const AdapterState& adapter) {
  NamedTensorList result;
  for (const auto& site : adapter.sites) {
    for (const auto& item : site.delta->all_training_tensors()) {
      result.emplace_back(
          file_key(site.file_prefix, item.first), item.second.detach());
    }
  }
  return result;
}

/// Whether what a delta makes of its state is what the weights file holds.
inline bool makes_the_same(const Tensor& made, const Tensor& stored) {
  const Tensor x = made.detach().to(at::kCPU, at::kDouble);
  const Tensor y = stored.to(at::kCPU, at::kDouble);
  return x.sizes() == y.sizes() &&
      (x.numel() == 0 ||
       (x - y).abs().max().item<double>() <=
           1e-3 * y.abs().max().item<double>());
}

/// Takes that up again where the folder has it; all of it, or nothing.
/// `weights` are those of the weights file.
inline void fill_training_state(
    Plan& plan,
    const NamedTensorMap& weights,
    const std::string& folder) {
  const auto path = std::filesystem::path(folder) / kTrainingFile;
  if (!std::filesystem::exists(path)) {
    return;
  }
  const auto tensors = load_safetensors(path.string());
  for (const bool dry_run : {true, false}) {
    for (auto& site : plan.sites) {
      for (const auto& item : site.delta->all_training_tensors()) {
        const auto found = tensors.find(file_key(site.file_prefix, item.first));
        TORCH_CHECK(
            found != tensors.end(),
            "peft: '",
            path.string(),
            "' lacks '",
            file_key(site.file_prefix, item.first),
            "'; remove the file to go on without the state of training");
        const auto misfit =
            site.delta->from_file(item.first, found->second, dry_run);
        TORCH_CHECK(
            misfit.empty(),
            "peft: '",
            found->first,
            "' in '",
            path.string(),
            "': ",
            misfit);
      }
    }
  }
  for (auto& site : plan.sites) {
    for (const auto& item : site.delta->all_file_tensors()) {
      const auto key = file_key(site.file_prefix, item.first);
      const auto found = weights.find(key);
      TORCH_CHECK(
          found == weights.end() ||
              makes_the_same(
                  site.delta->to_file(item.first, item.second), found->second),
          "peft: '",
          path.string(),
          "' does not belong to the weights beside it, it makes another '",
          key,
          "'; one of the two was replaced. Remove the file to go on from the "
          "weights alone");
    }
  }
}

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
  auto config = AdapterConfig::read(path);
  // HF's word for the network behind virtual tokens, which is built again to
  // train on.
  if (config.has("peft_type")) {
    config.set(
        "inference_mode",
        !options.is_trainable() ||
            !fs::exists(fs::path(folder) / kTrainingFile));
  }
  const auto& format = find_format(
      config.has("peft_type")
          ? "'" + path + "', of peft_type '" + config.peft_type() + "',"
          : "'" + path + "', without a peft_type,",
      [&](const AdapterFormat& f) { return f.reads(config); });
  Plan result = format.plan(config, network);
  bool adapts_ties = false;
  auto tensors =
      read_adapter_weights(folder, format.weight_files(), adapts_ties);
  for (const auto& names : format.further_files()) {
    bool unused = false;
    tensors.merge(
        read_adapter_weights(folder, names, unused, /*required=*/false));
  }
  format.complete(result, network, tensors);
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
  const auto weights = format.unpack(tensors, result);
  fill_plan(result, weights, folder, options.strict());
  fill_training_state(result, weights, folder);
  for (auto& site : result.sites) {
    for (auto& p : site.delta->parameters()) {
      p.set_requires_grad(options.is_trainable());
    }
  }
  config_text = config.dump();
  return result;
}

} // namespace detail

/// Options for save.
struct SaveOptions {
  /// A LoRA that started as PiSSA or OLoRA is written as a plain LoRA of twice
  /// the rank, A' = [A; A0] and B' = [B, -B0], which any reader of LoRA can put
  /// on the base as it is, beside others, and which needs no decomposition to
  /// be read (HF's path_initial_model_for_weight_conversion, without a second
  /// folder). The adapter itself stays as it is. Plain LoRA is written as ever.
  TORCH_ARG(bool, convert_to_plain_lora) = false;
};

/// Writes adapter_config.json and adapter_model.safetensors into `folder`,
/// which is made if need be; HF PEFT's from_pretrained reads the methods that
/// it has. What such a file has no place for and training needs goes into
/// libpeft_training.safetensors beside them. Each file is replaced only when it
/// is complete. Fields of a config that was loaded and that libpeft does not
/// know are written again.
inline void save(
    const Adapter& adapter,
    const std::string& folder,
    const SaveOptions& options = {}) {
  adapter.name(); // an empty or detached handle is an error
  const auto plain = options.convert_to_plain_lora()
      ? detail::as_plain_lora(*adapter.shared_state())
      : nullptr;
  const detail::AdapterState& state = plain ? *plain : *adapter.shared_state();
  const auto& format = detail::find_format(
      "adapter '" + state.name + "', a " + state.method + ",",
      [&](const detail::AdapterFormat& f) { return f.writes(state); });
  AdapterConfig config = state.loaded_config.empty()
      ? format.new_config()
      : AdapterConfig::parse(state.loaded_config);
  format.write(state, config);
  if (config.has("peft_type")) { // a field of HF's
    config.set("inference_mode", true);
  }

  const auto tensors = format.pack(state);
  const auto training = detail::training_state(state);
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
      tensors,
      (fs::path(folder) / format.weight_files().front()).string(),
      metadata);
  const auto further = format.further_files();
  for (size_t i = 0; i < further.size(); ++i) {
    const auto more = format.pack_further(state, i);
    const auto path = fs::path(folder) / further[i].front();
    if (more.empty()) {
      fs::remove(path, error); // another adapter's, saved here before
    } else {
      save_safetensors(more, path.string(), {{"format", "pt"}});
    }
  }
  const auto side = fs::path(folder) / detail::kTrainingFile;
  if (training.empty()) {
    fs::remove(side, error); // another adapter's, saved here before
  } else {
    save_safetensors(training, side.string(), {{"format", "pt"}});
  }
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
