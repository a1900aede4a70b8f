#include "test.h"

#include <peft/io/adapter_config.h>

#include <fstream>
#include <iterator>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace test_adapter_config {

namespace {

std::string text_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  REQUIRE(file);
  return {std::istreambuf_iterator<char>(file), {}};
}

using peft::AdapterConfig;
using peft::FlagOrName;
using peft::NamesOrPattern;
using Names = std::vector<std::string>;

} // namespace

TEST_CASE("the LoRA defaults are HF PEFT's", "[config]") {
  const auto config = AdapterConfig::lora_defaults();
  REQUIRE(config.fields().size() == 41);
  REQUIRE(config.dump() == text_of(golden("safetensors/lora_defaults.json")));
}

TEST_CASE("a config that Python wrote is written again alike", "[config]") {
  TemporaryDirectory folder;
  const auto path = folder / "adapter_config.json";
  for (const char* name : {"lora_defaults", "lora_trained", "python"}) {
    INFO(name);
    const auto original = golden(std::string("safetensors/") + name + ".json");
    AdapterConfig::read(original).write(path);
    REQUIRE(text_of(path) == text_of(original));
  }
}

TEST_CASE("fields of a trained adapter are read", "[config]") {
  const auto config =
      AdapterConfig::read(golden("safetensors/lora_trained.json"));
  REQUIRE(config.peft_type() == "LORA");
  REQUIRE(config.get<int64_t>("r") == 4);
  REQUIRE(config.get<double>("lora_alpha") == 16.0); // an integer in the file
  REQUIRE(config.get<double>("lora_dropout") == 0.05);
  REQUIRE(config.get<bool>("use_rslora"));
  REQUIRE(
      config.get<NamesOrPattern>("target_modules") == NamesOrPattern("que.*"));
  REQUIRE(config.get<Names>("modules_to_save") == Names{"head"});
  REQUIRE(
      config.get<std::map<std::string, int64_t>>("rank_pattern") ==
      std::map<std::string, int64_t>{{"query", 2}});
  REQUIRE(
      config.get<std::map<std::string, double>>("alpha_pattern").at("query") ==
      0.5);
  REQUIRE(
      config.get<FlagOrName>("init_lora_weights") == FlagOrName("gaussian"));
  // Null is absent.
  REQUIRE_FALSE(config.has("layers_to_transform"));
  REQUIRE(config.get<std::string>("task_type", "none") == "none");
  REQUIRE(config.get<std::string>("no such field", "none") == "none");
}

TEST_CASE("alternatives keep the kind that the file has", "[config]") {
  const auto config = AdapterConfig::parse(
      R"({"peft_type": "LORA", "list": ["a", "b"], "name": "a|b",
          "on": true, "ranks": {"m": [true, false]}})");
  REQUIRE(
      config.get<NamesOrPattern>("list") == NamesOrPattern(Names{"a", "b"}));
  REQUIRE(
      config.get<NamesOrPattern>("name") == NamesOrPattern(std::string("a|b")));
  REQUIRE(config.get<FlagOrName>("on") == FlagOrName(true));
  REQUIRE(
      config.get<std::map<std::string, std::vector<bool>>>("ranks").at("m") ==
      std::vector<bool>{true, false});
}

TEST_CASE("unknown fields survive", "[config]") {
  TemporaryDirectory folder;
  const auto path = folder / "adapter_config.json";
  auto config = AdapterConfig::parse(
      R"({"peft_type": "LORA", "r": 8, "from_the_future": {"a": [1, 2.5, null]},
          "alpha": 1e16})");
  config.set("r", 4).erase("alpha").erase("never there");
  config.set("targets", NamesOrPattern(Names{"q", "v"}));
  config.set("bias", "none").set("task_type", nullptr);
  config.set("dropout", 0.0).set("scale", 1.0 / 3).set("on", true);
  config.write(path);
  REQUIRE(text_of(path) == R"({
  "bias": "none",
  "dropout": 0.0,
  "from_the_future": {
    "a": [
      1,
      2.5,
      null
    ]
  },
  "on": true,
  "peft_type": "LORA",
  "r": 4,
  "scale": 0.3333333333333333,
  "targets": [
    "q",
    "v"
  ],
  "task_type": null
})");
  REQUIRE(AdapterConfig::read(path).dump() == config.dump());
}

