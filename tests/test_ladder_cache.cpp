/// The cache of what a frozen backbone makes, for ladder side tuning: what it
/// spares, that nothing else changes, and what it refuses.

#include "model_state.h"
#include "test.h"

#include <peft/io/safetensors.h>
#include <peft/methods/ladder.h>
#include <peft/methods/lora.h>
#include <peft/models/bert.h>
#include <peft/models/t5.h>

#include <ATen/record_function.h>

#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace test_ladder_cache {

namespace {

using namespace peft::models;
using peft::ActivationCache;
using peft::ActivationCacheOptions;
using peft::LadderOptions;
using torch::Tensor;

BertOptions options() {
  return BertOptions()
      .vocab_size(30)
      .hidden_size(16)
      .num_hidden_layers(4)
      .num_attention_heads(2)
      .intermediate_size(32)
      .max_position_embeddings(12)
      .num_labels(3)
      .pooling(Pooling::mean);
}

/// A classifier with a ladder beside its last two layers, in the mode that a
/// cache needs.
struct Classifier {
  Classifier() {
    seed(1);
    model = BertForSequenceClassification(options());
    adapter = peft::attach(*model, LadderOptions(4).layers({2, 3}));
    model->eval();
  }
  Tensor run(const Tensor& ids, const Tensor& mask) {
    return model->forward(ids, mask);
  }
  BertForSequenceClassification model{nullptr};
  peft::Adapter adapter;
};

struct Batch {
  Tensor ids, mask;
  std::vector<int64_t> samples;
};

/// Sample i has 3 + i % 4 tokens, always the same; padding goes to `length`.
Batch batch_of(
    const std::vector<int64_t>& samples,
    int64_t length,
    bool on_the_left = false) {
  const auto count = static_cast<int64_t>(samples.size());
  Batch batch{
      torch::zeros({count, length}, torch::kLong),
      torch::zeros({count, length}, torch::kLong),
      samples};
  for (int64_t b = 0; b < count; ++b) {
    const int64_t sample = samples[static_cast<size_t>(b)];
    const int64_t tokens = 3 + sample % 4;
    const int64_t begin = on_the_left ? length - tokens : 0;
    for (int64_t i = 0; i < tokens; ++i) {
      batch.ids[b][begin + i] = 1 + (7 * sample + 5 * i) % 29;
      batch.mask[b][begin + i] = 1;
    }
  }
  return batch;
}

thread_local int64_t products = 0;

/// How many linear maps `run` applies, by the operators behind them.
template <class Run>
int64_t products_of(Run&& run) {
  products = 0;
  const auto handle = at::addThreadLocalCallback(
      at::RecordFunctionCallback(
          [](const at::RecordFunction& operation)
              -> std::unique_ptr<at::ObserverContext> {
            const std::string name = operation.name();
            products += name == "aten::mm" || name == "aten::addmm";
            return nullptr;
          })
          .scopes({at::RecordScope::FUNCTION}));
  run();
  at::removeCallback(handle);
  return products;
}

/// A cache in memory, or in a folder.
struct Place {
  explicit Place(bool on_disk) {
    if (on_disk) {
      folder.emplace();
    }
  }
  ActivationCacheOptions options() const {
    return ActivationCacheOptions(folder ? *folder / "states" : "");
  }
  std::optional<TemporaryDirectory> folder;
};

} // namespace

TEST_CASE("known samples are answered without the layers", "[ladder]") {
  const bool on_disk = GENERATE(false, true);
  INFO((on_disk ? "on disk" : "in memory"));
  Place place(on_disk);
  ActivationCache cache(place.options());
  Classifier net;
  const auto batch = batch_of({0, 1, 2, 3}, 6);
  const auto plain = net.run(batch.ids, batch.mask);
  const auto forward = [&](const Batch& b) {
    const auto scope = cache.use(b.samples);
    return net.run(b.ids, b.mask);
  };
  REQUIRE(equal_bits(forward(batch), plain));
  REQUIRE(cache.size() == 4);
  REQUIRE(equal_bits(forward(batch), plain));

  // 6 in each layer and in each side block, 4 of the ladder, and the head.
  REQUIRE(products_of([&] {
            net.run(batch.ids, batch.mask);
          }) == 4 * 6 + 2 * 6 + 4 + 1);
  REQUIRE(products_of([&] { forward(batch); }) == 2 * 6 + 4 + 1);

  // Gradients are those of the plain run.
  const auto parameters = net.adapter.parameters();
  const auto expected = torch::autograd::grad(
      {net.run(batch.ids, batch.mask).square().sum()}, parameters);
  const auto found =
      torch::autograd::grad({forward(batch).square().sum()}, parameters);
  for (size_t i = 0; i < parameters.size(); ++i) {
    REQUIRE(equal_bits(found[i], expected[i]));
  }

  cache.clear();
  REQUIRE(cache.size() == 0);
  REQUIRE(cache.bytes() == 0);
  REQUIRE(equal_bits(forward(batch), plain));
}

