// What HF PEFT 0.21.2 gets wrong and no other test shows to be right here; the
// list in docs/hf_peft.md names the tests of the others.

#include "test.h"

#include "model_state.h"

#include <string>
#include <thread>
#include <vector>

namespace test_where_peft_is_wrong {

namespace nn = torch::nn;
using torch::Tensor;

// PEFT merges its LoRA into the attention's weights in every forward and takes
// it out again behind: they drift, and a second thread sees them merged.
TEST_CASE("attention with LoRA runs in threads and writes to no weight") {
  seed();
  nn::MultiheadAttention attention(8, 2);
  attention->to(torch::kBFloat16);
  const auto weights = {attention->in_proj_weight, attention->out_proj->weight};
  std::vector<Tensor> before;
  for (const auto& w : weights) {
    before.push_back(w.detach().clone());
  }
  auto adapter = peft::attach(
      *attention, peft::LoraOptions(2).alpha(4).targets({"", "out_proj"}));
  randomise(adapter);
  attention->eval();
  std::vector<int64_t> versions;
  for (const auto& w : weights) {
    versions.push_back(peft::base(w)._version());
  }
  const auto x = torch::randn({5, 3, 8}).to(torch::kBFloat16);
  const auto forward = [&] {
    const torch::NoGradGuard no_grad;
    return std::get<0>(attention->forward(x, x, x));
  };
  const Tensor alone = forward();
  std::vector<int> wrong(4, 0);
  std::vector<std::thread> threads;
  for (auto& count : wrong) {
    threads.emplace_back([&] {
      for (int i = 0; i < 50; ++i) {
        count += torch::equal(forward(), alone) ? 0 : 1;
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  CHECK(wrong == std::vector<int>(4, 0));
  size_t i = 0;
  for (const auto& w : weights) {
    CHECK(peft::base(w)._version() == versions[i]);
    CHECK(equal_bits(peft::base(w).detach(), before[i]));
    ++i;
  }
}

// PEFT divides by the vector to unmerge: zeros take their rows away for good.
TEST_CASE("(IA)3 with zeros in half precision unmerges to the bit") {
  for (const auto dtype : {torch::kBFloat16, torch::kHalf, torch::kFloat}) {
    for (const bool feedforward : {false, true}) {
      INFO(dtype << ", feed-forward: " << feedforward);
      seed();
      nn::Linear linear(6, 5);
      linear->to(dtype);
      const auto before = state_of(*linear);
      const peft::Targets here({""}), none = peft::Targets::regex("(?!)");
      auto adapter = peft::attach(
          *linear,
          peft::Ia3Options().targets(here).feedforward(
              feedforward ? here : none));
      randomise(adapter);
      {
        const torch::NoGradGuard no_grad;
        adapter.parameters()[0].view({-1})[2].zero_();
      }
      for (int i = 0; i < 100; ++i) {
        adapter.merge();
        adapter.unmerge();
      }
      adapter.detach();
      CHECK(same_state(state_of(*linear), before));
    }
  }
}

} // namespace test_where_peft_is_wrong
