/// Merged weights are the float64 result, rounded: for every method that
/// merges, in every dtype, on every kind of layer, also where the sum is far
/// smaller than its terms. And 100 merges change nothing.

#include "model_state.h"
#include "test.h"

#include <peft/functional/cpu/vector.h>
#include <peft/functional/lora_merge.h>
#include <peft/models/gpt2.h>

#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace test_merge_precision {

namespace {

using peft::Adapter;
using peft::LoraOptions;
using torch::Tensor;
using Names = std::vector<std::string>;
namespace nn = torch::nn;

/// A layer of each kind; only its weights matter here.
struct LayersImpl : nn::Cloneable<LayersImpl> {
  LayersImpl() {
    reset();
  }
  void reset() override {
    linear = register_module("linear", nn::Linear(24, 20));
    table = register_module("table", nn::Embedding(15, 12));
    conv =
        register_module("conv", nn::Conv2d(nn::Conv2dOptions(8, 12, {3, 2})));
    groups = register_module(
        "groups", nn::Conv1d(nn::Conv1dOptions(8, 12, 3).groups(2)));
    turned = register_module("turned", peft::models::Conv1D(12, 16));
    packed = register_module("packed", nn::MultiheadAttention(8, 2));
    norm = register_module("norm", nn::LayerNorm(nn::LayerNormOptions({12})));
  }

