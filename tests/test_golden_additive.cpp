// (IA)3, prompts, prefixes and bottleneck adapters against HF PEFT and
// adapters: their files load here and give their numbers (data/additive), ours
// load there (golden/check_with_peft.py reads what the last test writes).

#include "test.h"

#include "golden_case.h"
#include "tiny_models.h"

#include <fstream>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace test_golden_additive {

namespace {

namespace fs = std::filesystem;
using golden_case::check_keeps_fields;
using golden_case::config_of;
using golden_case::json;
using golden_case::near;
using tiny_models::Network;
using tiny_models::Tensors;
using torch::Tensor;

/// Folders of data/additive whose names start with one of `starts`.
std::vector<std::string> folders(const std::vector<std::string>& starts) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(golden("additive"))) {
    const auto name = entry.path().filename().string();
    for (const auto& start : starts) {
      if (name.rfind(start, 0) == 0) {
        names.push_back(name);
      }
    }
  }
  std::sort(names.begin(), names.end());
  return names;
}

/// The folders of methods that put tokens in front.
std::vector<std::string> token_folders() {
  return folders({"prompt_", "ptuning_", "prefix_"});
}

/// Parallel adapters of networks that normalise first: the library `adapters`
/// lets them read the stream before the norm, the paper and libpeft what the
/// feed-forward gets.
bool is_refused(const std::string& name) {
  return name == "parallel_gpt2" || name == "parallel_learned_llama" ||
      name == "parallel_t5_v1_0";
}

/// All folders that load.
std::vector<std::string> all_folders() {
  auto names = folders({""});
  REQUIRE(names.size() == 43);
  names.erase(
      std::remove_if(names.begin(), names.end(), is_refused), names.end());
  return names;
}

/// A convolution of networks.h with the base of its case in data/lora.
Network convolution(const std::string& name) {
  const auto network = networks::build(name);
  peft::load_base(
      *network.module, golden("lora/" + name + "/base.safetensors"));
  network.module->eval();
  return {
      network.module,
      [network](const Tensors& call) {
        return network.run({call.at("input.0")});
      },
      [](const Tensor& output, const Tensors& call) {
        return torch::mse_loss(output, call.at("target"));
      },
      {}};
}

Network base_network(const std::string& name) {
  return name.rfind("conv", 0) == 0 ? convolution(name)
                                    : tiny_models::load(name);
}

/// One folder of data/additive.
struct Golden : golden_case::Folder {
  explicit Golden(const std::string& name)
      : Folder(name, "additive", "reference.safetensors") {
    if (expected.count("token_type_ids")) { // of output_typed alone
      token_type_ids = expected.at("token_type_ids");
      expected.erase("token_type_ids");
    }
  }

  std::string network_name() const {
    return text("network");
  }
  Network network() const {
    return base_network(network_name());
  }
  const Tensor& at(const std::string& name) const {
    return expected.at(name);
  }
  /// The adapter on a network. Its name is a part of the keys in the files of
  /// `adapters`.
  peft::Adapter load(const Network& network, const std::string& from) const {
    const bool named = fs::exists(folder / "adapter/adapter.safetensors");
    return peft::load(*network.module, from, named ? "bottleneck" : "default");
  }
  peft::Adapter load(const Network& network) const {
    return load(network, adapter());
  }
  bool has_encoder() const {
    return fs::exists(folder / "encoder.safetensors");
  }
  /// The adapter's folder with the state that HF PEFT drops where libpeft keeps
  /// it.
  void copy_for_training(const fs::path& to) const {
    fs::copy(adapter(), to);
    if (has_encoder()) {
      fs::copy(
          folder / "encoder.safetensors", to / "libpeft_training.safetensors");
    }
  }
  /// 1e-6 from the output; T5 does not divide its scores by the root of their
  /// width, so rounding weighs more there: the output in float64 is given too,
  /// and ours may be twice as far from it as the other library's.
  Comparison has_output(const Tensor& output) const {
    if (expected.count("exact.output") == 0) {
      return near(output, at("output"), 1e-6);
    }
    const auto& exact = at("exact.output");
    const double rounding = (at("output") - exact).abs().max().item<double>();
    const double largest = exact.abs().max().item<double>();
    return near(output, exact, std::max(1e-6, 2 * rounding / largest));
  }

  Tensor token_type_ids;
};

