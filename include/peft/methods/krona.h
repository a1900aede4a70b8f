#pragma once

// KronA (Edalati et al. 2022, arXiv:2212.10650): a Kronecker product beside a
// weight. Its rank is that of A times that of B, which may be full.
//
//   W' = W + s · A ⊗ B,   A [a1, a2],  B [b1, b2],  a1 b1 = out,  a2 b2 = in
//
// It trains a1 a2 + b1 b2 numbers a weight. A is drawn as LoRA's is and B is
// zero, so the network starts as it was. The layer computes
// x (A ⊗ B)ᵀ in two small products (functional/kronecker.h); merging is exact.
//
// Of the paper's three forms this is the one beside a weight. KronA^B, a
// Kronecker product beside the whole feed-forward, and KronA^B_res, the same
// with a learned multiple of the input, are no change of a weight and are not
// here; methods/parallel_adapter.h has that place.

#include <peft/core/attach.h>
#include <peft/methods/krona/delta.h>
#include <peft/methods/lora/placement.h>
#include <peft/methods/modules_to_save.h>

#include <torch/nn/init.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace peft {

/// Options for KronA.
///
///   peft::KronaOptions()                  A and B as near to squares as can be
///   peft::KronaOptions(32, 24)            A [32, 24] at every weight
///   peft::KronaOptions().budget(2000)     the most that 2000 a weight allow
struct KronaOptions {
  KronaOptions() = default;
  KronaOptions(int64_t a1, int64_t a2) : shape_({a1, a2}) {}

  /// a1 and a2, which divide the outputs and inputs of every target. Default:
  /// the largest divisors that are not above the square roots of the two.
  TORCH_ARG(std::vector<int64_t>, shape);
  /// In place of it: A and B take as many parameters as they can up to this
  /// number a weight; of equal choices, A nearest to a square.
  TORCH_ARG(std::optional<int64_t>, budget);
  /// s.
  TORCH_ARG(double, scaling) = 1;
  /// Default: queries and values, or a packed projection.
  TORCH_ARG(Targets, targets);
  TORCH_ARG(Targets, exclude);
  /// Of a torch::nn::MultiheadAttention; each gets factors of its own.
  TORCH_ARG(std::vector<std::string>, projections) = {"query", "value"};
  /// Weights of layers that torch::nn does not know are [in, out]; GPT-2's
  /// Conv1D is taken so in any case.
  TORCH_ARG(bool, fan_in_fan_out) = false;
  /// Modules trained whole, beside the factors: a task head.
  TORCH_ARG(std::vector<std::string>, modules_to_save);
};