  nn::Linear linear{nullptr};
  nn::Embedding table{nullptr};
  nn::Conv2d conv{nullptr};
  nn::Conv1d groups{nullptr};
  peft::models::Conv1D turned{nullptr};
  nn::MultiheadAttention packed{nullptr};
  nn::LayerNorm norm{nullptr};
};
TORCH_MODULE(Layers);

struct Method {
  std::string name;
  std::function<Adapter(nn::Module&, const std::string&)> attach;
};

template <class Options>
Method method(const std::string& name, Options options) {
  return {name, [options](nn::Module& model, const std::string& adapter) {
            return peft::attach(model, options, adapter);
          }};
}

/// The kinds of layers that a method knows.
const Names matrices{"linear", "turned"};
const Names filters{"linear", "turned", "conv"};
const Names most{"linear", "turned", "conv", "groups"};
const Names all{"linear", "turned", "conv", "groups", "table", "packed"};

std::vector<Method> every_method() {
  std::vector<Method> rows;
  const auto add = [&](const std::string& name, auto options) {
    rows.push_back(method(name, std::move(options)));
  };
  const auto lora = [](const Names& names) {
    return LoraOptions(4).alpha(6).init("random").targets(names);
  };
  add("LoRA", lora(all));
  add("rsLoRA", lora(all).rslora(true));
  add("LoRA with biases", lora({"linear", "conv"}).lora_bias(true).bias("all"));
  add("DoRA", lora({"linear", "turned", "conv", "table"}).dora(true));
  add("KaSA", lora({"linear"}).kasa(peft::KasaOptions()).dropout(0.5));
  const auto blocks = peft::BdLoraOptions().nblocks(2);
  add("BD-LoRA of A",
      lora({"linear"})
          .bd_lora(
              peft::BdLoraOptions(blocks).target_modules_bd_a({"linear"})));
  add("BD-LoRA of B",
      lora({"linear"})
          .bd_lora(
              peft::BdLoraOptions(blocks).target_modules_bd_b({"linear"})));
  add("VeLoRA", lora(matrices).velora(peft::VeloraOptions().num_groups(5)));
  add("AdaLoRA", peft::AdaLoraOptions(10).init_r(4).targets(matrices));
  add("VeRA", peft::VeraOptions(6).targets(matrices));
  add("VB-LoRA",
      peft::VbLoraOptions(3).num_vectors(9).vector_length(4).targets(matrices));
  add("LoHa",
      peft::LoHaOptions(3).rank_dropout(0.5).module_dropout(0.3).targets(most));
  add("LoHa with cores",
      peft::LoHaOptions(3).use_effective_conv2d(true).targets({"conv"}));
  add("LoKr",
      peft::LoKrOptions(2).rank_dropout(0.5).module_dropout(0.3).targets(most));
  add("LoKr of factors",
      peft::LoKrOptions(1).decompose_both(true).targets(most));
  add("OFT", peft::OftOptions().oft_block_size(4).targets(filters));
  add("OFT, exact",
      peft::OftOptions()
          .oft_block_size(4)
          .use_cayley_neumann(false)
          .module_dropout(0.5)
          .targets({"linear", "table"}));
  add("COFT",
      peft::OftOptions().oft_block_size(4).coft(true).eps(0.1).targets(
          matrices));
  add("BOFT",
      peft::BoftOptions().boft_n_butterfly_factor(2).dropout(0.5).targets(
          Names{"linear", "conv"}));
  add("BOFT, one factor", peft::BoftOptions().targets(Names{"turned"}));
  add("HRA", peft::HraOptions(4).targets(filters));
  add("HRA, apply_GS", peft::HraOptions(4).apply_GS(true).targets(filters));
  add("FourierFT", peft::FourierFtOptions(40).targets(matrices));
  add("(IA)3",
      peft::Ia3Options().targets(most).feedforward(Names{"turned", "groups"}));
  add("(IA)3, packed", peft::Ia3Options().targets({"packed"}));
  add("KronA", peft::KronaOptions(4, 4).targets(matrices));
  add("intrinsic", peft::IntrinsicOptions(30).all_parameters(true));
  add("SAID",
      peft::IntrinsicOptions(50).said(true).projection("dense").all_parameters(
          true));
  add("trainable tokens",
      peft::TrainableTokensOptions({1, 4, 9}).targets({"table"}));
  add("BEFT", peft::BeftOptions().targets({"linear"}));
  add("BitFit", peft::BitFitOptions());
  add("LayerNorm tuning", peft::LayerNormOptions());
  add("full", peft::FullTuningOptions());
  add("random mask", peft::RandomMaskOptions(0.3));
  add("SHiRA", peft::ShiraOptions(2).random_seed(1).targets({"linear"}));
  add("FISH mask", peft::FishOptions(0.2).selection("random"));
  add("FISH mask, reference",
      peft::FishOptions(0.2).selection("random").semantics("reference"));
  add("Child-tuning", peft::ChildTuningOptions(0.5));
  add("scaled LoRA", peft::Scaled(lora(all), 0.7));
  add("LoRA, learned scale",
      peft::Scaled(lora(all), peft::ScaleOptions(1).learned(true)));
  add("scaled BitFit",
      peft::Scaled(peft::BitFitOptions(), peft::ScaleOptions(1).learned(true)));
  add("masked LoRA", peft::Masked(lora(all)));
  add("scaled KronA",
      peft::Scaled(
          peft::KronaOptions(4, 4).targets(matrices),
          peft::ScaleOptions(1).learned(true)));
  return rows;
}

const std::vector<torch::ScalarType> dtypes{
    torch::kFloat,
    torch::kDouble,
    torch::kBFloat16,
    torch::kHalf};

/// The distance between neighbouring numbers of `dtype` where `value`, float64,
/// lies.
Tensor ulp(const Tensor& value, torch::ScalarType dtype) {
  int64_t digits = 24, least = -149;
  if (dtype == torch::kDouble) {
    digits = 53, least = -1074;
  } else if (dtype == torch::kHalf) {
    digits = 11, least = -24;
  } else if (dtype == torch::kBFloat16) {
    digits = 8, least = -133;
  }
  const Tensor exponent = std::get<1>(at::frexp(value)).to(torch::kDouble);
  return at::ldexp(
      at::ones_like(value), (exponent - digits).clamp_min(double(least)));
}

/// How far `merged` is from `exact` at most, in units of its last place;
/// float64 knows `exact` itself only up to a rounding of its `terms`.
double ulps(const Tensor& merged, const Tensor& exact, const Tensor& terms) {
  const Tensor distance = (merged.to(torch::kDouble) - exact).abs() -
      terms.abs() * std::ldexp(1.0, -48);
  return (distance / ulp(exact, merged.scalar_type())).max().item<double>();
}

using Weights = std::vector<std::pair<std::string, Tensor>>;

Weights weights_of(const nn::Module& model) {
  Weights result;
  for (const auto& item : peft::detail::base_parameters(model)) {
    result.emplace_back(item.first, peft::base(item.second).detach().clone());
  }
  return result;
}

/// What the model's weights are with its adapters, all of it in float64: on a
/// copy with the same values, without a merge.
std::vector<Tensor> exact_weights(const Layers& model) {
  const torch::NoGradGuard no_grad;
  auto copy = peft::clone(model);
  copy->to(torch::kDouble);
  copy->eval();
  std::vector<Tensor> result;
  for (const auto& item : peft::detail::base_parameters(*copy)) {
    result.push_back(peft::effective(item.second).clone());
  }
  return result;
}

/// `moved` nearly taken off: what is left of a sum with it is some 2^-12 of the
/// terms.
Tensor nearly_opposite(const Tensor& moved) {
  return -moved * (1 + std::ldexp(1.0, -12) * (at::rand_like(moved) + 0.5));
}

/// Makes every second entry of the weights nearly what the adapters subtract:
/// there a rounding on the way to the sum shows.
void cancel(const Layers& model) {
  const torch::NoGradGuard no_grad;
  const auto exact = exact_weights(model);
  size_t i = 0;
  for (const auto& item : peft::detail::base_parameters(*model)) {
    Tensor base = peft::base(item.second);
    const Tensor before = base.to(torch::kDouble);
    const Tensor moved = exact[i++] - before;
    const Tensor here =
        at::arange(before.numel()).remainder(2).view(before.sizes()).eq(0);
    base.copy_(at::where(
        here.logical_and(moved != 0), nearly_opposite(moved), before));
  }
}

/// A network in `dtype` with an adapter that acts.
std::pair<Layers, Adapter> adapted(
    const Method& method,
    torch::ScalarType dtype) {
  seed(3);
  Layers model;
  model->to(dtype);
  Adapter adapter = method.attach(*model, "default");
  randomise(adapter);
  cancel(model);
  return {model, adapter};
}

void check_within_an_ulp(
    const nn::Module& model,
    const Weights& before,
    const std::vector<Tensor>& exact) {
  size_t i = 0;
  for (const auto& [name, merged] : weights_of(model)) {
    INFO(name);
    const Tensor base = before.at(i).second.to(torch::kDouble);
    const Tensor terms = base.abs() + (exact.at(i) - base).abs().max();
    CHECK(ulps(merged, exact.at(i), terms) <= 1);
    ++i;
  }
}

Comparison same_weights(const Weights& a, const Weights& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    const auto bits = equal_bits(a[i].second, b.at(i).second);
    if (!bits) {
      return {false, a[i].first + ": " + bits.message};
    }
  }
  return {a.size() == b.size(), "the same bits"};
}