/// Values by name, for modules that carry no adapter.
Tensors values(torch::nn::Module& module) {
  Tensors result;
  for (const auto& item : module.named_parameters()) {
    const auto copy = item.value().detach().clone();
    copy.set_requires_grad(item.value().requires_grad());
    result.emplace(item.key(), copy);
  }
  return result;
}

Comparison unchanged(torch::nn::Module& module, const Tensors& before) {
  const auto after = module.named_parameters();
  if (after.size() != before.size()) {
    return {false, "another number of parameters"};
  }
  for (const auto& [key, value] : before) {
    const auto same = equal_bits(after[key], value);
    if (!same || after[key].requires_grad() != value.requires_grad()) {
      return {false, key + ": " + same.message};
    }
  }
  return {true, "unchanged"};
}

/// The weights files of an adapter's folder.
std::vector<fs::path> weight_files(const fs::path& folder) {
  std::vector<fs::path> result;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() == ".safetensors") {
      result.push_back(entry.path());
    }
  }
  std::sort(result.begin(), result.end());
  return result;
}

/// All tensors of an adapter's folder.
Tensors file_tensors(const fs::path& folder) {
  Tensors result;
  for (const auto& file : weight_files(folder)) {
    result.merge(peft::load_safetensors(file.string()));
  }
  return result;
}

/// `values`, one for each of the adapter's parameters, by the keys that these
/// have in its files.
Tensors by_file_key(
    const peft::Adapter& adapter,
    const std::vector<Tensor>& values) {
  torch::NoGradGuard no_grad;
  auto parameters = adapter.parameters();
  std::vector<Tensor> own;
  for (size_t i = 0; i < parameters.size(); ++i) {
    own.push_back(parameters[i].clone());
    parameters[i].copy_(values.at(i));
  }
  TemporaryDirectory directory;
  peft::save(adapter, directory / "adapter");
  for (size_t i = 0; i < parameters.size(); ++i) {
    parameters[i].copy_(own[i]);
  }
  return file_tensors(directory / "adapter");
}

/// The steps that the golden file took, compared one by one.
void check_training(
    const Golden& golden,
    const Network& network,
    const peft::Adapter& adapter) {
  REQUIRE(adapter.num_parameters() == golden.facts.at("trainable").get<int>());
  const auto parameters = adapter.parameters();
  torch::optim::SGD optimizer(
      parameters,
      torch::optim::SGDOptions(golden.facts.at("learning_rate").get<double>()));
  for (int step = 0; step < golden.facts.at("steps").get<int>(); ++step) {
    optimizer.zero_grad();
    const auto loss =
        network.loss(network.run(golden.expected), golden.expected);
    loss.backward();
    if (step == 0) {
      REQUIRE(near(loss.reshape({1}), golden.at("loss"), 1e-6));
      std::vector<Tensor> gradients;
      for (const auto& parameter : parameters) {
        gradients.push_back(parameter.grad());
      }
      const auto ours = by_file_key(adapter, gradients);
      for (const auto& [key, gradient] : golden.group("gradient")) {
        INFO(key);
        REQUIRE(ours.count(key) == 1);
        REQUIRE(near(ours.at(key), gradient, 1e-5));
      }
    }
    optimizer.step();
  }
  const auto ours = by_file_key(adapter, parameters);
  for (const auto& [key, value] : golden.group("step")) {
    INFO(key);
    REQUIRE(near(ours.at(key), value, 1e-5));
  }
}

/// A copy of an adapter's folder with another first or last tensor in its
/// (last) weights file; the end of the name of what was changed.
std::string copy_broken(
    const fs::path& from,
    const fs::path& to,
    const std::string& how,
    bool last) {
  fs::copy(from, to);
  const auto files = weight_files(to);
  const auto file = last ? files.back() : files.front();
  auto tensors = peft::load_safetensors(file.string());
  auto key = last ? tensors.rbegin()->first : tensors.begin()->first;
  if (how == "a missing key") {
    tensors.erase(key);
  } else if (how == "an unexpected key") {
    key = key.substr(0, key.rfind('.') + 1) + "no_such_tensor";
    tensors.emplace(key, torch::ones({2}));
  } else {
    auto sizes = tensors.at(key).sizes().vec();
    ++sizes.back();
    tensors.at(key) = torch::ones(sizes);
  }
  peft::save_safetensors(tensors, file.string());
  for (const std::string front :
       {"base_model.model.", "base_model.", ".adapters.bottleneck."}) {
    const auto at = key.find(front);
    key = at == std::string::npos ? key : key.substr(at + front.size());
  }
  return key;
}

} // namespace