TEST_CASE("a config of the wrong type names field and file", "[config]") {
  const auto config = AdapterConfig::parse(
      R"({"peft_type": "LORA", "r": "8", "alpha": 8.5, "targets": [1],
          "big": 18446744073709551615, "flag": 1, "init": 3})",
      "\"out/adapter_config.json\"");
  const std::vector<std::pair<std::string, std::string>> errors{
      {error_of([&] { config.get<int64_t>("r"); }),
       "\"r\" must be an integer, found \"8\""},
      {error_of([&] { config.get<int64_t>("alpha"); }),
       "\"alpha\" must be an integer, found 8.5"},
      {error_of([&] { config.get<int64_t>("big"); }), "\"big\" must be"},
      {error_of([&] { config.get<bool>("flag"); }),
       "\"flag\" must be true or false, found 1"},
      {error_of([&] { config.get<Names>("targets"); }),
       "must be a list, each member a string, found [1]"},
      {error_of([&] { config.get<NamesOrPattern>("targets"); }),
       "must be a list, each member a string, or a string, found [1]"},
      {error_of([&] { config.get<FlagOrName>("init"); }),
       "must be true or false, or a string, found 3"},
      {error_of([&] { config.get<std::map<std::string, double>>("targets"); }),
       "must be an object, each value a number"},
      {error_of([&] { config.get<double>("lora_alpha"); }),
       "has no \"lora_alpha\", which must be a number"},
      // A wrong type is an error even where there is a fallback.
      {error_of([&] { config.get<int64_t>("r", 8); }), "must be an integer"},
  };
  for (const auto& [error, text] : errors) {
    INFO(error);
    REQUIRE(contains(error, text));
    REQUIRE(contains(error, "out/adapter_config.json"));
  }
}

TEST_CASE("what is no config is refused", "[config]") {
  const std::vector<std::pair<std::string, std::string>> bad{
      {"", "not valid JSON"},
      {"{\"peft_type\": ", "not valid JSON"},
      {"{\"peft_type\": \"LORA\"} x", "not valid JSON"},
      {"[1]", "must be a JSON object, found array"},
      {"{}", "has no \"peft_type\""},
      {"{\"peft_type\": null}", "has no \"peft_type\""},
      {"{\"peft_type\": 3}", "\"peft_type\" must be a string, found 3"},
      {R"({"peft_type": "LORA", "r": 8, "r": 4})",
       "the key \"r\" is given twice"},
      {R"({"peft_type": "LORA", "x": {"r": 8, "r": 4}})",
       "the key \"r\" is given twice"},
      {R"({"peft_type": "LORA", "x": NaN})", "not valid JSON"},
      {R"({"peft_type": "LORA", "x": 18446744073709551616})",
       "the integer 18446744073709551616 does not fit"},
      {"\xEF\xBB\xBF{}", "byte order mark"},
      {std::string("{}\0", 3), "zero byte"},
      {std::string(1000, '['), "nested deeper than"},
      {"{\"peft_type\": \"\xff\"}", "not valid JSON"},
  };
  TemporaryDirectory folder;
  const auto path = folder / "adapter_config.json";
  for (const auto& [text, expected] : bad) {
    std::ofstream(path, std::ios::binary) << text;
    const auto error = error_of([&] { AdapterConfig::read(path); });
    INFO(error);
    REQUIRE(contains(error, expected));
    REQUIRE(contains(error, path));
  }
  REQUIRE(contains(
      error_of([&] { AdapterConfig::read(folder / "absent.json"); }),
      "absent.json"));
  REQUIRE(contains(
      error_of([&] { AdapterConfig::read(folder.path().string()); }),
      folder.path().string()));
}

TEST_CASE("a config that cannot be written leaves the old file", "[config]") {
  TemporaryDirectory folder;
  const auto path = folder / "adapter_config.json";
  auto config = AdapterConfig::lora_defaults();
  config.write(path);
  const auto before = text_of(path);

  config.set("lora_alpha", std::numeric_limits<double>::infinity());
  REQUIRE(contains(error_of([&] { config.write(path); }), "number inf"));
  config.set("lora_alpha", 8).set("bias", "\xff");
  REQUIRE(contains(error_of([&] { config.write(path); }), "UTF-8"));
  REQUIRE(text_of(path) == before);
  REQUIRE(
      std::distance(
          std::filesystem::directory_iterator(folder.path()),
          std::filesystem::directory_iterator()) == 1);
}

} // namespace test_adapter_config
