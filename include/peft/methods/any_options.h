#pragma once

#include <peft/core/attach.h>

#include <functional>
#include <type_traits>
#include <utility>

namespace peft {

namespace detail {

/// A Network whose type stands in this namespace, so that argument-dependent
/// lookup finds the plan() of a method that is declared later.
struct NetworkToPlan {
  const Network& network;
  operator const Network&() const {
    return network;
  }
};

/// The plan of any method's options.
template <class Options>
Plan plan_of(const Options& options, const Network& network) {
  return plan(options, NetworkToPlan{network});
}

} // namespace detail

/// The options of one method, whichever: what decorators and searches are made
/// of.
class AnyOptions {
 public:
  template <
      class Options,
      class = std::enable_if_t<!std::is_same_v<Options, AnyOptions>>>
  AnyOptions(Options options)
      : plan_([options = std::move(options)](const Network& network) {
          return detail::plan_of(options, network);
        }) {}

  /// What the method wants to do to `network`.
  detail::Plan plan(const Network& network) const {
    return plan_(network);
  }

 private:
  std::function<detail::Plan(const Network&)> plan_;
};

} // namespace peft
