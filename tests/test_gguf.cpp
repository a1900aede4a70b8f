// LoRA as GGUF: the bytes of llama.cpp's own writer (golden/make_gguf.py), and
// what is refused.

#include "test.h"

#include "tiny_models.h"

#include <nlohmann/json.hpp>

#include <cstdlib>
#include <fstream>
#include <iterator>

namespace test_gguf {

namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using peft::GgufOptions;
using peft::LoraOptions;
using torch::Tensor;

std::string bytes_of(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  REQUIRE(file.good());
  return {std::istreambuf_iterator<char>(file), {}};
}

/// Where two files first differ, in words.
std::string difference(const std::string& a, const std::string& b) {
  if (a == b) {
    return {};
  }
  const auto at = static_cast<size_t>(std::distance(
      a.begin(), std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first));
  return "sizes " + std::to_string(a.size()) + " and " +
      std::to_string(b.size()) + ", first difference at byte " +
      std::to_string(at);
}

/// A tensor as a GGUF file describes it.
struct Entry {
  std::vector<uint64_t> dimensions; // the fastest first
  uint32_t type;
  const char* data;
};

/// A reader of its own, for what the fixtures do not hold.
struct Reader {
  explicit Reader(const fs::path& path) : bytes(bytes_of(path)) {
    REQUIRE(take(4) == "GGUF");
    REQUIRE(number<uint32_t>() == 3);
    const auto tensors = number<uint64_t>(), keys = number<uint64_t>();
    for (uint64_t i = 0; i < keys; ++i) {
      const auto key = text();
      if (number<uint32_t>() == 8) {
        texts[key] = text();
      } else {
        floats[key] = number<float>();
      }
    }
    std::map<std::string, uint64_t> offsets;
    for (uint64_t i = 0; i < tensors; ++i) {
      const auto name = text();
      Entry entry{};
      for (auto n = number<uint32_t>(); n > 0; --n) {
        entry.dimensions.push_back(number<uint64_t>());
      }
      entry.type = number<uint32_t>();
      offsets[name] = number<uint64_t>();
      entries[name] = entry;
    }
    const size_t begin = (at + 31) / 32 * 32;
    for (auto& [name, entry] : entries) {
      REQUIRE(offsets[name] % 32 == 0);
      entry.data = bytes.data() + begin + offsets[name];
    }
  }

  /// A float32 tensor as [slow, fast].
  Tensor at_name(const std::string& name) const {
    const Entry& entry = entries.at(name);
    REQUIRE(entry.type == 0);
    const auto fast = static_cast<int64_t>(entry.dimensions.at(0));
    const auto slow = static_cast<int64_t>(entry.dimensions.at(1));
    Tensor result = torch::empty({slow, fast});
    std::memcpy(result.data_ptr(), entry.data, result.nbytes());
    return result;
  }

  std::string take(size_t count) {
    at += count;
    REQUIRE(at <= bytes.size());
    return bytes.substr(at - count, count);
  }
  template <class T>
  T number() {
    T value;
    const auto raw = take(sizeof(T));
    std::memcpy(&value, raw.data(), sizeof(T));
    return value;
  }
  std::string text() {
    return take(number<uint64_t>());
  }

  std::string bytes;
  size_t at = 0;
  std::map<std::string, std::string> texts;
  std::map<std::string, float> floats;
  std::map<std::string, Entry> entries;
};

struct Case {
  explicit Case(const std::string& name)
      : folder(fs::path(golden("gguf")) / name) {
    std::ifstream file(folder / "case.json");
    facts = json::parse(file);
  }
  std::shared_ptr<torch::nn::Module> module() const {
    return tiny_models::load(facts.at("network").get<std::string>()).module;
  }
  GgufOptions options() const {
    return GgufOptions(facts.at("architecture").get<std::string>())
        .heads(facts.value("heads", 0))
        .kv_heads(facts.value("kv_heads", 0));
  }
  fs::path folder;
  json facts;
};

std::shared_ptr<torch::nn::Module> llama() {
  return tiny_models::load("llama").module;
}

peft::Adapter random_lora(
    torch::nn::Module& module,
    const LoraOptions& options,
    const std::string& name = "default") {
  auto adapter = peft::attach(module, options, name);
  const torch::NoGradGuard no_grad;
  for (auto& p : adapter.parameters()) {
    p.copy_(0.3 * torch::randn_like(p));
  }
  return adapter;
}

} // namespace

