/// Prefix tuning and P-tuning v2: what a prefix does to attention, how it
/// starts, and that nothing else moves.

#include "decoders.h"
#include "gradcheck.h"
#include "model_state.h"
#include "own_decoder.h"
#include "test.h"

#include <peft/methods/prefix.h>
#include <peft/models/bert.h>
#include <peft/models/t5.h>

#include <string>
#include <utility>
#include <vector>

namespace test_prefix {

namespace {

using peft::KeyValues;
using peft::PrefixOptions;
using torch::Tensor;
using Stacks = std::vector<std::string>;

constexpr int64_t kTable = own::kLayers * 2 * own::kKeyHeads * own::kHeadDim;

own::Decoder decoder(torch::ScalarType dtype = torch::kDouble) {
  seed(1);
  own::Decoder model;
  model->to(dtype);
  model->eval();
  return model;
}

peft::models::T5Model t5(int64_t layers = 2) {
  seed(3);
  peft::models::T5Model model(peft::models::T5Options()
                                  .vocab_size(20)
                                  .d_model(8)
                                  .d_kv(4)
                                  .d_ff(16)
                                  .num_layers(2)
                                  .num_decoder_layers(layers)
                                  .num_heads(2)
                                  .dropout_rate(0));
  model->eval();
  return model;
}

/// The prefix as it stands in a file, `[virtual tokens, layers * 2 * width]`.
Tensor prefix_of(const peft::Adapter& adapter, size_t site = 0) {
  return adapter.shared_state()
      ->sites.at(site)
      .delta->file_tensors()
      .front()
      .second.detach();
}

/// softmax(q kᵀ / √d) v where `seen`, and the scores' log-sum-exp.
std::pair<Tensor, Tensor> attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& seen) {
  Tensor scores = q.matmul(k.transpose(-1, -2)) /
      std::sqrt(static_cast<double>(q.size(-1)));
  if (seen.defined()) {
    scores = scores.masked_fill(
        seen.logical_not(), -std::numeric_limits<double>::infinity());
  }
  return {scores.softmax(-1).matmul(v), scores.logsumexp(-1, true)};
}

/// The own decoder with a prefix by the gated sum of He et al.: nothing is put
/// in front of anything. `table` is the file's.
Tensor run_gated(
    own::Decoder& model,
    const Tensor& ids,
    const Tensor& table,
    const Tensor& mask = {}) {
  const auto length = ids.size(1), l = table.size(0);
  const auto heads = [](const Tensor& t) {
    return t.unflatten(-1, {-1, own::kHeadDim}).transpose(1, 2);
  };
  const auto shared = [](const Tensor& t) { // each head of keys serves two
    return t.repeat_interleave(own::kHeads / own::kKeyHeads, 1);
  };
  Tensor seen = torch::ones({length, length}, torch::kBool).tril();
  if (mask.defined()) {
    seen = seen.logical_and(mask.to(torch::kBool).unsqueeze(1).unsqueeze(1));
  }
  Tensor x = model->embed(ids) + model->place(torch::arange(l, l + length));
  const int64_t width = own::kKeyHeads * own::kHeadDim;
  for (int64_t i = 0; i < own::kLayers; ++i) {
    auto* block = model->blocks[static_cast<size_t>(i)]->as<own::BlockImpl>();
    const auto rows = [&](int64_t which) {
      return shared(
          heads(table.narrow(1, (2 * i + which) * width, width).unsqueeze(0)));
    };
    const Tensor q = heads(block->query(x));
    const auto [base, base_mass] = attention(
        q, shared(heads(block->key(x))), shared(heads(block->value(x))), seen);
    const auto [added, added_mass] = attention(q, rows(0), rows(1), {});
    const Tensor g = torch::sigmoid(added_mass - base_mass);
    const Tensor y = (1 - g) * base + g * added;
    const Tensor h = x + block->output(y.transpose(1, 2).flatten(2));
    x = h + torch::tanh(block->feed(h));
  }
  return model->head(x);
}

} // namespace

