#pragma once

// How a side block starts from a layer of the backbone: structured pruning. Of
// each set of units only the most important are kept, and every weight that
// reads or makes such a unit keeps the same ones:
//
//   width   the residual stream, one set for all blocks (of both stacks, where
//           a decoder's blocks read the encoder's result)
//   heads   in every head of an attention the same number of its places, one
//           set for query, key, value and output
//   inner   the units between the two maps of a feed-forward
//
// A unit's importance is the sum of the importances of all entries that would
// go with it. Everything as long in the side block as in the layer (a table of
// relative positions) is copied. Rotary positions pair the places that are left
// anew. The published code walks the weights in order and lets each choose its
// rows anew, so that what a residual adds up there need not be the same units;
// here it is.

#include <peft/core/adapted_weight.h>
#include <peft/core/network.h>
#include <peft/methods/ladder/axes.h>
#include <peft/methods/ladder/side_network.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// A stack of the network with the side network that will stand beside it.
struct LadderStack {
  std::shared_ptr<SideNetwork> side;
  std::string layers_name; // "encoder.layer"
  std::vector<std::shared_ptr<torch::nn::Module>> layers;
  Layer norm; // after the last layer; without a module where there is none
};

/// The importances of one set of units as they are gathered, and then what is
/// kept of it.
struct PrunedUnits {
  Tensor score; // [units], or [key heads, places] of an attention
  int64_t keep = 0; // of the last dimension
  Tensor kept; // [keep] or [key heads, keep], ascending

  void choose() {
    const Tensor order =
        std::get<1>(score.sort(/*stable=*/true, -1, /*descending=*/true));
    kept = std::get<0>(order.narrow(-1, 0, keep).sort(-1));
  }
};

/// Fills side networks with what is kept of their backbone.
class LadderPruning {
 public:
  /// `importance` is looked up by the names of the network's parameters; empty
  /// for the weights' magnitudes.
  LadderPruning(std::vector<LadderStack> stacks, const Importance& importance)
      : stacks_(std::move(stacks)), importance_(importance) {
    for (const auto& stack : stacks_) {
      shares_width_ = shares_width_ || stack.side->spec.feeds_decoder;
    }
  }

  void run() {
    for (size_t s = 0; s < stacks_.size(); ++s) {
      each_parameter(s, [&](const Pair& pair) { measure_heads(pair); });
      each_parameter(s, [&](const Pair& pair) { gather(pair); });
    }
    for (auto& item : units_) {
      item.second.choose();
    }
    for (size_t s = 0; s < stacks_.size(); ++s) {
      each_parameter(s, [&](const Pair& pair) { copy(pair); });
      copy_norm(s);
    }
  }

 private:
  /// stack (or -1), block, what, which.
  using Key = std::tuple<int64_t, int64_t, PrunedAxis::Units, int64_t>;

  /// A parameter of a side block and the one it is made of.
  struct Pair {
    size_t stack;
    size_t block;
    std::string path; // in the network
    Tensor from;
    Tensor to;
    std::vector<PrunedAxis> axes;
  };

  Key key_of(const Pair& pair, const PrunedAxis& axis) const {
    const auto stack = static_cast<int64_t>(pair.stack);
    return axis.units == PrunedAxis::Units::width
        ? width_of(pair.stack)
        : Key(stack, static_cast<int64_t>(pair.block), axis.units, axis.part);
  }
  Key width_of(size_t stack) const {
    return {
        shares_width_ ? -1 : static_cast<int64_t>(stack),
        0,
        PrunedAxis::Units::width,
        0};
  }

  template <class F>
  void each_parameter(size_t s, F&& f) {
    const auto& stack = stacks_[s];
    const auto& spec = stack.side->spec;
    for (size_t b = 0; b < stack.side->block.size(); ++b) {
      const auto own = static_cast<size_t>(spec.layers[b]);
      const auto axes =
          pruned_axes(*stack.layers[own], spec.loop.hidden_size());
      for (const auto& p : stack.side->block[b]->named_parameters()) {
        Pair pair{s, b, {}, {}, p.value(), {}};
        // What only some layers have (a table that the first shares with the
        // rest) comes from the first that has it.
        for (const size_t layer : own_first(own, stack.layers.size())) {
          pair.from = find(*stack.layers[layer], p.key());
          pair.path =
              stack.layers_name + "." + std::to_string(layer) + "." + p.key();
          if (pair.from.defined()) {
            break;
          }
        }
        TORCH_CHECK(
            pair.from.defined(),
            "peft: the side block's parameter '",
            p.key(),
            "' has no counterpart in the layers of '",
            stack.layers_name,
            "' to be pruned from; use LadderOptions().init(\"random\")");
        const auto known = axes.find(p.key());
        pair.axes = known != axes.end()
            ? known->second
            : std::vector<PrunedAxis>(static_cast<size_t>(pair.to.dim()));
        for (size_t d = 0; d < pair.axes.size(); ++d) {
          const auto dim = static_cast<int64_t>(d);
          if (pair.from.size(dim) == pair.to.size(dim)) {
            pair.axes[d] = {};
          }
          TORCH_CHECK(
              pair.axes[d].units != PrunedAxis::Units::whole ||
                  pair.from.size(dim) == pair.to.size(dim),
              "peft: cannot tell how to prune '",
              pair.path,
              "' from ",
              pair.from.sizes(),
              " to ",
              pair.to.sizes(),
              "; use LadderOptions().init(\"random\")");
        }
        f(pair);
      }
    }
  }

  static std::vector<size_t> own_first(size_t own, size_t count) {
    std::vector<size_t> order{own};
    for (size_t i = 0; i < count; ++i) {
      order.push_back(i);
    }
    return order;
  }

