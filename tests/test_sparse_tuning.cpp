/// Sparse fine-tuning: which entries are chosen, that they alone move under any
/// optimizer, and that files and merges keep every bit.

#include "accounting.h"
#include "adapted.h"
#include "gradcheck.h"
#include "model_state.h"
#include "networks.h"
#include "test.h"

#include <peft/core/sparse_copy.h>
#include <peft/functional/sparse_linear.h>
#include <peft/methods/sparse_tuning.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace test_sparse_tuning {

namespace {

using peft::RandomMaskOptions;
using peft::Scores;
using peft::ShiraOptions;
using peft::SparseCopy;
using peft::SparseMask;
using peft::SparseTuningOptions;
using torch::Tensor;
namespace F = torch::nn::functional;

Tensor places(std::vector<int64_t> values) {
  return torch::tensor(values, torch::kLong);
}

/// A mask of a third of an Mlp's fc1 and head, biases too, and none of fc2.
SparseMask third_of(const networks::Mlp& model, double share = 0.3) {
  torch::manual_seed(21);
  SparseMask mask;
  for (const auto& p : model.named_parameters()) {
    if (!contains(p.key(), "fc2")) {
      auto chosen = torch::rand(p.value().sizes()) < share;
      chosen.view(-1)[1] = true;
      mask.set(p.key(), chosen);
    }
  }
  return mask;
}

/// W' by the definition, entry by entry.
Tensor by_hand(
    const Tensor& weight,
    const SparseCopy& copy,
    bool additive,
    double scale) {
  Tensor result = weight.detach().clone().contiguous();
  Tensor flat = result.view(-1);
  for (int64_t j = 0; j < copy.indices.numel(); ++j) {
    const auto i = copy.indices[j].item<int64_t>();
    const auto v = copy.values[j].item<double>();
    const auto w = flat[i].item<double>();
    flat[i] = additive ? w + scale * v : scale == 1 ? v : w + scale * (v - w);
  }
  return result;
}

SparseCopy& sparse_at(const peft::Adapter& adapter, size_t site) {
  return dynamic_cast<SparseCopy&>(
      *adapter.shared_state()->sites.at(site).delta);
}

/// What `make`'s optimizer does to the entries of `mask` when it sees them
/// alone: the equations of the three optimizers in float64.
struct DenseReference {
  std::string rule;
  double rate, decay, momentum;
  Tensor first, second;
  int64_t step = 0;

  Tensor next(const Tensor& p, Tensor g) {
    ++step;
    if (rule == "AdamW") {
      return adam(p * (1 - rate * decay), g);
    }
    g = g + decay * p;
    if (rule == "Adam") {
      return adam(p, g);
    }
    first = step == 1 ? g.clone() : momentum * first + g;
    return p - rate * first;
  }

  Tensor adam(const Tensor& p, const Tensor& g) {
    if (step == 1) {
      first = torch::zeros_like(g);
      second = torch::zeros_like(g);
    }
    first = 0.9 * first + 0.1 * g;
    second = 0.999 * second + 0.001 * g * g;
    const auto m = first / (1 - std::pow(0.9, step));
    const auto v = second / (1 - std::pow(0.999, step));
    return p - rate * m / (v.sqrt() + 1e-8);
  }
};

std::unique_ptr<torch::optim::Optimizer> optimizer_of(
    const std::string& rule,
    const std::vector<Tensor>& parameters) {
  using namespace torch::optim;
  if (rule == "SGD") {
    return std::make_unique<SGD>(
        parameters, SGDOptions(0.1).momentum(0.9).weight_decay(0.2));
  }
  if (rule == "Adam") {
    return std::make_unique<Adam>(
        parameters, AdamOptions(0.05).weight_decay(0.2));
  }
  return std::make_unique<AdamW>(
      parameters, AdamWOptions(0.05).weight_decay(0.2));
}

/// The numbers in an optimizer's state, steps aside.
int64_t numel_of_state(const torch::optim::Optimizer& optimizer) {
  int64_t count = 0;
  const auto add = [&](const Tensor& t) {
    count += t.defined() ? t.numel() : 0;
  };
  for (const auto& item : optimizer.state()) {
    auto* state = item.second.get();
    if (auto* s = dynamic_cast<torch::optim::SGDParamState*>(state)) {
      add(s->momentum_buffer());
    } else if (auto* a = dynamic_cast<torch::optim::AdamParamState*>(state)) {
      add(a->exp_avg());
      add(a->exp_avg_sq());
    } else if (auto* w = dynamic_cast<torch::optim::AdamWParamState*>(state)) {
      add(w->exp_avg());
      add(w->exp_avg_sq());
    }
  }
  return count;
}

std::string reference(const std::string& name) {
  return golden("../../reference/data/sparse/" + name + ".safetensors");
}

} // namespace

TEST_CASE("top_k is a sort by score, then tensor, then place") {
  for (int round = 0; round < 20; ++round) {
    INFO("round " << round);
    seed(round);
    const Scores scores{
        // few distinct scores: many ties
        {"a", torch::randint(0, 6, {5, 7}).to(torch::kFloat).t()},
        {"b", torch::randint(0, 6, {4}).to(torch::kDouble)},
        {"c", torch::randint(0, 6, {}).to(torch::kHalf)},
        {"d", torch::empty({0, 3})}};
    std::vector<std::tuple<double, size_t, int64_t>> sorted;
    for (size_t t = 0; t < scores.size(); ++t) {
      const auto flat = scores[t].second.contiguous().view(-1);
      for (int64_t i = 0; i < flat.numel(); ++i) {
        sorted.emplace_back(-flat[i].item<double>(), t, i);
      }
    }
    std::sort(sorted.begin(), sorted.end());
    for (size_t k : {1u, 3u, 20u, 39u, 40u}) {
      const auto mask = peft::top_k(scores, static_cast<int64_t>(k));
      CHECK(mask.numel() == static_cast<int64_t>(k));
      for (size_t t = 0; t < scores.size(); ++t) {
        std::vector<int64_t> expected;
        for (size_t j = 0; j < k; ++j) {
          if (std::get<1>(sorted[j]) == t) {
            expected.push_back(std::get<2>(sorted[j]));
          }
        }
        std::sort(expected.begin(), expected.end());
        CHECK(equal_bits(mask.indices_of(scores[t].first), places(expected)));
      }
    }
  }
  const double inf = std::numeric_limits<double>::infinity();
  const auto mask = peft::top_k({{"a", torch::tensor({1., inf, -inf, 2.})}}, 2);
  CHECK(equal_bits(mask.indices_of("a"), places({1, 3})));
}

