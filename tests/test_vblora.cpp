// VB-LoRA: what test_golden_tuners and test_every_method do not see.

#include "test.h"

#include "gradcheck.h"

#include <cmath>
#include <limits>

namespace test_vblora {

using peft::VbLoraOptions;
using torch::Tensor;

namespace {

struct NetImpl : torch::nn::Module {
  NetImpl() {
    first = register_module("first", torch::nn::Linear(8, 12));
    second = register_module("second", torch::nn::Linear(12, 4));
  }
  Tensor forward(const Tensor& x) {
    return second(torch::tanh(first(x)));
  }
  torch::nn::Linear first{nullptr}, second{nullptr};
};
TORCH_MODULE(Net);

VbLoraOptions options() {
  return VbLoraOptions(3).num_vectors(7).vector_length(4).topk(2).targets(
      {"first", "second"});
}

void move_away(const peft::Adapter& adapter, uint64_t number = 2) {
  seed(number);
  const torch::NoGradGuard no_grad;
  for (auto p : adapter.parameters()) {
    p.add_(torch::randn_like(p) * 0.5);
  }
}

Tensor input(torch::Dtype dtype = torch::kFloat) {
  seed(5);
  return torch::randn({6, 8}, dtype);
}

/// The pieces [n, m, length], entry by entry.
Tensor mixed(const Tensor& logits, const Tensor& bank, int64_t k) {
  Tensor result = torch::zeros(
      {logits.size(0), logits.size(1), bank.size(1)}, bank.options());
  for (int64_t i = 0; i < logits.size(0); ++i) {
    for (int64_t j = 0; j < logits.size(1); ++j) {
      const Tensor order = logits[i][j].argsort(-1, /*descending=*/true);
      double sum = 0;
      for (int64_t l = 0; l < k; ++l) {
        sum += std::exp(logits[i][j][order[l]].item<double>());
      }
      for (int64_t l = 0; l < k; ++l) {
        const double w = std::exp(logits[i][j][order[l]].item<double>()) / sum;
        result[i][j] += w * bank[order[l]];
      }
    }
  }
  return result;
}

/// B A of a layer, from the paper's words.
Tensor product(const peft::Adapter& adapter, const std::string& layer) {
  const torch::NoGradGuard no_grad;
  const auto p = adapter.named_parameters();
  const Tensor bank = p["vblora_vector_bank"];
  const Tensor a = mixed(p[layer + ".vblora_logits_A"], bank, 2);
  const Tensor b = mixed(p[layer + ".vblora_logits_B"], bank, 2);
  const int64_t r = a.size(0), length = bank.size(1);
  Tensor A = torch::zeros({r, a.size(1) * length}, bank.options());
  Tensor B = torch::zeros({b.size(0) * length, r}, bank.options());
  for (int64_t i = 0; i < A.size(1); ++i) {
    A.select(1, i).copy_(a.select(1, i / length).select(1, i % length));
  }
  for (int64_t i = 0; i < B.size(0); ++i) {
    B[i].copy_(b[i / length].select(1, i % length));
  }
  return B.mm(A);
}

std::string refusal(torch::nn::Module& model, const VbLoraOptions& wrong) {
  const auto error = error_of([&] { peft::attach(model, wrong); });
  CHECK(peft::adapters(model).empty());
  return error;
}

/// The numbers of a file, as bytes.
int64_t bytes_of(const std::string& folder) {
  int64_t bytes = 0;
  for (const auto& item :
       peft::load_safetensors(folder + "/adapter_model.safetensors")) {
    bytes += static_cast<int64_t>(item.second.nbytes());
  }
  return bytes;
}

} // namespace

TEST_CASE("VB-LoRA is its formula, in float64", "[vblora]") {
  seed(1);
  Net net;
  net->to(torch::kDouble);
  auto adapter = peft::attach(*net, options());
  move_away(adapter);
  const Tensor x = input(torch::kDouble);
  const Tensor w1 = peft::base(net->first->weight) + product(adapter, "first");
  const Tensor w2 =
      peft::base(net->second->weight) + product(adapter, "second");
  const Tensor y = torch::linear(
      torch::tanh(torch::linear(x, w1, net->first->bias)),
      w2,
      net->second->bias);
  CHECK(close(net->forward(x), y, 1e-12, 1e-13));
  CHECK(close(peft::effective(net->first->weight), w1, 1e-12, 1e-13));
  adapter.merge();
  CHECK(close(peft::base(net->first->weight), w1, 1e-12, 1e-13));
  CHECK(close(net->forward(x), y, 1e-12, 1e-13));
  adapter.unmerge();
}

TEST_CASE("Gradients of VB-LoRA by finite differences", "[vblora]") {
  const auto check = [](int64_t k) {
    seed(3);
    Net net;
    net->to(torch::kDouble);
    auto adapter = peft::attach(*net, options().topk(k));
    move_away(adapter);
    gradcheck::Tensors inputs = adapter.parameters();
    inputs.push_back(input(torch::kDouble).requires_grad_());
    CHECK(gradcheck::first_order(
        [&](const gradcheck::Tensors& t) { return net->forward(t.back()); },
        inputs,
        torch::randn({6, 4}, torch::kDouble)));
  };
  check(1); // one vector of weight 1: the logits get zeros
  check(2);
  check(7); // the whole bank
}

TEST_CASE("One bank serves all layers", "[vblora]") {
  seed(1);
  Net net;
  auto adapter = peft::attach(*net, options());
  const auto names = adapter.named_parameters();
  CHECK(names.size() == 5);
  const Tensor bank = names["vblora_vector_bank"];
  CHECK(bank.sizes() == at::IntArrayRef({7, 4}));
  size_t times = 0;
  for (const auto& p : net->parameters()) {
    times += p.is_same(bank) ? 1 : 0;
  }
  CHECK(times == 1); // what an optimizer of the model sees

  // Its gradient is the sum of those by way of each layer.
  const Tensor x = input();
  const auto gradient = [&] {
    bank.mutable_grad() = Tensor();
    net->forward(x).square().sum().backward();
    return bank.grad().clone();
  };
  const Tensor both = gradient();
  const auto without = [&](torch::nn::Linear& layer) {
    // The layer's weight as a constant: its part of the gradient is missing.
    const Tensor w = peft::effective(layer->weight).detach();
    const auto run = [&](torch::nn::Linear& l, const Tensor& t) {
      return l.get() == layer.get() ? torch::linear(t, w, l->bias) : l(t);
    };
    bank.mutable_grad() = Tensor();
    run(net->second, torch::tanh(run(net->first, x))).square().sum().backward();
    return bank.grad().clone();
  };
  const Tensor by_second = without(net->first);
  const Tensor by_first = without(net->second);
  CHECK(by_first.abs().max().item<double>() > 0);
  CHECK(by_second.abs().max().item<double>() > 0);
  CHECK(close(by_first + by_second, both, 1e-5, 1e-6));

  // A change of the bank changes every layer.
  const Tensor w1 = peft::effective(net->first->weight).detach().clone();
  const Tensor w2 = peft::effective(net->second->weight).detach().clone();
  {
    const torch::NoGradGuard no_grad;
    bank.add_(0.5);
  }
  CHECK_FALSE(torch::allclose(peft::effective(net->first->weight), w1));
  CHECK_FALSE(torch::allclose(peft::effective(net->second->weight), w2));
}

TEST_CASE("Kept weights of VB-LoRA follow the bank", "[vblora]") {
  seed(1);
  Net net;
  net->eval();
  auto adapter = peft::attach(*net, options());
  move_away(adapter);
  const Tensor bank = adapter.named_parameters()["vblora_vector_bank"];
  const torch::NoGradGuard no_grad;
  const Tensor x = input();
  const auto fresh = [&] {
    const Tensor w1 =
        peft::base(net->first->weight) + product(adapter, "first");
    const Tensor w2 =
        peft::base(net->second->weight) + product(adapter, "second");
    return torch::linear(
        torch::tanh(torch::linear(x, w1, net->first->bias)),
        w2,
        net->second->bias);
  };
  for (int i = 0; i < 3; ++i) {
    for (int k = 0; k < 4; ++k) {
      CHECK(close(net->forward(x), fresh(), 1e-5, 1e-5));
    }
    bank.mul_(-1.5);
  }
}

TEST_CASE("Counts of VB-LoRA, trained and saved", "[vblora]") {
  seed(1);
  const auto check = [](int64_t n, int64_t k, bool only, int64_t index_bytes) {
    INFO(n << " vectors, " << k << " of them");
    Net net;
    auto adapter = peft::attach(
        *net, options().num_vectors(n).topk(k).save_only_topk_weights(only));
    const int64_t pieces = 3 * (8 / 4 + 12 / 4) + 3 * (12 / 4 + 4 / 4);
    CHECK(adapter.num_parameters() == n * 4 + pieces * n);
    const TemporaryDirectory folder;
    peft::save(adapter, folder.path().string());
    const int64_t bytes = only
        ? 4 * n * 4 + pieces * ((k - 1) * 4 + k * index_bytes)
        : 4 * adapter.num_parameters();
    CHECK(bytes_of(folder.path().string()) == bytes);
    CHECK(peft::vblora_savable_parameters(adapter) == bytes / 4);
  };
  check(7, 2, false, 0);
  check(7, 1, true, 1);
  check(7, 2, true, 1);
  check(255, 3, true, 1);
  check(256, 3, true, 2);
  check(32768, 2, true, 4);
  Net net;
  const auto lora = peft::attach(*net, peft::LoraOptions(2).targets({"first"}));
  CHECK(contains(
      error_of([&] { peft::vblora_savable_parameters(lora); }), "LORA"));
}

TEST_CASE("VB-LoRA's files come back, and training goes on", "[vblora]") {
  const TemporaryDirectory folder;
  seed(1);
  Net net, other;
  {
    const torch::NoGradGuard no_grad;
    for (const auto& item : net->named_parameters()) {
      other->named_parameters()[item.key()].copy_(item.value());
    }
  }
  const Tensor x = input();
  const auto step = [&](Net& n, torch::optim::SGD& optimizer) {
    optimizer.zero_grad();
    n->forward(x).square().mean().backward();
    optimizer.step();
  };
  auto adapter = peft::attach(*net, options());
  move_away(adapter);
  torch::optim::SGD optimizer(adapter.parameters(), 0.1);
  step(net, optimizer);
  peft::save(adapter, folder.path().string());
  const auto tensors =
      peft::load_safetensors(folder / "adapter_model.safetensors");
  CHECK(tensors.size() == 5);
  CHECK(tensors.count("base_model.vblora_vector_bank") == 1);
  CHECK(tensors.count("base_model.model.first.vblora_logits_A") == 1);

  auto again = peft::load(*other, folder.path().string());
  CHECK(equal_bits(other->forward(x), net->forward(x)));
  torch::optim::SGD resumed(again.parameters(), 0.1);
  for (int i = 0; i < 3; ++i) {
    step(net, optimizer);
    step(other, resumed);
  }
  for (const auto& item : adapter.named_parameters()) {
    INFO(item.key());
    CHECK(equal_bits(again.named_parameters()[item.key()], item.value()));
  }
}

TEST_CASE(
    "VB-LoRA of top-k weights runs and merges, and is not trained",
    "[vblora]") {
  const auto k = GENERATE(1, 2, 3);
  INFO("topk " << k);
  const TemporaryDirectory folder;
  const std::string saved = folder / "saved", again = folder / "again";
  seed(1);
  Net net;
  net->eval();
  auto adapter =
      peft::attach(*net, options().topk(k).save_only_topk_weights(true));
  move_away(adapter);
  peft::save(adapter, saved);
  const auto tensors =
      peft::load_safetensors(saved + "/adapter_model.safetensors");
  CHECK(tensors.size() == 9);
  const std::string key = "base_model.model.second.vblora_logits_B_topk_";
  CHECK(tensors.at(key + "indices").scalar_type() == torch::kByte);
  CHECK(tensors.at(key + "indices").sizes() == at::IntArrayRef({1, 3, k}));
  CHECK(tensors.at(key + "weights").sizes() == at::IntArrayRef({1, 3, k - 1}));

  const Tensor x = input();
  const Tensor y = net->forward(x).detach();
  const Tensor w = peft::effective(net->first->weight).detach();
  adapter.detach();
  auto loaded = peft::load(*net, saved);
  CHECK(close(net->forward(x), y, 1e-6, 1e-6));
  CHECK(close(peft::effective(net->first->weight), w, 1e-6, 1e-6));
  CHECK(peft::vblora_savable_parameters(loaded) * 4 <= bytes_of(saved));
  // Saved again it is the same file, and the same function to the bit.
  peft::save(loaded, again);
  const auto twice =
      peft::load_safetensors(again + "/adapter_model.safetensors");
  CHECK(twice.size() == tensors.size());
  for (const auto& [name, value] : tensors) {
    INFO(name);
    CHECK(equal_bits(twice.at(name), value));
  }
  const Tensor before = net->forward(x).detach();
  loaded.detach();
  {
    const c10::InferenceMode inference;
    loaded = peft::load(*net, again, "again");
  }
  CHECK(equal_bits(net->forward(x), before));

  // Training is refused where it would begin.
  net->train();
  const auto error = error_of([&] { net->forward(x); });
  CHECK(contains(error, "save_only_topk_weights"));
  CHECK(contains(error, "cannot be trained"));
  {
    const torch::NoGradGuard no_grad;
    CHECK(equal_bits(net->forward(x), before));
  }
  loaded.set_trainable(false); // beside another that trains, say
  CHECK(equal_bits(net->forward(x), before));
  CHECK_FALSE(net->forward(x).requires_grad());

  const Tensor weight = peft::base(net->first->weight).detach().clone();
  loaded.merge();
  CHECK(close(peft::base(net->first->weight), w, 1e-6, 1e-6));
  CHECK(close(net->forward(x), before, 1e-5, 1e-6));
  loaded.unmerge();
  CHECK(equal_bits(peft::base(net->first->weight), weight));
}

TEST_CASE("Top-k weights may sum to more than 1", "[vblora]") {
  // The two that are saved do in float32; PEFT takes the logarithm of what is
  // left for the third, and its outputs are NaN.
  const TemporaryDirectory folder;
  seed(1);
  Net net;
  net->eval();
  auto adapter =
      peft::attach(*net, options().topk(3).save_only_topk_weights(true));
  {
    const torch::NoGradGuard no_grad;
    for (auto p : adapter.parameters()) {
      if (p.dim() == 3) {
        p.copy_(torch::tensor(
            {11.70263385772705,
             7.907114028930664,
             -4.9634690284729,
             -9.0,
             -9.0,
             -9.0,
             -9.0}));
      }
    }
  }
  const Tensor x = input();
  const Tensor y = net->forward(x).detach();
  peft::save(adapter, folder.path().string());
  const auto weights =
      peft::load_safetensors(folder / "adapter_model.safetensors")
          .at("base_model.model.first.vblora_logits_A_topk_weights");
  CHECK(weights.sum(-1).gt(1).all().item<bool>());
  adapter.detach();
  auto loaded = peft::load(*net, folder.path().string());
  CHECK(close(net->forward(x), y, 1e-6, 1e-6));
  loaded.merge();
  CHECK(close(net->forward(x), y, 1e-5, 1e-6));
}

TEST_CASE("Logits that were cut off are no start for training", "[vblora]") {
  // What PEFT writes when it has loaded top-k weights and saves all logits.
  const TemporaryDirectory folder;
  seed(1);
  Net net;
  auto adapter = peft::attach(*net, options());
  {
    const torch::NoGradGuard no_grad;
    for (auto p : adapter.parameters()) {
      if (p.dim() == 3) {
        p.slice(-1, 2).fill_(-std::numeric_limits<float>::infinity());
      }
    }
  }
  net->eval();
  const Tensor x = input();
  const Tensor y = net->forward(x).detach();
  peft::save(adapter, folder.path().string());
  adapter.detach();
  peft::load(*net, folder.path().string());
  CHECK(equal_bits(net->forward(x), y));
  net->train();
  CHECK(contains(error_of([&] { net->forward(x); }), "cannot be trained"));
}

TEST_CASE("A structure keeps VB-LoRA's bank, or is refused", "[vblora]") {
  seed(1);
  Net net;
  const std::vector<peft::AnyOptions> candidates{options()};
  const auto all =
      peft::candidates(*net, peft::S3DeltaOptions(1000).candidates(candidates));
  REQUIRE(all.size() == 2);
  const auto structure = [&](std::vector<std::string> names) {
    return peft::S3DeltaStructure()
        .candidates(candidates)
        .modules(std::move(names));
  };
  auto adapter = peft::attach(*net, structure({all[0].name}));
  CHECK(adapter.named_parameters().size() == 3);
  adapter.detach();
  CHECK(contains(
      error_of([&] { peft::attach(*net, structure({all[1].name})); }),
      "shares with its whole method"));
  CHECK(peft::adapters(*net).empty());
}

TEST_CASE("Files of VB-LoRA that do not fit are refused", "[vblora]") {
  const TemporaryDirectory folder;
  seed(1);
  Net net;
  auto adapter = peft::attach(*net, options().save_only_topk_weights(true));
  peft::save(adapter, folder.path().string());
  adapter.detach();
  const auto file = folder / "adapter_model.safetensors";
  const auto whole = peft::load_safetensors(file);
  const auto said = [&](const std::string& key, const Tensor& value) {
    auto tensors = whole;
    tensors.erase(key);
    if (value.defined()) {
      tensors[key] = value;
    }
    peft::save_safetensors(tensors, file, {{"format", "pt"}});
    const auto error =
        error_of([&] { peft::load(*net, folder.path().string()); });
    CHECK(peft::adapters(*net).empty());
    return error;
  };
  const std::string indices =
      "base_model.model.first.vblora_logits_A_topk_indices";
  CHECK(contains(
      said(indices, torch::full_like(whole.at(indices), 7)),
      "outside of the bank's 7 vectors"));
  CHECK(contains(
      said("base_model.vblora_vector_bank", {}),
      "missing from the file:\n    vblora_vector_bank"));
  CHECK(contains(
      said("base_model.vblora_vector_bank", torch::zeros({7, 3})),
      "vblora_vector_bank: shape [7, 3] where [7, 4] fits"));
  CHECK(contains(
      said("base_model.model.first.vblora_logits_A_topk_weights", {}),
      "first.vblora_logits_A_topk_weights"));
}

TEST_CASE(
    "VB-LoRA refuses what it cannot do, and leaves the model",
    "[vblora]") {
  Net net;
  CHECK(contains(refusal(*net, options().r(0)), "r must be positive, got 0"));
  CHECK(contains(refusal(*net, options().num_vectors(-1)), "num_vectors"));
  CHECK(contains(refusal(*net, options().vector_length(0)), "vector_length"));
  CHECK(contains(refusal(*net, options().topk(0)), "topk must lie between 1"));
  CHECK(contains(refusal(*net, options().topk(8)), "the 7 vectors"));
  CHECK(contains(refusal(*net, options().dropout(1)), "[0, 1)"));
  CHECK(contains(
      refusal(*net, options().init_vector_bank_bound(-1)),
      "init_vector_bank_bound"));
  CHECK(contains(
      refusal(*net, options().init_logits_std(INFINITY)), "init_logits_std"));
  CHECK(contains(refusal(*net, options().bias("some")), "'vblora_only'"));
  CHECK(contains(
      refusal(*net, options().vector_length(8)),
      "does not divide the 12 outputs of 'first.weight'"));
  CHECK(contains(
      refusal(*net, options().vector_length(6).targets({"second"})),
      "does not divide the 4 outputs of 'second.weight'"));
  CHECK(contains(
      refusal(*net, options().vector_length(12).targets({"first"})),
      "does not divide the 8 inputs of 'first.weight'"));
  CHECK(contains(refusal(*net, options().targets({"frist"})), "first"));
  torch::nn::Embedding table(10, 4);
  CHECK(contains(
      refusal(*table, options().targets(peft::Targets({""}))),
      "VB-LoRA adapts linear layers"));
}

} // namespace test_vblora
