// The rules around an adapted weight: who may hold it, what is refused and by
// which words, what other threads and other execution engines see, and when it
// lets go of its memory.

#include "adapted.h"

#include <ATen/ThreadLocalState.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <ATen/functorch/DynamicLayer.h>
#include <ATen/functorch/PlumbingHelper.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/jit/api/compilation_unit.h>
#include <torch/csrc/jit/frontend/resolver.h>
#include <torch/csrc/jit/frontend/sugared_value.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/nn/parallel/data_parallel.h>
#include <torch/script.h>

#include <atomic>
#include <future>
#include <sstream>
#include <thread>

namespace test_adapted_weight_rules {

namespace nn = torch::nn;
using adapted::Adapted;
using adapted::all_close;
using adapted::for_each_row;
using adapted::gradients;
using torch::Tensor;

namespace {

const auto f64 = torch::kDouble;

Tensor draw(at::IntArrayRef sizes) {
  return torch::randn(sizes, f64);
}

/// Collects warnings while it lives.
class Warnings : public c10::WarningHandler {
 public:
  void process(const c10::Warning& warning) override {
    text += warning.msg() + "\n";
  }
  std::string text;

 private:
  c10::WarningUtils::WarningHandlerGuard guard_{this};
};

} // namespace

// ~~~~ Who holds the weight ~~~~

TEST_CASE("set_data: the target keeps its adapter, the source stays plain") {
  seed(1);
  Adapted a;
  const Tensor x = draw({3, 4});
  struct Use {
    std::string name;
    std::function<Tensor(const Tensor&)> of;
  };
  const std::vector<Use> uses = {
      {"linear", [&](const Tensor& w) { return at::linear(x, w); }},
      {"t", [&](const Tensor& w) { return at::mm(x, w.t()); }},
      {"w + 0", [](const Tensor& w) { return w + 0; }},
      {"view", [](const Tensor& w) { return w.view({24}) + 0; }},
      {"detach", [](const Tensor& w) { return w.detach() + 0; }},
      {"to", [](const Tensor& w) { return w.to(torch::kFloat); }},
      {"data", [](const Tensor& w) { return w.data() + 0; }},
      {"list",
       [](const Tensor& w) {
         return at::cat({w, w});
       }},
      {"another set_data",
       [](const Tensor& w) {
         Tensor other = torch::zeros({6, 4}, f64);
         other.set_data(w);
         return other + 0;
       }},
  };
  for_each_row(uses, [&](const Use& use) {
    Tensor source = draw({6, 4});
    const Tensor copy = source.clone();
    a.linear->weight.set_data(source);
    const Tensor y = use.of(source); // the very first use after the lending
    CHECK(!y.requires_grad());
    CHECK(equal_bits(y, use.of(copy)));
    CHECK(!peft::is_adapted(source));
    const Tensor expected = copy + 2 * at::mm(a.B, a.A);
    CHECK(close(a.w() + 0, expected));
    CHECK(close(a.linear(x), at::linear(x, expected, a.b)));
    source = Tensor();
    CHECK(close(a.w() + 0, expected));
    CHECK(a.linear->parameters()[0].is_same(a.w()));
  });
}

TEST_CASE(
    "a plain tensor that is given an adapted one's data becomes adapted") {
  seed(2);
  Adapted a;
  nn::Linear other(4, 6);
  other->to(f64);
  other->weight.set_data(a.w());
  const Tensor x = draw({3, 4});
  CHECK(close(at::linear(x, other->weight), at::linear(x, a.value())));
  a.adapter.merge(); // not counted twice
  CHECK(close(at::linear(x, other->weight), at::linear(x, a.value())));
  a.adapter.unmerge();
  a.adapter.detach();
  CHECK(equal_bits(at::linear(x, other->weight), at::linear(x, a.W)));
}

TEST_CASE("torch::load into an adapted module replaces the base") {
  seed(3);
  Adapted a, same;
  std::stringstream stream;
  torch::save(same.linear, stream);
  torch::load(a.linear, stream);
  CHECK(peft::is_adapted(a.w()));
  CHECK(equal_bits(peft::base(a.w()), same.W));
  CHECK(equal_bits(a.A, same.A));
  CHECK(close(a.w() + 0, same.value()));
}

TEST_CASE("torch::save of an adapted module holds the base and the adapter") {
  seed(4);
  Adapted a;
  std::stringstream stream;
  torch::save(a.linear, stream);
  torch::serialize::InputArchive archive;
  archive.load_from(stream);
  Tensor weight;
  archive.read("weight", weight);
  CHECK(equal_bits(weight, a.W));
}

TEST_CASE("what LibTorch's clone, replicate and load cannot do is loud") {
  seed(5);
  Adapted a;
  std::stringstream plain;
  torch::save(nn::Linear(4, 6), plain);
  const Tensor x = draw({3, 4});
  const Tensor y = a.linear(x);
  CHECK(error_of([&] { a.linear->clone(); }) != "");
  CHECK(error_of([&] {
          nn::parallel::replicate(a.linear, {torch::Device(torch::kCPU)});
        }) != "");
  nn::Linear& holder = a.linear;
  CHECK(error_of([&] { torch::load(holder, plain); }) != "");
  CHECK(peft::is_adapted(a.w()));
  CHECK(equal_bits(a.A, adapted::lora(a.adapter).lora_A));
  auto copy = peft::clone(a.linear);
  CHECK(equal_bits(copy(x), y));
  CHECK(!copy->weight.is_alias_of(a.w()));
}

TEST_CASE("aliases of every kind over merge count the change once") {
  seed(6);
  Adapted a;
  const Tensor E = a.value().detach(), x = draw({3, 4});
  const std::vector<Tensor> held = {
      a.w().data(),
      a.w().detach(),
      a.w().variable_data(),
      at::alias(a.w()),
      a.w().t().t(),
      a.w().view({24}).view({6, 4})};
  auto check = [&](const Tensor& expected) {
    torch::NoGradGuard no_grad;
    for (const auto& w : held) {
      CHECK(close(w + 0, expected));
      CHECK(close(at::linear(x, w), at::linear(x, expected)));
      CHECK(close(at::mm(x, w.t()), at::linear(x, expected)));
    }
  };
  check(E);
  a.adapter.merge();
  check(E);
  a.adapter.unmerge();
  check(E);
  a.adapter.disable();
  check(a.W);
  a.adapter.enable();
  a.adapter.set_scale(0.5);
  check((a.W + E) / 2);
  SECTION("merged for good") {
    a.adapter.set_scale(1);
    peft::merge(*a.linear);
    check(E);
  }
  SECTION("detached") {
    a.adapter.detach();
    check(a.W);
    torch::NoGradGuard no_grad;
    for (const auto& w : held) {
      w.mul_(2); // still the base's storage
    }
    CHECK(equal_bits(a.w(), a.W * 64));
  }
}

TEST_CASE("a merged adapter refuses to train") {
  seed(7);
  Adapted a;
  a.adapter.merge();
  const std::vector<adapted::Access> uses = {
      {"layer",
       [&](const Tensor&) {
         return a.linear(draw({3, 4}));
       }},
      {"3-D",
       [&](const Tensor&) {
         return a.linear(draw({2, 3, 4}));
       }},
      {"w + 0", [](const Tensor& w) { return w + 0; }},
      {"view", [](const Tensor& w) { return w.narrow(0, 1, 2) * 2; }},
  };
  for_each_row(uses, [&](const adapted::Access& use) {
    CHECK(
        contains(error_of([&] { use.of(a.w()).sum().backward(); }), "merged"));
  });
  a.adapter.set_trainable(false);
  auto x = draw({3, 4}).set_requires_grad(true);
  a.linear(x).sum().backward();
  CHECK(close(x.grad(), a.value().detach().sum(0).expand({3, 4})));
}

TEST_CASE("tied weights are adapted once, and both names are told") {
  seed(8);
  struct Words : nn::Module {
    nn::Embedding table{register_module("table", nn::Embedding(7, 4))};
    nn::Linear head{register_module(
        "head",
        nn::Linear(nn::LinearOptions(4, 7).bias(false)))};
  };
  auto words = std::make_shared<Words>();
  SECTION("by storage") {
    words->head->weight.set_data(words->table->weight.detach());
  }
  SECTION("by assigning the member") {
    words->head->weight = words->table->weight;
  }
  const Tensor W = words->table->weight.detach().clone();
  Warnings warnings;
  auto adapter = peft::attach(*words, adapted::acting({"table"}));
  REQUIRE(adapter.sites().size() == 1);
  CHECK(adapter.num_parameters() == 2 * 7 + 4 * 2);
  const auto& delta = adapted::lora(adapter);
  const Tensor E = W + 2 * at::mm(delta.lora_B, delta.lora_A).t();
  const auto index = torch::tensor({0, 6});
  const Tensor x = torch::randn({3, 4});
  CHECK(close(words->table(index), at::embedding(E, index)));
  CHECK(close(words->head(x), at::linear(x, E)));
  const Tensor y = words->head(words->table(index));
  CHECK(all_close(
      gradients(y, adapter.parameters()),
      gradients(at::linear(at::embedding(E, index), E), adapter.parameters())));
  CHECK(contains(warnings.text, "tied"));
  CHECK(contains(warnings.text, "head.weight"));
  CHECK(
      adapter.sites()[0].parameters ==
      std::vector<std::string>{"table.weight", "head.weight"});
  adapter.merge();
  torch::NoGradGuard no_grad;
  CHECK(close(words->head(x), at::linear(x, E)));
  CHECK(close(words->table(index), at::embedding(E, index)));
  adapter.unmerge();
  CHECK(equal_bits(peft::base(words->head->weight), W));
  adapter.detach();
  CHECK(!peft::is_adapted(words->head->weight));
  CHECK(!peft::is_adapted(words->table->weight));
}

TEST_CASE("naming both tied weights adapts them once without a warning") {
  struct Pair : nn::Module {
    nn::Linear a{register_module("a", nn::Linear(4, 4))};
    nn::Linear b{register_module("b", nn::Linear(4, 4))};
  };
  auto pair = std::make_shared<Pair>();
  pair->b->weight.set_data(pair->a->weight.detach());
  Warnings warnings;
  auto adapter = peft::attach(*pair, adapted::acting({"a", "b"}));
  CHECK(adapter.sites().size() == 1);
  CHECK(adapter.num_parameters() == 16);
  CHECK(warnings.text == "");
  CHECK(close(pair->a->weight + 0, pair->b->weight + 0));
}

TEST_CASE("changing the shape under an adapter is refused") {
  seed(9);
  struct Change {
    std::string name;
    std::function<void(Tensor)> to;
  };
  const std::vector<Change> changes = {
      {"t_", [](Tensor w) { w.t_(); }},
      {"transpose_", [](Tensor w) { w.transpose_(0, 1); }},
      {"swapaxes_", [](Tensor w) { w.swapaxes_(0, 1); }},
      {"unsqueeze_", [](Tensor w) { w.unsqueeze_(0); }},
      {"as_strided_",
       [](Tensor w) {
         w.as_strided_({4, 6}, {6, 1});
       }},
      {"resize_",
       [](Tensor w) {
         w.resize_({4, 6});
       }},
      {"resize_as_", [](Tensor w) { w.resize_as_(torch::zeros({2})); }},
      {"set_",
       [](Tensor w) {
         w.set_(torch::zeros({4, 6}, f64));
       }},
      {"set_ to nothing", [](Tensor w) { w.set_(); }},
  };
  for_each_row(changes, [&](const Change& change) {
    torch::NoGradGuard no_grad;
    Adapted a;
    const std::string error = error_of([&] { change.to(a.w()); });
    CHECK(contains(error, "peft: "));
    CHECK(contains(error, "shape"));
    CHECK(equal_bits(peft::base(a.w()), a.W));
    CHECK(close(a.w() + 0, a.value()));
  });
  SECTION("data or an out= of another shape is noticed at the next use") {
    Adapted a;
    if (GENERATE(true, false)) {
      a.linear->weight.set_data(draw({4, 6}));
    } else {
      torch::NoGradGuard no_grad;
      at::add_out(a.linear->weight, draw({4, 6}), draw({4, 6}));
    }
    for (const auto& use : std::vector<std::function<void()>>{
             [&] { (void)(a.w() + 0); },
             [&] {
               (void)at::linear(draw({3, 6}), a.w());
             },
             [&] {
               (void)a.linear(draw({3, 4}));
             },
             [&] { a.adapter.merge(); }}) {
      CHECK(error_of(use) != "");
    }
  }
}

// ~~~~ A base that trains ~~~~

TEST_CASE(
    "a base that requires grad gets its gradient, its hooks and its step") {
  seed(20);
  struct Use {
    std::string name;
    std::function<Tensor(const Tensor& w, const Tensor& b)> of;
  };
  const Tensor x = draw({3, 4});
  const std::vector<Use> uses = {
      {"linear, 2-D", [&](auto& w, auto& b) { return at::linear(x, w, b); }},
      {"linear, 3-D",
       [&](auto& w, auto& b) { return at::linear(x.unsqueeze(0), w, b); }},
      {"F::linear, 2-D",
       [&](auto& w, auto& b) { return nn::functional::linear(x, w, b); }},
      {"F::linear, 3-D",
       [&](auto& w, auto& b) {
         return nn::functional::linear(x.unsqueeze(0), w, b);
       }},
      {"w * 2", [](auto& w, auto&) { return w * 2; }},
      {"rows",
       [&](auto& w, auto&) { return at::linear(x, w.narrow(0, 1, 3)); }},
      {"a view of a view",
       [](auto& w, auto&) {
         return w.t().narrow(0, 1, 2).reshape({-1}).exp();
       }},
      {"to another dtype",
       [&](auto& w, auto&) {
         return at::linear(x.to(torch::kFloat), w.to(torch::kFloat));
       }},
      {"embedding",
       [](auto& w, auto&) {
         return at::embedding(w, torch::tensor({0, 5, 5}));
       }},
      {"conv1d of a view",
       [&](auto& w, auto&) {
         return at::conv1d(x.view({1, 2, 6}), w.view({6, 2, 2}));
       }},
      {"a list",
       [&](auto& w, auto&) {
         return at::cat({w, w});
       }},
  };
  for (const bool enabled : {true, false}) {
    for_each_row(uses, [&](const Use& use) {
      INFO("enabled " << enabled);
      Adapted a;
      a.linear->weight.set_requires_grad(true);
      a.linear->bias.set_requires_grad(true);
      int hooks = 0;
      a.linear->weight.register_hook([&](Tensor g) {
        ++hooks;
        return g;
      });
      enabled ? a.adapter.enable() : a.adapter.disable();
      Tensor W = a.W.clone().set_requires_grad(true),
             b = a.b.clone().set_requires_grad(true);
      const Tensor E = enabled ? W + 2 * at::mm(a.B, a.A) : W;
      const Tensor y = use.of(a.w(), a.linear->bias), expected = use.of(E, b);
      CHECK(close(y, expected));
      auto found = gradients(y, {a.linear->weight, a.linear->bias, a.A, a.B});
      for (auto& g : found) { // no more exact than what was computed in
        g = g.defined() ? g.to(y.scalar_type()) : g;
      }
      CHECK(all_close(found, gradients(expected, {W, b, a.A, a.B})));
      use.of(a.w(), a.linear->bias).sum().backward();
      CHECK(hooks == 2);
      REQUIRE(a.w().grad().defined());
      CHECK(!peft::is_adapted(a.w().grad()));
      torch::optim::SGD optimizer({a.linear->weight}, 0.1);
      const Tensor grad = a.w().grad().clone();
      optimizer.step();
      CHECK(close(peft::base(a.w()).detach(), a.W - 0.1 * grad));
      CHECK(peft::is_adapted(a.w()));
    });
  }
}

TEST_CASE("a frozen base in an optimizer does not move") {
  seed(21);
  Adapted a;
  std::vector<Tensor> all = a.linear->parameters();
  torch::optim::AdamW optimizer(
      all, torch::optim::AdamWOptions(0.1).weight_decay(0.1));
  CHECK(all.size() == 4);
  a.linear(draw({3, 4})).sum().backward();
  const double norm = nn::utils::clip_grad_norm_(all, 1.0);
  CHECK(norm > 0);
  const Tensor A = a.A.detach().clone();
  optimizer.step();
  CHECK(!a.w().grad().defined());
  CHECK(equal_bits(peft::base(a.w()), a.W));
  CHECK(equal_bits(a.linear->bias, a.b));
  CHECK(!equal_bits(a.A.detach(), A));
}

// ~~~~ Inference mode ~~~~

TEST_CASE("a model made in inference mode trains its adapter") {
  seed(30);
  nn::Linear linear{nullptr};
  {
    c10::InferenceMode inference;
    linear = nn::Linear(4, 6);
    linear->to(f64);
  }
  const Tensor W = peft::base(linear->weight).clone(), b = linear->bias.clone();
  auto adapter = peft::attach(*linear, adapted::acting());
  const auto& delta = adapted::lora(adapter);
  CHECK(!delta.lora_A.is_inference());
  const Tensor E = W + 2 * at::mm(delta.lora_B, delta.lora_A);
  for (const bool with_x : {false, true}) {
    for (const auto& sizes :
         std::vector<std::vector<int64_t>>{{3, 4}, {2, 3, 4}}) {
      INFO("x requires grad: " << with_x << ", " << sizes.size() << "-D");
      auto x = draw(sizes).set_requires_grad(with_x);
      std::vector<Tensor> leaves = {delta.lora_A, delta.lora_B};
      if (with_x) {
        leaves.push_back(x);
      }
      const Tensor y = linear(x), expected = at::linear(x, E, b);
      CHECK(close(y, expected));
      CHECK(all_close(gradients(y, leaves), gradients(expected, leaves)));
      {
        torch::NoGradGuard no_grad;
        CHECK(close(linear(x), expected));
      }
      {
        c10::InferenceMode inference;
        CHECK(close(linear(x), expected));
      }
    }
  }
  CHECK(close(linear->weight + 0, E));
  adapter.merge();
  CHECK(close(peft::base(linear->weight), E));
  adapter.unmerge();
  CHECK(equal_bits(peft::base(linear->weight).clone(), W));
  adapter.detach();
  CHECK(!peft::is_adapted(linear->weight));
}

TEST_CASE("attach inside inference mode makes an adapter that can train") {
  seed(31);
  nn::Linear linear(4, 6);
  peft::Adapter adapter;
  {
    c10::InferenceMode inference;
    adapter = peft::attach(*linear, adapted::acting());
    CHECK(linear(torch::randn({3, 4})).is_inference());
  }
  for (const auto& p : adapter.parameters()) {
    CHECK(!p.is_inference());
    CHECK(p.requires_grad());
  }
  linear(torch::randn({3, 4})).sum().backward();
  for (const auto& p : adapter.parameters()) {
    CHECK(p.grad().defined());
  }
  SECTION("merge and unmerge inside it") {
    const Tensor W = peft::base(linear->weight).clone();
    const Tensor E = peft::effective(linear->weight).detach();
    {
      c10::InferenceMode inference;
      adapter.merge();
      CHECK(close(peft::base(linear->weight), E));
      adapter.unmerge();
    }
    CHECK(equal_bits(peft::base(linear->weight), W));
  }
}

// ~~~~ Other ways to run ~~~~

namespace {

/// The script frontend of C++ has no word for fork.
struct ForkResolver : torch::jit::NativeResolver {
  std::shared_ptr<torch::jit::SugaredValue> resolveValue(
      const std::string& name,
      torch::jit::GraphFunction& m,
      const torch::jit::SourceRange& loc) override {
    return name == "fork"
        ? torch::jit::SpecialFormValue::create(c10::prim::fork)
        : torch::jit::NativeResolver::resolveValue(name, m, loc);
  }
};

torch::jit::Module script_of(const nn::Linear& linear) {
  torch::jit::Module module("m");
  module.register_parameter("weight", linear->weight, false);
  module.register_parameter("bias", linear->bias, false);
  module.define(R"(
def forward(self, x):
    return torch.tanh(torch.linear(x, self.weight, self.bias))
)");
  module.define(R"(
def penalty(self, x):
    return (x.sum() * self.weight).pow(2).sum()
)");
  module.eval();
  return module;
}

} // namespace

TEST_CASE(
    "TorchScript: training under the optimising executor is refused, every "
    "run") {
  seed(40);
  Adapted a;
  auto module = script_of(a.linear);
  const Tensor x = draw({3, 4});
  torch::jit::GraphOptimizerEnabledGuard optimise(true);
  for (const char* method : {"forward", "penalty"}) {
    for (int run = 0; run < 3; ++run) {
      CHECK(contains(
          error_of([&] { module.get_method(method)({x}); }), "TorchScript"));
    }
  }
}

TEST_CASE("TorchScript: training without the optimiser has every gradient") {
  seed(41);
  Adapted a;
  auto module = script_of(a.linear);
  torch::jit::GraphOptimizerEnabledGuard plain(false);
  for (int run = 0; run < 4; ++run) {
    const Tensor x = draw({3, 4});
    const Tensor y = module.forward({x}).toTensor();
    const Tensor expected = at::linear(x, a.value(), a.b).tanh();
    CHECK(close(y, expected));
    CHECK(
        all_close(gradients(y, a.factors()), gradients(expected, a.factors())));
  }
  const Tensor p = module.get_method("penalty")({draw({3, 4})}).toTensor();
  CHECK(gradients(p, a.factors())[0].defined());
}

TEST_CASE(
    "TorchScript: inference is right under the optimiser, through every "
    "switch") {
  seed(42);
  Adapted a;
  auto module = script_of(a.linear);
  torch::jit::GraphOptimizerEnabledGuard optimise(true);
  torch::NoGradGuard no_grad;
  const Tensor x = draw({3, 4});
  auto check = [&](const Tensor& W) {
    for (int run = 0; run < 3; ++run) {
      CHECK(
          close(module.forward({x}).toTensor(), at::linear(x, W, a.b).tanh()));
    }
  };
  check(a.value());
  a.adapter.disable();
  check(a.W);
  a.adapter.enable();
  a.B.mul_(2);
  check(a.value());
  a.adapter.merge();
  check(a.value());
  a.adapter.unmerge();
  check(a.value());
  peft::merge(*a.linear);
  check(peft::base(a.w()));
}

TEST_CASE("TorchScript: what save, copy, clone and freeze hold") {
  seed(43);
  Adapted a;
  auto module = script_of(a.linear);
  torch::NoGradGuard no_grad;
  const Tensor x = draw({3, 4});
  const Tensor y = at::linear(x, a.value(), a.b).tanh();
  SECTION("save: the base") {
    std::stringstream stream;
    module.save(stream);
    const auto loaded = torch::jit::load(stream);
    CHECK(equal_bits(loaded.attr("weight").toTensor(), a.W));
  }
  SECTION("attr and copy: the adapted weight") {
    CHECK(peft::is_adapted(module.attr("weight").toTensor()));
    auto copy = module.copy();
    CHECK(peft::is_adapted(copy.attr("weight").toTensor()));
    CHECK(close(copy.forward({x}).toTensor(), y));
  }
  SECTION("to: the adapted weight") {
    module.to(torch::kFloat);
    module.to(f64);
    CHECK(peft::is_adapted(module.attr("weight").toTensor()));
    CHECK(close(module.forward({x}).toTensor(), y, 1e-5, 1e-5));
  }
  SECTION("clone and deepcopy: plain, with the value") {
    for (auto& copy : {module.clone(), module.deepcopy()}) {
      const Tensor w = copy.attr("weight").toTensor();
      CHECK(!peft::is_adapted(w));
      CHECK(close(w, a.value()));
    }
  }
  SECTION("freeze and optimize after merge") {
    peft::merge(*a.linear);
    auto frozen = torch::jit::freeze(module);
    CHECK(close(frozen.forward({x}).toTensor(), y));
    auto best = torch::jit::optimize_for_inference(module);
    CHECK(close(best.forward({x}).toTensor(), y));
  }
  SECTION("a forked task sees the adapter and the scope") {
    torch::jit::CompilationUnit unit;
    unit.define(
        std::nullopt,
        R"(
def product(x, w):
    return torch.matmul(x, w.t())

def run(x, w):
    return torch.wait(fork(product, x, w))
)",
        std::make_shared<ForkResolver>(),
        nullptr);
    CHECK(close(
        unit.run_method("run", x, a.w()).toTensor(),
        at::matmul(x, a.value().t())));
    const peft::ActiveAdapters none({});
    CHECK(close(
        unit.run_method("run", x, a.w()).toTensor(), at::matmul(x, a.W.t())));
  }
}

