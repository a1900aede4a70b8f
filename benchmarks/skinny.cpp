// The skinny products of LoRA against LibTorch's operators for the same result:
// one thread, rounds in turn and in random order, processor time of the thread,
// the ratio of each round, median and quartiles. Below 1 the kernel is faster.
//
//     skinny [rounds]

#include <peft/functional/counter_dropout.h>
#include <peft/functional/cpu/skinny.h>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <ctime>
#include <functional>
#include <random>
#include <string>
#include <vector>

namespace cpu = peft::functional::cpu;
using at::Tensor;

namespace {

int rounds = 41;

/// Seconds of this thread, which other programs disturb less than the clock;
/// of the whole process where the system does not tell.
double seconds() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
#else
  return double(std::clock()) / CLOCKS_PER_SEC;
#endif
}

double quantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  return values[size_t(q * double(values.size() - 1))];
}

using Run = std::function<void()>;

/// Prints the ratio of `kernel` to `reference` and the microseconds of both.
void compare(const std::string& what, const Run& kernel, const Run& reference) {
  int repeats = 1;
  for (double spent = 0; spent < 300e-6 && repeats < 4096; repeats *= 2) {
    const double start = seconds();
    for (int i = 0; i < repeats; ++i) {
      reference();
    }
    spent = seconds() - start;
  }
  auto time = [&](const Run& run) {
    const double start = seconds();
    for (int i = 0; i < repeats; ++i) {
      run();
    }
    return (seconds() - start) / repeats * 1e6;
  };
  time(kernel);
  std::mt19937 order(0);
  std::vector<double> ratios, ours, theirs;
  for (int round = 0; round < rounds; ++round) {
    const bool first = order() % 2 == 0;
    const double a = time(first ? kernel : reference);
    const double b = time(first ? reference : kernel);
    ours.push_back(first ? a : b);
    theirs.push_back(first ? b : a);
    ratios.push_back(ours.back() / theirs.back());
  }
  fmt::print(
      "{:46} {:5.2f} [{:4.2f}, {:4.2f}] {:9.1f} / {:9.1f} us\n",
      what,
      quantile(ratios, 0.5),
      quantile(ratios, 0.25),
      quantile(ratios, 0.75),
      quantile(ours, 0.5),
      quantile(theirs, 0.5));
}

/// All products at one shape. T is the type of the wide matrices.
template <class T>
void shape(int64_t n, int64_t k, int64_t r, bool all) {
  const auto dtype = c10::CppTypeToScalarType<T>::value;
  const auto options = at::TensorOptions().dtype(dtype);
  const auto x = at::randn({n, k}).to(dtype), bias = at::randn({k}).to(dtype);
  auto y = at::empty({n, k}, options);
  const auto A = at::randn({r, k}), t = at::randn({n, r});
  auto u = at::empty({n, r}), G = at::empty({r, k});
  // What LibTorch's operators take: factors in the type of the wide matrix.
  const auto At = A.to(dtype), B = At.t().contiguous(), tt = t.to(dtype);
  auto ut = at::empty({n, r}, options), Gt = at::empty({r, k}, options);
  auto GtT = at::empty({k, r}, options);

  const T* px = x.template data_ptr<T>();
  const T* pb = bias.template data_ptr<T>();
  T* py = y.template data_ptr<T>();
  const float *pA = A.data_ptr<float>(), *pt = t.data_ptr<float>();
  float *pu = u.data_ptr<float>(), *pG = G.data_ptr<float>();
  const peft::functional::CounterDropout drop{1, 0.1};
  const std::string name = fmt::format(
      "{} N{} k{} r{} ", dtype == at::kFloat ? "f32" : "bf16", n, k, r);

  const Run project = [&] { cpu::project<T>(px, k, pA, pu, n, k, r, 1.0f); };
  const Run write = [&] { cpu::expand<T>(pt, pA, pb, py, k, n, k, r, false); };
  const Run outer = [&] { cpu::outer<T>(px, k, pt, pG, n, k, r); };
  const Run both = [&] {
    cpu::project_and_outer<T>(px, k, pA, pt, pu, pG, n, k, r, 1.0f);
  };
  const Run mm_project = [&] { at::mm_out(ut, x, At.t()); };
  const Run mm_both = [&] {
    at::mm_out(ut, x, B);
    at::mm_out(GtT, x.t(), tt);
  };
  compare(name + "project / mm(x, A.t())", project, mm_project);
  compare(name + "expand, written / bias and addmm_", write, [&] {
    y.copy_(bias.expand({n, k}));
    y.addmm_(tt, At);
  });
  compare(
      name + "expand, added / addmm_",
      [&] { cpu::expand<T>(pt, pA, nullptr, py, k, n, k, r, true); },
      [&] { y.addmm_(tt, At, 1.0, 1e-6); });
  y.zero_();
  compare(
      name + "outer / mm(t.t(), x)", outer, [&] { at::mm_out(Gt, tt.t(), x); });
  compare(name + "project_and_outer / mm + mm(dy.t(), t)", both, mm_both);
  if (!all) {
    return;
  }
  compare(name + "expand, written / fill", write, [&] { y.fill_(1.0); });
  compare(
      name + "project with dropout / without",
      [&] { cpu::project<T>(px, k, pA, pu, n, k, r, 1.0f, &drop); },
      project);
  compare(
      name + "expand with dropout / without",
      [&] { cpu::expand<T>(pt, pA, pb, py, k, n, k, r, false, &drop); },
      write);
  compare(
      name + "outer with dropout / without",
      [&] { cpu::outer<T>(px, k, pt, pG, n, k, r, &drop); },
      outer);
}

/// What layers with one input (q, k, v) would gain by a joint pass for t.
void shared_input(int64_t n, int64_t k, int64_t r) {
  const Tensor x = at::randn({n, k}), A = at::randn({3 * r, k});
  const Tensor t = at::empty({n, 3 * r}), W = at::randn({k, k});
  const float *from = x.const_data_ptr<float>(), *a = A.const_data_ptr<float>();
  float* to = t.mutable_data_ptr<float>();
  const auto apart = [=] {
    for (int64_t i = 0; i < 3; ++i) {
      cpu::project(from, k, a + i * r * k, to, n, k, r, 1.0f);
    }
  };
  compare(
      fmt::format("n {} k {} r {}: t of q, k, v, joint / apart", n, k, r),
      [=] { cpu::project(from, k, a, to, n, k, 3 * r, 1.0f); },
      apart);
  compare("  t of q, k, v apart / one product with W", apart, [=] {
    at::mm(x, W.t());
  });
}

} // namespace

int main(int argc, char** argv) {
  at::set_num_threads(1);
  at::manual_seed(0);
  if (argc > 1) {
    rounds = std::max(3, std::atoi(argv[1]));
  }
  fmt::print(
      "instruction set {}, {} rounds\n",
      static_cast<int>(cpu::best_isa()),
      rounds);
  for (int64_t n : {16, 128, 1024}) {
    shared_input(n, 768, 8);
  }
  for (int64_t n : {1024, 128, 16}) {
    shape<float>(n, 768, 8, true);
    shape<c10::BFloat16>(n, 768, 8, true);
  }
  for (int64_t k : {384, 768, 3072, 4096}) {
    for (int64_t r : {4, 8, 16, 64}) {
      for (int64_t n : {1, 16, 128, 1024}) {
        shape<float>(n, k, r, false);
      }
    }
  }
}
