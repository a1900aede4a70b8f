// Intrinsic dimension: the Walsh-Hadamard and Fastfood transforms, and d shared
// numbers that move all weights.

#include "accounting.h"
#include "adapted.h"
#include "gradcheck.h"
#include "model_state.h"
#include "networks.h"

#include <peft/io/formats/intrinsic.h>

#include <fstream>
#include <sstream>

namespace test_intrinsic {

using adapted::Tensor;
using peft::functional::DenseProjection;
using peft::functional::FastfoodProjection;
using peft::functional::RandomProjection;
using peft::functional::walsh_hadamard;

namespace {

peft::detail::NamedTensorMap fixture(const std::string& name) {
  return peft::load_safetensors(
      golden("../../reference/data/reparam/" + name + ".safetensors"));
}

/// Hadamard's matrix of n, by Sylvester.
Tensor sylvester(int64_t n) {
  Tensor matrix = torch::ones({1, 1}, torch::kDouble);
  while (matrix.size(0) < n) {
    matrix = torch::cat(
        {torch::cat({matrix, matrix}, 1), torch::cat({matrix, -matrix}, 1)}, 0);
  }
  return matrix;
}

/// P as a matrix, by what it makes of each unit vector.
Tensor matrix_of(const RandomProjection& projection, int64_t d) {
  std::vector<Tensor> columns;
  for (const auto& unit : torch::eye(d, torch::kDouble).unbind()) {
    columns.push_back(projection.apply(unit, 1.0));
  }
  return torch::stack(columns, 1);
}

at::Generator generator(uint64_t number) {
  return at::make_generator<at::CPUGeneratorImpl>(number);
}

/// Two linear layers without biases: 3 to 5 to 2.
struct TwoImpl : torch::nn::Cloneable<TwoImpl> {
  TwoImpl() {
    reset();
  }
  void reset() override {
    const auto linear = [](int64_t in, int64_t out) {
      return torch::nn::Linear(torch::nn::LinearOptions(in, out).bias(false));
    };
    first = register_module("first", linear(3, 5));
    second = register_module("second", linear(5, 2));
  }
  Tensor forward(const Tensor& x) {
    return second(torch::tanh(first(x)));
  }
  torch::nn::Linear first{nullptr}, second{nullptr};
};
TORCH_MODULE(Two);

const peft::detail::IntrinsicDelta* delta_at(
    const peft::Adapter& adapter,
    size_t i) {
  return dynamic_cast<const peft::detail::IntrinsicDelta*>(
      adapter.shared_state()->sites.at(i).delta.get());
}

std::string text_of(const std::string& path) {
  std::ifstream stream(path);
  std::stringstream text;
  text << stream.rdbuf();
  return text.str();
}

} // namespace

TEST_CASE("Walsh-Hadamard is Sylvester's matrix times a vector", "[fastfood]") {
  seed();
  for (const int64_t n : {1, 2, 4, 8, 16, 64, 256}) {
    INFO(n);
    const auto x = torch::randn({n}, torch::kDouble);
    const auto y = at::mv(sylvester(n), x);
    CHECK(close(walsh_hadamard(x), y));
    CHECK(close(walsh_hadamard(x.to(torch::kFloat)), y, 1e-5, 1e-5));
    CHECK(close(peft::functional::detail::walsh_hadamard_composed(x), y));
  }
}

TEST_CASE(
    "Walsh-Hadamard has the same bits in blocks, on every instruction set and "
    "number of threads",
    "[fastfood]") {
  namespace cpu = peft::functional::cpu;
  struct Restore {
    ~Restore() {
      at::set_num_threads(threads);
      cpu::detail::isa() = cpu::best_isa();
    }
    int threads = at::get_num_threads();
  } restore;
  seed();
  for (const auto dtype : {torch::kFloat, torch::kDouble}) {
    for (const int64_t n : {8, 4096, 8192, 1 << 17}) {
      INFO(n << " of " << dtype);
      const auto x = torch::randn({n}, dtype);
      const auto expected =
          peft::functional::detail::walsh_hadamard_composed(x);
      for (const auto isa :
           {cpu::Isa::kPlain, cpu::Isa::kAvx2, cpu::Isa::kAvx512}) {
        cpu::detail::isa() = std::min(isa, cpu::best_isa());
        for (const int threads : {1, 2}) {
          at::set_num_threads(threads);
          CHECK(equal_bits(walsh_hadamard(x), expected));
        }
      }
      const auto strided = torch::stack({x, x}, 1).select(1, 0);
      CHECK(equal_bits(walsh_hadamard(strided), expected));
    }
  }
  // H H = n, of whole numbers without rounding.
  const auto whole = torch::randint(-8, 8, {1 << 15}, torch::kFloat);
  CHECK(torch::equal(walsh_hadamard(walsh_hadamard(whole)), whole * (1 << 15)));
}

TEST_CASE("Walsh-Hadamard takes powers of two", "[fastfood]") {
  for (const auto& sizes : {std::vector<int64_t>{12}, {4, 4}, {0}, {}}) {
    CHECK(contains(
        error_of([&] { walsh_hadamard(torch::zeros(sizes)); }),
        "takes a vector whose length is a power of two, got ["));
  }
  using peft::functional::next_power_of_two;
  CHECK(next_power_of_two(1) == 1);
  CHECK(next_power_of_two(2) == 2);
  CHECK(next_power_of_two(5) == 8);
  CHECK(next_power_of_two(4097) == 8192);
}

TEST_CASE("Gradients of Walsh-Hadamard, first and second order", "[fastfood]") {
  seed();
  const auto x = torch::randn({8}, torch::kDouble).requires_grad_();
  const auto direction = torch::randn({8}, torch::kDouble);
  const gradcheck::Function f = [](const gradcheck::Tensors& in) {
    return walsh_hadamard(in[0]).tanh();
  };
  CHECK(gradcheck::first_order(f, {x}, direction));
  CHECK(gradcheck::second_order(f, {x}, direction));
}

TEST_CASE("P is the product of its explicit matrices", "[fastfood]") {
  const std::vector<int64_t> sizes{24, 5, 1, 64, 37};
  const int64_t d = 11;
  for (const bool fastfood : {true, false}) {
    const auto expected = fixture(fastfood ? "fastfood" : "dense");
    auto numbers = generator(3);
    for (size_t i = 0; i < sizes.size(); ++i) {
      INFO(fastfood << " " << sizes[i]);
      std::unique_ptr<RandomProjection> projection;
      if (fastfood) {
        projection = std::make_unique<FastfoodProjection>(sizes[i], d, numbers);
      } else {
        projection = std::make_unique<DenseProjection>(sizes[i], d, numbers);
      }
      const auto P = matrix_of(*projection, d);
      CHECK(close(P, expected.at("matrix." + std::to_string(i))));
      CHECK(close(
          projection->apply(torch::ones({d}, torch::kDouble), -0.5),
          -0.5 * P.sum(1)));
      CHECK(
          projection->apply(torch::ones({d}), 1).scalar_type() ==
          torch::kFloat);
    }
  }
}

TEST_CASE("Columns of P have length 1", "[fastfood]") {
  auto numbers = generator(8);
  // Exactly, where nothing is cut off; else in the mean.
  const auto exact = matrix_of(FastfoodProjection(64, 20, numbers), 20);
  CHECK(close(exact.norm(2, 0), torch::ones({20}, torch::kDouble), 1e-6, 0));
  const auto cut = matrix_of(FastfoodProjection(5000, 40, numbers), 40);
  CHECK(std::abs(cut.square().sum(0).mean().item<double>() - 1) < 0.1);
  const auto dense = matrix_of(DenseProjection(50, 7, numbers), 7);
  CHECK(close(dense.norm(2, 0), torch::ones({7}, torch::kDouble), 1e-6, 0));
  // Columns are near to orthogonal: off the diagonal 1 / √N.
  const auto gram = at::mm(cut.t(), cut) - torch::eye(40, torch::kDouble);
  CHECK(gram.square().mean().sqrt().item<double>() < 0.03);
}

TEST_CASE("Gradients through P, first and second order", "[fastfood]") {
  seed();
  auto numbers = generator(4);
  for (const int64_t size : {6, 1}) { // more numbers than d, and fewer
    const FastfoodProjection fastfood(size, 3, numbers);
    const DenseProjection dense(size, 3, numbers);
    const auto theta = torch::randn({3}, torch::kDouble).requires_grad_();
    const auto direction = torch::randn({size}, torch::kDouble);
    for (const RandomProjection* P :
         {static_cast<const RandomProjection*>(&fastfood),
          static_cast<const RandomProjection*>(&dense)}) {
      const gradcheck::Function f = [&](const gradcheck::Tensors& in) {
        return P->apply(in[0], 1.5).tanh();
      };
      CHECK(gradcheck::first_order(f, {theta}, direction));
      CHECK(gradcheck::second_order(f, {theta}, direction));
    }
  }
}

TEST_CASE("DID and SAID follow their equations", "[intrinsic]") {
  for (const bool said : {false, true}) {
    INFO(said);
    const auto data = fixture(said ? "said" : "did");
    Two model;
    model->to(torch::kDouble);
    {
      torch::NoGradGuard no_grad;
      model->first->weight.copy_(data.at("first"));
      model->second->weight.copy_(data.at("second"));
    }
    const auto adapter =
        peft::attach(*model, peft::IntrinsicOptions(9).said(said).seed(5));
    auto parameters = adapter.parameters();
    REQUIRE(parameters.size() == (said ? 2u : 1u));
    REQUIRE(adapter.num_parameters() == 9);
    const std::vector<std::string> names{"theta", "lambda"};
    for (size_t i = 0; i < parameters.size(); ++i) {
      torch::NoGradGuard no_grad;
      parameters[i].copy_(data.at("before." + names[i]));
    }
    CHECK(
        close(peft::effective(model->first->weight), data.at("first.adapted")));
    CHECK(close(
        peft::effective(model->second->weight), data.at("second.adapted")));
    torch::optim::SGD optimizer(parameters, torch::optim::SGDOptions(0.1));
    for (int step = 0; step < 3; ++step) {
      optimizer.zero_grad();
      const auto loss =
          (model->forward(data.at("x")) - data.at("target")).square().mean();
      loss.backward();
      if (step == 0) {
        CHECK(close(loss, data.at("loss")));
        for (size_t i = 0; i < parameters.size(); ++i) {
          CHECK(close(parameters[i].grad(), data.at("gradient." + names[i])));
        }
      }
      optimizer.step();
    }
    for (size_t i = 0; i < parameters.size(); ++i) {
      CHECK(close(parameters[i], data.at("after." + names[i])));
    }
  }
}

TEST_CASE(
    "The d numbers are there once, and start at the base",
    "[intrinsic]") {
  seed();
  Two model;
  const auto x = torch::randn({4, 3});
  const auto base = model->forward(x);
  const auto state =
      at::globalContext().defaultGenerator(at::kCPU).get_state().clone();
  auto adapter = peft::attach(*model, peft::IntrinsicOptions(7).said(true));
  CHECK(equal_bits(model->forward(x), base));
  // P has a generator of its own: the caller's numbers go on as they would.
  CHECK(torch::equal(
      at::globalContext().defaultGenerator(at::kCPU).get_state(), state));

  CHECK(adapter.num_parameters() == 7);
  const auto named = adapter.named_parameters();
  REQUIRE(named.size() == 2);
  CHECK(named["intrinsic_vector"].sizes() == at::IntArrayRef({5}));
  CHECK(torch::equal(named["intrinsic_vector"], torch::zeros({5})));
  CHECK(torch::equal(named["intrinsic_lambda"], torch::ones({2})));
  const auto sites = adapter.sites();
  REQUIRE(sites.size() == 2);
  CHECK(sites[0].what == "intrinsic d=7");
  CHECK(sites[0].num_parameters == 7);
  CHECK(sites[1].what == "intrinsic");
  CHECK(sites[1].num_parameters == 0);
  int64_t trained = 0;
  for (const auto& p : model->parameters()) {
    trained += p.requires_grad() ? p.numel() : 0;
  }
  CHECK(trained == 7);
  // P itself is neither parameter nor buffer: no archive holds it.
  CHECK(model->buffers().empty());

  // lambda waits for theta to move.
  torch::optim::SGD optimizer(
      adapter.parameters(), torch::optim::SGDOptions(0.5));
  for (const bool moved : {false, true}) {
    optimizer.zero_grad();
    model->forward(x).square().mean().backward();
    CHECK(
        (named["intrinsic_lambda"].grad().abs().sum().item<double>() > 0) ==
        moved);
    optimizer.step();
  }
  CHECK(peft::base(model->first->weight).grad().defined() == false);
}

TEST_CASE("A seed is a projection", "[intrinsic]") {
  const auto changed = [](int64_t number, const std::string& kind) {
    seed();
    Two model;
    const auto adapter = peft::attach(
        *model, peft::IntrinsicOptions(4).seed(number).projection(kind));
    randomise(adapter);
    return torch::cat(
        {peft::effective(model->first->weight).flatten(),
         peft::effective(model->second->weight).flatten()});
  };
  for (const std::string kind : {"fastfood", "dense"}) {
    CHECK(equal_bits(changed(1, kind), changed(1, kind)));
    CHECK_FALSE(
        torch::allclose(changed(1, kind), changed(2, kind), 1e-3, 1e-3));
  }
  CHECK_FALSE(
      torch::allclose(changed(1, "dense"), changed(1, "fastfood"), 1e-3, 1e-3));
}

TEST_CASE("An intrinsic dimension merges exactly", "[intrinsic]") {
  for (const bool said : {false, true}) {
    seed();
    Two model;
    model->to(torch::kDouble);
    auto adapter = peft::attach(*model, peft::IntrinsicOptions(6).said(said));
    randomise(adapter);
    adapter.set_trainable(false);
    const auto x = torch::randn({4, 3}, torch::kDouble);
    const auto y = model->forward(x);
    const auto W = peft::base(model->first->weight).detach().clone();
    adapter.merge();
    CHECK(close(model->forward(x), y));
    adapter.unmerge();
    CHECK(equal_bits(peft::base(model->first->weight).detach(), W));
    adapter.set_scale(0.5);
    const auto half = model->forward(x);
    CHECK_FALSE(torch::allclose(half, y, 1e-3, 1e-3));
    peft::merge(*model);
    CHECK(close(model->forward(x), half));
    CHECK(model->children().size() == 2);
  }
}

TEST_CASE("Copies share P and nothing else", "[intrinsic]") {
  seed();
  Two model;
  auto adapter = peft::attach(*model, peft::IntrinsicOptions(6).said(true));
  randomise(adapter);
  const auto x = torch::randn({4, 3});
  const auto y = model->forward(x).detach();
  auto copy = peft::clone(model);
  const auto twin = peft::get_adapter(*copy);
  CHECK(equal_bits(copy->forward(x).detach(), y));
  CHECK(
      &delta_at(twin, 0)->projections() ==
      &delta_at(adapter, 0)->projections());
  randomise(twin, 8);
  // Both of the copy's tensors follow the copy's numbers, none of ours does.
  CHECK_FALSE(torch::allclose(
      peft::effective(copy->second->weight),
      peft::effective(model->second->weight),
      1e-3,
      1e-3));
  CHECK(equal_bits(model->forward(x).detach(), y));
  copy->forward(x).sum().backward();
  CHECK_FALSE(adapter.parameters()[0].grad().defined());
  CHECK(twin.parameters()[0].grad().defined());
}

TEST_CASE("Files hold d numbers and a seed", "[intrinsic]") {
  for (const std::string kind : {"fastfood", "dense"}) {
    seed();
    Two model;
    auto adapter = peft::attach(
        *model,
        peft::IntrinsicOptions(6).said(true).seed(12345).projection(kind));
    randomise(adapter);
    const TemporaryDirectory folder;
    peft::save(adapter, folder.path().string());
    const auto tensors =
        peft::load_safetensors(folder / "adapter_model.safetensors");
    REQUIRE(tensors.size() == 2);
    CHECK(
        tensors.at("base_model.model.intrinsic_vector").sizes() ==
        at::IntArrayRef({4}));
    CHECK(
        tensors.at("base_model.model.intrinsic_lambda").sizes() ==
        at::IntArrayRef({2}));

    seed();
    Two other;
    auto again = peft::load(*other, folder.path().string());
    const auto x = torch::randn({4, 3});
    CHECK(equal_bits(other->forward(x), model->forward(x)));
    // The next steps of training have the same bits.
    std::vector<std::unique_ptr<torch::optim::Adam>> optimizers;
    for (const auto& a : {adapter, again}) {
      optimizers.push_back(std::make_unique<torch::optim::Adam>(
          a.parameters(), torch::optim::AdamOptions(0.05)));
    }
    for (int step = 0; step < 2; ++step) {
      size_t i = 0;
      for (auto* m : {model.get(), other.get()}) {
        optimizers[i]->zero_grad();
        m->forward(x).square().mean().backward();
        optimizers[i++]->step();
      }
    }
    for (size_t i = 0; i < 2; ++i) {
      CHECK(equal_bits(again.parameters()[i], adapter.parameters()[i]));
    }
    // Saved again it is the same.
    const TemporaryDirectory second;
    peft::save(
        peft::load(*Two(), folder.path().string()), second.path().string());
    CHECK(
        text_of(second / "adapter_config.json") ==
        text_of(folder / "adapter_config.json"));
  }
}

TEST_CASE("A file whose P cannot be made is refused", "[intrinsic]") {
  seed();
  Two model;
  const auto adapter = peft::attach(*model, peft::IntrinsicOptions(6));
  const TemporaryDirectory folder;
  peft::save(adapter, folder.path().string());
  const std::string path = folder / "adapter_config.json";

  Two other;
  const auto before = state_of(*other);
  const auto refused = [&](const std::string& from, const std::string& to) {
    const std::string text = text_of(path);
    const auto found = text.find(from);
    REQUIRE(found != std::string::npos);
    std::string changed = text;
    changed.replace(found, from.size(), to);
    std::ofstream(path) << changed;
    const auto error =
        error_of([&] { peft::load(*other, folder.path().string()); });
    std::ofstream(path) << text;
    return error;
  };
  CHECK(contains(
      refused("\"projection_seed\": 0", "\"projection_seed\": 1"),
      "is not the one that the adapter was trained with (fingerprint "));
  CHECK(contains(
      refused("\"projection_fingerprint\"", "\"another\""),
      "has no \"projection_fingerprint\""));
  CHECK(contains(
      refused("\"projection\": \"fastfood\"", "\"projection\": \"slow\""),
      "the projection is 'fastfood' or 'dense', got 'slow'"));
  // Another network: a layer of another size in the place of the second.
  torch::nn::Sequential third(torch::nn::Linear(3, 5), torch::nn::Linear(5, 4));
  CHECK(error_of([&] { peft::load(*third, folder.path().string()); }) != "");
  CHECK(same_state(before, state_of(*other)));
  CHECK(peft::load(*other, folder.path().string()).num_parameters() == 6);
}

TEST_CASE("What is moved: layers, parameters, everything", "[intrinsic]") {
  using peft::IntrinsicOptions;
  using peft::Targets;
  const auto names = [](const IntrinsicOptions& options) {
    seed();
    const auto bert = std::make_shared<networks::Bert>();
    const auto adapter = peft::attach(*bert, options);
    std::vector<std::string> result;
    for (const auto& site : adapter.sites()) {
      result.push_back(site.name);
    }
    return result;
  };
  const auto count = [](const std::vector<std::string>& all,
                        const std::string& part) {
    return std::count_if(all.begin(), all.end(), [&](const auto& name) {
      return contains(name, part);
    });
  };
  // Six linear layers in each of two, and the pooler.
  const auto linear = names(IntrinsicOptions(9));
  CHECK(linear.size() == 13);
  CHECK(count(linear, "mbedding") == 0);
  CHECK(names(IntrinsicOptions(9).exclude({"pooler.dense"})).size() == 12);
  CHECK(
      names(IntrinsicOptions(9).targets({"query", "value.bias"})).size() == 4);
  CHECK(names(IntrinsicOptions(9).targets({"LayerNorm.weight"})).size() == 5);
  CHECK(
      names(IntrinsicOptions(9).modules_to_save({"pooler"})).size() == 12 + 2);
  seed();
  const auto all =
      std::make_shared<networks::Bert>()->named_parameters().size();
  CHECK(names(IntrinsicOptions(9).all_parameters(true)).size() == all);
  CHECK(
      names(IntrinsicOptions(9).all_parameters(true).exclude(
                Targets::regex(".*bias")))
          .size() == linear.size() + 5 + 3);
}

TEST_CASE("Every parameter of a network moves and merges", "[intrinsic]") {
  for (const std::string name :
       {"bert", "gpt2_mlp", "attention", "conv2d_groups", "tied", "tokens"}) {
    INFO(name);
    seed();
    auto network = networks::build(name);
    network.module->to(torch::kDouble);
    std::vector<Tensor> inputs{torch::randint(0, 9, {2, 5}, torch::kLong)};
    if (name == "bert") {
      inputs.push_back(torch::ones({2, 5}, torch::kLong));
    } else if (name == "gpt2_mlp") {
      inputs = {torch::randn({2, 5, 6}, torch::kDouble)};
    } else if (name == "attention") {
      inputs = {torch::randn({3, 2, 8}, torch::kDouble)};
    } else if (name == "conv2d_groups") {
      inputs = {torch::randn({2, 4, 6, 6}, torch::kDouble)};
    }
    const auto base = network.run(inputs).detach();
    auto adapter = peft::attach(
        *network.module,
        peft::IntrinsicOptions(40).all_parameters(true).said(true));
    CHECK(equal_bits(network.run(inputs).detach(), base));
    {
      torch::NoGradGuard no_grad;
      adapter.parameters()[0].normal_(0, 0.3);
    }
    const auto y = network.run(inputs);
    CHECK_FALSE(torch::allclose(y, base, 1e-3, 1e-3));
    // By hand: every parameter in the base's place.
    std::vector<Tensor> effective;
    for (const auto& item : peft::detail::base_parameters(*network.module)) {
      effective.push_back(peft::effective(item.second).detach().clone());
    }
    y.square().mean().backward();
    const auto lambda = adapter.parameters()[1].grad();
    CHECK((lambda != 0).sum().item<int64_t>() > lambda.numel() / 2);
    peft::merge(*network.module);
    size_t i = 0;
    for (const auto& item : peft::detail::base_parameters(*network.module)) {
      CHECK(close(item.second, effective[i++]));
    }
    CHECK(close(network.run(inputs), y));
  }
}

TEST_CASE("A tied weight is moved once", "[intrinsic]") {
  seed();
  networks::Words words("emb", "out", /*tied=*/true);
  auto adapter = peft::attach(
      words, peft::IntrinsicOptions(6).said(true).all_parameters(true));
  CHECK(adapter.sites().size() == 1);
  CHECK(adapter.sites()[0].parameters.size() == 2);
  CHECK(adapter.named_parameters()["intrinsic_lambda"].numel() == 1);
  randomise(adapter);
  CHECK(torch::equal(
      peft::effective(words.emb->weight), peft::effective(words.out->weight)));
  const TemporaryDirectory folder;
  peft::save(adapter, folder.path().string());
  networks::Words again("emb", "out", /*tied=*/true);
  {
    torch::NoGradGuard no_grad;
    again.emb->weight.copy_(peft::base(words.emb->weight));
  }
  peft::load(again, folder.path().string());
  const auto ids = torch::arange(11);
  CHECK(equal_bits(again.forward(ids), words.forward(ids)));
}

TEST_CASE("Strided and half-precision weights", "[intrinsic]") {
  seed();
  const auto x = torch::randn({4, 6});
  torch::nn::Linear plain(6, 10), strided(6, 10), half(6, 10);
  {
    torch::NoGradGuard no_grad;
    strided->weight.set_data(plain->weight.t().contiguous().t());
    strided->bias.copy_(plain->bias);
    half->weight.copy_(plain->weight);
    half->bias.copy_(plain->bias);
  }
  half->to(torch::kBFloat16);
  REQUIRE_FALSE(strided->weight.is_contiguous());
  std::vector<Tensor> results;
  for (auto* layer : {&plain, &strided, &half}) {
    const auto adapter = peft::attach(**layer, peft::IntrinsicOptions(8));
    CHECK(adapter.parameters()[0].scalar_type() == torch::kFloat);
    randomise(adapter);
    const bool is_half = layer == &half;
    const auto y = (*layer)->forward(is_half ? x.to(torch::kBFloat16) : x);
    CHECK(y.scalar_type() == (is_half ? torch::kBFloat16 : torch::kFloat));
    y.sum().backward();
    results.push_back(y.detach());
    results.push_back(adapter.parameters()[0].grad());
    auto handle = adapter;
    handle.set_trainable(false);
    handle.merge();
    CHECK(close((*layer)->forward(is_half ? x.to(torch::kBFloat16) : x), y));
  }
  CHECK(close(results[2], results[0]));
  CHECK(close(results[3], results[1], 1e-4, 1e-5));
  CHECK(close(results[4], results[0], 3e-2, 3e-2));
}

TEST_CASE("What P holds in memory", "[intrinsic]") {
  seed();
  Two model; // 15 and 10 numbers
  const auto adapter = peft::attach(*model, peft::IntrinsicOptions(12));
  const auto& P = delta_at(adapter, 0)->projections();
  // 8 n + 4 d a tensor, n = 16 for both.
  accounting::Memory memory;
  P.at(0);
  CHECK(memory.held() == 2 * (8 * 16 + 4 * 12));
  CHECK(P.bytes() == 2 * (8 * 16 + 4 * 12));
  P.at(1); // all are drawn at once, and once
  CHECK(memory.held() == P.bytes());
}

TEST_CASE("Counting does not draw", "[intrinsic]") {
  torch::nn::Linear layer(2000, 2000); // P would take 33 MB
  const accounting::Memory memory;
  const auto adapter = peft::attach(*layer, peft::IntrinsicOptions(100));
  CHECK(adapter.num_parameters() == 100);
  CHECK(memory.peak() < 10000);
}

TEST_CASE("Options that make no sense", "[intrinsic]") {
  using peft::IntrinsicOptions;
  seed();
  Two model;
  const auto before = state_of(*model);
  const auto refused = [&](const IntrinsicOptions& options) {
    const auto error = error_of([&] { peft::attach(*model, options); });
    CHECK(same_state(before, state_of(*model)));
    return error;
  };
  CHECK(contains(
      refused(IntrinsicOptions(0)),
      "d, the intrinsic dimension, must be positive, got 0"));
  CHECK(contains(
      refused(IntrinsicOptions(2).said(true)),
      "each of the 2 adapted tensors takes a scale, and d = 2 leaves no "
      "dimension to move in; take d > 2"));
  CHECK(contains(
      refused(IntrinsicOptions(26)),
      "d = 26 is more than the 25 weights that it would move"));
  CHECK(contains(
      refused(IntrinsicOptions(4).projection("sparse")),
      "the projection is 'fastfood' or 'dense', got 'sparse'"));
  CHECK(contains(
      refused(IntrinsicOptions(4).seed(-1)),
      "the seed of a projection must not be negative, got -1"));
  CHECK(contains(
      refused(IntrinsicOptions(4).all_parameters(true).targets({"first"})),
      "all_parameters names every parameter, and targets some"));
  CHECK(contains(
      refused(IntrinsicOptions(4).targets({"frist"})),
      "targets entry 'frist' matches nothing in this network. Did you mean "
      "'first'"));
  CHECK(contains(
      refused(IntrinsicOptions(4).exclude({"third"})),
      "exclude entry 'third' matches nothing"));
  CHECK(contains(
      refused(IntrinsicOptions(4).targets(peft::Targets::regex("none"))),
      "match nothing that an intrinsic dimension can move."));
  torch::nn::Sequential norm(
      torch::nn::LayerNorm(torch::nn::LayerNormOptions({4})));
  CHECK(contains(
      error_of([&] { peft::attach(*norm, IntrinsicOptions(1)); }),
      "by default (linear layers); set targets(...) or all_parameters(true)."));
  CHECK(contains(
      error_of(
          [&] { peft::attach(*norm, IntrinsicOptions(1).targets({"0"})); }),
      "without a weight matrix of its own"));
  torch::nn::Embedding renormed(
      torch::nn::EmbeddingOptions(5, 4).max_norm(1.0));
  CHECK(contains(
      error_of([&] {
        peft::attach(*renormed, IntrinsicOptions(1).all_parameters(true));
      }),
      "'weight' cannot be adapted: it has max_norm"));
  torch::nn::Linear wide(1 << 16, 1 << 8);
  CHECK(contains(
      error_of([&] {
        peft::attach(*wide, IntrinsicOptions(1000).projection("dense"));
      }),
      "is too big to be drawn; take projection('fastfood')"));
}

TEST_CASE("An intrinsic dimension times a number, not a gate", "[intrinsic]") {
  seed();
  Two model;
  const auto x = torch::randn({4, 3});
  auto plain = peft::attach(*model, peft::IntrinsicOptions(6));
  randomise(plain);
  plain.set_scale(0.5);
  const auto half = model->forward(x).detach();
  plain.detach();
  auto scaled =
      peft::attach(*model, peft::Scaled(peft::IntrinsicOptions(6), 0.5));
  randomise(scaled);
  CHECK(close(model->forward(x), half));
  scaled.detach();
  // One parameter for the whole adapter, where the number is learned.
  auto learned = peft::attach(
      *model,
      peft::Scaled(
          peft::IntrinsicOptions(6), peft::ScaleOptions(0.5).learned(true)));
  CHECK(learned.num_parameters() == 7);
  for (auto& item : learned.named_parameters()) {
    if (item.key() == "intrinsic_vector") {
      torch::NoGradGuard no_grad;
      torch::manual_seed(7);
      item.value().normal_(0, 0.3);
    }
  }
  CHECK(close(model->forward(x), half));
  torch::NoGradGuard no_grad;
  for (int call = 0; call < 3; ++call) { // a kept weight would be seen
    CHECK(close(model->forward(x), half));
  }
  for (auto& p : learned.parameters()) {
    p.zero_();
  }
  CHECK_FALSE(torch::allclose(model->forward(x), half, 1e-3, 1e-3));
  learned.detach();
  CHECK(contains(
      error_of([&] {
        peft::attach(*model, peft::Gated(peft::IntrinsicOptions(6)));
      }),
      "gates on a site without input: 'first' carries 'intrinsic d=6'"));
  CHECK(peft::adapters(*model).empty());
}

} // namespace test_intrinsic
