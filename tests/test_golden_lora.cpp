// LoRA against HF PEFT: its files load here and give its numbers, ours load
// there (golden/check_with_peft.py reads what the last test writes).

#include "test.h"

#include "networks.h"

#include <nlohmann/json.hpp>

#include <cstdlib>
#include <fstream>
#include <map>
#include <set>

namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using torch::Tensor;
using TensorMap = std::map<std::string, Tensor>;

const std::string prefix = "base_model.model.";

json read_json_file(const fs::path& path) {
  std::ifstream file(path);
  REQUIRE(file.good());
  return json::parse(file);
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

/// Folders of data/lora whose names start with `start`, or with none of the
/// special starts when it is empty.
std::vector<std::string> folders(const std::string& start) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(golden("lora"))) {
    const auto name = entry.path().filename().string();
    const bool special = name.rfind("negative_", 0) == 0 ||
        name.rfind("init_", 0) == 0 || name == "sharded_base";
    if (start.empty() ? !special : name.rfind(start, 0) == 0) {
      names.push_back(name);
    }
  }
  std::sort(names.begin(), names.end());
  return names;
}

/// |a - b| <= relative * max|b|.
Comparison near(const Tensor& a, const Tensor& b, double relative) {
  return close(
      a, b, 0, relative * b.to(torch::kDouble).abs().max().item<double>());
}

/// One folder of data/lora.
struct Golden {
  explicit Golden(const std::string& name)
      : folder(fs::path(golden("lora")) / name),
        facts(read_json_file(folder / "case.json")) {
    if (fs::exists(folder / "expected.safetensors")) {
      expected =
          peft::load_safetensors((folder / "expected.safetensors").string());
    }
  }

  std::string adapter() const {
    return (folder / "adapter").string();
  }
  std::string text(const std::string& field) const {
    return facts.at(field).get<std::string>();
  }
  bool is_half() const {
    return facts.value("base_dtype", "float32") != "float32";
  }
  /// Half precision is compared by its own rounding, float32 by `single`.
  double allowed(double single) const {
    return is_half() ? tolerance(torch::kBFloat16).rtol : single;
  }

  /// The base network with the base weights.
  networks::Network network() const {
    auto network = networks::build(text("network"));
    if (is_half()) {
      network.module->to(torch::kBFloat16);
    }
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

  Tensor loss(const networks::Network& network) const {
    return torch::mse_loss(run(network), expected.at("target"));
  }

  /// The expected tensors below "<group>.", by what follows.
  TensorMap group(const std::string& name) const {
    TensorMap result;
    for (const auto& [key, value] : expected) {
      if (key.rfind(name + ".", 0) == 0) {
        result.emplace(key.substr(name.size() + 1), value);
      }
    }
    return result;
  }

  fs::path folder;
  json facts;
  TensorMap expected;
};

/// The adapter's tensor with that key in a file; undefined when there is none.
/// A trained bias may go by its module's plain name.
Tensor find(
    const torch::OrderedDict<std::string, Tensor>& parameters,
    std::string key) {
  if (key.rfind(prefix, 0) == 0) {
    key = key.substr(prefix.size());
  }
  if (const auto* exact = parameters.find(key)) {
    return *exact;
  }
  for (size_t at; (at = key.find(".base_layer")) != std::string::npos;) {
    key.erase(at, std::string(".base_layer").size());
  }
  const auto* plain = parameters.find(key);
  return plain != nullptr ? *plain : Tensor();
}

/// The network's own parameters with copies of their values.
std::vector<std::pair<Tensor, Tensor>> snapshot(torch::nn::Module& module) {
  std::vector<std::pair<Tensor, Tensor>> result;
  for (const auto& parameter : module.parameters()) {
    result.emplace_back(parameter, parameter.detach().clone());
  }
  return result;
}

/// The same by name, for modules that carry no adapter.
TensorMap values(torch::nn::Module& module) {
  TensorMap result;
  for (const auto& item : module.named_parameters()) {
    result.emplace(item.key(), item.value().detach().clone());
  }
  return result;
}

/// A config's value as PEFT reads it: lists of names have no order, and one
/// layer may stand without its list.
json as_read(const std::string& field, json value) {
  if (field == "layers_to_transform" && value.is_number()) {
    value = json::array({value});
  }
  if (value.is_array()) {
    std::sort(value.begin(), value.end());
  }
  return value;
}

} // namespace

