#pragma once

// Context-aware prompt tuning (Blau et al. 2024, arXiv:2410.17222): the prompt
// is a text of solved examples, and every token of it may move a little.
//
//   P = E(text) + Π(δ)     Π scales a row of δ back where it is longer than ε
//   ε_i = opt_projection_epsilon √(hidden / 2048)         for words of inputs,
//         opt_projection_format_epsilon √(hidden / 2048)  for templates
//   loss = mean over the answers' tokens, those of the examples included, each
//          example weighed by opt_loss_decay_factor^(how many come after it)
//
// cpt_tokens_type_mask says what each token is, by t % 4: 1 the template of an
// input, 2 the input, 3 the template of an answer, 0 (with t > 0) the answer,
// which does not move; the next example goes on with 5, 6, 7, 8. What stands in
// front of the input is P, for which prompt.h holds.
//
//   auto adapter = peft::attach(
//       *model,
//       peft::CptOptions(examples.ids).cpt_tokens_type_mask(examples.types));
//   const auto logits = model->forward(ids, mask);
//   peft::cpt_loss(adapter, logits, labels, types).backward();
//   optimizer.step();
//   peft::project_cpt(adapter);
//
// HF PEFT writes Π(δ) over δ in every forward. Forward writes nothing here;
// project_cpt does it, once a step.

#include <peft/core/attach.h>
#include <peft/core/extra_tokens.h>
#include <peft/methods/modules_to_save.h>
#include <peft/methods/prompt.h>

#include <torch/nn/functional/loss.h>

#include <algorithm>
#include <any>
#include <cmath>
#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for CPT, by the names of HF's CPTConfig. (Its cpt_mask, which PEFT
/// reads nowhere, is kept in files.)
struct CptOptions {
  CptOptions(std::vector<int64_t> cpt_token_ids)
      : cpt_token_ids_(std::move(cpt_token_ids)) {}

  int64_t num_virtual_tokens() const {
    return static_cast<int64_t>(cpt_token_ids_.size());
  }
  /// cpt_tokens_type_mask with the default put in.
  std::vector<int64_t> types() const {
    return cpt_tokens_type_mask_.empty()
        ? std::vector<int64_t>(cpt_token_ids_.size(), 1)
        : cpt_tokens_type_mask_;
  }

  /// The tokens of the examples.
  TORCH_ARG(std::vector<int64_t>, cpt_token_ids);
  /// What each is; see above. Default: 1 for all.
  TORCH_ARG(std::vector<int64_t>, cpt_tokens_type_mask);
  /// "none", or "decay" for the weights of the loss.
  TORCH_ARG(std::string, opt_weighted_loss_type) = "none";
  TORCH_ARG(double, opt_loss_decay_factor) = 1;
  /// How far a token may move, where the network is 2048 wide.
  TORCH_ARG(double, opt_projection_epsilon) = 0.1;
  TORCH_ARG(double, opt_projection_format_epsilon) = 0.1;
  /// Modules trained whole, beside the prompt.
  TORCH_ARG(std::vector<std::string>, modules_to_save);
  /// HF's task_type: "CAUSAL_LM", the only one that has such a prompt.
  TORCH_ARG(std::string, task_type);
};

namespace detail {

/// The examples' embeddings, frozen, and how far each row moved.
class CptDelta final : public PromptTable {
 public:
  /// `rows` [tokens, hidden].
  CptDelta(CptOptions options, ExtraTokensOptions stack, const Tensor& rows)
      : PromptTable(options.num_virtual_tokens(), std::move(stack)),
        options_(std::move(options)) {
    embedding = register_buffer("embedding", rows);
    delta_embedding =
        register_parameter("delta_embedding", at::zeros_like(rows));
    const double width = std::sqrt(static_cast<double>(rows.size(1)) / 2048.0);
    std::vector<double> longest, moving;
    for (const auto type : options_.types()) {
      const auto kind = type % 4;
      const double own = kind == 0 ? 1e-10 // as PEFT has it
          : kind == 2              ? options_.opt_projection_epsilon() * width
                      : options_.opt_projection_format_epsilon() * width;
      longest.push_back(own);
      moving.push_back(kind == 0 ? 0 : 1);
    }
    const auto column = [&](const std::vector<double>& values) {
      return at::tensor(values, at::kDouble).to(rows.options()).unsqueeze(1);
    };
    epsilon = register_buffer("epsilon", column(longest));
    moves = register_buffer("moves", column(moving));
  }

  /// Π(δ), [tokens, hidden].
  Tensor projected() const {
    torch::NoGradGuard no_grad;
    const Tensor norm =
        at::linalg_vector_norm(delta_embedding, 2, {1}, /*keepdim=*/true);
    return delta_embedding *
        at::where(norm > 0, epsilon / at::maximum(norm, epsilon), 1.0);
  }

  Tensor table() const override {
    // What is added last is zero and hands the gradient on as PEFT does: as if
    // Π were not there.
    return embedding + projected() +
        moves * (delta_embedding - delta_embedding.detach());
  }

