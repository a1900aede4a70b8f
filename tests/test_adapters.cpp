/// Several adapters on one model: what is done with one changes no other.

#include "model_state.h"
#include "networks.h"
#include "test.h"

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace test_adapters {

using torch::Tensor;
using Names = std::vector<std::string>;
namespace nn = torch::nn;

namespace {

using Attach =
    std::function<peft::Adapter(nn::Module&, const std::string& name)>;

struct Method {
  std::string name;
  Attach attach;
  double size = 0.3; // of the random values
};

template <class Options>
Attach with(Options options) {
  return [options](nn::Module& model, const std::string& name) {
    return peft::attach(model, options, name);
  };
}

/// HF's tuners and BitFit on two layers of the small network.
std::vector<Method> methods() {
  const peft::Targets layers({"fc1", "fc2"});
  using namespace peft;
  return {
      {"LoRA", with(LoraOptions(3).alpha(6).targets(layers))},
      {"rsLoRA with bias",
       with(LoraOptions(2).rslora(true).lora_bias(true).targets(layers))},
      {"DoRA", with(LoraOptions(3).dora(true).targets(layers))},
      {"AdaLoRA", with(AdaLoraOptions(10).init_r(3).targets(layers))},
      {"VeRA", with(VeraOptions(4).targets(layers))},
      {"VB-LoRA",
       with(VbLoraOptions(2).num_vectors(7).vector_length(2).targets(layers))},
      {"LoHa", with(LoHaOptions(2).alpha(4).targets(layers))},
      {"LoKr", with(LoKrOptions(2).targets(layers))},
      {"HRA", with(HraOptions(2).targets(layers))},
      {"OFT", with(OftOptions().oft_block_size(2).targets(layers)), 0.1},
      {"BOFT", with(BoftOptions().boft_block_size(2).targets(layers))},
      {"FourierFT", with(FourierFtOptions(20).targets(layers))},
      {"(IA)3",
       with(Ia3Options().targets(layers).feedforward(Targets({"fc2"})))},
      {"BEFT", with(BeftOptions().targets(layers))},
      {"BitFit", with(BitFitOptions().modules_to_save({"head"}))},
  };
}

networks::Network mlp() {
  seed(3);
  return networks::build("mlp");
}

Tensor batch() {
  seed(4);
  return torch::randn({6, 10});
}

void fill(const peft::Adapter& adapter, uint64_t number, double size = 0.3) {
  torch::NoGradGuard no_grad;
  seed(number);
  for (auto& p : adapter.parameters()) {
    p.normal_(0, size);
  }
}

/// The output with these adapters alone.
Tensor under(const networks::Network& network, const Names& names) {
  const torch::NoGradGuard no_grad;
  const peft::ActiveAdapters scope(names);
  return network.run({batch()});
}

Tensor now(const networks::Network& network) {
  const torch::NoGradGuard no_grad;
  return network.run({batch()});
}

bool trains(const peft::Adapter& adapter) {
  bool all = true;
  for (const auto& p : adapter.parameters()) {
    all = all && p.requires_grad();
  }
  return all;
}

bool frozen(const peft::Adapter& adapter) {
  bool none = true;
  for (const auto& p : adapter.parameters()) {
    none = none && !p.requires_grad();
  }
  return none;
}

Tensor weight(nn::Module& model) {
  return model.as<networks::Mlp>()->fc1->weight;
}

} // namespace

TEST_CASE("set_adapter: those named act and train, added up", "[adapters]") {
  const auto network = mlp();
  auto& model = *network.module;
  const Tensor base = now(network);
  const peft::LoraOptions options =
      peft::LoraOptions(2).targets({"fc1", "fc2"});
  auto a = peft::attach(model, options, "a");
  auto b = peft::attach(model, options, "b");
  auto c = peft::attach(model, options, "c");
  for (auto* adapter : {&a, &b, &c}) {
    randomise(*adapter, static_cast<uint64_t>(adapter->name()[0]));
  }
  CHECK(peft::active_adapters(model) == Names{"a", "b", "c"});

  peft::set_adapter(model, "b");
  CHECK(peft::active_adapters(model) == Names{"b"});
  CHECK(equal_bits(now(network), under(network, {"b"})));
  CHECK(trains(b));
  CHECK(frozen(a));
  CHECK(frozen(c));

  const auto change = [&](const Names& names) {
    const torch::NoGradGuard no_grad;
    const peft::ActiveAdapters scope(names);
    return peft::effective(weight(model)) - peft::base(weight(model));
  };
  peft::set_adapter(model, {"c", "a"});
  CHECK(peft::active_adapters(model) == Names{"a", "c"}); // as attached
  CHECK(equal_bits(now(network), under(network, {"a", "c"})));
  CHECK(close(
      peft::effective(weight(model)) - peft::base(weight(model)),
      change({"a"}) + change({"c"})));
  CHECK(trains(a));
  CHECK(frozen(b));
  CHECK(trains(c));

  peft::set_adapter(model, Names{"a", "b", "c"}, /*inference_mode=*/true);
  CHECK(peft::active_adapters(model).size() == 3);
  CHECK(frozen(a));
  CHECK(frozen(b));
  CHECK(frozen(c));
  for (const auto& p : model.parameters()) {
    CHECK_FALSE(p.requires_grad());
  }

  peft::set_adapter(model, {});
  CHECK(peft::active_adapters(model).empty());
  CHECK(equal_bits(now(network), base));

  peft::set_adapter(model, "a");
  const auto before = state_of(model);
  const auto error = error_of([&] { peft::set_adapter(model, {"b", "d"}); });
  CHECK(contains(error, "no adapter 'd'; it has 'a', 'b', 'c'"));
  CHECK(same_state(state_of(model), before));
  CHECK(peft::active_adapters(model) == Names{"a"});

  // A merged one cannot stop, but may stay.
  a.merge();
  CHECK(contains(
      error_of([&] { peft::set_adapter(model, "b"); }),
      "adapter 'a' is merged into the base and would have to stop"));
  CHECK(peft::active_adapters(model) == Names{"a"});
  peft::set_adapter(model, {"a", "b"}, /*inference_mode=*/true);
  CHECK(close(now(network), [&] {
    a.unmerge();
    return under(network, {"a", "b"});
  }()));
}

TEST_CASE("Only those that are set move in training", "[adapters]") {
  for (const auto& method : methods()) {
    INFO(method.name);
    const auto network = mlp();
    auto& model = *network.module;
    auto a = method.attach(model, "a"), b = method.attach(model, "b");
    fill(a, 1, method.size);
    fill(b, 2, method.size);
    torch::optim::AdamW optimizer(
        model.parameters(), torch::optim::AdamWOptions(1e-2).weight_decay(0.1));
    for (const std::string name : {"b", "a"}) {
      peft::set_adapter(model, name);
      const auto other = peft::get_adapter(model, name == "a" ? "b" : "a");
      const Tensor own = under(network, {name});
      std::vector<Tensor> before;
      for (const auto& p : other.parameters()) {
        before.push_back(p.detach().clone());
      }
      for (int step = 0; step < 2; ++step) {
        optimizer.zero_grad();
        network.run({batch()}).square().mean().backward();
        optimizer.step();
      }
      CHECK_FALSE(torch::equal(under(network, {name}), own));
      for (size_t i = 0; i < before.size(); ++i) {
        CHECK(equal_bits(other.parameters()[i].detach(), before[i]));
      }
    }
  }
}

TEST_CASE(
    "Adding, choosing, renaming, deleting one changes no other",
    "[adapters]") {
  for (const auto& method : methods()) {
    INFO(method.name);
    const auto network = mlp();
    auto& model = *network.module;
    const auto plain = state_of(model);
    const Tensor base = now(network);
    auto a = method.attach(model, "a");
    fill(a, 1, method.size);
    under(network, {"a"}); // what may be kept between calls is kept now
    const Tensor of_a = under(network, {"a"});

    auto b = method.attach(model, "ab");
    CHECK(equal_bits(under(network, {"a"}), of_a));
    fill(b, 2, method.size);
    under(network, {"ab"});
    const Tensor of_b = under(network, {"ab"});
    CHECK_FALSE(torch::allclose(of_a, of_b, 1e-3, 1e-3));
    const auto check = [&](const std::string& name) {
      CHECK(equal_bits(under(network, {"a"}), of_a));
      CHECK(equal_bits(under(network, {name}), of_b));
      CHECK(equal_bits(under(network, {}), base));
    };
    check("ab");
    peft::set_adapter(model, "ab");
    check("ab");
    CHECK(equal_bits(now(network), of_b));
    peft::set_adapter(model, "a");
    CHECK(equal_bits(now(network), of_a));
    peft::rename_adapter(model, "ab", "b");
    check("b");
    auto c = method.attach(model, "c");
    fill(c, 3, method.size);
    check("b");
    a.set_scale(0.5);
    CHECK(equal_bits(under(network, {"b"}), of_b));
    a.set_scale(1);
    peft::delete_adapter(model, "c");
    check("b");
    peft::delete_adapter(model, "a"); // the first one
    CHECK(equal_bits(under(network, {"b"}), of_b));
    CHECK(equal_bits(under(network, {"a"}), base));
    peft::delete_adapter(model, "b");
    CHECK(equal_bits(now(network), base));
    CHECK(same_state(state_of(model), plain));
  }
}

TEST_CASE("An adapter's name changes nothing", "[adapters]") {
  // Parts of each other, of modules, of methods, of file keys.
  const Names names{
      "a",
      "aa",
      "fc",
      "fc1",
      "fc2",
      "head",
      "lora",
      "lora_A",
      "weight",
      "peft",
      "default",
      "base_model",
      "model",
      "0"};
  const peft::LoraOptions options =
      peft::LoraOptions(2).targets({"fc1"}).modules_to_save({"head"});
  std::vector<Tensor> alone;
  for (size_t i = 0; i < names.size(); ++i) {
    const auto network = mlp();
    fill(peft::attach(*network.module, options, "x"), i);
    alone.push_back(now(network));
  }
  const auto network = mlp();
  for (size_t i = 0; i < names.size(); ++i) {
    fill(peft::attach(*network.module, options, names[i]), i);
  }
  for (size_t i = 0; i < names.size(); ++i) {
    INFO(names[i]);
    CHECK(equal_bits(under(network, {names[i]}), alone[i]));
    peft::set_adapter(*network.module, names[i]);
    CHECK(equal_bits(now(network), alone[i]));
  }
  const TemporaryDirectory folder;
  peft::save_adapters(*network.module, folder.path().string());
  const auto other = mlp();
  const auto loaded =
      peft::load_adapters(*other.module, folder.path().string());
  CHECK(loaded.size() == names.size());
  CHECK(peft::active_adapters(*other.module) == Names{"default"});
  for (size_t i = 0; i < names.size(); ++i) {
    INFO(names[i]);
    CHECK(equal_bits(under(other, {names[i]}), alone[i]));
  }
  for (size_t i = 0; i < names.size(); ++i) { // deleted by its whole name
    peft::delete_adapter(*network.module, names[i]);
    for (size_t k = i + 1; k < names.size(); ++k) {
      CHECK(equal_bits(under(network, {names[k]}), alone[k]));
    }
  }
}

TEST_CASE("rename_adapter: names, tensors, order", "[adapters]") {
  const auto network = mlp();
  auto& model = *network.module;
  const peft::LoraOptions options = peft::LoraOptions(2).targets({"fc1"});
  auto a = peft::attach(model, options, "a");
  auto b = peft::attach(model, options, "b");
  randomise(a, 1);
  randomise(b, 2);
  const auto before = model.named_parameters();
  const Tensor of_a = under(network, {"a"});
  peft::rename_adapter(model, "a", "new");
  CHECK(a.name() == "new"); // handles follow
  CHECK(peft::get_adapter(model, "new").shared_state() == a.shared_state());
  CHECK(equal_bits(under(network, {"new"}), of_a));
  CHECK(equal_bits(under(network, {"a"}), under(network, {}))); // nobody
  {
    const torch::NoGradGuard no_grad;
    const peft::BatchAdapters rows(
        {"new", "new", "b", "b", "__base__", "__base__"});
    CHECK(close(network.run({batch()}).slice(0, 0, 2), of_a.slice(0, 0, 2)));
  }
  const auto after = model.named_parameters();
  REQUIRE(after.size() == before.size());
  for (size_t i = 0; i < after.size(); ++i) { // the same tensors in order
    CHECK(after[i].value().is_same(before[i].value()));
    const std::string start = "peft.a.";
    const auto& key = before[i].key();
    CHECK(
        after[i].key() ==
        (key.rfind(start, 0) == 0 ? "peft.new." + key.substr(start.size())
                                  : key));
  }
  peft::rename_adapter(model, "new", "new"); // itself

  const auto state = state_of(model);
  for (const auto& [name, part] : std::vector<std::pair<Names, std::string>>{
           {{"new", "b"}, "already has an adapter named 'b'"},
           {{"a", "c"}, "no adapter 'a'; it has 'new', 'b'"},
           {{"b", "x.y"}, "must not contain a dot"},
           {{"b", ""}, "must not be empty"},
           {{"b", "__base__"}, "stands for the base"}}) {
    const auto error = error_of(
        [&, &pair = name] { peft::rename_adapter(model, pair[0], pair[1]); });
    INFO(error);
    CHECK(contains(error, part));
    CHECK(same_state(state_of(model), state));
  }
  CHECK(contains(
      error_of([&] { peft::attach(model, options, "v1.0"); }),
      "must not contain a dot"));

  // Files and copies go by the new name.
  const TemporaryDirectory folder;
  peft::save_adapters(model, folder.path().string());
  CHECK(std::filesystem::exists(folder / "new/adapter_config.json"));
  CHECK_FALSE(std::filesystem::exists(folder / "a"));
  a.merge();
  peft::rename_adapter(model, "new", "merged"); // a name is no weight
  a.unmerge();
  CHECK(equal_bits(under(network, {"merged"}), of_a));

  // An adapter of a module inside may have a name that the outer one wants.
  auto outer = std::make_shared<nn::Module>();
  outer->register_module("net", network.module);
  auto around =
      peft::attach(*outer, peft::LoraOptions(2).targets({"fc1"}), "around");
  CHECK(contains(
      error_of([&] { peft::rename_adapter(model, "b", "around"); }),
      "already has an adapter named 'around'"));
}

TEST_CASE("delete_adapter frees what the adapter holds", "[adapters]") {
  for (const auto& method : methods()) {
    INFO(method.name);
    const auto network = mlp();
    auto& model = *network.module;
    auto kept = method.attach(model, "kept");
    auto gone = method.attach(model, "gone"); // the handle stays
    under(network, {"kept", "gone"});
    under(network, {"kept", "gone"});
    std::vector<c10::weak_intrusive_ptr<c10::StorageImpl>> memory;
    std::vector<std::weak_ptr<peft::Delta>> deltas;
    for (const auto& p : gone.parameters()) {
      memory.push_back(p.storage().getWeakStorageImpl());
    }
    for (const auto& site : gone.shared_state()->sites) {
      deltas.emplace_back(site.delta);
    }
    REQUIRE_FALSE(deltas.empty());
    peft::delete_adapter(model, "gone");
    for (const auto& delta : deltas) {
      CHECK(delta.expired());
    }
    for (const auto& storage : memory) {
      CHECK(storage.expired());
    }
    CHECK(
        contains(error_of([&] { gone.parameters(); }), "'gone' was detached"));
    CHECK(contains(
        error_of([&] { peft::delete_adapter(model, "gone"); }),
        "no adapter 'gone'; it has 'kept'"));

    if (method.name != "BEFT") { // merges only beside a bias
      kept.merge();
    } else {
      continue;
    }
    const auto before = state_of(model);
    CHECK(contains(
        error_of([&] { peft::delete_adapter(model, "kept"); }),
        "adapter 'kept' is merged into the base and cannot be deleted; "
        "unmerge() it first"));
    CHECK(same_state(state_of(model), before));
    kept.unmerge();
    peft::delete_adapter(model, "kept");
    CHECK(peft::adapters(model).empty());
  }
}

TEST_CASE("Each adapter has a scale of its own", "[adapters]") {
  const auto network = mlp();
  auto& model = *network.module;
  const peft::LoraOptions options = peft::LoraOptions(2).targets({"fc1"});
  std::vector<Tensor> change;
  for (const std::string name : {"a", "b", "c"}) {
    auto adapter = peft::attach(model, options, name);
    randomise(adapter, static_cast<uint64_t>(name[0]));
    const peft::ActiveAdapters scope({name});
    change.push_back(
        (peft::effective(weight(model)) - peft::base(weight(model))).detach());
  }
  peft::get_adapter(model, "a").set_scale(0.5);
  peft::get_adapter(model, "b").set_scale(-2);
  const Tensor expected =
      peft::base(weight(model)) + 0.5 * change[0] - 2 * change[1] + change[2];
  CHECK(close(peft::effective(weight(model)), expected));
  peft::set_adapter(model, {"a", "b"});
  CHECK(peft::get_adapter(model, "b").scale() == -2); // the choice keeps it
  CHECK(close(peft::effective(weight(model)), expected - change[2]));
  peft::rename_adapter(model, "b", "d");
  CHECK(peft::get_adapter(model, "d").scale() == -2);
  const torch::NoGradGuard no_grad;
  const peft::BatchAdapters rows({"a", "a", "d", "d", "c", "__base__"});
  const Tensor x = batch();
  auto layer = model.as<networks::Mlp>()->fc1;
  const Tensor y = layer->forward(x);
  const Tensor W = peft::base(layer->weight), bias = layer->bias;
  for (int64_t row = 0; row < 6; ++row) {
    const Tensor delta = row < 2 ? 0.5 * change[0]
        : row < 4                ? -2 * change[1]
        : row < 5                ? change[2]
                                 : torch::zeros_like(W);
    CHECK(close(y[row], torch::linear(x[row], W + delta, bias)));
  }
}

TEST_CASE(
    "Threads with adapters of different methods get what one thread gets",
    "[adapters]") {
  const auto network = mlp();
  auto& model = *network.module;
  Names names{"__base__"};
  for (const auto& method : methods()) {
    names.push_back("m" + std::to_string(names.size()));
    fill(method.attach(model, names.back()), names.size(), method.size);
  }
  peft::set_adapter(model, names[1], /*inference_mode=*/true);
  const auto before = state_of(model);
  const auto choice = [](const std::string& name) {
    return name == "__base__" ? Names{} : Names{name};
  };
  std::vector<Tensor> single;
  for (const auto& name : names) {
    single.push_back(under(network, choice(name)));
  }
  // Each thread takes another order, so that all meet all.
  std::vector<std::string> wrong(8);
  std::vector<std::thread> threads;
  const Tensor x = batch();
  for (size_t t = 0; t < wrong.size(); ++t) {
    threads.emplace_back([&, t] {
      const torch::NoGradGuard no_grad;
      for (size_t i = 0; i < 3 * names.size(); ++i) {
        const size_t which = (i * (t + 1) + t) % names.size();
        const peft::ActiveAdapters scope(choice(names[which]));
        const auto same = equal_bits(network.run({x}), single[which]);
        if (!same) {
          wrong[t] += names[which] + ": " + same.message + "\n";
        }
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  for (const auto& text : wrong) {
    CHECK(text == "");
  }
  CHECK(same_state(state_of(model), before));

  // And so do the rows of mixed batches.
  std::vector<std::string> wrong_rows(4);
  threads.clear();
  for (size_t t = 0; t < wrong_rows.size(); ++t) {
    threads.emplace_back([&, t] {
      const torch::NoGradGuard no_grad;
      for (size_t i = 0; i < names.size(); ++i) {
        Names rows;
        for (size_t row = 0; row < 6; ++row) {
          rows.push_back(names[(i + row * (t + 1)) % names.size()]);
        }
        const peft::BatchAdapters scope(rows);
        const Tensor y = network.run({x});
        for (size_t row = 0; row < 6; ++row) {
          const auto which = (i + row * (t + 1)) % names.size();
          const auto r = static_cast<int64_t>(row);
          const auto same = close(y[r], single[which][r]);
          if (!same) {
            wrong_rows[t] += rows[row] + ": " + same.message + "\n";
          }
        }
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  for (const auto& text : wrong_rows) {
    CHECK(text == "");
  }
}

} // namespace test_adapters
