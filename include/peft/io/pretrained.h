#pragma once

// An adapter as a folder of two files, in HF PEFT's format:
//
//   adapter_config.json        the method and its options
//   adapter_model.safetensors  "base_model.model." + module + ".lora_A.weight"
//
// What HF writes is read here, and what is written here HF reads. How a method
// stands in the two files is said in a header of its own, io/formats/.

#include <peft/core/adapters.h>
#include <peft/io/adapter_config.h>
#include <peft/io/formats/ada_lora.h>
#include <peft/io/formats/adapter_hub.h>
#include <peft/io/formats/auto_peft.h>
#include <peft/io/formats/beft.h>
#include <peft/io/formats/bitfit.h>
#include <peft/io/formats/bottleneck.h>
#include <peft/io/formats/cartridge.h>
#include <peft/io/formats/coda.h>
#include <peft/io/formats/cpt.h>
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
#include <peft/io/formats/multitask_prompt.h>
#include <peft/io/formats/orthogonal.h>
#include <peft/io/formats/prompt.h>
#include <peft/io/formats/s3_delta.h>
#include <peft/io/formats/shira.h>
#include <peft/io/formats/sparse.h>
#include <peft/io/formats/trainable_tokens.h>
#include <peft/io/formats/union.h>
#include <peft/io/formats/vblora.h>
#include <peft/io/formats/vera.h>
#include <peft/io/plain_lora.h>
#include <peft/io/pretrained/fill.h>
#include <peft/io/pretrained/folders.h>
#include <peft/io/pretrained/training_state.h>
#include <peft/io/pretrained/weights.h>
#include <peft/io/safetensors.h>

#include <c10/util/Exception.h>

#include <algorithm>
#include <deque>
#include <filesystem>
#include <map>
#include <memory>
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
      std::make_shared<VbLoraFormat>(),
      std::make_shared<AdaLoraFormat>(),
      std::make_shared<TrainableTokensFormat>(),
      std::make_shared<BeftFormat>(),
      std::make_shared<ShiraFormat>(),
      std::make_shared<AdapterHubFormat>("HOULSBY"),
      std::make_shared<AdapterHubFormat>("PFEIFFER"),
      std::make_shared<AdapterHubFormat>("PARALLEL_ADAPTER"),
      std::make_shared<HoulsbyFormat>(),
      std::make_shared<PfeifferFormat>(),
      std::make_shared<ParallelAdapterFormat>(),
      std::make_shared<PromptFormat>(),
      std::make_shared<PTuningFormat>(),
      std::make_shared<PrefixFormat>(),
      std::make_shared<MultitaskPromptFormat>(),
      std::make_shared<CptFormat>(),
      std::make_shared<CartridgeFormat>(),
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

