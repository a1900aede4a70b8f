#include "model_state.h"
#include "networks.h"
#include "test.h"

#include <peft/io/pretrained.h>
#include <peft/methods/mam.h>
#include <peft/methods/masked.h>
#include <peft/methods/sparse_adapter.h>

#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace test_sparse_adapter {

using peft::PruneOptions;
using torch::Tensor;

namespace {

using peft::models::BertForSequenceClassification;

BertForSequenceClassification bert(uint64_t number = 1) {
  seed(number);
  BertForSequenceClassification model(peft::models::BertOptions()
                                          .vocab_size(40)
                                          .hidden_size(16)
                                          .num_hidden_layers(2)
                                          .num_attention_heads(2)
                                          .intermediate_size(32)
                                          .max_position_embeddings(16));
  model->eval();
  return model;
}

Tensor ids() {
  seed(5);
  return torch::randint(4, 40, {3, 6}, torch::kLong);
}

Tensor run(BertForSequenceClassification& model) {
  return model->forward(ids(), torch::ones({3, 6}, torch::kLong));
}

std::vector<Tensor> weights_of(const peft::Adapter& adapter) {
  std::vector<Tensor> result;
  for (const auto& p : adapter.parameters()) {
    if (p.dim() >= 2) {
      result.push_back(p);
    }
  }
  return result;
}

int64_t count(const std::vector<Tensor>& tensors, bool nonzero) {
  int64_t result = 0;
  for (const auto& t : tensors) {
    result += nonzero ? t.count_nonzero().item<int64_t>() : t.numel();
  }
  return result;
}

std::vector<Tensor> masks(const peft::Adapter& adapter) {
  std::vector<Tensor> result;
  for (const auto& mask :
       peft::detail::masks_of(adapter.shared_state()->sites)) {
    for (const auto& w : mask->weights()) {
      result.push_back(w.kept);
    }
  }
  return result;
}

struct Toy : torch::nn::Module {
  Toy(int64_t in, int64_t hidden, int64_t out)
      : fc1(register_module("fc1", torch::nn::Linear(in, hidden))),
        fc2(register_module("fc2", torch::nn::Linear(hidden, out))) {}
  torch::nn::Linear fc1, fc2;
  Tensor forward(const Tensor& x) {
    return fc2(torch::tanh(fc1(x)));
  }
};

struct Pruned {
  std::shared_ptr<Toy> model;
  peft::Adapter adapter;
  Tensor x, y;

  Pruned() {
    seed(3);
    model = std::make_shared<Toy>(5, 6, 4);
    model->to(torch::kDouble);
    adapter = peft::attach(
        *model,
        peft::Masked(
            peft::LoraOptions(2).init("random").targets({"fc1", "fc2"})));
    x = torch::randn({7, 5}, torch::kDouble);
    y = torch::randn({7, 4}, torch::kDouble);
  }
  Tensor loss() {
    return (model->forward(x) - y).square().mean();
  }
};

} // namespace

TEST_CASE("As many entries stay as the rule says", "[sparse_adapter]") {
  for (const double keep : {0.9, 0.5, 0.3, 0.1, 1.0 / 3, 0.01}) {
    auto model = bert();
    auto adapter = peft::attach(
        *model, peft::SparseAdapterOptions(peft::PfeifferOptions(4), keep));
    const auto weights = weights_of(adapter);
    const int64_t n = count(weights, false);
    CHECK(n == 2 * 2 * 4 * 16);
    const auto left =
        n - static_cast<int64_t>(std::ceil((1.0 - keep) * double(n)));
    CHECK(count(weights, true) == left);
    CHECK(adapter.num_parameters() == left + 2 * (16 + 4));
    CHECK(peft::count_parameters(*model).trainable == adapter.num_parameters());
    int64_t at_sites = 0;
    for (const auto& site : adapter.sites()) {
      at_sites += site.num_parameters;
    }
    CHECK(at_sites == adapter.num_parameters());
  }
}

