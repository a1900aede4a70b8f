#pragma once

// Reads WordNet 3.0's definitions and the lexicographer's category of each.

#include <c10/util/Exception.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace gloss {

/// Texts with the class of each, `0 <= labels[i] < categories.size()`.
struct Corpus {
  std::vector<std::string> texts;
  std::vector<int64_t> labels;
  std::vector<std::string> categories;
};

/// The names of lexicographer files 3 to 43, from lexnames(5WN).
inline const std::vector<std::string>& lexname_table() {
  static const std::vector<std::string> names{
      "noun.Tops",        "noun.act",           "noun.animal",
      "noun.artifact",    "noun.attribute",     "noun.body",
      "noun.cognition",   "noun.communication", "noun.event",
      "noun.feeling",     "noun.food",          "noun.group",
      "noun.location",    "noun.motive",        "noun.object",
      "noun.person",      "noun.phenomenon",    "noun.plant",
      "noun.possession",  "noun.process",       "noun.quantity",
      "noun.relation",    "noun.shape",         "noun.state",
      "noun.substance",   "noun.time",          "verb.body",
      "verb.change",      "verb.cognition",     "verb.communication",
      "verb.competition", "verb.consumption",   "verb.contact",
      "verb.creation",    "verb.emotion",       "verb.motion",
      "verb.perception",  "verb.possession",    "verb.social",
      "verb.stative",     "verb.weather"};
  return names;
}

/// The definition in a gloss: what stands before the first example, `a large
/// dog; "the dog barked"` -> `a large dog`.
inline std::string definition_of(const std::string& gloss) {
  auto text = gloss.substr(0, gloss.find("; \""));
  const auto begin = text.find_first_not_of(" \t\r");
  const auto end = text.find_last_not_of(" \t\r");
  return begin == std::string::npos ? "" : text.substr(begin, end - begin + 1);
}

/// Every noun and verb definition in `folder` (`data.noun`, `data.verb`; the
/// format is wndb(5WN)).
inline Corpus read_wordnet(const std::filesystem::path& folder) {
  constexpr int64_t kFirstFile = 3; // noun.Tops
  Corpus corpus;
  corpus.categories = lexname_table();
  for (const char* name : {"data.noun", "data.verb"}) {
    std::ifstream file(folder / name);
    TORCH_CHECK(file, "peft: cannot open ", (folder / name).string());
    for (std::string line; std::getline(file, line);) {
      const auto bar = line.find("| ");
      if (line.empty() || line[0] == ' ' || bar == std::string::npos) {
        continue; // the licence at the top
      }
      // "offset lex_filenum ...": eight digits, a space, two digits.
      const auto label = std::stoll(line.substr(9, 2)) - kFirstFile;
      TORCH_CHECK(
          label >= 0 && label < static_cast<int64_t>(corpus.categories.size()),
          "peft: ",
          (folder / name).string(),
          " names the unknown category ",
          line.substr(9, 2));
      corpus.texts.push_back(definition_of(line.substr(bar + 2)));
      corpus.labels.push_back(label);
    }
  }
  return corpus;
}

} // namespace gloss
