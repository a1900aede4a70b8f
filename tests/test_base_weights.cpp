#include "test.h"

#include <peft/io/base_weights.h>

#include <fstream>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace test_base_weights {

namespace {

using peft::BaseWeightsOptions;
using peft::load_base;
using Tensors = std::map<std::string, torch::Tensor>;
using Names = std::vector<std::string>;

/// The network of make_safetensors.py.
torch::nn::Sequential network() {
  return torch::nn::Sequential(
      torch::nn::Linear(4, 8),
      torch::nn::BatchNorm1d(8),
      torch::nn::Linear(8, 2));
}

Tensors tensors_of(const torch::nn::Module& model) {
  Tensors tensors;
  for (const auto& named : {model.named_parameters(), model.named_buffers()}) {
    for (const auto& item : named) {
      tensors[item.key()] = item.value().detach().clone();
    }
  }
  return tensors;
}

void require_same(const Tensors& left, const Tensors& right) {
  REQUIRE(left.size() == right.size());
  for (const auto& [name, tensor] : left) {
    INFO(name);
    REQUIRE(equal_bits(tensor, right.at(name)));
  }
}

void write_text(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary);
  file << text;
  file.close();
  REQUIRE(file);
}

/// Two layers whose weight is one tensor.
struct TiedImpl : torch::nn::Module {
  TiedImpl() {
    in = register_module("in", torch::nn::Embedding(5, 3));
    out = register_parameter("out", in->weight);
  }
  torch::nn::Embedding in{nullptr};
  torch::Tensor out;
};
TORCH_MODULE(Tied);

} // namespace

TEST_CASE("a sharded checkpoint from Python gives Python's output", "[base]") {
  const auto folder = golden("safetensors/sharded");
  const auto expected = peft::load_safetensors(
      golden("safetensors/sharded_expected.safetensors"));
  for (const auto& path : {folder, folder + "/model.safetensors.index.json"}) {
    auto model = network();
    const auto report = load_base(*model, path);
    REQUIRE(report.loaded.size() == 9);
    REQUIRE(report.missing.empty());
    REQUIRE(report.extra.empty());
    model->eval();
    REQUIRE(close(model->forward(expected.at("x")), expected.at("y")));
  }
}

TEST_CASE("every kind of file fills the model", "[base]") {
  TemporaryDirectory folder;
  seed();
  auto source = network();
  source->forward(torch::randn({16, 4})); // moves the running statistics
  const auto expected = tensors_of(*source);

  std::filesystem::create_directory(folder.path() / "model");
  const auto single = folder / "model/model.safetensors";
  peft::save_safetensors(expected, single);
  const auto archive = folder / "archive.pt";
  torch::save(source, archive);
  const auto script = folder / "script.pt";
  torch::jit::Module scripted("network");
  for (const auto& [name, tensor] : expected) {
    const auto layer = name.substr(0, 1);
    if (!scripted.hasattr("_" + layer)) {
      scripted.register_module(
          "_" + layer, torch::jit::Module("layer" + layer));
    }
    scripted.attr("_" + layer)
        .toModule()
        .register_buffer(name.substr(2), tensor);
  }
  scripted.save(script);

  for (const auto& path : {single, folder / "model", archive}) {
    INFO(path);
    auto model = network();
    load_base(*model, path);
    require_same(tensors_of(*model), expected);
  }
  auto model = network();
  load_base(
      *model, script, BaseWeightsOptions().rename([](const std::string& name) {
        return name.substr(1); // a TorchScript name cannot begin with a digit
      }));
  require_same(tensors_of(*model), expected);
}

TEST_CASE("the model's tensors keep what they are", "[base]") {
  TemporaryDirectory folder;
  const auto path = folder / "model.safetensors";
  auto source = network();
  peft::save_safetensors(tensors_of(*source), path);

  auto model = network();
  model->to(torch::kDouble);
  auto weight = model->named_parameters()["0.weight"];
  weight.set_requires_grad(false);
  const auto* storage = weight.const_data_ptr();
  load_base(*model, path);
  REQUIRE(weight.scalar_type() == torch::kDouble);
  REQUIRE(weight.const_data_ptr() == storage);
  REQUIRE_FALSE(weight.requires_grad());
  REQUIRE(model->named_parameters()["2.weight"].requires_grad());
  REQUIRE(model->named_parameters()["2.weight"].is_leaf());
  REQUIRE(equal_bits(
      weight,
      source->named_parameters()["0.weight"].detach().to(torch::kDouble)));
}