TEST_CASE("files of additive adapters load and give their outputs") {
  for (const auto& name : all_folders()) {
    DYNAMIC_SECTION(name) {
      const Golden golden(name);
      const auto network = golden.network();
      const auto base = values(*network.module);
      auto adapter = golden.load(network);
      const auto output = network.run(golden.expected);
      REQUIRE(golden.has_output(output));
      REQUIRE(near(
          network.loss(output, golden.expected).reshape({1}),
          golden.at("loss"),
          1e-6));
      adapter.detach();
      REQUIRE(unchanged(*network.module, base));
    }
  }
}

TEST_CASE("in float64 T5 with an additive adapter is exact") {
  size_t count = 0;
  for (const auto& name : all_folders()) {
    const Golden golden(name);
    if (golden.network_name().rfind("t5", 0) != 0) {
      continue;
    }
    ++count;
    DYNAMIC_SECTION(name) {
      TemporaryDirectory directory;
      golden.copy_for_training(directory / "adapter");
      const auto network = golden.network();
      network.module->to(torch::kDouble);
      golden.load(network, directory / "adapter");
      const torch::NoGradGuard no_grad;
      REQUIRE(
          near(network.run(golden.expected), golden.at("exact.output"), 1e-12));
    }
  }
  REQUIRE(count == 12);
}

TEST_CASE("training additive adapters takes the steps of their libraries") {
  for (const auto& name : all_folders()) {
    DYNAMIC_SECTION(name) {
      const Golden golden(name);
      TemporaryDirectory directory;
      golden.copy_for_training(directory / "adapter");
      const auto network = golden.network();
      const auto base = values(*network.module);
      auto adapter = golden.load(network, directory / "adapter");
      check_training(golden, network, adapter);
      // Nothing but the adapter moved or was given a gradient.
      adapter.detach();
      REQUIRE(unchanged(*network.module, base));
      for (const auto& parameter : network.module->parameters()) {
        REQUIRE_FALSE(parameter.grad().defined());
      }
    }
  }
}

TEST_CASE("virtual tokens: token types, written text, padding on the left") {
  for (const auto& name : token_folders()) {
    DYNAMIC_SECTION(name) {
      const Golden golden(name);
      const auto network = golden.network();
      golden.load(network);
      torch::NoGradGuard no_grad;
      Tensors right{
          {"input_ids", golden.at("input_ids")},
          {"attention_mask", golden.at("attention_mask")}};
      if (golden.network_name() == "bert") {
        right["token_type_ids"] = golden.token_type_ids;
        REQUIRE(near(network.run(right), golden.at("output_typed"), 1e-6));
        continue;
      }
      if (golden.expected.count("generate.right")) {
        const auto& expected = golden.at("generate.right");
        REQUIRE(
            torch::equal(network.generate(right, expected.size(1)), expected));
        continue;
      }

      // Each row alone, and all of them padded on the left.
      const auto& expected = golden.at("generate.alone");
      const auto lengths = right["attention_mask"].sum(1);
      auto left = right;
      for (int64_t row = 0; row < expected.size(0); ++row) {
        INFO(row);
        const auto length = lengths[row].item<int64_t>();
        const auto ids = right["input_ids"].narrow(0, row, 1);
        REQUIRE(torch::equal(
            network.generate(
                {{"input_ids", ids.slice(1, 0, length)}}, expected.size(1)),
            expected.narrow(0, row, 1)));
        for (const std::string key : {"input_ids", "attention_mask"}) {
          left[key] = left[key].clone();
          left[key][row] = right[key][row].roll({right[key].size(1) - length});
        }
      }
      REQUIRE(torch::equal(network.generate(left, expected.size(1)), expected));
      if (golden.expected.count("left.alone")) {
        REQUIRE(torch::equal(left["input_ids"], golden.at("left.input_ids")));
        // Without positions they are counted whatever the mask says, as in
        // transformers; HF PEFT counts so even where they are given.
        REQUIRE(near(network.run(left), golden.at("peft.left.output"), 1e-6));
        left["position_ids"] = golden.at("left.position_ids");
        REQUIRE(near(network.run(left), golden.at("left.alone"), 1e-6));
      }
    }
  }
}