namespace {

/// One level of forward-mode differentiation.
class ForwardMode {
 public:
  ForwardMode() : level_(torch::autograd::ForwardADLevel::get_next_idx()) {}
  ~ForwardMode() {
    torch::autograd::ForwardADLevel::release_idx(level_);
  }
  ForwardMode(const ForwardMode&) = delete;
  ForwardMode& operator=(const ForwardMode&) = delete;

  Tensor dual(const Tensor& t) const {
    return at::_make_dual(
        t.detach(),
        torch::randn(t.sizes(), t.options()),
        static_cast<int64_t>(level_));
  }
  Tensor tangent(const Tensor& t) const {
    return std::get<1>(at::_unpack_dual(t, static_cast<int64_t>(level_)));
  }

 private:
  uint64_t level_;
};

} // namespace

TEST_CASE("forward-mode derivatives in x, A and B") {
  for (int which = 1; which < 8; ++which) {
    INFO("x, A, B as bits: " << which);
    seed(44);
    Adapted a;
    auto& delta = adapted::lora(a.adapter);
    const Tensor A = a.A, B = a.B;
    const std::string error = error_of([&] {
      const ForwardMode mode;
      const Tensor x0 = draw({3, 4});
      const Tensor x = which & 1 ? mode.dual(x0) : x0;
      delta.lora_A = a.A = which & 2 ? mode.dual(A) : A;
      delta.lora_B = a.B = which & 4 ? mode.dual(B) : B;
      const std::vector<std::pair<Tensor, Tensor>> results = {
          {a.linear(x), at::linear(x, a.value(), a.b)},
          {a.linear(x.unsqueeze(0)),
           at::linear(x.unsqueeze(0), a.value(), a.b)},
          {x.sum() * a.w(), x.sum() * a.value()},
          {at::matmul(x, a.w().narrow(0, 1, 2).t()),
           at::matmul(x, a.value().narrow(0, 1, 2).t())}};
      for (const auto& [y, expected] : results) {
        CHECK(close(y, expected));
        CHECK(close(mode.tangent(y), mode.tangent(expected)));
      }
      delta.lora_A = A;
      delta.lora_B = B;
    });
    CHECK(error == "");
  }
}

