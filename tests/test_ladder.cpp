/// Ladder side tuning: against equations in Python (reference/make_ladder.py),
/// and what must hold of it: what runs, what is stored, what may change.

#include "gradcheck.h"
#include "model_state.h"
#include "test.h"

#include <peft/core/clone.h>
#include <peft/io/pretrained.h>
#include <peft/io/safetensors.h>
#include <peft/methods/ladder.h>
#include <peft/methods/lora.h>
#include <peft/models/bert.h>
#include <peft/models/gpt2.h>
#include <peft/models/llama.h>
#include <peft/models/t5.h>

#include <c10/core/Allocator.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

namespace test_ladder {

namespace {

using namespace peft::models;
using peft::LadderOptions;
using peft::SideNetwork;
using torch::Tensor;
using Tensors = std::map<std::string, Tensor>;

Tensors reference(const std::string& name) {
  return peft::load_safetensors(
      golden("../../reference/data/ladder/" + name + ".safetensors"));
}

/// The sizes of reference/data/ladder.
BertOptions tiny_bert() {
  return BertOptions()
      .vocab_size(11)
      .hidden_size(8)
      .num_hidden_layers(3)
      .num_attention_heads(2)
      .intermediate_size(12)
      .max_position_embeddings(6)
      .hidden_dropout_prob(0)
      .attention_probs_dropout_prob(0)
      .add_pooling_layer(false);
}
T5Options tiny_t5() {
  return T5Options()
      .vocab_size(13)
      .d_model(8)
      .d_kv(4)
      .d_ff(12)
      .num_layers(2)
      .num_heads(2)
      .relative_attention_num_buckets(8)
      .relative_attention_max_distance(12)
      .dropout_rate(0)
      .tie_word_embeddings(true);
}

/// Writes the tensors "<prefix><name>" into parameters by name.
template <class Named>
void fill(
    const Named& parameters,
    const Tensors& from,
    const std::string& prefix) {
  torch::NoGradGuard no_grad;
  for (const auto& item : parameters) {
    const auto found = from.find(prefix + item.key());
    if (found != from.end()) {
      Tensor to = item.value();
      REQUIRE(to.sizes() == found->second.sizes());
      to.copy_(found->second);
    }
  }
}

/// "encoder.layer_loop.down.0.weight" → "down.0.weight", with "encoder." kept
/// for T5.
std::string short_name(const std::string& key, bool is_t5) {
  const std::string site = ".layer_loop.";
  const auto at = key.find(site);
  return (is_t5 ? key.substr(0, at) + "." : "") + key.substr(at + site.size());
}

const SideNetwork& side_of(const peft::Adapter& adapter, size_t site = 0) {
  return dynamic_cast<const SideNetwork&>(
      *adapter.shared_state()->sites.at(site).delta);
}

Tensor ids_of(at::IntArrayRef sizes, int64_t vocab, uint64_t number = 3) {
  torch::manual_seed(number);
  return torch::randint(1, vocab, sizes);
}

Tensor mask_of(const std::vector<int64_t>& lengths, int64_t n) {
  return (torch::arange(n) < torch::tensor(lengths).unsqueeze(1))
      .to(torch::kLong);
}

/// The leaves that a backward from `result` would reach.
std::set<const void*> leaves_of(const Tensor& result) {
  std::set<const void*> leaves;
  std::set<const void*> seen;
  std::vector<torch::autograd::Node*> open{result.grad_fn().get()};
  while (!open.empty()) {
    auto* node = open.back();
    open.pop_back();
    if (node == nullptr || !seen.insert(node).second) {
      continue;
    }
    if (auto* leaf = dynamic_cast<torch::autograd::AccumulateGrad*>(node)) {
      leaves.insert(leaf->variable.unsafeGetTensorImpl());
    }
    for (const auto& edge : node->next_edges()) {
      open.push_back(edge.function.get());
    }
  }
  return leaves;
}

/// Bytes that this thread allocates: what is held now, and the most at a time.
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

struct Usage {
  int64_t held; // after the forward, while its result lives
  int64_t peak;
};

template <class Forward>
Usage usage_of(Forward&& forward) {
  forward(); // what is made once is no part of it
  auto bytes = std::make_shared<Bytes>();
  c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, bytes);
  const Tensor result = forward();
  return {bytes->held, bytes->peak};
}

BertModel wide_bert(int64_t layers) {
  seed(1);
  BertModel model(BertOptions()
                      .vocab_size(50)
                      .hidden_size(64)
                      .num_hidden_layers(layers)
                      .num_attention_heads(4)
                      .intermediate_size(128)
                      .max_position_embeddings(32)
                      .add_pooling_layer(false));
  model->eval();
  return model;
}

} // namespace

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ Equations ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