TEST_CASE("what is no change of a weight is not merged") {
  for (const auto& name : all_folders()) {
    if (name.rfind("ia3_", 0) == 0) {
      continue;
    }
    DYNAMIC_SECTION(name) {
      const Golden golden(name);
      const auto network = golden.network();
      auto adapter = golden.load(network);
      const auto before = network.run(golden.expected);
      for (const auto& error :
           {error_of([&] { adapter.merge(); }),
            error_of([&] { peft::merge(*network.module); })}) {
        INFO(error);
        REQUIRE(contains(error, "cannot be merged"));
      }
      REQUIRE(equal_bits(network.run(golden.expected), before));
    }
  }
}

TEST_CASE("merging (IA)3 of HF PEFT gives its merged weights") {
  for (const auto& name : folders({"ia3_"})) {
    DYNAMIC_SECTION(name) {
      const Golden golden(name);
      const auto network = golden.network();
      const auto base = values(*network.module);
      golden.load(network);
      peft::merge(*network.module);
      REQUIRE(golden.has_output(network.run(golden.expected)));
      const auto merged = values(*network.module);
      REQUIRE(merged.size() == base.size());
      const auto expected = golden.group("merged");
      for (const auto& [key, value] : expected) {
        INFO(key);
        REQUIRE(near(merged.at(key), value, 1e-6));
      }
      if (!expected.empty()) { // PEFT's list of what changed is whole
        for (const auto& [key, value] : base) {
          INFO(key);
          REQUIRE((expected.count(key) || equal_bits(merged.at(key), value)));
        }
      }
    }
  }
}

TEST_CASE("an additive adapter is saved as it was loaded") {
  for (const auto& name : all_folders()) {
    DYNAMIC_SECTION(name) {
      const Golden golden(name);
      TemporaryDirectory directory;

      // With a field of a PEFT that this library does not know.
      const fs::path given = directory / "given";
      fs::copy(golden.adapter(), given);
      auto before = config_of(given);
      before["of_another_version"] = {{"a", {1, 2.5, nullptr}}, {"b", "text"}};
      std::ofstream(given / "adapter_config.json") << before.dump(2);

      const auto network = golden.network();
      auto adapter = golden.load(network, given.string());
      peft::save(adapter, directory / "again");
      const auto after = config_of(directory / "again");
      REQUIRE(after.size() == before.size());
      check_keeps_fields(after, before);

      // The same files with the same keys and values.
      const auto files = weight_files(given);
      REQUIRE(weight_files(directory / "again").size() == files.size());
      for (const auto& file : files) {
        INFO(file.filename().string());
        const auto saved = peft::load_safetensors(file.string());
        const auto again = peft::load_safetensors(
            (directory / "again/") + file.filename().string());
        REQUIRE(again.size() == saved.size());
        for (const auto& [key, value] : saved) {
          INFO(key);
          REQUIRE(again.count(key) == 1);
          REQUIRE(equal_bits(again.at(key), value));
        }
      }

      const auto other = golden.network();
      golden.load(other, directory / "again");
      REQUIRE(
          equal_bits(other.run(golden.expected), network.run(golden.expected)));
    }
  }
}

TEST_CASE("a broken file of an additive adapter is refused, model untouched") {
  const std::map<std::string, std::string> words{
      {"a missing key", "missing from the file"},
      {"an unexpected key", "unexpected in the file"},
      {"a wrong shape", "wrong shape"}};
  for (const auto& name : all_folders()) {
    for (const auto& [how, word] : words) {
      for (const bool last : {false, true}) {
        DYNAMIC_SECTION(name << ", " << how << (last ? " at the end" : "")) {
          const Golden golden(name);
          TemporaryDirectory directory;
          const auto key =
              copy_broken(golden.adapter(), directory / "broken", how, last);
          const auto network = golden.network();
          const auto before = values(*network.module);
          const auto error =
              error_of([&] { golden.load(network, directory / "broken"); });
          INFO(error);
          REQUIRE(contains(error, key));
          REQUIRE(contains(error, word));
          REQUIRE(unchanged(*network.module, before));
          REQUIRE(peft::adapters(*network.module).empty());
        }
      }
    }
  }
}

