// Hugging Face PEFT's files, both ways. The folder that this program writes is
// what Python reads by
//
//   PeftModel.from_pretrained(model, "lora_folder")
//
// and a folder from Python is read by peft::load in the same way. Give a folder
// as the argument to keep it.

#include <peft/peft.h>
#include <torch/torch.h>

#include <fmt/format.h>

#include <filesystem>
#include <string>

// The names are Python's: state_dict keys such as "encoder.query.weight".
struct Net : torch::nn::Module {
  Net() {
    register_module("encoder", encoder);
    encoder->register_module("query", query);
    encoder->register_module("value", value);
    register_module("classifier", classifier);
  }
  torch::Tensor forward(const torch::Tensor& x) {
    return classifier(torch::tanh(query(x)) * value(x));
  }
  std::shared_ptr<torch::nn::Module> encoder =
      std::make_shared<torch::nn::Module>();
  torch::nn::Linear query{32, 32}, value{32, 32}, classifier{32, 4};
};

int main(int argc, char** argv) {
  torch::manual_seed(0);
  const std::string folder = argc > 1
      ? argv[1]
      : (std::filesystem::temp_directory_path() / "peft_040").string();
  Net net, other;
  torch::NoGradGuard no_grad;
  auto theirs = other.named_parameters();
  for (auto& p : net.named_parameters()) {
    theirs[p.key()].copy_(p.value()); // the same pretrained network
  }
  const auto x = torch::randn({5, 32});

  auto adapter = peft::attach(
      net,
      peft::LoraOptions(8)
          .alpha(16)
          .rslora(true)
          .targets({"query", "value"})
          .rank_pattern({{"value", 4}})
          .modules_to_save({"classifier"}));
  for (auto& p : adapter.parameters()) {
    p.add_(torch::randn_like(p) * 0.1); // stands for training
  }
  peft::save(adapter, folder);

  auto again = peft::load(other, folder);
  for (const auto& p : again.named_parameters()) {
    fmt::print("{:32} {}\n", p.key(), fmt::join(p.value().sizes(), " x "));
  }
  const bool equal = torch::equal(net.forward(x), other.forward(x));
  fmt::print("loaded, the outputs are equal to the bit: {}\n", equal);
  if (argc == 1) {
    std::filesystem::remove_all(folder);
  }
  return equal ? 0 : 1;
}
