/// The explicit layers against attach, bit for bit: two ways to reach one
/// formula.

#include "adapted.h"
#include "model_state.h"
#include "test.h"

#include <memory>
#include <sstream>
#include <string>
#include <vector>

namespace test_explicit {

namespace {

using peft::LoraOptions;
using torch::Tensor;
using Names = std::vector<std::string>;
namespace nn = torch::nn;

template <class Holder>
Holder copy_of(const Holder& layer) {
  return Holder(std::dynamic_pointer_cast<typename Holder::ContainedType>(
      layer->clone()));
}

/// Runs both in every mode and holds their bits against each other. Both have
/// forward; `trained` are the same values on the two sides.
template <class Explicit, class Attached>
void same_bits(
    Explicit& layer,
    Attached& attached,
    peft::Adapter& adapter,
    const std::vector<Tensor>& trained,
    const std::vector<Tensor>& inputs) {
  const auto folded = [&](const auto& module) {
    std::vector<Tensor> values;
    for (const auto& p : module.named_parameters(/*recurse=*/false)) {
      values.push_back(peft::base(p.value()).detach().clone());
    }
    return values;
  };
  const auto before = folded(*layer->base_layer);
  const auto equal = [](const std::vector<Tensor>& a,
                        const std::vector<Tensor>& b) {
    REQUIRE(a.size() == b.size());
    for (size_t i = 0; i < a.size(); ++i) {
      INFO("tensor " << i);
      CHECK(equal_bits(a[i], b[i]));
    }
  };
  const auto both = [&](const Tensor& x) {
    seed(11); // the same dropout
    const Tensor y = layer->forward(x);
    seed(11);
    CHECK(equal_bits(y, attached->forward(x)));
    return y.detach();
  };

  for (const Tensor& input : inputs) {
    INFO("input " << input.sizes());
    const Tensor x = input.is_floating_point()
        ? input.detach().clone().set_requires_grad(true)
        : input;
    for (const bool training : {true, false}) {
      INFO("training " << training);
      layer->train(training);
      attached->train(training);
      both(x);
      {
        torch::NoGradGuard no_grad;
        both(x);
      }
      auto wanted = trained, others = adapter.parameters();
      if (x.requires_grad()) {
        wanted.push_back(x);
        others.push_back(x);
      }
      seed(12);
      const Tensor y = layer->forward(x);
      seed(12);
      const Tensor z = attached->forward(x);
      equal(adapted::gradients(y, wanted), adapted::gradients(z, others));
    }
    layer->disable();
    adapter.disable();
    CHECK(equal_bits(both(x), layer->base_layer->forward(x).detach()));
    layer->enable();
    adapter.enable();
    CHECK(layer->is_enabled());
  }

  layer->merge();
  adapter.merge();
  CHECK(layer->is_merged());
  equal(folded(*layer->base_layer), folded(*attached));
  {
    torch::NoGradGuard no_grad;
    both(inputs[0]);
  }
  for (const auto& error :
       {error_of([&] { layer->forward(inputs[0]).sum().backward(); }),
        error_of([&] { attached->forward(inputs[0]).sum().backward(); })}) {
    CHECK(contains(error, "is merged and cannot train"));
  }
  layer->unmerge();
  adapter.unmerge();
  equal(folded(*layer->base_layer), before);
  equal(folded(*attached), before);
}

template <class Holder>
void same_as_attach(
    const std::string& name,
    const Holder& layer,
    const LoraOptions& options,
    const std::vector<Tensor>& inputs) {
  INFO(name);
  Holder attached = copy_of(layer);
  peft::Lora<Holder> explicit_layer(layer, options);
  {
    torch::NoGradGuard no_grad;
    seed(21);
    explicit_layer->lora_A.normal_();
    explicit_layer->lora_B.normal_();
  }
  auto adapter = peft::attach(*attached, LoraOptions(options).targets(""));
  {
    torch::NoGradGuard no_grad;
    adapted::lora(adapter).lora_A.copy_(explicit_layer->lora_A);
    adapted::lora(adapter).lora_B.copy_(explicit_layer->lora_B);
  }
  CHECK(equal_bits(
      explicit_layer->delta_weight(),
      adapted::lora(adapter).effective(
          at::zeros_like(
              peft::base(attached->weight), explicit_layer->lora_A.dtype()),
          1.0)));
  same_bits(
      explicit_layer,
      attached,
      adapter,
      {explicit_layer->lora_A, explicit_layer->lora_B},
      inputs);
}

template <class Holder>
void bitfit_as_attach(
    const std::string& name,
    const Holder& layer,
    const std::vector<Tensor>& inputs) {
  INFO(name);
  Holder attached = copy_of(layer);
  peft::BitFit<Holder> explicit_layer(layer);
  auto adapter = peft::attach(*attached, peft::BitFitOptions());
  {
    torch::NoGradGuard no_grad;
    seed(22);
    explicit_layer->bias.normal_();
    adapter.parameters()[0].copy_(explicit_layer->bias);
  }
  same_bits(explicit_layer, attached, adapter, {explicit_layer->bias}, inputs);
}

} // namespace

TEST_CASE("Lora<Linear> is attach, bit for bit") {
  const auto options = LoraOptions(3).alpha(5);
  for (const auto dtype : {torch::kFloat, torch::kDouble, torch::kBFloat16}) {
    for (const bool bias : {true, false}) {
      seed();
      nn::Linear linear(nn::LinearOptions(6, 5).bias(bias));
      linear->to(dtype);
      const std::vector<Tensor> inputs{
          torch::randn({4, 6}).to(dtype),
          torch::randn({2, 4, 6}).to(dtype),
          torch::randn({2, 2, 4, 6}).to(dtype)};
      const std::string name =
          std::string(c10::toString(dtype)) + (bias ? ", bias" : "");
      same_as_attach(name, linear, options, inputs);
      same_as_attach(
          name + ", dropout",
          linear,
          LoraOptions(options).dropout(0.3).rslora(true),
          inputs);
    }
  }
}

TEST_CASE("Lora<Embedding> is attach, bit for bit") {
  const std::vector<Tensor> inputs{
      torch::tensor({1, 4, 4, 0}), torch::tensor({{1, 2, 6}, {6, 6, 0}})};
  struct Row {
    std::string name;
    nn::EmbeddingOptions options;
  };
  const nn::EmbeddingOptions table(7, 5);
  for (const auto& row : std::vector<Row>{
           {"plain", table},
           {"padding", nn::EmbeddingOptions(table).padding_idx(4)},
           {"padding from behind", nn::EmbeddingOptions(table).padding_idx(-1)},
           {"by frequency",
            nn::EmbeddingOptions(table).scale_grad_by_freq(true)}}) {
    same_as_attach(
        row.name, nn::Embedding(row.options), LoraOptions(2), inputs);
  }
}

TEST_CASE("Lora<Conv> is attach, bit for bit") {
  const auto options = LoraOptions(2).alpha(3);
  seed();
  SECTION("one dimension") {
    const auto conv = [] { return nn::Conv1dOptions(4, 6, 3); };
    const std::vector<Tensor> x{torch::randn({2, 4, 9}), torch::randn({4, 9})};
    same_as_attach("plain", nn::Conv1d(conv()), options, x);
    same_as_attach("stride", nn::Conv1d(conv().stride(2)), options, x);
    same_as_attach(
        "same", nn::Conv1d(conv().padding(torch::kSame)), options, x);
    same_as_attach(
        "circular",
        nn::Conv1d(conv().padding(1).padding_mode(torch::kCircular)),
        options,
        x);
    same_as_attach(
        "groups, dilation, no bias",
        nn::Conv1d(conv().groups(2).dilation(2).bias(false)),
        options,
        x);
  }
  SECTION("two dimensions") {
    const auto conv = [] { return nn::Conv2dOptions(4, 6, {3, 2}); };
    const std::vector<Tensor> x{torch::randn({2, 4, 7, 8})};
    same_as_attach("plain", nn::Conv2d(conv()), options, x);
    same_as_attach(
        "dropout", nn::Conv2d(conv()), LoraOptions(options).dropout(0.4), x);
    same_as_attach(
        "uneven",
        nn::Conv2d(conv().stride({2, 1}).padding({1, 0}).dilation({1, 2})),
        options,
        x);
    same_as_attach(
        "valid", nn::Conv2d(conv().padding(torch::kValid)), options, x);
    same_as_attach("groups", nn::Conv2d(conv().groups(2)), options, x);
    same_as_attach(
        "same", nn::Conv2d(conv().padding(torch::kSame)), options, x);
    const auto padded = [&](auto mode) {
      return nn::Conv2d(conv().padding({2, 1}).padding_mode(mode));
    };
    same_as_attach("reflect", padded(torch::kReflect), options, x);
    same_as_attach("replicate", padded(torch::kReplicate), options, x);
    same_as_attach("circular", padded(torch::kCircular), options, x);
    same_as_attach(
        "same, reflect, dilation",
        nn::Conv2d(conv()
                       .padding(torch::kSame)
                       .dilation(2)
                       .padding_mode(torch::kReflect)),
        options,
        x);
    nn::Conv2d half(conv());
    half->to(torch::kBFloat16);
    same_as_attach("bfloat16", half, options, {x[0].to(torch::kBFloat16)});
  }
  SECTION("three dimensions") {
    const auto conv = [] { return nn::Conv3dOptions(2, 4, 2); };
    const std::vector<Tensor> x{torch::randn({2, 2, 4, 5, 4})};
    same_as_attach(
        "uneven",
        nn::Conv3d(conv().stride({1, 2, 1}).padding({0, 1, 0})),
        options,
        x);
    same_as_attach(
        "replicate, groups",
        nn::Conv3d(conv().padding(1).groups(2).padding_mode(torch::kReplicate)),
        options,
        x);
    same_as_attach(
        "same", nn::Conv3d(conv().padding(torch::kSame)), options, x);
  }
}

TEST_CASE("BitFit<Layer> is attach, bit for bit") {
  seed();
  for (const auto dtype : {torch::kFloat, torch::kDouble}) {
    nn::Linear linear(6, 5);
    linear->to(dtype);
    bitfit_as_attach(
        "linear",
        linear,
        {torch::randn({4, 6}).to(dtype), torch::randn({2, 4, 6}).to(dtype)});
    nn::LayerNorm norm(nn::LayerNormOptions({6}));
    norm->to(dtype);
    bitfit_as_attach("layer norm", norm, {torch::randn({2, 4, 6}).to(dtype)});
    nn::GroupNorm groups(nn::GroupNormOptions(2, 6));
    groups->to(dtype);
    bitfit_as_attach("group norm", groups, {torch::randn({2, 6, 5}).to(dtype)});
    nn::Conv2d conv(nn::Conv2dOptions(4, 6, 3).groups(2).padding(1));
    conv->to(dtype);
    bitfit_as_attach("conv", conv, {torch::randn({2, 4, 5, 5}).to(dtype)});
    nn::Conv2d circular(
        nn::Conv2dOptions(4, 6, 3).padding(1).padding_mode(torch::kCircular));
    circular->to(dtype);
    bitfit_as_attach(
        "circular", circular, {torch::randn({2, 4, 5, 5}).to(dtype)});
  }
}

TEST_CASE("an explicit layer from options, and around a layer") {
  seed();
  peft::Lora<nn::Linear> fresh(nn::LinearOptions(6, 4), LoraOptions(2));
  CHECK(
      fresh->named_parameters().keys() ==
      Names{"lora_A", "lora_B", "base_layer.weight", "base_layer.bias"});
  CHECK(peft::trainable_parameters(*fresh).size() == 2);
  CHECK(fresh->scaling == 8. / 2);
  const Tensor x = torch::randn({3, 6});
  CHECK(equal_bits(fresh->forward(x), fresh->base_layer->forward(x)));

  nn::Linear linear(6, 4);
  const Tensor y = linear->forward(x);
  peft::Lora<nn::Linear> wrapped(linear, LoraOptions(2).init("random"));
  CHECK(wrapped->base_layer->weight.is_same(linear->weight));
  CHECK(wrapped->base_layer.get() == linear.ptr().get());
  CHECK_FALSE(linear->weight.requires_grad());
  CHECK_FALSE(linear->bias.requires_grad());
  CHECK(equal_bits(linear->forward(x), y)); // the layer itself is as before
  CHECK_FALSE(peft::is_adapted(linear->weight));
  CHECK_FALSE(equal_bits(wrapped->forward(x), y));

  nn::LayerNorm norm(nn::LayerNormOptions({6}));
  peft::BitFit<nn::LayerNorm> bias(norm);
  CHECK(bias->named_parameters().keys().front() == "bias");
  CHECK_FALSE(bias->bias.is_same(norm->bias)); // a copy trains
  CHECK(equal_bits(bias->bias, norm->bias));
}

TEST_CASE("an explicit layer trains, moves, saves, clones and prints") {
  seed();
  nn::Sequential model(
      peft::Lora<nn::Linear>(
          nn::LinearOptions(6, 8), LoraOptions(2).alpha(4).dropout(0.1)),
      nn::Tanh(),
      peft::BitFit<nn::LayerNorm>(nn::LayerNormOptions({8})),
      peft::Lora<nn::Linear>(nn::LinearOptions(8, 3), LoraOptions(2)));
  const Tensor x = torch::randn({5, 6});

  const auto before = state_of(*model);
  torch::optim::AdamW optimizer(
      model->parameters(), torch::optim::AdamWOptions(1e-2));
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    model->forward(x).pow(2).sum().backward();
    optimizer.step();
  }
  const auto after = state_of(*model);
  for (size_t i = 0; i < before.tensors.size(); ++i) {
    const auto& was = before.tensors[i];
    INFO(was.name);
    CHECK(was.requires_grad == !contains(was.name, "base_layer"));
    CHECK(
        equal_bits(was.value, after.tensors[i].value).agree !=
        was.requires_grad);
  }