TEST_CASE("a prefix is a gated sum in every attention") {
  const bool projected = GENERATE(false, true);
  auto model = decoder();
  const Tensor ids = own::ids(3, 5);
  const Tensor before = model->forward(ids);
  const auto plain = state_of(*model);
  auto adapter = peft::attach(
      *model,
      PrefixOptions(4).prefix_projection(projected).encoder_hidden_size(7));
  CHECK(adapter.method() == "PREFIX_TUNING");
  const int64_t width = own::kKeyHeads * own::kHeadDim;
  CHECK(
      adapter.num_parameters() ==
      (projected ? 4 * width + width * 7 + 7 + 7 * kTable + kTable
                 : 4 * kTable));
  const Tensor with = model->forward(ids);
  REQUIRE(with.sizes() == before.sizes());
  CHECK_FALSE(close(with, before)); // no identity at the start
  CHECK(close(with, run_gated(model, ids, prefix_of(adapter))));
  const Tensor mask = torch::tensor(
      {{1, 1, 1, 1, 1}, {1, 1, 1, 0, 0}, {1, 1, 0, 1, 1}}, torch::kLong);
  CHECK(close(
      model->forward(ids, mask),
      run_gated(model, ids, prefix_of(adapter), mask)));

  // A scale multiplies keys and values; zeros still take attention.
  for (const double scale : {0.5, 0.0}) {
    adapter.set_scale(scale);
    const Tensor scaled = model->forward(ids);
    CHECK(close(scaled, run_gated(model, ids, scale * prefix_of(adapter))));
    CHECK_FALSE(close(scaled, before));
  }
  adapter.set_scale(1);

  auto copy = peft::clone(model);
  CHECK(equal_bits(copy->forward(ids), with));
  randomise(peft::get_adapter(*copy));
  CHECK_FALSE(close(copy->forward(ids), with));

  adapter.disable();
  CHECK(equal_bits(model->forward(ids), before));
  adapter.enable();
  CHECK(equal_bits(model->forward(ids), with));
  CHECK(contains(
      error_of([&] { adapter.merge(); }),
      "cannot be merged at 'extra_tokens'"));
  adapter.detach();
  CHECK(equal_bits(model->forward(ids), before));
  CHECK(same_state(state_of(*model), plain));
}

TEST_CASE("a prefix of zeros is not the base") {
  const bool projected = GENERATE(false, true);
  auto model = decoder();
  const Tensor ids = own::ids(2, 4);
  const Tensor before = model->forward(ids);
  auto adapter = peft::attach(
      *model, PrefixOptions(3).prefix_projection(projected).init("zero"));
  CHECK(prefix_of(adapter).eq(0).all().item<bool>());
  CHECK_FALSE(close(model->forward(ids), before));
}

TEST_CASE("what a token computes under a prefix does not depend on padding") {
  auto model = decoder();
  peft::attach(*model, PrefixOptions(3));
  const Tensor ids = own::ids(1, 4);
  const Tensor alone = model->forward(ids);
  const Tensor filler = own::ids(1, 2);
  const Tensor ones = torch::ones({1, 4}, torch::kLong);
  const Tensor zeros = torch::zeros({1, 2}, torch::kLong);
  const Tensor right =
      model->forward(at::cat({ids, filler}, 1), at::cat({ones, zeros}, 1));
  CHECK(close(right.slice(1, 0, 4), alone));
  const Tensor left = model->forward(
      at::cat({filler, ids}, 1),
      at::cat({zeros, ones}, 1),
      at::cat({zeros, torch::arange(4).unsqueeze(0)}, 1));
  CHECK(close(left.slice(1, 2), alone));
}

TEST_CASE("a token under a prefix sees nothing that comes later") {
  auto model = decoder();
  peft::attach(*model, PrefixOptions(3));
  const Tensor ids = own::ids(2, 6);
  Tensor other = ids.clone();
  other.slice(1, 4).copy_((other.slice(1, 4) + 1) % own::kVocabulary);
  const Tensor a = model->forward(ids), b = model->forward(other);
  CHECK(equal_bits(a.slice(1, 0, 4), b.slice(1, 0, 4)));
  CHECK_FALSE(close(a.slice(1, 4), b.slice(1, 4)));
}

