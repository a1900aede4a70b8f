/// Files of prompt tuning, P-tuning and prefix tuning: what HF PEFT wrote is
/// read and computes what PEFT computed, what is written PEFT can read, and
/// training goes on where it stopped.

#include "decoders.h"
#include "model_state.h"
#include "own_decoder.h"
#include "test.h"

#include <peft/io/pretrained.h>
#include <peft/models/bert.h>
#include <peft/models/t5.h>

#include <filesystem>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace test_prompt_files {

namespace {

namespace fs = std::filesystem;
using decoders::Gpt2;
using decoders::Llama;
using peft::PrefixOptions;
using peft::PromptOptions;
using peft::PTuningOptions;
using torch::Tensor;
using Tensors = std::map<std::string, Tensor>;

constexpr const char* kWeights = "adapter_model.safetensors";
constexpr const char* kConfig = "adapter_config.json";
constexpr const char* kTraining = "libpeft_training.safetensors";

/// Differences below `tolerance`, of the largest number where that is above
/// one.
Comparison agrees(const Tensor& ours, const Tensor& theirs, double tolerance) {
  const auto largest = theirs.abs().max().item<double>();
  return close(ours, theirs, 0, tolerance * std::max(1.0, largest));
}

/// A copy of PEFT's folder. With `encoder`, what PEFT drops stands beside it as
/// libpeft would have written it.
struct Folder {
  Folder(const std::string& name, bool encoder = true) {
    const auto from = golden("additive/" + name);
    fs::copy(from + "/adapter", path);
    if (encoder && fs::exists(from + "/encoder.safetensors")) {
      fs::copy(from + "/encoder.safetensors", path + "/" + kTraining);
    }
    reference = peft::load_safetensors(from + "/reference.safetensors");
  }

  TemporaryDirectory directory;
  std::string path = directory / "adapter";
  Tensors reference;
};

/// Loads PEFT's adapter, compares the output, the loss, the gradients and three
/// SGD steps of 0.1, and what is saved afterwards. `forward` gives the logits,
/// `loss` what they cost.
template <class Forward, class Loss>
void check_golden(
    const std::string& name,
    torch::nn::Module& model,
    Forward&& forward,
    Loss&& loss,
    double output_tolerance = 1e-6) {
  INFO(name);
  Folder folder(name);
  auto& want = folder.reference;
  auto adapter = peft::load(model, folder.path);
  std::map<std::string, Tensor> parameters;
  for (const auto& item : adapter.named_parameters()) {
    const bool is_head = want.count("step.base_model." + item.key()) != 0;
    parameters[(is_head ? "base_model." : "") + item.key()] = item.value();
  }
  size_t count = 0;
  for (const auto& item : want) {
    count += item.first.rfind("gradient.", 0) == 0;
  }
  REQUIRE(parameters.size() == count);

  torch::optim::SGD optimizer(adapter.parameters(), 0.1);
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    const Tensor logits = forward(want);
    const Tensor cost = loss(logits, want.at("labels"));
    if (step == 0) {
      Tensor output = logits.detach();
      const auto mask = want.count("decoder_attention_mask") != 0
          ? want.at("decoder_attention_mask")
          : want.at("attention_mask");
      if (output.dim() == 3) { // zeros where the query is padding
        output = output *
            at::constant_pad_nd(mask, {output.size(1) - mask.size(1), 0}, 1)
                .unsqueeze(-1);
      }
      CHECK(agrees(output, want.at("output"), output_tolerance));
      CHECK(agrees(cost.detach().reshape({1}), want.at("loss"), 1e-6));
    }
    cost.backward();
    for (const auto& [key, p] : parameters) {
      INFO(key);
      REQUIRE(p.grad().defined());
      if (step == 0) {
        CHECK(agrees(p.grad(), want.at("gradient." + key), 1e-5));
      }
    }
    optimizer.step();
  }
  for (const auto& [key, p] : parameters) {
    INFO(key);
    CHECK(agrees(p, want.at("step." + key), 1e-5));
  }
  peft::save(adapter, folder.path);
  const auto file = peft::load_safetensors(folder.path + "/" + kWeights);
  const auto made = want.find("step.prompt_embeddings");
  REQUIRE(file.count("prompt_embeddings") == 1);
  CHECK(agrees(file.at("prompt_embeddings"), made->second, 1e-5));
  for (const auto& [key, value] : file) {
    INFO(key);
    CHECK(want.count("step." + key) == 1);
  }
  adapter.detach();
}

