#pragma once

// The frozen probe: a linear classifier on features that are computed once.

#include "train.h"

#include <torch/utils.h>

#include <vector>

namespace gloss {

struct ProbeSettings {
  double learning_rate;
  double weight_decay;
  int64_t epochs;
};

struct ProbeResult {
  ProbeSettings chosen{};
  double validation_accuracy =
      0; ///< of the chosen settings, on a fifth of the training set
  torch::nn::Linear head{nullptr};
  torch::Tensor logits; ///< on the test set
  TrainResult training; ///< of the final fit
};

/// One thread while it lives: steps this small wait longer than they work.
class OneThread {
 public:
  OneThread() {
    torch::set_num_threads(1);
  }
  ~OneThread() {
    torch::set_num_threads(before_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int before_ = torch::get_num_threads();
};

/// Fits a linear classifier on `features` `[examples, hidden]`.
inline torch::nn::Linear fit_probe(
    const torch::Tensor& features,
    const torch::Tensor& labels,
    int64_t num_labels,
    const ProbeSettings& settings,
    uint64_t seed,
    TrainResult& result) {
  const OneThread one_thread;
  torch::manual_seed(seed);
  torch::nn::Linear head(features.size(1), num_labels);
  torch::optim::AdamW optimizer(
      head->parameters(),
      torch::optim::AdamWOptions(settings.learning_rate)
          .weight_decay(settings.weight_decay));
  auto& options = static_cast<torch::optim::AdamWOptions&>(
      optimizer.param_groups()[0].options());
  constexpr int64_t kBatch = 32;
  const auto total =
      settings.epochs * ((features.size(0) + kBatch - 1) / kBatch);
  result = {};
  const auto start = Clock::now();
  for (int64_t epoch = 0; epoch < settings.epochs; ++epoch) {
    for (const auto& rows : torch::randperm(features.size(0)).split(kBatch)) {
      const auto step = static_cast<double>(result.losses.size());
      options.lr(
          settings.learning_rate * (1 - step / static_cast<double>(total)));
      const auto loss = torch::nn::functional::cross_entropy(
          head->forward(features.index_select(0, rows)),
          labels.index_select(0, rows));
      optimizer.zero_grad();
      loss.backward();
      optimizer.step();
      result.losses.push_back(loss.item<double>());
    }
  }
  result.seconds_per_step =
      seconds_since(start) / static_cast<double>(result.losses.size());
  return head;
}

/// Chooses learning rate, weight decay and epochs on a validation split of the
/// training set, then fits all of it.
inline ProbeResult tuned_probe(
    Network& network,
    const Dataset& data,
    int64_t padding,
    uint64_t seed,
    bool quick) {
  reset_peak_memory();
  const auto features = predict(network, data.train, padding, true);
  const auto labels = labels_of(data.train);
  const auto num_labels = static_cast<int64_t>(data.categories.size());
  const auto held_out =
      features.size(0) / 5; // the training set is in random order
  const auto kept = features.size(0) - held_out;

  std::vector<ProbeSettings> grid;
  for (const double learning_rate : {1e-3, 3e-3}) {
    for (const double weight_decay : {0.0, 0.3, 1.0}) {
      grid.push_back({learning_rate, weight_decay, quick ? 10 : 30});
    }
  }
  ProbeResult result;
  Progress progress("frozen probe, tuning", static_cast<int64_t>(grid.size()));
  int64_t tried = 0;
  for (const auto& settings : grid) {
    if (interrupted()) {
      break;
    }
    auto head = fit_probe(
        features.narrow(0, held_out, kept),
        labels.narrow(0, held_out, kept),
        num_labels,
        settings,
        seed,
        result.training);
    torch::NoGradGuard no_grad;
    const auto score = accuracy(
        head->forward(features.narrow(0, 0, held_out)),
        labels.narrow(0, 0, held_out));
    if (score > result.validation_accuracy || tried == 0) {
      result.validation_accuracy = score;
      result.chosen = settings;
    }
    progress.update(
        ++tried, fmt::format("best {:.3f}", result.validation_accuracy));
  }
  result.head = fit_probe(
      features, labels, num_labels, result.chosen, seed, result.training);
  torch::NoGradGuard no_grad;
  result.logits =
      result.head->forward(predict(network, data.test, padding, true));
  result.training.peak_mib = peak_memory_mib();
  return result;
}

} // namespace gloss
