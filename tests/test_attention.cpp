// What both decoders share: causality, padding, the cache, and the call sites
// of extra tokens and of the loop over layers.

#include "decoders.h"

#include <peft/core/extra_tokens.h>
#include <peft/core/layer_loop.h>
#include <peft/models/attention.h>

#include <functional>
#include <memory>
#include <utility>
#include <vector>

namespace test_attention {

namespace {

using decoders::Gpt2;
using decoders::Llama;
using peft::KeyValues;
using peft::LayerCall;
using peft::models::causal_attention;
using peft::models::causal_mask;
using torch::Tensor;

/// softmax(q kᵀ / √d) v, sum by sum; a query that may look nowhere gives zeros.
Tensor attention_by_hand(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& padding) {
  const auto queries = q.size(2), keys = k.size(2), heads = q.size(1);
  auto result =
      torch::zeros({q.size(0), queries, heads, q.size(3)}, q.options());
  for (int64_t b = 0; b < q.size(0); ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      const auto shared = h / (heads / k.size(1));
      for (int64_t i = 0; i < queries; ++i) {
        Tensor weights = torch::zeros({keys}, q.options());
        for (int64_t j = 0; j <= i + keys - queries; ++j) {
          if (!padding.defined() || padding[b][j].item<int64_t>() != 0) {
            weights[j] =
                (q[b][h][i].dot(k[b][shared][j]) / std::sqrt(q.size(3))).exp();
          }
        }
        const double total = weights.sum().item<double>();
        if (total > 0) {
          result[b][i][h] = (weights / total).matmul(v[b][shared]);
        }
      }
    }
  }
  return result.flatten(2);
}

/// Hangs `delta` on a call site for as long as this lives.
template <class CallSite, class Delta>
class Hung {
 public:
  Hung(const CallSite& where, std::shared_ptr<Delta> hung)
      : delta(std::move(hung)), entries_(&where->site()->entries) {
    auto state = std::make_shared<peft::detail::AdapterState>();
    state->name = "test";
    entries_->push_back({state, this->delta});
  }
  ~Hung() {
    entries_->clear();
  }
  Hung(const Hung&) = delete;
  Hung& operator=(const Hung&) = delete;

  std::shared_ptr<Delta> delta;

 private:
  std::vector<peft::detail::Entry>* entries_;
};

template <class Base>
struct Unsaved : Base {
  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    return {};
  }
  std::shared_ptr<peft::Delta> copy() const override {
    return nullptr;
  }
  std::string describe() const override {
    return "test";
  }
};

struct Prompt : Unsaved<peft::TokensDelta> {
  Tensor rows;

  int64_t num_virtual_tokens() const override {
    return rows.size(0);
  }
  Tensor embeddings(double /*scale*/) const override {
    return rows;
  }
};

struct Prefix : Unsaved<peft::TokensDelta> {
  KeyValues stored;
  int64_t count = 0;

  int64_t num_virtual_tokens() const override {
    return count;
  }
  KeyValues key_values(double /*scale*/) const override {
    return stored;
  }
};

/// Runs each layer on some of the tokens, which look at all, and notes how far
/// that is from what the layer makes of these tokens in the whole.
struct Picker : Unsaved<peft::LoopDelta> {
  Tensor picked; // [batch, k]
  mutable std::vector<Comparison> found;

  Tensor layer(
      const LayerCall& call,
      const peft::LayerLoopRun& /*loop*/,
      const std::function<Tensor(const LayerCall&)>& below,
      double /*scale*/) const override {
    const auto whole = below(call);
    auto part = call;
    part.tokens = picked;
    const auto index =
        picked.unsqueeze(-1).expand({-1, -1, call.hidden.size(2)});
    part.hidden = call.hidden.gather(1, index);
    found.push_back(close(below(part), whole.gather(1, index)));
    return whole;
  }
};

/// Answers with a narrow block that reads half of the last layer's result.
struct Side : Unsaved<peft::LoopDelta> {
  std::shared_ptr<torch::nn::Module> block;

  bool answers() const override {
    return true;
  }
  peft::LayerLoopOutput answer(
      const std::vector<Tensor>& states,
      const peft::LayerLoopRun& loop,
      double /*scale*/) const override {
    const auto halves = states.back().chunk(2, -1);
    LayerCall call;
    call.side = true;
    call.hidden = halves[0];
    call.context = call.hidden;
    return {at::cat({loop.run(*block, call), halves[1]}, -1), {}};
  }
};