template <class Check>
void for_each_case(Check&& check) {
  for (const auto& method : every_method()) {
    for (const auto dtype : dtypes) {
      INFO(method.name << " in " << dtype);
      const std::string error = error_of([&] { check(method, dtype); });
      CHECK(error == "");
    }
  }
}

} // namespace

TEST_CASE("Every method's merge is the float64 result within an ulp") {
  for_each_case([](const Method& method, torch::ScalarType dtype) {
    for (const bool for_good : {false, true}) {
      auto [model, adapter] = adapted(method, dtype);
      const auto before = weights_of(*model);
      const auto exact = exact_weights(model);
      for_good ? peft::merge(*model) : adapter.merge();
      check_within_an_ulp(*model, before, exact);
      CHECK_FALSE(same_weights(weights_of(*model), before));
    }
  });
}

TEST_CASE("Merging and unmerging 100 times changes no bit of any method") {
  for_each_case([](const Method& method, torch::ScalarType dtype) {
    auto [model, adapter] = adapted(method, dtype);
    model->train(); // a merge draws no dropout
    const auto before = state_of(*model);
    adapter.merge();
    const auto merged = weights_of(*model);
    adapter.unmerge();
    CHECK(same_state(state_of(*model), before));
    for (int i = 0; i < 99; ++i) {
      adapter.merge();
      if (i == 98) {
        CHECK(same_weights(weights_of(*model), merged));
        CHECK(contains(error_of([&] { adapter.merge(); }), "already merged"));
        CHECK(contains(error_of([&] { adapter.detach(); }), "is merged"));
        CHECK(same_weights(weights_of(*model), merged));
      }
      adapter.unmerge();
    }
    CHECK(same_state(state_of(*model), before));
    model->eval();
    peft::merge(*model);
    CHECK(same_weights(weights_of(*model), merged));
  });
}

