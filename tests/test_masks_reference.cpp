// Fisher information, masks and masked training against tests/reference, where
// Python wrote them from the equations in float64.

#include "test.h"

#include <peft/methods/child_tuning.h>
#include <peft/methods/fish.h>
#include <peft/train/fisher.h>

#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace test_masks_reference {

using torch::Tensor;

namespace {

std::map<std::string, Tensor> reference(const std::string& name) {
  return peft::load_safetensors(
      golden("../../reference/data/masks/" + name + ".safetensors"));
}

struct NetworkImpl : torch::nn::Module {
  NetworkImpl() {
    embed = register_module("embed", torch::nn::Embedding(12, 5));
    layer = register_module("layer", torch::nn::ModuleList());
    layer->push_back(torch::nn::Linear(5, 6));
    layer->push_back(torch::nn::Linear(6, 6));
    classifier = register_module("classifier", torch::nn::Linear(6, 3));
    to(torch::kDouble);
    torch::NoGradGuard no_grad;
    const auto start = reference("network");
    for (auto& item : named_parameters()) {
      item.value().copy_(start.at(item.key()));
    }
    inputs = start.at("inputs");
    labels = start.at("labels");
  }
  Tensor forward(int64_t begin, int64_t end) {
    Tensor h = embed(inputs.slice(0, begin, end)).mean(1);
    for (int i = 0; i < 2; ++i) {
      h = layer->at<torch::nn::LinearImpl>(static_cast<size_t>(i))
              .forward(h)
              .tanh();
    }
    return classifier(h);
  }
  Tensor loss(int64_t begin, int64_t end) {
    return torch::cross_entropy_loss(
        forward(begin, end), labels.slice(0, begin, end));
  }
  torch::nn::Embedding embed{nullptr};
  torch::nn::ModuleList layer{nullptr};
  torch::nn::Linear classifier{nullptr};
  Tensor inputs, labels;
};
TORCH_MODULE(Network);

const int64_t kSamples = 12;

peft::Scores scores_of(const std::string& file, const std::string& prefix) {
  const auto all = reference(file);
  peft::Scores scores;
  Network net;
  for (const auto& item : net->named_parameters()) {
    scores.emplace_back(item.key(), all.at(prefix + "." + item.key()));
  }
  return scores;
}

void check_scores(const peft::Scores& scores, const std::string& prefix) {
  const auto expected = reference("fisher");
  REQUIRE(scores.size() == 7);
  for (const auto& [path, score] : scores) {
    INFO(prefix << " " << path);
    CHECK(close(score, expected.at(prefix + "." + path)));
  }
}

/// Hugging Face's old AdamW, the optimizer around which Child-tuning was
/// published: it decays last and puts epsilon beside the raw second moment.
class OldAdamW : public torch::optim::Optimizer {
 public:
  OldAdamW(std::vector<Tensor> parameters, double lr, double decay)
      : Optimizer(
            {torch::optim::OptimizerParamGroup(std::move(parameters))},
            std::make_unique<torch::optim::AdamWOptions>(
                torch::optim::AdamWOptions(lr).weight_decay(decay))),
        lr_(lr),
        decay_(decay) {}

  Tensor step(LossClosure /*closure*/ = nullptr) override {
    torch::NoGradGuard no_grad;
    for (auto& group : param_groups()) {
      for (auto& p : group.params()) {
        if (!p.grad().defined()) {
          continue;
        }
        auto& state = states_[p.unsafeGetTensorImpl()];
        if (!state.m.defined()) {
          state.m = torch::zeros_like(p);
          state.v = torch::zeros_like(p);
        }
        ++state.t;
        state.m.mul_(0.9).add_(p.grad(), 0.1);
        state.v.mul_(0.999).addcmul_(p.grad(), p.grad(), 1 - 0.999);
        const double size = lr_ * std::sqrt(1 - std::pow(0.999, state.t)) /
            (1 - std::pow(0.9, state.t));
        p.addcdiv_(state.m, state.v.sqrt().add_(1e-6), -size);
        p.mul_(1 - lr_ * decay_);
      }
    }
    return {};
  }
  void save(torch::serialize::OutputArchive&) const override {}
  void load(torch::serialize::InputArchive&) override {}

