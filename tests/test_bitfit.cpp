/// BitFit: which biases each word means, and that nothing else moves.

#include "adapted.h"
#include "model_state.h"
#include "networks.h"
#include "test.h"

#include <string>
#include <utility>
#include <vector>

namespace test_bitfit {

namespace {

using peft::BitFitOptions;
using peft::LoraOptions;
using torch::Tensor;
using Names = std::vector<std::string>;
namespace F = torch::nn::functional;

constexpr int64_t kWidth = 8;

peft::models::BertForSequenceClassification small_bert() {
  return peft::models::BertForSequenceClassification(
      peft::models::BertOptions()
          .vocab_size(20)
          .hidden_size(kWidth)
          .num_hidden_layers(2)
          .num_attention_heads(2)
          .intermediate_size(4 * kWidth)
          .max_position_embeddings(8));
}

torch::nn::TransformerEncoder small_transformer() {
  return torch::nn::TransformerEncoder(torch::nn::TransformerEncoderOptions(
      torch::nn::TransformerEncoderLayerOptions(kWidth, 2)
          .dim_feedforward(16)
          .dropout(0),
      2));
}

Names in_layers(const std::string& stack, const Names& names) {
  Names result;
  for (const char* i : {"0", "1"}) {
    for (const auto& name : names) {
      result.push_back(stack + "." + i + "." + name);
    }
  }
  return result;
}

Names sorted(Names names) {
  std::sort(names.begin(), names.end());
  return names;
}

} // namespace

TEST_CASE("each word of BitFit on BERT") {
  const int64_t d = kWidth;
  const std::string stack = "bert.encoder.layer";
  const Names query = in_layers(stack, {"attention.self.query.bias"});
  const Names key = in_layers(stack, {"attention.self.key.bias"});
  const Names value = in_layers(stack, {"attention.self.value.bias"});
  const Names attention = in_layers(stack, {"attention.output.dense.bias"});
  const Names intermediate = in_layers(stack, {"intermediate.dense.bias"});
  const Names output = in_layers(stack, {"output.dense.bias"});
  Names norms = in_layers(
      stack, {"attention.output.LayerNorm.bias", "output.LayerNorm.bias"});
  norms.push_back("bert.embeddings.LayerNorm.bias");
  const auto join = [](std::vector<Names> parts) {
    Names all;
    for (auto& part : parts) {
      all.insert(all.end(), part.begin(), part.end());
    }
    return all;
  };
  const Names all = join(
      {query,
       key,
       value,
       attention,
       intermediate,
       output,
       norms,
       {"bert.pooler.dense.bias", "classifier.bias"}});

  struct Row {
    BitFitOptions options;
    Names expected;
    int64_t count;
  };
  const std::vector<Row> rows{
      {BitFitOptions({"query"}), query, 2 * d},
      {BitFitOptions({"key"}), key, 2 * d},
      {BitFitOptions({"value"}), value, 2 * d},
      {BitFitOptions({"attention_output"}), attention, 2 * d},
      {BitFitOptions({"intermediate"}), intermediate, 2 * 4 * d},
      {BitFitOptions({"output"}), output, 2 * d}, // not attention.output
      {BitFitOptions({"layer_norm"}), norms, 2 * 2 * d + d},
      {BitFitOptions({"query_intermediate"}),
       join({query, intermediate}),
       2 * 5 * d},
      {BitFitOptions({"intermediate", "query", "query_intermediate"}),
       join({query, intermediate}),
       2 * 5 * d},
      {BitFitOptions({"key", "layer_norm"}), join({key, norms}), 2 * 3 * d + d},
      // 11 d a layer, the embeddings' norm, the pooler, the head
      {BitFitOptions(), all, 2 * 11 * d + d + d + 2},
      {BitFitOptions({"all", "query"}), all, 2 * 11 * d + d + d + 2},
      {BitFitOptions().targets("bert.encoder.layer.1.attention.self.key"),
       {key[1]},
       d},
      {BitFitOptions({"query", "value"})
           .targets(peft::Targets::regex(".*layer\\.0.*")),
       {query[0], value[0]},
       2 * d},
      {BitFitOptions({"query_intermediate"}).modules_to_save({"classifier"}),
       join({query, intermediate, {"classifier.weight", "classifier.bias"}}),
       2 * 5 * d + 2 * d + 2},
      {BitFitOptions().modules_to_save({"classifier"}),
       join({all, {"classifier.weight"}}),
       2 * 11 * d + d + d + 2 + 2 * d}};
  for (const auto& row : rows) {
    std::string words;
    for (const auto& word : row.options.biases()) {
      words += word + " ";
    }
    INFO(words);
    auto model = small_bert();
    const auto total = peft::count_parameters(*model).total;
    auto adapter = peft::attach(*model, row.options);
    CHECK(sorted(adapter.named_parameters().keys()) == sorted(row.expected));
    CHECK(adapter.num_parameters() == row.count);
    CHECK(adapter.method() == "BITFIT");
    const auto count = peft::count_parameters(*model);
    CHECK(count.trainable == row.count);
    CHECK(count.total == total); // copies stand in, they do not add
  }
}

TEST_CASE("BitFit gives packed projections up by rows") {
  const int64_t d = kWidth;
  struct Row {
    std::string name;
    BitFitOptions options;
    std::vector<bool> rows; // of q, k, v
    int64_t count; // a layer
  };
  const std::vector<Row> rows{
      {"query", BitFitOptions({"query"}), {true, false, false}, d},
      {"key", BitFitOptions({"key"}), {false, true, false}, d},
      {"value", BitFitOptions({"value"}), {false, false, true}, d},
      {"q, v", BitFitOptions({"value", "query"}), {true, false, true}, 2 * d},
      {"twice", BitFitOptions({"query", "query"}), {true, false, false}, d},
      {"the pair",
       BitFitOptions({"query_intermediate"}),
       {true, false, false},
       d + 16},
      {"the pair and query",
       BitFitOptions({"query", "query_intermediate"}),
       {true, false, false},
       d + 16},
      {"attention_output",
       BitFitOptions({"attention_output"}),
       {false, false, false},
       d},
      {"output", BitFitOptions({"output"}), {false, false, false}, d},
      {"norms", BitFitOptions({"layer_norm"}), {false, false, false}, 2 * d},
      {"all", BitFitOptions(), {true, true, true}, 3 * d + d + 16 + d + 2 * d},
      {"all and query",
       BitFitOptions({"all", "query"}),
       {true, true, true},
       3 * d + d + 16 + d + 2 * d}};
  for (const auto& row : rows) {
    INFO(row.name);
    seed(3);
    auto model = small_transformer();
    const Tensor x = torch::randn({4, 2, kWidth});
    const Tensor before = model->forward(x);
    auto adapter = peft::attach(*model, row.options);
    CHECK(adapter.num_parameters() == 2 * row.count);
    CHECK(equal_bits(model->forward(x), before));

    torch::optim::SGD optimizer(model->parameters(), 0.5);
    const auto frozen = state_of(*model);
    model->forward(x).pow(3).sum().backward();
    for (const auto& p : model->named_parameters()) {
      INFO(p.key());
      CHECK(p.value().grad().defined() == p.value().requires_grad());
    }
    optimizer.step();
    const auto* layer =
        model->layers->ptr(1)->as<torch::nn::TransformerEncoderLayerImpl>();
    const Tensor packed = layer->self_attn->in_proj_bias;
    const auto was = peft::base(packed).chunk(3);
    const auto is = peft::effective(packed).detach().chunk(3);
    for (size_t i = 0; i < 3; ++i) {
      INFO("block " << i);
      // A key's bias shifts all scores of a query alike: no gradient.
      if (i == 1 && row.rows[i]) {
        CHECK(close(is[i], was[i]));
      } else {
        CHECK(equal_bits(is[i], was[i]).agree != row.rows[i]);
      }
    }
    for (const auto& p : peft::detail::base_parameters(*model)) {
      CHECK_FALSE(p.second.grad().defined());
    }

    const Tensor trained = model->forward(x).detach();
    CHECK_FALSE(equal_bits(trained, before));
    adapter.disable();
    CHECK(equal_bits(model->forward(x), before));
    adapter.enable();
    CHECK(equal_bits(model->forward(x), trained));
    adapter.merge();
    {
      torch::NoGradGuard no_grad;
      CHECK(equal_bits(model->forward(x), trained));
    }
    adapter.unmerge();
    CHECK(equal_bits(model->forward(x), trained));

    TemporaryDirectory folder; // rows are saved and read back as well
    peft::save(adapter, folder / "adapter");
    adapter.detach();
    CHECK(equal_bits(model->forward(x), before));
    peft::load(*model, folder / "adapter");
    CHECK(equal_bits(model->forward(x), trained));
    peft::merge(*model);
    CHECK(equal_bits(model->forward(x), trained));
  }
}

TEST_CASE("BitFit trains copies and restores the base to the bit") {
  for (const auto dtype :
       {torch::kFloat, torch::kDouble, torch::kBFloat16, torch::kHalf}) {
    INFO(dtype);
    seed(4);
    networks::Mlp model;
    model.to(dtype);
    model.fc2->bias.set_requires_grad(false); // to be restored as well
    const Tensor x = torch::randn({5, 10}).to(dtype);
    const Tensor before = model.forward(x);
    const auto plain = state_of(model);

    auto adapter = peft::attach(model, BitFitOptions());
    const bool reduced = c10::isReducedFloatingType(dtype);
    for (const auto& p : adapter.parameters()) {
      CHECK(p.scalar_type() == (reduced ? torch::kFloat : dtype));
    }
    randomise(adapter);
    const Tensor acting = model.forward(x);
    CHECK(acting.scalar_type() == dtype);
    CHECK_FALSE(equal_bits(acting, before));
    const auto values = adapter.named_parameters();
    const auto layer = [&](const torch::nn::Linear& base,
                           const std::string& name,
                           const Tensor& input) {
      return at::linear(
          input,
          base->weight.detach(),
          values[name + ".bias"].detach().to(dtype));
    };
    const Tensor h1 = torch::tanh(layer(model.fc1, "fc1", x));
    const Tensor h2 = torch::tanh(layer(model.fc2, "fc2", h1));
    CHECK(equal_bits(acting, layer(model.head, "head", h2)));

    acting.sum().backward();
    for (const auto& p : model.named_parameters(/*recurse=*/true)) {
      INFO(p.key());
      CHECK(p.value().grad().defined() == p.value().requires_grad());
    }
    for (const auto& base : {model.fc1, model.fc2, model.head}) {
      CHECK_FALSE(base->weight.grad().defined());
      CHECK_FALSE(base->bias.grad().defined());
    }

    const auto attached = state_of(model);
    adapter.merge();
    {
      torch::NoGradGuard no_grad;
      CHECK(equal_bits(model.forward(x), acting));
      CHECK(equal_bits(
          peft::base(model.fc1->bias), values["fc1.bias"].to(dtype)));
    }
    adapter.unmerge();
    CHECK(same_state(state_of(model), attached));
    adapter.disable();
    CHECK(equal_bits(model.forward(x), before));
    adapter.detach();
    CHECK(same_state(state_of(model), plain));
    CHECK(equal_bits(model.forward(x), before));
  }
}

TEST_CASE("a scale moves the bias between the base and the copy") {
  seed();
  torch::nn::Linear linear(4, 3);
  const Tensor b = linear->bias.detach().clone();
  auto adapter = peft::attach(*linear, BitFitOptions());
  randomise(adapter);
  const Tensor trained = adapter.parameters()[0].detach();
  for (const double scale : {0.5, 2.0, -1.0}) {
    adapter.set_scale(scale);
    CHECK(close(peft::effective(linear->bias), b + scale * (trained - b)));
  }
  adapter.set_scale(0);
  CHECK(equal_bits(peft::effective(linear->bias).detach(), b));
  adapter.set_scale(1);
  CHECK(equal_bits(peft::effective(linear->bias).detach(), trained));
}

TEST_CASE("several BitFit adapters, and BitFit beside LoRA") {
  seed(6);
  networks::Mlp model;
  const Tensor x = torch::randn({5, 10});
  const Tensor before = model.forward(x);
  auto one = peft::attach(model, BitFitOptions(), "one");
  randomise(one, 1);
  const Tensor with_one = model.forward(x).detach();
  auto two = peft::attach(model, BitFitOptions(), "two");
  // A copy starts from the base's own value, not from another's copy.
  CHECK(equal_bits(
      two.named_parameters()["fc1.bias"], peft::base(model.fc1->bias)));
  randomise(two, 2);
  auto lora = peft::attach(
      model, LoraOptions(2).targets({"fc1", "fc2"}).init("random"), "lora");

  const auto only = [&](const Names& names) {
    peft::ActiveAdapters scope(names);
    return model.forward(x).detach();
  };
  CHECK(equal_bits(only({}), before));
  CHECK(equal_bits(only({"one"}), with_one));
  const Tensor with_two = only({"two"});
  CHECK_FALSE(equal_bits(with_two, with_one));
  const Tensor with_lora = only({"lora"});

  // BitFit and LoRA act on different tensors: both take effect.
  const auto b = one.named_parameters();
  const auto weight = [&](size_t site) {
    auto& delta = adapted::lora(lora, site);
    return 4 * at::mm(delta.lora_B, delta.lora_A);
  };
  const Tensor h1 = torch::tanh(
      at::linear(x, peft::base(model.fc1->weight) + weight(0), b["fc1.bias"]));
  const Tensor h2 = torch::tanh(
      at::linear(h1, peft::base(model.fc2->weight) + weight(1), b["fc2.bias"]));
  const Tensor both = at::linear(h2, model.head->weight, b["head.bias"]);
  CHECK(equal_bits(only({"one", "two"}), with_two)); // the last copy counts
  CHECK(close(only({"one", "lora"}), both));
  CHECK(close(only({"lora", "one"}), both));

  // Detaching one leaves what the others do.
  two.detach();
  CHECK(equal_bits(only({"one"}), with_one));
  CHECK(equal_bits(only({"lora"}), with_lora));
  CHECK(equal_bits(only({}), before));
  CHECK(close(model.forward(x), both));
  one.merge();
  {
    torch::NoGradGuard no_grad;
    CHECK(close(model.forward(x), both));
  }
  one.unmerge();
  lora.detach();
  CHECK(equal_bits(model.forward(x), with_one));
  one.detach();
  CHECK(equal_bits(model.forward(x), before));
}

TEST_CASE("BitFit files name biases as HF names parameters") {
  seed(8);
  auto model = small_bert();
  model->eval();
  const Tensor ids = torch::randint(20, {3, 6}, torch::kLong);
  auto adapter = peft::attach(
      *model,
      BitFitOptions({"query_intermediate"}).modules_to_save({"classifier"}));
  randomise(adapter);
  const Tensor acting = model->forward(ids).detach();
  TemporaryDirectory folder;
  peft::save(adapter, folder / "adapter");

  const auto file =
      peft::load_safetensors(folder / "adapter/adapter_model.safetensors");
  CHECK(file.size() == adapter.parameters().size());
  for (const auto& item : adapter.named_parameters()) {
    INFO(item.key());
    const auto found = file.find("base_model.model." + item.key());
    REQUIRE(found != file.end());
    CHECK(equal_bits(found->second, item.value()));
  }
  CHECK(
      file.count(
          "base_model.model.bert.encoder.layer.1.attention.self.query.bias") ==
      1);

  seed(8);
  auto fresh = small_bert(); // the same base
  fresh->eval();
  auto loaded = peft::load(*fresh, folder / "adapter", "other");
  CHECK(loaded.name() == "other");
  CHECK(loaded.method() == "BITFIT");
  CHECK(equal_bits(fresh->forward(ids), acting));
  for (const auto& item : adapter.named_parameters()) {
    CHECK(equal_bits(loaded.named_parameters()[item.key()], item.value()));
  }
  peft::save(loaded, folder / "again");
  const auto again =
      peft::load_safetensors(folder / "again/adapter_model.safetensors");
  REQUIRE(again.size() == file.size());
  for (const auto& [name, value] : file) {
    CHECK(equal_bits(again.at(name), value));
  }
}

TEST_CASE("BitFit says what it does not find") {
  torch::nn::Sequential bare(
      torch::nn::Linear(torch::nn::LinearOptions(3, 3).bias(false)));
  torch::nn::Sequential nameless(torch::nn::Linear(3, 3));
  struct Row {
    std::string name;
    torch::nn::Sequential model;
    BitFitOptions options;
    Names parts;
  };
  const std::vector<Row> rows{
      {"a network without biases",
       bare,
       BitFitOptions(),
       {"finds no bias for 'all'", "a bias-free network"}},
      {"a role that names do not tell",
       nameless,
       BitFitOptions({"query"}),
       {"finds no bias for 'query'", "'0.bias'"}},
      {"a word that there is not",
       nameless,
       BitFitOptions({"queries"}),
       {"no biases called 'queries'", "attention_output"}},
      {"no word",
       nameless,
       BitFitOptions(Names{}),
       {"at least one set of biases"}},
      {"a target that there is not",
       nameless,
       BitFitOptions().targets("nope"),
       {"targets entry 'nope' matches nothing"}},
      {"a target without a bias",
       nameless,
       BitFitOptions().targets("0.weight"),
       {"finds no bias"}},
      {"a head that there is not",
       nameless,
       BitFitOptions().modules_to_save({"head"}),
       {"modules_to_save entry 'head'"}}};
  for (const auto& row : rows) {
    INFO(row.name);
    auto model = row.model;
    const auto before = state_of(*model);
    const auto error = error_of([&] { peft::attach(*model, row.options); });
    INFO(error);
    for (const auto& part : row.parts) {
      CHECK(contains(error, part));
    }
    CHECK(same_state(state_of(*model), before));
  }
}

} // namespace test_bitfit
