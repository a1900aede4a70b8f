// LoRA on parameters (target_parameters) and trainable tokens inside LoRA: what
// test_golden_parameters and test_golden_hosts do not see.

#include "test.h"

#include "accounting.h"
#include "gradcheck.h"
#include "model_state.h"
#include "networks.h"

#include <peft/models/gpt2.h>

#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace test_lora_parameters {

using peft::LoraOptions;
using peft::Targets;
using torch::Tensor;

namespace {

const Targets kStacks({"experts.up", "experts.down"});

/// A mixture with weights that are not zero.
std::shared_ptr<networks::Mixture> mixture(
    bool transposed,
    torch::Dtype dtype = torch::kDouble) {
  seed(3);
  auto network = std::make_shared<networks::Mixture>(5, transposed);
  torch::NoGradGuard no_grad;
  for (auto& p : network->parameters()) {
    p.copy_(torch::randn_like(p) * 0.5);
  }
  network->to(dtype);
  return network;
}

/// W_e + s · B_e A_e, one expert after the other, in float64.
Tensor by_hand(
    const Tensor& weight,
    const Tensor& A,
    const Tensor& B,
    double s,
    bool transposed) {
  const int64_t experts = weight.size(0), r = A.size(0) / experts;
  std::vector<Tensor> result;
  for (int64_t e = 0; e < experts; ++e) {
    Tensor delta = torch::zeros({B.size(0), A.size(1)}, torch::kDouble);
    for (int64_t i = 0; i < r; ++i) {
      delta += torch::outer(
          B.select(1, i * experts + e).to(torch::kDouble),
          A.select(0, e * r + i).to(torch::kDouble));
    }
    result.push_back(
        weight[e].to(torch::kDouble) + s * (transposed ? delta.t() : delta));
  }
  return torch::stack(result);
}

Tensor parameter(const peft::Adapter& adapter, const std::string& key) {
  const auto all = adapter.named_parameters();
  REQUIRE(all.contains(key));
  return all[key];
}

} // namespace

TEST_CASE("a stack of matrices gets a product for each of them") {
  for (const bool transposed : {false, true}) {
    INFO("transposed " << transposed);
    auto network = mixture(transposed);
    auto adapter = peft::attach(
        *network,
        LoraOptions(2)
            .alpha(6)
            .target_parameters(kStacks)
            .parameters_transposed(transposed)
            .rank_pattern({{"experts.up", 3}})
            .alpha_pattern({{"down", 5}}));
    randomise(adapter);
    // The last of a module's parameters is the outermost in a file.
    const auto A = parameter(adapter, "experts.base_layer.lora_A.weight");
    const auto B = parameter(adapter, "experts.base_layer.lora_B.weight");
    CHECK(A.sizes() == torch::IntArrayRef({3 * 3, 4}));
    CHECK(B.sizes() == torch::IntArrayRef({5, 3 * 3}));
    const auto up = peft::base(network->experts->up).detach();
    const auto down = peft::base(network->experts->down).detach();
    CHECK(close(
        peft::effective(network->experts->up),
        by_hand(up, A, B, 6.0 / 3, transposed)));
    CHECK(close(
        peft::effective(network->experts->down),
        by_hand(
            down,
            parameter(adapter, "experts.lora_A.weight"),
            parameter(adapter, "experts.lora_B.weight"),
            5.0 / 2,
            transposed)));
    CHECK(adapter.num_parameters() == 3 * 3 * (4 + 5) + 3 * 2 * (4 + 5));
    CHECK(adapter.sites()[0].name == "experts.up");
    CHECK(adapter.sites()[0].what == "lora r=3 of 3 matrices");
  }
}

