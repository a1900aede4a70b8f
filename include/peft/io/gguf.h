#pragma once

// A LoRA as the GGUF file that llama.cpp takes with --lora: for each adapted
// weight W [out, in] the tensors
//
//   <W>.lora_a [r, in],  <W>.lora_b [out, r]       W += alpha / r · b a
//
// by llama.cpp's names (convert_lora_to_gguf.py and src/llama-adapter.cpp of
// llama.cpp). A token embedding's a is transposed, [vocabulary, r]; the rows of
// LLaMA's queries and keys stand in the order of llama.cpp's rotary embedding.

#include <peft/io/gguf/file.h>
#include <peft/io/gguf/names.h>
#include <peft/methods/lora.h>

#include <torch/arg.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace peft {

/// Options for save_gguf_lora.
///
///   peft::GgufOptions("llama").heads(32).kv_heads(8)
struct GgufOptions {
  using Names = std::vector<std::pair<std::string, std::string>>;

  GgufOptions(std::string architecture = "")
      : architecture_(std::move(architecture)) {}

  /// llama.cpp's general.architecture of the base: "llama" (Mistral too),
  /// "qwen2", "gpt2", "bert" (RoBERTa too), "t5"; any other with names(...).
  TORCH_ARG(std::string, architecture);
  /// float32, float16 or bfloat16.
  TORCH_ARG(at::ScalarType, dtype) = at::kFloat;
  /// HF's num_attention_heads and num_key_value_heads (as many, if not set), by
  /// which the rows of LLaMA's queries and keys are put in order.
  TORCH_ARG(int64_t, heads) = 0;
  TORCH_ARG(int64_t, kv_heads) = 0;
  /// Further modules and what llama.cpp calls their weights, without ".weight";
  /// "#" stands for a layer's number: {"blocks.#.att.q", "blk.#.attn_q"}.
  TORCH_ARG(Names, names);
  /// general.name, if wanted.
  TORCH_ARG(std::string, name);
};

namespace detail {

/// Rows of a query or key projection from HF's order, in which a head's two
/// halves turn together, to llama.cpp's, in which neighbours do.
inline Tensor
rows_for_rope(const Tensor& b, int64_t heads, const std::string& module) {
  TORCH_CHECK_VALUE(
      heads > 0,
      "peft: llama.cpp has the rows of '",
      module,
      "' in another order, by heads; set heads(...) and, with grouped queries, "
      "kv_heads(...)");
  TORCH_CHECK_VALUE(
      b.size(0) % (2 * heads) == 0,
      "peft: '",
      module,
      "' has ",
      b.size(0),
      " rows, which do not make ",
      heads,
      " heads of an even size");
  return b.reshape({heads, 2, -1, b.size(1)})
      .transpose(1, 2)
      .reshape(b.sizes());
}

class GgufLoraWriter {
 public:
  GgufLoraWriter(const AdapterState& adapter, const GgufOptions& options)
      : adapter_(adapter),
        options_(options),
        names_(gguf_names(options.architecture())) {
    names_.insert(
        names_.begin(), options.names().begin(), options.names().end());
  }

  GgufFile run() const {
    const torch::NoGradGuard no_grad;
    check();
    GgufFile file;
    file.add("general.architecture", options_.architecture());
    file.add("general.type", std::string("adapter"));
    if (!options_.name().empty()) {
      file.add("general.name", options_.name());
    }
    file.add("adapter.type", std::string("lora"));
    // One alpha serves all. Where a site's alpha / r would not be its scaling
    // the difference goes into b; 0 would mean a scaling of 1.
    double alpha = 0.0;
    for (const auto& record : adapter_.sites) {
      alpha = alpha == 0.0 ? alpha_of(delta_of(record)) : alpha;
    }
    alpha = alpha == 0.0 ? 1.0 : alpha;
    file.add("adapter.lora.alpha", static_cast<float>(alpha));
    for (const auto& record : adapter_.sites) {
      const LoraDelta& delta = delta_of(record);
      const std::string tensor = name_of(record);
      auto [a, b] = delta.factors();
      if (delta.config().layout == LoraLayout::transposed) {
        std::tie(a, b) = std::make_pair(b.t(), a.t()); // stored as [out, in]
      }
      if (alpha_of(delta) != alpha) {
        b = b * (alpha_of(delta) / alpha);
      }
      if (tensor == "token_embd") { // rows of a are looked up
        std::tie(a, b) = std::make_pair(b, a.t());
      } else if (options_.architecture() == "llama" && is_turned(tensor)) {
        b = rows_for_rope(b, heads_of(tensor), record.name);
      }
      file.add(tensor + ".weight.lora_a", cast(a, record.name));
      file.add(tensor + ".weight.lora_b", cast(b, record.name));
    }
    return file;
  }

