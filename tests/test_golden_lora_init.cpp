// LoRA that starts as PiSSA, OLoRA or orthogonal, against HF PEFT: its files
// load here and give its numbers, ours load there
// (golden/check_with_peft.py reads what the last test writes).

#include "test.h"

#include "golden_case.h"

namespace test_golden_lora_init {

using namespace golden_case;

namespace {

const std::string kSet = "lora_init";

peft::LoraOptions options_of(const json& config) {
  return peft::LoraOptions(config.at("r").get<int64_t>())
      .alpha(config.at("lora_alpha").get<double>())
      .init(config.at("init_lora_weights").get<std::string>())
      .targets(config.at("target_modules").get<std::vector<std::string>>());
}

/// B A by the site's key in a file, for the weights as a file has them.
TensorMap products(const TensorMap& tensors) {
  TensorMap result;
  const std::string end = ".lora_A.weight";
  for (const auto& [key, A] : tensors) {
    if (key.size() > end.size() &&
        key.compare(key.size() - end.size(), end.size(), end) == 0) {
      const std::string site = key.substr(0, key.size() - end.size());
      result[site] = torch::mm(
          tensors.at(site + ".lora_B.weight").to(torch::kDouble),
          A.to(torch::kDouble));
    }
  }
  return result;
}

} // namespace

TEST_CASE("lora init: files of HF PEFT load and give its numbers") {
  for_each_case(kSet, check_loads<Golden>);
}

TEST_CASE("lora init: merging a file of HF PEFT gives its merged weights") {
  for_each_case(kSet, check_merges<Golden>);
}

TEST_CASE("lora init: a loaded adapter is saved as it was loaded") {
  for_each_case(kSet, check_saves_again<Golden>);
}

TEST_CASE("lora init: A and B start as HF PEFT's, and take off what it does") {
  for (const auto& name : folders("init_", kSet)) {
    DYNAMIC_SECTION(name) {
      const Golden golden(name, kSet);
      const auto network = golden.network();
      const auto base = values(*network.module);
      const json& config = golden.facts.at("config");
      seed(golden.facts.at("seed").get<uint64_t>());
      const auto adapter = peft::attach(*network.module, options_of(config));
      const auto expected = golden.group("initial");
      const auto parameters = adapter.named_parameters();
      REQUIRE(parameters.size() == expected.size());
      TensorMap own;
      for (const auto& [key, value] : expected) {
        INFO(key);
        const Tensor ours = find(parameters, key);
        REQUIRE(ours.scalar_type() == torch::kFloat);
        // The sign of a pair of singular vectors is anybody's. (Beside a
        // base of half precision PEFT rounds what A and B start as, and then
        // starts elsewhere than at the base.)
        if (config.at("init_lora_weights") == "gaussian") {
          REQUIRE(equal_bits(ours.detach(), value));
        } else if (config.at("init_lora_weights") == "orthogonal") {
          REQUIRE(near(ours, value, 1e-5));
        } else {
          REQUIRE(near(ours.abs(), value.abs(), golden.allowed(1e-4)));
        }
        own.emplace(key, ours.detach());
      }
      const double s =
          config.at("lora_alpha").get<double>() / config.at("r").get<double>();
      const auto theirs = products(expected);
      for (const auto& [site, product] : products(own)) {
        INFO(site);
        REQUIRE(near(product, theirs.at(site), golden.allowed(1e-5)));
        const std::string weight = site.substr(prefix.size()) + ".weight";
        if (config.at("init_lora_weights") != "orthogonal") {
          const Tensor residual = golden.group("residual").at(weight);
          const Tensor W = base.at(weight).to(torch::kDouble);
          const bool turned = W.sizes() != product.sizes();
          REQUIRE(near(
              W - s * (turned ? product.t() : product),
              residual,
              golden.allowed(1e-5)));
        }
      }
    }
  }
}

TEST_CASE("lora init: HF PEFT's conversion to a plain LoRA is ours") {
  for (const auto& name : folders("converted_", kSet)) {
    DYNAMIC_SECTION(name) {
      const Golden golden(name, kSet);
      const auto network = golden.network();
      const auto adapter = peft::load(*network.module, golden.adapter());
      const Tensor output = golden.expected.at("output");
      REQUIRE(near(golden.run(network), output, 1e-6));

      const TemporaryDirectory directory;
      peft::save(
          adapter,
          directory / "plain",
          peft::SaveOptions().convert_to_plain_lora(true));
      const std::string theirs = (golden.folder / "plain").string();
      const auto expected =
          peft::load_safetensors(theirs + "/adapter_model.safetensors");
      const auto ours =
          peft::load_safetensors(directory / "plain/adapter_model.safetensors");
      REQUIRE(ours.size() == expected.size());
      for (const auto& [key, value] : expected) {
        INFO(key);
        REQUIRE(ours.at(key).sizes() == value.sizes());
      }
      const auto own = products(ours);
      for (const auto& [site, product] : products(expected)) {
        INFO(site);
        REQUIRE(close(own.at(site), product, 0, 5e-6));
      }
      const auto config = config_of(directory / "plain");
      auto wanted = config_of(theirs);
      REQUIRE(config.size() == wanted.size());
      const auto alpha = wanted.at("lora_alpha").get<double>();
      REQUIRE(
          std::abs(config.at("lora_alpha").get<double>() - alpha) <=
          1e-12 * alpha);
      wanted.erase("lora_alpha");
      check_keeps_fields(config, wanted);

      // Both are plain LoRA: nothing of the start is kept or made again.
      for (const std::string& folder : {directory / "plain", theirs}) {
        const auto other = golden.network();
        const auto plain = peft::load(*other.module, folder);
        REQUIRE(near(golden.run(other), output, 1e-6));
        REQUIRE(plain.num_parameters() == 2 * adapter.num_parameters());
        REQUIRE(other.module->buffers().empty());
      }
    }
  }
}

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~ the other direction ~~~~~~~~~~~~~~~~~~~~~~~~~~~

TEST_CASE("lora init: adapters are written for HF PEFT to read") {
  const ReverseFolder root;
  const auto write = [&](const std::string& name,
                         const std::string& golden_name,
                         const peft::LoraOptions& options,
                         bool half = false) {
    write_for_peft(root / name, Golden(golden_name), options, half, 0.1);
    const auto config = config_of(root / name / "adapter");
    REQUIRE(config.at("init_lora_weights") == options.init());
  };
  const auto options = [](const std::string& init, peft::Targets targets) {
    return peft::LoraOptions(4).alpha(6).init(init).targets(std::move(targets));
  };
  const peft::Targets layers({"fc1", "fc2"});
  const peft::Targets projections({"query", "value"});
  write("pissa", "mlp", options("pissa", layers));
  write("pissa_rslora", "mlp", options("pissa", layers).rslora(true));
  write(
      "pissa_patterns",
      "patterns",
      options("pissa", projections)
          .rank_pattern({{"value", 3}})
          .alpha_pattern({{"query", 5}}));
  write("pissa_gpt2", "dora_gpt2", options("pissa", {"c_fc", "c_proj"}));
  write(
      "pissa_head", "mlp", options("pissa", layers).modules_to_save({"head"}));
  write("pissa_full_rank", "mlp", options("pissa", {"fc1", "head"}).r(11));
  write("pissa_embedding", "embedding", options("pissa", {"emb", "fc"}));
  write("pissa_dora", "mlp", options("pissa", layers).dora(true));
  write("pissa_bfloat16", "mlp", options("pissa", layers), /*half=*/true);
  write("olora", "mlp", options("olora", layers));
  write("olora_bert", "bert", options("olora", peft::Targets::all_linear()));
  write("olora_dora", "bert", options("olora", projections).dora(true));
  write("olora_bfloat16", "mlp", options("olora", layers), /*half=*/true);
  write("orthogonal", "mlp", options("orthogonal", layers));
  write("orthogonal_gpt2", "dora_gpt2", options("orthogonal", {"c_fc"}));

  // As plain LoRA: PEFT draws a random subspace anew when it loads one.
  for (const std::string init : {"pissa", "pissa_niter_2", "olora"}) {
    write_for_peft(
        root / ("plain_" + init),
        Golden("mlp"),
        options(init, layers).rslora(init == "pissa"),
        /*half=*/false,
        /*size=*/0.1,
        peft::SaveOptions().convert_to_plain_lora(true));
  }
}

} // namespace test_golden_lora_init
