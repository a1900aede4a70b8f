#pragma once

/// A case of golden/fuzz_with_peft.py: a network that is described by a list of
/// layers, an adapter of HF PEFT on it, and what PEFT computes. run() checks
/// all that libpeft does with it.

#include <torch/torch.h>
#include <peft/models/gpt2.h>
#include <peft/peft.h>

#include "adapter_files.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace described {

using adapter_files::as_read;
using adapter_files::find;
using adapter_files::json;
using adapter_files::TensorMap;
using torch::Tensor;
namespace fs = std::filesystem;

/// A container without a forward of its own.
struct Node : torch::nn::Module {};

/// Matrices [experts, out, in] whose products a layer adds up.
struct Experts : torch::nn::Module {
  Experts(int64_t experts, int64_t in, int64_t out) {
    stack = register_parameter("stack", torch::randn({experts, out, in}));
  }
  Tensor forward(const Tensor& x) {
    return torch::matmul(x.unsqueeze(-2).unsqueeze(-3), stack.transpose(1, 2))
        .squeeze(-2)
        .sum(-2);
  }
  Tensor stack;
};

/// The network that a list of layers describes, as Net of fuzz_with_peft.py.
struct Net : torch::nn::Module {
  explicit Net(const json& description) {
    for (const auto& layer : description) {
      steps.push_back(
          {layer.at("kind").get<std::string>(),
           layer.contains("last"),
           layer.contains("sequence_first"),
           nullptr});
      if (layer.contains("name")) {
        steps.back().module = make(layer);
        place(layer.at("name").get<std::string>(), steps.back().module);
      }
    }
  }

  Tensor forward(Tensor x) {
    for (const auto& [kind, last, sequence_first, module] : steps) {
      if (kind == "flatten") {
        x = x.flatten(1);
      } else if (kind == "mha") {
        auto* attention = module->as<torch::nn::MultiheadAttentionImpl>();
        const Tensor t = sequence_first ? x : x.transpose(0, 1);
        const Tensor y = std::get<0>(attention->forward(t, t, t));
        x = x + (sequence_first ? y : y.transpose(0, 1));
      } else {
        x = call(*module, kind, x);
        const bool plain = last || kind == "layernorm" || kind == "groupnorm";
        x = plain ? x : torch::tanh(x);
      }
    }
    return x;
  }

  struct Step {
    std::string kind;
    bool last, sequence_first;
    std::shared_ptr<torch::nn::Module> module;
  };
  std::vector<Step> steps;

 private:
  void place(
      const std::string& name,
      std::shared_ptr<torch::nn::Module> module) {
    torch::nn::Module* parent = this;
    std::istringstream parts(name);
    std::string part, next;
    std::getline(parts, part, '.');
    while (std::getline(parts, next, '.')) {
      std::shared_ptr<torch::nn::Module> child;
      for (const auto& item : parent->named_children()) {
        if (item.key() == part) {
          child = item.value();
        }
      }
      parent = child
          ? child.get()
          : parent->register_module(part, std::make_shared<Node>()).get();
      part = next;
    }
    parent->register_module(part, std::move(module));
  }

  static std::shared_ptr<torch::nn::Module> make(const json& d) {
    const auto number = [&](const char* key) {
      return d.at(key).get<int64_t>();
    };
    const auto kind = d.at("kind").get<std::string>();
    namespace nn = torch::nn;
    if (kind == "linear") {
      return nn::Linear(nn::LinearOptions(number("in"), number("out"))
                            .bias(d.at("bias").get<bool>()))
          .ptr();
    }
    if (kind == "hf_conv1d") {
      return peft::models::Conv1D(number("in"), number("out")).ptr();
    }
    if (kind == "embedding") {
      auto options = nn::EmbeddingOptions(number("rows"), number("width"));
      options.scale_grad_by_freq(d.value("scale_grad_by_freq", false));
      if (d.contains("padding_idx")) {
        options.padding_idx(number("padding_idx"));
      }
      return nn::Embedding(options).ptr();
    }
    if (kind == "experts") {
      return std::make_shared<Experts>(
          number("experts"), number("in"), number("out"));
    }
    if (kind == "mha") {
      return nn::MultiheadAttention(
                 nn::MultiheadAttentionOptions(number("width"), number("heads"))
                     .bias(d.at("bias").get<bool>()))
          .ptr();
    }
    if (kind == "layernorm") {
      return nn::LayerNorm(nn::LayerNormOptions({number("width")})).ptr();
    }
    if (kind == "groupnorm") {
      return nn::GroupNorm(number("groups"), number("width")).ptr();
    }
    return kind == "conv1d" ? convolution<1, nn::Conv1dImpl>(d)
        : kind == "conv2d"  ? convolution<2, nn::Conv2dImpl>(d)
                            : convolution<3, nn::Conv3dImpl>(d);
  }

