/// attach and the Adapter handle: several adapters, switches, what LibTorch's
/// own functions see, copies, files, and that errors leave everything as it
/// was.

#include "adapted.h"
#include "model_state.h"
#include "networks.h"
#include "test.h"

#include <functional>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace test_attach {

namespace {

using adapted::acting;
using adapted::lora;
using networks::Mlp;
using peft::ActiveAdapters;
using peft::Adapter;
using peft::LoraOptions;
using torch::Tensor;
using Names = std::vector<std::string>;
namespace nn = torch::nn;

nn::Sequential two_layers() {
  return nn::Sequential(nn::Linear(6, 8), nn::Tanh(), nn::Linear(8, 3));
}

/// s B A of an adapter at a site.
Tensor change(const Adapter& adapter, size_t site = 0) {
  const auto& delta = lora(adapter, site);
  return delta.config().scaling * at::mm(delta.lora_B, delta.lora_A);
}

Tensor weight_of(nn::Sequential& model, size_t i) {
  return model->ptr(i)->as<nn::LinearImpl>()->weight;
}

Names flags(const nn::Module& model) {
  Names result;
  for (const auto& p : model.named_parameters()) {
    result.push_back(p.key() + (p.value().requires_grad() ? " on" : " off"));
  }
  return result;
}

} // namespace

TEST_CASE("the handle of an adapter") {
  seed();
  Mlp model;
  const auto plain = state_of(model);
  auto adapter =
      peft::attach(model, LoraOptions(2).targets({"fc1", "head"}), "style");
  CHECK(adapter.name() == "style");
  CHECK(adapter.method() == "LORA");
  CHECK(
      adapter.named_parameters().keys() ==
      Names{
          "fc1.lora_A.weight",
          "fc1.lora_B.weight",
          "head.lora_A.weight",
          "head.lora_B.weight"});
  CHECK(adapter.parameters().size() == 4);
  CHECK(adapter.num_parameters() == 2 * (10 + 16) + 2 * (12 + 3));
  const auto sites = adapter.sites();
  REQUIRE(sites.size() == 2);
  CHECK(sites[1].name == "head");
  CHECK(sites[1].parameters == Names{"head.weight"});
  CHECK(sites[1].what == "lora r=2");
  CHECK(sites[1].shape == std::vector<int64_t>{3, 12});
  CHECK(sites[1].num_parameters == 2 * (12 + 3));
  CHECK(adapter.is_enabled());
  CHECK_FALSE(adapter.is_merged());
  CHECK(adapter.scale() == 1);

  // In the model the tensors are named after the weights.
  CHECK(model.named_parameters()["peft.style.head.weight.lora_B"].is_same(
      adapter.parameters()[3]));
  CHECK(peft::is_adapted(model.fc1->weight));
  CHECK_FALSE(peft::is_adapted(model.fc1->bias));
  CHECK_FALSE(peft::is_adapted(model.fc2->weight));

  const Adapter same = peft::get_adapter(model, "style");
  CHECK(same.parameters()[0].is_same(adapter.parameters()[0]));
  adapter.detach();
  CHECK(same_state(state_of(model), plain));
  CHECK(peft::adapters(model).empty());
}

TEST_CASE("an empty, a detached and an orphaned handle say so") {
  Adapter empty;
  CHECK(contains(error_of([&] { empty.name(); }), "handle is empty"));

  Mlp model;
  auto adapter = peft::attach(model, acting("fc1"), "one");
  Adapter other = adapter;
  adapter.detach();
  for (const auto& use : std::vector<std::function<void()>>{
           [&] { other.parameters(); },
           [&] { other.enable(); },
           [&] { other.merge(); },
           [&] { other.detach(); },
           [&] { other.sites(); }}) {
    CHECK(contains(error_of(use), "peft: adapter 'one' was detached"));
  }

  Adapter orphan;
  {
    Mlp gone;
    orphan = peft::attach(gone, acting("fc1"));
  }
  CHECK(orphan.parameters().size() == 2); // the values can still be had
  for (const auto& use : std::vector<std::function<void()>>{
           [&] { orphan.merge(); }, [&] { orphan.sites(); }}) {
    CHECK(contains(error_of(use), "the model behind this adapter no longer"));
  }
  CHECK(error_of([&] { orphan.detach(); }) == "");
}

