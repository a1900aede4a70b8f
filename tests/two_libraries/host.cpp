// two_libraries_host local|global in_turn|at_once A B: loads both libraries,
// uses adapters of each through the other, and unloads them.
#include "interface.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <thread>

namespace {

int failures = 0;

void expect(bool ok, const char* what) {
  if (!ok) {
    std::fprintf(stderr, "FAILED: %s\n", what);
    ++failures;
  }
}

struct Library {
  Library(const char* path, int flags) : handle(dlopen(path, flags)) {
    if (handle == nullptr) {
      std::fprintf(stderr, "%s\n", dlerror());
      std::exit(2);
    }
    find(attach, "attach_to");
    find(tag, "sees_tag");
    find(base, "base_of");
  }
  template <class F>
  void find(F*& function, const char* name) {
    function = reinterpret_cast<F*>(dlsym(handle, name));
    expect(function != nullptr, name);
  }

  void* handle;
  decltype(attach_to)* attach;
  decltype(sees_tag)* tag;
  decltype(base_of)* base;
};

/// A weight of zeros under `adapters` adapters reads as 4 · adapters.
void expect_value(const at::Tensor& w, int adapters, const char* what) {
  const at::Tensor x = at::ones({2, 4});
  const auto every = [](const at::Tensor& t, double value) {
    return at::equal(t.detach(), at::full(t.sizes(), value));
  };
  expect(every(w + 0, 4. * adapters), what);
  expect(every(at::linear(x, w), 16. * adapters), what);
  expect(every(at::matmul(x, w.t()), 16. * adapters), what);
  expect(every(w.narrow(0, 1, 2) * 1, 4. * adapters), what);
  expect(w.narrow(0, 1, 2).is_alias_of(w), what);
}

int run(const std::string& scope, const std::string& order, char** paths) {
  const int flags = RTLD_NOW | (scope == "local" ? RTLD_LOCAL : RTLD_GLOBAL);
  Library a(paths[0], flags), b(paths[1], flags);
  expect(
      !c10::Dispatcher::singleton().hasBackendFallbackForDispatchKey(
          c10::DispatchKey::DeferredInit),
      "nothing is registered before the first attach");

  const at::Tensor of_a = at::zeros({4, 4}), of_b = at::zeros({4, 4}),
                   of_both = at::zeros({4, 4});
  if (order == "at_once") {
    std::thread first([&] { a.attach(&of_a, "default"); });
    std::thread second([&] { b.attach(&of_b, "default"); });
    first.join();
    second.join();
  } else {
    a.attach(&of_a, "default");
    expect_value(of_a, 1, "attached by A, before B did anything");
    b.attach(&of_b, "default");
  }
  expect(a.tag(&of_a) && b.tag(&of_a), "both see A's tag");
  expect(a.tag(&of_b) && b.tag(&of_b), "both see B's tag");
  expect_value(of_a, 1, "attached by A");
  expect_value(of_b, 1, "attached by B");

  a.attach(&of_both, "a");
  b.attach(&of_both, "b");
  expect_value(of_both, 2, "attached by both");
  at::Tensor base;
  b.base(&of_a, &base);
  expect(!a.tag(&base) && base.is_alias_of(of_a), "B unwraps A's weight");
  bool refused = false;
  try {
    b.attach(&of_both, "a");
  } catch (const std::exception&) {
    refused = true;
  }
  expect(refused, "B refuses a name that A has taken");

  const at::Tensor view_of_b = of_b.narrow(0, 0, 2);
  dlclose(b.handle);
  expect_value(of_a, 1, "A's adapter after B was closed");
  expect_value(of_b, 1, "B's adapter after B was closed");
  expect_value(of_both, 2, "both adapters after B was closed");
  const at::Tensor late = at::zeros({4, 4});
  a.attach(&late, "default");
  expect_value(late, 1, "a new adapter of A after B was closed");

  dlclose(a.handle);
  expect_value(of_a, 1, "A's adapter after both were closed");
  expect_value(of_b, 1, "B's adapter after both were closed");
  expect_value(of_both, 2, "both adapters after both were closed");
  expect(
      at::equal((view_of_b + 0).detach(), at::full({2, 4}, 4.)),
      "a view made before");
  return failures == 0 ? 0 : 1;
}

} // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    return 2;
  }
  try {
    return run(argv[1], argv[2], argv + 3);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
