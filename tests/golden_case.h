#pragma once

// A case of golden/data that HF PEFT wrote (golden/README.md), and what is
// checked of it.

#include "test.h"

#include "adapter_files.h"
#include "networks.h"

#include <cstdlib>
#include <fstream>
#include <map>
#include <set>

namespace golden_case {

namespace fs = std::filesystem;
using adapter_files::as_read;
using adapter_files::find;
using adapter_files::json;
using adapter_files::prefix;
using adapter_files::TensorMap;
using torch::Tensor;

inline json read_json_file(const fs::path& path) {
  std::ifstream file(path);
  REQUIRE(file.good());
  return json::parse(file);
}

/// The config in an adapter's folder.
inline json config_of(const fs::path& folder) {
  return read_json_file(folder / "adapter_config.json");
}

/// While it lives, dropout draws torch's own mask.
struct TorchDropout {
  TorchDropout() {
    peft::functional::detail::torch_dropout = true;
  }
  ~TorchDropout() {
    peft::functional::detail::torch_dropout = false;
  }
};

/// Folders of data/<set> whose names start with `start`, or with none of the
/// special starts when it is empty.
inline std::vector<std::string> folders(
    const std::string& start,
    const std::string& set = "lora") {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(golden(set))) {
    const auto name = entry.path().filename().string();
    const bool special = name.rfind("negative_", 0) == 0 ||
        name.rfind("init_", 0) == 0 || name.rfind("steps_", 0) == 0 ||
        name.rfind("eval_", 0) == 0 || name.rfind("converted_", 0) == 0 ||
        name == "sharded_base";
    if (start.empty() ? !special : name.rfind(start, 0) == 0) {
      names.push_back(name);
    }
  }
  std::sort(names.begin(), names.end());
  return names;
}

/// |a - b| <= relative * max|b|.
inline Comparison near(const Tensor& a, const Tensor& b, double relative) {
  return close(
      a, b, 0, relative * b.to(torch::kDouble).abs().max().item<double>());
}

/// One folder of data/<set>: what it says, the adapter, and the numbers of
/// another library.
struct Folder {
  Folder(
      const std::string& name,
      const std::string& set,
      const std::string& numbers = "expected.safetensors")
      : folder(fs::path(golden(set)) / name),
        facts(read_json_file(folder / "case.json")) {
    if (fs::exists(folder / numbers)) {
      expected = peft::load_safetensors((folder / numbers).string());
    }
  }

  std::string adapter() const {
    return (folder / "adapter").string();
  }
  std::string text(const std::string& field) const {
    return facts.at(field).get<std::string>();
  }
  /// The expected tensors below "<group>.", by what follows.
  TensorMap group(const std::string& name) const {
    return adapter_files::group(expected, name);
  }
  /// For starts that are drawn again when an adapter is loaded.
  void seed_load() const {
    if (facts.contains("load_seed")) {
      seed(facts.at("load_seed").get<uint64_t>());
    }
  }

  /// Of the base, and of the numbers.
  torch::ScalarType dtype() const {
    const auto name = facts.value("base_dtype", "float32");
    return name == "bfloat16" ? torch::kBFloat16
        : name == "float64"   ? torch::kDouble
                              : torch::kFloat;
  }
  bool is_half() const {
    return dtype() == torch::kBFloat16;
  }
  /// float32 is compared by `single`, half precision by its own rounding,
  /// float64 a million times closer than float32.
  double allowed(double single, const std::string& /*of*/ = "") const {
    return is_half()                ? tolerance(torch::kBFloat16).rtol
        : dtype() == torch::kDouble ? 1e-6 * single
                                    : single;
  }

  fs::path folder;
  json facts;
  TensorMap expected;
};

/// A case on a network of networks.h.
struct Golden : Folder {
  explicit Golden(const std::string& name, const std::string& set = "lora")
      : Folder(name, set) {}