/// Feeds the columns of `ids` in pieces, with a cache between them.
template <class Model>
Tensor in_pieces(
    Model& model,
    const Tensor& ids,
    const Tensor& mask,
    const Tensor& positions,
    const std::vector<int64_t>& pieces) {
  KeyValues cache;
  std::vector<Tensor> outputs;
  int64_t begin = 0;
  for (const auto length : pieces) {
    const auto end = begin + length;
    const auto part = [&](const Tensor& t, int64_t from) {
      return t.defined() ? t.slice(1, from, end) : t;
    };
    outputs.push_back(model->forward(
        part(ids, begin), part(mask, 0), part(positions, begin), &cache));
    begin = end;
  }
  REQUIRE(begin == ids.size(1));
  return at::cat(outputs, 1);
}

Tensor some_ids(int64_t batch, int64_t length) {
  seed(3);
  return torch::randint(4, 48, {batch, length}, torch::kLong);
}

} // namespace

TEST_CASE("Causal attention equals its definition", "[attention]") {
  seed();
  const auto random = [](int64_t heads, int64_t length) {
    return torch::randn({2, heads, length, 6}, torch::kDouble);
  };
  const auto padding =
      torch::tensor({{0, 0, 1, 1, 1, 1, 1}, {1, 1, 1, 1, 1, 1, 0}});
  for (const int64_t shared : {4, 2, 1}) {
    for (const int64_t queries : {1, 3, 7}) {
      INFO(shared << " heads of keys, " << queries << " queries");
      const auto q = random(4, queries);
      const auto k = random(shared, 7), v = random(shared, 7);
      REQUIRE(close(
          causal_attention(q, k, v, {}, 0), attention_by_hand(q, k, v, {})));
      REQUIRE(close(
          causal_attention(
              q, k, v, causal_mask(padding, queries, 7, torch::kCPU), 0),
          attention_by_hand(q, k, v, padding)));
    }
  }
}

TEST_CASE("A mask aligns its queries with the last keys", "[attention]") {
  const auto padding = torch::tensor({{1, 1, 1, 1}, {0, 1, 1, 1}});
  const auto mask = causal_mask(padding, 2, 4, torch::kCPU);
  REQUIRE(torch::equal(
      mask.squeeze(1).to(torch::kLong),
      torch::tensor(
          {{{1, 1, 1, 0}, {1, 1, 1, 1}}, {{0, 1, 1, 0}, {0, 1, 1, 1}}})));
}

TEMPLATE_TEST_CASE(
    "No token sees what comes after it",
    "[attention]",
    Gpt2,
    Llama) {
  auto model = decoders::load<TestType>();
  const auto ids = some_ids(1, 8);
  for (const bool masked : {false, true}) {
    const auto mask = masked ? torch::ones_like(ids) : Tensor();
    const auto before = model->forward(ids, mask);
    auto changed = ids.clone();
    changed.slice(1, 5) = 1;
    const auto after = model->forward(changed, mask);
    REQUIRE(close(after.slice(1, 0, 5), before.slice(1, 0, 5)));
    REQUIRE_FALSE(close(after.slice(1, 5), before.slice(1, 5)));
  }
}

TEMPLATE_TEST_CASE(
    "Padding on either side changes no token's result",
    "[attention]",
    Gpt2,
    Llama) {
  auto model = decoders::load<TestType>();
  const auto row = some_ids(1, 5);
  const auto alone = model->forward(row);
  for (const bool left : {true, false}) {
    const auto pad = [&](const Tensor& t) {
      return torch::constant_pad_nd(
          t, left ? std::vector<int64_t>{3, 0} : std::vector<int64_t>{0, 3}, 0);
    };
    const auto mask = pad(torch::ones_like(row));
    const auto positions = (mask.cumsum(1) - 1).clamp_min(0);
    const auto padded = model->forward(pad(row), mask, positions);
    REQUIRE(close(padded.narrow(1, left ? 3 : 0, 5), alone));
    REQUIRE(padded.isfinite().all().template item<bool>());
  }
}

