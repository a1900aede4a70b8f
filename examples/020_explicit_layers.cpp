// Layers that carry their adapter visibly: no dispatch key, no names to match.
// A frozen attention-like block learns a new target by LoRA on query and value
// and BitFit on its norm; then the adapters are folded in.
//
// Prints:
//   trains 1088 of 13696 parameters
//   loss 0.0881 -> 0.0285
//   merged: largest difference 7e-07

#include <peft/peft.h>
#include <torch/torch.h>

#include <fmt/format.h>

struct BlockImpl : torch::nn::Module {
  explicit BlockImpl(int64_t d)
      : query(torch::nn::LinearOptions(d, d), peft::LoraOptions(4).alpha(8)),
        key(d, d),
        value(torch::nn::LinearOptions(d, d), peft::LoraOptions(4).alpha(8)),
        norm(torch::nn::LayerNormOptions({d})) {
    register_module("query", query);
    register_module("key", key);
    register_module("value", value);
    register_module("norm", norm);
    key->weight.set_requires_grad(false);
    key->bias.set_requires_grad(false);
  }

  torch::Tensor forward(const torch::Tensor& x) {
    const auto mixed = torch::scaled_dot_product_attention(
        query->forward(x), key->forward(x), value->forward(x));
    return norm->forward(x + mixed);
  }

  peft::Lora<torch::nn::Linear> query;
  torch::nn::Linear key;
  peft::Lora<torch::nn::Linear> value;
  peft::BitFit<torch::nn::LayerNorm> norm;
};
TORCH_MODULE(Block);

int main() {
  torch::manual_seed(0);
  Block block(64), teacher(64); // the teacher's projections are others
  const auto x = torch::randn({16, 10, 64});
  const auto target = teacher->forward(x).detach();

  const auto trainable = peft::trainable_parameters(*block);
  int64_t count = 0, total = 0;
  for (const auto& p : trainable) {
    count += p.numel();
  }
  for (const auto& p : block->parameters()) {
    total += p.numel();
  }
  fmt::print("trains {} of {} parameters\n", count, total);

  torch::optim::AdamW optimizer(trainable, 1e-2);
  double first = 0, last = 0;
  for (int step = 0; step < 100; ++step) {
    optimizer.zero_grad();
    auto loss = torch::mse_loss(block->forward(x), target);
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
    first = step == 0 ? last : first;
  }
  fmt::print("loss {:.4f} -> {:.4f}\n", first, last);

  torch::NoGradGuard no_grad;
  const auto before = block->forward(x);
  block->query->merge();
  block->value->merge();
  block->norm->merge();
  fmt::print(
      "merged: largest difference {:.0e}\n",
      (block->forward(x) - before).abs().max().item<double>());
  return last < first ? 0 : 1;
}