TEST_CASE("gguf: byte for byte what llama.cpp's writer writes") {
  for (const auto& entry : fs::directory_iterator(golden("gguf"))) {
    const auto name = entry.path().filename().string();
    DYNAMIC_SECTION(name) {
      const Case c(name);
      const auto module = c.module();
      const auto adapter = peft::load(*module, (c.folder / "adapter").string());
      const TemporaryDirectory directory;
      const std::vector<std::pair<std::string, at::ScalarType>> kinds{
          {"expected", at::kFloat},
          {"float16", at::kHalf},
          {"bfloat16", at::kBFloat16}};
      for (const auto& [file, dtype] : kinds) {
        const auto expected = c.folder / (file + ".gguf");
        if (!fs::exists(expected)) {
          continue;
        }
        INFO(file);
        peft::save_gguf_lora(
            adapter, directory / "own.gguf", c.options().dtype(dtype));
        REQUIRE(
            difference(bytes_of(directory / "own.gguf"), bytes_of(expected)) ==
            "");
      }
    }
  }
}

TEST_CASE("gguf: alpha over the rank is the scaling, at every site") {
  const auto module = llama();
  torch::manual_seed(1);
  auto adapter = random_lora(
      *module,
      LoraOptions(4)
          .alpha(8)
          .rslora(true)
          .targets({"q_proj", "v_proj", "o_proj"})
          .rank_pattern({{"v_proj", 2}})
          .alpha_pattern({{"o_proj", 0}}));
  const TemporaryDirectory directory;
  peft::save_gguf_lora(
      adapter, directory / "a.gguf", GgufOptions("llama").heads(4));
  const Reader file(directory / "a.gguf");
  const double alpha = file.floats.at("adapter.lora.alpha");
  REQUIRE(alpha == 16.0); // 8 / √4 · 4
  const auto change = [&](const std::string& name) {
    const auto a = file.at_name(name + ".weight.lora_a");
    const auto b = file.at_name(name + ".weight.lora_b");
    return (alpha / static_cast<double>(b.size(1))) * b.mm(a);
  };
  for (const auto& site : adapter.shared_state()->sites) {
    const auto& delta = dynamic_cast<const peft::LoraDelta&>(*site.delta);
    const auto tensor =
        peft::detail::gguf_name(peft::detail::gguf_names("llama"), site.name);
    Tensor want =
        delta.config().scaling * delta.lora_B.mm(delta.lora_A).detach();
    if (contains(tensor, "attn_q")) { // heads of 4 rows: 0 2 1 3
      want = want.view({4, 2, 2, 16}).transpose(1, 2).reshape({16, 16});
    }
    INFO(tensor);
    REQUIRE(close(
        change(tensor), want, 0, 1e-6 * (want.abs().max().item<double>() + 1)));
  }
}

TEST_CASE("gguf: an adapter that does nothing does nothing") {
  const auto module = llama();
  auto adapter =
      random_lora(*module, LoraOptions(2).alpha(0).targets({"v_proj"}));
  const TemporaryDirectory directory;
  peft::save_gguf_lora(adapter, directory / "a.gguf", GgufOptions("llama"));
  const Reader file(directory / "a.gguf");
  REQUIRE(file.floats.at("adapter.lora.alpha") != 0.0f); // 0 means 1 there
  REQUIRE(
      file.at_name("blk.0.attn_v.weight.lora_b").abs().max().item<float>() ==
      0.0f);
}

TEST_CASE("gguf: a start that is taken off the base is written as ranks") {
  for (const std::string name : {"llama", "gpt2"}) {
    const auto module = tiny_models::load(name).module;
    const bool is_llama = name == "llama";
    auto adapter = random_lora(
        *module,
        LoraOptions(2).init("pissa").targets(
            is_llama ? "v_proj" : "mlp.c_proj"));
    const TemporaryDirectory directory;
    peft::save_gguf_lora(adapter, directory / "a.gguf", GgufOptions(name));
    const Reader file(directory / "a.gguf");
    const std::string tensor = is_llama ? "blk.1.attn_v" : "blk.1.ffn_down";
    const auto a = file.at_name(tensor + ".weight.lora_a");
    const auto b = file.at_name(tensor + ".weight.lora_b");
    REQUIRE(b.size(1) == 4);
    const double scale = file.floats.at("adapter.lora.alpha") / 4.0;
    const Tensor w = module->named_parameters()
                         [is_llama ? "model.layers.1.self_attn.v_proj.weight"
                                   : "transformer.h.1.mlp.c_proj.weight"];
    Tensor want = (peft::effective(w) - peft::base(w)).detach();
    want = is_llama ? want : want.t();
    INFO(name);
    REQUIRE(close(
        scale * b.mm(a), want, 0, 2e-6 * want.abs().max().item<double>()));
  }
}

