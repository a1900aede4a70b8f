// Multitask prompts, CPT and cartridges against HF PEFT: its files load here
// and give its numbers (data/prompts), ours load there
// (golden/check_with_peft.py reads what the last test writes).

#include "test.h"

#include "golden_case.h"
#include "tiny_models.h"

#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace test_golden_prompts {

namespace {

namespace fs = std::filesystem;
using golden_case::find;
using golden_case::json;
using golden_case::near;
using golden_case::read_json_file;
using golden_case::values;
using tiny_models::Network;
using tiny_models::Tensors;
using torch::Tensor;

/// All folders of data/prompts.
std::vector<std::string> folders() {
  const auto names = golden_case::folders("", "prompts");
  REQUIRE(names.size() == 12);
  return names;
}

/// One folder of data/prompts.
struct Golden : golden_case::Folder {
  explicit Golden(const std::string& name)
      : Folder(name, "prompts", "reference.safetensors") {}

  std::string network_name() const {
    return text("network");
  }
  Network network() const {
    return tiny_models::load(network_name());
  }
  const Tensor& at(const std::string& name) const {
    return expected.at(name);
  }
  bool is_cpt() const {
    return folder.filename().string().rfind("cpt_", 0) == 0;
  }
  /// The adapter on a network, for training where its folder has all of it.
  peft::Adapter load(const Network& network, const std::string& from) const {
    return peft::load(
        *network.module,
        from,
        "default",
        peft::LoadOptions().is_trainable(!is_cpt()));
  }
  peft::Adapter load(const Network& network) const {
    return load(network, adapter());
  }
  /// The adapter's folder with the state that PEFT drops where libpeft keeps
  /// it.
  void copy_for_training(const fs::path& to) const {
    fs::copy(adapter(), to);
    if (is_cpt()) {
      fs::copy(
          folder / "encoder.safetensors", to / "libpeft_training.safetensors");
    }
  }
  bool is_t5() const {
    return network_name().rfind("t5", 0) == 0;
  }
  /// What rounding leaves of 1e-6 in an output. T5 does not divide its scores
  /// by the root of their width, so rounding weighs more there: transformers'
  /// own float32 logits are up to 1.1e-6 from its float64 ones, and ours as
  /// much.
  double output_tolerance() const {
    return is_t5() ? 5e-6 : 1e-6;
  }

  /// What the network is called with. Where PEFT was given labels alone, the
  /// decoder's words are those that it makes of them.
  Tensors call() const {
    Tensors result = expected;
    if (is_t5() && result.count("decoder_input_ids") == 0) {
      const Tensor labels = at("labels");
      const Tensor shifted =
          at::constant_pad_nd(labels.slice(1, 0, -1), {1, 0}, 0);
      result["decoder_input_ids"] = shifted.masked_fill(shifted == -100, 0);
      result["decoder_attention_mask"] = labels.ne(-100).to(torch::kLong);
    }
    return result;
  }

  /// The tasks of the batch, where the adapter has several.
  std::unique_ptr<peft::BatchTasks> tasks() const {
    return expected.count("task_ids") == 0
        ? nullptr
        : std::make_unique<peft::BatchTasks>(at("task_ids"));
  }

  Tensor run(const Network& network) const {
    const auto scope = tasks();
    return network.run(call());
  }

  Tensor loss(
      const Network& network,
      const peft::Adapter& adapter,
      const Tensor& output) const {
    if (is_cpt()) {
      return peft::cpt_loss(
          adapter, output, at("labels"), at("input_type_mask"));
    }
    if (is_t5()) {
      const Tensor labels = peft::extend_labels(at("labels"), output);
      return torch::nn::functional::cross_entropy(
          output.flatten(0, 1), labels.flatten());
    }
    return network.loss(output, expected);
  }
};

Comparison unchanged(torch::nn::Module& module, const Tensors& before) {
  const auto after = module.named_parameters();
  if (after.size() != before.size()) {
    return {false, "another number of parameters"};
  }
  for (const auto& [key, value] : before) {
    const auto same = equal_bits(after[key], value);
    if (!same) {
      return {false, key + ": " + same.message};
    }
  }
  return {true, "unchanged"};
}

} // namespace

TEST_CASE("files of multitask prompts, CPT and cartridges give their outputs") {
  for (const auto& name : folders()) {
    DYNAMIC_SECTION(name) {
      const Golden golden(name);
      const auto network = golden.network();
      const auto base = values(*network.module);
      auto adapter = golden.load(network);
      const auto output = golden.run(network);
      REQUIRE(near(output, golden.at("output"), golden.output_tolerance()));
      REQUIRE(near(
          golden.loss(network, adapter, output).reshape({1}),
          golden.at("loss"),
          1e-6));
      adapter.detach();
      REQUIRE(unchanged(*network.module, base));
    }
  }
}

