// What an adapter costs, by exact counts on the CPU: dispatched operators and
// bytes. The numbers of instructions are tests/cost.

#include "accounting.h"
#include "adapted.h"
#include "test.h"

#include <peft/models/bert.h>
#include <peft/models/gpt2.h>

#include <functional>
#include <iterator>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace test_cost {

using accounting::Memory;
using adapted::operator_names;
using torch::Tensor;

namespace {

namespace models = peft::models;
using Names = std::vector<std::string>;
using Sizes = std::vector<int64_t>;

void freeze(torch::nn::Module& model) {
  for (auto& p : model.parameters()) {
    p.set_requires_grad(false);
  }
}

int64_t count(const Names& names, const std::string& name) {
  return std::count(names.begin(), names.end(), name);
}

/// The names that `with` has more often than `without`.
std::map<std::string, int64_t> extra(const Names& with, const Names& without) {
  std::map<std::string, int64_t> result;
  for (const auto& name : with) {
    ++result[name];
  }
  for (const auto& name : without) {
    --result[name];
  }
  for (auto it = result.begin(); it != result.end();) {
    it = it->second == 0 ? result.erase(it) : std::next(it);
  }
  return result;
}

/// A frozen layer with LoRA and a call of it; n is large, so that what has a
/// row a token towers over what has the size of the weight or the factors.
struct Layer {
  static constexpr int64_t n = 256, in = 160, out = 224, r = 4;

  explicit Layer(at::ScalarType dtype, double dropout = 0.0)
      : element(static_cast<int64_t>(c10::elementSize(dtype))),
        x(torch::randn({n, in}, dtype).set_requires_grad(true)),
        dy(torch::randn({n, out}, dtype)) {
    linear->to(dtype);
    freeze(*linear);
    adapter = peft::attach(
        *linear,
        peft::LoraOptions(r).alpha(8).dropout(dropout).init("random").targets(
            peft::Targets::all_linear()));
    A = adapted::lora(adapter).lora_A;
    B = adapted::lora(adapter).lora_B;
    by_kernels = peft::functional::detail::by_kernels(x, A, B);
  }

  std::string path() const {
    return by_kernels ? "by the CPU kernels" : "by torch operators";
  }

  torch::nn::Linear linear{in, out};
  peft::Adapter adapter;
  int64_t element; // bytes
  Tensor x, dy, A, B;
  bool by_kernels = false;

  // Sizes in bytes; what is `large` has a row a token.
  int64_t x_size = n * in * element, y_size = n * out * element,
          t_size = n * r * element, A_size = r * in * element,
          B_size = out * r * element, large = in * out * element;
};

/// float32 goes by the CPU kernels where this build and this machine have
/// them, float64 always by torch operators.
at::ScalarType each_path() {
  return GENERATE(at::kFloat, at::kDouble);
}

Tensor random_tokens(int64_t rows, int64_t length) {
  return torch::randint(4, 40, {rows, length}, torch::kLong);
}

/// A small network and how it is run.
struct Network {
  std::string name;
  std::shared_ptr<torch::nn::Module> module;
  std::function<Tensor()> run;
};

Network bert() {
  models::BertForSequenceClassification model(models::BertOptions()
                                                  .vocab_size(40)
                                                  .hidden_size(16)
                                                  .num_hidden_layers(2)
                                                  .num_attention_heads(2)
                                                  .intermediate_size(32)
                                                  .max_position_embeddings(32));
  const Tensor ids = random_tokens(3, 6);
  return {"BERT", model.ptr(), [model, ids]() mutable {
            return model->forward(ids, torch::ones_like(ids));
          }};
}

Network gpt2() {
  models::Gpt2ForCausalLM model(models::Gpt2Options()
                                    .vocab_size(40)
                                    .n_positions(32)
                                    .n_embd(16)
                                    .n_layer(2)
                                    .n_head(2));
  const Tensor ids = random_tokens(3, 6);
  return {"GPT-2", model.ptr(), [model, ids]() mutable {
            return model->forward(ids, torch::ones_like(ids));
          }};
}

Network encoder() {
  const torch::nn::TransformerEncoderLayer layer(
      torch::nn::TransformerEncoderLayerOptions(16, 2).dim_feedforward(32));
  torch::nn::TransformerEncoder model(layer, 2);
  const Tensor x = torch::randn({5, 3, 16});
  return {"TransformerEncoder", model.ptr(), [model, x]() mutable {
            return model->forward(x);
          }};
}

std::vector<Network> networks() {
  return {bert(), gpt2(), encoder()};
}

peft::Adapter attach_lora(torch::nn::Module& model) {
  return peft::attach(model, adapted::acting());
}

/// What one run dispatches and allocates.
struct Cost {
  Names names;
  Sizes sizes;

