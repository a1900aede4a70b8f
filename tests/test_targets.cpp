/// Which modules and parameters a target means, and what is said when it means
/// nothing.

#include "adapted.h"
#include "model_state.h"
#include "networks.h"
#include "test.h"

#include <peft/models/bert.h>

#include <string>
#include <vector>

namespace test_targets {

namespace {

using peft::LoraOptions;
using peft::Targets;
using Names = std::vector<std::string>;

peft::models::BertForSequenceClassification small_bert() {
  return peft::models::BertForSequenceClassification(
      peft::models::BertOptions()
          .vocab_size(20)
          .hidden_size(8)
          .num_hidden_layers(2)
          .num_attention_heads(2)
          .intermediate_size(16)
          .max_position_embeddings(8));
}

/// The parameters that the options adapt, in the order of the network.
Names adapted_by(torch::nn::Module& model, const LoraOptions& options) {
  Names result;
  auto adapter = peft::attach(model, options);
  for (const auto& site : adapter.sites()) {
    REQUIRE(site.parameters.size() == 1);
    result.push_back(site.parameters[0]);
  }
  adapter.detach();
  return result;
}

/// "bert.encoder.layer.<i>.<name>.weight" for the given layers and names.
Names in_layers(const std::vector<int>& layers, const Names& names) {
  Names result;
  for (const int i : layers) {
    for (const auto& name : names) {
      result.push_back(
          "bert.encoder.layer." + std::to_string(i) + "." + name + ".weight");
    }
  }
  return result;
}

const std::string kQuery = "attention.self.query";
const std::string kKey = "attention.self.key";
const std::string kValue = "attention.self.value";
const std::string kAttentionOut = "attention.output.dense";

} // namespace

TEST_CASE("a name in a list means itself and every suffix after a dot") {
  struct Row {
    std::string name, target;
    bool matches;
  };
  const std::vector<Row> rows{
      {"encoder.layer.0.query", "query", true},
      {"encoder.layer.0.query", "0.query", true},
      {"encoder.layer.0.query", "encoder.layer.0.query", true},
      {"query", "query", true},
      {"", "", true},
      {"encoder.layer.0.query", "", false}, // only the root is named ""
      {"encoder.layer.0.query", "uery", false},
      {"encoder.layer.0.query", "layer", false},
      {"encoder.layer.0.query", ".query", false},
      {"encoder.layer.0.query", "layer.0", false},
      {"encoder.layer.0.my_query", "query", false},
      {"encoder.layer.10.query", "0.query", false},
      {"query", "layer.query", false},
      {"query", "Query", false}};
  for (const auto& row : rows) {
    INFO("'" << row.target << "' in '" << row.name << "'");
    CHECK(Targets::name_matches(row.name, row.target) == row.matches);
  }
}

TEST_CASE("targets are written as a user writes them") {
  const std::string one = "query", two = "value";
  CHECK(Targets("query").names() == Names{"query"});
  CHECK(Targets(one).names() == Names{"query"});
  CHECK(Targets({"query"}).names() == Names{"query"});
  CHECK(Targets({"query", "value"}).names() == Names{"query", "value"});
  CHECK(Targets({"q", "k", "v"}).names() == Names{"q", "k", "v"});
  CHECK(Targets({one, two}).names() == Names{"query", "value"});
  CHECK(Targets(Names{one, two}).names() == Names{"query", "value"});
  CHECK(Targets("all-linear").kind() == Targets::Kind::all_linear);
  CHECK(Targets().empty());
  CHECK(Targets(Names{}).empty());
  CHECK_FALSE(Targets("").empty()); // the root
  CHECK_FALSE(Targets::all_linear().empty());

  // The setters take all of these without naming the class.
  CHECK(LoraOptions().targets("a").targets().names() == Names{"a"});
  CHECK(LoraOptions().targets({"a", "b"}).targets().names() == Names{"a", "b"});
  CHECK(LoraOptions().exclude({"a", "b"}).exclude().names() == Names{"a", "b"});
  CHECK(
      LoraOptions().modules_to_save({"a", "b"}).modules_to_save() ==
      Names{"a", "b"});
}

TEST_CASE("what each kind of target means on BERT") {
  auto model = small_bert();
  const Names linear{
      kQuery,
      kKey,
      kValue,
      kAttentionOut,
      "intermediate.dense",
      "output.dense"};
  Names all = in_layers({0, 1}, linear);
  all.push_back("bert.pooler.dense.weight");
  all.push_back("classifier.weight");
  Names with_head = all; // the head's trained copies come last
  with_head.push_back("classifier.bias");

  struct Row {
    std::string name;
    LoraOptions options;
    Names expected;
  };
  const auto is_wide = [](const std::string& name, const torch::nn::Module& m) {
    const auto* layer = m.as<torch::nn::LinearImpl>();
    return layer != nullptr && layer->options.out_features() == 16 &&
        name.find("layer.1") != std::string::npos;
  };
  const std::vector<Row> rows{
      {"default: query and value",
       LoraOptions(),
       in_layers({0, 1}, {kQuery, kValue})},
      {"a list",
       LoraOptions().targets({"query", "key"}),
       in_layers({0, 1}, {kQuery, kKey})},
      {"the order of a list does not matter, nor does naming twice",
       LoraOptions().targets({"key", "query", "self.key"}),
       in_layers({0, 1}, {kQuery, kKey})},
      {"a suffix that two modules share",
       LoraOptions().targets({"output.dense"}),
       in_layers({0, 1}, {kAttentionOut, "output.dense"})},
      {"a longer suffix",
       LoraOptions().targets({"attention.output.dense"}),
       in_layers({0, 1}, {kAttentionOut})},
      {"a whole name",
       LoraOptions().targets({"bert.encoder.layer.1.attention.self.key"}),
       in_layers({1}, {kKey})},
      {"a parameter's name",
       LoraOptions().targets({"query.weight", "classifier.weight"}),
       {"bert.encoder.layer.0.attention.self.query.weight",
        "bert.encoder.layer.1.attention.self.query.weight",
        "classifier.weight"}},
      {"an embedding",
       LoraOptions().targets({"word_embeddings"}),
       {"bert.embeddings.word_embeddings.weight"}},
      {"a regex is matched in full",
       LoraOptions().targets(Targets::regex(".*\\.layer\\.1\\..*(query|key)")),
       in_layers({1}, {kQuery, kKey})},
      {"a regex on a parameter",
       LoraOptions().targets(Targets::regex("classifier\\.wei.*")),
       {"classifier.weight"}},
      {"every linear layer", LoraOptions().targets(Targets::all_linear()), all},
      {"HF's word for it", LoraOptions().targets("all-linear"), all},
      {"a function",
       LoraOptions().targets(Targets::where(is_wide)),
       in_layers({1}, {"intermediate.dense"})},
      {"without a list",
       LoraOptions()
           .targets(Targets::all_linear())
           .exclude({"dense", "key", "classifier"}),
       in_layers({0, 1}, {kQuery, kValue})},
      {"without a regex",
       LoraOptions()
           .targets({"query", "value"})
           .exclude(Targets::regex(".*layer\\.0\\..*")),
       in_layers({1}, {kQuery, kValue})},
      {"the default without some",
       LoraOptions().exclude({"value"}),
       in_layers({0, 1}, {kQuery})},
      {"the default, some layers",
       LoraOptions().layers({1}),
       in_layers({1}, {kQuery, kValue})},
      {"some layers",
       LoraOptions().targets({"query"}).layers({0}),
       in_layers({0}, {kQuery})},
      {"some layers: what is in no layer is left out",
       LoraOptions().targets(Targets::all_linear()).layers({1}),
       in_layers({1}, linear)},
      {"some layers: but a whole name is meant",
       LoraOptions().targets({"query", "classifier"}).layers({1}),
       {"bert.encoder.layer.1.attention.self.query.weight",
        "classifier.weight"}},
      {"a trained head is no target",
       LoraOptions().targets("all-linear").modules_to_save({"classifier"}),
       with_head}};
  for (const auto& row : rows) {
    INFO(row.name);
    CHECK(adapted_by(*model, row.options) == row.expected);
  }
}

TEST_CASE("layers_pattern names the stack that is numbered") {
  networks::Stack stack;
  const auto names = [&](std::vector<int64_t> layers, const Names& pattern) {
    return adapted_by(
        stack,
        LoraOptions().targets({"query"}).layers(layers).layers_pattern(
            pattern));
  };
  CHECK(
      names({1, 2}, {"layer"}) ==
      Names{"encoder.layer.1.query.weight", "encoder.layer.2.query.weight"});
  CHECK(names({1}, {"block"}) == Names{"decoder.block.1.query.weight"});
  CHECK(
      names({1, 2}, {"layer", "block"}) ==
      Names{
          "encoder.layer.1.query.weight",
          "encoder.layer.2.query.weight",
          "decoder.block.1.query.weight"});
}

TEST_CASE("rank_pattern and alpha_pattern, first match first") {
  auto model = small_bert();
  const auto options = LoraOptions(2)
                           .alpha(8)
                           .targets({"query", "key", "value", "classifier"})
                           .rank_pattern(
                               {{"layer\\.1\\.attention\\.self\\.query", 4},
                                {"query", 8},
                                {"self\\.(k.y)", 3}})
                           .alpha_pattern({{"^classifier", 5}, {"value", 6}});
  auto adapter = peft::attach(*model, options);
  struct Row {
    std::string name;
    int64_t r;
    double scaling;
  };
  const std::vector<Row> rows{
      {"bert.encoder.layer.0.attention.self.query", 8, 8. / 8},
      {"bert.encoder.layer.0.attention.self.key", 3, 8. / 3},
      {"bert.encoder.layer.0.attention.self.value", 2, 6. / 2},
      {"bert.encoder.layer.1.attention.self.query", 4, 8. / 4},
      {"bert.encoder.layer.1.attention.self.key", 3, 8. / 3},
      {"bert.encoder.layer.1.attention.self.value", 2, 6. / 2},
      {"classifier", 2, 5. / 2}};
  const auto sites = adapter.sites();
  REQUIRE(sites.size() == rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    INFO(rows[i].name);
    CHECK(sites[i].name == rows[i].name);
    CHECK(adapted::lora(adapter, i).r() == rows[i].r);
    CHECK(adapted::lora(adapter, i).config().scaling == rows[i].scaling);
    CHECK(sites[i].what == "lora r=" + std::to_string(rows[i].r));
  }
}

TEST_CASE("the root and single parameters") {
  SECTION("a bare layer has the name \"\"") {
    torch::nn::Linear linear(4, 3);
    for (const auto& targets :
         {Targets(""), Targets::all_linear(), Targets("weight")}) {
      auto adapter = peft::attach(*linear, LoraOptions(2).targets(targets));
      REQUIRE(adapter.sites().size() == 1);
      CHECK(adapter.sites()[0].name == "");
      CHECK(adapter.sites()[0].parameters == Names{"weight"});
      adapter.detach();
    }
  }
  SECTION("a recurrent layer has several weights") {
    torch::nn::LSTM lstm(torch::nn::LSTMOptions(4, 5).num_layers(2));
    CHECK(
        adapted_by(*lstm, LoraOptions(2).targets("")) ==
        Names{"weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"});
    CHECK(
        adapted_by(*lstm, LoraOptions(2).targets({"weight_hh_l1"})) ==
        Names{"weight_hh_l1"});
  }
  SECTION("packed attention") {
    networks::Attention model(false);
    CHECK(adapted_by(model, LoraOptions(2)) == Names{"attn.in_proj_weight"});
    CHECK(
        adapted_by(model, LoraOptions(2).targets("attn")) ==
        Names{"attn.in_proj_weight", "attn.out_proj.weight"});
    CHECK(
        adapted_by(model, LoraOptions(2).targets("in_proj_weight")) ==
        Names{"attn.in_proj_weight"});
    CHECK(
        adapted_by(model, LoraOptions(2).targets("out_proj")) ==
        Names{"attn.out_proj.weight"});
    CHECK(
        adapted_by(model, LoraOptions(2).targets(Targets::all_linear())) ==
        Names{"attn.in_proj_weight", "attn.out_proj.weight", "head.weight"});
    CHECK(
        adapted_by(
            model, LoraOptions(2).targets("attn").exclude({"out_proj"})) ==
        Names{"attn.in_proj_weight"});
  }
  SECTION("attention with separate projections") {
    torch::nn::MultiheadAttention attention(
        torch::nn::MultiheadAttentionOptions(8, 2).kdim(6).vdim(4));
    CHECK(
        adapted_by(*attention, LoraOptions(2)) ==
        Names{"q_proj_weight", "v_proj_weight"});
    CHECK(
        adapted_by(*attention, LoraOptions(2).targets("")) ==
        Names{
            "q_proj_weight",
            "k_proj_weight",
            "v_proj_weight",
            "out_proj.weight"});
    CHECK(
        adapted_by(*attention, LoraOptions(2).targets("k_proj_weight")) ==
        Names{"k_proj_weight"});
  }
}

TEST_CASE("a target that means nothing is an error that helps") {
  auto model = small_bert();
  torch::nn::Sequential nameless(torch::nn::Linear(3, 3), torch::nn::Tanh());
  torch::nn::Embedding renormed(
      torch::nn::EmbeddingOptions(5, 4).max_norm(1.0));
  const auto none = [](const std::string&, const torch::nn::Module&) {
    return false;
  };
  struct Row {
    std::string name;
    torch::nn::Module& model;
    LoraOptions options;
    Names parts; // of the message
  };
  const std::vector<Row> rows{
      {"a typing error",
       *model,
       LoraOptions().targets({"qeury", "value"}),
       {"targets entry 'qeury' matches nothing",
        "Did you mean 'query'",
        "Modules with weights",
        "'classifier'"}},
      {"a typing error in a long name",
       *model,
       LoraOptions().targets({"attention.self.quary"}),
       {"'attention.self.quary'", "'attention.self.query'"}},
      {"a name that is only the end of a word",
       *model,
       LoraOptions().targets({"uery"}),
       {"'uery' matches nothing", "'query'"}},
      {"one name of several",
       *model,
       LoraOptions().targets({"query", "wo"}),
       {"targets entry 'wo' matches nothing", "Modules with weights"}},
      {"a name to leave out",
       *model,
       LoraOptions().targets({"query"}).exclude({"valeu"}),
       {"exclude entry 'valeu' matches nothing", "'value'"}},
      {"a head that is not there",
       *model,
       LoraOptions().modules_to_save({"clasifier"}),
       {"modules_to_save entry 'clasifier'", "'classifier'"}},
      {"a regex that matches a part only",
       *model,
       LoraOptions().targets(Targets::regex("query")),
       {"match nothing that LoRA can adapt", "Modules with weights"}},
      {"a function that never agrees",
       *model,
       LoraOptions().targets(Targets::where(none)),
       {"match nothing that LoRA can adapt"}},
      {"everything left out",
       *model,
       LoraOptions().targets({"query"}).exclude({"query"}),
       {"match nothing that LoRA can adapt"}},
      {"a layer that there is not",
       *model,
       LoraOptions().targets({"query"}).layers({7}),
       {"match nothing that LoRA can adapt"}},
      {"a layer that there is not, beside one that there is",
       *model,
       LoraOptions().targets({"query"}).layers({0, 7}),
       {"layers names index 7, where nothing matches"}},
      {"a pattern for the end of a word",
       *model,
       LoraOptions().targets({"query"}).rank_pattern({{"uery", 3}}),
       {"the pattern 'uery'", "matches no adapted module", ".query'"}},
      {"a pattern for a module that is not adapted",
       *model,
       LoraOptions().targets({"query"}).alpha_pattern({{"value", 3}}),
       {"the pattern 'value'", "matches no adapted module"}},
      {"a choice of q, k, v where nothing is packed",
       *model,
       LoraOptions().targets({"query"}).enable_lora({true, false, true}),
       {"enable_lora chooses among q, k and v", "the targets meet none"}},
      {"no query and no value",
       *nameless,
       LoraOptions(),
       {"match nothing", "by default (query and value projections)", "'0'"}},
      {"a module without a weight",
       *nameless,
       LoraOptions().targets("1"),
       {"target '1' is a torch::nn::TanhImpl without a weight matrix"}},
      {"a module around the layers",
       *model,
       LoraOptions().targets({"self"}),
       {"without a weight matrix of its own",
        "Inside it are: 'bert.encoder.layer.0.attention.self.query'"}},
      {"a norm",
       *model,
       LoraOptions().targets({"LayerNorm"}),
       {"without a weight matrix of its own"}},
      {"a bias",
       *model,
       LoraOptions().targets({"classifier.bias"}),
       {"'classifier.bias' has 1 dimension(s)", "BitFit trains biases"}},
      {"an embedding that rewrites its weight",
       *renormed,
       LoraOptions().targets(""),
       {"cannot be adapted", "max_norm"}},
      {"its parameter",
       *renormed,
       LoraOptions().targets("weight"),
       {"'weight' cannot be adapted", "max_norm"}}};
  for (const auto& row : rows) {
    INFO(row.name);
    const auto before = state_of(row.model);
    const auto error = error_of([&] { peft::attach(row.model, row.options); });
    INFO(error);
    CHECK(contains(error, "peft: "));
    for (const auto& part : row.parts) {
      INFO(part);
      CHECK(contains(error, part));
    }
    CHECK(same_state(state_of(row.model), before));
  }
}

TEST_CASE("a pattern that is no regular expression is an error of ours") {
  torch::nn::Linear linear(4, 4);
  CHECK(contains(
      error_of([] { Targets::regex("(query"); }),
      "peft: '(query' in the targets is not a regular expression"));
  CHECK(contains(
      error_of([] { Targets::where(nullptr); }), "peft: Targets::where"));
  for (const auto& options :
       {LoraOptions(2).targets("").rank_pattern({{"(bad", 3}}),
        LoraOptions(2).targets("").alpha_pattern({{"(bad", 3}}),
        LoraOptions(2).targets("").layers({0}).layers_pattern({"(bad"})}) {
    const auto error = error_of([&] { peft::attach(*linear, options); });
    CHECK(contains(error, "peft: "));
    CHECK(contains(error, "(bad"));
  }
}

} // namespace test_targets