TEST_CASE("a prefix stands in the cache from the first call on") {
  auto model = decoder();
  peft::attach(*model, PrefixOptions(3));
  torch::NoGradGuard no_grad;
  const Tensor ids = own::ids(2, 6);
  const Tensor whole = model->forward(ids);
  KeyValues cache;
  std::vector<Tensor> steps{model->forward(ids.slice(1, 0, 3), {}, {}, &cache)};
  CHECK(cache.length() == 6);
  CHECK(cache.virtual_tokens == 3);
  for (int64_t t = 3; t < 6; ++t) {
    steps.push_back(model->forward(ids.slice(1, t, t + 1), {}, {}, &cache));
  }
  CHECK(cache.length() == 9);
  CHECK(close(at::cat(steps, 1), whole));

  // The prefix alone, kept and used for one input after another.
  KeyValues kept;
  CHECK(model->forward(ids.slice(1, 0, 0), {}, {}, &kept).size(1) == 0);
  CHECK(kept.length() == 3);
  for (const auto& input : {ids, (ids + 1) % own::kVocabulary}) {
    KeyValues own_cache = kept;
    CHECK(close(
        model->forward(input, {}, {}, &own_cache), model->forward(input)));
  }
  CHECK(kept.length() == 3);
}

TEST_CASE("decoders generate the same with and without a cached prefix") {
  seed(4);
  auto gpt2 = decoders::load<decoders::Gpt2>();
  auto llama = decoders::load<decoders::Llama>();
  const Tensor ids = torch::randint(1, 48, {2, 4}, torch::kLong);
  const auto check = [&](auto& model) {
    torch::NoGradGuard no_grad;
    const Tensor before = model->forward(ids);
    peft::attach(*model, PrefixOptions(3));
    CHECK_FALSE(close(model->forward(ids), before));
    Tensor sequence = ids;
    for (int i = 0; i < 5; ++i) {
      const Tensor next =
          model->forward(sequence).select(1, -1).argmax(-1, true);
      sequence = at::cat({sequence, next}, 1);
    }
    CHECK(equal_bits(
        peft::models::generate(
            model,
            ids,
            {},
            peft::models::GenerationOptions().max_new_tokens(5)),
        sequence));
  };
  check(gpt2);
  check(llama);
}

TEST_CASE("a prefix that starts from a text is that text") {
  seed(4);
  const Tensor text = torch::randint(1, 20, {1, 5}, torch::kLong);
  const Tensor ids = torch::randint(1, 20, {2, 4}, torch::kLong);
  const auto check = [&](auto& model) {
    KeyValues cache;
    {
      torch::NoGradGuard no_grad;
      model->forward(text, {}, {}, &cache);
    }
    for (const int64_t l : {5, 3}) {
      const Tensor expected =
          model->forward(at::cat({text.slice(1, 0, l).expand({2, -1}), ids}, 1))
              .slice(1, l);
      auto adapter = peft::attach(*model, PrefixOptions(l).init_cache(cache));
      CHECK(close(model->forward(ids), expected));
      CHECK(adapter.parameters()[0].requires_grad());
      const auto options =
          std::any_cast<const PrefixOptions&>(adapter.shared_state()->options);
      CHECK_FALSE(options.init_cache()); // the cache is let go
      adapter.detach();
    }
  };
  auto model = decoder();
  auto gpt2 = decoders::load<decoders::Gpt2>();
  auto llama = decoders::load<decoders::Llama>();
  check(model);
  check(gpt2);
  check(llama);
}

