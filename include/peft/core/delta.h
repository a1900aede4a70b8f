#pragma once

#include <peft/core/decoration.h>
#include <peft/functional/convolution.h>
#include <peft/functional/packed_matrix.h>

#include <c10/util/FunctionRef.h>
#include <c10/util/StringUtil.h>
#include <torch/nn/module.h>
#include <torch/types.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Rows [begin, end) of a weight: packed attention projections are read in
/// such slices.
struct Rows {
  int64_t begin = 0;
  int64_t end = 0;
};

/// y = x Mᵀ + b, where M is `weight`: rows of the adapted matrix, or of its
/// transpose when `transposed` (then `rows` still counts rows of the matrix).
struct LinearCall {
  const Tensor& x; // [*, in]
  const Tensor& weight; // [out, in], plain
  const std::optional<Tensor>& bias; // [out]
  Rows rows;
  bool transposed = false;
  /// The whole adapted matrix, prepacked (pack_frozen); null where it is not.
  std::shared_ptr<const functional::PackedMatrix> packed = nullptr;
};

/// y = weight[indices].
struct EmbeddingCall {
  const Tensor& weight; // [num, dim], plain
  const Tensor& indices;
  int64_t padding_idx = -1;
  bool scale_grad_by_freq = false;
  bool sparse = false; // wants sparse gradients
};

/// y = conv(x, weight, bias).
struct ConvolutionCall {
  const Tensor& x;
  const Tensor& weight; // [out, in / groups, kernel...], plain
  const std::optional<Tensor>& bias;
  functional::ConvolutionArgs args;
};

/// What stands below a delta at its weight: the base operator, or the next
/// delta. `is_base` lets a delta fuse itself with the base operator.
template <class Call>
struct Below {
  c10::function_ref<Tensor(const Call&)> run;
  bool is_base;
  Tensor operator()(const Call& call) const {
    return run(call);
  }
};

/// What one adapter does at one tensor of a network. A Module, so that train,
/// eval, to and archives reach its parameters.
///
/// A weight delta says what the weight becomes (`effective`); merge, the
/// materialising fallback and the tests all use that one function. The three
/// fast paths may be left alone: an operator without one gets the effective
/// weight.
class Delta : public torch::nn::Module {
 public:
  using torch::nn::Module::Module;

  /// W' from W, differentiable in both W and the parameters; same shape, same
  /// dtype as the W handed in (the wider of the base's and the adapter's).
  virtual Tensor effective(const Tensor& weight, double scale) const = 0;

  /// Whether matrix `index` of a stack [n, rows, columns] depends on that
  /// matrix alone; effective_matrix() then makes it of `weight`, that of the
  /// base.
  virtual bool has_matrices() const {
    return false;
  }
  virtual Tensor effective_matrix(
      const Tensor& weight,
      int64_t /*index*/,
      double /*scale*/) const {
    return weight;
  }

  /// The dtype that `effective` computes in; the base's when it has no say.
  virtual std::optional<at::ScalarType> dtype() const {
    return std::nullopt;
  }

  virtual bool has_linear() const {
    return false;
  }
  virtual Tensor linear(
      const LinearCall& call,
      const Below<LinearCall>& below,
      double /*scale*/) const {
    return below(call);
  }
  /// Adds to `y`, the result of what stands below for rows x [n, in], what this
  /// changes there, in place and without gradients: s · x ΔMᵀ for a low-rank
  /// ΔM. False, with `y` untouched, where it has no such way.
  virtual bool add_rows(
      const LinearCall& /*call*/,
      const Tensor& /*y*/,
      double /*scale*/) const {
    return false;
  }

  virtual bool has_embedding() const {
    return false;
  }
  virtual Tensor embedding(
      const EmbeddingCall& call,
      const Below<EmbeddingCall>& below,
      double /*scale*/) const {
    return below(call);
  }

  virtual bool has_convolution() const {
    return false;
  }
  virtual Tensor convolution(
      const ConvolutionCall& call,
      const Below<ConvolutionCall>& below,
      double /*scale*/) const {
    return below(call);
  }

  /// True for methods that act on a layer's output. They sit on its bias, or on
  /// the weight of a layer without one.
  virtual bool transforms_output() const {
    return false;
  }
  /// y → f(y), where the bias has been added.
  virtual Tensor output(const Tensor& y, double /*scale*/) const {
    return y;
  }
  /// The same at a LayerNorm, y = norm(x), where the input is at hand too.
  virtual Tensor around_norm(
      const Tensor& x,
      c10::function_ref<Tensor(const Tensor&)> norm,
      double scale) const {
    return output(norm(x), scale);
  }