 private:
  struct State {
    Tensor m, v;
    int64_t t = 0;
  };
  std::map<void*, State> states_;
  double lr_, decay_;
};

const double kRate = 0.02, kDecay = 0.1, kMaxNorm = 0.5;

/// Six steps with the user's loop, then the merged network.
template <class Optimizer, class Options>
std::map<std::string, Tensor> train(const Options& options) {
  Network net;
  auto adapter = peft::attach(*net, options);
  peft::MaskedStep masked(adapter);
  Optimizer optimizer(masked.parameters(), kRate, kDecay);
  for (int64_t step = 0; step < 6; ++step) {
    optimizer.zero_grad();
    const int64_t begin = 4 * step % kSamples;
    net->loss(begin, begin + 4).backward();
    torch::nn::utils::clip_grad_norm_(adapter.parameters(), kMaxNorm);
    masked.step(optimizer);
  }
  peft::merge(*net);
  std::map<std::string, Tensor> result;
  for (const auto& item : net->named_parameters()) {
    result[item.key()] = item.value().detach();
  }
  return result;
}

class NewAdamW : public torch::optim::AdamW {
 public:
  NewAdamW(std::vector<Tensor> parameters, double lr, double decay)
      : AdamW(
            std::move(parameters),
            torch::optim::AdamWOptions(lr).weight_decay(decay)) {}
};

void check_trained(
    const std::map<std::string, Tensor>& found,
    const std::string& prefix) {
  const auto expected = reference("training");
  for (const auto& [path, value] : found) {
    INFO(prefix << " " << path);
    CHECK(close(value, expected.at(prefix + "." + path)));
  }
}

} // namespace

TEST_CASE("Fisher information as the equations have it") {
  Network net;
  const auto loss = [&](int64_t i) { return net->loss(i, i + 1); };
  const peft::FisherOptions options(kSamples);
  check_scores(
      peft::estimate_fisher(*net, loss, options).scores, "label_square");
  check_scores(
      peft::estimate_fisher(
          *net, loss, peft::FisherOptions(kSamples).measure("absolute"))
          .scores,
      "label_absolute");
  check_scores(
      peft::estimate_fisher(
          *net,
          [&](int64_t i) { return net->forward(i, i + 1); },
          peft::FisherOptions(kSamples).variant("expectation"))
          .scores,
      "expect_square");
  check_scores(
      peft::estimate_fisher(
          *net,
          [&](int64_t begin, int64_t end) { return net->loss(begin, end); },
          peft::FisherOptions(kSamples).per_batch(true).batch_size(4).max_norm(
              0.05))
          .scores,
      "per_batch");
}

TEST_CASE("FISH masks as numpy's and torch's functions choose them") {
  const auto masks = reference("masks");
  for (const auto* ratio : {"0.2", "0.5"}) {
    for (const bool head : {true, false}) {
      INFO(ratio << (head ? " with head" : ""));
      Network net;
      auto options = peft::FishOptions(std::stod(ratio))
                         .fisher(scores_of("fisher", "label_square"));
      if (head) {
        options.modules_to_save({"classifier"});
      }
      auto adapter = peft::attach(*net, options);
      const std::string prefix =
          std::string(head ? "fish_" : "fish_no_head_") + ratio + ".";
      int64_t kept = 0;
      for (const auto& item : net->named_parameters()) {
        if (masks.count(prefix + item.key()) != 0) { // not the adapter's own
          kept += masks.at(prefix + item.key()).sum().item<int64_t>();
        }
      }
      CHECK(adapter.num_parameters() == kept);
      for (const auto& site : adapter.shared_state()->sites) {
        const auto* sparse =
            dynamic_cast<const peft::SparseCopy*>(site.delta.get());
        if (sparse != nullptr) {
          CHECK(torch::equal(
              sparse->indices,
              masks.at(prefix + site.parameters.front())
                  .view({-1})
                  .nonzero()
                  .view({-1})));
        }
      }
    }
  }
}