namespace detail {

/// The divisors of n, ascending.
inline std::vector<int64_t> divisors(int64_t n) {
  std::vector<int64_t> low, high;
  for (int64_t i = 1; i * i <= n; ++i) {
    if (n % i == 0) {
      low.push_back(i);
      if (i * i != n) {
        high.push_back(n / i);
      }
    }
  }
  low.insert(low.end(), high.rbegin(), high.rend());
  return low;
}

inline std::string listed_divisors(int64_t n) {
  std::string text;
  for (const int64_t divisor : divisors(n)) {
    text += (text.empty() ? "" : ", ") + std::to_string(divisor);
  }
  return text;
}

/// a1 and a2 for a weight of `out` outputs and `in` inputs. `name` is for
/// messages.
inline std::pair<int64_t, int64_t> krona_shape(
    const KronaOptions& options,
    int64_t out,
    int64_t in,
    const std::string& name) {
  if (!options.shape().empty()) {
    for (const bool outputs : {true, false}) {
      const int64_t a = options.shape()[outputs ? 0 : 1];
      const int64_t n = outputs ? out : in;
      TORCH_CHECK_VALUE(
          n % a == 0,
          "peft: KronA's ",
          outputs ? "a1" : "a2",
          " = ",
          a,
          " does not divide the ",
          n,
          outputs ? " outputs of '" : " inputs of '",
          name,
          "'; it can be ",
          listed_divisors(n));
    }
    return {options.shape()[0], options.shape()[1]};
  }
  const auto of_out = divisors(out), of_in = divisors(in);
  if (!options.budget()) {
    const auto near_root = [](const std::vector<int64_t>& all, int64_t n) {
      int64_t best = 1;
      for (const int64_t d : all) {
        best = d * d <= n ? d : best;
      }
      return best;
    };
    return {near_root(of_out, out), near_root(of_in, in)};
  }
  // The most parameters, then A nearest to a square, then the smallest a1.
  std::tuple<int64_t, double> best{-1, 0};
  std::pair<int64_t, int64_t> shape;
  int64_t least = out * in + 1;
  for (const int64_t a1 : of_out) {
    for (const int64_t a2 : of_in) {
      const int64_t count = a1 * a2 + (out / a1) * (in / a2);
      least = std::min(least, count);
      const std::tuple<int64_t, double> score{
          count,
          static_cast<double>(std::min(a1, a2)) /
              static_cast<double>(std::max(a1, a2))};
      if (count <= *options.budget() && score > best) {
        best = score;
        shape = {a1, a2};
      }
    }
  }
  TORCH_CHECK_VALUE(
      std::get<0>(best) > 0,
      "peft: the least that KronA takes at '",
      name,
      "', of ",
      out,
      " outputs and ",
      in,
      " inputs, is ",
      least,
      " parameters, and the budget is ",
      *options.budget());
  return shape;
}

inline void check(const KronaOptions& options) {
  TORCH_CHECK_VALUE(
      options.shape().empty() ||
          (options.shape().size() == 2 && options.shape()[0] > 0 &&
           options.shape()[1] > 0),
      "peft: KronA's shape is that of A, two positive numbers, got ",
      at::IntArrayRef(options.shape()));
  TORCH_CHECK_VALUE(
      options.shape().empty() || !options.budget(),
      "peft: shape says what KronA's factors take, and so does budget; set one "
      "of the two");
  TORCH_CHECK_VALUE(
      !options.budget() || *options.budget() > 0,
      "peft: KronA's budget must be positive, got ",
      options.budget().value_or(0));
  TORCH_CHECK_VALUE(
      std::isfinite(options.scaling()),
      "peft: KronA's scaling must be finite, got ",
      options.scaling());
  TORCH_CHECK_VALUE(
      !options.projections().empty(),
      "peft: KronA's projections are empty; name some of query, key and value");
  for (const auto& name : options.projections()) {
    TORCH_CHECK_VALUE(
        name == "query" || name == "key" || name == "value",
        "peft: KronA's projections are query, key and value, got '",
        name,
        "'");
  }
}

/// Where KronA acts, layer by layer.
class KronaPlanner {
 public:
  KronaPlanner(const KronaOptions& options, const Network& network)
      : options_(options), network_(network) {}

  std::vector<PlannedSite> run() {
    check(options_);
    for (const auto* targets : {&options_.targets(), &options_.exclude()}) {
      if (targets->kind() == Targets::Kind::list) {
        check_every_name_matches(
            network_,
            targets->names(),
            targets == &options_.targets() ? "targets" : "exclude",
            true);
      }
    }
    for (const auto& layer : network_) {
      const bool inside = !layer.name.empty() &&
          is_inside(layer.name, options_.modules_to_save());
      if (!inside && !options_.exclude().matches(layer.name, layer)) {
        plan_layer(layer);
      }
    }
    TORCH_CHECK(
        !sites_.empty(),
        "peft: the targets match nothing that KronA can adapt",
        options_.targets().empty()
            ? " by default (query and value projections); set targets(...)."
            : ".",
        near_misses(network_, "weight"));
    plan_modules_to_save(network_, options_.modules_to_save(), sites_);
    return std::move(sites_);
  }

 private:
  void plan_layer(const Layer& layer) {
    const bool attention = layer.kind == LayerKind::attention;
    if (options_.targets().empty()
            ? attention || is_query_or_value(layer)
            : options_.targets().matches(layer.name, layer)) {
      TORCH_CHECK(
          layer.refusal.empty(),
          "peft: '",
          layer.name,
          "' cannot be adapted: ",
          layer.refusal);
      attention ? plan_attention(layer) : plan_module(layer);
      return;
    }
    for (const auto& p : layer.parameters) {
      const std::string path = layer.path(p.first);
      if (!options_.targets().matches(path, layer) ||
          options_.exclude().matches(path, layer)) {
        continue;
      }
      if (attention && p.first == "in_proj_weight") {
        plan_attention(layer);
      } else {
        plan_weight(layer, p.first, name_of(layer, p.first));
      }
    }
  }

  static constexpr std::array<const char*, 3> kProjections{
      "query",
      "key",
      "value"};

