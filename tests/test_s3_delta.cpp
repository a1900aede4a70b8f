#include "gradcheck.h"
#include "meta_device.h"
#include "model_state.h"
#include "networks.h"
#include "test.h"

#include <peft/io/pretrained.h>
#include <peft/methods/s3_delta.h>
#include <peft/methods/sparse_adapter.h>
#include <peft/train/structure_search.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace test_s3_delta {

namespace functional = peft::functional;
using functional::ShiftGradient;
using torch::Tensor;

namespace {

struct Toy : torch::nn::Module {
  torch::nn::Linear fc1{register_module("fc1", torch::nn::Linear(4, 5))};
  torch::nn::Linear fc2{register_module("fc2", torch::nn::Linear(5, 3))};
  Tensor forward(const Tensor& x) {
    return fc2(torch::tanh(fc1(x)));
  }
};

using Tensors = std::map<std::string, Tensor>;

Tensors reference(const std::string& name) {
  return peft::load_safetensors(
      golden("../../reference/data/unified/" + name + ".safetensors"));
}

std::shared_ptr<Toy> toy(const Tensors& file) {
  auto model = std::make_shared<Toy>();
  model->to(torch::kDouble);
  torch::NoGradGuard no_grad;
  for (auto& item : model->named_parameters()) {
    item.value().copy_(file.at("base." + item.key()));
  }
  return model;
}

void set_start(const peft::Adapter& adapter, const Tensors& file) {
  torch::NoGradGuard no_grad;
  for (auto& item : adapter.named_parameters()) {
    item.value().copy_(file.at("start." + item.key()));
  }
}

peft::S3DeltaOptions toy_options() {
  return peft::S3DeltaOptions(11).beta(0.7).candidates(
      {peft::LoraOptions(1).alpha(2).targets({"fc1", "fc2"}),
       peft::BitFitOptions()});
}

peft::StructureSearchOptions toy_search() {
  return peft::StructureSearchOptions()
      .lr(0.05)
      .weight_decay(0.1)
      .clip_grad_norm(0.3)
      .seed(3);
}

/// A search on the reference's network, with its losses.
struct Running {
  Tensors file;
  std::shared_ptr<Toy> model;
  peft::Adapter adapter;
  std::unique_ptr<peft::StructureSearch> search;

  explicit Running(
      const std::string& name = "detached",
      const peft::S3DeltaOptions& options = toy_options(),
      const peft::StructureSearchOptions& how = toy_search())
      : file(reference("search_" + name)), model(toy(file)) {
    adapter = peft::attach(*model, options);
    set_start(adapter, file);
    search = std::make_unique<peft::StructureSearch>(adapter, how);
  }
  Tensor loss(const std::string& set) const {
    return (model->forward(file.at("x" + set)) - file.at("y" + set))
        .square()
        .mean();
  }
  peft::StructureSearch::Progress step() {
    return search->step([&] { return loss(""); }, [&] { return loss("_val"); });
  }
};

double total(const std::vector<double>& p, const std::vector<int64_t>& n) {
  double sum = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    sum += p[i] * static_cast<double>(n[i]);
  }
  return sum;
}

using peft::models::BertForSequenceClassification;

BertForSequenceClassification bert() {
  seed(1);
  BertForSequenceClassification model(peft::models::BertOptions()
                                          .vocab_size(40)
                                          .hidden_size(16)
                                          .num_hidden_layers(2)
                                          .num_attention_heads(2)
                                          .intermediate_size(32)
                                          .max_position_embeddings(16));
  model->eval();
  return model;
}

Tensor run(BertForSequenceClassification& model) {
  seed(5);
  const auto ids = torch::randint(4, 40, {3, 6}, torch::kLong);
  return model->forward(ids, torch::ones({3, 6}, torch::kLong));
}

peft::S3DeltaOptions bert_options(int64_t budget) {
  return peft::S3DeltaOptions(budget).candidates(
      {peft::LoraOptions(1),
       peft::BitFitOptions({"query", "intermediate", "layer_norm"}),
       peft::LayerNormOptions(),
       peft::PfeifferOptions(2),
       peft::ParallelAdapterOptions(3)});
}

} // namespace

