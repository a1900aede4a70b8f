// add_weighted_adapter: HF PEFT's numbers (golden/make_weighted.py), and what
// the combinations promise on every kind of layer.

#include "test.h"

#include "golden_case.h"

#include <torch/nn.h>

namespace test_weighted {

using namespace golden_case;
using peft::LoraOptions;
using peft::WeightedAdapterOptions;

namespace {

using Names = std::vector<std::string>;
using Weights = std::vector<double>;

/// LoRA whose factors are not zero, under a name.
peft::Adapter random_lora(
    torch::nn::Module& module,
    const LoraOptions& options,
    const std::string& name) {
  auto adapter = peft::attach(module, options, name);
  const torch::NoGradGuard no_grad;
  for (auto& p : adapter.parameters()) {
    p.copy_(0.5 * torch::randn_like(p));
  }
  return adapter;
}

std::shared_ptr<torch::nn::Module> mlp(torch::Dtype dtype = torch::kDouble) {
  seed(1);
  auto module = std::make_shared<networks::Mlp>();
  module->to(dtype);
  module->eval();
  return module;
}

LoraOptions lora(int64_t r, Names targets) {
  return LoraOptions(r)
      .alpha(static_cast<double>(r) + 1)
      .targets(peft::Targets(std::move(targets)));
}

/// W + Σ wᵢ (W_i - W), by name.
TensorMap expected_sum(
    torch::nn::Module& module,
    const Names& names,
    const Weights& weights) {
  auto result = weights_under(module, {});
  const auto base = weights_under(module, {});
  for (size_t i = 0; i < names.size(); ++i) {
    for (auto& [name, value] : weights_under(module, {names[i]})) {
      result.at(name) = result.at(name) + weights[i] * (value - base.at(name));
    }
  }
  return result;
}

void check_equal(const TensorMap& got, const TensorMap& want, double relative) {
  REQUIRE(got.size() == want.size());
  for (const auto& [name, value] : want) {
    INFO(name);
    REQUIRE(near(got.at(name), value, relative));
  }
}

WeightedAdapterOptions options_of(const json& facts) {
  WeightedAdapterOptions o(facts.value("combination_type", ""));
  if (facts.contains("density")) {
    o.density(facts["density"].get<double>());
  }
  if (facts.contains("svd_rank")) {
    o.svd_rank(facts["svd_rank"].get<int64_t>());
  }
  if (facts.contains("svd_clamp")) {
    o.svd_clamp(facts["svd_clamp"].get<double>());
  }
  o.svd_full_matrices(facts.value("svd_full_matrices", true));
  return o.majority_sign_method(facts.value("majority_sign_method", "total"));
}

/// A network with the adapters of a case of data/weighted.
networks::Network with_adapters(
    const Golden& golden,
    torch::Dtype dtype = torch::kFloat) {
  auto network = golden.network();
  network.module->to(dtype);
  network.module->eval();
  for (const auto& name : golden.facts.at("adapters")) {
    const auto adapter = name.get<std::string>();
    peft::load(*network.module, (golden.folder / adapter).string(), adapter);
  }
  return network;
}

peft::Adapter
combine(networks::Network& network, const Golden& golden, const json& run) {
  seed(golden.facts.at("seed").get<uint64_t>());
  return peft::add_weighted_adapter(
      *network.module,
      run.at("adapters").get<Names>(),
      run.at("weights").get<Weights>(),
      "merged",
      options_of(run.at("options")));
}

} // namespace

namespace {

/// Combined in that dtype: its output, and its factors close to those of
/// `numbers`, a group of the golden file.
Tensor check_factors(
    const Golden& golden,
    const json& run,
    const std::string& numbers,
    torch::Dtype dtype,
    double allowed) {
  auto network = with_adapters(golden, dtype);
  const auto adapter = combine(network, golden, run);
  REQUIRE_FALSE(adapter.is_enabled());
  const auto parameters = adapter.named_parameters();
  auto factors = golden.group(numbers);
  factors.erase("output");
  REQUIRE(parameters.size() == factors.size());
  for (const auto& [key, value] : factors) {
    INFO(key);
    REQUIRE(find(parameters, key).scalar_type() == dtype);
    REQUIRE(near(find(parameters, key), value, allowed));
  }
  auto inputs = golden.inputs();
  for (auto& input : inputs) {
    input = input.is_floating_point() ? input.to(dtype) : input;
  }
  const peft::ActiveAdapters scope({"merged"});
  return network.run(inputs).detach();
}

} // namespace

TEST_CASE("weighted: what HF PEFT combines, to its numbers") {
  for (const auto& name : folders("", "weighted")) {
    const Golden golden(name, "weighted");
    for (const auto& run : golden.facts.at("runs")) {
      const auto run_name = run.at("name").get<std::string>();
      DYNAMIC_SECTION(name << " " << run_name) {
        const bool is_svd = run_name.find("svd") != std::string::npos;
        const auto output = check_factors(
            golden, run, run_name, torch::kFloat, is_svd ? 1e-5 : 1e-6);
        const auto theirs = golden.expected.at(run_name + ".output");
        if (!is_svd) {
          REQUIRE(near(output, theirs, 1e-6));
          continue;
        }
        // Two decompositions in float32 agree less than two sums: both are
        // held to the one in float64, where DARE draws other masks, though.
        const auto exact =
            golden.expected.at("float64." + run_name + ".output");
        const bool is_drawn = run_name.find("dare") != std::string::npos;
        const double largest = exact.abs().max().item<double>();
        const double rounding = (theirs - exact).abs().max().item<double>();
        REQUIRE(near(
            output,
            is_drawn ? theirs : exact,
            is_drawn ? 4e-6 : std::max(1e-6, 1.5 * rounding / largest)));
      }
    }
  }
}

TEST_CASE("weighted: decompositions in float64 are HF PEFT's to 1e-12") {
  for (const auto& name : folders("", "weighted")) {
    const Golden golden(name, "weighted");
    for (const auto& run : golden.facts.at("runs")) {
      const auto numbers = "float64." + run.at("name").get<std::string>();
      if (golden.expected.count(numbers + ".output") == 0) {
        continue;
      }
      DYNAMIC_SECTION(name << " " << numbers) {
        REQUIRE(near(
            check_factors(golden, run, numbers, torch::kDouble, 1e-11),
            golden.expected.at(numbers + ".output"),
            1e-12));
      }
    }
  }
}

TEST_CASE("weighted: the result is an adapter like any other") {
  const Golden golden("mlp", "weighted");
  for (const std::string kind : {"linear", "cat", "svd", "ties_svd"}) {
    DYNAMIC_SECTION(kind) {
      auto network = with_adapters(golden);
      peft::add_weighted_adapter(
          *network.module,
          {"a", "b", "d"},
          {0.5, -1.0, 0.25},
          "merged",
          WeightedAdapterOptions(kind).density(0.5));
      auto merged = peft::get_adapter(*network.module, "merged");
      for (const auto& p : merged.parameters()) {
        REQUIRE_FALSE(p.requires_grad());
      }
      const auto run = [&](const networks::Network& n) {
        const peft::ActiveAdapters scope({"merged"});
        return n.run(golden.inputs()).detach().clone();
      };
      const Tensor output = run(network);
      REQUIRE_FALSE(torch::allclose(
          output, golden.network().run(golden.inputs()), 1e-3, 1e-3));

      const TemporaryDirectory directory;
      peft::save(merged, directory / "out");
      auto other = golden.network();
      other.module->eval();
      peft::load(*other.module, directory / "out", "merged");
      REQUIRE(equal_bits(run(other), output));

      // Trains.
      merged.enable();
      for (const std::string name : {"a", "b", "c", "d"}) {
        peft::get_adapter(*network.module, name).detach();
      }
      merged.set_trainable(true);
      torch::optim::SGD optimizer(merged.parameters(), 0.1);
      const auto before = merged.parameters()[0].detach().clone();
      network.run(golden.inputs()).square().mean().backward();
      optimizer.step();
      REQUIRE_FALSE(torch::equal(merged.parameters()[0], before));

      // Merges.
      const Tensor trained = run(network);
      peft::merge(*network.module);
      REQUIRE(near(network.run(golden.inputs()), trained, 1e-6));
    }
  }
}

TEST_CASE("weighted: cat and svd of enough rank are the sum of the changes") {
  struct Row {
    std::string name;
    std::shared_ptr<torch::nn::Module> module;
    Names a, b;
  };
  const auto box = [](auto layer) {
    auto result = std::make_shared<torch::nn::Module>();
    result->register_module("layer", layer);
    return result;
  };
  using namespace torch::nn;
  seed(2);
  const std::vector<Row> rows{
      {"two of three", mlp(), {"fc1", "fc2"}, {"fc2", "head"}},
      {"Embedding", box(Embedding(9, 7)), {"layer"}, {"layer"}},
      {"Conv1d", box(Conv1d(Conv1dOptions(4, 6, 3))), {"layer"}, {"layer"}},
      {"Conv3d", box(Conv3d(Conv3dOptions(4, 6, 2))), {"layer"}, {"layer"}},
      {"grouped",
       box(Conv2d(Conv2dOptions(4, 6, 3).groups(2))),
       {"layer"},
       {"layer"}},
      {"pointwise", box(Conv2d(Conv2dOptions(4, 6, 1))), {"layer"}, {"layer"}},
      {"Conv1D", box(peft::models::Conv1D(5, 8)), {"layer"}, {"layer"}},
      {"LSTM", box(LSTM(4, 5)), {"layer"}, {"layer.weight_hh_l0"}},
      {"attention", box(MultiheadAttention(8, 2)), {"layer"}, {"layer"}},
      {"out_proj only",
       box(MultiheadAttention(8, 2)),
       {"layer.out_proj"},
       {"layer.in_proj_weight"}},
  };
  for (const auto& row : rows) {
    for (const std::string kind : {"cat", "svd", "all singular vectors"}) {
      DYNAMIC_SECTION(row.name << " " << kind) {
        auto& module = *row.module;
        module.to(torch::kDouble);
        module.eval();
        random_lora(module, lora(4, row.a), "a");
        random_lora(module, lora(2, row.b), "b").set_scale(1.5);
        auto options = kind == "cat"
            ? WeightedAdapterOptions("cat")
            : WeightedAdapterOptions("svd").svd_rank(6).svd_full_matrices(
                  kind != "svd");
        peft::add_weighted_adapter(
            module, {"a", "b"}, {0.75, -2.0}, "merged", options);
        check_equal(
            weights_under(module, {"merged"}),
            expected_sum(module, {"a", "b"}, {0.75, -2.0}),
            1e-12);
        for (const std::string name : {"a", "b", "merged"}) {
          peft::get_adapter(module, name).detach();
        }
      }
    }
  }
}

TEST_CASE("weighted: q and v of packed attention, each with its own factors") {
  seed(3);
  torch::nn::MultiheadAttention attention(
      torch::nn::MultiheadAttentionOptions(8, 2));
  attention->to(torch::kDouble);
  random_lora(*attention, LoraOptions(2), "a"); // q and v by default
  random_lora(
      *attention,
      LoraOptions(3)
          .targets({"in_proj_weight"})
          .enable_lora({true, true, false}),
      "b");
  peft::add_weighted_adapter(
      *attention, {"a", "b"}, {1.5, -0.5}, "merged", {"cat"});
  check_equal(
      weights_under(*attention, {"merged"}),
      expected_sum(*attention, {"a", "b"}, {1.5, -0.5}),
      1e-12);
}

TEST_CASE("weighted: the scalings count, whatever they come from") {
  auto module = mlp();
  random_lora(*module, lora(4, {"fc1"}).rslora(true), "a");
  random_lora(
      *module,
      lora(4, {"fc1", "fc2"})
          .rank_pattern({{"fc2", 2}})
          .alpha_pattern({{"fc1", 9}}),
      "b")
      .set_scale(0.5);
  SECTION("cat") {
    peft::add_weighted_adapter(
        *module, {"a", "b"}, {-1.0, 3.0}, "merged", {"cat"});
    check_equal(
        weights_under(*module, {"merged"}),
        expected_sum(*module, {"a", "b"}, {-1.0, 3.0}),
        1e-12);
  }
  SECTION("linear, alone: the adapter times its weight") {
    for (const double weight : {1.0, -0.25}) {
      const std::string name = weight > 0 ? "plus" : "minus";
      peft::add_weighted_adapter(*module, {"b"}, {weight}, name);
      check_equal(
          weights_under(*module, {name}),
          expected_sum(*module, {"b"}, {weight}),
          1e-12);
    }
  }
  SECTION("a rank of its own at a site is kept, and saved") {
    auto merged = peft::add_weighted_adapter(*module, {"b"}, {1.0}, "merged");
    REQUIRE(merged.named_parameters()["fc2.lora_A.weight"].size(0) == 2);
    const TemporaryDirectory directory;
    peft::save(merged, directory / "out");
    auto other = mlp();
    peft::load(*other, directory / "out", "merged");
    check_equal(
        weights_under(*other, {"merged"}),
        weights_under(*module, {"merged"}),
        1e-12);
  }
}

TEST_CASE("weighted: an adapter that started as a part of the weight") {
  auto module = mlp();
  random_lora(*module, lora(2, {"fc1"}).init("pissa"), "a");
  random_lora(*module, lora(4, {"fc1"}), "b");
  for (const std::string kind : {"cat", "svd"}) {
    peft::add_weighted_adapter(
        *module,
        {"a", "b"},
        {0.5, -2.0},
        kind,
        WeightedAdapterOptions(kind).svd_rank(8));
    check_equal(
        weights_under(*module, {kind}),
        expected_sum(*module, {"a", "b"}, {0.5, -2.0}),
        1e-12);
  }
  peft::add_weighted_adapter(*module, {"a"}, {-0.5}, "alone");
  check_equal(
      weights_under(*module, {"alone"}),
      expected_sum(*module, {"a"}, {-0.5}),
      1e-12);
  REQUIRE(contains(
      error_of([&] {
        peft::add_weighted_adapter(
            *module, {"a", "b"}, {1.0, 1.0}, "m", {"linear"});
      }),
      "started as a part of the weight"));
}

TEST_CASE("weighted: adapters that name their layers in different ways") {
  seed(1);
  auto module = std::make_shared<networks::Stack>();
  module->to(torch::kDouble);
  random_lora(*module, lora(2, {"query", "value"}).layers({1}), "layer 1");
  random_lora(
      *module,
      LoraOptions(2).targets(
          peft::Targets::regex("encoder\\.layer\\.0\\.query")),
      "pattern");
  random_lora(
      *module,
      lora(2, {"value"}).exclude({"encoder.layer.0.value"}),
      "excluded");
  const Names names{"layer 1", "pattern", "excluded"};
  auto merged = peft::add_weighted_adapter(
      *module, names, {1.0, -1.0, 0.5}, "merged", {"cat"});
  check_equal(
      weights_under(*module, {"merged"}),
      expected_sum(*module, names, {1.0, -1.0, 0.5}),
      1e-12);
  const TemporaryDirectory directory;
  peft::save(merged, directory / "out");
  auto other = std::make_shared<networks::Stack>();
  other->to(torch::kDouble);
  const auto again = peft::load(*other, directory / "out", "merged");
  REQUIRE(again.sites().size() == merged.sites().size());
}

TEST_CASE("weighted: a head comes along, and lora_bias is summed") {
  auto module = mlp();
  random_lora(
      *module, lora(4, {"fc1"}).modules_to_save({"head"}).lora_bias(true), "a");
  random_lora(*module, lora(4, {"fc1", "fc2"}).lora_bias(true), "b");
  auto want = expected_sum(*module, {"a", "b"}, {0.5, 2.0});
  for (const std::string name : {"head.weight", "head.bias"}) {
    want.at(name) = weights_under(*module, {"a"}).at(name);
  }
  for (const std::string kind : {"cat", "svd"}) {
    peft::add_weighted_adapter(
        *module,
        {"a", "b"},
        {0.5, 2.0},
        kind,
        WeightedAdapterOptions(kind).svd_rank(8));
    check_equal(weights_under(*module, {kind}), want, 1e-12);
  }
}

TEST_CASE("weighted: DARE keeps the expectation, and its share of entries") {
  const Tensor t = torch::randn({200, 300});
  namespace f = peft::functional;
  seed(4);
  const Tensor kept = f::prune_at_random(t, 0.3, /*rescale=*/true);
  const Tensor mask = kept.ne(0);
  REQUIRE(std::abs(mask.to(torch::kDouble).mean().item<double>() - 0.3) < 0.01);
  REQUIRE(equal_bits(kept, (t * mask) / 0.3));
  seed(4);
  REQUIRE(equal_bits(f::prune_at_random(t, 0.3, false), t * mask));
  REQUIRE(f::prune_by_magnitude(t, 0.25).ne(0).sum().item<int64_t>() == 15000);
  REQUIRE(equal_bits(f::prune_by_magnitude(t, 1.0), t));
}

TEST_CASE("weighted: TIES by hand") {
  namespace f = peft::functional;
  const auto opts = torch::kDouble;
  const std::vector<Tensor> tensors{
      torch::tensor({4.0, -3.0, 1.0, 5.0}, opts),
      torch::tensor({-1.0, -2.0, 6.0, 0.5}, opts),
      torch::tensor({-2.0, 1.0, 0.0, 3.0}, opts)};
  // All kept. Totals 1, -4, 7, 8.5: elected +, -, +, +.
  REQUIRE(equal_bits(
      f::ties(tensors, {1, 1, 1}, 1.0),
      torch::tensor({4.0, -2.5, 3.5, 8.5 / 3}, opts)));
  // By number: -, -, +, +.
  REQUIRE(equal_bits(
      f::ties(tensors, {1, 1, 1}, 1.0, f::MajoritySign::frequency),
      torch::tensor({-1.5, -2.5, 3.5, 8.5 / 3}, opts)));
  // Half kept: [4, 0, 0, 5], [0, -2, 6, 0], [-2, 0, 0, 3]; then weights.
  REQUIRE(equal_bits(
      f::ties(tensors, {1, -1, 2}, 0.5),
      torch::tensor({4.0, 2.0, -6.0, 5.5}, opts)));
}

TEST_CASE("weighted: what cannot be combined is refused and changes nothing") {
  auto module = mlp();
  random_lora(*module, lora(4, {"fc1"}), "a");
  random_lora(*module, lora(2, {"fc1"}), "b");
  random_lora(*module, lora(4, {"fc1"}).dora(true), "dora");
  random_lora(*module, lora(4, {"fc1"}).bias("all"), "biases");
  random_lora(*module, lora(4, {"fc1"}).modules_to_save({"head"}), "h1");
  random_lora(*module, lora(4, {"fc1"}).modules_to_save({"head"}), "h2");
  peft::attach(*module, peft::Ia3Options().targets({"fc1"}), "ia3");
  peft::attach(*module, peft::BitFitOptions(), "bitfit");
  const auto error = [&](const Names& names,
                         const Weights& weights,
                         const std::string& name,
                         const WeightedAdapterOptions& options) {
    const auto before = peft::adapters(*module).size();
    const auto text = error_of([&] {
      peft::add_weighted_adapter(*module, names, weights, name, options);
    });
    REQUIRE(peft::adapters(*module).size() == before);
    return text;
  };
  using O = WeightedAdapterOptions;
  struct Row {
    Names names;
    Weights weights;
    std::string name;
    O options;
    std::string part;
  };
  const std::vector<Row> rows{
      {{}, {}, "m", O("cat"), "needs at least one adapter"},
      {{"a", "b"}, {1}, "m", O("cat"), "2 adapters and 1 weights"},
      {{"a", "z"}, {1, 1}, "m", O("cat"), "has no adapter 'z'"},
      {{"a", "b"}, {1, 1}, "a", O("cat"), "already has an adapter named 'a'"},
      {{"a", "b"}, {1, 1}, "x.y", O("cat"), "must not contain a dot"},
      {{"a", "b"}, {1, std::nan("")}, "m", O("cat"), "must be finite"},
      {{"a", "b"}, {1, 1}, "m", O("linear"), "at 'fc1' the ranks are 4 and 2"},
      {{"a", "b"}, {1, 1}, "m", O("ties").density(0.5), "the ranks are 4 and"},
      {{"a", "b"}, {1, 1}, "m", O("best"), "combination_type must be"},
      {{"a", "b"}, {1, 1}, "m", O("linear_svd"), "combination_type must be"},
      {{"a", "b"}, {1, 1}, "m", O("_svd"), "combination_type must be"},
      {{"a", "b"}, {1, 1}, "m", O("ties_svd"), "set density(...)"},
      {{"a", "b"}, {1, 1}, "m", O("ties_svd").density(0), "in (0, 1], got 0"},
      {{"a", "b"},
       {1, 1},
       "m",
       O("dare_ties_svd").density(1.5),
       "in (0, 1], got 1.5"},
      {{"a", "b"}, {1, 1}, "m", O("svd").svd_rank(0), "svd_rank must be pos"},
      {{"a", "b"}, {1, 1}, "m", O("svd").svd_clamp(2), "quantile in (0, 1]"},
      {{"a", "b"},
       {1, 1},
       "m",
       O("ties_svd").density(1).majority_sign_method("loudest"),
       "'total' or 'frequency', got 'loudest'"},
      {{"a", "dora"}, {1, 1}, "m", O("svd"), "magnitudes cannot be combined"},
      {{"a", "biases"}, {1, 1}, "m", O("svd"), "trains biases of the base"},
      {{"h1", "h2"}, {1, 1}, "m", O("svd"), "two of the adapters train 'head"},
      {{"a", "ia3"}, {1, 1}, "m", O("svd"), "'ia3' of IA3"},
      {{"bitfit"}, {1}, "m", O("svd"), "is of method BITFIT"},
      {{"ia3"}, {1}, "m", O("svd"), "by 'linear' only"},
  };
  for (const auto& row : rows) {
    INFO(row.part);
    const auto text = error(row.names, row.weights, row.name, row.options);
    INFO(text);
    REQUIRE(contains(text, row.part));
  }

  auto merged = mlp();
  random_lora(*merged, lora(4, {"fc1"}), "a").merge();
  REQUIRE(contains(
      error_of([&] { peft::add_weighted_adapter(*merged, {"a"}, {1.0}, "m"); }),
      "adapter 'a' is merged; unmerge() it"));

  auto outer = std::make_shared<torch::nn::Module>();
  auto inner = outer->register_module(
      "inner", torch::nn::Linear(torch::nn::LinearOptions(4, 4)));
  random_lora(*inner, lora(2, {""}), "inside");
  random_lora(*outer, lora(2, {"inner"}), "outside");
  REQUIRE(contains(
      error_of([&] {
        peft::add_weighted_adapter(
            *outer, {"inside", "outside"}, {1.0, 1.0}, "m");
      }),
      "attached to different modules"));
}

TEST_CASE("weighted: (IA)3 adapters that differ cannot be united silently") {
  auto module = mlp();
  peft::attach(*module, peft::Ia3Options().targets({"fc1"}), "out");
  peft::attach(
      *module, peft::Ia3Options().targets({"fc1"}).feedforward({"fc1"}), "in");
  peft::attach(
      *module, peft::Ia3Options().targets(peft::Targets::regex("fc1")), "re");
  REQUIRE(contains(
      error_of([&] {
        peft::add_weighted_adapter(*module, {"out", "in"}, {1.0, 1.0}, "m");
      }),
      "scales the input and another the output"));
  REQUIRE(contains(
      error_of([&] {
        peft::add_weighted_adapter(*module, {"out", "re"}, {1.0, 1.0}, "m");
      }),
      "name their targets in different ways"));
}

TEST_CASE("weighted: combined adapters are written for HF PEFT to read") {
  const ReverseFolder root;
  for (const auto& name : folders("", "weighted")) {
    const Golden golden(name, "weighted");
    for (const auto& run : golden.facts.at("runs")) {
      auto network = with_adapters(golden);
      const TensorMap base = golden_case::values(*golden.network().module);
      const auto merged = combine(network, golden, run);
      const fs::path folder =
          root / (name + "_" + run.at("name").get<std::string>());
      fs::create_directories(folder);
      peft::save_safetensors(base, (folder / "base.safetensors").string());
      peft::save(merged, (folder / "adapter").string());
      TensorMap numbers;
      const auto inputs = golden.inputs();
      for (size_t i = 0; i < inputs.size(); ++i) {
        numbers.emplace("input." + std::to_string(i), inputs[i]);
      }
      const peft::ActiveAdapters scope({"merged"});
      write_numbers(
          folder,
          numbers,
          network.run(inputs),
          {{"network", golden.text("network")},
           {"dtype", "float32"},
           {"trainable", merged.num_parameters()}});
      REQUIRE(fs::exists(folder / "adapter/adapter_model.safetensors"));
    }
  }
}

} // namespace test_weighted