TEST_CASE("top_k_per_tensor takes the same share of each tensor") {
  seed();
  const Scores scores{{"a", torch::randn({10, 3})}, {"b", torch::randn({3})}};
  const auto mask = peft::top_k_per_tensor(scores, 0.25);
  REQUIRE(mask.entries().size() == 1); // a quarter of 3 is less than one
  CHECK(equal_bits(
      mask.indices_of("a"), peft::top_k({scores[0]}, 7).indices_of("a")));
  CHECK(mask.entries()[0].sizes == std::vector<int64_t>{10, 3});
}

TEST_CASE("a random mask is drawn without replacement, evenly, from a seed") {
  const peft::Shapes shapes{{"a", {3, 4}}, {"b", {5}}, {"c", {}}};
  const auto all = peft::random_mask(shapes, 18, 3);
  CHECK(equal_bits(all.indices_of("a"), torch::arange(12)));
  CHECK(equal_bits(all.indices_of("c"), places({0})));
  auto hits = torch::zeros({18});
  const int rounds = 3000;
  for (int i = 0; i < rounds; ++i) {
    const auto mask = peft::random_mask(shapes, 6, i);
    CHECK(mask.numel() == 6);
    hits.index_add_(
        0,
        mask.indices_of("a"),
        torch::ones({18}).slice(0, 0, mask.indices_of("a").numel()));
    hits.slice(0, 12, 17).index_add_(
        0, mask.indices_of("b"), torch::ones({mask.indices_of("b").numel()}));
    hits[17] += mask.indices_of("c").numel();
  }
  // A third each; six standard deviations of a binomial.
  const double spread = 6 * std::sqrt(rounds * (1. / 3) * (2. / 3));
  CHECK((hits - rounds / 3.).abs().max().item<double>() < spread);
  const auto one = peft::random_mask(shapes, 6, 5);
  const auto two = peft::random_mask(shapes, 6, 5);
  CHECK(equal_bits(one.indices_of("a"), two.indices_of("a")));
  const auto each = peft::random_mask_per_tensor(shapes, 0.5, 1);
  CHECK(each.indices_of("a").numel() == 6);
  CHECK(each.indices_of("b").numel() == 2);
  CHECK(each.find("c") == nullptr);
}

TEST_CASE("a mask says what is wrong with it") {
  SparseMask mask;
  mask.set("w", torch::eye(3).to(torch::kBool));
  CHECK(equal_bits(mask.indices_of("w"), places({0, 4, 8})));
  mask.set("w", places({7, 2}), {{3, 3}});
  CHECK(equal_bits(mask.indices_of("w"), places({2, 7})));
  CHECK(mask.numel() == 2);
  mask.set("v", torch::ones({2, 3}).to(torch::kBool).t());
  mask.set("v", torch::empty({0}, torch::kLong));
  CHECK(mask.entries().size() == 1);
  const auto ones = torch::ones({3});
  struct Row {
    std::function<void()> action;
    std::string part;
  };
  const std::vector<Row> rows{
      {[&] {
         mask.set("w", places({5, 5}));
       },
       "names an entry twice"},
      {[&] {
         mask.set("w", places({-5, 5}));
       },
       "names entry -5"},
      {[&] {
         mask.set("w", places({9}), {{3, 3}});
       },
       "names entry 9, and the parameter has 9"},
      {[&] { mask.set("w", ones); }, "must be a bool tensor"},
      {[&] { mask.set("w", ones.to(torch::kBool), {{2}}); }, "has shape [3]"},
      {[&] { mask.set("w", Tensor()); }, "got nothing"},
      {[&] {
         peft::top_k({{"w", ones * NAN}}, 1);
       },
       "'w' hold NaN"},
      {[&] {
         peft::top_k({{"w", ones}}, 4);
       },
       "k = 4 entries of only 3"},
      {[&] {
         peft::top_k({{"w", ones}}, 0);
       },
       "at least one entry"},
      {[&] {
         peft::top_k({{"w", ones}, {"w", ones}}, 1);
       },
       "'w' twice"},
      {[&] {
         peft::top_k({{"w", places({1})}}, 1);
       },
       "floating point"},
      {[&] {
         peft::top_k_per_tensor({{"w", ones}}, 1.5);
       },
       "lie in (0, 1]"},
      {[&] {
         peft::top_k_per_tensor({{"w", ones}}, 0.1);
       },
       "an empty mask"},
      {[&] {
         peft::random_mask({{"w", {3}}}, 4, 0);
       },
       "k = 4 entries"},
      {[&] {
         peft::random_mask({{"w", {3}}}, -1, 0);
       },
       "k = -1"},
      {[&] {
         peft::random_mask_per_tensor({{"w", {3}}}, 0, 0);
       },
       "lie in (0, 1]"},
      {[&] {
         peft::random_mask_per_tensor({{"w", {3}}}, .1, 0);
       },
       "an empty mask"}};
  for (const auto& row : rows) {
    const auto error = error_of(row.action);
    INFO(error << " | " << row.part);
    CHECK(contains(error, row.part));
    CHECK(equal_bits(mask.indices_of("w"), places({2, 7})));
  }
}

