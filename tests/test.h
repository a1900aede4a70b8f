#pragma once

/// What every test includes: LibTorch and libpeft first, Catch2 (2.13 or 3)
/// last, and a few helpers between a test and its tensors.

#include <torch/torch.h>
#include <peft/peft.h>

// c10 and Catch2 both define CHECK; the tests mean Catch2's.
#undef CHECK
#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#else
#include <catch2/catch.hpp>
#endif

#include <algorithm>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <random>
#include <ostream>
#include <sstream>
#include <string>
#include <system_error>

/// How far two results of the same maths may be apart.
struct Tolerance {
  double rtol;
  double atol;
};

/// The one table of tolerances. float64 is where formulas are judged; the
/// others are what rounding in that type allows.
inline Tolerance tolerance(torch::ScalarType dtype) {
  switch (dtype) {
    case torch::kDouble:
    case torch::kComplexDouble:
      return {1e-9, 1e-11};
    case torch::kHalf:
      return {2e-3, 1e-3};
    case torch::kBFloat16:
      return {1.6e-2, 1e-2};
    default:
      return {1.3e-6, 1e-5};
  }
}

/// The same, for a dtype known when compiling: tolerance<torch::kFloat>().
template <torch::ScalarType dtype>
inline Tolerance tolerance() {
  return tolerance(dtype);
}

/// A verdict that a failing REQUIRE prints in words.
struct Comparison {
  bool agree;
  std::string message;

  explicit operator bool() const {
    return agree;
  }
  friend std::ostream& operator<<(std::ostream& out, const Comparison& c) {
    return out << c.message;
  }
};

/// Whether shape, dtype, device and every bit agree (NaNs compare by bits).
inline Comparison equal_bits(const torch::Tensor& a, const torch::Tensor& b) {
  torch::NoGradGuard no_grad;
  std::ostringstream why;
  if (!a.defined() || !b.defined()) {
    why << "defined: " << a.defined() << " and " << b.defined();
    return {a.defined() == b.defined(), why.str()};
  }
  if (a.scalar_type() != b.scalar_type() || a.device() != b.device() ||
      a.sizes() != b.sizes()) {
    why << a.toString() << a.sizes() << " on " << a.device() << " is not "
        << b.toString() << b.sizes() << " on " << b.device();
    return {false, why.str()};
  }
  if (a.numel() == 0) {
    return {true, "equal (empty)"};
  }
  auto bytes = [](const torch::Tensor& t) {
    return t.detach().contiguous().reshape({-1}).view(torch::kByte);
  };
  const auto differing =
      bytes(a).ne(bytes(b)).sum().item<int64_t>(); // bytes, not elements
  if (differing == 0) {
    return {true, "equal to the bit"};
  }
  why << differing << " bytes differ in " << a.toString() << a.sizes();
  if (a.is_floating_point()) {
    why << ", largest difference "
        << (a.to(torch::kDouble) - b.to(torch::kDouble))
               .abs()
               .max()
               .item<double>();
  }
  return {false, why.str()};
}

/// Whether |a - b| <= atol + rtol * |b| everywhere, shapes being equal.
inline Comparison close(
    const torch::Tensor& a,
    const torch::Tensor& b,
    double rtol,
    double atol) {
  torch::NoGradGuard no_grad;
  std::ostringstream why;
  if (!a.defined() || !b.defined()) {
    why << "defined: " << a.defined() << " and " << b.defined();
    return {false, why.str()};
  }
  if (a.sizes() != b.sizes()) {
    why << "shape " << a.sizes() << " is not " << b.sizes();
    return {false, why.str()};
  }
  if (a.numel() == 0) {
    return {true, "close (empty)"};
  }
  const auto wide = [](const torch::Tensor& t) {
    return t.detach().to(
        torch::kCPU, t.is_complex() ? torch::kComplexDouble : torch::kDouble);
  };
  const auto x = wide(a);
  const auto y = wide(b);
  const auto difference = (x - y).abs();
  const auto ok = torch::isclose(x, y, rtol, atol);
  const auto wrong = ok.logical_not().sum().item<int64_t>();
  why << wrong << " of " << a.numel() << " elements are further apart than "
      << atol << " + " << rtol << " * |b|; largest difference "
      << difference.max().item<double>() << ", largest |b| "
      << y.abs().max().item<double>();
  return {wrong == 0, why.str()};
}

/// The same with the tolerance of the less precise of the two dtypes.
inline Comparison close(const torch::Tensor& a, const torch::Tensor& b) {
  Tolerance t{0, 0};
  for (const auto* tensor : {&a, &b}) {
    if (tensor->defined()) {
      const auto one = tolerance(tensor->scalar_type());
      t.rtol = std::max(t.rtol, one.rtol);
      t.atol = std::max(t.atol, one.atol);
    }
  }
  return close(a, b, t.rtol, t.atol);
}

/// The text of the error that `action` throws, without LibTorch's backtrace;
/// empty when it throws nothing.
template <typename Action>
inline std::string error_of(Action&& action) {
  try {
    action();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  } catch (const std::exception& error) {
    return error.what();
  }
  return {};
}

/// Whether `text` contains `part`; for error messages.
inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

/// Makes the random numbers that follow repeatable.
inline void seed(uint64_t value = 0) {
  torch::manual_seed(value);
}

/// A fresh folder that goes away with the object.
class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::random_device random;
    do {
      path_ = std::filesystem::temp_directory_path() /
          ("peft-test-" + std::to_string(random()));
    } while (!std::filesystem::create_directory(path_));
  }
  ~TemporaryDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;

  const std::filesystem::path& path() const {
    return path_;
  }
  /// The path of a file inside, as the text that most functions take.
  std::string operator/(const std::string& name) const {
    return (path_ / name).string();
  }

 private:
  std::filesystem::path path_;
};

/// The path of a committed fixture (tests/golden/data).
inline std::string golden(const std::string& name) {
  return (std::filesystem::path(PEFT_TEST_DATA) / name).string();
}