TEST_CASE("a projected prefix without its MLP is the same prefix") {
  auto model = decoder();
  const Tensor ids = own::ids(2, 4);
  auto adapter = peft::attach(*model, PrefixOptions(3).prefix_projection(true));
  const auto names = adapter.shared_state()->sites[0].delta->named_parameters();
  CHECK(
      names.keys() ==
      std::vector<std::string>{
          "embedding.weight",
          "transform.0.weight",
          "transform.0.bias",
          "transform.2.weight",
          "transform.2.bias"});
  const Tensor with = model->forward(ids);
  const Tensor table = prefix_of(adapter).clone();
  peft::eject_reparameterization(adapter);
  CHECK(close(model->forward(ids), with, 1e-12, 1e-12));
  CHECK(adapter.num_parameters() == 3 * kTable);
  CHECK(close(adapter.parameters()[0], table, 1e-12, 1e-12));
  CHECK(adapter.parameters()[0].requires_grad());
  CHECK(contains(
      error_of([&] { peft::eject_reparameterization(adapter); }),
      "nothing to eject"));

  // A flat prefix with these numbers is the same adapter.
  auto flat = decoder();
  auto other = peft::attach(*flat, PrefixOptions(3));
  {
    torch::NoGradGuard no_grad;
    other.parameters()[0].copy_(table);
  }
  CHECK(equal_bits(flat->forward(ids), model->forward(ids)));
}

TEST_CASE("a prefix starts as HF draws it") {
  auto model = decoder();
  seed(5);
  auto flat = peft::attach(*model, PrefixOptions(3), "flat");
  seed(5);
  CHECK(equal_bits(
      flat.parameters()[0].detach(),
      torch::randn({3, kTable}).to(torch::kDouble)));
  seed(5);
  auto made = peft::attach(
      *model, peft::PTuningV2Options(3).prefix_projection(true), "made");
  seed(5);
  const int64_t width = own::kKeyHeads * own::kHeadDim;
  const torch::nn::Embedding embedding(3, width);
  const torch::nn::Linear first(width, width), second(width, kTable);
  const std::vector<Tensor> expected{
      embedding->weight,
      first->weight,
      first->bias,
      second->weight,
      second->bias};
  for (size_t i = 0; i < expected.size(); ++i) {
    CHECK(equal_bits(
        made.parameters()[i].detach(), expected[i].to(torch::kDouble)));
  }
}

TEST_CASE("dropout on a prefix acts in training only") {
  auto model = decoder();
  const Tensor ids = own::ids(2, 4);
  auto adapter = peft::attach(*model, PrefixOptions(3).dropout(0.5));
  const Tensor calm = model->forward(ids);
  CHECK(close(calm, run_gated(model, ids, prefix_of(adapter))));
  model->train();
  const Tensor one = model->forward(ids);
  CHECK_FALSE(close(one, calm));
  CHECK_FALSE(close(model->forward(ids), one));
}

TEST_CASE("prefixes of half networks train in float32") {
  for (const auto dtype : {torch::kBFloat16, torch::kHalf, torch::kFloat}) {
    INFO(dtype);
    auto model = decoder(dtype);
    auto adapter = peft::attach(*model, PrefixOptions(3));
    CHECK(prefix_of(adapter).scalar_type() == torch::kFloat);
    const Tensor y = model->forward(own::ids(2, 4));
    CHECK(y.scalar_type() == dtype);
    y.sum().backward();
    CHECK(adapter.parameters()[0].grad().scalar_type() == torch::kFloat);
    model->to(torch::kDouble);
    const Tensor ids = own::ids(2, 4);
    CHECK(
        close(model->forward(ids), run_gated(model, ids, prefix_of(adapter))));
  }
}

TEST_CASE("gradients of prefixes agree with finite differences") {
  auto model = decoder();
  const Tensor ids = own::ids(2, 3);
  for (const bool projected : {false, true}) {
    auto adapter = peft::attach(
        *model,
        PrefixOptions(2).prefix_projection(projected).encoder_hidden_size(3));
    seed(6);
    const Tensor direction =
        torch::randn({2, 3, own::kVocabulary}, torch::kDouble);
    CHECK(gradcheck::first_order(
        [&](const gradcheck::Tensors&) { return model->forward(ids); },
        adapter.parameters(),
        direction));
    adapter.detach();
  }
}

