/// LoRA: options, counts, initial values, dropout, what trains beside it.

#include "adapted.h"
#include "model_state.h"
#include "networks.h"
#include "test.h"

#include <c10/util/Exception.h>

#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace test_lora {

namespace {

using adapted::lora;
using peft::LoraOptions;
using peft::Targets;
using torch::Tensor;
using Names = std::vector<std::string>;
namespace F = torch::nn::functional;

Names trained_names(const peft::Adapter& adapter) {
  return adapter.named_parameters().keys();
}

/// GPT-2's Conv1D: y = x W + b, W [in, out].
struct Conv1dOfGpt2 : torch::nn::Module {
  Conv1dOfGpt2(int64_t in, int64_t out)
      : weight(register_parameter("weight", torch::randn({in, out}))),
        bias(register_parameter("bias", torch::randn({out}))) {}
  Tensor forward(const Tensor& x) {
    return x.matmul(weight) + bias;
  }
  Tensor weight, bias;
};

/// Collects warnings while it lives.
struct Warnings : c10::WarningHandler {
  void process(const c10::Warning& warning) override {
    messages.push_back(warning.msg());
  }
  Names messages;
  c10::WarningUtils::WarningHandlerGuard guard{this};
};

} // namespace

TEST_CASE("LoRA refuses options that make no sense") {
  struct Row {
    LoraOptions options;
    std::string part;
  };
  const double nan = std::nan("");
  const std::vector<Row> rows{
      {LoraOptions().r(0), "r must be positive, got 0"},
      {LoraOptions().r(-3), "r must be positive, got -3"},
      {LoraOptions().alpha(nan), "alpha must be finite"},
      {LoraOptions().alpha(INFINITY), "alpha must be finite"},
      {LoraOptions().dropout(1), "dropout must lie in [0, 1), got 1"},
      {LoraOptions().dropout(-.1), "dropout must lie in [0, 1), got -0.1"},
      {LoraOptions().dropout(nan), "dropout must lie in [0, 1)"},
      {LoraOptions().rank_pattern({{"q", 0}}), "rank_pattern['q']"},
      {LoraOptions().rank_pattern({{"q", 2.5}}), "got 2.5"},
      {LoraOptions().alpha_pattern({{"q", nan}}), "alpha_pattern['q']"},
      {LoraOptions().init("zeros"), "init must be 'gaussian', 'kaiming'"},
      {LoraOptions().bias("some"), "'lora_only' or 'all', got 'some'"},
      {LoraOptions().enable_lora({true}), "three values, got 1"}};
  CHECK(contains(
      error_of([] { LoraOptions(0); }), "peft: r must be positive, got 0"));
  torch::nn::Linear linear(4, 3);
  const auto before = state_of(*linear);
  for (auto row : rows) {
    INFO(row.part);
    row.options.targets("");
    CHECK(contains(
        error_of([&] { peft::attach(*linear, row.options); }), row.part));
    CHECK(same_state(state_of(*linear), before));
    CHECK(contains(
        error_of(
            [&] { peft::Lora<torch::nn::Linear> layer(linear, row.options); }),
        row.part));
    CHECK(same_state(state_of(*linear), before));
  }
}