  bool operator==(const Cost& other) const {
    return names == other.names && sizes == other.sizes;
  }
};

template <class Run>
Cost cost_of(Run&& run) {
  run(); // what is made once (masks, tables) is made
  Cost cost;
  cost.names = operator_names(run);
  const Memory memory;
  run();
  cost.sizes = memory.sizes();
  return cost;
}

} // namespace

TEST_CASE("A LoRA step allocates what it gives and t", "[cost]") {
  const auto dtype = each_path();
  const double dropout = GENERATE(0.0, 0.1);
  Layer layer(dtype, dropout);
  INFO("dropout " << dropout << ", " << layer.path());
  const Memory memory;
  {
    const Tensor y = layer.linear->forward(layer.x);
    // x is kept by reference: beside y only t is held.
    CHECK(memory.held() == layer.y_size + layer.t_size);
    y.backward(layer.dy);
  }
  CHECK(memory.held() == layer.x_size + layer.A_size + layer.B_size);
  // By operators dropout makes its mask and what it drops from, for a moment.
  if (dropout == 0.0 || layer.by_kernels) {
    CHECK(memory.of_at_least(layer.large) == Sizes{layer.y_size, layer.x_size});
    // Beside results, gradients and t: t's gradient and a transpose of B and of
    // its gradient; by operators the gradients once more, scaled.
    const int64_t small =
        (layer.by_kernels ? 1 : 2) * (layer.t_size + 2 * layer.B_size);
    CHECK(
        memory.allocated() <= layer.y_size + layer.x_size + layer.A_size +
            layer.B_size + layer.t_size + small);
  }
}

TEST_CASE("A LoRA step skips what nobody asks for", "[cost]") {
  Layer layer(each_path());
  INFO(layer.path());
  const auto step = [&](const Tensor& x) {
    layer.linear->forward(x).backward(layer.dy);
  };
  const auto products = [](const Names& names) {
    return count(names, "aten::mm") + count(names, "aten::addmm") +
        count(names, "aten::addmm_");
  };
  const int64_t all = products(operator_names([&] { step(layer.x); }));
  const int64_t skinny = layer.by_kernels ? 0 : 1; // as torch's products

  SECTION("the first layer has no dx") {
    const Tensor x = layer.x.detach();
    const Names names = operator_names([&] { step(x); });
    CHECK(all - products(names) == 1 + skinny);
    const Memory memory;
    step(x);
    CHECK(memory.of_at_least(layer.large) == Sizes{layer.y_size});
  }
  SECTION("a frozen B has no dB, and t is not kept") {
    layer.B.set_requires_grad(false);
    layer.B.mutable_grad().reset();
    const Names names = operator_names([&] { step(layer.x); });
    CHECK(all - products(names) == skinny);
    CHECK_FALSE(layer.B.grad().defined());
    const Memory memory;
    const Tensor y = layer.linear->forward(layer.x);
    CHECK(memory.held() == layer.y_size);
    const auto forward = memory.sizes().size();
    y.backward(layer.dy);
    for (size_t i = forward; i < memory.sizes().size(); ++i) {
      CHECK(memory.sizes()[i] != layer.B_size);
    }
  }
  SECTION("a frozen A has no dA, and x is not kept") {
    layer.A.set_requires_grad(false);
    layer.A.mutable_grad().reset();
    const Names names = operator_names([&] { step(layer.x); });
    CHECK(all - products(names) == skinny);
    CHECK_FALSE(layer.A.grad().defined());
    const Memory memory;
    Tensor x = layer.x + 1;
    const Tensor y = layer.linear->forward(x);
    x.reset();
    CHECK(memory.held() == layer.y_size + layer.t_size);
  }
  SECTION("without gradients nothing is held but y") {
    const torch::NoGradGuard no_grad;
    layer.linear->forward(layer.x); // the kernels keep B transposed
    const Memory memory;
    const Tensor y = layer.linear->forward(layer.x);
    CHECK(memory.held() == layer.y_size);
    CHECK(memory.allocated() == layer.y_size + layer.t_size);
  }
}