TEST_CASE("names of adapters") {
  Mlp model;
  peft::attach(model, acting("fc1"), "one");
  peft::attach(model, acting("fc2"), "two");
  Names names;
  for (const auto& adapter : peft::adapters(model)) {
    names.push_back(adapter.name());
  }
  CHECK(names == Names{"one", "two"});
  CHECK(contains(
      error_of([&] { peft::get_adapter(model, "three"); }),
      "no adapter 'three'; it has 'one', 'two'"));
  Mlp bare;
  CHECK(contains(
      error_of([&] { peft::get_adapter(bare); }), "'default'; it has none"));

  const auto before = state_of(model);
  struct Row {
    std::string name, part;
  };
  for (const auto& row : std::vector<Row>{
           {"", "must not be empty"},
           {"a.b", "must not contain a dot, got 'a.b'"},
           {"__base__", "stands for the base"},
           {"one", "already has an adapter named 'one'"},
           {"two", "already has an adapter named 'two'"}}) {
    INFO(row.name);
    const auto error =
        error_of([&] { peft::attach(model, acting("fc1"), row.name); });
    CHECK(contains(error, "peft: "));
    CHECK(contains(error, row.part));
    CHECK(same_state(state_of(model), before));
  }
  // Names that are parts of others, of modules and of parameters.
  for (const char* name :
       {"on", "fc1", "weight", "lora_A", "peft", "0", "a b"}) {
    INFO(name);
    auto adapter = peft::attach(model, acting("fc1"), name);
    CHECK(peft::get_adapter(model, name).name() == name);
    adapter.detach();
    CHECK(same_state(state_of(model), before));
  }

  nn::Sequential taken;
  taken->push_back("peft", nn::Linear(2, 2));
  CHECK(contains(
      error_of([&] { peft::attach(*taken, acting()); }),
      "has a child module named 'peft'"));
  CHECK_FALSE(peft::is_adapted(weight_of(taken, 0)));
  CHECK(weight_of(taken, 0).requires_grad());
}

TEST_CASE("several adapters on one model") {
  seed();
  Mlp model;
  model.to(torch::kDouble);
  const Tensor x = torch::randn({4, 10}, torch::kDouble);
  const Tensor W = model.fc1->weight.detach().clone();
  const auto out = [&] { return model.fc1->forward(x).detach(); };
  const Tensor base = out();
  auto one = peft::attach(model, acting("fc1"), "one");
  const Tensor with_one = out();
  auto two = peft::attach(
      model, LoraOptions(3).alpha(1).init("random").targets("fc1"), "two");
  const Tensor d1 = change(one), d2 = change(two);
  const auto expected = [&](const Tensor& d) {
    return at::linear(x, W + d, model.fc1->bias);
  };

  // Both act, and add up: on the fast path and as a value.
  CHECK(close(out(), expected(d1 + d2)));
  CHECK(close(peft::effective(model.fc1->weight), W + d1 + d2));

  struct Row {
    bool one, two;
  };
  for (const auto& row : std::vector<Row>{
           {true, false}, {false, true}, {false, false}, {true, true}}) {
    INFO(row.one << row.two);
    row.one ? one.enable() : one.disable();
    row.two ? two.enable() : two.disable();
    CHECK(one.is_enabled() == row.one);
    CHECK(two.is_enabled() == row.two);
    const Tensor sum = (row.one ? d1 : 0 * d1) + (row.two ? d2 : 0 * d2);
    CHECK(close(out(), expected(sum)));
    if (!row.two) {
      CHECK(equal_bits(out(), row.one ? with_one : base));
    }
  }

  one.set_scale(-2);
  two.set_scale(0.5);
  CHECK(one.scale() == -2);
  CHECK(close(out(), expected(-2 * d1 + 0.5 * d2)));
  two.set_scale(0);
  one.set_scale(1);
  CHECK(equal_bits(out(), with_one));
  one.set_scale(0);
  CHECK(equal_bits(out(), base));
  CHECK(contains(error_of([&] { one.set_scale(NAN); }), "must be finite"));
  CHECK(one.scale() == 0);

  // One goes; the other is as if it had been alone.
  one.set_scale(1);
  two.set_scale(1);
  two.detach();
  CHECK(equal_bits(out(), with_one));
  two = peft::attach(model, acting("fc1"), "two"); // the name is free again
  one.detach();
  CHECK(close(out(), expected(change(two))));
  two.detach();
  CHECK(equal_bits(out(), base));
  CHECK_FALSE(peft::is_adapted(model.fc1->weight));
}

