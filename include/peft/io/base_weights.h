#pragma once

#include <peft/core/adapted_weight.h>
#include <peft/core/network.h>
#include <peft/io/json.h>
#include <peft/io/safetensors.h>

#include <c10/core/InferenceMode.h>
#include <torch/arg.h>
#include <torch/nn/module.h>
#include <torch/serialize/input-archive.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <regex>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace peft {

/// How `load_base` matches a file with a model.
///
///     BaseWeightsOptions()
///         .ignore_extra({"position_ids", "pooler\\..*"})
///         .rename([](const std::string& name) { return "bert." + name; });
///
/// An entry of the two lists stands for the names that are it, that end with
/// "." and it, or that match it, as a whole, as a regular expression.
struct BaseWeightsOptions {
  /// Names of the model that need not be in the file; they keep their values.
  TORCH_ARG(std::vector<std::string>, ignore_missing) = {};
  /// Names of the file (after `rename`) that the model need not have.
  TORCH_ARG(std::vector<std::string>, ignore_extra) = {};
  /// From a name in the file to the model's; "" leaves the tensor out.
  TORCH_ARG(std::function<std::string(const std::string&)>, rename) = {};
  /// false allows every missing and every extra name. Wrong shapes and types
  /// stay errors.
  TORCH_ARG(bool, strict) = true;
};

/// What `load_base` did, by the model's names.
struct BaseWeightsReport {
  std::vector<std::string> loaded;
  std::vector<std::string> missing;
  std::vector<std::string> extra;
};

namespace detail {

/// The rule of `BaseWeightsOptions`' lists.
class NameList {
 public:
  explicit NameList(const std::vector<std::string>& entries)
      : entries_(entries) {
    for (const auto& entry : entries) {
      try {
        patterns_.emplace_back(entry);
      } catch (const std::regex_error& error) {
        TORCH_CHECK(
            false,
            "peft: \"",
            entry,
            "\" is not a regular expression: ",
            error.what());
      }
    }
  }

  bool matches(const std::string& name) const {
    for (size_t i = 0; i < entries_.size(); ++i) {
      const auto suffix = '.' + entries_[i];
      const bool ends_with = name.size() >= suffix.size() &&
          name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0;
      if (name == entries_[i] || ends_with ||
          std::regex_match(name, patterns_[i])) {
        return true;
      }
    }
    return false;
  }