  /// Deltas of one adapter that share state hold each other by pointer; after
  /// all were copied, `copy_of` gives each one's copy.
  virtual void relink(
      const std::function<std::shared_ptr<Delta>(const Delta*)>& /*copy_of*/) {}

  /// Why this cannot be folded into the weight; empty when it can.
  virtual std::string merge_obstacle() const {
    return {};
  }

  /// Why no entry of its parameters may be held at zero; empty when one may.
  virtual std::string mask_obstacle() const {
    return {};
  }

  /// W ← W' in the memory of `weight`, the plain base, for a merge. True only
  /// where a look at the parameters proves that a finite W stays finite; with
  /// `dry_run`, which is always asked first, it only says so. False: nothing
  /// was written, and the merge checks what `effective` gives.
  virtual bool fold_into(
      const Tensor& /*weight*/,
      double /*scale*/,
      bool /*dry_run*/) const {
    return false;
  }

  /// W' = W + ΔW with ΔW free of W: such deltas merge in any order.
  virtual bool is_additive() const {
    return false;
  }

  /// Multiply-adds that linear() spends on a row beside the base's, where it is
  /// the same function from call to call; 0: the weight is not worth keeping.
  virtual int64_t linear_cost() const {
    return 0;
  }

  /// Every tensor that `effective` reads beside the weight.
  virtual void visit_state(c10::function_ref<void(const Tensor&)> visit) const {
    for (const auto& t : parameters()) {
      visit(t);
    }
    for (const auto& t : buffers()) {
      visit(t);
    }
  }

  /// True where the parameters stand in for entries of the base (a trained
  /// copy of a bias), so that a summary does not count them twice.
  virtual bool replaces_base() const {
    return false;
  }

  /// The tensors as a file names them, after the module's own name
  /// ("lora_A.weight"), in file order.
  virtual std::vector<std::pair<std::string, Tensor>> file_tensors() const = 0;

  /// What training goes on from and file_tensors() lacks; from_file() takes it
  /// too.
  virtual std::vector<std::pair<std::string, Tensor>> training_tensors() const {
    return {};
  }

  /// A parameter in the shape that a file has for it, where that differs.
  virtual Tensor to_file(const std::string& /*name*/, const Tensor& parameter)
      const {
    return parameter;
  }
  /// Takes a tensor of a file; returns why it does not fit, or "". With
  /// `dry_run` it only says so.
  virtual std::string
  from_file(const std::string& name, const Tensor& value, bool dry_run) {
    auto known = all_file_tensors();
    const auto more = all_training_tensors();
    known.insert(known.end(), more.begin(), more.end());
    for (auto& item : known) {
      if (item.first != name) {
        continue;
      }
      if (item.second.sizes() != value.sizes()) {
        return c10::str(
            "shape ", value.sizes(), " where ", item.second.sizes(), " fits");
      }
      if (!dry_run) {
        torch::NoGradGuard no_grad;
        item.second.copy_(value);
      }
    }
    return {};
  }

  /// Takes over the values and settings of `other`, made for the same place
  /// from another file, in the tensors that this has (io/hotswap.h). Returns
  /// why it cannot, or ""; with `dry_run` it only says so. `may_grow`: a tensor
  /// may get other memory where its own is too small.
  virtual std::string
  take(const Delta& /*other*/, bool /*may_grow*/, bool /*dry_run*/) {
    return "'" + describe() + "' cannot be swapped in place";
  }
  /// Becomes no change at all, by the values of its parameters; false, with
  /// nothing done, where it has no such values. With `dry_run` it only says so.
  virtual bool clear(bool /*dry_run*/) {
    return false;
  }

  /// An independent copy with the same values and requires_grad, without
  /// decorations.
  virtual std::shared_ptr<Delta> copy() const = 0;

  /// One word for a summary: "lora r=8", "bias".
  virtual std::string describe() const = 0;

  // ~~~~ decorations (core/decoration.h) ~~~~

  /// Whether what this adds can be multiplied by a factor of this kind.
  virtual bool takes_factor(Decoration::Factor kind) const {
    return kind == Decoration::Factor::none;
  }

  /// Features of the input that a factor sees, and the places that it is asked
  /// for (the layers of a prefix).
  virtual int64_t factor_features() const {
    return 0;
  }
  virtual int64_t factor_parts() const {
    return 1;
  }

