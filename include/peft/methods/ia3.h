#pragma once

// (IA)³ (Liu et al. 2022, arXiv:2205.05638, eq. 1 and section 3.3): scale what
// some layers compute by learned vectors, ones at the start.
//
//   k = l_k ⊙ (W_k x + b),  v = l_v ⊙ (W_v x + b)      other layers: the output
//   FFN(x) = W_2 (l_ff ⊙ g(W_1 x)) + b                 feed-forward: the input
//
// Both are scalings of the weight's rows or columns (and of the bias, in the
// first case), so merging is exact.
//
// The template for a method that changes weights: options, the delta that says
// what becomes of a weight, the plan that says where, and attach.

#include <peft/core/attach.h>
#include <peft/core/roles.h>
#include <peft/methods/modules_to_save.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace peft {

/// Options for (IA)³, by the names of HF's IA3Config.
///
///   peft::Ia3Options()                       keys, values, second feed-forward
///   peft::Ia3Options().targets({"k_proj", "v_proj", "down_proj"})
///       .feedforward({"down_proj"})          these; of them by input
struct Ia3Options {
  /// HF's target_modules. Default: what key, value and the second feed-forward
  /// layer are called, or a packed projection of queries, keys and values.
  TORCH_ARG(Targets, targets);
  /// HF's feedforward_modules: those of the targets whose input is scaled.
  /// Default: by the part that the layer's name tells.
  TORCH_ARG(Targets, feedforward);
  /// HF's exclude_modules.
  TORCH_ARG(Targets, exclude);
  /// Weights of layers that torch::nn does not know are [in, out]; GPT-2's
  /// Conv1D is taken so in any case.
  TORCH_ARG(bool, fan_in_fan_out) = false;
  /// false starts from N(0, 1), as HF's tests do.
  TORCH_ARG(bool, init_ia3_weights) = true;
  /// Modules trained whole, beside the vectors: a task head.
  TORCH_ARG(std::vector<std::string>, modules_to_save);
};

namespace detail {

/// W' = W scaled along one axis: rows (what it puts out) or columns (what it
/// takes in).
class Ia3Delta final : public Delta {
 public:
  /// `shape` is that of the vector in HF's files: [out, 1] or [1, in] for
  /// matrices, [1, channels, 1, ...] for convolutions of `groups`.
  Ia3Delta(Tensor vector, int64_t axis, bool feedforward, int64_t groups = 1)
      : axis_(axis), feedforward_(feedforward), groups_(groups) {
    ia3_l = register_parameter("ia3_l", std::move(vector));
  }

  /// For rows `part` of `size` of a packed projection: one of q, k and v.
  Ia3Delta(Tensor vector, Rows part, int64_t size)
      : Ia3Delta(std::move(vector), 0, false) {
    part_ = part;
    size_ = size;
  }

  Tensor effective(const Tensor& weight, double scale) const override {
    const Tensor l = vector(scale);
    if (axis_ == 1 && groups_ > 1) { // each group has channels of its own
      const Tensor by_group = weight.unflatten(0, {groups_, -1});
      std::vector<int64_t> shape(by_group.dim(), 1);
      shape[0] = groups_;
      shape[2] = -1;
      return (by_group * l.view(shape)).flatten(0, 1).to(weight.scalar_type());
    }
    std::vector<int64_t> shape(weight.dim(), 1);
    shape[axis_] = -1;
    return (weight * l.view(shape)).to(weight.scalar_type());
  }

  std::optional<at::ScalarType> dtype() const override {
    return ia3_l.scalar_type();
  }

  bool has_linear() const override {
    return true;
  }
  Tensor linear(
      const LinearCall& call,
      const Below<LinearCall>& below,
      double scale) const override {
    Tensor l = vector(scale);
    if (axis_ == 0) {
      l = l.slice(0, call.rows.begin, call.rows.end);
    }
    if ((axis_ == 0) == call.transposed) {
      const Tensor x = (call.x * l).to(call.x.scalar_type());
      return below({x, call.weight, call.bias, call.rows, call.transposed});
    }
    const std::optional<Tensor> none;
    const Tensor y =
        below({call.x, call.weight, none, call.rows, call.transposed});
    return with_bias(y, l, call.bias, y.dim() - 1);
  }

