#pragma once

// Options around options: what a method adds, times a number or a gate.
//
//   y = base(x) + f · (method(x) - base(x))
//
//   Scaled<Options>   f a number, or a parameter in its place at each site
//   Gated<Options>    f = G(x) = mean over tokens of σ(w·x + c), one number an
//                     example, with w and c at each site
//
// Gates are those of UniPELT (Mao et al. 2022, arXiv:2110.07577). A prefix has
// its keys and values multiplied (the published code; the paper writes of the
// attention's output). w starts from N(0, 0.02²) and c from 0, so G is about
// 1/2.
//
// G sees all the tokens of a call. In a causal decoder it tells earlier tokens
// of later ones, and with a cache it sees the tokens of this step alone (a
// prefix in a cache keeps the gate of the first call).

#include <peft/core/attach.h>
#include <peft/core/padding.h>
#include <peft/core/roles.h>
#include <peft/methods/any_options.h>
#include <peft/methods/union.h>

#include <torch/arg.h>

#include <algorithm>
#include <any>
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for the gates of Gated.
struct GateOptions {
  /// Over which tokens G averages: "tokens", those that no peft::PaddingScope
  /// calls padding, so that padding changes nothing; or "all", as published.
  TORCH_ARG(std::string, average) = "tokens";
  /// Whether inputs are [batch, tokens, features], or [tokens, batch, features]
  /// as in torch::nn::TransformerEncoder. An input of two dimensions has a gate
  /// for each row.
  TORCH_ARG(bool, batch_first) = true;
  /// w starts from N(0, init_std²), c at init_bias.
  TORCH_ARG(double, init_std) = 0.02;
  TORCH_ARG(double, init_bias) = 0;
};

/// Options for the factor of Scaled.
struct ScaleOptions {
  ScaleOptions(double value) : value_(value) {}

  /// The number, or where the parameter starts.
  TORCH_ARG(double, value);
  /// Whether each site has a parameter in the number's place.
  TORCH_ARG(bool, learned) = false;
};

namespace detail {

inline void check(const GateOptions& options) {
  TORCH_CHECK_VALUE(
      is_one_of(options.average(), {"tokens", "all"}),
      "peft: a gate's average must be over 'tokens' or 'all', got '",
      options.average(),
      "'");
  TORCH_CHECK_VALUE(
      options.init_std() >= 0 && std::isfinite(options.init_std()) &&
          std::isfinite(options.init_bias()),
      "peft: a gate starts from N(0, init_std²) and init_bias, got ",
      options.init_std(),
      " and ",
      options.init_bias());
}

inline void check(const ScaleOptions& options) {
  TORCH_CHECK_VALUE(
      std::isfinite(options.value()),
      "peft: the scale must be finite, got ",
      options.value());
}

/// G(x) at the places of one delta.
class Gate final : public Decoration {
 public:
  /// Draws w on the CPU. `parts` as in Delta::factor_parts.
  Gate(
      GateOptions options,
      int64_t features,
      int64_t parts,
      const at::TensorOptions& where)
      : options_(std::move(options)) {
    c10::InferenceMode off(false);
    torch::NoGradGuard no_grad;
    weight = register_parameter(
        "weight",
        torch::empty({parts, features})
            .normal_(0, options_.init_std())
            .to(where));
    bias = register_parameter(
        "bias", torch::full({parts}, options_.init_bias()).to(where));
  }

  Factor factor_kind() const override {
    return Factor::input;
  }