  /// Writes Π(δ) over δ.
  void project() {
    torch::NoGradGuard no_grad;
    delta_embedding.copy_(projected());
  }

  std::vector<std::pair<std::string, Tensor>> training_tensors()
      const override {
    return {
        {"embedding.weight", embedding},
        {"delta_embedding.weight", delta_embedding}};
  }

  /// A file has the sum; where the rows started is lost in it.
  std::string from_file(
      const std::string& name,
      const Tensor& value,
      bool dry_run) override {
    if (name != "prompt_embeddings") {
      return PromptTable::from_file(name, value, dry_run);
    }
    if (value.sizes() != embedding.sizes()) {
      return c10::str(
          "shape ", value.sizes(), " where ", embedding.sizes(), " fits");
    }
    if (!dry_run) {
      torch::NoGradGuard no_grad;
      embedding.copy_(value);
      delta_embedding.zero_();
    }
    return {};
  }

  std::shared_ptr<Delta> copy() const override {
    auto result = std::make_shared<CptDelta>(
        options_, stack(), embedding.detach().clone());
    copy_parameters(*this, *result);
    result->train(is_training());
    return result;
  }

  std::string describe() const override {
    return "CPT l=" + std::to_string(num_virtual_tokens());
  }

  Tensor embedding, delta_embedding;
  Tensor epsilon, moves; // [tokens, 1]

 private:
  CptOptions options_;
};

inline void check(const CptOptions& options) {
  TORCH_CHECK_VALUE(
      !options.cpt_token_ids().empty(),
      "peft: cpt_token_ids is empty; a CPT prompt starts from the tokens of "
      "examples");
  const auto types = options.types();
  TORCH_CHECK_VALUE(
      types.size() == options.cpt_token_ids().size(),
      "peft: cpt_tokens_type_mask says of each token what it is, and there "
      "are ",
      types.size(),
      " types for ",
      options.cpt_token_ids().size(),
      " cpt_token_ids");
  for (const auto type : types) {
    TORCH_CHECK_VALUE(
        type >= 0,
        "peft: cpt_tokens_type_mask must not be negative, got ",
        type);
  }
  TORCH_CHECK_VALUE(
      options.opt_weighted_loss_type() == "none" ||
          options.opt_weighted_loss_type() == "decay",
      "peft: opt_weighted_loss_type must be 'none' or 'decay', got '",
      options.opt_weighted_loss_type(),
      "'");
  for (const double epsilon :
       {options.opt_projection_epsilon(),
        options.opt_projection_format_epsilon(),
        options.opt_loss_decay_factor()}) {
    TORCH_CHECK_VALUE(
        std::isfinite(epsilon) && epsilon >= 0,
        "peft: opt_projection_epsilon, opt_projection_format_epsilon and "
        "opt_loss_decay_factor must be finite and not negative, got ",
        epsilon);
  }
}

/// `is_empty`: to be filled from a file.
inline Plan
plan(const CptOptions& options, const Network& network, bool is_empty = false) {
  check(options);
  auto prompt = PromptOptions(options.num_virtual_tokens())
                    .modules_to_save(options.modules_to_save())
                    .task_type(options.task_type());
  if (is_empty) {
    prompt.init("empty");
  } else {
    prompt.init_token_ids(options.cpt_token_ids());
  }
  const auto places = prompt_places(prompt, network, "CPT");
  TORCH_CHECK_VALUE(
      places.task_type == "CAUSAL_LM" && places.sites.size() == 1,
      "peft: CPT puts examples in front of what a causal language model goes "
      "on with, and this network is for '",
      places.task_type,
      "', with places for tokens at ",
      stacks_of(places.sites));
  Plan result;
  result.method = "CPT";
  result.options = CptOptions(options).task_type(places.task_type);
  plan_table(
      std::make_shared<CptDelta>(
          options, places.first(), initial_prompt(prompt, network, places)),
      places,
      result.sites);
  plan_modules_to_save(network, options.modules_to_save(), result.sites);
  return result;
}

/// The weight of each answer among `types` [length] of one row: 1 for the last,
/// `factor` for the one before, and so on.
inline std::vector<double> answer_weights(
    const std::vector<int64_t>& types,
    double factor) {
  std::set<int64_t> answers;
  for (const auto type : types) {
    if (type > 0 && type % 4 == 0) {
      answers.insert(type);
    }
  }
  std::vector<double> weights(types.size(), 1.0);
  double weight = 1.0;
  for (auto answer = answers.rbegin(); answer != answers.rend(); ++answer) {
    for (size_t i = 0; i < types.size(); ++i) {
      if (types[i] == *answer) {
        weights[i] = weight;
      }
    }
    weight *= factor;
  }
  return weights;
}

} // namespace detail

