// Every field of HF PEFT's LoraConfig: honoured, kept, or refused where it
// would change the function and libpeft has no such function.

#include "test.h"

#include "networks.h"

#include <nlohmann/json.hpp>

#include <fstream>
#include <functional>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace test_lora_config {

using nlohmann::json;
using torch::Tensor;

namespace {

json read_json_file(const std::string& path) {
  std::ifstream file(path);
  REQUIRE(file.good());
  return json::parse(file);
}

json defaults() {
  return json::parse(peft::AdapterConfig::lora_defaults().dump());
}

/// What a config makes of a network.
struct Loaded {
  networks::Network network;
  peft::Adapter adapter;
  json again; // the config as it is saved

  const peft::LoraOptions& options() const {
    return std::any_cast<const peft::LoraOptions&>(
        adapter.shared_state()->options);
  }
  std::vector<std::string> names() const {
    std::vector<std::string> result;
    for (const auto& site : adapter.sites()) {
      result.push_back(site.name);
    }
    return result;
  }
  /// s of the site of that name.
  double scaling(const std::string& name) const {
    for (const auto& site : adapter.shared_state()->sites) {
      if (site.name == name) {
        return dynamic_cast<const peft::LoraDelta&>(*site.delta)
            .config()
            .scaling;
      }
    }
    FAIL("no site " << name);
    return 0;
  }
  /// Numbers of lora_A.
  torch::IntArrayRef shape_of_A(const std::string& name) const {
    const auto all = adapter.named_parameters();
    REQUIRE(all.contains(name + ".lora_A.weight"));
    return all[name + ".lora_A.weight"].sizes();
  }
};

/// Loads the defaults with `changes`, on a network of networks.h, from a folder
/// whose weights file is empty.
Loaded load(const std::string& network_name, const json& changes) {
  TemporaryDirectory folder;
  json config = defaults();
  config["target_modules"] = {"fc1"};
  config.update(changes);
  std::ofstream(folder / "adapter_config.json") << config.dump();
  peft::save_safetensors(
      std::map<std::string, Tensor>{}, folder / "adapter_model.safetensors");
  Loaded result;
  result.network = networks::build(network_name);
  result.adapter = peft::load(
      *result.network.module,
      folder.path().string(),
      "default",
      peft::LoadOptions().strict(false));
  peft::save(result.adapter, folder / "again");
  result.again = read_json_file(folder / "again/adapter_config.json");
  return result;
}

std::string error_for(const std::string& network_name, const json& changes) {
  return error_of([&] { load(network_name, changes); });
}

using Names = std::vector<std::string>;
const json kQueryValue = {{"target_modules", {"query", "value"}}};

/// The checks of each field; the last test sees to it that none is left out.
std::vector<std::pair<std::string, std::function<void()>>> fields() {
  std::vector<std::pair<std::string, std::function<void()>>> rows;
  // Fields that say nothing about the function: kept as they were.
  const std::vector<std::pair<std::string, json>> kept{
      {"auto_mapping",
       {{"base_model_class", "Mlp"}, {"parent_library", "networks"}}},
      {"base_model_name_or_path", "some/model"},
      {"corda_config", {{"corda_method", "ipm"}}},
      {"eva_config", {{"rho", 2.0}}},
      {"loftq_config", {{"loftq_bits", 4}}},
      {"lora_ga_config", {{"direction", "ArB2r"}}},
      {"megatron_core", "megatron.core"},
      {"peft_version", "0.17.0"},
      {"qalora_group_size", 32},
      {"revision", "main"},
      {"task_type", "FEATURE_EXTRACTION"},
  };
  for (const auto& item : kept) {
    rows.emplace_back(item.first, [item] {
      const auto loaded = load("mlp", {{item.first, item.second}});
      CHECK(loaded.names() == Names{"fc1"});
      CHECK(loaded.again.at(item.first) == item.second);
    });
  }
  // Other functions: refused when they are active.
  const std::vector<std::pair<std::string, std::vector<json>>> refused{
      {"alora_invocation_tokens", {json::array({1, 2})}},
      {"arrow_config", {json::object(), json({{"top_k", 1}})}},
      {"layer_replication", {json::array({json::array({0, 2})})}},
      {"megatron_config", {json({{"tensor_model_parallel_size", 2}})}},
      {"use_qalora", {true}},
  };
  for (const auto& item : refused) {
    rows.emplace_back(item.first, [item] {
      for (const auto& value : item.second) {
        INFO(value.dump());
        const auto error = error_for("mlp", {{item.first, value}});
        INFO(error);
        CHECK(contains(error, item.first + " is set in adapter_config.json"));
        CHECK(contains(error, "libpeft does not have it"));
      }
    });
  }
  for (const std::string field :
       {"alora_invocation_tokens", "layer_replication", "megatron_config"}) {
    rows.emplace_back(field, [field] { // PEFT passes over these
      const json empty =
          field == "megatron_config" ? json::object() : json::array();
      CHECK(load("mlp", {{field, empty}}).again.at(field) == empty);
    });
  }
  const auto add = [&](const std::string& field, std::function<void()> check) {
    rows.emplace_back(field, std::move(check));
  };
  add("kasa_config", [] {
    const auto plain = load("mlp", {{"r", 4}, {"kasa_config", json::object()}});
    CHECK(plain.options().kasa()->beta() == 1e-4);
    CHECK(plain.options().kasa()->gamma() == 1e-3);
    CHECK(plain.adapter.named_parameters().contains("fc1.lora_diag"));
    const json section = {{"beta", 0.5}, {"future", "kept"}};
    const auto loaded = load("mlp", {{"r", 4}, {"kasa_config", section}});
    CHECK(loaded.options().kasa()->beta() == 0.5);
    CHECK(
        loaded.again.at("kasa_config") ==
        json({{"beta", 0.5}, {"future", "kept"}, {"gamma", 1e-3}}));
    CHECK(contains(
        error_for("mlp", {{"kasa_config", true}}),
        "\"kasa_config\" in adapter_config.json must be null or an object"));
    CHECK(contains(
        error_for("mlp", {{"r", 4}, {"kasa_config", {{"gamma", -1}}}}),
        "must not be negative"));
  });
  add("velora_config", [] {
    const auto plain = load("mlp", {{"velora_config", json::object()}});
    CHECK(plain.options().velora()->num_groups() == 64);
    CHECK(plain.options().velora()->init_type() == "batch_average");
    const json section = {
        {"init_type", "random"}, {"num_groups", 4}, {"scale", 0.5}};
    const auto loaded = load("mlp", {{"velora_config", section}});
    CHECK(loaded.again.at("velora_config") == section);
    CHECK(contains(
        error_for("mlp", {{"velora_config", {{"init_type", "mean"}}}}),
        "init_type of VeLoRA must be"));
    CHECK(contains(
        error_for("mlp", {{"velora_config", {{"scale", 0}}}}),
        "num_groups and scale of VeLoRA must be positive"));
  });
  add("use_bdlora", [] {
    const json section = {
        {"match_strict", true},
        {"nblocks", 2},
        {"target_modules_bd_a", {"fc1"}},
        {"target_modules_bd_b", nullptr}};
    const auto loaded = load("mlp", {{"r", 4}, {"use_bdlora", section}});
    CHECK(loaded.shape_of_A("fc1") == torch::IntArrayRef({4, 5}));
    CHECK(loaded.again.at("use_bdlora") == section);
    CHECK(contains(
        error_for("mlp", {{"use_bdlora", json::object()}}),
        "names the target 'fc1'"));
  });
  add("monteclora_config", [] {
    const auto plain = load("mlp", {{"monteclora_config", json::object()}});
    const auto& o = *plain.options().monteclora();
    CHECK(o.num_samples() == 8);
    CHECK(o.buffer_size() == 150);
    const json section = {
        {"buffer_size", 3},
        {"dirichlet_prior", 0.5},
        {"kl_loss_weight", 1e-3},
        {"num_samples", 2},
        {"sample_scaler", 0.25},
        {"use_entropy", true}};
    const auto loaded = load("mlp", {{"monteclora_config", section}});
    CHECK(loaded.again.at("monteclora_config") == section);
    CHECK(
        loaded.adapter
            .named_parameters()["fc1.lora_monteclora_sampler.expert_weights_"
                                "prior"]
            .numel() == 2);
    CHECK(contains(
        error_for("mlp", {{"monteclora_config", {{"num_samples", 0}}}}),
        "must be positive"));
  });
  add("r", [] {
    CHECK(load("mlp", {{"r", 3}}).shape_of_A("fc1")[0] == 3);
    CHECK(contains(error_for("mlp", {{"r", 0}}), "r must be positive"));
    CHECK(contains(error_for("mlp", {{"r", 2.5}}), "\"r\" must be an integer"));
  });
  add("lora_alpha", [] {
    CHECK(load("mlp", {{"r", 4}, {"lora_alpha", 6}}).scaling("fc1") == 1.5);
    const auto loaded = load("mlp", {{"lora_alpha", 0.5}});
    CHECK(loaded.scaling("fc1") == 0.5 / 8);
    CHECK(loaded.again.at("lora_alpha") == json(0.5));
    CHECK(load("mlp", {{"lora_alpha", 16}})
              .again.at("lora_alpha")
              .is_number_integer());
  });
  add("lora_dropout", [] {
    CHECK(load("mlp", {{"lora_dropout", 0.25}}).options().dropout() == 0.25);
    CHECK(contains(
        error_for("mlp", {{"lora_dropout", 1}}), "dropout must lie in"));
  });
  add("use_rslora", [] {
    CHECK(
        load("mlp", {{"r", 4}, {"lora_alpha", 6}, {"use_rslora", true}})
            .scaling("fc1") == 3.0);
  });
  add("use_dora", [] {
    const auto loaded = load("mlp", {{"use_dora", true}});
    CHECK(loaded.adapter.named_parameters().contains(
        "fc1.lora_magnitude_vector"));
  });
  add("lora_bias", [] {
    const auto loaded = load("mlp", {{"lora_bias", true}});
    CHECK(loaded.adapter.named_parameters().contains("fc1.lora_B.bias"));
    CHECK(contains(
        error_for("mlp", {{"lora_bias", true}, {"use_dora", true}}),
        "dora goes with neither lora_bias"));
  });
  add("bias", [] {
    CHECK(load("mlp", {{"bias", "none"}}).names() == Names{"fc1"});
    const auto own = load("mlp", {{"bias", "lora_only"}});
    CHECK(own.names() == Names{"fc1", "fc1.bias"});
    CHECK(own.adapter.named_parameters().contains("fc1.base_layer.bias"));
    const auto all = load("mlp", {{"bias", "all"}});
    CHECK(all.names() == Names{"fc1", "fc1.bias", "fc2.bias", "head.bias"});
    CHECK(all.adapter.named_parameters().contains("fc2.bias"));
    CHECK(contains(error_for("mlp", {{"bias", "some"}}), "bias must be"));
  });
  add("modules_to_save", [] {
    const auto loaded = load("mlp", {{"modules_to_save", {"head"}}});
    CHECK(loaded.names() == Names{"fc1", "head.weight", "head.bias"});
  });
  add("rank_pattern", [] {
    const auto loaded = load(
        "mlp",
        {{"target_modules", {"fc1", "fc2"}},
         {"rank_pattern", {{"fc2", 2}, {"f.*", 5}}}});
    CHECK(loaded.shape_of_A("fc1")[0] == 5);
    CHECK(loaded.shape_of_A("fc2")[0] == 5); // the first that fits
    CHECK(contains(
        error_for("mlp", {{"rank_pattern", {{"fc1", 0}}}}),
        "must be a positive integer"));
  });
  add("alpha_pattern", [] {
    const auto loaded = load(
        "mlp",
        {{"target_modules", {"fc1", "fc2"}}, {"alpha_pattern", {{"^fc2", 4}}}});
    CHECK(loaded.scaling("fc1") == 1);
    CHECK(loaded.scaling("fc2") == 0.5);
  });
  add("target_modules", [] {
    CHECK(load("mlp", {{"target_modules", {"fc2"}}}).names() == Names{"fc2"});
    CHECK(
        load("mlp", {{"target_modules", "fc[12]"}}).names() ==
        Names{"fc1", "fc2"});
    CHECK(
        load("mlp", {{"target_modules", "all-linear"}}).names() ==
        Names{"fc1", "fc2", "head"});
    for (const json& nothing : {json(nullptr), json::array()}) {
      CHECK(contains(
          error_for("mlp", {{"target_modules", nothing}}),
          "neither target_modules nor target_parameters"));
    }
  });
  add("target_parameters", [] {
    for (const json& nothing : {json(nullptr), json::array()}) {
      const auto loaded = load(
          "mlp",
          {{"target_modules", nothing}, {"target_parameters", {"fc2.weight"}}});
      CHECK(loaded.names() == Names{"fc2.weight"});
      CHECK(loaded.shape_of_A("fc2") == torch::IntArrayRef({8, 16}));
      CHECK(loaded.again.at("target_modules") == nothing);
      CHECK(loaded.again.at("target_parameters") == json({"fc2.weight"}));
    }
    CHECK(contains(
        error_for("mlp", {{"target_parameters", "fc2.weight"}}),
        "\"target_parameters\" must be a list"));
  });
  add("exclude_modules", [] {
    json changes = kQueryValue;
    changes["exclude_modules"] = {"value", "decoder.block.0.query"};
    CHECK(
        load("stack", changes).names() ==
        Names{
            "encoder.layer.0.query",
            "encoder.layer.1.query",
            "encoder.layer.2.query",
            "decoder.block.1.query"});
    changes["exclude_modules"] = "encoder.*|.*value";
    CHECK(
        load("stack", changes).names() ==
        Names{"decoder.block.0.query", "decoder.block.1.query"});
  });
  add("layers_to_transform", [] {
    json changes = {{"target_modules", {"query"}}};
    changes["layers_to_transform"] = 1;
    const auto one = load("stack", changes);
    CHECK(
        one.names() == Names{"encoder.layer.1.query", "decoder.block.1.query"});
    changes["layers_to_transform"] = {0, 2};
    const auto two = load("stack", changes);
    CHECK(
        two.names() ==
        Names{
            "encoder.layer.0.query",
            "encoder.layer.2.query",
            "decoder.block.0.query"});
    CHECK(two.again.at("layers_to_transform") == json({0, 2}));
  });
  add("layers_pattern", [] {
    json changes = {{"target_modules", {"query"}}, {"layers_to_transform", 1}};
    for (const json& pattern : {json("layer"), json({"layer"})}) {
      changes["layers_pattern"] = pattern;
      CHECK(load("stack", changes).names() == Names{"encoder.layer.1.query"});
    }
    CHECK(contains(
        error_for(
            "stack",
            {{"target_modules", {"query"}}, {"layers_pattern", "layer"}}),
        "no layers are given"));
  });
  add("fan_in_fan_out", [] {
    // Conv1D is [in, out] in any case, Linear never.
    for (const bool flag : {false, true}) {
      CHECK(
          load(
              "gpt2_mlp",
              {{"target_modules", {"c_fc"}}, {"fan_in_fan_out", flag}})
              .shape_of_A("c_fc") == torch::IntArrayRef({8, 6}));
      CHECK(
          load("mlp", {{"fan_in_fan_out", flag}}).shape_of_A("fc1") ==
          torch::IntArrayRef({8, 10}));
    }
  });
  add("trainable_token_indices", [] {
    const auto list = load(
        "causal_tokens",
        {{"target_modules", {"lm_head"}}, {"trainable_token_indices", {3, 1}}});
    CHECK(list.names() == Names{"lm_head", "embed_tokens"});
    CHECK(list.again.at("trainable_token_indices") == json({3, 1}));
    CHECK(list.adapter.named_parameters().contains(
        "embed_tokens.token_adapter.trainable_tokens_delta"));
    const json by_name = {{"emb", {2}}};
    const auto map = load(
        "tokens",
        {{"target_modules", {"fc"}}, {"trainable_token_indices", by_name}});
    CHECK(map.names() == Names{"fc", "emb"});
    CHECK(map.again.at("trainable_token_indices") == by_name);
    CHECK(contains(
        error_for("mlp", {{"trainable_token_indices", {1}}}),
        "no embedding of this network"));
  });
  add("ensure_weight_tying", [] {
    const auto loaded = load("mlp", {{"ensure_weight_tying", true}});
    CHECK(loaded.again.at("ensure_weight_tying"));
  });
  add("init_lora_weights", [] {
    CHECK(
        load("mlp", {{"init_lora_weights", true}}).options().init() ==
        "kaiming");
    CHECK(
        load("mlp", {{"init_lora_weights", false}}).options().init() ==
        "random");
    CHECK(
        load("mlp", {{"init_lora_weights", "gaussian"}}).options().init() ==
        "gaussian");
    CHECK(contains(
        error_for("mlp", {{"init_lora_weights", "loftq"}}),
        "init_lora_weights"));
  });
  add("inference_mode", [] {
    CHECK(load("mlp", {{"inference_mode", false}}).again.at("inference_mode"));
  });
  add("peft_type", [] {
    CHECK(contains(error_for("mlp", {{"peft_type", "LORE"}}), "LORE"));
  });
  return rows;
}

} // namespace

