// DoRA: the formula against its definition, its gradients against finite
// differences, and what it is at a weight of a network.

#include "gradcheck.h"
#include "model_state.h"
#include "test.h"

#include <peft/models/gpt2.h>

#include <ATen/functorch/BatchedTensorImpl.h>
#include <ATen/functorch/DynamicLayer.h>
#include <ATen/functorch/PlumbingHelper.h>
#include <nlohmann/json.hpp>
#include <torch/csrc/autograd/forward_grad.h>

#include <cmath>
#include <fstream>
#include <functional>
#include <optional>
#include <thread>
#include <vector>

namespace test_dora {

using torch::Tensor;

namespace {

namespace F = peft::functional;

const auto kExact = torch::TensorOptions(torch::kDouble);

/// Both ways: by the CPU kernels and by torch operators.
struct WithKernels {
  explicit WithKernels(bool on) {
    F::detail::kernels_chosen = on;
  }
  ~WithKernels() {
    F::detail::kernels_chosen.reset();
  }
};

/// W' by the definition, rows being outputs.
Tensor defined_weight(
    const Tensor& W,
    const Tensor& A,
    const Tensor& B,
    const Tensor& m,
    double s) {
  const Tensor V = W + s * torch::mm(B, A);
  const Tensor norm = V.detach().square().sum(1).sqrt();
  return V * (m / norm).unsqueeze(1);
}

/// x, W, b, A, B and m of a linear map, all of which require grad.
struct Linear {
  explicit Linear(std::vector<int64_t> rows = {4}, int64_t r = 2) {
    seed(3);
    rows.push_back(5);
    x = torch::randn(rows, kExact).requires_grad_();
    W = torch::randn({6, 5}, kExact).requires_grad_();
    b = torch::randn({6}, kExact).requires_grad_();
    A = torch::randn({r, 5}, kExact).requires_grad_();
    B = torch::randn({6, r}, kExact).requires_grad_();
    m = torch::randn({6}, kExact).requires_grad_();
  }
  Tensor norm() const {
    const torch::NoGradGuard no_grad;
    return F::dora_norm(W, F::row_squares(W, W.scalar_type()), A, B, s);
  }
  Tensor x, W, b, A, B, m;
  double s = 0.7;
};

/// Two Linears of torch::nn between which nothing is linear.
struct TwoLayers : torch::nn::Cloneable<TwoLayers> {
  TwoLayers() {
    reset();
  }
  void reset() override {
    first = register_module("first", torch::nn::Linear(7, 9));
    second = register_module("second", torch::nn::Linear(9, 3));
  }
  Tensor forward(const Tensor& x) {
    return second(torch::tanh(first(x)));
  }
  torch::nn::Linear first{nullptr}, second{nullptr};
};

peft::LoraOptions dora(int64_t r, std::vector<std::string> targets) {
  return peft::LoraOptions(r)
      .alpha(2 * static_cast<double>(r))
      .dora(true)
      .targets(peft::Targets(std::move(targets)));
}

/// A, B and m of the only site.
struct Parts {
  explicit Parts(const peft::Adapter& adapter) {
    for (const auto& item : adapter.named_parameters()) {
      (contains(item.key(), "magnitude") ? m
           : contains(item.key(), "lora_A") ||
               contains(item.key(), "embedding_A")
           ? A
           : B) = item.value();
    }
  }
  Tensor A, B, m;
};

/// Every module of a kind that DoRA has a way of its own for, with an input and
/// what its layer computes from a given weight.
struct Kind {
  std::string name;
  std::shared_ptr<torch::nn::Module> module;
  Tensor x;
  std::function<Tensor(const Tensor&)> run;
  /// The weight with outputs first, as a matrix, and back.
  std::function<Tensor(const Tensor&)> rows;
};

std::vector<Kind> kinds(torch::ScalarType dtype = torch::kDouble) {
  seed(5);
  std::vector<Kind> result;
  const auto add = [&](const std::string& name,
                       auto layer,
                       Tensor x,
                       std::function<Tensor(const Tensor&)> rows) {
    layer->to(dtype);
    x = x.is_floating_point() ? x.to(dtype) : x;
    result.push_back(
        {name,
         layer.ptr(),
         x,
         [layer](const Tensor& v) mutable { return layer->forward(v); },
         std::move(rows)});
  };
  const auto same = [](const Tensor& w) { return w; };
  const auto turned = [](const Tensor& w) { return w.t(); };
  const auto flat = [](const Tensor& w) { return w.flatten(1); };
  namespace nn = torch::nn;
  add("Linear", nn::Linear(5, 4), torch::randn({3, 5}), same);
  add("Linear, 3-D", nn::Linear(5, 4), torch::randn({2, 3, 5}), same);
  add("Linear without bias",
      nn::Linear(nn::LinearOptions(5, 4).bias(false)),
      torch::randn({3, 5}),
      same);
  add("Conv1D", peft::models::Conv1D(5, 4), torch::randn({3, 5}), turned);
  add("Embedding",
      nn::Embedding(6, 4),
      torch::tensor({{0, 3, 3}, {5, 1, 0}}),
      turned);
  add("Conv1d",
      nn::Conv1d(nn::Conv1dOptions(3, 4, 2).stride(2).padding(1)),
      torch::randn({2, 3, 6}),
      flat);
  add("Conv2d",
      nn::Conv2d(
          nn::Conv2dOptions(3, 4, {3, 2}).padding({1, 0}).dilation({2, 1})),
      torch::randn({2, 3, 5, 5}),
      flat);
  add("Conv2d without a batch",
      nn::Conv2d(nn::Conv2dOptions(3, 4, 3).bias(false)),
      torch::randn({3, 5, 5}),
      flat);
  add("Conv2d, circular",
      nn::Conv2d(
          nn::Conv2dOptions(3, 4, 3).padding(1).padding_mode(torch::kCircular)),
      torch::randn({2, 3, 4, 4}),
      flat);
  add("Conv3d",
      nn::Conv3d(nn::Conv3dOptions(2, 3, 2)),
      torch::randn({2, 2, 3, 3, 3}),
      flat);
  return result;
}

peft::Adapter attach(
    const Kind& kind,
    peft::LoraOptions options,
    const std::string& name = "default") {
  return peft::attach(
      *kind.module,
      options.targets(peft::Targets::where(
          [](const std::string& module, const torch::nn::Module&) {
            return module.empty();
          })),
      name);
}

Tensor weight_of(const Kind& kind) {
  return kind.module->named_parameters()["weight"];
}

} // namespace

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ the formulas
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

TEST_CASE("DoRA's norm is that of W + s B A", "[dora]") {
  for (const int64_t r : {1, 2, 5}) {
    const Linear l({4}, r);
    const Tensor V = l.W + l.s * torch::mm(l.B, l.A);
    CHECK(close(l.norm(), V.norm(2, 1), 1e-12, 0));
    CHECK_FALSE(l.norm().requires_grad());
  }
  // float32, with widths that the kernels take.
  seed(1);
  const Tensor W = torch::randn({96, 200}), A = torch::randn({8, 200}) / 14,
               B = torch::randn({96, 8});
  const Tensor exact =
      (W.to(torch::kDouble) +
       2 * torch::mm(B.to(torch::kDouble), A.to(torch::kDouble)))
          .norm(2, 1);
  for (const bool kernels : {true, false}) {
    const WithKernels way(kernels);
    for (const auto& w : {W, W.t().contiguous().t()}) {
      const Tensor norm =
          F::dora_norm(w, F::row_squares(w, torch::kFloat), A, B, 2);
      CHECK(close(norm, exact, 5e-7, 0));
    }
  }
}

TEST_CASE("A small weight that nearly cancels keeps its norm", "[dora]") {
  torch::manual_seed(0);
  const Tensor A = torch::randn({6, 2}), B = torch::randn({6, 6});
  const Tensor W = 0.01 * torch::randn({6, 2}) - 2 * B.mm(A);
  const Tensor exact =
      (W.to(torch::kDouble) + 2 * B.to(torch::kDouble).mm(A.to(torch::kDouble)))
          .norm(2, 1);
  const Tensor norm =
      F::dora_norm(W, F::row_squares(W, torch::kFloat), A, B, 2);
  CHECK(torch::allclose(norm.to(torch::kDouble), exact, 1e-3, 0));
}

TEST_CASE("A row of zeros stays a row of zeros", "[dora]") {
  Linear l;
  {
    const torch::NoGradGuard no_grad;
    l.W[2].zero_();
    l.B[2].zero_();
    l.m.copy_(l.norm());
  }
  const Tensor y = F::dora_linear(l.x, l.W, l.b, l.A, l.B, l.m, l.norm(), l.s);
  CHECK(torch::isfinite(y).all().item<bool>());
  CHECK(close(y.select(1, 2), l.b[2].expand({4}), 0, 1e-12));
  y.sum().backward();
  for (const auto& t : {l.x, l.A, l.B, l.m}) {
    CHECK(torch::isfinite(t.grad()).all().item<bool>());
  }
}

TEST_CASE("DoRA's linear map is x W'ᵀ + b", "[dora]") {
  for (const auto& rows :
       {std::vector<int64_t>{4}, {2, 3}, {0}, {2, 0, 3}, {}}) {
    const Linear l(rows);
    const Tensor W = defined_weight(l.W, l.A, l.B, l.m, l.s);
    for (const auto& b :
         {std::optional<Tensor>(l.b), std::optional<Tensor>()}) {
      const auto run = [&] {
        return F::dora_linear(l.x, l.W, b, l.A, l.B, l.m, l.norm(), l.s);
      };
      const Tensor expected = torch::linear(l.x, W, b);
      CHECK(close(run(), expected, 1e-12, 1e-12));
      {
        const torch::NoGradGuard no_grad;
        CHECK(close(run(), expected, 1e-12, 1e-12));
      }
      {
        const torch::InferenceMode mode;
        CHECK(close(run(), expected, 1e-12, 1e-12));
      }
    }
  }
}

TEST_CASE("DoRA's gradients are those of finite differences", "[dora]") {
  for (const auto& rows : {std::vector<int64_t>{4}, {2, 3}}) {
    for (const bool with_bias : {true, false}) {
      const Linear l(rows);
      const Tensor norm = l.norm(); // held
      const gradcheck::Function f = [&](const gradcheck::Tensors& in) {
        return F::dora_linear(
            in[0],
            in[1],
            with_bias ? std::optional<Tensor>(in[5]) : std::nullopt,
            in[2],
            in[3],
            in[4],
            norm,
            l.s);
      };
      gradcheck::Tensors inputs{l.x, l.W, l.A, l.B, l.m};
      if (with_bias) {
        inputs.push_back(l.b);
      }
      auto sizes = l.x.sizes().vec();
      sizes.back() = 6;
      const Tensor direction = torch::randn(sizes, kExact);
      CHECK(gradcheck::first_order(f, inputs, direction));
      CHECK(gradcheck::second_order(f, inputs, direction));
    }
  }
}

TEST_CASE("Each gradient alone is the one among all", "[dora]") {
  const Linear l({2, 3});
  const Tensor norm = l.norm(), direction = torch::randn({2, 3, 6}, kExact);
  const std::vector<Tensor> all{l.x, l.W, l.A, l.B, l.m, l.b};
  const auto run = [&](const std::vector<Tensor>& t) {
    return F::dora_linear(t[0], t[1], t[5], t[2], t[3], t[4], norm, l.s);
  };
  const auto expected =
      torch::autograd::grad({(run(all) * direction).sum()}, all);
  for (size_t i = 0; i < all.size(); ++i) {
    std::vector<Tensor> one;
    for (size_t j = 0; j < all.size(); ++j) {
      one.push_back(all[j].detach().requires_grad_(i == j));
    }
    const auto found =
        torch::autograd::grad({(run(one) * direction).sum()}, {one[i]});
    INFO(i);
    CHECK(close(found[0], expected[i], 1e-13, 1e-13));
  }
}

TEST_CASE("Fused and composed are the same", "[dora]") {
  seed(9);
  // float32 with tails, so that the loop over columns sees both its parts.
  for (const auto& [n, kernels] : std::vector<std::pair<int64_t, bool>>{
           {1, true}, {3, false}, {130, true}, {130, false}}) {
    const WithKernels way(kernels);
    const Tensor x = torch::randn({n, 40}).requires_grad_();
    const Tensor W = torch::randn({37, 40}) / 6, b = torch::randn({37});
    const Tensor A = (torch::randn({3, 40}) / 6).requires_grad_();
    const Tensor B = torch::randn({37, 3}).requires_grad_();
    const Tensor m = torch::rand({37}).add_(0.5).requires_grad_();
    const Tensor norm =
        F::dora_norm(W, F::row_squares(W, torch::kFloat), A, B, 2);
    const Tensor dy = torch::randn({n, 37});
    const std::vector<Tensor> leaves{x, A, B, m};
    const Tensor fused = F::dora_linear(x, W, b, A, B, m, norm, 2);
    const Tensor composed = F::dora_composed(
        x,
        b,
        m / norm,
        0.0,
        [&](const Tensor& v, bool with_bias) {
          return torch::linear(
              v, W, with_bias ? std::optional<Tensor>(b) : std::nullopt);
        },
        [&](const Tensor& v) {
          return torch::linear(torch::linear(v, A), B) * 2;
        });
    const auto scale = [](const Tensor& t) {
      return t.abs().max().item<double>();
    };
    CHECK(close(fused, composed, 0, 1e-6 * scale(composed)));
    const auto ours = torch::autograd::grad({fused}, leaves, {dy});
    const auto theirs = torch::autograd::grad({composed}, leaves, {dy});
    for (size_t i = 0; i < leaves.size(); ++i) {
      INFO(n << " rows, leaf " << i);
      CHECK(close(ours[i], theirs[i], 0, 2e-6 * scale(theirs[i])));
    }
    // A dy that is not dense: what sum() hands back.
    const auto summed = torch::autograd::grad(
        {F::dora_linear(x, W, b, A, B, m, norm, 2).sum()}, leaves);
    const auto ones = torch::autograd::grad(
        {F::dora_linear(x, W, b, A, B, m, norm, 2)},
        leaves,
        {torch::ones({n, 37})});
    for (size_t i = 0; i < leaves.size(); ++i) {
      CHECK(close(summed[i], ones[i], 0, 2e-6 * scale(ones[i])));
    }
  }
}

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ at a weight
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

TEST_CASE("DoRA starts as the base and is what it says", "[dora]") {
  for (auto& kind : kinds()) {
    INFO(kind.name);
    const auto before = state_of(*kind.module);
    const Tensor base = kind.run(kind.x).detach();
    auto adapter = attach(kind, peft::LoraOptions(2).alpha(3).dora(true));
    const Parts parts(adapter);
    CHECK(close(kind.run(kind.x), base, 1e-12, 1e-12));
    const Tensor W = peft::base(weight_of(kind)).detach();
    const Tensor rows = kind.rows(W);
    CHECK(close(parts.m.flatten(), rows.norm(2, 1), 1e-12, 0));
    CHECK(
        adapter.num_parameters() ==
        2 * (rows.size(0) + rows.size(1)) + rows.size(0));

    randomise(adapter);
    const Tensor expected = defined_weight(
        rows, parts.A.flatten(1), parts.B.flatten(1), parts.m.flatten(), 1.5);
    const Tensor effective = peft::effective(weight_of(kind));
    CHECK(close(kind.rows(effective), expected, 1e-11, 1e-12));
    CHECK(close(
        kind.rows(effective).norm(2, 1), parts.m.flatten().abs(), 1e-11, 0));

    // The layer with W' in the place of W gives the same, with its gradients.
    const Tensor y = kind.run(kind.x);
    CHECK_FALSE(close(y, base, 1e-3, 1e-3));
    const Tensor dy = torch::randn_like(y);
    const auto ours =
        torch::autograd::grad({y}, {parts.A, parts.B, parts.m}, {dy});
    const Tensor leaf = effective.detach().requires_grad_();
    const auto theirs = [&] {
      adapter.disable();
      const torch::NoGradGuard no_grad;
      Tensor w = weight_of(kind);
      const Tensor kept = w.clone();
      w.copy_(leaf);
      torch::AutoGradMode on(true);
      w.set_requires_grad(true);
      const Tensor plain = kind.run(kind.x);
      CHECK(close(y, plain, 1e-11, 1e-12));
      const Tensor dW = torch::autograd::grad({plain}, {w}, {dy})[0];
      w.set_requires_grad(false);
      w.copy_(kept);
      adapter.enable();
      return torch::autograd::grad(
          {peft::effective(w)}, {parts.A, parts.B, parts.m}, {dW});
    }();
    for (size_t i = 0; i < 3; ++i) {
      INFO(i);
      CHECK(close(ours[i], theirs[i], 1e-10, 1e-11));
    }
    adapter.detach();
    CHECK(same_state(before, state_of(*kind.module)));
  }
}

TEST_CASE("DoRA merges, and unmerges to the bit", "[dora]") {
  for (const auto dtype : {torch::kDouble, torch::kFloat, torch::kBFloat16}) {
    for (auto& kind : kinds(dtype)) {
      INFO(kind.name << " " << dtype);
      const Tensor before = weight_of(kind).detach().clone();
      auto adapter = attach(kind, peft::LoraOptions(2).dora(true));
      randomise(adapter);
      const Tensor y = kind.run(kind.x).detach();
      CHECK(y.scalar_type() == dtype);
      const Tensor effective = peft::effective(weight_of(kind)).detach();
      // What is merged is summed in float64 (test_merge_precision): within a
      // rounding of what a forward sums.
      const double unit = dtype == torch::kDouble ? 0
          : dtype == torch::kFloat                ? std::pow(2.0, -23)
                                                  : std::pow(2.0, -8);
      const double largest = effective.abs().max().item<double>();
      adapter.merge();
      const Tensor merged = peft::base(weight_of(kind)).detach().clone();
      CHECK(close(merged, effective, unit, unit * largest));
      const auto t = tolerance(dtype);
      const double size = y.abs().max().item<double>();
      CHECK(close(kind.run(kind.x), y, t.rtol, 4 * t.rtol * size));
      adapter.unmerge();
      CHECK(equal_bits(peft::base(weight_of(kind)).detach(), before));
      CHECK(equal_bits(kind.run(kind.x).detach(), y));
      peft::merge(*kind.module);
      CHECK(equal_bits(weight_of(kind).detach(), merged));
    }
  }
}

TEST_CASE("In evaluation the norm follows W, A, B and m", "[dora]") {
  for (auto& kind : kinds()) {
    INFO(kind.name);
    auto adapter = attach(kind, peft::LoraOptions(2).dora(true));
    kind.module->eval();
    randomise(adapter);
    const Parts parts(adapter);
    const auto expected = [&] { // in one pass, nothing kept
      const torch::NoGradGuard no_grad;
      const Tensor value = peft::effective(weight_of(kind)).clone();
      adapter.disable();
      Tensor w = weight_of(kind);
      const Tensor kept = w.clone();
      w.copy_(value);
      const Tensor y = kind.run(kind.x);
      w.copy_(kept);
      adapter.enable();
      return y;
    };
    const torch::NoGradGuard no_grad;
    for (Tensor t : {parts.m, parts.A, parts.B, peft::base(weight_of(kind))}) {
      const Tensor before = kind.run(kind.x);
      CHECK(equal_bits(kind.run(kind.x), before));
      t.add_(torch::randn_like(t), 0.5);
      const Tensor after = kind.run(kind.x);
      CHECK_FALSE(close(after, before, 1e-4, 1e-4));
      CHECK(close(after, expected(), 1e-11, 1e-12));
    }
    adapter.set_scale(0.3);
    CHECK(close(kind.run(kind.x), expected(), 1e-11, 1e-12));
    // New memory behind the same parameter.
    weight_of(kind).set_data(
        torch::randn(weight_of(kind).sizes(), torch::kDouble));
    CHECK(close(kind.run(kind.x), expected(), 1e-11, 1e-12));
  }
}

TEST_CASE("Kept norms pass from inference mode to training", "[dora]") {
  TwoLayers model;
  auto adapter = peft::attach(model, dora(2, {"first", "second"}));
  randomise(adapter);
  const Tensor x = torch::randn({4, 7});
  Tensor y;
  {
    const torch::InferenceMode mode;
    y = model.forward(x);
  }
  const Tensor again = model.forward(x);
  CHECK(close(again, y));
  again.sum().backward();
  for (const auto& p : adapter.parameters()) {
    CHECK(p.grad().defined());
  }
}

TEST_CASE("Threads may share a DoRA network", "[dora]") {
  TwoLayers model;
  auto adapter = peft::attach(model, dora(2, {"first", "second"}));
  randomise(adapter);
  const Tensor x = torch::randn({4, 7});
  const torch::NoGradGuard no_grad;
  const Tensor y = model.forward(x);
  std::vector<int> wrong(4, 0);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < wrong.size(); ++i) {
    threads.emplace_back([&, i] {
      const torch::NoGradGuard own;
      for (int k = 0; k < 50; ++k) {
        wrong[i] += torch::equal(model.forward(x), y) ? 0 : 1;
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  CHECK(wrong == std::vector<int>(4, 0));
}

TEST_CASE("With dropout the base term sees the dropped input", "[dora]") {
  seed(2);
  torch::nn::Linear layer(5, 4);
  layer->to(torch::kDouble);
  auto adapter = peft::attach(
      *layer,
      peft::LoraOptions(2).alpha(3).dropout(0.5).dora(true).targets(
          peft::Targets::all_linear()));
  randomise(adapter);
  const Parts parts(adapter);
  const Tensor x = torch::randn({6, 5}, kExact);
  layer->train();
  seed(8);
  const Tensor y = layer(x);
  seed(8);
  const Tensor dropped = torch::dropout(x, 0.5, true);
  CHECK_FALSE(torch::equal(dropped, x));
  const Tensor W = peft::base(layer->weight).detach();
  const Tensor V = W + 1.5 * torch::mm(parts.B, parts.A);
  const Tensor g = parts.m / V.detach().norm(2, 1);
  const Tensor expected = torch::linear(x, W, layer->bias) +
      (g - 1) * torch::linear(dropped, W) +
      g * 1.5 * torch::linear(torch::linear(dropped, parts.A), parts.B);
  CHECK(close(y, expected, 1e-12, 1e-12));
  const Tensor dy = torch::randn_like(y);
  const std::vector<Tensor> leaves{parts.A, parts.B, parts.m};
  const auto ours = torch::autograd::grad({y}, leaves, {dy});
  const auto theirs = torch::autograd::grad({expected}, leaves, {dy});
  for (size_t i = 0; i < leaves.size(); ++i) {
    CHECK(close(ours[i], theirs[i], 1e-11, 1e-12));
  }
  layer->eval();
  CHECK(close(
      layer(x),
      torch::linear(x, V * g.unsqueeze(1), layer->bias),
      1e-12,
      1e-12));
}

TEST_CASE("DoRA stands on what is below it", "[dora]") {
  for (auto& kind : kinds()) {
    INFO(kind.name);
    auto below = attach(kind, peft::LoraOptions(2), "below");
    randomise(below, 3);
    const Tensor lower = peft::effective(weight_of(kind)).detach();
    const Tensor y = kind.run(kind.x).detach();
    auto adapter = attach(kind, peft::LoraOptions(2).dora(true), "dora");
    // The start is the network as it stood, LoRA included.
    CHECK(close(kind.run(kind.x), y, 1e-11, 1e-12));
    randomise(adapter);
    const Parts parts(adapter);
    const Tensor expected = defined_weight(
        kind.rows(lower),
        parts.A.flatten(1),
        parts.B.flatten(1),
        parts.m.flatten(),
        4);
    CHECK(close(
        kind.rows(peft::effective(weight_of(kind))), expected, 1e-11, 1e-12));
    auto above = attach(kind, peft::LoraOptions(2), "above");
    randomise(above, 4);
    const Tensor all = kind.run(kind.x).detach();
    const std::string error = error_of([&] { adapter.merge(); });
    CHECK(contains(error, "do not commute"));
    below.merge();
    CHECK(close(kind.run(kind.x), all, 1e-10, 1e-11));
    adapter.merge();
    CHECK(close(kind.run(kind.x), all, 1e-10, 1e-11));
    peft::merge(*kind.module);
    CHECK(close(kind.run(kind.x), all, 1e-10, 1e-11));
  }
}

TEST_CASE("DoRA starts on LoRA as well where kernels read memory", "[dora]") {
  const WithKernels way(true);
  torch::nn::Linear layer(64, 48);
  const auto everything = peft::Targets::all_linear();
  auto below =
      peft::attach(*layer, peft::LoraOptions(4).targets(everything), "below");
  randomise(below);
  const Tensor x = torch::randn({5, 64});
  const Tensor y = layer(x).detach();
  auto adapter = peft::attach(
      *layer, peft::LoraOptions(4).dora(true).targets(everything), "dora");
  CHECK(close(layer(x), y, 1e-5, 1e-4));
  below.disable();
  CHECK_FALSE(close(layer(x), y, 1e-2, 1e-2));
}

TEST_CASE("Forward-mode derivatives and vmap see DoRA's formula", "[dora]") {
  for (auto& kind : kinds()) {
    INFO(kind.name);
    auto adapter = attach(kind, peft::LoraOptions(2).dora(true));
    randomise(adapter);
    if (!kind.x.is_floating_point()) {
      continue;
    }
    const Tensor v = torch::randn_like(kind.x);
    const auto difference = [&](double h) {
      return kind.run(kind.x + h * v).detach();
    };
    const Tensor slope = (difference(1e-3) - difference(-1e-3)) / 2e-3;
    const auto level = torch::autograd::ForwardADLevel::get_next_idx();
    const Tensor y =
        kind.run(at::_make_dual(kind.x, v, static_cast<int64_t>(level)));
    const Tensor tangent =
        std::get<1>(at::_unpack_dual(y, static_cast<int64_t>(level)));
    CHECK(close(tangent, slope, 1e-9, 1e-9));
    torch::autograd::ForwardADLevel::release_idx(level);

    const Tensor several = torch::stack({kind.x, v, kind.x + v});
    const Tensor expected = torch::stack(
        {kind.run(several[0]), kind.run(several[1]), kind.run(several[2])});
    Tensor found;
    const auto map = at::functorch::initAndPushDynamicLayer(
        at::functorch::TransformType::Vmap,
        c10::SymInt(3),
        at::functorch::RandomnessType::Error);
    const std::string error = error_of([&] {
      const auto [value, dim] = at::functorch::unwrapTensorAtLevel(
          kind.run(at::functorch::makeBatched(several, 0, map)), map);
      found = value.movedim(dim.value(), 0);
    });
    at::functorch::popDynamicLayerAndDeleteMetadata();
    CHECK(error == "");
    CHECK(close(found, expected, 1e-11, 1e-12));
  }
}

TEST_CASE("A sparse embedding keeps its sparse gradient", "[dora]") {
  torch::nn::Embedding dense(6, 4);
  dense->to(torch::kDouble);
  torch::nn::Embedding sparse(torch::nn::EmbeddingOptions(6, 4).sparse(true));
  sparse->to(torch::kDouble);
  {
    const torch::NoGradGuard no_grad;
    sparse->weight.copy_(dense->weight);
  }
  std::vector<Tensor> grads;
  for (auto table : {dense, sparse}) {
    auto adapter = peft::attach(
        *table,
        peft::LoraOptions(2).dora(true).targets(peft::Targets::where(
            [](const std::string&, const torch::nn::Module&) {
              return true;
            })));
    randomise(adapter);
    const Parts parts(adapter);
    table->forward(torch::tensor({1, 4, 1})).square().sum().backward();
    grads.push_back(parts.A.grad());
  }
  CHECK(grads[1].is_sparse());
  CHECK(close(grads[1].to_dense(), grads[0], 1e-12, 1e-12));
}

TEST_CASE("One table for words and outputs takes DoRA in both", "[dora]") {
  seed(4);
  torch::nn::Embedding table(6, 4);
  table->to(torch::kDouble);
  auto adapter = peft::attach(
      *table,
      peft::LoraOptions(2).dora(true).targets(peft::Targets::where(
          [](const std::string&, const torch::nn::Module&) { return true; })));
  randomise(adapter);
  const Tensor value = peft::effective(table->weight).detach();
  const Tensor x = torch::randn({3, 4}, kExact);
  CHECK(close(
      torch::linear(x, table->weight), torch::linear(x, value), 1e-12, 1e-12));
  CHECK(close(
      torch::linear(x, table->weight.slice(0, 1, 3)),
      torch::linear(x, value.slice(0, 1, 3)),
      1e-12,
      1e-12));
}

TEST_CASE("Rows and the transpose of a DoRA weight", "[dora]") {
  seed(4);
  torch::nn::Linear layer(4, 6);
  layer->to(torch::kDouble);
  auto adapter = peft::attach(
      *layer,
      peft::LoraOptions(2).dora(true).targets(peft::Targets::all_linear()));
  randomise(adapter);
  const Tensor W = layer->weight;
  const Tensor value = peft::effective(W).detach();
  const Tensor x = torch::randn({3, 4}, kExact);
  const Tensor z = torch::randn({3, 6}, kExact);
  CHECK(close(
      torch::linear(x, W.slice(0, 2, 5)),
      torch::linear(x, value.slice(0, 2, 5)),
      1e-12,
      1e-12));
  CHECK(close(torch::matmul(z, W), torch::matmul(z, value), 1e-12, 1e-12));
  CHECK(close(
      torch::matmul(z.slice(1, 2, 5), W.slice(0, 2, 5)),
      torch::matmul(z.slice(1, 2, 5), value.slice(0, 2, 5)),
      1e-12,
      1e-12));

  peft::models::Conv1D turned(4, 6);
  turned->to(torch::kDouble);
  auto other = peft::attach(
      *turned,
      peft::LoraOptions(2).dora(true).targets(peft::Targets::all_linear()));
  randomise(other);
  const Tensor own = peft::effective(turned->weight).detach();
  CHECK(close(
      torch::linear(z, turned->weight), torch::linear(z, own), 1e-12, 1e-12));
  CHECK(contains(
      error_of([&] {
        torch::matmul(x.slice(1, 0, 2), turned->weight.slice(0, 0, 2));
      }),
      "DoRA's norm runs over all 4"));
}

TEST_CASE("DoRA under autocast and on a bfloat16 base", "[dora]") {
  TwoLayers model;
  auto adapter = peft::attach(model, dora(2, {"first", "second"}));
  randomise(adapter);
  const Tensor x = torch::randn({4, 7});
  const Tensor y = model.forward(x).detach();
  {
    at::autocast::set_autocast_enabled(at::kCPU, true);
    const Tensor low = model.forward(x);
    at::autocast::set_autocast_enabled(at::kCPU, false);
    at::autocast::clear_cache();
    CHECK(low.scalar_type() == torch::kBFloat16);
    CHECK(close(low, y, 4e-2, 4e-2));
    low.sum().backward();
    for (auto p : adapter.parameters()) {
      CHECK(p.grad().scalar_type() == torch::kFloat);
      CHECK(torch::isfinite(p.grad()).all().item<bool>());
      p.mutable_grad().reset();
    }
  }
  adapter.detach();
  model.to(torch::kBFloat16);
  auto half = peft::attach(model, dora(2, {"first", "second"}));
  for (const auto& p : half.parameters()) {
    CHECK(p.scalar_type() == torch::kFloat);
  }
  const Tensor z = model.forward(x.to(torch::kBFloat16));
  CHECK(z.scalar_type() == torch::kBFloat16);
  z.sum().backward();
  half.disable();
  CHECK(close(model.forward(x.to(torch::kBFloat16)), z));
}

TEST_CASE("DoRA off is the base, a copy is independent", "[dora]") {
  auto model = std::make_shared<TwoLayers>();
  const Tensor x = torch::randn({4, 7});
  const torch::NoGradGuard no_grad;
  const Tensor base = model->forward(x);
  auto adapter = peft::attach(*model, dora(2, {"first"}));
  randomise(adapter);
  const Tensor y = model->forward(x);
  adapter.disable();
  CHECK(equal_bits(model->forward(x), base));
  adapter.enable();
  CHECK(equal_bits(model->forward(x), y));

  const auto copy = peft::clone(*model);
  CHECK(equal_bits(copy->forward(x), y));
  randomise(peft::get_adapter(*copy), 9);
  CHECK_FALSE(torch::equal(copy->forward(x), y));
  CHECK(equal_bits(model->forward(x), y));
  CHECK(contains(peft::summary(*model), "dora r=2"));
}

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ files
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

TEST_CASE("A DoRA adapter comes back from its file", "[dora]") {
  for (auto& kind : kinds(torch::kFloat)) {
    INFO(kind.name);
    auto host = std::make_shared<torch::nn::Sequential>();
    const auto wrap = [&](const std::shared_ptr<torch::nn::Module>& m) {
      auto outer = std::make_shared<torch::nn::Module>("Outer");
      outer->register_module("layer", m);
      return outer;
    };
    const auto outer = wrap(kind.module);
    auto adapter =
        peft::attach(*outer, dora(2, {"layer"}).rslora(true).bias("lora_only"));
    randomise(adapter);
    const Tensor y = kind.run(kind.x).detach();
    const TemporaryDirectory folder;
    peft::save(adapter, folder.path().string());
    const auto file =
        peft::load_safetensors(folder / "adapter_model.safetensors");
    REQUIRE(file.count("base_model.model.layer.lora_magnitude_vector") == 1);
    const Tensor W = peft::base(weight_of(kind));
    const auto m = file.at("base_model.model.layer.lora_magnitude_vector");
    CHECK(m.dim() == (W.dim() == 2 ? 1 : W.dim()));
    std::ifstream stream(folder / "adapter_config.json");
    const auto config = nlohmann::json::parse(stream);
    CHECK(config.at("use_dora").get<bool>());
    CHECK(config.at("fan_in_fan_out").get<bool>() == (kind.name == "Conv1D"));

    adapter.detach();
    auto again = peft::load(*outer, folder.path().string());
    CHECK(equal_bits(kind.run(kind.x).detach(), y));
    again.detach();

    // The magnitude under the names that it has in memory.
    for (const std::string end : {".default.weight", ".weight", ".default"}) {
      auto renamed = file;
      renamed.erase("base_model.model.layer.lora_magnitude_vector");
      renamed.emplace("base_model.model.layer.lora_magnitude_vector" + end, m);
      peft::save_safetensors(renamed, folder / "adapter_model.safetensors");
      auto third = peft::load(*outer, folder.path().string());
      CHECK(equal_bits(kind.run(kind.x).detach(), y));
      third.detach();
    }
    auto lacking = file;
    lacking.erase("base_model.model.layer.lora_magnitude_vector");
    peft::save_safetensors(lacking, folder / "adapter_model.safetensors");
    CHECK(contains(
        error_of([&] { peft::load(*outer, folder.path().string()); }),
        "lora_magnitude_vector"));
  }
}

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ refusals
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

TEST_CASE("What DoRA cannot do is refused, the model untouched", "[dora]") {
  struct Host : torch::nn::Module {
    torch::nn::MultiheadAttention attention{
        register_module("attention", torch::nn::MultiheadAttention(8, 2))};
    torch::nn::Conv2d grouped{register_module(
        "grouped",
        torch::nn::Conv2d(torch::nn::Conv2dOptions(4, 4, 3).groups(2)))};
    torch::nn::Bilinear bilinear{
        register_module("bilinear", torch::nn::Bilinear(2, 3, 4))};
    torch::nn::Linear linear{
        register_module("linear", torch::nn::Linear(3, 3))};
  };
  Host host;
  const auto before = state_of(host);
  const auto refusal = [&](const peft::LoraOptions& options) {
    const auto error = error_of([&] { peft::attach(host, options); });
    CHECK(same_state(before, state_of(host)));
    return error;
  };
  CHECK(contains(refusal(dora(2, {"attention"})), "MultiheadAttention"));
  CHECK(contains(refusal(dora(2, {"out_proj"})), "MultiheadAttention"));
  CHECK(contains(
      refusal(dora(2, {"attention.in_proj_weight"})), "MultiheadAttention"));
  CHECK(contains(refusal(peft::LoraOptions(2).dora(true)), "Attention"));
  CHECK(contains(refusal(dora(2, {"grouped"})), "with groups"));
  CHECK(contains(refusal(dora(2, {"bilinear"})), "bilinear"));
  CHECK(contains(
      refusal(dora(2, {"linear"}).lora_bias(true)), "neither lora_bias"));
  CHECK(contains(
      refusal(dora(2, {"linear"}).enable_lora({true, false, true})),
      "nor enable_lora"));
}

} // namespace test_dora