/// Trains how far the tokens of examples move in front of `model`'s tokens, and
/// freezes everything else. The network is a decoder that calls
/// peft::ExtraTokens behind its token embedding.
inline Adapter attach(
    torch::nn::Module& model,
    const CptOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

/// Keeps what training moved within its bounds: to be called after
/// optimizer.step(). Without it forward computes the same, and an optimizer
/// that looks at its parameters (momentum, weight decay) goes on from outside
/// the bounds.
inline void project_cpt(const Adapter& adapter) {
  adapter.name(); // an empty or detached handle is an error
  bool found = false;
  for (const auto& site : adapter.shared_state()->sites) {
    if (auto* delta = dynamic_cast<detail::CptDelta*>(site.delta.get())) {
      delta->project();
      found = true;
    }
  }
  TORCH_CHECK(
      found,
      "peft: adapter '",
      adapter.name(),
      "' is of method ",
      adapter.method(),
      ", and project_cpt is for CPT");
}

/// CPT's loss, a scalar. `logits` [batch, tokens + length, vocabulary] are of a
/// forward under the adapter, `labels` [batch, length] the input's, -100 where
/// there is none; `input_type_mask` [batch, length] says what the input's
/// tokens are as cpt_tokens_type_mask does, counted anew from 1, 0 for padding.
/// Default: all are answers. Those that are answers cost, here and among the
/// examples.
inline Tensor cpt_loss(
    const CptOptions& options,
    const Tensor& logits,
    const Tensor& labels,
    const Tensor& input_type_mask = {}) {
  detail::check(options);
  const int64_t tokens = options.num_virtual_tokens();
  TORCH_CHECK_VALUE(
      labels.dim() == 2 && logits.dim() == 3 &&
          logits.size(0) == labels.size(0) &&
          logits.size(1) == tokens + labels.size(1),
      "peft: cpt_loss takes labels [batch, length] and logits [batch, ",
      tokens,
      " + length, vocabulary], got ",
      labels.sizes(),
      " and ",
      logits.sizes());
  TORCH_CHECK_VALUE(
      !input_type_mask.defined() || input_type_mask.sizes() == labels.sizes(),
      "peft: cpt_loss takes one type for each label, ",
      labels.sizes(),
      ", got ",
      input_type_mask.defined() ? input_type_mask.sizes() : at::IntArrayRef());
  const auto batch = labels.size(0), length = tokens + labels.size(1);
  const auto kinds = options.types();
  const int64_t last = *std::max_element(kinds.begin(), kinds.end());
  const auto row_of = [](const std::vector<int64_t>& values) {
    return at::tensor(values, at::kLong).unsqueeze(0);
  };
  const Tensor own = input_type_mask.defined()
      ? input_type_mask.to(at::kCPU, at::kLong)
      : at::full(labels.sizes(), 4, at::kLong);
  const Tensor types = at::cat(
      {row_of(kinds).expand({batch, -1}), at::where(own > 0, own + last, own)},
      1);
  const Tensor words = at::cat(
      {row_of(options.cpt_token_ids()).expand({batch, -1}),
       labels.to(at::kCPU, at::kLong)},
      1);
  // A token is what the one before it should give, so the first costs nothing.
  const Tensor next = types.slice(1, 1).contiguous();
  const Tensor costs = (next > 0)
                           .logical_and(next.remainder(4) == 0)
                           .logical_and(words.slice(1, 1) != -100);
  const auto count = costs.sum().item<int64_t>();
  TORCH_CHECK_VALUE(
      count > 0,
      "peft: no token of this batch is an answer with a label. The input's "
      "types are counted on from the prompt's largest, ",
      last,
      last % 4 == 0
          ? ""
          : ", which is no multiple of 4: what is an answer (4) by itself is "
            "none behind it");
  Tensor weights = at::ones({batch, length - 1}, at::kDouble);
  if (options.opt_weighted_loss_type() == "decay") {
    for (int64_t row = 0; row < batch; ++row) {
      const auto* first = next[row].const_data_ptr<int64_t>();
      weights[row].copy_(at::tensor(
          detail::answer_weights(
              {first, first + length - 1}, options.opt_loss_decay_factor()),
          at::kDouble));
    }
  }
  namespace F = torch::nn::functional;
  const Tensor targets =
      at::where(costs, words.slice(1, 1), -100).to(logits.device());
  const Tensor each = F::cross_entropy(
      logits.slice(1, 0, -1).flatten(0, 1),
      targets.flatten(),
      F::CrossEntropyFuncOptions().reduction(torch::kNone));
  return (each * weights.flatten().to(each.options())).sum() /
      static_cast<double>(count);
}

/// The same by an adapter's options.
inline Tensor cpt_loss(
    const Adapter& adapter,
    const Tensor& logits,
    const Tensor& labels,
    const Tensor& input_type_mask = {}) {
  TORCH_CHECK(
      adapter.method() == "CPT",
      "peft: adapter '",
      adapter.name(),
      "' is of method ",
      adapter.method(),
      ", and cpt_loss is for CPT");
  return cpt_loss(
      std::any_cast<const CptOptions&>(adapter.shared_state()->options),
      logits,
      labels,
      input_type_mask);
}

} // namespace peft
