#pragma once

// A mask on the weights that another method trains: SparseAdapter
// (methods/sparse_adapter.h) prunes by it.
//
//   w → m ⊙ w      m in {0, 1}, one for each entry of a weight
//
// A masked entry is zero and its gradient is zero, so SGD, Adam and AdamW leave
// it at zero to the bit, with momentum and weight decay; nothing else of the
// method changes. (An optimizer that has moved an entry before it was masked
// goes on by its momentum: make the optimizer after the mask.)

#include <peft/methods/any_options.h>

#include <algorithm>
#include <any>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for a mask around another method. All entries are kept until prune()
/// (methods/sparse_adapter.h), or MaskDecoration::set, says otherwise.
///
///   auto adapter = peft::attach(*model, peft::Masked(peft::LoraOptions(8)));
///   peft::prune(adapter, peft::PruneOptions("magnitude", 0.5));
template <class Options>
struct Masked {
  Masked(Options inner) : options_(std::move(inner)) {}

  /// The method's own.
  TORCH_ARG(Options, options);
};

namespace detail {

/// Plan::options and AdapterState::options of a masked adapter: the method's
/// own name and options.
struct MaskedOptions {
  std::string method;
  std::any options;
};

inline const std::string kMaskedMethod = "MASKED";

} // namespace detail

/// Masks on the weights of one delta: its parameters of two dimensions or more.
/// Biases, gains and scales are left alone.
class MaskDecoration final : public Decoration {
 public:
  struct Weight {
    std::string name; // below the delta: "lora_A", "bottleneck.down_weight"
    Tensor parameter;
    Tensor kept; // as the parameter, nonzero for an entry that is kept
  };

  const std::vector<Weight>& weights() const {
    return weights_;
  }

  /// Keeps the entries where `kept` is true; the others become zero.
  void set(size_t weight, const Tensor& kept) {
    c10::InferenceMode off(false);
    torch::NoGradGuard no_grad;
    const Weight& w = weights_.at(weight);
    w.kept.copy_(kept);
    Tensor parameter = w.parameter;
    parameter.masked_fill_(kept.logical_not(), 0);
  }

  void put_on(Delta& delta) override {
    c10::InferenceMode off(false);
    const std::vector<Weight> copied = std::exchange(weights_, {});
    for (const auto& item : delta.named_parameters()) {
      const bool of_decoration = std::any_of(
          delta.decorations().begin(),
          delta.decorations().end(),
          [&](const auto& other) {
            const auto own = other->parameters();
            return std::any_of(own.begin(), own.end(), [&](const Tensor& t) {
              return t.is_same(item.value());
            });
          });
      if (item.value().dim() >= 2 && !of_decoration) {
        add(item.key(), item.value(), copied);
      }
    }
  }

  int64_t num_held() const override {
    int64_t count = 0;
    for (const auto& w : weights_) {
      count += w.kept.numel() - at::count_nonzero(w.kept).item<int64_t>();
    }
    return count;
  }

  std::string key() const override {
    return "mask";
  }
  /// The weights' own file holds the zeros; which of them may not move is for
  /// training alone.
  NamedTensors training_tensors() const override {
    NamedTensors result;
    for (const auto& w : weights_) {
      result.emplace_back(w.name, w.kept);
    }
    return result;
  }
  std::shared_ptr<Decoration> copy() const override {
    auto result = std::make_shared<MaskDecoration>();
    for (const auto& w : weights_) {
      result->weights_.push_back({w.name, {}, w.kept.clone()});
    }
    return result;
  }
  std::string describe() const override {
    return "masked";
  }

 private:
  void add(
      const std::string& name,
      const Tensor& parameter,
      const std::vector<Weight>& copied) {
    Tensor kept =
        at::ones(parameter.sizes(), parameter.options().dtype(at::kBool));
    for (const auto& other : copied) {
      if (other.name == name) {
        kept = other.kept.to(parameter.device());
      }
    }
    std::string key = name;
    std::replace(key.begin(), key.end(), '.', '_');
    kept = register_buffer("kept_" + key, kept);
    // A hook can only be put on what requires a gradient now.
    const bool trained = parameter.requires_grad();
    parameter.set_requires_grad(true);
    parameter.register_hook([kept](const Tensor& grad) {
      return grad.is_sparse() ? grad * kept.to(grad.scalar_type())
                              : grad.masked_fill(kept.logical_not(), 0);
    });
    parameter.set_requires_grad(trained);
    weights_.push_back({name, parameter, kept});
  }

  std::vector<Weight> weights_;
};

namespace detail {

/// The masks of an adapter's sites.
template <class Sites>
std::vector<std::shared_ptr<MaskDecoration>> masks_of(const Sites& sites) {
  std::vector<std::shared_ptr<MaskDecoration>> result;
  for (const auto& site : sites) {
    for (const auto& decoration : site.delta->decorations()) {
      auto mask = std::dynamic_pointer_cast<MaskDecoration>(decoration);
      if (mask) {
        result.push_back(std::move(mask));
      }
    }
  }
  return result;
}

/// A plan with masks on what it trains; copies of the network's own parameters
/// (a task head) are left alone.
inline Plan masked(Plan inner) {
  int64_t count = 0;
  for (auto& site : inner.sites) {
    if (!site.delta->replaces_base()) {
      const std::string obstacle = site.delta->mask_obstacle();
      TORCH_CHECK(
          obstacle.empty(),
          "peft: what '",
          site.name,
          "' trains cannot be masked: ",
          obstacle);
      auto mask = std::make_shared<MaskDecoration>();
      site.delta->decorate(mask);
      count += static_cast<int64_t>(mask->weights().size());
    }
  }
  TORCH_CHECK(
      count > 0,
      "peft: a mask needs weights of two dimensions or more, and ",
      inner.method,
      " trains none of its own here; the entries of the network's own "
      "parameters are chosen by SparseTuningOptions");
  inner.options =
      MaskedOptions{std::move(inner.method), std::move(inner.options)};
  inner.method = kMaskedMethod;
  return inner;
}

template <class Options>
Plan plan(const Masked<Options>& options, const Network& network) {
  return masked(plan_of(options.options(), network));
}

} // namespace detail

/// Puts the inner method on `model`, with masks that keep everything so far.
template <class Options>
Adapter attach(
    torch::nn::Module& model,
    const Masked<Options>& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