TEMPLATE_TEST_CASE(
    "Rows of padding give finite results and gradients",
    "[attention]",
    Gpt2,
    Llama) {
  auto model = decoders::load<TestType>();
  const auto ids = some_ids(2, 6);
  auto mask = torch::ones_like(ids);
  mask[0].slice(0, 0, 4) = 0;
  mask[1] = 0; // a row that a data set filled up
  const auto logits = model->forward(ids, mask);
  REQUIRE(logits.isfinite().all().template item<bool>());
  logits.square().sum().backward();
  for (const auto& item : model->named_parameters()) {
    INFO(item.key());
    if (item.value().grad().defined()) {
      REQUIRE(item.value().grad().isfinite().all().template item<bool>());
    }
  }
}

TEMPLATE_TEST_CASE(
    "Pieces with a cache give what the whole gives",
    "[attention]",
    Gpt2,
    Llama) {
  auto model = decoders::load<TestType>();
  const auto ids = some_ids(2, 9);
  auto mask = torch::ones_like(ids);
  mask[1].slice(0, 0, 4) = 0;
  const auto positions = (mask.cumsum(1) - 1).clamp_min(0);
  const auto whole = model->forward(ids);
  const auto masked = model->forward(ids, mask, positions);
  const std::vector<std::vector<int64_t>> divisions{
      {9}, {4, 3, 2}, {1, 8}, {1, 1, 1, 1, 1, 1, 1, 1, 1}};
  for (const auto& pieces : divisions) {
    REQUIRE(close(in_pieces(model, ids, {}, {}, pieces), whole));
    REQUIRE(close(
        decoders::without_padding(
            in_pieces(model, ids, mask, positions, pieces), mask),
        decoders::without_padding(masked, mask)));
  }
}

TEMPLATE_TEST_CASE(
    "A prompt of tokens' embeddings acts as these tokens",
    "[attention]",
    Gpt2,
    Llama) {
  auto model = decoders::load<TestType>();
  const auto ids = some_ids(1, 9);
  const auto own = ids.slice(1, 3);
  const auto whole = model->forward(ids);
  auto prompt = std::make_shared<Prompt>();
  prompt->rows = TestType::embed(model, ids[0].slice(0, 0, 3)).detach();
  const Hung hung(TestType::base(model)->extra_tokens, prompt);

  REQUIRE(close(model->forward(own), whole));
  REQUIRE(close(model->forward(own, torch::ones_like(own)), whole));
  const auto pad = [](const Tensor& t) {
    return torch::constant_pad_nd(t, {2, 0}, 0);
  };
  const auto mask = pad(torch::ones_like(own));
  const auto positions = (mask.cumsum(1) - 1).clamp_min(0);
  const auto padded = model->forward(pad(own), mask, positions);
  REQUIRE(close(padded.slice(1, 5), whole.slice(1, 3)));
  for (const auto& m : {Tensor(), torch::ones_like(own)}) {
    REQUIRE(close(in_pieces(model, own, m, {}, {3, 2, 1}), whole));
  }
}

TEMPLATE_TEST_CASE(
    "A prefix of tokens' keys and values acts as these tokens",
    "[attention]",
    Gpt2,
    Llama) {
  auto model = decoders::load<TestType>();
  const auto ids = some_ids(1, 9);
  const auto own = ids.slice(1, 3);
  const auto whole = model->forward(ids).slice(1, 3);
  KeyValues cache;
  model->forward(ids.slice(1, 0, 3), {}, {}, &cache);
  auto prefix = std::make_shared<Prefix>();
  prefix->count = 3;
  for (size_t i = 0; i < cache.keys.size(); ++i) {
    prefix->stored.keys.push_back(cache.keys[i][0].detach());
    prefix->stored.values.push_back(cache.values[i][0].detach());
  }
  const Hung hung(TestType::base(model)->extra_tokens, prefix);

  REQUIRE(close(model->forward(own), whole));
  REQUIRE(close(model->forward(own, torch::ones_like(own)), whole));
  const auto pad = [](const Tensor& t) {
    return torch::constant_pad_nd(t, {2, 0}, 0);
  };
  const auto mask = pad(torch::ones_like(own));
  const auto positions = (mask.cumsum(1) - 1).clamp_min(0);
  REQUIRE(close(model->forward(pad(own), mask, positions).slice(1, 2), whole));
  for (const auto& m : {Tensor(), torch::ones_like(own)}) {
    REQUIRE(close(in_pieces(model, own, m, {}, {3, 2, 1}), whole));
  }
}

