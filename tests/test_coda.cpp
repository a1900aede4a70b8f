/// CoDA: which tokens a layer sees, against equations in Python, its limits and
/// finite differences.

#include "adapted.h"
#include "gradcheck.h"
#include "model_state.h"
#include "test.h"

#include <peft/methods/coda.h>
#include <peft/models/bert.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace test_coda {

namespace {

using peft::CodaOptions;
using torch::Tensor;
namespace nn = torch::nn;

constexpr int64_t kWidth = 8, kHeads = 2, kWide = 12, kLayers = 2;

/// A pre-norm transformer layer.
struct BlockImpl : nn::Cloneable<BlockImpl> {
  BlockImpl() {
    reset();
  }
  void reset() override {
    const auto norm = [] { return nn::LayerNormOptions({kWidth}); };
    norm1 = register_module("norm1", nn::LayerNorm(norm()));
    norm2 = register_module("norm2", nn::LayerNorm(norm()));
    query = register_module("query", nn::Linear(kWidth, kWidth));
    key = register_module("key", nn::Linear(kWidth, kWidth));
    value = register_module("value", nn::Linear(kWidth, kWidth));
    out = register_module("out", nn::Linear(kWidth, kWidth));
    up = register_module("up", nn::Linear(kWidth, kWide));
    down = register_module("down", nn::Linear(kWide, kWidth));
  }
  Tensor forward(const Tensor& x, const Tensor& context, const Tensor& mask) {
    const auto split = [](const Tensor& t) {
      return t.unflatten(-1, {kHeads, kWidth / kHeads}).transpose(1, 2);
    };
    const Tensor keys = norm1(context);
    const Tensor attended = at::scaled_dot_product_attention(
        split(query(norm1(x))),
        split(key(keys)),
        split(value(keys)),
        mask.defined() ? std::optional<Tensor>(mask) : std::nullopt);
    const Tensor y = x + out(attended.transpose(1, 2).flatten(2));
    return y + down(up(norm2(y)).relu());
  }

  nn::LayerNorm norm1{nullptr}, norm2{nullptr};
  nn::Linear query{nullptr}, key{nullptr}, value{nullptr}, out{nullptr};
  nn::Linear up{nullptr}, down{nullptr};
};
TORCH_MODULE(Block);

/// A network of one's own, with the line for LayerLoop.
struct EncoderImpl : nn::Cloneable<EncoderImpl> {
  explicit EncoderImpl(bool is_causal = false, bool takes_context = true)
      : causal(is_causal), uses_context(takes_context) {
    reset();
  }
  void reset() override {
    layers = register_module("layers", nn::ModuleList());
    for (int64_t i = 0; i < kLayers; ++i) {
      layers->push_back(Block());
    }
    layer_loop = register_module(
        "layer_loop",
        peft::LayerLoop(peft::LayerLoopOptions(kWidth, kLayers)
                            .causal(causal)
                            .input_norm([](nn::Module& each, const Tensor& x) {
                              return each.as<BlockImpl>()->norm1->forward(x);
                            })));
  }
  Tensor forward(Tensor h, const Tensor& attention_mask = {}) {
    seen.clear();
    const Tensor mask = attention_mask.defined()
        ? attention_mask.to(torch::kBool).unsqueeze(1).unsqueeze(1)
        : Tensor();
    h = layer_loop
            ->forward(
                h,
                attention_mask,
                *layers,
                [&](nn::Module& each, const peft::LayerCall& call) {
                  seen.push_back(call.hidden.size(1));
                  return each.as<BlockImpl>()->forward(
                      call.hidden,
                      uses_context ? call.context : call.hidden,
                      call.attention(mask));
                })
            .hidden;
    return h;
  }

  bool causal, uses_context;
  std::vector<int64_t> seen; // tokens of each layer's last call
  nn::ModuleList layers{nullptr};
  peft::LayerLoop layer_loop{nullptr};

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, nn::AnyValue(Tensor())})
};
TORCH_MODULE(Encoder);

Encoder make_encoder(uint64_t number = 1) {
  seed(number);
  Encoder model;
  model->to(torch::kDouble);
  return model;
}

Tensor tokens_of(at::IntArrayRef sizes) {
  return torch::randn(sizes, torch::kDouble);
}

Tensor lengths_mask(const std::vector<int64_t>& lengths, int64_t n) {
  return (torch::arange(n) < torch::tensor(lengths).unsqueeze(1))
      .to(torch::kLong);
}

