// Weight deltas of HF PEFT on the reference networks: its files load here and
// give its numbers (data/hosts), ours load there (golden/check_with_peft.py
// reads what the last test writes).

#include "test.h"

#include "golden_case.h"
#include "tiny_models.h"

namespace test_golden_hosts {

using namespace golden_case;

namespace {

const std::string kSet = "hosts";

/// A case on one of tiny_models.h.
struct Host : Folder {
  explicit Host(const std::string& name, const std::string& set = kSet)
      : Folder(name, set) {}

  tiny_models::Network network() const {
    auto network = tiny_models::load(text("network"));
    network.module->to(dtype());
    return network;
  }
  Tensor run(const tiny_models::Network& network) const {
    return network.run(expected);
  }
  Tensor evaluate(const tiny_models::Network& network) const {
    return run(network);
  }
  Tensor loss(const tiny_models::Network& network) const {
    const auto output = run(network);
    return torch::mse_loss(output, expected.at("target").to(output.dtype()));
  }
};

/// The same in float32, whatever the numbers are in.
struct SingleHost : Host {
  using Host::Host;

  tiny_models::Network network() const {
    return tiny_models::load(text("network"));
  }
  /// From numbers in float64 it may be twice as far as PEFT in float32 is.
  double allowed(double single, const std::string& of) const {
    const auto rounding = facts.value("peft_float32_error", json::object());
    return std::max(single, 2 * rounding.value(of, 0.0));
  }
};

void check_saves_single_again(const Host& host) {
  check_saves_again(SingleHost(host.folder.filename().string()));
}

/// Writes what check_with_peft.py needs to repeat this output with HF PEFT.
template <class Options>
void write_host(
    const fs::path& folder,
    const std::string& name,
    const Options& options) {
  const Host host(name);
  const auto network = host.network();
  const auto adapter =
      write_adapter(*network.module, options, folder, /*size=*/0.1);
  TensorMap inputs;
  for (const auto& [key, value] : host.expected) {
    if (!value.is_floating_point()) {
      inputs.emplace(key, value);
    }
  }
  write_numbers(
      folder,
      inputs,
      host.run(network),
      {{"network", host.text("network")},
       {"from", "models"},
       {"dtype", host.facts.value("base_dtype", "float32")},
       {"trainable", adapter.num_parameters()}});
}

} // namespace

TEST_CASE("hosts: files of HF PEFT load and give its numbers") {
  REQUIRE(folders("", kSet).size() >= 60);
  for_each_case(kSet, check_loads<Host>);
}

TEST_CASE("hosts: merging a file of HF PEFT gives its merged weights") {
  for_each_case(kSet, check_merges<Host>);
}

TEST_CASE("hosts: in float32 T5 is as near to float64 as HF PEFT is") {
  for (const auto& name : folders("t5_", kSet)) {
    DYNAMIC_SECTION(name) {
      check_loads(SingleHost(name));
      check_merges(SingleHost(name));
    }
  }
}

TEST_CASE("hosts: a loaded adapter is saved as it was loaded") {
  for_each_case(kSet, check_saves_single_again);
}

TEST_CASE("hosts: adapters are written for HF PEFT to read") {
  const ReverseFolder root;
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
    write(name + "_layer_norm", name + "_lora", LayerNormOptions());
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
    write(name + "_lokr", name + "_lora", LoKrOptions(2));
    write(name + "_hra", name + "_lora", HraOptions(2));
    write(name + "_boft", name + "_lora", BoftOptions().boft_block_size(4));
  }
  // PEFT computes these two in float32, and T5 is in float64 here.
  for (const std::string name : {"gpt2", "llama", "bert"}) {
    write(name + "_pissa", name + "_lora", LoraOptions(2).init("pissa"));
    write(name + "_fourier_ft", name + "_lora", FourierFtOptions(20));
  }
  write("llama_beft", "llama_lora", BeftOptions().targets({"v_proj"}));
  write("t5_beft", "t5_lora", BeftOptions().targets({"SelfAttention.v"}));
  write("bert_beft", "bert_lora", BeftOptions().targets({"value"}));
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