TEST_CASE("multitask prompts, CPT and cartridges train as in PEFT") {
  for (const auto& name : folders()) {
    DYNAMIC_SECTION(name) {
      const Golden golden(name);
      const auto network = golden.network();
      const auto base = values(*network.module);
      const TemporaryDirectory directory;
      golden.copy_for_training(directory / "adapter");
      auto adapter = peft::load(*network.module, directory / "adapter");
      if (golden.is_cpt()) {
        peft::project_cpt(adapter); // PEFT does so in its first forward
      }
      REQUIRE(
          adapter.num_parameters() == golden.facts.at("trainable").get<int>());
      const auto parameters = adapter.named_parameters();
      const auto gradients = golden.group("gradient");
      REQUIRE(parameters.size() == gradients.size());
      torch::optim::SGD optimizer(
          adapter.parameters(),
          torch::optim::SGDOptions(
              golden.facts.at("learning_rate").get<double>()));
      for (int step = 0; step < golden.facts.at("steps").get<int>(); ++step) {
        optimizer.zero_grad();
        golden.loss(network, adapter, golden.run(network)).backward();
        if (step == 0) {
          for (const auto& [key, gradient] : gradients) {
            INFO(key);
            REQUIRE(near(find(parameters, key).grad(), gradient, 1e-5));
          }
        }
        optimizer.step();
        if (golden.is_cpt() && step + 1 < golden.facts.at("steps").get<int>()) {
          peft::project_cpt(adapter);
        }
      }
      for (const auto& [key, value] : golden.group("step")) {
        INFO(key);
        if (key == "prompt_embeddings" && golden.is_cpt()) { // what is saved
          peft::save(adapter, directory / "after");
          REQUIRE(near(
              peft::load_safetensors(
                  directory / "after/adapter_model.safetensors")
                  .at(key),
              value,
              1e-5));
          continue;
        }
        REQUIRE(near(find(parameters, key), value, 1e-5));
      }
      adapter.detach();
      REQUIRE(unchanged(*network.module, base));
    }
  }
}

TEST_CASE(
    "multitask prompts, CPT and cartridges generate what they do in PEFT") {
  int checked = 0;
  for (const auto& name : folders()) {
    const Golden golden(name);
    if (golden.expected.count("generate.alone") == 0) {
      continue;
    }
    INFO(name);
    const auto network = golden.network();
    golden.load(network);
    const auto lengths = golden.at("attention_mask").sum(1);
    const auto& expected = golden.at("generate.alone");
    for (int64_t row = 0; row < expected.size(0); ++row) {
      std::unique_ptr<peft::BatchTasks> task;
      if (golden.expected.count("task_ids") != 0) {
        task = std::make_unique<peft::BatchTasks>(
            golden.at("task_ids").slice(0, row, row + 1));
      }
      const auto ids = golden.at("input_ids").narrow(0, row, 1);
      REQUIRE(torch::equal(
          network.generate(
              {{"input_ids", ids.slice(1, 0, lengths[row].item<int64_t>())}},
              expected.size(1)),
          expected.narrow(0, row, 1)));
      ++checked;
    }
  }
  REQUIRE(checked == 21);
}

TEST_CASE(
    "multitask prompts, CPT and cartridges are saved as they were loaded") {
  for (const auto& name : folders()) {
    DYNAMIC_SECTION(name) {
      const Golden golden(name);
      const TemporaryDirectory directory;
      const fs::path given = directory / "given";
      fs::copy(golden.adapter(), given);
      auto before = read_json_file(given / "adapter_config.json");
      before["of_another_version"] = {{"a", {1, 2.5, nullptr}}, {"b", "text"}};
      std::ofstream(given / "adapter_config.json") << before.dump(2);

      const auto network = golden.network();
      auto adapter = golden.load(network, given.string());
      peft::save(adapter, directory / "again");
      REQUIRE(
          read_json_file(directory / "again/adapter_config.json") == before);
      const std::string weights = "/adapter_model.safetensors";
      const auto saved = peft::load_safetensors(given.string() + weights);
      const auto again =
          peft::load_safetensors((directory / "again") + weights);
      REQUIRE(again.size() == saved.size());
      for (const auto& [key, value] : saved) {
        INFO(key);
        REQUIRE(again.count(key) == 1);
        REQUIRE(equal_bits(again.at(key), value));
      }
      REQUIRE(
          fs::exists(directory / "again/libpeft_training.safetensors") ==
          golden.is_cpt());
      const auto other = golden.network();
      peft::load(*other.module, directory / "again");
      REQUIRE(equal_bits(golden.run(other), golden.run(network)));
    }
  }
}