TEST_CASE("the sparse linear map has the gradients of its formula") {
  struct Row {
    std::string name;
    std::vector<int64_t> batch;
    int64_t k;
    bool bias;
  };
  for (const auto& row : std::vector<Row>{
           {"few of many, without dW'", {3}, 4, true},
           {"many", {3}, 100, false},
           {"all", {2, 2}, 300, true},
           {"batch of two dimensions", {2, 3}, 4, false}}) {
    INFO(row.name);
    seed(1);
    const auto d = torch::TensorOptions(torch::kDouble);
    auto sizes = row.batch;
    sizes.push_back(15);
    auto x = torch::randn(sizes, d).requires_grad_();
    const auto weight = torch::randn({15, 20}, d).t();
    auto t = torch::randn({row.k}, d).requires_grad_();
    auto bias = row.bias ? torch::randn({20}, d).requires_grad_() : Tensor();
    const auto where =
        std::get<0>(torch::randperm(300).slice(0, 0, row.k).sort());
    const auto f = [&](const gradcheck::Tensors& in) {
      return peft::functional::sparse_linear(
          in[0],
          weight,
          row.bias ? std::optional<Tensor>(in[2]) : std::nullopt,
          where,
          in[1]);
    };
    gradcheck::Tensors inputs{x, t};
    if (row.bias) {
      inputs.push_back(bias);
    }
    const auto y = f(inputs);
    auto full = weight.contiguous();
    full.view(-1).index_put_({where}, t.detach());
    CHECK(close(y, at::linear(x, full, bias)));
    sizes.back() = 20;
    const auto direction = torch::randn(sizes, d);
    CHECK(gradcheck::first_order(f, inputs, direction));
    CHECK(gradcheck::second_order(f, inputs, direction));
    t.set_requires_grad(false);
    CHECK(gradcheck::first_order(f, inputs, direction));
    x.set_requires_grad(false);
    t.set_requires_grad(true);
    CHECK(gradcheck::first_order(f, inputs, direction));
  }
}

TEST_CASE("a step keeps no second copy of the weights and makes no dW'") {
  seed();
  const int64_t d = 768, n = 64, k = d * d / 200;
  const int64_t size = d * d * 4; // bytes of a weight
  torch::nn::Linear linear(d, d);
  auto adapter = peft::attach(*linear, RandomMaskOptions().k(k));
  CHECK(adapter.num_parameters() == k);
  auto x = torch::randn({n, d}).requires_grad_();
  for (auto& p : adapter.parameters()) {
    p.mutable_grad() = torch::zeros_like(p);
  }
  x.mutable_grad() = torch::zeros_like(x);
  Tensor y;
  {
    const accounting::Memory memory;
    y = linear(x);
    CHECK(memory.of_at_least(size).size() == 1); // W', gone by now
    CHECK(memory.held() < size / 4);
  }
  {
    const accounting::Memory memory;
    y.sum().backward();
    CHECK(memory.of_at_least(size).size() == 1); // W' for dx, and no dW'
    CHECK(memory.peak() < size + size / 2);
  }
  // What autograd would do by itself, for comparison.
  const auto values = sparse_at(adapter, 0).values;
  const auto full = [&] {
    return at::linear(
        x,
        peft::functional::replaced(
            peft::base(linear->weight), sparse_at(adapter, 0).indices, values),
        linear->bias);
  };
  {
    const accounting::Memory memory;
    y = full();
    CHECK(memory.held() >= size);
  }
  CHECK(equal_bits(y, linear(x)));
  {
    torch::NoGradGuard no_grad;
    linear(x);
    linear(x); // the second time W' is kept
    const accounting::Memory memory;
    CHECK(equal_bits(linear(x), y.detach()));
    CHECK(memory.of_at_least(size).empty());
  }
}

TEST_CASE("W' of any shape, layout and dtype is what the definition says") {
  seed(2);
  const std::vector<Tensor> weights{
      torch::randn({}),
      torch::randn({7}),
      torch::randn({5, 6}).t(),
      torch::randn({4, 3, 2, 2}).to(at::MemoryFormat::ChannelsLast),
      torch::randn({3, 5}, torch::kDouble),
      torch::randn({3, 5}).to(torch::kHalf),
      torch::randn({6, 5}).to(torch::kBFloat16).slice(0, 0, 6, 2)};
  for (const auto& weight : weights) {
    for (const bool additive : {false, true}) {
      for (const double scale : {1.0, 0.25, -2.0, 0.0}) {
        INFO(weight.sizes() << weight.dtype() << additive << scale);
        const auto n = std::max<int64_t>(1, weight.numel() / 2);
        const auto where =
            std::get<0>(torch::randperm(weight.numel()).slice(0, 0, n).sort());
        auto copy = SparseCopy::of(weight, where, "weight", additive);
        const auto wide = weight.to(copy->dtype().value());
        CHECK(
            copy->values.scalar_type() ==
            (weight.scalar_type() == torch::kDouble ? torch::kDouble
                                                    : torch::kFloat));
        CHECK(equal_bits(copy->effective(wide, 1), wide)); // the start
        {
          torch::NoGradGuard no_grad;
          copy->values.normal_();
        }
        const auto value = copy->effective(wide, scale).detach();
        const auto expected = by_hand(wide, *copy, additive, scale);
        CHECK(close(value, expected));
        if (scale == 1.0 && !additive) {
          CHECK(equal_bits(value, expected));
        }
        const auto outside = torch::ones({weight.numel()}, torch::kBool)
                                 .index_fill_(0, where, false);
        CHECK(equal_bits(
            value.reshape(-1).index({outside}),
            wide.reshape(-1).index({outside})));
      }
    }
  }
}

