#pragma once

// Intrinsic dimension (Li et al. 2018, arXiv:1804.08838, section 2; Aghajanyan
// et al. 2020, arXiv:2012.13255, section 3): d numbers move all weights,
// through a fixed random matrix.
//
//   W_i' = W_i + (P theta)_i               DID: theta [d]
//   W_i' = W_i + lambda_i (P theta)_i      SAID: theta [d - m], lambda [m]
//
// m is the number of adapted tensors; lambda starts at 1 and theta at 0, so the
// network starts as it was (and lambda moves from the second step on). P is
// drawn tensor by tensor from one seed (functional/random_projection.h), by the
// Fastfood transform or dense, each tensor's columns with length 1. It is made
// again when an adapter is loaded, and held in memory: of N numbers in a tensor
// Fastfood takes 8 n + 4 d bytes, n the power of two at or above N.
//
// Gradients are P's transpose. The code of the second paper divides Hadamard's
// backward by √n as often as it occurs, which makes a learning rate of 1/n of
// it for each tensor; that is no derivative, and not done here.

#include <peft/core/attach.h>
#include <peft/functional/random_projection.h>
#include <peft/methods/modules_to_save.h>

#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for intrinsic dimension.
///
///   peft::IntrinsicOptions(1000)                    DID, all linear weights
///   peft::IntrinsicOptions(1000).said(true)         and a scale for each
///   peft::IntrinsicOptions(200).all_parameters(true)    as both papers have it
struct IntrinsicOptions {
  IntrinsicOptions() = default;
  IntrinsicOptions(int64_t d) : d_(d) {}

  /// How many numbers are trained, the scales of SAID included.
  TORCH_ARG(int64_t, d) = 1000;
  /// Structure-aware: one of the d numbers for each tensor scales its part.
  TORCH_ARG(bool, said) = false;
  /// "fastfood", or "dense": 4 N d bytes for a tensor of N numbers.
  TORCH_ARG(std::string, projection) = "fastfood";
  /// Of P. The same seed on the same network is the same P.
  TORCH_ARG(int64_t, seed) = 0;
  /// The layers whose weights move (biases stay), or single parameters by
  /// name. Default: all linear layers.
  TORCH_ARG(Targets, targets);
  /// Every parameter of the network, embeddings, biases and norms too.
  TORCH_ARG(bool, all_parameters) = false;
  /// Layers and parameters that stay.
  TORCH_ARG(Targets, exclude);
  /// Modules trained whole, beside the d numbers: a task head.
  TORCH_ARG(std::vector<std::string>, modules_to_save);
};

namespace detail {

/// P of one adapter, a part for each tensor, drawn when first asked for. Copies
/// of an adapter share it.
class IntrinsicProjections {
 public:
  IntrinsicProjections(
      std::string kind,
      int64_t seed,
      int64_t d,
      std::vector<int64_t> sizes)
      : kind_(std::move(kind)), seed_(seed), d_(d), sizes_(std::move(sizes)) {}

  const functional::RandomProjection& at(int64_t index) const {
    std::call_once(once_, [&] { draw(); });
    return *drawn_[static_cast<size_t>(index)];
  }

  /// Tells P from another one, up to rounding.
  double fingerprint() const {
    double sum = 0;
    for (size_t i = 0; i < sizes_.size(); ++i) {
      sum += at(static_cast<int64_t>(i)).fingerprint() /
          static_cast<double>(i + 1);
    }
    return sum;
  }

  /// What P holds on each device that it is used on.
  int64_t bytes() const {
    int64_t sum = 0;
    for (size_t i = 0; i < sizes_.size(); ++i) {
      sum += at(static_cast<int64_t>(i)).bytes();
    }
    return sum;
  }

 private:
  void draw() const {
    auto generator =
        at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(seed_));
    for (const int64_t size : sizes_) {
      if (kind_ == "dense") {
        drawn_.push_back(
            std::make_unique<functional::DenseProjection>(size, d_, generator));
      } else {
        drawn_.push_back(std::make_unique<functional::FastfoodProjection>(
            size, d_, generator));
      }
    }
  }

  std::string kind_;
  int64_t seed_, d_;
  std::vector<int64_t> sizes_;
  mutable std::once_flag once_;
  mutable std::vector<std::unique_ptr<functional::RandomProjection>> drawn_;
};

/// One tensor's part. The first delta of an adapter has the parameters of all.
class IntrinsicDelta final : public Delta {
 public:
  /// The first one: theta, and lambda for SAID or an undefined tensor.
  IntrinsicDelta(
      Tensor theta,
      Tensor lambda,
      std::shared_ptr<const IntrinsicProjections> projections)
      : projections_(std::move(projections)) {
    intrinsic_vector = register_parameter("intrinsic_vector", std::move(theta));
    if (lambda.defined()) {
      intrinsic_lambda =
          register_parameter("intrinsic_lambda", std::move(lambda));
    }
  }
  /// Number `index` of them, counted from 0.
  IntrinsicDelta(std::shared_ptr<const IntrinsicDelta> first, int64_t index)
      : projections_(first->projections_),
        first_(std::move(first)),
        index_(index) {}