CodaOptions small(int64_t k) {
  return CodaOptions(k).bottleneck(3).epsilon(0.3);
}

const peft::CodaDelta& coda(const peft::Adapter& adapter) {
  return dynamic_cast<const peft::CodaDelta&>(
      *adapter.shared_state()->sites.at(0).delta);
}

/// The frozen layers beside parallel adapters.
Tensor dense(Encoder& model, const peft::Adapter& adapter, Tensor h) {
  const auto& delta = coda(adapter);
  for (int64_t i = 0; i < kLayers; ++i) {
    auto& block = *model->layers->ptr<BlockImpl>(i);
    const auto& own = *delta.layers().at(i);
    const Tensor hidden =
        at::linear(block.norm1(h), own.down_weight, own.down_bias).relu();
    h = block.forward(h, h, {}) +
        at::linear(hidden, own.up_weight, own.up_bias) *
            delta.options().scaling();
  }
  return h;
}

std::string reference(const std::string& name) {
  return golden("../../reference/data/coda/" + name + ".safetensors");
}

} // namespace

TEST_CASE("CoDA equals the equations in Python") {
  const auto file = peft::load_safetensors(reference("base"));
  Encoder model = make_encoder();
  {
    torch::NoGradGuard no_grad;
    for (auto& p : model->named_parameters()) {
      p.value().copy_(file.at(p.key()));
    }
  }
  const std::string name = GENERATE("k_to_k", "k_to_all", "iterative", "ratio");
  INFO(name);
  CodaOptions options = CodaOptions().bottleneck(3).epsilon(0.3);
  if (name == "ratio") {
    options.ratio(0.5).epsilon(0.1);
  } else {
    options.k(4);
  }
  if (name == "k_to_all") {
    options.attention("k_to_all").scaling(2.0);
  }
  if (name == "iterative") {
    options.solver("iterative");
  }
  auto adapter = peft::attach(*model, options);
  const auto expected = peft::load_safetensors(reference("layers_" + name));
  const auto own = coda(adapter).file_tensors();
  for (const auto& [key, t] : own) {
    torch::NoGradGuard no_grad;
    Tensor(t).copy_(expected.at("before." + key));
  }

  torch::optim::SGD optimizer(adapter.parameters(), 0.1);
  const Tensor mask = file.at("attention_mask");
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    const Tensor output = model->forward(file.at("inputs"), mask);
    const Tensor loss =
        ((output - file.at("target")).square().mean(-1) * mask).mean();
    loss.backward();
    if (step == 0) {
      CHECK(close(loss, expected.at("loss")));
      // Padding sees the adapters only, in both.
      CHECK(close(output, expected.at("output")));
      for (const auto& [key, t] : own) {
        INFO(key);
        CHECK(close(t.grad(), expected.at("gradient." + key), 1e-9, 1e-12));
      }
    }
    optimizer.step();
  }
  for (const auto& [key, t] : own) {
    INFO(key);
    CHECK(close(t, expected.at("after." + key), 1e-9, 1e-12));
  }
}

TEST_CASE("CoDA with k = n is the frozen layer beside a parallel adapter") {
  const std::string attention = GENERATE("k_to_k", "k_to_all");
  const std::string solver = GENERATE("exact", "iterative");
  Encoder model = make_encoder();
  const Tensor x = tokens_of({2, 6, kWidth});
  const Tensor base = model->forward(x);
  auto adapter = peft::attach(
      *model, small(6).attention(attention).solver(solver).scaling(0.7));
  CHECK(equal_bits(model->forward(x), base)); // up is zero

  randomise(adapter);
  const Tensor y = model->forward(x);
  CHECK(equal_bits(y, dense(model, adapter, x)));
  CHECK_FALSE(torch::allclose(y, base));
  y.square().sum().backward();
  const auto& own = *coda(adapter).layers().at(0);
  CHECK_FALSE(own.router_weight.grad().defined());
  CHECK(own.down_weight.grad().abs().max().item<double>() > 0);
}

TEST_CASE("CoDA: sequences of at most k tokens send them all") {
  Encoder model = make_encoder();
  const Tensor x = tokens_of({2, 9, kWidth});
  auto adapter = peft::attach(*model, small(5));
  randomise(adapter);
  const Tensor y = model->forward(x, lengths_mask({5, 3}, 9));
  CHECK(close(y[0].slice(0, 0, 5), dense(model, adapter, x.slice(1, 0, 5))[0]));
  CHECK(close(y[1].slice(0, 0, 3), dense(model, adapter, x.slice(1, 0, 3))[1]));
}