TEST_CASE("masked entries are frozen to the bit under every optimizer") {
  for (const std::string rule : {"SGD", "Adam", "AdamW"}) {
    INFO(rule);
    seed(3);
    networks::Mlp model;
    model.to(torch::kDouble);
    const auto x = torch::randn({6, 10}, torch::kDouble);
    const auto target = torch::randn({6, 3}, torch::kDouble);
    const auto mask = third_of(model);

    // The reference: dense weights, whose entries outside the mask are put
    // back after each step.
    torch::OrderedDict<std::string, Tensor> dense;
    std::vector<DenseReference> rules;
    for (const auto& p : model.named_parameters()) {
      dense.insert(p.key(), p.value().detach().clone());
      rules.push_back(
          {rule, rule == "SGD" ? 0.1 : 0.05, 0.2, 0.9, Tensor(), Tensor()});
    }
    const auto start = state_of(model);
    auto adapter = peft::attach(model, SparseTuningOptions(mask));
    CHECK(adapter.num_parameters() == mask.numel());
    auto optimizer = optimizer_of(rule, model.parameters());
    for (int step = 0; step < 5; ++step) {
      const auto loss = (model.forward(x) - target).square().mean();
      optimizer->zero_grad();
      loss.backward();
      optimizer->step();

      std::vector<Tensor> leaves;
      for (auto& p : dense) {
        leaves.push_back(p.value().detach().clone().set_requires_grad(true));
      }
      const auto h1 = torch::tanh(at::linear(x, leaves[0], leaves[1]));
      const auto h2 = torch::tanh(at::linear(h1, leaves[2], leaves[3]));
      const auto reference_loss =
          (at::linear(h2, leaves[4], leaves[5]) - target).square().mean();
      CHECK(close(loss, reference_loss));
      const auto grads = torch::autograd::grad({reference_loss}, leaves);
      for (size_t i = 0; i < leaves.size(); ++i) {
        torch::NoGradGuard no_grad;
        const auto where = mask.indices_of(dense[i].key());
        const auto next = rules[i].next(leaves[i], grads[i]);
        dense[i].value().put_(where, next.take(where));
      }
    }
    size_t i = 0;
    for (const auto& p : peft::detail::base_parameters(model)) {
      INFO(p.first);
      const auto value = peft::effective(p.second).detach();
      CHECK(close(value, dense[i].value()));
      const auto inside = torch::zeros({value.numel()}, torch::kBool)
                              .index_fill_(0, mask.indices_of(p.first), true)
                              .view(value.sizes());
      const auto outside = inside.logical_not();
      CHECK(equal_bits(
          value.index({outside}), dense[i].value().index({outside})));
      CHECK((value.ne(peft::base(p.second)) == inside).all().item<bool>());
      ++i;
    }
    CHECK(numel_of_state(*optimizer) == mask.numel() * (rule == "SGD" ? 1 : 2));
    adapter.detach();
    CHECK(same_state(state_of(model), start));
  }
}

TEST_CASE("sparse deltas merge and return to the bit, a hundred times") {
  for (const auto dtype : {torch::kFloat, torch::kDouble, torch::kBFloat16}) {
    for (const bool additive : {false, true}) {
      INFO(dtype << " additive " << additive);
      seed(4);
      networks::Mlp model;
      const auto mask = third_of(model);
      model.to(dtype);
      const auto x = torch::randn({5, 10}).to(dtype);
      auto adapter =
          peft::attach(model, SparseTuningOptions(mask).additive(additive));
      randomise(adapter);
      torch::NoGradGuard no_grad;
      const auto attached = state_of(model);
      const auto y = model.forward(x);
      for (int i = 0; i < 100; ++i) {
        adapter.merge();
        adapter.unmerge();
      }
      CHECK(same_state(state_of(model), attached));
      adapter.merge();
      CHECK(equal_bits(model.forward(x), y));
      if (!additive) {
        const auto& copy = sparse_at(adapter, 0);
        CHECK(equal_bits(
            peft::base(model.fc1->weight).take(copy.indices),
            copy.values.to(dtype)));
      }
      adapter.unmerge();
      CHECK(equal_bits(model.forward(x), y));
      peft::merge(model);
      CHECK(equal_bits(model.forward(x), y));
    }
  }
}

TEST_CASE("sparse training goes on from a file as if it had not stopped") {
  for (const bool additive : {false, true}) {
    INFO("additive " << additive);
    seed(5);
    networks::Mlp model, other;
    {
      torch::NoGradGuard no_grad;
      for (size_t i = 0; i < model.parameters().size(); ++i) {
        other.parameters()[i].copy_(model.parameters()[i]);
      }
    }
    const auto x = torch::randn({6, 10});
    // The mask names the parameters in an order of its own.
    SparseMask mask;
    mask.set("fc2.weight", places({5, 3, 100}));
    mask.set("fc1.bias", places({2, 7}));
    mask.set("fc1.weight", places({0, 159, 4}));
    auto adapter = peft::attach(
        model,
        SparseTuningOptions(mask).additive(additive).modules_to_save({"head"}));
    const auto run = [&](networks::Mlp& m, torch::optim::Optimizer& optimizer) {
      optimizer.zero_grad();
      m.forward(x).square().mean().backward();
      optimizer.step();
    };
    torch::optim::AdamW first(adapter.parameters(), 0.05);
    run(model, first);
    run(model, first);
    TemporaryDirectory folder;
    peft::save(adapter, folder / "adapter");
    torch::save(first, folder / "optimizer.pt");

    auto loaded = peft::load(other, folder / "adapter");
    CHECK(loaded.method() == "SPARSE");
    CHECK(loaded.num_parameters() == 8 + 39);
    torch::optim::AdamW second(loaded.parameters(), 0.05);
    torch::load(second, folder / "optimizer.pt");
    CHECK(equal_bits(other.forward(x), model.forward(x)));
    run(model, first);
    run(other, second);
    CHECK(equal_bits(other.forward(x), model.forward(x)));
    for (const auto& item : adapter.named_parameters()) {
      INFO(item.key());
      CHECK(equal_bits(loaded.named_parameters()[item.key()], item.value()));
    }
    const auto file =
        peft::load_safetensors(folder / "adapter/adapter_model.safetensors");
    CHECK(file.size() == 8);
    CHECK(equal_bits(
        file.at("base_model.model.fc2.weight.indices"), places({3, 5, 100})));
    CHECK(file.at("base_model.model.fc2.weight.values").numel() == 3);
  }
}