  bool has_convolution() const override {
    return true;
  }
  Tensor convolution(
      const ConvolutionCall& call,
      const Below<ConvolutionCall>& below,
      double scale) const override {
    const Tensor l = vector(scale);
    // A single image comes without a batch dimension.
    const int64_t channel = call.x.dim() - (call.weight.dim() - 2) - 1;
    if (axis_ == 1) {
      const Tensor x =
          (call.x * along(l, call.x, channel)).to(call.x.scalar_type());
      return below({x, call.weight, call.bias, call.args});
    }
    const Tensor y = below({call.x, call.weight, std::nullopt, call.args});
    return with_bias(y, l, call.bias, channel);
  }

  /// l, or between ones and l: [channels].
  Tensor vector(double scale) const {
    Tensor l = ia3_l.flatten();
    if (part_) {
      l = at::cat(
          {at::ones(part_->begin, l.options()),
           l,
           at::ones(size_ - part_->end, l.options())});
    }
    return scale == 1.0 ? l : 1.0 + scale * (l - 1.0);
  }

  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    return {{"ia3_l", ia3_l}};
  }

  std::string take(const Delta& other, bool /*may_grow*/, bool dry_run)
      override {
    const auto* from = dynamic_cast<const Ia3Delta*>(&other);
    const auto place = [](const Ia3Delta& delta) {
      const Rows part = delta.part_.value_or(Rows{});
      return std::make_tuple(
          delta.axis_, delta.feedforward_, delta.size_, part.begin, part.end);
    };
    if (from == nullptr || place(*from) != place(*this) ||
        from->ia3_l.sizes() != ia3_l.sizes()) {
      return "it is an '" + other.describe() + "' of another part";
    }
    if (!dry_run) {
      torch::NoGradGuard no_grad;
      ia3_l.copy_(from->ia3_l);
    }
    return {};
  }

  std::shared_ptr<Delta> copy() const override {
    auto result = std::make_shared<Ia3Delta>(
        ia3_l.detach().clone(), axis_, feedforward_, groups_);
    result->part_ = part_;
    result->size_ = size_;
    result->ia3_l.set_requires_grad(ia3_l.requires_grad());
    result->train(is_training());
    return result;
  }

  std::string describe() const override {
    return feedforward_ ? "(ia)3 input" : "(ia)3 output";
  }

  bool is_feedforward() const {
    return feedforward_;
  }
  /// Whether the weight is [in, out].
  bool is_transposed() const {
    return feedforward_ != (axis_ == 1);
  }

  Tensor ia3_l;

 private:
  static Tensor along(const Tensor& l, const Tensor& like, int64_t dim) {
    std::vector<int64_t> shape(like.dim(), 1);
    shape[dim] = -1;
    return l.view(shape);
  }

  /// l ⊙ y + b; the bias has its own delta and comes scaled.
  static Tensor with_bias(
      const Tensor& y,
      const Tensor& l,
      const std::optional<Tensor>& bias,
      int64_t dim) {
    const Tensor scaled = (y * along(l, y, dim)).to(y.scalar_type());
    return bias && bias->defined() ? scaled + along(*bias, y, dim) : scaled;
  }

  int64_t axis_;
  bool feedforward_;
  int64_t groups_;
  std::optional<Rows> part_;
  int64_t size_ = 0;
};

/// b' = l ⊙ b, with the vector of the layer's weight; of a packed bias only the
/// rows that are the layer's.
class Ia3BiasDelta final : public Delta {
 public:
  explicit Ia3BiasDelta(
      std::shared_ptr<Ia3Delta> weight,
      std::optional<Rows> part = std::nullopt)
      : weight_(std::move(weight)), part_(part) {}

