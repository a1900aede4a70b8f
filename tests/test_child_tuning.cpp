#include "model_state.h"
#include "test.h"

#include <peft/methods/child_tuning.h>
#include <peft/methods/fish.h>
#include <peft/models/bert.h>
#include <peft/models/gpt2.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <string>
#include <vector>

namespace test_child_tuning {

using torch::Tensor;

namespace {

namespace models = peft::models;

models::BertForSequenceClassification small_bert(bool dropout = false) {
  seed(3);
  models::BertForSequenceClassification model(
      models::BertOptions()
          .vocab_size(20)
          .hidden_size(8)
          .num_hidden_layers(2)
          .num_attention_heads(2)
          .intermediate_size(12)
          .max_position_embeddings(8)
          .num_labels(3)
          .hidden_dropout_prob(dropout ? 0.1 : 0.0)
          .attention_probs_dropout_prob(dropout ? 0.1 : 0.0));
  return model;
}

Tensor ids(int64_t step = 0) {
  torch::manual_seed(40 + static_cast<uint64_t>(step));
  return torch::randint(1, 20, {4, 5}, torch::kLong);
}

Tensor loss_of(models::BertForSequenceClassification& model, int64_t step) {
  return torch::cross_entropy_loss(
      model->forward(ids(step)), torch::tensor({0, 2, 1, 1}, torch::kLong));
}

/// Random scores for every parameter; `levels` of them repeat.
peft::Scores some_scores(torch::nn::Module& model, int64_t levels = 0) {
  torch::manual_seed(8);
  peft::Scores scores;
  for (const auto& item : peft::detail::base_parameters(model)) {
    Tensor s = torch::rand(item.second.sizes());
    if (levels > 0) {
      s = (s * levels).floor();
    }
    scores.emplace_back(item.first, s);
  }
  return scores;
}

/// The k highest of all, ties by their place, by sorting one list.
std::map<std::string, std::vector<int64_t>> brute_force(
    const peft::Scores& scores,
    int64_t k) {
  struct One {
    double score;
    size_t order;
    std::string path;
    int64_t place;
  };
  std::vector<One> all;
  for (const auto& [path, score] : scores) {
    const Tensor flat = score.reshape({-1});
    for (int64_t i = 0; i < flat.numel(); ++i) {
      all.push_back({flat[i].item<double>(), all.size(), path, i});
    }
  }
  std::sort(all.begin(), all.end(), [](const One& a, const One& b) {
    return a.score != b.score ? a.score > b.score : a.order < b.order;
  });
  std::map<std::string, std::vector<int64_t>> result;
  for (int64_t i = 0; i < k; ++i) {
    result[all[static_cast<size_t>(i)].path].push_back(
        all[static_cast<size_t>(i)].place);
  }
  for (auto& item : result) {
    std::sort(item.second.begin(), item.second.end());
  }
  return result;
}

/// The mask that an adapter's masked copies or sparse copies have.
std::map<std::string, std::vector<int64_t>> mask_of(
    const peft::Adapter& adapter) {
  std::map<std::string, std::vector<int64_t>> result;
  for (const auto& site : adapter.shared_state()->sites) {
    Tensor indices;
    if (const auto* masked =
            dynamic_cast<const peft::MaskedCopy*>(site.delta.get())) {
      indices = masked->indices();
    } else if (
        const auto* sparse =
            dynamic_cast<const peft::SparseCopy*>(site.delta.get())) {
      indices = sparse->indices;
    }
    if (indices.defined() && indices.numel() > 0) {
      result[site.parameters.front()] = std::vector<int64_t>(
          indices.data_ptr<int64_t>(),
          indices.data_ptr<int64_t>() + indices.numel());
    }
  }
  return result;
}

peft::Scores only(
    const peft::Scores& scores,
    const std::function<bool(const std::string&)>& wanted) {
  peft::Scores result;
  for (const auto& item : scores) {
    if (wanted(item.first)) {
      result.push_back(item);
    }
  }
  return result;
}

bool in_head(const std::string& path) {
  return path.find("classifier") != std::string::npos;
}
bool in_layers(const std::string& path) {
  return path.find("layer") != std::string::npos;
}

} // namespace

TEST_CASE("FISH mask keeps the budget, head included, and ties by place") {
  const int64_t levels = GENERATE(0, 3);
  const auto semantics = GENERATE(as<std::string>(), "hard", "reference");
  auto model = small_bert();
  const auto scores = some_scores(*model, levels);
  int64_t total = 0, head = 0;
  for (const auto& item : scores) {
    total += item.second.numel();
    head += in_head(item.first) ? item.second.numel() : 0;
  }
  CHECK(head == 3 * 8 + 3);
  const auto keep = static_cast<int64_t>(0.05 * static_cast<double>(total));
  auto adapter = peft::attach(
      *model,
      peft::FishOptions(0.05)
          .fisher(scores)
          .semantics(semantics)
          .modules_to_save({"classifier"}));
  const auto outside = only(scores, [](const auto& p) { return !in_head(p); });
  CHECK(mask_of(adapter) == brute_force(outside, keep - head));
  if (semantics == "hard") {
    CHECK(adapter.num_parameters() == keep);
    CHECK(peft::count_parameters(*model).trainable == keep);
  } else {
    CHECK(adapter.num_parameters() == total);
  }
  adapter.detach();

  // t-few's variant has no head; a head outside the budget leaves it whole.
  auto no_head = peft::attach(*model, peft::FishOptions(0.02).fisher(scores));
  CHECK(
      mask_of(no_head) ==
      brute_force(
          scores, static_cast<int64_t>(0.02 * static_cast<double>(total))));
  no_head.detach();
  auto beside = peft::attach(
      *model,
      peft::FishOptions(0.05)
          .fisher(scores)
          .modules_to_save({"classifier"})
          .count_head(false));
  CHECK(beside.num_parameters() == keep + head);
}

TEST_CASE("FISH mask trains its entries and keeps the bits of all others") {
  auto model = small_bert();
  auto adapter = peft::attach(
      *model,
      peft::FishOptions(0.05)
          .fisher(some_scores(*model))
          .modules_to_save({"classifier"}));
  const auto mask = mask_of(adapter);
  std::map<std::string, Tensor> before;
  for (const auto& item : peft::detail::base_parameters(*model)) {
    before[item.first] = peft::base(item.second).detach().clone();
  }
  torch::optim::AdamW optimizer(
      model->parameters(), torch::optim::AdamWOptions(1e-2).weight_decay(0.1));
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    loss_of(model, step).backward();
    torch::nn::utils::clip_grad_norm_(adapter.parameters(), 1.0);
    optimizer.step();
  }
  peft::merge(*model);
  for (const auto& item : model->named_parameters()) {
    INFO(item.key());
    const Tensor same =
        item.value().detach().eq(before.at(item.key())).view({-1});
    if (in_head(item.key())) {
      continue;
    }
    Tensor expected = torch::ones_like(same);
    if (mask.count(item.key()) != 0) {
      expected.index_fill_(
          0, torch::tensor(mask.at(item.key()), torch::kLong), false);
    }
    // An entry whose gradient is zero keeps its bits, or decays.
    CHECK(same.logical_or(expected.logical_not()).all().item<bool>());
  }
}

