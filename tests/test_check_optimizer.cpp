#include "test.h"

namespace test_check_optimizer {

TEST_CASE("weight decay on a base that trains under an adapter") {
  torch::nn::Linear linear(4, 3);
  auto adapter = peft::attach(*linear, peft::LoraOptions(2).targets({""}));
  auto sgd = [&](double decay) {
    return torch::optim::SGD(
        linear->parameters(),
        torch::optim::SGDOptions(0.1).weight_decay(decay));
  };
  auto frozen = sgd(0.1);
  CHECK_NOTHROW(peft::check_optimizer(frozen)); // a frozen base never decays

  linear->weight.set_requires_grad(true);
  auto decaying = sgd(0.1), plain = sgd(0.0);
  const auto error = error_of([&] { peft::check_optimizer(decaying); });
  CHECK(error.find("weight_decay") != std::string::npos);
  CHECK(error.find("[3, 4]") != std::string::npos);
  CHECK_NOTHROW(peft::check_optimizer(plain));

  // AdamW multiplies the base itself: what is left is decayed W, not W + ΔW.
  torch::optim::AdamW adamw(
      linear->parameters(), torch::optim::AdamWOptions(0.1).weight_decay(0.5));
  CHECK_NOTHROW(peft::check_optimizer(adamw));
  {
    torch::NoGradGuard no_grad;
    adapter.parameters()[1].fill_(1.0);
  }
  const auto before = peft::base(linear->weight).detach().clone();
  linear->weight.mutable_grad() = torch::zeros({3, 4});
  adamw.step();
  CHECK(torch::allclose(
      peft::base(linear->weight).detach(), before * 0.95, 1e-5, 1e-7));
}

} // namespace test_check_optimizer
