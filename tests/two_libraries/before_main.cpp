// Attaches in a global constructor, when other files of the program
// (library.cpp is one) may not have run theirs.
#include "interface.h"

#include <peft/core/adapted_weight.h>
#include <peft/core/attach.h>
#include <peft/methods/lora.h>

#include <cstdio>

namespace {

torch::nn::Linear early = [] {
  torch::nn::Linear linear(torch::nn::LinearOptions(4, 4).bias(false));
  torch::NoGradGuard no_grad;
  linear->weight.zero_();
  auto adapter = peft::attach(
      *linear,
      peft::LoraOptions(2).alpha(4).targets(peft::Targets::all_linear()));
  for (auto p : adapter.parameters()) {
    p.fill_(1);
  }
  return linear;
}();

bool every(const at::Tensor& t, double value) {
  return at::equal(t.detach(), at::full(t.sizes(), value));
}

} // namespace

int main() {
  const at::Tensor other = at::zeros({4, 4}), x = at::ones({2, 4});
  attach_to(&other, "default");
  const bool ok = sees_tag(&early->weight) && peft::is_adapted(other) &&
      every(early(x), 16) && every(at::linear(x, other), 16) &&
      every(early->weight + 0, 4) && every(other + 0, 4);
  if (!ok) {
    std::fputs("FAILED: attach before main\n", stderr);
  }
  return ok ? 0 : 1;
}
