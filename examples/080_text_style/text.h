#pragma once

// Texts as rows of characters: files into 96 symbols, a part held out, windows
// to train on.

#include <torch/types.h>
#include <torch/utils.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

namespace style {

// ~~~~ symbols ~~~~

/// Newline and the printable characters of ASCII.
constexpr int64_t kSymbols = 96;

inline torch::Tensor encode(const std::string& text) {
  auto symbols =
      torch::empty({static_cast<int64_t>(text.size())}, torch::kByte);
  auto* out = symbols.data_ptr<uint8_t>();
  for (const char c : text) {
    *out++ = static_cast<uint8_t>(c == '\n' ? 0 : c - ' ' + 1);
  }
  return symbols;
}

/// The text of symbols `[length]`.
inline std::string decode(const torch::Tensor& symbols) {
  const auto bytes = symbols.to(torch::kByte).contiguous();
  std::string text;
  for (int64_t i = 0; i < bytes.numel(); ++i) {
    const auto symbol = bytes.data_ptr<uint8_t>()[i];
    text += symbol == 0 ? '\n' : static_cast<char>(symbol - 1 + ' ');
  }
  return text;
}

/// UTF-8 in the 96 symbols: curly quotes and dashes become plain ones, what has
/// no counterpart is left out.
inline std::string to_ascii(const std::string& text) {
  static const std::array<std::pair<const char*, const char*>, 8> kPlain{
      {{"\xE2\x80\x98", "'"},
       {"\xE2\x80\x99", "'"},
       {"\xE2\x80\x9C", "\""},
       {"\xE2\x80\x9D", "\""},
       {"\xE2\x80\x93", "-"},
       {"\xE2\x80\x94", "--"},
       {"\xC2\xB4", "'"},
       {"\xC2\xA0", " "}}};
  std::string out;
  for (size_t i = 0; i < text.size();) {
    const auto byte = static_cast<unsigned char>(text[i]);
    if (byte < 0x80) {
      if (byte == '\n' || (byte >= ' ' && byte <= '~')) {
        out += text[i];
      } else if (byte == '\t') {
        out += ' ';
      }
      ++i;
      continue;
    }
    size_t end = i + 1; // behind this character's bytes
    while (end < text.size() &&
           (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) {
      ++end;
    }
    for (const auto& [curly, plain] : kPlain) {
      if (text.compare(i, end - i, curly) == 0) {
        out += plain;
      }
    }
    i = end;
  }
  return out;
}

/// One line a paragraph: the lines up to an empty one are joined, and runs of
/// spaces become one.
inline std::string unwrap(const std::string& text) {
  std::string out;
  int newlines = 0;
  bool space = false;
  for (const char c : text) {
    if (c == '\n') {
      ++newlines;
      space = true;
    } else if (c == ' ') {
      space = true;
    } else {
      if (!out.empty() && space) {
        out += newlines > 1 ? '\n' : ' ';
      }
      out += c;
      space = false;
      newlines = 0;
    }
  }
  return out + '\n';
}

// ~~~~ files ~~~~

/// Undoes LZW as compress(1) writes it, without its three bytes of header:
/// codes of 9 to 16 bits, lowest bit first, 256 to start anew.
inline std::string unpack_lzw(const std::string& packed) {
  constexpr size_t kClear = 256;
  std::string out;
  // An entry is where in `out` its characters first stood.
  std::vector<std::pair<size_t, size_t>> entries(kClear + 1);
  size_t width = 9;
  size_t group = 0; // begin of the codes of this width, in bits
  size_t at = 0; // bits
  std::pair<size_t, size_t> last{0, 0};
  while (at + width <= 8 * packed.size()) {
    size_t code = 0;
    for (size_t bit = 0; bit < width; ++bit, ++at) {
      const auto byte = static_cast<unsigned char>(packed[at / 8]);
      code |= static_cast<size_t>(byte >> (at % 8) & 1) << bit;
    }
    const auto begin = out.size();
    if (code == kClear) {
      entries.resize(kClear + 1);
      last = {0, 0};
    } else if (code < kClear) {
      out += static_cast<char>(code);
    } else {
      TORCH_CHECK(
          code < entries.size() || (code == entries.size() && last.second > 0),
          "peft: the packed text is damaged");
      // A code that is only now being made: the last one and its first letter.
      const auto source = code < entries.size()
          ? entries[code]
          : std::make_pair(last.first, last.second + 1);
      for (size_t i = 0; i < source.second; ++i) {
        out += out[source.first + i];
      }
    }
    if (code != kClear) {
      if (last.second > 0 && entries.size() < size_t{1} << 16) {
        entries.emplace_back(last.first, last.second + 1);
      }
      last = {begin, out.size() - begin};
    }
    const bool grows = width < 16 && entries.size() == size_t{1} << width;
    if (grows || code == kClear) {
      // Codes come in groups of eight, of which the rest is empty.
      const auto unit = 8 * width;
      at = group + (at - group + unit - 1) / unit * unit;
      group = at;
      width = grows ? width + 1 : 9;
    }
  }
  return out;
}

/// The verses of Debian's bible.data, one a line: a header, a table of where
/// each window begins, and the windows, packed one by one. The numbers are big
/// endian.
inline std::string read_bible(const std::string& file) {
  const auto number = [&](size_t at) {
    TORCH_CHECK(at + 4 <= file.size(), "peft: the Bible's file ends early");
    size_t value = 0;
    for (size_t i = at; i < at + 4; ++i) {
      value = value << 8 | static_cast<unsigned char>(file[i]);
    }
    return value;
  };
  constexpr size_t kCount = 88, kTable = 92;
  const auto windows = number(kCount);
  std::string lines;
  for (size_t i = 0; i < windows; ++i) {
    const auto begin = number(kTable + 4 * i);
    const auto end =
        i + 1 < windows ? number(kTable + 4 * (i + 1)) : file.size();
    TORCH_CHECK(
        begin <= end && end <= file.size(),
        "peft: the Bible's file ends early");
    lines += unpack_lzw(file.substr(begin, end - begin));
  }
  // "Ge1:1 In the beginning ...", below one line of title.
  std::string text;
  for (size_t line = lines.find('\n') + 1; line < lines.size();) {
    const auto end = std::min(lines.find('\n', line), lines.size());
    const auto verse = lines.find(' ', line) + 1;
    if (verse > line && verse < end) {
      text += lines.substr(verse, end - verse) + '\n';
    }
    line = end + 1;
  }
  return text;
}

/// A text of which every twentieth block of 4096 characters is held out to
/// choose learning rates by, and another one to test on.
struct Text {
  std::string name;
  torch::Tensor train; // bytes, [characters]
  torch::Tensor validation;
  torch::Tensor test;
};

/// Reads a plain text, or the Bible as Debian packs it.
inline Text read_text(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file.good(), "peft: cannot read the text ", path.string());
  const std::string bytes(
      std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>{});
  const bool is_bible = bytes.compare(0, 4, "EC02") == 0;
  const auto symbols =
      encode(is_bible ? read_bible(bytes) : unwrap(to_ascii(bytes)));
  constexpr int64_t kBlock = 4096, kBlocks = 20;
  TORCH_CHECK(
      symbols.numel() >= 2 * kBlocks * kBlock,
      "peft: ",
      path.string(),
      " has ",
      symbols.numel(),
      " characters; a text needs ",
      2 * kBlocks * kBlock);
  std::vector<torch::Tensor> train, validation, test;
  int64_t index = 0;
  for (const auto& block : symbols.split(kBlock)) {
    const auto place = index++ % kBlocks;
    (place == 6 ? validation : place == 13 ? test : train).push_back(block);
  }
  return {
      is_bible ? "the King James Bible" : path.stem().string(),
      torch::cat(train),
      torch::cat(validation),
      torch::cat(test)};
}

/// Windows of `length` + 1 symbols, `[count, length + 1]`, at random places.
inline torch::Tensor random_windows(
    const torch::Tensor& symbols,
    int64_t count,
    int64_t length,
    const at::Generator& generator) {
  const auto begins = torch::randint(
      symbols.numel() - length, {count, 1}, generator, torch::kLong);
  return symbols.index({begins + torch::arange(length + 1)}).to(torch::kLong);
}

/// At most `count` such windows, evenly spread.
inline torch::Tensor
spread_windows(const torch::Tensor& symbols, int64_t count, int64_t length) {
  const auto all = symbols.numel() / (length + 1);
  count = std::min(count, all);
  return symbols.narrow(0, 0, all * (length + 1))
      .view({all, length + 1})
      .index_select(0, torch::arange(count).mul(all).floor_divide(count))
      .to(torch::kLong);
}

} // namespace style
