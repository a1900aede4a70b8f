// KronA: a Kronecker product beside a weight.

#include "accounting.h"
#include "adapted.h"
#include "gradcheck.h"
#include "model_state.h"
#include "networks.h"

#include <peft/io/formats/krona.h>

namespace test_krona {

using adapted::Tensor;
using peft::KronaOptions;
using peft::Targets;

namespace {

peft::detail::NamedTensorMap fixture(const std::string& name) {
  return peft::load_safetensors(
      golden("../../reference/data/reparam/" + name + ".safetensors"));
}

const std::vector<std::string> kCases{
    "square",
    "wide",
    "tall",
    "all_in_a",
    "all_in_b"};

double scaling_of(const std::string& name) {
  return name == "wide" ? 0.5 : name == "tall" ? 2.0 : 1.0;
}

peft::detail::KronaDelta& delta_at(const peft::Adapter& adapter, size_t i = 0) {
  return dynamic_cast<peft::detail::KronaDelta&>(
      *adapter.shared_state()->sites.at(i).delta);
}

/// s · A ⊗ B as it lies in the weight.
Tensor product_of(const peft::Adapter& adapter, size_t i = 0, double s = 1) {
  const auto& delta = delta_at(adapter, i);
  const Tensor product = at::kron(delta.krona_A, delta.krona_B).mul(s);
  return delta.is_transposed() ? product.t() : product;
}

torch::nn::Linear linear(int64_t in, int64_t out) {
  return torch::nn::Linear(torch::nn::LinearOptions(in, out));
}

KronaOptions everywhere() {
  return KronaOptions().targets(Targets::all_linear());
}

} // namespace

TEST_CASE("KronA follows its equation", "[krona]") {
  for (const auto& name : kCases) {
    INFO(name);
    const auto data = fixture("krona_" + name);
    const auto &W = data.at("weight"), &A = data.at("A");
    CHECK(close(at::kron(A, data.at("B")), data.at("product")));
    auto layer = torch::nn::Linear(
        torch::nn::LinearOptions(W.size(1), W.size(0)).bias(false));
    layer->to(torch::kDouble);
    {
      torch::NoGradGuard no_grad;
      layer->weight.copy_(W);
    }
    auto adapter = peft::attach(
        *layer,
        KronaOptions(A.size(0), A.size(1))
            .scaling(scaling_of(name))
            .targets(Targets::all_linear()));
    auto& delta = delta_at(adapter);
    {
      torch::NoGradGuard no_grad;
      delta.krona_A.copy_(A);
      delta.krona_B.copy_(data.at("B"));
    }
    const auto x = data.at("x").clone().requires_grad_();
    // Rows in one dimension, in two, in three, and without neighbours.
    for (const auto& shape :
         {std::vector<int64_t>{5, -1}, {1, 5, -1}, {5, 1, 1, -1}}) {
      const auto direction = data.at("direction").view(shape);
      const auto y = layer->forward(x.view(shape));
      CHECK(close(y, data.at("y").view(shape)));
      const auto g = torch::autograd::grad(
          {(y * direction).sum()}, {delta.krona_A, delta.krona_B, x});
      CHECK(close(g[0], data.at("gradient.A")));
      CHECK(close(g[1], data.at("gradient.B")));
      CHECK(close(g[2], data.at("gradient.x")));
    }
    CHECK(close(layer->forward(x[2]), data.at("y")[2])); // a vector
    CHECK(close(
        layer->forward(torch::stack({x, x}, 2).select(2, 0)), data.at("y")));
    CHECK(
        layer->forward(x.slice(0, 0, 0)).sizes() ==
        at::IntArrayRef({0, W.size(0)}));
    adapter.set_trainable(false);
    adapter.merge();
    CHECK(close(layer->forward(x), data.at("y")));
    adapter.unmerge();
    CHECK(equal_bits(peft::base(layer->weight).detach(), W));
  }
}

TEST_CASE("Kronecker products, whichever factor is first", "[krona]") {
  seed();
  for (const auto& [a1, a2, b1, b2] :
       std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>>{
           {2, 3, 3, 2}, {5, 1, 1, 4}, {1, 6, 4, 1}, {3, 2, 1, 1}}) {
    const auto A = torch::randn({a1, a2}, torch::kDouble).requires_grad_();
    const auto B = torch::randn({b1, b2}, torch::kDouble).requires_grad_();
    const auto x = torch::randn({2, a2 * b2}, torch::kDouble).requires_grad_();
    using peft::functional::kronecker_linear;
    CHECK(close(kronecker_linear(x, A, B), at::mm(x, at::kron(A, B).t())));
    // (A ⊗ B)ᵀ = Aᵀ ⊗ Bᵀ
    const auto z = torch::randn({4, a1 * b1}, torch::kDouble);
    CHECK(close(kronecker_linear(z, A.t(), B.t()), at::mm(z, at::kron(A, B))));
    CHECK(
        peft::functional::kronecker_cost(A, B) ==
        std::min(
            a2 * b1 * b2 + a1 * a2 * b1, // B first
            a1 * a2 * b2 + a1 * b2 * b1));
    const gradcheck::Function f = [](const gradcheck::Tensors& in) {
      return kronecker_linear(in[0], in[1], in[2]);
    };
    const auto direction = torch::randn({2, a1 * b1}, torch::kDouble);
    CHECK(gradcheck::first_order(f, {x, A, B}, direction));
    CHECK(gradcheck::second_order(f, {x, A, B}, direction));
  }
  CHECK(contains(
      error_of([] {
        peft::functional::kronecker_linear(
            torch::ones({2, 5}), torch::ones({2, 2}), torch::ones({3, 2}));
      }),
      "takes 4 features, and the input is [2, 5]"));
}

TEST_CASE("KronA starts as the base, with a1 a2 + b1 b2 numbers", "[krona]") {
  seed();
  auto layer = linear(12, 20);
  const auto x = torch::randn({3, 12});
  const auto base = layer->forward(x);
  auto adapter = peft::attach(*layer, everywhere());
  CHECK(equal_bits(layer->forward(x), base));
  const auto named = adapter.named_parameters();
  // The largest divisors not above √20 and √12.
  CHECK(named["krona_A"].sizes() == at::IntArrayRef({4, 3}));
  CHECK(named["krona_B"].sizes() == at::IntArrayRef({5, 4}));
  CHECK(adapter.num_parameters() == 4 * 3 + 5 * 4);
  CHECK(adapter.sites()[0].what == "krona 4x3 by 5x4");
  CHECK(named["krona_B"].count_nonzero().item<int64_t>() == 0);
  CHECK(named["krona_A"].abs().max().item<double>() < 1 / std::sqrt(3.0));
  CHECK(named["krona_A"].std().item<double>() > 0.1);
  // B moves first, then both.
  for (const bool moved : {false, true}) {
    adapter.parameters()[0].mutable_grad() = Tensor();
    layer->forward(x).square().sum().backward();
    CHECK((named["krona_A"].grad().abs().sum().item<double>() > 0) == moved);
    CHECK(named["krona_B"].grad().abs().sum().item<double>() > 0);
    torch::NoGradGuard no_grad;
    named["krona_B"].sub_(named["krona_B"].grad());
  }
  CHECK_FALSE(layer->weight.grad().defined());
}

TEST_CASE("A seed draws A, another one another", "[krona]") {
  std::vector<Tensor> drawn;
  for (const uint64_t number : {1, 1, 2}) {
    auto layer = linear(12, 20);
    seed(number);
    drawn.push_back(peft::attach(*layer, everywhere()).parameters()[0]);
  }
  CHECK(equal_bits(drawn[0].detach(), drawn[1].detach()));
  CHECK_FALSE(torch::allclose(drawn[0], drawn[2], 1e-3, 1e-3));
}

TEST_CASE("Sizes of the factors", "[krona]") {
  using Shape = std::pair<int64_t, int64_t>;
  const auto shape = [](const KronaOptions& o, int64_t out, int64_t in) {
    return peft::detail::krona_shape(o, out, in, "layer");
  };
  const auto count = [](Shape a, int64_t out, int64_t in) {
    return a.first * a.second + out / a.first * (in / a.second);
  };
  CHECK(shape(KronaOptions(), 768, 768) == Shape(24, 24));
  CHECK(shape(KronaOptions(), 3072, 768) == Shape(48, 24));
  CHECK(shape(KronaOptions(), 7, 16) == Shape(1, 4));
  CHECK(shape(KronaOptions(2, 8), 6, 16) == Shape(2, 8));
  // A budget is met as well as the divisors allow: against all of them.
  for (const int64_t budget : {48, 60, 100, 250, 1000}) {
    INFO(budget);
    const int64_t out = 24, in = 20;
    const auto chosen = shape(KronaOptions().budget(budget), out, in);
    int64_t most = 0;
    for (int64_t a1 = 1; a1 <= out; ++a1) {
      for (int64_t a2 = 1; a2 <= in; ++a2) {
        if (out % a1 == 0 && in % a2 == 0) {
          const auto n = count({a1, a2}, out, in);
          most = n <= budget ? std::max(most, n) : most;
        }
      }
    }
    CHECK(count(chosen, out, in) == most);
    CHECK(count(chosen, out, in) <= budget);
  }
  // Equal numbers: A nearest to a square. 16 numbers of 64 and 4 of 16.
  CHECK(shape(KronaOptions().budget(16), 8, 8) == Shape(2, 4));
}

TEST_CASE("Default targets are queries and values", "[krona]") {
  seed();
  const auto bert = std::make_shared<networks::Bert>();
  const auto adapter = peft::attach(*bert, KronaOptions());
  CHECK(adapter.sites().size() == 4);
  CHECK(adapter.num_parameters() == 4 * (4 * 4 + 4 * 4));
  for (const auto& site : adapter.sites()) {
    CHECK((contains(site.name, "query") || contains(site.name, "value")));
  }
}

TEST_CASE("Weights that lie as [in, out]", "[krona]") {
  seed();
  networks::Gpt2Mlp model;
  model.to(torch::kDouble);
  auto adapter =
      peft::attach(model, KronaOptions().targets({"c_fc", "c_proj"}));
  randomise(adapter);
  // c_fc: 6 to 12, A [3, 2] and B [4, 3]; the weight is [6, 12].
  CHECK(delta_at(adapter).krona_A.sizes() == at::IntArrayRef({3, 2}));
  CHECK(delta_at(adapter).krona_B.sizes() == at::IntArrayRef({4, 3}));
  CHECK(close(
      peft::effective(model.c_fc->weight),
      peft::base(model.c_fc->weight) + product_of(adapter)));
  const auto x = torch::randn({2, 3, 6}, torch::kDouble);
  const auto by_hand = [&] {
    const auto layer = [&](const Tensor& in, auto& m, size_t i) {
      return at::matmul(in, peft::base(m->weight) + product_of(adapter, i)) +
          m->bias;
    };
    return layer(torch::tanh(layer(x, model.c_fc, 0)), model.c_proj, 1);
  };
  const auto y = model.forward(x);
  CHECK(close(y, by_hand()));
  CHECK(adapted::all_close(
      adapted::gradients(y, adapter.parameters()),
      adapted::gradients(by_hand(), adapter.parameters())));
  peft::merge(model);
  CHECK(close(model.forward(x), y));
}

TEST_CASE("Packed projections have factors each", "[krona]") {
  for (const bool separate : {false, true}) {
    INFO(separate);
    seed();
    torch::nn::MultiheadAttentionOptions options(6, 2);
    if (separate) {
      options.kdim(4).vdim(4);
    }
    torch::nn::MultiheadAttention attention(options);
    attention->to(torch::kDouble);
    const auto q = torch::randn({3, 2, 6}, torch::kDouble);
    const auto k = torch::randn({3, 2, separate ? 4 : 6}, torch::kDouble);
    const auto v = torch::randn({3, 2, separate ? 4 : 6}, torch::kDouble);
    const auto run = [&] { return std::get<0>(attention->forward(q, k, v)); };
    const auto base = run();
    for (const auto& projections :
         {std::vector<std::string>{"query", "value"},
          {"key"},
          {"query", "key", "value"}}) {
      auto adapter =
          peft::attach(*attention, KronaOptions().projections(projections));
      CHECK(equal_bits(run(), base));
      REQUIRE(adapter.sites().size() == projections.size());
      for (size_t i = 0; i < projections.size(); ++i) {
        CHECK(adapter.sites()[i].name == projections[i]);
        CHECK(adapter.named_parameters().contains(projections[i] + ".krona_A"));
      }
      randomise(adapter);
      if (!separate) {
        std::vector<Tensor> rows(3, torch::zeros({6, 6}, torch::kDouble));
        for (size_t i = 0; i < projections.size(); ++i) {
          const auto at = projections[i] == "query" ? 0
              : projections[i] == "key"             ? 1
                                                    : 2;
          rows[at] = product_of(adapter, i);
        }
        CHECK(close(
            peft::effective(attention->in_proj_weight),
            peft::base(attention->in_proj_weight) + torch::cat(rows)));
      }
      const auto calls = adapted::watch(adapter);
      const auto y = run();
      CHECK(calls->linear > 0);
      CHECK(calls->effective == 0);
      CHECK_FALSE(torch::allclose(y, base, 1e-3, 1e-3));
      const TemporaryDirectory folder;
      peft::save(adapter, folder.path().string());
      adapter.set_trainable(false);
      adapter.merge();
      CHECK(close(run(), y));
      adapter.unmerge();
      adapter.detach();
      auto again = peft::load(*attention, folder.path().string());
      CHECK(equal_bits(run(), y));
      again.detach();
    }
  }
}

TEST_CASE("Rows of a weight that are used alone", "[krona]") {
  seed();
  auto layer = linear(6, 12);
  layer->to(torch::kDouble);
  auto adapter = peft::attach(*layer, everywhere()); // B has 4 rows
  randomise(adapter);
  const auto W = peft::effective(layer->weight).detach();
  const auto calls = adapted::watch(adapter);
  for (const auto& [begin, end] : std::vector<std::pair<int64_t, int64_t>>{
           {0, 12}, {0, 4}, {4, 8}, {1, 3}, {3, 9}, {11, 12}}) {
    INFO(begin << " to " << end);
    const auto rows = layer->weight.slice(0, begin, end);
    const auto part = W.slice(0, begin, end);
    const auto x = torch::randn({2, 3, 6}, torch::kDouble);
    CHECK(close(at::linear(x, rows), at::linear(x, part)));
    const auto z = torch::randn({3, end - begin}, torch::kDouble);
    CHECK(close(at::mm(z, rows), at::mm(z, part)));
    CHECK(adapted::all_close(
        adapted::gradients(at::linear(x, rows), adapter.parameters()),
        adapted::gradients(
            at::linear(
                x,
                (peft::base(layer->weight).detach() + product_of(adapter))
                    .slice(0, begin, end)),
            adapter.parameters())));
  }
  CHECK(calls->linear > 0);
  CHECK(calls->effective == 0);
}

TEST_CASE("What needs the weight itself gets it", "[krona]") {
  seed();
  // An LSTM, a tied table, a weight with other strides, code of the user's.
  torch::nn::LSTM lstm(torch::nn::LSTMOptions(4, 6));
  lstm->to(torch::kDouble);
  auto adapter = peft::attach(*lstm, KronaOptions().targets({""}));
  CHECK(adapter.sites().size() == 2);
  const auto x = torch::randn({3, 2, 4}, torch::kDouble);
  const auto base = std::get<0>(lstm->forward(x)).detach();
  randomise(adapter);
  const auto y = std::get<0>(lstm->forward(x));
  CHECK_FALSE(torch::allclose(y, base, 1e-3, 1e-3));
  y.sum().backward();
  CHECK(adapter.parameters()[3].grad().abs().sum().item<double>() > 0);
  peft::merge(*lstm);
  CHECK(close(std::get<0>(lstm->forward(x)), y));

  networks::Words words("emb", "out", /*tied=*/true);
  words.to(torch::kDouble);
  auto tied = peft::attach(words, KronaOptions().targets({"emb", "out"}));
  CHECK(tied.sites().size() == 1);
  randomise(tied);
  CHECK(torch::equal(
      peft::effective(words.emb->weight), peft::effective(words.out->weight)));
  const auto ids = torch::arange(11);
  const auto E = peft::base(words.emb->weight) + product_of(tied);
  CHECK(close(words.forward(ids), at::matmul(torch::tanh(E), E.t())));

  auto plain = linear(6, 10), strided = linear(6, 10);
  {
    torch::NoGradGuard no_grad;
    strided->weight.set_data(plain->weight.t().contiguous().t());
    strided->bias.copy_(plain->bias);
  }
  REQUIRE_FALSE(strided->weight.is_contiguous());
  const auto z = torch::randn({4, 6});
  std::vector<Tensor> results;
  for (auto* layer : {&plain, &strided}) {
    const auto one = peft::attach(**layer, everywhere());
    randomise(one);
    results.push_back((*layer)->forward(z).detach());
    peft::merge(**layer);
    CHECK(close((*layer)->forward(z), results.back()));
  }
  CHECK(close(results[0], results[1]));
}

TEST_CASE("Half precision, autocast, float64", "[krona]") {
  seed();
  auto layer = linear(12, 20);
  layer->to(torch::kBFloat16);
  auto adapter = peft::attach(*layer, everywhere());
  randomise(adapter);
  CHECK(adapter.parameters()[0].scalar_type() == torch::kFloat);
  const auto x = torch::randn({5, 12}).to(torch::kBFloat16);
  const auto y = layer->forward(x);
  CHECK(y.scalar_type() == torch::kBFloat16);
  const auto exact = at::linear(
      x.to(torch::kDouble),
      peft::base(layer->weight).to(torch::kDouble) +
          product_of(adapter).to(torch::kDouble),
      layer->bias.to(torch::kDouble));
  CHECK(close(y, exact));
  y.sum().backward();
  CHECK(adapter.parameters()[0].grad().scalar_type() == torch::kFloat);
  adapter.set_trainable(false);
  adapter.merge();
  CHECK(close(layer->forward(x), exact, 3e-2, 3e-2));

  auto wide = linear(12, 20);
  auto other = peft::attach(*wide, everywhere());
  randomise(other);
  const auto z = torch::randn({5, 12});
  const auto before = wide->forward(z);
  {
    const adapted::Autocast autocast;
    const auto half = wide->forward(z);
    CHECK(half.scalar_type() == torch::kBFloat16);
    CHECK(close(half, before, 3e-2, 3e-2));
    half.sum().backward();
  }
  CHECK(other.parameters()[1].grad().scalar_type() == torch::kFloat);
  wide->to(torch::kDouble);
  CHECK(other.parameters()[0].scalar_type() == torch::kDouble);
  CHECK(close(wide->forward(z.to(torch::kDouble)), before, 1e-5, 1e-5));
}

TEST_CASE("Several, by name and by row", "[krona]") {
  seed();
  auto layer = linear(6, 12);
  const auto x = torch::randn({4, 3, 6});
  const auto base = layer->forward(x).detach();
  std::vector<Tensor> alone;
  auto a = peft::attach(*layer, everywhere(), "a");
  auto b = peft::attach(
      *layer, KronaOptions(2, 3).targets(Targets::all_linear()), "b");
  randomise(a, 1);
  randomise(b, 2);
  const torch::NoGradGuard no_grad;
  for (const std::string name : {"a", "b"}) {
    const peft::ActiveAdapters scope({name});
    alone.push_back(layer->forward(x));
  }
  CHECK(close(layer->forward(x), alone[0] + alone[1] - base));
  const peft::BatchAdapters scope({"a", "b", "__base__", "a"});
  const auto mixed = layer->forward(x);
  CHECK(close(mixed[0], alone[0][0]));
  CHECK(close(mixed[1], alone[1][1]));
  CHECK(close(mixed[2], base[2]));
  CHECK(close(mixed[3], alone[0][3]));
  torch::AutoGradMode on(true);
  CHECK(close(layer->forward(x), mixed));
}

TEST_CASE("Files of KronA", "[krona]") {
  struct Row {
    std::string name;
    KronaOptions options;
  };
  for (const auto& row : std::vector<Row>{
           {"bert", KronaOptions().scaling(0.5)},
           {"bert", KronaOptions(2, 4).targets({"query", "dense"})},
           {"bert", everywhere().budget(60).exclude({"pooler.dense"})},
           {"bert", KronaOptions().modules_to_save({"pooler"})},
           {"gpt2_mlp", KronaOptions().targets(Targets::regex("c_.*"))},
           {"attention", KronaOptions().projections({"key"})},
           {"attention", everywhere()}}) {
    INFO(row.name);
    seed();
    auto network = networks::build(row.name);
    const auto twin = networks::build(row.name);
    {
      torch::NoGradGuard no_grad;
      const auto theirs = twin.module->named_parameters();
      for (const auto& p : network.module->named_parameters()) {
        theirs[p.key()].data().copy_(p.value());
      }
    }
    std::vector<Tensor> inputs{torch::randint(0, 9, {2, 5}, torch::kLong)};
    if (row.name == "bert") {
      inputs.push_back(torch::ones({2, 5}, torch::kLong));
    } else {
      inputs = {torch::randn({3, 2, row.name == "gpt2_mlp" ? 6 : 8})};
    }
    auto adapter = peft::attach(*network.module, row.options);
    randomise(adapter);
    const TemporaryDirectory folder;
    peft::save(adapter, folder.path().string());
    auto again = peft::load(*twin.module, folder.path().string());
    CHECK(again.num_parameters() == adapter.num_parameters());
    CHECK(equal_bits(twin.run(inputs), network.run(inputs)));
    const auto step = [&](const networks::Network& one, peft::Adapter& its) {
      torch::optim::Adam optimizer(its.parameters());
      one.run(inputs).square().mean().backward();
      optimizer.step();
    };
    step(network, adapter);
    step(twin, again);
    const auto mine = adapter.parameters(), theirs = again.parameters();
    for (size_t i = 0; i < mine.size(); ++i) {
      CHECK(equal_bits(theirs[i].detach(), mine[i].detach()));
    }
  }
}

TEST_CASE("KronA builds nothing of the weight's size", "[krona]") {
  const int64_t width = 96, rows = 4;
  const auto matrix = int64_t{4} * width * width;
  const auto x = torch::randn({rows, width}).requires_grad_();
  struct Seen {
    int64_t parameters, held, peak;
    std::vector<std::string> operators;
  };
  const auto measure = [&](const auto& options) {
    seed();
    auto layer = linear(width, width);
    const auto adapter = peft::attach(*layer, options);
    randomise(adapter);
    layer->forward(x).sum().backward(); // the first call sets things up
    Seen seen{adapter.num_parameters(), 0, 0, {}};
    {
      const accounting::Memory memory;
      const auto y = layer->forward(x);
      seen.held = memory.held();
      CHECK(memory.of_at_least(matrix).empty());
      y.sum().backward();
      CHECK(memory.of_at_least(matrix).empty());
      seen.peak = memory.peak();
    }
    seen.operators = adapted::operator_names([&] { return layer->forward(x); });
    return seen;
  };
  const auto lora =
      measure(peft::LoraOptions(1).targets(Targets::all_linear()));
  const auto krona =
      measure(KronaOptions(8, 12).targets(Targets::all_linear()));
  REQUIRE(lora.parameters == 2 * width);
  REQUIRE(krona.parameters == lora.parameters);
  // Beside y: LoRA keeps r numbers a row, KronA a1 b2 of its first product.
  CHECK(lora.held == 4 * rows * (width + 1));
  CHECK(krona.held == 4 * rows * (width + 8 * 8));
  CHECK(krona.peak < matrix);
  // What computes, among views: the layer's call, the base in it, and two
  // products that are added.
  std::vector<std::string> computing;
  for (const auto& name : krona.operators) {
    for (const char* const known :
         {"addmm",
          "addmm_",
          "mm",
          "bmm",
          "baddbmm",
          "kron",
          "mul",
          "add",
          "add_",
          "clone"}) {
      if (name == std::string("aten::") + known) {
        computing.push_back(known);
      }
    }
  }
  CHECK(
      computing ==
      std::vector<std::string>{"addmm", "addmm", "bmm", "mm", "add"});
}

TEST_CASE("The gradient in A is one product over all rows", "[krona]") {
  seed();
  const int64_t rows = 64;
  const auto A = torch::randn({16, 16}).requires_grad_();
  const auto B = torch::randn({2, 2}).requires_grad_();
  const auto x = torch::randn({rows, 32});
  const auto y = peft::functional::kronecker_linear(x, A, B).sum();
  const accounting::Memory memory;
  y.backward();
  // matmul's own derivative has a matrix like A for each row.
  CHECK(memory.of_at_least(4 * rows * 16 * 16).empty());
}

TEST_CASE("Options of KronA that make no sense", "[krona]") {
  seed();
  const auto bert = std::make_shared<networks::Bert>();
  const auto before = state_of(*bert);
  const auto refused = [&](const KronaOptions& options) {
    const auto error = error_of([&] { peft::attach(*bert, options); });
    CHECK(same_state(before, state_of(*bert)));
    return error;
  };
  CHECK(contains(
      refused(KronaOptions(3, 4)),
      "KronA's a1 = 3 does not divide the 16 outputs of "
      "'encoder.layer.0.attention.self.query'; it can be 1, 2, 4, 8, 16"));
  CHECK(contains(
      refused(KronaOptions(4, 5)),
      "KronA's a2 = 5 does not divide the 16 inputs of "));
  CHECK(contains(
      refused(KronaOptions(0, 4)),
      "KronA's shape is that of A, two positive numbers, got [0, 4]"));
  CHECK(contains(
      refused(KronaOptions().shape({4})), "two positive numbers, got [4]"));
  CHECK(contains(
      refused(KronaOptions(4, 4).budget(9)), "and so does budget; set one"));
  CHECK(contains(
      refused(KronaOptions().budget(0)), "budget must be positive, got 0"));
  CHECK(contains(
      refused(KronaOptions().budget(31)),
      "the least that KronA takes at 'encoder.layer.0.attention.self.query', "
      "of 16 outputs and 16 inputs, is 32 parameters, and the budget is 31"));
  CHECK(contains(
      refused(KronaOptions().scaling(1.0 / 0.0)), "scaling must be finite"));
  CHECK(contains(
      refused(KronaOptions().projections({})), "projections are empty"));
  CHECK(contains(
      refused(KronaOptions().projections({"queries"})),
      "projections are query, key and value, got 'queries'"));
  CHECK(contains(
      refused(KronaOptions().targets({"querry"})),
      "targets entry 'querry' matches nothing in this network."));
  CHECK(contains(
      refused(KronaOptions().targets({"LayerNorm"})),
      "KronA adapts matrices, and 'embeddings.LayerNorm', a "));
  CHECK(contains(
      refused(KronaOptions().targets({"query.bias"})),
      "KronA adapts matrices, and 'encoder.layer.0.attention.self.query.bias' "
      "has 1 dimension(s)"));
  auto convolution = networks::build("conv1d");
  CHECK(contains(
      error_of([&] {
        peft::attach(*convolution.module, KronaOptions().targets({"conv"}));
      }),
      "KronA adapts matrices, and 'conv', a "));
  CHECK(contains(
      error_of([&] { peft::attach(*convolution.module, KronaOptions()); }),
      "by default (query and value projections); set targets(...)."));
}

TEST_CASE("KronA times a number, and times a gate of its input", "[krona]") {
  seed();
  const auto x = torch::randn({4, 3, 6}, torch::kDouble);
  auto layer = linear(6, 12);
  layer->to(torch::kDouble);
  const auto base = layer->forward(x).detach();
  auto scaled = peft::attach(*layer, peft::Scaled(everywhere(), 0.5));
  randomise(scaled);
  const auto change = at::matmul(x, product_of(scaled).t()).detach();
  CHECK(close(layer->forward(x), base + 0.5 * change));
  peft::merge(*layer);
  CHECK(close(layer->forward(x), base + 0.5 * change));

  auto other = linear(6, 12);
  other->to(torch::kDouble);
  const auto plain = other->forward(x).detach();
  const auto gated =
      peft::attach(*other, peft::Gated(everywhere(), peft::GateOptions()));
  randomise(gated);
  const auto ungated = at::matmul(x, product_of(gated).t());
  const auto gate = ((other->forward(x) - plain) / ungated).detach();
  for (int64_t row = 0; row < 4; ++row) {
    const double g = gate[row][0][0].item<double>();
    CHECK(g > 0);
    CHECK(g < 1);
    CHECK(close(gate[row], torch::full({3, 12}, g, torch::kDouble)));
  }
}

} // namespace test_krona
