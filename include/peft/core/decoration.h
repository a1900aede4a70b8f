#pragma once

// What can be put around a delta from outside, whatever its method: a gate or a
// scale on what it adds, a mask on its parameters.
//
//   y = base(x) + f · (delta(x) - base(x))      f = factor(x)

#include <torch/nn/module.h>
#include <torch/types.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

using torch::Tensor;

class Delta;

/// A decoration of one delta (Delta::decorate). A Module, so that train, to and
/// archives reach its parameters; they are the adapter's, in files too.
class Decoration : public torch::nn::Module {
 public:
  using torch::nn::Module::Module;
  using NamedTensors = std::vector<std::pair<std::string, Tensor>>;

  /// What f depends on: there is none, a number, or the delta's input.
  enum class Factor { none, number, input };
  virtual Factor factor_kind() const {
    return Factor::none;
  }
  /// f for an input `[batch, ..., features]` of the delta: a scalar, or
  /// `[batch, 1, ..., 1]`. `part` counts the places of a delta that acts at
  /// several (the layers of a prefix). Only for a factor_kind() of number or
  /// input.
  virtual Tensor factor(const Tensor& /*x*/, int64_t /*part*/) const {
    return {};
  }

  /// Called when this is put on `delta`, and on a copy of it.
  virtual void put_on(Delta& /*delta*/) {}

  /// Entries of the delta's parameters that this holds as they are: no training
  /// moves them, and nobody counts them as trained.
  virtual int64_t num_held() const {
    return 0;
  }

  /// The child's name below the delta, and the prefix of its names in a file:
  /// "gate", "mask".
  virtual std::string key() const = 0;
  /// As in Delta, after the key.
  virtual NamedTensors file_tensors() const {
    return {};
  }
  virtual NamedTensors training_tensors() const {
    return {};
  }
  /// An independent copy, on no delta yet.
  virtual std::shared_ptr<Decoration> copy() const = 0;
  /// One word for a summary: "gated".
  virtual std::string describe() const = 0;
};

} // namespace peft
