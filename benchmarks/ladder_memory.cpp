// What ladder side tuning stores and what its cache spares. BERT layers, hidden
// 256, 8 rows of 64 tokens.
//
// Memory: bytes that a training step's forward leaves behind for the backward,
// and the most at a time, as LibTorch's allocator reports them; fine-tuning,
// LoRA, and a ladder of 4 side blocks whatever the depth. Time: forward and
// backward of one batch, median of 9 after 2, without a cache, from memory and
// from disk.

#include <peft/peft.h>
#include <peft/models/bert.h>
#include <torch/torch.h>

#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace {

using peft::models::BertModel;
using peft::models::BertOptions;

struct Bytes : c10::MemoryReportingInfoBase {
  void reportMemoryUsage(void*, int64_t size, size_t, size_t, c10::Device)
      override {
    held += size;
    peak = std::max(peak, held);
  }
  bool memoryProfilingEnabled() const override {
    return true;
  }
  int64_t held = 0;
  int64_t peak = 0;
};

BertModel make(int64_t depth) {
  torch::manual_seed(0);
  BertModel model(BertOptions()
                      .vocab_size(1000)
                      .hidden_size(256)
                      .num_hidden_layers(depth)
                      .num_attention_heads(4)
                      .intermediate_size(1024)
                      .add_pooling_layer(false));
  model->eval();
  return model;
}

/// Side blocks beside the last four layers.
peft::LadderOptions ladder(int64_t depth) {
  return peft::LadderOptions(8).layers(
      {depth - 4, depth - 3, depth - 2, depth - 1});
}

std::string usage(BertModel& model, const torch::Tensor& ids) {
  auto bytes = std::make_shared<Bytes>();
  c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, bytes);
  const auto loss = model->forward(ids).square().sum();
  return fmt::format(
      "{:7.2f} {:7.2f}",
      static_cast<double>(bytes->held) / (1 << 20),
      static_cast<double>(bytes->peak) / (1 << 20));
}

double milliseconds(const std::function<void()>& run) {
  std::vector<double> times;
  for (int i = 0; i < 11; ++i) {
    const auto start = std::chrono::steady_clock::now();
    run();
    const std::chrono::duration<double, std::milli> time =
        std::chrono::steady_clock::now() - start;
    if (i >= 2) {
      times.push_back(time.count());
    }
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

} // namespace

int main() {
  torch::set_num_threads(1);
  const auto ids = torch::randint(1, 1000, {8, 64});
  const auto mask = torch::ones_like(ids);

  fmt::print("MiB held after the forward, and at most\n");
  fmt::print(
      "{:>6} {:>15} {:>15} {:>15}\n",
      "layers",
      "fine-tuning",
      "LoRA",
      "ladder");
  for (const int64_t depth : {4, 8, 12, 24}) {
    auto whole = make(depth);
    auto lora = make(depth);
    peft::attach(*lora, peft::LoraOptions(8).targets({"query", "value"}));
    auto side = make(depth);
    peft::attach(*side, ladder(depth));
    fmt::print(
        "{:>6} {} {} {}\n",
        depth,
        usage(whole, ids),
        usage(lora, ids),
        usage(side, ids));
  }

  const int64_t depth = 12;
  auto lora = make(depth);
  peft::attach(*lora, peft::LoraOptions(8).targets({"query", "value"}));
  auto side = make(depth);
  peft::attach(*side, ladder(depth));
  const auto folder =
      std::filesystem::temp_directory_path() / "peft-ladder-benchmark";
  peft::ActivationCache memory, disk(folder.string().c_str());
  const std::vector<int64_t> samples{0, 1, 2, 3, 4, 5, 6, 7};
  const auto step = [&](BertModel& model) {
    model->forward(ids, mask).square().sum().backward();
  };
  fmt::print("\nms a step, {} layers\n", depth);
  fmt::print("{:28} {:7.1f}\n", "LoRA", milliseconds([&] { step(lora); }));
  fmt::print("{:28} {:7.1f}\n", "ladder", milliseconds([&] { step(side); }));
  for (auto* cache : {&memory, &disk}) {
    const auto time = milliseconds([&] {
      const auto scope = cache->use(samples);
      step(side);
    });
    fmt::print(
        "{:28} {:7.1f}   {:.1f} MiB for {} samples\n",
        cache == &memory ? "ladder, cache in memory" : "ladder, cache on disk",
        time,
        static_cast<double>(cache->bytes()) / (1 << 20),
        samples.size());
  }
  std::filesystem::remove_all(folder);
}