TEST_CASE("samples are known in other batches too", "[ladder]") {
  const bool on_disk = GENERATE(false, true);
  Place place(on_disk);
  ActivationCache cache(place.options());
  Classifier net;
  const auto forward = [&](const Batch& b) {
    const auto scope = cache.use(b.samples);
    return net.run(b.ids, b.mask);
  };
  forward(batch_of({0, 1, 2, 3}, 6));
  forward(batch_of({4, 5, 6}, 7));
  REQUIRE(cache.size() == 7);
  for (const auto& batch :
       {batch_of({5, 1, 3}, 9),
        batch_of({6, 0}, 5),
        batch_of({2, 2, 3, 4, 5}, 8)}) {
    REQUIRE(close(forward(batch), net.run(batch.ids, batch.mask)));
  }
  REQUIRE(cache.size() == 7);
  // Only what is new is added.
  const auto mixed = batch_of({3, 8, 1, 9}, 6);
  REQUIRE(equal_bits(forward(mixed), net.run(mixed.ids, mixed.mask)));
  REQUIRE(cache.size() == 9);

  // Tokens only, of each three states of 16 numbers: what goes into the layers
  // and what comes out of the last two.
  int64_t tokens = 0;
  for (const int64_t sample : {0, 1, 2, 3, 4, 5, 6, 8, 9}) {
    tokens += 3 + sample % 4;
  }
  if (on_disk) {
    REQUIRE(cache.bytes() > tokens * 3 * 16 * 4);
    // Another process finds them.
    const ActivationCache again(place.options());
    REQUIRE(again.size() == 9);
    const auto plain = net.run(mixed.ids, mixed.mask);
    const auto scope = again.use(mixed.samples);
    Tensor found;
    REQUIRE(products_of([&] { found = net.run(mixed.ids, mixed.mask); }) == 17);
    REQUIRE(equal_bits(found, plain));
  } else {
    REQUIRE(cache.bytes() == tokens * 3 * 16 * 4);
  }
}

TEST_CASE("an adapter that reads more has it added", "[ladder]") {
  ActivationCache cache;
  Classifier net;
  const auto batch = batch_of({0, 1}, 6);
  const auto forward = [&] {
    const auto scope = cache.use(batch.samples);
    return net.run(batch.ids, batch.mask);
  };
  forward();
  const auto before = cache.bytes();
  net.adapter.disable();
  auto all = peft::attach(*net.model, LadderOptions(4), "all");
  const auto plain = net.run(batch.ids, batch.mask);
  REQUIRE(equal_bits(forward(), plain));
  REQUIRE(cache.bytes() == before / 3 * 5);
  REQUIRE(equal_bits(forward(), plain));
  all.detach();
  net.adapter.enable();
  forward();
  REQUIRE(cache.bytes() == before / 3 * 5);
}

TEST_CASE("half precision takes half the room", "[ladder]") {
  const bool on_disk = GENERATE(false, true);
  Place place(on_disk), half_place(on_disk);
  ActivationCache whole(place.options());
  ActivationCache half(half_place.options().dtype(torch::kHalf));
  Classifier net;
  // Long enough that a file's header matters little.
  const auto batch = batch_of({3, 7, 11}, 6);
  const auto plain = net.run(batch.ids, batch.mask);
  for (const auto& cache : {whole, half}) {
    for (int epoch = 0; epoch < 2; ++epoch) {
      const auto scope = cache.use(batch.samples);
      REQUIRE(close(net.run(batch.ids, batch.mask), plain, 1e-2, 1e-2));
    }
  }
  if (!on_disk) {
    REQUIRE(half.bytes() * 2 == whole.bytes());
  }
  REQUIRE(half.bytes() < whole.bytes());
  REQUIRE(contains(
      error_of([] {
        ActivationCache(ActivationCacheOptions().dtype(torch::kLong));
      }),
      "keeps floating point"));
}

TEST_CASE("encoder and decoder are remembered apart", "[ladder]") {
  const bool on_disk = GENERATE(false, true);
  Place place(on_disk);
  ActivationCache cache(place.options());
  seed(2);
  T5ForConditionalGeneration model(T5Options()
                                       .vocab_size(20)
                                       .d_model(8)
                                       .d_kv(4)
                                       .d_ff(16)
                                       .num_layers(2)
                                       .num_heads(2));
  auto adapter = peft::attach(*model, LadderOptions(2));
  model->eval();
  adapter.train(); // the side network's dropout is no obstacle
  const auto batch = batch_of({0, 1, 2}, 6);
  const auto ids = batch.ids.remainder(20);
  const auto answer = torch::randint(1, 20, {3, 4});
  const auto forward = [&] {
    seed(3); // of that dropout
    return model->forward(ids, batch.mask, answer);
  };
  const auto plain = forward();
  for (int epoch = 0; epoch < 2; ++epoch) {
    const auto scope = cache.use(batch.samples);
    REQUIRE(equal_bits(forward(), plain));
    REQUIRE(cache.size() == 6);
  }
}

