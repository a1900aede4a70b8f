#pragma once

// Prompt tuning (Lester et al. 2021, arXiv:2104.08691): train the embeddings of
// a few tokens that stand in front of the input, and nothing else.
//
//   E' = [P; E(x)]     P [virtual tokens, hidden], E the frozen embedding
//
// Attention mask, positions and token types grow with the input; labels do by
// peft::extend_labels. A scale multiplies P, and a prompt of zeros still takes
// attention: scale 0 is not the base, disable() is.
//
// The template for a method of extra tokens: options, the delta that gives the
// tokens, the plan that says where, and attach.

#include <peft/core/attach.h>
#include <peft/core/extra_tokens.h>
#include <peft/methods/modules_to_save.h>
#include <peft/methods/virtual_tokens.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for prompt tuning.
///
///   peft::PromptOptions(20)                           rows of N(0, 1)
///   peft::PromptOptions(20).init("vocab")             of the vocabulary
///   peft::PromptOptions(20).init_token_ids({7, 12})   of a text
struct PromptOptions {
  PromptOptions(int64_t num_virtual_tokens)
      : num_virtual_tokens_(num_virtual_tokens) {}

  TORCH_ARG(int64_t, num_virtual_tokens);
  /// "random": N(0, 1), HF's RANDOM. "uniform": U(-0.5, 0.5), Lester's.
  /// "vocab": rows of the vocabulary drawn at random, HF's SAMPLE_VOCAB.
  /// "text" and "classes" follow from the two fields below.
  TORCH_ARG(std::string, init) = "random";
  /// The rows of these tokens, repeated or cut to fit: HF's TEXT.
  TORCH_ARG(std::vector<int64_t>, init_token_ids);
  /// One row for each class label, the mean over the label's tokens; the rest
  /// is drawn from the vocabulary.
  TORCH_ARG(std::vector<std::vector<int64_t>>, class_token_ids);
  /// Draws among the first so many rows of the vocabulary (the most common
  /// tokens; Lester: 5,000). 0: among all.
  TORCH_ARG(int64_t, population_size) = 0;
  /// In an encoder-decoder, 1 is a prompt for the encoder, 2 one for each.
  /// Default: one for each stack.
  TORCH_ARG(std::optional<int64_t>, num_transformer_submodules);
  /// false keeps the decoder's rows and uses only the encoder's, as HF PEFT
  /// 0.21.2 does.
  TORCH_ARG(bool, prompts_decoder) = true;
  /// Modules trained whole, beside the prompt: a task head.
  TORCH_ARG(std::vector<std::string>, modules_to_save);
  /// HF's task_type, by which HF PEFT runs a prompt from a file. Default: as
  /// the stacks and modules_to_save let guess.
  TORCH_ARG(std::string, task_type);
};

namespace detail {

/// A table of virtual tokens `[tokens * stacks, hidden]` at the first stack it
/// serves; the others have a PromptPart each.
class PromptTable : public TokensDelta {
 public:
  PromptTable(int64_t num_virtual_tokens, ExtraTokensOptions stack)
      : num_virtual_tokens_(num_virtual_tokens), stack_(std::move(stack)) {}

  /// As a file has it.
  virtual Tensor table() const = 0;
  /// As this call sees it; `[batch, tokens * stacks, hidden]` where each row of
  /// the batch has its own.
  virtual Tensor tokens() const {
    return table();
  }

  /// The first stack.
  const ExtraTokensOptions& stack() const {
    return stack_;
  }

  /// The rows of one stack.
  Tensor part(int64_t stack, double scale) const {
    const Tensor rows =
        tokens().narrow(-2, stack * num_virtual_tokens_, num_virtual_tokens_);
    return scale == 1.0 ? rows : rows * scale;
  }

  int64_t num_virtual_tokens() const final {
    return num_virtual_tokens_;
  }
  Tensor embeddings(double scale) const final {
    return part(0, scale);
  }

  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    return {{"prompt_embeddings", table()}};
  }

 private:
  int64_t num_virtual_tokens_;
  ExtraTokensOptions stack_;
};

/// Another stack's rows of a table.
class PromptPart final : public TokensDelta {
 public:
  PromptPart(std::shared_ptr<const PromptTable> of, int64_t stack)
      : of_(std::move(of)), stack_(stack) {}

  int64_t num_virtual_tokens() const override {
    return of_->num_virtual_tokens();
  }
  Tensor embeddings(double scale) const override {
    return of_->part(stack_, scale);
  }

  std::vector<std::pair<std::string, Tensor>> file_tensors() const override {
    return {};
  }

  std::shared_ptr<Delta> copy() const override {
    return std::make_shared<PromptPart>(of_, stack_);
  }
  void relink(const std::function<std::shared_ptr<Delta>(const Delta*)>&
                  copy_of) override {
    of_ = std::dynamic_pointer_cast<const PromptTable>(copy_of(of_.get()));
    TORCH_INTERNAL_ASSERT(of_ != nullptr);
  }

