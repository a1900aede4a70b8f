/// merge and unmerge: to the bit, in any order, or not at all.

#include "adapted.h"
#include "accounting.h"
#include "model_state.h"
#include "networks.h"
#include "test.h"

#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace test_merge {

namespace {

using adapted::acting;
using adapted::lora;
using networks::Mlp;
using peft::Adapter;
using peft::LoraOptions;
using torch::Tensor;
using Names = std::vector<std::string>;
namespace nn = torch::nn;

/// A layer of each kind behind one call.
struct Kind {
  std::string name;
  std::shared_ptr<nn::Module> module;
  std::function<Tensor()> run;
};

std::vector<Kind> kinds(torch::ScalarType dtype) {
  std::vector<Kind> result;
  const auto add = [&](const std::string& name,
                       auto layer,
                       const Tensor& input,
                       auto output) {
    layer->to(dtype);
    const Tensor x = input.is_floating_point() ? input.to(dtype) : input;
    result.push_back({name, layer.ptr(), [layer, x, output]() mutable {
                        return output(layer, x);
                      }});
  };
  const auto forward = [](auto& layer, const Tensor& x) {
    return layer->forward(x);
  };
  const auto first = [](auto& layer, const Tensor& x) {
    return std::get<0>(layer->forward(x));
  };
  const auto itself = [](auto& layer, const Tensor& x) {
    return std::get<0>(layer->forward(x, x, x));
  };
  const Tensor ids = torch::tensor({{1, 3, 3}, {0, 6, 2}});
  add("linear", nn::Linear(6, 5), torch::randn({2, 4, 6}), forward);
  add("embedding", nn::Embedding(7, 5), ids, forward);
  add("conv1d",
      nn::Conv1d(nn::Conv1dOptions(4, 6, 3)),
      torch::randn({2, 4, 7}),
      forward);
  add("grouped conv2d",
      nn::Conv2d(nn::Conv2dOptions(4, 6, 3).groups(2).dilation(2)),
      torch::randn({2, 4, 7, 6}),
      forward);
  add("conv3d",
      nn::Conv3d(nn::Conv3dOptions(2, 4, 2)),
      torch::randn({2, 2, 3, 4, 4}),
      forward);
  add("attention",
      nn::MultiheadAttention(8, 2),
      torch::randn({5, 2, 8}),
      itself);
  if (dtype == torch::kFloat || dtype == torch::kDouble) {
    add("lstm", nn::LSTM(6, 5), torch::randn({4, 2, 6}), first);
    add("gru", nn::GRU(6, 5), torch::randn({4, 2, 6}), first);
  }
  return result;
}

Tensor run(const Kind& kind) {
  torch::NoGradGuard no_grad;
  return kind.run();
}

std::vector<Tensor> bases(const nn::Module& model) {
  std::vector<Tensor> result;
  for (const auto& p : model.named_parameters()) {
    result.push_back(peft::base(p.value()).detach().clone());
  }
  return result;
}

Comparison same_bits(
    const std::vector<Tensor>& a,
    const std::vector<Tensor>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    const auto bits = equal_bits(a[i], b.at(i));
    if (!bits) {
      return {false, "tensor " + std::to_string(i) + ": " + bits.message};
    }
  }
  return {a.size() == b.size(), "the same bits"};
}

/// The distance to the next number that has `digits` bits of precision.
Tensor ulp(const Tensor& value, int64_t digits) {
  const Tensor exponent = std::get<1>(at::frexp(value.to(torch::kDouble)));
  return at::ldexp(
      at::ones_like(exponent, torch::kDouble),
      exponent.to(torch::kDouble) - digits);
}

Tensor wide(const Tensor& t) {
  return t.detach().to(torch::kDouble);
}

void fill(const Tensor& t, double value) {
  torch::NoGradGuard no_grad;
  t.fill_(value);
}

/// Merges for good, or so that it can be undone.
void merge(Adapter& adapter, nn::Module& model, bool for_good) {
  for_good ? peft::merge(model) : adapter.merge();
}

} // namespace