TEST_CASE("CoDA sends k tokens through a layer") {
  Encoder model = make_encoder();
  const Tensor x = tokens_of({2, 20, kWidth});
  auto adapter = peft::attach(*model, small(4));
  model->forward(x);
  CHECK(model->seen == std::vector<int64_t>{4, 4});
  adapter.detach();
  for (const auto& [ratio, n, k] :
       std::vector<std::tuple<double, int64_t, int64_t>>{
           {0.25, 20, 5},
           {0.3, 11, 3},
           {0.5, 5, 3},
           {0.01, 20, 1},
           {1.0, 7, 7}}) {
    auto share = peft::attach(*model, CodaOptions().ratio(ratio).bottleneck(2));
    model->forward(x.slice(1, 0, n));
    CHECK(model->seen == std::vector<int64_t>{k, k});
    share.detach();
  }
  auto second = peft::attach(*model, small(4).layers({1}));
  CHECK(second.num_parameters() == 2 * kWidth * 3 + 3 + 2 * kWidth);
  model->forward(x);
  CHECK(model->seen == std::vector<int64_t>{20, 4});
}

TEST_CASE("CoDA passes the other tokens by") {
  Encoder model = make_encoder();
  const Tensor x = tokens_of({3, 12, kWidth});
  auto adapter = peft::attach(*model, small(4).layers({0}).router_std(1));
  // Layer 1 as it is, so look at what goes into it.
  const auto& own = *coda(adapter).layers().at(0);
  auto& block = *model->layers->ptr<BlockImpl>(0);
  const Tensor scores = own.scores(block.norm1(x));
  const Tensor chosen = std::get<1>(scores.topk(4));
  const Tensor lambda = peft::functional::soft_topk(scores, 4, 0.3);
  const Tensor index =
      std::get<0>(chosen.sort(1)).unsqueeze(-1).expand({3, 4, kWidth});
  const Tensor few = x.gather(1, index);
  const Tensor routed = few +
      lambda.gather(1, index.select(-1, 0)).unsqueeze(-1) *
          (block.forward(few, few, {}) - few);
  const Tensor between = x.scatter(1, index, routed);
  auto& last = *model->layers->ptr<BlockImpl>(1);
  CHECK(close(model->forward(x), last.forward(between, between, {})));
}

TEST_CASE("CoDA never chooses padding") {
  const std::string attention = GENERATE("k_to_k", "k_to_all");
  const std::string solver = GENERATE("exact", "iterative");
  const bool share = GENERATE(false, true);
  INFO(attention << " " << solver << (share ? " ratio" : " k"));
  Encoder model = make_encoder();
  CodaOptions options =
      small(share ? 0 : 4).attention(attention).solver(solver);
  auto adapter = peft::attach(*model, options.ratio(share ? 0.4 : 0));
  randomise(adapter);
  const std::vector<int64_t> lengths{10, 4, 7};
  const Tensor mask = lengths_mask(lengths, 10);
  const Tensor x = tokens_of({3, 10, kWidth});
  const Tensor y = model->forward(x, mask);

  // What stands there does not matter, nor how much of it.
  const Tensor padding = mask.eq(0).unsqueeze(-1);
  const Tensor other = model->forward(x.masked_fill(padding, 1e3), mask);
  CHECK(close(other.masked_fill(padding, 0), y.masked_fill(padding, 0)));
  for (int64_t i = 0; i < 3; ++i) {
    const auto n = lengths[static_cast<size_t>(i)];
    const Tensor alone = model->forward(x.slice(0, i, i + 1).slice(1, 0, n));
    CHECK(close(alone[0], y[i].slice(0, 0, n)));
  }
  // On the left too.
  const Tensor left = model->forward(x.flip(1), mask.flip(1)).flip(1);
  CHECK(close(left.masked_fill(padding, 0), y.masked_fill(padding, 0)));
}

TEST_CASE("CoDA moves with its tokens") {
  const std::string attention = GENERATE("k_to_k", "k_to_all");
  Encoder model = make_encoder();
  auto adapter = peft::attach(*model, small(5).attention(attention));
  randomise(adapter);
  const Tensor x = tokens_of({2, 13, kWidth});
  const Tensor order = torch::randperm(13);
  CHECK(close(
      model->forward(x.index_select(1, order)),
      model->forward(x).index_select(1, order)));
}

