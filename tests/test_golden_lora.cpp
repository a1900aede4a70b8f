// LoRA against HF PEFT: its files load here and give its numbers, ours load
// there (golden/check_with_peft.py reads what the last test writes).

#include "test.h"

#include "golden_case.h"

namespace test_golden_lora {

using namespace golden_case;

TEST_CASE("files of HF PEFT load and give its output, gradients and steps") {
  for (const auto& name : folders("")) {
    if (name == "tied_output") {
      continue; // has its own test
    }
    DYNAMIC_SECTION(name) {
      check_loads(Golden(name));
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
      check_merges(golden);
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
      auto before = config_of(golden.adapter());
      if (before.at("target_modules") == "all-linear") {
        before["target_modules"] = {"fc1", "fc2", "head"};
      }
      const auto after = config_of(directory / "again");
      check_keeps_fields(after, before);
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
  auto config = config_of(given);
  config["modules_to_save"] = {"classifier", "score", "head"};
  std::ofstream(given / "adapter_config.json") << config.dump(2);
  const auto network = golden.network();
  const auto adapter = peft::load(*network.module, given.string());
  REQUIRE(near(golden.run(network), golden.expected.at("output"), 1e-6));
  peft::save(adapter, directory / "again");
  REQUIRE(
      config_of(directory / "again").at("modules_to_save") ==
      config["modules_to_save"]);
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

peft::LoraOptions lora(int64_t r, std::vector<std::string> targets) {
  return peft::LoraOptions(r).alpha(2 * r).targets(peft::Targets(targets));
}

} // namespace

TEST_CASE("adapters of every layer kind are written for HF PEFT to read") {
  const ReverseFolder root;
  const auto write = [&](const std::string& name,
                         const std::string& golden_name,
                         const peft::LoraOptions& options) {
    write_for_peft(root / name, Golden(golden_name), options);
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
      Golden("mlp"),
      lora(8, {"fc1", "fc2"}),
      /*half=*/true);
}

} // namespace test_golden_lora
