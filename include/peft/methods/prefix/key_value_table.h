#pragma once

// The keys and values of one stack, as prefix tuning and cartridges train them.

#include <peft/core/extra_tokens.h>
#include <peft/methods/bottleneck/sites.h>
#include <peft/methods/prefix/options.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// A table `[virtual tokens, layers * 2 * heads * head_dim]`: first the key and
/// then the value of each layer that is not left out.
class KeyValueTable : public TokensDelta {
 public:
  /// leave_out counts from this stack's first layer.
  KeyValueTable(PrefixOptions options, const ExtraTokensOptions& stack)
      : options_(std::move(options)), stack_(stack) {}

  virtual Tensor table() const = 0;
  /// Starts from rows of the table's shape.
  virtual void set_table(const Tensor& rows) = 0;

  const ExtraTokensOptions& stack() const {
    return stack_;
  }
  const PrefixOptions& options() const {
    return options_;
  }

  /// Columns of the keys of one layer, and of the table.
  int64_t width() const {
    return stack_.num_heads() * stack_.head_dim();
  }
  int64_t columns() const {
    return 2 * part_of(stack_.num_layers()) * width();
  }

  int64_t num_virtual_tokens() const override {
    return options_.num_virtual_tokens();
  }

  bool takes_positions() const override {
    return options_.takes_positions().value_or(true);
  }

  KeyValues key_values(double scale) const override {
    Tensor all = at::dropout(table(), options_.dropout(), is_training());
    if (scale != 1.0) {
      all = all * scale;
    }
    if (factor_kind() == Decoration::Factor::number) {
      all = times_factor(all, number_factor());
    }
    const int64_t layers = stack_.num_layers();
    const auto blocks =
        all.view({all.size(0), -1, stack_.num_heads(), stack_.head_dim()})
            .permute({1, 2, 0, 3})
            .unbind(0);
    KeyValues result;
    int64_t next = 0;
    for (int64_t i = 0; i < layers; ++i) {
      if (is_left_out(options_.leave_out(), i)) {
        result.keys.emplace_back();
        result.values.emplace_back();
        continue;
      }
      const auto row = static_cast<size_t>(
          options_.hf_layer_order() ? 2 * i % layers : next++);
      result.keys.push_back(blocks[2 * row]);
      result.values.push_back(blocks[2 * row + 1]);
    }
    return result;
  }

  /// A gate takes the place of a factor on what a prefix adds: it multiplies
  /// the keys and values, as UniPELT's published code has it.
  bool takes_factor(Decoration::Factor /*kind*/) const override {
    return true;
  }
  int64_t factor_features() const override {
    return stack_.hidden_size();
  }
  int64_t factor_parts() const override {
    return part_of(stack_.num_layers());
  }
  bool is_gated() const override {
    return factor_kind() == Decoration::Factor::input;
  }
  Tensor gate(const Tensor& hidden, int64_t layer) const override {
    return factor(hidden, 1.0, part_of(layer)).view({-1, 1, 1, 1});
  }

  /// Starts from the first tokens of a cache.
  void set(const KeyValues& cache) {
    torch::NoGradGuard no_grad;
    std::vector<Tensor> blocks;
    for (size_t i = 0; i < cache.keys.size(); ++i) {
      if (is_left_out(options_.leave_out(), static_cast<int64_t>(i))) {
        continue;
      }
      for (const auto* t : {&cache.keys[i], &cache.values[i]}) {
        blocks.push_back((*t)[0]
                             .narrow(1, 0, num_virtual_tokens())
                             .transpose(0, 1)
                             .flatten(1));
      }
    }
    set_table(at::cat(blocks, 1));
  }

 private:
  /// How many layers below this one have a prefix.
  int64_t part_of(int64_t layer) const {
    int64_t count = 0;
    for (int64_t i = 0; i < layer; ++i) {
      count += is_left_out(options_.leave_out(), i) ? 0 : 1;
    }
    return count;
  }

  PrefixOptions options_;
  ExtraTokensOptions stack_;
};

} // namespace detail

} // namespace peft