TEST_CASE(
    "Large-Sparse: k times the width, the same count",
    "[sparse_adapter]") {
  auto dense = bert(), wide = bert();
  auto a = peft::attach(*dense, peft::LoraOptions(2));
  for (const int64_t k : {2, 4}) {
    auto b = peft::attach(
        *wide,
        peft::SparseAdapterOptions(
            peft::LoraOptions(2 * k).init("random"), 1.0 / double(k)));
    CHECK(b.num_parameters() == a.num_parameters());
    b.detach();
  }
}

TEST_CASE("keep = 1 is the dense method to the bit", "[sparse_adapter]") {
  auto one = bert(), other = bert();
  seed(9);
  auto dense = peft::attach(*one, peft::HoulsbyOptions(4));
  seed(9);
  auto masked = peft::attach(
      *other, peft::SparseAdapterOptions(peft::HoulsbyOptions(4), 1.0));
  CHECK(masked.num_parameters() == dense.num_parameters());
  for (auto* adapter : {&dense, &masked}) {
    auto& model = adapter == &dense ? one : other;
    torch::optim::AdamW optimizer(adapter->parameters(), 1e-2);
    for (int i = 0; i < 2; ++i) {
      optimizer.zero_grad();
      run(model).square().mean().backward();
      optimizer.step();
    }
  }
  CHECK(equal_bits(run(one), run(other)));
}

TEST_CASE("Pruned entries stay zero under any optimizer", "[sparse_adapter]") {
  const auto optimizers =
      std::vector<std::function<std::unique_ptr<torch::optim::Optimizer>(
          std::vector<Tensor>)>>{
          [](auto p) {
            return std::make_unique<torch::optim::SGD>(
                p,
                torch::optim::SGDOptions(0.1)
                    .momentum(0.9)
                    .weight_decay(0.1)
                    .nesterov(true));
          },
          [](auto p) {
            return std::make_unique<torch::optim::Adam>(
                p, torch::optim::AdamOptions(0.1).weight_decay(0.1));
          },
          [](auto p) {
            return std::make_unique<torch::optim::AdamW>(
                p, torch::optim::AdamWOptions(0.1).weight_decay(0.1));
          },
          [](auto p) {
            return std::make_unique<torch::optim::RMSprop>(
                p, torch::optim::RMSpropOptions(0.01).momentum(0.9));
          }};
  const std::vector<peft::AnyOptions> inner{
      peft::LoraOptions(4).init("random").dropout(0.1),
      peft::HoulsbyOptions(4),
      peft::PfeifferOptions(4),
      peft::ParallelAdapterOptions(4).learned_scaling(true)};
  for (const auto& options : inner) {
    for (const auto& make : optimizers) {
      auto model = bert();
      auto adapter =
          peft::attach(*model, peft::SparseAdapterOptions(options, 0.4));
      randomise(adapter);
      peft::prune(adapter, PruneOptions("magnitude", 0.3));
      const auto kept = masks(adapter);
      const auto weights = weights_of(adapter);
      REQUIRE(kept.size() == weights.size());
      std::vector<Tensor> before;
      for (const auto& w : weights) {
        before.push_back(w.detach().clone());
      }
      auto optimizer = make(adapter.parameters());
      model->train();
      for (int step = 0; step < 4; ++step) {
        optimizer->zero_grad();
        for (int part = 0; part < 2; ++part) { // accumulated
          run(model).square().mean().backward();
        }
        torch::nn::utils::clip_grad_norm_(adapter.parameters(), 0.5);
        optimizer->step();
      }
      bool moved = false;
      for (size_t i = 0; i < weights.size(); ++i) {
        const Tensor gone = kept[i].logical_not();
        const Tensor zero = weights[i].detach().masked_select(gone);
        CHECK(equal_bits(zero, torch::zeros_like(zero)));
        const Tensor g = weights[i].grad().masked_select(gone);
        CHECK(equal_bits(g, torch::zeros_like(g)));
        moved = moved || !torch::equal(weights[i], before[i]);
        CHECK(gone.any().item<bool>());
      }
      CHECK(moved);
    }
  }
}

