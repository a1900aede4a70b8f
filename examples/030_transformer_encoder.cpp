// LoRA on a torch::nn::TransformerEncoder as LibTorch ships it: nothing is
// wrapped or subclassed, the attention's packed projection included.
//
// Prints:
//   trainable 4,096 of 71,040 (5.77 %)
//   adapter 'default' (LORA): 4,096 parameters at 2 sites
//   ...
//   loss 1.9842 -> 0.9633
//   disabled, the output equals the base's: true

#include <peft/peft.h>
#include <torch/torch.h>

#include <fmt/format.h>

int main() {
  torch::manual_seed(0);
  torch::nn::TransformerEncoder encoder(torch::nn::TransformerEncoderOptions(
      torch::nn::TransformerEncoderLayerOptions(64, 4)
          .dim_feedforward(128)
          .dropout(0.0),
      2));
  const auto x = torch::randn({10, 16, 64}); // [sequence, batch, features]
  const auto target = torch::randn({10, 16, 64});
  const auto base_output = encoder->forward(x).detach();

  // The default targets are query and value: here, rows of in_proj_weight.
  auto adapter = peft::attach(*encoder, peft::LoraOptions(8).alpha(16));
  fmt::print("{}\n", peft::summary(*encoder));

  torch::optim::AdamW optimizer(adapter.parameters(), 1e-2);
  double first = 0, last = 0;
  for (int step = 0; step < 60; ++step) {
    optimizer.zero_grad();
    auto loss = torch::mse_loss(encoder->forward(x), target);
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
    first = step == 0 ? last : first;
  }
  fmt::print("loss {:.4f} -> {:.4f}\n", first, last);

  adapter.disable();
  const bool same = torch::equal(encoder->forward(x), base_output);
  fmt::print("disabled, the output equals the base's: {}\n", same);
  adapter.enable();

  // Another thread, or this one for a while, may choose otherwise.
  {
    peft::ActiveAdapters base_only({});
    fmt::print(
        "in a scope without adapters as well: {}\n",
        torch::equal(encoder->forward(x), base_output));
  }
  return same && last < first ? 0 : 1;
}