TEST_CASE("CoDA: gradients through the router") {
  const std::string attention = GENERATE("k_to_k", "k_to_all");
  const std::string solver = GENERATE("exact", "iterative");
  Encoder model = make_encoder();
  auto adapter = peft::attach(
      *model, small(3).attention(attention).solver(solver).iterations(6));
  randomise(adapter);
  auto inputs = adapter.parameters();
  inputs.push_back(tokens_of({2, 6, kWidth}).set_requires_grad(true));
  const Tensor mask = lengths_mask({6, 4}, 6);
  CHECK(gradcheck::first_order(
      [&](const std::vector<Tensor>& in) {
        return model->forward(in.back(), mask);
      },
      inputs,
      tokens_of({2, 6, kWidth})));
  const Tensor loss = model->forward(inputs.back(), mask).square().sum();
  loss.backward();
  for (const auto& [number, layer] : coda(adapter).layers()) {
    INFO("layer " << number);
    CHECK(layer->router_weight.grad().abs().max().item<double>() > 1e-6);
  }
}

TEST_CASE("CoDA: what is trained and how much") {
  // BERT-base and BERT-large, the rest of them kept small.
  for (const auto& [layers, width] :
       std::vector<std::pair<int64_t, int64_t>>{{12, 768}, {24, 1024}}) {
    torch::nn::Module network;
    network.register_module(
        "layer_loop", peft::LayerLoop(peft::LayerLoopOptions(width, layers)));
    network.register_parameter("weight", torch::zeros({1}));
    auto adapter = peft::attach(network, CodaOptions(32));
    CHECK(
        adapter.num_parameters() ==
        layers * (2 * width * 64 + 64 + width + width));
    CHECK(adapter.num_parameters() == (layers == 12 ? 1198848 : 3196416));
  }

  Encoder model = make_encoder();
  const auto before = state_of(*model);
  auto adapter = peft::attach(*model, small(3));
  CHECK(adapter.method() == "CODA");
  REQUIRE(adapter.sites().size() == 1);
  CHECK(adapter.sites()[0].name == "layer_loop");
  std::vector<std::string> names;
  for (const auto& p : adapter.named_parameters()) {
    names.push_back(p.key());
  }
  CHECK(
      names ==
      std::vector<std::string>{
          "layer_loop.0.router.weight",
          "layer_loop.0.down.weight",
          "layer_loop.0.down.bias",
          "layer_loop.0.up.weight",
          "layer_loop.0.up.bias",
          "layer_loop.1.router.weight",
          "layer_loop.1.down.weight",
          "layer_loop.1.down.bias",
          "layer_loop.1.up.weight",
          "layer_loop.1.up.bias"});
  std::vector<Tensor> old;
  for (const auto& p : adapter.parameters()) {
    old.push_back(p.detach().clone());
  }
  torch::optim::AdamW optimizer(model->parameters(), 1e-2);
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    model->forward(tokens_of({2, 8, kWidth})).square().sum().backward();
    optimizer.step();
  }
  for (size_t i = 0; i < old.size(); ++i) {
    INFO(names[i]);
    CHECK_FALSE(torch::equal(old[i], adapter.parameters()[i]));
  }
  adapter.detach();
  CHECK(same_state(state_of(*model), before));
}

TEST_CASE("CoDA: the start") {
  Encoder model = make_encoder();
  seed(3);
  auto adapter = peft::attach(*model, CodaOptions(3).bottleneck(8));
  const auto& own = *coda(adapter).layers().at(1);
  CHECK(own.router_weight.abs().max().item<double>() > 0);
  CHECK(own.router_weight.abs().max().item<double>() < 0.1);
  CHECK(own.down_weight.abs().max().item<double>() <= 1 / std::sqrt(8.0));
  for (const auto& t : {own.down_bias, own.up_weight, own.up_bias}) {
    CHECK(torch::count_nonzero(t).item<int64_t>() == 0);
  }
  adapter.detach();
  // Without an opinion the first tokens go, all with the weight k / n.
  auto flat = peft::attach(*model, small(3).router_std(0).layers({0}));
  const Tensor x = tokens_of({1, 12, kWidth});
  auto& block = *model->layers->ptr<BlockImpl>(0);
  const Tensor few = x.slice(1, 0, 3);
  const Tensor between = at::cat(
      {few + 0.25 * (block.forward(few, few, {}) - few), x.slice(1, 3)}, 1);
  auto& last = *model->layers->ptr<BlockImpl>(1);
  const Tensor y = model->forward(x);
  CHECK(close(y, last.forward(between, between, {})));
  y.square().sum().backward();
  CHECK(
      coda(flat)
          .layers()
          .at(0)
          ->router_weight.grad()
          .abs()
          .max()
          .item<double>() > 0);
}

