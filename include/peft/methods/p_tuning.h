#pragma once

// P-tuning (Liu et al. 2021, arXiv:2103.10385): a prompt whose rows a small
// network makes, which lets them depend on each other while they train.
//
//   P = MLP(E)  or  MLP(LSTM(E))     E [virtual tokens, hidden], trained too
//
// MLP: hidden → h → h → hidden with ReLU between. LSTM: in both directions,
// hidden → 2 h, then 2 h → 2 h → hidden. Both as HF PEFT's PromptEncoder. What
// stands in front of the input is P, for which prompt.h holds.

#include <peft/methods/prompt.h>

#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/rnn.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for P-tuning, by the names of HF's PromptEncoderConfig.
///
///   peft::PTuningOptions(20).encoder_hidden_size(128)
///   peft::PTuningOptions(20).encoder_reparameterization_type("LSTM")
struct PTuningOptions {
  PTuningOptions(int64_t num_virtual_tokens)
      : num_virtual_tokens_(num_virtual_tokens) {}

  TORCH_ARG(int64_t, num_virtual_tokens);
  /// "MLP" or "LSTM".
  TORCH_ARG(std::string, encoder_reparameterization_type) = "MLP";
  /// Default: the network's hidden size.
  TORCH_ARG(std::optional<int64_t>, encoder_hidden_size);
  /// Layers of the LSTM; the MLP has its three whatever stands here.
  TORCH_ARG(int64_t, encoder_num_layers) = 2;
  /// Between the layers of the LSTM, in training.
  TORCH_ARG(double, encoder_dropout) = 0;
  /// As PromptOptions has them.
  TORCH_ARG(std::optional<int64_t>, num_transformer_submodules);
  TORCH_ARG(bool, prompts_decoder) = true;
  TORCH_ARG(std::vector<std::string>, modules_to_save);
  TORCH_ARG(std::string, task_type);
};

namespace detail {

/// A prompt and the network that makes it; or, once the network is gone, the
/// prompt alone.
class PTuningDelta final : public PromptTable {
 public:
  /// Draws the parameters on the CPU in PyTorch's order. Without an encoder the
  /// rows are trained themselves.
  PTuningDelta(
      PTuningOptions options,
      const ExtraTokensOptions& stack,
      int64_t rows,
      bool has_encoder)
      : PromptTable(options.num_virtual_tokens(), stack),
        options_(std::move(options)) {
    const int64_t hidden_size = stack.hidden_size();
    embedding =
        register_module("embedding", torch::nn::Embedding(rows, hidden_size));
    if (!has_encoder) {
      return;
    }
    const int64_t h = options_.encoder_hidden_size().value_or(hidden_size);
    if (options_.encoder_reparameterization_type() == "LSTM") {
      lstm_head = register_module(
          "lstm_head",
          torch::nn::LSTM(torch::nn::LSTMOptions(hidden_size, h)
                              .num_layers(options_.encoder_num_layers())
                              .bidirectional(true)
                              .batch_first(true)));
    }
    // One after another: the order of the draws is PyTorch's.
    mlp_head = register_module("mlp_head", torch::nn::Sequential());
    const std::vector<int64_t> widths = lstm_head.is_empty()
        ? std::vector<int64_t>{hidden_size, h, h, hidden_size}
        : std::vector<int64_t>{2 * h, 2 * h, hidden_size};
    for (size_t i = 0; i + 1 < widths.size(); ++i) {
      if (i > 0) {
        mlp_head->push_back(torch::nn::ReLU());
      }
      mlp_head->push_back(torch::nn::Linear(widths[i], widths[i + 1]));
    }
  }

  Tensor table() const override {
    return encode(is_training());
  }

  bool has_encoder() const {
    return !mlp_head.is_empty();
  }