TEST_CASE("all that does not fit is named, and nothing loaded", "[base]") {
  TemporaryDirectory folder;
  const auto path = folder / "model.safetensors";
  auto model = network();
  const auto before = tensors_of(*model);
  auto tensors = tensors_of(*model);
  for (auto& [name, tensor] : tensors) {
    tensor = tensor + 1;
  }
  tensors.erase("0.bias");
  tensors.erase("1.running_mean");
  tensors["position_ids"] = torch::arange(4);
  tensors["pooler.weight"] = torch::ones(2);
  tensors["2.weight"] = torch::ones({3, 8});
  tensors["1.num_batches_tracked"] = torch::tensor(1.0f);
  peft::save_safetensors(tensors, path);

  const auto error = error_of([&] { load_base(*model, path); });
  INFO(error);
  REQUIRE(contains(error, path));
  REQUIRE(contains(
      error, "missing from the file (2):\n    0.bias\n    1.running_mean\n"));
  REQUIRE(contains(
      error, "extra in the file (2):\n    pooler.weight\n    position_ids\n"));
  REQUIRE(contains(error, "cannot be filled (2):\n"));
  REQUIRE(contains(error, "2.weight: the file has [3, 8], the model [2, 8]"));
  REQUIRE(contains(
      error, "1.num_batches_tracked: the file has Float, the model Long"));
  require_same(tensors_of(*model), before);

  // Leniency never covers a wrong shape.
  const auto lenient = BaseWeightsOptions().strict(false);
  REQUIRE(contains(
      error_of([&] { load_base(*model, path, lenient); }), "2.weight"));
  require_same(tensors_of(*model), before);

  tensors.erase("2.weight");
  tensors.erase("1.num_batches_tracked");
  peft::save_safetensors(tensors, path);
  const auto report = load_base(*model, path, lenient);
  REQUIRE(report.extra == Names{"pooler.weight", "position_ids"});
  REQUIRE(
      report.missing ==
      Names{"0.bias", "1.num_batches_tracked", "1.running_mean", "2.weight"});
  const auto after = tensors_of(*model);
  for (const auto& name : report.loaded) {
    REQUIRE(equal_bits(after.at(name), tensors.at(name)));
  }
  for (const auto& name : report.missing) {
    REQUIRE(equal_bits(after.at(name), before.at(name)));
  }
}

TEST_CASE("a long list of names is cut", "[base]") {
  TemporaryDirectory folder;
  const auto path = folder / "model.safetensors";
  torch::nn::Linear model(2, 2);
  auto tensors = tensors_of(*model);
  for (int i = 0; i < 50; ++i) {
    tensors["extra." + std::to_string(i)] = torch::ones(1);
  }
  peft::save_safetensors(tensors, path);
  const auto error = error_of([&] { load_base(*model, path); });
  REQUIRE(contains(error, "extra in the file (50):"));
  REQUIRE(contains(error, "... and 30 more"));
}