TEST_CASE("forward-mode derivatives of an adapted embedding and convolution") {
  seed(45);
  const std::string error = error_of([&] {
    const ForwardMode mode;
    nn::Embedding table(7, 4);
    table->to(f64);
    const Tensor W = table->weight.detach().clone();
    auto adapter = peft::attach(*table, adapted::acting({"weight"}));
    auto& delta = adapted::lora(adapter);
    delta.lora_A = mode.dual(delta.lora_A);
    const auto index = torch::tensor({1, 6});
    const Tensor y = table(index);
    const Tensor expected =
        at::embedding(W + 2 * at::mm(delta.lora_B, delta.lora_A).t(), index);
    CHECK(close(y, expected));
    CHECK(close(mode.tangent(y), mode.tangent(expected)));

    nn::Conv1d conv(3, 4, 2);
    conv->to(f64);
    auto again = peft::attach(*conv, adapted::acting({"weight"}));
    const Tensor x = mode.dual(draw({2, 3, 6}));
    const Tensor E = peft::effective(conv->weight).detach();
    CHECK(close(
        mode.tangent(conv(x)), mode.tangent(at::conv1d(x, E, conv->bias))));
  });
  CHECK(error == "");
}

TEST_CASE("vmap over the input of an adapted layer") {
  seed(46);
  Adapted a;
  const Tensor x = draw({5, 3, 4});
  struct Use {
    std::string name;
    std::function<Tensor(const Tensor& x, const Tensor& w, const Tensor& b)> of;
  };
  const std::vector<Use> uses = {
      {"linear", [](auto& t, auto& w, auto& b) { return at::linear(t, w, b); }},
      {"F::linear",
       [](auto& t, auto& w, auto& b) {
         return nn::functional::linear(t, w, b);
       }},
      {"matmul", [](auto& t, auto& w, auto&) { return at::matmul(t, w.t()); }},
      {"arithmetic", [](auto& t, auto& w, auto&) { return t.sum() * w; }},
      {"one row",
       [](auto& t, auto& w, auto& b) { return at::linear(t[0], w, b); }},
  };
  for_each_row(uses, [&](const Use& use) {
    std::vector<Tensor> rows;
    for (int64_t i = 0; i < 5; ++i) {
      rows.push_back(use.of(x[i], a.value(), a.b));
    }
    const Tensor expected = at::stack(rows);
    Tensor y;
    const auto level = at::functorch::initAndPushDynamicLayer(
        at::functorch::TransformType::Vmap,
        c10::SymInt(5),
        at::functorch::RandomnessType::Error);
    const std::string error = error_of([&] {
      const Tensor batched = use.of(
          at::functorch::makeBatched(x, 0, level), a.w(), a.linear->bias);
      const auto [value, dim] =
          at::functorch::unwrapTensorAtLevel(batched, level);
      REQUIRE(dim.has_value());
      y = value.movedim(*dim, 0);
    });
    at::functorch::popDynamicLayerAndDeleteMetadata();
    CHECK(error == "");
    REQUIRE(y.defined());
    CHECK(close(y, expected));
    CHECK(
        all_close(gradients(y, a.factors()), gradients(expected, a.factors())));
  });
}

