// registration_refused key|version: somebody else owns the dispatch key, or
// another version of libpeft is in the process. Attach says so and changes
// nothing.
#include <peft/core/adapted_weight.h>
#include <peft/core/attach.h>
#include <peft/methods/lora.h>

#include <torch/library.h>

#include <cstdio>
#include <string>

namespace {

void someone_elses_fallback(
    const c10::OperatorHandle&,
    c10::DispatchKeySet,
    torch::jit::Stack*) {}

} // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  std::string words;
  if (what == "key") {
    static torch::Library owner(
        torch::Library::IMPL,
        "_",
        c10::DispatchKey::PEFT_DISPATCH_KEY,
        __FILE__,
        __LINE__);
    owner.fallback(
        torch::CppFunction::makeFromBoxedFunction<&someone_elses_fallback>());
    words = "owns the dispatch key DeferredInit";
  } else {
    static torch::Library other(
        torch::Library::FRAGMENT, "peft", std::nullopt, __FILE__, __LINE__);
    other.def("_abi() -> int", []() -> int64_t { return 7; });
    words = "incompatible versions";
  }
  torch::nn::Linear linear(4, 4);
  for (int attempt = 0; attempt < 2; ++attempt) {
    std::string error;
    try {
      peft::attach(
          *linear, peft::LoraOptions(2).targets(peft::Targets::all_linear()));
    } catch (const c10::Error& e) {
      error = e.what_without_backtrace();
    }
    if (error.find(words) == std::string::npos || !linear->children().empty() ||
        peft::is_adapted(linear->weight) || !linear->weight.requires_grad()) {
      std::fprintf(stderr, "FAILED: attempt %d: %s\n", attempt, error.c_str());
      return 1;
    }
  }
  return 0;
}
