#include "model_state.h"
#include "test.h"

#include <peft/models/bert.h>
#include <peft/models/gpt2.h>
#include <peft/train/fisher.h>

#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <vector>

namespace test_fisher {

using torch::Tensor;

namespace {

namespace models = peft::models;

const int64_t kSamples = 6;

models::BertForSequenceClassification small_bert() {
  seed(3);
  models::BertForSequenceClassification model(models::BertOptions()
                                                  .vocab_size(20)
                                                  .hidden_size(8)
                                                  .num_hidden_layers(1)
                                                  .num_attention_heads(2)
                                                  .intermediate_size(12)
                                                  .max_position_embeddings(8)
                                                  .num_labels(3));
  model->to(torch::kDouble);
  return model;
}

Tensor ids(int64_t begin, int64_t end) {
  torch::manual_seed(17);
  return torch::randint(1, 20, {kSamples, 5}, torch::kLong)
      .slice(0, begin, end);
}

Tensor labels(int64_t begin, int64_t end) {
  return torch::tensor({0, 2, 1, 1, 0, 2}, torch::kLong).slice(0, begin, end);
}

std::map<std::string, Tensor> as_map(const peft::Scores& scores) {
  return {scores.begin(), scores.end()};
}

/// The gradient of `loss` for every parameter, by the plain backward pass of a
/// network whose parameters require gradients.
std::map<std::string, Tensor> gradients(
    torch::nn::Module& model,
    const Tensor& loss) {
  model.zero_grad();
  loss.backward({}, /*retain_graph=*/true);
  std::map<std::string, Tensor> result;
  for (const auto& p : model.named_parameters()) {
    result[p.key()] = p.value().grad().defined() ? p.value().grad().clone()
                                                 : torch::zeros_like(p.value());
  }
  model.zero_grad();
  return result;
}

void check_equal(
    const peft::Scores& scores,
    const std::map<std::string, Tensor>& expected) {
  CHECK(scores.size() == expected.size());
  for (const auto& [path, score] : scores) {
    INFO(path);
    REQUIRE(expected.count(path) == 1);
    CHECK(close(score, expected.at(path)));
  }
}

} // namespace

TEST_CASE("The label's Fisher information is that of one sample at a time") {
  const bool absolute = GENERATE(false, true);
  auto model = small_bert();
  const auto loss_of = [&](int64_t i) {
    return torch::cross_entropy_loss(
        model->forward(ids(i, i + 1)), labels(i, i + 1));
  };
  model->eval();
  std::map<std::string, Tensor> expected;
  for (int64_t i = 0; i < kSamples; ++i) {
    for (const auto& [path, g] : gradients(*model, loss_of(i))) {
      const Tensor one = absolute ? g.abs() : g.square();
      expected[path] = expected.count(path) != 0 ? expected[path] + one : one;
    }
  }
  model->train(); // dropout is off in the estimate all the same
  const auto estimate = peft::estimate_fisher(
      *model,
      loss_of,
      peft::FisherOptions(kSamples).measure(absolute ? "absolute" : "square"));
  CHECK(estimate.num_samples == kSamples);
  check_equal(estimate.scores, expected);
  CHECK(model->is_training());
}

TEST_CASE("The expectation counts every class by its probability") {
  auto model = small_bert();
  model->eval();
  std::map<std::string, Tensor> expected;
  for (int64_t i = 0; i < kSamples; ++i) {
    const Tensor logits = model->forward(ids(i, i + 1))[0];
    const Tensor p = logits.softmax(0).detach();
    for (int64_t c = 0; c < 3; ++c) {
      const Tensor log_p = logits[c] - logits.logsumexp(0);
      for (const auto& [path, g] : gradients(*model, -log_p)) {
        const Tensor one = p[c] * g.square();
        expected[path] = expected.count(path) != 0 ? expected[path] + one : one;
      }
    }
  }
  const auto estimate = peft::estimate_fisher(
      *model,
      [&](int64_t i) { return model->forward(ids(i, i + 1)); },
      peft::FisherOptions(kSamples).variant("expectation"));
  check_equal(estimate.scores, expected);
}

TEST_CASE("A batch's gradient is another estimator, clipped where asked for") {
  const double max_norm = GENERATE(0.0, 0.05);
  auto model = small_bert();
  const auto mean_loss = [&](int64_t begin, int64_t end) {
    return torch::cross_entropy_loss(
        model->forward(ids(begin, end)), labels(begin, end));
  };
  model->eval();
  std::map<std::string, Tensor> expected;
  for (const auto& [begin, end] :
       std::vector<std::pair<int64_t, int64_t>>{{0, 4}, {4, 6}}) {
    for (const auto& [path, g] : gradients(*model, mean_loss(begin, end))) {
      double factor = 1;
      if (max_norm > 0) {
        const double norm = std::sqrt(g.square().sum().item<double>());
        factor = std::min(1.0, max_norm / (norm + 1e-6));
      }
      const Tensor one = (factor * g).square();
      expected[path] = expected.count(path) != 0 ? expected[path] + one : one;
    }
  }
  const auto estimate = peft::estimate_fisher(
      *model,
      mean_loss,
      peft::FisherOptions(kSamples).per_batch(true).batch_size(4).max_norm(
          max_norm));
  check_equal(estimate.scores, expected);
  const auto of_samples =
      peft::estimate_fisher(*model, mean_loss, peft::FisherOptions(kSamples));
  const auto path = std::string("classifier.weight");
  CHECK_FALSE(torch::allclose(
      as_map(of_samples.scores).at(path),
      as_map(estimate.scores).at(path),
      1e-2,
      0));
}

TEST_CASE("Nothing of the model is another afterwards") {
  struct Net : torch::nn::Module {
    Net() {
      a = register_module("a", torch::nn::Linear(4, 5));
      norm = register_module("norm", torch::nn::BatchNorm1d(5));
      drop = register_module("drop", torch::nn::Dropout(0.5));
      b = register_module("b", torch::nn::Linear(5, 2));
    }
    Tensor forward(const Tensor& x) {
      return b(drop(norm(a(x))));
    }
    torch::nn::Linear a{nullptr}, b{nullptr};
    torch::nn::BatchNorm1d norm{nullptr};
    torch::nn::Dropout drop{nullptr};
  };
  seed(1);
  auto net = std::make_shared<Net>();
  net->a->weight.set_requires_grad(false);
  net->a->weight.mutable_grad() = torch::ones({5, 4});
  net->drop->eval();
  const auto before = state_of(*net);
  const auto x = torch::randn({8, 4});
  int64_t calls = 0;
  const auto loss_of = [&](int64_t begin, int64_t end) {
    ++calls;
    CHECK(net->drop->is_training());
    CHECK_FALSE(net->norm->weight.requires_grad());
    TORCH_CHECK(calls != 3, "the loader failed");
    return net->forward(x.slice(0, begin, end)).square().mean();
  };
  auto options =
      peft::FisherOptions(8).per_batch(true).batch_size(2).train(true);
  options.targets({"a", "b.weight"});

  const auto check_state = [&] {
    CHECK(same_state(before, state_of(*net)));
    CHECK(torch::equal(net->a->weight.grad(), torch::ones({5, 4})));
    CHECK_FALSE(net->b->weight.grad().defined());
  };
  const auto error =
      error_of([&] { peft::estimate_fisher(*net, loss_of, options); });
  CHECK(contains(error, "the loader failed"));
  check_state();

  calls = 10;
  std::vector<std::pair<int64_t, int64_t>> reports;
  options.progress([&](int64_t done, int64_t total) {
    reports.emplace_back(done, total);
    return done < 4;
  });
  torch::NoGradGuard no_grad; // the estimate has gradients of its own
  const auto part = peft::estimate_fisher(*net, loss_of, options);
  check_state();
  CHECK(part.num_samples == 4);
  CHECK(reports == std::vector<std::pair<int64_t, int64_t>>{{2, 8}, {4, 8}});
  REQUIRE(part.scores.size() == 3);
  CHECK(part.scores[0].first == "a.weight");
  CHECK(part.scores[1].first == "a.bias");
  CHECK(part.scores[2].first == "b.weight");
  CHECK(part.scores[0].second.sizes() == net->a->weight.sizes());
}

TEST_CASE("An estimate that was ended is that of the samples it saw") {
  auto model = small_bert();
  const auto loss_of = [&](int64_t i) {
    return torch::cross_entropy_loss(
        model->forward(ids(i, i + 1)), labels(i, i + 1));
  };
  const auto part = peft::estimate_fisher(
      *model,
      loss_of,
      peft::FisherOptions(kSamples).progress(
          [](int64_t done, int64_t) { return done < 3; }));
  const auto whole =
      peft::estimate_fisher(*model, loss_of, peft::FisherOptions(3));
  CHECK(part.num_samples == 3);
  for (size_t i = 0; i < whole.scores.size(); ++i) {
    CHECK(equal_bits(part.scores[i].second, whole.scores[i].second));
  }
}

TEST_CASE("A tied weight is measured once, with the gradient of all its uses") {
  seed(2);
  models::Gpt2ForCausalLM model(models::Gpt2Options()
                                    .vocab_size(11)
                                    .n_positions(8)
                                    .n_embd(4)
                                    .n_layer(1)
                                    .n_head(2));
  model->to(torch::kDouble);
  model->eval();
  const auto loss_of = [&](int64_t i) {
    return model->forward(ids(i, i + 1) % 11)
        .log_softmax(-1)
        .select(-1, 3)
        .mean();
  };
  std::map<std::string, Tensor> expected;
  for (int64_t i = 0; i < 2; ++i) {
    for (const auto& [path, g] : gradients(*model, loss_of(i))) {
      expected[path] =
          expected.count(path) != 0 ? expected[path] + g.square() : g.square();
    }
  }
  const auto estimate =
      peft::estimate_fisher(*model, loss_of, peft::FisherOptions(2));
  int tied = 0;
  for (const auto& [path, score] : estimate.scores) {
    INFO(path);
    REQUIRE(expected.count(path) == 1);
    CHECK(close(score, expected.at(path)));
    tied +=
        path == "lm_head.weight" || path == "transformer.wte.weight" ? 1 : 0;
  }
  CHECK(tied == 1);

  // Tied by storage alone: two tensors, one gradient each.
  torch::nn::Linear a(3, 3), b(3, 3);
  b->weight.set_data(a->weight.detach());
  torch::nn::Sequential pair(a, b);
  pair->to(torch::kDouble);
  b->weight.set_data(a->weight.detach());
  const auto x = torch::randn({1, 3}, torch::kDouble);
  const auto loss = [&](int64_t) { return pair->forward(x).square().sum(); };
  const auto by_hand = gradients(*pair, loss(0));
  const auto scores =
      peft::estimate_fisher(*pair, loss, peft::FisherOptions(1)).scores;
  REQUIRE(scores.size() == 3);
  CHECK(close(
      scores[0].second,
      (by_hand.at("0.weight") + by_hand.at("1.weight")).square()));
}

TEST_CASE("What cannot be measured is refused, with the sample's number") {
  torch::nn::Linear net(3, 2);
  const auto x = torch::randn({4, 3});
  const auto estimate = [&](auto f, const peft::FisherOptions& options) {
    return error_of([&] { peft::estimate_fisher(*net, f, options); });
  };
  const auto loss = [&](int64_t i) { return net->forward(x[i]).sum(); };
  const auto before = state_of(*net);
  CHECK(contains(
      estimate(loss, {0}), "at least one sample, got num_samples = 0"));
  CHECK(contains(
      estimate(
          [&](int64_t i) {
            return net->forward(x[i]).sum() *
                (i == 2 ? std::numeric_limits<double>::quiet_NaN() : 1.0);
          },
          {4}),
      "the loss of sample 2 is not finite"));
  CHECK(contains(
      estimate([&](int64_t i) { return net->forward(x[i]); }, {4}),
      "for sample 0 one loss, a scalar, is wanted, got"));
  CHECK(contains(
      estimate(
          [&](int64_t i) { return net->forward(x[i]).sum().detach(); }, {4}),
      "does not depend on a measured parameter"));
  CHECK(contains(
      estimate(loss, peft::FisherOptions(4).variant("true")),
      "no variant 'true'"));
  CHECK(contains(
      estimate(loss, peft::FisherOptions(4).measure("cube")),
      "no measure 'cube'"));
  CHECK(contains(
      estimate(loss, peft::FisherOptions(4).batch_size(2)),
      "needs a function of (begin, end)"));
  CHECK(contains(
      estimate(loss, peft::FisherOptions(4).batch_size(0)),
      "batch_size must be positive"));
  CHECK(contains(
      estimate(
          loss, peft::FisherOptions(4).per_batch(true).variant("expectation")),
      "per_batch measures the loss of a batch"));
  CHECK(contains(
      estimate(loss, peft::FisherOptions(4).targets({"wieght"})),
      "Did you mean 'weight'"));
  CHECK(same_state(before, state_of(*net)));
}

namespace {

/// A pre-norm block with a learned scale in plain arithmetic, a convolution and
/// a layer that acts twice: what a batch must be taken apart in.
struct MixedImpl : torch::nn::Module {
  MixedImpl() {
    torch::manual_seed(6);
    embed = register_module(
        "embed",
        torch::nn::Embedding(torch::nn::EmbeddingOptions(9, 6).padding_idx(0)));
    attention =
        register_module("attention", torch::nn::MultiheadAttention(6, 2));
    norm = register_module(
        "norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({6})));
    scale = register_parameter("scale", torch::rand({6}));
    twice = register_module("twice", torch::nn::Linear(6, 6));
    convolution = register_module(
        "convolution", torch::nn::Conv1d(torch::nn::Conv1dOptions(6, 4, 2)));
    head = register_module("head", torch::nn::Linear(4, 3));
    to(torch::kDouble);
  }
  Tensor forward(const Tensor& tokens) {
    Tensor h = norm(embed(tokens)) * scale;
    h = twice(twice(h).tanh());
    h = convolution(h.transpose(1, 2)).tanh().mean(2);
    return head(h);
  }
  torch::nn::Embedding embed{nullptr};
  torch::nn::MultiheadAttention attention{nullptr};
  torch::nn::LayerNorm norm{nullptr};
  torch::nn::Linear twice{nullptr}, head{nullptr};
  torch::nn::Conv1d convolution{nullptr};
  Tensor scale;
};
TORCH_MODULE(Mixed);

Tensor each_loss(const Tensor& logits, int64_t begin, int64_t end) {
  return torch::nn::functional::cross_entropy(
      logits,
      labels(begin, end),
      torch::nn::functional::CrossEntropyFuncOptions().reduction(torch::kNone));
}

/// The estimate in batches against that of one sample at a time.
void check_batches(
    torch::nn::Module& model,
    const std::function<Tensor(int64_t, int64_t)>& outputs_of,
    peft::FisherOptions options,
    bool batched) {
  const auto before = state_of(model);
  const auto alone =
      peft::estimate_fisher(model, outputs_of, options.batch_size(1));
  CHECK_FALSE(alone.batched);
  std::vector<int64_t> done;
  const auto together = peft::estimate_fisher(
      model,
      outputs_of,
      options.batch_size(4).progress([&](int64_t n, int64_t) {
        done.push_back(n);
        return true;
      }));
  CHECK(same_state(before, state_of(model)));
  CHECK(together.batched == batched);
  CHECK(together.num_samples == kSamples);
  CHECK(
      done ==
      (batched ? std::vector<int64_t>{1, 2, 3, 4, 6}
               : std::vector<int64_t>{1, 2, 3, 4, 5, 6}));
  REQUIRE(together.scores.size() == alone.scores.size());
  for (size_t i = 0; i < alone.scores.size(); ++i) {
    INFO(alone.scores[i].first);
    CHECK(together.scores[i].first == alone.scores[i].first);
    CHECK(close(together.scores[i].second, alone.scores[i].second));
  }
}

} // namespace

TEST_CASE("Samples of a batch count by their own gradients") {
  Mixed model;
  const auto tokens = [](int64_t begin, int64_t end) {
    return ids(begin, end) % 9;
  };
  const auto losses = [&](int64_t begin, int64_t end) {
    return each_loss(model->forward(tokens(begin, end)), begin, end);
  };
  check_batches(*model, losses, {kSamples}, true);
  check_batches(
      *model, losses, peft::FisherOptions(kSamples).measure("absolute"), true);
  check_batches(
      *model, losses, peft::FisherOptions(kSamples).max_norm(0.01), true);
  check_batches(
      *model,
      losses,
      peft::FisherOptions(kSamples).targets({"twice", "embed"}),
      true);
  check_batches(
      *model,
      [&](int64_t begin, int64_t end) {
        return model->forward(tokens(begin, end));
      },
      peft::FisherOptions(kSamples).variant("expectation"),
      true);
}

TEST_CASE("Where a batch does not tell its samples apart, they run alone") {
  // Every row sees the table of positions as one: [1, length].
  auto bert = small_bert();
  const auto losses = [&](int64_t begin, int64_t end) {
    return each_loss(bert->forward(ids(begin, end)), begin, end);
  };
  bert->eval();
  check_batches(*bert, losses, {kSamples}, false);
  check_batches(
      *bert,
      losses,
      peft::FisherOptions(kSamples).targets(
          peft::Targets::regex(".*(layer|word|pooler|classifier).*")),
      true);

  // A forward in which the samples see each other.
  Mixed model;
  check_batches(
      *model,
      [&](int64_t begin, int64_t end) {
        const Tensor logits = model->forward(ids(begin, end) % 9);
        return each_loss(logits + logits.flip(0), begin, end);
      },
      {kSamples},
      false);
  // Beside other adapters, whose effective weights are measured.
  Mixed adapted;
  auto lora = peft::attach(
      *adapted, peft::LoraOptions(2).init("random").targets({"twice", "head"}));
  const auto adapted_losses = [&](int64_t begin, int64_t end) {
    return each_loss(adapted->forward(ids(begin, end) % 9), begin, end);
  };
  check_batches(*adapted, adapted_losses, {kSamples}, false);
  const auto beside =
      peft::estimate_fisher(*adapted, adapted_losses, {kSamples});
  peft::merge(*adapted);
  const auto merged =
      peft::estimate_fisher(*adapted, adapted_losses, {kSamples});
  for (size_t i = 0; i < merged.scores.size(); ++i) {
    INFO(merged.scores[i].first);
    CHECK(close(beside.scores[i].second, merged.scores[i].second));
  }

  CHECK(contains(
      error_of([&] {
        peft::estimate_fisher(
            *model,
            [&](int64_t, int64_t) { return model->forward(ids(0, 2) % 9); },
            peft::FisherOptions(kSamples).batch_size(2));
      }),
      "for sample 0 one loss, a scalar, is wanted"));
}

} // namespace test_fisher