TEST_CASE("a ladder equals the equations in Python", "[ladder]") {
  const bool is_t5 = GENERATE(false, true);
  INFO((is_t5 ? "T5" : "BERT"));
  auto want = reference(is_t5 ? "t5" : "bert");
  BertModel bert{nullptr};
  T5Model t5{nullptr};
  std::shared_ptr<torch::nn::Module> model;
  auto options = LadderOptions(2);
  if (is_t5) {
    t5 = T5Model(tiny_t5());
    model = t5.ptr();
    options.layers({1}).decoder_layers({0, 1});
  } else {
    bert = BertModel(tiny_bert());
    model = bert.ptr();
    options.layers({0, 2});
  }
  model->to(torch::kDouble);
  fill(model->named_parameters(), want, "base.");
  const auto run = [&] {
    return is_t5 ? t5->forward(want["tokens"], want["mask"], want["answer"])
                 : bert->forward(want["tokens"], want["mask"]);
  };

  const auto adapter = peft::attach(*model, options);
  std::vector<std::pair<std::string, Tensor>> sides;
  int64_t pruned = 0;
  for (const auto& item : adapter.named_parameters()) {
    const auto name = short_name(item.key(), is_t5);
    INFO(name);
    sides.emplace_back(name, item.value());
    REQUIRE(want.count("side." + name) == 1);
    // What pruning keeps of the layers and of the last norm.
    if (name.find("block.") != std::string::npos ||
        name.find(".norm.") != std::string::npos) {
      ++pruned;
      REQUIRE(equal_bits(item.value(), want["side." + name]));
    }
    torch::NoGradGuard no_grad;
    item.value().copy_(want["side." + name]);
  }
  // T5: 8 of an encoder's block and 13 of a decoder's, two tables, two norms.
  REQUIRE(pruned == (is_t5 ? 8 + 2 * 13 + 2 + 2 : 2 * 16));
  const auto expected_count =
      std::count_if(want.begin(), want.end(), [](const auto& item) {
        return item.first.compare(0, 5, "side.") == 0;
      });
  REQUIRE(static_cast<int64_t>(sides.size()) == expected_count);

  std::vector<Tensor> parameters;
  for (const auto& side : sides) {
    parameters.push_back(side.second);
  }
  torch::optim::SGD optimizer(parameters, torch::optim::SGDOptions(0.05));
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    const auto hidden = run();
    (hidden * want["direction"]).sum().backward();
    if (step == 0) {
      const Tensor real = is_t5 ? torch::ones_like(want["hidden"])
                                : want["mask"].unsqueeze(-1).to(torch::kDouble);
      REQUIRE(close(hidden * real, want["hidden"] * real));
      for (const auto& [name, parameter] : sides) {
        INFO(name);
        REQUIRE(close(parameter.grad(), want["grad." + name]));
      }
    }
    optimizer.step();
  }
  for (const auto& [name, parameter] : sides) {
    INFO(name);
    REQUIRE(close(parameter, want["after." + name]));
  }
  for (const auto& item : peft::detail::base_parameters(*model)) {
    const auto found = want.find("base." + item.first);
    if (found != want.end()) {
      INFO(item.first);
      REQUIRE(equal_bits(item.second, found->second)); // frozen to the bit
    }
  }
}

TEST_CASE("the gradients of a ladder pass finite differences", "[ladder]") {
  const std::string gate = GENERATE("learnable", "fixed", "none");
  const bool merge_last = GENERATE(false, true);
  seed(2);
  T5Model model(tiny_t5().num_layers(1));
  model->to(torch::kDouble);
  auto adapter = peft::attach(
      *model,
      LadderOptions(4)
          .gate(gate)
          .gate_temperature(0.7)
          .gate_alpha(0.2)
          .merge_last(merge_last));
  adapter.set_scale(0.8);
  const auto ids = ids_of({1, 3}, 13), answer = ids_of({1, 2}, 13);
  REQUIRE(gradcheck::first_order(
      [&](const std::vector<Tensor>&) {
        return model->forward(ids, Tensor(), answer);
      },
      adapter.parameters(),
      torch::randn({1, 2, 8}, torch::kDouble)));
}