  /// Puts `decoration` on; an error where this has no place for its factor.
  void decorate(std::shared_ptr<Decoration> decoration) {
    TORCH_CHECK(
        takes_factor(decoration->factor_kind()),
        "peft: '",
        describe(),
        "' cannot be ",
        decoration->describe(),
        ": it has nothing there that a factor",
        decoration->factor_kind() == Decoration::Factor::input ? " of its input"
                                                               : "",
        " could multiply");
    std::string key = decoration->key();
    for (int i = 2; named_children().contains(key); ++i) {
      key = decoration->key() + "_" + std::to_string(i);
    }
    register_module(key, decoration);
    decorations_.push_back(decoration);
    decoration_keys_.push_back(key);
    decoration->put_on(*this);
  }
  const std::vector<std::shared_ptr<Decoration>>& decorations() const {
    return decorations_;
  }

  /// Entries of the parameters that training moves.
  int64_t num_trained() const {
    int64_t count = 0;
    for (const auto& p : parameters()) {
      count += p.numel();
    }
    for (const auto& decoration : decorations_) {
      count -= decoration->num_held();
    }
    return count;
  }

  /// With those of the decorations.
  Decoration::NamedTensors all_file_tensors() const {
    return with_decorations(file_tensors(), &Decoration::file_tensors);
  }
  Decoration::NamedTensors all_training_tensors() const {
    return with_decorations(training_tensors(), &Decoration::training_tensors);
  }
  /// What `effective` reads beside the weight, factors included.
  void visit_decorated_state(
      c10::function_ref<void(const Tensor&)> visit) const {
    visit_state(visit);
    for (const auto& decoration : decorations_) {
      if (decoration->factor_kind() == Decoration::Factor::number) {
        for (const auto& t : decoration->parameters()) {
          visit(t);
        }
        for (const auto& t : decoration->buffers()) {
          visit(t);
        }
      }
    }
  }
  std::shared_ptr<Delta> decorated_copy() const {
    auto result = copy();
    for (const auto& decoration : decorations_) {
      result->decorate(decoration->copy());
    }
    return result;
  }
  std::string decorated_merge_obstacle() const {
    return factor_kind() == Decoration::Factor::input
        ? "its gate depends on the input, which no weight knows"
        : merge_obstacle();
  }

 protected:
  /// What all factors depend on, together.
  Decoration::Factor factor_kind() const {
    auto kind = Decoration::Factor::none;
    for (const auto& decoration : decorations_) {
      kind = std::max(kind, decoration->factor_kind());
    }
    return kind;
  }
  /// Their product for the input x, times `scale`; undefined: there are none,
  /// and `scale` is 1.
  Tensor factor(const Tensor& x, double scale = 1.0, int64_t part = 0) const {
    Tensor product;
    for (const auto& decoration : decorations_) {
      if (decoration->factor_kind() != Decoration::Factor::none) {
        const Tensor f = decoration->factor(x, part);
        product = product.defined() ? product * f : f;
      }
    }
    return product.defined() && scale != 1.0 ? product * scale : product;
  }
  /// The same where there is no input: for `effective`.
  Tensor number_factor() const {
    TORCH_CHECK(
        factor_kind() != Decoration::Factor::input,
        "peft: '",
        describe(),
        "' is gated by its input, and its weight was read instead: it is used "
        "otherwise than by linear, matmul or addmm, or an adapter beside it on "
        "the same weight replaces it; disable that one");
    return factor({});
  }
  /// `term` times a factor, which may be undefined.
  static Tensor times_factor(const Tensor& term, const Tensor& f) {
    return f.defined() ? term * f.to(term.scalar_type()) : term;
  }

 private:
  Decoration::NamedTensors with_decorations(
      Decoration::NamedTensors result,
      Decoration::NamedTensors (Decoration::*list)() const) const {
    // A layer's weight and its bias have one prefix in a file.
    const std::string own = !decorations_.empty() && replaces_base()
        ? file_tensors().front().first + "."
        : "";
    for (size_t i = 0; i < decorations_.size(); ++i) {
      for (auto& item : (*decorations_[i].*list)()) {
        result.emplace_back(
            own + decoration_keys_[i] + "." + item.first,
            std::move(item.second));
      }
    }
    return result;
  }

  std::vector<std::shared_ptr<Decoration>> decorations_;
  std::vector<std::string> decoration_keys_; // as registered
};

namespace detail {

/// The dtype that adapters are kept in: at least float32.
inline at::ScalarType adapter_dtype(const Tensor& weight) {
  return c10::isReducedFloatingType(weight.scalar_type())
      ? at::kFloat
      : weight.scalar_type();
}

} // namespace detail

} // namespace peft
