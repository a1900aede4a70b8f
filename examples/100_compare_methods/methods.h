#pragma once

// The methods: a row says how one is put on the network and how fast it learns.
// These are the only lines that know them by name.

#include "measure.h"

#include "../010_gloss_categories/task.h"

#include <peft/methods/intrinsic.h>
#include <peft/methods/krona.h>
#include <peft/peft.h>

#include <functional>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

namespace compare {

/// What an attach that looks at the task may use.
struct Setting {
  const Task& task; ///< its texts are those that are trained on
  uint64_t seed = 1;
  int64_t budget = 0; ///< trainable parameters beside the head
  int64_t samples = 64; ///< texts to choose entries or structures by
  /// Trains an adapter for as long as every method trains, at this rate; for
  /// methods that do so before they begin.
  std::function<void(Network&, const peft::Adapter&, double)> train;
};

struct Method {
  std::string key; ///< of the results, --only and the adapter's folder
  std::string name;
  std::string family;
  double learning_rate; ///< of all but the head
  std::function<peft::Adapter(Network&, const Setting&)> attach;
};

/// The head trains beside every adapter, at this rate, as in examples/090.
constexpr double kHeadLearningRate = 4e-3;
/// Where the network itself trains, and where a few of its entries do.
constexpr double kFullRate = 2e-4;
constexpr double kSparseRate = 2e-3;

namespace detail {

template <class Options>
peft::Adapter attach_with_head(Network& network, Options options) {
  return peft::attach(*network, options.modules_to_save({"classifier"}));
}

/// Options that need nothing but the network.
template <class Options>
std::function<peft::Adapter(Network&, const Setting&)> with(
    const Options& options) {
  return [options](Network& network, const Setting&) {
    return attach_with_head(network, options);
  };
}

template <class Options>
int64_t trainable_of(Network& network, const Options& options) {
  auto adapter = peft::attach(*network, options);
  const auto count = adapter.num_parameters();
  adapter.detach();
  return count;
}

inline std::vector<int64_t> up_to(int64_t most) {
  std::vector<int64_t> widths(static_cast<size_t>(most));
  std::iota(widths.begin(), widths.end(), 1);
  return widths;
}

/// `make(width)` for the one of `widths`, ascending in what they train, that
/// trains what is nearest to `budget`; the wider of two equally near.
template <class Make>
auto nearest(
    Network& network,
    int64_t budget,
    const std::vector<int64_t>& widths,
    Make&& make) {
  size_t low = 0; // the first that trains as much as the budget, or the last
  size_t high = widths.size() - 1;
  while (low < high) {
    const size_t middle = (low + high) / 2;
    if (trainable_of(network, make(widths[middle])) < budget) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  if (low > 0) {
    const auto over = trainable_of(network, make(widths[low])) - budget;
    const auto under = budget - trainable_of(network, make(widths[low - 1]));
    low -= under < over ? 1 : 0;
  }
  return make(widths[low]);
}

/// The side network's widths are the network's divided by these; a head keeps
/// at least one number.
inline std::vector<int64_t> ladder_reductions(const Network& network) {
  const auto& o = network->bert->options;
  const auto head = o.hidden_size() / o.num_attention_heads();
  std::vector<int64_t> reductions;
  for (int64_t r = head; r > 1; --r) {
    if (head % r == 0 && o.intermediate_size() % r == 0) {
      reductions.push_back(r);
    }
  }
  return reductions;
}

/// The Fisher information on `samples` texts of the task, with a progress bar.
inline peft::Scores fisher_of(
    Network& network,
    const Setting& setting,
    int64_t samples,
    peft::FisherOptions options) {
  const auto& texts = setting.task.data.train;
  samples = std::min(samples, static_cast<int64_t>(texts.size()));
  Progress bar("Fisher information", samples);
  options.num_samples(samples).progress([&](int64_t done, int64_t) {
    bar.update(done, "");
    return !interrupted();
  });
  const std::function<torch::Tensor(int64_t, int64_t)> loss = [&](int64_t begin,
                                                                  int64_t end) {
    std::vector<size_t> rows(static_cast<size_t>(end - begin));
    std::iota(rows.begin(), rows.end(), static_cast<size_t>(begin));
    const auto batch = make_batch(texts, rows, setting.task.padding);
    return torch::nn::functional::cross_entropy(
        network->forward(batch.ids, batch.mask), batch.labels);
  };
  return peft::estimate_fisher(*network, loss, options).scores;
}

/// FISH mask with a head, within the budget.
inline peft::Adapter attach_fish(Network& network, const Setting& setting) {
  const auto scores =
      fisher_of(network, setting, setting.samples, peft::FisherOptions());
  const auto wanted = setting.budget + count(network->classifier->parameters());
  const auto ratio = (static_cast<double>(wanted) + 0.5) /
      static_cast<double>(count(network->parameters()));
  return attach_with_head(network, peft::FishOptions(ratio).fisher(scores));
}

/// Child-tuning D, with the published estimate over fewer texts.
inline peft::Adapter attach_child_d(Network& network, const Setting& setting) {
  const auto scores = fisher_of(
      network,
      setting,
      4 * setting.samples,
      peft::FisherOptions().per_batch(true).batch_size(16).max_norm(1));
  return attach_with_head(
      network, peft::ChildTuningOptions(0.3).mode("D").fisher(scores));
}

/// LT-SFT: all of the network trains, then as many entries as the budget
/// allows, those that moved most, train again from the start.
inline peft::Adapter attach_lottery_ticket(
    Network& network,
    const Setting& setting,
    double learning_rate) {
  auto full = attach_with_head(
      network, peft::FullTuningOptions().exclude({"LayerNorm"}));
  setting.train(network, full, learning_rate);
  const auto mask = peft::lottery_ticket(full, setting.budget);
  full.detach();
  return attach_with_head(network, peft::SparseTuningOptions(mask));
}

} // namespace detail

/// What LoRA of rank 8 on query and value trains: the budget of all.
inline int64_t budget_of(Network& network) {
  return detail::trainable_of(
      network, peft::LoraOptions(8).targets({"query", "value"}));
}

/// Every method of the library, each as wide as comes nearest to the budget,
/// where it has a width. `network` is tried on and comes back as it was.
///
/// Learning rates: LoRA to the ladder, and BitFit, are those that examples/010
/// and 090 found on validation texts; the others are a relative's.
inline std::vector<Method>
methods(Network& network, int64_t budget, int64_t tokens) {
  using namespace peft;
  using detail::with;
  const auto near = [&](const std::vector<int64_t>& widths, auto&& make) {
    return with(detail::nearest(network, budget, widths, make));
  };
  const auto& sizes = network->bert->options;
  const auto widths = detail::up_to(sizes.hidden_size());
  const auto lengths = detail::up_to(
      std::min(sizes.hidden_size(), sizes.max_position_embeddings() / 2));
  std::vector<Method> all;

  // ~~~~ additive ~~~~

  all.push_back(
      {"houlsby",
       "Houlsby adapter",
       "additive",
       4e-3,
       near(widths, [](int64_t r) { return HoulsbyOptions(r); })});
  all.push_back(
      {"pfeiffer",
       "Pfeiffer adapter",
       "additive",
       4e-3,
       near(widths, [](int64_t r) { return PfeifferOptions(r); })});
  std::vector<int64_t> lower(
      static_cast<size_t>(sizes.num_hidden_layers() / 2));
  std::iota(lower.begin(), lower.end(), 0);
  all.push_back(
      {"adapter_drop",
       "AdapterDrop, lower half",
       "additive",
       4e-3,
       near(widths, [&](int64_t r) {
         return PfeifferOptions(r).leave_out(lower);
       })});
  all.push_back(
      {"parallel",
       "parallel adapter",
       "additive",
       4e-3,
       near(widths, [](int64_t r) { return ParallelAdapterOptions(r); })});
  all.push_back({"ia3", "(IA)³", "additive", 6e-2, with(Ia3Options())});
  all.push_back(
      {"prompt",
       "prompt tuning",
       "additive",
       3e-2,
       with(PromptOptions(tokens).init("vocab"))});
  all.push_back(
      {"p_tuning", "P-tuning", "additive", 1.2e-2, near(widths, [&](int64_t h) {
         return PTuningOptions(tokens).encoder_hidden_size(h);
       })});
  all.push_back(
      {"prefix",
       "prefix tuning",
       "additive",
       4e-3,
       near(widths, [&](int64_t h) {
         return PrefixOptions(tokens)
             .prefix_projection(true)
             .encoder_hidden_size(h);
       })});
  all.push_back(
      {"p_tuning_v2",
       "P-tuning v2",
       "additive",
       3e-2,
       near(lengths, [](int64_t n) { return PTuningV2Options(n); })});
  all.push_back(
      {"coda",
       "CoDA, half the tokens",
       "additive",
       4e-3,
       near(widths, [](int64_t r) {
         return CodaOptions().ratio(0.5).bottleneck(r);
       })});
  all.push_back(
      {"ladder",
       "ladder side tuning",
       "additive",
       1.2e-2,
       near(detail::ladder_reductions(network), [](int64_t r) {
         return LadderOptions(r);
       })});

  // ~~~~ partial ~~~~

  all.push_back({"bitfit", "BitFit", "partial", 8e-3, with(BitFitOptions())});
  all.push_back(
      {"bitfit_subset",
       "BitFit, query and FFN",
       "partial",
       8e-3,
       with(BitFitOptions({"query_intermediate"}))});
  all.push_back(
      {"layer_norm",
       "LayerNorm tuning",
       "partial",
       8e-3,
       with(LayerNormOptions())});

  all.push_back(
      {"random_mask",
       "random mask",
       "partial",
       kSparseRate,
       [](gloss::Network& host, const Setting& setting) {
         return detail::attach_with_head(
             host, RandomMaskOptions().k(setting.budget).seed(setting.seed));
       }});
  all.push_back(
      {"shira",
       "SHiRA, magnitude",
       "partial",
       kSparseRate,
       with(ShiraOptions(8).mask_type("magnitude"))});
  all.push_back(
      {"fish", "FISH mask", "partial", kSparseRate, detail::attach_fish});
  all.push_back(
      {"child_f",
       "Child-tuning F",
       "partial",
       kFullRate,
       with(ChildTuningOptions(0.3))});
  all.push_back(
      {"child_d",
       "Child-tuning D",
       "partial",
       kFullRate,
       detail::attach_child_d});
  all.push_back(
      {"lt_sft",
       "LT-SFT",
       "partial",
       kSparseRate,
       [](gloss::Network& host, const Setting& setting) {
         return detail::attach_lottery_ticket(host, setting, kFullRate);
       }});

  // ~~~~ reparameterised ~~~~

  all.push_back(
      {"lora",
       "LoRA",
       "reparameterised",
       4e-3,
       with(LoraOptions(8).alpha(16).targets({"query", "value"}))});
  all.push_back(
      {"dora", "DoRA", "reparameterised", 4e-3, near(widths, [](int64_t r) {
         return LoraOptions(r)
             .alpha(2.0 * static_cast<double>(r))
             .dora(true)
             .targets({"query", "value"});
       })});
  all.push_back(
      {"intrinsic",
       "intrinsic dimension",
       "reparameterised",
       kSparseRate,
       with(IntrinsicOptions(budget).said(true))});
  all.push_back(
      {"krona",
       "KronA",
       "reparameterised",
       4e-3,
       near(detail::up_to(budget / 4), [](int64_t each) {
         return KronaOptions().budget(each);
       })});

  // ~~~~ hybrid ~~~~

  const int64_t few = tokens / 4; // virtual tokens beside other parts
  all.push_back(
      {"mam", "MAM adapter", "hybrid", 4e-3, near(widths, [&](int64_t r) {
         return MamOptions()
             .prefix(PrefixOptions(few))
             .adapter(ParallelAdapterOptions(r));
       })});
  all.push_back(
      {"unipelt", "UniPELT", "hybrid", 4e-3, near(widths, [&](int64_t r) {
         return UniPeltOptions()
             .lora(LoraOptions(2).alpha(2))
             .prefix(PrefixOptions(few))
             .adapter(PfeifferOptions(r));
       })});

  // ~~~~ all of the network ~~~~

  all.push_back(
      {"full",
       "full fine-tuning",
       "reference",
       kFullRate,
       with(FullTuningOptions())});
  return all;
}

} // namespace compare