  static Tensor find(const torch::nn::Module& module, const std::string& name) {
    for (const auto& p : base_parameters(module)) {
      if (p.first == name) {
        return base(p.second).detach();
      }
    }
    return {};
  }

  /// The size of an attention's heads, by its queries.
  void measure_heads(const Pair& pair) {
    const auto& spec = stacks_[pair.stack].side->spec;
    for (size_t d = 0; d < pair.axes.size(); ++d) {
      if (!pair.axes[d].is_query) {
        continue;
      }
      TORCH_CHECK(
          spec.loop.num_heads() > 0,
          "peft: pruning keeps the heads of '",
          pair.path,
          "' apart and needs their number: make '",
          spec.stack,
          "' with LayerLoopOptions(...).num_heads(n), or use "
          "LadderOptions().init(\"random\")");
      head_dims_[key_of(pair, pair.axes[d])] =
          pair.from.size(static_cast<int64_t>(d)) / spec.loop.num_heads() /
          (pair.axes[d].packed ? 3 : 1);
    }
  }

  /// {parts, heads, places} of an attention's axis.
  std::vector<int64_t>
  head_sizes(const Pair& pair, const PrunedAxis& axis, int64_t size) const {
    const auto found = head_dims_.find(key_of(pair, axis));
    TORCH_CHECK(
        found != head_dims_.end(),
        "peft: cannot tell the queries that belong to '",
        pair.path,
        "'; use LadderOptions().init(\"random\")");
    const int64_t parts = axis.packed ? 3 : 1;
    return {parts, size / parts / found->second, found->second};
  }

  void gather(const Pair& pair) {
    const bool matters = std::any_of(
        pair.axes.begin(), pair.axes.end(), [](const PrunedAxis& axis) {
          return axis.units != PrunedAxis::Units::whole;
        });
    if (!matters) {
      return;
    }
    Tensor value = importance_of(pair);
    for (size_t d = 0; d < pair.axes.size(); ++d) {
      const auto& axis = pair.axes[d];
      if (axis.units == PrunedAxis::Units::whole) {
        continue;
      }
      const auto dim = static_cast<int64_t>(d);
      Tensor score = value.dim() == 1 ? value : value.sum(1 - dim);
      int64_t keep = pair.to.size(dim);
      auto& units = units_[key_of(pair, axis)];
      if (axis.units == PrunedAxis::Units::heads) {
        const auto sizes = head_sizes(pair, axis, score.size(0));
        keep = keep / (sizes[0] * sizes[1]);
        score = score.view(sizes).sum(0);
        // Heads of keys may be fewer; those of queries that share one go with
        // it.
        const int64_t have =
            units.score.defined() ? units.score.size(0) : sizes[1];
        const int64_t fewer = std::min(have, sizes[1]);
        const auto fold = [fewer](const Tensor& t) {
          return t.unflatten(0, {fewer, -1}).sum(1);
        };
        score = fold(score);
        units.score = units.score.defined() ? fold(units.score) : units.score;
      }
      units.keep = keep;
      units.score = units.score.defined() ? units.score + score : score;
    }
  }

  Tensor importance_of(const Pair& pair) const {
    if (importance_.empty()) {
      return pair.from.to(at::kCPU, at::kDouble).abs();
    }
    const auto found = importance_.find(pair.path);
    TORCH_CHECK(
        found != importance_.end() &&
            found->second.sizes() == pair.from.sizes(),
        "peft: LadderOptions' importance needs an entry of shape ",
        pair.from.sizes(),
        " for '",
        pair.path,
        "'; ladder_importance gives one for every parameter");
    return found->second.detach().to(at::kCPU, at::kDouble).abs();
  }

  /// Which entries of a dimension stay.
  Tensor kept(const Pair& pair, const PrunedAxis& axis, int64_t size) const {
    const Tensor& kept = units_.at(key_of(pair, axis)).kept;
    if (axis.units != PrunedAxis::Units::heads) {
      return kept;
    }
    const auto sizes = head_sizes(pair, axis, size);
    const Tensor begin =
        at::arange(sizes[0] * sizes[1], at::kLong).unsqueeze(1) * sizes[2];
    const Tensor places = kept.repeat_interleave(sizes[1] / kept.size(0), 0)
                              .repeat({sizes[0], 1});
    return (begin + places).flatten();
  }

  void copy(const Pair& pair) {
    Tensor value = pair.from;
    for (size_t d = 0; d < pair.axes.size(); ++d) {
      const auto dim = static_cast<int64_t>(d);
      if (pair.axes[d].units != PrunedAxis::Units::whole) {
        value = value.index_select(
            dim, kept(pair, pair.axes[d], value.size(dim)).to(value.device()));
      }
    }
    torch::NoGradGuard no_grad;
    Tensor to = pair.to;
    to.copy_(value);
  }

  /// The norm after the last block, from that of the stack.
  void copy_norm(size_t s) {
    const auto& stack = stacks_[s];
    const auto width = units_.find(width_of(s));
    if (stack.norm.module == nullptr || stack.side->norm.is_empty()) {
      return;
    }
    torch::NoGradGuard no_grad;
    for (auto& p : stack.side->norm.ptr()->named_parameters()) {
      const Tensor from = base(stack.norm.parameter(p.key())).detach();
      p.value().copy_(
          width == units_.end()
              ? from
              : from.index_select(0, width->second.kept.to(from.device())));
    }
  }

  std::vector<LadderStack> stacks_;
  const Importance& importance_;
  bool shares_width_ = false;
  std::map<Key, PrunedUnits> units_;
  std::map<Key, int64_t> head_dims_;
};

} // namespace detail

} // namespace peft