TEST_CASE("the number of LoRA parameters follows from the shapes") {
  struct Row {
    std::string name;
    std::shared_ptr<torch::nn::Module> model;
    LoraOptions options;
    int64_t count;
  };
  using namespace torch::nn;
  const auto attention = [] { return MultiheadAttention(8, 2).ptr(); };
  const auto conv = Conv2dOptions(4, 6, {3, 2});
  const std::vector<Row> rows{
      {"linear", Linear(10, 6).ptr(), LoraOptions(3).targets(""), 3 * 16},
      {"linear with lora_bias",
       Linear(10, 6).ptr(),
       LoraOptions(3).targets("").lora_bias(true),
       3 * 16 + 6},
      {"embedding",
       Embedding(11, 6).ptr(),
       LoraOptions(2).targets(""),
       2 * (11 + 6)},
      {"embedding bag",
       EmbeddingBag(11, 6).ptr(),
       LoraOptions(2).targets(""),
       2 * (11 + 6)},
      {"conv1d",
       Conv1d(Conv1dOptions(3, 6, 5)).ptr(),
       LoraOptions(2).targets(""),
       2 * (3 * 5) + 2 * 6},
      {"conv2d",
       Conv2d(conv).ptr(),
       LoraOptions(2).targets(""),
       2 * (4 * 6) + 2 * 6},
      {"grouped conv2d",
       Conv2d(Conv2dOptions(conv).groups(2)).ptr(),
       LoraOptions(4).targets(""),
       4 * (2 * 6) + 6 * 2},
      {"conv3d",
       Conv3d(Conv3dOptions(2, 4, 2)).ptr(),
       LoraOptions(3).targets(""),
       3 * (2 * 8) + 3 * 4},
      {"bilinear",
       Bilinear(3, 4, 5).ptr(),
       LoraOptions(2).targets(""),
       2 * (3 * 4) + 2 * 5},
      {"lstm, 4 d rows",
       LSTM(LSTMOptions(4, 5)).ptr(),
       LoraOptions(2).targets(""),
       2 * (4 + 20) + 2 * (5 + 20)},
      {"gru, 3 d rows",
       GRU(GRUOptions(4, 5)).ptr(),
       LoraOptions(2).targets(""),
       2 * (4 + 15) + 2 * (5 + 15)},
      {"attention by default: q and v",
       attention(),
       LoraOptions(2),
       2 * (2 * 8 + 8 * 2)},
      {"attention as HF: one A for q, k, v, and out_proj",
       attention(),
       LoraOptions(2).targets(""),
       2 * (8 + 24) + 2 * (8 + 8)},
      {"attention, k alone",
       attention(),
       LoraOptions(2).targets("").enable_lora({false, true, false}),
       2 * (8 + 8)},
      {"rank_pattern",
       std::make_shared<networks::Mlp>(),
       LoraOptions(2).targets({"fc1", "fc2"}).rank_pattern({{"fc2", 5}}),
       2 * (10 + 16) + 5 * (16 + 12)}};
  for (const auto& row : rows) {
    INFO(row.name);
    int64_t base = 0;
    for (const auto& p : row.model->parameters()) {
      base += p.numel();
    }
    auto adapter = peft::attach(*row.model, row.options);
    CHECK(adapter.num_parameters() == row.count);
    const auto counted = peft::count_parameters(*row.model);
    CHECK(counted.trainable == row.count);
    CHECK(counted.total == base + row.count);
    int64_t by_site = 0;
    for (const auto& site : adapter.sites()) {
      by_site += site.num_parameters;
    }
    CHECK(by_site == row.count);
  }
}

TEST_CASE("RoBERTa-base, query and value, r = 8: 294,912 parameters") {
  peft::models::BertModel roberta(peft::models::BertOptions()
                                      .vocab_size(50265)
                                      .max_position_embeddings(514)
                                      .type_vocab_size(1)
                                      .pad_token_id(1)
                                      .roberta_positions(true));
  auto adapter =
      peft::attach(*roberta, LoraOptions(8).targets({"query", "value"}));
  CHECK(adapter.sites().size() == 24);
  CHECK(adapter.num_parameters() == 12 * 2 * 8 * (768 + 768));
  CHECK(adapter.num_parameters() == 294912);
  const auto count = peft::count_parameters(*roberta);
  CHECK(count.trainable == 294912);
  CHECK(count.total == 124645632 + 294912);
  adapter.detach();
  CHECK(
      peft::attach(*roberta, LoraOptions(16).targets("all-linear"))
          .num_parameters() ==
      16 * (12 * (4 * (768 + 768) + 2 * (768 + 3072)) + (768 + 768)));
}

TEST_CASE("the update is alpha / r, or alpha / sqrt(r), times B A") {
  struct Row {
    LoraOptions options;
    double scaling;
  };
  const std::vector<Row> rows{
      {LoraOptions(4), 8. / 4},
      {LoraOptions(4).alpha(6), 6. / 4},
      {LoraOptions(4).alpha(6).rslora(true), 6. / 2},
      {LoraOptions(3).alpha(2).rslora(true), 2. / std::sqrt(3.)},
      {LoraOptions(4).alpha(-1), -1. / 4}};
  for (const auto& row : rows) {
    INFO(row.scaling);
    torch::nn::Linear linear(5, 6);
    linear->to(torch::kDouble);
    const Tensor W = linear->weight.detach().clone();
    auto options = row.options;
    auto adapter = peft::attach(*linear, options.targets("").init("random"));
    const Tensor A = lora(adapter).lora_A, B = lora(adapter).lora_B;
    CHECK(A.scalar_type() == torch::kDouble); // as precise as the base
    CHECK(
        close(peft::effective(linear->weight), W + row.scaling * at::mm(B, A)));
    adapter.set_scale(0.5);
    CHECK(close(
        peft::effective(linear->weight), W + 0.5 * row.scaling * at::mm(B, A)));
  }
}

