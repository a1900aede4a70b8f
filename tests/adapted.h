#pragma once

/// Shared by the tests of adapted weights: a layer whose adapter acts at once,
/// and ways to watch what it does.

#include "test.h"

#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace adapted {

using torch::Tensor;

/// LoRA with s = 2 whose B is not zero.
inline peft::LoraOptions acting(peft::Targets targets) {
  return peft::LoraOptions(2).alpha(4).init("random").targets(
      std::move(targets));
}

inline peft::LoraOptions acting() {
  return acting(peft::Targets::all_linear());
}

/// The factors of the adapter's first site.
inline peft::LoraDelta& lora(const peft::Adapter& adapter, size_t site = 0) {
  return dynamic_cast<peft::LoraDelta&>(
      *adapter.shared_state()->sites.at(site).delta);
}

/// A Linear from 4 to 6 features with an adapter: W' = W + 2 B A.
struct Adapted {
  explicit Adapted(
      torch::ScalarType dtype = torch::kDouble,
      const std::function<Tensor(const Tensor&)>& lay_out = nullptr) {
    linear->to(dtype);
    if (lay_out) {
      linear->weight.set_data(lay_out(linear->weight.detach()));
    }
    W = same_layout(linear->weight.detach());
    b = linear->bias.detach().clone();
    adapter = peft::attach(*linear, acting());
    A = lora(adapter).lora_A;
    B = lora(adapter).lora_B;
  }

  /// A copy with the strides of `t`.
  static Tensor same_layout(const Tensor& t) {
    return at::empty_strided(t.sizes(), t.strides(), t.options()).copy_(t);
  }
  /// W + 2 B A, differentiable in A and B, laid out like W.
  Tensor value() const {
    return W + 2 * at::mm(B, A).to(W.scalar_type());
  }
  const Tensor& w() const {
    return linear->weight;
  }
  std::vector<Tensor> factors() const {
    return {A, B};
  }

  torch::nn::Linear linear{4, 6};
  peft::Adapter adapter;
  Tensor W, b, A, B;
};

/// What is done with a weight, in words and in code.
struct Access {
  std::string name;
  std::function<Tensor(const Tensor&)> of;
};

/// Runs `check` on every row; a row that throws fails and the next one runs.
template <class Rows, class Check>
void for_each_row(const Rows& rows, Check&& check) {
  for (const auto& row : rows) {
    INFO(row.name);
    const std::string error = error_of([&] { check(row); });
    CHECK(error == "");
  }
}

/// Gradients of sum(y * direction); undefined where none arrives.
inline std::vector<Tensor> gradients(
    const Tensor& y,
    const std::vector<Tensor>& inputs,
    bool create_graph = false) {
  torch::manual_seed(99);
  const Tensor direction =
      torch::randn(y.sizes(), torch::kDouble).to(y.scalar_type());
  return torch::autograd::grad(
      {(y * direction).sum()},
      inputs,
      {},
      /*retain_graph=*/true,
      create_graph,
      /*allow_unused=*/true);
}

inline Comparison all_close(
    const std::vector<Tensor>& a,
    const std::vector<Tensor>& b) {
  if (a.size() != b.size()) {
    return {false, "different numbers of tensors"};
  }
  for (size_t i = 0; i < a.size(); ++i) {
    if (!a[i].defined() && !b[i].defined()) {
      continue; // no gradient reaches it, as it should be
    }
    auto one = close(a[i], b[i]);
    if (!one) {
      return {false, "number " + std::to_string(i) + ": " + one.message};
    }
  }
  return {true, "close"};
}

/// How often each way through a delta was taken.
struct Calls {
  int effective = 0, linear = 0, embedding = 0, convolution = 0;

  int fast() const {
    return linear + embedding + convolution;
  }
};

/// A delta that counts how it is asked, and answers as the one inside.
class Watched final : public peft::Delta {
 public:
  Watched(std::shared_ptr<peft::Delta> inner, std::shared_ptr<Calls> calls)
      : inner_(register_module("inner", std::move(inner))),
        calls_(std::move(calls)) {}

  Tensor effective(const Tensor& weight, double scale) const override {
    ++calls_->effective;
    return inner_->effective(weight, scale);
  }
  std::optional<at::ScalarType> dtype() const override {
    return inner_->dtype();
  }
  bool has_linear() const override {
    return inner_->has_linear();
  }
  Tensor linear(
      const peft::LinearCall& call,
      const peft::Below<peft::LinearCall>& below,
      double scale) const override {
    ++calls_->linear;
    return inner_->linear(call, below, scale);
  }
  bool has_embedding() const override {
    return inner_->has_embedding();
  }
  Tensor embedding(
      const peft::EmbeddingCall& call,
      const peft::Below<peft::EmbeddingCall>& below,
      double scale) const override {
    ++calls_->embedding;
    return inner_->embedding(call, below, scale);
  }
  bool has_convolution() const override {
    return inner_->has_convolution();
  }
  Tensor convolution(
      const peft::ConvolutionCall& call,
      const peft::Below<peft::ConvolutionCall>& below,
      double scale) const override {
    ++calls_->convolution;
    return inner_->convolution(call, below, scale);
  }
  bool is_additive() const override {
    return inner_->is_additive();
  }
  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    return inner_->file_tensors();
  }
  std::shared_ptr<peft::Delta> copy() const override {
    return inner_->copy();
  }
  std::string describe() const override {
    return inner_->describe();
  }

 private:
  std::shared_ptr<peft::Delta> inner_;
  std::shared_ptr<Calls> calls_;
};

/// Counts, from now on, how every site of `adapter` is used.
inline std::shared_ptr<Calls> watch(const peft::Adapter& adapter) {
  auto calls = std::make_shared<Calls>();
  for (const auto& record : adapter.shared_state()->sites) {
    for (auto& entry : record.site.lock()->entries) {
      if (entry.delta == record.delta) {
        entry.delta = std::make_shared<Watched>(record.delta, calls);
      }
    }
  }
  return calls;
}

/// The names of all operators that `f` dispatches on this thread, in order.
template <class F>
std::vector<std::string> operator_names(F&& f) {
  static thread_local std::vector<std::string>* log = nullptr;
  std::vector<std::string> result;
  log = &result;
  const auto handle = at::addThreadLocalCallback(
      at::RecordFunctionCallback(
          [](const at::RecordFunction& function)
              -> std::unique_ptr<at::ObserverContext> {
            log->push_back(function.name());
            return nullptr;
          })
          .scopes({at::RecordScope::FUNCTION}));
  f();
  at::removeCallback(handle);
  log = nullptr;
  return result;
}

/// Autocast to bfloat16 on the CPU.
class Autocast {
 public:
  Autocast() : before_(at::autocast::is_autocast_enabled(at::kCPU)) {
    at::autocast::increment_nesting();
    at::autocast::set_autocast_enabled(at::kCPU, true);
  }
  ~Autocast() {
    at::autocast::set_autocast_enabled(at::kCPU, before_);
    if (at::autocast::decrement_nesting() == 0) {
      at::autocast::clear_cache();
    }
  }
  Autocast(const Autocast&) = delete;
  Autocast& operator=(const Autocast&) = delete;

 private:
  bool before_;
};

} // namespace adapted
