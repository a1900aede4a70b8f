/// BatchAdapters: rows of one batch with different adapters are what each row
/// is alone, in values and in gradients, on every layer and network.

#include "adapted.h"
#include "model_state.h"
#include "test.h"

#include <peft/models/bert.h>
#include <peft/models/gpt2.h>
#include <peft/models/llama.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace test_batch_adapters {

using torch::Tensor;
using Names = std::vector<std::string>;
namespace nn = torch::nn;
namespace models = peft::models;

namespace {

/// A network and a batch for it.
struct Host {
  std::string name;
  std::shared_ptr<nn::Module> module;
  /// Runs rows [begin, end) of the batch.
  std::function<Tensor(int64_t, int64_t)> run;
  int64_t dim = 0;
  std::vector<Tensor> inputs; // that take gradients

  Tensor all() const {
    return run(0, kRows);
  }
  Tensor rows_of(const Tensor& y, int64_t row) const {
    return y.narrow(dim, row, 1);
  }

  static constexpr int64_t kRows = 7;
};

/// A module of one input, `[..., 7, ...]` with the batch in `dim`.
template <class Module>
Host layer(const std::string& name, Module module, Tensor x, int64_t dim = 0) {
  module->to(torch::kDouble);
  module->eval();
  if (x.is_floating_point()) {
    x = x.to(torch::kDouble).set_requires_grad(true);
  }
  Host host{
      name,
      module.ptr(),
      [=](int64_t begin, int64_t end) mutable {
        return module->forward(x.narrow(dim, begin, end - begin));
      },
      dim,
      {}};
  if (x.requires_grad()) {
    host.inputs.push_back(x);
  }
  return host;
}

/// Keys, queries and values from one input.
struct SelfAttentionImpl : nn::Module {
  nn::MultiheadAttention attention{
      register_module("attention", nn::MultiheadAttention(8, 2))};
  Tensor forward(const Tensor& x) {
    return std::get<0>(attention(x, x, x));
  }
};
TORCH_MODULE(SelfAttention);

/// Its weight is used as `[in, out]`, on a matrix of all tokens.
struct FlatImpl : nn::Module {
  Tensor weight{register_parameter("weight", torch::randn({6, 5}))};
  Tensor bias{register_parameter("bias", torch::randn({5}))};
  Tensor forward(const Tensor& x) {
    return at::addmm(bias, x.reshape({-1, x.size(-1)}), weight)
        .view({x.size(0), x.size(1), 5});
  }
};
TORCH_MODULE(Flat);

std::vector<Host> layers() {
  seed(3);
  const int64_t n = Host::kRows;
  std::vector<Host> hosts;
  hosts.push_back(layer("Linear, 2-D", nn::Linear(6, 5), torch::randn({n, 6})));
  hosts.push_back(
      layer("Linear, 3-D", nn::Linear(6, 5), torch::randn({n, 3, 6})));
  hosts.push_back(layer(
      "Linear, 3-D, sequence first",
      nn::Linear(6, 5),
      torch::randn({3, n, 6}),
      1));
  hosts.push_back(
      layer("Linear, 4-D", nn::Linear(6, 5), torch::randn({n, 2, 3, 6})));
  hosts.push_back(layer(
      "Linear without bias",
      nn::Linear(nn::LinearOptions(6, 5).bias(false)),
      torch::randn({n, 3, 6})));
  hosts.push_back(layer("flattened", Flat(), torch::randn({n, 3, 6})));
  hosts.push_back(
      layer("flattened, sequence first", Flat(), torch::randn({3, n, 6}), 1));
  hosts.push_back(layer(
      "Embedding",
      nn::Embedding(9, 5),
      torch::randint(9, {n, 4}, torch::kLong)));
  hosts.push_back(layer(
      "Embedding, 1-D",
      nn::Embedding(9, 5),
      torch::randint(9, {n}, torch::kLong)));
  hosts.push_back(layer(
      "Embedding, sequence first",
      nn::Embedding(9, 5),
      torch::randint(9, {4, n}, torch::kLong),
      1));
  hosts.push_back(
      layer("Conv1d", nn::Conv1d(4, 6, 3), torch::randn({n, 4, 8})));
  hosts.push_back(layer(
      "Conv2d",
      nn::Conv2d(nn::Conv2dOptions(4, 6, 3).padding(1)),
      torch::randn({n, 4, 5, 5})));
  hosts.push_back(
      layer("Conv3d", nn::Conv3d(2, 4, 2), torch::randn({n, 2, 3, 3, 3})));
  hosts.push_back(
      layer("MultiheadAttention", SelfAttention(), torch::randn({4, n, 8}), 1));
  hosts.push_back(layer(
      "TransformerEncoder",
      nn::TransformerEncoder(
          nn::TransformerEncoderLayer(
              nn::TransformerEncoderLayerOptions(8, 2).dim_feedforward(12)),
          2),
      torch::randn({4, n, 8}),
      1));
  return hosts;
}

/// A network of token ids and a padded batch.
template <class Model>
Host network(const std::string& name, Model model) {
  torch::manual_seed(5);
  const int64_t n = Host::kRows;
  const Tensor ids = torch::randint(4, 40, {n, 6}, torch::kLong);
  const Tensor mask = torch::ones({n, 6}, torch::kLong);
  mask[1].slice(0, 4).zero_();
  mask[4].slice(0, 2).zero_();
  model->to(torch::kDouble);
  model->eval();
  const auto run = [=](int64_t begin, int64_t end) mutable {
    return model->forward(ids.slice(0, begin, end), mask.slice(0, begin, end));
  };
  return {name, model.ptr(), run, 0, {}};
}

std::vector<Host> all_networks() {
  seed(4);
  std::vector<Host> hosts;
  hosts.push_back(network(
      "BERT",
      models::BertForSequenceClassification(models::BertOptions()
                                                .vocab_size(40)
                                                .hidden_size(16)
                                                .num_hidden_layers(2)
                                                .num_attention_heads(2)
                                                .intermediate_size(32)
                                                .max_position_embeddings(32))));
  hosts.push_back(network(
      "GPT-2",
      models::Gpt2ForCausalLM(models::Gpt2Options()
                                  .vocab_size(40)
                                  .n_positions(32)
                                  .n_embd(16)
                                  .n_layer(2)
                                  .n_head(2))));
  hosts.push_back(network(
      "LLaMA",
      models::LlamaForCausalLM(models::LlamaOptions()
                                   .vocab_size(40)
                                   .hidden_size(16)
                                   .intermediate_size(24)
                                   .num_hidden_layers(2)
                                   .num_attention_heads(4)
                                   .num_key_value_heads(2))));
  return hosts;
}

template <class Options>
peft::Adapter
hang(const Host& host, const Options& options, const std::string& name) {
  auto adapter = peft::attach(*host.module, options, name);
  randomise(adapter, name[0]); // no two alike
  adapter.disable(); // which must not matter
  return adapter;
}

peft::LoraOptions lora(int64_t r) {
  return peft::LoraOptions(r).alpha(3).targets(
      peft::Targets::where([](const std::string&, const nn::Module& m) {
        return !m.named_parameters(/*recurse=*/false).is_empty() &&
            m.as<nn::LayerNormImpl>() == nullptr;
      }));
}

const std::vector<Names> kBatches{
    {"a", "a", "b", "b", "b", "c", "__base__"}, // each stands together
    {"b", "a", "c", "b", "__base__", "a", "b"},
    {"__base__", "unknown", "a", "a", "unknown", "__base__", "__base__"}};

/// The rows one by one, each with its own adapter alone.
Tensor one_by_one(const Host& host, const Names& names) {
  std::vector<Tensor> rows;
  for (int64_t i = 0; i < Host::kRows; ++i) {
    const peft::ActiveAdapters alone({names[i]});
    rows.push_back(host.run(i, i + 1));
  }
  return at::cat(rows, host.dim);
}

Tensor mixed(const Host& host, const Names& names) {
  const peft::BatchAdapters scope(names, host.dim);
  return host.all();
}

/// Values with and without gradients, and the gradients.
void check_rows(const Host& host) {
  std::vector<Tensor> inputs = host.inputs;
  for (const auto& p : host.module->parameters()) {
    if (p.requires_grad()) {
      inputs.push_back(p);
    }
  }
  REQUIRE(inputs.size() > host.inputs.size());
  for (const auto& names : kBatches) {
    INFO(names);
    const Tensor expected = one_by_one(host, names);
    const Tensor y = mixed(host, names);
    REQUIRE(close(y, expected));
    CHECK(adapted::all_close(
        adapted::gradients(y, inputs), adapted::gradients(expected, inputs)));
    {
      const torch::NoGradGuard no_grad;
      CHECK(close(mixed(host, names), expected));
    }
    const peft::ActiveAdapters none(Names{});
    CHECK_FALSE(torch::allclose(y, host.all())); // some adapter acted
  }
}

} // namespace

