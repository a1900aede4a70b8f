/// Parallel adapters: the formula, the way of a term from one layer to the
/// other, and the widening merge.

#include "adapted.h"
#include "gradcheck.h"
#include "model_state.h"
#include "networks.h"
#include "test.h"

#include <peft/methods/houlsby.h>
#include <peft/methods/parallel_adapter.h>
#include <peft/methods/widen.h>
#include <peft/models/gpt2.h>
#include <peft/models/llama.h>
#include <peft/models/t5.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace test_parallel_adapter {

namespace {

using peft::BitFitOptions;
using peft::HoulsbyOptions;
using peft::LoraOptions;
using peft::ParallelAdapterOptions;
using peft::WideningOptions;
using torch::Tensor;
using Names = std::vector<std::string>;

constexpr int64_t kWidth = 8;

torch::nn::TransformerEncoderLayerOptions layer_options() {
  return torch::nn::TransformerEncoderLayerOptions(kWidth, 2)
      .dim_feedforward(16)
      .dropout(0);
}

torch::nn::TransformerEncoder small_encoder() {
  return torch::nn::TransformerEncoder(
      torch::nn::TransformerEncoderOptions(layer_options(), 2));
}

/// One feed-forward, and a switch that makes it fail half way.
struct FeedForwardImpl : torch::nn::Cloneable<FeedForwardImpl> {
  explicit FeedForwardImpl(bool bias_ = true) : bias(bias_) {
    reset();
  }
  void reset() override {
    fc1 = register_module(
        "fc1",
        torch::nn::Linear(torch::nn::LinearOptions(kWidth, 12).bias(bias)));
    fc2 = register_module(
        "fc2",
        torch::nn::Linear(torch::nn::LinearOptions(12, kWidth).bias(bias)));
  }
  Tensor forward(const Tensor& x) {
    const Tensor h = torch::relu(fc1(x));
    TORCH_CHECK(!fails, "half way");
    return fc2(h);
  }
  bool bias;
  bool fails = false;
  torch::nn::Linear fc1{nullptr}, fc2{nullptr};
};
TORCH_MODULE(FeedForward);

peft::BottleneckImpl& bottleneck(
    const peft::Adapter& adapter,
    size_t pair = 0) {
  return *dynamic_cast<peft::detail::ParallelInputDelta&>(
              *adapter.shared_state()->sites.at(2 * pair).delta)
              .bottleneck;
}

Tensor term(const peft::Adapter& adapter, const Tensor& x, size_t pair = 0) {
  const auto& a = bottleneck(adapter, pair);
  Tensor down = x.matmul(a.down_weight.t());
  down = torch::relu(a.down_bias.defined() ? down + a.down_bias : down);
  Tensor up = down.matmul(a.up_weight.t());
  up = a.up_bias.defined() ? up + a.up_bias : up;
  return (a.scaling.defined() ? up * a.scaling : up * a.options.scaling())
      .detach();
}

size_t terms_under_way() {
  return peft::detail::handed_over().size();
}

/// Runs `layer` again in backward, as gradient checkpointing does.
struct Checkpoint : torch::autograd::Function<Checkpoint> {
  static Tensor forward(
      torch::autograd::AutogradContext* ctx,
      const Tensor& x,
      FeedForward layer,
      const Tensor& /*anchor*/) {
    ctx->save_for_backward({x});
    ctx->saved_data["layer"] =
        reinterpret_cast<int64_t>(layer.get()); // outlives the test
    torch::NoGradGuard no_grad;
    return layer->forward(x);
  }
  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx,
      torch::autograd::variable_list grads) {
    auto* layer =
        reinterpret_cast<FeedForwardImpl*>(ctx->saved_data["layer"].toInt());
    torch::AutoGradMode on(true);
    const Tensor x =
        ctx->get_saved_variables()[0].detach().set_requires_grad(true);
    const Tensor y = layer->forward(x);
    torch::autograd::backward({y}, {grads[0]});
    return {x.grad(), Tensor(), Tensor()};
  }
};

} // namespace

// ---- The formula ------------------------------------------------------------