  Tensor effective(const Tensor& bias, double scale) const override {
    Tensor l = weight_->vector(scale);
    if (part_ && l.size(0) != bias.size(0)) { // the weight is not packed
      l = at::cat(
          {at::ones(part_->begin, l.options()),
           l,
           at::ones(bias.size(0) - part_->end, l.options())});
    }
    return (bias * l).to(bias.scalar_type());
  }
  /// It has nothing of its own to take.
  std::string take(const Delta& other, bool /*may_grow*/, bool /*dry_run*/)
      override {
    return dynamic_cast<const Ia3BiasDelta*>(&other) != nullptr
        ? ""
        : "it is a '" + other.describe() + "'";
  }
  std::optional<at::ScalarType> dtype() const override {
    return weight_->dtype();
  }
  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    return {};
  }
  std::shared_ptr<Delta> copy() const override {
    return std::make_shared<Ia3BiasDelta>(weight_, part_);
  }
  void relink(const std::function<std::shared_ptr<Delta>(const Delta*)>&
                  copy_of) override {
    weight_ = std::dynamic_pointer_cast<Ia3Delta>(copy_of(weight_.get()));
  }
  std::string describe() const override {
    return "(ia)3 bias";
  }

 private:
  std::shared_ptr<Ia3Delta> weight_;
  std::optional<Rows> part_;
};

/// Where (IA)³ acts, layer by layer.
class Ia3Planner {
 public:
  Ia3Planner(const Ia3Options& options, const Network& network)
      : options_(options), network_(network) {}

  std::vector<PlannedSite> run() {
    for (const auto* targets :
         {&options_.targets(), &options_.feedforward(), &options_.exclude()}) {
      if (targets->kind() == Targets::Kind::list) {
        check_every_name_matches(network_, targets->names(), "targets", false);
      }
    }
    for (const auto& layer : network_) {
      if (is_inside(layer.name, options_.modules_to_save()) ||
          options_.exclude().matches(layer.name, layer)) {
        continue;
      }
      if (options_.targets().empty()
              ? is_default(layer)
              : options_.targets().matches(layer.name, layer)) {
        plan_layer(layer);
      } else {
        TORCH_CHECK( // a pattern is free to match more, as HF's may
            options_.targets().empty() ||
                options_.feedforward().kind() != Targets::Kind::list ||
                !options_.feedforward().matches(layer.name, layer),
            "peft: '",
            layer.name,
            "' is among the feedforward modules and not among the targets of "
            "(IA)3; name it in both");
      }
    }
    TORCH_CHECK(
        !sites_.empty(),
        "peft: the targets match nothing that (IA)3 can scale",
        options_.targets().empty()
            ? " by default (keys, values, the second feed-forward layer); set "
              "targets(...) and feedforward(...)."
            : ".",
        near_misses(network_, "weight"));
    plan_modules_to_save(network_, options_.modules_to_save(), sites_);
    return std::move(sites_);
  }

 private:
  static bool is_packed(const Layer& layer) {
    const auto dot = layer.name.rfind('.');
    return is_one_of(
        dot == std::string::npos ? layer.name : layer.name.substr(dot + 1),
        {"c_attn", "query_key_value", "qkv", "qkv_proj"});
  }

  static bool is_default(const Layer& layer) {
    if (layer.kind == LayerKind::attention) {
      return true;
    }
    const auto weight = layer.parameter("weight");
    return weight.defined() && weight.dim() >= 2 &&
        (is_packed(layer) ||
         is_one_of(role_of(layer), {"key", "value", "output"}));
  }

  bool is_feedforward(const Layer& layer) const {
    return options_.feedforward().empty()
        ? options_.targets().empty() && role_of(layer) == "output"
        : options_.feedforward().matches(layer.name, layer);
  }

