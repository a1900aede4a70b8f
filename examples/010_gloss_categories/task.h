#pragma once

// What is learned and by which network: the real ones, or small made-up ones.

#include "dataset.h"
#include "train.h"

#include <peft/io/base_weights.h>
#include <peft/io/json.h>
#include <peft/io/safetensors.h>
#include <peft/models/bert.h>

#include <filesystem>
#include <fstream>
#include <set>
#include <string>

namespace gloss {

/// A pretrained encoder's folder (`config.json`, `vocab.txt`,
/// `model.safetensors`) and a corpus to adapt it to.
struct Task {
  bool real = false;
  std::filesystem::path model;
  std::string network_name;
  std::string data_name;
  Dataset data;
  int64_t padding = 0;
};

/// The sizes in a `config.json` of Hugging Face's.
inline peft::models::BertOptions read_config(
    const std::filesystem::path& path) {
  const auto config = peft::detail::read_json(path.string());
  const auto size = [&](const char* key) {
    return config.at(key).get<int64_t>();
  };
  TORCH_CHECK(
      config.value("hidden_act", "gelu") == "gelu",
      "peft: ",
      path.string(),
      " asks for an activation other than gelu");
  return peft::models::BertOptions()
      .vocab_size(size("vocab_size"))
      .hidden_size(size("hidden_size"))
      .num_hidden_layers(size("num_hidden_layers"))
      .num_attention_heads(size("num_attention_heads"))
      .intermediate_size(size("intermediate_size"))
      .max_position_embeddings(size("max_position_embeddings"))
      .type_vocab_size(size("type_vocab_size"))
      .pad_token_id(size("pad_token_id"))
      .layer_norm_eps(config.at("layer_norm_eps").get<double>());
}

/// The pretrained encoder with a fresh head for the task's categories. Dropout
/// is off: two epochs do not overfit, and a frozen probe and a trained adapter
/// then see the same features.
inline Network make_network(const Task& task, uint64_t seed) {
  torch::manual_seed(seed);
  Network network(
      read_config(task.model / "config.json")
          .hidden_dropout_prob(0)
          .attention_probs_dropout_prob(0)
          .num_labels(static_cast<int64_t>(task.data.categories.size()))
          .pooling(peft::models::Pooling::mean));
  peft::load_base(
      *network->bert,
      (task.model / "model.safetensors").string(),
      peft::BaseWeightsOptions().ignore_extra({"position_ids", "pooler\\..*"}));
  network->eval();
  return network;
}

/// WordNet's definitions for MiniLM, 38 categories with 140 texts or more.
inline Task real_task(
    const std::filesystem::path& model,
    const std::filesystem::path& wordnet,
    bool quick) {
  const WordPiece tokenizer((model / "vocab.txt").string());
  Task task;
  task.real = true;
  task.model = model;
  task.network_name = "all-MiniLM-L6-v2";
  task.data_name = "WordNet 3.0 definitions";
  task.data = split_balanced(read_wordnet(wordnet), tokenizer, 100, 40, 123);
  if (quick) { // the texts are in random order
    task.data.train.resize(task.data.train.size() / 20);
    task.data.test.resize(task.data.test.size() / 16);
  }
  task.padding = tokenizer.padding();
  return task;
}

// ~~~~ made up ~~~~

/// A made-up language: words of six topics, and filler words that mean nothing.
struct MadeUpLanguage {
  static constexpr size_t kTopics = 6;
  std::vector<std::vector<std::string>> topics;
  std::vector<std::string> filler;

  explicit MadeUpLanguage(uint64_t seed) {
    std::mt19937_64 generator(seed);
    std::set<std::string> used;
    const auto word = [&] {
      std::string text;
      do {
        text.clear();
        for (int i = 0; i < 3; ++i) {
          text += "bdfgklmnprstvz"[generator() % 14];
          text += "aeiou"[generator() % 5];
        }
      } while (!used.insert(text).second);
      return text;
    };
    const auto words = [&](size_t count) {
      std::vector<std::string> list;
      while (list.size() < count) {
        list.push_back(word());
      }
      return list;
    };
    for (size_t topic = 0; topic < kTopics; ++topic) {
      topics.push_back(words(16));
    }
    filler = words(32);
  }