template <class Decoder>
void check_decoder(const std::string& name) {
  auto model = decoders::load<Decoder>();
  check_golden(
      name,
      *model,
      [&](const Tensors& want) {
        return model->forward(want.at("input_ids"), want.at("attention_mask"));
      },
      [](const Tensor& logits, const Tensor& labels) {
        return decoders::next_token_loss(
            logits, peft::extend_labels(labels, logits));
      });
}

peft::models::T5Options t5_options(bool gated) {
  return peft::models::T5Options()
      .vocab_size(48)
      .d_model(16)
      .d_kv(6)
      .d_ff(24)
      .num_layers(2)
      .num_heads(4)
      .relative_attention_num_buckets(8)
      .relative_attention_max_distance(12)
      .dropout_rate(0)
      .feed_forward_proj(gated ? "gated-gelu" : "relu")
      .tie_word_embeddings(!gated);
}

peft::models::T5ForConditionalGeneration t5(bool gated) {
  peft::models::T5ForConditionalGeneration model(t5_options(gated));
  peft::load_base(*model, golden(gated ? "models/t5_v1_1" : "models/t5_v1_0"));
  model->eval();
  return model;
}

void check_t5(const std::string& name, bool gated) {
  auto model = t5(gated);
  check_golden(
      name,
      *model,
      [&](const Tensors& want) {
        return model->forward(
            want.at("input_ids"),
            want.at("attention_mask"),
            want.at("decoder_input_ids"),
            want.at("decoder_attention_mask"));
      },
      [](const Tensor& logits, const Tensor& labels) {
        return torch::nn::functional::cross_entropy(
            logits.flatten(0, 1), labels.flatten());
      },
      // T5's scores are not scaled: in float32 transformers' own logits of the
      // tiny v1.1 are 6e-6 of the largest from its float64 ones.
      gated ? 1e-5 : 1e-6);
}

void check_bert(const std::string& name) {
  peft::models::BertForSequenceClassification model(
      peft::models::BertOptions()
          .vocab_size(48)
          .hidden_size(16)
          .num_hidden_layers(2)
          .num_attention_heads(4)
          .intermediate_size(24)
          .max_position_embeddings(32)
          .hidden_dropout_prob(0)
          .attention_probs_dropout_prob(0)
          .num_labels(3));
  peft::load_base(*model, golden("models/bert"));
  model->eval();
  check_golden(
      name,
      *model,
      [&](const Tensors& want) {
        return model->forward(want.at("input_ids"), want.at("attention_mask"));
      },
      [](const Tensor& logits, const Tensor& labels) {
        return torch::nn::functional::cross_entropy(logits, labels);
      });
}

own::Decoder own_decoder() {
  seed(1);
  own::Decoder model;
  model->to(torch::kDouble);
  model->eval();
  return model;
}

/// The names in a safetensors file.
std::vector<std::string> keys(const std::string& path) {
  std::vector<std::string> result;
  for (const auto& item : peft::load_safetensors(path)) {
    result.push_back(item.first);
  }
  return result;
}

} // namespace

TEST_CASE("HF's prompts, P-tuning and prefixes compute what they did there") {
  check_decoder<Gpt2>("prompt_gpt2");
  check_decoder<Llama>("prompt_llama");
  check_decoder<Gpt2>("ptuning_lstm_gpt2");
  check_decoder<Llama>("ptuning_mlp_llama");
  check_decoder<Gpt2>("prefix_gpt2");
  check_decoder<Llama>("prefix_llama");
  check_decoder<Gpt2>("prefix_mlp_gpt2");
  check_decoder<Llama>("prefix_mlp_llama");
  check_bert("prompt_bert");
  check_bert("ptuning_mlp_bert");
  check_bert("prefix_bert");
  check_t5("prompt_t5_v1_0", false);
  check_t5("prompt_t5_v1_1", true);
  check_t5("ptuning_lstm_t5_v1_1", true);
  check_t5("prefix_t5_v1_0", false);
  check_t5("prefix_mlp_t5_v1_1", true);
}