  template <size_t D, class Impl>
  static std::shared_ptr<torch::nn::Module> convolution(const json& d) {
    const auto sizes = [&](const char* key) {
      const auto values = d.at(key).get<std::vector<int64_t>>();
      return torch::ExpandingArray<D>(values);
    };
    torch::nn::ConvOptions<D> options(
        d.at("in").get<int64_t>(), d.at("out").get<int64_t>(), sizes("kernel"));
    options.stride(sizes("stride")).dilation(sizes("dilation"));
    options.groups(d.at("groups").get<int64_t>())
        .bias(d.at("bias").get<bool>());
    if (d.at("padding").is_string()) {
      if (d.at("padding") == "same") {
        options.padding(torch::kSame);
      } else {
        options.padding(torch::kValid);
      }
    } else {
      options.padding(sizes("padding"));
    }
    const auto mode = d.at("padding_mode").get<std::string>();
    if (mode == "circular") {
      options.padding_mode(torch::kCircular);
    } else if (mode == "reflect") {
      options.padding_mode(torch::kReflect);
    } else if (mode == "replicate") {
      options.padding_mode(torch::kReplicate);
    }
    return std::make_shared<Impl>(options);
  }

  static Tensor
  call(torch::nn::Module& m, const std::string& kind, const Tensor& x) {
    using namespace torch::nn;
    return kind == "linear"   ? m.as<LinearImpl>()->forward(x)
        : kind == "hf_conv1d" ? m.as<peft::models::Conv1DImpl>()->forward(x)
        : kind == "embedding" ? m.as<EmbeddingImpl>()->forward(x)
        : kind == "experts"   ? m.as<Experts>()->forward(x)
        : kind == "layernorm" ? m.as<LayerNormImpl>()->forward(x)
        : kind == "groupnorm" ? m.as<GroupNormImpl>()->forward(x)
        : kind == "conv1d"    ? m.as<Conv1dImpl>()->forward(x)
        : kind == "conv2d"    ? m.as<Conv2dImpl>()->forward(x)
                              : m.as<Conv3dImpl>()->forward(x);
  }
};

inline json read_json(const fs::path& path) {
  std::ifstream file(path);
  return json::parse(file);
}

inline double distance(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0) {
    return 0;
  }
  const auto x = a.detach().to(torch::kDouble),
             y = b.detach().to(torch::kDouble);
  const double largest = y.abs().max().item<double>();
  return (x - y).abs().max().item<double>() / (largest > 0 ? largest : 1);
}

inline bool same_bits(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() &&
      torch::equal(a.detach(), b.detach());
}

/// Units in the last place of `exact`, rounded to the dtype of `a`.
inline double ulps(const Tensor& a, const Tensor& exact) {
  const auto type = a.scalar_type();
  const int digits = type == torch::kBFloat16 ? 8
      : type == torch::kHalf                  ? 11
      : type == torch::kFloat                 ? 24
                                              : 53;
  const int lowest = type == torch::kHalf ? -14 : -126;
  const auto e = exact.detach().to(torch::kDouble);
  const auto exponent = torch::clamp_min(
      torch::floor(torch::log2(e.abs().clamp_min(1e-300))), lowest);
  const auto unit = torch::pow(2.0, exponent - (digits - 1));
  return ((a.detach().to(torch::kDouble) - e).abs() / unit)
      .max()
      .item<double>();
}

