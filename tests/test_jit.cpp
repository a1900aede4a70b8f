/// Adapters on TorchScript modules: traced and scripted in Python (golden/), or
/// defined here.

#include <peft/jit.h>
#include <peft/io/safetensors.h>

#include "test.h"

#include <cmath>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

namespace test_jit {

namespace {

using peft::BitFitOptions;
using peft::LayerKind;
using peft::LoraOptions;
using torch::Tensor;
using torch::jit::GraphOptimizerEnabledGuard;
using torch::jit::Module;

using Inputs = std::vector<c10::IValue>;

Module new_module(
    const std::string& class_name,
    const std::map<std::string, Tensor>& parameters,
    const std::string& source) {
  // One unit for all, so that later classes of one name are mangled.
  static const auto unit = std::make_shared<torch::jit::CompilationUnit>();
  Module module(
      c10::QualifiedName("__torch__.torch.nn.modules." + class_name),
      unit,
      /*shouldMangle=*/true);
  module.register_attribute("training", c10::BoolType::get(), true);
  for (const auto& [name, value] : parameters) {
    module.register_parameter(
        name, value.clone().set_requires_grad(true), /*is_buffer=*/false);
  }
  if (!source.empty()) {
    module.define(source);
  }
  return module;
}

Module linear(int64_t in, int64_t out, torch::ScalarType dtype) {
  return new_module(
      "linear.Linear",
      {{"weight", torch::randn({out, in}, dtype) / std::sqrt(double(in))},
       {"bias", torch::randn({out}, dtype)}},
      "def forward(self, x):\n"
      "    return torch.linear(x, self.weight, self.bias)\n");
}

/// y = last(tanh(first(x))).
Module two_layers(torch::ScalarType dtype = torch::kDouble) {
  Module model = new_module("container.Net", {}, "");
  model.register_module("first", linear(6, 8, dtype));
  model.register_module("last", linear(8, 3, dtype));
  model.define(
      "def forward(self, x):\n"
      "    return self.last.forward(torch.tanh(self.first.forward(x)))\n");
  return model;
}

Tensor run(const Module& model, const Inputs& inputs) {
  return Module(model).forward(inputs).toTensor();
}

Tensor infer(const Module& model, const Inputs& inputs) {
  torch::NoGradGuard no_grad;
  return run(model, inputs);
}

Tensor parameter(const Module& model, const std::string& name) {
  for (const auto& p : model.named_parameters()) {
    if (p.name == name) {
      return p.value;
    }
  }
  return {};
}

/// Values for the adapter that make it act.
void randomise(const peft::Adapter& adapter, double size = 0.3) {
  torch::NoGradGuard no_grad;
  for (auto& p : adapter.parameters()) {
    p.normal_(0, size);
  }
}

Module reloaded(const Module& model) {
  std::stringstream file;
  model.save(file);
  return torch::jit::load(file);
}

/// A module of the golden files, with its inputs and output.
struct Golden {
  explicit Golden(const std::string& name)
      : model(torch::jit::load(golden("jit/" + name + "/model.pt"))) {
    auto file =
        peft::load_safetensors(golden("jit/" + name + "/expected.safetensors"));
    for (int i = 0; file.count("input." + std::to_string(i)) != 0; ++i) {
      inputs.emplace_back(file.at("input." + std::to_string(i)));
    }
    output = file.at("output");
  }

