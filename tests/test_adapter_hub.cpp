/// Files of bottleneck adapters: what AdapterHub's `adapters` wrote loads and
/// gives its numbers (golden/data/additive), ours come back, in its form or in
/// libpeft's own.

#include "model_state.h"
#include "networks.h"
#include "test.h"
#include "tiny_models.h"

#include <peft/methods/houlsby.h>
#include <peft/methods/parallel_adapter.h>
#include <peft/methods/pfeiffer.h>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace test_adapter_hub {

namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using peft::HoulsbyOptions;
using peft::ParallelAdapterOptions;
using peft::PfeifferOptions;
using tiny_models::Tensors;
using torch::Tensor;

json read_json_file(const fs::path& path) {
  std::ifstream file(path);
  REQUIRE(file.good());
  return json::parse(file);
}

void write_text(const fs::path& path, const std::string& text) {
  std::ofstream(path) << text;
}

Comparison near(const Tensor& a, const Tensor& b, double relative) {
  return close(
      a, b, 0, relative * b.to(torch::kDouble).abs().max().item<double>());
}

/// One case of data/additive.
struct Golden {
  explicit Golden(const std::string& name)
      : folder(fs::path(golden("additive")) / name),
        facts(read_json_file(folder / "case.json")),
        reference(peft::load_safetensors(
            (folder / "reference.safetensors").string())) {}

  std::string adapter() const {
    return (folder / "adapter").string();
  }
  tiny_models::Network network() const {
    return tiny_models::load(facts.at("network").get<std::string>());
  }
  /// T5's scores are not divided by the root of their width: rounding weighs
  /// more there.
  double tolerance() const {
    return facts.at("network").get<std::string>().find("t5") == 0 ? 5e-6 : 1e-6;
  }

  fs::path folder;
  json facts;
  Tensors reference;
};

const std::vector<std::string>& cases() {
  static const std::vector<std::string> all{
      "houlsby_bert",
      "houlsby_gelu_roberta",
      "houlsby_gpt2",
      "houlsby_llama",
      "houlsby_t5_v1_0",
      "houlsby_cross_t5_v1_1",
      "pfeiffer_bert",
      "pfeiffer_leave_out_bert",
      "pfeiffer_gpt2",
      "pfeiffer_leave_out_llama",
      "pfeiffer_t5_v1_1",
      "pfeiffer_leave_out_t5_v1_0",
      "parallel_bert",
      "parallel_learned_bert"};
  return all;
}

/// The tensors of both weights files of a folder.
Tensors file_tensors(const fs::path& folder) {
  Tensors result =
      peft::load_safetensors((folder / "adapter.safetensors").string());
  if (fs::exists(folder / "model_head.safetensors")) {
    result.merge(
        peft::load_safetensors((folder / "model_head.safetensors").string()));
  }
  return result;
}

/// The parameters of an adapter by the keys of adapter-hub's file: saved once
/// with values that tell them apart.
std::map<std::string, Tensor> by_hub_key(const peft::Adapter& adapter) {
  torch::NoGradGuard no_grad;
  std::vector<Tensor> before;
  double number = 1;
  for (auto& p : adapter.parameters()) {
    before.push_back(p.clone());
    p.fill_(number++);
  }
  TemporaryDirectory folder;
  peft::save(adapter, folder / "a");
  const auto parameters = adapter.parameters();
  std::map<std::string, Tensor> result;
  for (const auto& [key, value] : file_tensors(folder.path() / "a")) {
    const auto index = static_cast<size_t>(value.flatten()[0].item<double>());
    result.emplace(key, parameters.at(index - 1));
  }
  for (size_t i = 0; i < before.size(); ++i) {
    adapter.parameters()[i].copy_(before[i]);
  }
  return result;
}

} // namespace