TEST_CASE("A random FISH mask has the same budget and its own seed") {
  auto model = small_bert();
  const auto options =
      peft::FishOptions(0.05).selection("random").modules_to_save(
          {"classifier"});
  std::vector<std::map<std::string, std::vector<int64_t>>> masks;
  for (const uint64_t number : {1, 1, 2}) {
    auto adapter =
        peft::attach(*model, peft::FishOptions(options).seed(number));
    masks.push_back(mask_of(adapter));
    CHECK(
        adapter.num_parameters() ==
        static_cast<int64_t>(
            0.05 * static_cast<double>(peft::count_parameters(*model).total)));
    adapter.detach();
  }
  CHECK(masks[0] == masks[1]);
  CHECK(masks[0] != masks[2]);
}

TEST_CASE("A head that is tied to an embedding counts once, as the head") {
  models::Gpt2ForCausalLM model(models::Gpt2Options()
                                    .vocab_size(11)
                                    .n_positions(8)
                                    .n_embd(4)
                                    .n_layer(1)
                                    .n_head(2));
  const auto total = peft::count_parameters(*model).total;
  auto fish = peft::attach(
      *model,
      peft::FishOptions(0.5).selection("random").modules_to_save({"lm_head"}));
  CHECK(
      fish.num_parameters() ==
      static_cast<int64_t>(0.5 * static_cast<double>(total)));
  fish.detach();
  auto child = peft::attach(
      *model, peft::ChildTuningOptions(0.5).modules_to_save({"lm_head"}));
  CHECK(child.num_parameters() == total);
}