  Module model;
  Inputs inputs;
  Tensor output;
};

std::map<std::string, peft::Layer> layers_of(const Module& model) {
  std::map<std::string, peft::Layer> result;
  for (auto& layer : peft::describe_network(model)) {
    result[layer.name] = layer;
  }
  return result;
}

} // namespace

TEST_CASE("jit: a network is described by its class names") {
  const Golden bert("bert_traced");
  auto layers = layers_of(bert.model);
  REQUIRE(layers.count("") == 1);
  REQUIRE(
      layers.at("encoder.layer.1.attention.self.query").kind ==
      LayerKind::linear);
  REQUIRE(layers.at("embeddings.word_embeddings").kind == LayerKind::embedding);
  REQUIRE(layers.at("embeddings.LayerNorm").kind == LayerKind::normalization);
  REQUIRE(layers.at("encoder").kind == LayerKind::other);
  size_t parameters = 0;
  for (const auto& [name, layer] : layers) {
    parameters += layer.parameters.size();
  }
  REQUIRE(parameters == bert.model.named_parameters().size());
}

TEST_CASE("jit: mangled classes, attention, recurrent layers, groups") {
  Module model = new_module("container.Net", {}, "");
  const auto weight = torch::randn({6, 2, 3, 3});
  model.register_module("a", linear(2, 2, torch::kFloat));
  model.register_module("b", linear(2, 2, torch::kFloat));
  model.register_module(
      "lstm",
      new_module(
          "rnn.LSTM",
          {{"weight_ih_l0", torch::randn({8, 3})},
           {"weight_hh_l0", torch::randn({8, 2})}},
          ""));
  Module attention = new_module(
      "activation.MultiheadAttention",
      {{"in_proj_weight", torch::randn({12, 4})}},
      "");
  attention.register_module(
      "out_proj",
      new_module(
          "linear.NonDynamicallyQuantizableLinear",
          {{"weight", torch::randn({4, 4})}},
          ""));
  model.register_module("attention", attention);
  // A scripted convolution says its groups; a traced one has them in its graph.
  Module scripted = new_module("conv.Conv2d", {{"weight", weight}}, "");
  scripted.register_attribute("groups", c10::IntType::get(), 2);
  model.register_module("scripted", scripted);
  model.register_module(
      "traced",
      new_module(
          "conv.Conv2d",
          {{"weight", weight}},
          "def forward(self, x):\n"
          "    return torch._convolution(x, self.weight, None, [1, 1], [0, 0],"
          " [1, 1], False, [0, 0], 2, False, False, True, True)\n"));
  model.register_module(
      "silent", new_module("conv.Conv2d", {{"weight", weight}}, ""));

  auto layers = layers_of(model);
  const auto mangled = [](const Module& m) {
    return contains(m.type()->name()->qualifiedName(), "___torch_mangle_");
  };
  REQUIRE(
      (mangled(model.attr("a").toModule()) ||
       mangled(model.attr("b").toModule())));
  REQUIRE(layers.at("a").kind == LayerKind::linear);
  REQUIRE(layers.at("b").kind == LayerKind::linear);
  REQUIRE(layers.at("b").type == "Linear");
  REQUIRE(layers.at("lstm").kind == LayerKind::recurrent);
  REQUIRE(layers.at("attention").kind == LayerKind::attention);
  REQUIRE(layers.at("attention.out_proj").parent_attention == "attention");
  REQUIRE(layers.at("scripted").groups == 2);
  REQUIRE(layers.at("traced").groups == 2);
  REQUIRE(layers.at("silent").groups == 1);
}

TEST_CASE("jit: attach changes no output, freezes the network, and is told") {
  for (const char* name : {"mlp_traced", "mlp_scripted", "bert_traced"}) {
    CAPTURE(name);
    Golden net(name);
    REQUIRE(close(infer(net.model, net.inputs), net.output));
    const Tensor before = infer(net.model, net.inputs);
    const bool bert = net.inputs.size() == 2;
    auto options = LoraOptions(2).alpha(4);
    if (!bert) {
      options.targets({"fc1", "head"});
    }
    auto adapter = peft::attach(net.model, options);
    REQUIRE(equal_bits(infer(net.model, net.inputs), before));
    for (const auto& p : net.model.parameters()) {
      REQUIRE_FALSE(p.requires_grad());
    }
    REQUIRE(adapter.sites().size() == (bert ? 4u : 2u));
    const int64_t expected = bert ? 4 * 2 * 32 : 2 * (26 + 15);
    REQUIRE(adapter.num_parameters() == expected);
    REQUIRE(peft::count_parameters(net.model).trainable == expected);
    REQUIRE(contains(peft::summary(net.model), bert ? "self.query" : "fc1"));
    REQUIRE(peft::adapters(net.model).size() == 1);
    REQUIRE(peft::get_adapter(net.model).name() == "default");

    randomise(adapter);
    REQUIRE_FALSE(close(infer(net.model, net.inputs), before));
    adapter.disable();
    REQUIRE(equal_bits(infer(net.model, net.inputs), before));
    adapter.detach();
    REQUIRE(equal_bits(infer(net.model, net.inputs), before));
    REQUIRE(peft::adapters(net.model).empty());
    for (const auto& p : net.model.parameters()) {
      REQUIRE(p.requires_grad());
      REQUIRE_FALSE(peft::is_adapted(p));
    }
  }
}

TEST_CASE("jit: what cannot be is refused and leaves the module as it was") {
  seed();
  Module model = two_layers();
  REQUIRE(contains(
      error_of([&] { peft::attach(model, LoraOptions().targets({"frist"})); }),
      "Did you mean 'first'"));
  REQUIRE(contains(
      error_of([&] { peft::attach(model, LoraOptions()); }),
      "query and value"));
  REQUIRE(contains(
      error_of([&] {
        peft::attach(
            model,
            LoraOptions().targets(peft::Targets::where(
                [](const std::string&, const torch::nn::Module&) {
                  return true;
                })));
      }),
      "torch::nn modules"));
  REQUIRE(contains(
      error_of([&] { peft::get_adapter(model, "other"); }), "it has none"));
  REQUIRE(contains(
      error_of([&] { peft::merge(model); }), "no adapter on this model"));
  for (const auto& p : model.parameters()) {
    REQUIRE(p.requires_grad());
    REQUIRE_FALSE(peft::is_adapted(p));
  }

  model.eval();
  const Module frozen = torch::jit::freeze(model);
  REQUIRE(contains(
      error_of([&] { peft::attach(frozen, LoraOptions().targets({"first"})); }),
      "attach before torch::jit::freeze"));

  auto options = LoraOptions(2).targets({"first"});
  peft::attach(model, options);
  REQUIRE(contains(
      error_of([&] { peft::attach(model, options); }),
      "already has an adapter named 'default'"));
}

TEST_CASE("jit: training under the optimising executor is refused by name") {
  seed();
  // A fast path, and one that goes through the fallback.
  for (const bool lora : {true, false}) {
    // The executor has seen the module before: never, without gradients, or
    // with gradients of its input alone, for which it makes a graph.
    for (const std::string history : {"none", "inference", "gradients"}) {
      CAPTURE(lora, history);
      Module model = two_layers();
      auto adapter = lora
          ? peft::attach(model, LoraOptions(2).targets({"first"}))
          : peft::attach(model, BitFitOptions());
      const Tensor x =
          torch::randn({4, 6}, torch::kDouble).set_requires_grad(true);
      for (int i = 0; i < 4; ++i) {
        if (history == "inference") {
          infer(model, {x});
        } else if (history == "gradients") {
          adapter.disable();
          run(model, {x}).sum().backward();
          adapter.enable();
        }
      }
      for (int i = 0; i < 4; ++i) {
        const auto text = error_of([&] { run(model, {x}); });
        REQUIRE(contains(text, "optimising executor drops the gradients"));
        REQUIRE(contains(text, "GraphOptimizerEnabledGuard"));
      }
      REQUIRE(infer(model, {x}).defined());
      GraphOptimizerEnabledGuard plain_executor(false);
      if (history == "gradients") { // the executor keeps its plan regardless
        const auto text = error_of([&] { run(model, {x}); });
        REQUIRE(contains(text, "peft::forget_plans(model)"));
        peft::forget_plans(model);
      }
      run(model, {x}).sum().backward();
      REQUIRE(adapter.parameters().back().grad().defined());
    }
  }
}

TEST_CASE("jit: attach makes the executor forget a training before it") {
  seed();
  for (const bool lora : {true, false}) {
    CAPTURE(lora);
    Module model = two_layers();
    const Inputs x{torch::randn({4, 6}, torch::kDouble)};
    for (int i = 0; i < 4; ++i) {
      run(model, x).sum().backward();
    }
    auto adapter = lora ? peft::attach(model, LoraOptions(2).targets({"first"}))
                        : peft::attach(model, BitFitOptions());
    GraphOptimizerEnabledGuard plain_executor(false);
    run(model, x).sum().backward();
    REQUIRE(adapter.parameters().back().grad().defined());
  }
}

TEST_CASE("jit: gradients equal the formula's, before and after inference") {
  seed();
  Module model = two_layers();
  auto adapter = peft::attach(
      model, LoraOptions(2).alpha(6).targets({"first", "last"}).bias("all"));
  randomise(adapter);
  const Tensor x = torch::randn({5, 6}, torch::kDouble);
  const Tensor target = torch::randn({5, 3}, torch::kDouble);

  // The same network written out.
  std::map<std::string, Tensor> p;
  for (const auto& item : adapter.named_parameters()) {
    p[item.key()] = item.value().detach().clone().set_requires_grad(true);
  }
  REQUIRE(p.size() == 6);
  auto layer = [&](const Tensor& input, const std::string& name) {
    const Tensor weight = peft::base(parameter(model, name + ".weight"));
    const Tensor delta =
        3 * p.at(name + ".lora_B.weight").mm(p.at(name + ".lora_A.weight"));
    const Tensor bias = p.count(name + ".bias") != 0
        ? p.at(name + ".bias")
        : p.at(name + ".base_layer.bias");
    return torch::linear(input, weight + delta, bias);
  };
  const Tensor expected = layer(torch::tanh(layer(x, "first")), "last");
  (expected - target).square().sum().backward();

  for (int i = 0; i < 4; ++i) { // the optimising executor's plan is made here
    REQUIRE(close(infer(model, {x}), expected));
  }
  for (int i = 0; i < 3; ++i) {
    GraphOptimizerEnabledGuard plain_executor(false);
    for (const auto& item : adapter.named_parameters()) {
      item.value().mutable_grad() = Tensor();
    }
    const Tensor y = run(model, {x});
    REQUIRE(close(y, expected));
    (y - target).square().sum().backward();
    for (const auto& item : adapter.named_parameters()) {
      CAPTURE(i, item.key());
      REQUIRE(close(item.value().grad(), p.at(item.key()).grad()));
    }
  }
}

TEST_CASE("jit: a trained encoder follows its adapter under both executors") {
  for (const char* name : {"mlp_scripted", "bert_traced"}) {
    CAPTURE(name);
    seed();
    Golden net(name);
    const bool bert = net.inputs.size() == 2;
    std::vector<Tensor> base;
    for (const auto& p : net.model.parameters()) {
      base.push_back(p.clone());
    }
    auto options = LoraOptions(4).alpha(8);
    if (!bert) {
      options.targets({"fc1", "fc2"});
    }
    auto adapter = peft::attach(net.model, options);
    const Tensor target = torch::randn_like(net.output);
    torch::optim::Adam optimizer(adapter.parameters(), 2e-2);
    double first = 0, last = 0;
    {
      GraphOptimizerEnabledGuard plain_executor(false);
      for (int step = 0; step < 20; ++step) {
        optimizer.zero_grad();
        const Tensor loss =
            (run(net.model, net.inputs) - target).square().mean();
        loss.backward();
        optimizer.step();
        last = loss.item<double>();
        first = step == 0 ? last : first;
      }
    }
    REQUIRE(last < first);
    size_t index = 0;
    for (const auto& p : net.model.parameters()) {
      REQUIRE(equal_bits(peft::base(p), base[index++]));
    }
    const Tensor trained = [&] {
      GraphOptimizerEnabledGuard plain_executor(false);
      return infer(net.model, net.inputs);
    }();
    REQUIRE_FALSE(close(trained, net.output));
    for (int i = 0; i < 4; ++i) {
      REQUIRE(close(infer(net.model, net.inputs), trained));
    }
    for (int i = 0; i < 4; ++i) {
      c10::InferenceMode inference;
      REQUIRE(close(run(net.model, net.inputs), trained));
    }
  }
}

TEST_CASE("jit: merged, the module is plain: it saves, freezes, optimises") {
  for (const char* name : {"mlp_scripted", "bert_traced"}) {
    CAPTURE(name);
    seed();
    Golden net(name);
    auto adapter = peft::attach(
        net.model, LoraOptions(2).targets(peft::Targets::all_linear()));
    randomise(adapter);
    const Tensor adapted = infer(net.model, net.inputs);
    REQUIRE_FALSE(close(adapted, net.output));

    adapter.merge();
    REQUIRE(close(infer(net.model, net.inputs), adapted));
    adapter.unmerge();
    REQUIRE(equal_bits(infer(net.model, net.inputs), adapted));

    peft::merge(net.model);
    for (const auto& p : net.model.parameters()) {
      REQUIRE_FALSE(peft::is_adapted(p));
      REQUIRE(p.requires_grad());
    }
    const Tensor merged = infer(net.model, net.inputs);
    REQUIRE(close(merged, adapted));
    REQUIRE(equal_bits(infer(reloaded(net.model), net.inputs), merged));
    Module frozen = torch::jit::freeze(net.model);
    for (int i = 0; i < 3; ++i) {
      REQUIRE(close(infer(frozen, net.inputs), merged));
    }
    REQUIRE(close(infer(reloaded(frozen), net.inputs), merged));
    frozen = torch::jit::optimize_for_inference(net.model);
    REQUIRE(close(infer(frozen, net.inputs), merged));
  }
}

TEST_CASE("jit: files and copies of an adapted module") {
  seed();
  Golden net("mlp_traced");
  auto adapter =
      peft::attach(net.model, LoraOptions(2).targets({"fc1", "head"}));
  randomise(adapter);
  const Tensor adapted = infer(net.model, net.inputs);

  // A file holds the base.
  REQUIRE(close(infer(reloaded(net.model), net.inputs), net.output));

  // LibTorch's copies are plain and hold the effective weights.
  torch::NoGradGuard no_grad;
  const std::vector<Module> copies{net.model.deepcopy(), net.model.clone()};
  randomise(adapter);
  REQUIRE_FALSE(close(infer(net.model, net.inputs), adapted));
  for (const auto& copy : copies) {
    for (const auto& p : copy.parameters()) {
      REQUIRE_FALSE(peft::is_adapted(p));
    }
    REQUIRE(close(infer(copy, net.inputs), adapted));
    REQUIRE(close(infer(reloaded(copy), net.inputs), adapted));
  }
}

TEST_CASE("jit: peft::clone copies the adapters with the module") {
  seed();
  Module model = two_layers();
  auto adapter = peft::attach(model, LoraOptions(2).targets({"first"}), "a");
  randomise(adapter);
  adapter.set_scale(0.5);
  const Inputs x{torch::randn({4, 6}, torch::kDouble)};
  const Tensor y = infer(model, x);
  const Module copy = peft::clone(model);
  auto twin = peft::get_adapter(copy, "a");
  REQUIRE(equal_bits(infer(copy, x), y));
  REQUIRE(twin.scale() == 0.5);
  randomise(twin);
  REQUIRE_FALSE(close(infer(copy, x), y));
  REQUIRE(equal_bits(infer(model, x), y));
  twin.detach();
  for (const auto& p : copy.parameters()) {
    REQUIRE(p.requires_grad());
    REQUIRE_FALSE(peft::is_adapted(p));
  }
  REQUIRE(peft::adapters(model).size() == 1);
}

TEST_CASE("jit: frozen before the merge, a graph follows the adapter") {
  seed();
  Module model = two_layers();
  model.eval();
  auto adapter = peft::attach(model, LoraOptions(2).targets({"first"}));
  randomise(adapter);
  const Inputs x{torch::randn({4, 6}, torch::kDouble)};
  const Tensor plain = [&] {
    peft::ActiveAdapters base({});
    return infer(model, x);
  }();
  Module frozen = torch::jit::freeze(model);
  REQUIRE(close(infer(frozen, x), infer(model, x)));
  randomise(adapter);
  REQUIRE(close(infer(frozen, x), infer(model, x))); // live
  REQUIRE(close(infer(reloaded(frozen), x), plain)); // the file is the base's
}

TEST_CASE("jit: BitFit, its subsets, and a merge") {
  seed();
  Golden net("bert_traced");
  const Tensor before = infer(net.model, net.inputs);
  auto adapter = peft::attach(net.model, BitFitOptions({"query_intermediate"}));
  REQUIRE(adapter.sites().size() == 4);
  REQUIRE(adapter.num_parameters() == 2 * (16 + 32));
  for (int i = 0; i < 4; ++i) {
    REQUIRE(equal_bits(infer(net.model, net.inputs), before));
  }
  {
    GraphOptimizerEnabledGuard plain_executor(false);
    run(net.model, net.inputs).square().sum().backward();
    for (const auto& p : adapter.parameters()) {
      REQUIRE(p.grad().abs().sum().item<double>() > 0);
    }
  }
  randomise(adapter);
  const Tensor adapted = infer(net.model, net.inputs);
  REQUIRE_FALSE(close(adapted, net.output));
  peft::merge(net.model);
  REQUIRE(equal_bits(infer(net.model, net.inputs), adapted));
  REQUIRE(equal_bits(infer(reloaded(net.model), net.inputs), adapted));
}

TEST_CASE("jit: dropout follows the adapter's own mode") {
  seed();
  Module model = two_layers();
  model.eval();
  auto adapter =
      peft::attach(model, LoraOptions(2).targets({"first"}).dropout(0.5));
  randomise(adapter);
  const Inputs x{torch::randn({4, 6}, torch::kDouble)};
  const Tensor y = infer(model, x);
  REQUIRE(equal_bits(infer(model, x), y)); // attached to a model in eval mode
  adapter.train();
  REQUIRE_FALSE(close(infer(model, x), y));
  adapter.eval();
  REQUIRE(equal_bits(infer(model, x), y));
}

TEST_CASE("jit: adapters of HF PEFT load, and are saved for it") {
  for (const char* name : {"mlp", "bert"}) {
    CAPTURE(name);
    Golden net(name + std::string("_traced"));
    const auto expected = peft::load_safetensors(
        golden(std::string("lora/") + name + "/expected.safetensors"));
    Inputs inputs;
    for (size_t i = 0; i < net.inputs.size(); ++i) {
      inputs.emplace_back(expected.at("input." + std::to_string(i)));
    }
    auto adapter =
        peft::load(net.model, golden(std::string("lora/") + name + "/adapter"));
    const Tensor y = infer(net.model, inputs);
    REQUIRE(close(y, expected.at("output")));
    {
      GraphOptimizerEnabledGuard plain_executor(false);
      torch::mse_loss(run(net.model, inputs), expected.at("target")).backward();
      for (const auto& item : adapter.named_parameters()) {
        CAPTURE(item.key());
        REQUIRE(close(
            item.value().grad(),
            expected.at("gradient.base_model.model." + item.key())));
      }
    }

    TemporaryDirectory folder;
    peft::save(adapter, folder / "adapter");
    adapter.detach();
    REQUIRE_FALSE(close(infer(net.model, inputs), y));
    peft::load(net.model, folder / "adapter");
    REQUIRE(equal_bits(infer(net.model, inputs), y));
    peft::merge(net.model);
    REQUIRE(close(infer(reloaded(net.model), inputs), y));
  }
}

TEST_CASE("jit: a tied weight is adapted once") {
  seed();
  Module model = new_module("container.Net", {}, "");
  Module table = new_module(
      "sparse.Embedding",
      {{"weight", torch::randn({7, 4}, torch::kDouble)}},
      "def forward(self, ids):\n"
      "    return torch.embedding(self.weight, ids)\n");
  Module head = new_module(
      "linear.Linear",
      {{"weight", torch::randn({7, 4}, torch::kDouble)}},
      "def forward(self, x):\n"
      "    return torch.linear(x, self.weight)\n");
  head.setattr("weight", table.attr("weight"));
  model.register_module("table", table);
  model.register_module("head", head);
  model.define(
      "def forward(self, ids):\n    return "
      "self.head.forward(self.table.forward(ids))\n");

  auto adapter = peft::attach(model, LoraOptions(2).targets({"table", "head"}));
  REQUIRE(adapter.sites().size() == 1);
  REQUIRE(adapter.sites()[0].parameters.size() == 2);
  REQUIRE(peft::count_parameters(model).total == 28 + 2 * 11);
  randomise(adapter);
  const Tensor ids = torch::tensor({1, 5, 1});
  const Tensor weight = peft::effective(parameter(model, "table.weight"));
  const Tensor expected = torch::embedding(weight, ids).mm(weight.t());
  REQUIRE(close(infer(model, {ids}), expected));
  peft::merge(model);
  REQUIRE(close(infer(model, {ids}), expected));
}

TEST_CASE("jit: grouped convolutions, traced") {
  seed();
  const Tensor weight = torch::randn({6, 2, 3, 3}, torch::kDouble);
  const Tensor x = torch::randn({2, 4, 5, 5}, torch::kDouble);
  for (const char* call :
       {"torch._convolution(x, self.weight, None, [1, 1], [1, 1], [1, 1], "
        "False, [0, 0], 2, False, False, True, True)",
        "torch.conv2d(x, self.weight, None, [1, 1], [1, 1], [1, 1], 2)"}) {
    CAPTURE(call);
    Module model = new_module("container.Net", {}, "");
    model.register_module(
        "conv",
        new_module(
            "conv.Conv2d",
            {{"weight", weight}},
            std::string("def forward(self, x):\n    return ") + call + "\n"));
    model.define("def forward(self, x):\n    return self.conv.forward(x)\n");
    auto adapter = peft::attach(model, LoraOptions(2).targets({"conv"}));
    randomise(adapter);
    const Tensor effective = peft::effective(parameter(model, "conv.weight"));
    REQUIRE_FALSE(close(effective, weight));
    const Tensor expected = torch::conv2d(x, effective, {}, 1, 1, 1, 2);
    for (int i = 0; i < 3; ++i) {
      REQUIRE(close(infer(model, {x}), expected));
    }
    {
      GraphOptimizerEnabledGuard plain_executor(false);
      REQUIRE(close(run(model, {x}), expected));
    }
    peft::merge(model);
    REQUIRE(close(infer(model, {x}), expected));
  }
}

TEST_CASE("jit: several adapters, on the module and on a part of it") {
  seed();
  Module model = two_layers();
  const Module part = model.attr("first").toModule();
  auto inner = peft::attach(part, LoraOptions(2).targets({""}), "inner");
  auto outer = peft::attach(model, LoraOptions(2).targets({"last"}), "outer");
  REQUIRE(peft::adapters(model).size() == 2);
  REQUIRE(peft::adapters(part).size() == 1);
  randomise(inner);
  randomise(outer);
  const Inputs x{torch::randn({4, 6}, torch::kDouble)};
  const Tensor both = infer(model, x);
  const Tensor only_outer = [&] {
    peft::ActiveAdapters scope({"outer"});
    return infer(model, x);
  }();
  REQUIRE_FALSE(close(both, only_outer));
  REQUIRE(contains(
      error_of([&] { peft::merge(model); }),
      "another module around or inside"));
  peft::merge(part);
  REQUIRE(close(infer(model, x), both));
  peft::merge(model);
  REQUIRE(close(infer(model, x), both));
  for (const auto& p : model.parameters()) {
    REQUIRE(p.requires_grad());
  }
}

TEST_CASE("Several adapters on a TorchScript module", "[jit]") {
  seed();
  const Module model = two_layers(torch::kFloat);
  const Tensor x = torch::randn({4, 6});
  const Tensor base = infer(model, {x});
  const LoraOptions options = LoraOptions(2).targets({"first"});
  auto a = peft::attach(model, options, "a");
  auto b = peft::attach(model, options, "b");
  randomise(a);
  randomise(b);
  const auto under = [&](const std::string& name) {
    const peft::ActiveAdapters scope({name});
    return infer(model, {x});
  };
  const Tensor of_a = under("a"), of_b = under("b");
  peft::set_adapter(model, "a");
  CHECK(peft::active_adapters(model) == std::vector<std::string>{"a"});
  CHECK(equal_bits(infer(model, {x}), of_a));
  CHECK_FALSE(b.parameters()[0].requires_grad());
  peft::rename_adapter(model, "b", "c");
  CHECK(equal_bits(under("c"), of_b));

  const TemporaryDirectory folder;
  peft::save_adapters(model, folder.path().string());
  peft::delete_adapter(model, "a");
  CHECK(peft::adapters(model).size() == 1);
  CHECK(equal_bits(under("c"), of_b));
  peft::hotswap_adapter(model, folder / "a", "c");
  CHECK(equal_bits(under("c"), of_a));
  peft::delete_adapter(model, "c");
  CHECK(equal_bits(infer(model, {x}), base));
  CHECK(peft::load_adapters(model, folder.path().string()).size() == 2);
  CHECK(equal_bits(infer(model, {x}), of_a)); // the first acts
  CHECK(equal_bits(under("c"), of_b));
}

} // namespace test_jit