TEST_CASE("HF's folders are written again as they were") {
  const std::string name = GENERATE(
      as<std::string>(),
      "prompt_bert",
      "prompt_gpt2",
      "prompt_t5_v1_0",
      "prompt_t5_v1_1",
      "ptuning_mlp_llama",
      "ptuning_lstm_t5_v1_1",
      "prefix_llama",
      "prefix_t5_v1_0",
      "prefix_mlp_gpt2",
      "prefix_mlp_t5_v1_1");
  INFO(name);
  const bool is_bert = name == "prompt_bert";
  std::shared_ptr<torch::nn::Module> model;
  if (is_bert) {
    model = peft::models::BertForSequenceClassification(
                peft::models::BertOptions()
                    .vocab_size(48)
                    .hidden_size(16)
                    .num_hidden_layers(2)
                    .num_attention_heads(4)
                    .intermediate_size(24)
                    .max_position_embeddings(32)
                    .num_labels(3))
                .ptr();
  } else if (contains(name, "gpt2")) {
    model = decoders::load<Gpt2>().ptr();
  } else if (contains(name, "llama")) {
    model = decoders::load<Llama>().ptr();
  } else {
    model = t5(contains(name, "v1_1")).ptr();
  }
  const Folder folder(name, /*encoder=*/false);
  auto adapter = peft::load(*model, folder.path);
  const std::string again = folder.directory / "again";
  peft::save(adapter, again);
  CHECK_FALSE(fs::exists(again + "/" + kTraining));
  CHECK(
      peft::AdapterConfig::read(again + "/" + kConfig).dump() ==
      peft::AdapterConfig::read(folder.path + "/" + kConfig).dump());
  const auto before = peft::load_safetensors(folder.path + "/" + kWeights);
  const auto after = peft::load_safetensors(again + "/" + kWeights);
  REQUIRE(after.size() == before.size());
  for (const auto& [key, value] : before) {
    INFO(key);
    CHECK(equal_bits(after.at(key), value));
  }
}

TEST_CASE("training goes on from a folder as if it had not stopped") {
  struct Row {
    std::string name;
    std::function<peft::Adapter(torch::nn::Module&)> attach;
    bool has_encoder;
  };
  const auto row = [](const std::string& name, auto options, bool encoder) {
    return Row{
        name,
        [options](torch::nn::Module& model) {
          return peft::attach(model, options);
        },
        encoder};
  };
  const std::vector<Row> rows{
      row("prompt", PromptOptions(3), false),
      row("P-tuning, MLP", PTuningOptions(3).encoder_hidden_size(5), true),
      row("P-tuning, LSTM",
          PTuningOptions(3).encoder_reparameterization_type("LSTM"),
          true),
      row("prefix", PrefixOptions(3), false),
      row("projected prefix",
          PrefixOptions(3).prefix_projection(true).encoder_hidden_size(5),
          true),
      row("a head as well", PTuningOptions(3).modules_to_save({"head"}), true)};
  for (const auto& each : rows) {
    INFO(each.name);
    auto model = own_decoder();
    const Tensor ids = own::ids(3, 5);
    const auto train = [&](own::Decoder& net, const peft::Adapter& adapter) {
      torch::optim::SGD optimizer(adapter.parameters(), 0.1);
      for (int i = 0; i < 2; ++i) {
        optimizer.zero_grad();
        const Tensor logits = net->forward(ids);
        decoders::next_token_loss(logits, peft::extend_labels(ids, logits))
            .backward();
        optimizer.step();
      }
    };
    auto adapter = each.attach(*model);
    train(model, adapter);
    const Tensor acting = model->forward(ids).detach();
    TemporaryDirectory directory;
    const std::string folder = directory / "adapter";
    peft::save(adapter, folder);
    CHECK(fs::exists(folder + "/" + kTraining) == each.has_encoder);
    train(model, adapter);
    const Tensor later = model->forward(ids).detach();
    CHECK_FALSE(close(later, acting));

    auto fresh = own_decoder();
    auto loaded = peft::load(*fresh, folder);
    CHECK(equal_bits(fresh->forward(ids), acting));
    CHECK(loaded.method() == adapter.method());
    CHECK(
        loaded.named_parameters().keys() == adapter.named_parameters().keys());
    train(fresh, loaded);
    CHECK(equal_bits(fresh->forward(ids), later));
    peft::save(loaded, directory / "again");
    CHECK(
        peft::AdapterConfig::read(folder + "/" + kConfig).dump() ==
        peft::AdapterConfig::read(directory / ("again/" + std::string(kConfig)))
            .dump());

    // Frozen, or without the file beside, it is what HF PEFT would have.
    auto frozen = own_decoder();
    auto still = peft::load(
        *frozen, folder, "x", peft::LoadOptions().is_trainable(false));
    CHECK(close(frozen->forward(ids), acting, 1e-12, 1e-12));
    for (const auto& p : still.parameters()) {
      CHECK_FALSE(p.requires_grad());
    }
    fs::remove(folder + "/" + kTraining);
    auto alone = own_decoder();
    auto rows_only = peft::load(*alone, folder);
    CHECK(close(alone->forward(ids), acting, 1e-12, 1e-12));
    CHECK(still.num_parameters() == rows_only.num_parameters());
    CHECK(
        (rows_only.num_parameters() < adapter.num_parameters()) ==
        each.has_encoder);
  }
}