TEST_CASE("Unmerged inference: the big product and the skinny ones", "[cost]") {
  Layer layer(each_path());
  INFO(layer.path());
  const torch::NoGradGuard no_grad;
  const auto run = [&] { layer.linear->forward(layer.x); };
  run();
  Names names = operator_names(run);
  // What makes views and memory computes nothing.
  const std::set<std::string> views{
      "aten::to", // of what has the dtype: a copy would be _to_copy
      "aten::t",
      "aten::transpose",
      "aten::as_strided",
      "aten::expand",
      "aten::empty",
      "aten::detach",
      "detach",
      "aten::resolve_conj"};
  names.erase(
      std::remove_if(
          names.begin(),
          names.end(),
          [&](const std::string& name) { return views.count(name) != 0; }),
      names.end());
  // The first one is what the network calls; addmm itself copies the bias.
  const Names expected = layer.by_kernels ? Names{"aten::addmm", "aten::addmm_"}
                                          : Names{
                                                "aten::addmm",
                                                "aten::mm",
                                                "aten::addmm",
                                                "aten::copy_",
                                                "aten::addmm_"};
  CHECK(names == expected);
}

TEST_CASE("Evaluation may keep the effective weight", "[cost]") {
  torch::nn::Linear linear(64, 64);
  freeze(*linear);
  const torch::NoGradGuard no_grad;
  const Tensor x = torch::randn({8, 64});
  const auto run = [&] { linear->forward(x); };
  const Cost frozen = cost_of(run);
  peft::attach(
      *linear, peft::LoraOptions(8).targets(peft::Targets::all_linear()));
  run(); // the second time it is known to be wanted again
  const Cost kept = cost_of(run);
  CHECK(kept.sizes == frozen.sizes);
  CHECK(count(kept.names, "aten::mm") == 0);
  CHECK(count(kept.names, "aten::addmm") <= 2); // as called, as run
}

TEST_CASE("A step of BERT base allocates what the frozen one does", "[cost]") {
  const double dropout = GENERATE(0.0, 0.1);
  const auto options = models::BertOptions()
                           .num_hidden_layers(4)
                           .hidden_dropout_prob(0)
                           .attention_probs_dropout_prob(0);
  models::BertEncoder model(options);
  freeze(*model);
  const Tensor x = torch::randn({8, 128, 768}).set_requires_grad(true);
  const Tensor dy = torch::randn({8, 128, 768});
  const auto step = [&] {
    const Memory memory;
    model->forward(x, Tensor(), nullptr).hidden.backward(dy);
    return memory.allocated();
  };
  const int64_t base = step();
  auto adapter = peft::attach(
      *model,
      peft::LoraOptions(8).dropout(dropout).targets(
          peft::Targets::all_linear()));
  REQUIRE(adapter.sites().size() == 24);
  const int64_t adapted = step();
  const bool by_kernels = peft::functional::cpu::has_fast_skinny();
  INFO(
      "bytes a step, adapted / frozen, dropout "
      << dropout << (by_kernels ? ", by the CPU kernels" : ", by operators")
      << ": " << adapted << " / " << base << " = "
      << double(adapted) / double(base));
  if (dropout == 0.0 || by_kernels) {
    CHECK(adapted <= base * 1.01);
  }
}