TEST_CASE("only the prefix moves in training") {
  const bool projected = GENERATE(false, true);
  auto model = decoder(torch::kFloat);
  model->train();
  const Tensor ids = own::ids(4, 6);
  auto adapter =
      peft::attach(*model, PrefixOptions(3).prefix_projection(projected));
  std::vector<Tensor> base, own_before;
  for (const auto& p : peft::detail::base_parameters(*model)) {
    base.push_back(p.second.detach().clone());
    CHECK_FALSE(p.second.requires_grad());
  }
  for (const auto& p : adapter.parameters()) {
    own_before.push_back(p.detach().clone());
  }
  torch::optim::AdamW optimizer(
      model->parameters(), torch::optim::AdamWOptions(0.05).weight_decay(0.1));
  double first = 0, last = 0;
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    const Tensor loss = decoders::next_token_loss(model->forward(ids), ids);
    (step == 0 ? first : last) = loss.item<double>();
    loss.backward();
    optimizer.step();
  }
  CHECK(last < first);
  size_t i = 0;
  for (const auto& p : peft::detail::base_parameters(*model)) {
    INFO(p.first);
    CHECK(equal_bits(p.second, base[i++]));
    CHECK_FALSE(p.second.grad().defined());
  }
  i = 0;
  for (const auto& p : adapter.parameters()) {
    CHECK_FALSE(equal_bits(p, own_before[i++]));
  }
}

TEST_CASE("two prefixes stand in front of each other") {
  auto model = decoder();
  const Tensor ids = own::ids(2, 4);
  auto one = peft::attach(*model, PrefixOptions(2), "one");
  const Tensor with_one = model->forward(ids);
  auto two = peft::attach(*model, PrefixOptions(3), "two");
  CHECK(close(
      model->forward(ids),
      run_gated(model, ids, at::cat({prefix_of(two), prefix_of(one)}))));
  {
    peft::ActiveAdapters scope({"one"});
    CHECK(equal_bits(model->forward(ids), with_one));
  }
  two.detach();
  CHECK(equal_bits(model->forward(ids), with_one));
}

TEST_CASE("a prefix for each attention of an encoder-decoder") {
  auto model = t5();
  const Tensor ids = torch::randint(1, 20, {2, 5}, torch::kLong);
  const Tensor answer = torch::randint(1, 20, {2, 3}, torch::kLong);
  const Tensor mask = torch::tensor({{1, 1, 1, 1, 1}, {1, 1, 1, 0, 0}});
  const Tensor before = model->forward(ids, mask, answer);
  const Tensor encoded = model->encode(ids, mask).hidden;
  const int64_t table = 2 * 2 * 8;
  const auto run = [&](const PrefixOptions& options, int64_t sites) {
    seed(11);
    auto adapter = peft::attach(*model, options);
    CHECK(adapter.num_parameters() == sites * 3 * table);
    CHECK(adapter.sites().size() == static_cast<size_t>(sites));
    CHECK(adapter.named_parameters().size() == static_cast<size_t>(sites));
    const Tensor result = model->forward(ids, mask, answer);
    CHECK(result.sizes() == before.sizes());
    CHECK_FALSE(close(result, before));
    const bool in_encoder = !close(model->encode(ids, mask).hidden, encoded);
    model->forward(ids, mask, answer).pow(2).sum().backward();
    for (const auto& p : adapter.parameters()) {
      CHECK(p.grad().ne(0).any(0).all().item<bool>());
    }
    // With a cache, step by step, it is the same.
    peft::models::T5Cache cache;
    const auto memory = model->encode(ids, mask);
    std::vector<Tensor> steps;
    for (int64_t t = 0; t < 3; ++t) {
      steps.push_back(
          model->decode(answer.slice(1, t, t + 1), memory, {}, &cache));
    }
    CHECK(close(at::cat(steps, 1), result));
    adapter.detach();
    CHECK(equal_bits(model->forward(ids, mask, answer), before));
    return in_encoder;
  };
  CHECK_FALSE(run(PrefixOptions(3), 1)); // the decoder's own, as HF
  CHECK_FALSE(run(PrefixOptions(3).stacks({"cross"}), 1));
  CHECK(run(PrefixOptions(3).stacks({"encoder"}), 1));
  CHECK(run(PrefixOptions(3).stacks({"encoder", "decoder", "cross"}), 3));
}

