/// The bottleneck, Houlsby's and Pfeiffer's adapters, AdapterDrop: formulas in
/// float64, where they go in each network, and what is refused.

#include "adapted.h"
#include "gradcheck.h"
#include "model_state.h"
#include "networks.h"
#include "test.h"

#include <peft/methods/houlsby.h>
#include <peft/methods/parallel_adapter.h>
#include <peft/methods/pfeiffer.h>
#include <peft/models/gpt2.h>
#include <peft/models/llama.h>
#include <peft/models/t5.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace test_bottleneck {

namespace {

using peft::AdapterDrop;
using peft::Bottleneck;
using peft::BottleneckOptions;
using peft::HoulsbyOptions;
using peft::ParallelAdapterOptions;
using peft::PfeifferOptions;
using torch::Tensor;
using Names = std::vector<std::string>;

constexpr int64_t kWidth = 8;

torch::nn::TransformerEncoder small_encoder(double dropout = 0) {
  return torch::nn::TransformerEncoder(torch::nn::TransformerEncoderOptions(
      torch::nn::TransformerEncoderLayerOptions(kWidth, 2)
          .dim_feedforward(16)
          .dropout(dropout),
      2));
}

peft::models::BertModel small_bert() {
  return peft::models::BertModel(peft::models::BertOptions()
                                     .vocab_size(20)
                                     .hidden_size(kWidth)
                                     .num_hidden_layers(2)
                                     .num_attention_heads(2)
                                     .intermediate_size(16)
                                     .max_position_embeddings(8));
}

/// A network of two blocks that normalise first, with a LayerLoop or without.
struct PreNormBlock : torch::nn::Module {
  explicit PreNormBlock(bool bias)
      : fc1(register_module(
            "fc1",
            torch::nn::Linear(
                torch::nn::LinearOptions(kWidth, 12).bias(bias)))),
        fc2(register_module(
            "fc2",
            torch::nn::Linear(
                torch::nn::LinearOptions(12, kWidth).bias(bias)))) {}
  Tensor forward(const Tensor& h) {
    return h + fc2(torch::relu(fc1(norm(h))));
  }
  torch::nn::LayerNorm norm{register_module(
      "norm",
      torch::nn::LayerNorm(torch::nn::LayerNormOptions({kWidth})))};
  torch::nn::Linear fc1, fc2;
};

struct PreNorm : torch::nn::Module {
  explicit PreNorm(bool with_loop, bool bias = true) {
    register_module("blocks", blocks);
    for (int i = 0; i < 2; ++i) {
      blocks->push_back(std::make_shared<PreNormBlock>(bias));
    }
    if (with_loop) {
      loop = register_module(
          "loop", peft::LayerLoop(peft::LayerLoopOptions(kWidth, 2)));
    }
  }
  Tensor forward(Tensor h) {
    if (loop.is_empty()) {
      for (auto& block : *blocks) {
        h = block->as<PreNormBlock>()->forward(h);
      }
      return h;
    }
    return loop
        ->forward(
            h,
            {},
            *blocks,
            [](torch::nn::Module& each, const peft::LayerCall& call) {
              return each.as<PreNormBlock>()->forward(call.hidden);
            })
        .hidden;
  }
  torch::nn::ModuleList blocks;
  peft::LayerLoop loop{nullptr};
};

/// A network and a call of it that reaches everything.
struct Case {
  std::string name;
  std::shared_ptr<torch::nn::Module> module;
  std::function<Tensor()> run;
};

Case encoder_case(double dropout = 0) {
  auto encoder = small_encoder(dropout);
  const Tensor x = torch::randn({5, 3, kWidth});
  return {"TransformerEncoder", encoder.ptr(), [encoder, x]() mutable {
            const auto dtype = encoder->parameters().front().scalar_type();
            return encoder->forward(x.to(dtype));
          }};
}

std::vector<Case> networks_of_every_kind() {
  using namespace peft::models;
  const Tensor ids = torch::randint(1, 20, {3, 6}, torch::kLong);
  std::vector<Case> result{encoder_case()};
  auto bert = small_bert();
  result.push_back({"BERT", bert.ptr(), [bert, ids]() mutable {
                      return bert->forward(ids);
                    }});
  Gpt2Model gpt2(Gpt2Options()
                     .vocab_size(20)
                     .n_positions(8)
                     .n_embd(kWidth)
                     .n_layer(2)
                     .n_head(2));
  result.push_back({"GPT-2", gpt2.ptr(), [gpt2, ids]() mutable {
                      return gpt2->forward(ids);
                    }});
  LlamaModel llama(LlamaOptions()
                       .vocab_size(20)
                       .hidden_size(kWidth)
                       .intermediate_size(12)
                       .num_hidden_layers(2)
                       .num_attention_heads(2));
  result.push_back({"LLaMA", llama.ptr(), [llama, ids]() mutable {
                      return llama->forward(ids);
                    }});
  for (const char* kind : {"relu", "gated-gelu"}) {
    T5ForConditionalGeneration t5(T5Options()
                                      .vocab_size(20)
                                      .d_model(kWidth)
                                      .d_kv(4)
                                      .d_ff(12)
                                      .num_layers(2)
                                      .num_heads(2)
                                      .feed_forward_proj(kind));
    // at::matmul takes other ways for weights that train: freeze them, so that
    // bits can be compared.
    peft::freeze(*t5);
    result.push_back({std::string("T5 ") + kind, t5.ptr(), [t5, ids]() mutable {
                        return t5->forward(ids, {}, ids.flip(1));
                      }});
  }
  for (auto& each : result) {
    each.module->eval();
  }
  return result;
}

using Attach =
    std::function<peft::Adapter(torch::nn::Module&, const std::string&)>;

struct Method {
  std::string name;
  Attach attach;
  bool exact; // the identity to the bit at the start
};

template <class Options>
Attach attach_with(const Options& options) {
  return [options](torch::nn::Module& model, const std::string& name) {
    return peft::attach(model, options, name);
  };
}

/// Smooth ones, so that finite differences are fair.
std::vector<Method> methods() {
  return {
      {"Houlsby", attach_with(HoulsbyOptions(3)), false},
      {"Houlsby, zero_up", attach_with(HoulsbyOptions(3).zero_up(true)), true},
      {"Pfeiffer",
       attach_with(PfeifferOptions().reduction_factor(2).non_linearity("tanh")),
       false},
      {"Pfeiffer, zero_up",
       attach_with(PfeifferOptions(3).zero_up(true).non_linearity("gelu")),
       true},
      {"parallel",
       attach_with(ParallelAdapterOptions(3).non_linearity("tanh")),
       true},
      {"parallel, learned",
       attach_with(ParallelAdapterOptions(3)
                       .non_linearity("silu")
                       .learned_scaling(true)
                       .layer_norm("in")),
       true}};
}

/// A(x) = s · (up g(down x + b) + b'), written out.
Tensor written_out(
    const Tensor& x,
    const std::map<std::string, Tensor>& p,
    const std::function<Tensor(const Tensor&)>& g,
    double s = 1) {
  const Tensor hidden =
      g(x.matmul(p.at("down_weight").t()) + p.at("down_bias"));
  return s * (hidden.matmul(p.at("up_weight").t()) + p.at("up_bias"));
}

std::map<std::string, Tensor> tensors_of(const peft::BottleneckImpl& a) {
  std::map<std::string, Tensor> result;
  for (const auto& item : a.named_parameters()) {
    result[item.key()] = item.value();
  }
  return result;
}

/// The bottlenecks of an adapter, in the order of its sites.
std::vector<const peft::BottleneckImpl*> bottlenecks(
    const peft::Adapter& adapter) {
  std::vector<const peft::BottleneckImpl*> result;
  for (const auto& record : adapter.shared_state()->sites) {
    for (const auto& child : record.delta->children()) {
      if (const auto* a = child->as<peft::BottleneckImpl>()) {
        result.push_back(a);
      }
    }
  }
  return result;
}

Names site_names(const peft::Adapter& adapter, const std::string& what) {
  Names result;
  for (const auto& site : adapter.sites()) {
    if (site.what.find(what) != std::string::npos) {
      result.push_back(site.name);
    }
  }
  return result;
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

Tensor layer_norm(const torch::nn::LayerNorm& norm, const Tensor& x) {
  return at::layer_norm(
      x,
      {kWidth},
      peft::base(norm->weight).detach(),
      peft::base(norm->bias).detach(),
      norm->options.eps());
}

} // namespace

// ---- The module -------------------------------------------------------------

TEST_CASE("a bottleneck is its formula, for each non-linearity") {
  const std::map<std::string, std::function<Tensor(const Tensor&)>> rows{
      {"relu", [](const Tensor& x) { return x.clamp_min(0); }},
      {"gelu",
       [](const Tensor& x) {
         return 0.5 * x * (1 + torch::erf(x / std::sqrt(2.0)));
       }},
      {"gelu_new",
       [](const Tensor& x) {
         return 0.5 * x *
             (1 + torch::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x.pow(3))));
       }},
      {"silu", [](const Tensor& x) { return x * torch::sigmoid(x); }},
      {"swish", [](const Tensor& x) { return x / (1 + torch::exp(-x)); }},
      {"tanh", [](const Tensor& x) { return 2 * torch::sigmoid(2 * x) - 1; }},
      {"sigmoid", [](const Tensor& x) { return 1 / (1 + torch::exp(-x)); }},
      {"leaky_relu",
       [](const Tensor& x) { return torch::where(x > 0, x, 0.01 * x); }}};
  REQUIRE(rows.size() == peft::detail::activations().size());
  for (const auto& [name, g] : rows) {
    INFO(name);
    seed(1);
    Bottleneck a(BottleneckOptions(6, 3).non_linearity(name).scaling(1.5));
    a->to(torch::kDouble);
    torch::NoGradGuard no_grad;
    for (auto& p : a->parameters()) {
      p.normal_();
    }
    const Tensor x = torch::randn({2, 4, 6}, torch::kDouble);
    CHECK(close(a->forward(x), written_out(x, tensors_of(*a), g, 1.5)));
  }
}