TEST_CASE("how A and B start") {
  const int64_t r = 16, in = 500, out = 300;
  torch::nn::Linear linear(in, out);
  const auto start = [&](const std::string& init, uint64_t number = 3) {
    seed(number);
    auto adapter = peft::attach(*linear, LoraOptions(r).targets("").init(init));
    std::pair<Tensor, Tensor> factors{
        lora(adapter).lora_A.detach(), lora(adapter).lora_B.detach()};
    adapter.detach();
    return factors;
  };
  // Bounds of four standard errors of the estimate.
  const double n = static_cast<double>(r * in);

  SECTION("gaussian: A ~ N(0, 1/r^2), B = 0") {
    const auto [A, B] = start("gaussian");
    CHECK(B.count_nonzero().item<int64_t>() == 0);
    const double sigma = 1. / r;
    CHECK(std::abs(A.mean().item<double>()) < 4 * sigma / std::sqrt(n));
    CHECK(std::abs(A.std().item<double>() / sigma - 1) < 4 / std::sqrt(2 * n));
    const double kurtosis =
        (A / sigma).pow(4).mean().item<double>(); // 3, variance 96 / n
    CHECK(std::abs(kurtosis - 3) < 4 * std::sqrt(96 / n));
  }
  SECTION("kaiming: A uniform in 1/sqrt(in), B = 0") {
    const auto [A, B] = start("kaiming");
    CHECK(B.count_nonzero().item<int64_t>() == 0);
    const double bound = 1 / std::sqrt(static_cast<double>(in));
    CHECK(A.abs().max().item<double>() <= bound);
    CHECK(A.abs().max().item<double>() > 0.99 * bound);
    // The mean of u^2 for u uniform in [-1, 1]: 1/3, variance 4/45 / n.
    const double square = (A / bound).pow(2).mean().item<double>();
    CHECK(std::abs(square - 1. / 3) < 4 * std::sqrt(4. / 45 / n));
  }
  SECTION("random: both act") {
    const auto [A, B] = start("random");
    CHECK(A.count_nonzero().item<int64_t>() > 0);
    CHECK(B.count_nonzero().item<int64_t>() > 0);
  }
  SECTION("a seed repeats the values, another gives others") {
    for (const char* init : {"gaussian", "kaiming", "random"}) {
      const auto first = start(init), again = start(init);
      CHECK(equal_bits(first.first, again.first));
      CHECK(equal_bits(first.second, again.second));
      CHECK_FALSE(equal_bits(first.first, start(init, 4).first));
    }
  }
  SECTION("an embedding: A = 0, B ~ N(0, 1)") {
    torch::nn::Embedding table(300, 400);
    auto adapter = peft::attach(*table, LoraOptions(r).targets(""));
    const Tensor A = lora(adapter).lora_A, B = lora(adapter).lora_B;
    CHECK(A.count_nonzero().item<int64_t>() == 0);
    const double count = static_cast<double>(B.numel());
    CHECK(std::abs(B.mean().item<double>()) < 4 / std::sqrt(count));
    CHECK(std::abs(B.std().item<double>() - 1) < 4 / std::sqrt(2 * count));
  }
}