  bool eject() override {
    if (!has_encoder()) {
      return false;
    }
    torch::NoGradGuard no_grad;
    const bool trains = embedding->weight.requires_grad();
    torch::nn::Embedding rows = torch::nn::Embedding::from_pretrained(
        encode(/*training=*/false).detach().clone(),
        torch::nn::EmbeddingFromPretrainedOptions().freeze(!trains));
    embedding = replace_module("embedding", rows);
    unregister_module("mlp_head");
    mlp_head = nullptr;
    if (!lstm_head.is_empty()) {
      unregister_module("lstm_head");
      lstm_head = nullptr;
    }
    return true;
  }

  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    return {{"prompt_embeddings", encode(/*training=*/false)}};
  }

  std::vector<std::pair<std::string, Tensor>> training_tensors()
      const override {
    std::vector<std::pair<std::string, Tensor>> result;
    if (has_encoder()) {
      for (const auto& item : named_parameters()) {
        result.emplace_back(item.key(), item.value());
      }
    }
    return result;
  }

  std::shared_ptr<Delta> copy() const override {
    auto result = std::make_shared<PTuningDelta>(
        options_, stack(), embedding->weight.size(0), has_encoder());
    copy_parameters(*this, *result);
    result->train(is_training());
    return result;
  }

  std::string describe() const override {
    return "p-tuning l=" + std::to_string(num_virtual_tokens()) +
        (has_encoder() ? " " + options_.encoder_reparameterization_type() : "");
  }

  torch::nn::Embedding embedding{nullptr};
  torch::nn::LSTM lstm_head{nullptr};
  torch::nn::Sequential mlp_head{nullptr};

 private:
  Tensor encode(bool training) const {
    const Tensor& rows = embedding->weight;
    if (!has_encoder()) {
      return rows;
    }
    if (lstm_head.is_empty()) {
      return mlp_head.ptr()->forward(rows);
    }
    const auto& lstm = lstm_head->options;
    const Tensor start = at::zeros(
        {2 * lstm.num_layers(), 1, lstm.hidden_size()}, rows.options());
    const Tensor read = std::get<0>(at::lstm(
        rows.unsqueeze(0),
        {start, start},
        lstm_head->all_weights(),
        /*has_biases=*/true,
        lstm.num_layers(),
        options_.encoder_dropout(),
        training,
        /*bidirectional=*/true,
        /*batch_first=*/true));
    return mlp_head.ptr()->forward(read.squeeze(0));
  }

  PTuningOptions options_;
};

inline void check(const PTuningOptions& options) {
  const auto& type = options.encoder_reparameterization_type();
  TORCH_CHECK_VALUE(
      type == "MLP" || type == "LSTM",
      "peft: encoder_reparameterization_type must be 'MLP' or 'LSTM', got '",
      type,
      "'");
  TORCH_CHECK_VALUE(
      options.encoder_hidden_size().value_or(1) > 0 &&
          options.encoder_num_layers() > 0,
      "peft: encoder_hidden_size and encoder_num_layers must be positive, got ",
      options.encoder_hidden_size().value_or(1),
      " and ",
      options.encoder_num_layers());
  TORCH_CHECK_VALUE(
      options.encoder_dropout() >= 0 && options.encoder_dropout() < 1,
      "peft: encoder_dropout must lie in [0, 1), got ",
      options.encoder_dropout());
}

/// `has_encoder` false: the rows alone, as they come from a file.
inline Plan plan(
    const PTuningOptions& options,
    const Network& network,
    bool has_encoder = true) {
  check(options);
  const auto places = prompt_places(options, network, "P-tuning");
  auto table = std::make_shared<PTuningDelta>(
      options, places.first(), places.rows, has_encoder);
  const auto wanted = trained_options(network);
  table->to(wanted.device(), c10::typeMetaToScalarType(wanted.dtype()));
  Plan result;
  result.method = "P_TUNING";
  result.options = PTuningOptions(options).task_type(places.task_type);
  plan_table(table, places, result.sites);
  plan_modules_to_save(network, options.modules_to_save(), result.sites);
  return result;
}

} // namespace detail

/// Trains a prompt and the network that makes it in front of `model`'s tokens,
/// and freezes everything else. peft::eject_reparameterization keeps the prompt
/// alone.
inline Adapter attach(
    torch::nn::Module& model,
    const PTuningOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