TEST_CASE("layer norm, learned scaling and dropout of a bottleneck") {
  seed(2);
  const Tensor x = torch::randn({5, 6}, torch::kDouble);
  const auto relu = [](const Tensor& t) { return torch::relu(t); };
  for (const std::string norm : {"none", "in", "out"}) {
    INFO(norm);
    Bottleneck a(
        BottleneckOptions(6, 3).learned_scaling(true).layer_norm(norm));
    a->to(torch::kDouble);
    CHECK(a->scaling.item<double>() == 1); // adapter-hub's start
    torch::NoGradGuard no_grad;
    for (auto& p : a->parameters()) {
      p.normal_();
    }
    const auto p = tensors_of(*a);
    CHECK(p.size() == (norm == "none" ? 5 : 7));
    const auto normalised = [&](const Tensor& t) {
      const Tensor mean = t.mean(-1, true);
      const Tensor variance = (t - mean).pow(2).mean(-1, true);
      return (t - mean) / (variance + 1e-5).sqrt() * a->norm_weight +
          a->norm_bias;
    };
    const double s = a->scaling.item<double>();
    Tensor expected = written_out(norm == "in" ? normalised(x) : x, p, relu, s);
    if (norm == "out") {
      expected = normalised(expected);
    }
    CHECK(close(a->forward(x), expected));
  }

  Bottleneck dropping(BottleneckOptions(400, 3).dropout(0.5));
  const Tensor rows = torch::randn({4, 400});
  const Tensor trained = dropping->forward(rows);
  dropping->eval();
  const Tensor whole = dropping->forward(rows);
  const Tensor dropped = trained.eq(0);
  CHECK(dropped.sum().item<int64_t>() > 600);
  CHECK(dropped.sum().item<int64_t>() < 1000);
  CHECK(close(
      trained.masked_select(~dropped), 2 * whole.masked_select(~dropped)));
  CHECK(dropping->up_bias.defined());
  Bottleneck bare(BottleneckOptions(6, 3).bias(false));
  CHECK(bare->parameters().size() == 2);
  CHECK(bare->forward(x.to(torch::kFloat)).sizes() == x.sizes());
}