TEST_CASE("No method writes a number that is not finite") {
  for_each_case([](const Method& method, torch::ScalarType dtype) {
    for (const double value :
         {std::numeric_limits<double>::quiet_NaN(),
          std::numeric_limits<double>::infinity()}) {
      for (const bool first : {true, false}) {
        INFO(value << first);
        auto [model, adapter] = adapted(method, dtype);
        const auto parameters = adapter.parameters();
        {
          torch::NoGradGuard no_grad;
          const auto& chosen = first ? parameters.front() : parameters.back();
          chosen.view({-1})[0].fill_(value);
        }
        const auto before = state_of(*model);
        CHECK(contains(error_of([&] { adapter.merge(); }), "not finite"));
        CHECK(same_state(state_of(*model), before));
        CHECK_FALSE(adapter.is_merged());
        CHECK(contains(error_of([&] { peft::merge(*model); }), "not finite"));
        CHECK(same_state(state_of(*model), before));
      }
    }
  });
}

TEST_CASE("Several adapters at one weight are rounded once, in any order") {
  const std::vector<Method> sums{
      method("LoRA", LoraOptions(4).init("random").targets(all)),
      method("KronA", peft::KronaOptions(4, 4).targets(matrices)),
      method("LoHa", peft::LoHaOptions(3).targets(most)),
      method("FourierFT", peft::FourierFtOptions(40).targets({"linear"}))};
  for (size_t number = 0; number < 2 * dtypes.size(); ++number) {
    const auto dtype = dtypes[number / 2];
    const bool on_top = number % 2 == 1;
    INFO(dtype << on_top);
    seed(5);
    Layers model;
    model->to(dtype);
    std::vector<Adapter> adapters;
    for (const auto& item : sums) {
      adapters.push_back(item.attach(*model, item.name));
      randomise(adapters.back(), adapters.size());
    }
    cancel(model);
    adapters[1].set_scale(-0.3);
    const auto before = state_of(*model);
    const auto plain = weights_of(*model);
    const auto exact = exact_weights(model);

    const auto merge_all = [&](const std::vector<size_t>& order) {
      for (const size_t i : order) {
        adapters[i].merge();
      }
      return weights_of(*model);
    };
    const auto merged = merge_all({0, 1, 2, 3});
    check_within_an_ulp(*model, plain, exact);
    // One by one back, the first before the last: what is left is what it was.
    adapters[0].unmerge();
    adapters[2].unmerge();
    const auto two = weights_of(*model);
    adapters[3].unmerge();
    adapters[1].unmerge();
    CHECK(same_state(state_of(*model), before));
    CHECK(same_weights(merge_all({3, 1}), two));
    adapters[1].unmerge();
    adapters[3].unmerge();
    CHECK(same_weights(merge_all({2, 0, 3, 1}), merged));
    for (int i = 0; i < 100; ++i) {
      adapters[i % 4].unmerge();
      adapters[i % 4].merge();
    }
    CHECK(same_weights(weights_of(*model), merged));
    for (const size_t i : {1, 3, 0, 2}) {
      adapters[i].unmerge();
    }
    CHECK(same_state(state_of(*model), before));
    if (on_top) {
      adapters[2].merge();
    }
    peft::merge(*model);
    CHECK(same_weights(weights_of(*model), merged));
  }
}

TEST_CASE("Methods that do not commute merge in the order in which they act") {
  for (const auto dtype : dtypes) {
    INFO(dtype);
    seed(6);
    Layers model;
    model->to(dtype);
    const Names here{"linear"};
    auto ia3 = peft::attach(*model, peft::Ia3Options().targets(here), "ia3");
    auto lora = peft::attach(
        *model, LoraOptions(4).init("random").targets(here), "lora");
    auto oft = peft::attach(
        *model, peft::OftOptions().oft_block_size(4).targets(here), "oft");
    for (const auto& adapter : {ia3, lora, oft}) {
      randomise(adapter);
    }
    const auto before = state_of(*model);
    const auto plain = weights_of(*model);
    const auto exact = exact_weights(model);
    CHECK(contains(error_of([&] { oft.merge(); }), "do not commute"));
    ia3.merge();
    lora.merge();
    oft.merge();
    check_within_an_ulp(*model, plain, exact);
    const auto merged = weights_of(*model);
    ia3.unmerge(); // below the others
    ia3.merge();
    CHECK(same_weights(weights_of(*model), merged));
    for (auto* adapter : {&lora, &ia3, &oft}) {
      adapter->unmerge();
    }
    CHECK(same_state(state_of(*model), before));
    peft::merge(*model);
    CHECK(same_weights(weights_of(*model), merged));
  }
}