TEST_CASE("a broken file of such a prompt is refused, model untouched") {
  for (const auto& name : folders()) {
    const Golden golden(name);
    const auto file = golden.adapter() + "/adapter_model.safetensors";
    for (const auto& item : peft::load_safetensors(file)) {
      for (const std::string how : {"missing", "unexpected", "wrong shape"}) {
        DYNAMIC_SECTION(name << ", " << how << " " << item.first) {
          const TemporaryDirectory directory;
          fs::copy(golden.adapter(), directory / "broken");
          auto tensors = peft::load_safetensors(file);
          auto key = item.first;
          if (how == "missing") {
            tensors.erase(key);
          } else if (how == "unexpected") {
            key += "_more";
            tensors.emplace(key, torch::ones({2}));
          } else {
            auto sizes = tensors.at(key).sizes().vec();
            ++sizes.front();
            tensors.at(key) = torch::ones(sizes);
          }
          peft::save_safetensors(
              tensors, directory / "broken/adapter_model.safetensors");
          const auto network = golden.network();
          const auto before = values(*network.module);
          const auto error =
              error_of([&] { golden.load(network, directory / "broken"); });
          INFO(error);
          REQUIRE(contains(error, how));
          const std::string wrapped = "base_model.";
          REQUIRE(contains(
              error,
              key.rfind(wrapped, 0) == 0 ? key.substr(wrapped.size()) : key));
          REQUIRE(unchanged(*network.module, before));
          REQUIRE(peft::adapters(*network.module).empty());
        }
      }
    }
  }
}

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~ the other direction ~~~~~~~~~~~~~~~~~~~~~~~~~~~

namespace {

/// Writes an adapter for check_with_peft.py to repeat its output. The inputs
/// are those of the golden case `like`, as PEFT was given them.
template <class Options>
void write(
    const golden_case::ReverseFolder& root,
    const std::string& name,
    const std::string& like,
    const Options& options) {
  INFO(name);
  const Golden golden(like);
  const auto network = golden.network();
  const auto folder = root / name;
  fs::create_directories(folder);
  seed(5);
  auto adapter = peft::attach(*network.module, options);
  {
    torch::NoGradGuard no_grad;
    for (auto parameter : adapter.parameters()) {
      parameter.add_(0.2 * torch::randn_like(parameter));
    }
  }
  peft::save(adapter, (folder / "adapter").string());
  Tensors numbers;
  for (const std::string input :
       {"input_ids",
        "attention_mask",
        "decoder_input_ids",
        "decoder_attention_mask",
        "task_ids"}) {
    if (golden.expected.count(input) != 0) {
      numbers.emplace(input, golden.at(input));
    }
  }
  if (golden.is_t5() && numbers.count("decoder_input_ids") == 0) {
    numbers.emplace("labels", golden.at("labels"));
  }
  numbers.emplace("output", golden.run(network).detach().contiguous());
  peft::save_safetensors(numbers, (folder / "numbers.safetensors").string());
  const json facts = {
      {"network", golden.network_name()},
      {"from", "models"},
      {"dtype", "float32"},
      {"trainable", adapter.num_parameters()}};
  std::ofstream(folder / "case.json") << facts.dump(2) << '\n';
  REQUIRE(fs::exists(folder / "adapter/adapter_config.json"));
}

} // namespace

TEST_CASE(
    "multitask prompts, CPT and cartridges are written for PEFT to read") {
  using peft::CartridgeOptions;
  using peft::MultitaskPromptOptions;
  const golden_case::ReverseFolder root;
  const std::vector<std::string> head{"classifier"};
  write(
      root,
      "mpt_bert",
      "mpt_bert",
      MultitaskPromptOptions(3, 3).num_ranks(2).modules_to_save(head));
  write(root, "mpt_gpt2", "mpt_gpt2", MultitaskPromptOptions(3, 3));
  write(
      root,
      "mpt_llama",
      "mpt_llama",
      MultitaskPromptOptions(3, 4).num_ranks(3).init("vocab"));
  write(root, "mpt_t5", "mpt_t5_v1_0", MultitaskPromptOptions(3, 3));
  write(
      root,
      "cpt_gpt2",
      "cpt_gpt2",
      peft::CptOptions({7, 3, 9, 12})
          .cpt_tokens_type_mask({1, 2, 3, 4})
          .opt_projection_epsilon(1.5));
  write(
      root,
      "cpt_llama",
      "cpt_llama",
      peft::CptOptions({7, 3, 9})
          .opt_weighted_loss_type("decay")
          .opt_loss_decay_factor(0.75));
  write(
      root,
      "cartridge_bert",
      "cartridge_bert",
      CartridgeOptions(3).modules_to_save(head));
  write(root, "cartridge_gpt2", "cartridge_gpt2", CartridgeOptions(3));
  write(
      root,
      "cartridge_llama",
      "cartridge_llama",
      CartridgeOptions(5).num_frozen_tokens(2));
  write(
      root,
      "cartridge_t5",
      "cartridge_t5_v1_0",
      CartridgeOptions(3).stacks({"decoder"}).hf_layer_order(true));
}

} // namespace test_golden_prompts