TEST_CASE("where a bottleneck starts") {
  seed(3);
  Bottleneck normal(BottleneckOptions(300, 100));
  CHECK(normal->up_weight.std().item<double>() == Approx(0.02).epsilon(0.02));
  CHECK(normal->down_weight.std().item<double>() == Approx(0.02).epsilon(0.02));
  CHECK(normal->down_weight.abs().max().item<double>() > 0.06); // not cut

  Bottleneck cut(
      BottleneckOptions(300, 100).init("truncated_normal").init_scale(1e-3));
  for (const Tensor& w : {cut->down_weight, cut->up_weight}) {
    CHECK(w.abs().max().item<double>() <= 2e-3);
    CHECK(w.abs().max().item<double>() > 1.98e-3);
    // A normal cut at two deviations has 0.8796 of its deviation.
    CHECK(w.std().item<double>() == Approx(0.8796e-3).epsilon(0.02));
    CHECK(std::abs(w.mean().item<double>()) < 3e-5);
  }

  Bottleneck lora(BottleneckOptions(300, 100).init("lora"));
  CHECK(lora->up_weight.count_nonzero().item<int64_t>() == 0);
  const double bound = 1 / std::sqrt(300.0);
  CHECK(lora->down_weight.abs().max().item<double>() <= bound);
  CHECK(lora->down_weight.abs().max().item<double>() > 0.99 * bound);

  Bottleneck zero(BottleneckOptions(300, 100).zero_up(true));
  CHECK(zero->up_weight.count_nonzero().item<int64_t>() == 0);
  CHECK(zero->down_weight.count_nonzero().item<int64_t>() == 30000);
  for (const auto& a : {normal, cut, lora, zero}) {
    CHECK(a->down_bias.count_nonzero().item<int64_t>() == 0);
    CHECK(a->up_bias.count_nonzero().item<int64_t>() == 0);
    CHECK(a->down_weight.sizes() == torch::IntArrayRef({100, 300}));
    CHECK(a->up_weight.sizes() == torch::IntArrayRef({300, 100}));
  }
  seed(3);
  Bottleneck again(BottleneckOptions(300, 100));
  CHECK(equal_bits(again->up_weight, normal->up_weight));
}

// ---- Formulas in a network --------------------------------------------------

TEST_CASE("Houlsby on an unmodified TransformerEncoder") {
  seed(4);
  auto encoder = small_encoder();
  encoder->to(torch::kDouble);
  const Tensor x = torch::randn({5, 3, kWidth}, torch::kDouble);
  auto plain = peft::clone(encoder);
  auto adapter =
      peft::attach(*encoder, HoulsbyOptions(3).non_linearity("tanh"));
  randomise(adapter);
  const double scale = 0.7;
  adapter.set_scale(scale);

  const auto all = bottlenecks(adapter);
  REQUIRE(all.size() == 4);
  const auto a = [&](size_t i, const Tensor& y) {
    return y + scale * written_out(y, tensors_of(*all[i]), [](const Tensor& t) {
                 return torch::tanh(t);
               });
  };
  const auto values = adapter.named_parameters();
  const auto norm = [&](const std::string& name,
                        const torch::nn::LayerNorm& original,
                        const Tensor& v) {
    const auto between = [&](const std::string& key, const Tensor& base) {
      return base + scale * (values[name + "." + key] - base);
    };
    return at::layer_norm(
        v,
        {kWidth},
        between("weight", original->weight),
        between("bias", original->bias));
  };
  Tensor h = x;
  for (size_t i = 0; i < 2; ++i) {
    auto* layer =
        plain->layers->ptr(i)->as<torch::nn::TransformerEncoderLayerImpl>();
    const std::string name = "layers." + std::to_string(i) + ".";
    const Tensor attended = std::get<0>(layer->self_attn->forward(h, h, h));
    h = norm(name + "norm1", layer->norm1, h + a(2 * i, attended));
    const Tensor fed = layer->linear2(torch::relu(layer->linear1(h)));
    h = norm(name + "norm2", layer->norm2, h + a(2 * i + 1, fed));
  }
  CHECK(close(encoder->forward(x), h));
}

TEST_CASE("Pfeiffer on an unmodified TransformerEncoder, in both forms") {
  seed(5);
  auto encoder = small_encoder();
  encoder->to(torch::kDouble);
  const Tensor x = torch::randn({5, 3, kWidth}, torch::kDouble);
  auto plain = peft::clone(encoder);
  auto adapter = peft::attach(*encoder, PfeifferOptions(3));
  randomise(adapter);
  const auto all = bottlenecks(adapter);
  REQUIRE(all.size() == 2);
  CHECK(site_names(adapter, "bottleneck") == in_layers("layers", {"norm2"}));
  for (const double scale : {1.0, -0.5}) {
    adapter.set_scale(scale);
    Tensor ours = x, published = x;
    for (size_t i = 0; i < 2; ++i) {
      auto* layer =
          plain->layers->ptr(i)->as<torch::nn::TransformerEncoderLayerImpl>();
      const auto a = [&](const Tensor& z) {
        return scale * written_out(z, tensors_of(*all[i]), [](const Tensor& t) {
                 return torch::relu(t);
               });
      };
      const auto half = [&](const Tensor& h) {
        return layer->norm1(
            h + std::get<0>(layer->self_attn->forward(h, h, h)));
      };
      const auto feed = [&](const Tensor& h) {
        return layer->linear2(torch::relu(layer->linear1(h)));
      };
      const Tensor in = half(ours);
      const Tensor v = in + feed(in);
      ours = layer->norm2(v + a(layer->norm2(v)));
      // adapter-hub's SeqBn: original_ln_before, residual_before_ln,
      // original_ln_after.
      const Tensor input = half(published);
      const Tensor residual = feed(input);
      const Tensor o = a(layer->norm2(residual + input)) + residual;
      published = layer->norm2(o + input);
    }
    CHECK(close(encoder->forward(x), ours));
    CHECK(close(encoder->forward(x), published));
  }
}

TEST_CASE("Houlsby and Pfeiffer in BERT's halves of a layer") {
  seed(6);
  auto bert = small_bert();
  bert->to(torch::kDouble);
  bert->eval();
  auto& output =
      *bert->encoder->layer[1]->as<peft::models::BertLayerImpl>()->output;
  auto& attention = *bert->encoder->layer[1]
                         ->as<peft::models::BertLayerImpl>()
                         ->attention->output;
  const Tensor x = torch::randn({2, 4, 16}, torch::kDouble);
  const Tensor y = torch::randn({2, 4, kWidth}, torch::kDouble);
  const Tensor residual = torch::randn({2, 4, kWidth}, torch::kDouble);
  const Tensor fed = output.dense->forward(x);
  const Tensor attended = attention.dense->forward(y);
  const auto relu = [](const Tensor& t) { return torch::relu(t); };

  auto houlsby = peft::attach(
      *bert, HoulsbyOptions(3).non_linearity("relu").train_layer_norms(false));
  randomise(houlsby);
  auto all = bottlenecks(houlsby);
  REQUIRE(all.size() == 4);
  CHECK(close(
      attention.forward(y, residual),
      layer_norm(
          attention.norm,
          attended + written_out(attended, tensors_of(*all[2]), relu) +
              residual)));
  CHECK(close(
      output.forward(x, residual),
      layer_norm(
          output.norm,
          fed + written_out(fed, tensors_of(*all[3]), relu) + residual)));
  houlsby.detach();

  auto pfeiffer = peft::attach(*bert, PfeifferOptions(3));
  randomise(pfeiffer);
  all = bottlenecks(pfeiffer);
  REQUIRE(all.size() == 2);
  const Tensor v = fed + residual;
  CHECK(close(
      output.forward(x, residual),
      layer_norm(
          output.norm,
          v +
              written_out(
                  layer_norm(output.norm, v), tensors_of(*all[1]), relu))));
  CHECK(equal_bits(
      attention.forward(y, residual),
      layer_norm(attention.norm, attended + residual)));
}