TEST_CASE("Σ p n is the budget", "[s3_delta]") {
  std::mt19937_64 random(1);
  const auto uniform = [&](double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(random);
  };
  for (int trial = 0; trial < 2000; ++trial) {
    const auto m = static_cast<size_t>(uniform(1, 40));
    const double spread = std::pow(10.0, uniform(-6, 4));
    const double beta = std::pow(10.0, uniform(-4, 3));
    std::vector<double> alpha(m);
    std::vector<int64_t> n(m);
    int64_t all = 0;
    for (size_t i = 0; i < m; ++i) {
      alpha[i] = uniform(-spread, spread);
      n[i] = static_cast<int64_t>(std::pow(10.0, uniform(0, 6)));
      all += n[i];
    }
    if (trial % 5 == 0) {
      alpha.assign(m, spread); // all alike
    }
    if (trial % 7 == 0) {
      alpha[0] = 1e8;
    }
    // From next to nothing to next to all.
    const double share = std::pow(10.0, uniform(-5, 0));
    const double budget =
        static_cast<double>(all) * (trial % 2 == 0 ? share : 1 - share * 0.999);
    if (budget <= 0) {
      continue;
    }
    INFO(
        "trial " << trial << " m " << m << " beta " << beta << " spread "
                 << spread << " budget " << budget << " of " << all);
    const auto solved = functional::solve_shift(alpha, n, budget, beta);
    CHECK(std::abs(total(solved.p, n) - budget) < 1e-6);
    bool in_order = true;
    for (size_t i = 0; i < m; ++i) {
      in_order = in_order && solved.p[i] >= 0 && solved.p[i] <= 1;
      for (size_t k = 0; k < m; ++k) {
        in_order =
            in_order && (alpha[i] <= alpha[k] || solved.p[i] >= solved.p[k]);
      }
    }
    CHECK(in_order);
  }
  // All fits: everything is there.
  for (const double budget : {6.0, 7.0, 1e9}) {
    const auto solved =
        functional::solve_shift({3, -50, 0}, {1, 2, 3}, budget, 0.1);
    CHECK(solved.p == std::vector<double>{1, 1, 1});
  }
}

TEST_CASE("The shift refuses what has no solution", "[s3_delta]") {
  const auto refusal = [](const std::vector<double>& alpha,
                          const std::vector<int64_t>& n,
                          double budget,
                          double beta) {
    return error_of([&] { functional::solve_shift(alpha, n, budget, beta); });
  };
  CHECK(contains(refusal({}, {}, 1, 1), "0 α for 0 modules"));
  CHECK(contains(refusal({1}, {1, 2}, 1, 1), "1 α for 2 modules"));
  CHECK(contains(refusal({1}, {2}, 0, 1), "must be positive, got 0 and 1"));
  CHECK(contains(refusal({1}, {2}, 1, 0), "must be positive"));
  CHECK(contains(refusal({NAN}, {2}, 1, 1), "module 0 has α = nan"));
  CHECK(contains(refusal({1}, {0}, 1, 1), "and 0 parameters"));
}

TEST_CASE("p, s and z have the derivatives of α", "[s3_delta]") {
  seed(2);
  const std::vector<int64_t> n{900, 32, 7, 400, 1};
  const Tensor u = torch::rand({5}, torch::kDouble);
  for (const double budget : {3.0, 400.0, 1200.0}) {
    for (const double beta : {0.3, 1.0, 5.0}) {
      const Tensor alpha =
          torch::randn({5}, torch::kDouble).set_requires_grad(true);
      // The implicit gradient is that of the solved p, and of what is made of
      // it, the shift included.
      CHECK(gradcheck::first_order(
          [&](const gradcheck::Tensors& in) {
            return torch::sigmoid(functional::budget_logits(
                in[0], n, budget, beta, ShiftGradient::implicit));
          },
          {alpha},
          torch::randn({5}, torch::kDouble)));
      CHECK(gradcheck::first_order(
          [&](const gradcheck::Tensors& in) {
            return functional::sample_concrete(
                functional::budget_logits(
                    in[0], n, budget, beta, ShiftGradient::implicit),
                u,
                -0.1,
                1.1);
          },
          {alpha},
          torch::randn({5}, torch::kDouble)));
      // The published one: a constant shift, and p over its own sum.
      const Tensor direction = torch::randn({5}, torch::kDouble);
      const auto solved = functional::solve_shift(
          {alpha.data_ptr<double>(), alpha.data_ptr<double>() + 5},
          n,
          budget,
          beta);
      Tensor p = torch::sigmoid((alpha - solved.shift) / beta);
      p = p / p.sum() * p.sum().detach();
      const Tensor s = torch::sigmoid(torch::log(u * p / ((1 - u) * (1 - p))));
      const auto expected =
          torch::autograd::grad({(s * direction).sum()}, {alpha})[0];
      const Tensor z = functional::sample_concrete(
          functional::budget_logits(alpha, n, budget, beta), u);
      CHECK(close(z, s, 1e-7, 1e-9));
      CHECK(close(
          torch::autograd::grad({(z * direction).sum()}, {alpha})[0],
          expected,
          1e-6,
          1e-9));
    }
  }
}