TEST_CASE("dropout acts on x before A, in training mode only") {
  seed();
  torch::nn::Linear linear(6, 5);
  const Tensor W = linear->weight.detach(), b = linear->bias.detach();
  const double p = 0.4, s = 2.0;
  auto adapter = peft::attach(
      *linear, LoraOptions(3).alpha(6).dropout(p).targets("").init("random"));
  const Tensor A = lora(adapter).lora_A, B = lora(adapter).lora_B;

  for (const auto& sizes :
       std::vector<std::vector<int64_t>>{{7, 6}, {2, 7, 6}, {6}}) {
    INFO(at::IntArrayRef(sizes));
    const Tensor x = torch::randn(sizes);
    const auto run = [&](uint64_t number) {
      seed(number);
      return linear->forward(x);
    };
    linear->train();
    const Tensor trained = run(1);
    if (sizes.size() > 1) { // a vector takes the built weight
      seed(1);
      const Tensor mask = peft::functional::dropout_mask(
          peft::functional::draw_dropout(p), x.numel() / 6, 6, x.options());
      const Tensor y = at::linear(x, W, b);
      const Tensor term =
          at::linear(at::linear(x * mask.view(x.sizes()), A), B) * s;
      CHECK(close(trained, y + term));
      CHECK(equal_bits(run(1), trained));
      CHECK_FALSE(equal_bits(run(2), trained));
    }
    linear->eval();
    const Tensor evaluated = run(1);
    CHECK(close(
        evaluated, at::linear(x, W, b) + at::linear(at::linear(x, A), B) * s));
    CHECK(equal_bits(run(2), evaluated));
  }

  const Tensor x = torch::randn({7, 6});
  const auto differs = [&] {
    seed(1);
    const Tensor y = linear->forward(x);
    seed(2);
    return !equal_bits(linear->forward(x), y);
  };
  linear->train();
  CHECK(differs());
  adapter.eval(); // the adapter alone
  CHECK(linear->is_training());
  CHECK_FALSE(differs());
  adapter.train();
  CHECK(differs());
  adapter.disable();
  CHECK_FALSE(differs());
  CHECK(equal_bits(linear->forward(x), at::addmm(b, x, W.t())));
}

TEST_CASE("an adapter starts in the mode of its model") {
  torch::nn::Linear linear(6, 5);
  for (const bool training : {true, false}) {
    linear->train(training);
    auto adapter = peft::attach(*linear, LoraOptions(2).targets(""));
    CHECK(lora(adapter).is_training() == training);
    adapter.detach();
  }
}

TEST_CASE("which biases and modules train beside LoRA") {
  struct Row {
    std::string name;
    LoraOptions options;
    Names trained;
  };
  const auto options = [] { return LoraOptions(2).targets({"fc1"}); };
  const Names factors{"fc1.lora_A.weight", "fc1.lora_B.weight"};
  const auto with = [&](const Names& more) {
    Names all = factors;
    all.insert(all.end(), more.begin(), more.end());
    return all;
  };
  const std::vector<Row> rows{
      {"none", options(), factors},
      {"lora_only", options().bias("lora_only"), with({"fc1.base_layer.bias"})},
      {"all",
       options().bias("all"),
       with({"fc1.base_layer.bias", "fc2.bias", "head.bias"})},
      {"the head",
       options().modules_to_save({"head"}),
       with({"head.weight", "head.bias"})},
      {"all, and the head only once",
       options().bias("all").modules_to_save({"head"}),
       with({"fc1.base_layer.bias", "fc2.bias", "head.weight", "head.bias"})},
      {"the head named twice",
       options().modules_to_save({"head", "head"}),
       with({"head.weight", "head.bias"})},
      {"lora_bias", options().lora_bias(true), with({"fc1.lora_B.bias"})}};
  for (const auto& row : rows) {
    INFO(row.name);
    seed();
    networks::Mlp model;
    const Tensor x = torch::randn({5, 10});
    const Tensor before = model.forward(x);
    auto adapter = peft::attach(model, row.options);
    CHECK(trained_names(adapter) == row.trained);
    CHECK(equal_bits(model.forward(x), before)); // identity at the start
    CHECK(adapter.parameters().size() == row.trained.size());

    // Against the formula, with values that act.
    randomise(adapter);
    const auto values = adapter.named_parameters();
    const auto value = [&](const std::string& name, const Tensor& otherwise) {
      const auto* found = values.find(name);
      return found == nullptr ? peft::base(otherwise) : *found;
    };
    const double s = 8. / 2;
    Tensor b1 = value("fc1.base_layer.bias", model.fc1->bias);
    if (row.options.lora_bias()) {
      b1 = b1 + s * values["fc1.lora_B.bias"];
    }
    const Tensor W1 = peft::base(model.fc1->weight) +
        s * at::mm(values["fc1.lora_B.weight"], values["fc1.lora_A.weight"]);
    const Tensor h = torch::tanh(at::linear(
        torch::tanh(at::linear(x, W1, b1)),
        model.fc2->weight,
        value("fc2.bias", model.fc2->bias)));
    const Tensor expected = at::linear(
        h,
        value("head.weight", model.head->weight),
        value("head.bias", model.head->bias));
    CHECK(close(model.forward(x), expected));

    adapter.disable(); // biases and head too
    CHECK(equal_bits(model.forward(x), before));
    adapter.enable();
    adapter.merge();
    torch::NoGradGuard no_grad;
    CHECK(close(model.forward(x), expected));
    adapter.unmerge();
    adapter.detach();
    CHECK(equal_bits(model.forward(x), before));
  }
}

