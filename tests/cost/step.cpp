// One training step and one forward of a small linear layer for callgrind to
// count: frozen, with LoRA written by hand, adapted, with the adapter disabled,
// merged. instructions.cmake runs it and compares.

#include <peft/core/adapter.h>
#include <peft/core/attach.h>
#include <peft/core/merge.h>
#include <peft/methods/lora.h>

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/nn/modules/linear.h>

#include <array>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

using torch::Tensor;

namespace {

constexpr int64_t kWidth = 64, kRank = 8;
constexpr double kScale = 2.0;
constexpr int kWarmUp = 5, kCalls = 100; // kCalls: instructions.cmake divides

/// Gives memory out again that came back, by powers of two: how much malloc has
/// to search depends on what ran before, and shall not be counted.
class Pool final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    size_t power = 0;
    while ((size_t(1) << power) < size) {
      ++power;
    }
    auto& free = free_[power];
    if (free.empty()) {
      free.push_back(new Block{c10::alloc_cpu(size_t(1) << power), &free});
    }
    Block* block = free.back();
    free.pop_back();
    return {block->data, block, &give_back, at::kCPU};
  }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }

 private:
  struct Block {
    void* data;
    std::vector<Block*>* home;
  };
  static void give_back(void* context) {
    auto* block = static_cast<Block*>(context);
    block->home->push_back(block);
  }

  std::array<std::vector<Block*>, 64> free_;
};

struct Variant {
  std::string name;
  std::function<Tensor(const Tensor&)> forward;
  std::vector<Tensor> trained;
};

torch::nn::Linear frozen_linear() {
  torch::nn::Linear linear(kWidth, kWidth);
  for (auto& p : linear->parameters()) {
    p.set_requires_grad(false);
  }
  return linear;
}

Variant of_layer(
    const std::string& name,
    torch::nn::Linear linear,
    std::vector<Tensor> trained = {}) {
  const auto forward = [linear](const Tensor& x) mutable {
    return linear->forward(x);
  };
  return {name, forward, std::move(trained)};
}

/// The adapter's formula as a user writes it.
Variant composed(const std::string& name, double dropout) {
  auto linear = frozen_linear();
  const Tensor A = torch::randn({kRank, kWidth}).set_requires_grad(true);
  const Tensor B = torch::randn({kWidth, kRank}).set_requires_grad(true);
  const auto forward = [=](const Tensor& x) mutable {
    const Tensor input = dropout > 0 ? at::dropout(x, dropout, true) : x;
    return linear->forward(x) + at::linear(at::linear(input, A), B) * kScale;
  };
  return {name, forward, {A, B}};
}

std::vector<Variant> variants() {
  std::vector<Variant> result;
  const auto add_adapted = [&](const std::string& name, double dropout) {
    auto linear = frozen_linear();
    auto adapter = peft::attach(
        *linear,
        peft::LoraOptions(kRank)
            .alpha(kScale * kRank)
            .dropout(dropout)
            .targets(peft::Targets::all_linear()));
    result.push_back(of_layer(name, linear, adapter.parameters()));
    return std::make_pair(linear, adapter);
  };
  result.push_back(of_layer("base", frozen_linear()));
  result.push_back(composed("composed", 0));
  add_adapted("adapted", 0);
  add_adapted("disabled", 0).second.disable();
  peft::merge(*add_adapted("merged", 0).first);
  result.back().trained.clear();
  result.push_back(composed("composed_dropout", 0.1));
  add_adapted("adapted_dropout", 0.1);
  return result;
}

} // namespace

// callgrind counts inside this function only, and writes down each call.
extern "C" __attribute__((noinline)) void counted(
    const std::function<void()>& call) {
  for (int i = 0; i < kCalls; ++i) {
    call();
  }
}

int main() {
  static Pool pool;
  c10::SetCPUAllocator(&pool, /*priority=*/1);
  at::set_num_threads(1);
  torch::manual_seed(3);
  const auto all = variants();
  const auto count = [](const std::string& what,
                        const std::function<void()>& call) {
    for (int i = 0; i < kWarmUp; ++i) {
      call();
    }
    std::printf("%s\n", what.c_str()); // one line for each call of `counted`
    counted(call);
  };
  for (const int64_t rows : {1, 16}) {
    const Tensor x = torch::randn({rows, kWidth}).set_requires_grad(true);
    const Tensor dy = torch::randn({rows, kWidth});
    for (const auto& variant : all) {
      std::vector<Tensor> leaves = variant.trained;
      leaves.push_back(x);
      const std::string suffix = std::to_string(rows) + "_" + variant.name;
      count("step_" + suffix, [&] {
        for (auto& leaf : leaves) {
          leaf.mutable_grad().reset();
        }
        torch::autograd::backward({variant.forward(x)}, {dy});
      });
      if (variant.name.find("dropout") == std::string::npos) {
        count("forward_" + suffix, [&] {
          const torch::NoGradGuard no_grad;
          variant.forward(x);
        });
      }
    }
  }
}
