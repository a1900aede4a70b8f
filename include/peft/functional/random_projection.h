#pragma once

// Fixed random maps from a few trained numbers to many weights, drawn from a
// generator and never saved: the seed makes them again, bit for bit.

#include <peft/functional/fastfood.h>

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <list>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace peft {

namespace functional {

using torch::Tensor;

/// P [N, d] for one tensor of N numbers.
class RandomProjection {
 public:
  virtual ~RandomProjection() = default;

  /// factor · P theta: [d] → [N] in theta's dtype, differentiable.
  virtual Tensor apply(const Tensor& theta, double factor) const = 0;

  /// One number that another draw, or another order of draws, would not have.
  virtual double fingerprint() const = 0;

  /// Bytes that P takes on each device that it is used on.
  virtual int64_t bytes() const = 0;
};

namespace detail {

/// `count` numbers of N(0, 1) as float32, by Box and Muller from the
/// generator's uniform ones. Tensor::normal_ has other bits on another maker's
/// CPU; these have not.
inline Tensor draw_gaussian(int64_t count, at::Generator& generator) {
  constexpr int64_t kChunk = 1 << 20; // the uniform ones are eight times as big
  Tensor result = at::empty({count}, at::kFloat);
  for (int64_t begin = 0; begin < count; begin += kChunk) {
    const int64_t size = std::min(kChunk, count - begin);
    const Tensor u =
        at::empty({2, size}, at::kDouble).uniform_(0, 1, generator);
    const Tensor radius = u[0].neg().log1p().mul(-2).sqrt(); // 1 - u is not 0
    result.narrow(0, begin, size)
        .copy_(radius * u[1].mul(2 * 3.14159265358979323846).cos());
  }
  return result;
}

/// Tensors that are drawn on the CPU and asked for on other devices too.
class OnDevices {
 public:
  explicit OnDevices(std::vector<Tensor> drawn) {
    copies_.push_back(std::move(drawn));
  }
  const std::vector<Tensor>& drawn() const {
    return copies_.front();
  }
  std::vector<Tensor> on(at::Device device) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& copy : copies_) {
      if (copy.front().device() == device) {
        return copy;
      }
    }
    std::vector<Tensor> moved;
    for (const auto& t : copies_.front()) {
      moved.push_back(t.to(device));
    }
    copies_.push_back(moved);
    return moved;
  }

 private:
  mutable std::mutex mutex_;
  mutable std::list<std::vector<Tensor>> copies_; // the first stays in place
};

} // namespace detail

/// P as the Fastfood transform: 8 n + 4 d bytes, n the power of two at or above
/// N. A tensor of n < d numbers sees the first n entries of theta, as in the
/// published code.
class FastfoodProjection final : public RandomProjection {
 public:
  /// Draws, in this order, the signs, the permutation and the Gaussians.
  FastfoodProjection(int64_t N, int64_t d, at::Generator& generator)
      : size_(N), used_(std::min(d, next_power_of_two(N))) {
    const c10::InferenceMode off(false);
    const at::NoGradGuard no_grad;
    const int64_t n = next_power_of_two(N), m = next_power_of_two(used_);
    const Tensor signs =
        at::randint(0, 2, {used_}, generator, at::kLong).mul(2).sub(1);
    const Tensor index =
        at::randperm(n, generator, at::kLong).bitwise_and(m - 1);
    const Tensor gaussian = detail::draw_gaussian(n, generator);
    c_ = 1 /
        std::sqrt(
             static_cast<double>(N) *
             gaussian.to(at::kDouble).square().sum().item<double>());
    drawn_.emplace(std::vector<Tensor>{
        signs.to(at::kFloat), index.to(at::kInt), gaussian});
  }

  Tensor apply(const Tensor& theta, double factor) const override {
    const auto drawn = drawn_->on(theta.device());
    return fastfood(
               theta.narrow(0, 0, used_),
               drawn[0].to(theta.scalar_type()),
               drawn[1],
               drawn[2],
               factor * c_)
        .narrow(0, 0, size_);
  }

  double fingerprint() const override {
    const auto& drawn = drawn_->drawn();
    const auto by_place = [](const Tensor& t) {
      const Tensor place = at::arange(1, t.numel() + 1, at::kDouble);
      return (t.to(at::kDouble) / place).sum().item<double>();
    };
    return by_place(drawn[0]) + by_place(drawn[1]) + by_place(drawn[2]);
  }

  int64_t bytes() const override {
    return 4 * used_ + 8 * next_power_of_two(size_);
  }

 private:
  int64_t size_, used_;
  double c_ = 1;
  std::optional<detail::OnDevices> drawn_;
};

/// P as a matrix of Gaussians whose columns have length 1 (Li et al. 2018,
/// section 2): 4 N d bytes.
class DenseProjection final : public RandomProjection {
 public:
  DenseProjection(int64_t N, int64_t d, at::Generator& generator) {
    const c10::InferenceMode off(false);
    const at::NoGradGuard no_grad;
    Tensor matrix = detail::draw_gaussian(N * d, generator).view({N, d});
    matrix.div_(matrix.to(at::kDouble).norm(2, 0, /*keepdim=*/true));
    drawn_.emplace(std::vector<Tensor>{matrix});
  }

  Tensor apply(const Tensor& theta, double factor) const override {
    const Tensor matrix = drawn_->on(theta.device())[0];
    return at::mv(matrix.to(theta.scalar_type()), theta.mul(factor));
  }

  double fingerprint() const override {
    const Tensor flat = drawn_->drawn()[0].flatten().to(at::kDouble);
    return (flat / at::arange(1, flat.numel() + 1, at::kDouble))
        .sum()
        .item<double>();
  }

  int64_t bytes() const override {
    return 4 * drawn_->drawn()[0].numel();
  }

 private:
  std::optional<detail::OnDevices> drawn_;
};

} // namespace functional

} // namespace peft