TEST_CASE("No sample is empty, and none leaves [0, 1]", "[s3_delta]") {
  const Tensor logits = torch::tensor({-3.0, 0.5, -1.0}, torch::kDouble);
  // Stretched far below zero, every module would vanish.
  const Tensor u = torch::full({3}, 0.3, torch::kDouble);
  const Tensor z = functional::sample_concrete(logits, u, -30, 1);
  CHECK(close(
      z,
      torch::tensor({0.0, 1 / (1 + std::exp(-0.5)), 0.0}).to(torch::kDouble),
      1e-7,
      1e-7));
  const Tensor edge = torch::tensor({0.0, 1.0, 0.5}, torch::kDouble);
  const Tensor at_edge = functional::sample_concrete(logits, edge);
  CHECK(torch::isfinite(at_edge).all().item<bool>());
  CHECK((at_edge >= 0).logical_and(at_edge <= 1).all().item<bool>());
}

TEST_CASE("The greedy structure is the published rule", "[s3_delta]") {
  std::mt19937_64 random(4);
  for (int trial = 0; trial < 500; ++trial) {
    const size_t m = 1 + random() % 7;
    std::vector<double> p(m);
    std::vector<int64_t> n(m);
    for (size_t i = 0; i < m; ++i) {
      p[i] = static_cast<double>(random() % 5) / 4; // with ties
      n[i] = 1 + static_cast<int64_t>(random() % 20);
    }
    const auto budget = static_cast<int64_t>(random() % 60);
    const auto chosen = functional::greedy_structure(p, n, budget);
    // Of all subsets that fit, the first in the order that prefers the
    // likeliest module to all others together, then the next.
    std::vector<size_t> order(m);
    std::iota(order.begin(), order.end(), size_t{0});
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
      return p[a] != p[b] ? p[a] > p[b] : a < b;
    });
    uint64_t best_rank = 0;
    std::vector<size_t> best;
    for (uint64_t subset = 0; subset < (uint64_t{1} << m); ++subset) {
      int64_t size = 0;
      uint64_t rank = 0;
      std::vector<size_t> members;
      for (size_t k = 0; k < m; ++k) {
        if (subset >> order[k] & 1) {
          size += n[order[k]];
          rank |= uint64_t{1} << (m - 1 - k);
          members.push_back(order[k]);
        }
      }
      if (size <= budget && rank >= best_rank) {
        best_rank = rank;
        best = members;
      }
    }
    std::sort(best.begin(), best.end());
    CHECK(chosen == best);
  }
}