TEST_CASE("gates say how much of the backbone comes in", "[ladder]") {
  seed(3);
  BertModel model(tiny_bert());
  const auto ids = ids_of({2, 4}, 11);
  // mu = 0: a side block sees only down(x) of its layer, so nothing of what
  // stands below matters.
  auto adapter =
      peft::attach(*model, LadderOptions(2).gate_alpha(-100), "closed");
  const auto& side = side_of(adapter);
  const auto before = model->forward(ids);
  {
    torch::NoGradGuard no_grad;
    side.down[1]->weight.add_(1);
    side.first_down->weight.add_(1);
    for (auto& p : side.block[0]->parameters()) {
      p.add_(1);
    }
  }
  REQUIRE(equal_bits(model->forward(ids), before));
  {
    torch::NoGradGuard no_grad;
    side.down[2]->bias.add_(1);
  }
  REQUIRE_FALSE(equal_bits(model->forward(ids), before));
  adapter.detach();

  // mu = 1: the maps of the layers' states do not matter.
  adapter = peft::attach(*model, LadderOptions(2).gate_alpha(100), "open");
  const auto alone = model->forward(ids);
  {
    torch::NoGradGuard no_grad;
    for (const auto& down : side_of(adapter).down) {
      down->weight.add_(1);
    }
  }
  REQUIRE(equal_bits(model->forward(ids), alone));

  // A fixed gate is the learnable one before it has learnt.
  adapter.detach();
  Tensors made;
  for (const char* gate : {"learnable", "fixed"}) {
    seed(4);
    adapter =
        peft::attach(*model, LadderOptions(2).gate(gate).gate_alpha(0.05));
    made[gate] = model->forward(ids);
    REQUIRE(side_of(adapter).gate.size() == (gate[0] == 'l' ? 3u : 0u));
    adapter.detach();
  }
  REQUIRE(close(made["fixed"], made["learnable"]));
}

TEST_CASE("a scale mixes the side network and the backbone", "[ladder]") {
  seed(5);
  BertModel model(tiny_bert());
  model->to(torch::kDouble);
  const auto ids = ids_of({2, 4}, 11);
  const auto base = model->forward(ids);
  const bool merge_last = GENERATE(false, true);
  auto adapter = peft::attach(*model, LadderOptions(2).merge_last(merge_last));
  const auto side = model->forward(ids);
  REQUIRE_FALSE(close(side, base));
  adapter.set_scale(0);
  REQUIRE(equal_bits(model->forward(ids), base));
  adapter.set_scale(0.25);
  REQUIRE(close(model->forward(ids), 0.75 * base + 0.25 * side));
  if (merge_last) { // one gate more, at sigmoid(0)
    adapter.set_scale(1);
    torch::NoGradGuard no_grad;
    side_of(adapter).last_gate.fill_(-100);
    REQUIRE(close(model->forward(ids), base));
    side_of(adapter).last_gate.fill_(0);
    const auto half = model->forward(ids);
    side_of(adapter).last_gate.fill_(100);
    REQUIRE(close(half, (model->forward(ids) + base) / 2));
  }
}

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ Pruning ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

TEST_CASE("heads are pruned each, shared and packed ones too", "[ladder]") {
  seed(6);
  SECTION("grouped queries share the places of their key") {
    LlamaModel model(LlamaOptions()
                         .vocab_size(20)
                         .hidden_size(32)
                         .intermediate_size(12)
                         .num_hidden_layers(1)
                         .num_attention_heads(4)
                         .num_key_value_heads(2));
    torch::NoGradGuard no_grad;
    auto parameters = model->layers[0]->named_parameters();
    // Places 2 and 5 of the first key head and 0 and 1 of the second stand out;
    // each head is shared by two of the four query heads.
    for (const int64_t row : {2, 5}) {
      parameters["self_attn.k_proj.weight"][row] += 100;
    }
    for (const int64_t row : {0, 1}) {
      parameters["self_attn.v_proj.weight"][8 + row] += 100;
    }
    parameters["input_layernorm.weight"].slice(0, 24).fill_(1e6);
    const auto adapter = peft::attach(*model, LadderOptions(4));
    auto side = side_of(adapter).block[0]->named_parameters();
    const auto rows = torch::tensor({2, 5, 8 + 2, 8 + 5, 16, 17, 24, 25});
    REQUIRE(equal_bits(
        side["self_attn.q_proj.weight"],
        parameters["self_attn.q_proj.weight"].index_select(0, rows).slice(
            1, 24)));
    REQUIRE(equal_bits(
        side["self_attn.o_proj.weight"],
        parameters["self_attn.o_proj.weight"].slice(0, 24).index_select(
            1, rows)));
    REQUIRE(equal_bits(
        side["self_attn.v_proj.weight"],
        parameters["self_attn.v_proj.weight"]
            .index_select(0, torch::tensor({2, 5, 8, 9}))
            .slice(1, 24)));
    model->forward(ids_of({1, 5}, 20));
  }
  SECTION("q, k and v one after another") {
    Gpt2Model model(
        Gpt2Options().vocab_size(20).n_embd(8).n_layer(1).n_head(2));
    auto parameters = model->h[0]->named_parameters();
    torch::NoGradGuard no_grad;
    // Conv1D lies the other way: units are columns. Place 3 of the first head
    // (in k) and 0 of the second (in v) stand out, and residual units 1 and 6.
    parameters["attn.c_attn.weight"].select(1, 8 + 3).add_(100);
    parameters["attn.c_attn.weight"].select(1, 16 + 4).add_(100);
    parameters["ln_1.weight"][1] = 1e6;
    parameters["ln_1.weight"][6] = 1e6;
    const auto adapter = peft::attach(*model, LadderOptions(4));
    auto side = side_of(adapter).block[0]->named_parameters();
    const auto width = torch::tensor({1, 6});
    const auto units = torch::tensor({3, 4, 8 + 3, 8 + 4, 16 + 3, 16 + 4});
    REQUIRE(equal_bits(
        side["attn.c_attn.weight"],
        parameters["attn.c_attn.weight"].index_select(0, width).index_select(
            1, units)));
    REQUIRE(equal_bits(
        side["attn.c_proj.weight"],
        parameters["attn.c_proj.weight"]
            .index_select(0, torch::tensor({3, 4}))
            .index_select(1, width)));
    model->forward(ids_of({1, 5}, 20));
  }
}

