#pragma once

/// Hand-made deltas for the call sites of a network, and a way to hang them
/// there without an adapter.

#include "test.h"

#include <peft/core/extra_tokens.h>
#include <peft/core/layer_loop.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace call_sites {

using torch::Tensor;

/// Hangs `delta` on a call site for as long as this lives.
template <class CallSite, class Delta>
class Hung {
 public:
  Hung(const CallSite& where, std::shared_ptr<Delta> hung)
      : delta(std::move(hung)), entries_(&where->site()->entries) {
    auto state = std::make_shared<peft::detail::AdapterState>();
    state->name = "test";
    entries_->push_back({state, this->delta});
  }
  ~Hung() {
    entries_->clear();
  }
  Hung(const Hung&) = delete;
  Hung& operator=(const Hung&) = delete;

  std::shared_ptr<Delta> delta;

 private:
  std::vector<peft::detail::Entry>* entries_;
};

template <class Base>
struct Unsaved : Base {
  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    return {};
  }
  std::shared_ptr<peft::Delta> copy() const override {
    return nullptr;
  }
  std::string describe() const override {
    return "test";
  }
};

/// Puts `rows` `[virtual tokens, hidden]` in front.
struct Prompt : Unsaved<peft::TokensDelta> {
  explicit Prompt(Tensor rows_) : rows(std::move(rows_)) {}

  int64_t num_virtual_tokens() const override {
    return rows.size(0);
  }
  Tensor embeddings(double /*scale*/) const override {
    return rows;
  }

  Tensor rows;
};

/// Puts `count` keys and values in front.
struct Prefix : Unsaved<peft::TokensDelta> {
  /// The first `count` of a cache's first row.
  Prefix(const peft::KeyValues& cache, int64_t count_) : count(count_) {
    for (size_t i = 0; i < cache.keys.size(); ++i) {
      stored.keys.push_back(cache.keys[i][0].detach().narrow(1, 0, count));
      stored.values.push_back(cache.values[i][0].detach().narrow(1, 0, count));
    }
  }

  int64_t num_virtual_tokens() const override {
    return count;
  }
  peft::KeyValues key_values(double /*scale*/) const override {
    return stored;
  }

  peft::KeyValues stored;
  int64_t count;
};

/// Runs each layer on some of the tokens, which look at all, and notes how far
/// that is from what the layer makes of these tokens in the whole.
struct Picker : Unsaved<peft::LoopDelta> {
  /// `picked` `[batch, k]`.
  explicit Picker(Tensor picked_) : picked(std::move(picked_)) {}

  Tensor layer(
      const peft::LayerCall& call,
      const peft::LayerLoopRun& /*loop*/,
      const std::function<Tensor(const peft::LayerCall&)>& below,
      double /*scale*/) const override {
    const auto whole = below(call);
    auto part = call;
    part.tokens = picked;
    const auto index =
        picked.unsqueeze(-1).expand({-1, -1, call.hidden.size(2)});
    part.hidden = call.hidden.gather(1, index);
    found.push_back(close(below(part), whole.gather(1, index)));
    return whole;
  }

  Tensor picked;
  mutable std::vector<Comparison> found;
};

} // namespace call_sites