TEST_CASE("lora_bias needs a bias") {
  torch::nn::Linear linear(torch::nn::LinearOptions(4, 3).bias(false));
  const auto before = state_of(*linear);
  CHECK(contains(
      error_of([&] {
        peft::attach(*linear, LoraOptions(2).targets("").lora_bias(true));
      }),
      "peft: lora_bias needs a layer with a bias, and 'weight'"));
  CHECK(same_state(state_of(*linear), before));
}

TEST_CASE("q, k and v of a packed projection can be chosen") {
  const int64_t width = 8, r = 2;
  const double s = 3;
  const auto options = LoraOptions(r).alpha(s * r).init("random");
  const Tensor x = torch::randn({5, 2, width}, torch::kDouble);
  for (int mask = 1; mask < 8; ++mask) {
    const std::vector<bool> chosen{
        (mask & 1) != 0, (mask & 2) != 0, (mask & 4) != 0};
    const auto count = chosen[0] + chosen[1] + chosen[2];
    for (const char* target : {"", "in_proj_weight"}) {
      INFO("mask " << mask << ", target '" << target << "'");
      torch::nn::MultiheadAttention attention(width, 2);
      attention->to(torch::kDouble);
      const Tensor W = attention->in_proj_weight.detach().clone();
      auto adapter = peft::attach(
          *attention, LoraOptions(options).targets(target).enable_lora(chosen));
      REQUIRE(adapter.sites().size() == 1);
      CHECK(adapter.num_parameters() == count * r * 2 * width);
      CHECK(lora(adapter).r() == r);

      // Each block has factors of its own.
      const Tensor A = lora(adapter).lora_A, B = lora(adapter).lora_B;
      std::vector<Tensor> blocks = W.chunk(3);
      int64_t at = 0;
      for (size_t i = 0; i < 3; ++i) {
        if (chosen[i]) {
          blocks[i] = blocks[i] +
              s *
                  at::mm(
                      B.slice(0, at * width, (at + 1) * width),
                      A.slice(0, at * r, (at + 1) * r));
          ++at;
        }
      }
      const Tensor expected = at::cat(blocks);
      CHECK(close(peft::effective(attention->in_proj_weight), expected));
      const Tensor rows = peft::effective(attention->in_proj_weight);
      for (size_t i = 0; i < 3; ++i) {
        if (!chosen[i]) {
          const auto begin = static_cast<int64_t>(i) * width;
          CHECK(equal_bits(
              rows.slice(0, begin, begin + width),
              W.slice(0, begin, begin + width)));
        }
      }

      torch::nn::MultiheadAttention reference(width, 2);
      reference->to(torch::kDouble);
      torch::NoGradGuard no_grad;
      reference->in_proj_weight.copy_(expected);
      reference->in_proj_bias.copy_(attention->in_proj_bias);
      reference->out_proj->weight.copy_(attention->out_proj->weight);
      reference->out_proj->bias.copy_(attention->out_proj->bias);
      const Tensor y = std::get<0>(attention->forward(x, x, x));
      CHECK(close(y, std::get<0>(reference->forward(x, x, x))));
      adapter.merge();
      CHECK(close(std::get<0>(attention->forward(x, x, x)), y));
    }
  }

  SECTION("by default q and v; the option is heard without targets") {
    torch::nn::MultiheadAttention attention(width, 2);
    auto adapter = peft::attach(*attention, LoraOptions(r));
    CHECK(
        lora(adapter).config().enabled == std::vector<bool>{true, false, true});
    adapter.detach();
    adapter = peft::attach(
        *attention, LoraOptions(r).enable_lora({true, true, false}));
    CHECK(
        lora(adapter).config().enabled == std::vector<bool>{true, true, false});
  }
  SECTION("separate projections") {
    torch::nn::MultiheadAttention attention(
        torch::nn::MultiheadAttentionOptions(width, 2).kdim(6).vdim(4));
    auto adapter = peft::attach(
        *attention,
        LoraOptions(r).targets("").enable_lora({false, true, true}));
    CHECK(
        trained_names(adapter) ==
        Names{
            "k_proj_weight.lora_A.weight",
            "k_proj_weight.lora_B.weight",
            "v_proj_weight.lora_A.weight",
            "v_proj_weight.lora_B.weight"});
  }
  SECTION("none of the three") {
    torch::nn::MultiheadAttention attention(width, 2);
    CHECK(contains(
        error_of([&] {
          peft::attach(
              *attention,
              LoraOptions(r).targets("").enable_lora({false, false, false}));
        }),
        "enable_lora switches every block"));
  }
}