TEST_CASE("a network of one's own takes a ladder", "[ladder]") {
  struct Net : torch::nn::Module {
    static std::shared_ptr<torch::nn::TransformerEncoderLayerImpl> block(
        int64_t reduction) {
      return std::make_shared<torch::nn::TransformerEncoderLayerImpl>(
          torch::nn::TransformerEncoderLayerOptions(8 / reduction, 2)
              .dim_feedforward(12 / reduction)
              .dropout(0));
    }
    Net() {
      for (int i = 0; i < 2; ++i) {
        layers->push_back(block(1));
      }
      register_module("layers", layers);
      layer_loop = register_module(
          "layer_loop",
          peft::LayerLoop(peft::LayerLoopOptions(8, 2).num_heads(2).side_block(
              [](int64_t, int64_t reduction) { return block(reduction); })));
    }
    Tensor forward(const Tensor& x) {
      return layer_loop
          ->forward(
              x,
              Tensor(),
              *layers,
              [](torch::nn::Module& each, const peft::LayerCall& call) {
                return each.as<torch::nn::TransformerEncoderLayerImpl>()
                    ->forward(call.hidden.transpose(0, 1))
                    .transpose(0, 1);
              })
          .hidden;
    }
    torch::nn::ModuleList layers;
    peft::LayerLoop layer_loop{nullptr};
  };
  seed(20);
  const auto model = std::make_shared<Net>();
  auto parameters = model->layers[1]->named_parameters();
  torch::NoGradGuard no_grad;
  // Place 1 of the first head and 3 of the second, residual units 0 and 5,
  // inner units 2, 4 and 11 stand out.
  parameters["self_attn.in_proj_bias"][8 + 1] = 1e4;
  parameters["self_attn.in_proj_bias"][16 + 4 + 3] = 1e4;
  parameters["norm2.bias"][0] = 1e4;
  parameters["norm1.weight"][5] = 1e4;
  for (const int64_t unit : {2, 4, 11}) {
    parameters["linear1.bias"][unit] = 1e4;
  }
  const auto adapter = peft::attach(*model, LadderOptions(4).layers({1}));
  auto side = side_of(adapter).block[0]->named_parameters();
  const auto width = torch::tensor({0, 5});
  const auto inner = torch::tensor({2, 4, 11});
  const auto packed = torch::tensor({1, 7, 9, 15, 17, 23});
  REQUIRE(equal_bits(
      side["self_attn.in_proj_weight"],
      parameters["self_attn.in_proj_weight"]
          .index_select(0, packed)
          .index_select(1, width)));
  REQUIRE(equal_bits(
      side["self_attn.out_proj.weight"],
      parameters["self_attn.out_proj.weight"]
          .index_select(0, width)
          .index_select(1, torch::tensor({1, 7}))));
  REQUIRE(equal_bits(
      side["linear2.weight"],
      parameters["linear2.weight"].index_select(0, width).index_select(
          1, inner)));
  REQUIRE(equal_bits(
      side["norm2.bias"], parameters["norm2.bias"].index_select(0, width)));
  REQUIRE(
      model->forward(torch::randn({2, 3, 8})).sizes() ==
      at::IntArrayRef({2, 3, 8}));
}

