// Weight deltas of HF PEFT on the reference networks: its files load here and
// give its numbers (data/hosts), ours load there (golden/check_with_peft.py
// reads what the last test writes).

#include "test.h"

#include "golden_case.h"
#include "tiny_models.h"

namespace test_golden_hosts {

using namespace golden_case;

namespace {

/// One folder of data/hosts, in the form that golden_case.h checks.
struct Host {
  explicit Host(const std::string& name)
      : folder(fs::path(::golden("hosts")) / name),
        facts(read_json_file(folder / "case.json")),
        expected(peft::load_safetensors(
            (folder / "expected.safetensors").string())) {}

  std::string adapter() const {
    return (folder / "adapter").string();
  }
  std::string network_name() const {
    return facts.at("network").get<std::string>();
  }
  tiny_models::Network network() const {
    return tiny_models::load(network_name());
  }
  static void seed_load() {}
  static bool is_half() {
    return false;
  }
  /// T5 does not divide its scores by the root of their width, and rounding
  /// grows.
  double allowed(double single) const {
    return network_name().rfind("t5", 0) == 0 ? 5 * single : single;
  }
  Tensor run(const tiny_models::Network& network) const {
    return network.run(expected);
  }
  Tensor evaluate(const tiny_models::Network& network) const {
    return run(network);
  }
  Tensor loss(const tiny_models::Network& network) const {
    return torch::mse_loss(run(network), expected.at("target"));
  }
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

std::vector<std::string> hosts() {
  return folders("", "hosts");
}

/// Writes what check_with_peft.py needs to repeat this output with HF PEFT.
template <class Options>
void write_host(
    const fs::path& folder,
    const std::string& name,
    const Options& options) {
  const Host host(name);
  const auto network = host.network();
  seed(5);
  auto adapter = peft::attach(*network.module, options);
  {
    torch::NoGradGuard no_grad;
    for (auto parameter : adapter.parameters()) {
      parameter.add_(0.1 * torch::randn_like(parameter));
    }
  }
  network.module->eval();
  fs::create_directories(folder);
  peft::save(adapter, (folder / "adapter").string());
  TensorMap numbers;
  for (const auto& key :
       {"input_ids",
        "attention_mask",
        "decoder_input_ids",
        "decoder_attention_mask"}) {
    if (host.expected.count(key) == 1) {
      numbers.emplace(key, host.expected.at(key));
    }
  }
  numbers.emplace("output", host.run(network).detach().contiguous());
  peft::save_safetensors(numbers, (folder / "numbers.safetensors").string());
  const json facts = {
      {"network", host.network_name()},
      {"from", "models"},
      {"dtype", "float32"},
      {"trainable", adapter.num_parameters()}};
  std::ofstream(folder / "case.json") << facts.dump(2) << '\n';
  REQUIRE(fs::exists(folder / "adapter/adapter_model.safetensors"));
}

} // namespace

TEST_CASE("hosts: files of HF PEFT load and give its numbers") {
  REQUIRE(hosts().size() >= 30);
  for (const auto& name : hosts()) {
    DYNAMIC_SECTION(name) {
      check_loads(Host(name));
    }
  }
}

TEST_CASE("hosts: merging a file of HF PEFT gives its merged weights") {
  for (const auto& name : hosts()) {
    DYNAMIC_SECTION(name) {
      check_merges(Host(name));
    }
  }
}

TEST_CASE("hosts: a loaded adapter is saved as it was loaded") {
  for (const auto& name : hosts()) {
    DYNAMIC_SECTION(name) {
      check_saves_again(Host(name));
    }
  }
}

TEST_CASE("hosts: adapters are written for HF PEFT to read") {
  const TemporaryDirectory own;
  const char* wanted = std::getenv("PEFT_REVERSE_DIR");
  const fs::path root = wanted != nullptr ? fs::path(wanted) : own.path();
  if (wanted != nullptr) {
    fs::remove_all(root);
  }
  using namespace peft;
  const auto write =
      [&](const std::string& name, const std::string& like, auto options) {
        write_host(root / name, like, options);
      };
  for (const std::string name : {"gpt2", "llama", "t5", "bert"}) {
    write(name + "_default", name + "_lora", LoraOptions(3).alpha(6));
    auto everything = LoraOptions(2).targets(Targets::all_linear());
    if (name != "bert") { // PEFT adapts a tied head apart from its table
      everything.exclude({"lm_head"});
    }
    write(name + "_all", name + "_lora", everything);
    write(
        name + "_dora", name + "_lora", LoraOptions(2).dora(true).rslora(true));
    write(name + "_ada_lora", name + "_lora", AdaLoraOptions(10).init_r(2));
    write(name + "_tokens", name + "_lora", TrainableTokensOptions({9, 4}));
    write(
        name + "_lora_tokens",
        name + "_lora",
        LoraOptions(2).trainable_token_indices({9, 4}));
  }
  for (const std::string name : {"llama", "t5", "bert"}) {
    write(name + "_vera", name + "_lora", VeraOptions(4));
    write(name + "_oft", name + "_lora", OftOptions().oft_block_size(4));
    write(name + "_shira", name + "_lora", ShiraOptions(1).random_seed(7));
    write(name + "_loha", name + "_lora", LoHaOptions(2));
  }
  write("gpt2_vera", "gpt2_lora", VeraOptions(4).targets({"c_attn", "c_fc"}));
  write(
      "gpt2_parameters",
      "gpt2_lora",
      LoraOptions(2).target_parameters({"c_attn.weight", "c_fc.weight"}));
  write(
      "llama_layers",
      "llama_lora",
      LoraOptions(2)
          .targets({"q_proj", "down_proj"})
          .layers({1})
          .layers_pattern({"layers"}));
  write(
      "llama_tokens_by_name",
      "llama_lora",
      LoraOptions(2).trainable_token_indices(
          {{"embed_tokens", {3, 8}}, {"lm_head", {5}}}));
  write(
      "bert_biases",
      "bert_lora",
      LoraOptions(2)
          .bias("all")
          .targets({"query", "intermediate.dense"})
          .modules_to_save({"classifier"}));
}

} // namespace test_golden_hosts