TEST_CASE("gguf: names of one's own") {
  auto module = std::make_shared<torch::nn::Module>();
  auto list = module->register_module("stack", torch::nn::ModuleList());
  for (int i = 0; i < 12; ++i) {
    list->push_back(torch::nn::Linear(4, 4));
  }
  auto adapter =
      random_lora(*module, LoraOptions(2).targets({"stack.3", "stack.11"}));
  const TemporaryDirectory directory;
  peft::save_gguf_lora(
      adapter,
      directory / "a.gguf",
      GgufOptions("mamba").name("mine").names(
          {{"stack.3", "output"}, {"stack.#", "blk.#.ssm_in"}}));
  const Reader file(directory / "a.gguf");
  REQUIRE(file.texts.at("general.name") == "mine");
  REQUIRE(file.texts.at("general.architecture") == "mamba");
  REQUIRE(file.entries.count("output.weight.lora_a") == 1);
  REQUIRE(file.entries.count("blk.11.ssm_in.weight.lora_b") == 1);
  REQUIRE(file.entries.size() == 4);
}

TEST_CASE("gguf: another method becomes a LoRA first") {
  const auto module = llama();
  torch::manual_seed(1);
  auto adapter =
      peft::attach(*module, peft::LoKrOptions(2).targets({"q_proj", "v_proj"}));
  {
    const torch::NoGradGuard no_grad;
    for (auto& p : adapter.parameters()) {
      p.copy_(torch::randn_like(p));
    }
  }
  const TemporaryDirectory directory;
  const auto lora =
      peft::convert_to_lora(adapter, peft::ConvertToLoraOptions(16)).adapter;
  peft::save_gguf_lora(
      lora, directory / "a.gguf", GgufOptions("llama").heads(4));
  const Reader file(directory / "a.gguf");
  const Tensor v =
      module->named_parameters()["model.layers.1.self_attn.v_proj.weight"];
  const Tensor want = (peft::effective(v) - peft::base(v)).detach();
  const auto a = file.at_name("blk.1.attn_v.weight.lora_a");
  const auto b = file.at_name("blk.1.attn_v.weight.lora_b");
  const double scale =
      file.floats.at("adapter.lora.alpha") / static_cast<double>(b.size(1));
  REQUIRE(
      close(scale * b.mm(a), want, 0, 2e-6 * want.abs().max().item<double>()));
}

TEST_CASE("gguf: what llama.cpp does not take is refused") {
  const TemporaryDirectory directory;
  const std::string path = directory / "a.gguf";
  const auto error = [&](const peft::Adapter& adapter,
                         const GgufOptions& options) {
    const auto text =
        error_of([&] { peft::save_gguf_lora(adapter, path, options); });
    REQUIRE_FALSE(fs::exists(path));
    return text;
  };
  const auto of = [&](auto lora, const GgufOptions& options) {
    const auto module = llama();
    return error(peft::attach(*module, lora), options);
  };
  const LoraOptions q = LoraOptions(2).targets({"q_proj"});
  const GgufOptions llama_options = GgufOptions("llama").heads(4);
  struct Row {
    std::string got, part;
  };
  const std::vector<Row> rows{
      {of(q, GgufOptions()), "set architecture(...)"},
      {of(q, GgufOptions("starcoder")), "'starcoder' is not one of"},
      {of(q, GgufOptions("llama")), "set heads(...)"},
      {of(q, GgufOptions("llama").heads(3)), "do not make 3 heads"},
      {of(q, GgufOptions("gpt2")), "is not among the weights of 'gpt2'"},
      {of(q, GgufOptions(llama_options).dtype(at::kDouble)), "not Double"},
      {of(LoraOptions(q).dora(true), llama_options), "has no magnitudes"},
      {of(LoraOptions(q).modules_to_save({"lm_head"}), llama_options),
       "no place for 'trained weight' at 'lm_head.weight'"},
      {of(peft::LoHaOptions(2).targets({"q_proj"}), llama_options),
       "is of method LOHA; convert_to_lora()"},
  };
  for (const auto& row : rows) {
    INFO(row.got);
    INFO(row.part);
    REQUIRE(contains(row.got, row.part));
  }
  {
    auto module = std::make_shared<torch::nn::Module>();
    module->register_module(
        "conv", torch::nn::Conv1d(torch::nn::Conv1dOptions(2, 2, 3)));
    REQUIRE(contains(
        error(
            peft::attach(*module, LoraOptions(2).targets({"conv"})),
            GgufOptions("x").names({{"conv", "conv"}})),
        "'conv' has the shape [2, 2, 3]"));
  }
  {
    const auto module = tiny_models::load("gpt2").module;
    REQUIRE(contains(
        error(
            peft::attach(*module, LoraOptions(2).targets({"wte"})),
            GgufOptions("gpt2")),
        "is tied to 'lm_head.weight'"));
  }
  {
    const auto module = llama();
    auto adapter = random_lora(*module, LoraOptions(2).targets({"v_proj"}));
    {
      const torch::NoGradGuard no_grad;
      adapter.parameters()[0].fill_(1e6);
    }
    REQUIRE(contains(
        error(adapter, GgufOptions("llama").dtype(at::kHalf)),
        "are not finite in Half"));
    REQUIRE(contains(
        error(
            adapter,
            GgufOptions("x").names(
                {{"model.layers.0.self_attn.v_proj", "one"},
                 {"model.layers.1.self_attn.v_proj", "one"}})),
        "two tensors would be called 'one.weight.lora_a'"));
    REQUIRE(contains(
        error(
            adapter,
            GgufOptions("x").names(
                {{"model.layers.#.self_attn.v_proj", "one"}})),
        "must each have one # for the layer's number, or none"));
    REQUIRE(contains(
        error(
            adapter,
            GgufOptions("x").names(
                {{"model.layers.#.self_attn.v_proj",
                  "blk.#." + std::string(60, 'v')}})),
        "longer than the 63 bytes"));
  }
}