  /// Keys and values of a torch::nn::MultiheadAttention.
  void plan_attention(const Layer& layer) {
    const Tensor packed = layer.parameter("in_proj_weight");
    const Tensor bias = layer.parameter("in_proj_bias");
    const int64_t width = layer.parameter("in_proj_bias").defined()
        ? bias.size(0) / 3
        : layer.parameter("q_proj_weight").defined()
        ? layer.parameter("q_proj_weight").size(0)
        : packed.size(0) / 3;
    for (int64_t i : {1, 2}) {
      const std::string part = i == 1 ? "key" : "value";
      const std::string prefix = layer.path(part);
      const Rows rows{i * width, (i + 1) * width};
      const std::string key = packed.defined() ? "in_proj_weight"
          : i == 1                             ? "k_proj_weight"
                                               : "v_proj_weight";
      const Tensor weight = layer.parameter(key);
      const Tensor l = initial(weight, {width, 1});
      const auto delta = packed.defined()
          ? std::make_shared<Ia3Delta>(l, rows, 3 * width)
          : std::make_shared<Ia3Delta>(l, 0, false);
      sites_.push_back({prefix, layer.path(key), prefix, weight, delta});
      if (bias.defined()) {
        sites_.push_back(
            {layer.path("in_proj_bias"),
             layer.path("in_proj_bias"),
             prefix,
             bias,
             std::make_shared<Ia3BiasDelta>(delta, rows)});
      }
    }
  }

  void plan_layer(const Layer& layer) {
    if (layer.kind == LayerKind::attention) {
      plan_attention(layer);
      return;
    }
    const Tensor weight = layer.parameter("weight");
    TORCH_CHECK(
        layer.refusal.empty() && weight.defined() && weight.dim() >= 2 &&
            layer.kind != LayerKind::embedding &&
            layer.kind != LayerKind::embedding_bag &&
            layer.kind != LayerKind::recurrent,
        "peft: (IA)3 scales what a linear layer or a convolution takes in or "
        "puts out, and '",
        layer.name,
        "' is a ",
        layer.type,
        layer.refusal.empty() ? "" : ": " + layer.refusal);
    const bool feedforward = is_feedforward(layer);
    const bool convolution = layer.kind == LayerKind::convolution;
    const bool transposed = layer.kind == LayerKind::other &&
        weight.dim() == 2 && (options_.fan_in_fan_out() || layer.is_conv1d());
    const int64_t axis = feedforward != transposed ? 1 : 0;
    const int64_t groups = convolution && axis == 1 ? layer.groups : 1;
    const int64_t size = weight.size(axis) * groups;
    std::vector<int64_t> shape(weight.dim(), 1);
    shape[feedforward || convolution ? 1 : 0] = size;

    auto delta = std::make_shared<Ia3Delta>(
        initial(weight, shape), axis, feedforward, groups);
    for (const auto& site : sites_) { // a tied weight has one vector
      const auto other = std::dynamic_pointer_cast<Ia3Delta>(site.delta);
      if (other && is_tied(site.tensor, weight)) {
        delta = other;
      }
    }
    sites_.push_back(
        {layer.name, layer.path("weight"), layer.name, weight, delta});
    const Tensor bias = layer.parameter("bias");
    if (!feedforward && bias.defined()) {
      sites_.push_back(
          {layer.path("bias"),
           layer.path("bias"),
           layer.name,
           bias,
           std::make_shared<Ia3BiasDelta>(delta)});
    }
  }

  Tensor initial(const Tensor& weight, const std::vector<int64_t>& shape)
      const {
    c10::InferenceMode off(false);
    const auto dtype = adapter_dtype(weight);
    // As in HF it is drawn in float32 and has the precision of the weight.
    const Tensor l =
        options_.init_ia3_weights() ? torch::ones(shape) : torch::randn(shape);
    return l.to(weight.device(), weight.scalar_type())
        .to(dtype)
        .set_requires_grad(true);
  }

  const Ia3Options& options_;
  const Network& network_;
  std::vector<PlannedSite> sites_;
};

inline Plan plan(const Ia3Options& options, const Network& network) {
  Plan result;
  result.method = "IA3";
  result.options = options;
  result.sites = Ia3Planner(options, network).run();
  return result;
}

} // namespace detail

/// Scales keys, values and feed-forwards of `model` by learned vectors and
/// freezes everything else. Several (IA)³ adapters multiply.
inline Adapter attach(
    torch::nn::Module& model,
    const Ia3Options& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