TEST_CASE("a parallel adapter on an unmodified TransformerEncoder") {
  seed(1);
  auto encoder = small_encoder();
  encoder->to(torch::kDouble);
  const Tensor x = torch::randn({5, 3, kWidth}, torch::kDouble);
  const Tensor before = encoder->forward(x).detach();
  auto plain = peft::clone(encoder);
  const auto state = state_of(*encoder);
  auto adapter = peft::attach(*encoder, ParallelAdapterOptions(3));
  CHECK(equal_bits(encoder->forward(x).detach(), before));
  CHECK(adapter.num_parameters() == 2 * (2 * 3 * kWidth + 3 + kWidth));
  CHECK(adapter.method() == "PARALLEL_ADAPTER");
  CHECK(
      adapter.named_parameters().keys()[0] ==
      "layers.0.linear2.adapter_down.0.weight");
  randomise(adapter);
  for (const double scale : {1.0, 0.25}) {
    adapter.set_scale(scale);
    Tensor h = x;
    for (size_t i = 0; i < 2; ++i) {
      auto* layer =
          plain->layers->ptr(i)->as<torch::nn::TransformerEncoderLayerImpl>();
      h = layer->norm1(h + std::get<0>(layer->self_attn->forward(h, h, h)));
      const Tensor fed = layer->linear2(torch::relu(layer->linear1(h)));
      h = layer->norm2(h + fed + scale * term(adapter, h, i)); // s = 4 inside
    }
    CHECK(close(encoder->forward(x), h));
  }
  CHECK(terms_under_way() == 0);
  adapter.detach();
  CHECK(same_state(state_of(*encoder), state));
  CHECK(equal_bits(encoder->forward(x).detach(), before));
}

TEST_CASE("pairs of layers in each network, gated and without biases") {
  using namespace peft::models;
  struct Row {
    std::string name;
    std::shared_ptr<torch::nn::Module> module;
    Names first, second;
  };
  const auto t5 = [](const char* kind) {
    return T5Model(T5Options()
                       .vocab_size(20)
                       .d_model(kWidth)
                       .d_kv(4)
                       .d_ff(12)
                       .num_layers(1)
                       .num_heads(2)
                       .feed_forward_proj(kind))
        .ptr();
  };
  const std::vector<Row> rows{
      {"encoder",
       small_encoder().ptr(),
       {"layers.0.linear1", "layers.1.linear1"},
       {"layers.0.linear2", "layers.1.linear2"}},
      {"BERT",
       BertModel(BertOptions()
                     .vocab_size(20)
                     .hidden_size(kWidth)
                     .num_hidden_layers(2)
                     .num_attention_heads(2)
                     .intermediate_size(16)
                     .max_position_embeddings(8))
           .ptr(),
       {"encoder.layer.0.intermediate.dense",
        "encoder.layer.1.intermediate.dense"},
       {"encoder.layer.0.output.dense", "encoder.layer.1.output.dense"}},
      {"GPT-2",
       Gpt2Model(Gpt2Options()
                     .vocab_size(20)
                     .n_positions(8)
                     .n_embd(kWidth)
                     .n_layer(1)
                     .n_head(2))
           .ptr(),
       {"h.0.mlp.c_fc"},
       {"h.0.mlp.c_proj"}},
      {"LLaMA",
       LlamaModel(LlamaOptions()
                      .vocab_size(20)
                      .hidden_size(kWidth)
                      .intermediate_size(12)
                      .num_hidden_layers(1)
                      .num_attention_heads(2))
           .ptr(),
       {"layers.0.mlp.up_proj"},
       {"layers.0.mlp.down_proj"}},
      {"T5",
       t5("relu"),
       {"encoder.block.0.layer.1.DenseReluDense.wi",
        "decoder.block.0.layer.2.DenseReluDense.wi"},
       {"encoder.block.0.layer.1.DenseReluDense.wo",
        "decoder.block.0.layer.2.DenseReluDense.wo"}},
      {"gated T5",
       t5("gated-gelu"),
       {"encoder.block.0.layer.1.DenseReluDense.wi_0",
        "decoder.block.0.layer.2.DenseReluDense.wi_0"},
       {"encoder.block.0.layer.1.DenseReluDense.wo",
        "decoder.block.0.layer.2.DenseReluDense.wo"}}};
  for (const auto& row : rows) {
    INFO(row.name);
    auto adapter = peft::attach(*row.module, ParallelAdapterOptions(3));
    Names first, second;
    for (const auto& site : adapter.sites()) {
      (site.what == "adds bottleneck" ? second : first).push_back(site.name);
    }
    CHECK(first == row.first);
    CHECK(second == row.second);
  }
}