TEST_CASE("a given importance decides what is kept", "[ladder]") {
  seed(7);
  BertModel model(tiny_bert());
  const auto ids = ids_of({4, 5}, 11);
  const auto target = torch::randn({5, 8});
  auto requires_grad = model->encoder->parameters().front();
  requires_grad.set_requires_grad(false);
  const auto loss = [&](int64_t i) {
    return torch::mse_loss(model->forward(ids.slice(0, i, i + 1))[0], target);
  };
  const auto fisher = peft::ladder_importance(*model, loss, 4);
  REQUIRE_FALSE(requires_grad.requires_grad());
  requires_grad.set_requires_grad(true);

  Tensors by_hand;
  for (int64_t i = 0; i < 4; ++i) {
    model->zero_grad();
    loss(i).backward();
    for (const auto& p : model->named_parameters()) {
      auto& sum = by_hand[p.key()];
      const Tensor square = p.value().grad().square();
      sum = sum.defined() ? sum + square : square;
    }
  }
  REQUIRE(fisher.size() == by_hand.size());
  for (const auto& [name, value] : fisher) {
    INFO(name);
    REQUIRE(close(value, by_hand[name], 1e-5, 1e-9));
  }

  // All importance on four units of the feed-forward.
  peft::Importance chosen;
  for (const auto& [name, value] : fisher) {
    chosen[name] = torch::zeros_like(value);
  }
  const auto units = torch::tensor({0, 2, 3, 7, 9, 11});
  const std::string inner = "encoder.layer.1.intermediate.dense.";
  chosen[inner + "weight"].index_fill_(0, units, 1);
  const auto adapter =
      peft::attach(*model, LadderOptions(2).importance(chosen));
  auto side = side_of(adapter).block[1]->named_parameters();
  REQUIRE(equal_bits(
      side["intermediate.dense.bias"].detach(),
      model->named_parameters()[inner + "bias"].detach().index_select(
          0, units)));
}

TEST_CASE("random blocks need nothing of the layers", "[ladder]") {
  seed(8);
  BertModel model(tiny_bert());
  seed(9);
  const auto random =
      peft::attach(*model, LadderOptions(2).init("random"), "a");
  const auto pruned = peft::attach(*model, LadderOptions(2), "b");
  REQUIRE(random.num_parameters() == pruned.num_parameters());
  auto side = side_of(random).block[0]->named_parameters();
  REQUIRE(
      equal_bits(side["output.LayerNorm.weight"].detach(), torch::ones({4})));
}

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ Counts ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

TEST_CASE("a ladder has as many parameters as its shapes say", "[ladder]") {
  SECTION("BERT-base and -large, by two of their layers") {
    const int64_t wide = GENERATE(768, 1024);
    const int64_t layers = wide == 768 ? 12 : 24;
    BertModel model(BertOptions()
                        .vocab_size(10)
                        .hidden_size(wide)
                        .num_hidden_layers(2)
                        .num_attention_heads(wide / 64)
                        .intermediate_size(4 * wide)
                        .add_pooling_layer(false));
    const auto adapter = peft::attach(*model, LadderOptions(8));
    const auto count = [&](int64_t n) {
      const int64_t d = wide / 8, f = 4 * d;
      const int64_t block = 4 * (d * d + d) + 2 * d * f + f + d + 4 * d;
      return n * (block + 1) + (n + 1) * (wide * d + d) + d * wide + wide;
    };
    REQUIRE(adapter.num_parameters() == count(2));
    REQUIRE(count(layers) == (wide == 768 ? 2376300 : 8170648));
  }
  SECTION("T5-base, the published layers") {
    T5Model model(T5Options()
                      .vocab_size(10)
                      .d_model(768)
                      .d_ff(3072)
                      .num_heads(12)
                      .num_layers(2));
    const auto adapter = peft::attach(*model, LadderOptions(8).layers({1}));
    const auto count = [](int64_t n) {
      const int64_t d = 96, f = 384, inner = 12 * 8;
      const int64_t encoder = 4 * d * inner + 2 * d * f + 2 * d;
      const int64_t decoder = encoder + 4 * d * inner + d;
      const int64_t maps = (n + 1) * (768 * d + d);
      return n * (encoder + decoder + 2) + 2 * (maps + d + 32 * 12) + d * 768 +
          768;
    };
    REQUIRE(adapter.num_parameters() == count(1));
    // 1.74 % of 222,903,552 with 9 of 12 layers, as published.
    REQUIRE(count(9) == 3878706);
  }
}

TEST_CASE("a network without values gets a ladder of shapes", "[ladder]") {
  struct Block : torch::nn::Module {
    Block(int64_t width, torch::Device device) {
      register_parameter(
          "weight", torch::empty({width, width}, torch::device(device)));
    }
  };
  struct Net : torch::nn::Module {
    Net() {
      torch::nn::ModuleList layers;
      layers->push_back(std::make_shared<Block>(8, torch::kMeta));
      register_module("layers", layers);
      register_module(
          "layer_loop",
          peft::LayerLoop(
              peft::LayerLoopOptions(8, 1).side_block([](int64_t, int64_t r) {
                return std::make_shared<Block>(8 / r, torch::kCPU);
              })));
    }
  };
  const auto model = std::make_shared<Net>();
  const auto adapter = peft::attach(*model, LadderOptions(2));
  REQUIRE(adapter.num_parameters() == 2 * (4 * 8 + 4) + 1 + 16 + 4 * 8 + 8);
}

// ~~~~~~~~~~~~~~~~~~~~~~~~~~ Memory and the graph ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