TEST_CASE("A masked adapter merges as its masked factors", "[sparse_adapter]") {
  Pruned p;
  peft::prune(p.adapter, PruneOptions("rand", 0.5).seed(4));
  const Tensor expected = p.model->forward(p.x).detach();
  const auto named = p.adapter.named_parameters();
  const Tensor A = named["fc1.lora_A.weight"], B = named["fc1.lora_B.weight"];
  const auto kept = masks(p.adapter);
  CHECK(torch::equal(A * kept[0], A));
  CHECK(torch::equal(B * kept[1], B));
  const Tensor W = peft::base(p.model->fc1->weight).detach().clone();
  const Tensor merged = (W + 4.0 * torch::matmul(B, A)).detach();
  peft::merge(*p.model);
  CHECK(close(p.model->fc1->weight, merged));
  CHECK(close(p.model->forward(p.x), expected));
}

TEST_CASE("Scores are those of their formulas", "[sparse_adapter]") {
  for (const std::string kind : {"magnitude", "snip", "grasp", "synflow"}) {
    Pruned p;
    INFO(kind);
    const auto named = p.adapter.named_parameters();
    const std::vector<Tensor> w{
        named["fc1.lora_A.weight"],
        named["fc1.lora_B.weight"],
        named["fc2.lora_A.weight"],
        named["fc2.lora_B.weight"]};
    // The same network written out, with numeric derivatives.
    const Tensor W1 = peft::base(p.model->fc1->weight).detach().clone();
    const Tensor W2 = peft::base(p.model->fc2->weight).detach().clone();
    const Tensor b1 = p.model->fc1->bias.detach().clone();
    const Tensor b2 = p.model->fc2->bias.detach().clone();
    std::vector<Tensor> v;
    for (const auto& t : w) {
      v.push_back(t.detach().clone());
    }
    const auto loss = [&](const std::vector<Tensor>& u) {
      const Tensor h = torch::tanh(torch::nn::functional::linear(
          p.x, W1 + 4.0 * torch::matmul(u[1], u[0]), b1));
      const Tensor out = torch::nn::functional::linear(
          h, W2 + 4.0 * torch::matmul(u[3], u[2]), b2);
      return (out - p.y).square().mean();
    };
    const auto gradient = [&](std::vector<Tensor> u) {
      for (auto& t : u) {
        t = t.detach().clone().set_requires_grad(true);
      }
      return torch::autograd::grad({loss(u)}, u);
    };
    std::vector<Tensor> expected;
    const auto g = gradient(v);
    for (size_t i = 0; i < v.size(); ++i) {
      if (kind == "magnitude") {
        expected.push_back(v[i].abs());
      } else if (kind == "snip") {
        expected.push_back((v[i] * g[i]).abs());
      } else if (kind == "synflow") {
        // R = Σ s |B| |A| / rows: each weight's share, by hand.
        const size_t pair = i / 2 * 2;
        const Tensor A = v[pair].abs(), B = v[pair + 1].abs();
        const Tensor through = 4.0 * A.sum(1) * B.sum(0) / double(B.size(0));
        expected.push_back(
            i % 2 == 0 ? through.unsqueeze(1) * A / A.sum(1, true)
                       : through.unsqueeze(0) * B / B.sum(0, true));
      } else {
        // H g by central differences along g.
        const double step = 1e-5;
        std::vector<Tensor> above, below;
        for (size_t j = 0; j < v.size(); ++j) {
          above.push_back(v[j] + step * g[j]);
          below.push_back(v[j] - step * g[j]);
        }
        expected.push_back(
            v[i] * (gradient(above)[i] - gradient(below)[i]) / (2 * step));
      }
    }
    auto weights = peft::detail::weights_to_score(
        p.adapter.shared_state()->sites,
        [](const peft::detail::SiteRecord& site) {
          return peft::detail::lock_site(site)->sizes;
        });
    const auto scores = peft::detail::pruning_scores(
        kind,
        weights,
        {[&] { return p.loss(); }},
        at::detail::createCPUGenerator(0));
    REQUIRE(scores.size() == expected.size());
    std::vector<Tensor> all, flat;
    for (size_t i = 0; i < scores.size(); ++i) {
      CHECK(
          close(scores[i], expected[i], 1e-6, kind == "grasp" ? 1e-8 : 1e-11));
      flat.push_back(scores[i].reshape({-1}));
      CHECK(torch::equal(w[i], v[i])); // left as they were
    }
    // The published choice: above the ceil((1 - keep) N)-th lowest.
    const double keep = 0.35;
    const auto left = peft::prune(
        p.adapter, PruneOptions(kind, keep), {[&] { return p.loss(); }});
    const Tensor joined = torch::cat(flat);
    const auto k =
        static_cast<int64_t>(std::ceil((1.0 - keep) * joined.numel()));
    const Tensor threshold = std::get<0>(joined.kthvalue(k));
    CHECK(left == joined.numel() - k);
    const auto kept = masks(p.adapter);
    for (size_t i = 0; i < scores.size(); ++i) {
      CHECK(torch::equal(kept[i], scores[i] > threshold));
      CHECK(torch::equal(w[i], v[i] * kept[i]));
    }
  }
}