TEST_CASE("Child-tuning's masks lie above numpy's percentile, ties included") {
  const auto masks = reference("masks");
  for (const auto* p : {"0.05", "0.3", "0.5", "1.0"}) {
    for (const bool tied : {false, true}) {
      INFO(p << (tied ? " with ties" : ""));
      Network net;
      auto adapter = peft::attach(
          *net,
          peft::ChildTuningOptions(std::stod(p))
              .mode("D")
              .semantics("reference")
              .fisher(
                  tied ? scores_of("masks", "tied")
                       : scores_of("fisher", "per_batch")));
      int masked = 0;
      for (const auto& site : adapter.shared_state()->sites) {
        const auto* copy =
            dynamic_cast<const peft::MaskedCopy*>(site.delta.get());
        if (copy != nullptr) {
          ++masked;
          CHECK(torch::equal(
              copy->step_mask(),
              masks.at(
                  std::string(tied ? "ties_" : "child_") + p + "." +
                  site.parameters.front())));
        }
      }
      CHECK(masked == 4);
    }
  }
}

TEST_CASE("Training under masks as published, leaks included, and hard") {
  const auto fish = peft::FishOptions(0.5)
                        .fisher(scores_of("fisher", "label_square"))
                        .modules_to_save({"classifier"});
  check_trained(train<NewAdamW>(fish), "fish_hard");
  check_trained(
      train<NewAdamW>(peft::FishOptions(fish).semantics("reference")), "fish");
  const auto child = peft::ChildTuningOptions(0.3).mode("D").fisher(
      scores_of("fisher", "per_batch"));
  check_trained(train<OldAdamW>(child), "child_hard");
  check_trained(
      train<OldAdamW>(peft::ChildTuningOptions(child).semantics("reference")),
      "child");
}

TEST_CASE("Task-free, the published optimizer with its masks inside") {
  Network net;
  auto adapter = peft::attach(
      *net, peft::ChildTuningOptions(0.3).semantics("reference").seed(3));
  peft::MaskedStep masked(adapter);
  OldAdamW optimizer(masked.parameters(), kRate, kDecay);
  struct Own {
    const peft::MaskedCopy* copy;
    Tensor w, m, v;
  };
  std::vector<Own> own;
  for (const auto& site : adapter.shared_state()->sites) {
    const auto& copy = dynamic_cast<const peft::MaskedCopy&>(*site.delta);
    const Tensor w = copy.value.detach().clone();
    own.push_back({&copy, w, torch::zeros_like(w), torch::zeros_like(w)});
  }
  CHECK(own.size() == 7);
  for (int64_t step = 1; step <= 5; ++step) {
    optimizer.zero_grad();
    net->loss(0, kSamples).backward();
    for (auto& o : own) {
      const Tensor g =
          o.copy->value.grad() * (o.copy->step_mask().to(torch::kDouble) / 0.3);
      o.m = 0.9 * o.m + 0.1 * g;
      o.v = 0.999 * o.v + 0.001 * g * g;
      const double size = kRate *
          std::sqrt(1 - std::pow(0.999, static_cast<double>(step))) /
          (1 - std::pow(0.9, static_cast<double>(step)));
      const Tensor w = o.w - size * o.m / (o.v.sqrt() + 1e-6);
      o.w = w - kRate * kDecay * w;
    }
    masked.step(optimizer);
    for (const auto& o : own) {
      CHECK(close(o.copy->value.detach(), o.w));
    }
  }
}

} // namespace test_masks_reference