  Tensor effective(const Tensor& weight, double scale) const override {
    // P is linear: what multiplies it had better multiply d numbers than N.
    Tensor theta = first().intrinsic_vector;
    if (first().intrinsic_lambda.defined()) {
      theta = theta * first().intrinsic_lambda.select(0, index_);
    }
    const Tensor f = first().number_factor(); // decorations go where theta is
    if (f.defined()) {
      theta = theta * f.to(theta.scalar_type());
    }
    if (theta.is_meta()) {
      return weight + theta.sum().to(weight.scalar_type());
    }
    const Tensor change = projections_->at(index_).apply(theta, scale);
    return weight + change.view(weight.sizes()).to(weight.scalar_type());
  }

  std::optional<at::ScalarType> dtype() const override {
    return first().intrinsic_vector.scalar_type();
  }
  bool is_additive() const override {
    return true;
  }
  bool takes_factor(Decoration::Factor kind) const override {
    return kind != Decoration::Factor::input;
  }
  void visit_state(
      c10::function_ref<void(const Tensor&)> visit) const override {
    visit(first().intrinsic_vector);
    if (first().intrinsic_lambda.defined()) {
      visit(first().intrinsic_lambda);
    }
    const Tensor f = first_ ? first_->number_factor() : Tensor();
    if (f.defined()) {
      visit(f);
    }
  }

  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    std::vector<std::pair<std::string, Tensor>> result;
    if (!first_) {
      result.emplace_back("intrinsic_vector", intrinsic_vector);
      if (intrinsic_lambda.defined()) {
        result.emplace_back("intrinsic_lambda", intrinsic_lambda);
      }
    }
    return result;
  }

  void relink(const std::function<std::shared_ptr<Delta>(const Delta*)>&
                  copy_of) override {
    if (first_) {
      first_ = std::dynamic_pointer_cast<const IntrinsicDelta>(
          copy_of(first_.get()));
    }
  }
  std::shared_ptr<Delta> copy() const override {
    const auto twin = [](const Tensor& t) {
      return t.defined()
          ? t.detach().clone().set_requires_grad(t.requires_grad())
          : t;
    };
    std::shared_ptr<IntrinsicDelta> result;
    if (first_) { // relink() gives it the copy of its first one
      result = std::make_shared<IntrinsicDelta>(first_, index_);
    } else {
      const Tensor theta = twin(intrinsic_vector);
      const Tensor lambda = twin(intrinsic_lambda);
      result = std::make_shared<IntrinsicDelta>(theta, lambda, projections_);
      result->intrinsic_vector.set_requires_grad(theta.requires_grad());
      if (lambda.defined()) {
        result->intrinsic_lambda.set_requires_grad(lambda.requires_grad());
      }
    }
    result->train(is_training());
    return result;
  }

  std::string describe() const override {
    return first_
        ? "intrinsic"
        : "intrinsic d=" +
            std::to_string(
                intrinsic_vector.numel() +
                (intrinsic_lambda.defined() ? intrinsic_lambda.numel() : 0));
  }

  const IntrinsicProjections& projections() const {
    return *projections_;
  }

  /// [d], or [d - m] beside lambda [m]. Undefined in all but the first.
  Tensor intrinsic_vector, intrinsic_lambda;

 private:
  const IntrinsicDelta& first() const {
    return first_ ? *first_ : *this;
  }

  std::shared_ptr<const IntrinsicProjections> projections_;
  std::shared_ptr<const IntrinsicDelta> first_; // null in the first
  int64_t index_ = 0;
};

inline void check(const IntrinsicOptions& options) {
  TORCH_CHECK_VALUE(
      options.d() > 0,
      "peft: d, the intrinsic dimension, must be positive, got ",
      options.d());
  TORCH_CHECK_VALUE(
      options.projection() == "fastfood" || options.projection() == "dense",
      "peft: the projection is 'fastfood' or 'dense', got '",
      options.projection(),
      "'");
  TORCH_CHECK_VALUE(
      options.seed() >= 0,
      "peft: the seed of a projection must not be negative, got ",
      options.seed());
  TORCH_CHECK_VALUE(
      !options.all_parameters() || options.targets().empty(),
      "peft: all_parameters names every parameter, and targets some; set one "
      "of the two");
}

/// The parameters that an intrinsic dimension moves, tied ones once.
class IntrinsicPlanner {
 public:
  IntrinsicPlanner(const IntrinsicOptions& options, const Network& network)
      : options_(options),
        network_(network),
        targets_(
            options.targets().empty() ? Targets::all_linear()
                                      : options.targets()) {}

