/// LoKr runs as two small products; its files and numbers are held against PEFT
/// in test_golden_tuners.cpp.

#include "accounting.h"
#include "model_state.h"
#include "test.h"

#include <peft/models/gpt2.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace test_lokr {

using torch::Tensor;
namespace nn = torch::nn;

namespace {

/// The factors of the adapter's only site, by their names in a file.
Tensor factor(const peft::Adapter& adapter, const std::string& name) {
  for (const auto& item :
       adapter.shared_state()->sites.at(0).delta->file_tensors()) {
    if (item.first == name) {
      return item.second;
    }
  }
  return {};
}

/// ΔW = s · w1 ⊗ w2.
Tensor change(const peft::Adapter& adapter, double s) {
  const auto product = [&](const std::string& name) {
    const Tensor whole = factor(adapter, name);
    return whole.defined()
        ? whole
        : at::mm(factor(adapter, name + "_a"), factor(adapter, name + "_b"));
  };
  return s * at::kron(product("lokr_w1"), product("lokr_w2"));
}

} // namespace

TEST_CASE("LoKr's two small products are those of W', with gradients") {
  for (const bool by_factors : {false, true}) {
    for (const bool turned : {false, true}) {
      for (const double scale : {1.0, -0.4}) {
        INFO(by_factors << turned << scale);
        seed(2);
        std::shared_ptr<nn::Module> layer;
        std::function<Tensor(const Tensor&)> run;
        if (turned) { // the weight lies as [in, out]
          peft::models::Conv1D own(12, 20);
          layer = own.ptr();
          run = [own](const Tensor& x) mutable { return own->forward(x); };
        } else {
          nn::Linear own(12, 20);
          layer = own.ptr();
          run = [own](const Tensor& x) mutable { return own->forward(x); };
        }
        layer->to(torch::kDouble);
        const Tensor W = layer->named_parameters()["weight"].detach().clone();
        const Tensor b = layer->named_parameters()["bias"].detach().clone();
        auto adapter = peft::attach(
            *layer,
            peft::LoKrOptions(1)
                .alpha(3)
                .decompose_both(by_factors)
                .targets(""));
        randomise(adapter);
        adapter.set_scale(scale);
        const Tensor x = torch::randn({2, 5, 12}, torch::kDouble);
        const Tensor x1 = x.clone().set_requires_grad(true);
        const Tensor x2 = x.clone().set_requires_grad(true);
        const Tensor dy = torch::randn({2, 5, 20}, torch::kDouble);
        const Tensor y = run(x1);
        (y * dy).sum().backward();
        std::vector<Tensor> gradients;
        for (const auto& p : adapter.parameters()) {
          gradients.push_back(p.grad().clone());
          p.mutable_grad().reset();
        }
        const Tensor matrix = (turned ? W.t() : W) + change(adapter, 3 * scale);
        const Tensor expected = at::linear(x2, matrix, b);
        (expected * dy).sum().backward();
        CHECK(close(y, expected, 1e-12, 1e-12));
        CHECK(close(x1.grad(), x2.grad(), 1e-12, 1e-12));
        size_t i = 0;
        for (const auto& p : adapter.parameters()) {
          CHECK(close(gradients[i++], p.grad(), 1e-12, 1e-12));
        }
      }
    }
  }
}

TEST_CASE("LoKr on some rows of a weight, and beside another adapter") {
  seed(3);
  nn::Linear linear(12, 20);
  linear->to(torch::kDouble);
  auto below = peft::attach(
      *linear, peft::LoraOptions(2).init("random").targets(""), "below");
  auto adapter =
      peft::attach(*linear, peft::LoKrOptions(1).targets(""), "lokr");
  randomise(adapter);
  const torch::NoGradGuard no_grad;
  const Tensor x = torch::randn({3, 12}, torch::kDouble);
  const Tensor value = peft::effective(linear->weight).clone();
  CHECK(close(linear->forward(x), at::linear(x, value, linear->bias)));
  CHECK(close(
      at::linear(x, linear->weight.slice(0, 3, 17)),
      at::linear(x, value.slice(0, 3, 17)),
      1e-12,
      1e-12));
}

TEST_CASE("A training step of LoKr makes no matrix of the weight's size") {
  seed(4);
  nn::Linear linear(512, 512);
  auto adapter = peft::attach(*linear, peft::LoKrOptions(8).targets(""));
  randomise(adapter);
  const Tensor x = torch::randn({4, 512});
  const auto step = [&] { linear->forward(x).sum().backward(); };
  step();
  CHECK(
      accounting::at_least(
          accounting::sizes_of(step),
          static_cast<int64_t>(linear->weight.nbytes())) == 0);
  // What a dropout draws are rows of the product: it is built.
  linear->train();
  adapter.detach();
  adapter =
      peft::attach(*linear, peft::LoKrOptions(8).rank_dropout(0.5).targets(""));
  randomise(adapter);
  CHECK(
      accounting::at_least(
          accounting::sizes_of(step),
          static_cast<int64_t>(linear->weight.nbytes())) > 0);
}

} // namespace test_lokr