 private:
  void check() const {
    TORCH_CHECK_VALUE(
        !options_.architecture().empty(),
        "peft: set architecture(...), llama.cpp's name for the base model: "
        "llama, qwen2, gpt2, bert, t5, or another with names(...)");
    TORCH_CHECK_VALUE(
        !names_.empty(),
        "peft: the architecture '",
        options_.architecture(),
        "' is not one of llama, qwen2, gpt2, bert, t5; set names(...) for its "
        "weights");
    for (const auto& [from, to] : options_.names()) {
      const auto in = std::count(from.begin(), from.end(), '#');
      TORCH_CHECK_VALUE(
          in <= 1 && in == std::count(to.begin(), to.end(), '#'),
          "peft: in names(...) '",
          from,
          "' and '",
          to,
          "' must each have one # for the layer's number, or none");
    }
    TORCH_CHECK(
        adapter_.method == "LORA",
        "peft: a GGUF adapter is a LoRA, and '",
        adapter_.name,
        "' is of method ",
        adapter_.method,
        "; convert_to_lora() makes one of what can be merged");
    for (const auto& record : adapter_.sites) {
      const auto* delta = dynamic_cast<const LoraDelta*>(record.delta.get());
      TORCH_CHECK(
          dynamic_cast<const DoraDelta*>(record.delta.get()) == nullptr,
          "peft: a GGUF adapter has no magnitudes, and '",
          adapter_.name,
          "' is a DoRA; convert_to_lora() makes a LoRA of it");
      TORCH_CHECK(
          delta != nullptr && delta->decorations().empty(),
          "peft: a GGUF adapter has no place for '",
          record.delta->describe(),
          "' at '",
          record.name,
          "'; llama.cpp reads low-rank factors of matrices only. Merge the "
          "adapter and convert the whole model instead");
      TORCH_CHECK(
          delta->config().layout != LoraLayout::convolution &&
              lock_site(record)->sizes.size() == 2,
          "peft: llama.cpp adapts matrices, and '",
          record.name,
          "' has the shape ",
          at::IntArrayRef(lock_site(record)->sizes));
    }
  }

  static const LoraDelta& delta_of(const SiteRecord& record) {
    return dynamic_cast<const LoraDelta&>(*record.delta);
  }

  /// alpha / r is the site's scaling; r as the file has it.
  static double alpha_of(const LoraDelta& delta) {
    return delta.config().scaling *
        static_cast<double>(delta.factors().first.size(0));
  }

  /// llama.cpp's name, which all tied weights must have in common.
  std::string name_of(const SiteRecord& record) const {
    std::string result;
    for (const auto& parameter : record.parameters) {
      const std::string end = ".weight";
      const bool is_weight = parameter.size() > end.size() &&
          parameter.compare(parameter.size() - end.size(), end.size(), end) ==
              0;
      const std::string module = is_weight
          ? parameter.substr(0, parameter.size() - end.size())
          : parameter;
      const std::string name = gguf_name(names_, module);
      TORCH_CHECK(
          !name.empty(),
          "peft: '",
          module,
          "' is not among the weights of '",
          options_.architecture(),
          "' that llama.cpp adapts; name its tensor in names(...), or train "
          "without it");
      TORCH_CHECK(
          result.empty() || result == name,
          "peft: '",
          record.parameters.front(),
          "' is tied to '",
          parameter,
          "' and adapted in both uses; llama.cpp would adapt one of them");
      result = name;
    }
    return result;
  }

  static bool ends_with(const std::string& text, const std::string& end) {
    return text.size() >= end.size() &&
        text.compare(text.size() - end.size(), end.size(), end) == 0;
  }
  static bool is_turned(const std::string& tensor) {
    return ends_with(tensor, ".attn_q") || ends_with(tensor, ".attn_k");
  }
  int64_t heads_of(const std::string& tensor) const {
    return ends_with(tensor, ".attn_k") && options_.kv_heads() > 0
        ? options_.kv_heads()
        : options_.heads();
  }

  Tensor cast(const Tensor& value, const std::string& module) const {
    const Tensor result = value.detach().to(options_.dtype());
    TORCH_CHECK(
        at::isfinite(result).all().item<bool>(),
        "peft: the factors of '",
        module,
        "' are not finite in ",
        options_.dtype(),
        "; nothing was written");
    return result;
  }

  const AdapterState& adapter_;
  const GgufOptions& options_;
  GgufNames names_;
};

} // namespace detail

/// Writes a LoRA for llama.cpp. rsLoRA and patterns of rank and alpha keep
/// their scaling; set_scale() does not count (llama.cpp has --lora-scaled).
///
///   peft::save_gguf_lora(
///       adapter, "adapter.gguf", peft::GgufOptions("llama").heads(32));
///
/// Other methods, DoRA, trained biases and heads, convolutions and weights that
/// llama.cpp does not adapt are errors, with the way out where there is one;
/// nothing is written then.
inline void save_gguf_lora(
    const Adapter& adapter,
    const std::string& path,
    const GgufOptions& options) {
  adapter.name(); // an empty or detached handle is an error
  detail::GgufLoraWriter(*adapter.shared_state(), options).run().save(path);
}

} // namespace peft
