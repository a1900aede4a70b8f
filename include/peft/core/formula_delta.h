#pragma once

#include <peft/core/delta.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// A weight delta that is a formula on a few trained tensors: their names in a
/// file, their copies and their dtype follow from the list of them. `Derived`
/// has a struct Config and a constructor (Config, NamedTensors), and says what
/// the weight becomes:
///
///   Tensor changed(const Tensor& weight, double scale) const;
///
/// for a matrix [out, in], or a convolution's weight. Weights that lie as
/// [in, out] (GPT-2's Conv1D) are turned for it.
template <class Derived>
class FormulaDelta : public Delta {
 public:
  using NamedTensors = std::vector<std::pair<std::string, Tensor>>;

  FormulaDelta(NamedTensors tensors, bool is_transposed)
      : is_transposed_(is_transposed) {
    for (auto& item : tensors) {
      names_.push_back(item.first);
      tensors_.push_back(register_parameter(
          key_of(item.first), item.second, item.second.requires_grad()));
    }
  }

  Tensor effective(const Tensor& weight, double scale) const override {
    return is_transposed_ ? self().changed(weight.t(), scale).t()
                          : self().changed(weight, scale);
  }

  std::optional<at::ScalarType> dtype() const override {
    return tensors_.front().scalar_type();
  }

  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    NamedTensors result;
    for (size_t i = 0; i < names_.size(); ++i) {
      result.emplace_back(names_[i], tensors_[i]);
    }
    return result;
  }

  std::shared_ptr<Delta> copy() const override {
    NamedTensors copies;
    for (size_t i = 0; i < names_.size(); ++i) {
      copies.emplace_back(
          names_[i],
          tensors_[i].detach().clone().set_requires_grad(
              tensors_[i].requires_grad()));
    }
    auto result = std::make_shared<Derived>(
        self().config(), std::move(copies), is_transposed_);
    result->train(is_training());
    return result;
  }

  std::string take(const Delta& other, bool /*may_grow*/, bool dry_run)
      override {
    const auto* from = dynamic_cast<const Derived*>(&other);
    if (from == nullptr || from->is_transposed_ != is_transposed_ ||
        from->names_ != names_) {
      return "it is a '" + other.describe() + "' of another form";
    }
    for (size_t i = 0; i < names_.size(); ++i) {
      if (from->tensors_[i].sizes() != tensors_[i].sizes()) {
        return c10::str(
            names_[i],
            " has shape ",
            from->tensors_[i].sizes(),
            " where ",
            tensors_[i].sizes(),
            " fits");
      }
    }
    if (!dry_run) {
      torch::NoGradGuard no_grad;
      for (size_t i = 0; i < names_.size(); ++i) {
        tensors_[i].copy_(from->tensors_[i]);
      }
      // Derived shows its settings to readers only.
      const_cast<typename Derived::Config&>(self().config()) = from->config();
    }
    return {};
  }

  bool is_transposed() const {
    return is_transposed_;
  }

 protected:
  /// By its name in a file; undefined where there is none.
  Tensor tensor(const char* name) const {
    for (size_t i = 0; i < names_.size(); ++i) {
      if (names_[i] == name) {
        return tensors_[i];
      }
    }
    return {};
  }
  /// The same in another dtype, or in that of `like`.
  Tensor tensor(const char* name, at::ScalarType dtype) const {
    return tensor(name).to(dtype);
  }
  Tensor tensor(const char* name, const Tensor& like) const {
    return tensor(name, like.scalar_type());
  }
  /// Numbers in all of them.
  int64_t numel() const {
    int64_t count = 0;
    for (const auto& t : tensors_) {
      count += t.numel();
    }
    return count;
  }

 private:
  static std::string key_of(std::string name) { // a module's names: no dots
    const std::string end = ".weight";
    if (name.size() > end.size() &&
        name.compare(name.size() - end.size(), end.size(), end) == 0) {
      name.erase(name.size() - end.size());
    }
    std::replace(name.begin(), name.end(), '.', '_');
    return name;
  }
  const Derived& self() const {
    return static_cast<const Derived&>(*this);
  }

  std::vector<std::string> names_;
  std::vector<Tensor> tensors_; // share the registered ones
  bool is_transposed_;
};

} // namespace peft