TEST_CASE("Pfeiffer through the loop over layers") {
  seed(7);
  PreNorm model(/*with_loop=*/true);
  model.to(torch::kDouble);
  const Tensor x = torch::randn({2, 3, kWidth}, torch::kDouble);
  auto adapter = peft::attach(model, PfeifferOptions(3));
  randomise(adapter);
  CHECK(adapter.num_parameters() == 2 * (2 * 3 * kWidth + 3 + kWidth));
  CHECK(adapter.sites().size() == 1);
  CHECK(adapter.sites()[0].name == "loop");
  const auto names = adapter.named_parameters().keys();
  CHECK(names[0] == "loop.0.adapter_down.0.weight");
  CHECK(names[7] == "loop.1.adapter_up.bias");
  const auto all = bottlenecks(adapter);
  REQUIRE(all.size() == 2);
  for (const double scale : {1.0, 0.3}) {
    adapter.set_scale(scale);
    Tensor h = x;
    for (size_t i = 0; i < 2; ++i) {
      h = model.blocks[i]->as<PreNormBlock>()->forward(h);
      h = h + scale * written_out(h, tensors_of(*all[i]), [](const Tensor& t) {
                return torch::relu(t);
              });
    }
    CHECK(close(model.forward(x), h));
  }
}

TEST_CASE("around a norm, adapters stack: the later one sees the earlier") {
  seed(8);
  torch::nn::LayerNorm norm(torch::nn::LayerNormOptions({kWidth}));
  norm->to(torch::kDouble);
  const Tensor v = torch::randn({3, kWidth}, torch::kDouble);
  auto one = peft::attach(*norm, PfeifferOptions(2).targets(""), "one");
  auto two = peft::attach(*norm, PfeifferOptions(3).targets(""), "two");
  randomise(one, 1);
  randomise(two, 2);
  const auto a = [&](const peft::Adapter& adapter, const Tensor& z) {
    return written_out(
        z, tensors_of(*bottlenecks(adapter)[0]), [](const Tensor& t) {
          return torch::relu(t);
        });
  };
  const auto inner = [&](const Tensor& u) {
    return layer_norm(norm, u + a(one, layer_norm(norm, u)));
  };
  CHECK(close(norm->forward(v), inner(v + a(two, inner(v)))));
}

// ---- Where they go ----------------------------------------------------------

TEST_CASE("the layers that each network gives up by name") {
  const std::map<std::string, Names> houlsby{
      {"TransformerEncoder",
       in_layers("layers", {"self_attn.out_proj", "linear2"})},
      {"BERT",
       in_layers("encoder.layer", {"attention.output.dense", "output.dense"})},
      {"GPT-2", in_layers("h", {"attn.c_proj", "mlp.c_proj"})},
      {"LLaMA", in_layers("layers", {"self_attn.o_proj", "mlp.down_proj"})},
      {"T5 relu",
       {"encoder.block.0.layer.0.SelfAttention.o",
        "encoder.block.0.layer.1.DenseReluDense.wo",
        "encoder.block.1.layer.0.SelfAttention.o",
        "encoder.block.1.layer.1.DenseReluDense.wo",
        "decoder.block.0.layer.0.SelfAttention.o",
        "decoder.block.0.layer.2.DenseReluDense.wo",
        "decoder.block.1.layer.0.SelfAttention.o",
        "decoder.block.1.layer.2.DenseReluDense.wo"}}};
  const std::map<std::string, Names> pfeiffer{
      {"TransformerEncoder", in_layers("layers", {"norm2"})},
      {"BERT", in_layers("encoder.layer", {"output.LayerNorm"})},
      {"GPT-2", {"layer_loop"}},
      {"LLaMA", {"layer_loop"}},
      {"T5 relu", {"encoder.layer_loop", "decoder.layer_loop"}}};
  // How many layer norms there are, and their parameters.
  const std::map<std::string, std::pair<size_t, int64_t>> norms{
      {"TransformerEncoder", {4, 4 * 2 * kWidth}},
      {"BERT", {5, 5 * 2 * kWidth}},
      {"GPT-2", {5, 5 * 2 * kWidth}},
      {"LLaMA", {5, 5 * kWidth}}, // no biases
      {"T5 relu", {12, 12 * kWidth}}};
  const int64_t one = 2 * 3 * kWidth + 3 + kWidth;
  for (auto& network : networks_of_every_kind()) {
    if (network.name == "T5 gated-gelu") {
      continue;
    }
    INFO(network.name);
    const Names& sites = houlsby.at(network.name);
    const auto [count, parameters] = norms.at(network.name);
    auto adapter = peft::attach(*network.module, HoulsbyOptions(3), "h");
    CHECK(site_names(adapter, "bottleneck") == sites);
    CHECK(
        adapter.num_parameters() ==
        static_cast<int64_t>(sites.size()) * one + parameters);
    size_t trained = site_names(adapter, "trained weight").size();
    CHECK(trained == count);
    adapter.detach();
    auto without = peft::attach(
        *network.module, HoulsbyOptions(3).train_layer_norms(false));
    CHECK(without.num_parameters() == static_cast<int64_t>(sites.size()) * one);
    without.detach();
    auto behind = peft::attach(*network.module, PfeifferOptions(3), "p");
    CHECK(site_names(behind, "bottleneck") == pfeiffer.at(network.name));
    CHECK(
        behind.num_parameters() ==
        static_cast<int64_t>(sites.size()) / 2 * one);
    CHECK(behind.method() == "PFEIFFER");
  }
}