TEST_CASE("a damaged sparse file is refused and the model stays as it is") {
  seed(6);
  networks::Mlp model;
  SparseMask mask;
  mask.set("fc1.weight", places({1, 5, 9}));
  auto adapter = peft::attach(model, SparseTuningOptions(mask));
  TemporaryDirectory folder;
  peft::save(adapter, folder / "good");
  adapter.detach();
  const auto good =
      peft::load_safetensors(folder / "good/adapter_model.safetensors");
  const std::string key = "base_model.model.fc1.weight";
  struct Row {
    std::string name;
    std::function<void(std::map<std::string, Tensor>&)> damage;
    std::string part;
  };
  const std::vector<Row> rows{
      {"unsorted",
       [&](auto& f) {
         f[key + ".indices"] = places({5, 1, 9});
       },
       "must ascend"},
      {"repeated",
       [&](auto& f) {
         f[key + ".indices"] = places({1, 5, 5});
       },
       "must ascend"},
      {"beyond the end",
       [&](auto& f) {
         f[key + ".indices"] = places({1, 5, 160});
       },
       "names entry 160, and the parameter has 160"},
      {"negative",
       [&](auto& f) {
         f[key + ".indices"] = places({-1, 5, 9});
       },
       "names entry -1"},
      {"another dtype",
       [&](auto& f) {
         f[key + ".indices"] = f[key + ".indices"].to(torch::kInt);
       },
       "must hold int64 indices [k]"},
      {"another shape",
       [&](auto& f) {
         f[key + ".indices"] = places({1, 5, 9}).view({3, 1});
       },
       "must hold int64 indices [k]"},
      {"too few values",
       [&](auto& f) { f[key + ".values"] = torch::ones({2}); },
       "shape [2] where [3] fits"},
      {"no values",
       [&](auto& f) { f.erase(key + ".values"); },
       "missing from the file"},
      {"no indices",
       [&](auto& f) { f.erase(key + ".indices"); },
       "unexpected in the file"},
      {"a parameter that there is not",
       [&](auto& f) {
         f["base_model.model.fc9.weight.indices"] = places({1});
         f["base_model.model.fc9.weight.values"] = torch::ones({1});
       },
       "unexpected in the file"}};
  const auto before = state_of(model);
  for (const auto& row : rows) {
    INFO(row.name);
    auto tensors = good;
    row.damage(tensors);
    peft::save_safetensors(
        {tensors.begin(), tensors.end()},
        folder / "good/adapter_model.safetensors");
    const auto error = error_of([&] { peft::load(model, folder / "good"); });
    INFO(error);
    CHECK(contains(error, row.part));
    CHECK(same_state(state_of(model), before));
  }
}

TEST_CASE("a mask that does not fit the network is refused by name") {
  networks::Mlp model;
  networks::Words tied("emb", "out", true);
  torch::nn::Sequential renormed(
      torch::nn::Embedding(torch::nn::EmbeddingOptions(4, 3).max_norm(1)));
  const auto mask_of = [](const std::string& name, const Tensor& chosen) {
    SparseMask mask;
    mask.set(name, chosen);
    return mask;
  };
  SparseMask both = mask_of("emb.weight", places({1}));
  both.set("out.weight", places({2}));
  const auto one = places({1});
  struct Row {
    std::string name;
    torch::nn::Module& model;
    std::function<peft::Adapter(torch::nn::Module&)> attach;
    std::string part;
  };
  const auto with = [](auto options) {
    return [options](torch::nn::Module& m) { return peft::attach(m, options); };
  };
  const std::vector<Row> rows{
      {"nothing", model, with(SparseTuningOptions()), "the mask is empty"},
      {"a parameter that there is not",
       model,
       with(SparseTuningOptions(mask_of("fc7.weight", one))),
       "names 'fc7.weight'"},
      {"a suffix",
       model,
       with(SparseTuningOptions(mask_of("weight", one))),
       "masks take full paths"},
      {"another shape",
       model,
       with(SparseTuningOptions(
           mask_of("fc1.weight", torch::ones({10, 16}).to(torch::kBool)))),
       "is one for shape [10, 16], and the parameter has [16, 10]"},
      {"beyond the end",
       model,
       with(SparseTuningOptions(mask_of("fc1.bias", places({16})))),
       "names entry 16, and the parameter has 16"},
      {"twice the same tensor",
       tied,
       with(SparseTuningOptions(both)),
       "'emb.weight' and 'out.weight', which are one tensor"},
      {"a part of what trains whole",
       model,
       with(SparseTuningOptions(mask_of("head.weight", one))
                .modules_to_save({"head"})),
       "modules_to_save trains whole"},
      {"an embedding that rewrites itself",
       *renormed,
       with(SparseTuningOptions(mask_of("0.weight", one))),
       "max_norm"},
      {"a share of 0",
       model,
       with(RandomMaskOptions(0)),
       "the density must lie in (0, 1]"},
      {"a share of less than one",
       model,
       with(RandomMaskOptions(1e-4)),
       "at least one entry"},
      {"more than there is",
       model,
       with(RandomMaskOptions().k(1000)),
       "k = 1000 entries of only 388"},
      {"k of each",
       model,
       with(RandomMaskOptions().k(10).per_tensor(true)),
       "with per_tensor give a density"},
      {"a target that there is not",
       model,
       with(RandomMaskOptions().targets("nope")),
       "'nope'"},
      {"r of 0", model, with(ShiraOptions(0)), "r must be positive"},
      {"an r that is too large",
       model,
       with(ShiraOptions(7).targets({"fc1"})),
       "makes 182 entries, and 'fc1.weight' has only 160"},
      {"a kind of mask that there is not",
       model,
       with(ShiraOptions(1).mask_type("grad")),
       "mask_type must be"},
      {"no query", model, with(ShiraOptions(1)), "match nothing that SHiRA"},
      {"a bias for SHiRA",
       model,
       with(ShiraOptions(1).targets({"fc1.bias"})),
       "match nothing that SHiRA"}};
  for (const auto& row : rows) {
    INFO(row.name);
    const auto before = state_of(row.model);
    const auto error = error_of([&] { row.attach(row.model); });
    INFO(error);
    CHECK(contains(error, row.part));
    CHECK(same_state(state_of(row.model), before));
  }
}