// ~~~~ Output transforms on a bias ~~~~

namespace {

/// Houlsby's bottleneck y + up(gelu(down(y))), as an output transform.
struct Bottleneck : peft::Delta {
  explicit Bottleneck(int64_t width)
      : peft::Delta("Bottleneck"),
        down(register_module("down", nn::Linear(width, 3))),
        up(register_module("up", nn::Linear(3, width))) {
    to(f64);
  }

  Tensor effective(const Tensor& weight, double) const override {
    return weight;
  }
  bool transforms_output() const override {
    return true;
  }
  Tensor output(const Tensor& y, double scale) const override {
    return apply(y, scale);
  }
  Tensor apply(const Tensor& y, double scale = 1) const {
    auto d = down;
    auto u = up;
    return y + scale * u(at::gelu(d(y)));
  }
  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    return {};
  }
  std::shared_ptr<peft::Delta> copy() const override {
    return std::make_shared<Bottleneck>(up->options.out_features());
  }
  std::string describe() const override {
    return "bottleneck";
  }

  nn::Linear down, up;
};

/// y → 2 y, which fits any shape.
struct Doubling : peft::Delta {
  Doubling() : peft::Delta("Doubling") {}
  Tensor effective(const Tensor& weight, double) const override {
    return weight;
  }
  bool transforms_output() const override {
    return true;
  }
  Tensor output(const Tensor& y, double) const override {
    return y * 2;
  }
  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    return {};
  }
  std::shared_ptr<peft::Delta> copy() const override {
    return std::make_shared<Doubling>();
  }
  std::string describe() const override {
    return "doubling";
  }
};