TEST_CASE("HF's order of an encoder-decoder's rows") {
  // Layer i of L takes the rows of layer 2 i mod L.
  const int64_t layers = GENERATE(2, 3, 4);
  INFO(layers << " layers");
  auto model = t5(layers);
  const Tensor ids = torch::randint(1, 20, {2, 5}, torch::kLong);
  const Tensor answer = torch::randint(1, 20, {2, 3}, torch::kLong);
  seed(5);
  auto hf = peft::attach(*model, PrefixOptions(3).hf_layer_order(true));
  const Tensor as_hf = model->forward(ids, {}, answer);
  CHECK(
      hf.named_parameters().keys() ==
      std::vector<std::string>{"prompt_embeddings"});
  const auto blocks = prefix_of(hf).chunk(layers, 1);
  std::vector<Tensor> dealt;
  for (int64_t i = 0; i < layers; ++i) {
    dealt.push_back(blocks[static_cast<size_t>(2 * i % layers)]);
  }
  hf.detach();
  auto adapter = peft::attach(*model, PrefixOptions(3));
  CHECK(
      adapter.named_parameters().keys() ==
      std::vector<std::string>{"decoder.extra_tokens.prompt_embeddings"});
  torch::NoGradGuard no_grad;
  adapter.parameters()[0].copy_(at::cat(dealt, 1));
  CHECK(close(model->forward(ids, {}, answer), as_hf));
}

TEST_CASE("parameters of prefixes, from shapes") {
  const auto stack = [](int64_t d,
                        int64_t layers,
                        int64_t heads,
                        int64_t head_dim,
                        const char* name) {
    return peft::ExtraTokensOptions(d, layers, heads, head_dim).stack(name);
  };
  struct Row {
    std::string name;
    own::Stacks stacks;
    PrefixOptions options;
    int64_t count;
  };
  const own::Stacks bert_base{stack(768, 12, 12, 64, "encoder")};
  const own::Stacks bert_large{stack(1024, 24, 16, 64, "encoder")};
  const own::Stacks t5_base{
      stack(768, 12, 12, 64, "encoder"),
      stack(768, 12, 12, 64, "decoder"),
      stack(768, 12, 12, 64, "cross")};
  const own::Stacks llama_7b{stack(4096, 32, 32, 128, "decoder")};
  const own::Stacks llama3_8b{stack(4096, 32, 8, 128, "decoder")};
  const PrefixOptions l20(20);
  const std::vector<Row> rows{
      {"BERT-base", bert_base, l20, 368640},
      {"BERT-large", bert_large, l20, 983040},
      {"RoBERTa-large, P-tuning v2 on RTE",
       bert_large,
       peft::PTuningV2Options(128),
       6291456},
      {"BERT-base by an MLP of 512",
       bert_base,
       PrefixOptions(20).prefix_projection(true).encoder_hidden_size(512),
       20 * 768 + 768 * 512 + 512 + 512 * 18432 + 18432},
      {"BERT-base by an MLP of its width",
       bert_base,
       PrefixOptions(20).prefix_projection(true),
       20 * 768 + 768 * 768 + 768 + 768 * 18432 + 18432},
      {"T5-base", t5_base, l20, 368640},
      {"T5-base, all three attentions",
       t5_base,
       PrefixOptions(20).stacks({"encoder", "decoder", "cross"}),
       2 * 20 * 768 * (12 + 2 * 12)},
      {"LLaMA-7B", llama_7b, l20, 2 * 32 * 20 * 4096},
      {"8 heads of keys for 32 of queries",
       llama3_8b,
       l20,
       2 * 32 * 20 * 1024}};
  for (const auto& row : rows) {
    INFO(row.name);
    own::Sites network(row.stacks);
    CHECK(peft::attach(*network, row.options).num_parameters() == row.count);
  }
}