  model->eval(); // no dropout
  const Tensor y = model->forward(x).detach();
  auto copy = nn::Sequential(
      std::dynamic_pointer_cast<nn::SequentialImpl>(model->clone()));
  CHECK(equal_bits(copy->forward(x), y));
  const auto ours = model->named_parameters();
  for (const auto& p : copy->named_parameters()) {
    INFO(p.key());
    CHECK(p.value().requires_grad() == ours[p.key()].requires_grad());
    CHECK_FALSE(p.value().is_alias_of(ours[p.key()]));
  }
  {
    torch::NoGradGuard no_grad;
    for (auto& p : copy->parameters()) {
      p.zero_();
    }
  }
  CHECK(equal_bits(model->forward(x), y)); // they share nothing
  CHECK(copy->forward(x).count_nonzero().item<int64_t>() == 0);

  TemporaryDirectory folder;
  torch::save(model, folder / "model.pt");
  torch::load(copy, folder / "model.pt");
  CHECK(equal_bits(copy->forward(x), y));

  model->to(torch::kDouble);
  CHECK(close(model->forward(x.to(torch::kDouble)), y));
  CHECK(model->forward(x.to(torch::kDouble)).scalar_type() == torch::kDouble);

  std::ostringstream text;
  text << model;
  CHECK(contains(text.str(), "peft::Lora(r=2, alpha=4)"));
  CHECK(contains(text.str(), "peft::BitFit(8)"));
  CHECK(contains(
      text.str(),
      "(base_layer): torch::nn::Linear(in_features=6, out_features=8"));
}