/// One folder of fuzz_with_peft.py. Each check says what is wrong, in lines;
/// a line that begins with "refused: " is libpeft's own error.
class Case {
 public:
  using Lines = std::vector<std::string>;

  /// What libpeft writes goes below `out`.
  Case(fs::path path, fs::path out)
      : facts(read_json(path / "case.json")),
        folder_(std::move(path)),
        out_(std::move(out)),
        numbers_(peft::load_safetensors(
            (folder_ / "expected.safetensors").string())) {
    const auto name = facts.at("dtype").get<std::string>();
    dtype_ = name == "float32" ? torch::kFloat
        : name == "bfloat16"   ? torch::kBFloat16
        : name == "float16"    ? torch::kHalf
                               : torch::kDouble;
  }

  struct Check {
    std::string feature;
    void (Case::*run)();
  };
  static const std::vector<Check>& checks() {
    static const std::vector<Check> all{
        {"load", &Case::load},
        {"forward", &Case::forward},
        {"gradient", &Case::train},
        {"disable", &Case::disable},
        {"merge", &Case::merge},
        {"unmerge", &Case::unmerge},
        {"several", &Case::several},
        {"mixed batch", &Case::mixed},
        {"files", &Case::files},
        {"start", &Case::start}};
    return all;
  }

  Lines run(const Check& check) {
    failures_.clear();
    if (facts.contains("refusal")) {
      if (check.feature == "load") {
        check_refusal(facts.at("refusal").get<std::string>());
      }
      return failures_;
    }
    try {
      (this->*check.run)();
    } catch (const c10::Error& error) {
      failures_.push_back(
          std::string("refused: ") + error.what_without_backtrace());
    } catch (const std::exception& error) {
      failures_.push_back(std::string("error: ") + error.what());
    }
    return failures_;
  }

  json facts;
  Lines remarks;

 private:
  // ~~~~ the checks ~~~~

  /// What libpeft must not load: the error says `word`.
  void check_refusal(const std::string& word) {
    try {
      peft::load(*network(), given());
      failures_.push_back("loaded, though " + word);
    } catch (const c10::Error& error) {
      const std::string said = error.what_without_backtrace();
      require(said.find(word) != std::string::npos, "refused: " + said);
    }
  }

  /// The network is the one that Python built, the adapter has as many numbers.
  void load() {
    const torch::NoGradGuard no_grad;
    const double apart =
        distance(network()->forward(input()), numbers_.at("plain"));
    require(apart <= (is_half() ? 2e-2 : 1e-6), "another base network");
    const auto net = network();
    const auto adapter = peft::load(*net, given());
    // A grouped lora_A of PEFT's holds what other groups' channels get.
    bool grouped = false;
    for (const auto& layer : facts.at("layers")) {
      grouped = grouped || layer.value("groups", 1) > 1;
    }
    require(
        grouped ||
            adapter.num_parameters() == facts.at("trainable").get<int64_t>(),
        "another number of trained parameters");
  }

  void forward() {
    const auto net = network();
    const auto adapter = peft::load(*net, given());
    const torch::NoGradGuard no_grad;
    // Without gradients to compare, the output is that of the merged network.
    const auto output =
        group("gradient").empty() ? net->forward(input()) : call(*net);
    compare("output", output, 1e-6);
    require(output.scalar_type() == dtype_, "the output has another dtype");
  }

  /// Gradients, three steps, and that nothing else moves.
  void train() {
    const auto expected = group("gradient");
    if (expected.empty()) {
      return;
    }
    const auto net = network();
    auto adapter = peft::load(*net, given());
    const auto parameters = adapter.named_parameters();
    const auto optimizer = make_optimizer(adapter.parameters());
    for (int step = 0; step < 3; ++step) {
      optimizer->zero_grad();
      torch::mse_loss(call(*net), numbers_.at("target")).backward();
      for (const auto& [key, value] : step == 0 ? expected : TensorMap{}) {
        const auto own = find(parameters, key);
        require(own.defined(), "no parameter for " + key);
        if (own.defined() && own.grad().defined()) {
          compare("gradient." + key, own.grad(), 1e-5);
        } else if (own.defined()) {
          require(value.eq(0).all().item<bool>(), "no gradient for " + key);
        }
      }
      optimizer->step();
    }
    for (const auto& item : group("step")) {
      const auto own = find(parameters, item.first);
      if (own.defined()) {
        compare("step." + item.first, own, 1e-5);
      }
    }
    adapter.detach();
    require_same_parameters(*net, copies(*network()), "training changed ");
  }