TEST_CASE("CoDA: disable, scale, clone, merge") {
  Encoder model = make_encoder();
  const Tensor x = tokens_of({2, 9, kWidth});
  const Tensor base = model->forward(x);
  auto adapter = peft::attach(*model, small(4).scaling(3));
  randomise(adapter);
  const Tensor y = model->forward(x);
  CHECK_FALSE(torch::allclose(y, base));
  adapter.disable();
  CHECK(equal_bits(model->forward(x), base));
  adapter.enable();
  CHECK(equal_bits(model->forward(x), y));

  auto copy = peft::clone(model);
  CHECK(equal_bits(copy->forward(x), y));
  auto twin = peft::adapters(*copy).at(0);
  twin.set_scale(0.5);
  const Tensor half = copy->forward(x);
  CHECK_FALSE(torch::allclose(half, y));
  CHECK(equal_bits(model->forward(x), y));
  {
    torch::NoGradGuard no_grad;
    for (const auto& item : coda(twin).layers()) {
      item.second->up_weight.mul_(2);
      item.second->up_bias.mul_(2);
    }
  }
  CHECK(close(copy->forward(x), y));

  CHECK(contains(
      error_of([&] { adapter.merge(); }),
      "cannot be merged at 'layer_loop': its router decides for each input"));
  CHECK(equal_bits(model->forward(x), y));
}

TEST_CASE("CoDA on BERT") {
  const std::string attention = GENERATE("k_to_k", "k_to_all");
  seed(4);
  peft::models::BertModel model(peft::models::BertOptions()
                                    .vocab_size(30)
                                    .hidden_size(kWidth)
                                    .num_hidden_layers(3)
                                    .num_attention_heads(kHeads)
                                    .intermediate_size(kWide)
                                    .max_position_embeddings(16)
                                    .add_pooling_layer(false));
  model->to(torch::kDouble);
  model->eval();
  const Tensor ids = torch::randint(1, 30, {2, 11}, torch::kLong);
  const Tensor mask = lengths_mask({11, 6}, 11);
  const Tensor base = model->forward(ids, mask);

  auto whole =
      peft::attach(*model, CodaOptions(11).bottleneck(4).attention(attention));
  CHECK(equal_bits(model->forward(ids, mask), base));
  whole.detach();

  auto adapter =
      peft::attach(*model, small(5).attention(attention).router_std(1));
  CHECK(adapter.sites()[0].name == "encoder.layer_loop");
  randomise(adapter);
  const Tensor y = model->forward(ids, mask);
  CHECK_FALSE(torch::allclose(y, base));
  const Tensor alone = model->forward(ids.slice(0, 1, 2).slice(1, 0, 6));
  CHECK(close(alone[0], y[1].slice(0, 0, 6)));
  y.square().sum().backward();
  for (const auto& p : adapter.parameters()) {
    CHECK(p.grad().abs().max().item<double>() > 0);
  }
  adapter.detach();
  CHECK(equal_bits(model->forward(ids, mask), base));
}

TEST_CASE("CoDA beside LoRA") {
  Encoder model = make_encoder();
  const Tensor x = tokens_of({2, 9, kWidth});
  auto lora = peft::attach(
      *model, peft::LoraOptions(2).targets({"query", "up"}), "lora");
  auto adapter = peft::attach(*model, small(4), "coda");
  randomise(lora, 5);
  randomise(adapter, 6);
  const Tensor both = model->forward(x);
  both.square().sum().backward();
  for (const auto& p : lora.parameters()) {
    CHECK(p.grad().abs().max().item<double>() > 0);
  }
  lora.merge();
  CHECK(close(model->forward(x), both));
}