TEST_CASE("a clone of an explicit layer keeps its switches") {
  seed();
  const Tensor x = torch::randn({3, 6});
  peft::Lora<nn::Linear> layer(
      nn::LinearOptions(6, 4), LoraOptions(2).init("random"));
  const auto cloned = [&] {
    return std::dynamic_pointer_cast<peft::LoraImpl<nn::LinearImpl>>(
        layer->clone());
  };
  const Tensor W = layer->base_layer->weight.detach().clone();
  layer->lora_A.set_requires_grad(false);
  CHECK_FALSE(cloned()->lora_A.requires_grad());
  CHECK(cloned()->lora_B.requires_grad());
  layer->disable();
  CHECK_FALSE(cloned()->is_enabled());
  layer->enable();
  layer->merge();
  auto merged = cloned();
  CHECK(merged->is_merged());
  merged->unmerge();
  CHECK(equal_bits(merged->base_layer->weight, W));
  CHECK(layer->is_merged());
  layer->unmerge();
  CHECK(equal_bits(layer->base_layer->weight, W));
  CHECK(equal_bits(merged->forward(x), layer->forward(x)));
}

TEST_CASE("explicit layers refuse what cannot be right") {
  nn::Linear linear(6, 4);
  nn::Linear empty{nullptr};
  nn::Linear bare(nn::LinearOptions(6, 4).bias(false));
  nn::Embedding renormed(nn::EmbeddingOptions(5, 4).max_norm(1.0));
  nn::Conv2d grouped(nn::Conv2dOptions(4, 4, 3).groups(2));

  SECTION("layers") {
    CHECK(contains(
        error_of([&] { peft::Lora<nn::Linear> layer(empty, LoraOptions(2)); }),
        "peft: the layer to wrap is an empty holder"));
    CHECK(contains(
        error_of([&] { peft::BitFit<nn::Linear> layer(bare); }), "has none"));
    CHECK(contains(
        error_of(
            [&] { peft::Lora<nn::Embedding> layer(renormed, LoraOptions(2)); }),
        "max_norm"));
    CHECK(contains(
        error_of(
            [&] { peft::Lora<nn::Conv2d> layer(grouped, LoraOptions(3)); }),
        "r must be divisible by the groups"));
    // What was refused is left as it was.
    CHECK(bare->weight.requires_grad());
    CHECK(renormed->weight.requires_grad());
    CHECK(grouped->weight.requires_grad());
  }
  SECTION("switches") {
    peft::Lora<nn::Linear> layer(linear, LoraOptions(2).init("random"));
    CHECK(contains(error_of([&] { layer->unmerge(); }), "is not merged"));
    layer->merge();
    CHECK(contains(error_of([&] { layer->merge(); }), "already merged"));
    CHECK(contains(error_of([&] { layer->disable(); }), "unmerge() first"));
    layer->unmerge();
    layer->disable();
    CHECK(contains(error_of([&] { layer->merge(); }), "disabled"));
    CHECK_FALSE(layer->is_merged());
  }
  SECTION("values that are not finite") {
    peft::Lora<nn::Linear> layer(linear, LoraOptions(2).init("random"));
    torch::NoGradGuard no_grad;
    layer->lora_B[0][0] = NAN;
    const auto before = state_of(*layer);
    CHECK(contains(error_of([&] { layer->merge(); }), "not finite"));
    CHECK(same_state(state_of(*layer), before));
    CHECK_FALSE(layer->is_merged());
  }
  SECTION("options that only attach understands") {
    for (const auto& options :
         {LoraOptions(2).bias("all"),
          LoraOptions(2).modules_to_save({"head"}),
          LoraOptions(2).lora_bias(true),
          LoraOptions(2).fan_in_fan_out(true),
          LoraOptions(2).enable_lora({true, false, true})}) {
      CHECK(contains(
          error_of([&] { peft::Lora<nn::Linear> layer(linear, options); }),
          "peft: "));
    }
  }
}

} // namespace test_explicit