TEST_CASE("no graph reaches the backbone", "[ladder]") {
  seed(10);
  const bool frozen = GENERATE(true, false);
  T5ForConditionalGeneration model(tiny_t5());
  const auto adapter = peft::attach(*model, LadderOptions(2).merge_last(true));
  if (!frozen) { // and it would not if it trained
    for (auto& p : peft::detail::base_parameters(*model)) {
      p.second.set_requires_grad(
          p.first.find("block") != std::string::npos ||
          p.first.find("shared") != std::string::npos);
    }
    model->lm_head->weight.set_requires_grad(false);
  }
  const auto ids = ids_of({2, 4}, 13), answer = ids_of({2, 3}, 13);
  const auto logits = model->forward(ids, Tensor(), answer);
  std::set<const void*> trained;
  for (const auto& p : adapter.parameters()) {
    trained.insert(p.unsafeGetTensorImpl());
  }
  REQUIRE(leaves_of(logits) == trained);
  logits.sum().backward();
  for (const auto& p : peft::detail::base_parameters(*model)) {
    INFO(p.first);
    REQUIRE_FALSE(p.second.grad().defined());
  }
}

TEST_CASE("what is stored does not grow with the backbone", "[ladder]") {
  const auto ids = ids_of({4, 16}, 50);
  const auto measure = [&](int64_t depth, auto options) {
    auto model = wide_bert(depth);
    peft::attach(*model, options);
    return usage_of([&] { return model->forward(ids).sum(); });
  };
  // Side blocks beside the last four layers, of 4 and of 12.
  const auto four = measure(4, LadderOptions(8).layers({0, 1, 2, 3}));
  const auto twelve = measure(12, LadderOptions(8).layers({8, 9, 10, 11}));
  CHECK(twelve.held == four.held);
  CHECK(twelve.peak == four.peak);

  // The hook sees what a graph through the layers stores.
  const auto lora = peft::LoraOptions(1).targets({"query", "value"});
  const auto lora_four = measure(4, lora);
  const auto lora_twelve = measure(12, lora);
  CHECK(lora_twelve.held > 2.5 * lora_four.held);
  // The narrow network stores the four states that its maps read and little
  // else.
  const int64_t state = 4 * 16 * 64 * 4;
  CHECK(four.held < 5 * state + lora_four.held / 4);
}

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ As any adapter ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

TEST_CASE("a ladder comes and goes without a trace", "[ladder]") {
  seed(11);
  T5ForConditionalGeneration model(tiny_t5());
  const auto ids = ids_of({2, 4}, 13), answer = ids_of({2, 3}, 13);
  const auto mask = mask_of({4, 2}, 4);
  const auto run = [&](T5ForConditionalGeneration& m) {
    // Attention to a bias that trains takes another kernel.
    torch::NoGradGuard no_grad;
    return m->forward(ids, mask, answer);
  };
  const auto before = state_of(*model);
  const auto base = run(model);
  auto adapter = peft::attach(*model, LadderOptions(2));
  randomise(adapter);
  const auto side = run(model);
  REQUIRE_FALSE(close(side, base));

  adapter.disable();
  REQUIRE(equal_bits(run(model), base));
  adapter.enable();
  REQUIRE(equal_bits(run(model), side));

  auto copy = peft::clone(model);
  REQUIRE(equal_bits(run(copy), side));
  {
    torch::NoGradGuard no_grad;
    peft::get_adapter(*copy).parameters()[0].add_(1);
  }
  REQUIRE_FALSE(equal_bits(run(copy), side));
  REQUIRE(equal_bits(run(model), side));

  REQUIRE(contains(
      error_of([&] { adapter.merge(); }), "a side network stands beside"));
  REQUIRE(equal_bits(run(model), side));

  adapter.detach();
  REQUIRE(same_state(before, state_of(*model)));
  REQUIRE(equal_bits(run(model), base));
}