  /// Two to four words of `first`, then as many of `second`, filler between
  /// them.
  std::string sentence(size_t first, size_t second, std::mt19937_64& generator)
      const {
    std::string text;
    const auto add = [&](const std::vector<std::string>& words) {
      text += (text.empty() ? "" : " ") + words[generator() % words.size()];
    };
    for (const auto topic : {first, second}) {
      for (auto left = 2 + generator() % 3; left > 0; --left) {
        add(topics[topic]);
        if (generator() % 2 == 0) {
          add(filler);
        }
      }
    }
    return text;
  }

  /// Texts of two topics: with a class for each pair, or for each order of each
  /// pair.
  Corpus pairs(bool ordered, size_t per_class, uint64_t seed) const {
    std::mt19937_64 generator(seed);
    Corpus corpus;
    for (size_t first = 0; first < kTopics; ++first) {
      for (size_t second = ordered ? 0 : first + 1; second < kTopics;
           ++second) {
        if (first == second) {
          continue;
        }
        const auto label = static_cast<int64_t>(corpus.categories.size());
        corpus.categories.push_back(fmt::format(
            "{} {} {}", first, ordered ? "before" : "with", second));
        for (size_t i = 0; i < per_class; ++i) {
          const bool swap = !ordered && i % 2 == 1;
          corpus.texts.push_back(sentence(
              swap ? second : first, swap ? first : second, generator));
          corpus.labels.push_back(label);
        }
      }
    }
    return corpus;
  }
};

/// Pretrains a small network to see which two topics a text has, and writes it
/// to `folder` as Hugging Face's files. The task is to learn which of the two
/// comes first.
inline Task made_up_task(const std::filesystem::path& folder, bool quick) {
  const MadeUpLanguage language(1);
  std::filesystem::create_directories(folder);
  {
    std::ofstream vocabulary(folder / "vocab.txt");
    vocabulary << "[PAD]\n[UNK]\n[CLS]\n[SEP]\n";
    for (const auto& words : language.topics) {
      for (const auto& word : words) {
        vocabulary << word << '\n';
      }
    }
    for (const auto& word : language.filler) {
      vocabulary << word << '\n';
    }
  }
  const WordPiece tokenizer((folder / "vocab.txt").string());
  const auto config = nlohmann::ordered_json{
      {"model_type", "bert"},
      {"vocab_size", tokenizer.size()},
      {"hidden_size", 64},
      {"num_hidden_layers", 2},
      {"num_attention_heads", 4},
      {"intermediate_size", 128},
      {"max_position_embeddings", 32},
      {"type_vocab_size", 2},
      {"pad_token_id", 0},
      {"layer_norm_eps", 1e-12},
      {"hidden_act", "gelu"}};
  std::ofstream(folder / "config.json") << config.dump(2) << '\n';

  const size_t lesson_size = quick ? 60 : 300;
  const auto lessons = split_balanced(
      language.pairs(false, 2 * lesson_size, 2), tokenizer, lesson_size, 0, 3);
  torch::manual_seed(1);
  Network network(
      read_config(folder / "config.json")
          .hidden_dropout_prob(0)
          .attention_probs_dropout_prob(0)
          .num_labels(static_cast<int64_t>(lessons.categories.size()))
          .pooling(peft::models::Pooling::mean));
  TrainOptions options;
  options.epochs = 3;
  train(
      network,
      network->parameters(),
      lessons.train,
      tokenizer.padding(),
      options,
      "pretraining a small BERT");
  std::vector<std::pair<std::string, torch::Tensor>> weights;
  for (const auto& item : network->bert->named_parameters()) {
    weights.emplace_back(item.key(), item.value().detach());
  }
  peft::save_safetensors(weights, (folder / "model.safetensors").string());

  Task task;
  task.model = folder;
  task.network_name = "A small made-up BERT";
  task.data_name = "made-up sentences";
  task.padding = tokenizer.padding();
  task.data = quick
      ? split_balanced(language.pairs(true, 60, 4), tokenizer, 20, 10, 123)
      : split_balanced(language.pairs(true, 600, 4), tokenizer, 300, 100, 123);
  return task;
}

} // namespace gloss