TEST_CASE("targets, modules_to_save and leave_out choose") {
  seed(9);
  const int64_t one = 2 * 3 * kWidth + 3 + kWidth;
  peft::models::BertForSequenceClassification bert(
      peft::models::BertOptions()
          .vocab_size(20)
          .hidden_size(kWidth)
          .num_hidden_layers(3)
          .num_attention_heads(2)
          .intermediate_size(16)
          .max_position_embeddings(8));
  const std::string stack = "bert.encoder.layer.";
  struct Row {
    std::string name;
    Attach attach;
    Names sites;
    int64_t count;
  };
  const auto plain = HoulsbyOptions(3).train_layer_norms(false);
  const std::vector<Row> rows{
      {"a list",
       attach_with(HoulsbyOptions(plain).targets({"output.dense"})),
       {stack + "0.attention.output.dense",
        stack + "0.output.dense",
        stack + "1.attention.output.dense",
        stack + "1.output.dense",
        stack + "2.attention.output.dense",
        stack + "2.output.dense"},
       6 * one},
      {"a regular expression",
       attach_with(HoulsbyOptions(plain).targets(
           peft::Targets::regex(".*layer\\.\\d\\.output\\..*"))),
       {stack + "0.output.dense",
        stack + "1.output.dense",
        stack + "2.output.dense"},
       3 * one},
      {"a layer outside of the stack",
       attach_with(HoulsbyOptions(plain).targets({"pooler.dense"})),
       {"bert.pooler.dense"},
       one},
      {"leave_out",
       attach_with(HoulsbyOptions(plain).leave_out({0, 2})),
       {stack + "1.attention.output.dense", stack + "1.output.dense"},
       2 * one},
      {"leave_out takes the layer's norms along",
       attach_with(HoulsbyOptions(3).leave_out({0, 2})),
       {stack + "1.attention.output.dense", stack + "1.output.dense"},
       2 * one + 3 * 2 * kWidth}, // two, and the embeddings'
      {"leave_out and targets",
       attach_with(HoulsbyOptions(plain)
                       .targets(peft::Targets::regex(".*layer\\.[12]\\.output"
                                                     "\\.dense"))
                       .leave_out({1})),
       {stack + "2.output.dense"},
       one},
      {"a head",
       attach_with(HoulsbyOptions(plain).leave_out({0, 1}).modules_to_save(
           {"classifier"})),
       {stack + "2.attention.output.dense", stack + "2.output.dense"},
       2 * one + 2 * kWidth + 2},
      {"a layer trained whole",
       attach_with(HoulsbyOptions(plain).leave_out({0, 1}).modules_to_save(
           {"layer.2.output.dense"})),
       {stack + "2.attention.output.dense"},
       one + 16 * kWidth + kWidth},
      {"Pfeiffer, leave_out",
       attach_with(PfeifferOptions(3).leave_out({1})),
       {stack + "0.output.LayerNorm", stack + "2.output.LayerNorm"},
       2 * one},
      {"Pfeiffer, targets",
       attach_with(PfeifferOptions(3).targets({"attention.output.LayerNorm"})),
       {stack + "0.attention.output.LayerNorm",
        stack + "1.attention.output.LayerNorm",
        stack + "2.attention.output.LayerNorm"},
       3 * one},
      {"Pfeiffer's factor",
       attach_with(PfeifferOptions().reduction_factor(4).leave_out({0, 1})),
       {stack + "2.output.LayerNorm"},
       2 * 2 * kWidth + 2 + kWidth}};
  for (const auto& row : rows) {
    INFO(row.name);
    auto adapter = row.attach(*bert, "default");
    CHECK(site_names(adapter, "bottleneck") == row.sites);
    CHECK(adapter.num_parameters() == row.count);
    adapter.detach();
  }

  PreNorm looped(/*with_loop=*/true);
  auto adapter =
      peft::attach(looped, PfeifferOptions(3).leave_out({0}), "default");
  CHECK(adapter.num_parameters() == one);
  CHECK(adapter.named_parameters().keys()[0] == "loop.1.adapter_down.0.weight");
}

namespace {

/// A BERT by its shapes alone: no memory for the weights.
struct ShapesOnly : torch::nn::Module {
  explicit ShapesOnly(int64_t d, int64_t layers) {
    add("embeddings", {}, d);
    for (int64_t i = 0; i < layers; ++i) {
      const std::string layer = "encoder.layer." + std::to_string(i) + ".";
      add(layer + "attention.output", {d, d}, d);
      add(layer + "intermediate", {4 * d, d}, 0);
      add(layer + "output", {d, 4 * d}, d);
    }
  }
  void add(
      const std::string& path,
      const std::vector<int64_t>& dense,
      int64_t norm) {
    torch::nn::Module* node = this;
    size_t begin = 0;
    while (begin <= path.size()) {
      const size_t end = std::min(path.find('.', begin), path.size());
      const std::string part = path.substr(begin, end - begin);
      const auto children = node->named_children();
      const auto* child = children.find(part);
      node = child != nullptr
          ? child->get()
          : node->register_module(part, std::make_shared<torch::nn::Module>())
                .get();
      begin = end + 1;
    }
    if (!dense.empty()) {
      auto linear = std::make_shared<torch::nn::Module>();
      linear->register_parameter("weight", torch::empty(dense, torch::kMeta));
      linear->register_parameter(
          "bias", torch::empty({dense[0]}, torch::kMeta));
      node->register_module("dense", linear);
    }
    if (norm > 0) {
      node->register_module(
          "LayerNorm",
          torch::nn::LayerNorm(torch::nn::LayerNormOptions({norm})));
    }
  }
};

} // namespace

TEST_CASE("counts for BERT-base and BERT-large") {
  struct Row {
    int64_t d, layers;
    int64_t houlsby, houlsby_alone, pfeiffer, parallel;
  };
  // 2 L (2 d r + r + d) with r = 64, and 2 d (2 L + 1) for the norms;
  // L (2 d r + r + d) with r = d / 16; the same with r = d / 2.
  const std::vector<Row> rows{
      {768, 12, 2379264 + 38400, 2379264, 894528, 7091712},
      {1024, 24, 6343680 + 100352, 6343680, 3171840, 25202688}};
  for (const auto& row : rows) {
    INFO(row.d);
    const auto formula = [&](int64_t r) {
      return row.layers * (2 * row.d * r + r + row.d);
    };
    CHECK(row.houlsby_alone == 2 * formula(64));
    CHECK(row.houlsby == 2 * formula(64) + 2 * row.d * (2 * row.layers + 1));
    CHECK(row.pfeiffer == formula(row.d / 16));
    CHECK(row.parallel == formula(row.d / 2));
    ShapesOnly model(row.d, row.layers);
    const auto count = [&](const auto& options) {
      auto adapter = peft::attach(model, options);
      const auto parameters = adapter.num_parameters();
      CHECK(peft::count_parameters(model).trainable == parameters);
      adapter.detach();
      return parameters;
    };
    CHECK(count(HoulsbyOptions()) == row.houlsby);
    CHECK(
        count(HoulsbyOptions().train_layer_norms(false)) == row.houlsby_alone);
    CHECK(count(PfeifferOptions()) == row.pfeiffer);
    CHECK(count(ParallelAdapterOptions()) == row.parallel);
  }
}

// ---- What an adapter can do -------------------------------------------------