TEST_CASE("a ladder comes back from its files", "[ladder]") {
  TemporaryDirectory folder;
  seed(19);
  const bool is_t5 = GENERATE(true, false);
  const std::string gate = GENERATE("learnable", "fixed");
  T5ForConditionalGeneration t5(tiny_t5());
  BertForSequenceClassification bert(tiny_bert().pooling(Pooling::mean));
  auto& model = is_t5 ? static_cast<torch::nn::Module&>(*t5) : *bert;
  const auto ids = ids_of({2, 4}, 11), answer = ids_of({2, 3}, 11);
  const auto run = [&] {
    return is_t5 ? t5->forward(ids, Tensor(), answer) : bert->forward(ids);
  };
  auto options = LadderOptions(2)
                     .layers({1})
                     .gate(gate)
                     .gate_alpha(0.05)
                     .gate_temperature(0.2)
                     .merge_last(true);
  if (is_t5) {
    options.decoder_layers({0, 1});
  } else {
    options.modules_to_save({"classifier"});
  }
  auto adapter = peft::attach(model, options);
  randomise(adapter);
  const auto before = run();
  peft::save(adapter, folder / "out");
  const auto file =
      peft::load_safetensors(folder / "out/adapter_model.safetensors");
  const std::string site = is_t5 ? "decoder." : "bert.encoder.";
  REQUIRE(file.count("base_model.model." + site + "layer_loop.up.weight") == 1);
  REQUIRE(file.size() == adapter.named_parameters().size());
  adapter.detach();

  auto again = peft::load(model, folder / "out");
  REQUIRE(equal_bits(run(), before));
  REQUIRE(again.method() == "LADDER");
  peft::save(again, folder / "again");
  for (const char* name :
       {"adapter_config.json", "adapter_model.safetensors"}) {
    const auto text = [&](const std::string& which) {
      std::ifstream stream(folder / (which + "/" + name), std::ios::binary);
      return std::string(std::istreambuf_iterator<char>(stream), {});
    };
    REQUIRE(text("out") == text("again"));
  }
}

TEST_CASE("two ladders take turns", "[ladder]") {
  seed(12);
  BertModel model(tiny_bert());
  const auto ids = ids_of({2, 4}, 11);
  auto a = peft::attach(*model, LadderOptions(2), "a");
  const auto of_a = model->forward(ids);
  auto b = peft::attach(*model, LadderOptions(4).layers({1}), "b");
  REQUIRE(contains(
      error_of([&] { model->forward(ids); }), "two active side networks"));
  b.disable();
  REQUIRE(equal_bits(model->forward(ids), of_a));
  b.enable();
  const peft::ActiveAdapters only({"b"});
  REQUIRE_FALSE(close(model->forward(ids), of_a));
}

TEST_CASE("a head trains beside a ladder", "[ladder]") {
  seed(13);
  BertForSequenceClassification model(
      tiny_bert().num_labels(3).pooling(Pooling::mean));
  const auto adapter =
      peft::attach(*model, LadderOptions(2).modules_to_save({"classifier"}));
  const auto ids = ids_of({4, 5}, 11);
  const auto mask = mask_of({5, 3, 4, 1}, 5);
  const auto labels = torch::tensor({0, 1, 2, 1});
  torch::optim::Adam optimizer(adapter.parameters(), 0.02);
  double first = 0, last = 0;
  for (int step = 0; step < 40; ++step) {
    optimizer.zero_grad();
    const auto loss =
        torch::nn::functional::cross_entropy(model->forward(ids, mask), labels);
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
    first = step == 0 ? last : first;
  }
  REQUIRE(last < 0.3 * first);
}

TEST_CASE("half precision trains its ladder in float32", "[ladder]") {
  seed(14);
  T5Model model(tiny_t5());
  const auto ids = ids_of({2, 4}, 13), answer = ids_of({2, 3}, 13);
  seed(15);
  auto adapter = peft::attach(*model, LadderOptions(2));
  const auto wide = model->forward(ids, mask_of({4, 3}, 4), answer);
  adapter.detach();
  model->to(torch::kBFloat16);
  seed(15);
  adapter = peft::attach(*model, LadderOptions(2));
  for (const auto& p : adapter.parameters()) {
    REQUIRE(p.scalar_type() == torch::kFloat);
  }
  const auto half = model->forward(ids, mask_of({4, 3}, 4), answer);
  REQUIRE(half.scalar_type() == torch::kBFloat16);
  REQUIRE(close(half, wide, 0.1, 0.15));
  half.sum().backward();
}

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~ Encoder and decoder ~~~~~~~~~~~~~~~~~~~~~~~~~~~~

TEST_CASE("the decoder's ladder reads the encoder's", "[ladder]") {
  seed(16);
  T5ForConditionalGeneration model(tiny_t5());
  model->eval();
  const auto ids = ids_of({2, 4}, 13);
  torch::NoGradGuard no_grad;
  const auto base = model->encode(ids).hidden;
  const auto adapter = peft::attach(*model, LadderOptions(2));
  randomise(adapter);
  const auto encoded = model->encode(ids);
  // The frozen decoder goes on reading the frozen encoder.
  REQUIRE(equal_bits(encoded.hidden, base));
  REQUIRE(encoded.side.sizes() == at::IntArrayRef({2, 4, 4}));
  REQUIRE(side_of(adapter, 0).up.is_empty());
  REQUIRE_FALSE(side_of(adapter, 1).up.is_empty());
  const auto logits = model->forward(ids, Tensor(), ids);
  side_of(adapter, 0).down[0]->bias.add_(1);
  REQUIRE_FALSE(equal_bits(model->forward(ids, Tensor(), ids), logits));

  // An encoder alone answers itself.
  T5Stack encoder(tiny_t5(), false);
  const auto alone = peft::attach(*encoder, LadderOptions(2));
  REQUIRE_FALSE(side_of(alone).up.is_empty());
  REQUIRE(encoder->forward(ids).hidden.sizes() == at::IntArrayRef({2, 4, 8}));

  // Not so a decoder.
  T5Model partly(tiny_t5());
  peft::attach(*partly->decoder, LadderOptions(2));
  REQUIRE(contains(
      error_of([&] { partly->forward(ids, Tensor(), ids); }),
      "attach one to the whole model"));
}

