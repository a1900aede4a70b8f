// What is shipped is a plain network: after merge there is no adapter, no tag
// and no extra operator. The two ways: fold for good, or fold and be able to go
// back to the bit.
//
// Prints:
//   operators: base 19, adapted 59, merged 19
//   unmerged equals the base to the bit: true
//   a plain model reads the merged file: true

#include <peft/peft.h>
#include <torch/torch.h>

#include <ATen/record_function.h>
#include <fmt/format.h>

#include <sstream>
#include <vector>

thread_local int operators = 0;

int count_operators(torch::nn::Sequential& net, const torch::Tensor& x) {
  operators = 0;
  const auto handle = at::addThreadLocalCallback(
      at::RecordFunctionCallback(
          [](const at::RecordFunction&)
              -> std::unique_ptr<at::ObserverContext> {
            ++operators;
            return nullptr;
          })
          .scopes({at::RecordScope::FUNCTION}));
  net->forward(x);
  at::removeCallback(handle);
  return operators;
}

int main() {
  torch::manual_seed(0);
  torch::InferenceMode inference;
  torch::nn::Sequential net(
      torch::nn::Linear(64, 128), torch::nn::GELU(), torch::nn::Linear(128, 8));
  const auto x = torch::randn({4, 64});
  const auto base_output = net->forward(x);
  const int base = count_operators(net, x);

  auto adapter = peft::attach(
      *net,
      peft::LoraOptions(8).init("random").targets(peft::Targets::all_linear()));
  const int adapted = count_operators(net, x);
  const auto adapted_output = net->forward(x);

  adapter.merge(); // keeps the old base
  adapter.unmerge(); // and gives it back
  adapter.disable();
  const bool restored = torch::equal(net->forward(x), base_output);
  adapter.enable();

  peft::merge(*net); // for good
  const int merged = count_operators(net, x);
  fmt::print(
      "operators: base {}, adapted {}, merged {}\n", base, adapted, merged);
  fmt::print("unmerged equals the base to the bit: {}\n", restored);

  std::stringstream file;
  torch::save(net, file);
  torch::nn::Sequential plain(
      torch::nn::Linear(64, 128), torch::nn::GELU(), torch::nn::Linear(128, 8));
  torch::load(plain, file);
  const bool shipped = torch::equal(plain->forward(x), net->forward(x)) &&
      torch::allclose(plain->forward(x), adapted_output, 1e-5, 1e-5);
  fmt::print("a plain model reads the merged file: {}\n", shipped);
  return restored && shipped && merged == base ? 0 : 1;
}