TEST_CASE("files of HF PEFT load and give its output, gradients and steps") {
  for (const auto& name : folders("")) {
    if (name == "tied_output") {
      continue; // has its own test
    }
    DYNAMIC_SECTION(name) {
      const Golden golden(name);
      const auto network = golden.network();
      const TorchDropout same_mask; // as Python drew it from the seed
      const auto base = snapshot(*network.module);
      auto adapter = peft::load(*network.module, golden.adapter());

      // As many trainable numbers, under the same names.
      const auto parameters = adapter.named_parameters();
      const auto gradients = golden.group("gradient");
      REQUIRE(parameters.size() == gradients.size());
      for (const auto& item : gradients) {
        INFO(item.first);
        REQUIRE(find(parameters, item.first).defined());
      }
      REQUIRE(
          adapter.num_parameters() == golden.facts.at("trainable").get<int>());

      REQUIRE(near(
          golden.run(network),
          golden.expected.at("output"),
          golden.allowed(1e-6)));
      if (golden.is_half()) {
        REQUIRE(golden.run(network).scalar_type() == torch::kBFloat16);
      }

      torch::optim::SGD optimizer(
          adapter.parameters(),
          torch::optim::SGDOptions(
              golden.facts.at("learning_rate").get<double>()));
      for (int step = 0; step < golden.facts.at("steps").get<int>(); ++step) {
        optimizer.zero_grad();
        const auto loss = golden.loss(network);
        loss.backward();
        if (step == 0) {
          for (const auto& [key, gradient] : gradients) {
            INFO(key);
            const auto ours = find(parameters, key).grad();
            REQUIRE(near(ours, gradient, golden.allowed(1e-5)));
          }
        }
        optimizer.step();
      }
      for (const auto& [key, value] : golden.group("step")) {
        INFO(key);
        REQUIRE(near(find(parameters, key), value, golden.allowed(1e-5)));
      }

      // Nothing but the adapter moved or was given a gradient.
      adapter.detach();
      for (const auto& [parameter, before] : base) {
        REQUIRE(equal_bits(parameter, before));
        REQUIRE_FALSE(parameter.grad().defined());
      }
    }
  }
}

TEST_CASE("merging a file of HF PEFT gives its merged weights") {
  for (const auto& name : folders("")) {
    const Golden golden(name);
    if (!golden.facts.at("mergeable").get<bool>()) {
      continue;
    }
    DYNAMIC_SECTION(name) {
      const auto network = golden.network();
      const auto plain = network.module->named_parameters();
      auto adapter = peft::load(*network.module, golden.adapter());
      network.module->eval();
      const auto expected = golden.group("merged");
      for (const auto& [key, value] : expected) {
        INFO(key);
        REQUIRE(near(peft::effective(plain[key]), value, golden.allowed(1e-6)));
      }
      const auto adapted = network.run(golden.inputs());
      peft::merge(*network.module);
      const auto merged = values(*network.module);
      REQUIRE(merged.size() == plain.size());
      for (const auto& [key, value] : expected) {
        INFO(key);
        REQUIRE(near(merged.at(key), value, golden.allowed(1e-6)));
      }
      REQUIRE(
          near(network.run(golden.inputs()), adapted, golden.allowed(5e-6)));
    }
  }
}

TEST_CASE("a grouped convolution's file is refused by merge, base untouched") {
  const Golden golden("conv2d_groups");
  const auto network = golden.network();
  const auto base = snapshot(*network.module);
  auto adapter = peft::load(*network.module, golden.adapter());
  const auto before = network.run(golden.inputs());
  const auto error = error_of([&] { peft::merge(*network.module); });
  REQUIRE(contains(error, "conv"));
  REQUIRE(contains(error, "groups"));
  REQUIRE_FALSE(error_of([&] { adapter.merge(); }).empty());
  REQUIRE(equal_bits(network.run(golden.inputs()), before));
  adapter.detach();
  for (const auto& [parameter, value] : base) {
    REQUIRE(equal_bits(parameter, value));
  }
}