TEST_CASE("CoDA in lower precision") {
  Encoder model = make_encoder();
  model->to(torch::kFloat);
  auto adapter = peft::attach(*model, small(4));
  randomise(adapter);
  const Tensor x = tokens_of({2, 9, kWidth}).to(torch::kFloat);
  const auto& own = *coda(adapter).layers().at(0);
  const Tensor scores = own.scores(x);
  {
    adapted::Autocast autocast;
    CHECK(equal_bits(own.scores(x), scores));
    const Tensor y = model->forward(x);
    y.square().sum().backward();
  }
  CHECK(own.router_weight.grad().abs().max().item<double>() > 0);
  adapter.detach();

  model->to(torch::kBFloat16);
  auto wide = peft::attach(*model, small(4));
  for (const auto& p : wide.parameters()) {
    CHECK(p.scalar_type() == torch::kFloat);
  }
  const Tensor y = model->forward(x.to(torch::kBFloat16));
  CHECK(y.scalar_type() == torch::kBFloat16);
  CHECK(y.isfinite().all().item<bool>());
}

TEST_CASE("CoDA: what is refused") {
  Encoder model = make_encoder();
  const auto before = state_of(*model);
  const auto refused = [&](const CodaOptions& options) {
    const auto message = error_of([&] { peft::attach(*model, options); });
    CHECK(same_state(state_of(*model), before));
    return message;
  };
  const std::string one = "either k, at least 1, or a ratio in (0, 1]";
  CHECK(contains(refused(CodaOptions()), one));
  CHECK(contains(refused(CodaOptions(-3)), one + "; got k = -3"));
  CHECK(contains(refused(CodaOptions(3).ratio(0.5)), one));
  CHECK(contains(refused(CodaOptions().ratio(1.5)), one));
  CHECK(contains(refused(small(3).epsilon(0)), "epsilon must be positive"));
  CHECK(contains(refused(small(3).solver("fast")), "no solver 'fast'"));
  CHECK(contains(refused(small(3).attention("all")), "no attention 'all'"));
  CHECK(contains(refused(small(3).iterations(0)), "iterations > 0"));
  CHECK(contains(refused(small(3).router_std(-1)), "router_std not negative"));
  CHECK(contains(
      refused(CodaOptions(3)),
      "bottleneck must lie between 1 and the width 8 of 'layer_loop', got 64"));
  CHECK(contains(
      refused(small(3).layers({0, 2})),
      "act on layer 2, and 'layer_loop' has layers 0 to 1"));
  CHECK(
      contains(refused(small(3).modules_to_save({"head"})), "modules_to_save"));

  // More tokens than there are: known when the model runs.
  auto adapter = peft::attach(*model, small(6));
  const auto message = error_of([&] {
    model->forward(tokens_of({1, 5, kWidth}));
  });
  CHECK(contains(message, "k = 6 tokens"));
  CHECK(contains(message, "this batch has 5"));
  CHECK(model->forward(tokens_of({1, 6, kWidth})).size(1) == 6);

  // Two routers at one layer.
  auto second = peft::attach(*model, small(2), "second");
  const Tensor x = tokens_of({1, 9, kWidth});
  CHECK(contains(
      error_of([&] { model->forward(x); }),
      "two active routers choose tokens for the same layer"));
  second.disable();
  CHECK(model->forward(x).size(1) == 9);
}

TEST_CASE("CoDA: networks it cannot work in") {
  nn::TransformerEncoder without(nn::TransformerEncoderOptions(
      nn::TransformerEncoderLayerOptions(kWidth, kHeads), 2));
  const auto before = state_of(*without);
  const auto message = error_of([&] { peft::attach(*without, small(3)); });
  CHECK(contains(message, "register_module(\"layer_loop\", peft::LayerLoop("));
  CHECK(contains(message, "layer_loop->forward(h, attention_mask, *layers,"));
  CHECK(same_state(state_of(*without), before));

  Encoder decoder(/*is_causal=*/true);
  CHECK(contains(
      error_of([&] { peft::attach(*decoder, small(3)); }),
      "in the causal 'layer_loop' a token's way would depend on those after"));
  CHECK(peft::adapters(*decoder).empty());

  nn::Module pair;
  pair.register_module("encoder", Encoder());
  pair.register_module("decoder", decoder);
  auto adapter = peft::attach(pair, small(3));
  REQUIRE(adapter.sites().size() == 1);
  CHECK(adapter.sites()[0].name == "encoder.layer_loop");

  // A layer that takes its keys from call.hidden cannot see all tokens.
  Encoder narrow(/*is_causal=*/false, /*takes_context=*/false);
  peft::attach(*narrow, small(3).attention("k_to_all"));
  CHECK_FALSE(error_of([&] {
                narrow->forward(torch::randn({2, 9, kWidth}));
              }).empty());
}

} // namespace test_coda