TEST_CASE("counts of random masks and of tied weights") {
  networks::Mlp model;
  const int64_t weights = 160 + 192 + 36, total = weights + 16 + 12 + 3;
  struct Row {
    RandomMaskOptions options;
    int64_t count;
  };
  const std::vector<Row> rows{
      {RandomMaskOptions(0.1), 38},
      {RandomMaskOptions(1), weights},
      {RandomMaskOptions().k(5), 5},
      {RandomMaskOptions(0.1).per_tensor(true), 16 + 19 + 3},
      {RandomMaskOptions(0.5).targets({"fc1", "head.bias"}), (160 + 3) / 2},
      {RandomMaskOptions(0.1).modules_to_save({"head"}), 35 + 39}};
  for (const auto& row : rows) {
    auto adapter = peft::attach(model, row.options);
    CHECK(adapter.num_parameters() == row.count);
    CHECK(peft::count_parameters(model).trainable == row.count);
    CHECK(peft::count_parameters(model).total == total);
    adapter.detach();
  }
  auto one = peft::attach(model, RandomMaskOptions(0.3).seed(1), "one");
  auto two = peft::attach(model, RandomMaskOptions(0.3).seed(2), "two");
  CHECK_FALSE(torch::equal(
      sparse_at(one, 0).indices.slice(0, 0, 20),
      sparse_at(two, 0).indices.slice(0, 0, 20)));
  // What SparseTuningOptions was made from is not kept twice.
  CHECK(std::any_cast<const SparseTuningOptions&>(one.shared_state()->options)
            .mask()
            .empty());

  seed(7);
  networks::Words tied("emb", "out", true);
  auto adapter = peft::attach(tied, RandomMaskOptions(1));
  CHECK(adapter.num_parameters() == 66);
  CHECK(peft::count_parameters(tied).total == 66);
  CHECK(adapter.sites()[0].parameters.size() == 2);
  randomise(adapter);
  const auto ids = torch::randint(11, {3, 4}, torch::kLong);
  const auto values = adapter.parameters()[0];
  const auto table = values.view({11, 6});
  const auto expected =
      at::linear(torch::tanh(at::embedding(table, ids)), table);
  CHECK(close(tied.forward(ids), expected));
  const auto direction = torch::randn_like(expected);
  CHECK(close(
      torch::autograd::grad(
          {(tied.forward(ids) * direction).sum()}, {values})[0],
      torch::autograd::grad({(expected * direction).sum()}, {values})[0]));
}

TEST_CASE("embeddings train the chosen entries of the rows in the batch") {
  for (const bool by_freq : {false, true}) {
    for (const bool additive : {false, true}) {
      for (const double scale : {1.0, 0.5}) {
        INFO("by_freq " << by_freq << " additive " << additive << scale);
        seed(8);
        torch::nn::Embedding table(
            torch::nn::EmbeddingOptions(9, 4).padding_idx(2).scale_grad_by_freq(
                by_freq));
        table->to(torch::kDouble);
        SparseMask mask; // rows 0, 1, 2 (the padding), 7 and 8
        mask.set("weight", places({0, 3, 5, 9, 10, 30, 31, 35}));
        auto adapter =
            peft::attach(*table, SparseTuningOptions(mask).additive(additive));
        randomise(adapter);
        adapter.set_scale(scale);
        const auto values = adapter.parameters()[0];
        for (const auto& ids :
             {places({1, 7, 7, 2, 4}).view({5, 1}),
              places({2}),
              places({3, 4}),
              torch::empty({0}, torch::kLong)}) {
          const auto expected =
              at::embedding(peft::effective(table->weight), ids, 2, by_freq);
          const auto y = table(ids);
          CHECK(equal_bits(y, expected));
          const auto direction = torch::randn_like(y);
          const auto grad = [&](const Tensor& out) {
            const auto g = torch::autograd::grad(
                {(out * direction).sum()}, {values}, {}, {}, false, true)[0];
            return g.defined() ? g : torch::zeros_like(values);
          };
          if (ids.numel() > 0) {
            CHECK(close(grad(y), grad(expected)));
          }
        }
      }
    }
  }
  // Of a large table no copy is made.
  torch::nn::Embedding large(20000, 64);
  auto adapter = peft::attach(*large, RandomMaskOptions(0.001).targets({""}));
  const auto ids = torch::randint(20000, {50}, torch::kLong);
  const accounting::Memory memory;
  large(ids).sum().backward();
  CHECK(memory.peak() < 20000 * 64 * 4 / 10);
}