TEST_CASE("every method on every network: start, act, off, scale, detach") {
  for (const auto& method : methods()) {
    seed(10);
    for (auto& network : networks_of_every_kind()) {
      INFO(method.name << " on " << network.name);
      const Tensor before = network.run().detach();
      const auto plain = state_of(*network.module);
      auto adapter = method.attach(*network.module, "default");
      const Tensor start = network.run().detach();
      if (method.exact) {
        CHECK(equal_bits(start, before));
      } else {
        CHECK_FALSE(equal_bits(start, before));
        CHECK(close(start, before, 0.2, 0.2));
      }
      randomise(adapter);
      const Tensor acting = network.run().detach();
      CHECK_FALSE(close(acting, before));

      adapter.disable();
      CHECK(equal_bits(network.run().detach(), before));
      adapter.enable();
      CHECK(equal_bits(network.run().detach(), acting));
      adapter.set_scale(0);
      CHECK(close(network.run().detach(), before));
      adapter.set_scale(0.5);
      const Tensor half = network.run().detach();
      CHECK_FALSE(close(half, before));
      CHECK_FALSE(close(half, acting));
      adapter.set_scale(1);
      {
        peft::ActiveAdapters base(Names{});
        CHECK(equal_bits(network.run().detach(), before));
      }
      adapter.detach();
      CHECK(equal_bits(network.run().detach(), before));
      CHECK(same_state(state_of(*network.module), plain));
    }
  }
}

TEST_CASE("every method trains alone: three steps of AdamW") {
  for (const auto& method : methods()) {
    seed(11);
    for (auto& network : networks_of_every_kind()) {
      INFO(method.name << " on " << network.name);
      auto adapter = method.attach(*network.module, "default");
      randomise(adapter);
      const auto frozen = peft::detail::base_parameters(*network.module);
      std::vector<Tensor> bases, starts;
      for (const auto& item : frozen) {
        bases.push_back(peft::base(item.second).detach().clone());
      }
      for (const auto& p : adapter.parameters()) {
        starts.push_back(p.detach().clone());
      }
      network.module->train();
      torch::optim::AdamW optimizer(
          network.module->parameters(),
          torch::optim::AdamWOptions(1e-2).weight_decay(0.1));
      for (int step = 0; step < 3; ++step) {
        optimizer.zero_grad();
        network.run().pow(3).sum().backward();
        optimizer.step();
      }
      for (size_t i = 0; i < frozen.size(); ++i) {
        INFO(frozen[i].first);
        CHECK_FALSE(frozen[i].second.grad().defined());
        CHECK(equal_bits(peft::base(frozen[i].second).detach(), bases[i]));
      }
      const auto parameters = adapter.parameters();
      for (size_t i = 0; i < parameters.size(); ++i) {
        CHECK(parameters[i].grad().defined());
        CHECK_FALSE(equal_bits(parameters[i].detach(), starts[i]));
      }
      CHECK(
          peft::trainable_parameters(*network.module).size() ==
          parameters.size());
    }
  }
}

TEST_CASE("every method's gradients agree with finite differences") {
  for (const auto& method : methods()) {
    INFO(method.name);
    seed(12);
    auto network = encoder_case();
    network.module->to(torch::kDouble);
    auto adapter = method.attach(*network.module, "default");
    randomise(adapter);
    const auto parameters = adapter.parameters();
    const Tensor direction = torch::randn({5, 3, kWidth}, torch::kDouble);
    CHECK(gradcheck::first_order(
        [&](const gradcheck::Tensors&) { return network.run(); },
        parameters,
        direction));

    PreNorm looped(/*with_loop=*/true);
    looped.to(torch::kDouble);
    auto other = method.attach(looped, "default");
    randomise(other);
    const Tensor x =
        torch::randn({2, kWidth}, torch::kDouble).set_requires_grad(true);
    auto inputs = other.parameters();
    inputs.push_back(x);
    CHECK(gradcheck::first_order(
        [&](const gradcheck::Tensors&) { return looped.forward(x); },
        inputs,
        torch::randn({2, kWidth}, torch::kDouble)));
  }
}

TEST_CASE("every method: clones are independent, modes and dtypes follow") {
  for (const auto& method : methods()) {
    INFO(method.name);
    seed(13);
    auto encoder = small_encoder();
    const Tensor x = torch::randn({5, 3, kWidth});
    auto adapter = method.attach(*encoder, "default");
    randomise(adapter);
    const Tensor acting = encoder->forward(x).detach();
    auto twin = peft::clone(encoder);
    CHECK(equal_bits(twin->forward(x).detach(), acting));
    auto copy = peft::get_adapter(*twin);
    CHECK(copy.num_parameters() == adapter.num_parameters());
    randomise(copy, 20);
    CHECK_FALSE(close(twin->forward(x).detach(), acting));
    CHECK(equal_bits(encoder->forward(x).detach(), acting));
    const Tensor changed = twin->forward(x).detach();
    adapter.detach(); // what the copy's deltas share is their own
    CHECK(equal_bits(twin->forward(x).detach(), changed));
    for (const auto* a : bottlenecks(copy)) {
      CHECK(a->is_training());
    }
    twin->eval();
    for (const auto* a : bottlenecks(copy)) {
      CHECK_FALSE(a->is_training());
    }
    twin->to(torch::kDouble);
    const Tensor wide = twin->forward(x.to(torch::kDouble));
    CHECK(wide.scalar_type() == torch::kDouble);
    CHECK(close(wide, changed, 1e-4, 1e-5));
  }
}

TEST_CASE("half precision: float32 adapters, the network's dtype comes out") {
  for (const auto& method : methods()) {
    INFO(method.name);
    seed(14);
    auto encoder = small_encoder();
    encoder->to(torch::kBFloat16);
    const Tensor x = torch::randn({5, 3, kWidth}).to(torch::kBFloat16);
    const Tensor before = encoder->forward(x).detach();
    auto adapter = method.attach(*encoder, "default");
    for (const auto& p : adapter.parameters()) {
      CHECK(p.scalar_type() == torch::kFloat);
    }
    if (method.exact) {
      CHECK(equal_bits(encoder->forward(x).detach(), before));
    }
    randomise(adapter);
    const Tensor acting = encoder->forward(x);
    CHECK(acting.scalar_type() == torch::kBFloat16);
    CHECK_FALSE(close(acting, before));
    acting.sum().backward();
    for (const auto& p : adapter.parameters()) {
      CHECK(p.grad().defined());
    }
  }
}