TEST_CASE("The masks are the published ones", "[sparse_adapter]") {
  const auto file = peft::load_safetensors(
      golden("../../reference/data/unified/sparse.safetensors"));
  for (const std::string kind : {"snip", "grasp", "magnitude"}) {
    for (const int64_t rounds : {1, 3}) {
      INFO(kind << ", " << rounds << " rounds");
      auto model = std::make_shared<Toy>(4, 5, 3);
      model->to(torch::kDouble);
      {
        torch::NoGradGuard no_grad;
        for (auto& item : model->named_parameters()) {
          item.value().copy_(file.at("base." + item.key()));
        }
      }
      auto adapter = peft::attach(
          *model,
          peft::Masked(peft::LoraOptions(2).alpha(4).targets({"fc1", "fc2"})));
      {
        torch::NoGradGuard no_grad;
        for (auto& item : adapter.named_parameters()) {
          item.value().copy_(file.at("start." + item.key()));
        }
      }
      const auto batch = [&](int64_t i) {
        return [&, i] {
          return (model->forward(file.at("x")[i]) - file.at("y")[i])
              .square()
              .mean();
        };
      };
      peft::prune(
          adapter,
          PruneOptions(kind, 0.4).iterations(rounds),
          {batch(0), batch(1)});
      const auto kept = masks(adapter);
      size_t next = 0;
      for (const auto& item : adapter.named_parameters()) {
        const Tensor mask = file.at(
            "mask." + kind + "." + std::to_string(rounds) + "." + item.key());
        CHECK(torch::equal(kept[next++], mask.to(torch::kBool)));
        CHECK(
            torch::equal(item.value(), file.at("start." + item.key()) * mask));
      }
      CHECK(next == 4);
    }
  }
}

TEST_CASE("SynFlow of a bottleneck", "[sparse_adapter]") {
  auto model = bert();
  model->to(torch::kDouble);
  auto adapter = peft::attach(*model, peft::Masked(peft::PfeifferOptions(4)));
  randomise(adapter);
  auto weights = peft::detail::weights_to_score(
      adapter.shared_state()->sites, [](const peft::detail::SiteRecord& site) {
        return peft::detail::lock_site(site)->sizes;
      });
  const auto scores = peft::detail::synflow_scores(weights);
  for (size_t i = 0; i < weights.size(); i += 2) {
    const auto& bottleneck =
        dynamic_cast<const peft::detail::BottleneckDelta&>(*weights[i].delta)
            .bottleneck;
    const Tensor down = bottleneck->down_weight.detach().abs();
    const Tensor up = bottleneck->up_weight.detach().abs();
    const Tensor hidden = down.sum(1) + bottleneck->down_bias.detach().abs();
    const Tensor onward = up.sum(0) / 16.0;
    CHECK(close(scores[i], onward.unsqueeze(1) * down));
    CHECK(close(scores[i + 1], up * hidden / 16.0));
  }
}