TEST_CASE("a parallel adapter in GPT-2's, LLaMA's and T5's feed-forward") {
  using namespace peft::models;
  seed(2);
  Gpt2Mlp gpt2(Gpt2Options().n_embd(kWidth).n_inner(12));
  LlamaMLP llama(LlamaOptions().hidden_size(kWidth).intermediate_size(12));
  T5DenseReluDense t5(T5Options().d_model(kWidth).d_ff(12));
  T5DenseReluDense gated(
      T5Options().d_model(kWidth).d_ff(12).feed_forward_proj("gated-gelu"));
  const Tensor x = torch::randn({2, 3, kWidth});
  const auto check = [&](auto& network,
                         const ParallelAdapterOptions& options,
                         const char* name) {
    INFO(name);
    network->eval();
    const Tensor before = network->forward(x).detach();
    auto adapter = peft::attach(*network, options);
    CHECK(equal_bits(network->forward(x).detach(), before));
    randomise(adapter);
    CHECK(close(network->forward(x), before + term(adapter, x)));
  };
  const ParallelAdapterOptions options(3);
  check(gpt2, ParallelAdapterOptions(options).targets({"c_proj"}), "GPT-2");
  check(llama, options, "LLaMA");
  check(t5, options, "T5");
  check(gated, options, "gated T5");
}

TEST_CASE("beside the attention, by inputs and targets") {
  seed(3);
  peft::models::BertModel bert(peft::models::BertOptions()
                                   .vocab_size(20)
                                   .hidden_size(kWidth)
                                   .num_hidden_layers(2)
                                   .num_attention_heads(2)
                                   .intermediate_size(16)
                                   .max_position_embeddings(8));
  bert->eval();
  auto& attention =
      *bert->encoder->layer[1]->as<peft::models::BertLayerImpl>()->attention;
  const Tensor x = torch::randn({2, 4, kWidth});
  peft::LayerCall call;
  call.hidden = call.context = x;
  const Tensor attended =
      attention.output->dense(attention.self->forward(call, {}, nullptr))
          .detach();
  auto adapter = peft::attach(
      *bert,
      ParallelAdapterOptions(3).inputs({"query"}).targets(
          {"attention.output.dense"}));
  randomise(adapter);
  CHECK(close(
      attention.forward(call, {}, nullptr),
      attention.output->norm(attended + term(adapter, x, 1) + x)));

  auto encoder = small_encoder();
  const Tensor t = torch::randn({5, 3, kWidth});
  auto* layer =
      encoder->layers->ptr(0)->as<torch::nn::TransformerEncoderLayerImpl>();
  const Tensor plain = std::get<0>(layer->self_attn->forward(t, t, t)).detach();
  auto packed = peft::attach(
      *encoder,
      ParallelAdapterOptions(3).inputs({"self_attn"}).targets({"out_proj"}));
  randomise(packed);
  CHECK(close(
      std::get<0>(layer->self_attn->forward(t, t, t)),
      plain + term(packed, t)));
}

// ---- On its way -------------------------------------------------------------

TEST_CASE("an exception between the two layers leaves nothing wrong behind") {
  seed(4);
  FeedForward network;
  const Tensor x = torch::randn({2, 3, kWidth});
  const Tensor other = torch::randn({2, 3, kWidth});
  auto adapter = peft::attach(*network, ParallelAdapterOptions(3));
  randomise(adapter);
  const Tensor expected = network->forward(x).detach();
  network->fails = true;
  CHECK(error_of([&] { network->forward(other); }) != "");
  CHECK(terms_under_way() == 1);
  network->fails = false;
  CHECK(equal_bits(network->forward(x).detach(), expected));
  CHECK(terms_under_way() == 0);

  // What an adapter that is gone left behind goes with the next call of any.
  network->fails = true;
  CHECK(error_of([&] { network->forward(other); }) != "");
  network->fails = false;
  adapter.detach();
  adapter = peft::Adapter();
  FeedForward second;
  auto next = peft::attach(*second, ParallelAdapterOptions(3));
  second->forward(x);
  CHECK(terms_under_way() == 0);
}

