// Numbers of trainable parameters in networks of published sizes, as integers:
// against HF PEFT (golden/make_counts.py) and the formulas of the papers.

#include "meta_device.h"
#include "test.h"

#include <peft/io/json.h>
#include <peft/models/bert.h>
#include <peft/models/llama.h>
#include <peft/models/t5.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace test_counts {

namespace {

namespace models = peft::models;

/// A network of a published size; d its width, f its feed-forward's, L layers
/// in all stacks.
struct Sized {
  std::string name;
  std::function<std::shared_ptr<torch::nn::Module>()> make;
  int64_t L, d, f;
  int64_t norms; // LayerNorms with a bias
};

models::BertOptions bert_large() {
  return models::BertOptions()
      .hidden_size(1024)
      .num_hidden_layers(24)
      .num_attention_heads(16)
      .intermediate_size(4096);
}

models::BertOptions roberta_base() {
  return models::BertOptions()
      .vocab_size(50265)
      .max_position_embeddings(514)
      .type_vocab_size(1)
      .pad_token_id(1)
      .roberta_positions(true);
}

template <class Impl, class Options>
std::function<std::shared_ptr<torch::nn::Module>()> maker(Options options) {
  return [options] { return std::make_shared<Impl>(options); };
}

std::vector<Sized> berts() {
  using models::BertModelImpl;
  return {
      {"bert-base",
       maker<BertModelImpl>(models::BertOptions()),
       12,
       768,
       3072,
       25},
      {"bert-large", maker<BertModelImpl>(bert_large()), 24, 1024, 4096, 49},
      {"roberta-base",
       maker<BertModelImpl>(roberta_base()),
       12,
       768,
       3072,
       25}};
}

std::vector<Sized> t5s() {
  using models::T5ForConditionalGenerationImpl;
  const auto base = models::T5Options()
                        .d_model(768)
                        .d_kv(64)
                        .d_ff(3072)
                        .num_layers(12)
                        .num_heads(12);
  const auto large = models::T5Options()
                         .d_model(1024)
                         .d_kv(64)
                         .d_ff(4096)
                         .num_layers(24)
                         .num_heads(16);
  return {
      {"t5-base",
       maker<T5ForConditionalGenerationImpl>(base),
       24,
       768,
       3072,
       0},
      {"t5-large",
       maker<T5ForConditionalGenerationImpl>(large),
       48,
       1024,
       4096,
       0}};
}

Sized llama() {
  return {
      "llama-7b",
      maker<models::LlamaForCausalLMImpl>(models::LlamaOptions()),
      32,
      4096,
      11008,
      0};
}

std::vector<Sized> all() {
  auto result = berts();
  for (auto& each : t5s()) {
    result.push_back(each);
  }
  result.push_back(llama());
  return result;
}

/// What `options` train on the network, which has no data.
template <class Options>
int64_t count(const Sized& size, const Options& options) {
  const MetaDevice meta;
  const auto network = size.make();
  return peft::attach(*network, options).num_parameters();
}

/// 2 d r + r + d: the weights and biases of a bottleneck.
int64_t bottleneck(int64_t d, int64_t r) {
  return 2 * d * r + r + d;
}

} // namespace

TEST_CASE("Counts are HF PEFT's", "[counts]") {
  const auto table = peft::detail::read_json(golden("counts/peft.json"));
  for (const auto& size : all()) {
    INFO(size.name);
    const auto& row = table.at(size.name);
    std::shared_ptr<torch::nn::Module> network;
    {
      const MetaDevice meta;
      network = size.make();
    }
    CHECK(peft::count_parameters(*network).total == row.at("base"));
    CHECK(count(size, peft::LoraOptions(8)) == row.at("lora"));
    if (row.contains("ia3")) {
      CHECK(count(size, peft::Ia3Options()) == row.at("ia3"));
    }
    // PEFT's file of a prompt for an encoder-decoder has a second half, which
    // counts as trainable there and which nothing reads.
    const bool two_stacks = size.name.rfind("t5", 0) == 0;
    const int64_t stored = row.at("prompt").get<int64_t>();
    CHECK(
        count(size, peft::PromptOptions(20)) ==
        20 * size.d * (two_stacks ? 2 : 1));
    CHECK(stored == 20 * size.d * (two_stacks ? 2 : 1));
    CHECK(
        count(size, peft::PTuningOptions(20).encoder_hidden_size(128)) ==
        row.at("p_tuning"));
    CHECK(count(size, peft::PrefixOptions(20)) == row.at("prefix"));
    CHECK(
        count(
            size,
            peft::PrefixOptions(20).prefix_projection(true).encoder_hidden_size(
                512)) == row.at("prefix_projection"));
  }
}

TEST_CASE("Counts are those of the papers' formulas", "[counts]") {
  for (const auto& size : all()) {
    INFO(size.name);
    const auto [name, make, L, d, f, norms] = size;
    const bool is_encoder = norms > 0;
    CHECK(
        count(size, peft::PfeifferOptions().reduction_factor(16)) ==
        L * bottleneck(d, d / 16));
    CHECK(
        count(size, peft::ParallelAdapterOptions(512)) ==
        L * bottleneck(d, 512));
    CHECK(
        count(size, peft::HoulsbyOptions(64).train_layer_norms(false)) ==
        2 * L * bottleneck(d, 64));
    if (is_encoder) {
      CHECK(
          count(size, peft::HoulsbyOptions(64)) ==
          2 * L * bottleneck(d, 64) + norms * 2 * d);
      // l_k, l_v and l_ff
      CHECK(count(size, peft::Ia3Options()) == L * (d + d + f));
      CHECK(
          count(size, peft::CodaOptions(8).bottleneck(64)) ==
          L * (bottleneck(d, 64) + d));
      // per layer 11 d with f = 4 d; the embeddings' norm and the pooler
      CHECK(count(size, peft::BitFitOptions()) == L * 11 * d + 2 * d);
      CHECK(
          count(size, peft::BitFitOptions().biases({"query_intermediate"})) ==
          L * (d + f));
    }
  }
}

TEST_CASE("Published counts", "[counts]") {
  // Hu et al. 2021, table 2: RoBERTa-base 0.3M, RoBERTa-large 0.8M at r = 8.
  CHECK(count(berts()[2], peft::LoraOptions(8)) == 294912);
  CHECK(count(berts()[1], peft::LoraOptions(8)) == 786432);
  // A prefix of 20 tokens in LLaMA-7B: 2 * 32 * 20 * 4096.
  CHECK(count(llama(), peft::PrefixOptions(20)) == 5242880);
  CHECK(count(llama(), peft::LoraOptions(8)) == 4194304);
}

TEST_CASE("A ladder's count follows from its shapes", "[counts]") {
  for (const auto& size : berts()) {
    INFO(size.name);
    const int64_t d = size.d / 8, f = size.f / 8;
    const int64_t block =
        4 * (d * d + d) + 2 * d + (d * f + f) + (f * d + d) + 2 * d;
    const int64_t down = size.d * d + d;
    // a gate and a down for each layer, one down for the input, one up
    CHECK(
        count(size, peft::LadderOptions(8).init("random")) ==
        size.L * (block + down + 1) + down + (d * size.d + size.d));
  }
}

} // namespace test_counts