peft::Adapter attach_output(
    nn::Module& model,
    const std::vector<std::pair<std::string, std::shared_ptr<peft::Delta>>>&
        wanted,
    const std::string& name = "output") {
  peft::detail::Plan plan;
  plan.method = "TEST";
  for (const auto& [path, delta] : wanted) {
    const Tensor bias =
        peft::detail::parameter_at(peft::detail::base_parameters(model), path);
    plan.sites.push_back({path, path, path, bias, delta});
  }
  return peft::detail::commit(model, name, std::move(plan));
}

struct HoulsbyLayer {
  HoulsbyLayer() {
    layer = nn::TransformerEncoderLayer(
        nn::TransformerEncoderLayerOptions(8, 2).dim_feedforward(12).dropout(
            0));
    layer->to(f64);
    first = std::make_shared<Bottleneck>(8);
    second = std::make_shared<Bottleneck>(8);
  }

  peft::Adapter attach() {
    return attach_output(
        *layer, {{"self_attn.out_proj.bias", first}, {"linear2.bias", second}});
  }
  /// The layer written by hand, with the two bottlenecks in their places.
  Tensor by_hand(const Tensor& x) {
    auto t =
        layer->norm1(x + first->apply(std::get<0>(layer->self_attn(x, x, x))));
    return layer->norm2(
        t + second->apply(layer->linear2(at::relu(layer->linear1(t)))));
  }
  std::vector<Tensor> parameters() const {
    auto all = first->parameters();
    const auto more = second->parameters();
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }

  nn::TransformerEncoderLayer layer{nullptr};
  std::shared_ptr<Bottleneck> first, second;
};

} // namespace

TEST_CASE(
    "bottlenecks on the biases of an unmodified TransformerEncoderLayer") {
  seed(50);
  HoulsbyLayer h;
  auto x = draw({5, 2, 8}).set_requires_grad(true);
  std::vector<Tensor> leaves = h.parameters();
  leaves.push_back(x);
  const Tensor plain = h.layer(x).detach();
  const Tensor expected = h.by_hand(x);
  const auto wanted = gradients(expected, leaves);
  auto adapter = h.attach();
  const Tensor y = h.layer(x);
  CHECK(close(y, expected));
  CHECK(all_close(gradients(y, leaves), wanted));
  {
    torch::NoGradGuard no_grad;
    CHECK(close(h.layer(x), expected));
  }
  {
    c10::InferenceMode inference;
    CHECK(close(h.layer(x.detach()), expected));
  }
  adapter.disable();
  CHECK(equal_bits(h.layer(x), plain));
  adapter.enable();
  const std::string error = error_of([&] { adapter.merge(); });
  CHECK(contains(error, "cannot be merged"));
  CHECK(!adapter.is_merged());
  CHECK(close(h.layer(x), expected));

  SECTION("with LoRA on the same layer") {
    auto lora = peft::attach(*h.layer, adapted::acting({"linear2"}), "lora");
    const Tensor both = h.layer(x);
    CHECK(!close(both, expected));
    const auto& delta = adapted::lora(lora);
    CHECK(gradients(both, {delta.lora_A})[0].defined());
    CHECK(gradients(both, {h.first->down->weight})[0].defined());
    lora.detach();
    CHECK(close(h.layer(x), expected));
  }
  SECTION("there and back in another dtype") {
    h.layer->to(torch::kFloat);
    h.layer->to(f64);
    CHECK(close(h.layer(x), expected, 1e-5, 1e-5));
  }
  SECTION("saved and detached") {
    std::stringstream stream;
    torch::save(h.layer, stream);
    adapter.detach();
    CHECK(equal_bits(h.layer(x), plain));
    CHECK(!peft::is_adapted(h.layer->linear2->bias));
  }
}