TEST_CASE("adapter-hub's files give adapter-hub's outputs and training") {
  for (const auto& name : cases()) {
    DYNAMIC_SECTION(name) {
      const Golden golden(name);
      const auto network = golden.network();
      const auto plain = state_of(*network.module);
      auto adapter =
          peft::load(*network.module, golden.adapter(), "bottleneck");
      CHECK(
          adapter.num_parameters() ==
          golden.facts.at("trainable").get<int64_t>());
      const auto parameters = by_hub_key(adapter);
      torch::optim::SGD optimizer(
          adapter.parameters(),
          torch::optim::SGDOptions(
              golden.facts.at("learning_rate").get<double>()));
      for (int step = 0; step < golden.facts.at("steps").get<int>(); ++step) {
        optimizer.zero_grad();
        const auto output = network.run(golden.reference);
        const auto loss = network.loss(output, golden.reference);
        loss.backward();
        if (step == 0) {
          CHECK(
              near(output, golden.reference.at("output"), golden.tolerance()));
          CHECK(near(
              loss.reshape({1}),
              golden.reference.at("loss"),
              golden.tolerance()));
        }
        for (const auto& [key, parameter] : parameters) {
          if (step == 0) {
            INFO(key);
            REQUIRE(golden.reference.count("gradient." + key) == 1);
            CHECK(near(
                parameter.grad(),
                golden.reference.at("gradient." + key),
                1e-5));
          }
        }
        optimizer.step();
      }
      for (const auto& [key, parameter] : parameters) {
        INFO(key);
        CHECK(near(parameter, golden.reference.at("step." + key), 1e-5));
      }
      adapter.detach();
      CHECK(same_state(state_of(*network.module), plain));
    }
  }
}

TEST_CASE("adapter-hub's files are written again as they were") {
  for (const auto& name : cases()) {
    DYNAMIC_SECTION(name) {
      const Golden golden(name);
      const auto network = golden.network();
      auto adapter =
          peft::load(*network.module, golden.adapter(), "bottleneck");
      TemporaryDirectory folder;
      peft::save(adapter, folder / "a");
      const auto expected = file_tensors(golden.adapter());
      const auto found = file_tensors(folder.path() / "a");
      REQUIRE(found.size() == expected.size());
      for (const auto& [key, value] : expected) {
        INFO(key);
        REQUIRE(found.count(key) == 1);
        CHECK(equal_bits(found.at(key), value));
      }
      auto config = read_json_file(folder.path() / "a/adapter_config.json");
      config.erase("inference_mode");
      CHECK(
          config ==
          read_json_file(golden.folder / "adapter/adapter_config.json"));

      // The same from options alone: every field of "config" is said.
      const auto fresh = golden.network();
      auto options = adapter.shared_state()->options;
      peft::Adapter made;
      if (auto* o = std::any_cast<HoulsbyOptions>(&options)) {
        made = peft::attach(*fresh.module, *o, "bottleneck");
      } else if (auto* p = std::any_cast<PfeifferOptions>(&options)) {
        made = peft::attach(*fresh.module, *p, "bottleneck");
      } else {
        made = peft::attach(
            *fresh.module,
            std::any_cast<ParallelAdapterOptions&>(options),
            "bottleneck");
      }
      peft::save(made, folder / "b");
      const auto ours = read_json_file(folder.path() / "b/adapter_config.json");
      const auto theirs =
          read_json_file(golden.folder / "adapter/adapter_config.json");
      CHECK(ours.at("config") == theirs.at("config"));
      CHECK(ours.at("version") == theirs.at("version"));
      CHECK(ours.at("name") == theirs.at("name"));
      CHECK(ours.at("hidden_size") == theirs.at("hidden_size"));
      CHECK(file_tensors(folder.path() / "b").size() == expected.size());
      const auto again = golden.network();
      peft::load(*again.module, folder / "b");
      CHECK(equal_bits(
          again.run(golden.reference).detach(),
          fresh.run(golden.reference).detach()));
    }
  }
}