TEST_CASE("text is written token by token through a ladder", "[ladder]") {
  seed(17);
  T5ForConditionalGeneration model(tiny_t5());
  model->eval();
  const auto adapter =
      peft::attach(*model, LadderOptions(2).layers({1}).decoder_layers({0, 1}));
  randomise(adapter);
  const auto ids = ids_of({2, 5}, 13);
  const auto mask = mask_of({5, 3}, 5);
  const auto answer = ids_of({2, 4}, 13, 5);
  torch::NoGradGuard no_grad;
  const auto whole = model->forward(ids, mask, answer);
  const auto encoded = model->encode(ids, mask);
  T5Cache cache;
  for (int64_t i = 0; i < 4; ++i) {
    const auto step = model->logits(
        model->decode(answer.slice(1, i, i + 1), encoded, Tensor(), &cache));
    REQUIRE(close(step.select(1, 0), whole.select(1, i)));
  }
}

TEST_CASE("decoders alone take a ladder", "[ladder]") {
  seed(18);
  Gpt2ForCausalLM model(
      Gpt2Options().vocab_size(20).n_positions(16).n_embd(16).n_layer(2).n_head(
          2));
  model->eval();
  const auto adapter = peft::attach(*model, LadderOptions(2));
  const auto ids = ids_of({2, 6}, 20);
  const auto logits = model->forward(ids);
  auto changed = ids.clone();
  changed.select(1, 5).fill_(1);
  changed.select(1, 4).fill_(2);
  REQUIRE(close( // no token sees a later one
      model->forward(changed).slice(1, 0, 4),
      logits.slice(1, 0, 4)));
}

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ Refusals ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

TEST_CASE("a ladder that cannot be built is refused", "[ladder]") {
  BertModel model(tiny_bert());
  const auto before = state_of(*model);
  const auto refused = [&](torch::nn::Module& m, const LadderOptions& options) {
    return error_of([&] { peft::attach(m, options); });
  };
  CHECK(contains(refused(*model, LadderOptions(0)), "must be positive, got 0"));
  CHECK(contains(
      refused(*model, LadderOptions(3)), "reduction 3 does not divide"));
  CHECK(contains(
      refused(*model, LadderOptions(8)), "and intermediate_size (12), got 8"));
  CHECK(contains(
      refused(*model, LadderOptions(2).layers({0, 3})), "lie in 0 to 2"));
  CHECK(contains(
      refused(*model, LadderOptions(2).layers({1, 1})), "must ascend"));
  CHECK(
      contains(refused(*model, LadderOptions(2).gate("open")), "got \"open\""));
  CHECK(contains(
      refused(*model, LadderOptions(2).gate_temperature(0)), "temperature"));
  CHECK(contains(refused(*model, LadderOptions(2).init("copy")), "\"prune\""));
  CHECK(contains(
      refused(*model, LadderOptions(2).importance({{"a", torch::ones({1})}})),
      "importance needs an entry of shape"));
  CHECK(same_state(before, state_of(*model)));

  torch::nn::Linear plain(4, 4);
  CHECK(contains(refused(*plain, LadderOptions(2)), "layer_loop->forward("));

  // A stack that leaves out what pruning needs.
  struct Net : torch::nn::Module {
    explicit Net(const peft::LayerLoopOptions& options) {
      register_module("layer_loop", peft::LayerLoop(options));
      torch::nn::ModuleList layers;
      layers->push_back(BertLayer(tiny_bert()));
      register_module("layers", layers);
    }
  };
  auto options = peft::LayerLoopOptions(8, 1);
  CHECK(contains(
      refused(*std::make_shared<Net>(options), LadderOptions(2)),
      "does not say what a side network is built of"));
  options.side_block([](int64_t, int64_t reduction) {
    return std::make_shared<BertLayerImpl>(tiny_bert().reduced(reduction));
  });
  CHECK(contains(
      refused(*std::make_shared<Net>(options), LadderOptions(2)),
      "LayerLoopOptions(...).num_heads(n)"));
  const auto random = std::make_shared<Net>(options);
  CHECK(refused(*random, LadderOptions(2).init("random")).empty());
  options.num_layers(2);
  CHECK(contains(
      refused(*std::make_shared<Net>(options), LadderOptions(2)),
      "in one torch::nn::ModuleList beside it and finds 0"));
}

} // namespace test_ladder