  std::vector<PlannedSite> run() {
    check(options_);
    for (const auto* targets : {&targets_, &options_.exclude()}) {
      if (targets->kind() == Targets::Kind::list) {
        check_every_name_matches(
            network_,
            targets->names(),
            targets == &targets_ ? "targets" : "exclude",
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
        "peft: the targets match nothing that an intrinsic dimension can move",
        options_.targets().empty() ? " by default (linear layers); set "
                                     "targets(...) or all_parameters(true)."
                                   : ".",
        near_misses(network_, "weight"));
    add_deltas();
    plan_modules_to_save(network_, options_.modules_to_save(), sites_);
    return std::move(sites_);
  }

 private:
  void plan_layer(const Layer& layer) {
    const bool whole =
        !options_.all_parameters() && targets_.matches(layer.name, layer);
    bool found = false;
    for (const auto& p : layer.parameters) {
      const std::string path = layer.path(p.first);
      const bool wanted = options_.all_parameters()
          ? p.second.defined() && p.second.is_floating_point()
          : (whole && is_matrix(p.first, p.second)) ||
              (!whole && targets_.matches(path, layer));
      if (wanted && !options_.exclude().matches(path, layer)) {
        plan_parameter(layer, p.first, p.second);
        found = true;
      }
    }
    TORCH_CHECK(
        found || !whole,
        "peft: target '",
        layer.name,
        "' is a ",
        layer.type,
        " without a weight matrix of its own; name the layers in it, or single "
        "parameters");
  }

  /// Not the extra keys and values of an attention, [1, 1, width].
  static bool is_matrix(const std::string& key, const Tensor& parameter) {
    return parameter.defined() && parameter.dim() >= 2 &&
        key.compare(0, 4, "bias") != 0;
  }

  void plan_parameter(
      const Layer& layer,
      const std::string& key,
      const Tensor& parameter) {
    const std::string path = layer.path(key);
    TORCH_CHECK(
        layer.refusal.empty(),
        "peft: '",
        path,
        "' cannot be adapted: ",
        layer.refusal);
    check_adaptable(parameter, path);
    TORCH_CHECK(
        parameter.numel() > 0, "peft: '", path, "' is empty; exclude it");
    const bool tied =
        std::any_of(sites_.begin(), sites_.end(), [&](const auto& site) {
          return is_tied(site.tensor, parameter);
        });
    if (!tied) {
      const std::string& name = key == "weight" ? layer.name : path;
      sites_.push_back({name, path, layer.name, parameter, nullptr});
    }
  }

  void add_deltas() {
    const auto m = static_cast<int64_t>(sites_.size());
    const int64_t scales = options_.said() ? m : 0;
    TORCH_CHECK_VALUE(
        options_.d() > scales,
        "peft: with said(true) each of the ",
        m,
        " adapted tensors takes a scale, and d = ",
        options_.d(),
        " leaves no dimension to move in; take d > ",
        m);
    std::vector<int64_t> sizes;
    int64_t total = 0;
    for (const auto& site : sites_) {
      sizes.push_back(site.tensor.numel());
      total += sizes.back();
    }
    TORCH_CHECK_VALUE(
        options_.d() <= total,
        "peft: d = ",
        options_.d(),
        " is more than the ",
        total,
        " weights that it would move; take a smaller one");
    const int64_t d = options_.d() - scales;
    constexpr int64_t kMost = int64_t{1} << 31; // eight gigabytes
    TORCH_CHECK_VALUE(
        options_.projection() != "dense" || total <= kMost / d,
        "peft: a dense projection of d = ",
        options_.d(),
        " onto ",
        total,
        " weights is too big to be drawn; take projection('fastfood')");

    const c10::InferenceMode off(false);
    const Tensor& like = sites_.front().tensor;
    auto dtype = adapter_dtype(like);
    for (const auto& site : sites_) {
      dtype = c10::promoteTypes(dtype, adapter_dtype(site.tensor));
    }
    const auto where = torch::TensorOptions(like.device()).dtype(dtype);
    const auto first = std::make_shared<IntrinsicDelta>(
        torch::zeros({d}, where),
        scales > 0 ? torch::ones({scales}, where) : Tensor(),
        std::make_shared<IntrinsicProjections>(
            options_.projection(), options_.seed(), d, sizes));
    for (int64_t i = 0; i < m; ++i) {
      auto& site = sites_[static_cast<size_t>(i)];
      site.delta = i == 0 ? first : std::make_shared<IntrinsicDelta>(first, i);
    }
    sites_.front().file_prefix.clear(); // theta belongs to no layer
  }

  const IntrinsicOptions& options_;
  const Network& network_;
  const Targets targets_;
  std::vector<PlannedSite> sites_;
};

inline Plan plan(const IntrinsicOptions& options, const Network& network) {
  Plan result;
  result.method = "INTRINSIC";
  result.options = options;
  result.sites = IntrinsicPlanner(options, network).run();
  return result;
}

} // namespace detail

/// Trains `model` in a random subspace of d dimensions and freezes everything
/// else.
inline Adapter attach(
    torch::nn::Module& model,
    const IntrinsicOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