TEST_CASE("gguf: files for check_gguf.py to read with gguf-py") {
  TemporaryDirectory own;
  const char* wanted = std::getenv("PEFT_GGUF_DIR");
  const fs::path root = wanted != nullptr ? fs::path(wanted) : own.path();
  const auto write = [&](const std::string& name,
                         const std::string& network,
                         const LoraOptions& lora,
                         const GgufOptions& options,
                         json facts) {
    const auto module = tiny_models::load(network).module;
    torch::manual_seed(1);
    const auto adapter = random_lora(*module, lora);
    fs::create_directories(root / name);
    peft::save(adapter, (root / name / "adapter").string());
    peft::save_gguf_lora(
        adapter, (root / name / "adapter.gguf").string(), options);
    facts["architecture"] = options.architecture();
    facts["heads"] = options.heads();
    facts["kv_heads"] = options.kv_heads();
    std::ofstream(root / name / "case.json") << facts.dump(1) << '\n';
    REQUIRE(fs::file_size(root / name / "adapter.gguf") % 32 == 0);
  };
  const GgufOptions llama_options = GgufOptions("llama").heads(4).kv_heads(2);
  const auto all = LoraOptions(3).alpha(5).targets(
      {"q_proj",
       "k_proj",
       "v_proj",
       "o_proj",
       "gate_proj",
       "up_proj",
       "down_proj",
       "embed_tokens",
       "lm_head"});
  write("llama", "llama", all, llama_options, {});
  write(
      "llama_rslora",
      "llama",
      LoraOptions(all).rslora(true),
      llama_options,
      {});
  write(
      "llama_patterns",
      "llama",
      LoraOptions(all)
          .rank_pattern({{"q_proj", 2}, {"down_proj", 5}})
          .alpha_pattern({{"v_proj", 1}, {"o_proj", -3}}),
      llama_options,
      {});
  write(
      "llama_half",
      "llama",
      all,
      GgufOptions(llama_options).dtype(at::kHalf),
      {{"tolerance", 2e-3}});
  write(
      "llama_bfloat16",
      "llama",
      all,
      GgufOptions(llama_options).dtype(at::kBFloat16),
      {{"tolerance", 2e-2}});
  write(
      "gpt2",
      "gpt2",
      LoraOptions(3).targets({"c_attn", "c_proj", "c_fc"}),
      GgufOptions("gpt2"),
      {});
  write(
      "bert",
      "bert",
      LoraOptions(3).targets({"query", "value", "output.dense"}),
      GgufOptions("bert"),
      {});
  write(
      "t5",
      "t5_v1_1",
      LoraOptions(3).targets({"q", "k", "v", "o", "wi_0", "wi_1", "wo"}),
      GgufOptions("t5"),
      {});
}

} // namespace test_gguf
