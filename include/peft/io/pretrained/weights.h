#pragma once

// The weights of an adapter's folder: adapter_model.safetensors, or the
// adapter_model.bin of older PEFT.

#include <peft/io/formats/format.h>
#include <peft/io/safetensors.h>

#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/jit/serialization/import_read.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace peft {

namespace detail {

/// In the metadata of a file whose tied weights are adapted as one tensor.
inline const std::string kTiesMark = "libpeft_ties";

/// Why torch.save's reader fails on a file, in words: `error` is what it said.
inline std::string pickle_problem(
    const std::string& path,
    const std::string& error) {
  char start[2] = {};
  std::ifstream(path, std::ios::binary).read(start, 2);
  if (start[0] == '\x80') {
    return "it has the format that torch.save had before torch 1.6";
  }
  if (start[0] != 'P' || start[1] != 'K') {
    return "it is no archive of torch.save's";
  }
  if (error.find("zip archive") != std::string::npos) {
    return "the archive is damaged or cut off";
  }
  if (error.find("isGenericDict") != std::string::npos) {
    return "it holds an OrderedDict or another object, where PEFT writes a "
           "plain dict";
  }
  return error.substr(0, std::min<size_t>(120, error.find('\n')));
}

/// The tensors of adapter_model.bin, a pickled dict of tensors as torch.save
/// writes it since torch 1.6; all on the CPU, wherever they were saved. The
/// unpickler makes tensors and plain values only: nothing in a file is run.
inline NamedTensorMap read_pickle(const std::string& path) {
  c10::IValue value;
  try {
    caffe2::serialize::PyTorchStreamReader reader(path);
    value = torch::jit::readArchiveAndTensors(
        /*archive_name=*/"data",
        /*pickle_prefix=*/"",
        /*tensor_prefix=*/"",
        /*type_resolver=*/std::nullopt,
        /*obj_loader=*/std::nullopt,
        torch::Device(at::kCPU),
        reader);
  } catch (const std::exception& error) {
    TORCH_CHECK(
        false,
        "peft: '",
        path,
        "' is not a pickled dict of tensors: ",
        pickle_problem(path, error.what()),
        ". In Python, save_file(dict(torch.load('adapter_model.bin')), "
        "'adapter_model.safetensors') of safetensors.torch makes a file that "
        "is read");
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
        "' holds something other than named tensors",
        item.key().isString() ? ", '" + item.key().toStringRef() + "'" : "");
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

} // namespace detail

} // namespace peft
