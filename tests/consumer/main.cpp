// What a user's first file looks like; each outside project builds it.
#include <peft/peft.h>

#include <cstdio>

int main() {
  std::printf("peft %s\n", peft::version());
}
