/// Loading: folders of several adapters, pickles, other spellings of keys, and
/// what is refused. The last test writes what golden/check_with_peft.py reads.

#include "golden_case.h"
#include "model_state.h"
#include "test.h"

#include <peft/models/bert.h>

#include <torch/serialize.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <set>
#include <string>
#include <vector>

namespace test_golden_adapters {

using golden_case::Golden;
using golden_case::json;
using golden_case::near;
using golden_case::read_json_file;
using torch::Tensor;
namespace fs = std::filesystem;
namespace models = peft::models;
namespace nn = torch::nn;
using Names = std::vector<std::string>;
using TensorMap = std::map<std::string, Tensor>;

namespace {

const std::string kWeights = "adapter_model.safetensors";
const std::string kConfig = "adapter_config.json";
const std::string kPrefix = "base_model.model.";

// ~~~~ a network, every format ~~~~

struct Host {
  std::shared_ptr<nn::Module> module;
  Tensor run() const {
    const torch::NoGradGuard no_grad;
    seed(5);
    const Tensor ids = torch::randint(4, 40, {3, 6}, torch::kLong);
    return module->as<models::BertForSequenceClassificationImpl>()->forward(
        ids, torch::ones({3, 6}, torch::kLong));
  }
};

Host bert(int64_t width = 16) {
  seed(11);
  models::BertForSequenceClassification model(models::BertOptions()
                                                  .vocab_size(40)
                                                  .hidden_size(width)
                                                  .num_hidden_layers(2)
                                                  .num_attention_heads(2)
                                                  .intermediate_size(32)
                                                  .max_position_embeddings(32));
  model->eval();
  return {model.ptr()};
}

struct Format {
  std::string name;
  std::function<peft::Adapter(nn::Module&)> attach;
  /// The fields that HF's config must have at least; none: not HF's.
  Names minimal;
  /// Whether its keys are a module's path below one prefix.
  bool plain_keys = true;
};

template <class Options>
Format format(const std::string& name, Options options, Names minimal = {}) {
  return {
      name,
      [options](nn::Module& model) { return peft::attach(model, options); },
      std::move(minimal)};
}

std::vector<Format> every_format() {
  using namespace peft;
  const Names head{"classifier"};
  const Targets qv({"query", "value"});
  std::vector<Format> all{
      format(
          "LoRA",
          LoraOptions(2).alpha(4).modules_to_save(head),
          {"r", "lora_alpha", "target_modules", "modules_to_save"}),
      format(
          "DoRA",
          LoraOptions(2).alpha(4).dora(true).modules_to_save(head),
          {"r", "lora_alpha", "target_modules", "use_dora", "modules_to_save"}),
      format(
          "AdaLoRA",
          AdaLoraOptions(10).init_r(3).modules_to_save(head),
          {"init_r", "target_modules", "modules_to_save"}),
      format(
          "VeRA",
          VeraOptions(3).modules_to_save(head),
          {"r", "target_modules", "modules_to_save"}),
      format(
          "VB-LoRA",
          VbLoraOptions(3).num_vectors(9).vector_length(4).modules_to_save(
              head),
          {"r",
           "num_vectors",
           "vector_length",
           "target_modules",
           "modules_to_save"}),
      format(
          "LoHa",
          LoHaOptions(2).modules_to_save(head),
          {"r", "target_modules", "modules_to_save"}),
      format(
          "LoKr",
          LoKrOptions(2).modules_to_save(head),
          {"r", "target_modules", "modules_to_save"}),
      format(
          "HRA",
          HraOptions(2).modules_to_save(head),
          {"r", "target_modules", "modules_to_save"}),
      format(
          "OFT",
          OftOptions().oft_block_size(4).modules_to_save(head),
          {"oft_block_size", "target_modules", "modules_to_save"}),
      format(
          "BOFT",
          BoftOptions().boft_block_size(4).modules_to_save(head),
          {"boft_block_size", "target_modules", "modules_to_save"}),
      format(
          "FourierFT",
          FourierFtOptions(9).modules_to_save(head),
          {"n_frequency", "target_modules", "modules_to_save"}),
      format(
          "trainable tokens",
          TrainableTokensOptions({5, 7, 9, 11, 13, 15, 17}),
          {"token_indices", "target_modules"}),
      format(
          "BEFT",
          BeftOptions().modules_to_save(head),
          {"target_modules", "modules_to_save"}),
      format(
          "(IA)3",
          Ia3Options().modules_to_save(head),
          {"target_modules", "feedforward_modules", "modules_to_save"}),
      format(
          "LayerNorm tuning",
          LayerNormOptions().modules_to_save(head),
          {"target_modules", "modules_to_save"}),
      format(
          "prompt",
          PromptOptions(3).modules_to_save(head),
          {"num_virtual_tokens", "modules_to_save"}),
      format(
          "prefix",
          PrefixOptions(3).modules_to_save(head),
          {"num_virtual_tokens", "modules_to_save"}),
      format("BitFit", BitFitOptions().modules_to_save(head)),
      format("full", FullTuningOptions().targets({"query"})),
      format("random mask", RandomMaskOptions(0.3)),
      format("SHiRA", ShiraOptions(2).random_seed(1)),
      format("FISH mask", FishOptions(0.1).selection("random")),
      format("Child-tuning F", ChildTuningOptions(0.5)),
      format("KronA", KronaOptions()),
      format("intrinsic", IntrinsicOptions(60)),
      format("Houlsby", HoulsbyOptions(4)),
      format("Pfeiffer", PfeifferOptions(4)),
      format("parallel adapter", ParallelAdapterOptions(4)),
      format("CoDA", CodaOptions().ratio(0.5).bottleneck(4)),
      format("ladder", LadderOptions(2)),
      format("masked LoRA", Masked(LoraOptions(2).alpha(4))),
      format(
          "learned scale",
          Scaled(LoraOptions(2), ScaleOptions(1).learned(true))),
      format("gated Houlsby", Gated(HoulsbyOptions(4))),
      format(
          "MAM",
          MamOptions()
              .prefix(PrefixOptions(3))
              .adapter(ParallelAdapterOptions(4))),
  };
  for (auto& one : all) {
    if (one.name == "learned scale" || one.name == "gated Houlsby" ||
        one.name == "MAM") {
      one.plain_keys = false; // a part's name stands in front
    }
  }
  return all;
}

/// An adapter of this format in `folder`, and what the network makes with it.
Tensor
save_one(const Format& one, const fs::path& folder, uint64_t number = 7) {
  const Host host = bert();
  auto adapter = one.attach(*host.module);
  randomise(adapter, number);
  {
    const torch::NoGradGuard no_grad;
    for (auto& p : adapter.parameters()) {
      p.mul_(0.3); // rotations stay small
    }
  }
  peft::save(adapter, folder.string());
  return host.run();
}

json config_of(const fs::path& folder) {
  return read_json_file(folder / kConfig);
}
void write_config(const fs::path& folder, const json& config) {
  std::ofstream(folder / kConfig) << config.dump(2);
}

/// The weights file: of HF PEFT, or of AdapterHub, which has its own names.
fs::path weights_of(const fs::path& folder) {
  const auto hub = folder / "adapter.safetensors";
  return fs::exists(hub) ? hub : folder / kWeights;
}
TensorMap tensors_of(const fs::path& folder) {
  const auto tensors = peft::load_safetensors(weights_of(folder).string());
  return {tensors.begin(), tensors.end()};
}
void write_tensors(const fs::path& folder, const TensorMap& tensors) {
  peft::save_safetensors(
      tensors, weights_of(folder).string(), {{"format", "pt"}});
}

/// A changed copy of the folder.
fs::path changed(
    const TemporaryDirectory& directory,
    const std::string& name,
    const std::function<void(TensorMap&)>& edit) {
  const fs::path copy = directory / name;
  fs::remove_all(copy);
  fs::copy(directory / "saved", copy, fs::copy_options::recursive);
  auto tensors = tensors_of(copy);
  edit(tensors);
  write_tensors(copy, tensors);
  return copy;
}

TensorMap renamed(
    const TensorMap& tensors,
    const std::function<std::string(const std::string&)>& rename) {
  TensorMap result;
  for (const auto& [key, value] : tensors) {
    result.emplace(rename(key), value);
  }
  return result;
}

std::string strip(const std::string& key, const std::string& start) {
  return key.rfind(start, 0) == 0 ? key.substr(start.size()) : key;
}

/// The key as PEFT has it in memory, with the adapter's name inside.
std::string named(const std::string& key, const std::string& adapter) {
  static const Names words{
      "lora_A",
      "lora_B",
      "lora_E",
      "hada_w1_a",
      "hada_w1_b",
      "hada_w2_a",
      "hada_w2_b",
      "lokr_w1_a",
      "lokr_w1_b",
      "lokr_w1",
      "lokr_w2_a",
      "lokr_w2_b",
      "lokr_w2",
      "vera_lambda_b",
      "vera_lambda_d",
      "vera_A",
      "vera_B",
      "vblora_logits_A",
      "vblora_logits_B",
      "vblora_vector_bank",
      "hra_u",
      "oft_R",
      "boft_R",
      "boft_s",
      "ia3_l",
      "beft_bias",
      "fourierft_spectrum",
      "ln_tuning_layers",
      "trainable_tokens_delta",
      "lora_magnitude_vector"};
  for (const auto& word : words) {
    const auto at = key.find("." + word);
    const auto end = at + 1 + word.size();
    if (at != std::string::npos && (end == key.size() || key[end] == '.')) {
      const std::string rest =
          word == "lora_magnitude_vector" ? ".weight" : key.substr(end);
      return key.substr(0, end) + "." + adapter + rest;
    }
  }
  const auto dot = key.rfind('.');
  const std::string head = "classifier";
  return key.find(head) == std::string::npos
      ? key
      : key.substr(0, dot) + ".modules_to_save." + adapter + key.substr(dot);
}

/// Loads and gives the output.
Tensor load_and_run(
    const fs::path& folder,
    const peft::LoadOptions& options = {}) {
  const Host host = bert();
  peft::load(*host.module, folder.string(), "default", options);
  return host.run();
}

/// What loading says; the model stays what it was.
std::string refusal(const fs::path& folder, Host host = bert()) {
  const auto before = state_of(*host.module);
  const auto error =
      error_of([&] { peft::load(*host.module, folder.string()); });
  CHECK(same_state(state_of(*host.module), before));
  return error;
}

void pickle(const fs::path& folder, const c10::IValue& value) {
  const auto old = weights_of(folder);
  const auto bytes = torch::pickle_save(value);
  std::ofstream(
      folder /
          (old.filename() == kWeights ? "adapter_model.bin"
                                      : "pytorch_adapter.bin"),
      std::ios::binary)
      .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  fs::remove(old);
}

} // namespace

TEST_CASE("Every format takes other spellings of its keys", "[loading]") {
  for (const auto& one : every_format()) {
    INFO(one.name);
    const TemporaryDirectory directory;
    const Tensor y = save_one(one, directory / "saved");
    REQUIRE(equal_bits(load_and_run(directory / "saved"), y));
    const bool is_hub = weights_of(directory / "saved").filename() != kWeights;
    if (!one.plain_keys || is_hub) {
      continue;
    }
    const auto check =
        [&](const std::string& spelling,
            const std::function<std::string(const std::string&)>& rename) {
          INFO(spelling);
          const auto copy = changed(directory, "copy", [&](TensorMap& tensors) {
            tensors = renamed(tensors, rename);
          });
          const auto error =
              error_of([&] { CHECK(equal_bits(load_and_run(copy), y)); });
          CHECK(error == "");
        };
    const auto bare = [](const std::string& key) {
      return strip(strip(key, kPrefix), "base_model.");
    };
    check("no prefix", bare);
    check("base_model.", [&](const std::string& key) {
      return bare(key) == key ? key : "base_model." + bare(key);
    });
    check("model.", [&](const std::string& key) {
      return bare(key) == key ? key : "model." + bare(key);
    });
    if (!one.minimal.empty()) {
      for (const std::string name : {"default", "weight", "lora_A"}) {
        check("the name " + name, [&](const std::string& key) {
          return named(key, name);
        });
        check("the name " + name + ", no prefix", [&](const std::string& key) {
          return named(bare(key), name);
        });
      }
    }
  }
}

TEST_CASE("Every format says what is missing, extra, misshaped", "[loading]") {
  for (const auto& one : every_format()) {
    INFO(one.name);
    const TemporaryDirectory directory;
    save_one(one, directory / "saved");
    const auto whole = tensors_of(directory / "saved");
    // A key of the method's own, and not one that tells what there is.
    std::string key;
    for (const auto& item : whole) {
      const bool tells = contains(item.first, ".indices") ||
          contains(item.first, "vera_A") || contains(item.first, "vera_B");
      if (!tells && (key.empty() || !contains(item.first, "classifier"))) {
        key = item.first;
      }
    }
    REQUIRE_FALSE(key.empty());
    const std::string typo = key + "_x";
    const std::string tail = key.substr(key.find_first_of('.') + 1);
    const auto copy = changed(directory, "copy", [&](TensorMap& tensors) {
      tensors.emplace(typo, tensors.at(key));
      tensors.emplace("nothing.at.all", torch::ones({2}));
      tensors.erase(key);
    });
    const auto error = refusal(copy);
    INFO(error);
    CHECK(contains(error, "nothing was loaded"));
    CHECK(contains(error, "missing from the file:"));
    CHECK(contains(error, "unexpected in the file:"));
    CHECK(contains(error, "nothing.at.all"));
    CHECK(contains(error, "(the file has: '")); // the near name
    CHECK(contains(error, "_x'"));
    CHECK(contains(error, "(the adapter has: '"));
    // That opts out; what is there has been loaded.
    const auto lenient = error_of([&] {
      const Host host = bert();
      const auto adapter = peft::load(
          *host.module,
          copy.string(),
          "default",
          peft::LoadOptions().strict(false));
      CHECK(adapter.num_parameters() > 0);
    });
    CHECK(lenient == "");

    // All three at once, and a shape is an error under strict(false) too.
    const auto twisted = changed(directory, "copy", [&](TensorMap& tensors) {
      const Tensor own = tensors.at(key);
      tensors.at(key) = torch::ones({own.size(0) + 1, 3, 5, 7, 2});
      tensors.emplace("nothing.at.all", torch::ones({2}));
    });
    const auto misfit = refusal(twisted);
    INFO(misfit);
    CHECK(contains(misfit, "3, 5, 7, 2]"));
    if (!contains(key, ".values")) { // those are read after their places
      CHECK(contains(misfit, "wrong shape"));
      CHECK(contains(misfit, "nothing.at.all"));
    }
    const Host host = bert();
    CHECK(contains(
        error_of([&] {
          peft::load(
              *host.module,
              twisted.string(),
              "default",
              peft::LoadOptions().strict(false));
        }),
        "3, 5, 7, 2]"));
    CHECK(peft::adapters(*host.module).empty());
  }
}

TEST_CASE("Every format keeps what it does not know of a config", "[loading]") {
  for (const auto& one : every_format()) {
    INFO(one.name);
    const TemporaryDirectory directory;
    const Tensor y = save_one(one, directory / "saved");
    auto config = config_of(directory / "saved");
    const json kept{
        {"task_type", "SEQ_CLS"},
        {"auto_mapping",
         {{"base_model_class", "BertModel"},
          {"parent_library", "transformers.models.bert"}}},
        {"base_model_name_or_path", "somebody/bert"},
        {"revision", "main"},
        {"peft_version", "0.99.0"},
        {"of_the_future", {{"deep", {1, 2.5, nullptr, "text"}}}},
        {"another", false}};
    config.update(kept);
    write_config(directory / "saved", config);
    const Host host = bert();
    const auto adapter = peft::load(*host.module, directory / "saved");
    CHECK(equal_bits(host.run(), y));
    peft::save(adapter, directory / "again");
    const auto again = config_of(directory / "again");
    for (const auto& item : config.items()) {
      INFO(item.key());
      REQUIRE(again.contains(item.key()));
      CHECK(again.at(item.key()) == item.value());
    }
    CHECK(again.size() == config.size());

    if (one.minimal.empty()) {
      continue;
    }
    json least{{"peft_type", config.at("peft_type")}};
    for (const auto& field : one.minimal) {
      REQUIRE(config.contains(field));
      least[field] = config.at(field);
    }
    write_config(directory / "saved", least);
    CHECK(equal_bits(load_and_run(directory / "saved"), y));
    // Null where HF has no value.
    for (const auto& item : config.items()) {
      if (!least.contains(item.key()) && item.value().is_null()) {
        least[item.key()] = nullptr;
      }
    }
    write_config(directory / "saved", least);
    CHECK(equal_bits(load_and_run(directory / "saved"), y));

    // A head that the config promises and the file has not.
    if (least.contains("modules_to_save")) {
      const auto headless = changed(directory, "copy", [](TensorMap& tensors) {
        for (auto item = tensors.begin(); item != tensors.end();) {
          item = contains(item->first, "classifier") ? tensors.erase(item)
                                                     : std::next(item);
        }
      });
      const auto error = refusal(headless);
      INFO(error);
      CHECK(contains(error, "missing from the file:\n    classifier.bias"));
    }
  }
}

TEST_CASE("Every format reads half precision and pickles", "[loading]") {
  for (const auto& one : every_format()) {
    INFO(one.name);
    const TemporaryDirectory directory;
    const Tensor y = save_one(one, directory / "saved");
    fs::remove(fs::path(directory / "saved") / "libpeft_training.safetensors");
    for (const auto dtype : {torch::kHalf, torch::kBFloat16}) {
      const auto copy = changed(directory, "copy", [&](TensorMap& tensors) {
        for (auto& [key, value] : tensors) {
          value = value.is_floating_point() ? value.to(dtype) : value;
        }
      });
      const auto rounded = changed(directory, "rounded", [&](TensorMap& all) {
        for (auto& [key, value] : all) {
          value = value.is_floating_point() ? value.to(dtype).to(torch::kFloat)
                                            : value;
        }
      });
      const Host host = bert();
      const auto adapter = peft::load(*host.module, copy.string());
      for (const auto& p : adapter.parameters()) {
        CHECK(p.scalar_type() == torch::kFloat);
      }
      CHECK(equal_bits(host.run(), load_and_run(rounded)));
    }

    const fs::path copy = directory / "copy";
    fs::remove_all(copy);
    fs::copy(directory / "saved", copy, fs::copy_options::recursive);
    c10::Dict<std::string, Tensor> dict;
    for (const auto& [key, value] : tensors_of(copy)) {
      dict.insert(key, value);
    }
    pickle(copy, dict);
    CHECK(equal_bits(load_and_run(copy), load_and_run(directory / "saved")));
  }
}

TEST_CASE("Pickles of PEFT load, also those of a GPU", "[loading]") {
  for (const auto& name : golden_case::folders("pickle_", "adapters")) {
    INFO(name);
    const Golden golden(name, "adapters");
    const auto network = golden.network();
    const auto adapter = peft::load(*network.module, golden.adapter());
    CHECK(
        near(network.run(golden.inputs()), golden.expected.at("output"), 1e-6));
    for (const auto& p : adapter.parameters()) {
      CHECK(p.device().is_cpu());
      CHECK(p.scalar_type() == torch::kFloat);
    }
    // Written again, it is a safetensors file.
    const TemporaryDirectory directory;
    peft::save(adapter, directory / "again");
    const auto other = golden.network();
    peft::load(*other.module, directory / "again");
    CHECK(equal_bits(other.run(golden.inputs()), network.run(golden.inputs())));
  }
}

TEST_CASE("A broken pickle is an error in words", "[loading]") {
  const auto one = every_format().front();
  const TemporaryDirectory directory;
  save_one(one, directory / "saved");
  const fs::path copy = directory / "copy";
  fs::copy(directory / "saved", copy);
  c10::Dict<std::string, Tensor> dict;
  for (const auto& [key, value] : tensors_of(copy)) {
    dict.insert(key, value);
  }
  pickle(copy, dict);
  const auto path = copy / "adapter_model.bin";
  const auto size = fs::file_size(path);
  const auto expect = [&](const std::string& part) {
    const auto error = refusal(copy);
    INFO(error);
    CHECK(contains(error, "adapter_model.bin'"));
    CHECK(contains(error, part));
  };
  for (const auto keep : {size - 1, size / 2, size_t{10}, size_t{0}}) {
    fs::resize_file(path, keep);
    expect("is not a pickled dict of tensors");
  }
  std::ofstream(path) << "no zip archive, but text that is long enough to "
                         "be looked at for the end of one";
  expect("is not a pickled dict of tensors");
  pickle(copy, torch::ones({2}));
  expect("holds a Tensor, not a dict of tensors");
  c10::Dict<std::string, int64_t> numbers;
  numbers.insert("epoch", 3);
  pickle(copy, numbers);
  expect("something other than named tensors, 'epoch'");
}

TEST_CASE("Two adapters in one file are not mixed", "[loading]") {
  const auto one = every_format().front();
  const TemporaryDirectory directory;
  save_one(one, directory / "saved");
  const auto copy = changed(directory, "copy", [](TensorMap& tensors) {
    TensorMap both;
    for (const auto& [key, value] : tensors) {
      both.emplace(named(key, "first"), value);
      both.emplace(named(key, "second"), value + 1);
    }
    tensors = both;
  });
  const auto error = refusal(copy);
  CHECK(contains(error, "unexpected in the file:"));
  CHECK(contains(error, ".second."));
  const auto twice = changed(directory, "copy", [](TensorMap& tensors) {
    const auto [key, value] = *tensors.begin();
    tensors.emplace(strip(key, kPrefix), value + 1);
  });
  CHECK(contains(refusal(twice), "once more"));
}

// ~~~~ folders of several adapters ~~~~

TEST_CASE("A folder of several adapters by PEFT loads", "[loading]") {
  const Golden golden("several", "adapters");
  const auto network = golden.network();
  auto& model = *network.module;
  const auto all = peft::load_adapters(model, golden.adapter());
  REQUIRE(all.size() == 4);
  CHECK(all[0].name() == "default");
  CHECK(all[2].method() == "LOKR");
  CHECK(all[3].method() == "IA3");
  const auto output = [&] { return network.run(golden.inputs()); };
  // The one at the top is active, as in PEFT.
  CHECK(peft::active_adapters(model) == Names{"default"});
  CHECK(near(output(), golden.expected.at("output.default"), 1e-6));
  for (const std::string name : {"second", "style", "tone", "default"}) {
    INFO(name);
    peft::set_adapter(model, name);
    CHECK(near(output(), golden.expected.at("output." + name), 1e-6));
    const peft::ActiveAdapters scope({name});
    CHECK(near(output(), golden.expected.at("output." + name), 1e-6));
  }
  peft::set_adapter(model, {"second", "default"});
  CHECK(near(output(), golden.expected.at("output.both"), 1e-6));

  // One of them by its name, wherever it lies.
  for (const std::string name : {"second", "style"}) {
    const auto other = golden.network();
    peft::load(*other.module, golden.adapter() + "/" + name, "mine");
    CHECK(near(
        other.run(golden.inputs()),
        golden.expected.at("output." + name),
        1e-6));
  }
  // A second folder waits beside what is there.
  const auto other = golden.network();
  const auto mine = peft::attach(
      *other.module, peft::LoraOptions(2).targets({"fc1"}), "mine");
  peft::load_adapters(
      *other.module, golden.adapter(), peft::LoadOptions().is_trainable(false));
  CHECK(peft::active_adapters(*other.module) == Names{"mine"});
  CHECK_FALSE(
      peft::get_adapter(*other.module, "tone").parameters()[0].requires_grad());

  // Written again it is the same folder.
  const TemporaryDirectory directory;
  const auto root = directory.path().string();
  peft::save_adapters(model, root);
  std::set<std::string> files, theirs;
  for (const auto& entry : fs::recursive_directory_iterator(root)) {
    files.insert(fs::relative(entry.path(), root).generic_string());
  }
  for (const auto& entry : fs::recursive_directory_iterator(golden.adapter())) {
    theirs.insert(
        fs::relative(entry.path(), golden.adapter()).generic_string());
  }
  CHECK(files == theirs);
  const auto again = golden.network();
  peft::load_adapters(*again.module, root);
  for (const std::string name : {"default", "second", "style", "tone"}) {
    peft::set_adapter(model, name);
    peft::set_adapter(*again.module, name);
    CHECK(equal_bits(again.run(golden.inputs()), output()));
  }
}

TEST_CASE("Which adapter of a folder is meant", "[loading]") {
  const TemporaryDirectory directory;
  const fs::path root = directory / "root";
  const auto one = every_format().front();
  const Tensor a = save_one(one, root / "a", 1);
  const Tensor b = save_one(one, root / "b", 2);
  fs::create_directories(root / "logs");
  fs::create_directories(root / ".cache");
  const auto load = [&](const std::string& name) {
    const Host host = bert();
    peft::load(*host.module, root.string(), name);
    return host.run();
  };
  CHECK(equal_bits(load("a"), a));
  CHECK(equal_bits(load("b"), b));
  {
    const auto error = error_of([&] { load("c"); });
    INFO(error);
    CHECK(contains(error, "has no adapter_config.json at the top"));
    CHECK(contains(error, "no folder 'c'; its folders with one are 'a', 'b'"));
    CHECK(contains(error, "load_adapters"));
  }
  const Host host = bert();
  CHECK(peft::load_adapters(*host.module, root.string()).size() == 2);
  CHECK(peft::active_adapters(*host.module) == Names{"a"}); // no default
  CHECK(equal_bits(host.run(), a));

  // All or nothing.
  const Host other = bert();
  const auto before = state_of(*other.module);
  const auto fails = [&](const std::string& part) {
    const auto error =
        error_of([&] { peft::load_adapters(*other.module, root.string()); });
    INFO(error);
    CHECK(contains(error, part));
    CHECK(same_state(state_of(*other.module), before));
    CHECK(peft::adapters(*other.module).empty());
  };
  fs::copy(root / "a", root / "v1.0");
  fails("must not contain a dot, got 'v1.0'");
  fs::remove_all(root / "v1.0");
  fs::copy(root / "a", root / "c");
  fs::remove(root / "c" / kWeights);
  fails("holds no weights");
  fs::remove_all(root / "c");
  fs::copy(root / "a", root / "default");
  fs::copy_file(root / "a" / kConfig, root / kConfig);
  fails("rename that folder");
  for (const std::string name : {"none", "root/logs"}) {
    CHECK(contains(
        error_of([&] { peft::load_adapters(*other.module, directory / name); }),
        "and no folder in it does"));
  }

  // What cannot be a folder is not saved as one.
  auto odd = peft::attach(
      *other.module, peft::LoraOptions(2).targets({"query"}), "a/b");
  CHECK(contains(
      error_of(
          [&] { peft::save_adapters(*other.module, directory / "saved"); }),
      "its name is none of a folder; rename_adapter"));
  CHECK_FALSE(fs::exists(directory / "saved"));
  peft::rename_adapter(*other.module, "a/b", "ab");
  peft::save_adapters(*other.module, directory / "saved");
  CHECK(fs::exists(directory / "saved/ab/adapter_config.json"));
  odd.detach();
  CHECK(contains(
      error_of(
          [&] { peft::save_adapters(*other.module, directory / "saved"); }),
      "no adapter to save"));
}

// ~~~~ what stands beside the weights ~~~~

namespace {

/// What is warned of while it lives.
struct Warnings : c10::WarningHandler {
  Warnings() : before(c10::WarningUtils::get_warning_handler()) {
    c10::WarningUtils::set_warning_handler(this);
  }
  ~Warnings() override {
    c10::WarningUtils::set_warning_handler(before);
  }
  void process(const c10::Warning& warning) override {
    text += warning.msg() + "\n";
  }
  c10::WarningHandler* before;
  std::string text;
};

} // namespace

TEST_CASE("A masked adapter without its masks is warned of", "[loading]") {
  const TemporaryDirectory directory;
  const Host host = bert();
  auto adapter = peft::attach(
      *host.module,
      peft::SparseAdapterOptions(peft::LoraOptions(4).alpha(4), 0.5));
  peft::save(adapter, directory / "saved");
  const fs::path side =
      fs::path(directory / "saved") / "libpeft_training.safetensors";
  REQUIRE(fs::exists(side));
  const auto said = [&](bool is_trainable) {
    const Warnings warnings;
    load_and_run(
        directory / "saved", peft::LoadOptions().is_trainable(is_trainable));
    return warnings.text;
  };
  CHECK(said(true) == "");
  fs::remove(side);
  CHECK(said(false) == "");
  const auto text = said(true);
  CHECK(contains(text, "has no libpeft_training.safetensors"));
  CHECK(contains(text, "lacks the masks"));
  CHECK(said(true) == text); // each load, not once a process
}

TEST_CASE(
    "AdaLoRA's training file is checked before it is taken",
    "[loading]") {
  const TemporaryDirectory directory;
  networks::Network network = networks::build("mlp");
  {
    auto adapter = peft::attach(
        *network.module,
        peft::AdaLoraOptions(4).init_r(4).target_r(2).targets({"fc1", "fc2"}));
    peft::RankAllocator allocator(adapter);
    torch::optim::SGD optimizer(adapter.parameters(), 0.1);
    seed(2);
    const Tensor x = torch::randn({5, 10});
    for (int64_t step = 0; step < 4; ++step) {
      optimizer.zero_grad();
      network.run({x}).square().mean().backward();
      optimizer.step();
      allocator.update_and_allocate(step);
    }
    peft::save(adapter, directory / "saved");
    adapter.detach();
  }
  const auto file =
      fs::path(directory / "saved") / "libpeft_training.safetensors";
  const auto loaded = peft::load_safetensors(file.string());
  const TensorMap whole(loaded.begin(), loaded.end());
  REQUIRE(whole.at("fc1.kept").numel() == 4);
  REQUIRE(whole.at("fc1.average.0").sizes() == at::IntArrayRef({4, 10}));
  const auto with = [&](const std::string& key, const Tensor& value) {
    auto tensors = whole;
    tensors.at(key) = value;
    peft::save_safetensors(tensors, file.string());
    const auto before = state_of(*network.module);
    const auto error = error_of(
        [&] { peft::load(*network.module, directory / "saved").detach(); });
    CHECK(same_state(state_of(*network.module), before));
    return error;
  };
  const Tensor ones = torch::ones({4}, torch::kByte);
  CHECK(contains(with("fc1.kept", ones), "it names 4 of 4 triplets"));
  CHECK(contains(
      with("fc1.kept", torch::ones({3}, torch::kByte)),
      "it names 3 of 3 triplets"));
  CHECK(contains(
      with("fc1.average.0", torch::ones({4, 9})), "[4, 9] where [4, 10] fits"));
  CHECK(contains(
      with("fc2.average.4", torch::ones({12, 3})),
      "[12, 3] where [12, 4] fits"));
  CHECK(contains(
      with("fc1.average.3", torch::empty({0})), "it is empty, and others"));
  CHECK(contains(
      with("fc1.average.0", torch::empty({0})), "others before it are empty"));
  CHECK(contains(
      with("fc1.whole.lora_A", torch::ones({3, 10})),
      "[3, 10] where [4, 10] fits"));
  CHECK(contains(
      with("fc1.ranknum", torch::full({1}, 3.0)), "it must be init_r, 4"));
  CHECK(with("fc1.kept", whole.at("fc1.kept")) == ""); // as it was: loads
}

// ~~~~ the other direction ~~~~

TEST_CASE("Several adapters are written for HF PEFT to read", "[loading]") {
  const TemporaryDirectory own;
  const golden_case::ReverseFolder root;
  const Golden golden("mlp");
  const peft::Targets fc({"fc1", "fc2"});
  golden_case::write_for_peft(
      root / "several", golden, peft::LoraOptions(4).alpha(8).targets(fc));
  const auto network = golden.network();
  auto& model = *network.module;
  const auto add = [&](const std::string& name, auto options) {
    randomise(peft::attach(model, options, name), name.size());
  };
  add("second",
      peft::LoraOptions(2).targets({"fc2"}).modules_to_save({"head"}));
  add("swapped", peft::LoraOptions(4).targets(fc));
  add("loha", peft::LoHaOptions(2).targets(fc));
  add("scales", peft::Ia3Options().targets(fc).feedforward({"fc2"}));
  {
    const auto lower = golden.network();
    randomise(
        peft::attach(*lower.module, peft::LoraOptions(2).alpha(7).targets(fc)),
        3);
    peft::save(peft::get_adapter(*lower.module), own / "lower");
    peft::hotswap_adapter(model, own / "lower", "swapped");
  }
  const auto folder = root / "several" / "adapter";
  peft::save_adapters(model, folder.string());
  for (const auto& adapter : peft::adapters(model)) {
    const auto& name = adapter.name();
    REQUIRE(fs::exists(folder / name / kConfig));
    const peft::ActiveAdapters scope({name});
    TensorMap numbers;
    numbers.emplace(
        "output", network.run(golden.inputs()).detach().contiguous());
    peft::save_safetensors(
        numbers, (root / "several" / (name + ".safetensors")).string());
  }
}

} // namespace test_golden_adapters
