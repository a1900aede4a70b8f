// The weight deltas of HF PEFT beside LoRA: its files load here and give its
// numbers, ours load there (golden/check_with_peft.py reads what the last test
// writes).

#include "test.h"

#include "golden_case.h"

namespace test_golden_tuners {

using namespace golden_case;

namespace {

const std::string kSet = "tuners";

} // namespace

TEST_CASE("tuners: files of HF PEFT load and give its numbers") {
  for_each_case(kSet, check_loads<Golden>);
}

TEST_CASE("tuners: merging a file of HF PEFT gives its merged weights") {
  for_each_case(kSet, check_merges<Golden>);
}

TEST_CASE("tuners: a loaded adapter is saved as it was loaded") {
  for_each_case(kSet, check_saves_again<Golden>);
}

TEST_CASE("tuners: initial values are HF PEFT's after the same seed") {
  for (const auto& name : folders("init_", kSet)) {
    DYNAMIC_SECTION(name) {
      const Golden golden(name, kSet);
      const auto network = golden.network();
      seed(golden.facts.at("seed").get<uint64_t>());
      const auto adapter = peft::load(
          *network.module,
          golden.adapter(),
          "default",
          peft::LoadOptions().strict(false));
      const auto parameters = adapter.named_parameters();
      for (const auto& [key, value] : golden.group("initial")) {
        INFO(key);
        REQUIRE(equal_bits(find(parameters, key), value));
      }
    }
  }
}

TEST_CASE("tuners: what HF PEFT runs and does not train") {
  for (const auto& name : folders("eval_", kSet)) {
    DYNAMIC_SECTION(name) {
      const Golden golden(name, kSet);
      const auto network = golden.network();
      const auto adapter = peft::load(*network.module, golden.adapter());
      REQUIRE(near(golden.run(network), golden.expected.at("output"), 1e-6));
      REQUIRE(
          peft::vblora_savable_parameters(adapter) ==
          golden.facts.at("savable").get<int64_t>());
      network.module->train();
      const auto error = error_of([&] { golden.evaluate(network); });
      REQUIRE(contains(error, "cannot be trained"));
      check_merges(golden);
      check_saves_again(golden);
    }
  }
}

TEST_CASE("tuners: AdaLoRA takes the ranks away that HF PEFT takes") {
  const Golden golden("steps_ada_lora", kSet);
  auto network = golden.network();
  auto adapter =
      peft::load(*network.module, (golden.folder / "start").string());
  const auto step = [&](networks::Network& net, peft::Adapter& own, int i) {
    net.module->train();
    peft::RankAllocator allocator(own);
    torch::optim::SGD optimizer(own.parameters(), 0.2);
    const auto loss =
        torch::mse_loss(net.run(golden.inputs()), golden.expected.at("target"));
    (loss + peft::orthogonal_regularization(own)).backward();
    optimizer.step();
    allocator.update_and_allocate(i);
    optimizer.zero_grad();
    return loss;
  };
  const TemporaryDirectory directory;
  for (int i = 0; i < 10; ++i) {
    INFO("step " << i);
    auto other = golden.network();
    peft::Adapter resumed;
    if (i > 0) { // what was saved after any step goes on to the bit
      resumed = peft::load(*other.module, directory / "half");
      step(other, resumed, i);
    }
    const auto loss = step(network, adapter, i);
    REQUIRE(near(
        loss.view({1}), golden.expected.at("loss." + std::to_string(i)), 1e-5));
    const auto parameters = adapter.named_parameters();
    for (const auto& [key, value] : golden.group("step." + std::to_string(i))) {
      INFO(key);
      const auto own = find(parameters, key);
      REQUIRE(near(own, value, 1e-5));
      REQUIRE(torch::equal(own.eq(0), value.eq(0)));
      if (i > 0) {
        REQUIRE(equal_bits(find(resumed.named_parameters(), key), own));
      }
    }
    peft::save(adapter, directory / "half");
  }
  network.module->eval();
  const auto output = network.run(golden.inputs());
  REQUIRE(near(output, golden.expected.at("output"), 1e-5));

  // The file is PEFT's: what is left, and where.
  const auto ours =
      peft::load_safetensors(directory / "half/adapter_model.safetensors");
  const auto theirs =
      peft::load_safetensors(golden.adapter() + "/adapter_model.safetensors");
  REQUIRE(ours.size() == theirs.size());
  for (const auto& [key, value] : theirs) {
    INFO(key);
    REQUIRE(ours.at(key).sizes() == value.sizes());
    REQUIRE((value.numel() == 0 || near(ours.at(key), value, 1e-5)));
  }
  REQUIRE(
      config_of(directory / "half").at("rank_pattern") ==
      config_of(golden.adapter()).at("rank_pattern"));
  auto other = golden.network();
  const auto loaded = peft::load(*other.module, golden.adapter());
  REQUIRE(near(other.run(golden.inputs()), output, 1e-5));
  const auto error = error_of([&] { peft::RankAllocator allocator(loaded); });
  REQUIRE(contains(error, "libpeft_training.safetensors"));
}

TEST_CASE("tuners: adapters are written for HF PEFT to read") {
  const ReverseFolder root;
  const auto write = [&](const std::string& name,
                         const std::string& golden_name,
                         auto options,
                         double size = 0.2) {
    write_for_peft(
        root / name, Golden(golden_name), options, /*half=*/false, size);
  };
  const peft::Targets layers({"fc1", "fc2"});
  const peft::Targets convolutions({"conv1", "conv2", "conv3"});
  const peft::Targets projections({"query", "value"});
  using namespace peft;
  write("vera", "mlp", VeraOptions(6).targets(layers));
  write(
      "vera_seed",
      "bert",
      VeraOptions(4).projection_prng_key(5).save_projection(false).targets(
          projections));
  write("vera_gpt2", "dora_gpt2", VeraOptions(4).targets(Targets({"c_fc"})));
  write("vera_bias", "mlp", VeraOptions(4).bias("vera_only").targets(layers));
  const auto bank = VbLoraOptions(2).num_vectors(7).vector_length(2);
  write("vblora", "mlp", VbLoraOptions(bank).topk(3).targets(layers));
  write("vblora_bias", "mlp", VbLoraOptions(bank).bias("all").targets(layers));
  write(
      "vblora_gpt2",
      "dora_gpt2",
      VbLoraOptions(3).num_vectors(5).vector_length(3).targets({"c_fc"}));
  write(
      "vblora_topk",
      "mlp",
      VbLoraOptions(bank)
          .topk(3)
          .save_only_topk_weights(true)
          .modules_to_save({"head"})
          .targets(layers));
  write(
      "vblora_topk_int16",
      "bert",
      VbLoraOptions(2)
          .num_vectors(256)
          .vector_length(8)
          .save_only_topk_weights(true)
          .targets(projections));
  write("loha", "mlp", LoHaOptions(2).alpha(4).targets(layers));
  write(
      "loha_conv2d",
      "conv2d",
      LoHaOptions(2).use_effective_conv2d(true).targets(convolutions));
  write(
      "loha_patterns",
      "patterns",
      LoHaOptions(2)
          .rank_pattern({{"value", 3}})
          .alpha_pattern({{"query", 5}})
          .modules_to_save({})
          .targets(projections));
  write("lokr", "mlp", LoKrOptions(2).alpha(4).targets(layers));
  write(
      "lokr_both",
      "bert",
      LoKrOptions(1).decompose_both(true).targets(projections));
  write(
      "lokr_conv2d",
      "conv2d",
      LoKrOptions(1).decompose_factor(2).targets(convolutions));
  write("hra", "mlp", HraOptions(4).targets(layers));
  write(
      "hra_gs",
      "mlp",
      HraOptions(2).apply_GS(true).modules_to_save({"head"}).targets(layers));
  write("oft", "mlp", OftOptions().oft_block_size(2).targets(layers), 0.1);
  write(
      "oft_exact",
      "bert",
      OftOptions().oft_block_size(0).r(4).use_cayley_neumann(false).targets(
          projections));
  write(
      "oft_embedding",
      "embedding",
      OftOptions().oft_block_size(3).targets(Targets({"emb", "fc"})),
      0.1);
  write("boft", "mlp", BoftOptions().boft_block_size(2).targets(layers));
  write(
      "fourier_ft",
      "layers",
      FourierFtOptions(20).scaling(10).targets(projections));
  write(
      "fourier_ft_gpt2",
      "dora_gpt2",
      FourierFtOptions(20).scaling(10).targets(Targets({"c_fc", "c_proj"})));
  write("all_linear", "bert", LoKrOptions(2).targets(Targets::all_linear()));
}

} // namespace test_golden_tuners