TEST_CASE("layers left out have no prefix and see the others' effect") {
  seed(4);
  decoders::Gpt2::Model model(decoders::Gpt2::options().n_layer(3));
  model->to(torch::kDouble);
  model->eval();
  const Tensor words = torch::randint(40, {2, 5}, torch::kLong);
  Tensor padding = torch::ones({2, 5}, torch::kLong);
  padding[1].slice(0, 3).zero_();
  auto adapter =
      peft::attach(*model, PrefixOptions(3).leave_out({0, 2, 0}), "some");
  CHECK(adapter.num_parameters() == 3 * 2 * 16);
  const Tensor all = model->forward(words),
               some = model->forward(words, padding);
  const Tensor ones = torch::ones({2, 5}, torch::kLong);
  CHECK(close(model->forward(words, ones), all));
  // The same keys and values, put in front by hand.
  const Tensor rows =
      prefix_of(adapter).view({3, 2, 4, 4}).permute({1, 2, 0, 3});
  adapter.disable();
  const auto by_hand = [&](const Tensor& mask) {
    KeyValues cache;
    cache.virtual_tokens = 3;
    cache.keys = {Tensor(), rows[0].expand({2, 4, 3, 4}), Tensor()};
    cache.values = {Tensor(), rows[1].expand({2, 4, 3, 4}), Tensor()};
    return model->forward(words, mask, {}, &cache);
  };
  CHECK(close(by_hand({}), all));
  CHECK(close(by_hand(padding), some));
  // A generation goes on with them.
  adapter.enable();
  KeyValues cache;
  model->forward(words.slice(1, 0, 4), {}, {}, &cache);
  CHECK(cache.length() == 7);
  CHECK(cache.length(0) == 4);
  CHECK(close(
      model->forward(words.slice(1, 4), {}, {}, &cache), all.slice(1, 4)));

  // A real start fills the layers that are left in.
  adapter.detach();
  KeyValues text;
  model->forward(words.slice(0, 0, 1), {}, {}, &text);
  adapter =
      peft::attach(*model, PrefixOptions(3).leave_out({0, 2}).init_cache(text));
  CHECK(equal_bits(
      prefix_of(adapter).slice(1, 0, 16),
      text.keys[1][0].slice(1, 0, 3).transpose(0, 1).flatten(1).detach()));

  // Through the stacks of an encoder-decoder, and in a file.
  auto network = t5();
  CHECK(
      peft::attach(
          *network,
          PrefixOptions(3)
              .stacks({"encoder", "decoder", "cross"})
              .leave_out({1, 2}),
          "t5")
          .num_parameters() == (1 + 1 + 1) * 3 * 2 * 8);
  const auto adapters = peft::get_adapter(*network, "t5").sites();
  CHECK(adapters.size() == 3);
  const Tensor ids = torch::randint(20, {2, 4}, torch::kLong);
  const Tensor y = network->forward(ids, {}, ids);
  const TemporaryDirectory folder;
  peft::save(peft::get_adapter(*network, "t5"), folder.path().string());
  peft::get_adapter(*network, "t5").detach();
  peft::load(*network, folder.path().string());
  CHECK(equal_bits(network->forward(ids, {}, ids), y));
}