TEST_CASE("A merged network costs what the frozen one does", "[cost]") {
  for (auto& network : networks()) {
    INFO(network.name);
    freeze(*network.module);
    network.module->eval();
    const torch::NoGradGuard no_grad;
    const Cost frozen = cost_of(network.run);
    attach_lora(*network.module);
    const Cost adapted = cost_of(network.run);
    CHECK_FALSE(adapted == frozen);
    peft::merge(*network.module);
    const Cost merged = cost_of(network.run);
    CHECK(merged.names == frozen.names);
    CHECK(merged.sizes == frozen.sizes);
  }
}

TEST_CASE("A disabled adapter adds no product and no memory", "[cost]") {
  for (auto& network : networks()) {
    INFO(network.name);
    freeze(*network.module);
    network.module->eval();
    const torch::NoGradGuard no_grad;
    const Cost frozen = cost_of(network.run);
    auto adapter = attach_lora(*network.module);
    adapter.disable();
    const Cost disabled = cost_of(network.run);
    CHECK(disabled.sizes == frozen.sizes);
    // The weight's alias, and what the network calls once more as it is run.
    const std::set<std::string> allowed{
        "aten::detach",
        "detach",
        "aten::t",
        "aten::matmul",
        "aten::addmm",
        "aten::embedding"};
    for (const auto& [name, times] : extra(disabled.names, frozen.names)) {
      INFO(name << " " << times << " times more");
      CHECK((times > 0 && allowed.count(name) == 1));
    }
  }
}

TEST_CASE("A network without an adapter is none the wiser", "[cost]") {
  for (auto& network : networks()) {
    INFO(network.name);
    network.module->eval();
    const Cost before = cost_of(network.run);
    for (auto& other : networks()) {
      attach_lora(*other.module);
    }
    CHECK(cost_of(network.run) == before);
  }
}

TEST_CASE("No adapter asks the device for a value", "[cost]") {
  const std::set<std::string> waits{
      "aten::item",
      "aten::_local_scalar_dense",
      "aten::nonzero",
      "aten::is_nonzero",
      "aten::equal",
      "aten::masked_select",
      "aten::_unique2"};
  using Attach = std::function<peft::Adapter(torch::nn::Module&)>;
  const auto method = [](auto options) -> Attach {
    return [options](torch::nn::Module& m) { return peft::attach(m, options); };
  };
  const std::vector<std::pair<std::string, Attach>> methods{
      {"none", [](torch::nn::Module&) { return peft::Adapter(); }},
      {"LoRA", method(peft::LoraOptions(2).dropout(0.1))},
      {"BitFit", method(peft::BitFitOptions())},
      {"(IA)3", method(peft::Ia3Options())},
      {"Houlsby", method(peft::HoulsbyOptions(4))},
      {"Pfeiffer", method(peft::PfeifferOptions(4))},
      {"parallel adapter", method(peft::ParallelAdapterOptions(4))},
      {"prompt", method(peft::PromptOptions(3))},
      {"P-tuning", method(peft::PTuningOptions(3))},
      {"prefix", method(peft::PrefixOptions(3))}};
  for (const auto& [name, attach] : methods) {
    for (auto& network : {bert(), gpt2()}) {
      INFO(name << " on " << network.name);
      attach(*network.module);
      const auto check = [&](const std::string& mode, const Names& names) {
        for (const auto& op : names) {
          if (waits.count(op) != 0) {
            FAIL_CHECK(mode << " runs " << op);
          }
        }
      };
      network.module->train();
      check("a training step", operator_names([&] {
              network.run().sum().backward();
            }));
      network.module->eval();
      const torch::NoGradGuard no_grad;
      check("evaluation", operator_names([&] { network.run(); }));
    }
  }
}

TEST_CASE("Attaching copies no weight", "[cost]") {
  auto network = bert();
  const Memory memory;
  const auto adapter = attach_lora(*network.module);
  const int64_t own = adapter.num_parameters() * int64_t(sizeof(float));
  CHECK(memory.held() == own);
  CHECK(memory.allocated() <= 2 * own);
  // The smallest adapted weight is 16 x 16.
  CHECK(memory.of_at_least(16 * 16 * sizeof(float)) == Sizes{});
}

} // namespace test_cost
