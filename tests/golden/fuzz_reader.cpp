// Loads what fuzz_with_peft.py wrote and compares: fuzz_reader FOLDER [CASE].
// Each case gets result.json and, where it could be loaded, again/, the adapter
// as libpeft writes it. Built by hand, no part of the tests.

#include "../described_case.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

namespace {

namespace fs = std::filesystem;
using described::Case;

/// Whether PEFT cannot do it either, so that an error is in order.
bool may_refuse(const std::string& feature, const described::json& facts) {
  const bool merges = facts.at("merges").get<bool>() ||
      (feature != "merge" && feature != "unmerge");
  return !merges || feature == "mixed batch" || feature == "several";
}

} // namespace

int main(int argc, char** argv) {
  TORCH_CHECK(argc > 1, "usage: fuzz_reader FOLDER [CASE]");
  peft::functional::detail::torch_dropout = true; // as Python draws it
  std::vector<fs::path> folders;
  for (const auto& entry : fs::directory_iterator(argv[1])) {
    const auto name = entry.path().filename().string();
    if (fs::exists(entry.path() / "case.json") &&
        (argc < 3 || name.find(argv[2]) == 0)) {
      folders.push_back(entry.path());
    }
  }
  std::sort(folders.begin(), folders.end());
  size_t failed = 0;
  for (const auto& folder : folders) {
    Case one(folder, folder);
    described::json failures = described::json::array();
    for (const auto& check : Case::checks()) {
      for (const auto& line : one.run(check)) {
        if (line.find("refused: ") != 0 ||
            !may_refuse(check.feature, one.facts)) {
          failures.push_back(check.feature + ": " + line);
        }
      }
    }
    failed += failures.empty() ? 0 : 1;
    for (const auto& line : failures) {
      std::cout << folder.filename().string() << ": "
                << line.get<std::string>().substr(0, 300) << std::endl;
    }
    for (const auto& line : argc > 2 ? one.remarks : Case::Lines{}) {
      std::cout << folder.filename().string() << " (remark): " << line << '\n';
    }
    const described::json result = {
        {"failures", failures}, {"remarks", one.remarks}};
    std::ofstream(folder / "result.json") << result.dump(1) << '\n';
  }
  std::cout << folders.size() - failed << " of " << folders.size()
            << " cases are as PEFT has them\n";
  return failed == 0 ? 0 : 1;
}
