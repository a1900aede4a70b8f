// LoRA on parameters, trainable tokens inside LoRA, and SHiRA against HF PEFT:
// its files load here and give its numbers, ours load there
// (golden/check_with_peft.py reads what the last test writes).

#include "test.h"

#include "golden_case.h"

namespace test_golden_parameters {

using namespace golden_case;

namespace {

const std::string kSet = "parameters";

/// What init_<start> of make_parameters.py attaches.
peft::Adapter attach_initial(
    torch::nn::Module& network,
    const std::string& start) {
  if (start == "shira") {
    return peft::attach(
        network,
        peft::ShiraOptions(2).random_seed(5).init_weights(false).targets(
            {"fc1", "fc2"}));
  }
  if (start == "shira_no_seed") {
    return peft::attach(network, peft::ShiraOptions(1).targets({"fc1", "fc2"}));
  }
  return peft::attach(
      network,
      peft::LoraOptions(2)
          .alpha(6)
          .targets({"fc"})
          .target_parameters({"experts.up", "experts.down"})
          .rank_pattern({{"up", 3}})
          .init(start));
}

} // namespace

TEST_CASE("parameters: files of HF PEFT load and give its numbers") {
  for_each_case(kSet, check_loads<Golden>);
}

TEST_CASE("parameters: merging a file of HF PEFT gives its merged weights") {
  for_each_case(kSet, check_merges<Golden>);
}

TEST_CASE("parameters: a loaded adapter is saved as it was loaded") {
  for_each_case(kSet, check_saves_again<Golden>);
}

TEST_CASE("parameters: initial values are HF PEFT's after the same seed") {
  for (const auto& name : folders("init_", kSet)) {
    DYNAMIC_SECTION(name) {
      const Golden golden(name, kSet);
      const auto network = golden.network();
      seed(golden.facts.at("seed").get<uint64_t>());
      const auto adapter = attach_initial(
          *network.module, name.substr(std::string("init_").size()));
      const TemporaryDirectory directory;
      peft::save(adapter, directory / "start");
      const auto ours =
          peft::load_safetensors(directory / "start/adapter_model.safetensors");
      const auto expected = golden.group("initial");
      REQUIRE(ours.size() == expected.size());
      for (const auto& [key, value] : expected) {
        INFO(key);
        REQUIRE(equal_bits(ours.at(key), value));
      }
    }
  }
}

TEST_CASE("parameters: adapters are written for HF PEFT to read") {
  const ReverseFolder root;
  const auto write = [&](const std::string& name,
                         const std::string& golden_name,
                         auto options) {
    write_for_peft(root / name, Golden(golden_name, kSet), options);
  };
  using namespace peft;
  const Targets stacks({"experts.up", "experts.down"});
  write(
      "experts", "experts", LoraOptions(2).alpha(6).target_parameters(stacks));
  write(
      "experts_and_layers",
      "experts",
      LoraOptions(2)
          .alpha(6)
          .rslora(true)
          .targets({"fc", "head"})
          .target_parameters(Targets::regex("experts\\..*"))
          .rank_pattern({{"experts.up", 3}})
          .alpha_pattern({{"down", 5}}));
  write(
      "experts_transposed",
      "experts_transposed",
      LoraOptions(2).target_parameters(stacks).parameters_transposed(true));
  write(
      "experts_square",
      "experts_square",
      LoraOptions(2).target_parameters(stacks));
  write(
      "matrix_bias",
      "matrix",
      LoraOptions(2)
          .bias("lora_only")
          .target_parameters({"fc1.weight", "fc2.weight"}));
  write(
      "matrix_bias_all",
      "matrix",
      LoraOptions(2).bias("all").targets({"fc2"}).target_parameters(
          {"fc1.weight"}));
  write(
      "matrix_head",
      "matrix",
      LoraOptions(2).modules_to_save({"head"}).target_parameters(
          {"fc1.weight"}));
  write(
      "tokens",
      "tokens",
      LoraOptions(2).targets({"fc"}).trainable_token_indices(
          {{"emb", {7, 1}}}));
  write(
      "tokens_list",
      "tokens_list",
      LoraOptions(2).targets({"lm_head"}).trainable_token_indices({0, 3}));
  write(
      "shira", "shira", ShiraOptions(2).random_seed(4).targets({"fc1", "fc2"}));
  write(
      "shira_magnitude",
      "shira",
      ShiraOptions(1).mask_type("magnitude").targets({"fc1", "fc2"}));
  write(
      "shira_head",
      "shira",
      ShiraOptions(1).modules_to_save({"head"}).targets(
          Targets::regex("fc.*")));
}

} // namespace test_golden_parameters
