// The BERT and RoBERTa encoders against what transformers computes
// (golden/make_bert.py).

#include "test.h"

#include <peft/io/base_weights.h>
#include <peft/io/safetensors.h>
#include <peft/models/bert.h>

#include <map>

namespace test_bert {

namespace {

using peft::models::BertForSequenceClassification;
using peft::models::BertModel;
using peft::models::BertOptions;
using peft::models::Pooling;

BertOptions tiny() {
  return BertOptions()
      .vocab_size(40)
      .hidden_size(16)
      .num_hidden_layers(2)
      .num_attention_heads(4)
      .intermediate_size(32)
      .max_position_embeddings(24);
}

std::map<std::string, torch::Tensor> expected(const std::string& name) {
  return peft::load_safetensors(
      golden("bert/" + name + "_expected.safetensors"));
}

/// What transformers computed, to the rounding of another order of the sums.
Comparison agrees(const torch::Tensor& ours, const torch::Tensor& theirs) {
  return close(ours, theirs, 1e-5, 1e-5);
}

/// Shows on the terminal which test had nothing to compare with.
bool has_minilm() {
  if (std::string(PEFT_TEST_MINILM).empty()) {
    WARN("skipped: the MiniLM weights are not on this machine");
    return false;
  }
  return true;
}

} // namespace

TEST_CASE("BERT computes what transformers computes", "[bert]") {
  BertModel model(tiny());
  peft::load_base(*model, golden("bert/tiny_bert.safetensors"));
  model->eval();
  auto want = expected("tiny_bert");
  const auto ids = want["input_ids"];
  const auto mask = want["attention_mask"];

  const auto hidden = model->forward(ids, mask);
  REQUIRE(agrees(hidden, want["hidden"]));
  REQUIRE(agrees(model->pooler->forward(hidden), want["pooled"]));
  REQUIRE(agrees(
      model->forward(ids, mask, want["token_type_ids"]), want["hidden_typed"]));
  REQUIRE(agrees(model->forward(ids), want["hidden_unmasked"]));
  // The two differ, or the mask would prove nothing.
  REQUIRE_FALSE(agrees(want["hidden"], want["hidden_unmasked"]));
}

TEST_CASE("RoBERTa's positions count from the padding id", "[bert]") {
  const auto options = tiny()
                           .type_vocab_size(1)
                           .pad_token_id(1)
                           .layer_norm_eps(1e-5)
                           .roberta_positions(true)
                           .add_pooling_layer(false);
  BertModel model(options);
  peft::load_base(*model, golden("bert/tiny_roberta.safetensors"));
  model->eval();
  auto want = expected("tiny_roberta");
  const auto ids = want["input_ids"];
  REQUIRE(agrees(model->forward(ids, want["attention_mask"]), want["hidden"]));

  const auto positions = model->embeddings->position_ids(ids);
  REQUIRE(torch::equal(
      positions[1], torch::tensor({2, 3, 4, 5, 6, 1, 1, 1, 1}, torch::kLong)));
}

TEST_CASE(
    "A classifier's logits, loss and gradients are transformers'",
    "[bert]") {
  BertForSequenceClassification model(
      tiny().num_labels(3).hidden_dropout_prob(0).attention_probs_dropout_prob(
          0));
  peft::load_base(*model, golden("bert/tiny_classifier.safetensors"));
  model->train();
  auto want = expected("tiny_classifier");
  const auto logits = model->forward(want["input_ids"], want["attention_mask"]);
  REQUIRE(agrees(logits, want["logits"]));
  const auto loss =
      torch::nn::functional::cross_entropy(logits, want["labels"]);
  REQUIRE(agrees(loss, want["loss"]));
  loss.backward();
  const auto layer =
      model->bert->encoder->layer[0]->as<peft::models::BertLayer>();
  REQUIRE(
      agrees(layer->attention->self->query->weight.grad(), want["query_grad"]));
  REQUIRE(agrees(
      model->bert->embeddings->word_embeddings->weight.grad(),
      want["word_grad"]));
}

TEST_CASE("Padding changes no token's hidden state", "[bert]") {
  seed();
  BertForSequenceClassification model(tiny().pooling(Pooling::mean));
  model->eval();
  const auto row = torch::randint(4, 40, {1, 5}, torch::kLong);
  const auto padded = torch::constant_pad_nd(row, {0, 4}, 0);
  const auto mask = torch::constant_pad_nd(torch::ones({1, 5}), {0, 4}, 0);
  REQUIRE(agrees(
      model->bert->forward(padded, mask).narrow(1, 0, 5),
      model->bert->forward(row)));
  REQUIRE(agrees(model->forward(padded, mask), model->forward(row)));
  REQUIRE_FALSE(agrees(model->forward(padded), model->forward(row)));
}

TEST_CASE("Pooling takes the first token, the pooler or the mean", "[bert]") {
  seed();
  const auto ids = torch::randint(4, 40, {2, 6}, torch::kLong);
  const auto mask =
      torch::tensor({{1, 1, 1, 1, 1, 1}, {1, 1, 0, 0, 0, 0}}, torch::kLong);

  BertForSequenceClassification mean(tiny().pooling(Pooling::mean));
  mean->eval();
  const auto hidden = mean->bert->forward(ids, mask);
  const auto by_hand =
      torch::stack({hidden[0].mean(0), hidden[1].narrow(0, 0, 2).mean(0)});
  REQUIRE(agrees(mean->features(ids, mask), by_hand));
  REQUIRE(mean->bert->pooler.is_empty());

  BertForSequenceClassification first(tiny().pooling(Pooling::cls));
  first->eval();
  REQUIRE(equal_bits(
      first->features(ids, mask),
      first->bert->forward(ids, mask).select(1, 0)));

  BertForSequenceClassification pooler(tiny());
  pooler->eval();
  const auto pooled =
      pooler->bert->pooler->forward(pooler->bert->forward(ids, mask));
  REQUIRE(equal_bits(pooler->features(ids, mask), pooled));
}

TEST_CASE("Sizes give the published parameter count", "[bert]") {
  const auto options =
      BertOptions().hidden_size(384).num_hidden_layers(6).intermediate_size(
          1536);
  BertModel minilm(options);
  int64_t count = 0;
  for (const auto& parameter : minilm->parameters()) {
    count += parameter.numel();
  }
  REQUIRE(count == 22'713'216);
}

TEST_CASE(
    "Dropout acts in training only and a clone is a network of its own",
    "[bert]") {
  seed();
  BertForSequenceClassification model(tiny().hidden_dropout_prob(0.5));
  const auto ids = torch::randint(4, 40, {2, 6}, torch::kLong);
  model->train();
  REQUIRE_FALSE(equal_bits(model->forward(ids), model->forward(ids)));
  model->eval();
  const auto before = model->forward(ids);
  REQUIRE(equal_bits(before, model->forward(ids)));

  auto copy = std::dynamic_pointer_cast<
      peft::models::BertForSequenceClassificationImpl>(model->clone());
  copy->eval();
  REQUIRE(equal_bits(copy->forward(ids), before));
  torch::NoGradGuard no_grad;
  copy->classifier->weight.zero_();
  REQUIRE(equal_bits(model->forward(ids), before));
}

TEST_CASE("Every parameter takes part in training", "[bert]") {
  seed();
  BertForSequenceClassification model(tiny());
  model->forward(torch::randint(4, 40, {2, 6}, torch::kLong)).sum().backward();
  for (const auto& item : model->named_parameters()) {
    INFO(item.key());
    REQUIRE(item.value().grad().defined());
  }
}

TEST_CASE("Inputs that do not fit are named", "[bert]") {
  BertModel model(tiny());
  const auto ids = torch::ones({2, 6}, torch::kLong);
  CHECK(contains(error_of([&] { model->forward(ids[0]); }), "[batch, length]"));
  CHECK(contains(
      error_of([&] {
        model->forward(torch::ones({1, 25}, torch::kLong));
      }),
      "25 tokens is longer than the 24 positions"));
  CHECK(contains(
      error_of([&] {
        model->forward(ids, torch::ones({2, 5}));
      }),
      "[2, 5]"));
  CHECK(contains(
      error_of([] { BertModel(tiny().num_attention_heads(3)); }),
      "multiple of num_attention_heads (3)"));
  BertModel roberta(tiny().roberta_positions(true).pad_token_id(1));
  CHECK(contains(
      error_of([&] {
        roberta->forward(torch::ones({1, 23}, torch::kLong));
      }),
      "22 positions"));
}

TEST_CASE("The real MiniLM gives transformers' embeddings", "[bert]") {
  if (!has_minilm()) {
    return;
  }
  BertForSequenceClassification model(BertOptions()
                                          .hidden_size(384)
                                          .num_hidden_layers(6)
                                          .intermediate_size(1536)
                                          .pooling(Pooling::mean));
  const auto report = peft::load_base(
      *model->bert,
      std::string(PEFT_TEST_MINILM) + "/model.safetensors",
      peft::BaseWeightsOptions().ignore_extra({"position_ids", "pooler\\..*"}));
  REQUIRE(report.loaded.size() == 101);
  REQUIRE(report.missing.empty());
  model->eval();
  torch::NoGradGuard no_grad;
  auto want = expected("minilm");
  REQUIRE(agrees(
      model->features(want["input_ids"], want["attention_mask"]),
      want["embedding"]));
}

} // namespace test_bert