TEST_CASE("gradients of several adapters do not touch each other") {
  seed();
  Mlp model;
  const Tensor x = torch::randn({4, 10});
  auto one = peft::attach(model, acting("fc1"), "one");
  auto two = peft::attach(model, acting({"fc1", "fc2"}), "two");
  two.set_trainable(false);
  model.forward(x).sum().backward();
  for (const auto& p : one.parameters()) {
    CHECK(p.grad().defined());
  }
  for (const auto& p : two.parameters()) {
    CHECK_FALSE(p.grad().defined());
    CHECK_FALSE(p.requires_grad());
  }
  two.set_trainable(true);
  one.disable();
  model.zero_grad();
  model.forward(x).sum().backward();
  for (const auto& p : one.parameters()) {
    CHECK(
        (!p.grad().defined() || p.grad().count_nonzero().item<int64_t>() == 0));
  }
  for (const auto& p : two.parameters()) {
    CHECK(p.grad().count_nonzero().item<int64_t>() > 0);
  }
}

TEST_CASE("ActiveAdapters choose for one thread and one scope") {
  seed();
  Mlp model;
  const Tensor x = torch::randn({4, 10});
  const auto out = [&] { return model.forward(x).detach(); };
  const Tensor base = out();
  auto one = peft::attach(model, acting("fc1"), "one");
  const Tensor with_one = out();
  one.disable();
  auto two = peft::attach(model, acting({"fc1", "fc2"}), "two");
  const Tensor with_two = out();
  one.enable();
  const Tensor with_both = out();
  one.disable();
  const auto before = state_of(model);

  {
    ActiveAdapters both({"one", "two"}); // overrides disable()
    CHECK(equal_bits(out(), with_both));
    {
      ActiveAdapters only({"one", "unknown"}); // unknown names are passed over
      CHECK(equal_bits(out(), with_one));
      {
        ActiveAdapters none({});
        CHECK(equal_bits(out(), base));
        CHECK(equal_bits(
            peft::effective(model.fc1->weight), peft::base(model.fc1->weight)));
      }
      CHECK(equal_bits(out(), with_one));

      Tensor elsewhere;
      std::thread([&] { elsewhere = out(); }).join();
      CHECK(equal_bits(elsewhere, with_two)); // two is the enabled one
    }
    CHECK(equal_bits(out(), with_both));
    CHECK_FALSE(one.is_enabled()); // nothing is written
  }
  CHECK(equal_bits(out(), with_two));
  CHECK(same_state(state_of(model), before));

  // The scope goes with an exception too.
  CHECK(error_of([&] {
          ActiveAdapters none({});
          TORCH_CHECK(false, "out");
        }) != "");
  CHECK(equal_bits(out(), with_two));

  // Backward runs on other threads, after the scope: it needs no choice.
  Tensor loss;
  {
    ActiveAdapters only({"one"});
    loss = model.forward(x).sum();
  }
  loss.backward();
  CHECK(one.parameters()[0].grad().defined());
  CHECK_FALSE(two.parameters()[0].grad().defined());

  std::vector<std::thread> threads;
  std::vector<int> wrong(4, 0);
  for (size_t i = 0; i < wrong.size(); ++i) {
    threads.emplace_back([&, i] {
      torch::NoGradGuard no_grad;
      const std::vector<Names> choices{{"one"}, {"two"}, {"one", "two"}, {}};
      const Tensor expected[] = {with_one, with_two, with_both, base};
      for (size_t k = 0; k < 50; ++k) {
        const size_t j = (i + k) % 4;
        ActiveAdapters scope(choices[j]);
        wrong[i] += close(model.forward(x), expected[j]).agree ? 0 : 1;
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  CHECK(wrong == std::vector<int>(4, 0));
}

TEST_CASE("an optimizer of model->parameters() trains the adapter alone") {
  seed();
  Mlp model;
  auto adapter = peft::attach(model, acting("fc1"));
  torch::optim::SGD optimizer(
      model.parameters(), torch::optim::SGDOptions(0.1).momentum(0.9));
  const auto before = state_of(model);
  for (int step = 0; step < 2; ++step) {
    optimizer.zero_grad();
    model.forward(torch::randn({4, 10})).pow(2).sum().backward();
    optimizer.step();
  }
  const auto after = state_of(model);
  for (size_t i = 0; i < before.tensors.size(); ++i) {
    INFO(before.tensors[i].name);
    CHECK(
        equal_bits(before.tensors[i].value, after.tensors[i].value).agree !=
        before.tensors[i].requires_grad);
  }
  CHECK(peft::trainable_parameters(model).size() == 2);
}

TEST_CASE("train, eval and to reach the adapter") {
  seed();
  nn::Sequential model = two_layers();
  auto adapter = peft::attach(*model, acting().dropout(0.5));
  const auto parameters = adapter.parameters();
  model->eval();
  CHECK_FALSE(lora(adapter, 1).is_training());
  model->train();
  CHECK(lora(adapter, 1).is_training());
  model->eval();

  const Tensor x = torch::randn({4, 6});
  const Tensor y = model->forward(x);
  for (const auto dtype : {torch::kDouble, torch::kBFloat16, torch::kFloat}) {
    INFO(dtype);
    model->to(dtype);
    CHECK(weight_of(model, 0).scalar_type() == dtype);
    for (const auto& p : parameters) { // the same tensors, for optimizers
      CHECK(p.scalar_type() == dtype);
      CHECK(p.requires_grad());
    }
    CHECK(peft::is_adapted(weight_of(model, 0)));
    CHECK_FALSE(weight_of(model, 0).requires_grad());
    const Tensor moved = model->forward(x.to(dtype));
    CHECK(moved.scalar_type() == dtype);
    if (dtype == torch::kDouble) {
      CHECK(close(moved, y));
    }
  }
}

TEST_CASE("a move to where the model is already changes nothing") {
  seed();
  nn::Sequential model = two_layers();
  auto adapter = peft::attach(*model, acting());
  model->eval();
  const Tensor x = torch::randn({4, 6});
  const Tensor y = model->forward(x);
  for (int i = 0; i < 2; ++i) {
    model->to(torch::kFloat);
    model->to(torch::kCPU);
    weight_of(model, 0).set_data(weight_of(model, 0));
    CHECK(equal_bits(model->forward(x), y));
    CHECK(adapter.sites().size() == 2);
    adapter.merge();
    model->to(torch::kFloat);
    CHECK(close(model->forward(x), y));
    adapter.unmerge();
    CHECK(equal_bits(model->forward(x), y));
  }
  adapter.detach();
  CHECK_FALSE(peft::is_adapted(weight_of(model, 0)));
  CHECK_FALSE(torch::equal(model->forward(x), y));
}

TEST_CASE("requires_grad is as it was once the last adapter goes") {
  Mlp model;
  model.fc2->weight.set_requires_grad(false); // by the user
  model.head->bias.set_requires_grad(false);
  const auto before = flags(model);
  const auto all_off = [&] {
    for (const auto& p : peft::detail::base_parameters(model)) {
      if (p.second.requires_grad()) {
        return false;
      }
    }
    return true;
  };
  SECTION("detach") {
    auto adapter = peft::attach(model, acting("fc1"));
    CHECK(all_off());
    adapter.detach();
    CHECK(flags(model) == before);
  }
  SECTION("merge for good") {
    peft::attach(model, acting({"fc1", "fc2"}));
    peft::merge(model);
    CHECK(flags(model) == before);
  }
  SECTION("two adapters, in both orders") {
    for (const bool first : {true, false}) {
      auto one = peft::attach(model, acting("fc1"), "one");
      auto two = peft::attach(model, acting({"fc2", "head"}), "two");
      first ? one.detach() : two.detach();
      CHECK(all_off());
      first ? two.detach() : one.detach();
      CHECK(flags(model) == before);
    }
  }
  SECTION("a base that the user trains meanwhile") {
    auto one = peft::attach(model, acting("fc1"), "one");
    model.head->weight.set_requires_grad(true);
    auto two = peft::attach(model, acting("fc2"), "two");
    one.detach();
    two.detach();
    CHECK(flags(model) == before);
  }
}

TEST_CASE("adapters on a submodule and on the root") {
  seed();
  networks::Stack model;
  const auto before = flags(model);
  const auto plain = state_of(model);
  const Tensor x = torch::randn({3, 8});
  const Tensor y = model.forward(x);
  auto& part = *model.encoder;
  struct Row {
    std::string name;
    bool root_first, root_goes_first;
  };
  for (const auto& row : std::vector<Row>{
           {"part, root; part goes first", false, false},
           {"part, root; root goes first", false, true},
           {"root, part; part goes first", true, false},
           {"root, part; root goes first", true, true}}) {
    INFO(row.name);
    Adapter root, inner;
    const auto attach_root = [&] {
      root = peft::attach(model, acting({"query", "value"}), "root");
    };
    if (row.root_first) {
      attach_root();
    }
    inner = peft::attach(part, acting("query"), "part");
    if (!row.root_first) {
      attach_root();
    }
    CHECK(inner.sites()[0].name == "layer.0.query"); // names below its root
    CHECK(root.sites()[0].name == "encoder.layer.0.query");
    CHECK(peft::adapters(model).size() == 2);
    CHECK(peft::adapters(part).size() == 1);
    CHECK(
        peft::count_parameters(model).trainable ==
        root.num_parameters() + inner.num_parameters());
    const auto& block =
        *model.encoder->blocks->ptr(0)->as<networks::BlockImpl>();
    CHECK(close(
        peft::effective(block.query->weight),
        peft::base(block.query->weight) + change(root) + change(inner)));
    for (const auto& p : peft::detail::base_parameters(model)) {
      CHECK_FALSE(p.second.requires_grad());
    }
    (row.root_goes_first ? root : inner).detach();
    for (const auto& p : peft::detail::base_parameters(model)) {
      INFO(p.first << ", one adapter left");
      CHECK_FALSE(
          (p.second.requires_grad() &&
           (!row.root_goes_first || peft::is_adapted(p.second))));
    }
    (row.root_goes_first ? inner : root).detach();
    CHECK(flags(model) == before);
    CHECK(same_state(state_of(model), plain));
    CHECK(equal_bits(model.forward(x), y));
    for (const auto& p : peft::detail::base_parameters(model)) {
      Tensor flag = p.second;
      flag.set_requires_grad(true); // for the next row, whatever went wrong
    }
  }

  SECTION("one name in both places is refused, in both orders") {
    auto root = peft::attach(model, acting("query"), "same");
    CHECK(contains(
        error_of([&] { peft::attach(part, acting("value"), "same"); }),
        "'same'"));
    root.detach();
    auto inner = peft::attach(part, acting("query"), "same");
    CHECK(contains(
        error_of([&] { peft::attach(model, acting("value"), "same"); }),
        "already has an adapter named 'same'"));
  }
  SECTION("merging the part does not fold the root's adapter") {
    peft::attach(model, acting({"query"}), "root");
    peft::attach(part, acting("query"), "part");
    const auto attached = state_of(model);
    CHECK(contains(
        error_of([&] { peft::merge(part); }),
        "adapter 'root' was attached to a module around this one"));
    CHECK(same_state(state_of(model), attached));
    const Tensor adapted = model.forward(x).detach();
    peft::merge(model);
    CHECK(close(model.forward(x), adapted));
    CHECK(flags(model) == before);
  }
}

TEST_CASE("a failing load leaves the model as it was") {
  seed();
  Mlp model, narrow;
  narrow.fc1 = narrow.replace_module("fc1", nn::Linear(7, 16));
  auto source = peft::attach(model, acting({"fc1", "fc2"}), "source");
  TemporaryDirectory folder;
  const auto path = folder / "adapter";
  peft::save(source, path);
  source.detach();
  auto kept = peft::attach(model, acting("head"), "kept");
  peft::attach(narrow, acting("head"), "kept");

  const auto file = path + "/adapter_model.safetensors";
  const auto tensors = peft::load_safetensors(file);
  const auto rewrite =
      [&](const std::function<void(std::map<std::string, Tensor>&)>& edit) {
        std::map<std::string, Tensor> copy(tensors.begin(), tensors.end());
        edit(copy);
        std::vector<std::pair<std::string, Tensor>> list(
            copy.begin(), copy.end());
        peft::save_safetensors(list, file);
      };
  const std::string key = "base_model.model.fc2.lora_B.weight";
  struct Row {
    std::string name;
    std::function<void()> prepare;
    Mlp& model;
    std::string adapter, folder;
    Names parts;
  };
  const auto nothing = [] {};
  const std::vector<Row> rows{
      {"no folder", nothing, model, "new", folder / "none", {"not a folder"}},
      {"an empty folder",
       nothing,
       model,
       "new",
       folder.path().string(),
       {"adapter_config.json"}},
      {"a name that is taken",
       nothing,
       model,
       "kept",
       path,
       {"already has an adapter named 'kept'"}},
      {"another shape",
       nothing,
       narrow,
       "new",
       path,
       {"wrong shape", "fc1.lora_A.weight", "[2, 10]", "[2, 7]"}},
      {"a missing key",
       [&] { rewrite([&](auto& t) { t.erase(key); }); },
       model,
       "new",
       path,
       {"missing from the file", "fc2.lora_B.weight"}},
      {"an extra key",
       [&] { rewrite([&](auto& t) { t["more"] = torch::ones(2); }); },
       model,
       "new",
       path,
       {"unexpected in the file", "more"}},
      {"all three",
       [&] {
         rewrite([&](auto& t) {
           t.erase(key);
           t["more"] = torch::ones(2);
         });
       },
       narrow,
       "new",
       path,
       {"fc1.lora_A.weight",
        "fc2.lora_B.weight",
        "more",
        "nothing was loaded"}},
      {"a file cut short",
       [&] { std::ofstream(file, std::ios::binary) << "12345678"; },
       model,
       "new",
       path,
       {"peft: "}}};
  for (const auto& row : rows) {
    INFO(row.name);
    row.prepare();
    const auto before = state_of(row.model);
    const auto error =
        error_of([&] { peft::load(row.model, row.folder, row.adapter); });
    INFO(error);
    for (const auto& part : row.parts) {
      CHECK(contains(error, part));
    }
    CHECK(same_state(state_of(row.model), before));
    CHECK(peft::adapters(row.model).size() == 1);
  }

  rewrite([&](auto& t) {
    t.erase(key);
    t["more"] = torch::ones(2);
  });
  auto lenient = peft::load(
      model,
      path,
      "lenient",
      peft::LoadOptions().strict(false).is_trainable(false));
  CHECK(
      lenient.named_parameters()["fc2.lora_B.weight"]
          .count_nonzero()
          .item<int64_t>() == 0); // its start
  for (const auto& p : lenient.parameters()) {
    CHECK_FALSE(p.requires_grad());
  }
}

TEST_CASE("peft::clone is a deep copy with its adapters") {
  seed();
  nn::Sequential model = two_layers();
  model->ptr(2)->as<nn::LinearImpl>()->bias.set_requires_grad(false);
  const auto original_flags = flags(*model);
  auto one = peft::attach(*model, acting(), "one");
  auto two = peft::attach(*model, peft::BitFitOptions(), "two");
  auto off = peft::attach(*model, acting("0"), "off");
  randomise(two);
  one.set_scale(0.5);
  off.disable();
  one.parameters()[1].set_requires_grad(false);
  model->eval();
  const Tensor x = torch::randn({4, 6});
  const Tensor y = model->forward(x).detach();
  const auto before = state_of(*model);

  nn::Sequential copy = peft::clone(model);
  CHECK(same_state(state_of(*model), before));
  CHECK(equal_bits(copy->forward(x), y));
  CHECK(flags(*copy) == flags(*model));
  CHECK_FALSE(copy->is_training());
  const auto theirs = copy->named_parameters(),
             ours = model->named_parameters();
  REQUIRE(theirs.size() == ours.size());
  for (const auto& p : theirs) {
    INFO(p.key());
    CHECK_FALSE(p.value().is_alias_of(ours[p.key()]));
    CHECK(equal_bits(peft::base(p.value()), peft::base(ours[p.key()])));
  }
  auto their_one = peft::get_adapter(*copy, "one");
  CHECK(their_one.scale() == 0.5);
  CHECK_FALSE(lora(their_one).is_training());
  CHECK_FALSE(peft::get_adapter(*copy, "off").is_enabled());

  // Neither hears of what happens to the other.
  randomise(their_one, 9);
  CHECK(equal_bits(model->forward(x), y));
  {
    torch::NoGradGuard no_grad;
    peft::base(weight_of(copy, 0)).zero_();
  }
  CHECK(equal_bits(model->forward(x), y));
  const Tensor changed = copy->forward(x).detach();
  for (auto& adapter : peft::adapters(*model)) {
    adapter.detach();
  }
  CHECK(flags(*model) == original_flags);
  CHECK(equal_bits(copy->forward(x), changed));
  for (auto& adapter : peft::adapters(*copy)) {
    adapter.detach();
  }
  CHECK(flags(*copy) == original_flags); // requires_grad from before attach

  SECTION("a model without adapters") {
    auto plain = peft::clone(*model); // a shared_ptr for a module
    CHECK(flags(*plain) == original_flags);
    CHECK(equal_bits(plain->forward(x), model->forward(x)));
  }
  SECTION("adapters on the root and below") {
    auto bert = peft::models::BertForSequenceClassification(
        peft::models::BertOptions()
            .vocab_size(9)
            .hidden_size(8)
            .num_hidden_layers(1)
            .num_attention_heads(2)
            .intermediate_size(8)
            .max_position_embeddings(8));
    bert->eval();
    peft::attach(*bert->bert->encoder, acting("query"), "inner");
    peft::attach(*bert, acting({"value", "query"}), "outer");
    const Tensor ids = torch::tensor({{1, 2, 3}});
    const Tensor logits = bert->forward(ids).detach();
    auto twin = peft::clone(bert);
    CHECK(equal_bits(twin->forward(ids), logits));
    CHECK(flags(*twin) == flags(*bert));
    peft::merge(*twin);
    CHECK(equal_bits(bert->forward(ids), logits));
    CHECK(close(twin->forward(ids), logits));
  }
  SECTION("a merged adapter is refused") {
    auto merged = peft::attach(*model, acting("0"));
    merged.merge();
    const auto now = state_of(*model);
    CHECK(contains(
        error_of([&] { peft::clone(*model); }),
        "adapter 'default' is merged; unmerge() it before cloning"));
    CHECK(same_state(state_of(*model), now));
  }
}

TEST_CASE("LibTorch's own clone and load of a plain archive are loud") {
  seed();
  nn::Sequential model = two_layers(), plain = two_layers();
  TemporaryDirectory folder;
  torch::save(plain, folder / "plain.pt");
  const Tensor x = torch::randn({4, 6});
  auto adapter = peft::attach(*model, acting());
  const Tensor y = model->forward(x).detach();
  const auto before = state_of(*model);
  // Containers copy their own list only: what they give is a merged network.
  auto merged = nn::Sequential(
      std::dynamic_pointer_cast<nn::SequentialImpl>(model->clone()));
  CHECK_FALSE(peft::is_adapted(weight_of(merged, 0)));
  CHECK(close(merged->forward(x), y));
  nn::Linear linear(4, 3);
  peft::attach(*linear, acting());
  CHECK(contains(
      error_of([&] { linear->clone(); }), "the same number of child modules"));
  CHECK(same_state(state_of(*model), before));
  CHECK(equal_bits(model->forward(x), y));
  CHECK(error_of([&] { torch::load(model, folder / "plain.pt"); }) != "");

  // What they are replaced by.
  peft::load_base(*model, folder / "plain.pt");
  CHECK(equal_bits(peft::base(weight_of(model, 0)), weight_of(plain, 0)));
  CHECK(close(
      peft::effective(weight_of(model, 0)),
      weight_of(plain, 0) + change(adapter)));
  CHECK_FALSE(weight_of(model, 0).requires_grad());
  adapter.disable();
  CHECK(equal_bits(model->forward(x), plain->forward(x)));
}

TEST_CASE("torch::save and torch::load of an adapted model") {
  seed();
  nn::Sequential model = two_layers(), other = two_layers();
  peft::attach(*model, acting().dropout(0.1), "one");
  auto same = peft::attach(*other, acting().dropout(0.1), "one");
  model->eval();
  other->eval();
  const Tensor x = torch::randn({4, 6});
  CHECK_FALSE(equal_bits(other->forward(x), model->forward(x)));
  TemporaryDirectory folder;
  torch::save(model, folder / "adapted.pt");
  torch::load(other, folder / "adapted.pt");
  CHECK(equal_bits(other->forward(x), model->forward(x)));
  CHECK(peft::is_adapted(weight_of(other, 0)));
  CHECK(equal_bits(
      same.parameters()[0], peft::get_adapter(*model, "one").parameters()[0]));
  same.detach();
  CHECK(equal_bits(
      weight_of(other, 0), peft::base(weight_of(model, 0)).detach()));

  // A merged base beside its adapter would be adapted twice when it is loaded.
  auto merged = peft::get_adapter(*model, "one");
  merged.merge();
  CHECK(contains(
      error_of([&] { torch::save(model, folder / "merged.pt"); }),
      "adapter 'one' is merged, and the model cannot be saved with it"));
  const auto now = state_of(*model);
  CHECK(contains(
      error_of([&] { torch::load(model, folder / "adapted.pt"); }),
      "this weight holds a merged adapter, and unmerge() would undo"));
  CHECK(same_state(state_of(*model), now));

  auto different = two_layers();
  peft::attach(*different, acting("0"), "another");
  CHECK(error_of([&] { torch::load(different, folder / "adapted.pt"); }) != "");
}

TEST_CASE("effective, base, freeze") {
  seed();
  nn::Linear linear(4, 3);
  CHECK(peft::effective(linear->weight).is_same(linear->weight));
  CHECK(peft::base(linear->weight).is_same(linear->weight));
  auto adapter = peft::attach(*linear, acting());
  const Tensor W = peft::base(linear->weight);
  CHECK(W.data_ptr() == linear->weight.data_ptr());
  CHECK_FALSE(peft::is_adapted(W));
  const Tensor value = peft::effective(linear->weight);
  CHECK_FALSE(peft::is_adapted(value));
  CHECK(close(value, W + change(adapter)));
  const auto grads = adapted::gradients(value, adapter.parameters());
  CHECK(grads[0].defined());
  CHECK(grads[1].defined());
  {
    torch::NoGradGuard no_grad;
    W.zero_(); // reaches the model
  }
  CHECK(close(peft::effective(linear->weight), change(adapter)));

  Mlp model;
  auto tuned = peft::attach(model, acting("fc1"));
  model.head->weight.set_requires_grad(true);
  CHECK(peft::trainable_parameters(model).size() == 3);
  peft::freeze(model);
  CHECK(peft::trainable_parameters(model).size() == 2);
  tuned.set_trainable(false);
  CHECK(peft::trainable_parameters(model).empty());
}

TEST_CASE("the summary of a model") {
  Mlp model;
  CHECK(peft::summary(model) == "trainable 419 of 419 (100.00 %)\n");
  auto one = peft::attach(model, LoraOptions(2).targets("fc1"), "one");
  const std::string first =
      "adapter 'one' (LORA): 52 parameters at 1 site\n"
      "  fc1  [16, 10]          lora r=2               52\n";
  CHECK(peft::summary(model) == "trainable 52 of 471 (11.04 %)\n" + first);
  auto two = peft::attach(
      model, peft::BitFitOptions().modules_to_save({"head"}), "two");
  two.set_scale(0.5);
  two.disable();
  const std::string second =
      "adapter 'two' (BITFIT): 67 parameters at 4 sites, disabled, scale 0.5\n"
      "  fc1.bias     [16]              trained bias           16\n"
      "  fc2.bias     [12]              trained bias           12\n"
      "  head.weight  [3, 12]           trained weight           36\n"
      "  head.bias    [3]               trained bias            3\n";
  const auto text = peft::summary(model);
  CHECK(text == "trainable 119 of 471 (25.27 %)\n" + first + second);
  const auto count = peft::count_parameters(model);
  CHECK(count.trainable == 119);
  CHECK(count.total == 471);
  one.merge();
  CHECK(contains(peft::summary(model), "at 1 site, merged\n"));

  nn::Linear big(2000, 1000);
  CHECK(contains(
      peft::summary(*big), "trainable 2,001,000 of 2,001,000 (100.00 %)"));
  peft::attach(*big, LoraOptions(1).targets(""));
  CHECK(contains(peft::summary(*big), "  (root)  "));
}

} // namespace test_attach