TEST_CASE("merged is unmerged, and unmerge restores every bit") {
  for (const auto dtype :
       {torch::kFloat, torch::kDouble, torch::kBFloat16, torch::kHalf}) {
    seed(1);
    for (const auto& kind : kinds(dtype)) {
      INFO(kind.name << " in " << dtype);
      const Tensor plain = run(kind);
      auto adapter = peft::attach(
          *kind.module, LoraOptions(2).alpha(1).init("random").targets(""));
      randomise(adapter);
      const Tensor y = run(kind);
      CHECK_FALSE(equal_bits(y, plain));
      const auto before = state_of(*kind.module);

      adapter.merge();
      CHECK(adapter.is_merged());
      const auto merged = bases(*kind.module);
      CHECK(close(run(kind), y));
      adapter.unmerge();
      CHECK_FALSE(adapter.is_merged());
      CHECK(same_state(state_of(*kind.module), before));
      CHECK(equal_bits(run(kind), y));

      for (int i = 0; i < 100; ++i) {
        adapter.merge();
        if (i == 99) {
          CHECK(same_bits(bases(*kind.module), merged));
        }
        adapter.unmerge();
      }
      CHECK(same_state(state_of(*kind.module), before));
      CHECK(equal_bits(run(kind), y));
      adapter.detach();
      CHECK(equal_bits(run(kind), plain));
    }
  }
}

TEST_CASE("two adapters merge and unmerge in any order") {
  for (const auto dtype : {torch::kFloat, torch::kBFloat16}) {
    INFO(dtype);
    seed(2);
    Mlp model;
    model.to(dtype);
    const Tensor x = torch::randn({4, 10}).to(dtype);
    auto one = peft::attach(model, acting({"fc1", "fc2"}), "one");
    auto two = peft::attach(
        model, LoraOptions(3).init("random").targets({"fc2", "head"}), "two");
    torch::NoGradGuard no_grad;
    const Tensor y = model.forward(x);
    const auto before = state_of(model);

    one.merge();
    const auto only_one = bases(model);
    CHECK(close(model.forward(x), y)); // two acts on top
    one.unmerge();
    two.merge();
    const auto only_two = bases(model);
    CHECK(close(model.forward(x), y));
    two.unmerge();

    for (const bool one_first : {true, false}) {
      for (const bool one_back_first : {true, false}) {
        INFO(one_first << one_back_first);
        (one_first ? one : two).merge();
        (one_first ? two : one).merge();
        CHECK(close(model.forward(x), y));
        (one_back_first ? one : two).unmerge();
        CHECK(same_bits(bases(model), one_back_first ? only_two : only_one));
        CHECK(close(model.forward(x), y));
        (one_back_first ? two : one).unmerge();
        CHECK(same_state(state_of(model), before));
        CHECK(equal_bits(model.forward(x), y));
      }
    }
  }
}

TEST_CASE("a scale is folded, a disabled adapter is not") {
  seed(3);
  Mlp model;
  const Tensor x = torch::randn({4, 10});
  auto one = peft::attach(model, acting({"fc1", "fc2"}), "one");
  auto two = peft::attach(model, acting("fc2"), "two");
  one.set_scale(-0.7);
  two.disable();
  const Tensor y = model.forward(x).detach();
  SECTION("merge of an adapter") {
    one.merge();
    torch::NoGradGuard no_grad;
    CHECK(close(model.forward(x), y));
  }
  SECTION("merge for good") {
    peft::merge(model);
    CHECK(close(model.forward(x), y));
  }
  SECTION("merge for good on top of a merged one") {
    one.merge();
    peft::merge(model);
    CHECK(close(model.forward(x), y));
  }
}