TEST_CASE("FISH mask refuses what would train nothing, or not what it says") {
  auto model = small_bert();
  const auto scores = some_scores(*model);
  const auto before = state_of(*model);
  const auto error = [&](const peft::FishOptions& options) {
    return error_of([&] { peft::attach(*model, options); });
  };
  CHECK(contains(
      error(peft::FishOptions(0.005).fisher(scores).modules_to_save(
          {"classifier"})),
      "modules_to_save alone takes 27 of it"));
  CHECK(contains(
      error(peft::FishOptions(1e-6).fisher(scores)),
      "an empty mask trains nothing"));
  CHECK(contains(error(peft::FishOptions()), "got none; give it .fisher("));
  CHECK(contains(
      error(peft::FishOptions(0.0).fisher(scores)), "keep_ratio must lie in"));
  CHECK(contains(
      error(peft::FishOptions(1.5).fisher(scores)), "keep_ratio must lie in"));
  CHECK(contains(
      error(peft::FishOptions().fisher(scores).semantics("soft")),
      "no semantics 'soft'"));
  CHECK(contains(
      error(peft::FishOptions().fisher(scores).selection("reverse")),
      "no selection 'reverse'"));
  auto wrong = scores;
  wrong[0].first = "bert.embeddings.wrod_embeddings.weight";
  CHECK(contains(
      error(peft::FishOptions(0.05).fisher(wrong)), "is no parameter of this"));
  wrong = scores;
  wrong[0].second = wrong[0].second.t();
  CHECK(contains(error(peft::FishOptions(0.05).fisher(wrong)), "have shape"));
  peft::SparseMask mask;
  mask.set("classifier.weight", torch::tensor({1}, torch::kLong));
  CHECK(contains(
      error(peft::FishOptions().mask(mask).fisher(scores)),
      "a mask and scores"));
  for (const auto* semantics : {"hard", "reference"}) {
    CHECK(contains(
        error(
            peft::FishOptions().mask(mask).semantics(semantics).modules_to_save(
                {"classifier"})),
        "the mask names 'classifier.weight'"));
  }
  CHECK(same_state(before, state_of(*model)));
}

TEST_CASE("Child-tuning D keeps what lies at or above the percentile") {
  const double p = GENERATE(0.3, 0.05, 1.0);
  auto model = small_bert();
  const auto scores = some_scores(*model);
  const auto layers = only(scores, in_layers);
  int64_t n = 0;
  for (const auto& item : layers) {
    n += item.second.numel();
  }
  // numpy: sorted place (1 - p)(n - 1), what lies at or above it is kept.
  const int64_t kept =
      n - static_cast<int64_t>(std::ceil((1 - p) * static_cast<double>(n - 1)));
  for (const auto* semantics : {"hard", "reference"}) {
    auto adapter = peft::attach(
        *model,
        peft::ChildTuningOptions(p).mode("D").fisher(scores).semantics(
            semantics));
    CHECK(mask_of(adapter) == brute_force(layers, kept));
    adapter.detach();
  }
}