TEST_CASE("Rounds follow the exponential schedule", "[sparse_adapter]") {
  // By hand: each round scores w ⊙ m of the round before, over all entries.
  Pruned p;
  const auto named = p.adapter.named_parameters();
  const auto w = weights_of(p.adapter);
  std::vector<Tensor> start, kept;
  for (const auto& t : w) {
    start.push_back(t.detach().clone());
    kept.push_back(torch::ones_like(t, torch::kBool));
  }
  Pruned twin; // unmasked gradients of the same network
  const auto leaves = weights_of(twin.adapter);
  for (int round = 1; round <= 3; ++round) {
    {
      torch::NoGradGuard no_grad;
      for (size_t i = 0; i < w.size(); ++i) {
        leaves[i].copy_(start[i] * kept[i]);
      }
    }
    const auto g = torch::autograd::grad({twin.loss()}, leaves);
    std::vector<Tensor> flat;
    for (size_t i = 0; i < w.size(); ++i) {
      flat.push_back((g[i] * start[i]).abs().reshape({-1}));
    }
    const Tensor all = torch::cat(flat);
    const auto k = static_cast<int64_t>(
        std::ceil((1.0 - std::pow(0.2, round / 3.0)) * all.numel()));
    const Tensor threshold = std::get<0>(all.kthvalue(k));
    for (size_t i = 0; i < w.size(); ++i) {
      kept[i] = (g[i] * start[i]).abs() > threshold;
    }
  }
  peft::prune(p.adapter, PruneOptions("snip", 0.2).iterations(3), {[&] {
                return p.loss();
              }});
  const auto found = masks(p.adapter);
  for (size_t i = 0; i < w.size(); ++i) {
    CHECK(torch::equal(found[i], kept[i]));
    CHECK(torch::equal(w[i], start[i] * kept[i]));
  }
  // Several batches count as their sum, whatever is split how.
  Pruned whole, split;
  const auto half = [&](int64_t begin, int64_t end) {
    return [&split, begin, end] {
      return (split.model->forward(split.x.slice(0, begin, end)) -
              split.y.slice(0, begin, end))
                 .square()
                 .sum() /
          split.y.numel();
    };
  };
  for (const std::string kind : {"snip", "grasp"}) {
    peft::prune(
        whole.adapter, PruneOptions(kind, 0.5), {[&] { return whole.loss(); }});
    peft::prune(
        split.adapter, PruneOptions(kind, 0.5), {half(0, 3), half(3, 7)});
    const auto a = masks(whole.adapter), b = masks(split.adapter);
    for (size_t i = 0; i < a.size(); ++i) {
      CHECK(torch::equal(a[i], b[i]));
    }
    whole = Pruned();
    split = Pruned();
  }
}

TEST_CASE("Ties: the first win, or none as published", "[sparse_adapter]") {
  for (const bool drop : {false, true}) {
    Pruned p;
    {
      torch::NoGradGuard no_grad;
      for (auto& t : weights_of(p.adapter)) {
        t.fill_(0.5);
      }
      weights_of(p.adapter)[2].slice(1, 0, 3).fill_(1.0);
    }
    // N = 10 + 12 + 12 + 8 = 42, of which 6 are larger.
    const auto left =
        peft::prune(p.adapter, PruneOptions("magnitude", 0.5).drop_ties(drop));
    CHECK(left == (drop ? 6 : 21));
    const auto kept = masks(p.adapter);
    CHECK(kept[2].sum().item<int64_t>() == (drop ? 6 : 6 + 0));
    CHECK(kept[0].sum().item<int64_t>() == (drop ? 0 : 10));
    CHECK(kept[1].flatten().slice(0, 0, 5).all().item<bool>() == !drop);
    CHECK(kept[1].sum().item<int64_t>() == (drop ? 0 : 5));
    CHECK(kept[3].sum().item<int64_t>() == 0);
  }
}