TEST_CASE("peft::merge leaves the plain network and its operators") {
  seed(4);
  const auto options = peft::models::BertOptions()
                           .vocab_size(20)
                           .hidden_size(8)
                           .num_hidden_layers(2)
                           .num_attention_heads(2)
                           .intermediate_size(16)
                           .max_position_embeddings(8);
  peft::models::BertForSequenceClassification model(options);
  model->eval();
  const Tensor ids = torch::randint(20, {2, 6}, torch::kLong);
  const auto forward = [&] {
    torch::NoGradGuard no_grad;
    return model->forward(ids);
  };
  const auto structure = state_of(*model);
  const auto operators = adapted::operator_names(forward);
  REQUIRE(operators.size() > 50);

  auto one = peft::attach(
      *model,
      acting("all-linear").bias("all").modules_to_save({"classifier"}),
      "one");
  auto two = peft::attach(
      *model, acting({"query", "word_embeddings"}).lora_bias(false), "two");
  auto three = peft::attach(*model, peft::BitFitOptions({"query"}), "three");
  randomise(one);
  const Tensor y = forward();
  CHECK_FALSE(equal_bits(y, [&] {
    peft::ActiveAdapters none({});
    return forward();
  }()));
  CHECK(adapted::operator_names(forward) != operators);

  two.merge(); // some may be merged already
  CHECK(close(forward(), y));
  peft::merge(*model);
  CHECK(close(forward(), y));
  CHECK(adapted::operator_names(forward) == operators);
  const auto after = state_of(*model);
  CHECK(after.modules == structure.modules);
  REQUIRE(after.tensors.size() == structure.tensors.size());
  for (size_t i = 0; i < after.tensors.size(); ++i) {
    const auto &a = after.tensors[i], &b = structure.tensors[i];
    INFO(a.name);
    CHECK(a.name == b.name);
    CHECK(a.tensor == b.tensor); // the same tensors, with other values
    CHECK(a.requires_grad == b.requires_grad);
    CHECK_FALSE(a.adapted);
  }
  CHECK(peft::adapters(*model).empty());
  CHECK(peft::summary(*model).find("adapter") == std::string::npos);
  CHECK(contains(error_of([&] { one.unmerge(); }), "was detached"));
  CHECK(contains(
      error_of([&] { peft::merge(*model); }), "no adapter on this model"));
  // LibTorch's own functions work again.
  auto copy = std::dynamic_pointer_cast<
      peft::models::BertForSequenceClassificationImpl>(model->clone());
  torch::NoGradGuard no_grad;
  CHECK(equal_bits(copy->forward(ids), forward()));
}

TEST_CASE("values that are not finite are refused with nothing changed") {
  struct Row {
    std::string name;
    torch::ScalarType dtype;
    double value;
  };
  for (const auto& row : std::vector<Row>{
           {"NaN", torch::kFloat, NAN},
           {"infinity", torch::kDouble, INFINITY},
           {"beyond half precision", torch::kHalf, 1e6}}) {
    INFO(row.name);
    seed(5);
    Mlp model;
    model.to(row.dtype);
    const auto plain = bases(model);
    auto good = peft::attach(model, acting({"fc1", "head"}), "good");
    auto bad = peft::attach(model, acting({"fc1", "head"}).bias("all"), "bad");
    {
      torch::NoGradGuard no_grad;
      randomise(bad);
      bad.named_parameters()["head.base_layer.bias"].fill_(row.value);
    }
    const auto attached = state_of(model);
    CHECK(contains(error_of([&] { bad.merge(); }), "not finite"));
    CHECK(same_state(state_of(model), attached));
    CHECK_FALSE(bad.is_merged());
    CHECK(contains(error_of([&] { peft::merge(model); }), "not finite"));
    CHECK(same_state(state_of(model), attached));
    CHECK(peft::adapters(model).size() == 2);

    good.merge();
    const auto merged = state_of(model);
    const auto error = error_of([&] { bad.merge(); });
    CHECK(contains(error, "'head.bias'"));
    CHECK(contains(error, "nothing was changed"));
    CHECK(same_state(state_of(model), merged));
    CHECK(contains(error_of([&] { peft::merge(model); }), "not finite"));
    CHECK(same_state(state_of(model), merged));
    CHECK(good.is_merged());
    good.unmerge();
    CHECK(same_state(state_of(model), attached));
    good.detach();
    bad.detach();
    CHECK(same_bits(bases(model), plain));
  }
}

