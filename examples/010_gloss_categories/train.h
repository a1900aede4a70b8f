#pragma once

// The training loop and its measurements. Nothing here knows which method
// trains.

#include "dataset.h"
#include "process.h"

#include <peft/models/bert.h>

#include <torch/nn/functional/loss.h>
#include <torch/nn/utils/clip_grad.h>
#include <torch/optim/adamw.h>

#include <fmt/format.h>

#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace gloss {

using Network = peft::models::BertForSequenceClassification;

struct TrainOptions {
  int64_t epochs = 3;
  int64_t batch_size = 32;
  double learning_rate = 2e-3; ///< falls to zero in a straight line
  double weight_decay = 0.0;
  uint64_t seed = 1;
  /// Computes the logits of a batch made of these rows; by default the network
  /// does.
  std::function<torch::Tensor(const Batch&, const std::vector<size_t>& rows)>
      forward;
  /// What follows backward; by default gradients are clipped to norm 1 and the
  /// optimizer steps.
  std::function<void(torch::optim::Optimizer&)> step;
};

/// Tensors that train at a rate of their own.
struct ParameterGroup {
  std::vector<torch::Tensor> parameters;
  double learning_rate;
};

/// What one training run cost and how its loss went.
struct TrainResult {
  std::vector<double> losses; ///< one a step
  double seconds_per_step = 0; ///< the median
  double peak_mib = 0;
  bool interrupted = false;
};

/// Logits `[examples, categories]` in the order of `examples`.
inline torch::Tensor predict(
    Network& network,
    const Examples& examples,
    int64_t padding,
    bool features = false) {
  torch::NoGradGuard no_grad;
  network->eval();
  std::vector<size_t> all(examples.size());
  std::iota(all.begin(), all.end(), size_t{0});
  torch::Tensor result;
  for (const auto& rows : batches_by_length(examples, all, 64)) {
    const auto batch = make_batch(examples, rows, padding);
    const auto output = features ? network->features(batch.ids, batch.mask)
                                 : network->forward(batch.ids, batch.mask);
    if (!result.defined()) {
      result =
          torch::empty({static_cast<int64_t>(examples.size()), output.size(1)});
    }
    const auto index =
        torch::tensor(std::vector<int64_t>(rows.begin(), rows.end()));
    result.index_copy_(0, index, output);
  }
  return result;
}

inline torch::Tensor labels_of(const Examples& examples) {
  std::vector<int64_t> labels;
  for (const auto& example : examples) {
    labels.push_back(example.label);
  }
  return torch::tensor(labels);
}

inline double accuracy(
    const torch::Tensor& logits,
    const torch::Tensor& labels) {
  return logits.argmax(1).eq(labels).to(torch::kDouble).mean().item<double>();
}

/// The standard error of an accuracy measured on `count` examples.
inline double standard_error(double accuracy, size_t count) {
  return std::sqrt(accuracy * (1 - accuracy) / static_cast<double>(count));
}

/// AdamW on `groups`; everything else about the network stays as it is, its
/// mode included.
inline TrainResult train(
    Network& network,
    const std::vector<ParameterGroup>& groups,
    const Examples& examples,
    int64_t padding,
    const TrainOptions& options,
    const std::string& title) {
  std::mt19937_64 order(options.seed);
  const auto batch_size = static_cast<size_t>(options.batch_size);
  const auto steps_per_epoch =
      static_cast<int64_t>((examples.size() + batch_size - 1) / batch_size);
  const auto total = options.epochs * steps_per_epoch;

  std::vector<torch::optim::OptimizerParamGroup> optimizer_groups;
  std::vector<torch::Tensor> parameters;
  for (const auto& group : groups) {
    optimizer_groups.emplace_back(
        group.parameters,
        std::make_unique<torch::optim::AdamWOptions>(
            torch::optim::AdamWOptions(group.learning_rate)
                .weight_decay(options.weight_decay)));
    parameters.insert(
        parameters.end(), group.parameters.begin(), group.parameters.end());
  }
  torch::optim::AdamW optimizer(optimizer_groups);

  TrainResult result;
  Progress progress(title, total);
  double smooth_loss = 0;
  reset_peak_memory();
  std::vector<double> seconds;
  for (int64_t epoch = 0; epoch < options.epochs && !result.interrupted;
       ++epoch) {
    for (const auto& rows : shuffled_batches(examples, batch_size, order)) {
      const auto start = Clock::now();
      const auto step = static_cast<int64_t>(result.losses.size());
      for (size_t i = 0; i < groups.size(); ++i) {
        static_cast<torch::optim::AdamWOptions&>(
            optimizer.param_groups()[i].options())
            .lr(groups[i].learning_rate *
                (1 - static_cast<double>(step) / total));
      }

      const auto batch = make_batch(examples, rows, padding);
      const auto logits = options.forward
          ? options.forward(batch, rows)
          : network->forward(batch.ids, batch.mask);
      const auto loss =
          torch::nn::functional::cross_entropy(logits, batch.labels);
      optimizer.zero_grad();
      loss.backward();
      if (options.step) {
        options.step(optimizer);
      } else {
        torch::nn::utils::clip_grad_norm_(parameters, 1.0);
        optimizer.step();
      }

      result.losses.push_back(loss.item<double>());
      seconds.push_back(seconds_since(start));
      smooth_loss = step == 0
          ? result.losses.back()
          : 0.95 * smooth_loss + 0.05 * result.losses.back();
      progress.update(step + 1, fmt::format("loss {:.3f}", smooth_loss));
      result.interrupted = interrupted();
      if (result.interrupted) {
        break;
      }
    }
  }
  std::nth_element(
      seconds.begin(), seconds.begin() + seconds.size() / 2, seconds.end());
  result.seconds_per_step = seconds[seconds.size() / 2];
  result.peak_mib = peak_memory_mib();
  return result;
}

/// All of `parameters` at options.learning_rate, with the network in training
/// mode.
inline TrainResult train(
    Network& network,
    const std::vector<torch::Tensor>& parameters,
    const Examples& examples,
    int64_t padding,
    const TrainOptions& options,
    const std::string& title) {
  network->train();
  return train(
      network,
      std::vector<ParameterGroup>{{parameters, options.learning_rate}},
      examples,
      padding,
      options,
      title);
}

} // namespace gloss
