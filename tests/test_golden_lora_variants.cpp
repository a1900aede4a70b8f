// KaSA, BD-LoRA, MonteCLoRA and VeLoRA against HF PEFT: its files load here and
// give its numbers, its draws are ours, ours load there
// (golden/check_with_peft.py reads what the last test writes).

#include "test.h"

#include "golden_case.h"

namespace test_golden_lora_variants {

using namespace golden_case;

namespace {

const std::string kSet = "lora_variants";

/// What a case of init_* was made with.
peft::LoraOptions options_of(const json& config) {
  auto fields = json::parse(peft::AdapterConfig::lora_defaults().dump());
  fields.update(config);
  return peft::detail::LoraFormat::options(
      peft::AdapterConfig::parse(fields.dump()));
}

bool is_drawn(const std::string& name) {
  return name.find("monteclora") != std::string::npos;
}

} // namespace

TEST_CASE("lora variants: files of HF PEFT load and give its numbers") {
  for (const auto& name : folders("", kSet)) {
    DYNAMIC_SECTION(name) {
      check_loads(Golden(name, kSet));
    }
  }
}

TEST_CASE("lora variants: merging a file of HF PEFT gives its weights") {
  for (const auto& name : folders("", kSet)) {
    DYNAMIC_SECTION(name) {
      check_merges(Golden(name, kSet));
    }
  }
}

TEST_CASE("lora variants: a loaded adapter is saved as it was loaded") {
  for (const auto& name : folders("", kSet)) {
    DYNAMIC_SECTION(name) {
      check_saves_again(Golden(name, kSet));
    }
  }
}

TEST_CASE("lora variants: evaluation draws nothing") {
  int count = 0;
  for (const auto& name : folders("", kSet)) {
    const Golden golden(name, kSet);
    if (golden.expected.count("evaluated") == 0) {
      continue;
    }
    DYNAMIC_SECTION(name) {
      const auto network = golden.network();
      const auto adapter = peft::load(*network.module, golden.adapter());
      network.module->eval();
      const Tensor expected = golden.expected.at("evaluated");
      REQUIRE(near(golden.evaluate(network), expected, 1e-6));
      network.module->train();
      const Tensor trained = golden.evaluate(network);
      const bool draws =
          is_drawn(name) || name.find("dropout") != std::string::npos;
      REQUIRE(static_cast<bool>(close(trained, expected)) == !draws);
    }
    ++count;
  }
  REQUIRE(count == 12);
}

TEST_CASE("lora variants: the penalties of training are HF PEFT's") {
  for (const auto& name : folders("", kSet)) {
    const Golden golden(name, kSet);
    if (golden.expected.count("regularization") == 0) {
      continue;
    }
    DYNAMIC_SECTION(name) {
      const auto network = golden.network();
      const TorchDropout same_mask;
      const auto adapter = peft::load(*network.module, golden.adapter());
      golden.run(network); // draws
      const Tensor loss = is_drawn(name)
          ? peft::monteclora_regularization(adapter)
          : peft::kasa_regularization(adapter);
      REQUIRE(
          near(loss.reshape({1}), golden.expected.at("regularization"), 1e-5));
      loss.backward();
      const auto parameters = adapter.named_parameters();
      size_t count = 0;
      for (const auto& [key, gradient] : golden.group("penalty")) {
        INFO(key);
        REQUIRE(near(find(parameters, key).grad(), gradient, 1e-5));
        ++count;
      }
      REQUIRE(count > 0);
      for (const auto& item : parameters) {
        count -= item.value().grad().defined() ? 1 : 0;
      }
      REQUIRE(count == 0);
    }
  }
}

TEST_CASE("lora variants: the tensors start as HF PEFT's") {
  for (const auto& name : folders("init_", kSet)) {
    DYNAMIC_SECTION(name) {
      const Golden golden(name, kSet);
      const auto network = golden.network();
      seed(golden.facts.at("seed").get<uint64_t>());
      const auto adapter =
          peft::attach(*network.module, options_of(golden.facts.at("config")));
      const TemporaryDirectory folder;
      peft::save(adapter, folder / "adapter");
      const auto ours =
          peft::load_safetensors(folder / "adapter/adapter_model.safetensors");
      const auto expected = golden.group("initial");
      REQUIRE(ours.size() == expected.size());
      for (const auto& [key, value] : expected) {
        INFO(key);
        REQUIRE(equal_bits(ours.at(key), value));
      }
    }
  }
}

TEST_CASE("lora variants: MonteCLoRA draws in training what HF PEFT draws") {
  const Golden golden("init_monteclora", kSet);
  const auto network = golden.network();
  seed(golden.facts.at("seed").get<uint64_t>());
  const auto adapter =
      peft::attach(*network.module, options_of(golden.facts.at("config")));
  network.module->train();
  for (const auto& [number, output] : golden.group("drawn")) {
    INFO(number); // the buffer holds three
    REQUIRE(near(golden.evaluate(network), output, 1e-6));
  }
  const TemporaryDirectory folder;
  peft::save(adapter, folder / "adapter");
  const auto ours =
      peft::load_safetensors(folder / "adapter/adapter_model.safetensors");
  for (const auto& [key, value] : golden.group("after")) {
    INFO(key);
    REQUIRE(near(ours.at(key), value, 1e-6));
  }
}

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~ the other direction ~~~~~~~~~~~~~~~~~~~~~~~~~~~

TEST_CASE("lora variants: adapters are written for HF PEFT to read") {
  const golden_case::ReverseFolder root;
  const auto write = [&](const std::string& name,
                         const std::string& golden_name,
                         const peft::LoraOptions& options,
                         bool half = false) {
    write_for_peft(root / name, Golden(golden_name), options, half, 0.2);
  };
  const auto fc = [] {
    return peft::LoraOptions(4).alpha(6).targets({"fc1", "fc2"});
  };
  const auto projections = [] {
    return peft::LoraOptions(4).alpha(6).targets({"query", "value"});
  };
  const auto kasa = peft::KasaOptions().beta(0.5);
  write("kasa", "mlp", fc().kasa(kasa));
  write("kasa_rslora", "mlp", fc().kasa(kasa).rslora(true).init("random"));
  write(
      "kasa_lora_bias", "mlp", fc().kasa(kasa).init("kaiming").lora_bias(true));
  write("kasa_head", "mlp", fc().kasa(kasa).modules_to_save({"head"}));
  write(
      "kasa_patterns",
      "patterns",
      projections()
          .kasa(kasa)
          .rank_pattern({{"value", 3}})
          .alpha_pattern({{"query", 5}}));
  write("kasa_bfloat16", "mlp", fc().kasa(kasa), /*half=*/true);
  write("kasa_bert", "bert", projections().kasa(kasa));

  const auto blocks = peft::BdLoraOptions()
                          .target_modules_bd_a({"fc1", "query"})
                          .target_modules_bd_b({"fc2", "value"})
                          .nblocks(2);
  const auto some = peft::BdLoraOptions(blocks).match_strict(false);
  write("bd_lora", "mlp", fc().bd_lora(blocks));
  write(
      "bd_lora_mixed",
      "mlp",
      fc().targets({"fc1", "fc2", "head"}).bd_lora(some));
  write("bd_lora_bert", "bert", projections().bd_lora(blocks).rslora(true));
  write("bd_lora_bfloat16", "mlp", fc().bd_lora(blocks), /*half=*/true);

  const auto drawn = peft::MonteCloraOptions().num_samples(3).buffer_size(2);
  write("monteclora", "mlp", fc().monteclora(drawn));
  write("monteclora_bert", "bert", projections().monteclora(drawn));
  const auto few = peft::VeloraOptions().num_groups(3);
  write("velora", "mlp", fc().velora(few));
  write(
      "velora_random",
      "bert",
      projections().velora(peft::VeloraOptions(few).init_type("random")));
  write(
      "monteclora_gpt2",
      "dora_gpt2",
      peft::LoraOptions(2).targets({"c_fc", "c_proj"}).monteclora(drawn));
}

} // namespace test_golden_lora_variants