TEST_CASE("adapter-hub's pickled files give the same") {
  const Golden golden("pfeiffer_bert");
  const auto network = golden.network();
  auto adapter =
      peft::load(*network.module, (golden.folder / "adapter_bin").string());
  CHECK(
      near(network.run(golden.reference), golden.reference.at("output"), 1e-6));
  CHECK(
      adapter.num_parameters() == golden.facts.at("trainable").get<int64_t>());
}

TEST_CASE("a file from a network with a head fits the one without") {
  const Golden golden("houlsby_gpt2");
  const auto network = golden.network();
  peft::load(*network.module, golden.adapter());
  peft::models::Gpt2Model bare(decoders::Gpt2::options());
  auto adapter = peft::load(*bare, golden.adapter());
  CHECK(
      adapter.num_parameters() == golden.facts.at("trainable").get<int64_t>());
  TemporaryDirectory folder;
  peft::save(adapter, folder / "a");
  const auto other = golden.network(); // and the other way
  auto again = peft::load(*other.module, folder / "a");
  CHECK(near(other.run(golden.reference), golden.reference.at("output"), 1e-6));
}

TEST_CASE("what adapter-hub's fields say and libpeft has not is refused") {
  for (const char* name :
       {"parallel_gpt2", "parallel_learned_llama", "parallel_t5_v1_0"}) {
    INFO(name);
    const Golden golden(name);
    const auto network = golden.network();
    const auto before = state_of(*network.module);
    CHECK(contains(
        error_of([&] { peft::load(*network.module, golden.adapter()); }),
        "reads what flows past the feed-forward"));
    CHECK(same_state(state_of(*network.module), before));
  }
  struct Row {
    std::string name, field;
    json value;
  };
  const std::vector<Row> rows{
      {"houlsby_bert", "phm_layer", true},
      {"houlsby_bert", "use_gating", true},
      {"houlsby_bert", "inv_adapter", "nice"},
      {"houlsby_bert", "stochastic_depth", 0.1},
      {"houlsby_bert", "original_ln_after", false},
      {"houlsby_bert", "output_adapter", false},
      {"houlsby_bert", "mh_adapter", false},
      {"houlsby_bert", "scaling", 2.0},
      {"houlsby_bert", "scaling", "learned"},
      {"houlsby_bert", "dropout", 0.5},
      {"houlsby_bert", "ln_before", true},
      {"houlsby_bert", "ln_after", true},
      {"houlsby_bert", "reduction_factor", {{"default", 4}}},
      {"pfeiffer_bert", "mh_adapter", true},
      {"pfeiffer_bert", "cross_adapter", true},
      {"pfeiffer_bert", "residual_before_ln", "post_add"},
      {"pfeiffer_bert", "residual_before_ln", false},
      {"parallel_bert", "scaling", "channel"}};
  for (const auto& row : rows) {
    INFO(row.name << " " << row.field << " " << row.value.dump());
    const Golden golden(row.name);
    TemporaryDirectory folder;
    fs::copy(golden.adapter(), folder.path() / "a");
    auto config = read_json_file(folder.path() / "a/adapter_config.json");
    config["config"][row.field] = row.value;
    write_text(folder.path() / "a/adapter_config.json", config.dump());
    const auto network = golden.network();
    const auto before = state_of(*network.module);
    const auto error =
        error_of([&] { peft::load(*network.module, folder / "a"); });
    INFO(error);
    CHECK(contains(error, "\"" + row.field + "\""));
    CHECK(same_state(state_of(*network.module), before));
  }

  // Other methods of adapter-hub's are named as unknown.
  const Golden golden("houlsby_bert");
  TemporaryDirectory folder;
  fs::copy(golden.adapter(), folder.path() / "a");
  auto config = read_json_file(folder.path() / "a/adapter_config.json");
  config["config"]["architecture"] = "lora";
  write_text(folder.path() / "a/adapter_config.json", config.dump());
  const auto network = golden.network();
  CHECK(contains(
      error_of([&] { peft::load(*network.module, folder / "a"); }),
      "without a peft_type"));
}