TEST_CASE("Each row of a mixed batch is what it is alone: LoRA", "[batch]") {
  for (auto& host : layers()) {
    INFO(host.name);
    const auto a = hang(host, lora(2), "a");
    const auto b = hang(host, lora(4), "b");
    const auto c = hang(host, lora(2), "c");
    check_rows(host);
  }
}

TEST_CASE(
    "Each row of a mixed batch is what it is alone: LoRA, BitFit and "
    "(IA)3",
    "[batch]") {
  for (auto& host : layers()) {
    if (host.name.find("Embedding") != std::string::npos ||
        host.name == "Linear without bias") {
      continue; // nothing for BitFit
    }
    INFO(host.name);
    const auto a = hang(host, peft::BitFitOptions(), "a");
    const auto b = hang(host, lora(2), "b");
    const bool has_ia3 = host.name.find("Linear") == 0;
    const auto c = has_ia3
        ? hang(
              host,
              peft::Ia3Options().targets(peft::Targets::all_linear()),
              "c")
        : hang(host, lora(4), "c");
    check_rows(host);
  }
}

TEST_CASE(
    "Each row of a mixed batch is what it is alone: networks",
    "[batch]") {
  const auto pairs =
      [](Host& host, const auto& a, const auto& b, const auto& c) {
        INFO(host.name);
        auto one = hang(host, a, "a");
        auto two = hang(host, b, "b");
        auto three = hang(host, c, "c");
        check_rows(host);
        one.detach();
        two.detach();
        three.detach();
      };
  for (auto& host : all_networks()) {
    pairs(
        host,
        peft::LoraOptions(2),
        peft::LoraOptions(4).targets(peft::Targets::all_linear()),
        peft::Ia3Options());
    pairs(
        host,
        peft::HoulsbyOptions(4),
        peft::LoraOptions(2).dora(true),
        peft::ParallelAdapterOptions(4));
    if (host.name != "BERT") { // Pfeiffer acts in their loop over layers
      continue;
    }
    pairs(
        host,
        peft::BitFitOptions(),
        peft::PfeifferOptions(4),
        peft::HoulsbyOptions(2));
  }
}

