#pragma once

// A search's journal: a first line that says which search it is, then a line of
// JSON for each trial, on the disk before the next begins. A line counts once
// its end is there, so what a kill leaves behind is passed over.

#include <peft/detail/platform.h>
#include <peft/io/json.h>
#include <peft/train/search/trial.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft::detail {

/// One line of the journal.
inline nlohmann::json to_json(const Trial& trial) {
  nlohmann::json line{
      {"trial", trial.number},
      {"rung", trial.rung},
      {"resource", trial.resource},
      {"configuration", trial.configuration.to_json()},
      {"seconds", trial.seconds}};
  if (trial.failed()) {
    line["error"] = trial.error;
  } else {
    line["accuracy"] = trial.outcome.accuracy;
    line["costs"] = trial.outcome.costs;
  }
  return line;
}

/// `text` with U+FFFD where it is no UTF-8, which JSON cannot hold.
inline std::string valid_utf8(const std::string& text) {
  const auto kept = nlohmann::json(text).dump(
      -1, ' ', false, nlohmann::json::error_handler_t::replace);
  return nlohmann::json::parse(kept).get<std::string>();
}

/// The trials of a journal, handed out again in their order, and the file to
/// which new ones are appended.
class SearchJournal {
 public:
  /// No journal: hands out nothing and keeps nothing.
  SearchJournal() = default;

  /// Opens `path`, made if need be, for the search that `header` describes; an
  /// error where the journal is of another one.
  SearchJournal(std::string path, const nlohmann::json& header)
      : path_(std::move(path)), file_(std::make_unique<AppendFile>(path_)) {
    const std::string first = header.dump() + "\n";
    const std::string text = file_->read();
    const size_t end = text.find('\n');
    if (end == std::string::npos) { // not even the first line is whole
      TORCH_CHECK(
          first.compare(0, text.size(), text) == 0,
          "peft: '",
          path_,
          "' is not the journal of this search; name another file, or remove "
          "it to begin anew");
      file_->truncate(0);
      file_->append(first);
      return;
    }
    check_header(text.substr(0, end), header);
    size_t begin = end + 1;
    for (size_t stop; (stop = text.find('\n', begin)) != std::string::npos;
         begin = stop + 1) {
      lines_.push_back(text.substr(begin, stop - begin));
    }
    file_->truncate(begin); // what follows is torn
  }

  /// The next trial that was kept, which must be this one; nothing after the
  /// last.
  std::optional<Trial> take(const Trial& wanted) {
    if (next_ == lines_.size()) {
      return std::nullopt;
    }
    const auto where =
        c10::str("\"", path_, "\", line ", next_ + 2); // the header is line 1
    const auto line = parse_json(lines_[next_++], where);
    const auto expected = to_json(wanted);
    for (const char* field : {"trial", "rung", "resource", "configuration"}) {
      const auto& own = expected.at(field);
      const auto there = line.is_object() && line.contains(field)
          ? line.at(field)
          : nlohmann::json();
      TORCH_CHECK(
          there == own,
          "peft: the journal ",
          where,
          ", has the ",
          field,
          " ",
          there.dump(),
          " where this search has ",
          own.dump(),
          "; its space, its counts or its objective are others now. Name "
          "another file, or remove it to begin anew");
    }
    Trial trial = wanted;
    try {
      trial.seconds = line.at("seconds").get<double>();
      if (line.contains("error")) {
        trial.error = line.at("error").get<std::string>();
      } else {
        trial.outcome.accuracy = line.at("accuracy").get<double>();
        trial.outcome.costs =
            line.at("costs").get<std::map<std::string, double>>();
      }
    } catch (const nlohmann::json::exception& error) {
      TORCH_CHECK(
          false, "peft: cannot read the journal ", where, ": ", error.what());
    }
    return trial;
  }

  /// Keeps a trial; it is on the disk when this returns.
  void keep(const Trial& trial) {
    if (file_) {
      file_->append(to_json(trial).dump() + "\n");
    }
  }

  /// After the search's end nothing may be left.
  void check_empty() const {
    TORCH_CHECK(
        next_ == lines_.size(),
        "peft: the journal '",
        path_,
        "' holds ",
        lines_.size() - next_,
        " trials more than this search has; name another file, or remove it");
  }

 private:
  void check_header(const std::string& line, const nlohmann::json& header)
      const {
    const auto there = parse_json(line, "\"" + path_ + "\", line 1");
    TORCH_CHECK(
        there.is_object() && there.contains("libpeft_search"),
        "peft: '",
        path_,
        "' is not the journal of a search; name another file");
    for (const auto& item : header.items()) {
      const auto value = there.value(item.key(), nlohmann::json());
      TORCH_CHECK(
          value == item.value(),
          "peft: the journal '",
          path_,
          "' is of another search: its ",
          item.key(),
          " is ",
          value.dump(),
          ", and here it is ",
          item.value().dump(),
          "; name another file, or remove it to begin anew");
    }
  }

  std::string path_;
  std::unique_ptr<AppendFile> file_;
  std::vector<std::string> lines_;
  size_t next_ = 0;
};

} // namespace peft::detail