TEST_CASE("an adapter's file for another network is refused") {
  for (const std::string name :
       {"ia3_llama",
        "prefix_llama",
        "prefix_t5_v1_0",
        "prompt_bert",
        "houlsby_bert",
        "pfeiffer_leave_out_llama",
        "parallel_bert"}) {
    INFO(name);
    const auto gpt2 = base_network("gpt2");
    const auto before = values(*gpt2.module);
    const Golden golden(name);
    REQUIRE_FALSE(
        error_of([&] { peft::load(*gpt2.module, golden.adapter()); }).empty());
    REQUIRE(unchanged(*gpt2.module, before));
    REQUIRE(peft::adapters(*gpt2.module).empty());
  }
}

TEST_CASE("parallel adapters of the stream before a norm are refused") {
  for (const auto& name : folders({"parallel_"})) {
    if (!is_refused(name)) {
      continue;
    }
    INFO(name);
    const Golden golden(name);
    const auto network = golden.network();
    const auto before = values(*network.module);
    REQUIRE(
        contains(error_of([&] { golden.load(network); }), "normalises first"));
    REQUIRE(unchanged(*network.module, before));
  }
}

TEST_CASE("a pickled bottleneck adapter is the one in safetensors") {
  const Golden golden("pfeiffer_bert");
  const auto network = golden.network();
  peft::load(*network.module, (golden.folder / "adapter_bin").string());
  REQUIRE(near(network.run(golden.expected), golden.at("output"), 1e-6));
}

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~ the other direction ~~~~~~~~~~~~~~~~~~~~~~~~~~~

namespace {

/// Writes adapters for check_with_peft.py or check_with_adapters.py to repeat
/// their outputs.
class Writer {
 public:
  explicit Writer(const std::string& library) : root_(library) {}

  /// The inputs are those of the golden case `like`.
  template <class Options>
  void write(
      const std::string& name,
      const std::string& like,
      const Options& options) {
    INFO(name);
    const Golden golden(like);
    const auto network = golden.network();
    const auto folder = root_ / name;
    const bool tiny = network.generate || contains(like, "bert");
    const Tensors base = values(*network.module);
    const auto adapter =
        golden_case::write_adapter(*network.module, options, folder);
    if (!tiny) {
      peft::save_safetensors(base, (folder / "base.safetensors").string());
    }

    Tensors numbers;
    for (const std::string input :
         {"input.0",
          "input_ids",
          "attention_mask",
          "decoder_input_ids",
          "decoder_attention_mask"}) {
      if (golden.expected.count(input)) {
        numbers.emplace(input, golden.at(input));
      }
    }
    golden_case::write_numbers(
        folder,
        numbers,
        network.run(golden.expected),
        {{"network", golden.network_name()},
         {"from", tiny ? "models" : "lora"},
         {"dtype", "float32"},
         {"trainable", adapter.num_parameters()}});
  }

 private:
  golden_case::ReverseFolder root_;
};

} // namespace

