#pragma once

// The table: a row for each method, in a file as soon as it is there.

#include "../010_gloss_categories/report.h"

#include <fmt/format.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace additive {

/// What came of one method.
struct Row {
  std::string name;
  int64_t adapter = 0; ///< trainable parameters, the head's not among them
  int64_t head = 0;
  double accuracy = 0;
  double step = 0; ///< time of a step / LoRA's; 0: not measured
  double memory = 0; ///< MiB
  double forward = 0; ///< time of a forward / the base's
  std::string files; ///< what came back from them
};

/// A Markdown table that grows with every row, so that what is there can be
/// read at any time, and the notes below it.
class Results {
 public:
  Results(const std::filesystem::path& path, size_t test_size)
      : file_(path), test_size_(test_size) {
    TORCH_CHECK(file_.good(), "peft: cannot write ", path.string());
    write(line(
        "method",
        "adapter",
        "with head",
        "test accuracy",
        "step / LoRA's",
        "memory",
        "forward / base's",
        "saved, loaded"));
    write(line("---", "--:", "--:", "--:", "--:", "--:", "--:", "---"));
  }

  void add(const Row& row) {
    const auto measured = [](double value, const char* format) {
      return value == 0 ? std::string("-")
                        : fmt::format(fmt::runtime(format), value);
    };
    write(line(
        row.name,
        gloss::with_commas(row.adapter),
        gloss::with_commas(row.adapter + row.head),
        fmt::format(
            "{:.3f} ± {:.3f}",
            row.accuracy,
            gloss::standard_error(row.accuracy, test_size_)),
        measured(row.step, "{:.2f}"),
        measured(row.memory, "{:.0f} MiB"),
        measured(row.forward, "{:.2f}"),
        row.files));
  }

  void note(const std::string& text) {
    write("\n" + text + "\n");
  }

  /// All that was written so far, for the terminal.
  const std::string& text() const {
    return text_;
  }

 private:
  template <class... Cells>
  static std::string line(const Cells&... cells) {
    constexpr size_t kWidths[] = {23, 8, 9, 13, 13, 8, 16, 13};
    std::string result;
    size_t i = 0;
    const auto add = [&](const std::string& cell) {
      const size_t width = kWidths[i++];
      // ± and ³ have two bytes and one column.
      const size_t columns = cell.size() - (cell.find("\xC2") != cell.npos);
      const std::string space(width > columns ? width - columns : 0, ' ');
      const bool left = i == 1 || i == 8;
      result += "| " + (left ? cell + space : space + cell) + " ";
    };
    (add(cells), ...);
    return result + "|\n";
  }

  void write(const std::string& text) {
    text_ += text;
    file_ << text << std::flush;
  }

  std::ofstream file_;
  std::string text_;
  size_t test_size_;
};

} // namespace additive