TEST_CASE("Houlsby, Pfeiffer, parallel and LoRA on one network") {
  seed(15);
  auto encoder = small_encoder();
  encoder->to(torch::kDouble);
  const Tensor x = torch::randn({5, 3, kWidth}, torch::kDouble);
  const Tensor before = encoder->forward(x).detach();
  auto plain = peft::clone(encoder);
  auto houlsby = peft::attach(
      *encoder,
      HoulsbyOptions(3).non_linearity("relu").train_layer_norms(false),
      "houlsby");
  auto lora = peft::attach(
      *encoder,
      peft::LoraOptions(2).targets({"linear1", "linear2"}).init("random"),
      "lora");
  auto parallel = peft::attach(*encoder, ParallelAdapterOptions(2), "parallel");
  auto pfeiffer = peft::attach(*encoder, PfeifferOptions(4), "pfeiffer");
  randomise(houlsby, 1);
  randomise(parallel, 2);
  randomise(pfeiffer, 3);
  const auto relu = [](const Tensor& t) { return torch::relu(t); };
  const auto h = bottlenecks(houlsby);
  const auto p = bottlenecks(parallel);
  const auto n = bottlenecks(pfeiffer);
  const auto weight = [&](const torch::nn::Linear& linear, size_t site) {
    auto& delta = adapted::lora(lora, site);
    return linear->weight + 4 * at::mm(delta.lora_B, delta.lora_A);
  };
  Tensor y = x;
  for (size_t i = 0; i < 2; ++i) {
    auto* layer =
        plain->layers->ptr(i)->as<torch::nn::TransformerEncoderLayerImpl>();
    Tensor attended = std::get<0>(layer->self_attn->forward(y, y, y));
    attended = attended + written_out(attended, tensors_of(*h[2 * i]), relu);
    y = layer->norm1(y + attended);
    Tensor fed = at::linear(
        torch::relu(
            at::linear(y, weight(layer->linear1, 2 * i), layer->linear1->bias)),
        weight(layer->linear2, 2 * i + 1),
        layer->linear2->bias);
    // Output transforms run in the order of attach.
    fed = fed + written_out(fed, tensors_of(*h[2 * i + 1]), relu);
    fed = fed + written_out(y, tensors_of(*p[i]), relu, 4);
    const Tensor v = y + fed;
    y = layer->norm2(v + written_out(layer->norm2(v), tensors_of(*n[i]), relu));
  }
  CHECK(close(encoder->forward(x), y));

  const Tensor all = encoder->forward(x).detach();
  parallel.disable();
  CHECK_FALSE(close(encoder->forward(x), all));
  {
    peft::ActiveAdapters scope({"houlsby", "lora", "parallel", "pfeiffer"});
    CHECK(equal_bits(encoder->forward(x).detach(), all));
  }
  parallel.enable();
  for (auto adapter : {houlsby, lora, parallel, pfeiffer}) {
    adapter.detach();
  }
  CHECK(equal_bits(encoder->forward(x).detach(), before));
}

// ---- AdapterDrop ------------------------------------------------------------

TEST_CASE("AdapterDrop leaves the first layers out, for a thread and a while") {
  for (const auto& method : methods()) {
    seed(16);
    for (auto& network : networks_of_every_kind()) {
      const bool two_stacks = network.name.find("T5") == 0;
      INFO(method.name << " on " << network.name);
      const Tensor before = network.run().detach();
      auto adapter = method.attach(*network.module, "default");
      for (auto& p : adapter.parameters()) {
        torch::NoGradGuard no_grad;
        const bool copy = method.name.find("Houlsby") == 0 && p.dim() == 1 &&
            p.numel() == kWidth;
        if (!copy) { // trained norms stay as they are
          p.normal_(0, 0.3);
        }
      }
      const Tensor acting = network.run().detach();
      std::vector<Tensor> outputs;
      for (int64_t drop = 0; drop <= (two_stacks ? 4 : 2); ++drop) {
        AdapterDrop scope(drop);
        outputs.push_back(network.run().detach());
      }
      CHECK(equal_bits(outputs.front(), acting));
      CHECK(equal_bits(outputs.back(), before));
      for (size_t i = 1; i < outputs.size(); ++i) {
        CHECK_FALSE(equal_bits(outputs[i], outputs[i - 1]));
      }
      CHECK(equal_bits(network.run().detach(), acting));
      {
        AdapterDrop all(4);
        AdapterDrop none(0); // the inner scope counts
        CHECK(equal_bits(network.run().detach(), acting));
        Tensor elsewhere;
        std::thread([&] { elsewhere = network.run().detach(); }).join();
        CHECK(equal_bits(elsewhere, acting));
      }
    }
  }
}

TEST_CASE("AdapterDrop equals leave_out, and spares what it leaves out") {
  for (int which = 0; which < 3; ++which) {
    INFO(which);
    seed(17);
    auto encoder = small_encoder();
    const Tensor x = torch::randn({5, 3, kWidth});
    auto shorter = peft::clone(encoder);
    const auto attach = [&](torch::nn::Module& model,
                            const std::vector<int64_t>& leave_out) {
      if (which == 0) {
        return peft::attach(
            model,
            HoulsbyOptions(3).train_layer_norms(false).leave_out(leave_out));
      }
      if (which == 1) {
        return peft::attach(model, PfeifferOptions(3).leave_out(leave_out));
      }
      return peft::attach(
          model, ParallelAdapterOptions(3).leave_out(leave_out));
    };
    auto whole = attach(*encoder, {});
    auto part = attach(*shorter, {0});
    randomise(whole);
    {
      torch::NoGradGuard no_grad;
      const auto values = whole.named_parameters();
      for (auto& item : part.named_parameters()) {
        item.value().copy_(values[item.key()]);
      }
    }
    AdapterDrop scope(1);
    const Tensor y = encoder->forward(x);
    CHECK(equal_bits(y.detach(), shorter->forward(x).detach()));
    y.sum().backward();
    for (const auto& item : whole.named_parameters()) {
      INFO(item.key());
      CHECK(
          item.value().grad().defined() == (item.key().find("layers.1.") == 0));
    }
    torch::NoGradGuard no_grad;
    const auto dropped = adapted::operator_names([&] { encoder->forward(x); });
    const auto left_out = adapted::operator_names([&] { shorter->forward(x); });
    CHECK(dropped.size() < 1.1 * left_out.size());
    AdapterDrop again(0);
    const auto full = adapted::operator_names([&] { encoder->forward(x); });
    CHECK(full.size() > dropped.size());
  }
  CHECK(contains(
      error_of([] { AdapterDrop wrong(-1); }), "0 layers or more, got -1"));
}

// ---- Refusals ---------------------------------------------------------------

namespace {

/// Uses its layer by halves, as packed projections are used.
struct Halves : torch::nn::Module {
  torch::nn::Linear fc{register_module("fc", torch::nn::Linear(4, 6))};
  Tensor forward(const Tensor& x) {
    return torch::cat(
        {at::linear(x, fc->weight.slice(0, 0, 3), fc->bias.slice(0, 0, 3)),
         at::linear(x, fc->weight.slice(0, 3, 6), fc->bias.slice(0, 3, 6))},
        -1);
  }
};

} // namespace

