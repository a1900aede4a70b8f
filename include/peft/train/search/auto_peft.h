#pragma once

// AutoPEFT's configurations (Zhou et al. 2023, arXiv:2301.12132) as a space to
// search: 3 + L integers for a network of L layers of width d,
//
//   log2_reduction_factor   k of the parallel adapter: a bottleneck of ⌊d / 2ᵏ⌋
//   log2_reduction_prefix   k of the prefix: ⌊d / 2ᵏ⌋ virtual tokens
//   log2_reduction_serial   k of the serial adapter
//   leave_out_0, ...        1: nothing in this layer
//
// The largest k makes 0, and the module is absent. For d = 768 k runs from 0 to
// 10 and 9 (a reduction of 512) makes 1, as in the published code, whose names
// and order these are.

#include <peft/methods/auto_peft.h>
#include <peft/methods/count.h>
#include <peft/train/search/space.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// The space for one network. What `base` says of the parts besides their sizes
/// (scaling, dropout, ...), and its heads, are every configuration's.
///
///     const peft::AutoPeftSpace choices(peft::describe_network(*model));
///     peft::search(
///         choices.space(),
///         [&](const peft::Configuration& c, int64_t epochs) {
///           auto adapter = peft::attach(*model, choices.decode(c));
///           ...
///         },
///         peft::SearchBudget(100)
///             .count_parameters([&](const peft::Configuration& c) {
///               return choices.num_parameters(c);
///             })
///             .max_parameters(300000));
class AutoPeftSpace {
 public:
  explicit AutoPeftSpace(
      const Network& network,
      const AutoPeftOptions& base = {})
      : base_(base),
        serial_(base.serial().value_or(PfeifferOptions())),
        parallel_(base.parallel().value_or(ParallelAdapterOptions())),
        prefix_(detail::in_every_stack(
            base.prefix().value_or(PrefixOptions(1)),
            network)) {
    TORCH_CHECK_VALUE(
        base.leave_out().empty(),
        "peft: the layers to leave out are what AutoPEFT searches for; base "
        "must not name any");
    serial_layers_ =
        detail::counted_layers(detail::part_of(base_, serial_), network);
    parallel_layers_ =
        detail::counted_layers(detail::part_of(base_, parallel_), network);
    stacks_ = detail::counted_stacks(detail::part_of(base_, prefix_), network);
    heads_ = detail::num_parameters_of_modules(base.modules_to_save(), network);
    const auto places = detail::token_sites(network, "prefix tuning");
    num_layers_ = detail::layers_of(places);
    for (const auto& place : places) {
      const auto positions = place.second->options.max_positions();
      if (positions && prefix_.takes_positions().value_or(true)) {
        most_tokens_ =
            std::min(most_tokens_.value_or(*positions - 1), *positions - 1);
      }
    }
    check_layers(serial_layers_, "serial");
    check_layers(parallel_layers_, "parallel");
    width_ = serial_layers_.front().width;
  }

  int64_t num_layers() const {
    return num_layers_;
  }
  int64_t width() const {
    return width_;
  }
  /// The largest k, which makes a size of 0.
  int64_t absent() const {
    int64_t k = 0;
    while (width_ >> k > 0) {
      ++k;
    }
    return k;
  }

  /// All configurations but those that leave out every layer or every module,
  /// those whose prefix takes all positions of the network, and those that
  /// leave out all layers of the prefix's stacks. The space outlives this
  /// object.
  SearchSpace space() const {
    SearchSpace result;
    for (const char* name : {kParallel, kPrefix, kSerial}) {
      result.integer(name, 0, absent());
    }
    for (int64_t i = 0; i < num_layers_; ++i) {
      result.integer(leave_out(i), 0, 1);
    }
    return result.where(
        [self = *this](const Configuration& c) { return self.is_valid(c); });
  }

  bool is_valid(const Configuration& c) const {
    const int64_t tokens = size_of(c, kPrefix);
    const bool has_module =
        size_of(c, kSerial) + size_of(c, kParallel) + tokens > 0;
    const auto out = left_out(c);
    const bool prefix_fits = tokens == 0 ||
        (tokens <= most_tokens_.value_or(tokens) &&
         detail::num_parameters_in(prefix_, out, stacks_) > 0);
    return has_module && prefix_fits &&
        static_cast<int64_t>(out.size()) < num_layers_;
  }