  std::string describe() const override {
    return "part " + std::to_string(stack_ + 1) + " of the prompt";
  }

 private:
  std::shared_ptr<const PromptTable> of_;
  int64_t stack_;
};

/// A prompt whose rows are trained themselves.
class PromptDelta final : public PromptTable {
 public:
  PromptDelta(
      int64_t num_virtual_tokens,
      ExtraTokensOptions stack,
      const Tensor& rows)
      : PromptTable(num_virtual_tokens, std::move(stack)) {
    prompt_embeddings = register_parameter("prompt_embeddings", rows);
  }

  Tensor table() const override {
    return prompt_embeddings;
  }

  std::shared_ptr<Delta> copy() const override {
    auto result = std::make_shared<PromptDelta>(
        num_virtual_tokens(), stack(), prompt_embeddings.detach().clone());
    result->prompt_embeddings.set_requires_grad(
        prompt_embeddings.requires_grad());
    result->train(is_training());
    return result;
  }

  std::string describe() const override {
    return "prompt l=" + std::to_string(num_virtual_tokens());
  }

  Tensor prompt_embeddings;
};

/// Where a prompt goes, and how large its table is.
struct PromptPlaces {
  std::vector<TokenSite> sites; // the stacks it acts on
  int64_t rows = 0;
  int64_t hidden_size = 0;
  std::string task_type;

  const ExtraTokensOptions& first() const {
    return sites.front().second->options;
  }
};

/// For the options of prompt tuning and of P-tuning.
template <class Options>
PromptPlaces prompt_places(
    const Options& options,
    const Network& network,
    const std::string& method) {
  const auto all = token_sites(network, method);
  PromptPlaces places;
  for (const auto& place : all) {
    if (place.second->options.stack() != "cross") {
      places.sites.push_back(place);
    }
  }
  TORCH_CHECK(
      !places.sites.empty(),
      "peft: ",
      method,
      " trains embeddings, and the places for extra tokens in this network (",
      stacks_of(all),
      ") take keys and values only; use PrefixOptions");
  const auto found = static_cast<int64_t>(places.sites.size());
  const int64_t stacks = options.num_transformer_submodules().value_or(found);
  TORCH_CHECK_VALUE(
      stacks >= 1 && stacks <= found,
      "peft: num_transformer_submodules is ",
      stacks,
      " and this network has ",
      found,
      found == 1 ? " stack" : " stacks",
      " for a prompt: ",
      stacks_of(places.sites));
  places.sites.resize(static_cast<size_t>(
      options.prompts_decoder() ? stacks : std::min<int64_t>(stacks, 1)));
  check_virtual_tokens(options.num_virtual_tokens(), places.sites);
  places.rows = options.num_virtual_tokens() * stacks;
  places.hidden_size = places.first().hidden_size();
  places.task_type = task_type_of(options, all);
  for (const auto& [name, site] : places.sites) {
    TORCH_CHECK_VALUE(
        site->options.hidden_size() == places.hidden_size,
        "peft: one prompt cannot serve stacks of different widths, ",
        places.hidden_size,
        " at '",
        places.sites.front().first,
        "' and ",
        site->options.hidden_size(),
        " at '",
        name,
        "'; attach to each of the two");
  }
  return places;
}

/// Sites for a table. A file with several has a key that HF PEFT, which knows
/// one, does not take for its own.
inline void plan_table(
    const std::shared_ptr<PromptTable>& table,
    const PromptPlaces& places,
    std::vector<PlannedSite>& sites) {
  for (size_t i = 0; i < places.sites.size(); ++i) {
    const auto& [name, place] = places.sites[i];
    PlannedSite site;
    site.name = site.parameter = name;
    site.file_prefix = places.sites.size() > 1 ? name : "";
    site.call_site = place->site();
    site.delta = table;
    if (i > 0) {
      site.delta = std::make_shared<PromptPart>(table, static_cast<int64_t>(i));
    }
    sites.push_back(std::move(site));
  }
}

/// The options' init, where two fields imply it.
inline std::string prompt_init(const PromptOptions& options) {
  const bool text = !options.init_token_ids().empty();
  const bool classes = !options.class_token_ids().empty();
  const std::string init = options.init() != "random" ? options.init()
      : text                                          ? "text"
      : classes                                       ? "classes"
                                                      : "random";
  bool known = false;
  for (const char* word :
       {"random", "uniform", "vocab", "text", "classes", "empty"}) {
    known = known || init == word;
  }
  TORCH_CHECK_VALUE(
      known,
      "peft: init must be 'random', 'uniform', 'vocab', 'text' or 'classes', "
      "got '",
      init,
      "'");
  TORCH_CHECK_VALUE(
      text == (init == "text"),
      "peft: init('text') and init_token_ids go together, got init('",
      init,
      "') with ",
      options.init_token_ids().size(),
      " token ids");
  TORCH_CHECK_VALUE(
      classes == (init == "classes"),
      "peft: init('classes') and class_token_ids go together, got init('",
      init,
      "') with ",
      options.class_token_ids().size(),
      " classes");
  TORCH_CHECK_VALUE(
      options.population_size() >= 0 &&
          (options.population_size() == 0 || init == "vocab" ||
           init == "classes"),
      "peft: population_size is for init('vocab') and init('classes') and must "
      "not be negative, got ",
      options.population_size(),
      " for init('",
      init,
      "')");
  return init;
}