  /// The base network with the base weights.
  networks::Network network() const {
    auto network = networks::build(text("network"));
    network.module->to(dtype());
    const auto base = facts.contains("base") ? folder / text("base")
                                             : folder / "base.safetensors";
    peft::load_base(*network.module, base.string());
    return network;
  }

  std::vector<Tensor> inputs() const {
    std::vector<Tensor> result;
    for (int i = 0; expected.count("input." + std::to_string(i)); ++i) {
      result.push_back(expected.at("input." + std::to_string(i)));
    }
    return result;
  }

  /// Forward in the mode and with the random numbers of the file.
  Tensor run(const networks::Network& network) const {
    const bool train = text("mode") == "train";
    network.module->train(train);
    if (train) {
      seed(facts.at("seed").get<uint64_t>());
    }
    return network.run(inputs());
  }

  /// In whatever mode it is in.
  Tensor evaluate(const networks::Network& network) const {
    return network.run(inputs());
  }

  Tensor loss(const networks::Network& network) const {
    return torch::mse_loss(run(network), expected.at("target"));
  }
};

/// The network's own parameters with copies of their values.
inline std::vector<std::pair<Tensor, Tensor>> snapshot(
    torch::nn::Module& module) {
  std::vector<std::pair<Tensor, Tensor>> result;
  for (const auto& parameter : module.parameters()) {
    result.emplace_back(parameter, parameter.detach().clone());
  }
  return result;
}

/// The same by name, for modules that carry no adapter.
inline TensorMap values(torch::nn::Module& module) {
  TensorMap result;
  for (const auto& item : module.named_parameters()) {
    result.emplace(item.key(), item.value().detach().clone());
  }
  return result;
}

/// The effective weights of a network under some adapters.
inline TensorMap weights_under(
    torch::nn::Module& module,
    const std::vector<std::string>& names) {
  const torch::NoGradGuard no_grad;
  const peft::ActiveAdapters scope(names);
  TensorMap result;
  for (const auto& [name, tensor] : peft::detail::base_parameters(module)) {
    result.emplace(name, peft::effective(tensor).detach().clone());
  }
  return result;
}

/// `check` on every case of data/<set> that has no special start.
template <class Case = Golden>
void for_each_case(const std::string& set, void (*check)(const Case&)) {
  for (const auto& name : folders("", set)) {
    DYNAMIC_SECTION(name) {
      check(Case(name, set));
    }
  }
}

/// Its adapter loads and gives PEFT's output, gradients and three steps;
/// nothing else moves. `Case` is Golden, or one like it.
template <class Case>
void check_loads(const Case& golden) {
  const json& facts = golden.facts;
  const auto network = golden.network();
  const TorchDropout same_mask; // as Python drew it from the seed
  const auto base = snapshot(*network.module);
  golden.seed_load();
  auto adapter = peft::load(*network.module, golden.adapter());

  // As many trainable numbers, under the same names.
  const auto parameters = adapter.named_parameters();
  const auto gradients = golden.group("gradient");
  REQUIRE(parameters.size() == gradients.size());
  for (const auto& item : gradients) {
    INFO(item.first);
    REQUIRE(find(parameters, item.first).defined());
  }
  REQUIRE(adapter.num_parameters() == facts.at("trainable").get<int>());

  REQUIRE(near(
      golden.run(network),
      golden.expected.at("output"),
      golden.allowed(1e-6, "output")));
  if (golden.is_half()) {
    REQUIRE(golden.run(network).scalar_type() == torch::kBFloat16);
  }

  torch::optim::SGD optimizer(
      adapter.parameters(),
      torch::optim::SGDOptions(facts.at("learning_rate").get<double>()));
  for (int step = 0; step < facts.at("steps").get<int>(); ++step) {
    optimizer.zero_grad();
    const auto loss = golden.loss(network);
    loss.backward();
    if (step == 0) {
      for (const auto& [key, gradient] : gradients) {
        INFO(key);
        const auto ours = find(parameters, key).grad();
        REQUIRE(near(ours, gradient, golden.allowed(1e-5, "gradient")));
      }
    }
    optimizer.step();
  }
  for (const auto& [key, value] : golden.group("step")) {
    INFO(key);
    REQUIRE(near(find(parameters, key), value, golden.allowed(1e-5, "step")));
  }

  // Nothing but the adapter moved or was given a gradient.
  adapter.detach();
  for (const auto& [parameter, before] : base) {
    REQUIRE(equal_bits(parameter, before));
    REQUIRE_FALSE(parameter.grad().defined());
  }
}

