// The rows of the table in docs/hf_peft.md: every tuner of HF PEFT on every
// kind of layer. With PEFT_TABLE_RESULTS=FILE the answers are written there for
// golden/make_table.py.

#include "test.h"

#include "described_case.h"

#include <cstdlib>
#include <fstream>
#include <map>
#include <set>
#include <string>
#include <utility>

namespace test_hf_table {

using described::Case;
using described::json;

namespace {

/// What cannot be done: the case, the feature, and the word that libpeft says.
using Refusals = std::map<std::pair<std::string, std::string>, std::string>;

const Refusals& refusals() {
  static const Refusals all{
      {{"lora_on_conv2d_2_groups", "merge"}, "groups"},
      {{"lora_on_conv2d_2_groups", "unmerge"}, "groups"},
      {{"dora_on_conv2d_2_groups", "all"}, "without groups"},
      {{"beft_on_linear_without_bias", "merge"}, "no bias"},
      {{"beft_on_linear_without_bias", "unmerge"}, "no bias"}};
  return all;
}

} // namespace

TEST_CASE("hf table: every tuner on every kind of layer") {
  json answers = json::object();
  std::set<std::pair<std::string, std::string>> refused;
  std::vector<std::filesystem::path> folders;
  for (const auto& entry :
       std::filesystem::directory_iterator(golden("table"))) {
    if (entry.is_directory()) {
      folders.push_back(entry.path());
    }
  }
  REQUIRE(folders.size() > 50);
  for (const auto& folder : folders) {
    const auto name = folder.filename().string();
    const TemporaryDirectory out;
    Case one(folder, out.path());
    for (const auto& check : Case::checks()) {
      INFO(name << ": " << check.feature);
      const auto lines = one.run(check);
      auto known = refusals().find({name, check.feature});
      if (known == refusals().end()) {
        known = refusals().find({name, "all"});
      }
      auto& answer = answers[name][check.feature] = "";
      if (known == refusals().end()) {
        CHECK(lines == Case::Lines{});
        answer = lines.empty() ? "" : "wrong";
      } else {
        REQUIRE(lines.size() == 1);
        CHECK(lines.front().find("refused: ") == 0);
        CHECK(contains(lines.front(), known->second));
        answer = "refused: " + known->second;
        refused.insert(known->first);
      }
    }
  }
  CHECK(refused.size() == refusals().size());
  if (const char* path = std::getenv("PEFT_TABLE_RESULTS")) {
    std::ofstream(path) << answers.dump(1) << '\n';
  }
}

} // namespace test_hf_table