  static std::string key_of(const char* projection) {
    return std::string(1, projection[0]) + "_proj_weight";
  }

  /// What a weight goes by: its module, one of q, k and v, or itself.
  static std::string name_of(const Layer& layer, const std::string& key) {
    for (const char* const projection : kProjections) {
      if (layer.kind == LayerKind::attention && key == key_of(projection)) {
        return layer.path(projection);
      }
    }
    return key == "weight" ? layer.name : layer.path(key);
  }

  /// The chosen ones of q, k and v, each with factors of its own.
  void plan_attention(const Layer& layer) {
    const Tensor packed = layer.parameter("in_proj_weight");
    int64_t i = 0;
    for (const char* const name : kProjections) {
      const auto& chosen = options_.projections();
      const bool wanted =
          std::find(chosen.begin(), chosen.end(), name) != chosen.end();
      if (wanted && packed.defined()) {
        const int64_t width = packed.size(0) / 3;
        const Rows part{i * width, (i + 1) * width};
        sites_.push_back(
            {layer.path(name),
             layer.path("in_proj_weight"),
             layer.path(name),
             packed,
             make(layer.path(name), packed, width, false, part)});
      } else if (wanted) {
        plan_weight(layer, key_of(name), layer.path(name));
      }
      ++i;
    }
  }

  void plan_module(const Layer& layer) {
    std::vector<std::string> keys;
    for (const auto& p : layer.parameters) {
      const bool matrix = p.second.defined() && p.second.dim() == 2;
      if (matrix && (p.first == "weight" || is_recurrent(layer))) {
        keys.push_back(p.first);
      }
    }
    TORCH_CHECK(
        !keys.empty(),
        "peft: KronA adapts matrices, and '",
        layer.name,
        "', a ",
        layer.type,
        ", has none of its own; name the linear layers in it");
    for (const auto& key : keys) {
      plan_weight(layer, key, name_of(layer, key));
    }
  }

  static bool is_recurrent(const Layer& layer) {
    return layer.kind == LayerKind::recurrent;
  }

  void plan_weight(
      const Layer& layer,
      const std::string& key,
      const std::string& name) {
    const std::string path = layer.path(key);
    const Tensor weight = layer.parameter(key);
    check_adaptable(weight, path);
    TORCH_CHECK(
        weight.dim() == 2,
        "peft: KronA adapts matrices, and '",
        path,
        "' has ",
        weight.dim(),
        " dimension(s)");
    const bool transposed = layer.kind == LayerKind::other &&
        (options_.fan_in_fan_out() || layer.is_conv1d());
    sites_.push_back(
        {name,
         path,
         name,
         weight,
         make(name, weight, weight.size(0), transposed, std::nullopt)});
  }

  /// Drawn as LoRA's A is, on the CPU from the default generator; B is zero.
  std::shared_ptr<KronaDelta> make(
      const std::string& name,
      const Tensor& weight,
      int64_t rows,
      bool transposed,
      std::optional<Rows> part) const {
    TORCH_CHECK(weight.numel() > 0, "peft: '", name, "' is empty; exclude it");
    const int64_t out = transposed ? weight.size(1) : rows;
    const int64_t in = transposed ? rows : weight.size(1);
    const auto [a1, a2] = krona_shape(options_, out, in, name);
    const c10::InferenceMode off(false);
    const torch::NoGradGuard no_grad;
    const auto where =
        torch::TensorOptions(weight.device()).dtype(adapter_dtype(weight));
    Tensor A = torch::empty({a1, a2}, torch::kFloat);
    torch::nn::init::kaiming_uniform_(A, std::sqrt(5.0));
    return std::make_shared<KronaDelta>(
        A.to(where).set_requires_grad(true),
        torch::zeros({out / a1, in / a2}, where).set_requires_grad(true),
        options_.scaling(),
        transposed,
        part);
  }

  const KronaOptions& options_;
  const Network& network_;
  std::vector<PlannedSite> sites_;
};

inline Plan plan(const KronaOptions& options, const Network& network) {
  Plan result;
  result.method = "KRONA";
  result.options = options;
  result.sites = KronaPlanner(options, network).run();
  return result;
}

} // namespace detail

/// Puts KronA on the targets of `model` and freezes everything else.
inline Adapter attach(
    torch::nn::Module& model,
    const KronaOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