/// The format that writes the adapter.
inline const AdapterFormat& format_of(const AdapterState& state) {
  return find_format(
      "adapter '" + state.name + "', a " + state.method + ",",
      [&](const AdapterFormat& f) { return f.writes(state); });
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
  const auto ties =
      adapts_ties_apart(result, network, [&](const PlannedSite& site) {
        return format.moves_ties(config, site, network);
      });
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
  const bool goes_on = fill_training_state(result, weights, folder);
  const auto lost = format.lost_without_training_file(result);
  if (!goes_on && options.is_trainable() && !lost.empty()) {
    TORCH_WARN(
        "peft: '",
        folder,
        "' has no ",
        kTrainingFile,
        ", and training that goes on from it lacks ",
        lost,
        ". Load with is_trainable(false), or copy the file there");
  }
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
/// libpeft_training.safetensors beside them. Files are replaced only when all
/// are complete. Fields of a config that was loaded and that libpeft does not
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
  const auto& format = detail::format_of(state);
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
  std::deque<detail::AtomicFile> files;
  std::vector<std::string> stale{detail::kOptimizerFile};
  const auto path_of = [&](const std::string& name) {
    return (fs::path(folder) / name).string();
  };
  const auto write = [&](const std::string& name,
                         const detail::NamedTensorList& list,
                         const SafetensorsMetadata& notes) {
    files.emplace_back(path_of(name));
    detail::write_safetensors(list, path_of(name), notes, files.back());
  };
  const auto write_or_remove = [&](const std::string& name,
                                   const detail::NamedTensorList& list) {
    if (list.empty()) {
      stale.push_back(name);
    } else {
      write(name, list, {{"format", "pt"}});
    }
  };
  write(format.weight_files().front(), tensors, metadata);
  const auto further = format.further_files();
  for (size_t i = 0; i < further.size(); ++i) {
    write_or_remove(further[i].front(), format.pack_further(state, i));
  }
  write_or_remove(detail::kTrainingFile, training);
  files.emplace_back(path_of(detail::kConfigFile)).write(config.dump());
  for (auto& file : files) {
    file.commit();
  }
  for (const auto& name : stale) { // another adapter's, saved here before
    fs::remove(path_of(name), error);
  }
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

/// load_adapters() for any kind of model; `is_bare`: it has no adapter yet.
template <class Model>
std::vector<Adapter> load_all_onto(
    Model& model,
    const Network& network,
    const std::string& folder,
    bool is_bare,
    const LoadOptions& options) {
  auto folders = adapters_in(folder);
  if (holds_adapter(folder)) {
    TORCH_CHECK(
        folders.count("default") == 0,
        "peft: '",
        folder,
        "' holds an adapter at the top, which is the one named 'default', and "
        "another in its folder 'default'; rename that folder");
    folders["default"] = folder;
  }
  TORCH_CHECK(
      !folders.empty(),
      "peft: '",
      folder,
      "' is no folder that holds ",
      kConfigFile,
      ", and no folder in it does");
  std::vector<Adapter> result;
  try {
    for (const auto& [name, path] : folders) {
      result.push_back(load_onto(model, network, path, name, options));
    }
  } catch (...) {
    while (!result.empty()) {
      result.back().detach();
      result.pop_back();
    }
    throw;
  }
  const std::string first =
      folders.count("default") != 0 ? "default" : folders.begin()->first;
  for (auto& adapter : result) {
    if (!is_bare || adapter.name() != first) {
      adapter.disable();
    }
  }
  return result;
}

} // namespace detail

/// Attaches the adapter that `folder` holds, written by libpeft or by HF PEFT,
/// under `name`. A folder of several (save_adapters, PEFT's save_pretrained)
/// that has none at the top gives the one of that name. All or nothing:
/// missing, unexpected and misshaped keys are one error that lists them, with
/// the names that come near. Parameters of half precision become float32.
inline Adapter load(
    torch::nn::Module& model,
    const std::string& folder,
    const std::string& name = "default",
    const LoadOptions& options = {}) {
  return detail::load_onto(
      model,
      describe_network(model),
      detail::adapter_folder(folder, name),
      name,
      options);
}

/// Writes several adapters, by default all of a model, into one folder as
/// PEFT's save_pretrained does: the one named "default" at the top, each other
/// one in a folder of its name. Other folders in it are left alone.
inline void save_adapters(
    const std::vector<Adapter>& all,
    const std::string& folder) {
  std::map<std::string, Adapter> by_name;
  for (const auto& adapter : all) {
    const auto& name = adapter.name();
    TORCH_CHECK(
        std::filesystem::path(name).filename().string() == name &&
            name.find_first_of("/\\:") == std::string::npos,
        "peft: adapter '",
        name,
        "' cannot be saved among others, its name is none of a folder; "
        "rename_adapter gives it another");
    TORCH_CHECK(
        by_name.emplace(name, adapter).second,
        "peft: two adapters of this model are named '",
        name,
        "'; rename one of them");
    detail::format_of(*adapter.shared_state());
  }
  TORCH_CHECK(!by_name.empty(), "peft: there is no adapter to save");
  for (const auto& [name, adapter] : by_name) {
    const auto own = std::filesystem::path(folder) / name;
    save(adapter, name == "default" ? folder : own.string());
  }
}
inline void save_adapters(
    const torch::nn::Module& model,
    const std::string& folder) {
  save_adapters(adapters(model), folder);
}

/// Attaches every adapter of such a folder: what is at the top as "default",
/// and each folder that has an adapter_config.json under its own name. All or
/// nothing. Where the model had no adapter, "default" (or else the first by
/// name) is active; all others wait, as in PEFT, for set_adapter.
inline std::vector<Adapter> load_adapters(
    torch::nn::Module& model,
    const std::string& folder,
    const LoadOptions& options = {}) {
  return detail::load_all_onto(
      model, describe_network(model), folder, adapters(model).empty(), options);
}

} // namespace peft
