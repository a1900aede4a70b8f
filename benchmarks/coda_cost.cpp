// What CoDA saves: multiply-adds and processor time of a BERT-base encoder
// under CoDA against the frozen encoder alone, for shares k / n of 512 tokens.
// Multiply-adds are counted from the shapes of every matrix product and
// attention that the network calls. One thread; rounds in turn, the ratio of
// processor times of each round, median and quartiles.
//
//   coda_cost [layers]    12 if left out

#include <peft/methods/coda.h>
#include <peft/models/bert.h>
#include <peft/peft.h>
#include <torch/library.h>
#include <torch/torch.h>

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <ctime>
#include <functional>
#include <string>
#include <vector>

namespace {

constexpr auto kMode = c10::DispatchKey::TESTING_ONLY_GenericMode;
int64_t multiply_adds = 0;

/// Sees every operator that the network calls, and none that those call.
void observe(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto in = torch::jit::last(*stack, op.schema().arguments().size());
  const auto& name = op.schema().name();
  const auto tensor = [&](size_t i) { return in[i].toTensor(); };
  if (name == "aten::matmul" || name == "aten::mm") {
    multiply_adds += tensor(0).numel() * tensor(1).size(1);
  } else if (name == "aten::addmm") {
    multiply_adds += tensor(1).numel() * tensor(2).size(1);
  } else if (name == "aten::linear") {
    multiply_adds += tensor(0).numel() * tensor(1).size(0);
  } else if (name == "aten::scaled_dot_product_attention") {
    multiply_adds += 2 * tensor(0).numel() * tensor(1).size(2);
  }
  const c10::impl::ExcludeDispatchKeyGuard below(kMode);
  op.callBoxed(stack);
}

int64_t count(const std::function<void()>& run) {
  multiply_adds = 0;
  const c10::impl::IncludeDispatchKeyGuard on(kMode);
  run();
  return multiply_adds;
}

double ticks(const std::function<void()>& run) {
  const auto start = std::clock();
  run();
  return static_cast<double>(std::clock() - start);
}

TORCH_LIBRARY_IMPL(_, TESTING_ONLY_GenericMode, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&observe>());
}

} // namespace

int main(int argc, char** argv) {
  torch::set_num_threads(1);
  torch::manual_seed(0);
  torch::NoGradGuard no_grad;
  constexpr int64_t n = 512;
  const int64_t layers = argc > 1 ? std::atoi(argv[1]) : 12;
  peft::models::BertModel model(peft::models::BertOptions()
                                    .vocab_size(100)
                                    .num_hidden_layers(layers)
                                    .add_pooling_layer(false));
  model->eval();
  const auto ids = torch::randint(1, 100, {1, n}, torch::kLong);
  const auto run = [&] { model->forward(ids); };
  const auto base = static_cast<double>(count(run));
  constexpr int64_t d = 768, f = 3072;
  TORCH_CHECK(
      multiply_adds == layers * n * (4 * d * d + 2 * d * f + 2 * n * d),
      "a product of the encoder was not counted");
  fmt::print(
      "BERT, {} layers, {} tokens, {:.2f} G multiply-adds; CoDA over the "
      "frozen encoder:\n{:>8} {:>9} {:>13} {:>26}\n",
      layers,
      n,
      base / 1e9,
      "k / n",
      "attention",
      "multiply-adds",
      "time [quartiles]");
  for (const int64_t parts : {1, 2, 4, 8, 16}) {
    for (const char* attention : {"k_to_k", "k_to_all"}) {
      auto adapter = peft::attach(
          *model, peft::CodaOptions(n / parts).attention(attention));
      const auto routed = static_cast<double>(count(run));
      std::vector<double> ratios;
      for (int round = 0; round < 11; ++round) {
        adapter.disable();
        const double frozen = ticks(run);
        adapter.enable();
        const double own = ticks(run);
        if (round > 0) { // one to warm up
          ratios.push_back(own / frozen);
        }
      }
      adapter.detach();
      std::sort(ratios.begin(), ratios.end());
      fmt::print(
          "{:>8} {:>9} {:>13.3f} {:>12.3f} [{:.3f}, {:.3f}]\n",
          "1 / " + std::to_string(parts),
          attention,
          routed / base,
          ratios[ratios.size() / 2],
          ratios[ratios.size() / 4],
          ratios[ratios.size() * 3 / 4]);
    }
  }
}