TEST_CASE("a stack is read in every way there is") {
  const std::vector<std::pair<std::string, std::function<Tensor(Tensor)>>> ways{
      {"bmm",
       [](const Tensor& w) {
         return torch::bmm(torch::ones({3, 2, 4}, w.options()), w.mT());
       }},
      {"baddbmm",
       [](const Tensor& w) {
         const auto x = torch::ones({3, 2, 4}, w.options());
         return torch::baddbmm(torch::ones({3, 2, 5}, w.options()), x, w.mT());
       }},
      {"einsum",
       [](const Tensor& w) {
         return torch::einsum(
             "ni,eoi->eno", {torch::ones({2, 4}, w.options()), w});
       }},
      {"matmul",
       [](const Tensor& w) {
         return torch::matmul(torch::ones({2, 4}, w.options()), w.mT());
       }},
      {"one by one",
       [](const Tensor& w) {
         return torch::linear(torch::ones({2, 4}, w.options()), w[1]) +
             torch::nn::functional::linear(
                    torch::ones({2, 4}, w.options()), w.select(0, 2));
       }},
      {"index_select",
       [](const Tensor& w) {
         const auto which = torch::tensor({2, 0});
         return torch::matmul(
             torch::ones({2, 4}, w.options()), w.index_select(0, which).mT());
       }},
      {"index",
       [](const Tensor& w) {
         return w.index({torch::tensor({1, 1, 0})}).sin();
       }},
      {"unbind",
       [](const Tensor& w) {
         Tensor sum;
         for (const auto& one : w.unbind(0)) {
           const auto y = torch::mm(torch::ones({2, 4}, w.options()), one.t());
           sum = sum.defined() ? sum * y : y;
         }
         return sum;
       }},
      {"chunk",
       [](const Tensor& w) {
         const auto halves = w.slice(1, 0, 4).chunk(2, 1);
         return torch::sigmoid(halves[0]) * halves[1];
       }},
  };
  for (const auto& [name, read] : ways) {
    INFO(name);
    auto network = mixture(false);
    auto adapter =
        peft::attach(*network, LoraOptions(2).target_parameters(kStacks));
    randomise(adapter);
    const auto A = parameter(adapter, "experts.base_layer.lora_A.weight");
    const auto B = parameter(adapter, "experts.base_layer.lora_B.weight");
    const auto& w = network->experts->up;
    const auto direction = torch::randn_like(read(peft::effective(w)).detach());
    const auto f = [&](const std::vector<Tensor>&) { return read(w); };
    CHECK(gradcheck::first_order(f, {A, B}, direction));

    const auto same = by_hand(peft::base(w).detach(), A, B, 4, false);
    CHECK(close(read(w), read(same)));
    torch::NoGradGuard no_grad;
    CHECK(close(read(w), read(same)));
    CHECK(close(read(w), read(same))); // the value that was kept
    adapter.set_scale(0.25);
    CHECK(
        close(read(w), read(by_hand(peft::base(w).detach(), A, B, 1, false))));
    adapter.disable();
    CHECK(equal_bits(read(w), read(peft::base(w).detach())));
  }
}

TEST_CASE("in training a matrix of a stack is made alone") {
  using Read = std::function<Tensor(const Tensor&, int64_t)>;
  const std::vector<std::pair<std::string, Read>> ways{
      {"select", [](const Tensor& w, int64_t e) { return w.select(0, e); }},
      {"from the end", [](const Tensor& w, int64_t e) { return w[e - 6]; }},
      {"unbind", [](const Tensor& w, int64_t e) { return w.unbind()[e]; }},
      {"views of it",
       [](const Tensor& w, int64_t e) {
         return w[e].t().slice(0, 1, 7).t().slice(1, 0, 4);
       }},
      {"a slice first", // which is made whole
       [](const Tensor& w, int64_t e) { return w.slice(0, e).select(0, 0); }}};
  for (const bool transposed : {false, true}) {
    for (const auto& way : ways) {
      INFO(way.first << ", transposed " << transposed);
      seed(4);
      auto module = std::make_shared<torch::nn::Module>();
      Tensor stack = module->register_parameter(
          "stack", torch::randn({6, 16, 9}, torch::kDouble));
      std::vector<peft::Adapter> both;
      for (const std::string own : {"a", "b"}) {
        both.push_back(peft::attach(
            *module,
            LoraOptions(2)
                .target_parameters(Targets({"stack"}))
                .parameters_transposed(transposed),
            own));
        randomise(both.back());
      }
      both.back().set_scale(-0.5);
      const auto gradients = [&](const Tensor& loss) {
        std::vector<Tensor> all;
        for (const auto& adapter : both) {
          const auto own = adapter.parameters();
          all.insert(all.end(), own.begin(), own.end());
        }
        return torch::autograd::grad({loss}, all);
      };
      const auto loss = [&](const Tensor& w) {
        Tensor sum = torch::zeros({}, torch::kDouble);
        for (const int64_t e : {1, 4, 1}) {
          sum = sum + way.second(w, e).square().sum() * static_cast<double>(e);
        }
        return sum;
      };
      const auto want = loss(peft::effective(stack));
      const accounting::Memory memory;
      const auto got = loss(stack);
      const auto whole = memory.of_at_least(stack.numel() * 8);
      CHECK(whole.empty() == (way.first != "a slice first"));
      CHECK(close(got, want, 1e-13, 0));
      const auto a = gradients(got), b = gradients(want);
      for (size_t i = 0; i < a.size(); ++i) {
        CHECK(close(a[i], b[i], 1e-12, 1e-12));
      }
    }
  }
}