TEST_CASE("fan_in_fan_out: the weight is [in, out]") {
  seed();
  Conv1dOfGpt2 layer(6, 4);
  const Tensor W = layer.weight.detach().clone();
  auto adapter = peft::attach(
      layer,
      LoraOptions(2).alpha(6).targets("").fan_in_fan_out(true).init("random"));
  const Tensor A = lora(adapter).lora_A, B = lora(adapter).lora_B;
  CHECK(A.sizes() == at::IntArrayRef({2, 6})); // as if it were [out, in]
  CHECK(B.sizes() == at::IntArrayRef({4, 2}));
  const Tensor expected = W + 3 * at::mm(B, A).t();
  CHECK(close(peft::effective(layer.weight), expected));
  for (const auto& sizes :
       std::vector<std::vector<int64_t>>{{3, 6}, {2, 3, 6}}) {
    const Tensor x = torch::randn(sizes);
    CHECK(close(layer.forward(x), x.matmul(expected) + layer.bias));
  }
}

TEST_CASE("fan_in_fan_out does not turn a torch::nn::Linear around") {
  // As HF, which resets the option for such a layer: its weight is [out, in].
  torch::nn::Linear linear(6, 4);
  auto adapter =
      peft::attach(*linear, LoraOptions(2).targets("").fan_in_fan_out(true));
  CHECK(lora(adapter).lora_A.sizes() == at::IntArrayRef({2, 6}));
  CHECK(lora(adapter).lora_B.sizes() == at::IntArrayRef({4, 2}));
}

TEST_CASE("LoRA on a grouped convolution") {
  const auto make = [] {
    return torch::nn::Conv2d(
        torch::nn::Conv2dOptions(6, 9, 3).groups(3).padding(1));
  };
  SECTION("the rank is shared out to the groups") {
    auto conv = make();
    const auto before = state_of(*conv);
    const auto error =
        error_of([&] { peft::attach(*conv, LoraOptions(4).targets("")); });
    CHECK(contains(error, "r must be divisible by the groups"));
    CHECK(contains(error, "r = 4 and groups = 3"));
    CHECK(same_state(state_of(*conv), before));
  }
  SECTION("each group has its own update") {
    seed();
    auto conv = make();
    conv->to(torch::kDouble);
    const Tensor W = conv->weight.detach().clone();
    auto adapter =
        peft::attach(*conv, LoraOptions(6).alpha(3).targets("").init("random"));
    const Tensor A = lora(adapter).lora_A, B = lora(adapter).lora_B;
    std::vector<Tensor> groups;
    for (int64_t g = 0; g < 3; ++g) {
      groups.push_back(
          0.5 *
          at::mm(
              B.slice(0, 3 * g, 3 * g + 3).reshape({3, 2}),
              A.slice(0, 2 * g, 2 * g + 2).reshape({2, -1})));
    }
    const Tensor expected = W + at::cat(groups).reshape(W.sizes());
    CHECK(close(peft::effective(conv->weight), expected));
    const Tensor x = torch::randn({2, 6, 5, 5}, torch::kDouble);
    CHECK(close(
        conv->forward(x),
        at::conv2d(x, expected, conv->bias, 1, 1, 1, /*groups=*/3)));
  }
}

