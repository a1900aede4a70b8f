/// Folders of adapters that cannot be written or read whole.

#include "model_state.h"
#include "networks.h"
#include "test.h"

#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <string>

namespace test_pretrained {

namespace fs = std::filesystem;
using torch::Tensor;

namespace {

/// The files of a folder with what is in them.
std::map<std::string, std::string> contents(const fs::path& folder) {
  std::map<std::string, std::string> result;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.is_regular_file()) {
      std::ifstream file(entry.path(), std::ios::binary);
      result[entry.path().filename().string()] = {
          std::istreambuf_iterator<char>(file), {}};
    }
  }
  return result;
}

networks::Network network() {
  seed(1);
  return networks::build("mlp");
}

} // namespace

TEST_CASE("An adapter that cannot be saved whole leaves the old one") {
  const auto net = network();
  const auto old = peft::attach(
      *net.module, peft::LoraOptions(2).init("pissa").targets({"fc1"}), "old");
  const auto other =
      peft::attach(*net.module, peft::LoraOptions(4).targets({"fc1"}), "other");
  for (const std::string name :
       {"adapter_config.json",
        "adapter_model.safetensors",
        "libpeft_training.safetensors"}) {
    INFO(name);
    const TemporaryDirectory folder;
    const std::string path = folder / "adapter";
    peft::save(old, path);
    // A folder where a file would stand.
    fs::remove(fs::path(path) / name);
    fs::create_directories(fs::path(path) / name / "in the way");
    const auto before = contents(path);
    REQUIRE(before.size() == 2);
    const auto& saved = name == "libpeft_training.safetensors" ? old : other;
    CHECK(contains(
        error_of([&] { peft::save(saved, path); }), "peft: cannot replace"));
    CHECK((contents(path) == before));
  }
}

TEST_CASE("A .bin that is not PEFT's says what it is") {
  const auto net = network();
  const TemporaryDirectory folder;
  const std::string path = folder / "adapter";
  auto adapter =
      peft::attach(*net.module, peft::LoraOptions(2).targets({"fc1"}));
  peft::save(adapter, path);
  adapter.detach();
  fs::remove(path + "/adapter_model.safetensors");
  const auto before = state_of(*net.module);
  const auto check = [&](const std::string& content, const std::string& what) {
    std::ofstream(path + "/adapter_model.bin", std::ios::binary) << content;
    const auto error = error_of([&] { peft::load(*net.module, path); });
    CHECK(contains(error, what));
    CHECK(contains(error, "save_file(dict(torch.load("));
    CHECK(same_state(state_of(*net.module), before));
  };
  check("\x80\x02\x8a\nl\xfc", "before torch 1.6");
  check("", "no archive of torch.save's");
  check("version https://git-lfs", "no archive of torch.save's");
  check("PK\x03\x04", "damaged or cut off");
}

TEST_CASE("Complex numbers are no adapter's, strict or not") {
  const auto net = network();
  const TemporaryDirectory folder;
  const std::string path = folder / "adapter";
  peft::save(
      peft::attach(*net.module, peft::LoraOptions(2).targets({"fc1"})), path);
  const std::string file = path + "/adapter_model.safetensors";
  auto tensors = peft::load_safetensors(file);
  for (auto& item : tensors) {
    item.second = item.second.to(torch::kComplexFloat);
  }
  peft::save_safetensors(tensors, file);
  const auto fresh = network();
  const auto before = state_of(*fresh.module);
  for (const bool strict : {true, false}) {
    const auto error = error_of([&] {
      peft::load(
          *fresh.module, path, "default", peft::LoadOptions().strict(strict));
    });
    CHECK(contains(
        error, "fc1.lora_A.weight: complex numbers where real ones fit"));
    CHECK(same_state(state_of(*fresh.module), before));
  }
}

} // namespace test_pretrained