TEST_CASE("a stack merges to the bit and back") {
  for (const auto dtype :
       {torch::kDouble, torch::kFloat, torch::kBFloat16, torch::kHalf}) {
    for (const bool transposed : {false, true}) {
      INFO(dtype << ", transposed " << transposed);
      auto network = mixture(transposed, dtype);
      auto adapter = peft::attach(
          *network,
          LoraOptions(2).target_parameters(kStacks).parameters_transposed(
              transposed));
      randomise(adapter);
      const auto before = peft::base(network->experts->up).detach().clone();
      const auto exact = by_hand(
          before,
          parameter(adapter, "experts.base_layer.lora_A.weight"),
          parameter(adapter, "experts.base_layer.lora_B.weight"),
          4,
          transposed);
      for (int i = 0; i < 3; ++i) {
        adapter.merge();
        const auto merged = peft::base(network->experts->up).detach();
        CHECK(merged.scalar_type() == dtype);
        // One unit in the last place of the exact value.
        const double unit = dtype == torch::kDouble ? 0x1p-50
            : dtype == torch::kFloat                ? 0x1p-21
            : dtype == torch::kHalf                 ? 0x1p-10
                                                    : 0x1p-7;
        CHECK(close(merged, exact, unit, 1e-6));
        adapter.unmerge();
        CHECK(equal_bits(peft::base(network->experts->up).detach(), before));
      }
      // A value that is not finite is refused with nothing changed.
      {
        torch::NoGradGuard no_grad;
        parameter(adapter, "experts.lora_B.weight").fill_(1e30);
        parameter(adapter, "experts.lora_A.weight").fill_(1e30);
      }
      if (dtype != torch::kDouble) {
        CHECK(contains(error_of([&] { adapter.merge(); }), "not finite"));
        CHECK(equal_bits(peft::base(network->experts->up).detach(), before));
      }
    }
  }
}

TEST_CASE("a matrix named by target_parameters is LoRA on its layer") {
  const auto run = [](const LoraOptions& options) {
    seed(5);
    networks::Mlp model;
    auto adapter = peft::attach(model, options);
    randomise(adapter);
    return model.forward(torch::ones({2, 10}));
  };
  CHECK(equal_bits(
      run(LoraOptions(2).targets({"fc1"})),
      run(LoraOptions(2).target_parameters({"fc1.weight"}))));
  // Alone it adapts nothing else, no default targets either.
  networks::Bert bert;
  const auto adapter = peft::attach(
      bert, LoraOptions(2).target_parameters({"0.attention.self.key.weight"}));
  CHECK(adapter.sites().size() == 1);
}

TEST_CASE("targets take a stack as one matrix, as ever") {
  auto network = mixture(false);
  const auto adapter =
      peft::attach(*network, LoraOptions(2).targets({"experts.up"}));
  CHECK(
      parameter(adapter, "experts.up.lora_A.weight").sizes() ==
      torch::IntArrayRef({2, 20}));
  CHECK(
      parameter(adapter, "experts.up.lora_B.weight").sizes() ==
      torch::IntArrayRef({3, 2}));
}

