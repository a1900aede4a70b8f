// What a user's first file looks like; each outside project builds it.
#include <peft/peft.h>

#include <cstdio>

int main() {
  torch::nn::Sequential net(torch::nn::Linear(4, 4));
  auto adapter = peft::attach(*net, peft::LoraOptions(2).targets({"0"}));
  const bool adapts = adapter.num_parameters() == 16;
  peft::merge(*net);
  std::printf("peft %s\n", peft::version());
  return adapts ? 0 : 1;
}
