#pragma once

#include <peft/core/network.h>
#include <peft/core/site.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// A place in a network's forward for methods that no weight can carry. A
/// network registers one as a child and calls it in one line; it has no
/// parameters, is no part of an archive, and without an adapter hands through.
class CallSite {
 public:
  virtual ~CallSite() = default;

  /// What hangs here; an adapter's entries come and go with attach and detach.
  const std::shared_ptr<detail::Site>& site() const {
    return site_;
  }

 protected:
  /// The deltas that take part in this thread's call, first attached first,
  /// each with its scale.
  template <class Kind>
  std::vector<std::pair<const Kind*, double>> active() const {
    std::vector<std::pair<const Kind*, double>> result;
    if (site_->entries.empty()) {
      return result;
    }
    for (const auto& entry : site_->active(Tensor())) {
      const auto* delta = dynamic_cast<const Kind*>(entry.delta);
      TORCH_INTERNAL_ASSERT(delta != nullptr);
      result.emplace_back(delta, entry.scale);
    }
    return result;
  }

  /// A clone starts without adapters; peft::clone brings them along.
  void reset_site() {
    site_ = std::make_shared<detail::Site>();
  }

 private:
  std::shared_ptr<detail::Site> site_ = std::make_shared<detail::Site>();
};

/// A delta that acts at a call site: there is no weight to fold it into.
class CallDelta : public Delta {
 public:
  using Delta::Delta;

  Tensor effective(const Tensor& weight, double /*scale*/) const final {
    return weight;
  }

  std::string merge_obstacle() const override {
    return "it acts in the network's forward, not on a weight";
  }
};

namespace detail {

/// The call sites of one type in a network, each with its name.
template <class Type>
std::vector<std::pair<std::string, const Type*>> call_sites(
    const Network& network) {
  std::vector<std::pair<std::string, const Type*>> result;
  for (const auto& layer : network) {
    const auto* site = dynamic_cast<const Type*>(layer.module);
    if (site != nullptr) {
      result.emplace_back(layer.name, site);
    }
  }
  return result;
}

} // namespace detail

} // namespace peft
