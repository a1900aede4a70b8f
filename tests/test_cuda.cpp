#include <peft/peft.h>

#include "test.h"

#include <ATen/record_function.h>

#include <iostream>
#include <memory>
#include <string>
#include <vector>

#ifdef PEFT_TEST_CUDA_HEADERS
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace test_cuda {

using torch::Tensor;

namespace {

/// Says so where there is no GPU; ctest shows the tests as skipped then.
bool has_gpu() {
  if (!torch::cuda::is_available()) {
    std::cout << "skipped: no CUDA device\n";
    return false;
  }
  return true;
}

struct Net : torch::nn::Module {
  torch::nn::Linear query{register_module("query", torch::nn::Linear(24, 32))};
  torch::nn::Linear value{register_module("value", torch::nn::Linear(32, 16))};

  Tensor forward(const Tensor& x) {
    return value(torch::tanh(query(x)));
  }
};

std::shared_ptr<Net> make_net(at::ScalarType dtype, torch::Device device) {
  seed(1);
  auto net = std::make_shared<Net>();
  net->to(device, dtype);
  return net;
}

/// Result, gradient of the input, and the adapter's, after one backward.
std::vector<Tensor> step(
    Net& net,
    const peft::Adapter& adapter,
    const Tensor& input,
    const Tensor& dy) {
  const Tensor x = input.detach().clone().requires_grad_();
  const Tensor y = net.forward(x);
  y.backward(dy);
  std::vector<Tensor> result{y.detach().cpu(), x.grad().cpu()};
  for (const auto& p : adapter.parameters()) {
    result.push_back(p.grad().cpu());
  }
  return result;
}

} // namespace

TEST_CASE("CUDA: LoRA and DoRA compute what they compute on the CPU") {
  if (!has_gpu()) {
    return;
  }
  const bool dora = GENERATE(false, true);
  const auto options = peft::LoraOptions(4).init("random").dora(dora);
  auto on_cpu = make_net(torch::kDouble, torch::kCPU);
  auto on_gpu = make_net(torch::kDouble, torch::kCUDA);
  seed(2);
  auto a = peft::attach(*on_cpu, options);
  seed(2);
  auto b = peft::attach(*on_gpu, options);
  for (const auto& p : b.parameters()) {
    CHECK(p.is_cuda());
  }
  const Tensor x = torch::randn({5, 7, 24}, torch::kDouble);
  const Tensor dy = torch::randn({5, 7, 16}, torch::kDouble);
  const auto expected = step(*on_cpu, a, x, dy);
  const auto found = step(*on_gpu, b, x.cuda(), dy.cuda());
  for (size_t i = 0; i < found.size(); ++i) {
    CHECK(close(found[i], expected[i]));
  }
  peft::merge(*on_gpu);
  CHECK(close(on_gpu->forward(x.cuda()).cpu(), expected[0]));
}

TEST_CASE("CUDA: half-precision bases, dropout and autocast train") {
  if (!has_gpu()) {
    return;
  }
  const auto dtype = GENERATE(torch::kFloat, torch::kHalf, torch::kBFloat16);
  const double dropout = GENERATE(0.0, 0.5);
  const bool autocast = GENERATE(false, true);
  auto net = make_net(dtype, torch::kCUDA);
  auto adapter =
      peft::attach(*net, peft::LoraOptions(4).init("random").dropout(dropout));
  const Tensor x =
      torch::randn({6, 24}, torch::dtype(dtype).device(torch::kCUDA));
  at::autocast::set_autocast_enabled(at::kCUDA, autocast);
  const Tensor y = net->forward(x);
  at::autocast::set_autocast_enabled(at::kCUDA, false);
  at::autocast::clear_cache();
  y.to(torch::kFloat).square().sum().backward();
  for (const auto& p : adapter.parameters()) {
    CHECK(at::isfinite(p.grad()).all().item<bool>());
    CHECK(p.grad().abs().max().item<float>() > 0);
  }
}

TEST_CASE("CUDA: a mixed batch is each row with its own adapter") {
  if (!has_gpu()) {
    return;
  }
  auto net = make_net(torch::kDouble, torch::kCUDA);
  peft::attach(*net, peft::LoraOptions(2).init("random"), "a");
  peft::attach(*net, peft::LoraOptions(4).init("random"), "b");
  const Tensor x = torch::randn({4, 3, 24}, torch::kDouble).cuda();
  const std::vector<std::string> names = {"a", "b", "__base__", "a"};
  torch::NoGradGuard no_grad;
  Tensor mixed;
  {
    peft::BatchAdapters scope(names);
    mixed = net->forward(x);
  }
  for (int64_t i = 0; i < 4; ++i) {
    peft::ActiveAdapters scope(
        names[i] == "__base__" ? std::vector<std::string>{}
                               : std::vector<std::string>{names[i]});
    CHECK(close(mixed[i].cpu(), net->forward(x[i]).cpu()));
  }
}

TEST_CASE("CUDA: an adapted network moves between the devices") {
  if (!has_gpu()) {
    return;
  }
  auto net = make_net(torch::kDouble, torch::kCPU);
  auto adapter = peft::attach(*net, peft::LoraOptions(4).init("random"));
  const Tensor x = torch::randn({3, 24}, torch::kDouble);
  const Tensor expected = net->forward(x).detach();
  net->to(torch::kCUDA);
  CHECK(adapter.parameters()[0].is_cuda());
  CHECK(close(net->forward(x.cuda()).detach().cpu(), expected));
  net->to(torch::kCPU);
  CHECK(close(net->forward(x).detach(), expected));
}

#ifdef PEFT_TEST_CUDA_HEADERS
TEST_CASE("CUDA: a stream of one's own, and graphs of adapted and merged") {
  if (!has_gpu()) {
    return;
  }
  const bool merged = GENERATE(false, true);
  auto net = make_net(torch::kFloat, torch::kCUDA);
  auto adapter = peft::attach(*net, peft::LoraOptions(4).init("random"));
  torch::NoGradGuard no_grad;
  Tensor x = torch::randn({8, 24}).cuda();
  const Tensor other = torch::randn({8, 24}).cuda();
  const Tensor expected = net->forward(other);
  if (merged) {
    peft::merge(*net);
  }
  const auto stream = at::cuda::getStreamFromPool();
  c10::cuda::CUDAStreamGuard guard(stream);
  for (int i = 0; i < 3; ++i) { // cuBLAS makes its workspace
    net->forward(x);
  }
  stream.synchronize();
  at::cuda::CUDAGraph graph;
  graph.capture_begin(); // an operator that synchronises would end it
  const Tensor y = net->forward(x);
  graph.capture_end();
  x.copy_(other);
  graph.replay();
  stream.synchronize();
  CHECK(at::allclose(y, expected, 1e-4, 1e-5));
}
#endif

} // namespace test_cuda
