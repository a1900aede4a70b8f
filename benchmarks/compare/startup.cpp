// The least a program that adapts a network does: its start-up is compared with
// `import peft`. With the argument `base` it adapts nothing.

#include <peft/peft.h>
#include <torch/torch.h>

#include <string>

int main(int argc, char** argv) {
  const bool base = argc > 1 && std::string(argv[1]) == "base";
  torch::set_num_threads(1);
  torch::nn::Linear layer(64, 64);
  if (!base) {
    peft::attach(*layer, peft::LoraOptions(8).targets({""}));
  }
  const auto y = layer(torch::ones({1, 64}));
  return y.isfinite().all().item<bool>() ? 0 : 1;
}