TEST_CASE("Equal scores at the percentile: all of them, or the earlier ones") {
  auto model = small_bert();
  peft::Scores scores = some_scores(*model);
  for (auto& item : scores) { // 70 % zeros, as a sparse gradient leaves them
    item.second = torch::where(
        item.second > 0.7, item.second, torch::zeros_like(item.second));
  }
  const auto layers = only(scores, in_layers);
  int64_t n = 0;
  for (const auto& item : layers) {
    n += item.second.numel();
  }
  const auto options = peft::ChildTuningOptions(0.5).mode("D").fisher(scores);
  auto published = peft::attach(
      *model, peft::ChildTuningOptions(options).semantics("reference"));
  CHECK(mask_of(published) == brute_force(layers, n));
  published.detach();
  auto hard = peft::attach(*model, options);
  CHECK(
      mask_of(hard) ==
      brute_force(
          layers,
          n -
              static_cast<int64_t>(
                  std::ceil(0.5 * static_cast<double>(n - 1)))));
}

TEST_CASE("p = 1 is the plain optimizer, bit for bit") {
  const auto mode = GENERATE(as<std::string>(), "F", "D");
  const auto semantics = GENERATE(as<std::string>(), "hard", "reference");
  const bool packed = GENERATE(true, false);
  const auto options = torch::optim::AdamWOptions(1e-2).weight_decay(0.1);
  auto plain = small_bert();
  torch::optim::AdamW plain_optimizer(plain->parameters(), options);
  auto model = small_bert();
  auto child = peft::ChildTuningOptions(1.0).mode(mode).semantics(semantics);
  if (mode == "D") {
    child.fisher(some_scores(*model));
  }
  auto adapter = peft::attach(*model, child);
  peft::MaskedStep masked(adapter);
  torch::optim::AdamW optimizer(
      packed ? masked.parameters() : adapter.parameters(), options);
  for (int step = 0; step < 4; ++step) {
    plain_optimizer.zero_grad();
    optimizer.zero_grad();
    loss_of(plain, step).backward();
    loss_of(model, step).backward();
    masked.step(optimizer);
    plain_optimizer.step();
  }
  peft::merge(*model);
  const auto expected = plain->named_parameters();
  for (const auto& item : model->named_parameters()) {
    INFO(item.key());
    CHECK(equal_bits(item.value().detach(), expected[item.key()].detach()));
  }
}

TEST_CASE("What F's masks add up to: a part p passes, with mean g") {
  // Exact, against masks drawn again from the adapter's own generator.
  torch::nn::Linear net(torch::nn::LinearOptions(50, 40).bias(false));
  auto adapter = peft::attach(*net, peft::ChildTuningOptions(0.3).seed(5));
  const auto& copy = dynamic_cast<const peft::MaskedCopy&>(
      *adapter.shared_state()->sites[0].delta);
  peft::MaskedStep masked(adapter);
  torch::optim::SGD optimizer(masked.parameters(), 1.0);
  Tensor sum = torch::zeros({40, 50}, torch::kDouble), squares = sum.clone();
  const int64_t steps = 200;
  int64_t passed = 0;
  for (int64_t step = 0; step < steps; ++step) {
    const Tensor mask = torch::zeros({40, 50}, torch::kBool);
    mask.bernoulli_(
        0.3,
        at::detail::createCPUGenerator(peft::detail::mix_seed(
            peft::detail::mix_seed(5, 0), static_cast<uint64_t>(step))));
    CHECK(torch::equal(copy.step_mask(), mask));
    optimizer.zero_grad();
    net->forward(torch::ones({1, 50})).sum().backward(); // g = 1
    masked.mask_gradients();
    const Tensor g = copy.value.grad().clone();
    CHECK(torch::equal(g, mask.to(torch::kFloat) / 0.3));
    masked.step(optimizer);
    sum += g.to(torch::kDouble);
    squares += g.to(torch::kDouble).square();
    passed += mask.sum().item<int64_t>();
  }
  // Five standard deviations of a mean of 200 · 2000 draws.
  const double draws = static_cast<double>(steps) * 2000;
  CHECK(
      std::abs(static_cast<double>(passed) / draws - 0.3) <
      5 * std::sqrt(0.3 * 0.7 / draws));
  const double mean = sum.sum().item<double>() / draws;
  const double variance = squares.sum().item<double>() / draws - mean * mean;
  CHECK(std::abs(mean - 1) < 5 * std::sqrt(0.7 / 0.3 / draws));
  CHECK(std::abs(variance - 0.7 / 0.3) < 0.03);
}