/// The token embedding beside a site, `[vocabulary, hidden]`.
inline Tensor vocabulary(const Network& network, const TokenSite& at) {
  const std::string& beside = at.second->options.word_embeddings();
  TORCH_CHECK(
      !beside.empty(),
      "peft: this init starts from the vocabulary, and '",
      at.first,
      "' does not say where that is. Name the token embedding there, by "
      "ExtraTokensOptions::word_embeddings(\"embed_tokens\"), or start from "
      "init(\"random\")");
  const auto dot = at.first.rfind('.');
  const std::string path =
      dot == std::string::npos ? beside : at.first.substr(0, dot + 1) + beside;
  for (const auto& layer : network) {
    const Tensor table = layer.parameter("weight");
    if (layer.name == path && table.defined() && table.dim() == 2) {
      TORCH_CHECK(
          table.size(1) == at.second->options.hidden_size(),
          "peft: the token embedding '",
          path,
          "' is ",
          table.size(1),
          " wide and '",
          at.first,
          "' says ",
          at.second->options.hidden_size());
      return base(table).detach();
    }
  }
  TORCH_CHECK(
      false,
      "peft: '",
      at.first,
      "' says that the token embedding is '",
      path,
      "', and there is none.",
      near_misses(network, path));
  return {};
}

/// The rows of these tokens.
inline Tensor rows_of(const Tensor& table, const std::vector<int64_t>& ids) {
  for (const auto id : ids) {
    TORCH_CHECK_VALUE(
        id >= 0 && id < table.size(0),
        "peft: token id ",
        id,
        " is not in the vocabulary of ",
        table.size(0));
  }
  return table.index_select(
      0, torch::tensor(ids, at::kLong).to(table.device()));
}

/// A table as its init wants it, drawn on the CPU as PyTorch would.
inline Tensor initial_prompt(
    const PromptOptions& options,
    const Network& network,
    const PromptPlaces& places) {
  torch::NoGradGuard no_grad;
  const std::string init = prompt_init(options);
  const auto dtype = trained_options(network);
  if (init == "empty") { // to be filled from a file
    return at::zeros({places.rows, places.hidden_size}, dtype);
  }
  Tensor rows = torch::empty({places.rows, places.hidden_size});
  if (init == "random") {
    return rows.normal_().to(dtype);
  }
  if (init == "uniform") {
    return rows.uniform_(-0.5, 0.5).to(dtype);
  }
  const Tensor words = vocabulary(network, places.sites.front());
  const int64_t population =
      options.population_size() > 0 ? options.population_size() : words.size(0);
  TORCH_CHECK_VALUE(
      population <= words.size(0),
      "peft: population_size ",
      population,
      " is more than the vocabulary of ",
      words.size(0));
  if (init == "text") {
    std::vector<int64_t> ids;
    const auto& text = options.init_token_ids();
    for (int64_t i = 0; i < places.rows; ++i) {
      ids.push_back(text[static_cast<size_t>(i) % text.size()]);
    }
    return rows_of(words, ids).to(dtype);
  }
  const Tensor drawn = torch::randint(population, {places.rows}, at::kLong);
  rows = words.index_select(0, drawn.to(words.device())).to(dtype);
  TORCH_CHECK_VALUE(
      static_cast<int64_t>(options.class_token_ids().size()) <= places.rows,
      "peft: ",
      options.class_token_ids().size(),
      " classes are more than the prompt's ",
      places.rows,
      " rows");
  for (size_t i = 0; i < options.class_token_ids().size(); ++i) {
    const auto& label = options.class_token_ids()[i];
    TORCH_CHECK_VALUE(
        !label.empty(), "peft: class ", i, " of class_token_ids has no token");
    rows[static_cast<int64_t>(i)].copy_(
        rows_of(words, label).to(dtype).mean(0));
  }
  return rows;
}

inline Plan plan(const PromptOptions& options, const Network& network) {
  Plan result;
  result.method = "PROMPT_TUNING";
  const auto places = prompt_places(options, network, "prompt tuning");
  result.options = PromptOptions(options).task_type(places.task_type);
  plan_table(
      std::make_shared<PromptDelta>(
          options.num_virtual_tokens(),
          places.first(),
          initial_prompt(options, network, places)),
      places,
      result.sites);
  plan_modules_to_save(network, options.modules_to_save(), result.sites);
  return result;
}

} // namespace detail

/// Trains a prompt in front of `model`'s tokens and freezes everything else.
/// The network calls peft::ExtraTokens behind its token embedding; an error
/// shows the lines where it does not.
inline Adapter attach(
    torch::nn::Module& model,
    const PromptOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

} // namespace peft