  Tensor factor(const Tensor& x, int64_t part) const override {
    TORCH_CHECK(
        x.dim() > 0 && x.size(-1) == weight.size(1),
        "peft: a gate was made for inputs of ",
        weight.size(1),
        " features, and its site is used on one of sizes ",
        x.sizes());
    const Tensor open = at::sigmoid(
        at::matmul(x.to(weight.scalar_type()), weight[part]) + bias[part]);
    if (open.dim() < 2) { // each row is an example
      return open.unsqueeze(-1);
    }
    const int64_t batch = options_.batch_first() ? 0 : 1;
    const int64_t tokens = 1 - batch;
    std::vector<int64_t> shape(x.dim(), 1);
    shape[batch] = x.size(batch);
    Tensor mask = open.dim() == 2 && options_.average() == "tokens"
        ? padding_of(open.size(batch), open.size(tokens))
        : Tensor();
    if (!mask.defined()) {
      std::vector<int64_t> dims;
      for (int64_t i = 0; i < open.dim(); ++i) {
        if (i != batch) {
          dims.push_back(i);
        }
      }
      return open.mean(dims).view(shape);
    }
    mask = mask.to(open.options());
    const Tensor count = mask.sum(1, /*keepdim=*/true);
    mask = at::where(count == 0, at::ones_like(mask), mask); // all padding
    mask = mask / mask.sum(1, /*keepdim=*/true);
    return ((batch == 0 ? open : open.t()) * mask).sum(1).view(shape);
  }

  std::string key() const override {
    return "gate";
  }
  NamedTensors file_tensors() const override {
    return {{"weight", weight}, {"bias", bias}};
  }
  std::shared_ptr<Decoration> copy() const override {
    auto result = std::make_shared<Gate>(
        options_,
        weight.size(1),
        weight.size(0),
        weight.options().requires_grad(false));
    result->weight.set_data(weight.detach().clone());
    result->bias.set_data(bias.detach().clone());
    result->weight.set_requires_grad(weight.requires_grad());
    result->bias.set_requires_grad(bias.requires_grad());
    return result;
  }
  std::string describe() const override {
    return "gated";
  }

  Tensor weight; // [parts, features]
  Tensor bias; // [parts]

 private:
  GateOptions options_;
};

/// A number, or a parameter that starts there.
class Scale final : public Decoration {
 public:
  Scale(const ScaleOptions& options, const at::TensorOptions& where)
      : options_(options) {
    c10::InferenceMode off(false);
    if (options.learned()) {
      value = register_parameter(
          "value", torch::full({1}, options.value()).to(where));
    } else { // a number for any dtype and device
      value = at::scalar_tensor(options.value(), at::kDouble);
    }
  }

  Factor factor_kind() const override {
    return Factor::number;
  }
  Tensor factor(const Tensor& /*x*/, int64_t /*part*/) const override {
    return value;
  }
  std::string key() const override {
    return "scale";
  }
  NamedTensors file_tensors() const override {
    return options_.learned() ? NamedTensors{{"value", value}} : NamedTensors{};
  }
  std::shared_ptr<Decoration> copy() const override {
    auto result =
        std::make_shared<Scale>(options_, value.options().requires_grad(false));
    if (options_.learned()) {
      result->value.set_data(value.detach().clone());
      result->value.set_requires_grad(value.requires_grad());
    }
    return result;
  }
  std::string describe() const override {
    return "scaled";
  }

  Tensor value; // [1] where it trains, else a scalar

