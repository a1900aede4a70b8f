#pragma once

// Random configurations of a space, none twice, the same for a seed on every
// platform (to the rounding of its logarithm, in dimensions that have one).

#include <peft/train/search/space.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <random>
#include <string>
#include <unordered_map>
#include <unordered_set>

namespace peft::detail {

/// Random numbers that the standard fixes to the bit (its own distributions it
/// does not).
class SearchRandom {
 public:
  explicit SearchRandom(uint64_t seed) : engine_(seed) {}

  /// Uniform in 0, ..., n - 1; n = 0 stands for 2^64.
  uint64_t below(uint64_t n) {
    if (n == 0) {
      return engine_();
    }
    // What lies above the largest multiple of n is drawn again.
    const uint64_t last = UINT64_MAX - (UINT64_MAX % n + 1) % n;
    uint64_t x = engine_();
    while (x > last) {
      x = engine_();
    }
    return x % n;
  }
  /// Uniform in [0, 1), a multiple of 2^-53.
  double unit() {
    return static_cast<double>(engine_() >> 11) * 0x1p-53;
  }

 private:
  std::mt19937_64 engine_;
};

/// Draws from a space without replacement.
class ConfigurationSampler {
 public:
  ConfigurationSampler(const SearchSpace& space, uint64_t seed)
      : space_(space), random_(seed), size_(space.size()) {}

  /// The next one, of those before where(); nothing when all have been drawn.
  std::optional<Configuration> next() {
    return size_ ? next_of_finite() : next_of_infinite();
  }

 private:
  /// A step of a Fisher-Yates shuffle of 0, ..., size - 1, of which only the
  /// numbers that moved are stored.
  std::optional<Configuration> next_of_finite() {
    if (drawn_ == *size_) {
      return std::nullopt;
    }
    const uint64_t other = drawn_ + random_.below(*size_ - drawn_);
    const uint64_t index = number_at(other);
    moved_[other] = number_at(drawn_);
    moved_.erase(drawn_++);
    return space_.at(index);
  }
  uint64_t number_at(uint64_t place) const {
    const auto found = moved_.find(place);
    return found == moved_.end() ? place : found->second;
  }

  /// One that has been drawn before is drawn again, up to a limit.
  std::optional<Configuration> next_of_infinite() {
    for (int attempt = 0; attempt < 1000; ++attempt) {
      Configuration result;
      for (const auto& dimension : space_.dimensions()) {
        result.set(dimension.name, draw(dimension));
      }
      if (seen_.insert(result.to_json().dump()).second) {
        return result;
      }
    }
    return std::nullopt;
  }
  SearchValue draw(const SearchDimension& dimension) {
    if (dimension.kind != SearchDimension::Kind::real) {
      return dimension.at(random_.below(*dimension.size()));
    }
    const double u = random_.unit();
    const double value = dimension.log
        ? dimension.from * std::exp(u * std::log(dimension.to / dimension.from))
        : dimension.from + u * (dimension.to - dimension.from);
    return std::min(std::max(value, dimension.from), dimension.to);
  }

  const SearchSpace& space_;
  SearchRandom random_;
  std::optional<uint64_t> size_;
  uint64_t drawn_ = 0;
  std::unordered_map<uint64_t, uint64_t> moved_;
  std::unordered_set<std::string> seen_;
};

} // namespace peft::detail