TEST_CASE("Pruning that cannot be is refused, unchanged", "[sparse_adapter]") {
  Pruned p;
  const auto w = weights_of(p.adapter);
  std::vector<Tensor> before;
  for (const auto& t : w) {
    before.push_back(t.detach().clone());
  }
  const auto refused = [&](const PruneOptions& options,
                           const peft::PruningLosses& losses = {}) {
    const auto text =
        error_of([&] { peft::prune(p.adapter, options, losses); });
    for (size_t i = 0; i < w.size(); ++i) {
      CHECK(equal_bits(w[i].detach(), before[i]));
    }
    for (const auto& kept : masks(p.adapter)) {
      CHECK(kept.all().item<bool>());
    }
    return text;
  };
  CHECK(contains(refused(PruneOptions("rand", 0.01)), "an empty mask"));
  CHECK(contains(refused(PruneOptions("rand", 0.0)), "must lie in (0, 1]"));
  CHECK(contains(refused(PruneOptions("rand", 1.5)), "must lie in (0, 1]"));
  CHECK(contains(refused(PruneOptions("best", 0.5)), "choose among rand"));
  CHECK(contains(
      refused(PruneOptions("rand", 0.5).iterations(0)), "1 iteration or more"));
  CHECK(contains(refused(PruneOptions("snip", 0.5)), "hand prune() a loss"));
  CHECK(contains(
      refused(PruneOptions("snip", 0.5), {[] {
                return torch::ones({}, torch::kDouble);
              }}),
      "does not depend on the adapter"));
  CHECK(contains(
      refused(
          PruneOptions("snip", 0.5), {[&] { return p.model->forward(p.x); }}),
      "must be one number"));
  // All of one size: the published rule drops the lot.
  {
    torch::NoGradGuard no_grad;
    for (size_t i = 0; i < w.size(); ++i) {
      Tensor(w[i]).fill_(0.5);
      before[i].fill_(0.5);
    }
  }
  CHECK(contains(
      refused(PruneOptions("magnitude", 0.5).drop_ties(true)),
      "an empty mask"));

  // A LoRA whose B is zero: no gradient score tells entries apart.
  auto model = bert();
  auto adapter = peft::attach(*model, peft::Masked(peft::LoraOptions(2)));
  CHECK(contains(
      error_of([&] {
        peft::prune(adapter, PruneOptions("snip", 0.5), {[&] {
                      return run(model).square().mean();
                    }});
      }),
      "every score is zero"));
  adapter.detach();
  auto plain = peft::attach(*model, peft::LoraOptions(2));
  CHECK(contains(
      error_of([&] { peft::prune(plain); }), "has no masks to prune by"));
  plain.detach();
  const auto state = state_of(*model);
  CHECK(contains(
      error_of(
          [&] { peft::attach(*model, peft::Masked(peft::BitFitOptions())); }),
      "needs weights of two dimensions"));
  for (const bool dora : {false, true}) {
    CHECK(contains(
        error_of([&] {
          peft::attach(
              *model,
              peft::Masked(peft::LoraOptions(2).init("pissa").dora(dora)));
        }),
        "cannot be masked: it starts as a part of the weight"));
  }
  CHECK(contains(
      error_of([&] {
        peft::attach(
            *model, peft::SparseAdapterOptions(peft::LoraOptions(2), 1e-6));
      }),
      "an empty mask"));
  CHECK(same_state(state, state_of(*model)));
  Pruned broken;
  {
    torch::NoGradGuard no_grad;
    broken.adapter.parameters()[0].fill_(INFINITY);
  }
  CHECK(contains(
      error_of(
          [&] { peft::prune(broken.adapter, PruneOptions("synflow", 0.5)); }),
      "is inf; look for"));
}

TEST_CASE("Pruning again prunes what is left", "[sparse_adapter]") {
  Pruned p;
  CHECK(peft::prune(p.adapter, PruneOptions("rand", 0.5)) == 21);
  const auto before = masks(p.adapter);
  std::vector<Tensor> copies;
  for (const auto& t : before) {
    copies.push_back(t.clone());
  }
  CHECK(peft::prune(p.adapter, PruneOptions("rand", 0.25).seed(7)) == 10);
  const auto after = masks(p.adapter);
  for (size_t i = 0; i < after.size(); ++i) {
    CHECK(
        after[i].logical_and(copies[i].logical_not()).sum().item<int64_t>() ==
        0);
  }
  CHECK(contains(
      error_of([&] { peft::prune(p.adapter, PruneOptions("rand", 0.5)); }),
      "are left by earlier pruning"));
}

