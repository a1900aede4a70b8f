// T5 against what transformers computes (golden/make_models.py), and what must
// hold of it without a reference.

#include "call_sites.h"
#include "test.h"

#include <peft/io/base_weights.h>
#include <peft/io/safetensors.h>
#include <peft/methods/lora.h>
#include <peft/models/t5.h>

#include <algorithm>
#include <map>
#include <set>

namespace test_t5 {

namespace {

using peft::KeyValues;
using peft::LayerCall;
using peft::models::GenerationOptions;
using peft::models::T5BlockImpl;
using peft::models::T5Cache;
using peft::models::T5ForConditionalGeneration;
using peft::models::T5ForConditionalGenerationImpl;
using peft::models::T5Model;
using peft::models::T5Options;
using peft::models::T5Source;
using torch::Tensor;

/// The sizes of data/models/t5_*.
T5Options tiny(bool gated = false) {
  return T5Options()
      .vocab_size(48)
      .d_model(16)
      .d_kv(6)
      .d_ff(24)
      .num_layers(2)
      .num_heads(4)
      .relative_attention_num_buckets(8)
      .relative_attention_max_distance(12)
      .dropout_rate(0)
      .feed_forward_proj(gated ? "gated-gelu" : "relu")
      .tie_word_embeddings(!gated);
}

std::string folder(bool gated) {
  return golden(gated ? "models/t5_v1_1" : "models/t5_v1_0");
}

T5ForConditionalGeneration load(bool gated) {
  T5ForConditionalGeneration model(tiny(gated));
  peft::load_base(*model, folder(gated));
  model->eval();
  return model;
}

std::map<std::string, Tensor> expected(bool gated) {
  return peft::load_safetensors(folder(gated) + "/reference.safetensors");
}

/// Differences below 1e-5 of the largest number. (Element by element that is
/// not in the reference: transformers' own float32 logits of the tiny v1.1 are
/// 2.2e-5 from its float64 ones, of up to 3.6, by way of unscaled scores.)
Comparison agrees(const Tensor& ours, const Tensor& theirs) {
  const auto largest = theirs.abs().max().item<double>();
  return close(ours, theirs, 0, 1e-5 * std::max(1.0, largest));
}

/// Zeros where the query is padding, as in the reference.
Tensor forget_padding(const Tensor& states, const Tensor& mask) {
  return states * mask.unsqueeze(-1);
}

Tensor ids(int64_t batch, int64_t length) {
  return torch::randint(4, 48, {batch, length}, torch::kLong);
}

} // namespace

TEST_CASE("T5 computes what transformers computes", "[t5]") {
  const bool gated = GENERATE(false, true);
  const std::string side = GENERATE("right", "left");
  INFO((gated ? "v1.1, " : "v1.0, ") << "padded on the " << side);
  auto model = load(gated);
  auto want = expected(gated);
  torch::NoGradGuard no_grad;
  const auto mask = want[side + ".attention_mask"];
  const auto decoder_ids = want["decoder_input_ids"];
  const auto decoder_mask = want["decoder_attention_mask"];

  const auto encoded = model->encode(want[side + ".input_ids"], mask);
  CHECK(agrees(
      forget_padding(encoded.hidden, mask), want[side + ".encoder_hidden"]));
  const auto hidden = model->decode(decoder_ids, encoded, decoder_mask);
  CHECK(agrees(forget_padding(hidden, decoder_mask), want[side + ".hidden"]));
  const auto logits = model->forward(
      want[side + ".input_ids"], mask, decoder_ids, decoder_mask);
  CHECK(agrees(forget_padding(logits, decoder_mask), want[side + ".logits"]));
  CHECK(logits.isfinite().all().item<bool>());
  // Without the mask it is another network, or the mask would prove nothing.
  CHECK_FALSE(agrees(
      forget_padding(
          model->forward(
              want[side + ".input_ids"], {}, decoder_ids, decoder_mask),
          decoder_mask),
      want[side + ".logits"]));
}

TEST_CASE("T5's loss and gradients are transformers'", "[t5]") {
  const bool gated = GENERATE(false, true);
  auto model = load(gated);
  model->train();
  auto want = expected(gated);
  const auto labels = want["labels"];
  const auto decoder_ids = model->shift_right(labels);
  REQUIRE(torch::equal(decoder_ids, want["decoder_input_ids"]));
  const auto logits = model->forward(
      want["right.input_ids"], want["right.attention_mask"], decoder_ids);
  const auto loss = torch::nn::functional::cross_entropy(
      logits.flatten(0, 1), labels.flatten());
  REQUIRE(agrees(loss.reshape({1}), want["loss"]));
  loss.backward();
  const auto parameters = model->named_parameters();
  int compared = 0;
  for (const auto& [name, gradient] : want) {
    if (name.rfind("gradient.", 0) == 0) {
      INFO(name);
      CHECK(agrees(parameters[name.substr(9)].grad(), gradient));
      ++compared;
    }
  }
  REQUIRE(compared == 3);
}

TEST_CASE("T5 writes what transformers writes", "[t5]") {
  const bool gated = GENERATE(false, true);
  auto model = load(gated);
  auto want = expected(gated);
  const auto options = GenerationOptions().max_new_tokens(8);
  for (const std::string side : {"right", "left"}) {
    INFO(side);
    CHECK(torch::equal(
        peft::models::generate(
            model,
            want[side + ".input_ids"],
            want[side + ".attention_mask"],
            options),
        want["generate." + side]));
  }
  auto until = options;
  until.eos_token_id(want["generate.end_token"].item<int64_t>());
  CHECK(torch::equal(
      peft::models::generate(
          model, want["right.input_ids"], want["right.attention_mask"], until),
      want["generate.right_until_end"]));
}

TEST_CASE("A cache changes nothing but the work", "[t5]") {
  seed();
  T5ForConditionalGeneration model(tiny().num_decoder_layers(3));
  model->eval();
  torch::NoGradGuard no_grad;
  const auto mask =
      torch::tensor({{0, 0, 1, 1, 1}, {1, 1, 1, 1, 0}}, torch::kLong);
  const auto encoded = model->encode(ids(2, 5), mask);
  const auto written = ids(2, 7);
  // Padding on the left of one row and on the right of the other.
  const auto written_mask = torch::tensor(
      {{0, 0, 1, 1, 1, 1, 1}, {1, 1, 1, 1, 1, 1, 0}}, torch::kLong);
  const auto whole = model->decode(written, encoded, written_mask);

  T5Cache cache;
  std::vector<Tensor> parts;
  int64_t begin = 0;
  for (const int64_t length : {3, 1, 2, 1}) {
    parts.push_back(model->decode(
        written.narrow(1, begin, length),
        encoded,
        written_mask.narrow(1, 0, begin + length),
        &cache));
    begin += length;
  }
  REQUIRE(agrees(
      forget_padding(torch::cat(parts, 1), written_mask),
      forget_padding(whole, written_mask)));
  REQUIRE(cache.self_attention.keys.size() == 3);
  REQUIRE(cache.self_attention.length(2) == 7);
  REQUIRE(cache.cross_attention.length(2) == 5);
}

TEST_CASE("T5's padding changes no token, whatever stands there", "[t5]") {
  seed();
  T5ForConditionalGeneration model(tiny(true));
  model->eval();
  torch::NoGradGuard no_grad;
  const auto row = ids(1, 5);
  const auto written = ids(1, 4);
  const auto alone = model->forward(row, {}, written);
  const auto with = [&](std::vector<int64_t> padding) {
    const auto mask = torch::constant_pad_nd(torch::ones({1, 5}), padding, 0);
    const auto padded = torch::where(
        mask.to(torch::kBool),
        torch::constant_pad_nd(row, padding, 0),
        ids(1, 5 + padding[0] + padding[1]));
    return model->forward(padded, mask, written);
  };
  CHECK(agrees(with({0, 3}), alone));
  CHECK(agrees(with({3, 0}), alone));
  CHECK(agrees(with({2, 2}), alone));

  const auto decoder_mask =
      torch::constant_pad_nd(torch::ones({1, 4}), {3, 0}, 0);
  const auto late = model->forward(
      row, {}, torch::constant_pad_nd(written, {3, 0}, 0), decoder_mask);
  CHECK(agrees(late.narrow(1, 3, 4), alone));
}

TEST_CASE("A row of nothing but padding stays finite", "[t5]") {
  seed();
  T5ForConditionalGeneration model(tiny());
  const auto nothing = torch::tensor({{1, 1, 1}, {0, 0, 0}}, torch::kLong);
  const auto logits = model->forward(ids(2, 3), nothing, ids(2, 3), nothing);
  CHECK(logits.isfinite().all().item<bool>());
  logits.sum().backward();
  for (const auto& item : model->named_parameters()) {
    INFO(item.key());
    CHECK(
        (!item.value().grad().defined() ||
         item.value().grad().isfinite().all().item<bool>()));
  }
}

TEST_CASE("T5's decoder sees no later token", "[t5]") {
  seed();
  T5ForConditionalGeneration model(tiny());
  model->eval();
  torch::NoGradGuard no_grad;
  const auto source = ids(1, 4);
  const auto written = ids(1, 6);
  auto changed = written.clone();
  changed[0][3] = (changed[0][3].item<int64_t>() + 1) % 48;
  const auto before = model->forward(source, {}, written);
  const auto after = model->forward(source, {}, changed);
  CHECK(agrees(after.narrow(1, 0, 3), before.narrow(1, 0, 3)));
  CHECK_FALSE(agrees(after.narrow(1, 3, 3), before.narrow(1, 3, 3)));
}

TEST_CASE("Distances fall into transformers' buckets", "[t5]") {
  // By transformers 5.23's T5Attention._relative_position_bucket.
  const auto distance = torch::tensor(
      {-300, -128, -127, -64, -33, -32, -16, -9, -8, -7,  -1,  0,
       1,    7,    8,    9,   16,  31,  32,  90, 91, 127, 128, 300},
      torch::kLong);
  const auto both = torch::tensor(
      {15, 15, 15, 14, 12, 12, 10, 8,  8,  7,  1,  0,
       17, 23, 24, 24, 26, 27, 28, 30, 31, 31, 31, 31},
      torch::kLong);
  const auto back = torch::tensor(
      {31, 31, 31, 26, 21, 21, 16, 9, 8, 7, 1, 0,
       0,  0,  0,  0,  0,  0,  0,  0, 0, 0, 0, 0},
      torch::kLong);
  CHECK(torch::equal(peft::models::t5_bucket(distance, true, 32, 128), both));
  CHECK(torch::equal(peft::models::t5_bucket(distance, false, 32, 128), back));
}

TEST_CASE("Only the first block of a stack has a table of distances", "[t5]") {
  const auto names = T5Model(tiny())->named_parameters().keys();
  std::set<std::string> tables;
  for (const auto& name : names) {
    if (contains(name, "relative_attention_bias")) {
      tables.insert(name);
    }
  }
  CHECK(
      tables ==
      std::set<std::string>{
          "encoder.block.0.layer.0.SelfAttention.relative_attention_bias."
          "weight",
          "decoder.block.0.layer.0.SelfAttention.relative_attention_bias."
          "weight"});
}

TEST_CASE("Sizes give T5's published parameter counts", "[t5]") {
  // Without an output layer of its own, and with one.
  const auto count = [](const T5Options& options) {
    return peft::count_parameters(*T5ForConditionalGeneration(options)).total;
  };
  CHECK(count(T5Options()) == 60'506'624); // t5-small
  CHECK(
      count(T5Options()
                .d_ff(1024)
                .num_layers(8)
                .num_heads(6)
                .feed_forward_proj("gated-gelu")
                .tie_word_embeddings(false)) == 76'961'152); // flan-t5-small
}

TEST_CASE("T5's token embedding is one tensor", "[t5]") {
  const bool gated = GENERATE(false, true);
  seed();
  T5ForConditionalGeneration model(tiny(gated));
  const auto& table = model->shared->weight;
  CHECK(model->encoder->embed_tokens->weight.is_same(table));
  CHECK(model->decoder->embed_tokens->weight.is_same(table));
  CHECK(model->lm_head->weight.is_same(table) == !gated);

  // The optimizer moves it once.
  const auto before = table.detach().clone();
  torch::optim::SGD optimizer(model->parameters(), 0.5);
  model->forward(ids(2, 5), {}, ids(2, 4)).square().mean().backward();
  optimizer.step();
  CHECK(close(table.detach(), before - 0.5 * table.grad()));
  CHECK_FALSE(equal_bits(table.detach(), before));
  model->to(torch::kDouble);
  CHECK(model->encoder->embed_tokens->weight.scalar_type() == torch::kDouble);
  CHECK(model->lm_head->weight.scalar_type() == torch::kDouble);
}

TEST_CASE("T5 loads files that repeat the embedding", "[t5]") {
  auto tensors = peft::load_safetensors(folder(false) + "/model.safetensors");
  const auto table = tensors.at("shared.weight");
  tensors["encoder.embed_tokens.weight"] = table.clone();
  tensors["decoder.embed_tokens.weight"] = table.clone();
  tensors["lm_head.weight"] = table.clone();
  const std::string unread =
      "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight";
  tensors[unread] = torch::zeros({8, 4});
  TemporaryDirectory directory;
  const auto path = directory / "model.safetensors";
  peft::save_safetensors(tensors, path);

  T5ForConditionalGeneration model(tiny());
  CHECK(contains(error_of([&] { peft::load_base(*model, path); }), unread));
  const auto report = peft::load_base(
      *model,
      path,
      peft::BaseWeightsOptions().ignore_extra(
          {"EncDecAttention.relative_attention_bias.weight"}));
  CHECK(report.missing.empty());
  CHECK(report.extra == std::vector<std::string>{unread});
  CHECK(equal_bits(model->shared->weight.detach(), table));
}

TEST_CASE("T5 goes through an archive and a clone", "[t5]") {
  const bool gated = GENERATE(false, true);
  auto model = load(gated);
  torch::NoGradGuard no_grad;
  seed();
  const auto source = ids(2, 5);
  const auto written = ids(2, 4);
  const auto want = model->forward(source, {}, written);

  TemporaryDirectory directory;
  torch::save(model, directory / "t5.pt");
  T5ForConditionalGeneration again(tiny(gated));
  torch::load(again, directory / "t5.pt");
  again->eval();
  CHECK(equal_bits(again->forward(source, {}, written), want));

  for (const bool by_library : {false, true}) {
    INFO((by_library ? "peft::clone" : "Module::clone"));
    auto copy = by_library
        ? peft::clone(model)
        : T5ForConditionalGeneration(
              std::dynamic_pointer_cast<T5ForConditionalGenerationImpl>(
                  model->clone()));
    copy->eval();
    CHECK(equal_bits(copy->forward(source, {}, written), want));
    // One embedding again, and another one than the original's.
    copy->shared->weight.zero_();
    CHECK(copy->encoder->embed_tokens->weight.eq(0).all().item<bool>());
    CHECK(copy->decoder->embed_tokens->weight.eq(0).all().item<bool>());
    CHECK(copy->lm_head->weight.eq(0).all().item<bool>() == !gated);
    CHECK(equal_bits(model->forward(source, {}, written), want));
  }
}

TEST_CASE("Dropout acts on T5 in training only", "[t5]") {
  seed();
  T5ForConditionalGeneration model(tiny().dropout_rate(0.3));
  const auto source = ids(2, 5);
  const auto written = ids(2, 4);
  model->train();
  CHECK_FALSE(equal_bits(
      model->forward(source, {}, written),
      model->forward(source, {}, written)));
  model->eval();
  CHECK(equal_bits(
      model->forward(source, {}, written),
      model->forward(source, {}, written)));
}

TEST_CASE("Every parameter of T5 takes part in training", "[t5]") {
  const bool gated = GENERATE(false, true);
  seed();
  T5ForConditionalGeneration model(tiny(gated));
  model->forward(ids(2, 6), {}, ids(2, 6)).square().sum().backward();
  for (const auto& item : model->named_parameters()) {
    if (item.value().numel() > 0) { // what is left of a tied weight
      INFO(item.key());
      CHECK(item.value().grad().defined());
    }
  }
}

TEST_CASE("LoRA finds T5's projections by Hugging Face's names", "[t5]") {
  auto model = load(true);
  auto adapter = peft::attach(
      *model,
      peft::LoraOptions(2).init("random").targets(
          {"q", "EncDecAttention.v", "wi_1", "lm_head"}));
  std::vector<std::string> names;
  for (const auto& site : adapter.sites()) {
    names.push_back(site.name);
  }
  // Two encoder blocks: q, wi_1; two decoder blocks: q, q, v, wi_1; lm_head.
  CHECK(names.size() == 13);
  CHECK(
      std::count(
          names.begin(),
          names.end(),
          "decoder.block.1.layer.1.EncDecAttention.v") == 1);
  seed();
  const auto source = ids(2, 5);
  const auto written = ids(2, 4);
  const auto adapted = model->forward(source, {}, written);
  T5Cache cache;
  const auto encoded = model->encode(source);
  std::vector<Tensor> steps;
  for (int64_t i = 0; i < 4; ++i) {
    steps.push_back(model->logits(
        model->decode(written.narrow(1, i, 1), encoded, {}, &cache)));
  }
  CHECK(agrees(torch::cat(steps, 1), adapted));
  adapter.disable();
  CHECK_FALSE(agrees(model->forward(source, {}, written), adapted));
}

TEST_CASE("LoRA on T5's embedding acts wherever that is used", "[t5]") {
  auto model = load(false);
  seed();
  const auto source = ids(2, 5);
  const auto written = ids(2, 4);
  const auto before = model->forward(source, {}, written);
  auto adapter = peft::attach(
      *model,
      peft::LoraOptions(2).init("random").targets(
          {"shared", "embed_tokens", "lm_head"}));
  REQUIRE(adapter.sites().size() == 1);
  CHECK(adapter.sites()[0].parameters.size() == 4);
  const auto adapted = model->forward(source, {}, written);
  CHECK_FALSE(agrees(adapted, before));
  auto copy = peft::clone(model);
  CHECK(agrees(copy->forward(source, {}, written), adapted));
  adapter.merge();
  CHECK(agrees(model->forward(source, {}, written), adapted));
  adapter.unmerge();
  adapter.detach();
  CHECK(equal_bits(model->forward(source, {}, written), before));
}

TEST_CASE("T5 runs in bfloat16", "[t5]") {
  auto model = load(true);
  torch::NoGradGuard no_grad;
  seed();
  const auto source = ids(2, 5);
  const auto mask = torch::tensor({{1, 1, 1, 1, 1}, {0, 0, 1, 1, 1}});
  const auto want = model->forward(source, mask, source);
  model->to(torch::kBFloat16);
  const auto got = model->forward(source, mask, source);
  CHECK(got.scalar_type() == torch::kBFloat16);
  CHECK(got.isfinite().all().item<bool>());
  const auto cosine = torch::nn::functional::cosine_similarity(
      got.flatten().to(torch::kFloat),
      want.flatten(),
      torch::nn::functional::CosineSimilarityFuncOptions().dim(0));
  CHECK(cosine.item<double>() > 0.99);
}

TEST_CASE("A sampled T5 repeats by the seed", "[t5]") {
  auto model = load(false);
  const auto source = ids(2, 5);
  const auto options =
      GenerationOptions().max_new_tokens(12).do_sample(true).top_p(0.9);
  const auto write = [&](uint64_t s) {
    seed(s);
    return peft::models::generate(model, source, {}, options);
  };
  CHECK(torch::equal(write(1), write(1)));
  CHECK_FALSE(torch::equal(write(1), write(2)));
  CHECK(write(1).select(1, 0).eq(0).all().item<bool>());
}

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ Call sites ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

namespace {

using call_sites::Hung;
using call_sites::Picker;
using call_sites::Prefix;
using call_sites::Prompt;

/// The decoder's hidden states, one token a step.
Tensor step_by_step(
    T5ForConditionalGeneration& model,
    const peft::models::T5StackOutput& encoded,
    const Tensor& written) {
  T5Cache cache;
  std::vector<Tensor> steps;
  for (int64_t i = 0; i < written.size(1); ++i) {
    steps.push_back(
        model->decode(written.narrow(1, i, 1), encoded, {}, &cache));
  }
  return torch::cat(steps, 1);
}

} // namespace

TEST_CASE("A prompt stands for the tokens whose embeddings it holds", "[t5]") {
  auto model = load(true);
  torch::NoGradGuard no_grad;
  seed();
  const auto source = ids(2, 6);
  const auto written = ids(2, 5);
  // Both rows begin alike, as a prompt is the same for all.
  for (const auto& t : {source, written}) {
    t.narrow(1, 0, 2).copy_(t.narrow(0, 0, 1).narrow(1, 0, 2).clone());
  }
  const auto mask = torch::tensor({{1, 1, 1, 1, 1, 1}, {1, 1, 0, 0, 1, 1}});
  const auto embed = [&](const Tensor& t) {
    return std::make_shared<Prompt>(
        model->shared->forward(t[0].narrow(0, 0, 2)));
  };
  const auto whole = model->encode(source, mask);
  const auto want = model->decode(written, whole);

  const Hung front(model->encoder->extra_tokens, embed(source));
  const auto rest = model->encode(source.narrow(1, 2, 4), mask.narrow(1, 2, 4));
  CHECK(agrees(rest.hidden, whole.hidden));
  CHECK(torch::equal(rest.attention_mask, mask));
  CHECK(agrees(model->decode(written, rest), want));

  const Hung back(model->decoder->extra_tokens, embed(written));
  const auto own = written.narrow(1, 2, 3);
  CHECK(agrees(model->decode(own, rest), want));
  CHECK(agrees(
      model->decode(own, rest, torch::ones({2, 3}, torch::kLong)), want));
  CHECK(agrees(step_by_step(model, rest, own), want));
}

TEST_CASE("A prefix stands for the tokens whose keys it holds", "[t5]") {
  auto model = load(false);
  torch::NoGradGuard no_grad;
  seed();
  const auto source = ids(1, 6);
  const auto written = ids(1, 5);
  const auto encoded = model->encode(source);
  T5Cache cache;
  const auto want = model->decode(written, encoded, {}, &cache);

  SECTION("in the decoder's own attention") {
    const Hung hung(
        model->decoder->extra_tokens,
        std::make_shared<Prefix>(cache.self_attention, 2));
    const auto own = written.narrow(1, 2, 3);
    CHECK(agrees(model->decode(own, encoded), want.narrow(1, 2, 3)));
    CHECK(agrees(
        model->decode(own, encoded, torch::ones({1, 3})),
        want.narrow(1, 2, 3)));
    CHECK(agrees(step_by_step(model, encoded, own), want.narrow(1, 2, 3)));
  }
  SECTION("in its attention to the encoder") {
    const Hung hung(
        model->decoder->cross_extra_tokens,
        std::make_shared<Prefix>(cache.cross_attention, 2));
    auto rest = encoded;
    rest.hidden = encoded.hidden.narrow(1, 2, 4);
    CHECK(agrees(model->decode(written, rest), want));
    CHECK(agrees(step_by_step(model, rest, written), want));
    rest.attention_mask = torch::tensor({{1, 1, 1, 1}});
    CHECK(agrees(step_by_step(model, rest, written), want));
    rest.attention_mask = torch::tensor({{1, 0, 1, 1}});
    const auto masked = model->decode(written, rest);
    CHECK_FALSE(agrees(masked, want));
    CHECK(agrees(step_by_step(model, rest, written), masked));
  }
  SECTION("in the encoder") {
    // No cache gives an encoder's keys; here they are made by hand.
    LayerCall call;
    call.hidden = call.context = model->shared->forward(source);
    T5Source self;
    self.mask = model->encoder->block[0]
                    ->as<T5BlockImpl>()
                    ->self_attention()
                    .SelfAttention->position_bias(0, 6);
    KeyValues keys;
    for (size_t i = 0; i < 2; ++i) {
      auto& block = *model->encoder->block[i]->as<T5BlockImpl>();
      const auto normed =
          block.self_attention().layer_norm->forward(call.hidden);
      const auto split = [](const Tensor& t) {
        return t.unflatten(-1, {4, 6}).transpose(1, 2);
      };
      auto& attention = *block.self_attention().SelfAttention;
      keys.update(
          i,
          split(attention.k->forward(normed)),
          split(attention.v->forward(normed)));
      call.hidden = call.context = block.forward(call, self, {}, i);
    }
    const Hung hung(
        model->encoder->extra_tokens, std::make_shared<Prefix>(keys, 2));
    for (const auto& mask : {Tensor(), torch::ones({1, 4})}) {
      const auto rest = model->encode(source.narrow(1, 2, 4), mask);
      CHECK(agrees(rest.hidden, encoded.hidden.narrow(1, 2, 4)));
      // The decoder reads the tokens, not what the encoder has in front.
      CHECK(rest.attention_mask.defined() == mask.defined());
      CHECK((!mask.defined() || torch::equal(rest.attention_mask, mask)));
    }
  }
}

TEST_CASE("A layer of T5 without the others' prefix sees tokens only", "[t5]") {
  auto model = load(false);
  torch::NoGradGuard no_grad;
  seed();
  auto& block = *model->encoder->block[0]->as<T5BlockImpl>();
  LayerCall call;
  call.hidden = call.context = torch::randn({1, 4, 16});
  T5Source self;
  self.mask = block.self_attention().SelfAttention->position_bias(2, 4);
  KeyValues elsewhere;
  self.cache = &elsewhere;
  const auto got = block.forward(call, self, {}, 0);
  self.mask = block.self_attention().SelfAttention->position_bias(0, 4);
  self.cache = nullptr;
  CHECK(agrees(got, block.forward(call, self, {}, 0)));
}

TEST_CASE("T5's layers take picked tokens as they stand in the whole", "[t5]") {
  auto model = load(true);
  torch::NoGradGuard no_grad;
  seed();
  const auto source = ids(2, 7);
  const auto mask =
      torch::tensor({{1, 1, 1, 1, 1, 1, 1}, {0, 0, 1, 1, 1, 1, 1}});
  T5Cache cache;
  model->decode(source, model->encode(source), {}, &cache);
  const auto picker = std::make_shared<Picker>(
      torch::tensor({{0, 3, 6}, {2, 4, 5}}, torch::kLong));
  const Hung front(model->encoder->layer_loop, picker);
  const Hung back(model->decoder->layer_loop, picker);
  const auto encoded = model->encode(source, mask);
  model->decode(source, encoded, mask);
  CHECK(picker->found.size() == 4);

  const auto prefix = std::make_shared<Prefix>(cache.self_attention, 2);
  const Hung front_prefix(model->encoder->extra_tokens, prefix);
  const Hung back_prefix(model->decoder->extra_tokens, prefix);
  model->decode(source, model->encode(source, mask), mask);
  REQUIRE(picker->found.size() == 8);
  for (const auto& comparison : picker->found) {
    CHECK(comparison);
  }
}

namespace {

/// A ladder of narrow blocks beside the layers: each reads the one before it
/// and half of what its layer gave.
struct Ladder : call_sites::Unsaved<peft::LoopDelta> {
  explicit Ladder(const peft::LayerLoopOptions& options) {
    for (int64_t i = 0; i < options.num_layers(); ++i) {
      blocks.push_back(options.side_block()(i, 2));
      blocks.back()->eval();
    }
    norm = options.side_norm()(2);
  }