TEST_CASE(
    "Rows without an adapter of theirs are the base's to the bit",
    "[batch]") {
  const torch::NoGradGuard no_grad;
  seed();
  nn::Embedding table(9, 5);
  nn::LayerNorm norm(nn::LayerNormOptions({6}));
  norm->weight.uniform_();
  const Tensor ids = torch::randint(9, {4, 3}, torch::kLong);
  const Tensor x = torch::randn({4, 3, 6});
  const Tensor base = table(ids), normed = norm(x);
  randomise(peft::attach(
      *table, peft::LoraOptions(2).targets({""}).init("random"), "a"));
  randomise(peft::attach(*norm, peft::BitFitOptions(), "b"));
  Tensor alone;
  {
    const peft::ActiveAdapters b({"b"});
    alone = norm(x);
  }
  const peft::BatchAdapters scope({"__base__", "a", "b", "unknown"});
  const Tensor y = table(ids), z = norm(x);
  for (const int64_t row : {0, 2, 3}) {
    CHECK(equal_bits(y[row], base[row]));
  }
  CHECK_FALSE(equal_bits(y[1], base[1]));
  CHECK(equal_bits(z[2], alone[2]));
  for (const int64_t row : {0, 1, 3}) {
    CHECK(equal_bits(z[row], normed[row]));
  }
}

TEST_CASE(
    "float32 without gradients: LoRA adds to its rows in place",
    "[batch]") {
  const torch::NoGradGuard no_grad;
  for (const auto& sizes : std::vector<std::vector<int64_t>>{
           {8, 48}, {8, 1, 48}, {8, 5, 48}, {1, 8, 48}, {4, 8, 48}}) {
    const int64_t dim = sizes.size() == 3 && sizes[1] == 8 ? 1 : 0;
    INFO(sizes);
    seed();
    nn::Linear linear(48, 37);
    for (const char* name : {"a", "b", "c"}) {
      randomise(
          peft::attach(
              *linear, peft::LoraOptions(3).alpha(2).targets({""}), name),
          name[0]);
    }
    const auto ia3 = peft::attach(
        *linear, peft::Ia3Options().targets({""}).feedforward({""}), "d");
    randomise(ia3);
    const Tensor x = torch::randn(sizes);
    const Names names{"b", "a", "a", "__base__", "d", "b", "c", "d"};
    std::vector<Tensor> rows;
    for (int64_t i = 0; i < 8; ++i) {
      const peft::ActiveAdapters alone({names[i]});
      rows.push_back(linear(x.narrow(dim, i, 1)));
    }
    for (const bool with_ia3 : {true, false}) {
      auto all = names;
      auto expected = rows;
      if (!with_ia3) { // nothing but rows that are added to
        const peft::ActiveAdapters none(Names{});
        for (const int64_t i : {4, 7}) {
          all[i] = "__base__";
          expected[i] = linear(x.narrow(dim, i, 1));
        }
      }
      const peft::BatchAdapters scope(all, dim);
      Tensor y;
      const auto called = adapted::operator_names([&] { y = linear(x); });
      CHECK(close(y, at::cat(expected, dim), 1e-6, 1e-6));
      if (!with_ia3 && dim == 0) {
        for (const char* copies : {"aten::cat", "aten::index_select"}) {
          CHECK(std::count(called.begin(), called.end(), copies) == 0);
        }
      }
      // A change of the factors is seen.
      auto& delta = adapted::lora(peft::adapters(*linear)[0]);
      delta.lora_B.mul_(-1);
      const Tensor changed = linear(x);
      {
        const peft::ActiveAdapters alone({"a"});
        CHECK(close(
            changed.narrow(dim, 1, 2),
            linear(x.narrow(dim, 1, 2)),
            1e-6,
            1e-6));
      }
      delta.lora_B.mul_(-1);
    }
  }
}