 private:
  std::vector<std::string> entries_;
  std::vector<std::regex> patterns_;
};

/// "\n  title (3):\n    a\n    b\n    c", cut after twenty lines; "" for none.
inline std::string list_problems(
    const std::string& title,
    const std::vector<std::string>& lines) {
  constexpr size_t most = 20;
  if (lines.empty()) {
    return "";
  }
  std::string text = fmt::format("\n  {} ({}):", title, lines.size());
  for (size_t i = 0; i < std::min(most, lines.size()); ++i) {
    text += "\n    " + lines[i];
  }
  if (lines.size() > most) {
    text += fmt::format("\n    ... and {} more", lines.size() - most);
  }
  return text;
}

using NamedTensors = std::map<std::string, torch::Tensor>;

/// The tensors of a sharded checkpoint, `*.safetensors.index.json`.
inline NamedTensors read_sharded(const std::string& path) {
  const auto index = read_json(path);
  const std::string cannot = "peft: cannot read \"" + path + "\": ";
  TORCH_CHECK(
      index.is_object() && index.contains("weight_map") &&
          index["weight_map"].is_object(),
      cannot,
      "it has no object \"weight_map\"");

  std::map<std::string, std::set<std::string>> names_by_shard;
  for (const auto& item : index["weight_map"].items()) {
    TORCH_CHECK(
        item.value().is_string(),
        cannot,
        "weight_map gives tensor \"",
        item.key(),
        "\" no file name");
    names_by_shard[item.value().get<std::string>()].insert(item.key());
  }

  NamedTensors tensors;
  std::vector<std::string> absent;
  std::vector<std::string> unlisted;
  for (const auto& [shard, names] : names_by_shard) {
    // A name alone can neither leave the folder nor be absolute.
    TORCH_CHECK(
        !shard.empty() && shard != "." && shard != ".." &&
            shard.find_first_of(std::string("/\\:\0", 4)) == std::string::npos,
        cannot,
        "the shard ",
        StrictJsonBuilder::quoted(shard),
        " is not a plain file name");
    const auto shard_path = std::filesystem::path(path).parent_path() / shard;
    TORCH_CHECK(
        std::filesystem::exists(shard_path),
        cannot,
        "the shard \"",
        shard,
        "\" is missing, which should hold ",
        names.size(),
        " tensors");
    for (auto& [name, tensor] : load_safetensors(shard_path.string())) {
      if (names.count(name) == 0) {
        unlisted.push_back(name + " in " + shard);
      }
      tensors.emplace(name, tensor);
    }
    for (const auto& name : names) {
      if (tensors.count(name) == 0) {
        absent.push_back(name + " in " + shard);
      }
    }
  }
  TORCH_CHECK(
      absent.empty() && unlisted.empty(),
      cannot,
      "the index and the shards disagree",
      list_problems("not in the shard that the index gives", absent),
      list_problems("in a shard, but not in the index", unlisted));
  return tensors;
}

inline void read_archive_into(
    torch::serialize::InputArchive& archive,
    const std::string& prefix,
    NamedTensors& tensors) {
  for (const auto& key : archive.keys()) {
    c10::IValue value;
    archive.read(key, value);
    if (value.isTensor()) {
      if (value.toTensor().defined()) {
        tensors.emplace(prefix + key, value.toTensor());
      }
    } else if (value.isModule()) {
      torch::serialize::InputArchive child;
      archive.read(key, child);
      read_archive_into(child, prefix + key + '.', tensors);
    }
  }
}

/// The tensors of what `torch::save(model, path)` wrote, or of a TorchScript
/// module, by the names of its parameters and buffers.
inline NamedTensors read_archive(const std::string& path) {
  NamedTensors tensors;
  try {
    torch::serialize::InputArchive archive;
    archive.load_from(path, torch::Device(torch::kCPU));
    read_archive_into(archive, "", tensors);
  } catch (const c10::Error& error) {
    TORCH_CHECK(
        false,
        "peft: cannot read \"",
        path,
        "\" as what torch::save(model) or torch::jit::save wrote (a state "
        "dict saved from Python is not one; convert it to safetensors): ",
        error.what_without_backtrace());
  }
  return tensors;
}

/// The tensors of a safetensors file, an index of shards, a folder with either,
/// or an archive.
inline NamedTensors read_weights(const std::string& path) {
  namespace fs = std::filesystem;
  if (fs::is_directory(path)) {
    for (const char* name :
         {"model.safetensors", "model.safetensors.index.json"}) {
      const auto inside = fs::path(path) / name;
      if (fs::exists(inside)) {
        return read_weights(inside.string());
      }
    }
    TORCH_CHECK(
        false,
        "peft: the folder \"",
        path,
        "\" holds neither "
        "model.safetensors nor model.safetensors.index.json");
  }
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "peft: cannot open \"", path, "\"");
  std::string start(4, '\0');
  file.read(start.data(), 4);
  if (start == "PK\x03\x04") {
    return read_archive(path);
  }
  return fs::path(path).extension() == ".json" ? read_sharded(path)
                                               : load_safetensors(path);
}

/// Why `value` cannot be copied into the model's `target`; "" when it can.
inline std::string why_not_copy(
    const torch::Tensor& target,
    const torch::Tensor& value) {
  if (target.sizes() != value.sizes()) {
    return c10::str(
        "the file has ", value.sizes(), ", the model ", target.sizes());
  }
  // PyTorch's own rule: real to whole numbers, say, would lose what they hold.
  if (!c10::canCast(value.scalar_type(), target.scalar_type())) {
    return c10::str(
        "the file has ",
        value.scalar_type(),
        ", the model ",
        target.scalar_type());
  }
  if (target.is_meta()) {
    return "the model's tensor is on the meta device, without data";
  }
  const auto* adapted = tag_of(target);
  if (adapted != nullptr && !adapted->site->merge_order.empty()) {
    return "adapter '" + adapted->site->merge_order.back()->name +
        "' is merged into it; unmerge() first";
  }
  if (target.is_inference() && !c10::InferenceMode::is_enabled()) {
    return "the model's tensor was made in inference mode";
  }
  return "";
}

/// Equal for tensors that are one piece of memory seen in one way: tied ones.
using Memory = std::tuple<const void*, int64_t, std::vector<int64_t>>;