TEST_CASE("options say what may differ", "[base]") {
  TemporaryDirectory folder;
  const auto path = folder / "model.safetensors";
  auto model = network();
  Tensors tensors;
  for (const auto& [name, tensor] : tensors_of(*model)) {
    tensors["bert." + name] = tensor + 1;
  }
  tensors.erase("bert.2.bias");
  tensors["bert.embeddings.position_ids"] = torch::arange(4);
  tensors["bert.pooler.dense.weight"] = torch::ones(2);
  tensors["optimizer"] = torch::ones(2);
  peft::save_safetensors(tensors, path);

  const auto unprefixed = [](const std::string& name) {
    return name == "optimizer" ? "" : name.substr(5);
  };
  const auto options = BaseWeightsOptions()
                           .rename(unprefixed)
                           .ignore_missing({"2.bias"})
                           .ignore_extra({"position_ids", "pooler\\..*"});
  const auto report = load_base(*model, path, options);
  REQUIRE(report.missing == Names{"2.bias"});
  REQUIRE(
      report.extra == Names{"embeddings.position_ids", "pooler.dense.weight"});
  REQUIRE(equal_bits(
      tensors_of(*model).at("0.weight"), tensors.at("bert.0.weight")));

  // An entry is a name's end or a whole pattern, never just a part of it.
  for (const char* part : {"ids", "pooler", "position"}) {
    auto narrow = options;
    narrow.ignore_extra({part});
    REQUIRE(contains(
        error_of([&] { load_base(*model, path, narrow); }), "position_ids"));
  }
  auto bad = options;
  bad.ignore_extra({"a["});
  REQUIRE(contains(
      error_of([&] { load_base(*model, path, bad); }), "\"a[\" is not a"));
  auto merging = options;
  merging.rename([](const std::string&) { return "0.weight"; });
  REQUIRE(contains(
      error_of([&] { load_base(*model, path, merging); }),
      "the same name, \"0.weight\""));
  // No name fits at all: surely a forgotten prefix, even when lenient.
  const auto error = error_of(
      [&] { load_base(*model, path, BaseWeightsOptions().strict(false)); });
  INFO(error);
  REQUIRE(contains(error, "no name in"));
  REQUIRE(contains(error, "bert.0.bias"));
}

TEST_CASE("of tied weights one name is enough", "[base]") {
  TemporaryDirectory folder;
  const auto path = folder / "model.safetensors";
  const auto ones = torch::ones({5, 3});
  for (const char* name : {"in.weight", "out"}) {
    Tied model;
    peft::save_safetensors({{name, ones}}, path);
    const auto report = load_base(*model, path);
    REQUIRE(report.missing.empty());
    REQUIRE(equal_bits(model->in->weight.detach(), ones));
  }
  Tied model;
  peft::save_safetensors({{"in.weight", ones}, {"out", ones}}, path);
  REQUIRE(load_base(*model, path).loaded.size() == 2);
  peft::save_safetensors({{"in.weight", ones}, {"out", ones * 2}}, path);
  const auto error = error_of([&] { load_base(*model, path); });
  INFO(error);
  REQUIRE(contains(error, "unequal in the file (1):\n    in.weight and out"));
  REQUIRE(equal_bits(model->out.detach(), ones));
}

TEST_CASE("the base is filled below its adapters", "[base]") {
  TemporaryDirectory folder;
  const auto path = folder / "model.safetensors";
  const auto archive = folder / "model.pt";
  seed();
  auto source = network();
  const auto expected = tensors_of(*source);
  peft::save_safetensors(expected, path);
  torch::save(source, archive);

  for (const auto& file : {path, archive}) {
    auto model = network();
    auto adapter =
        peft::attach(*model, peft::LoraOptions(2).alpha(4).targets({"0", "2"}));
    {
      torch::NoGradGuard no_grad;
      for (auto& parameter : adapter.parameters()) {
        parameter.normal_();
      }
    }
    const auto held = adapter.parameters();
    std::vector<torch::Tensor> before;
    for (const auto& parameter : held) {
      before.push_back(parameter.detach().clone());
    }

    REQUIRE(load_base(*model, file).loaded.size() == 9);
    for (size_t i = 0; i < held.size(); ++i) {
      REQUIRE(equal_bits(held[i].detach(), before[i]));
    }
    const auto weight = model->named_parameters()["0.weight"];
    REQUIRE(peft::is_adapted(weight));
    REQUIRE_FALSE(
        torch::equal(peft::effective(weight), expected.at("0.weight")));
    // Saved with the adapter on, it is the base all the same.
    peft::save_safetensors({{"w", weight}}, folder / "w.safetensors");
    REQUIRE(equal_bits(
        peft::load_safetensors(folder / "w.safetensors").at("w"),
        expected.at("0.weight")));

    adapter.merge();
    const auto error = error_of([&] { load_base(*model, file); });
    INFO(error);
    REQUIRE(contains(error, "0.weight: adapter 'default' is merged"));
    adapter.unmerge();
    adapter.detach();
    require_same(tensors_of(*model), expected);
  }
}

