// The weight deltas of HF PEFT beside LoRA: its files load here and give its
// numbers, ours load there (golden/check_with_peft.py reads what the last test
// writes).

#include "test.h"

#include "golden_case.h"

using namespace golden_case;

namespace {

const std::string kSet = "tuners";

} // namespace

TEST_CASE("tuners: files of HF PEFT load and give its numbers") {
  for (const auto& name : folders("", kSet)) {
    DYNAMIC_SECTION(name) {
      check_loads(Golden(name, kSet));
    }
  }
}

TEST_CASE("tuners: merging a file of HF PEFT gives its merged weights") {
  for (const auto& name : folders("", kSet)) {
    DYNAMIC_SECTION(name) {
      check_merges(Golden(name, kSet));
    }
  }
}

TEST_CASE("tuners: a loaded adapter is saved as it was loaded") {
  for (const auto& name : folders("", kSet)) {
    DYNAMIC_SECTION(name) {
      const Golden golden(name, kSet);
      const auto network = golden.network();
      const auto adapter = peft::load(*network.module, golden.adapter());
      const TemporaryDirectory directory;
      peft::save(adapter, directory / "again");
      const auto saved = peft::load_safetensors(
          golden.adapter() + "/adapter_model.safetensors");
      const auto again =
          peft::load_safetensors(directory / "again/adapter_model.safetensors");
      REQUIRE(again.size() == saved.size());
      for (const auto& [key, value] : saved) {
        INFO(key);
        REQUIRE(again.count(key) == 1);
        REQUIRE(equal_bits(again.at(key), value.to(torch::kFloat)));
      }
      const auto before =
          read_json_file(fs::path(golden.adapter()) / "adapter_config.json");
      const auto after =
          read_json_file(directory / "again/adapter_config.json");
      for (const auto& item : before.items()) {
        INFO(item.key());
        REQUIRE(after.contains(item.key()));
        REQUIRE(
            as_read(item.key(), after.at(item.key())) ==
            as_read(item.key(), item.value()));
      }
      REQUIRE(after.size() == before.size());
    }
  }
}

TEST_CASE("tuners: initial values are HF PEFT's after the same seed") {
  for (const auto& name : folders("init_", kSet)) {
    DYNAMIC_SECTION(name) {
      const Golden golden(name, kSet);
      const auto network = golden.network();
      seed(golden.facts.at("seed").get<uint64_t>());
      const auto adapter = peft::load(
          *network.module,
          golden.adapter(),
          "default",
          peft::LoadOptions().strict(false));
      const auto parameters = adapter.named_parameters();
      for (const auto& [key, value] : golden.group("initial")) {
        INFO(key);
        REQUIRE(equal_bits(find(parameters, key), value));
      }
    }
  }
}
