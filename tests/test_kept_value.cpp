#include <peft/core/kept_value.h>
#include <peft/peft.h>

#include "test.h"

#include <ATen/record_function.h>

#include <functional>
#include <thread>
#include <vector>

namespace test_kept_value {

using torch::Tensor;

namespace {

/// An LSTM whose four weights carry LoRA: an operator without a fast path.
struct Net {
  torch::nn::LSTM lstm{torch::nn::LSTMOptions(6, 5)};
  Tensor x = torch::randn({3, 2, 6});
  peft::Adapter adapter;

  Net() {
    adapter = peft::attach(
        *lstm,
        peft::LoraOptions(2).init("random").targets(
            {"weight_ih_l0", "weight_hh_l0"}));
  }
  Tensor run() {
    return std::get<0>(lstm->forward(x));
  }
  /// The same by a plain LSTM that holds the effective weights.
  Tensor expected() {
    torch::nn::LSTM plain(torch::nn::LSTMOptions(6, 5));
    torch::NoGradGuard no_grad;
    auto to = plain->named_parameters();
    for (const auto& name : {"weight_ih_l0", "weight_hh_l0"}) {
      to[name].copy_(peft::effective(*lstm->named_parameters().find(name)));
    }
    for (const auto& name : {"bias_ih_l0", "bias_hh_l0"}) {
      to[name].copy_(*lstm->named_parameters().find(name));
    }
    return std::get<0>(plain->forward(x));
  }
};

/// How many matrix products with an addend `run` takes outside the LSTM's own:
/// one for each weight that is built.
int64_t products(const std::function<void()>& run) {
  static int64_t count;
  count = 0;
  const auto handle = at::addThreadLocalCallback(at::RecordFunctionCallback(
      [](const at::RecordFunction& f) -> std::unique_ptr<at::ObserverContext> {
        count += std::string(f.name()) == "aten::addmm" ? 1 : 0;
        return nullptr;
      }));
  run();
  at::removeCallback(handle);
  return count;
}

} // namespace

TEST_CASE("the effective weight is built twice, then kept") {
  seed(1);
  Net net;
  torch::NoGradGuard no_grad;
  const Tensor first = net.run();
  const int64_t built = products([&] { net.run(); });
  const int64_t kept = products([&] { CHECK(equal_bits(net.run(), first)); });
  CHECK(built - kept == 2);
  CHECK(close(first, net.expected()));
}

TEST_CASE("whatever a kept weight was made of may change") {
  seed(2);
  Net net;
  Net other; // its factors serve as other numbers
  const auto A = net.adapter.parameters()[0], B = net.adapter.parameters()[1];
  const Tensor w = net.lstm->named_parameters()["weight_ih_l0"];
  const std::vector<std::function<void()>> changes = {
      [&] { A.add_(0.5); },
      [&] { B.mul_(-1.0); },
      [&] { w.mul_(1.5); },
      [&] { net.adapter.set_scale(0.3); },
      [&] { net.adapter.disable(); },
      [&] { net.adapter.enable(); },
      [&] { A.set_data(other.adapter.parameters()[0].clone()); },
      [&] {
        net.lstm->named_parameters()["weight_ih_l0"].set_data(
            torch::randn({20, 6}));
      },
      [&] { // memory that is given back and taken again
        const auto sizes = A.sizes().vec();
        A.set_data(torch::empty({0}));
        A.set_data(torch::full(sizes, 0.25));
      },
      [&] { net.adapter.merge(); },
      [&] { net.adapter.unmerge(); },
  };
  torch::NoGradGuard no_grad;
  for (const auto& change : changes) {
    for (int i = 0; i < 3; ++i) {
      CHECK(close(net.run(), net.expected()));
    }
    change();
    CHECK(close(net.run(), net.expected()));
  }
}

TEST_CASE("training steps between evaluations") {
  seed(3);
  Net net;
  torch::optim::SGD optimizer(net.adapter.parameters(), 0.1);
  for (int step = 0; step < 4; ++step) {
    optimizer.zero_grad();
    net.run().square().sum().backward();
    CHECK(net.adapter.parameters()[0].grad().abs().max().item<float>() > 0);
    optimizer.step();
    torch::NoGradGuard no_grad;
    for (int i = 0; i < 3; ++i) {
      CHECK(close(net.run(), net.expected()));
    }
  }
}

TEST_CASE("a result that shares a kept weight's memory takes it along") {
  seed(4);
  Net net;
  torch::NoGradGuard no_grad;
  const Tensor expected = net.run();
  const Tensor w = net.lstm->named_parameters()["weight_ih_l0"];
  for (int i = 0; i < 3; ++i) {
    net.run();
  }
  for (int i = 0; i < 3; ++i) {
    Tensor read = at::dropout(w, 0.5, /*train=*/false); // gives what it got
    read.zero_();
    CHECK(equal_bits(net.run(), expected));
  }
  peft::effective(w).zero_();
  CHECK(equal_bits(net.run(), expected));
}

TEST_CASE("a choice of adapters per thread, and several threads at once") {
  seed(5);
  Net net;
  torch::NoGradGuard no_grad;
  const Tensor on = net.run();
  Tensor off;
  {
    peft::ActiveAdapters base(std::vector<std::string>{});
    off = net.run();
  }
  CHECK_FALSE(equal_bits(on, off));
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int id = 0; id < 8; ++id) {
    threads.emplace_back([&, id] {
      torch::NoGradGuard guard;
      for (int i = 0; i < 50; ++i) {
        std::optional<peft::ActiveAdapters> scope;
        if (id % 2 == 1) {
          scope.emplace(std::vector<std::string>{});
        }
        if (!torch::equal(net.run(), id % 2 == 1 ? off : on)) {
          ++wrong;
        }
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  CHECK(wrong == 0);
}

TEST_CASE("inference tensors count no versions and are not kept") {
  seed(6);
  c10::InferenceMode mode;
  Net net;
  for (int i = 0; i < 4; ++i) {
    CHECK(close(net.run(), net.expected()));
    net.lstm->named_parameters()["weight_ih_l0"].mul_(1.1);
  }
}

} // namespace test_kept_value