TEST_CASE("In a mixed batch the frozen network runs once", "[batch]") {
  seed();
  nn::Conv2d conv(3, 4, 3);
  for (const char* name : {"a", "b", "c"}) {
    peft::attach(*conv, peft::LoraOptions(2).targets({""}), name);
  }
  const Tensor x = torch::randn({4, 3, 6, 6});
  const peft::BatchAdapters scope({"a", "b", "c", "__base__"});
  const auto called = adapted::operator_names([&] { conv(x); });
  // One for the base; for each adapter, one for A and one for B.
  CHECK(std::count(called.begin(), called.end(), "aten::conv2d") == 1 + 1 + 6);
}

TEST_CASE(
    "Scopes nest, and names that agree are an ActiveAdapters",
    "[batch]") {
  seed();
  nn::Linear linear(4, 4);
  const auto a = peft::attach(*linear, adapted::acting(), "a");
  const auto b = peft::attach(*linear, adapted::acting(), "b");
  const Tensor x = torch::randn({2, 4});
  const auto alone = [&](const Names& names) {
    const peft::ActiveAdapters scope(names);
    return linear(x);
  };
  const Tensor both = linear(x);
  {
    const peft::BatchAdapters outer({"a", "b"});
    const Tensor y = linear(x);
    CHECK(close(y[0], alone({"a"})[0]));
    CHECK(close(y[1], alone({"b"})[1]));
    {
      const peft::BatchAdapters inner({"b", "__base__"});
      const Tensor z = linear(x);
      CHECK(close(z[0], alone({"b"})[0]));
      CHECK(close(z[1], alone({})[1]));
    }
    CHECK(equal_bits(linear(x), y));
    {
      const peft::ActiveAdapters inner({"a"});
      CHECK(equal_bits(linear(x), alone({"a"})));
    }
  }
  {
    const peft::BatchAdapters same({"b", "b"});
    CHECK(equal_bits(linear(x), alone({"b"})));
    CHECK(equal_bits(peft::effective(linear->weight), [&] {
      const peft::ActiveAdapters scope({"b"});
      return peft::effective(linear->weight);
    }()));
  }
  {
    const peft::BatchAdapters base({"__base__", "__base__"});
    CHECK(equal_bits(linear(x), alone({})));
  }
  CHECK(equal_bits(linear(x), both));
}