TEST_CASE("The search is the published one, in float64", "[s3_delta]") {
  for (const std::string name :
       {"detached", "implicit", "first", "stretched"}) {
    INFO(name);
    auto options = toy_options();
    auto how = toy_search();
    if (name == "implicit") {
      options.shift_gradient(ShiftGradient::implicit);
    }
    if (name == "stretched") {
      options.stretch_low(-0.2).stretch_high(1.2);
    }
    how.order(name == "first" ? 1 : 2);
    Running r(name, options, how);
    std::vector<int64_t> numel;
    for (const auto& module : r.search->modules()) {
      numel.push_back(module.num_parameters);
    }
    CHECK(torch::equal(
        torch::tensor(numel).to(torch::kDouble), r.file.at("numel")));
    for (int i = 0; i < 3; ++i) {
      INFO("step " << i);
      const auto progress = r.step();
      const auto n = std::to_string(i);
      CHECK(progress.step == i + 1);
      CHECK(std::abs(progress.expected_parameters - 11) < 1e-6);
      CHECK(close(
          torch::tensor(progress.validation_loss, torch::kDouble),
          r.file.at("validation." + n)));
      // A finite difference divides rounding by ε: some digits are lost.
      CHECK(close(r.search->alpha(), r.file.at("alpha." + n), 1e-7, 1e-8));
      CHECK(close(
          torch::tensor(r.search->probabilities(), torch::kDouble),
          r.file.at("p." + n),
          1e-7,
          1e-8));
      for (const auto& item : r.adapter.named_parameters()) {
        CHECK(close(
            item.value(),
            r.file.at("after." + n + "." + item.key()),
            1e-7,
            1e-8));
      }
    }
  }
}

TEST_CASE("z multiplies what a module adds", "[s3_delta]") {
  Running r;
  const auto& sites = r.adapter.shared_state()->sites;
  std::vector<std::shared_ptr<peft::StructureDecoration>> z;
  for (const auto& site : sites) {
    for (const auto& d : site.delta->decorations()) {
      z.push_back(std::dynamic_pointer_cast<peft::StructureDecoration>(d));
    }
  }
  REQUIRE(z.size() == 4);
  const auto named = r.adapter.named_parameters();
  const Tensor x = r.file.at("x");
  const auto by_hand = [&](const Tensor& v) {
    const auto& f = r.file;
    const Tensor W1 = f.at("base.fc1.weight") +
        2 * v[0] *
            torch::matmul(
                named["fc1.lora_B.weight"], named["fc1.lora_A.weight"]);
    const Tensor W2 = f.at("base.fc2.weight") +
        2 * v[1] *
            torch::matmul(
                named["fc2.lora_B.weight"], named["fc2.lora_A.weight"]);
    const Tensor b1 = f.at("base.fc1.bias"), b2 = f.at("base.fc2.bias");
    return torch::nn::functional::linear(
        torch::tanh(torch::nn::functional::linear(
            x, W1, b1 + v[2] * (named["fc1.bias"] - b1))),
        W2,
        b2 + v[3] * (named["fc2.bias"] - b2));
  };
  const Tensor values = torch::tensor({0.3, 0.9, 0.0, 1.0}, torch::kDouble)
                            .set_requires_grad(true);
  for (size_t i = 0; i < 4; ++i) {
    z[i]->set_sample(values[static_cast<int64_t>(i)]);
  }
  const Tensor y = r.model->forward(x);
  CHECK(close(y, by_hand(values)));
  const Tensor direction = torch::randn_like(y);
  const auto g = torch::autograd::grad({(y * direction).sum()}, {values})[0];
  CHECK(close(
      g,
      gradcheck::differences(
          [&] { return (by_hand(values) * direction).sum().item<double>(); },
          values.detach()),
      1e-7,
      1e-7));
  for (auto& each : z) {
    each->set_value(0);
  }
  CHECK(close(r.model->forward(x), by_hand(torch::zeros({4}, torch::kDouble))));
  // Kept values of evaluation follow z.
  const torch::NoGradGuard no_grad;
  for (const double value : {1.0, 0.25, 0.25, 0.25, 0.5}) {
    for (auto& each : z) {
      each->set_value(value);
    }
    CHECK(close(
        r.model->forward(x), by_hand(torch::full({4}, value, torch::kDouble))));
  }
}