TEST_CASE(
    "a file for one of two tied layers gives HF PEFT's output or an "
    "error, never something else") {
  const Golden golden("tied_output");
  const auto network = golden.network();
  std::string error;
  try {
    peft::load(*network.module, golden.adapter());
  } catch (const c10::Error& e) {
    error = e.what_without_backtrace();
  }
  if (error.empty()) {
    REQUIRE(near(golden.run(network), golden.expected.at("output"), 1e-6));
  } else {
    REQUIRE(contains(error, "tied"));
    REQUIRE(contains(error, "emb"));
    REQUIRE(contains(error, "out"));
  }
}

TEST_CASE("a loaded adapter is saved as it was loaded") {
  for (const auto& name : folders("")) {
    if (name == "tied_output") {
      continue;
    }
    DYNAMIC_SECTION(name) {
      const Golden golden(name);
      const auto network = golden.network();
      auto adapter = peft::load(*network.module, golden.adapter());
      TemporaryDirectory directory;
      peft::save(adapter, directory / "again");
      const auto again =
          peft::load_safetensors(directory / "again/adapter_model.safetensors");

      // The keys HF PEFT wrote, whatever spelling the file had.
      const bool respelled =
          name == "no_prefix" || name == "adapter_name_in_keys";
      const Golden spelled(name == "pickle" || respelled ? "mlp" : name);
      auto saved = peft::load_safetensors(
          spelled.adapter() + "/adapter_model.safetensors");
      for (const auto& optional : golden.facts.at("optional_keys")) {
        if (again.count(optional.get<std::string>()) == 0) {
          saved.erase(optional.get<std::string>());
        }
      }
      REQUIRE(again.size() == saved.size());
      for (const auto& [key, value] : saved) {
        INFO(key);
        REQUIRE(again.count(key) == 1);
        REQUIRE(equal_bits(again.at(key), value.to(torch::kFloat)));
      }

      // Every field the config had, with its value; PEFT, too, writes the
      // names that "all-linear" stood for.
      auto before =
          read_json_file(fs::path(golden.adapter()) / "adapter_config.json");
      if (before.at("target_modules") == "all-linear") {
        before["target_modules"] = {"fc1", "fc2", "head"};
      }
      const auto after =
          read_json_file(directory / "again/adapter_config.json");
      for (const auto& item : before.items()) {
        INFO(item.key());
        REQUIRE(after.contains(item.key()));
        REQUIRE(
            as_read(item.key(), after.at(item.key())) ==
            as_read(item.key(), item.value()));
      }
      if (name != "minimal_config") {
        REQUIRE(after.size() == before.size());
      }

      // And it can be loaded again.
      const auto other = golden.network();
      peft::load(*other.module, directory / "again");
      REQUIRE(equal_bits(golden.run(other), golden.run(network)));
    }
  }
}

TEST_CASE("a head that HF PEFT lists and the network has not is passed over") {
  // For task_type SEQ_CLS it lists "classifier" and "score", whatever the name.
  const Golden golden("modules_to_save");
  TemporaryDirectory directory;
  const fs::path given = directory / "given";
  fs::copy(golden.adapter(), given);
  auto config = read_json_file(given / "adapter_config.json");
  config["modules_to_save"] = {"classifier", "score", "head"};
  std::ofstream(given / "adapter_config.json") << config.dump(2);
  const auto network = golden.network();
  const auto adapter = peft::load(*network.module, given.string());
  REQUIRE(near(golden.run(network), golden.expected.at("output"), 1e-6));
  peft::save(adapter, directory / "again");
  REQUIRE(
      read_json_file(directory / "again/adapter_config.json")
          .at("modules_to_save") == config["modules_to_save"]);
}