  void disable() {
    const auto net = network();
    auto adapter = peft::load(*net, given());
    const torch::NoGradGuard no_grad;
    const auto on = net->forward(input());
    adapter.disable();
    require(
        same_bits(net->forward(input()), base()->forward(input())),
        "disabled, it is not the base to the bit");
    adapter.enable();
    require(
        same_bits(net->forward(input()), on),
        "enabled again, it is something else");
    adapter.detach();
    require_same_parameters(*net, copies(*network()), "detach leaves another ");
  }

  void merge() {
    const auto net = network();
    auto adapter = peft::load(*net, given());
    const torch::NoGradGuard no_grad;
    const auto on = net->forward(input());
    adapter.merge();
    const double apart = distance(net->forward(input()), on);
    const double allowed = dtype_ == torch::kBFloat16 ? 5e-2
        : dtype_ == torch::kHalf                      ? 6e-3
                                                      : 5e-6;
    require(apart <= allowed, "merged is not unmerged: " + text(apart));
    const auto expected = group("merged");
    for (const auto& item : net->named_parameters()) {
      const auto value = expected.find(item.key());
      if (value != expected.end()) {
        compare("merged." + item.key(), item.value(), 1e-6);
        check_rounding(item.key(), item.value(), value->second);
      }
    }
  }

  /// Merged and unmerged it has the base's bits, also where PEFT rounds most.
  void unmerge() {
    for (const auto dtype : {dtype_, torch::kBFloat16}) {
      const auto net = network();
      net->to(dtype);
      const auto plain = copies(*net);
      auto adapter = peft::load(*net, given());
      const auto x = input().is_floating_point() ? input().to(dtype) : input();
      const torch::NoGradGuard no_grad;
      const auto on = net->forward(x);
      for (int i = 0; i < 100; ++i) {
        adapter.merge();
        adapter.unmerge();
      }
      require(
          same_bits(net->forward(x), on), "after unmerge it is something else");
      adapter.detach();
      require_same_parameters(*net, plain, "unmerge does not restore ");
    }
  }

  /// Two on one network: each alone, both, none.
  void several() {
    const auto net = network();
    auto one = peft::load(*net, given(), "one");
    const torch::NoGradGuard no_grad;
    const auto alone = net->forward(input());
    const auto two = peft::load(*net, given(), "two");
    const auto both = net->forward(input());
    for (const char* name : {"one", "two"}) {
      const peft::ActiveAdapters scope({name});
      require(
          distance(net->forward(input()), alone) <= (is_half() ? 2e-2 : 2e-6),
          "beside another it is something else");
    }
    {
      const peft::ActiveAdapters none(std::vector<std::string>{});
      require(
          same_bits(net->forward(input()), base()->forward(input())),
          "with none active it is not the base");
    }
    require(both.isfinite().all().item<bool>(), "both give no numbers");
    one.detach();
    require(
        same_bits(net->forward(input()), alone),
        "what is left is something else");
    if (numbers_.count("both") != 0) {
      peft::load(*net, (folder_ / "second").string(), "second");
      compare("both", net->forward(input()), 1e-6);
    }
  }

  /// Rows alternate between the adapter and the base.
  void mixed() {
    if (input().dim() < 2) {
      return; // a vector has no rows
    }
    for (const auto& layer : facts.at("layers")) {
      if (layer.at("kind") == "mha" && !layer.contains("sequence_first")) {
        return; // its rows change places on the way
      }
    }
    const auto net = network();
    const auto adapter = peft::load(*net, given(), "one");
    const torch::NoGradGuard no_grad;
    const int64_t dim = batch_dim();
    std::vector<std::string> names;
    Tensor alone = net->forward(input()).clone();
    const auto base = network()->forward(input());
    for (int64_t i = 0; i < input().size(dim); ++i) {
      names.push_back(i % 2 == 0 ? "one" : "__base__");
      if (i % 2 == 1) {
        alone.select(dim, i).copy_(base.select(dim, i));
      }
    }
    const peft::BatchAdapters scope(names, dim);
    const double apart = distance(net->forward(input()), alone);
    require(
        apart <= (is_half() ? 2e-2 : 2e-6),
        "rows of a mixed batch differ: " + text(apart));
  }