TEST_CASE("a file that was ejected or replaced") {
  auto model = own_decoder();
  const Tensor ids = own::ids(2, 4);
  auto adapter = peft::attach(*model, PrefixOptions(3).prefix_projection(true));
  TemporaryDirectory directory;
  const std::string folder = directory / "adapter";
  peft::save(adapter, folder);
  const auto tensors = peft::load_safetensors(folder + "/" + kTraining);
  CHECK(tensors.size() == 5);

  // Weights of another adapter beside this one's training state.
  randomise(adapter);
  peft::save(adapter, directory / "other");
  fs::copy_file(
      directory / ("other/" + std::string(kWeights)),
      folder + "/" + kWeights,
      fs::copy_options::overwrite_existing);
  auto fresh = own_decoder();
  const auto before = state_of(*fresh);
  const auto error = error_of([&] { peft::load(*fresh, folder); });
  CHECK(contains(error, kTraining));
  CHECK(contains(error, "does not belong to the weights beside it"));
  CHECK(contains(error, "Remove the file"));
  CHECK(same_state(state_of(*fresh), before));

  // Without its MLP a prefix is saved as a table, over what was there.
  peft::eject_reparameterization(adapter);
  const Tensor acting = model->forward(ids);
  peft::save(adapter, folder);
  CHECK_FALSE(fs::exists(folder + "/" + kTraining));
  peft::load(*fresh, folder);
  CHECK(equal_bits(fresh->forward(ids), acting));
}

TEST_CASE("files of prompts have HF's keys and fields") {
  auto model = own_decoder();
  TemporaryDirectory directory;
  const auto saved = [&](const auto& options) {
    auto adapter = peft::attach(*model, options);
    const std::string folder = directory / "adapter";
    peft::save(adapter, folder);
    adapter.detach();
    return peft::AdapterConfig::read(folder + "/" + kConfig);
  };
  const auto weights = [&] {
    return keys(directory / ("adapter/" + std::string(kWeights)));
  };
  auto config = saved(PromptOptions(3).init("vocab").modules_to_save({"head"}));
  CHECK(
      weights() ==
      std::vector<std::string>{
          "base_model.head.bias",
          "base_model.head.weight",
          "prompt_embeddings"});
  CHECK(config.peft_type() == "PROMPT_TUNING");
  CHECK(config.get<std::string>("prompt_tuning_init") == "SAMPLE_VOCAB");
  CHECK(config.get<std::string>("task_type") == "CAUSAL_LM");
  CHECK(config.get<int64_t>("num_virtual_tokens") == 3);
  CHECK(config.get<int64_t>("token_dim") == own::kHidden);
  CHECK(config.get<int64_t>("num_layers") == own::kLayers);
  CHECK(config.get<int64_t>("num_transformer_submodules") == 1);
  CHECK(config.get<bool>("inference_mode"));
  CHECK(
      config.fields() ==
      peft::AdapterConfig::read(
          golden("additive/prompt_gpt2/adapter/adapter_config.json"))
          .fields());

  config = saved(PTuningOptions(3).task_type("TOKEN_CLS"));
  CHECK(weights() == std::vector<std::string>{"prompt_embeddings"});
  CHECK(config.peft_type() == "P_TUNING");
  CHECK(config.get<std::string>("task_type") == "TOKEN_CLS");
  CHECK(config.get<int64_t>("encoder_hidden_size") == own::kHidden);
  CHECK(
      config.fields() ==
      peft::AdapterConfig::read(
          golden("additive/ptuning_mlp_llama/adapter/adapter_config.json"))
          .fields());

  config = saved(PrefixOptions(3).init("zero"));
  CHECK(weights() == std::vector<std::string>{"prompt_embeddings"});
  CHECK(config.peft_type() == "PREFIX_TUNING");
  CHECK(config.get<std::string>("init_weights") == "zero");
  CHECK(config.get<int64_t>("num_attention_heads") == own::kKeyHeads);
  CHECK(config.get<int64_t>("token_dim") == own::kKeyHeads * own::kHeadDim);
  CHECK(
      config.fields() ==
      peft::AdapterConfig::read(
          golden("additive/prefix_gpt2/adapter/adapter_config.json"))
          .fields());
}