TEST_CASE("a folder that is broken is refused, the model untouched") {
  for (const auto& name : folders("negative_")) {
    DYNAMIC_SECTION(name) {
      const Golden golden(name);
      const auto network = golden.network();
      const auto before = values(*network.module);
      const auto error =
          error_of([&] { peft::load(*network.module, golden.adapter()); });
      INFO(error);
      REQUIRE_FALSE(error.empty());
      for (const auto& words : golden.facts.at("words")) {
        std::istringstream alternatives(words.get<std::string>());
        bool said = false;
        for (std::string word; std::getline(alternatives, word, '|');) {
          said = said || contains(error, word);
        }
        INFO("expected in the error: " << words);
        REQUIRE(said);
      }
      const auto after = network.module->named_parameters();
      REQUIRE(after.size() == before.size());
      for (const auto& [key, value] : before) {
        REQUIRE(equal_bits(after[key], value));
        REQUIRE(after[key].requires_grad());
      }
      REQUIRE(peft::adapters(*network.module).empty());
    }
  }
}

TEST_CASE("base weights in shards are the base weights") {
  const Golden mlp("mlp");
  const auto network = networks::build("mlp");
  peft::load_base(*network.module, golden("lora/sharded_base"));
  const auto loaded = values(*network.module);
  const auto base =
      peft::load_safetensors((mlp.folder / "base.safetensors").string());
  REQUIRE(loaded.size() == base.size());
  for (const auto& [key, value] : base) {
    REQUIRE(equal_bits(loaded.at(key), value));
  }
}

TEST_CASE("initial values are HF PEFT's after the same seed, bit for bit") {
  for (const auto& name : folders("init_")) {
    for (const std::string init : {"kaiming", "gaussian"}) {
      DYNAMIC_SECTION(name << " " << init) {
        const Golden golden(name);
        const auto network = golden.network();
        const auto targets =
            golden.facts.at("targets").get<std::vector<std::string>>();
        seed(golden.facts.at("seed").get<uint64_t>());
        const auto adapter = peft::attach(
            *network.module,
            peft::LoraOptions(golden.facts.at("r").get<int64_t>())
                .alpha(golden.facts.at("alpha").get<double>())
                .init(init)
                .targets(targets));
        const auto parameters = adapter.named_parameters();
        const auto expected = golden.group(init);
        REQUIRE(parameters.size() == expected.size());
        for (const auto& [key, value] : expected) {
          INFO(key);
          REQUIRE(equal_bits(find(parameters, key), value));
        }
      }
    }
  }
}

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~ the other direction ~~~~~~~~~~~~~~~~~~~~~~~~~~~

namespace {

/// Writes what check_with_peft.py needs to repeat this output with HF PEFT.
void write_for_peft(
    const fs::path& folder,
    const std::string& golden_name,
    const peft::LoraOptions& options,
    bool half = false) {
  const Golden golden(golden_name);
  auto network = golden.network();
  if (half) {
    network.module->to(torch::kBFloat16);
  }
  fs::create_directories(folder);
  TensorMap base = values(*network.module);
  peft::save_safetensors(base, (folder / "base.safetensors").string());

  seed(5);
  auto adapter = peft::attach(*network.module, options);
  {
    torch::NoGradGuard no_grad;
    for (auto parameter : adapter.parameters()) {
      parameter.add_(0.2 * torch::randn_like(parameter));
    }
  }
  network.module->eval();
  peft::save(adapter, (folder / "adapter").string());

  TensorMap numbers;
  auto inputs = golden.inputs();
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (half && inputs[i].is_floating_point()) {
      inputs[i] = inputs[i].to(torch::kBFloat16);
    }
    numbers.emplace("input." + std::to_string(i), inputs[i]);
  }
  numbers.emplace("output", network.run(inputs).detach().contiguous());
  peft::save_safetensors(numbers, (folder / "numbers.safetensors").string());

  // PEFT trains what the file holds: for a grouped convolution that is more
  // than we do, because its lora_A sees the other groups' channels too.
  int64_t trainable = 0;
  for (const auto& item : peft::load_safetensors(
           (folder / "adapter/adapter_model.safetensors").string())) {
    trainable += item.second.numel();
  }
  if (golden_name == "conv2d_groups") {
    REQUIRE(trainable > adapter.num_parameters());
  } else {
    REQUIRE(trainable == adapter.num_parameters());
  }
  const json facts = {
      {"network", golden.text("network")},
      {"dtype", half ? "bfloat16" : "float32"},
      {"trainable", trainable}};
  std::ofstream(folder / "case.json") << facts.dump(2) << '\n';
}

