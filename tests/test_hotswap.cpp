/// An adapter's values and settings replaced in place.

#include "golden_case.h"
#include "model_state.h"
#include "test.h"

#include <functional>
#include <regex>
#include <string>
#include <vector>

namespace test_hotswap {

using golden_case::Golden;
using golden_case::near;
using torch::Tensor;
namespace nn = torch::nn;

namespace {

networks::Network network_of(const std::string& name) {
  seed(3);
  return networks::build(name);
}

Tensor input_of(const std::string& name) {
  seed(4);
  if (name == "tokens") {
    return torch::randint(0, 11, {3, 4});
  }
  if (name.rfind("conv2d", 0) == 0) {
    return torch::randn({2, name == "conv2d" ? 3 : 4, 6, 6});
  }
  return name == "attention" ? torch::randn({4, 2, 8}) : torch::randn({6, 10});
}

Tensor run(const networks::Network& network, const std::string& name) {
  const torch::NoGradGuard no_grad;
  return network.run({input_of(name)});
}

/// What a parameter is, beside its values.
struct Identity {
  const void* tensor;
  const void* memory;
  std::vector<int64_t> sizes;
  bool operator==(const Identity& other) const {
    return tensor == other.tensor && memory == other.memory &&
        sizes == other.sizes;
  }
};

std::vector<Identity> identities(const peft::Adapter& adapter) {
  std::vector<Identity> result;
  for (const auto& p : adapter.parameters()) {
    result.push_back({p.unsafeGetTensorImpl(), p.data_ptr(), p.sizes().vec()});
  }
  return result;
}

/// Options, the same with a lower rank or other numbers, and where.
template <class Options>
struct Pair {
  Options options, other;
};

/// Saves an adapter of the second kind and swaps it in for one of the first:
/// the network must then give what it gives with the second loaded.
template <class Options>
void check_swap(
    const std::string& name,
    const std::string& host,
    const Options& first,
    const Options& second,
    bool same_rank) {
  INFO(name);
  const TemporaryDirectory folder;
  Tensor expected;
  {
    const auto network = network_of(host);
    randomise(peft::attach(*network.module, second), 8);
    expected = run(network, host);
    peft::save(peft::get_adapter(*network.module), folder / "second");
  }
  const auto network = network_of(host);
  auto adapter = peft::attach(*network.module, first, "mine");
  randomise(adapter, 9);
  run(network, host);
  REQUIRE_FALSE(torch::allclose(run(network, host), expected, 1e-3, 1e-3));
  const auto before = identities(adapter);
  const auto names = network.module->named_parameters().keys();
  peft::hotswap_adapter(*network.module, folder / "second", "mine");
  CHECK((identities(adapter) == before));
  CHECK(network.module->named_parameters().keys() == names);
  const Tensor y = run(network, host);
  CHECK(close(y, expected));
  if (same_rank) {
    CHECK(equal_bits(y, expected));
  }
  for (const auto& p : adapter.parameters()) {
    CHECK(p.requires_grad());
  }
  // What is saved now says what is in memory.
  peft::save(adapter, folder / "again");
  const auto other = network_of(host);
  peft::load(*other.module, folder / "again");
  CHECK(equal_bits(run(other, host), y));
  adapter.merge();
  CHECK(close(run(network, host), expected, 1e-5, 1e-5));
}

} // namespace

TEST_CASE("A module's name as a pattern matches nothing else", "[hotswap]") {
  const std::string name = "a.b+c[0]($x)|y";
  const std::regex pattern(peft::detail::exact_pattern(name));
  CHECK(std::regex_match(name, pattern));
  CHECK_FALSE(std::regex_match("aXb+c[0]($x)|y", pattern));
  CHECK_FALSE(std::regex_match("y", pattern));
}

TEST_CASE("A hot-swap gives what HF PEFT's gives", "[hotswap]") {
  const Golden golden("hotswap", "adapters");
  const auto folder = [&](const std::string& name) {
    return (golden.folder / name).string();
  };
  const auto network = golden.network();
  auto adapter = peft::load(*network.module, folder("first"));
  const auto start = identities(adapter);
  torch::optim::AdamW optimizer(adapter.parameters(), 1e-2);
  for (const std::string name :
       {"same_rank", "lower", "pattern", "fewer", "first"}) {
    INFO(name);
    peft::hotswap_adapter(*network.module, folder(name));
    CHECK(near(
        network.run(golden.inputs()),
        golden.expected.at("output." + name),
        1e-6));
    CHECK((identities(adapter) == start));
    // What is saved loads as what it is, here and by its config.
    const TemporaryDirectory directory;
    peft::save(adapter, directory / "again");
    const auto other = golden.network();
    peft::load(*other.module, directory / "again");
    CHECK(equal_bits(other.run(golden.inputs()), network.run(golden.inputs())));
    // The optimizer still trains what is there.
    const Tensor before = adapter.parameters()[1].detach().clone();
    optimizer.zero_grad();
    network.run(golden.inputs()).square().mean().backward();
    optimizer.step();
    CHECK_FALSE(torch::equal(adapter.parameters()[1], before));
  }

  peft::hotswap_adapter(*network.module, folder("first"));
  const auto state = state_of(*network.module);
  const auto error = error_of(
      [&] { peft::hotswap_adapter(*network.module, folder("higher")); });
  CHECK(contains(error, "nothing was changed"));
  CHECK(contains(
      error, "fc1.weight: rank 6 does not fit into the memory of rank 4"));
  CHECK(contains(error, "may_grow(true)"));
  CHECK(same_state(state_of(*network.module), state));
  peft::hotswap_adapter(
      *network.module,
      folder("higher"),
      "default",
      peft::HotswapOptions().may_grow(true));
  CHECK(near(
      network.run(golden.inputs()), golden.expected.at("output.higher"), 1e-6));
  for (size_t i = 0; i < start.size(); ++i) { // the handles stay
    CHECK(adapter.parameters()[i].unsafeGetTensorImpl() == start[i].tensor);
  }
}

TEST_CASE("LoRA swaps on every kind of layer", "[hotswap]") {
  using peft::LoraOptions;
  using peft::Targets;
  const auto lora = [](int64_t r, double alpha, const Targets& targets) {
    return LoraOptions(r).alpha(alpha).targets(targets);
  };
  const Targets fc({"fc1", "fc2"});
  check_swap("alpha", "mlp", lora(4, 8, fc), lora(4, 2, fc), true);
  check_swap("lower", "mlp", lora(4, 8, fc), lora(1, 2, fc), false);
  check_swap(
      "rslora",
      "mlp",
      lora(4, 8, fc),
      lora(3, 2, fc).rslora(true).dropout(0.5),
      false);
  check_swap(
      "patterns",
      "mlp",
      lora(4, 8, fc).rank_pattern({{"fc1", 5}}),
      lora(3, 6, fc).rank_pattern({{"fc2", 2}}).alpha_pattern({{"fc1", 1}}),
      false);
  check_swap(
      "bias, head",
      "mlp",
      lora(4, 8, fc).lora_bias(true).modules_to_save({"head"}),
      lora(2, 8, fc).lora_bias(true).modules_to_save({"head"}),
      false);
  check_swap(
      "all biases",
      "mlp",
      lora(4, 8, fc).bias("all"),
      lora(4, 3, fc).bias("all"),
      true);
  check_swap(
      "DoRA",
      "mlp",
      lora(4, 8, fc).dora(true),
      lora(2, 8, fc).dora(true),
      false);
  check_swap(
      "OLoRA",
      "mlp",
      lora(4, 8, fc).init("olora"),
      lora(4, 3, fc).init("olora"),
      true);
  const Targets table({"emb", "fc"});
  check_swap("table", "tokens", lora(4, 8, table), lora(3, 2, table), false);
  check_swap(
      "DoRA's table",
      "tokens",
      lora(4, 8, table).dora(true),
      lora(4, 2, table).dora(true),
      true);
  const Targets convolutions({"conv1", "conv2", "conv3"});
  check_swap(
      "convolutions",
      "conv2d",
      lora(4, 8, convolutions),
      lora(2, 2, convolutions),
      false);
  check_swap(
      "groups",
      "conv2d_groups",
      lora(6, 8, Targets({"conv"})),
      lora(4, 2, Targets({"conv"})),
      false);
  check_swap(
      "attention",
      "attention",
      lora(4, 8, Targets({"attn"})),
      lora(2, 2, Targets({"attn"})),
      false);
}

TEST_CASE("Other methods swap where their shapes agree", "[hotswap]") {
  using namespace peft;
  const Targets fc({"fc1", "fc2"});
  check_swap(
      "LoHa",
      "mlp",
      LoHaOptions(2).alpha(4).targets(fc),
      LoHaOptions(2).alpha(1).targets(fc),
      true);
  check_swap(
      "LoKr",
      "mlp",
      LoKrOptions(2).alpha(4).targets(fc),
      LoKrOptions(2).alpha(1).targets(fc),
      true);
  check_swap(
      "VeRA, another seed",
      "mlp",
      VeraOptions(4).targets(fc),
      VeraOptions(4).projection_prng_key(7).targets(fc),
      true);
  const auto bank =
      VbLoraOptions(2).num_vectors(7).vector_length(2).targets(fc);
  check_swap(
      "VB-LoRA", "mlp", bank, VbLoraOptions(bank).topk(3).dropout(0.1), true);
  check_swap(
      "FourierFT, other places",
      "mlp",
      FourierFtOptions(9).targets(fc),
      FourierFtOptions(9).random_loc_seed(3).scaling(20).targets(fc),
      true);
  check_swap(
      "AdaLoRA",
      "mlp",
      AdaLoraOptions(10).init_r(3).targets(fc),
      AdaLoraOptions(20).init_r(3).alpha(2).targets(fc),
      true);
  check_swap(
      "HRA", "mlp", HraOptions(2).targets(fc), HraOptions(2).targets(fc), true);
  check_swap(
      "(IA)3",
      "mlp",
      Ia3Options().targets(fc).feedforward(Targets({"fc2"})),
      Ia3Options().targets(fc).feedforward(Targets({"fc2"})),
      true);
  check_swap("BitFit", "mlp", BitFitOptions(), BitFitOptions(), true);
}

TEST_CASE("A start is made of the base alone, whoever is merged") {
  using namespace peft;
  const auto pissa =
      LoraOptions(4).init("pissa").targets(Targets({"fc1", "fc2"}));
  const TemporaryDirectory folder;
  Tensor expected;
  {
    const auto network = network_of("mlp");
    randomise(attach(*network.module, pissa), 8);
    save(get_adapter(*network.module), folder / "pissa");
    expected = run(network, "mlp");
  }
  std::filesystem::remove(folder / "pissa/libpeft_training.safetensors");
  const auto network = network_of("mlp");
  attach(*network.module, pissa, "mine");
  auto beside = attach(*network.module, LoraOptions(2).targets({"fc1"}), "b");
  randomise(beside, 9);
  beside.merge();
  hotswap_adapter(*network.module, folder / "pissa", "mine");
  beside.unmerge();
  beside.disable();
  CHECK(close(run(network, "mlp"), expected, 1e-5, 1e-5));
}

TEST_CASE(
    "What cannot be swapped is refused, nothing is changed",
    "[hotswap]") {
  using namespace peft;
  const TemporaryDirectory folder;
  const auto save_as = [&](const std::string& name, auto options) {
    const auto network = network_of("mlp");
    auto adapter = attach(*network.module, options);
    randomise(adapter, 5);
    save(adapter, folder / name);
  };
  const Targets fc({"fc1", "fc2"});
  save_as("lora", LoraOptions(4).targets(fc));
  save_as("wider", LoraOptions(4).targets({"fc1", "fc2", "head"}));
  save_as("one", LoraOptions(4).targets({"fc1"}));
  save_as("high", LoraOptions(5).rank_pattern({{"fc2", 4}}).targets(fc));
  save_as("dora", LoraOptions(4).dora(true).targets(fc));
  save_as("dora_one", LoraOptions(4).dora(true).targets({"fc2"}));
  save_as("loha", LoHaOptions(2).targets(fc));
  save_as("loha_3", LoHaOptions(3).targets(fc));
  save_as("olora", LoraOptions(4).init("olora").targets(fc));
  save_as("heads", LoraOptions(4).targets(fc).modules_to_save({"head"}));

  const auto network = network_of("mlp");
  auto& model = *network.module;
  const auto refused = [&](auto options, // what is there
                           const std::string& name,
                           const std::vector<std::string>& parts) {
    INFO(name);
    auto adapter = attach(model, options);
    randomise(adapter, 6);
    const auto before = state_of(model);
    const auto error = error_of([&] { hotswap_adapter(model, folder / name); });
    INFO(error);
    CHECK_FALSE(error.empty());
    for (const auto& part : parts) {
      CHECK(contains(error, part));
    }
    CHECK(same_state(state_of(model), before));
    const auto* lora =
        std::any_cast<LoraOptions>(&adapter.shared_state()->options);
    CHECK((lora == nullptr || lora->r() == 4));
    adapter.detach();
  };
  const auto lora = LoraOptions(4).targets(fc);
  refused(lora, "none", {"not a folder"});
  refused(lora, "loha", {"holds a LOHA, and adapter 'default' is a LORA"});
  refused(
      lora,
      "dora",
      {"the folder has 'dora r=4' there, the adapter has no such place"});
  refused(
      lora,
      "olora",
      {"fc1.weight: what the two take off at their start is not of one rank"});
  refused(lora, "wider", {"head.weight: the folder has 'lora r=4' there"});
  refused(
      lora,
      "high",
      {"fc1.weight: rank 5 does not fit into the memory of rank 4"});
  refused(
      LoraOptions(4).dora(true).targets(fc),
      "dora_one",
      {"fc1.weight: the folder has nothing there, and 'dora r=4' cannot become "
       "no change"});
  refused(
      LoHaOptions(2).targets(fc),
      "loha_3",
      {"fc1.weight: hada_w1_a has shape [16, 3] where [16, 2] fits"});
  refused(
      LoraOptions(4).targets(fc).modules_to_save({"head"}),
      "lora",
      {"head.weight: the folder has nothing there, and 'trained weight'"});
  refused(HoulsbyOptions(4).targets({"fc1"}), "lora", {"is a HOULSBY"});
  refused(
      Masked(LoraOptions(4).targets(fc)),
      "lora",
      {"holds a LORA, and adapter 'default' is a MASKED"});

  auto adapter = attach(model, lora);
  randomise(adapter, 6);
  adapter.merge();
  const auto before = state_of(model);
  CHECK(contains(
      error_of([&] { hotswap_adapter(model, folder / "lora"); }),
      "adapter 'default' is merged into the base and cannot be swapped; "
      "unmerge() it first"));
  CHECK(same_state(state_of(model), before));
  adapter.unmerge();
  CHECK(contains(
      error_of([&] { hotswap_adapter(model, folder / "lora", "other"); }),
      "no adapter 'other'; it has 'default'"));

  // Places that the folder does not have become no change; others stay.
  const auto beside = attach(model, LoraOptions(2).targets({"fc2"}), "beside");
  randomise(beside, 7);
  const ActiveAdapters both({"default", "beside"});
  const auto* mlp = model.as<networks::Mlp>();
  Tensor beside_alone;
  {
    const ActiveAdapters scope({"beside"});
    beside_alone = effective(mlp->fc2->weight).detach();
  }
  hotswap_adapter(model, folder / "one");
  CHECK(equal_bits(effective(mlp->fc2->weight).detach(), beside_alone));
  CHECK_FALSE(
      torch::equal(effective(mlp->fc1->weight), base(mlp->fc1->weight)));
}

} // namespace test_hotswap