TEST_CASE("a tied weight is found, counted once and adapted once") {
  const auto by_member = [](networks::Words&) {}; // as networks.h ties them
  const auto by_storage = [](networks::Words& words) {
    words.out->weight = words.out->parameters()[0]; // as it was registered
    words.out->weight.set_data(words.emb->weight);
  };
  struct Row {
    std::string name;
    std::function<void(networks::Words&)> tie;
  };
  for (const auto& row : std::vector<Row>{
           {"by the member", by_member}, {"by storage", by_storage}}) {
    INFO(row.name);
    seed();
    networks::Words model("emb", "out", /*tied=*/true);
    row.tie(model);
    const Tensor ids = torch::tensor({{1, 4, 10}, {0, 4, 2}});
    const Tensor W = model.emb->weight.detach().clone();
    for (const auto& targets :
         {Targets("emb"), Targets("out"), Targets({"emb", "out"})}) {
      const bool both = targets.names().size() == 2;
      INFO(targets.names().front() << ", both: " << both);
      Warnings warnings;
      auto adapter = peft::attach(
          model, LoraOptions(2).alpha(4).targets(targets).init("random"));
      CHECK(warnings.messages.size() == (both ? 0u : 1u));
      if (!warnings.messages.empty()) {
        CHECK(contains(warnings.messages[0], "emb.weight"));
        CHECK(contains(warnings.messages[0], "out.weight"));
        CHECK(contains(warnings.messages[0], "tied"));
      }
      REQUIRE(adapter.sites().size() == 1);
      CHECK(adapter.sites()[0].parameters.size() == 2);
      CHECK(adapter.num_parameters() == 2 * (11 + 6));
      CHECK(peft::count_parameters(model).total == 11 * 6 + 2 * (11 + 6));
      CHECK(contains(peft::summary(model), "tied: "));

      const Tensor value = peft::effective(model.emb->weight);
      CHECK_FALSE(equal_bits(value, W));
      CHECK(equal_bits(peft::effective(model.out->weight), value));
      CHECK(close(
          model.forward(ids),
          at::linear(torch::tanh(at::embedding(value, ids)), value)));
      adapter.merge();
      CHECK(close(peft::base(model.out->weight), value));
      adapter.unmerge();
      adapter.detach();
      CHECK_FALSE(peft::is_adapted(model.emb->weight));
      CHECK_FALSE(peft::is_adapted(model.out->weight));
      CHECK(equal_bits(model.emb->weight, W));
    }
  }
}

TEST_CASE("training changes every trainable tensor and nothing else") {
  struct Row {
    std::string name;
    LoraOptions options;
    size_t site = 0; // one whose A and B are looked at
  };
  const std::vector<Row> rows{
      {"query and value", LoraOptions(2)},
      {"all linear layers, dropout",
       LoraOptions(2).targets("all-linear").dropout(0.1)},
      {"biases and head",
       LoraOptions(2).bias("all").modules_to_save({"classifier"})},
      {"an embedding too (its A is the zero one)",
       LoraOptions(2).targets({"query", "word_embeddings"}).init("kaiming"),
       1},
      {"lora_bias", LoraOptions(2).targets({"dense"}).lora_bias(true)}};
  for (const auto& row : rows) {
    INFO(row.name);
    seed(5);
    peft::models::BertForSequenceClassification model(
        peft::models::BertOptions()
            .vocab_size(20)
            .hidden_size(8)
            .num_hidden_layers(2)
            .num_attention_heads(2)
            .intermediate_size(16)
            .max_position_embeddings(8));
    auto adapter = peft::attach(*model, row.options);
    const auto before = state_of(*model);
    // From all parameters: those that do not train have no gradient.
    torch::optim::AdamW optimizer(
        model->parameters(),
        torch::optim::AdamWOptions(1e-2).weight_decay(0.1));
    const Tensor ids = torch::randint(20, {6, 5}, torch::kLong);
    const Tensor labels = torch::randint(2, {6}, torch::kLong);
    for (int step = 0; step < 4; ++step) {
      optimizer.zero_grad();
      F::cross_entropy(model->forward(ids), labels).backward();
      if (step == 0) { // the factor that is zero hides the other
        const auto& factors = lora(adapter, row.site);
        CHECK(factors.lora_A.grad().count_nonzero().item<int64_t>() == 0);
        CHECK(factors.lora_B.grad().count_nonzero().item<int64_t>() > 0);
      }
      optimizer.step();
    }
    const auto after = state_of(*model);
    REQUIRE(after.tensors.size() == before.tensors.size());
    size_t trained = 0;
    for (size_t i = 0; i < before.tensors.size(); ++i) {
      INFO(before.tensors[i].name);
      const bool changed =
          !equal_bits(after.tensors[i].value, before.tensors[i].value);
      CHECK(changed == before.tensors[i].requires_grad);
      trained += changed ? 1 : 0;
    }
    CHECK(trained == adapter.parameters().size());
    for (const auto& p : peft::detail::base_parameters(*model)) {
      INFO(p.first);
      CHECK_FALSE(p.second.grad().defined());
      CHECK_FALSE(p.second.requires_grad());
    }
  }
}