TEST_CASE("each field of LoraConfig has its say", "[config]") {
  for (const auto& [field, check] : fields()) {
    INFO(field);
    const auto error = error_of(check);
    CHECK(error == "");
  }
}

TEST_CASE("no field of LoraConfig is left out", "[config]") {
  std::set<std::string> checked;
  for (const auto& row : fields()) {
    checked.insert(row.first);
  }
  const json all = defaults();
  for (const auto& item : all.items()) {
    INFO(item.key());
    CHECK(checked.count(item.key()) == 1);
  }
  CHECK(checked.size() == all.size());
}

TEST_CASE("a fresh config says what was asked and HF's defaults", "[config]") {
  struct Row {
    std::string network;
    peft::LoraOptions options;
    json changes;
  };
  using peft::LoraOptions;
  using peft::Targets;
  const std::vector<Row> rows{
      {"mlp",
       LoraOptions(4).targets({"fc1"}),
       {{"r", 4},
        {"target_modules", {"fc1"}},
        {"init_lora_weights", "gaussian"}}},
      {"stack",
       LoraOptions(8)
           .alpha(12.5)
           .dropout(0.1)
           .rslora(true)
           .init("kaiming")
           .bias("all")
           .targets({"query"})
           .exclude(Targets::regex(".*layer\\.0.*"))
           .layers({1})
           .layers_pattern({"layer"})
           .rank_pattern({{"query", 3}})
           .alpha_pattern({{"query", 5}}),
       {{"lora_alpha", 12.5},
        {"lora_dropout", 0.1},
        {"use_rslora", true},
        {"bias", "all"},
        {"target_modules", {"query"}},
        {"exclude_modules", ".*layer\\.0.*"},
        {"layers_to_transform", {1}},
        {"layers_pattern", {"layer"}},
        {"rank_pattern", {{"query", 3}}},
        {"alpha_pattern", {{"query", 5}}}}},
      {"mlp",
       LoraOptions(8)
           .dora(true)
           .init("random")
           .targets(Targets::regex("fc."))
           .modules_to_save({"head"}),
       {{"use_dora", true},
        {"init_lora_weights", false},
        {"target_modules", "fc."},
        {"modules_to_save", {"head"}}}},
      {"mlp",
       LoraOptions(8).lora_bias(true).init("kaiming").targets(Targets::where(
           [](const std::string& name, const auto&) { return name == "fc2"; })),
       {{"lora_bias", true}, {"target_modules", {"fc2"}}}},
      {"gpt2_mlp",
       LoraOptions(2).init("kaiming").targets({"c_fc"}),
       {{"r", 2}, {"fan_in_fan_out", true}, {"target_modules", {"c_fc"}}}},
      {"experts",
       LoraOptions(2).init("kaiming").target_parameters(
           {"experts.up", "router"}),
       {{"r", 2},
        {"target_modules", json::array()},
        {"target_parameters", {"experts.up", "router"}}}},
      {"causal_tokens",
       LoraOptions(2)
           .init("kaiming")
           .targets({"lm_head"})
           .trainable_token_indices({4, 2}),
       {{"r", 2},
        {"target_modules", {"lm_head"}},
        {"trainable_token_indices", {4, 2}}}},
      {"tokens",
       LoraOptions(2).init("kaiming").targets({"fc"}).trainable_token_indices(
           {{"emb", {4}}}),
       {{"r", 2},
        {"target_modules", {"fc"}},
        {"trainable_token_indices", {{"emb", {4}}}}}},
  };
  for (const auto& row : rows) {
    INFO(row.changes.dump());
    const auto network = networks::build(row.network);
    const auto adapter = peft::attach(*network.module, row.options);
    const TemporaryDirectory folder;
    peft::save(adapter, folder / "a");
    json expected = defaults();
    expected["inference_mode"] = true;
    expected.update(row.changes);
    CHECK(
        read_json_file(folder / "a/adapter_config.json").dump(1) ==
        expected.dump(1));
  }
}

} // namespace test_lora_config