TEST_CASE("a term that does not arrive, or is another's, is an error") {
  seed(5);
  FeedForward network;
  const Tensor x = torch::randn({2, 3, kWidth});
  const Tensor h = torch::randn({2, 3, 12});
  auto adapter = peft::attach(*network, ParallelAdapterOptions(3));
  CHECK(contains(
      error_of([&] { network->fc2(h); }),
      "that layer has not run in this thread"));
  network->fc1(x);
  std::string elsewhere;
  std::thread([&] { elsewhere = error_of([&] { network->fc2(h); }); }).join();
  CHECK(contains(elsewhere, "that layer has not run in this thread"));
  network->fc2(h); // here it has
  CHECK(contains(
      error_of([&] { network->fc2(h); }),
      "has not run in this thread since the second one last did"));

  network->fc1(x); // two streams through one pair: never a wrong term unseen
  network->fc1(x + 1);
  network->fc2(h);
  CHECK(contains(error_of([&] { network->fc2(h); }), "that layer has not run"));

  network->fc1(torch::randn({4, kWidth}));
  CHECK(contains(
      error_of([&] { network->fc2(h); }),
      "computes [4, 8] from the input of its first layer, and the second one "
      "makes [2, 3, 8]"));

  // A weight that is read otherwise than by linear.
  const Tensor manual = torch::einsum("bti,oi->bto", {x, network->fc1->weight});
  CHECK(contains(error_of([&] { network->fc2(manual); }), "was read instead"));
  // Reading it does no harm where the layer runs after all.
  CHECK(peft::effective(network->fc1->weight).defined());
  network->forward(x);
  CHECK(terms_under_way() == 0);

  // An adapter on the same weight that stands in for it.
  auto whole =
      peft::attach(*network, BitFitOptions().modules_to_save({"fc1"}), "whole");
  CHECK(contains(
      error_of([&] { network->forward(x); }), "replaces it; disable that one"));
  whole.disable();
  network->forward(x);
}

TEST_CASE("switched off between the two layers, nothing is added") {
  seed(6);
  FeedForward network;
  const Tensor x = torch::randn({2, 3, kWidth});
  const Tensor before = network->forward(x).detach();
  auto adapter = peft::attach(*network, ParallelAdapterOptions(3));
  randomise(adapter);
  const Tensor acting = network->forward(x).detach();
  const Tensor h = torch::relu(network->fc1(x));
  adapter.disable();
  CHECK(equal_bits(network->fc2(h).detach(), before));
  adapter.enable();
  CHECK(equal_bits(network->forward(x).detach(), acting));
  adapter.disable();
  const Tensor off = torch::relu(network->fc1(x));
  adapter.enable();
  CHECK(contains(error_of([&] { network->fc2(off); }), "was switched on"));
  CHECK(equal_bits(network->forward(x).detach(), acting));
}

TEST_CASE("layers computed again in backward get the same gradients") {
  seed(7);
  FeedForward network;
  network->to(torch::kDouble);
  auto adapter = peft::attach(*network, ParallelAdapterOptions(3));
  randomise(adapter);
  const Tensor x =
      torch::randn({2, 3, kWidth}, torch::kDouble).set_requires_grad(true);
  const auto gradients = [&](const std::function<Tensor(const Tensor&)>& f) {
    for (auto& p : adapter.parameters()) {
      p.mutable_grad() = Tensor();
    }
    x.mutable_grad() = Tensor();
    f(f(x)).pow(2).sum().backward(); // one layer used twice
    std::vector<Tensor> result{x.grad().clone()};
    for (const auto& p : adapter.parameters()) {
      result.push_back(p.grad().clone());
    }
    return result;
  };
  const auto direct =
      gradients([&](const Tensor& t) { return network->forward(t); });
  const auto again = gradients([&](const Tensor& t) {
    return Checkpoint::apply(t, network, bottleneck(adapter).up_bias);
  });
  CHECK(adapted::all_close(again, direct));
  CHECK(terms_under_way() == 0);
}