  /// Written again, it is what PEFT wrote; loaded again, what it was.
  void files() {
    const auto net = network();
    const auto adapter = peft::load(*net, given());
    const auto again = (out_ / "again").string();
    peft::save(adapter, again);
    // Where the folder was edited, what PEFT would have written stands beside.
    const auto original = folder_ / "original.safetensors";
    const auto theirs = peft::load_safetensors(
        fs::exists(original) ? original.string()
                             : given() + "/adapter_model.safetensors");
    const auto ours =
        peft::load_safetensors(again + "/adapter_model.safetensors");
    for (const auto& [key, value] : theirs) {
      const bool repeats = key.find(".modules_to_save.") != std::string::npos ||
          key.find(".original_module.") != std::string::npos ||
          key.find(".base_layer.weight") != std::string::npos;
      const auto found = ours.find(key);
      require(found != ours.end() || repeats, "not written: " + key);
      if (found != ours.end()) {
        require(
            torch::equal(
                found->second.to(torch::kDouble), value.to(torch::kDouble)),
            "written with another value: " + key);
      }
    }
    for (const auto& item : ours) {
      require(theirs.count(item.first) == 1, "PEFT has no key " + item.first);
    }
    const auto before = read_json(folder_ / "adapter/adapter_config.json");
    const auto after = read_json(out_ / "again/adapter_config.json");
    for (const auto& item : before.items()) {
      const auto value = after.find(item.key());
      require(value != after.end(), "config lacks " + item.key());
      if (value != after.end()) {
        require(
            as_read(item.key(), *value) == as_read(item.key(), item.value()),
            "config has " + item.key() + " = " + value->dump() + ", not " +
                item.value().dump());
      }
    }
    require(
        after.size() == before.size() || facts.contains("edit"),
        "config has more fields");
    const auto other = network();
    const auto loaded = peft::load(*other, again);
    require(
        same_bits(call(*other), call(*net)),
        "saved and loaded, it is something else");
  }

  /// A new adapter draws after a seed what PEFT draws. (LoRA's and SHiRA's draw
  /// nothing when they are loaded.)
  void start() {
    if (facts.at("tuner") == "Lora" || facts.at("tuner") == "Shira") {
      peft::load(*network(), given());
      return;
    }
    if (facts.contains("edit")) {
      return;
    }
    const auto empty = out_ / "start";
    fs::create_directories(empty);
    fs::copy_file(
        folder_ / "adapter/adapter_config.json",
        empty / "adapter_config.json",
        fs::copy_options::overwrite_existing);
    const auto expected = group("initial");
    TensorMap shared;
    for (const auto& item : expected) {
      if (item.first.rfind("base_model.vera_", 0) == 0) {
        shared.insert(item);
      }
    }
    peft::save_safetensors(
        shared, (empty / "adapter_model.safetensors").string());
    const auto net = network();
    torch::manual_seed(facts.at("seed").get<uint64_t>() + 7);
    const auto adapter = peft::load(
        *net, empty.string(), "default", peft::LoadOptions().strict(false));
    const auto parameters = adapter.named_parameters();
    for (const auto& [key, value] : expected) {
      const auto own = find(parameters, key);
      require(
          !own.defined() ||
              torch::equal(own.detach().to(value.scalar_type()), value),
          "starts as something else: " + key);
    }
  }

  // ~~~~ what they share ~~~~