TEST_CASE("Child-tuning refuses what has no meaning") {
  auto model = small_bert();
  const auto scores = some_scores(*model);
  const auto before = state_of(*model);
  const auto error = [&](const peft::ChildTuningOptions& options) {
    return error_of([&] { peft::attach(*model, options); });
  };
  for (const double p :
       {0.0, -0.1, 1.1, std::numeric_limits<double>::quiet_NaN()}) {
    CHECK(contains(error({p}), "must lie in (0, 1]"));
  }
  CHECK(
      contains(error(peft::ChildTuningOptions(0.3).mode("G")), "no mode 'G'"));
  CHECK(contains(
      error(peft::ChildTuningOptions(0.3).fisher(scores)),
      "scores and masks are for .mode(\"D\")"));
  CHECK(contains(
      error(peft::ChildTuningOptions(0.3).mode("D")), "got none; give it"));
  CHECK(contains(
      error(peft::ChildTuningOptions(0.3).mode("D").fisher(
          {scores.begin(), scores.begin() + 5})),
      "there are no scores of 'bert.encoder.layer.0"));
  auto nan = scores;
  for (auto& item : nan) {
    item.second =
        item.second.clone().fill_(std::numeric_limits<double>::quiet_NaN());
  }
  CHECK(contains(
      error(peft::ChildTuningOptions(0.3).mode("D").fisher(nan)), "NaN"));
  CHECK(contains(
      error(peft::ChildTuningOptions(0.3).mode("D").fisher(scores).targets(
          {"classifier"})),
      "none that it trains has 'layer' in its path"));
  CHECK(same_state(before, state_of(*model)));
}