TEST_CASE("bottlenecks under autocast") {
  seed(51);
  HoulsbyLayer h;
  h.layer->to(torch::kFloat);
  h.first->to(torch::kFloat);
  h.second->to(torch::kFloat);
  const Tensor x = torch::randn({5, 2, 8});
  Tensor expected, y;
  {
    adapted::Autocast autocast;
    expected = h.by_hand(x);
  }
  auto adapter = h.attach();
  {
    adapted::Autocast autocast;
    y = h.layer(x);
  }
  CHECK(y.scalar_type() == expected.scalar_type());
  CHECK(close(y, expected, 2e-2, 2e-2));
}

TEST_CASE(
    "ten training steps of bottlenecks equal those of the written-out layer") {
  auto train = [](bool attached) {
    seed(52);
    HoulsbyLayer h;
    for (auto& p : h.layer->parameters()) {
      p.set_requires_grad(false);
    }
    if (attached) {
      h.attach();
    }
    const Tensor x = draw({5, 2, 8}), target = draw({5, 2, 8});
    torch::optim::AdamW optimizer(h.parameters(), 0.01);
    for (int step = 0; step < 10; ++step) {
      optimizer.zero_grad();
      const Tensor y = attached ? h.layer(x) : h.by_hand(x);
      torch::mse_loss(y, target).backward();
      optimizer.step();
    }
    return h.parameters();
  };
  CHECK(all_close(train(true), train(false)));
}

TEST_CASE("an output transform acts wherever the bias is added") {
  seed(53);
  nn::Linear linear(4, 6);
  linear->to(f64);
  const Tensor b = linear->bias.detach().clone(), W = linear->weight.detach();
  auto bottleneck = std::make_shared<Bottleneck>(6);
  auto adapter = attach_output(*linear, {{"bias", bottleneck}});
  const Tensor x = draw({3, 4});
  const Tensor expected = bottleneck->apply(at::linear(x, W, b));
  const Tensor& bias = linear->bias;
  const std::vector<adapted::Access> places = {
      {"layer", [&](const Tensor& v) { return linear(v); }},
      {"layer, 3-D",
       [&](const Tensor& v) { return linear(v.unsqueeze(0))[0]; }},
      {"linear", [&](const Tensor& v) { return at::linear(v, W, bias); }},
      {"addmm", [&](const Tensor& v) { return at::addmm(bias, v, W.t()); }},
      {"y + bias", [&](const Tensor& v) { return at::mm(v, W.t()) + bias; }},
      {"bias + y", [&](const Tensor& v) { return bias + at::mm(v, W.t()); }},
      {"y += bias",
       [&](const Tensor& v) {
         auto y = at::mm(v, W.t());
         return y += bias;
       }},
      {"a view of the bias",
       [&](const Tensor& v) {
         return at::mm(v, W.t()) + bias.view({1, 6});
       }},
      {"a moved bias",
       [&](const Tensor& v) {
         return at::linear(v, W, bias.to(torch::kFloat).to(f64));
       }},
  };
  for_each_row(places, [&](const adapted::Access& place) {
    const Tensor y = place.of(x);
    CHECK(close(y, expected, 1e-6, 1e-6));
    CHECK(all_close(
        gradients(
            bottleneck->apply(at::linear(x, W, b)), bottleneck->parameters()),
        gradients(at::linear(x, W, bias), bottleneck->parameters())));
  });
  CHECK(close(linear(x[0]), expected[0]));
  adapter.set_scale(0.5);
  CHECK(close(linear(x), bottleneck->apply(at::linear(x, W, b), 0.5)));
}

TEST_CASE("an output transform acts on convolutions and normalisation") {
  seed(54);
  auto doubles = [](auto holder, const Tensor& x) {
    holder->to(f64);
    const Tensor plain = holder(x);
    attach_output(*holder, {{"bias", std::make_shared<Doubling>()}});
    CHECK(close(holder(x), plain * 2));
  };
  doubles(nn::Conv1d(4, 4, 1), draw({1, 4, 5}));
  doubles(
      nn::Conv2d(nn::Conv2dOptions(4, 4, 3).padding(1)), draw({1, 4, 5, 5}));
  doubles(
      nn::Conv2d(
          nn::Conv2dOptions(4, 4, 3).padding(1).padding_mode(torch::kCircular)),
      draw({1, 4, 5, 5}));
  doubles(
      nn::Conv2d(nn::Conv2dOptions(4, 4, 3).padding(torch::kSame)),
      draw({1, 4, 5, 5}));
  doubles(nn::Conv3d(2, 2, 1), draw({1, 2, 3, 3, 3}));
  doubles(nn::ConvTranspose2d(4, 4, 2), draw({1, 4, 3, 3}));
  doubles(nn::LayerNorm(nn::LayerNormOptions({4})), draw({3, 4}));
}

TEST_CASE(
    "an operator that does not say where the output is refuses, readers do "
    "not") {
  seed(55);
  nn::Linear linear(4, 6);
  linear->to(f64);
  const Tensor b = linear->bias.detach().clone();
  auto adapter =
      attach_output(*linear, {{"bias", std::make_shared<Bottleneck>(6)}});
  const Tensor& bias = linear->bias;
  struct Use {
    std::string name;
    std::function<Tensor(const Tensor&)> of;
  };
  const std::vector<Use> refused = {
      {"bias * 2", [](const Tensor& v) { return v * 2; }},
      {"cat",
       [](const Tensor& v) {
         return at::cat({v, v});
       }},
      {"sub",
       [](const Tensor& v) {
         return draw({3, 6}) - v;
       }},
      {"bilinear",
       [](const Tensor& v) {
         return at::bilinear(draw({2, 3}), draw({2, 4}), draw({6, 3, 4}), v);
       }},
      {"batch_norm",
       [](const Tensor& v) {
         return at::batch_norm(
             draw({3, 6}), {}, v, {}, {}, true, 0.1, 1e-5, false);
       }},
      {"a view of it",
       [](const Tensor& v) {
         return v.view({2, 3}).exp();
       }},
  };
  for_each_row(refused, [&](const Use& use) {
    CHECK(contains(error_of([&] { use.of(bias); }), "peft: "));
  });
  const std::vector<Use> readers = {
      {"clone", [](const Tensor& v) { return v.clone(); }},
      {"copy_",
       [](const Tensor& v) { return torch::zeros({6}, f64).copy_(v); }},
      {"to",
       [](const Tensor& v) { return peft::base(v.to(torch::kFloat)).to(f64); }},
      {"zeros_like", [](const Tensor& v) { return at::zeros_like(v); }},
      {"detach", [](const Tensor& v) { return v.detach().clone(); }},
  };
  for_each_row(readers, [&](const Use& use) {
    CHECK(close(use.of(bias), use.of(b), 1e-7, 1e-7));
  });
  CHECK(at::equal(bias, b));
  adapter.disable();
  for_each_row(refused, [&](const Use& use) {
    if (use.name == "bias * 2" || use.name == "cat") {
      CHECK(equal_bits(use.of(bias), use.of(b)));
    }
  });
}

