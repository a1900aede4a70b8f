#include "test.h"

#include <string>

namespace test_version {

TEST_CASE("the version text is made of the three numbers", "[version]") {
  const std::string numbers = std::to_string(PEFT_VERSION_MAJOR) + "." +
      std::to_string(PEFT_VERSION_MINOR) + "." +
      std::to_string(PEFT_VERSION_PATCH);
  REQUIRE(peft::version() == numbers);
}

} // namespace test_version