TEST_CASE("what cannot be done while merged, or twice") {
  Mlp model;
  auto one = peft::attach(model, acting({"fc1", "fc2"}), "one");
  auto two = peft::attach(model, acting("fc1"), "two");
  one.merge();
  const auto merged = state_of(model);
  const Tensor x = torch::randn({4, 10});
  struct Row {
    std::string name, part;
    std::function<void()> action;
  };
  const std::vector<Row> rows{
      {"merge", "'one' is already merged", [&] { one.merge(); }},
      {"detach", "'one' is merged; unmerge() before", [&] { one.detach(); }},
      {"disable", "cannot be disabled", [&] { one.disable(); }},
      {"scale", "unmerge() before changing", [&] { one.set_scale(2); }},
      {"unmerge of the other", "'two' is not merged", [&] { two.unmerge(); }},
      {"another adapter there",
       "'one' is merged at 'fc2.weight'",
       [&] {
         peft::attach(model, acting({"head", "fc2"}), "three");
       }},
      {"a choice without it",
       "'one' is merged into the base and cannot be left out",
       [&] {
         peft::ActiveAdapters scope({"two"});
         model.forward(x);
       }},
      {"merge for good in a scope",
       "leave the ActiveAdapters scope first",
       [&] {
         peft::ActiveAdapters scope({"one"});
         peft::merge(model);
       }}};
  for (const auto& row : rows) {
    INFO(row.name);
    const auto error = error_of(row.action);
    INFO(error);
    CHECK(contains(error, "peft: "));
    CHECK(contains(error, row.part));
    CHECK(same_state(state_of(model), merged));
    CHECK(one.is_merged());
    CHECK(one.is_enabled());
    CHECK(one.scale() == 1);
  }
  one.unmerge();
  one.disable();
  CHECK(contains(error_of([&] { one.merge(); }), "'one' is disabled"));
  Mlp bare;
  CHECK(contains(
      error_of([&] { peft::merge(bare); }), "no adapter on this model"));
}

TEST_CASE("training while merged is an error in backward") {
  seed(6);
  Mlp model;
  Tensor x = torch::randn({4, 10}).set_requires_grad(true);
  auto adapter = peft::attach(model, acting("fc1"), "one");
  const Tensor y = model.forward(x).detach();
  adapter.merge();
  const Tensor merged = model.forward(x); // looking is allowed
  CHECK(close(merged, y));
  const auto error = error_of([&] { merged.sum().backward(); });
  CHECK(contains(
      error,
      "peft: adapter 'one' is merged and cannot train: call unmerge() before "
      "the training step, or freeze the adapter's parameters"));
  CHECK_FALSE(adapter.parameters()[0].grad().defined());

  // Another that acts at the same weight hides it nowhere.
  auto beside = peft::attach(model, acting("fc2"), "two");
  auto also = peft::attach(model, acting("fc2"), "three");
  beside.merge();
  also.set_trainable(false);
  CHECK(contains(
      error_of([&] { (model.fc2->weight * 2).sum().backward(); }),
      "adapter 'two' is merged and cannot train"));
  also.detach();
  beside.unmerge();
  beside.detach();

  adapter.set_trainable(false); // then the rest may train
  model.forward(x).sum().backward();
  CHECK(x.grad().defined());
  adapter.set_trainable(true);
  adapter.unmerge();
  model.forward(x).sum().backward();
  CHECK(adapter.parameters()[0].grad().defined());
}

