// The example's tokenizer against Hugging Face's (golden/make_bert.py).

#include "test.h"

#include "../examples/010_gloss_categories/wordpiece.h"

#include <peft/io/safetensors.h>

#include <nlohmann/json.hpp>

#include <fstream>

namespace test_wordpiece {

namespace {

std::vector<std::string> lines_of(const std::string& path) {
  std::ifstream file(path);
  std::vector<std::string> lines;
  for (std::string line; std::getline(file, line);) {
    lines.push_back(line);
  }
  return lines;
}

std::vector<int64_t> body(std::vector<int64_t> ids) {
  return {ids.begin() + 1, ids.end() - 1};
}

} // namespace

TEST_CASE("Ids are those of Hugging Face's tokenizer", "[wordpiece]") {
  const gloss::WordPiece tokenizer(golden("bert/vocab.txt"));
  const auto lines = lines_of(golden("bert/wordpiece.jsonl"));
  REQUIRE(lines.size() > 400);
  for (const auto& line : lines) {
    const auto item = nlohmann::json::parse(line);
    INFO(line);
    REQUIRE(
        tokenizer.encode(item["text"].get<std::string>()) ==
        item["ids"].get<std::vector<int64_t>>());
  }
}

TEST_CASE("Accents, case and unknown bytes leave the text", "[wordpiece]") {
  const gloss::WordPiece tokenizer(golden("bert/vocab.txt"));
  const auto plain = tokenizer.encode("cafe b");
  REQUIRE(tokenizer.encode("CAF\xC3\x89 B") == plain); // precomposed
  REQUIRE(tokenizer.encode("cafe\xCC\x81 b") == plain); // combining
  REQUIRE(
      tokenizer.encode("caf\xFF"
                       "e\xC3 b\xE2\x82") == plain); // no UTF-8
  REQUIRE(tokenizer.encode(std::string("ca\0fe b", 7)) == plain);
  REQUIRE(tokenizer.encode("").size() == 2);
}

TEST_CASE("Long texts are cut and keep their last token", "[wordpiece]") {
  const gloss::WordPiece tokenizer(golden("bert/vocab.txt"));
  const auto whole = tokenizer.encode("a b c d e f");
  REQUIRE(whole.size() == 8);
  const auto cut = tokenizer.encode("a b c d e f", 5);
  REQUIRE(cut.size() == 5);
  REQUIRE(cut.front() == whole.front());
  REQUIRE(cut.back() == whole.back());
  REQUIRE(
      body(cut) == std::vector<int64_t>(whole.begin() + 1, whole.begin() + 4));
}

TEST_CASE("A vocabulary that is none is refused", "[wordpiece]") {
  CHECK(contains(
      error_of([] { gloss::WordPiece("/nowhere/vocab.txt"); }),
      "/nowhere/vocab.txt"));
  TemporaryDirectory folder;
  std::ofstream(folder / "vocab.txt") << "[PAD]\n[UNK]\n[CLS]\na\n";
  CHECK(contains(
      error_of([&] { gloss::WordPiece(folder / "vocab.txt"); }), "[SEP]"));
}

TEST_CASE("The real vocabulary gives the real ids", "[wordpiece]") {
  const std::string folder = PEFT_TEST_MINILM;
  if (folder.empty()) {
    WARN("skipped: the MiniLM vocabulary is not on this machine");
    return;
  }
  const gloss::WordPiece tokenizer(folder + "/vocab.txt");
  REQUIRE(tokenizer.size() == 30522);
  const auto want =
      peft::load_safetensors(golden("bert/minilm_expected.safetensors"));
  const auto ids = want.at("input_ids");
  const auto sentences = lines_of(golden("bert/minilm_sentences.txt"));
  REQUIRE(static_cast<int64_t>(sentences.size()) == ids.size(0));
  for (size_t i = 0; i < sentences.size(); ++i) {
    auto row = tokenizer.encode(sentences[i]);
    row.resize(static_cast<size_t>(ids.size(1)), tokenizer.padding());
    INFO(sentences[i]);
    REQUIRE(torch::equal(ids[static_cast<int64_t>(i)], torch::tensor(row)));
  }
}

} // namespace test_wordpiece