TEST_CASE("an index that disagrees with its shards is refused", "[base]") {
  TemporaryDirectory folder;
  const auto index = folder / "model.safetensors.index.json";
  auto model = network();
  const auto before = tensors_of(*model);
  auto tensors = before;
  peft::save_safetensors(tensors, folder / "one.safetensors");
  peft::save_safetensors({{"x", torch::ones(1)}}, folder / "two.safetensors");
  std::filesystem::create_directory(folder.path() / "sub");
  peft::save_safetensors(tensors, folder / "sub/three.safetensors");

  const auto error_for = [&](const std::string& text) {
    write_text(index, text);
    return error_of([&] { load_base(*model, index); });
  };
  std::string map;
  for (const auto& [name, tensor] : tensors) {
    map += "\"" + name + "\": \"one.safetensors\", ";
  }
  const std::vector<std::pair<std::string, std::string>> bad{
      {"{}", "no object \"weight_map\""},
      {"[]", "no object \"weight_map\""},
      {R"({"weight_map": ["one.safetensors"]})", "no object \"weight_map\""},
      {R"({"weight_map": {"x": 1}})", "gives tensor \"x\" no file name"},
      {"{\"weight_map\": {" + map + R"("x": "four.safetensors"}})",
       "the shard \"four.safetensors\" is missing"},
      {"{\"weight_map\": {" + map + R"("y": "two.safetensors"}})",
       "not in the shard that the index gives (1):\n    y in two.safetensors"},
      {"{\"weight_map\": {" + map + R"("y": "two.safetensors"}})",
       "in a shard, but not in the index (1):\n    x in two.safetensors"},
      {R"({"weight_map": {"0.bias": "one.safetensors"}})",
       "in a shard, but not in the index (8):"},
      {R"({"weight_map": {"x": "one.safetensors", "x": "two.safetensors"}})",
       "\"x\" is given twice"},
      {R"({"weight_map": {"x": "sub/three.safetensors"}})",
       "\"sub/three.safetensors\" is not a plain file name"},
      {R"({"weight_map": {"x": "../two.safetensors"}})",
       "is not a plain file name"},
      {R"({"weight_map": {"x": "..\\two.safetensors"}})",
       "is not a plain file name"},
      {R"({"weight_map": {"x": ".."}})", "is not a plain file name"},
      {R"({"weight_map": {"x": ""}})", "is not a plain file name"},
  };
  for (const auto& [text, expected] : bad) {
    const auto error = error_for(text);
    INFO(error);
    REQUIRE(contains(error, expected));
    REQUIRE(contains(error, index));
  }
  const auto absolute = error_for(
      "{\"weight_map\": {\"x\": \"" + (folder / "two.safetensors") + "\"}}");
  REQUIRE(contains(absolute, "is not a plain file name"));
  require_same(tensors_of(*model), before);
}

TEST_CASE("what holds no weights is refused", "[base]") {
  TemporaryDirectory folder;
  auto model = network();
  const auto error_for = [&](const std::string& path) {
    return error_of([&] { load_base(*model, path); });
  };
  REQUIRE(contains(
      error_for(folder.path().string()), "holds neither model.safetensors"));
  REQUIRE(contains(error_for(folder / "absent"), folder / "absent"));
  write_text(folder / "fake.pt", "PK\x03\x04 but no archive");
  REQUIRE(contains(error_for(folder / "fake.pt"), "convert it to safetensors"));
  write_text(folder / "short", "PK");
  REQUIRE(contains(error_for(folder / "short"), folder / "short"));

  peft::save_safetensors({{"w", torch::ones(2)}}, folder / "model.safetensors");
  torch::nn::Module hollow;
  hollow.register_buffer("w", torch::empty({2}, torch::kMeta));
  REQUIRE(contains(
      error_of([&] { load_base(hollow, folder / "model.safetensors"); }),
      "w: the model's tensor is on the meta device"));
  torch::nn::Module frozen;
  {
    c10::InferenceMode inference;
    frozen.register_buffer("w", torch::zeros(2));
  }
  REQUIRE(contains(
      error_of([&] { load_base(frozen, folder / "model.safetensors"); }),
      "w: the model's tensor was made in inference mode"));
}

} // namespace test_base_weights