TEST_CASE("a bfloat16 merge rounds once") {
  seed(7);
  nn::Linear linear(64, 96);
  linear->to(torch::kBFloat16);
  const Tensor W = linear->weight.detach().clone();
  auto adapter = peft::attach(*linear, LoraOptions(8).targets(""));
  auto& delta = lora(adapter);
  CHECK(delta.lora_A.scalar_type() == torch::kFloat);
  {
    torch::NoGradGuard no_grad;
    delta.lora_B.normal_(0, 0.02); // a change about as small as the rounding
  }
  const Tensor exact =
      wide(W) + 8. / 8 * at::mm(wide(delta.lora_B), wide(delta.lora_A));
  const auto check = [&](const Tensor& merged) {
    const Tensor error = (wide(merged) - exact).abs() / ulp(exact, 8);
    CHECK(error.max().item<double>() <= 1.0);
    // One rounding to the nearest: half an ulp, and a rounding on the way.
    CHECK(error.max().item<double>() < 0.501);
    CHECK(equal_bits(merged, exact.to(torch::kBFloat16)));
  };
  adapter.merge();
  check(peft::base(linear->weight));
  adapter.unmerge();
  CHECK(equal_bits(peft::base(linear->weight).detach(), W));
  peft::merge(*linear);
  check(linear->weight);
}

TEST_CASE("a merged model moves to another dtype and unmerges there") {
  seed(8);
  nn::Sequential model(nn::Linear(6, 8), nn::Tanh(), nn::Linear(8, 3));
  const auto plain = bases(*model);
  const Tensor x = torch::randn({4, 6}, torch::kDouble);
  auto adapter = peft::attach(*model, acting());
  adapter.merge();
  model->to(torch::kDouble);
  adapter.unmerge();
  CHECK(equal_bits(
      peft::base(model->ptr(0)->as<nn::LinearImpl>()->weight).detach(),
      plain[0].to(torch::kDouble)));
  CHECK(equal_bits(
      peft::base(model->ptr(2)->as<nn::LinearImpl>()->weight).detach(),
      plain[2].to(torch::kDouble)));
  const Tensor y = model->forward(x).detach();
  adapter.merge();
  torch::NoGradGuard no_grad;
  CHECK(close(model->forward(x), y));
}

TEST_CASE("aliases of a weight see a merge once") {
  seed(9);
  nn::Linear linear(6, 4);
  const Tensor handle = linear->weight;
  auto adapter = peft::attach(*linear, acting());
  const Tensor value = peft::effective(linear->weight).detach();
  const Tensor row = linear->weight[1], transposed = linear->weight.t();
  const Tensor cut = linear->weight.detach();
  const auto base = peft::base(linear->weight).clone().detach();
  const auto check = [&](const Tensor& expected) {
    torch::NoGradGuard no_grad;
    CHECK(close(handle + 0, expected));
    CHECK(close(row + 0, expected[1]));
    CHECK(close(transposed + 0, expected.t()));
    CHECK(close(cut + 0, expected));
  };
  check(value);
  adapter.merge();
  check(value);
  adapter.unmerge();
  check(value);
  adapter.disable();
  check(base);
  adapter.enable();
  SECTION("merged for good") {
    peft::merge(*linear);
    check(value);
    CHECK_FALSE(peft::is_adapted(handle));
  }
  SECTION("detached") {
    adapter.detach();
    check(base);
    CHECK_FALSE(peft::is_adapted(handle));
  }
}

TEST_CASE("deltas that are not sums merge in the order they act") {
  // The copy of a bias replaces what was there; another acts on top of it.
  seed(10);
  nn::Linear linear(6, 4);
  const Tensor x = torch::randn({3, 6});
  auto copy = peft::attach(*linear, peft::BitFitOptions(), "copy");
  auto shift = peft::attach(*linear, acting().lora_bias(true), "shift");
  randomise(copy);
  randomise(shift);
  torch::NoGradGuard no_grad;
  const Tensor y = linear->forward(x);
  const auto before = state_of(*linear);
  CHECK(contains(
      error_of([&] { shift.merge(); }),
      "acts after 'copy', and the two do not commute; merge 'copy' first"));
  CHECK(same_state(state_of(*linear), before));
  copy.merge();
  CHECK(close(linear->forward(x), y));
  shift.merge();
  CHECK(close(linear->forward(x), y));
  copy.unmerge();
  shift.unmerge();
  CHECK(same_state(state_of(*linear), before));
  CHECK(equal_bits(linear->forward(x), y));
}