TEST_CASE("additive adapters are written for HF PEFT to read") {
  using peft::Ia3Options;
  using peft::Targets;
  Writer writer("peft");
  for (const std::string name : {"bert", "gpt2", "llama", "t5_v1_0"}) {
    writer.write("ia3_" + name, "ia3_" + name, Ia3Options());
  }
  writer.write(
      "ia3_bert_head",
      "ia3_bert",
      Ia3Options().modules_to_save({"classifier"}));
  writer.write(
      "ia3_bert_regex",
      "ia3_bert",
      Ia3Options()
          .targets(Targets::regex(R"(.*\.layer\.1\..*(query|dense))"))
          .feedforward(Targets::regex(R"(.*\.intermediate\.dense)")));
  writer.write(
      "ia3_bert_exclude",
      "ia3_bert",
      Ia3Options()
          .targets({"key", "value"})
          .exclude({"bert.encoder.layer.0.attention.self.key"}));
  writer.write(
      "ia3_gpt2_names",
      "ia3_gpt2",
      Ia3Options()
          .targets({"c_attn", "c_fc", "mlp.c_proj"})
          .feedforward({"mlp.c_proj"})
          .fan_in_fan_out(true));
  writer.write("ia3_t5_v1_1", "ia3_t5_v1_1", Ia3Options());
  writer.write(
      "ia3_conv2d",
      "ia3_conv2d",
      Ia3Options()
          .targets({"conv1", "conv2", "conv3", "head"})
          .feedforward({"conv3"}));
  writer.write(
      "ia3_conv2d_groups",
      "ia3_conv2d_groups",
      Ia3Options().targets({"conv"}).feedforward({"conv"}));

  using peft::PrefixOptions;
  using peft::PromptOptions;
  using peft::PTuningOptions;
  const std::vector<std::string> head{"classifier"};
  writer.write(
      "prompt_bert", "prompt_bert", PromptOptions(3).modules_to_save(head));
  writer.write("prompt_gpt2", "prompt_gpt2", PromptOptions(3));
  writer.write(
      "prompt_llama_vocab", "prompt_llama", PromptOptions(5).init("vocab"));
  writer.write(
      "prompt_t5",
      "prompt_t5_v1_1",
      PromptOptions(3).num_transformer_submodules(1));
  writer.write(
      "prompt_t5_two",
      "prompt_t5_v1_0",
      PromptOptions(3).prompts_decoder(false));
  writer.write(
      "ptuning_bert",
      "ptuning_mlp_bert",
      PTuningOptions(3).encoder_hidden_size(8).modules_to_save(head));
  writer.write(
      "ptuning_lstm_gpt2",
      "ptuning_lstm_gpt2",
      PTuningOptions(3)
          .encoder_reparameterization_type("LSTM")
          .encoder_hidden_size(8)
          .encoder_num_layers(1));
  writer.write("ptuning_llama", "ptuning_mlp_llama", PTuningOptions(3));
  writer.write(
      "ptuning_lstm_t5",
      "ptuning_lstm_t5_v1_1",
      PTuningOptions(3)
          .encoder_reparameterization_type("LSTM")
          .encoder_hidden_size(4)
          .prompts_decoder(false));
  writer.write(
      "prefix_bert", "prefix_bert", PrefixOptions(3).modules_to_save(head));
  writer.write("prefix_gpt2", "prefix_gpt2", PrefixOptions(3));
  writer.write("prefix_llama", "prefix_llama", PrefixOptions(3));
  writer.write(
      "prefix_mlp_llama",
      "prefix_mlp_llama",
      PrefixOptions(3).prefix_projection(true).encoder_hidden_size(6));
  for (const std::string network : {"t5_v1_0", "t5_deep"}) {
    writer.write(
        "prefix_" + network,
        "prefix_" + network,
        PrefixOptions(3).stacks({"decoder"}).hf_layer_order(true));
  }
}

TEST_CASE("bottleneck adapters are written for adapters to read") {
  using peft::HoulsbyOptions;
  using peft::ParallelAdapterOptions;
  using peft::PfeifferOptions;
  const auto houlsby = HoulsbyOptions(4).train_layer_norms(false);
  const std::vector<std::string> head{"classifier"};
  Writer writer("adapters");
  for (const std::string network :
       {"gelu_roberta", "gpt2", "llama", "t5_v1_0"}) {
    writer.write("houlsby_" + network, "houlsby_" + network, houlsby);
  }
  writer.write(
      "houlsby_bert",
      "houlsby_bert",
      HoulsbyOptions(houlsby).modules_to_save(head));
  writer.write(
      "houlsby_cross_t5_v1_1",
      "houlsby_cross_t5_v1_1",
      HoulsbyOptions(houlsby).cross_attention(true).non_linearity("relu"));
  writer.write(
      "pfeiffer_bert",
      "pfeiffer_bert",
      PfeifferOptions(5).modules_to_save(head).leave_out({1}));
  writer.write("pfeiffer_bert_headless", "pfeiffer_bert", PfeifferOptions(2));
  writer.write("pfeiffer_gpt2", "pfeiffer_gpt2", PfeifferOptions(3));
  writer.write(
      "pfeiffer_llama",
      "pfeiffer_leave_out_llama",
      PfeifferOptions(3).leave_out({0}));
  writer.write(
      "pfeiffer_t5",
      "pfeiffer_leave_out_t5_v1_0",
      PfeifferOptions(3).leave_out({2}));
  writer.write(
      "parallel_bert", "parallel_bert", ParallelAdapterOptions(4).scaling(2));
  writer.write(
      "parallel_bert_learned",
      "parallel_learned_bert",
      ParallelAdapterOptions(4).learned_scaling(true).modules_to_save(head));
  writer.write(
      "parallel_roberta", "houlsby_gelu_roberta", ParallelAdapterOptions(4));
}

} // namespace test_golden_additive