TEST_CASE("packed projections, convolutions and recurrent layers follow") {
  seed(9);
  struct Row {
    std::string name;
    std::shared_ptr<torch::nn::Module> model;
    std::function<Tensor(torch::nn::Module&, const Tensor&)> run;
    std::vector<int64_t> input;
  };
  const auto network = [](const std::string& name) {
    return networks::build(name).module;
  };
  const std::vector<Row> rows{
      {"attention",
       network("attention"),
       [](torch::nn::Module& m, const Tensor& x) {
         return m.as<networks::Attention>()->forward(x);
       },
       {4, 2, 8}},
      {"Conv1D",
       network("gpt2_mlp"),
       [](torch::nn::Module& m, const Tensor& x) {
         return m.as<networks::Gpt2Mlp>()->forward(x);
       },
       {4, 6}},
      {"convolutions",
       network("conv2d"),
       [](torch::nn::Module& m, const Tensor& x) {
         return m.as<networks::ConvNet2d>()->forward(x);
       },
       {2, 3, 5, 6}},
      {"LSTM",
       torch::nn::LSTM(5, 4).ptr(),
       [](torch::nn::Module& m, const Tensor& x) {
         return std::get<0>(m.as<torch::nn::LSTMImpl>()->forward(x));
       },
       {3, 2, 5}}};
  for (const auto& row : rows) {
    for (const bool additive : {false, true}) {
      INFO(row.name << " additive " << additive);
      row.model->to(torch::kDouble);
      SparseMask mask;
      for (const auto& p : row.model->named_parameters()) {
        mask.set(p.key(), torch::rand(p.value().sizes()) < 0.4);
      }
      const auto x = torch::randn(row.input, torch::kDouble);
      auto adapter = peft::attach(
          *row.model, SparseTuningOptions(mask).additive(additive));
      randomise(adapter);
      const auto y = row.run(*row.model, x);
      const auto direction = torch::randn_like(y);
      const auto grads =
          torch::autograd::grad({(y * direction).sum()}, adapter.parameters());
      // The same network with the effective weights as its own.
      std::vector<Tensor> saved;
      const auto effective = [&] {
        std::vector<Tensor> result;
        for (const auto& p : peft::detail::base_parameters(*row.model)) {
          result.push_back(peft::effective(p.second).detach().clone());
        }
        return result;
      }();
      const auto parameters = adapter.parameters();
      const auto sites = adapter.sites();
      adapter.detach();
      std::vector<Tensor> dense;
      {
        torch::NoGradGuard no_grad;
        size_t i = 0;
        for (auto& p : row.model->parameters()) {
          saved.push_back(p.detach().clone());
          p.copy_(effective[i++]);
          dense.push_back(p);
        }
      }
      const auto expected = row.run(*row.model, x);
      CHECK(close(y, expected));
      const auto dense_grads =
          torch::autograd::grad({(expected * direction).sum()}, dense);
      REQUIRE(grads.size() == mask.entries().size());
      for (size_t i = 0; i < grads.size(); ++i) {
        const auto& name = sites[i].parameters.front();
        INFO(name);
        const auto keys = row.model->named_parameters().keys();
        const auto at = std::find(keys.begin(), keys.end(), name);
        CHECK(close(
            grads[i],
            dense_grads[static_cast<size_t>(at - keys.begin())].take(
                mask.indices_of(name))));
      }
      torch::NoGradGuard no_grad;
      for (size_t i = 0; i < dense.size(); ++i) {
        dense[i].copy_(saved[i]);
      }
    }
  }
}

TEST_CASE("several sparse adapters: absolute values win, differences add") {
  seed(10);
  torch::nn::Linear linear(6, 5);
  linear->to(torch::kDouble);
  const auto x = torch::randn({3, 6}, torch::kDouble);
  SparseMask a, b;
  a.set("weight", places({0, 3, 7, 20}));
  b.set("weight", places({3, 8, 20, 29}));
  const auto base = linear->weight.detach().clone();
  const auto bias = linear->bias.detach().clone();
  for (const bool additive : {true, false}) {
    INFO("additive " << additive);
    auto task = peft::attach(
        *linear, SparseTuningOptions(a).additive(additive), "task");
    auto language = peft::attach(
        *linear, SparseTuningOptions(b).additive(additive), "language");
    randomise(task, 1);
    randomise(language, 2);
    task.set_scale(0.5);
    const auto first = by_hand(base, sparse_at(task, 0), additive, 0.5);
    const auto both = by_hand(first, sparse_at(language, 0), additive, 1);
    CHECK(close(peft::effective(linear->weight), both));
    const auto y = linear(x);
    CHECK(close(y, at::linear(x, both, bias)));
    const auto direction = torch::randn_like(y);
    auto inputs = task.parameters();
    inputs.push_back(language.parameters()[0]);
    CHECK(gradcheck::first_order(
        [&](const gradcheck::Tensors&) { return linear(x); },
        inputs,
        direction));
    const auto error = error_of([&] { language.merge(); });
    if (additive) { // in any order
      CHECK(error == "");
      torch::NoGradGuard no_grad;
      CHECK(close(linear(x), y));
      language.unmerge();
    } else {
      CHECK(contains(error, "the two do not commute"));
    }
    peft::merge(*linear);
    CHECK(close(linear->weight, both));
    torch::NoGradGuard no_grad;
    linear->weight.copy_(base);
  }

  // Above LoRA the chosen entries stand in for what LoRA makes of them.
  auto lora = peft::attach(*linear, adapted::acting(), "lora");
  for (const bool additive : {true, false}) {
    auto sparse = peft::attach(
        *linear, SparseTuningOptions(a).additive(additive), "sparse");
    randomise(sparse);
    const auto& factors = adapted::lora(lora);
    const auto below = base + 2 * at::mm(factors.lora_B, factors.lora_A);
    const auto value = by_hand(below, sparse_at(sparse, 0), additive, 1);
    CHECK(close(linear(x), at::linear(x, value, bias)));
    auto inputs = lora.parameters();
    inputs.push_back(sparse.parameters()[0]);
    CHECK(gradcheck::first_order(
        [&](const gradcheck::Tensors&) { return linear(x); },
        inputs,
        torch::randn({3, 5}, torch::kDouble)));
    sparse.detach();
  }
}