  std::shared_ptr<Net> network() const {
    auto net = std::make_shared<Net>(facts.at("layers"));
    net->to(dtype_);
    peft::load_base(*net, (folder_ / "base.safetensors").string());
    net->eval();
    return net;
  }
  /// Frozen, as under an adapter: matmul rounds otherwise where a weight
  /// trains.
  std::shared_ptr<Net> base() const {
    auto net = network();
    for (auto& p : net->parameters()) {
      p.set_requires_grad(false);
    }
    return net;
  }
  std::string given() const {
    return (folder_ / "adapter").string();
  }
  const Tensor& input() const {
    return numbers_.at("input");
  }
  bool is_half() const {
    return dtype_ == torch::kHalf || dtype_ == torch::kBFloat16;
  }
  int64_t batch_dim() const {
    for (const auto& layer : facts.at("layers")) {
      if (layer.contains("sequence_first")) {
        return 1;
      }
    }
    return 0;
  }

  /// Forward in the mode and with the random numbers of the case.
  Tensor call(Net& net) const {
    const bool train = facts.at("train").get<bool>();
    net.train(train);
    if (train) {
      torch::manual_seed(facts.at("seed").get<uint64_t>());
    }
    return net.forward(input());
  }

  std::unique_ptr<torch::optim::Optimizer> make_optimizer(
      std::vector<Tensor> parameters) const {
    if (facts.at("optimizer") == "sgd") {
      return std::make_unique<torch::optim::SGD>(std::move(parameters), 0.1);
    }
    return std::make_unique<torch::optim::AdamW>(
        std::move(parameters),
        torch::optim::AdamWOptions(0.01).eps(1e-3).weight_decay(0.01));
  }

  TensorMap group(const std::string& name) const {
    return adapter_files::group(numbers_, name);
  }

  void require(bool well, const std::string& otherwise) {
    if (!well) {
      failures_.push_back(otherwise);
    }
  }

  static std::string text(double value) {
    std::ostringstream stream;
    stream << value;
    return stream.str();
  }

  /// Close to PEFT's, or at least as close to the exact value as PEFT is.
  void compare(const std::string& key, const Tensor& ours, double single) {
    const auto& theirs = numbers_.at(key);
    if (ours.sizes() != theirs.sizes()) {
      failures_.push_back(key + " has another shape");
      return;
    }
    const double allowed = dtype_ == torch::kBFloat16 ? 1.6e-2
        : dtype_ == torch::kHalf                      ? 2e-3
        : dtype_ == torch::kDouble                    ? 1e-12
                                                      : single;
    const double found = distance(ours, theirs);
    if (found <= allowed) {
      return;
    }
    const auto exact = numbers_.find("exact." + key);
    if (exact != numbers_.end() &&
        distance(ours, exact->second) <=
            std::max(1.5 * distance(theirs, exact->second), allowed / 2)) {
      remarks.push_back(
          key + " differs by " + text(found) + ", as near to the exact value");
      return;
    }
    failures_.push_back(
        key + " differs by " + text(found) +
        (exact == numbers_.end()
             ? ""
             : ", is " + text(distance(ours, exact->second)) +
                 " off the exact value, PEFT's " +
                 text(distance(theirs, exact->second))));
  }

  /// Merged weights within one unit in the last place of the exact result.
  void check_rounding(
      const std::string& key,
      const Tensor& ours,
      const Tensor& theirs) {
    const auto exact = numbers_.find("exact.merged." + key);
    if (exact == numbers_.end() || dtype_ == torch::kDouble) {
      return;
    }
    const double units = ulps(ours, exact->second);
    if (units > 1) {
      const auto line = "merged." + key + " is " + text(units) +
          " units off the exact value, PEFT's " +
          text(ulps(theirs.to(dtype_), exact->second));
      (is_half() ? failures_ : remarks).push_back(line);
    }
  }

  static TensorMap copies(Net& net) {
    TensorMap result;
    for (const auto& item : net.named_parameters()) {
      result.emplace(item.key(), item.value().detach().clone());
    }
    return result;
  }

  void require_same_parameters(
      Net& net,
      const TensorMap& plain,
      const std::string& complaint) {
    for (const auto& item : net.named_parameters()) {
      const auto own = plain.find(item.key());
      require(
          own != plain.end() && same_bits(item.value(), own->second),
          complaint + item.key());
    }
  }

  fs::path folder_, out_;
  TensorMap numbers_;
  torch::ScalarType dtype_ = torch::kFloat;
  Lines failures_;
};

} // namespace described