TEST_CASE("A search that was killed goes on, to the bit", "[s3_delta]") {
  const TemporaryDirectory folder;
  const auto path = folder / "search.safetensors";
  auto how = toy_search().decay_steps(8);
  Running straight("detached", toy_options(), how);
  straight.search->save(path); // before the first step, too
  for (int i = 0; i < 6; ++i) {
    straight.step();
  }
  for (const int cut : {0, 1, 3}) {
    {
      Running first("detached", toy_options(), how);
      for (int i = 0; i < cut; ++i) {
        first.step();
      }
      first.search->save(path);
    }
    Running again("detached", toy_options(), how);
    again.step(); // what it had is replaced
    again.search->load(path);
    CHECK(again.search->steps() == cut);
    for (int i = cut; i < 6; ++i) {
      again.step();
    }
    CHECK(equal_bits(again.search->alpha(), straight.search->alpha()));
    const auto a = again.adapter.parameters(),
               b = straight.adapter.parameters();
    for (size_t i = 0; i < a.size(); ++i) {
      CHECK(equal_bits(a[i], b[i]));
    }
    CHECK(equal_bits(again.loss(""), straight.loss("")));
  }
  // A file of another search, or half of one, changes nothing.
  Running other("detached", toy_options().budget(12), how);
  other.step();
  const Tensor alpha = other.search->alpha().detach().clone();
  CHECK(contains(
      error_of([&] { other.search->load(path); }),
      "is no state of a search over these modules"));
  std::filesystem::resize_file(path, std::filesystem::file_size(path) / 2);
  CHECK(error_of([&] { straight.search->load(path); }) != "");
  CHECK(equal_bits(other.search->alpha().detach(), alpha));
}

TEST_CASE("A step that fails leaves the search as it was", "[s3_delta]") {
  Running r, twin;
  r.step();
  twin.step();
  for (int when = 0; when < 5; ++when) {
    int calls = 0;
    const auto failing = [&](const std::string& set) {
      TORCH_CHECK(calls++ != when, "no more data");
      return r.loss(set);
    };
    CHECK(contains(
        error_of([&] {
          r.search->step(
              [&] { return failing(""); }, [&] { return failing("_val"); });
        }),
        "no more data"));
    CHECK(equal_bits(r.search->alpha(), twin.search->alpha()));
    CHECK(equal_bits(r.loss(""), twin.loss("")));
  }
  r.step();
  twin.step();
  CHECK(equal_bits(r.search->alpha(), twin.search->alpha()));
  CHECK(equal_bits(r.loss(""), twin.loss("")));
  CHECK(contains(
      error_of([&] {
        r.search->step(
            [] { return torch::ones({}, torch::kDouble); },
            [&] { return r.loss("_val"); });
      }),
      "one number that depends on the adapter"));
}

TEST_CASE("A useful module is found", "[s3_delta]") {
  // Only the bias of fc2 is wrong: its module ends with the highest p.
  Running r("detached", toy_options().budget(3));
  {
    torch::NoGradGuard no_grad;
    for (auto& item : r.adapter.named_parameters()) {
      if (contains(item.key(), "lora")) {
        item.value().mul_(0.01);
      } else {
        item.value().copy_(r.file.at("base." + item.key()));
      }
    }
  }
  const auto teacher = toy(r.file);
  {
    torch::NoGradGuard no_grad;
    teacher->fc2->bias.add_(torch::tensor({3.0, -2.0, 2.5}, torch::kDouble));
  }
  const auto loss = [&](const Tensor& x) {
    return (r.model->forward(x) - teacher->forward(x).detach()).square().mean();
  };
  for (int i = 0; i < 30; ++i) {
    r.search->step(
        [&] { return loss(r.file.at("x")); },
        [&] { return loss(r.file.at("x_val")); });
  }
  const auto structure = r.search->structure();
  CHECK(structure.modules() == std::vector<std::string>{"bitfit: fc2.bias"});
}