peft::LoraOptions lora(int64_t r, std::vector<std::string> targets) {
  return peft::LoraOptions(r).alpha(2 * r).targets(peft::Targets(targets));
}

} // namespace

TEST_CASE("adapters of every layer kind are written for HF PEFT to read") {
  TemporaryDirectory own;
  const char* wanted = std::getenv("PEFT_REVERSE_DIR");
  const fs::path root = wanted != nullptr ? fs::path(wanted) : own.path();
  if (wanted != nullptr) {
    fs::remove_all(root);
  }
  const auto write = [&](const std::string& name,
                         const std::string& golden_name,
                         const peft::LoraOptions& options) {
    write_for_peft(root / name, golden_name, options);
    REQUIRE(fs::exists(root / name / "adapter/adapter_model.safetensors"));
  };
  write("linear", "mlp", lora(8, {"fc1", "fc2"}));
  write("rslora", "mlp", lora(8, {"fc1", "fc2"}).rslora(true));
  write("dropout", "mlp", lora(8, {"fc1", "fc2"}).dropout(0.1));
  write("dora", "mlp", lora(8, {"fc1", "fc2"}).dora(true));
  write("dora_gpt2", "dora_gpt2", lora(4, {"c_fc", "c_proj"}).dora(true));
  write("dora_embedding", "embedding", lora(4, {"emb", "fc"}).dora(true));
  write(
      "dora_conv2d",
      "conv2d",
      lora(4, {"conv1", "conv2", "conv3"}).rslora(true).dora(true));
  write(
      "patterns",
      "patterns",
      lora(4, {"query", "value"})
          .rank_pattern({{"encoder.layer.0.query", 2}, {"value", 3}})
          .alpha_pattern({{"value", 5}}));
  write("layers", "layers", lora(4, {"query", "value"}).layers({1}));
  write(
      "regex",
      "regex",
      peft::LoraOptions(4).targets(
          peft::Targets::regex(R"(.*\.layer\.[02]\.(query|value))")));
  write(
      "exclude",
      "exclude",
      lora(4, {"query", "value"}).exclude({"encoder.layer.1.query"}));
  write(
      "all_linear",
      "bert",
      peft::LoraOptions(2).targets(peft::Targets::all_linear()));
  write("bias_all", "mlp", lora(4, {"fc1"}).bias("all"));
  write("bias_lora_only", "mlp", lora(4, {"fc1"}).bias("lora_only"));
  write("lora_bias", "mlp", lora(4, {"fc1", "fc2"}).lora_bias(true));
  write("modules_to_save", "mlp", lora(4, {"fc1"}).modules_to_save({"head"}));
  write(
      "modules_to_save_bias_all",
      "mlp",
      lora(4, {"fc1"}).modules_to_save({"head"}).bias("all"));
  write("embedding", "embedding", lora(4, {"emb"}));
  write("embedding_linear", "embedding", lora(4, {"emb", "fc"}));
  write("embed_tokens", "embed_tokens", lora(4, {"embed_tokens"}));
  write("attention_bias_all", "attention", lora(4, {"attn"}).bias("all"));
  write("conv1d", "conv1d", lora(4, {"conv"}));
  write("conv2d", "conv2d", lora(4, {"conv1", "conv2", "conv3"}));
  write("conv2d_bias", "conv2d", lora(3, {"conv1"}).lora_bias(true));
  write("conv3d", "conv3d", lora(4, {"conv"}));
  write("conv2d_groups", "conv2d_groups", lora(4, {"conv"}));
  write("attention", "attention", lora(4, {"attn"}));
  write("attention_batch_first", "attention_batch_first", lora(4, {"attn"}));
  write("bert", "bert", lora(4, {"query", "value"}));
  write_for_peft(
      root / "bfloat16",
      "mlp",
      lora(8, {"fc1", "fc2"}),
      /*half=*/true);
}