TEST_CASE("keys that are missing, more or of another shape are listed") {
  const Golden golden("pfeiffer_gpt2");
  const auto path = [](const TemporaryDirectory& folder) {
    return (folder.path() / "a/adapter.safetensors").string();
  };
  const std::string key =
      "transformer.h.1.output_adapters.adapters.bottleneck.adapter_up.bias";
  struct Row {
    std::string name;
    std::function<void(Tensors&)> edit;
    std::string part;
  };
  const std::vector<Row> rows{
      {"missing", [&](Tensors& t) { t.erase(key); }, "missing from the file"},
      {"more",
       [&](Tensors& t) { t["transformer.h.2.other"] = torch::ones({2}); },
       "unexpected in the file:\n    transformer.h.2.other"},
      {"misshaped",
       [&](Tensors& t) { t[key] = torch::ones({3}); },
       "wrong shape"}};
  for (const auto& row : rows) {
    INFO(row.name);
    TemporaryDirectory folder;
    fs::copy(golden.adapter(), folder.path() / "a");
    auto tensors = peft::load_safetensors(path(folder));
    row.edit(tensors);
    peft::save_safetensors(tensors, path(folder));
    const auto network = golden.network();
    const auto before = state_of(*network.module);
    const auto error =
        error_of([&] { peft::load(*network.module, folder / "a"); });
    INFO(error);
    CHECK(contains(error, row.part));
    CHECK(same_state(state_of(*network.module), before));
  }
}

// ---- What adapter-hub's form cannot say
// --------------------------------------

TEST_CASE("every kind of bottleneck adapter comes back from its files") {
  using Attach =
      std::function<peft::Adapter(torch::nn::Module&, const std::string&)>;
  const auto with = [](const auto& options) {
    return Attach([options](torch::nn::Module& m, const std::string& name) {
      return peft::attach(m, options, name);
    });
  };
  struct Row {
    std::string name, network;
    Attach attach;
    bool hub;
  };
  const auto norms_off = HoulsbyOptions(4).train_layer_norms(false);
  const std::vector<Row> rows{
      {"layer norms train", "bert", with(HoulsbyOptions(4)), false},
      {"they do not", "bert", with(norms_off), true},
      {"and a head",
       "bert",
       with(HoulsbyOptions(4).modules_to_save({"classifier"})),
       false},
      {"a head alone",
       "bert",
       with(HoulsbyOptions(norms_off).modules_to_save({"classifier"})),
       true},
      {"a list",
       "bert",
       with(HoulsbyOptions(norms_off).targets({"output.dense"})),
       false},
      {"a predicate",
       "bert",
       with(HoulsbyOptions(norms_off).targets(peft::Targets::where(
           [](const std::string& name, const torch::nn::Module&) {
             return name.find("layer.1.output.dense") != std::string::npos;
           }))),
       false},
      {"a width that divides nothing",
       "bert",
       with(PfeifferOptions(7).non_linearity("leaky_relu")),
       true},
      {"a factor",
       "gpt2",
       with(PfeifferOptions().reduction_factor(3.5).leave_out({0})),
       true},
      {"around named norms",
       "bert",
       with(PfeifferOptions(3).targets({"attention.output.LayerNorm"})),
       false},
      {"T5", "t5_v1_1", with(PfeifferOptions(3)), true},
      {"T5, Houlsby",
       "t5_v1_0",
       with(HoulsbyOptions(norms_off).cross_attention(true)),
       true},
      {"T5's norms", "t5_v1_0", with(HoulsbyOptions(3)), false},
      {"parallel, normalises last",
       "bert",
       with(ParallelAdapterOptions(5).layer_norm("in").scaling(0.3)),
       true},
      {"with a norm behind",
       "bert",
       with(ParallelAdapterOptions(5)
                .layer_norm("out")
                .learned_scaling(true)
                .dropout(0.1)),
       true},
      {"parallel, normalises first",
       "llama",
       with(ParallelAdapterOptions(5).learned_scaling(true)),
       false},
      {"without biases",
       "bert",
       with(ParallelAdapterOptions(5).bias(false)),
       false},
      {"beside the attention",
       "bert",
       with(ParallelAdapterOptions(5).inputs({"query"}).targets(
           {"attention.output.dense"})),
       false}};
  const std::map<std::string, std::string> inputs{
      {"bert", "pfeiffer_bert"},
      {"gpt2", "pfeiffer_gpt2"},
      {"llama", "houlsby_llama"},
      {"t5_v1_0", "houlsby_t5_v1_0"},
      {"t5_v1_1", "pfeiffer_t5_v1_1"}};
  for (const auto& row : rows) {
    DYNAMIC_SECTION(row.name) {
      const Golden golden(inputs.at(row.network));
      const auto network = tiny_models::load(row.network);
      const Tensor before = network.run(golden.reference).detach();
      auto adapter = row.attach(*network.module, "mine");
      randomise(adapter);
      const Tensor acting = network.run(golden.reference).detach();
      REQUIRE_FALSE(close(acting, before));
      TemporaryDirectory folder;
      peft::save(adapter, folder / "a");
      const auto config =
          read_json_file(folder.path() / "a/adapter_config.json");
      CHECK((config.count("peft_type") == 0) == row.hub);
      CHECK(fs::exists(folder.path() / "a/adapter.safetensors") == row.hub);
      const auto other = tiny_models::load(row.network);
      auto loaded = peft::load(*other.module, folder / "a", "again");
      CHECK(loaded.method() == adapter.method());
      CHECK(loaded.num_parameters() == adapter.num_parameters());
      CHECK(equal_bits(other.run(golden.reference).detach(), acting));
      peft::save(loaded, folder / "b");
      const auto third = tiny_models::load(row.network);
      peft::load(*third.module, folder / "b");
      CHECK(equal_bits(third.run(golden.reference).detach(), acting));
    }
  }
}