TEST_CASE("A file comes back and the next steps are the same to the bit") {
  struct Row {
    std::string name;
    std::function<peft::Adapter(torch::nn::Module&)> attach;
    size_t numbers_in_file;
  };
  auto sizes = small_bert();
  size_t total = 0, layers = 0;
  for (const auto& item : peft::detail::base_parameters(*sizes)) {
    const auto n = static_cast<size_t>(item.second.numel());
    total += n;
    layers += in_layers(item.first) ? n : 0;
  }
  const auto k = static_cast<size_t>(0.05 * static_cast<double>(total)) - 27;
  const auto kept = layers -
      static_cast<size_t>(std::ceil(0.7 * static_cast<double>(layers - 1)));
  std::vector<Row> rows;
  for (const auto* semantics : {"hard", "reference"}) {
    const std::string s = semantics;
    const bool hard = s == "hard";
    rows.push_back(
        {"FISH " + s,
         [s](torch::nn::Module& m) {
           return peft::attach(
               m,
               peft::FishOptions(0.05)
                   .fisher(some_scores(m))
                   .semantics(s)
                   .modules_to_save({"classifier"}));
         },
         hard ? 2 * k + 27 : total + k});
    rows.push_back(
        {"D " + s,
         [s](torch::nn::Module& m) {
           return peft::attach(
               m,
               peft::ChildTuningOptions(0.3)
                   .mode("D")
                   .fisher(some_scores(m))
                   .semantics(s));
         },
         hard ? 2 * kept + total - layers : total + kept});
    rows.push_back(
        {"F " + s,
         [s](torch::nn::Module& m) {
           return peft::attach(
               m,
               peft::ChildTuningOptions(0.3).semantics(s).modules_to_save(
                   {"classifier"}));
         },
         total});
  }
  rows.push_back(
      {"D of chosen modules",
       [](torch::nn::Module& m) {
         return peft::attach(
             m,
             peft::ChildTuningOptions(0.3)
                 .mode("D")
                 .fisher(some_scores(m))
                 .targets(peft::Targets::all_linear())
                 .masked(peft::Targets::regex(".*query.*")));
       },
       0});
  for (const auto& row : rows) {
    INFO(row.name);
    auto model = small_bert(/*dropout=*/true);
    auto adapter = row.attach(*model);
    peft::MaskedStep masked(adapter);
    const auto options = torch::optim::AdamWOptions(1e-2).weight_decay(0.1);
    torch::optim::AdamW optimizer(masked.parameters(), options);
    const auto train = [](auto& m, auto& a, auto& step, auto& o, int64_t from) {
      for (int64_t i = from; i < from + 3; ++i) {
        o.zero_grad();
        const Tensor x = ids(i);
        torch::manual_seed(static_cast<uint64_t>(i)); // dropout's
        torch::cross_entropy_loss(
            m->forward(x), torch::tensor({0, 2, 1, 1}, torch::kLong))
            .backward();
        torch::nn::utils::clip_grad_norm_(a.parameters(), 1.0);
        step.step(o);
      }
    };
    train(model, adapter, masked, optimizer, 0);
    const TemporaryDirectory folder;
    peft::save(adapter, folder.path().string());
    torch::save(optimizer, folder / "optimizer.pt");
    if (row.numbers_in_file > 0) {
      size_t numbers = 0;
      const auto file =
          peft::load_safetensors(folder / "adapter_model.safetensors");
      for (const auto& item : file) {
        numbers += static_cast<size_t>(item.second.numel());
      }
      CHECK(numbers == row.numbers_in_file);
    }

    auto again = small_bert(/*dropout=*/true);
    auto loaded = peft::load(*again, folder.path().string());
    CHECK(loaded.method() == adapter.method());
    CHECK(mask_of(loaded) == mask_of(adapter));
    CHECK(loaded.num_parameters() == adapter.num_parameters());
    model->eval();
    again->eval();
    CHECK(equal_bits(again->forward(ids(9)), model->forward(ids(9))));
    model->train();
    again->train();
    peft::MaskedStep loaded_step(loaded);
    torch::optim::AdamW loaded_optimizer(loaded_step.parameters(), options);
    torch::load(loaded_optimizer, folder / "optimizer.pt");
    train(model, adapter, masked, optimizer, 3);
    train(again, loaded, loaded_step, loaded_optimizer, 3);
    model->eval();
    again->eval();
    CHECK(equal_bits(again->forward(ids(9)), model->forward(ids(9))));
    // And once more, from the loaded one.
    const TemporaryDirectory second;
    peft::save(loaded, second.path().string());
    auto third = small_bert();
    peft::load(*third, second.path().string());
    third->eval();
    CHECK(equal_bits(third->forward(ids(9)), again->forward(ids(9))));
  }
}

TEST_CASE("A masked file that does not fit is refused, whole") {
  auto model = small_bert();
  auto adapter = peft::attach(
      *model,
      peft::ChildTuningOptions(0.3).mode("D").fisher(some_scores(*model)));
  const TemporaryDirectory folder;
  peft::save(adapter, folder.path().string());
  const auto path = folder / "adapter_model.safetensors";
  const auto good = peft::load_safetensors(path);
  const std::string key =
      "base_model.model.bert.encoder.layer.0.attention.self.query.weight";
  const auto error_with = [&](const std::string& name, const Tensor& value) {
    std::vector<std::pair<std::string, Tensor>> list;
    for (const auto& item : good) {
      list.emplace_back(item.first, item.first == name ? value : item.second);
    }
    peft::save_safetensors(list, path, {{"format", "pt"}});
    auto fresh = small_bert();
    const auto before = state_of(*fresh);
    const auto error =
        error_of([&] { peft::load(*fresh, folder.path().string()); });
    CHECK(same_state(before, state_of(*fresh)));
    return error;
  };
  CHECK(contains(
      error_with(key + ".indices", torch::tensor({3, 3}, torch::kLong)),
      "must hold ascending int64 indices"));
  CHECK(contains(
      error_with(key + ".indices", torch::tensor({3, 64}, torch::kLong)),
      "names entry 64"));
  CHECK(contains(
      error_with(key + ".values", torch::zeros({1})), "the file is damaged"));
}

} // namespace test_child_tuning
