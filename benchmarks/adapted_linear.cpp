// What the tag costs on a small layer, where every microsecond is overhead: an
// adapted torch::nn::Linear against the same formula composed by hand, and
// against the frozen layer alone. 64 x 64, one row, one thread; rounds in turn,
// the ratio of processor times of each round, median and quartiles.

#include <peft/peft.h>
#include <torch/torch.h>

#include <fmt/format.h>

#include <algorithm>
#include <ctime>
#include <functional>
#include <random>
#include <vector>

namespace {

/// Processor time, which other programs on the machine disturb less.
double ticks(const std::function<void()>& run) {
  const auto start = std::clock();
  for (int i = 0; i < 300; ++i) {
    run();
  }
  return static_cast<double>(std::clock() - start);
}

/// Median and quartiles of b's time over a's, in pairs taken in random order.
void report(
    const char* what,
    const std::function<void()>& a,
    const std::function<void()>& b) {
  std::mt19937 order(0);
  std::vector<double> ratios;
  for (int round = 0; round < 42; ++round) {
    double of_a = 0, of_b = 0;
    if (order() % 2 == 0) {
      of_a = ticks(a);
      of_b = ticks(b);
    } else {
      of_b = ticks(b);
      of_a = ticks(a);
    }
    if (round >= 2) { // two rounds to warm up
      ratios.push_back(of_b / of_a);
    }
  }
  std::sort(ratios.begin(), ratios.end());
  fmt::print(
      "{:58} {:.2f} [{:.2f}, {:.2f}]\n",
      what,
      ratios[ratios.size() / 2],
      ratios[ratios.size() / 4],
      ratios[ratios.size() * 3 / 4]);
}

} // namespace

int main() {
  torch::set_num_threads(1);
  torch::manual_seed(0);
  torch::nn::Linear base(64, 64), adapted(64, 64);
  for (auto& p : base->parameters()) {
    p.set_requires_grad(false);
  }
  auto adapter =
      peft::attach(*adapted, peft::LoraOptions(8).init("random").targets({""}));
  const auto A = adapter.parameters()[0], B = adapter.parameters()[1];
  const auto x = torch::randn({1, 64});
  auto hand = [&] {
    return at::addmm(base->bias, x, base->weight.t()) +
        at::mm(at::mm(x, A.t()), B.t()).mul(1.0);
  };
  {
    torch::NoGradGuard no_grad;
    report("forward, adapted / by hand", hand, [&] { adapted(x); });
    report(
        "forward, adapted / frozen layer",
        [&] { base(x); },
        [&] { adapted(x); });
  }
  report(
      "forward and backward, adapted / by hand",
      [&] { hand().sum().backward(); },
      [&] { adapted(x).sum().backward(); });
  adapter.disable();
  torch::NoGradGuard no_grad;
  report(
      "forward, disabled / frozen layer",
      [&] { base(x); },
      [&] { adapted(x); });
  peft::merge(*adapted);
  report(
      "forward, merged / frozen layer", [&] { base(x); }, [&] { adapted(x); });
}