TEST_CASE("Files: zeros for all, masks for training", "[sparse_adapter]") {
  const std::vector<peft::AnyOptions> inner{
      peft::LoraOptions(4).init("random"),
      peft::HoulsbyOptions(4),
      peft::PfeifferOptions(4),
      peft::ParallelAdapterOptions(4),
      peft::MamOptions()
          .prefix(peft::PrefixOptions(2))
          .adapter(peft::ParallelAdapterOptions(4))};
  for (const auto& options : inner) {
    auto model = bert();
    auto adapter =
        peft::attach(*model, peft::SparseAdapterOptions(options, 0.5));
    torch::optim::SGD first(adapter.parameters(), 0.1);
    run(model).square().mean().backward();
    first.step();
    const TemporaryDirectory folder;
    peft::save(adapter, folder.path().string());
    const auto y = run(model);

    auto copy = peft::clone(model);
    CHECK(equal_bits(run(copy), y));
    auto fresh = bert();
    auto again = peft::load(*fresh, folder.path().string());
    CHECK(again.method() == "MASKED");
    CHECK(equal_bits(run(fresh), y));
    CHECK(again.num_parameters() == adapter.num_parameters());
    for (auto* m : {&model, &copy, &fresh}) {
      auto mine = peft::get_adapter(**m);
      torch::optim::AdamW optimizer(mine.parameters(), 0.1);
      for (int i = 0; i < 2; ++i) {
        optimizer.zero_grad();
        run(*m).square().mean().backward();
        optimizer.step();
      }
      const auto a = masks(adapter), b = masks(mine);
      for (size_t i = 0; i < a.size(); ++i) {
        CHECK(torch::equal(a[i], b[i]));
        CHECK_FALSE(
            a[i].data_ptr() == (m == &model ? nullptr : b[i].data_ptr()));
      }
    }
    CHECK(equal_bits(run(model), run(copy)));
    CHECK(equal_bits(run(model), run(fresh)));
    const TemporaryDirectory second; // a loaded one is saved again
    peft::save(again, second.path().string());
    auto third = bert();
    peft::load(*third, second.path().string());
    CHECK(equal_bits(run(third), run(fresh)));
  }
  // To a reader without masks it is the method itself.
  auto model = bert();
  auto adapter = peft::attach(
      *model, peft::SparseAdapterOptions(peft::LoraOptions(4), 0.5));
  const TemporaryDirectory folder;
  peft::save(adapter, folder.path().string());
  const auto config = peft::AdapterConfig::read(folder / "adapter_config.json");
  CHECK(config.peft_type() == "LORA");
  CHECK(config.get<int64_t>("r") == 4);
}

TEST_CASE("Masks follow the network's dtype", "[sparse_adapter]") {
  auto model = bert();
  auto adapter = peft::attach(
      *model, peft::SparseAdapterOptions(peft::PfeifferOptions(4), 0.5));
  const auto trained = adapter.num_parameters();
  model->to(torch::kDouble);
  CHECK(adapter.num_parameters() == trained);
  torch::optim::AdamW optimizer(adapter.parameters(), 0.1);
  run(model).square().mean().backward();
  optimizer.step();
  CHECK(count(weights_of(adapter), true) == trained - 2 * (16 + 4));
  adapter.set_trainable(false);
  auto copy = peft::clone(model);
  auto twin = peft::get_adapter(*copy);
  CHECK_FALSE(twin.parameters()[0].requires_grad());
  twin.set_trainable(true);
  run(copy).square().mean().backward();
  const auto kept = masks(twin);
  const auto weights = weights_of(twin);
  for (size_t i = 0; i < weights.size(); ++i) {
    CHECK(weights[i]
              .grad()
              .masked_select(kept[i].eq(0))
              .eq(0)
              .all()
              .item<bool>());
  }
}

} // namespace test_sparse_adapter