TEST_CASE("Mixed batches run in many threads at once", "[batch]") {
  const torch::NoGradGuard no_grad;
  auto host = all_networks()[0];
  const auto a = hang(host, peft::LoraOptions(2), "a");
  const auto b = hang(host, peft::HoulsbyOptions(4), "b");
  const auto c = hang(host, peft::BitFitOptions(), "c");
  const auto before = state_of(*host.module);
  std::vector<Tensor> expected;
  for (const auto& names : kBatches) {
    expected.push_back(one_by_one(host, names));
  }
  std::vector<std::thread> threads;
  std::vector<int> wrong(8, 0);
  for (size_t i = 0; i < wrong.size(); ++i) {
    threads.emplace_back([&, i] {
      const torch::NoGradGuard none;
      for (size_t k = 0; k < 6; ++k) {
        const size_t j = (i + k) % kBatches.size();
        wrong[i] += close(mixed(host, kBatches[j]), expected[j]).agree ? 0 : 1;
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  CHECK(wrong == std::vector<int>(8, 0));
  CHECK(same_state(state_of(*host.module), before));
}

TEST_CASE("What a mixed batch cannot do is said", "[batch]") {
  const auto message = [](const Names& names, int64_t dim, const auto& run) {
    return error_of([&] {
      const peft::BatchAdapters scope(names, dim);
      run();
    });
  };
  const auto nothing = [] {};
  CHECK(contains(message({}, 0, nothing), "one name for each row"));
  CHECK(contains(message({"a"}, 2, nothing), "in dimension 0, or in 1"));

  seed();
  nn::Linear linear(4, 4);
  auto a = peft::attach(*linear, adapted::acting(), "a");
  const auto b = peft::attach(*linear, adapted::acting(), "b");
  const auto forward = [&](at::IntArrayRef sizes) {
    return [&linear, size = sizes.vec()] { linear(torch::randn(size)); };
  };
  const Names three{"a", "b", "a"};
  CHECK(message(three, 0, forward({3, 5, 4})) == "");
  CHECK(message(three, 1, forward({5, 3, 4})) == "");
  CHECK(message(three, 0, forward({6, 4})) == "");
  const auto wrong = message(three, 0, forward({5, 3, 4}));
  CHECK(contains(wrong, "names 3 rows with the batch in dimension 0"));
  CHECK(contains(wrong, "[5, 3, 4]"));
  CHECK(contains(wrong, "one name for each row"));
  CHECK(contains(wrong, "/*dim=*/1"));
  CHECK(contains(message(three, 1, forward({3, 5, 4})), "[3, 5, 4]"));
  CHECK(contains(message(three, 0, forward({7, 4})), "no multiple"));
  CHECK(contains(message(three, 0, forward({4})), "no multiple"));
  // No adapter of the batch acts here: the sizes are not asked.
  CHECK(message({"x", "y", "z"}, 0, forward({5, 3, 4})) == "");

  CHECK(contains(
      message(three, 0, [&] { peft::effective(linear->weight); }),
      "does not tell the rows apart"));
  CHECK(contains(
      message(three, 0, [&] { peft::merge(*linear); }),
      "leave the ActiveAdapters scope first"));

  a.merge();
  const auto merged = message(three, 0, forward({3, 4}));
  CHECK(contains(merged, "adapter 'a' is merged"));
  CHECK(contains(merged, "unmerge()"));
  CHECK(contains(
      message({"b", "__base__"}, 0, forward({2, 4})), "'a' is merged"));
  CHECK(message({"a", "a"}, 0, forward({2, 4})) == "");
  a.unmerge();
  CHECK(message(three, 0, forward({3, 4})) == "");

  nn::Conv2d conv(2, 3, 3);
  peft::attach(*conv, peft::LoraOptions(2).targets({""}), "a");
  const auto image = [&](at::IntArrayRef sizes) {
    return [&conv, size = sizes.vec()] { conv(torch::randn(size)); };
  };
  const Names two{"a", "b"};
  CHECK(message(two, 1, image({2, 2, 5, 5})) == ""); // the batch is in front
  CHECK(contains(message(two, 0, image({4, 2, 5, 5})), "[4, 2, 5, 5]"));
  CHECK(contains(message(two, 0, image({2, 5, 5})), "[2, 5, 5]"));

  nn::LSTM lstm(4, 4);
  peft::attach(*lstm, peft::LoraOptions(2).targets({"weight_ih_l0"}), "a");
  CHECK(contains(
      message(
          two,
          1,
          [&] {
            lstm(torch::randn({3, 2, 4}));
          }),
      "does not tell the rows apart"));
}

TEST_CASE("Call sites take no mixed batch", "[batch]") {
  auto host = all_networks()[0];
  const torch::NoGradGuard no_grad;
  const auto lora = hang(host, peft::LoraOptions(2), "lora");
  const auto prompt = hang(host, peft::PromptOptions(3), "prompt");
  const auto coda =
      hang(host, peft::CodaOptions().ratio(0.5).bottleneck(4), "coda");
  Names names(Host::kRows, "lora");
  names[3] = "__base__";
  CHECK(error_of([&] { mixed(host, names); }) == "");
  for (const char* name : {"prompt", "coda"}) {
    names[2] = name;
    const auto message = error_of([&] { mixed(host, names); });
    CHECK(contains(message, "adapter '" + std::string(name) + "'"));
    CHECK(contains(message, "which all rows share"));
    CHECK(contains(message, "ActiveAdapters"));
  }
  const Names all(Host::kRows, "prompt");
  CHECK(close(mixed(host, all), one_by_one(host, all)));
}

} // namespace test_batch_adapters
