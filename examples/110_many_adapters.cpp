// One network, an adapter for each robot: trained side by side, chosen by call,
// by row and by thread, mixed, saved together, swapped in place, and turned
// into LoRA where that is all a server takes.

#include <peft/peft.h>
#include <torch/torch.h>

#include <fmt/format.h>

#include <string>
#include <thread>
#include <vector>

namespace {

torch::nn::Sequential make_controller() {
  torch::manual_seed(0);
  return torch::nn::Sequential(
      torch::nn::Linear(24, 96),
      torch::nn::Tanh(),
      torch::nn::Linear(96, 96),
      torch::nn::Tanh(),
      torch::nn::Linear(96, 6));
}

/// What a robot's joints answer: the common controller, worn in some places.
torch::Tensor
answers(torch::nn::Sequential& common, const torch::Tensor& x, uint64_t robot) {
  torch::NoGradGuard no_grad;
  peft::ActiveAdapters base({});
  torch::manual_seed(robot);
  const auto wear = 1 + 0.5 * torch::randn({6});
  return common->forward(x) * wear;
}

double
train(torch::nn::Sequential& net, const std::string& robot, uint64_t seed) {
  peft::set_adapter(*net, robot); // it acts and trains, the others rest
  auto adapter = peft::get_adapter(*net, robot);
  torch::optim::AdamW optimizer(adapter.parameters(), 1e-2);
  double loss_value = 0;
  for (int step = 0; step < 200; ++step) {
    torch::manual_seed(1000 * seed + static_cast<uint64_t>(step));
    const auto x = torch::randn({32, 24});
    const auto loss = torch::mse_loss(net->forward(x), answers(net, x, seed));
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    loss_value = loss.item<double>();
  }
  return loss_value;
}

torch::Tensor with(
    torch::nn::Sequential& net,
    std::vector<std::string> names,
    const torch::Tensor& x) {
  torch::NoGradGuard no_grad;
  peft::ActiveAdapters scope(std::move(names));
  return net->forward(x);
}

bool near(const torch::Tensor& a, const torch::Tensor& b) {
  return torch::allclose(a, b, 1e-5, 1e-5);
}

} // namespace

int main() {
  auto net = make_controller();
  const auto all = peft::Targets::all_linear();
  peft::attach(*net, peft::LoraOptions(4).alpha(8).targets(all), "arm");
  peft::attach(*net, peft::LoraOptions(4).alpha(8).targets(all), "walker");
  fmt::print("arm:    loss {:.4f}\n", train(net, "arm", 1));
  fmt::print("walker: loss {:.4f}\n", train(net, "walker", 2));
  peft::set_adapter(*net, {"arm", "walker"}, /*inference_mode=*/true);

  // A robot a row, in one pass.
  const auto x = torch::randn({3, 24});
  const auto arm = with(net, {"arm"}, x), walker = with(net, {"walker"}, x);
  torch::Tensor mixed;
  {
    torch::NoGradGuard no_grad;
    peft::BatchAdapters rows({"arm", "walker", "__base__"});
    mixed = net->forward(x);
  }
  bool ok = near(mixed[0], arm[0]) && near(mixed[1], walker[1]) &&
      near(mixed[2], with(net, {}, x)[2]);
  fmt::print("each row has its robot's adapter: {}\n", ok);

  // A robot a thread; nothing is written to the network.
  std::vector<torch::Tensor> seen(2);
  std::thread first([&] { seen[0] = with(net, {"arm"}, x); });
  std::thread second([&] { seen[1] = with(net, {"walker"}, x); });
  first.join();
  second.join();
  const bool threads =
      torch::equal(seen[0], arm) && torch::equal(seen[1], walker);
  fmt::print("each thread has its own: {}\n", threads);

  // Half of each, exactly: "cat"; PEFT's ten other ways are there too.
  peft::add_weighted_adapter(
      *net,
      {"arm", "walker"},
      {0.5, 0.5},
      "both",
      peft::WeightedAdapterOptions("cat"));
  fmt::print("{}\n", peft::summary(*net));

  // All into one folder as HF PEFT has them, and onto another network.
  peft::save_adapters(*net, "robots");
  auto other = make_controller();
  peft::load_adapters(*other, "robots");
  const bool loaded =
      torch::equal(with(other, {"both"}, x), with(net, {"both"}, x));
  fmt::print("loaded onto another network: {}\n", loaded);

  // The walker's numbers in the arm's place: the tensors stay where they are.
  const auto before = peft::get_adapter(*other, "arm").parameters();
  peft::hotswap_adapter(*other, "robots/walker", "arm");
  const auto after = peft::get_adapter(*other, "arm").parameters();
  bool swapped = torch::equal(with(other, {"arm"}, x), walker);
  for (size_t i = 0; i < before.size(); ++i) {
    swapped = swapped && before[i].data_ptr() == after[i].data_ptr();
  }
  fmt::print("swapped in place: {}\n", swapped);

  // Another method for a server that knows LoRA only.
  peft::attach(*net, peft::LoKrOptions(4).alpha(8).targets(all), "crane");
  train(net, "crane", 3);
  const auto lora = peft::convert_to_lora(
      peft::get_adapter(*net, "crane"), peft::ConvertToLoraOptions(16));
  fmt::print("{}", lora.report());
  peft::save(lora.adapter, "robots_crane_as_lora");
  return ok && threads && loaded && swapped && lora.energy > 0.5 ? 0 : 1;
}