TEST_CASE("casts leave the indices alone, and autocast works") {
  seed(11);
  networks::Mlp model;
  auto adapter = peft::attach(model, SparseTuningOptions(third_of(model)));
  const auto before = sparse_at(adapter, 0).indices.clone();
  for (const auto dtype : {torch::kHalf, torch::kDouble, torch::kFloat}) {
    model.to(dtype);
    CHECK(sparse_at(adapter, 0).values.scalar_type() == dtype);
    CHECK(equal_bits(sparse_at(adapter, 0).indices, before));
    model.to(torch::kCPU, dtype);
    CHECK(equal_bits(sparse_at(adapter, 0).indices, before));
  }
  model.to(torch::kCPU);
  CHECK(equal_bits(sparse_at(adapter, 0).indices, before));

  randomise(adapter);
  const auto x = torch::randn({4, 10});
  const auto y = model.forward(x);
  const adapted::Autocast on;
  const auto half = model.forward(x);
  CHECK(half.scalar_type() == torch::kBFloat16);
  // Three layers, each of which rounds to bfloat16.
  const double rounding = 3 * tolerance(torch::kBFloat16).rtol;
  CHECK(close(half, y, rounding, rounding));
  half.sum().backward();
  for (const auto& p : adapter.parameters()) {
    CHECK(p.grad().scalar_type() == torch::kFloat);
  }
}

TEST_CASE("SHiRA trains as many entries as LoRA has parameters") {
  seed(12);
  networks::Mlp model;
  for (const std::string type : {"random", "magnitude", "struct"}) {
    INFO(type);
    auto adapter = peft::attach(
        model, ShiraOptions(2).mask_type(type).targets({"fc1", "fc2"}));
    const auto count = 2 * (10 + 16) + 2 * (16 + 12);
    if (type == "struct") {
      CHECK(adapter.num_parameters() <= count);
      const auto chosen = torch::zeros({16 * 10})
                              .index_fill_(0, sparse_at(adapter, 0).indices, 1)
                              .view({16, 10});
      CHECK(chosen.diagonal().all().item<bool>());
      const auto rows = chosen.sum(1).eq(10).sum().item<int64_t>();
      CHECK(rows == (52 - 10) / 10);
      CHECK(chosen[0].sum().item<int64_t>() == 10);
      CHECK(chosen[4].sum().item<int64_t>() == 10); // a quarter of 16 further
    } else {
      CHECK(adapter.num_parameters() == count);
      auto lora = peft::attach(
          model, peft::LoraOptions(2).targets({"fc1", "fc2"}), "lora");
      CHECK(lora.num_parameters() == count);
      lora.detach();
    }
    if (type == "magnitude") {
      const auto size = peft::base(model.fc1->weight).detach().abs();
      const auto largest = std::get<0>(size.reshape(-1).topk(52));
      const auto& indices = sparse_at(adapter, 0).indices;
      CHECK(equal_bits(
          std::get<0>(size.take(indices).sort(-1, true)),
          std::get<0>(largest.sort(-1, true))));
    }
    // Differences: the summary counts them beside the base.
    CHECK(
        peft::count_parameters(model).total == 419 + adapter.num_parameters());
    adapter.detach();
  }
  torch::manual_seed(1);
  auto one = peft::attach(model, ShiraOptions(1).targets({"fc1"}), "one");
  torch::manual_seed(1);
  auto two = peft::attach(model, ShiraOptions(1).targets({"fc1"}), "two");
  CHECK(equal_bits(sparse_at(one, 0).indices, sparse_at(two, 0).indices));
}

TEST_CASE("SHiRA draws the masks of HF PEFT and trains as it does") {
  const auto file = peft::load_safetensors(reference("shira"));
  networks::Mlp model;
  model.to(torch::kDouble);
  {
    torch::NoGradGuard no_grad;
    for (auto& p : model.named_parameters()) {
      p.value().copy_(file.at("before." + p.key()));
    }
  }
  auto adapter = peft::attach(
      model, ShiraOptions(2).random_seed(3).targets({"fc1", "fc2"}));
  torch::optim::SGD optimizer(adapter.parameters(), 0.5);
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    (model.forward(file.at("x")) - file.at("target"))
        .square()
        .mean()
        .backward();
    optimizer.step();
  }
  for (size_t i = 0; i < 2; ++i) {
    const std::string name = i == 0 ? "fc1" : "fc2";
    CHECK(
        equal_bits(sparse_at(adapter, i).indices, file.at("indices." + name)));
    CHECK(close(sparse_at(adapter, i).values, file.at("values." + name)));
  }
  CHECK(close(model.forward(file.at("x")), file.at("output")));
}

TEST_CASE("rows of a mixed batch get the entries of their adapter") {
  seed(13);
  networks::Mlp model;
  const auto x = torch::randn({4, 10});
  auto a = peft::attach(model, RandomMaskOptions(0.3).seed(1), "a");
  auto b = peft::attach(model, RandomMaskOptions(0.3).seed(2), "b");
  randomise(a, 1);
  randomise(b, 2);
  const auto only = [&](const std::vector<std::string>& names) {
    const peft::ActiveAdapters scope(names);
    return model.forward(x).detach();
  };
  const auto with_a = only({"a"}), with_b = only({"b"}), plain = only({});
  const peft::BatchAdapters scope({"a", "b", "__base__", "a"});
  const auto y = model.forward(x);
  CHECK(close(y[0], with_a[0]));
  CHECK(close(y[1], with_b[1]));
  CHECK(close(y[2], plain[2]));
  CHECK(close(y[3], with_a[3]));
}

} // namespace test_sparse_tuning