TEST_CASE("prefix tuning says what does not fit") {
  auto model = decoder();
  torch::nn::Sequential bare(torch::nn::Linear(3, 3));
  own::Sites cross(
      own::Stacks{peft::ExtraTokensOptions(8, 2, 2, 4).stack("cross")});
  own::Sites two(own::Stacks{
      peft::ExtraTokensOptions(8, 2, 2, 4),
      peft::ExtraTokensOptions(8, 2, 2, 4).stack("decoder")});
  KeyValues cache;
  {
    torch::NoGradGuard no_grad;
    model->forward(own::ids(1, 3), {}, {}, &cache);
  }
  KeyValues rows;
  {
    torch::NoGradGuard no_grad;
    model->forward(own::ids(2, 3), {}, {}, &rows);
  }
  struct Row {
    std::string name;
    std::shared_ptr<torch::nn::Module> model;
    PrefixOptions options;
    std::vector<std::string> parts;
  };
  const std::vector<Row> table{
      {"no place",
       bare.ptr(),
       PrefixOptions(3),
       {"prefix tuning puts tokens in front",
        "register_module(\"extra_tokens\"",
        "tokens.key_values()"}},
      {"no tokens", model.ptr(), PrefixOptions(0), {"must be positive, got 0"}},
      {"longer than the table of positions",
       model.ptr(),
       PrefixOptions(own::kPositions),
       {"24 virtual tokens leave no room at 'extra_tokens'", "24 positions"}},
      {"an unknown start",
       model.ptr(),
       PrefixOptions(3).init("ones"),
       {"'random' or 'zero', got 'ones'"}},
      {"a stack that there is not",
       model.ptr(),
       PrefixOptions(3).stacks({"encoder"}),
       {"no stack 'encoder'", "it has 'decoder' at 'extra_tokens'"}},
      {"a stack named twice",
       model.ptr(),
       PrefixOptions(3).stacks({"decoder", "decoder"}),
       {"'decoder' twice"}},
      {"cross attention alone",
       cross.ptr(),
       PrefixOptions(3),
       {"only at 'cross' at 'cross'", "stacks"}},
      {"a dropout of one",
       model.ptr(),
       PrefixOptions(3).dropout(1),
       {"dropout must lie in [0, 1), got 1"}},
      {"no width",
       model.ptr(),
       PrefixOptions(3).encoder_hidden_size(0),
       {"encoder_hidden_size must be positive"}},
      {"a cache through an MLP",
       model.ptr(),
       PrefixOptions(3).init_cache(cache).prefix_projection(true),
       {"init_cache", "prefix_projection"}},
      {"a cache too short",
       model.ptr(),
       PrefixOptions(4).init_cache(cache),
       {"init_cache must hold", "4 or more", "2 layers", "[1, 2, 3, 3]"}},
      {"a cache of two rows",
       model.ptr(),
       PrefixOptions(3).init_cache(rows),
       {"[2, 2, 3, 3]"}},
      {"an empty cache",
       model.ptr(),
       PrefixOptions(3).init_cache(KeyValues()),
       {"it has 0 layers"}},
      {"no layer left",
       model.ptr(),
       PrefixOptions(3).leave_out({0, 1}),
       {"leave_out leaves no layer"}},
      {"a layer that there is not",
       model.ptr(),
       PrefixOptions(3).leave_out({2}),
       {"leave_out names layer 2", "0 to 1"}},
      {"no layer left where the prefix goes",
       two.ptr(),
       PrefixOptions(3).leave_out({2, 3}),
       {"leave_out leaves no layer for the prefix", "'decoder' at 'decoder'"}},
      {"HF's order of layers left out",
       model.ptr(),
       PrefixOptions(3).leave_out({1}).hf_layer_order(true),
       {"hf_layer_order", "leave_out"}},
      {"a cache for two stacks",
       two.ptr(),
       PrefixOptions(3).init_cache(cache).stacks({"encoder", "decoder"}),
       {"for one stack", "'encoder' at 'encoder', 'decoder' at 'decoder'"}}};
  for (const auto& row : table) {
    INFO(row.name);
    const auto before = state_of(*row.model);
    const auto error = error_of([&] { peft::attach(*row.model, row.options); });
    INFO(error);
    for (const auto& part : row.parts) {
      CHECK(contains(error, part));
    }
    CHECK_FALSE(error.empty());
    CHECK(same_state(state_of(*row.model), before));
  }
  // What fits at attach can be too long in a call.
  peft::attach(*model, PrefixOptions(20));
  model->forward(own::ids(1, 4));
  CHECK(contains(
      error_of([&] { model->forward(own::ids(1, 5)); }),
      "25 tokens, the adapter's included, are more than the 24 positions"));
}

} // namespace test_prefix