TEST_CASE("an own network's names: libpeft's own form") {
  const auto make = [] {
    seed(4);
    return torch::nn::TransformerEncoder(torch::nn::TransformerEncoderOptions(
        torch::nn::TransformerEncoderLayerOptions(8, 2)
            .dim_feedforward(16)
            .dropout(0),
        2));
  };
  auto encoder = make();
  const Tensor x = torch::randn({5, 3, 8});
  auto adapter = peft::attach(*encoder, PfeifferOptions(3));
  randomise(adapter);
  const Tensor acting = encoder->forward(x).detach();
  TemporaryDirectory folder;
  peft::save(adapter, folder / "a");
  const auto file =
      peft::load_safetensors(folder / "a/adapter_model.safetensors");
  CHECK(file.count("base_model.model.layers.0.norm2.adapter_up.weight") == 1);
  auto other = make();
  peft::load(*other, folder / "a");
  CHECK(equal_bits(other->forward(x).detach(), acting));
}

TEST_CASE("a head saved before does not come back with another adapter") {
  TemporaryDirectory folder;
  const auto network = tiny_models::load("bert");
  auto with_head = peft::attach(
      *network.module, PfeifferOptions(3).modules_to_save({"classifier"}));
  peft::save(with_head, folder / "a");
  CHECK(fs::exists(folder.path() / "a/model_head.safetensors"));
  with_head.detach();
  auto without = peft::attach(*network.module, PfeifferOptions(3));
  peft::save(without, folder / "a");
  CHECK_FALSE(fs::exists(folder.path() / "a/model_head.safetensors"));
  const auto other = tiny_models::load("bert");
  CHECK(
      peft::load(*other.module, folder / "a").num_parameters() ==
      without.num_parameters());
}

} // namespace test_adapter_hub
