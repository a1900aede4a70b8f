#pragma once

// Writing text, and how fast.

#include "train.h"

#include <peft/models/generation.h>

#include <string>
#include <vector>

namespace style {

/// Goes on from `prompt` by `length` characters, drawn at temperature 0.5; the
/// same seed draws the same.
inline std::string write(
    Network& network,
    const std::string& prompt,
    int64_t length,
    uint64_t seed) {
  torch::manual_seed(seed);
  network->eval();
  const auto symbols = peft::models::generate(
      network,
      encode(prompt).to(torch::kLong).unsqueeze(0),
      {},
      peft::models::GenerationOptions()
          .max_new_tokens(length)
          .do_sample(true)
          .temperature(0.5));
  return decode(symbols[0]);
}

/// What each prompt is continued to.
inline std::vector<std::string> write_all(
    Network& network,
    const std::vector<std::string>& prompts,
    int64_t length,
    uint64_t seed) {
  std::vector<std::string> texts;
  for (const auto& prompt : prompts) {
    texts.push_back(write(network, prompt, length, seed));
  }
  return texts;
}

/// Writing with keys and values kept, the adapter's prefix among them, against
/// running prefix and text anew for every character.
struct Speed {
  double cached = 0; ///< characters per second, the better of three runs
  double uncached = 0;
  double logit_difference = 0; ///< largest, over a text
};

inline Speed
measure_speed(Network& network, const std::string& prompt, int64_t length) {
  torch::NoGradGuard no_grad;
  network->eval();
  const auto options = peft::models::GenerationOptions().max_new_tokens(length);
  const auto begin = encode(prompt).to(torch::kLong).unsqueeze(0);
  Speed speed;
  torch::Tensor written;
  for (int run = 0; run < 3; ++run) {
    auto start = gloss::Clock::now();
    written = peft::models::generate(network, begin, {}, options);
    const auto characters = static_cast<double>(length);
    speed.cached =
        std::max(speed.cached, characters / gloss::seconds_since(start));
    start = gloss::Clock::now();
    torch::Tensor text;
    peft::models::extend_sequences(
        begin, options, [&](const torch::Tensor& symbols) {
          text = text.defined() ? torch::cat({text, symbols}, 1) : symbols;
          return network->forward(text);
        });
    speed.uncached =
        std::max(speed.uncached, characters / gloss::seconds_since(start));
  }
  peft::KeyValues cache;
  std::vector<torch::Tensor> steps;
  for (const auto& symbol : written.split(1, 1)) {
    steps.push_back(network->forward(symbol, {}, {}, &cache));
  }
  speed.logit_difference = (torch::cat(steps, 1) - network->forward(written))
                               .abs()
                               .max()
                               .item<double>();
  return speed;
}

} // namespace style