TEST_CASE("several threads at once, each with its own term") {
  seed(8);
  auto encoder = small_encoder();
  encoder->eval();
  auto adapter = peft::attach(*encoder, ParallelAdapterOptions(3));
  randomise(adapter);
  torch::NoGradGuard no_grad;
  std::vector<Tensor> inputs, expected;
  for (int i = 0; i < 4; ++i) {
    inputs.push_back(torch::randn({5, 3, kWidth}));
    expected.push_back(encoder->forward(inputs.back()));
  }
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (size_t i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      torch::NoGradGuard guard;
      for (int round = 0; round < 50; ++round) {
        if (!equal_bits(encoder->forward(inputs[i]), expected[i])) {
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

TEST_CASE("several parallel adapters add up; LoRA beside them") {
  seed(9);
  FeedForward network;
  const Tensor x = torch::randn({2, 3, kWidth});
  const Tensor before = network->forward(x).detach();
  auto one = peft::attach(*network, ParallelAdapterOptions(3), "one");
  auto two = peft::attach(
      *network,
      ParallelAdapterOptions(2).learned_scaling(true).bias(false),
      "two");
  CHECK(two.num_parameters() == 2 * 2 * kWidth + 1);
  randomise(one, 1);
  randomise(two, 2);
  CHECK(close(network->forward(x), before + term(one, x) + term(two, x)));
  {
    peft::ActiveAdapters only({"two"});
    CHECK(close(network->forward(x), before + term(two, x)));
  }
  auto lora = peft::attach(
      *network, LoraOptions(2).targets({"fc1", "fc2"}).init("random"), "lora");
  const auto weight = [&](const torch::nn::Linear& linear, size_t site) {
    auto& delta = adapted::lora(lora, site);
    return peft::base(linear->weight) + 4 * at::mm(delta.lora_B, delta.lora_A);
  };
  const Tensor h =
      torch::relu(at::linear(x, weight(network->fc1, 0), network->fc1->bias));
  const Tensor fed = at::linear(
      h, weight(network->fc2, 1), peft::base(network->fc2->bias).detach());
  CHECK(close(network->forward(x), fed + term(one, x) + term(two, x)));
  one.disable();
  CHECK(close(network->forward(x), fed + term(two, x)));
}

TEST_CASE("a clone's pairs are its own") {
  seed(10);
  FeedForward network;
  const Tensor x = torch::randn({2, 3, kWidth});
  auto adapter = peft::attach(*network, ParallelAdapterOptions(3));
  randomise(adapter);
  auto twin = peft::clone(network);
  auto copy = peft::get_adapter(*twin);
  const auto& sites = copy.shared_state()->sites;
  CHECK(
      &dynamic_cast<peft::detail::ParallelOutputDelta&>(*sites[1].delta)
           .input() == sites[0].delta.get());
  randomise(copy, 21);
  const Tensor base = [&] {
    peft::ActiveAdapters none(Names{});
    return network->forward(x).detach();
  }();
  // Their layers in turns: no term goes astray.
  const Tensor h1 = torch::relu(network->fc1(x));
  const Tensor h2 = torch::relu(twin->fc1(x));
  CHECK(close(network->fc2(h1), base + term(adapter, x)));
  CHECK(close(twin->fc2(h2), base + term(copy, x)));
}

TEST_CASE("what parallel adapters refuse") {
  struct Row {
    std::string name;
    std::function<std::shared_ptr<torch::nn::Module>()> model;
    ParallelAdapterOptions options;
    Names parts;
  };
  const auto network = [] {
    return std::static_pointer_cast<torch::nn::Module>(FeedForward().ptr());
  };
  const auto mlp = [] {
    return std::static_pointer_cast<torch::nn::Module>(
        std::make_shared<networks::Mlp>());
  };
  const auto nameless = [] {
    return std::static_pointer_cast<torch::nn::Module>(
        torch::nn::Sequential(torch::nn::Linear(4, 4), torch::nn::Linear(4, 4))
            .ptr());
  };
  const std::vector<Row> rows{
      {"too wide",
       network,
       ParallelAdapterOptions(9),
       {"bottleneck of 9 features is wider than the 8"}},
      {"none", network, ParallelAdapterOptions(0), {"1 feature or more"}},
      {"a non-linearity that there is not",
       network,
       ParallelAdapterOptions(2).non_linearity("x"),
       {"no non_linearity 'x'"}},
      {"a norm that there is not",
       network,
       ParallelAdapterOptions(2).layer_norm("x"),
       {"'none', 'in' or 'out'"}},
      {"an infinite scaling",
       network,
       ParallelAdapterOptions(2).scaling(INFINITY),
       {"scaling must be finite"}},
      {"a layer that there is not",
       network,
       ParallelAdapterOptions(2).leave_out({1}),
       {"leave_out names layer 1", "are 0 to 0"}},
      {"widths that differ",
       mlp,
       ParallelAdapterOptions(2),
       {"adds to 'fc2', which has 12 features",
        "'fc1', whose weight is [16, 10]"}},
      {"names that do not tell",
       nameless,
       ParallelAdapterOptions(2),
       {"find no first layer of a feed-forward",
        "inputs({...})",
        "targets({...})"}},
      {"half of the names",
       nameless,
       ParallelAdapterOptions(2).inputs({"0"}),
       {"find no second layer"}},
      {"layers that do not meet",
       nameless,
       ParallelAdapterOptions(2).inputs({"0"}).targets({"1"}),
       {"finds no layer in front of '1'"}}};
  for (const auto& row : rows) {
    INFO(row.name);
    auto model = row.model();
    const auto before = state_of(*model);
    const auto error = error_of([&] { peft::attach(*model, row.options); });
    INFO(error);
    for (const auto& part : row.parts) {
      CHECK(contains(error, part));
    }
    CHECK(same_state(state_of(*model), before));
  }
}

// ---- Widening ---------------------------------------------------------------

TEST_CASE("widening an encoder: the same function, a plain network") {
  for (const bool learned : {false, true}) {
    INFO("learned: " << learned);
    seed(11);
    auto encoder = small_encoder();
    encoder->to(torch::kDouble);
    const Tensor x = torch::randn({5, 3, kWidth}, torch::kDouble);
    torch::NoGradGuard no_grad;
    const auto plain = adapted::operator_names([&] { encoder->forward(x); });
    const auto parameters = peft::count_parameters(*encoder).total;
    auto adapter = peft::attach(
        *encoder, ParallelAdapterOptions(3).learned_scaling(learned));
    randomise(adapter);
    adapter.set_scale(0.8);
    const Tensor acting = encoder->forward(x);
    const auto with = adapted::operator_names([&] { encoder->forward(x); });

    peft::merge_by_widening(*encoder);
    CHECK(close(encoder->forward(x), acting));
    CHECK(peft::adapters(*encoder).empty());
    CHECK(encoder->named_children().contains("peft") == false);
    const auto after = adapted::operator_names([&] { encoder->forward(x); });
    CHECK(after == plain);
    CHECK(after.size() < with.size());
    CHECK(
        peft::count_parameters(*encoder).total ==
        parameters + 2 * (2 * 3 * kWidth + 3));
    for (const auto& p : encoder->named_parameters()) {
      INFO(p.key());
      CHECK_FALSE(peft::is_adapted(p.value()));
      CHECK(p.value().requires_grad());
    }
    auto* layer =
        encoder->layers->ptr(0)->as<torch::nn::TransformerEncoderLayerImpl>();
    CHECK(layer->linear1->weight.sizes() == torch::IntArrayRef({19, kWidth}));
    CHECK(layer->linear1->bias.sizes() == torch::IntArrayRef({19}));
    CHECK(layer->linear2->weight.sizes() == torch::IntArrayRef({kWidth, 19}));
    CHECK(layer->linear1->options.out_features() == 19);
    CHECK(layer->linear2->options.in_features() == 19);
    CHECK(layer->options.dim_feedforward() == 19);
    CHECK(layer->linear1->weight.is_contiguous());

    // It trains, clones and loads as any network of that width.
    CHECK(close(
        std::dynamic_pointer_cast<torch::nn::TransformerEncoderImpl>(
            encoder->clone())
            ->forward(x),
        acting));
    TemporaryDirectory folder;
    torch::save(encoder, folder / "widened.pt");
    torch::nn::TransformerEncoder wider(torch::nn::TransformerEncoderOptions(
        layer_options().dim_feedforward(19), 2));
    wider->to(torch::kDouble);
    torch::load(wider, folder / "widened.pt");
    CHECK(close(wider->forward(x), acting));
    {
      torch::AutoGradMode on(true);
      encoder->forward(x).sum().backward();
      CHECK(
          layer->linear1->weight.grad().sizes() ==
          layer->linear1->weight.sizes());
    }
    auto lora = peft::attach(*encoder, LoraOptions(2).targets({"linear1"}));
    CHECK(close(encoder->forward(x), acting));
  }
}

TEST_CASE("widening after training, in a decoder layer, with a head") {
  seed(12);
  struct Network : torch::nn::Module {
    torch::nn::TransformerDecoderLayer layer{register_module(
        "layer",
        torch::nn::TransformerDecoderLayer(
            torch::nn::TransformerDecoderLayerOptions(kWidth, 2)
                .dim_feedforward(16)
                .dropout(0)))};
    torch::nn::Linear head{
        register_module("head", torch::nn::Linear(kWidth, 2))};
    Tensor forward(const Tensor& x) {
      return head(layer(x, x));
    }
  } network;
  const Tensor x = torch::randn({5, 3, kWidth});
  auto adapter = peft::attach(
      network, ParallelAdapterOptions(3).modules_to_save({"head"}));
  torch::optim::AdamW optimizer(
      network.parameters(), torch::optim::AdamWOptions(1e-2));
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    network.forward(x).pow(2).sum().backward();
    optimizer.step();
  }
  const Tensor acting = network.forward(x).detach();
  peft::merge_by_widening(network);
  CHECK(close(network.forward(x), acting));
  CHECK(network.layer->options.dim_feedforward() == 19);
  for (const auto& p : network.parameters()) {
    CHECK_FALSE(peft::is_adapted(p));
  }
}

TEST_CASE("widening where the caller knows the ReLU; without biases") {
  seed(13);
  const Tensor x = torch::randn({2, 3, kWidth});
  FeedForward network;
  auto adapter = peft::attach(*network, ParallelAdapterOptions(3), "p");
  randomise(adapter);
  const Tensor acting = network->forward(x).detach();
  CHECK(contains(
      error_of([&] { peft::merge_by_widening(*network, "p"); }),
      "WideningOptions().is_relu(true)"));
  peft::merge_by_widening(*network, "p", WideningOptions().is_relu(true));
  CHECK(close(network->forward(x), acting));

  using namespace peft::models;
  T5DenseReluDense t5(T5Options().d_model(kWidth).d_ff(12));
  t5->eval();
  auto with_biases = peft::attach(*t5, ParallelAdapterOptions(3));
  randomise(with_biases);
  const auto before = state_of(*t5);
  CHECK(contains(
      error_of([&] {
        peft::merge_by_widening(
            *t5, "default", WideningOptions().is_relu(true));
      }),
      "ParallelAdapterOptions().bias(false)"));
  CHECK(same_state(state_of(*t5), before));
  with_biases.detach();
  auto bare = peft::attach(*t5, ParallelAdapterOptions(3).bias(false));
  randomise(bare);
  const Tensor theirs = t5->forward(x).detach();
  peft::merge_by_widening(*t5, "default", WideningOptions().is_relu(true));
  CHECK(close(t5->forward(x), theirs));
  CHECK(t5->wi->weight.size(0) == 15);

  // Half precision: the sum is rounded once.
  FeedForward half;
  half->to(torch::kBFloat16);
  auto rounded = peft::attach(*half, ParallelAdapterOptions(3));
  randomise(rounded);
  const Tensor coarse = half->forward(x.to(torch::kBFloat16)).detach();
  peft::merge_by_widening(*half, "default", WideningOptions().is_relu(true));
  CHECK(half->fc1->weight.scalar_type() == torch::kBFloat16);
  CHECK(close(half->forward(x.to(torch::kBFloat16)), coarse, 0.05, 0.05));
}

TEST_CASE("widening is refused whole, with the reason") {
  struct Row {
    std::string name;
    std::function<void(torch::nn::TransformerEncoder&)> prepare;
    std::string part;
  };
  using Encoder = torch::nn::TransformerEncoder;
  const auto layer = [](Encoder& encoder, size_t i) {
    return encoder->layers->ptr(i)
        ->as<torch::nn::TransformerEncoderLayerImpl>();
  };
  const std::vector<Row> rows{
      {"none of that name", [](Encoder&) {}, "no adapter 'default'"},
      {"another method",
       [](Encoder& e) { peft::attach(*e, HoulsbyOptions(2)); },
       "only a parallel adapter can be merged by widening, and 'default' is a "
       "HOULSBY"},
      {"disabled",
       [](Encoder& e) {
         peft::attach(*e, ParallelAdapterOptions(2)).disable();
       },
       "is disabled"},
      {"its own non-linearity",
       [](Encoder& e) {
         peft::attach(*e, ParallelAdapterOptions(2).non_linearity("gelu"));
       },
       "non_linearity gelu, not relu"},
      {"its own norm",
       [](Encoder& e) {
         peft::attach(*e, ParallelAdapterOptions(2).layer_norm("out"));
       },
       "layer norm of its own"},
      {"the last layer has GELU",
       [&](Encoder& e) {
         layer(e, 1)->options.activation(torch::kGELU);
         peft::attach(*e, ParallelAdapterOptions(2));
       },
       "feed-forward of 'layers.1.linear1'"},
      {"another adapter on the last layer",
       [](Encoder& e) {
         peft::attach(*e, ParallelAdapterOptions(2));
         peft::attach(*e, LoraOptions(2).targets({"layers.1.linear2"}), "x");
       },
       "'layers.1.linear2' cannot be widened: another adapter"},
      {"a tied weight",
       [&](Encoder& e) {
         layer(e, 1)->linear1->weight = layer(e, 0)->linear1->weight;
         layer(e, 1)->linear1->bias = layer(e, 0)->linear1->bias;
         peft::attach(*e, ParallelAdapterOptions(2).leave_out({1}));
       },
       "tied to others"},
      {"beside the attention",
       [](Encoder& e) {
         peft::attach(
             *e,
             ParallelAdapterOptions(2)
                 .inputs({"self_attn"})
                 .targets({"out_proj"}));
       },
       "no torch::nn::Linear"},
      {"not a number",
       [](Encoder& e) {
         auto a = peft::attach(*e, ParallelAdapterOptions(2));
         torch::NoGradGuard no_grad;
         bottleneck(a, 1).up_bias.fill_(NAN);
       },
       "layers.1.linear1"}};
  for (const auto& row : rows) {
    INFO(row.name);
    seed(14);
    auto encoder = small_encoder();
    row.prepare(encoder);
    const auto before = state_of(*encoder);
    const auto error = error_of([&] { peft::merge_by_widening(*encoder); });
    INFO(error);
    CHECK(contains(error, row.part));
    CHECK(same_state(state_of(*encoder), before));
    CHECK(
        layer(encoder, 0)->linear1->weight.sizes() ==
        torch::IntArrayRef({16, kWidth}));
  }
}

TEST_CASE("an ordinary merge names the widening") {
  auto encoder = small_encoder();
  auto adapter = peft::attach(*encoder, ParallelAdapterOptions(2));
  CHECK(contains(
      error_of([&] { peft::merge(*encoder); }), "peft::merge_by_widening"));
  adapter.detach();
  auto other =
      peft::attach(*encoder, ParallelAdapterOptions(2).non_linearity("tanh"));
  CHECK_FALSE(
      contains(error_of([&] { peft::merge(*encoder); }), "merge_by_widening"));
}

TEST_CASE("an adapter on a part of a model is widened from the whole") {
  seed(15);
  auto encoder = small_encoder();
  torch::nn::Sequential model(torch::nn::Linear(kWidth, kWidth), encoder);
  const Tensor x = torch::randn({5, 3, kWidth});
  auto adapter = peft::attach(*encoder, ParallelAdapterOptions(2));
  randomise(adapter);
  const Tensor acting = model->forward(x).detach();
  peft::merge_by_widening(*model);
  CHECK(close(model->forward(x), acting));
  CHECK(peft::adapters(*model).empty());
}

} // namespace test_parallel_adapter