  /// The options of a configuration.
  AutoPeftOptions decode(const Configuration& c) const {
    const auto space = this->space();
    space.check(c);
    TORCH_CHECK_VALUE(
        is_valid(c),
        "peft: the configuration ",
        c.to_string(),
        " leaves out every layer or every module, or its prefix has no layer "
        "left or takes all positions of the network");
    auto options = AutoPeftOptions(base_)
                       .serial(std::nullopt)
                       .parallel(std::nullopt)
                       .prefix(std::nullopt)
                       .leave_out(left_out(c));
    if (const int64_t r = size_of(c, kSerial); r > 0) {
      options.serial(sized(serial_, r));
    }
    if (const int64_t r = size_of(c, kParallel); r > 0) {
      options.parallel(sized(parallel_, r));
    }
    if (const int64_t l = size_of(c, kPrefix); l > 0) {
      options.prefix(PrefixOptions(prefix_).num_virtual_tokens(l));
    }
    return options;
  }

  /// The configuration of options that decode() could have made.
  Configuration encode(const AutoPeftOptions& options) const {
    const auto width_of = [&](const auto& part) {
      return part ? detail::bottleneck_width(*part, width_) : 0;
    };
    Configuration c;
    c.set(kParallel, log2_of(width_of(options.parallel()), kParallel));
    c.set(
        kPrefix,
        log2_of(
            options.prefix() ? options.prefix()->num_virtual_tokens() : 0,
            kPrefix));
    c.set(kSerial, log2_of(width_of(options.serial()), kSerial));
    const auto& out = options.leave_out();
    for (const int64_t layer : out) {
      TORCH_CHECK_VALUE(
          layer >= 0 && layer < num_layers_,
          "peft: leave_out names layer ",
          layer,
          ", and this space has layers 0 to ",
          num_layers_ - 1);
    }
    for (int64_t i = 0; i < num_layers_; ++i) {
      c.set(leave_out(i), int64_t{detail::is_left_out(out, i) ? 1 : 0});
    }
    return c;
  }

  /// What decode(c) would train, heads included.
  int64_t num_parameters(const Configuration& c) const {
    const auto out = left_out(c);
    int64_t count = heads_;
    if (const int64_t r = size_of(c, kSerial); r > 0) {
      count +=
          detail::num_parameters_in(sized(serial_, r), out, serial_layers_);
    }
    if (const int64_t r = size_of(c, kParallel); r > 0) {
      count +=
          detail::num_parameters_in(sized(parallel_, r), out, parallel_layers_);
    }
    if (const int64_t l = size_of(c, kPrefix); l > 0) {
      count += detail::num_parameters_in(
          PrefixOptions(prefix_).num_virtual_tokens(l), out, stacks_);
    }
    return count;
  }

 private:
  static constexpr const char* kParallel = "log2_reduction_factor";
  static constexpr const char* kPrefix = "log2_reduction_prefix";
  static constexpr const char* kSerial = "log2_reduction_serial";
  static std::string leave_out(int64_t layer) {
    return "leave_out_" + std::to_string(layer);
  }

  /// ⌊d / 2ᵏ⌋.
  int64_t size_of(const Configuration& c, const char* name) const {
    return width_ >> c.integer(name);
  }
  int64_t log2_of(int64_t size, const char* name) const {
    for (int64_t k = 0; k <= absent(); ++k) {
      if (width_ >> k == size) {
        return k;
      }
    }
    TORCH_CHECK_VALUE(
        false,
        "peft: a size of ",
        size,
        " is none of ",
        name,
        "'s, which halves a width of ",
        width_);
    return 0;
  }
  std::vector<int64_t> left_out(const Configuration& c) const {
    std::vector<int64_t> result;
    for (int64_t i = 0; i < num_layers_; ++i) {
      if (c.integer(leave_out(i)) == 1) {
        result.push_back(i);
      }
    }
    return result;
  }

  template <class Options>
  static Options sized(Options options, int64_t bottleneck) {
    return options.bottleneck(bottleneck).reduction_factor(std::nullopt);
  }

  /// One module in each layer that can be left out.
  void check_layers(
      const std::vector<detail::CountedLayer>& layers,
      const char* part) const {
    bool fits = static_cast<int64_t>(layers.size()) == num_layers_;
    for (size_t i = 0; i < layers.size(); ++i) {
      fits = fits && layers[i].number == static_cast<int64_t>(i) &&
          layers[i].width == layers.front().width;
    }
    TORCH_CHECK_VALUE(
        fits,
        "peft: AutoPEFT's space has one ",
        part,
        " adapter a layer, all of one width; this network has ",
        layers.size(),
        " places for it and ",
        num_layers_,
        " layers of attention. Name one place a layer in its targets");
  }

  AutoPeftOptions base_;
  PfeifferOptions serial_;
  ParallelAdapterOptions parallel_;
  PrefixOptions prefix_;
  std::vector<detail::CountedLayer> serial_layers_, parallel_layers_;
  std::vector<std::vector<detail::CountedLayer>> stacks_;
  int64_t num_layers_ = 0, width_ = 0, heads_ = 0;
  std::optional<int64_t> most_tokens_;
};

} // namespace peft