TEST_CASE("files of stacks come back, and training goes on") {
  struct Row {
    int64_t hidden;
    bool transposed;
    bool field; // libpeft's own, where the shapes tell nothing
  };
  for (const Row row :
       {Row{5, false, false},
        Row{5, true, false},
        Row{4, false, false},
        Row{4, true, true}}) {
    INFO("hidden " << row.hidden << ", transposed " << row.transposed);
    const auto make = [&] {
      seed(4);
      auto network =
          std::make_shared<networks::Mixture>(row.hidden, row.transposed);
      torch::NoGradGuard no_grad;
      for (auto& p : network->parameters()) {
        p.copy_(torch::randn_like(p) * 0.5);
      }
      return network;
    };
    const auto network = make(), other = make();
    const auto x = torch::randn({5, 6});
    auto adapter = peft::attach(
        *network,
        LoraOptions(2)
            .targets({"fc"})
            .target_parameters(Targets::regex("experts\\.(up|down|router)"))
            .parameters_transposed(row.transposed));
    randomise(adapter);
    const TemporaryDirectory folder;
    peft::save(adapter, folder / "a");
    const auto config =
        peft::AdapterConfig::read(folder / "a/adapter_config.json");
    CHECK(config.has("parameters_transposed") == row.field);
    CHECK(
        config.get<std::vector<std::string>>("target_parameters") ==
        std::vector<std::string>{
            "experts.router", "experts.up", "experts.down"});
    CHECK(
        config.get<std::vector<std::string>>("target_modules") ==
        std::vector<std::string>{"fc"});
    const auto keys =
        peft::load_safetensors(folder / "a/adapter_model.safetensors");
    CHECK(keys.size() == 8);
    for (const std::string inner :
         {"", ".base_layer", ".base_layer.base_layer"}) {
      CHECK(
          keys.count("base_model.model.experts" + inner + ".lora_A.weight") ==
          1);
    }
    peft::load(*other, folder / "a");
    CHECK(equal_bits(other->forward(x), network->forward(x)));
    for (const auto& one : {network, other}) {
      torch::optim::SGD optimizer(peft::get_adapter(*one).parameters(), 0.1);
      one->forward(x).square().mean().backward();
      optimizer.step();
    }
    CHECK(equal_bits(other->forward(x), network->forward(x)));
  }
}

TEST_CASE("what target_parameters cannot do is refused by name") {
  struct Row {
    std::string name;
    LoraOptions options;
    std::string part;
  };
  const auto stacks = [] { return LoraOptions(2).target_parameters(kStacks); };
  const std::vector<Row> rows{
      {"dropout", stacks().dropout(0.1), "does not go with dropout"},
      {"lora_bias", stacks().lora_bias(true), "does not go with lora_bias"},
      {"dora", stacks().dora(true), "does not go with dora"},
      {"fan_in_fan_out",
       stacks().fan_in_fan_out(true),
       "does not go with fan_in_fan_out"},
      {"a predicate",
       LoraOptions(2).target_parameters(Targets::all_linear()),
       "takes names or a regular expression"},
      {"no such parameter",
       LoraOptions(2).target_parameters({"experts.upp"}),
       "'experts.upp' matches no parameter"},
      {"a module",
       LoraOptions(2).target_parameters({"experts"}),
       "'experts' matches no parameter"},
      {"a bias",
       LoraOptions(2).target_parameters({"fc.bias"}),
       "'fc.bias' has shape [4]"},
      {"named twice",
       LoraOptions(2).targets({"fc"}).target_parameters({"fc.weight"}),
       "'fc.weight' is named by target_parameters, and its layer by targets"},
      {"trained whole",
       LoraOptions(2).modules_to_save({"fc"}).target_parameters({"fc.weight"}),
       "modules_to_save trains 'fc' whole"},
      {"a pattern for nothing",
       stacks().rank_pattern({{"sideways", 3}}),
       "'sideways' in rank_pattern"},
      {"a layer for nothing", stacks().layers({1}), "layers names index 1"},
  };
  for (const auto& row : rows) {
    INFO(row.name);
    auto network = mixture(false);
    const auto before = state_of(*network);
    const auto error = error_of([&] { peft::attach(*network, row.options); });
    INFO(error);
    CHECK(contains(error, row.part));
    CHECK(same_state(state_of(*network), before));
  }
}

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ trainable tokens ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