TEST_CASE("files of what HF PEFT cannot run come back") {
  auto model = t5(true);
  const Tensor ids = torch::randint(1, 48, {2, 5}, torch::kLong);
  const Tensor answer = torch::randint(1, 48, {2, 3}, torch::kLong);
  const Tensor before = model->forward(ids, {}, answer);
  const auto check = [&](const auto& options,
                         const std::vector<std::string>& names) {
    TemporaryDirectory directory;
    const std::string folder = directory / "adapter";
    auto adapter = peft::attach(*model, options);
    const Tensor acting = model->forward(ids, {}, answer).detach();
    peft::save(adapter, folder);
    CHECK(keys(folder + "/" + kWeights) == names);
    CHECK(
        peft::AdapterConfig::read(folder + "/" + kConfig)
            .template get<std::string>("task_type") == "SEQ_2_SEQ_LM");
    adapter.detach();
    CHECK(equal_bits(model->forward(ids, {}, answer), before));
    auto loaded = peft::load(*model, folder);
    CHECK(equal_bits(model->forward(ids, {}, answer), acting));
    CHECK(loaded.num_parameters() > 0);
    loaded.detach();
  };
  const std::string rest = ".prompt_embeddings";
  check(PromptOptions(3), {"encoder.extra_tokens" + rest});
  check(PromptOptions(3).num_transformer_submodules(1), {"prompt_embeddings"});
  check(PromptOptions(3).prompts_decoder(false), {"prompt_embeddings"});
  check(PTuningOptions(3), {"encoder.extra_tokens" + rest});
  check(PrefixOptions(3), {"decoder.extra_tokens" + rest});
  check(PrefixOptions(3).hf_layer_order(true), {"prompt_embeddings"});
  check(
      PrefixOptions(3)
          .stacks({"encoder", "decoder", "cross"})
          .prefix_projection(true),
      {"decoder.cross_extra_tokens" + rest,
       "decoder.extra_tokens" + rest,
       "encoder.extra_tokens" + rest});
}

TEST_CASE("folders that do not fit say why") {
  auto model = decoders::load<Llama>();
  const auto before = state_of(*model);
  const auto error_with = [&](const std::string& name, auto&& edit) {
    const Folder folder(name, /*encoder=*/false);
    auto config = peft::AdapterConfig::read(folder.path + "/" + kConfig);
    edit(config);
    config.write(folder.path + "/" + kConfig);
    const auto error = error_of([&] { peft::load(*model, folder.path); });
    CHECK(same_state(state_of(*model), before));
    return error;
  };
  using Config = peft::AdapterConfig;
  auto error = error_with("prompt_llama", [](Config& c) {
    c.set("num_virtual_tokens", int64_t{5});
  });
  CHECK(contains(error, "prompt_embeddings: shape [4, 16] where [5, 16] fits"));
  error = error_with(
      "prompt_llama", [](Config& c) { c.erase("num_virtual_tokens"); });
  CHECK(contains(error, "num_virtual_tokens"));
  // The same width in other heads would be another prefix.
  error = error_with("prefix_llama", [](Config& c) {
    c.set("num_attention_heads", int64_t{4});
  });
  CHECK(contains(error, "num_attention_heads is 4"));
  CHECK(contains(error, "'model.extra_tokens' has 2"));
  error = error_with(
      "prefix_llama", [](Config& c) { c.set("num_layers", int64_t{3}); });
  CHECK(contains(error, "num_layers is 3"));
  error = error_with("prefix_gpt2", [](Config&) {}); // 4 heads, not 2
  CHECK(contains(error, "num_attention_heads is 4"));
  error = error_with("prompt_t5_v1_0", [](Config&) {}); // two stacks
  CHECK(contains(error, "num_transformer_submodules is 2"));
  error = error_with("prompt_bert", [](Config&) {}); // a head it has not
  CHECK(contains(error, "unexpected in the file"));
  CHECK(contains(error, "classifier.weight"));
}

} // namespace test_prompt_files