  bool answers() const override {
    return true;
  }
  peft::LayerLoopOutput answer(
      const std::vector<Tensor>& states,
      const peft::LayerLoopRun& loop,
      double /*scale*/) const override {
    LayerCall call;
    call.side = true;
    call.hidden = states[0].narrow(-1, 0, 8);
    for (size_t i = 0; i < blocks.size(); ++i) {
      call.layer = static_cast<int64_t>(i);
      call.hidden = call.hidden + states[i + 1].narrow(-1, 0, 8);
      call.context = call.hidden;
      call.hidden = loop.run(*blocks[i], call);
    }
    const auto side = norm.forward(call.hidden);
    return {at::cat({side, side}, -1), side};
  }

  std::vector<std::shared_ptr<torch::nn::Module>> blocks;
  mutable torch::nn::AnyModule norm;
};

} // namespace

TEST_CASE("T5 has room for a side network", "[t5]") {
  auto model = load(true);
  seed();
  const auto source = ids(2, 5);
  const auto mask = torch::tensor({{1, 1, 1, 1, 1}, {0, 0, 1, 1, 1}});
  const auto written = ids(2, 6);
  const auto front =
      std::make_shared<Ladder>(model->encoder->layer_loop->options);
  const auto back =
      std::make_shared<Ladder>(model->decoder->layer_loop->options);
  const auto plain = model->encode(source, mask);

  const Hung second(model->decoder->layer_loop, back);
  CHECK(contains(
      error_of([&] { model->decode(written, plain); }),
      "reads that of the encoder, which has none"));
  const Hung first(model->encoder->layer_loop, front);
  const auto encoded = model->encode(source, mask);
  REQUIRE(encoded.side.sizes() == c10::IntArrayRef({2, 5, 8}));
  const auto hidden = model->decode(written, encoded);
  CHECK(agrees(step_by_step(model, encoded, written), hidden));

  // Its blocks train, with the first one's table; the network's do not.
  hidden.square().sum().backward();
  for (const auto& side : {front, back}) {
    for (const auto& block : side->blocks) {
      for (const auto& item : block->named_parameters()) {
        INFO(item.key());
        CHECK(item.value().grad().defined());
      }
    }
    CHECK(side->blocks[0]->named_parameters().contains(
        "layer.0.SelfAttention.relative_attention_bias.weight"));
    CHECK_FALSE(side->blocks[1]->named_parameters().contains(
        "layer.0.SelfAttention.relative_attention_bias.weight"));
  }
  for (const auto& item : model->named_parameters()) {
    INFO(item.key());
    CHECK_FALSE(item.value().grad().defined());
  }

  // A prefix is the layers' own: the side network has none.
  torch::NoGradGuard no_grad;
  T5Cache cache;
  model->decode(written, encoded, {}, &cache);
  const Hung prefix(
      model->decoder->extra_tokens,
      std::make_shared<Prefix>(cache.self_attention, 2));
  const auto prefixed = model->decode(written, encoded);
  CHECK(agrees(step_by_step(model, encoded, written), prefixed));
}

TEST_CASE("T5's blocks are normalised as they begin", "[t5]") {
  auto model = load(false);
  const auto& options = model->decoder->layer_loop->options;
  CHECK(options.causal());
  CHECK_FALSE(model->encoder->layer_loop->options.causal());
  seed();
  const auto x = torch::randn({2, 3, 16});
  auto& block = *model->decoder->block[1];
  CHECK(equal_bits(
      options.input_norm()(block, x),
      block.as<T5BlockImpl>()->self_attention().layer_norm->forward(x)));
  CHECK_FALSE(equal_bits(options.input_norm()(block, x), x));
}

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ Refusals
// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

TEST_CASE("Sizes that make no T5 are named", "[t5]") {
  const auto error = [](const T5Options& options) {
    return error_of([&] { T5Model{options}; });
  };
  CHECK(contains(error(tiny().d_kv(0)), "d_kv must be positive, got 0"));
  CHECK(contains(error(tiny().vocab_size(-1)), "vocab_size must be positive"));
  CHECK(contains(
      error(tiny().num_decoder_layers(0)),
      "num_decoder_layers must be positive, got 0"));
  CHECK(contains(
      error(tiny().feed_forward_proj("gelu")),
      "must be \"relu\" or \"gated-gelu\", got \"gelu\""));
  CHECK(contains(
      error(tiny().relative_attention_num_buckets(2)), "got 2 and 12"));
  CHECK(contains(
      error(tiny().relative_attention_max_distance(4)), "got 8 and 4"));
  CHECK(contains(error(tiny().pad_token_id(48)), "vocabulary of 48, got 48"));
  CHECK(contains(
      error(tiny().decoder_start_token_id(-1)), "vocabulary of 48, got -1"));
  CHECK(contains(
      error_of([] { tiny().reduced(4); }),
      "must divide d_model (16), d_kv (6) and d_ff (24), got 4"));
  CHECK(contains(error_of([] { tiny().reduced(0); }), "got 0"));
}

TEST_CASE("Inputs that do not fit T5 are named", "[t5]") {
  auto model = load(false);
  const auto source = ids(2, 5);
  const auto written = ids(2, 4);
  CHECK(contains(
      error_of([&] { model->encode(source[0]); }), "[batch, length], got [5]"));
  CHECK(contains(
      error_of([&] {
        model->encode(source, torch::ones({2, 4}));
      }),
      "[2, 5], got [2, 4]"));
  CHECK(contains(
      error_of([&] { model->forward(source, {}, ids(3, 4)); }),
      "the decoder has 3 rows and the encoder 2"));
  CHECK(contains(
      error_of([&] { model->decode(written, {}); }),
      "decoder takes what its encoder gave"));
  const auto encoded = model->encode(source);
  CHECK(contains(
      error_of([&] { model->encoder->forward(source, {}, encoded); }),
      "the encoder takes neither that nor a cache"));
  T5Cache cache;
  CHECK(contains(
      error_of([&] { model->encoder->forward(source, {}, {}, &cache); }),
      "the encoder takes neither that nor a cache"));
  model->decode(written, encoded, {}, &cache);
  CHECK(contains(
      error_of([&] {
        model->decode(written, encoded, torch::ones({2, 4}), &cache);
      }),
      "4 cached and 4 new tokens, [2, 8], got [2, 4]"));
  CHECK(contains(
      error_of([&] { model->shift_right(torch::ones({3}, torch::kLong)); }),
      "labels must have the shape [batch, length], got [3]"));
  CHECK(contains(
      error_of([&] {
        peft::models::generate(
            model, source, {}, GenerationOptions().max_new_tokens(0));
      }),
      "max_new_tokens must be positive"));
}

} // namespace test_t5