TEMPLATE_TEST_CASE(
    "A layer without the others' prefix looks at its own tokens",
    "[attention]",
    Gpt2,
    Llama) {
  auto model = decoders::load<TestType>();
  const auto ids = some_ids(1, 9);
  const auto own = ids.slice(1, 3);
  KeyValues prefix;
  model->forward(ids.slice(1, 0, 3), {}, {}, &prefix);
  prefix.grows = false;
  prefix.virtual_tokens = 3;
  const auto both = model->forward(own, {}, {}, &prefix);
  prefix.keys[1] = prefix.values[1] = Tensor();
  const auto one = model->forward(own, {}, {}, &prefix);
  REQUIRE_FALSE(close(one, both));
  REQUIRE(close(model->forward(own, torch::ones_like(own), {}, &prefix), one));
}

TEMPLATE_TEST_CASE(
    "A layer makes of picked tokens what it makes of them in the whole",
    "[attention]",
    Gpt2,
    Llama) {
  auto model = decoders::load<TestType>();
  const auto ids = some_ids(2, 7);
  auto mask = torch::ones_like(ids);
  mask[1].slice(0, 0, 2) = 0;
  auto picker = std::make_shared<Picker>();
  picker->picked = torch::tensor({{0, 3, 6}, {2, 4, 5}}, torch::kLong);
  KeyValues prefix;
  model->forward(ids, {}, {}, &prefix);
  prefix.grows = false;
  const Hung hung(TestType::base(model)->layer_loop, picker);
  model->forward(ids);
  model->forward(ids, mask);
  model->forward(ids, {}, {}, &prefix);
  picker->picked = torch::zeros({2, 1}, torch::kLong);
  model->forward(ids.slice(1, 0, 1), {}, {}, &prefix);
  REQUIRE(picker->found.size() == 8);
  for (const auto& comparison : picker->found) {
    REQUIRE(comparison);
  }
}

TEMPLATE_TEST_CASE(
    "A side network has narrow blocks and a place in the cache",
    "[attention]",
    Gpt2,
    Llama) {
  auto model = decoders::load<TestType>();
  auto& base = *TestType::base(model);
  auto side = std::make_shared<Side>();
  seed();
  side->block = base.layer_loop->options.side_block()(0, 2);
  model->to(torch::kDouble);
  side->block->to(torch::kDouble);
  auto norm = base.layer_loop->options.side_norm()(2);
  const auto narrow = torch::randn({1, 2, 8});
  REQUIRE(norm.forward(narrow).sizes() == narrow.sizes());
  const auto wide = torch::randn({1, 2, 16});
  REQUIRE_FALSE(equal_bits(
      base.layer_loop->options.input_norm()(
          *base.layer_loop->options.side_block()(0, 1), wide),
      wide));

  const auto ids = some_ids(2, 9);
  auto mask = torch::ones_like(ids);
  mask[1].slice(0, 0, 4) = 0;
  const auto positions = (mask.cumsum(1) - 1).clamp_min(0);
  const auto plain = model->forward(ids);
  const Hung hung(base.layer_loop, side);
  const auto whole = model->forward(ids);
  REQUIRE_FALSE(close(whole, plain));
  REQUIRE(close(in_pieces(model, ids, {}, {}, {4, 3, 1, 1}), whole));
  REQUIRE(close(
      decoders::without_padding(
          in_pieces(model, ids, mask, positions, {4, 3, 1, 1}), mask),
      decoders::without_padding(model->forward(ids, mask, positions), mask)));
}

TEMPLATE_TEST_CASE(
    "A decoder's inputs that do not fit are named",
    "[attention]",
    Gpt2,
    Llama) {
  auto model = decoders::load<TestType>();
  const auto ids = some_ids(2, 4);
  const auto error = [&](const Tensor& i, const Tensor& m, const Tensor& p) {
    return error_of([&] { model->forward(i, m, p); });
  };
  CHECK(contains(error(ids[0], {}, {}), "[batch, length], got [4]"));
  CHECK(contains(
      error(ids, torch::ones({2, 5}), {}), "4 new tokens, [2, 4], got [2, 5]"));
  CHECK(contains(
      error(ids, {}, torch::zeros({2, 3}, torch::kLong)), "got [2, 3]"));
  KeyValues cache;
  model->forward(ids, {}, {}, &cache);
  CHECK(contains(
      error_of([&] {
        model->forward(ids, torch::ones({2, 4}), {}, &cache);
      }),
      "4 cached and 4 new tokens, [2, 8], got [2, 4]"));
}

} // namespace test_attention
