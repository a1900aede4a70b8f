#pragma once

// Balanced splits of a corpus, and batches that waste little on padding.

#include "wordnet.h"
#include "wordpiece.h"

#include <torch/types.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <unordered_set>
#include <vector>

namespace gloss {

/// A text as the network sees it.
struct Example {
  std::vector<int64_t> ids;
  int64_t label = 0;
  std::string text;
};
using Examples = std::vector<Example>;

struct Dataset {
  Examples train;
  Examples test;
  std::vector<std::string> categories;
};

/// The tensors of one step: `ids` and `mask` `[batch, longest]`, `labels`
/// `[batch]`.
struct Batch {
  torch::Tensor ids;
  torch::Tensor mask; ///< undefined when no row is padded
  torch::Tensor labels;
};

/// Fisher-Yates; std::shuffle may differ between standard libraries.
template <typename T>
void shuffle(std::vector<T>& values, std::mt19937_64& generator) {
  for (size_t i = values.size(); i > 1; --i) {
    std::swap(values[i - 1], values[generator() % i]);
  }
}

/// `train_size` and `test_size` examples of each class that has enough, no text
/// twice.
inline Dataset split_balanced(
    const Corpus& corpus,
    const WordPiece& tokenizer,
    size_t train_size,
    size_t test_size,
    uint64_t seed,
    size_t max_length = 64) {
  std::mt19937_64 generator(seed);
  std::vector<std::vector<size_t>> members(corpus.categories.size());
  std::unordered_set<std::string> seen;
  for (size_t i = 0; i < corpus.texts.size(); ++i) {
    if (!corpus.texts[i].empty() && seen.insert(corpus.texts[i]).second) {
      members[static_cast<size_t>(corpus.labels[i])].push_back(i);
    }
  }
  Dataset dataset;
  for (size_t category = 0; category < members.size(); ++category) {
    auto& candidates = members[category];
    if (candidates.size() < train_size + test_size) {
      continue;
    }
    shuffle(candidates, generator);
    const auto label = static_cast<int64_t>(dataset.categories.size());
    dataset.categories.push_back(corpus.categories[category]);
    for (size_t i = 0; i < train_size + test_size; ++i) {
      const auto& text = corpus.texts[candidates[i]];
      auto& part = i < train_size ? dataset.train : dataset.test;
      part.push_back({tokenizer.encode(text, max_length), label, text});
    }
  }
  TORCH_CHECK(
      !dataset.categories.empty(),
      "peft: no category has ",
      train_size + test_size,
      " different texts");
  shuffle(dataset.train, generator);
  shuffle(dataset.test, generator);
  return dataset;
}

/// Pads `rows` of `examples` to the longest of them.
inline Batch make_batch(
    const Examples& examples,
    const std::vector<size_t>& rows,
    int64_t padding) {
  size_t longest = 0;
  size_t shortest = SIZE_MAX;
  for (const auto row : rows) {
    longest = std::max(longest, examples[row].ids.size());
    shortest = std::min(shortest, examples[row].ids.size());
  }
  const auto height = static_cast<int64_t>(rows.size());
  const auto width = static_cast<int64_t>(longest);
  Batch batch;
  batch.ids = torch::full({height, width}, padding, torch::kLong);
  batch.labels = torch::empty({height}, torch::kLong);
  auto mask = torch::zeros({height, width}, torch::kLong);
  for (int64_t i = 0; i < height; ++i) {
    const auto& example = examples[rows[static_cast<size_t>(i)]];
    std::copy(
        example.ids.begin(),
        example.ids.end(),
        batch.ids.data_ptr<int64_t>() + i * width);
    std::fill_n(mask.data_ptr<int64_t>() + i * width, example.ids.size(), 1);
    batch.labels.data_ptr<int64_t>()[i] = example.label;
  }
  if (shortest < longest) {
    batch.mask = mask;
  }
  return batch;
}

/// Rows sorted by length and cut into batches: the least padding, for
/// evaluation.
inline std::vector<std::vector<size_t>> batches_by_length(
    const Examples& examples,
    std::vector<size_t> rows,
    size_t batch_size) {
  std::stable_sort(rows.begin(), rows.end(), [&](size_t a, size_t b) {
    return examples[a].ids.size() < examples[b].ids.size();
  });
  std::vector<std::vector<size_t>> batches;
  for (size_t begin = 0; begin < rows.size(); begin += batch_size) {
    const auto end = std::min(begin + batch_size, rows.size());
    batches.emplace_back(rows.begin() + begin, rows.begin() + end);
  }
  return batches;
}

/// One epoch: random rows, sorted by length only within pools of sixteen
/// batches, the batches in random order.
inline std::vector<std::vector<size_t>> shuffled_batches(
    const Examples& examples,
    size_t batch_size,
    std::mt19937_64& generator) {
  std::vector<size_t> rows(examples.size());
  std::iota(rows.begin(), rows.end(), size_t{0});
  shuffle(rows, generator);
  const auto pool = batch_size * 16;
  std::vector<std::vector<size_t>> batches;
  for (size_t begin = 0; begin < rows.size(); begin += pool) {
    const auto end = std::min(begin + pool, rows.size());
    for (auto& batch : batches_by_length(
             examples,
             {rows.begin() + begin, rows.begin() + end},
             batch_size)) {
      batches.push_back(std::move(batch));
    }
  }
  shuffle(batches, generator);
  return batches;
}

} // namespace gloss