inline Memory memory_of(const torch::Tensor& tensor) {
  if (!tensor.has_storage()) {
    return {tensor.unsafeGetTensorImpl(), 0, {}};
  }
  return {
      tensor.storage().unsafeGetStorageImpl(),
      tensor.storage_offset(),
      tensor.sizes().vec()};
}

} // namespace detail

/// Fills a model's own parameters and buffers from a file, by name. Adapters
/// that are attached stay as they are.
///
/// `path` is a safetensors file, an index of shards
/// (`model.safetensors.index.json`), a folder that holds either, or what
/// `torch::save(model, path)` or `torch::jit::save` wrote. Names are those of
/// `named_parameters()` and `named_buffers()`; of tied ones, one suffices.
/// The model's tensors keep their dtype, device and `requires_grad`.
///
/// Missing, extra and misshaped names are one error that lists them, thrown
/// before anything is written.
inline BaseWeightsReport load_base(
    torch::nn::Module& model,
    const std::string& path,
    const BaseWeightsOptions& options = {}) {
  torch::NoGradGuard no_grad;
  const detail::NameList ignore_missing(options.ignore_missing());
  const detail::NameList ignore_extra(options.ignore_extra());

  // The adapters' own tensors are left out; an assigned member counts, not the
  // tensor that it replaced.
  detail::NamedTensors targets;
  for (const auto& [name, tensor] : detail::base_parameters(model)) {
    if (tensor.defined()) {
      targets.emplace(name, tensor);
    }
  }
  detail::walk(
      model, "", [&](const std::string& name, torch::nn::Module& module) {
        const auto prefix = name.empty() ? name : name + '.';
        for (const auto& item : module.named_buffers(/*recurse=*/false)) {
          if (item.value().defined()) {
            targets.emplace(prefix + item.key(), item.value());
          }
        }
      });

  BaseWeightsReport report;
  std::vector<std::string> extra, missing, misfits, disagreeing;
  std::map<std::string, std::string> name_in_file;
  std::map<std::string, torch::Tensor> values;
  std::map<detail::Memory, std::string> loaded_as;
  for (const auto& [original, value] : detail::read_weights(path)) {
    const auto name = options.rename() ? options.rename()(original) : original;
    if (name.empty()) {
      continue;
    }
    TORCH_CHECK(
        name_in_file.emplace(name, original).second,
        "peft: rename gives \"",
        name_in_file.at(name),
        "\" and \"",
        original,
        "\" in \"",
        path,
        "\" the same name, \"",
        name,
        '"');
    const auto target = targets.find(name);
    if (target == targets.end()) {
      report.extra.push_back(name);
      if (options.strict() && !ignore_extra.matches(name)) {
        extra.push_back(name);
      }
      continue;
    }
    const auto misfit = detail::why_not_copy(target->second, value);
    if (!misfit.empty()) {
      misfits.push_back(name + ": " + misfit);
    }
    const auto [tied, is_first] =
        loaded_as.emplace(detail::memory_of(target->second), name);
    if (!is_first && misfit.empty()) {
      const auto dtype = target->second.scalar_type();
      if (!torch::equal(values.at(tied->second).to(dtype), value.to(dtype))) {
        disagreeing.push_back(tied->second + " and " + name);
      }
    }
    values.emplace(name, value);
    report.loaded.push_back(name);
  }
  for (const auto& [name, target] : targets) {
    if (loaded_as.count(detail::memory_of(target)) == 0) {
      report.missing.push_back(name);
      if (options.strict() && !ignore_missing.matches(name)) {
        missing.push_back(name);
      }
    }
  }

  TORCH_CHECK(
      extra.empty() && missing.empty() && misfits.empty() &&
          disagreeing.empty(),
      "peft: \"",
      path,
      "\" does not fit the model; nothing was loaded.",
      detail::list_problems("cannot be filled", misfits),
      detail::list_problems("missing from the file", missing),
      detail::list_problems("extra in the file", extra),
      detail::list_problems(
          "tied in the model, unequal in the file", disagreeing),
      "\nBaseWeightsOptions can rename, ignore_missing and ignore_extra.");
  TORCH_CHECK(
      targets.empty() || !values.empty(),
      "peft: no name in \"",
      path,
      "\" is in the model; it has names such as \"",
      targets.begin()->first,
      "\", the file ",
      report.extra.empty() ? std::string("none")
                           : "such as \"" + report.extra.front() + '"',
      ". BaseWeightsOptions can rename.");

  for (const auto& [name, value] : values) {
    targets.at(name).copy_(value);
  }
  return report;
}

} // namespace peft
