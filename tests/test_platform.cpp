#include "test.h"

#include <peft/detail/platform.h>

#include <cstring>
#include <fstream>
#include <string>

#if PEFT_POSIX
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace test_platform {

namespace fs = std::filesystem;
using peft::detail::AtomicFile;
using peft::detail::MappedFile;

namespace {

std::string content(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

size_t entries(const fs::path& folder) {
  return static_cast<size_t>(
      std::distance(fs::directory_iterator(folder), fs::directory_iterator()));
}

} // namespace

TEST_CASE("a mapped file is read, and writing to it leaves the file alone") {
  TemporaryDirectory folder;
  const auto path = folder / "bytes";
  std::ofstream(path) << "some bytes";

  MappedFile file(path);
  REQUIRE(file.size() == 10);
  REQUIRE(std::memcmp(file.data(), "some bytes", 10) == 0);
  std::memcpy(file.data(), "SOME", 4);
  REQUIRE(std::memcmp(file.data(), "SOME bytes", 10) == 0);
  REQUIRE(content(path) == "some bytes");
}

TEST_CASE("an empty file maps to nothing, a missing one and a folder throw") {
  TemporaryDirectory folder;
  const auto path = folder / "empty";
  std::ofstream{path};

  MappedFile file(path);
  REQUIRE(file.size() == 0);
  REQUIRE(contains(
      error_of([&] { MappedFile{folder / "missing"}; }), "peft: cannot "));
  REQUIRE(contains(
      error_of([&] { MappedFile{folder.path().string()}; }),
      "peft: cannot read"));
}

TEST_CASE("an atomic file appears whole on commit and leaves nothing else") {
  TemporaryDirectory folder;
  const auto path = folder / "out";
  {
    AtomicFile file(path);
    file.write("one ");
    file.write("two", 3);
    REQUIRE_FALSE(fs::exists(path));
    file.commit();
  }
  REQUIRE(content(path) == "one two");
  REQUIRE(entries(folder.path()) == 1);
}

TEST_CASE("without a commit the old file stays and the new one goes") {
  TemporaryDirectory folder;
  const auto path = folder / "out";
  std::ofstream(path) << "old";
  {
    AtomicFile file(path);
    file.write("new");
  }
  REQUIRE(content(path) == "old");
  REQUIRE(entries(folder.path()) == 1);
}

TEST_CASE("two writers of one file do not meet") {
  TemporaryDirectory folder;
  const auto path = folder / "out";
  AtomicFile first(path);
  AtomicFile second(path);
  first.write("first");
  second.write("second");
  second.commit();
  first.commit();
  REQUIRE(content(path) == "first");
  REQUIRE(entries(folder.path()) == 1);
}

TEST_CASE("an atomic file refuses a missing folder and writing after commit") {
  TemporaryDirectory folder;
  REQUIRE(contains(
      error_of([&] { AtomicFile{folder / "no/such/folder"}; }),
      "peft: cannot write"));
  REQUIRE(fs::create_directory(folder / "in_the_way"));
  REQUIRE(contains(
      error_of([&] { AtomicFile{folder / "in_the_way"}; }),
      "peft: cannot replace"));
  AtomicFile file(folder / "out");
  file.commit();
  REQUIRE(contains(error_of([&] { file.write("x"); }), "already closed"));
  REQUIRE(contains(error_of([&] { file.commit(); }), "already closed"));
}

#if PEFT_POSIX
TEST_CASE("replacing keeps permissions and follows a symbolic link") {
  TemporaryDirectory folder;
  const auto path = folder / "out";
  const auto link = folder / "link";
  std::ofstream(path) << "old";
  REQUIRE(::chmod(path.c_str(), 0640) == 0);
  fs::create_symlink(path, link);

  AtomicFile file(link);
  file.write("new");
  file.commit();
  REQUIRE(fs::is_symlink(link));
  REQUIRE(content(path) == "new");
  struct stat status = {};
  REQUIRE(::stat(path.c_str(), &status) == 0);
  REQUIRE((status.st_mode & 07777) == 0640);
}
#endif

} // namespace test_platform
