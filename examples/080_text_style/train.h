#pragma once

// The network, its training loop and what it is judged by.

#include "../010_gloss_categories/process.h"
#include "text.h"

#include <peft/models/llama.h>

#include <torch/nn/functional/loss.h>
#include <torch/nn/utils/clip_grad.h>
#include <torch/optim/adamw.h>

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

namespace style {

using Network = peft::models::LlamaForCausalLM;

struct TrainOptions {
  int64_t steps = 0;
  int64_t batch_size = 0; ///< windows a step
  int64_t length = 0; ///< of a window, in characters
  double learning_rate = 0; ///< rises over a twentieth, falls to zero
  double weight_decay = 0;
  uint64_t seed = 1;
};

struct TrainResult {
  std::vector<double> losses; ///< bits per character, one a step
  double seconds = 0;
  bool interrupted = false;

  /// The mean of the first or of the last tenth of the losses.
  double mean_loss(bool last) const {
    const auto count = std::max<size_t>(1, losses.size() / 10);
    double sum = 0;
    for (size_t i = 0; i < count; ++i) {
      sum += losses[last ? losses.size() - 1 - i : i];
    }
    return sum / static_cast<double>(count);
  }
};

/// Bits per character of each window `[count, length + 1]`, `[count, length]`.
inline torch::Tensor bits(Network& network, const torch::Tensor& windows) {
  const auto length = windows.size(1) - 1;
  const auto logits = network->forward(windows.narrow(1, 0, length));
  return torch::nn::functional::cross_entropy(
             logits.flatten(0, 1),
             windows.narrow(1, 1, length).flatten(),
             torch::nn::functional::CrossEntropyFuncOptions().reduction(
                 torch::kNone))
             .view({-1, length}) /
      std::log(2.0);
}

/// AdamW on `parameters`; everything else about the network stays as it is.
inline TrainResult train(
    Network& network,
    const std::vector<torch::Tensor>& parameters,
    const torch::Tensor& symbols,
    const TrainOptions& options,
    const std::string& title) {
  const auto start = gloss::Clock::now();
  auto generator = at::make_generator<at::CPUGeneratorImpl>(options.seed);
  torch::optim::AdamW optimizer(
      parameters,
      torch::optim::AdamWOptions(options.learning_rate)
          .betas({0.9, 0.98})
          .weight_decay(options.weight_decay));
  auto& settings = static_cast<torch::optim::AdamWOptions&>(
      optimizer.param_groups()[0].options());
  const auto warm_up = std::max<int64_t>(1, options.steps / 20);

  TrainResult result;
  gloss::Progress progress(title, options.steps);
  network->train();
  for (int64_t step = 0; step < options.steps && !result.interrupted; ++step) {
    settings.lr(
        options.learning_rate *
        std::min(
            static_cast<double>(step + 1) / warm_up,
            static_cast<double>(options.steps - step) /
                (options.steps - warm_up + 1)));
    const auto windows =
        random_windows(symbols, options.batch_size, options.length, generator);
    const auto loss = bits(network, windows).mean();
    optimizer.zero_grad();
    loss.backward();
    torch::nn::utils::clip_grad_norm_(parameters, 1.0);
    optimizer.step();
    result.losses.push_back(loss.item<double>());
    progress.update(
        step + 1, fmt::format("{:.2f} bits/char", result.mean_loss(true)));
    result.interrupted = gloss::interrupted();
  }
  network->eval();
  result.seconds = gloss::seconds_since(start);
  return result;
}

/// Bits per character on held-out text, with the standard error of the mean
/// over windows.
struct Score {
  double bits = 0;
  double error = 0;
};

/// Every window starts with nothing before it, so the first characters of each
/// are guessed with little to go by.
inline Score score(
    Network& network,
    const torch::Tensor& symbols,
    int64_t length,
    int64_t count) {
  torch::NoGradGuard no_grad;
  network->eval();
  std::vector<torch::Tensor> means;
  for (const auto& windows : spread_windows(symbols, count, length).split(16)) {
    means.push_back(bits(network, windows).mean(1));
  }
  const auto all = torch::cat(means).to(torch::kDouble);
  return {
      all.mean().item<double>(),
      all.std().item<double>() / std::sqrt(static_cast<double>(all.numel()))};
}

} // namespace style