TEST_CASE("half precision is merged in blocks of rows, rounded once") {
  // 300 rows of 512 are more than one block.
  for (const auto& [dtype, digits] :
       std::vector<std::pair<torch::ScalarType, int64_t>>{
           {torch::kBFloat16, 8}, {torch::kHalf, 11}}) {
    for (const bool for_good : {false, true}) {
      for (const bool transposed : {false, true}) {
        INFO(dtype << for_good << transposed);
        seed(11);
        nn::Linear linear(512, 300);
        linear->to(dtype);
        if (transposed) { // the same matrix, laid out column by column
          linear->weight.set_data(linear->weight.detach().t().contiguous().t());
        }
        const Tensor W = wide(linear->weight);
        auto adapter =
            peft::attach(*linear, LoraOptions(4).init("random").targets(""));
        randomise(adapter);
        const auto& delta = lora(adapter);
        const Tensor A = wide(delta.lora_A), B = wide(delta.lora_B);
        const Tensor exact = W + delta.config().scaling * at::mm(B, A);
        merge(adapter, *linear, for_good);
        const Tensor merged = wide(peft::base(linear->weight));
        // Half a step, and what float32 adds.
        const Tensor step = ulp(exact, digits).clamp_min(std::ldexp(1., -24));
        const Tensor excess = (merged - exact).abs() - step / 2;
        CHECK(excess.max().item<double>() < 1e-6);
        CHECK_FALSE(equal_bits(merged, W));
      }
    }
  }
}

TEST_CASE("several adapters on a base of half precision are rounded once") {
  seed(12);
  nn::Linear linear(64, 96);
  linear->to(torch::kBFloat16);
  Tensor exact = wide(linear->weight);
  for (const std::string name : {"one", "two", "three"}) {
    auto adapter = peft::attach(*linear, acting(""), name);
    exact += 2 * at::mm(wide(lora(adapter).lora_B), wide(lora(adapter).lora_A));
  }
  peft::merge(*linear);
  const Tensor error = (wide(linear->weight) - exact).abs() / ulp(exact, 8);
  CHECK(error.max().item<double>() < 0.51);
}

TEST_CASE("a merge makes no second matrix of the weight's size") {
  struct Row {
    std::string name;
    std::shared_ptr<nn::Module> module;
    std::string target;
  };
  for (const auto dtype : {torch::kFloat, torch::kDouble, torch::kBFloat16}) {
    for (const auto& row : std::vector<Row>{
             {"linear", nn::Linear(640, 1024).ptr(), "weight"},
             {"embedding", nn::Embedding(1024, 640).ptr(), "weight"},
             {"convolution",
              nn::Conv1d(nn::Conv1dOptions(512, 512, 3)).ptr(),
              "weight"},
             {"attention",
              nn::MultiheadAttention(512, 4).ptr(),
              "in_proj_weight"}}) {
      INFO(row.name << " in " << dtype);
      seed(13);
      row.module->to(dtype);
      const Tensor weight = row.module->named_parameters()[row.target];
      const auto bytes = static_cast<int64_t>(weight.nbytes());
      const auto plain = weight.detach().clone();
      auto adapter = peft::attach(*row.module, acting(row.target));
      const Tensor value = peft::effective(weight).detach();

      CHECK(
          accounting::at_least(
              accounting::sizes_of([&] { adapter.merge(); }), bytes / 2) == 1);
      CHECK(close(peft::base(weight).detach(), value));
      CHECK(
          accounting::at_least(
              accounting::sizes_of([&] { adapter.unmerge(); }), bytes / 2) ==
          0);
      CHECK(equal_bits(peft::base(weight).detach(), plain));
      CHECK(
          accounting::at_least(
              accounting::sizes_of([&] { peft::merge(*row.module); }),
              bytes / 2) == 0);
      CHECK(close(weight.detach(), value));
    }
  }
}