TEST_CASE("what cannot be, is refused with a reason") {
  const auto encoder = [] {
    return std::static_pointer_cast<torch::nn::Module>(small_encoder().ptr());
  };
  const auto nameless = [] {
    return std::static_pointer_cast<torch::nn::Module>(
        torch::nn::Sequential(torch::nn::Linear(4, 4), torch::nn::ReLU())
            .ptr());
  };
  const auto pre_norm = [] {
    return std::static_pointer_cast<torch::nn::Module>(
        std::make_shared<PreNorm>(false));
  };
  struct Row {
    std::string name;
    std::function<std::shared_ptr<torch::nn::Module>()> model;
    Attach attach;
    Names parts;
  };
  const std::vector<Row> rows{
      {"too wide",
       encoder,
       attach_with(HoulsbyOptions(kWidth + 1)),
       {"bottleneck of 9 features is wider than the 8"}},
      {"too wide, Pfeiffer",
       encoder,
       attach_with(PfeifferOptions(64)),
       {"bottleneck of 64 features is wider than the 8"}},
      {"the default is too wide for a small network",
       encoder,
       attach_with(HoulsbyOptions()),
       {"bottleneck of 64 features is wider than the 8"}},
      {"none",
       encoder,
       attach_with(HoulsbyOptions(0)),
       {"has 1 feature or more, got 0"}},
      {"a factor that leaves none",
       encoder,
       attach_with(PfeifferOptions()),
       {"has 1 feature or more, got 0"}},
      {"a negative factor",
       encoder,
       attach_with(PfeifferOptions().reduction_factor(-2)),
       {"reduction_factor must be positive, got -2"}},
      {"two ways at once",
       encoder,
       attach_with(HoulsbyOptions(4).reduction_factor(2)),
       {"give only one of them"}},
      {"a non-linearity that there is not",
       encoder,
       attach_with(PfeifferOptions(2).non_linearity("rleu")),
       {"knows no non_linearity 'rleu'", "gelu, gelu_new, leaky_relu, relu"}},
      {"no deviation",
       encoder,
       attach_with(HoulsbyOptions(2).init_scale(0)),
       {"init_scale must be positive, got 0"}},
      {"a layer that there is not",
       encoder,
       attach_with(HoulsbyOptions(2).leave_out({2})),
       {"leave_out names layer 2", "are 0 to 1"}},
      {"the same, Pfeiffer",
       encoder,
       attach_with(PfeifferOptions(2).leave_out({-1})),
       {"leave_out names layer -1", "are 0 to 1"}},
      {"every layer",
       encoder,
       attach_with(PfeifferOptions(2).leave_out({0, 1})),
       {"leaves no layer"}},
      {"names that do not tell",
       nameless,
       attach_with(HoulsbyOptions(2)),
       {"name the linear layers", "targets({...})", "linear layers: '0'"}},
      {"a target that there is not",
       nameless,
       attach_with(HoulsbyOptions(2).targets({"dense"})),
       {"targets entry 'dense' matches nothing"}},
      {"a target without a weight",
       nameless,
       attach_with(HoulsbyOptions(2).targets({"1"})),
       {"names '1'", "not a linear layer"}},
      {"a regular expression that fits nothing",
       nameless,
       attach_with(HoulsbyOptions(2).targets(peft::Targets::regex("x"))),
       {"targets matches nothing that is a linear layer", "'0'"}},
      {"a packed projection",
       encoder,
       attach_with(HoulsbyOptions(2).targets({"self_attn"})),
       {"packs queries, keys and values", "output projection"}},
      {"normalises first, and no loop",
       pre_norm,
       attach_with(PfeifferOptions(2)),
       {"register_module(\"layer_loop\", peft::LayerLoop(",
        "layer_loop->forward(",
        "targets({...})"}},
      {"around something else",
       pre_norm,
       attach_with(PfeifferOptions(2).targets({"fc2"})),
       {"names 'blocks.0.fc2'", "not a layer norm"}},
      {"a head that there is not",
       encoder,
       attach_with(HoulsbyOptions(2).modules_to_save({"head"})),
       {"modules_to_save entry 'head'"}}};
  for (const auto& row : rows) {
    INFO(row.name);
    auto model = row.model();
    const auto before = state_of(*model);
    const auto error = error_of([&] { row.attach(*model, "default"); });
    INFO(error);
    for (const auto& part : row.parts) {
      CHECK(contains(error, part));
    }
    CHECK(same_state(state_of(*model), before));
  }

  // The norms of a network that normalises first can be named.
  auto model = std::make_shared<PreNorm>(false);
  auto adapter = peft::attach(*model, PfeifferOptions(2).targets({"norm"}));
  CHECK(adapter.sites().size() == 2);

  Halves halves;
  auto packed = peft::attach(halves, HoulsbyOptions(2).targets({"fc"}));
  CHECK(contains(
      error_of([&] {
        halves.forward(torch::randn({2, 4}));
      }),
      "only a part"));
}

TEST_CASE("the options of a bottleneck are checked when it is made") {
  struct Row {
    BottleneckOptions options;
    std::string part;
  };
  const std::vector<Row> rows{
      {BottleneckOptions(4, 5), "wider than the 4"},
      {BottleneckOptions(4, 0), "1 feature or more"},
      {BottleneckOptions(4, 2).init("bert"), "init must be"},
      {BottleneckOptions(4, 2).layer_norm("before"), "layer_norm must be"},
      {BottleneckOptions(4, 2).dropout(1), "dropout must lie in [0, 1)"},
      {BottleneckOptions(4, 2).scaling(INFINITY), "scaling must be finite"},
      {BottleneckOptions(4, 2).non_linearity(""), "no non_linearity ''"}};
  for (const auto& row : rows) {
    CHECK(contains(error_of([&] { Bottleneck a(row.options); }), row.part));
  }
}

TEST_CASE("no merge, and the reason") {
  for (const auto& method : methods()) {
    INFO(method.name);
    seed(18);
    auto encoder = small_encoder();
    auto adapter = method.attach(*encoder, "default");
    const auto before = state_of(*encoder);
    for (const auto& error : {error_of([&] { adapter.merge(); }), error_of([&] {
                                peft::merge(*encoder);
                              })}) {
      INFO(error);
      CHECK(contains(error, "cannot be merged at 'layers.0."));
      CHECK(contains(error, "bottleneck"));
    }
    CHECK(same_state(state_of(*encoder), before));
    CHECK_FALSE(adapter.is_merged());
  }
}

} // namespace test_bottleneck