/// Merging gives PEFT's merged weights, and the function stays; what PEFT does
/// not merge is refused.
template <class Case>
void check_merges(const Case& golden) {
  const auto network = golden.network();
  const auto plain = network.module->named_parameters();
  golden.seed_load();
  auto adapter = peft::load(*network.module, golden.adapter());
  network.module->eval();
  if (!golden.facts.value("mergeable", true)) {
    const auto before = golden.evaluate(network);
    REQUIRE_FALSE(error_of([&] { peft::merge(*network.module); }).empty());
    REQUIRE(equal_bits(golden.evaluate(network), before));
    return;
  }
  auto expected = golden.group("merged");
  for (auto item = expected.begin(); item != expected.end();) {
    const auto* own = plain.find(item->first); // a tied head's is empty
    const bool known = own != nullptr && own->numel() > 0;
    item = known ? std::next(item) : expected.erase(item);
  }
  REQUIRE_FALSE(expected.empty());
  for (const auto& [key, value] : expected) {
    INFO(key);
    REQUIRE(near(
        peft::effective(plain[key]), value, golden.allowed(1e-6, "merged")));
  }
  const auto adapted = golden.evaluate(network);
  peft::merge(*network.module);
  const auto merged = values(*network.module);
  REQUIRE(merged.size() == plain.size());
  for (const auto& [key, value] : expected) {
    INFO(key);
    REQUIRE(near(merged.at(key), value, golden.allowed(1e-6, "merged")));
  }
  REQUIRE(
      near(golden.evaluate(network), adapted, golden.allowed(5e-6, "output")));
}

/// A config has every field of another, as PEFT reads it.
inline void check_keeps_fields(const json& after, const json& before) {
  for (const auto& item : before.items()) {
    INFO(item.key());
    REQUIRE(after.contains(item.key()));
    REQUIRE(
        as_read(item.key(), after.at(item.key())) ==
        as_read(item.key(), item.value()));
  }
}

/// Saving what was loaded gives the same tensors and config.
template <class Case>
void check_saves_again(const Case& golden) {
  const auto network = golden.network();
  const auto adapter = peft::load(*network.module, golden.adapter());
  const TemporaryDirectory directory;
  peft::save(adapter, directory / "again");
  const auto saved =
      peft::load_safetensors(golden.adapter() + "/adapter_model.safetensors");
  const auto again =
      peft::load_safetensors(directory / "again/adapter_model.safetensors");
  size_t count = 0;
  for (const auto& [key, value] : saved) {
    INFO(key);
    const std::string end = ".base_layer.weight"; // that PEFT repeats
    if (key.size() > end.size() &&
        key.compare(key.size() - end.size(), end.size(), end) == 0) {
      continue;
    }
    ++count;
    REQUIRE(again.count(key) == 1);
    REQUIRE(equal_bits(
        again.at(key),
        value.is_floating_point() ? value.to(torch::kFloat) : value));
  }
  REQUIRE(again.size() == count);
  const auto before = config_of(golden.adapter());
  const auto after = config_of(directory / "again");
  check_keeps_fields(after, before);
  REQUIRE(after.size() == before.size());
}

// ~~~~ the other direction ~~~~