TEST_CASE("adapters inside an output transform take part") {
  seed(56);
  nn::Linear linear(4, 6);
  linear->to(f64);
  const Tensor x = draw({3, 4}), plain = linear(x).detach();
  auto bottleneck = std::make_shared<Bottleneck>(6);
  auto inner = peft::attach(*bottleneck->up, adapted::acting());
  const auto calls = adapted::watch(inner);
  auto adapter = attach_output(*linear, {{"bias", bottleneck}});
  for (const bool grad : {true, false}) {
    torch::AutoGradMode mode(grad);
    const int before = calls->linear;
    const Tensor y = linear(x);
    CHECK(calls->linear == before + 1);
    CHECK(close(y, bottleneck->apply(plain)));
  }
  CHECK(gradients(linear(x), inner.parameters())[0].defined());
}

TEST_CASE("a layer without a bias has no place for an output transform") {
  nn::Linear linear(nn::LinearOptions(4, 6).bias(false));
  CHECK(contains(
      error_of([&] {
        attach_output(*linear, {{"bias", std::make_shared<Doubling>()}});
      }),
      "not defined"));
  CHECK(linear->children().empty());
}

// ~~~~ Refusals ~~~~

TEST_CASE(
    "an embedding with max_norm is refused at attach and at the operator") {
  seed(60);
  nn::Embedding table(nn::EmbeddingOptions(9, 4).max_norm(0.5));
  nn::EmbeddingBag bag(nn::EmbeddingBagOptions(9, 4).max_norm(0.5));
  const Tensor W = table->weight.detach().clone();
  CHECK(contains(
      error_of([&] { peft::attach(*table, adapted::acting({""})); }),
      "max_norm"));
  CHECK(contains(
      error_of([&] { peft::attach(*table, adapted::acting({"weight"})); }),
      "max_norm"));
  CHECK(contains(
      error_of([&] { peft::attach(*bag, adapted::acting({""})); }),
      "max_norm"));
  CHECK(!peft::is_adapted(table->weight));
  CHECK(table->weight.requires_grad());
  CHECK(table->children().empty());

  nn::Embedding later(9, 4);
  const Tensor before = later->weight.detach().clone();
  auto adapter = peft::attach(*later, adapted::acting({"weight"}));
  later->options.max_norm(0.5);
  CHECK(contains(error_of([&] { later(torch::tensor({1, 2})); }), "max_norm"));
  CHECK(equal_bits(peft::base(later->weight), before));
}

TEST_CASE(
    "sparse, quantised, integral and one-dimensional weights are refused at "
    "attach") {
  struct Odd : nn::Module {
    explicit Odd(Tensor t) {
      register_parameter("weight", std::move(t), false);
    }
  };
  const std::vector<std::pair<std::string, Tensor>> weights = {
      {"sparse", torch::eye(3).to_sparse()},
      {"dtype", torch::ones({3, 3}, torch::kLong)},
      {"dimension", torch::ones({3})},
  };
  for (const auto& [word, weight] : weights) {
    Odd odd(weight);
    const std::string error =
        error_of([&] { peft::attach(odd, adapted::acting({"weight"})); });
    INFO(word << ": " << error);
    CHECK(contains(error, "peft: "));
    CHECK(contains(error, word));
    CHECK(odd.children().empty());
  }
}

TEST_CASE("attaching to a view of an adapted weight is refused") {
  seed(61);
  Adapted a;
  nn::Linear view(4, 3);
  view->to(f64);
  view->weight = a.w().narrow(0, 0, 3);
  const std::string error =
      error_of([&] { peft::attach(*view, adapted::acting(), "other"); });
  INFO(error);
  CHECK(contains(error, "view"));
  CHECK(close(a.w() + 0, a.value()));
}

// ~~~~ Threads ~~~~

TEST_CASE("threads see one of the allowed values while switches are thrown") {
  seed(70);
  Adapted a;
  const Tensor x = draw({3, 4});
  std::vector<Tensor> allowed;
  for (const double s : {0., 1., 3.}) {
    allowed.push_back(at::linear(x, a.W + s * (a.value() - a.W), a.b).detach());
  }
  std::atomic<bool> stop{false};
  std::atomic<int64_t> calls{0}, odd{0}, failed{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&, i] {
      while (!stop) {
        try {
          torch::AutoGradMode grad(i % 2 == 0);
          Tensor y = i % 3 == 0 ? a.linear(x.unsqueeze(0))[0]
              : i % 3 == 1      ? a.linear(x)
                                : at::linear(x, a.w() + 0, a.b);
          if (y.requires_grad()) {
            torch::autograd::grad({y.sum()}, {a.A, a.B}, {}, {}, false, true);
          }
          bool fits = false;
          for (const auto& one : allowed) {
            fits = fits || bool(close(y, one));
          }
          odd += fits ? 0 : 1;
          ++calls;
        } catch (const std::exception&) {
          ++failed;
        }
      }
    });
  }
  for (int i = 0; i < 20000 || calls < 200; ++i) {
    i % 2 ? a.adapter.enable() : a.adapter.disable();
    a.adapter.set_scale(i % 3 ? 1. : 3.);
    if (i % 64 == 0) {
      std::this_thread::yield();
    }
  }
  stop = true;
  for (auto& thread : threads) {
    thread.join();
  }
  CHECK(calls > 0);
  CHECK(odd == 0);
  CHECK(failed == 0);
}