TEST_CASE("a scope ends, nests and is the thread's own", "[ladder]") {
  ActivationCache cache, other;
  Classifier net;
  const auto batch = batch_of({0, 1}, 6);
  torch::NoGradGuard no_grad;
  {
    const auto scope = cache.use(batch.samples);
    {
      const auto inner = other.use(batch.samples);
      net.run(batch.ids, batch.mask);
    }
    REQUIRE(cache.size() == 0);
    std::thread([&] { net.run(batch.ids, batch.mask); }).join();
    REQUIRE(cache.size() == 0);
    net.run(batch.ids, batch.mask);
  }
  net.run(batch_of({2, 3, 4}, 6).ids, batch_of({2, 3, 4}, 6).mask);
  REQUIRE(cache.size() == 2);
  REQUIRE(other.size() == 2);
}

TEST_CASE("states that would be wrong are refused", "[ladder]") {
  const bool on_disk = GENERATE(false, true);
  INFO((on_disk ? "on disk" : "in memory"));
  Place place(on_disk);
  ActivationCache cache(place.options());
  Classifier net;
  const auto batch = batch_of({0, 1}, 6);
  const auto refused = [&](const Batch& b, const std::vector<int64_t>& ids) {
    return error_of([&] {
      const auto scope = cache.use(ids);
      net.run(b.ids, b.mask);
    });
  };
  REQUIRE(contains(refused(batch, {0}), "1 sample ids for a batch of 2"));
  net.model->train();
  REQUIRE(contains(refused(batch, {0, 1}), "call model->eval()"));
  REQUIRE(cache.size() == 0);
  net.model->eval();
  net.adapter.train();
  REQUIRE(refused(batch, {0, 1}).empty());

  // The ids of other samples, with as many tokens and with more.
  REQUIRE(contains(refused(batch_of({4, 5}, 6), {0, 1}), "another input"));
  REQUIRE(contains(refused(batch_of({2, 3}, 6), {0, 1}), "another input"));
  REQUIRE(refused(batch, {0, 1}).empty());

  // Another network, or this one with other weights.
  torch::NoGradGuard no_grad;
  auto& weight = net.model->bert->encoder->layer[1]
                     ->as<BertLayerImpl>()
                     ->output->dense->weight;
  const Tensor kept = weight.clone();
  weight.mul_(1.01);
  REQUIRE(contains(refused(batch, {0, 1}), "states of another network"));
  weight.copy_(kept);
  REQUIRE(refused(batch, {0, 1}).empty());
  auto lora = peft::attach(
      *net.model,
      peft::LoraOptions(2).init("random").targets({"query"}),
      "lora");
  randomise(lora);
  REQUIRE(contains(refused(batch, {0, 1}), "states of another network"));
  lora.detach();
  REQUIRE(refused(batch, {0, 1}).empty());
}

TEST_CASE("damaged and foreign files are refused", "[ladder]") {
  TemporaryDirectory folder;
  ActivationCache cache(folder / "states");
  Classifier net;
  const auto batch = batch_of({0}, 6);
  const auto run = [&] {
    return error_of([&] {
      const auto scope = cache.use(batch.samples);
      net.run(batch.ids, batch.mask);
    });
  };
  REQUIRE(run().empty());
  const auto path = std::filesystem::path(folder / "states") /
      "bert.encoder.layer_loop" / "0.states.safetensors";
  REQUIRE(std::filesystem::exists(path));
  const auto whole = [&] {
    std::ifstream stream(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(stream), {});
  }();
  const auto write = [&](const std::string& bytes) {
    std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
  };
  auto flipped = whole;
  flipped[whole.size() - 5] ^= 1;
  write(flipped);
  REQUIRE(contains(run(), "is damaged; remove it"));
  write(whole.substr(0, whole.size() - 7));
  REQUIRE(contains(run(), path.filename().string()));
  std::filesystem::remove(path); // a mapped file is not written over
  peft::save_safetensors({{"0", torch::zeros({3, 16})}}, path.string());
  REQUIRE(contains(run(), "is no file of an ActivationCache"));
  std::filesystem::remove(path);
  REQUIRE(run().empty());
  REQUIRE(run().empty());

  // clear() leaves what is not its own.
  std::ofstream(folder / "states/notes.txt") << "mine";
  cache.clear();
  REQUIRE(cache.size() == 0);
  REQUIRE(std::filesystem::exists(folder / "states/notes.txt"));
  REQUIRE(contains(
      error_of([&] { ActivationCache(folder / "states/notes.txt"); }),
      "cannot be made a folder"));
}

} // namespace test_ladder_cache
