#pragma once

// BERT's uncased WordPiece tokenizer: clean, strip accents, lower case, split,
// longest match first.

#include <utf8proc.h>

#include <c10/util/Exception.h>

#include <cstdint>
#include <fstream>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace gloss {

/// Text -> token ids, `[CLS] pieces... [SEP]`, equal to Hugging Face's uncased
/// BERT tokenizer.
///
/// Equal over all of Unicode 8, where the tables of that tokenizer end; a few
/// hundred marks and signs that are younger are dropped here and unknown there.
/// The names of special tokens inside a text are read as ordinary text. Bytes
/// that are no UTF-8 are left out.
class WordPiece {
 public:
  /// Reads `vocab.txt`: one token a line, its id is the line number.
  explicit WordPiece(const std::string& path) {
    std::ifstream file(path);
    TORCH_CHECK(file, "peft: cannot open the vocabulary ", path);
    for (std::string line; std::getline(file, line);) {
      if (!line.empty() && line.back() == '\r') {
        line.pop_back();
      }
      vocabulary_.emplace(line, static_cast<int64_t>(vocabulary_.size()));
    }
    unknown_ = id_of("[UNK]", path);
    first_ = id_of("[CLS]", path);
    last_ = id_of("[SEP]", path);
    padding_ = id_of("[PAD]", path);
  }

  /// Ids of `text`, cut to `max_length` ids with the two special ones.
  std::vector<int64_t> encode(std::string_view text, size_t max_length = 512)
      const {
    std::vector<int64_t> ids{first_};
    for (const auto& word : split(normalize(decode(text)))) {
      append_pieces(word, ids);
    }
    ids.resize(std::min(ids.size(), max_length - 1));
    ids.push_back(last_);
    return ids;
  }

  int64_t padding() const {
    return padding_;
  }
  size_t size() const {
    return vocabulary_.size();
  }

 private:
  using CodePoints = std::vector<utf8proc_int32_t>;
  static constexpr size_t kMaxWordLength = 100; // longer words become [UNK]

  int64_t id_of(const std::string& token, const std::string& path) const {
    const auto found = vocabulary_.find(token);
    TORCH_CHECK(
        found != vocabulary_.end(),
        "peft: the vocabulary ",
        path,
        " has no ",
        token);
    return found->second;
  }

  // ~~~~ characters ~~~~

  static bool is_space(utf8proc_int32_t c) {
    const auto category = utf8proc_category(c);
    return c == '\t' || c == '\n' || c == '\r' ||
        category == UTF8PROC_CATEGORY_ZS || category == UTF8PROC_CATEGORY_ZL ||
        category == UTF8PROC_CATEGORY_ZP;
  }

  /// Control, format and private-use characters, and U+FFFD, leave the text.
  static bool is_dropped(utf8proc_int32_t c) {
    const auto category = utf8proc_category(c);
    return c == 0xFFFD || category == UTF8PROC_CATEGORY_CC ||
        category == UTF8PROC_CATEGORY_CF || category == UTF8PROC_CATEGORY_CO ||
        category == UTF8PROC_CATEGORY_CS;
  }

  static bool is_ideograph(utf8proc_int32_t c) {
    return (c >= 0x4E00 && c <= 0x9FFF) || (c >= 0x3400 && c <= 0x4DBF) ||
        (c >= 0x20000 && c <= 0x2A6DF) || (c >= 0x2A700 && c <= 0x2B73F) ||
        (c >= 0x2B740 && c <= 0x2B81F) || (c >= 0x2B920 && c <= 0x2CEAF) ||
        (c >= 0xF900 && c <= 0xFAFF) || (c >= 0x2F800 && c <= 0x2FA1F);
  }

  /// Unicode's punctuation, and the ASCII symbols that BERT counts with it.
  static bool is_punctuation(utf8proc_int32_t c) {
    if ((c >= 33 && c <= 47) || (c >= 58 && c <= 64) || (c >= 91 && c <= 96) ||
        (c >= 123 && c <= 126)) {
      return true;
    }
    const auto category = utf8proc_category(c);
    return category >= UTF8PROC_CATEGORY_PC && category <= UTF8PROC_CATEGORY_PO;
  }

  // ~~~~ text ~~~~

  static CodePoints decode(std::string_view text) {
    CodePoints points;
    const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
    for (size_t at = 0; at < text.size();) {
      utf8proc_int32_t point = 0;
      const auto used = utf8proc_iterate(
          bytes + at, static_cast<utf8proc_ssize_t>(text.size() - at), &point);
      if (used > 0) {
        points.push_back(point);
      }
      at += used > 0 ? static_cast<size_t>(used) : 1;
    }
    return points;
  }

  static std::string encode_utf8(
      const utf8proc_int32_t* begin,
      const utf8proc_int32_t* end) {
    std::string text;
    for (; begin != end; ++begin) {
      utf8proc_uint8_t bytes[4];
      const auto used = utf8proc_encode_char(*begin, bytes);
      text.append(
          reinterpret_cast<const char*>(bytes), static_cast<size_t>(used));
    }
    return text;
  }

  /// Clean, set ideographs apart, decompose, drop the accents, lower case.
  static CodePoints normalize(const CodePoints& text) {
    CodePoints clean;
    for (const auto c : text) {
      if (is_space(c)) {
        clean.push_back(' ');
      } else if (is_ideograph(c)) {
        clean.insert(clean.end(), {' ', c, ' '});
      } else if (!is_dropped(c)) {
        clean.push_back(c);
      }
    }
    CodePoints result;
    for (const auto c : clean) {
      utf8proc_int32_t parts[32];
      int boundary = 0;
      const auto count =
          utf8proc_decompose_char(c, parts, 32, UTF8PROC_DECOMPOSE, &boundary);
      for (utf8proc_ssize_t i = 0; i < count; ++i) {
        if (utf8proc_category(parts[i]) != UTF8PROC_CATEGORY_MN) {
          result.push_back(utf8proc_tolower(parts[i]));
        }
      }
    }
    return result;
  }

  /// Words between spaces; every punctuation character is a word of its own.
  static std::vector<CodePoints> split(const CodePoints& text) {
    std::vector<CodePoints> words;
    bool open = false; // the last word may still grow
    for (const auto c : text) {
      const bool alone = is_punctuation(c);
      if (is_space(c)) {
        open = false;
      } else if (open && !alone) {
        words.back().push_back(c);
      } else {
        words.push_back({c});
        open = !alone;
      }
    }
    return words;
  }

  /// Longest known piece first; a word that cannot be covered is one [UNK].
  void append_pieces(const CodePoints& word, std::vector<int64_t>& ids) const {
    const auto known = ids.size();
    size_t begin = word.size() > kMaxWordLength ? word.size() : 0;
    bool covered = word.size() <= kMaxWordLength;
    while (begin < word.size()) {
      auto end = word.size();
      auto found = vocabulary_.end();
      for (; end > begin && found == vocabulary_.end(); --end) {
        const auto piece = encode_utf8(word.data() + begin, word.data() + end);
        found = vocabulary_.find(begin == 0 ? piece : "##" + piece);
        if (found != vocabulary_.end()) {
          break;
        }
      }
      if (found == vocabulary_.end()) {
        covered = false;
        break;
      }
      ids.push_back(found->second);
      begin = end;
    }
    if (!covered) {
      ids.resize(known);
      ids.push_back(unknown_);
    }
  }

  std::unordered_map<std::string, int64_t> vocabulary_;
  int64_t unknown_ = 0;
  int64_t first_ = 0;
  int64_t last_ = 0;
  int64_t padding_ = 0;
};

} // namespace gloss