/// Where adapters are written for the other library to read:
/// $PEFT_REVERSE_DIR, emptied, or a folder that goes away.
class ReverseFolder {
 public:
  explicit ReverseFolder(const std::string& below = "") {
    const char* wanted = std::getenv("PEFT_REVERSE_DIR");
    path_ = wanted != nullptr ? fs::path(wanted) : own_.path();
    if (!below.empty()) {
      path_ /= below;
    }
    fs::remove_all(path_);
  }
  fs::path operator/(const std::string& name) const {
    return path_ / name;
  }

 private:
  TemporaryDirectory own_;
  fs::path path_;
};

/// Saves a new adapter whose values are not what they start as.
template <class Options>
peft::Adapter write_adapter(
    torch::nn::Module& module,
    const Options& options,
    const fs::path& folder,
    double size = 0.2,
    const peft::SaveOptions& how = {}) {
  seed(5);
  auto adapter = peft::attach(module, options);
  {
    torch::NoGradGuard no_grad;
    for (auto parameter : adapter.parameters()) {
      parameter.add_(size * torch::randn_like(parameter));
    }
  }
  module.eval();
  fs::create_directories(folder);
  peft::save(adapter, (folder / "adapter").string(), how);
  REQUIRE(fs::exists(folder / "adapter/adapter_config.json"));
  return adapter;
}

/// What the other library is to repeat, and with which network.
inline void write_numbers(
    const fs::path& folder,
    TensorMap inputs,
    const Tensor& output,
    const json& facts) {
  inputs.emplace("output", output.detach().contiguous());
  peft::save_safetensors(inputs, (folder / "numbers.safetensors").string());
  std::ofstream(folder / "case.json") << facts.dump(2) << '\n';
}

/// Writes what check_with_peft.py needs to repeat this output with HF PEFT.
template <class Options>
void write_for_peft(
    const fs::path& folder,
    const Golden& golden,
    const Options& options,
    bool half = false,
    double size = 0.2,
    const peft::SaveOptions& how = {}) {
  auto network = golden.network();
  if (half) {
    network.module->to(torch::kBFloat16);
  }
  const TensorMap base = values(*network.module);
  const auto adapter =
      write_adapter(*network.module, options, folder, size, how);
  peft::save_safetensors(base, (folder / "base.safetensors").string());

  TensorMap numbers;
  auto inputs = golden.inputs();
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (half && inputs[i].is_floating_point()) {
      inputs[i] = inputs[i].to(torch::kBFloat16);
    }
    numbers.emplace("input." + std::to_string(i), inputs[i]);
  }

  // PEFT trains what the file holds, or all logits where it holds the largest:
  // for a grouped convolution that is more than we do, because its lora_A sees
  // the other groups' channels too.
  int64_t trainable = 0;
  bool is_cut = false;
  for (const auto& item : peft::load_safetensors(
           (folder / "adapter/adapter_model.safetensors").string())) {
    const bool is_frozen = item.first.rfind("base_model.vera_", 0) == 0 ||
        item.first.find("sampler.gaussian_var") != std::string::npos ||
        item.first.find("lora_velora_embed") != std::string::npos ||
        item.first.find("sampler.expert_weights") + 22 == item.first.size() ||
        !item.second.is_floating_point(); // places
    trainable += is_frozen ? 0 : item.second.numel();
    is_cut = is_cut || item.first.find("_topk_weights") != std::string::npos;
  }
  trainable = is_cut ? adapter.num_parameters() : trainable;
  if (golden.text("network") == "conv2d_groups") {
    REQUIRE(trainable > adapter.num_parameters());
  } else {
    REQUIRE(
        trainable ==
        adapter.num_parameters() * (how.convert_to_plain_lora() ? 2 : 1));
  }
  write_numbers(
      folder,
      numbers,
      network.run(inputs),
      {{"network", golden.text("network")},
       {"dtype", half ? "bfloat16" : "float32"},
       {"trainable", trainable}});
}

} // namespace golden_case