TEST_CASE("training by attach is training by hand") {
  for (const auto dtype : {torch::kDouble, torch::kFloat}) {
    INFO(dtype);
    seed(2);
    networks::Mlp model;
    model.to(dtype);
    const auto options = torch::TensorOptions().dtype(dtype);
    const Tensor x = torch::randn({32, 10}, options);
    const Tensor goal = torch::randn({32, 3}, options);
    auto adapter =
        peft::attach(model, LoraOptions(4).alpha(8).targets({"fc1", "fc2"}));

    // The same by hand: copies of the values, the formula of the paper.
    std::vector<Tensor> factors;
    for (const auto& p : adapter.parameters()) {
      factors.push_back(p.detach().clone().set_requires_grad(true));
    }
    const auto layer = [&](const torch::nn::Linear& base,
                           const Tensor& input,
                           const Tensor& A,
                           const Tensor& B) {
      return at::linear(input, peft::base(base->weight), base->bias) +
          8. / 4 * at::linear(at::linear(input, A), B);
    };
    const auto by_hand = [&] {
      const Tensor h = torch::tanh(layer(model.fc1, x, factors[0], factors[1]));
      return model.head(
          torch::tanh(layer(model.fc2, h, factors[2], factors[3])));
    };

    const auto adamw = torch::optim::AdamWOptions(1e-2).weight_decay(0.01);
    torch::optim::AdamW ours(adapter.parameters(), adamw);
    torch::optim::AdamW theirs(factors, adamw);
    Tensor first, loss, reference;
    for (int step = 0; step < 20; ++step) {
      ours.zero_grad();
      loss = F::mse_loss(model.forward(x), goal);
      loss.backward();
      ours.step();
      theirs.zero_grad();
      reference = F::mse_loss(by_hand(), goal);
      reference.backward();
      theirs.step();
      if (step == 0) {
        first = loss.detach();
      }
    }
    CHECK(loss.item<double>() < 0.95 * first.item<double>()); // it learns
    CHECK(close(loss, reference));
    const auto trained = adapter.parameters();
    for (size_t i = 0; i < factors.size(); ++i) {
      INFO(i);
      if (dtype == torch::kDouble) {
        CHECK(close(trained[i], factors[i], 1e-6, 1e-6));
      } else {
        CHECK(close(trained[i], factors[i]));
      }
    }
  }
}

TEST_CASE("files of adapters on tied weights") {
  seed();
  const Tensor ids = torch::tensor({{1, 4, 10}, {0, 4, 2}});
  networks::Words model("emb", "out", /*tied=*/true);
  networks::Words same("emb", "out", /*tied=*/true);
  {
    torch::NoGradGuard no_grad;
    same.emb->weight.copy_(model.emb->weight);
  }
  const Warnings warnings;
  for (const auto& targets :
       {Targets("emb"), Targets("out"), Targets({"emb", "out"})}) {
    INFO(targets.names().front() << " of " << targets.names().size());
    TemporaryDirectory folder;
    auto adapter =
        peft::attach(model, LoraOptions(2).targets(targets).init("random"));
    peft::save(adapter, folder.path().string());
    auto loaded = peft::load(same, folder.path().string());
    CHECK(equal_bits(same.forward(ids), model.forward(ids)));
    adapter.detach();
    loaded.detach();
  }

  // Two adapters for what is one tensor here, as PEFT would write them.
  networks::Words apart("emb", "out", /*tied=*/false);
  TemporaryDirectory folder;
  auto two = peft::attach(
      apart, LoraOptions(2).targets({"emb", "out"}).init("random"));
  peft::save(two, folder.path().string());
  const auto before = state_of(model);
  const auto error =
      error_of([&] { peft::load(model, folder.path().string()); });
  CHECK(contains(error, "two tied weights, 'emb.weight' and 'out.weight'"));
  CHECK(contains(error, "untie them"));
  CHECK(same_state(state_of(model), before));
}

} // namespace test_lora
