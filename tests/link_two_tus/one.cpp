// With two.cpp: both include everything, and the program links.
#include <peft/peft.h>

#include <cstring>

const char* version_seen_by_two();

int main() {
  return std::strcmp(peft::version(), version_seen_by_two());
}
