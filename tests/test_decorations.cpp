// What is put around a delta: gates, scales, and the padding that gates see.

#include "gradcheck.h"
#include "model_state.h"
#include "test.h"

#include <peft/models/bert.h>
#include <peft/models/gpt2.h>
#include <peft/models/llama.h>
#include <peft/models/t5.h>

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace test_decorations {

using torch::Tensor;

namespace {

namespace models = peft::models;

/// A small network in evaluation mode; `run(ids, mask)` gives what stands at
/// every token.
struct Host {
  std::string name;
  std::shared_ptr<torch::nn::Module> module;
  std::function<Tensor(const Tensor&, const Tensor&)> run;
};

std::vector<Host> hosts() {
  std::vector<Host> all;
  seed(11);
  models::BertModel bert(models::BertOptions()
                             .vocab_size(40)
                             .hidden_size(16)
                             .num_hidden_layers(2)
                             .num_attention_heads(2)
                             .intermediate_size(32)
                             .max_position_embeddings(32)
                             .add_pooling_layer(false));
  all.push_back({"BERT", bert.ptr(), [bert](auto& ids, auto& mask) mutable {
                   return bert->forward(ids, mask);
                 }});
  models::Gpt2ForCausalLM gpt2(models::Gpt2Options()
                                   .vocab_size(40)
                                   .n_positions(32)
                                   .n_embd(16)
                                   .n_layer(2)
                                   .n_head(2));
  all.push_back({"GPT-2", gpt2.ptr(), [gpt2](auto& ids, auto& mask) mutable {
                   return gpt2->forward(ids, mask);
                 }});
  models::LlamaForCausalLM llama(models::LlamaOptions()
                                     .vocab_size(40)
                                     .hidden_size(16)
                                     .intermediate_size(24)
                                     .num_hidden_layers(2)
                                     .num_attention_heads(4)
                                     .num_key_value_heads(2));
  all.push_back({"LLaMA", llama.ptr(), [llama](auto& ids, auto& mask) mutable {
                   return llama->forward(ids, mask);
                 }});
  models::T5ForConditionalGeneration t5(models::T5Options()
                                            .vocab_size(40)
                                            .d_model(16)
                                            .d_kv(8)
                                            .d_ff(24)
                                            .num_layers(2)
                                            .num_heads(2));
  // The decoder's input is not padded: what is padded is what it looks at.
  all.push_back({"T5", t5.ptr(), [t5](auto& ids, auto& mask) mutable {
                   return t5->forward(ids, mask, ids.slice(1, 0, 4).flip(1));
                 }});
  for (auto& host : all) {
    host.module->eval();
  }
  return all;
}

Tensor ids() {
  torch::manual_seed(5);
  return torch::randint(4, 40, {3, 6}, torch::kLong);
}

Tensor mask() {
  const auto mask = torch::ones({3, 6}, torch::kLong);
  mask[1].slice(0, 4).zero_();
  mask[2].slice(0, 5).zero_();
  return mask;
}

/// Every gate of an adapter, so that G is 1 to the last bit.
void open_gates(const peft::Adapter& adapter) {
  torch::NoGradGuard no_grad;
  for (auto& item : adapter.named_parameters()) {
    if (contains(item.key(), "gate.weight")) {
      item.value().zero_();
    } else if (contains(item.key(), "gate.bias")) {
      item.value().fill_(50);
    }
  }
}

using Attach =
    std::function<peft::Adapter(torch::nn::Module&, const std::string&)>;

/// A method and the same with gates.
struct Pair {
  std::string name;
  Attach plain, gated;
};

template <class Options>
Pair pair(const std::string& name, const Options& options) {
  return {
      name,
      [options](torch::nn::Module& m, const std::string& adapter) {
        return peft::attach(m, options, adapter);
      },
      [options](torch::nn::Module& m, const std::string& adapter) {
        return peft::attach(m, peft::Gated(options), adapter);
      }};
}

std::vector<Pair> pairs() {
  return {
      pair("LoRA", peft::LoraOptions(2).alpha(4)),
      pair("Houlsby", peft::HoulsbyOptions(4)),
      pair("Pfeiffer", peft::PfeifferOptions(4)),
      pair("parallel", peft::ParallelAdapterOptions(4)),
      pair("prefix", peft::PrefixOptions(3))};
}

/// Gives `to` the values that `from` has under the same name.
void copy_values(const peft::Adapter& from, const peft::Adapter& to) {
  torch::NoGradGuard no_grad;
  auto values = to.named_parameters();
  for (const auto& item : from.named_parameters()) {
    if (values.contains(item.key())) {
      values[item.key()].copy_(item.value());
    }
  }
}

peft::detail::Gate gate_of(
    int64_t features,
    const peft::GateOptions& options = {}) {
  peft::detail::Gate gate(options, features, 2, torch::kDouble);
  torch::NoGradGuard no_grad;
  gate.weight.normal_();
  gate.bias.normal_();
  return gate;
}

} // namespace

TEST_CASE("A gate averages sigmoids over the real tokens", "[gate]") {
  seed(1);
  const auto gate = gate_of(4);
  const auto x = torch::randn({3, 6, 4}, torch::kDouble);
  const auto each =
      torch::sigmoid((x * gate.weight[1]).sum(-1) + gate.bias[1]); // [3, 6]
  const auto published = each.mean(1).view({3, 1, 1});
  CHECK(close(gate.factor(x, 1), published, 1e-14, 0));
  CHECK_FALSE(torch::allclose(gate.factor(x, 0), published));
  CHECK((gate.factor(x, 1) > 0).all().item<bool>());
  CHECK((gate.factor(x, 1) < 1).all().item<bool>());

  const peft::PaddingScope scope(mask());
  const auto real = gate.factor(x, 1);
  CHECK(real.sizes() == at::IntArrayRef({3, 1, 1}));
  for (int64_t row = 0; row < 3; ++row) {
    const auto count = mask()[row].sum().item<int64_t>();
    CHECK(close(
        real[row].squeeze(), each[row].slice(0, 0, count).mean(), 1e-14, 0));
  }
  const auto all = gate_of(4, peft::GateOptions().average("all"));
  const auto same = torch::sigmoid((x * all.weight[0]).sum(-1) + all.bias[0]);
  CHECK(close(all.factor(x, 0), same.mean(1).view({3, 1, 1}), 1e-14, 0));

  // A row of nothing but padding counts all of it, so that G stays in (0, 1).
  auto empty = mask();
  empty[1].zero_();
  const peft::PaddingScope inner(empty);
  CHECK(close(gate.factor(x, 1)[1].squeeze(), each[1].mean(), 1e-14, 0));
}

TEST_CASE("A gate takes inputs of other layouts", "[gate]") {
  seed(1);
  const auto gate = gate_of(4);
  const auto x = torch::randn({3, 6, 4}, torch::kDouble);
  const auto rows = gate.factor(x[0], 0);
  CHECK(rows.sizes() == at::IntArrayRef({6, 1}));
  CHECK(close(
      rows.squeeze(1),
      torch::sigmoid((x[0] * gate.weight[0]).sum(-1) + gate.bias[0]),
      1e-14,
      0));
  const auto one = gate.factor(x[0][0], 0);
  CHECK(close(one.squeeze(), rows[0].squeeze(), 1e-14, 0));
  const auto many = gate.factor(x.unsqueeze(1), 0); // [3, 1, 6, 4]
  CHECK(many.sizes() == at::IntArrayRef({3, 1, 1, 1}));
  CHECK(close(many.view({3}), gate.factor(x, 0).view({3}), 1e-14, 0));

  peft::detail::Gate first(
      peft::GateOptions().batch_first(false), 4, 2, torch::kDouble);
  {
    torch::NoGradGuard no_grad;
    first.weight.copy_(gate.weight);
    first.bias.copy_(gate.bias);
  }
  const peft::PaddingScope scope(mask());
  CHECK(close(
      first.factor(x.transpose(0, 1), 0),
      gate.factor(x, 0).transpose(0, 1),
      1e-14,
      0));
  CHECK(contains(
      error_of([&] { gate.factor(x.narrow(2, 0, 3), 0); }),
      "a gate was made for inputs of 4 features"));
}

TEST_CASE("Which mask of padding counts", "[padding]") {
  using peft::detail::padding_of;
  CHECK_FALSE(padding_of(3, 6).defined());
  const peft::PaddingScope outer(mask());
  CHECK(torch::equal(padding_of(3, 6), mask()));
  {
    const auto decoder = torch::ones({3, 4}, torch::kLong);
    const peft::PaddingScope inner(decoder);
    CHECK(torch::equal(padding_of(3, 6), mask()));
    CHECK(torch::equal(padding_of(3, 4), decoder));
  }
  {
    const peft::PaddingScope none{Tensor()};
    CHECK_FALSE(padding_of(3, 6).defined());
    CHECK_FALSE(padding_of(7, 5).defined());
  }
  // Extra tokens stand in front and count.
  const auto longer = padding_of(3, 8);
  CHECK(torch::equal(longer.slice(1, 2), mask()));
  CHECK(torch::equal(longer.slice(1, 0, 2), torch::ones({3, 2}, torch::kLong)));
  CHECK(contains(
      error_of([] { padding_of(3, 5); }), "finds no padding mask that fits"));
  CHECK(contains(error_of([] { padding_of(2, 6); }), "open is [3, 6]"));
  CHECK(contains(
      error_of([] { peft::PaddingScope wrong(torch::ones({3})); }),
      "PaddingScope takes a mask [batch, tokens], got [3]"));
  bool elsewhere = true;
  std::thread([&] { elsewhere = padding_of(3, 6).defined(); }).join();
  CHECK_FALSE(elsewhere);
}

TEST_CASE("With gates wide open it is the method without them", "[gate]") {
  torch::NoGradGuard no_grad;
  for (const auto& pair : pairs()) {
    for (auto& host : hosts()) {
      INFO(pair.name << " on " << host.name);
      auto plain = pair.plain(*host.module, "plain");
      randomise(plain);
      const auto expected = host.run(ids(), mask());
      plain.disable();
      auto gated = pair.gated(*host.module, "gated");
      copy_values(plain, gated);
      open_gates(gated);
      CHECK(close(host.run(ids(), mask()), expected, 1e-5, 1e-6));
      CHECK(gated.num_parameters() > plain.num_parameters());
    }
  }
}

TEST_CASE("A gate starts about a half and stays in its place", "[gate]") {
  for (auto& host : hosts()) {
    INFO(host.name);
    seed(2);
    auto adapter =
        peft::attach(*host.module, peft::Gated(peft::PfeifferOptions(4)));
    for (const auto& item : adapter.named_parameters()) {
      if (contains(item.key(), "gate.bias")) {
        CHECK(torch::equal(item.value(), torch::zeros_like(item.value())));
      } else if (contains(item.key(), "gate.weight")) {
        CHECK(item.value().size(1) == 16);
        CHECK(item.value().std().item<double>() > 0.01);
        CHECK(item.value().std().item<double>() < 0.04);
      }
    }
  }
}

TEST_CASE("Gates whose layers are left out have no parameters", "[gate]") {
  for (auto& host : hosts()) {
    INFO(host.name);
    const auto count = [&](const auto& plain) {
      auto without = peft::attach(*host.module, plain, "without");
      auto with = peft::attach(*host.module, peft::Gated(plain), "with");
      const auto more = with.num_parameters() - without.num_parameters();
      without.detach();
      with.detach();
      return more;
    };
    const auto none = count(peft::PfeifferOptions(4));
    CHECK(count(peft::PfeifferOptions(4).leave_out({1})) == none - 17);
    const auto prefix = count(peft::PrefixOptions(3));
    const bool is_in_prefix = host.name != "T5"; // there it is the encoder's
    CHECK(
        count(peft::PrefixOptions(3).leave_out({1})) ==
        prefix - (is_in_prefix ? 17 : 0));
  }
}

TEST_CASE("Padding changes nothing, one example nothing in another", "[gate]") {
  torch::NoGradGuard no_grad;
  const auto options = [](const std::string& average) {
    return peft::UniPeltOptions()
        .lora(peft::LoraOptions(2).alpha(2).targets(
            peft::Targets::regex(".*(query|value|c_attn|[qv]_proj|\\.[qv])")))
        .prefix(peft::PrefixOptions(3))
        .adapter(peft::PfeifferOptions(4))
        .gate(peft::GateOptions().average(average));
  };
  for (auto& host : hosts()) {
    for (const std::string average : {"tokens", "all"}) {
      INFO(host.name << ", " << average);
      auto adapter = peft::attach(*host.module, options(average));
      randomise(adapter);
      const auto padded = host.run(ids(), mask());
      double furthest = 0;
      for (int64_t row = 1; row < 3; ++row) {
        const auto count = mask()[row].sum().item<int64_t>();
        const auto own = ids()[row].slice(0, 0, count).unsqueeze(0);
        // T5's decoder reads the same four tokens.
        if (host.name == "T5" && count < 4) {
          continue;
        }
        const auto alone = host.run(own, {});
        const auto difference =
            (padded[row].slice(0, 0, alone.size(1)) - alone[0]).abs().max();
        furthest = std::max(furthest, difference.item<double>());
      }
      if (average == "tokens") {
        CHECK(furthest < 2e-5);
      } else {
        CHECK(furthest > 1e-4); // the published average sees the padding
      }
      adapter.detach();
    }
  }
}

TEST_CASE("Gradients of gates agree with finite differences", "[gate]") {
  for (auto& host : hosts()) {
    host.module->to(torch::kDouble);
    INFO(host.name);
    auto adapter = peft::attach(
        *host.module,
        peft::UniPeltOptions()
            .lora(peft::LoraOptions(1).alpha(1))
            .prefix(peft::PrefixOptions(2))
            .adapter(peft::PfeifferOptions(2).non_linearity("tanh")));
    randomise(adapter);
    std::vector<Tensor> gates;
    for (const auto& item : adapter.named_parameters()) {
      if (contains(item.key(), "gate.bias")) {
        gates.push_back(item.value());
      }
    }
    REQUIRE(gates.size() >= 3);
    const auto direction = torch::randn_like(host.run(ids(), mask())).detach();
    CHECK(gradcheck::first_order(
        [&](const gradcheck::Tensors&) { return host.run(ids(), mask()); },
        gates,
        direction));
  }
}

TEST_CASE("A scale of 0 is the base, of 1/2 is set_scale(1/2)", "[scale]") {
  torch::NoGradGuard no_grad;
  for (auto& host : hosts()) {
    INFO(host.name);
    const auto base = host.run(ids(), mask());
    const auto check = [&](const std::string& name, const auto& options) {
      INFO(name);
      auto plain = peft::attach(*host.module, options, "plain");
      randomise(plain);
      plain.set_scale(0.5);
      const auto half = host.run(ids(), mask());
      plain.set_scale(1);
      const auto whole = host.run(ids(), mask());
      plain.disable();
      const auto scaled = [&](const peft::ScaleOptions& scale) {
        auto adapter =
            peft::attach(*host.module, peft::Scaled(options, scale), "scaled");
        copy_values(plain, adapter);
        const auto y = host.run(ids(), mask());
        adapter.detach();
        return y;
      };
      CHECK(equal_bits(scaled(0), base));
      CHECK(close(scaled(0.5), half, 1e-5, 1e-6));
      CHECK(close(
          scaled(peft::ScaleOptions(0.5).learned(true)), half, 1e-5, 1e-6));
      CHECK(close(scaled(1), whole, 1e-5, 1e-6));
      plain.detach();
    };
    check("LoRA", peft::LoraOptions(2).alpha(4));
    check(
        "LoRA on embeddings too",
        peft::LoraOptions(2).targets(
            peft::Targets::regex(".*(word_embeddings|wte|embed_tokens|shared|"
                                 "query|c_attn|q_proj|\\.q)")));
    check("Houlsby", peft::HoulsbyOptions(4));
    check("Pfeiffer", peft::PfeifferOptions(4));
    check("parallel", peft::ParallelAdapterOptions(4));
  }
}

TEST_CASE("Scaled convolutions and trained copies", "[scale]") {
  torch::NoGradGuard no_grad;
  seed(4);
  torch::nn::Sequential net(
      torch::nn::Conv1d(torch::nn::Conv1dOptions(4, 6, 3)),
      torch::nn::ReLU(),
      torch::nn::Conv1d(torch::nn::Conv1dOptions(6, 2, 1)));
  const auto x = torch::randn({2, 4, 7});
  const auto check = [&](const auto& options) {
    auto plain = peft::attach(*net, options, "plain");
    randomise(plain);
    plain.set_scale(0.3);
    const auto expected = net->forward(x);
    plain.disable();
    auto adapter = peft::attach(*net, peft::Scaled(options, 0.3), "scaled");
    copy_values(plain, adapter);
    CHECK(close(net->forward(x), expected, 1e-5, 1e-6));
    plain.detach();
    adapter.merge();
    CHECK(close(net->forward(x), expected, 1e-5, 1e-6));
    adapter.unmerge();
    adapter.detach();
  };
  check(peft::LoraOptions(2).targets({"0", "2"}));
  check(peft::BitFitOptions());
}

TEST_CASE("A learned scale trains, merges, and is read anew", "[scale]") {
  seed(4);
  torch::nn::Sequential net(torch::nn::Linear(8, 8), torch::nn::Linear(8, 8));
  const auto x = torch::randn({64, 8});
  auto adapter = peft::attach(
      *net,
      peft::Scaled(
          peft::LoraOptions(2).targets({"0", "1"}),
          peft::ScaleOptions(0.7).learned(true)));
  randomise(adapter);
  Tensor scale;
  for (const auto& item : adapter.named_parameters()) {
    if (item.key() == "0.scale.value") {
      scale = item.value();
    }
  }
  REQUIRE(scale.defined());
  net->forward(x).square().sum().backward();
  CHECK(scale.grad().abs().item<double>() > 0);

  // In evaluation the effective weight may be kept from call to call.
  torch::NoGradGuard no_grad;
  net->eval();
  for (int i = 0; i < 4; ++i) {
    net->forward(x);
  }
  scale.fill_(-2);
  const auto y = net->forward(x);
  std::vector<Tensor> before;
  for (const auto& p : net->parameters()) {
    before.push_back(peft::base(p).clone());
  }
  adapter.merge();
  CHECK(close(net->forward(x), y, 1e-5, 1e-5));
  adapter.unmerge();
  CHECK(equal_bits(net->forward(x), y));
  size_t i = 0;
  for (const auto& p : net->parameters()) {
    CHECK(equal_bits(peft::base(p).clone(), before[i++]));
  }
}

TEST_CASE("A gated weight says why it does not merge", "[gate]") {
  seed(4);
  torch::nn::Sequential net(torch::nn::Linear(8, 8));
  auto adapter =
      peft::attach(*net, peft::Gated(peft::LoraOptions(2).targets({"0"})));
  CHECK(contains(
      error_of([&] { adapter.merge(); }),
      "its gate depends on the input, which no weight knows"));
  CHECK(contains(
      error_of([&] { peft::effective(net->parameters().front()); }),
      "is gated by its input, and its weight was read instead"));
}

TEST_CASE("Gates on a site without input are refused", "[gate]") {
  auto all = hosts();
  auto& bert = *all[0].module;
  const auto before = state_of(bert);
  const auto refused = [&](const auto& options) {
    const auto message = error_of([&] { peft::attach(bert, options); });
    CHECK(contains(message, "peft: gates on a site without input: '"));
    CHECK(same_state(before, state_of(bert)));
    return message;
  };
  CHECK(contains(
      refused(peft::Gated(peft::BitFitOptions({"query"}))),
      "'encoder.layer.0.attention.self.query.bias' carries 'trained bias'"));
  CHECK(contains(
      refused(peft::Gated(peft::BitFitOptions({"query"}))), "Scaled puts"));
  CHECK(contains(
      refused(peft::Gated(peft::LoraOptions(2).dora(true))),
      "attention.self.query"));
  CHECK(contains(refused(peft::Gated(peft::Ia3Options())), "leave this site"));
  refused(peft::Gated(peft::PromptOptions(3)));
  refused(peft::Gated(peft::LoraOptions(2).targets({"word_embeddings"})));
  CHECK(contains(
      error_of(
          [&] { peft::attach(bert, peft::Scaled(peft::PromptOptions(3), 2)); }),
      "peft: no place for a scale: 'extra_tokens'"));

  torch::nn::Sequential convolution(
      torch::nn::Conv1d(torch::nn::Conv1dOptions(4, 6, 3)));
  CHECK(contains(
      error_of([&] {
        peft::attach(
            *convolution, peft::Gated(peft::LoraOptions(2).targets({"0"})));
      }),
      "gates on a site without input: '0'"));

  CHECK(contains(
      error_of([&] {
        peft::attach(
            bert,
            peft::Gated(
                peft::LoraOptions(2), peft::GateOptions().average("some")));
      }),
      "a gate's average must be over 'tokens' or 'all', got 'some'"));
  CHECK(contains(
      error_of([&] {
        peft::attach(
            bert,
            peft::Scaled(
                peft::LoraOptions(2), std::numeric_limits<double>::infinity()));
      }),
      "the scale must be finite"));
  CHECK(same_state(before, state_of(bert)));
}

TEST_CASE("A network that hands no input over is told the line", "[gate]") {
  struct Own : torch::nn::Module {
    Own() {
      extra_tokens = register_module(
          "extra_tokens",
          peft::ExtraTokens(peft::ExtraTokensOptions(8, 1, 2, 4)));
      qkv = register_module("to_qkv", torch::nn::Linear(8, 24));
    }
    Tensor forward(const Tensor& x, bool hands_over) {
      auto tokens = extra_tokens->forward({x});
      const auto parts =
          qkv->forward(x).unflatten(-1, {3, 2, 4}).permute({2, 0, 3, 1, 4});
      std::pair<Tensor, Tensor> kv{parts[1], parts[2]};
      if (auto* past = tokens.key_values()) {
        kv = hands_over ? past->update(0, kv.first, kv.second, x)
                        : past->update(0, kv.first, kv.second);
      }
      return at::scaled_dot_product_attention(parts[0], kv.first, kv.second);
    }
    peft::ExtraTokens extra_tokens{nullptr};
    torch::nn::Linear qkv{nullptr};
  };
  seed(3);
  auto own = std::make_shared<Own>();
  const auto x = torch::randn({2, 5, 8});
  const auto base = own->forward(x, false);
  auto adapter = peft::attach(*own, peft::Gated(peft::PrefixOptions(3)));
  CHECK_FALSE(torch::allclose(own->forward(x, true), base));
  const auto message = error_of([&] { own->forward(x, false); });
  CHECK(contains(
      message, "gates on a site without input: the prefix of layer 0"));
  CHECK(contains(message, "past->update(layer, key, value, hidden);"));
}

TEST_CASE("A gated prefix in a cache keeps the first call's gate", "[gate]") {
  torch::NoGradGuard no_grad;
  auto all = hosts();
  for (const size_t which : {1, 2}) {
    INFO(all[which].name);
    auto& module = *all[which].module;
    const auto run = [&](const Tensor& tokens, peft::KeyValues* cache) {
      return which == 1 ? module.as<models::Gpt2ForCausalLMImpl>()->forward(
                              tokens, {}, {}, cache)
                        : module.as<models::LlamaForCausalLMImpl>()->forward(
                              tokens, {}, {}, cache);
    };
    auto adapter = peft::attach(module, peft::Gated(peft::PrefixOptions(3)));
    randomise(adapter);
    const auto whole = run(ids(), nullptr);
    peft::KeyValues cache;
    CHECK(close(run(ids(), &cache), whole, 1e-5, 1e-6));
    CHECK(cache.length() == 3 + 6);
    for (const auto& layer : cache.gated) {
      CHECK(layer.empty());
    }
    auto later = cache;
    const auto next = run(ids().slice(1, 0, 1), &cache);
    open_gates(adapter); // has no say any more
    CHECK(equal_bits(run(ids().slice(1, 0, 1), &later), next));
    CHECK(cache.length() == 3 + 7);
  }
}

TEST_CASE("A mixed batch of gated adapters is each one's own rows", "[gate]") {
  torch::NoGradGuard no_grad;
  auto all = hosts();
  for (const size_t which : {0, 1, 2}) {
    auto& host = all[which];
    INFO(host.name);
    const auto each = [&](const std::string& method, const auto& options) {
      INFO(method);
      auto a = peft::attach(*host.module, options, "a");
      auto b = peft::attach(*host.module, options, "b");
      randomise(a, 1);
      randomise(b, 2);
      Tensor mixed;
      {
        const peft::BatchAdapters scope({"a", "b", "a"});
        mixed = host.run(ids(), mask());
      }
      const auto own = [&](const std::string& name, int64_t row) {
        const peft::ActiveAdapters scope({name});
        const auto y = host.run(ids(), mask())[row];
        return y.slice(0, 0, mask()[row].sum().item<int64_t>());
      };
      int64_t row = 0;
      for (const char* name : {"a", "b", "a"}) {
        const auto expected = own(name, row);
        CHECK(close(
            mixed[row].slice(0, 0, expected.size(0)), expected, 1e-4, 1e-5));
        ++row;
      }
      a.detach();
      b.detach();
    };
    each("LoRA", peft::Gated(peft::LoraOptions(2).alpha(2)));
    each("Houlsby", peft::Gated(peft::HoulsbyOptions(4)));
    each("parallel", peft::Gated(peft::ParallelAdapterOptions(4)));
    each("scaled LoRA", peft::Scaled(peft::LoraOptions(2), 0.5));
    auto prefix = peft::attach(
        *host.module, peft::Gated(peft::PrefixOptions(3)), "prefix");
    const peft::BatchAdapters scope({"prefix", "__base__", "prefix"});
    CHECK(contains(
        error_of([&] { host.run(ids(), mask()); }),
        "gives adapter 'prefix' to some rows"));
    prefix.detach();
  }
}

TEST_CASE("Gates in torch::nn::TransformerEncoder", "[gate]") {
  torch::NoGradGuard no_grad;
  seed(6);
  torch::nn::TransformerEncoder encoder(torch::nn::TransformerEncoderOptions(
      torch::nn::TransformerEncoderLayerOptions(16, 2).dim_feedforward(24), 2));
  encoder->eval();
  auto adapter = peft::attach(
      *encoder,
      peft::Gated(
          peft::HoulsbyOptions(4), peft::GateOptions().batch_first(false)));
  randomise(adapter);
  const auto x = torch::randn({6, 3, 16}); // tokens first
  const auto padding = mask().eq(0);
  const auto run = [&](const Tensor& batch, const Tensor& key_padding) {
    return encoder->forward(batch, {}, key_padding);
  };
  const auto row = run(x.slice(1, 1, 2).slice(0, 0, 4), {});
  const auto without = run(x, padding).slice(1, 1, 2).slice(0, 0, 4);
  CHECK_FALSE(torch::allclose(without, row, 1e-4, 1e-4));
  const peft::PaddingScope scope(mask());
  CHECK(close(run(x, padding).slice(1, 1, 2).slice(0, 0, 4), row, 1e-4, 1e-5));
}

TEST_CASE("Decorations around decorations, in files and copies", "[gate]") {
  auto all = hosts();
  auto& host = all[0];
  auto adapter = peft::attach(
      *host.module,
      peft::Gated(
          peft::Scaled(
              peft::Gated(peft::HoulsbyOptions(4)),
              peft::ScaleOptions(0.5).learned(true)),
          peft::GateOptions().average("all")));
  randomise(adapter);
  int gates = 0;
  for (const auto& item : adapter.named_parameters()) {
    gates += contains(item.key(), "0.output.dense.gate") ? 1 : 0;
  }
  CHECK(gates == 4 * 1); // two gates, weight and bias each
  const auto y = host.run(ids(), mask());
  const TemporaryDirectory folder;
  peft::save(adapter, folder.path().string());
  auto others = hosts();
  peft::load(*others[0].module, folder.path().string());
  CHECK(equal_bits(others[0].run(ids(), mask()), y));
  // The layer norms that train beside the adapters are scaled, not gated.
  for (const auto& site : adapter.shared_state()->sites) {
    if (contains(site.name, "LayerNorm")) {
      CHECK(site.delta->decorations().size() == 1);
    } else {
      CHECK(site.delta->decorations().size() == 3);
    }
  }
}

} // namespace test_decorations