namespace {

peft::models::Gpt2ForCausalLM gpt2() {
  seed(2);
  return peft::models::Gpt2ForCausalLM(peft::models::Gpt2Options()
                                           .vocab_size(20)
                                           .n_positions(8)
                                           .n_embd(8)
                                           .n_layer(1)
                                           .n_head(2));
}

} // namespace

TEST_CASE("tokens train beside LoRA, the tied head with them") {
  auto model = gpt2();
  model->eval();
  const auto ids = torch::tensor({{1, 5, 9}});
  const auto mask = torch::ones({1, 3}, torch::kLong);
  const auto base = model->forward(ids, mask).detach();
  auto adapter =
      peft::attach(*model, LoraOptions(2).trainable_token_indices({5, 7}));
  CHECK(close(model->forward(ids, mask), base));
  const auto rows = parameter(
      adapter, "transformer.wte.token_adapter.trainable_tokens_delta");
  CHECK(rows.sizes() == torch::IntArrayRef({2, 8}));
  CHECK(adapter.num_parameters() == 2 * (8 + 24) + 2 * 8);
  // A row that no input has still moves its logit, through the head.
  model->forward(torch::tensor({{1, 2, 9}}), mask).sum().backward();
  CHECK(rows.grad()[0].abs().max().item<double>() > 0);
  CHECK(rows.grad()[1].abs().max().item<double>() > 0);
  {
    torch::NoGradGuard no_grad;
    rows.add_(1);
  }
  const auto y = model->forward(ids, mask).detach();
  CHECK_FALSE(torch::allclose(y, base));
  const TemporaryDirectory folder;
  peft::save(adapter, folder / "a");
  adapter.disable();
  CHECK(equal_bits(model->forward(ids, mask).detach(), base));
  adapter.detach();
  auto again = peft::load(*model, folder / "a");
  CHECK(equal_bits(model->forward(ids, mask).detach(), y));
  again.merge();
  CHECK(close(model->forward(ids, mask).detach(), y));
}

TEST_CASE("two names for one tied table are one, under the embedding's name") {
  auto model = gpt2();
  const auto adapter = peft::attach(
      *model,
      LoraOptions(2).trainable_token_indices({{"lm_head", {3}}, {"wte", {3}}}));
  CHECK(adapter.num_parameters() == 2 * (8 + 24) + 8);
  parameter(adapter, "transformer.wte.token_adapter.trainable_tokens_delta");
}

TEST_CASE("tokens that cannot be are refused by name") {
  struct Row {
    LoraOptions options;
    std::string part;
  };
  using Tokens = std::vector<int64_t>;
  const auto lora = [] { return LoraOptions(2); };
  const std::vector<Row> rows{
      {lora().trainable_token_indices(Tokens{}),
       "trainable_token_indices is empty"},
      {lora().trainable_token_indices({2, 2}), "names a token twice"},
      {lora().trainable_token_indices({2, 20}),
       "go from 2 to 20, and 'transformer.wte.weight' has the rows 0 to 19"},
      {lora().trainable_token_indices({-1}), "go from -1 to -1"},
      {lora().trainable_token_indices({{"wtee", {1}}}),
       "'wtee' matches no module"},
      {lora().trainable_token_indices({{"c_attn", {1}}}),
       "'transformer.h.0.attn.c_attn' is a "},
      {lora().modules_to_save({"wte"}).trainable_token_indices({1}),
       "modules_to_save trains whole"},
      {lora().targets({"wte"}).trainable_token_indices({1}),
       "is adapted as 'transformer.wte.weight' in another way"},
      {lora().trainable_token_indices({{"lm_head", {3}}, {"wte", {4}}}),
       "is adapted as 'transformer.wte.weight' in another way"},
  };
  for (const auto& row : rows) {
    INFO(row.part);
    auto model = gpt2();
    const auto before = state_of(*model);
    const auto error = error_of([&] { peft::attach(*model, row.options); });
    INFO(error);
    CHECK(contains(error, row.part));
    CHECK(same_state(state_of(*model), before));
  }
  networks::Mlp mlp;
  const auto error = error_of([&] {
    peft::attach(
        mlp, LoraOptions(2).targets({"fc1"}).trainable_token_indices({1}));
  });
  CHECK(contains(error, "no embedding of this network"));
}

} // namespace test_lora_parameters
