#include <peft/peft.h>

const char* version_seen_by_two();

const char* version_seen_by_two() {
  return peft::version();
}
