// What the library's own calls cost, by Google Benchmark: attaching, the
// forward of a small layer in every state, merging, files. Absolute processor
// times; adapted_linear.cpp has the ratios of the small layer.
//
//   library [--benchmark_filter=REGEX] ...

#include <peft/models/bert.h>
#include <peft/peft.h>
#include <torch/torch.h>

#include <benchmark/benchmark.h>

#include <filesystem>
#include <string>

namespace {

using peft::models::BertModel;
using peft::models::BertOptions;

peft::LoraOptions lora(const peft::Targets& targets) {
  return peft::LoraOptions(8).init("random").targets(targets);
}

/// `layers` layers of BERT-base's shape, frozen, with few words.
BertModel bert(int64_t layers) {
  BertModel model(
      BertOptions().vocab_size(100).num_hidden_layers(layers).add_pooling_layer(
          false));
  for (auto& p : model->parameters()) {
    p.set_requires_grad(false);
  }
  return model;
}

/// 64 -> 64, one row: every microsecond is overhead.
struct Small {
  Small() {
    for (auto& p : layer->parameters()) {
      p.set_requires_grad(false);
    }
  }
  torch::nn::Linear layer{64, 64};
  torch::Tensor x = torch::randn({1, 64});
};

void forward(benchmark::State& state, Small& small) {
  torch::NoGradGuard no_grad;
  for (auto _ : state) {
    benchmark::DoNotOptimize(small.layer(small.x));
  }
}

void forward_frozen(benchmark::State& state) {
  Small small;
  forward(state, small);
}
void forward_adapted(benchmark::State& state) {
  Small small;
  peft::attach(*small.layer, lora({""}));
  forward(state, small);
}
void forward_disabled(benchmark::State& state) {
  Small small;
  peft::attach(*small.layer, lora({""})).disable();
  forward(state, small);
}
void forward_merged(benchmark::State& state) {
  Small small;
  peft::attach(*small.layer, lora({""}));
  peft::merge(*small.layer);
  forward(state, small);
}
void step_adapted(benchmark::State& state) {
  Small small;
  auto adapter = peft::attach(*small.layer, lora({""}));
  for (auto _ : state) {
    for (auto& p : adapter.parameters()) {
      p.mutable_grad() = torch::Tensor();
    }
    small.layer(small.x).sum().backward();
  }
}
BENCHMARK(forward_frozen);
BENCHMARK(forward_adapted);
BENCHMARK(forward_disabled);
BENCHMARK(forward_merged);
BENCHMARK(step_adapted);

void attach_and_detach(benchmark::State& state) {
  auto model = bert(state.range(0));
  for (auto _ : state) {
    auto adapter = peft::attach(*model, lora({"query", "value"}));
    adapter.detach();
  }
}
BENCHMARK(attach_and_detach)->Arg(1)->Arg(12)->Unit(benchmark::kMicrosecond);

void merge_for_good(benchmark::State& state) {
  const auto width = state.range(0);
  torch::nn::Linear layer(width, width);
  const auto original = layer->weight.detach().clone();
  for (auto _ : state) {
    state.PauseTiming();
    peft::attach(*layer, lora({""}));
    state.ResumeTiming();
    peft::merge(*layer);
    state.PauseTiming();
    layer->weight.detach().copy_(original);
    state.ResumeTiming();
  }
  state.SetBytesProcessed(
      state.iterations() * 2 * static_cast<int64_t>(original.nbytes()));
}
void merge_and_unmerge(benchmark::State& state) {
  const auto width = state.range(0);
  torch::nn::Linear layer(width, width);
  auto adapter = peft::attach(*layer, lora({""}));
  for (auto _ : state) {
    adapter.merge();
    adapter.unmerge();
  }
}
BENCHMARK(merge_for_good)->Arg(768)->Arg(4096)->Unit(benchmark::kMicrosecond);
BENCHMARK(merge_and_unmerge)->Arg(768)->Unit(benchmark::kMicrosecond);

/// An adapter of 5 MB in a folder that goes with it.
struct Folder {
  Folder() {
    peft::save(adapter, path);
  }
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path, ignored);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  std::string path =
      (std::filesystem::temp_directory_path() / "peft-library-benchmark")
          .string();
  BertModel model = bert(12);
  peft::Adapter adapter =
      peft::attach(*model, lora({"query", "key", "value", "dense"}));
};

void save(benchmark::State& state) {
  Folder folder;
  for (auto _ : state) {
    peft::save(folder.adapter, folder.path);
  }
}
void load(benchmark::State& state) {
  Folder folder;
  folder.adapter.detach();
  for (auto _ : state) {
    auto adapter = peft::load(*folder.model, folder.path);
    state.PauseTiming();
    adapter.detach();
    state.ResumeTiming();
  }
}
BENCHMARK(save)->Unit(benchmark::kMillisecond);
BENCHMARK(load)->Unit(benchmark::kMillisecond);

} // namespace

int main(int argc, char** argv) {
  torch::set_num_threads(1);
  torch::manual_seed(0);
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) {
    return 1;
  }
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