TEST_CASE("What depends on the input is not merged, and says so") {
  Layers model;
  auto adapter =
      peft::attach(*model, peft::Gated(LoraOptions(2).targets({"linear"})));
  const auto before = state_of(*model);
  CHECK(contains(
      error_of([&] { adapter.merge(); }), "its gate depends on the input"));
  CHECK(same_state(state_of(*model), before));
}

TEST_CASE("An explicit layer's merge is within an ulp too") {
  for (const auto dtype : dtypes) {
    INFO(dtype);
    seed(8);
    nn::Linear linear(24, 20);
    linear->to(dtype);
    peft::Lora<nn::Linear> layer(linear, LoraOptions(4).init("random"));
    const torch::NoGradGuard no_grad;
    const auto wide = [](const Tensor& t) { return t.to(torch::kDouble); };
    const Tensor moved =
        layer->scaling * at::mm(wide(layer->lora_B), wide(layer->lora_A));
    linear->weight.slice(0, 0, 10).copy_(
        nearly_opposite(moved.slice(0, 0, 10)));
    const Tensor before = linear->weight.clone();
    const Tensor exact = wide(before) + moved;
    const Tensor terms = wide(before).abs() + moved.abs().max();
    for (int i = 0; i < 100; ++i) {
      layer->merge();
      CHECK(ulps(linear->weight, exact, terms) <= 1);
      layer->unmerge();
    }
    CHECK(equal_bits(linear->weight, before));
  }
}

TEST_CASE("A product is folded in within an ulp on every path") {
  namespace cpu = peft::functional::cpu;
  using Lay = std::function<Tensor(const Tensor&)>;
  const std::vector<std::pair<std::string, Lay>> layouts{
      {"rows", [](const Tensor& t) { return t.clone(); }},
      {"columns", [](const Tensor& t) { return t.t().contiguous().t(); }},
      {"a part", [](const Tensor& t) {
         return at::constant_pad_nd(t, {3, 5}).slice(1, 3, 3 + t.size(1));
       }}};
  const auto before = cpu::detail::isa();
  for (const auto isa :
       {cpu::Isa::kPlain, cpu::Isa::kAvx2, cpu::Isa::kAvx512}) {
    if (isa > cpu::best_isa()) {
      continue;
    }
    cpu::detail::isa() = isa;
    for (const auto dtype : {torch::kFloat, torch::kBFloat16, torch::kHalf}) {
      for (const auto& [rows, columns, r] : std::vector<std::array<int64_t, 3>>{
               {1, 1, 1}, {3, 7, 2}, {5, 1100, 3}, {37, 41, 16}, {4, 64, 8}}) {
        for (const auto& [name, lay_out] : layouts) {
          INFO(
              int(isa) << ' ' << dtype << ' ' << rows << 'x' << columns << " r "
                       << r << ' ' << name);
          seed(9);
          const Tensor A = torch::randn({r, columns});
          const Tensor B = torch::randn({rows, r});
          const Tensor moved =
              0.3 * at::mm(B.to(torch::kDouble), A.to(torch::kDouble));
          Tensor W = torch::randn({rows, columns}, torch::kDouble);
          const int64_t half = (rows + 1) / 2;
          W.slice(0, 0, half).copy_(nearly_opposite(moved.slice(0, 0, half)));
          W = lay_out(W.to(dtype));
          const auto strides = W.strides().vec();
          const Tensor exact = W.to(torch::kDouble) + moved;
          const Tensor terms = W.to(torch::kDouble).abs() +
              0.3 * at::mm(B.abs(), A.abs()).to(torch::kDouble);
          const auto version = W._version();
          peft::functional::lora_merge_(W, A, B, 0.3);
          // Half a unit, and what a rounding by way of float32 adds.
          CHECK(ulps(W, exact, terms) <= 0.501);
          CHECK(W.strides().vec() == strides);
          CHECK(W._version() > version);
        }
      }
    }
  }
  cpu::detail::isa() = before;
}

} // namespace test_merge_precision
