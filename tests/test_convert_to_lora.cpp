// convert_to_lora: exact where the rank suffices, for every method that can be
// merged; the best of its rank elsewhere; refused with the method's reason.

#include "test.h"

#include "golden_case.h"

#include <peft/io/save_as_lora.h>

namespace test_convert_to_lora {

using namespace golden_case;
using peft::ConvertToLoraOptions;

namespace {

using Names = std::vector<std::string>;

/// Every effective weight the same under both adapters, relative to the largest
/// change.
void check_same_weights(
    torch::nn::Module& module,
    const std::string& one,
    const std::string& other,
    double relative) {
  const auto base = weights_under(module, {});
  const auto want = weights_under(module, {one});
  const auto got = weights_under(module, {other});
  double largest = 0.0;
  for (const auto& [name, value] : want) {
    largest =
        std::max(largest, (value - base.at(name)).abs().max().item<double>());
  }
  REQUIRE(largest > 1e-3);
  for (const auto& [name, value] : want) {
    INFO(name);
    REQUIRE(close(got.at(name), value, 0, relative * largest));
  }
}

void move_away(const peft::Adapter& adapter, double size = 0.3) {
  const torch::NoGradGuard no_grad;
  for (auto& p : adapter.parameters()) {
    p.add_(size * torch::randn_like(p));
  }
}

networks::Network network_of(
    const std::string& name,
    torch::Dtype dtype = torch::kDouble) {
  seed(1);
  auto network = networks::build(name);
  network.module->to(dtype);
  network.module->eval();
  return network;
}

template <class Options>
peft::Adapter
moved(torch::nn::Module& module, const Options& options, double size = 0.3) {
  seed(2);
  auto adapter = peft::attach(module, options);
  move_away(adapter, size);
  return adapter;
}

const peft::Targets kFc{"fc1", "fc2"};

} // namespace

TEST_CASE("convert: every method that merges, exactly at full rank") {
  using Attach = std::function<peft::Adapter(torch::nn::Module&)>;
  struct Row {
    std::string name, network;
    Attach attach;
  };
  const auto row = [](const std::string& name,
                      const std::string& network,
                      auto options,
                      double size = 0.3) {
    return Row{name, network, [=](torch::nn::Module& m) {
                 return moved(m, options, size);
               }};
  };
  using peft::LoraOptions;
  const std::vector<Row> rows{
      row("LoRA", "mlp", LoraOptions(3).targets(kFc)),
      row("rsLoRA, bias",
          "mlp",
          LoraOptions(3).targets(kFc).rslora(true).bias("all")),
      row("PiSSA", "mlp", LoraOptions(3).targets(kFc).init("pissa")),
      row("lora_bias", "mlp", LoraOptions(3).targets(kFc).lora_bias(true)),
      row("LoRA, head",
          "mlp",
          LoraOptions(3).targets({"fc1"}).modules_to_save({"head"})),
      row("DoRA", "mlp", LoraOptions(3).targets(kFc).dora(true)),
      row("LoRA", "conv2d", LoraOptions(3).targets({"conv1", "conv2"})),
      row("DoRA", "conv2d", LoraOptions(3).targets({"conv2"}).dora(true)),
      row("LoRA", "conv2d_groups", LoraOptions(4).targets({"conv"})),
      row("LoRA", "conv3d", LoraOptions(2).targets({"conv"})),
      row("LoRA", "tokens", LoraOptions(2).targets({"emb", "fc"})),
      row("LoRA", "gpt2_mlp", LoraOptions(2).targets({"c_fc", "c_proj"})),
      row("LoRA", "attention", LoraOptions(2).targets({"attn"})),
      row("q and v", "attention", LoraOptions(2)),
      row("AdaLoRA", "mlp", peft::AdaLoraOptions(10).init_r(3).targets(kFc)),
      row("VeRA", "mlp", peft::VeraOptions(6).targets(kFc)),
      row("VB-LoRA",
          "mlp",
          peft::VbLoraOptions(3).num_vectors(7).vector_length(2).targets(kFc)),
      row("LoHa", "conv2d", peft::LoHaOptions(2).targets({"conv1"})),
      row("LoKr", "mlp", peft::LoKrOptions(2).targets(kFc)),
      row("LoKr", "conv2d", peft::LoKrOptions(2).targets({"conv2"})),
      row("HRA", "mlp", peft::HraOptions(3).targets(kFc)),
      row("OFT", "mlp", peft::OftOptions().oft_block_size(2).targets(kFc), 0.1),
      row("BOFT", "mlp", peft::BoftOptions().boft_block_size(2).targets(kFc)),
      row("FourierFT",
          "mlp",
          peft::FourierFtOptions().n_frequency(20).targets(kFc)),
      row("(IA)3", "mlp", peft::Ia3Options().targets(kFc).feedforward({"fc2"})),
      row("(IA)3", "gpt2_mlp", peft::Ia3Options().targets({"c_fc"})),
      row("KronA", "mlp", peft::KronaOptions(2, 2).targets(kFc)),
      row("trainable tokens",
          "tokens",
          peft::TrainableTokensOptions({1, 7}).targets({"emb"})),
      row("full", "mlp", peft::FullTuningOptions()),
  };
  for (const auto& r : rows) {
    DYNAMIC_SECTION(r.name << " on " << r.network) {
      auto network = network_of(r.network);
      auto& module = *network.module;
      auto adapter = r.attach(module);
      const auto result =
          peft::convert_to_lora(adapter, ConvertToLoraOptions(64));
      REQUIRE(result.adapter.name() == "default_lora");
      REQUIRE(result.adapter.method() == "LORA");
      REQUIRE_FALSE(result.adapter.is_enabled());
      REQUIRE(adapter.is_enabled());
      REQUIRE(std::abs(result.energy - 1.0) < 1e-12);
      check_same_weights(module, "default", "default_lora", 1e-12);

      // It goes into files and comes back, and merges to the same.
      const TemporaryDirectory directory;
      peft::save(result.adapter, directory / "out");
      auto other = network_of(r.network);
      peft::load_base(*other.module, [&] {
        peft::save_safetensors(
            weights_under(module, {}), directory / "base.safetensors");
        return directory / "base.safetensors";
      }());
      peft::load(*other.module, directory / "out", "default_lora");
      const auto want = weights_under(module, {"default_lora"});
      for (const auto& [name, value] :
           weights_under(*other.module, {"default_lora"})) {
        INFO(name);
        REQUIRE(close(value, want.at(name), 0, 1e-12));
      }
    }
  }
}

TEST_CASE("convert: LoRA of rank r to LoRA of rank r, in float32") {
  auto network = network_of("mlp", torch::kFloat);
  auto adapter =
      moved(*network.module, peft::LoraOptions(4).alpha(7).targets(kFc));
  const auto result =
      peft::convert_to_lora(adapter, ConvertToLoraOptions(4).name("again"));
  REQUIRE(result.sites.size() == 2);
  for (const auto& site : result.sites) {
    REQUIRE(site.rank == 4);
    REQUIRE(std::abs(site.energy - 1.0) < 1e-12);
  }
  check_same_weights(*network.module, "default", "again", 1e-6);
  const auto x = torch::randn({5, 10});
  const auto run = [&](const std::string& name) {
    const peft::ActiveAdapters scope({name});
    return network.run({x}).detach();
  };
  REQUIRE(near(run("again"), run("default"), 1e-6));
}

TEST_CASE("convert: what is lost is the energy that is left out") {
  auto network = network_of("mlp");
  auto& module = *network.module;
  auto adapter = moved(module, peft::LoKrOptions(2).targets(kFc));
  const auto base = weights_under(module, {});
  const auto want = weights_under(module, {"default"});
  double all = 0.0, lost = 0.0;
  const auto result = peft::convert_to_lora(adapter, ConvertToLoraOptions(3));
  const auto got = weights_under(module, {"default_lora"});
  for (const auto& site : result.sites) {
    const std::string key = site.name + ".weight";
    const Tensor change = want.at(key) - base.at(key);
    const double total = change.square().sum().item<double>();
    const double missed =
        (want.at(key) - got.at(key)).square().sum().item<double>();
    INFO(site.name);
    REQUIRE(site.rank == 3);
    REQUIRE(std::abs(site.energy - (1.0 - missed / total)) < 1e-10);
    // No matrix of rank 3 is nearer.
    const auto S = torch::linalg_svdvals(change);
    REQUIRE(
        std::abs(missed - S.slice(0, 3).square().sum().item<double>()) <
        1e-10 * total);
    all += total;
    lost += missed;
  }
  REQUIRE(lost > 0.01 * all);
  REQUIRE(std::abs(result.energy - (1.0 - lost / all)) < 1e-10);
  REQUIRE(contains(result.report(), "fc1"));
  REQUIRE(contains(result.report(), "total"));
}

TEST_CASE("convert: the least rank that keeps a share") {
  auto network = network_of("mlp");
  auto& module = *network.module;
  auto adapter = moved(module, peft::LoKrOptions(2).targets(kFc));
  const auto base = weights_under(module, {});
  const auto want = weights_under(module, {"default"});
  for (const double share : {0.3, 0.9, 0.999}) {
    auto result = peft::convert_to_lora(
        adapter, ConvertToLoraOptions().energy(share).name("share"));
    for (const auto& site : result.sites) {
      const std::string key = site.name + ".weight";
      const auto energy =
          torch::linalg_svdvals(want.at(key) - base.at(key)).square().cumsum(0);
      const double total = energy[-1].item<double>();
      int64_t rank = 1;
      while (energy[rank - 1].item<double>() < share * total) {
        ++rank;
      }
      INFO(site.name << " " << share);
      REQUIRE(site.rank == rank);
      REQUIRE(site.energy >= share);
    }
    const TemporaryDirectory directory;
    peft::save(result.adapter, directory / "out");
    auto other = network_of("mlp");
    const auto again = peft::load(*other.module, directory / "out");
    for (const auto& item : result.adapter.named_parameters()) {
      INFO(item.key());
      REQUIRE(equal_bits(
          again.named_parameters()[item.key()].detach(),
          item.value().detach()));
    }
    result.adapter.detach();
  }
}

TEST_CASE("convert: biases, heads and norms come along") {
  SECTION("biases of the converted layers only") {
    auto network = network_of("mlp");
    auto adapter = moved(*network.module, peft::Ia3Options().targets({"fc1"}));
    const auto lora =
        peft::convert_to_lora(adapter, ConvertToLoraOptions(16)).adapter;
    REQUIRE(lora.sites().size() == 2);
    check_same_weights(*network.module, "default", "default_lora", 1e-12);
  }
  SECTION("a norm is kept as a module to save") {
    auto network = network_of("bert");
    auto adapter = moved(
        *network.module,
        peft::FullTuningOptions().targets({"encoder.layer.0"}));
    const auto lora =
        peft::convert_to_lora(adapter, ConvertToLoraOptions(64)).adapter;
    check_same_weights(*network.module, "default", "default_lora", 1e-12);
    const TemporaryDirectory directory;
    peft::save(lora, directory / "out");
    const auto config = read_json_file(directory / "out/adapter_config.json");
    REQUIRE(config.at("modules_to_save").size() == 2);
  }
}

TEST_CASE("convert: half precision and other adapters beside it") {
  auto network = network_of("mlp", torch::kBFloat16);
  auto& module = *network.module;
  seed(3);
  auto beside = peft::attach(
      module, peft::LoraOptions(2).targets({"fc1"}).init("random"), "beside");
  auto adapter =
      moved(module, peft::OftOptions().oft_block_size(2).targets(kFc), 0.1);
  const auto lora =
      peft::convert_to_lora(adapter, ConvertToLoraOptions(16)).adapter;
  for (const auto& p : lora.parameters()) {
    REQUIRE(p.scalar_type() == torch::kFloat);
  }
  // bfloat16 has 8 bits: the two round to neighbours at most.
  const auto want = weights_under(module, {"default"});
  for (const auto& [name, value] : weights_under(module, {"default_lora"})) {
    INFO(name);
    REQUIRE(close(value, want.at(name), 8e-3, 1e-6));
  }
}

TEST_CASE("convert: saved as LoRA, the model is as it was") {
  auto network = network_of("mlp", torch::kFloat);
  auto adapter = moved(*network.module, peft::LoHaOptions(2).targets(kFc));
  const TemporaryDirectory directory;
  const auto result =
      peft::save_as_lora(adapter, directory / "out", ConvertToLoraOptions(16));
  REQUIRE(peft::adapters(*network.module).size() == 1);
  REQUIRE(result.sites.size() == 2);
  const auto loaded = peft::load(*network.module, directory / "out", "as_lora");
  REQUIRE(loaded.method() == "LORA");
  check_same_weights(*network.module, "default", "as_lora", 1e-6);

  std::ofstream(directory / "file") << "no folder";
  REQUIRE_FALSE(error_of([&] {
                  peft::save_as_lora(adapter, directory / "file");
                }).empty());
  REQUIRE(peft::adapters(*network.module).size() == 2);
}

TEST_CASE("convert: a model in training draws nothing") {
  const auto check = [](const auto& options) {
    auto network = network_of("mlp");
    const auto adapter = moved(*network.module, options);
    network.module->train();
    const auto made =
        peft::convert_to_lora(adapter, ConvertToLoraOptions(16)).adapter;
    network.module->eval();
    check_same_weights(*network.module, "default", made.name(), 1e-11);
  };
  check(
      peft::LoHaOptions(2).rank_dropout(0.5).module_dropout(0.5).targets(kFc));
  check(peft::LoKrOptions(2).rank_dropout(0.5).targets(kFc));
  check(peft::OftOptions().oft_block_size(2).module_dropout(0.5).targets(kFc));
  check(peft::BoftOptions().boft_block_size(2).dropout(0.9).targets(kFc));
}

TEST_CASE("convert: what a LoRA cannot hold is refused with the reason") {
  const auto error = [](torch::nn::Module& module,
                        const peft::Adapter& adapter,
                        const ConvertToLoraOptions& options = {}) {
    const auto before = peft::adapters(module).size();
    const auto text =
        error_of([&] { peft::convert_to_lora(adapter, options); });
    REQUIRE(peft::adapters(module).size() == before);
    INFO(text);
    return text;
  };
  {
    auto network = network_of("mlp");
    auto& module = *network.module;
    auto adapter = peft::attach(module, peft::LoraOptions(2).targets(kFc));
    REQUIRE(contains(
        error(module, adapter, ConvertToLoraOptions(0)),
        "the rank must be positive, got 0"));
    for (const double share : {0.0, 1.5}) {
      REQUIRE(contains(
          error(module, adapter, ConvertToLoraOptions().energy(share)),
          "energy is a share in (0, 1]"));
    }
    REQUIRE(contains(
        error(module, adapter, ConvertToLoraOptions().name("default")),
        "already has an adapter named 'default'"));
    {
      const torch::NoGradGuard no_grad;
      adapter.parameters()[1].fill_(std::nan(""));
    }
    REQUIRE(contains(error(module, adapter), "not finite"));
    adapter.detach();

    auto bitfit = peft::attach(module, peft::BitFitOptions());
    REQUIRE(contains(error(module, bitfit), "changes no matrix"));
    bitfit.detach();

    auto merged = moved(module, peft::LoraOptions(2).targets(kFc));
    merged.merge();
    REQUIRE(contains(error(module, merged), "is merged; unmerge() it"));
  }
  {
    auto network = network_of("bert");
    auto& module = *network.module;
    auto adapter = peft::attach(module, peft::PfeifferOptions());
    REQUIRE(contains(error(module, adapter), "cannot be converted to LoRA at"));
    adapter.detach();
    adapter = peft::attach(module, peft::PrefixOptions(3));
    REQUIRE(contains(error(module, adapter), "cannot be converted to LoRA at"));
  }
  {
    auto network = network_of("attention");
    auto adapter =
        peft::attach(*network.module, peft::Ia3Options().targets({"attn"}));
    REQUIRE(contains(
        error(*network.module, adapter),
        "'attn.in_proj_bias', which a LoRA has no place for"));
  }
}

TEST_CASE("convert: LoRAs made of other methods, for HF PEFT to read") {
  TemporaryDirectory own;
  const char* wanted = std::getenv("PEFT_REVERSE_DIR");
  const fs::path root = wanted != nullptr ? fs::path(wanted) : own.path();
  const auto
      write =
          [&](const std::string& name,
              const std::string& golden_name,
              const std::string& set,
              const ConvertToLoraOptions& options) {
            const Golden golden(golden_name, set);
            auto network = golden.network();
            network.module->eval();
            const auto base = values(*network.module);
            auto adapter = peft::load(*network.module, golden.adapter());
            auto lora = peft::convert_to_lora(adapter, options).adapter;
            adapter.disable();
            lora.enable();
            fs::create_directories(root / name);
            peft::save_safetensors(
                base, (root / name / "base.safetensors").string());
            peft::save(lora, (root / name / "adapter").string());
            TensorMap numbers;
            const auto inputs = golden.inputs();
            for (size_t i = 0; i < inputs.size(); ++i) {
              numbers.emplace("input." + std::to_string(i), inputs[i]);
            }
            numbers.emplace(
                "output", network.run(inputs).detach().contiguous());
            peft::save_safetensors(
                numbers, (root / name / "numbers.safetensors").string());
            int64_t trainable = 0;
            for (const auto& item : peft::load_safetensors(
                     (root / name / "adapter/adapter_model.safetensors")
                         .string())) {
              trainable += item.second.numel();
            }
            std::ofstream(root / name / "case.json")
        << json{
               {"network", golden.text("network")},
               {"dtype", "float32"},
               {"trainable", trainable}}
               .dump(2)
        << '\n';
            REQUIRE(
                fs::exists(root / name / "adapter/adapter_model.safetensors"));
          };
  write("from_lokr", "lokr", "tuners", ConvertToLoraOptions(16));
  write(
      "from_loha_energy", "loha", "tuners", ConvertToLoraOptions().energy(.9));
  write("from_vera", "vera", "tuners", ConvertToLoraOptions(6));
  write("from_oft", "oft", "tuners", ConvertToLoraOptions(16));
  write("from_beside_head", "oft_exact", "tuners", ConvertToLoraOptions(4));
  write("from_hra_bias", "hra_bias", "tuners", ConvertToLoraOptions(4));
  write("from_conv2d", "lokr_conv2d", "tuners", ConvertToLoraOptions(4));
  write("from_tokens", "tokens", "tuners", ConvertToLoraOptions(3));
  write("from_gpt2", "fourier_ft_gpt2", "tuners", ConvertToLoraOptions(4));
  write("from_dora", "dora_embedding", "lora", ConvertToLoraOptions(6));
}

} // namespace test_convert_to_lora
