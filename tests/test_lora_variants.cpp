// KaSA, BD-LoRA, MonteCLoRA and VeLoRA: the formulas in float64, and what else
// may be done with them.

#include "test.h"

#include "gradcheck.h"
#include "networks.h"

#include <nlohmann/json.hpp>

#include <cmath>
#include <functional>
#include <string>
#include <vector>

namespace test_lora_variants {

using torch::Tensor;

namespace {

/// A linear map from 8 to 6 features; its root is the layer itself.
torch::nn::Linear linear(torch::ScalarType dtype = torch::kDouble) {
  seed(1);
  torch::nn::Linear layer(8, 6);
  layer->to(dtype);
  return layer;
}

peft::LoraOptions kasa(int64_t r = 4) {
  return peft::LoraOptions(r).alpha(6).kasa(peft::KasaOptions());
}

/// Blocks of A or of B, whatever the layer's name.
peft::LoraOptions bd_lora(bool is_in_a = true, int64_t r = 4) {
  const std::vector<std::string> any{""};
  auto blocks = peft::BdLoraOptions().nblocks(2);
  is_in_a ? blocks.target_modules_bd_a(any) : blocks.target_modules_bd_b(any);
  return peft::LoraOptions(r).alpha(6).bd_lora(blocks);
}

peft::MonteCloraOptions drawn_options() {
  return peft::MonteCloraOptions()
      .num_samples(3)
      .sample_scaler(0.5)
      .buffer_size(1);
}
peft::LoraOptions monteclora(int64_t r = 4) {
  return peft::LoraOptions(r).alpha(6).monteclora(drawn_options());
}

peft::LoraOptions velora(int64_t r = 4) {
  return peft::LoraOptions(r).alpha(6).velora(
      peft::VeloraOptions().num_groups(3).scale(0.7));
}

struct Variant {
  std::string name;
  peft::LoraOptions options;
};
std::vector<Variant> variants(int64_t r = 4) {
  return {
      {"KaSA", kasa(r)},
      {"BD-LoRA of A", bd_lora(true, r)},
      {"BD-LoRA of B", bd_lora(false, r)},
      {"MonteCLoRA", monteclora(r)},
      {"VeLoRA", velora(r)}};
}

peft::Adapter attach_all(
    torch::nn::Module& model,
    peft::LoraOptions options,
    const std::string& name = "default") {
  return peft::attach(
      model, options.targets(peft::Targets::all_linear()), name);
}

/// Moves what trains as training would.
void move(const peft::Adapter& adapter, uint64_t number = 2) {
  seed(number);
  const torch::NoGradGuard no_grad;
  for (auto p : adapter.parameters()) {
    p.add_(0.3 * torch::randn_like(p));
  }
}

Tensor own(const peft::Adapter& adapter, const std::string& name) {
  const auto all = adapter.named_parameters();
  REQUIRE(all.contains(name));
  return all[name].to(torch::kDouble);
}

/// W' of the root layer as the papers write it, for scale 1 and alpha 6.
Tensor formula(
    const std::string& variant,
    const peft::Adapter& adapter,
    const Tensor& weight) {
  const Tensor W = weight.to(torch::kDouble);
  Tensor A = own(adapter, "lora_A.weight"), B = own(adapter, "lora_B.weight");
  const double s = 6.0 / static_cast<double>(A.size(0));
  const auto blocks = [](const Tensor& t) {
    return torch::block_diag(t.chunk(2));
  };
  if (variant == "KaSA") {
    const auto r = A.size(0);
    const Tensor d = own(adapter, "lora_diag");
    // The smallest triplets are what the largest leave.
    const auto [U, S, Vh] = torch::linalg_svd(W, /*full_matrices=*/false);
    const auto keep = S.size(0) - r;
    const Tensor major = torch::mm(
        U.slice(1, 0, keep) * S.slice(0, 0, keep), Vh.slice(0, 0, keep));
    return major + s * torch::mm(B * d, A);
  }
  if (variant == "BD-LoRA of A") {
    A = blocks(A);
  } else if (variant == "BD-LoRA of B") {
    B = blocks(B);
  }
  return W + s * torch::mm(B, A);
}

std::string attach_error(
    torch::nn::Module& model,
    const peft::LoraOptions& options) {
  const auto before = model.named_parameters().size();
  const auto error = error_of([&] { peft::attach(model, options); });
  REQUIRE(model.named_parameters().size() == before);
  REQUIRE(model.parameters().front().requires_grad());
  return error;
}

} // namespace

TEST_CASE("A variant's weight and output are the paper's") {
  for (const auto& [name, options] : variants()) {
    INFO(name);
    auto layer = linear();
    const Tensor W = layer->weight.detach().clone();
    const Tensor x = torch::randn({2, 3, 8}, torch::kDouble);
    const Tensor before = layer(x).detach();
    layer->eval();
    auto adapter = attach_all(*layer, options);
    REQUIRE(close(
        layer(x),
        torch::matmul(x, formula(name, adapter, W).t()) + layer->bias));
    if (name != "KaSA") { // B is zero
      REQUIRE(equal_bits(layer(x).detach(), before));
    }
    move(adapter);
    const Tensor expected = formula(name, adapter, W);
    REQUIRE(close(peft::effective(layer->weight), expected));
    REQUIRE(close(layer(x), torch::matmul(x, expected.t()) + layer->bias));
    {
      const torch::NoGradGuard no_grad;
      REQUIRE(close(layer(x), torch::matmul(x, expected.t()) + layer->bias));
    }
    // Rows of the weight, and its transpose.
    REQUIRE(close(
        torch::matmul(x, layer->weight.slice(0, 1, 4).t()),
        torch::matmul(x, expected.slice(0, 1, 4).t())));
    const Tensor v = torch::randn({5, 6}, torch::kDouble);
    REQUIRE(close(torch::matmul(v, layer->weight), torch::matmul(v, expected)));
    // The base keeps its bits, and disable() is the base.
    REQUIRE(equal_bits(peft::base(layer->weight).detach(), W));
    adapter.disable();
    REQUIRE(equal_bits(layer(x).detach(), before));
    adapter.enable();
    adapter.set_scale(0.5);
    REQUIRE(close(peft::effective(layer->weight), W + 0.5 * (expected - W)));
    adapter.detach();
    REQUIRE(equal_bits(layer->weight.detach(), W));
  }
}

TEST_CASE("A variant's gradients are those of finite differences") {
  const Tensor x0 = torch::randn({3, 8}, torch::kDouble);
  const Tensor direction = torch::randn({3, 6}, torch::kDouble);
  for (const auto& [name, options] : variants()) {
    for (const bool train : {false, true}) {
      if (train && name == "VeLoRA") {
        continue; // whose gradient of A is another
      }
      INFO(name << ", train " << train);
      auto layer = linear();
      auto adapter = attach_all(*layer, options);
      move(adapter);
      layer->train(train);
      std::vector<Tensor> inputs{x0.clone().set_requires_grad(true)};
      for (const auto& p : adapter.parameters()) {
        inputs.push_back(p);
      }
      const gradcheck::Function f = [&](const std::vector<Tensor>& t) {
        layer(x0); // MonteCLoRA's buffer of one is used up
        seed(7);
        return layer(t[0]);
      };
      REQUIRE(gradcheck::first_order(f, inputs, direction));
      REQUIRE(gradcheck::second_order(f, inputs, direction));
    }
  }
}

TEST_CASE("The penalties' gradients are those of finite differences") {
  const Tensor one = torch::ones({}, torch::kDouble);
  auto layer = linear();
  auto adapter =
      attach_all(*layer, kasa().kasa(peft::KasaOptions().beta(0.4).gamma(0.7)));
  move(adapter);
  REQUIRE(gradcheck::first_order(
      [&](const std::vector<Tensor>&) {
        return peft::kasa_regularization(adapter);
      },
      adapter.parameters(),
      one));
  const Tensor A = own(adapter, "lora_A.weight");
  const Tensor B = own(adapter, "lora_B.weight");
  const Tensor I = torch::eye(4, torch::kDouble);
  REQUIRE(close(
      peft::kasa_regularization(adapter),
      0.4 * own(adapter, "lora_diag").square().sum() +
          0.7 *
              ((torch::mm(B.t(), B) - I).norm() +
               (torch::mm(A, A.t()) - I).norm())));
  adapter.detach();

  const Tensor x = torch::randn({3, 8}, torch::kDouble);
  adapter = attach_all(
      *layer,
      monteclora().monteclora(
          drawn_options().use_entropy(true).kl_loss_weight(0.3)));
  move(adapter);
  REQUIRE(gradcheck::first_order(
      [&](const std::vector<Tensor>&) {
        layer(x);
        seed(7);
        layer(x);
        return peft::monteclora_regularization(adapter);
      },
      adapter.parameters(),
      one));
  layer->eval();
  REQUIRE_FALSE(peft::monteclora_regularization(adapter).defined());

  const auto error = error_of([&] { peft::kasa_regularization(adapter); });
  REQUIRE(contains(error, "kasa_regularization is KaSA's"));
  adapter.detach();
  adapter = attach_all(*layer, kasa());
  REQUIRE(contains(
      error_of([&] { peft::monteclora_regularization(adapter); }),
      "monteclora_regularization is MonteCLoRA's"));
}

TEST_CASE("MonteCLoRA's noise has the spread that it learns") {
  auto layer = linear();
  auto adapter = attach_all(
      *layer,
      monteclora().monteclora(drawn_options().num_samples(2).buffer_size(400)));
  const auto parameters = adapter.named_parameters();
  {
    const torch::NoGradGuard no_grad;
    parameters["lora_A.weight"].zero_();
    parameters["lora_B.weight"].copy_(torch::eye(6, 4, torch::kDouble));
    parameters["lora_monteclora_sampler.std_prior"].copy_(
        torch::tensor({0.0, 0.5, 1.0, -0.5}, torch::kDouble));
    // Nearly all weight on the first sample.
    parameters["lora_monteclora_sampler.expert_weights_prior"].copy_(
        torch::tensor({12.0, -1.0}, torch::kDouble));
  }
  const torch::NoGradGuard no_grad;
  const Tensor x = torch::eye(8, torch::kDouble);
  const Tensor base = torch::mm(x, peft::base(layer->weight).t()) + layer->bias;
  Tensor sum = torch::zeros({4}, torch::kDouble);
  for (int i = 0; i < 400; ++i) {
    const Tensor noise = (layer(x) - base) / 1.5; // s B = 1.5 I
    sum += noise.slice(1, 0, 4).square().mean(0);
  }
  // c² e^{2σ} E[K] E[w² + (1-w)²], where a chi-square of r degrees has mean r.
  const Tensor expected =
      0.25 * (2 * parameters["lora_monteclora_sampler.std_prior"]).exp() * 4.0;
  const Tensor ratio = sum / 400 / expected;
  REQUIRE(close(ratio, torch::ones_like(ratio), 0, 0.15));
  // Wherever else the weight is read there is no noise, and so in a merge.
  REQUIRE(equal_bits(
      peft::effective(layer->weight), peft::base(layer->weight).detach()));
  REQUIRE_FALSE(torch::equal(layer(x), layer(x)));
  adapter.merge();
  REQUIRE(torch::equal(layer(x), layer(x)));
}

TEST_CASE("VeLoRA's gradient of A is that of the compressed input") {
  // 8 inputs in 3 groups of 3: one zero is filled up.
  const Tensor x =
      torch::randn({2, 3, 8}, torch::kDouble).set_requires_grad(true);
  const Tensor direction = torch::randn({2, 3, 6}, torch::kDouble);
  for (const std::string type :
       {"batch_average", "batch_average_once", "random"}) {
    INFO(type);
    auto layer = linear();
    seed(3);
    auto adapter = attach_all(
        *layer,
        velora().velora(
            peft::VeloraOptions().num_groups(3).scale(0.7).init_type(type)));
    move(adapter);
    const auto e_of_file = [&] {
      return adapter.shared_state()
          ->sites.at(0)
          .delta->file_tensors()
          .at(2)
          .second.detach()
          .clone();
    };
    const Tensor drawn = e_of_file();
    for (const double factor : {1.0, -2.0}) {
      const Tensor input = (factor * x.detach()).set_requires_grad(true);
      const Tensor y = layer(input);
      const Tensor groups =
          at::constant_pad_nd(input.detach(), {0, 1}).reshape({6, 3, 3});
      const Tensor mean = groups.reshape({18, 3}).mean(0);
      Tensor e = mean / mean.norm();
      if (type == "random") {
        e = drawn;
      } else if (type == "batch_average_once") { // not turned by the second
        e = factor * e / std::abs(factor);
      }
      REQUIRE(close(e_of_file(), e));
      REQUIRE(close(e.norm(), torch::ones({}, torch::kDouble)));
      const Tensor kept = torch::matmul(groups, e);
      const Tensor seen = (kept.unsqueeze(-1) * e).flatten(1).slice(1, 0, 8);
      const Tensor A = own(adapter, "lora_A.weight");
      const Tensor B = own(adapter, "lora_B.weight");
      const Tensor g = direction.reshape({6, 6});
      const auto parameters = adapter.named_parameters();
      const auto ours = torch::autograd::grad(
          {(y * direction).sum()},
          {parameters["lora_A.weight"], parameters["lora_B.weight"], input});
      REQUIRE(close(ours[0], 1.5 * 0.7 * torch::mm(torch::mm(g, B).t(), seen)));
      const Tensor h = torch::matmul(input.detach(), A.t()).reshape({6, 4});
      REQUIRE(close(ours[1], 1.5 * torch::mm(g.t(), h)));
      REQUIRE(close(
          ours[2], torch::matmul(direction, peft::effective(layer->weight))));
    }
  }
  // A batch of zeros gives every input the same weight.
  auto layer = linear();
  auto adapter = attach_all(*layer, velora());
  layer(torch::zeros({2, 8}, torch::kDouble));
  REQUIRE(close(
      adapter.shared_state()->sites.at(0).delta->file_tensors().at(2).second,
      torch::full({3}, 1 / std::sqrt(3.0), torch::kDouble)));
}

TEST_CASE("KaSA's dropout leaves what is taken off alone") {
  auto layer = linear();
  auto adapter = attach_all(*layer, kasa().dropout(0.5));
  {
    const torch::NoGradGuard no_grad; // B is zero: only the part is left
    const Tensor x = torch::randn({3, 8}, torch::kDouble);
    layer->eval();
    const Tensor y = layer(x);
    layer->train();
    REQUIRE(close(layer(x), y));
    move(adapter);
    REQUIRE_FALSE(torch::equal(layer(x), layer(x)));
  }
}

TEST_CASE("A variant merges with one rounding, and unmerges to the bit") {
  for (const auto& [name, options] : variants()) {
    for (const auto dtype :
         {torch::kDouble, torch::kFloat, torch::kBFloat16, torch::kHalf}) {
      INFO(name << " " << dtype);
      auto layer = linear(dtype);
      const Tensor W = layer->weight.detach().clone();
      auto adapter = attach_all(*layer, options);
      move(adapter);
      Tensor exact;
      if (name == "KaSA") { // whose part is kept in float32
        const auto& delta = dynamic_cast<const peft::KasaDelta&>(
            *adapter.shared_state()->sites.at(0).delta);
        exact = W.to(torch::kDouble) +
            1.5 *
                torch::mm(
                    own(adapter, "lora_B.weight") * own(adapter, "lora_diag"),
                    own(adapter, "lora_A.weight")) -
            torch::mm(
                    delta.offset().B.to(torch::kDouble),
                    delta.offset().A.to(torch::kDouble));
        REQUIRE(close(
            exact,
            formula(name, adapter, W),
            0,
            dtype == torch::kDouble ? 1e-12 : 1e-5));
      } else {
        exact = formula(name, adapter, W);
      }
      for (int i = 0; i < 3; ++i) {
        adapter.merge();
        const Tensor merged = peft::base(layer->weight).detach();
        if (dtype == torch::kDouble) {
          REQUIRE(close(merged, exact, 1e-14, 1e-15));
        } else {
          REQUIRE(equal_bits(merged, exact.to(dtype)));
        }
        adapter.unmerge();
        REQUIRE(equal_bits(peft::base(layer->weight).detach(), W));
      }
    }
  }
}

TEST_CASE("Variants stand beside each other and beside LoRA") {
  auto layer = linear();
  layer->eval();
  const Tensor W = layer->weight.detach().clone();
  auto first = attach_all(*layer, kasa(), "first");
  auto second = attach_all(*layer, bd_lora(), "second");
  auto third = attach_all(*layer, peft::LoraOptions(2).alpha(4), "third");
  move(first, 2);
  move(second, 3);
  move(third, 4);
  const Tensor one = formula("KaSA", first, W) - W;
  const Tensor two = formula("BD-LoRA of A", second, W) - W;
  const Tensor three =
      2 * torch::mm(own(third, "lora_B.weight"), own(third, "lora_A.weight"));
  REQUIRE(close(peft::effective(layer->weight), W + one + two + three));
  const torch::NoGradGuard no_grad;
  const Tensor x = torch::randn({4, 8}, torch::kDouble);
  const auto row = [&](int64_t i, const Tensor& change) {
    return torch::matmul(x.slice(0, i, i + 1), (W + change).t()) + layer->bias;
  };
  Tensor y;
  {
    const peft::BatchAdapters scope({"second", "__base__", "first", "third"});
    y = layer(x);
  }
  REQUIRE(close(y.slice(0, 0, 1), row(0, two)));
  REQUIRE(close(y.slice(0, 1, 2), row(1, torch::zeros_like(W))));
  REQUIRE(close(y.slice(0, 2, 3), row(2, one)));
  REQUIRE(close(y.slice(0, 3, 4), row(3, three)));
  // Each of two KaSA adapters takes its part off.
  auto fourth = attach_all(*layer, kasa(), "fourth");
  move(fourth, 5);
  const Tensor four = formula("KaSA", fourth, W) - W;
  {
    const peft::ActiveAdapters scope({"fourth"});
    REQUIRE(close(peft::effective(layer->weight), W + four));
  }
  const peft::ActiveAdapters scope({"first", "fourth"});
  REQUIRE(close(peft::effective(layer->weight), W + one + four));
}

TEST_CASE("A variant comes back from its file and trains on") {
  const Tensor x = torch::randn({4, 10});
  const auto network = [] {
    seed(4);
    return std::make_shared<networks::Mlp>();
  };
  const auto step = [&](networks::Mlp& model, torch::optim::Optimizer& by) {
    model.forward(x); // MonteCLoRA's buffer of one is used up
    seed(9);
    by.zero_grad();
    model.forward(x).square().sum().backward();
    by.step();
  };
  for (const auto& [name, some] : variants(2)) {
    INFO(name);
    auto options = some;
    options.targets({"fc1", "fc2"});
    const TemporaryDirectory folder;
    const auto model = network();
    auto adapter = peft::attach(*model, options);
    move(adapter);
    torch::optim::AdamW optimizer(adapter.parameters(), 1e-2);
    step(*model, optimizer);
    peft::save(adapter, folder / "adapter");
    peft::save_optimizer(optimizer, adapter, folder / "adapter");

    const auto other = network();
    auto again = peft::load(*other, folder / "adapter");
    torch::optim::AdamW resumed(again.parameters(), 1e-2);
    peft::load_optimizer(resumed, again, folder / "adapter");
    model->eval();
    other->eval();
    REQUIRE(equal_bits(other->forward(x), model->forward(x)));
    model->train();
    other->train();
    step(*model, optimizer);
    step(*other, resumed);
    const auto left = adapter.named_parameters();
    for (const auto& item : again.named_parameters()) {
      INFO(item.key());
      REQUIRE(equal_bits(item.value().detach(), left[item.key()].detach()));
    }
  }
}

TEST_CASE("A copy of a model with a variant goes its own way") {
  const Tensor x = torch::randn({4, 8}, torch::kDouble);
  for (const auto& [name, options] : variants()) {
    INFO(name);
    auto layer = linear();
    auto adapter = attach_all(*layer, options);
    move(adapter);
    layer->eval();
    torch::nn::Linear copy = peft::clone(layer);
    const Tensor y = layer(x).detach();
    REQUIRE(equal_bits(copy(x).detach(), y));
    move(adapter);
    REQUIRE(equal_bits(copy(x).detach(), y));
    REQUIRE_FALSE(torch::equal(layer(x), y));
    layer->to(torch::kFloat);
    REQUIRE(layer(x.to(torch::kFloat)).scalar_type() == torch::kFloat);
  }
}

TEST_CASE("What KaSA takes off is kept beside its weights") {
  const TemporaryDirectory folder;
  auto layer = linear();
  auto adapter = attach_all(*layer, kasa());
  const auto file = folder / "adapter/libpeft_training.safetensors";
  peft::save(adapter, folder / "adapter");
  const auto kept = peft::load_safetensors(file);
  REQUIRE(kept.size() == 2);
  // PEFT has no such file; then the base gives it again.
  std::filesystem::remove(file);
  auto other = linear();
  peft::load(*other, folder / "adapter");
  REQUIRE(
      close(peft::effective(other->weight), peft::effective(layer->weight)));
}

TEST_CASE("KaSA takes nothing off that another adapter merged") {
  const TemporaryDirectory folder;
  auto layer = linear();
  const Tensor W = layer->weight.detach().clone();
  auto first = attach_all(*layer, peft::LoraOptions(4), "first");
  auto second = attach_all(*layer, kasa());
  move(first);
  peft::save(second, folder / "adapter");
  // As PEFT's files are: what is taken off is made of the base.
  std::filesystem::remove(folder / "adapter/libpeft_training.safetensors");
  first.merge();
  peft::hotswap_adapter(*layer, folder / "adapter");
  first.unmerge();
  first.disable();
  REQUIRE(close(peft::effective(layer->weight), formula("KaSA", second, W)));
}

TEST_CASE("A variant becomes a LoRA by its change") {
  for (const auto& [name, options] : variants(2)) {
    INFO(name);
    auto layer = linear();
    layer->eval();
    auto adapter = attach_all(*layer, options);
    move(adapter);
    const Tensor expected = peft::effective(layer->weight).detach();
    const TemporaryDirectory folder;
    const auto kept = peft::save_as_lora(
        adapter, folder / "lora", peft::ConvertToLoraOptions(4));
    REQUIRE(kept.energy > 1 - 1e-12);
    auto other = linear();
    const auto lora = peft::load(*other, folder / "lora");
    REQUIRE(lora.method() == "LORA");
    REQUIRE(close(peft::effective(other->weight), expected));
    const auto config =
        peft::AdapterConfig::read(folder / "lora/adapter_config.json");
    for (const char* field :
         {"kasa_config", "use_bdlora", "monteclora_config"}) {
      REQUIRE_FALSE(config.has(field));
    }
  }
}

TEST_CASE("What is for plain LoRA refuses its variants") {
  for (const auto& [name, options] : variants()) {
    INFO(name);
    auto layer = linear();
    auto adapter = attach_all(*layer, options);
    REQUIRE(contains(
        error_of([&] { peft::LoraFaStep step(adapter); }),
        "is " + name.substr(0, name.find(' ')) + ", which has another"));
    adapter.detach();
    auto named = options;
    named.targets(peft::Targets::all_linear());
    REQUIRE(contains(
        error_of([&] { peft::attach(*layer, peft::Gated(named)); }),
        "gates on a site without input"));
  }
}

TEST_CASE("Variants are not combined as LoRA is") {
  for (const auto& [name, options] : variants()) {
    INFO(name);
    auto layer = linear();
    auto first = attach_all(*layer, peft::LoraOptions(4), "first");
    auto second = attach_all(*layer, options, "second");
    for (const char* type : {"linear", "cat", "svd"}) {
      const auto error = error_of([&] {
        peft::add_weighted_adapter(
            *layer,
            {"first", "second"},
            {0.5, 0.5},
            "both",
            peft::WeightedAdapterOptions(type));
      });
      REQUIRE(contains(error, "'second' has '"));
      REQUIRE(contains(error, "only plain LoRA can"));
    }
  }
}

TEST_CASE("A variant's values are swapped in place") {
  const Tensor x = torch::randn({4, 10});
  const TemporaryDirectory folder;
  const auto network = [] {
    seed(4);
    return std::make_shared<networks::Mlp>();
  };
  for (const auto& [name, some] : variants(2)) {
    INFO(name);
    auto options = some;
    options.targets({"fc1", "fc2"});
    const auto source = network(), target = network();
    source->eval();
    target->eval();
    auto from = peft::attach(*source, options);
    move(from);
    peft::save(from, folder / "one");
    auto adapter = peft::attach(*target, options);
    const auto before = adapter.parameters();
    peft::hotswap_adapter(*target, folder / "one");
    REQUIRE(equal_bits(target->forward(x), source->forward(x)));
    const auto after = adapter.parameters();
    for (size_t i = 0; i < before.size(); ++i) {
      REQUIRE(after[i].is_same(before[i]));
    }
    // Another rank, fewer places, another kind: all or nothing.
    const Tensor y = target->forward(x).detach();
    const auto refused = [&](peft::LoraOptions other) {
      const auto model = network();
      peft::save(peft::attach(*model, other), folder / "two");
      const auto error =
          error_of([&] { peft::hotswap_adapter(*target, folder / "two"); });
      REQUIRE(equal_bits(target->forward(x).detach(), y));
      return error;
    };
    auto wider = name == "KaSA" ? kasa(4)
        : name == "MonteCLoRA"  ? monteclora(4)
        : name == "VeLoRA"      ? velora(4)
                                : bd_lora(name == "BD-LoRA of A", 4);
    REQUIRE(contains(refused(wider.targets({"fc1", "fc2"})), "has shape"));
    auto fewer = some;
    REQUIRE(contains(
        refused(fewer.targets(peft::Targets({"fc1"}))),
        "cannot become no change"));
    REQUIRE(contains(
        refused(peft::LoraOptions(2).targets({"fc1", "fc2"})),
        "has no such place"));
  }
}

TEST_CASE("BD-LoRA finds its factors by the layers' own names") {
  networks::Mlp model;
  const auto blocks = peft::BdLoraOptions()
                          .target_modules_bd_a({"c1"})
                          .target_modules_bd_b({"fc2"})
                          .nblocks(2);
  const auto options = [](const peft::BdLoraOptions& own) {
    return peft::LoraOptions(4).bd_lora(own).targets(
        peft::Targets::all_linear());
  };
  REQUIRE(contains(
      attach_error(model, options(blocks)), "names the target 'head'"));
  REQUIRE(contains(
      attach_error(
          model,
          options(peft::BdLoraOptions(blocks).target_modules_bd_b({"fc"}))),
      "both target_modules_bd_a and target_modules_bd_b name 'fc1'"));
  REQUIRE(contains(
      attach_error(
          model,
          options(peft::BdLoraOptions(blocks).match_strict(false).nblocks(3))),
      "nblocks = 3, r = 4 and 10"));
  REQUIRE(contains(
      attach_error(
          model,
          options(peft::BdLoraOptions(blocks).match_strict(false).nblocks(0))),
      "nblocks must be positive"));
  const auto adapter = peft::attach(
      model, options(peft::BdLoraOptions(blocks).match_strict(false)));
  const auto parameters = adapter.named_parameters();
  REQUIRE(parameters["fc1.lora_A.weight"].sizes() == at::IntArrayRef({4, 5}));
  REQUIRE(parameters["fc1.lora_B.weight"].sizes() == at::IntArrayRef({16, 4}));
  REQUIRE(parameters["fc2.lora_A.weight"].sizes() == at::IntArrayRef({4, 16}));
  REQUIRE(parameters["fc2.lora_B.weight"].sizes() == at::IntArrayRef({12, 2}));
  REQUIRE(parameters["head.lora_A.weight"].sizes() == at::IntArrayRef({4, 12}));
  REQUIRE(
      dynamic_cast<const peft::LoraDelta*>(
          adapter.shared_state()->sites.at(2).delta.get()) != nullptr);
}

TEST_CASE("Variants say what they are not for") {
  networks::Mlp model;
  for (const auto& [name, options] : variants()) {
    INFO(name);
    const std::string title = name.substr(0, name.find(' '));
    const auto with = [&](auto&& change) {
      peft::LoraOptions o = options;
      o.targets({"fc1"});
      change(o);
      return attach_error(model, o);
    };
    using O = peft::LoraOptions;
    REQUIRE(contains(
        with([](O& o) { o.dora(true); }), title + " does not go with dora"));
    REQUIRE(contains(
        with([](O& o) { o.target_parameters({"fc2.weight"}); }),
        title + " does not go with target_parameters"));
    REQUIRE(contains(
        with([](O& o) {
          o.enable_lora({true, false, true});
        }),
        title + " does not go with enable_lora"));
    REQUIRE(contains(
        with([](O& o) { o.init("pissa"); }),
        title + " starts by init 'gaussian', 'kaiming' or 'random'"));
    REQUIRE(contains(
        with([](O& o) {
          o.kasa(peft::KasaOptions());
          o.bd_lora(peft::BdLoraOptions());
        }),
        "does not go with another variant"));
    REQUIRE(contains(
        error_of([&, o = options] {
          peft::Lora<torch::nn::Linear>(torch::nn::LinearOptions(8, 6), o);
        }),
        "an explicit layer takes no"));

    networks::Gpt2Mlp gpt2;
    if (name != "MonteCLoRA" && name != "VeLoRA") {
      auto o = options;
      REQUIRE(contains(
          attach_error(gpt2, o.targets(peft::Targets({"c_fc"}))),
          "lies as [in, out]"));
    }
    for (const auto& [network, target] :
         std::vector<std::pair<std::string, std::string>>{
             {"tokens", "emb"}, {"conv2d", "conv1"}, {"attention", "attn"}}) {
      INFO(network);
      const auto host = networks::build(network);
      auto o = options;
      REQUIRE(contains(
          attach_error(*host.module, o.targets(peft::Targets({target}))),
          title + " is for linear layers"));
    }
  }
  peft::LoraOptions o = bd_lora();
  REQUIRE(contains(
      attach_error(model, o.lora_bias(true).init("kaiming").targets({"fc1"})),
      "BD-LoRA does not go with lora_bias"));
  REQUIRE(contains(
      attach_error(*linear(), kasa(6).targets(peft::Targets::all_linear())),
      "must leave one; at 'weight' r is 6, and the weight has 6"));
  REQUIRE(contains(
      attach_error(
          model, kasa().kasa(peft::KasaOptions().beta(-1)).targets({"fc1"})),
      "beta and gamma of KaSA must not be negative"));
  for (const auto& wrong :
       {drawn_options().num_samples(0),
        drawn_options().buffer_size(0),
        drawn_options().dirichlet_prior(0)}) {
    REQUIRE(contains(
        attach_error(model, monteclora().monteclora(wrong).targets({"fc1"})),
        "must be positive"));
  }
}

} // namespace test_lora_variants