TEST_CASE("each thread has its own choice of adapters") {
  seed(71);
  Adapted a;
  auto second = peft::attach(*a.linear, adapted::acting(), "second");
  const auto& other = adapted::lora(second);
  const Tensor first_change = 2 * at::mm(a.B, a.A),
               second_change = 2 * at::mm(other.lora_B, other.lora_A);
  const Tensor x = draw({3, 4});
  const std::vector<std::pair<std::vector<std::string>, Tensor>> choices = {
      {{}, a.W},
      {{"default"}, a.W + first_change},
      {{"second"}, a.W + second_change},
      {{"default", "second", "unknown"}, a.W + first_change + second_change},
  };
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&, i] {
      const auto& [names, W] = choices[static_cast<size_t>(i) % 4];
      const peft::ActiveAdapters scope(names);
      for (int k = 0; k < 100; ++k) {
        torch::NoGradGuard no_grad;
        wrong += close(a.linear(x), at::linear(x, W, a.b)) ? 0 : 1;
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  CHECK(wrong == 0);
  CHECK(close(
      a.linear(x), at::linear(x, a.W + first_change + second_change, a.b)));
}

TEST_CASE(
    "a choice of adapters nests, ends with its scope, and overrides switches") {
  seed(72);
  Adapted a;
  auto is_base = [&] { return bool(close(a.w() + 0, a.W)); };
  {
    const peft::ActiveAdapters none({});
    CHECK(is_base());
    {
      const peft::ActiveAdapters one({"default"});
      CHECK(!is_base());
    }
    CHECK(is_base());
    CHECK(error_of([&] {
            const peft::ActiveAdapters one({"default"});
            TORCH_CHECK(false, "leave by an error");
          }) != "");
    CHECK(is_base());
  }
  CHECK(!is_base());
  a.adapter.disable();
  CHECK(is_base());
  const peft::ActiveAdapters one({"default"});
  CHECK(!is_base());
}

TEST_CASE("a choice of adapters travels with at::ThreadLocalState") {
  seed(73);
  Adapted a;
  const peft::ActiveAdapters none({});
  auto is_base = [&] { return bool(close(a.w() + 0, a.W)); };
  bool without = true, with = false, launched = false;
  const at::ThreadLocalState state;
  std::thread([&] {
    without = is_base();
    const at::ThreadLocalStateGuard guard(state);
    with = is_base();
  }).join();
  CHECK(!without);
  CHECK(with);
  std::promise<void> done;
  at::launch([&] {
    launched = is_base();
    done.set_value();
  });
  done.get_future().wait();
  CHECK(launched);
}

TEST_CASE("a merged adapter cannot be left out of a call") {
  seed(74);
  Adapted a;
  a.adapter.merge();
  const peft::ActiveAdapters none({});
  CHECK(contains(error_of([&] { a.linear(draw({3, 4})); }), "merged"));
  CHECK(contains(error_of([&] { (void)(a.w() + 0); }), "merged"));
}

// ~~~~ Memory ~~~~

TEST_CASE("detach frees the adapter at once, a graph notwithstanding") {
  seed(80);
  Adapted a;
  const auto& record = a.adapter.shared_state()->sites[0];
  std::weak_ptr<peft::detail::Site> site = record.site;
  std::weak_ptr<peft::Delta> delta = record.delta;
  std::weak_ptr<peft::detail::AdapterState> state = a.adapter.shared_state();
  const auto x = draw({3, 4}).set_requires_grad(true);
  const Tensor y = a.linear(x), z = a.w() * 2;
  const auto wanted = gradients(
      at::linear(x, a.value(), a.b).sum() + (a.value() * 2).sum(),
      {a.A, a.B, x});
  Tensor view = a.w().t();
  a.adapter.detach();
  a.adapter = peft::Adapter();
  CHECK(!site.expired()); // the view's
  view = Tensor();
  CHECK(site.expired());
  CHECK(delta.expired());
  CHECK(state.expired());
  CHECK(all_close(gradients(y.sum() + z.sum(), {a.A, a.B, x}), wanted));
  CHECK(equal_bits(a.linear(x), at::addmm(a.b, x, a.W.t())));
}

TEST_CASE("nothing outlives the model") {
  seed(81);
  std::weak_ptr<peft::detail::Site> site;
  std::weak_ptr<peft::Delta> delta;
  std::weak_ptr<peft::detail::AdapterState> state;
  // Not a weak pointer to the tensor: that alone would keep its tag in memory.
  c10::weak_intrusive_ptr<c10::StorageImpl> storage{
      c10::intrusive_ptr<c10::StorageImpl>()};
  peft::Adapter handle;
  {
    Adapted a;
    const auto& record = a.adapter.shared_state()->sites[0];
    site = record.site;
    delta = record.delta;
    state = a.adapter.shared_state();
    storage = a.w().storage().getWeakStorageImpl();
    a.linear(draw({3, 4})).sum().backward();
    (void)a.w().narrow(0, 0, 2).t();
    (void)a.w().to(torch::kFloat);
    handle = a.adapter;
  }
  CHECK(storage.expired());
  CHECK(site.expired());
  CHECK(!state.expired());
  CHECK(contains(error_of([&] { handle.merge(); }), "no longer exists"));
  CHECK(contains(error_of([&] { handle.sites(); }), "no longer exists"));
  handle.disable(); // harmless
  CHECK(error_of([&] { handle.detach(); }) == "");
  handle = peft::Adapter();
  CHECK(delta.expired());
  CHECK(state.expired());
}

TEST_CASE("views and attaches leave the storage's count as it was") {
  Adapted a;
  const auto before = a.w().storage().use_count();
  {
    const Tensor t = a.w().t(), n = a.w().narrow(0, 1, 2),
                 s = t.narrow(1, 0, 2);
    (void)(n + 0);
    (void)a.linear(draw({3, 4}));
    a.adapter.merge();
    a.adapter.unmerge();
  }
  CHECK(a.w().storage().use_count() == before);
  a.adapter.detach();
  CHECK(a.w().storage().use_count() == before);
}

TEST_CASE("after detach the module is as it was") {
  seed(82);
  nn::Sequential net(nn::Linear(4, 5), nn::Linear(5, 3));
  net[0]->parameters()[1].set_requires_grad(false);
  std::vector<Tensor> parameters = net->parameters();
  auto adapter = peft::attach(*net, adapted::acting());
  CHECK(net->parameters().size() == 8);
  auto twice = adapter;
  adapter.detach();
  CHECK(net->children().size() == 2);
  const auto after = net->parameters();
  REQUIRE(after.size() == 4);
  for (size_t i = 0; i < 4; ++i) {
    CHECK(after[i].is_same(parameters[i]));
    CHECK(!peft::is_adapted(after[i]));
    CHECK(after[i].requires_grad() == (i != 1));
  }
  CHECK(contains(error_of([&] { twice.disable(); }), "detached"));
  std::stringstream stream;
  torch::save(net, stream); // plain again: saves, loads and clones
  torch::load(net, stream);
  CHECK(net->clone() != nullptr);
  CHECK(peft::attach(*net, adapted::acting()).sites().size() == 2);
}

TEST_CASE("a failed attach leaves the model untouched") {
  seed(83);
  struct Net : nn::Module {
    nn::Linear good{register_module("good", nn::Linear(4, 4))};
    nn::Embedding bad{register_module(
        "bad",
        nn::Embedding(nn::EmbeddingOptions(5, 4).max_norm(1.)))};
  };
  auto net = std::make_shared<Net>();
  CHECK(error_of([&] {
          peft::attach(*net, adapted::acting({"good", "bad"}));
        }) != "");
  CHECK(error_of([&] {
          peft::attach(*net, adapted::acting({"good", "none"}));
        }) != "");
  CHECK(error_of([&] {
          peft::attach(*net, adapted::acting({"good"}), "a.b");
        }) != "");
  CHECK(net->children().size() == 2);
  CHECK(!peft::is_adapted(net->good->weight));
  for (const auto& p : net->parameters()) {
    CHECK(p.requires_grad());
  }
}

} // namespace test_adapted_weight_rules