TEST_CASE("an adapter that overflows is refused before a bit changes") {
  struct Row {
    std::string name;
    torch::ScalarType dtype;
    double A, B;
  };
  const double most = std::numeric_limits<float>::max();
  for (const auto& row : std::vector<Row>{
           {"NaN in A", torch::kFloat, NAN, 1},
           {"NaN in A, zero in B", torch::kFloat, NAN, 0},
           {"infinity in B, zero in A", torch::kFloat, 0, INFINITY},
           {"a huge B", torch::kFloat, 1e3, most},
           {"a huge B, float64", torch::kDouble, 1e200, 1e200},
           {"a huge B, bfloat16", torch::kBFloat16, 1, most},
           {"more than half precision holds", torch::kHalf, 200, 200}}) {
    for (const bool for_good : {false, true}) {
      INFO(row.name << for_good);
      seed(14);
      Mlp model;
      model.to(row.dtype);
      auto adapter = peft::attach(model, acting({"fc1", "head"}));
      fill(adapter.named_parameters()["head.lora_A.weight"], row.A);
      fill(adapter.named_parameters()["head.lora_B.weight"], row.B);
      const auto before = state_of(model);
      const auto error = error_of([&] { merge(adapter, model, for_good); });
      CHECK(contains(error, "merging into 'head' would write values that are"));
      CHECK(same_state(state_of(model), before));
      CHECK_FALSE(adapter.is_merged());
    }
  }
}

TEST_CASE("large factors with a finite product are merged") {
  // No bound proves them harmless: the result is looked at.
  for (const bool for_good : {false, true}) {
    seed(15);
    nn::Linear linear(6, 4);
    auto adapter = peft::attach(*linear, acting());
    fill(lora(adapter).lora_A, 1e30);
    fill(lora(adapter).lora_B, 1e-28);
    const Tensor expected =
        wide(peft::base(linear->weight)) + 2 * 2 * 1e30 * 1e-28;
    merge(adapter, *linear, for_good);
    CHECK(close(peft::base(linear->weight), expected));
  }
}

TEST_CASE("what the bound calls safe stays finite next to the largest number") {
  using peft::functional::lora_merge_;
  using peft::functional::lora_merge_is_safe;
  struct Row {
    torch::ScalarType dtype;
    double largest, safe, unsafe;
  };
  // Half the spacing at the largest number is 2^103, 2^970, 2^119 and 2^4.
  for (const auto& row : std::vector<Row>{
           {torch::kFloat,
            std::numeric_limits<float>::max(),
            std::ldexp(1., 102),
            std::ldexp(1., 106)},
           {torch::kDouble,
            std::numeric_limits<double>::max(),
            std::ldexp(1., 969),
            std::ldexp(1., 973)},
           {torch::kBFloat16,
            static_cast<double>(std::numeric_limits<at::BFloat16>::max()),
            std::ldexp(1., 118),
            std::ldexp(1., 120)},
           {torch::kHalf, 65504, 8, 16}}) {
    INFO(row.dtype);
    const auto dtype =
        row.dtype == torch::kDouble ? torch::kDouble : torch::kFloat;
    const Tensor W = torch::full({40, 24}, row.largest, torch::kDouble)
                         .mul(torch::randint(2, {40, 24}).mul(2).sub(1))
                         .to(row.dtype);
    const Tensor before = W.clone();
    const Tensor A = torch::ones({4, 24}, dtype);
    const Tensor B = torch::full({40, 4}, row.safe / 4, torch::kDouble);
    REQUIRE(at::isfinite(W).all().item<bool>());
    CHECK(lora_merge_is_safe(W, A, B.to(dtype), 1.0));
    lora_merge_(W, A, B.to(dtype), 1.0);
    CHECK(equal_bits(W, before)); // less than half a step
    // Where nothing is proved there is something to find.
    const Tensor more = (B * (row.unsafe / row.safe)).to(dtype);
    CHECK_FALSE(lora_merge_is_safe(W, A, more, 1.0));
    CHECK_FALSE(lora_merge_is_safe(W, A, more.neg(), 1.0));
    CHECK_FALSE(lora_merge_is_safe(W, A, B.to(dtype), -2.1));
    const Tensor beyond = at::addmm(W.to(dtype), more, A).to(row.dtype);
    CHECK_FALSE(at::isfinite(beyond).all().item<bool>());
  }
}