TEST_CASE("A structure is an adapter with files", "[s3_delta]") {
  auto model = bert();
  const auto before = state_of(*model);
  int64_t all = 0;
  for (const auto& module : peft::candidates(*model, bert_options(1))) {
    all += module.num_parameters;
  }
  CHECK(same_state(before, state_of(*model)));
  for (const int64_t budget : {int64_t{40}, all / 3, all}) {
    INFO("budget " << budget << " of " << all);
    auto searched = peft::attach(*model, bert_options(budget));
    CHECK(searched.num_parameters() == all);
    CHECK(contains(
        error_of([&] {
          const TemporaryDirectory folder;
          peft::save(searched, folder.path().string());
        }),
        "is of no method"));
    peft::StructureSearch search(
        searched, peft::StructureSearchOptions().lr(0.01));
    for (int i = 0; i < 2; ++i) {
      search.step(
          [&] { return run(model).square().mean(); },
          [&] { return (run(model) - 1).square().mean(); });
    }
    const auto structure = search.structure();
    int64_t wanted = 0;
    for (const auto& module : search.modules()) {
      const auto& names = structure.modules();
      wanted +=
          std::find(names.begin(), names.end(), module.name) != names.end()
          ? module.num_parameters
          : 0;
    }
    searched.detach();
    CHECK(same_state(before, state_of(*model)));

    auto adapter = peft::attach(*model, structure);
    CHECK(adapter.num_parameters() == wanted);
    CHECK(wanted <= budget);
    if (budget == all) {
      CHECK(wanted == all);
    }
    randomise(adapter);
    const auto y = run(model);
    const TemporaryDirectory folder;
    peft::save(adapter, folder.path().string());
    auto fresh = bert();
    auto again = peft::load(*fresh, folder.path().string());
    CHECK(again.method() == "S3DELTA");
    CHECK(again.num_parameters() == wanted);
    CHECK(equal_bits(run(fresh), y));
    auto copy = peft::clone(model);
    for (auto* m : {&model, &fresh, &copy}) {
      torch::optim::AdamW optimizer(peft::get_adapter(**m).parameters(), 0.1);
      run(*m).square().mean().backward();
      optimizer.step();
    }
    CHECK(equal_bits(run(fresh), run(model)));
    CHECK(equal_bits(run(copy), run(model)));
    adapter.detach();
  }
}

TEST_CASE("Modules are counted from shapes", "[s3_delta]") {
  // A network without memory, of BERT-base's size.
  const MetaDevice meta;
  BertForSequenceClassification model{peft::models::BertOptions()};
  const auto modules = peft::candidates(
      *model,
      peft::S3DeltaOptions(1).candidates(
          {peft::LoraOptions(4), peft::BitFitOptions({"query"})}));
  REQUIRE(modules.size() == 36);
  for (const auto& module : modules) {
    CHECK(
        module.num_parameters ==
        (contains(module.name, "lora") ? 4 * (768 + 768) : 768));
  }
  CHECK(
      modules[0].name ==
      "lora: bert.encoder.layer.0.attention.self.query.lora_A.weight");
}

TEST_CASE("What cannot be searched is refused", "[s3_delta]") {
  auto model = bert();
  const auto before = state_of(*model);
  const auto refusal = [&](const peft::S3DeltaOptions& options) {
    return error_of([&] { peft::attach(*model, options); });
  };
  CHECK(contains(
      refusal(bert_options(15)),
      "a budget of 15 parameters is smaller than the smallest module, "
      "'bitfit: bert.encoder.layer.0.attention.self.query.bias' of 16"));
  CHECK(contains(refusal(peft::S3DeltaOptions(10)), "name them by candidates"));
  CHECK(contains(refusal(bert_options(100).beta(0)), "beta must be positive"));
  CHECK(contains(refusal(bert_options(100).stretch_low(0.1)), "around [0, 1]"));
  CHECK(contains(
      refusal(peft::S3DeltaOptions(100000).candidates(
          {peft::LoraOptions(2), peft::Ia3Options()})),
      "cannot be searched"));
  CHECK(contains(
      error_of([&] {
        peft::attach(
            *model,
            peft::S3DeltaStructure()
                .candidates({peft::LoraOptions(2)})
                .modules({"lora: nowhere"}));
      }),
      "the structure names a module 'lora: nowhere'"));
  CHECK(contains(
      error_of([&] {
        peft::attach(
            *model,
            peft::S3DeltaStructure().candidates({peft::LoraOptions(2)}));
      }),
      "a structure without modules"));
  CHECK(same_state(before, state_of(*model)));
  auto lora = peft::attach(*model, peft::LoraOptions(2));
  CHECK(contains(
      error_of([&] { peft::StructureSearch search(lora); }),
      "has nothing to search"));
  lora.detach();
  auto searched = peft::attach(*model, bert_options(100));
  CHECK(contains(
      error_of([&] {
        peft::StructureSearch search(
            searched, peft::StructureSearchOptions().order(3));
      }),
      "of order 1 or 2, got 3"));
  CHECK(contains(
      error_of([&] {
        peft::StructureSearch search(
            searched, peft::StructureSearchOptions().lr(0));
      }),
      "must be positive"));
}

} // namespace test_s3_delta