 private:
  ScaleOptions options_;
};

/// Makes the decoration of one delta whose parameters are like `like`.
using MakeDecoration =
    std::function<std::shared_ptr<Decoration>(const Delta&, const Tensor&)>;

/// Puts a decoration on the sites of `plan` that have parameters, except on
/// those in `heads` (modules_to_save). A gate passes over what stands in for a
/// parameter of the base (layer norms that Houlsby trains beside its adapters),
/// unless there is nothing else: they see no input.
inline void decorate(
    Plan& plan,
    Decoration::Factor kind,
    const std::vector<std::string>& heads,
    const MakeDecoration& make) {
  const bool sees_input = kind == Decoration::Factor::input;
  const auto is_wanted = [&](const PlannedSite& site) {
    return !site.delta->parameters().empty() &&
        !(site.delta->replaces_base() && is_inside(site.parameter, heads));
  };
  const bool any_adds = std::any_of(
      plan.sites.begin(), plan.sites.end(), [&](const PlannedSite& site) {
        return is_wanted(site) && !site.delta->replaces_base();
      });
  for (const auto& site : plan.sites) {
    if (!is_wanted(site) ||
        (sees_input && any_adds && site.delta->replaces_base())) {
      continue;
    }
    TORCH_CHECK(
        site.delta->takes_factor(kind),
        "peft: ",
        sees_input ? "gates on a site without input: "
                   : "no place for a scale: ",
        "'",
        site.name,
        "' carries '",
        site.delta->describe(),
        "', whose change ",
        sees_input ? "is not computed from an input that a gate could see"
                   : "is no term that a number could multiply",
        sees_input && site.delta->takes_factor(Decoration::Factor::number)
            ? "; Scaled puts a number there"
            : "; leave this site out, or attach its method as an adapter of "
              "its own");
    const auto own = site.delta->parameters();
    site.delta->decorate(make(*site.delta, own.front()));
  }
}

inline MakeDecoration maker_of(const GateOptions& options) {
  check(options);
  return [options](const Delta& delta, const Tensor& like) {
    return std::make_shared<Gate>(
        options,
        delta.factor_features(),
        delta.factor_parts(),
        like.options().requires_grad(false));
  };
}

inline MakeDecoration maker_of(const ScaleOptions& options) {
  check(options);
  return [options](const Delta& /*delta*/, const Tensor& like) {
    return std::make_shared<Scale>(
        options, like.options().requires_grad(false));
  };
}

inline Decoration::Factor factor_kind_of(const GateOptions& /*options*/) {
  return Decoration::Factor::input;
}
inline Decoration::Factor factor_kind_of(const ScaleOptions& /*options*/) {
  return Decoration::Factor::number;
}

/// A plan as one part of a decorated one; `method` names the decoration.
template <class DecorationOptions>
Plan decorated(
    Plan inner,
    const std::string& method,
    const DecorationOptions& options,
    const std::vector<std::string>& heads) {
  const auto make = maker_of(options);
  Plan result;
  result.method = method;
  join(result, std::move(inner));
  decorate(result, factor_kind_of(options), heads, make);
  auto& parts = std::any_cast<UnionParts&>(result.options);
  parts.decoration = options;
  parts.plain = heads;
  return result;
}

} // namespace detail

/// A method with what it adds multiplied by G(x) at each of its sites.
///
///   peft::Gated(peft::LoraOptions(8).alpha(8))
///   peft::Gated(peft::HoulsbyOptions(64), peft::GateOptions().average("all"))
template <class Options>
struct Gated {
  explicit Gated(Options options, GateOptions gate = {})
      : options_(std::move(options)), gate_(std::move(gate)) {}

  /// The method's own: heads are not gated.
  std::vector<std::string> modules_to_save() const {
    return options_.modules_to_save();
  }

  TORCH_ARG(Options, options);
  TORCH_ARG(GateOptions, gate);
};

/// A method with what it adds multiplied by a number.
///
///   peft::Scaled(peft::LoraOptions(8), 0.5)
///   peft::Scaled(peft::HoulsbyOptions(64),
///                peft::ScaleOptions(1).learned(true))
template <class Options>
struct Scaled {
  Scaled(Options options, ScaleOptions scale)
      : options_(std::move(options)), scale_(scale) {}

  /// The method's own: heads are not scaled.
  std::vector<std::string> modules_to_save() const {
    return options_.modules_to_save();
  }

  TORCH_ARG(Options, options);
  TORCH_ARG(ScaleOptions, scale);
};

namespace detail {

template <class Options>
Plan plan(const Gated<Options>& options, const Network& network) {
  return decorated(
      plan_of(options.options(), network),
      "GATED",
      options.gate(),
      options.modules_to_save());
}

template <class Options>
Plan plan(const Scaled<Options>& options, const Network& network) {
  return decorated(
      plan_of(options.options(), network),
      "SCALED",
      options.scale(),
      options.modules_to_save());
}

} // namespace detail

/// Attaches the method inside with gates on what it adds, and freezes
/// everything else. A site that no gate can see the input of is an error.
template <class Options>
Adapter attach(
    torch::nn::Module& model,
    const Gated<Options>& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

/// Attaches the method inside with a factor on what it adds, and freezes
/// everything else.
template <class Options>
Adapter attach(
    torch::nn::Module& model,
    const Scaled<Options>& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