TEST_CASE("a base with infinity and NaN of its own keeps them") {
  for (const bool in_place : {true, false}) {
    for (const bool for_good : {false, true}) {
      INFO(in_place << for_good);
      seed(16);
      nn::Linear linear(6, 4);
      {
        torch::NoGradGuard no_grad;
        linear->weight[1][2] = -INFINITY;
        linear->weight[3][0] = NAN;
      }
      const Tensor W = wide(linear->weight);
      auto adapter = peft::attach(*linear, acting());
      auto& delta = lora(adapter);
      if (!in_place) {
        fill(delta.lora_A, 1e30);
        fill(delta.lora_B, 1e-28);
      }
      const Tensor exact =
          W + 2 * at::mm(wide(delta.lora_B), wide(delta.lora_A));
      merge(adapter, *linear, for_good);
      const Tensor merged = peft::base(linear->weight).detach();
      CHECK(equal_bits(at::isfinite(merged), at::isfinite(W)));
      CHECK(close(
          at::nan_to_num(merged), at::nan_to_num(exact.to(torch::kFloat))));
    }
  }
}

TEST_CASE("a merge reaches every layout of memory, and tells who watches") {
  seed(17);
  struct Row {
    std::string name;
    std::function<Tensor(const Tensor&)> lay_out;
  };
  for (const auto& row : std::vector<Row>{
           {"dense", [](const Tensor& t) { return t.clone(); }},
           {"columns first",
            [](const Tensor& t) {
              return t.permute({3, 2, 1, 0}).contiguous().permute({3, 2, 1, 0});
            }},
           {"channels last",
            [](const Tensor& t) {
              return t.contiguous(at::MemoryFormat::ChannelsLast);
            }},
           {"every second entry", [](const Tensor& t) {
              return at::stack({t, t}, 4).select(4, 1);
            }}}) {
    for (const bool for_good : {false, true}) {
      INFO(row.name << for_good);
      nn::Conv2d conv(nn::Conv2dOptions(3, 4, 2));
      conv->weight.set_data(row.lay_out(conv->weight.detach()));
      const auto strides = conv->weight.strides().vec();
      auto adapter = peft::attach(*conv, acting(""));
      const Tensor value = peft::effective(conv->weight).detach();
      const auto version = conv->weight._version();
      merge(adapter, *conv, for_good);
      CHECK(close(peft::base(conv->weight).detach(), value));
      CHECK(conv->weight.strides().vec() == strides);
      CHECK(conv->weight._version() > version);
    }
  }
}

TEST_CASE("a model made in inference mode merges inside and outside of it") {
  for (const bool made_inside : {false, true}) {
    for (const bool merged_inside : {false, true}) {
      for (const bool for_good : {false, true}) {
        INFO(made_inside << merged_inside << for_good);
        seed(18);
        nn::Linear linear(nullptr);
        {
          c10::InferenceMode mode(made_inside);
          linear = nn::Linear(6, 4);
        }
        auto adapter = peft::attach(*linear, acting());
        const Tensor value = peft::effective(linear->weight).detach().clone();
        {
          c10::InferenceMode mode(merged_inside);
          merge(adapter, *linear, for_good);
        }
        CHECK(close(peft::base(linear->weight).detach(), value));
        if (!for_good) {
          c10::InferenceMode mode(merged_inside);
          adapter.unmerge();
        }
        CHECK(close(peft::effective(linear->weight).detach(), value));
      }
    }
  }
}

} // namespace test_merge
