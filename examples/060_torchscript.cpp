// Fine-tunes a TorchScript module, of which there is no source here.
//
//   060_torchscript             a small network, defined below
//   060_torchscript model.pt    one from torch.jit.save: [batch, in] floats to
//                               a tensor
//
// LoRA on every Linear learns the toy task to answer 1; then the module is
// merged, saved, loaded and compared. The small network prints about
//
//   trainable 332 of 940 (35.32 %)
//   adapter 'default' (LORA): 332 parameters at 2 sites
//     first  [32, 16]          lora r=4              192
//     last   [3, 32]           lora r=4              140
//   step   0  loss 1.925
//   step 100  loss 0.002
//   step 200  loss 0.000
//   merged, saved, loaded: the same

#include <torch/torch.h>
#include <peft/jit.h>

#include <cstdio>
#include <exception>
#include <memory>

// Stands in for what Python would have traced.
torch::jit::Module small_network() {
  auto unit = std::make_shared<torch::jit::CompilationUnit>();
  auto linear = [&](int64_t in, int64_t out) {
    torch::jit::Module layer("__torch__.Linear", unit, /*shouldMangle=*/true);
    layer.register_parameter("weight", torch::randn({out, in}) / 4, false);
    layer.define("def forward(self, x):\n    return x @ self.weight.t()\n");
    return layer;
  };
  torch::jit::Module network("__torch__.Network", unit);
  network.register_module("first", linear(16, 32));
  network.register_module("last", linear(32, 3));
  network.define(
      "def forward(self, x):\n"
      "    hidden = torch.tanh(self.first.forward(x))\n"
      "    return self.last.forward(hidden)\n");
  return network;
}

int main(int argc, char** argv) try {
  torch::manual_seed(0);
  auto model = argc > 1 ? torch::jit::load(argv[1]) : small_network();
  const auto options =
      peft::LoraOptions(4).alpha(8).targets(peft::Targets::all_linear());
  auto adapter = peft::attach(model, options);
  std::printf("%s", peft::summary(model).c_str());

  const auto x = torch::randn({64, adapter.sites().front().shape.back()});
  torch::optim::AdamW optimizer(adapter.parameters(), 2e-2);
  for (int step = 0; step <= 200; ++step) {
    // The optimising executor would drop the adapter's gradients.
    torch::jit::GraphOptimizerEnabledGuard plain_executor(false);
    optimizer.zero_grad();
    const auto y = model.forward({x}).toTensor();
    const auto loss = (y - 1).square().mean();
    loss.backward();
    optimizer.step();
    if (step % 100 == 0) {
      std::printf("step %3d  loss %.3f\n", step, loss.item<double>());
    }
  }

  torch::NoGradGuard no_grad;
  const auto tuned = model.forward({x}).toTensor();
  peft::merge(model);
  model.save("tuned.pt");
  const auto again = torch::jit::load("tuned.pt").forward({x}).toTensor();
  const bool same = torch::allclose(tuned, again, 1e-4, 1e-5);
  std::printf("merged, saved, loaded: %s\n", same ? "the same" : "different");
  return same ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
